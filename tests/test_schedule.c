/* test_schedule.c - the traces of parallel.md 4.3, and a verifier that must see every single edit
 * of a sound schedule. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "child.h"
#include "rng.h"
#include "schedule.h"
#include "timer.h"

/* All ranks of one job. */
struct job {
    int size;
    struct topology *topology; /* [size] */
    struct schedule *list;     /* [size] */
};

static struct job job_of(const struct topology_spec *specs, int n_specs, int m, bool forward_only,
                         bool encoder_trains)
{
    struct job j = { 0 };
    struct errors e = { 0 };
    for (int i = 0; i < n_specs; i++)
        if (specs[i].offset + specs[i].num_ranks > j.size)
            j.size = specs[i].offset + specs[i].num_ranks;
    j.topology = calloc((size_t)j.size, sizeof *j.topology);
    j.list = calloc((size_t)j.size, sizeof *j.list);
    for (int r = 0; r < j.size; r++) {
        topology_describe(&j.topology[r], specs, n_specs, j.size, r, &e);
        if (e.count > 0)
            fail_msg("%s", e.line[0]);
        schedule_build(&j.list[r], &j.topology[r], m, forward_only, encoder_trains);
    }
    return j;
}

static void job_free(struct job *j)
{
    for (int r = 0; r < j->size; r++) {
        schedule_free(&j->list[r]);
        topology_free(&j->topology[r]);
    }
    free(j->list);
    free(j->topology);
}

static void expect_sound(const struct job *j)
{
    struct errors e = { 0 };
    if (!schedule_verify(j->list, j->topology, j->size, &e))
        fail_msg("%s", e.line[0]);
    assert_int_equal(e.count, 0);
}

/* The first fault must contain `part`. */
static void expect_fault(const struct job *j, const char *part)
{
    struct errors e = { 0 };
    if (schedule_verify(j->list, j->topology, j->size, &e))
        fail_msg("no fault found, expected '%s'", part);
    assert_true(e.count > 0 && e.worst == EXIT_INTERNAL);
    if (!strstr(e.line[0], part))
        fail_msg("'%s' is not in '%s'", part, e.line[0]);
    errors_free(&e);
}

static void expect_trace(const struct job *j, int rank, const char *expected)
{
    char *text = NULL;
    size_t size = 0;
    FILE *f = open_memstream(&text, &size);
    schedule_print(&j->list[rank], f);
    fclose(f);
    if (strncmp(text, expected, strlen(expected)) != 0 ||
        strcmp(text + strlen(expected), "\n") != 0)
        fail_msg("rank %d:\n%s instead of\n%s", rank, text, expected);
    free(text);
}

static const struct topology_spec two[] = { { "encoder", 1, 0, 1, 1, 1, 1, 1 },
                                            { "language", 1, 1, 1, 1, 1, 1, 1 } };
static const struct topology_spec colocated[] = { { "encoder", 1, 0, 1, 1, 1, 1, 1 },
                                                  { "language", 1, 0, 1, 1, 1, 1, 1 } };
static const struct topology_spec alone[] = { { "language", 1, 0, 1, 1, 1, 1, 1 } };
static const struct topology_spec deep[] = { { "encoder", 1, 0, 1, 1, 1, 1, 1 },
                                             { "language", 2, 1, 1, 1, 2, 1, 1 } };

/* ---- traces ---- */

static void test_p12_44_trace_of_two_stages_and_4_microbatches(void **state)
{
    struct job j = job_of(two, 2, 4, false, true);
    expect_trace(&j, 0, "F0 sf0 F1 sfrb(a1,g0) B0 F2 sfrb(a2,g1) B1 F3 sfrb(a3,g2) B2 rb3 B3 gs");
    expect_trace(&j, 1, "rf0 F0 B0 sbrf(g0,a1) F1 B1 sbrf(g1,a2) F2 B2 sbrf(g2,a3) F3 B3 sb3 gs");
    assert_int_equal(j.list[0].encoder_slots, 2);
    assert_int_equal(j.list[1].language_slots, 1);
    const struct action *a = &j.list[0].action[3];
    assert_int_equal(a->kind, SCHEDULE_SEND_FORWARD_RECV_BACKWARD);
    assert_true(a->module == SCHEDULE_ENCODER && a->microbatch == 1 && a->partner == 0 &&
                a->slot == 1);
    a = &j.list[1].action[3];
    assert_true(a->kind == SCHEDULE_SEND_BACKWARD_RECV_FORWARD && a->module == SCHEDULE_LANGUAGE &&
                a->microbatch == 0 && a->partner == 1);
    expect_sound(&j);
    job_free(&j);
}

static void test_p12_44_trace_of_two_stages_and_1_microbatch(void **state)
{
    struct job j = job_of(two, 2, 1, false, true);
    expect_trace(&j, 0, "F0 sf0 rb0 B0 gs");
    expect_trace(&j, 1, "rf0 F0 B0 sb0 gs");
    expect_sound(&j);
    job_free(&j);
}

static void test_p12_44_trace_of_three_stages(void **state)
{
    struct job j = job_of(deep, 2, 2, false, true);
    expect_trace(&j, 0, "F0 sf0 F1 sf1 rb0 B0 rb1 B1 gs");
    expect_trace(&j, 1, "rf0 F0 sf0 rf1 F1 sfrb(a1,g0) B0 sb0 rb1 B1 sb1 gs");
    expect_trace(&j, 2, "rf0 F0 B0 sbrf(g0,a1) F1 B1 sb1 gs");
    expect_sound(&j);
    job_free(&j);
    for (int m = 1; m < 8; m++) { /* m below, at and above the warm-up */
        j = job_of(deep, 2, m, false, true);
        assert_int_equal(j.list[0].encoder_slots, m < 3 ? m : 3);
        expect_sound(&j);
        job_free(&j);
    }
}

static void test_p12_50_frozen_encoder_sends_no_gradients(void **state)
{
    struct job j = job_of(two, 2, 3, false, false);
    expect_trace(&j, 0, "F0 sf0 F1 sf1 F2 sf2");
    expect_trace(&j, 1, "rf0 F0 B0 rf1 F1 B1 rf2 F2 B2 gs");
    assert_int_equal(j.list[0].encoder_slots, 1);
    expect_sound(&j);
    job_free(&j);
    j = job_of(deep, 2, 3, false, false);
    expect_trace(&j, 1, "rf0 F0 sf0 rf1 F1 sfrb(a1,g0) B0 rf2 F2 sfrb(a2,g1) B1 rb2 B2 gs");
    expect_sound(&j);
    job_free(&j);
}

static void test_colocated_and_language_only_traces(void **state)
{
    struct job j = job_of(colocated, 2, 2, false, true);
    expect_trace(&j, 0, "eF0 lf0 lF0 lB0 lb0 eB0 eF1 lf1 lF1 lB1 lb1 eB1 lgs egs");
    assert_true(j.list[0].encoder_slots == 1 && j.list[0].language_slots == 1);
    expect_sound(&j);
    job_free(&j);
    j = job_of(colocated, 2, 2, false, false);
    expect_trace(&j, 0, "eF0 lf0 lF0 lB0 eF1 lf1 lF1 lB1 lgs");
    expect_sound(&j);
    job_free(&j);
    j = job_of(alone, 1, 2, false, false);
    expect_trace(&j, 0, "F0 B0 F1 B1 gs");
    expect_sound(&j);
    job_free(&j);
}

static void test_p12_49_evaluation_runs_forward_only(void **state)
{
    struct job j = job_of(two, 2, 3, true, true);
    expect_trace(&j, 0, "F0 sf0 F1 sf1 F2 sf2");
    expect_trace(&j, 1, "rf0 F0 rf1 F1 rf2 F2");
    expect_sound(&j);
    job_free(&j);
    j = job_of(colocated, 2, 2, true, false);
    expect_trace(&j, 0, "eF0 lf0 lF0 eF1 lf1 lF1");
    expect_sound(&j);
    job_free(&j);
    j = job_of(deep, 2, 2, true, true);
    expect_trace(&j, 1, "rf0 F0 sf0 rf1 F1 sf1");
    expect_sound(&j);
    job_free(&j);
}

static void test_p12_42_43_grids_of_the_upstream_tests_are_sound(void **state)
{
    /* encoder (ranks, tp, pp), language (ranks, tp, pp): 1F1B of two to four stages, fan-in 4 and
     * 2, fan-out 4. */
    static const struct {
        int e, etp, epp, l, ltp, lpp;
    } grids[] = {
        { 1, 1, 1, 1, 1, 1 }, { 1, 1, 1, 3, 1, 3 }, { 2, 2, 1, 6, 2, 3 }, { 4, 2, 2, 4, 2, 2 },
        { 4, 1, 1, 4, 2, 2 }, { 4, 2, 2, 4, 1, 1 }, { 2, 1, 1, 6, 2, 3 },
    };
    for (size_t k = 0; k < sizeof grids / sizeof *grids; k++)
        for (int m = 1; m <= 9; m += m < 4 ? 1 : 5)
            for (int kind = 0; kind < 3; kind++) {
                const struct topology_spec specs[] = {
                    { "encoder", grids[k].e, 0, grids[k].etp, 1, grids[k].epp, 1, 1 },
                    { "language", grids[k].l, grids[k].e, grids[k].ltp, 1, grids[k].lpp, 1, 1 }
                };
                struct job j = job_of(specs, 2, m, kind == 2, kind != 1);
                expect_sound(&j);
                job_free(&j);
            }
}

/* ---- faults ---- */

static void delete_action(struct schedule *s, int i)
{
    memmove(&s->action[i], &s->action[i + 1], (size_t)(s->n - i - 1) * sizeof *s->action);
    s->n--;
}

static void insert_action(struct schedule *s, int i, struct action a)
{
    s->action = realloc(s->action, (size_t)(s->n + 1) * sizeof *s->action);
    memmove(&s->action[i + 1], &s->action[i], (size_t)(s->n - i) * sizeof *s->action);
    s->action[i] = a;
    s->n++;
}

static void swap_actions(struct schedule *s, int i, int k)
{
    const struct action a = s->action[i];
    s->action[i] = s->action[k];
    s->action[k] = a;
}

static int find(const struct schedule *s, enum schedule_kind kind, int microbatch)
{
    for (int i = 0; i < s->n; i++)
        if (s->action[i].kind == kind && s->action[i].microbatch == microbatch)
            return i;
    fail();
    return -1;
}

static void test_the_verifier_names_the_fault(void **state)
{
    struct job j = job_of(two, 2, 4, false, true);
    struct schedule *e = &j.list[0], *l = &j.list[1];
    struct action a;
    int i;

    a = l->action[i = find(l, SCHEDULE_LANGUAGE_BACKWARD, 2)];
    delete_action(l, i);
    expect_fault(&j, "missing backward: rank 1 (language) never runs backward of micro-batch 2");
    insert_action(l, i, a);

    a = e->action[i = find(e, SCHEDULE_SEND_FORWARD, 0)];
    delete_action(e, i);
    expect_fault(&j,
                 "unmatched message: rank 0 (encoder) never sends the activation of micro-batch 0");
    insert_action(e, i, a);

    a = l->action[i = find(l, SCHEDULE_SEND_BACKWARD, 3)];
    insert_action(l, i, a);
    expect_fault(
        &j,
        "unmatched message: rank 1 (language) sends the gradient of micro-batch 3 more than once");
    delete_action(l, i);

    /* Forward of 2 in the slot of 0 before backward of 0. */
    i = find(e, SCHEDULE_ENCODER_BACKWARD, 0);
    swap_actions(e, i, i + 1);
    expect_fault(&j, "encoder_forward(2): slot reused while the micro-batch in it is live");
    swap_actions(e, i, i + 1);

    swap_actions(l, find(l, SCHEDULE_LANGUAGE_FORWARD, 1), find(l, SCHEDULE_LANGUAGE_FORWARD, 2));
    expect_fault(&j, "wrong order of micro-batches");
    swap_actions(l, find(l, SCHEDULE_LANGUAGE_FORWARD, 1), find(l, SCHEDULE_LANGUAGE_FORWARD, 2));

    e->action[0].slot = 1;
    expect_fault(&j, "names a wrong slot");
    e->action[0].slot = 0;
    e->action[0].kind = SCHEDULE_LANGUAGE_FORWARD;
    expect_fault(&j, "is for the other module");
    e->action[0].kind = SCHEDULE_ENCODER_FORWARD;
    e->action[0].microbatch = 4;
    expect_fault(&j, "micro-batch that does not exist");
    e->action[0].microbatch = 0;
    e->action[0].module = SCHEDULE_LANGUAGE;
    expect_fault(&j, "a module that this rank does not have");
    e->action[0].module = SCHEDULE_ENCODER;
    l->n_microbatches = 3;
    expect_fault(&j, "rank 1 was built for 3 micro-batches, rank 0 for 4");
    l->n_microbatches = 4;
    expect_sound(&j);
    job_free(&j);
}

static void test_the_verifier_finds_deadlocks_and_says_who_waits_for_whom(void **state)
{
    /* Plain send and receive where the other side has a combined call: each list is right by
     * itself. */
    struct job j = job_of(two, 2, 2, false, true);
    struct schedule *e = &j.list[0];
    const int i = find(e, SCHEDULE_SEND_FORWARD_RECV_BACKWARD, 1);
    struct action send = e->action[i], recv = e->action[i];
    send.kind = SCHEDULE_SEND_FORWARD;
    recv.kind = SCHEDULE_RECV_BACKWARD;
    recv.microbatch = send.partner;
    recv.slot = 0;
    send.partner = recv.partner = -1;
    e->action[i] = send;
    insert_action(e, i + 1, recv);
    expect_fault(&j, "deadlock: rank 0 (encoder) at action 3 send_forward(1) "
                     "waits for rank 1 (language) at action 3 "
                     "send_backward_recv_forward(g0,a1) waits for rank 0 (encoder)");
    job_free(&j);

    /* A last stage that computes all forwards first would do with the messages, not with one slot.
     */
    j = job_of(deep, 2, 3, false, true);
    struct schedule *first = &j.list[1];
    first->language_slots = 1;
    for (int k = 0; k < first->n; k++)
        if (first->action[k].slot >= 0)
            first->action[k].slot = 0;
    expect_fault(&j, "slot reused while the micro-batch in it is live");
    job_free(&j);

    /* One rank of a stage skips ahead of its neighbour, which waits in a collective. */
    const struct topology_spec pair[] = { { "language", 4, 0, 2, 1, 2, 1, 1 } };
    j = job_of(pair, 1, 2, false, false);
    expect_sound(&j);
    struct schedule *s = &j.list[1];
    for (int k = 0; k + 2 < s->n; k++)
        if (s->action[k].kind == SCHEDULE_SEND_FORWARD) {
            struct action f = s->action[k + 1];
            if (f.kind != SCHEDULE_LANGUAGE_FORWARD)
                continue;
            delete_action(s, k + 1);
            insert_action(s, k, f);
            break;
        }
    expect_fault(&j, "the output before has not been sent");
    job_free(&j);
}

static bool detected(const struct job *j)
{
    struct errors e = { 0 };
    const bool ok = schedule_verify(j->list, j->topology, j->size, &e);
    assert_true(ok == (e.count == 0));
    errors_free(&e);
    return !ok;
}

static void test_every_single_edit_of_100_schedules_is_detected(void **state)
{
    const struct rng_key key = rng_key(1, "schedules");
    long edits = 0;
    for (uint64_t k = 0; k < 100; k++) {
        /* A random grid: layout, tensor and pipeline sizes, fan, micro-batches, what trains. */
        const int etp = 1 << rng_below(key, k, 0, 2), epp = 1 + (int)rng_below(key, k, 1, 2),
                  edp = 1 << rng_below(key, k, 2, 2);
        const int ltp = 1 << rng_below(key, k, 3, 2), lpp = 1 + (int)rng_below(key, k, 4, 3),
                  ldp = 1 << rng_below(key, k, 5, 2);
        const int layout = (int)rng_below(key, k, 6, 6), m = 1 + (int)rng_below(key, k, 7, 5);
        const bool forward_only = rng_below(key, k, 8, 4) == 0,
                   trains = rng_below(key, k, 9, 3) != 0;
        const int e = etp * epp * edp, l = ltp * lpp * ldp, same = 2 * ldp;
        const struct topology_spec disjoint[] = { { "encoder", e, 0, etp, 1, epp, 1, 1 },
                                                  { "language", l, e, ltp, 1, lpp, 1, 1 } };
        const struct topology_spec shared[] = { { "encoder", same, 0, 1, 1, 1, 1, 1 },
                                                { "language", same, 0, 2, 1, 1, 1, 1 } };
        const struct topology_spec only[] = { { "language", l, 0, ltp, 1, lpp, 1, 1 } };
        struct job j = job_of(layout == 0   ? shared
                              : layout == 1 ? only
                                            : disjoint,
                              layout == 1 ? 1 : 2, m, forward_only, trains);
        expect_sound(&j);
        for (int r = 0; r < j.size; r++) {
            struct schedule *s = &j.list[r];
            for (int i = 0; i < s->n; i++) {
                const struct action a = s->action[i];
                char text[96];
                delete_action(s, i);
                if (!detected(&j))
                    fail_msg("job %d rank %d: deleting %s is not seen", (int)k, r,
                             schedule_action_text(&a, text, sizeof text));
                insert_action(s, i, a);
                for (int at = 0; at <= s->n; at++) {
                    insert_action(s, at, a);
                    if (!detected(&j))
                        fail_msg("job %d rank %d: %s twice is not seen", (int)k, r,
                                 schedule_action_text(&a, text, sizeof text));
                    delete_action(s, at);
                }
                for (int other = i + 1; other < s->n; other++) {
                    const bool harmless = memcmp(&s->action[i], &s->action[other], sizeof a) == 0;
                    swap_actions(s, i, other);
                    if (detected(&j) == harmless)
                        fail_msg("job %d rank %d: exchanging actions %d and %d is not seen", (int)k,
                                 r, i, other);
                    swap_actions(s, i, other);
                    edits++;
                }
                edits += 2;
            }
        }
        expect_sound(&j);
        job_free(&j);
    }
    printf("%ld edits detected\n", edits);
}

static void test_an_edit_of_a_whole_stage_is_detected(void **state)
{
    /* The same swap on all ranks of a stage: nothing disagrees inside the stage any more. */
    const struct topology_spec specs[] = { { "encoder", 4, 0, 2, 1, 1, 1, 1 },
                                           { "language", 8, 4, 2, 1, 2, 1, 1 } };
    for (int stage = 0; stage < 3; stage++) {
        struct job j = job_of(specs, 2, 4, false, true);
        const int first = 4 * stage;
        for (int i = 0; i < j.list[first].n; i++)
            for (int k = i + 1; k < j.list[first].n; k++) {
                for (int r = first; r < first + 4; r++)
                    swap_actions(&j.list[r], i, k);
                if (!detected(&j))
                    fail_msg("stage %d: exchanging actions %d and %d is not seen", stage, i, k);
                for (int r = first; r < first + 4; r++)
                    swap_actions(&j.list[r], i, k);
            }
        job_free(&j);
    }
}

/* ---- running ---- */

static void count_call(void *ctx, const struct action *a)
{
    ((long *)ctx)[a->kind]++;
}

struct run {
    const struct schedule *list;
    const struct schedule_calls *calls;
};

static void run_list(void *run)
{
    const struct run *r = run;
    schedule_run(r->list, r->calls);
}

static void test_the_interpreter_calls_each_action_once_and_costs_little(void **state)
{
    struct job j = job_of(two, 2, 100000, false, true);
    long count[SCHEDULE_KIND_COUNT] = { 0 };
    struct schedule_calls calls = { .ctx = count };
    for (int k = 0; k < SCHEDULE_KIND_COUNT; k++)
        calls.call[k] = count_call;
    const double start = timer_now();
    schedule_run(&j.list[0], &calls);
    const double seconds = timer_now() - start;
    assert_int_equal(count[SCHEDULE_ENCODER_FORWARD], 100000);
    assert_int_equal(count[SCHEDULE_SEND_FORWARD_RECV_BACKWARD], 99999);
    assert_int_equal(count[SCHEDULE_SEND_FORWARD], 1);
    assert_int_equal(count[SCHEDULE_GRAD_SYNC], 1);
    printf("interpreter: %.4f us per action\n", 1e6 * seconds / j.list[0].n);
    assert_true(seconds / j.list[0].n < 2e-6);
    /* A kind without a call ends the job. */
    calls.call[SCHEDULE_SEND_FORWARD] = NULL;
    assert_int_equal(child_run(run_list, &(struct run){ &j.list[0], &calls }, NULL, 0),
                     EXIT_INTERNAL);
    job_free(&j);
}

static void test_verifying_all_800_ranks_is_fast(void **state)
{
    const struct topology_spec specs[] = { { "encoder", 32, 0, 1, 1, 1, 1, 1 },
                                           { "language", 768, 32, 2, 1, 1, 8, 1 } };
    struct job j = job_of(specs, 2, 6, false, true);
    const double start = timer_now();
    expect_sound(&j);
    const double seconds = timer_now() - start;
    printf("verifying 800 ranks: %.1f ms\n", 1e3 * seconds);
    assert_true(seconds < 1.0);
    delete_action(&j.list[799], 3);
    expect_fault(&j, "rank 799 (language)");
    job_free(&j);
}

/* ---- stages ---- */

/* Encoder of 2 stages in front of a language module of 3: 5 in all; stage s has 5-s-1 forwards
 * ahead of its first backward and as many micro-batches alive plus one. */
static void test_p12_41_stages_of_both_modules_add_up(void **state)
{
    const struct topology_spec specs[] = { { "encoder", 2, 0, 1, 1, 2, 1, 1 },
                                           { "language", 3, 2, 1, 1, 3, 1, 1 } };
    struct job j = job_of(specs, 2, 8, false, true);
    for (int stage = 0; stage < 5; stage++) {
        const struct schedule *s = &j.list[stage];
        int ahead = 0;
        for (int i = 0; s->action[i].kind != SCHEDULE_ENCODER_BACKWARD &&
                        s->action[i].kind != SCHEDULE_LANGUAGE_BACKWARD;
             i++)
            ahead += s->action[i].kind == SCHEDULE_ENCODER_FORWARD ||
                     s->action[i].kind == SCHEDULE_LANGUAGE_FORWARD;
        assert_int_equal(ahead, 5 - stage);
        assert_int_equal(stage < 2 ? s->encoder_slots : s->language_slots, 5 - stage);
        assert_int_equal(stage < 2 ? s->language_slots : s->encoder_slots, 0);
    }
    expect_sound(&j);
    job_free(&j);
}

/* Finalisation is the last action of each module that trains, once; a list without it, or with it
 * earlier, is a fault. */
static void test_p12_67_finalisation_cannot_be_left_out(void **state)
{
    for (int both = 0; both < 2; both++) {
        struct job j = job_of(both ? colocated : two, 2, 3, false, true);
        for (int r = 0; r < j.size; r++) {
            const struct schedule *s = &j.list[r];
            int syncs = 0;
            for (int i = 0; i < s->n; i++)
                syncs += s->action[i].kind == SCHEDULE_GRAD_SYNC;
            assert_int_equal(syncs, both ? 2 : 1);
            assert_int_equal(s->action[s->n - 1].kind, SCHEDULE_GRAD_SYNC);
        }
        struct schedule *s = &j.list[j.size - 1];
        const struct action sync = s->action[s->n - 1], before = s->action[s->n - 2];
        s->action[s->n - 1] = before;
        s->action[s->n - 2] = sync;
        expect_fault(&j, both ? "the language module comes first" : "are not finished");
        s->action[s->n - 2] = before;
        s->n--;
        expect_fault(&j, "reduces the gradients of its");
        s->n++;
        s->action[s->n - 1] = sync;
        expect_sound(&j);
        job_free(&j);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_p12_44_trace_of_two_stages_and_4_microbatches),
        cmocka_unit_test(test_p12_44_trace_of_two_stages_and_1_microbatch),
        cmocka_unit_test(test_p12_44_trace_of_three_stages),
        cmocka_unit_test(test_p12_50_frozen_encoder_sends_no_gradients),
        cmocka_unit_test(test_colocated_and_language_only_traces),
        cmocka_unit_test(test_p12_49_evaluation_runs_forward_only),
        cmocka_unit_test(test_p12_42_43_grids_of_the_upstream_tests_are_sound),
        cmocka_unit_test(test_the_verifier_names_the_fault),
        cmocka_unit_test(test_the_verifier_finds_deadlocks_and_says_who_waits_for_whom),
        cmocka_unit_test(test_every_single_edit_of_100_schedules_is_detected),
        cmocka_unit_test(test_an_edit_of_a_whole_stage_is_detected),
        cmocka_unit_test(test_the_interpreter_calls_each_action_once_and_costs_little),
        cmocka_unit_test(test_verifying_all_800_ranks_is_fast),
        cmocka_unit_test(test_p12_41_stages_of_both_modules_add_up),
        cmocka_unit_test(test_p12_67_finalisation_cannot_be_left_out),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
