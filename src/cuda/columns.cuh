/* columns.cuh - the second pass of sums over rows. A kernel has left partial sums of fixed sets of
 * rows in scratch; here each column's partial sums are added up in an order that depends on their
 * number alone.
 */
#ifndef MIMO_CUDA_COLUMNS_CUH
#define MIMO_CUDA_COLUMNS_CUH

#include "cuda_util.cuh"

enum { COLUMNS_LANES = 32, COLUMNS_GROUPS = 32 };

/* A block has 32 columns and 32 groups of threads; a group adds every 32nd partial sum. */
static __global__ void __launch_bounds__(COLUMNS_LANES *COLUMNS_GROUPS)
    columns_finish_kernel(const float *partial, int parts, int64_t stride, int64_t cols, float *out)
{
    __shared__ float group[COLUMNS_GROUPS][COLUMNS_LANES];
    const int lane = threadIdx.x % COLUMNS_LANES, own = threadIdx.x / COLUMNS_LANES;
    const int64_t c = blockIdx.x * (int64_t)COLUMNS_LANES + lane;
    float sum = 0;
    if (c < cols)
#pragma unroll 8
        for (int i = own; i < parts; i += COLUMNS_GROUPS)
            sum += partial[i * stride + c];
    group[own][lane] = sum;
    __syncthreads();
    if (own != 0 || c >= cols)
        return;
    for (int i = 1; i < COLUMNS_GROUPS; i++)
        sum += group[i][lane];
    out[c] += sum;
}

/* out[c] += sum over i < parts of partial[i*stride + c], c < cols. Local. */
static inline void columns_finish(cudaStream_t stream, const float *partial, int parts,
                                  int64_t stride, int64_t cols, float *out)
{
    columns_finish_kernel<<<blocks_for(cols, COLUMNS_LANES), COLUMNS_LANES * COLUMNS_GROUPS, 0,
                            stream>>>(partial, parts, stride, cols, out);
    CHECK_LAUNCH();
}

#endif
