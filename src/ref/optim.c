/* optim.c - gradient statistics and AdamW (parallel.md 7.3), decoupled weight decay with the same
 * old parameter in both terms. */
#include "ref_row.h"

void REF(sum_squares)(struct stream *s, in_t x, out_t total)
{
    int64_t rows = tensor_rows(x), cols = tensor_cols(x);
    real *into = ref_vector(total, 1);
    double sum = 0;
    ref_expect(x, rows, cols);
    for (int64_t r = 0; r < rows; r++)
        sum += ref_dot(ref_row(x, r), ref_row(x, r), cols);
    into[0] = (real)(into[0] + sum);
}

void REF(count_zeros)(struct stream *s, in_t x, out_t total)
{
    int64_t rows = tensor_rows(x), cols = tensor_cols(x), count = 0, *into = total->data;
    ref_expect_dense(total, DTYPE_I64, 1);
    ref_expect(x, rows, cols);
    for (int64_t r = 0; r < rows; r++) {
        const real *row = ref_row(x, r);
        for (int64_t i = 0; i < cols; i++)
            count += row[i] == 0;
    }
    into[0] += count;
}

void REF(adamw)(struct stream *s, in_t grad, double factor, double lr, double beta1, double beta2,
                double eps, double wd, int64_t step, out_t master, out_t m, out_t v, out_t param)
{
    int64_t rows = tensor_rows(master), cols = tensor_cols(master);
    const real b1 = (real)beta1, c1 = (real)(1 - beta1), b2 = (real)beta2, c2 = (real)(1 - beta2);
    const real correct1 = (real)(1 / (1 - pow(beta1, (double)step))),
               correct2 = (real)(1 / (1 - pow(beta2, (double)step)));
    ASSERT(step >= 1);
    ref_expect(grad, rows, cols);
    ref_expect(master, rows, cols);
    ref_expect(m, rows, cols);
    ref_expect(v, rows, cols);
    ref_expect(param, rows, cols);
    for (int64_t r = 0; r < rows; r++) {
        const real *from = ref_row(grad, r);
        real *p = ref_row(master, r), *first = ref_row(m, r), *second = ref_row(v, r),
             *out = ref_row(param, r);
        for (int64_t i = 0; i < cols; i++) {
            real g = from[i] * (real)factor;
            first[i] = b1 * first[i] + c1 * g;
            second[i] = b2 * second[i] + c2 * g * g;
            p[i] -= (real)lr * (first[i] * correct1 / (REF_SQRT(second[i] * correct2) + (real)eps) +
                                (real)wd * p[i]);
            out[i] = p[i];
        }
    }
}
