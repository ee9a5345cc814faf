/* moe.h - the `E` layer: x <- x + routed(norm(x)) + shared(norm(x)) (model.md 1.8). */
#ifndef MIMO_MOE_H
#define MIMO_MOE_H

#include <stdio.h>
#include "model.h"

struct ragged;

/* Declare the parameters of layer i. The layer is owned by the caller (moe_free). Local. */
struct moe *moe_init(struct model *m, int i);
/* Kept activations (one slot) in arena `keep` and temporaries, T rows in B sequences. Local. */
void moe_plan(struct model *m, struct moe *l, struct arenas *as, enum arena_kind keep,
              int64_t tokens, int64_t sequences);
/* Before every moe_forward: under moe_router_force_load_balancing sets the choice of this rank's
 * rows, else does nothing. It comes from sample_index [B], the global stream indices of the
 * micro-batch's samples. Row s of a sample goes to experts (r + s + k*(E/K)) mod E, k < K, with r
 * drawn by (seed, layer, sample): any E consecutive rows load all experts equally. Local. */
void moe_force_choice(struct model *m, struct moe *l, const struct ragged *b,
                      const int64_t *sample_index);
/* x, y [T/t,H]: y = x + f(x). train: count tokens per expert and, with a balancing loss, add this
 * rank's part to `metric` (acc [1]). y NULL: what backward reads and nothing else, for the choice
 * that the forward pass has made; counts and metric stay. Collective over language tp and ep. */
void moe_forward(struct model *m, struct moe *l, const struct ragged *b, const struct tensor *x,
                 const struct tensor *y, bool train, const struct tensor *metric);
/* dx [T/t,H]: on entry dL/dy, on return dL/dx. Collective over language tp and ep. */
void moe_backward(struct model *m, struct moe *l, const struct ragged *b, const struct tensor *x,
                  const struct tensor *dx);
/* I64 [E] tokens dispatched since the last update; I32 [T,K] choice of the last micro-batch; the
 * bias buffer. Local. */
struct tensor moe_tokens_per_expert(const struct moe *l);
struct tensor moe_last_choice(const struct moe *l);
struct param *moe_expert_bias(struct model *m, const struct moe *l);
/* The order of the steps of a forward and a backward pass, two lines for --check. Local. */
void moe_print_order(const struct deck *deck, FILE *out);
void moe_free(struct moe *l);

#endif
