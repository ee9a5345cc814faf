/* step.h - one training step of one rank: data, the action list, gradient sync, the sums of the iteration, optimizer, row of numbers.
 *
 * Everything that ranks must agree on in an iteration travels in one host sum (loss, tokens, pictures, expert counts, requests to stop)
 * before the optimizer and one host maximum inside it. Device scalars are read once, after the schedule has run.
 * The same action table runs the forward-only list of an evaluation.
 */
#ifndef MIMO_STEP_H
#define MIMO_STEP_H

#include "bridge.h"
#include "io_hdf5.h"
#include "optim.h"
#include "schedule.h"

/* What any rank may ask of all ranks during an iteration; non-zero after the step when at least one did. */
enum step_request { STEP_STOP_SIGNAL, STEP_STOP_FILE, STEP_STOP_TIME, STEP_SAVE_FILE, STEP_REQUESTS };

/* Replaces the pixels of a batch before the encoder sees it; NULL = as they are. */
struct step_pictures {
    void (*change)(void *ctx, struct picture_batch *batch);
    void *ctx;
};

/* Asks for this rank's requests [STEP_REQUESTS] just before the ranks agree on them. */
struct step_poll { void (*poll)(void *ctx, bool *request); void *ctx; };

struct step {
    const struct deck *deck;
    const struct topology *topo;
    struct model *model;
    struct optim *optim;
    const struct backend_ops *be;
    const struct comm_ops *comm;
    struct stream *stream;
    struct bridge *bridge;               /* NULL without an encoder grid */
    struct schedule train, forward;
    struct step_poll poll;               /* poll = NULL: nobody asks; set by the caller */
    struct batch_dump *dump;             /* NULL = batches are not written; set by the caller */
    struct picture_batch *pictures;      /* [encoder slots] */
    struct text_batch *text;             /* [language slots] */
    int n_pictures, n_text;
    /* of the micro-batch in work */
    struct tensor *embedding;            /* [encoder slots] [rows, H] */
    struct tensor image, dimage;         /* [rows, H] language side */
    struct tensor dembedding;            /* [rows, H] encoder side */
    /* of the iteration */
    struct data *data;
    const struct step_pictures *change;
    int64_t iteration;                   /* 0-based */
    bool training, picture_seen;
    double *sum;                         /* [n_sum] what the world adds up */
    int n_sum;
    int64_t n_moe;                       /* E layers of the pattern */
    int64_t *expert_count;               /* [n_moe, E] of the global batch after the step */
    int64_t *text_loaded;                /* [language slots] micro-batch in the buffer, -1 = none */
    struct comm **sender;                /* [n_senders] every communicator whose bytes are counted */
    int n_senders;
};

struct step_result {
    bool applied;                        /* false: the update was skipped on every rank */
    bool finite;                         /* the loss was */
    bool request[STEP_REQUESTS];         /* agreed by all ranks */
};

/* Schedules (built and verified for this rank's job), batch buffers, bridge. `stream` orders everything. Local. */
void step_init(struct step *s, const struct deck *deck, const struct topology *topo, struct model *model, struct optim *optim,
               const struct backend_ops *be, const struct comm_ops *comm, struct stream *stream);
void step_plan(struct step *s, struct arenas *arenas);       /* Local. */
/* Iteration `iteration` (0-based) with this learning rate and weight decay.
 * Fills `row` but for consumed_samples; iteration_seconds is the time since the last call without saving and evaluation.
 * Collective over the world. */
struct step_result step_train(struct step *s, struct data *data, int64_t iteration, double lr, double weight_decay,
                              struct trace_row *row);
/* Forward passes of one iteration of `data`; adds this rank's share to *loss_sum and *tokens (sum over ranks = the global batch).
 * Collective over the world. */
void step_forward(struct step *s, struct data *data, int64_t iteration, const struct step_pictures *change, double *loss_sum,
                  double *tokens);
void step_free(struct step *s);

#endif
