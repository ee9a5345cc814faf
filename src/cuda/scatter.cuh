/* scatter.cuh - rows added up by where they go, in a fixed order: (destination, source) pairs are
 * sorted by destination, stably, and one block adds up each run of equal destinations.
 */
#ifndef MIMO_CUDA_SCATTER_CUH
#define MIMO_CUDA_SCATTER_CUH

#include "vector.cuh"

enum {
    SCATTER_WARPS = 8,
    SCATTER_SHORT = 16,
    SCATTER_ROUNDS = 4,
    SCATTER_COLS = WARP * CHUNK * SCATTER_ROUNDS
};

/* n pairs, destination < bound, sorted by destination; sources of one destination keep their order.
 * Memory of scatter_bytes(). */
struct scatter_pairs {
    int *key, *source, *key_sorted, *source_sorted;
    void *work;
    size_t work_bytes;
};

/* rows.cu. Local. Scratch for n pairs, and its parts, all of it in the stream's scratch. */
struct scatter_pairs scatter_memory(struct stream *s, int64_t n);
void scatter_sort(struct stream *s, const struct scatter_pairs *pairs, int64_t n, int64_t bound);

/* What a run adds: to.row(key) (NULL: nowhere) += sum over its pairs of weight * row. `from` says
 * which:
 *     float *to(int key);  const T *row(int source);  float weight(int source);
 * A run of at most SCATTER_SHORT pairs is added up by one warp, in order. Of a longer one warp w
 * takes pairs w, w+8, ... and the warps' sums are added in order; the block does that to which the
 * first position in the run that is a multiple of SCATTER_SHORT belongs. */
template <bool VEC, class T, class F>
__device__ __forceinline__ void scatter_sum(const int *source, int64_t first, int64_t end, int step,
                                            int64_t start, int64_t cols, const F &from,
                                            float (&sum)[SCATTER_ROUNDS][CHUNK])
{
#pragma unroll 2
    for (int64_t i = first; i < end; i += step) {
        const T *row = from.row(source[i]);
        const float weight = from.weight(source[i]);
#pragma unroll
        for (int k = 0; k < SCATTER_ROUNDS; k++) {
            const int64_t c = start + k * WARP * CHUNK;
            float v[CHUNK];
            load_chunk<VEC>(row + c, chunk_size(cols, c), v);
#pragma unroll
            for (int j = 0; j < CHUNK; j++)
                sum[k][j] += weight * v[j];
        }
    }
}

template <bool VEC>
__device__ __forceinline__ void scatter_store(float *to, int64_t start, int64_t cols,
                                              const float (&sum)[SCATTER_ROUNDS][CHUNK])
{
#pragma unroll
    for (int k = 0; k < SCATTER_ROUNDS; k++) {
        const int64_t c = start + k * WARP * CHUNK;
        const int size = chunk_size(cols, c);
        float v[CHUNK];
        load_chunk<VEC>((const float *)to + c, size, v);
#pragma unroll
        for (int j = 0; j < CHUNK; j++)
            v[j] += sum[k][j];
        store_chunk<VEC>(to + c, size, v);
    }
}

template <bool VEC, class T, class F>
static __global__ void __launch_bounds__(SCATTER_WARPS *WARP)
    scatter_add_kernel(const int *key, const int *source, int64_t n, int64_t cols, F from)
{
    __shared__ float sums[SCATTER_WARPS][SCATTER_ROUNDS][CHUNK][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int64_t base = blockIdx.x * (int64_t)SCATTER_SHORT,
                  start = blockIdx.y * (int64_t)SCATTER_COLS + lane * CHUNK;
    for (int64_t i = base + warp; i < base + SCATTER_SHORT && i < n; i += SCATTER_WARPS) {
        const int own = key[i];
        float *to = from.to(own), sum[SCATTER_ROUNDS][CHUNK] = {};
        if (!to || (i > 0 && key[i - 1] == own) ||
            (i + SCATTER_SHORT < n && key[i + SCATTER_SHORT] == own))
            continue;
        int64_t end = i + 1;
        while (end < n && key[end] == own)
            end++;
        scatter_sum<VEC, T>(source, i, end, 1, start, cols, from, sum);
        scatter_store<VEC>(to, start, cols, sum);
    }

    /* The long run that holds position `base`, if this is the first multiple in it. */
    const int own = key[base];
    float *to = from.to(own), sum[SCATTER_ROUNDS][CHUNK] = {};
    int64_t first = base;
    if (!to || (base >= SCATTER_SHORT && key[base - SCATTER_SHORT] == own))
        return;
    while (first > 0 && key[first - 1] == own)
        first--;
    if (first + SCATTER_SHORT >= n || key[first + SCATTER_SHORT] != own)
        return;
    int64_t end = first + SCATTER_SHORT + 1, high = n;
    while (end < high) {
        const int64_t middle = (end + high) / 2;
        if (key[middle] == own)
            end = middle + 1;
        else
            high = middle;
    }
    scatter_sum<VEC, T>(source, first + warp, end, SCATTER_WARPS, start, cols, from, sum);
#pragma unroll
    for (int k = 0; k < SCATTER_ROUNDS; k++)
#pragma unroll
        for (int j = 0; j < CHUNK; j++)
            sums[warp][k][j][lane] = sum[k][j];
    __syncthreads();
    if (warp != 0)
        return;
#pragma unroll
    for (int k = 0; k < SCATTER_ROUNDS; k++)
#pragma unroll
        for (int j = 0; j < CHUNK; j++)
            for (int w = 1; w < SCATTER_WARPS; w++)
                sum[k][j] += sums[w][k][j][lane];
    scatter_store<VEC>(to, start, cols, sum);
}

template <bool VEC, class T, class F>
static void scatter_add(struct stream *s, const struct scatter_pairs *pairs, int64_t n,
                        int64_t cols, F from)
{
    const dim3 grid(blocks_for(n, SCATTER_SHORT),
                    (unsigned)((cols + SCATTER_COLS - 1) / SCATTER_COLS));
    scatter_add_kernel<VEC, T><<<grid, SCATTER_WARPS * WARP, 0, cuda_stream_of(s)>>>(
        pairs->key_sorted, pairs->source_sorted, n, cols, from);
    CHECK_LAUNCH();
}

#endif
