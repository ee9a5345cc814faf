/* loss.cu - cross entropy over vocabulary rows spread on ranks (model.md 1.9). A block has a row of
 * logits; the caller reduces mx (max), then se and pl (sum) over its group in between. All sums are
 * fp32 in a fixed order; the total is added up in double.
 */
#include "block.cuh"
#include "vector.cuh"

enum { THREADS = 512, AT_ONCE = 2, STRIDE = THREADS * CHUNK };

/* f(values, their number, first column) for every chunk of a row, thread by thread. */
template <bool VEC, class T, class F>
__device__ __forceinline__ void each_chunk(T *row, int64_t cols, F f)
{
    for (int64_t c = threadIdx.x * (int64_t)CHUNK; c < cols; c += (int64_t)THREADS * CHUNK) {
        float v[CHUNK];
        const int n = chunk_size(cols, c);
        load_chunk<VEC>(row + c, n, v);
        f(v, n, c);
    }
}

/* exp(x), x <= 0. Of differences of numbers in bf16 the hardware's, which is good to 2^-22 (1-x).
 */
template <class T> __device__ __forceinline__ float exponential(float x)
{
    return sizeof(T) == 2 ? __expf(x) : expf(x);
}

/* A thread's next AT_ONCE chunks, from column c on, into its sum relative to the largest it has
 * seen. WHOLE: the row goes on beyond them. Where nothing finite was seen the sum is 0 relative to
 * -infinity; not a number stays in it. */
template <bool VEC, bool WHOLE, class T>
__device__ __forceinline__ void add_chunks(const T *row, int64_t cols, int64_t c, float &most,
                                           float &sum)
{
    chunk<T> part[AT_ONCE];
    int size[AT_ONCE];
    float v[CHUNK], top = most, add = 0;
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
        size[k] = WHOLE ? CHUNK : chunk_size(cols, c + k * STRIDE);
        part[k] = read_chunk<VEC>(row + c + k * STRIDE, size[k]);
    }
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
        widen_chunk(part[k], v);
#pragma unroll
        for (int i = 0; i < CHUNK; i++)
            top = WHOLE || i < size[k] ? fmaxf(top, v[i]) : top;
    }
    if (top > most)
        sum *= expf(most - top);
    most = top;
    const float shift = most == -INFINITY ? 0 : most;
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
        widen_chunk(part[k], v);
#pragma unroll
        for (int i = 0; i < CHUNK; i++)
            add += WHOLE || i < size[k] ? exponential<T>(v[i] - shift) : 0.0f;
    }
    sum += add;
}

/* Maximum and sum of a row in one pass. */
template <bool VEC, class T>
static __global__ void __launch_bounds__(THREADS)
    sum_kernel(matrix<const T> logits, float *mx, float *se)
{
    __shared__ float shared[WARP];
    const T *row = logits.row(blockIdx.x);
    float most = -INFINITY, sum = 0;
    int64_t c = threadIdx.x * (int64_t)CHUNK;
    for (; c + (AT_ONCE - 1) * STRIDE + CHUNK <= logits.cols; c += AT_ONCE * STRIDE)
        add_chunks<VEC, true>(row, logits.cols, c, most, sum);
    if (c < logits.cols)
        add_chunks<VEC, false>(row, logits.cols, c, most, sum);
    const float all = block_max(most, shared);
    sum = block_sum(most == all ? sum : sum * expf(most - all), shared);
    if (threadIdx.x == 0) {
        mx[blockIdx.x] = all;
        se[blockIdx.x] = sum;
    }
}

template <class T>
static __global__ void __launch_bounds__(THREADS)
    label_kernel(matrix<const T> logits, const int64_t *labels, int64_t first, const float *own,
                 const float *mx, float *se, float *pl)
{
    const int64_t t = blockIdx.x * (int64_t)THREADS + threadIdx.x;
    if (t >= logits.rows)
        return;
    const int64_t label = labels[t] - first;
    se[t] *= expf(own[t] - mx[t]);
    pl[t] = label >= 0 && label < logits.cols ? to_float(logits.row(t)[label]) - mx[t] : 0.0f;
}

static __global__ void __launch_bounds__(THREADS)
    finish_kernel(const float *se, const float *pl, const float *mask, int64_t rows, float *loss,
                  float *total)
{
    __shared__ double sums[THREADS];
    double sum = 0;
    for (int64_t t = threadIdx.x; t < rows; t += THREADS) {
        const float value = logf(se[t]) - pl[t];
        loss[t] = value;
        sum += (double)value * mask[t];
    }
    sum = block_total(sum, sums);
    if (threadIdx.x == 0)
        *total = (float)(*total + sum);
}

template <bool VEC, class T>
static __global__ void __launch_bounds__(THREADS)
    backward_kernel(const int64_t *labels, int64_t first, const float *mx, const float *se,
                    const float *mask, matrix<T> logits)
{
    T *row = logits.row(blockIdx.x);
    const float keep = mask[blockIdx.x], most = mx[blockIdx.x], scale = keep / se[blockIdx.x];
    const int64_t label = labels[blockIdx.x] - first;
    each_chunk<VEC>(row, logits.cols, [&](float(&v)[CHUNK], int n, int64_t c) {
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            v[i] = keep == 0.0f ? 0.0f : exponential<T>(v[i] - most) * scale;
            if (c + i == label)
                v[i] -= keep;
        }
        store_chunk<VEC>(row + c, n, v);
    });
}

static void check_rows(in_t per_row, int64_t rows)
{
    ASSERT(tensor_numel(per_row) == rows);
}

extern "C" void cuda_loss_sum(struct stream *s, in_t logits, out_t mx, out_t se)
{
    const int64_t rows = tensor_rows(logits);
    check_rows(mx, rows);
    check_rows(se, rows);
    if (rows == 0)
        return;
    by_type(logits, [&](auto zero) {
        using T = decltype(zero);
        by_flag(chunks_aligned({ logits }), [&](auto vec) {
            sum_kernel<decltype(vec)::value, T><<<(unsigned)rows, THREADS, 0, cuda_stream_of(s)>>>(
                as_matrix<const T>(logits), (float *)mx->data, (float *)se->data);
        });
    });
    CHECK_LAUNCH();
}

extern "C" void cuda_loss_label(struct stream *s, in_t logits, in_t labels, int64_t first, in_t own,
                                in_t mx, out_t se, out_t pl)
{
    const int64_t rows = tensor_rows(logits);
    ASSERT(labels->dtype == DTYPE_I64);
    for (in_t t : { labels, own, mx, se, pl })
        check_rows(t, rows);
    if (rows == 0)
        return;
    by_type(logits, [&](auto zero) {
        using T = decltype(zero);
        label_kernel<T><<<blocks_for(rows, THREADS), THREADS, 0, cuda_stream_of(s)>>>(
            as_matrix<const T>(logits), (const int64_t *)labels->data, first,
            (const float *)own->data, (const float *)mx->data, (float *)se->data,
            (float *)pl->data);
    });
    CHECK_LAUNCH();
}

extern "C" void cuda_loss_finish(struct stream *s, in_t se, in_t pl, in_t mask, out_t loss,
                                 out_t total)
{
    const int64_t rows = tensor_numel(loss);
    check_rows(se, rows);
    check_rows(pl, rows);
    check_rows(mask, rows);
    finish_kernel<<<1, THREADS, 0, cuda_stream_of(s)>>>(
        (const float *)se->data, (const float *)pl->data, (const float *)mask->data, rows,
        (float *)loss->data, (float *)total->data);
    CHECK_LAUNCH();
}

extern "C" void cuda_loss_backward(struct stream *s, in_t labels, int64_t first, in_t mx, in_t se,
                                   in_t mask, out_t logits)
{
    const int64_t rows = tensor_rows(logits);
    check_rows(labels, rows);
    check_rows(mx, rows);
    check_rows(se, rows);
    check_rows(mask, rows);
    if (rows == 0)
        return;
    by_type(logits, [&](auto zero) {
        using T = decltype(zero);
        by_flag(chunks_aligned({ logits }), [&](auto vec) {
            backward_kernel<decltype(vec)::value, T>
                <<<(unsigned)rows, THREADS, 0, cuda_stream_of(s)>>>(
                    (const int64_t *)labels->data, first, (const float *)mx->data,
                    (const float *)se->data, (const float *)mask->data, as_matrix<T>(logits));
        });
    });
    CHECK_LAUNCH();
}
