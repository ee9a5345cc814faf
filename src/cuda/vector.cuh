/* vector.cuh - chunks of eight neighbouring elements: 16 bytes of BF16, 32 of F32. What streams
 * through memory moves in them.
 *
 * A chunk begins at a multiple of eight columns. Rows may be any number of elements apart and start
 * anywhere, so every kernel exists twice: VEC, where each row starts on 16 bytes, and element by
 * element. The last chunk of a row may be short; what it lacks reads as zero and is not written.
 */
#ifndef MIMO_CUDA_VECTOR_CUH
#define MIMO_CUDA_VECTOR_CUH

#include <initializer_list>
#include <type_traits>
#include "cuda_util.cuh"

enum { CHUNK = 8 };

/* A chunk as it lies in memory: what a kernel keeps of a row takes half the registers that way. */
template <class T> struct chunk;
template <> struct chunk<bf16> {
    unsigned word[4];
};
template <> struct chunk<float> {
    float v[CHUNK];
};

/* The n elements at p. */
template <bool VEC> __device__ __forceinline__ chunk<bf16> read_chunk(const bf16 *p, int n)
{
    chunk<bf16> c;
    if (VEC && n == CHUNK) {
        const uint4 raw = *(const uint4 *)p;
        c.word[0] = raw.x, c.word[1] = raw.y, c.word[2] = raw.z, c.word[3] = raw.w;
        return c;
    }
    const unsigned short *bits = (const unsigned short *)p;
#pragma unroll
    for (int i = 0; i < CHUNK / 2; i++)
        c.word[i] =
            (2 * i < n ? bits[2 * i] : 0) | (2 * i + 1 < n ? (unsigned)bits[2 * i + 1] << 16 : 0);
    return c;
}

template <bool VEC> __device__ __forceinline__ chunk<float> read_chunk(const float *p, int n)
{
    chunk<float> c;
    if (VEC && n == CHUNK) {
        const float4 low = *(const float4 *)p, high = *(const float4 *)(p + 4);
        c.v[0] = low.x, c.v[1] = low.y, c.v[2] = low.z, c.v[3] = low.w;
        c.v[4] = high.x, c.v[5] = high.y, c.v[6] = high.z, c.v[7] = high.w;
        return c;
    }
#pragma unroll
    for (int i = 0; i < CHUNK; i++)
        c.v[i] = i < n ? p[i] : 0.0f;
    return c;
}

__device__ __forceinline__ void widen_chunk(const chunk<bf16> &c, float (&v)[CHUNK])
{
#pragma unroll
    for (int i = 0; i < CHUNK / 2; i++) {
        v[2 * i] = __uint_as_float(c.word[i] << 16);
        v[2 * i + 1] = __uint_as_float(c.word[i] & 0xffff0000u);
    }
}

__device__ __forceinline__ void widen_chunk(const chunk<float> &c, float (&v)[CHUNK])
{
#pragma unroll
    for (int i = 0; i < CHUNK; i++)
        v[i] = c.v[i];
}

template <bool VEC, class T>
__device__ __forceinline__ void load_chunk(const T *p, int n, float (&v)[CHUNK])
{
    widen_chunk(read_chunk<VEC>(p, n), v);
}

template <bool VEC>
__device__ __forceinline__ void store_chunk(bf16 *p, int n, const float (&v)[CHUNK])
{
    if (VEC && n == CHUNK) {
        unsigned word[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const __nv_bfloat162 two = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
            word[i] = *(const unsigned *)&two;
        }
        *(uint4 *)p = make_uint4(word[0], word[1], word[2], word[3]);
        return;
    }
#pragma unroll
    for (int i = 0; i < CHUNK; i++)
        if (i < n)
            p[i] = from_float<bf16>(v[i]);
}

template <bool VEC>
__device__ __forceinline__ void store_chunk(float *p, int n, const float (&v)[CHUNK])
{
    if (VEC && n == CHUNK) {
        *(float4 *)p = make_float4(v[0], v[1], v[2], v[3]);
        *(float4 *)(p + 4) = make_float4(v[4], v[5], v[6], v[7]);
        return;
    }
#pragma unroll
    for (int i = 0; i < CHUNK; i++)
        if (i < n)
            p[i] = v[i];
}

/* Elements of the chunk at column c. */
__device__ __forceinline__ int chunk_size(int64_t cols, int64_t c)
{
    return cols - c < CHUNK ? (cols > c ? (int)(cols - c) : 0) : CHUNK;
}

/* Whether every row of every view (NULL: none) starts on 16 bytes. */
static inline bool chunks_aligned(std::initializer_list<in_t> views)
{
    for (in_t t : views) {
        if (!t)
            continue;
        const int64_t width = (int64_t)dtype_bytes(t->dtype);
        if ((uintptr_t)t->data % 16 || (tensor_rows(t) > 1 && t->ld * width % 16))
            return false;
    }
    return true;
}

/* Whether the views' rows follow each other without gaps: then they are one long row. */
static inline bool all_dense(std::initializer_list<in_t> views)
{
    for (in_t t : views)
        if (t && tensor_rows(t) > 1 && t->ld != tensor_cols(t))
            return false;
    return true;
}

/* Calls f with std::true_type or std::false_type. */
template <class F> static inline void by_flag(bool flag, F f)
{
    if (flag)
        f(std::true_type());
    else
        f(std::false_type());
}

#endif
