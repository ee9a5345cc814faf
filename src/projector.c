/* projector.c - see projector.h. The hidden width of the mlp form is four times the input width.
 * Initial values take the language model's sigma and sigma/sqrt(L). Over encoder tp the affine
 * matrix is column-parallel with gathered output, the mlp form is column- and row-parallel; input,
 * norm and output are replicated (replicated.h). */
#include "projector.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "linear.h"
#include "replicated.h"

struct projector {
    int64_t width, hidden; /* hidden = 0: affine */
    double eps;
    int norm, fc1, fc2; /* affine: fc1 only; -1 = absent */
    /* [rows,width] temporaries: normed input; mlp with norm */
    struct tensor u, du;
    struct tensor a, da;                /* [rows,hidden/t] temporaries */
    struct replicated_columns gathered; /* affine */
};

struct projector *projector_init(struct model *m, int64_t width)
{
    const struct deck *deck = m->deck;
    struct projector *l = xcalloc(1, sizeof *l);
    const int64_t h = deck->language.hidden_size;
    const double sigma = deck->language.init_method_std;
    const bool mlp = deck->projector.vision_projection_type == DECK_PROJECTION_MLP;
    struct param p = { .module = MODEL_PROJECTOR };
    l->width = width;
    l->eps = deck->language.layernorm_epsilon;
    l->norm = l->fc2 = -1;
    if (!mlp) {
        ASSERT(h % m->topo->encoder.tp_size == 0);
        snprintf(p.name, sizeof p.name, "encoder.weight");
        l->fc1 = linear_add(m, &p, h, width, PARAM_SPLIT_ROWS, sigma);
        return l;
    }
    l->hidden = 4 * width;
    if (deck->projector.projection_normalization == DECK_PROJECTION_NORM_RMSNORM) {
        snprintf(p.name, sizeof p.name, "encoder.linear_fc1.layer_norm_weight");
        l->norm = model_add_vector(m, &p, width, PARAM_REPLICATED, RNG_ONES, 0.0);
    }
    snprintf(p.name, sizeof p.name, "encoder.linear_fc1.weight");
    l->fc1 = linear_add(m, &p, l->hidden, width, PARAM_SPLIT_ROWS, sigma);
    snprintf(p.name, sizeof p.name, "encoder.linear_fc2.weight");
    l->fc2 = linear_add(m, &p, h, l->hidden, PARAM_SPLIT_COLS,
                        sigma / sqrt((double)deck->derived.num_layers));
    return l;
}

void projector_plan(struct model *m, struct projector *l, struct arenas *as, int64_t rows,
                    struct projector_kept *kept, int n)
{
    struct arena *acts = &as->a[ARENA_ACTIVATIONS], *work = &as->a[ARENA_WORKSPACE];
    if (l->hidden == 0) {
        replicated_plan(m, &l->gathered, work, rows, m->deck->language.hidden_size);
        return;
    }
    const int64_t hidden = l->hidden / m->topo->encoder.tp_size;
    for (int i = 0; i < n; i++) {
        kept[i].rs = arena_1d(acts, "projector.rs", m->acc, rows);
        kept[i].h = arena_2d(acts, "projector.h", m->act, rows, hidden);
    }
    l->u = arena_2d(work, "projector.u", m->act, rows, l->width);
    l->du = arena_2d(work, "projector.du", m->act, rows, l->width);
    l->a = arena_2d(work, "projector.a", m->act, rows, hidden);
    l->da = arena_2d(work, "projector.da", m->act, rows, hidden);
}

/* The input of fc1: x itself, or its norm in the temporary u. */
static struct tensor normed(struct model *m, struct projector *l, struct projector_kept *kept,
                            const struct tensor *x)
{
    if (l->norm < 0)
        return *x;
    const struct tensor u = tensor_first(&l->u, tensor_rows(x)),
                        rs = tensor_first(&kept->rs, tensor_rows(x));
    m->be->rmsnorm_forward(m->compute, x, &model_param(m, l->norm)->value, l->eps, &u, &rs);
    return u;
}

void projector_forward(struct model *m, struct projector *l, struct projector_kept *kept,
                       const struct tensor *x, const struct tensor *out)
{
    if (l->hidden == 0) {
        replicated_gather_forward(m, &l->gathered, model_param(m, l->fc1), x, out);
        return;
    }
    const int64_t rows = tensor_rows(x);
    const struct tensor u = normed(m, l, kept, x);
    const struct tensor h = tensor_first(&kept->h, rows), a = tensor_first(&l->a, rows);
    linear_forward(m, model_param(m, l->fc1), &u, NULL, &h);
    m->be->activation_forward(m->compute, BACKEND_RELU2, &h, &a);
    replicated_row_forward(m, model_param(m, l->fc2), NULL, &a, NULL, out);
}

void projector_backward(struct model *m, struct projector *l, struct projector_kept *kept,
                        const struct tensor *x, const struct tensor *dout, const struct tensor *dx)
{
    const struct backend_ops *be = m->be;
    if (l->hidden == 0) {
        replicated_gather_backward(m, model_param(m, l->fc1), x, dout, dx);
        return;
    }
    const int64_t rows = tensor_rows(x);
    const struct tensor h = tensor_first(&kept->h, rows), a = tensor_first(&l->a, rows);
    const struct tensor da = tensor_first(&l->da, rows);
    be->activation_forward(m->compute, BACKEND_RELU2, &h, &a);
    linear_backward(m, model_param(m, l->fc2), &a, dout, 0.0, &da);
    be->activation_backward(m->compute, BACKEND_RELU2, &h, &da, &da);
    const struct tensor u = normed(m, l, kept, x);
    if (l->norm < 0) {
        replicated_column_backward(m, model_param(m, l->fc1), &u, &da, dx);
        return;
    }
    const struct param *norm = model_param(m, l->norm);
    const struct tensor du = tensor_first(&l->du, rows), rs = tensor_first(&kept->rs, rows);
    replicated_column_backward(m, model_param(m, l->fc1), &u, &da, &du);
    /* When nothing upstream trains, the input gradient goes into the temporary u and is dropped. */
    if (dx)
        be->fill(m->compute, dx, 0.0);
    be->rmsnorm_backward(m->compute, x, &norm->value, &rs, &du, dx ? dx : &u, param_grad(norm));
}

void projector_free(struct projector *l)
{
    free(l);
}
