/* io_fixture.h - a job of any size on the tiny model, numbers that tell where they belong, a
 * scratch directory: for mpi_io*.c.
 *
 * Every rank runs every test in the same order. Findings of one rank reach all before they are
 * asserted (agree), so that a failure does not leave the others in a collective call.
 */
#ifndef MIMO_IO_FIXTURE_H
#define MIMO_IO_FIXTURE_H

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
#include "io_tensors.h"
#include "mpi_world.h"

static struct comm *world;
static char scratch[IO_PATH];

struct job { /* a program's worth of objects on some ranks */
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

static inline void agree(bool ok)
{
    int64_t v = ok;
    comm_host_reduce_i64(world, &v, 1, COMM_MIN);
    assert_true(v);
}

static inline void job_open(struct job *j, struct comm *comm, const char *override)
{
    static const char text[] =
        "&run backend = 'ref' train_iters = 10 /\n&language preset = 'tiny' /\n"
        "&batch global_batch_size = 8 /\n&lr lr = 1e-3 /\n";
    struct errors e = { 0 };
    char *copy = xstrdup(override);
    memset(j, 0, sizeof *j);
    deck_read(&j->deck, "test", text, strlen(text), override[0] ? 1 : 0, &copy, &e);
    free(copy);
    deck_resolve(&j->deck, comm->size, &e);
    topology_init(&j->topo, &j->deck, comm->size, comm->rank, &e);
    if (e.count)
        errors_print(&e);
    assert_int_equal(e.count, 0);
    topology_connect(&j->topo, comm);
    j->be = backend_select(&j->deck);
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
    for (int i = 0; i < 3; i++)
        j->train_position[i] = 100 + i;
    for (int i = 0; i < 2; i++)
        j->valid_position[i] = 200 + i;
    j->state = (struct train_state){ .iteration = 7,
                                     .consumed_train_samples = 56,
                                     .consumed_valid_samples = 3,
                                     .skipped_train_samples = 8,
                                     .optim_step = 6,
                                     .n_train_streams = 3,
                                     .n_valid_streams = 2,
                                     .train_position = j->train_position,
                                     .valid_position = j->valid_position };
    lr_init(&j->state.lr, &j->deck);
    j->state.lr.n = 48;
}

static inline void job_close(struct job *j)
{
    model_free(&j->model);
    arenas_free(&j->arenas, j->be);
    j->be->stream_destroy(&j->stream);
    topology_free(&j->topo);
    deck_free(&j->deck);
}

static inline struct tensor *part_of(struct param *p, int part)
{
    return part == 0 ? &p->value : part == 1 ? &p->master : part == 2 ? &p->m : &p->v;
}

/* Element of the rank's shard that its memory of a part starts with. */
static inline int64_t first_of(const struct param *p, int part)
{
    return part == 0 ? 0 : p->owned;
}

static inline double get(const struct tensor *t, int64_t i)
{
    return t->dtype == DTYPE_F64 ? ((double *)t->data)[i] : (double)((float *)t->data)[i];
}

static inline void set(const struct tensor *t, int64_t i, double x)
{
    if (t->dtype == DTYPE_F64)
        ((double *)t->data)[i] = x;
    else
        ((float *)t->data)[i] = (float)x;
}

/* Numbers that tell tensor, part and element. */
static inline void scribble(struct job *j, double salt)
{
    for (int k = 0; k < j->model.n_params; k++)
        for (int part = 0; part < 4; part++) {
            struct tensor *t = part_of(&j->model.param[k], part);
            for (int64_t i = 0; t->data && i < tensor_numel(t); i++)
                set(t, i,
                    sin(salt + k + 100.0 * part +
                        1e-3 * (double)(i + first_of(&j->model.param[k], part))));
        }
}

static inline bool scribbled(struct job *j, double salt, int parts)
{
    for (int k = 0; k < j->model.n_params; k++)
        for (int part = 0; part < parts; part++) {
            struct tensor *t = part_of(&j->model.param[k], part);
            for (int64_t i = 0; t->data && i < tensor_numel(t); i++) {
                double want = sin(salt + k + 100.0 * part +
                                  1e-3 * (double)(i + first_of(&j->model.param[k], part)));
                if (get(t, i) != (t->dtype == DTYPE_F64 ? want : (double)(float)want))
                    return false;
            }
        }
    return true;
}

static inline const char *in_scratch(char out[IO_PATH], const char *name)
{
    snprintf(out, IO_PATH, "%.3000s/%.900s", scratch, name);
    return out;
}

static inline const char *checkpoint_file(char out[IO_PATH], const char *name, int iteration)
{
    snprintf(out, IO_PATH, "%.3000s/%.900s/iter_%07d/checkpoint.h5", scratch, name, iteration);
    return out;
}

/* MPI and the scratch directory; false: no MPI. */
static inline bool fixture_start(int *argc, char ***argv)
{
    world = mpi_world(argc, argv);
    if (!world)
        return false;
    io_start();
    snprintf(scratch, sizeof scratch, "%.3000s/mimo-io-XXXXXX",
             getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    if (world->rank == 0)
        CHECK_SYS(mkdtemp(scratch) != NULL, EXIT_ENVIRONMENT, "%s", scratch);
    comm_host_broadcast(world, scratch, sizeof scratch, 0);
    return true;
}

static inline int fixture_finish(int failed)
{
    char command[2 * IO_PATH];
    comm_host_barrier(world);
    snprintf(command, sizeof command, "rm -rf '%s'", scratch);
    if (world->rank == 0 && system(command) != 0)
        failed++;
    comm_finish(world);
    return failed;
}

#endif
