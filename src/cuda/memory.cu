/* memory.cu - copies between any places, fills and casts.
 *
 * A copy from the host goes through pinned memory; one to the host is asynchronous when that is
 * pinned, else complete on return.
 *
 * A cast between host and device goes through the stream's scratch in pieces: the raw bytes cross
 * the bus, the kernel converts. Casts round to nearest even.
 */
#include <string.h>
#include "cuda_util.cuh"
#define RNG_CORE static __host__ __device__ __forceinline__
#include "rng_core.h"
#include "cuda_sizes.h"

enum { THREADS = 256, PER_THREAD = 4 };

static int64_t width_of(in_t t)
{
    return (int64_t)dtype_bytes(t->dtype);
}

static bool dense(in_t t)
{
    return t->ld == tensor_cols(t) || tensor_rows(t) <= 1;
}

/* From the host through pinned memory, in pieces: rows of at most a piece, or runs of a dense
 * tensor. False: no staging, or rows too wide. */
static bool upload(struct stream *s, in_t src, out_t dst)
{
    struct cuda_context *c = cuda_context_of(s);
    const bool flat = dense(src) && dense(dst);
    const int64_t width = width_of(src), row = flat ? 1 : tensor_cols(src) * width;
    const int64_t rows = flat ? tensor_numel(src) * width : tensor_rows(src),
                  per = CUDA_STAGING_PIECE / row;
    if (!c->staging || per == 0)
        return false;
    for (int64_t first = 0; first < rows; first += per) {
        const int64_t n = rows - first < per ? rows - first : per;
        const int64_t from_ld = flat ? row : src->ld * width, to_ld = flat ? row : dst->ld * width;
        const char *from = (const char *)src->data + first * from_ld;
        char *to = (char *)dst->data + first * to_ld, *pinned = (char *)cuda_stage(c, n * row);
        if (from_ld == row)
            memcpy(pinned, from, n * row);
        else
            for (int64_t i = 0; i < n; i++)
                memcpy(pinned + i * row, from + i * from_ld, row);
        if (to_ld == row)
            CHECK_CUDA(cudaMemcpyAsync(to, pinned, n * row, cudaMemcpyHostToDevice, c->stream));
        else
            CHECK_CUDA(cudaMemcpy2DAsync(to, to_ld, pinned, row, row, n, cudaMemcpyHostToDevice,
                                         c->stream));
        cuda_staged(c);
    }
    return true;
}

extern "C" void cuda_copy(struct stream *s, in_t src, out_t dst)
{
    const int64_t n = tensor_numel(src), width = width_of(src);
    ASSERT(src->dtype == dst->dtype && n == tensor_numel(dst));
    ASSERT((dense(src) && dense(dst)) || tensor_cols(src) == tensor_cols(dst));
    if (n == 0 || (src->place == PLACE_HOST && dst->place == PLACE_DEVICE && upload(s, src, dst)))
        return;
    const cudaStream_t st = cuda_stream_of(s);
    if (dense(src) && dense(dst))
        CHECK_CUDA(cudaMemcpyAsync(dst->data, src->data, n * width, cudaMemcpyDefault, st));
    else
        CHECK_CUDA(cudaMemcpy2DAsync(dst->data, dst->ld * width, src->data, src->ld * width,
                                     tensor_cols(src) * width, tensor_rows(src), cudaMemcpyDefault,
                                     st));
    /* Without staging: from pinned memory a copy only begins here, and its source may be written
     * next. */
    if (src->place == PLACE_HOST)
        CHECK_CUDA(cudaStreamSynchronize(st));
}

template <class T>
static __global__ void fill_kernel(T *p, int64_t cols, int64_t ld, int64_t n, T value)
{
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * blockDim.x)
        p[i / cols * ld + i % cols] = value;
}

template <class T> static void fill(struct stream *s, out_t t, T value)
{
    const int64_t n = tensor_numel(t);
    fill_kernel<T><<<blocks_for(n, THREADS * PER_THREAD), THREADS, 0, cuda_stream_of(s)>>>(
        (T *)t->data, dense(t) ? n : tensor_cols(t), t->ld, n, value);
    CHECK_LAUNCH();
}

extern "C" void cuda_fill(struct stream *s, out_t t, double value)
{
    const int64_t n = tensor_numel(t);
    if (n == 0)
        return;
    ASSERT(t->place == PLACE_DEVICE);
    if (value == 0.0 && dense(t)) {
        CHECK_CUDA(cudaMemsetAsync(t->data, 0, n * width_of(t), cuda_stream_of(s)));
        return;
    }
    switch (t->dtype) {
    case DTYPE_F32: fill<float>(s, t, (float)value); break;
    case DTYPE_F64: fill<double>(s, t, value); break;
    case DTYPE_BF16: fill<bf16>(s, t, __double2bfloat16(value)); break;
    case DTYPE_I32: fill<int32_t>(s, t, (int32_t)value); break;
    case DTYPE_I64: fill<int64_t>(s, t, (int64_t)value); break;
    case DTYPE_U8: fill<uint8_t>(s, t, (uint8_t)value); break;
    }
}

__device__ __forceinline__ double widen(float x)
{
    return x;
}
__device__ __forceinline__ double widen(double x)
{
    return x;
}
__device__ __forceinline__ double widen(bf16 x)
{
    return __bfloat162float(x);
}
template <class D> __device__ __forceinline__ D narrow(double x);
template <> __device__ __forceinline__ float narrow<float>(double x)
{
    return (float)x;
}
template <> __device__ __forceinline__ double narrow<double>(double x)
{
    return x;
}
template <> __device__ __forceinline__ bf16 narrow<bf16>(double x)
{
    return __double2bfloat16(x);
}

template <class S, class D>
static __global__ void cast_kernel(const S *src, int64_t src_ld, D *dst, int64_t dst_ld,
                                   int64_t cols, int64_t n)
{
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * blockDim.x) {
        const int64_t r = i / cols, c = i % cols;
        if constexpr (sizeof(S) <= 4 && sizeof(D) <= 4)
            dst[r * dst_ld + c] = from_float<D>(to_float(src[r * src_ld + c]));
        else
            dst[r * dst_ld + c] = narrow<D>(widen(src[r * src_ld + c]));
    }
}

template <class S, class D> static void cast(struct stream *s, in_t src, out_t dst)
{
    const int64_t n = tensor_numel(src), cols = dense(src) && dense(dst) ? n : tensor_cols(src);
    cast_kernel<S, D><<<blocks_for(n, THREADS * PER_THREAD), THREADS, 0, cuda_stream_of(s)>>>(
        (const S *)src->data, src->ld, (D *)dst->data, dst->ld, cols, n);
    CHECK_LAUNCH();
}

template <class S> static void cast_from(struct stream *s, in_t src, out_t dst)
{
    switch (dst->dtype) {
    case DTYPE_F32: cast<S, float>(s, src, dst); break;
    case DTYPE_F64: cast<S, double>(s, src, dst); break;
    case DTYPE_BF16: cast<S, bf16>(s, src, dst); break;
    default: FATAL(EXIT_INTERNAL, "cast to %s: only floating-point types", dtype_name(dst->dtype));
    }
}

static void cast_on_device(struct stream *s, in_t src, out_t dst)
{
    switch (src->dtype) {
    case DTYPE_F32: cast_from<float>(s, src, dst); break;
    case DTYPE_F64: cast_from<double>(s, src, dst); break;
    case DTYPE_BF16: cast_from<bf16>(s, src, dst); break;
    default: FATAL(EXIT_INTERNAL, "cast of %s: only floating-point types", dtype_name(src->dtype));
    }
}

extern "C" void cuda_cast(struct stream *s, in_t src, out_t dst)
{
    const int64_t rows = tensor_rows(src), cols = tensor_cols(src);
    ASSERT(rows == tensor_rows(dst) && cols == tensor_cols(dst));
    if (rows * cols == 0)
        return;
    if (src->place == PLACE_DEVICE && dst->place == PLACE_DEVICE) {
        cast_on_device(s, src, dst);
        return;
    }
    ASSERT(src->place != dst->place);
    /* One side is the host: it crosses the bus in its own type, through scratch. A vector is cut
     * into pieces as well. */
    const bool one = rows == 1;
    const int64_t length = one ? cols : rows, row = one ? 1 : cols;
    in_t host = src->place == PLACE_HOST ? src : dst;
    const int64_t fit =
        (int64_t)(cuda_context_of(s)->scratch_bytes / (size_t)(row * width_of(host)));
    if (fit < 1)
        FATAL(EXIT_INTERNAL, "cast of rows of %lld elements: too wide for the scratch",
              (long long)row);
    for (int64_t first = 0; first < length; first += fit) {
        const int64_t n = length - first < fit ? length - first : fit;
        const struct tensor from = one ? tensor_col_range(src, first, n)
                                       : tensor_row_range(src, first, n),
                            to = one ? tensor_col_range(dst, first, n)
                                     : tensor_row_range(dst, first, n);
        const struct tensor between = tensor_2d(cuda_context_of(s)->scratch, host->dtype,
                                                PLACE_DEVICE, one ? 1 : n, one ? n : cols);
        if (src->place == PLACE_HOST) {
            cuda_copy(s, &from, &between);
            cast_on_device(s, &between, &to);
        } else {
            cast_on_device(s, &from, &between);
            cuda_copy(s, &between, &to);
        }
    }
}

template <class T>
static __global__ void initialise_kernel(enum rng_init init, double scale, struct rng_key key,
                                         uint64_t base, uint64_t stride, T *p, int64_t cols,
                                         int64_t ld, int64_t n)
{
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * blockDim.x) {
        const int64_t r = i / cols, c = i % cols;
        p[r * ld + c] = from_float<T>(
            (float)rng_core_initial(init, scale, key, base + (uint64_t)r * stride + (uint64_t)c));
    }
}

extern "C" void cuda_initialise(struct stream *s, enum rng_init init, double scale,
                                struct rng_key key, uint64_t base, uint64_t stride, out_t t)
{
    const int64_t n = tensor_numel(t);
    if (n == 0)
        return;
    by_type(t, [&](auto zero) {
        using T = decltype(zero);
        initialise_kernel<T>
            <<<blocks_for(n, THREADS * PER_THREAD), THREADS, 0, cuda_stream_of(s)>>>(
                init, scale, key, base, stride, (T *)t->data, tensor_cols(t), t->ld, n);
    });
    CHECK_LAUNCH();
}
