/* optim.cu - gradient statistics, AdamW (parallel.md 7.3) and the experts' bias (model.md 1.8). One
 * pass over memory each. */
#include "block.cuh"
#include "vector.cuh"

enum { THREADS = 256, BLOCKS = 1056 };

/* A matrix as blocks walk it: chunk i of all chunks, row by row. */
template <bool VEC, class F>
__device__ __forceinline__ void each_chunk(const matrix<const float> &x, F f)
{
    const int64_t per_row = (x.cols + CHUNK - 1) / CHUNK, n = x.rows * per_row;
    for (int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * THREADS) {
        const int64_t r = i / per_row, c = i % per_row * CHUNK;
        float v[CHUNK];
        load_chunk<VEC>(x.row(r) + c, chunk_size(x.cols, c), v);
        f(v, chunk_size(x.cols, c));
    }
}

template <bool VEC>
static __global__ void __launch_bounds__(THREADS)
    squares_kernel(matrix<const float> x, double *partial)
{
    __shared__ double shared[THREADS];
    double sum = 0;
    each_chunk<VEC>(x, [&](const float(&v)[CHUNK], int n) {
        float part = 0;
#pragma unroll
        for (int i = 0; i < CHUNK; i++)
            part += v[i] * v[i];
        sum += part;
    });
    sum = block_total(sum, shared);
    if (threadIdx.x == 0)
        partial[blockIdx.x] = sum;
}

static __global__ void __launch_bounds__(THREADS)
    squares_finish(const double *partial, int n, float *total)
{
    __shared__ double shared[THREADS];
    double sum = 0;
    for (int i = threadIdx.x; i < n; i += THREADS)
        sum += partial[i];
    sum = block_total(sum, shared);
    if (threadIdx.x == 0)
        *total = (float)(*total + sum);
}

/* Whole numbers may be added in any order. */
template <bool VEC>
static __global__ void __launch_bounds__(THREADS)
    zeros_kernel(matrix<const float> x, unsigned long long *total)
{
    unsigned count = 0;
    each_chunk<VEC>(x, [&](const float(&v)[CHUNK], int n) {
#pragma unroll
        for (int i = 0; i < CHUNK; i++)
            count += i < n && v[i] == 0.0f;
    });
    for (int o = WARP / 2; o; o /= 2)
        count += __shfl_xor_sync(0xffffffffu, count, o);
    if (threadIdx.x % WARP == 0 && count)
        atomicAdd(total, (unsigned long long)count);
}

/* Dense rows are one long row. */
template <class T> static matrix<T> flat(in_t t)
{
    matrix<T> m = as_matrix<T>(t);
    if (all_dense({ t }))
        m.cols *= m.rows, m.rows = 1;
    return m;
}

static unsigned blocks_of(int64_t n, unsigned most)
{
    const unsigned b = blocks_for(n, THREADS * CHUNK);
    return b < most ? b : most;
}

extern "C" void cuda_sum_squares(struct stream *s, in_t x, out_t total)
{
    const int64_t n = tensor_numel(x);
    ASSERT(x->dtype == DTYPE_F32 && total->dtype == DTYPE_F32);
    if (n == 0)
        return;
    const unsigned blocks = blocks_of(n, BLOCKS);
    double *partial = (double *)cuda_scratch(s, blocks * sizeof(double));
    by_flag(chunks_aligned({ x }), [&](auto vec) {
        squares_kernel<decltype(vec)::value>
            <<<blocks, THREADS, 0, cuda_stream_of(s)>>>(flat<const float>(x), partial);
    });
    CHECK_LAUNCH();
    squares_finish<<<1, THREADS, 0, cuda_stream_of(s)>>>(partial, (int)blocks,
                                                         (float *)total->data);
    CHECK_LAUNCH();
}

extern "C" void cuda_count_zeros(struct stream *s, in_t x, out_t total)
{
    const int64_t n = tensor_numel(x);
    ASSERT(x->dtype == DTYPE_F32 && total->dtype == DTYPE_I64);
    if (n == 0)
        return;
    by_flag(chunks_aligned({ x }), [&](auto vec) {
        zeros_kernel<decltype(vec)::value><<<blocks_of(n, BLOCKS), THREADS, 0, cuda_stream_of(s)>>>(
            flat<const float>(x), (unsigned long long *)total->data);
    });
    CHECK_LAUNCH();
}

/* One thread adds, in ascending order: the same bits as on the host. The others fetch. */
static __global__ void __launch_bounds__(THREADS)
    sum_wide_kernel(const float *x, int64_t n, double *total)
{
    __shared__ float piece[THREADS];
    double sum = 0;
    for (int64_t first = 0; first < n; first += THREADS) {
        const int count = n - first < THREADS ? (int)(n - first) : THREADS;
        if ((int)threadIdx.x < count)
            piece[threadIdx.x] = x[first + threadIdx.x];
        __syncthreads();
        for (int i = 0; i < count && threadIdx.x == 0; i++)
            sum += piece[i];
        __syncthreads();
    }
    if (threadIdx.x == 0)
        *total = sum;
}

extern "C" void cuda_sum_wide(struct stream *s, in_t x, out_t total)
{
    ASSERT(x->dtype == DTYPE_F32 && total->dtype == DTYPE_F64 && all_dense({ x }));
    sum_wide_kernel<<<1, THREADS, 0, cuda_stream_of(s)>>>((const float *)x->data, tensor_numel(x),
                                                          (double *)total->data);
    CHECK_LAUNCH();
}

enum { MOST_MODULES = 8 };
struct module_factors {
    double v[MOST_MODULES];
};

/* One thread; every operation is rounded by itself, as the reference's is. */
static __global__ void decide_kernel(const double *rows, int64_t ranks, int modules, double tokens,
                                     module_factors factor, double clip, double threshold,
                                     double *out)
{
    const int64_t n = modules + 1;
    double loss = 0, norm = 0, scale = 1;
    int worst = 0, bad = -1;
    for (int64_t r = 0; r < ranks; r++)
        loss += rows[r * n];
    loss = __ddiv_rn(loss, tokens > 1 ? tokens : 1);
    for (int i = 0; i < modules; i++) {
        double square = 0;
        for (int64_t r = 0; r < ranks; r++)
            square += rows[r * n + 1 + i];
        square = __dmul_rn(__dmul_rn(square, factor.v[i]), factor.v[i]);
        const int state = isnan(square) ? 2 : isinf(square) ? 1 : 0;
        if (state > worst) {
            worst = state;
            bad = i;
        }
        norm = __dadd_rn(norm, state ? 0 : square);
    }
    norm = worst == 2 ? NAN : worst == 1 ? INFINITY : __dsqrt_rn(norm);
    if (clip > 0 && clip < norm + 1e-6)
        scale = __ddiv_rn(clip, norm + 1e-6);
    const bool update = isfinite(loss) && bad < 0 && !(threshold > 0 && norm > threshold);
    for (int i = 0; i < modules; i++)
        out[i] = update ? __dmul_rn(factor.v[i], scale) : -1;
    out[modules] = loss;
    out[modules + 1] = norm;
    out[modules + 2] = bad;
}

extern "C" void cuda_decide_update(struct stream *s, in_t numbers, double tokens,
                                   const double *factor, double clip, double threshold,
                                   out_t result)
{
    const int modules = (int)tensor_cols(numbers) - 1;
    module_factors f;
    ASSERT(numbers->dtype == DTYPE_F64 && all_dense({ numbers }) && modules > 0 &&
           modules <= MOST_MODULES);
    ASSERT(result->dtype == DTYPE_F64 && tensor_numel(result) == modules + 3);
    for (int i = 0; i < modules; i++)
        f.v[i] = factor[i];
    decide_kernel<<<1, 1, 0, cuda_stream_of(s)>>>((const double *)numbers->data,
                                                  tensor_rows(numbers), modules, tokens, f, clip,
                                                  threshold, (double *)result->data);
    CHECK_LAUNCH();
}

struct adam {
    float lr, b1, c1, b2, c2, correct1, correct2, eps, wd;
};

/* Neighbouring threads have neighbouring pieces of 16 bytes of F32: the four streams that are read
 * and the three that are written back move in whole lines. One piece a thread: more of them, or
 * blocks that go on to others, were measured slower. */
enum { PIECE = 4 };

template <bool VEC>
__device__ __forceinline__ void load_piece(const float *p, int n, float (&v)[PIECE])
{
    if (VEC && n == PIECE) {
        const float4 raw = *(const float4 *)p;
        v[0] = raw.x, v[1] = raw.y, v[2] = raw.z, v[3] = raw.w;
        return;
    }
#pragma unroll
    for (int i = 0; i < PIECE; i++)
        v[i] = i < n ? p[i] : 0.0f;
}

template <bool VEC>
__device__ __forceinline__ void store_piece(float *p, int n, const float (&v)[PIECE])
{
    if (VEC && n == PIECE) {
        *(float4 *)p = make_float4(v[0], v[1], v[2], v[3]);
        return;
    }
#pragma unroll
    for (int i = 0; i < PIECE; i++)
        if (i < n)
            p[i] = v[i];
}

template <bool VEC>
__device__ __forceinline__ void store_piece(bf16 *p, int n, const float (&v)[PIECE])
{
    if (VEC && n == PIECE) {
        const __nv_bfloat162 low = __floats2bfloat162_rn(v[0], v[1]),
                             high = __floats2bfloat162_rn(v[2], v[3]);
        *(uint2 *)p = make_uint2(*(const unsigned *)&low, *(const unsigned *)&high);
        return;
    }
#pragma unroll
    for (int i = 0; i < PIECE; i++)
        if (i < n)
            p[i] = from_float<bf16>(v[i]);
}

template <bool VEC, class T>
static __global__ void __launch_bounds__(THREADS)
    adamw_kernel(adam o, const double *wide_factor, int64_t n, const float *grad, float *master,
                 float *m, float *v, T *param)
{
    const float factor = (float)*wide_factor;
    const int64_t at = (blockIdx.x * (int64_t)THREADS + threadIdx.x) * PIECE;
    const int size = n - at < PIECE ? (int)(n - at) : PIECE;
    float g[PIECE], p[PIECE], first[PIECE], second[PIECE];
    if (factor < 0 || at >= n)
        return;
    load_piece<VEC>(grad + at, size, g);
    load_piece<VEC>(master + at, size, p);
    load_piece<VEC>(m + at, size, first);
    load_piece<VEC>(v + at, size, second);
#pragma unroll
    for (int j = 0; j < PIECE; j++) {
        const float x = g[j] * factor;
        first[j] = o.b1 * first[j] + o.c1 * x;
        second[j] = o.b2 * second[j] + o.c2 * x * x;
        p[j] -=
            o.lr * (first[j] * o.correct1 / (sqrtf(second[j] * o.correct2) + o.eps) + o.wd * p[j]);
    }
    store_piece<VEC>(master + at, size, p);
    store_piece<VEC>(m + at, size, first);
    store_piece<VEC>(v + at, size, second);
    store_piece<VEC>(param + at, size, p);
}

extern "C" void cuda_adamw(struct stream *s, in_t grad, in_t factor, double lr, double beta1,
                           double beta2, double eps, double wd, int64_t step, out_t master, out_t m,
                           out_t v, out_t param)
{
    const int64_t n = tensor_numel(grad);
    ASSERT(factor->dtype == DTYPE_F64 && step >= 1 && tensor_numel(master) == n &&
           tensor_numel(m) == n && tensor_numel(v) == n && tensor_numel(param) == n);
    ASSERT(all_dense({ grad, master, m, v, param }));
    if (n == 0)
        return;
    const adam o = { (float)lr,
                     (float)beta1,
                     (float)(1 - beta1),
                     (float)beta2,
                     (float)(1 - beta2),
                     (float)(1 / (1 - pow(beta1, (double)step))),
                     (float)(1 / (1 - pow(beta2, (double)step))),
                     (float)eps,
                     (float)wd };
    by_type(param, [&](auto zero) {
        using T = decltype(zero);
        by_flag(chunks_aligned({ grad, master, m, v, param }), [&](auto vec) {
            adamw_kernel<decltype(vec)::value, T>
                <<<blocks_for(n, THREADS * PIECE), THREADS, 0, cuda_stream_of(s)>>>(
                    o, (const double *)factor->data, n, (const float *)grad->data,
                    (float *)master->data, (float *)m->data, (float *)v->data, (T *)param->data);
        });
    });
    CHECK_LAUNCH();
}

static __global__ void __launch_bounds__(THREADS)
    bias_kernel(float rate, int experts, float *bias, int64_t *count)
{
    __shared__ long long sums[THREADS];
    long long sum = 0;
    for (int e = threadIdx.x; e < experts; e += THREADS)
        sum += count[e];
    sum = block_total(sum, sums);
    /* count < mean without a division. */
    for (int e = threadIdx.x; e < experts; e += THREADS) {
        const long long own = count[e] * experts;
        bias[e] += own < sum ? rate : own > sum ? -rate : 0.0f;
        count[e] = 0;
    }
}

extern "C" void cuda_expert_bias_update(struct stream *s, double rate, out_t bias, out_t count)
{
    ASSERT(bias->dtype == DTYPE_F32 && count->dtype == DTYPE_I64 &&
           tensor_numel(bias) == tensor_numel(count));
    bias_kernel<<<1, THREADS, 0, cuda_stream_of(s)>>>((float)rate, (int)tensor_numel(bias),
                                                      (float *)bias->data, (int64_t *)count->data);
    CHECK_LAUNCH();
}
