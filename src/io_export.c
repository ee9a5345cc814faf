/* io_export.c - a checkpoint as a Hugging Face directory (hf.md 2-6).
 *
 * A projector with RMSNorm makes one vision-language directory; any other projector has no form
 * there, and the parts are written apart: language/, vision/ and projector.safetensors with our
 * names.
 *
 * Nothing is held in memory: the files are laid out first; then every block of every tensor, as the
 * checkpoint's writer cut it, is read, verified by its checksum and put where its rows belong. All
 * of it happens in a directory of a temporary name that is renamed at the end.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bf16.h"
#include "data.h"
#include "file.h"
#include "hf_config.h"
#include "hf_names.h"
#include "image.h"
#include "io_hf.h"
#include "io_tensors.h"
#include "tokenizer.h"

static const int64_t shard_default = 5000000000;

struct target { /* one directory */
    enum hf_kind kind;
    bool own; /* projector.safetensors: our names, no config.json */
    struct safetensors s;
    struct safetensors_access access;
};

struct export
{
    const char *directory, *checkpoint;
    const struct export_options *options;
    FILE *out;
    struct errors *errors;
    struct deck deck;
    struct topology topo;
    struct model model;
    hid_t file;
    struct io_manifest manifest;
    struct target target[MODEL_MODULES];
    int n_targets, target_of[MODEL_MODULES];
    int64_t rounded;
    void *block, *converted; /* of one block; have bytes */
    size_t have, have_converted;
};

/* ---- what to write --------------------------------------------------------------------------- */

/* The echo in the checkpoint names every grid size, so the ranks of its job follow. */
static bool read_deck(struct export *x)
{
    enum { TEXT = 1 << 20 };
    struct errors quiet = { 0 };
    char *text = xcalloc(TEXT, 1);
    bool ok = io_get_string(x->file, "/deck/text", text, TEXT);
    if (ok) {
        deck_read(&x->deck, x->checkpoint, text, strlen(text), 0, NULL, &quiet);
        const struct deck_topology *t = &x->deck.topology;
        int64_t ranks = t->llm_tp * t->llm_cp * t->llm_pp * t->llm_dp;
        if (t->layout == DECK_LAYOUT_DISJOINT)
            ranks += t->encoder_tp * t->encoder_pp * t->encoder_dp;
        ok = quiet.count == 0 && ranks > 0 && ranks <= 1 << 24;
        if (ok) /* what this binary lacks to run the deck does not matter here */
            deck_resolve(&x->deck, (int)ranks, &quiet);
        ok = ok && x->deck.derived.complete;
    }
    if (!ok)
        errors_add(x->errors, EXIT_CHECKPOINT, "%s: error: /deck does not tell the model: %s",
                   x->checkpoint, quiet.count > 0 ? quiet.line[0] : "/deck/text is missing");
    errors_free(&quiet);
    free(text);
    return ok;
}

static void choose_targets(struct export *x)
{
    const struct deck *d = &x->deck;
    const bool joint = d->projector.vision_projection_type == DECK_PROJECTION_MLP &&
                       d->projector.projection_normalization == DECK_PROJECTION_NORM_RMSNORM &&
                       d->vision.pixel_shuffle;
    x->n_targets = 1;
    if (!x->model.has_encoder) {
        x->target[0].kind = HF_LANGUAGE;
    } else if (joint) {
        x->target[0].kind = HF_VLM;
    } else {
        x->target[0].kind = HF_LANGUAGE;
        x->target[1].kind = HF_VISION;
        x->target[2].own = true;
        x->target_of[MODEL_VISION] = 1;
        x->target_of[MODEL_PROJECTOR] = 2;
        x->n_targets = 3;
    }
}

/* A bias in BF16 would change the routing: expert biases stay F32. */
static int kind_of(const struct export *x, bool buffer)
{
    const char *dtype = x->options->dtype;
    if (dtype && strcmp(dtype, "fp64") == 0)
        return SAFETENSORS_F64;
    if (buffer || (dtype && strcmp(dtype, "fp32") == 0))
        return SAFETENSORS_F32;
    return dtype || x->model.act == DTYPE_BF16 ? SAFETENSORS_BF16 : SAFETENSORS_F32;
}

/* The map of a parameter in the spelling that its directory has. */
static void map_of(const struct export *x, const struct param *p, struct hf_map *m)
{
    const struct target *t = &x->target[x->target_of[p->module]];
    int spelling = 0;
    /* Alone, the encoder keeps its last norm under another name; our own names come last. */
    if (t->own || (t->kind == HF_VISION && strncmp(p->name, "decoder.final_layernorm.", 24) == 0))
        for (struct hf_map next; hf_map_init(&next, &x->deck, p, spelling + 1); spelling++)
            hf_map_free(&next);
    const bool known = hf_map_init(m, &x->deck, p, spelling);
    ASSERT(known);
}

static void published_name(const struct export *x, const struct param *p, const char *canonical,
                           char out[SAFETENSORS_NAME])
{
    const struct target *t = &x->target[x->target_of[p->module]];
    if (t->own)
        snprintf(out, SAFETENSORS_NAME, "%s", canonical);
    else
        hf_published(p->module, canonical, t->kind == HF_VLM, out);
}

static struct safetensors_tensor *add_tensor(struct target *t)
{
    struct safetensors *s = &t->s;
    if ((s->n & (s->n - 1)) == 0)
        s->tensor = xrealloc(s->tensor, (size_t)(s->n ? 2 * s->n : 1), sizeof *s->tensor);
    struct safetensors_tensor *d = &s->tensor[s->n++];
    memset(d, 0, sizeof *d);
    return d;
}

static void list_tensors(struct export *x)
{
    for (int i = 0; i < x->model.n_params; i++) {
        const struct param *p = &x->model.param[i];
        struct hf_map m;
        map_of(x, p, &m);
        for (int k = 0; k < m.n_sources; k++) {
            struct safetensors_tensor *d = add_tensor(&x->target[x->target_of[p->module]]);
            published_name(x, p, m.source[k].name, d->name);
            d->kind = kind_of(x, p->buffer);
            d->ndim = m.source[k].ndim;
            for (int j = 0; j < d->ndim; j++)
                d->shape[j] = m.source[k].shape[j];
        }
        hf_map_free(&m);
    }
    static const char *const names[2] = { "input_conditioner.norm_mean",
                                          "input_conditioner.norm_std" };
    for (int k = 0; k < 2 && x->model.has_encoder; k++) {
        const struct target *t = &x->target[x->target_of[MODEL_VISION]];
        struct safetensors_tensor *d = add_tensor(&x->target[x->target_of[MODEL_VISION]]);
        hf_published(MODEL_VISION, names[k], t->kind == HF_VLM, d->name);
        d->kind = kind_of(x, false);
        d->ndim = 3;
        d->shape[0] = 3;
        d->shape[1] = d->shape[2] = 1;
    }
}

/* ---- numbers --------------------------------------------------------------------------------- */

/* n numbers of a checkpoint's type in the type of the file; the same memory where both are one. */
static const void *convert(struct export *x, enum dtype from, int kind, const void *in, int64_t n)
{
    if ((from == DTYPE_F32 && kind == SAFETENSORS_F32) ||
        (from == DTYPE_F64 && kind == SAFETENSORS_F64) ||
        (from == DTYPE_BF16 && kind == SAFETENSORS_BF16))
        return in;
    if (x->have_converted < (size_t)n * 8)
        x->converted = xrealloc(x->converted, x->have_converted = (size_t)n * 8, 1);
    for (int64_t i = 0; i < n; i++) {
        const double v = from == DTYPE_F64   ? ((const double *)in)[i]
                         : from == DTYPE_F32 ? (double)((const float *)in)[i]
                                             : (double)bf16_to_float(((const uint16_t *)in)[i]);
        double back = v;
        if (kind == SAFETENSORS_F64)
            ((double *)x->converted)[i] = v;
        else if (kind == SAFETENSORS_F32)
            back = ((float *)x->converted)[i] = (float)v;
        else
            back = bf16_to_float(((uint16_t *)x->converted)[i] = bf16_from_double(v));
        x->rounded += back != v && !isnan(v);
    }
    return x->converted;
}

struct placing { /* a block of a parameter on its way */
    struct safetensors_access *access;
    const struct safetensors_tensor **tensor; /* of each source */
    const char *data;
    size_t bytes; /* of an element */
    struct errors *errors;
    bool ok;
};

static void place(void *ctx, int source, int64_t first, int64_t local, int64_t n)
{
    struct placing *g = ctx;
    g->ok = g->ok && safetensors_write(g->access, g->tensor[source], first, n,
                                       g->data + (size_t)local * g->bytes, g->errors);
}

/* One block of the manifest: read, verified, put where its rows belong. */
static bool export_block(struct export *x, const struct param *p, const struct hf_map *m, hid_t set,
                         const char *name, const struct io_block *b, struct placing *g)
{
    const enum dtype dtype = p->buffer ? x->model.acc : x->model.act;
    int64_t n = 1;
    for (int d = 0; d < p->ndim; d++) {
        if (b->start[d] < 0 || b->count[d] <= 0 || b->count[d] > p->shape[d] ||
            b->start[d] > p->shape[d] - b->count[d]) {
            errors_add(x->errors, EXIT_CHECKPOINT,
                       "%s: error: %s: /manifest names a block outside the tensor", x->checkpoint,
                       name);
            return false;
        }
        n *= b->count[d];
    }
    if (x->have < (size_t)n * dtype_bytes(dtype))
        x->block = xrealloc(x->block, x->have = (size_t)n * dtype_bytes(dtype), 1);
    if (!io_block_verify(x->checkpoint, set, name, dtype, p->ndim, b, x->block, x->errors))
        return false;
    const int kind = g->tensor[0]->kind;
    g->data = convert(x, dtype, kind, x->block, n);
    g->bytes = kind == SAFETENSORS_F64 ? 8 : kind == SAFETENSORS_F32 ? 4 : 2;
    hf_map_walk(m, p, b->start, b->count, place, g);
    return g->ok;
}

static bool export_param(struct export *x, const struct param *p)
{
    struct target *t = &x->target[x->target_of[p->module]];
    struct hf_map m;
    map_of(x, p, &m);
    struct placing g = { .access = &t->access, .errors = x->errors, .ok = true };
    g.tensor = xcalloc((size_t)m.n_sources,
                       sizeof *g.tensor); /* NOLINT(bugprone-sizeof-expression): pointers */
    for (int k = 0; k < m.n_sources; k++) {
        char name[SAFETENSORS_NAME];
        published_name(x, p, m.source[k].name, name);
        g.tensor[k] = safetensors_find(&t->s, name);
        ASSERT(g.tensor[k] != NULL);
    }
    char name[IO_TENSOR_PATH];
    snprintf(name, sizeof name, "/model/%s/%s", model_module_names[p->module], p->name);
    int64_t index = 0;
    while (index < x->manifest.n_paths && strcmp(x->manifest.path[index], name))
        index++;
    hid_t set = H5Dopen2(x->file, name, H5P_DEFAULT);
    bool ok = set >= 0;
    for (int64_t k = 0; k < x->manifest.n_blocks && ok; k++)
        if (x->manifest.block[k].tensor == index)
            ok = export_block(x, p, &m, set, name, &x->manifest.block[k], &g);
    if (set >= 0)
        H5Dclose(set);
    else
        errors_add(x->errors, EXIT_CHECKPOINT, "%s: error: %s: cannot open", x->checkpoint, name);
    free(g.tensor);
    hf_map_free(&m);
    return ok;
}

static bool export_constants(struct export *x)
{
    static const char *const names[2] = { "input_conditioner.norm_mean",
                                          "input_conditioner.norm_std" };
    bool ok = true;
    for (int k = 0; k < 2 && x->model.has_encoder && ok; k++) {
        struct target *t = &x->target[x->target_of[MODEL_VISION]];
        const double *v = k ? image_deviation : image_mean;
        char name[SAFETENSORS_NAME];
        float single[3];
        uint16_t half[3];
        for (int i = 0; i < 3; i++) {
            single[i] = (float)v[i];
            half[i] = bf16_from_double(v[i]);
        }
        hf_published(MODEL_VISION, names[k], t->kind == HF_VLM, name);
        const struct safetensors_tensor *d = safetensors_find(&t->s, name);
        ok = safetensors_write(&t->access, d, 0, 3,
                               d->kind == SAFETENSORS_F64   ? (const void *)v
                               : d->kind == SAFETENSORS_F32 ? single
                                                            : (const void *)half,
                               x->errors);
    }
    return ok;
}

/* ---- the directory --------------------------------------------------------------------------- */

static bool write_text(struct export *x, const char *directory, const char *name, const char *text,
                       size_t n)
{
    char *path = xasprintf("%s/%s", directory, name);
    FILE *f = fopen(path, "wxe");
    bool ok = f && fwrite(text, 1, n, f) == n;
    ok = f && fflush(f) == 0 && ok && fsync(fileno(f)) == 0;
    if (f && fclose(f) != 0)
        ok = false;
    if (!ok)
        errors_add(x->errors, EXIT_WRITE, "%s: error: cannot write: %s", path, strerror(errno));
    free(path);
    return ok;
}

/* What came with the imported model goes with the exported one. */
static bool copy_companions(struct export *x, const struct target *t)
{
    static const struct {
        const char *name;
        bool words, pictures;
    } files[] = {
        { "tokenizer.json", true, false },          { "tokenizer_config.json", true, false },
        { "special_tokens_map.json", true, false }, { "chat_template.jinja", true, false },
        { "generation_config.json", true, false },  { "preprocessor_config.json", false, true },
        { "processor_config.json", false, true },   { "LICENSE", true, true },
    };
    const struct deck_checkpoint *k = &x->deck.checkpoint;
    const char *from[] = { k->import_language, k->import_projector, k->import_vision };
    bool ok = true;
    for (size_t i = 0; i < sizeof files / sizeof files[0] && ok; i++) {
        if (!((files[i].words && t->kind != HF_VISION) ||
              (files[i].pictures && t->kind != HF_LANGUAGE)))
            continue;
        for (size_t j = t->kind == HF_VISION ? 2 : 0; j < (t->kind == HF_LANGUAGE ? 1 : 3) && ok;
             j++) {
            size_t n;
            char why[1200], *path = xasprintf("%s/%s", from[j], files[i].name);
            char *text = *from[j] ? file_read(path, (size_t)256 << 20, &n, why, sizeof why) : NULL;
            if (text) {
                ok = write_text(x, t->s.directory, files[i].name, text, n);
                fprintf(x->out, "  %s copied from %s\n", files[i].name, from[j]);
                j = 3;
            }
            free(text);
            free(path);
        }
    }
    return ok;
}

/* The id that stands for a picture: by the tokenizer of the training where there is one. */
static int64_t image_token(const struct export *x)
{
    char why[1200];
    struct tokenizer *t =
        *x->deck.data.tokenizer ? tokenizer_open(x->deck.data.tokenizer, why, sizeof why) : NULL;
    if (!t)
        return *x->deck.data.tokenizer && !deck_given(&x->deck, "data", "image_token_id")
                   ? -1
                   : x->deck.data.image_token_id;
    const int64_t id = data_image_token(&x->deck, t);
    tokenizer_free(t);
    return id;
}

static bool write_config(struct export *x, const struct target *t)
{
    struct errors ignored = { 0 };
    static const char *const words[] = { [SAFETENSORS_BF16] = "bfloat16",
                                         [SAFETENSORS_F32] = "float32",
                                         [SAFETENSORS_F64] = "float64" };
    const char *dtype = words[kind_of(x, false)];
    const char *language = x->deck.checkpoint.import_language;
    struct hf_config *special = *language ? hf_config_open(language, &ignored) : NULL;
    const int64_t id = t->kind == HF_VLM ? image_token(x) : -1;
    if (t->kind == HF_VLM && id < 0)
        fprintf(
            x->out,
            "  note: tokenizer '%s' is not here: image_token_id of config.json is null, set it\n",
            x->deck.data.tokenizer);
    char *text = hf_config_text(&x->deck, t->kind, dtype, id, special);
    const bool ok = write_text(x, t->s.directory, "config.json", text, strlen(text));
    free(text);
    hf_config_free(special);
    errors_free(&ignored);
    return ok;
}

/* Headers, config.json and companions of one directory. */
static bool open_target(struct export *x, struct target *t, const char *root)
{
    static const char *const below[] = { [HF_LANGUAGE] = "/language", [HF_VISION] = "/vision" };
    const bool apart = x->n_targets > 1 && !t->own;
    snprintf(t->s.directory, sizeof t->s.directory, "%s%s", root, apart ? below[t->kind] : "");
    if (apart && mkdir(t->s.directory, 0777) != 0) {
        errors_add(x->errors, EXIT_WRITE, "%s: error: cannot make the directory: %s",
                   t->s.directory, strerror(errno));
        return false;
    }
    t->access = (struct safetensors_access){ .s = &t->s, .write = true };
    return safetensors_create(&t->s, t->own ? "projector.safetensors" : NULL,
                              x->options->shard_bytes > 0 ? x->options->shard_bytes : shard_default,
                              x->errors) &&
           (t->own || (write_config(x, t) && copy_companions(x, t)));
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    return remove(path);
}

/* Absent, or an empty directory; then a new directory beside it, under a name that says what it is.
 */
static char *make_temporary(struct export *x)
{
    struct dirent *e;
    char nonce[512];
    size_t n = strlen(x->directory);
    int entries = 0;
    while (n > 1 && x->directory[n - 1] == '/')
        n--;
    DIR *d = opendir(x->directory);
    while (d && (e = readdir(d)))
        entries += strcmp(e->d_name, ".") && strcmp(e->d_name, "..");
    if (d)
        closedir(d);
    if (entries > 0 || (!d && errno != ENOENT)) {
        errors_add(x->errors, EXIT_WRITE, "%s: error: %s", x->directory,
                   entries > 0 ? "is there already and not empty; an export overwrites nothing"
                               : strerror(errno));
        return NULL;
    }
    char *path = xasprintf("%.*s.tmp-%s", (int)n, x->directory, io_nonce(nonce, sizeof nonce));
    if (n >= SAFETENSORS_PATH - 600 || mkdir(path, 0777) != 0) {
        errors_add(x->errors, EXIT_WRITE, "%s: error: cannot make the directory: %s", path,
                   n >= SAFETENSORS_PATH - 600 ? "its name is too long" : strerror(errno));
        free(path);
        return NULL;
    }
    return path;
}

static void say_what(const struct export *x)
{
    for (int k = 0; k < x->n_targets; k++) {
        const struct target *t = &x->target[k];
        int64_t bytes = 0;
        for (int i = 0; i < t->s.n; i++)
            bytes += t->s.tensor[i].bytes;
        fprintf(x->out, "%s%s: %d tensors, %" PRId64 " bytes in %d file%s\n", x->directory,
                t->own                   ? "/projector.safetensors"
                : x->n_targets == 1      ? ""
                : t->kind == HF_LANGUAGE ? "/language"
                                         : "/vision",
                t->s.n, bytes, t->s.n_files, t->s.n_files == 1 ? "" : "s");
        if (t->own)
            fputs(
                "  note: this projector has no form in a Hugging Face model (only an mlp with rmsnorm behind a pixel shuffle\n"
                "  has): the parts are written apart, the projector with this program's names\n",
                x->out);
        if (t->kind == HF_VISION && !t->own && x->deck.vision.final_layernorm)
            fputs(
                "  note: transformers' RadioModel ignores the encoder's last LayerNorm, radio_model.model.norm.*: apply it\n"
                "  to the features\n",
                x->out);
    }
    if (x->rounded > 0)
        fprintf(x->out, "note: %" PRId64 " numbers were rounded to %s; --dtype fp64 keeps them\n",
                x->rounded, kind_of(x, false) == SAFETENSORS_BF16 ? "BF16" : "F32");
}

static bool export_to(struct export *x, const char *temporary)
{
    bool ok = true;
    for (int k = 0; k < x->n_targets && ok; k++)
        ok = open_target(x, &x->target[k], temporary);
    for (int i = 0; i < x->model.n_params && ok; i++)
        ok = export_param(x, &x->model.param[i]);
    ok = ok && export_constants(x);
    for (int k = 0; k < x->n_targets; k++)
        ok = safetensors_close(&x->target[k].access, x->errors) && ok;
    if (ok && rename(temporary, x->directory) != 0) {
        errors_add(x->errors, EXIT_WRITE, "%s: error: cannot rename %s to it: %s", x->directory,
                   temporary, strerror(errno));
        ok = false;
    }
    if (ok)
        say_what(x);
    return ok;
}

void export_checkpoint(const char *directory, const char *checkpoint,
                       const struct export_options *options, FILE *out, struct errors *errors)
{
    struct export *x = xcalloc(1, sizeof *x);
    *x = (struct export){ .directory = directory,
                          .checkpoint = checkpoint,
                          .options = options,
                          .out = out,
                          .errors = errors };
    io_start();
    x->file = io_open_checkpoint(checkpoint, NULL, errors);
    if (x->file >= 0 && read_deck(x)) {
        struct io_tensors want;
        const int before = errors->count;
        model_describe(&x->model, &x->topo, &x->deck);
        io_tensors_whole(&want, &x->model);
        io_audit_tensors(checkpoint, x->file, &want, false, errors);
        io_tensors_free(&want);
        char *temporary = NULL;
        if (errors->count == before && io_manifest_get(checkpoint, x->file, &x->manifest, errors) &&
            (temporary = make_temporary(x))) {
            choose_targets(x);
            list_tensors(x);
            if (!export_to(x, temporary))
                nftw(temporary, remove_one, 8, FTW_DEPTH | FTW_PHYS);
        }
        free(temporary);
        for (int k = 0; k < MODEL_MODULES; k++)
            safetensors_free(&x->target[k].s);
        io_manifest_free(&x->manifest);
        model_free(&x->model);
    }
    if (x->file >= 0)
        H5Fclose(x->file);
    deck_free(&x->deck);
    free(x->block);
    free(x->converted);
    free(x);
}
