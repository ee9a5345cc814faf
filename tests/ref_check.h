/* ref_check.h - what the tests of the reference backend share: tensors with guarded padding, random
 * fill, finite differences and one harness that checks an operation's forward and backward.
 *
 * Gradient check: L(in) = sum over the weighted outputs of w*out. The directional derivative of L
 * along a random direction v of one input, by the fourth-order central formula
 * (8(L(h)-L(-h)) - (L(2h)-L(-2h)))/(12h) in fp64, must equal sum(din*v) of the operation's backward
 * called with dout = w.
 *
 * Padding (columns cols..ld of a row) and outputs not yet written hold bytes 0xFF: a NaN in both
 * precisions, -1 as an integer. An operation that reads them yields NaN, one that writes them is
 * found by ref_check_padding.
 */
#ifndef MIMO_REF_CHECK_H
#define MIMO_REF_CHECK_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include "ref/ref.h"

/* The operation in one of the two precisions. */
#define REF_CHECK_OP(fp64, op) ((fp64) ? ref_##op##_f64 : ref_##op##_f32)

/* splitmix64 */
struct ref_check_random {
    uint64_t state;
};

static inline uint64_t ref_check_bits(struct ref_check_random *r)
{
    uint64_t z = (r->state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

/* Uniform in [low, high), rounded to fp32: both precisions hold the same value. */
static inline double ref_check_uniform(struct ref_check_random *r, double low, double high)
{
    return (float)(low + (high - low) * (double)(ref_check_bits(r) >> 44) / 1048576.0);
}

static inline int64_t ref_check_index(struct ref_check_random *r, int64_t n)
{
    return (int64_t)(ref_check_bits(r) % (uint64_t)n);
}

/* ---- tensors ---- */

/* A tensor in its own allocation, ld = cols + pad, nothing allocated behind the last column of the
 * last row. All bytes 0xFF. */
static inline struct tensor ref_check_new(enum dtype dtype, int ndim, const int64_t *shape,
                                          int64_t pad)
{
    struct tensor t = { .dtype = dtype, .place = PLACE_DEVICE, .ndim = ndim };
    for (int i = 0; i < ndim; i++)
        t.shape[i] = shape[i];
    t.ld = tensor_cols(&t) + pad;
    int64_t rows = tensor_rows(&t), n = rows > 0 ? (rows - 1) * t.ld + tensor_cols(&t) : 0;
    t.data = malloc((size_t)n * dtype_bytes(dtype) + 1);
    assert_non_null(t.data);
    memset(t.data, 0xFF, (size_t)n * dtype_bytes(dtype) + 1);
    return t;
}

static inline struct tensor ref_check_matrix(enum dtype dtype, int64_t rows, int64_t cols,
                                             int64_t pad)
{
    return ref_check_new(dtype, 2, (int64_t[]){ rows, cols }, pad);
}

static inline struct tensor ref_check_vector(enum dtype dtype, int64_t n)
{
    return ref_check_new(dtype, 1, &n, 0);
}

static inline void ref_check_free(struct tensor *t)
{
    free(t->data);
    t->data = NULL;
}

static inline double ref_check_get(const struct tensor *t, int64_t row, int64_t col)
{
    int64_t i = row * t->ld + col;
    switch (t->dtype) {
    case DTYPE_F32: return ((const float *)t->data)[i];
    case DTYPE_F64: return ((const double *)t->data)[i];
    case DTYPE_I32: return ((const int32_t *)t->data)[i];
    case DTYPE_I64: return (double)((const int64_t *)t->data)[i];
    default: fail_msg("ref_check_get: dtype %d", (int)t->dtype); return 0;
    }
}

static inline void ref_check_set(const struct tensor *t, int64_t row, int64_t col, double value)
{
    int64_t i = row * t->ld + col;
    switch (t->dtype) {
    case DTYPE_F32: ((float *)t->data)[i] = (float)value; break;
    case DTYPE_F64: ((double *)t->data)[i] = value; break;
    case DTYPE_I32: ((int32_t *)t->data)[i] = (int32_t)value; break;
    case DTYPE_I64: ((int64_t *)t->data)[i] = (int64_t)value; break;
    default: fail_msg("ref_check_set: dtype %d", (int)t->dtype);
    }
}

#define REF_CHECK_EACH(t, r, c) \
    for (int64_t r = 0; r < tensor_rows(t); r++) \
        for (int64_t c = 0; c < tensor_cols(t); c++)

static inline void ref_check_fill(const struct tensor *t, double value)
{
    REF_CHECK_EACH(t, r, c)
    ref_check_set(t, r, c, value);
}

static inline void ref_check_fill_random(const struct tensor *t, struct ref_check_random *rng,
                                         double low, double high)
{
    REF_CHECK_EACH(t, r, c)
    ref_check_set(t, r, c, ref_check_uniform(rng, low, high));
}

/* Values in the order of rows and columns. */
static inline void ref_check_fill_values(const struct tensor *t, const double *values)
{
    REF_CHECK_EACH(t, r, c)
    ref_check_set(t, r, c, *values++);
}

/* dst = src, element by element, converting. */
static inline void ref_check_convert(const struct tensor *src, const struct tensor *dst)
{
    assert_true(tensor_rows(src) == tensor_rows(dst) && tensor_cols(src) == tensor_cols(dst));
    REF_CHECK_EACH(src, r, c)
    ref_check_set(dst, r, c, ref_check_get(src, r, c));
}

/* A tensor of the same shape and padding, all bytes 0xFF. */
static inline struct tensor ref_check_like(const struct tensor *src, enum dtype dtype)
{
    return ref_check_new(dtype, src->ndim, src->shape, src->ld - tensor_cols(src));
}

static inline void ref_check_padding(const struct tensor *t, const char *what)
{
    size_t size = dtype_bytes(t->dtype), pad = (size_t)(t->ld - tensor_cols(t)) * size;
    for (int64_t r = 0; r + 1 < tensor_rows(t); r++) {
        const unsigned char *p =
            (const unsigned char *)t->data + (size_t)(r * t->ld + tensor_cols(t)) * size;
        for (size_t i = 0; i < pad; i++)
            if (p[i] != 0xFF)
                fail_msg("%s: row %lld: wrote behind the last column", what, (long long)r);
    }
}

/* ---- comparisons ---- */

static inline double ref_check_dot(const struct tensor *a, const struct tensor *b)
{
    double sum = 0;
    REF_CHECK_EACH(a, r, c)
    sum += ref_check_get(a, r, c) * ref_check_get(b, r, c);
    return sum;
}

/* |a-b| relative to the larger one. */
static inline double ref_check_relative(double a, double b)
{
    double scale = fmax(fabs(a), fabs(b));
    return a == b ? 0 : fabs(a - b) / scale;
}

/* max |a-b| over max |b| (absolute when b is 0); NaN in either counts as infinite. */
static inline double ref_check_difference(const struct tensor *a, const struct tensor *b)
{
    double worst = 0, scale = 0;
    assert_true(tensor_rows(a) == tensor_rows(b) && tensor_cols(a) == tensor_cols(b));
    REF_CHECK_EACH(a, r, c)
    {
        double x = ref_check_get(a, r, c), y = ref_check_get(b, r, c);
        if (x == y)
            continue;
        if (!isfinite(x) || !isfinite(y))
            return INFINITY;
        worst = fmax(worst, fabs(x - y));
        scale = fmax(scale, fabs(y));
    }
    return scale > 0 ? worst / scale : worst;
}

static inline void ref_check_near(const struct tensor *a, const struct tensor *b, double tolerance,
                                  const char *what)
{
    double d = ref_check_difference(a, b);
    if (!(d <= tolerance))
        fail_msg("%s: difference %.3e above %.1e", what, d, tolerance);
}

/* Equal to the bit. */
static inline void ref_check_same(const struct tensor *a, const struct tensor *b, const char *what)
{
    size_t row = (size_t)tensor_cols(a) * dtype_bytes(a->dtype);
    assert_true(a->dtype == b->dtype && tensor_rows(a) == tensor_rows(b) &&
                tensor_cols(a) == tensor_cols(b));
    for (int64_t r = 0; r < tensor_rows(a); r++)
        if (memcmp((const char *)a->data + (size_t)(r * a->ld) * dtype_bytes(a->dtype),
                   (const char *)b->data + (size_t)(r * b->ld) * dtype_bytes(b->dtype), row) != 0)
            fail_msg("%s: row %lld differs", what, (long long)r);
}

/* Scalars, with the value in the message; absolute for |expected| < 1, else relative. */
static inline void ref_check_value(double value, double expected, double tolerance,
                                   const char *what)
{
    if (!(fabs(value - expected) <= tolerance * fmax(1, fabs(expected))))
        fail_msg("%s: %.12g, expected %.12g", what, value, expected);
}

static inline void ref_check_fill_ints(const struct tensor *t, const int *values)
{
    REF_CHECK_EACH(t, r, c)
    ref_check_set(t, r, c, *values++);
}

static inline int64_t ref_check_int(const struct tensor *t, int64_t row, int64_t col)
{
    return (int64_t)ref_check_get(t, row, col);
}

static inline void ref_check_row(const struct tensor *t, int64_t row, const double *expected,
                                 double tolerance, const char *what)
{
    for (int64_t c = 0; c < tensor_cols(t); c++)
        ref_check_value(ref_check_get(t, row, c), expected[c], tolerance, what);
}

/* ---- finite differences ---- */

/* d/ds of objective(context) at x + s*v, fourth order; x is restored to the bit. */
static inline double ref_check_directional(double (*objective)(void *context), void *context,
                                           const struct tensor *x, const struct tensor *v, double h)
{
    static const double step[4] = { 1, -1, 2, -2 }, coefficient[4] = { 8, -8, -1, 1 };
    double sum = 0;
    struct tensor saved = ref_check_like(x, x->dtype);
    ref_check_convert(x, &saved);
    for (int i = 0; i < 4; i++) {
        REF_CHECK_EACH(x, r, c)
        ref_check_set(x, r, c, ref_check_get(&saved, r, c) + step[i] * h * ref_check_get(v, r, c));
        sum += coefficient[i] * objective(context);
    }
    ref_check_convert(&saved, x);
    ref_check_free(&saved);
    return sum / (12 * h);
}

/* ---- one operation ---- */

enum { REF_CHECK_MAX = 8 };

struct ref_check_case {
    const char *name;
    int n_in, n_out;
    /* F64 [n_in], filled by the test: everything that is differentiated. */
    struct tensor in[REF_CHECK_MAX];
    /* F64 [n_out]; the harness overwrites them with NaN before each forward. */
    struct tensor out[REF_CHECK_MAX];
    int n_weighted;       /* out[0..n_weighted) enter L, the rest is saved for backward */
    unsigned accumulates; /* bit i: backward adds to din[i] */
    void (*forward)(bool fp64, const struct tensor *in, const struct tensor *out,
                    const void *context);
    /* dout [n_weighted] = w; din [n_in]: every element must be defined afterwards. */
    void (*backward)(bool fp64, const struct tensor *in, const struct tensor *out,
                     const struct tensor *dout, const struct tensor *din, const void *context);
    const void *context;    /* sizes, index tensors: the same for both precisions */
    double step, tolerance; /* 0: 1e-3 and 1e-7 */
    double tolerance32;     /* 0: 1e-5, of fp32 against fp64 */
};

struct ref_check_objective {
    const struct ref_check_case *c;
    const struct tensor *w;
};

static inline void ref_check_forward(const struct ref_check_case *c, bool fp64,
                                     const struct tensor *in, const struct tensor *out)
{
    for (int i = 0; i < c->n_out; i++)
        REF_CHECK_EACH(&out[i], r, col)
    ref_check_set(&out[i], r, col, NAN);
    c->forward(fp64, in, out, c->context);
}

static inline double ref_check_evaluate(void *context)
{
    const struct ref_check_objective *o = context;
    double sum = 0;
    ref_check_forward(o->c, true, o->c->in, o->c->out);
    for (int i = 0; i < o->c->n_weighted; i++)
        sum += ref_check_dot(&o->w[i], &o->c->out[i]);
    return sum;
}

/* Forward and backward of the case in one precision. prior [n_in]: what accumulated gradients hold
 * before. */
static inline void ref_check_run(const struct ref_check_case *c, bool fp64, const struct tensor *in,
                                 const struct tensor *out, const struct tensor *w,
                                 const struct tensor *prior, const struct tensor *din)
{
    ref_check_forward(c, fp64, in, out);
    for (int i = 0; i < c->n_in; i++)
        REF_CHECK_EACH(&din[i], r, col)
    ref_check_set(&din[i], r, col,
                  c->accumulates & (1u << i) ? ref_check_get(&prior[i], r, col) : NAN);
    c->backward(fp64, in, out, w, din, c->context);
    for (int i = 0; i < c->n_in; i++) {
        ref_check_padding(&din[i], c->name);
        ref_check_padding(&in[i], c->name);
    }
    for (int i = 0; i < c->n_out; i++)
        ref_check_padding(&out[i], c->name);
}

/* fp32 outputs and gradients against those of fp64 on the same (fp32-representable) inputs. */
static inline void ref_check_fp32(const struct ref_check_case *c, const struct tensor *w,
                                  const struct tensor *prior, const struct tensor *din)
{
    struct tensor in[REF_CHECK_MAX], out[REF_CHECK_MAX], w32[REF_CHECK_MAX], din32[REF_CHECK_MAX];
    char what[160];
    double tolerance = c->tolerance32 > 0 ? c->tolerance32 : 1e-5;
    for (int i = 0; i < c->n_in; i++) {
        in[i] = ref_check_like(&c->in[i], DTYPE_F32);
        din32[i] = ref_check_like(&c->in[i], DTYPE_F32);
        ref_check_convert(&c->in[i], &in[i]);
    }
    for (int i = 0; i < c->n_out; i++)
        out[i] = ref_check_like(&c->out[i], DTYPE_F32);
    for (int i = 0; i < c->n_weighted; i++) {
        w32[i] = ref_check_like(&w[i], DTYPE_F32);
        ref_check_convert(&w[i], &w32[i]);
    }
    ref_check_run(c, false, in, out, w32, prior, din32);
    for (int i = 0; i < c->n_out; i++) {
        snprintf(what, sizeof what, "%s: fp32 output %d", c->name, i);
        ref_check_near(&out[i], &c->out[i], tolerance, what);
        ref_check_free(&out[i]);
    }
    for (int i = 0; i < c->n_in; i++) {
        snprintf(what, sizeof what, "%s: fp32 gradient %d", c->name, i);
        ref_check_near(&din32[i], &din[i], tolerance, what);
        ref_check_free(&in[i]);
        ref_check_free(&din32[i]);
    }
    for (int i = 0; i < c->n_weighted; i++)
        ref_check_free(&w32[i]);
}

/* Every input's gradient against finite differences, twice the same bits, padding untouched, fp32
 * against fp64. */
static inline void ref_check_gradients(const struct ref_check_case *c, uint64_t seed)
{
    struct ref_check_random rng = { seed };
    struct tensor w[REF_CHECK_MAX], prior[REF_CHECK_MAX], din[REF_CHECK_MAX], again[REF_CHECK_MAX];
    struct ref_check_objective objective = { c, w };
    double tolerance = c->tolerance > 0 ? c->tolerance : 1e-7;
    for (int i = 0; i < c->n_weighted; i++) {
        w[i] = ref_check_like(&c->out[i], DTYPE_F64);
        ref_check_fill_random(&w[i], &rng, -1, 1);
    }
    for (int i = 0; i < c->n_in; i++) {
        prior[i] = ref_check_like(&c->in[i], DTYPE_F64);
        din[i] = ref_check_like(&c->in[i], DTYPE_F64);
        again[i] = ref_check_like(&c->in[i], DTYPE_F64);
        ref_check_fill_random(&prior[i], &rng, -1, 1);
    }
    ref_check_run(c, true, c->in, c->out, w, prior, again);
    ref_check_run(c, true, c->in, c->out, w, prior, din);
    for (int i = 0; i < c->n_in; i++)
        ref_check_same(&again[i], &din[i], c->name);
    ref_check_fp32(c, w, prior, din);
    for (int i = 0; i < c->n_in; i++) {
        struct tensor v = ref_check_like(&c->in[i], DTYPE_F64);
        ref_check_fill_random(&v, &rng, -1, 1);
        double analytic = ref_check_dot(&din[i], &v);
        if (c->accumulates & (1u << i))
            analytic -= ref_check_dot(&prior[i], &v);
        double numeric = ref_check_directional(ref_check_evaluate, &objective, &c->in[i], &v,
                                               c->step > 0 ? c->step : 1e-3);
        double error = ref_check_relative(analytic, numeric);
        if (!(error <= tolerance))
            fail_msg("%s: gradient %d: %.15g, finite differences %.15g, relative %.2e", c->name, i,
                     analytic, numeric, error);
        ref_check_free(&v);
    }
    for (int i = 0; i < c->n_in; i++) {
        ref_check_free(&prior[i]);
        ref_check_free(&din[i]);
        ref_check_free(&again[i]);
    }
    for (int i = 0; i < c->n_weighted; i++)
        ref_check_free(&w[i]);
}

/* Frees what the test put into in[] and out[]. */
static inline void ref_check_case_free(struct ref_check_case *c)
{
    for (int i = 0; i < c->n_in; i++)
        ref_check_free(&c->in[i]);
    for (int i = 0; i < c->n_out; i++)
        ref_check_free(&c->out[i]);
}

#endif
