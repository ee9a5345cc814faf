/* hf_config.c - see hf_config.h. Here: the table, reading, and the comparison with a deck. */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "file.h"
#include "hf_config_internal.h"
#include "image.h"

enum { CONFIG_BYTES = 16 << 20, CONFIG_DEPTH = 64 };

static const char *const section_names[HF_SECTIONS] = { "text_config", "vision_config", "" };

/* clang-format off */
#define ROW(group, key) DECK_ROW(group, key)
const struct hf_key hf_keys[] = {
    { HF_TEXT, 0,   "hidden_size",                          ROW(language, hidden_size), false, true },
    { HF_TEXT, 0,   "vocab_size",                           ROW(language, vocab_size), false, true },
    { HF_TEXT, 0,   "layer_norm_epsilon norm_eps rms_norm_eps", ROW(language, layernorm_epsilon), false, true },
    { HF_TEXT, '*', "num_attention_heads",                  ROW(language, num_attention_heads), false, true },
    { HF_TEXT, '*', "num_key_value_heads",                  ROW(language, num_query_groups), false, true },
    { HF_TEXT, '*', "head_dim attention_head_dim",          ROW(language, kv_channels), false, true },
    { HF_TEXT, '-', "intermediate_size",                    ROW(language, ffn_hidden_size), false, true },
    { HF_TEXT, 'M', "mamba_num_heads",                      ROW(mamba, mamba_num_heads), false, true },
    { HF_TEXT, 'M', "mamba_head_dim",                       ROW(mamba, mamba_head_dim), false, true },
    { HF_TEXT, 'M', "n_groups mamba_n_groups",              ROW(mamba, mamba_num_groups), false, true },
    { HF_TEXT, 'M', "ssm_state_size",                       ROW(mamba, mamba_state_dim), false, true },
    { HF_TEXT, 'M', "conv_kernel mamba_d_conv",             ROW(mamba, linear_conv_kernel_dim), false, true },
    { HF_TEXT, 'M', "chunk_size mamba_chunk_size",          ROW(mamba, mamba_chunk_size), true, false },
    { HF_TEXT, 'E', "n_routed_experts num_local_experts",   ROW(moe, num_experts), false, true },
    { HF_TEXT, 'E', "num_experts_per_tok",                  ROW(moe, moe_router_topk), false, true },
    { HF_TEXT, 'E', "routed_scaling_factor",                ROW(moe, moe_router_topk_scaling_factor), false, true },
    { HF_TEXT, 'E', "moe_intermediate_size",                ROW(moe, moe_ffn_hidden_size), false, true },
    { HF_TEXT, 'E', "moe_shared_expert_intermediate_size",  ROW(moe, moe_shared_expert_intermediate_size), false, true },
    { HF_ENCODER, 0, "hidden_size",                         ROW(vision, hidden_size), false, false },
    { HF_ENCODER, 0, "num_hidden_layers",                   ROW(vision, num_layers), false, false },
    { HF_ENCODER, 0, "num_attention_heads",                 ROW(vision, num_attention_heads), false, false },
    { HF_ENCODER, 0, "patch_size",                          ROW(vision, patch_dim), false, true },
    { HF_ENCODER, 0, "max_img_size",                        ROW(vision, max_img_h), false, false },
    { HF_ENCODER, 0, "max_img_size",                        ROW(vision, max_img_w), false, false },
    { HF_TOP, 0,    "image_token_id img_context_token_id",  ROW(data, image_token_id), true, false },
};
const int hf_n_keys = sizeof hf_keys / sizeof hf_keys[0];

const struct hf_fixed hf_fixed_keys[] = {
    { HF_TEXT, 0,   "tie_word_embeddings", "false", true },
    { HF_TEXT, 0,   "mlp_hidden_act", "\"relu2\"", true },
    { HF_TEXT, 0,   "attention_bias", "false", true },
    { HF_TEXT, 0,   "mlp_bias", "false", true },
    { HF_TEXT, 0,   "use_bias", "false", true },
    { HF_TEXT, 'M', "mamba_proj_bias", "false", true },
    { HF_TEXT, 'M', "mamba_hidden_act", "\"silu\"", true },
    { HF_TEXT, 'M', "use_conv_bias mamba_conv_bias", "true", true },
    { HF_TEXT, 'E', "norm_topk_prob", "true", true },
    { HF_TEXT, 'E', "n_group", "1", true },
    { HF_TEXT, 'E', "topk_group", "1", true },
    { HF_TEXT, 'E', "n_shared_experts", "1", true },
    { HF_TEXT, 'E', "moe_latent_size", "null", true },
    { HF_ENCODER, 0, "use_swiglu_ffn", "false", true },
    { HF_ENCODER, 0, "qkv_bias", "true", true },
    { HF_ENCODER, 0, "layer_norm_eps", "1e-6", true },
    { HF_ENCODER, 0, "num_channels", "3", true },
    { HF_ENCODER, 0, "vitdet_window_size", "null", false },
    { HF_TOP, 0,    "downsample_ratio", "0.5", true },
    { HF_TOP, 0,    "ps_version", "\"v2\"", false },
};
const int hf_n_fixed_keys = sizeof hf_fixed_keys / sizeof hf_fixed_keys[0];

/* Remote code names its encoder by a word. */
static const struct { const char *name; double width, layers, heads, ffn; } encoders[] = {
    { "vit_huge_patch16_224",  1280, 32, 16, 5120 },
    { "vit_large_patch16_224", 1024, 24, 16, 4096 },
    { "vit_base_patch16_224",   768, 12, 12, 3072 },
};
/* clang-format on */

/* ---- reading --------------------------------------------------------------------------------- */

/* Infinity and NaN are no JSON but are in published files: they become null, which no key that is
 * looked at may be. False when brackets nest too deeply. */
static bool make_json(char *text, size_t n)
{
    static const char *const words[] = { "-Infinity", "Infinity", "NaN" };
    bool string = false;
    int depth = 0;
    for (size_t i = 0; i < n; i++) {
        if (string) {
            if (text[i] == '\\')
                i++;
            else if (text[i] == '"')
                string = false;
            continue;
        }
        string = text[i] == '"';
        depth += (text[i] == '{' || text[i] == '[') - (text[i] == '}' || text[i] == ']');
        if (depth > CONFIG_DEPTH)
            return false;
        for (size_t w = 0; w < sizeof words / sizeof words[0]; w++) {
            const size_t length = strlen(words[w]);
            if (n - i >= length && memcmp(text + i, words[w], length) == 0) {
                memset(text + i, ' ', length);
                memcpy(text + i, length == 3 ? "0.0" : "null", length == 3 ? 3 : 4);
            }
        }
    }
    return true;
}

static json_t *read_json(const char *directory, const char *name, bool needed,
                         struct errors *errors)
{
    char why[1024], shown[JSON_ERROR_TEXT_LENGTH * 4];
    json_error_t error;
    json_t *root = NULL;
    size_t n;
    char *path = xasprintf("%s/%s", directory, name),
         *text = file_read(path, CONFIG_BYTES, &n, why, sizeof why);
    if (!text) {
        if (needed)
            errors_add(errors, EXIT_CHECKPOINT, "mimo: error: %s", why);
    } else if (!make_json(text, n)) {
        errors_add(errors, EXIT_CHECKPOINT, "%s: error: nested deeper than %d", path, CONFIG_DEPTH);
    } else if (!(root = json_loadb(text, n, 0, &error)) || !json_is_object(root)) {
        errors_add(errors, EXIT_CHECKPOINT, "%s: error: line %d: %s", path, root ? 1 : error.line,
                   root ? "is no object" : printable(shown, sizeof shown, error.text));
        json_decref(root);
        root = NULL;
    }
    free(text);
    free(path);
    return root;
}

/* Value of a key by any of its names (blank-separated), NULL when absent; its name in *name. */
static const json_t *get(const json_t *section, const char *names, const char **name)
{
    char word[64];
    for (const char *p = names; *p;) {
        const size_t n = strcspn(p, " ");
        snprintf(word, sizeof word, "%.*s", (int)n, p);
        const json_t *v = json_object_get(section, word);
        if (name)
            *name = p;
        if (v)
            return v;
        p += n + (p[n] == ' ');
    }
    if (name)
        *name = names;
    return NULL;
}

struct hf_config *hf_config_open(const char *directory, struct errors *errors)
{
    const int before = errors->count;
    json_t *root = read_json(directory, "config.json", true, errors);
    json_t *preprocessor = read_json(directory, "preprocessor_config.json", false, errors);
    if (errors->count > before) {
        json_decref(root);
        json_decref(preprocessor);
        return NULL;
    }
    struct hf_config *c = xcalloc(1, sizeof *c);
    c->path = xasprintf("%s/config.json", directory);
    c->root = root;
    c->preprocessor = preprocessor;
    c->section[HF_TOP] = root;
    c->section[HF_TEXT] = get(root, "text_config llm_config", NULL);
    c->section[HF_ENCODER] = json_object_get(root, "vision_config");
    c->vlm = json_is_object(c->section[HF_TEXT]);
    if (!c->section[HF_TEXT] &&
        get(root, "hybrid_override_pattern layers_block_type layer_types", NULL))
        c->section[HF_TEXT] = root;
    if (!c->section[HF_ENCODER] && !c->section[HF_TEXT])
        c->section[HF_ENCODER] = root;
    return c;
}

void hf_config_free(struct hf_config *c)
{
    if (!c)
        return;
    json_decref(c->root);
    json_decref(c->preprocessor);
    free(c->path);
    free(c);
}

/* ---- facts ----------------------------------------------------------------------------------- */

struct reading {
    const struct hf_config *c;
    struct hf_facts *facts;
    struct errors *errors;
    char pattern[260];
};

static void fault(const struct reading *r, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
static void fault(const struct reading *r, const char *fmt, ...)
{
    char text[1024], shown[1200];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    errors_add(r->errors, EXIT_CHECKPOINT, "%s: error: %s", r->c->path,
               printable(shown, sizeof shown, text));
}

static struct hf_fact *add_fact(struct reading *r, enum deck_row row, double number, bool loose,
                                const char *section, const char *name, size_t n)
{
    ASSERT(r->facts->n < HF_FACTS);
    struct hf_fact *f = &r->facts->fact[r->facts->n++];
    *f = (struct hf_fact){ .row = row, .number = number, .loose = loose };
    snprintf(f->key, sizeof f->key, "%s%s%.*s", section, *section ? "." : "", (int)n, name);
    return f;
}

/* The section's name as this file spells it, for messages. */
static const char *section_name(const struct reading *r, enum hf_section s)
{
    if (r->c->section[s] == r->c->root)
        return "";
    return s == HF_TEXT && json_object_get(r->c->root, "llm_config") == r->c->section[s]
               ? "llm_config"
               : section_names[s];
}

static bool is_kind(const struct reading *r, char letter)
{
    return letter == 0 || strchr(r->pattern, letter);
}

static void read_keys(struct reading *r, enum hf_section s)
{
    for (int k = 0; k < hf_n_keys; k++) {
        const struct hf_key *key = &hf_keys[k];
        const char *name;
        if (key->section != s || !is_kind(r, key->letter))
            continue;
        const json_t *v = get(r->c->section[s], key->names, &name);
        const int n = (int)strcspn(name, " ");
        const bool real = deck_table[key->row].type == DECK_TYPE_REAL;
        if (v && json_is_null(v))
            v = NULL;
        if (!v && key->told)
            fault(r, "%s%s%.*s is not given", section_name(r, s), *section_name(r, s) ? "." : "", n,
                  name);
        else if (v && !(json_is_integer(v) || (real && json_is_number(v))))
            fault(r, "%s%s%.*s is no %s", section_name(r, s), *section_name(r, s) ? "." : "", n,
                  name, real ? "number" : "integer");
        else if (v)
            add_fact(r, key->row, json_number_value(v), key->loose, section_name(r, s), name,
                     (size_t)n);
    }
}

static bool same_value(const json_t *a, const json_t *b)
{
    return json_is_number(a) && json_is_number(b) ? json_number_value(a) == json_number_value(b)
                                                  : json_equal((json_t *)a, (json_t *)b) != 0;
}

static void check_fixed(struct reading *r, enum hf_section s)
{
    for (int k = 0; k < hf_n_fixed_keys; k++) {
        const struct hf_fixed *key = &hf_fixed_keys[k];
        const char *name;
        if (key->section != s || !is_kind(r, key->letter))
            continue;
        const json_t *v = get(r->c->section[s], key->names, &name);
        json_t *want = json_loads(key->value, JSON_DECODE_ANY, NULL);
        if (v && !same_value(v, want)) {
            char *text = json_dumps(v, JSON_ENCODE_ANY);
            fault(r, "%s%s%.*s = %.100s: this program has only %s", section_name(r, s),
                  *section_name(r, s) ? "." : "", (int)strcspn(name, " "), name, text ? text : "?",
                  key->value);
            free(text);
        }
        json_decref(want);
    }
}

/* One letter a layer from hybrid_override_pattern or a list of words. */
static bool read_pattern(struct reading *r)
{
    static const struct {
        const char *word;
        char letter;
    } kinds[] = {
        { "mamba", 'M' },     { "linear_attention", 'M' },
        { "attention", '*' }, { "full_attention", '*' },
        { "moe", 'E' },       { "mlp", '-' },
    };
    const json_t *text = r->c->section[HF_TEXT],
                 *list = get(text, "layers_block_type layer_types", NULL);
    const json_t *given = json_object_get(text, "hybrid_override_pattern"),
                 *layers = json_object_get(text, "num_hidden_layers");
    char from_list[sizeof r->pattern] = "";
    if (json_array_size(list) >= sizeof from_list - 4 ||
        json_string_length(given) >= sizeof from_list - 4)
        return fault(r, "more than 255 layers"), false;
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *word = json_string_value(json_array_get(list, i));
        size_t k = 0;
        while (k < sizeof kinds / sizeof kinds[0] && word && strcmp(kinds[k].word, word))
            k++;
        if (!word || k == sizeof kinds / sizeof kinds[0])
            return fault(r, "layers_block_type[%zu] is '%s', no kind of layer", i,
                         word ? word : "(no string)"),
                   false;
        from_list[i] = kinds[k].letter;
    }
    if (json_string_length(given) > 0)
        snprintf(r->pattern, sizeof r->pattern, "%s", json_string_value(given));
    if (r->pattern[strspn(r->pattern, "ME*-")])
        return fault(r, "hybrid_override_pattern = '%s': a layer is M, E, * or -", r->pattern),
               false;
    if (*r->pattern && *from_list && strcmp(r->pattern, from_list))
        return fault(r, "hybrid_override_pattern = '%s' and layers_block_type (%s) differ",
                     r->pattern, from_list),
               false;
    if (!*r->pattern)
        memcpy(r->pattern, from_list, sizeof r->pattern);
    if (!*r->pattern)
        return fault(r, "neither hybrid_override_pattern nor layers_block_type is given"), false;
    if (json_is_integer(layers) && (size_t)json_integer_value(layers) != strlen(r->pattern))
        return fault(r, "num_hidden_layers = %lld, but the pattern has %zu layers",
                     (long long)json_integer_value(layers), strlen(r->pattern)),
               false;
    struct hf_fact *f =
        add_fact(r, ROW(language, hybrid_layer_pattern), 0, false, section_name(r, HF_TEXT),
                 *from_list ? "layers_block_type" : "hybrid_override_pattern", 23);
    snprintf(f->text, sizeof f->text, "%s", r->pattern);
    return true;
}

/* Sizes that remote code names by a word, and those that follow from two keys. */
static void read_encoder_sizes(struct reading *r)
{
    const json_t *v = r->c->section[HF_ENCODER], *args = json_object_get(v, "args");
    const char *model = json_string_value(json_object_get(args, "model"));
    const json_t *ratio = json_object_get(v, "mlp_ratio"),
                 *width = json_object_get(v, "hidden_size");
    const json_t *cls = json_object_get(v, "num_cls_tokens"),
                 *registers = json_object_get(v, "num_registers");
    const json_t *size = json_object_get(args, "cpe_max_size");
    const char *at = section_name(r, HF_ENCODER);
    if (!width && model) {
        for (size_t k = 0; k < sizeof encoders / sizeof encoders[0]; k++)
            if (strcmp(encoders[k].name, model) == 0) {
                add_fact(r, ROW(vision, hidden_size), encoders[k].width, false, at, "args.model",
                         10);
                add_fact(r, ROW(vision, num_layers), encoders[k].layers, false, at, "args.model",
                         10);
                add_fact(r, ROW(vision, num_attention_heads), encoders[k].heads, false, at,
                         "args.model", 10);
                add_fact(r, ROW(vision, ffn_hidden_size), encoders[k].ffn, false, at, "args.model",
                         10);
                model = NULL;
                break;
            }
        if (model)
            fault(r, "args.model = '%s': this encoder is not known", model);
    } else if (!width) {
        fault(r, "neither hidden_size nor args.model tells the encoder's size");
    }
    if (json_is_number(ratio) && json_is_integer(width))
        add_fact(r, ROW(vision, ffn_hidden_size),
                 json_number_value(ratio) * json_number_value(width), false, at, "mlp_ratio", 9);
    if (json_is_integer(cls) && json_is_integer(registers))
        add_fact(r, ROW(vision, class_token_len),
                 json_number_value(cls) + json_number_value(registers), false, at,
                 "num_cls_tokens + num_registers", 30);
    if (json_is_integer(size)) {
        add_fact(r, ROW(vision, max_img_h), json_number_value(size), false, at, "args.cpe_max_size",
                 17);
        add_fact(r, ROW(vision, max_img_w), json_number_value(size), false, at, "args.cpe_max_size",
                 17);
    }
}

static void check_pixels(struct reading *r)
{
    static const char *const names[2] = { "norm_mean", "norm_std" };
    for (int k = 0; k < 2; k++) {
        const json_t *list = json_object_get(r->c->section[HF_ENCODER], names[k]);
        if (!list)
            list = json_object_get(r->c->root, names[k]);
        const double *want = k ? image_deviation : image_mean;
        for (size_t i = 0; i < 3 && json_is_array(list); i++)
            if (fabs(json_number_value(json_array_get(list, i)) - want[i]) > 1e-6) {
                fault(r, "%s differs from this program's %.8g, %.8g, %.8g", names[k], want[0],
                      want[1], want[2]);
                break;
            }
    }
}

/* How large pictures become is the run's choice: loose. */
static void read_pictures(struct reading *r)
{
    static const struct {
        const char *name;
        enum deck_row row;
    } limits[2] = {
        { "min_num_patches", ROW(vision, dynamic_resolution_min_patches) },
        { "max_num_patches", ROW(vision, dynamic_resolution_max_patches) },
    };
    const json_t *args = json_object_get(r->c->section[HF_ENCODER], "args");
    bool dynamic = false;
    for (int k = 0; k < 2; k++) {
        const json_t *v = json_object_get(r->c->preprocessor, limits[k].name);
        const bool here = json_is_integer(v);
        if (!here)
            v = json_object_get(args, limits[k].name);
        if (!json_is_integer(v) || json_integer_value(v) < 1)
            continue;
        add_fact(r, limits[k].row, json_number_value(v), true,
                 here ? "preprocessor_config" : "vision_config.args", limits[k].name, 15);
        dynamic = true;
    }
    const json_t *fixed = json_object_get(r->c->root, "force_image_size");
    if (dynamic || !json_is_integer(fixed) || json_integer_value(fixed) < 1)
        return;
    add_fact(r, ROW(vision, dynamic_resolution), 0, true, "", "force_image_size", 16);
    add_fact(r, ROW(vision, img_h), json_number_value(fixed), true, "", "force_image_size", 16);
    add_fact(r, ROW(vision, img_w), json_number_value(fixed), true, "", "force_image_size", 16);
}

const struct hf_fact *hf_config_fact(const struct hf_facts *facts, enum deck_row row)
{
    for (int i = 0; i < facts->n; i++)
        if (facts->fact[i].row == row)
            return &facts->fact[i];
    return NULL;
}

/* A vision-language model's projector and encoder fit each other. */
static void check_joint(struct reading *r)
{
    const json_t *hidden = json_object_get(r->c->root, "projector_hidden_size"),
                 *width = get(r->c->root, "vision_hidden_size vit_hidden_size", NULL);
    const struct hf_fact *f = hf_config_fact(r->facts, ROW(vision, hidden_size));
    if (json_is_integer(width) && f && json_number_value(width) != f->number)
        fault(r, "vision_hidden_size = %.0f, but the encoder's width is %.0f",
              json_number_value(width), f->number);
    if (json_is_integer(hidden) && json_is_integer(width) &&
        json_number_value(hidden) != 16 * json_number_value(width))
        fault(r, "projector_hidden_size = %.0f: this program has only 4 * (4 * %.0f)",
              json_number_value(hidden), json_number_value(width));
}

void hf_config_facts(const struct hf_config *c, const bool want[MODEL_MODULES],
                     struct hf_facts *facts, struct errors *errors)
{
    struct reading r = { .c = c, .facts = facts, .errors = errors };
    *facts = (struct hf_facts){ .n = 0 };
    if (want[MODEL_LANGUAGE] && !c->section[HF_TEXT]) {
        fault(&r, "tells no language model");
    } else if (want[MODEL_LANGUAGE] && read_pattern(&r)) {
        read_keys(&r, HF_TEXT);
        check_fixed(&r, HF_TEXT);
    }
    if (want[MODEL_VISION] && !json_is_object(c->section[HF_ENCODER])) {
        fault(&r, "tells no encoder");
    } else if (want[MODEL_VISION]) {
        read_keys(&r, HF_ENCODER);
        read_encoder_sizes(&r);
        check_fixed(&r, HF_ENCODER);
        check_pixels(&r);
        read_pictures(&r);
    }
    if (want[MODEL_PROJECTOR] && c->vlm) {
        read_keys(&r, HF_TOP);
        check_fixed(&r, HF_TOP);
        check_joint(&r);
    }
}

/* ---- comparison ------------------------------------------------------------------------------ */

static bool same(const struct deck *deck, const struct hf_fact *f)
{
    struct deck *d = (struct deck *)deck; /* the accessors take a deck that can be written */
    switch (deck_table[f->row].type) {
    case DECK_TYPE_INTEGER: return (double)*deck_integer(d, f->row) == f->number;
    case DECK_TYPE_REAL: return *deck_real(d, f->row) == f->number;
    case DECK_TYPE_LOGICAL: return *deck_logical(d, f->row) == (f->number != 0);
    default: return strcmp(deck->derived.pattern, f->text) == 0; /* the only text is the pattern */
    }
}

static void compare(const struct hf_config *c, const struct deck *deck, const struct hf_fact *f,
                    struct errors *errors, struct errors *notes)
{
    const struct deck_param *p = &deck_table[f->row];
    bool loose = f->loose;
    if (f->row == ROW(data, image_token_id)) {
        if (!deck_given(deck, p->group, p->key) &&
            deck->data.dataset_provider != DECK_PROVIDER_MOCK)
            return; /* the tokenizer decides */
        loose = !deck_given(deck, p->group, p->key);
    }
    if (same(deck, f))
        return;
    char *mine = deck_table_format(deck, f->row), number[40];
    snprintf(number, sizeof number, "%.15g", f->number);
    errors_add(loose ? notes : errors, EXIT_CHECKPOINT,
               "%s: %s: %s = %s, this run has %s.%s = %s (%s)", c->path, loose ? "note" : "error",
               f->key, *f->text ? f->text : number, p->group, p->key, mine,
               deck_where(deck, p->group, p->key));
    free(mine);
}

void hf_config_check(const struct hf_config *c, const struct deck *deck,
                     const bool want[MODEL_MODULES], struct errors *errors, struct errors *notes)
{
    struct hf_facts *facts = xcalloc(1, sizeof *facts);
    hf_config_facts(c, want, facts, errors);
    for (int i = 0; i < facts->n; i++)
        compare(c, deck, &facts->fact[i], errors, notes);
    free(facts);
    if (want[MODEL_LANGUAGE]) {
        const json_t *most = json_object_get(c->section[HF_TEXT], "max_position_embeddings");
        if (json_is_integer(most) && deck->language.seq_length > json_integer_value(most))
            errors_add(
                notes, EXIT_CHECKPOINT,
                "%s: note: max_position_embeddings = %lld, this run has language.seq_length = %" PRId64,
                c->path, (long long)json_integer_value(most), deck->language.seq_length);
    }
    if (want[MODEL_VISION]) {
        const char *act = json_string_value(json_object_get(c->section[HF_ENCODER], "hidden_act"));
        if (act && strcmp(act, "gelu_fast") && strcmp(act, "gelu_new") &&
            strcmp(act, "gelu_pytorch_tanh"))
            errors_add(
                notes, EXIT_CHECKPOINT,
                "%s: note: hidden_act = %.40s: this program's encoder has the tanh form of GELU, features differ by some 1e-4",
                c->path, act);
    }
}
