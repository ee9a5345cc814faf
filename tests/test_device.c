/* test_device.c - which GPU and slot the ranks of a host get (run.ranks_per_gpu), and what is
 * said where one gets none. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>
#include "device.h"

enum { MOST = 16 };

/* Ranks of a slot have a GPU each, no place is given twice, and no GPU has two ranks more than
 * another. */
static void test_every_rank_gets_a_place_of_its_own(void **state)
{
    char why[512] = "";
    for (int gpus = 1; gpus <= 8; gpus++)
        for (int ranks = 1; ranks <= MOST; ranks++) {
            const int needed = (ranks + gpus - 1) / gpus;
            int taken[8][MOST] = { 0 }, load[8] = { 0 }, gpu, slot;
            for (int r = 0; r < ranks; r++) {
                assert_true(device_place(ranks, r, gpus, needed, &gpu, &slot, why, sizeof why));
                assert_in_range(gpu, 0, gpus - 1);
                assert_in_range(slot, 0, needed - 1);
                assert_int_equal(taken[gpu][slot]++, 0);
                load[gpu]++;
            }
            for (int g = 1; g < gpus; g++)
                assert_in_range(load[0] - load[g], 0, 1);
        }
    assert_string_equal(why, "");
}

static void test_ranks_go_round_the_gpus(void **state)
{
    static const struct {
        int rank, gpu, slot;
    } wanted[] = { { 0, 0, 0 }, { 1, 1, 0 }, { 2, 2, 0 }, { 3, 0, 1 }, { 5, 2, 1 }, { 6, 0, 2 } };
    char why[512];
    int gpu, slot;
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        assert_true(device_place(7, wanted[i].rank, 3, 3, &gpu, &slot, why, sizeof why));
        assert_int_equal(gpu, wanted[i].gpu);
        assert_int_equal(slot, wanted[i].slot);
    }
}

/* Also on ranks that would find a place: a host's ranks agree. */
static void test_too_few_gpus_are_refused_with_the_way_out(void **state)
{
    char why[512];
    int gpu, slot;
    for (int r = 0; r < 4; r++) {
        assert_false(device_place(4, r, 2, 1, &gpu, &slot, why, sizeof why));
        assert_non_null(strstr(why, "4 ranks on this host but 2 visible GPUs: "));
        assert_non_null(strstr(why, "run.ranks_per_gpu = 1 must be 2 or more"));
    }
    assert_false(device_place(9, 0, 1, 8, &gpu, &slot, why, sizeof why));
    assert_non_null(strstr(why, "9 ranks on this host but 1 visible GPU: "));
    assert_non_null(strstr(why, "run.ranks_per_gpu = 8 must be 9 or more"));
    assert_true(device_place(9, 0, 1, 9, &gpu, &slot, why, sizeof why));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_rank_gets_a_place_of_its_own),
        cmocka_unit_test(test_ranks_go_round_the_gpus),
        cmocka_unit_test(test_too_few_gpus_are_refused_with_the_way_out),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
