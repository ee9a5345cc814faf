/* schedule.h - one training step of one rank as a list of actions: build, verify, print, run are
 * four functions.
 *
 * Non-interleaved 1F1B over the stages; the encoder is stage 0, the language module stage 1
 * (parallel.md 4). A colocated job has one stage that does both; its local actions pass the
 * embeddings between the lanes of the two grids on every rank. Building is a pure function of
 * (topology, number of micro-batches, flags), so any rank of any job can be built and verified in
 * one process.
 */
#ifndef MIMO_SCHEDULE_H
#define MIMO_SCHEDULE_H

#include <stdbool.h>
#include <stdio.h>
#include "check.h"
#include "topology.h"

/* X(kind, text) */
/* clang-format off */
#define SCHEDULE_KINDS(X) \
    X(ENCODER_FORWARD, "encoder_forward") X(ENCODER_BACKWARD, "encoder_backward") \
    X(LANGUAGE_FORWARD, "language_forward") X(LANGUAGE_BACKWARD, "language_backward") \
    X(SEND_FORWARD, "send_forward") X(RECV_FORWARD, "recv_forward") \
    X(SEND_BACKWARD, "send_backward") X(RECV_BACKWARD, "recv_backward") \
    X(SEND_FORWARD_RECV_BACKWARD, "send_forward_recv_backward") \
    X(SEND_BACKWARD_RECV_FORWARD, "send_backward_recv_forward") X(LOCAL_FORWARD, "local_forward") \
    X(LOCAL_BACKWARD, "local_backward") X(GRAD_SYNC, "grad_sync")
/* clang-format on */

enum schedule_kind {
#define X(kind, text) SCHEDULE_##kind,
    SCHEDULE_KINDS(X)
#undef X
        SCHEDULE_KIND_COUNT
};

/* The halves of the model, each on a grid of its own. (A parameter's module is finer: model.h.) */
enum schedule_module { SCHEDULE_ENCODER, SCHEDULE_LANGUAGE, SCHEDULE_MODULES };

struct action {
    enum schedule_kind kind;
    enum schedule_module module;
    int microbatch; /* of the activation that is computed or sent */
    int slot;       /* activation slot that it uses: microbatch % slots of its module */
    /* combined kinds: the micro-batch of the message that comes the other way; else -1 */
    int partner;
    /* GRAD_SYNC: microbatch, slot and partner are -1 */
};

struct schedule {
    struct action *action; /* [n], owned */
    int n;
    int n_microbatches;
    /* live activations at most; 0 for a module that this rank does not have */
    int encoder_slots, language_slots;
    bool forward_only, encoder_trains; /* as given to schedule_build */
};

/* Backward actions are left out where no gradient is needed: `encoder_trains` = encoder or
 * projector trains. Local. */
void schedule_build(struct schedule *s, const struct topology *t, int n_microbatches,
                    bool forward_only, bool encoder_trains);
/* Prove for all ranks of the job at once (rebuilt from rank 0's view of the topology) that every
 * send meets its receive, that the order cannot deadlock, that each forward has its backward, and
 * that live activations stay within the slots. `lists` [size] as built for every rank. One line per
 * fault. Returns true when sound. Local. */
bool schedule_verify(const struct schedule *lists, const struct topology *ranks, int size,
                     struct errors *errors);
/* The trace in the notation of parallel.md 4.3: F0 sf0 F1 sfrb(a1,g0) B0 ... gs, in lines of at
 * most 100 columns. Local. */
void schedule_print(const struct schedule *s, FILE *out);
/* "send_forward(3)", "send_backward_recv_forward(g2,a3)", ...: for messages. Returns out. Local. */
const char *schedule_action_text(const struct action *a, char *out, size_t size);

/* What the interpreter calls. A kind without a call that is met is fatal. */
struct schedule_calls {
    void *ctx;
    void (*call[SCHEDULE_KIND_COUNT])(void *ctx, const struct action *a);
};
/* One call for each action, in order. Local, except for what the calls do. */
void schedule_run(const struct schedule *s, const struct schedule_calls *calls);
void schedule_free(struct schedule *s);

#endif
