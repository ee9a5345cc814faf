/* moe.c - mixture-of-experts layer `E` (model.md 1.8):
 *
 *   hN = RMSNorm(x); scores = sigmoid(hN W_r^T); top-K of scores + expert_bias; p = scaling * score / sum of chosen scores
 *   out = sum_k W2_k (relu(W1_k hN)^2 p_k) + W2_s relu(W1_s hN)^2;   y = x + out
 *
 * The K*T copies are sorted by (expert, token), so each expert works on consecutive rows; how many is known to the device only.
 * The sequence auxiliary loss enters as a gradient on the normalised scores (step 5). The expert bias and the counts of
 * dispatched tokens are state of the layer; the optimizer updates the bias once per step. A frozen language module keeps its bias and
 * has no auxiliary loss. Kept for backward: statistics, scores, choice, sort, the hidden rows of routed and shared experts.
 */
#include "moe.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "language.h"
#include "linear.h"

struct moe {
    int64_t experts, topk;                 /* E, K */
    int64_t width, shared_width;           /* F, Fs on this rank; Fs = 0: no shared expert */
    double eps, scaling, coeff;
    bool balance;                          /* auxiliary loss in training */
    bool count;                            /* tokens per expert in training */
    int norm, router, bias, fc1, fc2, shared_fc1, shared_fc2;   /* parameter indices, -1 = absent */
    struct tensor rs;                      /* acc [T] */
    struct tensor scores;                  /* acc [T,E] */
    struct tensor expert, prob;            /* I32, acc [T,K] */
    struct tensor offsets;                 /* I32 [E+1] */
    struct tensor row_token, row_prob;     /* I32, acc [T*K] */
    struct tensor token_row;               /* I32 [T,K] */
    struct tensor h;                       /* [T*K,F] */
    struct tensor shared_h;                /* [T,Fs] */
    struct tensor balance_count, balance_sum;   /* I64, acc [B,E] */
    struct tensor tokens_per_expert;       /* I64 [E], over micro-batches */
    struct tensor hn, dhn;                 /* [T,H] temporaries */
    struct tensor logits;                  /* acc [T,E] logits, then their gradient; temporary */
    struct tensor dprob, drow;             /* acc [T,K], [T*K] temporaries */
    struct tensor xp, yp;                  /* [T*K,H] temporaries: copies in, expert outputs; or their gradients */
    struct tensor a, da;                   /* [T*K,F] temporaries */
    struct tensor shared_a, shared_da;     /* [T,Fs] temporaries */
    struct tensor hn_acc, router_acc;      /* acc [T,H], [E,H]: fp32 copies where act is narrower */
};

static void declare(struct model *m, struct moe *l, int i)
{
    const struct deck *deck = m->deck;
    const int64_t h = deck->language.hidden_size, e = deck->moe.num_experts, f = deck->moe.moe_ffn_hidden_size;
    const int64_t fs = deck->moe.moe_shared_expert_intermediate_size;
    const double sigma = deck->language.init_method_std, so = sigma / sqrt((double)deck->derived.num_layers);
    struct param p = { .module = MODEL_LANGUAGE };
    char prefix[32];
    snprintf(prefix, sizeof prefix, "decoder.layers.%d", i);
    snprintf(p.name, sizeof p.name, "%s.pre_mlp_layernorm.weight", prefix);
    l->norm = model_add_vector(m, &p, h, PARAM_REPLICATED, PARAM_ONES, 0.0);
    snprintf(p.name, sizeof p.name, "%s.mlp.router.weight", prefix);
    l->router = model_add_matrix(m, &p, e, h, PARAM_REPLICATED, sigma);
    l->bias = -1;
    if (deck->moe.moe_router_enable_expert_bias) {
        struct param b = { .module = MODEL_LANGUAGE, .buffer = true };
        snprintf(b.name, sizeof b.name, "%s.mlp.router.expert_bias", prefix);
        l->bias = model_add_vector(m, &b, e, PARAM_REPLICATED, PARAM_ZEROS, 0.0);
    }
    struct param w1 = { .module = MODEL_LANGUAGE, .ndim = 3, .shape = { e, f, h }, .expert = true, .decay = true,
                        .init = PARAM_NORMAL, .init_scale = sigma };
    snprintf(w1.name, sizeof w1.name, "%s.mlp.experts.linear_fc1.weight", prefix);
    l->fc1 = model_add_param(m, &w1);
    struct param w2 = { .module = MODEL_LANGUAGE, .ndim = 3, .shape = { e, h, f }, .expert = true, .decay = true,
                        .init = PARAM_NORMAL, .init_scale = so };
    snprintf(w2.name, sizeof w2.name, "%s.mlp.experts.linear_fc2.weight", prefix);
    l->fc2 = model_add_param(m, &w2);
    l->shared_fc1 = l->shared_fc2 = -1;
    if (fs > 0) {
        snprintf(p.name, sizeof p.name, "%s.mlp.shared_experts.linear_fc1.weight", prefix);
        l->shared_fc1 = model_add_matrix(m, &p, fs, h, PARAM_SPLIT_ROWS, sigma);
        snprintf(p.name, sizeof p.name, "%s.mlp.shared_experts.linear_fc2.weight", prefix);
        l->shared_fc2 = model_add_matrix(m, &p, h, fs, PARAM_SPLIT_COLS, so);
    }
}

struct moe *moe_init(struct model *m, int i)
{
    const struct deck *deck = m->deck;
    struct moe *l = xcalloc(1, sizeof *l);
    l->experts = deck->moe.num_experts;
    l->topk = deck->moe.moe_router_topk;
    l->width = deck->moe.moe_ffn_hidden_size;
    l->shared_width = deck->moe.moe_shared_expert_intermediate_size / m->topo->language.tp_size;
    l->eps = deck->language.layernorm_epsilon;
    l->scaling = deck->moe.moe_router_topk_scaling_factor;
    l->coeff = deck->moe.moe_aux_loss_coeff;
    l->count = !deck->derived.freeze_language;
    l->balance = l->count && deck->moe.moe_router_load_balancing_type == DECK_BALANCING_SEQ_AUX_LOSS;
    declare(m, l, i);
    return l;
}

static void plan_kept(struct model *m, struct moe *l, struct arena *acts, int64_t tokens, int64_t sequences)
{
    const int64_t e = l->experts, k = l->topk, copies = tokens * k;
    l->rs = arena_1d(acts, "moe.rs", m->acc, tokens);
    l->scores = arena_2d(acts, "moe.scores", m->acc, tokens, e);
    l->expert = arena_2d(acts, "moe.expert", DTYPE_I32, tokens, k);
    l->prob = arena_2d(acts, "moe.prob", m->acc, tokens, k);
    l->offsets = arena_1d(acts, "moe.offsets", DTYPE_I32, e + 1);
    l->row_token = arena_1d(acts, "moe.row_token", DTYPE_I32, copies);
    l->row_prob = arena_1d(acts, "moe.row_prob", m->acc, copies);
    l->token_row = arena_2d(acts, "moe.token_row", DTYPE_I32, tokens, k);
    l->h = arena_2d(acts, "moe.h", m->act, copies, l->width);
    l->shared_h = arena_2d(acts, "moe.shared_h", m->act, tokens, l->shared_width);
    l->balance_count = arena_2d(acts, "moe.balance_count", DTYPE_I64, sequences, e);
    l->balance_sum = arena_2d(acts, "moe.balance_sum", m->acc, sequences, e);
    l->tokens_per_expert = arena_1d(acts, "moe.tokens_per_expert", DTYPE_I64, e);
}

void moe_plan(struct model *m, struct moe *l, struct arenas *as, int64_t tokens, int64_t sequences)
{
    struct arena *work = &as->a[ARENA_WORKSPACE];
    const int64_t h = m->deck->language.hidden_size, e = l->experts, copies = tokens * l->topk;
    plan_kept(m, l, &as->a[ARENA_ACTIVATIONS], tokens, sequences);
    const size_t mark = arena_mark(work);
    l->hn = arena_2d(work, "moe.hn", m->act, tokens, h);
    l->dhn = arena_2d(work, "moe.dhn", m->act, tokens, h);
    l->logits = arena_2d(work, "moe.logits", m->acc, tokens, e);
    l->dprob = arena_2d(work, "moe.dprob", m->acc, tokens, l->topk);
    l->drow = arena_1d(work, "moe.drow", m->acc, copies);
    l->xp = arena_2d(work, "moe.xp", m->act, copies, h);
    l->yp = arena_2d(work, "moe.yp", m->act, copies, h);
    l->a = arena_2d(work, "moe.a", m->act, copies, l->width);
    l->da = arena_2d(work, "moe.da", m->act, copies, l->width);
    l->shared_a = arena_2d(work, "moe.shared_a", m->act, tokens, l->shared_width);
    l->shared_da = arena_2d(work, "moe.shared_da", m->act, tokens, l->shared_width);
    if (m->act != m->acc) {
        l->hn_acc = arena_2d(work, "moe.hn_acc", m->acc, tokens, h);
        l->router_acc = arena_2d(work, "moe.router_acc", m->acc, e, h);
    }
    arena_rewind(work, mark);
}

/* The tensor itself, or its copy in acc where act is narrower. */
static const struct tensor *in_acc(struct model *m, const struct tensor *t, const struct tensor *copy)
{
    if (t->dtype == m->acc)
        return t;
    m->be->cast(m->compute, t, copy);
    return copy;
}

static void count_expert_flops(struct model *m, const struct moe *l, int64_t copies, int gemms)
{
    m->gemm_flops += 2 * copies * l->width * m->deck->language.hidden_size * gemms;
}

/* Sort the copies and run the routed experts' first GEMM and activation; the copies of hn lie in xp afterwards. */
static void route(struct model *m, struct moe *l, const struct ragged *b, bool train, const struct tensor *metric)
{
    const struct backend_ops *be = m->be;
    struct stream *s = m->compute;
    const struct tensor *bias = l->bias < 0 ? NULL : &model_param(m, l->bias)->value;
    const struct param *router = model_param(m, l->router);
    be->gemm(s, false, true, 1.0, &l->hn, &router->value, 0.0, NULL, &l->logits);
    m->gemm_flops += 2 * b->tokens * l->experts * tensor_cols(&l->hn);
    be->router_forward(s, &l->logits, bias, l->scaling, &l->scores, &l->expert, &l->prob);
    if (train && l->balance) {
        be->router_balance(s, &l->scores, (int)l->topk, b->max_len, &l->balance_count, &l->balance_sum);
        be->router_balance_loss(s, &l->balance_count, &l->balance_sum, (int)l->topk, b->max_len, metric);
    }
    be->moe_sort(s, &l->expert, &l->prob, &l->offsets, &l->row_token, &l->row_prob, &l->token_row,
                 train && l->count ? &l->tokens_per_expert : NULL);
}

void moe_forward(struct model *m, struct moe *l, const struct ragged *b, const struct tensor *x, const struct tensor *y,
                 bool train, const struct tensor *metric)
{
    const struct backend_ops *be = m->be;
    struct stream *s = m->compute;
    const int64_t copies = b->tokens * l->topk;
    be->rmsnorm_forward(s, x, &model_param(m, l->norm)->value, l->eps, &l->hn, &l->rs);
    route(m, l, b, train, metric);
    be->gather_rows(s, &l->hn, &l->row_token, &l->xp);
    be->grouped_gemm(s, BACKEND_GROUPED_NT, &l->xp, &model_param(m, l->fc1)->value, &l->offsets, copies, &l->h);
    be->expert_act_forward(s, &l->h, &l->row_prob, &l->a);
    be->grouped_gemm(s, BACKEND_GROUPED_NT, &l->a, &model_param(m, l->fc2)->value, &l->offsets, copies, &l->yp);
    count_expert_flops(m, l, copies, 2);
    if (l->shared_fc1 >= 0) {
        linear_forward(m, model_param(m, l->shared_fc1), &l->hn, NULL, &l->shared_h);
        be->activation_forward(s, BACKEND_RELU2, &l->shared_h, &l->shared_a);
        linear_forward(m, model_param(m, l->shared_fc2), &l->shared_a, x, y);
    } else {
        be->copy(s, x, y);
    }
    be->gather_sum_rows(s, &l->yp, &l->token_row, 1.0, y);
}

/* Routed experts: from dout [T,H] to dhn (overwritten), dprob and the experts' weight gradients. */
static void experts_backward(struct model *m, struct moe *l, const struct tensor *dout, int64_t copies)
{
    const struct backend_ops *be = m->be;
    struct stream *s = m->compute;
    const struct param *fc1 = model_param(m, l->fc1), *fc2 = model_param(m, l->fc2);
    be->gather_rows(s, dout, &l->row_token, &l->yp);
    be->grouped_gemm(s, BACKEND_GROUPED_NN, &l->yp, &fc2->value, &l->offsets, copies, &l->da);
    if (fc2->trainable) {
        be->expert_act_forward(s, &l->h, &l->row_prob, &l->a);
        be->grouped_gemm(s, BACKEND_GROUPED_TN, &l->yp, &l->a, &l->offsets, copies, &fc2->grad);
    }
    be->expert_act_backward(s, &l->h, &l->row_prob, &l->da, &l->da, &l->drow);
    if (fc1->trainable) {
        be->gather_rows(s, &l->hn, &l->row_token, &l->xp);
        be->grouped_gemm(s, BACKEND_GROUPED_TN, &l->da, &l->xp, &l->offsets, copies, &fc1->grad);
    }
    be->grouped_gemm(s, BACKEND_GROUPED_NN, &l->da, &fc1->value, &l->offsets, copies, &l->yp);
    be->gather_sum_rows(s, &l->yp, &l->token_row, 0.0, &l->dhn);
    be->moe_unsort_prob(s, &l->drow, &l->token_row, &l->dprob);
    count_expert_flops(m, l, copies, 2 + (fc1->trainable ? 1 : 0) + (fc2->trainable ? 1 : 0));
}

void moe_backward(struct model *m, struct moe *l, const struct ragged *b, const struct tensor *x, const struct tensor *dx)
{
    const struct backend_ops *be = m->be;
    struct stream *s = m->compute;
    const struct param *norm = model_param(m, l->norm), *router = model_param(m, l->router);
    be->rmsnorm_forward(s, x, &norm->value, l->eps, &l->hn, &l->rs);
    experts_backward(m, l, dx, b->tokens * l->topk);

    be->router_backward(s, &l->scores, &l->expert, &l->prob, &l->dprob, l->scaling, l->balance ? &l->balance_count : NULL,
                        l->coeff, b->max_len, b->max_len, &l->logits);
    if (router->trainable) {
        be->gemm(s, true, false, 1.0, &l->logits, in_acc(m, &l->hn, &l->hn_acc), 1.0, &router->grad, &router->grad);
        m->gemm_flops += 2 * b->tokens * l->experts * tensor_cols(&l->hn);
    }
    be->gemm(s, false, false, 1.0, &l->logits, in_acc(m, &router->value, &l->router_acc), 1.0, &l->dhn, &l->dhn);
    m->gemm_flops += 2 * b->tokens * l->experts * tensor_cols(&l->hn);

    if (l->shared_fc1 >= 0) {
        be->activation_forward(s, BACKEND_RELU2, &l->shared_h, &l->shared_a);
        linear_backward(m, model_param(m, l->shared_fc2), &l->shared_a, dx, 0.0, &l->shared_da);
        be->activation_backward(s, BACKEND_RELU2, &l->shared_h, &l->shared_da, &l->shared_da);
        linear_backward(m, model_param(m, l->shared_fc1), &l->hn, &l->shared_da, 1.0, &l->dhn);
    }
    be->rmsnorm_backward(s, x, &norm->value, &l->rs, &l->dhn, dx, param_grad(norm));
}

struct tensor moe_tokens_per_expert(const struct moe *l)
{
    return l->tokens_per_expert;
}

struct tensor moe_last_choice(const struct moe *l)
{
    return l->expert;
}

struct param *moe_expert_bias(struct model *m, const struct moe *l)
{
    return l->bias < 0 ? NULL : model_param(m, l->bias);
}

void moe_free(struct moe *l)
{
    free(l);
}
