/* log.h - what a run says. Rank 0 writes stdout and <output_dir>/run.log; every rank may warn on
 * stderr. Local, all. */
#ifndef MIMO_LOG_H
#define MIMO_LOG_H

#include <stdatomic.h>
#include <stdbool.h>

/* What every message says about this process, and how it ends the job. The one home of it: check.c
 * and comm_mpi.c keep no state of their own. */
struct log_process {
    int rank, size; /* of the world; size 0 = not known yet */
    char role[32], host[64], output_dir[4096];
    char library[160];           /* the MPI library, one line */
    long iteration;              /* -1 = outside the loop */
    void (*abort_job)(int code); /* NULL = end this process */
    /* identity of an EXIT file left by an earlier run, see check.c */
    long exit_mark[4];
    atomic_flag failing; /* set by the first failure */
    /* of the signal handlers of check.c; lives as long as the process */
    void *crash_stack;
    /* What the watchdog's thread reads of the main one. */
    atomic_long beats;             /* grows with every sign of progress */
    _Atomic(const char *) section; /* of the timer that runs, NULL = none */
    /* NULL, or the MPI call that it is in and the group's name */
    _Atomic(const char *) call, group;
};
struct log_process *log_process(void);
/* This rank has got on: something that takes long calls it for each part. */
void log_beat(void);

/* Become the writing rank (rank 0) or a silent one; `path` (may be NULL: what is said is kept for
 * the next call's file) is appended to. A file that cannot be opened is reported by the return
 * value false, errno set. Later a line that run.log or a full disk behind stdout does not take ends
 * the job with EXIT_WRITE. */
bool log_open(const char *path, bool writer);
void log_close(void);
/* One line to stdout and run.log, flushed; nothing on ranks that are not the writer. */
void log_line(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* What the run is doing, on a line that the next one of either kind replaces; only where stdout is
 * a terminal, at most 5 a second, never in run.log. */
void log_progress(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* Take that line away, before something else is written to the terminal. */
void log_clear_progress(void);
/* "warning: ..." to stderr and run.log, once per distinct text, at most 20 of them per rank, then a
 * count at log_close. */
void log_warn(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

#endif
