/* test_ref_router.c - the choice of experts of the reference backend (src/ref/moe.c): golden values
 * of model.md 8, selection, probabilities, balance, finite differences. The rest of the layer:
 * test_ref_moe.c.
 */
#include "ref_check.h"

/* One micro-batch of B sequences of S tokens, in fp64. */
struct route {
    int64_t tokens, experts, topk;
    struct tensor logits, bias, scores, expert, prob, dprob, dlogits;
};

static struct route route_new(int64_t tokens, int64_t experts, int64_t topk)
{
    struct route r = { .tokens = tokens, .experts = experts, .topk = topk };
    r.logits = ref_check_matrix(DTYPE_F64, tokens, experts, 3);
    r.bias = ref_check_vector(DTYPE_F64, experts);
    r.scores = ref_check_matrix(DTYPE_F64, tokens, experts, 0);
    r.expert = ref_check_matrix(DTYPE_I32, tokens, topk, 0);
    r.prob = ref_check_matrix(DTYPE_F64, tokens, topk, 0);
    r.dprob = ref_check_matrix(DTYPE_F64, tokens, topk, 2);
    r.dlogits = ref_check_matrix(DTYPE_F64, tokens, experts, 1);
    ref_check_fill(&r.bias, 0);
    return r;
}

static void route_free(struct route *r)
{
    struct tensor *all[] = { &r->logits, &r->bias,  &r->scores, &r->expert,
                             &r->prob,   &r->dprob, &r->dlogits };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        ref_check_free(all[i]);
}

static void route_forward(const struct route *r)
{
    ref_router_forward_f64(NULL, &r->logits, &r->bias, 2.5, false, &r->scores, &r->expert,
                           &r->prob);
}

static void route_backward(const struct route *r, const struct tensor *count, double coeff,
                           int64_t seq_len)
{
    ref_router_backward_f64(NULL, &r->scores, &r->expert, &r->prob, &r->dprob, 2.5, count, coeff, 0,
                            seq_len, &r->dlogits);
}

static void check_choice(const struct route *r, int64_t token, const int *expected)
{
    for (int64_t k = 0; k < r->topk; k++)
        assert_int_equal(ref_check_int(&r->expert, token, k), expected[k]);
}

static void test_router_golden_m6_13_bias_selects(void **state)
{
    struct route r = route_new(1, 4, 2);
    ref_check_fill_values(&r.logits, (double[]){ 0, 1, -1, 2 });
    ref_check_fill_values(&r.bias, (double[]){ 0, 0, 5, 0 });
    ref_check_fill_values(&r.dprob, (double[]){ 1, 0 });
    route_forward(&r);
    ref_check_row(&r.scores, 0, (double[]){ 0.5, 0.731059, 0.268941, 0.880797 }, 5e-7, "scores");
    check_choice(&r, 0, (int[]){ 2, 3 });
    ref_check_row(&r.prob, 0, (double[]){ 0.584788240, 1.915211760 }, 1e-9, "prob");
    route_backward(&r, NULL, 0, 1);
    ref_check_row(&r.dlogits, 0, (double[]){ 0, 0, 0.327512288, -0.053402590 }, 1e-9, "dlogits");
    route_free(&r);
}

static void test_balance_golden_m6_13_map_ignores_bias(void **state)
{
    struct route r = route_new(2, 4, 2);
    struct tensor count = ref_check_matrix(DTYPE_I64, 1, 4, 0),
                  psum = ref_check_matrix(DTYPE_F64, 1, 4, 0);
    struct tensor metric = ref_check_vector(DTYPE_F64, 1);
    ref_check_fill_values(&r.logits, (double[]){ 0, 1, -1, 2, 1, 0, 0, -1 });
    ref_check_fill_values(&r.bias, (double[]){ 0, 0, 5, 0 });
    ref_check_fill(&r.dprob, 0);
    ref_check_fill(&metric, 0.25);
    route_forward(&r);
    ref_router_balance_f64(NULL, &r.scores, 2, 0, 2, &count, &psum);
    ref_check_row(&count, 0, (double[]){ 1, 2, 0, 1 }, 0, "count");
    ref_check_row(&psum, 0,
                  (double[]){ 0.210013699 + 0.365529289, 0.307064632 + 0.25, 0.112962765 + 0.25,
                              0.369958904 + 0.134470711 },
                  2e-9, "psum");
    ref_router_balance_loss_f64(NULL, &count, &psum, 2, 2, &metric);
    ref_check_value(ref_check_get(&metric, 0, 0), 0.25 + 1.097050933, 1e-9, "metric adds up");
    route_backward(&r, &count, 1, 2);
    ref_check_row(&r.dlogits, 0,
                  (double[]){ -0.020382025, 0.066553001, -0.098611796, -0.008559928 }, 1e-9,
                  "dlogits");
    ref_check_free(&count);
    ref_check_free(&psum);
    ref_check_free(&metric);
    route_free(&r);
}

static void test_router_m6_13_ties_take_the_lower_index(void **state)
{
    struct route r = route_new(3, 6, 3);
    ref_check_fill_values(&r.logits,
                          (double[]){ 1, 1, 1, 1, 1, 1, 0, 2, 1, 1, 2, 1, -1, -2, 3, -1, -1, -1 });
    route_forward(&r);
    check_choice(&r, 0, (int[]){ 0, 1, 2 });
    check_choice(&r, 1, (int[]){ 1, 2, 4 });
    check_choice(&r, 2, (int[]){ 0, 2, 3 });
    ref_check_set(&r.bias, 0, 5, 1e-3); /* breaks the tie */
    route_forward(&r);
    check_choice(&r, 0, (int[]){ 0, 1, 5 });
    route_free(&r);
}

/* Probabilities of the chosen sum to 2.5 and follow from the scores alone, whatever the bias
 * chose. */
static void test_router_m6_13_bias_changes_selection_not_probs(void **state)
{
    struct route r = route_new(40, 16, 5);
    struct ref_check_random rng = { 3 };
    ref_check_fill_random(&r.logits, &rng, -3, 3);
    int64_t moved = 0;
    for (int pass = 0; pass < 2; pass++) {
        if (pass == 1)
            ref_check_fill_random(&r.bias, &rng, -1, 1);
        route_forward(&r);
        for (int64_t t = 0; t < r.tokens; t++) {
            double sum = 0, total = 0, worst = INFINITY;
            for (int64_t k = 0; k < r.topk; k++) {
                int64_t e = ref_check_int(&r.expert, t, k);
                assert_true(k == 0 || e > ref_check_int(&r.expert, t, k - 1));
                sum += ref_check_get(&r.scores, t, e);
                total += ref_check_get(&r.prob, t, k);
                worst = fmin(worst, ref_check_get(&r.scores, t, e) + ref_check_get(&r.bias, 0, e));
            }
            ref_check_value(total, 2.5, 1e-14, "sum of probabilities");
            int64_t above = 0, above_unbiased = 0;
            for (int64_t e = 0; e < r.experts; e++)
                above += ref_check_get(&r.scores, t, e) + ref_check_get(&r.bias, 0, e) >= worst;
            assert_int_equal(above, r.topk);
            for (int64_t k = 0; k < r.topk; k++) {
                double s = ref_check_get(&r.scores, t, ref_check_int(&r.expert, t, k));
                ref_check_value(ref_check_get(&r.prob, t, k), 2.5 * s / sum, 1e-14, "probability");
                for (int64_t e = 0; e < r.experts; e++)
                    above_unbiased += ref_check_get(&r.scores, t, e) > s;
            }
            moved += above_unbiased != r.topk * (r.topk - 1) / 2;
        }
        assert_true(pass == 0 ? moved == 0 : moved > 10);
    }
    struct tensor other = ref_check_like(&r.prob, DTYPE_F64),
                  choice = ref_check_like(&r.expert, DTYPE_I32);
    ref_check_fill(&r.bias, 0);
    route_forward(&r);
    ref_router_forward_f64(NULL, &r.logits, NULL, 2.5, false, &r.scores, &choice, &other);
    ref_check_same(&other, &r.prob, "no bias is a bias of zero");
    ref_check_same(&choice, &r.expert, "no bias is a bias of zero");
    ref_check_free(&other);
    ref_check_free(&choice);
    route_free(&r);
}

/* A given choice stays as it is, whatever the scores and the bias; its probabilities are the
 * normalised scores of the given experts. */
static void test_router_given_choice(void **state)
{
    static const int given[] = { 0, 3, 1, 2, 0, 1 };
    struct route r = route_new(3, 4, 2);
    REF_CHECK_EACH(&r.logits, t, e)
    ref_check_set(&r.logits, t, e, 0.5 * (double)e - 0.25 * (double)t);
    ref_check_set(&r.bias, 0, 3, 5.0);
    ref_check_fill_ints(&r.expert, given);
    ref_router_forward_f64(NULL, &r.logits, &r.bias, 2.5, true, &r.scores, &r.expert, &r.prob);
    for (int64_t t = 0; t < 3; t++) {
        double score[2];
        check_choice(&r, t, given + 2 * t);
        for (int64_t k = 0; k < 2; k++)
            score[k] = 1 / (1 + exp(-(0.5 * given[2 * t + k] - 0.25 * (double)t)));
        for (int64_t k = 0; k < 2; k++)
            assert_true(fabs(ref_check_get(&r.prob, t, k) -
                             2.5 * score[k] / (score[0] + score[1])) < 1e-14);
    }
    route_free(&r);
}

/* Scores at 0 and 1: nothing but finite numbers. */
static void test_router_saturated_scores_stay_finite(void **state)
{
    struct route r = route_new(2, 4, 2);
    struct tensor count = ref_check_matrix(DTYPE_I64, 1, 4, 0),
                  psum = ref_check_matrix(DTYPE_F64, 1, 4, 0);
    ref_check_fill_values(&r.logits, (double[]){ -800, -800, -800, -800, 800, 800, -800, 0 });
    ref_check_fill(&r.dprob, 1);
    route_forward(&r);
    check_choice(&r, 1, (int[]){ 0, 1 });
    ref_router_balance_f64(NULL, &r.scores, 2, 0, 2, &count, &psum);
    route_backward(&r, &count, 1e-4, 2);
    for (int64_t t = 0; t < 2; t++) {
        for (int64_t e = 0; e < 4; e++)
            assert_true(isfinite(ref_check_get(&r.dlogits, t, e)) &&
                        isfinite(ref_check_get(&psum, 0, e)));
        for (int64_t k = 0; k < 2; k++)
            assert_true(isfinite(ref_check_get(&r.prob, t, k)));
    }
    ref_check_free(&count);
    ref_check_free(&psum);
    route_free(&r);
}

/* A NaN neither breaks the choice nor stays unseen. */
static void test_router_nan_is_chosen_and_shows(void **state)
{
    struct route r = route_new(2, 5, 3);
    ref_check_fill_values(&r.logits, (double[]){ 1, 2, NAN, 3, 4, NAN, NAN, NAN, NAN, NAN });
    route_forward(&r);
    check_choice(&r, 0, (int[]){ 2, 3, 4 });
    check_choice(&r, 1, (int[]){ 0, 1, 2 });
    for (int64_t t = 0; t < 2; t++)
        for (int64_t k = 0; k < 3; k++)
            assert_true(isnan(ref_check_get(&r.prob, t, k)));
    route_free(&r);
}

struct balance {
    struct tensor bias, expert, count;
    int64_t seq_len;
    double coeff;
};

/* L = sum w prob + u sum_b,e (coeff E/(K S) count) psum with the counts held; the choice must not
 * change. */
static void router_forward(bool fp64, const struct tensor *in, const struct tensor *out,
                           const void *context)
{
    const struct balance *b = context;
    const enum dtype dtype = fp64 ? DTYPE_F64 : DTYPE_F32;
    const int64_t experts = tensor_cols(&in[0]), topk = tensor_cols(&out[0]),
                  sequences = tensor_rows(&b->count);
    struct tensor bias = ref_check_like(&b->bias, dtype),
                  expert = ref_check_like(&b->expert, DTYPE_I32);
    struct tensor psum = ref_check_matrix(dtype, sequences, experts, 1),
                  count = ref_check_like(&b->count, DTYPE_I64);
    ref_check_convert(&b->bias, &bias);
    REF_CHECK_OP(fp64, router_forward)(NULL, &in[0], &bias, 2.5, false, &out[2], &expert, &out[0]);
    REF_CHECK_OP(fp64, router_balance)(NULL, &out[2], (int)topk, 0, b->seq_len, &count, &psum);
    ref_check_same(&expert, &b->expert, "the choice changed");
    ref_check_same(&count, &b->count, "the map changed");
    double sum = 0;
    for (int64_t i = 0; i < sequences; i++)
        for (int64_t e = 0; e < experts; e++)
            sum += ref_check_get(&count, i, e) * ref_check_get(&psum, i, e);
    ref_check_set(&out[1], 0, 0, sum * b->coeff * (double)experts / (double)(topk * b->seq_len));
    ref_check_free(&bias);
    ref_check_free(&expert);
    ref_check_free(&count);
    ref_check_free(&psum);
}

static void router_backward(bool fp64, const struct tensor *in, const struct tensor *out,
                            const struct tensor *dout, const struct tensor *din,
                            const void *context)
{
    const struct balance *b = context;
    const double coeff = b->coeff * ref_check_get(&dout[1], 0, 0);
    REF_CHECK_OP(fp64, router_backward)
    (NULL, &out[2], &b->expert, &out[0], &dout[0], 2.5, coeff == 0 ? NULL : &b->count, coeff, 0,
     b->seq_len, &din[0]);
}

static void test_router_gradients_with_balance(void **state)
{
    for (int variant = 0; variant < 3; variant++) {
        const int64_t experts = variant == 2 ? 300 : 8, topk = variant == 2 ? 6 : 2, sequences = 3,
                      length = 7;
        const int64_t tokens = sequences * length;
        struct balance b = { .seq_len = length, .coeff = variant == 0 ? 0 : 0.7 };
        struct ref_check_random rng = { 7 + (uint64_t)variant };
        struct ref_check_case c = { .name = "router",
                                    .n_in = 1,
                                    .n_out = 3,
                                    .n_weighted = 2,
                                    .forward = router_forward,
                                    .backward = router_backward,
                                    .context = &b,
                                    .step = 1e-4 };
        c.in[0] = ref_check_matrix(DTYPE_F64, tokens, experts, 2);
        c.out[0] = ref_check_matrix(DTYPE_F64, tokens, topk, 0);
        c.out[1] = ref_check_vector(DTYPE_F64, 1);
        c.out[2] = ref_check_matrix(DTYPE_F64, tokens, experts, 4);
        b.bias = ref_check_vector(DTYPE_F64, experts);
        b.expert = ref_check_matrix(DTYPE_I32, tokens, topk, 0);
        b.count = ref_check_matrix(DTYPE_I64, sequences, experts, 0);
        struct tensor psum = ref_check_matrix(DTYPE_F64, sequences, experts, 0);
        ref_check_fill_random(&b.bias, &rng, -0.3, 0.3);
        /* Distinct logits: scores differ by more than any step of the finite differences. */
        REF_CHECK_EACH(&c.in[0], r, e)
        ref_check_set(&c.in[0], r, e,
                      (float)(-2 + 4.0 * (double)((e * 7 + r * 5) % experts) / (double)experts));
        ref_router_forward_f64(NULL, &c.in[0], &b.bias, 2.5, false, &c.out[2], &b.expert,
                               &c.out[0]);
        ref_router_balance_f64(NULL, &c.out[2], (int)topk, 0, length, &b.count, &psum);
        ref_check_gradients(&c, 17 + (uint64_t)variant);
        ref_check_case_free(&c);
        ref_check_free(&b.bias);
        ref_check_free(&b.expert);
        ref_check_free(&b.count);
        ref_check_free(&psum);
    }
}

/* E = 4, K = 2, S = 4; token t prefers t and t+1: every expert is in two maps and has the same sum
 * of normalised scores. */
static void test_balance_m6_14_metric_is_one_at_perfect_balance(void **state)
{
    struct route r = route_new(4, 4, 2);
    struct tensor count = ref_check_matrix(DTYPE_I64, 1, 4, 0),
                  psum = ref_check_matrix(DTYPE_F64, 1, 4, 0);
    struct tensor metric = ref_check_vector(DTYPE_F64, 1);
    REF_CHECK_EACH(&r.logits, t, e)
    ref_check_set(&r.logits, t, e, e == t || e == (t + 1) % 4 ? 1 : -1);
    ref_check_fill(&metric, 0);
    route_forward(&r);
    ref_router_balance_f64(NULL, &r.scores, 2, 0, 4, &count, &psum);
    ref_router_balance_loss_f64(NULL, &count, &psum, 2, 4, &metric);
    ref_check_value(ref_check_get(&metric, 0, 0), 1, 1e-14, "metric");
    ref_check_free(&count);
    ref_check_free(&psum);
    ref_check_free(&metric);
    route_free(&r);
}

/* The same sequence B times: the metric and the gradient of a row do not depend on B. */
static void test_balance_m6_14_independent_of_batch(void **state)
{
    enum { S = 6, E = 8, K = 3 };
    double metric[2], row[E];
    for (int64_t batch = 1; batch <= 3; batch += 2) {
        struct route r = route_new(batch * S, E, K);
        struct tensor count = ref_check_matrix(DTYPE_I64, batch, E, 0),
                      psum = ref_check_matrix(DTYPE_F64, batch, E, 2);
        struct tensor total = ref_check_vector(DTYPE_F64, 1);
        for (int64_t b = 0; b < batch; b++) {
            struct ref_check_random rng = { 5 };
            struct tensor part = tensor_row_range(&r.logits, b * S, S);
            ref_check_fill_random(&part, &rng, -2, 2);
        }
        ref_check_fill(&r.dprob, 0);
        ref_check_fill(&total, 0);
        route_forward(&r);
        ref_router_balance_f64(NULL, &r.scores, K, 0, S, &count, &psum);
        ref_router_balance_loss_f64(NULL, &count, &psum, K, S, &total);
        route_backward(&r, &count, 0.5, S);
        metric[batch > 1] = ref_check_get(&total, 0, 0);
        for (int64_t e = 0; e < E; e++) {
            if (batch == 1)
                row[e] = ref_check_get(&r.dlogits, S - 1, e);
            else
                assert_true(row[e] != 0 && ref_check_get(&r.dlogits, batch * S - 1, e) == row[e]);
        }
        ref_check_free(&count);
        ref_check_free(&psum);
        ref_check_free(&total);
        route_free(&r);
    }
    ref_check_value(metric[1], metric[0], 1e-14, "metric");
}

/* The rows of a sequence on two ranks: counts added, full length given; partial metrics add up,
 * gradients agree to the bit. */
static void test_balance_m6_14_independent_of_sequence_split(void **state)
{
    enum { S = 8, E = 8, K = 2 };
    struct route r = route_new(S, E, K);
    struct ref_check_random rng = { 6 };
    struct tensor count[3], psum[3], metric[2];
    for (int i = 0; i < 3; i++) {
        count[i] = ref_check_matrix(DTYPE_I64, 1, E, 0);
        psum[i] = ref_check_matrix(DTYPE_F64, 1, E, 0);
    }
    for (int i = 0; i < 2; i++) {
        metric[i] = ref_check_vector(DTYPE_F64, 1);
        ref_check_fill(&metric[i], 0);
    }
    ref_check_fill_random(&r.logits, &rng, -2, 2);
    ref_check_fill_random(&r.dprob, &rng, -1, 1);
    route_forward(&r);
    ref_router_balance_f64(NULL, &r.scores, K, 0, S, &count[2], &psum[2]);
    ref_router_balance_loss_f64(NULL, &count[2], &psum[2], K, S, &metric[1]);
    route_backward(&r, &count[2], 0.5, S);
    for (int i = 0; i < 2; i++) {
        struct tensor part = tensor_row_range(&r.scores, i * S / 2, S / 2);
        ref_router_balance_f64(NULL, &part, K, i * S / 2, S, &count[i], &psum[i]);
    }
    for (int64_t e = 0; e < E; e++)
        assert_int_equal(ref_check_int(&count[0], 0, e) + ref_check_int(&count[1], 0, e),
                         ref_check_int(&count[2], 0, e));
    for (int i = 0; i < 2; i++) {
        int64_t first = i * S / 2;
        struct tensor scores = tensor_row_range(&r.scores, first, S / 2),
                      expert = tensor_row_range(&r.expert, first, S / 2);
        struct tensor prob = tensor_row_range(&r.prob, first, S / 2),
                      dprob = tensor_row_range(&r.dprob, first, S / 2);
        struct tensor whole = tensor_row_range(&r.dlogits, first, S / 2),
                      own = ref_check_like(&whole, DTYPE_F64);
        ref_router_balance_loss_f64(NULL, &count[2], &psum[i], K, S, &metric[0]);
        ref_router_backward_f64(NULL, &scores, &expert, &prob, &dprob, 2.5, &count[2], 0.5, first,
                                S, &own);
        ref_check_same(&own, &whole, "dlogits");
        ref_check_free(&own);
    }
    ref_check_value(ref_check_get(&metric[0], 0, 0), ref_check_get(&metric[1], 0, 0), 1e-14,
                    "metric");
    for (int i = 0; i < 3; i++) {
        ref_check_free(&count[i]);
        ref_check_free(&psum[i]);
    }
    ref_check_free(&metric[0]);
    ref_check_free(&metric[1]);
    route_free(&r);
}

static void test_zero_rows_are_legal(void **state)
{
    struct route r = route_new(0, 4, 2);
    struct tensor count = ref_check_matrix(DTYPE_I64, 0, 4, 0),
                  psum = ref_check_matrix(DTYPE_F64, 0, 4, 0);
    struct tensor metric = ref_check_vector(DTYPE_F64, 1);
    struct tensor one = ref_check_matrix(DTYPE_I64, 1, 4, 0),
                  sum = ref_check_matrix(DTYPE_F64, 1, 4, 0);
    ref_check_fill(&metric, 7);
    route_forward(&r);
    ref_router_balance_f64(NULL, &r.scores, 2, 0, 5, &count, &psum);
    ref_router_balance_loss_f64(NULL, &count, &psum, 2, 5, &metric);
    route_backward(&r, &count, 1, 5);
    /* one sequence of no rows */
    ref_router_balance_f64(NULL, &r.scores, 2, 0, 0, &one, &sum);
    ref_check_row(&one, 0, (double[]){ 0, 0, 0, 0 }, 0, "count");
    ref_check_row(&sum, 0, (double[]){ 0, 0, 0, 0 }, 0, "psum");
    assert_true(ref_check_get(&metric, 0, 0) == 7);
    struct tensor *all[] = { &count, &psum, &metric, &one, &sum };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        ref_check_free(all[i]);
    route_free(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_router_golden_m6_13_bias_selects),
        cmocka_unit_test(test_balance_golden_m6_13_map_ignores_bias),
        cmocka_unit_test(test_router_m6_13_ties_take_the_lower_index),
        cmocka_unit_test(test_router_m6_13_bias_changes_selection_not_probs),
        cmocka_unit_test(test_router_given_choice),
        cmocka_unit_test(test_router_saturated_scores_stay_finite),
        cmocka_unit_test(test_router_nan_is_chosen_and_shows),
        cmocka_unit_test(test_router_gradients_with_balance),
        cmocka_unit_test(test_balance_m6_14_metric_is_one_at_perfect_balance),
        cmocka_unit_test(test_balance_m6_14_independent_of_batch),
        cmocka_unit_test(test_balance_m6_14_independent_of_sequence_split),
        cmocka_unit_test(test_zero_rows_are_legal),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
