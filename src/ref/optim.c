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

void REF(sum_wide)(struct stream *s, in_t x, out_t total)
{
    const int64_t n = tensor_numel(x);
    const real *from = ref_vector(x, n);
    double sum = 0;
    ref_expect_dense(total, DTYPE_F64, 1);
    for (int64_t i = 0; i < n; i++)
        sum += from[i];
    *(double *)total->data = sum;
}

void REF(decide_update)(struct stream *s, in_t numbers, double tokens, const double *factor,
                        double clip, double threshold, out_t result)
{
    const int64_t ranks = tensor_rows(numbers), n = tensor_cols(numbers), modules = n - 1;
    const double *rows = numbers->data;
    double *out = result->data, loss = 0, norm = 0, scale = 1;
    int worst = 0, bad = -1;
    ref_expect_dense(numbers, DTYPE_F64, ranks * n);
    ref_expect_dense(result, DTYPE_F64, modules + 3);
    for (int64_t r = 0; r < ranks; r++)
        loss += rows[r * n];
    loss /= tokens > 1 ? tokens : 1;
    for (int64_t i = 0; i < modules; i++) {
        double square = 0;
        for (int64_t r = 0; r < ranks; r++)
            square += rows[r * n + 1 + i];
        square = square * factor[i] * factor[i];
        const int state = isnan(square) ? 2 : isinf(square) ? 1 : 0;
        if (state > worst) {
            worst = state;
            bad = (int)i;
        }
        norm += state ? 0 : square;
    }
    norm = worst == 2 ? NAN : worst == 1 ? INFINITY : sqrt(norm);
    if (clip > 0 && clip < norm + 1e-6)
        scale = clip / (norm + 1e-6);
    const bool update = isfinite(loss) && bad < 0 && !(threshold > 0 && norm > threshold);
    for (int64_t i = 0; i < modules; i++)
        out[i] = update ? factor[i] * scale : -1;
    out[modules] = loss;
    out[modules + 1] = norm;
    out[modules + 2] = bad;
}

void REF(adamw)(struct stream *s, in_t grad, in_t factor, double lr, double beta1, double beta2,
                double eps, double wd, int64_t step, out_t master, out_t m, out_t v, out_t param)
{
    int64_t rows = tensor_rows(master), cols = tensor_cols(master);
    const real b1 = (real)beta1, c1 = (real)(1 - beta1), b2 = (real)beta2, c2 = (real)(1 - beta2);
    const real correct1 = (real)(1 / (1 - pow(beta1, (double)step))),
               correct2 = (real)(1 / (1 - pow(beta2, (double)step)));
    ASSERT(step >= 1);
    ref_expect_dense(factor, DTYPE_F64, 1);
    const double scale = *(const double *)factor->data;
    ref_expect(grad, rows, cols);
    ref_expect(master, rows, cols);
    ref_expect(m, rows, cols);
    ref_expect(v, rows, cols);
    ref_expect(param, rows, cols);
    if (scale < 0)
        return;
    for (int64_t r = 0; r < rows; r++) {
        const real *from = ref_row(grad, r);
        real *p = ref_row(master, r), *first = ref_row(m, r), *second = ref_row(v, r),
             *out = ref_row(param, r);
        for (int64_t i = 0; i < cols; i++) {
            real g = from[i] * (real)scale;
            first[i] = b1 * first[i] + c1 * g;
            second[i] = b2 * second[i] + c2 * g * g;
            p[i] -= (real)lr * (first[i] * correct1 / (REF_SQRT(second[i] * correct2) + (real)eps) +
                                (real)wd * p[i]);
            out[i] = p[i];
        }
    }
}
