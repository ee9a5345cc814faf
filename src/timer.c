/* timer.c - see timer.h. With log.c one of the two files that keep state.
 *
 * Every change of section or part is a mark. Without a device it is a reading of the host's clock
 * and what ended is booked at once. With one it is an event on the device's stream; marks are
 * numbered and lie in a ring, and mark n's label is what begins at it, so that the time from mark
 * n to n+1 is booked to the label of n when both have passed.
 */
#include "timer.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "backend.h"
#include "check.h"
#include "log.h"

enum { DEPTH = 8, NO_ROW = -1 };

static const double note_share = 0.10, slow_ratio = 1.3, slow_share = 0.02;

/* Where time is booked: rows, or NO_ROW. */
struct label {
    int section, part;
    int entered; /* the row that was not open before: a call of it */
};

struct mark {
    struct event at;
    struct label label;
};

static struct {
    double total[TIMER_ROWS], at_iteration[TIMER_ROWS], at_sample[TIMER_SECTIONS];
    double wall, wall_at_iteration;
    int64_t calls[TIMER_ROWS];
    enum timer_section open[DEPTH];
    int depth;
    enum timer_part part;
    /* of the host's clock */
    double since;
    struct label running;
    /* of the device's */
    const struct backend_ops *be; /* NULL: none */
    struct stream *stream;
    struct mark *ring; /* [capacity] */
    int64_t capacity, made, booked;
} state;

static const char *const names[] = {
#define X(section, text) [TIMER_##section] = text,
    TIMER_SECTIONS_X(X) TIMER_PARTS_X(X)
#undef X
};

static void tell(void);
static bool belongs(enum timer_part part);
static void book(const struct label *label, double seconds);
static void change(int entered);
static void role_table(const struct timer_sample *samples, int n, int role, const char *name,
                       const char *other, void (*line)(void *ctx, const char *text), void *ctx);
static void to_log(void *ctx, const char *text);

double timer_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void timer_reset(void)
{
    ASSERT(!state.be);
    memset(&state, 0, sizeof state);
    state.since = timer_now();
    state.part = TIMER_NO_PART;
    state.running = (struct label){ NO_ROW, NO_ROW, NO_ROW };
}

void timer_start(enum timer_section section)
{
    ASSERT(state.depth < DEPTH && section < TIMER_IDLE);
    state.open[state.depth++] = section;
    change((int)section);
    tell();
}

void timer_stop(enum timer_section section)
{
    ASSERT(state.depth > 0 && state.open[state.depth - 1] == section);
    state.depth--;
    change(NO_ROW);
    tell();
}

void timer_part(enum timer_part part)
{
    if (!belongs(part))
        part = TIMER_NO_PART;
    if (part == state.part)
        return;
    state.part = part;
    change(part != TIMER_NO_PART ? (int)part : NO_ROW);
}

/* ---- the device's clock ---- */

void timer_use_device(const struct backend_ops *be, struct stream *s, int64_t marks)
{
    ASSERT(!state.be && marks >= 4);
    struct mark *ring = xcalloc((size_t)marks, sizeof *ring);
    for (int64_t i = 0; i < marks; i++)
        be->event_create_timed(&ring[i].at);
    change(NO_ROW); /* the host's time ends here */
    state.ring = ring;
    state.capacity = marks;
    state.made = state.booked = 0;
    state.stream = s;
    state.be = be;
    change(NO_ROW);
}

void timer_leave_device(void)
{
    if (!state.be)
        return;
    timer_catch_up();
    for (int64_t i = 0; i < state.capacity; i++)
        state.be->event_destroy(&state.ring[i].at);
    free(state.ring);
    state.be = NULL;
    state.ring = NULL;
    state.stream = NULL;
    state.since = timer_now();
    change(NO_ROW);
}

int64_t timer_mark(void)
{
    change(NO_ROW);
    return state.made - 1;
}

void timer_collect(int64_t mark)
{
    for (; state.be && state.booked < mark; state.booked++) {
        const struct mark *from = &state.ring[state.booked % state.capacity],
                          *to = &state.ring[(state.booked + 1) % state.capacity];
        book(&from->label, state.be->event_seconds(&from->at, &to->at));
    }
}

void timer_catch_up(void)
{
    const int64_t mark = timer_mark();
    if (!state.be)
        return;
    state.be->stream_sync(state.stream);
    timer_collect(mark);
}

double timer_take_iteration(double seconds[TIMER_ROWS])
{
    double covered = 0;
    if (!state.be)
        change(NO_ROW);
    const double wall = state.wall - state.wall_at_iteration;
    for (int s = 0; s < TIMER_ROWS; s++) {
        seconds[s] = state.total[s] - state.at_iteration[s];
        state.at_iteration[s] = state.total[s];
        covered += s < TIMER_IDLE ? seconds[s] : 0;
    }
    seconds[TIMER_IDLE] = wall > covered ? wall - covered : 0;
    state.wall_at_iteration = state.wall;
    return wall;
}

void timer_take_sample(struct timer_sample *out, int role)
{
    double covered = 0;
    if (!state.be)
        change(NO_ROW);
    memset(out, 0, sizeof *out);
    out->role = role;
    out->wall = state.wall;
    for (int s = 0; s < TIMER_IDLE; s++) {
        out->seconds[s] = state.total[s];
        out->calls[s] = state.calls[s];
        covered += state.total[s];
    }
    out->seconds[TIMER_IDLE] = out->wall > covered ? out->wall - covered : 0;
    for (int s = TIMER_SECTIONS; s < TIMER_ROWS; s++) {
        out->seconds[s] = state.total[s];
        out->calls[s] = state.calls[s];
    }
    for (int s = 0; s < TIMER_SECTIONS; s++) {
        out->recent[s] = out->seconds[s] - state.at_sample[s];
        state.at_sample[s] = out->seconds[s];
    }
}

void timer_table(const struct timer_sample *samples, int n, const char *const *roles, int n_roles,
                 void (*line)(void *ctx, const char *text), void *ctx)
{
    for (int role = 0; role < n_roles; role++)
        role_table(samples, n, role, roles[role],
                   role < 2 && n_roles > 1 ? roles[1 - role] : "other", line, ctx);
}

void timer_report(struct comm *world, int role, const char *const *roles, int n_roles,
                  double *seconds)
{
    struct timer_sample own, *all = NULL;
    timer_take_sample(&own, role);
    if (world->rank == 0)
        all = xcalloc((size_t)world->size, sizeof *all);
    comm_host_gather(world, &own, sizeof own, all, 0);
    if (all)
        timer_table(all, world->size, roles, n_roles, to_log, NULL);
    for (int s = 0; all && seconds && s < TIMER_SECTIONS; s++) {
        seconds[s] = 0;
        for (int i = 0; i < world->size; i++)
            seconds[s] = all[i].recent[s] > seconds[s] ? all[i].recent[s] : seconds[s];
    }
    free(all);
}

const char *timer_name(enum timer_section section)
{
    return names[section];
}

/* Where this rank is, for the watchdog. */
static void tell(void)
{
    log_process()->section = state.depth > 0 ? names[state.open[state.depth - 1]] : NULL;
    log_beat();
}

/* Whether the open section has this part. */
static bool belongs(enum timer_part part)
{
    const int section = state.depth > 0 ? (int)state.open[state.depth - 1] : NO_ROW;
    if (part == TIMER_AGREEMENT)
        return section == TIMER_GRAD_SYNC || section == TIMER_OPTIMIZER;
    return section == TIMER_FORWARD || section == TIMER_BACKWARD;
}

static void book(const struct label *label, double seconds)
{
    state.wall += seconds;
    if (label->section != NO_ROW)
        state.total[label->section] += seconds;
    if (label->part != NO_ROW)
        state.total[label->part] += seconds;
    if (label->entered != NO_ROW)
        state.calls[label->entered]++;
}

/* A full ring waits for its older half. */
static void make_room(void)
{
    const int64_t mark = state.booked + state.capacity / 2;
    state.be->event_sync(&state.ring[mark % state.capacity].at);
    timer_collect(mark);
}

/* What ran ends here; from here on the open section and its part do, of which `entered` is new. */
static void change(int entered)
{
    const struct label next = {
        .section = state.depth > 0 ? (int)state.open[state.depth - 1] : NO_ROW,
        .part = state.part != TIMER_NO_PART && belongs(state.part) ? (int)state.part : NO_ROW,
        .entered = entered
    };
    if (!state.be) {
        const double now = timer_now();
        book(&state.running, now - state.since);
        state.since = now;
        state.running = next;
        return;
    }
    if (state.made - state.booked == state.capacity)
        make_room();
    struct mark *m = &state.ring[state.made++ % state.capacity];
    m->label = next;
    state.be->event_record(&m->at, state.stream);
}

/* What to do about time that trained nothing; `whose` is "encoder ", "language " or "". */
static void notes(const double mean[TIMER_ROWS], double wall, const char *whose, const char *other,
                  void (*line)(void *ctx, const char *text), void *ctx)
{
    char grid[64], text[256];
    const struct {
        int row;
        const char *what, *cure;
    } waste[] = {
        { TIMER_BRIDGE_WAIT, grid, "give that one more ranks" },
        { TIMER_DATA_WAIT, "waiting for data", "more data.num_workers or a faster file system" },
        { TIMER_GRAD_SYNC, "reducing gradients and waiting for slower ranks",
          "larger micro-batches or overlap" },
        { TIMER_DISPATCH, "moving tokens to their experts and waiting for them",
          "moe.moe_shared_expert_overlap or a smaller topology.llm_ep" },
        { TIMER_SAVE, "saving checkpoints", "a larger checkpoint.save_interval" },
        { TIMER_IDLE, "in no section at all", "other programs on these cores?" },
    };
    snprintf(grid, sizeof grid, "waiting for the %s grid", other);
    for (size_t w = 0; w < sizeof waste / sizeof *waste; w++) {
        const double spent = mean[waste[w].row];
        if (spent < note_share * wall)
            continue;
        snprintf(text, sizeof text, "NOTE: %.0f %% of the %sranks' time was spent %s; %s",
                 100 * spent / wall, whose, waste[w].what, waste[w].cure);
        line(ctx, text);
    }
}

/* The rank that takes much longer than its equals for what is equal work on all of them and waits
 * for nobody. Where ranks wait for each other inside these parts (tensor parallelism) they take as
 * long as the slowest and nothing is seen. */
static void straggler(const struct timer_sample *samples, int n, int role, int ranks, double wall,
                      const char *whose, void (*line)(void *ctx, const char *text), void *ctx)
{
    static const enum timer_part equal[] = { TIMER_ENCODER, TIMER_MAMBA, TIMER_ATTENTION,
                                             TIMER_DENSE, TIMER_SHARED };
    double most = 0, mean = 0;
    int slowest = -1;
    char text[256];
    for (int i = 0; i < n; i++) {
        double own = 0;
        if (samples[i].role != role)
            continue;
        for (size_t k = 0; k < sizeof equal / sizeof *equal; k++)
            own += samples[i].seconds[equal[k]];
        mean += own / ranks;
        if (own > most) {
            most = own;
            slowest = i;
        }
    }
    if (slowest < 0 || mean < slow_share * wall || most < slow_ratio * mean)
        return;
    snprintf(
        text, sizeof text,
        "NOTE: rank %d took %.1f times as long as the %sranks do on average for the same work; a slow or shared host?",
        slowest, most / mean, whose);
    line(ctx, text);
}

static void role_table(const struct timer_sample *samples, int n, int role, const char *name,
                       const char *other, void (*line)(void *ctx, const char *text), void *ctx)
{
    double wall = 0, mean[TIMER_ROWS] = { 0 };
    bool parts = false;
    char text[256];
    int ranks = 0;
    for (int i = 0; i < n; i++)
        if (samples[i].role == role) {
            ranks++;
            wall += samples[i].wall;
        }
    if (ranks == 0 || wall <= 0)
        return;
    wall /= ranks;
    snprintf(text, sizeof text, "timers: %s, %d rank%s, %.3f s", name, ranks, ranks == 1 ? "" : "s",
             wall);
    line(ctx, text);
    snprintf(text, sizeof text, "  %-12s %8s %12s %12s %12s %8s %7s", "section", "calls", "min s",
             "mean s", "max s", "max rank", "% wall");
    line(ctx, text);
    for (int s = 0; s < TIMER_ROWS; s++) {
        double least = 0, most = -1;
        int64_t calls = 0;
        int most_rank = -1;
        for (int i = 0; i < n; i++) {
            if (samples[i].role != role)
                continue;
            const double t = samples[i].seconds[s];
            if (most_rank < 0 || t < least)
                least = t;
            if (most_rank < 0 || t > most) {
                most = t;
                most_rank = i;
            }
            mean[s] += t / ranks;
            calls = samples[i].calls[s] > calls ? samples[i].calls[s] : calls;
        }
        if (most <= 0 && calls == 0)
            continue;
        if (s >= TIMER_SECTIONS && !parts)
            line(ctx, "  of these:");
        parts = s >= TIMER_SECTIONS;
        snprintf(text, sizeof text, "  %-12s %8lld %12.4f %12.4f %12.4f %8d %7.1f", names[s],
                 (long long)calls, least, mean[s], most, most_rank, 100 * mean[s] / wall);
        line(ctx, text);
    }
    char whose[32];
    snprintf(whose, sizeof whose, "%.30s ", name);
    notes(mean, wall, role < 2 ? whose : "", other, line, ctx);
    straggler(samples, n, role, ranks, wall, role < 2 ? whose : "", line, ctx);
}

static void to_log(void *ctx, const char *text)
{
    log_line("%s", text);
}
