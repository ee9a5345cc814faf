/* ranks: 2 3 4 5 8 */
/* mpi_bridge.c - rows over the bridge in both directions against the rows that each sample must
 * arrive with, for every split of the ranks into encoder and language lanes that divides: equal,
 * fan-in, fan-out, lanes of one and of several tensor-parallel ranks, disjoint and colocated;
 * variable rows per sample, zero rows, several micro-batches in flight, single and combined calls.
 *
 * Row r of sample j of micro-batch m holds code(m, j, r, column): a receiver can tell every row it
 * should have. Its gradient is another code. Differences are added up over the world before
 * anything is asserted, so all ranks fail together.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>
#include "child.h"
#include "bridge.h"
#include "mpi_world.h"

/* rows of a sample: half of the tiny sequence at most */
enum { MICROBATCHES = 4, MAX_ROWS = 32 };

/* How many rows sample j of micro-batch m has. */
typedef int64_t rows_rule(int m, int64_t j);

/* The samples of a micro-batch that a lane of this rank has; samples = 0 on the other grid's
 * ranks. */
struct lane {
    int64_t first, samples;
};

struct job {
    struct comm *world;
    struct deck deck;
    struct topology topo;
    struct bridge *bridge;
    struct stream stream;
    struct arenas arenas;
    rows_rule *rule;
    struct lane encoder, language;
    bool reads; /* tp rank 0 of a language lane */
    int64_t width;
    double *data[2], *gradient; /* [samples*rows of a sample at most, H] */
    double wrong;
};

static int64_t variable_rows(int m, int64_t j)
{
    return (m * 7 + j * 5) % 11;
}
static int64_t uniform_rows(int m, int64_t j)
{
    return 12;
}
static int64_t no_rows(int m, int64_t j)
{
    return 0;
}
static int64_t full_rows(int m, int64_t j)
{
    return MAX_ROWS;
}
static int64_t rows_on_every_third_sample(int m, int64_t j)
{
    return j % 3 == 0 ? 3 + m : 0;
}
static int64_t every_second_microbatch_is_text(int m, int64_t j)
{
    return m % 2 ? 0 : 1 + j % MAX_ROWS;
}

/* With at most `most` rows a sample of width `hidden`. */
static void open_sized(struct job *j, struct comm *world, const struct topology_spec grids[2],
                       int mbs, rows_rule *rule, int most, int hidden)
{
    char *overrides[4], text[1024];
    struct errors e = { 0 };

    memset(j, 0, sizeof *j);
    j->world = world;
    j->rule = rule;
    snprintf(
        text, sizeof text,
        "&run seed = 7 train_iters = 4 precision = 'fp64' /\n&language preset = 'tiny' seq_length = %d hidden_size = %d /\n"
        "&topology layout = 'colocated' /\n&batch micro_batch_size = %d global_batch_size = %d /\n"
        "&data image_seq_length = %d num_image_tiles = 1 /\n"
        "&stage training_stage = 3 /\n&lr lr = 1e-3 lr_decay_style = 'constant' /\n",
        2 * most, hidden, mbs, MICROBATCHES * mbs, most);
    deck_read(&j->deck, "test", text, strlen(text), 0, overrides, &e);
    deck_resolve(&j->deck, 1, &e);
    if (e.count == 0)
        topology_describe(&j->topo, grids, 2, world->size, world->rank, &e);
    errors_print(&e);
    ASSERT(e.count == 0);
    const struct grid *enc = &j->topo.encoder, *lang = &j->topo.language;
    const int64_t all = (int64_t)mbs * lang->dp_size;
    j->deck.derived.encoder_microbatch = all / enc->dp_size;
    if (enc->member)
        j->encoder = (struct lane){ enc->dp_rank * (all / enc->dp_size), all / enc->dp_size };
    if (lang->member)
        j->language = (struct lane){ lang->dp_rank * mbs, mbs };
    j->reads = lang->member && lang->tp_rank == 0;
    topology_connect(&j->topo, world);
    backend_ref_f64.stream_create(&j->stream, "test");
    j->bridge = bridge_init(&j->deck, &j->topo, &comm_mpi, &backend_ref_f64, &j->stream);
    arenas_init(&j->arenas);
    bridge_plan(j->bridge, &j->arenas);
    arenas_commit(&j->arenas, &backend_ref_f64);
    bridge_plan(j->bridge, &j->arenas);
    j->width = j->deck.language.hidden_size;
    for (int i = 0; i < 2; i++)
        j->data[i] = xcalloc((size_t)(all * most * j->width), sizeof(double));
    j->gradient = xcalloc((size_t)(all * most * j->width), sizeof(double));
}

static void open_job(struct job *j, struct comm *world, const struct topology_spec grids[2],
                     int mbs, rows_rule *rule)
{
    open_sized(j, world, grids, mbs, rule, MAX_ROWS, 64);
}

static void close_job(struct job *j)
{
    bridge_free(j->bridge);
    arenas_free(&j->arenas, &backend_ref_f64);
    topology_free(&j->topo);
    deck_free(&j->deck);
    for (int i = 0; i < 2; i++)
        free(j->data[i]);
    free(j->gradient);
}

static double code(int m, int64_t sample, int64_t row, int64_t column, bool gradient)
{
    return (double)((((m * 101 + sample) * 1013 + row) * 1009 + column) * 2 + gradient);
}

/* Rows of a lane's samples of micro-batch m. */
static void lane_rows(const struct job *j, const struct lane *lane, int m, int64_t *rows)
{
    for (int64_t i = 0; i < lane->samples; i++)
        rows[i] = j->rule(m, lane->first + i);
}

/* Write what a lane sends of micro-batch m. */
static struct tensor filled(const struct job *j, const struct lane *lane, int m, double *data,
                            bool gradient)
{
    int64_t n = 0;

    for (int64_t i = 0; i < lane->samples; i++)
        for (int64_t r = 0; r < j->rule(m, lane->first + i); r++, n++)
            for (int64_t c = 0; c < j->width; c++)
                data[n * j->width + c] = code(m, lane->first + i, r, c, gradient);
    return tensor_2d(data, DTYPE_F64, PLACE_DEVICE, n, j->width);
}

/* The gradient that this rank has for the bridge: none where nobody reads embeddings. */
static struct tensor gradient_of(struct job *j, int m)
{
    return j->reads ? filled(j, &j->language, m, j->gradient, true) : (struct tensor){ 0 };
}

/* Count the elements of a received tensor that are not those of the lane's samples of micro-batch
 * m. */
static void compare(struct job *j, const struct lane *lane, int m, const struct tensor *t,
                    bool gradient)
{
    const double *data = t->data;
    int64_t n = 0;

    for (int64_t i = 0; i < lane->samples && (gradient || j->reads); i++)
        n += j->rule(m, lane->first + i);
    if (tensor_rows(t) != n || tensor_cols(t) != j->width) {
        j->wrong += 1.0;
        return;
    }
    n = 0;
    for (int64_t i = 0; i < lane->samples && (gradient || j->reads); i++)
        for (int64_t r = 0; r < j->rule(m, lane->first + i); r++, n++)
            for (int64_t c = 0; c < j->width; c++)
                j->wrong += data[n * j->width + c] != code(m, lane->first + i, r, c, gradient);
}

/* 1F1B of two stages with combined calls (parallel.md 4.3): the encoder has two micro-batches in
 * flight. */
static void steady_state(struct job *j)
{
    const struct lane *enc = &j->encoder, *lang = &j->language;
    int64_t rows[64];
    struct tensor t, in;

    for (int m = 0; m < MICROBATCHES; m++) {
        lane_rows(j, enc->samples ? enc : lang, m, rows);
        if (enc->samples) {
            t = filled(j, enc, m, j->data[m % 2], false);
            if (m == 0) {
                bridge_send_forward(j->bridge, 0, &t, rows, enc->samples);
            } else {
                in = bridge_send_forward_recv_backward(j->bridge, m % 2, &t, rows, enc->samples,
                                                       (m - 1) % 2);
                compare(j, enc, m - 1, &in, true);
            }
        } else {
            if (m == 0) {
                in = bridge_recv_forward(j->bridge, 0, rows, lang->samples);
            } else {
                t = gradient_of(j, m - 1);
                in = bridge_send_backward_recv_forward(j->bridge, 0, &t, 0, rows, lang->samples);
            }
            compare(j, lang, m, &in, false);
        }
    }
    if (enc->samples) {
        in = bridge_recv_backward(j->bridge, (MICROBATCHES - 1) % 2);
        compare(j, enc, MICROBATCHES - 1, &in, true);
    } else {
        t = gradient_of(j, MICROBATCHES - 1);
        bridge_send_backward(j->bridge, 0, &t);
    }
}

/* One micro-batch after the other, plain calls. */
static void one_at_a_time(struct job *j)
{
    const struct lane *enc = &j->encoder, *lang = &j->language;
    int64_t rows[64];
    struct tensor t, in;

    for (int m = 0; m < MICROBATCHES; m++) {
        lane_rows(j, enc->samples ? enc : lang, m, rows);
        if (enc->samples) {
            t = filled(j, enc, m, j->data[0], false);
            bridge_send_forward(j->bridge, m % 2, &t, rows, enc->samples);
            in = bridge_recv_backward(j->bridge, m % 2);
            compare(j, enc, m, &in, true);
        } else {
            in = bridge_recv_forward(j->bridge, 0, rows, lang->samples);
            compare(j, lang, m, &in, false);
            t = gradient_of(j, m);
            bridge_send_backward(j->bridge, 0, &t);
        }
    }
}

/* Both modules on every rank. */
static void local_calls(struct job *j)
{
    const struct lane *enc = &j->encoder, *lang = &j->language;
    const bool equal = enc->samples == lang->samples;
    int64_t encoder_rows[64], language_rows[64];

    for (int m = 0; m < MICROBATCHES; m++) {
        lane_rows(j, enc, m, encoder_rows);
        lane_rows(j, lang, m, language_rows);
        const struct tensor e = filled(j, enc, m, j->data[0], false);
        struct tensor in = bridge_local_forward(j->bridge, &e, encoder_rows, enc->samples,
                                                language_rows, lang->samples);
        compare(j, lang, m, &in, false);
        j->wrong += equal && j->reads && in.data != e.data; /* equal lanes: the identity */
        const struct tensor de = gradient_of(j, m);
        in = bridge_local_backward(j->bridge, &de);
        compare(j, enc, m, &in, true);
        j->wrong += equal && j->reads && in.data != de.data;
    }
}

/* What is done on every layout, and what was wrong with it; all of them share a layout's
 * communicators. */
struct sweep {
    rows_rule *rule;
    void (*run)(struct job *);
    double wrong;
    char first[160]; /* layout that was wrong first */
};

enum {
    PLAIN_UNIFORM,
    STEADY_UNIFORM,
    STEADY_LANES,
    PLAIN_VARIABLE,
    STEADY_VARIABLE,
    STEADY_NONE,
    STEADY_TEXT,
    STEADY_FULL,
    DISJOINT_SWEEPS
};

static struct sweep disjoint[DISJOINT_SWEEPS] = {
    [PLAIN_UNIFORM] = { .rule = uniform_rows, .run = one_at_a_time },
    [STEADY_UNIFORM] = { .rule = uniform_rows, .run = steady_state },
    [STEADY_LANES] = { .rule = rows_on_every_third_sample, .run = steady_state },
    [PLAIN_VARIABLE] = { .rule = variable_rows, .run = one_at_a_time },
    [STEADY_VARIABLE] = { .rule = variable_rows, .run = steady_state },
    [STEADY_NONE] = { .rule = no_rows, .run = steady_state },
    [STEADY_TEXT] = { .rule = every_second_microbatch_is_text, .run = steady_state },
    [STEADY_FULL] = { .rule = full_rows, .run = steady_state },
};

static struct sweep colocated[] = {
    { .rule = uniform_rows, .run = local_calls },
    { .rule = variable_rows, .run = local_calls },
    { .rule = rows_on_every_third_sample, .run = local_calls },
    { .rule = every_second_microbatch_is_text, .run = local_calls },
    { .rule = no_rows, .run = local_calls },
    { .rule = full_rows, .run = local_calls },
};
enum { COLOCATED_SWEEPS = sizeof colocated / sizeof *colocated };

static void run_all(struct comm *world, const struct topology_spec grids[2], int mbs,
                    struct sweep *sweep, int n)
{
    struct job j;

    open_job(&j, world, grids, mbs, NULL);
    for (int i = 0; i < n; i++) {
        j.rule = sweep[i].rule;
        j.wrong = 0.0;
        sweep[i].run(&j);
        comm_host_reduce_f64(world, &j.wrong, 1, COMM_SUM);
        if (j.wrong != 0.0 && sweep[i].wrong == 0.0)
            snprintf(sweep[i].first, sizeof sweep[i].first,
                     "encoder %d ranks tp %d, language %d ranks tp %d, micro-batch %d",
                     grids[0].num_ranks, grids[0].tp, grids[1].num_ranks, grids[1].tp, mbs);
        sweep[i].wrong += j.wrong;
    }
    close_job(&j);
}

/* Every pair of widths of two grids; every micro-batch size that the rules accept with lanes of one
 * rank, else the two smallest. Returns how many. */
static int over_all_widths(struct comm *world, int encoder, int language, int offset,
                           struct sweep *sweep, int n)
{
    int tried = 0;

    for (int te = 1; te <= encoder; te++)
        for (int tl = 1; tl <= language; tl++) {
            const struct topology_spec grids[] = { { "encoder", encoder, 0, te, 1, 1, 1, 1 },
                                                   { "language", language, offset, tl, 1, 1, 1,
                                                     1 } };
            const int de = encoder / te, dl = language / tl;
            if (encoder % te || language % tl || (de % dl && dl % de))
                continue;
            for (int mbs = 1, runs = te == 1 && tl == 1 && offset > 0 ? 6 : 2; mbs <= 6 && runs > 0;
                 mbs++)
                if (mbs * dl % de == 0) {
                    run_all(world, grids, mbs, sweep, n);
                    tried++;
                    runs--;
                }
        }
    return tried;
}

/* Every layout once, before the tests look at what was wrong. */
static void sweep_all(struct comm *world)
{
    int tried = 0;

    for (int encoder = 1; encoder < world->size; encoder++)
        tried += over_all_widths(world, encoder, world->size - encoder, encoder, disjoint,
                                 DISJOINT_SWEEPS);
    ASSERT(tried > 0 &&
           over_all_widths(world, world->size, world->size, 0, colocated, COLOCATED_SWEEPS) > 0);
}

static void nothing_wrong(const struct sweep *s)
{
    if (s->wrong != 0.0)
        fail_msg("%g wrong, first with %s", s->wrong, s->first);
}

static void p12_27_plain_and_combined_calls_give_identical_rows(void **state)
{
    nothing_wrong(&disjoint[PLAIN_UNIFORM]);
    nothing_wrong(&disjoint[STEADY_UNIFORM]);
}

static void p12_30_lanes_with_and_without_pictures_are_cut_by_sample(void **state)
{
    nothing_wrong(&disjoint[STEADY_LANES]);
}

static void p12_33_fan_in_gradients_are_cut_as_the_rows_arrived(void **state)
{
    nothing_wrong(&disjoint[PLAIN_VARIABLE]);
    nothing_wrong(&disjoint[STEADY_VARIABLE]);
}

static void p12_29_text_only_microbatches_send_nothing_and_do_not_hang(void **state)
{
    nothing_wrong(&disjoint[STEADY_NONE]);
    nothing_wrong(&disjoint[STEADY_TEXT]);
}

static void samples_of_the_largest_size_fit(void **state)
{
    nothing_wrong(&disjoint[STEADY_FULL]);
}

static void nothing_is_sent_for_zero_rows(void **state)
{
    struct comm *world = *state;
    const struct topology_spec grids[] = { { "encoder", 1, 0, 1, 1, 1, 1, 1 },
                                           { "language", world->size - 1, 1, 1, 1, 1, 1, 1 } };
    struct job j;

    open_job(&j, world, grids, 1, no_rows);
    comm_take_sent_bytes(j.topo.bridge.leaders.comm);
    steady_state(&j);
    /* The encoder announces its counts on the host plane; nobody sends a row. */
    int64_t sent = comm_take_sent_bytes(j.topo.bridge.leaders.comm);
    comm_host_reduce_i64(world, &sent, 1, COMM_SUM);
    assert_int_equal(sent, 0);
    close_job(&j);
}

/* Exactly the rows travel, whatever the widths: one sender and one receiver a part, and the
 * gradient shared inside the encoder's lanes. */
static void every_row_travels_once_in_each_direction(void **state)
{
    struct comm *world = *state;
    const int half = world->size / 2;
    struct job j;

    if (world->size % 4 != 0)
        return;
    const struct topology_spec grids[] = { { "encoder", half, 0, 2, 1, 1, 1, 1 },
                                           { "language", half, half, 2, 1, 1, 1, 1 } };
    open_job(&j, world, grids, 2, uniform_rows);
    comm_take_sent_bytes(j.topo.bridge.leaders.comm);
    comm_take_sent_bytes(j.topo.bridge.source_lane.comm);
    one_at_a_time(&j);
    int64_t sent[2] = { comm_take_sent_bytes(j.topo.bridge.leaders.comm),
                        comm_take_sent_bytes(j.topo.bridge.source_lane.comm) };
    comm_host_reduce_i64(world, sent, 2, COMM_SUM);
    const int64_t rows =
        MICROBATCHES * 2 * (half / 2) * uniform_rows(0, 0) * j.width * (int64_t)sizeof(double);
    close_job(&j);
    assert_int_equal(sent[0], 2 * rows);
    assert_int_equal(sent[1], rows);
}

static void p12_85_colocated_lanes_of_any_widths_get_their_rows(void **state)
{
    for (int i = 0; i < COLOCATED_SWEEPS; i++)
        nothing_wrong(&colocated[i]);
}

/* Fan-out is a choice of rows: no embedding leaves its rank. */
static void p12_85_colocated_fan_out_sends_no_embeddings(void **state)
{
    struct comm *world = *state;
    const struct topology_spec grids[] = { { "encoder", world->size, 0, world->size, 1, 1, 1, 1 },
                                           { "language", world->size, 0, 1, 1, 1, 1, 1 } };
    struct job j;

    open_job(&j, world, grids, 2, variable_rows);
    assert_null(j.topo.bridge.leaders.comm);
    local_calls(&j);
    comm_host_reduce_f64(world, &j.wrong, 1, COMM_SUM);
    close_job(&j);
    assert_true(j.wrong == 0.0);
}

/* ---- how rows are cut ------------------------------------------------------------------------ */

static int64_t rows_0_3_1_2(int m, int64_t j)
{
    return (const int64_t[]){ 0, 3, 1, 2 }[j % 4];
}
static int64_t rows_1_3_2(int m, int64_t j)
{
    return (const int64_t[]){ 1, 3, 2 }[j % 3];
}

/* Row counts of parallel.md 12.19 from one encoder lane to k language lanes; the parts that must
 * arrive, in order. */
static void p12_19_parts_are_those_of_each_lanes_samples(void **state)
{
    static const struct {
        int lanes, mbs;
        rows_rule *rule;
        int64_t part[4];
    } cases[] = { { 2, 2, rows_0_3_1_2, { 3, 3 } },       { 3, 1, rows_1_3_2, { 1, 3, 2 } },
                  { 1, 4, rows_0_3_1_2, { 6 } },          { 1, 3, rows_1_3_2, { 6 } },
                  { 4, 1, rows_0_3_1_2, { 0, 3, 1, 2 } }, { 4, 3, rows_1_3_2, { 6, 6, 6, 6 } } };
    struct comm *world = *state;
    double wrong = 0.0;

    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const struct topology_spec grids[] = { { "encoder", 1, 0, 1, 1, 1, 1, 1 },
                                               { "language", cases[i].lanes, 1, 1, 1, 1, 1, 1 } };
        struct job j;
        int64_t rows[16];
        if (world->size != cases[i].lanes + 1)
            continue;
        open_job(&j, world, grids, cases[i].mbs, cases[i].rule);
        lane_rows(&j, j.encoder.samples ? &j.encoder : &j.language, 0, rows);
        if (j.encoder.samples) {
            const struct tensor t = filled(&j, &j.encoder, 0, j.data[0], false);
            bridge_send_forward(j.bridge, 0, &t, rows, j.encoder.samples);
        } else {
            const struct tensor in = bridge_recv_forward(j.bridge, 0, rows, j.language.samples);
            wrong += tensor_rows(&in) != cases[i].part[world->rank - 1];
            compare(&j, &j.language, 0, &in, false);
        }
        wrong += j.wrong;
        close_job(&j);
    }
    comm_host_reduce_f64(world, &wrong, 1, COMM_SUM);
    assert_true(wrong == 0.0);
}

static void say_launched(struct comm *c)
{
    fprintf(stderr, "launched\n");
}

struct sending {
    struct job *job;
    const int64_t *rows;
    int64_t samples, tensor, width;
};

static void send(void *sending)
{
    static struct comm_ops ops;
    const struct sending *s = sending;
    struct job *j = s->job;
    check_on_abort(NULL);
    ops = comm_mpi;
    ops.group_begin = say_launched;
    struct bridge *b = bridge_init(&j->deck, &j->topo, &ops, &backend_ref_f64, &j->stream);
    const struct tensor t = tensor_2d(j->data[0], DTYPE_F64, PLACE_DEVICE, s->tensor, s->width);
    bridge_send_forward(b, 0, &t, s->rows, s->samples);
    _exit(99);
}

/* What the encoder's rank says when it sends `samples` samples of these rows in a tensor of
 * `tensor` rows and `width` columns; a message that is launched before the mistake is found says so
 * too. Nothing is sent: the child dies before. */
static void expect_refusal(struct job *j, const int64_t *rows, int64_t samples, int64_t tensor,
                           int64_t width, const char *part)
{
    char text[2048];
    const int status =
        child_run(send, &(struct sending){ j, rows, samples, tensor, width }, text, sizeof text);
    if (status != EXIT_INTERNAL || !strstr(text, part) || strstr(text, "launched"))
        fail_msg("status %d, '%s' does not say '%s' before the first message", status, text, part);
}

/* Sizes that do not fit the peers or the tensor, or a tensor of another width, are refused before
 * anything is launched. */
static void p12_19_20_21_31_sizes_that_do_not_fit_are_refused_before_the_first_message(void **state)
{
    static const int64_t three[] = { 1, 2, 3 }, two[] = { 2, 2 };
    struct comm *world = *state;
    const struct topology_spec grids[] = { { "encoder", 1, 0, 1, 1, 1, 1, 1 },
                                           { "language", 2, 1, 1, 1, 1, 1, 1 } };
    struct job j;

    if (world->size != 3)
        return;
    open_job(&j, world, grids, 2, uniform_rows);
    if (world->rank == 0) {
        expect_refusal(&j, three, 3, 6, j.width, "3 samples do not divide over 2 lanes");
        expect_refusal(&j, two, 2, 6, j.width, "to send, the data say 4 rows of");
        expect_refusal(&j, two, 2, 4, j.width / 2, "to send, the data say 4 rows of");
    }
    comm_host_barrier(world);
    close_job(&j);
}

/* of the job below: ( ) a bracket, digits the peers in it, d a drain */
static char launches[64];
static int n_launches;

static void note(char letter)
{
    if (n_launches < 63)
        launches[n_launches++] = letter;
}

static void noted_begin(struct comm *c)
{
    note('(');
    comm_mpi.group_begin(c);
}
static void noted_end(struct comm *c, struct stream *s)
{
    note(')');
    comm_mpi.group_end(c, s);
}
static void noted_send(struct comm *c, const struct tensor *t, int peer, struct stream *s)
{
    note((char)('0' + peer));
    comm_mpi.send(c, t, peer, s);
}
static void noted_recv(struct comm *c, const struct tensor *t, int peer, struct stream *s)
{
    note((char)('a' + peer));
    comm_mpi.recv(c, t, peer, s);
}

/* Both directions of a combined call are in one bracket, peers in order; a part without rows is no
 * message. */
static void p12_21_all_payloads_are_launched_in_one_bracket_in_the_order_of_peers(void **state)
{
    struct comm *world = *state;
    const int lanes = world->size - 1;
    const struct topology_spec grids[] = { { "encoder", 1, 0, 1, 1, 1, 1, 1 },
                                           { "language", lanes, 1, 1, 1, 1, 1, 1 } };
    struct comm_ops ops = comm_mpi;
    struct job j;
    char want[64] = "";
    size_t at = 0;

    open_job(&j, world, grids, 1, rows_0_3_1_2);
    bridge_free(j.bridge);
    ops.group_begin = noted_begin;
    ops.group_end = noted_end;
    ops.send = noted_send;
    ops.recv = noted_recv;
    arenas_free(&j.arenas, &backend_ref_f64);
    j.bridge = bridge_init(&j.deck, &j.topo, &ops, &backend_ref_f64, &j.stream);
    arenas_init(&j.arenas);
    bridge_plan(j.bridge, &j.arenas);
    arenas_commit(&j.arenas, &backend_ref_f64);
    bridge_plan(j.bridge, &j.arenas);
    memset(launches, 0, sizeof launches);
    n_launches = 0;
    steady_state(&j);
    comm_host_reduce_f64(world, &j.wrong, 1, COMM_SUM);
    close_job(&j);
    assert_true(j.wrong == 0.0);
    if (world->rank > 0)
        return;
    /* send; send and receive of the one before; receive */
    for (int call = 0; call <= MICROBATCHES; call++) {
        want[at++] = '(';
        for (int l = 0; l < lanes && call < MICROBATCHES; l++)
            if (rows_0_3_1_2(0, l) > 0)
                want[at++] = (char)('1' + l);
        for (int l = 0; l < lanes && call > 0; l++)
            if (rows_0_3_1_2(0, l) > 0)
                want[at++] = (char)('b' + l);
        want[at++] = ')';
    }
    if (strcmp(launches, lanes > 1 ? want : "()()()()()") != 0)
        fail_msg("launched %s, wanted %s", launches, want);
}

enum { WIDE = 128, MANY = 577 };

static int64_t many_rows(int m, int64_t j)
{
    return MANY;
}
static int64_t many_in_four(int m, int64_t j)
{
    return j % 4 ? 144 : 145;
}

/* 577 x 128 from each of four lanes to one, and from one to four, by the combined calls. */
static void p12_26_fan_in_and_fan_out_of_four_with_577_rows(void **state)
{
    struct comm *world = *state;

    for (int out = 0; out < 2; out++) {
        const struct topology_spec grids[] = { { "encoder", out ? 1 : 4, 0, 1, 1, 1, 1, 1 },
                                               { "language", out ? 4 : 1, out ? 1 : 4, 1, 1, 1, 1,
                                                 1 } };
        struct job j;
        if (world->size != 5)
            return;
        open_sized(&j, world, grids, out ? 1 : 4, out ? many_in_four : many_rows, MANY, WIDE);
        assert_int_equal(j.width, WIDE);
        steady_state(&j);
        comm_host_reduce_f64(world, &j.wrong, 1, COMM_SUM);
        close_job(&j);
        assert_true(j.wrong == 0.0);
    }
}

int main(int argc, char **argv)
{
    struct comm *world = mpi_world(&argc, &argv);
    if (!world)
        return EXIT_ENVIRONMENT;
    const struct CMUnitTest tests[] = {
#define TEST(name) cmocka_unit_test_prestate(name, world)
        TEST(p12_27_plain_and_combined_calls_give_identical_rows),
        TEST(p12_30_lanes_with_and_without_pictures_are_cut_by_sample),
        TEST(p12_33_fan_in_gradients_are_cut_as_the_rows_arrived),
        TEST(p12_29_text_only_microbatches_send_nothing_and_do_not_hang),
        TEST(samples_of_the_largest_size_fit),
        TEST(nothing_is_sent_for_zero_rows),
        TEST(every_row_travels_once_in_each_direction),
        TEST(p12_85_colocated_lanes_of_any_widths_get_their_rows),
        TEST(p12_85_colocated_fan_out_sends_no_embeddings),
        TEST(p12_19_parts_are_those_of_each_lanes_samples),
        TEST(p12_19_20_21_31_sizes_that_do_not_fit_are_refused_before_the_first_message),
        TEST(p12_21_all_payloads_are_launched_in_one_bracket_in_the_order_of_peers),
        TEST(p12_26_fan_in_and_fan_out_of_four_with_577_rows),
    };
    sweep_all(world);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    comm_finish(world);
    return failed;
}
