/* ranks: 2 3 4 5 8 */
/* mpi_bridge.c - rows over the bridge in both directions against the rows that each sample must arrive with, for every split of the ranks
 * into encoder and language lanes that divides: equal, fan-in, fan-out; variable rows per sample, zero rows, several micro-batches
 * in flight, single and combined calls.
 *
 * Row r of sample j of micro-batch m holds code(m, j, r, column): a receiver can tell every row it should have. Its gradient is another
 * code. Differences are added up over the world before anything is asserted, so all ranks fail together.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include "bridge.h"

enum { MICROBATCHES = 4, MAX_ROWS = 32 };     /* rows of a sample: half of the tiny sequence at most */

/* How many rows sample j of micro-batch m has. */
typedef int64_t rows_rule(int m, int64_t j);

struct job {
    struct comm *world;
    struct deck deck;
    struct topology topo;
    struct bridge *bridge;
    struct stream stream;
    struct arenas arenas;
    rows_rule *rule;
    bool encoder;
    int64_t first, samples, all;              /* of this rank's batch in a micro-batch; of all lanes */
    int64_t width;
    double *data[2], *gradient;               /* [samples*MAX_ROWS, H] */
    double wrong;
};

static int64_t variable_rows(int m, int64_t j) { return (m * 7 + j * 5) % 11; }
static int64_t uniform_rows(int m, int64_t j) { return 12; }
static int64_t no_rows(int m, int64_t j) { return 0; }
static int64_t full_rows(int m, int64_t j) { return MAX_ROWS; }
static int64_t rows_on_every_third_sample(int m, int64_t j) { return j % 3 == 0 ? 3 + m : 0; }
static int64_t every_second_microbatch_is_text(int m, int64_t j) { return m % 2 ? 0 : 1 + j % MAX_ROWS; }

static void open_job(struct job *j, struct comm *world, int encoder, int language, int mbs, rows_rule *rule)
{
    char *overrides[4], text[1024];
    struct errors e = {0};

    memset(j, 0, sizeof *j);
    j->world = world;
    j->rule = rule;
    snprintf(text, sizeof text, "&run seed = 7 train_iters = 4 precision = 'fp64' /\n&language preset = 'tiny' /\n"
             "&topology layout = 'disjoint' encoder_dp = %d llm_dp = %d /\n&batch micro_batch_size = %d global_batch_size = %d /\n"
             "&data image_seq_length = %d num_image_tiles = 1 /\n"
             "&stage training_stage = 3 /\n&lr lr = 1e-3 lr_decay_style = 'constant' /\n", encoder, language, mbs,
             MICROBATCHES * mbs * language, MAX_ROWS);
    deck_read(&j->deck, "test", text, strlen(text), 0, overrides, &e);
    deck_resolve(&j->deck, world->size, &e);
    if (e.count == 0) topology_init(&j->topo, &j->deck, world->size, world->rank, &e);
    errors_print(&e);
    ASSERT(e.count == 0);
    topology_connect(&j->topo, world);
    backend_ref_f64.stream_create(&j->stream, "test");
    j->bridge = bridge_init(&j->deck, &j->topo, &comm_mpi, &backend_ref_f64, &j->stream);
    arenas_init(&j->arenas);
    bridge_plan(j->bridge, &j->arenas);
    arenas_commit(&j->arenas, &backend_ref_f64);
    bridge_plan(j->bridge, &j->arenas);
    j->encoder = j->topo.encoder.member;
    j->all = (int64_t)mbs * language;
    j->samples = j->encoder ? j->all / encoder : mbs;
    j->first = j->samples * (j->encoder ? j->topo.encoder.dp_rank : j->topo.language.dp_rank);
    j->width = j->deck.language.hidden_size;
    for (int i = 0; i < 2; i++) j->data[i] = xcalloc((size_t)(j->samples * MAX_ROWS * j->width), sizeof(double));
    j->gradient = xcalloc((size_t)(j->samples * MAX_ROWS * j->width), sizeof(double));
}

static void close_job(struct job *j)
{
    bridge_free(j->bridge);
    arenas_free(&j->arenas, &backend_ref_f64);
    topology_free(&j->topo);
    deck_free(&j->deck);
    for (int i = 0; i < 2; i++) free(j->data[i]);
    free(j->gradient);
}

static double code(int m, int64_t sample, int64_t row, int64_t column, bool gradient)
{
    return (double)((((m * 101 + sample) * 103 + row) * 107 + column) * 2 + gradient);
}

/* Rows of this rank's samples of micro-batch m; returns their sum. */
static int64_t own_rows(const struct job *j, int m, int64_t *rows)
{
    int64_t sum = 0;

    for (int64_t i = 0; i < j->samples; i++) sum += rows[i] = j->rule(m, j->first + i);
    return sum;
}

/* Write what this rank sends of micro-batch m. */
static struct tensor filled(const struct job *j, int m, double *data, bool gradient)
{
    int64_t n = 0;

    for (int64_t i = 0; i < j->samples; i++)
        for (int64_t r = 0; r < j->rule(m, j->first + i); r++, n++)
            for (int64_t c = 0; c < j->width; c++) data[n * j->width + c] = code(m, j->first + i, r, c, gradient);
    return tensor_2d(data, DTYPE_F64, PLACE_DEVICE, n, j->width);
}

/* Count the elements of a received tensor that are not those of this rank's samples of micro-batch m. */
static void compare(struct job *j, int m, const struct tensor *t, bool gradient)
{
    const double *data = t->data;
    int64_t n = 0;

    for (int64_t i = 0; i < j->samples; i++) n += j->rule(m, j->first + i);
    if (tensor_rows(t) != n || tensor_cols(t) != j->width) {
        j->wrong += 1.0;
        return;
    }
    n = 0;
    for (int64_t i = 0; i < j->samples; i++)
        for (int64_t r = 0; r < j->rule(m, j->first + i); r++, n++)
            for (int64_t c = 0; c < j->width; c++)
                j->wrong += data[n * j->width + c] != code(m, j->first + i, r, c, gradient);
}

/* 1F1B of two stages with combined calls (parallel.md 4.3): the encoder has two micro-batches in flight. */
static void steady_state(struct job *j)
{
    int64_t rows[64];
    struct tensor t, in;

    for (int m = 0; m < MICROBATCHES; m++) {
        own_rows(j, m, rows);
        if (j->encoder) {
            t = filled(j, m, j->data[m % 2], false);
            if (m == 0) {
                bridge_send_forward(j->bridge, 0, &t, rows, j->samples);
            } else {
                in = bridge_send_forward_recv_backward(j->bridge, m % 2, &t, rows, j->samples, (m - 1) % 2);
                compare(j, m - 1, &in, true);
            }
        } else {
            if (m == 0) {
                in = bridge_recv_forward(j->bridge, 0, rows, j->samples);
            } else {
                t = filled(j, m - 1, j->gradient, true);
                in = bridge_send_backward_recv_forward(j->bridge, 0, &t, 0, rows, j->samples);
            }
            compare(j, m, &in, false);
        }
    }
    if (j->encoder) {
        in = bridge_recv_backward(j->bridge, (MICROBATCHES - 1) % 2);
        compare(j, MICROBATCHES - 1, &in, true);
    } else {
        t = filled(j, MICROBATCHES - 1, j->gradient, true);
        bridge_send_backward(j->bridge, 0, &t);
    }
}

/* One micro-batch after the other, plain calls. */
static void one_at_a_time(struct job *j)
{
    int64_t rows[64];
    struct tensor t, in;

    for (int m = 0; m < MICROBATCHES; m++) {
        own_rows(j, m, rows);
        if (j->encoder) {
            t = filled(j, m, j->data[0], false);
            bridge_send_forward(j->bridge, m % 2, &t, rows, j->samples);
            in = bridge_recv_backward(j->bridge, m % 2);
            compare(j, m, &in, true);
        } else {
            in = bridge_recv_forward(j->bridge, 0, rows, j->samples);
            compare(j, m, &in, false);
            t = filled(j, m, j->gradient, true);
            bridge_send_backward(j->bridge, 0, &t);
        }
    }
}

/* Every split of the ranks, with every micro-batch size that the rules accept. */
static void over_all_splits(struct comm *world, rows_rule *rule, void (*run)(struct job *))
{
    int tried = 0;

    for (int encoder = 1; encoder < world->size; encoder++) {
        int language = world->size - encoder;
        for (int mbs = 1; mbs <= 6; mbs++) {
            struct job j;
            if (mbs * language % encoder != 0 || (encoder % language != 0 && language % encoder != 0)) continue;
            open_job(&j, world, encoder, language, mbs, rule);
            run(&j);
            comm_host_reduce_f64(world, &j.wrong, 1, COMM_SUM);
            if (j.wrong != 0.0) fail_msg("%d encoder and %d language ranks, micro-batch %d: %g wrong", encoder, language, mbs, j.wrong);
            close_job(&j);
            tried++;
        }
    }
    assert_true(tried > 0);
}

static void p12_27_plain_and_combined_calls_give_identical_rows(void **state)
{
    over_all_splits(*state, uniform_rows, one_at_a_time);
    over_all_splits(*state, uniform_rows, steady_state);
}

static void p12_30_lanes_with_and_without_pictures_are_cut_by_sample(void **state)
{
    over_all_splits(*state, rows_on_every_third_sample, steady_state);
}

static void p12_33_fan_in_gradients_are_cut_as_the_rows_arrived(void **state)
{
    over_all_splits(*state, variable_rows, one_at_a_time);
    over_all_splits(*state, variable_rows, steady_state);
}

static void p12_29_text_only_microbatches_send_nothing_and_do_not_hang(void **state)
{
    over_all_splits(*state, no_rows, steady_state);
    over_all_splits(*state, every_second_microbatch_is_text, steady_state);
}

static void samples_of_the_largest_size_fit(void **state)
{
    over_all_splits(*state, full_rows, steady_state);
}

static void nothing_is_sent_for_zero_rows(void **state)
{
    struct comm *world = *state;
    struct job j;

    open_job(&j, world, 1, world->size - 1, 1, no_rows);
    comm_take_sent_bytes(j.topo.bridge.leaders.comm);
    steady_state(&j);
    /* The encoder announces its counts; nobody sends a row. */
    int64_t sent = comm_take_sent_bytes(j.topo.bridge.leaders.comm);
    int64_t wrong = sent != (j.encoder ? (int64_t)sizeof(int64_t) * MICROBATCHES * (world->size - 1) : 0);
    comm_host_reduce_i64(world, &wrong, 1, COMM_SUM);
    assert_int_equal(wrong, 0);
    assert_true(bridge_take_wait_seconds(j.bridge) > 0.0);
    assert_true(bridge_take_wait_seconds(j.bridge) == 0.0);
    close_job(&j);
}

int main(int argc, char **argv)
{
    struct comm *world;
    char why[512];

    if (!comm_start(&argc, &argv, &world, why, sizeof why)) {
        fprintf(stderr, "%s\n", why);
        return 3;
    }
    check_on_abort(comm_abort);
    check_identify(world->rank, world->size, "test", NULL);
    const struct CMUnitTest tests[] = {
#define TEST(name) cmocka_unit_test_prestate(name, world)
        TEST(p12_27_plain_and_combined_calls_give_identical_rows),
        TEST(p12_30_lanes_with_and_without_pictures_are_cut_by_sample),
        TEST(p12_33_fan_in_gradients_are_cut_as_the_rows_arrived),
        TEST(p12_29_text_only_microbatches_send_nothing_and_do_not_hang),
        TEST(samples_of_the_largest_size_fit),
        TEST(nothing_is_sent_for_zero_rows),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    comm_finish(world);
    return failed;
}
