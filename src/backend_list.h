/* backend_list.h - every member of struct backend_ops by name. Implementations, the shadow and the
 * tests make their lists from these; a new member that is in none of them does not compile, and one
 * that is in them needs an implementation, a shadow and a test.
 */
#ifndef MIMO_BACKEND_LIST_H
#define MIMO_BACKEND_LIST_H

#include "backend.h"

#define BACKEND_MEMORY_OPS(X) X(copy) X(fill) X(cast) X(initialise)
/* clang-format off */
#define BACKEND_MATH_OPS(X) \
    X(gemm) X(grouped_gemm) X(add) X(add_bias) X(bias_backward) X(activation_forward) \
    X(activation_backward) X(rmsnorm_forward) X(rmsnorm_backward) X(layernorm_forward) \
    X(layernorm_backward) X(attention_forward) X(attention_backward) X(gather_rows) \
    X(gather_sum_rows) X(embed_merge_forward) X(embed_merge_backward) X(loss_sum) X(loss_label) \
    X(loss_finish) X(loss_backward) X(conv_forward) X(conv_backward) X(ssd_forward) \
    X(ssd_backward) X(gated_norm_forward) X(gated_norm_backward) X(router_forward) \
    X(router_balance) X(router_balance_loss) X(router_backward) X(moe_sort) X(dispatch_order) \
    X(moe_unsort_prob) X(expert_act_forward) X(expert_act_backward) X(expert_bias_update) \
    X(vit_assemble_forward) X(vit_assemble_backward) X(sum_squares) X(count_zeros) X(sum_wide) \
    X(decide_update) X(adamw)
/* clang-format on */
/* What a table may leave NULL. */
#define BACKEND_OPTIONAL_OPS(X) X(grouped_act_forward) X(grouped_act_backward)
#define BACKEND_OPS(X) BACKEND_MEMORY_OPS(X) BACKEND_MATH_OPS(X) BACKEND_OPTIONAL_OPS(X)
/* What computes nothing. */
/* clang-format off */
#define BACKEND_CONTROL(X) \
    X(alloc) X(release) X(alloc_host) X(release_host) X(memory) X(stream_create) \
    X(stream_destroy) X(stream_scratch) X(stream_sync) X(event_create) X(event_destroy) \
    X(event_record) X(stream_wait) X(event_sync) X(event_create_timed) X(event_seconds) \
    X(attention_work) X(ssd_work)
/* clang-format on */

#define BACKEND_COUNT(op) +1
_Static_assert(sizeof(struct backend_ops) ==
                   offsetof(struct backend_ops, alloc) +
                       sizeof(void (*)(void)) *
                           (BACKEND_OPS(BACKEND_COUNT) BACKEND_CONTROL(BACKEND_COUNT)),
               "every member of struct backend_ops is in one of the lists");

#endif
