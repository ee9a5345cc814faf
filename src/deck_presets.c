/* deck_presets.c - the model presets (model.md 4): values of keys that the user left open.
 *
 * A preset is a list of key and number; the pattern is the only text. 'custom' sets nothing. Sizes
 * that a preset does not name keep the table's default, and those that follow from others (ffn,
 * groups) are derived in deck_rules.c.
 */
#include "deck_table.h"

#include <string.h>

enum { PRESET_LANGUAGES = DECK_LANGUAGE_CUSTOM, PRESET_VISIONS = DECK_VISION_CUSTOM };

static const char *const patterns[PRESET_LANGUAGES] = {
    [DECK_LANGUAGE_NEMOTRON_20L] = "MEMEM*EMEMEM*EMEMEM*",
    [DECK_LANGUAGE_NEMOTRON_54L] = "MEMEM*EMEM*EMEM*EMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEME",
    [DECK_LANGUAGE_NEMOTRON3_NANO] = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    [DECK_LANGUAGE_TINY] = "MEM*E-",
};

struct language_row {
    int row;
    double value[PRESET_LANGUAGES]; /* nemotron_20l, nemotron_54l, nemotron3_nano, tiny */
};

static const struct language_row languages[] = {
    { DECK_ROW(language, hidden_size), { 2688, 2688, 2688, 64 } },
    { DECK_ROW(language, num_attention_heads), { 32, 32, 32, 4 } },
    { DECK_ROW(language, num_query_groups), { 8, 8, 2, 2 } },
    { DECK_ROW(language, kv_channels), { 128, 128, 128, 16 } },
    { DECK_ROW(language, ffn_hidden_size), { 1856, 1856, 1856, 96 } },
    { DECK_ROW(language, vocab_size), { 131072, 131072, 131072, 500 } },
    { DECK_ROW(language, seq_length), { 8192, 8192, 8192, 64 } },
    { DECK_ROW(language, init_method_std), { 0.0173, 0.0173, 0.0173, 0.0173 } },
    { DECK_ROW(language, layernorm_epsilon), { 1e-5, 1e-5, 1e-5, 1e-5 } },
    { DECK_ROW(moe, num_experts), { 128, 128, 128, 8 } },
    { DECK_ROW(moe, moe_router_topk), { 6, 6, 6, 2 } },
    { DECK_ROW(moe, moe_ffn_hidden_size), { 1856, 1856, 1856, 32 } },
    { DECK_ROW(moe, moe_shared_expert_intermediate_size), { 3712, 3712, 3712, 64 } },
    { DECK_ROW(moe, moe_router_topk_scaling_factor), { 2.5, 2.5, 2.5, 2.5 } },
    { DECK_ROW(moe, moe_aux_loss_coeff), { 1e-4, 1e-4, 1e-4, 1e-4 } },
    { DECK_ROW(moe, moe_router_enable_expert_bias), { true, true, true, true } },
    { DECK_ROW(moe, moe_router_bias_update_rate), { 1e-3, 1e-3, 1e-3, 1e-3 } },
    { DECK_ROW(mamba, mamba_num_heads), { 64, 64, 64, 8 } },
    { DECK_ROW(mamba, mamba_head_dim), { 64, 64, 64, 8 } },
    { DECK_ROW(mamba, mamba_num_groups), { 8, 8, 8, 2 } },
    { DECK_ROW(mamba, mamba_state_dim), { 128, 128, 128, 16 } },
    { DECK_ROW(mamba, linear_conv_kernel_dim), { 4, 4, 4, 4 } },
    { DECK_ROW(mamba, mamba_chunk_size), { 128, 128, 128, 16 } },
    { DECK_ROW(data, image_token_id), { 511, 18, 18, 499 } },
};

struct vision_row {
    int row;
    double value[PRESET_VISIONS]; /* radio_vit_h, tiny */
};

static const struct vision_row visions[] = {
    { DECK_ROW(vision, num_layers), { 32, 2 } },
    { DECK_ROW(vision, hidden_size), { 1280, 32 } },
    { DECK_ROW(vision, num_attention_heads), { 16, 4 } },
    { DECK_ROW(vision, ffn_hidden_size), { 5120, 64 } },
    { DECK_ROW(vision, patch_dim), { 16, 4 } },
    { DECK_ROW(vision, img_h), { 224, 32 } },
    { DECK_ROW(vision, img_w), { 224, 32 } },
    { DECK_ROW(vision, max_img_h), { 2048, 64 } },
    { DECK_ROW(vision, max_img_w), { 2048, 64 } },
    { DECK_ROW(vision, class_token_len), { 8, 2 } },
};

/* Nothing given, or given as "not given". */
static bool open_row(const struct deck *deck, int row)
{
    return !deck->source[row].bad &&
           (deck->source[row].origin < DECK_FROM_DECK || deck_table_is_unset(deck, row));
}

static void preset_number(struct deck *deck, int row, double value)
{
    if (!open_row(deck, row))
        return;
    switch (deck_table[row].type) {
    case DECK_TYPE_INTEGER: *deck_integer(deck, row) = (int64_t)value; break;
    case DECK_TYPE_REAL: *deck_real(deck, row) = value; break;
    case DECK_TYPE_LOGICAL: *deck_logical(deck, row) = value != 0; break;
    default: ASSERT(!"a preset sets numbers"); break;
    }
    deck->source[row].origin = DECK_FROM_PRESET;
}

void deck_presets_apply(struct deck *deck)
{
    int language = deck->language.preset;
    if (deck->source[DECK_ROW(vision, preset)].origin < DECK_FROM_DECK) {
        bool tiny = language == DECK_LANGUAGE_TINY;
        deck->vision.preset = tiny ? DECK_VISION_TINY : DECK_VISION_RADIO_VIT_H;
        if (tiny)
            deck->source[DECK_ROW(vision, preset)].origin = DECK_FROM_DERIVED;
    }
    if (language != DECK_LANGUAGE_CUSTOM) {
        int pattern = DECK_ROW(language, hybrid_layer_pattern);
        if (open_row(deck, pattern)) {
            deck->language.hybrid_layer_pattern = patterns[language];
            deck->source[pattern].origin = DECK_FROM_PRESET;
        }
        for (size_t i = 0; i < sizeof languages / sizeof languages[0]; i++)
            preset_number(deck, languages[i].row, languages[i].value[language]);
    }
    /* The production recipes of the deeper models use ten class tokens. */
    if (deck->vision.preset == DECK_VISION_RADIO_VIT_H &&
        (language == DECK_LANGUAGE_NEMOTRON_54L || language == DECK_LANGUAGE_NEMOTRON3_NANO))
        preset_number(deck, DECK_ROW(vision, class_token_len), 10);
    if (deck->vision.preset != DECK_VISION_CUSTOM)
        for (size_t i = 0; i < sizeof visions / sizeof visions[0]; i++) {
            bool set = visions[i].row == DECK_ROW(vision, class_token_len) &&
                       deck->source[visions[i].row].origin == DECK_FROM_PRESET;
            if (!set)
                preset_number(deck, visions[i].row, visions[i].value[deck->vision.preset]);
        }
    /* Two tiles of 16x56 pixels: 28 image tokens, so that one sample has several tiles and they are
     * not square. */
    if (language == DECK_LANGUAGE_TINY && deck->vision.preset == DECK_VISION_TINY &&
        deck->vision.dynamic_resolution && deck->vision.pixel_shuffle &&
        deck->data.dataset_provider == DECK_PROVIDER_MOCK &&
        deck->topology.layout != DECK_LAYOUT_LANGUAGE_ONLY) {
        preset_number(deck, DECK_ROW(data, image_seq_length), 28);
        /* A sequence length given by the user may ask for other pictures; then so may the number of
         * tiles. */
        if (deck->data.image_seq_length == 28)
            preset_number(deck, DECK_ROW(data, num_image_tiles), 2);
    }
}
