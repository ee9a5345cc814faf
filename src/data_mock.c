/* data_mock.c - generated samples: pictures of one size and uniform random words (training.md 5).
 *
 * A sample is image_seq_length image ids followed by text ids, pictures are num_image_tiles equal
 * tiles. Content is a function of (seed, split, index modulo mock_dataset_size) alone through
 * rng.h: word p of a sample is keyed by (index, p), pixel e of a sample by (index, e/2). Upstream
 * draws from Mersenne Twisters seeded by rank, which would make the data depend on the layout;
 * shapes, counts, labels and errors are upstream's.
 */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "data_internal.h"
#include "rng.h"

struct data_mock {
    const struct deck *deck;
    struct data_mock_shape shape;
    struct rng_key text, pixels;
    int64_t excluded[2]; /* ids in 1..V-1 that no word may have, ascending */
    int n_excluded;
    int64_t words; /* |L| of training.md 5.4 */
};

static bool refuse(const struct deck *deck, struct errors *errors, const char *group,
                   const char *key, const char *fmt, ...) __attribute__((format(printf, 5, 6)));
static bool dynamic_grid(const struct deck *deck, struct data_mock_shape *s, struct errors *errors);
static bool fixed_grid(const struct deck *deck, struct data_mock_shape *s, struct errors *errors);
static int excluded_ids(const struct deck *deck, int64_t out[2]);
static void fill_normal(struct rng_key key, uint64_t sample, int64_t n, bool fp64, void *out);

bool data_mock_shape(const struct deck *deck, struct data_mock_shape *shape, struct errors *errors)
{
    const int64_t s = deck->language.seq_length, v = deck->language.vocab_size,
                  t = deck->data.num_image_tiles;
    const bool language_only = deck->topology.layout == DECK_LAYOUT_LANGUAGE_ONLY;
    memset(shape, 0, sizeof *shape);
    bool ok = true;
    int64_t unused[2];
    if (v - 1 - excluded_ids(deck, unused) < 1)
        ok = refuse(deck, errors, "language", "vocab_size",
                    "%" PRId64 ": no id is left for text beside image_token_id (%" PRId64
                    ") and pad_token_id (%" PRId64 ")",
                    v, deck->data.image_token_id, deck->data.pad_token_id);
    if (language_only)
        return ok;
    if (deck->data.image_token_id < 0 || deck->data.image_token_id >= deck->derived.padded_vocab)
        ok = refuse(deck, errors, "data", "image_token_id",
                    "%" PRId64 ": mock data needs an id in 0..%" PRId64, deck->data.image_token_id,
                    deck->derived.padded_vocab - 1);
    if (deck->data.image_token_id >= 0 && deck->data.image_token_id == deck->data.pad_token_id)
        ok = refuse(deck, errors, "data", "image_token_id", "%" PRId64 ": is pad_token_id as well",
                    deck->data.image_token_id);
    if (deck->vision.patch_dim <= 0)
        return refuse(deck, errors, "vision", "patch_dim", "%" PRId64 ": must be positive",
                      deck->vision.patch_dim);
    if (t <= 0)
        return refuse(deck, errors, "data", "num_image_tiles", "%" PRId64 ": must be positive", t);
    if (!deck->vision.disable_vision_class_token)
        ok = refuse(deck, errors, "vision", "disable_vision_class_token",
                    ".false.: the encoder must emit exactly the image tokens of a sample, without "
                    "class tokens");
    shape->tiles = t;
    if (!(deck->vision.dynamic_resolution ? dynamic_grid(deck, shape, errors)
                                          : fixed_grid(deck, shape, errors)))
        ok = false;
    if (shape->image_seq_length >= s)
        ok = refuse(deck, errors, "data", "image_seq_length",
                    "%" PRId64 ": must be below seq_length (%" PRId64 ")", shape->image_seq_length,
                    s);
    return ok;
}

struct data_mock *data_mock_new(const struct deck *deck, enum data_split split)
{
    struct data_mock *mock = xcalloc(1, sizeof *mock);
    mock->deck = deck;
    if (!data_mock_shape(deck, &mock->shape, NULL))
        FATAL(EXIT_INTERNAL, "mock data of a shape that was refused");
    const uint64_t seed = (uint64_t)deck->run.seed;
    mock->text = rng_key(seed, split == DATA_TRAIN ? "mock:text" : "mock:text:valid");
    mock->pixels = rng_key(seed, split == DATA_TRAIN ? "mock:pixels" : "mock:pixels:valid");
    mock->n_excluded = excluded_ids(deck, mock->excluded);
    mock->words = deck->language.vocab_size - 1 - mock->n_excluded;
    return mock;
}

void data_mock_load(const struct data_mock *mock, int64_t index, struct data_sample *out,
                    void *pixels)
{
    const struct deck *deck = mock->deck;
    const struct data_mock_shape *shape = &mock->shape;
    const int64_t sample = index % deck->data.mock_dataset_size,
                  every = deck->data.mock_text_only_every;
    const bool pictures = shape->tiles > 0 && !(every > 0 && sample % every == every - 1);
    const int64_t image = pictures ? shape->image_seq_length : 0,
                  rows = pictures ? image / shape->tiles : 0;
    ASSERT(deck->language.seq_length <= out->max_ids && shape->tiles <= out->max_pictures);
    out->n_ids = deck->language.seq_length;
    out->shrunk = out->truncated = false;
    snprintf(out->key, sizeof out->key, "mock:%" PRId64, sample);
    for (int64_t j = 0; j < image; j++) {
        out->ids[j] = deck->data.image_token_id;
        out->picture_of[j] = (int32_t)(j / rows);
    }
    for (int64_t j = image; j < out->n_ids; j++) {
        int64_t id = 1 + (int64_t)rng_below(mock->text, (uint64_t)sample, (uint64_t)j,
                                            (uint64_t)mock->words);
        for (int k = 0; k < mock->n_excluded; k++)
            id += id >= mock->excluded[k];
        out->ids[j] = id;
        out->picture_of[j] = -1;
    }
    out->n_pictures = pictures ? shape->tiles : 0;
    for (int64_t t = 0; t < out->n_pictures; t++)
        out->picture[t] =
            (struct data_picture){ shape->height, shape->width, shape->patches, rows };
    if (!pixels)
        return;
    const int64_t n =
        out->n_pictures * shape->patches * 3 * deck->vision.patch_dim * deck->vision.patch_dim;
    if (deck->data.mock_pixels == DECK_PIXELS_NORMAL)
        fill_normal(mock->pixels, (uint64_t)sample, n, deck->derived.fp64, pixels);
    else
        memset(pixels, 0, (size_t)n * (deck->derived.fp64 ? sizeof(double) : sizeof(float)));
}

void data_mock_free(struct data_mock *mock)
{
    free(mock);
}

static bool refuse(const struct deck *deck, struct errors *errors, const char *group,
                   const char *key, const char *fmt, ...)
{
    if (!errors)
        return false;
    char text[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    errors_add(errors, EXIT_DECK, "%s: error: %s.%s = %s", deck_where(deck, group, key), group, key,
               text);
    return false;
}

/* Rows x columns of patches nearest to a square, rows from floor(sqrt(P)) down; both even with the
 * pixel shuffle. */
static bool dynamic_grid(const struct deck *deck, struct data_mock_shape *s, struct errors *errors)
{
    const int64_t p = deck->vision.patch_dim, even = deck->vision.pixel_shuffle ? 2 : 1;
    s->image_seq_length = deck->data.image_seq_length > 0 ? deck->data.image_seq_length
                                                          : deck->language.seq_length / 2;
    if (s->image_seq_length % s->tiles != 0)
        return refuse(deck, errors, "data", "image_seq_length",
                      "%" PRId64 ": not divisible by num_image_tiles (%" PRId64 ")",
                      s->image_seq_length, s->tiles);
    s->patches = s->image_seq_length / s->tiles * even * even;
    int64_t rows = (int64_t)sqrt((double)s->patches);
    while (rows > 0 &&
           (s->patches % rows != 0 || rows % even != 0 || s->patches / rows % even != 0))
        rows--;
    if (rows <= 0 || s->patches / rows > INT32_MAX / p)
        return refuse(deck, errors, "data", "image_seq_length",
                      "%" PRId64 ": a tile of %" PRId64
                      " patches cannot be cut into rows and columns%s",
                      s->image_seq_length, s->patches, even == 2 ? " that are both even" : "");
    s->height = (int32_t)(rows * p);
    s->width = (int32_t)(s->patches / rows * p);
    return true;
}

static bool fixed_grid(const struct deck *deck, struct data_mock_shape *s, struct errors *errors)
{
    const int64_t p = deck->vision.patch_dim, h = deck->vision.img_h, w = deck->vision.img_w;
    bool ok = true;
    if (h < p || h % p != 0)
        ok = refuse(deck, errors, "vision", "img_h",
                    "%" PRId64 ": not divisible by patch_dim (%" PRId64 ")", h, p);
    if (w < p || w % p != 0)
        ok = refuse(deck, errors, "vision", "img_w",
                    "%" PRId64 ": not divisible by patch_dim (%" PRId64 ")", w, p);
    if (!ok)
        return false;
    if (deck->vision.pixel_shuffle && (h != w || h / p % 2 != 0))
        return refuse(
            deck, errors, "vision", "img_h",
            "%" PRId64
            ": pixel shuffle of fixed tiles needs a square grid with an even side, not %" PRId64
            " x %" PRId64 " patches",
            h, h / p, w / p);
    s->height = (int32_t)h;
    s->width = (int32_t)w;
    s->patches = (h / p) * (w / p);
    const int64_t emitted = s->tiles * s->patches / (deck->vision.pixel_shuffle ? 4 : 1);
    s->image_seq_length = deck->data.image_seq_length > 0 ? deck->data.image_seq_length : emitted;
    if (s->image_seq_length != emitted)
        return refuse(deck, errors, "data", "image_seq_length",
                      "%" PRId64 ": %" PRId64 " tiles of %" PRId64 " x %" PRId64
                      " pixels emit %" PRId64 " image tokens",
                      s->image_seq_length, s->tiles, h, w, emitted);
    return true;
}

/* image_token_id and pad_token_id as far as they lie in 1..V-1, ascending, once each. */
static int excluded_ids(const struct deck *deck, int64_t out[2])
{
    const int64_t image = deck->data.image_token_id, pad = deck->data.pad_token_id,
                  v = deck->language.vocab_size;
    int n = 0;
    const int64_t low = image < pad ? image : pad, high = image < pad ? pad : image;
    if (low >= 1 && low < v)
        out[n++] = low;
    if (high != low && high >= 1 && high < v)
        out[n++] = high;
    return n;
}

/* Box-Muller, two deviates of one Philox block; the block number is half the element's number
 * inside the sample. */
static void fill_normal(struct rng_key key, uint64_t sample, int64_t n, bool fp64, void *out)
{
    for (int64_t e = 0; e < n; e += 2) {
        uint32_t w[4];
        rng_philox(key, sample, (uint64_t)e / 2, w);
        const double u = (double)(((uint64_t)w[1] << 32 | w[0]) >> 11) * 0x1p-53;
        const double v = (double)(((uint64_t)w[3] << 32 | w[2]) >> 11) * 0x1p-53;
        const double radius = sqrt(-2.0 * log(1.0 - u)), angle = 2.0 * M_PI * v;
        const double z[2] = { radius * cos(angle), radius * sin(angle) };
        for (int64_t k = 0; k < 2 && e + k < n; k++) {
            if (fp64)
                ((double *)out)[e + k] = z[k];
            else
                ((float *)out)[e + k] = (float)z[k];
        }
    }
}
