/* fuzz.h - what the libFuzzer targets tests/fuzz_*.c share.
 *
 * A target feeds bytes to a reader of foreign data through its public functions and states what
 * must hold for any bytes; the sanitizers look on. `make fuzz` builds and runs them
 * (tests/check_fuzz.py, which also makes the seeds). By hand: build/fuzz/tests/fuzz_deck FILE runs
 * one input.
 */
#ifndef MIMO_FUZZ_H
#define MIMO_FUZZ_H

#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerInitialize(int *argc, char ***argv);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned int seed);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);

/* What must hold for any input. */
#define EXPECT(cond) \
    do { \
        if (!(cond)) { \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #cond); \
            abort(); \
        } \
    } while (0)

static inline void fuzz_abort(int code)
{
    fprintf(stderr, "the program ended the job with %d\n", code);
    abort();
}

/* A failure of the program is a finding, not an end of the process that libFuzzer would not see. */
static inline void fuzz_start(void)
{
    check_on_abort(fuzz_abort);
}

/* One line of text, as it may be printed: no control characters, NUL-terminated within `size`. */
static inline void fuzz_expect_line(const char *text, size_t size)
{
    const size_t n = strnlen(text, size);
    EXPECT(n > 0 && n < size);
    for (size_t i = 0; i < n; i++)
        EXPECT((unsigned char)text[i] >= 0x20 && text[i] != 0x7f);
}

/* Collected mistakes: printable lines, each with the word error. */
static inline void fuzz_expect_errors(const struct errors *errors)
{
    for (int i = 0; i < errors->count; i++) {
        fuzz_expect_line(errors->line[i], 1 << 16);
        EXPECT(strstr(errors->line[i], "error: "));
    }
}

/* The input as a file in memory; one per process, the name is good until the next call. */
static inline const char *fuzz_file(const uint8_t *data, size_t size)
{
    static char path[64];
    static int fd = -1;
    if (fd < 0) {
        fd = memfd_create("fuzz", MFD_CLOEXEC);
        EXPECT(fd >= 0);
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    }
    EXPECT(ftruncate(fd, 0) == 0 && pwrite(fd, data, size, 0) == (ssize_t)size);
    return path;
}

#endif
