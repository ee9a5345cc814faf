/* ranks: 1 2 4 8 */
/* mpi_language.c - the language module on grids of tensor, sequence and expert parallelism against
 * one rank.
 *
 * Every rank builds the whole model on a grid of its own (the reference) and its part of it on a
 * grid of all ranks, in fp64. Each data lane gets another micro-batch; the references' gradients
 * are added up. Losses must agree, and the gradients of every parameter, reduced as the optimizer
 * does - over data parallelism, experts over expert data parallelism, replicated parameters fed
 * with sequence-parallel rows over tp - must equal the matching elements of the reference's. The
 * expert bias chooses how evenly the tokens are routed, down to one expert that gets a copy of
 * every token and ranks that get none.
 *
 * The regions themselves: what tensor parallelism cuts and gathers, what travels to the experts'
 * ranks and back, each against its definition and its adjoint. The shared expert overlapped: the
 * same bits, and what is issued between the start and the end of each journey of the routed rows.
 */
#include "dispatch.h"
#include "linear.h"
#include "model_fixture.h"
#include "rng.h"
#include "mpi_world.h"

/* picture embeddings of every micro-batch; ranks that recompute at most, more show nothing new */
enum { ROWS = 5, RECOMPUTE_RANKS = 4 };

struct module { /* a language module on some grid */
    struct topology topo;
    struct arenas arenas;
    struct model model;
    struct stream stream;
};

enum routing { BY_SCORE, WITHOUT_BIAS, UNEVEN, FIRST_EXPERTS, ROUTINGS };

static const char *const routing_name[ROUTINGS] = { "", "_without_bias", "_uneven",
                                                    "_first_experts_only" };

static struct comm *world;
static int parts = 1; /* expert tensor parallelism of the grids of all ranks */
static struct deck deck;

static void open_deck(int extra, char *const *overrides)
{
    static const char text[] =
        "&run train_iters = 1 precision = 'fp64' /\n&topology layout = 'language_only' /\n"
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
    const struct topology_spec spec = { "language", size, 0, tp, 1, 1, ep, connect ? parts : 1 };
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

/* Push the choice by the expert bias: UNEVEN leaves the last expert without tokens, FIRST_EXPERTS
 * gives all to the first topk. */
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

/* A micro-batch of lane `lane`: ids, labels, masks and picture positions that differ from lane to
 * lane. */
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
    const struct tensor rows =
        tensor_2d(image, DTYPE_F64, PLACE_DEVICE, ROWS, deck.language.hidden_size);
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
    struct comm *data = p->expert ? g->expt_dp.comm : g->dp_cp.comm;
    if (data)
        comm_mpi.all_reduce(data, &p->grad, COMM_SUM, &m->stream);
    if (g->tp.comm && p->sum_tp)
        comm_mpi.all_reduce(g->tp.comm, &p->grad, COMM_SUM, &m->stream);
}

/* Each rank's one-rank model has its own lane's gradients: make them those of all lanes, every lane
 * once. */
static void add_lanes(struct module *whole, int tp)
{
    for (int i = 0; i < whole->model.n_params; i++) {
        const struct param *p = &whole->model.param[i];
        if (!p->trainable)
            continue;
        if (world->rank % tp != 0)
            memset(p->grad.data, 0, (size_t)tensor_numel(&p->grad) * sizeof(double));
        comm_mpi.all_reduce(world, &p->grad, COMM_SUM, &whole->stream);
    }
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
                    FATAL(EXIT_INTERNAL,
                          "%s [%d,%d]: gradient %.15e, one rank has %.15e (largest %.1e)", p->name,
                          (int)r, (int)c, g[r * cols + c], want, scale);
            }
    }
}

static void check_grid(int tp, int ep, enum routing routing)
{
    const int lane = world->rank / tp;
    const struct data_limits limits = { .seq_length = 64 };
    struct module whole, part;
    struct text_batch batch;
    char *const overrides[] = { (char[]){ "moe.moe_router_enable_expert_bias=F" } };
    open_deck(routing == WITHOUT_BIAS, overrides);
    const size_t bytes = (size_t)(ROWS * deck.language.hidden_size) * sizeof(double);
    double *image = xcalloc(1, bytes), *dimage = xcalloc(1, bytes), *dwhole = xcalloc(1, bytes);
    text_batch_init(&batch, &limits, 3);
    module_open(&whole, 1, 0, 1, 1, false);
    module_open(&part, world->size, world->rank, tp, ep, true);
    set_routing(&whole, routing);
    set_routing(&part, routing);
    make_batch(&batch, image, lane);
    const double own = run(&whole, &batch, image, dwhole);
    add_lanes(&whole, tp);
    const double loss = run(&part, &batch, image, dimage);
    if (!(fabs(loss - own) <= 1e-12 * fabs(own)))
        FATAL(EXIT_INTERNAL, "tp %d ep %d: loss %.15e, one rank has %.15e", tp, ep, loss, own);
    if (part.topo.language.tp_rank == 0)
        for (int64_t i = 0; i < ROWS * deck.language.hidden_size; i++)
            if (!(fabs(dimage[i] - dwhole[i]) <= 1e-11))
                FATAL(EXIT_INTERNAL,
                      "tp %d ep %d: picture gradient %d is %.15e, one rank has %.15e", tp, ep,
                      (int)i, dimage[i], dwhole[i]);
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

/* ---- the shared expert while rows travel ----------------------------------------------------- */

/* The order of what the layer issues, in letters: R P all-to-all of rows and of probabilities, D
 * the end of what is under way, 1 2 a product with the shared expert's first or second matrix or
 * its gradient while something is under way, f s the same while nothing is. */
static struct recorder {
    struct comm_ops comm;
    struct backend_ops be;
    const struct backend_ops *real;
    const struct param *fc1, *fc2;
    struct stream *travel; /* of the last all-to-all */
    char text[512];
    size_t n;
} recorder;

static void record(char letter)
{
    ASSERT(recorder.n + 1 < sizeof recorder.text);
    recorder.text[recorder.n++] = letter;
}

static void recorded_all_to_all_v(struct comm *c, const struct tensor *send,
                                  const int64_t *send_rows, const struct tensor *recv,
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

static void recorded_gemm(struct stream *s, bool ta, bool tb, double alpha, in_t a, in_t b,
                          double beta, in_t c, out_t d)
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
    recorder.fc1 = model_find_param(&m->model, MODEL_LANGUAGE,
                                    "decoder.layers.1.mlp.shared_experts.linear_fc1.weight");
    recorder.fc2 = model_find_param(&m->model, MODEL_LANGUAGE,
                                    "decoder.layers.1.mlp.shared_experts.linear_fc2.weight");
    ASSERT(recorder.fc1 && recorder.fc2);
    m->model.comm = &recorder.comm;
    m->model.be = &recorder.be;
}

/* Loss and gradients of one micro-batch without and with overlap: the same bits, and the order of
 * parallel.md 5.6. */
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
        const char *want = ep == 1 ? "fs"
                                     "ssff"
                           : on    ? "R1PDR2D"
                                     "R22DPR11D"
                                   : "RPDRfsD"
                                     "RDPRDssff";
        if (parts == 1 && strcmp(recorder.text, want) != 0)
            FATAL(EXIT_INTERNAL, "tp %d ep %d overlap %d: issued %s, wanted %s", tp, ep, on,
                  recorder.text, want);
        if (!on)
            deck_free(&deck);
    }
    ASSERT(memcmp(&loss[0], &loss[1], sizeof loss[0]) == 0);
    ASSERT(memcmp(dimage[0], dimage[1],
                  (size_t)(ROWS * deck.language.hidden_size) * sizeof(double)) == 0);
    for (int i = 0; i < m[0].model.n_params; i++) {
        const struct param *a = &m[0].model.param[i], *b = &m[1].model.param[i];
        if (a->trainable && memcmp(a->grad.data, b->grad.data,
                                   (size_t)tensor_numel(&a->grad) * sizeof(double)) != 0)
            FATAL(EXIT_INTERNAL, "tp %d ep %d: the gradient of %s differs with overlap", tp, ep,
                  a->name);
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

/* ---- recomputation --------------------------------------------------------------------------- */

/* Loss and gradients with every layer made again in backward, the shared expert overlapped or not:
 * the bits of the run that keeps all. */
static void check_recompute(int tp, int ep)
{
    static const char *const way[] = { "none", "full", "full" };
    const struct data_limits limits = { .seq_length = 64 };
    struct module m[3];
    struct text_batch batch;
    double loss[3], *image = NULL, *dimage[3];
    for (int i = 0; i < 3; i++) {
        char granularity[64];
        char *const overrides[] = { granularity, (char[]){ "moe.moe_shared_expert_overlap=T" } };
        snprintf(granularity, sizeof granularity, "language.recompute_granularity=%s", way[i]);
        open_deck(i < 2 ? 1 : 2, overrides);
        const size_t bytes = (size_t)(ROWS * deck.language.hidden_size) * sizeof(double);
        if (i == 0)
            text_batch_init(&batch, &limits, 3);
        image = xrealloc(image, 1, bytes);
        dimage[i] = xcalloc(1, bytes);
        make_batch(&batch, image, world->rank / tp);
        module_open(&m[i], world->size, world->rank, tp, ep, true);
        loss[i] = run(&m[i], &batch, image, dimage[i]);
        ASSERT(memcmp(&loss[i], &loss[0], sizeof loss[0]) == 0);
        ASSERT(memcmp(dimage[i], dimage[0], bytes) == 0);
        for (int k = 0; k < m[0].model.n_params; k++) {
            const struct param *a = &m[0].model.param[k], *b = &m[i].model.param[k];
            if (a->trainable && memcmp(a->grad.data, b->grad.data,
                                       (size_t)tensor_numel(&a->grad) * sizeof(double)) != 0)
                FATAL(EXIT_INTERNAL, "tp %d ep %d: the gradient of %s differs when made again", tp,
                      ep, a->name);
        }
        for (int l = 0; l < m[0].model.n_moe; l++) {
            const struct tensor a = model_tokens_per_expert(&m[0].model, l),
                                b = model_tokens_per_expert(&m[i].model, l);
            ASSERT(memcmp(a.data, b.data, (size_t)tensor_numel(&a) * sizeof(int64_t)) == 0);
        }
        ASSERT((i > 0) == (m[i].arenas.a[ARENA_ACTIVATIONS].capacity <
                           m[0].arenas.a[ARENA_ACTIVATIONS].capacity));
        if (i < 2)
            deck_free(&deck);
    }
    for (int i = 0; i < 3; i++) {
        module_close(&m[i]);
        free(dimage[i]);
    }
    text_batch_free(&batch);
    deck_free(&deck);
    free(image);
}

/* ---- the regions ----------------------------------------------------------------------------- */

static double random_at(int rank, int which, int64_t i)
{
    return rng_normal_at(rng_key((uint64_t)(rank + 1), which ? "region y" : "region x"),
                         (uint64_t)i);
}

static void must(bool ok, const char *what, int tp, int ep)
{
    if (!ok)
        FATAL(EXIT_INTERNAL, "tp %d ep %d: %s", tp, ep, what);
}

static double product(const double *x, const double *y, int64_t n)
{
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++)
        sum += x[i] * y[i];
    return sum;
}

/* Over all ranks of the world. */
static void must_agree(double a, double b, const char *what, int tp, int ep)
{
    double sums[2] = { a, b };
    comm_host_reduce_f64(world, sums, 2, COMM_SUM);
    must(fabs(sums[0] - sums[1]) <= 1e-11 * (1.0 + fabs(sums[1])), what, tp, ep);
}

/* Gather of this rank's rows and sum-and-cut of all rows: slices of the logical rows, each other's
 * adjoint, nothing with one rank. */
static void check_rows(struct module *m, int tp)
{
    struct model *model = &m->model;
    const int rank = m->topo.language.tp_rank, first = world->rank - rank;
    const int64_t rows = 12, cols = 3, own = linear_local_rows(model, rows), n = rows * cols,
                  n_own = own * cols;
    double x[36], gathered[36], y[36], reduced[36];
    for (int64_t i = 0; i < n_own; i++)
        x[i] = random_at(world->rank, 0, i);
    for (int64_t i = 0; i < n; i++)
        y[i] = random_at(world->rank, 1, i);
    const struct tensor local = tensor_2d(x, DTYPE_F64, PLACE_DEVICE, own, cols),
                        sum = tensor_2d(reduced, DTYPE_F64, PLACE_DEVICE, own, cols);
    const struct tensor all = tensor_2d(gathered, DTYPE_F64, PLACE_DEVICE, rows, cols),
                        full = tensor_2d(y, DTYPE_F64, PLACE_DEVICE, rows, cols);
    must(own * tp == rows, "this rank has not its part of the rows", tp, 0);
    const struct tensor *got = linear_gather(model, &local, &all);
    must(got == (tp == 1 ? &local : &all), "one rank gathers nothing", tp, 0);
    linear_reduce(model, &full, tp == 1 ? &full : &sum);
    const double *whole = got->data, *cut = tp == 1 ? y : reduced;
    for (int64_t i = 0; i < n; i++)
        must(whole[i] == random_at(first + (int)(i / n_own), 0, i % n_own),
             "a gathered row is not its owner's", tp, 0);
    for (int64_t i = 0; i < n_own; i++) {
        double want = 0.0;
        for (int r = 0; r < tp; r++)
            want += random_at(first + r, 1, rank * n_own + i);
        must(fabs(cut[i] - want) <= 1e-14 * (1.0 + fabs(want)),
             "a reduced row is not the sum of the ranks' rows", tp, 0);
    }
    for (int64_t i = 0; i < n; i++)
        y[i] = random_at(world->rank, 1, i);
    must_agree(product(whole, y, n), product(x, cut == y ? y : cut, n_own),
               "gather is not the adjoint of sum and cut", tp, 0);
}

/* First of the blocks with this name: what the module keeps of the micro-batch. */
static const double *kept(const struct module *m, const char *name)
{
    const struct arena *a = &m->arenas.a[ARENA_ACTIVATIONS];
    for (int i = 0; i < a->n_blocks; i++)
        if (strcmp(a->block[i].name, name) == 0)
            return (const double *)(a->base + a->block[i].offset);
    FATAL(EXIT_INTERNAL, "no block is called %s", name);
}

/* Embeddings are cut once, over tokens; labels, masks and losses stay whole on every rank. */
static void check_sequence(int tp)
{
    const struct data_limits limits = { .seq_length = 64 };
    const int64_t tokens = 3 * 64;
    struct module whole, part;
    struct text_batch batch;
    open_deck(0, NULL);
    const int64_t h = deck.language.hidden_size, own = tokens / tp;
    double *image = xcalloc((size_t)(ROWS * h), sizeof *image),
           *dimage = xcalloc((size_t)(ROWS * h), sizeof *dimage);
    text_batch_init(&batch, &limits, 3);
    module_open(&whole, 1, 0, 1, 1, false);
    module_open(&part, world->size, world->rank, tp, 1, true);
    make_batch(&batch, image, world->rank / tp);
    run(&whole, &batch, image, dimage);
    run(&part, &batch, image, dimage);
    const struct tensor a = model_token_loss(&whole.model), b = model_token_loss(&part.model);
    must(tensor_numel(&b) == tokens, "the losses of the tokens are cut", tp, 1);
    for (int64_t i = 0; i < tokens; i++)
        must(fabs(((double *)a.data)[i] - ((double *)b.data)[i]) <= 1e-12,
             "a token's loss is not that of one rank", tp, 1);
    const double *x = kept(&whole, "layer.x") + part.topo.language.tp_rank * own * h,
                 *y = kept(&part, "layer.x");
    for (int64_t i = 0; i < own * h; i++)
        must(x[i] == y[i], "a rank's embeddings are not its part of one rank's", tp, 1);
    check_rows(&part, tp);
    module_close(&part);
    module_close(&whole);
    text_batch_free(&batch);
    deck_free(&deck);
    free(image);
    free(dimage);
    /* What does not divide is a deck error. */
    if (tp > 1) {
        char *const odd[] = { (char[]){ "language.seq_length=63" },
                              (char[]){ "topology.llm_tp=2" } };
        static const char text[] =
            "&run train_iters = 1 /\n&topology layout = 'language_only' /\n&language preset = 'tiny' /\n&lr lr = 1e-3 /\n";
        struct errors e = { 0 };
        deck_read(&deck, "mpi_language", text, strlen(text), 2, odd, &e);
        deck_resolve(&deck, 2, &e);
        must(e.count == 1 &&
                 strstr(e.line[0],
                        "language.seq_length = 63: must be a multiple of topology.llm_tp = 2"),
             "63 tokens over 2 ranks", tp, 1);
        errors_free(&e);
        deck_free(&deck);
    }
}

/* Copies that a rank routes to an expert: uneven, zero for some experts and for whole ranks. */
static int64_t copies_of(int rank, int64_t expert)
{
    return expert % 3 == 2 || rank == 1 ? 0 : (rank * 5 + expert * 3) % 4;
}

/* Rows to their experts and back: order (owned expert, source rank, copy), an exact inverse, each
 * the adjoint of the other. */
static void check_dispatch(int tp, int ep)
{
    enum { COLS = 64, MOST = 64 };
    struct module m;
    struct arenas arenas;
    open_deck(0, NULL);
    module_open(&m, world->size, world->rank, tp, ep, true);
    const struct group *g = parts > 1 ? &m.topo.language.tp_ep : &m.topo.language.ep;
    const int rank = g->rank, first = g->member[0];
    const int64_t experts = deck.moe.num_experts, owned = experts / ep, mine = rank / parts * owned;
    struct dispatch *d = dispatch_init(&m.model, experts);
    arenas_init(&arenas);
    dispatch_plan(&m.model, d, &arenas, ARENA_ACTIVATIONS, MOST);
    arenas_commit(&arenas, m.model.be);
    dispatch_plan(&m.model, d, &arenas, ARENA_ACTIVATIONS, MOST);
    int32_t offset[65] = { 0 };
    for (int64_t e = 0; e < experts; e++)
        offset[e + 1] = offset[e] + (int32_t)copies_of(rank, e);
    const int64_t sent = offset[experts];
    double *x = xcalloc((size_t)(sent * COLS) + 1, sizeof *x),
           *y = xcalloc((size_t)(sent * COLS) + 1, sizeof *y),
           *p = xcalloc((size_t)sent + 1, sizeof *p);
    for (int64_t i = 0; i < sent * COLS; i++)
        x[i] = random_at(first + rank, 0, i);
    for (int64_t i = 0; i < sent; i++)
        p[i] = (double)(rank * 1000 + i);
    const struct tensor offsets = tensor_1d(offset, DTYPE_I32, PLACE_DEVICE, experts + 1),
                        rows = tensor_2d(x, DTYPE_F64, PLACE_DEVICE, sent, COLS);
    const struct tensor probs = tensor_2d(p, DTYPE_F64, PLACE_DEVICE, sent, 1),
                        back = tensor_2d(y, DTYPE_F64, PLACE_DEVICE, sent, COLS);
    dispatch_begin(&m.model, d, &offsets);
    dispatch_learn(d);
    must(d->sent == sent, "not every copy is sent", tp, ep);
    const int64_t n = d->received;
    double *in = xcalloc((size_t)(n * COLS) + 1, sizeof *in),
           *prob = xcalloc((size_t)n + 1, sizeof *prob),
           *z = xcalloc((size_t)(n * COLS) + 1, sizeof *z);
    const struct tensor received = tensor_2d(in, DTYPE_F64, PLACE_DEVICE, n, COLS),
                        their = tensor_2d(prob, DTYPE_F64, PLACE_DEVICE, n, 1);
    const struct tensor other = tensor_2d(z, DTYPE_F64, PLACE_DEVICE, n, COLS);
    dispatch_send(&m.model, d, DISPATCH_ROWS, &rows);
    dispatch_send(&m.model, d, DISPATCH_PROBS, &probs);
    dispatch_wait(&m.model, d);
    dispatch_unpack(&m.model, d, DISPATCH_ROWS, &received);
    dispatch_unpack(&m.model, d, DISPATCH_PROBS, &their);
    int64_t at = 0;
    for (int64_t e = mine; e < mine + owned; e++) {
        must(((int32_t *)d->offsets.data)[e - mine] == at,
             "an expert's rows do not begin where its offset says", tp, ep);
        for (int r = 0; r < g->size; r++) {
            int64_t from = 0;
            for (int64_t f = 0; f < e; f++)
                from += copies_of(r, f);
            for (int64_t i = 0; i < copies_of(r, e); i++, at++) {
                must(prob[at] == (double)(r * 1000 + from + i), "a probability is not its copy's",
                     tp, ep);
                for (int64_t c = 0; c < COLS; c++)
                    must(in[at * COLS + c] == random_at(first + r, 0, (from + i) * COLS + c),
                         "a row is not in the order of expert, source, copy", tp, ep);
            }
        }
    }
    must(at == n && ((int32_t *)d->offsets.data)[owned] == n, "rows are missing", tp, ep);
    dispatch_return(&m.model, d, DISPATCH_ROWS, &received, &back);
    dispatch_return(&m.model, d, DISPATCH_PROBS, &their, &probs);
    dispatch_wait(&m.model, d);
    /* Once from each part. */
    for (int64_t i = 0; i < sent * COLS; i++)
        must(fabs(y[i] - parts * x[i]) <= (parts > 1 ? 1e-14 : 0.0),
             "what comes back is not what was sent", tp, ep);
    for (int64_t i = 0; i < sent; i++)
        must(p[i] == parts * (double)(rank * 1000 + i), "a number does not come back", tp, ep);
    for (int64_t i = 0; i < n * COLS; i++)
        z[i] = random_at(world->rank, 1, i);
    dispatch_return(&m.model, d, DISPATCH_ROWS, &other, &back);
    dispatch_wait(&m.model, d);
    must_agree(product(in, z, n * COLS), product(x, y, sent * COLS),
               "return is not the adjoint of sending", tp, ep);
    dispatch_free(d);
    arenas_free(&arenas, m.model.be);
    module_close(&m);
    deck_free(&deck);
    double *const memory[] = { x, y, p, in, prob, z };
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
        free(memory[i]);
}

static void done(int *n, const char *name, int tp, int ep, const char *more)
{
    comm_host_barrier(world);
    if (world->rank == 0)
        printf("ok %d - %s_tp%d_ep%d%s%s\n", ++*n, name, tp, ep,
               parts == 4   ? "_parts4"
               : parts == 2 ? "_parts2"
                            : "",
               more);
    fflush(stdout);
}

/* Parts of whole experts are tried on 4 ranks at most: more show nothing new. */
static bool fits(int tp, int ep)
{
    return world->size % tp == 0 && world->size % (ep * parts) == 0 &&
           (parts == 1 || ep > 1 || world->size <= 4);
}

int main(int argc, char **argv)
{
    static const struct {
        int tp, ep, parts;
    } grid[] = { { 1, 1, 1 }, { 2, 1, 1 }, { 1, 2, 1 }, { 2, 2, 1 }, { 1, 4, 1 },
                 { 2, 4, 1 }, { 1, 8, 1 }, { 2, 8, 1 }, { 1, 1, 2 }, { 2, 1, 2 },
                 { 2, 2, 2 }, { 1, 2, 4 }, { 2, 1, 4 } };
    int planned = 0, n = 0;
    world = mpi_world(&argc, &argv);
    if (!world)
        return EXIT_ENVIRONMENT;
    for (size_t i = 0; i < sizeof grid / sizeof grid[0]; i++) {
        parts = grid[i].parts;
        if (fits(grid[i].tp, grid[i].ep))
            planned += ROUTINGS + 2 + (world->size <= RECOMPUTE_RANKS);
    }
    if (world->rank == 0)
        printf("1..%d\n", planned);
    for (size_t i = 0; i < sizeof grid / sizeof grid[0]; i++) {
        const int tp = grid[i].tp, ep = grid[i].ep;
        parts = grid[i].parts;
        if (!fits(tp, ep))
            continue;
        for (int routing = 0; routing < ROUTINGS; routing++) {
            check_grid(tp, ep, routing);
            done(&n, "m6_12_m6_19_m6_25_p12_53_54_58", tp, ep, routing_name[routing]);
        }
        check_overlap(tp, ep);
        done(&n, "p12_56_shared_expert_overlap", tp, ep, "");
        if (world->size <= RECOMPUTE_RANKS) {
            check_recompute(tp, ep);
            done(&n, "m6_39_recomputation_is_bit_identical", tp, ep, "");
        }
        if (ep * parts == 1) {
            check_sequence(tp);
            done(&n, "m6_23_p12_37_39_52_embeddings_are_cut_once", tp, ep, "");
        } else {
            check_dispatch(tp, ep);
            done(&n, "p12_52_55_rows_to_their_experts_and_back", tp, ep, "");
        }
    }
    comm_finish(world);
    return 0;
}
