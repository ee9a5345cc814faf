/* tiles.cuh - what kernels on tensor cores are made of: 16 x 8 x 16 products of a warp in bf16 with
 * fp32 sums, the loads of their operands from shared memory, and copies into shared memory that run
 * beside them.
 *
 * Lane l of a warp has g = l/4 and t = l%4. A sum v[4] holds row g columns 2t, 2t+1, then row g+8
 * the same columns; the sums of two neighbouring products are therefore, rounded and packed in
 * pairs, the left operand of the next product.
 */
#ifndef MIMO_CUDA_TILES_CUH
#define MIMO_CUDA_TILES_CUH

#include "cuda_util.cuh"

__device__ __forceinline__ unsigned shared_address(const void *p)
{
    return (unsigned)__cvta_generic_to_shared(p);
}

/* Four 8 x 8 matrices, each lane the address of one row of eight. */
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], unsigned at)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], unsigned at)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

/* d += a b. */
__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0,
                                         unsigned b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* 16 bytes; zeros unless `real`, the address must be valid anyway. */
__device__ __forceinline__ void copy_async(void *to, const void *from, bool real)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(real ? 16 : 0)
                 : "memory");
}

/* Ends a group of copies. */
__device__ __forceinline__ void copies_end()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Until all but the LATEST groups of this thread have arrived. */
template <int LATEST> __device__ __forceinline__ void copies_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(LATEST) : "memory");
}

__device__ __forceinline__ float fast_exp2(float x)
{
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}

__device__ __forceinline__ float low_half(unsigned pair)
{
    return __uint_as_float(pair << 16);
}
__device__ __forceinline__ float high_half(unsigned pair)
{
    return __uint_as_float(pair & 0xffff0000u);
}

__device__ __forceinline__ unsigned pack(float low, float high)
{
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *(const unsigned *)&v;
}

__device__ __forceinline__ unsigned scaled(unsigned pair, float low, float high)
{
    return pack(low_half(pair) * low, high_half(pair) * high);
}

/* Tiles in shared memory have rows of LD = 64 or 128 elements, no padding, and begin on 256 bytes.
 * Of a row's pieces of eight elements, piece i lies where i ^ row % 8 would: neither the copies of
 * whole rows nor the loads of eight rows' equal pieces meet in a bank. An address moves by rows,
 * multiples of 8, with + 2 * rows * LD, and by columns, multiples of 16, with ^ 2 * columns, as
 * long as those bits are not set yet. */
template <int LD> __device__ __forceinline__ int place(int row, int column)
{
    return row * LD + (column ^ row % 8 * 8);
}

/* A lane's address. A left operand [m][k] takes load_matrices ACROSS, kept as [k][m]
 * load_matrices_transposed DOWN; a right operand [k][n] takes load_matrices_transposed ACROSS, kept
 * as [n][k] load_matrices DOWN. Right operands come in pairs, 16 columns: elements 0, 1 and 2, 3.
 */
template <int LD> __device__ __forceinline__ unsigned across(const bf16 *tile)
{
    const int lane = threadIdx.x % WARP;
    return shared_address(tile + place<LD>(lane % 16, lane / 16 * 8));
}

template <int LD> __device__ __forceinline__ unsigned down(const bf16 *tile)
{
    const int lane = threadIdx.x % WARP;
    return shared_address(tile + place<LD>(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8));
}

/* The same number, but the compiler does not know: what follows from it is computed again where it
 * is used, not kept in registers that are not there. */
__device__ __forceinline__ unsigned again(unsigned x)
{
    asm volatile("" : "+r"(x));
    return x;
}

/* sum[2*i], sum[2*i+1] += a * columns 16i.. of one step of 16 along k, of a right operand kept
 * [k][n]; `at` is the address of its first column, a multiple of 16 * PAIRS. */
template <int PAIRS, int NT>
__device__ __forceinline__ void multiply_row(float (&sum)[NT][4], const unsigned (&a)[4],
                                             unsigned at)
{
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        unsigned b[4];
        load_matrices_transposed(b, at ^ 32 * i);
        multiply(sum[2 * i], a, b[0], b[1]);
        multiply(sum[2 * i + 1], a, b[2], b[3]);
    }
}

/* The same with the operand kept [n][k] in rows of LD. */
template <int PAIRS, int LD, int NT>
__device__ __forceinline__ void multiply_column(float (&sum)[NT][4], const unsigned (&a)[4],
                                                unsigned at)
{
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        unsigned b[4];
        load_matrices(b, at + 32 * LD * i);
        multiply(sum[2 * i], a, b[0], b[1]);
        multiply(sum[2 * i + 1], a, b[2], b[3]);
    }
}

/* Adds the four lanes that share a row of sums. */
__device__ __forceinline__ float row_lanes(float x)
{
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ void swap_words(unsigned &low, unsigned &high, int lanes)
{
    const bool upper = threadIdx.x & lanes;
    const unsigned got = __shfl_xor_sync(0xffffffffu, upper ? low : high, lanes);
    (upper ? low : high) = got;
}

/* A row of 32 rounded sums, each lane's pairs of four neighbouring products in w, goes to memory as
 * 16 bytes a lane. */
__device__ __forceinline__ void store_row(bf16 *to, unsigned w0, unsigned w1, unsigned w2,
                                          unsigned w3, bool real)
{
    swap_words(w0, w1, 1);
    swap_words(w2, w3, 1);
    swap_words(w0, w2, 2);
    swap_words(w1, w3, 2);
    if (real)
        *(uint4 *)(to + threadIdx.x % 4 * 8) = make_uint4(w0, w1, w2, w3);
}

#endif
