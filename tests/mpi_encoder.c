/* ranks: 1 2 4 8 */
/* mpi_encoder.c - the encoder over tensor-parallel ranks against the same encoder on one rank:
 * embeddings, every gradient, work done; and encoder, bridge and language model together on every
 * pair of grids, disjoint and colocated, against one rank.
 *
 * Every rank computes the one-rank result for itself and cuts the gradients by the rule of each
 * parameter, written out here once more. Differences are relative to the largest element of the
 * tensor, and the world's maximum is asserted: all ranks fail together.
 */
#include <float.h>
#include "bridge.h"
#include "linear.h"
#include "model_fixture.h"
#include "rng.h"
#include "mpi_world.h"

enum { SAMPLES = 8, WIDEST_ENCODER = 4, WIDEST_LANGUAGE = 2 };

/* One model of this rank. */
struct side {
    struct deck deck;
    struct topology topo;
    struct model model;
    struct arenas arenas;
    struct stream stream;
    struct bridge *bridge;
};

/* The largest difference seen so far, and where. */
struct verdict {
    double worst, tolerance;
    char where[200];
};

static const struct backend_ops *const be = &backend_ref_f64;

/* `overrides` end with NULL. */
static void read_deck(struct deck *deck, int64_t mbs, const char *const *overrides)
{
    char text[1024], *copy[16];
    struct errors e = { 0 };
    int n = 0;
    for (; overrides[n]; n++)
        copy[n] = xstrdup(overrides[n]);
    snprintf(
        text, sizeof text,
        "&run seed = 7 train_iters = 4 precision = 'fp64' /\n&topology layout = 'colocated' /\n"
        "&language preset = 'tiny' init_method_std = 0.15 /\n"
        "&data dataset_provider = 'mock' mock_pixels = 'normal' mock_text_only_every = 3 /\n"
        "&batch micro_batch_size = %lld global_batch_size = %d /\n"
        "&lr lr = 1e-3 lr_decay_style = 'constant' /\n",
        (long long)mbs, SAMPLES);
    deck_read(deck, "test", text, strlen(text), n, copy, &e);
    deck_resolve(deck, 1, &e);
    errors_print(&e);
    ASSERT(e.count == 0);
    for (int i = 0; i < n; i++)
        free(copy[i]);
    errors_free(&e);
}

/* After deck and topology: the model, with the bridge when asked for. */
static void open_side(struct side *s, bool bridge)
{
    be->stream_create(&s->stream, "compute");
    model_init(&s->model, &s->deck, &s->topo, be, &s->stream);
    s->bridge = bridge ? bridge_init(&s->deck, &s->topo, &comm_mpi, be, &s->stream) : NULL;
    arenas_init(&s->arenas);
    for (int pass = 0; pass < 2; pass++) {
        model_plan(&s->model, &s->arenas);
        if (bridge)
            bridge_plan(s->bridge, &s->arenas);
        if (pass == 0)
            arenas_commit(&s->arenas, be);
    }
    model_initialise(&s->model);
    model_zero_grads(&s->model);
}

static void close_side(struct side *s)
{
    bridge_free(s->bridge);
    model_free(&s->model);
    arenas_free(&s->arenas, be);
    be->stream_destroy(&s->stream);
    topology_free(&s->topo);
    deck_free(&s->deck);
}

static void open_alone(struct side *s, int64_t mbs, const char *const *overrides)
{
    struct errors e = { 0 };
    memset(s, 0, sizeof *s);
    read_deck(&s->deck, mbs, overrides);
    topology_init(&s->topo, &s->deck, 1, 0, &e);
    ASSERT(e.count == 0);
    open_side(s, false);
}

/* ---- comparing ------------------------------------------------------------------------------- */

static void verdict_add(struct verdict *v, double difference, double scale, const char *where)
{
    const double d = scale > 0.0 ? difference / scale : difference;
    if (isnan(d) || d > v->worst) {
        v->worst = isnan(d) ? DBL_MAX : d;
        snprintf(v->where, sizeof v->where, "%s", where);
    }
}

static void verdict_check(struct verdict *v, struct comm *world)
{
    double worst = v->worst;
    comm_host_reduce_f64(world, &worst, 1, COMM_MAX);
    if (!(worst <= v->tolerance))
        fail_msg("difference %.3e (of this rank %.3e, %s)", worst, v->worst, v->where);
}

static double largest(const double *x, int64_t n)
{
    double m = 0.0;
    for (int64_t i = 0; i < n; i++)
        m = fabs(x[i]) > m ? fabs(x[i]) : m;
    return m;
}

static void compare_dense(struct verdict *v, const struct tensor *got, const struct tensor *want,
                          const char *where)
{
    const double *a = got->data, *b = want->data;
    double worst = 0.0;
    ASSERT(tensor_numel(got) == tensor_numel(want));
    for (int64_t i = 0; i < tensor_numel(got); i++)
        worst = fmax(worst, isnan(a[i]) ? DBL_MAX : fabs(a[i] - b[i]));
    verdict_add(v, worst, largest(b, tensor_numel(want)), where);
}

/* A gradient shard of a grid with `size` tp ranks against its part of the whole gradient. */
static void compare_shard(struct verdict *v, const struct param *p, const double *shard,
                          const struct param *whole, int size, int rank)
{
    const int64_t rows = whole->value.shape[0], cols = tensor_numel(&whole->value) / rows;
    const int64_t own_rows = p->shard == PARAM_SPLIT_ROWS ? rows / size : rows;
    const int64_t own_cols = p->shard == PARAM_SPLIT_COLS ? cols / size : cols;
    const int64_t row = p->shard == PARAM_SPLIT_ROWS ? rank * own_rows : 0,
                  col = p->shard == PARAM_SPLIT_COLS ? rank * own_cols : 0;
    const double *g = whole->grad.data;
    double worst = 0.0;
    ASSERT(tensor_numel(&p->value) == own_rows * own_cols);
    for (int64_t r = 0; r < own_rows; r++)
        for (int64_t c = 0; c < own_cols; c++) {
            const double d = fabs(shard[r * own_cols + c] - g[(row + r) * cols + col + c]);
            worst = fmax(worst, isnan(d) ? DBL_MAX : d);
        }
    verdict_add(v, worst, largest(g, rows * cols), p->name);
}

/* Are the bits of x the same on all ranks of c? */
static bool same_everywhere(struct comm *c, const void *x, int64_t bytes)
{
    uint64_t hash = 14695981039346656037u;
    for (int64_t i = 0; i < bytes; i++)
        hash = (hash ^ ((const unsigned char *)x)[i]) * 1099511628211u;
    int64_t v[2] = { (int64_t)(hash >> 1), -(int64_t)(hash >> 1) };
    comm_host_reduce_i64(c, v, 2, COMM_MAX);
    return v[0] == -v[1];
}

/* ---- the encoder alone ----------------------------------------------------------------------- */

static void picture(struct picture_batch *p, int height, int width)
{
    p->tile_size[p->tiles][0] = height;
    p->tile_size[p->tiles][1] = width;
    p->cpe[p->tiles][0] = p->cpe[p->tiles][1] = 0.7 + 0.05 * (double)p->tiles;
    p->cpe[p->tiles][2] = p->cpe[p->tiles][3] = 0.1;
    p->tiles++;
    p->patches += height / 4 * (width / 4);
}

enum pictures { UNEQUAL, SQUARE, NONE };

/* Two samples of up to two tiles, at most 32 embeddings each. */
static void make_pictures(struct picture_batch *p, const struct side *s, enum pictures kind,
                          int64_t m)
{
    const struct data_limits limits = data_limits(&s->deck);
    const int64_t width = 3 * s->deck.vision.patch_dim * s->deck.vision.patch_dim;
    picture_batch_init(p, &limits, 2, width, true);
    p->tiles = p->patches = 0;
    if (kind == UNEQUAL) {
        picture(p, 16, 24);
        picture(p, m ? 8 : 32, 16);
        picture(p, 8, 40);
    } else if (kind == SQUARE) {
        picture(p, 32, 32);
        picture(p, 32, 32);
    }
    p->rows = p->patches / (s->deck.vision.pixel_shuffle ? 4 : 1);
    const struct rng_key key = rng_key(11, "pixels");
    for (int64_t i = 0; i < p->patches * width; i++)
        ((double *)p->pixels)[i] = rng_normal_at(key, (uint64_t)(m * 1000000 + i));
}

/* Forward and backward of two micro-batches; embeddings of micro-batch m go to out[m]. */
static void run_encoder(struct side *s, enum pictures kind, double *out[2])
{
    for (int64_t m = 0; m < 2; m++) {
        struct picture_batch p;
        make_pictures(&p, s, kind, m);
        const struct tensor e = model_encoder_forward(&s->model, 0, &p, true);
        const int64_t n = tensor_numel(&e);
        ASSERT(tensor_rows(&e) == p.rows && (kind == NONE) == (p.rows == 0));
        out[m] = xcalloc((size_t)n + 1, sizeof *out[m]);
        if (n > 0)
            memcpy(out[m], e.data, (size_t)n * sizeof *out[m]);
        double *d = xcalloc((size_t)n + 1, sizeof *d);
        for (int64_t i = 0; i < n; i++)
            d[i] = rng_normal_at(rng_key(12, "dembedding"), (uint64_t)(m * 1000000 + i));
        const struct tensor de =
            tensor_2d(d, DTYPE_F64, PLACE_DEVICE, p.rows, s->deck.language.hidden_size);
        model_encoder_backward(&s->model, 0, &de);
        free(d);
        picture_batch_free(&p);
    }
}

static void open_encoders(struct comm *world, struct side *one, struct side *cut,
                          const char *const *overrides)
{
    const int t = world->size;
    const struct topology_spec grids[] = { { "encoder", t, 0, t, 1, 1, 1, 1 },
                                           { "language", t, 0, 1, 1, 1, 1, 1 } };
    struct errors e = { 0 };
    memset(cut, 0, sizeof *cut);
    open_alone(one, 2, overrides);
    read_deck(&cut->deck, 2, overrides);
    topology_describe(&cut->topo, grids, 2, t, world->rank, &e);
    ASSERT(e.count == 0);
    topology_connect(&cut->topo, world);
    cut->topo.language.member = false; /* the encoder alone */
    open_side(cut, false);
}

static void compare_gradients(struct verdict *v, struct side *one, struct side *cut,
                              bool expect_zero)
{
    const struct grid *g = &cut->topo.encoder;
    int compared = 0;
    for (int i = 0; i < cut->model.n_params; i++) {
        const struct param *p = &cut->model.param[i],
                           *whole = model_find_param(&one->model, p->module, p->name);
        ASSERT(whole && whole->trainable == p->trainable);
        if (!p->trainable)
            continue;
        compare_shard(v, p, p->grad.data, whole, g->tp_size, g->tp_rank);
        const double most = largest(whole->grad.data, tensor_numel(&whole->grad));
        if ((most == 0.0) != expect_zero)
            verdict_add(v, 1.0, 0.0, "zero or non-zero gradient");
        compared++;
    }
    ASSERT(compared > 0);
}

static void encoder_case(struct comm *world, enum pictures kind, const char *const *overrides)
{
    struct side one, cut;
    struct verdict v = { .tolerance = 1e-12 };
    double *want[2], *got[2];
    if (world->size > WIDEST_ENCODER)
        return;
    open_encoders(world, &one, &cut, overrides);
    run_encoder(&one, kind, want);
    run_encoder(&cut, kind, got);
    for (int64_t m = 0; m < 2; m++) {
        struct picture_batch p;
        make_pictures(&p, &one, kind, m);
        const int64_t n = p.rows * one.deck.language.hidden_size;
        const struct tensor a = tensor_1d(got[m], DTYPE_F64, PLACE_HOST, n),
                            b = tensor_1d(want[m], DTYPE_F64, PLACE_HOST, n);
        compare_dense(&v, &a, &b, "embeddings");
        if (world->size == 1 && memcmp(got[m], want[m], (size_t)n * sizeof **got) != 0)
            verdict_add(&v, 1.0, 0.0, "bits of one rank");
        if (!same_everywhere(world, got[m], n * (int64_t)sizeof **got))
            verdict_add(&v, 1.0, 0.0, "embeddings differ between the tp ranks");
        picture_batch_free(&p);
        free(want[m]);
        free(got[m]);
    }
    compare_gradients(&v, &one, &cut, kind == NONE);
    close_side(&one);
    close_side(&cut);
    verdict_check(&v, world);
}

#define ENCODER_CASE(kind, ...) \
    encoder_case(*state, kind, (const char *const[]){ "data.num_image_tiles=2", __VA_ARGS__, NULL })

static void affine_projector_dynamic_resolution(void **state)
{
    ENCODER_CASE(UNEQUAL, "stage.training_stage=3");
}
static void mlp_projector(void **state)
{
    ENCODER_CASE(UNEQUAL, "stage.training_stage=3", "projector.vision_projection_type=mlp");
}
static void mlp_projector_with_norm(void **state)
{
    ENCODER_CASE(UNEQUAL, "stage.training_stage=3", "projector.vision_projection_type=mlp",
                 "projector.projection_normalization=rmsnorm");
}
static void fixed_resolution(void **state)
{
    ENCODER_CASE(SQUARE, "stage.training_stage=3", "vision.dynamic_resolution=F",
                 "data.image_seq_length=32");
}
static void without_final_layernorm_and_pixel_shuffle(void **state)
{
    ENCODER_CASE(UNEQUAL, "stage.training_stage=3", "vision.final_layernorm=F",
                 "vision.pixel_shuffle=F", "data.image_seq_length=128", "language.seq_length=256");
}
static void frozen_encoder_affine(void **state)
{
    ENCODER_CASE(UNEQUAL, "stage.training_stage=2");
}
static void frozen_encoder_mlp(void **state)
{
    ENCODER_CASE(UNEQUAL, "stage.training_stage=2", "projector.vision_projection_type=mlp");
}
static void frozen_encoder_mlp_with_norm(void **state)
{
    ENCODER_CASE(UNEQUAL, "stage.training_stage=1", "projector.vision_projection_type=mlp",
                 "projector.projection_normalization=rmsnorm");
}
static void m6_30_text_only_micro_batches_leave_gradients_zero(void **state)
{
    ENCODER_CASE(NONE, "stage.training_stage=3");
    ENCODER_CASE(NONE, "stage.training_stage=2", "projector.vision_projection_type=mlp");
}

/* Replicated parameters: the one-rank gradient on every rank already, to the bit the same, so a sum
 * would be t times too large. */
static void m6_25_replicated_gradients_are_whole_and_identical_on_every_rank(void **state)
{
    static const char *const overrides[] = { "data.num_image_tiles=2", "stage.training_stage=3",
                                             "projector.vision_projection_type=mlp",
                                             "projector.projection_normalization=rmsnorm", NULL };
    struct comm *world = *state;
    struct side one, cut;
    struct verdict v = { .tolerance = 1e-12 };
    double *out[2];
    int replicated = 0;
    if (world->size > WIDEST_ENCODER)
        return;
    open_encoders(world, &one, &cut, overrides);
    run_encoder(&one, UNEQUAL, out);
    free(out[0]);
    free(out[1]);
    run_encoder(&cut, UNEQUAL, out);
    free(out[0]);
    free(out[1]);
    for (int i = 0; i < cut.model.n_params; i++) {
        const struct param *p = &cut.model.param[i],
                           *whole = model_find_param(&one.model, p->module, p->name);
        if (p->shard != PARAM_REPLICATED)
            continue;
        replicated++;
        if (p->sum_tp)
            verdict_add(&v, 1.0, 0.0, "an encoder parameter is marked to be summed");
        if (!same_everywhere(world, p->grad.data, tensor_numel(&p->grad) * (int64_t)sizeof(double)))
            verdict_add(&v, 1.0, 0.0, p->name);
        compare_dense(&v, &p->grad, &whole->grad, p->name);
    }
    /* class tokens, grid, final norm (2), projector norm; of each block two norms (4) and two
     * biases */
    ASSERT(replicated == 5 + 6 * (int)one.deck.vision.num_layers);
    close_side(&one);
    close_side(&cut);
    verdict_check(&v, world);
}

/* No rank computes what another does: the work of all ranks adds up to that of one. */
static void work_is_cut_over_the_ranks(void **state)
{
    static const char *const overrides[] = { "data.num_image_tiles=2", "stage.training_stage=3",
                                             NULL };
    struct comm *world = *state;
    struct side one, cut;
    double *out[2];
    if (world->size > WIDEST_ENCODER)
        return;
    open_encoders(world, &one, &cut, overrides);
    run_encoder(&one, UNEQUAL, out);
    free(out[0]);
    free(out[1]);
    run_encoder(&cut, UNEQUAL, out);
    free(out[0]);
    free(out[1]);
    const int64_t whole = model_take_gemm_flops(&one.model);
    int64_t sum = model_take_gemm_flops(&cut.model);
    comm_host_reduce_i64(world, &sum, 1, COMM_SUM);
    close_side(&one);
    close_side(&cut);
    assert_true(whole > 0);
    assert_int_equal(sum, whole);
}

/* ---- both modules ---------------------------------------------------------------------------- */

struct whole_batch {
    struct text_batch text;
    struct picture_batch pictures;
};

static struct data open_data(const struct deck *deck)
{
    struct data d;
    struct errors e = { 0 };
    data_init(&d, deck, DATA_TRAIN, &e);
    ASSERT(e.count == 0);
    return d;
}

static void open_batch(struct whole_batch *b, const struct side *s)
{
    const struct data_limits limits = data_limits(&s->deck);
    text_batch_init(&b->text, &limits, s->deck.batch.micro_batch_size);
    picture_batch_init(&b->pictures, &limits, s->deck.derived.encoder_microbatch,
                       3 * s->deck.vision.patch_dim * s->deck.vision.patch_dim, true);
}

static void close_batch(struct whole_batch *b)
{
    text_batch_free(&b->text);
    picture_batch_free(&b->pictures);
}

/* One micro-batch of all samples through both modules and back; returns this rank's share of the
 * loss. */
static double run_whole(struct side *s)
{
    const struct grid *e = &s->topo.encoder, *l = &s->topo.language;
    struct data text = open_data(&s->deck), pictures = open_data(&s->deck);
    struct whole_batch b;
    struct tensor out = { 0 }, image = { 0 }, dimage = { 0 }, de = { 0 };
    double loss = 0.0;
    open_batch(&b, s);
    model_zero_accumulators(&s->model);
    if (e->member) {
        data_pictures(&pictures, 0, 0, e->dp_rank, e->dp_size, &b.pictures);
        out = model_encoder_forward(&s->model, 0, &b.pictures, true);
    }
    if (l->member)
        data_text(&text, 0, 0, l->dp_rank, l->dp_size, &b.text);
    if (!s->bridge)
        image = out;
    else if (e->member && l->member)
        image =
            bridge_local_forward(s->bridge, &out, b.pictures.rows_per_sample, b.pictures.samples,
                                 b.text.image_rows_per_sample, b.text.samples);
    else if (e->member)
        bridge_send_forward(s->bridge, 0, &out, b.pictures.rows_per_sample, b.pictures.samples);
    else
        image = bridge_recv_forward(s->bridge, 0, b.text.image_rows_per_sample, b.text.samples);
    if (l->member) {
        model_language_forward(&s->model, 0, &b.text, &image, true);
        loss = l->tp_rank == 0 ? *(double *)model_loss_sum(&s->model).data : 0.0;
        dimage = model_language_backward(&s->model, 0, true);
    }
    if (!s->bridge)
        de = dimage;
    else if (e->member && l->member)
        de = bridge_local_backward(s->bridge, &dimage);
    else if (l->member)
        bridge_send_backward(s->bridge, 0, &dimage);
    else
        de = bridge_recv_backward(s->bridge, 0);
    if (e->member)
        model_encoder_backward(&s->model, 0, &de);
    close_batch(&b);
    data_free(&text);
    data_free(&pictures);
    return loss;
}

/* Gradients of encoder and projector, summed over the encoder's data-parallel ranks only. */
static void compare_encoder(struct verdict *v, struct side *one, struct side *cut)
{
    const struct grid *g = &cut->topo.encoder;
    for (int i = 0; i < cut->model.n_params; i++) {
        const struct param *p = &cut->model.param[i],
                           *whole = model_find_param(&one->model, p->module, p->name);
        if (p->module == MODEL_LANGUAGE)
            continue;
        const int64_t n = tensor_numel(&p->grad);
        double *sum = xcalloc((size_t)n, sizeof *sum);
        memcpy(sum, p->grad.data, (size_t)n * sizeof *sum);
        const struct tensor t = tensor_1d(sum, DTYPE_F64, PLACE_DEVICE, n);
        if (g->dp.size > 1)
            comm_mpi.all_reduce(g->dp.comm, &t, COMM_SUM, &cut->stream);
        compare_shard(v, p, sum, whole, g->tp_size, g->tp_rank);
        free(sum);
    }
}

static void whole_case(struct comm *world, struct side *one, double loss,
                       const struct topology_spec grids[2])
{
    static const char *const overrides[] = { "stage.training_stage=3", NULL };
    const int64_t de = grids[0].num_ranks / grids[0].tp, dl = grids[1].num_ranks / grids[1].tp;
    struct verdict v = { .tolerance = 1e-11 };
    struct errors e = { 0 };
    struct side cut;
    memset(&cut, 0, sizeof cut);
    read_deck(&cut.deck, SAMPLES / dl, overrides);
    cut.deck.derived.num_microbatches = 1;
    cut.deck.derived.encoder_microbatch = SAMPLES / de;
    topology_describe(&cut.topo, grids, 2, world->size, world->rank, &e);
    errors_print(&e);
    ASSERT(e.count == 0);
    topology_connect(&cut.topo, world);
    open_side(&cut, true);
    double sum = run_whole(&cut);
    comm_host_reduce_f64(world, &sum, 1, COMM_SUM);
    verdict_add(&v, fabs(sum - loss), loss, "loss");
    if (cut.topo.encoder.member)
        compare_encoder(&v, one, &cut);
    close_side(&cut);
    print_message("# encoder @%d tp %d dp %lld, language @%d tp %d dp %lld: %.1e %s\n",
                  grids[0].offset, grids[0].tp, (long long)de, grids[1].offset, grids[1].tp,
                  (long long)dl, v.worst, v.where);
    verdict_check(&v, world);
}

static bool divide(int de, int dl)
{
    return SAMPLES % de == 0 && SAMPLES % dl == 0 && (de % dl == 0 || dl % de == 0);
}

/* Every pair of widths of grids with these ranks; returns how many. */
static int over_all_widths(struct comm *world, struct side *one, double loss, int encoder,
                           int language, int offset, bool wide)
{
    int tried = 0;
    for (int te = 1; te <= WIDEST_ENCODER; te *= 2)
        for (int tl = 1; tl <= WIDEST_LANGUAGE; tl *= 2) {
            const struct topology_spec grids[] = { { "encoder", encoder, 0, te, 1, 1, 1, 1 },
                                                   { "language", language, offset, tl, 1, 1, 1,
                                                     1 } };
            if (encoder % te || language % tl || !divide(encoder / te, language / tl) ||
                (tl > 1) != wide)
                continue;
            whole_case(world, one, loss, grids);
            tried++;
        }
    return tried;
}

static void over_all_grids(struct comm *world, bool wide)
{
    static const char *const overrides[] = { "stage.training_stage=3", NULL };
    struct side one;
    int tried = 0;
    open_alone(&one, SAMPLES, overrides);
    const double loss = run_whole(&one);
    for (int encoder = 1; encoder < world->size; encoder++)
        tried += over_all_widths(world, &one, loss, encoder, world->size - encoder, encoder, wide);
    tried += over_all_widths(world, &one, loss, world->size, world->size, 0, wide);
    close_side(&one);
    assert_true(tried > 0 || (wide && world->size == 1));
}

static void p12_34_encoder_gradients_are_those_of_one_rank_on_every_pair_of_grids(void **state)
{
    over_all_grids(*state, false);
}

/* With t tensor-parallel language ranks the projector still gets the gradient once. */
static void m6_24_image_gradient_is_not_multiplied_by_the_language_tp_size(void **state)
{
    over_all_grids(*state, true);
}

int main(int argc, char **argv)
{
    struct comm *world = mpi_world(&argc, &argv);
    if (!world)
        return EXIT_ENVIRONMENT;
    const struct CMUnitTest tests[] = {
#define TEST(name) cmocka_unit_test_prestate(name, world)
        TEST(affine_projector_dynamic_resolution),
        TEST(mlp_projector),
        TEST(mlp_projector_with_norm),
        TEST(fixed_resolution),
        TEST(without_final_layernorm_and_pixel_shuffle),
        TEST(frozen_encoder_affine),
        TEST(frozen_encoder_mlp),
        TEST(frozen_encoder_mlp_with_norm),
        TEST(m6_30_text_only_micro_batches_leave_gradients_zero),
        TEST(m6_25_replicated_gradients_are_whole_and_identical_on_every_rank),
        TEST(work_is_cut_over_the_ranks),
        TEST(p12_34_encoder_gradients_are_those_of_one_rank_on_every_pair_of_grids),
        TEST(m6_24_image_gradient_is_not_multiplied_by_the_language_tp_size),
    };
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    comm_finish(world);
    return failed;
}
