/* grouped.cu - the experts' products: rows sorted by expert, one weight matrix each.
 *
 * BF16 goes to CUTLASS (grouped_*.cu) when TMA can address it: widths and row strides multiples of
 * 16 bytes, bases aligned. All else (F32, odd widths) takes the plain kernel below, which is there
 * to be right: fp32 products and sums in the order of the inner index. Neither reads the offsets on
 * the host.
 */
#include "grouped.h"
#include "vector.cuh"

enum { TILE = 64, DEPTH = 16, THREADS = 256, PER_THREAD = 4, LINE = 256, CLEAR_BLOCKS = 16 };
enum { WORKSPACE_PER_SM = 1024 }; /* five descriptors of 128 bytes at most */

/* A product in terms of groups: which extent is the experts' rows, where matrices start and how
 * they are stepped through. */
template <class T, class D> struct product {
    const T *a, *b;
    D *c;
    const int32_t *offsets;
    int64_t m, n, k;                 /* of every group; -1: the group's rows */
    int64_t a_m, a_k, b_k, b_n, ldc; /* element strides */
    int64_t a_rows, b_rows, c_rows;  /* stride of one row of the group in a, b, c; 0: not by rows */
    int64_t b_group, c_group;        /* stride of one expert in b, c; 0: not by expert */
    bool add;
};

/* One 64x64 tile of one group. Blocks of y are row tiles of all groups in order where M is the
 * rows, else (z = group) of M. */
template <class T, class D>
static __global__ void __launch_bounds__(THREADS) plain_kernel(product<T, D> p)
{
    __shared__ float as[DEPTH][TILE + 1], bs[DEPTH][TILE + 1];
    int64_t group = blockIdx.z, tile = blockIdx.y;
    if (p.m < 0)
        for (group = 0;; group++) {
            const int64_t tiles = (p.offsets[group + 1] - p.offsets[group] + TILE - 1) / TILE;
            if (tile < tiles)
                break;
            tile -= tiles;
            if (group + 1 == gridDim.z)
                return;
        }
    const int64_t first = p.offsets[group], rows = p.offsets[group + 1] - first;
    const int64_t m = p.m < 0 ? rows : p.m, k = p.k < 0 ? rows : p.k, m0 = tile * TILE,
                  n0 = (int64_t)blockIdx.x * TILE;
    const T *a = p.a + first * p.a_rows, *b = p.b + first * p.b_rows + group * p.b_group;
    D *c = p.c + first * p.c_rows + group * p.c_group;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float sum[PER_THREAD][PER_THREAD] = {};
    for (int64_t k0 = 0; k0 < k; k0 += DEPTH) {
        /* Neighbouring threads read neighbouring elements, whichever way the matrix lies. */
        for (int i = threadIdx.x; i < TILE * DEPTH; i += THREADS) {
            const int am = p.a_k == 1 ? i / DEPTH : i % TILE,
                      ak = p.a_k == 1 ? i % DEPTH : i / TILE;
            const int bn = p.b_k == 1 ? i / DEPTH : i % TILE,
                      bk = p.b_k == 1 ? i % DEPTH : i / TILE;
            as[ak][am] = m0 + am < m && k0 + ak < k
                             ? to_float(a[(m0 + am) * p.a_m + (k0 + ak) * p.a_k])
                             : 0.0f;
            bs[bk][bn] = n0 + bn < p.n && k0 + bk < k
                             ? to_float(b[(k0 + bk) * p.b_k + (n0 + bn) * p.b_n])
                             : 0.0f;
        }
        __syncthreads();
        for (int d = 0; d < DEPTH; d++)
            for (int i = 0; i < PER_THREAD; i++)
                for (int j = 0; j < PER_THREAD; j++)
                    sum[i][j] += as[d][ty + 16 * i] * bs[d][tx + 16 * j];
        __syncthreads();
    }
    for (int i = 0; i < PER_THREAD; i++)
        for (int j = 0; j < PER_THREAD; j++) {
            const int64_t r = m0 + ty + 16 * i, q = n0 + tx + 16 * j;
            if (r < m && q < p.n) {
                D *to = c + r * p.ldc + q;
                *to = from_float<D>(p.add ? to_float(*to) + sum[i][j] : sum[i][j]);
            }
        }
}

static int64_t tiles_of(int64_t n)
{
    return (n + TILE - 1) / TILE;
}

template <class T, class D>
static void plain(struct stream *s, enum backend_grouped mode, in_t a, in_t b, in_t offsets,
                  int64_t max_rows, double beta, out_t c)
{
    in_t w = mode == BACKEND_GROUPED_TN ? c : b;
    const int64_t experts = w->shape[0], out = w->shape[1], in = w->shape[2];
    product<T, D> p = {};
    p.a = (const T *)a->data;
    p.b = (const T *)b->data;
    p.c = (D *)c->data;
    p.offsets = (const int32_t *)offsets->data;
    p.a_rows = a->ld;
    /* every group may end in a part of a tile */
    int64_t row_tiles = tiles_of(max_rows) + experts;
    if (mode == BACKEND_GROUPED_TN) {
        p.m = out, p.n = in, p.k = -1;
        p.a_m = 1, p.a_k = a->ld;
        p.b_k = b->ld, p.b_n = 1, p.b_rows = b->ld;
        p.ldc = in, p.c_group = out * in;
        p.add = beta != 0;
        row_tiles = tiles_of(out);
    } else {
        const bool nt = mode == BACKEND_GROUPED_NT;
        p.m = -1, p.n = nt ? out : in, p.k = nt ? in : out;
        p.a_m = a->ld, p.a_k = 1;
        p.b_k = nt ? 1 : in, p.b_n = nt ? in : 1, p.b_group = out * in;
        p.ldc = c->ld, p.c_rows = c->ld;
    }
    ASSERT(row_tiles <= 65535 && experts <= 65535);
    const dim3 grid((unsigned)tiles_of(p.n), (unsigned)row_tiles, (unsigned)experts);
    plain_kernel<T, D><<<grid, THREADS, 0, cuda_stream_of(s)>>>(p);
    CHECK_LAUNCH();
}

/* ---- CUTLASS ---- */

/* A matrix of a product: element (0, 0) of group e lies at p + offsets[e] step + e expert, rows are
 * ld elements apart. */
struct operand {
    char *p;
    /* step, expert in bytes; 0: the matrix does not go on by rows, by experts */
    int64_t ld, step, expert;
};

struct setup {
    struct grouped g;
    const int32_t *offsets;
    operand a, b, c, d;
    int m, n, k; /* -1: the group's rows */
};

__device__ __forceinline__ char *place(const operand &o, int64_t first, int e)
{
    return o.p + first * o.step + e * o.expert;
}

static __global__ void setup_kernel(setup s)
{
    for (int e = threadIdx.x; e < s.g.groups; e += blockDim.x) {
        const int64_t first = s.offsets[e];
        const int rows = (int)(s.offsets[e + 1] - first);
        s.g.size[e][0] = rows == 0 ? 0 : s.m < 0 ? rows : s.m;
        s.g.size[e][1] = rows == 0 ? 0 : s.n;
        s.g.size[e][2] = rows == 0 ? 0 : s.k < 0 ? rows : s.k;
        s.g.a[e] = place(s.a, first, e);
        s.g.b[e] = place(s.b, first, e);
        s.g.c[e] = place(s.c, first, e);
        s.g.d[e] = place(s.d, first, e);
        s.g.lda[e] = s.a.ld;
        s.g.ldb[e] = s.b.ld;
        s.g.ldc[e] = s.c.ld;
        s.g.ldd[e] = s.d.ld;
    }
}

/* The next `bytes` of the scratch, on a line of its own. */
static void *carve(char **at, size_t bytes)
{
    void *p = *at;
    *at += (bytes + LINE - 1) / LINE * LINE;
    return p;
}

static size_t groups_bytes(const struct stream *s, size_t experts)
{
    return (size_t)cuda_context_of(s)->sm_count * WORKSPACE_PER_SM +
           experts * (sizeof(int[3]) + 8 * sizeof(int64_t)) + 10 * LINE;
}

/* The arrays over groups, at the start of the scratch. */
static struct grouped carve_groups(const struct stream *s, size_t experts)
{
    char *at = (char *)cuda_scratch(s, groups_bytes(s, experts));
    struct grouped g = {};
    g.stream = cuda_stream_of(s);
    g.sm_count = cuda_context_of(s)->sm_count;
    g.groups = (int)experts;
    g.workspace_bytes = (size_t)cuda_context_of(s)->sm_count * WORKSPACE_PER_SM;
    g.workspace = carve(&at, g.workspace_bytes);
    g.size = (int(*)[3])carve(&at, experts * sizeof *g.size);
    g.a = (const void **)carve(&at, experts * sizeof *g.a);
    g.b = (const void **)carve(&at, experts * sizeof *g.b);
    g.c = (const void **)carve(&at, experts * sizeof *g.c);
    g.d = (void **)carve(&at, experts * sizeof *g.d);
    g.lda = (int64_t *)carve(&at, experts * sizeof *g.lda);
    g.ldb = (int64_t *)carve(&at, experts * sizeof *g.ldb);
    g.ldc = (int64_t *)carve(&at, experts * sizeof *g.ldc);
    g.ldd = (int64_t *)carve(&at, experts * sizeof *g.ldd);
    return g;
}

/* The stride of a single row is nobody's: a view may hold anything there. */
static operand by_rows(in_t t)
{
    const int64_t ld = tensor_rows(t) > 1 ? t->ld : tensor_cols(t);
    return operand{ (char *)t->data, ld, ld * (int64_t)dtype_bytes(t->dtype), 0 };
}

static operand by_experts(in_t w)
{
    return operand{ (char *)w->data, w->shape[2], 0,
                    w->shape[1] * w->shape[2] * (int64_t)dtype_bytes(w->dtype) };
}

/* Sizes and addresses of all groups; c has d's shape. */
static struct grouped set_up(struct stream *s, enum backend_grouped mode, in_t a, in_t b,
                             in_t offsets, in_t c, out_t d)
{
    in_t w = mode == BACKEND_GROUPED_TN ? d : b;
    const int out = (int)w->shape[1], in = (int)w->shape[2];
    setup p = {};
    p.g = carve_groups(s, (size_t)w->shape[0]);
    p.offsets = (const int32_t *)offsets->data;
    p.a = by_rows(a);
    if (mode == BACKEND_GROUPED_TN) {
        p.m = out, p.n = in, p.k = -1;
        p.b = by_rows(b), p.c = by_experts(c), p.d = by_experts(d);
    } else {
        p.m = -1, p.n = mode == BACKEND_GROUPED_NT ? out : in,
        p.k = mode == BACKEND_GROUPED_NT ? in : out;
        p.b = by_experts(b), p.c = by_rows(c), p.d = by_rows(d);
    }
    setup_kernel<<<1, 128, 0, cuda_stream_of(s)>>>(p);
    CHECK_LAUNCH();
    return p.g;
}

extern "C" [[noreturn]] void cuda_grouped_refused(const struct grouped *g)
{
    FATAL(EXIT_INTERNAL, "CUTLASS refuses a grouped GEMM of %d groups: %s", g->groups,
          cudaGetErrorString(cudaGetLastError()));
}

/* Matrices of experts without rows, which CUTLASS passes over. */
static __global__ void clear_empty_kernel(const int32_t *offsets, int64_t each, float *w)
{
    if (offsets[blockIdx.y] != offsets[blockIdx.y + 1])
        return;
    for (int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x; i < each;
         i += (int64_t)gridDim.x * THREADS)
        w[blockIdx.y * each + i] = 0.0f;
}

static void by_cutlass(struct stream *s, enum backend_grouped mode, in_t a, in_t b, in_t offsets,
                       double beta, out_t c)
{
    const struct grouped g = set_up(s, mode, a, b, offsets, c, c);
    if (mode == BACKEND_GROUPED_NT)
        cuda_grouped_nt(&g);
    else if (mode == BACKEND_GROUPED_NN)
        cuda_grouped_nn(&g);
    else
        cuda_grouped_tn(&g, (float)beta);
    if (mode == BACKEND_GROUPED_TN && beta == 0) {
        clear_empty_kernel<<<dim3(CLEAR_BLOCKS, (unsigned)c->shape[0]), THREADS, 0,
                             cuda_stream_of(s)>>>((const int32_t *)offsets->data,
                                                  c->shape[1] * c->shape[2], (float *)c->data);
        CHECK_LAUNCH();
    }
}

/* Whether TMA can address all of it. */
static bool addressable(int64_t out, int64_t in, std::initializer_list<in_t> views)
{
    return out % CHUNK == 0 && in % CHUNK == 0 && chunks_aligned(views);
}

extern "C" void cuda_grouped_gemm(struct stream *s, enum backend_grouped mode, in_t a, in_t b,
                                  in_t offsets, int64_t max_rows, double beta, out_t c)
{
    const bool tn = mode == BACKEND_GROUPED_TN;
    in_t w = tn ? c : b, other = tn ? b : c;
    ASSERT(w->ndim == 3 && offsets->dtype == DTYPE_I32 && all_dense({ w, offsets }));
    const int64_t experts = w->shape[0], out = w->shape[1], in = w->shape[2];
    ASSERT(tensor_numel(offsets) == experts + 1 && a->dtype == b->dtype &&
           c->dtype == (tn ? DTYPE_F32 : a->dtype));
    ASSERT(tensor_cols(a) == (mode == BACKEND_GROUPED_NT ? in : out));
    ASSERT(tensor_cols(other) == (mode == BACKEND_GROUPED_NT ? out : in));
    ASSERT(max_rows <= INT32_MAX && out <= INT32_MAX && in <= INT32_MAX);
    ASSERT(beta == 0 || (beta == 1 && tn));
    if (experts == 0 || out == 0 || in == 0)
        return;
    if (max_rows == 0) {
        if (tn && beta == 0)
            CHECK_CUDA(cudaMemsetAsync(c->data, 0, (size_t)tensor_numel(c) * sizeof(float),
                                       cuda_stream_of(s)));
        return;
    }
    if (a->dtype == DTYPE_BF16 && addressable(out, in, { a, b, c }))
        by_cutlass(s, mode, a, b, offsets, beta, c);
    else
        by_type(a, [&](auto zero) {
            using T = decltype(zero);
            if (tn)
                plain<T, float>(s, mode, a, b, offsets, max_rows, beta, c);
            else
                plain<T, T>(s, mode, a, b, offsets, max_rows, 0, c);
        });
}

/* ---- with the activation ---- */

extern "C" void cuda_grouped_act_forward(struct stream *s, in_t a, in_t w, in_t offsets, in_t prob,
                                         out_t h, out_t y)
{
    const int64_t rows = tensor_rows(h), experts = w->shape[0], out = w->shape[1], in = w->shape[2];
    ASSERT(w->ndim == 3 && all_dense({ w, offsets }) && tensor_numel(offsets) == experts + 1 &&
           tensor_numel(prob) == rows);
    ASSERT(a->dtype == w->dtype && h->dtype == a->dtype && y->dtype == a->dtype &&
           prob->dtype == DTYPE_F32);
    ASSERT(tensor_rows(a) == rows && tensor_cols(a) == in && tensor_cols(h) == out &&
           tensor_rows(y) == rows && tensor_cols(y) == out);
    if (a->dtype != DTYPE_BF16 || !addressable(out, in, { a, w, h, y }) || rows == 0 || out == 0 ||
        in == 0) {
        cuda_grouped_gemm(s, BACKEND_GROUPED_NT, a, w, offsets, rows, 0, h);
        cuda_expert_act_forward(s, h, prob, y);
        return;
    }
    const struct grouped g = set_up(s, BACKEND_GROUPED_NT, a, w, offsets, y, y);
    const struct grouped_act act = { (const int32_t *)offsets->data, (const float *)prob->data,
                                     h->data, h->ld, NULL };
    cuda_grouped_nt_act(&g, &act);
}

/* dprob[r] = the parts of row r in the order of the tiles. */
static __global__ void sum_parts_kernel(const float *partial, int tiles, int64_t rows, float *dprob)
{
    const int64_t r = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
    float sum = 0.0f;
    if (r >= rows)
        return;
    for (int t = 0; t < tiles; t++)
        sum += partial[r * tiles + t];
    dprob[r] = sum;
}

extern "C" void cuda_grouped_act_backward(struct stream *s, in_t a, in_t w, in_t offsets, in_t h,
                                          in_t prob, out_t dh, out_t dprob, out_t y)
{
    const int64_t rows = tensor_rows(h), experts = w->shape[0], out = w->shape[1], in = w->shape[2];
    ASSERT(w->ndim == 3 && all_dense({ w, offsets }) && tensor_numel(offsets) == experts + 1 &&
           tensor_numel(prob) == rows);
    ASSERT(a->dtype == w->dtype && h->dtype == a->dtype && dh->dtype == a->dtype &&
           (y == NULL || y->dtype == a->dtype));
    ASSERT(tensor_rows(a) == rows && tensor_cols(a) == out && tensor_cols(h) == in &&
           tensor_rows(dh) == rows && tensor_cols(dh) == in);
    ASSERT(dprob->dtype == DTYPE_F32 && tensor_numel(dprob) == rows && prob->dtype == DTYPE_F32);
    const int64_t tiles = (in + GROUPED_TILE_N - 1) / GROUPED_TILE_N,
                  begin = (int64_t)groups_bytes(s, (size_t)experts);
    const size_t bytes = (size_t)(begin + rows * tiles * (int64_t)sizeof(float));
    if (a->dtype != DTYPE_BF16 || !addressable(out, in, { a, w, h, dh, y }) || rows == 0 ||
        out == 0 || in == 0 || bytes > cuda_context_of(s)->scratch_bytes) {
        cuda_grouped_gemm(s, BACKEND_GROUPED_NN, a, w, offsets, rows, 0, dh);
        cuda_expert_act_backward(s, h, prob, dh, dh, dprob, y);
        return;
    }
    float *partial = (float *)((char *)cuda_scratch(s, bytes) + begin);
    const struct grouped g = set_up(s, BACKEND_GROUPED_NN, a, w, offsets, h, dh);
    const struct grouped_act act = { (const int32_t *)offsets->data, (const float *)prob->data,
                                     y ? y->data : NULL, y ? y->ld : 0, partial };
    cuda_grouped_nn_act(&g, &act);
    sum_parts_kernel<<<blocks_for(rows, THREADS), THREADS, 0, cuda_stream_of(s)>>>(
        partial, (int)tiles, rows, (float *)dprob->data);
    CHECK_LAUNCH();
}
