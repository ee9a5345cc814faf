/* scratch.h - a directory for the files of a test, made before its tests and removed after them. */
#ifndef MIMO_SCRATCH_H
#define MIMO_SCRATCH_H

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static char dir[64];

/* Its file of that name; good for the next seven calls. */
static inline const char *file(const char *name)
{
    static char path[8][256];
    static int turn;
    char *p = path[turn++ % 8];
    snprintf(p, sizeof path[0], "%s/%s", dir, name);
    return p;
}

static inline int scratch_setup(void **state)
{
    snprintf(dir, sizeof dir, "/tmp/mimo_test_XXXXXX");
    return mkdtemp(dir) ? 0 : -1;
}

static inline int scratch_teardown(void **state)
{
    char command[128];
    snprintf(command, sizeof command, "rm -rf '%s'", dir);
    return system(command);
}

#endif
