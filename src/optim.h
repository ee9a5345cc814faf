/* optim.h - gradients of all micro-batches to new parameters: data-parallel reduction per grid, one global norm, clip, AdamW.
 *
 * Every collective below is entered by every rank of the world in the same order; a rank whose modules are frozen joins as a stub.
 * Gradients are never rescaled in memory: 1/max(N_tokens,1), the participation factor and the clip coefficient go into the norm and
 * into AdamW as factors. fp32 (fp64) masters and moments live in the optimizer arena and iterate the parameter table.
 */
#ifndef MIMO_OPTIM_H
#define MIMO_OPTIM_H

#include "model.h"

struct optim {
    const struct deck *deck;
    const struct topology *topo;
    struct model *model;
    const struct backend_ops *be;
    const struct comm_ops *comm;
    struct stream *stream;
    struct tensor scalar;        /* acc [1] sum of squares */
    struct tensor zeros;         /* I64 [1] */
    int64_t step;                /* AdamW's t of the last applied update */
};

struct optim_result {
    bool applied;                /* false: skipped (non-finite or above the threshold) on every rank */
    double grad_norm;            /* of both modules, after 1/N; may be non-finite */
    double params_norm;          /* NaN when not asked */
    int64_t num_zeros;           /* -1 when not asked */
};

void optim_init(struct optim *o, const struct deck *deck, const struct topology *topo, struct model *model,
                const struct backend_ops *be, const struct comm_ops *comm, struct stream *stream);   /* Local */
/* Masters, moments (only for trainable parameters) and scalars. Local. */
void optim_plan(struct optim *o, struct arenas *arenas);
/* masters = parameters as they are now: after initialisation and after any load of weights without masters. Local. */
void optim_refresh_masters(struct optim *o);
/* Sum the gradients of one grid over its data-parallel group. Collective over the grid's dp group. */
void optim_grad_sync(struct optim *o, bool language);
/* Expert bias update from the counts of all data lanes; once per step, also when the update is skipped. Collective over language tp_dp_cp. */
void optim_expert_bias(struct optim *o);
/* Norm, policy, clip, AdamW. n_tokens = loss tokens of the global batch; encoder_factor = participation correction (1 normally).
 * Collective over the world. A non-finite norm under policy 'abort' is fatal (EXIT_NUMERICS) naming module and iteration. */
struct optim_result optim_step(struct optim *o, double n_tokens, double encoder_factor, double lr, double weight_decay);

#endif
