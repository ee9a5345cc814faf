/* gpu_grouped.c - the experts' products on the GPU against the reference: whole at small sizes, four whole experts at
 * production sizes. With --time each production product is also timed in turn with a dense one of the same arithmetic on a hot
 * card, which is the only fair comparison on a card that power limits.
 */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "check.h"
#include "cuda_util.h"
#include "gpu_check.h"

enum { ROUNDS = 6, LAUNCHES = 6, SAMPLED = 4 };
enum spread { EVEN, RANDOM, HOLES, ONE, SKEWED };

static const char *const mode_name[] = { "NT", "NN", "TN" }, *const spread_name[] = { "even", "random", "holes", "one", "skewed" };

/* offsets of `rows` rows over the experts. */
static void fill_offsets(struct gpu_check *g, struct gpu_tensor *offsets, int64_t rows, enum spread spread)
{
    const int64_t experts = tensor_numel(&offsets->host) - 1;
    int32_t *at = offsets->host.data;
    memset(at, 0, (size_t)(experts + 1) * sizeof *at);
    for (int64_t i = 0; i < rows; i++) {
        const uint64_t u = gpu_random(g);
        int64_t e = i % experts;
        if (spread == RANDOM || spread == HOLES)
            e = (int64_t)(u % (uint64_t)experts);
        else if (spread == ONE)
            e = experts / 2;
        else if (spread == SKEWED)   /* three of four rows to an eighth of the experts */
            e = (int64_t)(u >> 2) % (u & 3 ? (experts + 7) / 8 : experts);
        if (spread == HOLES)
            e -= e % 3 == 1;
        at[e + 1]++;
    }
    for (int64_t e = 0; e < experts; e++)
        at[e + 1] += at[e];
    gpu_upload(g, offsets);
}

/* [E, out, in], dense: weights have no gaps. */
static struct gpu_tensor *weights(struct gpu_check *g, enum dtype dtype, int64_t experts, int64_t out, int64_t in)
{
    const int pad = g->pad;
    g->pad = 0;
    struct gpu_tensor *w = gpu_tensor(g, dtype, 3, (int64_t[]){ experts, out, in });
    g->pad = pad;
    return w;
}

/* Rows after the last expert's must stay as they were: 0xFF. */
static void look_behind(struct gpu_check *g, const struct gpu_tensor *c, int64_t rows)
{
    const size_t width = dtype_bytes(c->dev.dtype);
    for (int64_t r = rows; r < tensor_rows(&c->dev); r++)
        for (size_t i = 0; i < (size_t)tensor_cols(&c->dev) * width; i++)
            if (c->got[c->begin + (size_t)(r * c->dev.ld) * width + i] != 0xFF) {
                gpu_fail(g, "row %lld belongs to no expert and was written", (long long)r);
                return;
            }
}

static void product_case(struct gpu_check *g, enum backend_grouped mode, enum dtype dtype, int64_t experts, int64_t rows,
                         int64_t in, int64_t out, enum spread spread)
{
    if (!gpu_case(g, "grouped_gemm", "%s %lld experts %lldx%lld->%lld %s %s", mode_name[mode], (long long)experts,
                  (long long)rows, (long long)in, (long long)out, spread_name[spread], dtype_name(dtype)))
        return;
    const bool tn = mode == BACKEND_GROUPED_TN;
    const int64_t spare = 5, a_cols = mode == BACKEND_GROUPED_NT ? in : out, other_cols = mode == BACKEND_GROUPED_NT ? out : in;
    struct gpu_tensor *a = gpu_matrix(g, dtype, rows + spare, a_cols), *other = gpu_matrix(g, dtype, rows + spare, other_cols);
    struct gpu_tensor *w = weights(g, tn ? DTYPE_F32 : dtype, experts, out, in);
    struct gpu_tensor *offsets = gpu_vector(g, DTYPE_I32, experts + 1);
    fill_offsets(g, offsets, rows, spread);
    gpu_normal(g, a, 1);
    gpu_normal(g, w, 1);
    if (tn) {
        gpu_normal(g, other, 1);
        gpu_inout(w);
    }
    struct gpu_tensor *b = tn ? other : w, *c = tn ? w : other;
    gpu_run(g) cuda_grouped_gemm(g->stream, mode, &a->dev, &b->dev, &offsets->dev, rows + spare, &c->dev);
    backend_ref_f32.grouped_gemm(g->cpu, mode, &a->host, &b->host, &offsets->host, rows + spare, &c->host);
    const int64_t inner = mode == BACKEND_GROUPED_NT ? in : mode == BACKEND_GROUPED_NN ? out : rows;
    const struct gpu_bound bound = gpu_summing(c->dev.dtype, inner);
    if (tn) {
        gpu_close(g, c, "dw", bound);
    } else {
        const struct tensor want = tensor_first(&c->host, rows);
        gpu_close_rows(g, c, "c", NULL, rows, &want, bound);
        look_behind(g, c, rows);
    }
    gpu_report(g, 0, 2.0 * (double)rows * (double)in * (double)out);
}

static void small_cases(struct gpu_check *g)
{
    static const int64_t shape[][4] = { { 1, 1, 1, 1 },      { 1, 200, 64, 128 },   { 4, 0, 16, 8 },       { 4, 37, 24, 40 },
                                        { 5, 301, 200, 72 }, { 3, 1009, 251, 127 }, { 16, 2003, 136, 264 }, { 33, 1500, 520, 392 },
                                        { 128, 777, 64, 48 }, { 300, 4001, 72, 200 } };
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++)
        for (int mode = BACKEND_GROUPED_NT; mode <= BACKEND_GROUPED_TN; mode++)
            for (int type = 0; type < 2; type++)
                for (int spread = EVEN; spread <= SKEWED; spread++)
                    product_case(g, (enum backend_grouped)mode, type ? DTYPE_BF16 : DTYPE_F32, shape[i][0], shape[i][1],
                                 shape[i][2], shape[i][3], (enum spread)spread);
}

/* ---- production ---- */

/* Large matrices repeat a pattern of rows, whose period fits no expert. */
static struct gpu_tensor *repeated(struct gpu_check *g, int64_t rows, const struct gpu_tensor *pattern)
{
    struct gpu_tensor *t = gpu_device_only(g, pattern->dev.dtype, rows, tensor_cols(&pattern->dev));
    gpu_repeat(g, t, pattern);
    return t;
}

/* Rows first.. of what `repeated` made. */
static void host_rows(const struct gpu_tensor *pattern, int64_t first, const struct tensor *to)
{
    const int64_t cols = tensor_cols(&pattern->host), period = tensor_rows(&pattern->host);
    for (int64_t r = 0; r < tensor_rows(to); r++)
        memcpy((float *)to->data + r * to->ld, (const float *)pattern->host.data + (first + r) % period * cols,
               (size_t)cols * sizeof(float));
}

static struct tensor host_matrix(int64_t rows, int64_t cols)
{
    return tensor_2d(xmalloc((size_t)(rows * cols) + 1, sizeof(float)), DTYPE_F32, PLACE_HOST, rows, cols);
}

struct production {
    enum backend_grouped mode;
    int64_t experts, rows, in, out;
    struct gpu_tensor *offsets, *a, *b, *c, *pattern_a, *pattern_b, *pattern_c;
};

/* Rows of c that are expert e's. */
static int64_t rows_of(const struct production *p, int64_t e, int64_t *first)
{
    const int32_t *at = p->offsets->host.data;
    const bool tn = p->mode == BACKEND_GROUPED_TN;
    *first = tn ? e * p->out : at[e];
    return tn ? p->out : at[e + 1] - at[e];
}

/* Expert e's part of c by the reference. */
static void reference(struct gpu_check *g, const struct production *p, int64_t e, const struct tensor *c)
{
    const int32_t *at = p->offsets->host.data;
    const bool tn = p->mode == BACKEND_GROUPED_TN;
    const int64_t rows = at[e + 1] - at[e];
    const struct tensor a = host_matrix(rows, tensor_cols(&p->pattern_a->host)), b = host_matrix(tn ? rows : p->out, p->in);
    host_rows(p->pattern_a, at[e], &a);
    host_rows(p->pattern_b, tn ? at[e] : e * p->out, &b);
    if (tn)
        host_rows(p->pattern_c, e * p->out, c);
    backend_ref_f32.gemm(g->cpu, tn, p->mode == BACKEND_GROUPED_NT, 1, &a, &b, tn ? 1 : 0, tn ? c : NULL, c);
    free(a.data);
    free(b.data);
}

/* Whole experts, all of their rows or matrices. */
static void compare_experts(struct gpu_check *g, const struct production *p, const int64_t *sample)
{
    int64_t rows = 0, first, most = 0;
    for (int i = 0; i < SAMPLED; i++)
        rows += rows_of(p, sample[i], &first);
    const struct tensor want = host_matrix(rows, tensor_cols(&p->c->dev));
    int64_t *row = xmalloc((size_t)rows + 1, sizeof *row), at = 0;
    for (int i = 0; i < SAMPLED; i++) {
        const int64_t n = rows_of(p, sample[i], &first);
        const struct tensor part = tensor_row_range(&want, at, n);
        const int32_t *offset = p->offsets->host.data;
        reference(g, p, sample[i], &part);
        most = offset[sample[i] + 1] - offset[sample[i]] > most ? offset[sample[i] + 1] - offset[sample[i]] : most;
        for (int64_t r = 0; r < n; r++)
            row[at++] = first + r;
    }
    const int64_t inner = p->mode == BACKEND_GROUPED_TN ? most : p->mode == BACKEND_GROUPED_NT ? p->in : p->out;
    gpu_close_rows(g, p->c, "c", row, rows, &want, gpu_summing(p->c->dev.dtype, inner));
    free(row);
    free(want.data);
}

static int ascending(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void grouped_call(struct gpu_check *g, const struct production *p)
{
    cuda_grouped_gemm(g->stream, p->mode, &p->a->dev, &p->b->dev, &p->offsets->dev, p->rows, &p->c->dev);
}

/* The same arithmetic as one matrix product: the first expert's weights for all rows. */
static void dense_call(struct gpu_check *g, const struct production *p)
{
    const bool tn = p->mode == BACKEND_GROUPED_TN, nt = p->mode == BACKEND_GROUPED_NT;
    const struct gpu_tensor *w = tn ? p->c : p->b;
    const struct tensor one = tensor_row_range(&w->dev, 0, p->out);
    if (tn)
        cuda_gemm(g->stream, true, false, 1, &p->a->dev, &p->b->dev, 1, &one, &one);
    else
        cuda_gemm(g->stream, false, nt, 1, &p->a->dev, &one, 0, NULL, &p->c->dev);
}

/* ROUNDS rounds of LAUNCHES calls of each, in turn; median of a call in microseconds. */
static void time_in_turn(struct gpu_check *g, const struct production *p)
{
    void (*const call[])(struct gpu_check *, const struct production *) = { dense_call, grouped_call };
    const cudaStream_t stream = cuda_stream_of(g->stream);
    cudaEvent_t event[LAUNCHES + 1];
    float us[2][ROUNDS * LAUNCHES];
    for (int i = 0; i <= LAUNCHES; i++)
        CHECK_CUDA(cudaEventCreate(&event[i]));
    for (int round = -1; round < ROUNDS; round++)
        for (int what = 0; what < 2; what++) {
            CHECK_CUDA(cudaEventRecord(event[0], stream));
            for (int i = 0; i < LAUNCHES; i++) {
                call[what](g, p);
                CHECK_CUDA(cudaEventRecord(event[i + 1], stream));
            }
            CHECK_CUDA(cudaStreamSynchronize(stream));
            for (int i = 0; i < LAUNCHES && round >= 0; i++) {
                CHECK_CUDA(cudaEventElapsedTime(&us[what][round * LAUNCHES + i], event[i], event[i + 1]));
                us[what][round * LAUNCHES + i] *= 1000;
            }
        }
    for (int i = 0; i <= LAUNCHES; i++)
        CHECK_CUDA(cudaEventDestroy(event[i]));
    const double flops = 2.0 * (double)p->rows * (double)p->in * (double)p->out;
    double median[2];
    for (int what = 0; what < 2; what++) {
        qsort(us[what], ROUNDS * LAUNCHES, sizeof us[what][0], ascending);
        median[what] = us[what][ROUNDS * LAUNCHES / 2];
    }
    printf("# in turn, hot: %s %lld experts %lld->%lld: dense %.1f us %.1f TFLOP/s, grouped %.1f us %.1f TFLOP/s, %.0f %%\n",
           mode_name[p->mode], (long long)p->experts, (long long)p->in, (long long)p->out, median[0], flops / median[0] * 1e-6,
           median[1], flops / median[1] * 1e-6, 100 * median[0] / median[1]);
}

static void production_case(struct gpu_check *g, enum backend_grouped mode, int64_t experts, int64_t rows, int64_t in, int64_t out,
                            enum spread spread, bool time)
{
    if (!gpu_case(g, "grouped_gemm", "%s production %lld experts %lldx%lld->%lld %s", mode_name[mode], (long long)experts,
                  (long long)rows, (long long)in, (long long)out, spread_name[spread]))
        return;
    const bool tn = mode == BACKEND_GROUPED_TN, nt = mode == BACKEND_GROUPED_NT;
    struct production p = { .mode = mode, .experts = experts, .rows = rows, .in = in, .out = out };
    p.offsets = gpu_vector(g, DTYPE_I32, experts + 1);
    fill_offsets(g, p.offsets, rows, spread);
    p.pattern_a = gpu_matrix(g, DTYPE_BF16, 1013, nt ? in : out);
    p.pattern_b = gpu_matrix(g, DTYPE_BF16, 1511, in);
    p.pattern_c = gpu_matrix(g, tn ? DTYPE_F32 : DTYPE_BF16, 1019, nt ? out : in);
    gpu_normal(g, p.pattern_a, 1);
    gpu_normal(g, p.pattern_b, 1);
    gpu_normal(g, p.pattern_c, 1);
    p.a = repeated(g, rows, p.pattern_a);
    p.b = repeated(g, tn ? rows : experts * out, p.pattern_b);
    if (tn) {
        p.c = repeated(g, experts * out, p.pattern_c);
        gpu_inout(p.c);
    } else
        p.c = gpu_device_only(g, DTYPE_BF16, rows, nt ? out : in);
    struct gpu_tensor *w = tn ? p.c : p.b;
    const struct tensor flat = w->dev;
    w->dev = tensor_view(flat.data, flat.dtype, PLACE_DEVICE, 3, (int64_t[]){ experts, out, in });
    gpu_run(g) grouped_call(g, &p);
    const int64_t sample[SAMPLED] = { 0, experts - 1, (int64_t)(gpu_random(g) % (uint64_t)experts), experts / 3 };
    compare_experts(g, &p, sample);
    if (time)
        time_in_turn(g, &p);
    gpu_report(g, 0, 2.0 * (double)rows * (double)in * (double)out);
}

static void production_cases(struct gpu_check *g, bool time)
{
    for (int mode = BACKEND_GROUPED_NT; mode <= BACKEND_GROUPED_TN; mode++)
        production_case(g, (enum backend_grouped)mode, 128, 49152, 2688, 1856, RANDOM, time);
    production_case(g, BACKEND_GROUPED_NT, 128, 49152, 1856, 2688, RANDOM, time);
    production_case(g, BACKEND_GROUPED_NT, 128, 49152, 2688, 1856, SKEWED, time);
    production_case(g, BACKEND_GROUPED_NT, 64, 49152, 2688, 1856, RANDOM, time);
    production_case(g, BACKEND_GROUPED_TN, 64, 49152, 2688, 1856, RANDOM, time);
}

int main(int argc, char **argv)
{
    static const int layout[][2] = { { 0, 0 }, { 3, 1 }, { 8, 8 } };
    struct gpu_check *g = gpu_check_start(argc, argv);
    bool time = false;
    for (int i = 1; i < argc; i++)
        time = time || strcmp(argv[i], "--time") == 0;
    for (int i = 0; i < 3 && gpu_small(g); i++) {
        gpu_layout(g, layout[i][0], layout[i][1]);
        small_cases(g);
    }
    gpu_layout(g, 0, 0);
    if (gpu_production(g))
        production_cases(g, time);
    return gpu_check_end(g);
}
