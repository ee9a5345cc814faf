/* loss.c - cross entropy over vocabulary rows spread on ranks (model.md 1.9): local maximum and
 * sum, what they are among all ranks', and the gradient.
 *
 * The caller reduces mx (max), then se and pl (sum) over its group in between. A label outside
 * [first, first+cols) is another rank's or nobody's: it gives pl = 0 and no onehot term.
 */
#include <string.h>
#include "ref_row.h"

void REF(loss_sum)(struct stream *s, in_t logits, out_t mx, out_t se)
{
    int64_t rows = tensor_rows(logits), cols = tensor_cols(logits);
    real *top = ref_vector(mx, rows), *sum = ref_vector(se, rows);
    ref_expect(logits, rows, cols);
    for (int64_t t = 0; t < rows;
         t++) { /* -infinity without columns: the identity of the reduction that follows */
        const real *x = ref_row(logits, t);
        const real m = ref_max(x, cols);
        double total = 0;
        for (int64_t from = 0; from < cols; from += REF_COLUMNS) {
            int64_t n = cols - from < REF_COLUMNS ? cols - from : REF_COLUMNS;
            real e[REF_COLUMNS];
            for (int64_t i = 0; i < n; i++)
                e[i] = REF_EXP(x[from + i] - m);
            total += ref_sum(e, n);
        }
        top[t] = m;
        sum[t] = (real)total;
    }
}

void REF(loss_label)(struct stream *s, in_t logits, in_t labels, int64_t first, in_t own, in_t mx,
                     out_t se, out_t pl)
{
    int64_t rows = tensor_rows(logits), cols = tensor_cols(logits);
    const int64_t *label = labels->data;
    const real *here = ref_vector(own, rows), *top = ref_vector(mx, rows);
    real *sum = ref_vector(se, rows), *picked = ref_vector(pl, rows);
    ref_expect_dense(labels, DTYPE_I64, rows);
    ref_expect(logits, rows, cols);
    for (int64_t t = 0; t < rows; t++) {
        sum[t] *= REF_EXP(here[t] - top[t]);
        picked[t] = label[t] >= first && label[t] - first < cols
                        ? ref_row(logits, t)[label[t] - first] - top[t]
                        : 0;
    }
}

void REF(loss_finish)(struct stream *s, in_t se, in_t pl, in_t mask, out_t loss, out_t total)
{
    int64_t rows = tensor_numel(loss);
    const real *sum = ref_vector(se, rows), *picked = ref_vector(pl, rows),
               *keep = ref_vector(mask, rows);
    real *out = ref_vector(loss, rows), *into = ref_vector(total, 1);
    double all = 0;
    for (int64_t t = 0; t < rows; t++) {
        double value = log((double)sum[t]) - picked[t];
        out[t] = (real)value;
        all += value * keep[t];
    }
    into[0] = (real)(into[0] + all);
}

void REF(loss_backward)(struct stream *s, in_t labels, int64_t first, in_t mx, in_t se, in_t mask,
                        out_t logits)
{
    int64_t rows = tensor_rows(logits), cols = tensor_cols(logits);
    const int64_t *label = labels->data;
    const real *top = ref_vector(mx, rows), *sum = ref_vector(se, rows),
               *keep = ref_vector(mask, rows);
    ref_expect_dense(labels, DTYPE_I64, rows);
    ref_expect(logits, rows, cols);
    for (int64_t t = 0; t < rows; t++) {
        real *x = ref_row(logits, t), m = top[t], scale = keep[t] / sum[t];
        if (keep[t] == 0) {
            memset(x, 0, (size_t)cols * sizeof(real));
            continue;
        }
        for (int64_t i = 0; i < cols; i++)
            x[i] = REF_EXP(x[i] - m) * scale;
        if (label[t] >= first && label[t] - first < cols)
            x[label[t] - first] -= keep[t];
    }
}
