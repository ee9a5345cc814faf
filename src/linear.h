/* linear.h - Y = X W^T and its backward, the one way every weight matrix of the model is used.
 *
 * Weights are [out, in], row-major. Gradients of weights accumulate in acc over micro-batches; those of frozen weights are
 * not formed. Every call adds its multiply-adds (times 2) to model->gemm_flops.
 */
#ifndef MIMO_LINEAR_H
#define MIMO_LINEAR_H

#include "model.h"

/* y [rows,out] = x [rows,in] W^T + residual (act [rows,out], may be y's own memory; NULL = 0). Local. */
void linear_forward(struct model *m, const struct param *w, const struct tensor *x, const struct tensor *residual,
                    const struct tensor *y);
/* dW += dy^T x unless W is frozen; dx [rows,in] = beta*dx + dy W unless dx is NULL. Local. */
void linear_backward(struct model *m, const struct param *w, const struct tensor *x, const struct tensor *dy, double beta,
                     const struct tensor *dx);

/* The gradient tensor of a parameter, or NULL when it is frozen: what backend entries take. Local. */
const struct tensor *param_grad(const struct param *p);

#endif
