/* gpu_rows.c - gathered rows and merged embeddings of the CUDA backend against the reference. */
#include <stdio.h>
#include "gpu_check.h"

static double volume(int64_t rows, int64_t cols, enum dtype dtype)
{
    return (double)rows * (double)cols * (double)dtype_bytes(dtype);
}

static void gather_case(struct gpu_check *g, enum dtype dtype, int64_t from, int64_t rows,
                        int64_t cols)
{
    if (!gpu_case(g, "gather_rows", "%lld of %lldx%lld %s", (long long)rows, (long long)from,
                  (long long)cols, dtype_name(dtype)))
        return;
    struct gpu_tensor *in = gpu_matrix(g, dtype, from, cols),
                      *index = gpu_vector(g, DTYPE_I32, rows),
                      *out = gpu_matrix(g, dtype, rows, cols);
    gpu_normal(g, in, 1);
    gpu_integers(g, index, -1, from);
    gpu_run(g) cuda_gather_rows(g->stream, &in->dev, &index->dev, &out->dev);
    backend_ref_f32.gather_rows(g->cpu, &in->host, &index->host, &out->host);
    gpu_close(g, out, "out", (struct gpu_bound){ 0, 0 });
    gpu_report(g, volume(from < rows ? from : rows, cols, dtype) + volume(rows, cols, dtype), 0);
}

static void gather_sum_case(struct gpu_check *g, enum dtype dtype, int64_t from, int64_t rows,
                            int64_t k, int64_t cols, double beta)
{
    if (!gpu_case(g, "gather_sum_rows", "%lldx%lld of %lldx%lld %s beta %g", (long long)rows,
                  (long long)k, (long long)from, (long long)cols, dtype_name(dtype), beta))
        return;
    struct gpu_tensor *in = gpu_matrix(g, dtype, from, cols),
                      *out = gpu_matrix(g, dtype, rows, cols);
    struct gpu_tensor *index = gpu_tensor(g, DTYPE_I32, 2, (int64_t[]){ rows, k });
    index->dev.ld = k; /* indices are dense whatever the layout */
    gpu_normal(g, in, 1);
    gpu_integers(g, index, -1, from);
    if (beta != 0) {
        gpu_normal(g, out, 1);
        gpu_inout(out);
    }
    gpu_run(g) cuda_gather_sum_rows(g->stream, &in->dev, &index->dev, beta, &out->dev);
    backend_ref_f32.gather_sum_rows(g->cpu, &in->host, &index->host, beta, &out->host);
    gpu_close(g, out, "out", gpu_rounding(dtype));
    gpu_report(g, volume(rows * k, cols, dtype) + (1 + beta) * volume(rows, cols, dtype), 0);
}

enum pictures { NO_PICTURES, SOME_PICTURES, ONLY_PICTURES };

/* ids: `distinct` different ones, some of other ranks; picture rows in random order, each used
 * once. */
static void embed_case(struct gpu_check *g, enum dtype dtype, int64_t tokens, int64_t table_rows,
                       int64_t distinct, int64_t cols, enum pictures pictures, bool frozen)
{
    const int64_t first = 5;
    struct gpu_tensor *ids, *picture;
    for (int backward = 0; backward < 2; backward++) {
        if (!gpu_case(g, backward ? "embed_merge_backward" : "embed_merge_forward",
                      "%lld tokens of %lldx%lld %lld ids %s%s%s", (long long)tokens,
                      (long long)table_rows, (long long)cols, (long long)distinct,
                      dtype_name(dtype),
                      pictures == NO_PICTURES     ? ""
                      : pictures == SOME_PICTURES ? " pictures"
                                                  : " only pictures",
                      frozen ? " frozen" : ""))
            continue;
        ids = gpu_vector(g, DTYPE_I64, tokens);
        picture = gpu_vector(g, DTYPE_I32, tokens);
        gpu_integers(g, ids, 0, distinct);
        int64_t images = 0;
        for (int64_t t = 0; t < tokens; t++)
            ((int32_t *)picture->host.data)[t] =
                pictures == ONLY_PICTURES || (pictures == SOME_PICTURES && gpu_random(g) % 4 == 0)
                    ? (int32_t)images++
                    : -1;
        for (int64_t t = 0; t < tokens && images > 1; t++) { /* shuffled */
            const int64_t u = (int64_t)(gpu_random(g) % (uint64_t)tokens);
            int32_t *p = picture->host.data, old = p[t];
            if (p[t] >= 0 && p[u] >= 0)
                p[t] = p[u], p[u] = old;
        }
        gpu_upload(g, picture);
        struct gpu_tensor *image = pictures ? gpu_matrix(g, dtype, images, cols) : NULL;
        struct gpu_tensor *out = gpu_matrix(g, dtype, tokens, cols);
        struct gpu_tensor *table = gpu_matrix(g, backward ? DTYPE_F32 : dtype, table_rows, cols);
        gpu_normal(g, table, 1);
        if (backward) {
            gpu_normal(g, out, 1);
            if (!frozen)
                gpu_inout(table);
            gpu_run(g)
                cuda_embed_merge_backward(g->stream, &ids->dev, &picture->dev, &out->dev, first,
                                          frozen ? NULL : &table->dev, image ? &image->dev : NULL);
            backend_ref_f32.embed_merge_backward(g->cpu, &ids->host, &picture->host, &out->host,
                                                 first, frozen ? NULL : &table->host,
                                                 image ? &image->host : NULL);
            if (image)
                gpu_close(g, image, "dimage", (struct gpu_bound){ 0, 0 });
            if (!frozen)
                gpu_close(g, table, "dtable", gpu_summing(DTYPE_F32, tokens));
            if (!frozen || image)
                gpu_report(g,
                           volume(tokens, cols, dtype) +
                               (frozen ? 0
                                       : volume(2 * (tokens < distinct ? tokens : distinct), cols,
                                                DTYPE_F32)),
                           0);
        } else {
            if (image)
                gpu_normal(g, image, 1);
            gpu_run(g) cuda_embed_merge_forward(g->stream, &ids->dev, &picture->dev, &table->dev,
                                                first, image ? &image->dev : NULL, &out->dev);
            backend_ref_f32.embed_merge_forward(g->cpu, &ids->host, &picture->host, &table->host,
                                                first, image ? &image->host : NULL, &out->host);
            gpu_close(g, out, "out", (struct gpu_bound){ 0, 0 });
            gpu_report(g, 2 * volume(tokens, cols, dtype), 0);
        }
    }
}

static void all_of(struct gpu_check *g, int64_t rows, int64_t cols)
{
    static const enum dtype type[] = { DTYPE_BF16, DTYPE_F32 };
    for (int i = 0; i < 2; i++) {
        gather_case(g, type[i], rows / 2 + 1, rows, cols);
        for (int beta = 0; beta < 2; beta++)
            for (int64_t k = 1; k <= 22; k += 7)
                gather_sum_case(g, type[i], rows + 3, rows, k, cols, beta);
        embed_case(g, type[i], rows, 50, 70, cols, NO_PICTURES, false);
        embed_case(g, type[i], rows, 50, 70, cols, SOME_PICTURES, false);
        embed_case(g, type[i], rows, 50, 70, cols, ONLY_PICTURES, false);
        embed_case(g, type[i], rows, 50, 70, cols, ONLY_PICTURES, true);
        /* one token over and over */
        embed_case(g, type[i], rows, 300, 6, cols, SOME_PICTURES, false);
    }
}

int main(int argc, char **argv)
{
    static const int64_t shapes[][2] = { { 1, 1 },     { 0, 8 },      { 5, 0 },    { 7, 8 },
                                         { 37, 100 },  { 251, 1283 }, { 64, 256 }, { 130, 2688 },
                                         { 1000, 72 }, { 9, 5000 } };
    static const int layout[][2] = { { 0, 0 }, { 8, 8 }, { 3, 1 } };
    struct gpu_check *g = gpu_check_start(argc, argv);
    for (size_t l = 0; l < sizeof layout / sizeof *layout; l++) {
        gpu_layout(g, layout[l][0], layout[l][1]);
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
            all_of(g, shapes[i][0], shapes[i][1]);
    }
    gpu_layout(g, 0, 0);
    if (gpu_production(g)) {
        gather_case(g, DTYPE_BF16, 8192, 49152, 2688); /* copies of tokens for their experts */
        gather_sum_case(g, DTYPE_BF16, 49152, 8192, 6, 2688, 1);
        gather_sum_case(g, DTYPE_BF16, 49152, 8192, 6, 2688, 0);
        embed_case(g, DTYPE_BF16, 8192, 131072, 131072, 2688, NO_PICTURES, false);
        embed_case(g, DTYPE_BF16, 8192, 32768, 131072, 2688, SOME_PICTURES, false);
        embed_case(g, DTYPE_BF16, 8192, 32768, 7, 2688, SOME_PICTURES, false);
    }
    return gpu_check_end(g);
}
