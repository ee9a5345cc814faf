/* mlp.c - dense feed-forward layer `-` (model.md 1.7):
 *
 *   u = RMSNorm(x)
 *   h = u W1^T
 *   a = relu(h)^2
 *   y = x + a W2^T
 *
 * Kept for backward: the norm's statistics, u, h and a; not u with 'layernorm' in
 * recompute_modules.
 */
#include "mlp.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "linear.h"

struct mlp {
    double eps;
    int norm, fc1, fc2;  /* parameter indices */
    bool norm_again;     /* u is made again in backward */
    struct tensor rs, u; /* acc [T/t], [T/t,H] */
    struct tensor h, a;  /* [T,ffn] */
    struct tensor du;    /* [T/t,H] temporary */
    struct tensor da;    /* [T,ffn] temporary */
};

struct mlp *mlp_init(struct model *m, int i)
{
    const struct deck *deck = m->deck;
    struct mlp *l = xcalloc(1, sizeof *l);
    const int64_t h = deck->language.hidden_size, ffn = deck->language.ffn_hidden_size;
    const double sigma = deck->language.init_method_std;
    l->eps = deck->language.layernorm_epsilon;
    l->norm_again = deck_recomputes(deck, "layernorm");
    struct param p = { .module = MODEL_LANGUAGE };
    snprintf(p.name, sizeof p.name, "decoder.layers.%d.mlp.linear_fc1.layer_norm_weight", i);
    l->norm = model_add_vector(m, &p, h, PARAM_REPLICATED, RNG_ONES, 0.0);
    snprintf(p.name, sizeof p.name, "decoder.layers.%d.mlp.linear_fc1.weight", i);
    l->fc1 = linear_add(m, &p, ffn, h, PARAM_SPLIT_ROWS, sigma);
    snprintf(p.name, sizeof p.name, "decoder.layers.%d.mlp.linear_fc2.weight", i);
    l->fc2 =
        linear_add(m, &p, h, ffn, PARAM_SPLIT_COLS, sigma / sqrt((double)deck->derived.num_layers));
    return l;
}

void mlp_plan(struct model *m, struct mlp *l, struct arenas *as, enum arena_kind keep,
              int64_t tokens)
{
    struct arena *kept = &as->a[keep], *work = &as->a[ARENA_WORKSPACE];
    const int64_t h = m->deck->language.hidden_size, local = linear_local_rows(m, tokens);
    const int64_t ffn = m->deck->language.ffn_hidden_size / m->topo->language.tp_size;
    l->rs = arena_1d(kept, "mlp.rs", m->acc, local);
    l->h = arena_2d(kept, "mlp.h", m->act, tokens, ffn);
    l->a = arena_2d(kept, "mlp.a", m->act, tokens, ffn);
    if (!l->norm_again)
        l->u = arena_2d(kept, "mlp.u", m->act, local, h);
    const size_t mark = arena_mark(work);
    if (l->norm_again)
        l->u = arena_2d(work, "mlp.u", m->act, local, h);
    l->du = arena_2d(work, "mlp.du", m->act, local, h);
    l->da = arena_2d(work, "mlp.da", m->act, tokens, ffn);
    arena_rewind(work, mark);
}

void mlp_forward(struct model *m, struct mlp *l, const struct tensor *x, const struct tensor *y)
{
    m->be->rmsnorm_forward(m->compute, x, &model_param(m, l->norm)->value, l->eps, &l->u, &l->rs);
    linear_forward(m, model_param(m, l->fc1), linear_gather(m, &l->u, &m->gathered), NULL, &l->h);
    m->be->activation_forward(m->compute, BACKEND_RELU2, &l->h, &l->a);
    if (y)
        linear_row_forward(m, model_param(m, l->fc2), &l->a, x, y);
}

void mlp_backward(struct model *m, struct mlp *l, const struct tensor *x, const struct tensor *dx)
{
    const struct backend_ops *be = m->be;
    const struct param *norm = model_param(m, l->norm);
    linear_row_backward(m, model_param(m, l->fc2), &l->a, dx, &l->da);
    be->activation_backward(m->compute, BACKEND_RELU2, &l->h, &l->da, &l->da);
    if (l->norm_again)
        be->rmsnorm_forward(m->compute, x, &norm->value, l->eps, &l->u, &l->rs);
    linear_column_backward(m, model_param(m, l->fc1), &l->u, &l->da, &l->du);
    be->rmsnorm_backward(m->compute, x, &norm->value, &l->rs, &l->du, dx, param_grad(norm));
}

void mlp_free(struct mlp *l)
{
    free(l);
}
