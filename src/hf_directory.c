/* hf_directory.c - see hf_directory.h. Thousands of tensors make few lines: names that differ in
 * one number alone are listed as one, layers.{0,2-5}. */
#include "hf_directory.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "bf16.h"
#include "hf_config.h"
#include "image.h"
#include "path_hint.h"

/* ---- lists of names ----------------------------------------------------------------------------
 */

struct line {
    char *name, *message;
    /* where the number is that a pass merges: name = [0, at) number [rest, ...) */
    size_t at, rest;
    int64_t number;
};
struct lines {
    struct line *line;
    int n;
};

static void add_line(struct lines *l, const char *name, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
static void add_line(struct lines *l, const char *name, const char *fmt, ...)
{
    char text[1024];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    if ((l->n & (l->n - 1)) == 0)
        l->line = xrealloc(l->line, (size_t)(l->n ? 2 * l->n : 1), sizeof *l->line);
    l->line[l->n++] = (struct line){ .name = xstrdup(name), .message = xstrdup(text) };
}

/* The last (or first) part of the name between dots that is a plain number. */
static void find_number(struct line *l, bool last)
{
    l->at = l->rest = 0;
    l->number = -1;
    for (const char *p = l->name; *p;) {
        const size_t n = strcspn(p, "."), digits = strspn(p, "0123456789");
        if (digits == n && n > 0 && n < 10 && (last || l->number < 0)) {
            l->at = (size_t)(p - l->name);
            l->rest = l->at + n;
            l->number = strtoll(p, NULL, 10);
        }
        p += n + (p[n] == '.');
    }
}

static int by_rest(const void *a, const void *b)
{
    const struct line *x = a, *y = b;
    const size_t n = x->at < y->at ? x->at : y->at;
    int c = strncmp(x->name, y->name, n);
    if (c == 0 && x->at != y->at)
        c = x->at < y->at ? -1 : 1;
    if (c == 0)
        c = strcmp(x->name + x->rest, y->name + y->rest);
    if (c == 0)
        c = strcmp(x->message, y->message);
    return c != 0 ? c : (x->number > y->number) - (x->number < y->number);
}

static bool mergeable(const struct line *x, const struct line *y)
{
    return x->number >= 0 && y->number >= 0 && x->at == y->at &&
           strncmp(x->name, y->name, x->at) == 0 &&
           strcmp(x->name + x->rest, y->name + y->rest) == 0 && strcmp(x->message, y->message) == 0;
}

static void merge(struct lines *l, bool last)
{
    int kept = 0;
    for (int i = 0; i < l->n; i++)
        find_number(&l->line[i], last);
    if (l->n > 1)
        qsort(l->line, (size_t)l->n, sizeof *l->line, by_rest);
    for (int i = 0, end; i < l->n; i = end) {
        for (end = i + 1; end < l->n && mergeable(&l->line[i], &l->line[end]);)
            end++;
        struct line one = l->line[i];
        if (end > i + 1) {
            char *text = NULL;
            size_t bytes;
            FILE *f = open_memstream(&text, &bytes);
            CHECK_SYS(f != NULL, EXIT_ENVIRONMENT, "no memory for a message");
            fprintf(f, "%.*s{", (int)one.at, one.name);
            for (int k = i, run; k < end; k = run + 1) {
                for (run = k; run + 1 < end && l->line[run + 1].number <= l->line[run].number + 1;)
                    run++;
                fprintf(f, "%s%" PRId64, k > i ? "," : "", l->line[k].number);
                if (l->line[run].number > l->line[k].number)
                    fprintf(f, "-%" PRId64, l->line[run].number);
            }
            fprintf(f, "}%s", one.name + one.rest);
            fclose(f);
            one.name = text;
            for (int k = i; k < end; k++) {
                free(l->line[k].name);
                if (k > i)
                    free(l->line[k].message);
            }
        }
        l->line[kept++] = one;
    }
    l->n = kept;
}

/* Merge, report, free. */
static void report(struct lines *l, const char *path, struct errors *errors)
{
    merge(l, true);
    merge(l, false);
    for (int i = 0; i < l->n; i++) {
        char shown[1024];
        errors_add(errors, EXIT_CHECKPOINT, "%s: error: %s: %s", path,
                   printable(shown, sizeof shown, l->line[i].name), l->line[i].message);
        free(l->line[i].name);
        free(l->line[i].message);
    }
    free(l->line);
    *l = (struct lines){ .n = 0 };
}

/* ---- the directory ------------------------------------------------------------------------------
 */

int hf_directories(const struct deck *deck, struct hf_directory out[HF_DIRECTORIES])
{
    const struct deck_checkpoint *k = &deck->checkpoint;
    const char *const path[MODEL_MODULES] = { [MODEL_VISION] = k->import_vision,
                                              [MODEL_PROJECTOR] = k->import_projector,
                                              [MODEL_LANGUAGE] = k->import_language };
    int n = 0;
    for (int m = 0; m < MODEL_MODULES; m++) {
        int at = 0;
        while (at < n && strcmp(out[at].path, path[m]))
            at++;
        if (!*path[m])
            continue;
        if (at == n)
            out[n++] = (struct hf_directory){ .path = path[m] };
        out[at].want[m] = true;
    }
    return n;
}

static int by_found(const void *a, const void *b)
{
    const struct hf_found *x = a, *y = b;
    return x->module != y->module ? (x->module < y->module ? -1 : 1) : strcmp(x->name, y->name);
}

void hf_directory_index(struct hf_directory *d)
{
    d->found = xcalloc((size_t)d->s.n + 1, sizeof *d->found);
    for (int i = 0; i < d->s.n; i++) {
        d->found[i].index = i;
        d->found[i].module = (int32_t)hf_canonical(d->s.tensor[i].name, d->found[i].name);
    }
    qsort(d->found, (size_t)d->s.n, sizeof *d->found, by_found);
}

void hf_directory_free(struct hf_directory *d)
{
    safetensors_free(&d->s);
    free(d->found);
    d->found = NULL;
}

const struct safetensors_tensor *hf_directory_find(const struct hf_directory *d,
                                                   enum model_module module, const char *canonical)
{
    struct hf_found key = { .module = (int32_t)module };
    snprintf(key.name, sizeof key.name, "%s", canonical);
    const struct hf_found *f = bsearch(&key, d->found, (size_t)d->s.n, sizeof key, by_found);
    return f ? &d->s.tensor[f->index] : NULL;
}

static int find_sources(const struct hf_directory *d, const struct param *p, const struct hf_map *m,
                        const struct safetensors_tensor **tensor)
{
    int n = 0;
    for (int k = 0; k < m->n_sources; k++) {
        tensor[k] = hf_directory_find(d, p->module, m->source[k].name);
        n += tensor[k] != NULL;
    }
    return n;
}

int hf_directory_map(const struct hf_directory *d, const struct deck *deck, const struct param *p,
                     struct hf_map *m, const struct safetensors_tensor ***tensor)
{
    int most = -1;
    struct hf_map next;
    *tensor = NULL;
    for (int spelling = 0; hf_map_init(&next, deck, p, spelling); spelling++) {
        const struct safetensors_tensor **t = xcalloc(
            (size_t)next.n_sources, sizeof *t); /* NOLINT(bugprone-sizeof-expression): pointers */
        const int n = find_sources(d, p, &next, t);
        if (n > most) {
            if (most >= 0)
                hf_map_free(m);
            free(*tensor);
            most = n;
            *m = next;
            *tensor = t;
        } else {
            hf_map_free(&next);
            free(t);
        }
    }
    ASSERT(most >= 0); /* every parameter has a spelling */
    return most;
}

const struct safetensors_tensor *hf_directory_scale(const struct hf_directory *d,
                                                    const struct param *p)
{
    char name[SAFETENSORS_NAME];
    for (int k = 0; hf_scale_name(p, k, name); k++) {
        const struct safetensors_tensor *t = hf_directory_find(d, p->module, name);
        if (t)
            return t;
    }
    return NULL;
}

/* ---- audit --------------------------------------------------------------------------------------
 */

struct tally {
    const char *group;
    int tensors;
    int64_t bytes;
};
enum { TALLIES = 16 };

struct audit {
    struct hf_directory *d;
    const struct deck *deck;
    bool *used; /* [s.n] */
    struct lines lines;
    struct tally tally[TALLIES];
    int n_tallies, n_used;
    struct errors *errors, *notes;
};

static void shape_text(const struct hf_source *s, char *out, size_t size)
{
    struct safetensors_tensor t = { .ndim = s->ndim };
    for (int d = 0; d < s->ndim; d++)
        t.shape[d] = s->shape[d];
    safetensors_shape(&t, out, size);
}

static void audit_source(struct audit *a, const struct hf_source *s,
                         const struct safetensors_tensor *t)
{
    char has[128], needs[128];
    bool same = t->ndim == s->ndim;
    a->used[t - a->d->s.tensor] = true;
    for (int d = 0; d < s->ndim && same; d++)
        same = t->shape[d] == s->shape[d];
    shape_text(s, needs, sizeof needs);
    if (!same)
        add_line(&a->lines, t->name, "has shape %s, this model needs %s",
                 safetensors_shape(t, has, sizeof has), needs);
    else if (t->kind == SAFETENSORS_OTHER)
        add_line(&a->lines, t->name, "has type %s, weights are BF16, F16, F32 or F64", t->type);
}

/* The encoder's last LayerNorm, which published encoders lack (hf.md 4.2). */
static void audit_final_norm(struct audit *a, const struct param *p)
{
    if (strcmp(p->name, "decoder.final_layernorm.weight"))
        return;
    if (*a->deck->checkpoint.import_projector)
        errors_add(
            a->errors, EXIT_CHECKPOINT,
            "%s: error: has no LayerNorm behind the encoder's last block, so its projector was trained without: set "
            "vision.final_layernorm = .false. (%s)",
            a->d->path, deck_where(a->deck, "vision", "final_layernorm"));
    else
        errors_add(
            a->notes, EXIT_CHECKPOINT,
            "%s: note: has no LayerNorm behind the encoder's last block: it starts with weight 1 and bias 0",
            a->d->path);
}

static void audit_param(struct audit *a, const struct param *p)
{
    const struct safetensors_tensor **tensor;
    struct hf_map m;
    const int n = hf_directory_map(a->d, a->deck, p, &m, &tensor);
    const struct safetensors_tensor *scale = hf_directory_scale(a->d, p);
    if (n == 0 && p->module == MODEL_VISION &&
        strncmp(p->name, "decoder.final_layernorm.", 24) == 0) {
        audit_final_norm(a, p);
    } else {
        for (int k = 0; k < m.n_sources; k++) {
            char needs[128], name[SAFETENSORS_NAME];
            shape_text(&m.source[k], needs, sizeof needs);
            hf_published(p->module, m.source[k].name, false, name);
            if (tensor[k])
                audit_source(a, &m.source[k], tensor[k]);
            else
                add_line(&a->lines, name, "missing, of shape %s", needs);
        }
    }
    if (scale) {
        a->used[scale - a->d->s.tensor] = true;
        if (scale->ndim != 1 || scale->shape[0] != p->shape[0] || scale->kind == SAFETENSORS_OTHER)
            add_line(&a->lines, scale->name, "is no scale of %" PRId64 " rows", p->shape[0]);
    }
    hf_map_free(&m);
    free(tensor);
}

/* Mean and deviation of the pictures that the encoder knows, in the precision that they are stored
 * in. */
static void audit_conditioner(struct audit *a, const struct safetensors_tensor *t, const char *name)
{
    static const double step[] = { [SAFETENSORS_BF16] = 0x1p-8,
                                   [SAFETENSORS_F16] = 0x1p-11,
                                   [SAFETENSORS_F32] = 1e-6,
                                   [SAFETENSORS_F64] = 1e-6 };
    const double *want = strstr(name, "norm_mean") ? image_mean : image_deviation;
    struct safetensors_access access = { .s = &a->d->s };
    double has[3] = { 0 };
    if (t->elements != 3 || t->kind == SAFETENSORS_OTHER) {
        add_line(&a->lines, t->name, "is no list of three numbers");
    } else if (safetensors_read(&access, t, 0, 3, has, a->errors)) {
        for (int i = 0; i < 3; i++)
            if (!(fabs(has[i] - want[i]) <= step[t->kind] * want[i])) {
                add_line(&a->lines, t->name,
                         "%.8g, %.8g, %.8g: this program's pictures have %.8g, %.8g, %.8g", has[0],
                         has[1], has[2], want[0], want[1], want[2]);
                break;
            }
    }
    safetensors_close(&access, a->errors);
}

static void count(struct audit *a, const char *group, const struct safetensors_tensor *t)
{
    int k = 0;
    while (k < a->n_tallies && strcmp(a->tally[k].group, group))
        k++;
    ASSERT(k < TALLIES);
    if (k == a->n_tallies)
        a->tally[a->n_tallies++].group = group;
    a->tally[k].tensors++;
    a->tally[k].bytes += t->bytes;
}

/* Which key would give this tensor a parameter. */
static const char *hint_of(const char *canonical)
{
    static const char *const hints[][2] = {
        { "e_score_correction_bias",
          "; moe.moe_router_enable_expert_bias = .false. has no such parameter" },
        { "mlp1.0.weight", "; projector.projection_normalization = 'rmsnorm' has it" },
        { "mlp1.", "; projector.vision_projection_type = 'mlp' has it" },
        { "multi_modal_projector.layer_norm.",
          "; projector.projection_normalization = 'rmsnorm' has it" },
        { "multi_modal_projector.", "; projector.vision_projection_type = 'mlp' has it" },
        { "vision_final_layernorm.", "; vision.final_layernorm = .true. has it" },
    };
    for (size_t k = 0; k < sizeof hints / sizeof hints[0]; k++)
        if (strstr(canonical, hints[k][0]))
            return hints[k][1];
    return strcmp(canonical, "norm.weight") && strcmp(canonical, "norm.bias") ? "" : hints[5][1];
}

/* A tensor that no parameter has taken. */
static void audit_rest(struct audit *a, const struct hf_found *f)
{
    const struct safetensors_tensor *t = &a->d->s.tensor[f->index];
    const char *group = hf_dropped((enum model_module)f->module, t->name, f->name);
    const char *refused = hf_refused((enum model_module)f->module, f->name, t->type);
    if (group)
        count(a, group, t);
    else if (f->module < MODEL_MODULES && !a->d->want[f->module])
        count(a,
              f->module == MODEL_LANGUAGE ? "language model"
              : f->module == MODEL_VISION ? "encoder"
                                          : "projector",
              t);
    else if (refused)
        add_line(&a->lines, t->name, "%s", refused);
    else if (f->module == MODEL_VISION && strncmp(f->name, "input_conditioner.norm_", 23) == 0)
        audit_conditioner(a, t, f->name);
    else
        add_line(&a->lines, t->name, "unexpected: this deck's model has no such tensor%s",
                 hint_of(f->name));
}

static void audit_tensors(struct audit *a)
{
    struct topology topo;
    struct model model;
    model_describe(&model, &topo, a->deck);
    for (int i = 0; i < model.n_params; i++)
        if (a->d->want[model.param[i].module])
            audit_param(a, &model.param[i]);
    model_free(&model);
    for (int i = 0; i < a->d->s.n; i++)
        a->n_used += a->used[i];
    for (int i = 0; i < a->d->s.n; i++) {
        const struct hf_found *f = &a->d->found[i];
        if (i > 0 && by_found(f - 1, f) == 0 && f->module < MODEL_MODULES)
            errors_add(a->errors, EXIT_CHECKPOINT, "%s: error: %s and %s are the same parameter",
                       a->d->path, a->d->s.tensor[f[-1].index].name, a->d->s.tensor[f->index].name);
        else if (!a->used[f->index])
            audit_rest(a, f);
    }
    report(&a->lines, a->d->path, a->errors);
}

/* The sentence on what a good directory gives. */
static void summarise(struct audit *a)
{
    static const char *const words[MODEL_MODULES] = { "encoder", "projector", "language model" };
    char modules[64] = "", rest[1024] = "";
    size_t n = 0;
    int64_t bytes = 0;
    for (int m = 0, k = 0; m < MODEL_MODULES; m++)
        if (a->d->want[m])
            n += (size_t)snprintf(modules + n, sizeof modules - n, "%s%s", k++ ? ", " : "",
                                  words[m]);
    n = 0;
    for (int k = 0; k < a->n_tallies && n < sizeof rest; k++)
        n += (size_t)snprintf(rest + n, sizeof rest - n, "%s%s %d (%.3f GB)",
                              k ? ", " : "; not used: ", a->tally[k].group, a->tally[k].tensors,
                              1e-9 * (double)a->tally[k].bytes);
    for (int i = 0; i < a->d->s.n; i++)
        bytes += a->used[i] ? a->d->s.tensor[i].bytes : 0;
    errors_add(a->notes, EXIT_CHECKPOINT, "%s: %s: %d of %d tensors, %.3f GB in %d file%s%s",
               a->d->path, modules, a->n_used, a->d->s.n, 1e-9 * (double)bytes, a->d->s.n_files,
               a->d->s.n_files == 1 ? "" : "s", rest);
}

/* Nothing by that name: the key that gave it is named. */
static bool is_there(const struct hf_directory *d, const struct deck *deck, struct errors *errors)
{
    char key[32], hint[512];
    struct stat st;
    if (stat(d->path, &st) == 0)
        return true;
    const int error = errno;
    for (int m = 0; m < MODEL_MODULES; m++)
        if (d->want[m]) {
            snprintf(key, sizeof key, "import_%s", model_module_names[m]);
            errors_add(errors, EXIT_CHECKPOINT, "%s: error: checkpoint.%s = '%s': %s%s",
                       deck_where(deck, "checkpoint", key), key, d->path, strerror(error),
                       path_hint(d->path, hint, sizeof hint));
        }
    return false;
}

void hf_directory_audit(struct hf_directory *d, const struct deck *deck, struct errors *errors,
                        struct errors *notes)
{
    const int before = errors->count;
    if (!is_there(d, deck, errors) || !safetensors_open(&d->s, d->path, errors))
        return;
    hf_directory_index(d);
    /* A file of this program's own projector comes without a config.json. */
    if (d->want[MODEL_LANGUAGE] || d->want[MODEL_VISION] ||
        hf_directory_find(d, MODEL_PROJECTOR, "mlp1.1.weight")) {
        struct hf_config *c = hf_config_open(d->s.directory, errors);
        if (c)
            hf_config_check(c, deck, d->want, errors, notes);
        hf_config_free(c);
    }
    if (errors->count > before) /* another model: its tensors need no line each */
        return;
    struct audit a = { .d = d,
                       .deck = deck,
                       .errors = errors,
                       .notes = notes,
                       .used = xcalloc((size_t)d->s.n + 1, sizeof *a.used) };
    audit_tensors(&a);
    if (errors->count == before)
        summarise(&a);
    free(a.used);
}
