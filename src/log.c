/* log.c - the lines of a run and what they say about the process that writes them.
 *
 * One of the two files with state (timer.c is the other): the open run.log, the warnings already
 * given, and struct log_process, which check.c prints in front of a failure. A line is one write(2)
 * on stderr, so lines of several ranks do not mix.
 */
#include "log.h"
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>
#include "check.h"

enum { WARNINGS_MAX = 20, LINE_MAX_BYTES = 8192, EARLY_BYTES = 16384, PROGRESS_MS = 200 };

static struct {
    FILE *file;
    char early[EARLY_BYTES]; /* said before run.log was open */
    size_t early_used;
    bool writer;
    bool terminal;                 /* stdout is one that can erase a line */
    bool progress;                 /* such a line stands there now */
    long progress_ms;              /* when the last one was written */
    uint64_t warned[WARNINGS_MAX]; /* hashes of the texts already given */
    int n_warned;
    long suppressed;
} state;

static struct log_process process = { .iteration = -1, .failing = ATOMIC_FLAG_INIT };

static void keep(const char *fmt, va_list args) __attribute__((format(printf, 1, 0)));
static void keep_text(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static void check_stdout(void);
static bool already_warned(const char *text);

struct log_process *log_process(void)
{
    return &process;
}

void log_beat(void)
{
    atomic_fetch_add_explicit(&process.beats, 1, memory_order_relaxed);
}

bool log_open(const char *path, bool writer)
{
    const char *term = getenv("TERM");
    state.writer = writer;
    state.terminal = writer && isatty(STDOUT_FILENO) && term && strcmp(term, "dumb") != 0;
    if (!writer || !path)
        return true;
    state.file = fopen(path, "ae");
    if (!state.file)
        return false;
    fwrite(state.early, 1, state.early_used, state.file);
    state.early_used = 0;
    return fflush(state.file) == 0;
}

void log_close(void)
{
    log_clear_progress();
    if (state.suppressed > 0) {
        char text[160];
        snprintf(text, sizeof text,
                 "warning: %ld more warnings were not shown (%d are, per rank)\n", state.suppressed,
                 WARNINGS_MAX);
        const ssize_t ignored = write(STDERR_FILENO, text, strlen(text));
        (void)ignored;
        if (state.file)
            fputs(text, state.file);
    }
    if (state.file)
        fclose(state.file);
    memset(&state, 0, sizeof state);
}

void log_line(const char *fmt, ...)
{
    if (!state.writer)
        return;
    log_clear_progress();
    va_list ap;
    va_start(ap, fmt);
    vprintf(fmt, ap);
    va_end(ap);
    putchar('\n');
    check_stdout();
    va_start(ap, fmt);
    keep(fmt, ap);
    va_end(ap);
}

void log_progress(const char *fmt, ...)
{
    char text[256];
    struct timespec t;
    struct winsize window;
    clock_gettime(CLOCK_MONOTONIC, &t);
    const long now = 1000 * (long)t.tv_sec + t.tv_nsec / 1000000;
    if (!state.terminal || now - state.progress_ms < PROGRESS_MS)
        return;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    /* A line that wraps could not be erased. */
    const bool known = ioctl(STDOUT_FILENO, TIOCGWINSZ, &window) == 0 && window.ws_col > 1;
    printf("\r%.*s\033[K", known ? window.ws_col - 1 : 79, text);
    fflush(stdout);
    state.progress = true;
    state.progress_ms = now;
}

void log_clear_progress(void)
{
    static const char erase[] = "\r\033[K";
    if (!state.progress)
        return;
    state.progress = false;
    const ssize_t ignored = write(STDOUT_FILENO, erase, sizeof erase - 1);
    (void)ignored;
}

void log_warn(const char *fmt, ...)
{
    char raw[LINE_MAX_BYTES / 4], text[LINE_MAX_BYTES], line[LINE_MAX_BYTES + 256];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(raw, sizeof raw, fmt, ap);
    va_end(ap);
    if (already_warned(raw))
        return;
    printable(text, sizeof text, raw);
    if (process.size > 1)
        snprintf(line, sizeof line, "warning: [rank %d %s %s] %s\n", process.rank, process.role,
                 process.host, text);
    else
        snprintf(line, sizeof line, "warning: %s\n", text);
    log_clear_progress();
    const ssize_t ignored =
        write(STDERR_FILENO, line, strlen(line)); /* nowhere to tell that stderr is gone */
    (void)ignored;
    line[strlen(line) - 1] = '\0';
    keep_text("%s", line);
}

/* A line for run.log, which must take it. */
static void keep(const char *fmt, va_list args)
{
    if (!state.writer)
        return;
    if (!state.file) {
        const size_t left = sizeof state.early - state.early_used;
        const int n = vsnprintf(state.early + state.early_used, left, fmt, args);
        if (n >= 0 && (size_t)n + 1 < left) { /* else it is only on stdout */
            state.early_used += (size_t)n;
            state.early[state.early_used++] = '\n';
        }
        return;
    }
    const bool ok = vfprintf(state.file, fmt, args) >= 0 && fputc('\n', state.file) != EOF &&
                    fflush(state.file) == 0;
    CHECK_SYS(ok, EXIT_WRITE, "%s/run.log", process.output_dir);
}

static void keep_text(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    keep(fmt, ap);
    va_end(ap);
}

/* A full disk behind stdout ends the run; a reader or terminal that went away does not, run.log
 * has it all. */
static void check_stdout(void)
{
    if (fflush(stdout) == 0 && !ferror(stdout))
        return;
    CHECK_SYS(errno != ENOSPC && errno != EDQUOT && errno != EFBIG, EXIT_WRITE, "standard output");
    clearerr(stdout);
}

static bool already_warned(const char *text)
{
    const uint64_t hash = XXH3_64bits(text, strlen(text));
    for (int i = 0; i < state.n_warned; i++)
        if (state.warned[i] == hash)
            return true;
    if (state.n_warned == WARNINGS_MAX) {
        state.suppressed++;
        return true;
    }
    state.warned[state.n_warned++] = hash;
    return false;
}
