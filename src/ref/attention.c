/* attention.c - grouped-query attention on ragged batches, forward and backward. Formulas:
 * model.md 1.5.
 *
 * One (segment, query head) after the other, in tiles of TILE queries by TILE keys through the
 * BLAS. Forward keeps a running maximum and sum per query (online softmax) and rescales its output
 * row when the maximum grows; backward recomputes the probabilities from the saved log-sum-exp.
 * Tiles above the diagonal of a causal segment are never formed. Scratch is a fixed number of tiles
 * on the stack, so a segment may be of any length. Segments never meet in one matrix product: what
 * one holds cannot reach another, not even in rounding.
 */
#include <string.h>
#include "ref_row.h"

enum { TILE = 128 };

/* One query head of one segment: rows are tokens, `ld` apart. */
struct head {
    int len; /* rows of the segment */
    int d;
    bool causal;
    real scale;
    const real *q, *k, *v; /* [len, d] */
    int ld;
};

static struct head head_of(in_t qkv, const int32_t *cu, int64_t segment, int n, int g, int d,
                           bool causal, int index);
static void check_arguments(in_t qkv, in_t cu, int64_t max_len, int n, int g, int d, in_t o,
                            in_t lse);
static void forward_head(const struct head *h, real *o, int ldo, real *lse, int64_t ldl);
static void backward_head(const struct head *h, const real *o, int ldo, const real *lse,
                          int64_t ldl, const real *do_, int lddo, real *dq, real *dk, real *dv,
                          int lddq);

static int smaller(int a, int b)
{
    return a < b ? a : b;
}

/* The tiles lie on the stack. */
int64_t REF(attention_work)(int64_t tokens, int64_t segments, int64_t max_len, int n, int g, int d,
                            bool causal)
{
    return 0;
}

void REF(attention_forward)(struct stream *s, in_t qkv, in_t cu, int64_t max_len, int n, int g,
                            int d, bool causal, in_t work, out_t o, out_t lse)
{
    check_arguments(qkv, cu, max_len, n, g, d, o, lse);
    const int32_t *first = cu->data;
    for (int64_t i = 0; i + 1 < tensor_numel(cu); i++)
        for (int j = 0; j < n && first[i] < first[i + 1]; j++) {
            struct head h = head_of(qkv, first, i, n, g, d, causal, j);
            forward_head(&h, ref_row(o, first[i]) + (int64_t)j * d, ref_int(o->ld),
                         ref_row(lse, first[i]) + j, lse->ld);
        }
}

void REF(attention_backward)(struct stream *s, in_t qkv, in_t cu, int64_t max_len, int n, int g,
                             int d, bool causal, in_t o, in_t lse, in_t do_, in_t work, out_t dqkv)
{
    check_arguments(qkv, cu, max_len, n, g, d, o, lse);
    ref_expect(do_, tensor_rows(o), tensor_cols(o));
    ref_expect(dqkv, tensor_rows(qkv), tensor_cols(qkv));
    const int32_t *first = cu->data;
    /* Heads of a group add to the same dk and dv, in ascending order. */
    for (int64_t r = 0; r < tensor_rows(dqkv); r++)
        memset(ref_row(dqkv, r), 0, (size_t)tensor_cols(dqkv) * sizeof(real));
    for (int64_t i = 0; i + 1 < tensor_numel(cu); i++)
        for (int j = 0; j < n && first[i] < first[i + 1]; j++) {
            struct head h = head_of(qkv, first, i, n, g, d, causal, j);
            const real *base = ref_row(qkv, first[i]);
            real *out = ref_row(dqkv, first[i]);
            backward_head(&h, ref_row(o, first[i]) + (int64_t)j * d, ref_int(o->ld),
                          ref_row(lse, first[i]) + j, lse->ld,
                          ref_row(do_, first[i]) + (int64_t)j * d, ref_int(do_->ld),
                          out + (h.q - base), out + (h.k - base), out + (h.v - base),
                          ref_int(dqkv->ld));
        }
}

static void check_arguments(in_t qkv, in_t cu, int64_t max_len, int n, int g, int d, in_t o,
                            in_t lse)
{
    int64_t rows = tensor_rows(qkv), segments = tensor_numel(cu) - 1;
    ASSERT(n > 0 && g > 0 && d > 0 && n % g == 0 && segments >= 0);
    ref_expect(qkv, rows, ((int64_t)n + 2 * (int64_t)g) * d);
    ref_expect(o, rows, (int64_t)n * d);
    ref_expect(lse, rows, n);
    const int32_t *first = ref_index(cu, segments + 1);
    ASSERT(first[0] == 0 && first[segments] == rows);
    for (int64_t i = 0; i < segments; i++)
        ASSERT(first[i + 1] >= first[i] && first[i + 1] - first[i] <= max_len);
}

/* Columns of a group: n/g query heads, the key head, the value head. */
static struct head head_of(in_t qkv, const int32_t *cu, int64_t segment, int n, int g, int d,
                           bool causal, int index)
{
    int per_group = n / g;
    const real *group =
        ref_row(qkv, cu[segment]) + (int64_t)(index / per_group) * (per_group + 2) * d;
    return (struct head){ .len = cu[segment + 1] - cu[segment],
                          .d = d,
                          .causal = causal,
                          .scale = (real)(1 / sqrt(d)),
                          .q = group + (int64_t)(index % per_group) * d,
                          .k = group + (int64_t)per_group * d,
                          .v = group + (int64_t)(per_group + 1) * d,
                          .ld = ref_int(qkv->ld) };
}

/* score [rows, cols] of the tile becomes exp(score - top); top and sum (of the exponentials)
 * follow; returns through `shrink` the factor by which what was accumulated before must be
 * multiplied. */
static void softmax_tile(real (*score)[TILE], int rows, int cols, bool diagonal, real *top,
                         double *sum, real *shrink)
{
    for (int i = 0; i < rows; i++) {
        int visible = diagonal ? i + 1 : cols;
        real *p = score[i], here = ref_max(p, visible), m = here > top[i] ? here : top[i];
        shrink[i] = m == top[i] ? 1 : REF_EXP(top[i] - m);
        for (int j = 0; j < visible; j++)
            p[j] = REF_EXP(p[j] - m);
        for (int j = visible; j < cols; j++)
            p[j] = 0;
        top[i] = m;
        sum[i] = sum[i] * shrink[i] + ref_sum(p, visible);
    }
}

static void forward_head(const struct head *h, real *o, int ldo, real *lse, int64_t ldl)
{
    real p[TILE][TILE], top[TILE], shrink[TILE];
    double sum[TILE];
    for (int q0 = 0; q0 < h->len; q0 += TILE) {
        int rows = smaller(TILE, h->len - q0), keys = h->causal ? q0 + rows : h->len;
        for (int i = 0; i < rows; i++) {
            top[i] = -INFINITY;
            sum[i] = 0;
        }
        for (int k0 = 0; k0 < keys; k0 += TILE) {
            int cols = smaller(TILE, keys - k0);
            REF_GEMM(CblasRowMajor, CblasNoTrans, CblasTrans, rows, cols, h->d, h->scale,
                     h->q + (int64_t)q0 * h->ld, h->ld, h->k + (int64_t)k0 * h->ld, h->ld, 0, p[0],
                     TILE);
            softmax_tile(p, rows, cols, h->causal && k0 == q0, top, sum, shrink);
            for (int i = 0; k0 > 0 && i < rows; i++)
                for (int j = 0; shrink[i] != 1 && j < h->d; j++)
                    o[(int64_t)(q0 + i) * ldo + j] *= shrink[i];
            REF_GEMM(CblasRowMajor, CblasNoTrans, CblasNoTrans, rows, h->d, cols, 1, p[0], TILE,
                     h->v + (int64_t)k0 * h->ld, h->ld, k0 > 0 ? 1 : 0, o + (int64_t)q0 * ldo, ldo);
        }
        for (int i = 0; i < rows; i++) {
            real inverse = (real)(1 / sum[i]);
            for (int j = 0; j < h->d; j++)
                o[(int64_t)(q0 + i) * ldo + j] *= inverse;
            lse[(q0 + i) * ldl] = (real)(top[i] + log(sum[i]));
        }
    }
}

/* p [rows, cols]: scores become probabilities; dp becomes the scores' gradient without the factor
 * scale. */
static void gradient_tile(real (*p)[TILE], real (*dp)[TILE], int rows, int cols, bool diagonal,
                          const real *lse, int64_t ldl, const real *dot)
{
    for (int i = 0; i < rows; i++) {
        int visible = diagonal ? i + 1 : cols;
        real l = lse[i * ldl];
        for (int j = 0; j < visible; j++)
            p[i][j] = REF_EXP(p[i][j] - l);
        for (int j = 0; j < visible; j++)
            dp[i][j] = p[i][j] * (dp[i][j] - dot[i]);
        for (int j = visible; j < cols; j++)
            p[i][j] = dp[i][j] = 0;
    }
}

static void backward_head(const struct head *h, const real *o, int ldo, const real *lse,
                          int64_t ldl, const real *do_, int lddo, real *dq, real *dk, real *dv,
                          int lddq)
{
    real p[TILE][TILE], dp[TILE][TILE], dot[TILE];
    for (int q0 = 0; q0 < h->len; q0 += TILE) {
        int rows = smaller(TILE, h->len - q0), keys = h->causal ? q0 + rows : h->len;
        const real *q = h->q + (int64_t)q0 * h->ld, *dout = do_ + (int64_t)q0 * lddo;
        for (int i = 0; i < rows; i++)
            dot[i] = (real)ref_dot(dout + (int64_t)i * lddo, o + (int64_t)(q0 + i) * ldo, h->d);
        for (int k0 = 0; k0 < keys; k0 += TILE) {
            int cols = smaller(TILE, keys - k0);
            const real *k = h->k + (int64_t)k0 * h->ld, *v = h->v + (int64_t)k0 * h->ld;
            REF_GEMM(CblasRowMajor, CblasNoTrans, CblasTrans, rows, cols, h->d, h->scale, q, h->ld,
                     k, h->ld, 0, p[0], TILE);
            REF_GEMM(CblasRowMajor, CblasNoTrans, CblasTrans, rows, cols, h->d, 1, dout, lddo, v,
                     h->ld, 0, dp[0], TILE);
            gradient_tile(p, dp, rows, cols, h->causal && k0 == q0, lse + q0 * ldl, ldl, dot);
            REF_GEMM(CblasRowMajor, CblasNoTrans, CblasNoTrans, rows, h->d, cols, h->scale, dp[0],
                     TILE, k, h->ld, 1, dq + (int64_t)q0 * lddq, lddq);
            REF_GEMM(CblasRowMajor, CblasTrans, CblasNoTrans, cols, h->d, rows, h->scale, dp[0],
                     TILE, q, h->ld, 1, dk + (int64_t)k0 * lddq, lddq);
            REF_GEMM(CblasRowMajor, CblasTrans, CblasNoTrans, cols, h->d, rows, 1, p[0], TILE, dout,
                     lddo, 1, dv + (int64_t)k0 * lddq, lddq);
        }
    }
}
