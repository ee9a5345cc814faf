/* grouped.cu - the experts' products: rows sorted by expert, one weight matrix each.
 *
 * BF16 goes to CUTLASS (grouped_*.cu) when TMA can address it: widths and row strides multiples of 16 bytes, bases aligned. All
 * else (F32, odd widths) takes the plain kernel below, which is there to be right: fp32 products and sums in the order of the
 * inner index. Neither reads the offsets on the host.
 */
#include "cuda_util.cuh"
#include "grouped.h"

enum { TILE = 64, DEPTH = 16, THREADS = 256, PER_THREAD = 4, LINE = 256 };
enum { WORKSPACE_PER_SM = 1024 };   /* five descriptors of 128 bytes at most */

/* A product in terms of groups: which extent is the experts' rows, where matrices start and how they are stepped through. */
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

/* One 64x64 tile of one group. Blocks of y are row tiles of all groups in order where M is the rows, else (z = group) of M. */
template <class T, class D> static __global__ void __launch_bounds__(THREADS) plain_kernel(product<T, D> p)
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
    const int64_t m = p.m < 0 ? rows : p.m, k = p.k < 0 ? rows : p.k, m0 = tile * TILE, n0 = (int64_t)blockIdx.x * TILE;
    const T *a = p.a + first * p.a_rows, *b = p.b + first * p.b_rows + group * p.b_group;
    D *c = p.c + first * p.c_rows + group * p.c_group;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float sum[PER_THREAD][PER_THREAD] = {};
    for (int64_t k0 = 0; k0 < k; k0 += DEPTH) {
        /* Neighbouring threads read neighbouring elements, whichever way the matrix lies. */
        for (int i = threadIdx.x; i < TILE * DEPTH; i += THREADS) {
            const int am = p.a_k == 1 ? i / DEPTH : i % TILE, ak = p.a_k == 1 ? i % DEPTH : i / TILE;
            const int bn = p.b_k == 1 ? i / DEPTH : i % TILE, bk = p.b_k == 1 ? i % DEPTH : i / TILE;
            as[ak][am] = m0 + am < m && k0 + ak < k ? to_float(a[(m0 + am) * p.a_m + (k0 + ak) * p.a_k]) : 0.0f;
            bs[bk][bn] = n0 + bn < p.n && k0 + bk < k ? to_float(b[(k0 + bk) * p.b_k + (n0 + bn) * p.b_n]) : 0.0f;
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
static void plain(struct stream *s, enum backend_grouped mode, in_t a, in_t b, in_t offsets, int64_t max_rows, out_t c)
{
    in_t w = mode == BACKEND_GROUPED_TN ? c : b;
    const int64_t experts = w->shape[0], out = w->shape[1], in = w->shape[2];
    product<T, D> p = {};
    p.a = (const T *)a->data;
    p.b = (const T *)b->data;
    p.c = (D *)c->data;
    p.offsets = (const int32_t *)offsets->data;
    p.a_rows = a->ld;
    int64_t row_tiles = tiles_of(max_rows) + experts;   /* every group may end in a part of a tile */
    if (mode == BACKEND_GROUPED_TN) {
        p.m = out, p.n = in, p.k = -1;
        p.a_m = 1, p.a_k = a->ld;
        p.b_k = b->ld, p.b_n = 1, p.b_rows = b->ld;
        p.ldc = in, p.c_group = out * in;
        p.add = true;
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

struct setup {
    struct grouped g;
    const int32_t *offsets;
    const char *a, *b;
    char *d;
    int64_t lda, ldb, ldd;
    int64_t a_step, b_step, d_step;      /* bytes from one row of the group to the next; 0: not by rows */
    int64_t b_expert, d_expert;          /* bytes from one expert to the next; 0: not by expert */
    int m, n, k;                         /* -1: the group's rows */
};

static __global__ void setup_kernel(setup p)
{
    for (int e = threadIdx.x; e < p.g.groups; e += blockDim.x) {
        const int64_t first = p.offsets[e];
        const int rows = (int)(p.offsets[e + 1] - first);
        p.g.size[e][0] = rows == 0 ? 0 : p.m < 0 ? rows : p.m;
        p.g.size[e][1] = rows == 0 ? 0 : p.n;
        p.g.size[e][2] = rows == 0 ? 0 : p.k < 0 ? rows : p.k;
        p.g.a[e] = p.a + first * p.a_step;
        p.g.b[e] = p.b + first * p.b_step + e * p.b_expert;
        p.g.d[e] = p.d + first * p.d_step + e * p.d_expert;
        p.g.lda[e] = p.lda;
        p.g.ldb[e] = p.ldb;
        p.g.ldd[e] = p.ldd;
    }
}

/* The next `bytes` of the scratch, on a line of its own. */
static void *carve(char **at, size_t bytes)
{
    void *p = *at;
    *at += (bytes + LINE - 1) / LINE * LINE;
    return p;
}

static struct grouped carve_groups(struct stream *s, int64_t experts)
{
    const size_t n = (size_t)experts, workspace = (size_t)cuda_context_of(s)->sm_count * WORKSPACE_PER_SM;
    char *at = (char *)cuda_scratch(s, workspace + n * (sizeof(int[3]) + 6 * sizeof(int64_t)) + 8 * LINE);
    struct grouped g = {};
    g.groups = (int)n;
    g.workspace_bytes = workspace;
    g.workspace = carve(&at, workspace);
    g.size = (int(*)[3])carve(&at, n * sizeof *g.size);
    g.a = (const void **)carve(&at, n * sizeof *g.a);
    g.b = (const void **)carve(&at, n * sizeof *g.b);
    g.d = (void **)carve(&at, n * sizeof *g.d);
    g.lda = (int64_t *)carve(&at, n * sizeof *g.lda);
    g.ldb = (int64_t *)carve(&at, n * sizeof *g.ldb);
    g.ldd = (int64_t *)carve(&at, n * sizeof *g.ldd);
    return g;
}

static void by_cutlass(struct stream *s, enum backend_grouped mode, in_t a, in_t b, in_t offsets, out_t c)
{
    in_t w = mode == BACKEND_GROUPED_TN ? c : b;
    const int64_t out = w->shape[1], in = w->shape[2], step = (int64_t)sizeof(bf16);
    setup p = {};
    p.g = carve_groups(s, w->shape[0]);
    p.offsets = (const int32_t *)offsets->data;
    p.a = (const char *)a->data;
    p.b = (const char *)b->data;
    p.d = (char *)c->data;
    p.lda = a->ld;
    p.a_step = a->ld * step;
    if (mode == BACKEND_GROUPED_TN) {
        p.m = (int)out, p.n = (int)in, p.k = -1;
        p.ldb = b->ld, p.b_step = b->ld * step;
        p.ldd = in, p.d_expert = out * in * (int64_t)sizeof(float);
    } else {
        const bool nt = mode == BACKEND_GROUPED_NT;
        p.m = -1, p.n = (int)(nt ? out : in), p.k = (int)(nt ? in : out);
        p.ldb = in, p.b_expert = out * in * step;
        p.ldd = c->ld, p.d_step = c->ld * step;
    }
    setup_kernel<<<1, 128, 0, cuda_stream_of(s)>>>(p);
    CHECK_LAUNCH();
    if (mode == BACKEND_GROUPED_NT)
        cuda_grouped_nt(s, &p.g);
    else if (mode == BACKEND_GROUPED_NN)
        cuda_grouped_nn(s, &p.g);
    else
        cuda_grouped_tn(s, &p.g);
}

/* Base and row stride are multiples of 16 bytes. */
static bool aligned(in_t t)
{
    return (uintptr_t)t->data % 16 == 0 && t->ld * (int64_t)dtype_bytes(t->dtype) % 16 == 0;
}

static bool dense(in_t t)
{
    return tensor_rows(t) <= 1 || t->ld == tensor_cols(t);
}

extern "C" void cuda_grouped_gemm(struct stream *s, enum backend_grouped mode, in_t a, in_t b, in_t offsets, int64_t max_rows,
                                  out_t c)
{
    const bool tn = mode == BACKEND_GROUPED_TN;
    in_t w = tn ? c : b, other = tn ? b : c;
    ASSERT(w->ndim == 3 && dense(w) && offsets->dtype == DTYPE_I32 && dense(offsets));
    const int64_t experts = w->shape[0], out = w->shape[1], in = w->shape[2];
    ASSERT(tensor_numel(offsets) == experts + 1 && a->dtype == b->dtype && c->dtype == (tn ? DTYPE_F32 : a->dtype));
    ASSERT(tensor_cols(a) == (mode == BACKEND_GROUPED_NT ? in : out));
    ASSERT(tensor_cols(other) == (mode == BACKEND_GROUPED_NT ? out : in));
    ASSERT(max_rows <= INT32_MAX && out <= INT32_MAX && in <= INT32_MAX);
    if (max_rows == 0 || experts == 0 || out == 0 || in == 0)
        return;
    if (a->dtype == DTYPE_BF16 && out % 8 == 0 && in % 8 == 0 && aligned(a) && aligned(b) && aligned(c))
        by_cutlass(s, mode, a, b, offsets, c);
    else
        by_type(a, [&](auto zero) {
            using T = decltype(zero);
            if (tn)
                plain<T, float>(s, mode, a, b, offsets, max_rows, c);
            else
                plain<T, T>(s, mode, a, b, offsets, max_rows, c);
        });
}
