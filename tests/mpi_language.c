/* ranks: 1 2 4 8 */
/* mpi_language.c - the language module on grids of tensor, sequence and expert parallelism against one rank.
 *
 * Every rank builds the whole model on a grid of its own (the reference) and its part of it on a grid of all ranks, in fp64. Each data
 * lane gets another micro-batch; the reference runs all of them one after the other. Losses must agree, and the gradients of every
 * parameter, reduced as the optimizer does - over data parallelism, experts over expert data parallelism, replicated parameters fed
 * with sequence-parallel rows over tp - must equal the matching elements of the reference's.
 */
#include "model_fixture.h"
#include "rng.h"

enum { ROWS = 5 };               /* picture embeddings of every micro-batch */

struct module {                  /* a language module on some grid */
    struct topology topo;
    struct arenas arenas;
    struct model model;
    struct stream stream;
};

static struct comm *world;
static struct deck deck;

static void open_deck(int extra, char *const *overrides)
{
    static const char text[] = "&run train_iters = 1 precision = 'fp64' /\n&topology layout = 'language_only' /\n"
                               "&language preset = 'tiny' init_method_std = 0.15 /\n&moe moe_aux_loss_coeff = 0.05 /\n"
                               "&batch micro_batch_size = 3 global_batch_size = 3 /\n&lr lr = 1e-3 /\n";
    struct errors e = { 0 };
    deck_read(&deck, "mpi_language", text, strlen(text), extra, overrides, &e);
    deck_resolve(&deck, 1, &e);
    if (e.count)
        errors_print(&e);
    ASSERT(e.count == 0);
    errors_free(&e);
}

static void module_open(struct module *m, int size, int rank, int tp, int ep, bool connect)
{
    const struct topology_spec spec = { "language", size, 0, tp, 1, 1, ep, 1 };
    struct errors e = { 0 };
    memset(m, 0, sizeof *m);
    topology_describe(&m->topo, &spec, 1, size, rank, &e);
    if (e.count)
        errors_print(&e);
    ASSERT(e.count == 0);
    if (connect)
        topology_connect(&m->topo, world);
    const struct backend_ops *be = backend_select(true);
    be->stream_create(&m->stream, "compute");
    model_init(&m->model, &deck, &m->topo, be, &m->stream);
    arenas_init(&m->arenas);
    model_plan(&m->model, &m->arenas);
    arenas_commit(&m->arenas, be);
    model_plan(&m->model, &m->arenas);
    model_initialise(&m->model);
    model_zero_grads(&m->model);
}

static void module_close(struct module *m)
{
    model_free(&m->model);
    arenas_free(&m->arenas, backend_select(true));
    topology_free(&m->topo);
}

/* A micro-batch of lane `lane`: ids, labels, masks and picture positions that differ from lane to lane. */
static void make_batch(struct text_batch *b, double *image, int lane)
{
    const struct rng_key key = rng_key((uint64_t)lane, "mpi_language");
    const int64_t n = b->samples * b->seq_length;
    b->image_rows = ROWS;
    b->loss_tokens = 0;
    for (int64_t i = 0; i < n; i++) {
        b->input_ids[i] = (int64_t)rng_below(key, 0, (uint64_t)i, 499);
        b->labels[i] = i % 7 == 3 ? -100 : (int64_t)rng_below(key, 1, (uint64_t)i, 500);
        b->loss_mask[i] = b->labels[i] >= 0 ? 1.0f : 0.0f;
        b->loss_tokens += b->labels[i] >= 0;
        b->image_row[i] = i % 41 == 5 && i / 41 < ROWS ? (int32_t)(i / 41) : -1;
    }
    for (int64_t i = 0; i < ROWS * deck.language.hidden_size; i++)
        image[i] = 0.3 * rng_normal_at(key, (uint64_t)i);
}

static double run(struct module *m, const struct text_batch *b, double *image, double *dimage)
{
    const struct tensor rows = tensor_2d(image, DTYPE_F64, PLACE_DEVICE, ROWS, deck.language.hidden_size);
    model_zero_accumulators(&m->model);
    model_language_forward(&m->model, 0, b, &rows, true);
    const double loss = *(double *)model_loss_sum(&m->model).data;
    const struct tensor d = model_language_backward(&m->model, 0, true);
    if (d.data)
        memcpy(dimage, d.data, (size_t)(ROWS * deck.language.hidden_size) * sizeof *dimage);
    return loss;
}

/* Sum this rank's gradient over the ranks that hold other contributions to it. */
static void reduce(struct module *m, const struct param *p)
{
    const struct grid *g = &m->topo.language;
    const bool apart = p->expert && g->ep_size > 1;
    struct comm *data = apart ? g->expt_dp.comm : g->dp_cp.comm;
    if (data)
        comm_mpi.all_reduce(data, &p->grad, COMM_SUM, &m->stream);
    if (g->tp.comm && p->sum_tp)
        comm_mpi.all_reduce(g->tp.comm, &p->grad, COMM_SUM, &m->stream);
    /* Experts that no expert parallelism spreads are replicated over tp and see only the rank's own rows. */
    if (g->tp.comm && p->expert && !apart)
        comm_mpi.all_reduce(g->tp.comm, &p->grad, COMM_SUM, &m->stream);
}

static void compare(struct module *whole, struct module *part)
{
    for (int i = 0; i < part->model.n_params; i++) {
        const struct param *p = &part->model.param[i];
        const struct param *q = model_find_param(&whole->model, p->module, p->name);
        if (!p->trainable)
            continue;
        reduce(part, p);
        const int64_t rows = p->grad.shape[0], cols = tensor_numel(&p->grad) / rows;
        const double *g = p->grad.data, *full = q->grad.data;
        double scale = 0.0;
        for (int64_t k = 0; k < tensor_numel(&q->grad); k++)
            scale = fmax(scale, fabs(full[k]));
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < cols; c++) {
                const double want = full[model_full_index(&part->model, p, r, c)];
                if (!(fabs(g[r * cols + c] - want) <= 1e-11 * scale))
                    FATAL(EXIT_INTERNAL, "%s [%d,%d]: gradient %.15e, one rank has %.15e (largest %.1e)", p->name, (int)r, (int)c,
                          g[r * cols + c], want, scale);
            }
    }
}

static void check_grid(int tp, int ep, int extra, char *const *overrides)
{
    const int lanes = world->size / tp, lane = world->rank / tp;
    const struct data_limits limits = { .seq_length = 64 };
    struct module whole, part;
    struct text_batch batch;
    open_deck(extra, overrides);
    const size_t bytes = (size_t)(ROWS * deck.language.hidden_size) * sizeof(double);
    double *image = xcalloc(1, bytes), *dimage = xcalloc(1, bytes), *dwhole = xcalloc(1, bytes), own = 0.0;
    text_batch_init(&batch, &limits, 3);
    module_open(&whole, 1, 0, 1, 1, false);
    module_open(&part, world->size, world->rank, tp, ep, true);
    for (int l = 0; l < lanes; l++) {
        make_batch(&batch, image, l);
        const double loss = run(&whole, &batch, image, dimage);
        if (l == lane) {
            own = loss;
            memcpy(dwhole, dimage, bytes);
        }
    }
    make_batch(&batch, image, lane);
    memset(dimage, 0, bytes);
    const double loss = run(&part, &batch, image, dimage);
    if (!(fabs(loss - own) <= 1e-12 * fabs(own)))
        FATAL(EXIT_INTERNAL, "tp %d ep %d: loss %.15e, one rank has %.15e", tp, ep, loss, own);
    if (part.topo.language.tp_rank == 0)
        for (int64_t i = 0; i < ROWS * deck.language.hidden_size; i++)
            if (!(fabs(dimage[i] - dwhole[i]) <= 1e-11))
                FATAL(EXIT_INTERNAL, "tp %d ep %d: picture gradient %d is %.15e, one rank has %.15e", tp, ep, (int)i, dimage[i], dwhole[i]);
    compare(&whole, &part);
    module_close(&part);
    module_close(&whole);
    text_batch_free(&batch);
    deck_free(&deck);
    free(image);
    free(dimage);
    free(dwhole);
}

static char all_to_one[] = "moe.moe_router_enable_expert_bias=F";

int main(int argc, char **argv)
{
    static const struct { int tp, ep; } grid[] = { { 1, 1 }, { 2, 1 }, { 1, 2 }, { 2, 2 }, { 1, 4 }, { 2, 4 }, { 1, 8 }, { 2, 8 } };
    char why[512], *const one_bias[] = { all_to_one };
    int n = 0, done = 0;
    if (!comm_start(&argc, &argv, &world, why, sizeof why)) {
        fprintf(stderr, "%s\n", why);
        return EXIT_ENVIRONMENT;
    }
    check_on_abort(comm_abort);
    check_identify(world->rank, world->size, "test", NULL);
    for (size_t i = 0; i < sizeof grid / sizeof grid[0]; i++)
        n += world->size % grid[i].tp == 0 && world->size % grid[i].ep == 0;
    if (world->rank == 0)
        printf("1..%d\n", 2 * n);
    for (int variant = 0; variant < 2; variant++)
        for (size_t i = 0; i < sizeof grid / sizeof grid[0]; i++) {
            if (world->size % grid[i].tp || world->size % grid[i].ep)
                continue;
            check_grid(grid[i].tp, grid[i].ep, variant, one_bias);
            comm_host_barrier(world);
            if (world->rank == 0)
                printf("ok %d - m6_12_m6_19_m6_25_tp%d_ep%d%s\n", ++done, grid[i].tp, grid[i].ep, variant ? "_without_bias" : "");
            fflush(stdout);
        }
    comm_finish(world);
    return 0;
}
