/* moe.c - mixture-of-experts layer `E` (model.md 1.8):
 *
 *   hN = RMSNorm(x)
 *   scores = sigmoid(hN W_r^T); chosen: the top-K of scores + expert_bias
 *   p = scaling * score / sum of chosen scores
 *   y = x + sum_k W2_k (relu(W1_k hN)^2 p_k) + W2_s relu(W1_s hN)^2
 *
 * The K*T copies are sorted by (expert, token), so each expert works on consecutive rows; how many
 * is known to the device only. The sequence auxiliary loss enters as a gradient on the normalised
 * scores (step 5). The expert bias and the counts of dispatched tokens are state of the layer; the
 * optimizer updates the bias once per step. A frozen language module keeps its bias and has no
 * auxiliary loss. Forced load balancing replaces the choice alone: what it depends on is in moe.h.
 * Router and routed experts work on this rank's own rows of the residual stream; with expert
 * parallelism the sorted copies travel to the owners of their experts (dispatch.h) and back, R rows
 * in all. Kept for backward: statistics, hN, scores, choice, sort, the hidden rows of routed and
 * shared experts, the latter's activation; the activation of routed ones comes again with its
 * gradient. recompute_modules takes from that: 'layernorm' hN, 'moe_act' the activation,
 * 'shared_experts' it and the hidden rows.
 *
 * A pass is a list of steps; the order in which they are issued is data (at the end), and is what
 * moe_shared_expert_overlap chooses. Recomputation is a pass of its own: what backward reads, from
 * the choice that the forward pass has made.
 */
#include "moe.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "dispatch.h"
#include "language.h"
#include "linear.h"
#include "rng.h"
#include "timer.h"

struct moe {
    int index;                   /* of the layer in the pattern */
    int64_t experts, topk;       /* E, K */
    int64_t width, shared_width; /* F, Fs on this rank; Fs = 0: no shared expert */
    double eps, scaling, coeff;
    bool balance;      /* auxiliary loss in training */
    bool count;        /* tokens per expert in training */
    bool forced;       /* the choice is made by moe_force_choice */
    bool norm_again;   /* hn is made again in backward */
    bool shared_again; /* shared_h is */
    bool act_again;    /* shared_a is */
    int norm, router, bias, fc1, fc2, shared_fc1, shared_fc2; /* parameter indices, -1 = absent */
    struct dispatch *dispatch; /* NULL with one expert-parallel rank */
    /* t = T/tp rows of this rank, C = t*K copies, R rows of its experts (= C without dispatch) */
    struct tensor rs, hn;                  /* acc [t], [t,H] */
    struct tensor scores;                  /* acc [t,E] */
    struct tensor expert, prob;            /* I32, acc [t,K] */
    struct tensor offsets;                 /* I32 [E+1] */
    struct tensor row_token, row_prob;     /* I32, acc [C] */
    struct tensor token_row;               /* I32 [t,K] */
    struct tensor received, received_prob; /* [R,H], acc [R] of the owned experts; dispatch only */
    struct tensor h;                       /* [R,F] */
    struct tensor shared_h, shared_a;      /* [T,Fs] */
    struct tensor balance_count, balance_sum; /* I64, acc [B,E] */
    struct tensor tokens_per_expert;          /* I64 [E], over micro-batches */
    struct tensor dhn, dshared;               /* [t,H] temporaries */
    struct tensor logits;                     /* acc [t,E] logits, then their gradient; temporary */
    struct tensor dprob, drow;                /* acc [t,K], [C] temporaries */
    /* [C,H] temporary: sorted copies on their way out or back */
    struct tensor copies;
    /* [R,H], acc [R] temporaries: expert outputs or gradients; dispatch only for the second */
    struct tensor yp, dreceived_prob;
    struct tensor a, da;       /* [R,F] temporaries */
    struct tensor shared_da;   /* [T,Fs] temporary */
    struct tensor host_choice; /* I32 [t,K] on the host; forced only */
};

static void declare(struct model *m, struct moe *l, int i)
{
    const struct deck *deck = m->deck;
    const int64_t h = deck->language.hidden_size, e = deck->moe.num_experts,
                  f = deck->moe.moe_ffn_hidden_size;
    const int64_t fs = deck->moe.moe_shared_expert_intermediate_size;
    const double sigma = deck->language.init_method_std,
                 so = sigma / sqrt((double)deck->derived.num_layers);
    struct param p = { .module = MODEL_LANGUAGE };
    char prefix[32];
    snprintf(prefix, sizeof prefix, "decoder.layers.%d", i);
    snprintf(p.name, sizeof p.name, "%s.pre_mlp_layernorm.weight", prefix);
    l->norm = model_add_vector(m, &p, h, PARAM_REPLICATED, RNG_ONES, 0.0);
    snprintf(p.name, sizeof p.name, "%s.mlp.router.weight", prefix);
    l->router = model_add_matrix(m, &p, e, h, PARAM_REPLICATED, sigma);
    l->bias = -1;
    if (deck->moe.moe_router_enable_expert_bias) {
        struct param b = { .module = MODEL_LANGUAGE, .buffer = true };
        snprintf(b.name, sizeof b.name, "%s.mlp.router.expert_bias", prefix);
        l->bias = model_add_vector(m, &b, e, PARAM_REPLICATED, RNG_ZEROS, 0.0);
    }
    struct param w1 = { .module = MODEL_LANGUAGE,
                        .ndim = 3,
                        .shape = { e, f, h },
                        .shard = PARAM_SPLIT_ROWS,
                        .expert = true,
                        .products = true,
                        .decay = true,
                        .init = RNG_NORMAL,
                        .init_scale = sigma };
    snprintf(w1.name, sizeof w1.name, "%s.mlp.experts.linear_fc1.weight", prefix);
    l->fc1 = model_add_param(m, &w1);
    struct param w2 = { .module = MODEL_LANGUAGE,
                        .ndim = 3,
                        .shape = { e, h, f },
                        .shard = PARAM_SPLIT_COLS,
                        .expert = true,
                        .products = true,
                        .decay = true,
                        .init = RNG_NORMAL,
                        .init_scale = so };
    snprintf(w2.name, sizeof w2.name, "%s.mlp.experts.linear_fc2.weight", prefix);
    l->fc2 = model_add_param(m, &w2);
    l->shared_fc1 = l->shared_fc2 = -1;
    if (fs > 0) {
        snprintf(p.name, sizeof p.name, "%s.mlp.shared_experts.linear_fc1.weight", prefix);
        l->shared_fc1 = linear_add(m, &p, fs, h, PARAM_SPLIT_ROWS, sigma);
        snprintf(p.name, sizeof p.name, "%s.mlp.shared_experts.linear_fc2.weight", prefix);
        l->shared_fc2 = linear_add(m, &p, h, fs, PARAM_SPLIT_COLS, so);
    }
}

struct moe *moe_init(struct model *m, int i)
{
    const struct deck *deck = m->deck;
    struct moe *l = xcalloc(1, sizeof *l);
    l->index = i;
    l->forced = deck->moe.moe_router_force_load_balancing;
    l->experts = deck->moe.num_experts;
    l->topk = deck->moe.moe_router_topk;
    l->width = deck->moe.moe_ffn_hidden_size / m->topo->language.expt_tp_size;
    l->shared_width = deck->moe.moe_shared_expert_intermediate_size / m->topo->language.tp_size;
    l->eps = deck->language.layernorm_epsilon;
    l->scaling = deck->moe.moe_router_topk_scaling_factor;
    l->coeff = deck->moe.moe_aux_loss_coeff;
    l->count = !deck->derived.freeze_language;
    l->balance =
        l->count && deck->moe.moe_router_load_balancing_type == DECK_BALANCING_SEQ_AUX_LOSS;
    l->norm_again = deck_recomputes(deck, "layernorm");
    l->shared_again = deck_recomputes(deck, "shared_experts");
    l->act_again = l->shared_again || deck_recomputes(deck, "moe_act");
    if (m->topo->language.ep_size * m->topo->language.expt_tp_size > 1)
        l->dispatch = dispatch_init(m, l->experts);
    declare(m, l, i);
    return l;
}

/* What outlives a recomputed layer: the choice, and what is counted once. */
static void plan_state(struct model *m, struct moe *l, struct arenas *as, int64_t local,
                       int64_t sequences)
{
    struct arena *acts = &as->a[ARENA_ACTIVATIONS];
    l->expert = arena_2d(acts, "moe.expert", DTYPE_I32, local, l->topk);
    l->balance_count = arena_2d(acts, "moe.balance_count", DTYPE_I64, sequences, l->experts);
    l->tokens_per_expert = arena_1d(acts, "moe.tokens_per_expert", DTYPE_I64, l->experts);
    if (l->forced)
        l->host_choice = arena_2d(&as->a[ARENA_DATA], "moe.host_choice", DTYPE_I32, local, l->topk);
}

static void plan_kept(struct model *m, struct moe *l, struct arenas *as, enum arena_kind keep,
                      int64_t tokens, int64_t sequences)
{
    struct arena *kept = &as->a[keep];
    const int64_t e = l->experts, k = l->topk, local = linear_local_rows(m, tokens),
                  copies = local * k;
    int64_t rows = copies;
    l->rs = arena_1d(kept, "moe.rs", m->acc, local);
    if (!l->norm_again)
        l->hn = arena_2d(kept, "moe.hn", m->act, local, m->deck->language.hidden_size);
    l->scores = arena_2d(kept, "moe.scores", m->acc, local, e);
    l->prob = arena_2d(kept, "moe.prob", m->acc, local, k);
    l->offsets = arena_1d(kept, "moe.offsets", DTYPE_I32, e + 1);
    l->row_token = arena_1d(kept, "moe.row_token", DTYPE_I32, copies);
    l->row_prob = arena_1d(kept, "moe.row_prob", m->acc, copies);
    l->token_row = arena_2d(kept, "moe.token_row", DTYPE_I32, local, k);
    if (l->dispatch) {
        dispatch_plan(m, l->dispatch, as, keep, copies);
        rows = l->dispatch->max_rows;
        l->received = arena_2d(kept, "moe.received", m->act, rows, m->deck->language.hidden_size);
        l->received_prob = arena_1d(kept, "moe.received_prob", m->acc, rows);
    }
    l->h = arena_2d(kept, "moe.h", m->act, rows, l->width);
    if (!l->shared_again)
        l->shared_h = arena_2d(kept, "moe.shared_h", m->act, tokens, l->shared_width);
    if (!l->act_again)
        l->shared_a = arena_2d(kept, "moe.shared_a", m->act, tokens, l->shared_width);
    l->balance_sum = arena_2d(kept, "moe.balance_sum", m->acc, sequences, e);
}

void moe_plan(struct model *m, struct moe *l, struct arenas *as, enum arena_kind keep,
              int64_t tokens, int64_t sequences)
{
    struct arena *work = &as->a[ARENA_WORKSPACE];
    const int64_t h = m->deck->language.hidden_size, e = l->experts,
                  local = linear_local_rows(m, tokens);
    const int64_t copies = local * l->topk;
    plan_state(m, l, as, local, sequences);
    plan_kept(m, l, as, keep, tokens, sequences);
    const int64_t rows = l->dispatch ? l->dispatch->max_rows : copies;
    const size_t mark = arena_mark(work);
    if (l->norm_again)
        l->hn = arena_2d(work, "moe.hn", m->act, local, h);
    l->dhn = arena_2d(work, "moe.dhn", m->act, local, h);
    l->dshared = arena_2d(work, "moe.dshared", m->act, local, h);
    l->logits = arena_2d(work, "moe.logits", m->acc, local, e);
    l->dprob = arena_2d(work, "moe.dprob", m->acc, local, l->topk);
    l->drow = arena_1d(work, "moe.drow", m->acc, copies);
    l->copies = arena_2d(work, "moe.copies", m->act, copies, h);
    l->yp = arena_2d(work, "moe.yp", m->act, rows, h);
    if (l->dispatch)
        l->dreceived_prob = arena_1d(work, "moe.dreceived_prob", m->acc, rows);
    l->a = arena_2d(work, "moe.a", m->act, rows, l->width);
    l->da = arena_2d(work, "moe.da", m->act, rows, l->width);
    if (l->shared_again)
        l->shared_h = arena_2d(work, "moe.shared_h", m->act, tokens, l->shared_width);
    if (l->act_again)
        l->shared_a = arena_2d(work, "moe.shared_a", m->act, tokens, l->shared_width);
    l->shared_da = arena_2d(work, "moe.shared_da", m->act, tokens, l->shared_width);
    arena_rewind(work, mark);
}

static struct tensor column(const struct tensor *vector)
{
    return tensor_2d(vector->data, vector->dtype, vector->place, tensor_cols(vector), 1);
}

/* First token row of this rank among the T rows of the micro-batch. */
static int64_t first_row(const struct model *m, const struct ragged *b)
{
    return m->topo->language.tp_rank * linear_local_rows(m, b->tokens);
}

void moe_force_choice(struct model *m, struct moe *l, const struct ragged *b,
                      const int64_t *sample_index)
{
    const int64_t e = l->experts, k = l->topk, stride = e / k, first = first_row(m, b);
    int32_t *choice = l->host_choice.data;
    char purpose[48];
    if (!l->forced)
        return;
    snprintf(purpose, sizeof purpose, "moe:forced:%d", l->index);
    const struct rng_key key = rng_key((uint64_t)m->deck->run.seed, purpose);
    for (int64_t t = 0; t < tensor_rows(&l->host_choice); t++, choice += k) {
        const int64_t sample = (first + t) / b->seq_len, position = (first + t) % b->seq_len;
        const int64_t base =
            ((int64_t)rng_below(key, 0, (uint64_t)sample_index[sample], (uint64_t)e) + position) %
            e;
        /* base + i*stride < base + e wraps once: what wrapped comes first in ascending order. */
        int64_t n = 0;
        for (int64_t i = 0; i < k; i++)
            if (base + i * stride >= e)
                choice[n++] = (int32_t)(base + i * stride - e);
        for (int64_t i = 0; n < k; i++)
            choice[n++] = (int32_t)(base + i * stride);
    }
    m->be->copy(m->compute, &l->host_choice, &l->expert);
}

static void count_expert_flops(struct model *m, const struct moe *l, int64_t rows, int gemms)
{
    m->gemm_flops += 2 * rows * l->width * m->deck->language.hidden_size * gemms;
}

/* Scores, choice and probabilities of this rank's rows, the auxiliary loss, the sort. again: for
 * the choice and the auxiliary counts that are there. */
static void route(struct model *m, struct moe *l, const struct ragged *b, bool train, bool again,
                  const struct tensor *metric)
{
    const struct backend_ops *be = m->be;
    struct stream *s = m->compute;
    const struct grid *g = &m->topo->language;
    const struct tensor *bias = l->bias < 0 ? NULL : &model_param(m, l->bias)->value;
    const struct param *router = model_param(m, l->router);
    be->gemm(s, false, true, 1.0, &l->hn, &router->value, 0.0, NULL, &l->logits);
    m->gemm_flops += 2 * tensor_rows(&l->hn) * l->experts * tensor_cols(&l->hn);
    be->router_forward(s, &l->logits, bias, l->scaling, l->forced || again, &l->scores, &l->expert,
                       &l->prob);
    if (train && !again && l->balance) {
        be->router_balance(s, &l->scores, (int)l->topk, first_row(m, b), b->seq_len,
                           &l->balance_count, &l->balance_sum);
        if (g->tp_cp.size > 1)
            m->comm->all_reduce(g->tp_cp.comm, &l->balance_count, COMM_SUM, s);
        be->router_balance_loss(s, &l->balance_count, &l->balance_sum, (int)l->topk, b->seq_len,
                                metric);
    }
    be->moe_sort(s, &l->expert, &l->prob, &l->offsets, &l->row_token, &l->row_prob, &l->token_row,
                 train && !again && l->count ? &l->tokens_per_expert : NULL);
}

/* What the routed experts of this rank work on: rows, their probabilities, where each owned
 * expert's rows begin. */
struct expert_rows {
    int64_t n;                      /* R */
    struct tensor x, prob, offsets; /* [R,H], acc [R], I32 [E/ep+1] */
};

/* The rows in use; x holds them between step_receive and the next use of l->copies. */
static struct expert_rows expert_rows(const struct moe *l)
{
    if (!l->dispatch)
        return (struct expert_rows){ tensor_rows(&l->copies), l->copies, l->row_prob, l->offsets };
    const int64_t n = l->dispatch->received;
    return (struct expert_rows){ n, tensor_first(&l->received, n),
                                 tensor_first(&l->received_prob, n), l->dispatch->offsets };
}

/* ---- steps ----------------------------------------------------------------------------------- */

/* What the steps of one pass work on. */
struct pass {
    const struct ragged *b;
    const struct tensor *x, *y; /* [t,H] of the layer; y in forward only */
    const struct tensor *dx;    /* [t,H] in backward */
    const struct tensor *metric;
    bool train;
};

struct moe_step {
    const char *name;
    int part; /* enum timer_part, where its time is booked */
    void (*run)(struct model *m, struct moe *l, const struct pass *p);
};

/* Norm, choice, sort, and how many rows go where. */
static void step_route(struct model *m, struct moe *l, const struct pass *p)
{
    m->be->rmsnorm_forward(m->compute, p->x, &model_param(m, l->norm)->value, l->eps, &l->hn,
                           &l->rs);
    route(m, l, p->b, p->train, !p->y, p->metric);
    if (l->dispatch)
        dispatch_begin(m, l->dispatch, &l->offsets);
}

/* rows of `from` [t,H], copied for each chosen expert, leave for the expert's rank; they stay in
 * l->copies without dispatch. */
static void send_copies(struct model *m, struct moe *l, const struct tensor *from)
{
    m->be->gather_rows(m->compute, from, &l->row_token, &l->copies);
    if (l->dispatch)
        dispatch_send(m, l->dispatch, DISPATCH_ROWS, &l->copies);
}

static void step_send_rows(struct model *m, struct moe *l, const struct pass *p)
{
    send_copies(m, l, &l->hn);
}

static void step_send_probs(struct model *m, struct moe *l, const struct pass *p)
{
    const struct tensor prob = column(&l->row_prob);
    if (l->dispatch)
        dispatch_send(m, l->dispatch, DISPATCH_PROBS, &prob);
}

static void step_receive(struct model *m, struct moe *l, const struct pass *p)
{
    const struct expert_rows r = expert_rows(l);
    const struct tensor prob = column(&r.prob);
    if (!l->dispatch)
        return;
    dispatch_wait(m, l->dispatch);
    dispatch_unpack(m, l->dispatch, DISPATCH_ROWS, &r.x);
    dispatch_unpack(m, l->dispatch, DISPATCH_PROBS, &prob);
}

static void step_experts(struct model *m, struct moe *l, const struct pass *p)
{
    const struct backend_ops *be = m->be;
    struct stream *s = m->compute;
    const struct expert_rows r = expert_rows(l);
    const struct tensor h = tensor_first(&l->h, r.n), a = tensor_first(&l->a, r.n),
                        yp = tensor_first(&l->yp, r.n);
    backend_grouped_act_forward(be, s, &r.x, &model_param(m, l->fc1)->value, &r.offsets, &r.prob,
                                &h, &a);
    count_expert_flops(m, l, r.n, 1);
    if (!p->y)
        return;
    be->grouped_gemm(s, BACKEND_GROUPED_NT, &a, &model_param(m, l->fc2)->value, &r.offsets, r.n,
                     0.0, &yp);
    count_expert_flops(m, l, r.n, 1);
}

/* [R,H] of the owned experts leave for the ranks of their copies. */
static void step_return_rows(struct model *m, struct moe *l, const struct pass *p)
{
    const struct tensor yp = tensor_first(&l->yp, expert_rows(l).n);
    if (l->dispatch)
        dispatch_return(m, l->dispatch, DISPATCH_ROWS, &yp, &l->copies);
}

/* What came back, in the order of this rank's copies. */
static const struct tensor *returned(struct model *m, struct moe *l)
{
    if (!l->dispatch)
        return &l->yp;
    dispatch_wait(m, l->dispatch);
    return &l->copies;
}

static void step_combine(struct model *m, struct moe *l, const struct pass *p)
{
    m->be->gather_sum_rows(m->compute, returned(m, l), &l->token_row, 1.0, p->y);
}

/* Nothing between this step and step_shared_fc1 may use m->gathered. */
static void step_shared_gather(struct model *m, struct moe *l, const struct pass *p)
{
    if (l->shared_fc1 >= 0)
        linear_gather(m, &l->hn, &m->gathered);
}

static void step_shared_fc1(struct model *m, struct moe *l, const struct pass *p)
{
    if (l->shared_fc1 < 0)
        return;
    const struct tensor *hn = m->topo->language.tp_size > 1 ? &m->gathered : &l->hn;
    linear_forward(m, model_param(m, l->shared_fc1), hn, NULL, &l->shared_h);
    m->be->activation_forward(m->compute, BACKEND_RELU2, &l->shared_h, &l->shared_a);
}

/* y = x + the shared expert's output, to which step_combine adds. */
static void step_shared_fc2(struct model *m, struct moe *l, const struct pass *p)
{
    if (l->shared_fc1 >= 0)
        linear_row_forward(m, model_param(m, l->shared_fc2), &l->shared_a, p->x, p->y);
    else
        m->be->copy(m->compute, p->x, p->y);
}

/* ---- steps of backward ----------------------------------------------------------------------- */

/* The gradient of each copy on its way to the expert's rank. */
static void back_send_rows(struct model *m, struct moe *l, const struct pass *p)
{
    if (l->norm_again)
        m->be->rmsnorm_forward(m->compute, p->x, &model_param(m, l->norm)->value, l->eps, &l->hn,
                               &l->rs);
    send_copies(m, l, p->dx);
}

static void back_shared_fc2(struct model *m, struct moe *l, const struct pass *p)
{
    if (l->shared_fc1 < 0)
        return;
    if (l->shared_again) {
        step_shared_gather(m, l, p);
        step_shared_fc1(m, l, p);
    } else if (l->act_again) {
        m->be->activation_forward(m->compute, BACKEND_RELU2, &l->shared_h, &l->shared_a);
    }
    linear_row_backward(m, model_param(m, l->shared_fc2), &l->shared_a, p->dx, &l->shared_da);
    m->be->activation_backward(m->compute, BACKEND_RELU2, &l->shared_h, &l->shared_da,
                               &l->shared_da);
}

static void back_shared_fc1(struct model *m, struct moe *l, const struct pass *p)
{
    if (l->shared_fc1 >= 0)
        linear_column_backward(m, model_param(m, l->shared_fc1), &l->hn, &l->shared_da,
                               &l->dshared);
}

static void back_receive(struct model *m, struct moe *l, const struct pass *p)
{
    const struct tensor dy = tensor_first(&l->yp, expert_rows(l).n);
    if (!l->dispatch)
        return;
    dispatch_wait(m, l->dispatch);
    dispatch_unpack(m, l->dispatch, DISPATCH_ROWS, &dy);
}

/* Gradients of the probabilities of this rank's expert rows: acc [R]. */
static struct tensor drow_here(const struct moe *l)
{
    return l->dispatch ? tensor_first(&l->dreceived_prob, l->dispatch->received) : l->drow;
}

/* From dy to the gradients of the experts' weights, probabilities and inputs (in yp). */
static void back_experts(struct model *m, struct moe *l, const struct pass *p)
{
    const struct backend_ops *be = m->be;
    struct stream *s = m->compute;
    struct param *fc1 = model_param(m, l->fc1), *fc2 = model_param(m, l->fc2);
    const struct expert_rows r = expert_rows(l);
    const struct tensor h = tensor_first(&l->h, r.n), a = tensor_first(&l->a, r.n),
                        da = tensor_first(&l->da, r.n);
    const struct tensor yp = tensor_first(&l->yp, r.n), drow = drow_here(l),
                        dy = l->dispatch ? yp : l->copies;
    backend_grouped_act_backward(be, s, &dy, &fc2->value, &r.offsets, &h, &r.prob, &da, &drow,
                                 fc2->trainable ? &a : NULL);
    if (fc2->trainable)
        be->grouped_gemm(s, BACKEND_GROUPED_TN, &dy, &a, &r.offsets, r.n, param_grad_beta(fc2),
                         &fc2->grad);
    if (fc1->trainable) {
        if (!l->dispatch)
            /* what was received lies in its own memory */
            be->gather_rows(s, &l->hn, &l->row_token, &l->copies);
        be->grouped_gemm(s, BACKEND_GROUPED_TN, &da, &r.x, &r.offsets, r.n, param_grad_beta(fc1),
                         &fc1->grad);
    }
    be->grouped_gemm(s, BACKEND_GROUPED_NN, &da, &fc1->value, &r.offsets, r.n, 0.0, &yp);
    count_expert_flops(m, l, r.n, 2 + (fc1->trainable ? 1 : 0) + (fc2->trainable ? 1 : 0));
}

static void back_return_probs(struct model *m, struct moe *l, const struct pass *p)
{
    const struct tensor drow = drow_here(l), received = column(&drow), back = column(&l->drow);
    if (l->dispatch)
        dispatch_return(m, l->dispatch, DISPATCH_PROBS, &received, &back);
}

/* dhn = the routed experts' part; dprob. */
static void back_combine(struct model *m, struct moe *l, const struct pass *p)
{
    m->be->gather_sum_rows(m->compute, returned(m, l), &l->token_row, 0.0, &l->dhn);
    m->be->moe_unsort_prob(m->compute, &l->drow, &l->token_row, &l->dprob);
}

/* The router's and the shared expert's parts of dhn in this order, and the norm. */
static void back_route(struct model *m, struct moe *l, const struct pass *p)
{
    const struct backend_ops *be = m->be;
    struct stream *s = m->compute;
    const struct param *norm = model_param(m, l->norm), *router = model_param(m, l->router);
    const int64_t router_flops = 2 * tensor_rows(&l->hn) * l->experts * tensor_cols(&l->hn);
    be->router_backward(s, &l->scores, &l->expert, &l->prob, &l->dprob, l->scaling,
                        l->balance ? &l->balance_count : NULL, l->coeff, first_row(m, p->b),
                        p->b->seq_len, &l->logits);
    if (router->trainable) {
        be->gemm(s, true, false, 1.0, &l->logits, &l->hn, 1.0, &router->grad, &router->grad);
        m->gemm_flops += router_flops;
    }
    be->gemm(s, false, false, 1.0, &l->logits, &router->value, 1.0, &l->dhn, &l->dhn);
    m->gemm_flops += router_flops;
    if (l->shared_fc1 >= 0)
        be->add(s, &l->dshared, &l->dhn);
    be->rmsnorm_backward(s, p->x, &norm->value, &l->rs, &l->dhn, p->dx, param_grad(norm));
}

/* ---- orders ---------------------------------------------------------------------------------- */

/* Both orders of a pass hold the same steps and give the same bits; AGAIN is the part of FORWARD
 * that backward needs. Overlapped (parallel.md 5.6), the shared expert's products are issued
 * between the start and the end of a journey of the routed rows. */
enum { FORWARD, BACKWARD, AGAIN, DIRECTIONS, ORDER_MAX = 12 };

enum { R = TIMER_ROUTER, D = TIMER_DISPATCH, X = TIMER_EXPERTS, S = TIMER_SHARED };

static const struct moe_step orders[DIRECTIONS][2][ORDER_MAX] = {
    /* clang-format off */
    [FORWARD] = {
        { { "route", R, step_route }, { "send_rows", D, step_send_rows },
          { "send_probs", D, step_send_probs }, { "receive", D, step_receive },
          { "experts", X, step_experts }, { "return_rows", D, step_return_rows },
          { "shared_gather", S, step_shared_gather }, { "shared_fc1", S, step_shared_fc1 },
          { "shared_fc2", S, step_shared_fc2 }, { "combine", D, step_combine } },
        { { "route", R, step_route }, { "shared_gather", S, step_shared_gather },
          { "send_rows", D, step_send_rows }, { "shared_fc1", S, step_shared_fc1 },
          { "send_probs", D, step_send_probs }, { "receive", D, step_receive },
          { "experts", X, step_experts }, { "return_rows", D, step_return_rows },
          { "shared_fc2", S, step_shared_fc2 }, { "combine", D, step_combine } } },
    [BACKWARD] = {
        { { "send_rows", D, back_send_rows }, { "receive", D, back_receive },
          { "experts", X, back_experts }, { "return_probs", D, back_return_probs },
          { "return_rows", D, step_return_rows }, { "combine", D, back_combine },
          { "shared_fc2", S, back_shared_fc2 }, { "shared_fc1", S, back_shared_fc1 },
          { "route", R, back_route } },
        { { "send_rows", D, back_send_rows }, { "shared_fc2", S, back_shared_fc2 },
          { "receive", D, back_receive }, { "experts", X, back_experts },
          { "return_probs", D, back_return_probs }, { "return_rows", D, step_return_rows },
          { "shared_fc1", S, back_shared_fc1 }, { "combine", D, back_combine },
          { "route", R, back_route } } },
    [AGAIN] = {
        { { "route", R, step_route }, { "send_rows", D, step_send_rows },
          { "send_probs", D, step_send_probs }, { "receive", D, step_receive },
          { "experts", X, step_experts }, { "shared_gather", S, step_shared_gather },
          { "shared_fc1", S, step_shared_fc1 } },
        { { "route", R, step_route }, { "shared_gather", S, step_shared_gather },
          { "send_rows", D, step_send_rows }, { "shared_fc1", S, step_shared_fc1 },
          { "send_probs", D, step_send_probs }, { "receive", D, step_receive },
          { "experts", X, step_experts } } },
    /* clang-format on */
};

static void run_steps(struct model *m, struct moe *l, int direction, const struct pass *p)
{
    for (const struct moe_step *s = orders[direction][m->deck->moe.moe_shared_expert_overlap];
         s->run; s++) {
        timer_part(s->part);
        s->run(m, l, p);
    }
}

void moe_print_order(const struct deck *deck, FILE *out)
{
    static const char *const direction[] = { [FORWARD] = "forward", [BACKWARD] = "backward" };
    for (int i = 0; i < 2; i++) {
        fprintf(out, "  expert layer, %s:", direction[i]);
        for (const struct moe_step *s = orders[i][deck->moe.moe_shared_expert_overlap]; s->run; s++)
            fprintf(out, " %s", s->name);
        fputc('\n', out);
    }
}

void moe_forward(struct model *m, struct moe *l, const struct ragged *b, const struct tensor *x,
                 const struct tensor *y, bool train, const struct tensor *metric)
{
    const struct pass p = { .b = b, .x = x, .y = y, .metric = metric, .train = train };
    run_steps(m, l, y ? FORWARD : AGAIN, &p);
}

void moe_backward(struct model *m, struct moe *l, const struct ragged *b, const struct tensor *x,
                  const struct tensor *dx)
{
    const struct pass p = { .b = b, .x = x, .dx = dx };
    run_steps(m, l, BACKWARD, &p);
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
    dispatch_free(l->dispatch);
    free(l);
}
