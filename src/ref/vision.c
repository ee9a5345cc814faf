/* vision.c - token rows of the encoder: patches with their position, class tokens
 * (model.md 2.3, 2.4), and their gradients.
 *
 * Which grid points with which weights is decided on the host (vit_map.h); here it is a sparse
 * linear map of at most four points per patch. The backward pass adds into the grid in ascending
 * row order.
 */
#include <string.h>
#include "ref_row.h"

void REF(vit_assemble_forward)(struct stream *s, in_t e, in_t class_token, in_t grid,
                               in_t row_source, in_t pos_index, in_t pos_w, out_t x)
{
    int64_t rows = tensor_rows(x), cols = tensor_cols(x), patches = tensor_rows(e),
            classes = tensor_rows(class_token);
    int64_t points = tensor_rows(grid);
    const int32_t *source = ref_index(row_source, rows), *index = ref_index(pos_index, 4 * patches);
    const real *weight = ref_vector(pos_w, 4 * patches);
    ref_expect(e, patches, cols);
    ref_expect(class_token, classes, cols);
    ref_expect(grid, points, cols);
    ref_expect(x, rows, cols);
    for (int64_t r = 0; r < rows; r++) {
        real *to = ref_row(x, r);
        int64_t p = source[r];
        ASSERT(p < patches && -1 - p < classes);
        if (p < 0) {
            memcpy(to, ref_row(class_token, -1 - p), (size_t)cols * sizeof(real));
            continue;
        }
        const real *from = ref_row(e, p), *at[4], *w = weight + 4 * p;
        for (int k = 0; k < 4; k++) {
            ASSERT(index[4 * p + k] >= 0 && index[4 * p + k] < points);
            at[k] = ref_row(grid, index[4 * p + k]);
        }
        for (int64_t i = 0; i < cols; i++) {
            double sum = 0;
            for (int k = 0; k < 4; k++)
                sum += (double)w[k] * at[k][i];
            to[i] = from[i] + (real)sum;
        }
    }
}

void REF(vit_assemble_backward)(struct stream *s, in_t dx, in_t row_source, in_t pos_index,
                                in_t pos_w, out_t de, out_t dclass_token, out_t dgrid)
{
    int64_t rows = tensor_rows(dx), cols = tensor_cols(dx), patches = tensor_rows(de),
            classes = tensor_rows(dclass_token);
    int64_t points = tensor_rows(dgrid);
    const int32_t *source = ref_index(row_source, rows), *index = ref_index(pos_index, 4 * patches);
    const real *weight = ref_vector(pos_w, 4 * patches);
    ref_expect(dx, rows, cols);
    ref_expect(de, patches, cols);
    ref_expect(dclass_token, classes, cols);
    ref_expect(dgrid, points, cols);
    for (int64_t r = 0; r < rows; r++) {
        const real *from = ref_row(dx, r);
        int64_t p = source[r];
        ASSERT(p < patches && -1 - p < classes);
        if (p < 0) {
            real *to = ref_row(dclass_token, -1 - p);
            for (int64_t i = 0; i < cols; i++)
                to[i] += from[i];
            continue;
        }
        memcpy(ref_row(de, p), from, (size_t)cols * sizeof(real));
        for (int k = 0; k < 4; k++) {
            real w = weight[4 * p + k];
            ASSERT(index[4 * p + k] >= 0 && index[4 * p + k] < points);
            real *to = ref_row(dgrid, index[4 * p + k]);
            if (w == 0)
                continue;
            for (int64_t i = 0; i < cols; i++)
                to[i] += w * from[i];
        }
    }
}
