/* dense.c - matrix product, additions, activations and the two normalisations. Formulas:
 * model.md 1.4 and 2.5.
 *
 * Rows are handled one after the other; sums over rows (gradients of weights and biases) run over
 * blocks of columns, rows in ascending order, so that a result does not depend on anything but its
 * inputs.
 */
#include <string.h>
#include "ref_row.h"

static void scale_rows(double beta, in_t c, out_t d);
static real gelu(real x);
static real gelu_derivative(real x);

void REF(gemm)(struct stream *s, bool ta, bool tb, double alpha, in_t a, in_t b, double beta,
               in_t c, out_t d)
{
    int64_t m = tensor_rows(d), n = tensor_cols(d), k = ta ? tensor_rows(a) : tensor_cols(a);
    ref_expect(a, ta ? k : m, ta ? m : k);
    ref_expect(b, tb ? n : k, tb ? k : n);
    ref_expect(d, m, n);
    const bool add = beta != 0;
    ASSERT(c != NULL || !add);
    if (add)
        ref_expect(c, m, n);
    if (m == 0 || n == 0)
        return;
    if (k == 0) {
        scale_rows(beta, c, d);
        return;
    }
    if (add && c->data != d->data)
        scale_rows(1, c, d);
    ASSERT(!add || c->data != d->data || c->ld == d->ld || m == 1);
    REF_GEMM(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans,
             ref_int(m), ref_int(n), ref_int(k), (real)alpha, a->data, ref_int(a->ld), b->data,
             ref_int(b->ld), (real)beta, d->data, ref_int(d->ld));
}

/* d = beta*c; c is not read when beta is 0. */
static void scale_rows(double beta, in_t c, out_t d)
{
    int64_t cols = tensor_cols(d);
    for (int64_t r = 0; r < tensor_rows(d); r++) {
        real *to = ref_row(d, r);
        if (beta == 0)
            memset(to, 0, (size_t)cols * sizeof(real));
        else if (beta == 1 && c->data != d->data)
            memcpy(to, ref_row(c, r), (size_t)cols * sizeof(real));
        else
            for (int64_t i = 0; i < cols; i++)
                to[i] = (real)beta * ref_row(c, r)[i];
    }
}

void REF(add)(struct stream *s, in_t x, out_t y)
{
    int64_t rows = tensor_rows(y), cols = tensor_cols(y);
    ref_expect(x, rows, cols);
    ref_expect(y, rows, cols);
    for (int64_t r = 0; r < rows; r++) {
        const real *from = ref_row(x, r);
        real *to = ref_row(y, r);
        for (int64_t i = 0; i < cols; i++)
            to[i] += from[i];
    }
}

void REF(add_bias)(struct stream *s, in_t bias, out_t y)
{
    int64_t rows = tensor_rows(y), cols = tensor_cols(y);
    const real *b = ref_vector(bias, cols);
    ref_expect(y, rows, cols);
    for (int64_t r = 0; r < rows; r++) {
        real *to = ref_row(y, r);
        for (int64_t i = 0; i < cols; i++)
            to[i] += b[i];
    }
}

void REF(bias_backward)(struct stream *s, in_t dy, out_t dbias)
{
    int64_t rows = tensor_rows(dy), cols = tensor_cols(dy);
    real *db = ref_vector(dbias, cols);
    ref_expect(dy, rows, cols);
    for (int64_t first = 0; first < cols; first += REF_COLUMNS) {
        int64_t n = cols - first < REF_COLUMNS ? cols - first : REF_COLUMNS;
        double sum[REF_COLUMNS] = { 0 };
        for (int64_t r = 0; r < rows; r++) {
            const real *from = ref_row(dy, r) + first;
            for (int64_t i = 0; i < n; i++)
                sum[i] += from[i];
        }
        for (int64_t i = 0; i < n; i++)
            db[first + i] = (real)(db[first + i] + sum[i]);
    }
}

void REF(activation_forward)(struct stream *s, enum backend_activation f, in_t x, out_t y)
{
    int64_t rows = tensor_rows(y), cols = tensor_cols(y);
    ref_expect(x, rows, cols);
    ref_expect(y, rows, cols);
    for (int64_t r = 0; r < rows; r++) {
        const real *from = ref_row(x, r);
        real *to = ref_row(y, r);
        switch (f) {
        case BACKEND_RELU2:
            /* Two loops: the compiler makes vectors of a selection and of a product, not of both. A
             * NaN stays one. */
            for (int64_t i = 0; i < cols; i++)
                to[i] = from[i] < 0 ? 0 : from[i];
            for (int64_t i = 0; i < cols; i++)
                to[i] *= to[i];
            break;
        case BACKEND_GELU:
            for (int64_t i = 0; i < cols; i++)
                to[i] = gelu(from[i]);
            break;
        }
    }
}

void REF(activation_backward)(struct stream *s, enum backend_activation f, in_t x, in_t dy,
                              out_t dx)
{
    int64_t rows = tensor_rows(dx), cols = tensor_cols(dx);
    ref_expect(x, rows, cols);
    ref_expect(dy, rows, cols);
    ref_expect(dx, rows, cols);
    for (int64_t r = 0; r < rows; r++) {
        const real *at = ref_row(x, r), *from = ref_row(dy, r);
        real *to = ref_row(dx, r);
        switch (f) {
        case BACKEND_RELU2:
            for (int64_t i = 0; i < cols; i++)
                to[i] = at[i] < 0 ? 0 : from[i];
            for (int64_t i = 0; i < cols; i++)
                to[i] *= 2 * at[i];
            break;
        case BACKEND_GELU:
            for (int64_t i = 0; i < cols; i++)
                to[i] = gelu_derivative(at[i]) * from[i];
            break;
        }
    }
}

/* exp(-2u), u the argument of fgelu's tanh: (1+tanh(u))/2 = 1/(1+exp(-2u)) and (1-tanh(u))/2 =
 * 1/(1+exp(2u)) are free of cancellation on both sides, and exp costs a tenth of tanh. */
static real gelu_exp(real x)
{
    return REF_EXP(-2 * (real)0.7978845608 * x * (1 + (real)0.044715 * x * x));
}

static real gelu(real x)
{
    return x / (1 + gelu_exp(x));
}

/* 1-tanh(u)^2 is four times the product of the two halves. */
static real gelu_derivative(real x)
{
    real e = gelu_exp(x), gate = 1 / (1 + e), rest = 1 / (1 + 1 / e);
    return gate + 2 * x * gate * rest * (real)0.7978845608 * (1 + (real)0.134145 * x * x);
}

void REF(rmsnorm_forward)(struct stream *s, in_t x, in_t w, double eps, out_t y, out_t rs)
{
    int64_t rows = tensor_rows(x), cols = tensor_cols(x);
    const real *weight = ref_vector(w, cols);
    real *inverse = ref_vector(rs, rows);
    ref_expect(x, rows, cols);
    ref_expect(y, rows, cols);
    for (int64_t r = 0; r < rows; r++) {
        const real *from = ref_row(x, r);
        real *to = ref_row(y, r);
        real scale = (real)(1 / sqrt(ref_dot(from, from, cols) / (double)cols + eps));
        inverse[r] = scale;
        for (int64_t i = 0; i < cols; i++)
            to[i] = from[i] * scale * weight[i];
    }
}

/* dx += rs*(w dy - x rs c), c = mean(w dy x rs); dw += sum over rows of dy x rs. */
void REF(rmsnorm_backward)(struct stream *s, in_t x, in_t w, in_t rs, in_t dy, out_t dx, out_t dw)
{
    int64_t rows = tensor_rows(x), cols = tensor_cols(x);
    const real *weight = ref_vector(w, cols), *inverse = ref_vector(rs, rows);
    real *dweight = dw != NULL ? ref_vector(dw, cols) : NULL;
    ref_expect(x, rows, cols);
    ref_expect(dy, rows, cols);
    ref_expect(dx, rows, cols);
    for (int64_t first = 0; dweight != NULL && first < cols; first += REF_COLUMNS) {
        int64_t n = cols - first < REF_COLUMNS ? cols - first : REF_COLUMNS;
        double sum[REF_COLUMNS] = { 0 };
        for (int64_t r = 0; r < rows; r++) {
            const real *at = ref_row(x, r) + first, *from = ref_row(dy, r) + first;
            for (int64_t i = 0; i < n; i++)
                sum[i] += (double)from[i] * at[i] * inverse[r];
        }
        for (int64_t i = 0; i < n; i++)
            dweight[first + i] = (real)(dweight[first + i] + sum[i]);
    }
    for (int64_t r = 0; r < rows; r++) {
        const real *at = ref_row(x, r), *from = ref_row(dy, r);
        real *to = ref_row(dx, r);
        real scale = inverse[r];
        double lane[8] = { 0 };
        int64_t i = 0;
        for (; i + 8 <= cols; i += 8)
            for (int j = 0; j < 8; j++)
                lane[j] += (double)weight[i + j] * from[i + j] * at[i + j];
        for (; i < cols; i++)
            lane[i % 8] += (double)weight[i] * from[i] * at[i];
        /* x rs c, with both factors rs taken out of the mean and of the row */
        real along = (real)(ref_lanes(lane) / (double)cols * scale * scale);
        for (i = 0; i < cols; i++)
            to[i] += scale * (weight[i] * from[i] - at[i] * along);
    }
}

void REF(layernorm_forward)(struct stream *s, in_t x, in_t w, in_t b, double eps, out_t y,
                            out_t mean, out_t rs)
{
    int64_t rows = tensor_rows(x), cols = tensor_cols(x);
    const real *weight = ref_vector(w, cols), *bias = ref_vector(b, cols);
    real *centre = ref_vector(mean, rows), *inverse = ref_vector(rs, rows);
    ref_expect(x, rows, cols);
    ref_expect(y, rows, cols);
    for (int64_t r = 0; r < rows; r++) {
        const real *from = ref_row(x, r);
        real *to = ref_row(y, r);
        double mu = ref_sum(from, cols) / (double)cols, lane[8] = { 0 };
        int64_t i = 0;
        for (; i + 8 <= cols; i += 8)
            for (int j = 0; j < 8; j++)
                lane[j] += (from[i + j] - mu) * (from[i + j] - mu);
        for (; i < cols; i++)
            lane[i % 8] += (from[i] - mu) * (from[i] - mu);
        real scale = (real)(1 / sqrt(ref_lanes(lane) / (double)cols + eps));
        centre[r] = (real)mu;
        inverse[r] = scale;
        for (i = 0; i < cols; i++)
            to[i] = (from[i] - (real)mu) * scale * weight[i] + bias[i];
    }
}

/* xh = (x-mean)*rs; dx += rs*(w dy - mean(w dy) - xh mean(w dy xh));
 * dw += sum dy xh; db += sum dy. */
void REF(layernorm_backward)(struct stream *s, in_t x, in_t w, in_t mean, in_t rs, in_t dy,
                             out_t dx, out_t dw, out_t db)
{
    int64_t rows = tensor_rows(x), cols = tensor_cols(x);
    const real *weight = ref_vector(w, cols), *centre = ref_vector(mean, rows),
               *inverse = ref_vector(rs, rows);
    ref_expect(x, rows, cols);
    ref_expect(dy, rows, cols);
    ref_expect(dx, rows, cols);
    ASSERT((dw == NULL) == (db == NULL));
    for (int64_t first = 0; dw != NULL && first < cols; first += REF_COLUMNS) {
        int64_t n = cols - first < REF_COLUMNS ? cols - first : REF_COLUMNS;
        real *dweight = ref_vector(dw, cols) + first, *dbias = ref_vector(db, cols) + first;
        double along[REF_COLUMNS] = { 0 }, sum[REF_COLUMNS] = { 0 };
        for (int64_t r = 0; r < rows; r++) {
            const real *at = ref_row(x, r) + first, *from = ref_row(dy, r) + first;
            for (int64_t i = 0; i < n; i++) {
                along[i] += (double)from[i] * ((at[i] - centre[r]) * inverse[r]);
                sum[i] += from[i];
            }
        }
        for (int64_t i = 0; i < n; i++) {
            dweight[i] = (real)(dweight[i] + along[i]);
            dbias[i] = (real)(dbias[i] + sum[i]);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        const real *at = ref_row(x, r), *from = ref_row(dy, r);
        real *to = ref_row(dx, r);
        real mu = centre[r], scale = inverse[r];
        double level[8] = { 0 }, along[8] = { 0 };
        int64_t i = 0;
        for (; i + 8 <= cols; i += 8)
            for (int j = 0; j < 8; j++) {
                level[j] += (double)weight[i + j] * from[i + j];
                along[j] += (double)weight[i + j] * from[i + j] * ((at[i + j] - mu) * scale);
            }
        for (; i < cols; i++) {
            level[i % 8] += (double)weight[i] * from[i];
            along[i % 8] += (double)weight[i] * from[i] * ((at[i] - mu) * scale);
        }
        real a = (real)(ref_lanes(level) / (double)cols),
             c = (real)(ref_lanes(along) / (double)cols);
        for (i = 0; i < cols; i++)
            to[i] += scale * (weight[i] * from[i] - a - (at[i] - mu) * scale * c);
    }
}
