/* test_ref_attention.c - attention of the reference backend: ragged batches, grouped heads, tiles,
 * gradients. */
#include "ref_check.h"

static const enum dtype real_dtype[2] = { DTYPE_F32, DTYPE_F64 };

/* Segment lengths, heads and mask of one batch; cu is made from them. */
struct attention_context {
    int n, g, d;
    bool causal;
    int64_t max_len;
    struct tensor cu;
};

static struct attention_context make_context(int n, int g, int d, bool causal, int segments,
                                             const int *length)
{
    struct attention_context a = { n, g, d, causal, 0, ref_check_vector(DTYPE_I32, segments + 1) };
    int first = 0;
    for (int i = 0; i <= segments; i++) {
        ref_check_set(&a.cu, 0, i, first);
        first += i < segments ? length[i] : 0;
        a.max_len = i < segments && length[i] > a.max_len ? length[i] : a.max_len;
    }
    return a;
}

static int64_t rows_of(const struct attention_context *a)
{
    return (int64_t)ref_check_get(&a->cu, 0, tensor_numel(&a->cu) - 1);
}

static struct tensor new_qkv(const struct attention_context *a, bool fp64, uint64_t seed,
                             double size, int64_t pad)
{
    struct ref_check_random rng = { seed };
    struct tensor t =
        ref_check_matrix(real_dtype[fp64], rows_of(a), (int64_t)(a->n + 2 * a->g) * a->d, pad);
    ref_check_fill_random(&t, &rng, -size, size);
    return t;
}

static struct tensor new_o(const struct attention_context *a, bool fp64, int64_t pad)
{
    return ref_check_matrix(real_dtype[fp64], rows_of(a), (int64_t)a->n * a->d, pad);
}

static struct tensor new_lse(const struct attention_context *a, bool fp64, int64_t pad)
{
    return ref_check_matrix(real_dtype[fp64], rows_of(a), a->n, pad);
}

static void attend(const struct attention_context *a, const struct tensor *qkv,
                   const struct tensor *o, const struct tensor *lse)
{
    REF_CHECK_OP(qkv->dtype == DTYPE_F64, attention_forward)
    (NULL, qkv, &a->cu, a->max_len, a->n, a->g, a->d, a->causal, NULL, o, lse);
}

static void attend_back(const struct attention_context *a, const struct tensor *qkv,
                        const struct tensor *o, const struct tensor *lse, const struct tensor *dout,
                        const struct tensor *dqkv)
{
    REF_CHECK_OP(qkv->dtype == DTYPE_F64, attention_backward)
    (NULL, qkv, &a->cu, a->max_len, a->n, a->g, a->d, a->causal, o, lse, dout, NULL, dqkv);
}

/* One query of one head, straight from the definition. out [d]; returns the log-sum-exp. */
static double naive_query(const struct attention_context *a, const struct tensor *qkv, int head,
                          int64_t first, int64_t last, int64_t row, double *out)
{
    int per = a->n / a->g;
    int64_t group = (int64_t)(head / per) * (per + 2) * a->d,
            q = group + (int64_t)(head % per) * a->d;
    int64_t k = group + (int64_t)per * a->d, v = k + a->d;
    double sum = 0, top = -INFINITY;
    for (int pass = 0; pass < 2; pass++)
        for (int64_t j = first; j < (a->causal ? row + 1 : last); j++) {
            double score = 0;
            for (int i = 0; i < a->d; i++)
                score += ref_check_get(qkv, row, q + i) * ref_check_get(qkv, j, k + i);
            score /= sqrt(a->d);
            top = pass == 0 ? fmax(top, score) : top;
            sum += pass == 1 ? exp(score - top) : 0;
            for (int i = 0; i < a->d; i++)
                out[i] = pass == 0 ? 0 : out[i] + exp(score - top) * ref_check_get(qkv, j, v + i);
        }
    for (int i = 0; i < a->d; i++)
        out[i] /= sum;
    return top + log(sum);
}

static void against_definition(const struct attention_context *a, bool fp64, double size)
{
    struct tensor qkv = new_qkv(a, fp64, 21, size, 3), o = new_o(a, fp64, 2),
                  lse = new_lse(a, fp64, 1);
    struct tensor expected_o = new_o(a, true, 0), expected_lse = new_lse(a, true, 0);
    for (int64_t s = 0; s + 1 < tensor_numel(&a->cu); s++) {
        int64_t first = (int64_t)ref_check_get(&a->cu, 0, s),
                last = (int64_t)ref_check_get(&a->cu, 0, s + 1);
        for (int64_t row = first; row < last; row++)
            for (int h = 0; h < a->n; h++) {
                double out[64];
                ref_check_set(&expected_lse, row, h,
                              naive_query(a, &qkv, h, first, last, row, out));
                for (int i = 0; i < a->d; i++)
                    ref_check_set(&expected_o, row, (int64_t)h * a->d + i, out[i]);
            }
    }
    attend(a, &qkv, &o, &lse);
    ref_check_near(&o, &expected_o, fp64 ? 1e-13 : 1e-5, "o");
    ref_check_near(&lse, &expected_lse, fp64 ? 1e-13 : 1e-5, "lse");
    ref_check_padding(&o, "o");
    ref_check_padding(&lse, "lse");
    struct tensor *all[] = { &qkv, &o, &lse, &expected_o, &expected_lse };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        ref_check_free(all[i]);
}

static void qkv_rows_are_grouped_per_kv_group_golden(void **state)
{
    /* one token, d = 1, n = 4, g = 2: columns q0 q1 k0 v0 q2 q3 k1 v1; one key, so o = v and lse =
     * q*k */
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct attention_context a = make_context(4, 2, 1, true, 1, (int[]){ 1 });
        struct tensor qkv = new_qkv(&a, fp64, 1, 1, 0), o = new_o(&a, fp64, 0),
                      lse = new_lse(&a, fp64, 0);
        ref_check_fill_values(&qkv, (double[]){ 2, 3, 5, 7, 11, 13, 17, 19 });
        attend(&a, &qkv, &o, &lse);
        static const double value[4] = { 7, 7, 19, 19 }, score[4] = { 10, 15, 187, 221 };
        for (int h = 0; h < 4; h++) {
            ref_check_value(ref_check_get(&o, 0, h), value[h], 0, "o is the group's value");
            ref_check_value(ref_check_get(&lse, 0, h), score[h], 0, "lse is the group's score");
        }
        ref_check_free(&qkv);
        ref_check_free(&o);
        ref_check_free(&lse);
        ref_check_free(&a.cu);
    }
}

static void equals_the_definition_on_ragged_batches(void **state)
{
    static const int length[6] = { 1, 0, 130, 37, 300, 128 };
    static const int heads[3][3] = { { 4, 2, 7 }, { 3, 3, 5 }, { 2, 1, 16 } }; /* n, g, d */
    for (int i = 0; i < 12; i++) {
        const int *h = heads[i / 4];
        struct attention_context a = make_context(h[0], h[1], h[2], i & 1, 6, length);
        against_definition(&a, i & 2, 2);
        ref_check_free(&a.cu);
    }
}

static void large_scores_stay_finite(void **state)
{
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct attention_context a = make_context(2, 1, 4, true, 2, (int[]){ 150, 17 });
        /* Scores reach 2e4: exp would overflow without the maximum. Multiples of 1/8, so that
         * products are exact in fp32. */
        struct tensor qkv = new_qkv(&a, fp64, 2, 128, 0), o = new_o(&a, fp64, 0),
                      lse = new_lse(&a, fp64, 0);
        struct tensor dout = new_o(&a, fp64, 0), dqkv = ref_check_like(&qkv, qkv.dtype);
        ref_check_fill(&dout, 1);
        attend(&a, &qkv, &o, &lse);
        attend_back(&a, &qkv, &o, &lse, &dout, &dqkv);
        REF_CHECK_EACH(&o, r, c)
        assert_true(fabs(ref_check_get(&o, r, c)) <= 128.001);
        REF_CHECK_EACH(&dqkv, r, c)
        assert_true(isfinite(ref_check_get(&dqkv, r, c)));
        struct tensor *all[] = { &qkv, &o, &lse, &dout, &dqkv, &a.cu };
        for (size_t i = 0; i < sizeof all / sizeof *all; i++)
            ref_check_free(all[i]);
    }
}

static void case_forward(bool fp64, const struct tensor *in, const struct tensor *out,
                         const void *context)
{
    attend(context, &in[0], &out[0], &out[1]);
}

static void case_backward(bool fp64, const struct tensor *in, const struct tensor *out,
                          const struct tensor *dout, const struct tensor *din, const void *context)
{
    attend_back(context, &in[0], &out[0], &out[1], dout, &din[0]);
}

static void check_gradient(struct attention_context a, uint64_t seed)
{
    struct ref_check_case c = { .name = "attention",
                                .n_in = 1,
                                .n_out = 2,
                                .n_weighted = 1,
                                .forward = case_forward,
                                .backward = case_backward,
                                .context = &a,
                                .in = { new_qkv(&a, true, seed, 1.5, 3) },
                                .out = { new_o(&a, true, 2), new_lse(&a, true, 1) } };
    ref_check_gradients(&c, seed);
    ref_check_case_free(&c);
    ref_check_free(&a.cu);
}

static void gradients_on_short_segments(void **state)
{
    static const int length[5] = { 5, 0, 1, 11, 2 };
    for (int causal = 0; causal < 2; causal++) {
        check_gradient(make_context(4, 2, 3, causal, 5, length), 31);
        check_gradient(make_context(3, 3, 5, causal, 5, length), 32);
        check_gradient(make_context(6, 1, 2, causal, 5, length), 33);
    }
}

static void gradients_across_tiles(void **state)
{
    static const int length[3] = { 131, 3, 270 };
    for (int causal = 0; causal < 2; causal++)
        check_gradient(make_context(2, 1, 3, causal, 3, length), 34);
}

/* Forward and backward of a batch; dqkv is new. */
struct result {
    struct tensor o, lse, dqkv;
};

static struct result both(const struct attention_context *a, const struct tensor *qkv,
                          const struct tensor *dout)
{
    bool fp64 = qkv->dtype == DTYPE_F64;
    struct result r = { new_o(a, fp64, 0), new_lse(a, fp64, 0), ref_check_like(qkv, qkv->dtype) };
    attend(a, qkv, &r.o, &r.lse);
    attend_back(a, qkv, &r.o, &r.lse, dout, &r.dqkv);
    return r;
}

static void result_free(struct result *r)
{
    ref_check_free(&r->o);
    ref_check_free(&r->lse);
    ref_check_free(&r->dqkv);
}

static struct tensor rows_from(const struct tensor *t, int64_t first, int64_t n)
{
    struct tensor view = *t;
    view.data = (char *)t->data + (size_t)(first * t->ld) * dtype_bytes(t->dtype);
    view.shape[0] = n;
    return view;
}

/* Rows [first, first+n) of both results are the same bits. */
static void same_rows(const struct result *a, const struct result *b, int64_t first_a,
                      int64_t first_b, int64_t n)
{
    const struct tensor *x[3] = { &a->o, &a->lse, &a->dqkv }, *y[3] = { &b->o, &b->lse, &b->dqkv };
    static const char *const name[3] = { "o", "lse", "dqkv" };
    for (int i = 0; i < 3; i++) {
        struct tensor p = rows_from(x[i], first_a, n), q = rows_from(y[i], first_b, n);
        ref_check_same(&p, &q, name[i]);
    }
}

static void m6_08_tiles_do_not_leak(void **state)
{
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct attention_context a = make_context(4, 4, 8, false, 3, (int[]){ 141, 70, 33 });
        struct tensor qkv = new_qkv(&a, fp64, 41, 1, 2), dout = new_o(&a, fp64, 0);
        struct ref_check_random rng = { 42 };
        ref_check_fill_random(&dout, &rng, -1, 1);
        struct result before = both(&a, &qkv, &dout);
        struct tensor second = rows_from(&qkv, 141, 70), d_second = rows_from(&dout, 141, 70);
        ref_check_fill_random(&second, &rng, -5, 5);
        ref_check_fill_random(&d_second, &rng, -5, 5);
        ref_check_set(&second, 3, 2 * 8, NAN); /* in the value of head 0: all of its outputs */
        struct result after = both(&a, &qkv, &dout);
        same_rows(&before, &after, 0, 0, 141);
        same_rows(&before, &after, 211, 211, 33);
        assert_true(isnan(ref_check_get(&after.o, 141, 0)));
        result_free(&before);
        result_free(&after);
        ref_check_free(&qkv);
        ref_check_free(&dout);
        ref_check_free(&a.cu);
    }
}

static void m6_10_packed_samples_equal_separate_runs(void **state)
{
    static const int length[2] = { 151, 64 };
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct attention_context a = make_context(4, 2, 8, true, 2, length);
        struct tensor qkv = new_qkv(&a, fp64, 51, 1, 0), dout = new_o(&a, fp64, 0);
        struct ref_check_random rng = { 52 };
        ref_check_fill_random(&dout, &rng, -1, 1);
        struct result packed = both(&a, &qkv, &dout);
        for (int i = 0, first = 0; i < 2; first += length[i++]) {
            struct attention_context one = make_context(4, 2, 8, true, 1, &length[i]);
            struct tensor part = rows_from(&qkv, first, length[i]),
                          d_part = rows_from(&dout, first, length[i]);
            struct result alone = both(&one, &part, &d_part);
            same_rows(&packed, &alone, first, 0, length[i]);
            result_free(&alone);
            ref_check_free(&one.cu);
        }
        /* Without the boundary the second sample must come out differently, or this test shows
         * nothing. */
        struct attention_context joined = make_context(4, 2, 8, true, 1, (int[]){ 215 });
        struct result wrong = both(&joined, &qkv, &dout);
        assert_true(ref_check_get(&wrong.o, 151, 0) != ref_check_get(&packed.o, 151, 0));
        result_free(&wrong);
        result_free(&packed);
        ref_check_free(&qkv);
        ref_check_free(&dout);
        ref_check_free(&a.cu);
        ref_check_free(&joined.cu);
    }
}

static void causal_outputs_ignore_later_tokens(void **state)
{
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct attention_context a = make_context(2, 1, 8, true, 1, (int[]){ 200 });
        struct tensor qkv = new_qkv(&a, fp64, 61, 1, 0), dout = new_o(&a, fp64, 0);
        struct ref_check_random rng = { 62 };
        ref_check_fill(&dout, 1);
        struct result before = both(&a, &qkv, &dout);
        struct tensor later = rows_from(&qkv, 140, 60);
        ref_check_fill_random(&later, &rng, -3, 3);
        struct result after = both(&a, &qkv, &dout);
        struct tensor p = rows_from(&before.o, 0, 140), q = rows_from(&after.o, 0, 140);
        ref_check_same(&p, &q, "o of earlier tokens");
        assert_true(ref_check_get(&before.o, 140, 0) != ref_check_get(&after.o, 140, 0));
        result_free(&before);
        result_free(&after);
        ref_check_free(&qkv);
        ref_check_free(&dout);
        ref_check_free(&a.cu);
    }
}

static void no_rows_and_no_segments_are_legal(void **state)
{
    for (int i = 0; i < 4; i++) {
        bool fp64 = i & 1;
        struct attention_context a = make_context(2, 1, 4, true, i & 2 ? 3 : 0, (int[]){ 0, 0, 0 });
        struct tensor qkv = new_qkv(&a, fp64, 1, 1, 0), dout = new_o(&a, fp64, 0);
        struct result r = both(&a, &qkv, &dout);
        result_free(&r);
        ref_check_free(&qkv);
        ref_check_free(&dout);
        ref_check_free(&a.cu);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(qkv_rows_are_grouped_per_kv_group_golden),
        cmocka_unit_test(equals_the_definition_on_ragged_batches),
        cmocka_unit_test(large_scores_stay_finite),
        cmocka_unit_test(gradients_on_short_segments),
        cmocka_unit_test(gradients_across_tiles),
        cmocka_unit_test(m6_08_tiles_do_not_leak),
        cmocka_unit_test(m6_10_packed_samples_equal_separate_runs),
        cmocka_unit_test(causal_outputs_ignore_later_tokens),
        cmocka_unit_test(no_rows_and_no_segments_are_legal),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
