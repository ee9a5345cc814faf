/* ssd_mma.cu - the scan's matrix products on tensor cores: bf16, P = 64, N = 128, chunks of 128 rows (model.md 1.6.5).
 *
 * A block of sixteen warps, four by four over a product of 128 rows, has one chunk and head (or group) in shared memory. Products are mma.m16n8k16 with fp32 sums; what
 * enters a second product is rounded to bf16 first, as the model's reference does: (C.B) L del, tail del x, carry gy, states.
 * Rows beyond a short chunk's end are zeros.
 */
#include "ssd.h"

enum { Q = 128, P = 64, N = 128, WARPS = 16, ACROSS = WARPS / 4, THREADS = WARPS * WARP, PAD = 8, LD_N = N + PAD, LD_P = P + PAD, LD_Q = Q + PAD };

/* ---- tiles ---- */

__device__ __forceinline__ void load_matrices(unsigned (&r)[4], const bf16 *p)
{
    const unsigned at = (unsigned)__cvta_generic_to_shared(p);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}

__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], const bf16 *p)
{
    const unsigned at = (unsigned)__cvta_generic_to_shared(p);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
}

__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* A warp's part of a product: 32 rows from m0, 8*NT columns from n0. Element (mi, ni, e) is row m0 + 16 mi + lane/4 + 8 (e/2),
 * column n0 + 8 ni + 2 (lane%4) + e%2. */
template <int NT> struct part {
    float v[2][NT][4];
    int m0, n0;
    __device__ __forceinline__ part(int m0_, int n0_) : v(), m0(m0_), n0(n0_) {}
    __device__ __forceinline__ int row(int mi, int e) const { return m0 + 16 * mi + (threadIdx.x % WARP) / 4 + 8 * (e / 2); }
    __device__ __forceinline__ int col(int ni, int e) const { return n0 + 8 * ni + 2 * (threadIdx.x % 4) + e % 2; }
    template <class F> __device__ __forceinline__ void each(F f)
    {
#pragma unroll
        for (int mi = 0; mi < 2; mi++)
#pragma unroll
            for (int ni = 0; ni < NT; ni++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    f(v[mi][ni][e], row(mi, e), col(ni, e), mi, e);
    }
    /* += a b over K. a lies [m][k], or [k][m] with TA; b lies [k][n], or [n][k] with TB. */
    template <int K, bool TA, bool TB> __device__ __forceinline__ void add(const bf16 *a, int lda, const bf16 *b, int ldb)
    {
        const int lane = threadIdx.x % WARP, q = lane / 8, r = lane % 8;
#pragma unroll
        for (int k = 0; k < K; k += 16) {
            unsigned fa[2][4];
#pragma unroll
            for (int mi = 0; mi < 2; mi++) {
                const int m = m0 + 16 * mi;
                if (TA)
                    load_matrices_transposed(fa[mi], a + (k + q / 2 * 8 + r) * lda + m + q % 2 * 8);
                else
                    load_matrices(fa[mi], a + (m + q % 2 * 8 + r) * lda + k + q / 2 * 8);
            }
#pragma unroll
            for (int ni = 0; ni < NT; ni += 2) {
                unsigned fb[4];
                const int n = n0 + 8 * ni;
                if (TB)
                    load_matrices(fb, b + (n + q / 2 * 8 + r) * ldb + k + q % 2 * 8);
                else
                    load_matrices_transposed(fb, b + (k + q % 2 * 8 + r) * ldb + n + q / 2 * 8);
#pragma unroll
                for (int mi = 0; mi < 2; mi++) {
                    multiply(v[mi][ni], fa[mi], fb[0], fb[1]);
                    multiply(v[mi][ni + 1], fa[mi], fb[2], fb[3]);
                }
            }
        }
    }
};

/* Rows of COLS elements from memory to shared memory, zero beyond `rows`; scale NULL or a factor per row, rounded once. */
template <int COLS> __device__ __forceinline__ void load_rows(bf16 *to, int ld, const bf16 *from, int64_t from_ld, int rows, const float *scale)
{
    for (int i = threadIdx.x; i < Q * (COLS / 8); i += THREADS) {
        const int r = i / (COLS / 8), c = i % (COLS / 8) * 8;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (r < rows)
            v = *(const uint4 *)(from + r * from_ld + c);
        if (scale) {
            bf16 *e = (bf16 *)&v;
            for (int j = 0; j < 8; j++)
                e[j] = __float2bfloat16_rn(__bfloat162float(e[j]) * scale[r]);
        }
        *(uint4 *)(to + r * ld + c) = v;
    }
}

/* A state [P,N] in fp32, rounded. */
__device__ __forceinline__ void load_state(bf16 *to, const float *from)
{
    for (int i = threadIdx.x; i < P * N / 4; i += THREADS) {
        const float4 v = ((const float4 *)from)[i];
        bf16 *at = to + i * 4 / N * LD_N + i * 4 % N;
        *(__nv_bfloat162 *)at = __floats2bfloat162_rn(v.x, v.y);
        *(__nv_bfloat162 *)(at + 2) = __floats2bfloat162_rn(v.z, v.w);
    }
}

struct rates {
    float cs[Q], del[Q];
};

/* cs stays at its last value beyond the end, del is 0 there. */
__device__ __forceinline__ void load_rates(rates &to, const ssd_args<bf16> &a, const ssd_chunk &k, int h)
{
    for (int r = threadIdx.x; r < Q; r += THREADS) {
        const int64_t at = (int64_t)(k.first + (r < k.rows ? r : k.rows - 1)) * a.heads + h;
        to.cs[r] = a.cs[at];
        to.del[r] = r < k.rows ? a.del[at] : 0.0f;
    }
}

__device__ __forceinline__ float decay(const rates &t, int i, int j)
{
    return i >= j ? __expf(t.cs[i] - t.cs[j]) : 0.0f;
}

/* ---- states ---- */

struct states_shared {
    bf16 left[Q * LD_P], right[Q * LD_N];
    rates t;
    float scale[Q];
};

static __global__ void __launch_bounds__(THREADS) states_kernel(ssd_args<bf16> a, bool adjoint)
{
    extern __shared__ __align__(16) char memory[];
    states_shared &s = *(states_shared *)memory;
    const int c = blockIdx.x, h = blockIdx.y, g = a.group_of(h), warp = threadIdx.x / WARP;
    if (c >= *a.count)
        return;
    const ssd_chunk k = a.chunks[c];
    load_rates(s.t, a, k, h);
    __syncthreads();
    for (int r = threadIdx.x; r < Q; r += THREADS)
        s.scale[r] = adjoint ? __expf(s.t.cs[r]) : __expf(s.t.cs[Q - 1] - s.t.cs[r]) * s.t.del[r];
    __syncthreads();
    if (adjoint) {
        load_rows<P>(s.left, LD_P, a.gy(k.first, h), a.dy.ld, k.rows, s.scale);
        load_rows<N>(s.right, LD_N, a.c(k.first, g), a.xbc.ld, k.rows, NULL);
    } else {
        load_rows<P>(s.left, LD_P, a.x(k.first, h), a.xbc.ld, k.rows, s.scale);
        load_rows<N>(s.right, LD_N, a.b(k.first, g), a.xbc.ld, k.rows, NULL);
    }
    __syncthreads();
    part<2> sum(warp % 2 * 32, warp / 2 * 16);
    sum.add<Q, true, false>(s.left, LD_P, s.right, LD_N);
    float *to = (adjoint ? a.adjoint : a.entering) + a.state_at(c, h);
    sum.each([&](float v, int p, int n, int, int) { to[p * N + n] = v; });
}

/* ---- output ---- */

struct output_shared {
    bf16 c[Q * LD_N], b[Q * LD_N], x[Q * LD_P], state[P * LD_N];   /* b becomes the mixing matrix [Q][LD_Q] */
    rates t;
};

static __global__ void __launch_bounds__(THREADS) output_kernel(ssd_args<bf16> a, matrix<bf16> y)
{
    extern __shared__ __align__(16) char memory[];
    output_shared &s = *(output_shared *)memory;
    const int c = blockIdx.x, h = blockIdx.y, g = a.group_of(h), m0 = threadIdx.x / WARP % 4 * 32, across = threadIdx.x / WARP / 4;
    if (c >= *a.count)
        return;
    const ssd_chunk k = a.chunks[c];
    load_rates(s.t, a, k, h);
    load_rows<N>(s.c, LD_N, a.c(k.first, g), a.xbc.ld, k.rows, NULL);
    load_rows<N>(s.b, LD_N, a.b(k.first, g), a.xbc.ld, k.rows, NULL);
    load_rows<P>(s.x, LD_P, a.x(k.first, h), a.xbc.ld, k.rows, NULL);
    if (!k.opens)
        load_state(s.state, a.entering + a.state_at(c, h));
    __syncthreads();
    part<2> sum(m0, across * 16);
    if (!k.opens) {
        sum.add<N, false, true>(s.c, LD_N, s.state, LD_N);
        sum.each([&](float &v, int i, int, int, int) { v *= __expf(s.t.cs[i]); });
    }
    {
        part<4> cb(m0, across * 32);
        cb.add<N, false, true>(s.c, LD_N, s.b, LD_N);
        __syncthreads();
        cb.each([&](float v, int i, int j, int, int) { s.b[i * LD_Q + j] = __float2bfloat16_rn(v * decay(s.t, i, j) * s.t.del[j]); });
    }
    __syncthreads();
    sum.add<Q, false, false>(s.b, LD_Q, s.x, LD_P);
    const float skip = to_float(a.d_skip[h]);
    sum.each([&](float v, int i, int p, int, int) {
        if (i < k.rows)
            y.row(k.first + i)[h * P + p] = __float2bfloat16_rn(v + skip * __bfloat162float(s.x[i * LD_P + p]));
    });
}

/* ---- backward: dx and the sums over decays ---- */

struct x_shared {
    bf16 c[Q * LD_N], b[Q * LD_N], x[Q * LD_P], gy[Q * LD_P], state[P * LD_N];   /* c becomes the mixing matrix */
    rates t;
    float column[4][Q], row[ACROSS][Q], carried[ACROSS][Q], through[ACROSS][Q];   /* per row or column of warps, added up in order */
    float skip[4];
};

/* Adds the four lanes that share a row. */
__device__ __forceinline__ float row_lanes(float x)
{
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ float total(const float (&part)[4][Q], int i)
{
    return part[0][i] + part[1][i] + part[2][i] + part[3][i];
}

/* sum over a part's columns of v * other[i][p], to out[row]. */
__device__ __forceinline__ void row_dots(part<2> &z, const bf16 *other, float *out)
{
    float sum[2][2] = {};
    z.each([&](float v, int i, int p, int mi, int e) { sum[mi][e / 2] += v * __bfloat162float(other[i * LD_P + p]); });
#pragma unroll
    for (int mi = 0; mi < 2; mi++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const float total = row_lanes(sum[mi][e]);
            if (threadIdx.x % 4 == 0)
                out[z.row(mi, 2 * e)] = total;
        }
}

static __global__ void __launch_bounds__(THREADS) backward_x_kernel(ssd_args<bf16> a, int most)
{
    extern __shared__ __align__(16) char memory[];
    x_shared &s = *(x_shared *)memory;
    const int c = blockIdx.x, h = blockIdx.y, g = a.group_of(h), warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int quarter = warp % 4, m0 = quarter * 32, across = warp / 4;
    if (c >= *a.count)
        return;
    const ssd_chunk k = a.chunks[c];
    load_rates(s.t, a, k, h);
    load_rows<N>(s.c, LD_N, a.c(k.first, g), a.xbc.ld, k.rows, NULL);
    load_rows<N>(s.b, LD_N, a.b(k.first, g), a.xbc.ld, k.rows, NULL);
    load_rows<P>(s.x, LD_P, a.x(k.first, h), a.xbc.ld, k.rows, NULL);
    load_rows<P>(s.gy, LD_P, a.gy(k.first, h), a.dy.ld, k.rows, NULL);
    load_state(s.state, a.entering + a.state_at(c, h));
    __syncthreads();
    {
        part<2> z(m0, across * 16);   /* St C_i */
        z.add<N, false, true>(s.c, LD_N, s.state, LD_N);
        row_dots(z, s.gy, s.carried[across]);
    }
    __syncthreads();
    load_state(s.state, a.adjoint + a.state_at(c, h));
    __syncthreads();
    part<2> dx(m0, across * 16);      /* Gm B_j */
    dx.add<N, false, true>(s.b, LD_N, s.state, LD_N);
    row_dots(dx, s.x, s.through[across]);
    dx.each([&](float &v, int j, int, int, int) { v *= __expf(s.t.cs[Q - 1] - s.t.cs[j]) * s.t.del[j]; });
    {
        part<4> cb(m0, across * 32), gx(m0, across * 32);
        cb.add<N, false, true>(s.c, LD_N, s.b, LD_N);
        gx.add<P, false, true>(s.gy, LD_P, s.x, LD_P);
        __syncthreads();
        float rows[2][2] = {}, columns[4][2] = {}, diagonal = 0;
#pragma unroll
        for (int mi = 0; mi < 2; mi++)
#pragma unroll
            for (int ni = 0; ni < 4; ni++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int i = cb.row(mi, e), j = cb.col(ni, e);
                    const float m = cb.v[mi][ni][e] * decay(s.t, i, j), w = m * gx.v[mi][ni][e];
                    s.c[i * LD_Q + j] = __float2bfloat16_rn(m * s.t.del[j]);
                    rows[mi][e / 2] += w * s.t.del[j];
                    columns[ni][e % 2] += w;
                    diagonal += i == j ? gx.v[mi][ni][e] : 0.0f;
                }
#pragma unroll
        for (int mi = 0; mi < 2; mi++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float total = row_lanes(rows[mi][e]);
                if (lane % 4 == 0)
                    s.row[across][cb.row(mi, 2 * e)] = total;
            }
        /* A column's rows lie in lanes 4 apart and in the four warps of its range. */
#pragma unroll
        for (int ni = 0; ni < 4; ni++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float total = columns[ni][e];
                for (int o = 4; o < WARP; o *= 2)
                    total += __shfl_xor_sync(0xffffffffu, total, o);
                if (lane < 4)
                    s.column[quarter][cb.col(ni, e)] = total;
            }
        diagonal = warp_sum(diagonal);
        if (lane == 0 && quarter == across)
            s.skip[quarter] = diagonal;
    }
    __syncthreads();
    dx.add<Q, true, false>(s.c, LD_Q, s.gy, LD_P);
    const float skip = to_float(a.d_skip[h]);
    dx.each([&](float v, int j, int p, int, int) {
        if (j < k.rows)
            a.dx(k.first + j, h)[p] = __float2bfloat16_rn(v + skip * __bfloat162float(s.gy[j * LD_P + p]));
    });
    for (int j = threadIdx.x; j < k.rows; j += THREADS) {
        const int64_t at = (int64_t)(k.first + j) * a.heads + h;
        const float through = __expf(s.t.cs[Q - 1] - s.t.cs[j]) * total(s.through, j);
        const float e = total(s.column, j) + through;
        a.e[at] = e;
        a.through[at] = through;
        a.row[at] = total(s.row, j) + __expf(s.t.cs[j]) * total(s.carried, j) - s.t.del[j] * e;
    }
    if (threadIdx.x == 0)
        a.sums[(int64_t)(2 * most + c) * a.heads + h] = s.skip[0] + s.skip[1] + s.skip[2] + s.skip[3];
}

/* ---- backward: dB or dC of a group ---- */

struct bc_shared {
    bf16 x[Q * LD_P], gy[Q * LD_P], scaled[Q * LD_P], state[P * LD_N], other[Q * LD_N], mix[Q * LD_Q];
    rates t;
    float scale[Q];
};

/* dB_j = sum_i R_ij C_i + sum over heads of tail_j del_j Gm^T x_j, dC_i = sum_j R_ij B_j + sum over heads of carry_i St^T gy_i,
 * R_ij = sum over heads of L_ij del_j (gy_i.x_j). */
template <bool FOR_C> static __global__ void __launch_bounds__(THREADS, 1) backward_bc_kernel(ssd_args<bf16> a)
{
    extern __shared__ __align__(16) char memory[];
    bc_shared &s = *(bc_shared *)memory;
    const int c = blockIdx.x, g = blockIdx.y, per = a.heads / a.groups, warp = threadIdx.x / WARP, m0 = warp % 4 * 32, n0 = warp / 4 * 32;
    if (c >= *a.count)
        return;
    const ssd_chunk k = a.chunks[c];
    part<4> mix(m0, n0), sum(m0, n0);
    load_rows<N>(s.other, LD_N, FOR_C ? a.b(k.first, g) : a.c(k.first, g), a.xbc.ld, k.rows, NULL);
    for (int h = g * per; h < (g + 1) * per; h++) {
        __syncthreads();
        load_rates(s.t, a, k, h);
        load_rows<P>(s.x, LD_P, a.x(k.first, h), a.xbc.ld, k.rows, NULL);
        load_rows<P>(s.gy, LD_P, a.gy(k.first, h), a.dy.ld, k.rows, NULL);
        load_state(s.state, (FOR_C ? a.entering : a.adjoint) + a.state_at(c, h));
        __syncthreads();
        for (int r = threadIdx.x; r < Q; r += THREADS)
            s.scale[r] = FOR_C ? __expf(s.t.cs[r]) : __expf(s.t.cs[Q - 1] - s.t.cs[r]) * s.t.del[r];
        __syncthreads();
        for (int i = threadIdx.x; i < Q * P; i += THREADS) {
            const int r = i / P, p = i % P;
            s.scaled[r * LD_P + p] = __float2bfloat16_rn(__bfloat162float((FOR_C ? s.gy : s.x)[r * LD_P + p]) * s.scale[r]);
        }
        {
            part<4> gx(m0, n0);
            gx.add<P, false, true>(s.gy, LD_P, s.x, LD_P);
#pragma unroll
            for (int mi = 0; mi < 2; mi++)
#pragma unroll
                for (int ni = 0; ni < 4; ni++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int i = gx.row(mi, e), j = gx.col(ni, e);
                        mix.v[mi][ni][e] += gx.v[mi][ni][e] * decay(s.t, i, j) * s.t.del[j];
                    }
        }
        __syncthreads();
        sum.add<P, false, false>(s.scaled, LD_P, s.state, LD_N);
    }
    mix.each([&](float v, int i, int j, int, int) { s.mix[i * LD_Q + j] = __float2bfloat16_rn(v); });
    __syncthreads();
    sum.add<Q, !FOR_C, false>(s.mix, LD_Q, s.other, LD_N);
    sum.each([&](float v, int r, int n, int, int) {
        if (r < k.rows)
            (FOR_C ? a.dc(k.first + r, g) : a.db(k.first + r, g))[n] = __float2bfloat16_rn(v);
    });
}

/* ---- host ---- */

template <class K> static void allow(K kernel, size_t shared)
{
    CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
}

void ssd_mma_states(const ssd_args<bf16> &a, int most, bool adjoint, cudaStream_t stream)
{
    allow(states_kernel, sizeof(states_shared));
    states_kernel<<<dim3((unsigned)most, (unsigned)a.heads), THREADS, sizeof(states_shared), stream>>>(a, adjoint);
    CHECK_LAUNCH();
}

void ssd_mma_output(const ssd_args<bf16> &a, int most, matrix<bf16> y, cudaStream_t stream)
{
    allow(output_kernel, sizeof(output_shared));
    output_kernel<<<dim3((unsigned)most, (unsigned)a.heads), THREADS, sizeof(output_shared), stream>>>(a, y);
    CHECK_LAUNCH();
}

void ssd_mma_backward(const ssd_args<bf16> &a, int most, cudaStream_t stream)
{
    allow(backward_x_kernel, sizeof(x_shared));
    backward_x_kernel<<<dim3((unsigned)most, (unsigned)a.heads), THREADS, sizeof(x_shared), stream>>>(a, most);
    CHECK_LAUNCH();
    const dim3 groups((unsigned)most, (unsigned)a.groups);
    allow(backward_bc_kernel<false>, sizeof(bc_shared));
    backward_bc_kernel<false><<<groups, THREADS, sizeof(bc_shared), stream>>>(a);
    CHECK_LAUNCH();
    allow(backward_bc_kernel<true>, sizeof(bc_shared));
    backward_bc_kernel<true><<<groups, THREADS, sizeof(bc_shared), stream>>>(a);
    CHECK_LAUNCH();
}
