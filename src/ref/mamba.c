/* mamba.c - the short convolution and the gated norm of the Mamba-2 layer. Formulas: model.md 1.6.2
 * and 1.6.6; the scan is in ssd.c.
 *
 * Convolution: v[s] = b + sum_w k[w] x[s-(W-1)+w] inside the segment of s, y = v sg(v): k[W-1]
 * belongs to the current token. Columns are handled REF_COLUMNS at a time, so that the transposed
 * taps and the sums for their gradients fit on the stack. Gated norm: the gate comes first (u = y
 * silu(z)), then the RMS over each of `groups` ranges of columns.
 */
#include "ssd.h"

enum { CONV_MAX_TAPS = 64 };

/* The convolution of columns [first, first+n). */
struct taps {
    int64_t taps, n;
    const real *bias;
    real weight[CONV_MAX_TAPS][REF_COLUMNS]; /* [taps][n] */
};

static int64_t check_conv(in_t x, in_t w, in_t b, in_t cu, int64_t max_len, in_t y);
static void taps_load(struct taps *t, in_t w, in_t b, int64_t first, int64_t n);
static void convolve(const struct taps *t, const real *restrict x, int64_t ld, int64_t before,
                     real *restrict v);
static void convolution_dv(const struct taps *t, in_t x, const int32_t *cu, int64_t segments,
                           int64_t column, in_t dy, out_t dv);
static void convolution_dx(const struct taps *t, const int32_t *cu, int64_t segments,
                           int64_t column, out_t dx);
static void convolution_dw(const struct taps *t, in_t x, const int32_t *cu, int64_t segments,
                           int64_t column, in_t dv, real *dw, real *db);
static void check_gated(in_t y, in_t z, in_t w, int groups, in_t rs, in_t o);

/* Columns of the block that starts at `first`. */
static int64_t block_cols(int64_t first, int64_t cols)
{
    return cols - first < REF_COLUMNS ? cols - first : REF_COLUMNS;
}

void REF(conv_forward)(struct stream *s, in_t x, in_t w, in_t b, in_t cu, int64_t max_len, out_t y)
{
    int64_t cols = tensor_cols(y), segments = check_conv(x, w, b, cu, max_len, y);
    const int32_t *start = cu->data;
    struct taps t;
    for (int64_t first = 0; first < cols; first += REF_COLUMNS) {
        taps_load(&t, w, b, first, block_cols(first, cols));
        for (int64_t i = 0; i < segments; i++)
            for (int64_t r = start[i]; r < start[i + 1]; r++) {
                real v[REF_COLUMNS], *to = ref_row(y, r) + first;
                convolve(&t, ref_row(x, r) + first, x->ld, r - start[i], v);
                for (int64_t c = 0; c < t.n; c++)
                    to[c] = v[c] / (1 + REF_EXP(-v[c]));
            }
    }
}

void REF(conv_backward)(struct stream *s, in_t x, in_t w, in_t b, in_t cu, int64_t max_len, in_t dy,
                        out_t dx, out_t dw, out_t db)
{
    int64_t cols = tensor_cols(dx), segments = check_conv(x, w, b, cu, max_len, dx);
    ref_expect(dy, tensor_rows(dx), cols);
    ASSERT((dw == NULL) == (db == NULL));
    real *dweight = dw != NULL ? ref_vector(dw, tensor_numel(w)) : NULL,
         *dbias = db != NULL ? ref_vector(db, cols) : NULL;
    struct taps t;
    for (int64_t first = 0; first < cols; first += REF_COLUMNS) {
        taps_load(&t, w, b, first, block_cols(first, cols));
        convolution_dv(&t, x, cu->data, segments, first, dy, dx);
        if (dweight != NULL)
            convolution_dw(&t, x, cu->data, segments, first, dx, dweight + first * t.taps,
                           dbias + first);
        convolution_dx(&t, cu->data, segments, first, dx);
    }
}

/* Returns the number of segments. */
static int64_t check_conv(in_t x, in_t w, in_t b, in_t cu, int64_t max_len, in_t y)
{
    int64_t rows = tensor_rows(y), cols = tensor_cols(y), taps = tensor_cols(w);
    ASSERT(taps >= 1 && taps <= CONV_MAX_TAPS);
    ref_expect(x, rows, cols);
    ref_expect(y, rows, cols);
    ref_vector(w, cols * taps);
    ref_vector(b, cols);
    return ref_segments(cu, rows, max_len);
}

static void taps_load(struct taps *t, in_t w, in_t b, int64_t first, int64_t n)
{
    const int64_t taps = tensor_cols(w);
    const real *from = (const real *)w->data + first * taps;
    t->taps = taps;
    t->n = n;
    t->bias = (const real *)b->data + first;
    for (int64_t c = 0; c < n; c++)
        for (int64_t k = 0; k < taps; k++)
            t->weight[k][c] = from[c * taps + k];
}

/* v of the row at x, which has `before` rows of its segment above it. */
static void convolve(const struct taps *t, const real *restrict x, int64_t ld, int64_t before,
                     real *restrict v)
{
    const int64_t n = t->n, last = t->taps - 1;
    for (int64_t c = 0; c < n; c++)
        v[c] = t->bias[c];
    for (int64_t k = last - before > 0 ? last - before : 0; k <= last; k++) {
        const real *from = x + (k - last) * ld, *weight = t->weight[k];
        for (int64_t c = 0; c < n; c++)
            v[c] += weight[c] * from[c];
    }
}

/* dv = dy sg(v) (1 + v (1-sg(v))) */
static void convolution_dv(const struct taps *t, in_t x, const int32_t *cu, int64_t segments,
                           int64_t column, in_t dy, out_t dv)
{
    for (int64_t i = 0; i < segments; i++)
        for (int64_t r = cu[i]; r < cu[i + 1]; r++) {
            real v[REF_COLUMNS], *to = ref_row(dv, r) + column;
            const real *from = ref_row(dy, r) + column;
            convolve(t, ref_row(x, r) + column, x->ld, r - cu[i], v);
            for (int64_t c = 0; c < t->n; c++) {
                real gate = 1 / (1 + REF_EXP(-v[c]));
                to[c] = from[c] * gate * (1 + v[c] * (1 - gate));
            }
        }
}

/* On entry dx holds dv. Row r becomes sum_w k[w] dv[r+W-1-w]: rows in ascending order still find
 * the dv below them. */
static void convolution_dx(const struct taps *t, const int32_t *cu, int64_t segments,
                           int64_t column, out_t dx)
{
    const int64_t last = t->taps - 1;
    for (int64_t i = 0; i < segments; i++)
        for (int64_t r = cu[i]; r < cu[i + 1]; r++) {
            real *restrict to = ref_row(dx, r) + column;
            for (int64_t c = 0; c < t->n; c++)
                to[c] *= t->weight[last][c];
            for (int64_t ahead = 1; ahead <= last && r + ahead < cu[i + 1]; ahead++) {
                const real *from = to + ahead * dx->ld, *weight = t->weight[last - ahead];
                for (int64_t c = 0; c < t->n; c++)
                    to[c] += weight[c] * from[c];
            }
        }
}

/* dw[c][k] += sum_s dv[s] x[s-(W-1)+k], db += sum_s dv[s]. */
static void convolution_dw(const struct taps *t, in_t x, const int32_t *cu, int64_t segments,
                           int64_t column, in_t dv, real *dw, real *db)
{
    const int64_t last = t->taps - 1;
    double bias[REF_COLUMNS] = { 0 }, sum[CONV_MAX_TAPS][REF_COLUMNS];
    for (int64_t k = 0; k <= last; k++)
        for (int64_t c = 0; c < t->n; c++)
            sum[k][c] = 0;
    for (int64_t i = 0; i < segments; i++)
        for (int64_t r = cu[i]; r < cu[i + 1]; r++) {
            const real *from = ref_row(dv, r) + column;
            for (int64_t c = 0; c < t->n; c++)
                bias[c] += from[c];
            for (int64_t k = last - (r - cu[i]) > 0 ? last - (r - cu[i]) : 0; k <= last; k++) {
                const real *at = ref_row(x, r + k - last) + column;
                for (int64_t c = 0; c < t->n; c++)
                    sum[k][c] += (double)from[c] * at[c];
            }
        }
    for (int64_t c = 0; c < t->n; c++) {
        db[c] = (real)(db[c] + bias[c]);
        for (int64_t k = 0; k <= last; k++)
            dw[c * t->taps + k] = (real)(dw[c * t->taps + k] + sum[k][c]);
    }
}

void REF(gated_norm_forward)(struct stream *s, in_t y, in_t z, in_t w, int groups, double eps,
                             out_t o, out_t rs)
{
    check_gated(y, z, w, groups, rs, o);
    int64_t rows = tensor_rows(o), width = tensor_cols(o) / groups;
    const real *weight = w->data;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0, first = 0; g < groups; g++, first += width) {
            const real *value = ref_row(y, r) + first, *gate = ref_row(z, r) + first;
            real *to = ref_row(o, r) + first;
            for (int64_t i = 0; i < width; i++)
                to[i] = value[i] * (gate[i] / (1 + REF_EXP(-gate[i])));
            real scale = (real)(1 / sqrt(ref_dot(to, to, width) / (double)width + eps));
            ref_row(rs, r)[g] = scale;
            for (int64_t i = 0; i < width; i++)
                to[i] = to[i] * scale * weight[first + i];
        }
}

/* dw += sum over rows of do u rs. Until the last loop dy holds sg(z) and dz holds u rs: the
 * exponentials are taken once. */
void REF(gated_norm_backward)(struct stream *s, in_t y, in_t z, in_t w, int groups, in_t rs,
                              in_t do_, out_t dy, out_t dz, out_t dw)
{
    check_gated(y, z, w, groups, rs, do_);
    int64_t rows = tensor_rows(y), cols = tensor_cols(y), width = cols / groups;
    const real *weight = w->data;
    real *dweight = dw != NULL ? ref_vector(dw, cols) : NULL;
    ref_expect(dy, rows, cols);
    ref_expect(dz, rows, cols);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0, first = 0; g < groups; g++, first += width) {
            const real *value = ref_row(y, r) + first, *gate = ref_row(z, r) + first,
                       scale = ref_row(rs, r)[g];
            real *sigmoid = ref_row(dy, r) + first, *normed = ref_row(dz, r) + first;
            for (int64_t i = 0; i < width; i++) {
                sigmoid[i] = 1 / (1 + REF_EXP(-gate[i]));
                normed[i] = value[i] * (gate[i] * sigmoid[i]) * scale;
            }
        }
    for (int64_t first = 0; dweight != NULL && first < cols; first += REF_COLUMNS) {
        int64_t n = block_cols(first, cols);
        double sum[REF_COLUMNS] = { 0 };
        for (int64_t r = 0; r < rows; r++) {
            const real *from = ref_row(do_, r) + first, *normed = ref_row(dz, r) + first;
            for (int64_t i = 0; i < n; i++)
                sum[i] += (double)from[i] * normed[i];
        }
        for (int64_t i = 0; i < n; i++)
            dweight[first + i] = (real)(dweight[first + i] + sum[i]);
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0, first = 0; g < groups; g++, first += width) {
            const real *value = ref_row(y, r) + first, *gate = ref_row(z, r) + first,
                       *from = ref_row(do_, r) + first;
            real *to_y = ref_row(dy, r) + first, *to_z = ref_row(dz, r) + first,
                 scale = ref_row(rs, r)[g];
            double lane[8] = { 0 };
            int64_t i = 0;
            for (; i + 8 <= width; i += 8)
                for (int j = 0; j < 8; j++)
                    lane[j] += (double)weight[first + i + j] * from[i + j] * to_z[i + j];
            for (; i < width; i++)
                lane[i % 8] += (double)weight[first + i] * from[i] * to_z[i];
            real mean = (real)(ref_lanes(lane) / (double)width);
            for (i = 0; i < width; i++) {
                real sigmoid = to_y[i], du = scale * (weight[first + i] * from[i] - to_z[i] * mean);
                to_y[i] = du * (gate[i] * sigmoid);
                to_z[i] = du * value[i] * (sigmoid * (1 + gate[i] * (1 - sigmoid)));
            }
        }
}

static void check_gated(in_t y, in_t z, in_t w, int groups, in_t rs, in_t o)
{
    int64_t rows = tensor_rows(o), cols = tensor_cols(o);
    ASSERT(groups > 0 && cols % groups == 0);
    ref_expect(y, rows, cols);
    ref_expect(z, rows, cols);
    ref_expect(o, rows, cols);
    ref_expect(rs, rows, groups);
    ref_vector(w, cols);
}
