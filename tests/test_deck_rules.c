/* test_deck_rules.c - presets, derived values, overrides; the production layouts at their rank
 * counts (parallel.md 11.2); and the table itself: every key is accepted or, where its feature is
 * missing, refused by name. The echo and the reference deck: test_deck_echo.c.
 */
#include "test_deck.h"

/* ---- the table ------------------------------------------------------------------------------- */

static void assert_word(const char *group, const char *key, int position, const char *word)
{
    int row = deck_table_find(group, key);
    assert_true(row >= 0);
    assert_int_equal(deck_table_word(deck_table[row].words, word), position);
}

static void choice_constants_are_positions_of_words(void **state)
{
    assert_word("run", "mode", DECK_MODE_EVAL, "eval");
    assert_word("run", "backend", DECK_BACKEND_REF, "ref");
    assert_word("run", "backend", DECK_BACKEND_CUDA, "cuda");
    assert_word("run", "backend", DECK_BACKEND_SHADOW, "shadow");
    assert_word("run", "precision", DECK_PRECISION_FP32, "fp32");
    assert_word("run", "precision", DECK_PRECISION_BF16, "bf16");
    assert_word("run", "precision", DECK_PRECISION_FP64, "fp64");
    assert_word("run", "exit_signal", DECK_EXIT_SIGNAL_USR1, "USR1");
    assert_word("topology", "layout", DECK_LAYOUT_AUTO, "auto");
    assert_word("topology", "layout", DECK_LAYOUT_DISJOINT, "disjoint");
    assert_word("topology", "layout", DECK_LAYOUT_COLOCATED, "colocated");
    assert_word("topology", "layout", DECK_LAYOUT_LANGUAGE_ONLY, "language_only");
    assert_word("language", "preset", DECK_LANGUAGE_NEMOTRON_20L, "nemotron_20l");
    assert_word("language", "preset", DECK_LANGUAGE_NEMOTRON_54L, "nemotron_54l");
    assert_word("language", "preset", DECK_LANGUAGE_NEMOTRON3_NANO, "nemotron3_nano");
    assert_word("language", "preset", DECK_LANGUAGE_TINY, "tiny");
    assert_word("language", "preset", DECK_LANGUAGE_CUSTOM, "custom");
    assert_word("vision", "preset", DECK_VISION_RADIO_VIT_H, "radio_vit_h");
    assert_word("vision", "preset", DECK_VISION_TINY, "tiny");
    assert_word("vision", "preset", DECK_VISION_CUSTOM, "custom");
    assert_word("language", "recompute_granularity", DECK_RECOMPUTE_FULL, "full");
    assert_word("language", "recompute_granularity", DECK_RECOMPUTE_SELECTIVE, "selective");
    assert_word("moe", "moe_router_load_balancing_type", DECK_BALANCING_SEQ_AUX_LOSS,
                "seq_aux_loss");
    assert_word("moe", "moe_router_load_balancing_type", DECK_BALANCING_NONE, "none");
    assert_word("projector", "vision_projection_type", DECK_PROJECTION_MLP, "mlp");
    assert_word("projector", "projection_normalization", DECK_PROJECTION_NORM_RMSNORM, "rmsnorm");
    assert_word("data", "dataset_provider", DECK_PROVIDER_WEBDATASET, "webdataset");
    assert_word("data", "image_tag_type", DECK_TAG_NONE, "");
    assert_word("data", "image_tag_type", DECK_TAG_INTERNVL, "internvl");
    assert_word("data", "image_tag_type", DECK_TAG_NVLM, "nvlm");
    assert_word("data", "mock_pixels", DECK_PIXELS_NORMAL, "normal");
    assert_word("data", "mock_pixels", DECK_PIXELS_ZEROS, "zeros");
    assert_word("optimizer", "non_finite_policy", DECK_NON_FINITE_SKIP, "skip");
    assert_word("lr", "lr_decay_style", DECK_LR_CONSTANT, "constant");
    assert_word("lr", "lr_decay_style", DECK_LR_LINEAR, "linear");
    assert_word("lr", "lr_decay_style", DECK_LR_COSINE, "cosine");
    assert_word("lr", "lr_decay_style", DECK_LR_INVERSE_SQUARE_ROOT, "inverse-square-root");
    assert_word("lr", "lr_decay_style", DECK_LR_WSD, "WSD");
    assert_word("lr", "lr_wsd_decay_style", DECK_WSD_EXPONENTIAL, "exponential");
    assert_word("lr", "lr_wsd_decay_style", DECK_WSD_LINEAR, "linear");
    assert_word("lr", "lr_wsd_decay_style", DECK_WSD_COSINE, "cosine");
    assert_word("lr", "lr_wsd_decay_style", DECK_WSD_MINUS_SQRT, "minus_sqrt");
    assert_word("lr", "weight_decay_incr_style", DECK_WD_LINEAR, "linear");
    assert_word("lr", "weight_decay_incr_style", DECK_WD_COSINE, "cosine");
    assert_word("eval", "eval_picture_ablation", DECK_ABLATION_ROTATE, "rotate");
    assert_word("eval", "eval_picture_ablation", DECK_ABLATION_ZERO, "zero");
}

static void every_row_is_sound(void **state)
{
    for (int row = 0; row < DECK_ROWS; row++) {
        const struct deck_param *p = &deck_table[row];
        assert_non_null(p->help);
        assert_true(strlen(p->help) > 5);
        assert_int_equal(deck_table_find(p->group, p->key), row);
        assert_true(strlen(p->key) <= DECK_NAME_MAX);
        if (p->type == DECK_TYPE_CHOICE)
            assert_true(deck_table_word(p->words, p->text) >= 0);
        if (p->type == DECK_TYPE_INTEGER)
            assert_true(p->min <= p->max);
        assert_int_equal(p->only == NULL, p->feature == NULL);
    }
}

/* A value of the row that differs from its default and lies in its range, as an override's text. */
static char *other_value(int row)
{
    const struct deck_param *p = &deck_table[row];
    switch (p->type) {
    case DECK_TYPE_INTEGER:
        return xasprintf("%lld", (long long)(p->max == p->integer ? p->min : p->max));
    case DECK_TYPE_REAL:
        return xasprintf("%.17g", p->real_max == p->real ? p->real_min : p->real_max);
    case DECK_TYPE_LOGICAL: return xstrdup(p->logical ? "F" : "T");
    case DECK_TYPE_STRING: return xstrdup("other");
    case DECK_TYPE_INTEGERS: return xstrdup("3,4");
    case DECK_TYPE_STRINGS: return xstrdup("mlp,moe");
    case DECK_TYPE_CHOICE:
        /* the last word that is neither default nor known to work already */
        for (int n = 0;; n++) {
            char *word = deck_table_nth_word(p->words, n);
            assert_non_null(word);
            if (strcmp(word, p->text) && (!p->only || deck_table_word(p->only, word) < 0))
                return word;
            free(word);
        }
    }
    return NULL;
}

/* Reading takes any value in range and nothing outside; resolving refuses it by name exactly where
 * the feature is missing. */
static void every_key_is_accepted_or_refused_by_name(void **state)
{
    int refused = 0;
    for (int row = 0; row < DECK_ROWS; row++) {
        const struct deck_param *p = &deck_table[row];
        char *value = other_value(row), *override = xasprintf("%s.%s=%s", p->group, p->key, value);
        struct deck deck = { 0 };
        struct errors errors = { 0 };
        resolve_text(&deck, "&run /", 0, &errors, OVERRIDES(override));
        assert_no_errors(&errors);
        assert_false(deck_table_is_default(&deck, row));
        assert_true(deck_given(&deck, p->group, p->key));
        assert_string_equal(deck_where(&deck, p->group, p->key), "command line");
        deck_resolve(&deck, 1, &errors);
        char *needle = xasprintf("%s.%s = ", p->group, p->key);
        bool named = false;
        for (int i = 0; i < errors.count; i++)
            if (strstr(errors.line[i], needle) && strstr(errors.line[i], "is not built yet"))
                named = true;
        /* a condition between keys spoke first */
        bool ruled = has_error(&errors, needle) && !named;
        if (p->only)
            assert_true(named || ruled);
        else
            assert_int_equal(deck.derived.not_built, 0);
        refused += named;
        free(needle);
        free(override);
        free(value);
        deck_free(&deck);
        errors_free(&errors);
    }
    assert_true(refused >= 5);
}

static void every_key_refuses_wrong_types_and_ranges(void **state)
{
    for (int row = 0; row < DECK_ROWS; row++) {
        const struct deck_param *p = &deck_table[row];
        const char *wrong[4] = { 0 };
        char beyond[64];
        int n = 0;
        switch (p->type) {
        case DECK_TYPE_INTEGER:
        case DECK_TYPE_INTEGERS:
            snprintf(beyond, sizeof beyond, "%lld", (long long)p->max + 1);
            wrong[n++] = beyond, wrong[n++] = "1.5", wrong[n++] = "T", wrong[n++] = "'1'";
            break;
        case DECK_TYPE_REAL:
            snprintf(beyond, sizeof beyond, "%.17g", p->real_max * 2);
            wrong[n++] = beyond, wrong[n++] = "T", wrong[n++] = "'1'", wrong[n++] = "1e";
            break;
        case DECK_TYPE_LOGICAL: wrong[n++] = "1", wrong[n++] = "'T'", wrong[n++] = "on"; break;
        case DECK_TYPE_CHOICE:
            wrong[n++] = "1", wrong[n++] = "T", wrong[n++] = "'no such word'";
            break;
        case DECK_TYPE_STRING: wrong[n++] = "1", wrong[n++] = "T", wrong[n++] = "word"; break;
        case DECK_TYPE_STRINGS: wrong[n++] = "1", wrong[n++] = "'no such word'"; break;
        }
        for (int i = 0; i < n; i++) {
            char *text = xasprintf("&%s\n  %s = %s\n/\n", p->group, p->key, wrong[i]),
                 *place = xasprintf("x.nml:2:%d: error: %s.%s = %s: ", (int)strlen(p->key) + 6,
                                    p->group, p->key, wrong[i]);
            struct deck deck = { 0 };
            struct errors errors = { 0 };
            resolve_text(&deck, text, 0, &errors, NULL);
            assert_int_equal(errors.count, 1);
            assert_int_equal(errors.worst, EXIT_DECK);
            assert_int_equal(strncmp(errors.line[0], place, strlen(place)), 0);
            assert_true(deck_table_is_default(&deck, row)); /* nothing was assigned */
            deck_free(&deck);
            errors_free(&errors);
            free(text);
            free(place);
        }
    }
}

/* ---- presets and derived values -------------------------------------------------------------- */

static void preset_tiny_has_the_values_of_the_specification(void **state)
{
    struct deck d = { 0 };
    struct errors errors = { 0 };
    resolve_text(&d, TINY_TRAIN, 1, &errors, NULL);
    assert_no_errors(&errors);
    assert_true(d.derived.complete);
    assert_string_equal(d.derived.pattern, "MEM*E-");
    assert_int_equal(d.derived.num_layers, 6);
    assert_int_equal(d.language.hidden_size, 64);
    assert_int_equal(d.language.num_attention_heads, 4);
    assert_int_equal(d.language.num_query_groups, 2);
    assert_int_equal(d.language.kv_channels, 16);
    assert_int_equal(d.language.ffn_hidden_size, 96);
    assert_int_equal(d.language.vocab_size, 500);
    assert_int_equal(d.derived.padded_vocab, 512);
    assert_int_equal(d.language.seq_length, 64);
    assert_true(d.language.init_method_std == 0.0173);
    assert_int_equal(d.moe.num_experts, 8);
    assert_int_equal(d.moe.moe_router_topk, 2);
    assert_int_equal(d.moe.moe_ffn_hidden_size, 32);
    assert_int_equal(d.moe.moe_shared_expert_intermediate_size, 64);
    assert_true(d.moe.moe_router_topk_scaling_factor == 2.5 && d.moe.moe_aux_loss_coeff == 1e-4);
    assert_true(d.moe.moe_router_enable_expert_bias && d.moe.moe_router_bias_update_rate == 1e-3);
    assert_int_equal(d.mamba.mamba_num_heads * d.mamba.mamba_head_dim, 64);
    assert_int_equal(d.mamba.mamba_num_groups, 2);
    assert_int_equal(d.mamba.mamba_state_dim, 16);
    assert_int_equal(d.mamba.mamba_chunk_size, 16);
    assert_int_equal(d.vision.preset, DECK_VISION_TINY);
    assert_int_equal(d.vision.num_layers, 2);
    assert_int_equal(d.vision.hidden_size, 32);
    assert_int_equal(d.vision.num_attention_heads, 4);
    assert_int_equal(d.vision.ffn_hidden_size, 64);
    assert_int_equal(d.vision.patch_dim, 4);
    assert_int_equal(d.vision.max_img_h / d.vision.patch_dim, 16);
    assert_int_equal(d.vision.class_token_len, 2);
    assert_int_equal(d.data.image_token_id, 499);
    assert_int_equal(d.data.image_seq_length, 28);
    assert_int_equal(d.data.num_image_tiles, 2);
    assert_int_equal(d.topology.layout, DECK_LAYOUT_COLOCATED);
    assert_int_equal(d.derived.num_microbatches, 1);
    assert_int_equal(d.derived.encoder_microbatch, 1);
    assert_int_equal(d.run.backend, DECK_BACKEND_REF);
    assert_false(d.derived.fp64 || d.derived.bf16);
    deck_free(&d);
    errors_free(&errors);
}

static void check_nemotron(const char *preset, int layers, int mamba, int mixture, int attention,
                           int groups, int class_tokens, int image_token)
{
    struct deck d = { 0 };
    struct errors errors = { 0 };
    char *override = xasprintf("language.preset=%s", preset);
    resolve_text(&d, "&run train_iters = 1 /\n&lr lr = 1e-3 /\n", 1, &errors, OVERRIDES(override));
    assert_no_errors(&errors);
    int count[128] = { 0 };
    for (const char *p = d.derived.pattern; *p; p++)
        count[(int)*p]++;
    assert_int_equal(d.derived.num_layers, layers);
    assert_int_equal(count['M'], mamba);
    assert_int_equal(count['E'], mixture);
    assert_int_equal(count['*'], attention);
    assert_int_equal(d.language.hidden_size, 2688);
    assert_int_equal(d.language.num_attention_heads * d.language.kv_channels, 4096);
    assert_int_equal(d.language.num_query_groups, groups);
    assert_int_equal(d.mamba.mamba_num_heads * d.mamba.mamba_head_dim, 4096);
    assert_int_equal(d.mamba.mamba_num_groups, 8);
    assert_int_equal(d.mamba.mamba_state_dim, 128);
    assert_int_equal(d.moe.num_experts, 128);
    assert_int_equal(d.moe.moe_router_topk, 6);
    assert_int_equal(d.moe.moe_ffn_hidden_size, 1856);
    assert_int_equal(d.moe.moe_shared_expert_intermediate_size, 3712);
    assert_int_equal(d.derived.padded_vocab, 131072);
    assert_int_equal(d.language.seq_length, 8192);
    assert_int_equal(d.vision.preset, DECK_VISION_RADIO_VIT_H);
    assert_int_equal(d.vision.hidden_size, 1280);
    assert_int_equal(d.vision.num_layers, 32);
    assert_int_equal(d.vision.max_img_h / d.vision.patch_dim, 128);
    assert_int_equal(d.vision.class_token_len, class_tokens);
    assert_int_equal(d.data.image_token_id, image_token);
    assert_int_equal(d.data.image_seq_length, 4096);
    assert_int_equal(d.data.num_image_tiles, 1);
    free(override);
    deck_free(&d);
    errors_free(&errors);
}

static void nemotron_presets_have_the_values_of_the_specification(void **state)
{
    check_nemotron("nemotron_20l", 20, 9, 8, 3, 8, 8, 511);
    check_nemotron("nemotron_54l", 54, 23, 23, 8, 8, 10, 18);
    check_nemotron("nemotron3_nano", 52, 23, 23, 6, 2, 10, 18);
}

static void custom_model_derives_what_megatron_derives(void **state)
{
    struct deck d = { 0 };
    struct errors errors = { 0 };
    resolve_text(
        &d,
        "&run train_samples = 100 /\n&lr lr = 1 /\n&language preset = 'custom', hybrid_layer_pattern = 'M*-', hidden_size = 32,"
        " vocab_size = 100, seq_length = 32, num_attention_heads = 4 /\n&mamba mamba_head_dim = 8, mamba_state_dim = 4 /\n"
        "&vision preset = 'custom', num_layers = 1, hidden_size = 16, num_attention_heads = 2, dynamic_resolution = F /\n"
        "&data image_seq_length = 0 /\n&batch global_batch_size = 8 /",
        1, &errors, OVERRIDES("vision.img_h=32", "vision.img_w=32", "vision.patch_dim=8"));
    assert_no_errors(&errors);
    assert_int_equal(d.language.kv_channels, 8);
    assert_int_equal(d.language.num_query_groups, 4);
    assert_int_equal(d.language.ffn_hidden_size, 128);
    assert_true(d.language.init_method_std == 0.02);
    assert_int_equal(d.mamba.mamba_num_heads, 8);
    assert_int_equal(d.vision.ffn_hidden_size, 64);
    assert_int_equal(d.data.image_seq_length, 4); /* 4x4 patches, shuffled */
    assert_int_equal(d.data.image_token_id, 99);
    assert_int_equal(d.derived.padded_vocab, 128);
    assert_int_equal(d.derived.train_iterations, 12); /* floor(100 / 8) */
    assert_int_equal(d.lr.lr_decay_samples, 100);
    deck_free(&d);
    errors_free(&errors);
}

struct production {
    const char *path;
    int ranks, encoder, llm_dp, microbatches, lanes, offset;
    int64_t iterations;
};

static void p11_2_production_layouts_at_their_rank_counts(void **state)
{
    static const struct production decks[] = {
        { "input/hel_9n.nml", 72, 8, 32, 24, 4, 8, 47684 },
        { "input/hel_17n.nml", 136, 8, 64, 6, 8, 8, 317891 },
        { "input/hel_33n.nml", 264, 8, 128, 6, 16, 8, 158945 },
        { "input/hel_68n.nml", 544, 32, 256, 3, 8, 32, 158945 },
        { "input/hel_100n.nml", 800, 32, 384, 2, 12, 32, 158945 },
    };
    for (size_t i = 0; i < sizeof decks / sizeof decks[0]; i++) {
        const struct production *p = &decks[i];
        struct deck d = { 0 };
        struct errors errors = { 0 };
        make_deck_file(&d, p->path, p->ranks, &errors, NULL);
        assert_true(d.derived.complete);
        /* Only what does not exist yet stands between these decks and a run. */
        assert_int_equal(errors.count, d.derived.not_built);
        assert_int_equal(d.topology.encoder_dp, p->encoder);
        assert_int_equal(d.topology.llm_dp, p->llm_dp);
        assert_int_equal(d.topology.llm_offset, p->offset);
        assert_int_equal(d.derived.num_microbatches, p->microbatches);
        assert_int_equal(d.derived.encoder_microbatch, p->lanes);
        assert_int_equal(d.derived.train_iterations, p->iterations);
        assert_int_equal(d.derived.num_layers, 54);
        assert_true(d.derived.bf16);
        deck_free(&d);
        errors_free(&errors);
        make_deck_file(&d, p->path, p->ranks - 8, &errors, NULL); /* a node is missing */
        assert_int_equal(errors.worst, EXIT_ENVIRONMENT);
        assert_false(d.derived.complete);
        deck_free(&d);
        errors_free(&errors);
    }
}

static void layout_auto_splits_even_jobs_in_halves(void **state)
{
    for (int ranks = 1; ranks <= 9; ranks++) {
        struct deck d = { 0 };
        struct errors errors = { 0 };
        resolve_text(&d, TINY_TRAIN, ranks, &errors, NULL);
        if (ranks == 1) {
            assert_int_equal(d.topology.layout, DECK_LAYOUT_COLOCATED);
        } else if (ranks % 2 == 0) {
            assert_no_errors(&errors);
            assert_int_equal(d.topology.layout, DECK_LAYOUT_DISJOINT);
            assert_int_equal(d.topology.encoder_dp, ranks / 2);
            assert_int_equal(d.topology.llm_dp, ranks / 2);
            assert_int_equal(d.topology.llm_offset, ranks / 2);
            /* gcd(ranks / 2, 8 experts) */
            assert_int_equal(d.topology.llm_ep, ranks / 2 % 2 ? 1 : ranks / 2);
            assert_int_equal(d.batch.global_batch_size, ranks / 2);
        } else {
            assert_int_equal(errors.worst, EXIT_ENVIRONMENT);
            assert_true(has_error(&errors, "layout = 'colocated'"));
            assert_true(has_error(&errors, "encoder_dp = 1, llm_dp = "));
        }
        deck_free(&d);
        errors_free(&errors);
    }
}

static void dp_sizes_are_derived_from_what_is_given(void **state)
{
    static const struct {
        const char *given;
        int ranks, encoder, llm, offset;
    } cases[] = {
        { "layout='disjoint', encoder_dp = 2", 10, 2, 8, 2 },
        { "layout='disjoint', llm_dp = 4", 6, 2, 4, 2 },
        { "layout='disjoint', llm_offset = 1", 4, 1, 3, 1 },
        { "layout='disjoint'", 4, 2, 2, 2 },
        { "layout='disjoint', encoder_dp = 1, llm_dp = 2, llm_offset = 1", 3, 1, 2, 1 },
        { "layout='colocated'", 3, 3, 3, 0 },
        { "layout='language_only'", 5, 0, 5, 0 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct deck d = { 0 };
        struct errors errors = { 0 };
        char *text = xasprintf("%s&topology %s /\n", TINY_TRAIN, cases[i].given);
        resolve_text(&d, text, cases[i].ranks, &errors, NULL);
        assert_no_errors(&errors);
        assert_int_equal(d.topology.encoder_dp, cases[i].encoder);
        assert_int_equal(d.topology.llm_dp, cases[i].llm);
        assert_int_equal(d.topology.llm_offset, cases[i].offset);
        free(text);
        deck_free(&d);
        errors_free(&errors);
    }
}

static void stages_freeze_what_the_table_says_and_keys_override(void **state)
{
    for (int stage = 1; stage <= 3; stage++) {
        struct deck d = { 0 };
        struct errors errors = { 0 };
        char *override = xasprintf("stage.training_stage=%d", stage);
        resolve_text(&d, TINY_TRAIN, 1, &errors, OVERRIDES(override));
        assert_int_equal(d.derived.freeze_encoder, stage < 3);
        assert_false(d.derived.freeze_projector);
        assert_int_equal(d.derived.freeze_language, stage == 1);
        assert_int_equal(d.stage.freeze_vit, stage < 3);
        deck_free(&d);
        resolve_text(&d, TINY_TRAIN, 1, &errors,
                     OVERRIDES(override, "stage.freeze_vit=F", "stage.freeze_projection=T"));
        assert_false(d.derived.freeze_encoder);
        assert_true(d.derived.freeze_projector);
        assert_no_errors(&errors);
        free(override);
        deck_free(&d);
        errors_free(&errors);
    }
}

static void eval_iters_follow_whether_validation_is_asked_for(void **state)
{
    static const struct {
        const char *override;
        int64_t expect;
    } cases[] = {
        { "run.title=none asked", 0 },
        { "eval.eval_interval=5", 100 },
        { "run.mode=eval", 100 },
        { "eval.eval_iters=7", 7 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct deck d = { 0 };
        struct errors errors = { 0 };
        resolve_text(&d, TINY_TRAIN, 1, &errors, OVERRIDES(cases[i].override));
        assert_no_errors(&errors);
        assert_int_equal(d.eval.eval_iters, cases[i].expect);
        deck_free(&d);
        errors_free(&errors);
    }
}

static void a_missing_backend_still_resolves_everything(void **state)
{
    struct deck d = { 0 };
    struct errors errors = { 0 };
    resolve_text(&d, TINY_TRAIN, 4, &errors, OVERRIDES("run.backend=cuda"));
    assert_true(d.derived.complete && d.derived.no_backend && d.derived.bf16);
    assert_int_equal(errors.count, 0);
    assert_int_equal(d.derived.not_built, 0);
    deck_need_backend(&d, &errors);
    assert_int_equal(errors.count, 1);
    assert_int_equal(errors.worst, EXIT_ENVIRONMENT);
    deck_free(&d);
    errors_free(&errors);
}

static void auto_takes_the_backend_that_has_the_precision(void **state)
{
    static const struct {
        const char *override;
        int backend;
        const char *missing;
    } cases[] = {
        { "run.precision=bf16", DECK_BACKEND_CUDA, "run.precision = 'bf16'" },
        { "run.precision=fp64", DECK_BACKEND_REF, NULL },
        { "run.backend=shadow", DECK_BACKEND_SHADOW, "run.backend = 'shadow'" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct deck d = { 0 };
        struct errors errors = { 0 };
        resolve_text(&d, TINY_TRAIN, 1, &errors, OVERRIDES(cases[i].override));
        assert_no_errors(&errors);
        assert_true(d.derived.complete);
        assert_int_equal(d.run.backend, cases[i].backend);
        deck_need_backend(&d, &errors);
        if (cases[i].missing && d.derived.no_backend)
            assert_non_null(strstr(errors.line[0], cases[i].missing));
        else
            assert_no_errors(&errors);
        deck_free(&d);
        errors_free(&errors);
    }
}

static void huge_sizes_do_not_overflow(void **state)
{
    struct deck d = { 0 };
    struct errors errors = { 0 };
    resolve_text(&d, TINY_TRAIN, 2147483646, &errors,
                 OVERRIDES("batch.micro_batch_size=1048576", "topology.layout=colocated",
                           "language.hidden_size=1048576", "language.seq_length=16777216",
                           "language.vocab_size=2147483647", "run.train_iters=1000000000"));
    assert_true(d.derived.padded_vocab >= 2147483647);
    deck_free(&d);
    errors_free(&errors);
}

static void shared_expert_overlap_excludes_its_recomputation(void **state)
{
    static const char message[] =
        "moe.moe_shared_expert_overlap = .true.: not together with 'shared_experts' in language.recompute_modules";
    const char *const overrides[] = { "moe.moe_shared_expert_overlap=T",
                                      "language.recompute_modules=mlp,shared_experts",
                                      "language.recompute_granularity=selective", NULL };
    const char *const others[] = { "moe.moe_shared_expert_overlap=T",
                                   "language.recompute_modules=mlp,moe",
                                   "language.recompute_granularity=selective", NULL };
    for (int i = 0; i < 2; i++) {
        struct deck deck = { 0 };
        struct errors errors = { 0 };
        make_deck_file(&deck, "input/mock_tiny.nml", 1, &errors, i ? others : overrides);
        assert_int_equal(has_error(&errors, message), i == 0);
        deck_free(&deck);
        errors_free(&errors);
    }
}

/* ---- overrides ------------------------------------------------------------------------------- */

static void overrides_win_and_strings_need_no_quotes(void **state)
{
    struct deck d = { 0 };
    struct errors errors = { 0 };
    resolve_text(&d, TINY_TRAIN, 1, &errors,
                 OVERRIDES("run.train_iters=3", "run.output_dir=/tmp/a b=c", "run.title='quoted'",
                           "CHECKPOINT.Save=\"x\"", "batch.iterations_to_skip=1,2 3*5",
                           "lr.lr = 2d-3", "checkpoint.load=it's", "log.log_timers=.true.",
                           "language.recompute_modules=core_attn", "data.image_token="));
    assert_no_errors(&errors);
    assert_int_equal(d.run.train_iters, 3);
    assert_string_equal(d.run.output_dir, "/tmp/a b=c");
    assert_string_equal(d.run.title, "quoted");
    assert_string_equal(d.checkpoint.save, "x");
    assert_string_equal(d.checkpoint.load, "it's");
    assert_string_equal(d.data.image_token, "");
    assert_int_equal(d.batch.iterations_to_skip.n, 5);
    assert_int_equal(d.batch.iterations_to_skip.v[4], 5);
    assert_true(d.lr.lr == 2e-3);
    assert_true(d.log.log_timers);
    assert_string_equal(deck_where(&d, "run", "train_iters"), "command line");
    assert_string_equal(deck_where(&d, "language", "preset"), "x.nml:2:20");
    assert_true(deck_given(&d, "language", "preset"));
    assert_false(deck_given(&d, "language", "hidden_size"));
    deck_free(&d);
    errors_free(&errors);
}

static void wrong_overrides_are_refused(void **state)
{
    static const struct {
        const char *override, *message;
    } cases[] = {
        { "run.train_iters",
          "command line: error: 'run.train_iters': an override is group.key=value" },
        { "lr=1",
          "command line: error: 'lr=1': an override is group.key=value; lr belongs to &lr" },
        { "=1", "command line: error: '=1': an override is group.key=value" },
        { "run.train_iter=1",
          "command line: error: 'run.train_iter=1': &run has no key 'train_iter'; did you mean train_iters?" },
        { "rum.seed=1",
          "command line: error: 'rum.seed=1': there is no group &rum; did you mean &run?" },
        { "run.train_iters=", "command line: error: run.train_iters: value missing" },
        { "run.train_iters=1,2",
          "command line: error: run.train_iters = 1, 2: 2 values, at most 1" },
        { "run.train_iters=1 /", "command line: error: run.train_iters: unexpected '/'" },
        { "run.train_iters=1.0",
          "command line: error: run.train_iters = 1.0: integer expected, write 1" },
        { "run.seed=5\n", "command line: error: byte 0x0A is not text (control character)" },
        { "run.backend=gpu",
          "command line: error: run.backend = 'gpu': must be 'auto', 'ref', 'cuda' or 'shadow'" },
        { "batch.iterations_to_skip(2)=3",
          "command line: error: 'batch.iterations_to_skip(2)=3': give the whole list, an element cannot be set here" },
        { "batch.iterations_to_skip=99999999999*1",
          "command line: error: batch.iterations_to_skip: 99999999999 values, at most 64" },
        { "log.log_timers=yes",
          "command line: error: log.log_timers = yes: logical expected, write T or F" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct deck d = { 0 };
        struct errors errors = { 0 };
        resolve_text(&d, TINY_TRAIN, 0, &errors, OVERRIDES(cases[i].override));
        assert_int_equal(errors.count, 1);
        assert_string_equal(errors.line[0], cases[i].message);
        assert_int_equal(errors.worst, EXIT_DECK);
        deck_free(&d);
        errors_free(&errors);
    }
    struct deck d = { 0 };
    struct errors errors = { 0 };
    resolve_text(&d, TINY_TRAIN, 0, &errors, OVERRIDES("run.seed=5", "run.seed=6"));
    assert_int_equal(errors.count, 1);
    assert_string_equal(errors.line[0], "command line: error: run.seed is given twice");
    deck_free(&d);
    errors_free(&errors);
}

static void input_decks_hold_only_differences(void **state)
{
    static const char *const paths[] = { "input/mock_tiny.nml", "input/stage1.nml",
                                         "input/stage2.nml",    "input/mock_20l.nml",
                                         "input/hel_9n.nml",    "input/hel_17n.nml",
                                         "input/hel_33n.nml",   "input/hel_68n.nml",
                                         "input/hel_100n.nml" };
    for (size_t i = 0; i < sizeof paths / sizeof paths[0]; i++) {
        size_t length;
        char *text = slurp(paths[i], &length);
        assert_int_equal(text[0], '!'); /* its purpose */
        struct deck d = { 0 };
        struct errors errors = { 0 };
        make_deck(&d, paths[i], text, length, 0, &errors, NULL);
        assert_no_errors(&errors);
        for (int row = 0; row < DECK_ROWS; row++)
            if (d.source[row].origin == DECK_FROM_DECK && deck_table_is_default(&d, row))
                fail_msg("%s: %s.%s is the default", paths[i], deck_table[row].group,
                         deck_table[row].key);
        free(text);
        deck_free(&d);
        errors_free(&errors);
    }
}

static void suggestions_name_near_keys_and_their_group(void **state)
{
    char out[200];
    assert_string_equal(deck_table_suggest("moe", "moe_router_top_k", out, sizeof out),
                        "; did you mean moe_router_topk?");
    assert_string_equal(deck_table_suggest("lr", "seed", out, sizeof out),
                        "; seed belongs to &run");
    assert_string_equal(deck_table_suggest("lr", "--lr-decay-style", out, sizeof out),
                        "; did you mean lr_decay_style?");
    assert_string_equal(deck_table_suggest("lr", "sede", out, sizeof out),
                        "; did you mean seed in &run?");
    assert_string_equal(deck_table_suggest("lr", "completely_different", out, sizeof out), "");
    assert_string_equal(deck_table_suggest("toplogy", NULL, out, sizeof out),
                        "; did you mean &topology?");
    assert_int_equal(deck_table_distance("abcd", "abdc", 9), 1);
    assert_int_equal(deck_table_distance("kitten", "sitting", 9), 3);
    assert_int_equal(deck_table_distance("", "abc", 9), 3);
    assert_int_equal(deck_table_distance("abc", "xyz", 2), 3);
}

/* Upstream fixes the encoder's other sizes and its place; more than one sharded optimizer is
 * refused there. */
static void p12_10_82_there_is_no_key_for_what_is_fixed(void **state)
{
    static const char *const keys[] = { "topology.encoder_cp=1", "topology.encoder_ep=1",
                                        "topology.encoder_expt_tp=1", "topology.encoder_offset=0",
                                        "optimizer.num_distributed_optimizer_instances=2" };
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        const char *const overrides[] = { keys[i], NULL };
        struct deck deck = { 0 };
        struct errors errors = { 0 };
        make_deck_file(&deck, "input/mock_tiny.nml", 1, &errors, overrides);
        assert_int_equal(errors.count, 1);
        assert_true(has_error(&errors, "has no key"));
        deck_free(&deck);
        errors_free(&errors);
    }
}

static void p12_46_layers_must_divide_over_the_stages(void **state)
{
    const char *const overrides[] = { "language.hybrid_layer_pattern=M*", "topology.llm_pp=3",
                                      "topology.layout=language_only", NULL };
    struct deck deck = { 0 };
    struct errors errors = { 0 };
    make_deck_file(&deck, "input/mock_tiny.nml", 3, &errors, overrides);
    assert_true(has_error(
        &errors, "2 layers without | cannot be cut into topology.llm_pp = 3 equal stages"));
    deck_free(&deck);
    errors_free(&errors);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(choice_constants_are_positions_of_words),
        cmocka_unit_test(every_row_is_sound),
        cmocka_unit_test(every_key_is_accepted_or_refused_by_name),
        cmocka_unit_test(every_key_refuses_wrong_types_and_ranges),
        cmocka_unit_test(preset_tiny_has_the_values_of_the_specification),
        cmocka_unit_test(nemotron_presets_have_the_values_of_the_specification),
        cmocka_unit_test(custom_model_derives_what_megatron_derives),
        cmocka_unit_test(p11_2_production_layouts_at_their_rank_counts),
        cmocka_unit_test(layout_auto_splits_even_jobs_in_halves),
        cmocka_unit_test(dp_sizes_are_derived_from_what_is_given),
        cmocka_unit_test(stages_freeze_what_the_table_says_and_keys_override),
        cmocka_unit_test(eval_iters_follow_whether_validation_is_asked_for),
        cmocka_unit_test(a_missing_backend_still_resolves_everything),
        cmocka_unit_test(auto_takes_the_backend_that_has_the_precision),
        cmocka_unit_test(huge_sizes_do_not_overflow),
        cmocka_unit_test(shared_expert_overlap_excludes_its_recomputation),
        cmocka_unit_test(overrides_win_and_strings_need_no_quotes),
        cmocka_unit_test(wrong_overrides_are_refused),
        cmocka_unit_test(input_decks_hold_only_differences),
        cmocka_unit_test(suggestions_name_near_keys_and_their_group),
        cmocka_unit_test(p12_10_82_there_is_no_key_for_what_is_fixed),
        cmocka_unit_test(p12_46_layers_must_divide_over_the_stages),
    };
    return cmocka_run_group_tests_name("deck rules", tests, NULL, NULL);
}
