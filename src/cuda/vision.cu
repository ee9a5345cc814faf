/* vision.cu - token rows of the encoder: patches with their position, class tokens (model.md 2.3,
 * 2.4), and their gradients.
 *
 * The gradient of the position grid gathers: the contributions (row, corner) are sorted by their
 * grid point, stably, so that each point adds its own up in the order of the rows, class tokens
 * likewise behind the last point.
 */
#include <cub/device/device_radix_sort.cuh>
#include "vector.cuh"

enum { THREADS = 256, CORNERS = 4 };

template <bool VEC, class T>
static __global__ void __launch_bounds__(THREADS)
    assemble_kernel(matrix<const T> e, matrix<const T> classes, matrix<const T> grid,
                    const int32_t *source, const int32_t *index, const float *weight, matrix<T> x)
{
    const int64_t c = (blockIdx.y * (int64_t)THREADS + threadIdx.x) * CHUNK, r = blockIdx.x;
    const int n = chunk_size(x.cols, c);
    if (n == 0)
        return;
    const int p = source[r];
    float v[CHUNK];
    if (p < 0) {
        load_chunk<VEC>(classes.row(-1 - p) + c, n, v);
        store_chunk<VEC>(x.row(r) + c, n, v);
        return;
    }
    float sum[CHUNK] = {};
#pragma unroll
    for (int k = 0; k < CORNERS; k++) {
        float at[CHUNK];
        const float w = weight[CORNERS * p + k];
        load_chunk<VEC>(grid.row(index[CORNERS * p + k]) + c, n, at);
#pragma unroll
        for (int i = 0; i < CHUNK; i++)
            sum[i] += w * at[i];
    }
    load_chunk<VEC>(e.row(p) + c, n, v);
#pragma unroll
    for (int i = 0; i < CHUNK; i++)
        v[i] += to_float(from_float<T>(sum[i]));
    store_chunk<VEC>(x.row(r) + c, n, v);
}

/* Keys: grid point, or points + class token, or points + classes for what adds nothing. Values: 4
 * row + corner. */
static __global__ void list_contributions(const int32_t *source, const int32_t *index,
                                          const float *weight, int rows, int points, int classes,
                                          int *key, int *value)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x, r = i / CORNERS, k = i % CORNERS;
    if (r >= rows)
        return;
    const int p = source[r];
    value[i] = i;
    if (p < 0)
        key[i] = k == 0 ? points - 1 - p : points + classes;
    else
        key[i] = weight[CORNERS * p + k] != 0.0f ? index[CORNERS * p + k] : points + classes;
}

template <bool VEC, class T>
static __global__ void __launch_bounds__(THREADS)
    patches_kernel(matrix<const T> dx, const int32_t *source, matrix<T> de)
{
    const int64_t c = (blockIdx.y * (int64_t)THREADS + threadIdx.x) * CHUNK, r = blockIdx.x;
    const int n = chunk_size(dx.cols, c), p = source[r];
    if (n == 0 || p < 0)
        return;
    float v[CHUNK];
    load_chunk<VEC>(dx.row(r) + c, n, v);
    store_chunk<VEC>(de.row(p) + c, n, v);
}

/* First contribution whose key is not below k. */
__device__ __forceinline__ int first_of(const int *key, int n, int k)
{
    int lo = 0, hi = n;
    while (lo < hi) {
        const int mid = (lo + hi) / 2;
        if (key[mid] < k)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

template <bool VEC, class T>
static __global__ void __launch_bounds__(THREADS)
    gather_kernel(matrix<const T> dx, const int *key, const int *value, int n,
                  const int32_t *source, const float *weight, int points, matrix<float> dclass,
                  matrix<float> dgrid)
{
    const int64_t c = (blockIdx.y * (int64_t)THREADS + threadIdx.x) * CHUNK;
    const int size = chunk_size(dx.cols, c), point = blockIdx.x;
    const int first = first_of(key, n, point), end = first_of(key, n, point + 1);
    if (size == 0 || first == end)
        return;
    float *to = (point < points ? dgrid.row(point) : dclass.row(point - points)) + c, sum[CHUNK];
    load_chunk<VEC>(to, size, sum);
    for (int i = first; i < end; i++) {
        const int r = value[i] / CORNERS, k = value[i] % CORNERS;
        const float w = point < points ? weight[CORNERS * source[r] + k] : 1.0f;
        float v[CHUNK];
        load_chunk<VEC>(dx.row(r) + c, size, v);
#pragma unroll
        for (int j = 0; j < CHUNK; j++)
            sum[j] += w * v[j];
    }
    store_chunk<VEC>(to, size, sum);
}

static void check_maps(in_t rows_of, in_t row_source, in_t pos_index, in_t pos_w, int64_t patches)
{
    ASSERT(tensor_numel(row_source) == tensor_rows(rows_of) &&
           tensor_numel(pos_index) == CORNERS * patches &&
           tensor_numel(pos_w) == CORNERS * patches && tensor_rows(rows_of) < (1 << 28));
}

extern "C" void cuda_vit_assemble_forward(struct stream *s, in_t e, in_t class_token, in_t grid,
                                          in_t row_source, in_t pos_index, in_t pos_w, out_t x)
{
    const int64_t rows = tensor_rows(x);
    check_maps(x, row_source, pos_index, pos_w, tensor_rows(e));
    if (tensor_numel(x) == 0)
        return;
    by_type(x, [&](auto zero) {
        using T = decltype(zero);
        by_flag(chunks_aligned({ e, class_token, grid, x }), [&](auto vec) {
            assemble_kernel<decltype(vec)::value, T>
                <<<dim3((unsigned)rows, blocks_for(tensor_cols(x), THREADS * CHUNK)), THREADS, 0,
                   cuda_stream_of(s)>>>(as_matrix<const T>(e), as_matrix<const T>(class_token),
                                        as_matrix<const T>(grid), (const int32_t *)row_source->data,
                                        (const int32_t *)pos_index->data,
                                        (const float *)pos_w->data, as_matrix<T>(x));
        });
    });
    CHECK_LAUNCH();
}

extern "C" void cuda_vit_assemble_backward(struct stream *s, in_t dx, in_t row_source,
                                           in_t pos_index, in_t pos_w, out_t de, out_t dclass_token,
                                           out_t dgrid)
{
    const int rows = (int)tensor_rows(dx), points = (int)tensor_rows(dgrid),
              classes = (int)tensor_rows(dclass_token), n = CORNERS * rows;
    const cudaStream_t st = cuda_stream_of(s);
    const int32_t *source = (const int32_t *)row_source->data,
                  *index = (const int32_t *)pos_index->data;
    const float *weight = (const float *)pos_w->data;
    check_maps(dx, row_source, pos_index, pos_w, tensor_rows(de));
    if (tensor_numel(dx) == 0)
        return;
    int bits = 1;
    while (1 << bits <= points + classes)
        bits++;
    size_t temporary = 0;
    CHECK_CUDA(cub::DeviceRadixSort::SortPairs(NULL, temporary, (int *)NULL, (int *)NULL,
                                               (int *)NULL, (int *)NULL, n, 0, bits, st));
    const size_t list = ((size_t)n * sizeof(int) + 255) / 256 * 256;
    char *memory = (char *)cuda_scratch(s, 4 * list + temporary);
    int *key = (int *)memory, *value = (int *)(memory + list),
        *sorted_key = (int *)(memory + 2 * list), *sorted = (int *)(memory + 3 * list);
    list_contributions<<<blocks_for(n, THREADS), THREADS, 0, st>>>(source, index, weight, rows,
                                                                   points, classes, key, value);
    CHECK_LAUNCH();
    CHECK_CUDA(cub::DeviceRadixSort::SortPairs(memory + 4 * list, temporary, key, sorted_key, value,
                                               sorted, n, 0, bits, st));
    const unsigned wide = blocks_for(tensor_cols(dx), THREADS * CHUNK);
    by_type(dx, [&](auto zero) {
        using T = decltype(zero);
        by_flag(chunks_aligned({ dx, de, dclass_token, dgrid }), [&](auto vec) {
            constexpr bool VEC = decltype(vec)::value;
            patches_kernel<VEC, T><<<dim3((unsigned)rows, wide), THREADS, 0, st>>>(
                as_matrix<const T>(dx), source, as_matrix<T>(de));
            CHECK_LAUNCH();
            gather_kernel<VEC, T><<<dim3((unsigned)(points + classes), wide), THREADS, 0, st>>>(
                as_matrix<const T>(dx), sorted_key, sorted, n, source, weight, points,
                as_matrix<float>(dclass_token), as_matrix<float>(dgrid));
        });
    });
    CHECK_LAUNCH();
}
