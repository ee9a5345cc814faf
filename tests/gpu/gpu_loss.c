/* gpu_loss.c - cross entropy, optimizer and the encoder's token rows against the reference. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "gpu_check.h"

static void loss_case(struct gpu_check *g, enum dtype dtype, int64_t rows, int64_t cols,
                      int64_t first)
{
    const char *shape = "%lldx%lld from %lld %s pad %d";
    for (int op = 0; op < 3; op++) {
        static const char *const name[] = { "loss_sum", "loss_label", "loss_backward" };
        if (!gpu_case(g, name[op], shape, (long long)rows, (long long)cols, (long long)first,
                      dtype_name(dtype), g->pad))
            continue;
        struct gpu_tensor *x = gpu_matrix(g, dtype, rows, cols),
                          *label = gpu_vector(g, DTYPE_I64, rows),
                          *mask = gpu_vector(g, DTYPE_F32, rows);
        struct gpu_tensor *own = gpu_vector(g, DTYPE_F32, rows),
                          *se = gpu_vector(g, DTYPE_F32, rows);
        gpu_normal(g, x, 3);
        gpu_integers(g, label, first - 3, first + cols + 3); /* some belong to other ranks */
        for (int64_t i = 0; i < rows; i++)
            ((float *)mask->host.data)[i] = (float)(gpu_random(g) % 3 != 0);
        gpu_upload(g, mask);
        if (op == 0) {
            gpu_run(g) cuda_loss_sum(g->stream, &x->dev, &own->dev, &se->dev);
            backend_ref_f32.loss_sum(g->cpu, &x->host, &own->host, &se->host);
            gpu_close(g, own, "mx", (struct gpu_bound){ 0, 0 });
            gpu_close(g, se, "se", gpu_summing(DTYPE_F32, cols + 200));
            gpu_report(g, (double)(rows * cols) * (double)dtype_bytes(dtype), 0);
            continue;
        }
        backend_ref_f32.loss_sum(g->cpu, &x->host, &own->host, &se->host);
        gpu_upload(g, own);
        gpu_upload(g, se);
        struct gpu_tensor *picked = gpu_vector(g, DTYPE_F32, rows);
        if (op == 1) {
            struct gpu_tensor *mx = gpu_vector(g, DTYPE_F32, rows);
            for (int64_t i = 0; i < rows; i++) /* of another rank's words, or of these */
                ((float *)mx->host.data)[i] =
                    ((float *)own->host.data)[i] + (float)(gpu_random(g) % 5);
            gpu_upload(g, mx);
            gpu_inout(se);
            gpu_run(g) cuda_loss_label(g->stream, &x->dev, &label->dev, first, &own->dev, &mx->dev,
                                       &se->dev, &picked->dev);
            backend_ref_f32.loss_label(g->cpu, &x->host, &label->host, first, &own->host, &mx->host,
                                       &se->host, &picked->host);
            gpu_close(g, se, "se", gpu_rounding(DTYPE_F32));
            gpu_close(g, picked, "pl", gpu_rounding(DTYPE_F32));
            gpu_report(g, 0, 0);
            continue;
        }
        gpu_inout(x);
        gpu_run(g) cuda_loss_backward(g->stream, &label->dev, first, &own->dev, &se->dev,
                                      &mask->dev, &x->dev);
        backend_ref_f32.loss_backward(g->cpu, &label->host, first, &own->host, &se->host,
                                      &mask->host, &x->host);
        gpu_close(g, x, "dlogits",
                  dtype == DTYPE_BF16 ? (struct gpu_bound){ 4.2e-3, 5e-3 }
                                      : (struct gpu_bound){ 2e-6, 2e-5 });
        gpu_report(g, 2.0 * (double)(rows * cols) * (double)dtype_bytes(dtype), 0);
    }
}

/* Rows that training may meet: -infinity among numbers, nothing else, +infinity, not a number. */
static void odd_logits_case(struct gpu_check *g, enum dtype dtype)
{
    enum { ROWS = 6, COLS = 70001 };
    if (!gpu_case(g, "loss_sum", "infinities %s pad %d", dtype_name(dtype), g->pad))
        return;
    struct gpu_tensor *x = gpu_matrix(g, dtype, ROWS, COLS), *mx = gpu_vector(g, DTYPE_F32, ROWS),
                      *se = gpu_vector(g, DTYPE_F32, ROWS);
    gpu_normal(g, x, 3);
    float *v = x->host.data;
    for (int64_t i = 0; i < COLS; i++) {
        v[i] = i % 3 || i < 40000 ? -INFINITY : v[i];
        v[COLS + i] = i == COLS - 1 ? 2.5f : -INFINITY;
    }
    v[2 * COLS + 4711] = INFINITY;
    v[3 * COLS + 4711] = NAN;
    v[4 * COLS + 4711] = 300;
    gpu_upload(g, x);
    gpu_run(g) cuda_loss_sum(g->stream, &x->dev, &mx->dev, &se->dev);
    backend_ref_f32.loss_sum(g->cpu, &x->host, &mx->host, &se->host);
    for (int64_t r = 0; r < ROWS; r++) { /* not a number has many patterns */
        float got, *want = (float *)se->host.data + r;
        memcpy(&got, se->got + se->begin + (size_t)r * sizeof got, sizeof got);
        if (isnan(got) != isnan(*want))
            gpu_fail(g, "se[%lld]: got %g, want %g", (long long)r, (double)got, (double)*want);
        if (isnan(*want)) {
            const float zero = 0;
            memcpy(se->got + se->begin + (size_t)r * sizeof zero, &zero, sizeof zero);
            *want = 0;
        }
    }
    gpu_equal(g, mx, "mx");
    gpu_close(g, se, "se", gpu_summing(DTYPE_F32, COLS + 200));
    gpu_report(g, 0, 0);
}

static void finish_case(struct gpu_check *g, int64_t rows)
{
    if (!gpu_case(g, "loss_finish", "%lld", (long long)rows))
        return;
    struct gpu_tensor *se = gpu_vector(g, DTYPE_F32, rows), *pl = gpu_vector(g, DTYPE_F32, rows),
                      *mask = gpu_vector(g, DTYPE_F32, rows),
                      *loss = gpu_vector(g, DTYPE_F32, rows), *total = gpu_vector(g, DTYPE_F32, 1);
    gpu_uniform(g, se, 1, 1e4);
    gpu_uniform(g, pl, -9, 0);
    gpu_uniform(g, mask, 0, 1);
    gpu_uniform(g, total, 10, 20);
    gpu_inout(total);
    gpu_run(g) cuda_loss_finish(g->stream, &se->dev, &pl->dev, &mask->dev, &loss->dev, &total->dev);
    backend_ref_f32.loss_finish(g->cpu, &se->host, &pl->host, &mask->host, &loss->host,
                                &total->host);
    gpu_close(g, loss, "loss", gpu_rounding(DTYPE_F32));
    gpu_close(g, total, "total", gpu_rounding(DTYPE_F32));
    gpu_report(g, 0, 0);
}

static void statistics_case(struct gpu_check *g, int64_t rows, int64_t cols)
{
    if (gpu_case(g, "sum_squares", "%lldx%lld pad %d", (long long)rows, (long long)cols, g->pad)) {
        struct gpu_tensor *x = gpu_matrix(g, DTYPE_F32, rows, cols),
                          *total = gpu_vector(g, DTYPE_F32, 1);
        gpu_normal(g, x, 1);
        gpu_uniform(g, total, 1, 2);
        gpu_inout(total);
        gpu_run(g) cuda_sum_squares(g->stream, &x->dev, &total->dev);
        backend_ref_f32.sum_squares(g->cpu, &x->host, &total->host);
        gpu_close(g, total, "total", gpu_rounding(DTYPE_F32));
        gpu_report(g, 4.0 * (double)(rows * cols), 0);
    }
    if (gpu_case(g, "count_zeros", "%lldx%lld pad %d", (long long)rows, (long long)cols, g->pad)) {
        struct gpu_tensor *x = gpu_matrix(g, DTYPE_F32, rows, cols),
                          *total = gpu_vector(g, DTYPE_I64, 1);
        gpu_normal(g, x, 1);
        for (int64_t i = 0; i < rows * cols; i += 1 + (int64_t)(gpu_random(g) % 7))
            ((float *)x->host.data)[i] = i % 2 ? 0.0f : -0.0f;
        gpu_upload(g, x);
        gpu_integers(g, total, 5, 6);
        gpu_inout(total);
        gpu_run(g) cuda_count_zeros(g->stream, &x->dev, &total->dev);
        backend_ref_f32.count_zeros(g->cpu, &x->host, &total->host);
        gpu_equal(g, total, "total");
        gpu_report(g, 4.0 * (double)(rows * cols), 0);
    }
}

static void adamw_case(struct gpu_check *g, enum dtype dtype, int64_t n, int64_t step)
{
    if (!gpu_case(g, "adamw", "%lld step %lld %s offset %d", (long long)n, (long long)step,
                  dtype_name(dtype), g->offset))
        return;
    struct gpu_tensor *grad = gpu_vector(g, DTYPE_F32, n), *p = gpu_vector(g, DTYPE_F32, n),
                      *m = gpu_vector(g, DTYPE_F32, n), *v = gpu_vector(g, DTYPE_F32, n),
                      *out = gpu_vector(g, dtype, n), *factor = gpu_vector(g, DTYPE_F64, 1);
    gpu_normal(g, grad, 1);
    *(double *)factor->host.data = 0.25;
    gpu_upload(g, factor);
    gpu_normal(g, p, 1);
    gpu_normal(g, m, 0.1);
    gpu_uniform(g, v, 0, 0.1);
    gpu_inout(p);
    gpu_inout(m);
    gpu_inout(v);
    gpu_run(g) cuda_adamw(g->stream, &grad->dev, &factor->dev, 1e-3, 0.9, 0.95, 1e-8, 0.05, step,
                          &p->dev, &m->dev, &v->dev, &out->dev);
    backend_ref_f32.adamw(g->cpu, &grad->host, &factor->host, 1e-3, 0.9, 0.95, 1e-8, 0.05, step,
                          &p->host, &m->host, &v->host, &out->host);
    gpu_close(g, p, "master", gpu_rounding(DTYPE_F32));
    gpu_close(g, m, "m", gpu_rounding(DTYPE_F32));
    gpu_close(g, v, "v", gpu_rounding(DTYPE_F32));
    gpu_close(g, out, "param",
              dtype == DTYPE_BF16 ? (struct gpu_bound){ 4.2e-3, 4.2e-3 } : gpu_rounding(dtype));
    gpu_report(g, (double)n * (28.0 + (double)dtype_bytes(dtype)), 0);
}

/* Bit by bit as on the host: the decision must not depend on who takes it. */
static void decision_case(struct gpu_check *g, int64_t ranks, double clip, double threshold,
                          double odd)
{
    static const double factor[3] = { 0.0625 / 3, 0.0625 / 7, 1.0 / 4099 };
    if (!gpu_case(g, "decide_update", "%lld ranks, clip %g, threshold %g, one number %g",
                  (long long)ranks, clip, threshold, odd))
        return;
    struct gpu_tensor *numbers = gpu_tensor(g, DTYPE_F64, 2, (int64_t[]){ ranks, 4 }),
                      *result = gpu_vector(g, DTYPE_F64, 6);
    for (int64_t i = 0; i < 4 * ranks; i++)
        ((double *)numbers->host.data)[i] = 1e-9 * (double)(gpu_random(g) >> 12);
    if (odd != 0.0)
        ((double *)numbers->host.data)[gpu_random(g) % (uint64_t)(4 * ranks)] = odd;
    gpu_upload(g, numbers);
    gpu_run(g)
        cuda_decide_update(g->stream, &numbers->dev, 4099, factor, clip, threshold, &result->dev);
    backend_ref_f32.decide_update(g->cpu, &numbers->host, 4099, factor, clip, threshold,
                                  &result->host);
    for (int i = 0; i < 6; i++) { /* not a number has many patterns */
        double got, *want = (double *)result->host.data + i;
        memcpy(&got, result->got + result->begin + (size_t)i * sizeof got, sizeof got);
        if (isnan(got) && isnan(*want))
            *want = got;
    }
    gpu_equal(g, result, "result");
    gpu_report(g, 0, 0);
}

static void sum_wide_case(struct gpu_check *g, int64_t n)
{
    if (!gpu_case(g, "sum_wide", "%lld", (long long)n))
        return;
    struct gpu_tensor *x = gpu_vector(g, DTYPE_F32, n), *total = gpu_vector(g, DTYPE_F64, 1);
    gpu_normal(g, x, 1e3);
    gpu_run(g) cuda_sum_wide(g->stream, &x->dev, &total->dev);
    backend_ref_f32.sum_wide(g->cpu, &x->host, &total->host);
    gpu_equal(g, total, "total");
    gpu_report(g, 0, 0);
}

static void skipped_case(struct gpu_check *g, enum dtype dtype, int64_t n)
{
    if (!gpu_case(g, "adamw", "%lld, no update, %s", (long long)n, dtype_name(dtype)))
        return;
    struct gpu_tensor *grad = gpu_vector(g, DTYPE_F32, n), *p = gpu_vector(g, DTYPE_F32, n),
                      *m = gpu_vector(g, DTYPE_F32, n), *v = gpu_vector(g, DTYPE_F32, n),
                      *out = gpu_vector(g, dtype, n), *factor = gpu_vector(g, DTYPE_F64, 1);
    *(double *)factor->host.data = -1;
    gpu_upload(g, factor);
    gpu_normal(g, grad, 1);
    gpu_normal(g, p, 1);
    gpu_normal(g, m, 0.1);
    gpu_uniform(g, v, 0, 0.1);
    gpu_normal(g, out, 1);
    gpu_inout(p);
    gpu_inout(m);
    gpu_inout(v);
    gpu_inout(out);
    gpu_run(g) cuda_adamw(g->stream, &grad->dev, &factor->dev, 1e-3, 0.9, 0.95, 1e-8, 0.05, 3,
                          &p->dev, &m->dev, &v->dev, &out->dev);
    gpu_close(g, p, "master", (struct gpu_bound){ 0, 0 });
    gpu_close(g, m, "m", (struct gpu_bound){ 0, 0 });
    gpu_close(g, v, "v", (struct gpu_bound){ 0, 0 });
    gpu_close(g, out, "param", (struct gpu_bound){ 0, 0 });
    gpu_report(g, 0, 0);
}

static void bias_case(struct gpu_check *g, int64_t experts)
{
    if (!gpu_case(g, "expert_bias_update", "%lld", (long long)experts))
        return;
    struct gpu_tensor *bias = gpu_vector(g, DTYPE_F32, experts),
                      *count = gpu_vector(g, DTYPE_I64, experts);
    gpu_normal(g, bias, 0.01);
    gpu_integers(g, count, 0, 5);
    gpu_inout(bias);
    gpu_inout(count);
    gpu_run(g) cuda_expert_bias_update(g->stream, 1e-3, &bias->dev, &count->dev);
    backend_ref_f32.expert_bias_update(g->cpu, 1e-3, &bias->host, &count->host);
    gpu_close(g, bias, "bias", (struct gpu_bound){ 0, 0 });
    gpu_equal(g, count, "count");
    gpu_report(g, 0, 0);
}

/* Tiles of h x w patches with `classes` class tokens before each. */
static void assemble_case(struct gpu_check *g, enum dtype dtype, int tiles, int per_tile,
                          int classes, int64_t points, int64_t cols)
{
    for (int backward = 0; backward < 2; backward++) {
        const int64_t patches = (int64_t)tiles * per_tile,
                      rows = patches + (int64_t)tiles * classes;
        if (!gpu_case(g, backward ? "vit_assemble_backward" : "vit_assemble_forward",
                      "%lldx%lld points %lld %s pad %d", (long long)rows, (long long)cols,
                      (long long)points, dtype_name(dtype), g->pad))
            continue;
        struct gpu_tensor *source = gpu_vector(g, DTYPE_I32, rows),
                          *index = gpu_vector(g, DTYPE_I32, 4 * patches),
                          *weight = gpu_vector(g, DTYPE_F32, 4 * patches);
        struct gpu_tensor *x = gpu_matrix(g, dtype, rows, cols),
                          *e = gpu_matrix(g, dtype, patches, cols);
        int32_t *at = source->host.data;
        for (int t = 0, p = 0; t < tiles; t++) {
            for (int j = 0; j < classes; j++)
                *at++ = -1 - j;
            for (int i = 0; i < per_tile; i++)
                *at++ = p++;
        }
        gpu_upload(g, source);
        gpu_integers(g, index, 0, points);
        gpu_uniform(g, weight, 0, 1);
        for (int64_t i = 0; i < 4 * patches; i += 3)
            ((float *)weight->host.data)[i] = 0;
        gpu_upload(g, weight);
        const double bytes = (double)(rows * cols) * (double)dtype_bytes(dtype);
        if (!backward) {
            struct gpu_tensor *classes_of = gpu_matrix(g, dtype, classes, cols),
                              *grid = gpu_matrix(g, dtype, points, cols);
            gpu_normal(g, e, 1);
            gpu_normal(g, classes_of, 1);
            gpu_normal(g, grid, 1);
            gpu_run(g) cuda_vit_assemble_forward(g->stream, &e->dev, &classes_of->dev, &grid->dev,
                                                 &source->dev, &index->dev, &weight->dev, &x->dev);
            backend_ref_f32.vit_assemble_forward(g->cpu, &e->host, &classes_of->host, &grid->host,
                                                 &source->host, &index->host, &weight->host,
                                                 &x->host);
            /* The position is rounded before it is added: two roundings. */
            gpu_close(g, x, "x",
                      dtype == DTYPE_BF16 ? (struct gpu_bound){ 5e-3, 1e-2 } : gpu_rounding(dtype));
            gpu_report(g, 2 * bytes, 0);
        } else {
            struct gpu_tensor *dclass = gpu_matrix(g, DTYPE_F32, classes, cols),
                              *dgrid = gpu_matrix(g, DTYPE_F32, points, cols);
            gpu_normal(g, x, 1);
            gpu_normal(g, dclass, 1);
            gpu_normal(g, dgrid, 1);
            gpu_inout(dclass);
            gpu_inout(dgrid);
            gpu_run(g) cuda_vit_assemble_backward(g->stream, &x->dev, &source->dev, &index->dev,
                                                  &weight->dev, &e->dev, &dclass->dev, &dgrid->dev);
            backend_ref_f32.vit_assemble_backward(g->cpu, &x->host, &source->host, &index->host,
                                                  &weight->host, &e->host, &dclass->host,
                                                  &dgrid->host);
            gpu_close(g, e, "de", (struct gpu_bound){ 0, 0 });
            gpu_close(g, dclass, "dclass", gpu_summing(DTYPE_F32, rows));
            gpu_close(g, dgrid, "dgrid", gpu_summing(DTYPE_F32, rows));
            gpu_report(g, 2 * bytes, 0);
        }
    }
}

int main(int argc, char **argv)
{
    struct gpu_check *g = gpu_check_start(argc, argv);
    const enum dtype type[] = { DTYPE_F32, DTYPE_BF16 };
    for (int layout = 0; layout < 2; layout++) {
        gpu_layout(g, 3 * layout, layout);
        for (int t = 0; t < 2; t++) {
            loss_case(g, type[t], 1, 1, 0);
            loss_case(g, type[t], 64, 512, 0);
            loss_case(g, type[t], 37, 1009, 500);
            loss_case(g, type[t], 5, 40001, 7);
            odd_logits_case(g, type[t]);
            loss_case(g, type[t], 0, 64, 0);
            adamw_case(g, type[t], 1, 1);
            adamw_case(g, type[t], 10007, 3);
            adamw_case(g, type[t], 65536, 1000);
            assemble_case(g, type[t], 1, 1, 1, 3, 8);
            assemble_case(g, type[t], 3, 35, 2, 64, 32);
            assemble_case(g, type[t], 2, 101, 0, 17, 37);
        }
        statistics_case(g, 1, 1);
        statistics_case(g, 37, 1009);
        statistics_case(g, 0, 8);
        finish_case(g, 1);
        finish_case(g, 8191);
        for (int t = 0; t < 2; t++)
            skipped_case(g, type[t], 10007);
        sum_wide_case(g, 0);
        sum_wide_case(g, 1);
        sum_wide_case(g, 300);
        sum_wide_case(g, 1025);
        bias_case(g, 8);
        bias_case(g, 509);
    }
    gpu_layout(g, 0, 0);
    for (int64_t ranks = 1; ranks <= 300; ranks = 7 * ranks + 1) {
        decision_case(g, ranks, 0, 0, 0);
        decision_case(g, ranks, 1, 0, 0);
        decision_case(g, ranks, 1, 1e-3, 0);
        decision_case(g, ranks, 1, 0, INFINITY);
        decision_case(g, ranks, 1, 0, NAN);
    }
    if (gpu_production(g)) {
        loss_case(g, DTYPE_BF16, 1024, 131072, 0);
        adamw_case(g, DTYPE_BF16, 1 << 26, 7);
        statistics_case(g, 1, 1 << 26);
        assemble_case(g, DTYPE_BF16, 1, 16384, 8, 16384, 1280);
    }
    return gpu_check_end(g);
}
