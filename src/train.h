/* train.h - the state of a training and its loop: build, restore, iterate, save, report (order of
 * training.md 1.2 and 1.9).
 *
 * Owns everything between the topology and the run directory. Iterations count from 1 in what is
 * printed; state.iteration is the number of settled ones: those whose numbers are known, printed
 * and written. On an asynchronous backend an iteration is settled while the next one's
 * micro-batches compute, except where something depends on it being complete: a checkpoint, a
 * validation, the end, a dump of its batches. So the row of an iteration is written once the next
 * is under way, and an iteration that ends the job on a number that is not finite does so before
 * the next update. Learning rate and weight decay of an iteration are those at the samples of
 * successful updates before it; a skipped update counts its samples as consumed but does not
 * advance the schedule.
 */
#ifndef MIMO_TRAIN_H
#define MIMO_TRAIN_H

#include "eval.h"
#include "run.h"
#include "tensorboard.h"

struct train {
    const struct deck *deck;
    const struct topology *topo;
    struct run *run;
    const struct backend_ops *be;
    const struct comm_ops *comm;
    struct stream stream;
    struct arenas arenas;
    int64_t planned; /* bytes of this rank's device, its sharers' too; where it has none, its own */
    struct model model;
    struct optim optim;
    struct step step;
    struct eval eval;
    struct data data;
    bool has_data; /* training data are open (not in mode eval) */
    double flops;  /* of the language model since the start, Megatron-compatible count */
    bool own;      /* checkpoints in checkpoint.save are those of this run's earlier starts */
    struct trace *trace;
    struct batch_dump *dump;
    struct tensorboard *board; /* NULL: none, or not rank 0 */
    struct train_state state;
    /* settle iterations one late; follows the backend, set by train_init */
    bool late;
    /* iteration state.iteration + 1 was updated and not settled */
    bool pending;
    int64_t last_saved, last_validated; /* iterations, -1 = none */
    bool stop;                          /* leave the loop before the last iteration */
    const char *why;                    /* text of the EXIT line */
    /* since the last log line */
    double loss_sum, balance_sum, seconds, interval_start;
    int64_t advanced, skipped, nan;
    bool logged_first;
};

/* Where a run starts, decided before anything is allocated. */
struct train_start {
    const char *load;   /* directory, NULL = new weights */
    int64_t checkpoint; /* its iteration */
    int64_t iteration;  /* completed ones at the start: 0 when finetuning */
    bool finetune;      /* weights only */
    bool own;           /* this run's own checkpoint: trace and logs continue */
    char text[1200];    /* for the header */
};

/* `load`, or without it `save` if that holds a checkpoint. A run with `load` that is submitted
 * again, by the very deck that its directory echoes, goes on from its own checkpoint in `save`.
 * Mistakes are collected (EXIT_CHECKPOINT). Collective over the world. */
void train_find_start(struct train_start *s, const struct run *run, const struct deck *deck,
                      const struct topology *topo, struct errors *errors);
/* Model, optimizer, step, data; memory; initial values. Mistakes of data are collected. sharers:
 * the ranks on this rank's GPU, NULL: it has it alone. Collective over sharers. */
void train_init(struct train *t, const struct deck *deck, const struct topology *topo,
                struct comm *sharers, struct run *run, struct errors *errors);
/* The checkpoint, if any, then the trace. Mistakes are collected (EXIT_CHECKPOINT). Collective over
 * the world. */
void train_restore(struct train *t, const struct train_start *start, struct errors *errors);
/* What comes before the first iteration: iteration-0 checkpoint, first validation. Collective over
 * the world. */
void train_begin(struct train *t);
/* Whether another iteration is due. Local. */
bool train_goes_on(const struct train *t);
/* One pass of the loop. Collective over the world. */
void train_iterate(struct train *t);
/* Last checkpoint and validation, timers; the exit status (EXIT_OK or EXIT_STOPPED). Collective
 * over the world. */
int train_end(struct train *t);
/* Close the files: what cannot be written to the end is an error of the run, before its EXIT line.
 * Collective over the world. */
void train_close(struct train *t);
/* train_close, where that has not been done, and the rest. Collective over the world. */
void train_free(struct train *t);

#endif
