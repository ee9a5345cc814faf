/* run.h - the run directory and how a run is asked to stop and says how it ended (interface.md 1
 * and 4).
 *
 * <output_dir>/: LOCK while live (host, pid, job), EXIT written last (`code rank role iteration
 * text`), run.log, progress.txt, deck.nml, LIVE while live (watchdog.h), STOP and SAVE as requests
 * from outside. A fresh start keeps the files of an earlier run under numbered names; a resumed run
 * appends. Only world rank 0 touches the directory, but for LIVE; what it finds is agreed before
 * anybody acts on it.
 */
#ifndef MIMO_RUN_H
#define MIMO_RUN_H

#include <time.h>
#include "deck.h"
#include "step.h"
#include "topology.h"
#include "watchdog.h"

struct run {
    const struct deck *deck;
    struct comm *world;
    const char *dir;         /* output_dir */
    int lock, save_lock;     /* descriptors on rank 0 while the locks are held, else -1 */
    bool ours;               /* the directory is locked by this run (agreed) */
    double start;            /* timer_now at run_init */
    int64_t first_iteration; /* completed iterations before the trace's first row */
    bool continues;          /* trace and logs of an earlier start go on */
    int64_t starts;          /* of this trace, with this one */
    /* on rank 0: the code that the EXIT file of the start before had, -1 = none */
    int earlier_end;
    /* on rank 0, from the saves in progress.txt: operations of the iterations before this start,
     * and of those before the first start on so many ranks; when that was */
    double flops_before, flops_first;
    time_t first_start;
    struct watchdog *watchdog; /* from run_begin to run_finish */
};

/* mkdir -p. False, errno set: it cannot be made or is no directory. Local. */
bool run_make_directories(const char *dir);
/* The same directory, by name or by whatever leads there. Local. */
bool run_same_directory(const char *a, const char *b);
/* Create and lock the directory and, to train, the one of checkpoints, remove an old EXIT, catch
 * signals. Mistakes are collected
 * (EXIT_ENVIRONMENT, EXIT_WRITE). Collective over the world. */
void run_init(struct run *r, const struct deck *deck, struct comm *world, struct errors *errors);
/* Whether the directory's deck.nml is exactly this deck: the same run submitted again. For rank 0.
 * Local. */
bool run_same_deck(const struct run *r);
/* A run that is submitted again and again, resumed at `iteration` (else no matter), and each time
 * ends by itself before it has saved anything newer is refused (EXIT_CHECKPOINT) after three
 * starts, once; a changed deck starts the count again. Rank 0's directory; Local. */
void run_check_progress(const struct run *r, int64_t iteration, bool resumed,
                        struct errors *errors);
/* Decide between a fresh set of files and a continued one: `resumed` = the start is from this run's
 * own checkpoint at `iteration`. Keeps earlier files, writes deck.nml, opens run.log. Collective
 * over the world. */
void run_begin(struct run *r, int64_t iteration, bool resumed);
/* This rank's requests: a signal on any rank; STOP, SAVE and the clock on rank 0. `run` is a struct
 * run (step_poll). Local. */
void run_poll(void *run, bool *request);
/* One line on the training data in progress.txt; where a start before this one found others, a
 * warning. Rank 0 writes. Local. */
void run_note_data(const struct run *r, const char *fingerprint);
/* Remove the SAVE file once it is served. Local. */
void run_save_served(struct run *r);
/* The line of a save: iteration, throughput of this start and since the first on so many ranks, per
 * device of the language grid, operations (`flops` = of this start) and tokens in all. Rank 0
 * writes. Local. */
void run_progress_saved(const struct run *r, int64_t iteration, double flops, int devices,
                        double tokens);
/* Write EXIT, release the lock; returns code. Collective over the world. */
int run_finish(struct run *r, int code, int64_t iteration, const char *text);
/* A start that was refused before run_init: EXIT in the directory if it exists and no live run
 * holds it. Rank 0 only. Local. */
void run_refuse(const char *dir, int code, const char *text);
/* mimo --status DIR: print the EXIT line, return its code; 8 when there is none. Local. */
int run_status(const char *dir, FILE *out);

#endif
