/* dispatch.h - expert parallelism: rows to the ranks that own their experts, and back (model.md 1.8
 * step 7, parallel.md 5.4).
 *
 * Rank e of the ep group owns experts e*E/ep .. (e+1)*E/ep-1. A rank's copies are already sorted by
 * (expert, token), so what goes to one rank is one run of rows. Received rows arrive by (source
 * rank, local expert, token) and are put into the order (local expert, source rank, token). The
 * host learns the split sizes once per layer and micro-batch, when the first rows are sent: by then
 * the copy of all ranks' offsets has travelled beside what was issued since dispatch_begin. Any
 * count may be zero. With one expert-parallel rank nobody makes a dispatch.
 *
 * With expert tensor parallelism the group is tp_ep: `parts` neighbours own the same experts, each
 * a part of their inner width. All of them get every row; what comes back is the sum of what they
 * give, added up in acc and rounded once.
 *
 * A journey has a start and an end. Between them neither the rows that left nor the place of those
 * to come may be touched; the copies' rows and their probabilities may travel at the same time.
 * Under moe_shared_expert_overlap they travel on a stream of their own, beside what the caller
 * computes meanwhile; else the start already completes them in the order of the compute stream.
 */
#ifndef MIMO_DISPATCH_H
#define MIMO_DISPATCH_H

#include "model.h"

/* What travels: the copies' rows (act [.,H]) or one number for each (acc [.,1]). */
enum dispatch_load { DISPATCH_ROWS, DISPATCH_PROBS, DISPATCH_LOADS };

struct dispatch {
    const struct backend_ops *be;
    struct stream own, *stream;     /* of the all-to-all: `own` or the model's compute stream */
    struct stream copies;           /* of the offsets on their way to the host */
    struct event event, known;      /* between streams; the offsets are on the host */
    const struct group *group;      /* language ep, or tp_ep with parts */
    int size, rank;                 /* of the group */
    int parts;                      /* expt_tp; owner of rank r: r / parts */
    int64_t experts, owned;         /* E, E/ep */
    int64_t max_rows;               /* rows received at most: every copy of every rank */
    int64_t sent, received;         /* rows of the micro-batch; -1 = not known yet */
    int64_t *send_rows, *recv_rows; /* [size] */
    /* I32 [size,E+1] every rank's offsets, on the device and on the host */
    struct tensor all, host_all;
    struct tensor offsets;        /* I32 [E/ep+1] rows of the owned experts after sorting */
    struct tensor order, inverse; /* I32 [max_rows] sorted row -> received row and back */
    /* [max_rows,H], [max_rows,1] received before sorting, or sorted rows taken apart; temporary */
    /* With parts: what each of them returned, one after the other [parts*copies,H] and
     * [parts*copies,1]; what dispatch_wait adds it up into, data NULL = nothing; I32 [copies,parts]
     * the rows that belong to a copy. */
    struct tensor apart[DISPATCH_LOADS], into[DISPATCH_LOADS], summands, host_summands;
    bool has_summands;
    struct tensor buffer[DISPATCH_LOADS];
};

/* For E experts. Local. */
struct dispatch *dispatch_init(struct model *m, int64_t experts);
/* `copies` = T/t*K rows of this rank at most. Local. */
void dispatch_plan(struct model *m, struct dispatch *d, struct arenas *as, enum arena_kind keep,
                   int64_t copies);
/* A new micro-batch, from offsets I32 [E+1] of the sorted copies. Collective over the group. */
void dispatch_begin(struct model *m, struct dispatch *d, const struct tensor *offsets);
/* The host waits for the splits, once; sent and received are known. The first dispatch_send does
 * it. Local. */
void dispatch_learn(struct dispatch *d);
/* rows [sent,w] leave for the owners of their experts. Collective over the group. */
void dispatch_send(struct model *m, struct dispatch *d, enum dispatch_load load,
                   const struct tensor *rows);
/* The inverse: sorted [received,w] leave for rows [sent,w] in the sender's order. Collective over
 * the group. */
void dispatch_return(struct model *m, struct dispatch *d, enum dispatch_load load,
                     const struct tensor *sorted, const struct tensor *rows);
/* End of every journey under way; what was returned is there. Collective over the group. */
void dispatch_wait(struct model *m, struct dispatch *d);
/* What was sent and waited for -> out [received,w], sorted by owned expert. Local. */
void dispatch_unpack(struct model *m, const struct dispatch *d, enum dispatch_load load,
                     const struct tensor *out);
void dispatch_free(struct dispatch *d);

#endif
