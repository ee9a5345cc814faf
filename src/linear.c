/* linear.c - see linear.h. The weight gradient is one GEMM with beta = 1 into the main gradient, so no separate
 * accumulation pass exists (model.md 0.3 item 3). */
#include "linear.h"

const struct tensor *param_grad(const struct param *p)
{
    return p->trainable ? &p->grad : NULL;
}

static void count_flops(struct model *m, const struct param *w, int64_t rows)
{
    m->gemm_flops += 2 * rows * tensor_rows(&w->value) * tensor_cols(&w->value);
}

void linear_forward(struct model *m, const struct param *w, const struct tensor *x, const struct tensor *residual,
                    const struct tensor *y)
{
    m->be->gemm(m->compute, false, true, 1.0, x, &w->value, residual ? 1.0 : 0.0, residual, y);
    count_flops(m, w, tensor_rows(x));
}

void linear_backward(struct model *m, const struct param *w, const struct tensor *x, const struct tensor *dy, double beta,
                     const struct tensor *dx)
{
    if (w->trainable) {
        m->be->gemm(m->compute, true, false, 1.0, dy, x, 1.0, &w->grad, &w->grad);
        count_flops(m, w, tensor_rows(dy));
    }
    if (dx) {
        m->be->gemm(m->compute, false, false, 1.0, dy, &w->value, beta, beta != 0.0 ? dx : NULL, dx);
        count_flops(m, w, tensor_rows(dy));
    }
}
