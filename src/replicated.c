/* replicated.c - see replicated.h. A gathered output arrives as one block [rows,out/t] a rank; each
 * is copied into its columns. */
#include "replicated.h"

#include "linear.h"

static int ranks(const struct model *m)
{
    return m->topo->encoder.tp_size;
}

static void sum_over_ranks(struct model *m, const struct tensor *t)
{
    if (ranks(m) > 1)
        m->comm->all_reduce(m->topo->encoder.tp.comm, t, COMM_SUM, m->compute);
}

void replicated_plan(struct model *m, struct replicated_columns *c, struct arena *work,
                     int64_t rows, int64_t out)
{
    if (ranks(m) > 1)
        c->blocks = arena_2d(work, "replicated.blocks", m->act, ranks(m) * rows, out / ranks(m));
}

/* Columns of y that rank r holds. */
static struct tensor columns_of(const struct model *m, const struct tensor *y, int r)
{
    const int64_t width = tensor_cols(y) / ranks(m);
    return tensor_col_range(y, r * width, width);
}

void replicated_gather_forward(struct model *m, struct replicated_columns *c, const struct param *w,
                               const struct tensor *x, const struct tensor *y)
{
    if (ranks(m) == 1) {
        linear_forward(m, w, x, NULL, y);
        return;
    }
    const int64_t rows = tensor_rows(x);
    const struct tensor all = tensor_first(&c->blocks, ranks(m) * rows);
    const struct tensor own = tensor_row_range(&all, m->topo->encoder.tp_rank * rows, rows);
    linear_forward(m, w, x, NULL, &own);
    m->comm->all_gather(m->topo->encoder.tp.comm, &own, &all, m->compute);
    for (int r = 0; r < ranks(m); r++) {
        const struct tensor block = tensor_row_range(&all, r * rows, rows),
                            to = columns_of(m, y, r);
        m->be->copy(m->compute, &block, &to);
    }
}

void replicated_gather_backward(struct model *m, struct param *w, const struct tensor *x,
                                const struct tensor *dy, const struct tensor *dx)
{
    const struct tensor own = columns_of(m, dy, m->topo->encoder.tp_rank);
    replicated_column_backward(m, w, x, &own, dx);
}

void replicated_column_backward(struct model *m, struct param *w, const struct tensor *x,
                                const struct tensor *dz, const struct tensor *dx)
{
    if (ranks(m) == 1 || !dx) {
        linear_backward(m, w, x, dz, 0.0, dx);
        return;
    }
    linear_input_backward(m, w, dz, 0.0, dx);
    linear_fork(m);
    m->comm->all_reduce(m->topo->encoder.tp.comm, dx, COMM_SUM, &m->tp);
    linear_weight_backward(m, w, x, dz);
    linear_join(m);
}

void replicated_row_forward(struct model *m, const struct param *w, const struct param *bias,
                            const struct tensor *a, const struct tensor *residual,
                            const struct tensor *y)
{
    if (ranks(m) == 1) {
        linear_forward(m, w, a, residual, y);
    } else {
        ASSERT(!residual || residual->data != y->data);
        linear_forward(m, w, a, NULL, y);
        sum_over_ranks(m, y);
        if (residual)
            m->be->add(m->compute, residual, y);
    }
    if (bias)
        m->be->add_bias(m->compute, &bias->value, y);
}
