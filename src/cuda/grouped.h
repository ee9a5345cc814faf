/* grouped.h - what the CUTLASS instantiations of the grouped GEMM (grouped_nt.cu, grouped_nn.cu,
 * grouped_tn.cu) get from grouped.cu.
 *
 * Group e computes D_e[M_e,N_e] = A_e[M_e,K_e] B_e[K_e,N_e] (TN: += in place). Sizes, addresses and
 * row strides lie on the device, made from the offsets by a kernel, so that the host never learns
 * how many rows an expert has. Includes nothing of the program's, so that what takes minutes to
 * compile depends on no header that often changes. Local, all.
 */
#ifndef MIMO_CUDA_GROUPED_H
#define MIMO_CUDA_GROUPED_H

#ifdef __cplusplus
extern "C" {
#endif

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

/* Tile of the CUTLASS kernels. */
enum { GROUPED_TILE_M = 128, GROUPED_TILE_N = 192 };

/* Device arrays over the groups, all in the stream's scratch. */
struct grouped {
    cudaStream_t stream;
    int sm_count; /* of the device */
    int groups;
    int (*size)[3];           /* M, N, K; all 0 for an expert without rows */
    const void **a, **b, **c; /* c: read with d's shape, or NULL */
    void **d;
    int64_t *lda, *ldb, *ldc, *ldd; /* in elements */
    void *workspace;                /* TMA descriptors, rewritten by every block */
    size_t workspace_bytes;
};

/* For products with the experts' activation in their epilogue; rows are those of all groups, in
 * order. */
struct grouped_act {
    const int32_t *offsets;
    const float *prob;
    void *second; /* BF16 with D's shape; NULL in backward: not needed */
    int64_t ld;
    float *partial; /* backward: [rows, ceil(N / GROUPED_TILE_N)] parts of dprob */
};

/* BF16 operands, 16-byte aligned rows; accumulation in fp32. D: BF16 for nt and nn, F32 for tn,
 * which adds to beta D. */
void cuda_grouped_nt(const struct grouped *g);
void cuda_grouped_nn(const struct grouped *g);
void cuda_grouped_tn(const struct grouped *g, float beta);
/* d = relu(h)^2 prob, second = h = a b; d = dh from c = h and dy = a b, second = relu(h)^2 prob,
 * partial. */
void cuda_grouped_nt_act(const struct grouped *g, const struct grouped_act *act);
void cuda_grouped_nn_act(const struct grouped *g, const struct grouped_act *act);

/* CUTLASS refuses them: fatal. */
[[noreturn]] void cuda_grouped_refused(const struct grouped *g);

#ifdef __cplusplus
}
#endif
#endif
