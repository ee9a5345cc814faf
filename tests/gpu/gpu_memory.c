/* gpu_memory.c - copies, fills and casts of the CUDA backend against the reference. */
#include <stdio.h>
#include <stdlib.h>
#include "bf16.h"
#include <string.h>
#include "cuda_util.h"
#include "gpu_check.h"

static const int64_t shapes[][2] = { { 1, 1 },    { 0, 5 },      { 3, 0 },     { 7, 13 },
                                     { 64, 256 }, { 251, 1009 }, { 1, 100003 } };

static void copy_case(struct gpu_check *g, enum dtype dtype, int64_t rows, int64_t cols)
{
    if (!gpu_case(g, "copy", "%lldx%lld %s", (long long)rows, (long long)cols, dtype_name(dtype)))
        return;
    struct gpu_tensor *x = gpu_matrix(g, dtype, rows, cols), *y = gpu_matrix(g, dtype, rows, cols);
    gpu_normal(g, x, 1);
    gpu_run(g) cuda_copy(g->stream, &x->dev, &y->dev);
    backend_ref_f32.copy(g->cpu, &x->host, &y->host);
    gpu_close(g, y, "y", (struct gpu_bound){ 0, 0 });
    gpu_report(g, 2.0 * (double)(rows * cols) * (double)dtype_bytes(dtype), 0);
}

static void fill_case(struct gpu_check *g, enum dtype dtype, int64_t rows, int64_t cols,
                      double value)
{
    if (!gpu_case(g, "fill", "%lldx%lld %s %g", (long long)rows, (long long)cols, dtype_name(dtype),
                  value))
        return;
    struct gpu_tensor *y = gpu_matrix(g, dtype, rows, cols);
    gpu_run(g) cuda_fill(g->stream, &y->dev, value);
    backend_ref_f32.fill(g->cpu, &y->host,
                         dtype == DTYPE_BF16 ? bf16_to_float(bf16_from_double(value)) : value);
    if (dtype == DTYPE_F32 || dtype == DTYPE_BF16)
        gpu_close(g, y, "y", (struct gpu_bound){ 0, 0 });
    else
        gpu_equal(g, y, "y");
    gpu_report(g, (double)(rows * cols) * (double)dtype_bytes(dtype), 0);
}

/* fp32 values of all magnitudes: the rounding itself is compared bit by bit. */
static void cast_case(struct gpu_check *g, enum dtype from, enum dtype to, int64_t rows,
                      int64_t cols)
{
    if (!gpu_case(g, "cast", "%lldx%lld %s to %s", (long long)rows, (long long)cols,
                  dtype_name(from), dtype_name(to)))
        return;
    struct gpu_tensor *x = gpu_matrix(g, from, rows, cols), *y = gpu_matrix(g, to, rows, cols);
    gpu_normal(g, x, 1);
    gpu_run(g) cuda_cast(g->stream, &x->dev, &y->dev);
    struct tensor rounded = y->host;
    if (to == DTYPE_BF16) {
        rounded.dtype = DTYPE_BF16;
        backend_ref_f32.cast(g->cpu, &x->host, &rounded);
        struct gpu_tensor *wide = gpu_matrix(g, DTYPE_F32, rows, cols);
        backend_ref_f32.cast(g->cpu, &rounded, &wide->host);
        gpu_close_rows(g, y, "y", NULL, rows, &wide->host, (struct gpu_bound){ 0, 0 });
    } else {
        backend_ref_f32.cast(g->cpu, &x->host, &y->host);
        gpu_close(g, y, "y", (struct gpu_bound){ 0, 0 });
    }
    gpu_report(g, (double)(rows * cols) * (double)(dtype_bytes(from) + dtype_bytes(to)), 0);
}

/* From the host through pinned memory: what the source holds at the call arrives, whatever becomes
 * of it after. */
static void upload_case(struct gpu_check *g, int64_t rows, int64_t cols, int64_t pad)
{
    if (!gpu_case(g, "copy", "%lldx%lld from the host, rows %lld apart", (long long)rows,
                  (long long)cols, (long long)(cols + pad)))
        return;
    struct gpu_tensor *x = gpu_matrix(g, DTYPE_F32, rows, cols),
                      *y = gpu_matrix(g, DTYPE_F32, rows, cols);
    const int64_t ld = cols + pad;
    float *source = xmalloc((size_t)(rows * ld) + 1, sizeof *source);
    struct tensor from = tensor_2d(source, DTYPE_F32, PLACE_HOST, rows, cols);
    from.ld = ld;
    gpu_normal(g, x, 1);
    gpu_run(g)
    {
        for (int64_t r = 0; r < rows; r++)
            memcpy(source + r * ld, (float *)x->host.data + r * cols,
                   (size_t)cols * sizeof *source);
        cuda_copy(g->stream, &from, &y->dev);
        memset(source, 0xCC, (size_t)(rows * ld) * sizeof *source);
    }
    backend_ref_f32.copy(g->cpu, &x->host, &y->host);
    gpu_close(g, y, "y", (struct gpu_bound){ 0, 0 });
    gpu_report(g, 0, 0);
    free(source);
}

static void all_of(struct gpu_check *g, int64_t rows, int64_t cols)
{
    const enum dtype type[] = { DTYPE_F32, DTYPE_BF16 };
    for (int i = 0; i < 2; i++) {
        copy_case(g, type[i], rows, cols);
        for (int j = 0; j < 2; j++)
            cast_case(g, type[i], type[j], rows, cols);
        fill_case(g, type[i], rows, cols, -1.7182818284590452);
    }
    fill_case(g, DTYPE_F32, rows, cols, 0);
    fill_case(g, DTYPE_I32, rows, cols, -7);
    fill_case(g, DTYPE_I64, rows, cols, 123456789012.0);
}

int main(int argc, char **argv)
{
    struct gpu_check *g = gpu_check_start(argc, argv);
    for (int layout = 0; layout < 2; layout++) {
        gpu_layout(g, layout * 3, layout);
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
            all_of(g, shapes[i][0], shapes[i][1]);
    }
    cuda_staging_start(cuda_context_of(g->stream));
    for (int layout = 0; layout < 2; layout++) {
        gpu_layout(g, layout * 3, layout);
        for (int64_t pad = 0; pad < 8; pad += 7) {
            upload_case(g, 1, 1, pad);
            upload_case(g, 0, 5, pad);
            upload_case(g, 251, 1009, pad);
            upload_case(g, 3000, 1009, pad);  /* 12 MB: several pieces */
            upload_case(g, 40000, 1009, pad); /* 161 MB: more than a round of them */
            upload_case(g, 3, 1100000, pad);  /* rows of more than a piece */
        }
    }
    gpu_layout(g, 0, 0);
    if (gpu_production(g))
        all_of(g, 8192, 10304);
    return gpu_check_end(g);
}
