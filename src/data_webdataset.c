/* data_webdataset.c - samples from shards: order, token ids, picture sizes, pixels
 * (training.md 6.7, 6.8; interface.md 5).
 *
 * Order: position q of an endless sequence is sample permute_e(q mod N) of epoch e = q / N; the
 * permutation is a function of (seed, epoch) and is not stored. Validation data, and
 * shuffle_buffer_size = 0, keep the stored order. Length: text tokens, one id per embedding of each
 * picture, end of document. What is longer than S first has its pictures made smaller (one budget
 * for all pictures of the sample), then loses its end: the row stops before the first token or
 * whole picture that does not fit, and only pictures that stay are shown to the encoder. Both sides
 * call the same function, so they agree on sizes and on which samples are broken.
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>
#include "data_internal.h"
#include "image.h"
#include "log.h"
#include "path_hint.h"
#include "rng.h"
#include "sample.h"
#include "shard.h"
#include "tokenizer.h"

enum { BUDGET_ROUNDS = 10, BUDGET_RESERVE = 4, UNUSED_KINDS = 8 };

struct data_webdataset {
    const struct deck *deck;
    struct data_limits limits;
    bool shuffle;
    uint64_t seed;
    int64_t patch,
        merge; /* patch edge in pixels; patches per embedding: 4 with the pixel shuffle, else 1 */
    int64_t min_patches, max_patches; /* of a picture */
    struct shard_set set;
    struct tokenizer *tokenizer;
    int64_t image_id, end_id;
    bool *whole; /* [samples] decoded without error before */
    /* Work space of a load, reused. */
    struct sample sample;
    int64_t *ids, ids_capacity;     /* token ids of all stretches and the end of document */
    int64_t *piece, piece_capacity; /* of one stretch */
    int64_t *from;                  /* [max_tiles + 2] where stretches begin in ids, and the end */
    int64_t *cap;                   /* [max_tiles] patches */
    int32_t (*original)[2];         /* [max_tiles] width, height as stored */
    unsigned char *raw;             /* bytes of picture part raw_part of sample raw_sample */
    int64_t raw_capacity, raw_sample;
    int32_t raw_part;
    struct image picture, resized;
};

static void check_sizes(const struct deck *deck, struct errors *errors);
static void open_tokenizer(struct data_webdataset *w, struct errors *errors);
static void find_image_id(struct data_webdataset *w, struct errors *errors);
static void find_end_id(struct data_webdataset *w, struct errors *errors);
static void refuse_pictures(const struct data_webdataset *w, const char *where, const char *path,
                            struct errors *errors);
static bool encode(struct data_webdataset *w, int64_t pictures, char *why);
static bool measure(struct data_webdataset *w, int64_t index, int64_t pictures,
                    struct data_sample *out, char *why);
static void fit_pictures(struct data_webdataset *w, int64_t pictures, int64_t text,
                         struct data_sample *out);
static int64_t size_pictures(const struct data_webdataset *w, int64_t pictures,
                             struct data_sample *out);
static bool lay_out(struct data_webdataset *w, int64_t pictures, struct data_sample *out);
static bool decode(struct data_webdataset *w, int64_t index, const struct data_sample *out,
                   void *pixels, char *why);
static bool read_picture(struct data_webdataset *w, int64_t index, int64_t picture, size_t *size,
                         char *why);
static int64_t *grow(int64_t *v, int64_t *capacity, int64_t n);

struct data_webdataset *data_webdataset_new(const struct deck *deck, enum data_split split,
                                            const struct data_limits *limits, struct errors *errors)
{
    const char *key = split == DATA_TRAIN ? "train_data_path" : "valid_data_path";
    const char *path =
        split == DATA_TRAIN ? deck->data.train_data_path : deck->data.valid_data_path;
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
        errors_add(
            errors, EXIT_DATA,
            "%s = '': dataset_provider = 'webdataset' needs a tar file, a directory or a pattern",
            where);
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
    w->cap = xcalloc((size_t)limits->max_tiles_per_sample, sizeof *w->cap);
    w->from = xcalloc((size_t)limits->max_tiles_per_sample + 2, sizeof *w->from);
    w->raw_sample = -1;
    char unused[512];
    if (*data_webdataset_unused(w, unused, sizeof unused))
        log_line("data.%s: parts that are not used: %s", key, unused);
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

bool data_webdataset_load(struct data_webdataset *w, int64_t index, struct data_sample *out,
                          void *pixels, char why[DATA_WHY])
{
    static const char *const tag[][2] = { { "", "" },
                                          { "<img>", "</img>" },
                                          { "<Image>", "</Image>" } };
    const char *const *tags = tag[w->deck->data.image_tag_type];
    ASSERT(index >= 0 && index < w->set.n_samples);
    shard_key(&w->set, index, out->key, sizeof out->key);
    out->n_ids = out->n_pictures = 0;
    out->shrunk = out->truncated = false;
    if (!sample_read(&w->sample, &w->set, index, tags[0], tags[1], why, DATA_WHY))
        return false;
    /* More of them could not fit into S. */
    int64_t pictures = w->sample.n_items - 1;
    if (pictures > out->max_pictures) {
        pictures = out->max_pictures;
        out->truncated = true;
    }
    if (!encode(w, pictures, why) || !measure(w, index, pictures, out, why))
        return false;
    if (!lay_out(w, pictures, out)) {
        snprintf(why, DATA_WHY,
                 "it has no token to learn from (%" PRId64 " positions, %" PRId64 " pictures)",
                 out->n_ids, out->n_pictures);
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

const char *data_webdataset_fingerprint(const struct data_webdataset *w, char *out, size_t size)
{
    uint64_t hash = 0;
    for (int64_t i = 0; i < w->set.n_shards; i++) {
        const struct shard_file *f = &w->set.shard[i];
        const char *slash = strrchr(f->path, '/'), *name = slash ? slash + 1 : f->path;
        hash = XXH3_64bits_withSeed(name, strlen(name), hash ^ (uint64_t)f->bytes);
    }
    snprintf(out, size, "%" PRId64 " shard%s, %" PRId64 " samples, %016" PRIx64, w->set.n_shards,
             w->set.n_shards == 1 ? "" : "s", w->set.n_samples, hash);
    return out;
}

int64_t data_webdataset_ignored(const struct data_webdataset *w)
{
    return w->set.ignored;
}

const char *data_webdataset_unused(const struct data_webdataset *w, char *out, size_t size)
{
    struct {
        const char *name;
        int64_t n;
    } kind[UNUSED_KINDS] = { 0 };
    int64_t others = 0;
    for (int64_t i = 0; i < w->set.n_parts; i++) {
        const char *name = shard_part_name(&w->set, &w->set.part[i]);
        int k = 0;
        if (sample_is_picture(name) || strcmp(name, "json") == 0 || strcmp(name, "txt") == 0)
            continue;
        while (k < UNUSED_KINDS && kind[k].name && strcmp(kind[k].name, name) != 0)
            k++;
        if (k == UNUSED_KINDS) {
            others++;
            continue;
        }
        kind[k].name = name;
        kind[k].n++;
    }
    char text[512] = "", more[64] = "";
    size_t n = 0;
    for (int k = 0; k < UNUSED_KINDS && kind[k].name && n < sizeof text; k++)
        n += (size_t)snprintf(text + n, sizeof text - n, "%s%.40s %" PRId64, k ? ", " : "",
                              kind[k].name, kind[k].n);
    if (others > 0)
        snprintf(more, sizeof more, ", others %" PRId64, others);
    if (n < sizeof text)
        snprintf(text + n, sizeof text - n, "%s", more);
    return printable(out, size, text);
}

const char *data_webdataset_kind(const struct data_webdataset *w)
{
    return sample_kind_name(w->sample.kind);
}

const int32_t (*data_webdataset_original(const struct data_webdataset *w))[2]
{
    return (const int32_t(*)[2])w->original;
}

const char *data_webdataset_token(const struct data_webdataset *w, int64_t id, char *out,
                                  size_t size)
{
    char text[256];
    tokenizer_decode(w->tokenizer, &id, 1, text, sizeof text);
    return id == w->image_id ? printable(out, size, w->deck->data.image_token)
                             : printable(out, size, text);
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
    free(w->piece);
    free(w->raw);
    image_free(&w->picture);
    image_free(&w->resized);
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
    do { /* the network permutes [0, 4^half); outside [0, n) walk on along its cycle */
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

static void check_sizes(const struct deck *deck, struct errors *errors)
{
    const int64_t p = deck->vision.patch_dim, side = deck->vision.pixel_shuffle ? 2 * p : p;
    const int64_t h = deck->vision.img_h, width = deck->vision.img_w,
                  min = deck->vision.dynamic_resolution_min_patches;
    const int64_t max = deck->vision.dynamic_resolution_max_patches;
    if (deck->topology.layout == DECK_LAYOUT_LANGUAGE_ONLY)
        return;
    if (deck->vision.dynamic_resolution && max > 0 && max < min)
        errors_add(errors, EXIT_DECK,
                   "%s: error: vision.dynamic_resolution_max_patches = %" PRId64
                   ": below dynamic_resolution_min_patches (%" PRId64 ")",
                   deck_where(deck, "vision", "dynamic_resolution_max_patches"), max, min);
    if (!deck->vision.dynamic_resolution && (h < side || h % side != 0))
        errors_add(errors, EXIT_DECK,
                   "%s: error: vision.img_h = %" PRId64 ": must be a multiple of %" PRId64
                   " pixels",
                   deck_where(deck, "vision", "img_h"), h, side);
    if (!deck->vision.dynamic_resolution && (width < side || width % side != 0))
        errors_add(errors, EXIT_DECK,
                   "%s: error: vision.img_w = %" PRId64 ": must be a multiple of %" PRId64
                   " pixels",
                   deck_where(deck, "vision", "img_w"), width, side);
}

/* Without an encoder nobody could look at them. */
static void refuse_pictures(const struct data_webdataset *w, const char *where, const char *path,
                            struct errors *errors)
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
        errors_add(
            errors, EXIT_DATA,
            "%s = '%s': %" PRId64
            " samples have pictures, but layout = 'language_only' has no encoder; the first is %s",
            where, path, n, shard_key(&w->set, first, key, sizeof key));
}

static void open_tokenizer(struct data_webdataset *w, struct errors *errors)
{
    const struct deck *deck = w->deck;
    const char *where = deck_where(deck, "data", "tokenizer"), *path = deck->data.tokenizer;
    char why[512];
    if (!*path) {
        errors_add(
            errors, EXIT_DATA,
            "%s: error: data.tokenizer = '': dataset_provider = 'webdataset' needs a tokenizer",
            where);
        return;
    }
    w->tokenizer = tokenizer_open(path, why, sizeof why);
    if (!w->tokenizer) {
        char hint[512];
        const size_t n = strlen(path);
        const char *rest =
            strncmp(why, path, n) == 0 && strncmp(why + n, ": ", 2) == 0 ? why + n + 2 : why;
        errors_add(errors, EXIT_DATA, "%s: error: data.tokenizer = '%s': %s%s", where, path, rest,
                   path_hint(path, hint, sizeof hint));
        return;
    }
    find_image_id(w, errors);
    find_end_id(w, errors);
    /* The image token may lie in the padding of the vocabulary, nothing else may. */
    int64_t size = tokenizer_size(w->tokenizer);
    if (w->image_id == size - 1)
        size--;
    if (size > deck->language.vocab_size)
        errors_add(
            errors, EXIT_DECK,
            "%s: error: language.vocab_size = %" PRId64 ": tokenizer '%s' has ids up to %" PRId64,
            deck_where(deck, "language", "vocab_size"), deck->language.vocab_size, path, size - 1);
    if (deck->data.pad_token_id < 0 || deck->data.pad_token_id >= deck->derived.padded_vocab)
        errors_add(errors, EXIT_DECK,
                   "%s: error: data.pad_token_id = %" PRId64 ": must be in 0..%" PRId64,
                   deck_where(deck, "data", "pad_token_id"), deck->data.pad_token_id,
                   deck->derived.padded_vocab - 1);
}

/* By string; else the id that is named, if it is not a word; else the first id behind the
 * vocabulary. */
int64_t data_image_token(const struct deck *deck, const struct tokenizer *tokenizer)
{
    const int64_t found = tokenizer_id(tokenizer, deck->data.image_token),
                  named = deck->data.image_token_id, size = tokenizer_size(tokenizer);
    const bool given = deck_given(deck, "data", "image_token_id"),
               reserved = named >= 0 && (named >= size || tokenizer_is_added(tokenizer, named));
    if (found >= 0)
        return found;
    return reserved && (given || named < deck->derived.padded_vocab) ? named : size;
}

static void find_image_id(struct data_webdataset *w, struct errors *errors)
{
    const struct deck *deck = w->deck;
    const char *where = deck_where(deck, "data", "image_token_id"), *token = deck->data.image_token;
    const int64_t found = tokenizer_id(w->tokenizer, token), named = deck->data.image_token_id,
                  padded = deck->derived.padded_vocab;
    const bool given = deck_given(deck, "data", "image_token_id");
    w->image_id = data_image_token(deck, w->tokenizer);
    if (found >= 0 && given && named != found)
        errors_add(errors, EXIT_DECK,
                   "%s: error: data.image_token_id = %" PRId64
                   ": in tokenizer '%s' '%s' is %" PRId64,
                   where, named, deck->data.tokenizer, token, found);
    else if (found < 0 && given && w->image_id != named)
        errors_add(errors, EXIT_DECK,
                   "%s: error: data.image_token_id = %" PRId64 ": is a word of tokenizer '%s'",
                   where, named, deck->data.tokenizer);
    else if (w->image_id >= padded)
        errors_add(errors, EXIT_DECK,
                   "%s: error: data.image_token_id = %" PRId64
                   ": tokenizer '%s' has no '%s', and id %" PRId64
                   " is not below the padded vocabulary (%" PRId64 "); name a reserved id",
                   where, named, deck->data.tokenizer, token, w->image_id, padded);
    else if (w->image_id >= 0 && w->image_id == deck->data.pad_token_id)
        errors_add(errors, EXIT_DECK,
                   "%s: error: data.pad_token_id = %" PRId64 ": is the id of '%s' as well",
                   deck_where(deck, "data", "pad_token_id"), w->image_id, token);
}

static void find_end_id(struct data_webdataset *w, struct errors *errors)
{
    const char *name = w->deck->data.end_of_document;
    const bool automatic = strcmp(name, "auto") == 0;
    w->end_id = tokenizer_id(w->tokenizer, automatic ? "</s>" : name);
    if (w->end_id < 0 && automatic)
        w->end_id = tokenizer_id(w->tokenizer, "<|endoftext|>");
    char text[256];
    if (w->end_id < 0)
        errors_add(
            errors, EXIT_DECK, "%s: error: data.end_of_document = '%s': tokenizer '%s' has no %s",
            deck_where(w->deck, "data", "end_of_document"), printable(text, sizeof text, name),
            w->deck->data.tokenizer, automatic ? "'</s>' and no '<|endoftext|>'" : "such token");
}

/* Token ids of the stretches around the first `pictures` pictures; the end of document only behind
 * the last of all. */
static bool encode(struct data_webdataset *w, int64_t pictures, char *why)
{
    int64_t n = 0;
    for (int64_t k = 0; k <= pictures; k++) {
        const struct sample_item *item = &w->sample.item[k];
        w->from[k] = n;
        const int64_t got =
            tokenizer_encode(w->tokenizer, w->sample.text + item->text, item->length, &w->piece,
                             &w->piece_capacity, why, DATA_WHY);
        if (got < 0)
            return false;
        w->ids = grow(w->ids, &w->ids_capacity, n + got + 1);
        for (int64_t j = 0; j < got; j++) {
            const int64_t id = w->piece[j];
            if (id == w->image_id) {
                snprintf(why, DATA_WHY, "its text holds the image token (id %" PRId64 ")", id);
                return false;
            }
            if (id < 0 || id >= w->deck->language.vocab_size) {
                snprintf(why, DATA_WHY,
                         "token id %" PRId64 " is not below vocab_size (%" PRId64 ")", id,
                         w->deck->language.vocab_size);
                return false;
            }
            w->ids[n++] = id;
        }
    }
    if (pictures == w->sample.n_items - 1)
        w->ids[n++] = w->end_id;
    w->from[pictures + 1] = n;
    return true;
}

/* Original sizes from the headers, then sizes for the encoder. */
static bool measure(struct data_webdataset *w, int64_t index, int64_t pictures,
                    struct data_sample *out, char *why)
{
    for (int64_t i = 0; i < pictures; i++) {
        size_t size;
        int width, height;
        if (!read_picture(w, index, i, &size, why) ||
            !image_probe(w->raw, size, &width, &height, why, DATA_WHY))
            return false;
        w->original[i][0] = width;
        w->original[i][1] = height;
    }
    fit_pictures(w, pictures, w->from[pictures + 1], out);
    for (int64_t i = 0; i < pictures; i++)
        if (out->picture[i].height > IMAGE_MAX_SIDE || out->picture[i].width > IMAGE_MAX_SIDE) {
            snprintf(why, DATA_WHY, "picture %" PRId64 " would be resized to %d x %d pixels", i,
                     out->picture[i].width, out->picture[i].height);
            return false;
        }
    return true;
}

/* All pictures within one budget when the sample is longer than S ("shared token budget" of
 * training.md 6.8). */
static void fit_pictures(struct data_webdataset *w, int64_t pictures, int64_t text,
                         struct data_sample *out)
{
    for (int64_t i = 0; i < pictures; i++)
        w->cap[i] = w->max_patches;
    int64_t total = size_pictures(w, pictures, out);
    if (text + total / w->merge <= w->limits.seq_length || pictures == 0)
        return;
    if (!w->deck->vision.dynamic_resolution)
        return;
    out->shrunk = true;
    const int64_t tokens = w->limits.seq_length - text - pictures - BUDGET_RESERVE,
                  least = w->min_patches * pictures;
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
            int64_t cap = (int64_t)((__extension__(unsigned __int128) out->picture[i].patches) *
                                    (uint64_t)budget / (uint64_t)total);
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

/* Sizes of all pictures under their caps; returns the sum of their patches. */
static int64_t size_pictures(const struct data_webdataset *w, int64_t pictures,
                             struct data_sample *out)
{
    const int side = w->merge == 4 ? 2 : 1, patch = (int)w->patch;
    int64_t total = 0;
    for (int64_t i = 0; i < pictures; i++) {
        int tw = (int)(w->deck->vision.img_w / w->patch),
            th = (int)(w->deck->vision.img_h / w->patch);
        if (w->deck->vision.dynamic_resolution)
            image_grid(w->original[i][0], w->original[i][1], patch, w->min_patches, w->cap[i], side,
                       &tw, &th);
        const int64_t patches = (int64_t)tw * th, height = th * w->patch, width = tw * w->patch;
        out->picture[i] =
            (struct data_picture){ .height = height < INT32_MAX ? (int32_t)height : INT32_MAX,
                                   .width = width < INT32_MAX ? (int32_t)width : INT32_MAX,
                                   .patches = patches,
                                   .rows = patches / w->merge };
        total += patches;
    }
    return total;
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

/* Every picture that stays, also when nobody wants its pixels: what is broken is broken for all. */
static bool decode(struct data_webdataset *w, int64_t index, const struct data_sample *out,
                   void *pixels, char *why)
{
    int64_t done = 0;
    for (int64_t i = 0; i < out->n_pictures; i++) {
        size_t size;
        if (!read_picture(w, index, i, &size, why) ||
            !image_decode(w->raw, size, NULL, &w->picture, why, DATA_WHY))
            return false;
        if (w->picture.width != w->original[i][0] || w->picture.height != w->original[i][1]) {
            snprintf(why, DATA_WHY, "picture %" PRId64 " has another size than its header says", i);
            return false;
        }
        if (!pixels)
            continue;
        image_resize(&w->picture, out->picture[i].width, out->picture[i].height, &w->resized);
        const int64_t at = done * 3 * w->patch * w->patch;
        done += w->deck->derived.fp64
                    ? image_patchify_f64(&w->resized, (int)w->patch, (double *)pixels + at)
                    : image_patchify_f32(&w->resized, (int)w->patch, (float *)pixels + at);
    }
    return true;
}

/* Bytes of a picture into w->raw. */
static bool read_picture(struct data_webdataset *w, int64_t index, int64_t picture, size_t *size,
                         char *why)
{
    const int32_t k = w->sample.item[picture].part;
    const struct shard_part *part = shard_parts(&w->set, index) + k;
    *size = (size_t)part->size;
    if (w->raw_sample == index && w->raw_part == k)
        return true;
    w->raw_sample = -1;
    if (!shard_read(&w->set, index, part, SAMPLE_PICTURE_MAX, &w->raw, &w->raw_capacity, why,
                    DATA_WHY))
        return false;
    w->raw_sample = index;
    w->raw_part = k;
    return true;
}

static int64_t *grow(int64_t *v, int64_t *capacity, int64_t n)
{
    if (n <= *capacity)
        return v;
    *capacity = n + n / 2 + 256;
    return xrealloc(v, (size_t)*capacity, sizeof *v);
}
