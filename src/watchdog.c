/* watchdog.c - see watchdog.h.
 *
 * Time is counted in ticks of the thread, not by the clock: on a loaded machine, or when a whole
 * job is suspended and continued, the ticks fall behind as the work does, and nobody is accused.
 * Rank 0 judges first; another rank has to wait longer, for the case that it is rank 0 that hangs.
 * A verdict is withdrawn when anybody moves in the meantime, so a rank that waits an hour for
 * another's checkpoint is left alone as long as that one gets on. The thread calls nothing of MPI
 * but the abort.
 */
#include "watchdog.h"
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "log.h"

/* A slot is a page: ranks on different hosts never share one in a file system's cache. */
enum { SLOT_BYTES = 4096, PATH_BYTES = 4096 + 16, TICKS = 20, PUBLISH_TICKS = 4, NAMED = 4 };

struct watchdog {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    bool stop;      /* under lock */
    double seconds; /* allowed without progress */
    int rank, size;
    char path[PATH_BYTES];
    /* of the thread */
    long beats;            /* seen last */
    long long tick, quiet; /* ticks so far, those since the last progress */
};

static double period(const struct watchdog *w)
{
    const double p = w->seconds / TICKS;
    return p > 15.0 ? 15.0 : p;
}

static const char *or_dash(const char *text)
{
    return text && *text ? text : "-";
}

/* A slot that cannot be written is only a rank that seems silent, so never an error of its own. */
static void publish(const struct watchdog *w)
{
    const struct log_process *p = log_process();
    const char *call = p->call;
    char text[SLOT_BYTES];
    int n =
        snprintf(text, sizeof text, "%lld\t%lld\t%ld\t%s\t%s\t%s\t%.*s\t%s", w->tick, w->quiet,
                 p->iteration, or_dash(p->role), or_dash(p->host), or_dash(p->section),
                 (int)strcspn(or_dash(call), "("), or_dash(call), call ? or_dash(p->group) : "-");
    memset(text + n, ' ', sizeof text - (size_t)n);
    text[sizeof text - 1] = '\n';
    const int fd = open(w->path, O_WRONLY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return;
    const ssize_t ignored = pwrite(fd, text, sizeof text, (off_t)w->rank * SLOT_BYTES);
    (void)ignored;
    close(fd);
}

/* slot [size]; false when LIVE is gone. */
static bool read_slots(const struct watchdog *w, struct watchdog_slot *slot)
{
    char text[SLOT_BYTES + 1];
    const int fd = open(w->path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return false;
    for (int r = 0; r < w->size; r++) {
        const ssize_t n = pread(fd, text, SLOT_BYTES, (off_t)r * SLOT_BYTES);
        struct watchdog_slot s = { .tick = 0 };
        text[n > 0 ? n : 0] = '\0';
        if (sscanf(text, "%lld\t%lld\t%lld\t%31[^\t]\t%63[^\t]\t%23[^\t]\t%39[^\t]\t%39[^ \n]",
                   &s.tick, &s.quiet, &s.iteration, s.role, s.host, s.section, s.call,
                   s.group) != 8)
            s = (struct watchdog_slot){ .tick = 0 };
        slot[r] = s;
    }
    close(fd);
    return true;
}

/* Sleeps through `ticks`, publishing; false when the thread shall end or the main one has got
 * on. */
static bool watch(struct watchdog *w, int ticks)
{
    bool stop = false;
    for (int i = 0; i < ticks && !stop; i++) {
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        const double at = (double)until.tv_nsec * 1e-9 + period(w);
        until.tv_sec += (time_t)at;
        until.tv_nsec = (long)((at - (double)(time_t)at) * 1e9);
        pthread_mutex_lock(&w->lock);
        while (!w->stop && pthread_cond_timedwait(&w->wake, &w->lock, &until) != ETIMEDOUT) {
        }
        stop = w->stop;
        pthread_mutex_unlock(&w->lock);
        const long beats = atomic_load(&log_process()->beats);
        w->tick++;
        w->quiet = beats == w->beats ? w->quiet + 1 : 0;
        w->beats = beats;
        if (!stop && w->tick % PUBLISH_TICKS == 0)
            publish(w);
        if (w->quiet == 0)
            return false;
    }
    return !stop;
}

static bool silent(const struct watchdog_slot *before, const struct watchdog_slot *after)
{
    return after->tick == before->tick;
}

/* In no message: what others may wait for. */
static bool busy(const struct watchdog_slot *s)
{
    return strcmp(s->call, "-") == 0;
}

static void put(char *text, size_t size, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
static void put(char *text, size_t size, const char *fmt, ...)
{
    const size_t n = strlen(text);
    va_list args;
    va_start(args, fmt);
    vsnprintf(text + n, size - n, fmt, args);
    va_end(args);
}

static void put_rank(char *text, size_t size, int rank, const struct watchdog_slot *s)
{
    if (s->tick == 0)
        put(text, size, "rank %d (never heard of)", rank);
    else
        put(text, size, "rank %d (%s, host %s)", rank, s->role, s->host);
}

/* "iteration 12, backward, in MPI_Wait of language.dp" */
static void put_place(char *text, size_t size, const struct watchdog_slot *s)
{
    if (s->iteration >= 0)
        put(text, size, "iteration %lld, ", s->iteration);
    put(text, size, "%s", strcmp(s->section, "-") == 0 ? "between two sections" : s->section);
    if (strcmp(s->call, "-") != 0)
        put(text, size, ", in %s of %s", s->call, s->group);
}

void watchdog_verdict(const struct watchdog_slot *before, const struct watchdog_slot *after,
                      int size, double seconds, char *text, size_t text_size)
{
    int n_silent = 0, n_busy = 0, named = 0;
    for (int r = 0; r < size; r++) {
        n_silent += silent(&before[r], &after[r]);
        n_busy += !silent(&before[r], &after[r]) && busy(&after[r]);
    }
    /* Where everybody is in a message the messages do not fit together: all are named. */
    const int n_held = n_silent > 0 ? n_silent : n_busy > 0 ? n_busy : size;
    snprintf(
        text, text_size,
        n_silent > 0 ? "no sign of life for %.3g s from " : "no progress for %.3g s: ", seconds);
    for (int r = 0; r < size && named < NAMED; r++) {
        if (n_silent > 0 ? !silent(&before[r], &after[r]) : n_busy > 0 && !busy(&after[r]))
            continue;
        put(text, text_size, "%s", named++ ? "; " : "");
        put_rank(text, text_size, r, &after[r]);
        if (after[r].tick == 0)
            continue;
        put(text, text_size, n_silent > 0 ? ", last seen in " : " in ");
        put_place(text, text_size, &after[r]);
    }
    if (n_held > named)
        put(text, text_size, "; and %d more", n_held - named);
    if (size > n_held)
        put(text, text_size, "; %s",
            size - n_held == 1 ? "the other rank waits" : "the other ranks wait");
}

/* Says who, and ends the job. */
static _Noreturn void accuse(const struct watchdog *w, const struct watchdog_slot *before,
                             const struct watchdog_slot *after)
{
    char text[1600], hint[240];
    watchdog_verdict(before, after, w->size, w->seconds, text, sizeof text);
    snprintf(
        hint, sizeof hint,
        "submit again to go on from the last checkpoint, on other hosts if it is the same host again; "
        "run.distributed_timeout_minutes (%.4g) is how long no progress is allowed",
        w->seconds / 60.0);
    fatal(EXIT_RANK_DIED, __FILE__, __LINE__, hint, "%s", text);
}

/* Nothing has moved here for the time allowed. */
static void judge(struct watchdog *w)
{
    struct watchdog_slot *before = xcalloc((size_t)w->size, sizeof *before),
                         *after = xcalloc((size_t)w->size, sizeof *after);
    bool stuck = read_slots(w, before) && watch(w, 2 * PUBLISH_TICKS + 1);
    publish(w);
    stuck = stuck && read_slots(w, after);
    for (int r = 0; r < w->size && stuck; r++)
        stuck =
            silent(&before[r], &after[r]) || (double)after[r].quiet * period(w) > 0.7 * w->seconds;
    /* alive, also where a full disk takes no LIVE */
    after[w->rank].tick = before[w->rank].tick + 1;
    if (stuck)
        accuse(w, before, after);
    w->quiet /= 2;
    free(before);
    free(after);
}

static void *run(void *arg)
{
    struct watchdog *w = arg;
    const double allowed = w->rank == 0 ? w->seconds : 1.5 * w->seconds;
    bool stop = false;
    w->beats = atomic_load(&log_process()->beats);
    w->tick = 1;
    publish(w);
    while (!stop) {
        watch(w, 1);
        if ((double)w->quiet * period(w) >= allowed)
            judge(w);
        pthread_mutex_lock(&w->lock);
        stop = w->stop;
        pthread_mutex_unlock(&w->lock);
    }
    return NULL;
}

struct watchdog *watchdog_start(const char *dir, struct comm *world, double seconds)
{
    struct watchdog *w = xcalloc(1, sizeof *w);
    pthread_condattr_t monotonic;
    sigset_t all, before;
    w->seconds = seconds;
    w->rank = world->rank;
    w->size = world->size;
    snprintf(w->path, sizeof w->path, "%s/LIVE", dir);
    if (w->rank == 0) {
        unlink(w->path);
        const int fd = open(w->path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666);
        CHECK_SYS(fd >= 0 && ftruncate(fd, (off_t)w->size * SLOT_BYTES) == 0, EXIT_WRITE, "%s",
                  w->path);
        close(fd);
    }
    comm_host_barrier(world);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->wake, &monotonic);
    pthread_condattr_destroy(&monotonic);
    /* Signals are the main thread's. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int failed = pthread_create(&w->thread, NULL, run, w);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    errno = failed;
    CHECK_SYS(failed == 0, EXIT_ENVIRONMENT, "the watchdog's thread");
    return w;
}

void watchdog_stop(struct watchdog *w)
{
    if (!w)
        return;
    pthread_mutex_lock(&w->lock);
    w->stop = true;
    pthread_cond_signal(&w->wake);
    pthread_mutex_unlock(&w->lock);
    pthread_join(w->thread, NULL);
    pthread_cond_destroy(&w->wake);
    pthread_mutex_destroy(&w->lock);
    if (w->rank == 0)
        unlink(w->path);
    free(w);
}
