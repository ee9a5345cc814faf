/* hf_config_write.c - from the directory's keys a deck, and from a deck the config.json of an
 * export.
 *
 * An export's text_config keeps transformers from clamping the step of the state-space layers
 * (time_step_min, hf.md 8.1) and tells by num_nextn_predict_layers whether the encoder ends with a
 * LayerNorm (hf.md 4.2), since that is what the vision-language class looks at.
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "hf_config_internal.h"
#include "hf_names.h"
#include "image.h"

#define ROW(group, key) DECK_ROW(group, key)

/* ---- a deck that fits ------------------------------------------------------------------------ */

struct contents { /* which modules a directory holds, and what only tensors tell */
    bool has[MODEL_MODULES], final_norm, projector_norm;
    int64_t class_tokens, vocabulary;
};

static struct contents look(const struct safetensors *s)
{
    struct contents k = { .class_tokens = -1, .vocabulary = -1 };
    for (int i = 0; i < s->n; i++) {
        const struct safetensors_tensor *t = &s->tensor[i];
        char name[SAFETENSORS_NAME];
        const enum model_module m = hf_canonical(t->name, name);
        if (m == MODEL_MODULES)
            continue;
        k.has[m] = true;
        if (!strcmp(name, "vision_final_layernorm.weight") || !strcmp(name, "norm.weight"))
            k.final_norm = true;
        if (!strcmp(name, "mlp1.0.weight") ||
            !strcmp(name, "multi_modal_projector.layer_norm.weight"))
            k.projector_norm = true;
        if (!strcmp(name, "patch_generator.cls_token.token") ||
            !strcmp(name, "embeddings.cls_register_token"))
            k.class_tokens = t->shape[0];
        if (!strcmp(name, "backbone.embeddings.weight"))
            k.vocabulary = t->shape[0];
    }
    return k;
}

static void print_value(enum deck_row row, const struct hf_fact *f, FILE *out)
{
    char number[40];
    int digits = 15;
    do
        snprintf(number, sizeof number, "%.*g", digits, f->number);
    while (digits++ < 17 && strtod(number, NULL) != f->number);
    fprintf(out, "  %s = ", deck_table[row].key);
    if (*f->text)
        fprintf(out, "'%s'\n", f->text);
    else if (deck_table[row].type == DECK_TYPE_LOGICAL)
        fprintf(out, "%s\n", f->number != 0 ? ".true." : ".false.");
    else
        fprintf(out, "%s\n", number);
}

/* The facts of one group of the deck, in the deck's order. */
static void print_group(const char *group, const struct hf_facts *facts, FILE *out)
{
    for (int row = 0; row < DECK_ROWS; row++) {
        const struct hf_fact *f = hf_config_fact(facts, (enum deck_row)row);
        if (f && strcmp(deck_table[row].group, group) == 0)
            print_value((enum deck_row)row, f, out);
    }
}

static int64_t vocabulary_unit(int64_t rows)
{
    int64_t unit = 128;
    while (unit > 1 && rows % unit)
        unit /= 2;
    return unit;
}

/* A path as a namelist string. */
static void print_path(const char *key, const char *path, FILE *out)
{
    fprintf(out, "  %s = '", key);
    for (; *path; path++)
        fprintf(out, *path == '\'' ? "''" : "%c", *path);
    fputs("'\n", out);
}

static void print_language(const struct hf_config *c, const struct hf_facts *facts, FILE *out)
{
    const json_t *most = json_object_get(c->section[HF_TEXT], "max_position_embeddings");
    const struct hf_fact *rows = hf_config_fact(facts, ROW(language, vocab_size));
    int64_t length = 8192;
    if (json_is_integer(most) && json_integer_value(most) > 1 && json_integer_value(most) < length)
        length = json_integer_value(most);
    fputs("&language\n  preset = 'custom'\n", out);
    print_group("language", facts, out);
    if (rows)
        fprintf(out, "  make_vocab_size_divisible_by = %" PRId64 "  ! no rows of padding\n",
                vocabulary_unit((int64_t)rows->number));
    fprintf(out, "  seq_length = %" PRId64 "  ! of the training, a choice\n/\n", length);
    if (hf_config_fact(facts, ROW(moe, num_experts))) {
        fputs("&moe\n", out);
        print_group("moe", facts, out);
        fputs("  moe_router_enable_expert_bias = .true.\n/\n", out);
    }
    if (hf_config_fact(facts, ROW(mamba, mamba_num_heads))) {
        fputs("&mamba\n", out);
        print_group("mamba", facts, out);
        fputs("/\n", out);
    }
}

static void print_deck(const struct hf_config *c, const char *directory, const struct contents *k,
                       const struct hf_facts *facts, FILE *out)
{
    char shown[2 * SAFETENSORS_PATH];
    fprintf(
        out,
        "! The deck that fits %s. Still to be given: run.train_iters or run.train_samples,\n"
        "! lr.lr, the data (generated samples without), and what else the training should be.\n",
        printable(shown, sizeof shown, directory));
    if (!k->has[MODEL_VISION])
        fputs("&topology\n  layout = 'language_only'  ! the directory has no encoder\n/\n", out);
    if (k->has[MODEL_LANGUAGE])
        print_language(c, facts, out);
    if (k->has[MODEL_VISION]) {
        fputs("&vision\n  preset = 'custom'\n", out);
        print_group("vision", facts, out);
        if (!hf_config_fact(facts, ROW(vision, class_token_len)))
            fprintf(out, "  class_token_len = %" PRId64 "\n", k->class_tokens);
        if (k->has[MODEL_PROJECTOR] && !k->final_norm)
            fputs("  final_layernorm = .false.  ! its projector was trained without\n", out);
        fputs("/\n", out);
    }
    if (k->has[MODEL_PROJECTOR])
        fprintf(
            out,
            "&projector\n  vision_projection_type = 'mlp'\n  projection_normalization = '%s'\n/\n",
            k->projector_norm ? "rmsnorm" : "none");
    if (hf_config_fact(facts, ROW(data, image_token_id))) {
        fputs("&data\n", out);
        print_group("data", facts, out);
        fputs("/\n", out);
    }
    fputs("&checkpoint\n", out);
    static const char *const key[MODEL_MODULES] = { "import_vision", "import_projector",
                                                    "import_language" };
    for (int m = 0; m < MODEL_MODULES; m++)
        if (k->has[m])
            print_path(key[m], directory, out);
    fputs("/\n", out);
}

/* What tensors and config.json both tell. */
static void compare_tensors(const struct hf_config *c, const struct contents *k,
                            const struct hf_facts *facts, struct errors *errors)
{
    const struct hf_fact *v = hf_config_fact(facts, ROW(language, vocab_size)),
                         *w = hf_config_fact(facts, ROW(vision, class_token_len));
    if (v && k->vocabulary >= 0 && v->number != (double)k->vocabulary)
        errors_add(errors, EXIT_CHECKPOINT,
                   "%s: error: %s = %.0f, but the embedding has %" PRId64 " rows", c->path, v->key,
                   v->number, k->vocabulary);
    if (w && k->class_tokens >= 0 && w->number != (double)k->class_tokens)
        errors_add(errors, EXIT_CHECKPOINT,
                   "%s: error: %s = %.0f, but the directory has %" PRId64 " class tokens", c->path,
                   w->key, w->number, k->class_tokens);
}

void hf_config_print_deck(const char *directory, FILE *out, struct errors *errors)
{
    struct hf_facts *facts = xcalloc(1, sizeof *facts);
    struct safetensors s;
    const int before = errors->count;
    if (safetensors_open(&s, directory, errors)) {
        const struct contents k = look(&s);
        struct hf_config *c = hf_config_open(directory, errors);
        if (c) {
            hf_config_facts(c, k.has, facts, errors);
            if (errors->count == before)
                compare_tensors(c, &k, facts, errors);
            if (errors->count == before)
                print_deck(c, directory, &k, facts, out);
        }
        hf_config_free(c);
        safetensors_free(&s);
    }
    free(facts);
}

/* ---- config.json of an export ---------------------------------------------------------------- */

static json_t *deck_value(const struct deck *deck, enum deck_row row)
{
    struct deck *d = (struct deck *)deck; /* the accessors take a deck that can be written */
    switch (deck_table[row].type) {
    case DECK_TYPE_INTEGER: return json_integer(*deck_integer(d, row));
    case DECK_TYPE_REAL: return json_real(*deck_real(d, row));
    default: FATAL(EXIT_INTERNAL, "%s is no number of a config.json", deck_table[row].key);
    }
}

static void put(json_t *o, const char *names, json_t *value)
{
    char name[64];
    snprintf(name, sizeof name, "%.*s", (int)strcspn(names, " "), names);
    const int failed = json_object_set_new(o, name, value);
    ASSERT(!failed);
}

/* The table's keys of a section. */
static void put_section(json_t *o, const struct deck *deck, enum hf_section s)
{
    for (int k = 0; k < hf_n_keys; k++)
        if (hf_keys[k].section == s &&
            (!hf_keys[k].letter || strchr(deck->derived.pattern, hf_keys[k].letter)) &&
            !deck_table_is_unset(deck, hf_keys[k].row))
            put(o, hf_keys[k].names, deck_value(deck, hf_keys[k].row));
    for (int k = 0; k < hf_n_fixed_keys; k++)
        if (hf_fixed_keys[k].section == s && hf_fixed_keys[k].written &&
            (!hf_fixed_keys[k].letter || strchr(deck->derived.pattern, hf_fixed_keys[k].letter)))
            put(o, hf_fixed_keys[k].names,
                json_loads(hf_fixed_keys[k].value, JSON_DECODE_ANY, NULL));
}

static void put_text(json_t *o, const struct deck *deck, enum hf_kind kind,
                     const struct hf_config *special)
{
    static const char *const ids[] = { "bos_token_id", "eos_token_id", "pad_token_id",
                                       "max_position_embeddings" };
    put(o, "model_type", json_string("nemotron_h"));
    put_section(o, deck, HF_TEXT);
    put(o, "hybrid_override_pattern", json_string(deck->derived.pattern));
    put(o, "num_hidden_layers", json_integer(deck->derived.num_layers));
    put(o, "time_step_min", json_real(1e-30));
    put(o, "initializer_range", json_real(deck->language.init_method_std));
    put(o, "max_position_embeddings", json_integer(deck->language.seq_length));
    put(o, "pad_token_id", json_integer(deck->data.pad_token_id));
    put(o, "num_nextn_predict_layers",
        json_integer(kind == HF_VLM && deck->vision.final_layernorm));
    for (size_t i = 0; special && i < sizeof ids / sizeof ids[0]; i++) {
        const json_t *v = json_object_get(special->section[HF_TEXT], ids[i]);
        if (v)
            put(o, ids[i], json_deep_copy(v));
    }
}

static json_t *triple(const double *x)
{
    return json_pack("[f,f,f]", x[0], x[1], x[2]);
}

static void put_vision(json_t *o, const struct deck *deck, enum hf_kind kind)
{
    /* Only the sum counts for the features; these are the published splits. */
    const int64_t c = deck->vision.class_token_len, registers = c == 10  ? 7
                                                                : c == 8 ? 4
                                                                : c > 0  ? c - 1
                                                                         : 0;
    put(o, "model_type", json_string("radio"));
    put_section(o, deck, HF_ENCODER);
    put(o, "mlp_ratio",
        json_real((double)deck->vision.ffn_hidden_size / (double)deck->vision.hidden_size));
    put(o, "hidden_act", json_string("gelu_fast"));
    put(o, "image_size", json_integer(deck->vision.img_h));
    put(o, "num_cls_tokens", json_integer(c - registers));
    put(o, "num_registers", json_integer(registers));
    put(o, "summary_idxs", json_pack("[i]", 0));
    put(o, "norm_mean", triple(image_mean));
    put(o, "norm_std", triple(image_deviation));
    put(o, "video_temporal_patch_size", kind == HF_VLM ? json_integer(2) : json_null());
}

/* With as few digits as give every number back. */
static char *dump(const json_t *root)
{
    for (size_t digits = 15; digits <= 17; digits++) {
        char *text =
            json_dumps(root, JSON_INDENT(2) | JSON_SORT_KEYS | JSON_REAL_PRECISION(digits));
        json_t *back = text ? json_loads(text, 0, NULL) : NULL;
        const bool same = back && json_equal(back, (json_t *)root);
        json_decref(back);
        if (same) {
            char *owned = xasprintf("%s\n", text);
            free(text);
            return owned;
        }
        free(text);
    }
    FATAL(EXIT_INTERNAL, "a config.json cannot be written");
}

char *hf_config_text(const struct deck *deck, enum hf_kind kind, const char *dtype,
                     int64_t image_token, const struct hf_config *special)
{
    static const char *const classes[] = { [HF_LANGUAGE] = "NemotronHForCausalLM",
                                           [HF_VISION] = "RadioModel",
                                           [HF_VLM] = "NemotronH_Omni_Reasoning_V3" };
    json_t *root = json_object();
    ASSERT(root != NULL);
    if (kind == HF_LANGUAGE) {
        put_text(root, deck, kind, special);
    } else if (kind == HF_VISION) {
        put_vision(root, deck, kind);
    } else {
        json_t *text = json_object(), *vision = json_object();
        put_text(text, deck, kind, special);
        put_vision(vision, deck, kind);
        put_section(root, deck, HF_TOP);
        put(root, "model_type", json_string("nemotron_h_omni"));
        put(root, "text_config", text);
        put(root, "vision_config", vision);
        put(root, "audio_config", json_null());
        put(root, "image_token_id", image_token >= 0 ? json_integer(image_token) : json_null());
        put(root, "projector_hidden_size", json_integer(16 * deck->vision.hidden_size));
        put(root, "vision_hidden_size", json_integer(deck->vision.hidden_size));
        put(root, "video_temporal_patch_size", json_integer(2));
        if (!deck->vision.dynamic_resolution)
            put(root, "force_image_size", json_integer(deck->vision.img_h));
    }
    put(root, "architectures", json_pack("[s]", classes[kind]));
    put(root, "dtype", json_string(dtype));
    put(root, "torch_dtype", json_string(dtype));
    char *out = dump(root);
    json_decref(root);
    return out;
}
