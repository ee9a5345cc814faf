/* test_ref_optim.c - gradient statistics and AdamW of the reference backend (parallel.md 7.3). */
#include "ref_check.h"

static const enum dtype real_dtype[2] = { DTYPE_F32, DTYPE_F64 };

static void sum_squares_adds_in_double(void **state)
{
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct tensor x = ref_check_matrix(real_dtype[fp64], 101, 37, 3),
                      total = ref_check_vector(real_dtype[fp64], 1);
        struct tensor empty = ref_check_matrix(real_dtype[fp64], 0, 37, 0);
        struct ref_check_random rng = { 1 };
        double expected = 0;
        ref_check_fill_random(&x, &rng, -1, 1);
        REF_CHECK_EACH(&x, r, c)
        expected += ref_check_get(&x, r, c) * ref_check_get(&x, r, c);
        ref_check_fill(&total, 0.5);
        REF_CHECK_OP(fp64, sum_squares)(NULL, &x, &total);
        REF_CHECK_OP(fp64, sum_squares)(NULL, &empty, &total);
        ref_check_value(ref_check_get(&total, 0, 0), expected + 0.5, fp64 ? 1e-14 : 1e-7,
                        "sum of squares");
        ref_check_free(&x);
        ref_check_free(&empty);
        ref_check_free(&total);
    }
    /* 2^24 and then ones: lost one by one in fp32, kept in double */
    struct tensor x = ref_check_vector(DTYPE_F32, 1025), total = ref_check_vector(DTYPE_F32, 1);
    ref_check_fill(&x, 1);
    ref_check_set(&x, 0, 0, 4096);
    ref_check_fill(&total, 0);
    ref_sum_squares_f32(NULL, &x, &total);
    ref_check_value(ref_check_get(&total, 0, 0), 16777216 + 1024, 0,
                    "sum of squares with a large first");
    ref_check_free(&x);
    ref_check_free(&total);
}

static void count_zeros_adds(void **state)
{
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct tensor x = ref_check_matrix(real_dtype[fp64], 3, 5, 2),
                      total = ref_check_vector(DTYPE_I64, 1);
        ref_check_fill(&x, 1e-30);
        ref_check_set(&x, 0, 0, 0);
        ref_check_set(&x, 2, 4, -0.0);
        ref_check_set(&x, 1, 1, NAN);
        ref_check_fill(&total, 40);
        REF_CHECK_OP(fp64, count_zeros)(NULL, &x, &total);
        assert_int_equal(*(int64_t *)total.data, 42);
        ref_check_free(&x);
        ref_check_free(&total);
    }
}

/* A factor as adamw reads it. */
static struct tensor factor_of(double *value)
{
    return tensor_1d(value, DTYPE_F64, PLACE_DEVICE, 1);
}

struct state {
    struct tensor grad, master, m, v, param;
};

static struct state state_new(bool fp64, int64_t rows, int64_t cols)
{
    enum dtype t = real_dtype[fp64];
    struct state s = { ref_check_matrix(t, rows, cols, 1), ref_check_matrix(t, rows, cols, 2),
                       ref_check_matrix(t, rows, cols, 0), ref_check_matrix(t, rows, cols, 0),
                       ref_check_matrix(t, rows, cols, 3) };
    ref_check_fill(&s.m, 0);
    ref_check_fill(&s.v, 0);
    return s;
}

static void state_free(struct state *s)
{
    struct tensor *all[] = { &s->grad, &s->master, &s->m, &s->v, &s->param };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        ref_check_free(all[i]);
}

static void adamw_first_step_by_hand(void **state)
{
    /* g = 4*0.5 = 2; after bias correction m = 2, v = 4: p -= 0.1*(2/(2+1) + 0.01*10) */
    double half = 0.5;
    const struct tensor factor = factor_of(&half);
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct state s = state_new(fp64, 1, 1);
        double tolerance = fp64 ? 1e-14 : 5e-7;
        ref_check_fill(&s.grad, 4);
        ref_check_fill(&s.master, 10);
        REF_CHECK_OP(fp64, adamw)
        (NULL, &s.grad, &factor, 0.1, 0.9, 0.95, 1, 0.01, 1, &s.master, &s.m, &s.v, &s.param);
        ref_check_value(ref_check_get(&s.master, 0, 0), 10 - 0.1 * (2.0 / 3 + 0.1), tolerance,
                        "master");
        ref_check_value(ref_check_get(&s.m, 0, 0), 0.2, tolerance, "m");
        ref_check_value(ref_check_get(&s.v, 0, 0), 0.2, tolerance, "v");
        ref_check_same(&s.param, &s.master, "param");
        state_free(&s);
    }
}

/* Many steps with changing gradients and rates against the formulas in double. */
static void adamw_follows_the_formula(void **state)
{
    enum { ROWS = 3, COLS = 41, STEPS = 7 };
    const double b1 = 0.9, b2 = 0.95, eps = 1e-8, wd = 0.1;
    double quarter = 0.25;
    const struct tensor factor = factor_of(&quarter);
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct ref_check_random rng = { 2 };
        struct state s = state_new(fp64, ROWS, COLS);
        double p[ROWS][COLS], m[ROWS][COLS] = { { 0 } }, v[ROWS][COLS] = { { 0 } };
        struct tensor expected = ref_check_matrix(DTYPE_F64, ROWS, COLS, 0);
        ref_check_fill_random(&s.master, &rng, -1, 1);
        REF_CHECK_EACH(&s.master, r, c)
        p[r][c] = ref_check_get(&s.master, r, c);
        double start = p[1][1];
        for (int step = 1; step <= STEPS; step++) {
            double lr = 0.01 * step;
            ref_check_fill_random(&s.grad, &rng, -1, 1);
            ref_check_set(&s.grad, 1, 1, 0); /* never a gradient: only the decay moves it */
            REF_CHECK_OP(fp64, adamw)
            (NULL, &s.grad, &factor, lr, b1, b2, eps, wd, step, &s.master, &s.m, &s.v, &s.param);
            REF_CHECK_EACH(&s.master, r, c)
            {
                double g = ref_check_get(&s.grad, r, c) * quarter;
                m[r][c] = b1 * m[r][c] + (1 - b1) * g;
                v[r][c] = b2 * v[r][c] + (1 - b2) * g * g;
                double mh = m[r][c] / (1 - pow(b1, step)), vh = v[r][c] / (1 - pow(b2, step));
                p[r][c] = p[r][c] - lr * (mh / (sqrt(vh) + eps) + wd * p[r][c]);
                ref_check_set(&expected, r, c, p[r][c]);
            }
            ref_check_near(&s.master, &expected, fp64 ? 1e-14 : 1e-6, "master");
            ref_check_same(&s.param, &s.master, "param");
        }
        double decayed = start;
        for (int step = 1; step <= STEPS; step++)
            decayed *= 1 - 0.01 * step * wd;
        ref_check_value(ref_check_get(&s.master, 1, 1), decayed, fp64 ? 1e-15 : 5e-7,
                        "decay alone");
        ref_check_padding(&s.master, "master");
        ref_check_padding(&s.param, "param");
        ref_check_free(&expected);
        state_free(&s);
    }
}

/* Two shards give the same bits as the whole: the distributed optimizer cuts anywhere. */
static void adamw_of_shards_equals_whole_bitwise(void **state)
{
    enum { N = 53, CUT = 20 };
    double scale = 0.3;
    const struct tensor factor = factor_of(&scale);
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct ref_check_random rng = { 3 };
        struct state a = state_new(fp64, N, 1), b = state_new(fp64, N, 1);
        ref_check_fill_random(&a.grad, &rng, -1, 1);
        ref_check_fill_random(&a.master, &rng, -1, 1);
        ref_check_convert(&a.grad, &b.grad);
        ref_check_convert(&a.master, &b.master);
        for (int step = 1; step <= 3; step++) {
            REF_CHECK_OP(fp64, adamw)
            (NULL, &a.grad, &factor, 1e-3, 0.9, 0.95, 1e-8, 0.1, step, &a.master, &a.m, &a.v,
             &a.param);
            for (int part = 0; part < 2; part++) {
                struct tensor t[5] = { b.grad, b.master, b.m, b.v, b.param };
                for (int i = 0; i < 5; i++) {
                    t[i].data = (char *)t[i].data +
                                (size_t)(part * CUT * t[i].ld) * dtype_bytes(t[i].dtype);
                    t[i].shape[0] = part == 0 ? CUT : N - CUT;
                }
                REF_CHECK_OP(fp64, adamw)
                (NULL, &t[0], &factor, 1e-3, 0.9, 0.95, 1e-8, 0.1, step, &t[1], &t[2], &t[3],
                 &t[4]);
            }
        }
        ref_check_same(&a.master, &b.master, "master");
        ref_check_same(&a.m, &b.m, "m");
        ref_check_same(&a.v, &b.v, "v");
        state_free(&a);
        state_free(&b);
    }
}

/* A negative factor is no update: not even the moments move, whatever the gradient holds. */
static void adamw_with_a_negative_factor_changes_nothing(void **state)
{
    double none = -1;
    const struct tensor factor = factor_of(&none);
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct ref_check_random rng = { 5 };
        struct state s = state_new(fp64, 5, 9), before = state_new(fp64, 5, 9);
        ref_check_fill_random(&s.grad, &rng, -1, 1);
        ref_check_set(&s.grad, 2, 3, NAN);
        ref_check_fill_random(&s.master, &rng, -1, 1);
        ref_check_fill_random(&s.m, &rng, -1, 1);
        ref_check_fill_random(&s.v, &rng, 0, 1);
        ref_check_fill_random(&s.param, &rng, -1, 1);
        ref_check_convert(&s.master, &before.master);
        ref_check_convert(&s.m, &before.m);
        ref_check_convert(&s.v, &before.v);
        ref_check_convert(&s.param, &before.param);
        REF_CHECK_OP(fp64, adamw)
        (NULL, &s.grad, &factor, 0.1, 0.9, 0.95, 1e-8, 0.1, 3, &s.master, &s.m, &s.v, &s.param);
        ref_check_same(&s.master, &before.master, "master");
        ref_check_same(&s.m, &before.m, "m");
        ref_check_same(&s.v, &before.v, "v");
        ref_check_same(&s.param, &before.param, "param");
        state_free(&s);
        state_free(&before);
    }
}

static void sum_wide_adds_in_order_in_double(void **state)
{
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct tensor x = ref_check_vector(real_dtype[fp64], 1000),
                      total = ref_check_vector(DTYPE_F64, 1),
                      none = ref_check_vector(real_dtype[fp64], 0);
        struct ref_check_random rng = { 6 };
        double expected = 0;
        ref_check_fill_random(&x, &rng, -1, 1);
        ref_check_set(&x, 0, 0, 1e16);
        ref_check_set(&x, 0, 999, -1e16);
        for (int64_t i = 0; i < 1000; i++)
            expected += ref_check_get(&x, 0, i);
        ref_check_fill(&total, 77);
        REF_CHECK_OP(fp64, sum_wide)(NULL, &x, &total);
        ref_check_value(ref_check_get(&total, 0, 0), expected, 0, "sum");
        REF_CHECK_OP(fp64, sum_wide)(NULL, &none, &total);
        ref_check_value(ref_check_get(&total, 0, 0), 0, 0, "sum of nothing");
        ref_check_free(&x);
        ref_check_free(&none);
        ref_check_free(&total);
    }
}

/* Three ranks, two modules: {loss sum, squares of module 0, of module 1}. */
struct decision {
    double clip, threshold, tokens, rows[3][3], expected[5];
};

static void decide_update_cases(void **state)
{
    /* factors 1/2 and 1/4: squares 36/4 + 112/16 = 16, norm 4; loss 12/6 */
    const double factor[2] = { 0.5, 0.25 };
    const struct decision c[] = {
        { 0, 0, 6, { { 3, 4, 0 }, { 9, 32, 100 }, { 0, 0, 12 } }, { 0.5, 0.25, 2, 4, -1 } },
        { 8, 0, 6, { { 3, 4, 0 }, { 9, 32, 100 }, { 0, 0, 12 } }, { 0.5, 0.25, 2, 4, -1 } },
        { 1,
          0,
          6,
          { { 3, 4, 0 }, { 9, 32, 100 }, { 0, 0, 12 } },
          { 0.5 * (1 / (4 + 1e-6)), 0.25 * (1 / (4 + 1e-6)), 2, 4, -1 } },
        { 0, 4, 6, { { 3, 4, 0 }, { 9, 32, 100 }, { 0, 0, 12 } }, { 0.5, 0.25, 2, 4, -1 } },
        { 0, 3.9, 6, { { 3, 4, 0 }, { 9, 32, 100 }, { 0, 0, 12 } }, { -1, -1, 2, 4, -1 } },
        { 0, 0, 0, { { 3, 4, 0 }, { 9, 32, 100 }, { 0, 0, 12 } }, { 0.5, 0.25, 12, 4, -1 } },
        { 1, 0, 6, { { NAN, 4, 0 }, { 9, 32, 100 }, { 0, 0, 12 } }, { -1, -1, NAN, 4, -1 } },
        { 1,
          0,
          6,
          { { 3, 4, 0 }, { INFINITY, 32, 100 }, { 0, 0, 12 } },
          { -1, -1, INFINITY, 4, -1 } },
        { 1,
          0,
          6,
          { { 3, 4, 0 }, { 9, INFINITY, 100 }, { 0, 0, 12 } },
          { -1, -1, 2, INFINITY, 0 } },
        { 1, 0, 6, { { 3, 4, 0 }, { 9, INFINITY, 100 }, { 0, 0, NAN } }, { -1, -1, 2, NAN, 1 } },
        { 1, 0, 6, { { 3, NAN, 0 }, { 9, 32, 100 }, { 0, 0, NAN } }, { -1, -1, 2, NAN, 0 } },
    };
    for (int fp64 = 0; fp64 < 2; fp64++)
        for (size_t i = 0; i < sizeof c / sizeof c[0]; i++) {
            double rows[3][3], got[5] = { 7, 7, 7, 7, 7 };
            memcpy(rows, c[i].rows, sizeof rows);
            const struct tensor numbers = tensor_2d(rows, DTYPE_F64, PLACE_DEVICE, 3, 3),
                                result = tensor_1d(got, DTYPE_F64, PLACE_DEVICE, 5);
            REF_CHECK_OP(fp64, decide_update)
            (NULL, &numbers, c[i].tokens, factor, c[i].clip, c[i].threshold, &result);
            for (int k = 0; k < 5; k++)
                if (!(got[k] == c[i].expected[k] || (isnan(got[k]) && isnan(c[i].expected[k]))))
                    fail_msg("case %zu, result %d: %.17g instead of %.17g", i, k, got[k],
                             c[i].expected[k]);
        }
}

static void adamw_of_nothing(void **state)
{
    double one = 1;
    const struct tensor factor = factor_of(&one);
    for (int fp64 = 0; fp64 < 2; fp64++) {
        struct tensor none = ref_check_vector(real_dtype[fp64], 0);
        REF_CHECK_OP(fp64, adamw)
        (NULL, &none, &factor, 1, 0.9, 0.95, 1e-8, 0, 1, &none, &none, &none, &none);
        ref_check_free(&none);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sum_squares_adds_in_double),
        cmocka_unit_test(count_zeros_adds),
        cmocka_unit_test(adamw_first_step_by_hand),
        cmocka_unit_test(adamw_follows_the_formula),
        cmocka_unit_test(adamw_of_shards_equals_whole_bitwise),
        cmocka_unit_test(adamw_with_a_negative_factor_changes_nothing),
        cmocka_unit_test(sum_wide_adds_in_order_in_double),
        cmocka_unit_test(decide_update_cases),
        cmocka_unit_test(adamw_of_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
