/* data.h - micro-batches: pictures for the encoder grid, tokens for the language grid, from one
 * deterministic stream.
 *
 * What a sample is depends on (seed, data set, data_streams) only, never on ranks: iteration i,
 * micro-batch m, lane d of D takes the stream samples i*gbs + (m*D + d)*mbs + b (interface.md 3).
 * Encoder and language ranks derive the same samples from the same indices, so pictures and text
 * cannot come apart. Encoder rank e of E serves the samples j = d*mbs + b of micro-batch m with
 * e*encoder_mbs <= j < (e+1)*encoder_mbs; several lanes or a part of one. Host memory; the schedule
 * copies what the device needs. All buffers are sized once (data_plan) and reused.
 */
#ifndef MIMO_DATA_H
#define MIMO_DATA_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include "arena.h"
#include "deck.h"
#include "topology.h"

enum data_split { DATA_TRAIN, DATA_VALID };

/* What any micro-batch of this job can need at most; everything else is sized from it. */
struct data_limits {
    int64_t seq_length; /* S */
    int64_t max_patches_per_sample, max_tiles_per_sample;
};
/* From the deck alone (mock: exact; shards: from seq_length and the patch bounds). Local. */
struct data_limits data_limits(const struct deck *deck);

/* Rows of the language module: B = micro_batch_size samples, right-padded to S. */
struct text_batch {
    int64_t samples, seq_length;    /* B, S */
    int64_t *input_ids, *labels;    /* [B,S] */
    float *loss_mask;               /* [B,S] */
    int32_t *image_row;             /* [B,S] row of this batch's picture embeddings, -1 = text */
    int64_t *image_rows_per_sample; /* [B] */
    int64_t image_rows;             /* sum */
    int64_t loss_tokens;            /* sum of the mask */
    /* Rows that attention, convolution and scan do not look across. n_segments = 0: every sample is
     * one segment. Else row segment_end[i]-1 is the last of segment i [<= B*S], the last one is
     * B*S, `longest` of them is the largest; real_tokens = tokens that are no padding. */
    int64_t n_segments, longest, real_tokens;
    int32_t *segment_end;
    /* [B] global stream index: the key of every random draw of the sample */
    int64_t *sample_index;
    char (*key)[256]; /* [B] "shard:member" or "mock:index", printable */
};

/* Pictures of encoder_mbs samples, sample by sample. */
struct picture_batch {
    int64_t samples;
    int64_t tiles, patches;    /* of this batch */
    int32_t (*tile_size)[2];   /* [tiles] height, width in PIXELS */
    int64_t *tiles_per_sample; /* [samples] */
    int64_t *rows_per_sample;  /* [samples] embeddings after pixel shuffle */
    int64_t rows;              /* sum */
    /* [tiles] scale_x scale_y off_x off_y, drawn by (seed, "cpe", sample index, tile of the
     * sample) */
    double (*cpe)[4];
    /* [patches, 3*p*p] float, or double in an fp64 run: normalised, (channel,y,x) per patch */
    void *pixels;
    int64_t *sample_index; /* [samples] */
    char (*key)[256];      /* [samples] */
};

struct data_source; /* mock or shards; data.c only */

struct data {
    const struct deck *deck;
    struct data_limits limits;
    enum data_split split;
    struct data_source *source;
    int64_t n_streams;
    /* [n_streams] samples taken so far from each stream (bad ones included), of the streams this
     * rank reads */
    int64_t *position;
    int64_t bad_samples; /* skipped by this rank so far */
};

/* Open the data set of a split (empty valid_data_path: fails for DATA_VALID unless mock). Mistakes
 * (missing shard, hostile tar, tokenizer) are collected with EXIT_DATA and a hint. Local: every
 * rank reads for itself. */
void data_init(struct data *d, const struct deck *deck, enum data_split split,
               struct errors *errors);
/* Fill the batch that language lane `lane` of `lanes` / encoder rank `lane` of `lanes` needs for
 * micro-batch m of iteration i (0-based), continuing from position[]. A broken sample is named
 * (log_warn), counted and skipped; a hundred in a row are fatal (EXIT_DATA). Call once per (i, m),
 * in order. The text form reads the pictures' sizes, and decodes them so that both sides agree on
 * which samples are broken. Local. */
void data_text(struct data *d, int64_t iteration, int64_t m, int lane, int lanes,
               struct text_batch *out);
void data_pictures(struct data *d, int64_t iteration, int64_t m, int rank, int ranks,
                   struct picture_batch *out);
/* Pass over an iteration without delivering it (iterations_to_skip); advances position[] exactly as
 * delivery would. Local. */
void data_skip(struct data *d, int64_t iteration);
/* Total positions for the checkpoint: on return position[] is complete on every rank (max over
 * ranks). Collective over world. */
void data_gather_positions(struct data *d, struct comm *world);
/* What tells one set of shards from another, in words; "" for generated samples. Writes at most
 * size bytes into out, returns out. Local. */
const char *data_fingerprint(const struct data *d, char *out, size_t size);
void data_free(struct data *d);

/* Buffers of one batch, from the limits; patch_width = 3*p*p numbers of a patch; `fp64` sets the
 * pixel type. Local. */
void text_batch_init(struct text_batch *b, const struct data_limits *l, int64_t samples);
void text_batch_free(struct text_batch *b);
void picture_batch_init(struct picture_batch *b, const struct data_limits *l, int64_t samples,
                        int64_t patch_width, bool fp64);
void picture_batch_free(struct picture_batch *b);

/* mimo --check-data and --show-sample; return the exit status. Local (one process). */
int data_check(const struct deck *deck, FILE *out);
int data_show_sample(const struct deck *deck, int64_t n, const char *directory, FILE *out);

/* The id of the picture's place holder when this tokenizer is used: by string, else
 * data.image_token_id, else the first id behind the vocabulary. Local. */
struct tokenizer;
int64_t data_image_token(const struct deck *deck, const struct tokenizer *tokenizer);

#endif
