/* vit_map.c - see vit_map.h. Formulas: model.md 2.3 (positions), 2.4 (class tokens), 2.6 (pixel
 * shuffle); double precision.
 *
 * Two conventions that are easy to mix up: the resize of the position grid takes pixel centres
 * (align_corners = False), the augmentation takes corners (align_corners = True).
 */
#include <math.h>
#include "check.h"
#include "vit_map.h"

/* One axis of a bilinear map: two points and their weights. */
struct axis {
    int64_t i0, i1;
    double w0, w1;
};

static struct axis axis_resize(int dst, int64_t from, int64_t to);
static struct axis axis_sample(int dst, int n, double scale, double offset, int grid);
static int64_t ceil_ratio(int64_t grid, int64_t part, int64_t whole);

void vit_map_cpe(double u1, double u2, double u3x, double u3y, double out[4])
{
    double sc = u1 * (1 - sqrt(0.1)) + sqrt(0.1), ar = exp(u2 * (2 * log(4.0 / 3)) + log(3.0 / 4));
    out[0] = fmin(fmax(sc * ar, 0), 1);
    out[1] = fmin(fmax(sc / ar, 0), 1);
    out[2] = u3x * (1 - out[0]);
    out[3] = u3y * (1 - out[1]);
}

void vit_map_positions(int h, int w, int gh, int gw, int64_t width, const double *cpe,
                       int32_t *index, double *weight)
{
    ASSERT(h > 0 && w > 0 && gh > 0 && gw > 0 && width > 0 && (int64_t)gh * gw <= INT32_MAX);
    int64_t m = h > w ? h : w, rows = gh, cols = gw, to_rows = m, to_cols = m;
    bool raw = h == gh && w == gw;
    /* 32-bit indices of the resized grid would overflow: crop first, then resize straight to the
     * tile */
    if ((double)width * (double)m * (double)m >= 2147483647.0) {
        rows = h < w ? ceil_ratio(gh, h, w) : gh;
        cols = w < h ? ceil_ratio(gw, w, h) : gw;
        to_rows = h;
        to_cols = w;
    }
    for (int i = 0; i < h; i++)
        for (int j = 0; j < w; j++, index += 4, weight += 4) {
            struct axis y = { i, i, 1, 0 }, x = { j, j, 1, 0 };
            if (!raw && cpe != NULL) {
                x = axis_sample(j, w, cpe[0], cpe[2], gw);
                y = axis_sample(i, h, cpe[1], cpe[3], gh);
            } else if (!raw) {
                x = axis_resize(j, cols, to_cols);
                y = axis_resize(i, rows, to_rows);
            }
            for (int k = 0; k < 4; k++) {
                index[k] = (int32_t)((k < 2 ? y.i0 : y.i1) * gw + (k % 2 == 0 ? x.i0 : x.i1));
                weight[k] = (k < 2 ? y.w0 : y.w1) * (k % 2 == 0 ? x.w0 : x.w1);
            }
        }
}

/* Pixel centres; the far end is clamped, so its two points may coincide and their weights still add
 * up to 1. */
static struct axis axis_resize(int dst, int64_t from, int64_t to)
{
    double at = fmax(0, (dst + 0.5) * (double)from / (double)to - 0.5);
    int64_t i0 = (int64_t)floor(at), i1 = i0 + 1 < from ? i0 + 1 : from - 1;
    double w = at - (double)i0;
    return (struct axis){ i0, i1, 1 - w, w };
}

/* Corners; a point outside the grid counts as zero. */
static struct axis axis_sample(int dst, int n, double scale, double offset, int grid)
{
    double at = ((n > 1 ? (double)dst / (n - 1) : 0) * scale + offset) * (grid - 1),
           low = floor(at), w = at - low;
    struct axis a = { 0, 0, 0, 0 };
    if (low >= 0 && low < grid) {
        a.i0 = (int64_t)low;
        a.w0 = 1 - w;
    }
    if (low + 1 >= 0 && low + 1 < grid) {
        a.i1 = (int64_t)low + 1;
        a.w1 = w;
    }
    return a;
}

/* ceil(grid*part/whole) */
static int64_t ceil_ratio(int64_t grid, int64_t part, int64_t whole)
{
    return (grid * part + whole - 1) / whole;
}

int64_t vit_map_patches(const int32_t (*tile)[2], int64_t tiles)
{
    return vit_map_rows(tile, tiles, 0);
}

int64_t vit_map_rows(const int32_t (*tile)[2], int64_t tiles, int c)
{
    int64_t rows = 0;
    ASSERT(tiles >= 0 && c >= 0);
    for (int64_t i = 0; i < tiles; i++) {
        ASSERT(tile[i][0] > 0 && tile[i][1] > 0);
        rows += c + (int64_t)tile[i][0] * tile[i][1];
        ASSERT(rows <= INT32_MAX);
    }
    return rows;
}

int64_t vit_map_cu(const int32_t (*tile)[2], int64_t tiles, int c, int32_t *cu)
{
    int64_t max_len = 0;
    ASSERT(vit_map_rows(tile, tiles, c) <= INT32_MAX);
    cu[0] = 0;
    for (int64_t i = 0; i < tiles; i++) {
        int32_t n = c + tile[i][0] * tile[i][1];
        cu[i + 1] = cu[i] + n;
        max_len = n > max_len ? n : max_len;
    }
    return max_len;
}

void vit_map_sources(const int32_t (*tile)[2], int64_t tiles, int c, int32_t *row_source)
{
    int32_t patch = 0;
    ASSERT(vit_map_rows(tile, tiles, c) <= INT32_MAX);
    for (int64_t i = 0; i < tiles; i++) {
        for (int j = 0; j < c; j++)
            *row_source++ = -1 - j;
        for (int32_t n = tile[i][0] * tile[i][1]; n > 0; n--)
            *row_source++ = patch++;
    }
}

int64_t vit_map_outputs(const int32_t (*tile)[2], int64_t tiles, int c, bool drop, bool shuffle)
{
    ASSERT(!shuffle || drop || c == 0);
    if (!shuffle)
        return vit_map_rows(tile, tiles, drop ? 0 : c);
    for (int64_t i = 0; i < tiles; i++)
        ASSERT(tile[i][0] % 2 == 0 && tile[i][1] % 2 == 0);
    return vit_map_patches(tile, tiles) / 4;
}

void vit_map_output_rows(const int32_t (*tile)[2], int64_t tiles, int c, bool drop, bool shuffle,
                         int32_t *row)
{
    int32_t first = 0;
    ASSERT(vit_map_outputs(tile, tiles, c, drop, shuffle) <= vit_map_rows(tile, tiles, c));
    for (int64_t i = 0; i < tiles; i++) {
        int32_t h = tile[i][0], w = tile[i][1];
        for (int j = 0; j < c; j++, first++)
            if (!drop)
                *row++ = first;
        if (!shuffle)
            for (int32_t p = 0; p < h * w; p++)
                *row++ = first + p;
        else
            for (int32_t r = 0; r < h; r += 2)
                for (int32_t q = 0; q < w; q += 2)
                    for (int32_t k = 0; k < 4; k++)
                        *row++ = first + (r + k / 2) * w + q + k % 2;
        first += h * w;
    }
}

void vit_map_invert(const int32_t *map, int64_t n, int64_t size, int32_t *inverse)
{
    ASSERT(n <= INT32_MAX);
    for (int64_t i = 0; i < size; i++)
        inverse[i] = -1;
    for (int64_t i = 0; i < n; i++) {
        ASSERT(map[i] < size);
        if (map[i] < 0)
            continue;
        ASSERT(inverse[map[i]] == -1);
        inverse[map[i]] = (int32_t)i;
    }
}
