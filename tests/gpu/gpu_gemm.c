/* gpu_gemm.c - the dense matrix product of the CUDA backend against the reference.
 *
 * Of a production shape the reference computes 64 rows of the result, chosen at random, over the
 * whole inner dimension.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "check.h"
#include "gpu_check.h"

enum { SAMPLE = 64 };
/* beta 0; c is d; c elsewhere; c elsewhere and of the other type */
enum addend { NONE, IN_PLACE, APART, APART_OTHER_TYPE };

struct shape {
    bool ta, tb;
    enum dtype in, right, out; /* of a, b, d */
    enum addend c;
    int64_t m, n, k;
};

/* The rows of op(t)'s first dimension that the sample takes: rows of t, or its columns. */
static void take(const struct tensor *t, bool columns, const int64_t *row, int64_t n, float *to)
{
    const int64_t cols = tensor_cols(t), rows = tensor_rows(t);
    const float *from = t->data;
    for (int64_t i = 0; i < n; i++)
        if (columns)
            for (int64_t k = 0; k < rows; k++)
                to[i * rows + k] = from[k * t->ld + row[i]];
        else
            memcpy(to + i * cols, from + row[i] * t->ld, (size_t)cols * sizeof *to);
}

/* BF16 operands: the tensor cores truncate when they add to their fp32 sum, half a unit in the last
 * place for every 16 products. c in bf16: some of the library's kernels round the product before
 * they add c, as the residual stream is defined (model.md 0.3): two roundings. */
static struct gpu_bound bound_of(const struct shape *z)
{
    struct gpu_bound b = gpu_summing(z->out, z->k);
    if (z->right == DTYPE_BF16) {
        b.frobenius += 3e-8 * (double)z->k / 16;
        b.element += 2e-7 * (double)z->k / 16;
    }
    if (z->c != NONE && z->out == DTYPE_BF16) {
        b.frobenius *= 1.5;
        b.element *= 2;
    }
    return b;
}

static void gemm_case(struct gpu_check *g, struct shape z, double alpha, double beta)
{
    static const char *const what[] = { "", " += in place", " + c", " + c of the other type" };
    if (!gpu_case(g, "gemm", "%c%c %lldx%lldx%lld %s %s to %s%s", z.ta ? 'T' : 'N',
                  z.tb ? 'T' : 'N', (long long)z.m, (long long)z.n, (long long)z.k,
                  dtype_name(z.in), dtype_name(z.right), dtype_name(z.out), what[z.c]))
        return;
    const enum dtype other = z.out == DTYPE_BF16 ? DTYPE_F32 : DTYPE_BF16;
    struct gpu_tensor *a = gpu_matrix(g, z.in, z.ta ? z.k : z.m, z.ta ? z.m : z.k);
    struct gpu_tensor *b = gpu_matrix(g, z.right, z.tb ? z.n : z.k, z.tb ? z.k : z.n);
    struct gpu_tensor *d = gpu_matrix(g, z.out, z.m, z.n);
    struct gpu_tensor *c = z.c >= APART ? gpu_matrix(g, z.c == APART ? z.out : other, z.m, z.n) : d;
    gpu_normal(g, a, 1);
    gpu_normal(g, b, 1);
    if (z.c != NONE) {
        gpu_normal(g, c, 10);
        gpu_inout(d);
    } else
        beta = 0;
    gpu_run(g) cuda_gemm(g->stream, z.ta, z.tb, alpha, &a->dev, &b->dev, beta,
                         z.c == NONE ? NULL : &c->dev, &d->dev);

    int64_t row[SAMPLE], n = z.m < SAMPLE ? z.m : SAMPLE;
    for (int64_t i = 0; i < n; i++)
        row[i] = n == z.m ? i : (int64_t)(gpu_random(g) % (uint64_t)z.m);
    struct tensor part =
        tensor_2d(xmalloc((size_t)(n * z.k) + 1, sizeof(float)), DTYPE_F32, PLACE_HOST, n, z.k);
    struct tensor want =
        tensor_2d(xcalloc((size_t)(n * z.n) + 1, sizeof(float)), DTYPE_F32, PLACE_HOST, n, z.n);
    take(&a->host, z.ta, row, n, part.data);
    if (z.c != NONE)
        take(&c->host, false, row, n, want.data);
    if (n > 0 && z.n > 0)
        backend_ref_f32.gemm(g->cpu, false, z.tb, alpha, &part, &b->host, beta,
                             z.c == NONE ? NULL : &want, &want);
    gpu_close_rows(g, d, "d", row, n, &want, bound_of(&z));
    free(part.data);
    free(want.data);
    const double left = (double)dtype_bytes(z.in), right = (double)dtype_bytes(z.right),
                 out = (double)dtype_bytes(z.out);
    gpu_report(g,
               left * (double)(z.m * z.k) + right * (double)(z.k * z.n) +
                   out * (double)(z.m * z.n) * (z.c == NONE ? 1 : 2),
               2.0 * (double)z.m * (double)z.n * (double)z.k);
}

/* Every combination of transposition, types and addend. */
static void all_of(struct gpu_check *g, int64_t m, int64_t n, int64_t k)
{
    static const enum dtype type[][3] = {
        { DTYPE_BF16, DTYPE_BF16, DTYPE_BF16 }, { DTYPE_BF16, DTYPE_BF16, DTYPE_F32 },
        { DTYPE_F32, DTYPE_F32, DTYPE_F32 },    { DTYPE_F32, DTYPE_F32, DTYPE_BF16 },
        { DTYPE_F32, DTYPE_BF16, DTYPE_F32 },   { DTYPE_F32, DTYPE_BF16, DTYPE_BF16 },
    };
    for (int t = 0; t < 4; t++)
        for (int i = 0; i < 6; i++)
            for (int c = NONE; c <= (i < 4 ? APART_OTHER_TYPE : APART); c++)
                gemm_case(g,
                          (struct shape){ t & 1, t >> 1, type[i][0], type[i][1], type[i][2],
                                          (enum addend)c, m, n, k },
                          c & 1 ? 1 : 0.75, c == IN_PLACE ? 1 : -0.5);
}

int main(int argc, char **argv)
{
    static const int64_t small[][3] = {
        { 1, 1, 1 },     { 0, 8, 8 },       { 8, 0, 8 },       { 8, 8, 0 },
        { 1, 7, 33 },    { 33, 1, 7 },      { 17, 13, 31 },    { 64, 64, 64 },
        { 128, 96, 80 }, { 251, 127, 509 }, { 96, 264, 1000 },
    };
    static const int layout[][2] = { { 0, 0 }, { 8, 8 }, { 3, 1 }, { 2, 0 } };
    const enum dtype h = DTYPE_BF16, f = DTYPE_F32;
    const struct shape production[] = {
        /* Mamba in_proj: forward, dgrad, wgrad */
        { false, true, h, h, h, NONE, 8192, 10304, 2688 },
        { false, false, h, h, h, NONE, 8192, 2688, 10304 },
        { true, false, h, h, f, IN_PLACE, 10304, 2688, 8192 },
        /* out_proj with the residual stream */
        { false, true, h, h, h, APART, 8192, 2688, 4096 },
        { false, true, h, h, h, NONE, 8192, 6144, 2688 }, /* qkv */
        { true, false, h, h, f, IN_PLACE, 6144, 2688, 8192 },
        { false, true, h, h, h, NONE, 8192, 3712, 2688 }, /* shared expert */
        { false, false, h, h, h, IN_PLACE, 8192, 2688, 3712 },
        { false, true, h, h, h, NONE, 8192, 131072, 2688 }, /* head */
        { false, false, h, h, h, NONE, 8192, 2688, 32768 },
        { true, false, h, h, f, IN_PLACE, 32768, 2688, 8192 },
        /* router: logits, weight gradient, input gradient */
        { false, true, h, h, f, NONE, 8192, 128, 2688 },
        { true, false, f, h, f, IN_PLACE, 128, 2688, 8192 },
        { false, false, f, h, h, IN_PLACE, 8192, 2688, 128 },
        { false, true, h, h, h, NONE, 16392, 3840, 1280 }, /* RADIO */
        { false, true, h, h, h, NONE, 16392, 5120, 1280 },
        { false, true, h, h, h, APART, 16392, 1280, 5120 },
        { true, false, h, h, f, IN_PLACE, 5120, 1280, 16392 },
        { false, true, h, h, h, NONE, 16392, 1280, 768 }, /* patch embedding */
        { false, true, h, h, h, NONE, 4099, 2688, 1031 }, /* nothing a multiple of anything */
    };
    struct gpu_check *g = gpu_check_start(argc, argv);
    for (size_t l = 0; l < sizeof layout / sizeof *layout; l++) {
        gpu_layout(g, layout[l][0], layout[l][1]);
        for (size_t i = 0; i < sizeof small / sizeof *small; i++)
            all_of(g, small[i][0], small[i][1], small[i][2]);
    }
    gpu_layout(g, 0, 0);
    for (size_t i = 0; i < sizeof production / sizeof *production && gpu_production(g); i++)
        gemm_case(g, production[i], 1, 1);
    return gpu_check_end(g);
}
