/* ssd_mma.cu - the scan on tensor cores: bf16, P = 64, N = 128, chunks of 128 rows (model.md 1.6.5).
 *
 *   walk    a block per head and 64 columns of the state goes through all chunks with the state in registers and leaves what
 *           enters each of them; the adjoint goes the other way. Chunks arrive three deep.
 *   rows    a block per chunk and group has C.B of its group in registers for all the group's heads: y, or dx and the sums
 *           over decays.
 *   bc      a block per chunk and group: dB and dC, summed over the heads in registers.
 *
 * A warp has sixteen rows of a chunk, so what enters a second product, (C.B) L del or (C.B) L, never leaves its registers;
 * tiles beyond the diagonal are left out, and warps i and 7-i share a scheduler. What enters a product is rounded to bf16
 * as the model's reference does: also tail del x, carry gy and the states, which are passed on in fp32. Row sums
 * and column sums of W are those of the same fp32 numbers: they all but cancel where decay is strong. Rows beyond a short
 * chunk's end are zeros.
 */
#include "ssd.h"
#include "tiles.cuh"

enum { Q = 128, P = 64, N = 128, PAD = 8, LD_N = N + PAD, LD_P = P + PAD, TILE = 16, TILES = Q / TILE };

/* Rows of COLS elements, zero from row `rows` on. Nothing is read for those, whatever their address. */
template <int COLS, int THREADS> __device__ __forceinline__ void copy_rows(bf16 *to, const bf16 *from, int64_t from_ld, int rows)
{
    enum { PIECES = COLS / 8, STEP = THREADS / PIECES };
    const int row = threadIdx.x / PIECES, c = threadIdx.x % PIECES * 8;
    to += row * (COLS + PAD) + c;
    from += row * from_ld + c;
#pragma unroll
    for (int r = 0; r < Q; r += STEP)
        copy_async(to + r * (COLS + PAD), from + r * from_ld, row + r < rows);
}

/* A state [P,N]. */
template <int THREADS> __device__ __forceinline__ void copy_state(bf16 *to, const bf16 *from)
{
    enum { PIECES = N / 8, STEP = THREADS / PIECES };
    const int row = threadIdx.x / PIECES, c = threadIdx.x % PIECES * 8;
    to += row * LD_N + c;
    from += row * N + c;
#pragma unroll
    for (int r = 0; r < P; r += STEP)
        copy_async(to + r * LD_N, from + r * N, true);
}

/* Q numbers, by the 32 threads from `first` on. */
__device__ __forceinline__ void copy_rates(float *to, const float *from, int first)
{
    const int i = (int)threadIdx.x - first;
    if (i >= 0 && i < Q / 4)
        copy_async(to + 4 * i, from + 4 * i, true);
}

/* This form keeps states in bf16, where the other has them in fp32. */
__device__ __forceinline__ bf16 *stored(float *states) { return (bf16 *)states; }

/* The same in all lanes, and the compiler knows. */
__device__ __forceinline__ int warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x / WARP, 0); }

__device__ __forceinline__ float pair_dot(unsigned pair, float low, float high) { return low_half(pair) * low + high_half(pair) * high; }

/* ---- states ---- */

enum { WALK_COLS = 64, WALK_LD = WALK_COLS + PAD, WALK_THREADS = 256, WALK_STAGES = 3, WALK_NT = WALK_COLS / 2 / 8,
       WALK_PIECES = Q * P / 8 / WALK_THREADS };

struct walk_stage {
    bf16 left[Q * LD_P], right[Q * WALK_LD];
};

/* x and B, or gy and C. */
__device__ __forceinline__ void copy_stage(walk_stage &s, const ssd_args<bf16> &a, int c, int h, int g, int n0, bool adjoint)
{
    const ssd_chunk k = a.chunks[c];
    copy_rows<P, WALK_THREADS>(s.left, adjoint ? a.gy(k.first, h) : a.x(k.first, h), adjoint ? a.dy.ld : a.xbc.ld, k.rows);
    copy_rows<WALK_COLS, WALK_THREADS>(s.right, (adjoint ? a.c(k.first, g) : a.b(k.first, g)) + n0, a.xbc.ld, k.rows);
}

/* What a thread needs of a chunk's rates: the factors of the rows of which copy_rows has it copy a piece, and keep. */
struct walk_rates {
    float row[WALK_PIECES], keep;
    __device__ __forceinline__ void read(const ssd_args<bf16> &a, int c, int h, bool adjoint)
    {
        const float *from = (adjoint ? a.carry : a.push) + a.rates_at(c, h);
#pragma unroll
        for (int i = 0; i < WALK_PIECES; i++)
            row[i] = from[(threadIdx.x + i * WALK_THREADS) / (P / 8)];
        keep = a.carry[a.rates_at(c, h) + Q - 1];
    }
    /* A thread's own pieces of left, before anyone else reads them. */
    __device__ __forceinline__ void scale(bf16 *left) const
    {
#pragma unroll
        for (int i = 0; i < WALK_PIECES; i++) {
            const int piece = threadIdx.x + i * WALK_THREADS;
            uint4 &v = *(uint4 *)(left + piece / (P / 8) * LD_P + piece % (P / 8) * 8);
            const uint4 w = v;
            v = make_uint4(scaled(w.x, row[i], row[i]), scaled(w.y, row[i], row[i]), scaled(w.z, row[i], row[i]), scaled(w.w, row[i], row[i]));
        }
    }
};

/* Warps: four times sixteen rows of the state, twice 32 columns. gridDim.z 2: the adjoint too. */
static __global__ void __launch_bounds__(WALK_THREADS, 2) walk_kernel(ssd_args<bf16> a)
{
    extern __shared__ __align__(16) char memory[];
    walk_stage *stages = (walk_stage *)memory;
    const int h = blockIdx.x, group = a.group_of(h), n0 = blockIdx.y * WALK_COLS, warp = warp_index(), lane = threadIdx.x % WARP, count = *a.count;
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
            copy_stage(stages[step], a, chunk_of(step), h, group, n0, adjoint);
        copies_end();
    }
    for (int step = 0; step < count; step++) {
        const int c = chunk_of(step), ahead = step + WALK_STAGES - 1;
        const bool fresh = adjoint ? a.chunks[c].closes : a.chunks[c].opens;
        walk_stage &s = stages[step % WALK_STAGES];
        const walk_rates rates = next;
        copies_wait<WALK_STAGES - 2>();
        rates.scale(s.left);
        __syncthreads();
        next.read(a, chunk_of(step + 1 < count ? step + 1 : step), h, adjoint);
        if (ahead < count)
            copy_stage(stages[ahead % WALK_STAGES], a, chunk_of(ahead), h, group, n0, adjoint);
        copies_end();
        bf16 *to = stored(adjoint ? a.adjoint : a.entering) + a.state_at(c, h) + (p0 + g) * N + n0 + own;
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
        const unsigned left = down<LD_P>(s.left) + 2 * p0, right = across<WALK_LD>(s.right) + 2 * own;
#pragma unroll
        for (int k = 0; k < Q; k += 16) {
            unsigned f[4];
            load_matrices_transposed(f, left + 2 * k * LD_P);
            multiply_row<WALK_NT / 2>(state, f, right + 2 * k * WALK_LD);
        }
    }
}

/* ---- y, or dx and the sums over decays ---- */

enum { ROWS_THREADS = 256, P_NT = P / 8 };

struct rows_shared {
    bf16 own[Q * LD_N];                                                   /* C; backward B */
    union {
        bf16 other[Q * LD_N];                                             /* B; backward C: until their product is there */
        struct {
            bf16 state[P * LD_N], values[Q * LD_P];                       /* entering and x; adjoint and gy */
        };
    };
    float cs[2][Q], del[2][Q];                                            /* of this head and the next */
};

struct rows_backward_shared {
    bf16 x[Q * LD_P];
    float row[TILES][Q], e[Q], through[Q], skip[TILES];
};

template <bool BACKWARD> struct rows_memory : rows_shared {};
template <> struct rows_memory<true> : rows_shared, rows_backward_shared {};

/* Tiles 0..7 of warps so that each scheduler has two which add up to one row of the triangle. */
__device__ __forceinline__ int tile_of(int warp) { return warp < TILES / 2 ? warp : TILES - 1 - warp % (TILES / 2); }

template <bool BACKWARD> __device__ __forceinline__ void copy_head(rows_memory<BACKWARD> &s, const ssd_args<bf16> &a, const ssd_chunk &k, int c, int h)
{
    copy_rows<P, ROWS_THREADS>(s.values, BACKWARD ? a.gy(k.first, h) : a.x(k.first, h), BACKWARD ? a.dy.ld : a.xbc.ld, k.rows);
    copy_rates(s.cs[h % 2], a.cs + a.rates_at(c, h), 0);
    copy_rates(s.del[h % 2], a.del + a.rates_at(c, h), WARP);
    if constexpr (BACKWARD)
        copy_rows<P, ROWS_THREADS>(s.x, a.x(k.first, h), a.xbc.ld, k.rows);
}

/* The sums over a tile's sixteen rows of q[0..3], columns 2t, 2t+1, 8+2t, 9+2t of the lane, go to out[16]. */
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

/* Forward, rows i, columns j <= i: y_i = sum (C_i.B_j) L_ij del_j x_j + carry_i St C_i + D x_i. Backward, rows j, columns
 * i >= j: dx_j = del_j (sum (C_i.B_j) L_ij gy_i + tail_j Gm B_j) + D gy_j, e, through, D's sum, and W's sums in row. */
template <bool BACKWARD> static __global__ void __launch_bounds__(ROWS_THREADS, 2) rows_kernel(ssd_args<bf16> a, int most)
{
    extern __shared__ __align__(16) char memory[];
    rows_memory<BACKWARD> &s = *(rows_memory<BACKWARD> *)memory;
    const int c = blockIdx.x, group = blockIdx.y, per = a.heads / a.groups, warp = warp_index(), lane = threadIdx.x % WARP;
    const int tile = tile_of(warp), g = lane / 4, t = lane % 4, r0 = tile * TILE + g;
    if (c >= *a.count)
        return;
    const ssd_chunk k = a.chunks[c];
    const auto uses = [&](int block) { return BACKWARD ? block >= tile : block <= tile; };
    copy_rows<N, ROWS_THREADS>(s.own, BACKWARD ? a.b(k.first, group) : a.c(k.first, group), a.xbc.ld, k.rows);
    copy_rows<N, ROWS_THREADS>(s.other, BACKWARD ? a.c(k.first, group) : a.b(k.first, group), a.xbc.ld, k.rows);
    copies_end();
    copies_wait<0>();
    __syncthreads();
    float cb[TILES][2][4] = {};
    const unsigned own = across<LD_N>(s.own) + 2 * tile * TILE * LD_N;
    {
        const unsigned other = down<LD_N>(s.other);
#pragma unroll 1
        for (int n = 0; n < N; n += 16) {
            unsigned f[4];
            load_matrices(f, own + 2 * n);
#pragma unroll
            for (int b = 0; b < TILES; b++)
                if (uses(b))
                    multiply_column<1, LD_N>(cb[b], f, other + 2 * (b * TILE * LD_N + n));
        }
    }
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
        copies_wait<1>();
        __syncthreads();
        {
            const unsigned state = down<LD_N>(s.state);
#pragma unroll
            for (int n = 0; n < N; n += 16) {
                unsigned f[4];
                load_matrices(f, own + 2 * n);
                multiply_column<P_NT / 2, LD_N>(sum, f, state + 2 * n);
            }
        }
        __syncthreads();
        if (h + 1 < end)
            copy_state<ROWS_THREADS>(s.state, states + a.state_at(c, h + 1));
        copies_end();
        copies_wait<1>();
        __syncthreads();
        const float *cs = s.cs[h % 2], *del = s.del[h % 2];
        const float cs0 = cs[r0], cs1 = cs[r0 + 8];
        const float scale0 = fast_exp2(BACKWARD ? cs[Q - 1] - cs0 : cs0), scale1 = fast_exp2(BACKWARD ? cs[Q - 1] - cs1 : cs1);
        float column0 = 0, column1 = 0, diagonal = 0;
#pragma unroll
        for (int i = 0; i < P_NT; i++) {
            sum[i][0] *= scale0;
            sum[i][1] *= scale0;
            sum[i][2] *= scale1;
            sum[i][3] *= scale1;
            if constexpr (BACKWARD) {
                column0 += pair_dot(*(const unsigned *)&s.x[r0 * LD_P + 8 * i + 2 * t], sum[i][0], sum[i][1]);
                column1 += pair_dot(*(const unsigned *)&s.x[(r0 + 8) * LD_P + 8 * i + 2 * t], sum[i][2], sum[i][3]);
            }
        }
        if constexpr (BACKWARD) {
            const float through0 = row_lanes(column0), through1 = row_lanes(column1);
            if (t == 0) {
                s.through[r0] = through0;
                s.through[r0 + 8] = through1;
            }
        }
        const unsigned values = across<LD_P>(s.values);
#pragma unroll
        for (int b = 0; b < TILES; b++) {
            if (!uses(b))
                continue;
            float m[2][4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int at = b * TILE + 8 * i + 2 * t;
                const float2 there = *(const float2 *)(cs + at);
                m[i][0] = fast_exp2(BACKWARD ? there.x - cs0 : cs0 - there.x);
                m[i][1] = fast_exp2(BACKWARD ? there.y - cs0 : cs0 - there.y);
                m[i][2] = fast_exp2(BACKWARD ? there.x - cs1 : cs1 - there.x);
                m[i][3] = fast_exp2(BACKWARD ? there.y - cs1 : cs1 - there.y);
                const float2 factor = BACKWARD ? make_float2(1.0f, 1.0f) : *(const float2 *)(del + at);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    m[i][e] *= cb[b][i][e];
                    if (!BACKWARD)
                        m[i][e] *= e % 2 ? factor.y : factor.x;
                }
            }
            if (b == tile)
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int row = g + 8 * (e / 2), col = 8 * i + 2 * t + e % 2;
                        m[i][e] = (BACKWARD ? col < row : col > row) ? 0.0f : m[i][e];
                    }
            if constexpr (BACKWARD) {
                float gx[2][4] = {};
                const unsigned x = across<LD_P>(s.x) + 2 * tile * TILE * LD_P, gy = down<LD_P>(s.values) + 2 * b * TILE * LD_P;
#pragma unroll
                for (int p = 0; p < P; p += 16) {
                    unsigned f[4];
                    load_matrices(f, x + 2 * p);
                    multiply_column<1, LD_P>(gx, f, gy + 2 * p);
                }
                const float del0 = del[r0], del1 = del[r0 + 8];
                float rows[4];
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const float w0 = m[i][e] * gx[i][e], w1 = m[i][e + 2] * gx[i][e + 2];
                        column0 += w0;
                        column1 += w1;
                        rows[2 * i + e] = w0 * del0 + w1 * del1;
                    }
                if (b == tile)   /* columns of a lane's rows g and g+8: 8i + 2t + e */
                    diagonal = g / 2 != t ? 0.0f : g % 2 ? gx[0][1] + gx[1][3] : gx[0][0] + gx[1][2];
                store_column_sums(rows, &s.row[tile][b * TILE]);
            }
            const unsigned f[4] = { pack(m[0][0], m[0][1]), pack(m[0][2], m[0][3]), pack(m[1][0], m[1][1]), pack(m[1][2], m[1][3]) };
            multiply_row<P_NT / 2>(sum, f, values + 2 * b * TILE * LD_P);
        }
        const float skip = to_float(a.d_skip[h]), del0 = BACKWARD ? del[r0] : 1.0f, del1 = BACKWARD ? del[r0 + 8] : 1.0f;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = r0 + 8 * half;
            const float factor = half ? del1 : del0;
            unsigned w[P_NT];
#pragma unroll
            for (int i = 0; i < P_NT; i++) {
                const unsigned v = *(const unsigned *)&s.values[row * LD_P + 8 * i + 2 * t];
                w[i] = pack(factor * sum[i][2 * half] + skip * low_half(v), factor * sum[i][2 * half + 1] + skip * high_half(v));
            }
            bf16 *to = BACKWARD ? a.dx(k.first + row, h) : a.y.row(k.first + row) + h * P;
            store_row(to, w[0], w[1], w[2], w[3], row < k.rows);
            store_row(to + 32, w[4], w[5], w[6], w[7], row < k.rows);
        }
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
        }
        __syncthreads();
        if (h + 1 < end)
            copy_head<BACKWARD>(s, a, k, c, h + 1);
        copies_end();
        if constexpr (BACKWARD) {
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
    }
}

/* ---- dB and dC of a group ---- */

enum { BC_THREADS = 512, HALF_N = N / 2, HALF_NT = HALF_N / 8, HALF_TILES = TILES / 2 };

struct bc_stage {
    bf16 x[Q * LD_P], gy[Q * LD_P], entering[P * LD_N], adjoint[P * LD_N];
    float cs[Q], del[Q], carry[Q], push[Q];
};

struct bc_shared {
    bf16 b[Q * LD_N], c[Q * LD_N];
    union {
        bc_stage stage[2];
        bf16 mix[Q * LD_N];
    };
    float carried[2][2][Q], keep[2][BC_THREADS / WARP];   /* by parity of the head */
};

__device__ __forceinline__ void copy_stage(bc_stage &s, const ssd_args<bf16> &a, const ssd_chunk &k, int c, int h)
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

/* sum += (scale of its row * left) right: left [rows][P] from the tile's first row, right [P][N] from the half's first column. */
__device__ __forceinline__ void add_scaled(float (&sum)[HALF_NT][4], unsigned left, float scale0, float scale1, unsigned right)
{
#pragma unroll
    for (int p = 0; p < P; p += 16) {
        unsigned f[4];
        load_matrices(f, left + 2 * p);
        f[0] = scaled(f[0], scale0, scale0);
        f[1] = scaled(f[1], scale1, scale1);
        f[2] = scaled(f[2], scale0, scale0);
        f[3] = scaled(f[3], scale1, scale1);
        multiply_row<HALF_NT / 2>(sum, f, right + 2 * p * LD_N);
    }
}

__device__ __forceinline__ float states_dot(const bc_stage &s)
{
    float sum = 0;
    const int first = threadIdx.x / (N / 8) * LD_N + threadIdx.x % (N / 8) * 8;
#pragma unroll
    for (int r = 0; r < P; r += BC_THREADS / (N / 8)) {
        const int at = first + r * LD_N;
        const uint4 u = *(const uint4 *)(s.entering + at), v = *(const uint4 *)(s.adjoint + at);
        sum += pair_dot(u.x, low_half(v.x), high_half(v.x)) + pair_dot(u.y, low_half(v.y), high_half(v.y))
               + pair_dot(u.z, low_half(v.z), high_half(v.z)) + pair_dot(u.w, low_half(v.w), high_half(v.w));
    }
    return warp_sum(sum);
}

__device__ __forceinline__ void store_half(const float (&sum)[HALF_NT][4], bf16 *to, int64_t ld, int row, int rows)
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

/* What the last head's sums have added to row's carried part, and keep <Gm, St>. `before` is the thread's own. */
__device__ __forceinline__ void finish_head(const bc_shared &s, const ssd_args<bf16> &a, int c, int h, float &before)
{
    const int r = threadIdx.x, parity = h % 2;
    if (r < Q) {
        const float now = s.carried[parity][0][r] + s.carried[parity][1][r];
        a.row[a.rates_at(c, h) + r] += now - before;
        before = now;
    } else if (r == Q) {
        float sum = 0;
        for (int i = 0; i < BC_THREADS / WARP; i++)
            sum += s.keep[parity][i];
        a.keep_dot[c * a.heads + h] = a.carry[a.rates_at(c, h) + Q - 1] * sum;
    }
}

/* dB_j = sum_i R_ij C_i + sum over heads of push_j Gm^T x_j, dC_i = sum_j R_ij B_j + sum over heads of carry_i St^T gy_i,
 * R_ij = sum over heads of L_ij del_j (gy_i.x_j). A pair of warps has a tile of rows: each has every other tile of R's
 * columns and half the columns of dB and dC. A head's carry_i gy_i St C_i is what C_i . (dC_i so far) grows by. */
static __global__ void __launch_bounds__(BC_THREADS, 1) bc_kernel(ssd_args<bf16> a)
{
    extern __shared__ __align__(16) char memory[];
    bc_shared &s = *(bc_shared *)memory;
    const int c = blockIdx.x, group = blockIdx.y, per = a.heads / a.groups, warp = warp_index(), lane = threadIdx.x % WARP;
    const int tile = tile_of(warp % TILES), half = warp / TILES, g = lane / 4, t = lane % 4, r0 = tile * TILE + g, n0 = half * HALF_N;
    if (c >= *a.count)
        return;
    const ssd_chunk k = a.chunks[c];
    float mix[HALF_TILES][2][4] = {}, db[HALF_NT][4] = {}, dc[HALF_NT][4] = {}, before = 0;
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
            finish_head(s, a, c, h - 1, before);
        const unsigned x = across<LD_P>(in.x) + 2 * tile * TILE * LD_P, gy = across<LD_P>(in.gy) + 2 * tile * TILE * LD_P;
        const unsigned xs = down<LD_P>(in.x);
        const float cs0 = in.cs[r0], cs1 = in.cs[r0 + 8];
#pragma unroll
        for (int i = 0; i < HALF_TILES; i++) {
            const int b = 2 * i + half;
            if (b > tile)
                continue;
            float gx[2][4] = {};
#pragma unroll
            for (int p = 0; p < P; p += 16) {
                unsigned f[4];
                load_matrices(f, gy + 2 * p);
                multiply_column<1, LD_P>(gx, f, xs + 2 * (b * TILE * LD_P + p));
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int at = b * TILE + 8 * j + 2 * t;
                const float2 there = *(const float2 *)(in.cs + at), del = *(const float2 *)(in.del + at);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float l = fast_exp2((e / 2 ? cs1 : cs0) - (e % 2 ? there.y : there.x));
                    gx[j][e] *= l * (e % 2 ? del.y : del.x);
                }
            }
            if (b == tile)
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
        add_scaled(dc, gy, in.carry[r0], in.carry[r0 + 8], across<LD_N>(in.entering) + 2 * n0);
        float dot0 = 0, dot1 = 0;
#pragma unroll
        for (int i = 0; i < HALF_NT; i++) {
            dot0 += pair_dot(*(const unsigned *)&s.c[r0 * LD_N + n0 + 8 * i + 2 * t], dc[i][0], dc[i][1]);
            dot1 += pair_dot(*(const unsigned *)&s.c[(r0 + 8) * LD_N + n0 + 8 * i + 2 * t], dc[i][2], dc[i][3]);
        }
        dot0 = row_lanes(dot0);
        dot1 = row_lanes(dot1);
        if (t == 0) {
            s.carried[h % 2][half][r0] = dot0;
            s.carried[h % 2][half][r0 + 8] = dot1;
        }
        add_scaled(db, x, in.push[r0], in.push[r0 + 8], across<LD_N>(in.adjoint) + 2 * n0);
        const float dot = states_dot(in);
        if (lane == 0)
            s.keep[h % 2][warp] = dot;
    }
    __syncthreads();
    finish_head(s, a, c, end - 1, before);
#pragma unroll
    for (int i = 0; i < HALF_TILES; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int at = (2 * i + half) * TILE + 8 * j + 2 * t;
            *(unsigned *)&s.mix[r0 * LD_N + at] = pack(mix[i][j][0], mix[i][j][1]);
            *(unsigned *)&s.mix[(r0 + 8) * LD_N + at] = pack(mix[i][j][2], mix[i][j][3]);
        }
    __syncthreads();
    const unsigned left = across<LD_N>(s.mix) + 2 * tile * TILE * LD_N, above = down<LD_N>(s.mix) + 2 * tile * TILE;
    const unsigned b = across<LD_N>(s.b) + 2 * n0, other = across<LD_N>(s.c) + 2 * n0;
#pragma unroll 1
    for (int i = 0; i <= tile; i++) {
        unsigned f[4];
        load_matrices(f, left + 2 * i * TILE);
        multiply_row<HALF_NT / 2>(dc, f, b + 2 * i * TILE * LD_N);
    }
#pragma unroll 1
    for (int i = tile; i < TILES; i++) {
        unsigned f[4];
        load_matrices_transposed(f, above + 2 * i * TILE * LD_N);
        multiply_row<HALF_NT / 2>(db, f, other + 2 * i * TILE * LD_N);
    }
    store_half(dc, a.dc(k.first, group) + n0, a.dxbc.ld, r0, k.rows);
    store_half(db, a.db(k.first, group) + n0, a.dxbc.ld, r0, k.rows);
}

/* ---- host ---- */

template <class K> static void allow(K kernel, size_t shared)
{
    CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
}

void ssd_mma_states(const ssd_args<bf16> &a, bool adjoint, cudaStream_t stream)
{
    const size_t shared = WALK_STAGES * sizeof(walk_stage);
    allow(walk_kernel, shared);
    walk_kernel<<<dim3((unsigned)a.heads, N / WALK_COLS, adjoint ? 2 : 1), WALK_THREADS, shared, stream>>>(a);
    CHECK_LAUNCH();
}

void ssd_mma_output(const ssd_args<bf16> &a, int most, cudaStream_t stream)
{
    const size_t shared = sizeof(rows_memory<false>);
    allow(rows_kernel<false>, shared);
    rows_kernel<false><<<dim3((unsigned)most, (unsigned)a.groups), ROWS_THREADS, shared, stream>>>(a, most);
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
