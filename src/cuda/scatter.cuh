/* scatter.cuh - rows added up by where they go, in a fixed order: (destination, source) pairs are sorted by destination, stably,
 * and one block adds up each run of equal destinations.
 */
#ifndef MIMO_CUDA_SCATTER_CUH
#define MIMO_CUDA_SCATTER_CUH

#include "vector.cuh"

enum { SCATTER_WARPS = 8, SCATTER_ROUNDS = 4, SCATTER_COLS = WARP * CHUNK * SCATTER_ROUNDS };   /* columns of one block */

/* n pairs, destination < bound, sorted by destination; sources of one destination keep their order. Memory of scatter_bytes(). */
struct scatter_pairs {
    int *key, *source, *key_sorted, *source_sorted;
    void *work;
    size_t work_bytes;
};

/* rows.cu. Local. Scratch for n pairs, and its parts, all of it in the stream's scratch. */
struct scatter_pairs scatter_memory(struct stream *s, int64_t n);
void scatter_sort(struct stream *s, const struct scatter_pairs *pairs, int64_t n, int64_t bound);

/* What a run adds: to.row(key) (NULL: nowhere) += sum over its pairs of weight * row. `from` says which:
 *     float *to(int key);  const T *row(int source);  float weight(int source);
 * Warp w of a block takes pairs w, w+8, ... of the run; the warps' sums are added in order. */
template <bool VEC, class T, class F>
static __global__ void __launch_bounds__(SCATTER_WARPS *WARP)
    scatter_add_kernel(const int *key, const int *source, int64_t n, int64_t cols, F from)
{
    __shared__ float sums[SCATTER_WARPS][SCATTER_ROUNDS][CHUNK][WARP];
    const int64_t first = blockIdx.x;
    const int own = key[first], lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float *to = from.to(own);
    if (!to || (first > 0 && key[first - 1] == own))
        return;
    /* The run's end: the first pair behind it has another key; all keys of the run are equal and sorted. */
    int64_t low = first + 1, high = n;
    if (low < n && key[low] != own)
        high = low;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (key[middle] == own)
            low = middle + 1;
        else
            high = middle;
    }
    const int64_t end = high, start = blockIdx.y * (int64_t)SCATTER_COLS;
    const bool alone = end - first == 1;
    float sum[SCATTER_ROUNDS][CHUNK] = {};
#pragma unroll 2
    for (int64_t i = first + warp; i < end; i += SCATTER_WARPS) {
        const T *row = from.row(source[i]);
        const float weight = from.weight(source[i]);
#pragma unroll
        for (int k = 0; k < SCATTER_ROUNDS; k++) {
            const int64_t c = start + (k * WARP + lane) * CHUNK;
            float v[CHUNK];
            load_chunk<VEC>(row + c, chunk_size(cols, c), v);
#pragma unroll
            for (int j = 0; j < CHUNK; j++)
                sum[k][j] += weight * v[j];
        }
    }
    if (!alone) {
#pragma unroll
        for (int k = 0; k < SCATTER_ROUNDS; k++)
#pragma unroll
            for (int j = 0; j < CHUNK; j++)
                sums[warp][k][j][lane] = sum[k][j];
        __syncthreads();
    }
    if (warp != 0)
        return;
#pragma unroll
    for (int k = 0; k < SCATTER_ROUNDS; k++) {
        const int64_t c = start + (k * WARP + lane) * CHUNK;
        const int size = chunk_size(cols, c);
        float v[CHUNK];
        if (!alone)
#pragma unroll
            for (int j = 0; j < CHUNK; j++)
                for (int w = 1; w < SCATTER_WARPS; w++)
                    sum[k][j] += sums[w][k][j][lane];
        load_chunk<VEC>((const float *)to + c, size, v);
#pragma unroll
        for (int j = 0; j < CHUNK; j++)
            v[j] += sum[k][j];
        store_chunk<VEC>(to + c, size, v);
    }
}

template <bool VEC, class T, class F>
static void scatter_add(struct stream *s, const struct scatter_pairs *pairs, int64_t n, int64_t cols, F from)
{
    const dim3 grid((unsigned)n, (unsigned)((cols + SCATTER_COLS - 1) / SCATTER_COLS));
    scatter_add_kernel<VEC, T><<<grid, SCATTER_WARPS * WARP, 0, cuda_stream_of(s)>>>(pairs->key_sorted, pairs->source_sorted, n,
                                                                                     cols, from);
    CHECK_LAUNCH();
}

#endif
