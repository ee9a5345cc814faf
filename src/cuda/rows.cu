/* rows.cu - gathering rows, and the embedding of merged text and pictures (model.md 1.3, 3).
 *
 * A warp copies 1024 columns of a row at a time. Gradients of vocabulary rows are added up by
 * sorted token ids (scatter.cuh), so that repeated ids add up in one fixed order. Indices come from
 * the program's own kernels and are not checked.
 */
#include <cub/device/device_radix_sort.cuh>
#include "scatter.cuh"

enum { WARPS = 8, ROUNDS = 4, SPAN = WARP * CHUNK * ROUNDS };

/* ---- rows from somewhere to somewhere ---- */

/* For every row: to.row(plan.to(r)) = plan.from(r), or zeros where that is NULL; nothing where
 * plan.to(r) < 0. */
template <bool VEC, class T, class P>
static __global__ void __launch_bounds__(WARPS *WARP)
    copy_rows_kernel(int64_t rows, matrix<T> to, P plan)
{
    const int64_t r = blockIdx.x * (int64_t)WARPS + threadIdx.x / WARP,
                  start = blockIdx.y * (int64_t)SPAN + threadIdx.x % WARP * CHUNK;
    if (r >= rows)
        return;
    const int64_t place = plan.to(r);
    const T *from = plan.from(r);
    if (place < 0)
        return;
    chunk<T> c[ROUNDS];
#pragma unroll
    for (int k = 0; k < ROUNDS; k++) {
        const int64_t at = start + k * WARP * CHUNK;
        c[k] = read_chunk<VEC>(from + at, from ? chunk_size(to.cols, at) : 0);
    }
#pragma unroll
    for (int k = 0; k < ROUNDS; k++) {
        const int64_t at = start + k * WARP * CHUNK;
        float v[CHUNK];
        widen_chunk(c[k], v);
        store_chunk<VEC>(to.row(place) + at, chunk_size(to.cols, at), v);
    }
}

static dim3 grid_of(int64_t rows, int64_t cols)
{
    return dim3(blocks_for(rows, WARPS), (unsigned)((cols + SPAN - 1) / SPAN));
}

template <bool VEC, class T, class P>
static void copy_rows(struct stream *s, int64_t rows, out_t to, P plan)
{
    copy_rows_kernel<VEC, T>
        <<<grid_of(rows, tensor_cols(to)), WARPS * WARP, 0, cuda_stream_of(s)>>>(
            rows, as_matrix<T>(to), plan);
    CHECK_LAUNCH();
}

template <class T> struct gather_plan {
    matrix<const T> in;
    const int32_t *index;
    __device__ int64_t to(int64_t r) const
    {
        return r;
    }
    __device__ const T *from(int64_t r) const
    {
        return index[r] >= 0 ? in.row(index[r]) : NULL;
    }
};

extern "C" void cuda_gather_rows(struct stream *s, in_t in, in_t index, out_t out)
{
    const int64_t rows = tensor_rows(out), cols = tensor_cols(out);
    ASSERT(in->dtype == out->dtype && tensor_cols(in) == cols && index->dtype == DTYPE_I32 &&
           tensor_numel(index) == rows);
    if (rows == 0 || cols == 0)
        return;
    by_type(in, [&](auto zero) {
        using T = decltype(zero);
        by_flag(chunks_aligned({ in, out }), [&](auto vec) {
            copy_rows<decltype(vec)::value, T>(
                s, rows, out,
                gather_plan<T>{ as_matrix<const T>(in), (const int32_t *)index->data });
        });
    });
}

/* ---- sums of gathered rows ---- */

enum { AT_ONCE = 8 };

/* Up to eight rows are read before the first is added. */
template <bool VEC, class T>
static __global__ void __launch_bounds__(WARPS *WARP)
    gather_sum_kernel(matrix<const T> in, const int32_t *index, int k, bool add, matrix<T> out)
{
    const int64_t r = blockIdx.x * (int64_t)WARPS + threadIdx.x / WARP,
                  start = blockIdx.y * (int64_t)SPAN + threadIdx.x % WARP * CHUNK;
    if (r >= out.rows)
        return;
    index += r * k;
    for (int round = 0; round < ROUNDS; round++) {
        const int64_t at = start + round * WARP * CHUNK;
        const int n = chunk_size(out.cols, at);
        float sum[CHUNK] = {}, v[CHUNK];
        if (n == 0)
            return;
        for (int first = 0; first < k; first += AT_ONCE) {
            chunk<T> part[AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                const int from = first + j < k ? index[first + j] : -1;
                part[j] = read_chunk<VEC>(in.row(from) + at, from >= 0 ? n : 0);
            }
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                widen_chunk(part[j], v);
#pragma unroll
                for (int i = 0; i < CHUNK; i++)
                    sum[i] += v[i];
            }
        }
        if (add) {
            load_chunk<VEC>((const T *)out.row(r) + at, n, v);
#pragma unroll
            for (int i = 0; i < CHUNK; i++)
                sum[i] = v[i] + sum[i];
        }
        store_chunk<VEC>(out.row(r) + at, n, sum);
    }
}

extern "C" void cuda_gather_sum_rows(struct stream *s, in_t in, in_t index, double beta, out_t out)
{
    const int64_t rows = tensor_rows(out), cols = tensor_cols(out), k = tensor_cols(index);
    ASSERT(in->dtype == out->dtype && tensor_cols(in) == cols && index->dtype == DTYPE_I32 &&
           tensor_numel(index) == rows * k);
    ASSERT(beta == 0 || beta == 1);
    if (rows == 0 || cols == 0)
        return;
    by_type(in, [&](auto zero) {
        using T = decltype(zero);
        by_flag(chunks_aligned({ in, out }), [&](auto vec) {
            gather_sum_kernel<decltype(vec)::value, T>
                <<<grid_of(rows, cols), WARPS * WARP, 0, cuda_stream_of(s)>>>(
                    as_matrix<const T>(in), (const int32_t *)index->data, (int)k, beta == 1,
                    as_matrix<T>(out));
        });
    });
    CHECK_LAUNCH();
}

/* ---- embedding ---- */

template <class T> struct embed_plan {
    const int64_t *id;
    const int32_t *picture;
    matrix<const T> table, image; /* image.p NULL: no pictures */
    int64_t first;
    __device__ int64_t to(int64_t t) const
    {
        return t;
    }
    __device__ const T *from(int64_t t) const
    {
        if (picture[t] >= 0)
            return image.p ? image.row(picture[t]) : NULL;
        const int64_t row = id[t] - first;
        return row >= 0 && row < table.rows ? table.row(row) : NULL;
    }
};

extern "C" void cuda_embed_merge_forward(struct stream *s, in_t ids, in_t image_row, in_t table,
                                         int64_t first, in_t image, out_t out)
{
    const int64_t rows = tensor_rows(out), cols = tensor_cols(out);
    ASSERT(ids->dtype == DTYPE_I64 && tensor_numel(ids) == rows && image_row->dtype == DTYPE_I32 &&
           tensor_numel(image_row) == rows);
    ASSERT(table->dtype == out->dtype && tensor_cols(table) == cols);
    ASSERT(!image ||
           (image->dtype == out->dtype && (tensor_rows(image) == 0 || tensor_cols(image) == cols)));
    if (rows == 0 || cols == 0)
        return;
    by_type(out, [&](auto zero) {
        using T = decltype(zero);
        by_flag(chunks_aligned({ table, image, out }), [&](auto vec) {
            const embed_plan<T> plan = { (const int64_t *)ids->data,
                                         (const int32_t *)image_row->data,
                                         as_matrix<const T>(table),
                                         image ? as_matrix<const T>(image) : matrix<const T>(),
                                         first };
            copy_rows<decltype(vec)::value, T>(s, rows, out, plan);
        });
    });
}

/* Gradients of picture rows go back to their pictures. */
template <class T> struct picture_plan {
    matrix<const T> dout;
    const int32_t *picture;
    __device__ int64_t to(int64_t t) const
    {
        return picture[t];
    }
    __device__ const T *from(int64_t t) const
    {
        return dout.row(t);
    }
};

template <class T> struct table_gradient {
    matrix<const T> dout;
    matrix<float> dtable;
    __device__ float *to(int key) const
    {
        return key < dtable.rows ? dtable.row(key) : NULL;
    }
    __device__ const T *row(int token) const
    {
        return dout.row(token);
    }
    __device__ float weight(int) const
    {
        return 1.0f;
    }
};

/* Tokens that are pictures or another rank's go behind all vocabulary rows. */
static __global__ void embed_keys_kernel(const int64_t *id, const int32_t *picture, int64_t first,
                                         int64_t table_rows, int64_t n, int *key, int *source)
{
    const int64_t t = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
    if (t >= n)
        return;
    const int64_t row = id[t] - first;
    key[t] = (int)(picture[t] < 0 && row >= 0 && row < table_rows ? row : table_rows);
    source[t] = (int)t;
}

extern "C" void cuda_embed_merge_backward(struct stream *s, in_t ids, in_t image_row, in_t dout,
                                          int64_t first, out_t dtable, out_t dimage)
{
    const int64_t rows = tensor_rows(dout), cols = tensor_cols(dout);
    const cudaStream_t stream = cuda_stream_of(s);
    ASSERT(ids->dtype == DTYPE_I64 && tensor_numel(ids) == rows && image_row->dtype == DTYPE_I32 &&
           tensor_numel(image_row) == rows);
    ASSERT(!dtable || (dtable->dtype == DTYPE_F32 && tensor_cols(dtable) == cols));
    if (rows == 0 || cols == 0)
        return;
    if (dimage && tensor_numel(dimage) > 0) {
        ASSERT(dimage->dtype == dout->dtype && tensor_cols(dimage) == cols);
        by_type(dout, [&](auto zero) {
            using T = decltype(zero);
            by_flag(chunks_aligned({ dout, dimage }), [&](auto vec) {
                copy_rows<decltype(vec)::value, T>(
                    s, rows, dimage,
                    picture_plan<T>{ as_matrix<const T>(dout), (const int32_t *)image_row->data });
            });
        });
    }
    if (!dtable || tensor_numel(dtable) == 0)
        return;
    const struct scatter_pairs pairs = scatter_memory(s, rows);
    embed_keys_kernel<<<blocks_for(rows, 256), 256, 0, stream>>>(
        (const int64_t *)ids->data, (const int32_t *)image_row->data, first, tensor_rows(dtable),
        rows, pairs.key, pairs.source);
    CHECK_LAUNCH();
    scatter_sort(s, &pairs, rows, tensor_rows(dtable) + 1);
    by_type(dout, [&](auto zero) {
        using T = decltype(zero);
        by_flag(chunks_aligned({ dout, dtable }), [&](auto vec) {
            scatter_add<decltype(vec)::value, T>(
                s, &pairs, rows, cols,
                table_gradient<T>{ as_matrix<const T>(dout), as_matrix<float>(dtable) });
        });
    });
}

/* ---- sorting (scatter.cuh) ---- */

static size_t sort_bytes(int64_t n)
{
    size_t bytes = 0;
    CHECK_CUDA(cub::DeviceRadixSort::SortPairs(NULL, bytes, (const int *)NULL, (int *)NULL,
                                               (const int *)NULL, (int *)NULL, (int)n));
    return bytes;
}

struct scatter_pairs scatter_memory(struct stream *s, int64_t n)
{
    struct scatter_pairs p;
    const size_t each = ((size_t)n * sizeof(int) + 255) / 256 * 256;
    ASSERT(n <= INT32_MAX);
    p.work_bytes = sort_bytes(n);
    char *memory = (char *)cuda_scratch(s, 4 * each + p.work_bytes);
    p.key = (int *)memory;
    p.source = (int *)(memory + each);
    p.key_sorted = (int *)(memory + 2 * each);
    p.source_sorted = (int *)(memory + 3 * each);
    p.work = memory + 4 * each;
    return p;
}

void scatter_sort(struct stream *s, const struct scatter_pairs *pairs, int64_t n, int64_t bound)
{
    int bits = 1;
    size_t bytes = pairs->work_bytes;
    ASSERT(bound <= INT32_MAX);
    while (bits < 31 && (int64_t)1 << bits < bound)
        bits++;
    CHECK_CUDA(cub::DeviceRadixSort::SortPairs(pairs->work, bytes, pairs->key, pairs->key_sorted,
                                               pairs->source, pairs->source_sorted, (int)n, 0, bits,
                                               cuda_stream_of(s)));
}
