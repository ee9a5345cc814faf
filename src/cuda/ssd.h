/* ssd.h - what the two forms of the scan share: ssd.cu (any shape, plain loops) and ssd_mma.cu
 * (tensor cores). CUDA C++ only.
 *
 * Chunks restart at each segment. A table made on the device lists them; blocks beyond its count
 * leave. Letters: i, j rows of a chunk, h head, p column of x, n state. cs = inclusive sum of del*A
 * inside the chunk, in units of ln 2, so that
 *   L_ij = 2^(cs_i - cs_j), carry_i = 2^cs_i, keep = carry_last,
 *   tail_j = 2^(cs_last - cs_j), push_j = tail_j del_j.
 * Numbers of a row and head lie [chunks, heads, rows of a chunk]; behind a short chunk's end cs and
 * carry stay, the others that the rates kernel makes are 0.
 */
#ifndef MIMO_CUDA_SSD_H
#define MIMO_CUDA_SSD_H

#include "cuda_util.cuh"

struct ssd_chunk {
    int first, rows, opens, closes;
};

template <class T> struct ssd_args {
    matrix<const T> xbc, dt;
    const T *dt_bias, *a_log, *d_skip;
    int heads, width, groups, state, chunk; /* width = P */
    /* in the operation's work */
    const ssd_chunk *chunks;
    const int *count;
    float *del, *cs, *carry, *push; /* of rows and heads */
    /* [chunks, heads, P, N] the state before each chunk; bf16 on tensor cores */
    float *entering;
    matrix<T> y; /* forward */
    /* backward */
    matrix<const T> dy;
    matrix<T> dxbc, ddt;
    /* [chunks, heads, P, N] gradient of the state behind each chunk */
    float *adjoint;
    /* of rows and heads: e_j and dcs_i of model.md 1.6.5; tail_j x_j Gm B_j */
    float *e, *row, *through;
    /* [3][chunks][heads]: ddt_bias, dA_log, dD of a chunk */
    float *sums;
    float *keep_dot; /* [chunks, heads]: keep <Gm, St> */

    __device__ __forceinline__ int group_of(int h) const
    {
        return h / (heads / groups);
    }
    __device__ __forceinline__ const T *x(int64_t r, int h) const
    {
        return xbc.row(r) + (int64_t)h * width;
    }
    __device__ __forceinline__ const T *b(int64_t r, int g) const
    {
        return xbc.row(r) + (int64_t)heads * width + (int64_t)g * state;
    }
    __device__ __forceinline__ const T *c(int64_t r, int g) const
    {
        return b(r, g) + (int64_t)groups * state;
    }
    __device__ __forceinline__ const T *gy(int64_t r, int h) const
    {
        return dy.row(r) + (int64_t)h * width;
    }
    __device__ __forceinline__ T *dx(int64_t r, int h) const
    {
        return dxbc.row(r) + (int64_t)h * width;
    }
    __device__ __forceinline__ T *db(int64_t r, int g) const
    {
        return dxbc.row(r) + (int64_t)heads * width + (int64_t)g * state;
    }
    __device__ __forceinline__ T *dc(int64_t r, int g) const
    {
        return db(r, g) + (int64_t)groups * state;
    }
    __device__ __forceinline__ int64_t state_at(int c, int h) const
    {
        return ((int64_t)c * heads + h) * width * state;
    }
    __device__ __forceinline__ int64_t rates_at(int c, int h) const
    {
        return ((int64_t)c * heads + h) * chunk;
    }
};

/* ssd_mma.cu: bf16, P = 64, N = 128, chunks of 128. Each fills the arrays named, or the outputs.
 * `most` bounds the chunks. Local. */
/* entering; adjoint too */
void ssd_mma_states(const ssd_args<bf16> &a, bool backward, cudaStream_t stream);
void ssd_mma_output(const ssd_args<bf16> &a, int most, cudaStream_t stream);
/* dxbc, e, row, through, keep_dot and D's sums */
void ssd_mma_backward(const ssd_args<bf16> &a, int most, cudaStream_t stream);

#endif
