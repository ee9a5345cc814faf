/* shadow_cases_layers.h - the part of shadow_cases.h with the operations of attention, of the
 * Mamba-2 layer, of the mixture of experts' routing and of the encoder's rows. */
#ifndef MIMO_SHADOW_CASES_LAYERS_H
#define MIMO_SHADOW_CASES_LAYERS_H

#include "shadow_bench.h"

/* ---- attention ---- */

/* Causal with grouped heads as in the language model, then full with as many keys as queries as in
 * the encoder. */
struct bench_attention {
    int n, g, d;
    bool causal;
    int64_t rows, most, segments;
    struct bench_tensor *qkv, *cu, *o, *lse;
    struct tensor work;
};

/* `n` segments of `rows` rows, of which the second is empty; returns the longest. */
static inline int64_t cut(struct bench *b, struct bench_tensor *cu, int64_t rows)
{
    const int64_t n = tensor_numel(&cu->t) - 1;
    int64_t at = 0, most = 0;
    for (int64_t i = 0; i <= n; i++) {
        const int64_t next = i >= n - 1 ? rows
                             : i == 1
                                 ? at
                                 : at + (int64_t)(bench_random(b) % (uint64_t)(2 * rows / n + 1));
        bench_store(cu, 0, i, (double)at);
        most = i < n && (next > rows ? rows : next) - at > most ? (next > rows ? rows : next) - at
                                                                : most;
        at = next > rows ? rows : next;
    }
    cu->written = false;
    return most;
}

static inline struct bench_attention attention_of(struct bench *b, bool causal)
{
    struct bench_attention a = { .causal = causal };
    a.n = (int)(causal ? BY_KIND(b, 2, 4, 6, 32) : BY_KIND(b, 1, 4, 5, 16));
    a.g = (int)(causal ? BY_KIND(b, 1, 2, 2, 8) : a.n);
    a.d = (int)(causal ? BY_KIND(b, 8, 16, 24, 128) : BY_KIND(b, 4, 8, 7, 80));
    a.rows = BY_KIND(b, 3, 67, 131, 4096);
    a.segments = BY_KIND(b, 1, 4, 3, 1);
    a.qkv = act(b, a.rows, (int64_t)(a.n + 2 * a.g) * a.d);
    a.cu = bench_vector(b, DTYPE_I32, a.segments + 1);
    a.most = cut(b, a.cu, a.rows);
    a.work = bench_work(b, DTYPE_U8,
                        b->be->attention_work(a.rows, a.segments, a.most, a.n, a.g, a.d, causal));
    a.o = out_act(b, a.rows, (int64_t)a.n * a.d);
    a.lse = out_acc(b, a.rows, a.n);
    return a;
}

CASE(attention_forward)
{
    for (int causal = 0; causal < 2; causal++) {
        const struct bench_attention a = attention_of(b, causal);
        CALL(attention_forward, &a.qkv->t, &a.cu->t, a.most, a.n, a.g, a.d, a.causal, &a.work,
             &a.o->t, &a.lse->t);
        bench_free(b);
    }
}

CASE(attention_backward)
{
    for (int causal = 0; causal < 2; causal++) {
        const struct bench_attention a = attention_of(b, causal);
        struct bench_tensor *d_o = act(b, a.rows, (int64_t)a.n * a.d),
                            *dqkv = out_act(b, a.rows, tensor_cols(&a.qkv->t));
        BENCH_RUN(b)
        {
            b->be->attention_forward(b->stream, &a.qkv->t, &a.cu->t, a.most, a.n, a.g, a.d,
                                     a.causal, &a.work, &a.o->t, &a.lse->t);
            b->be->attention_backward(b->stream, &a.qkv->t, &a.cu->t, a.most, a.n, a.g, a.d,
                                      a.causal, &a.o->t, &a.lse->t, &d_o->t, &a.work, &dqkv->t);
        }
        bench_free(b);
    }
}

/* ---- Mamba-2 ---- */

CASE(conv_forward)
{
    const int64_t cols = BY_KIND(b, 4, 136, 257, 6144);
    struct bench_tensor *x = act(b, ROWS(b), cols),
                        *w = bench_normal(b, bench_dense(b, b->act, cols, 4), 0.5),
                        *bias = act_vector(b, cols);
    struct bench_tensor *cu = bench_vector(b, DTYPE_I32, 1 + BY_KIND(b, 1, 3, 7, 1)),
                        *y = out_act(b, ROWS(b), cols);
    const int64_t most = cut(b, cu, ROWS(b));
    CALL(conv_forward, &x->t, &w->t, &bias->t, &cu->t, most, &y->t);
}

CASE(conv_backward)
{
    const int64_t cols = BY_KIND(b, 4, 136, 257, 6144);
    struct bench_tensor *x = act(b, ROWS(b), cols),
                        *w = bench_normal(b, bench_dense(b, b->act, cols, 4), 0.5),
                        *bias = act_vector(b, cols);
    struct bench_tensor *cu = bench_vector(b, DTYPE_I32, 1 + BY_KIND(b, 1, 3, 7, 1)),
                        *dy = act(b, ROWS(b), cols), *dx = out_act(b, ROWS(b), cols);
    struct bench_tensor *dw = bench_inout(bench_normal(b, bench_dense(b, b->acc, cols, 4), 1)),
                        *db = sum_vector(b, cols);
    const int64_t most = cut(b, cu, ROWS(b));
    BENCH_RUN(b)
    {
        b->be->conv_backward(b->stream, &x->t, &w->t, &bias->t, &cu->t, most, &dy->t, &dx->t,
                             &dw->t, &db->t);
        b->be->conv_backward(b->stream, &x->t, &w->t, &bias->t, &cu->t, most, &dy->t, &dx->t, NULL,
                             NULL);
    }
}

/* Rates as a trained model has them. */
struct bench_scan {
    int heads, dim, groups, state, chunk;
    int64_t rows, segments, most, wide;
    struct bench_tensor *xbc, *dt, *bias, *a_log, *skip, *cu;
    struct tensor work;
};

static inline struct bench_scan scan_of(struct bench *b)
{
    struct bench_scan a = { .heads = (int)BY_KIND(b, 2, 8, 9, 64),
                            .dim = (int)BY_KIND(b, 8, 8, 7, 64),
                            .groups = (int)BY_KIND(b, 1, 4, 3, 8),
                            .state = (int)BY_KIND(b, 16, 16, 11, 128),
                            .chunk = (int)BY_KIND(b, 16, 16, 24, 128),
                            .rows = BY_KIND(b, 3, 64, 131, 8192),
                            .segments = BY_KIND(b, 1, 3, 5, 1) };
    a.wide = (int64_t)a.heads * a.dim + 2 * (int64_t)a.groups * a.state;
    a.xbc = bench_normal(b, out_act(b, a.rows, a.wide), 0.5);
    a.dt = act(b, a.rows, a.heads);
    a.bias = bench_uniform(b, bench_vector(b, b->act, a.heads), -6, -2);
    a.a_log = bench_uniform(b, bench_vector(b, b->act, a.heads), 0, 2.77);
    a.skip = bench_normal(b, bench_vector(b, b->act, a.heads), 1);
    a.cu = bench_vector(b, DTYPE_I32, a.segments + 1);
    a.most = cut(b, a.cu, a.rows);
    a.work = bench_work(
        b, b->acc, b->be->ssd_work(a.rows, a.segments, a.heads, a.dim, a.groups, a.state, a.chunk));
    return a;
}

CASE(ssd_forward)
{
    const struct bench_scan a = scan_of(b);
    struct bench_tensor *y = out_act(b, a.rows, (int64_t)a.heads * a.dim);
    CALL(ssd_forward, &a.xbc->t, &a.dt->t, &a.bias->t, &a.a_log->t, &a.skip->t, &a.cu->t, a.most,
         a.heads, a.dim, a.groups, a.state, a.chunk, &a.work, &y->t);
}

CASE(ssd_backward)
{
    const struct bench_scan a = scan_of(b);
    struct bench_tensor *dy = act(b, a.rows, (int64_t)a.heads * a.dim),
                        *dxbc = out_act(b, a.rows, a.wide), *ddt = out_act(b, a.rows, a.heads);
    struct bench_tensor *dbias = sum_vector(b, a.heads), *da = sum_vector(b, a.heads),
                        *dd = sum_vector(b, a.heads);
    BENCH_RUN(b)
    {
        b->be->ssd_backward(b->stream, &a.xbc->t, &a.dt->t, &a.bias->t, &a.a_log->t, &a.skip->t,
                            &a.cu->t, a.most, a.heads, a.dim, a.groups, a.state, a.chunk, &dy->t,
                            &a.work, &dxbc->t, &ddt->t, NULL, NULL, NULL);
        b->be->ssd_backward(b->stream, &a.xbc->t, &a.dt->t, &a.bias->t, &a.a_log->t, &a.skip->t,
                            &a.cu->t, a.most, a.heads, a.dim, a.groups, a.state, a.chunk, &dy->t,
                            &a.work, &dxbc->t, &ddt->t, &dbias->t, &da->t, &dd->t);
    }
}

CASE(gated_norm_forward)
{
    const int groups = (int)BY_KIND(b, 1, 2, 3, 8);
    const int64_t cols = groups * BY_KIND(b, 8, 64, 37, 512);
    struct bench_tensor *y = act(b, ROWS(b), cols), *z = act(b, ROWS(b), cols),
                        *w = act_vector(b, cols), *o = out_act(b, ROWS(b), cols),
                        *rs = out_acc(b, ROWS(b), groups);
    CALL(gated_norm_forward, &y->t, &z->t, &w->t, groups, 1e-5, &o->t, &rs->t);
}

CASE(gated_norm_backward)
{
    const int groups = (int)BY_KIND(b, 1, 2, 3, 8);
    const int64_t cols = groups * BY_KIND(b, 8, 64, 37, 512);
    struct bench_tensor *y = act(b, ROWS(b), cols), *z = act(b, ROWS(b), cols),
                        *w = act_vector(b, cols), *d_o = act(b, ROWS(b), cols),
                        *rs = bench_uniform(b, out_acc(b, ROWS(b), groups), 1, 2),
                        *dy = out_act(b, ROWS(b), cols), *dz = out_act(b, ROWS(b), cols),
                        *dw = sum_vector(b, cols);
    BENCH_RUN(b)
    {
        b->be->gated_norm_backward(b->stream, &y->t, &z->t, &w->t, groups, &rs->t, &d_o->t, &dy->t,
                                   &dz->t, &dw->t);
        b->be->gated_norm_backward(b->stream, &y->t, &z->t, &w->t, groups, &rs->t, &d_o->t, &dy->t,
                                   &dz->t, NULL);
    }
}

/* ---- mixture of experts: routing, its balance and gradient, and the sort, in a chain ---- */

struct bench_router {
    int64_t tokens, experts, topk, first, length, sequences;
    struct bench_tensor *logits, *bias, *scores, *expert, *prob, *count, *psum;
};

static inline struct bench_router router_of(struct bench *b)
{
    struct bench_router r = { .tokens = BY_KIND(b, 3, 97, 251, 8192),
                              .experts = BY_KIND(b, 3, 16, 61, 128),
                              .topk = BY_KIND(b, 2, 3, 7, 6) };
    r.first = r.tokens / 3;
    r.length = (r.tokens + 1) / 2 + 1;
    r.sequences = 3;
    r.logits = bench_normal(b, out_acc(b, r.tokens, r.experts), 1.5);
    r.bias = bench_normal(b, out_vector(b, r.experts), 0.1);
    r.scores = out_acc(b, r.tokens, r.experts);
    r.expert = bench_dense(b, DTYPE_I32, r.tokens, r.topk);
    r.prob = out_acc(b, r.tokens, r.topk);
    return r;
}

static inline void route(struct bench *b, const struct bench_router *r, bool again)
{
    b->be->router_forward(b->stream, &r->logits->t, again ? NULL : &r->bias->t, 2.5, again,
                          &r->scores->t, &r->expert->t, &r->prob->t);
}

CASE(router_forward)
{
    const struct bench_router r = router_of(b);
    BENCH_RUN(b)
    {
        route(b, &r, false);
        route(b, &r, true);
    }
}

CASE(router_balance)
{
    struct bench_router r = router_of(b);
    r.count = bench_dense(b, DTYPE_I64, r.sequences, r.experts);
    r.psum = out_acc(b, r.sequences, r.experts);
    BENCH_RUN(b)
    {
        route(b, &r, false);
        b->be->router_balance(b->stream, &r.scores->t, (int)r.topk, r.first, r.length, &r.count->t,
                              &r.psum->t);
    }
}

CASE(router_balance_loss)
{
    const int64_t sequences = BY_KIND(b, 1, 3, 7, 1), experts = BY_KIND(b, 3, 16, 61, 128);
    struct bench_tensor *count = bench_integers(b, bench_dense(b, DTYPE_I64, sequences, experts), 0,
                                                8192),
                        *psum = bench_uniform(b, out_acc(b, sequences, experts), 0, 100),
                        *metric = sum_vector(b, 1);
    CALL(router_balance_loss, &count->t, &psum->t, 6, 8192, &metric->t);
}

CASE(router_backward)
{
    struct bench_router r = router_of(b);
    struct bench_tensor *dprob = acc(b, r.tokens, r.topk),
                        *dlogits = out_acc(b, r.tokens, r.experts),
                        *other = out_acc(b, r.tokens, r.experts);
    r.count = bench_integers(b, bench_dense(b, DTYPE_I64, r.sequences, r.experts), 0, r.length);
    BENCH_RUN(b)
    {
        route(b, &r, false);
        b->be->router_backward(b->stream, &r.scores->t, &r.expert->t, &r.prob->t, &dprob->t, 2.5,
                               NULL, 0, r.first, r.length, &other->t);
        b->be->router_backward(b->stream, &r.scores->t, &r.expert->t, &r.prob->t, &dprob->t, 2.5,
                               &r.count->t, 1e-2, r.first, r.length, &dlogits->t);
    }
}

CASE(moe_sort)
{
    const struct bench_router r = router_of(b);
    const int64_t copies = r.tokens * r.topk;
    struct bench_tensor *offsets = bench_vector(b, DTYPE_I32, r.experts + 1),
                        *row_token = bench_vector(b, DTYPE_I32, copies),
                        *row_prob = out_vector(b, copies),
                        *token_row = bench_dense(b, DTYPE_I32, r.tokens, r.topk),
                        *count = bench_inout(
                            bench_integers(b, bench_vector(b, DTYPE_I64, r.experts), 0, 100));
    BENCH_RUN(b)
    {
        route(b, &r, false);
        b->be->moe_sort(b->stream, &r.expert->t, &r.prob->t, &offsets->t, &row_token->t,
                        &row_prob->t, &token_row->t, NULL);
        b->be->moe_sort(b->stream, &r.expert->t, &r.prob->t, &offsets->t, &row_token->t,
                        &row_prob->t, &token_row->t, &count->t);
    }
}

CASE(dispatch_order)
{
    const int64_t ranks = BY_KIND(b, 1, 3, 7, 8), owned = BY_KIND(b, 2, 5, 11, 16),
                  experts = ranks * owned, each = BY_KIND(b, 3, 9, 60, 400);
    struct bench_tensor *all =
        bench_integers(b, bench_dense(b, DTYPE_I32, ranks, experts + 1), 0, 1);
    int64_t rows = 0;
    for (int64_t r = 0; r < ranks; r++) {
        bench_store(all, r, 0, 0);
        for (int64_t e = 0, at = 0; e < experts; e++) {
            const int64_t n = (int64_t)(bench_random(b) % (uint64_t)each);
            rows += e / owned == ranks - 1 ? n : 0;
            bench_store(all, r, e + 1, (double)(at += n));
        }
    }
    struct bench_tensor *offsets = bench_vector(b, DTYPE_I32, owned + 1),
                        *order = bench_vector(b, DTYPE_I32, rows),
                        *inverse = bench_vector(b, DTYPE_I32, rows);
    CALL(dispatch_order, &all->t, (ranks - 1) * owned, &offsets->t, &order->t, &inverse->t);
}

CASE(moe_unsort_prob)
{
    const int64_t k = BY_KIND(b, 2, 3, 7, 6);
    struct bench_tensor *drow = acc_vector(b, ROWS(b) * k),
                        *row = bench_integers(b, bench_dense(b, DTYPE_I32, ROWS(b), k), 0,
                                              ROWS(b) * k),
                        *dprob = out_acc(b, ROWS(b), k);
    CALL(moe_unsort_prob, &drow->t, &row->t, &dprob->t);
}

CASE(expert_act_forward)
{
    struct bench_tensor *h = act(b, ROWS(b), COLS(b)),
                        *prob = bench_uniform(b, out_vector(b, ROWS(b)), 0, 1),
                        *y = out_act(b, ROWS(b), COLS(b));
    CALL(expert_act_forward, &h->t, &prob->t, &y->t);
}

CASE(expert_act_backward)
{
    struct bench_tensor *h = act(b, ROWS(b), COLS(b)),
                        *prob = bench_uniform(b, out_vector(b, ROWS(b)), 0, 1),
                        *y = out_act(b, ROWS(b), COLS(b)),
                        *dy = bench_inout(act(b, ROWS(b), COLS(b))),
                        *dh = out_act(b, ROWS(b), COLS(b)), *dprob = out_vector(b, ROWS(b));
    BENCH_RUN(b)
    {
        b->be->expert_act_backward(b->stream, &h->t, &prob->t, &dy->t, &dh->t, &dprob->t, &y->t);
        b->be->expert_act_backward(b->stream, &h->t, &prob->t, &dy->t, &dy->t, &dprob->t, NULL);
    }
}

CASE(expert_bias_update)
{
    const int64_t experts = BY_KIND(b, 2, 16, 61, 128);
    struct bench_tensor *bias = sum_vector(b, experts),
                        *count = bench_inout(
                            bench_integers(b, bench_vector(b, DTYPE_I64, experts), 0, 5));
    CALL(expert_bias_update, 1e-3, &bias->t, &count->t);
}

/* ---- vision: tiles of patches behind their class tokens ---- */

struct bench_tiles {
    int64_t rows, patches, classes, points, cols;
    struct bench_tensor *source, *index, *weight;
};

static inline struct bench_tiles tiles_of(struct bench *b)
{
    const int64_t tiles = BY_KIND(b, 1, 3, 5, 2), per_tile = BY_KIND(b, 2, 35, 101, 4096);
    struct bench_tiles v = { .classes = BY_KIND(b, 1, 2, 3, 8),
                             .points = BY_KIND(b, 3, 64, 17, 16384),
                             .cols = BY_KIND(b, 4, 136, 257, 1280) };
    v.patches = tiles * per_tile;
    v.rows = v.patches + tiles * v.classes;
    v.source = bench_vector(b, DTYPE_I32, v.rows);
    for (int64_t t = 0, p = 0, r = 0; t < tiles; t++) {
        for (int64_t j = 0; j < v.classes; j++)
            bench_store(v.source, 0, r++, (double)(-1 - j));
        for (int64_t i = 0; i < per_tile; i++)
            bench_store(v.source, 0, r++, (double)p++);
    }
    v.source->written = false;
    v.index = bench_integers(b, bench_dense(b, DTYPE_I32, v.patches, 4), 0, v.points);
    v.weight = bench_uniform(b, bench_dense(b, b->acc, v.patches, 4), 0, 1);
    return v;
}

CASE(vit_assemble_forward)
{
    const struct bench_tiles v = tiles_of(b);
    struct bench_tensor *e = act(b, v.patches, v.cols), *classes = act(b, v.classes, v.cols),
                        *grid = act(b, v.points, v.cols), *x = out_act(b, v.rows, v.cols);
    CALL(vit_assemble_forward, &e->t, &classes->t, &grid->t, &v.source->t, &v.index->t,
         &v.weight->t, &x->t);
}

CASE(vit_assemble_backward)
{
    const struct bench_tiles v = tiles_of(b);
    struct bench_tensor *dx = act(b, v.rows, v.cols), *de = out_act(b, v.patches, v.cols),
                        *dclass = sum_matrix(b, v.classes, v.cols),
                        *dgrid = sum_matrix(b, v.points, v.cols);
    CALL(vit_assemble_backward, &dx->t, &v.source->t, &v.index->t, &v.weight->t, &de->t, &dclass->t,
         &dgrid->t);
}

#endif
