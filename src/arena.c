/* arena.c - see arena.h. Two passes over the same walk: the first only adds up and records (name,
 * offset, bytes) of every block, the second must ask for the same blocks and gets the addresses. A
 * block's offset depends on the marks and rewinds before it, so a walk that differs in them is
 * caught as well.
 */
#include "arena.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "backend.h"
#include "check.h"
#include "comm.h"

const char *const arena_names[ARENA_COUNT] = {
    [ARENA_PARAMS] = "params",       [ARENA_GRADS] = "grads",
    [ARENA_OPTIMIZER] = "optimizer", [ARENA_ACTIVATIONS] = "activations",
    [ARENA_WORKSPACE] = "workspace", [ARENA_COMM] = "comm",
    [ARENA_DATA] = "data",
};

static size_t block_bytes(const struct arena *a, const char *name, enum dtype dtype, int ndim,
                          const int64_t *shape);
static void record(struct arena *a, const char *name, size_t bytes);

void arenas_init(struct arenas *as)
{
    memset(as, 0, sizeof *as);
    for (int i = 0; i < ARENA_COUNT; i++) {
        as->a[i].name = arena_names[i];
        as->a[i].place = i == ARENA_DATA ? PLACE_HOST : PLACE_DEVICE;
        as->a[i].counting = true;
    }
}

bool arenas_fit(const struct arenas *as, const struct backend_ops *be, struct comm *sharers,
                char *why, size_t why_size)
{
    size_t available, total, wanted = 0;
    char table[512] = "", whose[128] = "this rank needs";
    int used = 0;
    for (int i = 0; i < ARENA_COUNT; i++) {
        if (as->a[i].place != PLACE_DEVICE)
            continue;
        wanted += as->a[i].high;
        used += snprintf(table + used, sizeof table - (size_t)used, "%s%s %.2f", used ? ", " : "",
                         as->a[i].name, (double)as->a[i].high / 0x1p30);
    }
    be->memory(&available, &total);
    int64_t all = (int64_t)wanted, room = available < INT64_MAX ? (int64_t)available : INT64_MAX;
    if (sharers && sharers->size > 1) {
        /* Everybody has looked before anybody goes on to take something. */
        comm_host_reduce_i64(sharers, &all, 1, COMM_SUM);
        comm_host_reduce_i64(sharers, &room, 1, COMM_MIN);
        snprintf(whose, sizeof whose, "the %d ranks on this GPU need %.2f GiB together, this one",
                 sharers->size, (double)all / 0x1p30);
    }
    if (all <= room)
        return true;
    snprintf(why, why_size, "%s %.2f GiB of device memory (%s), %.2f of %.2f are free", whose,
             (double)wanted / 0x1p30, table, (double)room / 0x1p30, (double)total / 0x1p30);
    return false;
}

void arenas_commit(struct arenas *as, const struct backend_ops *be)
{
    struct stream s;
    be->stream_create(&s, "arena");
    for (int i = 0; i < ARENA_COUNT; i++) {
        struct arena *a = &as->a[i];
        ASSERT(a->counting);
        a->counting = false;
        a->capacity = a->high;
        a->used = 0;
        a->next_block = 0;
        if (a->capacity == 0)
            continue;
        if (a->place == PLACE_DEVICE) {
            a->base = be->alloc(a->capacity);
            const struct tensor all =
                tensor_1d(a->base, DTYPE_U8, PLACE_DEVICE, (int64_t)a->capacity);
            be->fill(&s, &all, 0.0);
        } else {
            a->base = be->alloc_host(a->capacity);
            memset(a->base, 0, a->capacity);
        }
    }
    be->stream_sync(&s);
    be->stream_destroy(&s);
}

void arenas_free(struct arenas *as, const struct backend_ops *be)
{
    for (int i = 0; i < ARENA_COUNT; i++) {
        struct arena *a = &as->a[i];
        if (a->base && a->place == PLACE_DEVICE)
            be->release(a->base);
        else if (a->base)
            be->release_host(a->base);
        free(a->block);
    }
    memset(as, 0, sizeof *as);
}

struct tensor arena_tensor(struct arena *a, const char *name, enum dtype dtype, int ndim,
                           const int64_t *shape)
{
    const size_t bytes = block_bytes(a, name, dtype, ndim, shape);
    void *data = NULL;
    if (a->counting) {
        record(a, name, bytes);
    } else {
        if (a->next_block >= a->n_blocks)
            FATAL(EXIT_INTERNAL, "arena %s: block '%s' was not counted (%d blocks were)", a->name,
                  name, a->n_blocks);
        const struct arena_block *b = &a->block[a->next_block++];
        if (strcmp(b->name, name) != 0 || b->bytes != bytes || b->offset != a->used)
            FATAL(EXIT_INTERNAL,
                  "arena %s, block %d: counted '%s' %zu bytes at %zu, "
                  "now asked for '%s' %zu bytes at %zu",
                  a->name, a->next_block - 1, b->name, b->bytes, b->offset, name, bytes, a->used);
        data = a->base ? a->base + a->used : NULL;
    }
    a->used += (bytes + ARENA_ALIGN - 1) / ARENA_ALIGN * ARENA_ALIGN;
    if (a->used > a->high)
        a->high = a->used;
    return tensor_view(data, dtype, a->place, ndim, shape);
}

struct tensor arena_1d(struct arena *a, const char *name, enum dtype dtype, int64_t n)
{
    return arena_tensor(a, name, dtype, 1, &n);
}

struct tensor arena_2d(struct arena *a, const char *name, enum dtype dtype, int64_t rows,
                       int64_t cols)
{
    return arena_tensor(a, name, dtype, 2, (int64_t[]){ rows, cols });
}

size_t arena_mark(const struct arena *a)
{
    return a->used;
}

void arena_rewind(struct arena *a, size_t mark)
{
    ASSERT(mark <= a->used);
    a->used = mark;
}

/* Sizes come from the deck, so a product that does not fit is possible and is an error of the deck,
 * not a wrap-around. */
static size_t block_bytes(const struct arena *a, const char *name, enum dtype dtype, int ndim,
                          const int64_t *shape)
{
    size_t bytes = dtype_bytes(dtype), end;
    for (int d = 0; d < ndim; d++) {
        ASSERT(shape[d] >= 0);
        if (__builtin_mul_overflow(bytes, (size_t)shape[d], &bytes))
            FATAL(EXIT_DECK, "arena %s: block '%s' does not fit into 64 bits", a->name, name);
    }
    if (__builtin_add_overflow(bytes, a->used + ARENA_ALIGN, &end) || end > SIZE_MAX / 2)
        FATAL(EXIT_DECK, "arena %s: block '%s' does not fit into 64 bits", a->name, name);
    return bytes;
}

static void record(struct arena *a, const char *name, size_t bytes)
{
    if (a->n_blocks == a->block_capacity) {
        a->block_capacity = a->block_capacity ? 2 * a->block_capacity : 64;
        a->block = xrealloc(a->block, (size_t)a->block_capacity, sizeof *a->block);
    }
    a->block[a->n_blocks++] =
        (struct arena_block){ .name = name, .offset = a->used, .bytes = bytes };
}
