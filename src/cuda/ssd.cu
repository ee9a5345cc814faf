/* ssd.cu - the selective state space scan in chunks (model.md 1.6.5), forward and backward.
 *
 *   rates      del and its sums; a warp per chunk and head
 *   states     what each chunk adds to the state, then one thread per element of the state walks
 *              the chunks
 *   output     inside a chunk every row looks back at the rows before it and at the entering state
 *   backward   the same for the adjoint, chunks in reverse; then the gradients row by row
 *
 * All but rates and the last step exist on tensor cores (ssd_mma.cu) for the widths that models
 * use, and here in plain loops in fp32 for everything else: one block per row, sums in a fixed
 * order.
 */
#include "columns.cuh"
#include "cuda_sizes.h"
#include "ssd.h"

enum {
    THREADS = 128,
    LISTERS = 256,
    FINISH_HEADS = 16,
    AHEAD = 8,
    MMA_WIDTH = 64,
    MMA_STATE = 128,
    MMA_CHUNK = 128
};

static constexpr double LOG2_E = 1.4426950408889634;

/* ---- chunks and rates ---- */

/* One block; segments in turns of its threads, so that each finds its first chunk by a scan. */
static __global__ void __launch_bounds__(LISTERS)
    list_chunks(const int32_t *cu, int segments, int chunk, ssd_chunk *out, int *count)
{
    __shared__ int ends[LISTERS];
    int before = 0;
    for (int base = 0; base < segments; base += LISTERS) {
        const int s = base + threadIdx.x, start = s < segments ? cu[s] : 0,
                  end = s < segments ? cu[s + 1] : 0;
        const int own = (end - start + chunk - 1) / chunk;
        ends[threadIdx.x] = own;
        __syncthreads();
        for (int o = 1; o < LISTERS; o *= 2) {
            const int x = threadIdx.x >= o ? ends[threadIdx.x - o] : 0;
            __syncthreads();
            ends[threadIdx.x] += x;
            __syncthreads();
        }
        int at = before + ends[threadIdx.x] - own;
        for (int first = start; first < end; first += chunk, at++)
            out[at] = ssd_chunk{ first, end - first < chunk ? end - first : chunk, first == start,
                                 first + chunk >= end };
        before += ends[LISTERS - 1];
        __syncthreads();
    }
    if (threadIdx.x == 0)
        *count = before;
}

template <class T> __device__ __forceinline__ float rate_of(const ssd_args<T> &a, int h)
{
    return -expf(to_float(a.a_log[h]));
}

__device__ __forceinline__ double inclusive_scan(double x)
{
    for (int o = 1; o < WARP; o *= 2) {
        const double y = __shfl_up_sync(0xffffffffu, x, o);
        if ((int)(threadIdx.x % WARP) >= o)
            x += y;
    }
    return x;
}

__device__ __forceinline__ double sum_lanes(double x)
{
    for (int o = WARP / 2; o; o /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

/* A warp per chunk and head, lanes along the rows. */
template <class T> static __global__ void rates_kernel(ssd_args<T> a)
{
    const int i = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP, c = i / a.heads,
              h = i % a.heads, lane = threadIdx.x % WARP;
    if (c >= *a.count)
        return;
    const ssd_chunk k = a.chunks[c];
    const int64_t at = a.rates_at(c, h);
    const float bias = to_float(a.dt_bias[h]), rate = rate_of(a, h);
    double before = 0;
    for (int base = 0; base < a.chunk; base += WARP) {
        const int r = base + lane;
        const float v = r < k.rows ? to_float(a.dt.row(k.first + r)[h]) + bias : 0.0f,
                    del = r >= k.rows ? 0.0f
                          : v > 20.0f ? v
                                      : log1pf(expf(v));
        const double sum = before + inclusive_scan((double)del * rate * LOG2_E);
        if (r < a.chunk) {
            a.del[at + r] = del;
            a.cs[at + r] = (float)sum;
            a.carry[at + r] = exp2f((float)sum);
        }
        before = __shfl_sync(0xffffffffu, sum, WARP - 1);
    }
    for (int r = lane; r < a.chunk; r += WARP)
        a.push[at + r] = exp2f((float)before - a.cs[at + r]) * a.del[at + r];
}

template <class T> __device__ __forceinline__ float keep_of(const ssd_args<T> &a, int c, int h)
{
    return a.carry[a.rates_at(c, h) + a.chunk - 1];
}

/* ---- states ---- */

/* A chunk's own part: sum over j of tail_j del_j x_j (x) B_j, or of carry_i gy_i (x) C_i. */
template <class T> static __global__ void states_kernel(ssd_args<T> a, bool adjoint)
{
    const int c = blockIdx.y, h = blockIdx.z, g = a.group_of(h);
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= *a.count || i >= a.width * a.state)
        return;
    const ssd_chunk k = a.chunks[c];
    const int p = i / a.state, n = i % a.state;
    const float *scale = (adjoint ? a.carry : a.push) + a.rates_at(c, h);
    float sum = 0;
    for (int r = 0; r < k.rows; r++) {
        const int64_t row = k.first + r;
        sum += scale[r] * (adjoint ? to_float(a.gy(row, h)[p]) * to_float(a.c(row, g)[n])
                                   : to_float(a.x(row, h)[p]) * to_float(a.b(row, g)[n]));
    }
    (adjoint ? a.adjoint : a.entering)[a.state_at(c, h) + i] = sum;
}

/* In place: a chunk's own part becomes the state before it; for the adjoint the gradient of the
 * state behind it. Eight chunks are read before the first of them is written, or each would wait
 * for memory in turn. */
template <class T> static __global__ void pass_kernel(ssd_args<T> a, bool adjoint)
{
    const int64_t size = (int64_t)a.width * a.state,
                  i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
    if (i >= a.heads * size)
        return;
    const int h = (int)(i / size), n = *a.count;
    float *states = (adjoint ? a.adjoint : a.entering) + i, running = 0;
    for (int base = 0; base < n; base += AHEAD) {
        float own[AHEAD], keep[AHEAD];
        bool fresh[AHEAD];
#pragma unroll
        for (int o = 0; o < AHEAD; o++) {
            const int step = base + o < n ? base + o : n - 1, c = adjoint ? n - 1 - step : step;
            const ssd_chunk k = a.chunks[c];
            own[o] = states[(int64_t)c * a.heads * size];
            keep[o] = keep_of(a, c, h);
            fresh[o] = adjoint ? k.closes : k.opens;
        }
#pragma unroll
        for (int o = 0; o < AHEAD; o++) {
            if (base + o >= n)
                break;
            const int c = adjoint ? n - 1 - base - o : base + o;
            running = fresh[o] ? 0 : running;
            states[(int64_t)c * a.heads * size] = running;
            running = keep[o] * running + own[o];
        }
    }
}

/* keep <Gm, St> of a chunk and head. */
template <class T> static __global__ void keep_dot_kernel(ssd_args<T> a)
{
    __shared__ float shared[WARP];
    const int c = blockIdx.x, h = blockIdx.y;
    if (c >= *a.count)
        return;
    const float *s = a.entering + a.state_at(c, h), *g = a.adjoint + a.state_at(c, h);
    float sum = 0;
    for (int i = threadIdx.x; i < a.width * a.state; i += blockDim.x)
        sum += s[i] * g[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0)
        a.keep_dot[c * a.heads + h] = keep_of(a, c, h) * sum;
}

/* ---- plain loops ---- */

template <class T> __device__ float dot(const T *x, const T *y, int n)
{
    float sum = 0;
    for (int i = 0; i < n; i++)
        sum += to_float(x[i]) * to_float(y[i]);
    return sum;
}

/* One block a row: y_i = sum_{j<=i} (C_i.B_j) L_ij del_j x_j + carry_i St C_i + D x_i. */
template <class T> static __global__ void output_kernel(ssd_args<T> a)
{
    extern __shared__ float mix[];
    const int c = blockIdx.x / a.chunk, i = blockIdx.x % a.chunk, h = blockIdx.y, g = a.group_of(h);
    if (c >= *a.count || i >= a.chunks[c].rows)
        return;
    const ssd_chunk k = a.chunks[c];
    const int64_t row = k.first + i;
    const float *cs = a.cs + a.rates_at(c, h), *del = a.del + a.rates_at(c, h);
    for (int j = threadIdx.x; j <= i; j += blockDim.x)
        mix[j] = dot(a.c(row, g), a.b(k.first + j, g), a.state) * exp2f(cs[i] - cs[j]) * del[j];
    __syncthreads();
    const float *state = a.entering + a.state_at(c, h);
    for (int p = threadIdx.x; p < a.width; p += blockDim.x) {
        float sum = to_float(a.d_skip[h]) * to_float(a.x(row, h)[p]), carried = 0;
        for (int j = 0; j <= i; j++)
            sum += mix[j] * to_float(a.x(k.first + j, h)[p]);
        for (int n = 0; n < a.state; n++)
            carried += state[p * a.state + n] * to_float(a.c(row, g)[n]);
        a.y.row(row)[h * a.width + p] = from_float<T>(sum + exp2f(cs[i]) * carried);
    }
}

/* One block a row j: dx_j, e_j, and the column's part of dcs_j. */
template <class T> static __global__ void backward_x_kernel(ssd_args<T> a)
{
    extern __shared__ float mix[];
    __shared__ float shared[WARP];
    const int c = blockIdx.x / a.chunk, j = blockIdx.x % a.chunk, h = blockIdx.y, g = a.group_of(h);
    if (c >= *a.count || j >= a.chunks[c].rows)
        return;
    const ssd_chunk k = a.chunks[c];
    const int64_t row = k.first + j, at = a.rates_at(c, h), own = at + j;
    const float *cs = a.cs + at, del = a.del[own], tail = exp2f(cs[k.rows - 1] - cs[j]);
    float column = 0;
    for (int i = j + (int)threadIdx.x; i < k.rows; i += blockDim.x) {
        const float m = dot(a.c(k.first + i, g), a.b(row, g), a.state) * exp2f(cs[i] - cs[j]);
        mix[i] = m * del;
        column += m * dot(a.gy(k.first + i, h), a.x(row, h), a.width);
    }
    column = block_sum(column, shared);
    const float *behind = a.adjoint + a.state_at(c, h);
    float through = 0;
    for (int p = threadIdx.x; p < a.width; p += blockDim.x) {
        float sum = to_float(a.d_skip[h]) * to_float(a.gy(row, h)[p]), z = 0;
        for (int i = j; i < k.rows; i++)
            sum += mix[i] * to_float(a.gy(k.first + i, h)[p]);
        for (int n = 0; n < a.state; n++)
            z += behind[p * a.state + n] * to_float(a.b(row, g)[n]);
        through += to_float(a.x(row, h)[p]) * z;
        a.dx(row, h)[p] = from_float<T>(sum + tail * del * z);
    }
    through = tail * block_sum(through, shared);
    if (threadIdx.x == 0) {
        a.e[own] = column + through;
        a.through[own] = through;
        a.row[own] = -del * (column + through);
    }
}

/* One block a row i: the row's part of dcs_i. */
template <class T> static __global__ void backward_row_kernel(ssd_args<T> a)
{
    __shared__ float shared[WARP];
    const int c = blockIdx.x / a.chunk, i = blockIdx.x % a.chunk, h = blockIdx.y, g = a.group_of(h);
    if (c >= *a.count || i >= a.chunks[c].rows)
        return;
    const ssd_chunk k = a.chunks[c];
    const int64_t row = k.first + i, at = a.rates_at(c, h);
    const float *cs = a.cs + at, *del = a.del + at;
    float sum = 0, carried = 0;
    for (int j = threadIdx.x; j <= i; j += blockDim.x)
        sum += dot(a.c(row, g), a.b(k.first + j, g), a.state) * exp2f(cs[i] - cs[j]) * del[j] *
               dot(a.gy(row, h), a.x(k.first + j, h), a.width);
    const float *state = a.entering + a.state_at(c, h);
    for (int p = threadIdx.x; p < a.width; p += blockDim.x) {
        float z = 0;
        for (int n = 0; n < a.state; n++)
            z += state[p * a.state + n] * to_float(a.c(row, g)[n]);
        carried += to_float(a.gy(row, h)[p]) * z;
    }
    sum = block_sum(sum, shared) + exp2f(cs[i]) * block_sum(carried, shared);
    if (threadIdx.x == 0)
        a.row[at + i] += sum;
}

/* D's sum of a chunk: rows in order. */
template <class T> static __global__ void skip_kernel(ssd_args<T> a, int most)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x, c = i / a.heads, h = i % a.heads;
    if (c >= *a.count)
        return;
    float sum = 0;
    for (int r = 0; r < a.chunks[c].rows; r++)
        sum += dot(a.gy(a.chunks[c].first + r, h), a.x(a.chunks[c].first + r, h), a.width);
    a.sums[(int64_t)(2 * most + c) * a.heads + h] = sum;
}

/* One block a row and group: dB_j (for_c false) or dC_i, summed over the group's heads in order. */
template <class T> static __global__ void backward_bc_kernel(ssd_args<T> a, bool for_c)
{
    extern __shared__ float mix[];
    const int c = blockIdx.x / a.chunk, r = blockIdx.x % a.chunk, g = blockIdx.y,
              per = a.heads / a.groups;
    if (c >= *a.count || r >= a.chunks[c].rows)
        return;
    const ssd_chunk k = a.chunks[c];
    const int64_t row = k.first + r;
    const int low = for_c ? 0 : r, high = for_c ? r + 1 : k.rows;
    for (int o = low + (int)threadIdx.x; o < high; o += blockDim.x) {
        const int i = for_c ? r : o, j = for_c ? o : r;
        float sum = 0;
        for (int h = g * per; h < (g + 1) * per; h++) {
            const int64_t at = a.rates_at(c, h);
            sum += exp2f(a.cs[at + i] - a.cs[at + j]) * a.del[at + j] *
                   dot(a.gy(k.first + i, h), a.x(k.first + j, h), a.width);
        }
        mix[o] = sum;
    }
    __syncthreads();
    for (int n = threadIdx.x; n < a.state; n += blockDim.x) {
        float sum = 0;
        for (int o = low; o < high; o++)
            sum += mix[o] * to_float((for_c ? a.b(k.first + o, g) : a.c(k.first + o, g))[n]);
        for (int h = g * per; h < (g + 1) * per; h++) {
            const float *s = (for_c ? a.entering : a.adjoint) + a.state_at(c, h);
            const T *from = for_c ? a.gy(row, h) : a.x(row, h);
            const float scale = (for_c ? a.carry : a.push)[a.rates_at(c, h) + r];
            float z = 0;
            for (int p = 0; p < a.width; p++)
                z += to_float(from[p]) * s[p * a.state + n];
            sum += scale * z;
        }
        (for_c ? a.dc(row, g) : a.db(row, g))[n] = from_float<T>(sum);
    }
}

/* ---- from dcs and e to dt and the parameters ---- */

/* A block per chunk and sixteen heads, a warp each, lanes along the rows in reverse: R_j = sum of
 * dcs from j on. */
template <class T>
static __global__ void __launch_bounds__(FINISH_HEADS *WARP) finish_kernel(ssd_args<T> a, int most)
{
    /* ddt of 32 rows on its way to rows of memory */
    __shared__ float turn[WARP][FINISH_HEADS + 1];
    const int c = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP,
              h0 = blockIdx.y * FINISH_HEADS, h = h0 + warp;
    const bool real = h < a.heads;
    double bias_sum = 0, rate_sum = 0;
    if (c < *a.count) {
        const ssd_chunk k = a.chunks[c];
        const int64_t first = a.rates_at(c, real ? h : 0);
        const float bias = real ? to_float(a.dt_bias[h]) : 0.0f, rate = real ? rate_of(a, h) : 0.0f;
        /* All of a chunk's decays lead to its end. */
        double later = 0;
        for (int r = lane; r < k.rows; r += WARP)
            later += (double)a.del[first + r] * a.through[first + r];
        later = sum_lanes(later) + (real ? a.keep_dot[c * a.heads + h] : 0.0f);
        for (int base = k.rows - 1; base >= 0; base -= WARP) {
            const int r = base - lane;
            const bool mine = real && r >= 0;
            const int64_t at = first + (r < 0 ? 0 : r);
            const double sum = later + inclusive_scan(mine ? (double)a.row[at] : 0.0);
            double d = 0;
            if (mine) {
                const float v = to_float(a.dt.row(k.first + r)[h]) + bias,
                            slope = v > 20.0f ? 1.0f : 1.0f / (1.0f + expf(-v));
                d = (rate * sum + a.e[at]) * slope;
                bias_sum += d;
                rate_sum += a.del[at] * sum;
            }
            turn[lane][warp] = (float)d;
            later = __shfl_sync(0xffffffffu, sum, WARP - 1);
            __syncthreads();
            const int back = base - (int)threadIdx.x / FINISH_HEADS,
                      head = h0 + (int)threadIdx.x % FINISH_HEADS;
            if (back >= 0 && head < a.heads)
                a.ddt.row(k.first + back)[head] =
                    from_float<T>(turn[threadIdx.x / FINISH_HEADS][threadIdx.x % FINISH_HEADS]);
            __syncthreads();
        }
        bias_sum = sum_lanes(bias_sum);
        rate_sum = sum_lanes(rate_sum) * rate;
    }
    if (lane != 0 || !real)
        return;
    a.sums[(int64_t)c * a.heads + h] = (float)bias_sum;
    a.sums[(int64_t)(most + c) * a.heads + h] = (float)rate_sum;
    if (c >= *a.count)
        a.sums[(int64_t)(2 * most + c) * a.heads + h] = 0;
}

/* ---- host ---- */

/* Every array begins on 256 bytes; chunks beyond `most` do not exist. */
static float *carve(float **at, int64_t n)
{
    float *p = *at;
    *at += (n + 63) / 64 * 64;
    return p;
}

template <class T>
static ssd_args<T> arguments(struct stream *s, in_t xbc, in_t dt, in_t dt_bias, in_t a_log,
                             in_t d_skip, in_t cu, int heads, int head_dim, int groups, int state,
                             int chunk, in_t work, int *most)
{
    const int64_t tokens = tensor_rows(xbc), segments = tensor_numel(cu) - 1;
    *most = (int)(tokens / chunk + (segments < tokens ? segments : tokens));
    ssd_args<T> a = {};
    a.xbc = as_matrix<const T>(xbc);
    a.dt = as_matrix<const T>(dt);
    a.dt_bias = (const T *)dt_bias->data;
    a.a_log = (const T *)a_log->data;
    a.d_skip = (const T *)d_skip->data;
    a.heads = heads;
    a.width = head_dim;
    a.groups = groups;
    a.state = state;
    a.chunk = chunk;
    float *at = (float *)work->data;
    const int64_t states = (int64_t)*most * heads * head_dim * state,
                  rows = (int64_t)*most * heads * chunk;
    a.entering = carve(&at, states);
    a.adjoint = carve(&at, states);
    a.del = carve(&at, rows);
    a.cs = carve(&at, rows);
    a.carry = carve(&at, rows);
    a.push = carve(&at, rows);
    a.e = carve(&at, rows);
    a.row = carve(&at, rows);
    a.through = carve(&at, rows);
    a.sums = carve(&at, 3 * (int64_t)*most * heads);
    a.keep_dot = carve(&at, (int64_t)*most * heads);
    a.chunks = (const ssd_chunk *)carve(&at, 4 * (int64_t)*most);
    a.count = (const int *)carve(&at, 1);
    ASSERT(at - (float *)work->data <= tensor_numel(work) && heads % groups == 0);
    list_chunks<<<1, LISTERS, 0, cuda_stream_of(s)>>>((const int32_t *)cu->data, (int)segments,
                                                      chunk, (ssd_chunk *)a.chunks, (int *)a.count);
    CHECK_LAUNCH();
    rates_kernel<T>
        <<<blocks_for((int64_t)*most * heads, THREADS / WARP), THREADS, 0, cuda_stream_of(s)>>>(a);
    CHECK_LAUNCH();
    return a;
}

static bool on_16_bytes(const void *p, int64_t ld)
{
    return (uintptr_t)p % 16 == 0 && ld % 8 == 0;
}

/* Whether the whole operation runs on tensor cores. Forward has no dy and dxbc, backward no y. */
template <class T> static bool fits_mma(const ssd_args<T> &a)
{
    return sizeof(T) == 2 && a.width == MMA_WIDTH && a.state == MMA_STATE && a.chunk == MMA_CHUNK &&
           on_16_bytes(a.xbc.p, a.xbc.ld) && on_16_bytes(a.y.p, a.y.ld) &&
           on_16_bytes(a.dy.p, a.dy.ld) && on_16_bytes(a.dxbc.p, a.dxbc.ld);
}

template <class T>
static void pass_states(const ssd_args<T> &a, int most, bool adjoint, cudaStream_t st)
{
    const int64_t size = (int64_t)a.width * a.state;
    states_kernel<T>
        <<<dim3(blocks_for(size, THREADS), (unsigned)most, (unsigned)a.heads), THREADS, 0, st>>>(
            a, adjoint);
    CHECK_LAUNCH();
    pass_kernel<T><<<blocks_for(a.heads * size, THREADS), THREADS, 0, st>>>(a, adjoint);
    CHECK_LAUNCH();
}

template <class T> static void output(const ssd_args<T> &a, int most, cudaStream_t st)
{
    if constexpr (sizeof(T) == 2)
        if (fits_mma(a)) {
            ssd_mma_states(a, false, st);
            ssd_mma_output(a, most, st);
            return;
        }
    pass_states(a, most, false, st);
    output_kernel<T><<<dim3((unsigned)(most * a.chunk), (unsigned)a.heads), THREADS,
                       a.chunk * sizeof(float), st>>>(a);
    CHECK_LAUNCH();
}

template <class T> static void gradients(const ssd_args<T> &a, int most, cudaStream_t st)
{
    if constexpr (sizeof(T) == 2)
        if (fits_mma(a)) {
            ssd_mma_states(a, true, st);
            ssd_mma_backward(a, most, st);
            return;
        }
    const dim3 rows((unsigned)(most * a.chunk), (unsigned)a.heads),
        groups((unsigned)(most * a.chunk), (unsigned)a.groups);
    const size_t shared = a.chunk * sizeof(float);
    pass_states(a, most, false, st);
    pass_states(a, most, true, st);
    keep_dot_kernel<T><<<dim3((unsigned)most, (unsigned)a.heads), THREADS, 0, st>>>(a);
    CHECK_LAUNCH();
    backward_x_kernel<T><<<rows, THREADS, shared, st>>>(a);
    CHECK_LAUNCH();
    backward_row_kernel<T><<<rows, THREADS, 0, st>>>(a);
    CHECK_LAUNCH();
    backward_bc_kernel<T><<<groups, THREADS, shared, st>>>(a, false);
    CHECK_LAUNCH();
    backward_bc_kernel<T><<<groups, THREADS, shared, st>>>(a, true);
    CHECK_LAUNCH();
    skip_kernel<T><<<blocks_for((int64_t)most * a.heads, THREADS), THREADS, 0, st>>>(a, most);
    CHECK_LAUNCH();
}

extern "C" void cuda_ssd_forward(struct stream *s, in_t xbc, in_t dt, in_t dt_bias, in_t a_log,
                                 in_t d_skip, in_t cu, int64_t max_len, int heads, int head_dim,
                                 int groups, int state, int chunk, in_t work, out_t y)
{
    if (tensor_rows(xbc) == 0)
        return;
    by_type(xbc, [&](auto zero) {
        using T = decltype(zero);
        int most;
        ssd_args<T> a = arguments<T>(s, xbc, dt, dt_bias, a_log, d_skip, cu, heads, head_dim,
                                     groups, state, chunk, work, &most);
        a.y = as_matrix<T>(y);
        output(a, most, cuda_stream_of(s));
    });
}

extern "C" void cuda_ssd_backward(struct stream *s, in_t xbc, in_t dt, in_t dt_bias, in_t a_log,
                                  in_t d_skip, in_t cu, int64_t max_len, int heads, int head_dim,
                                  int groups, int state, int chunk, in_t dy, in_t work, out_t dxbc,
                                  out_t ddt, out_t ddt_bias, out_t da_log, out_t dd_skip)
{
    if (tensor_rows(xbc) == 0)
        return;
    const cudaStream_t st = cuda_stream_of(s);
    by_type(xbc, [&](auto zero) {
        using T = decltype(zero);
        int most;
        ssd_args<T> a = arguments<T>(s, xbc, dt, dt_bias, a_log, d_skip, cu, heads, head_dim,
                                     groups, state, chunk, work, &most);
        a.dy = as_matrix<const T>(dy);
        a.dxbc = as_matrix<T>(dxbc);
        a.ddt = as_matrix<T>(ddt);
        gradients(a, most, st);
        finish_kernel<T>
            <<<dim3((unsigned)most, blocks_for(heads, FINISH_HEADS)), FINISH_HEADS * WARP, 0, st>>>(
                a, most);
        CHECK_LAUNCH();
        out_t to[3] = { ddt_bias, da_log, dd_skip };
        for (int i = 0; i < 3; i++)
            if (to[i])
                columns_finish(st, a.sums + (int64_t)i * most * heads, most, heads, heads,
                               (float *)to[i]->data);
    });
}
