/* cuda_util.cuh - device helpers of the kernels: BF16 and F32 as one, reductions in a fixed order.
 *
 * Statistics and sums are fp32; a block sums lane by lane in an order that depends on nothing but
 * the shape, so every result repeats bitwise.
 */
#ifndef MIMO_CUDA_UTIL_CUH
#define MIMO_CUDA_UTIL_CUH

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include "cuda_ops.h"
#include "cuda_util.h"

using bf16 = __nv_bfloat16;

enum { WARP = 32 };

/* The segment of a ragged batch, cu [segments+1], that has this row. */
__device__ __forceinline__ int segment_of(const int32_t *cu, int segments, int64_t row)
{
    int lo = 0, hi = segments - 1;
    while (lo < hi) {
        const int mid = (lo + hi + 1) / 2;
        if (cu[mid] <= row)
            lo = mid;
        else
            hi = mid - 1;
    }
    return lo;
}

__device__ __forceinline__ float to_float(float x)
{
    return x;
}
__device__ __forceinline__ float to_float(bf16 x)
{
    return __bfloat162float(x);
}
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x)
{
    return x;
}
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x)
{
    return __float2bfloat16_rn(x);
}

__device__ __forceinline__ float warp_sum(float x)
{
    for (int o = WARP / 2; o; o /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

__device__ __forceinline__ float warp_max(float x)
{
    for (int o = WARP / 2; o; o /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, o));
    return x;
}

/* Sum over a block of at most 1024 threads (a multiple of 32); every thread gets it. `shared` float
 * [32], one per call site or separated by a barrier. */
__device__ __forceinline__ float block_sum(float x, float *shared)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_sum(x);
    if (lane == 0)
        shared[warp] = x;
    __syncthreads();
    x = warp_sum(lane < warps ? shared[lane] : 0.0f);
    __syncthreads();
    return x;
}

__device__ __forceinline__ float block_max(float x, float *shared)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_max(x);
    if (lane == 0)
        shared[warp] = x;
    __syncthreads();
    x = warp_max(lane < warps ? shared[lane] : -INFINITY);
    __syncthreads();
    return x;
}

/* What kernels get of a tensor: pointer, row stride, extent. */
template <class T> struct matrix {
    T *p;
    int64_t rows, cols, ld;
    __device__ __forceinline__ T *row(int64_t r) const
    {
        return p + r * ld;
    }
};

template <class T> static inline matrix<T> as_matrix(in_t t)
{
    return matrix<T>{ (T *)t->data, tensor_rows(t), tensor_cols(t), t->ld };
}

/* Calls f with a value of the tensor's element type: by_type(t, [&](auto zero) { using T =
 * decltype(zero); ... }); */
template <class F> static inline void by_type(in_t t, F f)
{
    if (t->dtype == DTYPE_BF16)
        f(bf16());
    else if (t->dtype == DTYPE_F32)
        f(0.0f);
    else
        fatal(EXIT_INTERNAL, __FILE__, __LINE__, NULL, "no CUDA kernel for %s",
              dtype_name(t->dtype));
}

static inline unsigned blocks_for(int64_t n, int64_t per)
{
    const int64_t b = (n + per - 1) / per;
    return (unsigned)(b < 1 ? 1 : b > 0x7fffffff ? 0x7fffffff : b);
}

#endif
