/* shadow_broken.h - every operation with one wrong number in what it writes: what a shadow must
 * find, and name.
 *
 * broken_<op> calls the operation of the table that broken_make was given and then changes the last
 * element of an output, by more than any rounding. A new operation needs a line here: broken_make
 * is made from the list of operations.
 */
#ifndef MIMO_SHADOW_BROKEN_H
#define MIMO_SHADOW_BROKEN_H

#include <string.h>
#include "backend_list.h"
#include "bf16.h"

static const struct backend_ops *broken_whole;

static inline void broken_spoil(struct stream *s, out_t t)
{
    unsigned char raw[8];
    struct tensor one = *t;
    const size_t width = dtype_bytes(t->dtype);
    if (tensor_numel(t) == 0)
        return;
    one.data =
        (char *)t->data + (size_t)((tensor_rows(t) - 1) * t->ld + tensor_cols(t) - 1) * width;
    one.ndim = 1;
    one.shape[0] = one.ld = 1;
    const struct tensor host = tensor_1d(raw, t->dtype, PLACE_HOST, 1);
    broken_whole->copy(s, &one, &host);
    broken_whole->stream_sync(s);
    switch (t->dtype) {
    case DTYPE_F32: *(float *)(void *)raw = 4 + 2 * *(float *)(void *)raw; break;
    case DTYPE_F64: *(double *)(void *)raw = 4 + 2 * *(double *)(void *)raw; break;
    case DTYPE_BF16:
        *(uint16_t *)(void *)raw = bf16_from_float(4 + 2 * bf16_to_float(*(uint16_t *)(void *)raw));
        break;
    default: raw[0]++;
    }
    broken_whole->copy(s, &host, &one);
    broken_whole->stream_sync(s);
}

#define BROKEN(op, parameters, arguments, output) \
    static inline void broken_##op parameters \
    { \
        broken_whole->op arguments; \
        broken_spoil(s, output); \
    }

BROKEN(copy, (struct stream * s, in_t src, out_t dst), (s, src, dst), dst)
BROKEN(fill, (struct stream * s, out_t t, double value), (s, t, value), t)
BROKEN(cast, (struct stream * s, in_t src, out_t dst), (s, src, dst), dst)
BROKEN(initialise,
       (struct stream * s, enum rng_init init, double scale, struct rng_key key, uint64_t base,
        uint64_t stride, out_t t),
       (s, init, scale, key, base, stride, t), t)
BROKEN(gemm,
       (struct stream * s, bool ta, bool tb, double alpha, in_t a, in_t b, double beta, in_t c,
        out_t d),
       (s, ta, tb, alpha, a, b, beta, c, d), d)
BROKEN(grouped_gemm,
       (struct stream * s, enum backend_grouped mode, in_t a, in_t b, in_t offsets,
        int64_t max_rows, double beta, out_t c),
       (s, mode, a, b, offsets, max_rows, beta, c), c)
BROKEN(add, (struct stream * s, in_t x, out_t y), (s, x, y), y)
BROKEN(add_bias, (struct stream * s, in_t bias, out_t y), (s, bias, y), y)
BROKEN(bias_backward, (struct stream * s, in_t dy, out_t dbias), (s, dy, dbias), dbias)
BROKEN(activation_forward, (struct stream * s, enum backend_activation f, in_t x, out_t y),
       (s, f, x, y), y)
BROKEN(activation_backward,
       (struct stream * s, enum backend_activation f, in_t x, in_t dy, out_t dx), (s, f, x, dy, dx),
       dx)
BROKEN(rmsnorm_forward, (struct stream * s, in_t x, in_t w, double eps, out_t y, out_t rs),
       (s, x, w, eps, y, rs), rs)
BROKEN(rmsnorm_backward, (struct stream * s, in_t x, in_t w, in_t rs, in_t dy, out_t dx, out_t dw),
       (s, x, w, rs, dy, dx, dw), dx)
BROKEN(layernorm_forward,
       (struct stream * s, in_t x, in_t w, in_t b, double eps, out_t y, out_t mean, out_t rs),
       (s, x, w, b, eps, y, mean, rs), mean)
BROKEN(layernorm_backward,
       (struct stream * s, in_t x, in_t w, in_t mean, in_t rs, in_t dy, out_t dx, out_t dw,
        out_t db),
       (s, x, w, mean, rs, dy, dx, dw, db), dx)
BROKEN(attention_forward,
       (struct stream * s, in_t qkv, in_t cu, int64_t max_len, int n, int g, int d, bool causal,
        in_t work, out_t o, out_t lse),
       (s, qkv, cu, max_len, n, g, d, causal, work, o, lse), o)
BROKEN(attention_backward,
       (struct stream * s, in_t qkv, in_t cu, int64_t max_len, int n, int g, int d, bool causal,
        in_t o, in_t lse, in_t do_, in_t work, out_t dqkv),
       (s, qkv, cu, max_len, n, g, d, causal, o, lse, do_, work, dqkv), dqkv)
BROKEN(gather_rows, (struct stream * s, in_t in, in_t index, out_t out), (s, in, index, out), out)
BROKEN(gather_sum_rows, (struct stream * s, in_t in, in_t index, double beta, out_t out),
       (s, in, index, beta, out), out)
BROKEN(embed_merge_forward,
       (struct stream * s, in_t ids, in_t image_row, in_t table, int64_t first, in_t image,
        out_t out),
       (s, ids, image_row, table, first, image, out), out)
BROKEN(embed_merge_backward,
       (struct stream * s, in_t ids, in_t image_row, in_t dout, int64_t first, out_t dtable,
        out_t dimage),
       (s, ids, image_row, dout, first, dtable, dimage), dimage ? dimage : dtable)
BROKEN(loss_sum, (struct stream * s, in_t logits, out_t mx, out_t se), (s, logits, mx, se), se)
BROKEN(loss_label,
       (struct stream * s, in_t logits, in_t labels, int64_t first, in_t own, in_t mx, out_t se,
        out_t pl),
       (s, logits, labels, first, own, mx, se, pl), pl)
BROKEN(loss_finish, (struct stream * s, in_t se, in_t pl, in_t mask, out_t loss, out_t total),
       (s, se, pl, mask, loss, total), total)
BROKEN(loss_backward,
       (struct stream * s, in_t labels, int64_t first, in_t mx, in_t se, in_t mask, out_t logits),
       (s, labels, first, mx, se, mask, logits), logits)
BROKEN(conv_forward, (struct stream * s, in_t x, in_t w, in_t b, in_t cu, int64_t max_len, out_t y),
       (s, x, w, b, cu, max_len, y), y)
BROKEN(conv_backward,
       (struct stream * s, in_t x, in_t w, in_t b, in_t cu, int64_t max_len, in_t dy, out_t dx,
        out_t dw, out_t db),
       (s, x, w, b, cu, max_len, dy, dx, dw, db), dx)
BROKEN(ssd_forward,
       (struct stream * s, in_t xbc, in_t dt, in_t dt_bias, in_t a_log, in_t d_skip, in_t cu,
        int64_t max_len, int heads, int head_dim, int groups, int state, int chunk, in_t work,
        out_t y),
       (s, xbc, dt, dt_bias, a_log, d_skip, cu, max_len, heads, head_dim, groups, state, chunk,
        work, y),
       y)
BROKEN(ssd_backward,
       (struct stream * s, in_t xbc, in_t dt, in_t dt_bias, in_t a_log, in_t d_skip, in_t cu,
        int64_t max_len, int heads, int head_dim, int groups, int state, int chunk, in_t dy,
        in_t work, out_t dxbc, out_t ddt, out_t ddt_bias, out_t da_log, out_t dd_skip),
       (s, xbc, dt, dt_bias, a_log, d_skip, cu, max_len, heads, head_dim, groups, state, chunk, dy,
        work, dxbc, ddt, ddt_bias, da_log, dd_skip),
       ddt)
BROKEN(gated_norm_forward,
       (struct stream * s, in_t y, in_t z, in_t w, int groups, double eps, out_t o, out_t rs),
       (s, y, z, w, groups, eps, o, rs), o)
BROKEN(gated_norm_backward,
       (struct stream * s, in_t y, in_t z, in_t w, int groups, in_t rs, in_t do_, out_t dy,
        out_t dz, out_t dw),
       (s, y, z, w, groups, rs, do_, dy, dz, dw), dz)
BROKEN(router_forward,
       (struct stream * s, in_t logits, in_t bias, double scaling, bool given, out_t scores,
        out_t expert, out_t prob),
       (s, logits, bias, scaling, given, scores, expert, prob), prob)
BROKEN(router_balance,
       (struct stream * s, in_t scores, int topk, int64_t first_row, int64_t seq_len, out_t count,
        out_t psum),
       (s, scores, topk, first_row, seq_len, count, psum), count)
BROKEN(router_balance_loss,
       (struct stream * s, in_t count, in_t psum, int topk, int64_t seq_len, out_t metric),
       (s, count, psum, topk, seq_len, metric), metric)
BROKEN(router_backward,
       (struct stream * s, in_t scores, in_t expert, in_t prob, in_t dprob, double scaling,
        in_t count, double coeff, int64_t first_row, int64_t seq_len, out_t dlogits),
       (s, scores, expert, prob, dprob, scaling, count, coeff, first_row, seq_len, dlogits),
       dlogits)
BROKEN(moe_sort,
       (struct stream * s, in_t expert, in_t prob, out_t offsets, out_t row_token, out_t row_prob,
        out_t token_row, out_t tokens_per_expert),
       (s, expert, prob, offsets, row_token, row_prob, token_row, tokens_per_expert), token_row)
BROKEN(dispatch_order,
       (struct stream * s, in_t all, int64_t first, out_t offsets, out_t order, out_t inverse),
       (s, all, first, offsets, order, inverse), inverse)
BROKEN(moe_unsort_prob, (struct stream * s, in_t drow, in_t token_row, out_t dprob),
       (s, drow, token_row, dprob), dprob)
BROKEN(expert_act_forward, (struct stream * s, in_t h, in_t prob, out_t y), (s, h, prob, y), y)
BROKEN(expert_act_backward,
       (struct stream * s, in_t h, in_t prob, in_t dy, out_t dh, out_t dprob, out_t y),
       (s, h, prob, dy, dh, dprob, y), dprob)
BROKEN(grouped_act_forward,
       (struct stream * s, in_t a, in_t w, in_t offsets, in_t prob, out_t h, out_t y),
       (s, a, w, offsets, prob, h, y), h)
BROKEN(grouped_act_backward,
       (struct stream * s, in_t a, in_t w, in_t offsets, in_t h, in_t prob, out_t dh, out_t dprob,
        out_t y),
       (s, a, w, offsets, h, prob, dh, dprob, y), y ? y : dh)
BROKEN(expert_bias_update, (struct stream * s, double rate, out_t bias, out_t count),
       (s, rate, bias, count), count)
BROKEN(vit_assemble_forward,
       (struct stream * s, in_t e, in_t class_token, in_t grid, in_t row_source, in_t pos_index,
        in_t pos_w, out_t x),
       (s, e, class_token, grid, row_source, pos_index, pos_w, x), x)
BROKEN(vit_assemble_backward,
       (struct stream * s, in_t dx, in_t row_source, in_t pos_index, in_t pos_w, out_t de,
        out_t dclass_token, out_t dgrid),
       (s, dx, row_source, pos_index, pos_w, de, dclass_token, dgrid), dgrid)
BROKEN(sum_squares, (struct stream * s, in_t x, out_t total), (s, x, total), total)
BROKEN(count_zeros, (struct stream * s, in_t x, out_t total), (s, x, total), total)
BROKEN(sum_wide, (struct stream * s, in_t x, out_t total), (s, x, total), total)
BROKEN(decide_update,
       (struct stream * s, in_t numbers, double tokens, const double *factor, double clip,
        double threshold, out_t result),
       (s, numbers, tokens, factor, clip, threshold, result), result)
BROKEN(adamw,
       (struct stream * s, in_t grad, in_t factor, double lr, double beta1, double beta2,
        double eps, double wd, int64_t step, out_t master, out_t m, out_t v, out_t param),
       (s, grad, factor, lr, beta1, beta2, eps, wd, step, master, m, v, param), m)

/* whole's table with one operation broken; -1: none. */
static inline struct backend_ops broken_make(const struct backend_ops *whole, int operation)
{
    struct backend_ops t = *whole;
    int i = 0;
    broken_whole = whole;
#define BREAK(op) \
    if (i++ == operation) \
        t.op = broken_##op;
    BACKEND_OPS(BREAK)
#undef BREAK
    return t;
}

#endif
