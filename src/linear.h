/* linear.h - Y = X W^T and its backward, the one way every weight matrix of the model is used, and
 * the sequence-parallel regions around it (model.md 0.4): the residual stream of a tensor-parallel
 * language grid is cut by tokens, T/t rows a rank, and gathered in front of a column-parallel
 * matrix, summed and cut behind a row-parallel one.
 *
 * Weights are [out, in], row-major. Gradients of weights accumulate in acc over micro-batches;
 * those of frozen weights are not formed. Every call adds its multiply-adds (times 2) to
 * model->gemm_flops.
 */
#ifndef MIMO_LINEAR_H
#define MIMO_LINEAR_H

#include "model.h"

/* model_add_matrix for a weight that only this file's functions use. Local. */
int linear_add(struct model *m, const struct param *base, int64_t out, int64_t in,
               enum param_shard shard, double std);

/* y [rows,out] = x [rows,in] W^T + residual (act [rows,out], may be y's own memory; NULL = 0).
 * Local. */
void linear_forward(struct model *m, const struct param *w, const struct tensor *x,
                    const struct tensor *residual, const struct tensor *y);
/* dW += dy^T x unless W is frozen; dx [rows,in] = beta*dx + dy W unless dx is NULL. Local. */
void linear_backward(struct model *m, struct param *w, const struct tensor *x,
                     const struct tensor *dy, double beta, const struct tensor *dx);

/* The two halves. Local. */
void linear_weight_backward(struct model *m, struct param *w, const struct tensor *x,
                            const struct tensor *dy);
void linear_input_backward(struct model *m, const struct param *w, const struct tensor *dy,
                           double beta, const struct tensor *dx);

/* With tensor parallelism, of either grid: model->tp goes on after what the compute stream holds
 * now; the compute stream after what model->tp holds now. In between messages on model->tp travel
 * beside compute; one communicator is never used on both at a time. Local. */
void linear_fork(struct model *m);
void linear_join(struct model *m);

/* Rows of the residual stream on this rank: T/t. Local. */
int64_t linear_local_rows(const struct model *m, int64_t tokens);
/* All rows [T,w] from this rank's [T/t,w]: `full`, or `local` itself with one tensor-parallel rank.
 * Collective over language tp. */
const struct tensor *linear_gather(struct model *m, const struct tensor *local,
                                   const struct tensor *full);
/* local [T/t,w] = this rank's rows of the sum over ranks of full [T,w]; with one rank they must be
 * the same memory. Collective over language tp. */
void linear_reduce(struct model *m, const struct tensor *full, const struct tensor *local);
/* Row-parallel: y [T/t,H] = residual [T/t,H] + this rank's rows of the sum over ranks of a W^T, a
 * [T,in/t]. Collective over language tp. */
void linear_row_forward(struct model *m, const struct param *w, const struct tensor *a,
                        const struct tensor *residual, const struct tensor *y);
/* Row-parallel backward: da [T,in/t] from dy [T/t,H]. Collective over language tp. */
void linear_row_backward(struct model *m, struct param *w, const struct tensor *a,
                         const struct tensor *dy, const struct tensor *da);
/* Column-parallel backward: du [T/t,H] = this rank's rows of the sum of dz W, dW += dz^T u with u
 * [T/t,H] gathered again. Collective over language tp. */
void linear_column_backward(struct model *m, struct param *w, const struct tensor *u,
                            const struct tensor *dz, const struct tensor *du);

/* The gradient tensor of a parameter, or NULL when it is frozen: what backend entries take.
 * Local. */
const struct tensor *param_grad(const struct param *p);
/* beta of the next product that is added to p's gradient: 0 for the first of an iteration
 * (param.fresh), else 1. Local. */
double param_grad_beta(struct param *p);

#endif
