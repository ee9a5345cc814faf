/* io_inspect.c - mimo --inspect FILE: what a checkpoint, trace or batch file holds, for a person;
 * the whole of a checkpoint is verified.
 *
 * Serial, without MPI, read-only. The file is not trusted; texts from it are made printable.
 * Anything that is not a complete file of ours is one error line and EXIT_CHECKPOINT.
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include "io_tensors.h"

struct view {
    const char *path;
    hid_t file;
    FILE *out;
    struct errors errors;
};

/* ---- groups that every file has ------------------------------------------------------------ */

static herr_t print_attribute(hid_t group, const char *name, const H5A_info_t *info, void *ctx)
{
    struct view *v = ctx;
    char value[1024], key[256], shown[1200];
    if (!io_get_attr_string(group, name, value, sizeof value))
        return 0;
    fprintf(v->out, "  %-24s %s\n", printable(key, sizeof key, name),
            printable(shown, sizeof shown, value));
    return 0;
}

static void print_code(struct view *v)
{
    hid_t group = H5Gopen2(v->file, "/code", H5P_DEFAULT);
    fprintf(v->out, "\nwritten by\n");
    if (group < 0 || H5Aiterate2(group, H5_INDEX_NAME, H5_ITER_INC, NULL, print_attribute, v) < 0)
        errors_add(&v->errors, EXIT_CHECKPOINT, "%s: error: /code is missing or damaged", v->path);
    if (group >= 0)
        H5Gclose(group);
}

/* Keys of the deck that are no defaults, as overrides that can be pasted behind a command. */
static void print_deck(struct view *v)
{
    size_t size = (size_t)1 << 20;
    char *text = xcalloc(size, 1), shown[2048], group[64] = "";
    if (io_get_string(v->file, "/deck/text", text, size)) {
        fprintf(v->out, "\ndeck, without defaults (dataset /deck/text has all of it)\n");
        for (char *next = NULL, *line = strtok_r(text, "\n", &next); line;
             line = strtok_r(NULL, "\n", &next)) {
            const char *origin = strrchr(line, '!');
            while (*line == ' ')
                line++;
            if (*line == '&')
                snprintf(group, sizeof group, "%.*s", (int)strcspn(line + 1, " "), line + 1);
            if (*line == '!' || !strchr(line, '=') || (origin && strstr(origin, "default")))
                continue;
            fprintf(v->out, "  %s.%s\n", group, printable(shown, sizeof shown, line));
        }
    } else
        errors_add(&v->errors, EXIT_CHECKPOINT, "%s: error: /deck is missing or damaged", v->path);
    free(text);
}

static void human(char *out, size_t size, double n)
{
    static const char *const unit[] = { "", " K", " M", " G", " T" };
    int u = 0;
    for (; n >= 10000 && u < 4; u++)
        n /= 1000;
    snprintf(out, size, u ? "%.1f%s" : "%.0f%s", n, unit[u]);
}

/* ---- checkpoint ---------------------------------------------------------------------------- */

/* One tensor: its line in the table, and its blocks [first, last) of the manifest verified. */
static void inspect_tensor(struct view *v, const struct io_manifest *m, int64_t index,
                           int64_t first, int64_t last, double *total)
{
    const char *name = m->path[index];
    char shape_text[128] = "", shown[IO_TENSOR_PATH];
    int64_t vocab = 0, volume = 0;
    struct io_stored s;
    int n = 0;
    if (!io_stored_open(&s, v->path, v->file, name, &v->errors))
        return;
    for (int i = 0; i < s.ndim; i++)
        n += snprintf(shape_text + n, sizeof shape_text - (size_t)n, "%s%" PRId64, i ? " x " : "",
                      s.shape[i]);
    *total += (double)io_volume(s.ndim, s.shape);
    if (strncmp(name, "/model/", 7) == 0) {
        fprintf(v->out, "  %-64s %-9s %s", printable(shown, sizeof shown, name + 7),
                io_type_name(s.dtype), shape_text);
        if (io_get_attr_i64(s.set, "vocab_size", &vocab))
            fprintf(v->out, "  (vocabulary %" PRId64 ")", vocab);
        fputc('\n', v->out);
    }
    for (int64_t k = first; k < last; k++) {
        if (io_stored_verify(&s, &m->block[k], &v->errors))
            volume += io_volume(s.ndim, m->block[k].count);
    }
    if (volume != io_volume(s.ndim, s.shape) && v->errors.count == 0)
        errors_add(&v->errors, EXIT_CHECKPOINT,
                   "%s: error: %s: /manifest does not vouch for all of it", v->path, name);
    H5Dclose(s.set);
}

static herr_t visit_object(hid_t file, const char *name, const H5O_info_t *info, void *ctx)
{
    return 0;
}

static void inspect_checkpoint(struct view *v)
{
    struct io_manifest m;
    int64_t complete = 0, optimizer = 0;
    double elements = 0, model = 0;
    char text[512], shown[600];
    if (!io_get_attr_i64(v->file, "complete", &complete) || complete != 1) {
        errors_add(&v->errors, EXIT_CHECKPOINT,
                   "%s: error: is incomplete: its writer was killed before it was done", v->path);
        return;
    }
    if (!io_manifest_get(v->path, v->file, &m, &v->errors))
        return;
    if (H5Ovisit2(v->file, H5_INDEX_NAME, H5_ITER_NATIVE, visit_object, NULL, H5O_INFO_ALL) < 0)
        errors_add(&v->errors, EXIT_CHECKPOINT, "%s: error: is damaged: %s", v->path,
                   io_reason(shown, sizeof shown));
    io_get_attr_i64(v->file, "optimizer", &optimizer);
    fprintf(v->out, "\nstate\n");
    struct train_state state;
    if (!io_state_get(v->file, &state, text, sizeof text))
        errors_add(&v->errors, EXIT_CHECKPOINT, "%s: error: /state is missing or damaged", v->path);
    else {
        for (int k = 0; k < io_n_state_fields; k++) {
            const struct io_state_field *f = &io_state_fields[k];
            const char *at = (const char *)&state + f->offset;
            fprintf(v->out, "  %-24s ", f->name);
            if (f->kind == IO_STATE_F64)
                fprintf(v->out, "%-14.9g", *(const double *)at);
            else
                fprintf(v->out, "%-14" PRId64,
                        f->kind == IO_STATE_INT ? *(const int *)at : *(const int64_t *)at);
            fprintf(v->out, " %s\n", f->description);
        }
        fprintf(v->out, "  %-24s %s\n", "layout", printable(shown, sizeof shown, text));
    }
    free(state.train_position);
    free(state.valid_position);
    fprintf(v->out, "  %-24s %s\n", "optimizer", optimizer ? "yes" : "no");
    fprintf(v->out, "\nmodel\n");
    for (int64_t i = 0, first = 0, last; i < m.n_paths; i++, first = last) {
        while (first < m.n_blocks && m.block[first].tensor < i)
            first++;
        for (last = first; last < m.n_blocks && m.block[last].tensor == i;)
            last++;
        inspect_tensor(v, &m, i, first, last,
                       strncmp(m.path[i], "/model/", 7) == 0 ? &model : &elements);
    }
    human(text, sizeof text, model);
    human(shown, sizeof shown, elements);
    fprintf(v->out, "  %s numbers in the model, %s in the optimizer\n", text, shown);
    print_code(v);
    print_deck(v);
    if (v->errors.count == 0)
        fprintf(v->out, "\ncomplete; %" PRId64 " blocks agree with their checksums\n", m.n_blocks);
    io_manifest_free(&m);
}

/* ---- trace, batches ------------------------------------------------------------------------ */

static bool last_value(struct view *v, const char *name, int64_t row, double *out)
{
    hid_t set = H5Dopen2(v->file, name, H5P_DEFAULT);
    if (set < 0)
        return false;
    int64_t one = 1;
    bool ok = io_get_box(set, H5T_NATIVE_DOUBLE, 1, &row, &one, out);
    H5Dclose(set);
    return ok;
}

static void inspect_trace(struct view *v)
{
    static const char *const shown[] = { "/iteration",        "/consumed_samples",
                                         "/lm_loss",          "/grad_norm",
                                         "/learning_rate",    "/iteration_seconds",
                                         "/tokens_per_second" };
    static const char *const eval[] = { "/eval/iteration", "/eval/lm_loss",
                                        "/eval/lm_loss_ablated" };
    int64_t rows = -1, eval_rows = -1, shape[TENSOR_MAX_DIMS] = { 0 },
            experts[TENSOR_MAX_DIMS] = { 0 }, ranks = 0, encoder = 0, language = 0;
    double x;
    bool ok = io_get(v->file, "/rows", H5T_NATIVE_INT64, 1, &rows) &&
              io_get_shape(v->file, "/iteration", shape) == 1 && rows >= 0 && rows <= shape[0] &&
              io_get(v->file, "/eval/rows", H5T_NATIVE_INT64, 1, &eval_rows);
    if (!ok) {
        errors_add(
            &v->errors, EXIT_CHECKPOINT,
            "%s: error: is no complete trace: /rows or /iteration is missing or out of range",
            v->path);
        return;
    }
    fprintf(v->out, "\n  %" PRId64 " of %" PRId64 " rows, %" PRId64 " validations\n", rows,
            shape[0], eval_rows);
    hid_t group = H5Gopen2(v->file, "/ranks", H5P_DEFAULT);
    if (group >= 0 && io_get_attr_i64(group, "ranks", &ranks) &&
        io_get_attr_i64(group, "encoder_size", &encoder) &&
        io_get_attr_i64(group, "language_size", &language))
        fprintf(v->out,
                "  %" PRId64 " ranks: %" PRId64 " in the encoder grid, %" PRId64
                " in the language grid\n",
                ranks, encoder, language);
    if (group >= 0)
        H5Gclose(group);
    if (io_get_shape(v->file, "/moe/tokens_per_expert", experts) == 3)
        fprintf(v->out, "  %" PRId64 " MoE layers of %" PRId64 " experts\n", experts[1],
                experts[2]);
    for (int k = 0; k < 2 && rows > 0; k++) {
        fprintf(v->out, "\n%s row\n", k ? "last" : "first");
        for (size_t i = 0; i < sizeof shown / sizeof shown[0]; i++)
            if (last_value(v, shown[i], k ? rows - 1 : 0, &x))
                fprintf(v->out, "  %-24s %.9g\n", shown[i] + 1, x);
    }
    if (eval_rows > 0)
        fprintf(v->out, "\nlast validation\n");
    for (size_t i = 0; i < 3 && eval_rows > 0; i++)
        if (last_value(v, eval[i], eval_rows - 1, &x))
            fprintf(v->out, "  %-24s %.9g\n", eval[i] + 6, x);
    print_code(v);
    print_deck(v);
}

static herr_t print_batch(hid_t file, const char *name, const H5L_info_t *info, void *ctx)
{
    struct view *v = ctx;
    char ids[300], sizes[300], shown[300];
    int64_t rows[TENSOR_MAX_DIMS], tiles[TENSOR_MAX_DIMS] = { 0 };
    if (info->type != H5L_TYPE_HARD || strncmp(name, "iteration_", 10))
        return 0;
    snprintf(ids, sizeof ids, "/%.250s/input_ids", name);
    snprintf(sizes, sizeof sizes, "/%.250s/imgs_sizes", name);
    if (io_get_shape(v->file, ids, rows) != 2 || io_get_shape(v->file, sizes, tiles) != 2)
        return 0;
    fprintf(v->out, "  %s: %" PRId64 " samples of %" PRId64 " tokens, %" PRId64 " tiles\n",
            printable(shown, sizeof shown, name), rows[0], rows[1], tiles[0]);
    return 0;
}

int io_inspect(const char *path, FILE *out)
{
    io_start();
    struct view v = { .path = path, .file = -1, .out = out };
    char format[64] = "", why[1200], shown[128];
    int64_t version = 0;
    const char *not_regular = io_why_not_regular(path);
    if (not_regular[0])
        errors_add(&v.errors, EXIT_CHECKPOINT, "%s: error: %s", path, not_regular);
    else if ((v.file = io_open(path, false)) < 0)
        errors_add(&v.errors, EXIT_CHECKPOINT, "%s: error: cannot open as HDF5: %s", path,
                   io_reason(why, sizeof why));
    else if (!io_get_attr_string(v.file, "format", format, sizeof format) ||
             strncmp(format, "mimo-", 5))
        errors_add(&v.errors, EXIT_CHECKPOINT, "%s: error: is an HDF5 file, but none of mimo's",
                   path);
    else {
        io_get_attr_i64(v.file, "format_version", &version);
        fprintf(out, "%s: %s, format version %" PRId64 "\n", path,
                printable(shown, sizeof shown, format), version);
        if (strcmp(format, "mimo-checkpoint") == 0 && version == IO_CHECKPOINT_VERSION)
            inspect_checkpoint(&v);
        else if (strcmp(format, "mimo-trace") == 0 && version == IO_TRACE_VERSION)
            inspect_trace(&v);
        else if (strcmp(format, "mimo-batches") == 0 && version == IO_BATCHES_VERSION) {
            H5Literate(v.file, H5_INDEX_NAME, H5_ITER_INC, NULL, print_batch, &v);
            print_code(&v);
        } else
            errors_add(&v.errors, EXIT_CHECKPOINT,
                       "%s: error: this program does not read %s of format version %" PRId64, path,
                       printable(shown, sizeof shown, format), version);
    }
    if (v.file >= 0)
        H5Fclose(v.file);
    fflush(out);
    int status = v.errors.count ? EXIT_CHECKPOINT : EXIT_OK;
    if (status)
        errors_print(&v.errors);
    errors_free(&v.errors);
    return status;
}
