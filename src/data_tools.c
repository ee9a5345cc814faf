/* data_tools.c - looking at data without training: mimo --check-data and mimo --show-sample.
 *
 * Both go through the same loader as a run, so what they show is what the model gets. Pictures are
 * shown from the normalised patches: put back into rows of pixels, de-normalised and rounded.
 */
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <png.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include "data_internal.h"
#include "image.h"

enum { BROKEN_SHOWN = 50 };

/* A growing list of numbers, for medians. */
struct numbers {
    int64_t *v, n, capacity;
};

struct census {
    int64_t good, broken, shrunk, truncated, ids, loss_tokens, image_tokens, text_only;
    struct {
        const char *name;
        int64_t n;
    } kind[8];
    int n_kinds;
    struct numbers tokens, area; /* per sample; per picture: area << 20 | width of the original */
    struct numbers patches;      /* per picture */
};

static int check_split(const struct deck *deck, enum data_split split, FILE *out,
                       struct errors *errors);
static void count_sample(struct census *c, const struct data_webdataset *w,
                         const struct data_sample *s, int64_t *labels, float *mask);
static void print_census(struct census *c, int64_t broken_shown, FILE *out);
static void numbers_add(struct numbers *list, int64_t v);
static void numbers_sort(struct numbers *list);
static int compare_numbers(const void *a, const void *b);
static int refuse(struct errors *errors);
static void print_tokens(const struct deck *deck, const struct data_webdataset *w,
                         const struct data_sample *s, FILE *out);
static bool write_picture(const struct deck *deck, const struct data_picture *p, const void *pixels,
                          const char *path);

int data_check(const struct deck *deck, FILE *out)
{
    if (deck->data.dataset_provider == DECK_PROVIDER_MOCK) {
        struct errors errors = { 0 };
        struct data_mock_shape shape;
        if (!data_mock_shape(deck, &shape, &errors))
            return refuse(&errors);
        errors_free(&errors);
        fprintf(out,
                "mock data: %" PRId64 " samples of %" PRId64 " tokens, %" PRId64
                " of them image tokens\n",
                deck->data.mock_dataset_size, deck->language.seq_length, shape.image_seq_length);
        if (shape.tiles > 0)
            fprintf(out,
                    "pictures of a sample: %" PRId64 " of %d x %d pixels (width x height), %" PRId64
                    " patches each\n",
                    shape.tiles, shape.width, shape.height, shape.patches);
        if (deck->data.mock_text_only_every > 0)
            fprintf(out, "without pictures: every %" PRId64 ". sample\n",
                    deck->data.mock_text_only_every);
        return EXIT_OK;
    }
    struct errors errors = { 0 }; /* of both, so that what is wrong with both is said once */
    const int train = *deck->data.train_data_path || !*deck->data.valid_data_path
                          ? check_split(deck, DATA_TRAIN, out, &errors)
                          : EXIT_OK;
    const int valid =
        *deck->data.valid_data_path ? check_split(deck, DATA_VALID, out, &errors) : EXIT_OK;
    refuse(&errors);
    return train ? train : valid;
}

int data_show_sample(const struct deck *deck, int64_t n, const char *directory, FILE *out)
{
    struct errors errors = { 0 };
    const struct data_limits limits = data_limits(deck);
    const int64_t dim = 3 * deck->vision.patch_dim * deck->vision.patch_dim;
    const size_t real = deck->derived.fp64 ? sizeof(double) : sizeof(float);
    const bool is_mock = deck->data.dataset_provider == DECK_PROVIDER_MOCK;
    struct data_mock *mock = NULL;
    struct data_webdataset *w = NULL;
    struct data_mock_shape shape;
    if (!is_mock)
        w = data_webdataset_new(deck, DATA_TRAIN, &limits, &errors);
    else if (data_mock_shape(deck, &shape, &errors))
        mock = data_mock_new(deck, DATA_TRAIN);
    const int64_t size = w ? data_webdataset_size(w) : deck->data.mock_dataset_size;
    if (errors.count == 0 && (n < 0 || n >= size))
        errors_add(&errors, EXIT_DATA,
                   "command line: error: --show-sample %" PRId64
                   ": the data set has samples 0..%" PRId64,
                   n, size - 1);
    if (errors.count == 0 && mkdir(directory, 0777) != 0 && errno != EEXIST)
        errors_add(&errors, EXIT_WRITE, "%s: error: %s", directory, strerror(errno));
    if (errors.count > 0) {
        data_mock_free(mock);
        data_webdataset_free(w);
        return refuse(&errors);
    }
    struct data_sample s;
    data_sample_init(&s, &limits);
    char *pixels = xmalloc((size_t)(limits.max_patches_per_sample * dim), real), why[DATA_WHY];
    int status = EXIT_OK;
    if (mock) {
        data_mock_load(mock, n, &s, pixels);
    } else if (!data_webdataset_load(w, n, &s, pixels, why)) {
        errors_add(&errors, EXIT_DATA, "%s: error: broken sample: %s", s.key, why);
        status = refuse(&errors);
    }
    if (status == EXIT_OK) {
        fprintf(out, "sample %" PRId64 ": %s%s%s\n", n, s.key, w ? ", " : "",
                w ? data_webdataset_kind(w) : "");
        if (s.shrunk || s.truncated)
            fprintf(out, "to fit into %" PRId64 " tokens:%s%s\n", limits.seq_length,
                    s.shrunk ? " pictures made smaller" : "", s.truncated ? " end cut off" : "");
        int64_t patches = 0;
        for (int64_t t = 0; t < s.n_pictures && status == EXIT_OK; t++) {
            char *path = xasprintf("%s/sample_%06" PRId64 "_%" PRId64 ".png", directory, n, t);
            const struct data_picture *p = &s.picture[t];
            fprintf(out, "picture %" PRId64 ": ", t);
            if (w)
                fprintf(out, "%d x %d as stored, ", data_webdataset_original(w)[t][0],
                        data_webdataset_original(w)[t][1]);
            fprintf(out,
                    "%d x %d for the model (width x height), %" PRId64 " patches, %" PRId64
                    " tokens: %s\n",
                    p->width, p->height, p->patches, p->rows, path);
            if (!write_picture(deck, p, pixels + (size_t)(patches * dim) * real, path))
                status = EXIT_WRITE;
            patches += p->patches;
            free(path);
        }
        print_tokens(deck, w, &s, out);
    }
    free(pixels);
    data_sample_free(&s);
    data_mock_free(mock);
    data_webdataset_free(w);
    return status;
}

static int check_split(const struct deck *deck, enum data_split split, FILE *out,
                       struct errors *errors)
{
    const struct data_limits limits = data_limits(deck);
    struct data_webdataset *w = data_webdataset_new(deck, split, &limits, errors);
    if (!w)
        return errors->worst;
    fprintf(out, "%s = '%s'\n", split == DATA_TRAIN ? "train_data_path" : "valid_data_path",
            split == DATA_TRAIN ? deck->data.train_data_path : deck->data.valid_data_path);
    struct data_sample s;
    struct census c = { 0 };
    data_sample_init(&s, &limits);
    int64_t *labels = xcalloc((size_t)limits.seq_length, sizeof *labels);
    float *mask = xcalloc((size_t)limits.seq_length, sizeof *mask);
    for (int64_t i = 0; i < data_webdataset_size(w); i++) {
        char why[DATA_WHY];
        if (data_webdataset_load(w, i, &s, NULL, why)) {
            count_sample(&c, w, &s, labels, mask);
        } else if (c.broken++ < BROKEN_SHOWN) {
            fprintf(out, "  broken: %s: %s\n", s.key, why);
        }
    }
    fprintf(out, "  samples found          %" PRId64 " in %" PRId64 " shards\n",
            data_webdataset_size(w), data_webdataset_shards(w));
    if (data_webdataset_ignored(w) > 0)
        fprintf(out, "  members ignored        %" PRId64 " (no part of a sample)\n",
                data_webdataset_ignored(w));
    char unused[512];
    if (*data_webdataset_unused(w, unused, sizeof unused))
        fprintf(out, "  parts not used         %s\n", unused);
    print_census(&c, BROKEN_SHOWN, out);
    free(labels);
    free(mask);
    free(c.tokens.v);
    free(c.area.v);
    free(c.patches.v);
    data_sample_free(&s);
    data_webdataset_free(w);
    return c.good > 0 ? EXIT_OK : EXIT_DATA;
}

static void count_sample(struct census *c, const struct data_webdataset *w,
                         const struct data_sample *s, int64_t *labels, float *mask)
{
    const char *kind = data_webdataset_kind(w);
    int k = 0;
    while (k < c->n_kinds && strcmp(c->kind[k].name, kind) != 0)
        k++;
    if (k == c->n_kinds)
        c->kind[c->n_kinds++].name = kind;
    c->kind[k].n++;
    c->good++;
    c->shrunk += s->shrunk;
    c->truncated += s->truncated;
    c->text_only += s->n_pictures == 0;
    c->ids += s->n_ids;
    c->loss_tokens += data_labels(s, true, s->max_ids, labels, mask);
    numbers_add(&c->tokens, s->n_ids);
    for (int64_t t = 0; t < s->n_pictures; t++) {
        const int64_t width = data_webdataset_original(w)[t][0],
                      height = data_webdataset_original(w)[t][1];
        c->image_tokens += s->picture[t].rows;
        numbers_add(&c->area, width * height << 20 | width);
        numbers_add(&c->patches, s->picture[t].patches);
    }
}

static void print_census(struct census *c, int64_t broken_shown, FILE *out)
{
    fprintf(out, "  good                   %" PRId64 "\n  broken                 %" PRId64 "%s\n",
            c->good, c->broken, c->broken > broken_shown ? " (the first are listed above)" : "");
    for (int k = 0; k < c->n_kinds; k++)
        fprintf(out, "  %-22s %" PRId64 "\n", c->kind[k].name, c->kind[k].n);
    fprintf(out, "  without picture        %" PRId64 "\n", c->text_only);
    numbers_sort(&c->tokens);
    numbers_sort(&c->area);
    numbers_sort(&c->patches);
    fprintf(out, "  pictures               %" PRId64 "\n", c->area.n);
    if (c->area.n > 0) {
        const int64_t at[3] = { 0, c->area.n / 2, c->area.n - 1 };
        fprintf(out, "  picture width x height");
        for (int i = 0; i < 3; i++) {
            const int64_t width = c->area.v[at[i]] & 0xfffff, area = c->area.v[at[i]] >> 20;
            fprintf(out, " %s %" PRId64 " x %" PRId64 "%s",
                    i == 0   ? "smallest"
                    : i == 1 ? "median"
                             : "largest",
                    width, area / width, i < 2 ? "," : "\n");
        }
        fprintf(out,
                "  patches of a picture   min %" PRId64 ", median %" PRId64 ", max %" PRId64 "\n",
                c->patches.v[0], c->patches.v[c->patches.n / 2], c->patches.v[c->patches.n - 1]);
    }
    if (c->tokens.n > 0)
        fprintf(out,
                "  tokens of a sample     min %" PRId64 ", median %" PRId64 ", max %" PRId64 "\n",
                c->tokens.v[0], c->tokens.v[c->tokens.n / 2], c->tokens.v[c->tokens.n - 1]);
    fprintf(out,
            "  tokens in all          %" PRId64 ", image tokens %" PRId64 ", with a label %" PRId64
            "\n",
            c->ids, c->image_tokens, c->loss_tokens);
    fprintf(out,
            "  pictures made smaller  in %" PRId64 " samples\n  end cut off            in %" PRId64
            " samples\n",
            c->shrunk, c->truncated);
}

static void numbers_add(struct numbers *list, int64_t v)
{
    if (list->n == list->capacity) {
        list->capacity = 2 * list->capacity + 1024;
        list->v = xrealloc(list->v, (size_t)list->capacity, sizeof *list->v);
    }
    list->v[list->n++] = v;
}

static void numbers_sort(struct numbers *list)
{
    if (list->n > 0)
        qsort(list->v, (size_t)list->n, sizeof *list->v, compare_numbers);
}

static int compare_numbers(const void *a, const void *b)
{
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? -1 : x > y;
}

static int refuse(struct errors *errors)
{
    const int status = errors->worst;
    errors_print(errors);
    errors_free(errors);
    return status;
}

/* One line a token; the run of a picture is one line, because its positions are alike (the last one
 * is not for mock data). */
static void print_tokens(const struct deck *deck, const struct data_webdataset *w,
                         const struct data_sample *s, FILE *out)
{
    const int64_t length = deck->language.seq_length;
    int64_t *labels = xcalloc((size_t)length, sizeof *labels);
    float *mask = xcalloc((size_t)length, sizeof *mask);
    const int64_t trainable = data_labels(s, w != NULL, length, labels, mask);
    fprintf(out, "%" PRId64 " tokens, %" PRId64 " with a label, %" PRId64 " of padding\n", s->n_ids,
            trainable, length - s->n_ids);
    fprintf(out, "%15s %8s %8s %4s  text\n", "position", "id", "label", "mask");
    for (int64_t j = 0; j < s->n_ids; j++) {
        char text[512] = "";
        int64_t last = j;
        while (s->picture_of[j] >= 0 && last + 1 < s->n_ids &&
               s->picture_of[last + 1] == s->picture_of[j] && labels[last + 1] == labels[j])
            last++;
        if (w)
            data_webdataset_token(w, s->ids[j], text, sizeof text);
        else if (s->picture_of[j] >= 0)
            snprintf(text, sizeof text, "%.200s", deck->data.image_token);
        if (last > j)
            fprintf(out, "%7" PRId64 "-%-7" PRId64, j, last);
        else
            fprintf(out, "%15" PRId64, j);
        fprintf(out, " %8" PRId64 " %8" PRId64 " %4.0f  ", s->ids[j], labels[j], (double)mask[j]);
        if (s->picture_of[j] >= 0)
            fprintf(out, "%s (picture %d, %" PRId64 " tokens)\n", text, s->picture_of[j],
                    last - j + 1);
        else
            fprintf(out, "'%s'\n", text);
        j = last;
    }
    free(labels);
    free(mask);
}

static bool write_picture(const struct deck *deck, const struct data_picture *p, const void *pixels,
                          const char *path)
{
    const int64_t edge = deck->vision.patch_dim, columns = p->width / edge;
    unsigned char *rgb = xmalloc((size_t)p->width * (size_t)p->height, 3);
    for (int64_t y = 0; y < p->height; y++)
        for (int64_t x = 0; x < p->width; x++)
            for (int64_t c = 0; c < 3; c++) {
                const int64_t patch = y / edge * columns + x / edge;
                const int64_t at = (patch * 3 + c) * edge * edge + y % edge * edge + x % edge;
                const double v = deck->derived.fp64 ? ((const double *)pixels)[at]
                                                    : (double)((const float *)pixels)[at];
                const double u = 255.0 * (v * image_deviation[c] + image_mean[c]);
                rgb[(y * p->width + x) * 3 + c] = (unsigned char)lround(u < 0.0     ? 0.0
                                                                        : u > 255.0 ? 255.0
                                                                                    : u);
            }
    png_image image = { .version = PNG_IMAGE_VERSION,
                        .width = (png_uint_32)p->width,
                        .height = (png_uint_32)p->height,
                        .format = PNG_FORMAT_RGB };
    const bool ok = png_image_write_to_file(&image, path, 0, rgb, 0, NULL) != 0;
    if (!ok)
        fprintf(stderr, "%s: error: %s\n", path, image.message);
    free(rgb);
    return ok;
}
