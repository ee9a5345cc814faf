/* tensor.h - a view of memory: what every operation takes.
 *
 * Row-major. A tensor is a matrix of `rows` = shape[0]*...*shape[ndim-2] rows and `cols` =
 * shape[ndim-1] columns; consecutive rows lie `ld` elements apart (ld == cols when dense). A view
 * owns nothing. Weights are [out, in]; activations are [tokens, width] with tokens = micro-batch
 * sample by sample, each sample its S positions in order ("batch-major"), so a micro-batch of B
 * samples is B segments of one ragged batch.
 */
#ifndef MIMO_TENSOR_H
#define MIMO_TENSOR_H

#include <stddef.h>
#include <stdint.h>

enum dtype { DTYPE_F32, DTYPE_F64, DTYPE_BF16, DTYPE_I32, DTYPE_I64, DTYPE_U8 };
/* the reference backend's device memory is host memory */
enum place { PLACE_HOST, PLACE_DEVICE };

enum { TENSOR_MAX_DIMS = 4 };

struct tensor {
    void *data;
    enum dtype dtype;
    enum place place;
    int ndim;
    int64_t shape[TENSOR_MAX_DIMS];
    int64_t ld;
};

/* Local, all of them; views share the memory of their argument. */
size_t dtype_bytes(enum dtype dtype);
const char *dtype_name(enum dtype dtype); /* "fp32", "bf16", "int64", ... */
struct tensor tensor_view(void *data, enum dtype dtype, enum place place, int ndim,
                          const int64_t *shape);
struct tensor tensor_1d(void *data, enum dtype dtype, enum place place, int64_t n);
struct tensor tensor_2d(void *data, enum dtype dtype, enum place place, int64_t rows, int64_t cols);
int64_t tensor_rows(const struct tensor *t);
int64_t tensor_cols(const struct tensor *t);
int64_t tensor_numel(const struct tensor *t);
/* Rows [first, first+n) of a matrix; columns [first, first+n). */
struct tensor tensor_row_range(const struct tensor *t, int64_t first, int64_t n);
struct tensor tensor_col_range(const struct tensor *t, int64_t first, int64_t n);
/* The first n entries of dimension 0: rows of a matrix, elements of a vector. */
struct tensor tensor_first(const struct tensor *t, int64_t n);
/* The same dense memory with another shape (equal numel, checked). */
struct tensor tensor_reshape(const struct tensor *t, int ndim, const int64_t *shape);

#endif
