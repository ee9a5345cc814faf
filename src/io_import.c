/* io_import.c - weights from Hugging Face directories into this rank's shards (io_hf.h).
 *
 * World rank 0 reads headers and configurations, accounts for every tensor (hf_directory.c) and
 * broadcasts the headers. Then every rank fetches from the files just the rows and columns that it
 * holds: widened to double, multiplied by a layer scale where there is one, rounded once to the
 * parameter's type. What rounding changed is counted, what is not finite afterwards is an error.
 */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bf16.h"
#include "hf_directory.h"
#include "io_hf.h"
#include "io_tensors.h"
#include "log.h"

enum { CHUNK = 1 << 17 }; /* numbers in flight */

bool import_wanted(const struct deck *deck)
{
    struct hf_directory d[HF_DIRECTORIES];
    return hf_directories(deck, d) > 0;
}

static const struct grid *grid_of(const struct topology *topo, const struct param *p)
{
    return p->module == MODEL_LANGUAGE ? &topo->language : &topo->encoder;
}

/* ---- reading --------------------------------------------------------------------------------- */

enum { COUNT_NUMBERS, COUNT_ROUNDED, COUNTS };

struct fetch { /* one parameter of this rank */
    struct model *model;
    const struct param *p;
    struct safetensors_access *access;
    const struct safetensors_tensor *const *tensor;
    const double *scale; /* [rows of the parameter], NULL = all ones */
    int64_t cols;        /* of the parameter */
    int64_t first_local; /* of the slab in the shard */
    double *wide;        /* [CHUNK] */
    void *narrow;        /* [CHUNK] */
    int64_t *counts;
    bool owner; /* counts for the job */
    bool ok;
    struct errors *errors;
};

/* n numbers into the parameter's type; how many changed, and whether all are finite. */
static bool round_to(enum dtype dtype, const double *in, int64_t n, void *out, int64_t *changed)
{
    bool finite = true;
    for (int64_t i = 0; i < n; i++) {
        double back = in[i];
        switch (dtype) {
        case DTYPE_F32: back = ((float *)out)[i] = (float)in[i]; break;
        case DTYPE_BF16:
            back = bf16_to_float(((uint16_t *)out)[i] = bf16_from_double(in[i]));
            break;
        default: ((double *)out)[i] = in[i]; break;
        }
        finite = finite && isfinite(back);
        *changed += back != in[i];
    }
    return finite;
}

static void put_numbers(struct fetch *f, int64_t local, int64_t n)
{
    const struct tensor *v = &f->p->value;
    const struct tensor host = tensor_1d(f->narrow, v->dtype, PLACE_HOST, n);
    const struct tensor part =
        tensor_1d((char *)v->data + (size_t)local * dtype_bytes(v->dtype), v->dtype, v->place, n);
    f->model->be->copy(f->model->compute, &host, &part);
    f->model->be->stream_sync(f->model->compute);
}

/* Elements [first, first + n) of a source tensor to element `local` of the shard. */
static void fetch_numbers(void *ctx, int source, int64_t first, int64_t local, int64_t n)
{
    struct fetch *f = ctx;
    const struct safetensors_tensor *t = f->tensor[source];
    for (int64_t done = 0, k; done < n && f->ok; done += k) {
        k = n - done < CHUNK ? n - done : CHUNK;
        int64_t changed = 0;
        f->ok = safetensors_read(f->access, t, first + done, k, f->wide, f->errors);
        for (int64_t i = 0; f->ok && f->scale && i < k; i++)
            f->wide[i] *= f->scale[(first + done + i) / f->cols];
        if (!f->ok)
            break;
        if (!round_to(f->p->value.dtype, f->wide, k, f->narrow, &changed)) {
            errors_add(f->errors, EXIT_CHECKPOINT,
                       "%s: error: %s: elements %" PRId64 " to %" PRId64
                       " hold numbers that are not finite as %s",
                       f->access->s->directory, t->name, first + done, first + done + k - 1,
                       dtype_name(f->p->value.dtype));
            f->ok = false;
            break;
        }
        put_numbers(f, f->first_local + local + done, k);
        if (f->owner) {
            f->counts[COUNT_NUMBERS] += k;
            f->counts[COUNT_ROUNDED] += changed;
        }
    }
}

/* A layer scale's numbers, NULL when they are all one (or none). Only plain maps have one, so rows
 * of the tensor are rows of the parameter. */
static double *read_scale(const struct hf_directory *d, const struct param *p,
                          struct safetensors_access *access, struct errors *errors)
{
    const struct safetensors_tensor *t = hf_directory_scale(d, p);
    bool ones = true;
    if (!t)
        return NULL;
    double *scale = xcalloc((size_t)t->elements, sizeof *scale);
    if (safetensors_read(access, t, 0, t->elements, scale, errors))
        for (int64_t i = 0; i < t->elements; i++)
            ones = ones && scale[i] == 1.0;
    if (!ones)
        return scale;
    free(scale);
    return NULL;
}

static void import_param(struct model *model, const struct hf_directory *d, const struct param *p,
                         struct safetensors_access *access, double *wide, void *narrow,
                         int64_t *counts, int64_t *scaled, struct errors *errors)
{
    const struct safetensors_tensor **tensor;
    struct io_slab slab[PARAM_MAX_BLOCKS];
    struct hf_map m;
    const struct grid *g = grid_of(model->topo, p);
    const int n = hf_directory_map(d, model->deck, p, &m, &tensor), n_slabs = io_slabs(p, g, slab);
    double *scale = read_scale(d, p, access, errors);
    struct fetch f = { .model = model,
                       .p = p,
                       .access = access,
                       .tensor = tensor,
                       .scale = scale,
                       .cols = m.cols,
                       .wide = wide,
                       .narrow = narrow,
                       .counts = counts,
                       .owner = io_owner(p, g),
                       .ok = true,
                       .errors = errors };
    *scaled += scale && f.owner;
    for (int s = 0; s < n_slabs && n > 0;
         s++) { /* n = 0: a last LayerNorm that keeps its initial values */
        f.first_local = slab[s].local;
        hf_map_walk(&m, p, slab[s].start, slab[s].count, fetch_numbers, &f);
    }
    free(scale);
    hf_map_free(&m);
    free(tensor);
}

static void import_directory(struct model *model, const struct hf_directory *d,
                             struct errors *errors)
{
    struct safetensors_access access = { .s = &d->s };
    double *wide = xmalloc(CHUNK, sizeof *wide), *narrow = xmalloc(CHUNK, sizeof *narrow);
    int64_t counts[COUNTS + 1] = { 0 };
    for (int i = 0; i < model->n_params; i++)
        if (d->want[model->param[i].module])
            import_param(model, d, &model->param[i], &access, wide, narrow, counts, &counts[COUNTS],
                         errors);
    safetensors_close(&access, errors);
    free(wide);
    free(narrow);
    comm_host_reduce_i64(model->topo->world, counts, COUNTS + 1, COMM_SUM);
    log_line("imported %" PRId64 " numbers from %s, %" PRId64 " of them rounded to %s",
             counts[COUNT_NUMBERS], d->path, counts[COUNT_ROUNDED], dtype_name(model->act));
    if (counts[COUNTS] > 0)
        log_line("folded the layer scales of %s into the %" PRId64 " tensors behind them", d->path,
                 counts[COUNTS]);
}

/* Headers of rank 0 to every rank. */
static void share(struct hf_directory *d, const struct topology *topo)
{
    struct safetensors *s = &d->s;
    int64_t n[2] = { s->n_files, s->n };
    comm_host_broadcast(topo->world, n, sizeof n, 0);
    if (topo->rank != 0) {
        s->n_files = (int)n[0];
        s->n = (int)n[1];
        s->file = xcalloc((size_t)n[0] + 1, sizeof *s->file);
        s->tensor = xcalloc((size_t)n[1] + 1, sizeof *s->tensor);
    }
    comm_host_broadcast(topo->world, s->directory, sizeof s->directory, 0);
    comm_host_broadcast(topo->world, s->file, (size_t)n[0] * sizeof *s->file, 0);
    comm_host_broadcast(topo->world, s->tensor, (size_t)n[1] * sizeof *s->tensor, 0);
    if (topo->rank != 0)
        hf_directory_index(d);
}

void import_weights(struct model *model, struct errors *errors)
{
    const struct topology *topo = model->topo;
    struct hf_directory d[HF_DIRECTORIES];
    struct errors notes = { 0 };
    const int n = hf_directories(model->deck, d);
    for (int k = 0; k < n && topo->rank == 0; k++)
        hf_directory_audit(&d[k], model->deck, errors, &notes);
    for (int i = 0; i < notes.count; i++)
        (strstr(notes.line[i], ": note: ") ? log_warn : log_line)("%s", notes.line[i]);
    errors_free(&notes);
    if (comm_host_collect_errors(topo->world, errors) == 0)
        for (int k = 0; k < n; k++) {
            share(&d[k], topo);
            import_directory(model, &d[k], errors);
        }
    for (int k = 0; k < n; k++)
        hf_directory_free(&d[k]);
    comm_host_collect_errors(topo->world, errors);
}

/* ---- --check --------------------------------------------------------------------------------- */

struct weigh {
    const struct safetensors_tensor *const *tensor;
    double bytes;
};

static void weigh_numbers(void *ctx, int source, int64_t first, int64_t local, int64_t n)
{
    struct weigh *w = ctx;
    const struct safetensors_tensor *t = w->tensor[source];
    w->bytes += (double)n * ((double)t->bytes / (double)t->elements);
}

/* What a rank reads, in bytes. */
static double bytes_of_rank(const struct deck *deck, const struct topology *topo,
                            const struct hf_directory *d)
{
    const struct backend_ops *be = backend_sizing(deck);
    struct stream stream = { .name = "none" };
    struct model model;
    double bytes = 0;
    model_init(&model, deck, topo, be, &stream);
    for (int i = 0; i < model.n_params; i++) {
        const struct param *p = &model.param[i];
        const struct safetensors_tensor **tensor;
        struct io_slab slab[PARAM_MAX_BLOCKS];
        struct hf_map m;
        if (!d->want[p->module])
            continue;
        const int n = hf_directory_map(d, deck, p, &m, &tensor),
                  n_slabs = io_slabs(p, grid_of(topo, p), slab);
        struct weigh w = { .tensor = tensor };
        for (int s = 0; s < n_slabs && n > 0; s++)
            hf_map_walk(&m, p, slab[s].start, slab[s].count, weigh_numbers, &w);
        bytes += w.bytes;
        hf_map_free(&m);
        free(tensor);
    }
    model_free(&model);
    return bytes;
}

void import_print(const struct deck *deck, const struct topology *all, const int *role, int n_roles,
                  FILE *out, struct errors *errors)
{
    struct hf_directory d[HF_DIRECTORIES];
    struct errors notes = { 0 };
    const int n = hf_directories(deck, d), before = errors->count;
    fprintf(out, "import, from headers\n");
    for (int k = 0; k < n; k++) {
        if (access(d[k].path, F_OK) != 0)
            fprintf(out, "  note: %s is not here: not checked\n", d[k].path);
        else
            hf_directory_audit(&d[k], deck, errors, &notes);
    }
    for (int i = 0; i < notes.count; i++)
        fprintf(out, "  %s\n", notes.line[i]);
    errors_free(&notes);
    if (errors->count == before) {
        fprintf(out, "  %-10s %5s %12s %12s\n", "role", "rank", "MiB read", "MiB held");
        for (int i = 0; i < n_roles; i++) {
            double read = 0, held = 0;
            for (int k = 0; k < n; k++) {
                const double index =
                    (double)d[k].s.n * (sizeof *d[k].s.tensor + sizeof *d[k].found);
                if (d[k].found)
                    read += bytes_of_rank(deck, &all[role[i]], &d[k]);
                held += index;
            }
            fprintf(out, "  %-10s %5d %12.2f %12.2f\n", topology_role(&all[role[i]]),
                    all[role[i]].rank, read / 0x1p20,
                    (held + CHUNK * 2.0 * sizeof(double)) / 0x1p20 + 1.0);
        }
    }
    for (int k = 0; k < n; k++)
        hf_directory_free(&d[k]);
    fputc('\n', out);
}
