/* timer.c - see timer.h. With log.c one of the two files that keep state. */
#include "timer.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "check.h"
#include "log.h"

enum { DEPTH = 8 };

static const double note_share = 0.10, slow_ratio = 1.3, slow_share = 0.02;

static struct {
    double begin, iteration_begin, running_since;
    double total[TIMER_ROWS], at_iteration[TIMER_SECTIONS], at_sample[TIMER_SECTIONS];
    int64_t calls[TIMER_ROWS];
    enum timer_section open[DEPTH];
    int depth;
    enum timer_part part;
} state;

static const char *const names[] = {
#define X(section, text) [TIMER_##section] = text,
    TIMER_SECTIONS_X(X) TIMER_PARTS_X(X)
#undef X
};

static void tell(void);
static bool computing(void);
static void settle(double now);
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
    memset(&state, 0, sizeof state);
    state.begin = state.iteration_begin = state.running_since = timer_now();
    state.part = TIMER_NO_PART;
}

void timer_start(enum timer_section section)
{
    ASSERT(state.depth < DEPTH && section < TIMER_IDLE);
    settle(timer_now());
    state.open[state.depth++] = section;
    state.calls[section]++;
    tell();
}

void timer_stop(enum timer_section section)
{
    ASSERT(state.depth > 0 && state.open[state.depth - 1] == section);
    settle(timer_now());
    state.depth--;
    tell();
}

void timer_part(enum timer_part part)
{
    if (!computing())
        part = TIMER_NO_PART;
    if (part == state.part)
        return;
    settle(timer_now());
    state.part = part;
    if (part != TIMER_NO_PART)
        state.calls[part]++;
}

double timer_take_iteration(double seconds[TIMER_SECTIONS])
{
    const double now = timer_now(), wall = now - state.iteration_begin;
    double covered = 0;
    settle(now);
    for (int s = 0; s < TIMER_IDLE; s++) {
        seconds[s] = state.total[s] - state.at_iteration[s];
        state.at_iteration[s] = state.total[s];
        covered += seconds[s];
    }
    seconds[TIMER_IDLE] = wall > covered ? wall - covered : 0;
    state.iteration_begin = now;
    return wall;
}

void timer_take_sample(struct timer_sample *out, int role)
{
    const double now = timer_now();
    double covered = 0;
    settle(now);
    memset(out, 0, sizeof *out);
    out->role = role;
    out->wall = now - state.begin;
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

static bool computing(void)
{
    return state.depth > 0 && (state.open[state.depth - 1] == TIMER_FORWARD ||
                               state.open[state.depth - 1] == TIMER_BACKWARD);
}

/* Book the time since the last change to the innermost open section, and to its part. */
static void settle(double now)
{
    if (state.depth > 0)
        state.total[state.open[state.depth - 1]] += now - state.running_since;
    if (computing() && state.part != TIMER_NO_PART)
        state.total[state.part] += now - state.running_since;
    state.running_since = now;
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
            line(ctx, "  of forward and backward:");
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
