/* data_pack.c - see data_pack.h. */
#include "data_pack.h"

#include <stdlib.h>
#include <string.h>
#include "check.h"

struct item {
    int64_t length, pictures, index;
};

static int by_length(const void *a, const void *b)
{
    const struct item *x = a, *y = b;
    if (x->length != y->length)
        return x->length < y->length ? -1 : 1;
    return x->index < y->index ? -1 : x->index > y->index;
}

/* One behind the last of the ascending items that fits into `room` and `frames`, 0 if none does. */
static int64_t fitting(const struct item *item, int64_t n, int64_t room, int64_t frames)
{
    int64_t low = 0;
    while (low < n) {
        const int64_t middle = (low + n) / 2;
        if (item[middle].length <= room)
            low = middle + 1;
        else
            n = middle;
    }
    while (low > 0 && item[low - 1].pictures > frames)
        low--;
    return low;
}

int64_t data_pack(const int64_t *length, const int64_t *pictures, int64_t n, int64_t room,
                  int64_t frames, struct rng_key key, uint64_t stream, uint64_t window,
                  int64_t *first, int64_t *member)
{
    struct item *item = xcalloc((size_t)n + 1, sizeof *item);
    int64_t *begin = xcalloc((size_t)n + 1, sizeof *begin),
            *order = xcalloc((size_t)n + 1, sizeof *order),
            *chosen = xcalloc((size_t)n + 1, sizeof *chosen), packs = 0, at = 0;
    for (int64_t i = 0; i < n; i++) {
        ASSERT(length[i] > 0 && length[i] <= room && pictures[i] <= frames);
        item[i] = (struct item){ length[i], pictures[i], i };
    }
    qsort(item, (size_t)n, sizeof *item, by_length);
    for (int64_t left = n; left > 0; packs++) {
        begin[packs] = at;
        int64_t space = room, unused = frames;
        for (int64_t k; (k = fitting(item, left, space, unused)) > 0; left--) {
            space -= item[k - 1].length;
            unused -= item[k - 1].pictures;
            chosen[at++] = item[k - 1].index;
            memmove(item + k - 1, item + k, (size_t)(left - k) * sizeof *item);
        }
    }
    begin[packs] = at;
    for (int64_t p = 0; p < packs; p++)
        order[p] = p;
    for (int64_t p = packs - 1; p > 0; p--) {
        const uint64_t low = window * (uint64_t)(n + 1) + (uint64_t)p;
        const int64_t q = (int64_t)rng_below(key, stream, low, (uint64_t)p + 1), other = order[q];
        order[q] = order[p];
        order[p] = other;
    }
    at = 0;
    for (int64_t p = 0; p < packs; p++) {
        first[p] = at;
        for (int64_t i = begin[order[p]]; i < begin[order[p] + 1]; i++)
            member[at++] = chosen[i];
    }
    first[packs] = at;
    free(item);
    free(begin);
    free(order);
    free(chosen);
    return packs;
}
