/* moe.c - mixture of experts: routing, balance, the sort of token copies, the experts' products and
 * their activation. Formulas: model.md 1.8.
 *
 * Top-K of a token = the experts whose (key, index) is not behind that of the K-th best, where a
 * larger key or, for equal keys, a smaller index is better. Finding that bound first needs no list
 * and lets the choice be written in ascending order. A NaN counts as the largest key: it is chosen,
 * and shows in the probabilities.
 */
#include <string.h>
#include "ref_row.h"

/* The K-th best expert of a token. */
struct bound {
    real key;
    int64_t index;
};

static struct bound find_bound(const real *score, real divisor, const real *bias, int64_t experts,
                               int64_t topk);
static double add_balance_gradient(const real *score, const int64_t *count, double factor,
                                   int64_t experts, double *total);
static const int32_t *check_offsets(in_t offsets, int64_t experts, int64_t max_rows);

void REF(grouped_gemm)(struct stream *s, enum backend_grouped mode, in_t a, in_t b, in_t offsets,
                       int64_t max_rows, double beta, out_t c)
{
    in_t w = mode == BACKEND_GROUPED_TN ? c : b;
    ASSERT(w->ndim == 3 && (beta == 0 || (beta == 1 && mode == BACKEND_GROUPED_TN)));
    const int64_t experts = w->shape[0], out = w->shape[1], in = w->shape[2];
    const int32_t *first = check_offsets(offsets, experts, max_rows);
    ref_expect_dense(w, REF_DTYPE, experts * out * in);
    ref_expect(a, tensor_rows(a), mode == BACKEND_GROUPED_NT ? in : out);
    if (mode == BACKEND_GROUPED_TN)
        ref_expect(b, tensor_rows(b), in);
    else
        ref_expect(c, tensor_rows(c), mode == BACKEND_GROUPED_NT ? out : in);
    in_t other = mode == BACKEND_GROUPED_TN ? b : c;
    ASSERT(tensor_rows(a) >= first[experts] && tensor_rows(other) >= first[experts]);
    for (int64_t e = 0; e < experts; e++) {
        const int rows = first[e + 1] - first[e], n_out = ref_int(out), n_in = ref_int(in);
        real *we = (real *)w->data + e * out * in;
        if (rows == 0 && mode == BACKEND_GROUPED_TN && beta == 0)
            memset(we, 0, (size_t)(out * in) * sizeof *we);
        if (rows == 0 || out == 0 || in == 0)
            continue;
        const real *from = ref_row(a, first[e]);
        real *row = ref_row(other, first[e]);
        switch (mode) {
        case BACKEND_GROUPED_NT:
            REF_GEMM(CblasRowMajor, CblasNoTrans, CblasTrans, rows, n_out, n_in, 1, from,
                     ref_int(a->ld), we, n_in, 0, row, ref_int(c->ld));
            break;
        case BACKEND_GROUPED_NN:
            REF_GEMM(CblasRowMajor, CblasNoTrans, CblasNoTrans, rows, n_in, n_out, 1, from,
                     ref_int(a->ld), we, n_in, 0, row, ref_int(c->ld));
            break;
        case BACKEND_GROUPED_TN:
            REF_GEMM(CblasRowMajor, CblasTrans, CblasNoTrans, n_out, n_in, rows, 1, from,
                     ref_int(a->ld), row, ref_int(b->ld), (real)beta, we, n_in);
            break;
        }
    }
}

static const int32_t *check_offsets(in_t offsets, int64_t experts, int64_t max_rows)
{
    const int32_t *first = ref_index(offsets, experts + 1);
    ASSERT(first[0] == 0 && first[experts] <= max_rows);
    for (int64_t e = 0; e < experts; e++)
        ASSERT(first[e] <= first[e + 1]);
    return first;
}

/* What experts are chosen by: score/divisor + bias. */
static real key_of(const real *score, real divisor, const real *bias, int64_t e)
{
    real key = score[e] / divisor;
    if (bias != NULL)
        key += bias[e];
    return isnan(key) ? INFINITY : key;
}

static bool chosen(struct bound last, real key, int64_t e)
{
    return key > last.key || (key == last.key && e <= last.index);
}

static struct bound find_bound(const real *score, real divisor, const real *bias, int64_t experts,
                               int64_t topk)
{
    struct bound last = { 0, -1 };
    for (int64_t k = 0; k < topk; k++) {
        struct bound best = { 0, -1 };
        for (int64_t e = 0; e < experts; e++) {
            real key = key_of(score, divisor, bias, e);
            bool left = k == 0 || !chosen(last, key, e);
            if (left && (best.index < 0 || key > best.key))
                best = (struct bound){ key, e };
        }
        last = best;
    }
    return last;
}

/* The top-K of score + bias, in ascending order. */
static void choose(const real *score, const real *bias, int64_t experts, int64_t topk,
                   int32_t *choice)
{
    const struct bound last = find_bound(score, 1, bias, experts, topk);
    int64_t n = 0;
    for (int64_t e = 0; e < experts; e++)
        if (chosen(last, key_of(score, 1, bias, e), e))
            choice[n++] = (int32_t)e;
}

void REF(router_forward)(struct stream *s, in_t logits, in_t bias, double scaling, bool given,
                         out_t scores, out_t expert, out_t prob)
{
    const int64_t tokens = tensor_rows(logits), experts = tensor_cols(logits),
                  topk = tensor_cols(expert);
    const real *shift = bias != NULL ? ref_vector(bias, experts) : NULL;
    ref_expect(logits, tokens, experts);
    ref_expect(scores, tokens, experts);
    ref_expect(prob, tokens, topk);
    ref_index(expert, tokens * topk);
    ASSERT(topk >= 1 && topk <= experts);
    for (int64_t t = 0; t < tokens; t++) {
        const real *l = ref_row(logits, t);
        real *score = ref_row(scores, t), *p = ref_row(prob, t);
        int32_t *choice = (int32_t *)expert->data + t * topk;
        for (int64_t e = 0; e < experts; e++)
            score[e] = 1 / (1 + REF_EXP(-l[e]));
        if (!given)
            choose(score, shift, experts, topk, choice);
        double sum = 0;
        for (int64_t k = 0; k < topk; k++) {
            ASSERT(choice[k] > (k > 0 ? choice[k - 1] : -1) && choice[k] < experts);
            sum += score[choice[k]];
        }
        for (int64_t k = 0; k < topk; k++)
            p[k] = (real)(scaling * score[choice[k]] / (sum + 1e-20));
    }
}

void REF(router_balance)(struct stream *s, in_t scores, int topk, int64_t first_row,
                         int64_t seq_len, out_t count, out_t psum)
{
    const int64_t tokens = tensor_rows(scores), experts = tensor_cols(scores),
                  sequences = tensor_rows(count);
    ref_expect(scores, tokens, experts);
    ref_expect(psum, sequences, experts);
    ref_expect_dense(count, DTYPE_I64, sequences * experts);
    ASSERT(topk >= 1 && topk <= experts && first_row >= 0 &&
           first_row + tokens <= sequences * seq_len);
    for (int64_t b = 0; b < sequences; b++) {
        int64_t *n = (int64_t *)count->data + b * experts;
        int64_t begin = b * seq_len - first_row, end = begin + seq_len;
        begin = begin < 0 ? 0 : begin;
        end = end > tokens ? tokens : end;
        memset(n, 0, (size_t)experts * sizeof *n);
        for (int64_t t = begin; t < end; t++) {
            const real *score = ref_row(scores, t), all = (real)(ref_sum(score, experts) + 1e-20);
            const struct bound last = find_bound(score, all, NULL, experts, topk);
            for (int64_t e = 0; e < experts; e++)
                n[e] += chosen(last, key_of(score, all, NULL, e), e);
        }
        for (int64_t first = 0; first < experts; first += REF_COLUMNS) {
            const int64_t width = experts - first < REF_COLUMNS ? experts - first : REF_COLUMNS;
            double sum[REF_COLUMNS] = { 0 };
            for (int64_t t = begin; t < end; t++) {
                const real *score = ref_row(scores, t);
                const double all = ref_sum(score, experts) + 1e-20;
                for (int64_t e = 0; e < width; e++)
                    sum[e] += score[first + e] / all;
            }
            for (int64_t e = 0; e < width; e++)
                ref_row(psum, b)[first + e] = (real)sum[e];
        }
    }
}

void REF(router_balance_loss)(struct stream *s, in_t count, in_t psum, int topk, int64_t seq_len,
                              out_t metric)
{
    const int64_t sequences = tensor_rows(count), experts = tensor_cols(count);
    real *total = ref_vector(metric, 1);
    ref_expect(psum, sequences, experts);
    ref_expect_dense(count, DTYPE_I64, sequences * experts);
    double sum = 0;
    for (int64_t b = 0; b < sequences; b++)
        for (int64_t e = 0; e < experts; e++)
            sum += (double)ref_row(psum, b)[e] *
                   (double)((const int64_t *)count->data)[b * experts + e];
    if (sequences == 0 || seq_len == 0)
        return;
    const double length = (double)seq_len;
    *total = (real)(*total +
                    sum * (double)experts / ((double)topk * length * length) / (double)sequences);
}

/* ds_k = scaling (g_k - m)/Z over the chosen, ds_e += (ga_e - sum ga a)/Z_all over all; dl = ds s
 * (1-s). */
void REF(router_backward)(struct stream *s, in_t scores, in_t expert, in_t prob, in_t dprob,
                          double scaling, in_t count, double coeff, int64_t first_row,
                          int64_t seq_len, out_t dlogits)
{
    const int64_t tokens = tensor_rows(scores), experts = tensor_cols(scores),
                  topk = tensor_cols(expert);
    const int32_t *choice = ref_index(expert, tokens * topk);
    ref_expect(scores, tokens, experts);
    ref_expect(prob, tokens, topk);
    ref_expect(dprob, tokens, topk);
    ref_expect(dlogits, tokens, experts);
    if (count != NULL) {
        ASSERT(first_row >= 0 && first_row + tokens <= tensor_rows(count) * seq_len);
        ref_expect_dense(count, DTYPE_I64, tensor_rows(count) * experts);
    }
    const double factor = coeff * (double)experts / ((double)topk * (double)seq_len);
    for (int64_t t = 0; t < tokens; t++, choice += topk) {
        const real *score = ref_row(scores, t), *g = ref_row(dprob, t);
        const int64_t *n = count != NULL
                               ? (const int64_t *)count->data + (first_row + t) / seq_len * experts
                               : NULL;
        real *dl = ref_row(dlogits, t);
        double sum = 1e-20, mean = 0, all = 1, balance = 0;
        for (int64_t k = 0; k < topk; k++) {
            ASSERT(choice[k] >= 0 && choice[k] < experts);
            sum += score[choice[k]];
        }
        for (int64_t k = 0; k < topk; k++)
            mean += (double)g[k] * score[choice[k]] / sum;
        if (n != NULL)
            balance = add_balance_gradient(score, n, factor, experts, &all);
        for (int64_t e = 0, k = 0; e < experts; e++) {
            double ds = n != NULL ? (factor * (double)n[e] - balance) / all : 0, sigmoid = score[e];
            if (k < topk && choice[k] == e)
                ds += scaling * (g[k++] - mean) / sum;
            dl[e] = (real)(ds * sigmoid * (1 - sigmoid));
        }
    }
}

/* sum_e ga_e a_e with ga = factor*count; total = the denominator of a. */
static double add_balance_gradient(const real *score, const int64_t *count, double factor,
                                   int64_t experts, double *total)
{
    const double all = ref_sum(score, experts) + 1e-20;
    double sum = 0;
    for (int64_t e = 0; e < experts; e++)
        sum += factor * (double)count[e] * score[e] / all;
    *total = all;
    return sum;
}

void REF(moe_sort)(struct stream *s, in_t expert, in_t prob, out_t offsets, out_t row_token,
                   out_t row_prob, out_t token_row, out_t tokens_per_expert)
{
    const int64_t tokens = tensor_rows(expert), topk = tensor_cols(expert), copies = tokens * topk;
    const int64_t experts = tensor_numel(offsets) - 1;
    const int32_t *choice = ref_index(expert, copies);
    int32_t *first = offsets->data, *token = row_token->data, *row = token_row->data;
    real *p = ref_vector(row_prob, copies);
    ref_index(offsets, experts + 1);
    ref_index(row_token, copies);
    ref_index(token_row, copies);
    ref_expect(prob, tokens, topk);
    ref_int(copies);
    memset(first, 0, (size_t)(experts + 1) * sizeof *first);
    for (int64_t i = 0; i < copies; i++) {
        ASSERT(choice[i] >= 0 && choice[i] < experts);
        first[choice[i] + 1]++;
    }
    if (tokens_per_expert != NULL) {
        ref_expect_dense(tokens_per_expert, DTYPE_I64, experts);
        for (int64_t e = 0; e < experts; e++)
            ((int64_t *)tokens_per_expert->data)[e] += first[e + 1];
    }
    for (int64_t e = 0; e < experts; e++)
        first[e + 1] += first[e];
    /* While rows are handed out first[e] is the next free row of expert e, and in the end that of
     * e+1: shifted back below. */
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t k = 0; k < topk; k++) {
            const int32_t to = first[choice[t * topk + k]]++;
            token[to] = (int32_t)t;
            p[to] = ref_row(prob, t)[k];
            row[t * topk + k] = to;
        }
    for (int64_t e = experts; e > 0; e--)
        first[e] = first[e - 1];
    first[0] = 0;
}

void REF(dispatch_order)(struct stream *s, in_t all, int64_t first, out_t offsets, out_t order,
                         out_t inverse)
{
    const int64_t ranks = tensor_rows(all), stride = tensor_cols(all),
                  owned = tensor_numel(offsets) - 1, most = tensor_numel(order);
    const int32_t *from = ref_index(all, ranks * stride);
    int32_t *start = offsets->data, *received = order->data, *wanted = inverse->data;
    int64_t at = 0;
    ref_index(offsets, owned + 1);
    ref_index(order, most);
    ref_index(inverse, most);
    ASSERT(first >= 0 && owned >= 0 && first + owned < stride);
    for (int64_t e = first; e < first + owned; e++) {
        int64_t source = 0; /* first row that rank r sends here */
        start[e - first] = (int32_t)at;
        for (int64_t r = 0; r < ranks; r++) {
            const int32_t *own = from + r * stride;
            for (int64_t i = own[e]; i < own[e + 1]; i++, at++) {
                const int64_t row = source + i - own[first];
                if (at < most)
                    received[at] = (int32_t)row;
                if (row < most)
                    wanted[row] = (int32_t)at;
            }
            source += own[first + owned] - own[first];
        }
    }
    start[owned] = (int32_t)at;
}

void REF(moe_unsort_prob)(struct stream *s, in_t drow, in_t token_row, out_t dprob)
{
    const int64_t tokens = tensor_rows(token_row), topk = tensor_cols(token_row),
                  rows = tensor_numel(drow);
    const int32_t *row = ref_index(token_row, tokens * topk);
    const real *from = ref_vector(drow, rows);
    ref_expect(dprob, tokens, topk);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t k = 0; k < topk; k++, row++) {
            ASSERT(*row >= 0 && *row < rows);
            ref_row(dprob, t)[k] = from[*row];
        }
}

/* to = relu(from), which keeps a NaN. */
static void relu(const real *from, int64_t n, real *restrict to)
{
    for (int64_t i = 0; i < n; i++)
        to[i] = from[i] < 0 ? 0 : from[i];
}

void REF(expert_act_forward)(struct stream *s, in_t h, in_t prob, out_t y)
{
    const int64_t rows = tensor_rows(h), cols = tensor_cols(h);
    const real *p = ref_vector(prob, rows);
    ref_expect(h, rows, cols);
    ref_expect(y, rows, cols);
    for (int64_t r = 0; r < rows; r++) {
        real *restrict to = ref_row(y, r), factor = p[r];
        relu(ref_row(h, r), cols, to);
        for (int64_t i = 0; i < cols; i++)
            to[i] = to[i] * to[i] * factor;
    }
}

/* dh may be dy: a block of dy is read before it is written. */
void REF(expert_act_backward)(struct stream *s, in_t h, in_t prob, in_t dy, out_t dh, out_t dprob,
                              out_t y)
{
    const int64_t rows = tensor_rows(h), cols = tensor_cols(h);
    if (y != NULL)
        REF(expert_act_forward)(s, h, prob, y);
    const real *p = ref_vector(prob, rows);
    real *dp = ref_vector(dprob, rows);
    ref_expect(h, rows, cols);
    ref_expect(dy, rows, cols);
    ref_expect(dh, rows, cols);
    for (int64_t r = 0; r < rows; r++) {
        const real twice = 2 * p[r];
        double sum = 0;
        for (int64_t first = 0; first < cols; first += REF_COLUMNS) {
            const int64_t n = cols - first < REF_COLUMNS ? cols - first : REF_COLUMNS;
            real positive[REF_COLUMNS], slope[REF_COLUMNS];
            const real *from = ref_row(dy, r) + first;
            relu(ref_row(h, r) + first, n, positive);
            for (int64_t i = 0; i < n; i++)
                slope[i] = positive[i] * from[i];
            sum += ref_dot(positive, slope, n);
            for (int64_t i = 0; i < n; i++)
                slope[i] *= twice;
            memcpy(ref_row(dh, r) + first, slope, (size_t)n * sizeof *slope);
        }
        dp[r] = (real)sum;
    }
}

/* mean > count is E*count < total: exact in integers. */
void REF(expert_bias_update)(struct stream *s, double rate, out_t bias, out_t count)
{
    const int64_t experts = tensor_numel(count);
    int64_t *n = count->data, total = 0;
    real *b = ref_vector(bias, experts);
    ref_expect_dense(count, DTYPE_I64, experts);
    for (int64_t e = 0; e < experts; e++)
        total += n[e];
    for (int64_t e = 0; e < experts; e++) {
        if (experts * n[e] < total)
            b[e] += (real)rate;
        else if (experts * n[e] > total)
            b[e] -= (real)rate;
        n[e] = 0;
    }
}
