/* data_fixture.h - decks, batches and small shards for the tests of data: a byte tokenizer and
 * pictures made on the spot. */
#ifndef MIMO_DATA_FIXTURE_H
#define MIMO_DATA_FIXTURE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <png.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "data_internal.h"
#include "tar_build.h"

enum { OVERRIDES_MAX = 24 };

/* The tiny deck for E encoder and D language ranks plus overrides "group.key=value", ended by
 * NULL. */
static inline void open_deck(struct deck *deck, int encoder, int language,
                             const char *const *overrides, struct errors *errors)
{
    static const char text[] =
        "&run seed = 42 train_iters = 4 /\n&language preset = 'tiny' /\n&lr lr = 1e-3 /\n"
        "&topology layout = 'disjoint' /\n&vision preset = 'tiny' /\n";
    char *all[OVERRIDES_MAX + 2];
    int n = 0;
    all[n++] = xasprintf("topology.encoder_dp=%d", encoder);
    all[n++] = xasprintf("topology.llm_dp=%d", language);
    for (int i = 0; overrides && overrides[i] && n < OVERRIDES_MAX; i++)
        all[n++] = xstrdup(overrides[i]);
    memset(errors, 0, sizeof *errors);
    deck_read(deck, "test.nml", text, strlen(text), n, all, errors);
    if (errors->count == 0)
        deck_resolve(deck, encoder + language, errors);
    for (int i = 0; i < n; i++)
        free(all[i]);
}

static inline void open_good_deck(struct deck *deck, int encoder, int language,
                                  const char *const *overrides)
{
    struct errors errors;
    open_deck(deck, encoder, language, overrides, &errors);
    if (errors.count > 0)
        fail_msg("%s", errors.line[0]);
    errors_free(&errors);
}

static inline void open_data(struct data *d, const struct deck *deck, enum data_split split)
{
    struct errors errors = { 0 };
    data_init(d, deck, split, &errors);
    if (errors.count > 0)
        fail_msg("%s", errors.line[0]);
    errors_free(&errors);
}

static inline void open_text(struct text_batch *b, const struct data *d)
{
    text_batch_init(b, &d->limits, d->deck->batch.micro_batch_size);
}

static inline int64_t patch_floats(const struct deck *deck)
{
    return 3 * deck->vision.patch_dim * deck->vision.patch_dim;
}

static inline void open_pictures(struct picture_batch *b, const struct data *d)
{
    picture_batch_init(b, &d->limits, d->deck->derived.encoder_microbatch, patch_floats(d->deck),
                       d->deck->derived.fp64);
}

/* Ids of the byte tokenizer: added tokens first, then one id for each of 256 bytes. */
enum { BYTE_PAD, BYTE_END, BYTE_IMAGE, BYTE_TAG, BYTE_TAG_END, BYTE_FIRST };

/* A tokenizer.json without merges, so that every byte is a token; `image` = false leaves <image>
 * out. */
static inline void write_tokenizer(const char *path, bool image)
{
    static const char *const added[] = { "<pad>", "</s>", "<image>", "<img>", "</img>" };
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs("{\"version\":\"1.0\",\"added_tokens\":[", f);
    for (int i = 0, n = 0; i < BYTE_FIRST; i++)
        if (image || i != BYTE_IMAGE)
            fprintf(
                f,
                "%s{\"id\":%d,\"content\":\"%s\",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,\"normalized\":false,"
                "\"special\":true}",
                n++ ? "," : "", i, added[i]);
    fputs(
        "],\"normalizer\":null,\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,"
        "\"use_regex\":false},\"post_processor\":null,\"decoder\":{\"type\":\"ByteLevel\"},\"model\":{\"type\":\"BPE\",\"dropout\":null,"
        "\"unk_token\":null,\"continuing_subword_prefix\":null,\"end_of_word_suffix\":null,\"fuse_unk\":false,\"vocab\":{",
        f);
    for (int b = 0, extra = 0; b < 256; b++) {
        const bool plain = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        const int point = plain ? b : 256 + extra++;
        fprintf(f, "%s\"\\u%04x\":%d", b ? "," : "", point, BYTE_FIRST + b);
    }
    fputs("},\"merges\":[]}}\n", f);
    assert_int_equal(fclose(f), 0);
}

/* A PNG of width x height whose pixels follow from `seed`; its bytes, to be freed. */
static inline unsigned char *make_png(int width, int height, unsigned seed, size_t *size)
{
    unsigned char *rgb = xmalloc((size_t)width * (size_t)height, 3);
    for (int i = 0; i < width * height * 3; i++)
        rgb[i] = (unsigned char)((unsigned)i * (seed * 2 + 1) + seed * 37u +
                                 (unsigned)(i / (3 * width)) * 5u);
    png_image image = { .version = PNG_IMAGE_VERSION,
                        .width = (png_uint_32)width,
                        .height = (png_uint_32)height,
                        .format = PNG_FORMAT_RGB };
    png_alloc_size_t n = 0;
    assert_true(png_image_write_to_memory(&image, NULL, &n, 0, rgb, 0, NULL));
    unsigned char *out = xmalloc(n, 1);
    assert_true(png_image_write_to_memory(&image, out, &n, 0, rgb, 0, NULL));
    *size = n;
    free(rgb);
    return out;
}

static inline void tar_png(struct tar *t, const char *name, int width, int height, unsigned seed)
{
    size_t n;
    unsigned char *png = make_png(width, height, seed, &n);
    tar_add(t, name, png, n);
    free(png);
}

/* A PNG that ends in the middle of its pixels. */
static inline void tar_broken_png(struct tar *t, const char *name, int width, int height)
{
    size_t n;
    unsigned char *png = make_png(width, height, 3, &n);
    tar_add(t, name, png, n * 2 / 3);
    free(png);
}

#endif
