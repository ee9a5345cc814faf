/* cuda_ops.h - every operation of backend.h that a file of this folder implements: cuda_<op>,
 * extern "C", with the prototype of the table's member. Matrices of BF16 or F32 are told apart at
 * run time by their dtype. Local, all.
 */
#ifndef MIMO_CUDA_OPS_H
#define MIMO_CUDA_OPS_H

#ifdef __cplusplus
extern "C" {
#endif

#include "backend.h"

/* clang-format off */
#define CUDA_OPS(X) \
    X(copy) X(fill) X(cast) X(initialise) X(gemm) X(grouped_gemm) X(add) X(add_bias) \
    X(bias_backward) X(activation_forward) X(activation_backward) X(rmsnorm_forward) \
    X(rmsnorm_backward) X(layernorm_forward) X(layernorm_backward) X(attention_forward) \
    X(gather_rows) X(gather_sum_rows) X(embed_merge_forward) X(embed_merge_backward) X(loss_sum) \
    X(loss_label) X(loss_finish) X(loss_backward) X(conv_forward) X(conv_backward) X(ssd_forward) \
    X(ssd_backward) X(gated_norm_forward) X(gated_norm_backward) X(router_forward) \
    X(router_balance) X(router_balance_loss) X(router_backward) X(moe_sort) X(dispatch_order) \
    X(moe_unsort_prob) X(expert_act_forward) X(expert_act_backward) X(grouped_act_forward) \
    X(grouped_act_backward) X(expert_bias_update) X(vit_assemble_forward) \
    X(vit_assemble_backward) X(sum_squares) X(count_zeros) X(sum_wide) X(decide_update) X(adamw)
/* clang-format on */

#define X(op) extern __typeof__(*((struct backend_ops *)0)->op) cuda_##op;
CUDA_OPS(X)
/* Two that can stand at one place of the table: sums in a fixed order, or as they come. */
X(attention_backward)
#undef X
extern __typeof__(*((struct backend_ops *)0)->attention_backward) cuda_attention_backward_any_order;

#ifdef __cplusplus
}
#endif
#endif
