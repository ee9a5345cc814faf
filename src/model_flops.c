/* model_flops.c - see model_flops.h. */
#include "model_flops.h"

static double attention_flops(const struct deck *k, double tokens, double sum_len2)
{
    const double h = (double)k->language.hidden_size, d = (double)k->language.kv_channels;
    const double n = (double)k->language.num_attention_heads,
                 g = (double)k->language.num_query_groups;
    return tokens * 4 * h * d * (n + g) + 2 * sum_len2 * n * d;
}

static double moe_flops(const struct deck *k, double tokens, bool with_router)
{
    const double h = (double)k->language.hidden_size;
    const double per_token = 4 * h * (double)(k->moe.moe_ffn_hidden_size * k->moe.moe_router_topk) +
                             4 * h * (double)k->moe.moe_shared_expert_intermediate_size;
    return tokens * (per_token + (with_router ? 2 * h * (double)k->moe.num_experts : 0.0));
}

/* The widely published count takes an inner width of 2H for every Mamba layer. */
static double mamba_flops_megatron(const struct deck *k, double tokens)
{
    const double h = (double)k->language.hidden_size, n = (double)k->mamba.mamba_state_dim;
    const double gn = (double)k->mamba.mamba_num_groups * n, mh = (double)k->mamba.mamba_num_heads;
    return tokens * (2 * h * (4 * h + 2 * gn + mh) + 7 * (2 * h) * n + 4 * h * h);
}

static double mamba_flops_exact(const struct deck *k, double tokens)
{
    const double h = (double)k->language.hidden_size, n = (double)k->mamba.mamba_state_dim;
    const double gn = (double)k->mamba.mamba_num_groups * n, mh = (double)k->mamba.mamba_num_heads;
    const double di = mh * (double)k->mamba.mamba_head_dim,
                 w = (double)k->mamba.linear_conv_kernel_dim;
    const double q = (double)k->mamba.mamba_chunk_size;
    return tokens * (2 * h * (2 * di + 2 * gn + mh) + 2 * w * (di + 2 * gn) + (q + 1) * (gn + di) +
                     4 * di * n + 2 * di * h);
}

static double language_flops(const struct deck *k, double tokens, double sum_len2, bool exact)
{
    const double h = (double)k->language.hidden_size;
    double total = tokens * 2 * h * (double)k->derived.padded_vocab;
    for (const char *c = k->derived.pattern; *c; c++) {
        switch (*c) {
        case 'M':
            total += exact ? mamba_flops_exact(k, tokens) : mamba_flops_megatron(k, tokens);
            break;
        case '*': total += attention_flops(k, tokens, sum_len2); break;
        case 'E': total += moe_flops(k, tokens, exact); break;
        default: total += tokens * 4 * h * (double)k->language.ffn_hidden_size; break;
        }
    }
    return total;
}

double model_flops_language_megatron(const struct deck *deck, double tokens, double sum_len2)
{
    return language_flops(deck, tokens, sum_len2, false);
}

double model_flops_language_exact(const struct deck *deck, double tokens, double sum_len2)
{
    return language_flops(deck, tokens, sum_len2, true);
}

double model_flops_encoder_tile(const struct deck *deck, double patches)
{
    const double w = (double)deck->vision.hidden_size, f = (double)deck->vision.ffn_hidden_size;
    const double p2 = 3.0 * (double)(deck->vision.patch_dim * deck->vision.patch_dim);
    const double s = patches + (double)deck->vision.class_token_len;
    return 2 * patches * p2 * w +
           (double)deck->vision.num_layers * (2 * s * w * (4 * w + 2 * f) + 4 * s * s * w);
}

double model_flops_projector_row(const struct deck *deck)
{
    const double in = (double)deck->vision.hidden_size * (deck->vision.pixel_shuffle ? 4.0 : 1.0);
    const double h = (double)deck->language.hidden_size;
    return deck->projector.vision_projection_type == DECK_PROJECTION_MLP ? 2 * (4 * in) * (in + h)
                                                                         : 2 * in * h;
}
