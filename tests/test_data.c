/* test_data.c - mock data (training.md 5) and the rules that say which samples a micro-batch holds
 * (interface.md 3). */
#include "data_fixture.h"
#include <math.h>

/* Upstream's production sizes: V 131072, image id 511. */
static const char *const big[] = { "language.preset=nemotron_20l", "language.seq_length=64",
                                   "data.image_seq_length=28", NULL };

static void grid(struct deck *deck, int64_t image, int64_t tiles, int64_t rows, int64_t columns)
{
    struct data_mock_shape shape;
    deck->language.seq_length = 2 * image;
    deck->data.image_seq_length = image;
    deck->data.num_image_tiles = tiles;
    assert_true(data_mock_shape(deck, &shape, NULL));
    assert_int_equal(shape.height, rows * deck->vision.patch_dim);
    assert_int_equal(shape.width, columns * deck->vision.patch_dim);
    assert_int_equal(shape.patches, rows * columns);
}

static void m6_36_p12_96_mock_grids_are_nearest_to_square_with_even_sides(void **state)
{
    struct deck deck;
    open_good_deck(&deck, 1, 1, big);
    grid(&deck, 4096, 1, 128, 128);
    grid(&deck, 1000, 1, 50, 80);
    grid(&deck, 7, 1, 2, 14);
    grid(&deck, 14, 2, 2, 14);
    grid(&deck, 13, 1, 2, 26);
    grid(&deck, 8191, 1, 2, 16382);
    deck.vision.pixel_shuffle = false;
    grid(&deck, 12, 1, 3, 4);
    grid(&deck, 7, 1, 1, 7);
    deck_free(&deck);
}

static void mock_default_is_half_the_sequence_or_what_fixed_tiles_emit(void **state)
{
    struct deck deck;
    struct data_mock_shape shape;
    open_good_deck(&deck, 1, 1, big);
    deck.data.image_seq_length = 0;
    deck.language.seq_length = 57;
    assert_true(data_mock_shape(&deck, &shape, NULL));
    assert_int_equal(shape.image_seq_length, 28);
    deck.vision.dynamic_resolution = false;
    deck.vision.img_h = deck.vision.img_w = 16;
    deck.data.num_image_tiles = 3;
    assert_true(data_mock_shape(&deck, &shape, NULL));
    assert_int_equal(shape.image_seq_length, 12);
    assert_int_equal(shape.patches, 16);
    deck_free(&deck);
}

static void mock_sample_is_pictures_then_words_and_counts_s_minus_image_positions(void **state)
{
    struct deck deck;
    struct data d;
    struct text_batch b;
    open_good_deck(&deck, 1, 1, big);
    open_data(&d, &deck, DATA_TRAIN);
    open_text(&b, &d);
    data_text(&d, 0, 0, 0, 1, &b);
    assert_int_equal(b.samples, 1);
    assert_int_equal(b.image_rows, 28);
    assert_int_equal(b.loss_tokens, 64 - 28);
    for (int j = 0; j < 64; j++) {
        assert_int_equal(b.input_ids[j] == 511, j < 28);
        assert_int_equal(b.image_row[j], j < 28 ? j : -1);
        assert_true(b.labels[j] == (j < 27 || j == 63 ? -100 : b.input_ids[j + 1]));
        assert_true(b.loss_mask[j] == (b.labels[j] != -100 ? 1.0f : 0.0f));
    }
    /* the last image position predicts the first word */
    assert_true(b.labels[27] == b.input_ids[28] && b.loss_mask[27] == 1.0f);
    text_batch_free(&b);
    data_free(&d);
    deck_free(&deck);
}

static void m6_31_mock_words_are_uniform_and_never_image_or_pad(void **state)
{
    struct deck deck;
    struct data_sample s;
    static const char *const o[] = { "language.vocab_size=20", "data.image_token_id=7",
                                     "data.pad_token_id=11", NULL };
    open_good_deck(&deck, 1, 1, o);
    const struct data_limits limits = data_limits(&deck);
    struct data_mock *mock = data_mock_new(&deck, DATA_TRAIN);
    data_sample_init(&s, &limits);
    int64_t seen[20] = { 0 }, n = 0;
    for (int64_t i = 0; i < 2000; i++) {
        data_mock_load(mock, i, &s, NULL);
        for (int64_t j = 0; j < s.n_ids; j++)
            if (s.picture_of[j] < 0) {
                assert_in_range(s.ids[j], 1, 19);
                seen[s.ids[j]]++;
                n++;
            }
    }
    assert_int_equal(seen[7] + seen[11], 0);
    for (int id = 1; id < 20; id++)
        if (id != 7 && id != 11) /* 17 ids; 5 standard deviations of a binomial */
            assert_true(fabs((double)seen[id] - (double)n / 17) < 5.0 * sqrt((double)n / 17));
    data_mock_free(mock);
    data_sample_free(&s);
    deck_free(&deck);
}

static void load_ids(const struct deck *deck, enum data_split split, int64_t index, int64_t *ids)
{
    struct data_sample s;
    const struct data_limits limits = data_limits(deck);
    struct data_mock *mock = data_mock_new(deck, split);
    data_sample_init(&s, &limits);
    data_mock_load(mock, index, &s, NULL);
    memcpy(ids, s.ids, (size_t)s.n_ids * sizeof *ids);
    data_mock_free(mock);
    data_sample_free(&s);
}

static void p12_97_mock_content_follows_from_seed_split_and_index_modulo_size(void **state)
{
    struct deck deck;
    int64_t a[64], b[64];
    static const char *const o[] = { "data.mock_dataset_size=5", NULL };
    open_good_deck(&deck, 1, 1, o);
    load_ids(&deck, DATA_TRAIN, 2, a);
    load_ids(&deck, DATA_TRAIN, 2 + 5 * 1000, b);
    assert_memory_equal(a, b, sizeof a);
    load_ids(&deck, DATA_TRAIN, 3, b);
    assert_memory_not_equal(a, b, sizeof a);
    load_ids(&deck, DATA_VALID, 2, b);
    assert_memory_not_equal(a, b, sizeof a);
    deck.run.seed = 43;
    load_ids(&deck, DATA_TRAIN, 2, b);
    assert_memory_not_equal(a, b, sizeof a);
    deck_free(&deck);
}

static void mock_errors_name_the_values(void **state)
{
    struct deck deck;
    static const struct {
        int64_t image, s, tiles, patch, vocab, h, w;
        bool dynamic, class_token;
        const char *a, *b;
    } bad[] = {
        { 64, 64, 1, 4, 500, 0, 0, true, false, "data.image_seq_length = 64", "seq_length (64)" },
        { 70, 64, 1, 4, 500, 0, 0, true, false, "data.image_seq_length = 70", "seq_length (64)" },
        { 28, 64, 1, 0, 500, 0, 0, true, false, "vision.patch_dim = 0", "positive" },
        { 28, 64, 0, 4, 500, 0, 0, true, false, "data.num_image_tiles = 0", "positive" },
        { 28, 64, 3, 4, 500, 0, 0, true, false, "data.image_seq_length = 28",
          "num_image_tiles (3)" },
        { 28, 64, 1, 4, 2, 0, 0, true, false, "language.vocab_size = 2", "image_token_id (1)" },
        { 28, 64, 1, 4, 500, 0, 0, true, true, "vision.disable_vision_class_token",
          "class tokens" },
        { 0, 64, 1, 4, 500, 18, 16, false, false, "vision.img_h = 18", "patch_dim (4)" },
        { 0, 64, 1, 4, 500, 16, 18, false, false, "vision.img_w = 18", "patch_dim (4)" },
        { 0, 64, 1, 4, 500, 16, 24, false, false, "vision.img_h = 16", "4 x 6 patches" },
        { 0, 64, 1, 4, 500, 12, 12, false, false, "vision.img_h = 12", "3 x 3 patches" },
        { 5, 64, 1, 4, 500, 16, 16, false, false, "data.image_seq_length = 5",
          "emit 4 image tokens" },
    };
    open_good_deck(&deck, 1, 1, NULL);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct deck x = deck;
        struct errors errors = { 0 };
        struct data_mock_shape shape;
        x.data.image_seq_length = bad[i].image;
        x.language.seq_length = bad[i].s;
        x.data.num_image_tiles = bad[i].tiles;
        x.vision.patch_dim = bad[i].patch;
        x.language.vocab_size = bad[i].vocab;
        x.data.image_token_id = bad[i].vocab < 10 ? 1 : 499;
        x.vision.img_h = bad[i].h;
        x.vision.img_w = bad[i].w;
        x.vision.dynamic_resolution = bad[i].dynamic;
        x.vision.disable_vision_class_token = !bad[i].class_token;
        assert_false(data_mock_shape(&x, &shape, &errors));
        bool found = false;
        for (int k = 0; k < errors.count; k++)
            found = found || (strstr(errors.line[k], bad[i].a) && strstr(errors.line[k], bad[i].b));
        if (!found)
            fail_msg("case %zu: '%s' lacks '%s' or '%s'", i, errors.count ? errors.line[0] : "",
                     bad[i].a, bad[i].b);
        assert_int_equal(errors.worst, EXIT_DECK);
        errors_free(&errors);
    }
    deck_free(&deck);
}

static void data_that_data_init_refuses_can_be_freed(void **state)
{
    struct deck deck;
    struct data d;
    struct errors errors = { 0 };
    open_good_deck(&deck, 1, 1, NULL);
    deck.data.num_image_tiles = 3;
    data_init(&d, &deck, DATA_TRAIN, &errors);
    assert_int_equal(errors.count, 1);
    data_free(&d);
    errors_free(&errors);
    deck_free(&deck);
}

static void mock_text_only_samples_have_words_everywhere(void **state)
{
    struct deck deck;
    struct data d;
    struct text_batch b;
    struct picture_batch p;
    static const char *const o[] = { "data.mock_text_only_every=3", "batch.global_batch_size=6",
                                     "batch.micro_batch_size=6", "data.mock_pixels=normal", NULL };
    open_good_deck(&deck, 1, 1, o);
    open_data(&d, &deck, DATA_TRAIN);
    open_text(&b, &d);
    open_pictures(&p, &d);
    data_text(&d, 0, 0, 0, 1, &b);
    data_pictures(&d, 0, 0, 0, 1, &p);
    assert_int_equal(b.image_rows, 4 * 28);
    assert_int_equal(p.rows, 4 * 28);
    assert_int_equal(p.tiles, 8);
    for (int i = 0; i < 6; i++) {
        const bool text_only = i % 3 == 2;
        assert_int_equal(b.image_rows_per_sample[i], text_only ? 0 : 28);
        assert_int_equal(p.rows_per_sample[i], text_only ? 0 : 28);
        assert_int_equal(p.tiles_per_sample[i], text_only ? 0 : 2);
        for (int j = 0; j < 64; j++)
            assert_int_equal(b.input_ids[i * 64 + j] == 499, !text_only && j < 28);
        if (text_only)
            assert_int_equal(b.labels[i * 64], b.input_ids[i * 64 + 1]);
    }
    /* rows of the batch go on over the sample without picture */
    assert_int_equal(b.image_row[3 * 64], 2 * 28);
    text_batch_free(&b);
    picture_batch_free(&p);
    data_free(&d);
    deck_free(&deck);
}

static void mock_language_only_has_no_pictures(void **state)
{
    struct deck deck;
    struct data d;
    struct text_batch b;
    struct errors errors = { 0 };
    static const char text[] =
        "&run train_iters = 1 /\n&language preset = 'tiny' /\n&lr lr = 1e-3 /\n"
        "&topology layout = 'language_only' /\n";
    deck_read(&deck, "test.nml", text, strlen(text), 0, NULL, &errors);
    deck_resolve(&deck, 1, &errors);
    assert_int_equal(errors.count, 0);
    const struct data_limits l = data_limits(&deck);
    assert_int_equal(l.max_patches_per_sample, 0);
    assert_int_equal(l.max_tiles_per_sample, 0);
    open_data(&d, &deck, DATA_TRAIN);
    open_text(&b, &d);
    data_text(&d, 0, 0, 0, 1, &b);
    assert_int_equal(b.image_rows, 0);
    assert_int_equal(b.loss_tokens, 63);
    text_batch_free(&b);
    data_free(&d);
    deck_free(&deck);
}

static void mock_pixels_are_normal_or_zero_and_equal_in_both_precisions(void **state)
{
    struct deck deck;
    struct data d;
    struct picture_batch p[3];
    static const char *const o[3][3] = { { "data.mock_pixels=normal", NULL },
                                         { "data.mock_pixels=normal", "run.precision=fp64", NULL },
                                         { "data.mock_pixels=zeros", NULL } };
    for (int k = 0; k < 3; k++) {
        open_good_deck(&deck, 1, 1, o[k]);
        open_data(&d, &deck, DATA_TRAIN);
        open_pictures(&p[k], &d);
        data_pictures(&d, 3, 0, 0, 1, &p[k]);
        data_free(&d);
        deck_free(&deck);
    }
    assert_int_equal(p[0].tiles, 2);
    assert_int_equal(p[0].tile_size[1][0], 16);
    assert_int_equal(p[0].tile_size[1][1], 56);
    assert_int_equal(p[0].patches, 112);
    const int64_t n = p[0].patches * 48;
    double sum = 0.0, square = 0.0;
    for (int64_t i = 0; i < n; i++) {
        const double v = ((double *)p[1].pixels)[i];
        sum += v;
        square += v * v;
        assert_true((float)v == ((float *)p[0].pixels)[i]);
        assert_true(((float *)p[2].pixels)[i] == 0.0f);
    }
    assert_true(fabs(sum / (double)n) < 5.0 / sqrt((double)n));
    assert_true(fabs(square / (double)n - 1.0) < 5.0 * sqrt(2.0 / (double)n));
    for (int k = 0; k < 3; k++)
        picture_batch_free(&p[k]);
}

static void mock_limits_are_exact(void **state)
{
    struct deck deck;
    open_good_deck(&deck, 1, 1, NULL);
    const struct data_limits l = data_limits(&deck);
    assert_int_equal(l.seq_length, 64);
    assert_int_equal(l.max_patches_per_sample, 4 * 28);
    assert_int_equal(l.max_tiles_per_sample, 2);
    deck_free(&deck);
}

static void the_tools_show_mock_data_too(void **state)
{
    struct deck deck;
    char dir[64] = "/tmp/mimo_mock_XXXXXX", text[8192], path[128], command[128];
    assert_non_null(mkdtemp(dir));
    open_good_deck(&deck, 1, 1, (const char *const[]){ "data.mock_pixels=normal", NULL });
    FILE *f = tmpfile();
    assert_int_equal(data_check(&deck, f), EXIT_OK);
    assert_int_equal(data_show_sample(&deck, 7, dir, f), EXIT_OK);
    rewind(f);
    text[fread(text, 1, sizeof text - 1, f)] = '\0';
    fclose(f);
    static const char *const expected[] = { "10000 samples of 64 tokens, 28 of them",
                                            "2 of 56 x 16 pixels",
                                            "mock:7",
                                            "36 with a label",
                                            "0-13 ",
                                            "14-26 " };
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++)
        if (!strstr(text, expected[i]))
            fail_msg("'%s' is not in: %s", expected[i], text);
    for (int t = 0; t < 2; t++) {
        snprintf(path, sizeof path, "%s/sample_000007_%d.png", dir, t);
        assert_int_equal(access(path, R_OK), 0);
    }
    snprintf(command, sizeof command, "rm -rf '%s'", dir);
    assert_int_equal(system(command), 0);
    deck_free(&deck);
}

/* --- which samples --- */

enum { GBS = 12, ITERATIONS = 3 };

/* Ids of every sample of ITERATIONS iterations by its number, as D lanes with this micro-batch
 * deliver them. */
static void collect(int lanes, int mbs, int64_t (*ids)[64])
{
    struct deck deck;
    char *m = xasprintf("batch.micro_batch_size=%d", mbs),
         *g = xasprintf("batch.global_batch_size=%d", GBS);
    const char *const o[] = { m, g, NULL };
    open_good_deck(&deck, 1, lanes, o);
    for (int lane = 0; lane < lanes; lane++) {
        struct data d;
        struct text_batch b;
        open_data(&d, &deck, DATA_TRAIN);
        open_text(&b, &d);
        for (int i = 0; i < ITERATIONS; i++)
            for (int k = 0; k < GBS / mbs / lanes; k++) {
                data_text(&d, i, k, lane, lanes, &b);
                for (int s = 0; s < mbs; s++) {
                    assert_int_equal(b.sample_index[s], i * GBS + (k * lanes + lane) * mbs + s);
                    memcpy(ids[b.sample_index[s]], b.input_ids + s * 64, sizeof *ids);
                }
            }
        text_batch_free(&b);
        data_free(&d);
    }
    free(m);
    free(g);
    deck_free(&deck);
}

static void p12_100_every_layout_sees_the_same_numbered_samples(void **state)
{
    static const int factor[][2] = { { 1, 1 }, { 2, 1 }, { 3, 1 }, { 4, 1 }, { 6, 1 }, { 12, 1 },
                                     { 1, 2 }, { 2, 2 }, { 3, 2 }, { 6, 2 }, { 1, 3 }, { 2, 3 },
                                     { 4, 3 }, { 1, 4 }, { 3, 4 }, { 1, 6 }, { 2, 6 }, { 1, 12 } };
    static int64_t first[GBS * ITERATIONS][64], other[GBS * ITERATIONS][64];
    collect(1, 1, first);
    for (size_t f = 1; f < sizeof factor / sizeof *factor; f++) {
        memset(other, 0, sizeof other);
        collect(factor[f][0], factor[f][1], other);
        assert_memory_equal(first, other, sizeof first);
    }
}

static void m6_29_p12_101_encoder_ranks_serve_the_samples_of_the_lanes_in_order(void **state)
{
    /* E, D, mbs: fan-in, equal, fan-out into parts of a lane. */
    static const int layout[][3] = { { 1, 4, 3 }, { 2, 4, 1 }, { 3, 3, 2 },  { 4, 2, 2 },
                                     { 6, 1, 6 }, { 6, 3, 4 }, { 12, 1, 12 } };
    for (size_t f = 0; f < sizeof layout / sizeof *layout; f++) {
        const int encoder = layout[f][0], lanes = layout[f][1], mbs = layout[f][2];
        struct deck deck;
        char *m = xasprintf("batch.micro_batch_size=%d", mbs),
             *g = xasprintf("batch.global_batch_size=%d", GBS);
        const char *const o[] = { m, g, "data.mock_text_only_every=5", "data.mock_pixels=normal",
                                  NULL };
        open_good_deck(&deck, encoder, lanes, o);
        assert_int_equal(deck.derived.encoder_microbatch, mbs * lanes / encoder);
        for (int i = 0; i < 2; i++)
            for (int k = 0; k < deck.derived.num_microbatches; k++) {
                int64_t number[GBS], rows[GBS], n = 0;
                char key[GBS][256];
                for (int lane = 0; lane < lanes; lane++) {
                    struct data d;
                    struct text_batch b;
                    open_data(&d, &deck, DATA_TRAIN);
                    open_text(&b, &d);
                    data_text(&d, i, k, lane, lanes, &b);
                    for (int s = 0; s < mbs; s++, n++) {
                        number[n] = b.sample_index[s];
                        rows[n] = b.image_rows_per_sample[s];
                        memcpy(key[n], b.key[s], sizeof key[n]);
                    }
                    text_batch_free(&b);
                    data_free(&d);
                }
                int64_t at = 0;
                for (int e = 0; e < encoder; e++) {
                    struct data d;
                    struct picture_batch p;
                    open_data(&d, &deck, DATA_TRAIN);
                    open_pictures(&p, &d);
                    data_pictures(&d, i, k, e, encoder, &p);
                    assert_int_equal(p.samples, mbs * lanes / encoder);
                    for (int64_t s = 0; s < p.samples; s++, at++) {
                        assert_int_equal(p.sample_index[s], number[at]);
                        assert_int_equal(p.rows_per_sample[s], rows[at]);
                        assert_string_equal(p.key[s], key[at]);
                    }
                    picture_batch_free(&p);
                    data_free(&d);
                }
                assert_int_equal(at, n);
            }
        free(m);
        free(g);
        deck_free(&deck);
    }
}

static void cpe_numbers_follow_the_sample_and_tile_not_the_rank(void **state)
{
    double whole[8][4], part[4];
    struct deck deck;
    struct data d;
    struct picture_batch p;
    static const char *const o[] = { "batch.micro_batch_size=1", "batch.global_batch_size=4",
                                     NULL };
    open_good_deck(&deck, 1, 4, o);
    open_data(&d, &deck, DATA_TRAIN);
    open_pictures(&p, &d);
    data_pictures(&d, 1, 0, 0, 1, &p);
    assert_int_equal(p.tiles, 8);
    memcpy(whole, p.cpe, sizeof whole);
    picture_batch_free(&p);
    data_free(&d);
    deck_free(&deck);
    for (int i = 0; i < 8; i++) {
        for (int k = 0; k < i; k++)
            assert_memory_not_equal(whole[i], whole[k], sizeof whole[i]);
        for (int c = 0; c < 2; c++) { /* a window inside the grid */
            assert_true(whole[i][c] > 0.2 && whole[i][c] <= 1.0);
            assert_true(whole[i][2 + c] >= 0.0 && whole[i][2 + c] + whole[i][c] <= 1.0);
        }
    }
    open_good_deck(&deck, 4, 4, o);
    open_data(&d, &deck, DATA_TRAIN);
    open_pictures(&p, &d);
    for (int e = 0; e < 4; e++) {
        data_pictures(&d, 1, 0, e, 4, &p);
        for (int t = 0; t < 2; t++) {
            memcpy(part, p.cpe[t], sizeof part);
            assert_memory_equal(part, whole[2 * e + t], sizeof part);
        }
    }
    picture_batch_free(&p);
    data_free(&d);
    deck_free(&deck);
}

static void batches_are_filled_anew_by_every_call(void **state)
{
    struct deck deck;
    struct data d;
    struct picture_batch p;
    struct text_batch b;
    static const char *const o[] = { "batch.micro_batch_size=2", "batch.global_batch_size=4",
                                     NULL };
    open_good_deck(&deck, 1, 1, o);
    open_data(&d, &deck, DATA_TRAIN);
    open_pictures(&p, &d);
    open_text(&b, &d);
    for (int i = 0; i < 3; i++)
        for (int m = 0; m < 2; m++) {
            data_text(&d, i, m, 0, 1, &b);
            data_pictures(&d, i, m, 0, 1, &p);
            assert_int_equal(b.samples, 2);
            assert_int_equal(b.image_rows, 56);
            assert_int_equal(b.loss_tokens, 72);
            assert_int_equal(p.tiles, 4);
            assert_int_equal(p.patches, 224);
            assert_int_equal(p.rows, 56);
        }
    picture_batch_free(&p);
    text_batch_free(&b);
    data_free(&d);
    deck_free(&deck);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(m6_36_p12_96_mock_grids_are_nearest_to_square_with_even_sides),
        cmocka_unit_test(mock_default_is_half_the_sequence_or_what_fixed_tiles_emit),
        cmocka_unit_test(mock_sample_is_pictures_then_words_and_counts_s_minus_image_positions),
        cmocka_unit_test(m6_31_mock_words_are_uniform_and_never_image_or_pad),
        cmocka_unit_test(p12_97_mock_content_follows_from_seed_split_and_index_modulo_size),
        cmocka_unit_test(mock_errors_name_the_values),
        cmocka_unit_test(data_that_data_init_refuses_can_be_freed),
        cmocka_unit_test(mock_text_only_samples_have_words_everywhere),
        cmocka_unit_test(mock_language_only_has_no_pictures),
        cmocka_unit_test(mock_pixels_are_normal_or_zero_and_equal_in_both_precisions),
        cmocka_unit_test(mock_limits_are_exact),
        cmocka_unit_test(the_tools_show_mock_data_too),
        cmocka_unit_test(p12_100_every_layout_sees_the_same_numbered_samples),
        cmocka_unit_test(m6_29_p12_101_encoder_ranks_serve_the_samples_of_the_lanes_in_order),
        cmocka_unit_test(cpe_numbers_follow_the_sample_and_tile_not_the_rank),
        cmocka_unit_test(batches_are_filled_anew_by_every_call),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
