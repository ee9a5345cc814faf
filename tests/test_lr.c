/* test_lr.c - learning-rate and weight-decay curves against the vectors of training.md 2.7 and the
 * case order of 2.2. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>
#include "lr.h"

/* Vectors are printed with seven digits: half a unit of the last is at most 5e-7 of the value. */
static void assert_close(double got, double want, double relative)
{
    if (!(fabs(got - want) <= relative * fabs(want) + 1e-300))
        fail_msg("got %.9e, want %.9e", got, want);
}

static struct lr_schedule production(void)
{
    return (struct lr_schedule){ .style = DECK_LR_WSD,
                                 .wsd_style = DECK_WSD_MINUS_SQRT,
                                 .max = 1.2e-3,
                                 .min = 1.2e-5,
                                 .warmup = 1024000,
                                 .decay = 121046313,
                                 .anneal = 18310547 };
}

static void p12_83_production_wsd_minus_sqrt_matches_its_vectors(void **state)
{
    static const double v[][2] = { { 0, 0.0 },
                                   { 768, 9.0e-07 },
                                   { 512000, 6.0e-04 },
                                   { 1024000, 1.2e-03 },
                                   { 102735766, 1.2e-03 },
                                   { 102736534, 1.192306e-03 },
                                   { 107313402, 6.06e-04 },
                                   { 111891039, 3.599572e-04 },
                                   { 121045545, 1.202491e-05 },
                                   { 121046313, 1.2e-05 },
                                   { 121047081, 1.2e-05 } };
    struct lr_schedule s = production();

    for (size_t i = 0; i < sizeof v / sizeof v[0]; i++)
        assert_close(lr_at(&s, v[i][0]), v[i][1], 5e-7);
}

static void p12_83_mock_cosine_matches_its_vectors(void **state)
{
    static const double v[] = { 2e-04,        1.951546e-04, 1.810927e-04, 1.591907e-04,
                                1.315927e-04, 1.01e-04,     7.040732e-05, 4.280926e-05,
                                2.090732e-05, 6.845405e-06, 2e-06 };
    double gbs = 16;
    struct lr_schedule s = { .style = DECK_LR_COSINE, .max = 2e-4, .min = 2e-6, .decay = 10 * gbs };

    for (int k = 0; k <= 10; k++)
        assert_close(lr_at(&s, k * gbs), v[k], 5e-7);
}

static void wsd_tails_match_their_vectors(void **state)
{
    static const struct {
        int style;
        double v[5];
    } tails[] = { { DECK_WSD_LINEAR, { 1, .75, .5, .25, 0 } },
                  { DECK_WSD_COSINE, { 1, .8535534, .5, .1464466, 0 } },
                  { DECK_WSD_EXPONENTIAL, { 1, .6817928, .4142136, .1892071, 0 } },
                  { DECK_WSD_MINUS_SQRT, { 1, .5, .2928932, .1339746, 0 } } };

    for (int i = 0; i < 4; i++) {
        struct lr_schedule s = { .style = DECK_LR_WSD,
                                 .wsd_style = tails[i].style,
                                 .max = 1,
                                 .warmup = 100,
                                 .decay = 1000,
                                 .anneal = 200 };
        for (int j = 0; j < 5; j++)
            assert_true(fabs(lr_at(&s, 800 + 50 * j) - tails[i].v[j]) < 1e-7);
    }
}

static void inverse_square_root_matches_its_vectors(void **state)
{
    static const double v[][2] = {
        { 50, .5 }, { 100, 1 }, { 400, .5 }, { 1000, .3162278 }, { 1001, .01 }
    };
    struct lr_schedule s = {
        .style = DECK_LR_INVERSE_SQUARE_ROOT, .max = 1, .min = .01, .warmup = 100, .decay = 1000
    };

    for (int i = 0; i < 5; i++)
        assert_close(lr_at(&s, v[i][0]), v[i][1], 5e-7);
}

static void linear_falls_from_max_to_min_after_the_warmup(void **state)
{
    struct lr_schedule s = {
        .style = DECK_LR_LINEAR, .init = .1, .max = 1, .min = .2, .warmup = 10, .decay = 110
    };

    assert_close(lr_at(&s, 0), .1, 1e-15);
    assert_close(lr_at(&s, 5), .55, 1e-15);
    assert_close(lr_at(&s, 10), 1, 1e-15);
    assert_close(lr_at(&s, 60), .6, 1e-15);
    assert_close(lr_at(&s, 110), .2, 1e-15);
    assert_close(lr_at(&s, 111), .2, 1e-15);
}

static void constant_stays_after_the_end_of_the_decay(void **state)
{
    struct lr_schedule s = {
        .style = DECK_LR_CONSTANT, .max = 3e-4, .min = 1e-6, .warmup = 8, .decay = 80
    };

    assert_close(lr_at(&s, 4), 1.5e-4, 1e-15);
    assert_close(lr_at(&s, 1e6), 3e-4, 1e-15);
}

static void weight_decay_curves(void **state)
{
    struct lr_schedule s = {
        .wd_style = DECK_WD_LINEAR, .wd_start = .1, .wd_end = .3, .wd_steps = 100
    };

    assert_close(lr_weight_decay_at(&s, 0), .1, 1e-15);
    assert_close(lr_weight_decay_at(&s, 25), .15, 1e-15);
    assert_close(lr_weight_decay_at(&s, 100), .3, 1e-15);
    assert_close(lr_weight_decay_at(&s, 101), .3, 1e-15);
    s.wd_style = DECK_WD_COSINE;
    assert_close(lr_weight_decay_at(&s, 50), .2, 1e-15);
    assert_close(lr_weight_decay_at(&s, 25), .1 + .5 * (cos(.75 * 3.14159265358979323846) + 1) * .2,
                 1e-14);
    s.wd_style = DECK_WD_CONSTANT;
    assert_close(lr_weight_decay_at(&s, 25), .3, 1e-15);
}

static struct deck small_deck(void)
{
    struct deck d;

    memset(&d, 0, sizeof d);
    d.batch.global_batch_size = 24;
    d.run.train_iters = d.derived.train_iterations = 100;
    d.lr.lr = 1e-3;
    d.lr.lr_decay_style = DECK_LR_COSINE;
    d.lr.start_weight_decay = d.lr.end_weight_decay = -1.0;
    d.optimizer.weight_decay = 0.05;
    return d;
}

static void iteration_keys_count_in_samples(void **state)
{
    struct deck d = small_deck();
    struct lr_schedule s;

    d.lr.lr_warmup_iters = 5;
    d.lr.lr_decay_iters = 50;
    d.lr.lr_wsd_decay_iters = 10;
    lr_init(&s, &d);
    assert_true(s.warmup == 120 && s.decay == 1200 && s.anneal == 240 && s.wd_steps == 2400 &&
                s.n == 0);
    assert_true(s.wd_start == 0.05 && s.wd_end == 0.05);
    assert_close(lr_weight_decay_at(&s, 48), 0.05, 1e-15);
}

static void decay_ends_with_the_training_by_default(void **state)
{
    struct deck d = small_deck();
    struct lr_schedule s;

    lr_init(&s, &d);
    assert_true(s.decay == 2400);
    d.run.train_iters = 0;
    /* not whole iterations: the curve follows the samples asked for */
    d.run.train_samples = 2407;
    lr_init(&s, &d);
    assert_true(s.decay == 2407 && s.wd_steps == 2407);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(p12_83_production_wsd_minus_sqrt_matches_its_vectors),
        cmocka_unit_test(p12_83_mock_cosine_matches_its_vectors),
        cmocka_unit_test(wsd_tails_match_their_vectors),
        cmocka_unit_test(inverse_square_root_matches_its_vectors),
        cmocka_unit_test(linear_falls_from_max_to_min_after_the_warmup),
        cmocka_unit_test(constant_stays_after_the_end_of_the_decay),
        cmocka_unit_test(weight_decay_curves),
        cmocka_unit_test(iteration_keys_count_in_samples),
        cmocka_unit_test(decay_ends_with_the_training_by_default),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
