/* test_ref_rows.c - row gathers, the merged embedding and the encoder's token assembly of the
 * reference backend. */
#include "ref_check.h"
#include "vit_map.h"

static const enum dtype real_dtype[2] = { DTYPE_F32, DTYPE_F64 };

static struct tensor index_of(int64_t rows, int64_t cols, const int *values)
{
    struct tensor t = ref_check_matrix(DTYPE_I32, rows, cols, 0);
    REF_CHECK_EACH(&t, r, c)
    ref_check_set(&t, r, c, *values++);
    return t;
}

static void free_all(struct tensor **all, size_t n)
{
    for (size_t i = 0; i < n; i++)
        ref_check_free(all[i]);
}
#define FREE(...) \
    free_all((struct tensor *[]){ __VA_ARGS__ }, \
             sizeof(struct tensor *[]){ __VA_ARGS__ } / sizeof(void *))

static void gather_rows_copies_and_zeroes(void **state)
{
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct ref_check_random rng = { 1 };
        struct tensor in = ref_check_matrix(real_dtype[fp64], 5, 7, 2),
                      out = ref_check_matrix(real_dtype[fp64], 6, 7, 3);
        struct tensor index = index_of(6, 1, (int[]){ 4, -1, 0, 0, 3, -2 });
        ref_check_fill_random(&in, &rng, -1, 1);
        REF_CHECK_OP(fp64, gather_rows)(NULL, &in, &index, &out);
        REF_CHECK_EACH(&out, r, c)
        {
            int64_t from = (int64_t)ref_check_get(&index, r, 0);
            assert_true(ref_check_get(&out, r, c) == (from >= 0 ? ref_check_get(&in, from, c) : 0));
        }
        ref_check_padding(&out, "gather_rows");
        struct tensor none = ref_check_matrix(real_dtype[fp64], 0, 7, 0),
                      no_index = ref_check_vector(DTYPE_I32, 0);
        REF_CHECK_OP(fp64, gather_rows)(NULL, &none, &no_index, &none);
        FREE(&in, &out, &index, &none, &no_index);
    }
}

/* Backward of gather_rows through a map that uses a row up to twice: gather_sum_rows with the
 * inverse map. */
struct gather_context {
    struct tensor index, inverse;
    double beta;
};

static void gather_forward(bool fp64, const struct tensor *in, const struct tensor *out,
                           const void *context)
{
    const struct gather_context *g = context;
    REF_CHECK_OP(fp64, gather_rows)(NULL, &in[0], &g->index, &out[0]);
}

static void gather_backward(bool fp64, const struct tensor *in, const struct tensor *out,
                            const struct tensor *dout, const struct tensor *din,
                            const void *context)
{
    const struct gather_context *g = context;
    REF_CHECK_OP(fp64, gather_sum_rows)(NULL, &dout[0], &g->inverse, g->beta, &din[0]);
}

static void gather_rows_gradient_is_gather_sum_rows(void **state)
{
    struct gather_context g = { index_of(6, 1, (int[]){ 4, -1, 0, 0, 3, 4 }),
                                index_of(5, 2, (int[]){ 2, 3, -1, -1, -1, -1, 4, -1, 0, 5 }), 0 };
    for (int i = 0; i < 4; i++) {
        int64_t cols = i < 2 ? 7 : 523;
        struct ref_check_random rng = { 2 };
        struct ref_check_case c = { .name = "gather_rows",
                                    .n_in = 1,
                                    .n_out = 1,
                                    .n_weighted = 1,
                                    .accumulates = i & 1,
                                    .forward = gather_forward,
                                    .backward = gather_backward,
                                    .context = &g,
                                    .in = { ref_check_matrix(DTYPE_F64, 5, cols, 1) },
                                    .out = { ref_check_matrix(DTYPE_F64, 6, cols, 2) } };
        g.beta = i & 1;
        ref_check_fill_random(&c.in[0], &rng, -1, 1);
        ref_check_gradients(&c, 81);
        ref_check_case_free(&c);
    }
    FREE(&g.index, &g.inverse);
}

static void gather_sum_rows_rounds_once(void **state)
{
    /* 2^24 + 1 + 1 is 2^24 when every addition is rounded to fp32, 2^24 + 2 when only the sum is */
    struct tensor in = ref_check_matrix(DTYPE_F32, 2, 1, 0),
                  out = ref_check_matrix(DTYPE_F32, 1, 1, 0);
    struct tensor index = index_of(1, 3, (int[]){ 0, 1, 1 });
    ref_check_fill_values(&in, (double[]){ 16777216, 1 });
    ref_gather_sum_rows_f32(NULL, &in, &index, 0, &out);
    ref_check_value(ref_check_get(&out, 0, 0), 16777218, 0, "sum of three rows");
    ref_gather_sum_rows_f32(NULL, &in, &index, 1, &out);
    ref_check_value(ref_check_get(&out, 0, 0), 33554436, 0, "added to what was there");
    FREE(&in, &out, &index);
}

/* ---- merged embedding ---- */

struct embed_context {
    struct tensor ids, image_row;
    int64_t first;
};

static struct embed_context embed_context(void)
{
    /* rank that owns ids 10..15; ids repeat, lie below, above and far outside; three pictures rows,
     * out of order */
    static const double id[11] = { 10, 15, 9, 16, 12, 499, 12, 499, 499, -1, 12 };
    struct embed_context e = { ref_check_vector(DTYPE_I64, 11),
                               index_of(11, 1, (int[]){ -1, -1, -1, -1, -1, 2, -1, 0, 1, -1, -1 }),
                               10 };
    ref_check_fill_values(&e.ids, id);
    return e;
}

static void embed_forward(bool fp64, const struct tensor *in, const struct tensor *out,
                          const void *context)
{
    const struct embed_context *e = context;
    REF_CHECK_OP(fp64, embed_merge_forward)
    (NULL, &e->ids, &e->image_row, &in[0], e->first, &in[1], &out[0]);
}

static void embed_backward(bool fp64, const struct tensor *in, const struct tensor *out,
                           const struct tensor *dout, const struct tensor *din, const void *context)
{
    const struct embed_context *e = context;
    REF_CHECK_OP(fp64, embed_merge_backward)
    (NULL, &e->ids, &e->image_row, &dout[0], e->first, &din[0], &din[1]);
}

static void embed_merge_gradients(void **state)
{
    struct embed_context e = embed_context();
    struct ref_check_random rng = { 3 };
    struct ref_check_case c = { .name = "embed_merge",
                                .n_in = 2,
                                .n_out = 1,
                                .n_weighted = 1,
                                .accumulates = 1,
                                .forward = embed_forward,
                                .backward = embed_backward,
                                .context = &e,
                                .in = { ref_check_matrix(DTYPE_F64, 6, 5, 2),
                                        ref_check_matrix(DTYPE_F64, 3, 5, 1) },
                                .out = { ref_check_matrix(DTYPE_F64, 11, 5, 3) } };
    ref_check_fill_random(&c.in[0], &rng, -1, 1);
    ref_check_fill_random(&c.in[1], &rng, -1, 1);
    ref_check_gradients(&c, 82);
    ref_check_case_free(&c);
    FREE(&e.ids, &e.image_row);
}

static void p12_35_embed_merge_places_text_and_pictures(void **state)
{
    struct embed_context e = embed_context();
    static const int from_table[11] = { 0, 5, -1, -1, 2, -1, 2, -1, -1, -1, 2 };
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct ref_check_random rng = { 4 };
        struct tensor table = ref_check_matrix(real_dtype[fp64], 6, 5, 2),
                      image = ref_check_matrix(real_dtype[fp64], 3, 5, 0);
        struct tensor out = ref_check_matrix(real_dtype[fp64], 11, 5, 0);
        ref_check_fill_random(&table, &rng, -1, 1);
        ref_check_fill_random(&image, &rng, -1, 1);
        REF_CHECK_OP(fp64, embed_merge_forward)
        (NULL, &e.ids, &e.image_row, &table, e.first, &image, &out);
        REF_CHECK_EACH(&out, r, c)
        {
            int64_t picture = (int64_t)ref_check_get(&e.image_row, r, 0);
            double expected = picture >= 0         ? ref_check_get(&image, picture, c)
                              : from_table[r] >= 0 ? ref_check_get(&table, from_table[r], c)
                                                   : 0;
            assert_true(ref_check_get(&out, r, c) == expected);
        }
        FREE(&table, &image, &out);
    }
    FREE(&e.ids, &e.image_row);
}

static void embed_merge_adds_repeated_ids_in_token_order(void **state)
{
    /* ((2^24 + 1) + 1) - 2^24 is 0 in fp32 in this order; any other order or a double sum gives 1
     * or 2 */
    struct tensor ids = ref_check_vector(DTYPE_I64, 4),
                  text = index_of(4, 1, (int[]){ -1, -1, -1, -1 });
    struct tensor dout = ref_check_matrix(DTYPE_F32, 4, 1, 0),
                  dtable = ref_check_matrix(DTYPE_F32, 1, 1, 0);
    ref_check_fill(&ids, 0);
    ref_check_fill(&dtable, 0);
    ref_check_fill_values(&dout, (double[]){ 16777216, 1, 1, -16777216 });
    ref_embed_merge_backward_f32(NULL, &ids, &text, &dout, 0, &dtable, NULL);
    ref_check_value(ref_check_get(&dtable, 0, 0), 0, 0, "ascending tokens");
    ref_check_fill_values(&dout, (double[]){ 16777216, -16777216, 1, 1 });
    ref_embed_merge_backward_f32(NULL, &ids, &text, &dout, 0, &dtable, NULL);
    ref_check_value(ref_check_get(&dtable, 0, 0), 2, 0, "another order of the same numbers");
    FREE(&ids, &text, &dout, &dtable);
}

static void embed_merge_frozen_table_and_text_only(void **state)
{
    struct embed_context e = embed_context();
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct ref_check_random rng = { 5 };
        struct tensor dout = ref_check_matrix(real_dtype[fp64], 11, 5, 0),
                      dimage = ref_check_matrix(real_dtype[fp64], 3, 5, 1);
        struct tensor table = ref_check_matrix(real_dtype[fp64], 6, 5, 0),
                      dtable = ref_check_matrix(real_dtype[fp64], 6, 5, 0);
        struct tensor none = ref_check_matrix(real_dtype[fp64], 0, 5, 0),
                      text = ref_check_vector(DTYPE_I32, 11);
        ref_check_fill_random(&dout, &rng, -1, 1);
        ref_check_fill_random(&table, &rng, -1, 1);
        REF_CHECK_OP(fp64, embed_merge_backward)
        (NULL, &e.ids, &e.image_row, &dout, e.first, NULL, &dimage);
        REF_CHECK_EACH(&dimage, r, c)
        assert_true(ref_check_get(&dimage, r, c) == ref_check_get(&dout, (int[]){ 7, 8, 5 }[r], c));
        /* pictures without a wanted gradient must not reach the table, whatever their id */
        ref_check_fill(&dtable, 0);
        REF_CHECK_OP(fp64, embed_merge_backward)
        (NULL, &e.ids, &e.image_row, &dout, 499, &dtable, NULL);
        REF_CHECK_EACH(&dtable, r, c)
        assert_true(ref_check_get(&dtable, r, c) == 0);
        /* m6_30: a batch without pictures, with an empty picture tensor */
        ref_check_fill(&text, -1);
        REF_CHECK_OP(fp64, embed_merge_forward)(NULL, &e.ids, &text, &table, e.first, &none, &dout);
        REF_CHECK_OP(fp64, embed_merge_backward)
        (NULL, &e.ids, &text, &dout, e.first, &dtable, &none);
        for (int c = 0; c < 5; c++) {
            assert_true(ref_check_get(&dout, 5, c) == 0);
            assert_true(ref_check_get(&dtable, 0, c) == ref_check_get(&table, 0, c));
        }
        FREE(&dout, &dimage, &table, &dtable, &none, &text);
    }
    FREE(&e.ids, &e.image_row);
}

/* ---- encoder rows ---- */

enum { GRID = 4, TILES = 3, CLASSES = 2, WIDTH = 5 };
static const int32_t tile_size[TILES][2] = { { 2, 4 }, { 4, 4 }, { 6, 2 } };

struct vit_context {
    struct tensor source, index, weight[2];
}; /* weight by fp64 */

static struct vit_context vit_context(bool augment)
{
    int64_t patches = vit_map_patches(tile_size, TILES), at = 0;
    struct vit_context v = { ref_check_vector(DTYPE_I32, vit_map_rows(tile_size, TILES, CLASSES)),
                             ref_check_matrix(DTYPE_I32, patches, 4, 0),
                             { ref_check_matrix(DTYPE_F32, patches, 4, 0),
                               ref_check_matrix(DTYPE_F64, patches, 4, 0) } };
    double cpe[4];
    vit_map_cpe(0.3, 0.8, 0.9, 0.2, cpe);
    for (int i = 0; i < TILES; at += tile_size[i][0] * tile_size[i][1], i++)
        vit_map_positions(tile_size[i][0], tile_size[i][1], GRID, GRID, WIDTH, augment ? cpe : NULL,
                          (int32_t *)v.index.data + 4 * at, (double *)v.weight[1].data + 4 * at);
    ref_check_convert(&v.weight[1], &v.weight[0]);
    vit_map_sources(tile_size, TILES, CLASSES, v.source.data);
    return v;
}

static void vit_forward(bool fp64, const struct tensor *in, const struct tensor *out,
                        const void *context)
{
    const struct vit_context *v = context;
    REF_CHECK_OP(fp64, vit_assemble_forward)
    (NULL, &in[0], &in[1], &in[2], &v->source, &v->index, &v->weight[fp64], &out[0]);
}

static void vit_backward(bool fp64, const struct tensor *in, const struct tensor *out,
                         const struct tensor *dout, const struct tensor *din, const void *context)
{
    const struct vit_context *v = context;
    REF_CHECK_OP(fp64, vit_assemble_backward)
    (NULL, &dout[0], &v->source, &v->index, &v->weight[fp64], &din[0], &din[1], &din[2]);
}

static void vit_assemble_gradients(void **state)
{
    for (int augment = 0; augment < 2; augment++) {
        struct vit_context v = vit_context(augment);
        struct ref_check_random rng = { 6 };
        struct ref_check_case c = {
            .name = "vit_assemble",
            .n_in = 3,
            .n_out = 1,
            .n_weighted = 1,
            .accumulates = 6,
            .forward = vit_forward,
            .backward = vit_backward,
            .context = &v,
            .in = { ref_check_matrix(DTYPE_F64, tensor_rows(&v.index), WIDTH, 1),
                    ref_check_matrix(DTYPE_F64, CLASSES, WIDTH, 2),
                    ref_check_matrix(DTYPE_F64, GRID * GRID, WIDTH, 3) },
            .out = { ref_check_matrix(DTYPE_F64, tensor_numel(&v.source), WIDTH, 1) }
        };
        for (int i = 0; i < 3; i++)
            ref_check_fill_random(&c.in[i], &rng, -1, 1);
        ref_check_gradients(&c, 83);
        ref_check_case_free(&c);
        FREE(&v.source, &v.index, &v.weight[0], &v.weight[1]);
    }
}

static void m6_03_tile_of_the_grid_size_gets_the_raw_grid(void **state)
{
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct vit_context v = vit_context(true);
        struct ref_check_random rng = { 7 };
        enum dtype t = real_dtype[fp64];
        struct tensor e = ref_check_matrix(t, tensor_rows(&v.index), WIDTH, 0),
                      cls = ref_check_matrix(t, CLASSES, WIDTH, 0);
        struct tensor grid = ref_check_matrix(t, GRID * GRID, WIDTH, 0),
                      x = ref_check_matrix(t, tensor_numel(&v.source), WIDTH, 0);
        ref_check_fill_random(&cls, &rng, -1, 1);
        ref_check_fill_random(&grid, &rng, -1, 1);
        ref_check_fill(&e, 0);
        REF_CHECK_OP(fp64, vit_assemble_forward)
        (NULL, &e, &cls, &grid, &v.source, &v.index, &v.weight[fp64], &x);
        /* rows: 2 classes, 8 patches, then 2 classes and the 16 patches of the 4x4 tile */
        for (int64_t r = 0; r < CLASSES; r++)
            for (int64_t c = 0; c < WIDTH; c++) {
                assert_true(ref_check_get(&x, r, c) == ref_check_get(&cls, r, c));
                assert_true(ref_check_get(&x, 10 + r, c) == ref_check_get(&cls, r, c));
            }
        REF_CHECK_EACH(&grid, p, c)
        assert_true(ref_check_get(&x, 12 + p, c) == ref_check_get(&grid, p, c));
        FREE(&v.source, &v.index, &v.weight[0], &v.weight[1], &e, &cls, &grid, &x);
    }
}

static void vit_assemble_of_no_tiles(void **state)
{
    for (int fp64 = 0; fp64 < 2; fp64++) {
        enum dtype t = real_dtype[fp64];
        struct tensor none = ref_check_matrix(t, 0, WIDTH, 0),
                      cls = ref_check_matrix(t, CLASSES, WIDTH, 0);
        struct tensor grid = ref_check_matrix(t, GRID * GRID, WIDTH, 0),
                      source = ref_check_vector(DTYPE_I32, 0);
        struct tensor index = ref_check_matrix(DTYPE_I32, 0, 4, 0),
                      weight = ref_check_matrix(t, 0, 4, 0);
        ref_check_fill(&cls, 0.5);
        ref_check_fill(&grid, 0.5);
        REF_CHECK_OP(fp64, vit_assemble_forward)
        (NULL, &none, &cls, &grid, &source, &index, &weight, &none);
        REF_CHECK_OP(fp64, vit_assemble_backward)
        (NULL, &none, &source, &index, &weight, &none, &cls, &grid);
        REF_CHECK_EACH(&grid, r, c)
        assert_true(ref_check_get(&grid, r, c) == 0.5);
        FREE(&none, &cls, &grid, &source, &index, &weight);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gather_rows_copies_and_zeroes),
        cmocka_unit_test(gather_rows_gradient_is_gather_sum_rows),
        cmocka_unit_test(gather_sum_rows_rounds_once),
        cmocka_unit_test(embed_merge_gradients),
        cmocka_unit_test(p12_35_embed_merge_places_text_and_pictures),
        cmocka_unit_test(embed_merge_adds_repeated_ids_in_token_order),
        cmocka_unit_test(embed_merge_frozen_table_and_text_only),
        cmocka_unit_test(vit_assemble_gradients),
        cmocka_unit_test(m6_03_tile_of_the_grid_size_gets_the_raw_grid),
        cmocka_unit_test(vit_assemble_of_no_tiles),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
