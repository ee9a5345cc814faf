/* gpu_check.c - see gpu_check.h. */
#include "gpu_check.h"
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "bf16.h"
#include "check.h"
#include "cuda_sizes.h"
#include "cuda_util.h"
#include "gpu_threads.h"

enum { GUARD = 256, REPEATS = 25, WARM = 3, SHOWN = 3, ONLY = 16, REPLICAS = 24 };
/* The L2 cache; what keeps the device busy while calls are queued; cases with less memory are not
 * timed. */
static const size_t CACHE = (size_t)60 << 20, FILLER = (size_t)1 << 30, TIMED = (size_t)8 << 20;

struct state {
    struct stream stream, cpu;
    struct cuda_context context;
    bool time, quick, large;
    const char *only[ONLY];
    int only_count;
    uint64_t seed, random;
    /* the running case */
    char name[200], worst[64], trouble[4000];
    double error, bound;
    int round, replicas, compared;
    bool timed;
    float us[REPEATS];
    cudaEvent_t start[REPEATS], stop[REPEATS];
    void *filler;
    int cases, failed;
};

static struct state *state_of(struct gpu_check *g)
{
    return g->state;
}

struct gpu_check *gpu_check_start(int argc, char **argv)
{
    struct gpu_check *g = xcalloc(1, sizeof *g);
    struct state *s = xcalloc(1, sizeof *s);
    struct timespec now;
    struct cudaDeviceProp device;
    int driver = 0;
    clock_gettime(CLOCK_REALTIME, &now);
    s->seed = (uint64_t)now.tv_sec * 1000000007u + (uint64_t)now.tv_nsec;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--time") == 0)
            s->time = true;
        else if (strcmp(argv[i], "--quick") == 0)
            s->quick = true;
        else if (strcmp(argv[i], "--large") == 0)
            s->large = true;
        else if (strcmp(argv[i], "--seed") == 0 && i + 1 < argc)
            s->seed = strtoull(argv[++i], NULL, 0);
        else if (strcmp(argv[i], "--only") == 0 && i + 1 < argc && s->only_count < ONLY)
            s->only[s->only_count++] = argv[++i];
        else
            FATAL(EXIT_DECK, "%s: usage: [--time] [--quick] [--large] [--seed N] [--only WORD]...",
                  argv[i]);
    }
    CHECK_CUDA(cudaSetDevice(0));
    CHECK_CUDA(cudaGetDeviceProperties(&device, 0));
    CHECK_CUDA(cudaDriverGetVersion(&driver));
    printf("# %s: %s, %d SMs, driver's CUDA %d, seed %llu\n", argv[0], device.name,
           device.multiProcessorCount, driver, (unsigned long long)s->seed);
    s->stream.name = "compute";
    s->cpu.name = "reference";
    s->stream.native = &s->context;
    s->context.sm_count = device.multiProcessorCount;
    s->context.scratch_bytes = CUDA_SCRATCH;
    CHECK_CUDA(cudaStreamCreateWithFlags(&s->context.stream, cudaStreamNonBlocking));
    CHECK_CUDA(cudaMalloc((void **)&s->context.scratch, CUDA_SCRATCH));
    if (s->time)
        CHECK_CUDA(cudaMalloc(&s->filler, FILLER));
    for (int i = 0; i < REPEATS; i++) {
        CHECK_CUDA(cudaEventCreate(&s->start[i]));
        CHECK_CUDA(cudaEventCreate(&s->stop[i]));
    }
    g->stream = &s->stream;
    g->cpu = &s->cpu;
    g->state = s;
    return g;
}

int gpu_check_end(struct gpu_check *g)
{
    struct state *s = g->state;
    const int failed = s->failed, cases = s->cases;
    for (int i = 0; i < REPEATS; i++) {
        CHECK_CUDA(cudaEventDestroy(s->start[i]));
        CHECK_CUDA(cudaEventDestroy(s->stop[i]));
    }
    CHECK_CUDA(cudaFree(s->filler));
    CHECK_CUDA(cudaFree(s->context.scratch));
    CHECK_CUDA(cudaStreamDestroy(s->context.stream));
    printf("# %d cases, %d failed\n", cases, failed);
    free(s);
    free(g);
    return failed > 0 || cases == 0;
}

bool gpu_production(const struct gpu_check *g)
{
    return !((const struct state *)g->state)->quick;
}

bool gpu_small(const struct gpu_check *g)
{
    return !((const struct state *)g->state)->large;
}

void gpu_layout(struct gpu_check *g, int pad, int offset)
{
    g->pad = pad;
    g->offset = offset;
}

bool gpu_case(struct gpu_check *g, const char *op, const char *format, ...)
{
    struct state *s = state_of(g);
    bool chosen = s->only_count == 0;
    for (int i = 0; i < s->only_count; i++)
        chosen = chosen || strstr(op, s->only[i]);
    if (!chosen)
        return false;
    ASSERT(g->list == NULL);
    int n = snprintf(s->name, sizeof s->name, "%s ", op);
    va_list args;
    va_start(args, format);
    n += vsnprintf(s->name + n, sizeof s->name - (size_t)n, format, args);
    va_end(args);
    if (g->pad || g->offset)
        snprintf(s->name + n, sizeof s->name - (size_t)n, " pad %d offset %d", g->pad, g->offset);
    s->trouble[0] = s->worst[0] = '\0';
    s->error = s->bound = 0;
    s->round = -1;
    s->timed = false;
    s->compared = 0;
    /* A case's numbers depend on the seed and its name only, not on the cases before it. */
    s->random = s->seed;
    for (const char *c = s->name; *c; c++)
        s->random = (s->random ^ (unsigned char)*c) * 0x100000001b3u;
    return true;
}

void gpu_fail(struct gpu_check *g, const char *format, ...)
{
    struct state *s = state_of(g);
    const size_t n = strlen(s->trouble);
    if (n + 200 > sizeof s->trouble)
        return;
    va_list args;
    va_start(args, format);
    vsnprintf(s->trouble + n, sizeof s->trouble - n - 2, format, args);
    va_end(args);
    strcat(s->trouble, "\n");
}

/* ---- tensors ---- */

static struct gpu_tensor *make(struct gpu_check *g, enum dtype dtype, int ndim,
                               const int64_t *shape, int pad, bool host)
{
    struct gpu_tensor *t = xcalloc(1, sizeof *t);
    const size_t width = dtype_bytes(dtype);
    const bool number = dtype == DTYPE_BF16 || dtype == DTYPE_F32;
    t->dev = tensor_view(NULL, dtype, PLACE_DEVICE, ndim, shape);
    t->dev.ld += pad;
    t->host = tensor_view(NULL, number ? DTYPE_F32 : dtype, PLACE_HOST, ndim, shape);
    t->begin = GUARD + (size_t)g->offset * width;
    t->bytes = t->begin + (size_t)(tensor_rows(&t->dev) * t->dev.ld) * width + GUARD;
    t->bytes = (t->bytes + GUARD - 1) / GUARD * GUARD;
    CHECK_CUDA(cudaMalloc((void **)&t->memory, t->bytes));
    CHECK_CUDA(cudaMemset(t->memory, 0xFF, t->bytes));
    t->dev.data = t->memory + t->begin;
    t->replica[0] = t->memory;
    if (host) {
        const size_t n = (size_t)tensor_numel(&t->host) * dtype_bytes(t->host.dtype);
        t->host.data = xmalloc(n + 1, 1);
        memset(t->host.data, 0xFF, n);
    }
    t->written = true;
    t->next = g->list;
    g->list = t;
    return t;
}

struct gpu_tensor *gpu_tensor(struct gpu_check *g, enum dtype dtype, int ndim, const int64_t *shape)
{
    return make(g, dtype, ndim, shape, ndim > 1 ? g->pad : 0, true);
}

struct gpu_tensor *gpu_vector(struct gpu_check *g, enum dtype dtype, int64_t n)
{
    return make(g, dtype, 1, &n, 0, true);
}

struct gpu_tensor *gpu_matrix(struct gpu_check *g, enum dtype dtype, int64_t rows, int64_t cols)
{
    return make(g, dtype, 2, (int64_t[]){ rows, cols }, g->pad, true);
}

struct gpu_tensor *gpu_device_only(struct gpu_check *g, enum dtype dtype, int64_t rows,
                                   int64_t cols)
{
    return make(g, dtype, 2, (int64_t[]){ rows, cols }, g->pad, false);
}

void gpu_inout(struct gpu_tensor *t)
{
    t->written = true;
}

static const uint64_t STRIDE = 0x9E3779B97F4A7C15u;

static uint64_t mix(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

uint64_t gpu_random(struct gpu_check *g)
{
    struct state *s = state_of(g);
    return mix(s->random += STRIDE);
}

/* Draws first.. of a tensor's: number i of the case's stream after `start`. */
struct draw {
    float *to;
    uint64_t start;
    double low, range;
};

static uint64_t draw_at(const struct draw *d, int64_t i)
{
    return mix(d->start + (uint64_t)(i + 1) * STRIDE);
}

/* The sum of four uniform numbers: smooth, bounded by 3.5 sigma, and one draw of bits. */
static void draw_normal(const void *ctx, int64_t first, int64_t end, struct found *found)
{
    const struct draw *d = ctx;
    const float scale = (float)(d->range * 1.7320508 / 65536.0);
    for (int64_t i = first; i < end; i++) {
        const uint64_t b = draw_at(d, i);
        const int sum =
            (int)(b & 0xffff) + (int)(b >> 16 & 0xffff) + (int)(b >> 32 & 0xffff) + (int)(b >> 48);
        d->to[i] = (float)(sum - 131070) * scale;
    }
}

static void draw_uniform(const void *ctx, int64_t first, int64_t end, struct found *found)
{
    const struct draw *d = ctx;
    for (int64_t i = first; i < end; i++)
        d->to[i] = (float)(d->low + d->range * (double)(draw_at(d, i) >> 40) / 16777216.0);
}

static void draw(struct gpu_check *g, struct gpu_tensor *t, element_work *work, double low,
                 double range)
{
    struct state *s = state_of(g);
    const int64_t n = tensor_numel(&t->host);
    const struct draw d = { t->host.data, s->random, low, range };
    on_all_cores(n, work, &d);
    s->random += (uint64_t)n * STRIDE;
    gpu_upload(g, t);
}

void gpu_normal(struct gpu_check *g, struct gpu_tensor *t, double sigma)
{
    draw(g, t, draw_normal, 0, sigma);
}

void gpu_uniform(struct gpu_check *g, struct gpu_tensor *t, double low, double high)
{
    draw(g, t, draw_uniform, low, high - low);
}

void gpu_integers(struct gpu_check *g, struct gpu_tensor *t, int64_t low, int64_t high)
{
    const int64_t n = tensor_numel(&t->host);
    for (int64_t i = 0; i < n; i++) {
        const int64_t v = low + (int64_t)(gpu_random(g) % (uint64_t)(high - low));
        if (t->host.dtype == DTYPE_I32)
            ((int32_t *)t->host.data)[i] = (int32_t)v;
        else
            ((int64_t *)t->host.data)[i] = v;
    }
    gpu_upload(g, t);
}

/* To bf16 and back, or back only. */
struct rounding {
    float *wide;
    uint16_t *narrow;
};

static void round_elements(const void *ctx, int64_t first, int64_t end, struct found *found)
{
    const struct rounding *r = ctx;
    for (int64_t i = first; i < end; i++) {
        r->narrow[i] = bf16_from_float(r->wide[i]);
        r->wide[i] = bf16_to_float(r->narrow[i]);
    }
}

static void widen_elements(const void *ctx, int64_t first, int64_t end, struct found *found)
{
    const struct rounding *r = ctx;
    for (int64_t i = first; i < end; i++)
        r->wide[i] = bf16_to_float(r->narrow[i]);
}

void gpu_upload(struct gpu_check *g, struct gpu_tensor *t)
{
    const int64_t rows = tensor_rows(&t->dev), cols = tensor_cols(&t->dev), n = rows * cols;
    const size_t width = dtype_bytes(t->dev.dtype);
    const void *from = t->host.data;
    uint16_t *narrow = NULL;
    t->written = false;
    if (n == 0)
        return;
    if (t->dev.dtype == DTYPE_BF16) {
        float *p = t->host.data;
        narrow = xmalloc((size_t)n, sizeof *narrow);
        on_all_cores(n, round_elements, &(struct rounding){ p, narrow });
        from = narrow;
    }
    CHECK_CUDA(cudaMemcpy2D(t->dev.data, (size_t)t->dev.ld * width, from, (size_t)cols * width,
                            (size_t)cols * width, (size_t)rows, cudaMemcpyHostToDevice));
    free(narrow);
}

void gpu_download(struct gpu_check *g, struct gpu_tensor *t)
{
    const int64_t rows = tensor_rows(&t->dev), cols = tensor_cols(&t->dev), n = rows * cols;
    const size_t width = dtype_bytes(t->dev.dtype);
    ASSERT(t->dev.dtype == DTYPE_BF16 || t->dev.dtype == t->host.dtype);
    if (n == 0)
        return;
    char *raw = xmalloc((size_t)n, width);
    CHECK_CUDA(cudaStreamSynchronize(cuda_stream_of(g->stream)));
    CHECK_CUDA(cudaMemcpy2D(raw, (size_t)cols * width, t->dev.data, (size_t)t->dev.ld * width,
                            (size_t)cols * width, (size_t)rows, cudaMemcpyDeviceToHost));
    if (t->dev.dtype == DTYPE_BF16)
        on_all_cores(n, widen_elements,
                     &(struct rounding){ t->host.data, (uint16_t *)(void *)raw });
    else
        memcpy(t->host.data, raw, (size_t)n * width);
    free(raw);
}

void gpu_repeat(struct gpu_check *g, struct gpu_tensor *t, const struct gpu_tensor *from)
{
    const int64_t rows = tensor_rows(&t->dev), cols = tensor_cols(&t->dev),
                  period = tensor_rows(&from->dev);
    const size_t width = dtype_bytes(t->dev.dtype), pitch = (size_t)t->dev.ld * width;
    ASSERT(t->dev.dtype == from->dev.dtype && cols == tensor_cols(&from->dev));
    for (int64_t r = 0; r < rows; r += period) {
        const int64_t n = rows - r < period ? rows - r : period;
        CHECK_CUDA(cudaMemcpy2D((char *)t->dev.data + (size_t)r * pitch, pitch, from->dev.data,
                                (size_t)from->dev.ld * width, (size_t)cols * width, (size_t)n,
                                cudaMemcpyDeviceToDevice));
    }
    t->written = false;
}

/* ---- running ---- */

void gpu_run_begin(struct gpu_check *g)
{
    struct state *s = state_of(g);
    size_t bytes = 0;
    for (struct gpu_tensor *t = g->list; t; t = t->next)
        bytes += t->bytes;
    s->round = 0;
    s->timed = s->time && bytes >= TIMED;
    s->replicas = 1 + (int)(3 * CACHE / (bytes + 1));
    ASSERT(!s->timed || s->replicas <= REPLICAS);
    for (struct gpu_tensor *t = g->list; t; t = t->next) {
        t->got = xmalloc(t->bytes, 1);
        if (t->written || s->timed) {
            CHECK_CUDA(cudaMalloc((void **)&t->image, t->bytes));
            CHECK_CUDA(cudaMemcpy(t->image, t->memory, t->bytes, cudaMemcpyDeviceToDevice));
        }
        if (!t->written)
            CHECK_CUDA(cudaMemcpy(t->got, t->memory, t->bytes, cudaMemcpyDeviceToHost));
    }
}

static void restore(struct gpu_check *g, int rubbish)
{
    struct state *s = state_of(g);
    for (struct gpu_tensor *t = g->list; t; t = t->next)
        if (t->written)
            CHECK_CUDA(cudaMemcpy(t->memory, t->image, t->bytes, cudaMemcpyDeviceToDevice));
    CHECK_CUDA(cudaMemset(s->context.scratch, rubbish, s->context.scratch_bytes));
    CHECK_CUDA(cudaDeviceSynchronize());
}

static int64_t padding_touched(const struct gpu_tensor *t)
{
    const size_t width = dtype_bytes(t->dev.dtype), row = (size_t)t->dev.ld * width,
                 used = (size_t)tensor_cols(&t->dev) * width, rows = (size_t)tensor_rows(&t->dev);
    for (size_t i = 0; i < t->bytes; i++) {
        if (i >= t->begin && i < t->begin + rows * row) {
            const size_t in = (i - t->begin) % row;
            if (in < used) {
                i += used - in - 1;
                continue;
            }
        }
        if (t->got[i] != 0xFF)
            return (int64_t)i - (int64_t)t->begin;
    }
    return INT64_MIN;
}

static void look_at_first(struct gpu_check *g)
{
    for (struct gpu_tensor *t = g->list; t; t = t->next) {
        unsigned char *now = t->got;
        if (!t->written)
            now = xmalloc(t->bytes, 1);
        CHECK_CUDA(cudaMemcpy(now, t->memory, t->bytes, cudaMemcpyDeviceToHost));
        if (!t->written) {
            if (memcmp(now, t->got, t->bytes) != 0)
                gpu_fail(g, "an input of %lld x %lld %s was written to",
                         (long long)tensor_rows(&t->dev), (long long)tensor_cols(&t->dev),
                         dtype_name(t->dev.dtype));
            free(now);
        } else if (padding_touched(t) != INT64_MIN)
            gpu_fail(
                g,
                "byte %lld from the start of an output of %lld x %lld %s was written: outside the view",
                (long long)padding_touched(t), (long long)tensor_rows(&t->dev),
                (long long)tensor_cols(&t->dev), dtype_name(t->dev.dtype));
    }
}

static void look_at_second(struct gpu_check *g)
{
    for (struct gpu_tensor *t = g->list; t; t = t->next) {
        if (!t->written || t->varies)
            continue;
        unsigned char *now = xmalloc(t->bytes, 1);
        CHECK_CUDA(cudaMemcpy(now, t->memory, t->bytes, cudaMemcpyDeviceToHost));
        for (size_t i = 0; i < t->bytes && memcmp(now, t->got, t->bytes) != 0; i++)
            if (now[i] != t->got[i]) {
                gpu_fail(
                    g,
                    "the second run differs from the first at byte %lld of an output of %lld x %lld %s",
                    (long long)i - (long long)t->begin, (long long)tensor_rows(&t->dev),
                    (long long)tensor_cols(&t->dev), dtype_name(t->dev.dtype));
                break;
            }
        free(now);
    }
}

/* As many copies of all tensors as exceed the cache three times. */
static void make_replicas(struct gpu_check *g)
{
    struct state *s = state_of(g);
    for (struct gpu_tensor *t = g->list; t; t = t->next) {
        CHECK_CUDA(cudaMemcpy(t->memory, t->image, t->bytes, cudaMemcpyDeviceToDevice));
        for (int i = 1; i < s->replicas; i++) {
            CHECK_CUDA(cudaMalloc((void **)&t->replica[i], t->bytes));
            CHECK_CUDA(cudaMemcpy(t->replica[i], t->image, t->bytes, cudaMemcpyDeviceToDevice));
        }
    }
    CHECK_CUDA(cudaDeviceSynchronize());
}

static void point_at(struct gpu_check *g, int replica)
{
    for (struct gpu_tensor *t = g->list; t; t = t->next)
        t->dev.data = t->replica[replica] + t->begin;
}

/* Rounds 0 and 1 check; then WARM + REPEATS timed calls, queued behind a fill so that the device
 * never waits for the host. */
bool gpu_run_again(struct gpu_check *g)
{
    struct state *s = state_of(g);
    const int round = s->round++, call = round - 2 - WARM;
    if (round > 0 && round <= 2) {
        const cudaError_t status = cudaDeviceSynchronize();
        if (status != cudaSuccess)
            FATAL(EXIT_INTERNAL, "%s: %s", s->name, cudaGetErrorString(status));
        if (round == 1)
            look_at_first(g);
        else
            look_at_second(g);
    }
    if (round < 2) {
        restore(g, round == 0 ? 0xFF : 0x3C);
        return true;
    }
    if (!s->timed)
        return false;
    if (round == 2)
        make_replicas(g);
    if (call > 0)
        CHECK_CUDA(cudaEventRecord(s->stop[call - 1], s->context.stream));
    if (call == REPEATS) {
        CHECK_CUDA(cudaStreamSynchronize(s->context.stream));
        for (int i = 0; i < REPEATS; i++) {
            CHECK_CUDA(cudaEventElapsedTime(&s->us[i], s->start[i], s->stop[i]));
            s->us[i] *= 1000;
        }
        point_at(g, 0);
        return false;
    }
    point_at(g, round % s->replicas);
    if (call == 0)
        CHECK_CUDA(cudaMemsetAsync(s->filler, 0, FILLER, s->context.stream));
    if (call >= 0)
        CHECK_CUDA(cudaEventRecord(s->start[call], s->context.stream));
    return true;
}

/* ---- comparing ---- */

struct gpu_bound gpu_rounding(enum dtype dtype)
{
    /* Half a unit in the last place of bf16 is 2^-8 of the number at most, 1.66e-3 in the root mean
     * square. */
    return dtype == DTYPE_BF16 ? (struct gpu_bound){ 2e-3, 4e-3 }
                               : (struct gpu_bound){ 1e-6, 1e-5 };
}

struct gpu_bound gpu_summing(enum dtype dtype, int64_t n)
{
    struct gpu_bound b = gpu_rounding(dtype);
    const double random_walk = 6e-8 * sqrt((double)n + 1);
    b.frobenius += random_walk;
    b.element += 20 * random_walk;
    return b;
}

static double value_at(const struct gpu_tensor *t, int64_t r, int64_t c)
{
    const unsigned char *p = t->got + t->begin;
    const int64_t i = r * t->dev.ld + c;
    if (t->dev.dtype == DTYPE_F32) {
        float f;
        memcpy(&f, p + 4 * i, sizeof f);
        return f;
    }
    uint16_t b;
    memcpy(&b, p + 2 * i, sizeof b);
    return bf16_to_float(b);
}

/* Keeps the error that comes nearest to its bound. */
static void note(struct state *s, const char *name, double error, double bound)
{
    if (s->compared++ == 0 || !(error / bound <= s->error / s->bound)) {
        s->error = error;
        s->bound = bound;
        snprintf(s->worst, sizeof s->worst, "%s", name);
    }
}

/* Rows of t against want's; rms of want once it is known. */
struct comparison {
    const struct gpu_tensor *t;
    const int64_t *row;
    const struct tensor *want;
    double rms;
};

static int64_t row_of(const struct comparison *c, int64_t i)
{
    return c->row ? c->row[i] : i;
}

static double wanted(const struct comparison *c, int64_t r, int64_t col)
{
    return ((const float *)c->want->data)[r * c->want->ld + col];
}

static double element_error(const struct comparison *c, int64_t r, int64_t col)
{
    const double w = wanted(c, r, col), v = value_at(c->t, row_of(c, r), col),
                 e = v == w ? 0 : fabs(v - w) / (fabs(w) + c->rms);
    return isnan(e) ? INFINITY : e;
}

static void add_squares(const void *ctx, int64_t first, int64_t end, struct found *found)
{
    const struct comparison *c = ctx;
    const int64_t cols = tensor_cols(c->want);
    for (int64_t i = first; i < end; i++) {
        const double w = wanted(c, i / cols, i % cols),
                     d = value_at(c->t, row_of(c, i / cols), i % cols) - w;
        found->square += w * w;
        found->difference += d * d;
    }
}

static void find_worst(const void *ctx, int64_t first, int64_t end, struct found *found)
{
    const struct comparison *c = ctx;
    const int64_t cols = tensor_cols(c->want);
    for (int64_t i = first; i < end; i++)
        found->worst = fmax(found->worst, element_error(c, i / cols, i % cols));
}

/* How many of t's elements are no numbers. */
static void count_strange(const void *ctx, int64_t first, int64_t end, struct found *found)
{
    const struct gpu_tensor *t = ctx;
    const int64_t cols = tensor_cols(&t->dev);
    for (int64_t i = first; i < end; i++)
        found->square += !isfinite(value_at(t, i / cols, i % cols));
}

/* The first few elements that are beyond the bound or no numbers. */
static void show(struct gpu_check *g, const struct comparison *c, const char *name, double bound)
{
    const int64_t cols = tensor_cols(&c->t->dev), rows = tensor_rows(&c->t->dev);
    int shown = 0;
    for (int64_t i = 0; i < tensor_numel(c->want) && shown < SHOWN; i++)
        if (!(element_error(c, i / cols, i % cols) <= bound)) {
            const int64_t r = row_of(c, i / cols);
            gpu_fail(g, "%s[%lld,%lld]: got %.8g, want %.8g (rms %.3g)", name, (long long)r,
                     (long long)(i % cols), value_at(c->t, r, i % cols),
                     wanted(c, i / cols, i % cols), c->rms);
            shown++;
        }
    for (int64_t i = 0; c->row && i < rows * cols && shown < SHOWN; i++)
        if (!isfinite(value_at(c->t, i / cols, i % cols))) {
            gpu_fail(g, "%s[%lld,%lld]: got %g", name, (long long)(i / cols), (long long)(i % cols),
                     value_at(c->t, i / cols, i % cols));
            shown++;
        }
}

void gpu_close_rows(struct gpu_check *g, struct gpu_tensor *t, const char *name, const int64_t *row,
                    int64_t n, const struct tensor *want, struct gpu_bound bound)
{
    struct state *s = state_of(g);
    const int64_t cols = tensor_cols(&t->dev), count = n * cols;
    struct comparison c = { t, row, want, 0 };
    ASSERT(want->dtype == DTYPE_F32 && n == tensor_rows(want) && cols == tensor_cols(want) &&
           t->got);
    const struct found sums = on_all_cores(count, add_squares, &c);
    c.rms = sqrt(sums.square / (double)(count > 0 ? count : 1));
    const double worst = on_all_cores(count, find_worst, &c).worst;
    const bool strange =
        row && on_all_cores(tensor_rows(&t->dev) * cols, count_strange, t).square > 0;
    if (strange || !(worst <= bound.element))
        show(g, &c, name, bound.element);
    /* The bound is on a root mean square; of few numbers, of which one may outweigh the rest, it
     * may be twice as large. */
    const double error = sums.difference == 0 ? 0 : sqrt(sums.difference / sums.square),
                 most = bound.frobenius * fmin(2, 1 + 3 / sqrt((double)count + 1e-9));
    if (!(error <= most))
        gpu_fail(g, "%s: relative error %.3g, bound %.3g; largest of an element %.3g", name, error,
                 most, worst);
    note(s, name, error, most);
    note(s, name, worst, bound.element);
}

void gpu_close_columns(struct gpu_check *g, struct gpu_tensor *t, const char *name, int64_t first,
                       const struct tensor *want, struct gpu_bound bound)
{
    double difference = 0, norm = 0;
    for (int64_t r = 0; r < tensor_rows(want); r++)
        for (int64_t c = 0; c < tensor_cols(want); c++) {
            const double x = value_at(t, r, first + c),
                         y = ((const float *)want->data)[r * want->ld + c];
            difference += (x - y) * (x - y);
            norm += y * y;
        }
    const double error = difference == 0 ? 0 : sqrt(difference / norm);
    if (!(error <= bound.frobenius))
        gpu_fail(g, "%s: relative error %.3g in columns %lld..., bound %.3g", name, error,
                 (long long)first, bound.frobenius);
    note(state_of(g), name, error, bound.frobenius);
}

void gpu_close(struct gpu_check *g, struct gpu_tensor *t, const char *name, struct gpu_bound bound)
{
    gpu_close_rows(g, t, name, NULL, tensor_rows(&t->host), &t->host, bound);
}

void gpu_equal(struct gpu_check *g, struct gpu_tensor *t, const char *name)
{
    struct state *s = state_of(g);
    const size_t width = dtype_bytes(t->dev.dtype);
    const int64_t rows = tensor_rows(&t->dev), cols = tensor_cols(&t->dev);
    int64_t bad = 0;
    ASSERT(t->dev.dtype == t->host.dtype && t->got);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) {
            int64_t got = 0, want = 0;
            memcpy(&got, t->got + t->begin + (size_t)(r * t->dev.ld + c) * width, width);
            memcpy(&want, (char *)t->host.data + (size_t)(r * cols + c) * width, width);
            if (got != want && bad++ < SHOWN)
                gpu_fail(g, "%s[%lld,%lld]: got %lld, want %lld", name, (long long)r, (long long)c,
                         (long long)got, (long long)want);
        }
    if (bad)
        gpu_fail(g, "%s: %lld elements differ", name, (long long)bad);
    s->compared++;
}

static int ascending(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

void gpu_report(struct gpu_check *g, double bytes, double flops)
{
    struct state *s = state_of(g);
    char speed[100] = "";
    if (s->round < 0 || s->compared == 0)
        gpu_fail(g, "nothing was run or compared");
    if (s->timed) {
        qsort(s->us, REPEATS, sizeof *s->us, ascending);
        const double us = s->us[REPEATS / 2];
        int n = snprintf(speed, sizeof speed, " | %.1f us", us);
        if (bytes > 0)
            n += snprintf(speed + n, sizeof speed - (size_t)n, " %.0f GB/s", bytes / us * 1e-3);
        if (flops > 0)
            snprintf(speed + n, sizeof speed - (size_t)n, " %.1f TFLOP/s", flops / us * 1e-6);
    }
    printf("%s - %s err %.1e bound %.1e%s%s%s\n", s->trouble[0] ? "not ok" : "ok", s->name,
           s->error, s->bound, s->worst[0] ? " in " : "", s->worst, speed);
    for (char *line = strtok(s->trouble, "\n"); line; line = strtok(NULL, "\n"))
        printf("#   %s\n", line);
    s->failed += s->trouble[0] != '\0';
    s->cases++;
    fflush(stdout);
    while (g->list) {
        struct gpu_tensor *t = g->list;
        g->list = t->next;
        for (int i = 0; i < REPLICAS; i++)
            CHECK_CUDA(cudaFree(t->replica[i]));
        CHECK_CUDA(cudaFree(t->image));
        free(t->host.data);
        free(t->got);
        free(t);
    }
}
