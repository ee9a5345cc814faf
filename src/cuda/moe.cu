/* moe.cu - mixture of experts beside its products: routing, balance, the sort of token copies, the
 * experts' activation. Formulas: model.md 1.8.
 *
 * Routing gives a warp to a token: lane l holds experts l, l+32, ... in registers. Top-K takes the
 * largest key K times, the lower index on ties; a NaN counts as the largest key, so that it is
 * chosen and shows. All sums are fp32 in an order that depends on shapes alone; only integers are
 * counted with atomics. The sort is a counting sort of chunks of tokens: one kernel counts, the
 * next finds for its chunk the first row of every expert from all counts and places the copies, so
 * nothing waits for the host or for another block.
 */
#include <cub/block/block_scan.cuh>
#include "vector.cuh"

enum { MAX_EXPERTS = 512, MAX_TOPK = 32, WARPS = 8, THREADS = WARPS * WARP };
/* rows of a block of the balance */
enum { BALANCE_ROWS = 64 };
enum { SORT_THREADS = 1024, SORT_TOKENS = 64, SORT_MOST = 512, SORT_CHUNKS = 256 };
/* chunks in flight per thread and operand */
enum { BATCH = 4 };

/* Calls f(I) with the number of experts a lane holds, as a constant. */
template <class F> static void by_experts(int64_t experts, F f)
{
    ASSERT(experts >= 1 && experts <= MAX_EXPERTS);
    if (experts <= 1 * WARP)
        f(std::integral_constant<int, 1>());
    else if (experts <= 2 * WARP)
        f(std::integral_constant<int, 2>());
    else if (experts <= 4 * WARP)
        f(std::integral_constant<int, 4>());
    else if (experts <= 8 * WARP)
        f(std::integral_constant<int, 8>());
    else
        f(std::integral_constant<int, 16>());
}

/* n consecutive elements of a type. */
static bool is_vector(in_t t, enum dtype dtype, int64_t n)
{
    return t->dtype == dtype && tensor_numel(t) == n && all_dense({ t });
}

static bool is_matrix(in_t t, enum dtype dtype, int64_t rows, int64_t cols)
{
    return t->dtype == dtype && tensor_rows(t) == rows && tensor_cols(t) == cols;
}

/* ---- routing ---- */

/* Unsigned integers in the order of the keys; 0 is below every key. */
__device__ __forceinline__ uint32_t order_of(float key)
{
    const uint32_t bits = __float_as_uint(isnan(key) ? INFINITY : key);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* Bit i of the result: expert lane + 32 i is among the top-K. order[i] is 0 where there is no
 * expert. */
template <int I> __device__ __forceinline__ uint32_t choose(const uint32_t (&order)[I], int topk)
{
    const int lane = threadIdx.x % WARP;
    uint32_t taken = 0;
    for (int k = 0; k < topk; k++) {
        uint32_t best = 0;
        int at = 0;
#pragma unroll
        for (int i = 0; i < I; i++)
            if (!(taken >> i & 1) && order[i] > best) {
                best = order[i];
                at = i;
            }
        const uint32_t most = __reduce_max_sync(0xffffffffu, best);
        const unsigned mine = best == most ? (unsigned)(lane + WARP * at) : 0xffffffffu;
        const unsigned first = __reduce_min_sync(0xffffffffu, mine);
        taken |= mine == first ? 1u << at : 0;
    }
    return taken;
}

__device__ __forceinline__ float sigmoid(float x)
{
    return 1.0f / (1.0f + expf(-x));
}

template <int I>
static __global__ void __launch_bounds__(THREADS)
    router_forward_kernel(matrix<const float> logits, const float *bias, float scaling, bool given,
                          int topk, matrix<float> scores, int32_t *expert, matrix<float> prob)
{
    __shared__ int32_t chosen[WARPS][MAX_TOPK];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int64_t t = blockIdx.x * (int64_t)WARPS + warp;
    if (t >= logits.rows)
        return;
    const float *l = logits.row(t);
    uint32_t order[I];
#pragma unroll
    for (int i = 0; i < I; i++) {
        const int e = lane + WARP * i;
        order[i] = 0;
        if (e < logits.cols) {
            const float score = sigmoid(l[e]);
            scores.row(t)[e] = score;
            order[i] = order_of(bias ? score + bias[e] : score);
        }
    }
    if (given) {
        if (lane < topk)
            chosen[warp][lane] = expert[t * topk + lane];
    } else {
        const uint32_t taken = choose<I>(order, topk);
        int first = 0;
#pragma unroll
        for (int i = 0; i < I; i++) {
            const uint32_t lanes = __ballot_sync(0xffffffffu, taken >> i & 1);
            if (taken >> i & 1)
                chosen[warp][first + __popc(lanes & ((1u << lane) - 1))] = lane + WARP * i;
            first += __popc(lanes);
        }
    }
    __syncwarp();
    const float score = lane < topk ? sigmoid(l[chosen[warp][lane]]) : 0.0f;
    const float sum = warp_sum(score) + 1e-20f;
    if (lane < topk) {
        prob.row(t)[lane] = scaling * score / sum;
        expert[t * topk + lane] = chosen[warp][lane];
    }
}

extern "C" void cuda_router_forward(struct stream *s, in_t logits, in_t bias, double scaling,
                                    bool given, out_t scores, out_t expert, out_t prob)
{
    const int64_t tokens = tensor_rows(logits), experts = tensor_cols(logits),
                  topk = tensor_cols(expert);
    ASSERT(is_matrix(logits, DTYPE_F32, tokens, experts) &&
           is_matrix(scores, DTYPE_F32, tokens, experts));
    ASSERT(is_matrix(prob, DTYPE_F32, tokens, topk) && is_vector(expert, DTYPE_I32, tokens * topk));
    ASSERT(topk >= 1 && topk <= experts && topk <= MAX_TOPK &&
           (bias == NULL || is_vector(bias, DTYPE_F32, experts)));
    if (tokens == 0)
        return;
    by_experts(experts, [&](auto per_lane) {
        router_forward_kernel<per_lane()>
            <<<blocks_for(tokens, WARPS), THREADS, 0, cuda_stream_of(s)>>>(
                as_matrix<const float>(logits), bias ? (const float *)bias->data : NULL,
                (float)scaling, given, (int)topk, as_matrix<float>(scores), (int32_t *)expert->data,
                as_matrix<float>(prob));
    });
    CHECK_LAUNCH();
}

/* Rows [begin, end) here of sequence b. */
struct span {
    int64_t begin, end;
};

__device__ __forceinline__ span rows_of(int64_t b, int64_t seq_len, int64_t first_row,
                                        int64_t tokens)
{
    const int64_t begin = b * seq_len - first_row, end = begin + seq_len;
    return span{ begin < 0 ? 0 : begin, end > tokens ? tokens : end };
}

/* Block (c, b): rows c*BALANCE_ROWS.. of sequence b. part_count, part_sum [B, chunks, E]. */
template <int I>
static __global__ void __launch_bounds__(THREADS)
    balance_kernel(matrix<const float> scores, int topk, int64_t first_row, int64_t seq_len,
                   int *part_count, float *part_sum)
{
    __shared__ int counts[WARPS][I * WARP];
    __shared__ float sums[WARPS][I * WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const span rows = rows_of(blockIdx.y, seq_len, first_row, scores.rows);
    int count[I] = {};
    float sum[I] = {};
    for (int j = warp; j < BALANCE_ROWS; j += WARPS) {
        const int64_t t = rows.begin + blockIdx.x * (int64_t)BALANCE_ROWS + j;
        if (t >= rows.end)
            break;
        float a[I], all = 0.0f;
#pragma unroll
        for (int i = 0; i < I; i++) {
            a[i] = lane + WARP * i < scores.cols ? scores.row(t)[lane + WARP * i] : 0.0f;
            all += a[i];
        }
        all = warp_sum(all) + 1e-20f;
        uint32_t order[I];
#pragma unroll
        for (int i = 0; i < I; i++) {
            a[i] /= all;
            sum[i] += a[i];
            order[i] = lane + WARP * i < scores.cols ? order_of(a[i]) : 0;
        }
        const uint32_t taken = choose<I>(order, topk);
#pragma unroll
        for (int i = 0; i < I; i++)
            count[i] += taken >> i & 1;
    }
#pragma unroll
    for (int i = 0; i < I; i++) {
        counts[warp][lane + WARP * i] = count[i];
        sums[warp][lane + WARP * i] = sum[i];
    }
    __syncthreads();
    const int64_t to = (blockIdx.y * (int64_t)gridDim.x + blockIdx.x) * scores.cols;
    for (int e = threadIdx.x; e < scores.cols; e += THREADS) {
        int n = 0;
        float x = 0.0f;
        for (int w = 0; w < WARPS; w++) {
            n += counts[w][e];
            x += sums[w][e];
        }
        part_count[to + e] = n;
        part_sum[to + e] = x;
    }
}

/* Block (x, b): 32 experts of sequence b, its chunks dealt to the warps. */
static __global__ void __launch_bounds__(THREADS)
    balance_sum_kernel(const int *part_count, const float *part_sum, int64_t chunks,
                       int64_t experts, int64_t *count, matrix<float> psum)
{
    __shared__ int64_t counts[WARPS][WARP];
    __shared__ float sums[WARPS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int64_t b = blockIdx.y, e = blockIdx.x * (int64_t)WARP + lane;
    int64_t n = 0;
    float x = 0.0f;
    if (e < experts)
#pragma unroll 4
        for (int64_t c = warp; c < chunks; c += WARPS) {
            n += part_count[(b * chunks + c) * experts + e];
            x += part_sum[(b * chunks + c) * experts + e];
        }
    counts[warp][lane] = n;
    sums[warp][lane] = x;
    __syncthreads();
    if (warp > 0 || e >= experts)
        return;
    n = 0;
    x = 0.0f;
    for (int w = 0; w < WARPS; w++) {
        n += counts[w][lane];
        x += sums[w][lane];
    }
    count[b * experts + e] = n;
    psum.row(b)[e] = x;
}

extern "C" void cuda_router_balance(struct stream *s, in_t scores, int topk, int64_t first_row,
                                    int64_t seq_len, out_t count, out_t psum)
{
    const int64_t tokens = tensor_rows(scores), experts = tensor_cols(scores),
                  sequences = tensor_rows(count);
    ASSERT(is_matrix(scores, DTYPE_F32, tokens, experts) &&
           is_matrix(psum, DTYPE_F32, sequences, experts));
    ASSERT(is_vector(count, DTYPE_I64, sequences * experts));
    ASSERT(topk >= 1 && topk <= experts && first_row >= 0 &&
           first_row + tokens <= sequences * seq_len && sequences <= 65535);
    if (sequences == 0)
        return;
    const int64_t most = tokens < seq_len ? tokens : seq_len,
                  chunks = (most + BALANCE_ROWS - 1) / BALANCE_ROWS;
    const int64_t n = sequences * chunks * experts;
    int *part_count = (int *)cuda_scratch(s, (size_t)n * (sizeof(int) + sizeof(float)));
    float *part_sum = (float *)(part_count + n);
    if (chunks > 0)
        by_experts(experts, [&](auto per_lane) {
            balance_kernel<per_lane()>
                <<<dim3((unsigned)chunks, (unsigned)sequences), THREADS, 0, cuda_stream_of(s)>>>(
                    as_matrix<const float>(scores), topk, first_row, seq_len, part_count, part_sum);
        });
    balance_sum_kernel<<<dim3(blocks_for(experts, WARP), (unsigned)sequences), THREADS, 0,
                         cuda_stream_of(s)>>>(part_count, part_sum, chunks, experts,
                                              (int64_t *)count->data, as_matrix<float>(psum));
    CHECK_LAUNCH();
}

static __global__ void __launch_bounds__(THREADS)
    balance_loss_kernel(const int64_t *count, matrix<const float> psum, double factor,
                        float *metric)
{
    __shared__ float shared[WARP];
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < psum.rows * psum.cols; i += THREADS)
        sum += psum.row(i / psum.cols)[i % psum.cols] * (float)count[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0)
        *metric = (float)(*metric + sum * factor);
}

extern "C" void cuda_router_balance_loss(struct stream *s, in_t count, in_t psum, int topk,
                                         int64_t seq_len, out_t metric)
{
    const int64_t sequences = tensor_rows(count), experts = tensor_cols(count);
    ASSERT(is_matrix(psum, DTYPE_F32, sequences, experts) &&
           is_vector(count, DTYPE_I64, sequences * experts));
    ASSERT(is_vector(metric, DTYPE_F32, 1));
    if (sequences == 0 || seq_len == 0)
        return;
    const double length = (double)seq_len,
                 factor = (double)experts / (topk * length * length) / (double)sequences;
    balance_loss_kernel<<<1, THREADS, 0, cuda_stream_of(s)>>>(
        (const int64_t *)count->data, as_matrix<const float>(psum), factor, (float *)metric->data);
    CHECK_LAUNCH();
}

/* ds_k = scaling (g_k - m)/Z over the chosen, ds_e += (ga_e - sum ga a)/Z_all over all; dl = ds s
 * (1-s). */
template <int I>
static __global__ void __launch_bounds__(THREADS)
    router_backward_kernel(matrix<const float> scores, const int32_t *expert, int topk,
                           matrix<const float> dprob, float scaling, const int64_t *count,
                           float factor, int64_t first_row, int64_t seq_len, matrix<float> dlogits)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int64_t t = blockIdx.x * (int64_t)WARPS + warp;
    if (t >= scores.rows)
        return;
    const int chosen = lane < topk ? expert[t * topk + lane] : -1;
    const float g = lane < topk ? dprob.row(t)[lane] : 0.0f,
                s = lane < topk ? scores.row(t)[chosen] : 0.0f;
    const float sum = warp_sum(s) + 1e-20f, mean = warp_sum(g * (s / sum)),
                part = scaling * (g - mean) / sum;
    float score[I], ds[I] = {};
#pragma unroll
    for (int i = 0; i < I; i++)
        score[i] = lane + WARP * i < scores.cols ? scores.row(t)[lane + WARP * i] : 0.0f;
    if (count) {
        const int64_t *n = count + (first_row + t) / seq_len * scores.cols;
        float all = 0.0f, balance = 0.0f;
#pragma unroll
        for (int i = 0; i < I; i++)
            if (lane + WARP * i < scores.cols) {
                ds[i] = factor * (float)n[lane + WARP * i];
                all += score[i];
            }
        all = warp_sum(all) + 1e-20f;
#pragma unroll
        for (int i = 0; i < I; i++)
            balance += ds[i] * (score[i] / all);
        balance = warp_sum(balance);
#pragma unroll
        for (int i = 0; i < I; i++)
            ds[i] = (ds[i] - balance) / all;
    }
    for (int k = 0; k < topk; k++) {
        const int e = __shfl_sync(0xffffffffu, chosen, k);
        const float add = __shfl_sync(0xffffffffu, part, k);
#pragma unroll
        for (int i = 0; i < I; i++)
            ds[i] += e == lane + WARP * i ? add : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < I; i++)
        if (lane + WARP * i < scores.cols)
            dlogits.row(t)[lane + WARP * i] = ds[i] * score[i] * (1.0f - score[i]);
}

extern "C" void cuda_router_backward(struct stream *s, in_t scores, in_t expert, in_t prob,
                                     in_t dprob, double scaling, in_t count, double coeff,
                                     int64_t first_row, int64_t seq_len, out_t dlogits)
{
    const int64_t tokens = tensor_rows(scores), experts = tensor_cols(scores),
                  topk = tensor_cols(expert);
    ASSERT(is_matrix(scores, DTYPE_F32, tokens, experts) &&
           is_vector(expert, DTYPE_I32, tokens * topk) && topk <= MAX_TOPK);
    ASSERT(is_matrix(dprob, DTYPE_F32, tokens, topk) &&
           is_matrix(dlogits, DTYPE_F32, tokens, experts));
    if (count != NULL) {
        ASSERT(first_row >= 0 && first_row + tokens <= tensor_rows(count) * seq_len);
        ASSERT(is_vector(count, DTYPE_I64, tensor_rows(count) * experts));
    }
    if (tokens == 0)
        return;
    const double factor = coeff * (double)experts / ((double)topk * (double)seq_len);
    by_experts(experts, [&](auto per_lane) {
        router_backward_kernel<per_lane()>
            <<<blocks_for(tokens, WARPS), THREADS, 0, cuda_stream_of(s)>>>(
                as_matrix<const float>(scores), (const int32_t *)expert->data, (int)topk,
                as_matrix<const float>(dprob), (float)scaling,
                count ? (const int64_t *)count->data : NULL, (float)factor, first_row, seq_len,
                as_matrix<float>(dlogits));
    });
    CHECK_LAUNCH();
}

/* ---- the sort ---- */

/* Copies [begin, end) of chunk c. */
__device__ __forceinline__ span copies_of(int64_t c, int tokens, int topk, int64_t copies)
{
    const int64_t begin = c * tokens * topk, end = begin + (int64_t)tokens * topk;
    return span{ begin, end > copies ? copies : end };
}

/* part [chunks, E]: copies of each expert in each chunk of tokens. */
static __global__ void __launch_bounds__(THREADS)
    sort_count_kernel(const int32_t *expert, int64_t copies, int topk, int tokens, int experts,
                      int *part)
{
    __shared__ int count[MAX_EXPERTS];
    for (int e = threadIdx.x; e < experts; e += THREADS)
        count[e] = 0;
    __syncthreads();
    const span chunk = copies_of(blockIdx.x, tokens, topk, copies);
    for (int64_t i = chunk.begin + threadIdx.x; i < chunk.end; i += THREADS)
        atomicAdd(&count[expert[i]], 1);
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += THREADS)
        part[blockIdx.x * (int64_t)experts + e] = count[e];
}

struct sorted {
    int32_t *offsets, *row_token, *token_row;
    float *row_prob;
    int64_t *tokens_per_expert; /* NULL: not counted */
};

/* A token names an expert at most once: its place among the chunk's copies of that expert is the
 * number of earlier tokens that name it, counted in bit sets of 32 tokens. */
static __global__ void __launch_bounds__(SORT_THREADS)
    sort_place_kernel(const int32_t *expert, matrix<const float> prob, int64_t copies, int topk,
                      int tokens, int experts, const int *part, int64_t chunks, sorted out)
{
    using Scan = cub::BlockScan<int, SORT_THREADS>;
    __shared__ typename Scan::TempStorage scan;
    __shared__ int before[SORT_THREADS], total[SORT_THREADS], first[MAX_EXPERTS];
    __shared__ uint32_t names[SORT_MOST / WARP][MAX_EXPERTS];
    const int tid = threadIdx.x, e = tid % experts, deal = tid / experts;
    const int deals = SORT_THREADS / experts < WARP ? SORT_THREADS / experts : WARP;
    if (deal < deals) {
        int mine = 0, all = 0;
#pragma unroll 4
        for (int64_t c = deal; c < chunks; c += deals) {
            const int n = part[c * experts + e];
            all += n;
            mine += c < blockIdx.x ? n : 0;
        }
        before[tid] = mine;
        total[tid] = all;
    }
    for (int i = tid; i < SORT_MOST / WARP * MAX_EXPERTS; i += SORT_THREADS)
        names[i / MAX_EXPERTS][i % MAX_EXPERTS] = 0;
    __syncthreads();
    const span chunk = copies_of(blockIdx.x, tokens, topk, copies);
    for (int64_t i = chunk.begin + tid; i < chunk.end; i += SORT_THREADS) {
        const int t = (int)(i - chunk.begin) / topk;
        atomicOr(&names[t / WARP][expert[i]], 1u << t % WARP);
    }
    int mine = 0, all = 0, start;
    if (tid < experts)
        for (int d = 0; d < deals; d++) {
            mine += before[d * experts + tid];
            all += total[d * experts + tid];
        }
    Scan(scan).ExclusiveSum(all, start);
    if (tid < experts)
        first[tid] = start + mine;
    if (tid < experts && blockIdx.x == 0) {
        out.offsets[tid] = start;
        if (tid == experts - 1)
            out.offsets[experts] = start + all;
        if (out.tokens_per_expert)
            out.tokens_per_expert[tid] += all;
    }
    __syncthreads();
    for (int64_t i = chunk.begin + tid; i < chunk.end; i += SORT_THREADS) {
        const int t = (int)(i - chunk.begin) / topk, x = expert[i];
        int row = first[x] + __popc(names[t / WARP][x] & ((1u << t % WARP) - 1));
        for (int g = 0; g < t / WARP; g++)
            row += __popc(names[g][x]);
        const int64_t token = i / topk;
        out.row_token[row] = (int32_t)token;
        out.row_prob[row] = prob.row(token)[i % topk];
        out.token_row[i] = row;
    }
}

extern "C" void cuda_moe_sort(struct stream *s, in_t expert, in_t prob, out_t offsets,
                              out_t row_token, out_t row_prob, out_t token_row,
                              out_t tokens_per_expert)
{
    const int64_t tokens = tensor_rows(expert), topk = tensor_cols(expert), copies = tokens * topk;
    const int64_t experts = tensor_numel(offsets) - 1;
    ASSERT(experts >= 1 && experts <= MAX_EXPERTS && copies <= INT32_MAX);
    ASSERT(is_vector(expert, DTYPE_I32, copies) && is_matrix(prob, DTYPE_F32, tokens, topk));
    ASSERT(is_vector(offsets, DTYPE_I32, experts + 1) && is_vector(row_token, DTYPE_I32, copies));
    ASSERT(is_vector(row_prob, DTYPE_F32, copies) && is_vector(token_row, DTYPE_I32, copies));
    ASSERT(tokens_per_expert == NULL || is_vector(tokens_per_expert, DTYPE_I64, experts));
    /* Every block reads all counts: few chunks while their tokens fit the bit sets. */
    int64_t size = SORT_TOKENS;
    while (size < SORT_MOST && size * SORT_CHUNKS < tokens)
        size += WARP;
    const int64_t chunks = (tokens + size - 1) / size;
    int *part = (int *)cuda_scratch(s, (size_t)(chunks * experts) * sizeof *part);
    const int32_t *choice = (const int32_t *)expert->data;
    const sorted out = { (int32_t *)offsets->data, (int32_t *)row_token->data,
                         (int32_t *)token_row->data, (float *)row_prob->data,
                         tokens_per_expert ? (int64_t *)tokens_per_expert->data : NULL };
    if (chunks > 0)
        sort_count_kernel<<<(unsigned)chunks, THREADS, 0, cuda_stream_of(s)>>>(
            choice, copies, (int)topk, (int)size, (int)experts, part);
    sort_place_kernel<<<(unsigned)(chunks > 0 ? chunks : 1), SORT_THREADS, 0, cuda_stream_of(s)>>>(
        choice, as_matrix<const float>(prob), copies, (int)topk, (int)size, (int)experts, part,
        chunks, out);
    CHECK_LAUNCH();
}

static __global__ void unsort_kernel(const float *drow, const int32_t *token_row,
                                     matrix<float> dprob)
{
    const int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
    if (i < dprob.rows * dprob.cols)
        dprob.row(i / dprob.cols)[i % dprob.cols] = drow[token_row[i]];
}

/* One block for each rank and owned expert: its rows lie in one piece on both sides. */
static __global__ void dispatch_order_kernel(const int32_t *all, int ranks, int stride, int first,
                                             int owned, int64_t most, int32_t *offsets,
                                             int32_t *order, int32_t *inverse)
{
    const int x = blockIdx.x, rank = blockIdx.y;
    int64_t wanted = 0, received = 0, n = 0;
    for (int r = 0; r < ranks; r++) {
        const int32_t *own = all + (int64_t)r * stride + first;
        wanted += own[x] - own[0] + (r < rank ? own[x + 1] - own[x] : 0);
        received += r < rank ? own[owned] - own[0] : r == rank ? own[x] - own[0] : 0;
        if (r == rank)
            n = own[x + 1] - own[x];
    }
    if (threadIdx.x == 0 && rank == 0)
        offsets[x] = (int32_t)wanted;
    if (threadIdx.x == 0 && rank == ranks - 1 && x == owned - 1)
        offsets[owned] = (int32_t)(wanted + n);
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
        if (wanted + i < most)
            order[wanted + i] = (int32_t)(received + i);
        if (received + i < most)
            inverse[received + i] = (int32_t)(wanted + i);
    }
}

extern "C" void cuda_dispatch_order(struct stream *s, in_t all, int64_t first, out_t offsets,
                                    out_t order, out_t inverse)
{
    const int64_t ranks = tensor_rows(all), stride = tensor_cols(all),
                  owned = tensor_numel(offsets) - 1, most = tensor_numel(order);
    ASSERT(all->dtype == DTYPE_I32 && all->ld == stride && offsets->dtype == DTYPE_I32 &&
           order->dtype == DTYPE_I32 && inverse->dtype == DTYPE_I32);
    ASSERT(owned > 0 && ranks > 0 && first >= 0 && first + owned < stride &&
           tensor_numel(inverse) == most);
    dispatch_order_kernel<<<dim3((unsigned)owned, (unsigned)ranks), 256, 0, cuda_stream_of(s)>>>(
        (const int32_t *)all->data, (int)ranks, (int)stride, (int)first, (int)owned, most,
        (int32_t *)offsets->data, (int32_t *)order->data, (int32_t *)inverse->data);
    CHECK_LAUNCH();
}

extern "C" void cuda_moe_unsort_prob(struct stream *s, in_t drow, in_t token_row, out_t dprob)
{
    const int64_t tokens = tensor_rows(token_row), topk = tensor_cols(token_row), n = tokens * topk;
    ASSERT(is_vector(drow, DTYPE_F32, tensor_numel(drow)) && is_vector(token_row, DTYPE_I32, n));
    ASSERT(is_matrix(dprob, DTYPE_F32, tokens, topk));
    if (n == 0)
        return;
    unsort_kernel<<<blocks_for(n, THREADS), THREADS, 0, cuda_stream_of(s)>>>(
        (const float *)drow->data, (const int32_t *)token_row->data, as_matrix<float>(dprob));
    CHECK_LAUNCH();
}

/* ---- the experts' activation ---- */

/* Which keeps a NaN. */
__device__ __forceinline__ float relu(float x)
{
    return x < 0.0f ? 0.0f : x;
}

/* Column of a thread's chunk b from `at` on; a warp walks along a row. */
__device__ __forceinline__ int64_t chunk_column(int64_t at, int b)
{
    return at + b * (WARP * CHUNK);
}

template <class T, bool VEC>
static __global__ void __launch_bounds__(THREADS)
    expert_act_forward_kernel(matrix<const T> h, const float *prob, matrix<T> y)
{
    const int64_t r = blockIdx.x * (int64_t)WARPS + threadIdx.x / WARP;
    if (r >= h.rows)
        return;
    const T *from = h.row(r);
    T *to = y.row(r);
    const float p = prob[r];
    for (int64_t at = threadIdx.x % WARP * CHUNK; at < h.cols; at += BATCH * WARP * CHUNK) {
        float x[BATCH][CHUNK];
#pragma unroll
        for (int b = 0; b < BATCH; b++)
            load_chunk<VEC>(from + chunk_column(at, b), chunk_size(h.cols, chunk_column(at, b)),
                            x[b]);
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
#pragma unroll
            for (int i = 0; i < CHUNK; i++) {
                const float positive = relu(x[b][i]);
                x[b][i] = positive * positive * p;
            }
            store_chunk<VEC>(to + chunk_column(at, b), chunk_size(h.cols, chunk_column(at, b)),
                             x[b]);
        }
    }
}

/* dh may be dy: a thread writes only what it has read. y.p NULL: not wanted. */
template <class T, bool VEC>
static __global__ void __launch_bounds__(THREADS)
    expert_act_backward_kernel(matrix<const T> h, const float *prob, matrix<const T> dy,
                               matrix<T> dh, float *dprob, matrix<T> y)
{
    const int64_t r = blockIdx.x * (int64_t)WARPS + threadIdx.x / WARP;
    if (r >= h.rows)
        return;
    const float p = prob[r], twice = 2.0f * p;
    float sum = 0.0f;
    for (int64_t at = threadIdx.x % WARP * CHUNK; at < h.cols; at += BATCH * WARP * CHUNK) {
        float x[BATCH][CHUNK], g[BATCH][CHUNK];
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            const int64_t c = chunk_column(at, b);
            load_chunk<VEC>(h.row(r) + c, chunk_size(h.cols, c), x[b]);
            load_chunk<VEC>(dy.row(r) + c, chunk_size(h.cols, c), g[b]);
        }
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            const int64_t c = chunk_column(at, b);
#pragma unroll
            for (int i = 0; i < CHUNK; i++) {
                const float positive = relu(x[b][i]), slope = positive * g[b][i];
                sum += positive * slope;
                g[b][i] = slope * twice;
                x[b][i] = positive * positive * p;
            }
            store_chunk<VEC>(dh.row(r) + c, chunk_size(h.cols, c), g[b]);
            if (y.p)
                store_chunk<VEC>(y.row(r) + c, chunk_size(h.cols, c), x[b]);
        }
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0)
        dprob[r] = sum;
}

extern "C" void cuda_expert_act_forward(struct stream *s, in_t h, in_t prob, out_t y)
{
    const int64_t rows = tensor_rows(h), cols = tensor_cols(h);
    ASSERT(is_vector(prob, DTYPE_F32, rows) && is_matrix(y, h->dtype, rows, cols));
    if (rows * cols == 0)
        return;
    by_type(h, [&](auto zero) {
        by_flag(chunks_aligned({ h, y }), [&](auto aligned) {
            using T = decltype(zero);
            expert_act_forward_kernel<T, aligned()>
                <<<blocks_for(rows, WARPS), THREADS, 0, cuda_stream_of(s)>>>(
                    as_matrix<const T>(h), (const float *)prob->data, as_matrix<T>(y));
        });
    });
    CHECK_LAUNCH();
}

extern "C" void cuda_expert_act_backward(struct stream *s, in_t h, in_t prob, in_t dy, out_t dh,
                                         out_t dprob, out_t y)
{
    const int64_t rows = tensor_rows(h), cols = tensor_cols(h);
    ASSERT(is_vector(prob, DTYPE_F32, rows) && is_vector(dprob, DTYPE_F32, rows));
    ASSERT(is_matrix(dy, h->dtype, rows, cols) && is_matrix(dh, h->dtype, rows, cols));
    ASSERT(y == NULL || is_matrix(y, h->dtype, rows, cols));
    if (rows == 0)
        return;
    by_type(h, [&](auto zero) {
        by_flag(chunks_aligned({ h, dy, dh, y }), [&](auto aligned) {
            using T = decltype(zero);
            expert_act_backward_kernel<T, aligned()>
                <<<blocks_for(rows, WARPS), THREADS, 0, cuda_stream_of(s)>>>(
                    as_matrix<const T>(h), (const float *)prob->data, as_matrix<const T>(dy),
                    as_matrix<T>(dh), (float *)dprob->data, y ? as_matrix<T>(y) : matrix<T>{});
        });
    });
    CHECK_LAUNCH();
}
