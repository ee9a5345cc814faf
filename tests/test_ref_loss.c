/* test_ref_loss.c - vocabulary-parallel cross entropy of the reference backend (model.md 1.9). */
#include "ref_check.h"

static const enum dtype real_dtype[2] = { DTYPE_F32, DTYPE_F64 };

/* Everything a rank holds of T tokens. */
struct pieces {
    struct tensor mx, se, pl, loss, total, mask, labels;
};

static struct pieces pieces_new(bool fp64, int64_t tokens)
{
    enum dtype t = real_dtype[fp64];
    struct pieces p = { ref_check_vector(t, tokens),
                        ref_check_vector(t, tokens),
                        ref_check_vector(t, tokens),
                        ref_check_vector(t, tokens),
                        ref_check_vector(t, 1),
                        ref_check_vector(t, tokens),
                        ref_check_vector(DTYPE_I64, tokens) };
    ref_check_fill(&p.total, 0);
    ref_check_fill(&p.mask, 1);
    return p;
}

static void pieces_free(struct pieces *p)
{
    struct tensor *all[] = { &p->mx, &p->se, &p->pl, &p->loss, &p->total, &p->mask, &p->labels };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        ref_check_free(all[i]);
}

/* The three forward steps on one rank that holds the whole vocabulary. */
static void forward_all(bool fp64, const struct tensor *logits, const struct pieces *p)
{
    REF_CHECK_OP(fp64, loss_sum)(NULL, logits, &p->mx, &p->se);
    REF_CHECK_OP(fp64, loss_label)(NULL, logits, &p->labels, 0, &p->mx, &p->mx, &p->se, &p->pl);
    REF_CHECK_OP(fp64, loss_finish)(NULL, &p->se, &p->pl, &p->mask, &p->loss, &p->total);
}

static void cross_entropy_golden(void **state)
{
    for (int fp64 = 0; fp64 < 2; fp64++) {
        double tolerance = fp64 ? 1e-15 : 1e-7;
        struct pieces p = pieces_new(fp64, 1);
        struct tensor logits = ref_check_matrix(real_dtype[fp64], 1, 2, 0);
        ref_check_fill_values(&logits, (double[]){ 0, log(2) });
        ref_check_set(&p.labels, 0, 0, 0);
        forward_all(fp64, &logits, &p);
        ref_check_value(ref_check_get(&p.mx, 0, 0), log(2), tolerance, "mx");
        ref_check_value(ref_check_get(&p.loss, 0, 0), log(3), tolerance, "loss");
        ref_check_value(ref_check_get(&p.total, 0, 0), log(3), tolerance, "total");
        REF_CHECK_OP(fp64, loss_backward)(NULL, &p.labels, 0, &p.mx, &p.se, &p.mask, &logits);
        ref_check_value(ref_check_get(&logits, 0, 0), -2.0 / 3, tolerance, "dlogit 0");
        ref_check_value(ref_check_get(&logits, 0, 1), 2.0 / 3, tolerance, "dlogit 1");
        ref_check_free(&logits);
        pieces_free(&p);
    }
}

static void case_forward(bool fp64, const struct tensor *in, const struct tensor *out,
                         const void *context)
{
    struct pieces p = pieces_new(fp64, tensor_rows(&in[0]));
    ref_check_convert(context, &p.labels);
    forward_all(fp64, &in[0], &p);
    ref_check_convert(&p.loss, &out[0]);
    ref_check_convert(&p.mx, &out[1]);
    ref_check_convert(&p.se, &out[2]);
    pieces_free(&p);
}

/* The mask is dL/dloss of each token. */
static void case_backward(bool fp64, const struct tensor *in, const struct tensor *out,
                          const struct tensor *dout, const struct tensor *din, const void *context)
{
    ref_check_convert(&in[0], &din[0]);
    REF_CHECK_OP(fp64, loss_backward)(NULL, context, 0, &out[1], &out[2], &dout[0], &din[0]);
}

/* An ignored label has no place here: its loss is log(se), whose mx the gradient formula takes as a
 * constant; its mask is 0. */
static void gradient_of_logits(void **state)
{
    static const int64_t cols[3] = { 2, 17, 523 };
    for (int i = 0; i < 3; i++) {
        struct ref_check_random rng = { 1 };
        struct tensor labels = ref_check_vector(DTYPE_I64, 7);
        REF_CHECK_EACH(&labels, r, c)
        ref_check_set(&labels, r, c, (double)ref_check_index(&rng, cols[i]));
        struct ref_check_case c = { .name = "cross entropy",
                                    .n_in = 1,
                                    .n_out = 3,
                                    .n_weighted = 1,
                                    .forward = case_forward,
                                    .backward = case_backward,
                                    .context = &labels,
                                    .in = { ref_check_matrix(DTYPE_F64, 7, cols[i], 3) },
                                    .out = { ref_check_vector(DTYPE_F64, 7),
                                             ref_check_vector(DTYPE_F64, 7),
                                             ref_check_vector(DTYPE_F64, 7) } };
        ref_check_fill_random(&c.in[0], &rng, -2, 2);
        ref_check_gradients(&c, 71);
        ref_check_case_free(&c);
        ref_check_free(&labels);
    }
}

/* loss_sum and loss_label on vocabulary shards of `per` columns of the same buffer, reduced as the
 * caller does it, against one rank that holds all; then the gradient of the shards in place.
 * Labels: one of each shard, padded rows of the vocabulary, -100 and beyond. */
static void shards_against_whole(bool fp64, int64_t tokens, int64_t vocab, int64_t per)
{
    struct ref_check_random rng = { 2 };
    double tolerance = fp64 ? 1e-14 : 2e-6;
    struct pieces whole = pieces_new(fp64, tokens), shard = pieces_new(fp64, tokens),
                  sum = pieces_new(fp64, tokens);
    struct tensor logits = ref_check_matrix(real_dtype[fp64], tokens, vocab, 0),
                  parts = ref_check_like(&logits, logits.dtype);
    ref_check_fill_random(&logits, &rng, -4, 4);
    ref_check_convert(&logits, &parts);
    for (int64_t t = 0; t < tokens; t++) {
        ref_check_set(&whole.labels, 0, t,
                      t == 0   ? -100
                      : t == 1 ? (double)vocab
                               : (double)(t * per / 2 % vocab));
        ref_check_set(&whole.mask, 0, t, t < 2 ? 0 : 1);
    }
    forward_all(fp64, &logits, &whole);

    ref_check_fill(&sum.mx, -INFINITY);
    ref_check_fill(&sum.se, 0);
    ref_check_fill(&sum.pl, 0);
    for (int pass = 0; pass < 3; pass++)
        for (int64_t first = 0; first < vocab; first += per) {
            struct tensor view = parts;
            view.data = (char *)parts.data + (size_t)first * dtype_bytes(parts.dtype);
            view.shape[1] = vocab - first < per ? vocab - first : per;
            if (pass == 0)
                REF_CHECK_OP(fp64, loss_sum)(NULL, &view, &shard.mx, &shard.se);
            else if (pass == 1) { /* what pass 0 gave, of which the last shard's is left */
                REF_CHECK_OP(fp64, loss_sum)(NULL, &view, &shard.mx, &shard.se);
                REF_CHECK_OP(fp64, loss_label)
                (NULL, &view, &whole.labels, first, &shard.mx, &sum.mx, &shard.se, &shard.pl);
            } else
                REF_CHECK_OP(fp64, loss_backward)
            (NULL, &whole.labels, first, &sum.mx, &sum.se, &whole.mask, &view);
            for (int64_t t = 0; t < tokens && pass < 2; t++) {
                if (pass == 0)
                    ref_check_set(
                        &sum.mx, 0, t,
                        fmax(ref_check_get(&sum.mx, 0, t), ref_check_get(&shard.mx, 0, t)));
                else {
                    ref_check_set(&sum.se, 0, t,
                                  ref_check_get(&sum.se, 0, t) + ref_check_get(&shard.se, 0, t));
                    ref_check_set(&sum.pl, 0, t,
                                  ref_check_get(&sum.pl, 0, t) + ref_check_get(&shard.pl, 0, t));
                }
            }
        }
    REF_CHECK_OP(fp64, loss_finish)(NULL, &sum.se, &sum.pl, &whole.mask, &sum.loss, &sum.total);
    REF_CHECK_OP(fp64, loss_backward)
    (NULL, &whole.labels, 0, &whole.mx, &whole.se, &whole.mask, &logits);
    ref_check_same(&sum.mx, &whole.mx, "mx of shards");
    ref_check_near(&sum.se, &whole.se, tolerance, "se of shards");
    ref_check_near(&sum.loss, &whole.loss, tolerance, "loss of shards");
    ref_check_near(&sum.total, &whole.total, tolerance, "total of shards");
    ref_check_near(&parts, &logits, tolerance, "dlogits of shards");
    for (int64_t t = 0; t < 2 && t < tokens; t++) {
        assert_true(isfinite(ref_check_get(&whole.loss, 0, t)));
        ref_check_value(ref_check_get(&whole.pl, 0, t), 0, 0, "pl of an ignored label");
        ref_check_value(ref_check_get(&whole.loss, 0, t), log(ref_check_get(&whole.se, 0, t)), 1e-6,
                        "its loss is log(se)");
        for (int64_t v = 0; v < vocab; v++)
            ref_check_value(ref_check_get(&logits, t, v), 0, 0, "its gradient");
    }
    pieces_free(&whole);
    pieces_free(&shard);
    pieces_free(&sum);
    ref_check_free(&logits);
    ref_check_free(&parts);
}

static void m6_20_labels_of_every_shard_and_none(void **state)
{
    for (int fp64 = 0; fp64 < 2; fp64++) {
        shards_against_whole(fp64, 11, 512, 512);
        shards_against_whole(fp64, 11, 512, 256);
        shards_against_whole(fp64, 11, 512, 64);
        shards_against_whole(fp64, 13, 37, 5);
    }
}

static void m6_20_padded_vocabulary_rows_count_in_the_denominator(void **state)
{
    /* four equal logits, of which only three are real tokens: ln 4, not ln 3; the padded row gets a
     * gradient */
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct pieces p = pieces_new(fp64, 1);
        struct tensor logits = ref_check_matrix(real_dtype[fp64], 1, 4, 0);
        ref_check_fill(&logits, 1.5);
        ref_check_set(&p.labels, 0, 0, 2);
        forward_all(fp64, &logits, &p);
        ref_check_value(ref_check_get(&p.loss, 0, 0), log(4), 1e-7, "loss");
        REF_CHECK_OP(fp64, loss_backward)(NULL, &p.labels, 0, &p.mx, &p.se, &p.mask, &logits);
        ref_check_value(ref_check_get(&logits, 0, 3), 0.25, 0, "gradient of the padded row");
        ref_check_value(ref_check_get(&logits, 0, 2), -0.75, 0, "gradient of the label");
        ref_check_free(&logits);
        pieces_free(&p);
    }
}

static void m6_21_all_masked_gives_zero_and_no_nan(void **state)
{
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct ref_check_random rng = { 3 };
        struct pieces p = pieces_new(fp64, 5);
        struct tensor logits = ref_check_matrix(real_dtype[fp64], 5, 19, 2);
        ref_check_fill_random(&logits, &rng, -50, 50);
        ref_check_fill(&p.labels, -100);
        ref_check_fill(&p.mask, 0);
        forward_all(fp64, &logits, &p);
        ref_check_value(ref_check_get(&p.total, 0, 0), 0, 0, "total");
        REF_CHECK_OP(fp64, loss_backward)(NULL, &p.labels, 0, &p.mx, &p.se, &p.mask, &logits);
        REF_CHECK_EACH(&logits, r, c)
        ref_check_value(ref_check_get(&logits, r, c), 0, 0, "gradient");
        ref_check_padding(&logits, "logits");
        ref_check_free(&logits);
        pieces_free(&p);
    }
}

static void total_is_added_to_over_micro_batches(void **state)
{
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct pieces p = pieces_new(fp64, 3);
        ref_check_fill_values(&p.se, (double[]){ 1, exp(1), exp(2) });
        ref_check_fill_values(&p.pl, (double[]){ -0.5, 0, -0.25 });
        ref_check_fill_values(&p.mask, (double[]){ 1, 0, 1 });
        for (int i = 1; i < 4; i++) {
            REF_CHECK_OP(fp64, loss_finish)(NULL, &p.se, &p.pl, &p.mask, &p.loss, &p.total);
            ref_check_value(ref_check_get(&p.total, 0, 0), i * 2.75, fp64 ? 1e-15 : 2e-7, "total");
        }
        ref_check_value(ref_check_get(&p.loss, 0, 1), 1, fp64 ? 1e-15 : 2e-7,
                        "a masked token's loss is reported");
        pieces_free(&p);
    }
}

static void large_logits_stay_finite(void **state)
{
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct pieces p = pieces_new(fp64, 2);
        struct tensor logits = ref_check_matrix(real_dtype[fp64], 2, 9, 0);
        ref_check_fill(&logits, -30000);
        ref_check_set(&logits, 0, 8, 30000);
        ref_check_set(&p.labels, 0, 0, 0);
        ref_check_set(&p.labels, 0, 1, 4);
        forward_all(fp64, &logits, &p);
        ref_check_value(ref_check_get(&p.loss, 0, 0), 60000, 0, "loss of a hopeless token");
        ref_check_value(ref_check_get(&p.loss, 0, 1), log(9), 1e-6, "loss of equal logits");
        ref_check_free(&logits);
        pieces_free(&p);
    }
}

static void no_tokens_and_no_columns_are_legal(void **state)
{
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct pieces p = pieces_new(fp64, 0), q = pieces_new(fp64, 3);
        struct tensor logits = ref_check_matrix(real_dtype[fp64], 0, 9, 0),
                      empty = ref_check_matrix(real_dtype[fp64], 3, 0, 0);
        forward_all(fp64, &logits, &p);
        REF_CHECK_OP(fp64, loss_backward)(NULL, &p.labels, 0, &p.mx, &p.se, &p.mask, &logits);
        ref_check_value(ref_check_get(&p.total, 0, 0), 0, 0, "total of no tokens");
        REF_CHECK_OP(fp64, loss_sum)(NULL, &empty, &q.mx, &q.se);
        assert_true(ref_check_get(&q.mx, 0, 2) == -INFINITY && ref_check_get(&q.se, 0, 2) == 0);
        ref_check_fill(&q.labels, 1);
        ref_check_fill(&q.loss, 5);
        REF_CHECK_OP(fp64, loss_label)(NULL, &empty, &q.labels, 0, &q.mx, &q.loss, &q.se, &q.pl);
        assert_true(ref_check_get(&q.se, 0, 2) == 0 && ref_check_get(&q.pl, 0, 2) == 0);
        ref_check_free(&logits);
        ref_check_free(&empty);
        pieces_free(&p);
        pieces_free(&q);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(cross_entropy_golden),
        cmocka_unit_test(gradient_of_logits),
        cmocka_unit_test(m6_20_labels_of_every_shard_and_none),
        cmocka_unit_test(m6_20_padded_vocabulary_rows_count_in_the_denominator),
        cmocka_unit_test(m6_21_all_masked_gives_zero_and_no_nan),
        cmocka_unit_test(total_is_added_to_over_micro_batches),
        cmocka_unit_test(large_logits_stay_finite),
        cmocka_unit_test(no_tokens_and_no_columns_are_legal),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
