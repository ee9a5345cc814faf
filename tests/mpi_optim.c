/* ranks: 1 2 4 8 */
/* mpi_optim.c - gradient finalisation, global norm, clip, sharded AdamW and the skip policies
 * against a plain AdamW written here, on every grid split, also with tensor and expert parallelism.
 *
 * Gradients are a formula of (parameter, shard, element, replica, step), so every rank can compute
 * the sum over replicas and the norm of both modules by itself. What a rank finds is reduced over
 * the world before anything is asserted: all ranks fail together.
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
#include "ddp.h"
#include "optim.h"
#include "mpi_world.h"

struct job {
    struct comm *world;
    struct deck deck, whole_deck;
    struct topology topo, whole_topo;
    struct model model, whole; /* whole: declarations of all modules, no memory */
    struct stream stream;
    struct arenas arenas;
    struct optim optim;
    double **master, **m, **v; /* [n_params][numel] of the reference */
    int64_t step;
};

static const char deck_text[] =
    "&run seed = 7 train_iters = 4 precision = 'fp64' /\n&language preset = 'tiny' /\n&batch global_batch_size = 8 /\n"
    "&optimizer adam_beta2 = 0.95 weight_decay = 0.1 /\n&lr lr = 1e-3 lr_decay_style = 'constant' /\n";

static void read_deck(struct deck *deck, struct topology *t, int size, int rank, int n,
                      const char *const *overrides)
{
    struct errors e = { 0 };
    char *copy[8];

    for (int i = 0; i < n; i++)
        copy[i] = xstrdup(overrides[i]);
    deck_read(deck, "test", deck_text, strlen(deck_text), n, copy, &e);
    deck_resolve(deck, size, &e);
    if (e.count == 0)
        topology_init(t, deck, size, rank, &e);
    errors_print(&e);
    ASSERT(e.count == 0);
    for (int i = 0; i < n; i++)
        free(copy[i]);
}

/* world = NULL: a job of one rank. `grids`: grids that replace the deck's, or NULL. */
static void open_job_on(struct job *j, struct comm *world, const struct topology_spec *grids,
                        int n_grids, int n, const char *const *overrides)
{
    const struct backend_ops *be = &backend_ref_f64;
    struct errors e = { 0 };

    memset(j, 0, sizeof *j);
    j->world = world;
    read_deck(&j->deck, &j->topo, world ? world->size : 1, world ? world->rank : 0, n, overrides);
    read_deck(&j->whole_deck, &j->whole_topo, 1, 0, n, overrides);
    if (grids) {
        topology_free(&j->topo);
        topology_describe(&j->topo, grids, n_grids, world->size, world->rank, &e);
        errors_print(&e);
        ASSERT(e.count == 0);
    }
    if (world)
        topology_connect(&j->topo, world);
    be->stream_create(&j->stream, "compute");
    model_init(&j->model, &j->deck, &j->topo, be, &j->stream);
    model_init(&j->whole, &j->whole_deck, &j->whole_topo, be, &j->stream);
    optim_init(&j->optim, &j->deck, &j->topo, &j->model, be, &comm_mpi, &j->stream);
    arenas_init(&j->arenas);
    for (int pass = 0; pass < 2; pass++) {
        model_plan(&j->model, &j->arenas);
        optim_plan(&j->optim, &j->arenas);
        if (pass == 0)
            arenas_commit(&j->arenas, be);
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

static void open_job(struct job *j, struct comm *world, int n, const char *const *overrides)
{
    open_job_on(j, world, NULL, 0, n, overrides);
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

/* Where a rank stands for one parameter: which shard of how many, and which of the replicas whose
 * gradients are summed. */
struct standing {
    int shard, shards, replica, replicas;
};

static struct standing standing_of(const struct job *j, const struct param *p)
{
    const struct grid *g = p->module == MODEL_LANGUAGE ? &j->topo.language : &j->topo.encoder;

    if (p->expert && ddp_separate_experts(g))
        return (struct standing){ g->ep_rank * g->expt_tp_size + g->expt_tp_rank,
                                  g->ep_size * g->expt_tp_size, g->expt_dp_rank, g->expt_dp_size };
    if (p->shard != PARAM_REPLICATED)
        return (struct standing){ g->tp_rank, g->tp_size, g->dp_rank, g->dp_size };
    /* each tensor-parallel rank has the gradient of its own rows */
    if (p->module == MODEL_LANGUAGE && !p->expert)
        return (struct standing){ 0, 1, g->dp_rank * g->tp_size + g->tp_rank,
                                  g->dp_size * g->tp_size };
    return (struct standing){ 0, 1, g->dp_rank, g->dp_size };
}

/* A gradient of replica d: a tenth of the elements is exactly zero on all replicas. */
static double gradient(const struct param *p, int shard, int64_t i, int d, int64_t step)
{
    uint64_t h = 1469598103934665603u;

    for (const char *c = p->name; *c; c++)
        h = (h ^ (unsigned char)*c) * 1099511628211u;
    h = (h ^ (uint64_t)(i + 1000003 * shard)) * 1099511628211u;
    if (h / 7 % 10 == 0)
        return 0.0;
    h = (h ^ (uint64_t)(d + 100 * step)) * 1099511628211u;
    return ((double)(h >> 20 & 0xffff) / 32768.0 - 1.0) * (p->module == MODEL_LANGUAGE ? 3.0 : 1.0);
}

static double summed(const struct param *p, int shard, int replicas, int64_t i, int64_t step)
{
    double sum = 0.0;

    for (int d = 0; d < replicas; d++)
        sum += gradient(p, shard, i, d, step);
    return sum;
}

static void fill_gradients(struct job *j, int64_t step)
{
    model_zero_grads(&j->model);
    for (int k = 0; k < j->model.n_params; k++) {
        struct param *p = &j->model.param[k];
        struct standing at = standing_of(j, p);
        for (int64_t i = 0; p->trainable && i < tensor_numel(&p->grad); i++)
            ((double *)p->grad.data)[i] = gradient(p, at.shard, i, at.replica, step);
    }
}

static void sync_gradients(struct job *j)
{
    optim_grad_sync(&j->optim, false);
    optim_grad_sync(&j->optim, true);
}

/* Norm and zeros of the whole model's summed gradients after the factors. */
static double reference_norm(const struct job *j, double n_tokens, double encoder_factor,
                             int64_t step, int64_t *zeros)
{
    double sum = 0.0;

    *zeros = 0;
    for (int k = 0; k < j->whole.n_params; k++) {
        const struct param *p = &j->whole.param[k];
        double factor = (p->module == MODEL_LANGUAGE ? 1.0 : encoder_factor) / n_tokens;
        struct standing at = standing_of(j, p);
        int64_t count = 1;
        if (!p->trainable)
            continue;
        for (int d = 0; d < p->ndim; d++)
            count *= p->shape[d];
        for (int c = 0; c < at.shards; c++)
            for (int64_t i = 0; i < count / at.shards; i++) {
                double g = summed(p, c, at.replicas, i, step) * factor;
                sum += g * g;
                *zeros += g == 0.0;
            }
    }
    return sqrt(sum);
}

/* AdamW as the formula says; 1-D tensors and biases are not decayed. */
static void reference_update(struct job *j, double n_tokens, double encoder_factor, double clip,
                             double lr, double wd, int64_t step)
{
    double b1 = 0.9, b2 = 0.95, eps = 1e-8;

    j->step++;
    for (int k = 0; k < j->model.n_params; k++) {
        const struct param *p = &j->model.param[k];
        size_t length = strlen(p->name);
        struct standing at = standing_of(j, p);
        bool decayed = p->ndim > 1 && !(length >= 4 && strcmp(p->name + length - 4, "bias") == 0);
        for (int64_t i = 0; p->trainable && i < tensor_numel(&p->value); i++) {
            double g = summed(p, at.shard, at.replicas, i, step) / n_tokens *
                       (p->module == MODEL_LANGUAGE ? 1.0 : encoder_factor) * clip;
            double *m = &j->m[k][i], *v = &j->v[k][i], *x = &j->master[k][i];
            *m = b1 * *m + (1 - b1) * g;
            *v = b2 * *v + (1 - b2) * g * g;
            *x -= lr * (*m / (1 - pow(b1, (double)j->step)) /
                            (sqrt(*v / (1 - pow(b2, (double)j->step))) + eps) +
                        (decayed ? wd : 0.0) * *x);
        }
    }
}

/* Largest difference to the reference over all parameters of all ranks, relative to 1e-3 + |value|;
 * owned masters and moments count too. */
static double distance(struct job *j)
{
    double worst = 0.0;

    for (int k = 0; k < j->model.n_params; k++) {
        const struct param *p = &j->model.param[k];
        for (int64_t i = 0; i < tensor_numel(&p->value); i++) {
            double x = j->master[k][i];
            worst = fmax(worst, fabs(((double *)p->value.data)[i] - x) / (1e-3 + fabs(x)));
        }
        for (int64_t i = 0; p->trainable && i < tensor_numel(&p->master); i++) {
            int64_t at = p->owned + i;
            double x = j->master[k][at];
            worst = fmax(worst, fabs(((double *)p->master.data)[i] - x) / (1e-3 + fabs(x)));
            worst = fmax(worst, fabs(((double *)p->m.data)[i] - j->m[k][at]));
            worst = fmax(worst, fabs(((double *)p->v.data)[i] - j->v[k][at]));
        }
    }
    comm_host_reduce_f64(j->world, &worst, 1, COMM_MAX);
    return worst;
}

static void follow_on(struct comm *world, const struct topology_spec *grids, int n_grids,
                      const char *stage, const char *more)
{
    static const double n_tokens[] = { 37.0, 0.0, 4.0 }, lr[] = { 1e-3, 5e-3, 2e-4 },
                        wd[] = { 0.1, 0.0, 0.3 };
    const char *overrides[] = { stage, "log.log_num_zeros_in_grad=T", "log.log_params_norm=T",
                                more };
    struct job j;
    int64_t zeros;

    open_job_on(&j, world, grids, n_grids, more ? 4 : 3, overrides);
    for (int64_t s = 0; s < 3; s++) {
        double n = n_tokens[s] > 1.0 ? n_tokens[s] : 1.0, factor = s == 1 ? 2.0 : 1.0;
        double norm = reference_norm(&j, n, factor, s, &zeros),
               clip = fmin(1.0, 1.0 / (norm + 1e-6));
        fill_gradients(&j, s);
        sync_gradients(&j);
        struct optim_result r = optim_step(&j.optim, n_tokens[s], factor, lr[s], wd[s]);
        ddp_use_all(j.model.ddp);
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

static void follow_the_reference(struct comm *world, const char *stage, const char *freeze)
{
    follow_on(world, NULL, 0, stage, freeze);
}

static void m6_35_p12_63_76_77_78_84_every_module_trains_like_plain_adamw(void **state)
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

static void m6_34_p12_81_a_frozen_encoder_grid_joins_as_a_stub(void **state)
{
    follow_the_reference(*state, "stage.training_stage=2", "stage.freeze_projection=T");
}

static void m6_34_p12_81_a_frozen_language_grid_joins_as_a_stub(void **state)
{
    follow_the_reference(*state, "stage.training_stage=3", "stage.freeze_lm=T");
}

/* Every mix of tensor, expert and data parallelism that this number of ranks allows, one grid alone
 * or both over the same ranks. */
static void p12_76_78_tensor_and_expert_parallel_grids_train_like_plain_adamw(void **state)
{
    struct comm *world = *state;
    int size = world->size;

    for (int tp = 1; tp <= 2 && tp <= size; tp++)
        for (int ep = 1; ep <= size && ep <= 8; ep *= 2)
            for (int encoder_tp = 0; encoder_tp <= 2 && encoder_tp <= size; encoder_tp++) {
                struct topology_spec grids[2] = { { "encoder", size, 0, encoder_tp, 1, 1, 1, 1 },
                                                  { "language", size, 0, tp, 1, 1, ep, 1 } };
                bool alone = encoder_tp == 0;
                if (tp == 1 && ep == 1 && encoder_tp == 1)
                    continue;
                follow_on(world, alone ? &grids[1] : grids, alone ? 1 : 2, "stage.training_stage=3",
                          alone ? "topology.layout=language_only" : "topology.layout=colocated");
                /* Experts cut over two ranks besides. */
                grids[1].expt_tp = 2;
                if (alone && size % (2 * ep) == 0)
                    follow_on(world, &grids[1], 1, "stage.training_stage=3",
                              "topology.layout=language_only");
            }
}

static void p12_76_disjoint_tensor_parallel_grids_train_like_plain_adamw(void **state)
{
    struct comm *world = *state;
    int half = world->size / 2;

    if (world->size < 4)
        return;
    for (int ep = 1; ep <= half; ep *= 2) {
        struct topology_spec grids[2] = { { "encoder", half, 0, 2, 1, 1, 1, 1 },
                                          { "language", half, half, 2, 1, 1, ep, 1 } };
        follow_on(world, grids, 2, "stage.training_stage=3", NULL);
    }
}

/* Backward in the model's order, one parameter at a time. */
static void announce_all(struct job *j)
{
    for (int language = 1; language >= 0; language--) {
        ddp_last_backward(j->model.ddp, language);
        for (int k = j->model.n_params - 1; k >= 0; k--)
            if ((j->model.param[k].module == MODEL_LANGUAGE) == language)
                ddp_ready(j->model.ddp, language, k);
    }
}

static const char *const overlapping[] = { "optimizer.overlap_grad_reduce=T",
                                           "optimizer.overlap_param_gather=T",
                                           "optimizer.encoder_ddp_overlap=T" };

/* Values of all ranks after three steps, with overlap or without, must be the same bits. clip: with
 * the coefficient of the norm, which a different cut into buckets may change in its last digit. */
static void same_bits(struct comm *world, const char *buckets, bool clip)
{
    const char *overrides[6] = { "stage.training_stage=3",
                                 clip ? "optimizer.clip_grad=1" : "optimizer.clip_grad=0",
                                 buckets };
    struct job with, without;
    double wrong = 0.0, norm[2];

    memcpy(overrides + 3, overlapping, sizeof overlapping);
    open_job(&with, world, 6, overrides);
    open_job(&without, world, 2, overrides);
    for (int64_t s = 0; s < 3; s++) {
        for (int overlap = 0; overlap < 2; overlap++) {
            struct job *j = overlap ? &with : &without;
            fill_gradients(j, s);
            if (overlap)
                announce_all(j);
            sync_gradients(j);
            norm[overlap] = optim_step(&j->optim, 37.0, 1.0, 1e-3, 0.1).grad_norm;
        }
        wrong += clip ? norm[0] != norm[1] : fabs(norm[0] - norm[1]) > 1e-14 * norm[0];
        /* the next forward meets the parameters one by one */
        for (int k = 0; k < with.model.n_params; k++) {
            const struct param *a = &with.model.param[k], *b = &without.model.param[k];
            ddp_use(with.model.ddp, a->module == MODEL_LANGUAGE, k + 1);
            wrong += memcmp(a->value.data, b->value.data,
                            (size_t)tensor_numel(&a->value) * sizeof(double)) != 0;
        }
    }
    comm_host_reduce_f64(world, &wrong, 1, COMM_SUM);
    assert_true(wrong == 0.0);
    close_job(&with);
    close_job(&without);
}

static void overlap_gives_the_bits_of_no_overlap(void **state)
{
    same_bits(*state, "optimizer.ddp_num_buckets=1", true);
    same_bits(*state, "optimizer.ddp_num_buckets=5", false);
    same_bits(*state, "optimizer.ddp_bucket_size=1", false);
}

/* Only one replica has a gradient, so the sum is exact: the result must be that of one rank, bit by
 * bit. */
static void p12_79_the_update_is_bitwise_independent_of_sharding(void **state)
{
    const char *overrides[] = { "stage.training_stage=3", "optimizer.clip_grad=0",
                                "optimizer.overlap_grad_reduce=T", "optimizer.ddp_num_buckets=3",
                                /* every rank holds whole parameters */
                                "topology.layout=colocated" };
    struct job many, one;
    double wrong = 0.0;

    open_job(&many, *state, 5, overrides);
    open_job(&one, NULL, 2, overrides);
    for (int64_t s = 0; s < 3; s++) {
        fill_gradients(&many, s);
        fill_gradients(&one, s);
        for (int k = 0; k < many.model.n_params; k++) {
            struct param *p = &many.model.param[k];
            if (standing_of(&many, p).replica == 0)
                continue;
            for (int64_t i = 0; p->trainable && i < tensor_numel(&p->grad); i++)
                ((double *)p->grad.data)[i] = 0.0;
        }
        announce_all(&many);
        sync_gradients(&many);
        optim_step(&many.optim, 37.0, 1.0, 1e-3, 0.1);
        sync_gradients(&one);
        /* one rank alone enters no collective: its own AdamW */
        for (int k = 0; k < one.model.n_params; k++)
            if (one.model.param[k].trainable) {
                struct param *p = &one.model.param[k];
                int64_t n = tensor_numel(&p->grad);
                struct tensor grad = tensor_1d(p->grad.data, DTYPE_F64, PLACE_DEVICE, n);
                struct tensor value = tensor_1d(p->value.data, DTYPE_F64, PLACE_DEVICE, n);
                double inverse = 1.0 / 37.0;
                struct tensor factor = tensor_1d(&inverse, DTYPE_F64, PLACE_DEVICE, 1);
                backend_ref_f64.adamw(&one.stream, &grad, &factor, 1e-3, 0.9, 0.95, 1e-8,
                                      p->decay ? 0.1 : 0.0, s + 1, &p->master, &p->m, &p->v,
                                      &value);
            }
        for (int k = 0; k < many.model.n_params; k++) {
            const struct param *p = &many.model.param[k],
                               *q = model_find_param(&one.model, p->module, p->name);
            wrong += memcmp(p->value.data, q->value.data,
                            (size_t)tensor_numel(&p->value) * sizeof(double)) != 0;
            for (int64_t i = 0; p->trainable && i < tensor_numel(&p->master); i++)
                wrong += ((double *)p->v.data)[i] != ((double *)q->v.data)[p->owned + i];
        }
    }
    comm_host_reduce_f64(many.world, &wrong, 1, COMM_SUM);
    assert_true(wrong == 0.0);
    close_job(&many);
    close_job(&one);
}

/* Whole gradients come back for whoever wants to look. */
static void summed_gradients_can_be_gathered(void **state)
{
    const char *overrides[] = { "stage.training_stage=3" };
    struct job j;
    double worst = 0.0;

    open_job(&j, *state, 1, overrides);
    fill_gradients(&j, 0);
    sync_gradients(&j);
    ddp_gather_grads(j.model.ddp);
    for (int k = 0; k < j.model.n_params; k++) {
        const struct param *p = &j.model.param[k];
        struct standing at = standing_of(&j, p);
        for (int64_t i = 0; p->trainable && i < tensor_numel(&p->grad); i++)
            worst = fmax(
                worst, fabs(((double *)p->grad.data)[i] - summed(p, at.shard, at.replicas, i, 0)));
    }
    comm_host_reduce_f64(j.world, &worst, 1, COMM_MAX);
    assert_true(worst < 1e-13);
    close_job(&j);
}

/* One element on one rank is bad: nothing changes anywhere, and the next step works. */
static void skip_on_one_bad_value(struct comm *world, int bad_rank, double bad)
{
    const char *overrides[] = { "stage.training_stage=3", "optimizer.non_finite_policy=skip" };
    struct job j;
    int64_t zeros;

    open_job(&j, world, 2, overrides);
    fill_gradients(&j, 0);
    if (world->rank == bad_rank)
        ((double *)j.model.param[3].grad.data)[1] = bad;
    sync_gradients(&j);
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

static void p12_74_75_a_nan_on_the_first_rank_skips_the_update_on_all(void **state)
{
    skip_on_one_bad_value(*state, 0, NAN);
}

static void p12_74_75_an_infinity_on_the_last_rank_skips_the_update_on_all(void **state)
{
    struct comm *world = *state;

    skip_on_one_bad_value(world, world->size - 1, INFINITY);
}

static void a_norm_above_the_threshold_skips_the_update(void **state)
{
    const char *overrides[] = { "stage.training_stage=3",
                                "optimizer.grad_norm_skip_threshold=5.0" };
    struct job j;
    int64_t zeros;

    open_job(&j, *state, 2, overrides);
    for (int big = 1; big >= 0; big--) {
        double norm = reference_norm(&j, 1.0, 1.0, 0, &zeros),
               n_tokens = norm / (big ? 5.001 : 4.999);
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
static void p12_73_expert_bias_follows_the_counts_of_all_lanes(void **state)
{
    const char *overrides[] = { "stage.training_stage=3", "moe.moe_router_enable_expert_bias=T" };
    struct job j;
    double wrong = 0.0;

    open_job(&j, *state, 2, overrides);
    int lanes = j.topo.language.dp_size, lane = j.topo.language.dp_rank;
    int64_t experts = j.deck.moe.num_experts;
    for (int l = 0; l < j.model.n_moe; l++)
        for (int64_t e = 0; e < experts; e++)
            ((int64_t *)model_tokens_per_expert(&j.model, l).data)[e] =
                (e * 5 + l + lane * e * e) % 11;
    optim_expert_bias(&j.optim);
    for (int l = 0; l < j.model.n_moe; l++) {
        double mean = 0.0, count[64] = { 0 };
        for (int64_t e = 0; e < experts; e++)
            for (int d = 0; d < lanes; d++)
                count[e] += (double)((e * 5 + l + d * e * e) % 11);
        for (int64_t e = 0; e < experts; e++)
            mean += count[e] / (double)experts;
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
    struct comm *world = mpi_world(&argc, &argv);
    if (!world)
        return EXIT_ENVIRONMENT;
    const struct CMUnitTest tests[] = {
#define TEST(name) cmocka_unit_test_prestate(name, world)
        TEST(m6_35_p12_63_76_77_78_84_every_module_trains_like_plain_adamw),
        TEST(stage_1_updates_the_projector_alone),
        TEST(p12_76_78_tensor_and_expert_parallel_grids_train_like_plain_adamw),
        TEST(p12_76_disjoint_tensor_parallel_grids_train_like_plain_adamw),
        TEST(overlap_gives_the_bits_of_no_overlap),
        TEST(p12_79_the_update_is_bitwise_independent_of_sharding),
        TEST(summed_gradients_can_be_gathered),
        TEST(stage_2_leaves_the_vision_module_alone),
        TEST(m6_34_p12_81_a_frozen_encoder_grid_joins_as_a_stub),
        TEST(m6_34_p12_81_a_frozen_language_grid_joins_as_a_stub),
        TEST(p12_74_75_a_nan_on_the_first_rank_skips_the_update_on_all),
        TEST(p12_74_75_an_infinity_on_the_last_rank_skips_the_update_on_all),
        TEST(a_norm_above_the_threshold_skips_the_update),
        TEST(p12_73_expert_bias_follows_the_counts_of_all_lanes),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    comm_finish(world);
    return failed;
}
