/* check.h - how this program fails.
 *
 * Two kinds of trouble, kept apart:
 *   - internal and system failures (a library call failed, an invariant broke): CHECK, CHECK_SYS
 *     and fatal() print ONE line - program, rank, role, host, step, file:line, what - write it to
 *     <output_dir>/EXIT and end the whole job at once. No collective call is made on the way out,
 *     because the other ranks may be waiting inside one.
 *   - mistakes of the user (deck, ranks, data, checkpoint): collected in a struct errors, printed
 *     by one rank, and the program ends on all ranks with the status of the worst class.
 * ASSERT is ours: no side effects inside, compiled in release too, not used inside ref/ inner
 * loops.
 */
#ifndef MIMO_CHECK_H
#define MIMO_CHECK_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>

enum exit_code {
    EXIT_OK = 0,
    EXIT_INTERNAL = 1,
    EXIT_DECK = 2,
    EXIT_ENVIRONMENT = 3,
    EXIT_DATA = 4,
    EXIT_CHECKPOINT = 5,
    EXIT_WRITE = 6,
    EXIT_NUMERICS = 7,
    EXIT_RANK_DIED = 8,
    EXIT_STOPPED = 75
};

/* Print one error line (and a hint line unless hint is NULL) and end the job with `code`. Local;
 * does not return. */
_Noreturn void fatal(enum exit_code code, const char *file, int line, const char *hint,
                     const char *fmt, ...) __attribute__((format(printf, 5, 6)));

#define FATAL(code, ...) fatal(code, __FILE__, __LINE__, NULL, __VA_ARGS__)
#define ASSERT(cond) \
    ((cond) ? (void)0 \
            : fatal(EXIT_INTERNAL, __FILE__, __LINE__, NULL, "assertion failed: %s", #cond))
/* A call into the C library or the system that must be true/non-negative; appends strerror(errno).
 * Local; does not return. */
#define CHECK_SYS(ok, code, ...) ((ok) ? (void)0 : fatal_sys(code, __FILE__, __LINE__, __VA_ARGS__))
_Noreturn void fatal_sys(enum exit_code code, const char *file, int line, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

/* What the failure line says about this process. Set once by main; before that the line says less.
 * Local. */
void check_identify(int rank, int size, const char *role, const char *output_dir);
/* The iteration that the failure line names. Local. */
void check_step(long iteration);
/* How to end the job (main installs a function that calls MPI_Abort); the default ends the process.
 * Local. */
void check_on_abort(void (*abort_job)(int code));

/* From here on a crash (SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT) is a failure like others: one
 * line, EXIT_INTERNAL, and the backtrace in <output_dir>/CRASH.<rank>. Not under AddressSanitizer,
 * which has its own. Local. */
void check_catch_crashes(void);

/* Collected mistakes of the user: one line each, in the order found; `worst` is the exit status. */
struct errors {
    char **line; /* [count], owned */
    int count, capacity;
    enum exit_code worst; /* of the first error added */
};
/* Add one line (printf). Local. */
void errors_add(struct errors *e, enum exit_code code, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* Print at most 20 lines (100 of EXIT_CHECKPOINT) to stderr, each once, then a count; call on one
 * rank. Local. */
void errors_print(const struct errors *e);
void errors_free(struct errors *e);

/* malloc family that cannot return NULL (ends the job with EXIT_ENVIRONMENT) and checks count*size.
 * Local. */
void *xmalloc(size_t count, size_t size) __attribute__((returns_nonnull));
void *xcalloc(size_t count, size_t size) __attribute__((returns_nonnull));
void *xrealloc(void *p, size_t count, size_t size) __attribute__((returns_nonnull));
char *xstrdup(const char *s) __attribute__((returns_nonnull));
char *xasprintf(const char *fmt, ...) __attribute__((format(printf, 1, 2), returns_nonnull));

/* Text made safe to print: control characters become \xNN. Writes at most size bytes into out,
 * returns out. Local. */
const char *printable(char *out, size_t size, const char *text);

#endif
