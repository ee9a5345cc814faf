/* cuda_sizes.h - memory that operations of the CUDA tables need, as pure functions of shapes:
 * linked into every binary, so that a laptop can size a job for GPUs. Local, all.
 */
#ifndef MIMO_CUDA_SIZES_H
#define MIMO_CUDA_SIZES_H

#ifdef __cplusplus
extern "C" {
#endif

#include "backend.h"

/* Scratch of a computing stream: cuBLASLt's workspace first, then what the other operations use. */
enum { CUDA_GEMM_WORKSPACE = 64 << 20, CUDA_SCRATCH = 128 << 20 };

/* Heads of one plan of the deterministic attention backward, whose workspace in cuDNN 9.19 is heads
 * * segments * max_len^2 * 2 bytes: as many whole KV groups as stay below the cap, at least one. */
int cuda_attention_chunk(int64_t segments, int64_t max_len, int n, int g);
/* The same without an order of the sums, which needs no such workspace: all heads at once. */
int64_t cuda_attention_work_any_order(int64_t tokens, int64_t segments, int64_t max_len, int n,
                                      int g, int d, bool causal);
int64_t cuda_attention_work(int64_t tokens, int64_t segments, int64_t max_len, int n, int g, int d,
                            bool causal);
int64_t cuda_ssd_work(int64_t tokens, int64_t segments, int heads, int head_dim, int groups,
                      int state, int chunk);

#ifdef __cplusplus
}
#endif
#endif
