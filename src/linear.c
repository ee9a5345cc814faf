/* linear.c - see linear.h. The weight gradient is one GEMM with beta = 1 into the main gradient, so
 * no separate accumulation pass exists (model.md 0.3 item 3). */
#include "linear.h"

const struct tensor *param_grad(const struct param *p)
{
    return p->trainable ? &p->grad : NULL;
}

int linear_add(struct model *m, const struct param *base, int64_t out, int64_t in,
               enum param_shard shard, double std)
{
    struct param p = *base;
    p.products = true;
    return model_add_matrix(m, &p, out, in, shard, std);
}

double param_grad_beta(struct param *p)
{
    const bool first = p->fresh;
    p->fresh = false;
    return first ? 0.0 : 1.0;
}

static void count_flops(struct model *m, const struct param *w, int64_t rows)
{
    m->gemm_flops += 2 * rows * tensor_rows(&w->value) * tensor_cols(&w->value);
}

void linear_forward(struct model *m, const struct param *w, const struct tensor *x,
                    const struct tensor *residual, const struct tensor *y)
{
    m->be->gemm(m->compute, false, true, 1.0, x, &w->value, residual ? 1.0 : 0.0, residual, y);
    count_flops(m, w, tensor_rows(x));
}

void linear_weight_backward(struct model *m, struct param *w, const struct tensor *x,
                            const struct tensor *dy)
{
    if (!w->trainable)
        return;
    m->be->gemm(m->compute, true, false, 1.0, dy, x, param_grad_beta(w), &w->grad, &w->grad);
    count_flops(m, w, tensor_rows(dy));
}

void linear_input_backward(struct model *m, const struct param *w, const struct tensor *dy,
                           double beta, const struct tensor *dx)
{
    if (!dx)
        return;
    m->be->gemm(m->compute, false, false, 1.0, dy, &w->value, beta, beta != 0.0 ? dx : NULL, dx);
    count_flops(m, w, tensor_rows(dy));
}

void linear_backward(struct model *m, struct param *w, const struct tensor *x,
                     const struct tensor *dy, double beta, const struct tensor *dx)
{
    linear_weight_backward(m, w, x, dy);
    linear_input_backward(m, w, dy, beta, dx);
}

/* ---- beside compute -------------------------------------------------------------------------- */

void linear_fork(struct model *m)
{
    m->be->event_record(&m->tp_event, m->compute);
    m->be->stream_wait(&m->tp, &m->tp_event);
}

void linear_join(struct model *m)
{
    m->be->event_record(&m->tp_event, &m->tp);
    m->be->stream_wait(m->compute, &m->tp_event);
}

/* ---- sequence-parallel regions --------------------------------------------------------------- */

static bool alone(const struct model *m)
{
    return m->topo->language.tp_size == 1;
}

int64_t linear_local_rows(const struct model *m, int64_t tokens)
{
    return tokens / m->topo->language.tp_size;
}

const struct tensor *linear_gather(struct model *m, const struct tensor *local,
                                   const struct tensor *full)
{
    if (alone(m))
        return local;
    m->comm->all_gather(m->topo->language.tp.comm, local, full, m->compute);
    return full;
}

void linear_reduce(struct model *m, const struct tensor *full, const struct tensor *local)
{
    if (alone(m))
        ASSERT(full->data == local->data);
    else
        m->comm->reduce_scatter(m->topo->language.tp.comm, full, local, COMM_SUM, m->compute);
}

void linear_row_forward(struct model *m, const struct param *w, const struct tensor *a,
                        const struct tensor *residual, const struct tensor *y)
{
    if (alone(m)) {
        linear_forward(m, w, a, residual, y);
        return;
    }
    linear_forward(m, w, a, NULL, &m->partial);
    linear_reduce(m, &m->partial, y);
    m->be->add(m->compute, residual, y);
}

void linear_row_backward(struct model *m, struct param *w, const struct tensor *a,
                         const struct tensor *dy, const struct tensor *da)
{
    linear_backward(m, w, a, linear_gather(m, dy, &m->gathered), 0.0, da);
}

void linear_column_backward(struct model *m, struct param *w, const struct tensor *u,
                            const struct tensor *dz, const struct tensor *du)
{
    if (alone(m)) {
        linear_backward(m, w, u, dz, 0.0, du);
        return;
    }
    /* The rows of u travel beside the product that makes du, the sums of du beside the product that
     * needs u. */
    linear_fork(m);
    m->comm->all_gather(m->topo->language.tp.comm, u, &m->gathered, &m->tp);
    m->be->event_record(&m->tp_gathered, &m->tp);
    linear_input_backward(m, w, dz, 0.0, &m->partial);
    linear_fork(m);
    m->comm->reduce_scatter(m->topo->language.tp.comm, &m->partial, du, COMM_SUM, &m->tp);
    m->be->stream_wait(m->compute, &m->tp_gathered);
    linear_weight_backward(m, w, &m->gathered, dz);
    linear_join(m);
}
