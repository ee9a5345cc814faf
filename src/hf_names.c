/* hf_names.c - see hf_names.h. {i} is the layer, {j} the expert; parts of one parameter are
 * separated by commas. */
#include "hf_names.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* PLAIN: same rows. VOCABULARY: V of our Vp rows. QKV: per KV group its query heads, k, v; one part
 * is [all q; all k; all v]. EXPERTS: one tensor per expert; without {j} all of them, stacked as
 * ours. */
enum form { PLAIN, VOCABULARY, QKV, EXPERTS };

/* clang-format off */
static const struct name {
    enum model_module module;
    enum form form;
    const char *ours;
    const char *spelling[HF_SPELLINGS]; /* canonical; the first is the published one */
} names[] = {
#define L MODEL_LANGUAGE
#define OURS(rest) "decoder.layers.{i}." rest
#define HF(rest) "backbone.layers.{i}." rest
    { L, VOCABULARY, "embedding.word_embeddings.weight", { "backbone.embeddings.weight" } },
    { L, PLAIN, "decoder.final_norm.weight", { "backbone.norm_f.weight" } },
    { L, VOCABULARY, "output_layer.weight", { "lm_head.weight" } },
    { L, PLAIN, OURS("mixer.in_proj.layer_norm_weight"), { HF("norm.weight") } },
    { L, PLAIN, OURS("self_attention.linear_qkv.layer_norm_weight"), { HF("norm.weight") } },
    { L, PLAIN, OURS("mlp.linear_fc1.layer_norm_weight"), { HF("norm.weight") } },
    { L, PLAIN, OURS("pre_mlp_layernorm.weight"), { HF("norm.weight") } },
    { L, PLAIN, OURS("mixer.in_proj.weight"), { HF("mixer.in_proj.weight") } },
    { L, PLAIN, OURS("mixer.conv1d_weight"), { HF("mixer.conv1d.weight") } },
    { L, PLAIN, OURS("mixer.conv1d_bias"), { HF("mixer.conv1d.bias") } },
    { L, PLAIN, OURS("mixer.dt_bias"), { HF("mixer.dt_bias") } },
    { L, PLAIN, OURS("mixer.A_log"), { HF("mixer.A_log") } },
    { L, PLAIN, OURS("mixer.D"), { HF("mixer.D") } },
    { L, PLAIN, OURS("mixer.norm.weight"), { HF("mixer.norm.weight") } },
    { L, PLAIN, OURS("mixer.out_proj.weight"), { HF("mixer.out_proj.weight") } },
    { L, QKV, OURS("self_attention.linear_qkv.weight"),
      { HF("mixer.q_proj.weight") "," HF("mixer.k_proj.weight") "," HF("mixer.v_proj.weight") } },
    { L, PLAIN, OURS("self_attention.linear_proj.weight"), { HF("mixer.o_proj.weight") } },
    { L, PLAIN, OURS("mlp.linear_fc1.weight"), { HF("mixer.up_proj.weight") } },
    { L, PLAIN, OURS("mlp.linear_fc2.weight"), { HF("mixer.down_proj.weight") } },
    { L, PLAIN, OURS("mlp.router.weight"), { HF("mixer.gate.weight") } },
    { L, PLAIN, OURS("mlp.router.expert_bias"), { HF("mixer.gate.e_score_correction_bias") } },
    { L, EXPERTS, OURS("mlp.experts.linear_fc1.weight"),
      { HF("mixer.experts.{j}.up_proj.weight"), HF("mixer.experts.up_proj") } },
    { L, EXPERTS, OURS("mlp.experts.linear_fc2.weight"),
      { HF("mixer.experts.{j}.down_proj.weight"), HF("mixer.experts.down_proj") } },
    { L, PLAIN, OURS("mlp.shared_experts.linear_fc1.weight"),
      { HF("mixer.shared_experts.up_proj.weight") } },
    { L, PLAIN, OURS("mlp.shared_experts.linear_fc2.weight"),
      { HF("mixer.shared_experts.down_proj.weight") } },
#undef L
#undef HF

#define V MODEL_VISION
#define DISK(rest) "blocks.{i}." rest
#define LIB(rest) "encoder.layer.{i}." rest
#define BOTH(kind) DISK(kind), LIB(kind)
#define SPLIT(p, q, k, v, e) p q e "," p k e "," p v e
    { V, PLAIN, "class_token",
      { "patch_generator.cls_token.token", "embeddings.cls_register_token" } },
    { V, PLAIN, "position_embeddings",
      { "patch_generator.pos_embed", "embeddings.position_embedding" } },
    { V, PLAIN, "embedder.weight",
      { "patch_generator.embedder.weight", "embeddings.patch_projection.weight" } },
    { V, PLAIN, OURS("self_attention.linear_qkv.layer_norm_weight"), { BOTH("norm1.weight") } },
    { V, PLAIN, OURS("self_attention.linear_qkv.layer_norm_bias"), { BOTH("norm1.bias") } },
    { V, QKV, OURS("self_attention.linear_qkv.weight"),
      { DISK("attn.qkv.weight"), SPLIT(LIB("attention."), "q_proj", "k_proj", "v_proj", ".weight"),
        SPLIT(DISK("attn."), "q_proj", "k_proj", "v_proj", ".weight"),
        SPLIT(LIB("attention.attention."), "query", "key", "value", ".weight") } },
    { V, QKV, OURS("self_attention.linear_qkv.bias"),
      { DISK("attn.qkv.bias"), SPLIT(LIB("attention."), "q_proj", "k_proj", "v_proj", ".bias"),
        SPLIT(DISK("attn."), "q_proj", "k_proj", "v_proj", ".bias"),
        SPLIT(LIB("attention.attention."), "query", "key", "value", ".bias") } },
    { V, PLAIN, OURS("self_attention.linear_proj.weight"),
      { DISK("attn.proj.weight"), LIB("attention.o_proj.weight"),
        LIB("attention.output.dense.weight") } },
    { V, PLAIN, OURS("self_attention.linear_proj.bias"),
      { DISK("attn.proj.bias"), LIB("attention.o_proj.bias"),
        LIB("attention.output.dense.bias") } },
    { V, PLAIN, OURS("mlp.linear_fc1.layer_norm_weight"), { BOTH("norm2.weight") } },
    { V, PLAIN, OURS("mlp.linear_fc1.layer_norm_bias"), { BOTH("norm2.bias") } },
    { V, PLAIN, OURS("mlp.linear_fc1.weight"), { BOTH("mlp.fc1.weight") } },
    { V, PLAIN, OURS("mlp.linear_fc1.bias"), { BOTH("mlp.fc1.bias") } },
    { V, PLAIN, OURS("mlp.linear_fc2.weight"), { BOTH("mlp.fc2.weight") } },
    { V, PLAIN, OURS("mlp.linear_fc2.bias"), { BOTH("mlp.fc2.bias") } },
    { V, PLAIN, "decoder.final_layernorm.weight",
      { "vision_final_layernorm.weight", "norm.weight" } },
    { V, PLAIN, "decoder.final_layernorm.bias", { "vision_final_layernorm.bias", "norm.bias" } },

#define P MODEL_PROJECTOR
    { P, PLAIN, "encoder.weight", { "encoder.weight" } },
    { P, PLAIN, "encoder.linear_fc1.layer_norm_weight",
      { "mlp1.0.weight", "multi_modal_projector.layer_norm.weight",
        "encoder.linear_fc1.layer_norm_weight" } },
    { P, PLAIN, "encoder.linear_fc1.weight",
      { "mlp1.1.weight", "multi_modal_projector.linear_1.weight", "encoder.linear_fc1.weight" } },
    { P, PLAIN, "encoder.linear_fc2.weight",
      { "mlp1.3.weight", "multi_modal_projector.linear_2.weight", "encoder.linear_fc2.weight" } },
};
/* clang-format on */

/* Layer scale of a block's attention (1) and MLP (2): one number per output row of proj and fc2. */
static const struct scale {
    const char *ours[2];
    const char *name[4];
} scales[] = {
    { { OURS("self_attention.linear_proj.weight"), OURS("self_attention.linear_proj.bias") },
      { DISK("ls1"), DISK("ls1.gamma"), BOTH("layer_scale1.lambda1") } },
    { { OURS("mlp.linear_fc2.weight"), OURS("mlp.linear_fc2.bias") },
      { DISK("ls2"), DISK("ls2.gamma"), BOTH("layer_scale2.lambda1") } },
};

/* Where a module's tensors lie: what replaces the prefix makes the canonical name. First match
 * counts. */
static const struct prefix {
    const char *on_disk;
    enum model_module module;
    const char *canonical;
} prefixes[] = {
    { "language_model.backbone.", MODEL_LANGUAGE, "backbone." },
    { "language_model.model.", MODEL_LANGUAGE, "backbone." },
    { "language_model.lm_head.", MODEL_LANGUAGE, "lm_head." },
    { "backbone.", MODEL_LANGUAGE, "backbone." },
    { "model.", MODEL_LANGUAGE, "backbone." },
    { "lm_head.", MODEL_LANGUAGE, "lm_head." },
    { "vision_model.radio_model.model.", V, "" },
    { "vision_model.radio_model.", V, "" },
    { "vision_model.", V, "" },
    { "radio_model.model.", V, "" },
    { "radio_model.", V, "" },
    { "vision_projector.vision_final_layernorm.", V, "vision_final_layernorm." },
    { "vision_final_layernorm.", V, "vision_final_layernorm." },
    { "embeddings.", V, "embeddings." },
    { "encoder.layer.", V, "encoder.layer." },
    { "input_conditioner.", V, "input_conditioner." },
    { "summary_idxs", V, "summary_idxs" },
    { "mlp1.", P, "mlp1." },
    { "multi_modal_projector.", P, "multi_modal_projector." },
    { "encoder.weight", P, "encoder.weight" },
    { "encoder.linear_fc", P, "encoder.linear_fc" },
};

/* Known and not used: module MODEL_MODULES = by the whole name. A pattern that ends with a dot is a
 * prefix, one that starts with a dot lies anywhere. */
static const struct drop {
    enum model_module module;
    const char *pattern, *group;
} drops[] = {
    { V, "patch_generator.video_embedder.", "video embedder" },
    { V, "embeddings.video_patch_projection.", "video embedder" },
    { V, "summary_idxs", "summary indices" },
    { V, "adaptors.", "adaptors" },
    { V, "feature_normalizer.", "feature normalizer" },
    { V, "head.", "heads" },
    { V, ".head.", "heads" },
    { MODEL_MODULES, "adaptors.", "adaptors" },
    { MODEL_MODULES, "feature_normalizer.", "feature normalizer" },
    { MODEL_MODULES, "sound_encoder.", "audio" },
    { MODEL_MODULES, "sound_projection.", "audio" },
    { MODEL_MODULES, "audio_tower.", "audio" },
    { MODEL_MODULES, "embed_audio.", "audio" },
    { MODEL_MODULES, "mtp.", "multi-token prediction" },
    { MODEL_MODULES, "language_model.mtp.", "multi-token prediction" },
};

#define COUNT(table) ((int)(sizeof table / sizeof table[0]))

/* ---- patterns -------------------------------------------------------------------------------- */

static bool starts_with(const char *text, const char *start)
{
    return strncmp(text, start, strlen(start)) == 0;
}

/* Put numbers into a pattern of n bytes. */
static void expand(const char *pattern, size_t n, int64_t i, int64_t j, char out[SAFETENSORS_NAME])
{
    size_t used = 0;
    for (const char *p = pattern; p < pattern + n; p++) {
        if (*p == '{') {
            used += (size_t)snprintf(out + used, SAFETENSORS_NAME - used, "%" PRId64,
                                     p[1] == 'i' ? i : j);
            p += 2;
        } else {
            out[used++] = *p;
        }
        ASSERT(used < SAFETENSORS_NAME);
    }
    out[used] = '\0';
}

/* Whether a name is the pattern with a number for {i}; the number, without leading zeros, in *i. */
static bool match(const char *pattern, const char *name, int64_t *i)
{
    *i = -1;
    for (; *pattern; pattern++) {
        if (*pattern != '{') {
            if (*pattern != *name++)
                return false;
            continue;
        }
        const char *digits = name;
        int64_t value = 0;
        for (; *name >= '0' && *name <= '9' && name - digits < 9; name++)
            value = 10 * value + (*name - '0');
        if (name == digits || (*digits == '0' && name - digits > 1))
            return false;
        *i = value;
        pattern += 2;
    }
    return *name == '\0';
}

static const struct name *find_name(const struct param *p, int64_t *layer)
{
    for (int k = 0; k < COUNT(names); k++)
        if (names[k].module == p->module && match(names[k].ours, p->name, layer))
            return &names[k];
    FATAL(EXIT_INTERNAL, "parameter %s has no name in a Hugging Face directory", p->name);
}

/* ---- maps ------------------------------------------------------------------------------------ */

static void add_run(struct hf_map *m, int source, int64_t source_row, int64_t rows)
{
    int64_t row = m->n_runs ? m->run[m->n_runs - 1].row + m->run[m->n_runs - 1].rows : 0;
    m->run[m->n_runs++] = (struct hf_run){ source, row, source_row, rows };
}

/* One more tensor with `rows` rows in dimension 0 and the parameter's other dimensions. */
static void add_source(struct hf_map *m, const struct param *p, int64_t rows)
{
    struct hf_source *s = &m->source[m->n_sources++];
    s->ndim = p->ndim;
    memcpy(s->shape, p->shape, sizeof s->shape);
    s->shape[0] = rows;
}

/* Rows of an attention's q, k, v: n query heads and g groups of width d, ours group by group. */
static void map_qkv(struct hf_map *m, const struct deck *deck, const struct param *p, int parts)
{
    const bool vision = p->module == V;
    const int64_t n =
        vision ? deck->vision.num_attention_heads : deck->language.num_attention_heads;
    const int64_t g = vision ? n : deck->language.num_query_groups;
    const int64_t d = vision ? deck->vision.hidden_size / n : deck->language.kv_channels;
    const int64_t height[HF_PARTS] = { n * d, g * d, g * d };
    int64_t first[HF_PARTS] = { 0, n * d, (n + g) * d };
    int source[HF_PARTS] = { 0, 0, 0 };
    if (parts == 1)
        add_source(m, p, (n + 2 * g) * d);
    for (int k = 0; k < parts && parts > 1; k++) {
        add_source(m, p, height[k]);
        source[k] = k;
        first[k] = 0;
    }
    m->run = xcalloc((size_t)(HF_PARTS * g), sizeof *m->run);
    for (int64_t j = 0; j < g; j++)
        for (int k = 0; k < HF_PARTS; k++)
            add_run(m, source[k], first[k] + j * (height[k] / g), height[k] / g);
}

static void map_experts(struct hf_map *m, const struct param *p)
{
    const int64_t experts = p->shape[0];
    m->run = xcalloc((size_t)experts, sizeof *m->run);
    for (int64_t j = 0; j < experts; j++) {
        struct hf_source *s = &m->source[m->n_sources++];
        s->ndim = p->ndim - 1;
        memcpy(s->shape, p->shape + 1, (size_t)s->ndim * sizeof *s->shape);
        add_run(m, (int)j, 0, p->shape[1]);
    }
}

bool hf_map_init(struct hf_map *m, const struct deck *deck, const struct param *p, int spelling)
{
    int64_t layer;
    const struct name *name = find_name(p, &layer);
    *m = (struct hf_map){ .rows = 1, .cols = p->ndim > 1 ? p->shape[p->ndim - 1] : 1 };
    if (spelling >= HF_SPELLINGS || !name->spelling[spelling])
        return false;
    for (int d = 0; d < (p->ndim > 1 ? p->ndim - 1 : 1); d++)
        m->rows *= p->shape[d];
    const char *text = name->spelling[spelling];
    const bool each = strstr(text, "{j}") != NULL;
    m->source = xcalloc((size_t)(each ? p->shape[0] : HF_PARTS), sizeof *m->source);
    if (name->form == QKV) {
        map_qkv(m, deck, p, strchr(text, ',') ? HF_PARTS : 1);
    } else if (each) {
        map_experts(m, p);
    } else {
        const bool cut = name->form == VOCABULARY;
        add_source(m, p, cut ? deck->language.vocab_size : p->shape[0]);
        m->run = xcalloc(1, sizeof *m->run);
        add_run(m, 0, 0, cut ? deck->language.vocab_size : m->rows);
    }
    for (int k = 0; k < m->n_sources; k++) {
        const size_t n = strcspn(text, ",");
        expand(text, n, layer, k, m->source[k].name);
        text += text[n] == ',' ? n + 1 : 0;
    }
    return true;
}

void hf_map_free(struct hf_map *m)
{
    free(m->source);
    free(m->run);
    *m = (struct hf_map){ .rows = 0 };
}

/* Rows [row, row + n) and columns [col, col + cols) of the parameter; `local` is that of the first.
 */
static void walk_rows(const struct hf_map *m, int64_t row, int64_t n, int64_t col, int64_t cols,
                      int64_t local, hf_visit *visit, void *ctx)
{
    for (int k = 0; k < m->n_runs; k++) {
        const struct hf_run *r = &m->run[k];
        const int64_t from = row > r->row ? row : r->row,
                      end = row + n < r->row + r->rows ? row + n : r->row + r->rows;
        if (from >= end)
            continue;
        const int64_t source_row = r->source_row + from - r->row, at = local + (from - row) * cols;
        if (cols == m->cols) {
            visit(ctx, r->source, source_row * cols, at, (end - from) * cols);
            continue;
        }
        for (int64_t i = 0; i < end - from; i++)
            visit(ctx, r->source, (source_row + i) * m->cols + col, at + i * cols, cols);
    }
}

void hf_map_walk(const struct hf_map *m, const struct param *p, const int64_t *start,
                 const int64_t *count, hf_visit *visit, void *ctx)
{
    const int last =
        p->ndim > 1 ? p->ndim - 2 : 0; /* the dimension whose indices are rows side by side */
    const int64_t col = p->ndim > 1 ? start[last + 1] : 0, cols = p->ndim > 1 ? count[last + 1] : 1;
    int64_t outer = 1;
    for (int d = 0; d < last; d++)
        outer *= count[d];
    for (int64_t k = 0; k < outer; k++) {
        int64_t row = 0, rest = k, left = outer;
        for (int d = 0; d < last; d++) {
            left /= count[d];
            row = row * p->shape[d] + start[d] + rest / left;
            rest %= left;
        }
        walk_rows(m, row * p->shape[last] + start[last], count[last], col, cols,
                  k * count[last] * cols, visit, ctx);
    }
}

const char *hf_scale_name(const struct param *p, int number, char out[SAFETENSORS_NAME])
{
    int64_t layer;
    for (int k = 0; p->module == V && number < COUNT(scales[0].name) && k < COUNT(scales); k++)
        for (int o = 0; o < 2; o++)
            if (match(scales[k].ours[o], p->name, &layer)) {
                expand(scales[k].name[number], strlen(scales[k].name[number]), layer, 0, out);
                return out;
            }
    return NULL;
}

/* ---- a directory's names --------------------------------------------------------------------- */

enum model_module hf_canonical(const char *name, char out[SAFETENSORS_NAME])
{
    for (int k = 0; k < COUNT(prefixes); k++)
        if (starts_with(name, prefixes[k].on_disk)) {
            snprintf(out, SAFETENSORS_NAME, "%s%s", prefixes[k].canonical,
                     name + strlen(prefixes[k].on_disk));
            return prefixes[k].module;
        }
    snprintf(out, SAFETENSORS_NAME, "%s", name);
    return MODEL_MODULES;
}

const char *hf_dropped(enum model_module module, const char *name, const char *canonical)
{
    for (int k = 0; k < COUNT(drops); k++) {
        const char *pattern = drops[k].pattern,
                   *text = drops[k].module == MODEL_MODULES ? name : canonical;
        const size_t n = strlen(pattern);
        if (drops[k].module != MODEL_MODULES && drops[k].module != module)
            continue;
        if (pattern[0] == '.'       ? strstr(text, pattern) != NULL
            : pattern[n - 1] == '.' ? starts_with(text, pattern)
                                    : strcmp(text, pattern) == 0)
            return drops[k].group;
    }
    return NULL;
}

const char *hf_refused(enum model_module module, const char *canonical, const char *type)
{
    const size_t n = strlen(canonical);
    if (strstr(canonical, "parametrizations."))
        return "a parametrised weight (spectral reparametrisation) must be merged before";
    if (strstr(canonical, "_latent_proj"))
        return "experts in a latent space (moe_latent_size) do not exist in this program";
    if (strstr(canonical, "_scale_inv") || (n > 6 && strcmp(canonical + n - 6, "_scale") == 0) ||
        strstr(canonical, "_scale_2") || strncmp(type, "F8_", 3) == 0 || strcmp(type, "F4") == 0 ||
        strncmp(type, "F6_", 3) == 0 || strcmp(type, "I8") == 0 || strcmp(type, "U8") == 0)
        return "quantised weights are not read; take the BF16 directory of the model";
    if (module == MODEL_LANGUAGE && n > 5 && strcmp(canonical + n - 5, ".bias") == 0 &&
        !strstr(canonical, ".conv1d."))
        return "the language model's linear layers have no bias in this program";
    return NULL;
}

void hf_published(enum model_module module, const char *canonical, bool vlm,
                  char out[SAFETENSORS_NAME])
{
    const char *prefix = "";
    if (module == MODEL_LANGUAGE && vlm)
        prefix = "language_model.";
    else if (module == V && !starts_with(canonical, "vision_final_layernorm."))
        prefix = starts_with(canonical, "input_conditioner.")
                     ? vlm ? "vision_model.radio_model." : "radio_model."
                 : vlm ? "vision_model.radio_model.model."
                       : "radio_model.model.";
    const int n = snprintf(out, SAFETENSORS_NAME, "%s%s", prefix, canonical);
    ASSERT(n > 0 && n < SAFETENSORS_NAME);
}
