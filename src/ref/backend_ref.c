/* backend_ref.c - the reference backend's two tables, memory and streams. Compiled once.
 *
 * Device memory is host memory, a stream runs each call before it returns, and an event is nothing,
 * or a reading of the clock.
 * stream->native stays NULL here: it belongs to the communication layer of this backend
 * (comm_mpi.c).
 */
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "bf16.h"
#include "check.h"
#include "ref.h"

enum { ALIGN = 256 };

static void *ref_alloc(size_t bytes)
{
    const size_t rounded = (bytes + ALIGN - 1) / ALIGN * ALIGN;
    void *p = rounded >= bytes ? aligned_alloc(ALIGN, rounded ? rounded : ALIGN) : NULL;
    if (!p)
        FATAL(EXIT_ENVIRONMENT, "out of memory: %zu bytes", bytes);
    return p;
}

static void ref_release(void *p)
{
    free(p);
}

static void ref_memory(size_t *available, size_t *total)
{
    *available = *total = SIZE_MAX;
}

static char *row_of(in_t t, int64_t row)
{
    return (char *)t->data + row * t->ld * (int64_t)dtype_bytes(t->dtype);
}

/* Rows of src and dst may differ in number (a [6,2] into a [3,4]) as long as both are dense. */
static void ref_copy(struct stream *s, in_t src, out_t dst)
{
    const int64_t n = tensor_numel(src);
    ASSERT(src->dtype == dst->dtype && n == tensor_numel(dst));
    if (n == 0)
        return;
    const size_t width = dtype_bytes(src->dtype);
    const int64_t rows = tensor_rows(src), cols = tensor_cols(src);
    const bool src_dense = src->ld == cols || rows == 1,
               dst_dense = dst->ld == tensor_cols(dst) || tensor_rows(dst) == 1;
    if (src_dense && dst_dense) {
        memmove(dst->data, src->data, (size_t)n * width);
        return;
    }
    ASSERT(cols == tensor_cols(dst));
    for (int64_t r = 0; r < rows; r++)
        memmove(row_of(dst, r), row_of(src, r), (size_t)cols * width);
}

static void ref_fill(struct stream *s, out_t t, double value)
{
    const int64_t rows = tensor_rows(t), cols = tensor_cols(t);
    for (int64_t r = 0; r < rows && cols > 0; r++) {
        char *row = row_of(t, r);
        for (int64_t c = 0; c < cols; c++)
            switch (t->dtype) {
            case DTYPE_F32: ((float *)row)[c] = (float)value; break;
            case DTYPE_F64: ((double *)row)[c] = value; break;
            case DTYPE_BF16: ((uint16_t *)row)[c] = bf16_from_double(value); break;
            case DTYPE_I32: ((int32_t *)row)[c] = (int32_t)value; break;
            case DTYPE_I64: ((int64_t *)row)[c] = (int64_t)value; break;
            case DTYPE_U8: ((uint8_t *)row)[c] = (uint8_t)value; break;
            }
    }
}

static double load(const char *row, enum dtype dtype, int64_t c)
{
    switch (dtype) {
    case DTYPE_F32: return ((const float *)row)[c];
    case DTYPE_F64: return ((const double *)row)[c];
    case DTYPE_BF16: return bf16_to_float(((const uint16_t *)row)[c]);
    default: FATAL(EXIT_INTERNAL, "cast of %s: only floating-point types", dtype_name(dtype));
    }
}

static void store(char *row, enum dtype dtype, int64_t c, double x)
{
    switch (dtype) {
    case DTYPE_F32: ((float *)row)[c] = (float)x; break;
    case DTYPE_F64: ((double *)row)[c] = x; break;
    case DTYPE_BF16: ((uint16_t *)row)[c] = bf16_from_double(x); break;
    default: FATAL(EXIT_INTERNAL, "cast to %s: only floating-point types", dtype_name(dtype));
    }
}

static void ref_initialise(struct stream *s, enum rng_init init, double scale, struct rng_key key,
                           uint64_t base, uint64_t stride, out_t t)
{
    for (int64_t r = 0; r < tensor_rows(t); r++)
        for (int64_t c = 0; c < tensor_cols(t); c++)
            store(
                row_of(t, r), t->dtype, c,
                (float)rng_initial_at(init, scale, key, base + (uint64_t)r * stride + (uint64_t)c));
}

static void ref_cast(struct stream *s, in_t src, out_t dst)
{
    const int64_t rows = tensor_rows(src), cols = tensor_cols(src);
    ASSERT(rows == tensor_rows(dst) && cols == tensor_cols(dst));
    if (rows * cols == 0)
        return;
    for (int64_t r = 0; r < rows; r++) {
        const char *in = row_of(src, r);
        char *out = row_of(dst, r);
        for (int64_t c = 0; c < cols; c++)
            store(out, dst->dtype, c, load(in, src->dtype, c));
    }
}

static void ref_stream_create(struct stream *s, const char *name)
{
    *s = (struct stream){ .name = name };
}

static void ref_stream_scratch(struct stream *s, in_t memory) {}
static void ref_stream_destroy(struct stream *s)
{
    *s = (struct stream){ 0 };
}

/* Every call was complete when it returned: there is nothing to wait for. */
static void ref_stream_sync(struct stream *s) {}
static void ref_event_create(struct event *e)
{
    e->native = NULL;
}
static void ref_event_create_timed(struct event *e)
{
    e->native = xcalloc(1, sizeof(struct timespec));
}
static void ref_event_destroy(struct event *e)
{
    free(e->native);
    e->native = NULL;
}
static void ref_event_record(struct event *e, struct stream *s)
{
    if (e->native)
        clock_gettime(CLOCK_MONOTONIC, e->native);
}
static double ref_event_seconds(const struct event *from, const struct event *to)
{
    const struct timespec *a = from->native, *b = to->native;
    return (double)(b->tv_sec - a->tv_sec) + 1e-9 * (double)(b->tv_nsec - a->tv_nsec);
}
static void ref_stream_wait(struct stream *s, const struct event *e) {}
static void ref_event_sync(const struct event *e) {}

#define COMMON \
    .name = "ref", .alloc = ref_alloc, .release = ref_release, .copy = ref_copy, .fill = ref_fill, \
    .cast = ref_cast, .initialise = ref_initialise, .memory = ref_memory, \
    .stream_create = ref_stream_create, .stream_destroy = ref_stream_destroy, \
    .stream_scratch = ref_stream_scratch, .stream_sync = ref_stream_sync, \
    .event_create = ref_event_create, .event_destroy = ref_event_destroy, \
    .event_record = ref_event_record, .stream_wait = ref_stream_wait, \
    .event_create_timed = ref_event_create_timed, .event_seconds = ref_event_seconds, \
    .event_sync = ref_event_sync, .alloc_host = ref_alloc, .release_host = ref_release,

/* clang-format off */
const struct backend_ops backend_ref_f32 = {
    COMMON
    .act = DTYPE_F32, .acc = DTYPE_F32,
    .ssd_work = ref_ssd_work_f32, .attention_work = ref_attention_work_f32,
#define X(op) .op = ref_##op##_f32,
    REF_OPS(X)
#undef X
};

const struct backend_ops backend_ref_f64 = {
    COMMON
    .act = DTYPE_F64, .acc = DTYPE_F64,
    .ssd_work = ref_ssd_work_f64, .attention_work = ref_attention_work_f64,
#define X(op) .op = ref_##op##_f64,
    REF_OPS(X)
#undef X
};
/* clang-format on */
