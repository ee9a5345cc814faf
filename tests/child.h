/* child.h - what may end the process runs in a child of the test's. */
#ifndef MIMO_CHILD_H
#define MIMO_CHILD_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <cmocka.h>
#include <sys/wait.h>
#include <unistd.h>

/* Runs body(arg) in a child and returns its exit status, 0 when body returns, 128 + n when signal n
 * ended it. What it wrote to stderr: the first bytes in said (NULL: not wanted). */
static inline int child_run(void (*body)(void *), void *arg, char *said, size_t size)
{
    int end[2], status = 0;
    char more[512];
    size_t n = 0;
    assert_int_equal(pipe(end), 0);
    fflush(NULL);
    const pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        close(end[0]);
        dup2(end[1], STDERR_FILENO);
        body(arg);
        _exit(0);
    }
    close(end[1]);
    for (ssize_t got; (got = read(end[0], more, sizeof more)) > 0;)
        for (ssize_t i = 0; i < got && said && n + 1 < size; i++)
            said[n++] = more[i];
    if (said)
        said[n] = '\0';
    close(end[0]);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

#endif
