/* ref_row.h - what the loops of this folder share: rows and vectors of a view, sums in double, libm
 * in `real`.
 *
 * Checks are made once per operation, never inside loops. ref_dot adds in eight fixed lanes: the
 * order of the sum is part of the source, so the compiler may use vectors and the result does not
 * depend on it.
 */
#ifndef MIMO_REF_ROW_H
#define MIMO_REF_ROW_H

#include <limits.h>
#include <math.h>
#include "check.h"
#include "ref.h"

#define ref_dtype_f32 DTYPE_F32
#define ref_dtype_f64 DTYPE_F64
#define REF_DTYPE REF_CAT(ref_dtype_, ref_suffix)
#define ref_exp_f32 expf
#define ref_exp_f64 exp
#define REF_EXP REF_CAT(ref_exp_, ref_suffix)
#define ref_sqrt_f32 sqrtf
#define ref_sqrt_f64 sqrt
#define REF_SQRT REF_CAT(ref_sqrt_, ref_suffix)

/* Columns that a sum over rows handles at a time, so that its partial sums fit on the stack. */
enum { REF_COLUMNS = 256 };

static inline real *ref_row(in_t t, int64_t r)
{
    return (real *)t->data + r * t->ld;
}

/* The view as a matrix of this precision with the given size. */
static inline void ref_expect(in_t t, int64_t rows, int64_t cols)
{
    ASSERT(t->dtype == REF_DTYPE);
    ASSERT(tensor_rows(t) == rows && tensor_cols(t) == cols);
    ASSERT(rows <= 1 || t->ld >= cols);
}

/* n consecutive elements: a vector, or a dense matrix read row by row. */
static inline void ref_expect_dense(in_t t, enum dtype dtype, int64_t n)
{
    ASSERT(t->dtype == dtype && tensor_numel(t) == n);
    ASSERT(tensor_rows(t) <= 1 || t->ld == tensor_cols(t));
}

static inline real *ref_vector(in_t t, int64_t n)
{
    ref_expect_dense(t, REF_DTYPE, n);
    return t->data;
}

static inline const int32_t *ref_index(in_t t, int64_t n)
{
    ref_expect_dense(t, DTYPE_I32, n);
    return t->data;
}

/* The BLAS takes int. */
static inline int ref_int(int64_t n)
{
    ASSERT(n >= 0 && n <= INT_MAX);
    return (int)n;
}

static inline double ref_lanes(const double s[8])
{
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

static inline double ref_dot(const real *x, const real *y, int64_t n)
{
    double s[8] = { 0 };
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++)
            s[j] += (double)x[i + j] * y[i + j];
    for (; i < n; i++)
        s[i % 8] += (double)x[i] * y[i];
    return ref_lanes(s);
}

static inline double ref_sum(const real *x, int64_t n)
{
    double s[8] = { 0 };
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++)
            s[j] += x[i + j];
    for (; i < n; i++)
        s[i % 8] += x[i];
    return ref_lanes(s);
}

/* -infinity for n = 0. NaN is passed over: it shows in the sum that follows. */
static inline real ref_max(const real *x, int64_t n)
{
    real lane[8], top = -INFINITY;
    int64_t i = 0;
    for (int j = 0; j < 8; j++)
        lane[j] = -INFINITY;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++)
            lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
    for (; i < n; i++)
        top = x[i] > top ? x[i] : top;
    for (int j = 0; j < 8; j++)
        top = lane[j] > top ? lane[j] : top;
    return top;
}

#endif
