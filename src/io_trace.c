/* io_trace.c - trace.h5: one row per iteration, laid out once, overwritten in place.
 *
 * World rank 0 lays the whole file out under a temporary name (contiguous datasets, space reserved
 * early, never filled, no object times, synced), copies the rows that are kept, and renames it;
 * then every rank opens it through MPI-IO and overwrites its own elements by independent transfers,
 * /rows last. Metadata never changes again, so a kill at any moment hurts no valid row and a reader
 * may look at any time (h5py: locking=False). The file is sparse until written. When a resumed run
 * finds its own layout and deck in place, only /rows and /eval/rows are set back. The rank
 * dimension is the largest number of ranks that ever wrote this trace; ranks that a row did not
 * have hold NaN or -1.
 */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "io_internal.h"
#include "log.h"

enum kind { KIND_I64, KIND_F64, KIND_F32, KIND_I8 };

struct field {
    const char *path;
    enum kind kind;
    size_t offset; /* in struct trace_row */
    bool per_rank; /* [row, rank], else [row] */
    const char *units, *description;
};

#define ROW(member) offsetof(struct trace_row, member)
#define SECTION(s) (offsetof(struct trace_row, section_seconds) + (s) * sizeof(float))
static const struct field fields[] = {
    { "/iteration", KIND_I64, ROW(iteration), false, "iterations",
      "completed iterations, counted from 1" },
    { "/consumed_samples", KIND_I64, ROW(consumed_samples), false, "samples",
      "training samples consumed up to and with this iteration" },
    { "/lm_loss", KIND_F64, ROW(lm_loss), false, "nat/token",
      "mean cross entropy over the loss tokens of the global batch" },
    { "/grad_norm", KIND_F64, ROW(grad_norm), false, "1",
      "global gradient norm over both modules before clipping" },
    { "/learning_rate", KIND_F64, ROW(learning_rate), false, "1",
      "learning rate used by this iteration" },
    { "/weight_decay", KIND_F64, ROW(weight_decay), false, "1",
      "weight decay used by this iteration" },
    { "/num_tokens", KIND_I64, ROW(num_tokens), false, "tokens",
      "loss tokens of the global batch" },
    { "/seq_load_balancing_loss", KIND_F64, ROW(seq_load_balancing_loss), false, "1",
      "sequence auxiliary loss over its coefficient, mean over MoE layers" },
    { "/skipped", KIND_I8, ROW(skipped), false, "1", "1 when the update was skipped" },
    { "/num_zeros", KIND_I64, ROW(num_zeros), false, "elements",
      "zeros in the gradient; -1 = not counted" },
    { "/params_norm", KIND_F64, ROW(params_norm), false, "1",
      "norm of all parameters; NaN = not computed" },
    { "/iteration_seconds", KIND_F64, ROW(iteration_seconds), false, "s",
      "wall time of the iteration" },
    { "/tokens_per_second", KIND_F64, ROW(tokens_per_second), false, "tokens/s",
      "tokens of the global batch over the wall time" },
    { "/tflops_per_gpu", KIND_F64, ROW(tflops_per_gpu), false, "TFLOP/s",
      "language grid, Megatron-compatible count, per device of that grid" },
    { "/model_tflops_per_gpu", KIND_F64, ROW(model_tflops_per_gpu), false, "TFLOP/s",
      "all modules, exact count, per device of the job" },
    { "/language_tflops_per_gpu", KIND_F64, ROW(language_tflops_per_gpu), false, "TFLOP/s",
      "language grid, exact count, per device of that grid" },
    { "/images", KIND_I64, ROW(images), false, "pictures", "pictures of the global batch" },
    { "/patches", KIND_I64, ROW(patches), false, "patches", "patches of the global batch" },
    { "/ranks/forward_seconds", KIND_F32, SECTION(TRACE_FORWARD), true, "s", "forward passes" },
    { "/ranks/backward_seconds", KIND_F32, SECTION(TRACE_BACKWARD), true, "s", "backward passes" },
    { "/ranks/bridge_wait_seconds", KIND_F32, SECTION(TRACE_BRIDGE_WAIT), true, "s",
      "waiting for the other grid" },
    { "/ranks/grad_sync_seconds", KIND_F32, SECTION(TRACE_GRAD_SYNC), true, "s",
      "summing gradients over data-parallel ranks" },
    { "/ranks/optimizer_seconds", KIND_F32, SECTION(TRACE_OPTIMIZER), true, "s",
      "norm, clipping and update" },
    { "/ranks/data_wait_seconds", KIND_F32, SECTION(TRACE_DATA_WAIT), true, "s",
      "waiting for samples" },
    { "/ranks/agreement_seconds", KIND_F32, SECTION(TRACE_AGREEMENT), true, "s",
      "of grad_sync and optimizer: waiting for all ranks of both grids before the update" },
    { "/ranks/peak_bytes", KIND_I64, ROW(peak_bytes), true, "B",
      "most memory of the rank's process on the host so far" },
    { "/ranks/device_peak_bytes", KIND_I64, ROW(device_peak_bytes), true, "B",
      "most bytes in use on the rank's device so far, by whatever program; -1 = it has none" },
    { "/ranks/gemm_flops", KIND_I64, ROW(gemm_flops), true, "FLOP",
      "floating-point operations in matrix products" },
    { "/ranks/sent_bytes", KIND_I64, ROW(sent_bytes), true, "B", "bytes sent to other ranks" },
};
enum { N_FIELDS = sizeof fields / sizeof fields[0] };

static const char experts_path[] = "/moe/tokens_per_expert", arena_path[] = "/ranks/arena_bytes";
static const char *const eval_paths[3] = { "/eval/iteration", "/eval/lm_loss",
                                           "/eval/lm_loss_ablated" };

struct trace {
    char path[IO_PATH];
    const struct topology *topo;
    hid_t file, set[N_FIELDS], experts, rows, eval_rows, eval[3];
    int64_t n_rows, n_eval, width, n_moe, n_experts;
    int64_t eval_count;     /* rank 0: valid validation rows */
    int64_t eval_iteration; /* of the last of them */
};

static hid_t type_of(enum kind kind) /* file and memory alike on a little-endian machine */
{
    if (kind == KIND_F64)
        return H5T_IEEE_F64LE;
    if (kind == KIND_F32)
        return H5T_IEEE_F32LE;
    return kind == KIND_I64 ? H5T_STD_I64LE : H5T_STD_I8LE;
}

static size_t bytes_of(enum kind kind)
{
    return kind == KIND_I8 ? 1 : kind == KIND_F32 ? 4 : 8;
}

/* "Not known": NaN or -1 in every element. */
static void set_unknown(enum kind kind, void *data, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (kind == KIND_F64)
            ((double *)data)[i] = NAN;
        else if (kind == KIND_F32)
            ((float *)data)[i] = NAN;
        else if (kind == KIND_I64)
            ((int64_t *)data)[i] = -1;
        else
            ((int8_t *)data)[i] = -1;
}

/* ---- layout, by rank 0 --------------------------------------------------------------------- */

static void lay_out(const struct trace *t, const char *path, const struct deck *deck)
{
    hid_t file = io_create(path, false), group;
    int64_t shape[3] = { t->n_rows, t->n_moe, t->n_experts }, zero = 0;
    io_put_header(path, file, "mimo-trace", IO_TRACE_VERSION, deck);
    io_put(path, file, "rows", H5T_STD_I64LE, 0, NULL, &zero, "rows",
           "valid rows of every dataset whose first dimension is the iteration");
    H5Gclose(io_group(path, file, "moe"));
    io_put(path, file, experts_path, H5T_STD_I64LE, 3, shape, NULL, "tokens",
           "tokens that the global batch sent to each expert: [iteration, MoE layer, expert]");
    group = io_group(path, file, "ranks");
    io_attr_i64(path, group, "ranks", t->topo->size);
    io_attr_i64(path, group, "encoder_offset",
                t->topo->encoder.present ? t->topo->encoder.offset : -1);
    io_attr_i64(path, group, "encoder_size", t->topo->encoder.present ? t->topo->encoder.size : 0);
    io_attr_i64(path, group, "language_offset",
                t->topo->language.present ? t->topo->language.offset : -1);
    io_attr_i64(path, group, "language_size",
                t->topo->language.present ? t->topo->language.size : 0);
    H5Gclose(group);
    shape[1] = t->width;
    for (int i = 0; i < N_FIELDS; i++)
        io_put(path, file, fields[i].path, type_of(fields[i].kind), fields[i].per_rank ? 2 : 1,
               shape, NULL, fields[i].units, fields[i].description);
    int64_t arenas[2] = { t->width, ARENA_COUNT };
    int64_t *unknown = xmalloc((size_t)(t->width * ARENA_COUNT), sizeof *unknown);
    set_unknown(KIND_I64, unknown, t->width * ARENA_COUNT);
    io_put(path, file, arena_path, H5T_STD_I64LE, 2, arenas, unknown, "B",
           "size of each memory arena: [rank, arena]");
    free(unknown);
    hid_t set = IO_WRITE(path, arena_path, H5Dopen2(file, arena_path, H5P_DEFAULT));
    io_attr_strings(path, set, "arenas", ARENA_COUNT, arena_names);
    H5Dclose(set);
    group = io_group(path, file, "eval");
    io_put(path, group, "rows", H5T_STD_I64LE, 0, NULL, &zero, "rows", "valid validation rows");
    H5Gclose(group);
    shape[0] = t->n_eval;
    io_put(path, file, eval_paths[0], H5T_STD_I64LE, 1, shape, NULL, "iterations",
           "completed iterations at this validation");
    io_put(path, file, eval_paths[1], H5T_IEEE_F64LE, 1, shape, NULL, "nat/token",
           "validation loss");
    io_put(path, file, eval_paths[2], H5T_IEEE_F64LE, 1, shape, NULL, "nat/token",
           "validation loss with other or zeroed pictures; NaN = not asked");
    IO_WRITE(path, "metadata", H5Fflush(file, H5F_SCOPE_GLOBAL));
    IO_WRITE(path, "metadata", H5Fclose(file));
}

/* Rows [0, keep) of a dataset from the old to the new file; what the old one does not have becomes
 * unknown. `ndim` > 1: further dimensions may differ, the common part is copied. */
static void copy_rows(const char *path, hid_t from, hid_t to, const char *name, enum kind kind,
                      int64_t keep)
{
    int64_t old[TENSOR_MAX_DIMS] = { 0 }, new[TENSOR_MAX_DIMS] = { 0 },
            start[TENSOR_MAX_DIMS] = { 0 };
    int64_t common[TENSOR_MAX_DIMS], whole[TENSOR_MAX_DIMS];
    int ndim = io_get_shape(to, name, new),
        old_ndim = from < 0 ? -1 : io_get_shape(from, name, old);
    hid_t target = IO_WRITE(path, name, H5Dopen2(to, name, H5P_DEFAULT)), source = -1;
    if (old_ndim == ndim)
        source = H5Dopen2(from, name, H5P_DEFAULT);
    int64_t row = io_volume(ndim - 1, new + 1), step = row ? 1 + (1 << 20) / row : 1;
    char *buf = xmalloc((size_t)(step * (row ? row : 1)), bytes_of(kind));
    for (int64_t r = 0; r < keep && row > 0; r += step) {
        memcpy(whole, new, sizeof whole);
        whole[0] = keep - r < step ? keep - r : step;
        start[0] = r;
        set_unknown(kind, buf, whole[0] * row);
        io_write_box(path, name, target, type_of(kind), ndim, start, whole, buf);
        bool some = source >= 0;
        for (int i = 0; i < ndim; i++) {
            common[i] = i == 0            ? (old[0] - r < whole[0] ? old[0] - r : whole[0])
                        : old[i] < new[i] ? old[i]
                                          : new[i];
            some = some && common[i] > 0;
        }
        if (!some || !io_get_box(source, type_of(kind), ndim, start, common, buf))
            continue;
        io_write_box(path, name, target, type_of(kind), ndim, start, common, buf);
    }
    free(buf);
    if (source >= 0)
        H5Dclose(source);
    H5Dclose(target);
}

static void put_count(const char *path, hid_t file, const char *name, int64_t value)
{
    hid_t set = IO_WRITE(path, name, H5Dopen2(file, name, H5P_DEFAULT));
    IO_WRITE(path, name, H5Dwrite(set, H5T_STD_I64LE, H5S_ALL, H5S_ALL, H5P_DEFAULT, &value));
    H5Dclose(set);
}

/* What an existing trace holds, as far as a continuing run asks. */
struct old_trace {
    int64_t rows, n_rows, width, n_eval, eval_rows;
    bool same;
};

static hid_t open_old(struct trace *t, const struct deck *deck, struct old_trace *old)
{
    char format[64] = "", why[1200];
    const char *not_regular = io_why_not_regular(t->path);
    if (not_regular[0]) {
        if (access(t->path, F_OK) != 0 && errno == ENOENT)
            return -1;
        FATAL(EXIT_WRITE, "%s: cannot continue this trace: it %s", t->path, not_regular);
    }
    hid_t file = io_open(t->path, false);
    if (file < 0)
        fatal(EXIT_WRITE, __FILE__, __LINE__, "move the file away to start a new trace",
              "%s: cannot continue this trace: %s", t->path, io_reason(why, sizeof why));
    int64_t shape[TENSOR_MAX_DIMS], version = 0;
    bool ok = io_get_attr_string(file, "format", format, sizeof format) &&
              strcmp(format, "mimo-trace") == 0 &&
              io_get_attr_i64(file, "format_version", &version) && version == IO_TRACE_VERSION &&
              io_get(file, "/rows", H5T_NATIVE_INT64, 1, &old->rows) &&
              io_get(file, "/eval/rows", H5T_NATIVE_INT64, 1, &old->eval_rows);
    ok = ok && io_get_shape(file, "/iteration", shape) == 1;
    if (ok)
        old->n_rows = shape[0];
    ok = ok && io_get_shape(file, arena_path, shape) == 2;
    if (ok)
        old->width = shape[0];
    ok = ok && io_get_shape(file, eval_paths[0], shape) == 1;
    if (ok)
        old->n_eval = shape[0];
    ok = ok && old->rows >= 0 && old->rows <= old->n_rows && old->eval_rows >= 0 &&
         old->eval_rows <= old->n_eval && old->width > 0;
    if (!ok)
        fatal(EXIT_WRITE, __FILE__, __LINE__, "move the file away to start a new trace",
              "%s: cannot continue this trace: it is no complete trace of format version %d",
              t->path, IO_TRACE_VERSION);

    int64_t value = 0;
    hid_t ranks = H5Gopen2(file, "/ranks", H5P_DEFAULT);
    bool same = ranks >= 0 && io_get_shape(file, experts_path, shape) == 3 &&
                shape[1] == t->n_moe && shape[2] == t->n_experts && old->n_rows == t->n_rows &&
                old->width == t->topo->size && old->n_eval == t->n_eval;
    for (int i = 0; i < N_FIELDS; i++) /* an older program did not write all of them */
        same = same && io_get_shape(file, fields[i].path, shape) > 0;
    same = same && io_get_attr_i64(ranks, "encoder_size", &value) &&
           value == (t->topo->encoder.present ? t->topo->encoder.size : 0);
    same = same && io_get_attr_i64(ranks, "language_offset", &value) &&
           value == (t->topo->language.present ? t->topo->language.offset : -1);
    if (ranks >= 0)
        H5Gclose(ranks);
    char *now = io_deck_text(deck), *then = xcalloc(strlen(now) + 2, 1);
    same =
        same && io_get_string(file, "/deck/text", then, strlen(now) + 2) && strcmp(now, then) == 0;
    free(now);
    free(then);
    old->same = same;
    return file;
}

/* Validation rows up to the iteration of the last kept row stay. */
static void keep_eval(struct trace *t, hid_t file, const struct old_trace *old, int64_t start_row)
{
    int64_t n = old->eval_rows, start[1] = { 0 }, one[1] = { n }, last = 0;
    t->eval_count = 0;
    t->eval_iteration = -1;
    if (start_row == 0 || n == 0)
        return;
    hid_t iteration = H5Dopen2(file, "/iteration", H5P_DEFAULT),
          eval = H5Dopen2(file, eval_paths[0], H5P_DEFAULT);
    int64_t *at = xcalloc((size_t)n, sizeof *at);
    bool ok = io_get_box(eval, H5T_NATIVE_INT64, 1, start, one, at);
    start[0] = (start_row <= old->rows ? start_row : old->rows) - 1;
    one[0] = 1;
    ok = ok && start[0] >= 0 && io_get_box(iteration, H5T_NATIVE_INT64, 1, start, one, &last);
    while (ok && t->eval_count < n && t->eval_count < t->n_eval && at[t->eval_count] <= last)
        t->eval_iteration = at[t->eval_count++];
    free(at);
    H5Dclose(iteration);
    H5Dclose(eval);
}

/* Rank 0: leave a complete file at t->path with start_row valid rows. */
static void prepare(struct trace *t, const struct deck *deck, int64_t start_row)
{
    struct old_trace old = { 0 };
    hid_t from = start_row > 0 ? open_old(t, deck, &old) : -1;
    if (from >= 0) {
        if (old.width > t->width)
            t->width = old.width;
        keep_eval(t, from, &old, start_row);
    }
    if (start_row > old.rows)
        log_warn("%s has %lld of the %lld rows before this start; the others are marked unknown",
                 t->path, (long long)old.rows, (long long)start_row);
    if (from >= 0 && old.same && start_row <= old.rows) {
        H5Fclose(from);
        hid_t file = IO_WRITE(t->path, "the existing trace", io_open(t->path, true));
        put_count(t->path, file, "/rows", start_row);
        put_count(t->path, file, "/eval/rows", t->eval_count);
        IO_WRITE(t->path, "metadata", H5Fclose(file));
        io_sync(t->path);
        return;
    }
    char temporary[IO_PATH + 8];
    snprintf(temporary, sizeof temporary, "%s.tmp", t->path);
    lay_out(t, temporary, deck);
    hid_t to = IO_WRITE(temporary, "the new trace", io_open(temporary, true));
    if (start_row > 0) {
        for (int i = 0; i < N_FIELDS; i++)
            copy_rows(temporary, from, to, fields[i].path, fields[i].kind, start_row);
        copy_rows(temporary, from, to, experts_path, KIND_I64, start_row);
        for (int i = 0; i < 3; i++)
            copy_rows(temporary, from, to, eval_paths[i], i ? KIND_F64 : KIND_I64, t->eval_count);
        copy_rows(temporary, from, to, arena_path, KIND_I64, t->width);
    }
    put_count(temporary, to, "/rows", start_row);
    put_count(temporary, to, "/eval/rows", t->eval_count);
    IO_WRITE(temporary, "metadata", H5Fclose(to));
    if (from >= 0)
        H5Fclose(from);
    io_sync(temporary);
    CHECK_SYS(rename(temporary, t->path) == 0, EXIT_WRITE, "%s: cannot rename to %s", temporary,
              t->path);
}

/* ---- writing ------------------------------------------------------------------------------- */

static hid_t open_dataset(const struct trace *t, const char *name)
{
    return IO_WRITE(t->path, name, H5Dopen2(t->file, name, H5P_DEFAULT));
}

struct trace *trace_open(const char *path, const struct deck *deck, const struct topology *topo,
                         int n_moe, int64_t n_rows, int64_t start_row, int64_t n_eval,
                         const int64_t *arena_bytes)
{
    io_start();
    ASSERT(n_rows >= 0 && start_row >= 0 && start_row <= n_rows && n_eval >= 0);
    struct trace *t = xcalloc(1, sizeof *t);
    int n = snprintf(t->path, sizeof t->path, "%s", path);
    if (n < 0 || n >= (int)sizeof t->path)
        FATAL(EXIT_WRITE, "name of the trace is too long (%d bytes)", n);
    t->topo = topo;
    t->n_rows = n_rows;
    t->n_eval = n_eval;
    t->width = topo->size;
    t->n_moe = n_moe;
    t->n_experts = n_moe ? deck->moe.num_experts : 0;
    int64_t layers = 0; /* rank 0, which lays out, may hold no language model: n_moe is the job's,
                           not the rank's */
    for (const char *c = deck->derived.pattern; *c; c++)
        layers += *c == 'E';
    ASSERT(t->n_moe == layers);
    t->eval_iteration = -1;
    if (topo->rank == 0)
        prepare(t, deck, start_row);
    comm_host_broadcast(topo->world, &t->width, sizeof t->width, 0);

    t->file = io_open_parallel(t->path, topo->world);
    for (int i = 0; i < N_FIELDS; i++)
        t->set[i] = open_dataset(t, fields[i].path);
    t->experts = open_dataset(t, experts_path);
    t->rows = open_dataset(t, "/rows");
    t->eval_rows = open_dataset(t, "/eval/rows");
    for (int i = 0; i < 3; i++)
        t->eval[i] = open_dataset(t, eval_paths[i]);
    hid_t arenas = open_dataset(t, arena_path);
    io_write_box(t->path, arena_path, arenas, H5T_STD_I64LE, 2, (int64_t[2]){ topo->rank, 0 },
                 (int64_t[2]){ 1, ARENA_COUNT }, arena_bytes);
    H5Dclose(arenas);
    return t;
}

void trace_write(struct trace *t, int64_t row, const struct trace_row *values)
{
    ASSERT(row >= 0 && row < t->n_rows);
    int rank = t->topo->rank;
    for (int i = 0; i < N_FIELDS; i++) {
        const struct field *f = &fields[i];
        if (!f->per_rank && rank)
            continue;
        io_write_box(t->path, f->path, t->set[i], type_of(f->kind), f->per_rank ? 2 : 1,
                     (int64_t[2]){ row, rank }, (int64_t[2]){ 1, 1 },
                     (const char *)values + f->offset);
        if (rank || !f->per_rank || t->width == t->topo->size)
            continue;
        int64_t absent = t->width - t->topo->size; /* columns of a larger earlier job */
        char *unknown = xmalloc((size_t)absent, 8);
        set_unknown(f->kind, unknown, absent);
        io_write_box(t->path, f->path, t->set[i], type_of(f->kind), 2,
                     (int64_t[2]){ row, t->topo->size }, (int64_t[2]){ 1, absent }, unknown);
        free(unknown);
    }
    /* A row is valid when every rank has written its columns: one that is killed before it has must
     * not leave a valid row without. */
    comm_host_barrier(t->topo->world);
    if (rank)
        return;
    if (t->n_moe > 0 && values->tokens_per_expert)
        io_write_box(t->path, experts_path, t->experts, H5T_STD_I64LE, 3, (int64_t[3]){ row, 0, 0 },
                     (int64_t[3]){ 1, t->n_moe, t->n_experts }, values->tokens_per_expert);
    int64_t rows = row + 1;
    io_write_box(t->path, "/rows", t->rows, H5T_STD_I64LE, 0, NULL, NULL, &rows);
}

void trace_write_eval(struct trace *t, int64_t iteration, double lm_loss, double lm_loss_ablated)
{
    if (t->topo->rank)
        return;
    int64_t row = t->eval_count > 0 && t->eval_iteration == iteration ? t->eval_count - 1
                                                                      : t->eval_count,
            one[1] = { 1 };
    if (row >= t->n_eval)
        FATAL(EXIT_INTERNAL, "%s: a validation more than the %lld that were laid out", t->path,
              (long long)t->n_eval);
    const void *value[3] = { &iteration, &lm_loss, &lm_loss_ablated };
    for (int i = 0; i < 3; i++)
        io_write_box(t->path, eval_paths[i], t->eval[i], i ? H5T_IEEE_F64LE : H5T_STD_I64LE, 1,
                     &row, one, value[i]);
    t->eval_count = row + 1;
    t->eval_iteration = iteration;
    io_write_box(t->path, "/eval/rows", t->eval_rows, H5T_STD_I64LE, 0, NULL, NULL, &t->eval_count);
}

void trace_sync(const struct trace *t)
{
    io_sync(t->path);
    if (t->topo->rank)
        return;
    char directory[IO_PATH];
    snprintf(directory, sizeof directory, "%s", t->path);
    char *slash = strrchr(directory, '/');
    if (slash)
        *slash = '\0';
    io_sync(slash ? directory : ".");
}

void trace_close(struct trace *t)
{
    if (!t)
        return;
    for (int i = 0; i < N_FIELDS; i++)
        H5Dclose(t->set[i]);
    for (int i = 0; i < 3; i++)
        H5Dclose(t->eval[i]);
    H5Dclose(t->experts);
    H5Dclose(t->rows);
    H5Dclose(t->eval_rows);
    IO_WRITE(t->path, "metadata", H5Fflush(t->file, H5F_SCOPE_GLOBAL));
    io_close_parallel(t->path, t->file);
    free(t);
}
