/* ddp.h - gradient and parameter buffers of a rank: one per (grid, dense or expert), cut into
 * buckets (parallel.md 6.2-6.5).
 *
 * A buffer holds the gradients of its trainable parameters side by side in ARENA_GRADS and their
 * values in ARENA_PARAMS, in reverse order of registration and at the same offsets, so that both
 * collectives work in place: param->grad and param->value are views of it. Every parameter starts
 * on a multiple of 64 elements. A bucket ends with the parameter that brings it to bucket_size
 * elements, padded to a multiple of lcm(size, 128); the padding holds zeros. size is that of the
 * reducing group: dp_cp of the grid, expt_dp for experts when these are cut otherwise than dense
 * parameters.
 *
 * Rank r of the group owns elements [r*n/size, (r+1)*n/size) of every bucket of n: there it gets
 * the sum of the gradients and updates the values; that a parameter straddles slices does not
 * matter, what a rank holds of it is one run of elements (struct ddp_slot). The owned slices one
 * after the other are the shard, which is what the optimizer has state for. After ddp_reduce a
 * gradient outside the owned slice is undefined.
 *
 * With overlap a bucket is reduced as soon as the last micro-batch's backward has passed all of its
 * parameters, which it does in the buffer's order; and a bucket's new values are gathered while the
 * layers before it compute, one bucket in flight. All ranks of a group start the same collectives
 * in the same order.
 */
#ifndef MIMO_DDP_H
#define MIMO_DDP_H

#include "model.h"

enum { DDP_BUFFERS = 3, DDP_ALIGN = 64 }; /* encoder; language dense; language experts */

/* Whose buffers a call means: what it is given as `language`. */
enum { DDP_ENCODER = false, DDP_LANGUAGE = true };

struct ddp_slot {         /* one parameter */
    int param;            /* its index in the model's table; descending in a buffer */
    int64_t start, numel; /* its elements of the buffer */
    /* elements [first, first+n) of the parameter are this rank's to update; n = 0: none */
    int64_t first, n;
    int64_t local; /* where these lie in the shard */
};

struct ddp_bucket {
    int first_slot, end_slot;
    int64_t start, used, end; /* of the buffer; elements after `used` are padding */
    /* this rank's slice: [own, own+n) of the buffer, [local, local+n) of the shard */
    int64_t own, local, n;
};

struct ddp_buffer {
    const char *name;
    bool language, expert;
    const struct group *group;  /* that its gradients are summed over */
    int64_t numel, shard_numel; /* padded; numel/size */
    int n_slots, n_buckets;
    struct ddp_slot *slot;
    struct ddp_bucket *bucket;
    struct tensor value, grad; /* act, acc [numel] */
    bool overlap_reduce, overlap_gather;
    struct stream stream; /* of the collectives that overlap */
    struct event event;
    bool armed;  /* the last micro-batch is in work: gradients become final */
    int ready;   /* slots whose gradient is final */
    int reduced; /* buckets whose reduction was started */
    /* buckets [0, to_gather) hold old values outside the owned slice; the last of them is on its
     * way */
    int to_gather;
};

struct ddp {
    struct model *model;
    int n;
    struct ddp_buffer buffer[DDP_BUFFERS];
};

/* Whether the experts of this grid have a buffer of their own (parallel.md 5.4). Local. */
bool ddp_separate_experts(const struct grid *grid);
/* Cut n_slots parameters of slot[].numel elements, already in the buffer's order, into buckets of
 * bucket_size (INT64_MAX = one) for rank `rank` of `size`; fills the rest of *b's layout and of the
 * slots. Pure. Local. */
void ddp_lay_out(struct ddp_buffer *b, int64_t bucket_size, int size, int rank);
/* Buffers of the model's parameter table, which is complete. Local. */
struct ddp *ddp_init(struct model *m);
/* Values and gradients of all trainable parameters. Local. */
void ddp_plan(struct ddp *d, struct arenas *as);
void ddp_free(struct ddp *d); /* NULL is legal. Local. */

/* The next backward of this grid is the step's last. Local. */
void ddp_last_backward(struct ddp *d, bool language);
/* Gradients of all parameters of this grid with index >= first are final if this is the last
 * backward; starts what can be reduced. Collective over the buffers' groups when overlap is on. */
void ddp_ready(struct ddp *d, bool language, int first);
/* Every gradient of this grid is whole in memory (model_begin_grads) and summed over its group into
 * the owned slices. Under overlap a parameter that never became ready is fatal. Collective over the
 * buffers' groups. */
void ddp_reduce(struct ddp *d, bool language);
/* The owned slices of the values have changed: bring them to every rank, or start to. Collective
 * over the buffers' groups. */
void ddp_gather(struct ddp *d);
/* Before values of parameters of this grid with index < end are read. Collective over the buffers'
 * groups under overlap. */
void ddp_use(struct ddp *d, bool language, int end);
/* Before anything else reads values: nothing is on its way any more. Collective over the buffers'
 * groups under overlap. */
void ddp_use_all(struct ddp *d);
/* Summed gradients whole again on every rank (to look at them). Collective over the buffers'
 * groups. */
void ddp_gather_grads(struct ddp *d);

#endif
