/* dispatch.h - expert parallelism: rows to the ranks that own their experts, and back (model.md 1.8 step 7, parallel.md 5.4).
 *
 * Rank e of the ep group owns experts e*E/ep .. (e+1)*E/ep-1. A rank's copies are already sorted by (expert, token), so what goes to one
 * rank is one run of rows. Received rows arrive by (source rank, local expert, token) and are put into the order (local expert, source
 * rank, token). The host learns the split sizes once per layer and micro-batch, from the gathered counts of all ranks.
 * Any count may be zero. With one expert-parallel rank nobody makes a dispatch.
 */
#ifndef MIMO_DISPATCH_H
#define MIMO_DISPATCH_H

#include "model.h"

struct dispatch {
    int size, rank;                  /* of language ep */
    int64_t experts, owned;          /* E, E/ep */
    int64_t max_rows;                /* rows received at most: every copy of every rank */
    int64_t sent, received;          /* rows of the micro-batch */
    int64_t *send_rows, *recv_rows;  /* [size] */
    int32_t *count;                  /* [size,E] on the host */
    struct tensor mine, all;         /* I32 [E], [size,E] counts on the device */
    struct tensor offsets;           /* I32 [E/ep+1] rows of the owned experts after sorting */
    struct tensor order, inverse;    /* I32 [max_rows] sorted row -> received row and back */
    struct tensor host_mine, host_offsets, host_order, host_inverse;
    struct tensor buffer;            /* [max_rows,H] received rows before sorting, or sorted rows taken apart; temporary */
};

/* For E experts. Local. */
struct dispatch *dispatch_init(struct model *m, int64_t experts);
/* `copies` = T/t*K rows of this rank at most. Local. */
void dispatch_plan(struct model *m, struct dispatch *d, struct arenas *as, int64_t copies);
/* Learn this micro-batch's splits from offsets I32 [E+1] of the sorted copies. Collective over language ep; the host waits for the
 * counts. */
void dispatch_begin(struct model *m, struct dispatch *d, const struct tensor *offsets);
/* rows [sent,w] -> out [received,w] sorted by owned expert. w is at most H, any float dtype. Collective over language ep. */
void dispatch_forward(struct model *m, struct dispatch *d, const struct tensor *rows, const struct tensor *out);
/* The inverse: sorted [received,w] -> rows [sent,w] in the sender's order. Collective over language ep. */
void dispatch_return(struct model *m, struct dispatch *d, const struct tensor *sorted, const struct tensor *rows);
void dispatch_free(struct dispatch *d);

#endif
