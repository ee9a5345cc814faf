/* gpu_attention.c - attention forward and backward against the reference: the plain, packed and
 * simple ways of attention.cu. Of a large shape the reference computes whole KV groups that the
 * seed chooses, two heads at least but for the longest segment, where one takes it ten seconds;
 * groups do not touch each other. */
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include "check.h"
#include "gpu_check.h"

struct shape {
    int n, g, d;
    bool causal;
    int segments;
    const int64_t *len;
};

static int64_t longest(const struct shape *a)
{
    int64_t most = 0;
    for (int i = 0; i < a->segments; i++)
        most = a->len[i] > most ? a->len[i] : most;
    return most;
}

/* A probability is rounded to bf16 before it meets the values, in forward and backward. */
static struct gpu_bound bound_of(enum dtype dtype, bool backward)
{
    const struct gpu_bound bf16 = { backward ? 8e-3 : 4e-3, backward ? 0.3 : 0.1 },
                           fp32 = { 3e-5, 3e-3 };
    return dtype == DTYPE_BF16 ? bf16 : fp32;
}

/* Dense F32 copy of columns of a host matrix. */
static struct tensor columns(const struct tensor *t, int64_t first, int64_t n)
{
    struct tensor c = tensor_2d(xmalloc((size_t)(tensor_rows(t) * n + 1), sizeof(float)), DTYPE_F32,
                                PLACE_HOST, tensor_rows(t), n);
    const struct tensor from = tensor_col_range(t, first, n);
    backend_ref_f32.copy(NULL, &from, &c);
    return c;
}

static void attention_case(struct gpu_check *g, enum dtype dtype, const struct shape *a, bool large,
                           const struct tensor *scratch)
{
    int64_t rows = 0;
    const int64_t most = longest(a);
    for (int i = 0; i < a->segments; i++)
        rows += a->len[i];
    /* 0 forward, 1 backward, 2 backward whose sums may take any order */
    for (int backward = 0; backward < 3; backward++) {
        static const char *const op[] = { "attention_forward", "attention_backward",
                                          "attention_backward_any_order" };
        const struct backend_ops *sizes =
            backward == 2 ? &backend_sizes_bf16_any_order : &backend_sizes_bf16;
        const int64_t bytes =
            sizes->attention_work(rows, a->segments, most, a->n, a->g, a->d, a->causal);
        const struct tensor work = tensor_1d(scratch->data, DTYPE_U8, PLACE_DEVICE, bytes);
        ASSERT(bytes <= tensor_numel(scratch));
        if (!gpu_case(g, op[backward], "%d/%d heads d %d %s, %d of %lld, %lld rows %s", a->n, a->g,
                      a->d, a->causal ? "causal" : "full", a->segments, (long long)most,
                      (long long)rows, dtype_name(dtype)))
            continue;
        const int64_t width = (int64_t)a->n * a->d, wide = width + 2 * (int64_t)a->g * a->d;
        struct gpu_tensor *qkv = gpu_matrix(g, dtype, rows, wide),
                          *cu = gpu_vector(g, DTYPE_I32, a->segments + 1);
        struct gpu_tensor *o = gpu_matrix(g, dtype, rows, width),
                          *lse = gpu_matrix(g, DTYPE_F32, rows, a->n), *d_o = NULL, *dqkv = NULL;
        gpu_normal(g, qkv, 1);
        int32_t *first = cu->host.data;
        first[0] = 0;
        for (int i = 0; i < a->segments; i++)
            first[i + 1] = first[i] + (int32_t)a->len[i];
        gpu_upload(g, cu);
        double flops = 0;
        for (int i = 0; i < a->segments; i++)
            flops += 4.0 * (double)a->len[i] * (double)a->len[i] * (double)width *
                     (a->causal ? 0.5 : 1) * (backward ? 2.5 : 1);
        const int per = a->n / a->g,
                  groups = !large                   ? a->g
                           : per > 1 || most > 8192 ? 1
                                                    : 2,
                  group = large ? (int)(gpu_random(g) % (uint64_t)(a->g - groups + 1)) : 0;
        struct tensor x = columns(&qkv->host, (int64_t)group * (per + 2) * a->d,
                                  (int64_t)groups * (per + 2) * a->d);
        struct tensor y = columns(&o->host, (int64_t)group * per * a->d,
                                  (int64_t)groups * per * a->d),
                      l = columns(&lse->host, group * per, groups * per);
        backend_ref_f32.attention_forward(g->cpu, &x, &cu->host, most, groups * per, groups, a->d,
                                          a->causal, NULL, &y, &l);
        if (backward) {
            /* The statistics and outputs of the other groups come from the device itself. */
            cuda_attention_forward(g->stream, &qkv->dev, &cu->dev, most, a->n, a->g, a->d,
                                   a->causal, &work, &o->dev, &lse->dev);
            cudaDeviceSynchronize();
            o->written = lse->written = false;
            d_o = gpu_matrix(g, dtype, rows, width);
            dqkv = gpu_matrix(g, dtype, rows, wide);
            gpu_normal(g, d_o, 1);
            dqkv->varies = backward == 2;
            gpu_run(g)(backward == 2 ? cuda_attention_backward_any_order : cuda_attention_backward)(
                g->stream, &qkv->dev, &cu->dev, most, a->n, a->g, a->d, a->causal, &o->dev,
                &lse->dev, &d_o->dev, &work, &dqkv->dev);
            struct tensor dy = columns(&d_o->host, (int64_t)group * per * a->d,
                                       (int64_t)groups * per * a->d),
                          dx = columns(&dqkv->host, 0, tensor_cols(&x));
            backend_ref_f32.attention_backward(g->cpu, &x, &cu->host, most, groups * per, groups,
                                               a->d, a->causal, &y, &l, &dy, NULL, &dx);
            gpu_close_columns(g, dqkv, "dqkv", (int64_t)group * (per + 2) * a->d, &dx,
                              bound_of(dtype, true));
            free(dy.data);
            free(dx.data);
        } else {
            gpu_run(g) cuda_attention_forward(g->stream, &qkv->dev, &cu->dev, most, a->n, a->g,
                                              a->d, a->causal, &work, &o->dev, &lse->dev);
            gpu_close_columns(g, o, "o", (int64_t)group * per * a->d, &y, bound_of(dtype, false));
            gpu_close_columns(g, lse, "lse", group * per, &l, (struct gpu_bound){ 1e-5, 1e-3 });
        }
        free(x.data);
        free(y.data);
        free(l.data);
        gpu_report(g, 0, flops);
    }
}

int main(int argc, char **argv)
{
    struct gpu_check *g = gpu_check_start(argc, argv);
    static const int64_t equal[] = { 64, 64, 64 }, odd[] = { 37, 5, 1, 20 }, one[] = { 37 },
                         tiles[] = { 1032, 264, 72 }, long_one[] = { 8192 }, picture[] = { 16392 },
                         pictures[] = { 4104, 1032, 2056, 264 }, single[] = { 1 };
    const struct shape small[] = {
        { 4, 2, 16, true, 3, equal },    { 4, 2, 16, true, 4, odd },
        { 4, 2, 16, true, 1, one },      { 4, 4, 8, false, 4, odd },
        { 4, 4, 8, false, 3, equal },    { 6, 2, 24, true, 1, one },
        { 5, 5, 7, false, 4, odd },      { 4, 2, 16, true, 1, single },
        { 16, 16, 80, false, 3, tiles }, { 3, 1, 128, true, 3, equal },
        { 4, 4, 8, true, 4, odd },       { 16, 16, 80, true, 3, tiles },
    };
    const struct shape large[] = { { 32, 8, 128, true, 1, long_one },
                                   { 16, 16, 80, false, 1, picture },
                                   { 16, 16, 80, false, 4, pictures } };
    struct tensor scratch = tensor_1d(NULL, DTYPE_U8, PLACE_DEVICE, (int64_t)5 << 30);
    if (cudaMalloc(&scratch.data, (size_t)5 << 30) != cudaSuccess)
        return 1;
    for (int type = 0; type < 2; type++)
        for (size_t i = 0; i < sizeof small / sizeof *small; i++)
            attention_case(g, type ? DTYPE_BF16 : DTYPE_F32, &small[i], false, &scratch);
    for (size_t i = 0; i < sizeof large / sizeof *large && gpu_production(g); i++)
        attention_case(g, DTYPE_BF16, &large[i], true, &scratch);
    return gpu_check_end(g);
}
