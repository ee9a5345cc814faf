/* check.c - the last lines of a run that fails, and memory that cannot be NULL.
 *
 * Several ranks often fail of one cause. The first to create <output_dir>/EXIT (O_EXCL) speaks; one
 * that finds the file already made by another rank of this run ends the job without a word. An EXIT
 * file of an earlier run, present when check_identify was called, does not silence anybody. No
 * memory is allocated on the way out, and no collective call made.
 *
 * A crash takes the same way from its signal handler, on a stack of its own. What it calls is not
 * all promised to work there, so an alarm ends the process should it hang, and a second crash ends
 * it at once.
 */
#include "check.h"
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include "log.h"

/* A checkpoint of another model has a line for every tensor. */
enum {
    TEXT_MAX = 2048,
    ERRORS_SHOWN = 20,
    TENSORS_SHOWN = 100,
    CRASH_STACK = 256 << 10,
    CRASH_FRAMES = 64,
    CRASH_SECONDS = 10
};

static _Noreturn void end_job(enum exit_code code, const char *file, int line, const char *hint,
                              const char *text);
static bool claim_exit_file(enum exit_code code, const char *text);
static void exit_mark(const struct log_process *p, long mark[4]);
static size_t total_bytes(size_t count, size_t size);

void fatal(enum exit_code code, const char *file, int line, const char *hint, const char *fmt, ...)
{
    char text[TEXT_MAX];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    end_job(code, file, line, hint, text);
}

void fatal_sys(enum exit_code code, const char *file, int line, const char *fmt, ...)
{
    const int error = errno;
    char text[TEXT_MAX];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    const size_t used = strlen(text);
    if (used < sizeof text)
        snprintf(text + used, sizeof text - used, ": %s", strerror(error));
    end_job(code, file, line, NULL, text);
}

void check_identify(int rank, int size, const char *role, const char *output_dir)
{
    struct log_process *p = log_process();
    p->rank = rank;
    p->size = size;
    snprintf(p->role, sizeof p->role, "%s", role ? role : "");
    snprintf(p->output_dir, sizeof p->output_dir, "%s", output_dir ? output_dir : "");
    if (gethostname(p->host, sizeof p->host) != 0)
        snprintf(p->host, sizeof p->host, "unknown");
    p->host[sizeof p->host - 1] = '\0';
    exit_mark(p, p->exit_mark);
}

void check_step(long iteration)
{
    log_process()->iteration = iteration;
}

void check_on_abort(void (*abort_job)(int code))
{
    log_process()->abort_job = abort_job;
}

static const struct {
    int number;
    const char *name, *hint;
} crashes[] = {
    { SIGSEGV, "SIGSEGV", NULL },
    { SIGBUS, "SIGBUS",
      "a full /dev/shm or disk behind mapped memory, or a file that became shorter, is the usual cause" },
    { SIGFPE, "SIGFPE", NULL },
    { SIGILL, "SIGILL",
      "was the program built for another processor? make clean, then make on this one, or another ARCH in Makefile.inc" },
    { SIGABRT, "SIGABRT", NULL },
};

/* The backtrace of this thread; the name of its file, or why there is none. */
static const char *write_backtrace(const struct log_process *p, char *path, size_t size)
{
    void *frame[CRASH_FRAMES];
    if (!*p->output_dir)
        return "there was no run directory for a backtrace yet";
    snprintf(path, size, "%s/CRASH.%d", p->output_dir, p->rank);
    unlink(path);
    const int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666);
    if (fd < 0)
        return "the backtrace could not be written";
    backtrace_symbols_fd(frame, backtrace(frame, CRASH_FRAMES), fd);
    close(fd);
    return path;
}

static void crashed(int number)
{
    char path[sizeof log_process()->output_dir + 32];
    alarm(CRASH_SECONDS);
    const char *where = write_backtrace(log_process(), path, sizeof path);
    for (size_t i = 0; i < sizeof crashes / sizeof *crashes; i++)
        if (crashes[i].number == number)
            fatal(EXIT_INTERNAL, __FILE__, __LINE__, crashes[i].hint, "crashed by %s; %s%s",
                  crashes[i].name, where, where == path ? " has the backtrace" : "");
}

void check_catch_crashes(void)
{
    stack_t own = { .ss_size = CRASH_STACK };
    struct sigaction a;
    void *frame;
    if (dlsym(RTLD_DEFAULT, "__asan_init"))
        return;
    backtrace(&frame, 1); /* loads a library, which must not happen in the handler */
    own.ss_sp = log_process()->crash_stack = xmalloc(CRASH_STACK, 1);
    memset(&a, 0, sizeof a);
    a.sa_handler = crashed;
    a.sa_flags = SA_RESETHAND | SA_NODEFER | (sigaltstack(&own, NULL) == 0 ? SA_ONSTACK : 0);
    sigemptyset(&a.sa_mask);
    signal(SIGALRM, SIG_DFL);
    for (size_t i = 0; i < sizeof crashes / sizeof *crashes; i++)
        sigaction(crashes[i].number, &a, NULL);
}

void errors_add(struct errors *e, enum exit_code code, const char *fmt, ...)
{
    char raw[TEXT_MAX], text[4 * TEXT_MAX];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(raw, sizeof raw, fmt, ap);
    va_end(ap);
    if (e->count == e->capacity) {
        e->capacity = e->capacity ? 2 * e->capacity : 16;
        e->line = xrealloc(e->line, (size_t)e->capacity, sizeof *e->line);
    }
    if (e->count == 0)
        e->worst = code;
    e->line[e->count++] = xstrdup(printable(text, sizeof text, raw));
}

static bool said_before(const struct errors *e, int line)
{
    for (int i = 0; i < line; i++)
        if (strcmp(e->line[i], e->line[line]) == 0)
            return true;
    return false;
}

void errors_print(const struct errors *e)
{
    const int most = e->worst == EXIT_CHECKPOINT ? TENSORS_SHOWN : ERRORS_SHOWN;
    int shown = 0, more = 0;
    log_clear_progress();
    for (int i = 0; i < e->count; i++) {
        if (said_before(e, i))
            continue;
        if (shown < most)
            fprintf(stderr, "%s\n", e->line[i]);
        *(shown < most ? &shown : &more) += 1;
    }
    if (more > 0)
        fprintf(stderr, "... and %d more\n", more);
    fflush(stderr);
}

void errors_free(struct errors *e)
{
    for (int i = 0; i < e->count; i++)
        free(e->line[i]);
    free(e->line);
    memset(e, 0, sizeof *e);
}

void *xmalloc(size_t count, size_t size)
{
    const size_t bytes = total_bytes(count, size);
    void *p = malloc(bytes);
    if (!p)
        FATAL(EXIT_ENVIRONMENT, "out of memory: %zu bytes", bytes);
    return p;
}

void *xcalloc(size_t count, size_t size)
{
    void *p = calloc(1, total_bytes(count, size));
    if (!p)
        FATAL(EXIT_ENVIRONMENT, "out of memory: %zu times %zu bytes", count, size);
    return p;
}

void *xrealloc(void *old, size_t count, size_t size)
{
    const size_t bytes = total_bytes(count, size);
    void *p = realloc(old, bytes);
    if (!p)
        FATAL(EXIT_ENVIRONMENT, "out of memory: %zu bytes", bytes);
    return p;
}

char *xstrdup(const char *s)
{
    const size_t bytes = strlen(s) + 1;
    return memcpy(xmalloc(bytes, 1), s, bytes);
}

char *xasprintf(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    const int length = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    ASSERT(length >= 0);
    char *text = xmalloc((size_t)length + 1, 1);
    va_start(ap, fmt);
    vsnprintf(text, (size_t)length + 1, fmt, ap);
    va_end(ap);
    return text;
}

const char *printable(char *out, size_t size, const char *text)
{
    static const char hex[] = "0123456789abcdef";
    size_t n = 0;
    ASSERT(size > 0);
    for (; *text; text++) {
        const unsigned char c = (unsigned char)*text;
        const bool control = c < 0x20 || c == 0x7f;
        if (n + (control ? 4 : 1) >= size)
            break;
        if (control) {
            out[n++] = '\\';
            out[n++] = 'x';
            out[n++] = hex[c >> 4];
            out[n++] = hex[c & 15];
        } else {
            out[n++] = (char)c;
        }
    }
    out[n] = '\0';
    return out;
}

static _Noreturn void end_job(enum exit_code code, const char *file, int line, const char *hint,
                              const char *text)
{
    struct log_process *p = log_process();
    if (atomic_flag_test_and_set(&p->failing)) {
        /* Another thread is on its way out, or this one failed while failing: give the former time,
         * then end. */
        nanosleep(&(struct timespec){ .tv_sec = 5 }, NULL);
        _exit(code);
    }
    char clean[2 * TEXT_MAX], out[4 * TEXT_MAX];
    log_clear_progress();
    printable(clean, sizeof clean, text);
    if (claim_exit_file(code, clean)) {
        const char *base = strrchr(file, '/');
        size_t n = 0;
#define PUT(...) \
    (n += (size_t)snprintf(out + n, sizeof out - n, __VA_ARGS__), \
     n = n < sizeof out ? n : sizeof out - 1)
        PUT("mimo: error: ");
        if (p->size > 0)
            PUT("[rank %d%s%s %s] ", p->rank, *p->role ? " " : "", p->role, p->host);
        if (p->iteration >= 0)
            PUT("iteration %ld: ", p->iteration);
        PUT("%s (%s:%d)\n", clean, base ? base + 1 : file, line);
        if (hint)
            PUT("mimo: hint: %s\n", hint);
#undef PUT
        const ssize_t ignored = write(STDERR_FILENO, out, n);
        (void)ignored;
        /* A launcher that is told to end the job may do so before it has read this rank's pipe. */
        for (int i = 0, waiting = 0;
             i < 100 && ioctl(STDERR_FILENO, FIONREAD, &waiting) == 0 && waiting > 0; i++)
            nanosleep(&(struct timespec){ .tv_nsec = 10000000 }, NULL);
        nanosleep(&(struct timespec){ .tv_nsec = 100000000 }, NULL);
    } else {
        /* Aborting at once could end the other rank before its line is out. */
        nanosleep(&(struct timespec){ .tv_sec = 2 }, NULL);
    }
    if (p->abort_job)
        p->abort_job(code);
    _exit(code);
}

/* Write `code rank role iteration text` unless another rank of this run was first; true when this
 * rank may speak. */
static bool claim_exit_file(enum exit_code code, const char *text)
{
    struct log_process *p = log_process();
    char path[sizeof p->output_dir + 8], line[2 * TEXT_MAX + 128];
    if (!*p->output_dir)
        return true;
    snprintf(path, sizeof path, "%s/EXIT", p->output_dir);
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0 && errno == EEXIST) {
        long now[4];
        exit_mark(p, now);
        if (memcmp(now, p->exit_mark, sizeof now) != 0)
            return false;
        fd = open(path, O_WRONLY | O_TRUNC | O_CLOEXEC);
    }
    if (fd < 0)
        return true;
    snprintf(line, sizeof line, "%d %d %s %ld %s\n", (int)code, p->rank, *p->role ? p->role : "-",
             p->iteration, text);
    const ssize_t length = (ssize_t)strlen(line);
    if (write(fd, line, (size_t)length) != length) {
        /* The disk is full: the room that the watchdog's file has is of no more use. If that does
         * not help, the message on stderr must not be hidden. */
        snprintf(path, sizeof path, "%s/LIVE", p->output_dir);
        const bool again = unlink(path) == 0 && pwrite(fd, line, (size_t)length, 0) == length;
        (void)again;
    }
    close(fd);
    return true;
}

/* What tells one EXIT file from another; zeros when there is none. */
static void exit_mark(const struct log_process *p, long mark[4])
{
    char path[sizeof p->output_dir + 8];
    struct stat st;
    memset(mark, 0, 4 * sizeof *mark);
    if (!*p->output_dir)
        return;
    snprintf(path, sizeof path, "%s/EXIT", p->output_dir);
    if (stat(path, &st) == 0) {
        mark[0] = 1;
        mark[1] = (long)st.st_ino;
        mark[2] = (long)st.st_mtim.tv_sec;
        mark[3] = st.st_mtim.tv_nsec;
    }
}

static size_t total_bytes(size_t count, size_t size)
{
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes))
        FATAL(EXIT_ENVIRONMENT, "out of memory: %zu times %zu bytes", count, size);
    return bytes ? bytes : 1;
}
