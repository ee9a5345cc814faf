/* io_checkpoint.c - saving a checkpoint so that no kill at any moment leaves less than the previous
 * one; retiring old ones.
 *
 * <save>/.tmp-iter_%07d-<host>-<pid>/checkpoint.h5 is laid out by world rank 0 with its state,
 * filled by every rank with the slabs it owns (independent transfers), synced, closed; rank 0 adds
 * the manifest of checksums and, last, the attribute `complete`; then fsync of file and directory,
 * rename to iter_%07d, fsync of <save>, and only then the tracker (temporary name, rename, fsync).
 * Directories to be deleted get a name that no reader accepts first. robustness.md 4.4. A rank that
 * cannot write ends the job (io_internal.h).
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>
#include "io_tensors.h"
#include "log.h"

enum { MAX_STREAMS = 1 << 26 };

static const char tracker_name[] = "latest_checkpointed_iteration.txt";

/* ---- state --------------------------------------------------------------------------------- */

#define STATE(member) offsetof(struct train_state, member)
const struct io_state_field io_state_fields[] = {
    { "iteration", STATE(iteration), IO_STATE_I64, "completed iterations" },
    { "consumed_train_samples", STATE(consumed_train_samples), IO_STATE_I64,
      "training samples consumed" },
    { "consumed_valid_samples", STATE(consumed_valid_samples), IO_STATE_I64,
      "validation samples consumed" },
    { "skipped_train_samples", STATE(skipped_train_samples), IO_STATE_I64,
      "training samples of skipped updates" },
    { "optimizer_step", STATE(optim_step), IO_STATE_I64, "AdamW's t of the last applied update" },
    { "scheduler/style", STATE(lr.style), IO_STATE_INT,
      "position of the word of lr.lr_decay_style" },
    { "scheduler/wsd_style", STATE(lr.wsd_style), IO_STATE_INT,
      "position of the word of lr.lr_wsd_decay_style" },
    { "scheduler/wd_style", STATE(lr.wd_style), IO_STATE_INT,
      "position of the word of lr.weight_decay_incr_style" },
    { "scheduler/init", STATE(lr.init), IO_STATE_F64, "learning rate at the start of the warm-up" },
    { "scheduler/max", STATE(lr.max), IO_STATE_F64, "largest learning rate" },
    { "scheduler/min", STATE(lr.min), IO_STATE_F64, "smallest learning rate" },
    { "scheduler/warmup", STATE(lr.warmup), IO_STATE_F64, "length of the warm-up in samples" },
    { "scheduler/decay", STATE(lr.decay), IO_STATE_F64, "end of the decay in samples" },
    { "scheduler/anneal", STATE(lr.anneal), IO_STATE_F64, "length of the tail of WSD in samples" },
    { "scheduler/wd_start", STATE(lr.wd_start), IO_STATE_F64, "weight decay at the start" },
    { "scheduler/wd_end", STATE(lr.wd_end), IO_STATE_F64, "weight decay at the end" },
    { "scheduler/wd_steps", STATE(lr.wd_steps), IO_STATE_F64,
      "samples over which weight decay changes" },
    { "scheduler/n", STATE(lr.n), IO_STATE_I64, "samples of successful updates" },
};
const int io_n_state_fields = sizeof io_state_fields / sizeof io_state_fields[0];

void io_layout_text(const struct topology *topo, char *out, size_t size)
{
    static const char *const name[] = { [DECK_LAYOUT_AUTO] = "auto",
                                        [DECK_LAYOUT_DISJOINT] = "disjoint",
                                        [DECK_LAYOUT_COLOCATED] = "colocated",
                                        [DECK_LAYOUT_LANGUAGE_ONLY] = "language_only" };
    ASSERT(topo->layout >= 0 && topo->layout <= DECK_LAYOUT_LANGUAGE_ONLY);
    int n = snprintf(out, size, "%s on %d rank%s", name[topo->layout], topo->size,
                     topo->size == 1 ? "" : "s");
    const struct grid *grid[2] = { &topo->encoder, &topo->language };
    for (int i = 0; i < 2; i++) {
        const struct grid *g = grid[i];
        if (!g->present)
            continue;
        ASSERT(n >= 0 && (size_t)n < size);
        n += snprintf(out + n, size - (size_t)n,
                      ", %s at %d: tp %d cp %d pp %d dp %d ep %d expt_tp %d",
                      i ? "language" : "encoder", g->offset, g->tp_size, g->cp_size, g->pp_size,
                      g->dp_size, g->ep_size, g->expt_tp_size);
    }
    ASSERT(n >= 0 && (size_t)n < size);
}

/* Checksum over all of /state. */
static uint64_t state_hash(const struct train_state *s, const char *layout, int64_t seed)
{
    XXH3_state_t *state = XXH3_createState();
    ASSERT(state != NULL);
    XXH3_64bits_reset(state);
    for (int i = 0; i < io_n_state_fields; i++)
        XXH3_64bits_update(state, (const char *)s + io_state_fields[i].offset,
                           io_state_fields[i].kind == IO_STATE_INT ? sizeof(int) : 8);
    XXH3_64bits_update(state, &s->n_train_streams, 8);
    XXH3_64bits_update(state, s->train_position, (size_t)s->n_train_streams * 8);
    XXH3_64bits_update(state, &s->n_valid_streams, 8);
    XXH3_64bits_update(state, s->valid_position, (size_t)s->n_valid_streams * 8);
    XXH3_64bits_update(state, layout, strlen(layout));
    XXH3_64bits_update(state, &seed, 8);
    uint64_t hash = XXH3_64bits_digest(state);
    XXH3_freeState(state);
    return hash;
}

static void put_state(const char *path, hid_t file, const struct deck *deck,
                      const struct topology *topo, const struct train_state *s)
{
    hid_t group = io_group(path, file, "state");
    for (int i = 0; i < io_n_state_fields; i++) {
        const struct io_state_field *f = &io_state_fields[i];
        const char *value = (const char *)s + f->offset;
        int64_t widened = f->kind == IO_STATE_INT ? *(const int *)value : 0;
        io_put(path, group, f->name, f->kind == IO_STATE_F64 ? H5T_IEEE_F64LE : H5T_STD_I64LE, 0,
               NULL, f->kind == IO_STATE_INT ? (const void *)&widened : value, NULL,
               f->description);
    }
    io_put(path, group, "train_position", H5T_STD_I64LE, 1, &s->n_train_streams, s->train_position,
           "samples", "samples taken from each training stream");
    io_put(path, group, "valid_position", H5T_STD_I64LE, 1, &s->n_valid_streams, s->valid_position,
           "samples", "samples taken from each validation stream");
    io_put(path, group, "seed", H5T_STD_I64LE, 0, NULL, &deck->run.seed, NULL,
           "key of the counter-based generator; its counters are sample and element indices, there "
           "is no other state");
    char layout[512];
    io_layout_text(topo, layout, sizeof layout);
    io_put_string(path, group, "layout", layout, "the grids that wrote it");
    io_attr_u64(path, group, "xxh3", state_hash(s, layout, deck->run.seed));
    H5Gclose(group);
}

bool io_state_get(hid_t file, struct train_state *s, char *layout, size_t layout_size)
{
    int64_t shape[TENSOR_MAX_DIMS], seed = 0;
    uint64_t stored = 0;
    char name[128];
    bool ok = true;
    *s = (struct train_state){ 0 };
    for (int i = 0; ok && i < io_n_state_fields; i++) {
        const struct io_state_field *f = &io_state_fields[i];
        char *value = (char *)s + f->offset;
        int64_t wide = 0;
        snprintf(name, sizeof name, "/state/%s", f->name);
        ok = io_get(file, name, f->kind == IO_STATE_F64 ? H5T_NATIVE_DOUBLE : H5T_NATIVE_INT64, 1,
                    f->kind == IO_STATE_INT ? (void *)&wide : value);
        if (f->kind == IO_STATE_INT)
            *(int *)value = (int)wide;
    }
    const char *const position[2] = { "/state/train_position", "/state/valid_position" };
    int64_t *const count[2] = { &s->n_train_streams, &s->n_valid_streams };
    int64_t **const data[2] = { &s->train_position, &s->valid_position };
    for (int i = 0; ok && i < 2; i++) {
        ok =
            io_get_shape(file, position[i], shape) == 1 && shape[0] >= 0 && shape[0] <= MAX_STREAMS;
        if (!ok)
            break;
        *data[i] = xcalloc((size_t)shape[0] + 1, sizeof **data[i]);
        *count[i] = shape[0];
        ok = io_get(file, position[i], H5T_NATIVE_INT64, shape[0], *data[i]);
    }
    hid_t group = ok ? H5Gopen2(file, "/state", H5P_DEFAULT) : -1;
    ok = ok && group >= 0 && io_get_string(file, "/state/layout", layout, layout_size) &&
         io_get(file, "/state/seed", H5T_NATIVE_INT64, 1, &seed) &&
         io_get_attr_u64(group, "xxh3", &stored) && state_hash(s, layout, seed) == stored;
    if (group >= 0)
        H5Gclose(group);
    return ok;
}

/* ---- directories --------------------------------------------------------------------------- */

void io_iteration_directory(char *out, size_t size, const char *dir, int64_t iteration)
{
    int n = snprintf(out, size, "%s/iter_%07" PRId64, dir, iteration);
    if (n < 0 || (size_t)n >= size)
        FATAL(EXIT_WRITE, "%s: directory name is too long", dir);
}

/* a/b, never cut short. */
static void join(char out[IO_PATH], const char *a, const char *b)
{
    int n = snprintf(out, IO_PATH, "%s/%s", a, b);
    if (n < 0 || n >= IO_PATH)
        FATAL(EXIT_WRITE, "%s/%s: name is too long", a, b);
}

/* Delete a directory of ours: plain files one level deep; anything else stays, with a warning. */
static void remove_directory(const char *path)
{
    DIR *d = opendir(path);
    if (!d)
        return;
    char name[IO_PATH];
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0)
            continue;
        join(name, path, e->d_name);
        if (unlink(name) != 0)
            log_warn("%s: cannot delete: %s", name, strerror(errno));
    }
    closedir(d);
    if (rmdir(path) != 0)
        log_warn("%s: cannot delete: %s", path, strerror(errno));
}

/* What a killed job left behind: .tmp-iter_* and .trash-iter_*, and a tracker without its name,
 * whose process is gone (this host) or that are a day old (another). */
static void remove_leftovers(const char *save)
{
    static const char *const prefix[] = { ".tmp-iter_", ".trash-iter_",
                                          ".latest_checkpointed_iteration.txt-" };
    DIR *d = opendir(save);
    if (!d)
        return;
    char nonce[320], host[320], path[IO_PATH];
    io_nonce(nonce, sizeof nonce);
    snprintf(host, sizeof host, "%.*s", (int)(strrchr(nonce, '-') - nonce + 1), nonce);
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        bool ours = false;
        for (int i = 0; i < 3; i++)
            ours = ours || strncmp(e->d_name, prefix[i], strlen(prefix[i])) == 0;
        if (!ours)
            continue;
        const char *owner = strchr(strchr(e->d_name, '_'), '-');
        struct stat st;
        join(path, save, e->d_name);
        if (!owner || lstat(path, &st) != 0)
            continue;
        bool here = strncmp(owner + 1, host, strlen(host)) == 0,
             gone = time(NULL) - st.st_mtime > 86400;
        if (here) {
            long pid = atol(owner + 1 + strlen(host));
            gone = pid == (long)getpid() || (pid > 0 && kill((pid_t)pid, 0) != 0 && errno == ESRCH);
        }
        if (gone && S_ISDIR(st.st_mode))
            remove_directory(path);
        else if (gone && S_ISREG(st.st_mode) && unlink(path) != 0)
            log_warn("%s: cannot delete: %s", path, strerror(errno));
    }
    closedir(d);
}

static void write_tracker(const char *save, int64_t iteration)
{
    char path[IO_PATH], temporary[IO_PATH], nonce[320], name[400], text[32];
    io_nonce(nonce, sizeof nonce);
    snprintf(name, sizeof name, ".%s-%s", tracker_name, nonce);
    join(temporary, save, name);
    join(path, save, tracker_name);
    int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    CHECK_SYS(fd >= 0, EXIT_WRITE, "%s: cannot create", temporary);
    int n = snprintf(text, sizeof text, "%" PRId64 "\n", iteration);
    CHECK_SYS(write(fd, text, (size_t)n) == n, EXIT_WRITE, "%s: cannot write", temporary);
    CHECK_SYS(fsync(fd) == 0, EXIT_WRITE, "%s: cannot sync to disk", temporary);
    CHECK_SYS(close(fd) == 0, EXIT_WRITE, "%s: cannot close", temporary);
    CHECK_SYS(rename(temporary, path) == 0, EXIT_WRITE, "%s: cannot rename to %s", temporary, path);
    io_sync(save);
}

int64_t io_tracker_get(const char *dir, char *why, size_t why_size)
{
    char path[IO_PATH], text[64], shown[256];
    join(path, dir, tracker_name);
    FILE *f = fopen(path, "re");
    if (!f) {
        if (errno == ENOENT || errno == ENOTDIR)
            return -1;
        snprintf(why, why_size, "%s: error: cannot read: %s", path, strerror(errno));
        return -2;
    }
    size_t n = fread(text, 1, sizeof text - 1, f);
    fclose(f);
    text[n] = 0;
    char *end = text;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    size_t digits = (size_t)(end - text);
    while (*end == '\n' || *end == ' ' || *end == '\r')
        end++;
    if (digits > 0 && text[0] >= '0' && text[0] <= '9' && *end == 0 && (size_t)(end - text) == n &&
        errno == 0)
        return value;
    for (char *c = text; *c; c++)
        if (*c == '\n') {
            *c = 0;
            break;
        }
    snprintf(why, why_size, "%s: error: should hold the number of an iteration, holds '%s'", path,
             printable(shown, sizeof shown, text));
    return -2;
}

/* ---- save ---------------------------------------------------------------------------------- */

static void check_space(const char *save, const struct io_tensors *t)
{
    double need = 4 << 20;
    for (int i = 0; i < t->count; i++)
        need += (double)t->tensor[i].elements * (double)dtype_bytes(t->tensor[i].dtype);
    need *= 1.2;
    struct statvfs vfs;
    CHECK_SYS(statvfs(save, &vfs) == 0, EXIT_WRITE, "%s: cannot ask for free space", save);
    double have = (double)vfs.f_bavail * (double)vfs.f_frsize;
    if (have < need)
        fatal(EXIT_WRITE, __FILE__, __LINE__,
              "free space, or set checkpoint.keep_last; nothing was written or deleted",
              "%s: not enough space for a checkpoint: %.1f MB needed, %.1f MB free", save,
              need / 1e6, have / 1e6);
}

/* Rank 0: everything but the numbers of the tensors. */
static void lay_out(const char *path, const struct io_tensors *t, const struct deck *deck,
                    const struct topology *topo, const struct train_state *state,
                    bool with_optimizer)
{
    hid_t file = io_create(path, true);
    io_put_header(path, file, "mimo-checkpoint", IO_CHECKPOINT_VERSION, deck);
    io_attr_i64(path, file, "optimizer", with_optimizer);
    H5Gclose(io_group(path, file, "model"));
    if (with_optimizer)
        H5Gclose(io_group(path, file, "optimizer"));
    put_state(path, file, deck, topo, state);
    for (int i = 0; i < t->count; i++) {
        const struct io_tensor *d = &t->tensor[i];
        hid_t type = io_type(d->dtype);
        io_put(path, file, d->path, type, d->ndim, d->shape, NULL, NULL, NULL);
        H5Tclose(type);
        hid_t set = IO_WRITE(path, d->path, H5Dopen2(file, d->path, H5P_DEFAULT));
        io_attr_string(path, set, "dtype", io_type_name(d->dtype));
        if (strstr(d->path, "/language/embedding.word_embeddings.weight") ||
            strstr(d->path, "/language/output_layer.weight"))
            io_attr_i64(path, set, "vocab_size", deck->language.vocab_size);
        H5Dclose(set);
    }
    IO_WRITE(path, "metadata", H5Fclose(file));
}

/* A checkpoint of another run gets the next free number, so that nothing is lost. */
static void keep_earlier(const char *save, const char *final)
{
    char kept[IO_PATH];
    struct stat st;
    if (lstat(final, &st) != 0)
        return;
    int number = 0;
    do {
        int n = snprintf(kept, sizeof kept, "%s.%d", final, ++number);
        CHECK_SYS(n > 0 && n < (int)sizeof kept, EXIT_WRITE, "%s: the name is too long", final);
    } while (lstat(kept, &st) == 0);
    CHECK_SYS(rename(final, kept) == 0, EXIT_WRITE, "%s: cannot keep it as %s", final, kept);
    io_sync(save);
    log_line("%s: the checkpoint of an earlier run is kept as %s", final, kept);
}

/* The same iteration exists already: exchange both names at once, so that one complete checkpoint
 * is always there. A file system that cannot do that has none of this iteration for a moment; the
 * older ones are there. */
static void replace_earlier(const char *save, const char *temporary, const char *final)
{
    char aside[IO_PATH], name[400], nonce[320];
    CHECK_SYS(errno == ENOTEMPTY || errno == EEXIST, EXIT_WRITE, "%s: cannot rename to %s",
              temporary, final);
    snprintf(aside, sizeof aside, "%s", temporary);
    if (renameat2(AT_FDCWD, temporary, AT_FDCWD, final, RENAME_EXCHANGE) != 0) {
        CHECK_SYS(errno == EINVAL || errno == ENOSYS, EXIT_WRITE, "%s: cannot exchange with %s",
                  temporary, final);
        snprintf(name, sizeof name, ".trash-%s-%s", strrchr(final, '/') + 1,
                 io_nonce(nonce, sizeof nonce));
        join(aside, save, name);
        CHECK_SYS(rename(final, aside) == 0, EXIT_WRITE, "%s: cannot rename to %s", final, aside);
        CHECK_SYS(rename(temporary, final) == 0, EXIT_WRITE, "%s: cannot rename to %s", temporary,
                  final);
    }
    io_sync(save);
    remove_directory(aside);
    log_line("%s: replaces the checkpoint of an earlier start", final);
}

/* Rank 0: manifest, completion mark, and the names by which readers find it. */
static void publish(const char *save, const char *temporary, const char *path,
                    const struct io_tensors *t, const struct io_manifest *m, int64_t iteration,
                    bool own)
{
    char final[IO_PATH];
    hid_t file = IO_WRITE(path, "the new checkpoint", io_open(path, true));
    io_manifest_put(path, file, t, m);
    IO_WRITE(path, "metadata", H5Fflush(file, H5F_SCOPE_GLOBAL));
    io_attr_i64(path, file, "complete", 1);
    IO_WRITE(path, "metadata", H5Fclose(file));
    io_sync(path);
    io_sync(temporary);
    io_iteration_directory(final, sizeof final, save, iteration);
    if (!own)
        keep_earlier(save, final);
    if (rename(temporary, final) != 0)
        replace_earlier(save, temporary, final);
    io_sync(save);
    write_tracker(save, iteration);
}

void checkpoint_save(const char *save, const struct deck *deck, const struct topology *topo,
                     struct model *model, const struct train_state *state, bool with_optimizer,
                     bool own)
{
    io_start();
    struct io_tensors t;
    struct io_manifest m;
    char temporary[IO_PATH] = "", path[IO_PATH], name[400], nonce[320];
    io_tensors_init(&t, topo, model, with_optimizer);
    if (topo->rank == 0) {
        io_make_directories(save);
        remove_leftovers(save);
        check_space(save, &t);
        snprintf(name, sizeof name, ".tmp-iter_%07" PRId64 "-%s", state->iteration,
                 io_nonce(nonce, sizeof nonce));
        join(temporary, save, name);
        CHECK_SYS(mkdir(temporary, 0777) == 0, EXIT_WRITE, "%s: cannot make the directory",
                  temporary);
        join(path, temporary, "checkpoint.h5");
        lay_out(path, &t, deck, topo, state, with_optimizer);
    }
    comm_host_broadcast(topo->world, temporary, sizeof temporary, 0);
    join(path, temporary, "checkpoint.h5");

    hid_t file = io_open_parallel(path, topo->world);
    io_tensors_write(path, file, &t, topo, model, with_optimizer, &m);
    IO_WRITE(path, "data to disk",
             H5Fflush(file, H5F_SCOPE_GLOBAL)); /* through MPI-IO: an fsync on every rank */
    io_close_parallel(path, file);
    io_manifest_gather(&m, topo);
    if (topo->rank == 0)
        publish(save, temporary, path, &t, &m, state->iteration, own);
    io_manifest_free(&m);
    io_tensors_free(&t);
    comm_host_barrier(topo->world);
}

/* ---- retention ----------------------------------------------------------------------------- */

static void retire(const char *save, int64_t iteration)
{
    char path[IO_PATH], trash[IO_PATH], name[400], nonce[320];
    io_iteration_directory(path, sizeof path, save, iteration);
    snprintf(name, sizeof name, ".trash-iter_%07" PRId64 "-%s", iteration,
             io_nonce(nonce, sizeof nonce));
    join(trash, save, name);
    if (rename(path, trash) != 0) {
        log_warn("%s: cannot retire this checkpoint: %s", path, strerror(errno));
        return;
    }
    io_sync(save);
    remove_directory(trash);
}

void checkpoint_retain(const char *save, int64_t keep_last, int64_t retain_interval,
                       const struct topology *topo)
{
    char why[IO_PATH + 512];
    int64_t *have = NULL, n = 0, latest = -1;
    if (topo->rank == 0 && (keep_last > 0 || retain_interval > 0))
        latest = io_tracker_get(save, why, sizeof why);
    /* Nothing newer than the tracker. */
    if (latest >= 0)
        n = io_list_iterations(save, latest, &have);
    for (int64_t i = 0; i < n; i++) {
        bool recent = keep_last > 0 && i<keep_last, round = retain_interval> 0 &&
                      have[i] % retain_interval == 0;
        if (have[i] != latest && !recent && !round)
            retire(save, have[i]);
    }
    free(have);
    comm_host_barrier(topo->world);
}
