/* test_watchdog.c - the sentence that names the rank that holds a job up (robustness.md F26, F30);
 * check_failures.py stops real ones. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>
#include "watchdog.h"

enum { RANKS = 6 };

static struct watchdog_slot before[RANKS], after[RANKS];

/* Everybody writes and waits: one encoder rank in the bridge, the others in a reduction. */
static int all_wait(void **state)
{
    for (int r = 0; r < RANKS; r++) {
        before[r] = (struct watchdog_slot){ .tick = 40,
                                            .quiet = 20,
                                            .iteration = 12,
                                            .role = "language",
                                            .host = "n02",
                                            .section = "grad sync",
                                            .call = "MPI_Allgather_c",
                                            .group = "language.dp" };
        if (r == 0)
            before[r] = (struct watchdog_slot){ .tick = 40,
                                                .quiet = 20,
                                                .iteration = 12,
                                                .role = "encoder",
                                                .host = "n01",
                                                .section = "bridge wait",
                                                .call = "MPI_Waitall",
                                                .group = "bridge.leaders" };
        after[r] = before[r];
        after[r].tick += 8;
        after[r].quiet += 8;
    }
    return 0;
}

static void expect(const char *sentence)
{
    char text[1600];
    watchdog_verdict(before, after, RANKS, 30.0, text, sizeof text);
    assert_string_equal(text, sentence);
}

static void F26_a_stopped_rank_is_named_with_where_it_was(void **state)
{
    after[3] = before[3];
    strcpy(after[3].call, "-");
    expect(
        "no sign of life for 30 s from rank 3 (language, host n02), last seen in iteration 12, grad sync; the other ranks wait");
}

static void F26_a_rank_that_computes_for_ever_is_named(void **state)
{
    strcpy(after[2].call, "-");
    strcpy(after[2].section, "forward");
    expect(
        "no progress for 30 s: rank 2 (language, host n02) in iteration 12, forward; the other ranks wait");
}

static void F26_silence_counts_more_than_work(void **state)
{
    strcpy(after[2].call, "-");
    after[5] = before[5];
    expect(
        "no sign of life for 30 s from rank 5 (language, host n02), last seen in iteration 12, grad sync, in MPI_Allgather_c of language.dp;"
        " the other ranks wait");
}

static void F26_a_rank_that_was_never_heard_of_is_named(void **state)
{
    before[1] = after[1] = (struct watchdog_slot){ .tick = 0 };
    expect("no sign of life for 30 s from rank 1 (never heard of); the other ranks wait");
}

static void F30_messages_that_do_not_fit_together_are_named_with_their_groups(void **state)
{
    expect(
        "no progress for 30 s: rank 0 (encoder, host n01) in iteration 12, bridge wait, in MPI_Waitall of bridge.leaders; "
        "rank 1 (language, host n02) in iteration 12, grad sync, in MPI_Allgather_c of language.dp; "
        "rank 2 (language, host n02) in iteration 12, grad sync, in MPI_Allgather_c of language.dp; "
        "rank 3 (language, host n02) in iteration 12, grad sync, in MPI_Allgather_c of language.dp; and 2 more");
}

static void a_rank_outside_the_loop_has_no_iteration(void **state)
{
    after[4].iteration = -1;
    strcpy(after[4].section, "start");
    strcpy(after[4].call, "-");
    expect("no progress for 30 s: rank 4 (language, host n02) in start; the other ranks wait");
}

static void a_sentence_that_does_not_fit_is_cut(void **state)
{
    char text[40];
    watchdog_verdict(before, after, RANKS, 30.0, text, sizeof text);
    assert_int_equal(strlen(text), sizeof text - 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(F26_a_stopped_rank_is_named_with_where_it_was, all_wait),
        cmocka_unit_test_setup(F26_a_rank_that_computes_for_ever_is_named, all_wait),
        cmocka_unit_test_setup(F26_silence_counts_more_than_work, all_wait),
        cmocka_unit_test_setup(F26_a_rank_that_was_never_heard_of_is_named, all_wait),
        cmocka_unit_test_setup(F30_messages_that_do_not_fit_together_are_named_with_their_groups,
                               all_wait),
        cmocka_unit_test_setup(a_rank_outside_the_loop_has_no_iteration, all_wait),
        cmocka_unit_test_setup(a_sentence_that_does_not_fit_is_cut, all_wait),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
