/* replicated.h - tensor-parallel matrices of the encoder grid: what goes into a region and what
 * comes out of it is the same on every encoder tp rank, there is no sequence parallelism (model.md
 * 0.4).
 *
 * Column-parallel (rows of W cut): the output is cut by columns; dX is a sum over ranks. Its output
 * may be gathered; then backward takes this rank's columns of the gradient and sums nothing.
 * Row-parallel (columns of W cut): the output is a sum over ranks, to which residual and bias are
 * added once; backward communicates nothing. Gradients of replicated parameters come out identical
 * on all ranks and must not be summed. With one rank every call is the plain one of linear.h.
 */
#ifndef MIMO_REPLICATED_H
#define MIMO_REPLICATED_H

#include "model.h"

/* [t*rows,out/t]: every rank's columns, one rank after the other; t > 1 only */
struct replicated_columns {
    struct tensor blocks;
};

/* Scratch of a gathered output [rows,out]. Local. */
void replicated_plan(struct model *m, struct replicated_columns *c, struct arena *work,
                     int64_t rows, int64_t out);
/* Column-parallel with gathered output: y [rows,out] = x W^T. Collective over encoder tp. */
void replicated_gather_forward(struct model *m, struct replicated_columns *c, const struct param *w,
                               const struct tensor *x, const struct tensor *y);
/* Its backward: dW += dy^T x with this rank's columns of dy [rows,out]; dx [rows,in] = dy W unless
 * NULL. Collective over encoder tp. */
void replicated_gather_backward(struct model *m, struct param *w, const struct tensor *x,
                                const struct tensor *dy, const struct tensor *dx);
/* Column-parallel backward: dW += dz^T x, dx [rows,in] = sum over ranks of dz W unless NULL; dz
 * [rows,out/t]. Collective over encoder tp. */
void replicated_column_backward(struct model *m, struct param *w, const struct tensor *x,
                                const struct tensor *dz, const struct tensor *dx);
/* Row-parallel: y [rows,out] = residual + bias + sum over ranks of a W^T; residual and bias may be
 * NULL, y is not residual's memory. Collective over encoder tp. */
void replicated_row_forward(struct model *m, const struct param *w, const struct param *bias,
                            const struct tensor *a, const struct tensor *residual,
                            const struct tensor *y);

#endif
