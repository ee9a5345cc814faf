/* test_ref_moe.c - the mixture-of-experts operations of the reference backend (src/ref/moe.c):
 * golden values of model.md 8, selection, balance, the sort of copies, grouped products, finite
 * differences.
 */
#include "ref_check.h"

static void fill_index(const struct tensor *t, const int *values)
{
    REF_CHECK_EACH(t, r, c)
    ref_check_set(t, r, c, *values++);
}

static int64_t index_at(const struct tensor *t, int64_t row, int64_t col)
{
    return (int64_t)ref_check_get(t, row, col);
}

/* ---- router ---------------------------------------------------------------------------------- */

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
        assert_int_equal(index_at(&r->expert, token, k), expected[k]);
}

static void check_row(const struct tensor *t, int64_t row, const double *expected, double tolerance,
                      const char *what)
{
    for (int64_t c = 0; c < tensor_cols(t); c++)
        ref_check_value(ref_check_get(t, row, c), expected[c], tolerance, what);
}

static void test_router_golden_m6_13_bias_selects(void **state)
{
    struct route r = route_new(1, 4, 2);
    ref_check_fill_values(&r.logits, (double[]){ 0, 1, -1, 2 });
    ref_check_fill_values(&r.bias, (double[]){ 0, 0, 5, 0 });
    ref_check_fill_values(&r.dprob, (double[]){ 1, 0 });
    route_forward(&r);
    check_row(&r.scores, 0, (double[]){ 0.5, 0.731059, 0.268941, 0.880797 }, 5e-7, "scores");
    check_choice(&r, 0, (int[]){ 2, 3 });
    check_row(&r.prob, 0, (double[]){ 0.584788240, 1.915211760 }, 1e-9, "prob");
    route_backward(&r, NULL, 0, 1);
    check_row(&r.dlogits, 0, (double[]){ 0, 0, 0.327512288, -0.053402590 }, 1e-9, "dlogits");
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
    check_row(&count, 0, (double[]){ 1, 2, 0, 1 }, 0, "count");
    check_row(&psum, 0,
              (double[]){ 0.210013699 + 0.365529289, 0.307064632 + 0.25, 0.112962765 + 0.25,
                          0.369958904 + 0.134470711 },
              2e-9, "psum");
    ref_router_balance_loss_f64(NULL, &count, &psum, 2, 2, &metric);
    ref_check_value(ref_check_get(&metric, 0, 0), 0.25 + 1.097050933, 1e-9, "metric adds up");
    route_backward(&r, &count, 1, 2);
    check_row(&r.dlogits, 0, (double[]){ -0.020382025, 0.066553001, -0.098611796, -0.008559928 },
              1e-9, "dlogits");
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
                int64_t e = index_at(&r.expert, t, k);
                assert_true(k == 0 || e > index_at(&r.expert, t, k - 1));
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
                double s = ref_check_get(&r.scores, t, index_at(&r.expert, t, k));
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
    fill_index(&r.expert, given);
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
        assert_int_equal(index_at(&count[0], 0, e) + index_at(&count[1], 0, e),
                         index_at(&count[2], 0, e));
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
        assert_int_equal(index_at(&n, 0, i), 0);
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
    assert_int_equal(index_at(&s->offsets, 0, 0), 0);
    assert_int_equal(index_at(&s->offsets, 0, experts), copies);
    int64_t dispatched = 0, row = 0;
    for (int64_t e = 0; e < experts; e++) {
        int64_t first = index_at(&s->offsets, 0, e), end = index_at(&s->offsets, 0, e + 1);
        assert_int_equal(index_at(&s->count, 0, e) - index_at(&before, 0, e), end - first);
        dispatched += end - first;
        /* the copies of e in order of token, one after the other */
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t k = 0; k < topk; k++)
                if (index_at(&s->expert, t, k) == e) {
                    assert_int_equal(index_at(&s->row_token, 0, row), t);
                    assert_int_equal(index_at(&s->token_row, t, k), row);
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
    fill_index(&s.expert, (int[]){ 1, 3, 0, 3, 1, 2, 0, 1 });
    sort_and_check(&s);
    static const int token[] = { 1, 3, 0, 2, 3, 2, 0, 1 }, offset[] = { 0, 2, 5, 6, 8 };
    for (int i = 0; i < 8; i++)
        assert_int_equal(index_at(&s.row_token, 0, i), token[i]);
    for (int i = 0; i < 5; i++)
        assert_int_equal(index_at(&s.offsets, 0, i), offset[i]);
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
    assert_int_equal(index_at(&one.count, 0, 3), 100);
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
    (NULL, BACKEND_GROUPED_NT, &in[0], &in[1], &g->offsets, g->max_rows, &out[0]);
}

static void grouped_backward(bool fp64, const struct tensor *in, const struct tensor *out,
                             const struct tensor *dout, const struct tensor *din,
                             const void *context)
{
    const struct grouped *g = context;
    REF_CHECK_OP(fp64, grouped_gemm)
    (NULL, BACKEND_GROUPED_NN, &dout[0], &in[1], &g->offsets, g->max_rows, &din[0]);
    REF_CHECK_OP(fp64, grouped_gemm)
    (NULL, BACKEND_GROUPED_TN, &dout[0], &in[0], &g->offsets, g->max_rows, &din[1]);
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
    fill_index(&g.offsets, offsets);
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
    fill_index(&offsets, (int[]){ 0, 2, 2, 4 });
    ref_check_fill(&w, 1);
    ref_check_fill(&dw, 10);
    for (int64_t r = 0; r < 4; r++)
        for (int64_t i = 0; i < 3; i++)
            ref_check_set(&a, r, i, 1);
    ref_grouped_gemm_f64(NULL, BACKEND_GROUPED_NT, &a, &w, &offsets, 6, &c);
    ref_grouped_gemm_f64(NULL, BACKEND_GROUPED_NN, &c, &w, &offsets, 6, &da);
    ref_grouped_gemm_f64(NULL, BACKEND_GROUPED_TN, &c, &a, &offsets, 6, &dw);
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
    check_row(&y, 0, (double[]){ 2, 0, 4.5 }, 0, "y");
    assert_true(ref_check_get(&y, 1, 0) == 0 && ref_check_get(&y, 1, 1) == 50 &&
                isnan(ref_check_get(&y, 1, 2)));
    ref_check_fill_values(&dh, (double[]){ 10, 20, 30, 1, 1, 1 });
    ref_expert_act_backward_f64(NULL, &h, &prob, &dh, &dh, &dprob, NULL);
    check_row(&dh, 0, (double[]){ 20, 0, 90 }, 0, "dh");
    assert_true(ref_check_get(&dprob, 0, 0) == 310 && isnan(ref_check_get(&dprob, 0, 1)));
    struct tensor *all[] = { &h, &prob, &dprob, &y, &dh };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        ref_check_free(all[i]);
}

/* ---- nothing --------------------------------------------------------------------------------- */

static void test_zero_rows_are_legal(void **state)
{
    struct route r = route_new(0, 4, 2);
    struct tensor count = ref_check_matrix(DTYPE_I64, 0, 4, 0),
                  psum = ref_check_matrix(DTYPE_F64, 0, 4, 0);
    struct tensor metric = ref_check_vector(DTYPE_F64, 1), h = ref_check_matrix(DTYPE_F64, 0, 3, 0);
    struct sorted s = sorted_new(0, 2, 4);
    struct tensor one = ref_check_matrix(DTYPE_I64, 1, 4, 0),
                  sum = ref_check_matrix(DTYPE_F64, 1, 4, 0);
    ref_check_fill(&metric, 7);
    route_forward(&r);
    ref_router_balance_f64(NULL, &r.scores, 2, 0, 5, &count, &psum);
    ref_router_balance_loss_f64(NULL, &count, &psum, 2, 5, &metric);
    route_backward(&r, &count, 1, 5);
    /* one sequence of no rows */
    ref_router_balance_f64(NULL, &r.scores, 2, 0, 0, &one, &sum);
    check_row(&one, 0, (double[]){ 0, 0, 0, 0 }, 0, "count");
    check_row(&sum, 0, (double[]){ 0, 0, 0, 0 }, 0, "psum");
    assert_true(ref_check_get(&metric, 0, 0) == 7);
    sort_and_check(&s);
    ref_expert_act_forward_f64(NULL, &h, &s.row_prob, &h);
    ref_expert_act_backward_f64(NULL, &h, &s.row_prob, &h, &h, &s.row_prob, NULL);
    grouped_check(2, (int[]){ 0, 0, 0 }, 3, 4);
    struct tensor *all[] = { &count, &psum, &metric, &h, &one, &sum };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        ref_check_free(all[i]);
    sorted_free(&s);
    route_free(&r);
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
        cmocka_unit_test(test_expert_bias_m6_16_sign_rule),
        cmocka_unit_test(test_sort_m6_19_order_and_inverse),
        cmocka_unit_test(test_sort_m6_17_no_token_dropped),
        cmocka_unit_test(test_grouped_gemm_values_and_gradients),
        cmocka_unit_test(test_grouped_gemm_m6_17_empty_experts),
        cmocka_unit_test(test_grouped_gemm_touches_only_owned_rows),
        cmocka_unit_test(test_expert_activation_m6_18_gradients),
        cmocka_unit_test(test_expert_activation_m6_18_prob_before_fc2),
        cmocka_unit_test(test_zero_rows_are_legal),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
