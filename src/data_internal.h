/* data_internal.h - between data.c and the two providers, data_mock.c and data_webdataset.c. Nobody
 * else includes it.
 *
 * A provider turns a number into one sample; data.c decides which numbers belong to which
 * micro-batch, lane and rank, makes labels and masks, and fills the batches. A sample looks the
 * same to the encoder and the language side: the token ids already hold one id per embedding of a
 * picture, and the pictures' sizes are those the encoder will see.
 */
#ifndef MIMO_DATA_INTERNAL_H
#define MIMO_DATA_INTERNAL_H

#include "data.h"

enum { DATA_WHY = 512 }; /* bytes of a reason why a sample is broken */

struct data_picture {
    int32_t height, width;
    int64_t patches, rows;
}; /* size in pixels; rows = embeddings */

/* What a provider fills; all arrays belong to the sample and are sized once. */
struct data_sample {
    int64_t *ids;                 /* [S] */
    int32_t *picture_of;          /* [S] picture that the position is an embedding of, -1 = text */
    struct data_picture *picture; /* [max_tiles_per_sample] */
    /* [S] ends of the samples that share the row, in ids; n_members = 0: it is one sample */
    int64_t *member_end, n_members;
    int64_t n_ids, n_pictures;
    int64_t max_ids, max_pictures; /* capacities */
    bool shrunk, truncated;        /* to fit into S: pictures made smaller; the end cut off */
    char key[256];                 /* printable */
};
void data_sample_init(struct data_sample *s, const struct data_limits *limits); /* Local. */
void data_sample_free(struct data_sample *s);                                   /* Local. */

/* Labels and mask of one row of S positions (training.md 5.4 and 6.7 step 5); both end at n_ids. No
 * position predicts a token of another member. `mask_inputs`: the position of an image id predicts
 * nothing (shards); otherwise the last one predicts the first word (mock). Returns the trainable
 * positions. Local. */
int64_t data_labels(const struct data_sample *s, bool mask_inputs, int64_t seq_length,
                    int64_t *labels, float *loss_mask);

/* --- mock --- */
struct data_mock_shape {
    int64_t image_seq_length; /* embeddings of a sample with pictures */
    int64_t tiles;
    int32_t height, width; /* pixels, every tile */
    int64_t patches;       /* per tile */
};
/* Sizes from the deck and every error of training.md 5.6 (errors may be NULL); false if there was
 * one. language_only: no tiles. Local. */
bool data_mock_shape(const struct deck *deck, struct data_mock_shape *shape, struct errors *errors);
struct data_mock;
struct data_mock *data_mock_new(const struct deck *deck,
                                enum data_split split); /* the shape must be valid. Local. */
/* Sample `index` modulo mock_dataset_size; pixels [patches, patch_dim] float or double (the run's
 * precision), or NULL. Local. */
void data_mock_load(const struct data_mock *mock, int64_t index, struct data_sample *out,
                    void *pixels);
void data_mock_free(struct data_mock *mock); /* Local. */

/* --- shards --- */
struct data_webdataset;
/* Shards of `split` indexed and tokenizer loaded; mistakes are collected, then the return value is
 * NULL. Local. */
struct data_webdataset *data_webdataset_new(const struct deck *deck, enum data_split split,
                                            const struct data_limits *limits,
                                            struct errors *errors);
int64_t data_webdataset_size(const struct data_webdataset *w); /* samples. Local. */
/* The sample at position q >= 0 of the infinite sequence of epochs. Local. */
int64_t data_webdataset_at(const struct data_webdataset *w, int64_t q);
/* Sample `index` (stored order) with its pictures decoded, so that a broken one is found by every
 * rank; pixels as above or NULL. With pixels = NULL a sample that was whole before is not decoded
 * again. False: broken, `why` says how. Local. */
bool data_webdataset_load(struct data_webdataset *w, int64_t index, struct data_sample *out,
                          void *pixels, char why[DATA_WHY]);
/* For data_check and data_show_sample. Local. */
int64_t data_webdataset_shards(const struct data_webdataset *w);
/* "12 shards, 4800 samples, 0123456789abcdef": the hash is of the shards' names and sizes in their
 * order. */
const char *data_webdataset_fingerprint(const struct data_webdataset *w, char *out, size_t size);
int64_t data_webdataset_ignored(
    const struct data_webdataset *w); /* members that belong to no sample */
/* Parts of samples that are neither pictures nor json nor txt, as "cls 4, mp4 2"; "" = none. */
const char *data_webdataset_unused(const struct data_webdataset *w, char *out, size_t size);
const char *data_webdataset_kind(const struct data_webdataset *w); /* of the sample loaded last */
/* Original sizes {width, height} of the pictures of the sample loaded last (those kept). */
const int32_t (*data_webdataset_original(const struct data_webdataset *w))[2];
/* Readable text of one id; NUL-terminated, control characters escaped. */
const char *data_webdataset_token(const struct data_webdataset *w, int64_t id, char *out,
                                  size_t size);
void data_webdataset_free(struct data_webdataset *w); /* Local. */

/* A keyed bijection of [0, n): position -> index in epoch `epoch` (four Feistel rounds on Philox,
 * cycle walking). Local. */
uint64_t data_permute(uint64_t seed, uint64_t epoch, uint64_t n, uint64_t position);

#endif
