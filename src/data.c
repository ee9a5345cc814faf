/* data.c - which samples a micro-batch holds, and the batches made of them.
 *
 * An iteration has gbs/mbs slots, slot = m*D + d for micro-batch m of language lane d. Slot `slot`
 * of iteration i reads its mbs samples from stream (i*gbs/mbs + slot) mod data_streams, and the
 * number of its sample b is i*gbs + slot*mbs + b, the key of every random draw. Nothing here knows
 * a rank: a language rank asks for its lane, an encoder rank for a range of samples of the
 * micro-batch, and both walk the same streams. Since data_streams is a multiple of D, a lane always
 * reads the same streams.
 *
 * A broken sample moves its stream on by one, so every reader of a stream must find the same
 * samples broken: each of them decodes every picture, also those it does not deliver (encoder ranks
 * that share a lane, language ranks). A colocated rank asks twice for the same slot, once for the
 * text and once for the pictures; the second call replays what the first one drew.
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include "data_internal.h"
#include "log.h"
#include "rng.h"
#include "vit_map.h"

enum { SIDE_TEXT = 1, SIDE_PICTURES = 2 };
enum { BAD_IN_A_ROW = 100 };

struct draw {               /* what a stream delivered last */
    int64_t iteration, end; /* end = position afterwards */
    unsigned served;        /* sides that have it */
};

struct data_source {
    struct data_mock *mock; /* one of the two */
    struct data_webdataset *shards;
    struct data_sample sample;
    int64_t samples_per_slot, slots, lanes;
    struct draw *draw; /* [n_streams] */
    int64_t *taken;    /* [n_streams, samples_per_slot] sample numbers of the draw */
    bool *lane_read;   /* [lanes] by this rank */
    bool any_lane_read;
    struct rng_key cpe;
    int64_t bad_in_a_row;
};

static int64_t merge_factor(const struct deck *deck);
static void take(struct data *d, int64_t iteration, int64_t slot, int64_t first, int64_t last,
                 unsigned side, struct text_batch *text, struct picture_batch *pictures);
static int64_t next_sample(struct data *d, int64_t stream, int64_t number, void *pixels);
static bool load(struct data *d, int64_t index, void *pixels, char why[DATA_WHY]);
static void add_text(const struct data *d, int64_t number, struct text_batch *out);
static void add_pictures(const struct data *d, int64_t number, struct picture_batch *out);

struct data_limits data_limits(const struct deck *deck)
{
    struct data_limits l = { .seq_length = deck->language.seq_length };
    if (deck->topology.layout == DECK_LAYOUT_LANGUAGE_ONLY)
        return l;
    if (deck->data.dataset_provider == DECK_PROVIDER_MOCK) {
        struct data_mock_shape shape;
        if (data_mock_shape(deck, &shape, NULL)) {
            l.max_tiles_per_sample = shape.tiles;
            l.max_patches_per_sample = shape.tiles * shape.patches;
        }
        return l;
    }
    /* The image tokens of a sample fit into S. */
    const int64_t merge = merge_factor(deck), p = deck->vision.patch_dim;
    l.max_patches_per_sample = merge * l.seq_length;
    int64_t smallest = deck->vision.dynamic_resolution_min_patches;
    if (!deck->vision.dynamic_resolution)
        smallest = (deck->vision.img_h / p) * (deck->vision.img_w / p);
    l.max_tiles_per_sample = l.max_patches_per_sample / (smallest > merge ? smallest : merge);
    if (l.max_tiles_per_sample < 1)
        l.max_tiles_per_sample = 1;
    return l;
}

void data_init(struct data *d, const struct deck *deck, enum data_split split,
               struct errors *errors)
{
    memset(d, 0, sizeof *d);
    d->deck = deck;
    d->split = split;
    d->limits = data_limits(deck);
    const int64_t mbs = deck->batch.micro_batch_size, gbs = deck->batch.global_batch_size;
    ASSERT(mbs > 0 && gbs > 0 && gbs % mbs == 0 && deck->derived.num_microbatches > 0);
    ASSERT(gbs / mbs % deck->derived.num_microbatches == 0);

    const int before = errors->count;
    struct data_mock *mock = NULL;
    struct data_webdataset *shards = NULL;
    if (deck->data.dataset_provider == DECK_PROVIDER_MOCK) {
        struct data_mock_shape shape;
        if (data_mock_shape(deck, &shape, errors))
            mock = data_mock_new(deck, split);
    } else {
        shards = data_webdataset_new(deck, split, &d->limits, errors);
    }
    d->n_streams = deck->derived.data_streams > 0 ? deck->derived.data_streams : gbs / mbs;
    if (d->n_streams % (gbs / mbs) != 0)
        errors_add(errors, EXIT_DECK,
                   "%s: error: data.data_streams = %" PRId64
                   ": must be a multiple of global_batch_size / micro_batch_size (%" PRId64 ")",
                   deck_where(deck, "data", "data_streams"), d->n_streams, gbs / mbs);
    if (errors->count > before) {
        data_mock_free(mock);
        data_webdataset_free(shards);
        return;
    }
    struct data_source *src = xcalloc(1, sizeof *src);
    src->mock = mock;
    src->shards = shards;
    src->samples_per_slot = mbs;
    src->slots = gbs / mbs;
    src->lanes = src->slots / deck->derived.num_microbatches;
    src->draw = xcalloc((size_t)d->n_streams, sizeof *src->draw);
    for (int64_t s = 0; s < d->n_streams; s++)
        src->draw[s].iteration = -1;
    src->taken = xcalloc((size_t)(d->n_streams * mbs), sizeof *src->taken);
    src->lane_read = xcalloc((size_t)src->lanes, sizeof *src->lane_read);
    src->cpe = rng_key((uint64_t)deck->run.seed, "cpe");
    data_sample_init(&src->sample, &d->limits);
    d->source = src;
    d->position = xcalloc((size_t)d->n_streams, sizeof *d->position);
}

void data_text(struct data *d, int64_t iteration, int64_t m, int lane, int lanes,
               struct text_batch *out)
{
    struct data_source *src = d->source;
    ASSERT(lanes == src->lanes && lane >= 0 && lane < lanes);
    ASSERT(m >= 0 && (m + 1) * lanes <= src->slots && iteration >= 0);
    ASSERT(out->seq_length == d->limits.seq_length);
    out->samples = out->image_rows = out->loss_tokens = 0;
    src->lane_read[lane] = src->any_lane_read = true;
    take(d, iteration, m * lanes + lane, 0, src->samples_per_slot, SIDE_TEXT, out, NULL);
}

void data_pictures(struct data *d, int64_t iteration, int64_t m, int rank, int ranks,
                   struct picture_batch *out)
{
    struct data_source *src = d->source;
    const int64_t mbs = src->samples_per_slot, all = mbs * src->lanes, mine = all / ranks;
    ASSERT(all % ranks == 0 && rank >= 0 && rank < ranks);
    ASSERT(m >= 0 && (m + 1) * src->lanes <= src->slots && iteration >= 0);
    out->samples = out->tiles = out->patches = out->rows = 0;
    for (int64_t j = rank * mine; j < (rank + 1) * mine;) {
        const int64_t lane = j / mbs, first = j % mbs;
        const int64_t left = (rank + 1) * mine - j, last = first + left < mbs ? first + left : mbs;
        src->lane_read[lane] = src->any_lane_read = true;
        take(d, iteration, m * src->lanes + lane, first, last, SIDE_PICTURES, NULL, out);
        j += last - first;
    }
}

/* Before its first batch a rank does not know its lanes and passes over all of them. That moves
 * streams it does not read, but never past where their readers are, and data_gather_positions takes
 * the largest. */
void data_skip(struct data *d, int64_t iteration)
{
    struct data_source *src = d->source;
    for (int64_t slot = 0; slot < src->slots; slot++)
        if (!src->any_lane_read || src->lane_read[slot % src->lanes])
            take(d, iteration, slot, 0, 0, 0, NULL, NULL);
}

void data_gather_positions(struct data *d, struct comm *world)
{
    comm_host_reduce_i64(world, d->position, (int)d->n_streams, COMM_MAX);
}

const char *data_fingerprint(const struct data *d, char *out, size_t size)
{
    out[0] = '\0';
    return d->source && d->source->shards
               ? data_webdataset_fingerprint(d->source->shards, out, size)
               : out;
}

void data_free(struct data *d)
{
    struct data_source *src = d->source;
    if (src) {
        data_mock_free(src->mock);
        data_webdataset_free(src->shards);
        data_sample_free(&src->sample);
        free(src->draw);
        free(src->taken);
        free(src->lane_read);
        free(src);
    }
    free(d->position);
    memset(d, 0, sizeof *d);
}

void text_batch_init(struct text_batch *b, const struct data_limits *l, int64_t samples)
{
    const size_t n = (size_t)samples, s = (size_t)l->seq_length;
    memset(b, 0, sizeof *b);
    b->samples = samples;
    b->seq_length = l->seq_length;
    b->input_ids = xcalloc(n * s, sizeof *b->input_ids);
    b->labels = xcalloc(n * s, sizeof *b->labels);
    b->loss_mask = xcalloc(n * s, sizeof *b->loss_mask);
    b->image_row = xcalloc(n * s, sizeof *b->image_row);
    b->image_rows_per_sample = xcalloc(n, sizeof *b->image_rows_per_sample);
    b->sample_index = xcalloc(n, sizeof *b->sample_index);
    b->key = xcalloc(n, sizeof *b->key);
}

void text_batch_free(struct text_batch *b)
{
    free(b->input_ids);
    free(b->labels);
    free(b->loss_mask);
    free(b->image_row);
    free(b->image_rows_per_sample);
    free(b->sample_index);
    free(b->key);
    memset(b, 0, sizeof *b);
}

void picture_batch_init(struct picture_batch *b, const struct data_limits *l, int64_t samples,
                        int64_t patch_width, bool fp64)
{
    const size_t n = (size_t)samples, tiles = n * (size_t)l->max_tiles_per_sample;
    memset(b, 0, sizeof *b);
    b->samples = samples;
    b->tile_size = xcalloc(tiles, sizeof *b->tile_size);
    b->tiles_per_sample = xcalloc(n, sizeof *b->tiles_per_sample);
    b->rows_per_sample = xcalloc(n, sizeof *b->rows_per_sample);
    b->cpe = xcalloc(tiles, sizeof *b->cpe);
    b->pixels = xcalloc(n * (size_t)l->max_patches_per_sample * (size_t)patch_width,
                        fp64 ? sizeof(double) : sizeof(float));
    b->sample_index = xcalloc(n, sizeof *b->sample_index);
    b->key = xcalloc(n, sizeof *b->key);
}

void picture_batch_free(struct picture_batch *b)
{
    free(b->tile_size);
    free(b->tiles_per_sample);
    free(b->rows_per_sample);
    free(b->cpe);
    free(b->pixels);
    free(b->sample_index);
    free(b->key);
    memset(b, 0, sizeof *b);
}

void data_sample_init(struct data_sample *s, const struct data_limits *limits)
{
    memset(s, 0, sizeof *s);
    s->max_ids = limits->seq_length;
    s->max_pictures = limits->max_tiles_per_sample;
    s->ids = xcalloc((size_t)s->max_ids, sizeof *s->ids);
    s->picture_of = xcalloc((size_t)s->max_ids, sizeof *s->picture_of);
    s->picture = xcalloc((size_t)s->max_pictures + 1, sizeof *s->picture);
}

void data_sample_free(struct data_sample *s)
{
    free(s->ids);
    free(s->picture_of);
    free(s->picture);
    memset(s, 0, sizeof *s);
}

int64_t data_labels(const struct data_sample *s, bool mask_inputs, int64_t seq_length,
                    int64_t *labels, float *loss_mask)
{
    int64_t trainable = 0;
    for (int64_t j = 0; j < seq_length; j++) {
        const bool has_next = j + 1 < s->n_ids && s->picture_of[j + 1] < 0;
        const bool counts = has_next && !(mask_inputs && s->picture_of[j] >= 0);
        labels[j] = counts ? s->ids[j + 1] : -100;
        loss_mask[j] = counts ? 1.0f : 0.0f;
        trainable += counts;
    }
    return trainable;
}

/* Patches per embedding. */
static int64_t merge_factor(const struct deck *deck)
{
    return deck->vision.pixel_shuffle ? 4 : 1;
}

/* Draw the samples of a slot and deliver those with first <= b < last. */
static void take(struct data *d, int64_t iteration, int64_t slot, int64_t first, int64_t last,
                 unsigned side, struct text_batch *text, struct picture_batch *pictures)
{
    struct data_source *src = d->source;
    const int64_t mbs = src->samples_per_slot,
                  dim = 3 * d->deck->vision.patch_dim * d->deck->vision.patch_dim;
    const int64_t stream = (iteration % d->n_streams * src->slots + slot) % d->n_streams;
    struct draw *draw = &src->draw[stream];
    int64_t *taken = src->taken + stream * mbs;
    const bool replay =
        draw->iteration == iteration && draw->end == d->position[stream] && !(draw->served & side);
    for (int64_t b = 0; b < mbs; b++) {
        const bool served = b >= first && b < last;
        const int64_t number = (iteration * src->slots + slot) * mbs + b;
        void *pixels = NULL;
        if (served && pictures)
            pixels = d->deck->derived.fp64
                         ? (void *)((double *)pictures->pixels + pictures->patches * dim)
                         : (void *)((float *)pictures->pixels + pictures->patches * dim);
        if (!replay) {
            taken[b] = next_sample(d, stream, number, pixels);
        } else if (served) {
            char why[DATA_WHY];
            if (!load(d, taken[b], pixels, why))
                FATAL(EXIT_DATA, "sample %s changed while in use: %s", src->sample.key, why);
        }
        if (served && text)
            add_text(d, number, text);
        if (served && pictures)
            add_pictures(d, number, pictures);
    }
    draw->served = replay ? draw->served | side : side;
    draw->iteration = iteration;
    draw->end = d->position[stream];
}

/* Load the next whole sample of the stream; returns its number in the data set. */
static int64_t next_sample(struct data *d, int64_t stream, int64_t number, void *pixels)
{
    struct data_source *src = d->source;
    for (;;) {
        const int64_t k = d->position[stream]++;
        if (src->mock) {
            data_mock_load(src->mock, number, &src->sample, pixels);
            return number;
        }
        const int64_t index = data_webdataset_at(src->shards, k * d->n_streams + stream);
        char why[DATA_WHY];
        if (load(d, index, pixels, why)) {
            src->bad_in_a_row = 0;
            return index;
        }
        log_warn("sample %s skipped: %s", src->sample.key, why);
        d->bad_samples++;
        if (++src->bad_in_a_row >= BAD_IN_A_ROW)
            fatal(EXIT_DATA, __FILE__, __LINE__,
                  "mimo --check-data lists what is wrong with each sample",
                  "%d broken samples in a row, the last one %s: %s", BAD_IN_A_ROW, src->sample.key,
                  why);
    }
}

static bool load(struct data *d, int64_t index, void *pixels, char why[DATA_WHY])
{
    struct data_source *src = d->source;
    memset(src->sample.key, 0, sizeof src->sample.key); /* batches.h5 holds all of its bytes */
    if (src->shards)
        return data_webdataset_load(src->shards, index, &src->sample, pixels, why);
    data_mock_load(src->mock, index, &src->sample, pixels);
    return true;
}

static void add_text(const struct data *d, int64_t number, struct text_batch *out)
{
    const struct data_sample *s = &d->source->sample;
    const int64_t b = out->samples++, length = out->seq_length;
    int64_t *ids = out->input_ids + b * length;
    int32_t *row = out->image_row + b * length;
    int64_t rows = 0, expected = 0;
    for (int64_t j = 0; j < length; j++) {
        const bool image = j < s->n_ids && s->picture_of[j] >= 0;
        ids[j] = j < s->n_ids ? s->ids[j] : d->deck->data.pad_token_id;
        row[j] = image ? (int32_t)(out->image_rows + rows++) : -1;
    }
    for (int64_t t = 0; t < s->n_pictures; t++)
        expected += s->picture[t].rows;
    if (rows != expected)
        FATAL(EXIT_INTERNAL,
              "sample %s has %" PRId64 " image tokens for %" PRId64 " picture embeddings", s->key,
              rows, expected);
    out->loss_tokens += data_labels(s, d->source->shards != NULL, length, out->labels + b * length,
                                    out->loss_mask + b * length);
    out->image_rows_per_sample[b] = rows;
    out->image_rows += rows;
    out->sample_index[b] = number;
    memcpy(out->key[b], s->key, sizeof s->key);
}

static void add_pictures(const struct data *d, int64_t number, struct picture_batch *out)
{
    const struct data_sample *s = &d->source->sample;
    const int64_t b = out->samples++;
    out->tiles_per_sample[b] = s->n_pictures;
    out->rows_per_sample[b] = 0;
    for (int64_t t = 0; t < s->n_pictures; t++) {
        const int64_t tile = out->tiles++;
        const uint64_t key = (uint64_t)number, block = 2 * (uint64_t)t;
        const struct rng_key cpe = d->source->cpe;
        out->tile_size[tile][0] = s->picture[t].height;
        out->tile_size[tile][1] = s->picture[t].width;
        vit_map_cpe(rng_uniform(cpe, key, block, 0), rng_uniform(cpe, key, block, 1),
                    rng_uniform(cpe, key, block + 1, 0), rng_uniform(cpe, key, block + 1, 1),
                    out->cpe[tile]);
        out->patches += s->picture[t].patches;
        out->rows_per_sample[b] += s->picture[t].rows;
    }
    out->rows += out->rows_per_sample[b];
    out->sample_index[b] = number;
    memcpy(out->key[b], s->key, sizeof s->key);
}
