/* step.h - one training step of one rank: data, the action list, gradient sync, the sums of the
 * iteration, optimizer, row of numbers.
 *
 * What ranks must agree on before the update and the host knows (tokens, pictures, requests to
 * stop) travels in one host sum; loss and norm are agreed on by the device (optim.h). Numbers of
 * the device come to the host behind everything else of the iteration and are read by step_finish,
 * on an asynchronous backend while the next iteration's schedule is under way, so that the device
 * never waits for the host. The host waits for the device nowhere else in an iteration, but for the
 * row counts of expert parallelism (dispatch.h) and for batches.h5. The same action table runs the
 * forward-only list of an evaluation.
 */
#ifndef MIMO_STEP_H
#define MIMO_STEP_H

#include "bridge.h"
#include "io_hdf5.h"
#include "optim.h"
#include "schedule.h"

/* What any rank may ask of all ranks during an iteration; non-zero after the step when at least one
 * did. */
enum step_request {
    STEP_STOP_SIGNAL,
    STEP_STOP_FILE,
    STEP_STOP_TIME,
    STEP_SAVE_FILE,
    STEP_REQUESTS
};

/* Replaces the pixels of a batch before the encoder sees it; NULL = as they are. */
struct step_pictures {
    void (*change)(void *ctx, struct picture_batch *batch);
    void *ctx;
};

/* Asks for this rank's requests [STEP_REQUESTS] just before the ranks agree on them. */
struct step_poll {
    void (*poll)(void *ctx, bool *request);
    void *ctx;
};

struct step {
    const struct deck *deck;
    const struct topology *topo;
    struct model *model;
    struct optim *optim;
    const struct backend_ops *be;
    const struct comm_ops *comm;
    struct stream *stream;
    struct bridge *bridge; /* NULL without an encoder grid */
    struct schedule train, forward;
    struct step_poll poll;          /* poll = NULL: nobody asks; set by the caller */
    struct batch_dump *dump;        /* NULL = batches are not written; set by the caller */
    struct picture_batch *pictures; /* [encoder slots] */
    struct text_batch *text;        /* [language slots] */
    int n_pictures, n_text;
    /* of the micro-batch in work */
    struct tensor *embedding;    /* [encoder slots] [rows, H] */
    struct tensor image, dimage; /* [rows, H] language side */
    struct tensor dembedding;    /* [rows, H] encoder side */
    /* of the iteration */
    struct data *data;
    const struct step_pictures *change;
    int64_t iteration; /* 0-based */
    bool training, picture_seen;
    double *sum;                   /* what the world adds up of the iteration in work */
    double real_tokens, positions; /* of all iterations: tokens that are no padding, and all */
    int64_t n_moe;                 /* E layers of the pattern */
    /* of the iteration between step_update and step_finish */
    struct step_pending {
        int64_t iteration, gemm_flops, sent_bytes;
        double lr, weight_decay;
        double *sum;  /* the world's */
        int64_t mark; /* of the timer, behind its update */
    } pending;
    struct event done;          /* the pending iteration's numbers are on the host */
    int64_t device_peak;        /* bytes, of step_device_peak */
    struct tensor host_balance; /* acc [1] */
    struct tensor host_count;   /* I64 [n_moe, E] of this rank */
    double *late;               /* [1 + n_moe*E] what the world adds up of these */
    int64_t *expert_count;      /* [n_moe, E] of the global batch after step_finish */
    int64_t *text_loaded;       /* [language slots] micro-batch in the buffer, -1 = none */
    /* [n_senders] every communicator whose bytes are counted */
    struct comm **sender;
    int n_senders;
};

struct step_result {
    bool applied; /* false: the update was skipped on every rank */
    bool finite;  /* the loss was */
};

/* Schedules (built and verified for this rank's job), batch buffers, bridge. `stream` orders
 * everything. Local. */
void step_init(struct step *s, const struct deck *deck, const struct topology *topo,
               struct model *model, struct optim *optim, const struct backend_ops *be,
               const struct comm_ops *comm, struct stream *stream);
/* Needs deck, model and bridge of *s alone. Local. */
void step_plan(struct step *s, struct arenas *arenas);
/* An iteration is three calls, in this order; a second one may begin before the first is finished,
 * but not be updated.
 *   step_begin   all micro-batches of iteration `iteration` (0-based); request [STEP_REQUESTS] =
 *                what any rank asked for
 *   step_update  its update, with this learning rate and weight decay
 *   step_finish  waits for its numbers and fills `row` but for consumed_samples; iteration_seconds
 *                is the time between the end of the update before it (or train_begin) and of its
 *                own, without saving and evaluation, by the clock of timer.h
 * Collective over the world. */
void step_begin(struct step *s, struct data *data, int64_t iteration, bool *request);
void step_update(struct step *s, double lr, double weight_decay);
struct step_result step_finish(struct step *s, struct trace_row *row);
/* Most bytes that were in use on this rank's device at any of these calls, by whatever program; -1
 * where the device is the host. Local. */
int64_t step_device_peak(struct step *s);
/* Forward passes of one iteration of `data`; adds this rank's share to *loss_sum and *tokens (sum
 * over ranks = the global batch). Collective over the world. */
void step_forward(struct step *s, struct data *data, int64_t iteration,
                  const struct step_pictures *change, double *loss_sum, double *tokens);
void step_free(struct step *s);

#endif
