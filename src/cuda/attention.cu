/* attention.cu - grouped-query attention on ragged batches (model.md 1.5, 2.4).
 *
 * bf16 with widths that cuDNN takes: one plan after the other over pieces of the problem, each
 * piece as large as the workspace of the deterministic backward allows (cuda_sizes.h). Two ways to
 * cut:
 *   plain   segments of equal length: one segment at a time, KV groups are cuDNN's batch, so that
 *           rows which interleave queries, keys and values per group need no copy;
 *   packed  one key head per query head, segments of any length: slots with offsets and lengths
 *           made on the device.
 * Everything else (fp32, odd widths, ragged batches with shared keys) runs on plain kernels below:
 * a warp per query row and a warp per key row, exact in fp32, made for correctness.
 */
#include "attention.h"
#include "cuda_sizes.h"
#include "cuda_util.cuh"

enum { SIMPLE_MAX_D = 256, WARPS = 4 };

/* ---- plain kernels ---- */

/* of one problem; columns of qkv: per group n/g queries, key, value */
struct view {
    const int32_t *cu;
    int segments, n, g, d;
    bool causal;
    int64_t rows;
    __device__ int64_t query(int head) const
    {
        const int per = n / g;
        return ((int64_t)(head / per) * (per + 2) + head % per) * d;
    }
    __device__ int64_t key(int group) const
    {
        const int per = n / g;
        return ((int64_t)group * (per + 2) + per) * d;
    }
};

/* Each lane holds elements lane, lane+32, ... of a row of width d. */
template <class T> struct row_of {
    float v[SIMPLE_MAX_D / WARP];
    __device__ void load(const T *p, int d)
    {
        for (int i = 0; i < SIMPLE_MAX_D / WARP; i++) {
            const int c = i * WARP + threadIdx.x % WARP;
            v[i] = c < d ? to_float(p[c]) : 0.0f;
        }
    }
    __device__ float dot(const row_of &o) const
    {
        float x = 0.0f;
        for (int i = 0; i < SIMPLE_MAX_D / WARP; i++)
            x += v[i] * o.v[i];
        return warp_sum(x);
    }
    __device__ void add(float a, const row_of &o)
    {
        for (int i = 0; i < SIMPLE_MAX_D / WARP; i++)
            v[i] += a * o.v[i];
    }
    __device__ void zero()
    {
        for (int i = 0; i < SIMPLE_MAX_D / WARP; i++)
            v[i] = 0.0f;
    }
    __device__ void store(T *p, int d, float scale) const
    {
        for (int i = 0; i < SIMPLE_MAX_D / WARP; i++) {
            const int c = i * WARP + threadIdx.x % WARP;
            if (c < d)
                p[c] = from_float<T>(v[i] * scale);
        }
    }
};

template <class T>
static __global__ void simple_forward(view a, matrix<const T> qkv, matrix<T> o, matrix<float> lse)
{
    const int64_t task = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    if (task >= a.rows * a.n)
        return;
    const int64_t r = task / a.n;
    const int head = task % a.n, s = segment_of(a.cu, a.segments, r);
    const float scale = rsqrtf((float)a.d);
    const int64_t last = a.causal ? r : a.cu[s + 1] - 1;
    row_of<T> q, k, v, sum;
    q.load(qkv.row(r) + a.query(head), a.d);
    sum.zero();
    float most = -INFINITY, total = 0.0f;
    for (int64_t j = a.cu[s]; j <= last; j++) {
        const T *kv = qkv.row(j) + a.key(head / (a.n / a.g));
        k.load(kv, a.d);
        v.load(kv + a.d, a.d);
        const float x = q.dot(k) * scale, next = fmaxf(most, x), keep = expf(most - next),
                    p = expf(x - next);
        for (float &e : sum.v)
            e *= keep;
        sum.add(p, v);
        total = total * keep + p;
        most = next;
    }
    sum.store(o.row(r) + (int64_t)head * a.d, a.d, 1.0f / total);
    if (threadIdx.x % WARP == 0)
        lse.row(r)[head] = most + logf(total);
}

/* delta[r,head] = sum of do * o, the softmax's correction. */
template <class T>
static __global__ void simple_delta(view a, matrix<const T> o, matrix<const T> d_o, float *delta)
{
    const int64_t task = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    if (task >= a.rows * a.n)
        return;
    row_of<T> x, y;
    x.load(o.row(task / a.n) + task % a.n * a.d, a.d);
    y.load(d_o.row(task / a.n) + task % a.n * a.d, a.d);
    const float sum = x.dot(y);
    if (threadIdx.x % WARP == 0)
        delta[task] = sum;
}

template <class T>
static __global__ void simple_dq(view a, matrix<const T> qkv, matrix<const float> lse,
                                 matrix<const T> d_o, const float *delta, matrix<T> dqkv)
{
    const int64_t task = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    if (task >= a.rows * a.n)
        return;
    const int64_t r = task / a.n;
    const int head = task % a.n, s = segment_of(a.cu, a.segments, r);
    const float scale = rsqrtf((float)a.d), l = lse.row(r)[head], correction = delta[task];
    const int64_t last = a.causal ? r : a.cu[s + 1] - 1;
    row_of<T> q, k, v, dy, dq;
    q.load(qkv.row(r) + a.query(head), a.d);
    dy.load(d_o.row(r) + (int64_t)head * a.d, a.d);
    dq.zero();
    for (int64_t j = a.cu[s]; j <= last; j++) {
        const T *kv = qkv.row(j) + a.key(head / (a.n / a.g));
        k.load(kv, a.d);
        v.load(kv + a.d, a.d);
        const float p = expf(q.dot(k) * scale - l);
        dq.add(p * (dy.dot(v) - correction), k);
    }
    dq.store(dqkv.row(r) + a.query(head), a.d, scale);
}

/* Query heads of a group in ascending order, rows in ascending order. */
template <class T>
static __global__ void simple_dkv(view a, matrix<const T> qkv, matrix<const float> lse,
                                  matrix<const T> d_o, const float *delta, matrix<T> dqkv)
{
    const int64_t task = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    if (task >= a.rows * a.g)
        return;
    const int64_t r = task / a.g;
    const int group = task % a.g, s = segment_of(a.cu, a.segments, r), per = a.n / a.g;
    const float scale = rsqrtf((float)a.d);
    row_of<T> k, v, q, dy, dk, dv;
    k.load(qkv.row(r) + a.key(group), a.d);
    v.load(qkv.row(r) + a.key(group) + a.d, a.d);
    dk.zero();
    dv.zero();
    for (int head = group * per; head < (group + 1) * per; head++)
        for (int64_t i = a.causal ? r : a.cu[s]; i < a.cu[s + 1]; i++) {
            q.load(qkv.row(i) + a.query(head), a.d);
            dy.load(d_o.row(i) + (int64_t)head * a.d, a.d);
            const float p = expf(q.dot(k) * scale - lse.row(i)[head]);
            dv.add(p, dy);
            dk.add(p * (dy.dot(v) - delta[i * a.n + head]), q);
        }
    dk.store(dqkv.row(r) + a.key(group), a.d, scale);
    dv.store(dqkv.row(r) + a.key(group) + a.d, a.d, 1.0f);
}

/* ---- around cuDNN ---- */

/* Slots beyond the last segment are empty. Offsets count elements. */
static __global__ void make_slots(const int32_t *cu, int segments, int slots, int64_t qkv_row,
                                  int64_t o_row, int64_t stats_row, int64_t *qkv_offset,
                                  int64_t *o_offset, int64_t *stats_offset, int32_t *length)
{
    for (int i = threadIdx.x; i <= slots; i += blockDim.x) {
        const int64_t row = cu[i < segments ? i : segments];
        qkv_offset[i] = row * qkv_row;
        o_offset[i] = row * o_row;
        stats_offset[i] = row * stats_row;
        if (i < slots)
            length[i] = i < segments ? cu[i + 1] - cu[i] : 0;
    }
}

/* cuDNN's statistics of one segment [n, len] and ours [len, n]. */
static __global__ void stats_to_rows(const float *stats, int64_t len, int n, matrix<float> lse,
                                     bool back)
{
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < len * n;
         i += (int64_t)gridDim.x * blockDim.x) {
        const int64_t head = i / len, r = i % len;
        if (back)
            ((float *)stats)[i] = lse.row(r)[head];
        else
            lse.row(r)[head] = stats[i];
    }
}

struct problem {
    struct stream *s;
    in_t qkv, cu, o, lse, d_o, work; /* d_o, dqkv: backward only */
    out_t dqkv;
    int64_t max_len;
    int n, g, d;
    bool causal, backward, any_order;
    int64_t segments() const
    {
        return tensor_numel(cu) - 1;
    }
    int64_t rows() const
    {
        return tensor_rows(qkv);
    }
    /* Heads of one plan, with keys of `groups` kinds. */
    int at_once(int64_t slots, int64_t len, int groups) const
    {
        return any_order ? n : cuda_attention_chunk(slots, len, n, groups);
    }
};

static bool aligned(in_t t)
{
    return !t || ((uintptr_t)t->data % 16 == 0 && t->ld % 8 == 0);
}

static bool fits_cudnn(const problem &p)
{
    /* cuDNN refuses sequences of one row. */
    return p.qkv->dtype == DTYPE_BF16 && p.max_len > 1 && p.d % 8 == 0 && p.d <= 128 &&
           aligned(p.qkv) && aligned(p.o) && aligned(p.d_o) && aligned(p.dqkv);
}

static char *at(in_t t, int64_t row, int64_t col)
{
    return t ? (char *)t->data + (row * t->ld + col) * (int64_t)dtype_bytes(t->dtype) : NULL;
}

static void run_plain(const problem &p)
{
    const int per = p.n / p.g, chunk = p.at_once(1, p.max_len, p.g) / per;
    const int64_t len = p.max_len, group = (int64_t)(per + 2) * p.d;
    float *stats = (float *)p.work->data;
    const size_t used = ((size_t)(p.n * len) * sizeof(float) + 255) / 256 * 256;
    const struct cuda_attention_shape shape = { .batch = chunk,
                                                .heads = per,
                                                .d = p.d,
                                                .max_len = len,
                                                .row = p.qkv->ld,
                                                .head = p.d,
                                                .group = group,
                                                .o_row = p.o->ld,
                                                .stats_row = 0,
                                                .total = 0,
                                                .packed = false,
                                                .causal = p.causal,
                                                .backward = p.backward,
                                                .any_order = p.any_order };
    ASSERT((size_t)tensor_numel(p.work) > used);
    for (int64_t i = 0; i < p.segments(); i++) {
        const int64_t first = i * len;
        const struct tensor lse = tensor_row_range(p.lse, first, len);
        const unsigned blocks = blocks_for(len * p.n, 256);
        if (p.backward)
            stats_to_rows<<<blocks, 256, 0, cuda_stream_of(p.s)>>>(stats, len, p.n,
                                                                   as_matrix<float>(&lse), true);
        for (int j = 0; j < p.g; j += chunk) {
            const int64_t q = j * group, k = q + per * p.d;
            const struct cuda_attention_pointers to = {
                .q = at(p.qkv, first, q),
                .k = at(p.qkv, first, k),
                .v = at(p.qkv, first, k + p.d),
                .o = at(p.o, first, (int64_t)j * per * p.d),
                .stats = stats + (int64_t)j * per * len,
                .d_o = at(p.d_o, first, (int64_t)j * per * p.d),
                .dq = at(p.dqkv, first, q),
                .dk = at(p.dqkv, first, k),
                .dv = at(p.dqkv, first, k + p.d),
                .qkv_offset = NULL,
                .o_offset = NULL,
                .stats_offset = NULL,
                .length = NULL,
                .workspace = (char *)p.work->data + used,
                .workspace_bytes = (size_t)tensor_numel(p.work) - used
            };
            cuda_attention_run(cuda_context_of(p.s), &shape, &to);
        }
        if (!p.backward)
            stats_to_rows<<<blocks, 256, 0, cuda_stream_of(p.s)>>>(stats, len, p.n,
                                                                   as_matrix<float>(&lse), false);
    }
    CHECK_LAUNCH();
}

/* Few plans for many shapes of picture batches: lengths and slots are rounded up. */
static int64_t bucket_length(int64_t len)
{
    const int64_t step = len <= 2048 ? 128 : 1024;
    return (len + step - 1) / step * step;
}

static int64_t bucket_slots(int64_t n)
{
    int64_t b = 1;
    while (b < n)
        b *= 2;
    return b;
}

static void run_packed(const problem &p)
{
    const int64_t len = bucket_length(p.max_len), segments = p.segments();
    const int heads = p.at_once(1, len, p.n);
    int64_t slots = bucket_slots(segments);
    /* One head is what a piece has at least, also above the cap. */
    while (slots > 1 && p.at_once(slots, len, p.n) < (heads > 1 ? heads : 2))
        slots /= 2;
    const int64_t all = (segments + slots - 1) / slots * slots;
    int64_t *offset = (int64_t *)p.work->data;
    int32_t *length = (int32_t *)(offset + 3 * (all + 1));
    const size_t used = ((size_t)((char *)(length + all) - (char *)p.work->data) + 255) / 256 * 256;
    ASSERT((size_t)tensor_numel(p.work) > used);
    make_slots<<<1, 256, 0, cuda_stream_of(p.s)>>>(
        (const int32_t *)p.cu->data, (int)segments, (int)all, p.qkv->ld, p.o->ld, p.lse->ld, offset,
        offset + all + 1, offset + 2 * (all + 1), length);
    CHECK_LAUNCH();
    const int64_t head = 3 * (int64_t)p.d, total = slots * len < p.rows() ? slots * len : p.rows();
    const struct cuda_attention_shape shape = { .batch = slots,
                                                .heads = heads,
                                                .d = p.d,
                                                .max_len = len,
                                                .row = p.qkv->ld,
                                                .head = head,
                                                .group = 0,
                                                .o_row = p.o->ld,
                                                .stats_row = p.lse->ld,
                                                .total = total,
                                                .packed = true,
                                                .causal = p.causal,
                                                .backward = p.backward,
                                                .any_order = p.any_order };
    for (int64_t i = 0; i < all; i += slots)
        for (int j = 0; j < p.n; j += heads) {
            const int64_t q = j * head;
            const struct cuda_attention_pointers to = { .q = at(p.qkv, 0, q),
                                                        .k = at(p.qkv, 0, q + p.d),
                                                        .v = at(p.qkv, 0, q + 2 * p.d),
                                                        .o = at(p.o, 0, (int64_t)j * p.d),
                                                        .stats = at(p.lse, 0, j),
                                                        .d_o = at(p.d_o, 0, (int64_t)j * p.d),
                                                        .dq = at(p.dqkv, 0, q),
                                                        .dk = at(p.dqkv, 0, q + p.d),
                                                        .dv = at(p.dqkv, 0, q + 2 * p.d),
                                                        .qkv_offset = offset + i,
                                                        .o_offset = offset + all + 1 + i,
                                                        .stats_offset = offset + 2 * (all + 1) + i,
                                                        .length = length + i,
                                                        .workspace = (char *)p.work->data + used,
                                                        .workspace_bytes =
                                                            (size_t)tensor_numel(p.work) - used };
            cuda_attention_run(cuda_context_of(p.s), &shape, &to);
        }
}

template <class T> static void run_simple(const problem &p)
{
    const view a = {
        (const int32_t *)p.cu->data, (int)p.segments(), p.n, p.g, p.d, p.causal, p.rows()
    };
    const cudaStream_t st = cuda_stream_of(p.s);
    const unsigned queries = blocks_for(p.rows() * p.n, WARPS),
                   keys = blocks_for(p.rows() * p.g, WARPS);
    const matrix<const T> qkv = as_matrix<const T>(p.qkv);
    if (p.d > SIMPLE_MAX_D)
        FATAL(EXIT_INTERNAL, "attention heads of width %d: at most %d", p.d, SIMPLE_MAX_D);
    if (!p.backward) {
        simple_forward<T>
            <<<queries, WARPS * WARP, 0, st>>>(a, qkv, as_matrix<T>(p.o), as_matrix<float>(p.lse));
        CHECK_LAUNCH();
        return;
    }
    float *delta = (float *)p.work->data;
    ASSERT(tensor_numel(p.work) >= p.rows() * p.n * (int64_t)sizeof(float));
    const matrix<const T> d_o = as_matrix<const T>(p.d_o);
    const matrix<const float> lse = as_matrix<const float>(p.lse);
    simple_delta<T><<<queries, WARPS * WARP, 0, st>>>(a, as_matrix<const T>(p.o), d_o, delta);
    CHECK_LAUNCH();
    simple_dq<T><<<queries, WARPS * WARP, 0, st>>>(a, qkv, lse, d_o, delta, as_matrix<T>(p.dqkv));
    CHECK_LAUNCH();
    simple_dkv<T><<<keys, WARPS * WARP, 0, st>>>(a, qkv, lse, d_o, delta, as_matrix<T>(p.dqkv));
    CHECK_LAUNCH();
}

static void run(const problem &p)
{
    if (p.rows() == 0)
        return;
    if (fits_cudnn(p) && p.segments() * p.max_len == p.rows() && (p.n != p.g || p.segments() == 1))
        run_plain(p);
    else if (fits_cudnn(p) && p.n == p.g)
        run_packed(p);
    else
        by_type(p.qkv, [&](auto zero) { run_simple<decltype(zero)>(p); });
}

extern "C" void cuda_attention_forward(struct stream *s, in_t qkv, in_t cu, int64_t max_len, int n,
                                       int g, int d, bool causal, in_t work, out_t o, out_t lse)
{
    run(problem{ s, qkv, cu, o, lse, NULL, work, NULL, max_len, n, g, d, causal, false, false });
}

extern "C" void cuda_attention_backward(struct stream *s, in_t qkv, in_t cu, int64_t max_len, int n,
                                        int g, int d, bool causal, in_t o, in_t lse, in_t do_,
                                        in_t work, out_t dqkv)
{
    run(problem{ s, qkv, cu, o, lse, do_, work, dqkv, max_len, n, g, d, causal, true, false });
}

extern "C" void cuda_attention_backward_any_order(struct stream *s, in_t qkv, in_t cu,
                                                  int64_t max_len, int n, int g, int d, bool causal,
                                                  in_t o, in_t lse, in_t do_, in_t work, out_t dqkv)
{
    run(problem{ s, qkv, cu, o, lse, do_, work, dqkv, max_len, n, g, d, causal, true, true });
}
