/* block.cuh - sums over a block of numbers wider than the fp32 ones of cuda_util.cuh. */
#ifndef MIMO_CUDA_BLOCK_CUH
#define MIMO_CUDA_BLOCK_CUH

/* Sum over a block of N threads (a power of two) in one order; every thread has it. `shared` is
 * free again after the next barrier. */
template <class T, int N> __device__ __forceinline__ T block_total(T x, T (&shared)[N])
{
    static_assert((N & (N - 1)) == 0, "halves");
    shared[threadIdx.x] = x;
    __syncthreads();
    for (int half = N / 2; half; half /= 2) {
        if (threadIdx.x < half)
            shared[threadIdx.x] += shared[threadIdx.x + half];
        __syncthreads();
    }
    return shared[0];
}

#endif
