/* fuzz_shard.c - any bytes as a tar: index it, read every part, make the documents.
 *
 * Mutated tars would all fail at a header's checksum, so the mutator writes the sums anew in most
 * of its results.
 */
#include "fuzz.h"

#include "sample.h"
#include "shard.h"
#include "tar_build.h"

enum { BLOCK = 512, MAGIC_AT = 257, PART_MOST = 1 << 20 };

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    fuzz_start();
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned int seed)
{
    size = LLVMFuzzerMutate(data, size, max_size);
    for (size_t at = 0; seed % 8 && at + BLOCK <= size; at += BLOCK)
        if (memcmp(data + at + MAGIC_AT, "ustar", 5) == 0)
            tar_sum(data + at);
    return size;
}

/* Indexed samples lie in order, inside the file, under printable keys. */
static void expect_index(const struct shard_set *set, int64_t bytes)
{
    char key[256];
    for (int64_t i = 0; i < set->n_samples; i++) {
        const struct shard_sample *s = &set->sample[i];
        const struct shard_part *part = shard_parts(set, i);
        EXPECT(s->n_parts > 0 && s->shard == 0);
        fuzz_expect_line(shard_key(set, i, key, sizeof key), sizeof key);
        for (int32_t k = 0; k < s->n_parts; k++) {
            EXPECT(part[k].size >= 0 && part[k].offset >= BLOCK);
            EXPECT(part[k].size <= bytes && part[k].offset <= bytes - part[k].size);
            EXPECT(strlen(shard_part_name(set, &part[k])) <= SHARD_NAME_MAX);
        }
    }
}

static void read_all(struct shard_set *set, const uint8_t *data)
{
    struct sample doc = { 0 };
    unsigned char *buffer = NULL;
    int64_t capacity = 0;
    char why[512];
    for (int64_t i = 0; i < set->n_samples && i < 64; i++) {
        const struct shard_part *part = shard_parts(set, i);
        for (int32_t k = 0; k < set->sample[i].n_parts && k < 64; k++) {
            why[0] = '\0';
            if (!shard_read(set, i, &part[k], PART_MOST, &buffer, &capacity, why, sizeof why)) {
                EXPECT(part[k].size > PART_MOST);
                fuzz_expect_line(why, sizeof why);
                continue;
            }
            EXPECT(memcmp(buffer, data + part[k].offset, (size_t)part[k].size) == 0);
            EXPECT(buffer[part[k].size] == '\0');
        }
        why[0] = '\0';
        if (sample_read(&doc, set, i, "<img>", "</img>", why, sizeof why))
            EXPECT(!set->sample[i].broken && doc.n_items >= 1);
        else
            fuzz_expect_line(why, sizeof why);
    }
    free(buffer);
    sample_free(&doc);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct shard_set set = { 0 };
    struct errors errors = { 0 };
    shard_init(&set, fuzz_file(data, size), "x.nml:1:1: error: data.train_data_path", &errors);
    fuzz_expect_errors(&errors);
    for (int i = 0; i < errors.count; i++)
        EXPECT(errors.worst == EXIT_DATA);
    expect_index(&set, (int64_t)size);
    if (errors.count == 0)
        read_all(&set, data);
    shard_free(&set);
    errors_free(&errors);
    return 0;
}
