/* test_ref_moe.c - the experts of the reference backend (src/ref/moe.c): their bias, the sort of
 * copies, grouped products, activation: golden values of model.md 8, finite differences. The choice
 * of experts: test_ref_router.c.
 */
#include "ref_check.h"

/* ---- expert bias ----------------------------------------------------------------------------- */

static void check_bias(const double *count, const double *expected)
{
    struct tensor bias = ref_check_vector(DTYPE_F64, 3), n = ref_check_vector(DTYPE_I64, 3);
    ref_check_fill_values(&bias, (double[]){ 1, 2, 3 });
    for (int i = 0; i < 3; i++)
        ((int64_t *)n.data)[i] = (int64_t)count[i];
    ref_expert_bias_update_f64(NULL, 1e-3, &bias, &n);
    for (int i = 0; i < 3; i++) {
        ref_check_value(ref_check_get(&bias, 0, i), i + 1 + 1e-3 * expected[i], 1e-15, "bias");
        assert_int_equal(ref_check_int(&n, 0, i), 0);
    }
    ref_check_free(&bias);
    ref_check_free(&n);
}

static void test_expert_bias_m6_16_sign_rule(void **state)
{
    /* the mean itself: sign(0) = 0 */
    check_bias((double[]){ 1, 2, 3 }, (double[]){ 1, 0, -1 });
    check_bias((double[]){ 0, 0, 0 }, (double[]){ 0, 0, 0 });
    check_bias((double[]){ 7, 7, 7 }, (double[]){ 0, 0, 0 });
    check_bias((double[]){ 0, 0, 1 }, (double[]){ 1, 1, -1 }); /* mean 1/3 */
    check_bias((double[]){ 1e6, 0, 0 }, (double[]){ -1, 1, 1 });
    /* one token beside 3e16: a mean in fp64, let alone fp32, would not see it */
    check_bias((double[]){ 10000000000000000, 10000000000000002, 10000000000000000 },
               (double[]){ 1, -1, 1 });
}

/* ---- sort ------------------------------------------------------------------------------------ */

struct sorted {
    struct tensor expert, prob, offsets, row_token, row_prob, token_row, count;
};

static struct sorted sorted_new(int64_t tokens, int64_t topk, int64_t experts)
{
    struct sorted s = { .expert = ref_check_matrix(DTYPE_I32, tokens, topk, 0),
                        .prob = ref_check_matrix(DTYPE_F64, tokens, topk, 3),
                        .offsets = ref_check_vector(DTYPE_I32, experts + 1),
                        .row_token = ref_check_vector(DTYPE_I32, tokens * topk),
                        .row_prob = ref_check_vector(DTYPE_F64, tokens * topk),
                        .token_row = ref_check_matrix(DTYPE_I32, tokens, topk, 0),
                        .count = ref_check_vector(DTYPE_I64, experts) };
    struct ref_check_random rng = { 9 };
    ref_check_fill_random(&s.prob, &rng, 0.1, 2);
    ref_check_fill(&s.count, 0);
    return s;
}

static void sorted_free(struct sorted *s)
{
    struct tensor *all[] = { &s->expert,   &s->prob,      &s->offsets, &s->row_token,
                             &s->row_prob, &s->token_row, &s->count };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        ref_check_free(all[i]);
}

/* Sorts, and checks everything that must hold for any routing. */
static void sort_and_check(const struct sorted *s)
{
    const int64_t tokens = tensor_rows(&s->expert), topk = tensor_cols(&s->expert),
                  copies = tokens * topk;
    const int64_t experts = tensor_numel(&s->count);
    struct tensor dprob = ref_check_matrix(DTYPE_F64, tokens, topk, 1);
    struct tensor before = ref_check_like(&s->count, DTYPE_I64);
    ref_check_convert(&s->count, &before);
    ref_moe_sort_f64(NULL, &s->expert, &s->prob, &s->offsets, &s->row_token, &s->row_prob,
                     &s->token_row, &s->count);
    assert_int_equal(ref_check_int(&s->offsets, 0, 0), 0);
    assert_int_equal(ref_check_int(&s->offsets, 0, experts), copies);
    int64_t dispatched = 0, row = 0;
    for (int64_t e = 0; e < experts; e++) {
        int64_t first = ref_check_int(&s->offsets, 0, e),
                end = ref_check_int(&s->offsets, 0, e + 1);
        assert_int_equal(ref_check_int(&s->count, 0, e) - ref_check_int(&before, 0, e),
                         end - first);
        dispatched += end - first;
        /* the copies of e in order of token, one after the other */
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t k = 0; k < topk; k++)
                if (ref_check_int(&s->expert, t, k) == e) {
                    assert_int_equal(ref_check_int(&s->row_token, 0, row), t);
                    assert_int_equal(ref_check_int(&s->token_row, t, k), row);
                    assert_true(ref_check_get(&s->row_prob, 0, row) ==
                                ref_check_get(&s->prob, t, k));
                    row++;
                }
        assert_int_equal(row, end);
    }
    assert_int_equal(dispatched, copies);
    ref_moe_unsort_prob_f64(NULL, &s->row_prob, &s->token_row, &dprob);
    ref_check_same(&dprob, &s->prob, "the sort's inverse");
    ref_check_padding(&dprob, "dprob");
    ref_check_free(&dprob);
    ref_check_free(&before);
}

static void test_sort_m6_19_order_and_inverse(void **state)
{
    struct sorted s = sorted_new(4, 2, 4);
    ref_check_fill_ints(&s.expert, (int[]){ 1, 3, 0, 3, 1, 2, 0, 1 });
    sort_and_check(&s);
    static const int token[] = { 1, 3, 0, 2, 3, 2, 0, 1 }, offset[] = { 0, 2, 5, 6, 8 };
    for (int i = 0; i < 8; i++)
        assert_int_equal(ref_check_int(&s.row_token, 0, i), token[i]);
    for (int i = 0; i < 5; i++)
        assert_int_equal(ref_check_int(&s.offsets, 0, i), offset[i]);
    sorted_free(&s);
}

static void test_sort_m6_17_no_token_dropped(void **state)
{
    struct ref_check_random rng = { 10 };
    struct sorted one = sorted_new(50, 1, 5), s = sorted_new(70, 3, 9);
    /* all tokens to one expert, the others have none */
    ref_check_fill(&one.expert, 3);
    sort_and_check(&one);
    sort_and_check(&one); /* counts add up */
    assert_int_equal(ref_check_int(&one.count, 0, 3), 100);
    /* experts 0 and 8 have no token; choices ascending */
    for (int64_t t = 0; t < 70; t++) {
        int64_t first = 1 + ref_check_index(&rng, 3);
        for (int64_t k = 0; k < 3; k++)
            ref_check_set(&s.expert, t, k,
                          (double)(first + 2 * k - (k == 2 ? ref_check_index(&rng, 2) : 0)));
    }
    sort_and_check(&s);
    ref_moe_sort_f64(NULL, &s.expert, &s.prob, &s.offsets, &s.row_token, &s.row_prob, &s.token_row,
                     NULL);
    double total = 0;
    for (int64_t e = 0; e < 9; e++)
        total += ref_check_get(&s.count, 0, e);
    assert_true(total == 210); /* K*T, and not counted again */
    sorted_free(&one);
    sorted_free(&s);
}

/* ---- grouped products ------------------------------------------------------------------------ */

/* y = a w_e^T; the gradients are the other two modes. Rows behind offsets[E] belong to nobody. */
struct grouped {
    struct tensor offsets;
    int64_t max_rows;
};

static void grouped_forward(bool fp64, const struct tensor *in, const struct tensor *out,
                            const void *context)
{
    const struct grouped *g = context;
    REF_CHECK_OP(fp64, grouped_gemm)
    (NULL, BACKEND_GROUPED_NT, &in[0], &in[1], &g->offsets, g->max_rows, 0.0, &out[0]);
}

static void grouped_backward(bool fp64, const struct tensor *in, const struct tensor *out,
                             const struct tensor *dout, const struct tensor *din,
                             const void *context)
{
    const struct grouped *g = context;
    REF_CHECK_OP(fp64, grouped_gemm)
    (NULL, BACKEND_GROUPED_NN, &dout[0], &in[1], &g->offsets, g->max_rows, 0.0, &din[0]);
    REF_CHECK_OP(fp64, grouped_gemm)
    (NULL, BACKEND_GROUPED_TN, &dout[0], &in[0], &g->offsets, g->max_rows, 1.0, &din[1]);
}

static void grouped_check(int experts, const int *offsets, int64_t n_out, int64_t n_in)
{
    const int64_t rows = offsets[experts];
    struct grouped g = { ref_check_vector(DTYPE_I32, experts + 1), rows };
    struct ref_check_random rng = { 4 };
    struct ref_check_case c = { .name = "grouped gemm",
                                .n_in = 2,
                                .n_out = 1,
                                .n_weighted = 1,
                                .accumulates = 2,
                                .forward = grouped_forward,
                                .backward = grouped_backward,
                                .context = &g };
    ref_check_fill_ints(&g.offsets, offsets);
    c.in[0] = ref_check_matrix(DTYPE_F64, rows, n_in, 5);
    c.in[1] = ref_check_new(DTYPE_F64, 3, (int64_t[]){ experts, n_out, n_in }, 0);
    c.out[0] = ref_check_matrix(DTYPE_F64, rows, n_out, 2);
    ref_check_fill_random(&c.in[0], &rng, -1, 1);
    ref_check_fill_random(&c.in[1], &rng, -1, 1);
    ref_check_gradients(&c, 5);
    ref_check_forward(&c, true, c.in, c.out);
    for (int e = 0; e < experts; e++)
        for (int64_t r = offsets[e]; r < offsets[e + 1]; r++)
            for (int64_t o = 0; o < n_out; o++) {
                double sum = 0;
                for (int64_t i = 0; i < n_in; i++)
                    sum +=
                        ref_check_get(&c.in[0], r, i) * ref_check_get(&c.in[1], e * n_out + o, i);
                ref_check_value(ref_check_get(&c.out[0], r, o), sum, 1e-13, "product");
            }
    ref_check_case_free(&c);
    ref_check_free(&g.offsets);
}

static void test_grouped_gemm_values_and_gradients(void **state)
{
    grouped_check(3, (int[]){ 0, 4, 5, 12 }, 7, 9);
}

static void test_grouped_gemm_m6_17_empty_experts(void **state)
{
    grouped_check(4, (int[]){ 0, 0, 11, 11, 11 }, 5, 6); /* all rows to one */
    grouped_check(5, (int[]){ 0, 3, 3, 3, 8, 8 }, 3, 2);
    grouped_check(3, (int[]){ 0, 0, 0, 1 }, 1, 1);
}

/* max_rows may exceed offsets[E]: rows in between are neither read nor written, and an expert
 * without rows adds nothing. */
static void test_grouped_gemm_touches_only_owned_rows(void **state)
{
    struct tensor offsets = ref_check_vector(DTYPE_I32, 4),
                  a = ref_check_matrix(DTYPE_F64, 6, 3, 0);
    struct tensor w = ref_check_new(DTYPE_F64, 3, (int64_t[]){ 3, 2, 3 }, 0),
                  dw = ref_check_like(&w, DTYPE_F64);
    struct tensor c = ref_check_matrix(DTYPE_F64, 6, 2, 0), da = ref_check_like(&a, DTYPE_F64);
    ref_check_fill_ints(&offsets, (int[]){ 0, 2, 2, 4 });
    ref_check_fill(&w, 1);
    ref_check_fill(&dw, 10);
    for (int64_t r = 0; r < 4; r++)
        for (int64_t i = 0; i < 3; i++)
            ref_check_set(&a, r, i, 1);
    ref_grouped_gemm_f64(NULL, BACKEND_GROUPED_NT, &a, &w, &offsets, 6, 0.0, &c);
    ref_grouped_gemm_f64(NULL, BACKEND_GROUPED_NN, &c, &w, &offsets, 6, 0.0, &da);
    ref_grouped_gemm_f64(NULL, BACKEND_GROUPED_TN, &c, &a, &offsets, 6, 1.0, &dw);
    for (int64_t r = 0; r < 6; r++) {
        for (int64_t i = 0; i < 2; i++)
            assert_true(r < 4 ? ref_check_get(&c, r, i) == 3 : isnan(ref_check_get(&c, r, i)));
        for (int64_t i = 0; i < 3; i++)
            assert_true(r < 4 ? ref_check_get(&da, r, i) == 6 : isnan(ref_check_get(&da, r, i)));
    }
    for (int64_t e = 0; e < 3; e++)
        for (int64_t r = 0; r < 2; r++)
            for (int64_t i = 0; i < 3; i++)
                assert_true(ref_check_get(&dw, 2 * e + r, i) == (e == 1 ? 10 : 16));
    /* Without a sum so far nothing of the memory is left, of an expert without rows neither. */
    ref_check_fill(&dw, NAN);
    ref_grouped_gemm_f64(NULL, BACKEND_GROUPED_TN, &c, &a, &offsets, 6, 0.0, &dw);
    for (int64_t e = 0; e < 3; e++)
        for (int64_t r = 0; r < 2; r++)
            for (int64_t i = 0; i < 3; i++)
                assert_true(ref_check_get(&dw, 2 * e + r, i) == (e == 1 ? 0 : 6));
    struct tensor *all[] = { &offsets, &a, &w, &dw, &c, &da };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        ref_check_free(all[i]);
}

/* ---- activation ------------------------------------------------------------------------------ */

static void act_forward(bool fp64, const struct tensor *in, const struct tensor *out,
                        const void *context)
{
    REF_CHECK_OP(fp64, expert_act_forward)(NULL, &in[0], &in[1], &out[0]);
}

/* context not NULL: dh takes the place of dy, and the activation comes once more. */
static void act_backward(bool fp64, const struct tensor *in, const struct tensor *out,
                         const struct tensor *dout, const struct tensor *din, const void *context)
{
    const struct tensor *dy = &dout[0];
    if (context == NULL) {
        REF_CHECK_OP(fp64, expert_act_backward)(NULL, &in[0], &in[1], dy, &din[0], &din[1], NULL);
        return;
    }
    struct tensor once = ref_check_like(&in[0], in[0].dtype),
                  again = ref_check_like(&in[0], in[0].dtype);
    ref_check_convert(dy, &din[0]);
    REF_CHECK_OP(fp64, expert_act_backward)
    (NULL, &in[0], &in[1], &din[0], &din[0], &din[1], &again);
    REF_CHECK_OP(fp64, expert_act_forward)(NULL, &in[0], &in[1], &once);
    REF_CHECK_EACH(&once, r, i)
    assert_true(ref_check_get(&once, r, i) == ref_check_get(&again, r, i));
    ref_check_free(&once);
    ref_check_free(&again);
}

static void test_expert_activation_m6_18_gradients(void **state)
{
    for (int64_t cols = 5; cols < 700; cols += 311)
        for (int in_place = 0; in_place < 2; in_place++) {
            struct ref_check_random rng = { 12 };
            struct ref_check_case c = { .name = "expert activation",
                                        .n_in = 2,
                                        .n_out = 1,
                                        .n_weighted = 1,
                                        .forward = act_forward,
                                        .backward = act_backward,
                                        .step = 1e-5,
                                        .context = in_place ? &rng : NULL };
            c.in[0] = ref_check_matrix(DTYPE_F64, 6, cols, 3);
            c.in[1] = ref_check_vector(DTYPE_F64, 6);
            c.out[0] = ref_check_matrix(DTYPE_F64, 6, cols, 0);
            ref_check_fill_random(&c.in[0], &rng, -1, 1);
            REF_CHECK_EACH(&c.in[0], r, i) /* away from the kink */
            ref_check_set(&c.in[0], r, i,
                          ref_check_get(&c.in[0], r, i) +
                              (ref_check_get(&c.in[0], r, i) < 0 ? -0.25 : 0.25));
            ref_check_fill_random(&c.in[1], &rng, 0.1, 2);
            ref_check_gradients(&c, 6);
            ref_check_case_free(&c);
        }
}

/* The activation carries the probability before fc2, and dprob is the sum of relu(h)^2 dy. */
static void test_expert_activation_m6_18_prob_before_fc2(void **state)
{
    struct tensor h = ref_check_matrix(DTYPE_F64, 2, 3, 0), prob = ref_check_vector(DTYPE_F64, 2);
    struct tensor y = ref_check_like(&h, DTYPE_F64), dh = ref_check_like(&h, DTYPE_F64);
    struct tensor dprob = ref_check_like(&prob, DTYPE_F64);
    ref_check_fill_values(&h, (double[]){ 2, -1, 3, -4, 5, NAN });
    ref_check_fill_values(&prob, (double[]){ 0.5, 2 });
    ref_expert_act_forward_f64(NULL, &h, &prob, &y);
    ref_check_row(&y, 0, (double[]){ 2, 0, 4.5 }, 0, "y");
    assert_true(ref_check_get(&y, 1, 0) == 0 && ref_check_get(&y, 1, 1) == 50 &&
                isnan(ref_check_get(&y, 1, 2)));
    ref_check_fill_values(&dh, (double[]){ 10, 20, 30, 1, 1, 1 });
    ref_expert_act_backward_f64(NULL, &h, &prob, &dh, &dh, &dprob, NULL);
    ref_check_row(&dh, 0, (double[]){ 20, 0, 90 }, 0, "dh");
    assert_true(ref_check_get(&dprob, 0, 0) == 310 && isnan(ref_check_get(&dprob, 0, 1)));
    struct tensor *all[] = { &h, &prob, &dprob, &y, &dh };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        ref_check_free(all[i]);
}

/* ---- nothing --------------------------------------------------------------------------------- */

static void test_zero_copies_are_legal(void **state)
{
    struct tensor h = ref_check_matrix(DTYPE_F64, 0, 3, 0);
    struct sorted s = sorted_new(0, 2, 4);
    sort_and_check(&s);
    ref_expert_act_forward_f64(NULL, &h, &s.row_prob, &h);
    ref_expert_act_backward_f64(NULL, &h, &s.row_prob, &h, &h, &s.row_prob, NULL);
    grouped_check(2, (int[]){ 0, 0, 0 }, 3, 4);
    ref_check_free(&h);
    sorted_free(&s);
}

/* Two ranks, six experts; rank 1 owns 3, 4, 5. Rank 0 sends 2, 0, 1 rows for them, rank 1 has 1, 2,
 * 0. */
static void dispatch_order_by_hand(void **state)
{
    int32_t all[2][7] = { { 0, 4, 4, 5, 7, 7, 8 }, { 0, 0, 3, 3, 4, 6, 6 } }, offsets[4], order[6],
            inverse[6];
    const int32_t want_order[6] = { 0, 1, 3, 4, 5, 2 }, want_inverse[6] = { 0, 1, 5, 2, 3, 4 },
                  want_offsets[4] = { 0, 3, 5, 6 };
    const struct tensor from = tensor_2d(all, DTYPE_I32, PLACE_DEVICE, 2, 7),
                        start = tensor_1d(offsets, DTYPE_I32, PLACE_DEVICE, 4);
    for (int64_t most = 6; most >= 4; most -= 2) { /* and without room for the last two */
        const struct tensor there = tensor_1d(order, DTYPE_I32, PLACE_DEVICE, most),
                            back = tensor_1d(inverse, DTYPE_I32, PLACE_DEVICE, most);
        memset(order, -1, sizeof order);
        memset(inverse, -1, sizeof inverse);
        ref_dispatch_order_f64(NULL, &from, 3, &start, &there, &back);
        assert_memory_equal(offsets, want_offsets, sizeof offsets);
        assert_memory_equal(order, want_order, (size_t)most * sizeof *order);
        assert_memory_equal(inverse, want_inverse, (size_t)most * sizeof *inverse);
        for (int64_t i = most; i < 6; i++)
            assert_true(order[i] == -1 && inverse[i] == -1);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(dispatch_order_by_hand),
        cmocka_unit_test(test_expert_bias_m6_16_sign_rule),
        cmocka_unit_test(test_sort_m6_19_order_and_inverse),
        cmocka_unit_test(test_sort_m6_17_no_token_dropped),
        cmocka_unit_test(test_grouped_gemm_values_and_gradients),
        cmocka_unit_test(test_grouped_gemm_m6_17_empty_experts),
        cmocka_unit_test(test_grouped_gemm_touches_only_owned_rows),
        cmocka_unit_test(test_expert_activation_m6_18_gradients),
        cmocka_unit_test(test_expert_activation_m6_18_prob_before_fc2),
        cmocka_unit_test(test_zero_copies_are_legal),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
