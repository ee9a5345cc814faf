/* test_model_start.c - the model before any training: counts of parameters and operations, initial
 * values, what is decayed, the initial loss. */
#include "model_fixture.h"
#include "model_flops.h"
#include "rng.h"

static void open_deck(struct deck *deck, const char *text)
{
    struct errors e = { 0 };
    deck_read(deck, "test", text, strlen(text), 0, NULL, &e);
    deck_resolve(deck, 1, &e);
    /* features that this binary refuses are refused elsewhere; the sizes are what is tested here */
    errors_free(&e);
}

static void check_counts(const char *language, const char *vision, int64_t lm, int64_t active,
                         int64_t active_no_embedding, int64_t vit, int64_t projector)
{
    char text[512];
    struct deck deck;
    snprintf(
        text, sizeof text,
        "&run train_iters = 1 /\n&language preset = '%s' /\n&vision preset = '%s' /\n&lr lr = 1e-3 /\n",
        language, vision);
    open_deck(&deck, text);
    const struct model_counts c = model_count(&deck);
    assert_int_equal(c.language, lm);
    assert_int_equal(c.language_active, active);
    assert_int_equal(c.language_active_no_embedding, active_no_embedding);
    if (vit > 0)
        assert_int_equal(c.vision, vit);
    assert_int_equal(c.projector, projector);
    assert_int_equal(c.total, c.language + c.vision + c.projector);
    deck_free(&deck);
}

static void m6_37_counts_of_the_presets(void **state)
{
    check_counts("nemotron_20l", "radio_vit_h", 11515677504, 1777290048, 1424968512, 651645440,
                 13762560);
    check_counts("nemotron_54l", "radio_vit_h", 31657765568, 3659901632, 3307580096, 651648000,
                 13762560);
    check_counts("tiny", "tiny", 208752, 159600, 126832, 26944, 8192);
}

static void count_of_the_released_52_layer_model(void **state)
{
    struct deck deck;
    open_deck(&deck,
              "&run train_iters = 1 /\n&language preset = 'nemotron3_nano' /\n&lr lr = 1e-3 /\n");
    assert_int_equal(model_count(&deck).language, 31577937344);
    assert_int_equal(deck.derived.num_layers, 52);
    deck_free(&deck);
}

static void two_kv_groups_change_the_count(void **state)
{
    struct deck deck;
    open_deck(
        &deck,
        "&run train_iters = 1 /\n&language preset = 'nemotron_20l' num_query_groups = 2 /\n&lr lr = 1e-3 /\n");
    assert_int_equal(model_count(&deck).language, 11503291200);
    deck_free(&deck);
}

static void mlp_projector_counts(void **state)
{
    struct deck deck;
    open_deck(
        &deck,
        "&run train_iters = 1 /\n&projector vision_projection_type = 'mlp' projection_normalization = 'rmsnorm' /\n"
        "&lr lr = 1e-3 /\n");
    assert_int_equal(model_count(&deck).projector, 159912960);
    deck_free(&deck);
}

/* model.md 5: forward GFLOP per token at S = 8192, and the encoder's per tile. */
static void flops_per_token_of_the_presets(void **state)
{
    struct deck deck;
    open_deck(&deck,
              "&run train_iters = 1 /\n&language preset = 'nemotron_20l' /\n&lr lr = 1e-3 /\n");
    const double s = 8192.0;
    assert_true(fabs(model_flops_language_megatron(&deck, 1.0, s) / 3.2742e9 - 1.0) < 2e-5);
    assert_true(fabs(model_flops_language_exact(&deck, 1.0, s) / 3.0758e9 - 1.0) < 2e-5);
    assert_true(fabs(model_flops_encoder_tile(&deck, 1024.0) / 1.475e12 - 1.0) < 5e-4);
    assert_true(fabs(model_flops_encoder_tile(&deck, 16384.0) / 64.68e12 - 1.0) < 5e-4);
    assert_true(model_flops_projector_row(&deck) == 2.0 * 5120.0 * 2688.0);
    deck_free(&deck);
    open_deck(&deck,
              "&run train_iters = 1 /\n&language preset = 'nemotron_54l' /\n&lr lr = 1e-3 /\n");
    assert_true(fabs(model_flops_language_megatron(&deck, 1.0, s) / 7.7199e9 - 1.0) < 2e-5);
    assert_true(fabs(model_flops_language_exact(&deck, 1.0, s) / 7.2147e9 - 1.0) < 2e-5);
    deck_free(&deck);
}

/* Initial values depend on seed, name and element only: recomputed here one by one. */
static void p12_18_initial_values_are_functions_of_name_and_index(void **state)
{
    struct fixture f;
    fixture_open(&f, 0, NULL);
    const struct param *p =
        model_find_param(&f.model, MODEL_LANGUAGE, "decoder.layers.0.mixer.out_proj.weight");
    const struct rng_key key = rng_key(7, "init:language.decoder.layers.0.mixer.out_proj.weight");
    const double so = 0.0173 / sqrt(6.0);
    for (int64_t i = 0; i < tensor_numel(&p->value); i++)
        assert_true(element(&p->value, i) == (double)(float)(so * rng_normal_at(key, (uint64_t)i)));
    /* No generator has a state: a second pass, or numbers drawn in between, change nothing. */
    const float first = (float)element(&p->value, 0);
    rng_normal_at(key, 12345);
    memset(p->value.data, 0, (size_t)tensor_numel(&p->value) * sizeof(float));
    model_initialise(&f.model);
    assert_true((float)element(&p->value, 0) == first && first != 0.0f);
    double sum = 0.0, sum2 = 0.0;
    const struct param *e =
        model_find_param(&f.model, MODEL_LANGUAGE, "embedding.word_embeddings.weight");
    const int64_t n = tensor_numel(&e->value);
    for (int64_t i = 0; i < n; i++) {
        sum += element(&e->value, i);
        sum2 += element(&e->value, i) * element(&e->value, i);
    }
    assert_true(fabs(sum / (double)n) < 5.0 * 0.0173 / sqrt((double)n));
    assert_true(fabs(sqrt(sum2 / (double)n) / 0.0173 - 1.0) < 0.02);
    const struct param *a =
        model_find_param(&f.model, MODEL_LANGUAGE, "decoder.layers.0.mixer.A_log");
    const struct param *dt =
        model_find_param(&f.model, MODEL_LANGUAGE, "decoder.layers.0.mixer.dt_bias");
    for (int64_t i = 0; i < tensor_numel(&a->value); i++) {
        assert_in_range((int64_t)(1e6 * element(&a->value, i)), 0, (int64_t)(1e6 * log(16.0)) + 1);
        const double softplus = log1p(exp(element(&dt->value, i)));
        assert_true(softplus > 0.00099 && softplus < 0.1001);
    }
    fixture_close(&f);
}

static void fp64_starts_from_the_widened_fp32_values(void **state)
{
    static const char *const o[] = { "run.precision=fp64" };
    struct fixture f, g;
    fixture_open(&f, 0, NULL);
    fixture_open(&g, 1, o);
    assert_int_equal(f.model.n_params, g.model.n_params);
    for (int i = 0; i < f.model.n_params; i++)
        for (int64_t k = 0; k < tensor_numel(&f.model.param[i].value); k++)
            assert_true(element(&f.model.param[i].value, k) == element(&g.model.param[i].value, k));
    fixture_close(&f);
    fixture_close(&g);
}

static void m6_38_weight_decay_set(void **state)
{
    struct fixture f;
    fixture_open(&f, 0, NULL);
    for (int i = 0; i < f.model.n_params; i++) {
        const struct param *p = &f.model.param[i];
        const size_t n = strlen(p->name);
        const bool bias = n >= 5 && strcmp(p->name + n - 5, ".bias") == 0;
        assert_int_equal(p->decay, p->ndim > 1 && !bias);
    }
    assert_true(
        model_find_param(&f.model, MODEL_LANGUAGE, "decoder.layers.0.mixer.conv1d_weight")->decay);
    assert_true(model_find_param(&f.model, MODEL_VISION, "class_token")->decay);
    assert_true(model_find_param(&f.model, MODEL_VISION, "position_embeddings")->decay);
    assert_false(model_find_param(&f.model, MODEL_LANGUAGE, "decoder.layers.0.mixer.D")->decay);
    fixture_close(&f);
}

/* model.md 6.27: ln 512 + sigma^2 H / 2 = 6.248 for the tiny model. */
static void m6_27_initial_loss_of_the_tiny_model(void **state)
{
    static const char *const o[] = { "batch.micro_batch_size=8", "batch.global_batch_size=8" };
    struct fixture f;
    fixture_open(&f, 2, o);
    fixture_batch(&f, 0, 0);
    fixture_forward(&f, false);
    const int64_t t = f.text.samples * f.text.seq_length;
    double *lse = xcalloc((size_t)t, sizeof *lse), mean = 0.0;
    model_token_lse(&f.model, lse);
    for (int64_t i = 0; i < t; i++)
        mean += lse[i] / (double)t;
    assert_true(fabs(mean - (log(512.0) + 0.0173 * 0.0173 * 64.0 / 2.0)) < 5e-3);
    free(lse);
    fixture_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(m6_37_counts_of_the_presets),
        cmocka_unit_test(count_of_the_released_52_layer_model),
        cmocka_unit_test(two_kv_groups_change_the_count),
        cmocka_unit_test(mlp_projector_counts),
        cmocka_unit_test(flops_per_token_of_the_presets),
        cmocka_unit_test(p12_18_initial_values_are_functions_of_name_and_index),
        cmocka_unit_test(fp64_starts_from_the_widened_fp32_values),
        cmocka_unit_test(m6_38_weight_decay_set),
        cmocka_unit_test(m6_27_initial_loss_of_the_tiny_model),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
