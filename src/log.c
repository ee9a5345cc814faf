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
#include <string.h>
#include <unistd.h>
#include <xxhash.h>
#include "check.h"

enum { WARNINGS_MAX = 20, LINE_MAX_BYTES = 8192 };

static struct {
    FILE *file;
    bool writer;
    uint64_t warned[WARNINGS_MAX]; /* hashes of the texts already given */
    int n_warned;
    long suppressed;
} state;

static struct log_process process = { .iteration = -1, .failing = ATOMIC_FLAG_INIT };

static bool already_warned(const char *text);

struct log_process *log_process(void)
{
    return &process;
}

bool log_open(const char *path, bool writer)
{
    state.writer = writer;
    if (!writer || !path)
        return true;
    state.file = fopen(path, "ae");
    return state.file != NULL;
}

void log_close(void)
{
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
    va_list ap;
    va_start(ap, fmt);
    vprintf(fmt, ap);
    va_end(ap);
    putchar('\n');
    fflush(stdout);
    if (state.file) {
        va_start(ap, fmt);
        vfprintf(state.file, fmt, ap);
        va_end(ap);
        fputc('\n', state.file);
        fflush(state.file);
    }
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
    const ssize_t ignored =
        write(STDERR_FILENO, line, strlen(line)); /* nowhere to tell that stderr is gone */
    (void)ignored;
    if (state.file) {
        fputs(line, state.file);
        fflush(state.file);
    }
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
