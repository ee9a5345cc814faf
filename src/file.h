/* file.h - small foreign text files (tokenizers, configurations, indexes) read whole. */
#ifndef MIMO_FILE_H
#define MIMO_FILE_H

#include <stddef.h>
#include <stdint.h>

/* The file's bytes and a NUL behind them, owned by the caller; *n without the NUL. NULL with `why`,
 * which names the file, when it is no regular file, larger than `most` bytes or not readable.
 * Symbolic links are followed: download caches consist of them. Local. */
char *file_read(const char *path, size_t most, size_t *n, char *why, size_t why_size);

#endif
