/* rows.c - gathering rows, and the embedding of merged text and pictures (model.md 1.3, 3).
 *
 * Scatter-adds run over tokens in ascending order, so that repeated token ids add up in one fixed
 * order.
 */
#include <string.h>
#include "ref_row.h"

void REF(gather_rows)(struct stream *s, in_t in, in_t index, out_t out)
{
    int64_t rows = tensor_rows(out), cols = tensor_cols(out);
    const int32_t *from = ref_index(index, rows);
    ref_expect(in, tensor_rows(in), cols);
    ref_expect(out, rows, cols);
    for (int64_t r = 0; r < rows; r++) {
        ASSERT(from[r] < tensor_rows(in));
        if (from[r] >= 0)
            memcpy(ref_row(out, r), ref_row(in, from[r]), (size_t)cols * sizeof(real));
        else
            memset(ref_row(out, r), 0, (size_t)cols * sizeof(real));
    }
}

/* A negative index contributes nothing, as in gather_rows. */
void REF(gather_sum_rows)(struct stream *s, in_t in, in_t index, double beta, out_t out)
{
    int64_t rows = tensor_rows(out), cols = tensor_cols(out), k = tensor_cols(index);
    const int32_t *from = ref_index(index, rows * k);
    ref_expect(in, tensor_rows(in), cols);
    ref_expect(out, rows, cols);
    ASSERT(beta == 0 || beta == 1);
    for (int64_t r = 0; r < rows; r++, from += k) {
        real *to = ref_row(out, r);
        for (int64_t j = 0; j < k; j++)
            ASSERT(from[j] < tensor_rows(in));
        for (int64_t first = 0; first < cols; first += REF_COLUMNS) {
            int64_t n = cols - first < REF_COLUMNS ? cols - first : REF_COLUMNS;
            double sum[REF_COLUMNS] = { 0 };
            for (int64_t j = 0; j < k; j++) {
                if (from[j] < 0)
                    continue;
                const real *x = ref_row(in, from[j]) + first;
                for (int64_t i = 0; i < n; i++)
                    sum[i] += x[i];
            }
            for (int64_t i = 0; i < n; i++)
                to[first + i] = (real)(beta == 0 ? sum[i] : to[first + i] + sum[i]);
        }
    }
}

void REF(embed_merge_forward)(struct stream *s, in_t ids, in_t image_row, in_t table, int64_t first,
                              in_t image, out_t out)
{
    int64_t rows = tensor_rows(out), cols = tensor_cols(out),
            images = image != NULL ? tensor_rows(image) : 0;
    const int32_t *picture = ref_index(image_row, rows);
    const int64_t *id = ids->data, table_rows = tensor_rows(table);
    ref_expect_dense(ids, DTYPE_I64, rows);
    ref_expect(table, table_rows, cols);
    ref_expect(out, rows, cols);
    if (images > 0)
        ref_expect(image, images, cols);
    for (int64_t t = 0; t < rows; t++) {
        real *to = ref_row(out, t);
        ASSERT(image == NULL || picture[t] < images);
        if (picture[t] >= 0 && image != NULL)
            memcpy(to, ref_row(image, picture[t]), (size_t)cols * sizeof(real));
        else if (picture[t] < 0 && id[t] >= first && id[t] - first < table_rows)
            memcpy(to, ref_row(table, id[t] - first), (size_t)cols * sizeof(real));
        else
            memset(to, 0, (size_t)cols * sizeof(real));
    }
}

void REF(embed_merge_backward)(struct stream *s, in_t ids, in_t image_row, in_t dout, int64_t first,
                               out_t dtable, out_t dimage)
{
    int64_t rows = tensor_rows(dout), cols = tensor_cols(dout);
    int64_t images = dimage != NULL ? tensor_rows(dimage) : 0,
            table_rows = dtable != NULL ? tensor_rows(dtable) : 0;
    const int32_t *picture = ref_index(image_row, rows);
    const int64_t *id = ids->data;
    ref_expect_dense(ids, DTYPE_I64, rows);
    ref_expect(dout, rows, cols);
    if (dtable != NULL)
        ref_expect(dtable, table_rows, cols);
    if (images > 0)
        ref_expect(dimage, images, cols);
    for (int64_t t = 0; t < rows; t++) {
        const real *from = ref_row(dout, t);
        ASSERT(dimage == NULL || picture[t] < images);
        if (picture[t] >= 0) {
            if (dimage != NULL)
                memcpy(ref_row(dimage, picture[t]), from, (size_t)cols * sizeof(real));
        } else if (dtable != NULL && id[t] >= first && id[t] - first < table_rows) {
            real *to = ref_row(dtable, id[t] - first);
            for (int64_t i = 0; i < cols; i++)
                to[i] += from[i];
        }
    }
}
