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
#include "data_pack.h"
#include "log.h"
#include "rng.h"
#include "vit_map.h"

enum { SIDE_TEXT = 1, SIDE_PICTURES = 2 };
enum { BAD_IN_A_ROW = 100 };

struct draw {               /* what a stream delivered last */
    int64_t iteration, end; /* end = position afterwards */
    unsigned served;        /* sides that have it */
};

/* Samples of a stream that are packed together (data_pack.h). A stream's position is then
 * start * (buffer + 1) + packs of the window that are out. */
struct window {
    int64_t start, next;   /* samples of the stream before its first, and with its last */
    int64_t n_packs, last; /* the pack delivered last */
    int64_t *index, *length, *pictures, *first, *member; /* of data_pack; NULL: no window yet */
};

struct data_source {
    struct data_mock *mock; /* one of the two */
    struct data_webdataset *shards;
    struct data_sample sample, member; /* what is delivered; one of its members */
    struct window *window;             /* [n_streams]; NULL without packing */
    struct rng_key pack;
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
static int64_t next_whole(struct data *d, int64_t stream, int64_t *position,
                          struct data_sample *out, void *pixels);
static bool load(struct data *d, int64_t index, struct data_sample *out, void *pixels,
                 char why[DATA_WHY]);
static void next_pack(struct data *d, int64_t stream, void *pixels);
static void load_pack(struct data *d, int64_t stream, int64_t p, void *pixels);
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
    if (deck->data.packing_buffer_size > 0) {
        ASSERT(shards && mbs == 1);
        src->window = xcalloc((size_t)d->n_streams, sizeof *src->window);
        src->pack = rng_key((uint64_t)deck->run.seed, "pack");
        data_sample_init(&src->member, &d->limits);
    }
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
    out->n_segments = out->longest = out->real_tokens = 0;
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
        data_sample_free(&src->member);
        for (int64_t i = 0; src->window && i < d->n_streams; i++) {
            free(src->window[i].index);
            free(src->window[i].length);
            free(src->window[i].pictures);
            free(src->window[i].first);
            free(src->window[i].member);
        }
        free(src->window);
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
    b->segment_end = xcalloc(n * s, sizeof *b->segment_end);
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
    free(b->segment_end);
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
    s->member_end = xcalloc((size_t)s->max_ids, sizeof *s->member_end);
    s->picture = xcalloc((size_t)s->max_pictures + 1, sizeof *s->picture);
}

void data_sample_free(struct data_sample *s)
{
    free(s->ids);
    free(s->picture_of);
    free(s->member_end);
    free(s->picture);
    memset(s, 0, sizeof *s);
}

int64_t data_labels(const struct data_sample *s, bool mask_inputs, int64_t seq_length,
                    int64_t *labels, float *loss_mask)
{
    int64_t trainable = 0, member = 0;
    for (int64_t j = 0; j < seq_length; j++) {
        const int64_t end = s->n_members > 0 ? s->member_end[member] : s->n_ids;
        const bool has_next = j + 1 < end && s->picture_of[j + 1] < 0;
        const bool counts = has_next && !(mask_inputs && s->picture_of[j] >= 0);
        labels[j] = counts ? s->ids[j + 1] : -100;
        loss_mask[j] = counts ? 1.0f : 0.0f;
        trainable += counts;
        if (j + 1 == end && member + 1 < s->n_members)
            member++;
    }
    return trainable;
}

/* Patches per embedding. */
static int64_t merge_factor(const struct deck *deck)
{
    return deck->vision.pixel_shuffle ? 4 : 1;
}

/* A sample that was whole before. */
static void load_again(struct data *d, int64_t index, struct data_sample *out, void *pixels)
{
    char why[DATA_WHY];
    if (!load(d, index, out, pixels, why))
        FATAL(EXIT_DATA, "sample %s changed while in use: %s", out->key, why);
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
        if (src->window && !replay)
            next_pack(d, stream, pixels);
        else if (src->window && served)
            load_pack(d, stream, src->window[stream].last, pixels);
        else if (!replay)
            taken[b] = next_sample(d, stream, number, pixels);
        else if (served)
            load_again(d, taken[b], &src->sample, pixels);
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
    if (!src->mock)
        return next_whole(d, stream, &d->position[stream], &src->sample, pixels);
    d->position[stream]++;
    data_mock_load(src->mock, number, &src->sample, pixels);
    return number;
}

/* The next sample of the shards from a stream's position on that is not broken. */
static int64_t next_whole(struct data *d, int64_t stream, int64_t *position,
                          struct data_sample *out, void *pixels)
{
    struct data_source *src = d->source;
    for (;;) {
        const int64_t k = (*position)++;
        const int64_t index = data_webdataset_at(src->shards, k * d->n_streams + stream);
        char why[DATA_WHY];
        if (load(d, index, out, pixels, why)) {
            src->bad_in_a_row = 0;
            return index;
        }
        log_warn("sample %s skipped: %s", out->key, why);
        d->bad_samples++;
        if (++src->bad_in_a_row >= BAD_IN_A_ROW)
            fatal(EXIT_DATA, __FILE__, __LINE__,
                  "mimo --check-data lists what is wrong with each sample",
                  "%d broken samples in a row, the last one %s: %s", BAD_IN_A_ROW, out->key, why);
    }
}

static bool load(struct data *d, int64_t index, struct data_sample *out, void *pixels,
                 char why[DATA_WHY])
{
    struct data_source *src = d->source;
    memset(out->key, 0, sizeof out->key); /* batches.h5 holds all of its bytes */
    if (src->shards)
        return data_webdataset_load(src->shards, index, out, pixels, why);
    data_mock_load(src->mock, index, out, pixels);
    return true;
}

/* Read the samples of the window that begins at `start` and pack them. */
static void open_window(struct data *d, int64_t stream, int64_t start)
{
    struct data_source *src = d->source;
    struct window *w = &src->window[stream];
    const int64_t n = d->deck->data.packing_buffer_size;
    if (!w->index) {
        w->index = xcalloc((size_t)n, sizeof *w->index);
        w->length = xcalloc((size_t)n, sizeof *w->length);
        w->pictures = xcalloc((size_t)n, sizeof *w->pictures);
        w->first = xcalloc((size_t)n + 1, sizeof *w->first);
        w->member = xcalloc((size_t)n, sizeof *w->member);
    }
    w->start = w->next = start;
    for (int64_t i = 0; i < n; i++) {
        w->index[i] = next_whole(d, stream, &w->next, &src->member, NULL);
        w->length[i] = src->member.n_ids;
        w->pictures[i] = src->member.n_pictures;
    }
    w->n_packs =
        data_pack(w->length, w->pictures, n, d->limits.seq_length, src->sample.max_pictures,
                  src->pack, (uint64_t)stream, (uint64_t)start, w->first, w->member);
}

/* The stream's next pack. */
static void next_pack(struct data *d, int64_t stream, void *pixels)
{
    struct window *w = &d->source->window[stream];
    const int64_t places = d->deck->data.packing_buffer_size + 1;
    int64_t start = d->position[stream] / places, p = d->position[stream] % places;
    if (!w->index || w->start != start)
        open_window(d, stream, start);
    if (p >= w->n_packs) { /* the shards are not those that it was stored for */
        open_window(d, stream, w->next);
        start = w->start;
        p = 0;
    }
    load_pack(d, stream, p, pixels);
    w->last = p;
    d->position[stream] = p + 1 < w->n_packs ? start * places + p + 1 : w->next * places;
}

/* The members of a pack, one after the other, as one sample. */
static void load_pack(struct data *d, int64_t stream, int64_t p, void *pixels)
{
    struct data_source *src = d->source;
    struct data_sample *s = &src->sample;
    const struct data_sample *from = &src->member;
    const struct window *w = &src->window[stream];
    const int64_t patch = 3 * d->deck->vision.patch_dim * d->deck->vision.patch_dim;
    const size_t bytes = (size_t)patch * (d->deck->derived.fp64 ? sizeof(double) : sizeof(float));
    char *at = pixels;
    s->n_ids = s->n_pictures = s->n_members = 0;
    s->shrunk = s->truncated = false;
    memset(s->key, 0, sizeof s->key);
    for (int64_t i = w->first[p]; i < w->first[p + 1]; i++) {
        load_again(d, w->index[w->member[i]], &src->member, at);
        ASSERT(s->n_ids + from->n_ids <= s->max_ids);
        ASSERT(s->n_pictures + from->n_pictures <= s->max_pictures);
        for (int64_t j = 0; j < from->n_ids; j++) {
            s->ids[s->n_ids + j] = from->ids[j];
            s->picture_of[s->n_ids + j] =
                from->picture_of[j] < 0 ? -1 : from->picture_of[j] + (int32_t)s->n_pictures;
        }
        for (int64_t j = 0; j < from->n_pictures; j++) {
            s->picture[s->n_pictures++] = from->picture[j];
            if (at)
                at += (size_t)from->picture[j].patches * bytes;
        }
        s->n_ids += from->n_ids;
        s->member_end[s->n_members++] = s->n_ids;
        s->shrunk |= from->shrunk;
        s->truncated |= from->truncated;
        if (s->n_members == 1)
            memcpy(s->key, from->key, sizeof s->key);
    }
    if (s->n_members > 1) {
        const size_t room = sizeof s->key - 24;
        s->key[room] = '\0';
        const size_t n = strlen(s->key);
        snprintf(s->key + n, sizeof s->key - n, " and %" PRId64 " more", s->n_members - 1);
    }
}

/* A pack is the only row of its batch; padding is a segment of its own. */
static void add_segments(const struct data_sample *s, struct text_batch *out)
{
    int64_t n = 0, begin = 0;
    for (; n < s->n_members; n++)
        out->segment_end[n] = (int32_t)s->member_end[n];
    if (s->n_ids < out->seq_length)
        out->segment_end[n++] = (int32_t)out->seq_length;
    out->n_segments = n;
    out->real_tokens = s->n_ids;
    for (int64_t i = 0; i < n; begin = out->segment_end[i++])
        if (out->segment_end[i] - begin > out->longest)
            out->longest = out->segment_end[i] - begin;
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
    if (s->n_members > 0)
        add_segments(s, out);
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
