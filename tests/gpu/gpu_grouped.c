/* gpu_grouped.c - the experts' products on the GPU against the reference: whole at small sizes,
 * four whole experts at production sizes. With --time each production product is also timed in turn
 * with a dense one of the same arithmetic on a hot card, which is the only fair comparison on a
 * card that power limits.
 */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "check.h"
#include "cuda_util.h"
#include "gpu_check.h"

enum { ROUNDS = 6, LAUNCHES = 6, SAMPLED = 4, WAYS = 4 };
enum spread { EVEN, RANDOM, HOLES, ONE, SKEWED };

static const char *const mode_name[] = { "NT", "NN", "TN" }, *const spread_name[] = {
    "even", "random", "holes", "one", "skewed"
};

/* offsets of `rows` rows over the experts. */
static void fill_offsets(struct gpu_check *g, struct gpu_tensor *offsets, int64_t rows,
                         enum spread spread)
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
        else if (spread == SKEWED) /* three of four rows to an eighth of the experts */
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
static struct gpu_tensor *weights(struct gpu_check *g, enum dtype dtype, int64_t experts,
                                  int64_t out, int64_t in)
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

/* Experts' matrices. One that has most of the rows is compared by itself: its numbers are larger
 * than all others', and so are its errors. */
static void compare_matrices(struct gpu_check *g, struct gpu_tensor *dw, const int32_t *at,
                             int64_t rows)
{
    const int64_t experts = dw->host.shape[0], out = dw->host.shape[1], in = dw->host.shape[2];
    int64_t busy = 0, row = 0;
    for (int64_t e = 1; e < experts; e++)
        if (at[e + 1] - at[e] > at[busy + 1] - at[busy])
            busy = e;
    const struct tensor want = tensor_row_range(&dw->host, busy * out, out);
    int64_t *index = xmalloc((size_t)(experts * out) + 1, sizeof *index);
    for (int64_t r = 0; r < out; r++)
        index[r] = busy * out + r;
    gpu_close_rows(g, dw, "dw of the busiest", index, out, &want, gpu_summing(DTYPE_F32, rows));
    const struct tensor others = tensor_2d(xmalloc((size_t)(experts * out * in) + 1, sizeof(float)),
                                           DTYPE_F32, PLACE_HOST, (experts - 1) * out, in);
    for (int64_t r = 0; r < experts * out; r++)
        if (r / out != busy) {
            memcpy((float *)others.data + row * in, (const float *)dw->host.data + r * in,
                   (size_t)in * sizeof(float));
            index[row++] = r;
        }
    gpu_close_rows(g, dw, "dw", index, row, &others, gpu_summing(DTYPE_F32, rows));
    free(others.data);
    free(index);
}

static void product_case(struct gpu_check *g, enum backend_grouped mode, double beta,
                         enum dtype dtype, int64_t experts, int64_t rows, int64_t in, int64_t out,
                         enum spread spread)
{
    if (!gpu_case(g, "grouped_gemm", "%s%s %lld experts %lldx%lld->%lld %s %s", mode_name[mode],
                  beta != 0 ? " +=" : "", (long long)experts, (long long)rows, (long long)in,
                  (long long)out, spread_name[spread], dtype_name(dtype)))
        return;
    const bool tn = mode == BACKEND_GROUPED_TN;
    const int64_t spare = 5, a_cols = mode == BACKEND_GROUPED_NT ? in : out,
                  other_cols = mode == BACKEND_GROUPED_NT ? out : in;
    struct gpu_tensor *a = gpu_matrix(g, dtype, rows + spare, a_cols),
                      *other = gpu_matrix(g, dtype, rows + spare, other_cols);
    struct gpu_tensor *w = weights(g, tn ? DTYPE_F32 : dtype, experts, out, in);
    struct gpu_tensor *offsets = gpu_vector(g, DTYPE_I32, experts + 1);
    fill_offsets(g, offsets, rows, spread);
    gpu_normal(g, a, 1);
    if (!tn || beta != 0)
        gpu_normal(g, w, 1);
    if (tn) {
        gpu_normal(g, other, 1);
        gpu_inout(w);
    }
    struct gpu_tensor *b = tn ? other : w, *c = tn ? w : other;
    gpu_run(g) cuda_grouped_gemm(g->stream, mode, &a->dev, &b->dev, &offsets->dev, rows + spare,
                                 beta, &c->dev);
    backend_ref_f32.grouped_gemm(g->cpu, mode, &a->host, &b->host, &offsets->host, rows + spare,
                                 beta, &c->host);
    if (tn) {
        compare_matrices(g, c, offsets->host.data, rows);
    } else {
        const struct tensor want = tensor_first(&c->host, rows);
        gpu_close_rows(g, c, "c", NULL, rows, &want,
                       gpu_summing(c->dev.dtype, mode == BACKEND_GROUPED_NT ? in : out));
        look_behind(g, c, rows);
    }
    gpu_report(g, 0, 2.0 * (double)rows * (double)in * (double)out);
}

/* Of products of several random numbers a few large ones make the norm, which then sees single
 * roundings: 2^-8 at most. */
static struct gpu_bound act_bound(enum dtype dtype, int64_t elements, int64_t inner)
{
    struct gpu_bound bound = gpu_summing(dtype, inner);
    /* y = relu(h)^2 p of an h that was rounded, and rounded once more. */
    if (dtype == DTYPE_BF16)
        bound = elements < 10000 ? (struct gpu_bound){ 1.2e-2, 1.2e-2 }
                                 : (struct gpu_bound){ 4e-3, 1.2e-2 };
    else
        bound.element *= 3;
    return bound;
}

static void act_forward_case(struct gpu_check *g, enum dtype dtype, int64_t experts, int64_t rows,
                             int64_t in, int64_t out, enum spread spread)
{
    if (!gpu_case(g, "grouped_act_forward", "%lld experts %lldx%lld->%lld %s %s",
                  (long long)experts, (long long)rows, (long long)in, (long long)out,
                  spread_name[spread], dtype_name(dtype)))
        return;
    struct gpu_tensor *a = gpu_matrix(g, dtype, rows, in), *w = weights(g, dtype, experts, out, in);
    struct gpu_tensor *h = gpu_matrix(g, dtype, rows, out), *y = gpu_matrix(g, dtype, rows, out);
    struct gpu_tensor *offsets = gpu_vector(g, DTYPE_I32, experts + 1),
                      *prob = gpu_vector(g, DTYPE_F32, rows);
    fill_offsets(g, offsets, rows, spread);
    gpu_normal(g, a, 1);
    gpu_normal(g, w, 1);
    gpu_uniform(g, prob, 0, 1);
    gpu_run(g) cuda_grouped_act_forward(g->stream, &a->dev, &w->dev, &offsets->dev, &prob->dev,
                                        &h->dev, &y->dev);
    backend_ref_f32.grouped_gemm(g->cpu, BACKEND_GROUPED_NT, &a->host, &w->host, &offsets->host,
                                 rows, 0, &h->host);
    backend_ref_f32.expert_act_forward(g->cpu, &h->host, &prob->host, &y->host);
    gpu_close(g, h, "h", gpu_summing(dtype, in));
    gpu_close(g, y, "y", act_bound(dtype, rows * out, in));
    gpu_report(g, 0, 2.0 * (double)rows * (double)in * (double)out);
}

static void act_backward_case(struct gpu_check *g, enum dtype dtype, int64_t experts, int64_t rows,
                              int64_t in, int64_t out, enum spread spread, bool again)
{
    if (!gpu_case(g, "grouped_act_backward", "%lld experts %lldx%lld->%lld %s %s%s",
                  (long long)experts, (long long)rows, (long long)out, (long long)in,
                  spread_name[spread], dtype_name(dtype), again ? " and forward" : ""))
        return;
    struct gpu_tensor *a = gpu_matrix(g, dtype, rows, out),
                      *w = weights(g, dtype, experts, out, in);
    struct gpu_tensor *h = gpu_matrix(g, dtype, rows, in), *dh = gpu_matrix(g, dtype, rows, in);
    struct gpu_tensor *offsets = gpu_vector(g, DTYPE_I32, experts + 1),
                      *y = again ? gpu_matrix(g, dtype, rows, in) : NULL;
    struct gpu_tensor *prob = gpu_vector(g, DTYPE_F32, rows),
                      *dprob = gpu_vector(g, DTYPE_F32, rows);
    fill_offsets(g, offsets, rows, spread);
    gpu_normal(g, a, 1);
    gpu_normal(g, w, 1);
    gpu_normal(g, h, 1);
    gpu_uniform(g, prob, 0, 1);
    gpu_run(g) cuda_grouped_act_backward(g->stream, &a->dev, &w->dev, &offsets->dev, &h->dev,
                                         &prob->dev, &dh->dev, &dprob->dev, again ? &y->dev : NULL);
    backend_ref_f32.grouped_gemm(g->cpu, BACKEND_GROUPED_NN, &a->host, &w->host, &offsets->host,
                                 rows, 0, &dh->host);
    backend_ref_f32.expert_act_backward(g->cpu, &h->host, &prob->host, &dh->host, &dh->host,
                                        &dprob->host, again ? &y->host : NULL);
    gpu_close(g, dh, "dh", act_bound(dtype, rows * in, out));
    /* Without TMA the product is rounded before it is summed. */
    gpu_close(g, dprob, "dprob",
              dtype == DTYPE_BF16 ? (struct gpu_bound){ 4e-3, 1.2e-2 }
                                  : gpu_summing(dtype, in + out));
    if (again)
        gpu_close(g, y, "y", act_bound(dtype, rows * in, 1));
    gpu_report(g, 0, 2.0 * (double)rows * (double)in * (double)out);
}

static void small_cases(struct gpu_check *g)
{
    static const int64_t shape[][4] = { { 1, 1, 1, 1 },         { 1, 200, 64, 128 },
                                        { 4, 0, 16, 8 },        { 4, 37, 24, 40 },
                                        { 5, 301, 200, 72 },    { 3, 1009, 251, 127 },
                                        { 16, 2003, 136, 264 }, { 33, 1500, 520, 392 },
                                        { 128, 777, 64, 48 },   { 300, 4001, 72, 200 } };
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++)
        for (int mode = BACKEND_GROUPED_NT; mode <= BACKEND_GROUPED_TN; mode++)
            for (int type = 0; type < 2; type++)
                for (int spread = EVEN; spread <= SKEWED; spread++)
                    for (int beta = 0; beta <= (mode == BACKEND_GROUPED_TN); beta++)
                        product_case(g, (enum backend_grouped)mode, beta,
                                     type ? DTYPE_BF16 : DTYPE_F32, shape[i][0], shape[i][1],
                                     shape[i][2], shape[i][3], (enum spread)spread);
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++)
        for (int type = 0; type < 2; type++)
            for (int spread = RANDOM; spread <= SKEWED; spread++) {
                const enum dtype dtype = type ? DTYPE_BF16 : DTYPE_F32;
                const int64_t e = shape[i][0], rows = shape[i][1], in = shape[i][2],
                              out = shape[i][3];
                act_forward_case(g, dtype, e, rows, in, out, (enum spread)spread);
                act_backward_case(g, dtype, e, rows, in, out, (enum spread)spread, false);
                act_backward_case(g, dtype, e, rows, in, out, (enum spread)spread, true);
            }
}

/* ---- production ---- */

/* Large matrices repeat a pattern of rows, whose period fits no expert. */
static struct gpu_tensor *repeated(struct gpu_check *g, int64_t rows,
                                   const struct gpu_tensor *pattern)
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
        memcpy((float *)to->data + r * to->ld,
               (const float *)pattern->host.data + (first + r) % period * cols,
               (size_t)cols * sizeof(float));
}

static struct tensor host_matrix(int64_t rows, int64_t cols)
{
    return tensor_2d(xmalloc((size_t)(rows * cols) + 1, sizeof(float)), DTYPE_F32, PLACE_HOST, rows,
                     cols);
}

struct production {
    enum backend_grouped mode;
    double beta; /* of TN */
    int64_t experts, rows, in, out;
    struct gpu_tensor *offsets, *a, *b, *c, *pattern_a, *pattern_b, *pattern_c;
    struct gpu_tensor *h, *prob, *y, *dprob; /* of the activation */
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
static void reference(struct gpu_check *g, const struct production *p, int64_t e,
                      const struct tensor *c)
{
    const int32_t *at = p->offsets->host.data;
    const bool tn = p->mode == BACKEND_GROUPED_TN;
    const int64_t rows = at[e + 1] - at[e];
    const struct tensor a = host_matrix(rows, tensor_cols(&p->pattern_a->host)),
                        b = host_matrix(tn ? rows : p->out, p->in);
    host_rows(p->pattern_a, at[e], &a);
    host_rows(p->pattern_b, tn ? at[e] : e * p->out, &b);
    if (p->beta != 0)
        host_rows(p->pattern_c, e * p->out, c);
    backend_ref_f32.gemm(g->cpu, tn, p->mode == BACKEND_GROUPED_NT, 1, &a, &b, p->beta,
                         p->beta != 0 ? c : NULL, c);
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
        most = offset[sample[i] + 1] - offset[sample[i]] > most
                   ? offset[sample[i] + 1] - offset[sample[i]]
                   : most;
        for (int64_t r = 0; r < n; r++)
            row[at++] = first + r;
    }
    const int64_t inner = p->mode == BACKEND_GROUPED_TN   ? most
                          : p->mode == BACKEND_GROUPED_NT ? p->in
                                                          : p->out;
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
    cuda_grouped_gemm(g->stream, p->mode, &p->a->dev, &p->b->dev, &p->offsets->dev, p->rows,
                      p->beta, &p->c->dev);
}

/* The same arithmetic as one matrix product: the first expert's weights for all rows. */
static void dense_call(struct gpu_check *g, const struct production *p)
{
    const bool tn = p->mode == BACKEND_GROUPED_TN, nt = p->mode == BACKEND_GROUPED_NT;
    const struct gpu_tensor *w = tn ? p->c : p->b;
    const struct tensor one = tensor_row_range(&w->dev, 0, p->out);
    if (tn)
        cuda_gemm(g->stream, true, false, 1, &p->a->dev, &p->b->dev, p->beta, &one, &one);
    else
        cuda_gemm(g->stream, false, nt, 1, &p->a->dev, &one, 0, NULL, &p->c->dev);
}

/* One of several ways to the same numbers. */
struct way {
    const char *name;
    void (*call)(struct gpu_check *g, const struct production *p);
};

/* ROUNDS rounds of LAUNCHES calls of each way, in turn; median of a call. */
static void time_in_turn(struct gpu_check *g, const struct production *p, const struct way *way,
                         int ways)
{
    const cudaStream_t stream = cuda_stream_of(g->stream);
    const double flops = 2.0 * (double)p->rows * (double)p->in * (double)p->out;
    cudaEvent_t event[LAUNCHES + 1];
    float us[WAYS][ROUNDS * LAUNCHES];
    ASSERT(ways <= WAYS);
    for (int i = 0; i <= LAUNCHES; i++)
        CHECK_CUDA(cudaEventCreate(&event[i]));
    for (int round = -1; round < ROUNDS; round++)
        for (int w = 0; w < ways; w++) {
            CHECK_CUDA(cudaEventRecord(event[0], stream));
            for (int i = 0; i < LAUNCHES; i++) {
                way[w].call(g, p);
                CHECK_CUDA(cudaEventRecord(event[i + 1], stream));
            }
            CHECK_CUDA(cudaStreamSynchronize(stream));
            for (int i = 0; i < LAUNCHES && round >= 0; i++) {
                CHECK_CUDA(
                    cudaEventElapsedTime(&us[w][round * LAUNCHES + i], event[i], event[i + 1]));
                us[w][round * LAUNCHES + i] *= 1000;
            }
        }
    for (int i = 0; i <= LAUNCHES; i++)
        CHECK_CUDA(cudaEventDestroy(event[i]));
    printf("# in turn, hot: %s%s %lld experts %lld->%lld:", mode_name[p->mode],
           p->beta != 0 ? " +=" : "", (long long)p->experts, (long long)p->in, (long long)p->out);
    for (int w = 0; w < ways; w++) {
        qsort(us[w], ROUNDS * LAUNCHES, sizeof us[w][0], ascending);
        const double median = us[w][ROUNDS * LAUNCHES / 2];
        printf("%s %s %.1f us %.1f TFLOP/s", w ? "," : "", way[w].name, median,
               flops / median * 1e-6);
    }
    printf("\n");
}

static void production_case(struct gpu_check *g, enum backend_grouped mode, double beta,
                            int64_t experts, int64_t rows, int64_t in, int64_t out,
                            enum spread spread, bool time)
{
    if (!gpu_case(g, "grouped_gemm", "%s%s production %lld experts %lldx%lld->%lld %s",
                  mode_name[mode], beta != 0 ? " +=" : "", (long long)experts, (long long)rows,
                  (long long)in, (long long)out, spread_name[spread]))
        return;
    const bool tn = mode == BACKEND_GROUPED_TN, nt = mode == BACKEND_GROUPED_NT;
    struct production p = {
        .mode = mode, .beta = beta, .experts = experts, .rows = rows, .in = in, .out = out
    };
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
    if (beta != 0) {
        p.c = repeated(g, experts * out, p.pattern_c);
        gpu_inout(p.c);
    } else
        p.c = tn ? gpu_device_only(g, DTYPE_F32, experts * out, in)
                 : gpu_device_only(g, DTYPE_BF16, rows, nt ? out : in);
    struct gpu_tensor *w = tn ? p.c : p.b;
    const struct tensor flat = w->dev;
    w->dev = tensor_view(flat.data, flat.dtype, PLACE_DEVICE, 3, (int64_t[]){ experts, out, in });
    gpu_run(g) grouped_call(g, &p);
    const int64_t sample[SAMPLED] = { 0, experts - 1, (int64_t)(gpu_random(g) % (uint64_t)experts),
                                      experts / 3 };
    compare_experts(g, &p, sample);
    if (time)
        time_in_turn(
            g, &p, (const struct way[]){ { "dense", dense_call }, { "grouped", grouped_call } }, 2);
    gpu_report(g, 0, 2.0 * (double)rows * (double)in * (double)out);
}

static void separate_call(struct gpu_check *g, const struct production *p)
{
    grouped_call(g, p);
    if (p->mode == BACKEND_GROUPED_NT)
        cuda_expert_act_forward(g->stream, &p->c->dev, &p->prob->dev, &p->y->dev);
    else
        cuda_expert_act_backward(g->stream, &p->h->dev, &p->prob->dev, &p->c->dev, &p->c->dev,
                                 &p->dprob->dev, &p->y->dev);
}

static void fused_call(struct gpu_check *g, const struct production *p)
{
    if (p->mode == BACKEND_GROUPED_NT)
        cuda_grouped_act_forward(g->stream, &p->a->dev, &p->b->dev, &p->offsets->dev, &p->prob->dev,
                                 &p->c->dev, &p->y->dev);
    else
        cuda_grouped_act_backward(g->stream, &p->a->dev, &p->b->dev, &p->offsets->dev, &p->h->dev,
                                  &p->prob->dev, &p->c->dev, &p->dprob->dev, &p->y->dev);
}

/* Products with the activation against the same in two steps: to one rounding of what is rounded in
 * between. */
static void act_production_case(struct gpu_check *g, enum backend_grouped mode, int64_t experts,
                                bool time)
{
    const bool nt = mode == BACKEND_GROUPED_NT;
    const int64_t rows = 49152, in = nt ? 2688 : 1856, out = nt ? 1856 : 2688;
    if (!gpu_case(g, nt ? "grouped_act_forward" : "grouped_act_backward", "production %lld experts",
                  (long long)experts))
        return;
    struct production p = { .mode = mode, .experts = experts, .rows = rows, .in = in, .out = out };
    p.offsets = gpu_vector(g, DTYPE_I32, experts + 1);
    fill_offsets(g, p.offsets, rows, RANDOM);
    p.pattern_a = gpu_matrix(g, DTYPE_BF16, 1013, nt ? in : out);
    p.pattern_b = gpu_matrix(g, DTYPE_BF16, 1511, in);
    p.pattern_c = gpu_matrix(g, DTYPE_BF16, 1019, nt ? out : in);
    p.prob = gpu_vector(g, DTYPE_F32, rows);
    gpu_normal(g, p.pattern_a, 1);
    gpu_normal(g, p.pattern_b, 0.02);
    gpu_normal(g, p.pattern_c, 1);
    gpu_uniform(g, p.prob, 0, 1);
    p.a = repeated(g, rows, p.pattern_a);
    p.b = repeated(g, experts * out, p.pattern_b);
    p.h = nt ? NULL : repeated(g, rows, p.pattern_c);
    p.c = gpu_matrix(g, DTYPE_BF16, rows, nt ? out : in);
    p.y = gpu_matrix(g, DTYPE_BF16, rows, nt ? out : in);
    p.dprob = nt ? NULL : gpu_vector(g, DTYPE_F32, rows);
    const struct tensor flat = p.b->dev;
    p.b->dev = tensor_view(flat.data, flat.dtype, PLACE_DEVICE, 3, (int64_t[]){ experts, out, in });
    gpu_run(g) fused_call(g, &p);
    separate_call(g, &p);
    gpu_download(g, p.c);
    gpu_download(g, p.y);
    gpu_close(g, p.c, nt ? "h" : "dh", act_bound(DTYPE_BF16, rows * out, in));
    gpu_close(g, p.y, "y", act_bound(DTYPE_BF16, rows * out, in));
    if (!nt) {
        gpu_download(g, p.dprob);
        gpu_close(g, p.dprob, "dprob", (struct gpu_bound){ 4e-3, 1.2e-2 });
    }
    if (time)
        time_in_turn(g, &p,
                     (const struct way[]){ { "product", grouped_call },
                                           { "then activation", separate_call },
                                           { "fused", fused_call } },
                     3);
    gpu_report(g, 0, 2.0 * (double)rows * (double)in * (double)out);
}

static void production_cases(struct gpu_check *g, bool time)
{
    for (int mode = BACKEND_GROUPED_NT; mode <= BACKEND_GROUPED_TN; mode++)
        for (int beta = 0; beta <= (mode == BACKEND_GROUPED_TN); beta++)
            production_case(g, (enum backend_grouped)mode, beta, 128, 49152, 2688, 1856, RANDOM,
                            time);
    production_case(g, BACKEND_GROUPED_NT, 0, 128, 49152, 1856, 2688, RANDOM, time);
    production_case(g, BACKEND_GROUPED_NT, 0, 128, 49152, 2688, 1856, SKEWED, time);
    production_case(g, BACKEND_GROUPED_NT, 0, 64, 49152, 2688, 1856, RANDOM, time);
    for (int beta = 0; beta < 2; beta++)
        production_case(g, BACKEND_GROUPED_TN, beta, 64, 49152, 2688, 1856, RANDOM, time);
    for (int64_t experts = 64; experts <= 128; experts *= 2) {
        act_production_case(g, BACKEND_GROUPED_NT, experts, time);
        act_production_case(g, BACKEND_GROUPED_NN, experts, time);
    }
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
