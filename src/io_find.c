/* io_find.c - which checkpoint of a directory to load (robustness.md 4.4, 7 and 9).
 *
 * The tracker is a hint: the checkpoint that it names is used if all of it verifies, else the
 * newest older one that does, each refused one with a warning. Verifying asks only whether a file
 * is whole: it opens, was completed, its state and manifest have their checksums, and so has every
 * block that the manifest vouches for; ranks share the blocks. Whether a whole checkpoint fits the
 * deck is io_restore.c's question, and a wrong answer there never makes an older one load.
 */
#include <dirent.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include "io_tensors.h"
#include "log.h"

enum { BLOCK_BYTES_MAX = 1 << 30 };

/* ---- verifying ----------------------------------------------------------------------------- */

static bool dtype_of(hid_t set, enum dtype *dtype)
{
    hid_t type = H5Dget_type(set);
    bool found = false;
    for (int d = DTYPE_F32; type >= 0 && d <= DTYPE_U8 && !found; d++) {
        hid_t ours = io_type(d);
        if (H5Tequal(type, ours) > 0) {
            *dtype = d;
            found = true;
        }
        H5Tclose(ours);
    }
    if (type >= 0)
        H5Tclose(type);
    return found;
}

bool io_stored_open(struct io_stored *s, const char *path, hid_t file, const char *name,
                    struct errors *errors)
{
    char shown[IO_TENSOR_PATH];
    *s = (struct io_stored){ .path = path, .name = name, .set = -1 };
    s->ndim = io_get_shape(file, name, s->shape);
    if (s->ndim > 0)
        s->set = H5Dopen2(file, name, H5P_DEFAULT);
    if (s->set >= 0 && dtype_of(s->set, &s->dtype))
        return true;
    errors_add(errors, EXIT_CHECKPOINT, "%s: error: %s: missing, or of a type that is not ours",
               path, printable(shown, sizeof shown, name));
    if (s->set >= 0)
        H5Dclose(s->set);
    return false;
}

bool io_stored_verify(const struct io_stored *s, const struct io_block *b, struct errors *errors)
{
    char shown[IO_TENSOR_PATH];
    double bytes = (double)dtype_bytes(s->dtype);
    bool inside = true;
    for (int i = 0; i < s->ndim; i++) {
        inside = inside && b->start[i] >= 0 && b->count[i] > 0 && b->count[i] <= s->shape[i] &&
                 b->start[i] <= s->shape[i] - b->count[i];
        bytes *= (double)b->count[i];
    }
    if (!inside || bytes > BLOCK_BYTES_MAX) {
        errors_add(errors, EXIT_CHECKPOINT,
                   "%s: error: %s: /manifest names a block outside the tensor", s->path,
                   printable(shown, sizeof shown, s->name));
        return false;
    }
    void *buf = xmalloc((size_t)bytes, 1);
    bool ok = io_block_verify(s->path, s->set, s->name, s->dtype, s->ndim, b, buf, errors);
    free(buf);
    return ok;
}

/* Every size-th block from this rank's on; the first damaged one is enough. */
static void verify_blocks(const char *path, hid_t file, const struct io_manifest *m, int rank,
                          int size, struct errors *errors)
{
    int64_t open = -1;
    struct io_stored s;
    for (int64_t k = rank; k < m->n_blocks && errors->count == 0; k += size) {
        const struct io_block *b = &m->block[k];
        if (b->tensor != open) {
            if (open >= 0)
                H5Dclose(s.set);
            open = -1;
            if (b->tensor < 0 || b->tensor >= m->n_paths)
                errors_add(errors, EXIT_CHECKPOINT,
                           "%s: error: /manifest names a block of no tensor", path);
            else if (io_stored_open(&s, path, file, m->path[b->tensor], errors))
                open = b->tensor;
        }
        if (open >= 0)
            io_stored_verify(&s, b, errors);
    }
    if (open >= 0)
        H5Dclose(s.set);
}

/* The file as a whole: opens, is complete, has its state. Returns it open, or -1. */
static hid_t open_whole(const char *path, int64_t *version, struct errors *errors)
{
    struct train_state state;
    char layout[512];
    hid_t file = io_open_checkpoint(path, version, errors);
    if (file < 0)
        return -1;
    const bool good = io_state_get(file, &state, layout, sizeof layout);
    free(state.train_position);
    free(state.valid_position);
    if (good)
        return file;
    errors_add(errors, EXIT_CHECKPOINT, "%s: error: /state is missing or damaged", path);
    H5Fclose(file);
    return -1;
}

/* Whether all of iteration `iteration` can be read; if not, all ranks know and rank 0's errors say
 * why. A file of another format version is for the loader to refuse. */
static bool verify(const char *load, int64_t iteration, const struct topology *topo,
                   struct errors *errors)
{
    char directory[IO_PATH], path[IO_PATH + 32];
    int64_t version = 0;
    struct io_manifest m = { 0 };
    io_iteration_directory(directory, sizeof directory, load, iteration);
    snprintf(path, sizeof path, "%s/checkpoint.h5", directory);
    hid_t file = open_whole(path, &version, errors);
    if (file >= 0) {
        if (version == IO_CHECKPOINT_VERSION && io_manifest_get(path, file, &m, errors)) {
            verify_blocks(path, file, &m, topo->rank, topo->size, errors);
            io_manifest_free(&m);
        }
        H5Fclose(file);
    }
    return comm_host_collect_errors(topo->world, errors) == 0;
}

/* ---- choosing ------------------------------------------------------------------------------ */

static int descending(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x > y ? -1 : x < y;
}

int64_t io_list_iterations(const char *dir, int64_t most, int64_t **list)
{
    int64_t n = 0;
    char path[IO_PATH], again[IO_PATH];
    DIR *d = opendir(dir);
    *list = NULL;
    for (struct dirent *e; d && (e = readdir(d)) != NULL;) {
        char *end;
        struct stat st;
        if (strncmp(e->d_name, "iter_", 5) || e->d_name[5] < '0' || e->d_name[5] > '9')
            continue;
        long long iteration = strtoll(e->d_name + 5, &end, 10);
        int length = snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        io_iteration_directory(again, sizeof again, dir, iteration);
        /* No link, and only names that we would give. */
        if (*end || length < 0 || length >= IO_PATH || strcmp(path, again) || iteration > most ||
            lstat(path, &st) != 0 || !S_ISDIR(st.st_mode))
            continue;
        *list = xrealloc(*list, (size_t)n + 1, sizeof **list);
        (*list)[n++] = iteration;
    }
    if (d)
        closedir(d);
    if (n)
        qsort(*list, (size_t)n, sizeof **list, descending);
    return n;
}

/* The first that verifies of the tracker's and the older ones; -1 with all the reasons if none
 * does. `tracked` = -2: the tracker is unreadable, said in errors. */
static int64_t choose(const char *load, int64_t tracked, const struct topology *topo,
                      struct errors *errors)
{
    int64_t *list = NULL, n = 0, next = tracked, found = -1;
    if (topo->rank == 0)
        n = io_list_iterations(load, tracked >= 0 ? tracked - 1 : INT64_MAX, &list);
    for (int64_t at = 0; found < 0;) {
        struct errors why = { 0 };
        if (next >= 0 && verify(load, next, topo, &why))
            found = next;
        for (int i = 0; i < why.count && topo->rank == 0; i++)
            errors_add(errors, EXIT_CHECKPOINT, "%s", why.line[i]);
        errors_free(&why);
        if (found >= 0)
            break;
        next = topo->rank == 0 && at < n ? list[at++] : -1;
        comm_host_broadcast(topo->world, &next, sizeof next, 0);
        if (next < 0)
            break;
    }
    free(list);
    return found;
}

int64_t checkpoint_find(const char *load, int64_t ckpt_step, const struct topology *topo,
                        struct errors *errors)
{
    io_start();
    struct errors refused = { 0 };
    int64_t tracked = -1, found;
    if (topo->rank == 0 && ckpt_step < 0) {
        char why[IO_PATH + 512];
        tracked = io_tracker_get(load, why, sizeof why);
        if (tracked == -2)
            errors_add(&refused, EXIT_CHECKPOINT, "%s", why);
    }
    comm_host_broadcast(topo->world, &tracked, sizeof tracked, 0);
    if (ckpt_step >= 0)
        found = verify(load, ckpt_step, topo, &refused) ? ckpt_step : -1;
    else
        found = tracked == -1 ? -1 : choose(load, tracked, topo, &refused);
    for (int i = 0; i < refused.count; i++) {
        const char *line = refused.line[i], *what = strstr(line, ": error: ");
        ASSERT(what);
        if (found >= 0)
            log_warn("%.*s: %s", (int)(what - line), line, what + sizeof ": error: " - 1);
        else
            errors_add(errors, EXIT_CHECKPOINT, "%s", line);
    }
    if (found >= 0 && refused.count > 0)
        log_warn("%s: falling back to iteration %" PRId64
                 ", the newest checkpoint that can be used",
                 load, found);
    else if (refused.count > 0)
        errors_add(errors, EXIT_CHECKPOINT, "%s: error: %s", load,
                   ckpt_step < 0 ? "holds no checkpoint that can be used"
                                 : "checkpoint.ckpt_step names a checkpoint that cannot be used");
    errors_free(&refused);
    comm_host_collect_errors(topo->world, errors);
    return found;
}

void checkpoint_warn_untracked(const char *save)
{
    int64_t *have = NULL;
    if (io_list_iterations(save, INT64_MAX, &have) > 0)
        log_warn("checkpoint.save = '%s' holds checkpoints (iteration %" PRId64
                 " is the newest) but no tracker that names one: starting at iteration 0; "
                 "checkpoint.ckpt_step goes on from one of them",
                 save, have[0]);
    free(have);
}
