/* test_model.c - the assembled model: masks, freezing, text-only batches, determinism. What it is
 * before any training: test_model_start.c. */
#include "child.h"
#include "ddp.h"
#include "model_fixture.h"
#include "rng.h"

static void m6_21_all_masked_microbatch_has_zero_language_gradient(void **state)
{
    static const char *const o[] = { "moe.moe_router_load_balancing_type=none" };
    struct fixture f;
    fixture_open(&f, 1, o);
    fixture_batch(&f, 0, 0);
    for (int64_t i = 0; i < f.text.samples * f.text.seq_length; i++) {
        f.text.loss_mask[i] = 0.0f;
        f.text.labels[i] = -100;
    }
    assert_true(fixture_forward(&f, true) == 0.0);
    model_zero_grads(&f.model);
    fixture_backward(&f);
    for (int i = 0; i < f.model.n_params; i++)
        for (int64_t k = 0; f.model.param[i].trainable && k < tensor_numel(&f.model.param[i].grad);
             k++)
            assert_true(element(&f.model.param[i].grad, k) == 0.0);
    fixture_close(&f);
}

static void m6_20_ignored_label_gives_a_finite_loss(void **state)
{
    struct fixture f;
    fixture_open(&f, 0, NULL);
    fixture_batch(&f, 0, 0);
    fixture_forward(&f, true);
    const struct tensor loss = model_token_loss(&f.model);
    for (int64_t i = 0; i < tensor_numel(&loss); i++)
        assert_true(isfinite(element(&loss, i)));
    fixture_close(&f);
}

/* Gradients of two micro-batches accumulate: g(a) then g(b) equals g(a) + g(b). */
static void gradients_accumulate_over_microbatches(void **state)
{
    static const char *const o[] = { "run.precision=fp64", "batch.global_batch_size=4" };
    struct fixture f;
    fixture_open(&f, 2, o);
    const struct param *p =
        model_find_param(&f.model, MODEL_LANGUAGE, "decoder.layers.2.mixer.in_proj.weight");
    const int64_t n = tensor_numel(&p->grad);
    double *sum = xcalloc((size_t)n, sizeof *sum), scale = 0.0;
    for (int m = 0; m < 2; m++) {
        f.data.position[0] = f.data.position[f.data.n_streams - 1] = 0;
        fixture_batch(&f, 0, m);
        fixture_forward(&f, true);
        model_zero_grads(&f.model);
        fixture_backward(&f);
        for (int64_t i = 0; i < n; i++)
            sum[i] += element(&p->grad, i);
    }
    model_zero_grads(&f.model);
    for (int m = 0; m < 2; m++) {
        f.data.position[0] = f.data.position[f.data.n_streams - 1] = 0;
        fixture_batch(&f, 0, m);
        fixture_forward(&f, true);
        fixture_backward(&f);
    }
    for (int64_t i = 0; i < n; i++)
        scale = fmax(scale, fabs(sum[i]));
    assert_true(scale > 0.0);
    for (int64_t i = 0; i < n; i++)
        assert_true(fabs(sum[i] - element(&p->grad, i)) <= 1e-13 * scale);
    free(sum);
    fixture_close(&f);
}

/* What an iteration begins with instead of zeros: after any history two micro-batches leave the
 * same gradients, of experts without tokens, of a frozen and of an idle encoder as well. */
static void gradients_need_no_clearing_where_products_overwrite_them(void **state)
{
    static const char *const o[] = { "batch.global_batch_size=4", "data.mock_text_only_every=1",
                                     "moe.num_experts=128", "moe.moe_router_topk=1" };
    struct fixture f;
    char *cleared = NULL;
    fixture_open(&f, 4, o);
    for (int begun = 0; begun < 2; begun++) {
        if (begun)
            model_begin_grads(&f.model);
        else
            model_zero_grads(&f.model);
        int left = 0;
        for (int i = 0; i < f.model.n_params; i++) {
            struct param *p = &f.model.param[i];
            if (p->fresh)
                memset(p->grad.data, 0xff,
                       (size_t)tensor_numel(&p->grad) * dtype_bytes(p->grad.dtype));
            left += p->fresh;
        }
        assert_int_equal(left > 0, begun);
        for (int m = 0; m < 2; m++) {
            f.data.position[0] = f.data.position[f.data.n_streams - 1] = 0;
            fixture_batch(&f, 0, m);
            fixture_forward(&f, true);
            fixture_backward(&f);
        }
        for (int language = 0; language < 2; language++)
            ddp_reduce(f.model.ddp, language);
        const struct tensor grads[] = { model_grad_buffer(&f.model, false),
                                        model_grad_buffer(&f.model, true) };
        const size_t bytes =
            (size_t)(tensor_numel(&grads[0]) + tensor_numel(&grads[1])) * dtype_bytes(f.model.acc);
        char *all = xcalloc(bytes, 1);
        memcpy(all, grads[0].data, (size_t)tensor_numel(&grads[0]) * dtype_bytes(f.model.acc));
        memcpy(all + (size_t)tensor_numel(&grads[0]) * dtype_bytes(f.model.acc), grads[1].data,
               (size_t)tensor_numel(&grads[1]) * dtype_bytes(f.model.acc));
        for (int i = 0; i < f.model.n_params; i++)
            assert_false(f.model.param[i].fresh);
        if (begun)
            assert_memory_equal(cleared, all, bytes);
        free(cleared);
        cleared = all;
    }
    free(cleared);
    fixture_close(&f);
}

/* Gradients of the whole model in one flat copy, owned by the caller. */
static double *gradients(struct fixture *f, int64_t *n)
{
    *n = 0;
    for (int i = 0; i < f->model.n_params; i++)
        *n += f->model.param[i].trainable ? tensor_numel(&f->model.param[i].grad) : 0;
    double *g = xcalloc((size_t)*n, sizeof *g);
    int64_t at = 0;
    for (int i = 0; i < f->model.n_params; i++)
        for (int64_t k = 0;
             f->model.param[i].trainable && k < tensor_numel(&f->model.param[i].grad); k++)
            g[at++] = element(&f->model.param[i].grad, k);
    return g;
}

static double *gradients_of_batch(struct fixture *f, int64_t *n)
{
    fixture_forward(f, true);
    model_zero_grads(&f->model);
    fixture_backward(f);
    return gradients(f, n);
}

static void assert_sum(const double *whole, const double *a, const double *b, int64_t n)
{
    double scale = 0.0;
    for (int64_t i = 0; i < n; i++)
        scale = fmax(scale, fabs(whole[i]));
    assert_true(scale > 0.0);
    for (int64_t i = 0; i < n; i++)
        assert_true(fabs(whole[i] - (a[i] + b[i])) <= 1e-12 * scale);
}

/* The auxiliary gradient does not see the mask: with half the tokens masked it is what it is with
 * none left, so that after the division by the loss tokens its weight is (tokens)/(loss tokens). */
static void m6_15_p12_59_auxiliary_gradient_is_that_of_all_tokens(void **state)
{
    static const char *const with[] = { "run.precision=fp64", "moe.moe_aux_loss_coeff=0.05" };
    static const char *const without[] = { "run.precision=fp64", "moe.moe_aux_loss_coeff=0" };
    struct fixture f, g;
    int64_t n;
    fixture_open(&f, 2, with);
    fixture_open(&g, 2, without);
    fixture_batch(&f, 0, 0);
    fixture_batch(&g, 0, 0);
    for (int64_t i = 0; i < f.text.samples * f.text.seq_length; i += 2)
        f.text.loss_mask[i] = g.text.loss_mask[i] = 0.0f;
    double *both = gradients_of_batch(&f, &n), *loss = gradients_of_batch(&g, &n);
    for (int64_t i = 0; i < f.text.samples * f.text.seq_length; i++)
        f.text.loss_mask[i] = 0.0f;
    double *aux = gradients_of_batch(&f, &n);
    assert_sum(both, loss, aux, n);
    free(both);
    free(loss);
    free(aux);
    fixture_close(&f);
    fixture_close(&g);
}

/* Loss sums, not means: two samples together give the sum of what each gives alone, however unequal
 * their numbers of loss tokens. */
static void m6_22_gradients_do_not_depend_on_the_split_into_microbatches(void **state)
{
    static const char *const two[] = { "run.precision=fp64" };
    static const char *const one[] = { "run.precision=fp64", "batch.micro_batch_size=1" };
    struct fixture f, g;
    int64_t n;
    fixture_open(&f, 1, two);
    fixture_open(&g, 2, one);
    fixture_batch(&f, 0, 0);
    for (int64_t i = 0; i < 50; i++)
        f.text.loss_mask[i] = 0.0f;
    double *whole = gradients_of_batch(&f, &n), *part[2];
    for (int m = 0; m < 2; m++) {
        fixture_batch(&g, 0, m);
        assert_int_equal(g.text.sample_index[0], f.text.sample_index[m]);
        memcpy(g.text.loss_mask, f.text.loss_mask + m * g.text.seq_length,
               (size_t)g.text.seq_length * sizeof(float));
        part[m] = gradients_of_batch(&g, &n);
    }
    assert_sum(whole, part[0], part[1], n);
    free(whole);
    free(part[0]);
    free(part[1]);
    fixture_close(&f);
    fixture_close(&g);
}

/* The job ends with one line that names both counts. */
/* A forward pass with no picture embeddings at all. */
static void forward_without_pictures(void *fixture)
{
    struct fixture *f = fixture;
    const struct tensor none =
        tensor_2d(NULL, f->model.act, PLACE_DEVICE, 0, f->deck.language.hidden_size);
    model_language_forward(&f->model, 0, &f->text, &none, true);
}

static void m6_32_p12_32_36_embeddings_that_do_not_match_the_tokens_end_the_job(void **state)
{
    struct fixture f;
    char text[1024];
    fixture_open(&f, 0, NULL);
    fixture_batch(&f, 0, 0);
    assert_int_equal(child_run(forward_without_pictures, &f, text, sizeof text), EXIT_DATA);
    assert_non_null(strstr(text, "56 picture embeddings"));
    assert_non_null(strstr(text, "gave 0"));
    fixture_close(&f);
}

static void same_batch_twice_gives_the_same_bits(void **state)
{
    struct fixture f;
    fixture_open(&f, 0, NULL);
    fixture_batch(&f, 0, 0);
    const double loss = fixture_forward(&f, true);
    model_zero_grads(&f.model);
    fixture_backward(&f);
    const struct tensor g = model_grad_buffer(&f.model, true);
    const size_t bytes = (size_t)tensor_numel(&g) * dtype_bytes(g.dtype);
    char *first = xcalloc(bytes, 1);
    memcpy(first, g.data, bytes);
    assert_true(fixture_forward(&f, true) == loss);
    model_zero_grads(&f.model);
    fixture_backward(&f);
    assert_memory_equal(first, g.data, bytes);
    free(first);
    fixture_close(&f);
}

static void m6_30_text_only_batch(void **state)
{
    static const char *const o[] = { "data.mock_text_only_every=1" };
    struct fixture f;
    fixture_open(&f, 1, o);
    fixture_batch(&f, 0, 0);
    assert_int_equal(f.text.image_rows, 0);
    assert_int_equal(f.pictures.tiles, 0);
    assert_true(isfinite(fixture_forward(&f, true)));
    model_zero_grads(&f.model);
    fixture_backward(&f);
    const struct tensor vision = model_grad_buffer(&f.model, false),
                        language = model_grad_buffer(&f.model, true);
    double most = 0.0;
    for (int64_t i = 0; i < tensor_numel(&vision); i++)
        assert_true(element(&vision, i) == 0.0);
    for (int64_t i = 0; i < tensor_numel(&language); i++)
        most = fmax(most, fabs(element(&language, i)));
    assert_true(most > 0.0);
    fixture_close(&f);
}

/* model.md 3.1: the embedding row of the image token is never read and gets no gradient from the
 * input side. */
static void image_token_row_has_no_input_gradient(void **state)
{
    struct fixture f;
    fixture_open(&f, 0, NULL);
    fixture_batch(&f, 0, 0);
    fixture_forward(&f, true);
    model_zero_grads(&f.model);
    fixture_backward(&f);
    const struct param *p =
        model_find_param(&f.model, MODEL_LANGUAGE, "embedding.word_embeddings.weight");
    const int64_t h = f.deck.language.hidden_size, row = f.deck.data.image_token_id;
    for (int64_t c = 0; c < h; c++)
        assert_true(element(&p->grad, row * h + c) == 0.0);
    fixture_close(&f);
}

static double embedding_scale(struct fixture *f)
{
    const struct tensor e = model_encoder_forward(&f->model, 0, &f->pictures, false);
    double most = 0.0;
    for (int64_t i = 0; i < tensor_numel(&e); i++)
        most = fmax(most, fabs(element(&e, i)));
    return most;
}

static void m6_01_final_layernorm_bounds_the_features(void **state)
{
    static const char *const with[] = { "stage.training_stage=2" };
    static const char *const without[] = { "stage.training_stage=2", "vision.final_layernorm=F" };
    struct fixture f, g;
    fixture_open(&f, 1, with);
    fixture_open(&g, 2, without);
    fixture_batch(&f, 0, 0);
    fixture_batch(&g, 0, 0);
    assert_non_null(model_find_param(&f.model, MODEL_VISION, "decoder.final_layernorm.weight"));
    assert_null(model_find_param(&g.model, MODEL_VISION, "decoder.final_layernorm.weight"));
    assert_true(embedding_scale(&g) > 3.0 * embedding_scale(&f));
    fixture_close(&f);
    fixture_close(&g);
}

static void m6_04_frozen_encoder_ignores_training_mode(void **state)
{
    static const char *const frozen[] = { "stage.training_stage=2" };
    struct fixture f;
    for (int trains = 0; trains < 2; trains++) {
        fixture_open(&f, trains ? 0 : 1, frozen);
        fixture_batch(&f, 0, 0);
        struct tensor e = model_encoder_forward(&f.model, 0, &f.pictures, false);
        const size_t bytes = (size_t)tensor_numel(&e) * dtype_bytes(e.dtype);
        char *eval = xcalloc(bytes, 1);
        memcpy(eval, e.data, bytes);
        e = model_encoder_forward(&f.model, 0, &f.pictures, true);
        assert_int_equal(memcmp(eval, e.data, bytes) != 0, trains);
        free(eval);
        fixture_close(&f);
    }
}

static void m6_33_frozen_modules_have_no_gradient_memory(void **state)
{
    static const char *const stage1[] = { "stage.training_stage=1" };
    struct fixture f;
    fixture_open(&f, 1, stage1);
    for (int i = 0; i < f.model.n_params; i++) {
        const struct param *p = &f.model.param[i];
        assert_int_equal(p->trainable, p->module == MODEL_PROJECTOR);
        assert_int_equal(p->grad.data != NULL, p->trainable);
    }
    const struct tensor language = model_grad_buffer(&f.model, true);
    assert_int_equal(tensor_numel(&language), 0);
    fixture_close(&f);
}

/* Of a frozen language module: with or without a coefficient no metric and the same gradient of the
 * picture embeddings; the coefficient shows as soon as it trains. */
static void m6_33_a_frozen_language_module_has_no_auxiliary_loss(void **state)
{
    for (int frozen = 0; frozen < 2; frozen++) {
        double *gradient[2], metric = 0.0;
        size_t bytes = 0;
        for (int i = 0; i < 2; i++) {
            const char *const o[] = { "run.precision=fp64",
                                      frozen ? "stage.training_stage=1" : "stage.training_stage=2",
                                      i ? "moe.moe_aux_loss_coeff=10"
                                        : "moe.moe_aux_loss_coeff=0" };
            struct fixture f;
            fixture_open(&f, 3, o);
            fixture_batch(&f, 0, 0);
            fixture_forward(&f, true);
            const struct tensor d = model_language_backward(&f.model, 0, true),
                                sum = model_balance_metric(&f.model);
            metric = *(double *)sum.data;
            bytes = (size_t)tensor_numel(&d) * sizeof(double);
            gradient[i] = xmalloc(bytes, 1);
            memcpy(gradient[i], d.data, bytes);
            fixture_close(&f);
        }
        assert_true(bytes > 0 && (metric == 0.0) == frozen);
        assert_int_equal(memcmp(gradient[0], gradient[1], bytes) == 0, frozen);
        free(gradient[0]);
        free(gradient[1]);
    }
}

/* Counting and carving ask for the same bytes. */
static void arenas_are_filled_exactly(void **state)
{
    struct fixture f;
    fixture_open(&f, 0, NULL);
    for (int i = 0; i < ARENA_COUNT; i++)
        assert_true(f.arenas.a[i].high == f.arenas.a[i].capacity);
    fixture_close(&f);
}

static bool has_block(const struct arena *a, const char *name, size_t bytes)
{
    for (int i = 0; i < a->n_blocks; i++)
        if (strcmp(a->block[i].name, name) == 0)
            return a->block[i].bytes == bytes;
    return false;
}

/* In a bf16 run what the encoder hands to the bridge is bf16, also when a micro-batch has no
 * picture; the segment ends that attention, convolution and scan read lie where they compute. */
static void p12_40_p12_102_m6_40_embeddings_are_bf16_and_segment_ends_lie_on_the_device(
    void **state)
{
    struct fixture f;
    struct model model;
    struct arenas arenas;
    fixture_open(&f, 0, NULL);
    f.deck.derived.bf16 = true; /* as the CUDA backend resolves it */
    model_init(&model, &f.deck, &f.topo, f.be, &f.stream);
    arenas_init(&arenas);
    model_plan(&model, &arenas);
    arenas_commit(&arenas, f.be);
    model_plan(&model, &arenas);
    f.pictures.tiles = f.pictures.rows = f.pictures.patches = 0;
    const struct tensor none = model_encoder_forward(&model, 0, &f.pictures, true);
    assert_int_equal(none.dtype, DTYPE_BF16);
    assert_int_equal(tensor_rows(&none), 0);
    assert_int_equal(tensor_cols(&none), f.deck.language.hidden_size);
    const struct arena *device = &arenas.a[ARENA_ACTIVATIONS];
    assert_int_equal(device->place, PLACE_DEVICE);
    assert_true(has_block(device, "language.cu", 4 * (size_t)(f.deck.batch.micro_batch_size + 1)));
    assert_true(has_block(
        device, "radio.cu",
        4 * (size_t)(f.data.limits.max_tiles_per_sample * f.deck.derived.encoder_microbatch + 1)));
    model_free(&model);
    arenas_free(&arenas, f.be);
    fixture_close(&f);
}

/* 4096 tokens: any E consecutive tokens of a sample load all experts equally, also where K does not
 * divide E. */
static void forced_choice_is_balanced(void **state)
{
    static const char *const o[] = { "moe.moe_router_force_load_balancing=T",
                                     "language.hybrid_layer_pattern=EE",
                                     "language.seq_length=256",
                                     "batch.micro_batch_size=16",
                                     "batch.global_batch_size=16",
                                     "moe.num_experts=7",
                                     "moe.moe_router_topk=3" };
    struct fixture f;
    fixture_open(&f, (int)(sizeof o / sizeof o[0]), o);
    fixture_batch(&f, 0, 0);
    fixture_forward(&f, true);
    for (int l = 0; l < 2; l++) {
        const struct tensor count = model_tokens_per_expert(&f.model, l),
                            choice = model_last_choice(&f.model, l);
        int64_t total = 0, first[7] = { 0 };
        assert_int_equal(tensor_rows(&choice), 4096);
        for (int e = 0; e < 7; e++) {
            const int64_t n = ((const int64_t *)count.data)[e];
            assert_true(fabs((double)n * 7.0 / (4096.0 * 3.0) - 1.0) < 0.03);
            total += n;
        }
        assert_int_equal(total, 4096 * 3);
        for (int64_t t = 0; t < 4096; t++) {
            const int32_t *c = (const int32_t *)choice.data + 3 * t;
            assert_true(c[0] >= 0 && c[0] < c[1] && c[1] < c[2] && c[2] < 7);
            first[c[0]] += t % 256 == 0;
        }
        for (int e = 0; e < 7; e++)
            assert_true(first[e] < 16); /* samples begin with different experts */
    }
    const struct tensor a = model_last_choice(&f.model, 0), b = model_last_choice(&f.model, 1);
    assert_true(memcmp(a.data, b.data, (size_t)tensor_numel(&a) * sizeof(int32_t)) != 0);
    fixture_close(&f);
}

/* The choice follows (seed, layer, sample, position); probabilities stay the scores of the chosen,
 * and their gradients flow: what the model weighs does not move it. */
static void forced_choice_ignores_the_scores(void **state)
{
    static const char *const o[] = { "moe.moe_router_force_load_balancing=T",
                                     "language.hybrid_layer_pattern=E", "run.seed=8" };
    int32_t kept[2 * 64 * 2];
    for (int pass = 0; pass < 4; pass++) { /* plain, other scores, other samples, other seed */
        struct fixture f;
        fixture_open(&f, pass == 3 ? 3 : 2, o);
        if (pass == 1)
            f.be->fill(
                &f.stream,
                &model_find_param(&f.model, MODEL_LANGUAGE, "decoder.layers.0.mlp.router.weight")
                     ->value,
                0.3);
        fixture_batch(&f, 0, 0);
        for (int64_t i = 0; pass == 2 && i < f.text.samples; i++)
            f.text.sample_index[i] += 100;
        fixture_forward(&f, true);
        const struct tensor choice = model_last_choice(&f.model, 0);
        assert_int_equal(tensor_numel(&choice), sizeof kept / sizeof kept[0]);
        if (pass == 0)
            memcpy(kept, choice.data, sizeof kept);
        assert_true((memcmp(kept, choice.data, sizeof kept) == 0) == (pass < 2));
        fixture_close(&f);
    }
}

static double *copy_of_grads(struct fixture *f, bool language)
{
    const struct tensor g = model_grad_buffer(&f->model, language);
    double *copy = xcalloc((size_t)tensor_numel(&g) + 1, sizeof *copy);
    memcpy(copy, g.data, (size_t)tensor_numel(&g) * sizeof *copy);
    return copy;
}

/* What the last stage hands on: the sum of loss * mask in the accumulator's type, the number of
 * loss tokens, both over micro-batches. */
static void p12_48_loss_is_a_sum_and_a_token_count(void **state)
{
    static const char *const o[] = { "run.precision=fp64", "data.mock_text_only_every=3" };
    struct fixture f;
    double sum = 0.0;
    fixture_open(&f, 2, o);
    model_zero_accumulators(&f.model);
    for (int m = 0; m < 2; m++) {
        struct tensor image;
        int64_t tokens = 0;
        fixture_batch(&f, m, 0);
        image = model_encoder_forward(&f.model, 0, &f.pictures, true);
        model_language_forward(&f.model, 0, &f.text, &image, true);
        const struct tensor loss = model_token_loss(&f.model);
        assert_int_equal(tensor_numel(&loss), 2 * 64);
        for (int64_t i = 0; i < tensor_numel(&loss); i++) {
            sum += ((double *)loss.data)[i] * (double)f.text.loss_mask[i];
            tokens += f.text.loss_mask[i] != 0.0f;
        }
        assert_int_equal(f.text.loss_tokens, tokens);
        const struct tensor total = model_loss_sum(&f.model);
        assert_int_equal(total.dtype, f.model.acc);
        assert_true(fabs(*(double *)total.data - sum) <= 1e-13 * sum);
    }
    /* A mask of another shape than the model's batch ends the job. */
    f.text.image_rows = 0;
    f.text.seq_length--;
    assert_int_equal(child_run(forward_without_pictures, &f, NULL, 0), EXIT_INTERNAL);
    f.text.seq_length++;
    fixture_close(&f);
}

/* The same crop of the position grid in both, so the language module sees the same embeddings. */
static void p12_50_a_frozen_encoder_leaves_the_language_gradients_as_they_are(void **state)
{
    static const char *const trained[] = { "run.precision=fp64", "vision.force_cpe_eval_mode=T" };
    static const char *const frozen[] = { "run.precision=fp64", "vision.force_cpe_eval_mode=T",
                                          "stage.freeze_vit=T", "stage.freeze_projection=T" };
    struct fixture f;
    double *gradient[2];
    int64_t n = 0;
    for (int i = 0; i < 2; i++) {
        fixture_open(&f, i ? 4 : 2, i ? frozen : trained);
        fixture_batch(&f, 0, 0);
        fixture_forward(&f, true);
        model_zero_grads(&f.model);
        const struct tensor d = model_language_backward(&f.model, 0, i == 0);
        if (i == 0)
            model_encoder_backward(&f.model, 0, &d);
        const struct tensor language = model_grad_buffer(&f.model, true),
                            encoder = model_grad_buffer(&f.model, false);
        assert_int_equal(tensor_numel(&encoder) > 0, i == 0);
        assert_true(i == 0 || tensor_numel(&language) == n);
        n = tensor_numel(&language);
        gradient[i] = copy_of_grads(&f, true);
        fixture_close(&f);
    }
    assert_memory_equal(gradient[0], gradient[1], (size_t)n * sizeof(double));
    free(gradient[0]);
    free(gradient[1]);
}

static void p12_69_zeroing_reaches_every_module_that_is_there(void **state)
{
    static const char *const both[] = { "run.precision=fp64" };
    static const char *const alone[] = { "run.precision=fp64", "topology.layout=language_only" };
    for (int i = 0; i < 2; i++) {
        struct fixture f;
        fixture_open(&f, i ? 2 : 1, i ? alone : both);
        fixture_batch(&f, 0, 0);
        fixture_forward(&f, true);
        fixture_backward(&f);
        for (int zeroed = 0; zeroed < 2; zeroed++) {
            if (zeroed)
                model_zero_grads(&f.model);
            for (int language = 0; language < 2; language++) {
                const struct tensor g = model_grad_buffer(&f.model, language);
                int64_t set = 0;
                for (int64_t k = 0; k < tensor_numel(&g); k++)
                    set += ((double *)g.data)[k] != 0.0;
                assert_int_equal(tensor_numel(&g) > 0, language || i == 0);
                assert_int_equal(set > 0, !zeroed && (language || i == 0));
            }
        }
        fixture_close(&f);
    }
}

/* All that a micro-batch leaves: loss, metric, counts of every expert, every gradient. Between
 * forward and backward the workspace is filled with rubbish: nothing of it may be read. */
static char *outcome_of(struct fixture *f, size_t *bytes)
{
    struct arena *work = &f->arenas.a[ARENA_WORKSPACE];
    struct tensor part[64];
    int n = 0;
    for (int i = 0; i < 2; i++) {
        struct tensor image = model_encoder_forward(&f->model, 0, &f->pictures, true);
        model_language_forward(&f->model, 0, &f->text, &image, true);
        memset(work->base, 0xff, work->capacity);
        const struct tensor d = model_language_backward(&f->model, 0, true);
        model_encoder_backward(&f->model, 0, &d);
    }
    part[n++] = model_loss_sum(&f->model);
    part[n++] = model_balance_metric(&f->model);
    part[n++] = model_grad_buffer(&f->model, false);
    part[n++] = model_grad_buffer(&f->model, true);
    for (int l = 0; l < f->model.n_moe; l++)
        part[n++] = model_tokens_per_expert(&f->model, l);
    *bytes = 0;
    for (int i = 0; i < n; i++)
        *bytes += (size_t)tensor_numel(&part[i]) * dtype_bytes(part[i].dtype);
    char *all = xmalloc(*bytes, 1);
    for (int i = 0, at = 0; i < n; i++) {
        const size_t size = (size_t)tensor_numel(&part[i]) * dtype_bytes(part[i].dtype);
        memcpy(all + at, part[i].data, size);
        at += (int)size;
    }
    return all;
}

/* What is made again has the same bits, what counts counts once, and less is kept. */
static void m6_39_m6_16_recomputation_is_bit_identical(void **state)
{
    static const struct {
        const char *granularity, *modules;
        bool saves;
    } ways[] = {
        { "language.recompute_granularity=none", "language.recompute_modules=mlp", false },
        { "language.recompute_granularity=full", "language.recompute_modules=mlp", true },
        { "language.recompute_granularity=selective", "language.recompute_modules=core_attn",
          true },
        { "language.recompute_granularity=selective", "language.recompute_modules=mlp", true },
        { "language.recompute_granularity=selective", "language.recompute_modules=moe", true },
        { "language.recompute_granularity=selective", "language.recompute_modules=shared_experts",
          true },
        { "language.recompute_granularity=selective",
          "language.recompute_modules=moe,mlp,core_attn,shared_experts", true },
        { "language.recompute_granularity=selective", "language.recompute_modules=moe_act", true },
        { "language.recompute_granularity=selective", "language.recompute_modules=layernorm",
          true },
        { "language.recompute_granularity=selective",
          "language.recompute_modules=moe,layernorm,moe_act,core_attn", true },
    };
    for (int forced = 0; forced < 2; forced++) {
        char *plain = NULL;
        size_t kept = 0, bytes = 0;
        for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
            const char *const o[] = { ways[i].granularity, ways[i].modules,
                                      "moe.moe_aux_loss_coeff=0.05",
                                      "moe.moe_router_force_load_balancing=T" };
            struct fixture f;
            size_t n;
            fixture_open(&f, forced ? 4 : 3, o);
            fixture_batch(&f, 0, 0);
            char *now = outcome_of(&f, &n);
            const size_t keeps = f.arenas.a[ARENA_ACTIVATIONS].capacity;
            if (i == 0) {
                kept = keeps;
                bytes = n;
                plain = now;
            } else {
                assert_int_equal(n, bytes);
                if (memcmp(now, plain, n) != 0)
                    fail_msg("%s %s: not the bits of none", ways[i].granularity, ways[i].modules);
                if (ways[i].saves ? keeps >= kept : keeps != kept)
                    fail_msg("%s %s: keeps %zu bytes, none %zu", ways[i].granularity,
                             ways[i].modules, keeps, kept);
                free(now);
            }
            fixture_close(&f);
        }
        free(plain);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(m6_21_all_masked_microbatch_has_zero_language_gradient),
        cmocka_unit_test(m6_20_ignored_label_gives_a_finite_loss),
        cmocka_unit_test(gradients_accumulate_over_microbatches),
        cmocka_unit_test(gradients_need_no_clearing_where_products_overwrite_them),
        cmocka_unit_test(m6_15_p12_59_auxiliary_gradient_is_that_of_all_tokens),
        cmocka_unit_test(m6_22_gradients_do_not_depend_on_the_split_into_microbatches),
        cmocka_unit_test(m6_32_p12_32_36_embeddings_that_do_not_match_the_tokens_end_the_job),
        cmocka_unit_test(same_batch_twice_gives_the_same_bits),
        cmocka_unit_test(m6_30_text_only_batch),
        cmocka_unit_test(image_token_row_has_no_input_gradient),
        cmocka_unit_test(m6_01_final_layernorm_bounds_the_features),
        cmocka_unit_test(m6_04_frozen_encoder_ignores_training_mode),
        cmocka_unit_test(m6_33_frozen_modules_have_no_gradient_memory),
        cmocka_unit_test(m6_33_a_frozen_language_module_has_no_auxiliary_loss),
        cmocka_unit_test(arenas_are_filled_exactly),
        cmocka_unit_test(
            p12_40_p12_102_m6_40_embeddings_are_bf16_and_segment_ends_lie_on_the_device),
        cmocka_unit_test(forced_choice_is_balanced),
        cmocka_unit_test(forced_choice_ignores_the_scores),
        cmocka_unit_test(p12_48_loss_is_a_sum_and_a_token_count),
        cmocka_unit_test(p12_50_a_frozen_encoder_leaves_the_language_gradients_as_they_are),
        cmocka_unit_test(m6_39_m6_16_recomputation_is_bit_identical),
        cmocka_unit_test(p12_69_zeroing_reaches_every_module_that_is_there),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
