/* attention.c - causal grouped-query self-attention layer `*` (model.md 1.5).
 *
 *   u = RMSNorm(x)
 *   qkv = u W_qkv^T
 *   o = softmax(q k^T / sqrt(d), causal, inside a segment) v
 *   y = x + o W_proj^T
 *
 * Rows of W_qkv are grouped per KV group: n/g query heads, one key head, one value head. No rotary
 * embedding, no bias. Tensor-parallel ranks hold whole KV groups; norms run on the rank's own rows,
 * attention on all rows of its heads. Kept for backward: the norm's statistics, u, qkv, o and
 * the log-sum-exp; what 'layernorm' (u) and 'core_attn' (o, log-sum-exp) in recompute_modules name
 * is made again.
 */
#include "attention.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "language.h"
#include "linear.h"

struct attention {
    int n, g, d;     /* query heads, KV groups, head width on this rank */
    bool norm_again; /* u is made again in backward */
    bool core_again; /* o and lse are */
    double eps;
    int norm, qkv_weight, proj_weight; /* parameter indices */
    struct tensor rs, u;               /* acc [T/t], [T/t,H] */
    struct tensor qkv;                 /* [T,(n+2g)d] */
    struct tensor o;                   /* [T,n*d] */
    struct tensor lse;                 /* acc [T,n] */
    struct tensor du;                  /* [T/t,H] temporary */
    struct tensor work;                /* U8: the backend's */
    struct tensor d_o, dqkv;           /* [T,n*d], [T,(n+2g)d] temporaries */
};

struct attention *attention_init(struct model *m, int i)
{
    const struct deck *deck = m->deck;
    struct attention *l = xcalloc(1, sizeof *l);
    const int64_t t = m->topo->language.tp_size, h = deck->language.hidden_size;
    const int64_t n = deck->language.num_attention_heads, g = deck->language.num_query_groups;
    const int64_t d = deck->language.kv_channels;
    const double sigma = deck->language.init_method_std;
    l->n = (int)(n / t);
    l->g = (int)(g / t);
    l->d = (int)d;
    l->norm_again = deck_recomputes(deck, "layernorm");
    l->core_again = deck_recomputes(deck, "core_attn");
    l->eps = deck->language.layernorm_epsilon;
    struct param p = { .module = MODEL_LANGUAGE };
    snprintf(p.name, sizeof p.name, "decoder.layers.%d.self_attention.linear_qkv.layer_norm_weight",
             i);
    l->norm = model_add_vector(m, &p, h, PARAM_REPLICATED, RNG_ONES, 0.0);
    snprintf(p.name, sizeof p.name, "decoder.layers.%d.self_attention.linear_qkv.weight", i);
    l->qkv_weight = linear_add(m, &p, (n + 2 * g) * d, h, PARAM_SPLIT_ROWS, sigma);
    snprintf(p.name, sizeof p.name, "decoder.layers.%d.self_attention.linear_proj.weight", i);
    l->proj_weight = linear_add(m, &p, h, n * d, PARAM_SPLIT_COLS,
                                sigma / sqrt((double)deck->derived.num_layers));
    return l;
}

static void plan_core(struct model *m, struct attention *l, struct arena *a, int64_t tokens)
{
    l->o = arena_2d(a, "attention.o", m->act, tokens, (int64_t)l->n * l->d);
    l->lse = arena_2d(a, "attention.lse", m->acc, tokens, l->n);
}

void attention_plan(struct model *m, struct attention *l, struct arenas *as, enum arena_kind keep,
                    int64_t tokens, int64_t segments, int64_t max_len)
{
    struct arena *kept = &as->a[keep], *work = &as->a[ARENA_WORKSPACE];
    const int64_t h = m->deck->language.hidden_size, nd = (int64_t)l->n * l->d,
                  qkv = nd + 2 * (int64_t)l->g * l->d;
    const int64_t local = linear_local_rows(m, tokens);
    l->rs = arena_1d(kept, "attention.rs", m->acc, local);
    l->qkv = arena_2d(kept, "attention.qkv", m->act, tokens, qkv);
    if (!l->norm_again)
        l->u = arena_2d(kept, "attention.u", m->act, local, h);
    if (!l->core_again)
        plan_core(m, l, kept, tokens);
    const size_t mark = arena_mark(work);
    if (l->core_again)
        plan_core(m, l, work, tokens);
    if (l->norm_again)
        l->u = arena_2d(work, "attention.u", m->act, local, h);
    l->du = arena_2d(work, "attention.du", m->act, local, h);
    l->d_o = arena_2d(work, "attention.do", m->act, tokens, nd);
    l->dqkv = arena_2d(work, "attention.dqkv", m->act, tokens, qkv);
    l->work = arena_1d(work, "attention.work", DTYPE_U8,
                       m->be->attention_work(tokens, segments, max_len, l->n, l->g, l->d, true));
    arena_rewind(work, mark);
}

static void core_forward(struct model *m, struct attention *l, const struct ragged *b)
{
    m->be->attention_forward(m->compute, &l->qkv, &b->cu, b->max_len, l->n, l->g, l->d, true,
                             &l->work, &l->o, &l->lse);
}

void attention_forward(struct model *m, struct attention *l, const struct ragged *b,
                       const struct tensor *x, const struct tensor *y)
{
    m->be->rmsnorm_forward(m->compute, x, &model_param(m, l->norm)->value, l->eps, &l->u, &l->rs);
    linear_forward(m, model_param(m, l->qkv_weight), linear_gather(m, &l->u, &m->gathered), NULL,
                   &l->qkv);
    if (y || !l->core_again)
        core_forward(m, l, b);
    if (y)
        linear_row_forward(m, model_param(m, l->proj_weight), &l->o, x, y);
}

void attention_backward(struct model *m, struct attention *l, const struct ragged *b,
                        const struct tensor *x, const struct tensor *dx)
{
    const struct backend_ops *be = m->be;
    const struct param *norm = model_param(m, l->norm);
    if (l->core_again)
        core_forward(m, l, b);
    linear_row_backward(m, model_param(m, l->proj_weight), &l->o, dx, &l->d_o);
    be->attention_backward(m->compute, &l->qkv, &b->cu, b->max_len, l->n, l->g, l->d, true, &l->o,
                           &l->lse, &l->d_o, &l->work, &l->dqkv);
    if (l->norm_again)
        be->rmsnorm_forward(m->compute, x, &norm->value, l->eps, &l->u, &l->rs);
    linear_column_backward(m, model_param(m, l->qkv_weight), &l->u, &l->dqkv, &l->du);
    be->rmsnorm_backward(m->compute, x, &norm->value, &l->rs, &l->du, dx, param_grad(norm));
}

void attention_free(struct attention *l)
{
    free(l);
}
