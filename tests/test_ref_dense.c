/* test_ref_dense.c - gemm, additions, activations and normalisations of the reference backend. */
#include "ref_check.h"

struct gemm_context {
    bool ta, tb;
    double alpha, beta;
};

static const enum dtype real_dtype[2] = { DTYPE_F32, DTYPE_F64 };
static const double tight[2] = { 2e-6, 1e-14 };

static double element(const struct tensor *t, bool transposed, int64_t i, int64_t j)
{
    return transposed ? ref_check_get(t, j, i) : ref_check_get(t, i, j);
}

static void naive_gemm(bool ta, bool tb, double alpha, const struct tensor *a,
                       const struct tensor *b, double beta, const struct tensor *c,
                       const struct tensor *d)
{
    int64_t k = ta ? tensor_rows(a) : tensor_cols(a);
    REF_CHECK_EACH(d, i, j)
    {
        double sum = 0;
        for (int64_t l = 0; l < k; l++)
            sum += element(a, ta, i, l) * element(b, tb, l, j);
        ref_check_set(d, i, j, alpha * sum + (beta != 0 ? beta * ref_check_get(c, i, j) : 0));
    }
}

/* d in place of c, d beside c, and no c at all; every row longer than its columns. */
static void gemm_against_naive(bool fp64, bool ta, bool tb, int64_t m, int64_t n, int64_t k)
{
    struct ref_check_random rng = { 11 };
    enum dtype t = real_dtype[fp64];
    struct tensor a = ref_check_matrix(t, ta ? k : m, ta ? m : k, 3),
                  b = ref_check_matrix(t, tb ? n : k, tb ? k : n, 2);
    struct tensor c = ref_check_matrix(t, m, n, 1), d = ref_check_matrix(t, m, n, 5);
    struct tensor expected = ref_check_matrix(DTYPE_F64, m, n, 0);
    ref_check_fill_random(&a, &rng, -1, 1);
    ref_check_fill_random(&b, &rng, -1, 1);
    ref_check_fill_random(&c, &rng, -1, 1);

    REF_CHECK_OP(fp64, gemm)(NULL, ta, tb, 1.5, &a, &b, 0, NULL, &d); /* d held NaN */
    naive_gemm(ta, tb, 1.5, &a, &b, 0, NULL, &expected);
    ref_check_near(&d, &expected, tight[fp64], "gemm, beta 0");
    REF_CHECK_OP(fp64, gemm)(NULL, ta, tb, -0.5, &a, &b, 0.75, &c, &d);
    naive_gemm(ta, tb, -0.5, &a, &b, 0.75, &c, &expected);
    ref_check_near(&d, &expected, tight[fp64], "gemm, c beside d");
    naive_gemm(ta, tb, 1, &a, &b, 1, &c, &expected);
    REF_CHECK_OP(fp64, gemm)(NULL, ta, tb, 1, &a, &b, 1, &c, &c);
    ref_check_near(&c, &expected, tight[fp64], "gemm, c is d");
    ref_check_padding(&c, "gemm c");
    ref_check_padding(&d, "gemm d");
    ref_check_free(&a);
    ref_check_free(&b);
    ref_check_free(&c);
    ref_check_free(&d);
    ref_check_free(&expected);
}

static void gemm_equals_naive_for_every_transpose(void **state)
{
    for (int i = 0; i < 8; i++) {
        gemm_against_naive(i & 1, i & 2, i & 4, 7, 13, 11);
        gemm_against_naive(i & 1, i & 2, i & 4, 1, 1, 1);
        gemm_against_naive(i & 1, i & 2, i & 4, 129, 1, 67);
    }
}

static void gemm_of_empty_matrices(void **state)
{
    for (int i = 0; i < 8; i++) {
        gemm_against_naive(i & 1, i & 2, i & 4, 0, 5, 3);
        gemm_against_naive(i & 1, i & 2, i & 4, 5, 0, 3);
        gemm_against_naive(i & 1, i & 2, i & 4, 5, 3, 0);
        gemm_against_naive(i & 1, i & 2, i & 4, 0, 0, 0);
    }
}

static void gemm_forward(bool fp64, const struct tensor *in, const struct tensor *out,
                         const void *context)
{
    const struct gemm_context *g = context;
    REF_CHECK_OP(fp64, gemm)
    (NULL, g->ta, g->tb, g->alpha, &in[0], &in[1], g->beta, &in[2], &out[0]);
}

/* da = alpha dd op(b)^T, db = alpha op(a)^T dd: themselves products of the operation under test. */
static void gemm_backward(bool fp64, const struct tensor *in, const struct tensor *out,
                          const struct tensor *dout, const struct tensor *din, const void *context)
{
    const struct gemm_context *g = context;
    __typeof__(ref_gemm_f64) *gemm = REF_CHECK_OP(fp64, gemm);
    if (g->ta)
        gemm(NULL, g->tb, true, g->alpha, &in[1], dout, 0, NULL, &din[0]);
    else
        gemm(NULL, false, !g->tb, g->alpha, dout, &in[1], 0, NULL, &din[0]);
    if (g->tb)
        gemm(NULL, true, g->ta, g->alpha, dout, &in[0], 0, NULL, &din[1]);
    else
        gemm(NULL, !g->ta, false, g->alpha, &in[0], dout, 0, NULL, &din[1]);
    REF_CHECK_EACH(dout, r, c)
    ref_check_set(&din[2], r, c, g->beta * ref_check_get(dout, r, c));
}

static void gemm_gradients(void **state)
{
    for (int i = 0; i < 4; i++) {
        struct gemm_context g = { i & 1, i & 2, 0.7, -1.3 };
        struct ref_check_random rng = { 5 };
        struct ref_check_case c = {
            .name = "gemm",
            .n_in = 3,
            .n_out = 1,
            .n_weighted = 1,
            .forward = gemm_forward,
            .backward = gemm_backward,
            .context = &g,
            .in = { ref_check_matrix(DTYPE_F64, g.ta ? 17 : 5, g.ta ? 5 : 17, 2),
                    ref_check_matrix(DTYPE_F64, g.tb ? 11 : 17, g.tb ? 17 : 11, 1),
                    ref_check_matrix(DTYPE_F64, 5, 11, 3) },
            .out = { ref_check_matrix(DTYPE_F64, 5, 11, 4) }
        };
        for (int j = 0; j < 3; j++)
            ref_check_fill_random(&c.in[j], &rng, -1, 1);
        ref_check_gradients(&c, 100 + (uint64_t)i);
        ref_check_case_free(&c);
    }
}

static void copy(const struct tensor *from, const struct tensor *to)
{
    ref_check_convert(from, to);
}

/* y + x + bias: add and add_bias in place; the bias gradient is bias_backward. */
static void sum_forward(bool fp64, const struct tensor *in, const struct tensor *out,
                        const void *context)
{
    copy(&in[0], &out[0]);
    REF_CHECK_OP(fp64, add)(NULL, &in[1], &out[0]);
    REF_CHECK_OP(fp64, add_bias)(NULL, &in[2], &out[0]);
}

static void sum_backward(bool fp64, const struct tensor *in, const struct tensor *out,
                         const struct tensor *dout, const struct tensor *din, const void *context)
{
    copy(dout, &din[0]);
    copy(dout, &din[1]);
    REF_CHECK_OP(fp64, bias_backward)(NULL, dout, &din[2]);
}

static void add_and_bias_gradients(void **state)
{
    static const int64_t shape[2][2] = { { 7, 5 },
                                         { 3, 601 } }; /* the second: several blocks of columns */
    for (int i = 0; i < 2; i++) {
        struct ref_check_random rng = { 6 };
        struct ref_check_case c = {
            .name = "add",
            .n_in = 3,
            .n_out = 1,
            .n_weighted = 1,
            .accumulates = 1u << 2,
            .forward = sum_forward,
            .backward = sum_backward,
            .in = { ref_check_matrix(DTYPE_F64, shape[i][0], shape[i][1], 2),
                    ref_check_matrix(DTYPE_F64, shape[i][0], shape[i][1], 3),
                    ref_check_vector(DTYPE_F64, shape[i][1]) },
            .out = { ref_check_matrix(DTYPE_F64, shape[i][0], shape[i][1], 1) }
        };
        for (int j = 0; j < 3; j++)
            ref_check_fill_random(&c.in[j], &rng, -1, 1);
        ref_check_gradients(&c, 200);
        ref_check_case_free(&c);
    }
}

static void bias_backward_adds_in_double(void **state)
{
    /* 1e8 and then ones: a sum in fp32 loses every one of them */
    enum { ROWS = 65 };
    struct tensor dy = ref_check_matrix(DTYPE_F32, ROWS, 2, 0), db = ref_check_vector(DTYPE_F32, 2);
    ref_check_fill(&dy, 1);
    ref_check_set(&dy, 0, 0, 1e8);
    ref_check_set(&dy, ROWS - 1, 0, -1e8);
    ref_check_fill(&db, 0.5);
    ref_bias_backward_f32(NULL, &dy, &db);
    ref_check_value(ref_check_get(&db, 0, 0), ROWS - 2 + 0.5, 0, "column with cancellation");
    ref_check_value(ref_check_get(&db, 0, 1), ROWS + 0.5, 0, "column of ones");
    ref_check_free(&dy);
    ref_check_free(&db);
}

static void fgelu_golden_values(void **state)
{
    static const double at[4] = { 1, -1, 3, 0 },
                        value[4] = { 0.841191991, -0.158808009, 2.996362608, 0 };
    static const double slope[4] = { 1.082964084, -0.082964084, 1.011584167, 0.5 };
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct tensor x = ref_check_vector(real_dtype[fp64], 4),
                      y = ref_check_vector(real_dtype[fp64], 4);
        struct tensor one = ref_check_vector(real_dtype[fp64], 4);
        ref_check_fill_values(&x, at);
        ref_check_fill(&one, 1);
        REF_CHECK_OP(fp64, activation_forward)(NULL, BACKEND_GELU, &x, &y);
        for (int i = 0; i < 4; i++)
            ref_check_value(ref_check_get(&y, 0, i), value[i], fp64 ? 1e-9 : 3e-7, "fgelu");
        REF_CHECK_OP(fp64, activation_backward)(NULL, BACKEND_GELU, &x, &one, &y);
        for (int i = 0; i < 4; i++)
            ref_check_value(ref_check_get(&y, 0, i), slope[i], fp64 ? 1e-9 : 3e-7,
                            "fgelu derivative");
        ref_check_free(&x);
        ref_check_free(&y);
        ref_check_free(&one);
    }
}

/* The tanh form of model.md 2.5, over the whole range where exp could overflow. Its factor 1-th^2
 * cancels near |x| = 5 and is multiplied by up to 10 there: that is the tolerance of the
 * derivative. */
static void fgelu_equals_its_tanh_form(void **state)
{
    enum { N = 2001 };
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct tensor x = ref_check_vector(real_dtype[fp64], N),
                      y = ref_check_vector(real_dtype[fp64], N);
        struct tensor dy = ref_check_vector(real_dtype[fp64], N),
                      dx = ref_check_vector(real_dtype[fp64], N);
        for (int i = 0; i < N; i++)
            ref_check_set(&x, 0, i, (i - N / 2) * 0.03125);
        ref_check_fill(&dy, 1);
        REF_CHECK_OP(fp64, activation_forward)(NULL, BACKEND_GELU, &x, &y);
        REF_CHECK_OP(fp64, activation_backward)(NULL, BACKEND_GELU, &x, &dy, &dx);
        for (int i = 0; i < N; i++) {
            double v = ref_check_get(&x, 0, i),
                   th = tanh(0.7978845608 * v * (1 + 0.044715 * v * v));
            double slope =
                0.5 * (1 + th) + 0.5 * v * (1 - th * th) * 0.7978845608 * (1 + 0.134145 * v * v);
            ref_check_value(ref_check_get(&y, 0, i), 0.5 * v * (1 + th), fp64 ? 1e-15 : 3e-7,
                            "fgelu");
            ref_check_value(ref_check_get(&dx, 0, i), slope, fp64 ? 1e-14 : 1e-6,
                            "fgelu derivative");
        }
        ref_check_free(&x);
        ref_check_free(&y);
        ref_check_free(&dy);
        ref_check_free(&dx);
    }
}

static void relu2_values_and_nan(void **state)
{
    static const double at[5] = { -2, 0, 3, NAN, -INFINITY }, value[3] = { 0, 0, 9 },
                        slope[3] = { 0, 0, 6 };
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct tensor x = ref_check_vector(real_dtype[fp64], 5),
                      y = ref_check_vector(real_dtype[fp64], 5);
        struct tensor one = ref_check_vector(real_dtype[fp64], 5);
        ref_check_fill_values(&x, at);
        ref_check_fill(&one, 1);
        REF_CHECK_OP(fp64, activation_forward)(NULL, BACKEND_RELU2, &x, &y);
        for (int i = 0; i < 3; i++)
            ref_check_value(ref_check_get(&y, 0, i), value[i], 0, "relu2");
        assert_true(isnan(ref_check_get(&y, 0, 3)));
        ref_check_value(ref_check_get(&y, 0, 4), 0, 0, "relu2 of -infinity");
        REF_CHECK_OP(fp64, activation_backward)(NULL, BACKEND_RELU2, &x, &one, &y);
        for (int i = 0; i < 3; i++)
            ref_check_value(ref_check_get(&y, 0, i), slope[i], 0, "relu2 derivative");
        assert_true(isnan(ref_check_get(&y, 0, 3)));
        ref_check_free(&x);
        ref_check_free(&y);
        ref_check_free(&one);
    }
}

static void activation_forward(bool fp64, const struct tensor *in, const struct tensor *out,
                               const void *context)
{
    REF_CHECK_OP(fp64, activation_forward)
    (NULL, *(const enum backend_activation *)context, &in[0], &out[0]);
}

static void activation_backward(bool fp64, const struct tensor *in, const struct tensor *out,
                                const struct tensor *dout, const struct tensor *din,
                                const void *context)
{
    REF_CHECK_OP(fp64, activation_backward)
    (NULL, *(const enum backend_activation *)context, &in[0], dout, &din[0]);
}

/* relu^2 has a kink in its derivative at 0: the points stay away from it by more than the step. */
static void away_from_zero(const struct tensor *t)
{
    REF_CHECK_EACH(t, r, c)
    {
        double v = ref_check_get(t, r, c);
        if (fabs(v) < 0.0625)
            ref_check_set(t, r, c, v < 0 ? -0.0625 : 0.0625);
    }
}

static void activation_gradients(void **state)
{
    static const enum backend_activation kind[2] = { BACKEND_RELU2, BACKEND_GELU };
    for (int i = 0; i < 2; i++) {
        struct ref_check_random rng = { 7 };
        struct ref_check_case c = { .name = i == 0 ? "relu2" : "gelu",
                                    .n_in = 1,
                                    .n_out = 1,
                                    .n_weighted = 1,
                                    .forward = activation_forward,
                                    .backward = activation_backward,
                                    .context = &kind[i],
                                    .in = { ref_check_matrix(DTYPE_F64, 7, 29, 3) },
                                    .out = { ref_check_matrix(DTYPE_F64, 7, 29, 1) } };
        ref_check_fill_random(&c.in[0], &rng, -3, 3);
        away_from_zero(&c.in[0]);
        ref_check_gradients(&c, 300);
        ref_check_case_free(&c);
    }
}

static void activation_in_place(void **state)
{
    for (int i = 0; i < 4; i++) {
        bool fp64 = i & 1;
        enum backend_activation f = i & 2 ? BACKEND_GELU : BACKEND_RELU2;
        struct ref_check_random rng = { 8 };
        struct tensor x = ref_check_matrix(real_dtype[fp64], 5, 19, 2),
                      dy = ref_check_matrix(real_dtype[fp64], 5, 19, 1);
        struct tensor y = ref_check_like(&x, x.dtype), dx = ref_check_like(&x, x.dtype);
        ref_check_fill_random(&x, &rng, -2, 2);
        ref_check_fill_random(&dy, &rng, -2, 2);
        REF_CHECK_OP(fp64, activation_forward)(NULL, f, &x, &y);
        REF_CHECK_OP(fp64, activation_backward)(NULL, f, &x, &dy, &dx);
        REF_CHECK_OP(fp64, activation_backward)(NULL, f, &x, &dy, &dy);
        REF_CHECK_OP(fp64, activation_forward)(NULL, f, &x, &x);
        ref_check_same(&x, &y, "forward in place");
        ref_check_same(&dy, &dx, "backward in place");
        ref_check_free(&x);
        ref_check_free(&y);
        ref_check_free(&dx);
        ref_check_free(&dy);
    }
}

static void rmsnorm_forward(bool fp64, const struct tensor *in, const struct tensor *out,
                            const void *context)
{
    REF_CHECK_OP(fp64, rmsnorm_forward)(NULL, &in[0], &in[1], 1e-5, &out[0], &out[1]);
}

static void rmsnorm_backward(bool fp64, const struct tensor *in, const struct tensor *out,
                             const struct tensor *dout, const struct tensor *din,
                             const void *context)
{
    REF_CHECK_OP(fp64, rmsnorm_backward)(NULL, &in[0], &in[1], &out[1], dout, &din[0], &din[1]);
}

static void rmsnorm_gradients_are_added(void **state)
{
    static const int64_t shape[3][2] = { { 7, 13 }, { 1, 1 }, { 3, 523 } };
    for (int i = 0; i < 3; i++) {
        struct ref_check_random rng = { 9 };
        struct ref_check_case c = {
            .name = "rmsnorm",
            .n_in = 2,
            .n_out = 2,
            .n_weighted = 1,
            .accumulates = 3,
            .forward = rmsnorm_forward,
            .backward = rmsnorm_backward,
            .in = { ref_check_matrix(DTYPE_F64, shape[i][0], shape[i][1], 3),
                    ref_check_vector(DTYPE_F64, shape[i][1]) },
            .out = { ref_check_matrix(DTYPE_F64, shape[i][0], shape[i][1], 1),
                     ref_check_vector(DTYPE_F64, shape[i][0]) }
        };
        ref_check_fill_random(&c.in[0], &rng, -2, 2);
        ref_check_fill_random(&c.in[1], &rng, 0.5, 1.5);
        if (i == 1) /* x of the order of sqrt(eps): elsewhere y barely depends on a single x */
            ref_check_set(&c.in[0], 0, 0, 0.0078125);
        c.step = i == 1 ? 1e-5 : 1e-3;
        ref_check_gradients(&c, 400);
        ref_check_case_free(&c);
    }
}

static void rmsnorm_values(void **state)
{
    /* rows (3,4): mean of squares 12.5; a zero row: rs = 1/sqrt(eps), y = 0 */
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct tensor x = ref_check_matrix(real_dtype[fp64], 2, 2, 1),
                      w = ref_check_vector(real_dtype[fp64], 2);
        struct tensor y = ref_check_like(&x, x.dtype), rs = ref_check_vector(real_dtype[fp64], 2);
        ref_check_fill_values(&x, (double[]){ 3, 4, 0, 0 });
        ref_check_fill_values(&w, (double[]){ 2, 0.5 });
        REF_CHECK_OP(fp64, rmsnorm_forward)(NULL, &x, &w, 1e-5, &y, &rs);
        double scale = 1 / sqrt(12.5 + 1e-5), tolerance = fp64 ? 1e-15 : 3e-7;
        ref_check_value(ref_check_get(&rs, 0, 0), scale, tolerance, "rs");
        ref_check_value(ref_check_get(&rs, 0, 1), 1 / sqrt(1e-5), tolerance, "rs of a zero row");
        ref_check_value(ref_check_get(&y, 0, 0), 6 * scale, tolerance, "y0");
        ref_check_value(ref_check_get(&y, 0, 1), 2 * scale, tolerance, "y1");
        ref_check_value(ref_check_get(&y, 1, 0), 0, 0, "y of a zero row");
        ref_check_free(&x);
        ref_check_free(&w);
        ref_check_free(&y);
        ref_check_free(&rs);
    }
}

static void layernorm_forward(bool fp64, const struct tensor *in, const struct tensor *out,
                              const void *context)
{
    REF_CHECK_OP(fp64, layernorm_forward)
    (NULL, &in[0], &in[1], &in[2], 1e-6, &out[0], &out[1], &out[2]);
}

static void layernorm_backward(bool fp64, const struct tensor *in, const struct tensor *out,
                               const struct tensor *dout, const struct tensor *din,
                               const void *context)
{
    REF_CHECK_OP(fp64, layernorm_backward)
    (NULL, &in[0], &in[1], &out[1], &out[2], dout, &din[0], &din[1], &din[2]);
}

static void layernorm_gradients_are_added(void **state)
{
    static const int64_t shape[2][2] = { { 7, 13 }, { 3, 523 } };
    for (int i = 0; i < 2; i++) {
        struct ref_check_random rng = { 10 };
        struct ref_check_case c = {
            .name = "layernorm",
            .n_in = 3,
            .n_out = 3,
            .n_weighted = 1,
            .accumulates = 7,
            .forward = layernorm_forward,
            .backward = layernorm_backward,
            .in = { ref_check_matrix(DTYPE_F64, shape[i][0], shape[i][1], 3),
                    ref_check_vector(DTYPE_F64, shape[i][1]),
                    ref_check_vector(DTYPE_F64, shape[i][1]) },
            .out = { ref_check_matrix(DTYPE_F64, shape[i][0], shape[i][1], 1),
                     ref_check_vector(DTYPE_F64, shape[i][0]),
                     ref_check_vector(DTYPE_F64, shape[i][0]) }
        };
        ref_check_fill_random(&c.in[0], &rng, -2, 2);
        ref_check_fill_random(&c.in[1], &rng, 0.5, 1.5);
        ref_check_fill_random(&c.in[2], &rng, -1, 1);
        ref_check_gradients(&c, 500);
        ref_check_case_free(&c);
    }
}

static void layernorm_values(void **state)
{
    /* row (c+1, c+3) has mean c+2 and biased variance 1, for c = 0 and for a c that ruins
     * sum(x^2)-mean^2 in fp32 */
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct tensor x = ref_check_matrix(real_dtype[fp64], 2, 2, 1),
                      w = ref_check_vector(real_dtype[fp64], 2);
        struct tensor b = ref_check_vector(real_dtype[fp64], 2), y = ref_check_like(&x, x.dtype);
        struct tensor mean = ref_check_vector(real_dtype[fp64], 2),
                      rs = ref_check_vector(real_dtype[fp64], 2);
        ref_check_fill_values(&x, (double[]){ 1, 3, 65537, 65539 });
        ref_check_fill_values(&w, (double[]){ 2, 3 });
        ref_check_fill_values(&b, (double[]){ 0.25, 0.5 });
        REF_CHECK_OP(fp64, layernorm_forward)(NULL, &x, &w, &b, 1e-6, &y, &mean, &rs);
        double scale = 1 / sqrt(1 + 1e-6), tolerance = fp64 ? 1e-15 : 3e-7;
        for (int r = 0; r < 2; r++) {
            ref_check_value(ref_check_get(&mean, 0, r), r == 0 ? 2 : 65538, 0, "mean");
            ref_check_value(ref_check_get(&rs, 0, r), scale, tolerance, "rs");
            ref_check_value(ref_check_get(&y, r, 0), -2 * scale + 0.25, tolerance, "y0");
            ref_check_value(ref_check_get(&y, r, 1), 3 * scale + 0.5, tolerance, "y1");
        }
        ref_check_free(&x);
        ref_check_free(&w);
        ref_check_free(&b);
        ref_check_free(&y);
        ref_check_free(&mean);
        ref_check_free(&rs);
    }
}

/* A frozen norm still passes the gradient on: the same dx as with parameter gradients. */
static void frozen_norm_gives_the_same_dx(void **state)
{
    for (int fp64 = 0; fp64 < 2; fp64++) {
        enum dtype t = real_dtype[fp64];
        struct ref_check_random rng = { 12 };
        struct tensor x = ref_check_matrix(t, 5, 11, 0), w = ref_check_vector(t, 11),
                      dy = ref_check_matrix(t, 5, 11, 2);
        struct tensor y = ref_check_matrix(t, 5, 11, 0), mean = ref_check_vector(t, 5),
                      rs = ref_check_vector(t, 5);
        struct tensor dx[4], dw = ref_check_vector(t, 11), db = ref_check_vector(t, 11);
        ref_check_fill_random(&x, &rng, -1, 1);
        ref_check_fill_random(&w, &rng, -1, 1);
        ref_check_fill_random(&dy, &rng, -1, 1);
        ref_check_fill(&dw, 0);
        ref_check_fill(&db, 0);
        for (int i = 0; i < 4; i++) {
            dx[i] = ref_check_matrix(t, 5, 11, i);
            ref_check_fill(&dx[i], 0.5);
        }
        REF_CHECK_OP(fp64, rmsnorm_forward)(NULL, &x, &w, 1e-5, &y, &rs);
        REF_CHECK_OP(fp64, rmsnorm_backward)(NULL, &x, &w, &rs, &dy, &dx[0], &dw);
        REF_CHECK_OP(fp64, rmsnorm_backward)(NULL, &x, &w, &rs, &dy, &dx[1], NULL);
        ref_check_same(&dx[0], &dx[1], "rmsnorm dx");
        REF_CHECK_OP(fp64, layernorm_forward)(NULL, &x, &w, &w, 1e-6, &y, &mean, &rs);
        REF_CHECK_OP(fp64, layernorm_backward)(NULL, &x, &w, &mean, &rs, &dy, &dx[2], &dw, &db);
        REF_CHECK_OP(fp64, layernorm_backward)(NULL, &x, &w, &mean, &rs, &dy, &dx[3], NULL, NULL);
        ref_check_same(&dx[2], &dx[3], "layernorm dx");
        struct tensor *all[] = { &x,     &w,     &dy,    &y,     &mean, &rs,
                                 &dx[0], &dx[1], &dx[2], &dx[3], &dw,   &db };
        for (size_t i = 0; i < sizeof all / sizeof *all; i++)
            ref_check_free(all[i]);
    }
}

/* No rows: nothing read, nothing written, accumulated gradients as they were. */
static void zero_rows_are_legal(void **state)
{
    for (int fp64 = 0; fp64 < 2; fp64++) {
        enum dtype t = real_dtype[fp64];
        struct tensor x = ref_check_matrix(t, 0, 5, 0), w = ref_check_vector(t, 5),
                      none = ref_check_vector(t, 0);
        struct tensor dw = ref_check_vector(t, 5), db = ref_check_vector(t, 5);
        ref_check_fill(&w, 1);
        ref_check_fill(&dw, 0.25);
        ref_check_fill(&db, 0.25);
        REF_CHECK_OP(fp64, add)(NULL, &x, &x);
        REF_CHECK_OP(fp64, add_bias)(NULL, &w, &x);
        REF_CHECK_OP(fp64, bias_backward)(NULL, &x, &db);
        REF_CHECK_OP(fp64, activation_forward)(NULL, BACKEND_GELU, &x, &x);
        REF_CHECK_OP(fp64, activation_backward)(NULL, BACKEND_RELU2, &x, &x, &x);
        REF_CHECK_OP(fp64, rmsnorm_forward)(NULL, &x, &w, 1e-5, &x, &none);
        REF_CHECK_OP(fp64, rmsnorm_backward)(NULL, &x, &w, &none, &x, &x, &dw);
        REF_CHECK_OP(fp64, layernorm_forward)(NULL, &x, &w, &w, 1e-5, &x, &none, &none);
        REF_CHECK_OP(fp64, layernorm_backward)(NULL, &x, &w, &none, &none, &x, &x, &dw, &db);
        ref_check_value(ref_check_get(&dw, 0, 4), 0.25, 0, "dw");
        ref_check_value(ref_check_get(&db, 0, 4), 0.25, 0, "db");
        ref_check_free(&x);
        ref_check_free(&w);
        ref_check_free(&none);
        ref_check_free(&dw);
        ref_check_free(&db);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gemm_equals_naive_for_every_transpose),
        cmocka_unit_test(gemm_of_empty_matrices),
        cmocka_unit_test(gemm_gradients),
        cmocka_unit_test(add_and_bias_gradients),
        cmocka_unit_test(bias_backward_adds_in_double),
        cmocka_unit_test(fgelu_golden_values),
        cmocka_unit_test(fgelu_equals_its_tanh_form),
        cmocka_unit_test(relu2_values_and_nan),
        cmocka_unit_test(activation_gradients),
        cmocka_unit_test(activation_in_place),
        cmocka_unit_test(rmsnorm_gradients_are_added),
        cmocka_unit_test(rmsnorm_values),
        cmocka_unit_test(layernorm_gradients_are_added),
        cmocka_unit_test(layernorm_values),
        cmocka_unit_test(frozen_norm_gives_the_same_dx),
        cmocka_unit_test(zero_rows_are_legal),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
