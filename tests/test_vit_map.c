/* test_vit_map.c - position-grid points and row maps of the encoder (model.md 2.3, 2.4, 2.6)
 * against its golden values. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include "vit_map.h"

struct points {
    int32_t *index;
    double *weight;
    int w;
}; /* [h*w, 4] of one tile */

static struct points positions(int h, int w, int gh, int gw, int64_t width, const double *cpe)
{
    size_t n = (size_t)h * (size_t)w * 4;
    struct points p = { malloc(n * sizeof(int32_t)), malloc(n * sizeof(double)), w };
    assert_true(p.index != NULL && p.weight != NULL);
    vit_map_positions(h, w, gh, gw, width, cpe, p.index, p.weight);
    return p;
}

static void points_free(struct points *p)
{
    free(p->index);
    free(p->weight);
}

static void near(double value, double expected, double tolerance)
{
    if (!(fabs(value - expected) <= tolerance))
        fail_msg("%.15g, expected %.15g", value, expected);
}

/* The columns of patch (0, dst): i0, i1 and the weight of i1; in a row whose own interpolation has
 * any weights. */
static void expect_column(const struct points *p, int dst, int i0, int i1, double weight, int gw)
{
    const int32_t *index = p->index + 4 * dst;
    const double *w = p->weight + 4 * dst;
    assert_int_equal(index[0] % gw, i0);
    assert_int_equal(index[2] % gw, i0);
    assert_int_equal(index[1] % gw, i1);
    assert_int_equal(index[3] % gw, i1);
    near(w[1] + w[3], weight, 1e-14);
    near(w[0] + w[2], 1 - weight, 1e-14);
}

static void expect_row(const struct points *p, int dst, int i0, int i1, double weight, int gw)
{
    const int32_t *index = p->index + 4 * dst * p->w;
    const double *w = p->weight + 4 * dst * p->w;
    assert_int_equal(index[0] / gw, i0);
    assert_int_equal(index[1] / gw, i0);
    assert_int_equal(index[2] / gw, i1);
    assert_int_equal(index[3] / gw, i1);
    near(w[2] + w[3], weight, 1e-14);
    near(w[0] + w[1], 1 - weight, 1e-14);
}

static void m6_03_resize_golden_values_without_aligned_corners(void **state)
{
    static const struct {
        int grid, m, dst[3], i0[3], i1[3];
        double weight[3];
    } golden[4] = {
        { 16, 12, { 0, 1, 11 }, { 0, 1, 14 }, { 1, 2, 15 }, { 1.0 / 6, 0.5, 5.0 / 6 } },
        { 128, 32, { 0, 1, 31 }, { 1, 5, 125 }, { 2, 6, 126 }, { 0.5, 0.5, 0.5 } },
        { 128, 48, { 0, 1, 47 }, { 0, 3, 126 }, { 1, 4, 127 }, { 5.0 / 6, 0.5, 1.0 / 6 } },
        { 4, 6, { 0, 1, 5 }, { 0, 0, 3 }, { 1, 1, 3 }, { 0, 0.5, 1.0 / 6 } },
    };
    for (int i = 0; i < 4; i++) {
        struct points p =
            positions(golden[i].m, golden[i].m, golden[i].grid, golden[i].grid, 1280, NULL);
        for (int j = 0; j < 3; j++) {
            expect_column(&p, golden[i].dst[j], golden[i].i0[j], golden[i].i1[j],
                          golden[i].weight[j], golden[i].grid);
            expect_row(&p, golden[i].dst[j], golden[i].i0[j], golden[i].i1[j], golden[i].weight[j],
                       golden[i].grid);
        }
        points_free(&p);
    }
}

/* Only one of the four points counts, and it is (row, col) of the grid. */
static void expect_raw(const struct points *p, int patch, int row, int col, int gw)
{
    assert_int_equal(p->index[4 * patch], row * gw + col);
    for (int k = 0; k < 4; k++)
        assert_true(p->weight[4 * patch + k] == (k == 0 ? 1 : 0));
}

static void m6_03_grid_sized_tile_is_raw_and_wide_tile_uses_its_top_rows(void **state)
{
    double cpe[4];
    vit_map_cpe(0.1, 0.9, 0.3, 0.6, cpe);
    for (int i = 0; i < 3; i++) {
        /* 128x128 in evaluation and in training; 64x128 in evaluation: rows 0..63 unresized */
        int h = i == 2 ? 64 : 128;
        struct points p = positions(h, 128, 128, 128, 1280, i == 1 ? cpe : NULL);
        for (int r = 0; r < h; r++)
            for (int c = 0; c < 128; c++)
                expect_raw(&p, r * 128 + c, r, c, 128);
        points_free(&p);
    }
    /* a 2x5 grid is raw for a 2x5 tile only; other tiles are resized from the whole grid per axis
     */
    struct points p = positions(2, 5, 2, 5, 32, cpe);
    expect_raw(&p, 9, 1, 4, 5);
    points_free(&p);
    p = positions(4, 4, 2, 5, 32, NULL);
    expect_column(&p, 0, 0, 1, 0.125, 5);
    expect_row(&p, 0, 0, 1, 0, 5);
    expect_row(&p, 1, 0, 1, 0.25, 5);
    points_free(&p);
}

static void m6_03_non_square_tile_is_the_window_of_the_square_resize(void **state)
{
    /* 12x7 of a 16x16 grid: the columns are those of a 12x12 resize, not of a resize to 7 */
    struct points square = positions(12, 12, 16, 16, 32, NULL),
                  tall = positions(12, 7, 16, 16, 32, NULL);
    for (int r = 0; r < 12; r++)
        for (int c = 0; c < 7; c++) {
            assert_memory_equal(tall.index + 4 * (r * 7 + c), square.index + 4 * (r * 12 + c),
                                4 * sizeof(int32_t));
            assert_memory_equal(tall.weight + 4 * (r * 7 + c), square.weight + 4 * (r * 12 + c),
                                4 * sizeof(double));
        }
    points_free(&square);
    points_free(&tall);
}

static void m6_03_huge_tile_crops_the_grid_to_its_aspect_ratio(void **state)
{
    /* width 1280: m = 1295 still takes the window of the square resize, m = 1296 crops 128 rows to
     * ceil(128*2/1296) = 1 */
    struct points below = positions(2, 1295, 128, 128, 1280, NULL),
                  above = positions(2, 1296, 128, 128, 1280, NULL);
    expect_row(&below, 1, 0, 1, 0, 128);
    assert_true(below.index[4 * 1294 + 2] / 128 == 1);
    for (int i = 0; i < 2 * 1296 * 4; i++)
        assert_true(above.index[i] / 128 == 0);
    expect_column(&above, 1295, 127, 127, 0.5 - 64.0 / 1296, 128);
    points_free(&below);
    points_free(&above);
    /* the same switch at small sizes through the width: 6x8 on a 16x16 grid crops to 12 rows and
     * resizes 12 -> 6 and 16 -> 8 */
    struct points p = positions(6, 8, 16, 16, INT64_C(33554432), NULL);
    expect_row(&p, 0, 0, 1, 0.5, 16);
    expect_row(&p, 5, 10, 11, 0.5, 16);
    expect_column(&p, 7, 14, 15, 0.5, 16);
    points_free(&p);
    /* ... the short axis rounded up: 5x8 keeps 10 rows, 3x8 on a 15x15 grid ceil(5.625) = 6 rows
     * resized to 3 */
    p = positions(3, 8, 15, 15, INT64_C(33554432), NULL);
    expect_row(&p, 2, 4, 5, 0.5, 15);
    points_free(&p);
    /* a square tile: nothing is cropped */
    struct points square = positions(8, 8, 16, 16, INT64_C(33554432), NULL),
                  plain = positions(8, 8, 16, 16, 32, NULL);
    assert_memory_equal(square.index, plain.index, 256 * sizeof(int32_t));
    assert_memory_equal(square.weight, plain.weight, 256 * sizeof(double));
    points_free(&square);
    points_free(&plain);
}

static void m6_03_cpe_golden_columns_with_aligned_corners(void **state)
{
    static const double column[4] = { 21.709768, 49.569923, 77.430077, 105.290232 };
    double cpe[4];
    vit_map_cpe(0.5, 0.5, 0.5, 0.25, cpe);
    near(cpe[0], 0.658113883, 1e-9);
    near(cpe[1], 0.658113883, 1e-9);
    near(cpe[2], 0.170943058, 1e-9);
    near(cpe[3], 0.25 * (1 - 0.658113883), 1e-9);
    struct points p = positions(3, 4, 128, 128, 1280, cpe);
    for (int j = 0; j < 4; j++) {
        int i0 = (int)floor(column[j]);
        const double *w = p.weight + 4 * j;
        assert_int_equal(p.index[4 * j] % 128, i0);
        assert_int_equal(p.index[4 * j + 1] % 128, i0 + 1);
        near(w[1] + w[3], column[j] - i0, 1e-6);
        near(w[0] + w[1] + w[2] + w[3], 1, 1e-14);
    }
    /* rows: off_y at the top, off_y + scale_y at the bottom, of 127 */
    double top = cpe[3] * 127, bottom = (cpe[3] + cpe[1]) * 127;
    expect_row(&p, 0, (int)floor(top), (int)floor(top) + 1, top - floor(top), 128);
    expect_row(&p, 2, (int)floor(bottom), (int)floor(bottom) + 1, bottom - floor(bottom), 128);
    points_free(&p);
}

static void cpe_of_the_largest_scale_stays_on_the_grid(void **state)
{
    /* scale 1 in both: the corners are the grid's corners; a single row or column samples at the
     * offset */
    static const double whole[4] = { 1, 1, 0, 0 }, shifted[4] = { 0.5, 0.5, 0.5, 0.25 };
    struct points p = positions(5, 9, 16, 16, 32, whole);
    double sum = 0;
    for (int i = 0; i < 4; i++)
        sum += p.weight[4 * 44 + i] * (p.index[4 * 44 + i] == 255);
    near(sum, 1, 1e-14);
    for (int i = 0; i < 45 * 4; i++)
        assert_true(p.index[i] >= 0 && p.index[i] < 256);
    points_free(&p);
    p = positions(1, 1, 9, 9, 32, shifted);
    assert_int_equal(p.index[0], 2 * 9 + 4);
    near(p.weight[0], 1, 1e-14);
    points_free(&p);
    double cpe[4];
    vit_map_cpe(0.999999, 0.999999, 0.999999, 0.999999, cpe); /* scale_x clamps to 1 */
    near(cpe[0], 1, 0);
    near(cpe[2], 0, 0);
    assert_true(cpe[1] > 0.74 && cpe[1] < 0.76);
}

static void cpe_outside_the_grid_is_zero(void **state)
{
    static const double far[4] = { 1, 1, 0.5,
                                   0 }; /* not a draw of vit_map_cpe: the right half lies outside */
    struct points p = positions(2, 3, 9, 9, 32, far);
    for (int i = 0; i < 4; i++)
        assert_true(p.weight[4 * 2 + i] == 0 && p.index[4 * 2 + i] >= 0);
    near(p.weight[4], 1, 1e-14); /* the middle column lies on the last grid column */
    points_free(&p);
}

static void m6_05_pixel_shuffle_golden_on_a_non_square_tile(void **state)
{
    static const int32_t tile[1][2] = { { 4, 6 } };
    static const int32_t golden[3][5] = { { 0, 0, 1, 6, 7 },
                                          { 1, 2, 3, 8, 9 },
                                          { 3, 12, 13, 18, 19 } };
    int32_t row[24];
    assert_int_equal(vit_map_outputs(tile, 1, 0, true, true), 6);
    vit_map_output_rows(tile, 1, 0, true, true, row);
    for (int i = 0; i < 3; i++)
        assert_memory_equal(row + 4 * golden[i][0], golden[i] + 1, 4 * sizeof(int32_t));
    /* the formula of 2.6, every element */
    for (int r = 0; r < 2; r++)
        for (int q = 0; q < 3; q++)
            for (int dr = 0; dr < 2; dr++)
                for (int dq = 0; dq < 2; dq++)
                    assert_int_equal(row[(r * 3 + q) * 4 + 2 * dr + dq],
                                     (2 * r + dr) * 6 + 2 * q + dq);
}

static void m6_06_p12_102_class_tokens_are_removed_per_tile(void **state)
{
    static const int32_t tile[2][2] = { { 2, 2 },
                                        { 2, 4 } }; /* rows: c c 0..3 c c 4..11 with c = 2 */
    static const int32_t shuffled[12] = { 2, 3, 4, 5, 8, 9, 12, 13, 10, 11, 14, 15 };
    int32_t row[16];
    assert_int_equal(vit_map_outputs(tile, 2, 2, true, true), 3);
    vit_map_output_rows(tile, 2, 2, true, true, row);
    assert_memory_equal(row, shuffled, sizeof shuffled);
    assert_int_equal(vit_map_outputs(tile, 2, 2, true, false), 12);
    vit_map_output_rows(tile, 2, 2, true, false, row);
    for (int i = 0; i < 12; i++)
        assert_int_equal(row[i], i < 4 ? i + 2 : i + 4);
    assert_int_equal(vit_map_outputs(tile, 2, 2, false, false), 16);
    vit_map_output_rows(tile, 2, 2, false, false, row);
    for (int i = 0; i < 16; i++)
        assert_int_equal(row[i], i);
}

static void m6_06_counts_of_the_full_size_tile(void **state)
{
    static const int32_t tile[1][2] = { { 128, 128 } }, small[1][2] = { { 14, 14 } },
                         middle[1][2] = { { 32, 32 } };
    assert_int_equal(vit_map_patches(tile, 1), 16384);
    assert_int_equal(vit_map_rows(tile, 1, 8), 16392);
    assert_int_equal(vit_map_outputs(tile, 1, 8, true, true), 4096);
    assert_int_equal(vit_map_outputs(tile, 1, 8, false, false), 16392);
    assert_int_equal(vit_map_outputs(small, 1, 8, true, true), 49);
    assert_int_equal(vit_map_outputs(middle, 1, 8, true, true), 256);
    assert_int_equal(vit_map_outputs(NULL, 0, 8, true, true), 0);
}

static void m6_07_cu_seqlens_shift_golden_and_repeatable(void **state)
{
    static const int32_t tile[2][2] = { { 8, 8 }, { 6, 8 } };
    int32_t cu[3];
    assert_int_equal(vit_map_cu(tile, 2, 0, cu), 64);
    assert_memory_equal(cu, ((int32_t[]){ 0, 64, 112 }), sizeof cu);
    for (int again = 0; again < 2; again++) {
        assert_int_equal(vit_map_cu(tile, 2, 2, cu), 66);
        assert_memory_equal(cu, ((int32_t[]){ 0, 66, 116 }), sizeof cu);
    }
    assert_int_equal(vit_map_cu(NULL, 0, 2, cu), 0);
    assert_int_equal(cu[0], 0);
}

static void sources_interleave_class_tokens_and_patches(void **state)
{
    static const int32_t tile[2][2] = { { 1, 2 }, { 3, 1 } },
                         expected[9] = { -1, -2, 0, 1, -1, -2, 2, 3, 4 };
    static const int32_t inverse_expected[5] = { 2, 3, 6, 7, 8 };
    int32_t source[9], inverse[5];
    assert_int_equal(vit_map_rows(tile, 2, 2), 9);
    vit_map_sources(tile, 2, 2, source);
    assert_memory_equal(source, expected, sizeof expected);
    vit_map_invert(source, 9, 5, inverse);
    assert_memory_equal(inverse, inverse_expected, sizeof inverse);
}

static void inverse_undoes_the_output_map(void **state)
{
    static const int32_t tile[3][2] = { { 2, 6 }, { 4, 4 }, { 8, 2 } };
    enum { C = 3, PATCHES = 44, ROWS = PATCHES + 3 * C };
    int32_t row[PATCHES], inverse[ROWS], seen = 0;
    vit_map_output_rows(tile, 3, C, true, true, row);
    vit_map_invert(row, PATCHES, ROWS, inverse);
    for (int r = 0; r < ROWS; r++)
        if (inverse[r] >= 0) {
            assert_int_equal(row[inverse[r]], r);
            seen++;
        }
    assert_int_equal(seen, PATCHES);
    assert_true(inverse[0] == -1 && inverse[2] == -1 && inverse[3] >= 0 && inverse[15] == -1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(m6_03_resize_golden_values_without_aligned_corners),
        cmocka_unit_test(m6_03_grid_sized_tile_is_raw_and_wide_tile_uses_its_top_rows),
        cmocka_unit_test(m6_03_non_square_tile_is_the_window_of_the_square_resize),
        cmocka_unit_test(m6_03_huge_tile_crops_the_grid_to_its_aspect_ratio),
        cmocka_unit_test(m6_03_cpe_golden_columns_with_aligned_corners),
        cmocka_unit_test(cpe_of_the_largest_scale_stays_on_the_grid),
        cmocka_unit_test(cpe_outside_the_grid_is_zero),
        cmocka_unit_test(m6_05_pixel_shuffle_golden_on_a_non_square_tile),
        cmocka_unit_test(m6_06_p12_102_class_tokens_are_removed_per_tile),
        cmocka_unit_test(m6_06_counts_of_the_full_size_tile),
        cmocka_unit_test(m6_07_cu_seqlens_shift_golden_and_repeatable),
        cmocka_unit_test(sources_interleave_class_tokens_and_patches),
        cmocka_unit_test(inverse_undoes_the_output_map),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
