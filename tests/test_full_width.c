/* test_full_width.c - the initial loss at the production width (model.md 6.27): H = 2688, V =
 * 131072, sigma 0.0173, pattern M*-, S = 64.
 *
 * With random weights the logits are nearly normal with variance sigma^2 H, so the mean log-sum-exp
 * over the tokens is ln V + sigma^2 H / 2 = 12.186; the loss itself scatters around it by the logit
 * of each label. Forward only: needs 3.2 GB.
 */
#include "model_fixture.h"

static void m6_27_log_sum_exp_at_full_width(void **state)
{
    static const char *const o[] = {
        "language.preset=nemotron_20l", "language.hybrid_layer_pattern=M*-",
        "language.seq_length=64",       "vision.preset=tiny",
        "data.mock_text_only_every=1",  "data.image_seq_length=28",
        "data.num_image_tiles=2",       "stage.training_stage=1",
        "batch.micro_batch_size=1",     "batch.global_batch_size=1"
    };
    struct fixture f;
    fixture_open(&f, (int)(sizeof o / sizeof o[0]), o);
    assert_int_equal(f.deck.language.hidden_size, 2688);
    assert_int_equal(f.deck.derived.padded_vocab, 131072);
    fixture_batch(&f, 0, 0);
    const double loss = fixture_forward(&f, false) / (double)f.text.loss_tokens;
    const int64_t t = f.text.seq_length;
    double *lse = xcalloc((size_t)t, sizeof *lse), mean = 0.0;
    model_token_lse(&f.model, lse);
    for (int64_t i = 0; i < t; i++)
        mean += lse[i] / (double)t;
    printf("# mean log-sum-exp %.6f, loss %.6f over %d tokens\n", mean, loss,
           (int)f.text.loss_tokens);
    assert_true(fabs(mean - 12.186) < 0.01);
    assert_true(fabs(loss - mean) < 3.0 * 0.9 / sqrt((double)f.text.loss_tokens));
    free(lse);
    fixture_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(m6_27_log_sum_exp_at_full_width) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
