/* test_shadow.c - the shadow backend without a GPU: a primary that is right passes with every
 * operation in every kind of shape and in training steps of a model; a primary with one wrong
 * number in one operation is found, and the operation named.
 *
 * The primaries are ref's tables, with the optional operations put in: fp32, whose shadow must find
 * no difference at all, and fp64, whose difference is what rounding does.
 */
#include <errno.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>
#include "child.h"
#include "backend_shadow.h"
#include "model_fixture.h"
#include "shadow.h"
#include "shadow_broken.h"
#include "shadow_cases.h"

static struct backend_ops primary; /* of the shadow in use */

#define FUSED(p) \
    static void fused_forward_##p(struct stream *s, in_t a, in_t w, in_t offsets, in_t prob, \
                                  out_t h, out_t y) \
    { \
        backend_grouped_act_forward(&backend_ref_##p, s, a, w, offsets, prob, h, y); \
    } \
    static void fused_backward_##p(struct stream *s, in_t a, in_t w, in_t offsets, in_t h, \
                                   in_t prob, out_t dh, out_t dprob, out_t y) \
    { \
        backend_grouped_act_backward(&backend_ref_##p, s, a, w, offsets, h, prob, dh, dprob, y); \
    } \
    static struct backend_ops ref_##p(void) \
    { \
        struct backend_ops t = backend_ref_##p; \
        t.grouped_act_forward = fused_forward_##p; \
        t.grouped_act_backward = fused_backward_##p; \
        return t; \
    }
FUSED(f32)
FUSED(f64)

static void create(struct stream *s, const char *name)
{
    backend_shadow_stream(s, name, &primary);
}

/* The shadow of `primary`. */
static struct backend_ops shadow_of_primary(void)
{
    struct backend_ops t = backend_shadow_f32;
    t.act = primary.act;
    t.acc = primary.acc;
    t.scratch_bytes = primary.scratch_bytes;
    t.alloc = primary.alloc;
    t.release = primary.release;
    t.alloc_host = primary.alloc_host;
    t.release_host = primary.release_host;
    t.asynchronous = primary.asynchronous;
    t.memory = primary.memory;
    t.event_create = primary.event_create;
    t.event_destroy = primary.event_destroy;
    t.attention_work = primary.attention_work;
    t.ssd_work = primary.ssd_work;
    t.stream_create = create;
    return t;
}

/* Case `op` on a primary; true when the bench found nothing. The shadow itself ends the process. */
static bool run_case(const struct backend_ops *whole, int broken, int op, enum bench_kind kind,
                     uint64_t seed, char *trouble, size_t size)
{
    primary = broken_make(whole, broken);
    const struct backend_ops table = shadow_of_primary();
    struct stream stream, side;
    table.stream_create(&stream, "compute");
    whole->stream_create(&side, "side");
    struct bench b = { .be = &table,
                       .plain = whole,
                       .stream = &stream,
                       .side = &side,
                       .act = whole->act,
                       .acc = whole->acc };
    const bool ok = shadow_case_run(&b, op, kind, seed);
    snprintf(trouble, size, "%s", b.trouble);
    assert_true(shadow_calls((enum shadow_op)op) > 0);
    whole->stream_destroy(&side);
    table.stream_destroy(&stream);
    return ok;
}

static uint64_t fresh_seed(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    const uint64_t seed = (uint64_t)now.tv_sec * 1000000007u + (uint64_t)now.tv_nsec;
    printf("# seed %llu\n", (unsigned long long)seed);
    return seed;
}

static void every_case(const struct backend_ops *whole, double sample_above, uint64_t seed)
{
    char trouble[300];
    shadow_sample_above(sample_above);
    for (int op = 0; op < SHADOW_CASES; op++)
        for (int kind = BENCH_TINY; kind < BENCH_PRODUCTION; kind++)
            if (!run_case(whole, -1, op, (enum bench_kind)kind, seed, trouble, sizeof trouble))
                fail_msg("%s %s: %s", shadow_case[op].name, bench_kind_name[kind], trouble);
}

static void every_operation_agrees_with_itself(void **state)
{
    const struct backend_ops f32 = ref_f32();
    const uint64_t seed = fresh_seed();
    every_case(&f32, INFINITY, seed);
    every_case(&f32, 0, seed);
}

/* Of the same numbers each time: what rounding does to a few may reach any bound once in a thousand
 * years. */
static void every_operation_agrees_with_fp64(void **state)
{
    const struct backend_ops f64 = ref_f64();
    for (uint64_t seed = 1; seed <= 2; seed++) {
        every_case(&f64, INFINITY, seed);
        every_case(&f64, 0, seed);
    }
}

static void broken_child(void *which)
{
    const int op = *(int *)which;
    char trouble[300];
    const struct backend_ops f32 = ref_f32();
    run_case(&f32, op, op, BENCH_RAGGED, 5, trouble, sizeof trouble);
}

static void sampled_child(void *which)
{
    shadow_sample_above(0);
    broken_child(which);
}

/* One wrong number among the last elements of an output: sampled or not, its operation is named,
 * with values and tolerance. */
static void one_wrong_number_names_its_operation(void **state)
{
    void (*const how[])(void *) = { broken_child, sampled_child };
    shadow_sample_above(INFINITY);
    for (int op = 0; op < SHADOW_CASES; op++)
        for (int i = 0; i < 2; i++) {
            char said[2000], name[64];
            const int status = child_run(how[i], &(int){ op }, said, sizeof said);
            snprintf(name, sizeof name, "shadow: %s: ", shadow_case[op].name);
            if (status != EXIT_NUMERICS || !strstr(said, name) || !strstr(said, "tolerance") ||
                !strchr(said, '['))
                fail_msg("%s broken, %s: status %d, said: %s", shadow_case[op].name,
                         i ? "sampled" : "whole", status, said);
        }
}

/* ---- routing ---- */

enum { TOKENS = 5, EXPERTS = 8, CHOSEN = 3 };

/* Token 2's third best expert, 6, and a fourth, 1, that is `gap` behind it. */
static float gap;

static void swap_choice(struct stream *s, in_t logits, in_t bias, double scaling, bool given,
                        out_t scores, out_t expert, out_t prob)
{
    backend_ref_f32.router_forward(s, logits, bias, scaling, given, scores, expert, prob);
    int32_t *choice = (int32_t *)expert->data + 2 * CHOSEN;
    assert_int_equal(choice[2], 6);
    choice[2] = choice[1];
    choice[1] = choice[0];
    choice[0] = 1;
    backend_ref_f32.router_forward(s, logits, bias, scaling, true, scores, expert, prob);
}

static void other_choice(void *unused)
{
    float logit[TOKENS][EXPERTS], score[TOKENS][EXPERTS], prob[TOKENS][CHOSEN], sum[EXPERTS];
    int32_t expert[TOKENS][CHOSEN];
    int64_t count[EXPERTS];
    for (int t = 0; t < TOKENS; t++)
        for (int e = 0; e < EXPERTS; e++)
            logit[t][e] = e == 3 || e == 4 ? 1 : e == 6 ? 0.5f : e == 1 ? 0.5f - gap : -1;
    const struct tensor l = tensor_2d(logit, DTYPE_F32, PLACE_DEVICE, TOKENS, EXPERTS),
                        sc = tensor_2d(score, DTYPE_F32, PLACE_DEVICE, TOKENS, EXPERTS),
                        e = tensor_2d(expert, DTYPE_I32, PLACE_DEVICE, TOKENS, CHOSEN),
                        p = tensor_2d(prob, DTYPE_F32, PLACE_DEVICE, TOKENS, CHOSEN),
                        n = tensor_2d(count, DTYPE_I64, PLACE_DEVICE, 1, EXPERTS),
                        ps = tensor_2d(sum, DTYPE_F32, PLACE_DEVICE, 1, EXPERTS);
    primary = backend_ref_f32;
    primary.router_forward = swap_choice;
    const struct backend_ops table = shadow_of_primary();
    struct stream s;
    table.stream_create(&s, "compute");
    table.router_forward(&s, &l, NULL, 2.5, false, &sc, &e, &p);
    table.router_balance(&s, &sc, CHOSEN, 0, TOKENS, &n, &ps);
    table.stream_destroy(&s);
}

static void a_near_tie_may_be_chosen_either_way(void **state)
{
    char said[2000];
    gap = 1e-6f;
    assert_int_equal(child_run(other_choice, NULL, said, sizeof said), 0);
    assert_string_equal(said, "");
    gap = 1e-3f;
    assert_int_equal(child_run(other_choice, NULL, said, sizeof said), EXIT_NUMERICS);
    assert_non_null(strstr(said, "shadow: router_forward: expert[2,0] is 1 of ref and 6 of ref"));
}

/* ---- models ---- */

/* Two micro-batches of training, forward and backward, under the shadow of a whole table, or of one
 * with an operation broken. */
static void train_model(const struct backend_ops *whole, int broken)
{
    primary = broken_make(whole, broken);
    const struct backend_ops table = shadow_of_primary();
    const char *const o[] = { whole->act == DTYPE_F64 ? "run.precision=fp64"
                                                      : "run.precision=fp32" };
    struct fixture f;
    shadow_sample_above(INFINITY);
    fixture_open_on(&f, &table, 1, o);
    for (int i = 0; i < 2; i++) {
        fixture_batch(&f, i, 0);
        assert_true(isfinite(fixture_forward(&f, true)));
        fixture_backward(&f);
    }
    fixture_close(&f);
}

static void a_model_agrees(void **state)
{
    const struct backend_ops f32 = ref_f32(), f64 = ref_f64();
    train_model(&f32, -1);
    train_model(&f64, -1);
}

static void broken_model(void *which)
{
    const struct backend_ops f64 = ref_f64();
    train_model(&f64, *(int *)which);
}

static void a_broken_operation_of_a_model_is_named(void **state)
{
    static const int op[] = { SHADOW_ssd_backward, SHADOW_attention_forward, SHADOW_router_backward,
                              SHADOW_grouped_act_backward };
    for (size_t i = 0; i < sizeof op / sizeof *op; i++) {
        char said[2000], name[64];
        assert_int_equal(child_run(broken_model, &(int){ op[i] }, said, sizeof said),
                         EXIT_NUMERICS);
        snprintf(name, sizeof name, "shadow: %s: ", shadow_case[op[i]].name);
        assert_non_null(strstr(said, name));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_operation_agrees_with_itself),
        cmocka_unit_test(every_operation_agrees_with_fp64),
        cmocka_unit_test(one_wrong_number_names_its_operation),
        cmocka_unit_test(a_near_tie_may_be_chosen_either_way),
        cmocka_unit_test(a_model_agrees),
        cmocka_unit_test(a_broken_operation_of_a_model_is_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
