/* mamba.h - the `M` layer: x <- x + Mamba2(norm(x)) (model.md 1.6). */
#ifndef MIMO_MAMBA_H
#define MIMO_MAMBA_H

#include "model.h"

struct ragged;

/* Declare the parameters of layer i. The layer is owned by the caller (mamba_free). Local. */
struct mamba *mamba_init(struct model *m, int i);
/* Kept activations (one slot) in arena `keep` and temporaries, T rows in B segments. Local. */
void mamba_plan(struct model *m, struct mamba *l, struct arenas *as, enum arena_kind keep,
                int64_t tokens, int64_t segments);
/* x, y [T/t,H]: y = x + f(x); y NULL: only what backward reads. Collective over language tp. */
void mamba_forward(struct model *m, struct mamba *l, const struct ragged *b, const struct tensor *x,
                   const struct tensor *y);
/* dx [T/t,H]: on entry dL/dy, on return dL/dx. Collective over language tp. */
void mamba_backward(struct model *m, struct mamba *l, const struct ragged *b,
                    const struct tensor *x, const struct tensor *dx);
void mamba_free(struct mamba *l);

#endif
