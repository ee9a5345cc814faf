/* fault_shim.c - a library for LD_PRELOAD with which check_failures.py puts faults under the
 * program (robustness.md 4.6).
 *
 *   MIMO_FAULT=short      F09: a write of more than 1000 bytes to a file writes 1000 of them
 *   MIMO_FAULT=clock      F37: the time of day jumps a day back and forth from call to call
 *   MIMO_FAULT=memory:N   F12: the program's own Nth allocation fails, and every later one
 *   MIMO_FAULT=power:N    F05: at the Nth write or sync below MIMO_FAULT_DIR the power fails: what
 *                         was written there and not yet synced is undone, renames that no sync of
 *                         their directory followed too, and the process killed
 *
 * One process; threads other than the main one do not write files.
 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <link.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

void *__libc_malloc(size_t n);
void *__libc_calloc(size_t n, size_t size);
void *__libc_realloc(void *p, size_t n);

static bool is(const char *mode, long *n)
{
    const char *fault = getenv("MIMO_FAULT");
    const size_t length = strlen(mode);
    if (!fault || strncmp(fault, mode, length) || (fault[length] && fault[length] != ':'))
        return false;
    if (n)
        *n = fault[length] ? atol(fault + length + 1) : 0;
    return true;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* ---- memory ---- */

static int program_range(struct dl_phdr_info *info, size_t size, void *out)
{
    uintptr_t *range = out;
    for (int i = 0; i < info->dlpi_phnum; i++)
        if (info->dlpi_phdr[i].p_type == PT_LOAD && info->dlpi_phdr[i].p_flags & PF_X) {
            range[0] = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
            range[1] = range[0] + info->dlpi_phdr[i].p_memsz;
        }
    return 1; /* the first is the program */
}

static bool refused(const void *caller)
{
    static uintptr_t range[2];
    static long count;
    static int mode = -1;
    static long n;
    if (mode < 0)
        mode = is("memory", &n);
    if (!mode)
        return false;
    if (!range[0])
        dl_iterate_phdr(program_range, range);
    if ((uintptr_t)caller < range[0] || (uintptr_t)caller >= range[1] || ++count < n)
        return false;
    errno = ENOMEM;
    return true;
}

void *malloc(size_t n)
{
    return refused(__builtin_return_address(0)) ? NULL : __libc_malloc(n);
}
void *calloc(size_t n, size_t size)
{
    return refused(__builtin_return_address(0)) ? NULL : __libc_calloc(n, size);
}
void *realloc(void *p, size_t n)
{
    return refused(__builtin_return_address(0)) ? NULL : __libc_realloc(p, n);
}

/* ---- clock ---- */

static time_t jump(void)
{
    static long calls;
    return is("clock", NULL) ? (calls++ % 3 - 1) * 86400 : 0;
}

time_t time(time_t *out)
{
    const time_t t = REAL(time)(NULL) + jump();
    if (out)
        *out = t;
    return t;
}

int gettimeofday(struct timeval *restrict tv, void *restrict zone)
{
    const int failed = REAL(gettimeofday)(tv, zone);
    tv->tv_sec += jump();
    return failed;
}

int clock_gettime(clockid_t clock, struct timespec *t)
{
    const int failed = REAL(clock_gettime)(clock, t);
    if (clock == CLOCK_REALTIME)
        t->tv_sec += jump();
    return failed;
}

/* ---- files ---- */

struct undo {
    struct undo *before;
    char from[PATH_MAX], to[PATH_MAX]; /* a rename; else a write to `from`: */
    off_t at, size;                    /* and the size of the file before */
    size_t n;
    char old[];
};

static struct undo *last;

static bool below(int fd, char path[PATH_MAX])
{
    char link[64];
    const char *dir = getenv("MIMO_FAULT_DIR");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t n = readlink(link, path, PATH_MAX - 1);
    path[n > 0 ? n : 0] = '\0';
    return dir && strncmp(path, dir, strlen(dir)) == 0;
}

/* Where what a rename replaced is kept until the directory is synced. */
static const char *kept_name(char out[PATH_MAX], const char *path)
{
    if (snprintf(out, PATH_MAX, "%s.fault-undo", path) >= PATH_MAX)
        _exit(96);
    return out;
}

static void power_fails(void)
{
    for (struct undo *u = last; u; u = u->before) {
        if (*u->to) {
            char kept[PATH_MAX];
            REAL(rename)(u->to, u->from);
            REAL(rename)(kept_name(kept, u->to), u->to);
            continue;
        }
        const int fd = open(u->from, O_WRONLY);
        if (fd < 0)
            continue;
        if (REAL(pwrite)(fd, u->old, u->n, u->at) < 0 || ftruncate(fd, u->size) < 0)
            _exit(98);
        close(fd);
    }
    kill(getpid(), SIGKILL);
}

static void count_call(void)
{
    static long calls;
    long n;
    if (is("power", &n) && ++calls == n)
        power_fails();
}

static void remember(int fd, size_t n, off_t at)
{
    char path[PATH_MAX];
    struct stat st;
    if (!is("power", NULL) || !below(fd, path) || fstat(fd, &st) || !S_ISREG(st.st_mode))
        return;
    count_call();
    struct undo *u = __libc_calloc(1, sizeof *u + n);
    if (!u)
        _exit(97);
    snprintf(u->from, sizeof u->from, "%s", path);
    u->at = at;
    u->size = st.st_size;
    const int other = open(path, O_RDONLY);
    const ssize_t got = other >= 0 ? pread(other, u->old, n, at) : 0;
    u->n = got > 0 ? (size_t)got : 0;
    if (other >= 0)
        close(other);
    u->before = last;
    last = u;
}

/* A directory that is synced keeps the names in it, a file what was written to it. */
static void synced(int fd)
{
    char path[PATH_MAX];
    if (!is("power", NULL) || !below(fd, path))
        return;
    const size_t length = strlen(path);
    for (struct undo **u = &last; *u;) {
        const char *slash = strrchr((*u)->to, '/');
        const bool done = *(*u)->to ? slash && (size_t)(slash - (*u)->to) == length &&
                                          strncmp((*u)->to, path, length) == 0
                                    : strcmp((*u)->from, path) == 0;
        char kept[PATH_MAX];
        if (done && *(*u)->to)
            unlink(kept_name(kept, (*u)->to));
        if (done)
            *u = (*u)->before;
        else
            u = &(*u)->before;
    }
    count_call();
}

static size_t cut(int fd, size_t n)
{
    struct stat st;
    return n > 1000 && is("short", NULL) && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) ? 1000 : n;
}

ssize_t pwrite(int fd, const void *data, size_t n, off_t at)
{
    remember(fd, n, at);
    return REAL(pwrite)(fd, data, cut(fd, n), at);
}

ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at)
{
    remember(fd, n, at);
    return REAL(pwrite)(fd, data, cut(fd, n), at);
}

ssize_t write(int fd, const void *data, size_t n)
{
    remember(fd, n, lseek(fd, 0, SEEK_CUR));
    return REAL(write)(fd, data, cut(fd, n));
}

int fsync(int fd)
{
    const int failed = REAL(fsync)(fd);
    if (!failed)
        synced(fd);
    return failed;
}

int fdatasync(int fd)
{
    const int failed = REAL(fdatasync)(fd);
    if (!failed)
        synced(fd);
    return failed;
}

int rename(const char *from, const char *to)
{
    struct undo *u = is("power", NULL) ? __libc_calloc(1, sizeof *u) : NULL;
    if (u && realpath(from, u->from)) {
        char kept[PATH_MAX];
        struct stat st;
        if (lstat(to, &st) == 0 && S_ISREG(st.st_mode) &&
            (unlink(kept_name(kept, to)), link(to, kept)) != 0)
            _exit(95);
        const int failed = REAL(rename)(from, to);
        if (!failed && realpath(to, u->to)) {
            /* What was written under the old name lies under the new one. */
            for (struct undo *w = last; w; w = w->before)
                if (!*w->to && strcmp(w->from, u->from) == 0)
                    snprintf(w->from, sizeof w->from, "%s", u->to);
            u->before = last;
            last = u;
        }
        return failed;
    }
    return REAL(rename)(from, to);
}
