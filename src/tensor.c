/* tensor.c - views of memory; no data is touched here. A view made in the arena's counting pass has
 * data = NULL and stays NULL through every derived view.
 */
#include "tensor.h"
#include "check.h"

static char *advance(const struct tensor *t, int64_t elements);

size_t dtype_bytes(enum dtype dtype)
{
    static const size_t bytes[] = { [DTYPE_F32] = 4, [DTYPE_F64] = 8, [DTYPE_BF16] = 2,
                                    [DTYPE_I32] = 4, [DTYPE_I64] = 8, [DTYPE_U8] = 1 };
    ASSERT((size_t)dtype < sizeof bytes / sizeof *bytes);
    return bytes[dtype];
}

const char *dtype_name(enum dtype dtype)
{
    static const char *const name[] = {
        [DTYPE_F32] = "fp32",  [DTYPE_F64] = "fp64",  [DTYPE_BF16] = "bf16",
        [DTYPE_I32] = "int32", [DTYPE_I64] = "int64", [DTYPE_U8] = "uint8"
    };
    ASSERT((size_t)dtype < sizeof name / sizeof *name);
    return name[dtype];
}

struct tensor tensor_view(void *data, enum dtype dtype, enum place place, int ndim,
                          const int64_t *shape)
{
    ASSERT(ndim >= 1 && ndim <= TENSOR_MAX_DIMS);
    struct tensor t = {
        .data = data, .dtype = dtype, .place = place, .ndim = ndim, .ld = shape[ndim - 1]
    };
    for (int d = 0; d < ndim; d++) {
        ASSERT(shape[d] >= 0);
        t.shape[d] = shape[d];
    }
    return t;
}

struct tensor tensor_1d(void *data, enum dtype dtype, enum place place, int64_t n)
{
    return tensor_view(data, dtype, place, 1, &n);
}

struct tensor tensor_2d(void *data, enum dtype dtype, enum place place, int64_t rows, int64_t cols)
{
    return tensor_view(data, dtype, place, 2, (int64_t[]){ rows, cols });
}

int64_t tensor_rows(const struct tensor *t)
{
    int64_t rows = 1;
    for (int d = 0; d < t->ndim - 1; d++)
        rows *= t->shape[d];
    return rows;
}

int64_t tensor_cols(const struct tensor *t)
{
    return t->shape[t->ndim - 1];
}

int64_t tensor_numel(const struct tensor *t)
{
    return tensor_rows(t) * tensor_cols(t);
}

struct tensor tensor_row_range(const struct tensor *t, int64_t first, int64_t n)
{
    ASSERT(first >= 0 && n >= 0 && first + n <= tensor_rows(t));
    struct tensor r = { .data = advance(t, first * t->ld),
                        .dtype = t->dtype,
                        .place = t->place,
                        .ndim = 2,
                        .shape = { n, tensor_cols(t) },
                        .ld = t->ld };
    return r;
}

struct tensor tensor_col_range(const struct tensor *t, int64_t first, int64_t n)
{
    ASSERT(first >= 0 && n >= 0 && first + n <= tensor_cols(t));
    struct tensor r = *t;
    r.data = advance(t, first);
    r.shape[r.ndim - 1] = n;
    return r;
}

struct tensor tensor_first(const struct tensor *t, int64_t n)
{
    return t->ndim == 1 ? tensor_col_range(t, 0, n) : tensor_row_range(t, 0, n);
}

struct tensor tensor_reshape(const struct tensor *t, int ndim, const int64_t *shape)
{
    ASSERT(t->ld == tensor_cols(t) || tensor_rows(t) <= 1);
    struct tensor r = tensor_view(t->data, t->dtype, t->place, ndim, shape);
    ASSERT(tensor_numel(&r) == tensor_numel(t));
    return r;
}

static char *advance(const struct tensor *t, int64_t elements)
{
    return t->data ? (char *)t->data + elements * (int64_t)dtype_bytes(t->dtype) : NULL;
}
