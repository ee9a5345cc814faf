/* gpu_mamba.c - convolution and gated norm of the Mamba-2 layer against the reference. */
#include <stdlib.h>
#include "check.h"
#include "gpu_check.h"

/* A handful of bf16 numbers may all be rounded by half a unit, 2^-8. */
static struct gpu_bound outputs(enum dtype dtype, int64_t sums, int64_t n)
{
    struct gpu_bound b = gpu_summing(dtype, sums);
    if (dtype == DTYPE_BF16 && n < 1000)
        b.frobenius = 0.0042;
    return b;
}

/* Segments of a batch: first rows in cu[0..n], an empty one among them. */
static int64_t cut(struct gpu_check *g, struct gpu_tensor *cu, int64_t rows)
{
    int32_t *first = cu->host.data;
    const int64_t n = tensor_numel(&cu->host) - 1;
    int64_t longest = 0;
    first[0] = 0;
    for (int64_t i = 1; i <= n; i++) {
        const int64_t even = rows * i / n,
                      shifted = even - (i < n && rows > n ? (int64_t)(gpu_random(g) % 3) : 0);
        first[i] = (int32_t)(i == n ? rows : shifted > first[i - 1] ? shifted : first[i - 1]);
    }
    if (n > 2)
        first[2] = first[1];
    for (int64_t i = 0; i < n; i++)
        longest = first[i + 1] - first[i] > longest ? first[i + 1] - first[i] : longest;
    gpu_upload(g, cu);
    return longest;
}

static void conv_case(struct gpu_check *g, enum dtype dtype, int64_t rows, int64_t cols,
                      int64_t taps, int64_t segments, bool frozen)
{
    for (int backward = 0; backward < 2; backward++) {
        if (!gpu_case(g, backward ? "conv_backward" : "conv_forward",
                      "%lldx%lld taps %lld, %lld segments %s%s pad %d", (long long)rows,
                      (long long)cols, (long long)taps, (long long)segments, dtype_name(dtype),
                      frozen ? " frozen" : "", g->pad))
            continue;
        struct gpu_tensor *x = gpu_matrix(g, dtype, rows, cols),
                          *y = gpu_matrix(g, dtype, rows, cols),
                          *cu = gpu_vector(g, DTYPE_I32, segments + 1);
        const int pad = g->pad, offset = g->offset;
        gpu_layout(g, 0, 0);
        struct gpu_tensor *w = gpu_matrix(g, dtype, cols, taps), *b = gpu_vector(g, dtype, cols);
        const int64_t longest = cut(g, cu, rows);
        gpu_normal(g, x, 1);
        gpu_normal(g, w, 0.5);
        gpu_normal(g, b, 0.5);
        if (!backward) {
            gpu_run(g)
                cuda_conv_forward(g->stream, &x->dev, &w->dev, &b->dev, &cu->dev, longest, &y->dev);
            backend_ref_f32.conv_forward(g->cpu, &x->host, &w->host, &b->host, &cu->host, longest,
                                         &y->host);
            gpu_close(g, y, "y", outputs(dtype, 200, rows * cols));
            gpu_report(g, 2.0 * (double)(rows * cols) * (double)dtype_bytes(dtype), 0);
        } else {
            struct gpu_tensor *dw = gpu_matrix(g, DTYPE_F32, cols, taps),
                              *db = gpu_vector(g, DTYPE_F32, cols);
            gpu_layout(g, pad, offset);
            struct gpu_tensor *dy = gpu_matrix(g, dtype, rows, cols);
            gpu_normal(g, dy, 1);
            gpu_normal(g, dw, 1);
            gpu_normal(g, db, 1);
            if (!frozen) {
                gpu_inout(dw);
                gpu_inout(db);
            }
            gpu_run(g) cuda_conv_backward(g->stream, &x->dev, &w->dev, &b->dev, &cu->dev, longest,
                                          &dy->dev, &y->dev, frozen ? NULL : &dw->dev,
                                          frozen ? NULL : &db->dev);
            backend_ref_f32.conv_backward(g->cpu, &x->host, &w->host, &b->host, &cu->host, longest,
                                          &dy->host, &y->host, frozen ? NULL : &dw->host,
                                          frozen ? NULL : &db->host);
            gpu_close(g, y, "dx", outputs(dtype, 200, rows * cols));
            if (!frozen) {
                gpu_close(g, dw, "dw", gpu_summing(DTYPE_F32, rows + 1000));
                gpu_close(g, db, "db", gpu_summing(DTYPE_F32, rows + 1000));
            }
            gpu_report(g, 3.0 * (double)(rows * cols) * (double)dtype_bytes(dtype), 0);
        }
        gpu_layout(g, pad, offset);
    }
}

static void gated_case(struct gpu_check *g, enum dtype dtype, int64_t rows, int64_t cols,
                       int groups, bool frozen)
{
    for (int backward = 0; backward < 2; backward++) {
        if (!gpu_case(g, backward ? "gated_norm_backward" : "gated_norm_forward",
                      "%lldx%lld groups %d %s%s pad %d", (long long)rows, (long long)cols, groups,
                      dtype_name(dtype), frozen ? " frozen" : "", g->pad))
            continue;
        struct gpu_tensor *y = gpu_matrix(g, dtype, rows, cols),
                          *z = gpu_matrix(g, dtype, rows, cols), *w = gpu_vector(g, dtype, cols),
                          *rs = gpu_matrix(g, DTYPE_F32, rows, groups),
                          *o = gpu_matrix(g, dtype, rows, cols);
        const double eps = 1e-5;
        gpu_normal(g, y, 1);
        gpu_normal(g, z, 2);
        gpu_uniform(g, w, 0.5, 1.5);
        if (!backward) {
            gpu_run(g) cuda_gated_norm_forward(g->stream, &y->dev, &z->dev, &w->dev, groups, eps,
                                               &o->dev, &rs->dev);
            backend_ref_f32.gated_norm_forward(g->cpu, &y->host, &z->host, &w->host, groups, eps,
                                               &o->host, &rs->host);
            gpu_close(g, o, "o", outputs(dtype, 200, rows * cols));
            gpu_close(g, rs, "rs", gpu_summing(DTYPE_F32, 1000));
            gpu_report(g, 3.0 * (double)(rows * cols) * (double)dtype_bytes(dtype), 0);
            continue;
        }
        backend_ref_f32.gated_norm_forward(g->cpu, &y->host, &z->host, &w->host, groups, eps,
                                           &o->host, &rs->host);
        gpu_upload(g, rs);
        gpu_normal(g, o, 1); /* the gradient of the output */
        struct gpu_tensor *dy = gpu_matrix(g, dtype, rows, cols),
                          *dz = gpu_matrix(g, dtype, rows, cols),
                          *dw = gpu_vector(g, DTYPE_F32, cols);
        gpu_normal(g, dw, 1);
        if (!frozen)
            gpu_inout(dw);
        gpu_run(g) cuda_gated_norm_backward(g->stream, &y->dev, &z->dev, &w->dev, groups, &rs->dev,
                                            &o->dev, &dy->dev, &dz->dev, frozen ? NULL : &dw->dev);
        backend_ref_f32.gated_norm_backward(g->cpu, &y->host, &z->host, &w->host, groups, &rs->host,
                                            &o->host, &dy->host, &dz->host,
                                            frozen ? NULL : &dw->host);
        gpu_close(g, dy, "dy", outputs(dtype, 1000, rows * cols));
        gpu_close(g, dz, "dz", outputs(dtype, 1000, rows * cols));
        if (!frozen)
            gpu_close(g, dw, "dw", gpu_summing(DTYPE_F32, rows + 1000));
        gpu_report(g, 5.0 * (double)(rows * cols) * (double)dtype_bytes(dtype), 0);
    }
}

struct scan {
    int64_t rows, segments;
    int heads, head_dim, groups, state, chunk;
};

/* Rates as a trained model has them: del between 1e-3 and 1, A between -16 and -1. */
static void scan_case(struct gpu_check *g, enum dtype dtype, const struct scan *a, bool frozen)
{
    const int64_t inner = (int64_t)a->heads * a->head_dim,
                  wide = inner + 2 * (int64_t)a->groups * a->state;
    for (int backward = 0; backward < 2; backward++) {
        if (!gpu_case(
                g, backward ? "ssd_backward" : "ssd_forward",
                "%lld rows %lld segments heads %d of %d groups %d state %d chunk %d %s%s pad %d",
                (long long)a->rows, (long long)a->segments, a->heads, a->head_dim, a->groups,
                a->state, a->chunk, dtype_name(dtype), frozen ? " frozen" : "", g->pad))
            continue;
        const int64_t elements = backend_sizes_f32.ssd_work(
            a->rows, a->segments, a->heads, a->head_dim, a->groups, a->state, a->chunk);
        const int64_t host_elements = backend_ref_f32.ssd_work(
            a->rows, a->segments, a->heads, a->head_dim, a->groups, a->state, a->chunk);
        struct gpu_tensor *xbc = gpu_matrix(g, dtype, a->rows, wide),
                          *dt = gpu_matrix(g, dtype, a->rows, a->heads),
                          *y = gpu_matrix(g, dtype, a->rows, inner);
        struct gpu_tensor *bias = gpu_vector(g, dtype, a->heads),
                          *a_log = gpu_vector(g, dtype, a->heads),
                          *skip = gpu_vector(g, dtype, a->heads);
        struct gpu_tensor *cu = gpu_vector(g, DTYPE_I32, a->segments + 1);
        const int pad = g->pad, offset = g->offset;
        gpu_layout(g, 0, 0);
        struct gpu_tensor *memory = gpu_device_only(g, DTYPE_F32, 1, elements);
        gpu_layout(g, pad, offset);
        const struct tensor work = tensor_1d(memory->dev.data, DTYPE_F32, PLACE_DEVICE, elements);
        struct tensor host_work = tensor_1d(xmalloc((size_t)host_elements + 1, sizeof(float)),
                                            DTYPE_F32, PLACE_HOST, host_elements);
        const int64_t longest = cut(g, cu, a->rows);
        gpu_normal(g, xbc, 0.5);
        gpu_normal(g, dt, 1);
        gpu_uniform(g, bias, -6, -2);
        gpu_uniform(g, a_log, 0, 2.77);
        gpu_normal(g, skip, 1);
        const double traffic =
            (double)dtype_bytes(dtype) * (double)a->rows * (double)(wide + inner);
        if (!backward) {
            gpu_run(g) cuda_ssd_forward(g->stream, &xbc->dev, &dt->dev, &bias->dev, &a_log->dev,
                                        &skip->dev, &cu->dev, longest, a->heads, a->head_dim,
                                        a->groups, a->state, a->chunk, &work, &y->dev);
            backend_ref_f32.ssd_forward(g->cpu, &xbc->host, &dt->host, &bias->host, &a_log->host,
                                        &skip->host, &cu->host, longest, a->heads, a->head_dim,
                                        a->groups, a->state, a->chunk, &host_work, &y->host);
            gpu_close(g, y, "y",
                      dtype == DTYPE_BF16 ? (struct gpu_bound){ 6e-3, 0.05 }
                                          : (struct gpu_bound){ 2e-5, 1e-3 });
            gpu_report(g, traffic, 0);
        } else {
            struct gpu_tensor *dxbc = gpu_matrix(g, dtype, a->rows, wide),
                              *ddt = gpu_matrix(g, dtype, a->rows, a->heads);
            struct gpu_tensor *sum[3];
            gpu_normal(g, y, 1); /* its gradient */
            for (int i = 0; i < 3; i++) {
                sum[i] = gpu_vector(g, DTYPE_F32, a->heads);
                gpu_normal(g, sum[i], 1);
                if (!frozen)
                    gpu_inout(sum[i]);
            }
            out_t d0 = frozen ? NULL : &sum[0]->dev, d1 = frozen ? NULL : &sum[1]->dev,
                  d2 = frozen ? NULL : &sum[2]->dev;
            out_t h0 = frozen ? NULL : &sum[0]->host, h1 = frozen ? NULL : &sum[1]->host,
                  h2 = frozen ? NULL : &sum[2]->host;
            gpu_run(g) cuda_ssd_backward(g->stream, &xbc->dev, &dt->dev, &bias->dev, &a_log->dev,
                                         &skip->dev, &cu->dev, longest, a->heads, a->head_dim,
                                         a->groups, a->state, a->chunk, &y->dev, &work, &dxbc->dev,
                                         &ddt->dev, d0, d1, d2);
            backend_ref_f32.ssd_backward(g->cpu, &xbc->host, &dt->host, &bias->host, &a_log->host,
                                         &skip->host, &cu->host, longest, a->heads, a->head_dim,
                                         a->groups, a->state, a->chunk, &y->host, &host_work,
                                         &dxbc->host, &ddt->host, h0, h1, h2);
            const struct gpu_bound bf16 = { 8e-3, 0.1 }, fp32 = { 5e-5, 5e-3 };
            gpu_close(g, dxbc, "dxbc", dtype == DTYPE_BF16 ? bf16 : fp32);
            gpu_close(g, ddt, "ddt", dtype == DTYPE_BF16 ? bf16 : fp32);
            for (int i = 0; i < 3 && !frozen; i++)
                gpu_close(g, sum[i],
                          i == 0   ? "ddt_bias"
                          : i == 1 ? "da_log"
                                   : "dd_skip",
                          dtype == DTYPE_BF16 ? bf16 : (struct gpu_bound){ 1e-4, 1e-3 });
            gpu_report(g, 2 * traffic, 0);
        }
        free(host_work.data);
    }
}

int main(int argc, char **argv)
{
    struct gpu_check *g = gpu_check_start(argc, argv);
    const enum dtype type[] = { DTYPE_F32, DTYPE_BF16 };
    for (int t = 0; t < 2 && gpu_small(g); t++) {
        for (int layout = 0; layout < 3; layout++) {
            gpu_layout(g,
                       layout == 1   ? 3
                       : layout == 2 ? 8
                                     : 0,
                       layout == 1   ? 1
                       : layout == 2 ? 8
                                     : 0);
            conv_case(g, type[t], 1, 1, 4, 1, false);
            conv_case(g, type[t], 64, 96, 4, 3, false);
            conv_case(g, type[t], 131, 257, 4, 7, false);
            conv_case(g, type[t], 131, 256, 4, 2, true);
            conv_case(g, type[t], 67, 40, 3, 4, false);
            conv_case(g, type[t], 0, 40, 4, 1, false);
            gated_case(g, type[t], 1, 8, 1, false);
            gated_case(g, type[t], 64, 64, 2, false);
            gated_case(g, type[t], 131, 3 * 37, 3, false);
            gated_case(g, type[t], 17, 8 * 1280, 8, false);
            gated_case(g, type[t], 33, 1024, 2, true);
            gated_case(g, type[t], 0, 64, 2, false);
        }
        static const struct scan scans[] = {
            { 1, 1, 2, 8, 1, 16, 16 },      { 64, 2, 8, 8, 2, 16, 16 },
            { 131, 5, 6, 7, 3, 11, 24 },    { 300, 1, 4, 64, 2, 128, 128 },
            { 517, 4, 8, 64, 2, 128, 128 }, { 40, 1, 4, 80, 2, 128, 128 },
            { 129, 1, 4, 64, 1, 128, 128 },
        };
        for (int layout = 0; layout < 2; layout++) {
            gpu_layout(g, layout * 8, layout * 8);
            for (size_t i = 0; i < sizeof scans / sizeof *scans; i++)
                scan_case(g, type[t], &scans[i], i == 3 && layout == 1);
        }
        gpu_layout(g, 3, 1);
        scan_case(g, type[t], &scans[4], false);
        gpu_layout(g, 0, 0);
    }
    if (gpu_production(g)) {
        scan_case(g, DTYPE_BF16, &(struct scan){ 8192, 1, 64, 64, 8, 128, 128 }, false);
        gpu_layout(g, 4160, 4096); /* x B C lie behind z in rows of 10304 */
        conv_case(g, DTYPE_BF16, 8192, 6144, 4, 1, false);
        gpu_layout(g, 0, 0);
        gated_case(g, DTYPE_BF16, 8192, 4096, 8, false);
    }
    return gpu_check_end(g);
}
