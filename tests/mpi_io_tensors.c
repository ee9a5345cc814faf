/* ranks: 1 2 4 8 */
/* mpi_io_tensors.c - logical tensors cut into slabs (io_tensors.c): which box of a tensor a rank
 * holds, who writes it, and that any other sharding reads it. */
#include "io_fixture.h"

/* ---- slabs --------------------------------------------------------------------------------- */

static void m6_12_slabs_of_in_proj_blocks_for_tp_1_and_2(void **unused)
{
    struct param p = { .ndim = 2,
                       .shape = { 26, 3 },
                       .shard = PARAM_SPLIT_ROWS,
                       .n_blocks = 5,
                       .block_rows = { 8, 8, 4, 4, 2 } };
    struct io_slab s[PARAM_MAX_BLOCKS];
    struct grid g = { .tp_size = 1, .ep_size = 1, .expt_tp_size = 1 };
    assert_int_equal(io_slabs(&p, &g, s), 1);
    assert_int_equal(s[0].start[0], 0);
    assert_int_equal(s[0].count[0], 26);
    g.tp_size = 2;
    const int64_t start[2][5] = { { 0, 8, 16, 20, 24 }, { 4, 12, 18, 22, 25 } },
                  count[5] = { 4, 4, 2, 2, 1 };
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

/* The boxes of any run, element by element in their order, are the run. */
static void runs_of_a_shard_are_boxes(void **unused)
{
    static const int64_t shape[][TENSOR_MAX_DIMS] = {
        { 17, 1, 1, 1 }, { 5, 7, 1, 1 }, { 3, 4, 5, 1 }, { 2, 3, 2, 3 }, { 4, 1, 6, 1 }
    };
    static const int ndim[] = { 1, 2, 3, 4, 3 };
    struct io_slab run[IO_MAX_SLABS];
    for (int k = 0; k < 5; k++) {
        struct io_slab shard[2] = { { .start = { 10, 1, 2, 3 } }, { .start = { 90, 1, 2, 3 } } };
        int64_t n = io_volume(ndim[k], shape[k]);
        for (int s = 0; s < 2; s++) {
            memcpy(shard[s].count, shape[k], sizeof shape[k]);
            shard[s].local = s * n;
        }
        for (int64_t first = 0; first < 2 * n; first++)
            for (int64_t length = 0; length <= 2 * n - first; length++) {
                int slabs = io_run_slabs(shard, 2, ndim[k], first, length, run);
                int64_t at = 0;
                assert_true(slabs <= 2 * (2 * ndim[k] - 1));
                for (int s = 0; s < slabs; s++) {
                    assert_int_equal(run[s].local, at);
                    for (int64_t i = 0; i < io_volume(ndim[k], run[s].count); i++, at++) {
                        int64_t rest = i, flat = 0, volume = io_volume(ndim[k], run[s].count);
                        const struct io_slab *in = &shard[run[s].start[0] >= 90];
                        for (int d = 0; d < ndim[k]; d++) {
                            volume /= run[s].count[d];
                            flat =
                                flat * shape[k][d] + run[s].start[d] + rest / volume - in->start[d];
                            rest %= volume;
                        }
                        assert_int_equal(in->local + flat, first + at);
                    }
                }
                assert_int_equal(at, length);
            }
    }
}

static void slabs_cut_columns_and_experts(void **unused)
{
    struct io_slab s[PARAM_MAX_BLOCKS];
    struct param cols = { .ndim = 2, .shape = { 6, 8 }, .shard = PARAM_SPLIT_COLS, .n_blocks = 1 };
    struct grid g = {
        .tp_size = 2, .tp_rank = 1, .ep_size = 4, .ep_rank = 3, .expt_tp_size = 2, .expt_tp_rank = 1
    };
    assert_int_equal(io_slabs(&cols, &g, s), 1);
    assert_int_equal(s[0].start[0], 0);
    assert_int_equal(s[0].count[0], 6);
    assert_int_equal(s[0].start[1], 4);
    assert_int_equal(s[0].count[1], 4);
    struct param expert = {
        .ndim = 3, .shape = { 8, 6, 10 }, .shard = PARAM_SPLIT_ROWS, .n_blocks = 1, .expert = true
    };
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

static void p12_88_owners_are_the_first_replicas(void **unused)
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

/* ---- tensor-parallel shards of hand-made parameters ---------------------------------------- */

enum { HAND_PARAMS = 5 };

/* Logical tensors whose elements are their own index, cut over `size` ranks by loops that share
 * nothing with io_slabs. */
static void hand_model(struct model *m, struct topology *topo, int size, int rank)
{
    static const struct param kind[HAND_PARAMS] = {
        { .name = "whole", .ndim = 1, .shape = { 24 }, .shard = PARAM_REPLICATED, .n_blocks = 1 },
        { .name = "rows.blocks",
          .ndim = 2,
          .shape = { 56, 5 },
          .shard = PARAM_SPLIT_ROWS,
          .n_blocks = 3,
          .block_rows = { 24, 24, 8 } },
        { .name = "cols", .ndim = 2, .shape = { 7, 16 }, .shard = PARAM_SPLIT_COLS, .n_blocks = 1 },
        { .name = "conv",
          .ndim = 3,
          .shape = { 16, 1, 4 },
          .shard = PARAM_SPLIT_ROWS,
          .n_blocks = 1 },
        { .name = "experts",
          .ndim = 3,
          .shape = { 8, 3, 4 },
          .shard = PARAM_REPLICATED,
          .n_blocks = 1,
          .expert = true },
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
            if (p->expert)
                mine = row / (p->shape[0] / size) == rank;
            else if (p->shard == PARAM_SPLIT_COLS)
                mine = col / (p->shape[1] / size) == rank;
            else if (p->shard == PARAM_SPLIT_ROWS) {
                int64_t rows = p->shape[0];
                for (int b = 0; p->n_blocks > 1 && b < p->n_blocks; b++) {
                    rows = p->block_rows[b];
                    if (row < first + rows)
                        break;
                    first += rows;
                }
                mine = (row - first) / (rows / size) == rank;
            }
            if (mine)
                data[n++] = (double)i;
        }
        p->value = tensor_1d(data, DTYPE_F64, PLACE_HOST, n);
    }
}

static void hand_free(struct model *m)
{
    for (int k = 0; k < m->n_params; k++)
        free(m->param[k].value.data);
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
    checkpoint_save(in_scratch(path, "shards"), &j.deck, &j.topo, &m, &state, false, true);
    bool ok = true;
    if (world->rank == 0) { /* the file holds index i at place i */
        hid_t file = io_open(checkpoint_file(path, "shards", 7), false);
        for (int k = 0; k < HAND_PARAMS; k++) {
            char name[IO_TENSOR_PATH];
            double data[512];
            int64_t n = io_volume(m.param[k].ndim, m.param[k].shape);
            snprintf(name, sizeof name, "/model/language/%s", m.param[k].name);
            ok = ok && io_get(file, name, H5T_NATIVE_DOUBLE, n, data);
            for (int64_t i = 0; ok && i < n; i++)
                ok = data[i] == (double)i;
        }
        H5Fclose(file);
    }
    hand_free(&m);
    agree(ok);
    /* ranks r and size - 1 - r change places: everybody reads what another wrote, and then rank 0
     * alone reads all */
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
            for (int k = 0; k < HAND_PARAMS; k++)
                memset(m.param[k].value.data, 0, (size_t)tensor_numel(&m.param[k].value) * 8);
            checkpoint_load(in_scratch(path, "shards"), 7, &other.deck, &other.topo, &m, &state,
                            &weights, &has_optimizer, &e);
            ok = ok && e.count == 0;
            for (int i = 0; i < e.count; i++)
                print_message("  said: %s\n", e.line[i]);
            for (int k = 0; k < HAND_PARAMS; k++)
                ok = ok && memcmp(m.param[k].value.data, want.param[k].value.data,
                                  (size_t)tensor_numel(&want.param[k].value) * 8) == 0;
            hand_free(&m);
            hand_free(&want);
            job_close(&other);
            if (alone)
                comm_free(comm);
        }
        agree(ok);
    }
    errors_free(&e);
    job_close(&j);
}

int main(int argc, char **argv)
{
    if (!fixture_start(&argc, &argv))
        return EXIT_ENVIRONMENT;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(m6_12_slabs_of_in_proj_blocks_for_tp_1_and_2),
        cmocka_unit_test(slabs_cut_columns_and_experts),
        cmocka_unit_test(runs_of_a_shard_are_boxes),
        cmocka_unit_test(p12_88_owners_are_the_first_replicas),
        cmocka_unit_test(shards_land_in_logical_rows_and_any_other_sharding_reads_them),
    };
    return fixture_finish(cmocka_run_group_tests(tests, NULL, NULL));
}
