/* tar_build.h - tar files made byte by byte, whole and hostile, for the tests of shards and data.
 * Fields can be changed through the pointer that tar_header returns, followed by tar_sum.
 */
#ifndef MIMO_TAR_BUILD_H
#define MIMO_TAR_BUILD_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct tar {
    unsigned char *bytes;
    size_t n, capacity;
};

static inline unsigned char *tar_room(struct tar *t, size_t n)
{
    if (t->n + n > t->capacity) {
        t->capacity = 2 * (t->n + n) + 4096;
        t->bytes = realloc(t->bytes, t->capacity);
        if (!t->bytes)
            abort();
    }
    unsigned char *at = t->bytes + t->n;
    memset(at, 0, n);
    t->n += n;
    return at;
}

static inline void tar_sum(unsigned char *h)
{
    unsigned sum = 0;
    memset(h + 148, ' ', 8);
    for (int i = 0; i < 512; i++)
        sum += h[i];
    h[154] = '\0';
    for (int i = 5; i >= 0; i--, sum >>= 3)
        h[148 + i] = (unsigned char)('0' + (sum & 7));
}

/* A ustar header of a plain file; valid until the next call. */
static inline unsigned char *tar_header(struct tar *t, const char *name, char type, size_t size)
{
    unsigned char *h = tar_room(t, 512);
    memcpy(h, name, strlen(name) < 100 ? strlen(name) : 100);
    memcpy(h + 100, "0000644", 7);
    for (int i = 10; i >= 0; i--, size >>= 3)
        h[124 + i] = (unsigned char)('0' + (size & 7));
    memcpy(h + 136, "00000000000", 11);
    h[156] = (unsigned char)type;
    memcpy(h + 257,
           "ustar\0"
           "00",
           8);
    tar_sum(h);
    return h;
}

static inline void tar_data(struct tar *t, const void *data, size_t n)
{
    unsigned char *at = tar_room(t, (n + 511) / 512 * 512);
    if (n > 0)
        memcpy(at, data, n);
}

static inline void tar_add(struct tar *t, const char *name, const void *data, size_t n)
{
    tar_header(t, name, '0', n);
    tar_data(t, data, n);
}

static inline void tar_text(struct tar *t, const char *name, const char *text)
{
    tar_add(t, name, text, strlen(text));
}

static inline void tar_end(struct tar *t)
{
    tar_room(t, 1024);
}

/* Write and forget. */
static inline void tar_write(struct tar *t, const char *path)
{
    FILE *f = fopen(path, "wb");
    if (!f || (t->n > 0 && fwrite(t->bytes, 1, t->n, f) != t->n) || fclose(f) != 0)
        abort();
    free(t->bytes);
    memset(t, 0, sizeof *t);
}

#endif
