/* test_webdataset.c - samples of shards: rendering, labels, lengths, order, broken samples, resume (interface.md 3 and 5,
 * training.md 6.7 and 6.8). The tokenizer of these tests has one token per byte, so ids can be read.
 */
#include "data_fixture.h"
#include <math.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include "image.h"

static char dir[64];

static const char *file(const char *name)
{
    static char path[8][256];
    static int turn;
    char *p = path[turn++ % 8];
    snprintf(p, sizeof path[0], "%s/%s", dir, name);
    return p;
}

static int setup(void **state)
{
    snprintf(dir, sizeof dir, "/tmp/mimo_data_XXXXXX");
    if (!mkdtemp(dir))
        return -1;
    write_tokenizer(file("tokenizer.json"), true);
    write_tokenizer(file("plain.json"), false);
    return 0;
}

static int teardown(void **state)
{
    char command[128];
    snprintf(command, sizeof command, "rm -rf '%s'", dir);
    return system(command);
}

/* The tiny deck with the shard(s) at `path`, both splits, in stored order unless an override says otherwise. */
static void shard_deck(struct deck *deck, int encoder, int lanes, const char *path, const char *const *more, struct errors *errors)
{
    const char *o[OVERRIDES_MAX];
    char *train = xasprintf("data.train_data_path=%s", file(path)), *valid = xasprintf("data.valid_data_path=%s", file(path));
    char *tokenizer = xasprintf("data.tokenizer=%s", file("tokenizer.json"));
    int n = 0;
    o[n++] = "data.dataset_provider=webdataset";
    o[n++] = train;
    o[n++] = valid;
    bool own = false, shuffle = false;
    for (int i = 0; more && more[i]; i++) {
        own = own || strncmp(more[i], "data.tokenizer=", 15) == 0;
        shuffle = shuffle || strncmp(more[i], "data.shuffle_buffer_size=", 25) == 0;
        o[n++] = more[i];
    }
    if (!own)
        o[n++] = tokenizer;
    if (!shuffle)
        o[n++] = "data.shuffle_buffer_size=0";
    o[n] = NULL;
    open_deck(deck, encoder, lanes, o, errors);
    free(train);
    free(valid);
    free(tokenizer);
}

static void good_shard_deck(struct deck *deck, int encoder, int lanes, const char *path, const char *const *more)
{
    struct errors errors;
    shard_deck(deck, encoder, lanes, path, more, &errors);
    if (errors.count > 0)
        fail_msg("%s", errors.line[0]);
    errors_free(&errors);
}

/* One rank of both grids, one sample at a time. */
struct reader { struct deck deck; struct data data; struct text_batch text; struct picture_batch pictures; };

static void open_reader(struct reader *r, const char *path, const char *const *more)
{
    good_shard_deck(&r->deck, 1, 1, path, more);
    open_data(&r->data, &r->deck, DATA_TRAIN);
    open_text(&r->text, &r->data);
    open_pictures(&r->pictures, &r->data);
}

static void close_reader(struct reader *r)
{
    text_batch_free(&r->text);
    picture_batch_free(&r->pictures);
    data_free(&r->data);
    deck_free(&r->deck);
}

static void read_one(struct reader *r, int64_t iteration)
{
    data_text(&r->data, iteration, 0, 0, 1, &r->text);
    data_pictures(&r->data, iteration, 0, 0, 1, &r->pictures);
    assert_string_equal(r->text.key[0], r->pictures.key[0]);
    assert_int_equal(r->text.image_rows, r->pictures.rows);
}

/* The row as text: i = image id, $ = end of document, . = padding, bytes as they are. */
static const char *row_text(const struct reader *r, char *out)
{
    for (int64_t j = 0; j < r->text.seq_length; j++) {
        const int64_t id = r->text.input_ids[j];
        out[j] = (char)(id == BYTE_PAD ? '.' : id == BYTE_END ? '$' : id == BYTE_IMAGE ? 'i' : id == BYTE_TAG ? '<'
                        : id == BYTE_TAG_END ? '>' : id - BYTE_FIRST);
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
    tar_png(&t, "a.png", 16, 8, 1);                   /* 4 x 2 patches, one more row and column when even: rounded by the grid rule */
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
    /* image inputs predict nothing, also the last one; r->e, e->d, d->$ are trained; $ predicts nothing */
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
    tar_text(&t, "a.json", "{\"texts\": [\"ab\", null, \"cd\", null], \"images\": [null, \"1.png\", null, \"0.png\"]}");
    tar_png(&t, "a.0.png", 8, 8, 1);
    tar_png(&t, "a.1.png", 24, 8, 2);
    tar_text(&t, "b.json", "{\"conversation\": [{\"sender\": \"u\", \"fragments\": [{\"t\": \"image\", \"value\": \"png\"},"
                           "{\"t\": \"text\", \"value\": \"?\"}]}, {\"sender\": \"m\", \"fragments\": [{\"t\": \"text\", \"value\": \"ok\"}]}]}");
    tar_png(&t, "b.png", 8, 8, 1);
    tar_end(&t);
    tar_write(&t, file("inter.tar"));
    open_reader(&r, "inter.tar", NULL);
    read_one(&r, 0);
    expect_row(&r, "abiiicdi$", "x____x___");
    assert_int_equal(r.pictures.tiles, 2);            /* in the order of the document, not of the parts */
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
    open_reader(&r, "tags.tar", (const char *const[]){ "data.image_tag_type=nvlm", "language.seq_length=96", NULL });
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
    good_shard_deck(&deck, 1, 1, "rows.tar", (const char *const[]){ "batch.micro_batch_size=3", NULL });
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

static void pixels_are_the_resized_normalised_patches(void **state)
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
        open_reader(&r, "pixels.tar", (const char *const[]){ fp64 ? "run.precision=fp64" : "run.precision=fp32", NULL });
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
                assert_true(fabs((double)((float *)r.pictures.pixels)[4 * 48 + i] - expected[i]) < 1e-6);
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
    open_reader(&r, "fixed.tar", (const char *const[]){ "vision.dynamic_resolution=F", "vision.img_h=16", "vision.img_w=16", NULL });
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
    tar_text(&t, "b.txt", text);                      /* fits exactly with its end of document */
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
    tar_png(&t, "a.0.png", 64, 64, 1);                /* 64 tokens alone */
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
    assert_int_equal(r.text.loss_tokens, 30);         /* the whole caption and its end are there */
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
    snprintf(json, sizeof json, "{\"texts\": [\"%s\", null, \"tail\"], \"images\": [null, \"png\", null]}", text);
    tar_text(&t, "a.json", json);
    tar_png(&t, "a.png", 16, 16, 1);                  /* at least 4 tokens in fixed resolution, 3 places are left */
    tar_end(&t);
    tar_write(&t, file("run.tar"));
    open_reader(&r, "run.tar", (const char *const[]){ "vision.dynamic_resolution=F", "vision.img_h=16", "vision.img_w=16", NULL });
    read_one(&r, 0);
    assert_int_equal(r.text.image_rows, 0);
    assert_int_equal(r.pictures.tiles, 0);            /* a picture that was cut is not shown to the encoder */
    assert_int_equal(r.text.loss_tokens, 60);
    assert_int_equal(r.text.input_ids[61], BYTE_PAD);
    close_reader(&r);
    open_reader(&r, "run.tar", NULL);                 /* dynamic: one token is enough, and the tail goes on */
    read_one(&r, 0);
    assert_int_equal(r.text.image_rows, 1);
    assert_int_equal(r.text.input_ids[61], BYTE_IMAGE);
    assert_int_equal(r.text.input_ids[63], BYTE_FIRST + 'a');
    close_reader(&r);
}

static void limits_bound_every_sample(void **state)
{
    struct tar t = { 0 };
    struct reader r;
    char name[32];
    for (int i = 0; i < 80; i++) {                    /* 80 pictures of one token, S = 64 */
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
    read_one(&r, 0);                                  /* a has nothing to learn from: skipped */
    expect_row(&r, "ok$", "xx");
    assert_int_equal(r.data.bad_samples, 1);          /* once: the second call replays the first */
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
    good_shard_deck(&deck, 1, 1, "ids.tar", (const char *const[]){ plain, "data.image_token_id=77", NULL });
    init_fails(&deck, EXIT_DECK, "data.image_token_id = 77", "is a word");
    open_reader(&r, "ids.tar", (const char *const[]){ plain, "data.image_token_id=3", NULL });   /* a reserved id */
    read_one(&r, 0);
    assert_int_equal(r.text.input_ids[0], 3);
    close_reader(&r);
    open_reader(&r, "ids.tar", (const char *const[]){ plain, "language.preset=custom", "language.hybrid_layer_pattern=*-",
                                                      "language.hidden_size=64", "language.num_attention_heads=4",
                                                      "language.vocab_size=300", "language.seq_length=64", NULL });
    read_one(&r, 0);
    assert_int_equal(r.text.input_ids[0], 261);       /* the first id behind the vocabulary */
    close_reader(&r);
    good_shard_deck(&deck, 1, 1, "ids.tar",
                    (const char *const[]){ plain, "language.preset=custom", "language.hybrid_layer_pattern=*-",
                                           "language.hidden_size=64", "language.num_attention_heads=4", "language.vocab_size=261",
                                           "language.make_vocab_size_divisible_by=1", "language.seq_length=64", NULL });
    init_fails(&deck, EXIT_DECK, "data.image_token_id", "name a reserved id");
    free(plain);
}

static void tokenizer_and_vocabulary_must_fit(void **state)
{
    struct deck deck;
    struct errors errors;
    one_text("fit.tar");
    good_shard_deck(&deck, 1, 1, "fit.tar", (const char *const[]){ "language.vocab_size=260", NULL });
    init_fails(&deck, EXIT_DECK, "language.vocab_size = 260", "ids up to 260");
    good_shard_deck(&deck, 1, 1, "fit.tar", (const char *const[]){ "data.end_of_document=<eod>", NULL });
    init_fails(&deck, EXIT_DECK, "data.end_of_document = '<eod>'", "no such token");
    good_shard_deck(&deck, 1, 1, "fit.tar", (const char *const[]){ "data.tokenizer=/no/such/tokenizer.json", NULL });
    init_fails(&deck, EXIT_DATA, "data.tokenizer = '/no/such/tokenizer.json'", "");
    good_shard_deck(&deck, 1, 1, "fit.tar", (const char *const[]){ "data.tokenizer=data/no/such", NULL });
    init_fails(&deck, EXIT_DATA, "data.tokenizer = 'data/no/such'", "make data");
    good_shard_deck(&deck, 1, 1, "nothing.tar", NULL);
    init_fails(&deck, EXIT_DATA, "data.train_data_path", "No such file");
    shard_deck(&deck, 1, 1, "fit.tar", (const char *const[]){ "data.pad_token_id=2", NULL }, &errors);
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
    char *text = xasprintf("&run train_iters = 1 /\n&language preset = 'tiny' /\n&lr lr = 1e-3 /\n&topology layout = 'language_only' /\n"
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

/* --- order --- */

static void the_order_of_an_epoch_is_a_permutation_of_seed_and_epoch(void **state)
{
    static const uint64_t size[] = { 1, 2, 3, 4, 5, 16, 17, 100, 1000, 4097 };
    for (size_t k = 0; k < sizeof size / sizeof *size; k++) {
        const uint64_t n = size[k];
        bool *seen = xcalloc(n, sizeof *seen);
        for (uint64_t i = 0; i < n; i++) {
            const uint64_t j = data_permute(1234, 3, n, i);
            assert_true(j < n && !seen[j]);
            seen[j] = true;
        }
        free(seen);
    }
    int same_epoch = 0, same_seed = 0, fixed = 0;
    for (uint64_t i = 0; i < 1000; i++) {
        fixed += data_permute(1234, 0, 1000, i) == i;
        same_epoch += data_permute(1234, 0, 1000, i) == data_permute(1234, 1, 1000, i);
        same_seed += data_permute(1234, 0, 1000, i) == data_permute(1235, 0, 1000, i);
    }
    assert_true(fixed < 10 && same_epoch < 10 && same_seed < 10);   /* Poisson with mean 1: 10 and more has 1e-7 */
}

enum { SAMPLES = 31 };

/* 31 samples in two shards, some with a picture; `broken`: numbers 3 and 17 have a picture cut short, 8 a broken json. */
static void write_set(const char *name, bool broken)
{
    mkdir(file(name), 0777);
    for (int shard = 0; shard < 2; shard++) {
        struct tar t = { 0 };
        char text[64], path[128];
        for (int i = shard ? 20 : 0; i < (shard ? SAMPLES : 20); i++) {
            snprintf(text, sizeof text, "k%02d.png", i);
            if (broken && (i == 3 || i == 17))
                tar_broken_png(&t, text, 40, 40);
            else if (i % 3 == 0)
                tar_png(&t, text, 8 + 4 * (i % 5), 8, (unsigned)i);
            snprintf(path, sizeof path, "k%02d.json", i);
            snprintf(text, sizeof text, broken && i == 8 ? "{\"caption\"" : "{\"caption\": \"number %d\"}", i);
            tar_text(&t, path, text);
        }
        tar_end(&t);
        snprintf(path, sizeof path, "%s/%d.tar", name, shard);
        tar_write(&t, file(path));
    }
}

enum { GBS = 12, ITERATIONS = 6 };

/* Keys of every sample by its number, as `lanes` language ranks or (ranks > 0) encoder ranks deliver them. */
static void collect(int lanes, int mbs, int ranks, const char *set, const char *more, char (*keys)[256], int64_t *bad,
                    int64_t *positions)
{
    struct deck deck;
    char *m = xasprintf("batch.micro_batch_size=%d", mbs), *g = xasprintf("batch.global_batch_size=%d", GBS);
    good_shard_deck(&deck, ranks ? ranks : 1, lanes, set, (const char *const[]){ m, g, "data.shuffle_buffer_size=-1", more, NULL });
    const int readers = ranks ? ranks : lanes;
    for (int who = 0; who < readers; who++) {
        struct data d;
        struct text_batch b;
        struct picture_batch p;
        open_data(&d, &deck, DATA_TRAIN);
        open_text(&b, &d);
        open_pictures(&p, &d);
        for (int i = 0; i < ITERATIONS; i++)
            for (int k = 0; k < GBS / mbs / lanes; k++)
                if (ranks) {
                    data_pictures(&d, i, k, who, ranks, &p);
                    for (int64_t s = 0; s < p.samples; s++)
                        memcpy(keys[p.sample_index[s]], p.key[s], sizeof *keys);
                } else {
                    data_text(&d, i, k, who, lanes, &b);
                    for (int64_t s = 0; s < b.samples; s++)
                        memcpy(keys[b.sample_index[s]], b.key[s], sizeof *keys);
                }
        for (int64_t s = 0; positions && s < d.n_streams; s++)
            if (d.position[s] > positions[s])
                positions[s] = d.position[s];
        *bad += d.bad_samples;
        text_batch_free(&b);
        picture_batch_free(&p);
        data_free(&d);
    }
    free(m);
    free(g);
    deck_free(&deck);
}

static void every_layout_reads_the_same_samples_of_broken_shards_too(void **state)
{
    /* lanes, micro-batch; encoder ranks: fan-in and fan-out, where ranks that share a lane must both see what is broken */
    static const int layout[][3] = { { 1, 1, 1 }, { 2, 1, 1 }, { 4, 1, 2 }, { 12, 1, 3 }, { 6, 1, 6 }, { 1, 1, 1 },
                                     { 1, 3, 1 }, { 1, 3, 3 }, { 2, 3, 3 }, { 4, 3, 12 }, { 2, 3, 6 }, { 4, 3, 2 } };
    static char first[GBS * ITERATIONS][256], other[GBS * ITERATIONS][256];
    write_set("whole", false);
    write_set("broken", true);
    for (int set = 0; set < 2; set++)
        for (size_t f = 0; f < sizeof layout / sizeof *layout; f++) {
            const int lanes = layout[f][0], mbs = layout[f][1], ranks = layout[f][2];
            const char *name = set ? "broken" : "whole";
            int64_t bad = 0, bad_pictures = 0, text_at[GBS] = { 0 }, pictures_at[GBS] = { 0 };
            if (f == 0 || layout[f - 1][1] != mbs)       /* the streams depend on gbs / mbs */
                memset(first, 0, sizeof first);
            memset(other, 0, sizeof other);
            collect(lanes, mbs, 0, name, NULL, other, &bad, text_at);
            if (!first[0][0])
                memcpy(first, other, sizeof first);
            assert_memory_equal(first, other, sizeof first);
            memset(other, 0, sizeof other);
            collect(lanes, mbs, ranks, name, NULL, other, &bad_pictures, pictures_at);
            assert_memory_equal(first, other, sizeof first);
            assert_memory_equal(text_at, pictures_at, sizeof text_at);
            assert_true(set ? bad >= 4 && bad_pictures >= bad : bad + bad_pictures == 0);
        }
}

static void an_epoch_shows_every_sample_once(void **state)
{
    static char keys[GBS * ITERATIONS][256];
    int64_t bad = 0;
    int count[SAMPLES] = { 0 };
    collect(1, 1, 0, "whole", "data.data_streams=12", keys, &bad, NULL);
    for (int i = 0; i < GBS * ITERATIONS && i < 2 * SAMPLES; i++)
        count[atoi(strchr(keys[i], 'k') + 1)]++;
    for (int i = 0; i < SAMPLES; i++)
        assert_int_equal(count[i], 2);
    int moved = 0;
    for (int i = 0; i < SAMPLES; i++)
        moved += strcmp(keys[i], keys[SAMPLES + i]) != 0;
    assert_true(moved > SAMPLES / 2);                    /* the second epoch has an order of its own */
}

static void more_streams_than_slots_take_turns(void **state)
{
    static char keys[GBS * ITERATIONS][256];
    int64_t bad = 0;
    collect(3, 1, 0, "whole", "data.data_streams=36", keys, &bad, NULL);
    struct deck deck;
    struct errors errors = { 0 };
    good_shard_deck(&deck, 1, 1, "whole", (const char *const[]){ "data.shuffle_buffer_size=-1", NULL });
    const struct data_limits limits = data_limits(&deck);
    struct data_webdataset *w = data_webdataset_new(&deck, DATA_TRAIN, &limits, &errors);
    struct data_sample s;
    data_sample_init(&s, &limits);
    for (int i = 0; i < GBS * ITERATIONS; i++) {
        char why[DATA_WHY];
        const int64_t stream = i % 36, k = i / 36;
        assert_true(data_webdataset_load(w, data_webdataset_at(w, k * 36 + stream), &s, NULL, why));
        assert_string_equal(keys[i], s.key);
    }
    data_sample_free(&s);
    data_webdataset_free(w);
    deck_free(&deck);
}

static void validation_keeps_the_stored_order(void **state)
{
    struct deck deck;
    struct data d;
    struct text_batch b;
    good_shard_deck(&deck, 1, 1, "whole", (const char *const[]){ "data.shuffle_buffer_size=-1", NULL });
    open_data(&d, &deck, DATA_VALID);
    open_text(&b, &d);
    for (int i = 0; i < SAMPLES + 2; i++) {
        char expected[32];
        snprintf(expected, sizeof expected, "%d.tar:k%02d", i % SAMPLES >= 20, i % SAMPLES);
        data_text(&d, i, 0, 0, 1, &b);
        assert_string_equal(b.key[0], expected);
    }
    text_batch_free(&b);
    data_free(&d);
    deck_free(&deck);
}

static void positions_resume_the_stream(void **state)
{
    struct deck deck;
    struct data d;
    struct text_batch b;
    char keys[ITERATIONS * GBS][256];
    int64_t saved[GBS] = { 0 };
    int n = 0;
    good_shard_deck(&deck, 1, 1, "broken", (const char *const[]){ "batch.global_batch_size=12", "data.shuffle_buffer_size=-1", NULL });
    open_data(&d, &deck, DATA_TRAIN);
    open_text(&b, &d);
    for (int i = 0; i < ITERATIONS; i++) {
        if (i == 3)
            memcpy(saved, d.position, sizeof saved);
        for (int m = 0; m < GBS; m++, n++) {
            data_text(&d, i, m, 0, 1, &b);
            memcpy(keys[n], b.key[0], sizeof keys[n]);
        }
    }
    for (int again = 0; again < 2; again++) {         /* in the same process, and in a new one */
        if (again) {
            data_free(&d);
            open_data(&d, &deck, DATA_TRAIN);
        }
        memcpy(d.position, saved, sizeof saved);
        n = 3 * GBS;
        for (int i = 3; i < ITERATIONS; i++)
            for (int m = 0; m < GBS; m++, n++) {
                data_text(&d, i, m, 0, 1, &b);
                assert_string_equal(b.key[0], keys[n]);
            }
    }
    text_batch_free(&b);
    data_free(&d);
    deck_free(&deck);
}

static void a_skipped_iteration_advances_like_a_delivered_one(void **state)
{
    struct deck deck;
    struct data a, b;
    struct text_batch t;
    good_shard_deck(&deck, 1, 2, "broken", (const char *const[]){ "batch.global_batch_size=12", "data.shuffle_buffer_size=-1", NULL });
    open_data(&a, &deck, DATA_TRAIN);
    open_data(&b, &deck, DATA_TRAIN);
    open_text(&t, &a);
    data_skip(&b, 0);                                 /* before any batch: all lanes */
    for (int i = 0; i < 4; i++)
        for (int lane = 0; lane < (i == 0 ? 2 : 1); lane++)
            for (int m = 0; m < 6; m++)
                data_text(&a, i, m, lane, 2, &t);
    for (int i = 1; i < 4; i++)
        if (i == 2)
            data_skip(&b, i);                         /* now only lane 0 */
        else
            for (int m = 0; m < 6; m++)
                data_text(&b, i, m, 0, 2, &t);
    assert_memory_equal(a.position, b.position, 12 * sizeof *a.position);
    assert_true(a.position[0] >= 4 && a.position[1] < a.position[0] + 3);
    text_batch_free(&t);
    data_free(&a);
    data_free(&b);
    deck_free(&deck);
}

static void a_colocated_rank_gets_text_and_pictures_of_the_same_samples(void **state)
{
    struct reader both, text_only;
    const char *const o[] = { "data.shuffle_buffer_size=-1", "batch.micro_batch_size=4", NULL };
    open_reader(&both, "broken", o);
    open_reader(&text_only, "broken", o);
    for (int i = 0; i < 20; i++) {
        if (i % 2) {                                  /* in either order */
            data_pictures(&both.data, i, 0, 0, 1, &both.pictures);
            data_text(&both.data, i, 0, 0, 1, &both.text);
        } else {
            read_one(&both, i);
        }
        data_text(&text_only.data, i, 0, 0, 1, &text_only.text);
        for (int s = 0; s < 4; s++) {
            assert_string_equal(both.text.key[s], text_only.text.key[s]);
            assert_string_equal(both.pictures.key[s], text_only.text.key[s]);
            assert_int_equal(both.pictures.rows_per_sample[s], both.text.image_rows_per_sample[s]);
        }
    }
    assert_int_equal(both.data.bad_samples, text_only.data.bad_samples);
    assert_memory_equal(both.data.position, text_only.data.position, sizeof *both.data.position);
    close_reader(&both);
    close_reader(&text_only);
}

/* --- broken samples --- */

static void every_kind_of_broken_sample_is_named_and_skipped(void **state)
{
    struct tar t = { 0 };
    struct deck deck;
    struct errors errors = { 0 };
    static const char *const why_of[] = { "", "PNG", "no part", "image token", "no token to learn", "not consecutive", "", "no caption" };
    tar_text(&t, "good1.txt", "x");
    tar_broken_png(&t, "cut.png", 40, 40);
    tar_text(&t, "cut.txt", "x");
    tar_text(&t, "gone.json", "{\"texts\": [\"x\", null], \"images\": [null, \"png\"]}");
    tar_text(&t, "fake.txt", "a <image> in the text");
    tar_png(&t, "mute.png", 8, 8, 1);
    tar_text(&t, "mute.txt", "");
    tar_text(&t, "split.txt", "x");
    tar_text(&t, "good2.txt", "x");
    tar_png(&t, "bare.png", 8, 8, 1);
    tar_text(&t, "split.cls", "x");
    tar_end(&t);
    tar_write(&t, file("kinds.tar"));
    good_shard_deck(&deck, 1, 1, "kinds.tar", NULL);
    const struct data_limits limits = data_limits(&deck);
    struct data_webdataset *w = data_webdataset_new(&deck, DATA_TRAIN, &limits, &errors);
    struct data_sample s;
    data_sample_init(&s, &limits);
    assert_int_equal(data_webdataset_size(w), 9);
    for (int i = 0; i < 8; i++) {
        char why[DATA_WHY] = "";
        const bool good = i == 0 || i == 6;
        assert_int_equal(data_webdataset_load(w, i, &s, NULL, why), good);
        if (!strstr(why, why_of[i]))
            fail_msg("%s: '%s' lacks '%s'", s.key, why, why_of[i]);
    }
    data_sample_free(&s);
    data_webdataset_free(w);
    deck_free(&deck);
}

static int exit_of(void (*body)(void *), void *argument)
{
    int status;
    fflush(NULL);
    const pid_t pid = fork();
    if (pid == 0) {
        if (!freopen("/dev/null", "w", stderr))
            _exit(99);
        body(argument);
        _exit(0);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static void read_text(void *argument)
{
    struct reader *r = argument;
    data_text(&r->data, 0, 0, 0, 1, &r->text);
}

static void read_pictures(void *argument)
{
    struct reader *r = argument;
    data_pictures(&r->data, 0, 0, 0, 1, &r->pictures);
}

static void a_hundred_broken_samples_in_a_row_end_the_job_with_4(void **state)
{
    for (int broken = 99; broken <= 100; broken++) {
        struct tar t = { 0 };
        struct reader r;
        char name[32];
        for (int i = 0; i < broken; i++) {
            snprintf(name, sizeof name, "b%03d.json", i);
            tar_text(&t, name, "{");
        }
        tar_text(&t, "good.txt", "x");
        tar_end(&t);
        tar_write(&t, file("hundred.tar"));
        open_reader(&r, "hundred.tar", NULL);
        assert_int_equal(exit_of(read_text, &r), broken == 100 ? EXIT_DATA : 0);
        assert_int_equal(exit_of(read_pictures, &r), broken == 100 ? EXIT_DATA : 0);
        close_reader(&r);
    }
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
    good_shard_deck(&deck, 1, 1, "broken", NULL);
    assert_int_equal(data_check(&deck, f), EXIT_OK);
    const char *text = captured(f);
    static const char *const expected[] = { "samples found          31 in 2 shards", "good                   28", "broken                 3",
                                            "broken: 0.tar:k03: ", "broken: 0.tar:k08: part json", "pictures               10",
                                            "without picture        18", "valid_data_path = " };
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
    static const char *const expected[] = { "show.tar:a", "30 x 21 as stored", "<image> (picture 0", "'r'", "'\\x1b'", "'</s>'", "5 with a label" };
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
        cmocka_unit_test(pixels_are_the_resized_normalised_patches),
        cmocka_unit_test(fixed_resolution_ignores_the_shape_of_the_picture),
        cmocka_unit_test(long_text_is_cut_without_end_of_document),
        cmocka_unit_test(pictures_shrink_before_text_is_cut),
        cmocka_unit_test(a_cut_never_leaves_a_part_of_a_picture),
        cmocka_unit_test(limits_bound_every_sample),
        cmocka_unit_test(the_image_id_comes_from_the_tokenizer_by_string),
        cmocka_unit_test(tokenizer_and_vocabulary_must_fit),
        cmocka_unit_test(end_of_document_can_be_named),
        cmocka_unit_test(language_only_refuses_data_with_pictures),
        cmocka_unit_test(the_order_of_an_epoch_is_a_permutation_of_seed_and_epoch),
        cmocka_unit_test(every_layout_reads_the_same_samples_of_broken_shards_too),
        cmocka_unit_test(an_epoch_shows_every_sample_once),
        cmocka_unit_test(more_streams_than_slots_take_turns),
        cmocka_unit_test(validation_keeps_the_stored_order),
        cmocka_unit_test(positions_resume_the_stream),
        cmocka_unit_test(a_skipped_iteration_advances_like_a_delivered_one),
        cmocka_unit_test(a_colocated_rank_gets_text_and_pictures_of_the_same_samples),
        cmocka_unit_test(every_kind_of_broken_sample_is_named_and_skipped),
        cmocka_unit_test(a_hundred_broken_samples_in_a_row_end_the_job_with_4),
        cmocka_unit_test(check_data_counts_samples_and_bad_ones),
        cmocka_unit_test(check_data_of_hostile_or_wholly_broken_shards_gives_4),
        cmocka_unit_test(show_sample_writes_the_picture_of_the_model_and_the_tokens),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
