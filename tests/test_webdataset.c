/* test_webdataset.c - what a sample of a shard becomes: rendering, labels, lengths, ids, and the
 * two tools that show it (interface.md 5, training.md 6.7 and 6.8). The tokenizer of these tests
 * has one token per byte, so ids can be read.
 */
#include "shard_fixture.h"
#include <math.h>
#include "image.h"

/* The row as text: i = image id, $ = end of document, . = padding, bytes as they are. */
static const char *row_text(const struct reader *r, char *out)
{
    for (int64_t j = 0; j < r->text.seq_length; j++) {
        const int64_t id = r->text.input_ids[j];
        out[j] = (char)(id == BYTE_PAD       ? '.'
                        : id == BYTE_END     ? '$'
                        : id == BYTE_IMAGE   ? 'i'
                        : id == BYTE_TAG     ? '<'
                        : id == BYTE_TAG_END ? '>'
                                             : id - BYTE_FIRST);
    }
    out[r->text.seq_length] = '\0';
    return out;
}

/* Row, and labels by position: x = trainable and equal to the next id, _ = masked. */
static void expect_row(const struct reader *r, const char *ids, const char *mask)
{
    char text[256], got[256];
    const int64_t s = r->text.seq_length;
    int64_t trainable = 0, row = 0;
    row_text(r, text);
    if (strncmp(text, ids, strlen(ids)) != 0)
        fail_msg("row '%s' is not '%s'", text, ids);
    for (int64_t j = (int64_t)strlen(ids); j < s; j++)
        assert_int_equal(text[j], '.');
    for (int64_t j = 0; j < s; j++) {
        const bool x = r->text.loss_mask[j] == 1.0f;
        got[j] = x ? 'x' : '_';
        trainable += x;
        assert_true(x || r->text.loss_mask[j] == 0.0f);
        assert_true(r->text.labels[j] == (x ? r->text.input_ids[j + 1] : -100));
        assert_int_equal(r->text.image_row[j], text[j] == 'i' ? row++ : -1);
    }
    got[s] = '\0';
    if (strncmp(got, mask, strlen(mask)) != 0)
        fail_msg("mask '%s' is not '%s'", got, mask);
    for (int64_t j = (int64_t)strlen(mask); j < s; j++)
        assert_int_equal(got[j], '_');
    assert_int_equal(r->text.loss_tokens, trainable);
    assert_int_equal(r->text.image_rows, row);
}

/* --- rendering --- */

static void a_caption_sample_is_image_run_caption_end_with_masks_of_6_7(void **state)
{
    struct tar t = { 0 };
    struct reader r;
    /* 4 x 2 patches, one more row and column when even: rounded by the grid rule */
    tar_png(&t, "a.png", 16, 8, 1);
    tar_text(&t, "a.json", "{\"caption\": \"red\"}");
    tar_text(&t, "b.txt", "only text");
    tar_end(&t);
    tar_write(&t, file("caption.tar"));
    open_reader(&r, "caption.tar", NULL);
    read_one(&r, 0);
    assert_int_equal(r.pictures.tiles, 1);
    int tw, th;
    image_grid(16, 8, 4, 4, 256, 2, &tw, &th);
    assert_int_equal(r.pictures.tile_size[0][0], 4 * th);
    assert_int_equal(r.pictures.tile_size[0][1], 4 * tw);
    assert_int_equal(r.pictures.rows, tw * th / 4);
    assert_int_equal(tw * th / 4, 2);
    /* image inputs predict nothing, also the last one; r->e, e->d, d->$ are trained; $ predicts
     * nothing */
    expect_row(&r, "iired$", "__xxx");
    assert_string_equal(r.text.key[0], "caption.tar:a");
    read_one(&r, 1);
    expect_row(&r, "only text$", "xxxxxxxxx");
    assert_int_equal(r.pictures.tiles, 0);
    assert_int_equal(r.pictures.patches, 0);
    close_reader(&r);
}

static void a_text_before_a_picture_does_not_predict_it(void **state)
{
    struct tar t = { 0 };
    struct reader r;
    tar_text(
        &t, "a.json",
        "{\"texts\": [\"ab\", null, \"cd\", null], \"images\": [null, \"1.png\", null, \"0.png\"]}");
    tar_png(&t, "a.0.png", 8, 8, 1);
    tar_png(&t, "a.1.png", 24, 8, 2);
    tar_text(
        &t, "b.json",
        "{\"conversation\": [{\"sender\": \"u\", \"fragments\": [{\"t\": \"image\", \"value\": \"png\"},"
        "{\"t\": \"text\", \"value\": \"?\"}]}, {\"sender\": \"m\", \"fragments\": [{\"t\": \"text\", \"value\": \"ok\"}]}]}");
    tar_png(&t, "b.png", 8, 8, 1);
    tar_end(&t);
    tar_write(&t, file("inter.tar"));
    open_reader(&r, "inter.tar", NULL);
    read_one(&r, 0);
    expect_row(&r, "abiiicdi$", "x____x___");
    /* in the order of the document, not of the parts */
    assert_int_equal(r.pictures.tiles, 2);
    assert_int_equal(r.pictures.tile_size[0][1], 24);
    assert_int_equal(r.pictures.tile_size[1][1], 8);
    read_one(&r, 1);
    expect_row(&r, "u: i?\nm: ok$", "xx__xxxxxxx");
    close_reader(&r);
}

static void tags_surround_every_picture(void **state)
{
    struct tar t = { 0 };
    struct reader r;
    tar_png(&t, "a.0.png", 8, 8, 1);
    tar_png(&t, "a.1.png", 8, 8, 2);
    tar_text(&t, "a.txt", "two");
    tar_end(&t);
    tar_write(&t, file("tags.tar"));
    open_reader(&r, "tags.tar", (const char *const[]){ "data.image_tag_type=internvl", NULL });
    read_one(&r, 0);
    /* > predicts <, < does not predict i, i does not predict >; the last > predicts t */
    expect_row(&r, "<i><i>two$", "__x__xxxx");
    close_reader(&r);
    open_reader(
        &r, "tags.tar",
        (const char *const[]){ "data.image_tag_type=nvlm", "language.seq_length=96", NULL });
    read_one(&r, 0);
    expect_row(&r, "<Image>i</Image><Image>i</Image>two$", "xxxxxx__xxxxxxxxxxxxxx__xxxxxxxxxxx");
    close_reader(&r);
}

static void rows_of_a_batch_number_its_pictures_in_order(void **state)
{
    struct tar t = { 0 };
    struct deck deck;
    struct data d;
    struct text_batch b;
    tar_png(&t, "a.png", 8, 8, 1);
    tar_text(&t, "a.txt", "a");
    tar_text(&t, "b.txt", "bb");
    tar_png(&t, "c.png", 16, 8, 1);
    tar_text(&t, "c.txt", "c");
    tar_end(&t);
    tar_write(&t, file("rows.tar"));
    good_shard_deck(&deck, 1, 1, "rows.tar",
                    (const char *const[]){ "batch.micro_batch_size=3", NULL });
    open_data(&d, &deck, DATA_TRAIN);
    open_text(&b, &d);
    data_text(&d, 0, 0, 0, 1, &b);
    assert_int_equal(b.image_rows, 3);
    assert_int_equal(b.image_rows_per_sample[1], 0);
    assert_int_equal(b.image_row[0], 0);
    assert_int_equal(b.image_row[128], 1);
    assert_int_equal(b.image_row[129], 2);
    assert_int_equal(b.image_row[130], -1);
    assert_int_equal(b.loss_tokens, 1 + 2 + 1);
    text_batch_free(&b);
    data_free(&d);
    deck_free(&deck);
}

static void p12_98_pixels_are_the_resized_normalised_patches(void **state)
{
    struct tar t = { 0 };
    struct reader r;
    size_t n;
    char why[256];
    unsigned char *png = make_png(30, 21, 5, &n);
    tar_png(&t, "a.0.png", 8, 8, 1);
    tar_add(&t, "a.1.png", png, n);
    tar_text(&t, "a.txt", "x");
    tar_end(&t);
    tar_write(&t, file("pixels.tar"));
    for (int fp64 = 0; fp64 < 2; fp64++) {
        open_reader(
            &r, "pixels.tar",
            (const char *const[]){ fp64 ? "run.precision=fp64" : "run.precision=fp32", NULL });
        read_one(&r, 0);
        struct image in = { 0 }, out = { 0 };
        assert_true(image_decode(png, n, NULL, &in, why, sizeof why));
        image_resize(&in, r.pictures.tile_size[1][1], r.pictures.tile_size[1][0], &out);
        double *expected = xmalloc((size_t)r.pictures.patches * 48, sizeof *expected);
        const int64_t patches = image_patchify_f64(&out, 4, expected);
        assert_int_equal(r.pictures.patches, 4 + patches);
        for (int64_t i = 0; i < patches * 48; i++)
            if (fp64)
                assert_true(((double *)r.pictures.pixels)[4 * 48 + i] == expected[i]);
            else
                assert_true(fabs((double)((float *)r.pictures.pixels)[4 * 48 + i] - expected[i]) <
                            1e-6);
        free(expected);
        image_free(&in);
        image_free(&out);
        close_reader(&r);
    }
    free(png);
}

static void fixed_resolution_ignores_the_shape_of_the_picture(void **state)
{
    struct tar t = { 0 };
    struct reader r;
    tar_png(&t, "a.png", 50, 10, 1);
    tar_text(&t, "a.txt", "x");
    tar_end(&t);
    tar_write(&t, file("fixed.tar"));
    open_reader(&r, "fixed.tar",
                (const char *const[]){ "vision.dynamic_resolution=F", "vision.img_h=16",
                                       "vision.img_w=16", NULL });
    read_one(&r, 0);
    assert_int_equal(r.pictures.tile_size[0][0], 16);
    assert_int_equal(r.pictures.tile_size[0][1], 16);
    expect_row(&r, "iiiix$", "____x");
    assert_int_equal(r.data.limits.max_tiles_per_sample, 16);
    close_reader(&r);
}

/* --- length --- */

static void long_text_is_cut_without_end_of_document(void **state)
{
    struct tar t = { 0 };
    struct reader r;
    char text[200];
    memset(text, 'w', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    tar_text(&t, "a.txt", text);
    text[63] = '\0';
    tar_text(&t, "b.txt", text); /* fits exactly with its end of document */
    tar_end(&t);
    tar_write(&t, file("long.tar"));
    open_reader(&r, "long.tar", NULL);
    read_one(&r, 0);
    assert_int_equal(r.text.loss_tokens, 63);
    assert_int_equal(r.text.input_ids[63], BYTE_FIRST + 'w');
    read_one(&r, 1);
    assert_int_equal(r.text.loss_tokens, 63);
    assert_int_equal(r.text.input_ids[63], BYTE_END);
    close_reader(&r);
}

static void pictures_shrink_before_text_is_cut(void **state)
{
    struct tar t = { 0 };
    struct reader r;
    char text[64];
    memset(text, 'w', 30);
    text[30] = '\0';
    tar_png(&t, "a.0.png", 64, 64, 1); /* 64 tokens alone */
    tar_png(&t, "a.1.png", 32, 32, 2);
    tar_text(&t, "a.txt", text);
    tar_end(&t);
    tar_write(&t, file("shrink.tar"));
    open_reader(&r, "shrink.tar", NULL);
    read_one(&r, 0);
    /* budget: 64 - (30 + 1 + 2 pictures) - 4 tokens for both pictures */
    assert_int_equal(r.pictures.tiles, 2);
    assert_in_range(r.pictures.rows, 8, 64 - 33 - 4);
    assert_true(r.pictures.rows_per_sample[0] == r.text.image_rows_per_sample[0]);
    assert_int_equal(r.text.loss_tokens, 30); /* the whole caption and its end are there */
    assert_int_equal(r.text.input_ids[r.pictures.rows + 30], BYTE_END);
    close_reader(&r);
}

static void a_cut_never_leaves_a_part_of_a_picture(void **state)
{
    struct tar t = { 0 };
    struct reader r;
    char json[512], text[64];
    memset(text, 'w', 61);
    text[61] = '\0';
    snprintf(json, sizeof json,
             "{\"texts\": [\"%s\", null, \"tail\"], \"images\": [null, \"png\", null]}", text);
    tar_text(&t, "a.json", json);
    /* at least 4 tokens in fixed resolution, 3 places are left */
    tar_png(&t, "a.png", 16, 16, 1);
    tar_end(&t);
    tar_write(&t, file("run.tar"));
    open_reader(&r, "run.tar",
                (const char *const[]){ "vision.dynamic_resolution=F", "vision.img_h=16",
                                       "vision.img_w=16", NULL });
    read_one(&r, 0);
    assert_int_equal(r.text.image_rows, 0);
    /* a picture that was cut is not shown to the encoder */
    assert_int_equal(r.pictures.tiles, 0);
    assert_int_equal(r.text.loss_tokens, 60);
    assert_int_equal(r.text.input_ids[61], BYTE_PAD);
    close_reader(&r);
    /* dynamic: one token is enough, and the tail goes on */
    open_reader(&r, "run.tar", NULL);
    read_one(&r, 0);
    assert_int_equal(r.text.image_rows, 1);
    assert_int_equal(r.text.input_ids[61], BYTE_IMAGE);
    assert_int_equal(r.text.input_ids[63], BYTE_FIRST + 'a');
    close_reader(&r);
    /* the first picture fits, the second does not */
    text[58] = '\0';
    snprintf(json, sizeof json,
             "{\"texts\": [\"%s\", null, null], \"images\": [null, \"png\", \"png\"]}", text);
    tar_text(&t, "a.json", json);
    tar_png(&t, "a.png", 16, 16, 1);
    tar_end(&t);
    tar_write(&t, file("run2.tar"));
    open_reader(&r, "run2.tar",
                (const char *const[]){ "vision.dynamic_resolution=F", "vision.img_h=16",
                                       "vision.img_w=16", NULL });
    read_one(&r, 0);
    assert_int_equal(r.text.image_rows, 4);
    assert_int_equal(r.pictures.tiles, 1);
    assert_int_equal(r.text.input_ids[61], BYTE_IMAGE);
    assert_int_equal(r.text.input_ids[62], BYTE_PAD);
    close_reader(&r);
}

static void limits_bound_every_sample(void **state)
{
    struct tar t = { 0 };
    struct reader r;
    char name[32];
    for (int i = 0; i < 80; i++) { /* 80 pictures of one token, S = 64 */
        snprintf(name, sizeof name, "a.%d.png", i);
        tar_png(&t, name, 8, 8, (unsigned)i);
    }
    tar_text(&t, "a.txt", "never seen");
    tar_text(&t, "b.txt", "ok");
    tar_text(&t, "c.json", "{\"texts\": [\"seen\", null], \"images\": [null, \"png\"]}");
    tar_png(&t, "c.png", 2000, 2000, 3);
    tar_end(&t);
    tar_write(&t, file("limits.tar"));
    open_reader(&r, "limits.tar", NULL);
    assert_int_equal(r.data.limits.max_patches_per_sample, 256);
    assert_int_equal(r.data.limits.max_tiles_per_sample, 64);
    read_one(&r, 0); /* a has nothing to learn from: skipped */
    expect_row(&r, "ok$", "xx");
    assert_int_equal(r.data.bad_samples, 1); /* once: the second call replays the first */
    read_one(&r, 1);
    assert_true(r.pictures.patches <= 256);
    assert_true(r.text.image_rows >= 30);
    close_reader(&r);
}

/* --- ids --- */

static void init_fails(struct deck *deck, enum exit_code code, const char *a, const char *b)
{
    struct data d;
    struct errors errors = { 0 };
    data_init(&d, deck, DATA_TRAIN, &errors);
    assert_true(errors.count >= 1);
    if (!strstr(errors.line[0], a) || !strstr(errors.line[0], b))
        fail_msg("'%s' lacks '%s' or '%s'", errors.line[0], a, b);
    assert_int_equal(errors.worst, code);
    errors_free(&errors);
    data_free(&d);
    deck_free(deck);
}

static void one_text(const char *name)
{
    struct tar t = { 0 };
    tar_png(&t, "a.png", 8, 8, 1);
    tar_text(&t, "a.txt", "x");
    tar_end(&t);
    tar_write(&t, file(name));
}

static void the_image_id_comes_from_the_tokenizer_by_string(void **state)
{
    struct deck deck;
    struct reader r;
    char *plain = xasprintf("data.tokenizer=%s", file("plain.json"));
    one_text("ids.tar");
    good_shard_deck(&deck, 1, 1, "ids.tar", (const char *const[]){ "data.image_token_id=7", NULL });
    init_fails(&deck, EXIT_DECK, "data.image_token_id = 7", "'<image>' is 2");
    good_shard_deck(&deck, 1, 1, "ids.tar",
                    (const char *const[]){ plain, "data.image_token_id=77", NULL });
    init_fails(&deck, EXIT_DECK, "data.image_token_id = 77", "is a word");
    /* a reserved id */
    open_reader(&r, "ids.tar", (const char *const[]){ plain, "data.image_token_id=3", NULL });
    read_one(&r, 0);
    assert_int_equal(r.text.input_ids[0], 3);
    close_reader(&r);
    open_reader(&r, "ids.tar",
                (const char *const[]){ plain, "language.preset=custom",
                                       "language.hybrid_layer_pattern=*-",
                                       "language.hidden_size=64", "language.num_attention_heads=4",
                                       "language.vocab_size=300", "language.seq_length=64", NULL });
    read_one(&r, 0);
    assert_int_equal(r.text.input_ids[0], 261); /* the first id behind the vocabulary */
    close_reader(&r);
    good_shard_deck(
        &deck, 1, 1, "ids.tar",
        (const char *const[]){ plain, "language.preset=custom", "language.hybrid_layer_pattern=*-",
                               "language.hidden_size=64", "language.num_attention_heads=4",
                               "language.vocab_size=261", "language.make_vocab_size_divisible_by=1",
                               "language.seq_length=64", NULL });
    init_fails(&deck, EXIT_DECK, "data.image_token_id", "name a reserved id");
    free(plain);
}

static void tokenizer_and_vocabulary_must_fit(void **state)
{
    struct deck deck;
    struct errors errors;
    one_text("fit.tar");
    good_shard_deck(&deck, 1, 1, "fit.tar",
                    (const char *const[]){ "language.vocab_size=260", NULL });
    init_fails(&deck, EXIT_DECK, "language.vocab_size = 260", "ids up to 260");
    good_shard_deck(&deck, 1, 1, "fit.tar",
                    (const char *const[]){ "data.end_of_document=<eod>", NULL });
    init_fails(&deck, EXIT_DECK, "data.end_of_document = '<eod>'", "no such token");
    good_shard_deck(&deck, 1, 1, "fit.tar",
                    (const char *const[]){ "data.tokenizer=/no/such/tokenizer.json", NULL });
    init_fails(&deck, EXIT_DATA, "data.tokenizer = '/no/such/tokenizer.json'", "");
    good_shard_deck(&deck, 1, 1, "fit.tar",
                    (const char *const[]){ "data.tokenizer=data/no/such", NULL });
    init_fails(&deck, EXIT_DATA, "data.tokenizer = 'data/no/such'", "make data");
    good_shard_deck(&deck, 1, 1, "nothing.tar", NULL);
    init_fails(&deck, EXIT_DATA, "data.train_data_path", "No such file");
    shard_deck(&deck, 1, 1, "fit.tar", (const char *const[]){ "data.pad_token_id=2", NULL },
               &errors);
    if (errors.count == 0)
        init_fails(&deck, EXIT_DECK, "data.pad_token_id = 2", "'<image>'");
    errors_free(&errors);
}

static void end_of_document_can_be_named(void **state)
{
    struct reader r;
    one_text("end.tar");
    open_reader(&r, "end.tar", (const char *const[]){ "data.end_of_document=</img>", NULL });
    read_one(&r, 0);
    assert_int_equal(r.text.input_ids[2], BYTE_TAG_END);
    close_reader(&r);
}

static void language_only_refuses_data_with_pictures(void **state)
{
    struct deck deck;
    struct errors errors = { 0 };
    one_text("lonly.tar");
    char *text = xasprintf(
        "&run train_iters = 1 /\n&language preset = 'tiny' /\n&lr lr = 1e-3 /\n&topology layout = 'language_only' /\n"
        "&data dataset_provider = 'webdataset' train_data_path = '%s' tokenizer = '%s' /\n",
        file("lonly.tar"), file("tokenizer.json"));
    deck_read(&deck, "test.nml", text, strlen(text), 0, NULL, &errors);
    deck_resolve(&deck, 1, &errors);
    assert_int_equal(errors.count, 0);
    init_fails(&deck, EXIT_DATA, "language_only", "lonly.tar:a");
    struct tar t = { 0 };
    struct data d;
    struct text_batch b;
    tar_text(&t, "a.txt", "words");
    tar_end(&t);
    tar_write(&t, file("lonly.tar"));
    deck_read(&deck, "test.nml", text, strlen(text), 0, NULL, &errors);
    deck_resolve(&deck, 1, &errors);
    open_data(&d, &deck, DATA_TRAIN);
    open_text(&b, &d);
    data_text(&d, 0, 0, 0, 1, &b);
    assert_int_equal(b.loss_tokens, 5);
    text_batch_free(&b);
    data_free(&d);
    deck_free(&deck);
    free(text);
}

/* --- the tools --- */

static char *captured(FILE *f)
{
    static char text[16384];
    rewind(f);
    text[fread(text, 1, sizeof text - 1, f)] = '\0';
    fclose(f);
    return text;
}

static void check_data_counts_samples_and_bad_ones(void **state)
{
    struct deck deck;
    FILE *f = tmpfile();
    write_set("broken", true);
    good_shard_deck(&deck, 1, 1, "broken", NULL);
    assert_int_equal(data_check(&deck, f), EXIT_OK);
    const char *text = captured(f);
    static const char *const expected[] = { "samples found          31 in 2 shards",
                                            "good                   28",
                                            "broken                 3",
                                            "broken: 0.tar:k03: ",
                                            "broken: 0.tar:k08: part json",
                                            "pictures               10",
                                            "without picture        18",
                                            "valid_data_path = " };
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++)
        if (!strstr(text, expected[i]))
            fail_msg("'%s' is not in: %s", expected[i], text);
    deck_free(&deck);
}

static void check_data_of_hostile_or_wholly_broken_shards_gives_4(void **state)
{
    struct deck deck;
    struct tar t = { 0 };
    tar_text(&t, "../a.txt", "x");
    tar_end(&t);
    tar_write(&t, file("evil.tar"));
    FILE *f = tmpfile();
    good_shard_deck(&deck, 1, 1, "evil.tar", NULL);
    assert_int_equal(data_check(&deck, f), EXIT_DATA);
    fclose(f);
    deck_free(&deck);
    tar_text(&t, "a.json", "{");
    tar_end(&t);
    tar_write(&t, file("all_bad.tar"));
    f = tmpfile();
    good_shard_deck(&deck, 1, 1, "all_bad.tar", NULL);
    assert_int_equal(data_check(&deck, f), EXIT_DATA);
    fclose(f);
    deck_free(&deck);
}

static void show_sample_writes_the_picture_of_the_model_and_the_tokens(void **state)
{
    struct deck deck;
    struct tar t = { 0 };
    size_t n;
    char why[256];
    unsigned char *png = make_png(30, 21, 5, &n);
    tar_text(&t, "z.txt", "first");
    tar_add(&t, "a.png", png, n);
    tar_text(&t, "a.txt", "red \033");
    tar_end(&t);
    tar_write(&t, file("show.tar"));
    good_shard_deck(&deck, 1, 1, "show.tar", NULL);
    FILE *f = tmpfile();
    assert_int_equal(data_show_sample(&deck, 1, file("shown"), f), EXIT_OK);
    const char *text = captured(f);
    static const char *const expected[] = {
        "show.tar:a", "30 x 21 as stored", "<image> (picture 0", "'r'", "'\\x1b'",
        "'</s>'",     "5 with a label"
    };
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++)
        if (!strstr(text, expected[i]))
            fail_msg("'%s' is not in: %s", expected[i], text);
    struct image in = { 0 }, out = { 0 }, shown = { 0 };
    unsigned char *bytes = xmalloc(1 << 20, 1);
    FILE *p = fopen(file("shown/sample_000001_0.png"), "rb");
    assert_non_null(p);
    const size_t size = fread(bytes, 1, 1 << 20, p);
    fclose(p);
    assert_true(image_decode(png, n, NULL, &in, why, sizeof why));
    assert_true(image_decode(bytes, size, NULL, &shown, why, sizeof why));
    image_resize(&in, shown.width, shown.height, &out);
    assert_memory_equal(out.rgb, shown.rgb, (size_t)(3 * shown.width * shown.height));
    image_free(&in);
    image_free(&out);
    image_free(&shown);
    free(bytes);
    free(png);
    f = tmpfile();
    assert_int_equal(data_show_sample(&deck, 2, file("shown"), f), EXIT_DATA);
    fclose(f);
    deck_free(&deck);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_caption_sample_is_image_run_caption_end_with_masks_of_6_7),
        cmocka_unit_test(a_text_before_a_picture_does_not_predict_it),
        cmocka_unit_test(tags_surround_every_picture),
        cmocka_unit_test(rows_of_a_batch_number_its_pictures_in_order),
        cmocka_unit_test(p12_98_pixels_are_the_resized_normalised_patches),
        cmocka_unit_test(fixed_resolution_ignores_the_shape_of_the_picture),
        cmocka_unit_test(long_text_is_cut_without_end_of_document),
        cmocka_unit_test(pictures_shrink_before_text_is_cut),
        cmocka_unit_test(a_cut_never_leaves_a_part_of_a_picture),
        cmocka_unit_test(limits_bound_every_sample),
        cmocka_unit_test(the_image_id_comes_from_the_tokenizer_by_string),
        cmocka_unit_test(tokenizer_and_vocabulary_must_fit),
        cmocka_unit_test(end_of_document_can_be_named),
        cmocka_unit_test(language_only_refuses_data_with_pictures),
        cmocka_unit_test(check_data_counts_samples_and_bad_ones),
        cmocka_unit_test(check_data_of_hostile_or_wholly_broken_shards_gives_4),
        cmocka_unit_test(show_sample_writes_the_picture_of_the_model_and_the_tokens),
    };
    return cmocka_run_group_tests(tests, setup, scratch_teardown);
}
