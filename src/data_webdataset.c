/* data_webdataset.c - samples from shards: order, token ids, picture sizes, pixels (training.md 6.7, 6.8; interface.md 5).
 *
 * Order: position q of an endless sequence is sample permute_e(q mod N) of epoch e = q / N; the permutation is a function of
 * (seed, epoch) and is not stored. Validation data, and shuffle_buffer_size = 0, keep the stored order.
 * Length: text tokens, one id per embedding of each picture, end of document. What is longer than S first has its pictures
 * made smaller (one budget for all pictures of the sample), then loses its end: the row stops before the first token or whole
 * picture that does not fit, and only pictures that stay are shown to the encoder.
 * Both sides call the same function, so they agree on sizes and on which samples are broken.
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include "data_internal.h"
#include "image.h"
#include "rng.h"
#include "sample.h"
#include "shard.h"
#include "tokenizer.h"

enum { BUDGET_ROUNDS = 10, BUDGET_RESERVE = 4 };

struct data_webdataset {
    const struct deck *deck;
    struct data_limits limits;
    bool shuffle;
    uint64_t seed;
    int64_t patch, merge;             /* patch edge in pixels; patches per embedding: 4 with the pixel shuffle, else 1 */
    int64_t min_patches, max_patches; /* of a picture */
    struct shard_set set;
    struct tokenizer *tokenizer;
    int64_t image_id, end_id;
    bool *whole;                      /* [samples] decoded without error before */
    /* Work space of a load, reused. */
    struct sample sample;
    int64_t *ids, ids_capacity;       /* token ids of all stretches and the end of document */
    int64_t *from, from_capacity;     /* [stretches + 1] where they begin in ids */
    int64_t *cap, cap_capacity;       /* [pictures] patches */
    int32_t (*original)[2];           /* [max_tiles] width, height as stored */
    unsigned char *raw, *pixels, *resized;
    int64_t raw_capacity, pixels_capacity, resized_capacity;
};

static bool check_sizes(const struct deck *deck, struct errors *errors);
static void open_tokenizer(struct data_webdataset *w, struct errors *errors);
static void find_image_id(struct data_webdataset *w, struct errors *errors);
static void find_end_id(struct data_webdataset *w, struct errors *errors);
static void refuse_pictures(const struct data_webdataset *w, const char *where, const char *path, struct errors *errors);
static bool encode(struct data_webdataset *w, int64_t pictures, char *why);
static bool measure(struct data_webdataset *w, int64_t index, int64_t pictures, struct data_sample *out, char *why);
static void fit_pictures(struct data_webdataset *w, int64_t pictures, int64_t text, struct data_sample *out);
static int64_t size_pictures(const struct data_webdataset *w, int64_t pictures, struct data_sample *out);
static bool lay_out(struct data_webdataset *w, int64_t pictures, struct data_sample *out);
static bool decode(struct data_webdataset *w, int64_t index, const struct data_sample *out, void *pixels, char *why);
static bool read_picture(struct data_webdataset *w, int64_t index, int64_t picture, int64_t *size, char *why);
static int64_t *grow(int64_t *v, int64_t *capacity, int64_t n);

struct data_webdataset *data_webdataset_new(const struct deck *deck, enum data_split split, const struct data_limits *limits,
                                            struct errors *errors)
{
    const char *key = split == DATA_TRAIN ? "train_data_path" : "valid_data_path";
    const char *path = split == DATA_TRAIN ? deck->data.train_data_path : deck->data.valid_data_path;
    const int before = errors->count;
    char where[512];
    snprintf(where, sizeof where, "%.400s: error: data.%s", deck_where(deck, "data", key), key);
    struct data_webdataset *w = xcalloc(1, sizeof *w);
    w->deck = deck;
    w->limits = *limits;
    w->seed = (uint64_t)deck->run.seed;
    w->shuffle = split == DATA_TRAIN && deck->data.shuffle_buffer_size != 0;
    w->patch = deck->vision.patch_dim;
    w->merge = deck->vision.pixel_shuffle ? 4 : 1;
    w->min_patches = deck->vision.dynamic_resolution_min_patches;
    w->max_patches = deck->vision.dynamic_resolution_max_patches;
    if (w->max_patches == 0 || w->max_patches > w->merge * limits->seq_length)
        w->max_patches = w->merge * limits->seq_length;
    check_sizes(deck, errors);
    if (!*path)
        errors_add(errors, EXIT_DATA, "%s = '': dataset_provider = 'webdataset' needs a tar file, a directory or a pattern", where);
    else
        shard_init(&w->set, path, where, errors);
    if (deck->topology.layout == DECK_LAYOUT_LANGUAGE_ONLY)
        refuse_pictures(w, where, path, errors);
    open_tokenizer(w, errors);
    if (errors->count > before) {
        data_webdataset_free(w);
        return NULL;
    }
    w->whole = xcalloc((size_t)w->set.n_samples, sizeof *w->whole);
    w->original = xcalloc((size_t)limits->max_tiles_per_sample, sizeof *w->original);
    w->cap = grow(w->cap, &w->cap_capacity, limits->max_tiles_per_sample);
    return w;
}

int64_t data_webdataset_size(const struct data_webdataset *w)
{
    return w->set.n_samples;
}

int64_t data_webdataset_at(const struct data_webdataset *w, int64_t q)
{
    const uint64_t n = (uint64_t)w->set.n_samples, position = (uint64_t)q % n;
    return (int64_t)(w->shuffle ? data_permute(w->seed, (uint64_t)q / n, n, position) : position);
}

bool data_webdataset_load(struct data_webdataset *w, int64_t index, struct data_sample *out, void *pixels, char why[DATA_WHY])
{
    static const char *const tag[][2] = { { "", "" }, { "<img>", "</img>" }, { "<Image>", "</Image>" } };
    const char *const *tags = tag[w->deck->data.image_tag_type];
    ASSERT(index >= 0 && index < w->set.n_samples);
    shard_key(&w->set, index, out->key, sizeof out->key);
    out->n_ids = out->n_pictures = 0;
    out->shrunk = out->truncated = false;
    if (!sample_read(&w->sample, &w->set, index, tags[0], tags[1], why, DATA_WHY))
        return false;
    /* Each picture has at least one embedding of those that max_pictures counts: more than that cannot fit. */
    int64_t pictures = w->sample.n_items - 1;
    if (pictures > out->max_pictures) {
        pictures = out->max_pictures;
        out->truncated = true;
    }
    if (!encode(w, pictures, why) || !measure(w, index, pictures, out, why))
        return false;
    const bool trainable = lay_out(w, pictures, out);
    if (!trainable) {
        snprintf(why, DATA_WHY, "it has no token to learn from (%" PRId64 " positions, %" PRId64 " pictures)", out->n_ids,
                 out->n_pictures);
        return false;
    }
    if (pixels || !w->whole[index]) {
        if (!decode(w, index, out, pixels, why))
            return false;
        w->whole[index] = true;
    }
    return true;
}

int64_t data_webdataset_shards(const struct data_webdataset *w)
{
    return w->set.n_shards;
}

int64_t data_webdataset_ignored(const struct data_webdataset *w)
{
    return w->set.ignored;
}

const char *data_webdataset_kind(const struct data_webdataset *w)
{
    return sample_kind_name(w->sample.kind);
}

int64_t data_webdataset_image_id(const struct data_webdataset *w)
{
    return w->image_id;
}

const int32_t (*data_webdataset_original(const struct data_webdataset *w))[2]
{
    return (const int32_t(*)[2])w->original;
}

void data_webdataset_free(struct data_webdataset *w)
{
    if (!w)
        return;
    shard_free(&w->set);
    tokenizer_free(w->tokenizer);
    sample_free(&w->sample);
    free(w->whole);
    free(w->ids);
    free(w->from);
    free(w->cap);
    free(w->original);
    free(w->raw);
    free(w->pixels);
    free(w->resized);
    free(w);
}

uint64_t data_permute(uint64_t seed, uint64_t epoch, uint64_t n, uint64_t position)
{
    const struct rng_key key = rng_key(seed, "shuffle");
    int half = 1;
    while (half < 31 && (uint64_t)1 << (2 * half) < n)
        half++;
    ASSERT(position < n && n <= (uint64_t)1 << (2 * half));
    const uint64_t mask = ((uint64_t)1 << half) - 1;
    uint64_t x = position;
    do {                              /* the network permutes [0, 4^half); outside [0, n) walk on along its cycle */
        uint64_t left = x >> half, right = x & mask;
        for (uint64_t round = 0; round < 4; round++) {
            uint32_t word[4];
            rng_philox(key, epoch, round << 32 | right, word);
            const uint64_t next = left ^ (word[0] & mask);
            left = right;
            right = next;
        }
        x = left << half | right;
    } while (x >= n);
    return x;
}

static bool check_sizes(const struct deck *deck, struct errors *errors)
{
    const int before = errors->count;
    const int64_t p = deck->vision.patch_dim, side = deck->vision.pixel_shuffle ? 2 * p : p;
    const int64_t h = deck->vision.img_h, width = deck->vision.img_w, min = deck->vision.dynamic_resolution_min_patches;
    const int64_t max = deck->vision.dynamic_resolution_max_patches;
    if (deck->topology.layout == DECK_LAYOUT_LANGUAGE_ONLY)
        return true;
    if (deck->vision.dynamic_resolution && max > 0 && max < min)
        errors_add(errors, EXIT_DECK,
                   "%s: error: vision.dynamic_resolution_max_patches = %" PRId64
                   ": below dynamic_resolution_min_patches (%" PRId64 ")",
                   deck_where(deck, "vision", "dynamic_resolution_max_patches"), max, min);
    if (!deck->vision.dynamic_resolution && (h < side || h % side != 0))
        errors_add(errors, EXIT_DECK, "%s: error: vision.img_h = %" PRId64 ": must be a multiple of %" PRId64 " pixels",
                   deck_where(deck, "vision", "img_h"), h, side);
    if (!deck->vision.dynamic_resolution && (width < side || width % side != 0))
        errors_add(errors, EXIT_DECK, "%s: error: vision.img_w = %" PRId64 ": must be a multiple of %" PRId64 " pixels",
                   deck_where(deck, "vision", "img_w"), width, side);
    return errors->count == before;
}

/* Without an encoder nobody could look at them. */
static void refuse_pictures(const struct data_webdataset *w, const char *where, const char *path, struct errors *errors)
{
    int64_t n = 0, first = -1;
    for (int64_t i = 0; i < w->set.n_samples; i++) {
        const struct shard_part *part = shard_parts(&w->set, i);
        bool has = false;
        for (int32_t k = 0; k < w->set.sample[i].n_parts; k++)
            has = has || sample_is_picture(shard_part_name(&w->set, &part[k]));
        if (has && n++ == 0)
            first = i;
    }
    char key[256];
    if (n > 0)
        errors_add(errors, EXIT_DATA,
                   "%s = '%s': %" PRId64 " samples have pictures, but layout = 'language_only' has no encoder; the first is %s",
                   where, path, n, shard_key(&w->set, first, key, sizeof key));
}

/* All pictures within one budget when the sample is longer than S ("shared token budget" of training.md 6.8). */
static void fit_pictures(struct data_webdataset *w, int64_t pictures, int64_t text, struct data_sample *out)
{
    for (int64_t i = 0; i < pictures; i++)
        w->cap[i] = w->max_patches;
    int64_t total = size_pictures(w, pictures, out);
    if (text + total / w->merge <= w->limits.seq_length || pictures == 0)
        return;
    if (!w->deck->vision.dynamic_resolution)
        return;
    out->shrunk = true;
    const int64_t tokens = w->limits.seq_length - text - pictures - BUDGET_RESERVE, least = w->min_patches * pictures;
    const int64_t budget = tokens * w->merge > least ? tokens * w->merge : least;
    int64_t start = budget > w->min_patches ? budget : w->min_patches;
    if (start > w->max_patches)
        start = w->max_patches;
    for (int64_t i = 0; i < pictures; i++)
        w->cap[i] = start;
    for (int round = 0; round < BUDGET_ROUNDS; round++) {
        total = size_pictures(w, pictures, out);
        if (total <= budget)
            return;
        bool decreased = false;
        for (int64_t i = 0; i < pictures; i++) {
            int64_t cap = (int64_t)((__extension__ (unsigned __int128)out->picture[i].patches) * (uint64_t)budget / (uint64_t)total);
            if (cap < w->min_patches)
                cap = w->min_patches;
            if (cap < w->cap[i]) {
                w->cap[i] = cap;
                decreased = true;
            }
        }
        for (int64_t i = 0; !decreased && i < pictures; i++)
            w->cap[i] = w->min_patches;
    }
    size_pictures(w, pictures, out);
}

/* Text and pictures in order until S is full. Returns whether a position is left to learn from. */
static bool lay_out(struct data_webdataset *w, int64_t pictures, struct data_sample *out)
{
    const int64_t length = w->limits.seq_length;
    int64_t trainable = 0, n = 0;
    bool full = false;
    for (int64_t k = 0; k <= pictures && !full; k++) {
        int64_t text = w->from[k + 1] - w->from[k];
        if (text > length - n) {
            text = length - n;
            full = true;
        }
        memcpy(out->ids + n, w->ids + w->from[k], (size_t)text * sizeof *out->ids);
        for (int64_t j = 0; j < text; j++)
            out->picture_of[n + j] = -1;
        n += text;
        if (k == pictures || full)
            break;
        const int64_t rows = out->picture[k].rows;
        if (rows > length - n) {
            full = true;
            break;
        }
        for (int64_t j = 0; j < rows; j++) {
            out->ids[n + j] = w->image_id;
            out->picture_of[n + j] = (int32_t)k;
        }
        n += rows;
        out->n_pictures = k + 1;
    }
    out->n_ids = n;
    out->truncated = out->truncated || full;
    for (int64_t j = 0; j + 1 < n; j++)
        trainable += out->picture_of[j] < 0 && out->picture_of[j + 1] < 0;
    return trainable > 0;
}

static int64_t *grow(int64_t *v, int64_t *capacity, int64_t n)
{
    if (n <= *capacity)
        return v;
    *capacity = n + n / 2 + 256;
    return xrealloc(v, (size_t)*capacity, sizeof *v);
}
