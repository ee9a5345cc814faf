/* test_data_pack.c - packs of a window: the greedy knapsack by hand, and what holds for any window.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include "data_pack.h"

enum { MOST = 128 };

static const int64_t none[MOST]; /* pictures */

/* Lengths 2 3 3 5 7 8 into 10: 8+2; 7 and the later of the 3s; 5 and the other. */
static void the_longest_that_fits_comes_next(void **state)
{
    static const int64_t length[] = { 5, 3, 8, 2, 7, 3 };
    static const int64_t want[3][2] = { { 2, 3 }, { 4, 5 }, { 0, 1 } };
    int64_t first[7], member[6];
    int seen[3] = { 0 };
    assert_int_equal(data_pack(length, none, 6, 10, 0, rng_key(1, "pack"), 0, 0, first, member), 3);
    for (int p = 0; p < 3; p++) {
        assert_int_equal(first[p], 2 * p);
        for (int k = 0; k < 3; k++)
            seen[k] += memcmp(member + first[p], want[k], sizeof want[k]) == 0;
    }
    assert_int_equal(first[3], 6);
    assert_true(seen[0] == 1 && seen[1] == 1 && seen[2] == 1);
}

static void every_sample_is_in_one_pack_that_is_not_too_long(void **state)
{
    int64_t length[MOST], first[MOST + 1], member[MOST];
    for (int64_t n = 1; n <= MOST; n += 9) {
        int count[MOST] = { 0 };
        for (int64_t i = 0; i < n; i++)
            length[i] = 1 + (int64_t)rng_below(rng_key(3, "length"), (uint64_t)n, (uint64_t)i, 100);
        const int64_t packs =
            data_pack(length, none, n, 100, 0, rng_key(1, "pack"), 5, 77, first, member);
        assert_true(packs >= 1 && packs <= n && first[0] == 0 && first[packs] == n);
        for (int64_t p = 0; p < packs; p++) {
            int64_t sum = 0;
            assert_true(first[p] < first[p + 1]);
            for (int64_t i = first[p]; i < first[p + 1]; i++) {
                sum += length[member[i]];
                count[member[i]]++;
            }
            assert_true(sum <= 100);
        }
        for (int64_t i = 0; i < n; i++)
            assert_int_equal(count[i], 1);
    }
}

/* The 3 has no room for its two pictures beside the 5's; the 2 and the 1 have. */
static void a_pack_is_full_when_its_pictures_are_too_many(void **state)
{
    static const int64_t length[] = { 5, 3, 2, 1 }, pictures[] = { 2, 2, 1, 0 };
    int64_t first[5], member[4];
    const int64_t packs =
        data_pack(length, pictures, 4, 100, 3, rng_key(1, "pack"), 0, 0, first, member);
    assert_int_equal(packs, 2);
    for (int64_t p = 0; p < packs; p++) {
        int64_t sum = 0;
        for (int64_t i = first[p]; i < first[p + 1]; i++)
            sum += pictures[member[i]];
        assert_true(sum <= 3);
    }
}

/* Equal lengths that fill a pack each: the order is all that is left. */
static void the_order_follows_from_key_stream_and_window(void **state)
{
    enum { N = 16 };
    int64_t length[N], first[N + 1], a[N], b[N];
    for (int i = 0; i < N; i++)
        length[i] = 7;
    data_pack(length, none, N, 7, 0, rng_key(1, "pack"), 2, 40, first, a);
    data_pack(length, none, N, 7, 0, rng_key(1, "pack"), 2, 40, first, b);
    assert_memory_equal(a, b, sizeof a);
    static const uint64_t other[3][3] = { { 2, 2, 40 }, { 1, 3, 40 }, { 1, 2, 56 } };
    for (int i = 0; i < 3; i++) {
        data_pack(length, none, N, 7, 0, rng_key(other[i][0], "pack"), other[i][1], other[i][2],
                  first, b);
        assert_memory_not_equal(a, b, sizeof a);
    }
    int64_t sorted = 0;
    for (int i = 0; i < N; i++)
        sorted += a[i] == N - 1 - i;
    assert_true(sorted < N / 2); /* not the order in which the packs were made */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_longest_that_fits_comes_next),
        cmocka_unit_test(every_sample_is_in_one_pack_that_is_not_too_long),
        cmocka_unit_test(a_pack_is_full_when_its_pictures_are_too_many),
        cmocka_unit_test(the_order_follows_from_key_stream_and_window),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
