/* timer.h - where the wall time of this rank goes.
 *
 * Sections are exclusive: one that starts inside another pauses it, so the sections of a rank
 * never add up to more than its wall time, and `idle` is what is left over. Main thread only.
 *
 * Before timer_use_device times are the host's (monotonic clock). From then on they are those of
 * the device's compute stream: where a section or part is entered or left, an event goes into the
 * stream, and what lies between two events on the device is booked, whatever the host did
 * meanwhile. So a section holds the kernels that were issued in it, what the stream waits for in
 * it (in `bridge wait` the other grid, in `grad sync` and `moe dispatch` the other ranks of the
 * group) and the time in which the device had nothing to do because the host was late with it
 * (`data wait`: samples). Sections that only keep the host busy while the device works take no
 * time. Events are read when the caller knows that they have passed, an iteration late, so that
 * nothing waits for a timer; until then nothing of them is in any sum. On a backend whose
 * operations are complete when they return the device's clock is the host's.
 */
#ifndef MIMO_TIMER_H
#define MIMO_TIMER_H

#include <stdint.h>
#include "comm.h"

struct backend_ops;

/* X(SECTION, "name in the table") */
/* clang-format off */
#define TIMER_SECTIONS_X(X) \
    X(START, "start") X(FORWARD, "forward") X(BACKWARD, "backward") X(BRIDGE_WAIT, "bridge wait") \
    X(GRAD_SYNC, "grad sync") X(OPTIMIZER, "optimizer") X(DATA_WAIT, "data wait") \
    X(SAVE, "save") X(EVAL, "eval") X(LOG, "log") X(IDLE, "idle")
/* clang-format on */

enum timer_section {
#define X(section, text) TIMER_##section,
    TIMER_SECTIONS_X(X)
#undef X
        TIMER_SECTIONS
};

/* What forward and backward are made of; the sections are not shortened by it. "vocabulary" is
 * embedding, output layer and loss. "agreement" is of grad sync and optimizer: waiting for all
 * ranks of the job, of both grids, before the update. */
/* clang-format off */
#define TIMER_PARTS_X(X) \
    X(ENCODER, "vit blocks") X(PROJECTOR, "projector") X(MAMBA, "mamba") \
    X(ATTENTION, "attention") X(DENSE, "dense") X(ROUTER, "moe router") \
    X(DISPATCH, "moe dispatch") X(EXPERTS, "moe gemm") X(SHARED, "moe shared") \
    X(VOCABULARY, "vocabulary") X(AGREEMENT, "agreement") X(NO_PART, "")
/* clang-format on */

enum timer_part {
    TIMER_BEFORE_PARTS = TIMER_SECTIONS - 1,
#define X(part, text) TIMER_##part,
    TIMER_PARTS_X(X)
#undef X
        TIMER_ROWS = TIMER_NO_PART
};

/* What one rank spent since timer_reset, in sections and parts. */
struct timer_sample {
    int role; /* index into the role names of timer_table */
    double wall;
    double seconds[TIMER_ROWS];
    double recent[TIMER_SECTIONS]; /* of them since the sample before this one */
    int64_t calls[TIMER_ROWS];
};

/* Seconds since an arbitrary moment. Local. */
double timer_now(void);
/* Start of the run: all counters zero. Local. */
void timer_reset(void);
/* Enter and leave a section; nested at most 8 deep, left in reverse order (checked). Local. */
void timer_start(enum timer_section section);
void timer_stop(enum timer_section section);
/* From here on this part, until the next call; counts only inside the sections that it is a part
 * of. Local. */
void timer_part(enum timer_part part);
/* From here on this stream's time counts, until timer_leave_device. At least `marks` changes of
 * section or part fit between one timer_collect and the next; with more, the host waits for the
 * oldest. Allocates: not inside a step. The stream must outlive it. Local. */
void timer_use_device(const struct backend_ops *be, struct stream *s, int64_t marks);
void timer_leave_device(void); /* Waits for the stream; without a device nothing. Local. */
/* A point in the stream, which timer_collect takes. Local. */
int64_t timer_mark(void);
/* Books everything up to this mark, behind which the device is known to be. Local. */
void timer_collect(int64_t mark);
/* Waits for the stream and books everything; not inside a step. Local. */
void timer_catch_up(void);
/* Seconds of every row and the wall time of what was booked since the last call (or
 * timer_reset): one iteration. Without a device: up to now. Local. */
double timer_take_iteration(double seconds[TIMER_ROWS]);
/* What was booked since timer_reset. Local. */
void timer_take_sample(struct timer_sample *out, int role);
/* The table of the run: per role and section calls, min, mean and max over its ranks, the rank of
 * the maximum and the share of the wall time, then the same of the parts; then a NOTE for what
 * wastes a tenth or more, and for a rank that is much slower than its equals. The first two roles
 * wait for each other. samples [n] in rank order; one call of `line` each. Local. */
void timer_table(const struct timer_sample *samples, int n, const char *const *roles, int n_roles,
                 void (*line)(void *ctx, const char *text), void *ctx);
/* Gather the samples and log the table on rank 0. seconds [TIMER_SECTIONS], or NULL: there, on rank
 * 0, the most that any rank spent since its sample before this one. Collective over the world. */
void timer_report(struct comm *world, int role, const char *const *roles, int n_roles,
                  double *seconds);
/* "bridge wait". Local. */
const char *timer_name(enum timer_section section);

#endif
