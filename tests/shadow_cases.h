/* shadow_cases.h - for every operation of backend.h a case: calls of it with random numbers in a
 * shape of the kind that the bench asks for. shadow_case at the end is made from the list of
 * operations: an operation without a case does not compile.
 */
#ifndef MIMO_SHADOW_CASES_H
#define MIMO_SHADOW_CASES_H

#include "shadow_bench.h"

/* tiny, ragged, prime, production */
#define BY_KIND(b, t, r, p, l) ((const int64_t[]){ t, r, p, l }[(b)->kind])
#define ROWS(b) BY_KIND(b, 2, 37, 131, 4096)
#define COLS(b) BY_KIND(b, 4, 100, 257, 2688)

/* Activations and accumulated numbers. */
static inline struct bench_tensor *act(struct bench *b, int64_t rows, int64_t cols)
{
    return bench_normal(b, bench_matrix(b, b->act, rows, cols), 1);
}
static inline struct bench_tensor *acc(struct bench *b, int64_t rows, int64_t cols)
{
    return bench_normal(b, bench_matrix(b, b->acc, rows, cols), 1);
}
static inline struct bench_tensor *act_vector(struct bench *b, int64_t n)
{
    return bench_uniform(b, bench_vector(b, b->act, n), 0.5, 1.5);
}
static inline struct bench_tensor *acc_vector(struct bench *b, int64_t n)
{
    return bench_normal(b, bench_vector(b, b->acc, n), 1);
}
/* Outputs, and what is added to. */
static inline struct bench_tensor *out_act(struct bench *b, int64_t rows, int64_t cols)
{
    return bench_matrix(b, b->act, rows, cols);
}
static inline struct bench_tensor *out_acc(struct bench *b, int64_t rows, int64_t cols)
{
    return bench_matrix(b, b->acc, rows, cols);
}
static inline struct bench_tensor *out_vector(struct bench *b, int64_t n)
{
    return bench_vector(b, b->acc, n);
}
static inline struct bench_tensor *sum_vector(struct bench *b, int64_t n)
{
    return bench_inout(acc_vector(b, n));
}
static inline struct bench_tensor *sum_matrix(struct bench *b, int64_t rows, int64_t cols)
{
    return bench_inout(acc(b, rows, cols));
}
static inline struct bench_tensor *index_vector(struct bench *b, int64_t n, int64_t low,
                                                int64_t high)
{
    return bench_integers(b, bench_vector(b, DTYPE_I32, n), low, high);
}

#define CASE(op) static inline void case_##op(struct bench *b)
#define CALL(op, ...) BENCH_RUN(b) b->be->op(b->stream, __VA_ARGS__)

/* ---- memory ---- */

CASE(copy)
{
    struct bench_tensor *x = act(b, ROWS(b), COLS(b)), *y = out_act(b, ROWS(b), COLS(b));
    CALL(copy, &x->t, &y->t);
}

CASE(fill)
{
    struct bench_tensor *y = out_act(b, ROWS(b), COLS(b)), *n = bench_vector(b, DTYPE_I64, ROWS(b));
    BENCH_RUN(b)
    {
        b->be->fill(b->stream, &y->t, -1.7182818284590452);
        b->be->fill(b->stream, &n->t, 123456789012.0);
    }
}

CASE(cast)
{
    struct bench_tensor *x = act(b, ROWS(b), COLS(b)), *y = out_acc(b, ROWS(b), COLS(b)),
                        *z = out_act(b, ROWS(b), COLS(b));
    BENCH_RUN(b)
    {
        b->be->cast(b->stream, &x->t, &y->t);
        b->be->cast(b->stream, &y->t, &z->t);
    }
}

CASE(initialise)
{
    static const enum rng_init kind[] = { RNG_ONES,    RNG_ZEROS, RNG_NORMAL,
                                          RNG_UNIFORM, RNG_A_LOG, RNG_DT_BIAS };
    struct bench_tensor *t[6];
    for (int i = 0; i < 6; i++)
        t[i] = out_act(b, BY_KIND(b, 2, 37, 131, 1024), COLS(b));
    BENCH_RUN(b)
    for (int i = 0; i < 6; i++)
        b->be->initialise(b->stream, kind[i], 0.02, (struct rng_key){ { 7, (uint32_t)i } }, 1000,
                          (uint64_t)COLS(b) * 3, &t[i]->t);
}

/* ---- dense ---- */

CASE(gemm)
{
    const int64_t m = BY_KIND(b, 3, 70, 131, 1024), n = BY_KIND(b, 5, 96, 257, 16384),
                  k = BY_KIND(b, 2, 40, 509, 2688);
    struct bench_tensor *a = act(b, m, k), *at = act(b, k, m), *w = act(b, k, n),
                        *wt = act(b, n, k), *c = act(b, m, n);
    struct bench_tensor *d = out_act(b, m, n), *e = out_acc(b, m, n), *sum = sum_matrix(b, m, n),
                        *f = out_act(b, m, n);
    BENCH_RUN(b)
    {
        b->be->gemm(b->stream, false, true, 1, &a->t, &wt->t, 0, NULL, &d->t);
        b->be->gemm(b->stream, false, false, 0.75, &a->t, &w->t, 0, NULL, &e->t);
        b->be->gemm(b->stream, true, false, 1, &at->t, &w->t, 1, &sum->t, &sum->t);
        b->be->gemm(b->stream, true, true, -0.5, &at->t, &wt->t, 1, &c->t, &f->t);
    }
}

/* Experts with random shares of the rows, one without any. */
struct bench_experts {
    int64_t experts, rows, in, out;
    struct bench_tensor *offsets, *w;
};

static inline struct bench_experts experts_of(struct bench *b)
{
    struct bench_experts e = { .experts = BY_KIND(b, 2, 6, 13, 128),
                               .rows = BY_KIND(b, 3, 61, 211, 49152),
                               .in = BY_KIND(b, 2, 24, 67, 672),
                               .out = BY_KIND(b, 4, 40, 31, 464) };
    int64_t at = 0;
    e.offsets = bench_vector(b, DTYPE_I32, e.experts + 1);
    for (int64_t i = 0; i <= e.experts; i++) {
        bench_store(e.offsets, 0, i, (double)(i == e.experts ? e.rows : at));
        at += i == 1 ? 0 : (int64_t)(bench_random(b) % (uint64_t)(2 * e.rows / e.experts + 1));
        at = at > e.rows ? e.rows : at;
    }
    e.offsets->written = false;
    e.w =
        bench_normal(b, bench_make(b, b->act, 3, (int64_t[]){ e.experts, e.out, e.in }, false), 1);
    return e;
}

CASE(grouped_gemm)
{
    const struct bench_experts e = experts_of(b);
    const int64_t rows = e.rows + 5; /* some belong to no expert */
    struct bench_tensor *dw =
        bench_inout(bench_normal(b, bench_make(b, b->acc, 3, e.w->t.shape, false), 1));
    struct bench_tensor *x = act(b, rows, e.in), *dy = act(b, rows, e.out),
                        *y = out_act(b, rows, e.out), *dx = out_act(b, rows, e.in);
    BENCH_RUN(b)
    {
        b->be->grouped_gemm(b->stream, BACKEND_GROUPED_NT, &x->t, &e.w->t, &e.offsets->t, rows,
                            &y->t);
        b->be->grouped_gemm(b->stream, BACKEND_GROUPED_NN, &dy->t, &e.w->t, &e.offsets->t, rows,
                            &dx->t);
        b->be->grouped_gemm(b->stream, BACKEND_GROUPED_TN, &dy->t, &x->t, &e.offsets->t, rows,
                            &dw->t);
    }
}

CASE(grouped_act_forward)
{
    const struct bench_experts e = experts_of(b);
    struct bench_tensor *a = act(b, e.rows, e.in),
                        *prob = bench_uniform(b, out_vector(b, e.rows), 0, 1),
                        *h = out_act(b, e.rows, e.out), *y = out_act(b, e.rows, e.out);
    CALL(grouped_act_forward, &a->t, &e.w->t, &e.offsets->t, &prob->t, &h->t, &y->t);
}

CASE(grouped_act_backward)
{
    const struct bench_experts e = experts_of(b);
    struct bench_tensor *a = act(b, e.rows, e.out), *h = act(b, e.rows, e.in),
                        *prob = bench_uniform(b, out_vector(b, e.rows), 0, 1),
                        *dh = out_act(b, e.rows, e.in), *dprob = out_vector(b, e.rows),
                        *y = out_act(b, e.rows, e.in);
    BENCH_RUN(b)
    {
        b->be->grouped_act_backward(b->stream, &a->t, &e.w->t, &e.offsets->t, &h->t, &prob->t,
                                    &dh->t, &dprob->t, NULL);
        b->be->grouped_act_backward(b->stream, &a->t, &e.w->t, &e.offsets->t, &h->t, &prob->t,
                                    &dh->t, &dprob->t, &y->t);
    }
}

CASE(add)
{
    struct bench_tensor *x = act(b, ROWS(b), COLS(b)), *y = bench_inout(act(b, ROWS(b), COLS(b))),
                        *z = sum_matrix(b, ROWS(b), COLS(b));
    BENCH_RUN(b)
    {
        b->be->add(b->stream, &x->t, &y->t);
        b->be->add(b->stream, &x->t, &z->t);
    }
}

CASE(add_bias)
{
    struct bench_tensor *bias = act_vector(b, COLS(b)), *y = bench_inout(act(b, ROWS(b), COLS(b)));
    CALL(add_bias, &bias->t, &y->t);
}

CASE(bias_backward)
{
    struct bench_tensor *dy = act(b, ROWS(b), COLS(b)), *dbias = sum_vector(b, COLS(b));
    CALL(bias_backward, &dy->t, &dbias->t);
}

CASE(activation_forward)
{
    struct bench_tensor *x = act(b, ROWS(b), COLS(b)), *y = out_act(b, ROWS(b), COLS(b)),
                        *z = bench_inout(act(b, ROWS(b), COLS(b)));
    BENCH_RUN(b)
    {
        b->be->activation_forward(b->stream, BACKEND_RELU2, &x->t, &y->t);
        b->be->activation_forward(b->stream, BACKEND_GELU, &z->t, &z->t);
    }
}

CASE(activation_backward)
{
    struct bench_tensor *x = act(b, ROWS(b), COLS(b)), *dy = act(b, ROWS(b), COLS(b)),
                        *dx = out_act(b, ROWS(b), COLS(b)),
                        *dz = bench_inout(act(b, ROWS(b), COLS(b)));
    BENCH_RUN(b)
    {
        b->be->activation_backward(b->stream, BACKEND_GELU, &x->t, &dy->t, &dx->t);
        b->be->activation_backward(b->stream, BACKEND_RELU2, &x->t, &dz->t, &dz->t);
    }
}

CASE(rmsnorm_forward)
{
    struct bench_tensor *x = act(b, ROWS(b), COLS(b)), *w = act_vector(b, COLS(b)),
                        *y = out_act(b, ROWS(b), COLS(b)), *rs = out_vector(b, ROWS(b));
    CALL(rmsnorm_forward, &x->t, &w->t, 1e-5, &y->t, &rs->t);
}

CASE(rmsnorm_backward)
{
    struct bench_tensor *x = act(b, ROWS(b), COLS(b)), *w = act_vector(b, COLS(b)),
                        *rs = bench_uniform(b, out_vector(b, ROWS(b)), 0.5, 1);
    struct bench_tensor *dy = act(b, ROWS(b), COLS(b)), *dx = bench_inout(act(b, ROWS(b), COLS(b))),
                        *dw = sum_vector(b, COLS(b));
    BENCH_RUN(b)
    {
        b->be->rmsnorm_backward(b->stream, &x->t, &w->t, &rs->t, &dy->t, &dx->t, &dw->t);
        b->be->rmsnorm_backward(b->stream, &x->t, &w->t, &rs->t, &dy->t, &dx->t, NULL);
    }
}

CASE(layernorm_forward)
{
    struct bench_tensor *x = bench_uniform(b, out_act(b, ROWS(b), COLS(b)), -1, 3),
                        *w = act_vector(b, COLS(b)), *bias = act_vector(b, COLS(b));
    struct bench_tensor *y = out_act(b, ROWS(b), COLS(b)), *mean = out_vector(b, ROWS(b)),
                        *rs = out_vector(b, ROWS(b));
    CALL(layernorm_forward, &x->t, &w->t, &bias->t, 1e-5, &y->t, &mean->t, &rs->t);
}

CASE(layernorm_backward)
{
    struct bench_tensor *x = bench_uniform(b, out_act(b, ROWS(b), COLS(b)), -1, 3),
                        *w = act_vector(b, COLS(b)), *dy = act(b, ROWS(b), COLS(b));
    struct bench_tensor *mean = bench_uniform(b, out_vector(b, ROWS(b)), 0.8, 1.2),
                        *rs = bench_uniform(b, out_vector(b, ROWS(b)), 0.5, 1);
    struct bench_tensor *dx = bench_inout(act(b, ROWS(b), COLS(b))), *dw = sum_vector(b, COLS(b)),
                        *db = sum_vector(b, COLS(b));
    BENCH_RUN(b)
    {
        b->be->layernorm_backward(b->stream, &x->t, &w->t, &mean->t, &rs->t, &dy->t, &dx->t, &dw->t,
                                  &db->t);
        b->be->layernorm_backward(b->stream, &x->t, &w->t, &mean->t, &rs->t, &dy->t, &dx->t, NULL,
                                  NULL);
    }
}

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

/* ---- rows ---- */

CASE(gather_rows)
{
    struct bench_tensor *in = act(b, ROWS(b), COLS(b)),
                        *index = index_vector(b, 3 * ROWS(b), -1, ROWS(b)),
                        *out = out_act(b, 3 * ROWS(b), COLS(b));
    CALL(gather_rows, &in->t, &index->t, &out->t);
}

CASE(gather_sum_rows)
{
    const int64_t k = BY_KIND(b, 2, 3, 7, 6);
    struct bench_tensor *in = act(b, 3 * ROWS(b), COLS(b)),
                        *index = bench_integers(b, bench_dense(b, DTYPE_I32, ROWS(b), k), -1,
                                                3 * ROWS(b));
    struct bench_tensor *out = out_act(b, ROWS(b), COLS(b)),
                        *sum = bench_inout(act(b, ROWS(b), COLS(b)));
    BENCH_RUN(b)
    {
        b->be->gather_sum_rows(b->stream, &in->t, &index->t, 0, &out->t);
        b->be->gather_sum_rows(b->stream, &in->t, &index->t, 1, &sum->t);
    }
}

/* Every third token a picture's row; a vocabulary with words of other ranks. */
struct bench_embedding {
    struct bench_tensor *ids, *row;
    int64_t words, pictures;
};

static inline struct bench_embedding embedding_of(struct bench *b)
{
    struct bench_embedding e = { .words = BY_KIND(b, 3, 50, 61, 32768) };
    e.ids = bench_integers(b, bench_vector(b, DTYPE_I64, ROWS(b)), 0, e.words + 20);
    e.row = bench_vector(b, DTYPE_I32, ROWS(b));
    for (int64_t t = 0; t < ROWS(b); t++)
        bench_store(e.row, 0, t, t % 3 ? -1.0 : (double)e.pictures++);
    e.row->written = false;
    return e;
}

CASE(embed_merge_forward)
{
    const struct bench_embedding e = embedding_of(b);
    struct bench_tensor *table = act(b, e.words, COLS(b)), *image = act(b, e.pictures, COLS(b)),
                        *out = out_act(b, ROWS(b), COLS(b)), *text = out_act(b, ROWS(b), COLS(b));
    BENCH_RUN(b)
    {
        b->be->embed_merge_forward(b->stream, &e.ids->t, &e.row->t, &table->t, 5, &image->t,
                                   &out->t);
        b->be->embed_merge_forward(b->stream, &e.ids->t, &e.row->t, &table->t, 5, NULL, &text->t);
    }
}

CASE(embed_merge_backward)
{
    const struct bench_embedding e = embedding_of(b);
    struct bench_tensor *dout = act(b, ROWS(b), COLS(b)), *dtable = sum_matrix(b, e.words, COLS(b)),
                        *dimage = out_act(b, e.pictures, COLS(b));
    BENCH_RUN(b)
    {
        b->be->embed_merge_backward(b->stream, &e.ids->t, &e.row->t, &dout->t, 5, &dtable->t, NULL);
        b->be->embed_merge_backward(b->stream, &e.ids->t, &e.row->t, &dout->t, 5, NULL, &dimage->t);
        b->be->embed_merge_backward(b->stream, &e.ids->t, &e.row->t, &dout->t, 5, &dtable->t,
                                    &dimage->t);
    }
}

/* ---- loss: the four operations in turn, each on what the one before it left ---- */

static inline void loss_cases(struct bench *b, int calls)
{
    const int64_t rows = BY_KIND(b, 2, 97, 131, 1024), words = BY_KIND(b, 5, 100, 509, 131072),
                  first = 3;
    struct bench_tensor *logits = bench_inout(bench_normal(b, out_act(b, rows, words), 3)),
                        *labels = bench_integers(b, bench_vector(b, DTYPE_I64, rows), 0, words + 6);
    struct bench_tensor *mask = bench_integers(b, out_vector(b, rows), 0, 2),
                        *mx = out_vector(b, rows), *se = out_vector(b, rows),
                        *pl = out_vector(b, rows), *loss = out_vector(b, rows),
                        *total = sum_vector(b, 1);
    BENCH_RUN(b)
    {
        b->be->loss_max(b->stream, &logits->t, &mx->t);
        if (calls > 1)
            b->be->loss_sum(b->stream, &logits->t, &labels->t, first, &mx->t, &se->t, &pl->t);
        if (calls > 2)
            b->be->loss_finish(b->stream, &se->t, &pl->t, &mask->t, &loss->t, &total->t);
        if (calls > 3)
            b->be->loss_backward(b->stream, &labels->t, first, &mx->t, &se->t, &mask->t,
                                 &logits->t);
    }
}

CASE(loss_max)
{
    loss_cases(b, 1);
}
CASE(loss_sum)
{
    loss_cases(b, 2);
}
CASE(loss_finish)
{
    loss_cases(b, 3);
}
CASE(loss_backward)
{
    loss_cases(b, 4);
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

/* ---- optimizer ---- */

CASE(sum_squares)
{
    struct bench_tensor *x = acc(b, ROWS(b), COLS(b)), *total = sum_vector(b, 1);
    CALL(sum_squares, &x->t, &total->t);
}

CASE(count_zeros)
{
    struct bench_tensor *x = bench_integers(b, out_acc(b, ROWS(b), COLS(b)), -1, 3),
                        *total =
                            bench_inout(bench_integers(b, bench_vector(b, DTYPE_I64, 1), 5, 6));
    CALL(count_zeros, &x->t, &total->t);
}

CASE(adamw)
{
    const int64_t n = BY_KIND(b, 3, 1000, 10007, 1 << 23);
    struct bench_tensor *grad = acc_vector(b, n), *master = sum_vector(b, n),
                        *m = bench_inout(bench_normal(b, out_vector(b, n), 0.1)),
                        *v = bench_inout(bench_uniform(b, out_vector(b, n), 0, 0.1)),
                        *param = bench_vector(b, b->act, n);
    struct bench_tensor *factor = bench_uniform(b, bench_vector(b, DTYPE_F64, 1), 0.2, 0.3),
                        *no = bench_uniform(b, bench_vector(b, DTYPE_F64, 1), -1, -1);
    BENCH_RUN(b)
    {
        b->be->adamw(b->stream, &grad->t, &factor->t, 1e-3, 0.9, 0.95, 1e-8, 0.05, 7, &master->t,
                     &m->t, &v->t, &param->t);
        b->be->adamw(b->stream, &grad->t, &no->t, 1e-3, 0.9, 0.95, 1e-8, 0.05, 8, &master->t, &m->t,
                     &v->t, &param->t);
    }
}

CASE(sum_wide)
{
    struct bench_tensor *x = acc_vector(b, BY_KIND(b, 3, 100, 1009, 8192)),
                        *total = bench_vector(b, DTYPE_F64, 1);
    CALL(sum_wide, &x->t, &total->t);
}

CASE(decide_update)
{
    static const double factor[] = { 0.5, 0.25, 1 };
    const int64_t ranks = BY_KIND(b, 1, 3, 7, 256), modules = BY_KIND(b, 1, 2, 3, 2);
    struct bench_tensor *numbers =
                            bench_uniform(b, bench_dense(b, DTYPE_F64, ranks, 1 + modules), 1, 5),
                        *clipped = bench_vector(b, DTYPE_F64, modules + 3),
                        *skipped = bench_vector(b, DTYPE_F64, modules + 3);
    BENCH_RUN(b)
    {
        b->be->decide_update(b->stream, &numbers->t, 100, factor, 0.5, 0, &clipped->t);
        b->be->decide_update(b->stream, &numbers->t, 100, factor, 0, 1e-3, &skipped->t);
    }
}

/* ---- the table ---- */

static const struct shadow_case {
    const char *name;
    void (*run)(struct bench *b);
} shadow_case[] = {
#define SHADOW_CASE(op) { #op, case_##op },
    BACKEND_OPS(SHADOW_CASE)
#undef SHADOW_CASE
};
enum { SHADOW_CASES = sizeof shadow_case / sizeof *shadow_case };

/* One call of a case; the bench's tables, streams and types are set. True when nothing was
 * found. */
static inline bool shadow_case_run(struct bench *b, int op, enum bench_kind kind, uint64_t seed)
{
    b->kind = kind;
    b->pad = kind == BENCH_RAGGED ? 3 : kind == BENCH_PRIME ? 8 : 0;
    b->offset = kind == BENCH_RAGGED ? 1 : b->pad;
    b->random = seed * 1000003 + (uint64_t)op * 7 + kind;
    b->trouble[0] = '\0';
    shadow_case[op].run(b);
    bench_free(b);
    return b->trouble[0] == '\0';
}

#endif
