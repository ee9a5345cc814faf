/* test_ref_mamba.c - the Mamba-2 operations of the reference backend (src/ref/mamba.c, ssd.c):
 * golden values of model.md 8, the chunked scan against the sequential form (ssd_sequential.c),
 * segments, conventions, finite differences.
 */
#include "ref_check.h"
#include "ref/ssd_sequential.h"

/* ---- convolution ----------------------------------------------------------------------------- */

struct segments {
    struct tensor cu;
    int64_t max_len;
};

static struct segments segments_of(int n, const int32_t *cu)
{
    struct segments s = { ref_check_vector(DTYPE_I32, n + 1), 0 };
    memcpy(s.cu.data, cu, (size_t)(n + 1) * sizeof *cu);
    for (int i = 0; i < n; i++)
        s.max_len = cu[i + 1] - cu[i] > s.max_len ? cu[i + 1] - cu[i] : s.max_len;
    return s;
}

#define SEGMENTS(...) \
    segments_of((int)(sizeof((int32_t[]){ __VA_ARGS__ }) / sizeof(int32_t)) - 1, \
                (int32_t[]){ __VA_ARGS__ })

static double silu(double x)
{
    return x / (1 + exp(-x));
}

static void conv_forward(bool fp64, const struct tensor *in, const struct tensor *out,
                         const void *context)
{
    const struct segments *s = context;
    REF_CHECK_OP(fp64, conv_forward)(NULL, &in[0], &in[1], &in[2], &s->cu, s->max_len, &out[0]);
}

static void conv_backward(bool fp64, const struct tensor *in, const struct tensor *out,
                          const struct tensor *dout, const struct tensor *din, const void *context)
{
    const struct segments *s = context;
    REF_CHECK_OP(fp64, conv_backward)
    (NULL, &in[0], &in[1], &in[2], &s->cu, s->max_len, &dout[0], &din[0], &din[1], &din[2]);
}

/* Inputs x [rows, cols], w [cols, 1, taps], b [cols]; output y. */
static struct ref_check_case conv_case(const struct segments *s, int64_t rows, int64_t cols,
                                       int64_t taps)
{
    struct ref_check_case c = { .name = "conv",
                                .n_in = 3,
                                .n_out = 1,
                                .n_weighted = 1,
                                .accumulates = 6,
                                .forward = conv_forward,
                                .backward = conv_backward,
                                .context = s };
    struct ref_check_random rng = { 11 };
    c.in[0] = ref_check_matrix(DTYPE_F64, rows, cols, 7);
    c.in[1] = ref_check_new(DTYPE_F64, 3, (int64_t[]){ cols, 1, taps }, 0);
    c.in[2] = ref_check_vector(DTYPE_F64, cols);
    c.out[0] = ref_check_matrix(DTYPE_F64, rows, cols, 3);
    for (int i = 0; i < 3; i++)
        ref_check_fill_random(&c.in[i], &rng, -1, 1);
    return c;
}

static void conv_golden(struct segments s, const double *expected)
{
    struct ref_check_case c = conv_case(&s, 5, 1, 4);
    ref_check_fill_values(&c.in[0], (double[]){ 1, 0, 0, 0, 0 });
    ref_check_fill_values(&c.in[1], (double[]){ 1, 2, 3, 4 });
    ref_check_fill(&c.in[2], 0);
    ref_check_forward(&c, true, c.in, c.out);
    for (int i = 0; i < 5; i++)
        ref_check_value(ref_check_get(&c.out[0], i, 0), silu(expected[i]), 1e-15, "conv");
    ref_check_case_free(&c);
    ref_check_free(&s.cu);
}

static void test_conv_golden_m6_11_tap_order(void **state)
{
    conv_golden(SEGMENTS(0, 5), (double[]){ 4, 3, 2, 1, 0 });
}

static void test_conv_golden_m6_09_new_segment(void **state)
{
    conv_golden(SEGMENTS(0, 2, 5), (double[]){ 4, 3, 0, 0, 0 });
}

/* 600 columns: three blocks, the last one short. Segments shorter than the taps, an empty one. */
static void test_conv_gradients(void **state)
{
    struct segments s = SEGMENTS(0, 2, 2, 3, 13, 20);
    for (int64_t taps = 1; taps <= 5; taps += 2) {
        struct ref_check_case c = conv_case(&s, 20, 600, taps);
        ref_check_gradients(&c, 5 + (uint64_t)taps);
        ref_check_case_free(&c);
    }
    struct ref_check_case c = conv_case(&s, 20, 5, 4);
    ref_check_gradients(&c, 2);
    ref_check_case_free(&c);
    ref_check_free(&s.cu);
}

static void test_conv_frozen_leaves_dx(void **state)
{
    struct segments s = SEGMENTS(0, 4, 9);
    struct ref_check_case c = conv_case(&s, 9, 6, 4);
    struct tensor dx[2], dw = ref_check_like(&c.in[1], DTYPE_F64),
                         db = ref_check_like(&c.in[2], DTYPE_F64);
    ref_check_fill(&dw, 0);
    ref_check_fill(&db, 0);
    for (int i = 0; i < 2; i++) {
        dx[i] = ref_check_like(&c.in[0], DTYPE_F64);
        ref_conv_backward_f64(NULL, &c.in[0], &c.in[1], &c.in[2], &s.cu, s.max_len, &c.in[0],
                              &dx[i], i ? NULL : &dw, i ? NULL : &db);
    }
    ref_check_same(&dx[0], &dx[1], "dx");
    for (int i = 0; i < 2; i++)
        ref_check_free(&dx[i]);
    ref_check_free(&dw);
    ref_check_free(&db);
    ref_check_case_free(&c);
    ref_check_free(&s.cu);
}

/* ---- gated norm ------------------------------------------------------------------------------ */

struct gated {
    int groups;
    double eps;
};

static void gated_forward(bool fp64, const struct tensor *in, const struct tensor *out,
                          const void *context)
{
    const struct gated *g = context;
    REF_CHECK_OP(fp64, gated_norm_forward)
    (NULL, &in[0], &in[1], &in[2], g->groups, g->eps, &out[0], &out[1]);
}

static void gated_backward(bool fp64, const struct tensor *in, const struct tensor *out,
                           const struct tensor *dout, const struct tensor *din, const void *context)
{
    const struct gated *g = context;
    REF_CHECK_OP(fp64, gated_norm_backward)
    (NULL, &in[0], &in[1], &in[2], g->groups, &out[1], &dout[0], &din[0], &din[1], &din[2]);
}

/* Inputs y, z [rows, cols], w [cols]; outputs o, rs. */
static struct ref_check_case gated_case(const struct gated *g, int64_t rows, int64_t cols)
{
    struct ref_check_case c = { .name = "gated norm",
                                .n_in = 3,
                                .n_out = 2,
                                .n_weighted = 1,
                                .accumulates = 4,
                                .forward = gated_forward,
                                .backward = gated_backward,
                                .context = g };
    struct ref_check_random rng = { 21 };
    c.in[0] = ref_check_matrix(DTYPE_F64, rows, cols, 0);
    c.in[1] = ref_check_matrix(DTYPE_F64, rows, cols, 13);
    c.in[2] = ref_check_vector(DTYPE_F64, cols);
    c.out[0] = ref_check_matrix(DTYPE_F64, rows, cols, 2);
    c.out[1] = ref_check_matrix(DTYPE_F64, rows, g->groups, 0);
    for (int i = 0; i < 3; i++)
        ref_check_fill_random(&c.in[i], &rng, -2, 2);
    return c;
}

static void test_gated_norm_golden_m6_11_gate_before_norm(void **state)
{
    struct gated g = { 1, 1e-5 };
    struct ref_check_case c = gated_case(&g, 1, 2);
    ref_check_fill_values(&c.in[0], (double[]){ 1, 2 });
    ref_check_fill_values(&c.in[1], (double[]){ 0, 1 });
    ref_check_fill(&c.in[2], 1);
    ref_check_forward(&c, true, c.in, c.out);
    ref_check_value(ref_check_get(&c.out[0], 0, 0), 0, 1e-15, "o");
    ref_check_value(ref_check_get(&c.out[0], 0, 1), 1.414206947, 1e-9, "o");
    ref_check_value(ref_check_get(&c.out[0], 0, 1) / ref_check_get(&c.out[1], 0, 0), 1.462117157,
                    1e-9, "u");
    ref_check_case_free(&c);
}

/* Column 0 of each group is scaled by the RMS of its own group: three groups of 4, not one of
 * 12. */
static void test_gated_norm_m6_11_group_size_and_eps(void **state)
{
    struct gated g = { 3, 1e-5 };
    struct ref_check_case c = gated_case(&g, 2, 12);
    ref_check_forward(&c, true, c.in, c.out);
    for (int64_t r = 0; r < 2; r++)
        for (int64_t group = 0; group < 3; group++) {
            double squares = 0, u = 0;
            for (int64_t i = 4 * group + 3; i >= 4 * group; i--) {
                u = ref_check_get(&c.in[0], r, i) * silu(ref_check_get(&c.in[1], r, i));
                squares += u * u;
            }
            double rs = 1 / sqrt(squares / 4 + 1e-5);
            ref_check_value(ref_check_get(&c.out[1], r, group), rs, 1e-14, "rs");
            ref_check_value(ref_check_get(&c.out[0], r, 4 * group),
                            u * rs * ref_check_get(&c.in[2], 0, 4 * group), 1e-14, "o");
        }
    ref_check_case_free(&c);
}

static void test_gated_norm_gradients(void **state)
{
    for (int groups = 1; groups <= 9; groups += 2) {
        struct gated g = { groups, 1e-5 };
        struct ref_check_case c = gated_case(&g, 7, 315); /* 35*9, 45*7, 63*5, 105*3 */
        ref_check_gradients(&c, 3 + (uint64_t)groups);
        ref_check_case_free(&c);
    }
}

/* ---- scan ------------------------------------------------------------------------------------ */

enum { XBC, DT, DT_BIAS, A_LOG, D_SKIP, SSD_INPUTS };

struct scan {
    struct segments s;
    int64_t tokens;
    int heads, head_dim, groups, state, chunk;
    bool sequential, frozen;
};

static struct tensor scan_work(bool fp64, const struct scan *c)
{
    __typeof__(&ref_ssd_work_f64) count =
        c->sequential ? (fp64 ? ref_ssd_sequential_work_f64 : ref_ssd_sequential_work_f32)
                      : REF_CHECK_OP(fp64, ssd_work);
    return ref_check_vector(fp64 ? DTYPE_F64 : DTYPE_F32,
                            count(c->tokens, tensor_numel(&c->s.cu) - 1, c->heads, c->head_dim,
                                  c->groups, c->state, c->chunk));
}

static void scan_forward(bool fp64, const struct tensor *in, const struct tensor *out,
                         const void *context)
{
    const struct scan *c = context;
    struct tensor work = scan_work(fp64, c);
    __typeof__(&ref_ssd_forward_f64) op =
        c->sequential ? (fp64 ? ref_ssd_sequential_forward_f64 : ref_ssd_sequential_forward_f32)
                      : REF_CHECK_OP(fp64, ssd_forward);
    op(NULL, &in[XBC], &in[DT], &in[DT_BIAS], &in[A_LOG], &in[D_SKIP], &c->s.cu, c->s.max_len,
       c->heads, c->head_dim, c->groups, c->state, c->chunk, &work, &out[0]);
    ref_check_free(&work);
}

static void scan_backward(bool fp64, const struct tensor *in, const struct tensor *out,
                          const struct tensor *dout, const struct tensor *din, const void *context)
{
    const struct scan *c = context;
    struct tensor work = scan_work(fp64, c);
    __typeof__(&ref_ssd_backward_f64) op =
        c->sequential ? (fp64 ? ref_ssd_sequential_backward_f64 : ref_ssd_sequential_backward_f32)
                      : REF_CHECK_OP(fp64, ssd_backward);
    op(NULL, &in[XBC], &in[DT], &in[DT_BIAS], &in[A_LOG], &in[D_SKIP], &c->s.cu, c->s.max_len,
       c->heads, c->head_dim, c->groups, c->state, c->chunk, &dout[0], &work, &din[XBC], &din[DT],
       c->frozen ? NULL : &din[DT_BIAS], c->frozen ? NULL : &din[A_LOG],
       c->frozen ? NULL : &din[D_SKIP]);
    ref_check_free(&work);
}

static struct scan scan_of(struct segments s, int heads, int head_dim, int groups, int state,
                           int chunk)
{
    struct scan c = { .s = s,
                      .heads = heads,
                      .head_dim = head_dim,
                      .groups = groups,
                      .state = state,
                      .chunk = chunk };
    c.tokens = ((const int32_t *)s.cu.data)[tensor_numel(&s.cu) - 1];
    return c;
}

static struct ref_check_case scan_case(const struct scan *s, uint64_t seed)
{
    struct ref_check_case c = { .name = "scan",
                                .n_in = SSD_INPUTS,
                                .n_out = 1,
                                .n_weighted = 1,
                                .accumulates = 1u << DT_BIAS | 1u << A_LOG | 1u << D_SKIP,
                                .forward = scan_forward,
                                .backward = scan_backward,
                                .context = s };
    struct ref_check_random rng = { seed };
    int64_t inner = (int64_t)s->heads * s->head_dim;
    c.in[XBC] =
        ref_check_matrix(DTYPE_F64, s->tokens, inner + 2 * (int64_t)s->groups * s->state, 9);
    c.in[DT] = ref_check_matrix(DTYPE_F64, s->tokens, s->heads, 5);
    for (int i = DT_BIAS; i < SSD_INPUTS; i++)
        c.in[i] = ref_check_vector(DTYPE_F64, s->heads);
    c.out[0] = ref_check_matrix(DTYPE_F64, s->tokens, inner, 1);
    ref_check_fill_random(&c.in[XBC], &rng, -1, 1);
    ref_check_fill_random(&c.in[DT], &rng, -2, 1);
    ref_check_fill_random(&c.in[DT_BIAS], &rng, -2, 0);
    ref_check_fill_random(&c.in[A_LOG], &rng, -1, 1);
    ref_check_fill_random(&c.in[D_SKIP], &rng, 0.5, 1.5);
    return c;
}

/* Gradients of the case for L = sum(w y); those that accumulate start at 0. */
static void scan_gradients(const struct ref_check_case *c, const struct tensor *w,
                           struct tensor *din)
{
    for (int i = 0; i < SSD_INPUTS; i++) {
        din[i] = ref_check_like(&c->in[i], DTYPE_F64);
        if (c->accumulates & (1u << i))
            ref_check_fill(&din[i], 0);
    }
    ref_check_forward(c, true, c->in, c->out);
    c->backward(true, c->in, c->out, w, din, c->context);
}

static void free_all(struct tensor *t, int n)
{
    for (int i = 0; i < n; i++)
        ref_check_free(&t[i]);
}

static void check_column(const struct tensor *t, int64_t column, const double *expected,
                         const char *what)
{
    for (int64_t r = 0; r < 3; r++)
        ref_check_value(ref_check_get(t, r, column), expected[r], 1e-9, what);
}

static void scan_golden(int chunk, bool sequential)
{
    struct scan s = scan_of(SEGMENTS(0, 3), 1, 1, 1, 1, chunk);
    s.sequential = sequential;
    struct ref_check_case c = scan_case(&s, 1);
    struct tensor w = ref_check_like(&c.out[0], DTYPE_F64), din[SSD_INPUTS];
    ref_check_fill_values(&c.in[XBC], (double[]){ 1, 1, 1, 2, 1, 1, 3, 1, 1 });
    ref_check_fill(&c.in[DT], 0);
    ref_check_fill(&c.in[DT_BIAS], 0);
    ref_check_fill(&c.in[A_LOG], 0);
    ref_check_fill(&c.in[D_SKIP], 0.5);
    ref_check_fill(&w, 1);
    scan_gradients(&c, &w, din);
    check_column(&c.out[0], 0, (double[]){ 1.193147181, 2.732867951, 4.445875517 }, "y");
    check_column(&din[XBC], 0, (double[]){ 1.713007566, 1.539720771, 1.193147181 }, "dx");
    check_column(&din[XBC], 1, (double[]){ 1.213007566, 2.079441542, 2.079441542 }, "dB");
    check_column(&din[XBC], 2, (double[]){ 0.693147181, 1.732867951, 2.945875517 }, "dC = state");
    check_column(&din[DT], 0, (double[]){ 1.75 / 2, 2.480139615 / 2, 2.133566024 / 2 }, "ddt");
    ref_check_value(ref_check_get(&din[DT_BIAS], 0, 0), 3.181852819, 1e-9, "ddt_bias");
    ref_check_value(ref_check_get(&din[A_LOG], 0, 0), -0.960906028, 1e-9, "dA_log");
    ref_check_value(ref_check_get(&din[D_SKIP], 0, 0), 6, 1e-9, "dD");
    free_all(din, SSD_INPUTS);
    ref_check_free(&w);
    ref_check_case_free(&c);
    ref_check_free(&s.s.cu);
}

static void test_scan_golden(void **state)
{
    scan_golden(1, true);
    for (int chunk = 1; chunk <= 4; chunk++)
        scan_golden(chunk, false);
}

/* Outputs and all gradients of the two forms, largest difference relative to the largest
 * element. */
static void compare_forms(struct scan s, uint64_t seed, double tolerance)
{
    struct scan q = s;
    struct ref_check_case chunked = scan_case(&s, seed), sequential = scan_case(&q, seed);
    struct ref_check_random rng = { seed + 1 };
    struct tensor w = ref_check_like(&chunked.out[0], DTYPE_F64), a[SSD_INPUTS], b[SSD_INPUTS];
    q.sequential = true;
    ref_check_fill_random(&w, &rng, -1, 1);
    scan_gradients(&chunked, &w, a);
    scan_gradients(&sequential, &w, b);
    ref_check_near(&chunked.out[0], &sequential.out[0], tolerance, "y");
    for (int i = 0; i < SSD_INPUTS; i++) {
        static const char *const name[] = { "dxbc", "ddt", "ddt_bias", "dA_log", "dD" };
        ref_check_near(&a[i], &b[i], tolerance, name[i]);
    }
    free_all(a, SSD_INPUTS);
    free_all(b, SSD_INPUTS);
    ref_check_free(&w);
    ref_check_case_free(&chunked);
    ref_check_case_free(&sequential);
    ref_check_free(&s.s.cu);
}

static void test_scan_m6_09_sequential_equals_chunked(void **state)
{
    for (int chunk = 1; chunk <= 32; chunk *= 2) {
        /* S not a multiple of Q */
        compare_forms(scan_of(SEGMENTS(0, 37), 4, 3, 2, 5, chunk), 7, 1e-13);
        /* S < Q */
        compare_forms(scan_of(SEGMENTS(0, 7), 2, 4, 1, 3, chunk), 8, 1e-13);
        /* change in mid-chunk */
        compare_forms(scan_of(SEGMENTS(0, 21, 64), 6, 2, 3, 4, chunk), 9, 1e-13);
        /* several in a chunk, one empty */
        compare_forms(scan_of(SEGMENTS(0, 1, 3, 3, 8, 11, 30), 4, 5, 4, 7, chunk), 10, 1e-13);
    }
    /* tiny */
    compare_forms(scan_of(SEGMENTS(0, 64, 128), 8, 8, 2, 16, 16), 11, 1e-13);
    /* full head, group and state */
    compare_forms(scan_of(SEGMENTS(0, 150, 300), 16, 64, 2, 128, 128), 12, 1e-13);
}

static void test_scan_m6_11_strong_decay_stays_finite(void **state)
{
    struct scan s = scan_of(SEGMENTS(0, 100, 200), 2, 4, 1, 3, 64), q = s;
    struct ref_check_case c = scan_case(&s, 3), d = scan_case(&q, 3);
    struct tensor w = ref_check_like(&c.out[0], DTYPE_F64), a[SSD_INPUTS], b[SSD_INPUTS];
    q.sequential = true;
    for (int64_t t = 0; t < 200; t++)
        for (int64_t h = 0; h < 2; h++) {
            /* decays 0, 1, e^-0.8, e^-128 */
            double dt = t % 7 == 3 ? 400 : t % 5 == 1 ? -60 : t % 3 == 0 ? -3 : 8;
            ref_check_set(&c.in[DT], t, h, dt);
            ref_check_set(&d.in[DT], t, h, dt);
        }
    ref_check_fill(&c.in[A_LOG], log(16));
    ref_check_fill(&d.in[A_LOG], log(16));
    ref_check_fill(&w, 1);
    scan_gradients(&c, &w, a);
    scan_gradients(&d, &w, b);
    ref_check_near(&c.out[0], &d.out[0], 1e-13, "y");
    for (int i = 0; i < SSD_INPUTS; i++)
        ref_check_near(&a[i], &b[i], 1e-13, "gradient");
    free_all(a, SSD_INPUTS);
    free_all(b, SSD_INPUTS);
    ref_check_free(&w);
    ref_check_case_free(&c);
    ref_check_case_free(&d);
    ref_check_free(&s.s.cu);
}

/* One token: y = del x (B.C) + D x, so that del is read off y. */
static void test_scan_m6_11_softplus_threshold(void **state)
{
    struct scan s = scan_of(SEGMENTS(0, 1), 2, 1, 1, 1, 16);
    struct ref_check_case c = scan_case(&s, 4);
    ref_check_fill(&c.in[XBC], 1);
    ref_check_fill_values(&c.in[DT_BIAS], (double[]){ 12, 12.5 });
    ref_check_fill(&c.in[DT], 8);
    ref_check_fill(&c.in[D_SKIP], 0);
    ref_check_forward(&c, true, c.in, c.out);
    assert_true(ref_check_get(&c.out[0], 0, 0) == log1p(exp(20)) &&
                ref_check_get(&c.out[0], 0, 0) > 20);
    assert_true(ref_check_get(&c.out[0], 0, 1) == 20.5);
    struct tensor w = ref_check_like(&c.out[0], DTYPE_F64), din[SSD_INPUTS];
    ref_check_fill(&w, 1);
    scan_gradients(&c, &w, din);
    assert_true(ref_check_get(&din[DT], 0, 1) == 1 && ref_check_get(&din[DT], 0, 0) < 1);
    free_all(din, SSD_INPUTS);
    ref_check_free(&w);
    ref_check_case_free(&c);
    ref_check_free(&s.s.cu);
}

/* Second of two tokens, x = (1, 0): y = a del with a = exp(-e^{A_log} del), the larger A_log the
 * less. D is the head's own. */
static void test_scan_m6_11_sign_of_a_and_d_per_head(void **state)
{
    struct scan s = scan_of(SEGMENTS(0, 2), 2, 1, 1, 1, 16);
    struct ref_check_case c = scan_case(&s, 5);
    ref_check_fill_values(&c.in[XBC], (double[]){ 1, 1, 1, 1, 0, 0, 1, 1 });
    ref_check_fill(&c.in[DT], 0);
    ref_check_fill(&c.in[DT_BIAS], 0);
    ref_check_fill_values(&c.in[A_LOG], (double[]){ 0, 1 });
    ref_check_fill_values(&c.in[D_SKIP], (double[]){ 3, 5 });
    ref_check_forward(&c, true, c.in, c.out);
    double del = log(2);
    ref_check_value(ref_check_get(&c.out[0], 0, 0), del + 3, 1e-14, "D of head 0");
    ref_check_value(ref_check_get(&c.out[0], 0, 1), del + 5, 1e-14, "D of head 1");
    ref_check_value(ref_check_get(&c.out[0], 1, 0), del * exp(-del), 1e-14, "decay of head 0");
    ref_check_value(ref_check_get(&c.out[0], 1, 1), del * exp(-exp(1) * del), 1e-14,
                    "decay of head 1");
    ref_check_case_free(&c);
    ref_check_free(&s.s.cu);
}

/* Two samples packed, against each alone: outputs and gradients; parameters' gradients are the
 * sums. */
static void test_scan_m6_10_packed_equals_separate(void **state)
{
    enum { FIRST = 19, SECOND = 26 };
    struct scan both = scan_of(SEGMENTS(0, FIRST, FIRST + SECOND), 4, 3, 2, 5, 8);
    struct scan one[2] = { scan_of(SEGMENTS(0, FIRST), 4, 3, 2, 5, 8),
                           scan_of(SEGMENTS(0, SECOND), 4, 3, 2, 5, 8) };
    struct ref_check_case packed = scan_case(&both, 13);
    struct ref_check_random rng = { 14 };
    struct tensor w = ref_check_like(&packed.out[0], DTYPE_F64), din[SSD_INPUTS], sum[SSD_INPUTS];
    ref_check_fill_random(&w, &rng, -1, 1);
    scan_gradients(&packed, &w, din);
    for (int i = DT_BIAS; i < SSD_INPUTS; i++) {
        sum[i] = ref_check_like(&packed.in[i], DTYPE_F64);
        ref_check_fill(&sum[i], 0);
    }
    for (int i = 0; i < 2; i++) {
        int64_t first = i == 0 ? 0 : FIRST, n = i == 0 ? FIRST : SECOND;
        struct ref_check_case alone = packed;
        struct tensor part[SSD_INPUTS], w_part = tensor_row_range(&w, first, n);
        alone.context = &one[i];
        alone.in[XBC] = tensor_row_range(&packed.in[XBC], first, n);
        alone.in[DT] = tensor_row_range(&packed.in[DT], first, n);
        alone.out[0] = ref_check_matrix(DTYPE_F64, n, tensor_cols(&w), 0);
        scan_gradients(&alone, &w_part, part);
        struct tensor y = tensor_row_range(&packed.out[0], first, n),
                      dxbc = tensor_row_range(&din[XBC], first, n);
        struct tensor ddt = tensor_row_range(&din[DT], first, n);
        ref_check_near(&alone.out[0], &y, 1e-15, "y");
        ref_check_near(&part[XBC], &dxbc, 1e-15, "dxbc");
        ref_check_near(&part[DT], &ddt, 1e-15, "ddt");
        for (int j = DT_BIAS; j < SSD_INPUTS; j++)
            REF_CHECK_EACH(&sum[j], r, col)
        ref_check_set(&sum[j], r, col,
                      ref_check_get(&sum[j], r, col) + ref_check_get(&part[j], r, col));
        free_all(part, SSD_INPUTS);
        ref_check_free(&alone.out[0]);
        ref_check_free(&one[i].s.cu);
    }
    for (int j = DT_BIAS; j < SSD_INPUTS; j++)
        ref_check_near(&din[j], &sum[j], 1e-14, "parameter");
    free_all(din, SSD_INPUTS);
    free_all(sum + DT_BIAS, SSD_INPUTS - DT_BIAS);
    ref_check_free(&w);
    ref_check_case_free(&packed);
    ref_check_free(&both.s.cu);
}

/* What a sample holds, infinities included, does not reach the other one, not by a bit, in either
 * direction. */
static void test_scan_and_conv_m6_10_samples_do_not_meet(void **state)
{
    struct scan s = scan_of(SEGMENTS(0, 11, 24, 30), 2, 3, 1, 4, 8);
    struct ref_check_case cases[2] = { scan_case(&s, 15), conv_case(&s.s, 30, 10, 4) };
    for (int i = 0; i < 2; i++) {
        struct ref_check_case *c = &cases[i];
        struct tensor w = ref_check_like(&c->out[0], DTYPE_F64),
                      y = ref_check_like(&c->out[0], DTYPE_F64);
        struct tensor din[2][SSD_INPUTS];
        ref_check_fill(&w, 1);
        for (int run = 0; run < 2; run++) {
            if (run == 1)
                for (int64_t r = 11; r < 24; r++)
                    ref_check_set(&c->in[0], r, 0, r % 2 ? INFINITY : 1e30);
            for (int j = 0; j < c->n_in; j++) {
                din[run][j] = ref_check_like(&c->in[j], DTYPE_F64);
                ref_check_fill(&din[run][j], 0);
            }
            ref_check_forward(c, true, c->in, c->out);
            c->backward(true, c->in, c->out, &w, din[run], c->context);
            if (run == 0)
                ref_check_convert(&c->out[0], &y);
        }
        for (int part = 0; part < 2; part++) {
            int64_t first = part == 0 ? 0 : 24, n = part == 0 ? 11 : 6;
            struct tensor was = tensor_row_range(&y, first, n),
                          is = tensor_row_range(&c->out[0], first, n);
            struct tensor dwas = tensor_row_range(&din[0][0], first, n),
                          dis = tensor_row_range(&din[1][0], first, n);
            ref_check_same(&was, &is, "outputs of the others");
            ref_check_same(&dwas, &dis, "gradients of the others");
        }
        assert_false(isfinite(ref_check_get(&c->out[0], 13, 0)));
        free_all(din[0], c->n_in);
        free_all(din[1], c->n_in);
        ref_check_free(&w);
        ref_check_free(&y);
        ref_check_case_free(c);
    }
    ref_check_free(&s.s.cu);
}

static void test_scan_gradients(void **state)
{
    struct scan s[] = { scan_of(SEGMENTS(0, 37), 4, 3, 2, 5, 8),
                        scan_of(SEGMENTS(0, 5, 6, 6, 31), 3, 8, 1, 16, 16),
                        scan_of(SEGMENTS(0, 9), 2, 4, 2, 3, 128) };
    for (size_t i = 0; i < sizeof s / sizeof *s; i++) {
        for (int sequential = 0; sequential < 2; sequential++) {
            s[i].sequential = sequential;
            struct ref_check_case c = scan_case(&s[i], 31 + i);
            ref_check_gradients(&c, 41 + i);
            ref_check_case_free(&c);
        }
        ref_check_free(&s[i].s.cu);
    }
}

/* A long sequence with slow decay, where fp32 sums would show. */
static void test_scan_fp32_follows_fp64_over_many_chunks(void **state)
{
    struct scan s = scan_of(SEGMENTS(0, 1000), 2, 16, 1, 32, 64);
    struct ref_check_case c = scan_case(&s, 51);
    ref_check_fill(&c.in[DT_BIAS], -5);
    ref_check_fill(&c.in[A_LOG], -2);
    c.tolerance32 = 4e-6;
    ref_check_gradients(&c, 52);
    ref_check_case_free(&c);
    ref_check_free(&s.s.cu);
}

static void test_scan_frozen_leaves_the_rest(void **state)
{
    struct scan s = scan_of(SEGMENTS(0, 20), 4, 3, 2, 5, 8), f = s;
    struct ref_check_case c = scan_case(&s, 61), frozen = scan_case(&f, 61);
    struct tensor w = ref_check_like(&c.out[0], DTYPE_F64), a[SSD_INPUTS], b[SSD_INPUTS];
    f.frozen = true;
    ref_check_fill(&w, 1);
    scan_gradients(&c, &w, a);
    scan_gradients(&frozen, &w, b);
    ref_check_same(&a[XBC], &b[XBC], "dxbc");
    ref_check_same(&a[DT], &b[DT], "ddt");
    for (int i = DT_BIAS; i < SSD_INPUTS; i++)
        assert_true(ref_check_dot(&b[i], &b[i]) == 0 && ref_check_dot(&a[i], &a[i]) > 0);
    free_all(a, SSD_INPUTS);
    free_all(b, SSD_INPUTS);
    ref_check_free(&w);
    ref_check_case_free(&c);
    ref_check_case_free(&frozen);
    ref_check_free(&s.s.cu);
}

static void test_zero_rows_are_legal(void **state)
{
    for (int segments = 0; segments < 3; segments++) {
        struct segments none = segments_of(segments, (int32_t[]){ 0, 0, 0 });
        struct scan s = scan_of(none, 4, 3, 2, 5, 8);
        struct gated g = { 2, 1e-5 };
        struct ref_check_case cases[3] = { scan_case(&s, 1), conv_case(&none, 0, 10, 4),
                                           gated_case(&g, 0, 10) };
        for (int i = 0; i < 3; i++) {
            struct ref_check_case *c = &cases[i];
            struct tensor din[SSD_INPUTS];
            for (int j = 0; j < c->n_in; j++) {
                din[j] = ref_check_like(&c->in[j], DTYPE_F64);
                ref_check_fill(&din[j], 3);
            }
            ref_check_forward(c, true, c->in, c->out);
            c->backward(true, c->in, c->out, c->out, din, c->context);
            for (int j = 0; j < c->n_in; j++)
                REF_CHECK_EACH(&din[j], r, col)
            assert_true(ref_check_get(&din[j], r, col) == 3);
            free_all(din, c->n_in);
            ref_check_case_free(c);
        }
        ref_check_free(&none.cu);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_conv_golden_m6_11_tap_order),
        cmocka_unit_test(test_conv_golden_m6_09_new_segment),
        cmocka_unit_test(test_conv_gradients),
        cmocka_unit_test(test_conv_frozen_leaves_dx),
        cmocka_unit_test(test_gated_norm_golden_m6_11_gate_before_norm),
        cmocka_unit_test(test_gated_norm_m6_11_group_size_and_eps),
        cmocka_unit_test(test_gated_norm_gradients),
        cmocka_unit_test(test_scan_golden),
        cmocka_unit_test(test_scan_m6_09_sequential_equals_chunked),
        cmocka_unit_test(test_scan_m6_11_strong_decay_stays_finite),
        cmocka_unit_test(test_scan_m6_11_softplus_threshold),
        cmocka_unit_test(test_scan_m6_11_sign_of_a_and_d_per_head),
        cmocka_unit_test(test_scan_m6_10_packed_equals_separate),
        cmocka_unit_test(test_scan_and_conv_m6_10_samples_do_not_meet),
        cmocka_unit_test(test_scan_gradients),
        cmocka_unit_test(test_scan_fp32_follows_fp64_over_many_chunks),
        cmocka_unit_test(test_scan_frozen_leaves_the_rest),
        cmocka_unit_test(test_zero_rows_are_legal),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
