/* dense.cu - additions, activations and column sums; formulas: model.md 1.4, 2.5.
 *
 * All of it is bound by memory: 16-byte accesses, one pass. Each operation computes in fp32 and
 * rounds once, when it stores.
 */
#include "columns.cuh"
#include "vector.cuh"

enum { THREADS = 256 };

static bool same_shape(in_t a, in_t b)
{
    return tensor_rows(a) == tensor_rows(b) && tensor_cols(a) == tensor_cols(b);
}

/* ---- element by element ---- */

/* out = f(a, b), where out may be a or b and a missing operand (p = NULL) reads as 0. grid.y walks
 * rows. */
template <bool VEC, class A, class B, class O, class F>
static __global__ void __launch_bounds__(THREADS)
    map_kernel(matrix<const A> a, matrix<const B> b, matrix<O> out, F f)
{
    const int64_t c = (blockIdx.x * (int64_t)THREADS + threadIdx.x) * CHUNK;
    const int n = chunk_size(out.cols, c);
    if (n == 0)
        return;
    for (int64_t r = blockIdx.y; r < out.rows; r += gridDim.y) {
        float x[CHUNK] = {}, y[CHUNK] = {};
        if (a.p)
            load_chunk<VEC>(a.row(r) + c, n, x);
        if (b.p)
            load_chunk<VEC>(b.row(r) + c, n, y);
#pragma unroll
        for (int i = 0; i < CHUNK; i++)
            x[i] = f(x[i], y[i]);
        store_chunk<VEC>(out.row(r) + c, n, x);
    }
}

/* A view, or nothing; dense views together become one long row. */
template <class T> static matrix<T> operand(in_t t, bool flat)
{
    if (!t)
        return matrix<T>{ NULL, 0, 0, 0 };
    matrix<T> m = as_matrix<T>(t);
    if (flat)
        m.cols *= m.rows, m.rows = 1;
    return m;
}

template <class A, class B, class O, class F>
static void map(struct stream *s, in_t a, in_t b, out_t out, F f)
{
    if (tensor_numel(out) == 0)
        return;
    const bool flat = all_dense({ a, b, out });
    const matrix<O> to = operand<O>(out, flat);
    const dim3 grid(blocks_for(to.cols, THREADS * CHUNK),
                    to.rows < 65535 ? (unsigned)to.rows : 65535);
    by_flag(chunks_aligned({ a, b, out }), [&](auto vec) {
        map_kernel<decltype(vec)::value><<<grid, THREADS, 0, cuda_stream_of(s)>>>(
            operand<const A>(a, flat), operand<const B>(b, flat), to, f);
    });
    CHECK_LAUNCH();
}

struct plus {
    __device__ float operator()(float x, float y) const
    {
        return x + y;
    }
};
struct plus_scaled {
    float scale;
    __device__ float operator()(float x, float y) const
    {
        return x + scale * y;
    }
};

extern "C" void cuda_add(struct stream *s, in_t x, out_t y)
{
    ASSERT(same_shape(x, y));
    by_type(x, [&](auto a) {
        by_type(y, [&](auto b) { map<decltype(a), decltype(b), decltype(b)>(s, x, y, y, plus()); });
    });
}

extern "C" void cuda_add_bias(struct stream *s, in_t bias, out_t y)
{
    ASSERT(tensor_numel(bias) == tensor_cols(y));
    struct tensor every = *y; /* rows that all are the bias */
    every.data = bias->data;
    every.dtype = bias->dtype;
    every.ld = 0;
    by_type(bias, [&](auto a) {
        by_type(y, [&](auto b) {
            map<decltype(a), decltype(b), decltype(b)>(s, &every, y, y, plus());
        });
    });
}

/* Declared in cuda_util.h. */
extern "C" void cuda_gemm_finish(struct stream *s, const float *product, double beta, in_t c,
                                 out_t d)
{
    const struct tensor p =
        tensor_2d((void *)product, DTYPE_F32, PLACE_DEVICE, tensor_rows(d), tensor_cols(d));
    by_type(c ? c : d, [&](auto b) {
        by_type(d, [&](auto o) {
            map<float, decltype(b), decltype(o)>(s, product ? &p : NULL, c, d,
                                                 plus_scaled{ (float)beta });
        });
    });
}

/* What bf16 leaves of a number has as many digits again, twice. */
__device__ __forceinline__ void terms_of(float x, bf16 (&term)[3])
{
#pragma unroll
    for (int i = 0; i < 3; i++) {
        term[i] = from_float<bf16>(x);
        x -= to_float(term[i]);
    }
}

__device__ __forceinline__ void terms_of(bf16 x, bf16 (&term)[3])
{
    term[0] = term[1] = term[2] = x;
}

template <class T>
static __global__ void __launch_bounds__(THREADS)
    terms_kernel(matrix<const T> t, bf16 *to, int64_t apart, int64_t ld)
{
    for (int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x; i < t.rows * t.cols;
         i += (int64_t)gridDim.x * THREADS) {
        const int64_t r = i / t.cols, c = i % t.cols;
        bf16 term[3];
        terms_of(t.row(r)[c], term);
#pragma unroll
        for (int k = 0; k < 3; k++)
            to[k * apart + r * ld + c] = term[k];
    }
}

/* Declared in cuda_util.h. */
extern "C" void cuda_gemm_terms(struct stream *s, in_t t, void *to, int64_t apart, int64_t ld)
{
    by_type(t, [&](auto zero) {
        using T = decltype(zero);
        terms_kernel<T><<<blocks_for(tensor_numel(t), THREADS), THREADS, 0, cuda_stream_of(s)>>>(
            as_matrix<const T>(t), (bf16 *)to, apart, ld);
    });
    CHECK_LAUNCH();
}

static __global__ void __launch_bounds__(THREADS)
    add_terms_kernel(const float *products, float beta, matrix<const float> c, matrix<float> d)
{
    const int64_t n = d.rows * d.cols;
    for (int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * THREADS) {
        const int64_t row = i / d.cols, col = i % d.cols;
        const float sum = products[i] + (products[n + i] + products[2 * n + i]);
        d.row(row)[col] = c.p ? sum + beta * c.row(row)[col] : sum;
    }
}

/* Declared in cuda_util.h. */
extern "C" void cuda_gemm_add_terms(struct stream *s, const float *products, double beta, in_t c,
                                    out_t d)
{
    add_terms_kernel<<<blocks_for(tensor_numel(d), THREADS), THREADS, 0, cuda_stream_of(s)>>>(
        products, (float)beta, operand<const float>(c, false), as_matrix<float>(d));
    CHECK_LAUNCH();
}

/* ---- activations ---- */

/* fgelu of model.md 2.5 through exp(-2u), u the argument of its tanh: (1+tanh u)/2 = 1/(1+exp(-2u))
 * and (1-tanh u)/2 = 1/(1+exp(2u)) lose no digits on either side. Results in bf16 do with the
 * hardware's exponential and reciprocal. */
template <bool FAST> __device__ __forceinline__ float gelu_exp(float x)
{
    const float u = -2 * 0.7978845608f * x * (1 + 0.044715f * x * x);
    return FAST ? __expf(u) : expf(u);
}

template <bool FAST> __device__ __forceinline__ float divide(float x, float y)
{
    /* __fdividef gives 0 for a divisor above 2^126, which is the limit wanted here as well. */
    return FAST ? __fdividef(x, y) : x / y;
}

template <bool FAST> __device__ __forceinline__ float gelu(float x)
{
    return divide<FAST>(x, 1 + gelu_exp<FAST>(x));
}

/* 1-tanh(u)^2 is four times the product of the two halves. */
template <bool FAST> __device__ __forceinline__ float gelu_derivative(float x)
{
    const float e = gelu_exp<FAST>(x), gate = divide<FAST>(1, 1 + e),
                rest = divide<FAST>(1, 1 + divide<FAST>(1, e));
    return gate + 2 * x * gate * rest * 0.7978845608f * (1 + 0.134145f * x * x);
}

/* Of x, and of x and the gradient of what became of it. A NaN stays one. */
struct relu2_forward {
    __device__ float operator()(float x, float) const
    {
        return x < 0 ? 0.0f : x * x;
    }
};
struct relu2_backward {
    __device__ float operator()(float x, float dy) const
    {
        return x < 0 ? 0.0f : 2 * x * dy;
    }
};
template <bool FAST> struct gelu_forward {
    __device__ float operator()(float x, float) const
    {
        return gelu<FAST>(x);
    }
};
template <bool FAST> struct gelu_backward {
    __device__ float operator()(float x, float dy) const
    {
        return gelu_derivative<FAST>(x) * dy;
    }
};

extern "C" void cuda_activation_forward(struct stream *s, enum backend_activation f, in_t x,
                                        out_t y)
{
    ASSERT(same_shape(x, y) && x->dtype == y->dtype);
    by_type(x, [&](auto zero) {
        using T = decltype(zero);
        if (f == BACKEND_RELU2)
            map<T, T, T>(s, x, NULL, y, relu2_forward());
        else
            map<T, T, T>(s, x, NULL, y, gelu_forward<sizeof(T) == 2>());
    });
}

extern "C" void cuda_activation_backward(struct stream *s, enum backend_activation f, in_t x,
                                         in_t dy, out_t dx)
{
    ASSERT(same_shape(x, dy) && same_shape(x, dx) && x->dtype == dy->dtype &&
           x->dtype == dx->dtype);
    by_type(x, [&](auto zero) {
        using T = decltype(zero);
        if (f == BACKEND_RELU2)
            map<T, T, T>(s, x, dy, dx, relu2_backward());
        else
            map<T, T, T>(s, x, dy, dx, gelu_backward<sizeof(T) == 2>());
    });
}

/* ---- column sums ---- */

enum { BIAS_LANES = 32, BIAS_GROUPS = 8, BIAS_BLOCKS = 1056 };

/* A block sums run `blockIdx.y` of rows for 32 chunks of columns; a group of 32 threads takes every
 * 8th row of the run. */
template <bool VEC, class T>
static __global__ void __launch_bounds__(BIAS_LANES *BIAS_GROUPS)
    bias_kernel(matrix<const T> dy, int64_t run, float *partial)
{
    __shared__ float group[BIAS_GROUPS][CHUNK][BIAS_LANES];
    const int lane = threadIdx.x % BIAS_LANES, own = threadIdx.x / BIAS_LANES;
    const int64_t c = (blockIdx.x * (int64_t)BIAS_LANES + lane) * CHUNK, first = blockIdx.y * run,
                  end = first + run < dy.rows ? first + run : dy.rows;
    const int n = chunk_size(dy.cols, c);
    float sum[CHUNK] = {};
#pragma unroll 8
    for (int64_t r = first + own; r < end; r += BIAS_GROUPS) {
        float v[CHUNK];
        load_chunk<VEC>(dy.row(r) + c, n, v);
#pragma unroll
        for (int i = 0; i < CHUNK; i++)
            sum[i] += v[i];
    }
#pragma unroll
    for (int i = 0; i < CHUNK; i++)
        group[own][i][lane] = sum[i];
    __syncthreads();
    if (own != 0)
        return;
#pragma unroll
    for (int i = 0; i < CHUNK; i++)
        for (int k = 1; k < BIAS_GROUPS; k++)
            sum[i] += group[k][i][lane];
    store_chunk<false>(partial + blockIdx.y * dy.cols + c, n, sum);
}

extern "C" void cuda_bias_backward(struct stream *s, in_t dy, out_t dbias)
{
    const int64_t rows = tensor_rows(dy), cols = tensor_cols(dy);
    ASSERT(dbias->dtype == DTYPE_F32 && tensor_numel(dbias) == cols);
    if (rows == 0 || cols == 0)
        return;
    const int64_t across = (cols + BIAS_LANES * CHUNK - 1) / (BIAS_LANES * CHUNK);
    const int64_t wanted = (BIAS_BLOCKS + across - 1) / across,
                  most = (rows + 4 * BIAS_GROUPS - 1) / (4 * BIAS_GROUPS);
    const int64_t run = (rows + (wanted < most ? wanted : most) - 1) /
                        (wanted < most ? wanted : most),
                  parts = (rows + run - 1) / run;
    float *partial = (float *)cuda_scratch(s, (size_t)(parts * cols) * sizeof(float));
    by_type(dy, [&](auto zero) {
        using T = decltype(zero);
        by_flag(chunks_aligned({ dy }), [&](auto vec) {
            bias_kernel<decltype(vec)::value>
                <<<dim3((unsigned)across, (unsigned)parts), BIAS_LANES * BIAS_GROUPS, 0,
                   cuda_stream_of(s)>>>(as_matrix<const T>(dy), run, partial);
        });
    });
    CHECK_LAUNCH();
    columns_finish(cuda_stream_of(s), partial, (int)parts, cols, cols, (float *)dbias->data);
}

/* ---- normalisations (model.md 1.4): RMSNorm, and with CENTRED LayerNorm ---- */

/* A block holds R whole rows in registers, as they lie in memory: thread t has chunks t, t +
 * threads, ... (K of them). What is needed after the sum over a row is read before it. */
/* chunks of a row */
enum { NORM_NARROW = 192, NORM_MIDDLE = 384, NORM_WIDE = 2 * 512, NORM_WIDEST = 4 * 1024 };

/* Threads a block has at most, and blocks that shall fit on a multiprocessor at once. The backward
 * pass runs that many on each of 132, whatever the device has: the order of its sums must not
 * depend on the device. */
enum { NORM_MULTIPROCESSORS = 132 };
constexpr int norm_bound(int k, int r)
{
    return k > 2 ? 1024 : k > 1 ? 512 : r > 1 ? NORM_NARROW : NORM_MIDDLE;
}
constexpr int norm_resident(int k, int r)
{
    return k > 1 ? 1 : r > 1 ? 3 : 2;
}

__device__ __forceinline__ int64_t own_column(int k)
{
    return (threadIdx.x + k * (int64_t)blockDim.x) * CHUNK;
}

/* Each x[i] summed over the block, given to every thread. Barrier inside; `shared` may be written
 * again after the next one. */
template <int N> __device__ __forceinline__ void block_sums(float (&x)[N], float (*shared)[WARP])
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
#pragma unroll
    for (int i = 0; i < N; i++) {
        x[i] = warp_sum(x[i]);
        if (lane == 0)
            shared[i][warp] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++)
        x[i] = warp_sum(lane < warps ? shared[i][lane] : 0.0f);
}

template <bool VEC, bool CENTRED, class T, int K, int R>
static __global__ void __launch_bounds__(norm_bound(K, R / 2))
    norm_forward_kernel(matrix<const T> x, const T *w, const T *b, float eps, matrix<T> y,
                        float *mean, float *rs)
{
    __shared__ float level[R][WARP], square[R][WARP];
    const int64_t first = blockIdx.x * (int64_t)R;
    const float share = 1.0f / (float)x.cols;
    chunk<T> row[R][K], weight[K], bias[K];
    float mu[R] = {}, scale[R] = {}, v[CHUNK];
#pragma unroll
    for (int k = 0; k < K; k++) {
        const int n = chunk_size(x.cols, own_column(k));
#pragma unroll
        for (int r = 0; r < R; r++)
            row[r][k] =
                read_chunk<VEC>(x.row(first + r) + own_column(k), first + r < x.rows ? n : 0);
        weight[k] = read_chunk<VEC>(w + own_column(k), n);
        if (CENTRED)
            bias[k] = read_chunk<VEC>(b + own_column(k), n);
    }
    if (CENTRED) {
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int k = 0; k < K; k++) {
                widen_chunk(row[r][k], v);
#pragma unroll
                for (int i = 0; i < CHUNK; i++)
                    mu[r] += v[i];
            }
        block_sums(mu, level);
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
        mu[r] *= share;
#pragma unroll
        for (int k = 0; k < K; k++) {
            const int n = chunk_size(x.cols, own_column(k));
            widen_chunk(row[r][k], v);
#pragma unroll
            for (int i = 0; i < CHUNK; i++)
                scale[r] += !CENTRED ? v[i] * v[i] : i < n ? (v[i] - mu[r]) * (v[i] - mu[r]) : 0.0f;
        }
    }
    block_sums(scale, square);
#pragma unroll
    for (int r = 0; r < R; r++) {
        scale[r] = 1.0f / sqrtf(scale[r] * share + eps);
        if (first + r >= x.rows)
            return;
        if (threadIdx.x == 0) {
            rs[first + r] = scale[r];
            if (CENTRED)
                mean[first + r] = mu[r];
        }
#pragma unroll
        for (int k = 0; k < K; k++) {
            float factor[CHUNK], shift[CHUNK] = {};
            widen_chunk(row[r][k], v);
            widen_chunk(weight[k], factor);
            if (CENTRED)
                widen_chunk(bias[k], shift);
#pragma unroll
            for (int i = 0; i < CHUNK; i++)
                v[i] = (CENTRED ? v[i] - mu[r] : v[i]) * scale[r] * factor[i] + shift[i];
            store_chunk<VEC>(y.row(first + r) + own_column(k), chunk_size(x.cols, own_column(k)),
                             v);
        }
    }
}

/* A block's share of R rows: of x, dy and dx, and the rows' statistics. */
template <class T, int K, int R> struct norm_rows {
    chunk<T> x[R][K], dy[R][K], dx[R][K];
    float mean[R], rs[R];
};

template <bool VEC, bool CENTRED, class T, int K, int R>
__device__ __forceinline__ void norm_read(norm_rows<T, K, R> &own, int64_t first,
                                          const matrix<const T> &x, const float *mean,
                                          const float *rs, const matrix<const T> &dy,
                                          const matrix<T> &dx)
{
#pragma unroll
    for (int r = 0; r < R; r++) {
        const bool there = first + r < x.rows;
#pragma unroll
        for (int k = 0; k < K; k++) {
            const int n = there ? chunk_size(x.cols, own_column(k)) : 0;
            own.x[r][k] = read_chunk<VEC>(x.row(first + r) + own_column(k), n);
            own.dy[r][k] = read_chunk<VEC>(dy.row(first + r) + own_column(k), n);
            own.dx[r][k] = read_chunk<VEC>((const T *)dx.row(first + r) + own_column(k), n);
        }
        own.mean[r] = CENTRED && there ? mean[first + r] : 0.0f;
        own.rs[r] = there ? rs[first + r] : 0.0f;
    }
}

/* With xh = (x-mean)*rs (RMSNorm: mean 0): dx += rs*(w dy - [mean(w dy)] - xh mean(w dy xh)), dw +=
 * dy xh, db += dy. Blocks take groups of R rows in turn, reading the next group while they compute;
 * their sums for dw and db go to partial[block] as [dw | db]. */
template <bool VEC, bool CENTRED, class T, int K, int R>
static __global__ void __launch_bounds__(norm_bound(K, R), norm_resident(K, R))
    norm_backward_kernel(matrix<const T> x, const T *w, const float *mean, const float *rs,
                         matrix<const T> dy, matrix<T> dx, float *partial)
{
    __shared__ float shared[2][2 * R][WARP];
    const float share = 1.0f / (float)x.cols;
    chunk<T> weight[K];
    float dw[K][CHUNK] = {}, db[K][CHUNK] = {};
    norm_rows<T, K, R> own, next;
    const int64_t step = gridDim.x * (int64_t)R;
    int turn = 0;
    norm_read<VEC, CENTRED>(own, blockIdx.x * (int64_t)R, x, mean, rs, dy, dx);
#pragma unroll
    for (int k = 0; k < K; k++)
        weight[k] = read_chunk<VEC>(w + own_column(k), chunk_size(x.cols, own_column(k)));
    for (int64_t first = blockIdx.x * (int64_t)R; first < x.rows;
         first += step, turn ^= 1, own = next) {
        float sum[2 * R] = {}, v[CHUNK], g[CHUNK], factor[CHUNK];
        norm_read<VEC, CENTRED>(next, first + step, x, mean, rs, dy, dx);
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int k = 0; k < K; k++) {
                widen_chunk(own.x[r][k], v);
                widen_chunk(own.dy[r][k], g);
                widen_chunk(weight[k], factor);
#pragma unroll
                for (int i = 0; i < CHUNK; i++) {
                    v[i] = (v[i] - own.mean[r]) * own.rs[r];
                    dw[k][i] += g[i] * v[i];
                    sum[r] += g[i] * factor[i] * v[i];
                    if (CENTRED) {
                        db[k][i] += g[i];
                        sum[R + r] += g[i] * factor[i];
                    }
                }
            }
        block_sums(sum, shared[turn]);
#pragma unroll
        for (int r = 0; r < R; r++) {
            const float along = sum[r] * share, level = sum[R + r] * share;
            if (first + r >= x.rows)
                break;
#pragma unroll
            for (int k = 0; k < K; k++) {
                float old[CHUNK];
                widen_chunk(own.x[r][k], v);
                widen_chunk(own.dy[r][k], g);
                widen_chunk(own.dx[r][k], old);
                widen_chunk(weight[k], factor);
#pragma unroll
                for (int i = 0; i < CHUNK; i++)
                    v[i] = old[i] + own.rs[r] * (g[i] * factor[i] - level -
                                                 (v[i] - own.mean[r]) * own.rs[r] * along);
                store_chunk<VEC>(dx.row(first + r) + own_column(k),
                                 chunk_size(x.cols, own_column(k)), v);
            }
        }
    }
    if (!partial)
        return;
    partial += blockIdx.x * x.cols * (CENTRED ? 2 : 1);
#pragma unroll
    for (int k = 0; k < K; k++) {
        const int n = chunk_size(x.cols, own_column(k));
        store_chunk<false>(partial + own_column(k), n, dw[k]);
        if (CENTRED)
            store_chunk<false>(partial + x.cols + own_column(k), n, db[k]);
    }
}

/* Threads that hold a row of `cols` in K chunks each. */
static unsigned norm_threads(int64_t cols, int k)
{
    const int64_t chunks = (cols + CHUNK - 1) / CHUNK, threads = (chunks + k - 1) / k;
    return (unsigned)((threads + WARP - 1) / WARP * WARP);
}

/* Calls f with K, the chunks a thread takes, and R, the rows a block of the forward pass takes, as
 * constants. The backward pass keeps more of each row and takes half as many. */
template <class F> static void by_width(int64_t cols, F f)
{
    const int64_t chunks = (cols + CHUNK - 1) / CHUNK;
    if (chunks > NORM_WIDEST)
        FATAL(EXIT_INTERNAL,
              "rows of %lld elements are too wide to be normalised on the GPU: at most %d",
              (long long)cols, NORM_WIDEST * CHUNK);
    if (chunks <= NORM_NARROW)
        f(std::integral_constant<int, 1>(), std::integral_constant<int, 4>());
    else if (chunks <= NORM_MIDDLE)
        f(std::integral_constant<int, 1>(), std::integral_constant<int, 2>());
    else if (chunks <= NORM_WIDE)
        f(std::integral_constant<int, 2>(), std::integral_constant<int, 1>());
    else
        f(std::integral_constant<int, 4>(), std::integral_constant<int, 1>());
}

template <bool CENTRED>
static void norm_forward(struct stream *s, in_t x, in_t w, in_t b, double eps, out_t y, out_t mean,
                         out_t rs)
{
    const int64_t rows = tensor_rows(x), cols = tensor_cols(x);
    ASSERT(same_shape(x, y) && x->dtype == y->dtype && x->dtype == w->dtype &&
           tensor_numel(w) == cols);
    ASSERT(rs->dtype == DTYPE_F32 && tensor_numel(rs) == rows);
    if (CENTRED)
        ASSERT(x->dtype == b->dtype && tensor_numel(b) == cols && mean->dtype == DTYPE_F32 &&
               tensor_numel(mean) == rows);
    if (rows == 0 || cols == 0)
        return;
    by_type(x, [&](auto zero) {
        using T = decltype(zero);
        by_width(cols, [&](auto chunks, auto group) {
            by_flag(chunks_aligned({ x, y, w, b }), [&](auto vec) {
                constexpr int K = decltype(chunks)::value, R = decltype(group)::value;
                norm_forward_kernel<decltype(vec)::value, CENTRED, T, K, R>
                    <<<blocks_for(rows, R), norm_threads(cols, K), 0, cuda_stream_of(s)>>>(
                        as_matrix<const T>(x), (const T *)w->data,
                        CENTRED ? (const T *)b->data : NULL, (float)eps, as_matrix<T>(y),
                        CENTRED ? (float *)mean->data : NULL, (float *)rs->data);
            });
        });
    });
    CHECK_LAUNCH();
}

template <bool CENTRED>
static void norm_backward(struct stream *s, in_t x, in_t w, in_t mean, in_t rs, in_t dy, out_t dx,
                          out_t dw, out_t db)
{
    const int64_t rows = tensor_rows(x), cols = tensor_cols(x);
    const cudaStream_t stream = cuda_stream_of(s);
    ASSERT(same_shape(x, dy) && same_shape(x, dx) && x->dtype == dy->dtype &&
           x->dtype == dx->dtype);
    ASSERT(x->dtype == w->dtype && tensor_numel(w) == cols && rs->dtype == DTYPE_F32 &&
           tensor_numel(rs) == rows);
    ASSERT(!dw || (dw->dtype == DTYPE_F32 && tensor_numel(dw) == cols));
    ASSERT(!CENTRED || (mean->dtype == DTYPE_F32 && tensor_numel(mean) == rows && !dw == !db));
    if (rows == 0 || cols == 0)
        return;
    int parts = 0;
    float *partial = NULL;
    by_type(x, [&](auto zero) {
        using T = decltype(zero);
        by_width(cols, [&](auto chunks, auto group) {
            by_flag(chunks_aligned({ x, w, dy, dx }), [&](auto vec) {
                constexpr int K = decltype(chunks)::value,
                              R = K == 1 ? decltype(group)::value / 2 : 1;
                const int64_t most = NORM_MULTIPROCESSORS * norm_resident(K, R),
                              groups = (rows + R - 1) / R;
                parts = (int)(groups < most ? groups : most);
                if (dw)
                    partial = (float *)cuda_scratch(s, (size_t)parts * cols * (CENTRED ? 2 : 1) *
                                                           sizeof(float));
                norm_backward_kernel<decltype(vec)::value, CENTRED, T, K, R>
                    <<<parts, norm_threads(cols, K), 0, stream>>>(
                        as_matrix<const T>(x), (const T *)w->data,
                        CENTRED ? (const float *)mean->data : NULL, (const float *)rs->data,
                        as_matrix<const T>(dy), as_matrix<T>(dx), partial);
            });
        });
    });
    CHECK_LAUNCH();
    if (!dw)
        return;
    columns_finish(stream, partial, parts, CENTRED ? 2 * cols : cols, cols, (float *)dw->data);
    if (CENTRED)
        columns_finish(stream, partial + cols, parts, 2 * cols, cols, (float *)db->data);
}

extern "C" void cuda_rmsnorm_forward(struct stream *s, in_t x, in_t w, double eps, out_t y,
                                     out_t rs)
{
    norm_forward<false>(s, x, w, NULL, eps, y, NULL, rs);
}

extern "C" void cuda_rmsnorm_backward(struct stream *s, in_t x, in_t w, in_t rs, in_t dy, out_t dx,
                                      out_t dw)
{
    norm_backward<false>(s, x, w, NULL, rs, dy, dx, dw, NULL);
}

extern "C" void cuda_layernorm_forward(struct stream *s, in_t x, in_t w, in_t b, double eps,
                                       out_t y, out_t mean, out_t rs)
{
    norm_forward<true>(s, x, w, b, eps, y, mean, rs);
}

extern "C" void cuda_layernorm_backward(struct stream *s, in_t x, in_t w, in_t mean, in_t rs,
                                        in_t dy, out_t dx, out_t dw, out_t db)
{
    norm_backward<true>(s, x, w, mean, rs, dy, dx, dw, db);
}
