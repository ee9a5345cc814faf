/* deck_rules.c - derived values and every condition between keys.
 *
 * In this order: presets; backend and precision; the two grids (deck_grids.c: layout, dp, offset,
 * rules A1-A9 of parallel.md 1.5 and the bridge's divisibility); model shapes; vision and pictures;
 * data; batch and length of the training; learning rate (training.md 2.1); stage; checkpoint and
 * evaluation; last the values whose feature is not built (column `built` of the table). A rule
 * names key, value and all numbers that it compares. It stays silent about a key whose value the
 * reader refused. When the reader had to skip text, only values that were read are complained
 * about: what seems missing may be in what was skipped. Products of deck values saturate instead of
 * overflowing (deck_rules_mul).
 */
#include "deck_rules.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "backend.h"

int64_t deck_rules_mul(int64_t a, int64_t b)
{
    int64_t product;
    return __builtin_mul_overflow(a, b, &product) ? INT64_MAX : product;
}

void deck_rules_fail(struct deck_rules *c, int row, enum exit_code code, const char *fmt, ...)
{
    const struct deck_param *p = &deck_table[row];
    const struct deck_source *source = &c->deck->source[row];
    if (source->bad)
        return;
    c->failed = true;
    c->blamed[row] = true;
    if (c->deck->unread && source->origin < DECK_FROM_DECK)
        return;
    char why[1024];
    va_list args;
    va_start(args, fmt);
    vsnprintf(why, sizeof why, fmt, args);
    va_end(args);
    char *value = deck_table_format(c->deck, row);
    const char *from = source->origin == DECK_FROM_PRESET    ? " (preset)"
                       : source->origin == DECK_FROM_DERIVED ? " (derived)"
                       : source->origin == DECK_FROM_DEFAULT ? " (default)"
                                                             : "";
    errors_add(c->errors, code, "%s: error: %s.%s = %s%s: %s",
               deck_where(c->deck, p->group, p->key), p->group, p->key, value, from, why);
    free(value);
}

/* Report that a row without a usable default was not given. */
static void missing(struct deck_rules *c, int row, const char *why)
{
    const struct deck_param *p = &deck_table[row];
    if (c->deck->source[row].bad)
        return;
    c->failed = true;
    c->blamed[row] = true;
    if (c->deck->unread)
        return;
    errors_add(c->errors, EXIT_DECK, "%s: error: %s.%s is not given: %s",
               deck_where(c->deck, p->group, p->key), p->group, p->key, why);
}

void deck_rules_derive(struct deck_rules *c, int row, int64_t value)
{
    *deck_integer(c->deck, row) = value;
    c->deck->source[row].origin = DECK_FROM_DERIVED;
}

static void derive_choice(struct deck_rules *c, int row, int value)
{
    *deck_choice(c->deck, row) = value;
    c->deck->source[row].origin = DECK_FROM_DERIVED;
}

static void derive_real(struct deck_rules *c, int row, double value)
{
    *deck_real(c->deck, row) = value;
    c->deck->source[row].origin = DECK_FROM_DERIVED;
}

/* Derive an integer that is still "not given". */
static void derive_unset(struct deck_rules *c, int row, int64_t value)
{
    if (deck_table_is_unset(c->deck, row))
        deck_rules_derive(c, row, value);
}

#define FAIL(group, key, ...) deck_rules_fail(c, DECK_ROW(group, key), EXIT_DECK, __VA_ARGS__)
#define MISSING(group, key, why) missing(c, DECK_ROW(group, key), why)
#define UNSET(group, key) deck_table_is_unset(c->deck, DECK_ROW(group, key))
#define N PRId64

/* ---- backend --------------------------------------------------------------------------------- */

static void resolve_backend(struct deck_rules *c)
{
    struct deck *d = c->deck;
    if (d->run.backend == DECK_BACKEND_AUTO)
        derive_choice(c, DECK_ROW(run, backend),
                      d->run.precision == DECK_PRECISION_BF16   ? DECK_BACKEND_CUDA
                      : d->run.precision == DECK_PRECISION_FP64 ? DECK_BACKEND_REF
                      : backend_cuda_missing()                  ? DECK_BACKEND_REF
                                                                : DECK_BACKEND_CUDA);
    bool ref = d->run.backend == DECK_BACKEND_REF;
    if (d->run.precision == DECK_PRECISION_AUTO)
        derive_choice(c, DECK_ROW(run, precision), ref ? DECK_PRECISION_FP32 : DECK_PRECISION_BF16);
    if (d->run.precision == DECK_PRECISION_FP64 && !ref)
        FAIL(run, precision, "fp64 exists on backend 'ref' only");
    if (d->run.precision == DECK_PRECISION_BF16 && ref)
        FAIL(run, precision, "bf16 exists on backend 'cuda' only");
    if (d->run.ranks_per_gpu > 1 && ref)
        FAIL(run, ranks_per_gpu, "backend 'ref' drives no GPU that ranks could share");
    d->derived.fp64 = d->run.precision == DECK_PRECISION_FP64;
    d->derived.bf16 = d->run.precision == DECK_PRECISION_BF16;
}

/* ---- language model -------------------------------------------------------------------------- */

/* Count the layers and letters of the pattern. */
static bool read_pattern(struct deck_rules *c, bool kinds[128])
{
    struct deck *d = c->deck;
    const char *pattern = d->language.hybrid_layer_pattern;
    int64_t n = 0, stages = 1, in_stage = 0;
    if (!*pattern)
        return MISSING(language, hybrid_layer_pattern, "preset 'custom' sets none"), false;
    for (const char *p = pattern; *p; p++) {
        int position = (int)(p - pattern) + 1;
        if (*p == '|') {
            if (in_stage == 0)
                return FAIL(language, hybrid_layer_pattern, "no layer before the | at position %d",
                            position),
                       false;
            stages++;
            in_stage = 0;
            continue;
        }
        if (*p == '/')
            return FAIL(language, hybrid_layer_pattern,
                        "'/' at position %d: this program has no multi-token prediction", position),
                   false;
        if (!strchr("ME*-", *p)) {
            int length = 1;
            while (((unsigned char)p[length] & 0xC0) == 0x80)
                length++;
            FAIL(language, hybrid_layer_pattern, "'%.*s' at position %d: a layer is M, E, * or -",
                 length, p, position);
            return false;
        }
        kinds[(int)*p] = true;
        in_stage++;
        d->derived.pattern[n++] = *p;
    }
    d->derived.pattern[n] = '\0';
    d->derived.num_layers = n;
    if (in_stage == 0)
        return FAIL(language, hybrid_layer_pattern, "no layer after the last |"), false;
    int64_t pp = d->topology.llm_pp;
    if (stages > 1 && stages != pp) {
        FAIL(language, hybrid_layer_pattern,
             "%" N " pipeline stages divided by |, but topology.llm_pp = %" N, stages, pp);
        return false;
    }
    if (stages == 1 && n % pp) {
        FAIL(language, hybrid_layer_pattern,
             "%" N " layers without | cannot be cut into topology.llm_pp = %" N " equal stages", n,
             pp);
        return false;
    }
    return true;
}

/* a % b == 0, both positive; otherwise says so at the key of a. */
#define DIVIDES(group, key, a, b, name_b) \
    ((b) > 0 && (a) % (b) \
         ? FAIL(group, key, "must be a multiple of %s = %" N, name_b, (int64_t)(b)) \
         : (void)0)

static void check_mixture(struct deck_rules *c)
{
    struct deck *d = c->deck;
    derive_unset(c, DECK_ROW(moe, moe_ffn_hidden_size), d->language.ffn_hidden_size);
    if (UNSET(moe, num_experts))
        return MISSING(moe, num_experts, "the pattern has layers of kind E");
    if (UNSET(moe, moe_shared_expert_intermediate_size))
        MISSING(moe, moe_shared_expert_intermediate_size,
                "every layer of kind E has a shared expert");
    if (d->moe.moe_router_topk > d->moe.num_experts)
        FAIL(moe, moe_router_topk, "must be in 1..num_experts (%" N ")", d->moe.num_experts);
    DIVIDES(moe, moe_shared_expert_intermediate_size, d->moe.moe_shared_expert_intermediate_size,
            d->topology.llm_tp, "topology.llm_tp");
    DIVIDES(moe, moe_ffn_hidden_size, d->moe.moe_ffn_hidden_size, d->topology.llm_expt_tp,
            "topology.llm_expt_tp");
    if (d->moe.moe_shared_expert_overlap && deck_recomputes(d, "shared_experts"))
        FAIL(moe, moe_shared_expert_overlap,
             "not together with 'shared_experts' in language.recompute_modules");
}

static void check_mamba(struct deck_rules *c)
{
    struct deck *d = c->deck;
    int64_t heads = deck_rules_mul(2, d->language.hidden_size) / d->mamba.mamba_head_dim;
    if (UNSET(mamba, mamba_num_heads) && heads > 0)
        deck_rules_derive(c, DECK_ROW(mamba, mamba_num_heads), heads);
    if (UNSET(mamba, mamba_num_heads))
        return MISSING(mamba, mamba_num_heads, "2 * hidden_size / mamba_head_dim is 0");
    DIVIDES(mamba, mamba_num_heads, d->mamba.mamba_num_heads, d->mamba.mamba_num_groups,
            "mamba_num_groups");
    DIVIDES(mamba, mamba_num_groups, d->mamba.mamba_num_groups, d->topology.llm_tp,
            "topology.llm_tp");
}

static void check_attention(struct deck_rules *c)
{
    struct deck *d = c->deck;
    if (UNSET(language, num_attention_heads))
        return MISSING(language, num_attention_heads, "the pattern has layers of kind *");
    derive_unset(c, DECK_ROW(language, num_query_groups), d->language.num_attention_heads);
    if (UNSET(language, kv_channels)) {
        if (d->language.hidden_size % d->language.num_attention_heads)
            FAIL(language, num_attention_heads,
                 "must divide hidden_size = %" N " or kv_channels must be given",
                 d->language.hidden_size);
        else
            deck_rules_derive(c, DECK_ROW(language, kv_channels),
                              d->language.hidden_size / d->language.num_attention_heads);
    }
    DIVIDES(language, num_attention_heads, d->language.num_attention_heads,
            d->language.num_query_groups, "num_query_groups");
    DIVIDES(language, num_query_groups, d->language.num_query_groups, d->topology.llm_tp,
            "topology.llm_tp");
}

static void resolve_language(struct deck_rules *c)
{
    struct deck *d = c->deck;
    bool kinds[128] = { false };
    if (!d->source[DECK_ROW(language, hybrid_layer_pattern)].bad)
        read_pattern(c, kinds);
    if (UNSET(language, hidden_size))
        return MISSING(language, hidden_size, "preset 'custom' sets none");
    if (UNSET(language, vocab_size))
        return MISSING(language, vocab_size, "preset 'custom' sets none");
    if (UNSET(language, seq_length))
        return MISSING(language, seq_length, "preset 'custom' sets none");
    derive_unset(c, DECK_ROW(language, ffn_hidden_size),
                 deck_rules_mul(4, d->language.hidden_size));
    if (kinds['*'])
        check_attention(c);
    if (kinds['M'])
        check_mamba(c);
    if (kinds['E'])
        check_mixture(c);
    if (kinds['-'])
        DIVIDES(language, ffn_hidden_size, d->language.ffn_hidden_size, d->topology.llm_tp,
                "topology.llm_tp");
    DIVIDES(language, seq_length, d->language.seq_length, d->topology.llm_tp, "topology.llm_tp");
    int64_t unit = d->language.make_vocab_size_divisible_by;
    d->derived.padded_vocab = (d->language.vocab_size + unit - 1) / unit * unit;
    if (d->derived.padded_vocab % d->topology.llm_tp)
        FAIL(language, vocab_size, "padded to %" N ", must be a multiple of topology.llm_tp = %" N,
             d->derived.padded_vocab, d->topology.llm_tp);
}

/* ---- encoder and pictures -------------------------------------------------------------------- */

static void resolve_vision(struct deck_rules *c)
{
    struct deck *d = c->deck;
    struct deck_vision *v = &d->vision;
    if (UNSET(vision, num_layers))
        MISSING(vision, num_layers, "preset 'custom' sets none");
    if (UNSET(vision, hidden_size))
        return MISSING(vision, hidden_size, "preset 'custom' sets none");
    if (UNSET(vision, num_attention_heads))
        return MISSING(vision, num_attention_heads, "preset 'custom' sets none");
    derive_unset(c, DECK_ROW(vision, ffn_hidden_size), deck_rules_mul(4, v->hidden_size));
    DIVIDES(vision, hidden_size, v->hidden_size, v->num_attention_heads, "num_attention_heads");
    DIVIDES(vision, num_attention_heads, v->num_attention_heads, d->topology.encoder_tp,
            "topology.encoder_tp");
    DIVIDES(vision, ffn_hidden_size, v->ffn_hidden_size, d->topology.encoder_tp,
            "topology.encoder_tp");
    if (d->projector.vision_projection_type == DECK_PROJECTION_AFFINE)
        DIVIDES(language, hidden_size, d->language.hidden_size, d->topology.encoder_tp,
                "topology.encoder_tp");
    DIVIDES(vision, max_img_h, v->max_img_h, v->patch_dim, "patch_dim");
    if (v->max_img_w != v->max_img_h)
        FAIL(vision, max_img_w, "the position grid is square: must equal max_img_h = %" N,
             v->max_img_h);
    if (!v->dynamic_resolution) {
        DIVIDES(vision, img_h, v->img_h, v->patch_dim, "patch_dim");
        DIVIDES(vision, img_w, v->img_w, v->patch_dim, "patch_dim");
        if (v->pixel_shuffle && v->img_h != v->img_w)
            FAIL(vision, img_w, "pixel shuffle of a fixed size needs a square: img_h = %" N,
                 v->img_h);
        else if (v->pixel_shuffle && v->img_h / v->patch_dim % 2)
            FAIL(vision, img_h, "pixel shuffle needs an even number of patches, this is %" N,
                 v->img_h / v->patch_dim);
    }
    if (v->dynamic_resolution_max_patches > 0) {
        if (v->dynamic_resolution_max_patches < v->dynamic_resolution_min_patches)
            FAIL(vision, dynamic_resolution_max_patches,
                 "must be at least dynamic_resolution_min_patches = %" N,
                 v->dynamic_resolution_min_patches);
        if (v->pixel_shuffle && v->dynamic_resolution_max_patches < 4)
            FAIL(vision, dynamic_resolution_max_patches, "pixel shuffle needs 2x2 patches");
    }
    if (d->projector.projection_normalization == DECK_PROJECTION_NORM_RMSNORM &&
        d->projector.vision_projection_type != DECK_PROJECTION_MLP)
        FAIL(projector, projection_normalization, "only with vision_projection_type = 'mlp'");
}

/* Patch grid of a mock tile: the most nearly square one; both sides even with pixel shuffle. */
static bool patch_grid_exists(int64_t patches, bool even)
{
    for (int64_t rows = 1; rows <= patches / rows; rows++)
        if (patches % rows == 0 && !(even && (rows % 2 || patches / rows % 2)))
            return true;
    return false;
}

static void resolve_mock(struct deck_rules *c)
{
    struct deck *d = c->deck;
    const struct deck_vision *v = &d->vision;
    int64_t s = d->language.seq_length, tiles = d->data.num_image_tiles,
            merge = v->pixel_shuffle ? 4 : 1;
    if (d->topology.layout == DECK_LAYOUT_LANGUAGE_ONLY) {
        if (!UNSET(data, image_seq_length))
            FAIL(data, image_seq_length, "layout 'language_only' has no pictures");
    } else if (v->patch_dim > 0 && s > 0) {
        int64_t patches = (v->img_h / v->patch_dim) * (v->img_w / v->patch_dim);
        int64_t emitted = deck_rules_mul(tiles, patches) / merge;
        derive_unset(c, DECK_ROW(data, image_seq_length), v->dynamic_resolution ? s / 2 : emitted);
        int64_t images = d->data.image_seq_length;
        if (images >= s)
            FAIL(data, image_seq_length, "must be below seq_length = %" N, s);
        else if (v->dynamic_resolution && images % tiles)
            FAIL(data, image_seq_length, "must be a multiple of num_image_tiles = %" N, tiles);
        else if (v->dynamic_resolution &&
                 !patch_grid_exists(images / tiles * merge, v->pixel_shuffle))
            FAIL(data, image_seq_length, "%" N " patches a tile have no grid with even sides",
                 images / tiles * merge);
        else if (!v->dynamic_resolution && images != emitted)
            FAIL(data, image_seq_length,
                 "%" N " tiles of %" N "x%" N " pixels emit %" N " image tokens", tiles, v->img_h,
                 v->img_w, emitted);
    }
    int64_t vocab = d->language.vocab_size;
    if (vocab > 0)
        derive_unset(c, DECK_ROW(data, image_token_id), vocab > 511 ? 511 : vocab - 1);
    bool image_in = d->data.image_token_id >= 1 && d->data.image_token_id < vocab;
    bool pad_in = d->data.pad_token_id >= 1 && d->data.pad_token_id < vocab &&
                  d->data.pad_token_id != d->data.image_token_id;
    if (vocab > 0 && vocab - 1 - image_in - pad_in < 1)
        FAIL(language, vocab_size,
             "no id is left for text beside 0, image_token_id and pad_token_id");
    /* A path that nobody reads is a mistake unless the provider was chosen. */
    if (*d->data.train_data_path &&
        d->source[DECK_ROW(data, dataset_provider)].origin == DECK_FROM_DEFAULT)
        FAIL(
            data, train_data_path,
            "not read by dataset_provider = 'mock', which is the default; did you mean 'webdataset'?");
}

static void resolve_data(struct deck_rules *c)
{
    struct deck *d = c->deck;
    int64_t padded = d->derived.padded_vocab;
    bool mock = d->data.dataset_provider == DECK_PROVIDER_MOCK;
    /* A preset's image token gives way to a smaller vocabulary, as it does to the tokenizer. */
    if (d->source[DECK_ROW(data, image_token_id)].origin == DECK_FROM_PRESET && padded > 0 &&
        d->data.image_token_id >= padded)
        deck_rules_derive(c, DECK_ROW(data, image_token_id),
                          mock ? d->language.vocab_size - 1 : -1);
    if (mock)
        resolve_mock(c);
    if (d->data.packing_buffer_size > 0 && mock)
        FAIL(data, packing_buffer_size,
             "mock samples fill their sequence: only with "
             "dataset_provider = 'webdataset'");
    else if (d->data.packing_buffer_size > 0 && d->batch.micro_batch_size != 1)
        FAIL(data, packing_buffer_size, "needs batch.micro_batch_size = 1, this is %" N,
             d->batch.micro_batch_size);
    if (!mock) {
        if (d->run.mode == DECK_MODE_TRAIN && !*d->data.train_data_path)
            MISSING(data, train_data_path, "dataset_provider = 'webdataset' reads it");
        if (!*d->data.valid_data_path && d->eval.eval_iters > 0)
            MISSING(data, valid_data_path,
                    "validation is asked for (eval_interval, eval_iters or mode)");
        if (!*d->data.tokenizer)
            MISSING(data, tokenizer, "dataset_provider = 'webdataset' needs it");
    }
    if (padded > 0) {
        if (d->data.image_token_id >= padded)
            FAIL(data, image_token_id, "must be below the padded vocabulary, %" N, padded);
        if (d->data.pad_token_id >= padded)
            FAIL(data, pad_token_id, "must be below the padded vocabulary, %" N, padded);
    }
    if (d->data.image_token_id == d->data.pad_token_id)
        FAIL(data, pad_token_id, "must differ from image_token_id");
}

/* ---- batch and length ------------------------------------------------------------------------ */

static void resolve_batch(struct deck_rules *c)
{
    struct deck *d = c->deck;
    int64_t mbs = d->batch.micro_batch_size, lanes = deck_rules_mul(mbs, d->topology.llm_dp);
    if (d->topology.llm_dp < 1 || d->source[DECK_ROW(batch, micro_batch_size)].bad)
        return;
    derive_unset(c, DECK_ROW(batch, global_batch_size), lanes);
    int64_t gbs = d->batch.global_batch_size;
    if (gbs % lanes) {
        bool ranks = d->source[DECK_ROW(topology, llm_dp)].origin == DECK_FROM_DERIVED;
        FAIL(batch, global_batch_size,
             "must be a multiple of micro_batch_size * llm_dp = %" N " * %" N " = %" N "%s", mbs,
             d->topology.llm_dp, lanes, ranks ? "; llm_dp follows from the number of ranks" : "");
        return;
    }
    d->derived.num_microbatches = gbs / lanes;
    derive_unset(c, DECK_ROW(data, data_streams), gbs / mbs);
    DIVIDES(data, data_streams, d->data.data_streams, gbs / mbs,
            "global_batch_size / micro_batch_size");
    d->derived.data_streams = d->data.data_streams;
}

static void resolve_length(struct deck_rules *c)
{
    struct deck *d = c->deck;
    if (d->run.mode != DECK_MODE_TRAIN)
        return;
    bool bad =
        d->source[DECK_ROW(run, train_iters)].bad || d->source[DECK_ROW(run, train_samples)].bad;
    if (d->run.train_iters > 0 && d->run.train_samples > 0) {
        FAIL(run, train_samples, "exclusive with train_iters = %" N, d->run.train_iters);
    } else if (d->run.train_iters > 0) {
        d->derived.train_iterations = d->run.train_iters;
    } else if (d->run.train_samples > 0) {
        if (d->batch.global_batch_size < 1)
            return;
        d->derived.train_iterations = d->run.train_samples / d->batch.global_batch_size;
        if (d->derived.train_iterations < 1)
            FAIL(run, train_samples, "less than one iteration of global_batch_size = %" N,
                 d->batch.global_batch_size);
    } else if (!bad) {
        MISSING(run, train_iters, "training needs train_iters or train_samples");
    }
}

/* ---- learning rate (training.md 2.1) --------------------------------------------------------- */

#define EXCLUSIVE(group, a, b) \
    (c->deck->group.a > 0 && c->deck->group.b > 0 \
         ? FAIL(group, b, "exclusive with " #a " = %" N, c->deck->group.a) \
         : (void)0)

static void resolve_weight_decay(struct deck_rules *c)
{
    struct deck *d = c->deck;
    bool constant = d->lr.weight_decay_incr_style == DECK_WD_CONSTANT;
    if (!constant && UNSET(lr, start_weight_decay))
        MISSING(lr, start_weight_decay, "weight_decay_incr_style needs start and end");
    if (!constant && UNSET(lr, end_weight_decay))
        MISSING(lr, end_weight_decay, "weight_decay_incr_style needs start and end");
    if (UNSET(lr, start_weight_decay))
        derive_real(c, DECK_ROW(lr, start_weight_decay), d->optimizer.weight_decay);
    if (UNSET(lr, end_weight_decay))
        derive_real(c, DECK_ROW(lr, end_weight_decay), d->optimizer.weight_decay);
    double start = d->lr.start_weight_decay, end = d->lr.end_weight_decay;
    if (constant && start != end)
        FAIL(lr, end_weight_decay, "constant weight decay: must equal start_weight_decay = %g",
             start);
    else if (start > end)
        FAIL(lr, end_weight_decay, "must be at least start_weight_decay = %g", start);
}

static void resolve_lr(struct deck_rules *c)
{
    struct deck *d = c->deck;
    struct deck_lr *lr = &d->lr;
    EXCLUSIVE(lr, lr_warmup_iters, lr_warmup_samples);
    EXCLUSIVE(lr, lr_decay_iters, lr_decay_samples);
    EXCLUSIVE(lr, lr_wsd_decay_iters, lr_wsd_decay_samples);
    resolve_weight_decay(c);
    if (d->run.mode != DECK_MODE_TRAIN)
        return;
    if (UNSET(lr, lr)) {
        MISSING(lr, lr, "training needs a learning rate");
    } else {
        if (lr->min_lr > lr->lr)
            FAIL(lr, min_lr, "must be at most lr = %g", lr->lr);
        if (lr->lr_warmup_init > lr->lr)
            FAIL(lr, lr_warmup_init, "must be at most lr = %g", lr->lr);
    }
    if (lr->lr_decay_iters == 0 && lr->lr_decay_samples == 0) {
        if (d->run.train_samples > 0)
            deck_rules_derive(c, DECK_ROW(lr, lr_decay_samples), d->run.train_samples);
        else if (d->run.train_iters > 0)
            deck_rules_derive(c, DECK_ROW(lr, lr_decay_iters), d->run.train_iters);
        else
            return;
    }
    int64_t gbs = d->batch.global_batch_size;
    if (gbs < 1)
        return;
    int64_t warmup = lr->lr_warmup_samples > 0 ? lr->lr_warmup_samples
                                               : deck_rules_mul(lr->lr_warmup_iters, gbs);
    int64_t decay =
        lr->lr_decay_samples > 0 ? lr->lr_decay_samples : deck_rules_mul(lr->lr_decay_iters, gbs);
    int64_t tail = lr->lr_wsd_decay_samples > 0 ? lr->lr_wsd_decay_samples
                                                : deck_rules_mul(lr->lr_wsd_decay_iters, gbs);
    if (warmup >= decay)
        deck_rules_fail(c,
                        lr->lr_warmup_samples > 0 ? DECK_ROW(lr, lr_warmup_samples)
                                                  : DECK_ROW(lr, lr_warmup_iters),
                        EXIT_DECK,
                        "the warm-up, %" N " samples, must be shorter than the decay, %" N
                        " samples",
                        warmup, decay);
    if (lr->lr_decay_style != DECK_LR_WSD)
        return;
    if (tail == 0)
        MISSING(lr, lr_wsd_decay_iters,
                "lr_decay_style = 'WSD' needs lr_wsd_decay_iters or lr_wsd_decay_samples");
    else if (tail > decay)
        deck_rules_fail(c,
                        lr->lr_wsd_decay_samples > 0 ? DECK_ROW(lr, lr_wsd_decay_samples)
                                                     : DECK_ROW(lr, lr_wsd_decay_iters),
                        EXIT_DECK,
                        "the tail, %" N " samples, is longer than the decay, %" N " samples", tail,
                        decay);
}

/* ---- stage, checkpoint, evaluation ----------------------------------------------------------- */

static bool resolve_freeze(struct deck_rules *c, int row, bool stage_says)
{
    struct deck_source *source = &c->deck->source[row];
    if (source->origin < DECK_FROM_DECK) {
        *deck_logical(c->deck, row) = stage_says;
        source->origin = DECK_FROM_DERIVED;
    }
    return *deck_logical(c->deck, row);
}

static void resolve_stage(struct deck_rules *c)
{
    struct deck *d = c->deck;
    int64_t stage = d->stage.training_stage;
    d->derived.freeze_encoder = resolve_freeze(c, DECK_ROW(stage, freeze_vit), stage < 3);
    d->derived.freeze_projector = resolve_freeze(c, DECK_ROW(stage, freeze_projection), false);
    d->derived.freeze_language = resolve_freeze(c, DECK_ROW(stage, freeze_lm), stage == 1);
    bool alone = d->topology.layout == DECK_LAYOUT_LANGUAGE_ONLY;
    if (d->run.mode == DECK_MODE_TRAIN && d->derived.freeze_language &&
        (alone || (d->derived.freeze_encoder && d->derived.freeze_projector)))
        FAIL(stage, freeze_lm, "nothing is left to train (training_stage = %" N "%s)", stage,
             alone ? ", layout 'language_only'" : ", freeze_vit, freeze_projection");
}

static void resolve_eval(struct deck_rules *c)
{
    struct deck *d = c->deck;
    bool eval = d->run.mode == DECK_MODE_EVAL;
    derive_unset(c, DECK_ROW(eval, eval_iters), eval || d->eval.eval_interval > 0 ? 100 : 0);
    if (eval && d->eval.eval_iters == 0)
        FAIL(eval, eval_iters, "mode = 'eval' needs at least one batch");
    if (d->eval.eval_picture_ablation != DECK_ABLATION_NONE &&
        d->topology.layout == DECK_LAYOUT_LANGUAGE_ONLY)
        FAIL(eval, eval_picture_ablation, "layout 'language_only' has no pictures");
}

/* Logits wait in memory until the iteration's batches are written. */
static void check_log(struct deck_rules *c)
{
    const struct deck *d = c->deck;
    if (!*d->run.output_dir)
        FAIL(run, output_dir, "a run needs a directory for its files");
    if (!d->log.dump_logits)
        return;
    if (d->log.dump_batches == 0)
        FAIL(log, dump_logits, "without log.dump_batches there is no batch to write");
    if (c->failed)
        return;
    const double numbers = (double)d->batch.global_batch_size / (double)d->topology.llm_dp *
                           (double)d->language.seq_length * (double)d->derived.padded_vocab /
                           (double)d->topology.llm_tp,
                 gib = numbers * (d->derived.fp64 ? 8 : 4) / 0x1p30;
    if (gib > 1.0)
        FAIL(
            log, dump_logits,
            "%.1f GiB of logits on each rank, at most 1 works: make batch.global_batch_size smaller",
            gib);
}

static void check_optimizer(struct deck_rules *c)
{
    EXCLUSIVE(optimizer, ddp_bucket_size, ddp_num_buckets);
}

static void check_checkpoint(struct deck_rules *c)
{
    struct deck_checkpoint *k = &c->deck->checkpoint;
    if (k->use_checkpoint_opt_param_scheduler && k->override_opt_param_scheduler)
        FAIL(checkpoint, override_opt_param_scheduler,
             "exclusive with use_checkpoint_opt_param_scheduler");
    if (k->save_interval > 0 && !*k->save)
        FAIL(checkpoint, save_interval, "nothing is saved: checkpoint.save is not given");
    if (k->save_initial && !*k->save)
        FAIL(checkpoint, save_initial, "nothing is saved: checkpoint.save is not given");
    if (k->ckpt_step >= 0 && !*k->save && !*k->load)
        FAIL(checkpoint, ckpt_step,
             "nothing is loaded: neither checkpoint.load nor checkpoint.save is given");
    if (k->finetune && !*k->save && !*k->load)
        FAIL(checkpoint, finetune, "nothing is loaded: checkpoint.load is not given");
    static const int imports[] = { DECK_ROW(checkpoint, import_language),
                                   DECK_ROW(checkpoint, import_vision),
                                   DECK_ROW(checkpoint, import_projector) };
    for (int i = 0; i < 3; i++) {
        if (!**deck_string(c->deck, imports[i]))
            continue;
        if (*k->load || k->finetune)
            deck_rules_fail(c, imports[i], EXIT_DECK,
                            "exclusive with %s: both would set the weights",
                            *k->load ? "checkpoint.load" : "checkpoint.finetune");
        if (i > 0 && c->deck->topology.layout == DECK_LAYOUT_LANGUAGE_ONLY)
            deck_rules_fail(c, imports[i], EXIT_DECK, "layout 'language_only' has no pictures");
    }
}

/* ---- not built ------------------------------------------------------------------------------- */

static bool value_works(const struct deck *deck, int row)
{
    const char *only = deck_table[row].only;
    const void *x = (const char *)deck + deck_table[row].offset;
    switch (deck_table[row].type) {
    case DECK_TYPE_LOGICAL: return *(const bool *)x == (*only == 'T');
    case DECK_TYPE_STRING: return !**(const char *const *)x;
    case DECK_TYPE_INTEGERS:
    case DECK_TYPE_STRINGS: return deck_table_is_default(deck, row);
    default: break;
    }
    char *text = deck_table_format(deck, row), *word = text;
    if (*word == '\'') {
        word++;
        word[strlen(word) - 1] = '\0';
    }
    bool works = deck_table_word(only, word) >= 0;
    free(text);
    return works;
}

static void refuse_unbuilt(struct deck_rules *c)
{
    struct deck *d = c->deck;
    d->derived.no_backend = d->run.backend == DECK_BACKEND_REF ? NULL : backend_cuda_missing();
    for (int row = 0; row < DECK_ROWS; row++) {
        const struct deck_param *p = &deck_table[row];
        if (!p->only || c->blamed[row] || d->source[row].bad || value_works(d, row))
            continue;
        /* there is nothing it could run on */
        if (row == DECK_ROW(run, backend) && d->derived.no_backend)
            continue;
        bool failed = c->failed;
        deck_rules_fail(c, row, EXIT_DECK, "%s is not built yet, only %s works", p->feature,
                        p->only);
        c->failed = failed;
        d->derived.not_built++;
    }
}

void deck_rules_resolve(struct deck *deck, int size, struct errors *errors)
{
    memset(&deck->derived, 0, sizeof deck->derived);
    struct deck_rules *c = xcalloc(1, sizeof *c);
    *c =
        (struct deck_rules){ .deck = deck, .errors = errors, .size = size, .failed = deck->unread };
    for (int row = 0; row < DECK_ROWS; row++)
        c->failed |= deck->source[row].bad;
    deck_presets_apply(deck);
    resolve_backend(c);
    deck_grids_resolve(c);
    resolve_language(c);
    if (deck->topology.layout != DECK_LAYOUT_LANGUAGE_ONLY)
        resolve_vision(c);
    resolve_eval(c);
    resolve_data(c);
    resolve_batch(c);
    resolve_length(c);
    resolve_lr(c);
    resolve_stage(c);
    check_log(c);
    check_optimizer(c);
    check_checkpoint(c);
    deck->derived.complete = !c->failed;
    refuse_unbuilt(c);
    free(c);
}

void deck_need_backend(const struct deck *deck, struct errors *errors)
{
    if (!deck->derived.no_backend)
        return;
    if (deck_given(deck, "run", "backend"))
        errors_add(errors, EXIT_ENVIRONMENT, "%s: error: run.backend = '%s': %s",
                   deck_where(deck, "run", "backend"),
                   deck->run.backend == DECK_BACKEND_CUDA ? "cuda" : "shadow",
                   deck->derived.no_backend);
    else
        errors_add(errors, EXIT_ENVIRONMENT, "%s: error: run.precision = 'bf16': %s",
                   deck_where(deck, "run", "precision"), deck->derived.no_backend);
}
