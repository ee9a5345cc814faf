/* ranks: 1 2 4 8 */
/* mpi_io.c - checkpoint, trace and batch file on real grids: what is written comes back bit for bit, and what is wrong is named.
 *
 * Every rank runs every test in the same order. Findings of one rank reach all before they are asserted (agree), so that a
 * failure does not leave the others in a collective call.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include <dirent.h>
#include <fcntl.h>
#include <math.h>
#include <sys/stat.h>
#include <unistd.h>
#include "io_internal.h"

static struct comm *world;
static char scratch[IO_PATH];

struct job {                              /* a program's worth of objects on some ranks */
    struct deck deck;
    struct topology topo;
    const struct backend_ops *be;
    struct stream stream;
    struct arenas arenas;
    struct model model;
    struct optim optim;
    int64_t train_position[3], valid_position[2];
    struct train_state state;
};

static void agree(bool ok)
{
    int64_t v = ok;
    comm_host_reduce_i64(world, &v, 1, COMM_MIN);
    assert_true(v);
}

static void job_open(struct job *j, struct comm *comm, const char *override)
{
    static const char text[] = "&run backend = 'ref' train_iters = 10 /\n&language preset = 'tiny' /\n"
                               "&batch global_batch_size = 8 /\n&lr lr = 1e-3 /\n";
    struct errors e = { 0 };
    char *copy = xstrdup(override);
    memset(j, 0, sizeof *j);
    deck_read(&j->deck, "test", text, strlen(text), override[0] ? 1 : 0, &copy, &e);
    free(copy);
    deck_resolve(&j->deck, comm->size, &e);
    topology_init(&j->topo, &j->deck, comm->size, comm->rank, &e);
    if (e.count) errors_print(&e);
    assert_int_equal(e.count, 0);
    topology_connect(&j->topo, comm);
    j->be = backend_select(j->deck.derived.fp64);
    j->be->stream_create(&j->stream, "compute");
    model_init(&j->model, &j->deck, &j->topo, j->be, &j->stream);
    optim_init(&j->optim, &j->deck, &j->topo, &j->model, j->be, &comm_mpi, &j->stream);
    arenas_init(&j->arenas);
    model_plan(&j->model, &j->arenas);
    optim_plan(&j->optim, &j->arenas);
    arenas_commit(&j->arenas, j->be);
    model_plan(&j->model, &j->arenas);
    optim_plan(&j->optim, &j->arenas);
    model_initialise(&j->model);
    optim_refresh_masters(&j->optim);
    for (int i = 0; i < 3; i++) j->train_position[i] = 100 + i;
    for (int i = 0; i < 2; i++) j->valid_position[i] = 200 + i;
    j->state = (struct train_state){ .iteration = 7, .consumed_train_samples = 56, .consumed_valid_samples = 3,
        .skipped_train_samples = 8, .optim_step = 6, .n_train_streams = 3, .n_valid_streams = 2,
        .train_position = j->train_position, .valid_position = j->valid_position };
    lr_init(&j->state.lr, &j->deck);
    j->state.lr.n = 48;
}

static void job_close(struct job *j)
{
    model_free(&j->model);
    arenas_free(&j->arenas, j->be);
    j->be->stream_destroy(&j->stream);
    topology_free(&j->topo);
    deck_free(&j->deck);
}

static struct tensor *part_of(struct param *p, int part)
{
    return part == 0 ? &p->value : part == 1 ? &p->master : part == 2 ? &p->m : &p->v;
}

static double get(const struct tensor *t, int64_t i)
{
    return t->dtype == DTYPE_F64 ? ((double *)t->data)[i] : (double)((float *)t->data)[i];
}

static void set(const struct tensor *t, int64_t i, double x)
{
    if (t->dtype == DTYPE_F64) ((double *)t->data)[i] = x;
    else ((float *)t->data)[i] = (float)x;
}

/* Numbers that tell tensor, part and element. */
static void scribble(struct job *j, double salt)
{
    for (int k = 0; k < j->model.n_params; k++)
        for (int part = 0; part < 4; part++) {
            struct tensor *t = part_of(&j->model.param[k], part);
            for (int64_t i = 0; t->data && i < tensor_numel(t); i++) set(t, i, sin(salt + k + 100.0 * part + 1e-3 * (double)i));
        }
}

static bool scribbled(struct job *j, double salt, int parts)
{
    for (int k = 0; k < j->model.n_params; k++)
        for (int part = 0; part < parts; part++) {
            struct tensor *t = part_of(&j->model.param[k], part);
            for (int64_t i = 0; t->data && i < tensor_numel(t); i++) {
                double want = sin(salt + k + 100.0 * part + 1e-3 * (double)i);
                if (get(t, i) != (t->dtype == DTYPE_F64 ? want : (double)(float)want)) return false;
            }
        }
    return true;
}

static const char *in_scratch(char out[IO_PATH], const char *name)
{
    snprintf(out, IO_PATH, "%.3000s/%.900s", scratch, name);
    return out;
}

static const char *checkpoint_file(char out[IO_PATH], const char *name, int iteration)
{
    snprintf(out, IO_PATH, "%.3000s/%.900s/iter_%07d/checkpoint.h5", scratch, name, iteration);
    return out;
}

static bool told(const struct errors *e, const char *word)
{
    for (int i = 0; i < e->count; i++) if (strstr(e->line[i], word)) return true;
    return false;
}

static const struct checkpoint_options plain = { false, false, false };

/* Load `name` into j; on rank 0 every word of the NULL-terminated list must stand in some error line and nothing else may be wrong. */
static void expect_refusal(struct job *j, const char *name, const struct checkpoint_options *options, const char *const *word)
{
    struct errors e = { 0 };
    char path[IO_PATH];
    bool has_optimizer, ok = true;
    int words = 0;
    checkpoint_load(in_scratch(path, name), 7, &j->deck, &j->topo, &j->model, &j->state, options, &has_optimizer, &e);
    if (world->rank == 0) {
        for (; word[words]; words++) ok = ok && told(&e, word[words]);
        ok = ok && e.count == words && e.worst == EXIT_CHECKPOINT;
        for (int i = 0; !ok && i < e.count; i++) print_message("  said: %s\n", e.line[i]);
    }
    errors_free(&e);
    agree(ok);
}

static void save_here(struct job *j, const char *name)
{
    char path[IO_PATH];
    checkpoint_save(in_scratch(path, name), &j->deck, &j->topo, &j->model, &j->state, true);
}

/* ---- slabs ------------------------------------------------------------------------------------------------------------- */

static void p12_slabs_of_in_proj_blocks_for_tp_1_and_2(void **unused)
{
    struct param p = { .ndim = 2, .shape = { 26, 3 }, .shard = PARAM_SPLIT_ROWS, .n_blocks = 5, .block_rows = { 8, 8, 4, 4, 2 } };
    struct io_slab s[PARAM_MAX_BLOCKS];
    struct grid g = { .tp_size = 1, .ep_size = 1, .expt_tp_size = 1 };
    assert_int_equal(io_slabs(&p, &g, s), 1);
    assert_int_equal(s[0].start[0], 0);
    assert_int_equal(s[0].count[0], 26);
    g.tp_size = 2;
    const int64_t start[2][5] = { { 0, 8, 16, 20, 24 }, { 4, 12, 18, 22, 25 } }, count[5] = { 4, 4, 2, 2, 1 };
    for (g.tp_rank = 0; g.tp_rank < 2; g.tp_rank++) {
        int64_t local = 0;
        assert_int_equal(io_slabs(&p, &g, s), 5);
        for (int b = 0; b < 5; b++) {
            assert_int_equal(s[b].start[0], start[g.tp_rank][b]);
            assert_int_equal(s[b].count[0], count[b]);
            assert_int_equal(s[b].start[1], 0);
            assert_int_equal(s[b].count[1], 3);
            assert_int_equal(s[b].local, local);
            local += count[b] * 3;
        }
        assert_int_equal(local, 13 * 3);
    }
}

static void slabs_cut_columns_and_experts(void **unused)
{
    struct io_slab s[PARAM_MAX_BLOCKS];
    struct param cols = { .ndim = 2, .shape = { 6, 8 }, .shard = PARAM_SPLIT_COLS, .n_blocks = 1 };
    struct grid g = { .tp_size = 2, .tp_rank = 1, .ep_size = 4, .ep_rank = 3, .expt_tp_size = 2, .expt_tp_rank = 1 };
    assert_int_equal(io_slabs(&cols, &g, s), 1);
    assert_int_equal(s[0].start[0], 0);
    assert_int_equal(s[0].count[0], 6);
    assert_int_equal(s[0].start[1], 4);
    assert_int_equal(s[0].count[1], 4);
    struct param expert = { .ndim = 3, .shape = { 8, 6, 10 }, .shard = PARAM_SPLIT_ROWS, .n_blocks = 1, .expert = true };
    assert_int_equal(io_slabs(&expert, &g, s), 1);
    assert_int_equal(s[0].start[0], 6);
    assert_int_equal(s[0].count[0], 2);
    assert_int_equal(s[0].start[1], 3);
    assert_int_equal(s[0].count[1], 3);
    assert_int_equal(s[0].count[2], 10);
    expert.shard = PARAM_SPLIT_COLS;
    assert_int_equal(io_slabs(&expert, &g, s), 1);
    assert_int_equal(s[0].start[2], 5);
    assert_int_equal(s[0].count[2], 5);
    assert_int_equal(s[0].count[1], 6);
}

static void owners_are_the_first_replicas(void **unused)
{
    struct param whole = { .shard = PARAM_REPLICATED }, rows = { .shard = PARAM_SPLIT_ROWS };
    struct param expert = { .shard = PARAM_SPLIT_ROWS, .expert = true };
    struct grid g = { .member = true };
    assert_true(io_owner(&whole, &g) && io_owner(&rows, &g) && io_owner(&expert, &g));
    g.tp_rank = 1;
    assert_true(!io_owner(&whole, &g) && io_owner(&rows, &g));
    g.tp_rank = 0;
    g.dp_rank = 1;
    assert_true(!io_owner(&whole, &g) && !io_owner(&rows, &g) && io_owner(&expert, &g));
    g.expt_dp_rank = 1;
    assert_false(io_owner(&expert, &g));
    g = (struct grid){ .member = false };
    assert_false(io_owner(&whole, &g));
}

/* ---- tensor-parallel shards of hand-made parameters ---------------------------------------------------------------------- */

enum { HAND_PARAMS = 5 };

/* Logical tensors whose elements are their own index, cut over `size` ranks by loops that share nothing with io_slabs. */
static void hand_model(struct model *m, struct topology *topo, int size, int rank)
{
    static const struct param kind[HAND_PARAMS] = {
        { .name = "whole", .ndim = 1, .shape = { 24 }, .shard = PARAM_REPLICATED, .n_blocks = 1 },
        { .name = "rows.blocks", .ndim = 2, .shape = { 56, 5 }, .shard = PARAM_SPLIT_ROWS, .n_blocks = 3, .block_rows = { 24, 24, 8 } },
        { .name = "cols", .ndim = 2, .shape = { 7, 16 }, .shard = PARAM_SPLIT_COLS, .n_blocks = 1 },
        { .name = "conv", .ndim = 3, .shape = { 16, 1, 4 }, .shard = PARAM_SPLIT_ROWS, .n_blocks = 1 },
        { .name = "experts", .ndim = 3, .shape = { 8, 3, 4 }, .shard = PARAM_REPLICATED, .n_blocks = 1, .expert = true },
    };
    memset(m, 0, sizeof *m);
    m->param = xcalloc(HAND_PARAMS, sizeof *m->param);
    m->n_params = HAND_PARAMS;
    memcpy(m->param, kind, sizeof kind);
    struct grid *g = &topo->language;
    g->tp_size = g->ep_size = size;
    g->tp_rank = g->ep_rank = rank;
    g->dp_size = g->expt_dp_size = g->expt_tp_size = g->cp_size = g->pp_size = 1;
    g->dp_rank = g->expt_dp_rank = g->expt_tp_rank = g->cp_rank = g->pp_rank = 0;
    g->member = true;
    for (int k = 0; k < HAND_PARAMS; k++) {
        struct param *p = &m->param[k];
        p->module = MODEL_LANGUAGE;
        int64_t full = io_volume(p->ndim, p->shape), width = full / p->shape[0], n = 0;
        double *data = xcalloc((size_t)full, sizeof *data);
        for (int64_t i = 0; i < full; i++) {
            int64_t row = i / width, col = i % p->shape[p->ndim - 1], first = 0;
            bool mine = true;
            if (p->expert) mine = row / (p->shape[0] / size) == rank;
            else if (p->shard == PARAM_SPLIT_COLS) mine = col / (p->shape[1] / size) == rank;
            else if (p->shard == PARAM_SPLIT_ROWS) {
                int64_t rows = p->shape[0];
                for (int b = 0; p->n_blocks > 1 && b < p->n_blocks; b++) {
                    rows = p->block_rows[b];
                    if (row < first + rows) break;
                    first += rows;
                }
                mine = (row - first) / (rows / size) == rank;
            }
            if (mine) data[n++] = (double)i;
        }
        p->value = tensor_1d(data, DTYPE_F64, PLACE_HOST, n);
    }
}

static void hand_free(struct model *m)
{
    for (int k = 0; k < m->n_params; k++) free(m->param[k].value.data);
    free(m->param);
}

static void shards_land_in_logical_rows_and_any_other_sharding_reads_them(void **unused)
{
    struct job j;
    struct model m;
    struct train_state state = { .iteration = 7 };
    char path[IO_PATH];
    job_open(&j, world, "");
    j.topo.language.present = true;
    hand_model(&m, &j.topo, world->size, world->rank);
    checkpoint_save(in_scratch(path, "shards"), &j.deck, &j.topo, &m, &state, false);
    bool ok = true;
    if (world->rank == 0) {                /* the file holds index i at place i */
        hid_t file = io_open(checkpoint_file(path, "shards", 7), false);
        for (int k = 0; k < HAND_PARAMS; k++) {
            char name[IO_TENSOR_PATH];
            double data[512];
            int64_t n = io_volume(m.param[k].ndim, m.param[k].shape);
            snprintf(name, sizeof name, "/model/language/%s", m.param[k].name);
            ok = ok && io_get(file, name, H5T_NATIVE_DOUBLE, n, data);
            for (int64_t i = 0; ok && i < n; i++) ok = data[i] == (double)i;
        }
        H5Fclose(file);
    }
    hand_free(&m);
    agree(ok);
    /* ranks r and size - 1 - r change places: everybody reads what another wrote, and then rank 0 alone reads all */
    static const struct checkpoint_options weights = { .model_only = true };
    struct errors e = { 0 };
    bool has_optimizer;
    for (int alone = 0; alone < 2; alone++) {
        struct comm *comm = alone ? comm_split(world, world->rank == 0 ? 0 : -1, "alone") : world;
        if (comm) {
            struct job other;
            struct model want;
            job_open(&other, comm, "");
            hand_model(&m, &other.topo, comm->size, comm->size - 1 - comm->rank);
            hand_model(&want, &other.topo, comm->size, comm->size - 1 - comm->rank);
            for (int k = 0; k < HAND_PARAMS; k++) memset(m.param[k].value.data, 0, (size_t)tensor_numel(&m.param[k].value) * 8);
            checkpoint_load(in_scratch(path, "shards"), 7, &other.deck, &other.topo, &m, &state, &weights, &has_optimizer, &e);
            ok = ok && e.count == 0;
            for (int i = 0; i < e.count; i++) print_message("  said: %s\n", e.line[i]);
            for (int k = 0; k < HAND_PARAMS; k++)
                ok = ok && memcmp(m.param[k].value.data, want.param[k].value.data, (size_t)tensor_numel(&want.param[k].value) * 8) == 0;
            hand_free(&m);
            hand_free(&want);
            job_close(&other);
            if (alone) comm_free(comm);
        }
        agree(ok);
    }
    errors_free(&e);
    job_close(&j);
}

/* ---- checkpoint --------------------------------------------------------------------------------------------------------- */

static void saved_and_loaded_is_bitwise_equal(void **unused)
{
    struct job j, k;
    struct errors e = { 0 };
    char path[IO_PATH];
    bool has_optimizer = false;
    job_open(&j, world, "");
    scribble(&j, 1);
    save_here(&j, "plain");
    job_open(&k, world, "");
    memset(k.train_position, 0, sizeof k.train_position);
    memset(k.valid_position, 0, sizeof k.valid_position);
    k.state = (struct train_state){ .n_train_streams = 3, .n_valid_streams = 2, .train_position = k.train_position,
                                    .valid_position = k.valid_position };
    int64_t found = checkpoint_find(in_scratch(path, "plain"), -1, &k.topo, &e);
    checkpoint_load(path, found, &k.deck, &k.topo, &k.model, &k.state, &plain, &has_optimizer, &e);
    for (int i = 0; i < e.count; i++) print_message("  said: %s\n", e.line[i]);
    bool ok = e.count == 0 && found == 7 && has_optimizer && scribbled(&k, 1, 4);
    ok = ok && memcmp(k.train_position, j.train_position, sizeof j.train_position) == 0
         && memcmp(k.valid_position, j.valid_position, sizeof j.valid_position) == 0 && k.state.train_position == k.train_position;
    for (int i = 0; i < io_n_state_fields; i++)
        ok = ok && memcmp((char *)&k.state + io_state_fields[i].offset, (char *)&j.state + io_state_fields[i].offset,
                          io_state_fields[i].kind == IO_STATE_INT ? sizeof(int) : 8) == 0;
    agree(ok);
    job_close(&j);
    job_close(&k);
}

static void fp64_run_comes_back_bitwise(void **unused)
{
    struct job j;
    struct errors e = { 0 };
    char path[IO_PATH];
    bool has = false;
    job_open(&j, world, "run.precision=fp64");
    scribble(&j, 5);
    save_here(&j, "fp64");
    scribble(&j, 6);
    checkpoint_load(in_scratch(path, "fp64"), 7, &j.deck, &j.topo, &j.model, &j.state, &plain, &has, &e);
    agree(e.count == 0 && has && scribbled(&j, 5, 4) && j.model.param[0].value.dtype == DTYPE_F64);
    job_close(&j);
    job_open(&j, world, "");               /* and an fp32 run names every tensor */
    checkpoint_load(path, 7, &j.deck, &j.topo, &j.model, &j.state, &plain, &has, &e);
    agree(world->rank || (e.count > 100 && told(&e, "has type float64, this model needs float32")));
    errors_free(&e);
    job_close(&j);
}

static void weights_only_and_without_optimizer(void **unused)
{
    struct job j, k;
    struct errors e = { 0 };
    char path[IO_PATH];
    bool has = true;
    job_open(&j, world, "");
    scribble(&j, 2);
    checkpoint_save(in_scratch(path, "bare"), &j.deck, &j.topo, &j.model, &j.state, false);
    for (int what = 0; what < 4; what++) {
        static const struct checkpoint_options option[4] = { { .finetune = true }, { .model_only = true }, { .no_optimizer = true },
                                                             { 0 } };
        job_open(&k, world, "");
        k.state.iteration = k.state.consumed_train_samples = k.state.lr.n = k.state.optim_step = 0;
        k.train_position[1] = 0;
        checkpoint_load(path, 7, &k.deck, &k.topo, &k.model, &k.state, &option[what], &has, &e);
        bool ok = e.count == 0 && !has && scribbled(&k, 2, 1);
        ok = ok && k.state.iteration == (what == 0 ? 0 : 7) && k.state.consumed_train_samples == (what < 2 ? 0 : 56)
             && k.train_position[1] == (what < 2 ? 0 : 101) && k.state.lr.n == (what < 3 ? 0 : 48);
        job_close(&k);
        agree(ok);
    }
    job_close(&j);
}

/* All of /model of two files is the same bytes. */
static bool same_model(const char *a, const char *b)
{
    hid_t x = io_open(a, false), y = io_open(b, false);
    struct io_manifest m = { 0 }, n = { 0 };
    struct errors e = { 0 };
    bool ok = x >= 0 && y >= 0 && io_manifest_get(a, x, &m, &e) && io_manifest_get(b, y, &n, &e);
    int64_t compared = 0, others = 0;
    for (int64_t i = 0; ok && i < n.n_paths; i++) others += strncmp(n.path[i], "/model/", 7) == 0;
    for (int64_t i = 0; ok && i < m.n_paths; i++) {
        int64_t s[TENSOR_MAX_DIMS];
        if (strncmp(m.path[i], "/model/", 7)) continue;
        int ndim = io_get_shape(x, m.path[i], s);
        int64_t count = io_volume(ndim, s);
        float *p = xcalloc((size_t)count, sizeof *p), *q = xcalloc((size_t)count, sizeof *q);
        ok = io_get(x, m.path[i], H5T_NATIVE_FLOAT, count, p) && io_get(y, m.path[i], H5T_NATIVE_FLOAT, count, q)
             && memcmp(p, q, (size_t)count * sizeof *p) == 0;
        free(p);
        free(q);
        compared++;
    }
    ok = ok && compared == others && compared > 50;
    io_manifest_free(&m);
    io_manifest_free(&n);
    errors_free(&e);
    H5Fclose(x);
    H5Fclose(y);
    return ok;
}

static void initial_weights_are_bitwise_equal_for_every_number_of_ranks(void **unused)
{
    struct job j;
    char a[IO_PATH], b[IO_PATH];
    job_open(&j, world, "");
    j.state.iteration = 0;
    save_here(&j, "initial");
    job_close(&j);
    struct comm *alone = comm_split(world, world->rank == 0 ? 0 : -1, "alone");
    bool ok = true;
    if (alone) {
        job_open(&j, alone, "");
        j.state.iteration = 0;
        save_here(&j, "initial-alone");
        job_close(&j);
        comm_free(alone);
        ok = same_model(checkpoint_file(a, "initial", 0), checkpoint_file(b, "initial-alone", 0));
    }
    agree(ok);
}

static void flip_byte(const char *path, const char *name, int64_t element)
{
    hid_t file = io_open(path, false), data = H5Dopen2(file, name, H5P_DEFAULT);
    haddr_t at = H5Dget_offset(data);
    H5Dclose(data);
    H5Fclose(file);
    int fd = open(path, O_RDWR);
    unsigned char byte;
    off_t where = (off_t)at + element * 4 + 1;
    CHECK_SYS(at != HADDR_UNDEF && pread(fd, &byte, 1, where) == 1, EXIT_INTERNAL, "test");
    byte ^= 4;
    CHECK_SYS(pwrite(fd, &byte, 1, where) == 1 && close(fd) == 0, EXIT_INTERNAL, "test");
}

static void flipped_bytes_are_named(void **unused)
{
    static const char one[] = "/model/language/decoder.layers.0.mixer.in_proj.weight";
    static const char two[] = "/optimizer/projector/encoder.weight/exp_avg_sq";
    struct job j;
    char path[IO_PATH];
    job_open(&j, world, "");
    save_here(&j, "flipped");
    if (world->rank == 0) {
        flip_byte(checkpoint_file(path, "flipped", 7), one, 1000);
        flip_byte(path, two, 5);
    }
    comm_host_barrier(world);
    expect_refusal(&j, "flipped", &plain, (const char *const[]){ one, two, NULL });
    bool ok = true;
    if (world->rank == 0) {                /* the inspector sees them too */
        FILE *null = fopen("/dev/null", "w");
        ok = io_inspect(path, null) == EXIT_CHECKPOINT;
        fclose(null);
    }
    agree(ok);
    if (world->rank == 0) {
        flip_byte(path, one, 1000);
        flip_byte(path, two, 5);
        hid_t file = io_open(path, true), data = H5Dopen2(file, "/state/consumed_train_samples", H5P_DEFAULT);
        int64_t wrong = 57;
        H5Dwrite(data, H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, &wrong);
        H5Dclose(data);
        H5Fclose(file);
    }
    comm_host_barrier(world);
    expect_refusal(&j, "flipped", &plain, (const char *const[]){ "/state is missing or damaged", NULL });
    job_close(&j);
}

static void every_mismatched_tensor_is_listed(void **unused)
{
    struct job j;
    char path[IO_PATH];
    job_open(&j, world, "");
    save_here(&j, "edited");
    if (world->rank == 0) {
        hid_t file = io_open(checkpoint_file(path, "edited", 7), true), type = io_type(DTYPE_F64), f32 = io_type(DTYPE_F32);
        int64_t three[1] = { 3 }, hidden[1] = { 64 };
        static const char *const gone[] = { "/model/language/decoder.final_norm.weight", "/model/projector/encoder.weight",
            "/model/language/decoder.layers.0.mixer.D", "/model/language/decoder.layers.0.mixer.in_proj.layer_norm_weight",
            "/optimizer/language/output_layer.weight/master" };
        for (size_t i = 0; i < 5; i++) IO_WRITE(path, gone[i], H5Ldelete(file, gone[i], H5P_DEFAULT));
        io_put(path, file, gone[2], f32, 1, three, NULL, NULL, NULL);                 /* wrong shape */
        io_put(path, file, gone[3], type, 1, hidden, NULL, NULL, NULL);               /* wrong type */
        H5Lcreate_soft("/model/language/output_layer.weight", file, gone[0], H5P_DEFAULT, H5P_DEFAULT);
        H5Lcreate_external("other.h5", "/x", file, gone[1], H5P_DEFAULT, H5P_DEFAULT);
        io_put(path, file, "/model/language/decoder.layers.99.mixer.D", f32, 1, three, NULL, NULL, NULL);
        H5Tclose(type);
        H5Tclose(f32);
        H5Fclose(file);
    }
    comm_host_barrier(world);
    expect_refusal(&j, "edited", &plain, (const char *const[]){
        "/model/language/decoder.final_norm.weight: is a soft link", "/model/language/decoder.final_norm.weight: missing",
        "/model/projector/encoder.weight: is an external or user-defined link", "/model/projector/encoder.weight: missing",
        "decoder.layers.0.mixer.D: has shape [3], this model needs [",
        "in_proj.layer_norm_weight: has type another type, this model needs float32",
        "/model/language/decoder.layers.99.mixer.D: unexpected", "/optimizer/language/output_layer.weight/master: missing", NULL });
    job_close(&j);
}

static void copy_file(const char *from, const char *to, int64_t bytes)
{
    char text[3 * IO_PATH];
    snprintf(text, sizeof text, "head -c %lld '%s' > '%s'", (long long)bytes, from, to);
    CHECK_SYS(system(text) == 0, EXIT_INTERNAL, "%s", text);
}

static void unusable_files_are_refused(void **unused)
{
    struct job j;
    char path[IO_PATH], keep[IO_PATH];
    job_open(&j, world, "");
    save_here(&j, "bad");
    checkpoint_file(path, "bad", 7);
    in_scratch(keep, "kept.h5");
    static const char *const said[] = { "cannot open", "is incomplete", "is no checkpoint of mimo", "format version 99", "symbolic link",
                                        "No such file" };
    if (world->rank == 0) CHECK_SYS(rename(path, keep) == 0, EXIT_INTERNAL, "test");
    for (int what = 0; what < 6; what++) {
        if (world->rank == 0) {
            struct stat st;
            CHECK_SYS(stat(keep, &st) == 0, EXIT_INTERNAL, "test");
            unlink(path);
            if (what < 4) copy_file(keep, path, what == 0 ? st.st_size / 2 : st.st_size);
            if (what == 4) CHECK_SYS(symlink(keep, path) == 0, EXIT_INTERNAL, "test");
            if (what >= 1 && what <= 3) {
                hid_t file = io_open(path, true);
                H5Adelete(file, what == 1 ? "complete" : what == 2 ? "format" : "format_version");
                if (what == 2) io_attr_string(path, file, "format", "mimo-trace");
                if (what == 3) io_attr_i64(path, file, "format_version", 99);
                H5Fclose(file);
            }
        }
        comm_host_barrier(world);
        expect_refusal(&j, "bad", &plain, (const char *const[]){ said[what], NULL });
    }
    job_close(&j);
}

static void another_model_streams_or_layout_is_refused_with_both_values(void **unused)
{
    struct job j, k;
    char path[IO_PATH];
    job_open(&j, world, "");
    save_here(&j, "other");
    job_open(&k, world, "moe.moe_router_topk=3");
    expect_refusal(&k, "other", &plain, (const char *const[]){ "was written with moe.moe_router_topk = 2, this run has 3", NULL });
    job_close(&k);
    j.state.n_train_streams = 2;
    expect_refusal(&j, "other", &plain, (const char *const[]){ "positions of 3 training streams, this run reads 2", NULL });
    j.state.n_train_streams = 3;
    j.state.n_valid_streams = 0;           /* validation switched off is no reason */
    struct errors e = { 0 };
    bool has = false;
    checkpoint_load(in_scratch(path, "other"), 7, &j.deck, &j.topo, &j.model, &j.state, &plain, &has, &e);
    agree(e.count == 0 && has);
    struct comm *alone = comm_split(world, world->rank == 0 ? 0 : -1, "alone");
    bool ok = true;
    if (alone && world->size > 1) {
        job_open(&k, alone, "");
        checkpoint_load(path, 7, &k.deck, &k.topo, &k.model, &k.state, &plain, &has, &e);
        ok = e.count == 1 && strstr(e.line[0], "colocated on 1 rank") && strstr(e.line[0], "disjoint on") && !has;
        errors_free(&e);
        e = (struct errors){ 0 };
        checkpoint_load(path, 7, &k.deck, &k.topo, &k.model, &k.state, &(struct checkpoint_options){ .finetune = true }, &has, &e);
        ok = ok && e.count == 0;           /* weights alone do not depend on it */
        job_close(&k);
    }
    if (alone) comm_free(alone);
    errors_free(&e);
    agree(ok);
    job_close(&j);
}

static void write_text(const char *path, const char *text)
{
    FILE *f = fopen(path, "w");
    CHECK_SYS(f && fputs(text, f) >= 0 && fclose(f) == 0, EXIT_INTERNAL, "%s", path);
}

static void tracker_is_checked(void **unused)
{
    struct job j;
    char dir[IO_PATH], path[IO_PATH];
    job_open(&j, world, "");
    save_here(&j, "tracked");
    in_scratch(dir, "tracked");
    in_scratch(path, "tracked/latest_checkpointed_iteration.txt");
    static const struct { const char *text; int64_t step, found; const char *said; } test[] = {
        { "7\n", -1, 7, NULL }, { "7", -1, 7, NULL }, { "12\n", -1, 12, "names iteration 12" }, { "release\n", -1, -1, "holds 'release'" },
        { "", -1, -1, "holds ''" }, { "7 8", -1, -1, "holds '7 8'" }, { "-7", -1, -1, "holds '-7'" },
        { "99999999999999999999", -1, -1, "holds '9999" }, { NULL, -1, -1, NULL }, { NULL, 7, 7, NULL },
        { "7\n", 3, 3, "ckpt_step names iteration 3" },
    };
    for (size_t i = 0; i < sizeof test / sizeof test[0]; i++) {
        struct errors e = { 0 };
        if (world->rank == 0) {
            if (test[i].text) write_text(path, test[i].text);
            else unlink(path);
        }
        comm_host_barrier(world);
        bool ok = checkpoint_find(dir, test[i].step, &j.topo, &e) == test[i].found;
        if (world->rank == 0) ok = ok && (test[i].said ? e.count == 1 && told(&e, test[i].said) : e.count == 0);
        if (!ok) print_message("  case %zu\n", i);
        errors_free(&e);
        agree(ok);
    }
    job_close(&j);
}

static int entries(const char *name, const char *prefix)
{
    char path[IO_PATH];
    int n = 0;
    DIR *d = opendir(in_scratch(path, name));
    for (struct dirent *e; d && (e = readdir(d)) != NULL; ) n += strncmp(e->d_name, prefix, strlen(prefix)) == 0;
    if (d) closedir(d);
    return n;
}

static bool exists(const char *name)
{
    char path[IO_PATH];
    return access(in_scratch(path, name), F_OK) == 0;
}

static void retention_keeps_last_interval_and_tracked(void **unused)
{
    struct job j;
    char dir[IO_PATH], path[IO_PATH];
    bool ok = true;
    job_open(&j, world, "");
    for (j.state.iteration = 1; j.state.iteration <= 6; j.state.iteration++)
        checkpoint_save(in_scratch(dir, "kept"), &j.deck, &j.topo, &j.model, &j.state, false);
    if (world->rank == 0) {
        ok = mkdir(in_scratch(path, "kept/iter_0000009"), 0777) == 0          /* newer than the tracker */
             && symlink("/tmp", in_scratch(path, "kept/iter_0000000")) == 0;
    }
    checkpoint_retain(dir, 0, 0, &j.topo);
    if (world->rank == 0) ok = ok && entries("kept", "iter_") == 8;
    checkpoint_retain(dir, 2, 3, &j.topo);
    if (world->rank == 0)
        ok = ok && entries("kept", "iter_") == 5 && exists("kept/iter_0000003") && exists("kept/iter_0000005")
             && exists("kept/iter_0000006") && exists("kept/iter_0000009") && exists("kept/iter_0000000") && entries("kept", ".trash") == 0;
    agree(ok);
    checkpoint_retain(dir, 0, 4, &j.topo);
    if (world->rank == 0) ok = entries("kept", "iter_") == 3 && exists("kept/iter_0000006");
    agree(ok);
    job_close(&j);
}

static void saving_an_iteration_again_replaces_it_and_leftovers_go(void **unused)
{
    struct job j;
    struct errors e = { 0 };
    char dir[IO_PATH], path[IO_PATH];
    bool has, ok = true;
    job_open(&j, world, "");
    scribble(&j, 3);
    save_here(&j, "again");
    if (world->rank == 0) {
        char name[IO_PATH], host[300];
        gethostname(host, sizeof host);
        host[strcspn(host, "/")] = 0;
        snprintf(name, sizeof name, "again/.tmp-iter_0000003-%s-999999999", host);      /* of a process that is gone */
        ok = mkdir(in_scratch(path, name), 0777) == 0;
        strcat(path, "/checkpoint.h5");
        write_text(path, "torn");
        snprintf(name, sizeof name, "again/.tmp-iter_0000004-another-host-1");          /* maybe alive elsewhere */
        ok = ok && mkdir(in_scratch(path, name), 0777) == 0;
    }
    scribble(&j, 4);
    save_here(&j, "again");
    scribble(&j, 0);
    checkpoint_load(in_scratch(dir, "again"), 7, &j.deck, &j.topo, &j.model, &j.state, &plain, &has, &e);
    ok = ok && e.count == 0 && scribbled(&j, 4, 4);
    if (world->rank == 0) ok = ok && entries("again", ".tmp-iter_0000004") == 1 && entries("again", ".") == 3 && entries("again", "iter_") == 1;
    agree(ok);
    job_close(&j);
}

static void inspector_reads_a_good_file_and_refuses_foreign_ones(void **unused)
{
    struct job j;
    char path[IO_PATH], *text = NULL;
    size_t size = 0;
    bool ok = true;
    job_open(&j, world, "");
    save_here(&j, "inspected");
    if (world->rank == 0) {
        FILE *f = open_memstream(&text, &size);
        ok = io_inspect(checkpoint_file(path, "inspected", 7), f) == EXIT_OK;
        fclose(f);
        ok = ok && strstr(text, "mimo-checkpoint") && strstr(text, "iteration                7") && strstr(text, "in_proj.weight")
             && strstr(text, "blocks agree with their checksums") && strstr(text, "language.preset = 'tiny'") && strstr(text, "vocabulary 500");
        free(text);
        f = fopen("/dev/null", "w");
        write_text(in_scratch(path, "text.h5"), "no HDF5 at all\n");
        ok = ok && io_inspect(path, f) == EXIT_CHECKPOINT && io_inspect("/nonexistent.h5", f) == EXIT_CHECKPOINT
             && io_inspect("/tmp", f) == EXIT_CHECKPOINT;
        in_scratch(path, "foreign.h5");
        H5Fclose(io_create(path, false));
        ok = ok && io_inspect(path, f) == EXIT_CHECKPOINT;
        fclose(f);
    }
    agree(ok);
    job_close(&j);
}

/* ---- trace -------------------------------------------------------------------------------------------------------------- */

static void write_rows(struct trace *t, const struct job *j, int64_t first, int64_t n)
{
    int64_t tokens[64];
    for (int64_t r = first; r < first + n; r++) {
        struct trace_row row = { .iteration = r + 1, .consumed_samples = 8 * (r + 1), .num_tokens = 1000 + r, .num_zeros = -1,
            .lm_loss = r == 2 ? NAN : 6.0 - 0.1 * (double)r, .grad_norm = 1.0 / (double)(r + 1), .params_norm = NAN, .skipped = r == 2,
            .peak_bytes = 1000 * world->rank + r };
        for (int i = 0; i < TRACE_SECTIONS; i++) row.section_seconds[i] = (float)(world->rank + 10 * i + 100 * r);
        int64_t per_row = 2 * j->deck.moe.num_experts;
        for (int64_t i = 0; i < per_row && i < 64; i++) tokens[i] = 100 * r + i;
        row.tokens_per_expert = world->rank == 0 ? tokens : NULL;
        trace_write(t, r, &row);
    }
}

/* Rows [0, n) of the file are what write_rows wrote; `ranks` of them wrote columns. */
static bool rows_are_right(const char *path, int64_t n, int64_t total, int ranks, int64_t from_rank_row)
{
    hid_t file = io_open(path, false);
    int64_t rows = -1, shape[TENSOR_MAX_DIMS], start[2] = { 0, 0 }, count[2] = { n, 0 };
    bool ok = file >= 0 && io_get(file, "/rows", H5T_NATIVE_INT64, 1, &rows) && rows == n && io_get_shape(file, "/iteration", shape) == 1
              && shape[0] == total && io_get_shape(file, "/ranks/backward_seconds", shape) == 2 && shape[0] == total && shape[1] >= ranks;
    count[1] = shape[1];
    double *loss = xcalloc((size_t)n, sizeof *loss);
    float *seconds = xcalloc((size_t)(n * shape[1]), sizeof *seconds);
    hid_t a = H5Dopen2(file, "/lm_loss", H5P_DEFAULT), b = H5Dopen2(file, "/ranks/backward_seconds", H5P_DEFAULT);
    ok = ok && io_get_box(a, H5T_NATIVE_DOUBLE, 1, start, count, loss) && io_get_box(b, H5T_NATIVE_FLOAT, 2, start, count, seconds);
    for (int64_t r = 0; ok && r < n; r++) {
        ok = r == 2 ? isnan(loss[r]) : loss[r] == 6.0 - 0.1 * (double)r;
        for (int64_t k = 0; ok && r >= from_rank_row && k < ranks; k++) ok = seconds[r * shape[1] + k] == (float)(k + 10 + 100 * r);
        for (int64_t k = ranks; ok && r >= from_rank_row && k < shape[1]; k++) ok = isnan(seconds[r * shape[1] + k]);
    }
    int64_t tokens[2 * 8] = { 0 };
    hid_t c = H5Dopen2(file, "/moe/tokens_per_expert", H5P_DEFAULT);
    ok = ok && io_get_box(c, H5T_NATIVE_INT64, 3, (int64_t[3]){ n - 1, 0, 0 }, (int64_t[3]){ 1, 2, 8 }, tokens);
    for (int i = 0; ok && i < 16; i++) ok = tokens[i] == 100 * (n - 1) + i;
    H5Dclose(a);
    H5Dclose(b);
    H5Dclose(c);
    H5Fclose(file);
    free(loss);
    free(seconds);
    return ok;
}

static int64_t eval_rows(const char *path)
{
    int64_t n = -1;
    hid_t file = io_open(path, false);
    io_get(file, "/eval/rows", H5T_NATIVE_INT64, 1, &n);
    H5Fclose(file);
    return n;
}

static void trace_is_laid_out_once_continued_and_lengthened(void **unused)
{
    struct job j;
    char path[IO_PATH];
    int64_t arena[ARENA_COUNT];
    struct stat before, after;
    bool ok = true;
    job_open(&j, world, "");
    for (int i = 0; i < ARENA_COUNT; i++) arena[i] = 10 * world->rank + i;
    in_scratch(path, "trace.h5");
    struct trace *t = trace_open(path, &j.deck, &j.topo, 2, 10, 0, 4, arena);
    trace_write_eval(t, 0, 6.5, 6.6);
    write_rows(t, &j, 0, 5);
    trace_write_eval(t, 5, 5.5, NAN);
    trace_write_eval(t, 5, 5.4, NAN);      /* the same iteration again */
    write_rows(t, &j, 5, 2);
    trace_write_eval(t, 7, 5.0, NAN);
    comm_host_barrier(world);
    if (world->rank == 0) ok = rows_are_right(path, 7, 10, world->size, 0) && eval_rows(path) == 3 && stat(path, &before) == 0;   /* live */
    trace_close(t);
    agree(ok);

    t = trace_open(path, &j.deck, &j.topo, 2, 10, 5, 4, arena);        /* resumed at iteration 5 */
    if (world->rank == 0)
        ok = rows_are_right(path, 5, 10, world->size, 0) && eval_rows(path) == 2 && stat(path, &after) == 0 && before.st_ino == after.st_ino;
    agree(ok);
    write_rows(t, &j, 5, 5);
    trace_write_eval(t, 10, 4.9, 5.9);
    comm_host_barrier(world);
    if (world->rank == 0) ok = rows_are_right(path, 10, 10, world->size, 0);
    trace_close(t);
    agree(ok);

    t = trace_open(path, &j.deck, &j.topo, 2, 15, 10, 6, arena);       /* a longer run */
    write_rows(t, &j, 10, 3);
    comm_host_barrier(world);
    if (world->rank == 0)
        ok = rows_are_right(path, 13, 15, world->size, 0) && eval_rows(path) == 3 && stat(path, &after) == 0 && before.st_ino != after.st_ino;
    trace_close(t);
    agree(ok);
    job_close(&j);
}

static void trace_of_more_ranks_keeps_its_columns(void **unused)
{
    struct job j;
    char path[IO_PATH];
    int64_t arena[ARENA_COUNT] = { 1 };
    bool ok = true;
    job_open(&j, world, "");
    in_scratch(path, "ranks.h5");
    struct trace *t = trace_open(path, &j.deck, &j.topo, 2, 8, 0, 0, arena);
    write_rows(t, &j, 0, 4);
    trace_close(t);
    job_close(&j);
    struct comm *alone = comm_split(world, world->rank == 0 ? 0 : -1, "alone");
    if (alone) {
        job_open(&j, alone, "");
        t = trace_open(path, &j.deck, &j.topo, 2, 8, 4, 0, arena);
        ok = rows_are_right(path, 4, 8, world->size, 0);
        write_rows(t, &j, 4, 2);
        ok = ok && rows_are_right(path, 6, 8, 1, 4);
        trace_close(t);
        job_close(&j);
        comm_free(alone);
    }
    agree(ok);
}

static void trace_is_read_live_by_h5py(void **unused)
{
    struct job j;
    char path[IO_PATH], command[3 * IO_PATH];
    int64_t arena[ARENA_COUNT] = { 1 };
    bool ok = true, have = system("/usr/bin/python3 -c 'import h5py' > /dev/null 2>&1") == 0;
    int64_t all = have;
    comm_host_reduce_i64(world, &all, 1, COMM_MIN);
    if (!all) skip();
    job_open(&j, world, "");
    in_scratch(path, "live.h5");
    struct trace *t = trace_open(path, &j.deck, &j.topo, 2, 100, 0, 2, arena);
    write_rows(t, &j, 0, 4);
    comm_host_barrier(world);
    if (world->rank == 0) {
        snprintf(command, sizeof command, "/usr/bin/python3 -c \"\nimport h5py, math\nf = h5py.File('%s', 'r', locking=False)\n"
                 "n = int(f['rows'][()])\nassert n == 4 and f.attrs['format'] == 'mimo-trace'\n"
                 "assert list(f['iteration'][:n]) == [1, 2, 3, 4] and math.isnan(f['lm_loss'][2])\n"
                 "assert f['ranks/forward_seconds'][3, %d] == 300 + %d\n"
                 "assert list(f['ranks/arena_bytes'].attrs['arenas'])[0] == 'params'\n"
                 "assert f['deck'].attrs['run.train_iters'] == '10' and b'&run' in f['deck/text'][()]\n"
                 "assert f['code'].attrs['version']\n"
                 "def check(name, x):\n    assert not isinstance(x, h5py.Dataset) or name == 'deck/text' "
                 "or (x.attrs['units'] and x.attrs['description']), name\n"
                 "f.visititems(check)\n\"", path, world->size - 1, world->size - 1);
        ok = system(command) == 0;
    }
    trace_close(t);
    job_close(&j);
    agree(ok);
}

/* ---- batches ------------------------------------------------------------------------------------------------------------ */

static void batches_lie_in_the_order_of_the_global_batch(void **unused)
{
    struct job j;
    char path[IO_PATH];
    bool ok = true;
    job_open(&j, world, "stage.training_stage=3");
    const int64_t gbs = 8, nmb = j.deck.derived.num_microbatches, S = j.deck.language.seq_length, p = j.deck.vision.patch_dim;
    struct batch_dump *d = batch_dump_open(in_scratch(path, "batches.h5"), &j.deck, &j.topo);
    struct data_limits l = { .seq_length = S, .max_patches_per_sample = 64, .max_tiles_per_sample = 4 };
    struct text_batch text;
    struct picture_batch pictures;
    const int64_t whole = gbs / nmb, embs = j.deck.derived.encoder_microbatch;
    text_batch_init(&text, &l, 1);
    picture_batch_init(&pictures, &l, embs, 3 * p * p, false);
    for (int iteration = 1; iteration <= 2; iteration++) {
        for (int64_t m = 0; m < nmb; m++) {
            int64_t row = m * whole + j.topo.language.dp_rank;
            text.samples = 1;
            text.seq_length = S;
            for (int64_t s = 0; s < S; s++) {
                text.input_ids[s] = 1000 * row + s;
                text.labels[s] = 1000 * row + s + 1;
                text.loss_mask[s] = (float)(row + 100 * iteration);
            }
            snprintf(text.key[0], 256, "mock:%d", (int)row);
            pictures.samples = embs;
            pictures.tiles = pictures.patches = 0;
            for (int64_t s = 0; j.topo.encoder.member && s < embs; s++) {
                int64_t sample = m * whole + j.topo.encoder.dp_rank * embs + s;
                pictures.tiles_per_sample[s] = sample % 3;      /* none for some */
                for (int64_t k = 0; k < sample % 3; k++, pictures.tiles++) {
                    pictures.tile_size[pictures.tiles][0] = (int32_t)((2 + k) * p);
                    pictures.tile_size[pictures.tiles][1] = (int32_t)(2 * p);
                    for (int c = 0; c < 4; c++) pictures.cpe[pictures.tiles][c] = (double)(10 * sample + k);
                    for (int64_t n = 0; n < (2 + k) * 2; n++, pictures.patches++)
                        for (int64_t c = 0; c < 3 * p * p; c++)
                            ((float *)pictures.pixels)[pictures.patches * 3 * p * p + c] = (float)(100 * sample + 10 * k);
                }
            }
            batch_dump_add(d, m, j.topo.language.member ? &text : NULL, j.topo.encoder.member ? &pictures : NULL);
        }
        batch_dump_write(d, iteration);
    }
    batch_dump_close(d);
    d = batch_dump_open(path, &j.deck, &j.topo);       /* a resumed run keeps what is there and does an iteration anew */
    batch_dump_write(d, 3);
    batch_dump_write(d, 3);
    batch_dump_close(d);
    if (world->rank == 0) {
        hid_t file = io_open(path, false);
        int64_t ids[8 * 4096], shape[TENSOR_MAX_DIMS], tiles_per_sample[8];
        float mask[8 * 4096], *pixels = NULL;
        double cpe[4 * 16];
        char keys[8][256];
        hid_t key = H5Tcopy(H5T_C_S1);
        H5Tset_size(key, 256);
        H5Tset_strpad(key, H5T_STR_NULLPAD);
        H5Tset_cset(key, H5T_CSET_UTF8);
        ok = S <= 4096 && io_get(file, "/iteration_000001/input_ids", H5T_NATIVE_INT64, gbs * S, ids)
             && io_get(file, "/iteration_000002/loss_mask", H5T_NATIVE_FLOAT, gbs * S, mask)
             && io_get(file, "/iteration_000001/tiles_per_sample", H5T_NATIVE_INT64, gbs, tiles_per_sample)
             && io_get(file, "/iteration_000001/sample_key", key, gbs, keys);
        for (int64_t r = 0; ok && r < gbs; r++) {
            char name[32];
            snprintf(name, sizeof name, "mock:%d", (int)r);
            ok = strcmp(keys[r], name) == 0 && tiles_per_sample[r] == r % 3;
            for (int64_t s = 0; ok && s < S; s++) ok = ids[r * S + s] == 1000 * r + s && mask[r * S + s] == (float)(r + 200);
        }
        ok = ok && io_get_shape(file, "/iteration_000002/patches", shape) == 2;
        if (ok) {
            pixels = xcalloc((size_t)(shape[0] * shape[1]), sizeof *pixels);
            ok = io_get(file, "/iteration_000002/patches", H5T_NATIVE_FLOAT, shape[0] * shape[1], pixels)
                 && io_get(file, "/iteration_000002/cpe", H5T_NATIVE_DOUBLE, 4 * 7, cpe);
        }
        for (int64_t r = 0, patch = 0, tile = 0; ok && r < gbs; r++)
            for (int64_t k = 0; ok && k < r % 3; k++, tile++) {
                ok = cpe[4 * tile + 3] == (double)(10 * r + k);
                for (int64_t n = 0; ok && n < (2 + k) * 2; n++, patch++)
                    ok = pixels[patch * 3 * p * p] == (float)(100 * r + 10 * k) && pixels[(patch + 1) * 3 * p * p - 1] == (float)(100 * r + 10 * k);
            }
        free(pixels);
        H5Tclose(key);
        H5Fclose(file);
    }
    agree(ok);
    text_batch_free(&text);
    picture_batch_free(&pictures);
    job_close(&j);
}

int main(int argc, char **argv)
{
    char why[256], command[2 * IO_PATH];
    if (!comm_start(&argc, &argv, &world, why, sizeof why)) {
        fprintf(stderr, "%s\n", why);
        return 3;
    }
    check_on_abort(comm_abort);
    check_identify(world->rank, world->size, "test", NULL);
    io_start();
    snprintf(scratch, sizeof scratch, "%s/mimo-io-XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    if (world->rank == 0) CHECK_SYS(mkdtemp(scratch) != NULL, EXIT_ENVIRONMENT, "%s", scratch);
    comm_host_broadcast(world, scratch, sizeof scratch, 0);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(p12_slabs_of_in_proj_blocks_for_tp_1_and_2),
        cmocka_unit_test(slabs_cut_columns_and_experts),
        cmocka_unit_test(owners_are_the_first_replicas),
        cmocka_unit_test(shards_land_in_logical_rows_and_any_other_sharding_reads_them),
        cmocka_unit_test(saved_and_loaded_is_bitwise_equal),
        cmocka_unit_test(fp64_run_comes_back_bitwise),
        cmocka_unit_test(weights_only_and_without_optimizer),
        cmocka_unit_test(initial_weights_are_bitwise_equal_for_every_number_of_ranks),
        cmocka_unit_test(flipped_bytes_are_named),
        cmocka_unit_test(every_mismatched_tensor_is_listed),
        cmocka_unit_test(unusable_files_are_refused),
        cmocka_unit_test(another_model_streams_or_layout_is_refused_with_both_values),
        cmocka_unit_test(tracker_is_checked),
        cmocka_unit_test(retention_keeps_last_interval_and_tracked),
        cmocka_unit_test(saving_an_iteration_again_replaces_it_and_leftovers_go),
        cmocka_unit_test(inspector_reads_a_good_file_and_refuses_foreign_ones),
        cmocka_unit_test(trace_is_laid_out_once_continued_and_lengthened),
        cmocka_unit_test(trace_of_more_ranks_keeps_its_columns),
        cmocka_unit_test(trace_is_read_live_by_h5py),
        cmocka_unit_test(batches_lie_in_the_order_of_the_global_batch),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    comm_host_barrier(world);
    snprintf(command, sizeof command, getenv("KEEP") ? "true" : "rm -rf '%s'", scratch);
    if (world->rank == 0 && system(command) != 0) failed++;
    comm_finish(world);
    return failed;
}
