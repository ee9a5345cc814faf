/* path_hint.h - what to say about a path that does not exist: what was probably meant. */
#ifndef MIMO_PATH_HINT_H
#define MIMO_PATH_HINT_H

#include <stddef.h>

/* "; did you mean <path>?" when each part of `path` that is missing has a neighbour with nearly its
 * name; else " (run `make data`)" below data/; else "; there is no directory <part>" when one is
 * missing; else "". Writes at most size bytes into out, printable, and returns out. Local. */
const char *path_hint(const char *path, char *out, size_t size);

#endif
