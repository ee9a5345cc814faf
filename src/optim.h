/* optim.h - gradients of all micro-batches to new parameters: finalisation per grid, one global
 * norm, clip, AdamW on shards.
 *
 * Every collective below is entered by every rank of the world in the same order; a rank whose
 * modules are frozen joins as a stub. Gradients are never rescaled in memory: 1/max(N_tokens,1),
 * the participation factor and the clip coefficient go into the norm and into AdamW as factors.
 * Masters and moments (acc) exist for the elements that this rank owns (ddp.h) and lie in the
 * optimizer arena; param->master, m, v are this rank's run of each parameter. AdamW works element
 * by element, so its result does not depend on how the parameters are cut.
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
    struct tensor scalar; /* acc [n_params] sums of squares */
    struct tensor zeros;  /* I64 [MODEL_MODULES] */
    /* acc, owned gradients that are summed over language tp, one after the other; empty when tp is
     * 1 */
    struct tensor replicated;
    /* F64 [ranks, 1+MODEL_MODULES] of backend.h's decide_update; this rank fills its row */
    struct tensor numbers;
    /* F64 [MODEL_MODULES+3], its result: the factors that AdamW takes */
    struct tensor result;
    struct tensor masters; /* F64 [MODEL_MODULES] sums of squares of the masters */
    /* copies on the host, there when the stream has passed optim_begin */
    struct tensor host_result, host_zeros, host_masters;
    int64_t step; /* AdamW's t of the last applied update */
};

struct optim_result {
    /* false: skipped (non-finite or above the threshold) on every rank */
    bool applied;
    bool finite; /* the loss is */
    double loss; /* mean per token of the global batch */
    /* of both modules, after 1/N; may be non-finite; NaN when the loss is not finite */
    double grad_norm;
    double params_norm; /* NaN when not asked */
    int64_t num_zeros;  /* -1 when not asked */
};

/* What the optimizer works with; the model's parameter table is complete. Local. */
void optim_init(struct optim *o, const struct deck *deck, const struct topology *topo,
                struct model *model, const struct backend_ops *be, const struct comm_ops *comm,
                struct stream *stream);
/* Masters, moments (only for owned elements) and scalars; after model_plan. Local. */
void optim_plan(struct optim *o, struct arenas *arenas);
/* masters = parameters as they are now: after initialisation and after any load of weights without
 * masters. Local. */
void optim_refresh_masters(struct optim *o);
/* Finalise the gradients of one grid: sum over its data-parallel group into the owned slices, then
 * gradients of language parameters fed with sequence-parallel rows over tp. Collective over the
 * grid's dp_cp, expt_dp and tp groups. */
void optim_grad_sync(struct optim *o, bool language);
/* Expert bias update from the counts of all data lanes; once per step, also when the update is
 * skipped. Collective over language tp_dp_cp. */
void optim_expert_bias(struct optim *o);
/* Participation correction (parallel.md 6.7): all/seen where 0 < seen < all encoder ranks saw a
 * picture in the iteration, else 1. Local. */
double optim_participation(double all, double seen);
/* Enqueues the update of an iteration and returns: norm, decision and clip coefficient stay on the
 * device; AdamW on the owned elements, then the new values to all replicas (at once, or while the
 * next forward runs: ddp_use_all before values are read elsewhere). loss_sum acc [1] is this rank's
 * part of the global batch's, NULL = none; n_tokens = loss tokens of the global batch;
 * encoder_factor = participation correction (1 normally). A loss or norm that is not finite changes
 * no parameter, under either policy. Collective over the world. */
void optim_begin(struct optim *o, const struct tensor *loss_sum, double n_tokens,
                 double encoder_factor, double lr, double weight_decay);
/* What became of the update, once the host has waited for an event recorded after optim_begin. To
 * be called before the next optim_begin, whose AdamW counts from o->step. A loss or norm that is
 * not finite under policy 'abort' is fatal (EXIT_NUMERICS) naming module and iteration. Collective
 * over the world. */
struct optim_result optim_finish(struct optim *o);
/* Both, waiting in between. Collective over the world. */
struct optim_result optim_step(struct optim *o, double n_tokens, double encoder_factor, double lr,
                               double weight_decay);

#endif
