/* attention.h - the `*` layer: causal grouped-query self-attention, x <- x + Attn(norm(x)) W_o^T
 * (model.md 1.5). */
#ifndef MIMO_ATTENTION_H
#define MIMO_ATTENTION_H

#include "model.h"

struct ragged;

/* Declare the parameters of layer i. The layer is owned by the caller (attention_free). Local. */
struct attention *attention_init(struct model *m, int i);
/* Kept activations (one slot) in arena `keep` and temporaries, T rows. Local. */
void attention_plan(struct model *m, struct attention *l, struct arenas *as, enum arena_kind keep,
                    int64_t tokens, int64_t segments, int64_t max_len);
/* x, y [T/t,H]: y = x + f(x); y NULL: only what backward reads. Collective over language tp. */
void attention_forward(struct model *m, struct attention *l, const struct ragged *b,
                       const struct tensor *x, const struct tensor *y);
/* dx [T/t,H]: on entry dL/dy, on return dL/dx. Collective over language tp. */
void attention_backward(struct model *m, struct attention *l, const struct ragged *b,
                        const struct tensor *x, const struct tensor *dx);
void attention_free(struct attention *l);

#endif
