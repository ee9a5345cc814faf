/* io_tensors.c - logical tensors in a checkpoint: which box of which dataset this rank holds, who
 * writes it, and checksums of every block.
 *
 * A shard is one or more slabs (boxes of the logical tensor, dense in memory). A writer cuts each
 * slab into blocks of whole rows of its first dimension, about IO_BLOCK_ELEMENTS each, and notes
 * for every block its box and XXH3-64. A reader takes the writer's blocks, not its own: each block
 * that touches one of its slabs is read whole, verified, and what overlaps is copied. So a reader
 * of any layout checks every byte it uses. Nothing here knows a layer. Of masters and moments a
 * rank holds, writes and reads its run of the shard only (ddp.h): up to seven boxes.
 */
#include <mpi.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>
#include "io_tensors.h"

enum { IO_BLOCK_ELEMENTS = 1 << 20 };
static const int64_t io_max_block_bytes = (int64_t)1 << 31;

static const char *const part_names[IO_PARTS] = { NULL, "master", "exp_avg", "exp_avg_sq" };

/* ---- pure index arithmetic ----------------------------------------------------------------- */

int io_slabs(const struct param *p, const struct grid *g, struct io_slab slab[PARAM_MAX_BLOCKS])
{
    struct io_slab whole = { .local = 0 };
    memcpy(whole.count, p->shape, sizeof whole.count);
    for (int i = p->ndim; i < TENSOR_MAX_DIMS; i++)
        whole.count[i] = 1;
    int size = p->expert ? g->expt_tp_size : g->tp_size,
        rank = p->expert ? g->expt_tp_rank : g->tp_rank;
    if (p->expert) { /* [E, rows, cols]: whole experts over ep, rows or columns inside each over
                        expt_tp */
        ASSERT(p->shape[0] % g->ep_size == 0);
        whole.count[0] = p->shape[0] / g->ep_size;
        whole.start[0] = g->ep_rank * whole.count[0];
    }
    if (p->shard == PARAM_REPLICATED || size == 1) {
        slab[0] = whole;
        return 1;
    }
    int axis = p->shard == PARAM_SPLIT_COLS ? p->ndim - 1 : p->expert ? 1 : 0;
    int n_blocks = axis == 0 && p->n_blocks > 1 ? p->n_blocks : 1;
    int64_t row = 1, first = 0, local = 0;
    for (int i = axis + 1; i < p->ndim; i++)
        row *= p->shape[i];
    for (int b = 0; b < n_blocks; b++) { /* each block of rows is cut on its own; this rank's pieces
                                            lie one after the other */
        int64_t full = n_blocks > 1 ? p->block_rows[b] : p->shape[axis];
        ASSERT(full % size == 0);
        slab[b] = whole;
        slab[b].count[axis] = full / size;
        slab[b].start[axis] = first + rank * (full / size);
        slab[b].local = local;
        first += full;
        local += full / size * row;
    }
    ASSERT(first == p->shape[axis]);
    return n_blocks;
}

bool io_owner(const struct param *p, const struct grid *g)
{
    if (!g->member)
        return false;
    bool first = p->expert ? g->expt_dp_rank == 0 : g->dp_rank == 0 && g->cp_rank == 0;
    if (p->shard != PARAM_REPLICATED)
        return first;
    return first && (p->expert ? g->expt_tp_rank == 0 : g->tp_rank == 0);
}

int io_run_slabs(const struct io_slab *shard, int n_shard, int ndim, int64_t first, int64_t n,
                 struct io_slab out[IO_MAX_SLABS])
{
    int count = 0;
    for (int k = 0; k < n_shard; k++) {
        const struct io_slab *s = &shard[k];
        int64_t at = first - s->local, end = first + n - s->local,
                volume = io_volume(ndim, s->count);
        if (at < 0)
            at = 0;
        if (end > volume)
            end = volume;
        while (at < end) { /* the largest box of whole rows of some dimension that starts here */
            int axis = 0;
            int64_t row = volume / s->count[0], rest = at;
            while (at % row || end - at < row)
                row /= s->count[++axis];
            struct io_slab *b = &out[count++];
            ASSERT(count <= IO_MAX_SLABS && axis < ndim);
            *b = *s;
            b->local = s->local + at - first;
            int64_t left = volume;
            for (int i = 0; i <= axis; i++) {
                left /= s->count[i];
                b->start[i] = s->start[i] + rest / left;
                b->count[i] = 1;
                rest %= left;
            }
            int64_t rows = (end - at) / row,
                    here = s->count[axis] - (b->start[axis] - s->start[axis]);
            b->count[axis] = rows < here ? rows : here;
            at += b->count[axis] * row;
        }
    }
    return count;
}

/* The common box of a block and a slab; false when they do not touch. */
static bool overlap(const struct io_block *b, const struct io_slab *s, int ndim, int64_t *start,
                    int64_t *count)
{
    for (int i = 0; i < ndim; i++) {
        int64_t end = b->start[i] + b->count[i], slab_end = s->start[i] + s->count[i];
        start[i] = b->start[i] > s->start[i] ? b->start[i] : s->start[i];
        count[i] = (end < slab_end ? end : slab_end) - start[i];
        if (count[i] <= 0)
            return false;
    }
    return true;
}

/* Position of a point inside a dense box. */
static int64_t offset_in(int ndim, const int64_t *box_start, const int64_t *box_count,
                         const int64_t *at)
{
    int64_t offset = 0;
    for (int i = 0; i < ndim; i++)
        offset = offset * box_count[i] + at[i] - box_start[i];
    return offset;
}

/* ---- parameters as datasets ---------------------------------------------------------------- */

static const struct grid *grid_of(const struct topology *topo, const struct param *p)
{
    return p->module == MODEL_LANGUAGE ? &topo->language : &topo->encoder;
}

static struct tensor part_tensor(const struct param *p, enum io_part part)
{
    const struct tensor *const t[IO_PARTS] = { &p->value, &p->master, &p->m, &p->v };
    return *t[part];
}

static void part_path(const struct param *p, enum io_part part, char out[IO_TENSOR_PATH])
{
    const char *module = model_module_names[p->module];
    int n = part == IO_VALUE ? snprintf(out, IO_TENSOR_PATH, "/model/%s/%s", module, p->name)
                             : snprintf(out, IO_TENSOR_PATH, "/optimizer/%s/%s/%s", module, p->name,
                                        part_names[part]);
    ASSERT(n > 0 && n < IO_TENSOR_PATH);
}

static int n_parts(const struct param *p, bool with_optimizer)
{
    return with_optimizer && p->trainable && !p->buffer ? IO_PARTS : 1;
}

/* Slabs of this rank's memory of a part: the whole shard, or its run of the optimizer's state. */
static int part_slabs(const struct param *p, const struct grid *g, enum io_part part,
                      struct io_slab slab[IO_MAX_SLABS])
{
    struct io_slab shard[PARAM_MAX_BLOCKS];
    int n = io_slabs(p, g, shard);
    if (part == IO_VALUE) {
        memcpy(slab, shard, (size_t)n * sizeof *slab);
        return n;
    }
    return io_run_slabs(shard, n, p->ndim, p->owned, tensor_numel(&p->master), slab);
}

/* The run of masters and moments exists once over data-parallel ranks; only tensor-parallel
 * replicas share it. */
static bool part_owner(const struct param *p, const struct grid *g, enum io_part part)
{
    if (part == IO_VALUE)
        return io_owner(p, g);
    if (!g->member || tensor_numel(&p->master) == 0)
        return false;
    return p->shard != PARAM_REPLICATED || (p->expert ? g->expt_tp_rank : g->tp_rank) == 0;
}

static int by_path(const void *a, const void *b)
{
    return strverscmp(((const struct io_tensor *)a)->path, ((const struct io_tensor *)b)->path);
}

struct io_tensor *io_tensors_find(const struct io_tensors *t, const char *path)
{
    struct io_tensor key = { .ndim = 0 };
    snprintf(key.path, sizeof key.path, "%s", path);
    return t->count ? bsearch(&key, t->tensor, (size_t)t->count, sizeof key, by_path) : NULL;
}

/* Bytes of every rank one after the other on rank 0 (NULL elsewhere); *total in bytes. */
static void *gather_bytes(const struct topology *topo, const void *send, size_t bytes,
                          size_t *total)
{
    MPI_Comm comm = *(MPI_Comm *)comm_mpi_handle(topo->world);
    int mine = (int)bytes, *count = NULL, *at = NULL;
    char *all = NULL;
    ASSERT(bytes <= (size_t)1 << 30);
    if (topo->rank == 0) {
        count = xcalloc((size_t)topo->size, sizeof *count);
        at = xcalloc((size_t)topo->size, sizeof *at);
    }
    *total = 0;
    if (MPI_Gather(&mine, 1, MPI_INT, count, 1, MPI_INT, 0, comm) != MPI_SUCCESS)
        FATAL(EXIT_INTERNAL, "MPI_Gather failed");
    for (int r = 0; topo->rank == 0 && r < topo->size; r++) {
        ASSERT(*total <= (size_t)1 << 30);
        at[r] = (int)*total;
        *total += (size_t)count[r];
    }
    if (topo->rank == 0)
        all = xmalloc(*total + 1, 1);
    if (MPI_Gatherv(send, mine, MPI_BYTE, all, count, at, MPI_BYTE, 0, comm) != MPI_SUCCESS)
        FATAL(EXIT_INTERNAL, "MPI_Gatherv failed");
    free(count);
    free(at);
    return all;
}

void io_tensors_init(struct io_tensors *t, const struct topology *topo, const struct model *model,
                     bool with_optimizer)
{
    struct io_tensor *mine = xcalloc((size_t)model->n_params * IO_PARTS + 1, sizeof *mine);
    int n = 0;
    for (int i = 0; i < model->n_params; i++) {
        const struct param *p = &model->param[i];
        for (int part = 0; part < n_parts(p, with_optimizer); part++) {
            if (!part_owner(p, grid_of(topo, p), part))
                continue;
            struct io_slab slab[IO_MAX_SLABS];
            int n_slabs = part_slabs(p, grid_of(topo, p), part, slab);
            struct tensor v = part_tensor(p, part);
            struct io_tensor *d = &mine[n++];
            part_path(p, part, d->path);
            d->dtype = v.dtype;
            d->ndim = p->ndim;
            memcpy(d->shape, p->shape, sizeof d->shape);
            for (int s = 0; s < n_slabs; s++)
                d->elements += io_volume(p->ndim, slab[s].count);
            if (d->elements != tensor_numel(&v) || v.ld != tensor_cols(&v))
                FATAL(EXIT_INTERNAL, "%s: this rank's shard has not the size that its slabs have",
                      d->path);
        }
    }
    size_t bytes;
    struct io_tensor *all = gather_bytes(topo, mine, (size_t)n * sizeof *mine, &bytes);
    free(mine);
    int64_t count = 0;
    if (topo->rank == 0) {
        int total = (int)(bytes / sizeof *all);
        qsort(all, (size_t)total, sizeof *all, by_path);
        for (int i = 0; i < total; i++) { /* shards of one tensor become one entry */
            if (count && strcmp(all[count - 1].path, all[i].path) == 0) {
                struct io_tensor *d = &all[count - 1];
                if (d->dtype != all[i].dtype || d->ndim != all[i].ndim ||
                    memcmp(d->shape, all[i].shape, sizeof d->shape))
                    FATAL(EXIT_INTERNAL, "%s: two ranks disagree about type or shape", d->path);
                d->elements += all[i].elements;
            } else
                all[count++] = all[i];
        }
        for (int i = 0; i < count; i++)
            if (all[i].elements != io_volume(all[i].ndim, all[i].shape))
                FATAL(EXIT_INTERNAL, "%s: the ranks write %lld of its %lld elements", all[i].path,
                      (long long)all[i].elements, (long long)io_volume(all[i].ndim, all[i].shape));
    }
    comm_host_broadcast(topo->world, &count, sizeof count, 0);
    if (topo->rank)
        all = xcalloc((size_t)count + 1, sizeof *all);
    comm_host_broadcast(topo->world, all, (size_t)count * sizeof *all, 0);
    t->tensor = all;
    t->count = (int)count;
}

void io_tensors_whole(struct io_tensors *t, const struct model *model)
{
    t->tensor = xcalloc((size_t)model->n_params + 1, sizeof *t->tensor);
    t->count = model->n_params;
    for (int i = 0; i < model->n_params; i++) {
        const struct param *p = &model->param[i];
        struct io_tensor *d = &t->tensor[i];
        part_path(p, IO_VALUE, d->path);
        d->dtype = (int32_t)(p->buffer ? model->acc : model->act);
        d->ndim = p->ndim;
        memcpy(d->shape, p->shape, sizeof d->shape);
        d->elements = io_volume(p->ndim, p->shape);
    }
    qsort(t->tensor, (size_t)t->count, sizeof *t->tensor, by_path);
}

void io_tensors_free(struct io_tensors *t)
{
    free(t->tensor);
    *t = (struct io_tensors){ 0 };
}

/* ---- memory of a shard --------------------------------------------------------------------- */

static struct tensor piece(const struct tensor *t, int64_t first, int64_t n)
{
    return tensor_1d((char *)t->data + (size_t)first * dtype_bytes(t->dtype), t->dtype, t->place,
                     n);
}

static const void *fetch(const struct model *m, const struct tensor *t, int64_t first, int64_t n,
                         void *staging)
{
    struct tensor part = piece(t, first, n);
    if (t->place == PLACE_HOST)
        return part.data;
    struct tensor host = tensor_1d(staging, t->dtype, PLACE_HOST, n);
    m->be->copy(m->compute, &part, &host);
    m->be->stream_sync(m->compute);
    return staging;
}

static void store(const struct model *m, const struct tensor *t, int64_t first, int64_t n,
                  void *from)
{
    struct tensor part = piece(t, first, n);
    if (t->place == PLACE_HOST) {
        memcpy(part.data, from, (size_t)n * dtype_bytes(t->dtype));
        return;
    }
    struct tensor host = tensor_1d(from, t->dtype, PLACE_HOST, n);
    m->be->copy(m->compute, &host, &part);
    m->be->stream_sync(m->compute);
}

static void *grow(void *buf, size_t *have, size_t need)
{
    if (need <= *have)
        return buf;
    *have = need;
    return xrealloc(buf, need, 1);
}

/* ---- writing ------------------------------------------------------------------------------- */

static struct io_block *new_block(struct io_manifest *m)
{
    if ((m->n_blocks & (m->n_blocks - 1)) == 0)
        m->block =
            xrealloc(m->block, (size_t)(m->n_blocks ? 2 * m->n_blocks : 1), sizeof *m->block);
    struct io_block *b = &m->block[m->n_blocks++];
    memset(b, 0, sizeof *b);
    return b;
}

void io_tensors_write(const char *path, hid_t file, const struct io_tensors *t,
                      const struct topology *topo, const struct model *model, bool with_optimizer,
                      struct io_manifest *m)
{
    *m = (struct io_manifest){ 0 };
    void *staging = NULL;
    size_t have = 0;
    for (int i = 0; i < model->n_params; i++) {
        const struct param *p = &model->param[i];
        const struct grid *g = grid_of(topo, p);
        for (int part = 0; part < n_parts(p, with_optimizer); part++) {
            if (!part_owner(p, g, part))
                continue;
            struct io_slab slab[IO_MAX_SLABS];
            int n_slabs = part_slabs(p, g, part, slab);
            char name[IO_TENSOR_PATH];
            part_path(p, part, name);
            const struct io_tensor *d = io_tensors_find(t, name);
            ASSERT(d != NULL);
            struct tensor v = part_tensor(p, part);
            hid_t type = io_type(v.dtype),
                  set = IO_WRITE(path, name, H5Dopen2(file, name, H5P_DEFAULT));
            for (int s = 0; s < n_slabs; s++) {
                int64_t row = io_volume(p->ndim - 1, slab[s].count + 1),
                        step = IO_BLOCK_ELEMENTS / (row ? row : 1);
                if (step < 1)
                    step = 1;
                for (int64_t r = 0; r < slab[s].count[0]; r += step) {
                    struct io_block *b = new_block(m);
                    b->tensor = d - t->tensor;
                    memcpy(b->start, slab[s].start, sizeof b->start);
                    memcpy(b->count, slab[s].count, sizeof b->count);
                    b->start[0] += r;
                    if (step < b->count[0] - r)
                        b->count[0] = step;
                    else
                        b->count[0] -= r;
                    int64_t n = b->count[0] * row;
                    if (v.place != PLACE_HOST)
                        staging = grow(staging, &have, (size_t)n * dtype_bytes(v.dtype));
                    const void *data = fetch(model, &v, slab[s].local + r * row, n, staging);
                    b->xxh3 = XXH3_64bits(data, (size_t)n * dtype_bytes(v.dtype));
                    io_write_box(path, name, set, type, p->ndim, b->start, b->count, data);
                }
            }
            IO_WRITE(path, name, H5Dclose(set));
            H5Tclose(type);
        }
    }
    free(staging);
}

/* ---- reading ------------------------------------------------------------------------------- */

bool io_block_verify(const char *path, hid_t set, const char *name, enum dtype dtype, int ndim,
                     const struct io_block *b, void *buf, struct errors *errors)
{
    hid_t type = io_type(dtype);
    char why[1200];
    bool ok = io_get_box(set, type, ndim, b->start, b->count, buf);
    if (!ok)
        errors_add(errors, EXIT_CHECKPOINT, "%s: error: %s: cannot read: %s", path, name,
                   io_reason(why, sizeof why));
    H5Tclose(type);
    if (!ok)
        return false;
    uint64_t hash = XXH3_64bits(buf, (size_t)io_volume(ndim, b->count) * dtype_bytes(dtype));
    if (hash == b->xxh3)
        return true;
    errors_add(errors, EXIT_CHECKPOINT,
               "%s: error: %s: rows %lld to %lld are damaged: checksum %016llx, stored %016llx",
               path, name, (long long)b->start[0], (long long)(b->start[0] + b->count[0] - 1),
               (unsigned long long)hash, (unsigned long long)b->xxh3);
    return false;
}

/* Copy the common part of block (in buf) and slab into the shard, run by run of the last dimension,
 * longer runs where both are dense. */
static int64_t scatter(const struct model *model, const struct tensor *v, const struct io_block *b,
                       const struct io_slab *s, int ndim, void *buf)
{
    int64_t start[TENSOR_MAX_DIMS], count[TENSOR_MAX_DIMS], at[TENSOR_MAX_DIMS];
    if (!overlap(b, s, ndim, start, count))
        return 0;
    ASSERT(buf && ndim >= 1 && ndim <= TENSOR_MAX_DIMS);
    int outer = ndim - 1; /* dimensions [outer, ndim) form one run */
    int64_t run = count[outer];
    while (outer > 0 && count[outer] == b->count[outer] && count[outer] == s->count[outer])
        run *= count[--outer];
    int64_t runs = io_volume(outer, count);
    memcpy(at, start, sizeof at);
    for (int64_t k = 0; k < runs; k++) {
        int64_t rest = k;
        for (int i = outer - 1; i >= 0; i--) {
            at[i] = start[i] + rest % count[i];
            rest /= count[i];
        }
        char *from =
            (char *)buf + (size_t)offset_in(ndim, b->start, b->count, at) * dtype_bytes(v->dtype);
        store(model, v, s->local + offset_in(ndim, s->start, s->count, at), run, from);
    }
    return runs * run;
}

static void read_tensor(const char *path, hid_t file, const struct io_manifest *m,
                        const struct model *model, const struct param *p, enum io_part part,
                        const struct io_slab *slab, int n_slabs, void **buf, size_t *have,
                        struct errors *errors)
{
    char name[IO_TENSOR_PATH], why[1200];
    part_path(p, part, name);
    int64_t index = 0, first = 0, last, found = 0, want = 0;
    while (index < m->n_paths && strcmp(m->path[index], name))
        index++;
    while (first < m->n_blocks && m->block[first].tensor < index)
        first++;
    for (last = first; last < m->n_blocks && m->block[last].tensor == index;)
        last++;
    struct tensor v = part_tensor(p, part);
    int before = errors->count;
    hid_t set = H5Dopen2(file, name, H5P_DEFAULT);
    if (set < 0) {
        errors_add(errors, EXIT_CHECKPOINT, "%s: error: %s: cannot open: %s", path, name,
                   io_reason(why, sizeof why));
        return;
    }
    for (int64_t k = first; k < last; k++) {
        const struct io_block *b = &m->block[k];
        int64_t start[TENSOR_MAX_DIMS], count[TENSOR_MAX_DIMS],
            bytes = (int64_t)dtype_bytes(v.dtype);
        bool wanted = false, inside = true;
        for (int i = 0; i < p->ndim; i++) {
            inside = inside && b->start[i] >= 0 && b->count[i] > 0 && b->count[i] <= p->shape[i] &&
                     b->start[i] <= p->shape[i] - b->count[i];
            if (inside)
                bytes *= b->count[i];
        }
        if (!inside || bytes > io_max_block_bytes) {
            errors_add(errors, EXIT_CHECKPOINT,
                       "%s: error: %s: /manifest names a block outside the tensor", path, name);
            break;
        }
        for (int s = 0; s < n_slabs; s++)
            wanted = wanted || overlap(b, &slab[s], p->ndim, start, count);
        if (!wanted)
            continue;
        *buf = grow(*buf, have, (size_t)bytes);
        if (!io_block_verify(path, set, name, v.dtype, p->ndim, b, *buf, errors))
            continue;
        for (int s = 0; s < n_slabs; s++)
            found += scatter(model, &v, b, &slab[s], p->ndim, *buf);
    }
    for (int s = 0; s < n_slabs; s++)
        want += io_volume(p->ndim, slab[s].count);
    if (found != want && errors->count == before)
        errors_add(errors, EXIT_CHECKPOINT,
                   "%s: error: %s: /manifest vouches for %lld of the %lld elements needed", path,
                   name, (long long)found, (long long)want);
    H5Dclose(set);
}

void io_tensors_read(const char *path, hid_t file, const struct io_manifest *m,
                     const struct topology *topo, struct model *model, bool with_optimizer,
                     struct errors *errors)
{
    void *buf = NULL;
    size_t have = 0;
    for (int i = 0; i < model->n_params; i++) {
        const struct param *p = &model->param[i];
        for (int part = 0; part < n_parts(p, with_optimizer); part++) {
            struct io_slab slab[IO_MAX_SLABS];
            int n_slabs = part_slabs(p, grid_of(topo, p), part, slab);
            if (n_slabs > 0)
                read_tensor(path, file, m, model, p, part, slab, n_slabs, &buf, &have, errors);
        }
    }
    free(buf);
}

/* ---- manifest ------------------------------------------------------------------------------ */

static int by_place(const void *a, const void *b)
{
    const struct io_block *x = a, *y = b;
    if (x->tensor != y->tensor)
        return x->tensor < y->tensor ? -1 : 1;
    for (int i = 0; i < TENSOR_MAX_DIMS; i++)
        if (x->start[i] != y->start[i])
            return x->start[i] < y->start[i] ? -1 : 1;
    return 0;
}

void io_manifest_gather(struct io_manifest *m, const struct topology *topo)
{
    size_t bytes;
    struct io_block *all =
        gather_bytes(topo, m->block, (size_t)m->n_blocks * sizeof *m->block, &bytes);
    free(m->block);
    m->block = all;
    m->n_blocks = (int64_t)(bytes / sizeof *all);
    if (topo->rank == 0)
        qsort(all, (size_t)m->n_blocks, sizeof *all, by_place);
}

/* Memory type; the caller closes it. */
static hid_t compound_of_block(void)
{
    hsize_t dims[1] = { TENSOR_MAX_DIMS };
    hid_t box = H5Tarray_create2(H5T_STD_I64LE, 1, dims),
          t = H5Tcreate(H5T_COMPOUND, sizeof(struct io_block));
    H5Tinsert(t, "tensor", offsetof(struct io_block, tensor), H5T_STD_I64LE);
    H5Tinsert(t, "start", offsetof(struct io_block, start), box);
    H5Tinsert(t, "count", offsetof(struct io_block, count), box);
    H5Tinsert(t, "xxh3", offsetof(struct io_block, xxh3), H5T_STD_U64LE);
    H5Tclose(box);
    return t;
}

static uint64_t manifest_hash(const struct io_manifest *m)
{
    XXH3_state_t *state = XXH3_createState();
    ASSERT(state != NULL);
    XXH3_64bits_reset(state);
    XXH3_64bits_update(state, m->path, (size_t)m->n_paths * sizeof *m->path);
    XXH3_64bits_update(state, m->block, (size_t)m->n_blocks * sizeof *m->block);
    uint64_t hash = XXH3_64bits_digest(state);
    XXH3_freeState(state);
    return hash;
}

static hid_t path_type(void)
{
    hid_t t = H5Tcopy(H5T_C_S1);
    H5Tset_size(t, IO_TENSOR_PATH);
    H5Tset_strpad(t, H5T_STR_NULLPAD);
    return t;
}

void io_manifest_put(const char *path, hid_t file, const struct io_tensors *t,
                     const struct io_manifest *m)
{
    struct io_manifest full = { xcalloc((size_t)t->count + 1, sizeof *full.path), t->count,
                                m->block, m->n_blocks };
    for (int i = 0; i < t->count; i++)
        memcpy(full.path[i], t->tensor[i].path, strlen(t->tensor[i].path));
    hid_t group = io_group(path, file, "manifest"), text = path_type(), block = compound_of_block();
    int64_t shape[1] = { full.n_paths };
    io_put(path, group, "path", text, 1, shape, full.path, NULL,
           "every tensor dataset of this file");
    shape[0] = full.n_blocks;
    io_put(path, group, "block", block, 1, shape, full.block, NULL,
           "box of a tensor (index into path; unused dimensions 0, 1) and XXH3-64 of its elements "
           "as stored");
    io_attr_u64(path, group, "xxh3", manifest_hash(&full));
    free(full.path);
    H5Tclose(text);
    H5Tclose(block);
    H5Gclose(group);
}

bool io_manifest_get(const char *path, hid_t file, struct io_manifest *m, struct errors *errors)
{
    int64_t paths[TENSOR_MAX_DIMS], blocks[TENSOR_MAX_DIMS];
    uint64_t stored = 0;
    hid_t text = path_type(), block = compound_of_block(), group = -1;
    *m = (struct io_manifest){ 0 };
    bool ok = io_get_shape(file, "/manifest/path", paths) == 1 &&
              io_get_shape(file, "/manifest/block", blocks) == 1 && paths[0] >= 0 &&
              paths[0] < 1 << 24 && blocks[0] >= 0 && blocks[0] < 1 << 28;
    if (ok) {
        m->n_paths = paths[0];
        m->n_blocks = blocks[0];
        m->path = xcalloc((size_t)m->n_paths + 1, sizeof *m->path);
        m->block = xcalloc((size_t)m->n_blocks + 1, sizeof *m->block);
        group = H5Gopen2(file, "/manifest", H5P_DEFAULT);
        ok = group >= 0 && io_get_attr_u64(group, "xxh3", &stored) &&
             io_get(file, "/manifest/path", text, m->n_paths, m->path) &&
             io_get(file, "/manifest/block", block, m->n_blocks, m->block) &&
             manifest_hash(m) == stored;
        if (group >= 0)
            H5Gclose(group);
    }
    H5Tclose(text);
    H5Tclose(block);
    if (!ok) {
        io_manifest_free(m);
        errors_add(errors, EXIT_CHECKPOINT,
                   "%s: error: /manifest, the list of checksums, is missing or damaged", path);
        return false;
    }
    for (int64_t i = 0; i < m->n_paths; i++)
        m->path[i][IO_TENSOR_PATH - 1] = 0;
    return true;
}

void io_manifest_free(struct io_manifest *m)
{
    free(m->path);
    free(m->block);
    *m = (struct io_manifest){ 0 };
}
