/* test_gradients.c - every parameter's gradient against finite differences in fp64: each layer kind
 * alone and the whole model.
 *
 * Directional derivative along a random unit direction, fourth-order central formula, of loss_sum
 * plus the attached auxiliary term. The discrete choices (dispatched experts, auxiliary counts
 * through the loss itself) must not change between the evaluations: a step across a tie of the
 * router is shortened, and that the last one crosses none is asserted. |fd - g| <= 1e-6 |g| +
 * 1e-10. A gradient of exactly zero fails unless it is listed below with its reason.
 */
#include "model_fixture.h"
#include "rng.h"

/* Parameters whose gradient is zero in theory. */
static const struct {
    const char *name, *reason;
} zero_gradient[] = {
    { "mlp.router.expert_bias", "a buffer: it moves the choice only" },
};

static bool listed_zero(const char *name)
{
    for (size_t i = 0; i < sizeof zero_gradient / sizeof zero_gradient[0]; i++)
        if (strstr(name, zero_gradient[i].name))
            return true;
    return false;
}

static int32_t *choices(struct fixture *f, int64_t *n)
{
    *n = 0;
    for (int l = 0; l < f->model.n_moe; l++) {
        const struct tensor c = model_last_choice(&f->model, l);
        *n += tensor_numel(&c);
    }
    int32_t *all = xcalloc((size_t)*n + 1, sizeof *all);
    int64_t at = 0;
    for (int l = 0; l < f->model.n_moe; l++) {
        const struct tensor c = model_last_choice(&f->model, l);
        memcpy(all + at, c.data, (size_t)tensor_numel(&c) * sizeof *all);
        at += tensor_numel(&c);
    }
    return all;
}

/* Loss at value + h*v; the parameter is restored afterwards. *same becomes false when an expert's
 * choice changes. */
static double loss_at(struct fixture *f, struct param *p, const double *v, double h,
                      const int32_t *choice, bool *same)
{
    const int64_t n = tensor_numel(&p->value);
    double *x = p->value.data, *keep = xcalloc((size_t)n, sizeof *keep);
    memcpy(keep, x, (size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++)
        x[i] += h * v[i];
    const double loss = fixture_forward(f, true);
    memcpy(x, keep, (size_t)n * sizeof *x);
    free(keep);
    int64_t n_choice;
    int32_t *now = choices(f, &n_choice);
    *same = *same && memcmp(now, choice, (size_t)n_choice * sizeof *now) == 0;
    free(now);
    return loss;
}

static double derivative(struct fixture *f, struct param *p, const double *v, double h,
                         const int32_t *choice, bool *same)
{
    *same = true;
    const double near = loss_at(f, p, v, h, choice, same) - loss_at(f, p, v, -h, choice, same);
    const double far =
        loss_at(f, p, v, 2 * h, choice, same) - loss_at(f, p, v, -2 * h, choice, same);
    return (8.0 * near - far) / (12.0 * h);
}

static void check_param(struct fixture *f, struct param *p, const int32_t *choice)
{
    const int64_t n = tensor_numel(&p->value);
    const double *g = p->grad.data;
    double *v = xcalloc((size_t)n, sizeof *v), norm = 0.0, gv = 0.0, gg = 0.0;
    const struct rng_key key = rng_key(99, p->name);
    for (int64_t i = 0; i < n; i++) {
        v[i] = rng_normal_at(key, (uint64_t)i);
        norm += v[i] * v[i];
        gg += g[i] * g[i];
    }
    for (int64_t i = 0; i < n; i++) {
        v[i] /= sqrt(norm);
        gv += g[i] * v[i];
    }
    if (gg == 0.0 && !listed_zero(p->name))
        fail_msg("%s: the gradient is zero", p->name);
    double h = 2e-4 * (1.0 + sqrt((double)n) * 0.01);
    bool same;
    double fd = derivative(f, p, v, h, choice, &same);
    for (int i = 0; i < 3 && !same; i++)
        fd = derivative(f, p, v, h /= 4.0, choice, &same);
    if (!same)
        fail_msg("%s: the router's choice changes within a step of %.1e", p->name, h);
    if (!(fabs(fd - gv) <= 1e-6 * fabs(gv) + 1e-10))
        fail_msg("%s.%s: finite difference %.12e, gradient %.12e, relative %.2e",
                 model_module_names[p->module], p->name, fd, gv, fabs(fd - gv) / fabs(gv));
    free(v);
}

static void check_model(int n, const char *const *overrides, bool expect_all)
{
    struct fixture f;
    fixture_open(&f, n, overrides);
    fixture_batch(&f, 0, 0);
    fixture_forward(&f, true);
    int64_t n_choice;
    int32_t *choice = choices(&f, &n_choice);
    model_zero_grads(&f.model);
    fixture_backward(&f);
    int checked = 0;
    for (int i = 0; i < f.model.n_params; i++) {
        struct param *p = &f.model.param[i];
        assert_true(p->trainable || p->buffer || !expect_all);
        if (!p->trainable)
            continue;
        check_param(&f, p, choice);
        checked++;
    }
    assert_true(checked > 0);
    free(choice);
    fixture_close(&f);
}

#define FP64 "run.precision=fp64", "language.init_method_std=0.15", "moe.moe_aux_loss_coeff=0.05"
#define CHECK_MODEL(expect_all, ...) \
    do { \
        static const char *const o[] = { FP64, __VA_ARGS__ }; \
        check_model((int)(sizeof o / sizeof o[0]), o, expect_all); \
    } while (0)

static void layer_mamba_alone(void **state)
{
    CHECK_MODEL(true, "language.hybrid_layer_pattern=M");
}
static void layer_attention_alone(void **state)
{
    CHECK_MODEL(true, "language.hybrid_layer_pattern=*");
}
static void layer_moe_alone(void **state)
{
    CHECK_MODEL(true, "language.hybrid_layer_pattern=E");
}
static void layer_mlp_alone(void **state)
{
    CHECK_MODEL(true, "language.hybrid_layer_pattern=-");
}
static void whole_tiny_model(void **state)
{
    CHECK_MODEL(true, "batch.micro_batch_size=2");
}
static void projector_mlp(void **state)
{
    CHECK_MODEL(true, "language.hybrid_layer_pattern=*", "projector.vision_projection_type=mlp");
}
static void projector_mlp_rmsnorm(void **state)
{
    CHECK_MODEL(true, "language.hybrid_layer_pattern=*", "projector.vision_projection_type=mlp",
                "projector.projection_normalization=rmsnorm");
}
static void encoder_without_final_layernorm(void **state)
{
    CHECK_MODEL(true, "language.hybrid_layer_pattern=-", "vision.final_layernorm=F");
}
static void encoder_in_cpe_eval_mode(void **state)
{
    CHECK_MODEL(true, "language.hybrid_layer_pattern=-", "vision.force_cpe_eval_mode=T");
}
static void fixed_resolution(void **state)
{
    CHECK_MODEL(true, "language.hybrid_layer_pattern=-", "vision.dynamic_resolution=F",
                "vision.img_h=32", "vision.img_w=32", "data.image_seq_length=16",
                "data.num_image_tiles=1");
}
static void m6_33_stage_1_trains_the_projector_alone(void **state)
{
    CHECK_MODEL(false, "stage.training_stage=1");
}
static void m6_33_stage_2_freezes_the_encoder(void **state)
{
    CHECK_MODEL(false, "stage.training_stage=2");
}
static void no_balancing_loss(void **state)
{
    CHECK_MODEL(true, "language.hybrid_layer_pattern=E", "moe.moe_router_load_balancing_type=none");
}

static void forced_load_balancing(void **state)
{
    CHECK_MODEL(true, "language.hybrid_layer_pattern=E", "moe.moe_router_force_load_balancing=T");
}

/* The encoder's keys: adding a constant to every key of a head shifts all scores of a query
 * equally, so the bias gradient is zero. */
static void encoder_key_bias_has_no_gradient(void **state)
{
    static const char *const o[] = { FP64, "language.hybrid_layer_pattern=-" };
    struct fixture f;
    fixture_open(&f, (int)(sizeof o / sizeof o[0]), o);
    fixture_batch(&f, 0, 0);
    fixture_forward(&f, true);
    model_zero_grads(&f.model);
    fixture_backward(&f);
    const struct param *p =
        model_find_param(&f.model, MODEL_VISION, "decoder.layers.0.self_attention.linear_qkv.bias");
    assert_non_null(p);
    const double *g = p->grad.data;
    const int64_t d = f.deck.vision.hidden_size / f.deck.vision.num_attention_heads;
    double key = 0.0, other = 0.0;
    for (int64_t i = 0; i < tensor_numel(&p->grad); i++)
        *((i / d) % 3 == 1 ? &key : &other) += fabs(g[i]);
    assert_true(other > 1e-3);
    assert_true(key < 1e-12 * other);
    fixture_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(layer_mamba_alone),
        cmocka_unit_test(layer_attention_alone),
        cmocka_unit_test(layer_moe_alone),
        cmocka_unit_test(layer_mlp_alone),
        cmocka_unit_test(whole_tiny_model),
        cmocka_unit_test(projector_mlp),
        cmocka_unit_test(projector_mlp_rmsnorm),
        cmocka_unit_test(encoder_without_final_layernorm),
        cmocka_unit_test(encoder_in_cpe_eval_mode),
        cmocka_unit_test(fixed_resolution),
        cmocka_unit_test(m6_33_stage_1_trains_the_projector_alone),
        cmocka_unit_test(m6_33_stage_2_freezes_the_encoder),
        cmocka_unit_test(no_balancing_loss),
        cmocka_unit_test(forced_load_balancing),
        cmocka_unit_test(encoder_key_bias_has_no_gradient),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
