/* io_restore.c - loading a checkpoint strictly: every tensor is accounted for both ways, and every
 * mistake is listed, before a number is used.
 *
 * World rank 0 looks at the file alone: format, completion mark, links, names, types, shapes, the
 * deck's structural keys, state. When nothing is wrong every rank reads its slabs, whatever layout
 * wrote them, and verifies each block. A file is not trusted: soft and external links, virtual and
 * external storage are refused, counts are bounded, plugins are off. training.md 4.5, robustness.md
 * 0.13 to 0.19.
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include "io_tensors.h"
#include "log.h"

struct audit { /* rank 0's look at one file */
    const char *path;
    hid_t file;
    const struct io_tensors *want;
    bool *seen; /* [want->count] */
    bool with_optimizer;
    struct errors *errors;
};

/* Keys that decide what the stored numbers mean; a resumed or finetuned model must have the same.
 * Widths that shapes show are named here too, because a sentence about the deck is clearer than
 * thirty about shapes. */
static const char *const structural_keys[] = {
    "run.precision",
    "language.hybrid_layer_pattern",
    "language.hidden_size",
    "language.num_attention_heads",
    "language.num_query_groups",
    "language.kv_channels",
    "language.ffn_hidden_size",
    "language.vocab_size",
    "language.make_vocab_size_divisible_by",
    "language.layernorm_epsilon",
    "moe.num_experts",
    "moe.moe_router_topk",
    "moe.moe_ffn_hidden_size",
    "moe.moe_shared_expert_intermediate_size",
    "moe.moe_router_topk_scaling_factor",
    "moe.moe_router_enable_expert_bias",
    "mamba.mamba_num_heads",
    "mamba.mamba_head_dim",
    "mamba.mamba_num_groups",
    "mamba.mamba_state_dim",
    "mamba.linear_conv_kernel_dim",
    "vision.num_layers",
    "vision.hidden_size",
    "vision.num_attention_heads",
    "vision.ffn_hidden_size",
    "vision.patch_dim",
    "vision.max_img_h",
    "vision.max_img_w",
    "vision.class_token_len",
    "vision.disable_vision_class_token",
    "vision.pixel_shuffle",
    "vision.final_layernorm",
    "projector.vision_projection_type",
    "projector.projection_normalization",
};

/* ---- names, types, shapes ------------------------------------------------------------------ */

static void shape_text(int ndim, const int64_t *shape, char *out, size_t size)
{
    size_t n = (size_t)snprintf(out, size, "[");
    for (int i = 0; i < ndim && n < size; i++)
        n += (size_t)snprintf(out + n, size - n, "%s%" PRId64, i ? "," : "", shape[i]);
    if (n < size)
        snprintf(out + n, size - n, "]");
}

/* One wanted dataset: plain storage, type and shape as the model has them. */
static void audit_dataset(struct audit *a, const struct io_tensor *d)
{
    hid_t set = H5Dopen2(a->file, d->path, H5P_DEFAULT);
    if (set < 0) {
        char why[1200];
        errors_add(a->errors, EXIT_CHECKPOINT, "%s: error: %s: cannot open: %s", a->path, d->path,
                   io_reason(why, sizeof why));
        return;
    }
    hid_t type = H5Dget_type(set), want = io_type(d->dtype), dcpl = H5Dget_create_plist(set);
    int64_t shape[TENSOR_MAX_DIMS] = { 0 };
    int ndim = io_get_shape(a->file, d->path, shape);
    if (dcpl < 0 || H5Pget_layout(dcpl) != H5D_CONTIGUOUS || H5Pget_external_count(dcpl) != 0)
        errors_add(a->errors, EXIT_CHECKPOINT,
                   "%s: error: %s: is not stored contiguously in this file", a->path, d->path);
    if (type < 0 || H5Tequal(type, want) <= 0) {
        char name[64] = "another type";
        io_get_attr_string(set, "dtype", name, sizeof name);
        errors_add(a->errors, EXIT_CHECKPOINT, "%s: error: %s: has type %s, this model needs %s",
                   a->path, d->path,
                   type >= 0 && strcmp(name, io_type_name(d->dtype)) ? name : "another type",
                   io_type_name(d->dtype));
    }
    if (ndim != d->ndim || memcmp(shape, d->shape, (size_t)d->ndim * sizeof *shape)) {
        char has[128], needs[128];
        shape_text(ndim, shape, has, sizeof has);
        shape_text(d->ndim, d->shape, needs, sizeof needs);
        errors_add(a->errors, EXIT_CHECKPOINT, "%s: error: %s: has shape %s, this model needs %s",
                   a->path, d->path, ndim < 0 ? "of too many dimensions" : has, needs);
    }
    if (type >= 0)
        H5Tclose(type);
    if (dcpl >= 0)
        H5Pclose(dcpl);
    H5Tclose(want);
    H5Dclose(set);
}

static herr_t audit_link(hid_t file, const char *name, const H5L_info_t *info, void *ctx)
{
    struct audit *a = ctx;
    char full[IO_PATH], shown[IO_PATH];
    snprintf(full, sizeof full, "/%s", name);
    printable(shown, sizeof shown, full);
    if (info->type != H5L_TYPE_HARD) {
        errors_add(a->errors, EXIT_CHECKPOINT, "%s: error: %s: is %s link, which is not followed",
                   a->path, shown,
                   info->type == H5L_TYPE_SOFT ? "a soft" : "an external or user-defined");
        return 0;
    }
    H5O_info_t object;
    if (H5Oget_info_by_name2(file, name, &object, H5O_INFO_BASIC, H5P_DEFAULT) < 0) {
        errors_add(a->errors, EXIT_CHECKPOINT, "%s: error: %s: is damaged", a->path, shown);
        return 0;
    }
    bool model = strncmp(full, "/model/", 7) == 0,
         optimizer = strncmp(full, "/optimizer/", 11) == 0;
    if (object.type == H5O_TYPE_GROUP || !(model || (optimizer && a->with_optimizer)))
        return 0;
    struct io_tensor *d = strlen(full) < IO_TENSOR_PATH ? io_tensors_find(a->want, full) : NULL;
    if (d)
        a->seen[d - a->want->tensor] = true;
    else
        errors_add(a->errors, EXIT_CHECKPOINT,
                   "%s: error: %s: unexpected: this model has no such tensor", a->path, shown);
    return 0;
}

static void audit_tensors(struct audit *a)
{
    char why[1200];
    a->seen = xcalloc((size_t)a->want->count + 1, sizeof *a->seen);
    /* In any other order HDF5 first makes a table, and of a damaged file frees what it has not
     * filled in. */
    if (H5Lvisit(a->file, H5_INDEX_NAME, H5_ITER_NATIVE, audit_link, a) < 0)
        errors_add(a->errors, EXIT_CHECKPOINT, "%s: error: cannot list its contents: %s", a->path,
                   io_reason(why, sizeof why));
    for (int i = 0; i < a->want->count; i++) {
        if (a->seen[i])
            audit_dataset(a, &a->want->tensor[i]);
        else
            errors_add(a->errors, EXIT_CHECKPOINT, "%s: error: %s: missing", a->path,
                       a->want->tensor[i].path);
    }
    free(a->seen);
}

/* The manifest must vouch for exactly the elements of every wanted tensor. */
static void audit_manifest(struct audit *a)
{
    struct io_manifest m;
    if (!io_manifest_get(a->path, a->file, &m, a->errors))
        return;
    double *elements = xcalloc((size_t)m.n_paths + 1, sizeof *elements);
    for (int64_t k = 0; k < m.n_blocks; k++) {
        const struct io_block *b = &m.block[k];
        double n = 1;
        for (int i = 0; i < TENSOR_MAX_DIMS; i++)
            n *= (double)b->count[i];
        if (b->tensor >= 0 && b->tensor < m.n_paths)
            elements[b->tensor] += n;
    }
    for (int64_t i = 0; i < m.n_paths; i++) {
        const struct io_tensor *d = io_tensors_find(a->want, m.path[i]);
        if (d && elements[i] != (double)io_volume(d->ndim, d->shape))
            errors_add(a->errors, EXIT_CHECKPOINT,
                       "%s: error: %s: /manifest vouches for %.0f of its %" PRId64 " elements",
                       a->path, d->path, elements[i], io_volume(d->ndim, d->shape));
    }
    free(elements);
    io_manifest_free(&m);
}

/* ---- deck and state ------------------------------------------------------------------------ */

struct deck_audit {
    struct audit *a;
    hid_t group;
    const struct deck *deck;
    bool same_run;
};

static void audit_key(void *ctx, const char *group, const char *key, const char *value,
                      enum deck_origin origin)
{
    struct deck_audit *d = ctx;
    char name[256], then[1024];
    bool structural = false;
    snprintf(name, sizeof name, "%s.%s", group, key);
    for (size_t i = 0; i < sizeof structural_keys / sizeof structural_keys[0]; i++)
        structural = structural || strcmp(name, structural_keys[i]) == 0;
    /* Every random draw and the sample order follow from the seed, and what a position in a stream
     * means from the packing: a resumed run keeps them, a fine-tuning need not. */
    structural =
        structural ||
        ((strcmp(name, "run.seed") == 0 || strcmp(name, "data.packing_buffer_size") == 0) &&
         d->same_run);
    /* What was frozen has no moments. */
    const bool trained = d->a->with_optimizer && strncmp(name, "stage.freeze_", 13) == 0 &&
                         (d->deck->topology.layout != DECK_LAYOUT_LANGUAGE_ONLY ||
                          strcmp(name, "stage.freeze_lm") == 0);
    if (!structural && !trained)
        return;
    if (!io_get_attr_string(d->group, name, then, sizeof then))
        errors_add(d->a->errors, EXIT_CHECKPOINT, "%s: error: /deck does not tell %s", d->a->path,
                   name);
    else if (strcmp(then, value)) {
        char shown[1024];
        errors_add(d->a->errors, EXIT_CHECKPOINT,
                   "%s: error: was written with %s = %s, this run has %s (%s)%s", d->a->path, name,
                   printable(shown, sizeof shown, then), value, deck_where(d->deck, group, key),
                   trained ? "; checkpoint.finetune takes the weights alone" : "");
    }
}

static void audit_deck(struct audit *a, const struct deck *deck, bool same_run)
{
    struct deck_audit d = { a, H5Gopen2(a->file, "/deck", H5P_DEFAULT), deck, same_run };
    if (d.group < 0) {
        errors_add(a->errors, EXIT_CHECKPOINT, "%s: error: /deck is missing", a->path);
        return;
    }
    deck_visit(deck, audit_key, &d);
    H5Gclose(d.group);
}

/* Does the stored state fit the running job? */
static void audit_state(struct audit *a, const struct train_state *stored, const char *layout,
                        const struct topology *topo, const struct train_state *state,
                        int64_t iteration, const struct checkpoint_options *options)
{
    char now[512], shown[512];
    if (stored->iteration != iteration)
        errors_add(a->errors, EXIT_CHECKPOINT,
                   "%s: error: holds iteration %" PRId64 ", its directory says %" PRId64, a->path,
                   stored->iteration, iteration);
    if (options->finetune || options->model_only)
        return; /* weights do not depend on layout or streams */
    io_layout_text(topo, now, sizeof now);
    if (strcmp(layout, now))
        log_line(
            "%s was written by the layout '%s', this run has '%s': its numbers go on up to the "
            "order of sums",
            a->path, printable(shown, sizeof shown, layout), now);
    const char *const word[2] = { "training", "validation" };
    int64_t then[2] = { stored->n_train_streams, stored->n_valid_streams },
            here[2] = { state->n_train_streams, state->n_valid_streams };
    for (int i = 0; i < 2; i++) {
        if (then[i] == here[i] || (i == 1 && (then[i] == 0 || here[i] == 0)))
            continue; /* validation switched on or off */
        errors_add(a->errors, EXIT_CHECKPOINT,
                   "%s: error: has positions of %" PRId64 " %s streams, this run reads %" PRId64
                   " (data.data_streams): the order of samples cannot be continued",
                   a->path, then[i], word[i], here[i]);
    }
}

/* ---- load ---------------------------------------------------------------------------------- */

hid_t io_open_checkpoint(const char *path, int64_t *version, struct errors *errors)
{
    char format[64] = "", why[1200];
    int64_t found = 0, complete = 0;
    const char *not_regular = io_why_not_regular(path);
    if (not_regular[0]) {
        errors_add(errors, EXIT_CHECKPOINT, "%s: error: %s", path, not_regular);
        return -1;
    }
    hid_t file = io_open(path, false);
    if (file < 0) {
        errors_add(errors, EXIT_CHECKPOINT, "%s: error: cannot open: %s", path,
                   io_reason(why, sizeof why));
        return -1;
    }
    if (!io_get_attr_string(file, "format", format, sizeof format) ||
        strcmp(format, "mimo-checkpoint"))
        errors_add(errors, EXIT_CHECKPOINT, "%s: error: is no checkpoint of mimo", path);
    else if ((!io_get_attr_i64(file, "format_version", &found) || found != IO_CHECKPOINT_VERSION) &&
             !version)
        errors_add(errors, EXIT_CHECKPOINT,
                   "%s: error: has format version %" PRId64 ", this program reads %d", path, found,
                   IO_CHECKPOINT_VERSION);
    else if (!io_get_attr_i64(file, "complete", &complete) || complete != 1)
        errors_add(errors, EXIT_CHECKPOINT,
                   "%s: error: is incomplete: its writer was killed before it was done", path);
    else {
        if (version)
            *version = found;
        return file;
    }
    H5Fclose(file);
    return -1;
}

void io_audit_tensors(const char *path, hid_t file, const struct io_tensors *want,
                      bool with_optimizer, struct errors *errors)
{
    struct audit a = { path, file, want, NULL, with_optimizer, errors };
    audit_tensors(&a);
    audit_manifest(&a);
}

/* Rank 0: everything that can be wrong but the numbers of the tensors. */
static void audit_file(struct audit *a, const struct deck *deck, const struct topology *topo,
                       const struct train_state *state, int64_t iteration,
                       const struct checkpoint_options *options, struct train_state *stored)
{
    char layout[512] = "";
    a->file = io_open_checkpoint(a->path, NULL, a->errors);
    if (a->file < 0)
        return;
    audit_deck(a, deck, !options->finetune && !options->model_only);
    if (a->errors->count == 0) { /* another model: its tensors need no line each */
        if (io_state_get(a->file, stored, layout, sizeof layout))
            audit_state(a, stored, layout, topo, state, iteration, options);
        else
            errors_add(a->errors, EXIT_CHECKPOINT, "%s: error: /state is missing or damaged",
                       a->path);
        io_audit_tensors(a->path, a->file, a->want, a->with_optimizer, a->errors);
    }
    H5Fclose(a->file);
    a->file = -1;
}

static void take_state(const struct train_state *stored, struct train_state *state,
                       const struct checkpoint_options *options)
{
    if (options->finetune)
        return;
    state->iteration = stored->iteration;
    if (options->model_only)
        return;
    state->consumed_train_samples = stored->consumed_train_samples;
    state->consumed_valid_samples = stored->consumed_valid_samples;
    state->skipped_train_samples = stored->skipped_train_samples;
    ASSERT(stored->train_position && stored->valid_position);
    if (state->n_train_streams == stored->n_train_streams && state->n_train_streams)
        memcpy(state->train_position, stored->train_position,
               (size_t)state->n_train_streams * sizeof(int64_t));
    if (state->n_valid_streams == stored->n_valid_streams && state->n_valid_streams)
        memcpy(state->valid_position, stored->valid_position,
               (size_t)state->n_valid_streams * sizeof(int64_t));
    if (options->no_optimizer)
        return; /* the schedule goes with the optimizer: training.md 4.5 */
    state->lr = stored->lr;
    state->optim_step = stored->optim_step;
}

static void share_state(struct train_state *s, const struct topology *topo)
{
    int64_t *const train = s->train_position, *const valid = s->valid_position;
    comm_host_broadcast(topo->world, s, sizeof *s, 0);
    s->train_position = topo->rank ? xcalloc((size_t)s->n_train_streams + 1, sizeof *train) : train;
    s->valid_position = topo->rank ? xcalloc((size_t)s->n_valid_streams + 1, sizeof *valid) : valid;
    comm_host_broadcast(topo->world, s->train_position, (size_t)s->n_train_streams * sizeof *train,
                        0);
    comm_host_broadcast(topo->world, s->valid_position, (size_t)s->n_valid_streams * sizeof *valid,
                        0);
}

void checkpoint_load(const char *load, int64_t iteration, const struct deck *deck,
                     const struct topology *topo, struct model *model, struct train_state *state,
                     const struct checkpoint_options *options, bool *has_optimizer,
                     struct errors *errors)
{
    io_start();
    char directory[IO_PATH], path[IO_PATH + 32], why[1200];
    struct train_state stored = { 0 };
    struct io_tensors want;
    int64_t with_optimizer = !(options->model_only || options->no_optimizer || options->finetune),
            asked = with_optimizer;
    io_iteration_directory(directory, sizeof directory, load, iteration);
    snprintf(path, sizeof path, "%s/checkpoint.h5", directory);
    *has_optimizer = false;
    if (with_optimizer && topo->rank == 0) { /* saved with no_save_optim: there is none to miss */
        hid_t file = io_open(path, false);
        if (file >= 0) {
            io_get_attr_i64(file, "optimizer", &with_optimizer);
            H5Fclose(file);
        }
    }
    comm_host_broadcast(topo->world, &with_optimizer, sizeof with_optimizer, 0);
    if (asked && !with_optimizer && topo->rank == 0)
        log_warn("%s was saved without its optimizer: moments start at zero", path);
    io_tensors_init(&want, topo, model, with_optimizer != 0);
    if (topo->rank == 0) {
        struct audit a = { path, -1, &want, NULL, with_optimizer != 0, errors };
        audit_file(&a, deck, topo, state, iteration, options, &stored);
    }
    if (comm_host_collect_errors(topo->world, errors) == 0) {
        struct io_manifest m = { 0 };
        hid_t file = io_open(path, false);
        if (file < 0)
            errors_add(errors, EXIT_CHECKPOINT, "%s: error: cannot open: %s", path,
                       io_reason(why, sizeof why));
        else if (io_manifest_get(path, file, &m, errors))
            io_tensors_read(path, file, &m, topo, model, with_optimizer != 0, errors);
        if (file >= 0)
            H5Fclose(file);
        io_manifest_free(&m);
        if (comm_host_collect_errors(topo->world, errors) == 0) {
            share_state(&stored, topo);
            take_state(&stored, state, options);
            *has_optimizer = with_optimizer != 0;
        }
    }
    free(stored.train_position);
    free(stored.valid_position);
    io_tensors_free(&want);
}
