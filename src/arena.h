/* arena.h - named blocks of memory: count, allocate once, carve.
 *
 * A walk over the program's objects asks for blocks; in the counting pass it gets views with data =
 * NULL and the arena adds up; arena_commit allocates that many bytes; the same walk then gets the
 * real pointers. The two walks must ask for the same blocks in the same order (checked by block
 * number, name and size). Nothing is allocated inside a step. Temporaries use mark/rewind: blocks
 * after a mark are given back for reuse, `high` remembers the largest extent.
 */
#ifndef MIMO_ARENA_H
#define MIMO_ARENA_H

#include <stdbool.h>
#include "tensor.h"

struct backend_ops;
struct comm;

enum arena_kind {
    ARENA_PARAMS,
    ARENA_GRADS,
    ARENA_OPTIMIZER,
    ARENA_ACTIVATIONS,
    ARENA_WORKSPACE,
    ARENA_COMM,
    ARENA_DATA,
    ARENA_COUNT
};
extern const char *const arena_names[ARENA_COUNT];

enum { ARENA_ALIGN = 256 }; /* bytes; every block starts on this boundary */

struct arena_block {
    const char *name;
    size_t offset, bytes;
};

struct arena {
    const char *name;
    enum place place;
    bool counting;
    char *base;
    size_t used, high, capacity;
    struct arena_block *block; /* [n_blocks] as counted, for the memory table */
    int n_blocks, block_capacity, next_block;
};

struct arenas {
    struct arena a[ARENA_COUNT];
};

/* Start the counting pass. Local. */
void arenas_init(struct arenas *as);
/* Whether what was counted fits into what is free of the device, together with what the others of
 * `sharers`, the ranks on this device (NULL: this one alone), have counted; else one sentence with
 * the table in why. Before anybody's arenas_commit. Collective over sharers. */
bool arenas_fit(const struct arenas *as, const struct backend_ops *be, struct comm *sharers,
                char *why, size_t why_size);
/* Allocate what was counted through the backend's allocator, zero it, and start the carving pass.
 * Local. */
void arenas_commit(struct arenas *as, const struct backend_ops *be);
void arenas_free(struct arenas *as, const struct backend_ops *be);

/* One block. `name` must outlive the arena (a literal or a parameter's name). Local. */
struct tensor arena_tensor(struct arena *a, const char *name, enum dtype dtype, int ndim,
                           const int64_t *shape);
struct tensor arena_1d(struct arena *a, const char *name, enum dtype dtype, int64_t n);
struct tensor arena_2d(struct arena *a, const char *name, enum dtype dtype, int64_t rows,
                       int64_t cols);
size_t arena_mark(const struct arena *a);
void arena_rewind(struct arena *a, size_t mark);

#endif
