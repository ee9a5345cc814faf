/* mamba.c - Mamba-2 layer `M` (model.md 1.6):
 *
 *   u = RMSNorm(x)
 *   [z | x | B | C | dt] = u W_in^T
 *   (x,B,C) <- silu(conv(x,B,C))
 *   y = scan(x,B,C,dt) + D x
 *   o = GroupedRMSNorm(y silu(z))
 *   out = x + o W_out^T
 *
 * The five blocks of W_in's rows lie as z (Di), x (Di), B (G*N), C (G*N), dt (mh); a
 * tensor-parallel rank holds its part of each block, not a contiguous slice of the whole. Kept for
 * backward: u, zxBCdt, the convolution, y before the gate, o, norm statistics; the states of the
 * scan are recomputed, with 'layernorm' in recompute_modules u and o too.
 */
#include "mamba.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "language.h"
#include "linear.h"

struct mamba {
    int heads, head_dim, groups, state, taps, chunk; /* on this rank: mh, P, G, N, W, Q */
    int64_t inner, channels;                         /* Di = mh*P, Di + 2GN */
    double eps;
    /* parameter indices */
    int norm, in_proj, conv_weight, conv_bias, dt_bias, a_log, d_skip, gate_norm, out_proj;
    bool norms_again;      /* u and o are made again in backward */
    struct tensor rs, u;   /* acc [T/t], [T/t,H] */
    struct tensor zxbcdt;  /* [T,2Di+2GN+mh] */
    struct tensor xbc;     /* [T,Di+2GN] after the convolution */
    struct tensor y, o;    /* [T,Di] scan output before the gate, behind the norm */
    struct tensor gate_rs; /* acc [T,G] */
    struct tensor du;      /* [T/t,H] temporary */
    struct tensor dxbc;    /* [T,Di+2GN] temporary */
    struct tensor d_o, dy; /* [T,Di] temporaries */
    struct tensor dzxbcdt; /* as zxbcdt, temporary */
    struct tensor scratch; /* acc, of the scan */
};

/* Column ranges of zxBCdt. */
static struct tensor z_of(const struct mamba *l, const struct tensor *t)
{
    return tensor_col_range(t, 0, l->inner);
}

static struct tensor xbc_of(const struct mamba *l, const struct tensor *t)
{
    return tensor_col_range(t, l->inner, l->channels);
}

static struct tensor dt_of(const struct mamba *l, const struct tensor *t)
{
    return tensor_col_range(t, l->inner + l->channels, l->heads);
}

static void declare(struct model *m, struct mamba *l, int i)
{
    const struct deck *deck = m->deck;
    const int64_t h = deck->language.hidden_size, mh = deck->mamba.mamba_num_heads;
    const int64_t di = mh * deck->mamba.mamba_head_dim,
                  gn = deck->mamba.mamba_num_groups * deck->mamba.mamba_state_dim;
    const int64_t taps = deck->mamba.linear_conv_kernel_dim;
    const double sigma = deck->language.init_method_std, conv = 1.0 / sqrt((double)taps);
    struct param p = { .module = MODEL_LANGUAGE };
    char prefix[32];
    snprintf(prefix, sizeof prefix, "decoder.layers.%d.mixer", i);
    snprintf(p.name, sizeof p.name, "%s.in_proj.layer_norm_weight", prefix);
    l->norm = model_add_vector(m, &p, h, PARAM_REPLICATED, RNG_ONES, 0.0);

    struct param w = { .module = MODEL_LANGUAGE,
                       .n_blocks = 5,
                       .block_rows = { di, di, gn, gn, mh } };
    snprintf(w.name, sizeof w.name, "%s.in_proj.weight", prefix);
    l->in_proj = linear_add(m, &w, 2 * di + 2 * gn + mh, h, PARAM_SPLIT_ROWS, sigma);

    struct param c = { .module = MODEL_LANGUAGE,
                       .ndim = 3,
                       .shape = { di + 2 * gn, 1, taps },
                       .shard = PARAM_SPLIT_ROWS,
                       .n_blocks = 3,
                       .block_rows = { di, gn, gn },
                       .decay = true,
                       .init = RNG_UNIFORM,
                       .init_scale = conv };
    snprintf(c.name, sizeof c.name, "%s.conv1d_weight", prefix);
    l->conv_weight = model_add_param(m, &c);
    struct param cb = { .module = MODEL_LANGUAGE, .n_blocks = 3, .block_rows = { di, gn, gn } };
    snprintf(cb.name, sizeof cb.name, "%s.conv1d_bias", prefix);
    l->conv_bias = model_add_vector(m, &cb, di + 2 * gn, PARAM_SPLIT_ROWS, RNG_UNIFORM, conv);

    snprintf(p.name, sizeof p.name, "%s.dt_bias", prefix);
    l->dt_bias = model_add_vector(m, &p, mh, PARAM_SPLIT_ROWS, RNG_DT_BIAS, 0.0);
    snprintf(p.name, sizeof p.name, "%s.A_log", prefix);
    l->a_log = model_add_vector(m, &p, mh, PARAM_SPLIT_ROWS, RNG_A_LOG, 0.0);
    snprintf(p.name, sizeof p.name, "%s.D", prefix);
    l->d_skip = model_add_vector(m, &p, mh, PARAM_SPLIT_ROWS, RNG_ONES, 0.0);
    snprintf(p.name, sizeof p.name, "%s.norm.weight", prefix);
    l->gate_norm = model_add_vector(m, &p, di, PARAM_SPLIT_ROWS, RNG_ONES, 0.0);
    snprintf(p.name, sizeof p.name, "%s.out_proj.weight", prefix);
    l->out_proj =
        linear_add(m, &p, h, di, PARAM_SPLIT_COLS, sigma / sqrt((double)deck->derived.num_layers));
}

struct mamba *mamba_init(struct model *m, int i)
{
    const struct deck *deck = m->deck;
    const int64_t t = m->topo->language.tp_size;
    struct mamba *l = xcalloc(1, sizeof *l);
    l->heads = (int)(deck->mamba.mamba_num_heads / t);
    l->head_dim = (int)deck->mamba.mamba_head_dim;
    l->groups = (int)(deck->mamba.mamba_num_groups / t);
    l->state = (int)deck->mamba.mamba_state_dim;
    l->taps = (int)deck->mamba.linear_conv_kernel_dim;
    l->chunk = (int)deck->mamba.mamba_chunk_size;
    l->inner = (int64_t)l->heads * l->head_dim;
    l->channels = l->inner + 2 * (int64_t)l->groups * l->state;
    l->eps = deck->language.layernorm_epsilon;
    l->norms_again = deck_recomputes(deck, "layernorm");
    declare(m, l, i);
    return l;
}

static void plan_norms(struct model *m, struct mamba *l, struct arena *a, int64_t tokens)
{
    l->u =
        arena_2d(a, "mamba.u", m->act, linear_local_rows(m, tokens), m->deck->language.hidden_size);
    l->o = arena_2d(a, "mamba.o", m->act, tokens, l->inner);
}

void mamba_plan(struct model *m, struct mamba *l, struct arenas *as, enum arena_kind keep,
                int64_t tokens, int64_t segments)
{
    struct arena *kept = &as->a[keep], *work = &as->a[ARENA_WORKSPACE];
    const int64_t h = m->deck->language.hidden_size, wide = l->inner + l->channels + l->heads;
    const int64_t local = linear_local_rows(m, tokens);
    l->rs = arena_1d(kept, "mamba.rs", m->acc, local);
    l->zxbcdt = arena_2d(kept, "mamba.zxbcdt", m->act, tokens, wide);
    l->y = arena_2d(kept, "mamba.y", m->act, tokens, l->inner);
    l->gate_rs = arena_2d(kept, "mamba.gate_rs", m->acc, tokens, l->groups);
    l->xbc = arena_2d(kept, "mamba.xbc", m->act, tokens, l->channels);
    if (!l->norms_again)
        plan_norms(m, l, kept, tokens);
    const size_t mark = arena_mark(work);
    if (l->norms_again)
        plan_norms(m, l, work, tokens);
    l->du = arena_2d(work, "mamba.du", m->act, local, h);
    l->dxbc = arena_2d(work, "mamba.dxbc", m->act, tokens, l->channels);
    l->d_o = arena_2d(work, "mamba.do", m->act, tokens, l->inner);
    l->dy = arena_2d(work, "mamba.dy", m->act, tokens, l->inner);
    l->dzxbcdt = arena_2d(work, "mamba.dzxbcdt", m->act, tokens, wide);
    l->scratch = arena_1d(
        work, "mamba.scan", m->acc,
        m->be->ssd_work(tokens, segments, l->heads, l->head_dim, l->groups, l->state, l->chunk));
    arena_rewind(work, mark);
}

void mamba_forward(struct model *m, struct mamba *l, const struct ragged *b, const struct tensor *x,
                   const struct tensor *y)
{
    const struct backend_ops *be = m->be;
    const struct tensor z = z_of(l, &l->zxbcdt), xbc = xbc_of(l, &l->zxbcdt),
                        dt = dt_of(l, &l->zxbcdt);
    be->rmsnorm_forward(m->compute, x, &model_param(m, l->norm)->value, l->eps, &l->u, &l->rs);
    linear_forward(m, model_param(m, l->in_proj), linear_gather(m, &l->u, &m->gathered), NULL,
                   &l->zxbcdt);
    be->conv_forward(m->compute, &xbc, &model_param(m, l->conv_weight)->value,
                     &model_param(m, l->conv_bias)->value, &b->cu, b->max_len, &l->xbc);
    be->ssd_forward(m->compute, &l->xbc, &dt, &model_param(m, l->dt_bias)->value,
                    &model_param(m, l->a_log)->value, &model_param(m, l->d_skip)->value, &b->cu,
                    b->max_len, l->heads, l->head_dim, l->groups, l->state, l->chunk, &l->scratch,
                    &l->y);
    be->gated_norm_forward(m->compute, &l->y, &z, &model_param(m, l->gate_norm)->value, l->groups,
                           l->eps, &l->o, &l->gate_rs);
    if (y)
        linear_row_forward(m, model_param(m, l->out_proj), &l->o, x, y);
}

void mamba_backward(struct model *m, struct mamba *l, const struct ragged *b,
                    const struct tensor *x, const struct tensor *dx)
{
    const struct backend_ops *be = m->be;
    struct stream *s = m->compute;
    const struct tensor z = z_of(l, &l->zxbcdt), xbc = xbc_of(l, &l->zxbcdt),
                        dt = dt_of(l, &l->zxbcdt);
    const struct tensor dz = z_of(l, &l->dzxbcdt), dxbc = xbc_of(l, &l->dzxbcdt),
                        ddt = dt_of(l, &l->dzxbcdt);
    const struct param *norm = model_param(m, l->norm), *gate = model_param(m, l->gate_norm);
    const struct param *cw = model_param(m, l->conv_weight), *cb = model_param(m, l->conv_bias);
    const struct param *dtb = model_param(m, l->dt_bias), *al = model_param(m, l->a_log),
                       *ds = model_param(m, l->d_skip);

    if (l->norms_again) {
        be->rmsnorm_forward(s, x, &norm->value, l->eps, &l->u, &l->rs);
        be->gated_norm_forward(s, &l->y, &z, &gate->value, l->groups, l->eps, &l->o, &l->gate_rs);
    }
    linear_row_backward(m, model_param(m, l->out_proj), &l->o, dx, &l->d_o);
    be->gated_norm_backward(s, &l->y, &z, &gate->value, l->groups, &l->gate_rs, &l->d_o, &l->dy,
                            &dz, param_grad(gate));
    be->ssd_backward(s, &l->xbc, &dt, &dtb->value, &al->value, &ds->value, &b->cu, b->max_len,
                     l->heads, l->head_dim, l->groups, l->state, l->chunk, &l->dy, &l->scratch,
                     &l->dxbc, &ddt, param_grad(dtb), param_grad(al), param_grad(ds));
    be->conv_backward(s, &xbc, &cw->value, &cb->value, &b->cu, b->max_len, &l->dxbc, &dxbc,
                      param_grad(cw), param_grad(cb));
    linear_column_backward(m, model_param(m, l->in_proj), &l->u, &l->dzxbcdt, &l->du);
    be->rmsnorm_backward(s, x, &norm->value, &l->rs, &l->du, dx, param_grad(norm));
}

void mamba_free(struct mamba *l)
{
    free(l);
}
