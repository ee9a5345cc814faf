/* fuzz_sample.c - any bytes as the json part of a sample that has two pictures and a text. */
#include "fuzz.h"

#include "sample.h"
#include "tar_build.h"

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    fuzz_start();
    return 0;
}

/* Stretches follow one another through the text; every picture is one of the two. */
static void expect_document(const struct sample *doc, const struct shard_set *set)
{
    size_t at = 0;
    EXPECT(doc->n_items >= 1 && doc->kind < SAMPLE_KINDS);
    for (int64_t i = 0; i < doc->n_items; i++) {
        const struct sample_item *item = &doc->item[i];
        const bool last = i == doc->n_items - 1;
        EXPECT(item->text == at && item->length <= doc->text_used - at);
        EXPECT(last ? item->part == -1 : item->part >= 0);
        if (!last) {
            const struct shard_part *part = shard_parts(set, 0) + item->part;
            EXPECT(item->part < set->sample[0].n_parts);
            EXPECT(sample_is_picture(shard_part_name(set, part)));
        }
        at += item->length;
    }
    EXPECT(at == doc->text_used);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct tar t = { 0 };
    tar_add(&t, "a.0.png", "png", 3);
    tar_add(&t, "a.jpg", "jpg", 3);
    tar_add(&t, "a.json", data, size);
    if (size % 2)
        tar_add(&t, "a.txt", "text", 4);
    tar_end(&t);
    struct shard_set set = { 0 };
    struct errors errors = { 0 };
    struct sample doc = { 0 };
    char why[512] = "";
    shard_init(&set, fuzz_file(t.bytes, t.n), "x", &errors);
    EXPECT(errors.count == 0 && set.n_samples == 1);
    if (sample_read(&doc, &set, 0, "<img>", "</img>", why, sizeof why))
        expect_document(&doc, &set);
    else
        fuzz_expect_line(why, sizeof why);
    sample_free(&doc);
    shard_free(&set);
    errors_free(&errors);
    free(t.bytes);
    return 0;
}
