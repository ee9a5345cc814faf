/* shard_fixture.h - shards of a test in a scratch directory, decks that read them, and one rank
 * that reads both sides. */
#ifndef MIMO_SHARD_FIXTURE_H
#define MIMO_SHARD_FIXTURE_H

#include <sys/stat.h>
#include "data_fixture.h"
#include "scratch.h"

static inline int setup(void **state)
{
    if (scratch_setup(state) != 0)
        return -1;
    write_tokenizer(file("tokenizer.json"), true);
    write_tokenizer(file("plain.json"), false);
    return 0;
}

/* The tiny deck with the shard(s) at `path`, both splits, in stored order unless an override says
 * otherwise. */
static inline void shard_deck(struct deck *deck, int encoder, int lanes, const char *path,
                              const char *const *more, struct errors *errors)
{
    const char *o[OVERRIDES_MAX];
    char *train = xasprintf("data.train_data_path=%s", file(path)),
         *valid = xasprintf("data.valid_data_path=%s", file(path));
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

static inline void good_shard_deck(struct deck *deck, int encoder, int lanes, const char *path,
                                   const char *const *more)
{
    struct errors errors;
    shard_deck(deck, encoder, lanes, path, more, &errors);
    if (errors.count > 0)
        fail_msg("%s", errors.line[0]);
    errors_free(&errors);
}

/* One rank of both grids, one sample at a time. */
struct reader {
    struct deck deck;
    struct data data;
    struct text_batch text;
    struct picture_batch pictures;
};

static inline void open_reader(struct reader *r, const char *path, const char *const *more)
{
    good_shard_deck(&r->deck, 1, 1, path, more);
    open_data(&r->data, &r->deck, DATA_TRAIN);
    open_text(&r->text, &r->data);
    open_pictures(&r->pictures, &r->data);
}

static inline void close_reader(struct reader *r)
{
    text_batch_free(&r->text);
    picture_batch_free(&r->pictures);
    data_free(&r->data);
    deck_free(&r->deck);
}

static inline void read_one(struct reader *r, int64_t iteration)
{
    data_text(&r->data, iteration, 0, 0, 1, &r->text);
    data_pictures(&r->data, iteration, 0, 0, 1, &r->pictures);
    assert_string_equal(r->text.key[0], r->pictures.key[0]);
    assert_int_equal(r->text.image_rows, r->pictures.rows);
}

enum { SAMPLES = 31 };

/* 31 samples in two shards, some with a picture; `broken`: numbers 3 and 17 have a picture cut
 * short, 8 a broken json. */
static inline void write_set(const char *name, bool broken)
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
            snprintf(text, sizeof text,
                     broken && i == 8 ? "{\"caption\"" : "{\"caption\": \"number %d\"}", i);
            tar_text(&t, path, text);
        }
        tar_end(&t);
        snprintf(path, sizeof path, "%s/%d.tar", name, shard);
        tar_write(&t, file(path));
    }
}

#endif
