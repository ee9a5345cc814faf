/* gpu_dense.c - additions, activations, column sums and norms of the CUDA backend against the
 * reference. */
#include <stdio.h>
#include "gpu_check.h"

static const double EPS = 1e-5;

static double volume(int64_t rows, int64_t cols)
{
    return (double)rows * (double)cols;
}

static double width(enum dtype dtype)
{
    return (double)dtype_bytes(dtype);
}

static void add_case(struct gpu_check *g, enum dtype x_type, enum dtype y_type, int64_t rows,
                     int64_t cols)
{
    if (!gpu_case(g, "add", "%lldx%lld %s to %s", (long long)rows, (long long)cols,
                  dtype_name(x_type), dtype_name(y_type)))
        return;
    struct gpu_tensor *x = gpu_matrix(g, x_type, rows, cols),
                      *y = gpu_matrix(g, y_type, rows, cols);
    gpu_normal(g, x, 1);
    gpu_normal(g, y, 1);
    gpu_inout(y);
    gpu_run(g) cuda_add(g->stream, &x->dev, &y->dev);
    backend_ref_f32.add(g->cpu, &x->host, &y->host);
    gpu_close(g, y, "y", gpu_rounding(y_type));
    gpu_report(g, volume(rows, cols) * (width(x_type) + 2 * width(y_type)), 0);
}

static void add_bias_case(struct gpu_check *g, enum dtype dtype, int64_t rows, int64_t cols)
{
    if (!gpu_case(g, "add_bias", "%lldx%lld %s", (long long)rows, (long long)cols,
                  dtype_name(dtype)))
        return;
    struct gpu_tensor *bias = gpu_vector(g, dtype, cols), *y = gpu_matrix(g, dtype, rows, cols);
    gpu_normal(g, bias, 1);
    gpu_normal(g, y, 1);
    gpu_inout(y);
    gpu_run(g) cuda_add_bias(g->stream, &bias->dev, &y->dev);
    backend_ref_f32.add_bias(g->cpu, &bias->host, &y->host);
    gpu_close(g, y, "y", gpu_rounding(dtype));
    gpu_report(g, volume(rows, cols) * 2 * width(dtype), 0);
}

static void bias_backward_case(struct gpu_check *g, enum dtype dtype, int64_t rows, int64_t cols)
{
    if (!gpu_case(g, "bias_backward", "%lldx%lld %s", (long long)rows, (long long)cols,
                  dtype_name(dtype)))
        return;
    struct gpu_tensor *dy = gpu_matrix(g, dtype, rows, cols),
                      *dbias = gpu_vector(g, DTYPE_F32, cols);
    gpu_normal(g, dy, 1);
    gpu_normal(g, dbias, 1);
    gpu_inout(dbias);
    gpu_run(g) cuda_bias_backward(g->stream, &dy->dev, &dbias->dev);
    backend_ref_f32.bias_backward(g->cpu, &dy->host, &dbias->host);
    gpu_close(g, dbias, "dbias", gpu_rounding(DTYPE_F32));
    gpu_report(g, volume(rows, cols) * width(dtype), 0);
}

/* Arguments reach far into both tails; y may be x and dx may be dy. */
static void activation_case(struct gpu_check *g, enum backend_activation f, bool same,
                            enum dtype dtype, int64_t rows, int64_t cols)
{
    const char *name = f == BACKEND_GELU ? "gelu" : "relu2";
    if (gpu_case(g, "activation_forward", "%s%s %lldx%lld %s", name, same ? " in place" : "",
                 (long long)rows, (long long)cols, dtype_name(dtype))) {
        struct gpu_tensor *x = gpu_matrix(g, dtype, rows, cols),
                          *y = same ? x : gpu_matrix(g, dtype, rows, cols);
        gpu_normal(g, x, 3);
        if (same)
            gpu_inout(x);
        gpu_run(g) cuda_activation_forward(g->stream, f, &x->dev, &y->dev);
        backend_ref_f32.activation_forward(g->cpu, f, &x->host, &y->host);
        gpu_close(g, y, "y", gpu_rounding(dtype));
        gpu_report(g, volume(rows, cols) * 2 * width(dtype), 0);
    }
    if (gpu_case(g, "activation_backward", "%s%s %lldx%lld %s", name, same ? " in place" : "",
                 (long long)rows, (long long)cols, dtype_name(dtype))) {
        struct gpu_tensor *x = gpu_matrix(g, dtype, rows, cols),
                          *dy = gpu_matrix(g, dtype, rows, cols);
        struct gpu_tensor *dx = same ? dy : gpu_matrix(g, dtype, rows, cols);
        gpu_normal(g, x, 3);
        gpu_normal(g, dy, 1);
        if (same)
            gpu_inout(dy);
        gpu_run(g) cuda_activation_backward(g->stream, f, &x->dev, &dy->dev, &dx->dev);
        backend_ref_f32.activation_backward(g->cpu, f, &x->host, &dy->host, &dx->host);
        gpu_close(g, dx, "dx", gpu_rounding(dtype));
        gpu_report(g, volume(rows, cols) * 3 * width(dtype), 0);
    }
}

static void norm_forward_case(struct gpu_check *g, bool layernorm, enum dtype dtype, int64_t rows,
                              int64_t cols)
{
    if (!gpu_case(g, layernorm ? "layernorm_forward" : "rmsnorm_forward", "%lldx%lld %s",
                  (long long)rows, (long long)cols, dtype_name(dtype)))
        return;
    struct gpu_tensor *x = gpu_matrix(g, dtype, rows, cols), *w = gpu_vector(g, dtype, cols),
                      *b = gpu_vector(g, dtype, cols);
    struct gpu_tensor *y = gpu_matrix(g, dtype, rows, cols), *mean = gpu_vector(g, DTYPE_F32, rows),
                      *rs = gpu_vector(g, DTYPE_F32, rows);
    gpu_uniform(g, x, -1, 3); /* the mean is as large as the spread */
    gpu_uniform(g, w, 0.5, 1.5);
    gpu_normal(g, b, 1);
    gpu_run(g)
    {
        if (layernorm)
            cuda_layernorm_forward(g->stream, &x->dev, &w->dev, &b->dev, EPS, &y->dev, &mean->dev,
                                   &rs->dev);
        else
            cuda_rmsnorm_forward(g->stream, &x->dev, &w->dev, EPS, &y->dev, &rs->dev);
    }
    if (layernorm) {
        backend_ref_f32.layernorm_forward(g->cpu, &x->host, &w->host, &b->host, EPS, &y->host,
                                          &mean->host, &rs->host);
        gpu_close(g, mean, "mean", gpu_summing(DTYPE_F32, cols));
    } else
        backend_ref_f32.rmsnorm_forward(g->cpu, &x->host, &w->host, EPS, &y->host, &rs->host);
    /* A row of a single element has no spread: its difference from its mean is 0. */
    gpu_close(g, rs, "rs", gpu_summing(DTYPE_F32, cols));
    gpu_close(g, y, "y", gpu_summing(dtype, cols));
    gpu_report(g, volume(rows, cols) * 2 * width(dtype), 0);
}

static void norm_backward_case(struct gpu_check *g, bool layernorm, bool frozen, enum dtype dtype,
                               int64_t rows, int64_t cols)
{
    if (!gpu_case(g, layernorm ? "layernorm_backward" : "rmsnorm_backward", "%lldx%lld %s%s",
                  (long long)rows, (long long)cols, dtype_name(dtype), frozen ? " frozen" : ""))
        return;
    struct gpu_tensor *x = gpu_matrix(g, dtype, rows, cols), *w = gpu_vector(g, dtype, cols),
                      *dy = gpu_matrix(g, dtype, rows, cols);
    struct gpu_tensor *mean = gpu_vector(g, DTYPE_F32, rows), *rs = gpu_vector(g, DTYPE_F32, rows);
    struct gpu_tensor *dx = gpu_matrix(g, dtype, rows, cols), *dw = gpu_vector(g, DTYPE_F32, cols),
                      *db = gpu_vector(g, DTYPE_F32, cols);
    gpu_uniform(g, x, -1, 3);
    gpu_uniform(g, w, 0.5, 1.5);
    gpu_normal(g, dy, 1);
    gpu_uniform(g, mean, 0.8, 1.2);
    gpu_uniform(g, rs, 0.5, 1);
    gpu_normal(g, dx, 1);
    gpu_normal(g, dw, 1);
    gpu_normal(g, db, 1);
    gpu_inout(dx);
    if (!frozen)
        gpu_inout(dw);
    if (!frozen && layernorm)
        gpu_inout(db);
    gpu_run(g)
    {
        if (layernorm)
            cuda_layernorm_backward(g->stream, &x->dev, &w->dev, &mean->dev, &rs->dev, &dy->dev,
                                    &dx->dev, frozen ? NULL : &dw->dev, frozen ? NULL : &db->dev);
        else
            cuda_rmsnorm_backward(g->stream, &x->dev, &w->dev, &rs->dev, &dy->dev, &dx->dev,
                                  frozen ? NULL : &dw->dev);
    }
    if (layernorm)
        backend_ref_f32.layernorm_backward(g->cpu, &x->host, &w->host, &mean->host, &rs->host,
                                           &dy->host, &dx->host, frozen ? NULL : &dw->host,
                                           frozen ? NULL : &db->host);
    else
        backend_ref_f32.rmsnorm_backward(g->cpu, &x->host, &w->host, &rs->host, &dy->host,
                                         &dx->host, frozen ? NULL : &dw->host);
    gpu_close(g, dx, "dx", gpu_summing(dtype, cols));
    if (!frozen)
        gpu_close(g, dw, "dw", gpu_summing(DTYPE_F32, rows / 64));
    if (!frozen && layernorm)
        gpu_close(g, db, "db", gpu_summing(DTYPE_F32, rows / 64));
    gpu_report(g, volume(rows, cols) * 4 * width(dtype), 0);
}

static void all_of(struct gpu_check *g, int64_t rows, int64_t cols)
{
    static const enum dtype type[] = { DTYPE_BF16, DTYPE_F32 };
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 2; j++)
            add_case(g, type[i], type[j], rows, cols);
        add_bias_case(g, type[i], rows, cols);
        bias_backward_case(g, type[i], rows, cols);
        for (int same = 0; same < 2; same++) {
            activation_case(g, BACKEND_RELU2, same, type[i], rows, cols);
            activation_case(g, BACKEND_GELU, same, type[i], rows, cols);
        }
        for (int layernorm = 0; layernorm < 2 && cols > 1; layernorm++) {
            norm_forward_case(g, layernorm, type[i], rows, cols);
            norm_backward_case(g, layernorm, false, type[i], rows, cols);
            norm_backward_case(g, layernorm, true, type[i], rows, cols);
        }
    }
}

/* Widths and heights of the LM (2688) and of RADIO (1280, 5120). */
static void production(struct gpu_check *g)
{
    const enum dtype h = DTYPE_BF16;
    add_case(g, h, h, 8192, 2688);
    add_case(g, h, DTYPE_F32, 8192, 2688);
    add_bias_case(g, h, 16392, 5120);
    bias_backward_case(g, h, 16392, 5120);
    bias_backward_case(g, h, 16392, 1280);
    activation_case(g, BACKEND_RELU2, false, h, 8192, 3712);
    activation_case(g, BACKEND_GELU, true, h, 16392, 5120);
    norm_forward_case(g, false, h, 8192, 2688);
    norm_backward_case(g, false, false, h, 8192, 2688);
    norm_backward_case(g, false, true, h, 8192, 2688);
    norm_forward_case(g, true, h, 16392, 1280);
    norm_backward_case(g, true, false, h, 16392, 1280);
    norm_forward_case(g, false, h, 4096, 5120);
    norm_backward_case(g, false, false, h, 4096, 5120);
    norm_forward_case(g, false, DTYPE_F32, 8192, 2688);
    norm_backward_case(g, false, false, DTYPE_F32, 8192, 2688);
}

int main(int argc, char **argv)
{
    static const int64_t shapes[][2] = { { 1, 1 },      { 0, 8 },     { 5, 0 },     { 3, 5 },
                                         { 7, 8 },      { 64, 64 },   { 37, 100 },  { 1, 1280 },
                                         { 251, 1283 }, { 600, 256 }, { 33, 2688 }, { 9, 4104 },
                                         { 11, 9001 },  { 3, 32768 }, { 2000, 3 } };
    static const int layout[][2] = { { 0, 0 }, { 8, 8 }, { 3, 1 } };
    struct gpu_check *g = gpu_check_start(argc, argv);
    for (size_t l = 0; l < sizeof layout / sizeof *layout; l++) {
        gpu_layout(g, layout[l][0], layout[l][1]);
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
            all_of(g, shapes[i][0], shapes[i][1]);
    }
    gpu_layout(g, 0, 0);
    if (gpu_production(g))
        production(g);
    return gpu_check_end(g);
}
