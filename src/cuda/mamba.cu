/* mamba.cu - the short convolution and the gated norm of the Mamba-2 layer (model.md 1.6.2, 1.6.6);
 * the scan is in ssd.cu.
 *
 * Convolution: a thread walks a run of rows of four channels with the taps' inputs in registers, so
 * each row is read once, a few rows ahead. Backward recomputes v, walks W-1 rows beyond its run for
 * the gradient of its last inputs, and leaves the weights' gradients as one partial sum a run.
 * Gated norm: a warp has one group of one row in registers; the weight's gradient is summed in
 * registers over the rows of a warp, then over warps and blocks in their order.
 */
#include "columns.cuh"
#include "vector.cuh"

enum { CONV_THREADS = 128, CONV_MAX_TAPS = 64, NORM_WARPS = 8, NORM_BLOCKS = 264 };

template <class T> __device__ __forceinline__ float sigmoid(float x)
{
    return sizeof(T) == 2 ? __fdividef(1.0f, 1.0f + __expf(-x)) : 1.0f / (1.0f + expf(-x));
}

/* ---- convolution ---- */

/* The segment of a row that only moves forward. */
struct walker {
    const int32_t *cu;
    int segment, segments;
    int64_t start, end;
    __device__ walker(const int32_t *cu_, int segments_, int64_t row) : cu(cu_), segments(segments_)
    {
        segment = segment_of(cu, segments, row);
        start = cu[segment];
        end = cu[segment + 1];
    }
    /* True when all rows before `row` that have not been walked yet lie in this segment. */
    __device__ bool stays_before(int64_t row) const
    {
        return row <= end || segment + 1 >= segments;
    }
    /* True when row opens another segment than before. */
    __device__ bool moves(int64_t row)
    {
        if (row < end || segment + 1 >= segments)
            return false;
        while (segment + 1 < segments && cu[segment + 1] <= row)
            segment++;
        start = cu[segment];
        end = cu[segment + 1];
        return true;
    }
};

/* Four neighbouring channels as they lie in memory. */
enum { FOUR = 4 };
template <class T> struct four;
template <> struct four<bf16> {
    uint2 raw;
};
template <> struct four<float> {
    float4 raw;
};

template <bool VEC, class T> __device__ __forceinline__ four<T> read_four(const T *p, int n)
{
    four<T> c = {};
    if (VEC && n == FOUR)
        return *(const four<T> *)p;
#pragma unroll
    for (int i = 0; i < FOUR; i++)
        if (i < n)
            ((T *)&c)[i] = p[i];
    return c;
}

__device__ __forceinline__ void widen_four(const four<bf16> &c, float (&v)[FOUR])
{
    v[0] = __uint_as_float(c.raw.x << 16), v[1] = __uint_as_float(c.raw.x & 0xffff0000u);
    v[2] = __uint_as_float(c.raw.y << 16), v[3] = __uint_as_float(c.raw.y & 0xffff0000u);
}

__device__ __forceinline__ void widen_four(const four<float> &c, float (&v)[FOUR])
{
    v[0] = c.raw.x, v[1] = c.raw.y, v[2] = c.raw.z, v[3] = c.raw.w;
}

/* By an intrinsic: the compiler splits a plain store in two. */
__device__ __forceinline__ void store_whole(bf16 *p, const float (&v)[FOUR])
{
    const __nv_bfloat162 low = __floats2bfloat162_rn(v[0], v[1]),
                         high = __floats2bfloat162_rn(v[2], v[3]);
    __stcg((uint2 *)p, make_uint2(*(const unsigned *)&low, *(const unsigned *)&high));
}

__device__ __forceinline__ void store_whole(float *p, const float (&v)[FOUR])
{
    __stcg((float4 *)p, make_float4(v[0], v[1], v[2], v[3]));
}

template <bool VEC, class T>
__device__ __forceinline__ void store_four(T *p, int n, const float (&v)[FOUR])
{
    if (VEC && n == FOUR) {
        store_whole(p, v);
        return;
    }
#pragma unroll
    for (int i = 0; i < FOUR; i++)
        if (i < n)
            p[i] = from_float<T>(v[i]);
}

__device__ __forceinline__ int four_size(int64_t cols, int64_t c)
{
    return cols - c < FOUR ? (cols > c ? (int)(cols - c) : 0) : FOUR;
}

/* A thread's channels: weights, and the W last inputs, row r in slot r - first mod W. */
template <int W> struct taps {
    float k[W][FOUR], bias[FOUR], in[W][FOUR];
    /* The W-1 rows before `first`, zero outside its segment, which begins at `start`. */
    template <bool VEC, class T>
    __device__ __forceinline__ void begin(const matrix<const T> &x, const T *weight,
                                          const T *bias_of, int64_t first, int64_t start, int64_t c,
                                          int n)
    {
#pragma unroll
        for (int i = 0; i < FOUR; i++) {
            bias[i] = i < n ? to_float(bias_of[c + i]) : 0.0f;
#pragma unroll
            for (int w = 0; w < W; w++)
                k[w][i] = i < n ? to_float(weight[(c + i) * W + w]) : 0.0f;
        }
        clear();
#pragma unroll
        for (int u = 1; u < W; u++)
            if (first - W + u >= start)
                widen_four(read_four<VEC>(x.row(first - W + u) + c, n), in[u]);
    }
    __device__ __forceinline__ void clear()
    {
#pragma unroll
        for (int w = 0; w < W; w++)
#pragma unroll
            for (int i = 0; i < FOUR; i++)
                in[w][i] = 0;
    }
    /* Of channel i when slot u is the last row: bias + sum over taps in ascending order. */
    __device__ __forceinline__ float sum(int u, int i) const
    {
        float v = bias[i];
#pragma unroll
        for (int w = 0; w < W; w++)
            v += k[w][i] * in[(u + 1 + w) % W][i];
        return v;
    }
};

/* A turn of rows is read while the one before it is worked on. Nothing is asked of the rows of a
 * plain turn, which ends before the run and the segment do. */
template <bool VEC, int W, class T>
static __global__ void __launch_bounds__(CONV_THREADS, sizeof(T) == 2 ? 6 : 1)
    conv_forward_kernel(matrix<const T> x, const T *weight, const T *bias_of, const int32_t *cu,
                        int segments, int run, matrix<T> y)
{
    enum { TURN = 2 * W };
    const int64_t c = (blockIdx.x * (int64_t)CONV_THREADS + threadIdx.x) * FOUR;
    const int n = four_size(y.cols, c);
    const int64_t first = blockIdx.y * (int64_t)run,
                  last = first + run < y.rows ? first + run : y.rows;
    if (n == 0)
        return;
    taps<W> a;
    four<T> next[TURN];
    walker at(cu, segments, first);
    a.template begin<VEC>(x, weight, bias_of, first, at.start, c, n);
    const auto read_turn = [&](int64_t base) {
        const T *from = x.row(base) + c;
        if (base + TURN <= last) {
#pragma unroll
            for (int u = 0; u < TURN; u++)
                next[u] = read_four<VEC>(from + u * x.ld, n);
        } else
#pragma unroll
            for (int u = 0; u < TURN; u++)
                if (base + u < last)
                    next[u] = read_four<VEC>(from + u * x.ld, n);
    };
    read_turn(first);
    for (int64_t base = first; base < last; base += TURN) {
        four<T> row[TURN];
        T *to = y.row(base) + c;
#pragma unroll
        for (int u = 0; u < TURN; u++)
            row[u] = next[u];
        read_turn(base + TURN);
        const auto turn = [&](auto plain) {
#pragma unroll
            for (int u = 0; u < TURN; u++) {
                if (!plain) {
                    if (base + u >= last)
                        break;
                    if (at.moves(base + u))
                        a.clear();
                }
                widen_four(row[u], a.in[u % W]);
                float v[FOUR];
#pragma unroll
                for (int i = 0; i < FOUR; i++) {
                    v[i] = a.sum(u, i);
                    v[i] *= sigmoid<T>(v[i]);
                }
                store_four<VEC>(to + u * y.ld, n, v);
            }
        };
        if (base + TURN <= last && at.stays_before(base + TURN))
            turn(std::true_type());
        else
            turn(std::false_type());
    }
}

/* Turns of W rows, as forward; row s of a turn's row u has slot u of the rings in and due, row
 * s-(W-1)+w slot (u+1+w) % W. partial [runs][C*W + C]: dw as [C,W], then db; NULL when frozen. */
template <bool VEC, int W, class T>
static __global__ void __launch_bounds__(CONV_THREADS, sizeof(T) == 2 ? 4 : 1)
    conv_backward_kernel(matrix<const T> x, const T *weight, const T *bias_of, const int32_t *cu,
                         int segments, int run, matrix<const T> dy, matrix<T> dx, float *partial)
{
    const int64_t c = (blockIdx.x * (int64_t)CONV_THREADS + threadIdx.x) * FOUR;
    const int n = four_size(dx.cols, c);
    const int64_t first = blockIdx.y * (int64_t)run,
                  last = first + run < dx.rows ? first + run : dx.rows;
    /* rows from here on have dv = 0 */
    const int64_t known = last + W - 1 < dx.rows ? last + W - 1 : dx.rows;
    if (n == 0)
        return;
    float due[W][FOUR] = {}, dw[W][FOUR] = {}, db[FOUR] = {};
    taps<W> a;
    four<T> next_x[W], next_dy[W];
    walker at(cu, segments, first);
    a.template begin<VEC>(x, weight, bias_of, first, at.start, c, n);
    const auto read_turn = [&](int64_t base) {
        const T *from_x = x.row(base) + c, *from_dy = dy.row(base) + c;
        if (base + W <= known) {
#pragma unroll
            for (int u = 0; u < W; u++) {
                next_x[u] = read_four<VEC>(from_x + u * x.ld, n);
                next_dy[u] = read_four<VEC>(from_dy + u * dy.ld, n);
            }
        } else
#pragma unroll
            for (int u = 0; u < W; u++)
                if (base + u < known) {
                    next_x[u] = read_four<VEC>(from_x + u * x.ld, n);
                    next_dy[u] = read_four<VEC>(from_dy + u * dy.ld, n);
                }
    };
    read_turn(first);
    for (int64_t base = first; base < last + W - 1; base += W) {
        four<T> row_x[W], row_dy[W];
        T *to = dx.row(base - (W - 1)) + c;
#pragma unroll
        for (int u = 0; u < W; u++) {
            row_x[u] = next_x[u];
            row_dy[u] = next_dy[u];
        }
        read_turn(base + W);
        const auto turn = [&](auto plain) {
#pragma unroll
            for (int u = 0; u < W; u++) {
                const int64_t s = base + u;
                if (!plain)
#pragma unroll
                    for (int i = 0; i < FOUR; i++)
                        due[u][i] = 0;
                if (plain || s < known) {
                    if (!plain && at.moves(s))
                        a.clear();
                    float dv[FOUR];
                    widen_four(row_x[u], a.in[u]);
                    widen_four(row_dy[u], dv);
#pragma unroll
                    for (int i = 0; i < FOUR; i++) {
                        const float v = a.sum(u, i), gate = sigmoid<T>(v);
                        dv[i] *= gate * (1 + v * (1 - gate));
                    }
                    if (partial && (plain || s < last))
#pragma unroll
                        for (int i = 0; i < FOUR; i++) {
                            db[i] += dv[i];
#pragma unroll
                            for (int w = 0; w < W; w++)
                                dw[w][i] += dv[i] * a.in[(u + 1 + w) % W][i];
                        }
#pragma unroll
                    for (int w = 0; w < W; w++)
                        if (plain || s - (W - 1) + w >= at.start)
#pragma unroll
                            for (int i = 0; i < FOUR; i++)
                                due[(u + 1 + w) % W][i] =
                                    (plain && w == W - 1 ? 0.0f : due[(u + 1 + w) % W][i]) +
                                    a.k[w][i] * dv[i];
                }
                if (plain || (s - (W - 1) >= first && s - (W - 1) < last))
                    store_four<VEC>(to + u * dx.ld, n, due[(u + 1) % W]);
            }
        };
        const int64_t back = base - (W - 1);
        if (back >= first && back >= at.start && base + W <= last && at.stays_before(base + W))
            turn(std::true_type());
        else
            turn(std::false_type());
    }
    if (!partial)
        return;
    float *own = partial + blockIdx.y * dx.cols * (W + 1);
    if (W == FOUR && VEC && dx.cols % FOUR == 0) {
#pragma unroll
        for (int i = 0; i < FOUR; i++)
            __stcg((float4 *)(own + (c + i) * W),
                   make_float4(dw[0][i], dw[1][i], dw[2][i], dw[W - 1][i]));
        store_whole(own + dx.cols * W + c, db);
        return;
    }
#pragma unroll
    for (int i = 0; i < FOUR; i++)
        if (i < n) {
#pragma unroll
            for (int w = 0; w < W; w++)
                own[(c + i) * W + w] = dw[w][i];
            own[dx.cols * W + c + i] = db[i];
        }
}

/* Any number of taps, one channel a thread, inputs read from memory again and again: for widths no
 * model uses. */
template <class T>
__device__ float conv_at(const matrix<const T> &x, const T *weight, const T *bias, int taps,
                         int64_t r, int64_t start, int64_t c)
{
    float v = to_float(bias[c]);
    for (int w = 0; w < taps; w++)
        if (r - (taps - 1) + w >= start)
            v += to_float(weight[c * taps + w]) * to_float(x.row(r - (taps - 1) + w)[c]);
    return v;
}

template <class T>
__device__ float conv_dv(const matrix<const T> &x, const T *weight, const T *bias, int taps,
                         const matrix<const T> &dy, int64_t r, int64_t start, int64_t c)
{
    const float v = conv_at(x, weight, bias, taps, r, start, c), gate = sigmoid<T>(v);
    return to_float(dy.row(r)[c]) * gate * (1 + v * (1 - gate));
}

template <class T>
static __global__ void conv_any_forward(matrix<const T> x, const T *weight, const T *bias, int taps,
                                        const int32_t *cu, int segments, matrix<T> y)
{
    const int64_t c = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
    if (c >= y.cols)
        return;
    const walker at(cu, segments, blockIdx.y);
    const float v = conv_at(x, weight, bias, taps, blockIdx.y, at.start, c);
    y.row(blockIdx.y)[c] = from_float<T>(v * sigmoid<T>(v));
}

template <class T>
static __global__ void conv_any_dx(matrix<const T> x, const T *weight, const T *bias, int taps,
                                   const int32_t *cu, int segments, matrix<const T> dy,
                                   matrix<T> dx)
{
    const int64_t c = blockIdx.x * (int64_t)blockDim.x + threadIdx.x, r = blockIdx.y;
    if (c >= dx.cols)
        return;
    const walker at(cu, segments, r);
    float sum = 0;
    for (int w = taps - 1; w >= 0; w--)
        if (r + taps - 1 - w < at.end)
            sum += to_float(weight[c * taps + w]) *
                   conv_dv(x, weight, bias, taps, dy, r + taps - 1 - w, at.start, c);
    dx.row(r)[c] = from_float<T>(sum);
}

/* One thread per (channel, tap); tap = taps: the bias. */
template <class T>
static __global__ void conv_any_dw(matrix<const T> x, const T *weight, const T *bias, int taps,
                                   const int32_t *cu, int segments, matrix<const T> dy, float *dw,
                                   float *db)
{
    const int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x, c = i / (taps + 1);
    const int w = (int)(i % (taps + 1));
    if (c >= dy.cols)
        return;
    walker at(cu, segments, 0);
    float sum = 0;
    for (int64_t r = 0; r < dy.rows; r++) {
        at.moves(r);
        const float dv = conv_dv(x, weight, bias, taps, dy, r, at.start, c);
        if (w == taps)
            sum += dv;
        else if (r - (taps - 1) + w >= at.start)
            sum += dv * to_float(x.row(r - (taps - 1) + w)[c]);
    }
    if (w == taps)
        db[c] += sum;
    else
        dw[c * taps + w] += sum;
}

enum { FAST_TAPS = 4 };

static int conv_run(int64_t rows, int64_t cols, size_t scratch)
{
    int64_t run = 64;
    while ((rows + run - 1) / run > 65535 ||
           (size_t)((rows + run - 1) / run * cols * (FAST_TAPS + 1)) * sizeof(float) > scratch)
        run *= 2;
    return (int)run;
}

static void check_conv(in_t x, in_t w, in_t b, in_t y)
{
    ASSERT(tensor_rows(x) == tensor_rows(y) && tensor_cols(x) == tensor_cols(y) &&
           tensor_rows(w) == tensor_cols(y) && tensor_numel(b) == tensor_cols(y) &&
           tensor_cols(w) >= 1 && tensor_cols(w) <= CONV_MAX_TAPS);
}

extern "C" void cuda_conv_forward(struct stream *s, in_t x, in_t w, in_t b, in_t cu,
                                  int64_t max_len, out_t y)
{
    const int64_t rows = tensor_rows(y), cols = tensor_cols(y);
    check_conv(x, w, b, y);
    if (rows * cols == 0)
        return;
    const int taps = (int)tensor_cols(w), segments = (int)tensor_numel(cu) - 1,
              run = conv_run(rows, cols, cuda_context_of(s)->scratch_bytes);
    by_type(y, [&](auto zero) {
        using T = decltype(zero);
        if (taps != FAST_TAPS) {
            ASSERT(rows <= 65535);
            conv_any_forward<T>
                <<<dim3(blocks_for(cols, 128), (unsigned)rows), 128, 0, cuda_stream_of(s)>>>(
                    as_matrix<const T>(x), (const T *)w->data, (const T *)b->data, taps,
                    (const int32_t *)cu->data, segments, as_matrix<T>(y));
            return;
        }
        const dim3 grid(blocks_for(cols, CONV_THREADS * FOUR), (unsigned)((rows + run - 1) / run));
        by_flag(chunks_aligned({ x, y }), [&](auto vec) {
            conv_forward_kernel<decltype(vec)::value, FAST_TAPS, T>
                <<<grid, CONV_THREADS, 0, cuda_stream_of(s)>>>(
                    as_matrix<const T>(x), (const T *)w->data, (const T *)b->data,
                    (const int32_t *)cu->data, segments, run, as_matrix<T>(y));
        });
    });
    CHECK_LAUNCH();
}

extern "C" void cuda_conv_backward(struct stream *s, in_t x, in_t w, in_t b, in_t cu,
                                   int64_t max_len, in_t dy, out_t dx, out_t dw, out_t db)
{
    const int64_t rows = tensor_rows(dx), cols = tensor_cols(dx);
    check_conv(x, w, b, dx);
    ASSERT(tensor_rows(dy) == rows && tensor_cols(dy) == cols && (dw == NULL) == (db == NULL));
    if (rows * cols == 0)
        return;
    const int taps = (int)tensor_cols(w), segments = (int)tensor_numel(cu) - 1,
              run = conv_run(rows, cols, cuda_context_of(s)->scratch_bytes);
    const int runs = (int)((rows + run - 1) / run);
    const cudaStream_t st = cuda_stream_of(s);
    const int32_t *starts = (const int32_t *)cu->data;
    by_type(dx, [&](auto zero) {
        using T = decltype(zero);
        const T *weight = (const T *)w->data, *bias = (const T *)b->data;
        if (taps != FAST_TAPS) {
            ASSERT(rows <= 65535);
            conv_any_dx<T><<<dim3(blocks_for(cols, 128), (unsigned)rows), 128, 0, st>>>(
                as_matrix<const T>(x), weight, bias, taps, starts, segments, as_matrix<const T>(dy),
                as_matrix<T>(dx));
            CHECK_LAUNCH();
            if (dw)
                conv_any_dw<T><<<blocks_for(cols * (taps + 1), 128), 128, 0, st>>>(
                    as_matrix<const T>(x), weight, bias, taps, starts, segments,
                    as_matrix<const T>(dy), (float *)dw->data, (float *)db->data);
            return;
        }
        float *partial =
            dw ? (float *)cuda_scratch(s, (size_t)(runs * cols * (FAST_TAPS + 1)) * sizeof(float))
               : NULL;
        const dim3 grid(blocks_for(cols, CONV_THREADS * FOUR), (unsigned)runs);
        by_flag(chunks_aligned({ x, dy, dx }), [&](auto vec) {
            conv_backward_kernel<decltype(vec)::value, FAST_TAPS, T><<<grid, CONV_THREADS, 0, st>>>(
                as_matrix<const T>(x), weight, bias, starts, segments, run, as_matrix<const T>(dy),
                as_matrix<T>(dx), partial);
        });
        CHECK_LAUNCH();
        if (partial) {
            const int64_t stride = cols * (FAST_TAPS + 1);
            columns_finish(st, partial, runs, stride, cols * FAST_TAPS, (float *)dw->data);
            columns_finish(st, partial + cols * FAST_TAPS, runs, stride, cols, (float *)db->data);
        }
    });
    CHECK_LAUNCH();
}

/* ---- gated norm ---- */

/* A row of a group as it lies in memory. */
template <bool VEC, int PER, class T> struct group_raw {
    chunk<T> c[PER];
    __device__ __forceinline__ void read(const T *p, int64_t width)
    {
#pragma unroll
        for (int i = 0; i < PER; i++) {
            const int64_t at = (int64_t)(i * WARP + threadIdx.x % WARP) * CHUNK;
            c[i] = read_chunk<VEC>(p + (at < width ? at : 0), chunk_size(width, at));
        }
    }
};

/* A lane has chunks lane, lane+32, ... of its group: PER of them at most. */
template <bool VEC, int PER, class T> struct group_row {
    float v[PER][CHUNK];
    __device__ __forceinline__ void load(const T *p, int64_t width)
    {
#pragma unroll
        for (int i = 0; i < PER; i++) {
            const int64_t c = (int64_t)(i * WARP + threadIdx.x % WARP) * CHUNK;
            load_chunk<VEC>(p + (c < width ? c : 0), chunk_size(width, c), v[i]);
        }
    }
    __device__ __forceinline__ void widen(const group_raw<VEC, PER, T> &raw)
    {
#pragma unroll
        for (int i = 0; i < PER; i++)
            widen_chunk(raw.c[i], v[i]);
    }
    __device__ __forceinline__ void store(T *p, int64_t width) const
    {
#pragma unroll
        for (int i = 0; i < PER; i++) {
            const int64_t c = (int64_t)(i * WARP + threadIdx.x % WARP) * CHUNK;
            if (c < width)
                store_chunk<VEC>(p + c, chunk_size(width, c), v[i]);
        }
    }
};

template <bool VEC, int PER, class T>
static __global__ void __launch_bounds__(NORM_WARPS *WARP)
    gated_forward_kernel(matrix<const T> y, matrix<const T> z, const T *w, int groups, float eps,
                         matrix<T> o, matrix<float> rs)
{
    const int64_t task = blockIdx.x * (int64_t)NORM_WARPS + threadIdx.x / WARP, r = task / groups;
    if (r >= o.rows)
        return;
    const int g = (int)(task % groups);
    const int64_t width = o.cols / groups, first = g * width;
    group_row<VEC, PER, T> u, gate, weight;
    u.load(y.row(r) + first, width);
    gate.load(z.row(r) + first, width);
    weight.load(w + first, width);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < PER; i++)
#pragma unroll
        for (int j = 0; j < CHUNK; j++) {
            u.v[i][j] *= gate.v[i][j] * sigmoid<T>(gate.v[i][j]);
            sum += u.v[i][j] * u.v[i][j];
        }
    const float scale = rsqrtf(warp_sum(sum) / (float)width + eps);
#pragma unroll
    for (int i = 0; i < PER; i++)
#pragma unroll
        for (int j = 0; j < CHUNK; j++)
            u.v[i][j] *= scale * weight.v[i][j];
    u.store(o.row(r) + first, width);
    if (threadIdx.x % WARP == 0)
        rs.row(r)[g] = scale;
}

/* Block (b, g): rows b*NORM_WARPS + warp, + gridDim.x*NORM_WARPS, ... of group g; a warp's next row
 * is read while it works on one. partial [blocks][cols] or NULL. */
template <bool VEC, int PER, class T>
static __global__ void __launch_bounds__(NORM_WARPS *WARP, PER * sizeof(T) <= 4 ? 2 : 1)
    gated_backward_kernel(matrix<const T> y, matrix<const T> z, const T *w, matrix<const float> rs,
                          matrix<const T> d_o, matrix<T> dy, matrix<T> dz, float *partial)
{
    extern __shared__ float sums[]; /* [width] */
    const int groups = gridDim.y, g = blockIdx.y, warp = threadIdx.x / WARP;
    const int64_t width = dy.cols / groups, first = g * width;
    group_row<VEC, PER, T> weight, value, gate, from;
    float dw[PER][CHUNK] = {};
    weight.load(w + first, width);
    constexpr bool AHEAD = PER <= 2; /* the registers allow it */
    const int64_t own = blockIdx.x * (int64_t)NORM_WARPS + warp,
                  step = (int64_t)gridDim.x * NORM_WARPS;
    group_raw<VEC, PER, T> next[3];
    float next_scale = 0;
    const auto read = [&](int64_t r) {
        if (r >= dy.rows)
            return;
        next[0].read(y.row(r) + first, width);
        next[1].read(z.row(r) + first, width);
        next[2].read(d_o.row(r) + first, width);
        next_scale = rs.row(r)[g];
    };
    if (AHEAD)
        read(own);
    for (int64_t r = own; r < dy.rows; r += step) {
        if (!AHEAD)
            read(r);
        value.widen(next[0]);
        gate.widen(next[1]);
        from.widen(next[2]);
        const float scale = next_scale;
        if (AHEAD)
            read(r + step);
        float sum = 0;
#pragma unroll
        for (int i = 0; i < PER; i++)
#pragma unroll
            for (int j = 0; j < CHUNK; j++) {
                const float x = gate.v[i][j], normed = value.v[i][j] * x * sigmoid<T>(x) * scale;
                dw[i][j] += from.v[i][j] * normed;
                from.v[i][j] *= weight.v[i][j];
                sum += from.v[i][j] * normed;
            }
        const float mean = warp_sum(sum) / (float)width;
#pragma unroll
        for (int i = 0; i < PER; i++)
#pragma unroll
            for (int j = 0; j < CHUNK; j++) {
                const float x = gate.v[i][j], sg = sigmoid<T>(x), silu = x * sg;
                const float du = scale * (from.v[i][j] - value.v[i][j] * silu * scale * mean);
                gate.v[i][j] = du * value.v[i][j] * sg * (1 + x * (1 - sg));
                value.v[i][j] = du * silu;
            }
        value.store(dy.row(r) + first, width);
        gate.store(dz.row(r) + first, width);
    }
    if (!partial)
        return;
    for (int turn = 0; turn < NORM_WARPS; turn++) {
        if (turn == warp)
#pragma unroll
            for (int i = 0; i < PER; i++)
#pragma unroll
                for (int j = 0; j < CHUNK; j++) {
                    const int64_t c = (int64_t)(i * WARP + threadIdx.x % WARP) * CHUNK + j;
                    if (c < width)
                        sums[c] = turn == 0 ? dw[i][j] : sums[c] + dw[i][j];
                }
        __syncthreads();
    }
    for (int64_t c = threadIdx.x; c < width; c += blockDim.x)
        partial[blockIdx.x * dy.cols + first + c] = sums[c];
}

/* Chunks a lane needs for groups of `width` columns, rounded to what is compiled. */
template <class F> static void by_chunks(int64_t width, F f)
{
    const int64_t need = (width + WARP * CHUNK - 1) / (WARP * CHUNK);
    if (need <= 1)
        f(std::integral_constant<int, 1>());
    else if (need <= 2)
        f(std::integral_constant<int, 2>());
    else if (need <= 5)
        f(std::integral_constant<int, 5>());
    else
        FATAL(EXIT_INTERNAL, "gated norm over groups of %lld columns: at most %d", (long long)width,
              5 * WARP * CHUNK);
}

static void check_gated(in_t y, in_t z, in_t w, int groups, in_t rs, in_t o)
{
    const int64_t rows = tensor_rows(o), cols = tensor_cols(o);
    ASSERT(groups > 0 && cols % groups == 0 && tensor_numel(w) == cols && tensor_rows(rs) == rows &&
           tensor_cols(rs) == groups);
    ASSERT(tensor_rows(y) == rows && tensor_cols(y) == cols && tensor_rows(z) == rows &&
           tensor_cols(z) == cols);
}

/* A group must start on 16 bytes as well. */
static bool groups_aligned(std::initializer_list<in_t> views, in_t w, int64_t width)
{
    return chunks_aligned(views) && chunks_aligned({ w }) && width % CHUNK == 0;
}

extern "C" void cuda_gated_norm_forward(struct stream *s, in_t y, in_t z, in_t w, int groups,
                                        double eps, out_t o, out_t rs)
{
    const int64_t rows = tensor_rows(o), width = tensor_cols(o) / groups;
    check_gated(y, z, w, groups, rs, o);
    if (rows * width == 0)
        return;
    by_type(o, [&](auto zero) {
        using T = decltype(zero);
        by_chunks(width, [&](auto per) {
            by_flag(groups_aligned({ y, z, o }, w, width), [&](auto vec) {
                gated_forward_kernel<decltype(vec)::value, decltype(per)::value, T>
                    <<<blocks_for(rows * groups, NORM_WARPS), NORM_WARPS * WARP, 0,
                       cuda_stream_of(s)>>>(as_matrix<const T>(y), as_matrix<const T>(z),
                                            (const T *)w->data, groups, (float)eps, as_matrix<T>(o),
                                            as_matrix<float>(rs));
            });
        });
    });
    CHECK_LAUNCH();
}

extern "C" void cuda_gated_norm_backward(struct stream *s, in_t y, in_t z, in_t w, int groups,
                                         in_t rs, in_t do_, out_t dy, out_t dz, out_t dw)
{
    const int64_t rows = tensor_rows(dy), cols = tensor_cols(dy), width = cols / groups;
    check_gated(y, z, w, groups, rs, dy);
    ASSERT(tensor_rows(do_) == rows && tensor_cols(do_) == cols && tensor_rows(dz) == rows &&
           tensor_cols(dz) == cols);
    if (rows * width == 0)
        return;
    const int64_t most = (rows + NORM_WARPS - 1) / NORM_WARPS,
                  wanted = NORM_BLOCKS / groups > 1 ? NORM_BLOCKS / groups : 1;
    const int blocks = (int)(most < wanted ? most : wanted);
    float *partial = dw ? (float *)cuda_scratch(s, (size_t)(blocks * cols) * sizeof(float)) : NULL;
    by_type(dy, [&](auto zero) {
        using T = decltype(zero);
        by_chunks(width, [&](auto per) {
            by_flag(groups_aligned({ y, z, do_, dy, dz }, w, width), [&](auto vec) {
                gated_backward_kernel<decltype(vec)::value, decltype(per)::value, T>
                    <<<dim3((unsigned)blocks, (unsigned)groups), NORM_WARPS * WARP,
                       (size_t)width * sizeof(float), cuda_stream_of(s)>>>(
                        as_matrix<const T>(y), as_matrix<const T>(z), (const T *)w->data,
                        as_matrix<const float>(rs), as_matrix<const T>(do_), as_matrix<T>(dy),
                        as_matrix<T>(dz), partial);
            });
        });
    });
    CHECK_LAUNCH();
    if (partial)
        columns_finish(cuda_stream_of(s), partial, blocks, cols, cols, (float *)dw->data);
}
