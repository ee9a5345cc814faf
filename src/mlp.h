/* mlp.h - the `-` layer: x <- x + relu(norm(x) W1^T)^2 W2^T (model.md 1.7). */
#ifndef MIMO_MLP_H
#define MIMO_MLP_H

#include "model.h"

/* Declare the parameters of layer i. The layer is owned by the caller (mlp_free). Local. */
struct mlp *mlp_init(struct model *m, int i);
/* Kept activations (one slot) in arena `keep` and temporaries, T rows. Local. */
void mlp_plan(struct model *m, struct mlp *l, struct arenas *as, enum arena_kind keep,
              int64_t tokens);
/* x, y [T/t,H]: y = x + f(x); y NULL: only what backward reads. Collective over language tp. */
void mlp_forward(struct model *m, struct mlp *l, const struct tensor *x, const struct tensor *y);
/* dx [T/t,H]: on entry dL/dy, on return dL/dx. Collective over language tp. */
void mlp_backward(struct model *m, struct mlp *l, const struct tensor *x, const struct tensor *dx);
void mlp_free(struct mlp *l);

#endif
