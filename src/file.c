/* file.c - see file.h. */
#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"

char *file_read(const char *path, size_t most, size_t *n, char *why, size_t why_size)
{
    char shown[512];
    struct stat st;
    printable(shown, sizeof shown, path);
    *n = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY); /* a FIFO must not hang */
    if (fd < 0 || fstat(fd, &st) != 0) {
        snprintf(why, why_size, "%s: %s", shown, strerror(errno));
        if (fd >= 0)
            close(fd);
        return NULL;
    }
    char *text = NULL;
    if (!S_ISREG(st.st_mode)) {
        snprintf(why, why_size, "%s: not a regular file", shown);
    } else if ((uintmax_t)st.st_size > most) {
        snprintf(why, why_size, "%s: %jd bytes, more than %zu", shown, (intmax_t)st.st_size, most);
    } else {
        const size_t size = (size_t)st.st_size;
        text = xmalloc(size + 1, 1);
        ssize_t got = 1;
        while (*n < size && got > 0) {
            got = read(fd, text + *n, size - *n);
            if (got > 0)
                *n += (size_t)got;
            else if (got < 0 && errno == EINTR)
                got = 1;
        }
        text[*n] = '\0';
        if (*n < size) {
            snprintf(why, why_size, "%s: %s", shown,
                     got < 0 ? strerror(errno) : "it became shorter while it was read");
            free(text);
            text = NULL;
        }
    }
    close(fd);
    return text;
}
