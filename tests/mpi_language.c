/* ranks: 1 2 4 8 */
/* mpi_language.c - the language module on grids of tensor, sequence and expert parallelism against one rank.
 *
 * Every rank builds the whole model on a grid of its own (the reference) and its part of it on a grid of all ranks, in fp64. Each data
 * lane gets another micro-batch; the reference runs all of them one after the other. Losses must agree, and the gradients of every
 * parameter, reduced as the optimizer does - over data parallelism, experts over expert data parallelism, replicated parameters fed
 * with sequence-parallel rows over tp - must equal the matching elements of the reference's. The expert bias chooses how evenly the tokens
 * are routed, down to one expert that gets a copy of every token and ranks that get none.
 *
 * The shared expert overlapped: the same bits, and what is issued between the start and the end of each journey of the routed rows.
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

enum routing { BY_SCORE, WITHOUT_BIAS, UNEVEN, FIRST_EXPERTS, ROUTINGS };

static const char *const routing_name[ROUTINGS] = { "", "_without_bias", "_uneven", "_first_experts_only" };

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
    const struct backend_ops *be = &backend_ref_f64;
    be->stream_create(&m->stream, "compute");
    model_init(&m->model, &deck, &m->topo, be, &m->stream);
    arenas_init(&m->arenas);
    model_plan(&m->model, &m->arenas);
    arenas_commit(&m->arenas, be);
    model_plan(&m->model, &m->arenas);
    model_initialise(&m->model);
    model_zero_grads(&m->model);
}

/* Push the choice by the expert bias: UNEVEN leaves the last expert without tokens, FIRST_EXPERTS gives all to the first topk. */
static void set_routing(struct module *m, enum routing routing)
{
    for (int layer = 0; layer < m->model.n_moe && routing >= UNEVEN; layer++) {
        double *bias = model_expert_bias(&m->model, layer)->value.data;
        const int64_t n = deck.moe.num_experts;
        for (int64_t e = 0; e < n; e++)
            bias[e] = routing == UNEVEN ? (e == n - 1 ? -100.0 : 0.02 * (double)(e % 3))
                                        : (e < deck.moe.moe_router_topk ? 100.0 : 0.0);
    }
}

/* What the routing promises, over all ranks. */
static void check_routing(struct module *m, enum routing routing)
{
    for (int layer = 0; layer < m->model.n_moe; layer++) {
        const struct tensor count = model_tokens_per_expert(&m->model, layer);
        int64_t tokens[64];
        const int64_t n = deck.moe.num_experts, k = deck.moe.moe_router_topk;
        memcpy(tokens, count.data, (size_t)n * sizeof *tokens);
        comm_host_reduce_i64(world, tokens, (int)n, COMM_SUM);
        for (int64_t e = 0; e < n; e++)
            ASSERT(routing != FIRST_EXPERTS || (e < k ? tokens[e] > 0 : tokens[e] == 0));
        ASSERT(routing != UNEVEN || tokens[n - 1] == 0);
    }
}

static void module_close(struct module *m)
{
    model_free(&m->model);
    arenas_free(&m->arenas, &backend_ref_f64);
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

static void check_grid(int tp, int ep, enum routing routing)
{
    const int lanes = world->size / tp, lane = world->rank / tp;
    const struct data_limits limits = { .seq_length = 64 };
    struct module whole, part;
    struct text_batch batch;
    char *const overrides[] = { (char[]){ "moe.moe_router_enable_expert_bias=F" } };
    open_deck(routing == WITHOUT_BIAS, overrides);
    const size_t bytes = (size_t)(ROWS * deck.language.hidden_size) * sizeof(double);
    double *image = xcalloc(1, bytes), *dimage = xcalloc(1, bytes), *dwhole = xcalloc(1, bytes), own = 0.0;
    text_batch_init(&batch, &limits, 3);
    module_open(&whole, 1, 0, 1, 1, false);
    module_open(&part, world->size, world->rank, tp, ep, true);
    set_routing(&whole, routing);
    set_routing(&part, routing);
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
    check_routing(&part, routing);
    module_close(&part);
    module_close(&whole);
    text_batch_free(&batch);
    deck_free(&deck);
    free(image);
    free(dimage);
    free(dwhole);
}

/* ---- the shared expert while rows travel ---------------------------------------------------------------------------- */

/* The order of what the layer issues, in letters: R P all-to-all of rows and of probabilities, D the end of what is under way, 1 2 a product
 * with the shared expert's first or second matrix or its gradient while something is under way, f s the same while nothing is. */
static struct recorder {
    struct comm_ops comm;
    struct backend_ops be;
    const struct backend_ops *real;
    const struct param *fc1, *fc2;
    struct stream *travel;         /* of the last all-to-all */
    char text[512];
    size_t n;
} recorder;

static void record(char letter)
{
    ASSERT(recorder.n + 1 < sizeof recorder.text);
    recorder.text[recorder.n++] = letter;
}

static void recorded_all_to_all_v(struct comm *c, const struct tensor *send, const int64_t *send_rows, const struct tensor *recv,
                                  const int64_t *recv_rows, struct stream *s)
{
    record(tensor_cols(send) == 1 ? 'P' : 'R');
    recorder.travel = s;
    comm_mpi.all_to_all_v(c, send, send_rows, recv, recv_rows, s);
}

static void recorded_drain(struct stream *s)
{
    if (s == recorder.travel)
        record('D');
    comm_mpi.drain(s);
}

static void recorded_gemm(struct stream *s, bool ta, bool tb, double alpha, in_t a, in_t b, double beta, in_t c, out_t d)
{
    const bool first = b->data == recorder.fc1->value.data || d->data == recorder.fc1->grad.data;
    const bool second = b->data == recorder.fc2->value.data || d->data == recorder.fc2->grad.data;
    const bool travels = recorder.travel && recorder.travel->pending;
    if (first || second)
        record(travels ? (first ? '1' : '2') : (first ? 'f' : 's'));
    recorder.real->gemm(s, ta, tb, alpha, a, b, beta, c, d);
}

static void start_recording(struct module *m)
{
    recorder = (struct recorder){ .comm = comm_mpi, .be = *m->model.be, .real = m->model.be };
    recorder.comm.all_to_all_v = recorded_all_to_all_v;
    recorder.comm.drain = recorded_drain;
    recorder.be.gemm = recorded_gemm;
    /* One expert layer is enough: the second of the pattern. */
    recorder.fc1 = model_find_param(&m->model, MODEL_LANGUAGE, "decoder.layers.1.mlp.shared_experts.linear_fc1.weight");
    recorder.fc2 = model_find_param(&m->model, MODEL_LANGUAGE, "decoder.layers.1.mlp.shared_experts.linear_fc2.weight");
    ASSERT(recorder.fc1 && recorder.fc2);
    m->model.comm = &recorder.comm;
    m->model.be = &recorder.be;
}

/* Loss and gradients of one micro-batch without and with overlap: the same bits, and the order of parallel.md 5.6. */
static void check_overlap(int tp, int ep)
{
    const struct data_limits limits = { .seq_length = 64 };
    struct module m[2];
    struct text_batch batch;
    double loss[2], *image = NULL, *dimage[2];
    for (int on = 0; on < 2; on++) {
        char *const overrides[] = { (char[]){ "language.hybrid_layer_pattern=*E" },
                                    (char[]){ "moe.moe_shared_expert_overlap=T" } };
        open_deck(1 + on, overrides);
        const size_t bytes = (size_t)(ROWS * deck.language.hidden_size) * sizeof(double);
        if (!on)
            text_batch_init(&batch, &limits, 3);
        image = xrealloc(image, 1, bytes);
        dimage[on] = xcalloc(1, bytes);
        make_batch(&batch, image, world->rank / tp);
        module_open(&m[on], world->size, world->rank, tp, ep, true);
        start_recording(&m[on]);
        loss[on] = run(&m[on], &batch, image, dimage[on]);
        const char *want = ep == 1 ? "fs" "ssff" : on ? "R1PDR2D" "R22DPR11D" : "RPDRfsD" "RDPRDssff";
        if (strcmp(recorder.text, want) != 0)
            FATAL(EXIT_INTERNAL, "tp %d ep %d overlap %d: issued %s, wanted %s", tp, ep, on, recorder.text, want);
        if (!on)
            deck_free(&deck);
    }
    ASSERT(memcmp(&loss[0], &loss[1], sizeof loss[0]) == 0);
    ASSERT(memcmp(dimage[0], dimage[1], (size_t)(ROWS * deck.language.hidden_size) * sizeof(double)) == 0);
    for (int i = 0; i < m[0].model.n_params; i++) {
        const struct param *a = &m[0].model.param[i], *b = &m[1].model.param[i];
        if (a->trainable && memcmp(a->grad.data, b->grad.data, (size_t)tensor_numel(&a->grad) * sizeof(double)) != 0)
            FATAL(EXIT_INTERNAL, "tp %d ep %d: the gradient of %s differs with overlap", tp, ep, a->name);
    }
    ASSERT(m[0].model.gemm_flops == m[1].model.gemm_flops);
    for (int on = 0; on < 2; on++) {
        module_close(&m[on]);
        free(dimage[on]);
    }
    text_batch_free(&batch);
    deck_free(&deck);
    free(image);
}

int main(int argc, char **argv)
{
    static const struct { int tp, ep; } grid[] = { { 1, 1 }, { 2, 1 }, { 1, 2 }, { 2, 2 }, { 1, 4 }, { 2, 4 }, { 1, 8 }, { 2, 8 } };
    char why[512];
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
        printf("1..%d\n", (ROUTINGS + 1) * n);
    for (int routing = 0; routing <= ROUTINGS; routing++)
        for (size_t i = 0; i < sizeof grid / sizeof grid[0]; i++) {
            if (world->size % grid[i].tp || world->size % grid[i].ep)
                continue;
            if (routing < ROUTINGS)
                check_grid(grid[i].tp, grid[i].ep, routing);
            else
                check_overlap(grid[i].tp, grid[i].ep);
            comm_host_barrier(world);
            if (world->rank == 0 && routing < ROUTINGS)
                printf("ok %d - m6_12_m6_19_m6_25_p12_53_54_58_tp%d_ep%d%s\n", ++done, grid[i].tp, grid[i].ep, routing_name[routing]);
            else if (world->rank == 0)
                printf("ok %d - p12_56_shared_expert_overlap_tp%d_ep%d\n", ++done, grid[i].tp, grid[i].ep);
            fflush(stdout);
        }
    comm_finish(world);
    return 0;
}
