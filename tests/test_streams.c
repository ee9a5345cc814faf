/* test_streams.c - which samples of shards a rank reads: order, streams, layouts, resume, and
 * broken samples (interface.md 3).
 */
#include "child.h"
#include "shard_fixture.h"
#include <sys/stat.h>

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
    /* Poisson with mean 1: 10 and more has 1e-7 */
    assert_true(fixed < 10 && same_epoch < 10 && same_seed < 10);
}

enum { GBS = 12, ITERATIONS = 6 };

/* Keys of every sample by its number, as `lanes` language ranks or (ranks > 0) encoder ranks
 * deliver them. */
static void collect(int lanes, int mbs, int ranks, const char *set, const char *more,
                    char (*keys)[256], int64_t *bad, int64_t *positions)
{
    struct deck deck;
    char *m = xasprintf("batch.micro_batch_size=%d", mbs),
         *g = xasprintf("batch.global_batch_size=%d", GBS);
    good_shard_deck(&deck, ranks ? ranks : 1, lanes, set,
                    (const char *const[]){ m, g, "data.shuffle_buffer_size=-1", more, NULL });
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
    /* lanes, micro-batch; encoder ranks: fan-in and fan-out, where ranks that share a lane must
     * both see what is broken */
    static const int layout[][3] = { { 1, 1, 1 }, { 2, 1, 1 },  { 4, 1, 2 }, { 12, 1, 3 },
                                     { 6, 1, 6 }, { 1, 1, 1 },  { 1, 3, 1 }, { 1, 3, 3 },
                                     { 2, 3, 1 }, { 4, 3, 12 }, { 2, 3, 6 }, { 4, 3, 2 } };
    static char first[GBS * ITERATIONS][256], other[GBS * ITERATIONS][256];
    write_set("whole", false);
    write_set("broken", true);
    for (int set = 0; set < 2; set++)
        for (size_t f = 0; f < sizeof layout / sizeof *layout; f++) {
            const int lanes = layout[f][0], mbs = layout[f][1], ranks = layout[f][2];
            const char *name = set ? "broken" : "whole";
            int64_t bad = 0, bad_pictures = 0, text_at[GBS] = { 0 }, pictures_at[GBS] = { 0 };
            if (f == 0 || layout[f - 1][1] != mbs) /* the streams depend on gbs / mbs */
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
    /* the second epoch has an order of its own */
    assert_true(moved > SAMPLES / 2);
}

static void more_streams_than_slots_take_turns(void **state)
{
    static char keys[GBS * ITERATIONS][256];
    int64_t bad = 0;
    collect(3, 1, 0, "whole", "data.data_streams=36", keys, &bad, NULL);
    struct deck deck;
    struct errors errors = { 0 };
    good_shard_deck(&deck, 1, 1, "whole",
                    (const char *const[]){ "data.shuffle_buffer_size=-1", NULL });
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
    good_shard_deck(&deck, 1, 1, "whole",
                    (const char *const[]){ "data.shuffle_buffer_size=-1", NULL });
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
    good_shard_deck(
        &deck, 1, 1, "broken",
        (const char *const[]){ "batch.global_batch_size=12", "data.shuffle_buffer_size=-1", NULL });
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
    for (int again = 0; again < 2; again++) { /* in the same process, and in a new one */
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
    good_shard_deck(
        &deck, 1, 2, "broken",
        (const char *const[]){ "batch.global_batch_size=12", "data.shuffle_buffer_size=-1", NULL });
    open_data(&a, &deck, DATA_TRAIN);
    open_data(&b, &deck, DATA_TRAIN);
    open_text(&t, &a);
    data_skip(&b, 0); /* before any batch: all lanes */
    for (int i = 0; i < 4; i++)
        for (int lane = 0; lane < (i == 0 ? 2 : 1); lane++)
            for (int m = 0; m < 6; m++)
                data_text(&a, i, m, lane, 2, &t);
    for (int i = 1; i < 4; i++)
        if (i == 2)
            data_skip(&b, i); /* now only lane 0 */
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
        if (i % 2) { /* in either order */
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

static void streams_that_were_set_back_are_drawn_again(void **state)
{
    struct reader r;
    open_reader(&r, "whole", NULL);
    r.data.position[0] = 5;
    data_text(&r.data, 0, 0, 0, 1, &r.text);
    assert_string_equal(r.text.key[0], "0.tar:k05");
    r.data.position[0] = 0;
    data_pictures(&r.data, 0, 0, 0, 1, &r.pictures);
    assert_string_equal(r.pictures.key[0], "0.tar:k00");
    data_text(&r.data, 0, 0, 0, 1, &r.text);
    assert_string_equal(r.text.key[0], "0.tar:k00");
    assert_int_equal(r.data.position[0], 1);
    close_reader(&r);
}

/* --- broken samples --- */

static void every_kind_of_broken_sample_is_named_and_skipped(void **state)
{
    struct tar t = { 0 };
    struct deck deck;
    struct errors errors = { 0 };
    static const char *const why_of[] = {
        "", "PNG",       "no part", "image token", "no token to learn", "not consecutive",
        "", "no caption"
    };
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
        assert_int_equal(child_run(read_text, &r, NULL, 0), broken == 100 ? EXIT_DATA : 0);
        assert_int_equal(child_run(read_pictures, &r, NULL, 0), broken == 100 ? EXIT_DATA : 0);
        close_reader(&r);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_order_of_an_epoch_is_a_permutation_of_seed_and_epoch),
        cmocka_unit_test(every_layout_reads_the_same_samples_of_broken_shards_too),
        cmocka_unit_test(an_epoch_shows_every_sample_once),
        cmocka_unit_test(more_streams_than_slots_take_turns),
        cmocka_unit_test(validation_keeps_the_stored_order),
        cmocka_unit_test(positions_resume_the_stream),
        cmocka_unit_test(a_skipped_iteration_advances_like_a_delivered_one),
        cmocka_unit_test(a_colocated_rank_gets_text_and_pictures_of_the_same_samples),
        cmocka_unit_test(streams_that_were_set_back_are_drawn_again),
        cmocka_unit_test(every_kind_of_broken_sample_is_named_and_skipped),
        cmocka_unit_test(a_hundred_broken_samples_in_a_row_end_the_job_with_4),
    };
    return cmocka_run_group_tests(tests, setup, scratch_teardown);
}
