/* ranks: 1 2 4 8 */
/* mpi_optim.c - gradient sync, global norm, clip, AdamW and the skip policies against a plain AdamW written here, on every grid split.
 *
 * Gradients are a formula of (parameter, element, data-parallel rank, step), so every rank can compute the sum over replicas and the
 * norm of both modules by itself. What a rank finds is reduced over the world before anything is asserted: all ranks fail together.
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
#include "optim.h"

struct job {
    struct comm *world;
    struct deck deck, whole_deck;
    struct topology topo, whole_topo;
    struct model model, whole;            /* whole: declarations of all modules, no memory */
    struct stream stream;
    struct arenas arenas;
    struct optim optim;
    double **master, **m, **v;            /* [n_params][numel] of the reference */
    int64_t step;
};

static const char deck_text[] =
    "&run seed = 7 train_iters = 4 precision = 'fp64' /\n&language preset = 'tiny' /\n&batch global_batch_size = 8 /\n"
    "&optimizer adam_beta2 = 0.95 weight_decay = 0.1 /\n&lr lr = 1e-3 lr_decay_style = 'constant' /\n";

static void read_deck(struct deck *deck, struct topology *t, int size, int rank, int n, const char *const *overrides)
{
    struct errors e = {0};
    char *copy[8];

    for (int i = 0; i < n; i++) copy[i] = xstrdup(overrides[i]);
    deck_read(deck, "test", deck_text, strlen(deck_text), n, copy, &e);
    deck_resolve(deck, size, &e);
    if (e.count == 0) topology_init(t, deck, size, rank, &e);
    errors_print(&e);
    ASSERT(e.count == 0);
    for (int i = 0; i < n; i++) free(copy[i]);
}

static void open_job(struct job *j, struct comm *world, int n, const char *const *overrides)
{
    const struct backend_ops *be = &backend_ref_f64;

    memset(j, 0, sizeof *j);
    j->world = world;
    read_deck(&j->deck, &j->topo, world->size, world->rank, n, overrides);
    read_deck(&j->whole_deck, &j->whole_topo, 1, 0, n, overrides);
    topology_connect(&j->topo, world);
    be->stream_create(&j->stream, "compute");
    model_init(&j->model, &j->deck, &j->topo, be, &j->stream);
    model_init(&j->whole, &j->whole_deck, &j->whole_topo, be, &j->stream);
    optim_init(&j->optim, &j->deck, &j->topo, &j->model, be, &comm_mpi, &j->stream);
    arenas_init(&j->arenas);
    for (int pass = 0; pass < 2; pass++) {
        model_plan(&j->model, &j->arenas);
        optim_plan(&j->optim, &j->arenas);
        if (pass == 0) arenas_commit(&j->arenas, be);
    }
    model_initialise(&j->model);
    optim_refresh_masters(&j->optim);
    int np = j->model.n_params;
    j->master = xcalloc((size_t)np, sizeof *j->master);
    j->m = xcalloc((size_t)np, sizeof *j->m);
    j->v = xcalloc((size_t)np, sizeof *j->v);
    for (int i = 0; i < np; i++) {
        size_t count = (size_t)tensor_numel(&j->model.param[i].value);
        j->master[i] = xcalloc(count, sizeof(double));
        j->m[i] = xcalloc(count, sizeof(double));
        j->v[i] = xcalloc(count, sizeof(double));
        memcpy(j->master[i], j->model.param[i].value.data, count * sizeof(double));
    }
}

static void close_job(struct job *j)
{
    for (int i = 0; i < j->model.n_params; i++) {
        free(j->master[i]);
        free(j->m[i]);
        free(j->v[i]);
    }
    free(j->master);
    free(j->m);
    free(j->v);
    arenas_free(&j->arenas, &backend_ref_f64);
    model_free(&j->model);
    model_free(&j->whole);
    backend_ref_f64.stream_destroy(&j->stream);
    topology_free(&j->topo);
    topology_free(&j->whole_topo);
    deck_free(&j->deck);
    deck_free(&j->whole_deck);
}

/* A gradient of replica d: a tenth of the elements is exactly zero on all replicas. */
static double gradient(const struct param *p, int64_t i, int d, int64_t step)
{
    uint64_t h = 1469598103934665603u;

    for (const char *c = p->name; *c; c++) h = (h ^ (unsigned char)*c) * 1099511628211u;
    h = (h ^ (uint64_t)i) * 1099511628211u;
    if (h / 7 % 10 == 0) return 0.0;
    h = (h ^ (uint64_t)(d + 100 * step)) * 1099511628211u;
    return ((double)(h >> 20 & 0xffff) / 32768.0 - 1.0) * (p->module == MODEL_LANGUAGE ? 3.0 : 1.0);
}

static int replicas(const struct job *j, const struct param *p)
{
    return p->module == MODEL_LANGUAGE ? j->topo.language.dp_size : j->topo.encoder.dp_size;
}

static double summed(const struct job *j, const struct param *p, int64_t i, int64_t step)
{
    double sum = 0.0;

    for (int d = 0; d < replicas(j, p); d++) sum += gradient(p, i, d, step);
    return sum;
}

static void fill_gradients(struct job *j, int64_t step)
{
    model_zero_grads(&j->model);
    for (int k = 0; k < j->model.n_params; k++) {
        struct param *p = &j->model.param[k];
        int d = p->module == MODEL_LANGUAGE ? j->topo.language.dp_rank : j->topo.encoder.dp_rank;
        for (int64_t i = 0; p->trainable && i < tensor_numel(&p->grad); i++)
            ((double *)p->grad.data)[i] = gradient(p, i, d, step);
    }
}

static void sync_gradients(struct job *j)
{
    optim_grad_sync(&j->optim, false);
    optim_grad_sync(&j->optim, true);
}

/* Norm and zeros of the whole model's summed gradients after the factors. */
static double reference_norm(const struct job *j, double n_tokens, double encoder_factor, int64_t step, int64_t *zeros)
{
    double sum = 0.0;

    *zeros = 0;
    for (int k = 0; k < j->whole.n_params; k++) {
        const struct param *p = &j->whole.param[k];
        double factor = (p->module == MODEL_LANGUAGE ? 1.0 : encoder_factor) / n_tokens;
        int64_t count = 1;
        if (!p->trainable) continue;
        for (int d = 0; d < p->ndim; d++) count *= p->shape[d];
        for (int64_t i = 0; i < count; i++) {
            double g = summed(j, p, i, step) * factor;
            sum += g * g;
            *zeros += g == 0.0;
        }
    }
    return sqrt(sum);
}

/* AdamW as the formula says; 1-D tensors and biases are not decayed. */
static void reference_update(struct job *j, double n_tokens, double encoder_factor, double clip, double lr, double wd, int64_t step)
{
    double b1 = 0.9, b2 = 0.95, eps = 1e-8;

    j->step++;
    for (int k = 0; k < j->model.n_params; k++) {
        const struct param *p = &j->model.param[k];
        size_t length = strlen(p->name);
        bool decayed = p->ndim > 1 && !(length >= 4 && strcmp(p->name + length - 4, "bias") == 0);
        for (int64_t i = 0; p->trainable && i < tensor_numel(&p->value); i++) {
            double g = summed(j, p, i, step) / n_tokens * (p->module == MODEL_LANGUAGE ? 1.0 : encoder_factor) * clip;
            double *m = &j->m[k][i], *v = &j->v[k][i], *x = &j->master[k][i];
            *m = b1 * *m + (1 - b1) * g;
            *v = b2 * *v + (1 - b2) * g * g;
            *x -= lr * (*m / (1 - pow(b1, (double)j->step)) / (sqrt(*v / (1 - pow(b2, (double)j->step))) + eps) +
                        (decayed ? wd : 0.0) * *x);
        }
    }
}

/* Largest difference to the reference over all parameters of all ranks, relative to 1e-3 + |value|; the moments count too. */
static double distance(struct job *j)
{
    double worst = 0.0;

    for (int k = 0; k < j->model.n_params; k++) {
        const struct param *p = &j->model.param[k];
        for (int64_t i = 0; i < tensor_numel(&p->value); i++) {
            double x = j->master[k][i];
            worst = fmax(worst, fabs(((double *)p->value.data)[i] - x) / (1e-3 + fabs(x)));
            if (!p->trainable) continue;
            worst = fmax(worst, fabs(((double *)p->master.data)[i] - x) / (1e-3 + fabs(x)));
            worst = fmax(worst, fabs(((double *)p->m.data)[i] - j->m[k][i]));
            worst = fmax(worst, fabs(((double *)p->v.data)[i] - j->v[k][i]));
        }
    }
    comm_host_reduce_f64(j->world, &worst, 1, COMM_MAX);
    return worst;
}

static void follow_the_reference(struct comm *world, const char *stage, const char *freeze)
{
    static const double n_tokens[] = {37.0, 0.25, 4000.0}, lr[] = {1e-3, 5e-3, 2e-4}, wd[] = {0.1, 0.0, 0.3};
    const char *overrides[] = {stage, "log.log_num_zeros_in_grad=T", "log.log_params_norm=T", freeze};
    struct job j;
    int64_t zeros;

    open_job(&j, world, freeze ? 4 : 3, overrides);
    for (int64_t s = 0; s < 3; s++) {
        double n = n_tokens[s] > 1.0 ? n_tokens[s] : 1.0, factor = s == 1 ? 2.0 : 1.0;
        double norm = reference_norm(&j, n, factor, s, &zeros), clip = fmin(1.0, 1.0 / (norm + 1e-6));
        fill_gradients(&j, s);
        sync_gradients(&j);
        struct optim_result r = optim_step(&j.optim, n_tokens[s], factor, lr[s], wd[s]);
        reference_update(&j, n, factor, clip, lr[s], wd[s], s);
        assert_true(r.applied);
        assert_true(fabs(r.grad_norm - norm) <= 1e-12 * norm);
        assert_int_equal(r.num_zeros, zeros);
        assert_true(s != 0 || clip < 1.0);
        assert_true(distance(&j) < 1e-11);
        assert_true(isfinite(r.params_norm) && r.params_norm > 0.0);
    }
    assert_int_equal(j.optim.step, 3);
    close_job(&j);
}

static void every_module_trains_like_plain_adamw(void **state)
{
    follow_the_reference(*state, "stage.training_stage=3", NULL);
}

static void stage_1_updates_the_projector_alone(void **state)
{
    follow_the_reference(*state, "stage.training_stage=1", NULL);
}

static void stage_2_leaves_the_vision_module_alone(void **state)
{
    follow_the_reference(*state, "stage.training_stage=2", NULL);
}

static void a_frozen_encoder_grid_joins_as_a_stub(void **state)
{
    follow_the_reference(*state, "stage.training_stage=2", "stage.freeze_projection=T");
}

static void a_frozen_language_grid_joins_as_a_stub(void **state)
{
    follow_the_reference(*state, "stage.training_stage=3", "stage.freeze_lm=T");
}

/* One element on one rank is bad: nothing changes anywhere, and the next step works. */
static void skip_on_one_bad_value(struct comm *world, int bad_rank, double bad)
{
    const char *overrides[] = {"stage.training_stage=3", "optimizer.non_finite_policy=skip"};
    struct job j;
    int64_t zeros;

    open_job(&j, world, 2, overrides);
    fill_gradients(&j, 0);
    sync_gradients(&j);
    if (world->rank == bad_rank) ((double *)j.model.param[3].grad.data)[1] = bad;
    struct optim_result r = optim_step(&j.optim, 10.0, 1.0, 1e-3, 0.1);
    assert_false(r.applied);
    assert_true(isnan(bad) ? isnan(r.grad_norm) : isinf(r.grad_norm));
    assert_int_equal(j.optim.step, 0);
    assert_true(distance(&j) == 0.0);
    fill_gradients(&j, 1);
    sync_gradients(&j);
    r = optim_step(&j.optim, 10.0, 1.0, 1e-3, 0.1);
    double norm = reference_norm(&j, 10.0, 1.0, 1, &zeros);
    reference_update(&j, 10.0, 1.0, fmin(1.0, 1.0 / (norm + 1e-6)), 1e-3, 0.1, 1);
    assert_true(r.applied);
    assert_true(distance(&j) < 1e-11);
    close_job(&j);
}

static void a_nan_on_the_first_rank_skips_the_update_on_all(void **state)
{
    skip_on_one_bad_value(*state, 0, NAN);
}

static void an_infinity_on_the_last_rank_skips_the_update_on_all(void **state)
{
    struct comm *world = *state;

    skip_on_one_bad_value(world, world->size - 1, INFINITY);
}

static void a_norm_above_the_threshold_skips_the_update(void **state)
{
    const char *overrides[] = {"stage.training_stage=3", "optimizer.grad_norm_skip_threshold=5.0"};
    struct job j;
    int64_t zeros;

    open_job(&j, *state, 2, overrides);
    for (int big = 1; big >= 0; big--) {
        double norm = reference_norm(&j, 1.0, 1.0, 0, &zeros), n_tokens = norm / (big ? 5.001 : 4.999);
        fill_gradients(&j, 0);
        sync_gradients(&j);
        struct optim_result r = optim_step(&j.optim, n_tokens, 1.0, 1e-3, 0.1);
        assert_int_equal(r.applied, !big);
        assert_true(fabs(r.grad_norm - norm / n_tokens) < 1e-11 * r.grad_norm);
        assert_true((distance(&j) == 0.0) == (big != 0));
    }
    close_job(&j);
}

/* Counts of all lanes move the bias once; the counters start again. */
static void expert_bias_follows_the_counts_of_all_lanes(void **state)
{
    const char *overrides[] = {"stage.training_stage=3", "moe.moe_router_enable_expert_bias=T"};
    struct job j;
    double wrong = 0.0;

    open_job(&j, *state, 2, overrides);
    int lanes = j.topo.language.dp_size, lane = j.topo.language.dp_rank;
    int64_t experts = j.deck.moe.num_experts;
    for (int l = 0; l < j.model.n_moe; l++)
        for (int64_t e = 0; e < experts; e++)
            ((int64_t *)model_tokens_per_expert(&j.model, l).data)[e] = (e * 5 + l + lane * e * e) % 11;
    optim_expert_bias(&j.optim);
    for (int l = 0; l < j.model.n_moe; l++) {
        double mean = 0.0, count[64] = {0};
        for (int64_t e = 0; e < experts; e++)
            for (int d = 0; d < lanes; d++) count[e] += (double)((e * 5 + l + d * e * e) % 11);
        for (int64_t e = 0; e < experts; e++) mean += count[e] / (double)experts;
        for (int64_t e = 0; e < experts; e++) {
            double sign = mean > count[e] ? 1.0 : mean < count[e] ? -1.0 : 0.0;
            double bias = ((double *)model_expert_bias(&j.model, l)->value.data)[e];
            wrong += fabs(bias - sign * j.deck.moe.moe_router_bias_update_rate) > 1e-15;
            wrong += ((int64_t *)model_tokens_per_expert(&j.model, l).data)[e] != 0;
        }
    }
    comm_host_reduce_f64(j.world, &wrong, 1, COMM_SUM);
    assert_true(wrong == 0.0);
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
        TEST(every_module_trains_like_plain_adamw),
        TEST(stage_1_updates_the_projector_alone),
        TEST(stage_2_leaves_the_vision_module_alone),
        TEST(a_frozen_encoder_grid_joins_as_a_stub),
        TEST(a_frozen_language_grid_joins_as_a_stub),
        TEST(a_nan_on_the_first_rank_skips_the_update_on_all),
        TEST(an_infinity_on_the_last_rank_skips_the_update_on_all),
        TEST(a_norm_above_the_threshold_skips_the_update),
        TEST(expert_bias_follows_the_counts_of_all_lanes),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    comm_finish(world);
    return failed;
}
