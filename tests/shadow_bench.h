/* shadow_bench.h - tensors for calls of single operations of a shadow table, on any primary: what
 * tests/shadow_cases.h is written with.
 *
 * A tensor is an output until it is filled: all bytes 0xFF, a NaN as a number and -1 as an index,
 * like the guards around it and the gaps between its rows. An operation runs twice on the same
 * memory; inputs, guards and gaps must not change, and the second run must leave the same bits.
 * What the numbers should be is the shadow's matter: it ends the process.
 */
#ifndef MIMO_SHADOW_BENCH_H
#define MIMO_SHADOW_BENCH_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "backend_list.h"
#include "bf16.h"
#include "check.h"

enum bench_kind { BENCH_TINY, BENCH_RAGGED, BENCH_PRIME, BENCH_PRODUCTION, BENCH_KINDS };
static const char *const bench_kind_name[] = { "tiny", "ragged", "prime", "production" };

struct bench_tensor {
    struct tensor t;             /* on the device */
    bool written;                /* by the operation */
    size_t bytes, begin;         /* of the allocation; of the first element in it */
    unsigned char *image, *left; /* before the operation, and what its first run left; host */
    struct bench_tensor *next;
};

struct bench {
    /* the shadow; a table that is not broken, for the same memory */
    const struct backend_ops *be, *plain;
    struct stream *stream, *side; /* theirs */
    enum bench_kind kind;
    enum dtype act, acc;
    /* elements after each row of a matrix and before the first */
    int pad, offset;
    uint64_t random;
    int round;
    struct bench_tensor *list;
    /* temporaries of operations, released with the tensors */
    void *work[4];
    int works;
    char trouble[300]; /* what was found, or "" */
};

static inline uint64_t bench_random(struct bench *b)
{
    uint64_t z = (b->random += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

/* ---- tensors ---- */

static inline struct bench_tensor *bench_make(struct bench *b, enum dtype dtype, int ndim,
                                              const int64_t *shape, bool gaps)
{
    enum { GUARD = 256 };
    struct bench_tensor *n = xcalloc(1, sizeof *n);
    const size_t width = dtype_bytes(dtype);
    n->t = tensor_view(NULL, dtype, PLACE_DEVICE, ndim, shape);
    n->t.ld += gaps ? b->pad : 0;
    n->begin = GUARD + (gaps ? (size_t)b->offset * width : 0);
    n->bytes = n->begin + (size_t)(tensor_rows(&n->t) * n->t.ld) * width + GUARD;
    n->image = xmalloc(n->bytes, 1);
    memset(n->image, 0xFF, n->bytes);
    n->t.data = (char *)b->plain->alloc(n->bytes) + n->begin;
    n->written = true;
    n->next = b->list;
    b->list = n;
    return n;
}

static inline struct bench_tensor *bench_matrix(struct bench *b, enum dtype dtype, int64_t rows,
                                                int64_t cols)
{
    return bench_make(b, dtype, 2, (int64_t[]){ rows, cols }, true);
}

static inline struct bench_tensor *bench_dense(struct bench *b, enum dtype dtype, int64_t rows,
                                               int64_t cols)
{
    return bench_make(b, dtype, 2, (int64_t[]){ rows, cols }, false);
}

static inline struct bench_tensor *bench_vector(struct bench *b, enum dtype dtype, int64_t n)
{
    return bench_make(b, dtype, 1, &n, false);
}

static inline void bench_store(struct bench_tensor *t, int64_t r, int64_t c, double x)
{
    unsigned char *p = t->image + t->begin;
    const int64_t i = r * t->t.ld + c;
    switch (t->t.dtype) {
    case DTYPE_F32: ((float *)(void *)p)[i] = (float)x; break;
    case DTYPE_F64: ((double *)(void *)p)[i] = x; break;
    case DTYPE_BF16: ((uint16_t *)(void *)p)[i] = bf16_from_double(x); break;
    case DTYPE_I32: ((int32_t *)(void *)p)[i] = (int32_t)x; break;
    case DTYPE_I64: ((int64_t *)(void *)p)[i] = (int64_t)x; break;
    case DTYPE_U8: p[i] = (uint8_t)x; break;
    }
}

/* A million numbers or so are drawn, in rows of their own; a larger matrix repeats them. */
static inline void bench_draw(struct bench *b, struct bench_tensor *t,
                              double (*one)(struct bench *b, double p, double q), double p,
                              double q)
{
    const int64_t rows = tensor_rows(&t->t), cols = tensor_cols(&t->t),
                  most = 1 + (1 << 20) / (cols + 1);
    const size_t width = dtype_bytes(t->t.dtype), line = (size_t)t->t.ld * width;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++)
            if (r < most)
                bench_store(t, r, c, one(b, p, q));
            else {
                memcpy(t->image + t->begin + (size_t)r * line,
                       t->image + t->begin + (size_t)(r % most) * line, (size_t)cols * width);
                break;
            }
    t->written = false;
}

static inline double bench_one_uniform(struct bench *b, double low, double high)
{
    return (float)(low + (high - low) * (double)(bench_random(b) >> 40) / 16777216.0);
}

/* The sum of four uniform numbers. */
static inline double bench_one_normal(struct bench *b, double sigma, double unused)
{
    const uint64_t u = bench_random(b);
    const double sum = (double)(u & 0xffff) + (double)(u >> 16 & 0xffff) +
                       (double)(u >> 32 & 0xffff) + (double)(u >> 48);
    return (float)((sum - 131070) * sigma * 1.7320508 / 65536.0);
}

static inline double bench_one_integer(struct bench *b, double low, double high)
{
    return low + (double)(bench_random(b) % (uint64_t)(high - low));
}

/* Filled matrices and vectors. */
static inline struct bench_tensor *bench_normal(struct bench *b, struct bench_tensor *t,
                                                double sigma)
{
    bench_draw(b, t, bench_one_normal, sigma, 0);
    return t;
}

static inline struct bench_tensor *bench_uniform(struct bench *b, struct bench_tensor *t,
                                                 double low, double high)
{
    bench_draw(b, t, bench_one_uniform, low, high);
    return t;
}

/* low..high-1 */
static inline struct bench_tensor *bench_integers(struct bench *b, struct bench_tensor *t,
                                                  int64_t low, int64_t high)
{
    bench_draw(b, t, bench_one_integer, (double)low, (double)high);
    return t;
}

/* Filled, and the operation changes it. */
static inline struct bench_tensor *bench_inout(struct bench_tensor *t)
{
    t->written = true;
    return t;
}

/* Temporary memory of an operation; what it leaves there is nobody's. */
static inline struct tensor bench_work(struct bench *b, enum dtype dtype, int64_t n)
{
    b->work[b->works] = b->plain->alloc((size_t)(n + 1) * dtype_bytes(dtype));
    return tensor_1d(b->work[b->works++], dtype, PLACE_DEVICE, n);
}

/* ---- running ---- */

static inline void bench_move(struct bench *b, const struct bench_tensor *t, unsigned char *host,
                              bool up)
{
    const struct tensor dev = tensor_1d((char *)t->t.data - t->begin, DTYPE_U8, PLACE_DEVICE,
                                        (int64_t)t->bytes),
                        mem = tensor_1d(host, DTYPE_U8, PLACE_HOST, (int64_t)t->bytes);
    b->plain->copy(b->side, up ? &mem : &dev, up ? &dev : &mem);
    b->plain->stream_sync(b->side);
}

static inline bool bench_inside(const struct bench_tensor *t, size_t byte)
{
    const size_t width = dtype_bytes(t->t.dtype), row = (size_t)t->t.ld * width;
    return byte >= t->begin && byte < t->begin + (size_t)tensor_rows(&t->t) * row &&
           (byte - t->begin) % row < (size_t)tensor_cols(&t->t) * width;
}

static inline void bench_look(struct bench *b, struct bench_tensor *t)
{
    unsigned char *now = xmalloc(t->bytes, 1);
    bench_move(b, t, now, false);
    if (memcmp(now, t->image, t->bytes) != 0 && b->round == 1)
        for (size_t i = 0; i < t->bytes; i++)
            if (now[i] != t->image[i] && !(t->written && bench_inside(t, i))) {
                snprintf(b->trouble, sizeof b->trouble,
                         "byte %lld from the start of %s of %lld x %lld %s was written",
                         (long long)i - (long long)t->begin,
                         t->written ? "an output (outside the view)" : "an input",
                         (long long)tensor_rows(&t->t), (long long)tensor_cols(&t->t),
                         dtype_name(t->t.dtype));
                break;
            }
    if (b->round == 2 && memcmp(now, t->left, t->bytes) != 0)
        snprintf(b->trouble, sizeof b->trouble, "the second run left other bits in %lld x %lld %s",
                 (long long)tensor_rows(&t->t), (long long)tensor_cols(&t->t),
                 dtype_name(t->t.dtype));
    free(t->left);
    t->left = now;
}

#define BENCH_RUN(b) for ((b)->round = 0; bench_again(b);)
static inline bool bench_again(struct bench *b)
{
    if (b->round > 0) {
        b->be->stream_sync(b->stream);
        for (struct bench_tensor *t = b->list; t; t = t->next)
            bench_look(b, t);
    }
    for (struct bench_tensor *t = b->list; t && b->round < 2; t = t->next)
        bench_move(b, t, t->image, true);
    return b->round++ < 2;
}

static inline void bench_free(struct bench *b)
{
    while (b->list) {
        struct bench_tensor *t = b->list;
        b->list = t->next;
        b->plain->release((char *)t->t.data - t->begin);
        free(t->image);
        free(t->left);
        free(t);
    }
    while (b->works > 0)
        b->plain->release(b->work[--b->works]);
}

/* ---- what cases are written with ---- */

/* tiny, ragged, prime, production */
#define BY_KIND(b, t, r, p, l) ((const int64_t[]){ t, r, p, l }[(b)->kind])
#define ROWS(b) BY_KIND(b, 2, 37, 131, 4096)
#define COLS(b) BY_KIND(b, 4, 100, 257, 2688)

/* Activations and accumulated numbers. */
static inline struct bench_tensor *act(struct bench *b, int64_t rows, int64_t cols)
{
    return bench_normal(b, bench_matrix(b, b->act, rows, cols), 1);
}
static inline struct bench_tensor *acc(struct bench *b, int64_t rows, int64_t cols)
{
    return bench_normal(b, bench_matrix(b, b->acc, rows, cols), 1);
}
static inline struct bench_tensor *act_vector(struct bench *b, int64_t n)
{
    return bench_uniform(b, bench_vector(b, b->act, n), 0.5, 1.5);
}
static inline struct bench_tensor *acc_vector(struct bench *b, int64_t n)
{
    return bench_normal(b, bench_vector(b, b->acc, n), 1);
}
/* Outputs, and what is added to. */
static inline struct bench_tensor *out_act(struct bench *b, int64_t rows, int64_t cols)
{
    return bench_matrix(b, b->act, rows, cols);
}
static inline struct bench_tensor *out_acc(struct bench *b, int64_t rows, int64_t cols)
{
    return bench_matrix(b, b->acc, rows, cols);
}
static inline struct bench_tensor *out_vector(struct bench *b, int64_t n)
{
    return bench_vector(b, b->acc, n);
}
static inline struct bench_tensor *sum_vector(struct bench *b, int64_t n)
{
    return bench_inout(acc_vector(b, n));
}
static inline struct bench_tensor *sum_matrix(struct bench *b, int64_t rows, int64_t cols)
{
    return bench_inout(acc(b, rows, cols));
}
static inline struct bench_tensor *index_vector(struct bench *b, int64_t n, int64_t low,
                                                int64_t high)
{
    return bench_integers(b, bench_vector(b, DTYPE_I32, n), low, high);
}

#define CASE(op) static inline void case_##op(struct bench *b)
#define CALL(op, ...) BENCH_RUN(b) b->be->op(b->stream, __VA_ARGS__)

#endif
