/* shadow_cases.h - for every operation of backend.h a case: calls of it with random numbers in a
 * shape of the kind that the bench asks for. shadow_case at the end is made from the list of
 * operations: an operation without a case does not compile. Those of layers: shadow_cases_layers.h.
 */
#ifndef MIMO_SHADOW_CASES_H
#define MIMO_SHADOW_CASES_H

#include "shadow_cases_layers.h"

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
    struct bench_tensor *first = bench_make(b, b->acc, 3, e.w->t.shape, false);
    struct bench_tensor *x = act(b, rows, e.in), *dy = act(b, rows, e.out),
                        *y = out_act(b, rows, e.out), *dx = out_act(b, rows, e.in);
    BENCH_RUN(b)
    {
        b->be->grouped_gemm(b->stream, BACKEND_GROUPED_NT, &x->t, &e.w->t, &e.offsets->t, rows, 0.0,
                            &y->t);
        b->be->grouped_gemm(b->stream, BACKEND_GROUPED_NN, &dy->t, &e.w->t, &e.offsets->t, rows,
                            0.0, &dx->t);
        b->be->grouped_gemm(b->stream, BACKEND_GROUPED_TN, &dy->t, &x->t, &e.offsets->t, rows, 1.0,
                            &dw->t);
        b->be->grouped_gemm(b->stream, BACKEND_GROUPED_TN, &dy->t, &x->t, &e.offsets->t, rows, 0.0,
                            &first->t);
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
        b->be->loss_sum(b->stream, &logits->t, &mx->t, &se->t);
        if (calls > 1)
            b->be->loss_label(b->stream, &logits->t, &labels->t, first, &mx->t, &mx->t, &se->t,
                              &pl->t);
        if (calls > 2)
            b->be->loss_finish(b->stream, &se->t, &pl->t, &mask->t, &loss->t, &total->t);
        if (calls > 3)
            b->be->loss_backward(b->stream, &labels->t, first, &mx->t, &se->t, &mask->t,
                                 &logits->t);
    }
}

CASE(loss_sum)
{
    loss_cases(b, 1);
}
CASE(loss_label)
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
