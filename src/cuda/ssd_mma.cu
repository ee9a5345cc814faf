/* ssd_mma.cu - the scan on tensor cores: bf16, P = 64, N = 128, chunks of 128 rows (model.md
 * 1.6.5).
 *
 *   walk    a block per head and 64 columns of the state goes through all chunks with the state in
 *           registers and leaves what enters each of them; the adjoint goes the other way. Chunks
 *           arrive three deep.
 *   rows    a block per chunk and group has C.B of its group in registers for all the group's
 *           heads: y, or dx and the sums over decays.
 *   bc      a block per chunk and group: dB and dC, summed over the heads in registers.
 *
 * A warp has sixteen rows of a chunk, so what enters a second product, (C.B) L del or (C.B) L,
 * never leaves its registers; tiles beyond the diagonal are left out, and warps i and 7-i share a
 * scheduler. What enters a product is rounded to bf16 as the model's reference does: also tail del
 * x, carry gy and the states, which are passed on in fp32. Row sums and column sums of W are those
 * of the same fp32 numbers: they all but cancel where decay is strong. Rows beyond a short chunk's
 * end are zeros.
 */
#include "ssd.h"
#include "tiles.cuh"

enum { Q = 128, P = 64, N = 128, TILE = 16, TILES = Q / TILE, ALIGNMENT = 256 };

/* Rows of COLS elements, zero from row `rows` on. Nothing is read for those, whatever their
 * address. */
template <int COLS, int THREADS>
__device__ __forceinline__ void copy_rows(bf16 *to, const bf16 *from, int64_t from_ld, int rows)
{
    enum { PIECES = COLS / 8, STEP = THREADS / PIECES };
    const int row = threadIdx.x / PIECES, c = threadIdx.x % PIECES * 8;
    static_assert(STEP % 8 == 0, "a thread's pieces lie in the same place of their rows");
    to += place<COLS>(row, c);
    from += row * from_ld + c;
#pragma unroll
    for (int r = 0; r < Q; r += STEP)
        copy_async(to + r * COLS, from + r * from_ld, row + r < rows);
}

/* A state [P,N]. */
template <int THREADS> __device__ __forceinline__ void copy_state(bf16 *to, const bf16 *from)
{
    enum { PIECES = N / 8, STEP = THREADS / PIECES };
    const int row = threadIdx.x / PIECES, c = threadIdx.x % PIECES * 8;
    static_assert(STEP % 8 == 0, "a thread's pieces lie in the same place of their rows");
    to += place<N>(row, c);
    from += row * N + c;
#pragma unroll
    for (int r = 0; r < P; r += STEP)
        copy_async(to + r * N, from + r * N, true);
}

/* Q numbers, by the 32 threads from `first` on. */
__device__ __forceinline__ void copy_rates(float *to, const float *from, int first)
{
    const int i = (int)threadIdx.x - first;
    if (i >= 0 && i < Q / 4)
        copy_async(to + 4 * i, from + 4 * i, true);
}

/* This form keeps states in bf16, where the other has them in fp32. */
__device__ __forceinline__ bf16 *stored(float *states)
{
    return (bf16 *)states;
}

/* The same in all lanes, and the compiler knows. */
__device__ __forceinline__ int warp_index()
{
    return __shfl_sync(0xffffffffu, threadIdx.x / WARP, 0);
}

__device__ __forceinline__ float pair_dot(unsigned pair, float low, float high)
{
    return low_half(pair) * low + high_half(pair) * high;
}

/* ---- states ---- */

enum {
    WALK_COLS = 64,
    WALK_THREADS = 256,
    WALK_STAGES = 3,
    WALK_NT = WALK_COLS / 2 / 8,
    WALK_PIECES = Q * 8 / WALK_THREADS
};

struct walk_stage {
    bf16 left[Q * P], right[Q * WALK_COLS];
};

/* x and B, or gy and C. */
__device__ __forceinline__ void copy_stage(walk_stage &s, const ssd_args<bf16> &a,
                                           const ssd_chunk &k, int h, int g, int n0, bool adjoint)
{
    copy_rows<P, WALK_THREADS>(s.left, adjoint ? a.gy(k.first, h) : a.x(k.first, h),
                               adjoint ? a.dy.ld : a.xbc.ld, k.rows);
    copy_rows<WALK_COLS, WALK_THREADS>(s.right, (adjoint ? a.c(k.first, g) : a.b(k.first, g)) + n0,
                                       a.xbc.ld, k.rows);
}

/* What a thread needs of a chunk's rates: the factors of the rows of which copy_rows has it copy a
 * piece, and keep. */
struct walk_rates {
    float row[WALK_PIECES], keep;
    __device__ __forceinline__ void read(const ssd_args<bf16> &a, int c, int h, bool adjoint)
    {
        const float *from = (adjoint ? a.carry : a.push) + a.rates_at(c, h);
#pragma unroll
        for (int i = 0; i < WALK_PIECES; i++)
            row[i] = from[threadIdx.x / 8 + i * WALK_THREADS / 8];
        keep = a.carry[a.rates_at(c, h) + Q - 1];
    }
    /* A thread's own pieces of left, before anyone else reads them. */
    __device__ __forceinline__ void scale(bf16 *left) const
    {
#pragma unroll
        for (int i = 0; i < WALK_PIECES; i++) {
            uint4 &v = *(uint4 *)(left + place<P>(threadIdx.x / 8 + i * WALK_THREADS / 8,
                                                  threadIdx.x % 8 * 8));
            const uint4 w = v;
            v = make_uint4(scaled(w.x, row[i], row[i]), scaled(w.y, row[i], row[i]),
                           scaled(w.z, row[i], row[i]), scaled(w.w, row[i], row[i]));
        }
    }
};

/* Warps: four times sixteen rows of the state, twice 32 columns. gridDim.z 2: the adjoint too. */
static __global__ void __launch_bounds__(WALK_THREADS, 2) walk_kernel(ssd_args<bf16> a)
{
    extern __shared__ __align__(ALIGNMENT) char memory[];
    walk_stage *stages = (walk_stage *)memory;
    const int h = blockIdx.x, group = a.group_of(h), n0 = blockIdx.y * WALK_COLS,
              warp = warp_index(), lane = threadIdx.x % WARP, count = *a.count;
    const bool adjoint = blockIdx.z;
    const int p0 = warp % 4 * TILE, own = warp / 4 * (WALK_COLS / 2), g = lane / 4;
    const auto chunk_of = [&](int step) { return adjoint ? count - 1 - step : step; };
    if (count == 0)
        return;
    float state[WALK_NT][4] = {};
    walk_rates next;
    next.read(a, chunk_of(0), h, adjoint);
    for (int step = 0; step < WALK_STAGES - 1; step++) {
        if (step < count)
            copy_stage(stages[step], a, a.chunks[chunk_of(step)], h, group, n0, adjoint);
        copies_end();
    }
    /* Of this step whether the state begins anew, of the chunk to copy where it lies: read a step
     * before they are needed. */
    const auto fresh_at = [&](int step) {
        return adjoint ? a.chunks[chunk_of(step)].closes : a.chunks[chunk_of(step)].opens;
    };
    const auto capped = [&](int step) { return step < count ? step : count - 1; };
    int next_fresh = fresh_at(0);
    ssd_chunk coming = a.chunks[chunk_of(capped(WALK_STAGES - 1))];
    for (int step = 0; step < count; step++) {
        const int c = chunk_of(step), ahead = step + WALK_STAGES - 1;
        const bool fresh = next_fresh;
        walk_stage &s = stages[step % WALK_STAGES];
        const walk_rates rates = next;
        copies_wait<WALK_STAGES - 2>();
        rates.scale(s.left);
        __syncthreads();
        if (ahead < count)
            copy_stage(stages[ahead % WALK_STAGES], a, coming, h, group, n0, adjoint);
        copies_end();
        next.read(a, chunk_of(capped(step + 1)), h, adjoint);
        next_fresh = fresh_at(capped(step + 1));
        coming = a.chunks[chunk_of(capped(ahead + 1))];
        bf16 *to =
            stored(adjoint ? a.adjoint : a.entering) + a.state_at(c, h) + (p0 + g) * N + n0 + own;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            unsigned w[4];
#pragma unroll
            for (int i = 0; i < WALK_NT; i++) {
                state[i][2 * half] = fresh ? 0.0f : state[i][2 * half];
                state[i][2 * half + 1] = fresh ? 0.0f : state[i][2 * half + 1];
                w[i] = pack(state[i][2 * half], state[i][2 * half + 1]);
            }
            store_row(to + 8 * half * N, w[0], w[1], w[2], w[3], true);
        }
#pragma unroll
        for (int i = 0; i < WALK_NT; i++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                state[i][e] *= rates.keep;
        const unsigned left = down<P>(s.left) ^ 2 * p0,
                       right = across<WALK_COLS>(s.right) ^ 2 * own;
#pragma unroll
        for (int k = 0; k < Q; k += 16) {
            unsigned f[4];
            load_matrices_transposed(f, left + 2 * k * P);
            multiply_row<WALK_NT / 2>(state, f, right + 2 * k * WALK_COLS);
        }
    }
}

/* ---- y, or dx and the sums over decays ---- */

enum { ROWS_THREADS = 256, P_NT = P / 8, NEAR = 4, FAR = (TILES - NEAR) * (TILES - NEAR + 1) / 2 };

struct rows_shared {
    bf16 own[Q * N]; /* C; backward B */
    union {
        /* B; backward C: until their product is there */
        bf16 other[Q * N];
        struct {
            /* entering and x; adjoint and gy */
            bf16 state[P * N], values[Q * P];
        };
    };
    /* of this head and the next */
    float cs[2][Q], del[2][Q];
};

struct rows_backward_shared {
    bf16 x[Q * P];
    /* C.B of tiles that registers have no room for */
    float4 far[FAR][2][WARP];
    float row[TILES][Q], e[Q], through[Q], skip[TILES];
};

/* Forward has room for the x of the next head, in turn; backward reads x and gy of a head at
 * once. */
template <bool BACKWARD> struct rows_memory : rows_shared {
    bf16 odd[Q * P];
    __device__ __forceinline__ bf16 *values_of(int h)
    {
        return h % 2 ? odd : values;
    }
    __device__ __forceinline__ const bf16 *own_x() const
    {
        return NULL;
    }
};
template <> struct rows_memory<true> : rows_shared, rows_backward_shared {
    __device__ __forceinline__ bf16 *values_of(int)
    {
        return values;
    }
    __device__ __forceinline__ const bf16 *own_x() const
    {
        return x;
    }
};

/* Where far keeps tile's i-th from the diagonal, i >= NEAR. */
__device__ __forceinline__ int far_slot(int tile, int i)
{
    return tile * (TILES - NEAR) - tile * (tile - 1) / 2 + i - NEAR;
}

/* Tiles 0..7 of warps so that each scheduler has two which add up to one row of the triangle. */
__device__ __forceinline__ int tile_of(int warp)
{
    return warp < TILES / 2 ? warp : TILES - 1 - warp % (TILES / 2);
}

template <bool BACKWARD>
__device__ __forceinline__ void copy_head(rows_memory<BACKWARD> &s, const ssd_args<bf16> &a,
                                          const ssd_chunk &k, int c, int h)
{
    copy_rows<P, ROWS_THREADS>(s.values_of(h), BACKWARD ? a.gy(k.first, h) : a.x(k.first, h),
                               BACKWARD ? a.dy.ld : a.xbc.ld, k.rows);
    copy_rates(s.cs[h % 2], a.cs + a.rates_at(c, h), 0);
    copy_rates(s.del[h % 2], a.del + a.rates_at(c, h), WARP);
    if constexpr (BACKWARD)
        copy_rows<P, ROWS_THREADS>(s.x, a.x(k.first, h), a.xbc.ld, k.rows);
}

/* The sums over a tile's sixteen rows of q[0..3], columns 2t, 2t+1, 8+2t, 9+2t of the lane, go to
 * out[16]. */
__device__ __forceinline__ void store_column_sums(const float (&q)[4], float *out)
{
    const int lane = threadIdx.x % WARP, t = lane % 4;
    const bool b = lane & 16, c = lane & 8;
    float u = (b ? q[2] : q[0]) + __shfl_xor_sync(0xffffffffu, b ? q[0] : q[2], 16);
    float v = (b ? q[3] : q[1]) + __shfl_xor_sync(0xffffffffu, b ? q[1] : q[3], 16);
    u = (c ? v : u) + __shfl_xor_sync(0xffffffffu, c ? u : v, 8);
    u += __shfl_xor_sync(0xffffffffu, u, 4);
    if (!(lane & 4))
        out[(b ? 8 : 0) + 2 * t + c] = u;
}

/* Where a thread stands: its warp has a tile of rows, the thread rows r0 and r0 + 8 of the chunk
 * and columns 2t, 2t+1 of every eight; `blocks` tiles of columns, from the diagonal on. */
struct rows_place {
    int tile, lane, g, t, r0, blocks;
};

/* First column of the i-th tile from the diagonal. */
template <bool BACKWARD> __device__ __forceinline__ int column_of(const rows_place &w, int i)
{
    return (BACKWARD ? w.tile + i : w.tile - i) * TILE;
}

/* Tiles from the diagonal on whose C.B stay in registers; the others go to far. */
template <bool BACKWARD> constexpr int ROWS_KEPT = BACKWARD ? +NEAR : +TILES;

/* C.B of the warp's tile of rows with every tile of columns: the same for all heads of a group. */
template <bool BACKWARD>
__device__ __forceinline__ void multiply_group(rows_memory<BACKWARD> &s, const rows_place &w,
                                               unsigned own,
                                               float (&near)[ROWS_KEPT<BACKWARD>][2][4])
{
    constexpr int KEPT = ROWS_KEPT<BACKWARD>;
    float cb[TILES][2][4] = {};
    const unsigned other = down<N>(s.other);
#pragma unroll 1
    for (int n = 0; n < N; n += 16) {
        unsigned f[4];
        load_matrices(f, own ^ 2 * n);
#pragma unroll
        for (int i = 0; i < TILES; i++)
            if (i < w.blocks)
                multiply_column<1, N>(cb[i], f,
                                      (other ^ 2 * n) + 2 * column_of<BACKWARD>(w, i) * N);
    }
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            if constexpr (BACKWARD)
                if (i >= NEAR && i < w.blocks)
                    s.far[far_slot(w.tile, i)][j][w.lane] =
                        make_float4(cb[i][j][0], cb[i][j][1], cb[i][j][2], cb[i][j][3]);
            if (i < KEPT)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    near[i < KEPT ? i : 0][j][e] = cb[i][j][e];
        }
}

/* sum, which is what the state gives, times carry or tail of its rows. Backward also adds its
 * product with x to the rows' columns and stores their sum as through. */
template <bool BACKWARD>
__device__ __forceinline__ void scale_rows(float (&sum)[P_NT][4], rows_memory<BACKWARD> &s,
                                           const rows_place &w, const float *cs, float &column0,
                                           float &column1)
{
    const int r0 = w.r0;
    const float scale0 = fast_exp2(BACKWARD ? cs[Q - 1] - cs[r0] : cs[r0]),
                scale1 = fast_exp2(BACKWARD ? cs[Q - 1] - cs[r0 + 8] : cs[r0 + 8]);
    const int swap = again(8 * w.g); /* place() of a lane's rows */
#pragma unroll
    for (int i = 0; i < P_NT; i++) {
        sum[i][0] *= scale0;
        sum[i][1] *= scale0;
        sum[i][2] *= scale1;
        sum[i][3] *= scale1;
        if constexpr (BACKWARD) {
            column0 += pair_dot(*(const unsigned *)&s.x[r0 * P + (8 * i ^ swap) + 2 * w.t],
                                sum[i][0], sum[i][1]);
            column1 += pair_dot(*(const unsigned *)&s.x[(r0 + 8) * P + (8 * i ^ swap) + 2 * w.t],
                                sum[i][2], sum[i][3]);
        }
    }
    if constexpr (BACKWARD) {
        const float through0 = row_lanes(column0), through1 = row_lanes(column1);
        if (w.t == 0) {
            s.through[r0] = through0;
            s.through[r0 + 8] = through1;
        }
    }
}

/* v = (C.B) L of half j of the i-th tile, forward times del of the columns; nothing behind the
 * diagonal. */
template <bool BACKWARD>
__device__ __forceinline__ void weigh(float (&v)[4], const rows_memory<BACKWARD> &s,
                                      const rows_place &w, const float *cs, const float *del,
                                      const float (&near)[ROWS_KEPT<BACKWARD>][2][4], int i, int j)
{
    constexpr int KEPT = ROWS_KEPT<BACKWARD>;
    const int at = column_of<BACKWARD>(w, i) + 8 * j + 2 * w.t;
    const float2 there = *(const float2 *)(cs + at);
    const float here[2] = { cs[w.r0], cs[w.r0 + 8] };
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const float d = here[e / 2] - (e % 2 ? there.y : there.x);
        v[e] = fast_exp2(BACKWARD ? -d : d);
    }
    if (i < KEPT) {
#pragma unroll
        for (int e = 0; e < 4; e++)
            v[e] *= near[i < KEPT ? i : 0][j][e];
    } else if constexpr (BACKWARD) {
        const float4 cb = s.far[far_slot(w.tile, i)][j][w.lane];
        v[0] *= cb.x, v[1] *= cb.y, v[2] *= cb.z, v[3] *= cb.w;
    }
    if (!BACKWARD) {
        const float2 factor = *(const float2 *)(del + at);
        v[0] *= factor.x, v[1] *= factor.y, v[2] *= factor.x, v[3] *= factor.y;
    }
    if (i == 0) /* the diagonal */
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int row = w.g + 8 * (e / 2), col = 8 * j + 2 * w.t + e % 2;
            v[e] = (BACKWARD ? col < row : col > row) ? 0.0f : v[e];
        }
}

/* y = sum + D x; dx = del sum + D gy. */
template <bool BACKWARD>
__device__ __forceinline__ void store_rows(const ssd_args<bf16> &a, const ssd_chunk &k,
                                           const rows_place &w, const bf16 *head, const float *del,
                                           const float (&sum)[P_NT][4], int h)
{
    const float skip = to_float(a.d_skip[h]), del0 = BACKWARD ? del[w.r0] : 1.0f,
                del1 = BACKWARD ? del[w.r0 + 8] : 1.0f;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = w.r0 + 8 * half, swap = again(8 * w.g);
        const float factor = half ? del1 : del0;
        unsigned v[P_NT];
#pragma unroll
        for (int i = 0; i < P_NT; i++) {
            const unsigned x = *(const unsigned *)&head[row * P + (8 * i ^ swap) + 2 * w.t];
            v[i] = pack(factor * sum[i][2 * half] + skip * low_half(x),
                        factor * sum[i][2 * half + 1] + skip * high_half(x));
        }
        bf16 *to = BACKWARD ? a.dx(k.first + row, h) : a.y.row(k.first + row) + h * P;
        store_row(to, v[0], v[1], v[2], v[3], row < k.rows);
        store_row(to + 32, v[4], v[5], v[6], v[7], row < k.rows);
    }
}

/* The sums over decays of a chunk and head, which all warps have left in s. */
__device__ __forceinline__ void store_sums(const ssd_args<bf16> &a, const rows_memory<true> &s,
                                           const float *del, int c, int h, int most)
{
    const int r = threadIdx.x;
    if (r < Q) {
        const int64_t at = a.rates_at(c, h) + r;
        float row = 0;
        for (int i = 0; i <= r / TILE; i++)
            row += s.row[i][r];
        a.e[at] = s.e[r];
        a.through[at] = s.through[r];
        a.row[at] = row - del[r] * s.e[r];
    } else if (r == Q) {
        float sums = 0;
        for (int i = 0; i < TILES; i++)
            sums += s.skip[i];
        a.sums[(int64_t)(2 * most + c) * a.heads + h] = sums;
    }
}

/* Forward, rows i, columns j <= i: y_i = sum (C_i.B_j) L_ij del_j x_j + carry_i St C_i + D x_i.
 * Backward, rows j, columns i >= j: dx_j = del_j (sum (C_i.B_j) L_ij gy_i + tail_j Gm B_j) + D
 * gy_j, e, through, D's sum, and W's sums in row. */
template <bool BACKWARD>
static __global__ void __launch_bounds__(ROWS_THREADS, 2) rows_kernel(ssd_args<bf16> a, int most)
{
    extern __shared__ __align__(ALIGNMENT) char memory[];
    rows_memory<BACKWARD> &s = *(rows_memory<BACKWARD> *)memory;
    const int c = blockIdx.x, group = blockIdx.y, per = a.heads / a.groups, warp = warp_index(),
              lane = threadIdx.x % WARP;
    const int tile = tile_of(warp), g = lane / 4, t = lane % 4, r0 = tile * TILE + g;
    if (c >= *a.count)
        return;
    const ssd_chunk k = a.chunks[c];
    const rows_place w = { tile, lane, g, t, r0, BACKWARD ? TILES - tile : tile + 1 };
    copy_rows<N, ROWS_THREADS>(s.own, BACKWARD ? a.b(k.first, group) : a.c(k.first, group),
                               a.xbc.ld, k.rows);
    copy_rows<N, ROWS_THREADS>(s.other, BACKWARD ? a.c(k.first, group) : a.b(k.first, group),
                               a.xbc.ld, k.rows);
    copies_end();
    copies_wait<0>();
    __syncthreads();
    float near[ROWS_KEPT<BACKWARD>][2][4];
    const unsigned own = across<N>(s.own) + 2 * tile * TILE * N;
    multiply_group(s, w, own, near);
    __syncthreads();
    const bf16 *states = stored(BACKWARD ? a.adjoint : a.entering);
    int h = group * per;
    const int end = h + per;
    copy_state<ROWS_THREADS>(s.state, states + a.state_at(c, h));
    copies_end();
    copy_head<BACKWARD>(s, a, k, c, h);
    copies_end();
    for (; h < end; h++) {
        float sum[P_NT][4] = {};
        const bf16 *head = s.values_of(h);
        copies_wait<BACKWARD ? 1 : 0>();
        __syncthreads();
        if (!BACKWARD) {
            if (h + 1 < end)
                copy_head<BACKWARD>(s, a, k, c, h + 1);
            copies_end();
        }
        {
            const unsigned state = again(down<N>(s.state)), own_again = again(own);
#pragma unroll
            for (int n = 0; n < N; n += 16) {
                unsigned f[4];
                load_matrices(f, own_again ^ 2 * n);
                multiply_column<P_NT / 2, N>(sum, f, state ^ 2 * n);
            }
        }
        __syncthreads();
        if (h + 1 < end)
            copy_state<ROWS_THREADS>(s.state, states + a.state_at(c, h + 1));
        copies_end();
        if (BACKWARD) {
            copies_wait<1>();
            __syncthreads();
        }
        const float *cs = s.cs[h % 2], *del = s.del[h % 2];
        float column0 = 0, column1 = 0, diagonal = 0;
        scale_rows(sum, s, w, cs, column0, column1);
        const unsigned values = across<P>(head), values_down = down<P>(head),
                       x = across<P>(s.own_x()) + 2 * tile * TILE * P;
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            if (i >= w.blocks)
                break;
            const int column = column_of<BACKWARD>(w, i);
            const unsigned left = again(x), right = again(values_down) + 2 * column * P;
            float gx[2][4] = {}, rows[4];
            unsigned m[4];
            if constexpr (BACKWARD) {
#pragma unroll
                for (int p = 0; p < P; p += 16) {
                    unsigned f[4];
                    load_matrices(f, left ^ 2 * p);
                    multiply_column<1, P>(gx, f, right ^ 2 * p);
                }
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float v[4];
                weigh(v, s, w, cs, del, near, i, j);
                m[2 * j] = pack(v[0], v[1]);
                m[2 * j + 1] = pack(v[2], v[3]);
                if constexpr (BACKWARD) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const float w0 = v[e] * gx[j][e], w1 = v[e + 2] * gx[j][e + 2];
                        column0 += w0;
                        column1 += w1;
                        rows[2 * j + e] = w0 * del[r0] + w1 * del[r0 + 8];
                    }
                }
            }
            multiply_row<P_NT / 2>(sum, m, again(values) + 2 * column * P);
            if constexpr (BACKWARD) {
                if (i == 0) /* columns of a lane's rows g and g+8: 8j + 2t + e */
                    diagonal = g / 2 != t ? 0.0f
                               : g % 2    ? gx[0][1] + gx[1][3]
                                          : gx[0][0] + gx[1][2];
                store_column_sums(rows, &s.row[tile][column]);
            }
        }
        store_rows<BACKWARD>(a, k, w, head, del, sum, h);
        if constexpr (BACKWARD) {
            column0 = row_lanes(column0);
            column1 = row_lanes(column1);
            diagonal = warp_sum(diagonal);
            if (t == 0) {
                s.e[r0] = column0;
                s.e[r0 + 8] = column1;
            }
            if (lane == 0)
                s.skip[tile] = diagonal;
            __syncthreads();
            if (h + 1 < end)
                copy_head<BACKWARD>(s, a, k, c, h + 1);
            copies_end();
            store_sums(a, s, del, c, h, most);
        }
    }
}

/* ---- dB and dC of a group ---- */

enum {
    BC_THREADS = 512,
    BC_WARPS = BC_THREADS / WARP,
    HALF_N = N / 2,
    HALF_NT = HALF_N / 8,
    SQUARES = TILES * (TILES + 1) / 2,
    SHARE = (SQUARES + BC_WARPS - 1) / BC_WARPS
};

struct bc_stage {
    bf16 x[Q * P], gy[Q * P], entering[P * N], adjoint[P * N];
    float cs[Q], del[Q], carry[Q], push[Q];
};

struct bc_shared {
    bf16 b[Q * N], c[Q * N];
    union {
        bc_stage stage[2];
        bf16 mix[Q * N];
    };
    float carried[2][2][Q], keep[2][BC_WARPS]; /* by parity of the head */
};

__device__ __forceinline__ void copy_stage(bc_stage &s, const ssd_args<bf16> &a, const ssd_chunk &k,
                                           int c, int h)
{
    copy_rows<P, BC_THREADS>(s.x, a.x(k.first, h), a.xbc.ld, k.rows);
    copy_rows<P, BC_THREADS>(s.gy, a.gy(k.first, h), a.dy.ld, k.rows);
    copy_state<BC_THREADS>(s.entering, stored(a.entering) + a.state_at(c, h));
    copy_state<BC_THREADS>(s.adjoint, stored(a.adjoint) + a.state_at(c, h));
    const int64_t at = a.rates_at(c, h);
    copy_rates(s.cs, a.cs + at, 0);
    copy_rates(s.del, a.del + at, WARP);
    copy_rates(s.carry, a.carry + at, 2 * WARP);
    copy_rates(s.push, a.push + at, 3 * WARP);
}

/* sum += (scale of its row * left) right: left [rows][P] from the tile's first row, right [P][N]
 * from the half's first column. */
__device__ __forceinline__ void add_scaled(float (&sum)[HALF_NT][4], unsigned left, float scale0,
                                           float scale1, unsigned right)
{
#pragma unroll
    for (int p = 0; p < P; p += 16) {
        unsigned f[4];
        load_matrices(f, left ^ 2 * p);
        f[0] = scaled(f[0], scale0, scale0);
        f[1] = scaled(f[1], scale1, scale1);
        f[2] = scaled(f[2], scale0, scale0);
        f[3] = scaled(f[3], scale1, scale1);
        multiply_row<HALF_NT / 2>(sum, f, right + 2 * p * N);
    }
}

__device__ __forceinline__ float states_dot(const bc_stage &s)
{
    float sum = 0;
    const int first = threadIdx.x * 8;
#pragma unroll
    for (int r = 0; r < P; r += BC_THREADS / (N / 8)) {
        const int at = first + r * N; /* in whatever order: both lie alike */
        const uint4 u = *(const uint4 *)(s.entering + at), v = *(const uint4 *)(s.adjoint + at);
        sum += pair_dot(u.x, low_half(v.x), high_half(v.x)) +
               pair_dot(u.y, low_half(v.y), high_half(v.y)) +
               pair_dot(u.z, low_half(v.z), high_half(v.z)) +
               pair_dot(u.w, low_half(v.w), high_half(v.w));
    }
    return warp_sum(sum);
}

__device__ __forceinline__ void store_half(const float (&sum)[HALF_NT][4], bf16 *to, int64_t ld,
                                           int row, int rows)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        unsigned w[HALF_NT];
#pragma unroll
        for (int i = 0; i < HALF_NT; i++)
            w[i] = pack(sum[i][2 * half], sum[i][2 * half + 1]);
        bf16 *at = to + (row + 8 * half) * ld;
        store_row(at, w[0], w[1], w[2], w[3], row + 8 * half < rows);
        store_row(at + 32, w[4], w[5], w[6], w[7], row + 8 * half < rows);
    }
}

/* A tile of the lower triangle: its first row and column. */
struct square {
    int row, column;
};

/* The k-th, rows from above, k < 36. */
__device__ __forceinline__ square square_of(int k)
{
    int r = 0;
#pragma unroll
    for (int i = 1; i < TILES; i++)
        r += k >= i * (i + 1) / 2;
    return square{ r * TILE, (k - r * (r + 1) / 2) * TILE };
}

/* A warp's squares of R. */
__device__ __forceinline__ void store_squares(const float (&mix)[SHARE][2][4], int warp, bf16 *to)
{
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        if (warp + i * BC_WARPS >= SQUARES)
            break;
        const square q = square_of(warp + i * BC_WARPS);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            bf16 *at = to + place<N>(q.row + g, q.column + 8 * j) + 2 * t;
            *(unsigned *)at = pack(mix[i][j][0], mix[i][j][1]);
            *(unsigned *)(at + 8 * N) = pack(mix[i][j][2], mix[i][j][3]);
        }
    }
}

/* A head's end, a barrier later: a thread of the first Q has a row, the next one the chunk. */
struct head_end {
    float row, keep, before; /* row's sum so far; keep; the last head's C . dC */
    __device__ __forceinline__ void begin(const bc_stage &in, const ssd_args<bf16> &a, int c, int h)
    {
        if (threadIdx.x < Q)
            row = a.row[a.rates_at(c, h) + threadIdx.x];
        keep = in.carry[Q - 1];
    }
    /* What the head's sums have added to row's carried part, and keep <Gm, St>. */
    __device__ __forceinline__ void finish(const bc_shared &s, const ssd_args<bf16> &a, int c,
                                           int h)
    {
        const int r = threadIdx.x, parity = h % 2;
        if (r < Q) {
            const float now = s.carried[parity][0][r] + s.carried[parity][1][r];
            a.row[a.rates_at(c, h) + r] = row + (now - before);
            before = now;
        } else if (r == Q) {
            float sum = 0;
            for (int i = 0; i < BC_WARPS; i++)
                sum += s.keep[parity][i];
            a.keep_dot[c * a.heads + h] = keep * sum;
        }
    }
};

/* dB_j = sum_i R_ij C_i + sum over heads of push_j Gm^T x_j, dC_i = sum_j R_ij B_j + sum over heads
 * of carry_i St^T gy_i, R_ij = sum over heads of L_ij del_j (gy_i.x_j). A pair of warps has sixteen
 * rows of dB and dC, each half the columns; the squares of R's triangle are dealt out to all warps.
 * A head's carry_i gy_i St C_i is what C_i . (dC_i so far) grows by. */
static __global__ void __launch_bounds__(BC_THREADS, 1) bc_kernel(ssd_args<bf16> a)
{
    extern __shared__ __align__(ALIGNMENT) char memory[];
    bc_shared &s = *(bc_shared *)memory;
    const int c = blockIdx.x, group = blockIdx.y, per = a.heads / a.groups, warp = warp_index(),
              lane = threadIdx.x % WARP;
    const int tile = tile_of(warp % TILES), half = warp / TILES, g = lane / 4, t = lane % 4,
              r0 = tile * TILE + g, n0 = half * HALF_N;
    if (c >= *a.count)
        return;
    const ssd_chunk k = a.chunks[c];
    float mix[SHARE][2][4] = {}, db[HALF_NT][4] = {}, dc[HALF_NT][4] = {};
    head_end last = {};
    const int start = group * per, end = start + per;
    copy_rows<N, BC_THREADS>(s.b, a.b(k.first, group), a.xbc.ld, k.rows);
    copy_rows<N, BC_THREADS>(s.c, a.c(k.first, group), a.xbc.ld, k.rows);
    copy_stage(s.stage[0], a, k, c, start);
    copies_end();
    for (int h = start; h < end; h++) {
        const bc_stage &in = s.stage[(h - start) % 2];
        copies_wait<0>();
        __syncthreads();
        if (h + 1 < end)
            copy_stage(s.stage[(h + 1 - start) % 2], a, k, c, h + 1);
        copies_end();
        if (h > start)
            last.finish(s, a, c, h - 1);
        last.begin(in, a, c, h);
        const unsigned x = across<P>(in.x) + 2 * tile * TILE * P,
                       gy = across<P>(in.gy) + 2 * tile * TILE * P;
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            if (warp + i * BC_WARPS >= SQUARES)
                break;
            const square q = square_of(warp + i * BC_WARPS);
            const unsigned right = again(down<P>(in.x)) + 2 * q.column * P,
                           left = again(across<P>(in.gy)) + 2 * q.row * P;
            const float cs0 = in.cs[q.row + g], cs1 = in.cs[q.row + g + 8];
            float gx[2][4] = {};
#pragma unroll
            for (int p = 0; p < P; p += 16) {
                unsigned f[4];
                load_matrices(f, left ^ 2 * p);
                multiply_column<1, P>(gx, f, right ^ 2 * p);
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int at = q.column + 8 * j + 2 * t;
                const float2 there = *(const float2 *)(in.cs + at),
                             del = *(const float2 *)(in.del + at);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float l = fast_exp2((e / 2 ? cs1 : cs0) - (e % 2 ? there.y : there.x));
                    gx[j][e] *= l * (e % 2 ? del.y : del.x);
                }
            }
            if (q.row == q.column)
#pragma unroll
                for (int j = 0; j < 2; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        gx[j][e] = 8 * j + 2 * t + e % 2 > g + 8 * (e / 2) ? 0.0f : gx[j][e];
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    mix[i][j][e] += gx[j][e];
        }
        add_scaled(dc, again(gy), in.carry[r0], in.carry[r0 + 8],
                   again(across<N>(in.entering)) ^ 2 * n0);
        float dot0 = 0, dot1 = 0;
        const int swap = again(8 * g); /* place() of a lane's rows */
#pragma unroll
        for (int i = 0; i < HALF_NT; i++) {
            dot0 += pair_dot(*(const unsigned *)&s.c[r0 * N + n0 + (8 * i ^ swap) + 2 * t],
                             dc[i][0], dc[i][1]);
            dot1 += pair_dot(*(const unsigned *)&s.c[(r0 + 8) * N + n0 + (8 * i ^ swap) + 2 * t],
                             dc[i][2], dc[i][3]);
        }
        dot0 = row_lanes(dot0);
        dot1 = row_lanes(dot1);
        if (t == 0) {
            s.carried[h % 2][half][r0] = dot0;
            s.carried[h % 2][half][r0 + 8] = dot1;
        }
        add_scaled(db, again(x), in.push[r0], in.push[r0 + 8],
                   again(across<N>(in.adjoint)) ^ 2 * n0);
        const float dot = states_dot(in);
        if (lane == 0)
            s.keep[h % 2][warp] = dot;
    }
    __syncthreads();
    last.finish(s, a, c, end - 1);
    store_squares(mix, warp, s.mix);
    __syncthreads();
    const unsigned left = across<N>(s.mix) + 2 * tile * TILE * N,
                   above = down<N>(s.mix) ^ 2 * tile * TILE;
    const unsigned b = across<N>(s.b) ^ 2 * n0, other = across<N>(s.c) ^ 2 * n0;
#pragma unroll 1
    for (int i = 0; i <= tile; i++) {
        unsigned f[4];
        load_matrices(f, left ^ 2 * i * TILE);
        multiply_row<HALF_NT / 2>(dc, f, b + 2 * i * TILE * N);
    }
#pragma unroll 1
    for (int i = tile; i < TILES; i++) {
        unsigned f[4];
        load_matrices_transposed(f, above + 2 * i * TILE * N);
        multiply_row<HALF_NT / 2>(db, f, other + 2 * i * TILE * N);
    }
    store_half(dc, a.dc(k.first, group) + n0, a.dxbc.ld, r0, k.rows);
    store_half(db, a.db(k.first, group) + n0, a.dxbc.ld, r0, k.rows);
}

/* ---- host ---- */

template <class K> static void allow(K kernel, size_t shared)
{
    CHECK_CUDA(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
}

void ssd_mma_states(const ssd_args<bf16> &a, bool adjoint, cudaStream_t stream)
{
    const size_t shared = WALK_STAGES * sizeof(walk_stage);
    allow(walk_kernel, shared);
    walk_kernel<<<dim3((unsigned)a.heads, N / WALK_COLS, adjoint ? 2 : 1), WALK_THREADS, shared,
                  stream>>>(a);
    CHECK_LAUNCH();
}

void ssd_mma_output(const ssd_args<bf16> &a, int most, cudaStream_t stream)
{
    const size_t shared = sizeof(rows_memory<false>);
    allow(rows_kernel<false>, shared);
    rows_kernel<false>
        <<<dim3((unsigned)most, (unsigned)a.groups), ROWS_THREADS, shared, stream>>>(a, most);
    CHECK_LAUNCH();
}

void ssd_mma_backward(const ssd_args<bf16> &a, int most, cudaStream_t stream)
{
    const dim3 grid((unsigned)most, (unsigned)a.groups);
    allow(rows_kernel<true>, sizeof(rows_memory<true>));
    rows_kernel<true><<<grid, ROWS_THREADS, sizeof(rows_memory<true>), stream>>>(a, most);
    CHECK_LAUNCH();
    allow(bc_kernel, sizeof(bc_shared));
    bc_kernel<<<grid, BC_THREADS, sizeof(bc_shared), stream>>>(a);
    CHECK_LAUNCH();
}
