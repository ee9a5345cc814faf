/* attention.h - what the two files of attention share: the plans of cuDNN (attention_cudnn.cpp) and
 * the kernels around them (attention.cu). Local, all.
 */
#ifndef MIMO_CUDA_ATTENTION_H
#define MIMO_CUDA_ATTENTION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct cuda_context;

/* One problem cuDNN solves at once. Plain: `batch` KV groups of one sequence of max_len rows,
 * `heads` query heads over one key head each. Packed: `batch` slots of at most max_len rows,
 * `heads` heads with keys of their own; row offsets and lengths come from the device. Strides in
 * elements. */
struct cuda_attention_shape {
    int64_t batch, heads, d, max_len;
    int64_t row, head, group; /* of qkv: next token, next query head, next KV group (plain) */
    int64_t o_row, stats_row; /* of o and of the statistics (packed): next token */
    int64_t total;            /* packed: rows of all slots at most; bounds the workspace */
    bool packed, causal, backward;
    bool any_order; /* of the sums in backward: faster, not repeatable */
};

struct cuda_attention_pointers {
    void *q, *k, *v, *o, *stats; /* forward writes o and stats */
    void *d_o, *dq, *dk, *dv;    /* backward */
    /* packed: I64 [batch+1] x 3, I32 [batch] */
    const void *qkv_offset, *o_offset, *stats_offset, *length;
    void *workspace;
    size_t workspace_bytes;
};

/* Runs on the context's stream; the plan is built at the first use of a shape. Workspace that does
 * not suffice is fatal. */
void cuda_attention_run(struct cuda_context *c, const struct cuda_attention_shape *shape,
                        const struct cuda_attention_pointers *p);
/* Bytes of workspace of the shape's plan (built if needed). */
size_t cuda_attention_workspace(struct cuda_context *c, const struct cuda_attention_shape *shape);

#ifdef __cplusplus
}
#endif
#endif
