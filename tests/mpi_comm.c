/* ranks: 1 2 4 8 */
/* mpi_comm.c - every call of comm.h over MPI against what arithmetic says, and the communicators of
 * the grids. A failure is a failed ASSERT, which ends all ranks.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "backend.h"
#include "check.h"
#include "comm.h"
#include "timer.h"
#include "topology.h"
#include "mpi_world.h"

enum { GUARD = 77 };

static const enum dtype dtypes[] = { DTYPE_F32, DTYPE_F64, DTYPE_I32,
                                     DTYPE_I64, DTYPE_U8,  DTYPE_BF16 };

static void put(void *data, enum dtype dtype, int64_t i, double x)
{
    float f = (float)x;
    uint32_t bits;
    switch (dtype) {
    case DTYPE_F32: ((float *)data)[i] = f; break;
    case DTYPE_F64: ((double *)data)[i] = x; break;
    case DTYPE_I32: ((int32_t *)data)[i] = (int32_t)x; break;
    case DTYPE_I64: ((int64_t *)data)[i] = (int64_t)x; break;
    case DTYPE_U8: ((uint8_t *)data)[i] = (uint8_t)x; break;
    case DTYPE_BF16:
        memcpy(&bits, &f, sizeof bits);
        ((uint16_t *)data)[i] = (uint16_t)(bits >> 16);
        break;
    }
}

static double get(const void *data, enum dtype dtype, int64_t i)
{
    uint32_t bits;
    float f;
    switch (dtype) {
    case DTYPE_F32: return ((const float *)data)[i];
    case DTYPE_F64: return ((const double *)data)[i];
    case DTYPE_I32: return ((const int32_t *)data)[i];
    case DTYPE_I64: return (double)((const int64_t *)data)[i];
    case DTYPE_U8: return ((const uint8_t *)data)[i];
    default:
        bits = (uint32_t)((const uint16_t *)data)[i] << 16;
        memcpy(&f, &bits, sizeof f);
        return f;
    }
}

/* Small integers: exact in every type, also summed over 8 ranks. */
static double part(int rank, int64_t i)
{
    return (double)((i * 7 + rank * 3) % 13);
}

static double combined(int size, int64_t i, enum comm_op op)
{
    double x = part(0, i);
    for (int r = 1; r < size; r++) {
        const double y = part(r, i);
        x = op == COMM_SUM ? x + y : op == COMM_MAX ? fmax(x, y) : fmin(x, y);
    }
    return x;
}

static void test_reductions_are_exact_for_all_types_and_lengths(struct comm *c)
{
    const int64_t length[] = { 0, 1, 2, 7, 8, 9, 1000, 4097, 100003 };
    for (size_t t = 0; t < sizeof dtypes / sizeof *dtypes; t++)
        for (int op = COMM_SUM; op <= COMM_MIN; op++)
            for (size_t k = 0; k < sizeof length / sizeof *length; k++) {
                const int64_t n = length[k];
                const size_t width = dtype_bytes(dtypes[t]);
                char *x = xmalloc((size_t)n + 1, width),
                     *all = xmalloc((size_t)(n * c->size) + 1, width);
                put(x, dtypes[t], n, GUARD);
                for (int64_t i = 0; i < n; i++)
                    put(x, dtypes[t], i, part(c->rank, i));
                struct tensor tx = tensor_1d(x, dtypes[t], PLACE_HOST, n);
                comm_mpi.all_reduce(c, &tx, (enum comm_op)op, NULL);
                for (int64_t i = 0; i < n; i++)
                    ASSERT(get(x, dtypes[t], i) == combined(c->size, i, (enum comm_op)op));
                ASSERT(get(x, dtypes[t], n) == GUARD);
                for (int64_t i = 0; i < n * c->size; i++)
                    put(all, dtypes[t], i, part(c->rank, i));
                const struct tensor ta = tensor_1d(all, dtypes[t], PLACE_HOST, n * c->size);
                comm_mpi.reduce_scatter(c, &ta, &tx, (enum comm_op)op, NULL);
                for (int64_t i = 0; i < n; i++)
                    ASSERT(get(x, dtypes[t], i) ==
                           combined(c->size, c->rank * n + i, (enum comm_op)op));
                ASSERT(get(x, dtypes[t], n) == GUARD);
                free(x);
                free(all);
            }
}

static void test_sums_are_bitwise_reproducible_and_in_rank_order(struct comm *c)
{
    /* The longest is more than one piece of the long algorithm. */
    const int64_t length[] = { 3, 64, 5000, 2500000 };
    for (int wide = 0; wide < 2; wide++)
        for (size_t k = 0; k < sizeof length / sizeof *length; k++) {
            const int64_t n = (length[k] + c->size - 1) / c->size * c->size, own = n / c->size;
            const enum dtype dtype = wide ? DTYPE_F64 : DTYPE_F32;
            const size_t width = dtype_bytes(dtype);
            char *x = xmalloc((size_t)n, width), *first = xmalloc((size_t)n, width),
                 *y = xmalloc((size_t)n, width);
            const struct tensor tx = tensor_1d(x, dtype, PLACE_HOST, n);
            for (int run = 0; run < 3; run++) {
                for (int64_t i = 0; i < n; i++)
                    put(x, dtype, i,
                        sin(1.0 + (double)i * 0.37 + c->rank * 11.1) * (i % 5 ? 1 : 1e6));
                comm_mpi.all_reduce(c, &tx, COMM_SUM, NULL);
                if (run == 0)
                    memcpy(first, x, (size_t)n * width);
                ASSERT(memcmp(first, x, (size_t)n * width) == 0);
            }
            for (int64_t i = 0; i < n; i += 1 + n / 1000) {
                double sum = 0;
                for (int r = 0; r < c->size; r++) {
                    const double v = sin(1.0 + (double)i * 0.37 + r * 11.1) * (i % 5 ? 1 : 1e6);
                    sum += wide ? v : (double)(float)v;
                }
                ASSERT(get(x, dtype, i) == (wide ? sum : (double)(float)sum));
            }
            /* The same on all ranks. */
            memcpy(y, x, (size_t)n * width);
            const struct tensor ty = tensor_1d(y, dtype, PLACE_HOST, n);
            comm_mpi.broadcast(c, &ty, c->size - 1, NULL);
            ASSERT(memcmp(x, y, (size_t)n * width) == 0);
            /* reduce_scatter into this rank's own part of its argument, then all_gather in place.
             */
            for (int64_t i = 0; i < n; i++)
                put(y, dtype, i, sin(1.0 + (double)i * 0.37 + c->rank * 11.1) * (i % 5 ? 1 : 1e6));
            const struct tensor slice =
                tensor_1d(y + (size_t)(own * c->rank) * width, dtype, PLACE_HOST, own);
            comm_mpi.reduce_scatter(c, &ty, &slice, COMM_SUM, NULL);
            comm_mpi.all_gather(c, &slice, &ty, NULL);
            ASSERT(memcmp(x, y, (size_t)n * width) == 0);
            free(x);
            free(first);
            free(y);
        }
}

/* On a deferred stream several exchanges are under way at once, of two communicators; drained they
 * give the bits of the blocking calls, in place too. */
static void test_deferred_collectives_give_the_bits_of_blocking_ones(struct comm *c)
{
    enum { N = 5 };
    const int64_t length[N] = { 1, 0, 777, 300000, 5 };
    struct comm *other = comm_split(c, 0, "other");
    struct stream side = { .name = "side", .deferred = true };
    for (int repeat = 0; repeat < 3; repeat++) {
        double *now[N], *later[N];
        struct tensor all[N], own[N];
        for (int k = 0; k < N; k++) {
            const int64_t n = length[k] * c->size;
            now[k] = xcalloc((size_t)n + 1, sizeof(double));
            later[k] = xcalloc((size_t)n + 1, sizeof(double));
            for (int64_t i = 0; i < n; i++)
                now[k][i] = later[k][i] = sin((double)(i + 31 * c->rank + k + repeat)) * 1e3;
            all[k] = tensor_1d(later[k], DTYPE_F64, PLACE_HOST, n);
            own[k] = tensor_1d(later[k] + c->rank * length[k], DTYPE_F64, PLACE_HOST, length[k]);
            comm_mpi.reduce_scatter(k % 2 ? other : c, &all[k], &own[k], COMM_SUM, &side);
        }
        comm_host_barrier(c);
        for (int k = 0; k < N; k++) {
            const struct tensor a = tensor_1d(now[k], DTYPE_F64, PLACE_HOST, length[k] * c->size),
                                o = tensor_1d(now[k] + c->rank * length[k], DTYPE_F64, PLACE_HOST,
                                              length[k]);
            comm_mpi.reduce_scatter(c, &a, &o, COMM_SUM, NULL);
            comm_mpi.all_gather(c, &o, &a, NULL);
        }
        comm_mpi.drain(&side);
        ASSERT(side.pending == NULL);
        for (int k = 0; k < N; k++)
            comm_mpi.all_gather(k % 2 ? other : c, &own[k], &all[k], &side);
        comm_mpi.drain(&side);
        ASSERT(side.pending == NULL);
        for (int k = 0; k < N; k++) {
            ASSERT(memcmp(now[k], later[k], (size_t)(length[k] * c->size) * sizeof(double)) == 0);
            free(now[k]);
            free(later[k]);
        }
    }
    comm_free(other);
}

static void test_max_and_min_keep_nan(struct comm *c)
{
    double v[2] = { c->rank == c->size - 1 ? NAN : 1.0, c->rank == 0 ? NAN : -1.0 };
    comm_host_reduce_f64(c, v, 1, COMM_MAX);
    comm_host_reduce_f64(c, v + 1, 1, COMM_MIN);
    ASSERT(isnan(v[0]) && isnan(v[1]));
}

static void test_all_gather_and_broadcast_move_every_type(struct comm *c)
{
    for (size_t t = 0; t < sizeof dtypes / sizeof *dtypes; t++) {
        const int64_t n = 37;
        const size_t width = dtype_bytes(dtypes[t]);
        char *mine = xmalloc((size_t)n, width), *all = xmalloc((size_t)(n * c->size), width);
        for (int64_t i = 0; i < n; i++)
            put(mine, dtypes[t], i, part(c->rank, i));
        const struct tensor tm = tensor_1d(mine, dtypes[t], PLACE_HOST, n),
                            ta = tensor_1d(all, dtypes[t], PLACE_HOST, n * c->size);
        comm_mpi.all_gather(c, &tm, &ta, NULL);
        for (int r = 0; r < c->size; r++)
            for (int64_t i = 0; i < n; i++)
                ASSERT(get(all, dtypes[t], r * n + i) == part(r, i));
        for (int root = 0; root < c->size; root++) {
            for (int64_t i = 0; i < n; i++)
                put(mine, dtypes[t], i, part(c->rank, i));
            comm_mpi.broadcast(c, &tm, root, NULL);
            for (int64_t i = 0; i < n; i++)
                ASSERT(get(mine, dtypes[t], i) == part(root, i));
        }
        free(mine);
        free(all);
    }
}

static int64_t rows_between(int from, int to)
{
    return (from * 3 + to * 5) % 4; /* zero for some pairs */
}

static void test_all_to_all_v_packs_rows_in_rank_order(struct comm *c)
{
    enum { COLS = 5 };
    int64_t out[64], in[64], n_out = 0, n_in = 0;
    for (int r = 0; r < c->size; r++) {
        n_out += out[r] = rows_between(c->rank, r);
        n_in += in[r] = rows_between(r, c->rank);
    }
    float *send = xmalloc((size_t)(n_out * COLS) + 1, sizeof *send),
          *recv = xmalloc((size_t)(n_in * COLS) + 1, sizeof *recv);
    int64_t at = 0;
    for (int r = 0; r < c->size; r++)
        for (int64_t i = 0; i < out[r] * COLS; i++)
            send[at++] = (float)(c->rank * 10000 + r * 100 + i);
    recv[n_in * COLS] = GUARD;
    const struct tensor ts = tensor_2d(send, DTYPE_F32, PLACE_HOST, n_out, COLS),
                        tr = tensor_2d(recv, DTYPE_F32, PLACE_HOST, n_in, COLS);
    /* Deferred, a second exchange with other counts is started behind it on the same
     * communicator. */
    struct stream side = { .name = "side", .deferred = true };
    for (int deferred = 0; deferred < 2; deferred++) {
        int64_t none[64] = { 0 };
        memset(recv, 0, (size_t)(n_in * COLS) * sizeof *recv);
        comm_take_sent_bytes(c);
        comm_mpi.all_to_all_v(c, &ts, out, &tr, in, deferred ? &side : NULL);
        if (deferred) {
            comm_mpi.all_to_all_v(c, &ts, none, &tr, none, &side);
            ASSERT(side.pending != NULL);
            comm_mpi.drain(&side);
        }
        ASSERT(side.pending == NULL);
        at = 0;
        for (int r = 0; r < c->size; r++)
            for (int64_t i = 0; i < in[r] * COLS; i++)
                ASSERT(recv[at++] == (float)(r * 10000 + c->rank * 100 + i));
        ASSERT(recv[at] == GUARD);
        ASSERT(comm_take_sent_bytes(c) == (n_out - out[c->rank]) * COLS * 4 &&
               comm_take_sent_bytes(c) == 0);
    }
    free(send);
    free(recv);
}

static void test_a_bracket_of_long_messages_in_any_order_does_not_deadlock(struct comm *c)
{
    /* Far above every eager limit; all ranks send first, to all, themselves included; every other
     * payload is empty. */
    const int64_t n = 300000;
    float *send = xmalloc((size_t)n, sizeof *send),
          *recv = xmalloc((size_t)(n * c->size), sizeof *recv);
    for (int64_t i = 0; i < n; i++)
        send[i] = (float)(c->rank * 1000 + i % 1000);
    for (int round = 0; round < 3; round++) {
        memset(recv, 0, (size_t)(n * c->size) * sizeof *recv);
        comm_mpi.group_begin(c);
        for (int k = 0; k < c->size; k++) {
            const struct tensor t =
                tensor_1d(send, DTYPE_F32, PLACE_HOST, (c->rank + k) % 2 ? n : 0);
            comm_mpi.send(c, &t, k, NULL);
        }
        for (int k = c->size - 1; k >= 0; k--) {
            const struct tensor t =
                tensor_1d(recv + k * n, DTYPE_F32, PLACE_HOST, (c->rank + k) % 2 ? n : 0);
            comm_mpi.recv(c, &t, k, NULL);
        }
        comm_mpi.group_end(c, NULL);
        comm_mpi.drain(NULL);
        for (int k = 0; k < c->size; k++)
            for (int64_t i = 0; i < n; i += 997)
                ASSERT(recv[k * n + i] == ((c->rank + k) % 2 ? (float)(k * 1000 + i % 1000) : 0));
    }
    /* Plain calls, ordered by hand. */
    const struct tensor s = tensor_1d(send, DTYPE_F32, PLACE_HOST, 10),
                        r = tensor_1d(recv, DTYPE_F32, PLACE_HOST, 10);
    if (c->rank == 0)
        for (int k = 1; k < c->size; k++)
            comm_mpi.send(c, &s, k, NULL);
    else
        comm_mpi.recv(c, &r, 0, NULL);
    ASSERT(c->rank == 0 || recv[9] == 9);
    free(send);
    free(recv);
}

static void test_host_plane(struct comm *c)
{
    int64_t v[2] = { c->rank, -c->rank };
    comm_host_reduce_i64(c, v, 2, COMM_MAX);
    ASSERT(v[0] == c->size - 1 && v[1] == 0);
    double d = 1;
    comm_host_reduce_f64(c, &d, 1, COMM_SUM);
    ASSERT(d == c->size);
    char text[6] = "";
    if (c->rank == 0)
        strcpy(text, "hello");
    comm_host_broadcast(c, text, sizeof text, 0);
    ASSERT(strcmp(text, "hello") == 0);
    int all[64], root = c->size - 1;
    comm_host_gather(c, &c->rank, sizeof c->rank, c->rank == root ? all : NULL, root);
    for (int r = 0; r < c->size && c->rank == root; r++)
        ASSERT(all[r] == r);
    comm_host_barrier(c);
    int node_size, node_rank, n_nodes;
    comm_node(c, &node_size, &node_rank, &n_nodes);
    ASSERT(node_rank >= 0 && node_rank < node_size && node_size <= c->size && n_nodes >= 1 &&
           n_nodes <= c->size);
    ASSERT(strlen(comm_library()) > 0 && !strchr(comm_library(), '\n'));
}

/* Everybody with everybody, peers listed in falling order; one way only; nobody. */
static void test_host_messages_reach_their_peers_in_one_bracket(struct comm *world)
{
    enum { WORDS = 3 };
    const int n = world->size;
    int *peer = xcalloc((size_t)n, sizeof *peer), peers = 0;
    int64_t *out = xcalloc((size_t)n * WORDS, sizeof *out),
            *in = xcalloc((size_t)n * WORDS, sizeof *in);
    for (int r = n - 1; r >= 0; r--)
        if (r != world->rank)
            peer[peers++] = r;
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < peers; i++)
            for (int k = 0; k < WORDS; k++)
                out[i * WORDS + k] = ((world->rank * 100 + peer[i]) * 10 + k) * 10 + round;
        comm_host_exchange(world, peers, peer, out, peers, peer, in, WORDS * sizeof *in);
        for (int i = 0; i < peers; i++)
            for (int k = 0; k < WORDS; k++)
                ASSERT(in[i * WORDS + k] == ((peer[i] * 100 + world->rank) * 10 + k) * 10 + round);
        /* One way only, and nothing at all. */
        const int next = (world->rank + 1) % n, last = (world->rank + n - 1) % n;
        if (n > 1 && world->rank % 2 == 0 && next % 2 == 1)
            comm_host_exchange(world, 1, &next, &out[0], 0, NULL, NULL, sizeof *out);
        else if (n > 1 && world->rank % 2 == 1)
            comm_host_exchange(world, 0, NULL, NULL, 1, &last, &in[0], sizeof *in);
        comm_host_exchange(world, 0, NULL, NULL, 0, NULL, NULL, 8);
    }
    free(peer);
    free(out);
    free(in);
}

static void test_errors_of_any_rank_reach_all(struct comm *c)
{
    struct errors e = { 0 };
    ASSERT(comm_host_collect_errors(c, &e) == 0 && e.count == 0);
    /* One line common to all, one of each odd rank, of another class. */
    errors_add(&e, EXIT_CHECKPOINT, "common line");
    if (c->rank % 2)
        errors_add(&e, EXIT_DATA, "rank %d", c->rank);
    const int n = comm_host_collect_errors(c, &e);
    ASSERT(n == 1 + c->size / 2);
    ASSERT(e.worst == EXIT_CHECKPOINT);
    if (c->rank == 0) {
        ASSERT(e.count == n && strcmp(e.line[0], "common line") == 0);
        for (int i = 1; i < n; i++) {
            char line[32];
            snprintf(line, sizeof line, "rank %d", 2 * i - 1);
            ASSERT(strcmp(e.line[i], line) == 0);
        }
    }
    errors_free(&e);
    /* Only the last rank has one: the class reaches the others. */
    if (c->rank == c->size - 1)
        errors_add(&e, EXIT_DATA, "x");
    ASSERT(comm_host_collect_errors(c, &e) == 1 && e.worst == EXIT_DATA &&
           (c->rank != 0 || e.count == 1));
    errors_free(&e);
}

static void test_split_orders_members_by_world_rank(struct comm *c)
{
    struct comm *half = comm_split(c, c->rank % 2, "halves"),
                *none = comm_split(c, c->rank == 0 ? 3 : -1, "first only");
    ASSERT(half->rank == c->rank / 2 && half->size == (c->size + 1 - c->rank % 2) / 2 &&
           strcmp(half->name, "halves") == 0);
    ASSERT((none != NULL) == (c->rank == 0));
    float x = (float)c->rank;
    const struct tensor t = tensor_1d(&x, DTYPE_F32, PLACE_HOST, 1);
    comm_mpi.all_reduce(half, &t, COMM_MIN, NULL);
    ASSERT(x == (float)(c->rank % 2));
    comm_free(none);
    comm_free(half);
    comm_free(NULL);
}

static void check_group(const struct group *g, const char *name, int rank)
{
    if (g->rank < 0) {
        ASSERT(!g->comm);
        return;
    }
    ASSERT(g->member[g->rank] == rank);
    if (g->size == 1) {
        ASSERT(!g->comm);
        return;
    }
    ASSERT(g->comm && g->comm->size == g->size && g->comm->rank == g->rank);
    int32_t *world_rank = xmalloc((size_t)g->size, sizeof *world_rank), own = rank;
    const struct tensor s = tensor_1d(&own, DTYPE_I32, PLACE_HOST, 1),
                        r = tensor_1d(world_rank, DTYPE_I32, PLACE_HOST, g->size);
    comm_mpi.all_gather(g->comm, &s, &r, NULL);
    for (int i = 0; i < g->size; i++)
        if (world_rank[i] != g->member[i])
            FATAL(EXIT_INTERNAL, "group %s: member %d is %d, the communicator has %d", name, i,
                  g->member[i], world_rank[i]);
    free(world_rank);
}

static void connect_and_check(struct comm *world, const struct topology_spec *specs, int n_specs)
{
    struct topology t;
    struct errors e = { 0 };
    topology_describe(&t, specs, n_specs, world->size, world->rank, &e);
    errors_print(&e);
    ASSERT(e.count == 0);
    topology_connect(&t, world);
    ASSERT(t.world == world);
#define X(name_, ...) \
    check_group(&t.encoder.name_, "encoder." #name_, t.rank); \
    check_group(&t.language.name_, "language." #name_, t.rank);
    TOPOLOGY_FAMILIES(X)
#undef X
    if (t.encoder.present) {
        check_group(&t.bridge.leaders, "leaders", t.rank);
        check_group(&t.bridge.source_lane, "source_lane", t.rank);
        check_group(&t.bridge.dest_lane, "dest_lane", t.rank);
    }
    topology_free(&t);
}

static void test_p12_03_communicators_of_the_grids_hold_the_described_members(struct comm *world)
{
    const int w = world->size, half = w / 2;
    connect_and_check(world, (struct topology_spec[]){ { "language", w, 0, 1, 1, 1, 1, 1 } }, 1);
    connect_and_check(world,
                      (struct topology_spec[]){ { "encoder", w, 0, 1, 1, 1, 1, 1 },
                                                { "language", w, 0, w, 1, 1, w, 1 } },
                      2);
    if (w % 2 == 0)
        connect_and_check(world,
                          (struct topology_spec[]){ { "encoder", half, 0, 1, 1, 1, 1, 1 },
                                                    { "language", half, half, 1, 1, 1, half, 1 } },
                          2);
    if (w == 8) {
        connect_and_check(world,
                          (struct topology_spec[]){ { "encoder", 4, 0, 2, 1, 1, 1, 1 },
                                                    { "language", 4, 4, 2, 1, 1, 4, 1 } },
                          2);
        connect_and_check(world,
                          (struct topology_spec[]){ { "encoder", 4, 0, 2, 1, 2, 1, 1 },
                                                    { "language", 4, 4, 2, 1, 2, 2, 1 } },
                          2);
        connect_and_check(world,
                          (struct topology_spec[]){ { "encoder", 4, 4, 1, 1, 1, 1, 1 },
                                                    { "language", 4, 0, 2, 1, 2, 1, 2 } },
                          2);
        connect_and_check(world, (struct topology_spec[]){ { "language", 8, 0, 2, 2, 2, 4, 1 } },
                          1);
    }
}

static double cpu_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Ranks that share cores must not burn a scheduler slice for every message. Measured as processor
 * time over all ranks, because other programs may hold the cores: on 8 ranks and 2 cores 100
 * reductions cost several seconds without yield.o and some milliseconds with it. The best of five
 * rounds counts. */
static void test_ranks_that_wait_give_the_core_away(struct comm *c)
{
    double x, best = 1e9, best_wall = 1e9;
    const struct tensor t = tensor_1d(&x, DTYPE_F64, PLACE_HOST, 1);
    for (int round = 0; round < 5 && best > 0.05; round++) {
        const double start = timer_now();
        double cpu = cpu_seconds();
        for (int i = 0; i < 100; i++) {
            x = 1;
            comm_mpi.all_reduce(c, &t, COMM_SUM, NULL);
            ASSERT(x == c->size);
        }
        double wall = timer_now() - start;
        cpu = cpu_seconds() - cpu;
        comm_host_reduce_f64(c, &cpu, 1, COMM_SUM);
        comm_host_reduce_f64(c, &wall, 1, COMM_MAX);
        best = cpu < best ? cpu : best;
        best_wall = wall < best_wall ? wall : best_wall;
    }
    if (c->rank == 0)
        printf("100 all-reduces of 8 bytes on %d ranks: %.4f s, %.4f s of all processors\n",
               c->size, best_wall, best);
    ASSERT(best < 2.5); /* without yield.c: 5 and more */
}

int main(int argc, char **argv)
{
    struct comm *world = mpi_world(&argc, &argv);
    if (!world)
        return EXIT_ENVIRONMENT;
    static const struct {
        const char *name;
        void (*run)(struct comm *);
    } tests[] = {
#define TEST(name) { #name, name }
        TEST(test_reductions_are_exact_for_all_types_and_lengths),
        TEST(test_sums_are_bitwise_reproducible_and_in_rank_order),
        TEST(test_deferred_collectives_give_the_bits_of_blocking_ones),
        TEST(test_max_and_min_keep_nan),
        TEST(test_all_gather_and_broadcast_move_every_type),
        TEST(test_all_to_all_v_packs_rows_in_rank_order),
        TEST(test_a_bracket_of_long_messages_in_any_order_does_not_deadlock),
        TEST(test_host_plane),
        TEST(test_host_messages_reach_their_peers_in_one_bracket),
        TEST(test_errors_of_any_rank_reach_all),
        TEST(test_split_orders_members_by_world_rank),
        TEST(test_p12_03_communicators_of_the_grids_hold_the_described_members),
        TEST(test_ranks_that_wait_give_the_core_away),
    };
    const size_t n = sizeof tests / sizeof *tests;
    if (world->rank == 0)
        printf("1..%zu\n", n);
    for (size_t i = 0; i < n; i++) {
        tests[i].run(world); /* a failure ends the job with its line */
        comm_host_barrier(world);
        if (world->rank == 0) {
            printf("ok %zu - %s\n", i + 1, tests[i].name);
            fflush(stdout);
        }
    }
    comm_finish(world);
    return 0;
}
