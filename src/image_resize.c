/* image_resize.c - bicubic resize, the grid of patches, normalised patches (training.md 6.8).
 *
 * The resize repeats the imaging library's arithmetic step by step (its src/libImaging/Resample.c,
 * 8 bits a channel): weights in double, normalised, then rounded to 22 fractional bits; integer
 * sums; a horizontal pass into bytes, then a vertical one; a pass is left out where the size stays.
 * A compiler that fuses multiply and add moves a weight by an ulp of double, far below the 22 bits.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "check.h"
#include "image.h"

enum { WEIGHT_BITS = 32 - 8 - 2 };

/* Output k = sum over j < count[k] of weight[k*width + j] * input[first[k] + j]. */
struct resample {
    int out, width;     /* outputs; weights reserved per output */
    int *first, *count; /* [out] */
    int32_t *weight;    /* [out, width] fixed point */
};

static void resample_init(struct resample *r, int in, int out);
static void resample_free(struct resample *r);
static double bicubic(double x);
static void pass_horizontal(const struct image *in, const struct resample *r, struct image *out);
static void pass_vertical(const struct image *in, const struct resample *r, struct image *out);
static void reserve(struct image *im, int width, int height);

void image_resize(const struct image *in, int width, int height, struct image *out)
{
    ASSERT(width >= 1 && height >= 1 && in->width >= 1 && in->height >= 1 && in != out);
    struct resample columns, rows;
    struct image between = { 0 };
    const struct image *from = in;
    if (width != in->width) {
        resample_init(&columns, in->width, width);
        pass_horizontal(in, &columns, height != in->height ? &between : out);
        resample_free(&columns);
        from = &between;
    }
    if (height != in->height) {
        resample_init(&rows, in->height, height);
        pass_vertical(from, &rows, out);
        resample_free(&rows);
    } else if (width == in->width) {
        reserve(out, width, height);
        memcpy(out->rgb, in->rgb, (size_t)width * (size_t)height * 3);
    }
    image_free(&between);
}

void image_grid(int width, int height, int patch, int64_t min_patches, int64_t max_patches,
                int merge, int *tw, int *th)
{
    ASSERT(width >= 1 && height >= 1 && patch >= 1 && min_patches >= 1 && merge >= 1);
    ASSERT(max_patches == 0 || max_patches >= (int64_t)merge * merge);
    const double limit = max_patches > 0 ? (double)max_patches : INFINITY;
    /* rint: half to even, in the default rounding mode */
    double rows = rint((double)height / patch + 0.5), columns = rint((double)width / patch + 0.5);
    const double factor = fmin(sqrt(limit / (rows * columns)), 1.0);
    rows = fmax(floor(factor * rows), 1);
    columns = fmax(floor(factor * columns), 1);
    const double least = fmin((double)min_patches, limit);
    if (rows * columns < least) {
        const double up = sqrt(least / (rows * columns));
        rows = ceil(up * rows);
        columns = ceil(up * columns);
    }
    const double over_rows = fmod(rows, merge);
    if (over_rows > 0)
        rows += (rows + merge - over_rows) * columns <= limit ? merge - over_rows : -over_rows;
    rows = fmax(rows, merge);
    const double over_columns = fmod(columns, merge);
    if (over_columns > 0)
        columns +=
            (columns + merge - over_columns) * rows <= limit ? merge - over_columns : -over_columns;
    columns = fmax(columns, merge);
    /* The floors of 1 and `merge` (thin pictures) or the ceilings may have left too many; the
     * longer side gives way. At least `merge` remains of it: (shorter - 1)^2 < limit and limit >=
     * merge^2. */
    double *longer = columns >= rows ? &columns : &rows;
    const double shorter = columns >= rows ? rows : columns;
    if (rows * columns > limit)
        *longer = floor(limit / shorter / merge) * merge;
    ASSERT(rows >= 1 && columns >= 1 && rows * columns <= limit && rows <= 1e9 && columns <= 1e9);
    *tw = (int)columns;
    *th = (int)rows;
}

const double image_mean[3] = { 0.48145466, 0.4578275, 0.40821073 };
const double image_deviation[3] = { 0.26862954, 0.26130258, 0.27577711 };

/* One loop for both precisions: mean and deviation are applied in double to the 256 values of each
 * channel. */
#define DEFINE_PATCHIFY(name, type) \
    int64_t name(const struct image *im, int patch, type *out) \
    { \
        ASSERT(patch >= 1 && im->width % patch == 0 && im->height % patch == 0); \
        type value[3][256]; \
        for (int c = 0; c < 3; c++) \
            for (int v = 0; v < 256; v++) \
                value[c][v] = (type)((v / 255.0 - image_mean[c]) / image_deviation[c]); \
        const int64_t tw = im->width / patch, th = im->height / patch; \
        for (int64_t ty = 0; ty < th; ty++) \
            for (int64_t tx = 0; tx < tw; tx++) \
                for (int c = 0; c < 3; c++) \
                    for (int64_t y = ty * patch; y < (ty + 1) * patch; y++) { \
                        const uint8_t *row = im->rgb + (size_t)(y * im->width + tx * patch) * 3; \
                        for (int x = 0; x < patch; x++) \
                            *out++ = value[c][row[3 * x + c]]; \
                    } \
        return tw * th; \
    }
DEFINE_PATCHIFY(image_patchify_f32, float)
DEFINE_PATCHIFY(image_patchify_f64, double)

static void reserve(struct image *im, int width, int height)
{
    const size_t bytes = (size_t)width * (size_t)height * 3;
    if (im->capacity < bytes) {
        free(im->rgb);
        im->rgb = xmalloc(bytes, 1);
        im->capacity = bytes;
    }
    ASSERT(im->rgb);
    im->width = width;
    im->height = height;
}

static double bicubic(double x)
{
    const double a = -0.5;
    x = fabs(x);
    if (x < 1.0)
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0)
        return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

static void resample_init(struct resample *r, int in, int out)
{
    const double scale = (double)in / out, stretch = scale < 1.0 ? 1.0 : scale;
    const double support = 2.0 * stretch, shrink = 1.0 / stretch;
    r->out = out;
    r->width = (int)ceil(support) * 2 + 1;
    r->first = xmalloc((size_t)out, sizeof *r->first);
    r->count = xmalloc((size_t)out, sizeof *r->count);
    r->weight = xcalloc((size_t)out * (size_t)r->width, sizeof *r->weight);
    double *w = xmalloc((size_t)r->width, sizeof *w);
    for (int k = 0; k < out; k++) {
        const double centre = (k + 0.5) * scale;
        int lo = (int)(centre - support + 0.5), hi = (int)(centre + support + 0.5);
        if (lo < 0)
            lo = 0;
        if (hi > in)
            hi = in;
        double sum = 0.0;
        for (int j = 0; j < hi - lo; j++) {
            w[j] = bicubic((j + lo - centre + 0.5) * shrink);
            sum += w[j];
        }
        r->first[k] = lo;
        r->count[k] = hi - lo;
        for (int j = 0; j < hi - lo; j++) {
            const double fixed = (sum != 0.0 ? w[j] / sum : w[j]) * (1 << WEIGHT_BITS);
            r->weight[(size_t)k * (size_t)r->width + (size_t)j] =
                (int32_t)(fixed < 0 ? fixed - 0.5 : fixed + 0.5);
        }
    }
    free(w);
}

static void resample_free(struct resample *r)
{
    free(r->first);
    free(r->count);
    free(r->weight);
}

/* The sum is within 32 bits: |weights| add up to less than 2 * 2^22, times 255. */
static inline uint8_t to_byte(int32_t sum)
{
    const int32_t v = sum >> WEIGHT_BITS;
    return (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v);
}

static void pass_horizontal(const struct image *in, const struct resample *r, struct image *out)
{
    reserve(out, r->out, in->height);
    for (int y = 0; y < in->height; y++) {
        const uint8_t *from = in->rgb + (size_t)y * (size_t)in->width * 3;
        uint8_t *to = out->rgb + (size_t)y * (size_t)r->out * 3;
        for (int k = 0; k < r->out; k++, to += 3) {
            const int32_t *w = r->weight + (size_t)k * (size_t)r->width;
            const uint8_t *p = from + (size_t)r->first[k] * 3;
            int32_t sum[3] = { 1 << (WEIGHT_BITS - 1), 1 << (WEIGHT_BITS - 1),
                               1 << (WEIGHT_BITS - 1) };
            for (int j = 0; j < r->count[k]; j++, p += 3)
                for (int c = 0; c < 3; c++)
                    sum[c] += p[c] * w[j];
            for (int c = 0; c < 3; c++)
                to[c] = to_byte(sum[c]);
        }
    }
}

static void pass_vertical(const struct image *in, const struct resample *r, struct image *out)
{
    reserve(out, in->width, r->out);
    const size_t row = (size_t)in->width * 3;
    int32_t *sum = xmalloc(row, sizeof *sum);
    for (int k = 0; k < r->out; k++) {
        for (size_t x = 0; x < row; x++)
            sum[x] = 1 << (WEIGHT_BITS - 1);
        for (int j = 0; j < r->count[k]; j++) {
            const int32_t w = r->weight[(size_t)k * (size_t)r->width + (size_t)j];
            const uint8_t *p = in->rgb + ((size_t)r->first[k] + (size_t)j) * row;
            for (size_t x = 0; x < row; x++)
                sum[x] += p[x] * w;
        }
        uint8_t *to = out->rgb + (size_t)k * row;
        for (size_t x = 0; x < row; x++)
            to[x] = to_byte(sum[x]);
    }
    free(sum);
}
