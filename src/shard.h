/* shard.h - tar shards: which files a path names, which samples they hold, and their bytes.
 *
 * A shard is a plain POSIX tar (ustar, pax or GNU long names). Only headers are read at start;
 * members are byte ranges and are never extracted. A sample is a run of consecutive members whose
 * names agree up to the first dot of the base name; the text after that dot is the name of the
 * part. Samples are numbered in the order stored, shards in the order of their names.
 */
#ifndef MIMO_SHARD_H
#define MIMO_SHARD_H

#include <stdbool.h>
#include <stdint.h>
#include <time.h>
#include "check.h"

enum { SHARD_FILES = 16, SHARD_NAME_MAX = 255, SHARD_PARTS_MAX = 1024 }; /* parts of a sample */

struct shard_part {
    int64_t offset, size;
    size_t name;
}; /* bytes inside the tar; name in the pool */
struct shard_sample {
    int64_t first_part;
    size_t key; /* in the pool */
    int32_t shard, n_parts;
    const char *broken; /* why it cannot be used, or NULL (a literal) */
};
struct shard_file {
    char *path;
    int64_t bytes;
    struct timespec changed; /* as it was indexed */
};

struct shard_set {
    struct shard_file *shard;    /* [n_shards] */
    struct shard_sample *sample; /* [n_samples] */
    struct shard_part *part;     /* [n_parts] */
    char *pool;                  /* names, NUL-terminated */
    int64_t n_shards, n_samples, n_parts, sample_capacity, part_capacity;
    size_t pool_used, pool_capacity;
    int64_t ignored; /* members that belong to no sample */
    struct {
        int fd;
        int64_t shard;
    } open[SHARD_FILES]; /* shard = -1: free */
    int next_open;
};

/* Find and index the shards of `path` (a tar, a directory of tars, or a name with {000..123}). What
 * is missing, unreadable, compressed, damaged or hostile is collected with EXIT_DATA; `where`
 * begins the lines about the path itself. Local. */
void shard_init(struct shard_set *set, const char *path, const char *where, struct errors *errors);
/* "file.tar:key", printable, at most size bytes. Local. */
const char *shard_key(const struct shard_set *set, int64_t sample, char *out, size_t size);
const struct shard_part *shard_parts(const struct shard_set *set,
                                     int64_t sample); /* [n_parts]. Local. */
const char *shard_part_name(const struct shard_set *set,
                            const struct shard_part *part); /* Local. */
/* All bytes of a part into *buffer, which grows (xrealloc) and is followed by a NUL. False with
 * `why` for a part of more than `most` bytes. A read error, and a shard that changed since
 * shard_init, end the job with EXIT_DATA: they are no property of the sample that every rank sees.
 * Local. */
bool shard_read(struct shard_set *set, int64_t sample, const struct shard_part *part, int64_t most,
                unsigned char **buffer, int64_t *capacity, char *why, size_t why_size);
void shard_free(struct shard_set *set);

#endif
