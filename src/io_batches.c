/* io_batches.c - batches.h5: the first iterations' global batches as the model saw them, for tests
 * and for eyes.
 *
 * Rows are in the order of the global batch, (m*D + d)*mbs + b, whatever ranks served them. During
 * an iteration each writing rank (tp = cp = pp = 0 of its lane) keeps copies of its micro-batches;
 * at the end the per-sample numbers of tiles and patches are summed over ranks, so that everybody
 * knows where its rows lie, world rank 0 lays out one group, and all write through MPI-IO,
 * independently. A resumed run adds its iterations to the file it finds.
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "io_internal.h"

enum { KEY_BYTES = 256 };

struct held_text {
    int64_t m, *input_ids, *labels;
    int32_t *segment_end; /* [samples, S], -1 behind the last; NULL without packing */
    float *mask;
    char *key;
};
struct held_pictures {
    int64_t m, samples, tiles, patches;
    int64_t *tiles_per_sample; /* [samples] */
    int32_t *size;             /* [tiles, 2] */
    double *cpe;               /* [tiles, 4] */
    char *pixels;              /* [patches, 3*p*p] */
};

struct held_choice {
    int64_t m, first, rows;
    int32_t *expert; /* [rows, choices] */
};

struct held_loss {
    int64_t m;
    double *loss, *lse; /* [mbs * S] */
};

struct held_logits {
    int64_t m, first, words;
    void *value; /* [mbs * S, words] */
};

struct batch_dump {
    char path[IO_PATH];
    const struct deck *deck;
    const struct topology *topo;
    bool writes_text, writes_pictures, cpe;
    int64_t samples, seq_length, patch_dim; /* of the global batch; S; p */
    int64_t language_lane, language_lanes, encoder_rank, encoder_ranks;
    int64_t choices;                /* E layers * K: experts of one token */
    struct held_text *text;         /* [n_text] */
    struct held_choice *choice;     /* [n_choice] */
    struct held_loss *loss;         /* [n_loss] */
    struct held_logits *logits;     /* [n_logits] */
    struct held_pictures *pictures; /* [n_pictures] */
    int n_text, n_pictures, n_choice, n_loss, n_logits;
};

static bool first_of_lane(const struct grid *g)
{
    return g->present && g->member && g->tp_rank == 0 && g->cp_rank == 0 && g->pp_rank == 0;
}

/* A resumed run adds to what it finds; anything else in the way is an error, not overwritten. */
static bool continues(const char *path)
{
    char format[64] = "";
    int64_t version = 0;
    if (access(path, F_OK) != 0)
        return false;
    hid_t file = io_why_not_regular(path)[0] ? -1 : io_open(path, false);
    bool ours = file >= 0 && io_get_attr_string(file, "format", format, sizeof format) &&
                strcmp(format, "mimo-batches") == 0 &&
                io_get_attr_i64(file, "format_version", &version) && version == IO_BATCHES_VERSION;
    if (file >= 0)
        H5Fclose(file);
    if (!ours)
        fatal(EXIT_WRITE, __FILE__, __LINE__, "move the file away",
              "%s: is in the way: no batch file of format version %d", path, IO_BATCHES_VERSION);
    return true;
}

struct batch_dump *batch_dump_open(const char *path, const struct deck *deck,
                                   const struct topology *topo)
{
    io_start();
    struct batch_dump *d = xcalloc(1, sizeof *d);
    int n = snprintf(d->path, sizeof d->path, "%s", path);
    if (n < 0 || n >= (int)sizeof d->path)
        FATAL(EXIT_WRITE, "name of the batch file is too long (%d bytes)", n);
    d->deck = deck;
    d->topo = topo;
    d->writes_text = first_of_lane(&topo->language);
    d->writes_pictures = first_of_lane(&topo->encoder);
    d->cpe = !deck->vision.force_cpe_eval_mode && !deck->derived.freeze_encoder &&
             deck->run.mode != DECK_MODE_EVAL;
    d->samples = deck->batch.global_batch_size;
    d->seq_length = deck->language.seq_length;
    d->patch_dim = deck->vision.patch_dim;
    for (const char *c = deck->derived.pattern; *c; c++)
        d->choices += *c == 'E' ? deck->moe.moe_router_topk : 0;
    d->language_lane = topo->language.dp_rank;
    d->language_lanes = topo->language.dp_size;
    d->encoder_rank = topo->encoder.dp_rank;
    d->encoder_ranks = topo->encoder.present ? topo->encoder.dp_size : 0;
    if (topo->rank == 0 && !continues(path)) {
        hid_t file = io_create(path, false);
        io_put_header(path, file, "mimo-batches", IO_BATCHES_VERSION, deck);
        IO_WRITE(path, "metadata", H5Fclose(file));
        io_sync(path);
    }
    comm_host_barrier(topo->world);
    return d;
}

static void *copy_of(const void *from, size_t count, size_t size)
{
    void *p = xmalloc(count + 1, size);
    if (count)
        memcpy(p, from, count * size);
    return p;
}

/* Pixels and logits are kept in the precision of the run, bf16 widened. */
static size_t real_bytes(const struct batch_dump *d)
{
    return d->deck->derived.fp64 ? sizeof(double) : sizeof(float);
}

static hid_t real_type(const struct batch_dump *d)
{
    return d->deck->derived.fp64 ? H5T_IEEE_F64LE : H5T_IEEE_F32LE;
}

static int32_t *segment_ends(const struct text_batch *text)
{
    if (text->n_segments == 0)
        return NULL;
    int32_t *all = xcalloc((size_t)(text->samples * text->seq_length), sizeof *all);
    for (int64_t i = 0; i < text->samples * text->seq_length; i++)
        all[i] = i < text->n_segments ? text->segment_end[i] : -1;
    return all;
}

void batch_dump_add(struct batch_dump *d, int64_t m, const struct text_batch *text,
                    const struct picture_batch *pictures)
{
    ASSERT(m >= 0 && m < d->deck->derived.num_microbatches);
    if (text && d->writes_text) {
        size_t n = (size_t)(text->samples * text->seq_length);
        ASSERT(text->samples == d->deck->batch.micro_batch_size &&
               text->seq_length == d->seq_length);
        d->text = xrealloc(d->text, (size_t)d->n_text + 1, sizeof *d->text);
        d->text[d->n_text++] =
            (struct held_text){ .m = m,
                                .input_ids = copy_of(text->input_ids, n, sizeof(int64_t)),
                                .labels = copy_of(text->labels, n, sizeof(int64_t)),
                                .mask = copy_of(text->loss_mask, n, sizeof(float)),
                                .segment_end = segment_ends(text),
                                .key = copy_of(text->key, (size_t)text->samples, KEY_BYTES) };
    }
    if (pictures && d->writes_pictures) {
        size_t tiles = (size_t)pictures->tiles;
        d->pictures = xrealloc(d->pictures, (size_t)d->n_pictures + 1, sizeof *d->pictures);
        d->pictures[d->n_pictures++] = (struct held_pictures){
            .m = m,
            .samples = pictures->samples,
            .tiles = pictures->tiles,
            .patches = pictures->patches,
            .tiles_per_sample =
                copy_of(pictures->tiles_per_sample, (size_t)pictures->samples, sizeof(int64_t)),
            .size = copy_of(pictures->tile_size, tiles, 2 * sizeof(int32_t)),
            .cpe = d->cpe ? copy_of(pictures->cpe, tiles, 4 * sizeof(double)) : NULL,
            .pixels = copy_of(pictures->pixels, (size_t)pictures->patches,
                              (size_t)(3 * d->patch_dim * d->patch_dim) * real_bytes(d))
        };
    }
}

void batch_dump_choice(struct batch_dump *d, int64_t m, int64_t first, int64_t rows,
                       const int32_t *choice)
{
    if (d->choices == 0)
        return;
    d->choice = xrealloc(d->choice, (size_t)d->n_choice + 1, sizeof *d->choice);
    d->choice[d->n_choice++] =
        (struct held_choice){ .m = m,
                              .first = first,
                              .rows = rows,
                              .expert = copy_of(choice, (size_t)rows,
                                                (size_t)d->choices * sizeof *choice) };
}

void batch_dump_loss(struct batch_dump *d, int64_t m, const double *loss, const double *lse)
{
    size_t n = (size_t)(d->deck->batch.micro_batch_size * d->seq_length);
    d->loss = xrealloc(d->loss, (size_t)d->n_loss + 1, sizeof *d->loss);
    d->loss[d->n_loss++] = (struct held_loss){ .m = m,
                                               .loss = copy_of(loss, n, sizeof *loss),
                                               .lse = copy_of(lse, n, sizeof *lse) };
}

void batch_dump_logits(struct batch_dump *d, int64_t m, int64_t first, int64_t words,
                       const void *logits)
{
    size_t n = (size_t)(d->deck->batch.micro_batch_size * d->seq_length * words);
    d->logits = xrealloc(d->logits, (size_t)d->n_logits + 1, sizeof *d->logits);
    d->logits[d->n_logits++] = (struct held_logits){
        .m = m, .first = first, .words = words, .value = copy_of(logits, n, real_bytes(d))
    };
}

static void forget(struct batch_dump *d)
{
    for (int i = 0; i < d->n_logits; i++)
        free(d->logits[i].value);
    for (int i = 0; i < d->n_loss; i++) {
        free(d->loss[i].loss);
        free(d->loss[i].lse);
    }
    for (int i = 0; i < d->n_choice; i++)
        free(d->choice[i].expert);
    for (int i = 0; i < d->n_text; i++) {
        free(d->text[i].input_ids);
        free(d->text[i].labels);
        free(d->text[i].segment_end);
        free(d->text[i].mask);
        free(d->text[i].key);
    }
    for (int i = 0; i < d->n_pictures; i++) {
        free(d->pictures[i].tiles_per_sample);
        free(d->pictures[i].size);
        free(d->pictures[i].cpe);
        free(d->pictures[i].pixels);
    }
    d->n_text = d->n_pictures = d->n_choice = d->n_loss = d->n_logits = 0;
}

/* Row of the global batch where a rank's micro-batch begins. */
static int64_t first_row(const struct batch_dump *d, int64_t m, bool text, int64_t samples)
{
    int64_t whole = d->samples / d->deck->derived.num_microbatches;
    return m * whole + (text ? d->language_lane : d->encoder_rank) * samples;
}

/* Tiles and patches of every sample, [2, gbs], over all ranks. Collective over the world. */
static int64_t *count_pictures(const struct batch_dump *d)
{
    int64_t *count = xcalloc((size_t)(2 * d->samples) + 1, sizeof *count), p = d->patch_dim;
    for (int i = 0; i < d->n_pictures; i++) {
        const struct held_pictures *h = &d->pictures[i];
        int64_t row = first_row(d, h->m, false, h->samples), tile = 0, patches = 0;
        ASSERT(row + h->samples <= d->samples);
        for (int64_t s = 0; s < h->samples; s++) {
            count[row + s] = h->tiles_per_sample[s];
            for (int64_t t = 0; t < h->tiles_per_sample[s]; t++, tile++)
                count[d->samples + row + s] +=
                    (h->size[2 * tile] / p) * (h->size[2 * tile + 1] / p);
            patches += count[d->samples + row + s];
        }
        ASSERT(tile == h->tiles && patches == h->patches);
    }
    ASSERT(d->samples < 1 << 29);
    comm_host_reduce_i64(d->topo->world, count, (int)(2 * d->samples), COMM_SUM);
    return count;
}

static hid_t key_type(void)
{
    hid_t t = H5Tcopy(H5T_C_S1);
    H5Tset_size(t, KEY_BYTES);
    H5Tset_strpad(t, H5T_STR_NULLPAD);
    H5Tset_cset(t, H5T_CSET_UTF8);
    return t;
}

static void lay_out(const struct batch_dump *d, const char *name, int64_t iteration, int64_t tiles,
                    int64_t patches, const int64_t *tiles_per_sample)
{
    const char *path = d->path;
    hid_t file = IO_WRITE(path, name, io_open(path, true));
    if (H5Lexists(file, name, H5P_DEFAULT) > 0)
        IO_WRITE(path, name, H5Ldelete(file, name, H5P_DEFAULT)); /* done again after a resume */
    hid_t group = io_group(path, file, name), key = key_type();
    int64_t rows[2] = { d->samples, d->seq_length }, n[1] = { d->samples }, size[2] = { tiles, 2 },
            cpe[2] = { tiles, 4 };
    int64_t pixels[2] = { patches, 3 * d->patch_dim * d->patch_dim };
    io_attr_i64(path, group, "iteration", iteration);
    io_put(path, group, "input_ids", H5T_STD_I64LE, 2, rows, NULL, "token id",
           "tokens, padded on the right");
    io_put(path, group, "labels", H5T_STD_I64LE, 2, rows, NULL, "token id",
           "token to predict at each position");
    io_put(path, group, "loss_mask", H5T_IEEE_F32LE, 2, rows, NULL, "1",
           "weight of each position in the loss");
    io_put(path, group, "sample_key", key, 1, n, NULL, "text",
           "shard:member or mock:index of each sample");
    if (d->deck->data.packing_buffer_size > 0)
        io_put(path, group, "segment_ends", H5T_STD_I32LE, 2, rows, NULL, "tokens",
               "ends of the samples packed into each sequence and of its padding, then -1");
    io_put(path, group, "tiles_per_sample", H5T_STD_I64LE, 1, n, tiles_per_sample, "tiles",
           "pictures of each sample");
    io_put(path, group, "imgs_sizes", H5T_STD_I32LE, 2, size, NULL, "pixels",
           "height and width of each tile, in sample order");
    io_put(path, group, "patches", real_type(d), 2, pixels, NULL, "1",
           "normalised pixels of each patch, channel by channel, row by row");
    io_put(path, group, "token_loss", H5T_IEEE_F64LE, 2, rows, NULL, "nat",
           "-log(probability of the label) at each position, before the mask; 0 without a label");
    io_put(path, group, "token_lse", H5T_IEEE_F64LE, 2, rows, NULL, "nat",
           "log of the sum of exp(logits) at each position");
    if (d->deck->log.dump_logits)
        io_put(path, group, "logits", real_type(d), 2,
               (int64_t[2]){ d->samples * d->seq_length, d->deck->derived.padded_vocab }, NULL,
               "nat", "logits of each token (sample * S + position), padding words included");
    if (d->choices > 0)
        io_put(path, group, "experts", H5T_STD_I32LE, 2,
               (int64_t[2]){ d->samples * d->seq_length, d->choices }, NULL, "expert",
               "experts of each token (sample * S + position), E layer by E layer, ascending");
    if (d->cpe)
        io_put(path, group, "cpe", H5T_IEEE_F64LE, 2, cpe, NULL, "1",
               "crop of the position grid: scale_x, scale_y, off_x, off_y");
    H5Tclose(key);
    H5Gclose(group);
    IO_WRITE(path, "metadata", H5Fclose(file));
}

static hid_t open_in(const struct batch_dump *d, hid_t group, const char *name)
{
    return IO_WRITE(d->path, name, H5Dopen2(group, name, H5P_DEFAULT));
}

/* `rows` rows of `cols` columns from row `first` on (cols = 0: a dataset of one dimension). */
static void put_rows(const struct batch_dump *d, hid_t group, const char *name, hid_t type,
                     int64_t first, int64_t rows, int64_t cols, const void *data)
{
    if (rows == 0)
        return;
    hid_t set = open_in(d, group, name);
    io_write_box(d->path, name, set, type, cols ? 2 : 1, (int64_t[2]){ first, 0 },
                 (int64_t[2]){ rows, cols }, data);
    H5Dclose(set);
}

void batch_dump_write(struct batch_dump *d, int64_t iteration)
{
    char name[64];
    snprintf(name, sizeof name, "iteration_%06" PRId64, iteration);
    int64_t *count = count_pictures(d), tiles = 0, patches = 0;
    int64_t *tile_at = xcalloc((size_t)d->samples + 1, sizeof *tile_at),
            *patch_at = xcalloc((size_t)d->samples + 1, sizeof *patch_at);
    for (int64_t s = 0; s < d->samples; s++) {
        tile_at[s] = tiles;
        patch_at[s] = patches;
        tiles += count[s];
        patches += count[d->samples + s];
    }
    if (d->topo->rank == 0)
        lay_out(d, name, iteration, tiles, patches, count);
    comm_host_barrier(d->topo->world);

    hid_t file = io_open_parallel(d->path, d->topo->world);
    hid_t group = IO_WRITE(d->path, name, H5Gopen2(file, name, H5P_DEFAULT)), key = key_type();
    for (int i = 0; i < d->n_text; i++) {
        const struct held_text *h = &d->text[i];
        int64_t mbs = d->deck->batch.micro_batch_size, row = first_row(d, h->m, true, mbs);
        ASSERT(row + mbs <= d->samples);
        put_rows(d, group, "input_ids", H5T_STD_I64LE, row, mbs, d->seq_length, h->input_ids);
        put_rows(d, group, "labels", H5T_STD_I64LE, row, mbs, d->seq_length, h->labels);
        put_rows(d, group, "loss_mask", H5T_IEEE_F32LE, row, mbs, d->seq_length, h->mask);
        put_rows(d, group, "sample_key", key, row, mbs, 0, h->key);
        if (h->segment_end)
            put_rows(d, group, "segment_ends", H5T_STD_I32LE, row, mbs, d->seq_length,
                     h->segment_end);
    }
    for (int i = 0; i < d->n_choice; i++) {
        const struct held_choice *h = &d->choice[i];
        int64_t row = first_row(d, h->m, true, d->deck->batch.micro_batch_size);
        put_rows(d, group, "experts", H5T_STD_I32LE, row * d->seq_length + h->first, h->rows,
                 d->choices, h->expert);
    }
    for (int i = 0; i < d->n_loss; i++) {
        const struct held_loss *h = &d->loss[i];
        int64_t mbs = d->deck->batch.micro_batch_size, row = first_row(d, h->m, true, mbs);
        put_rows(d, group, "token_loss", H5T_IEEE_F64LE, row, mbs, d->seq_length, h->loss);
        put_rows(d, group, "token_lse", H5T_IEEE_F64LE, row, mbs, d->seq_length, h->lse);
    }
    for (int i = 0; i < d->n_logits; i++) {
        const struct held_logits *h = &d->logits[i];
        int64_t mbs = d->deck->batch.micro_batch_size, row = first_row(d, h->m, true, mbs);
        hid_t set = open_in(d, group, "logits");
        io_write_box(d->path, "logits", set, real_type(d), 2,
                     (int64_t[2]){ row * d->seq_length, h->first },
                     (int64_t[2]){ mbs * d->seq_length, h->words }, h->value);
        H5Dclose(set);
    }
    for (int i = 0; i < d->n_pictures; i++) {
        const struct held_pictures *h = &d->pictures[i];
        if (h->tiles == 0)
            continue;
        int64_t row = first_row(d, h->m, false, h->samples);
        put_rows(d, group, "imgs_sizes", H5T_STD_I32LE, tile_at[row], h->tiles, 2, h->size);
        if (d->cpe)
            put_rows(d, group, "cpe", H5T_IEEE_F64LE, tile_at[row], h->tiles, 4, h->cpe);
        put_rows(d, group, "patches", real_type(d), patch_at[row], h->patches,
                 3 * d->patch_dim * d->patch_dim, h->pixels);
    }
    H5Tclose(key);
    H5Gclose(group);
    IO_WRITE(d->path, "data to disk", H5Fflush(file, H5F_SCOPE_GLOBAL));
    io_close_parallel(d->path, file);
    free(count);
    free(tile_at);
    free(patch_at);
    forget(d);
}

void batch_dump_close(struct batch_dump *d)
{
    if (!d)
        return;
    forget(d);
    free(d->text);
    free(d->choice);
    free(d->loss);
    free(d->logits);
    free(d->pictures);
    free(d);
}
