/* step.c - see step.h. The functions named run_* are the action table; each does one action of the
 * schedule for this rank.
 *
 * A batch buffer belongs to a slot: the encoder's pictures and the language module's text live
 * until their micro-batch has passed backward. Text is read before its embeddings are received,
 * because the bridge checks their row counts against it.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include "ddp.h"
#include "model_flops.h"
#include "step.h"
#include "timer.h"

/* What the world adds up before the update; and after it: the balancing metric, then the expert
 * counts. */
enum {
    SUM_TOKENS,
    SUM_REAL_TOKENS,
    SUM_LENGTH2,
    SUM_IMAGES,
    SUM_PATCHES,
    SUM_ROWS,
    SUM_ENCODER_FLOPS,
    SUM_PARTICIPANTS,
    SUM_REQUESTS,
    SUMS = SUM_REQUESTS + STEP_REQUESTS
};
enum { LATE_BALANCE, LATE_EXPERTS };

/* A timer section of training; an evaluation books all of its time as its own. */
static void enter(const struct step *s, enum timer_section section)
{
    if (s->training)
        timer_start(section);
}

static void leave(const struct step *s, enum timer_section section)
{
    if (s->training)
        timer_stop(section);
}

/* ---- set-up ---------------------------------------------------------------------------------- */

static void add_sender(struct step *s, struct comm *c)
{
    if (!c)
        return;
    s->sender = xrealloc(s->sender, (size_t)s->n_senders + 1,
                         sizeof *s->sender); /* NOLINT(bugprone-sizeof-expression): pointers */
    s->sender[s->n_senders++] = c;
}

static void find_senders(struct step *s)
{
    const struct grid *grid[2] = { &s->topo->encoder, &s->topo->language };

    add_sender(s, s->topo->world);
    for (int i = 0; i < 2; i++) {
        if (!grid[i]->member)
            continue;
#define X(name_, ...) add_sender(s, grid[i]->name_.comm);
        TOPOLOGY_FAMILIES(X)
#undef X
    }
    if (s->bridge) {
        add_sender(s, s->topo->bridge.leaders.comm);
        add_sender(s, s->topo->bridge.source_lane.comm);
        add_sender(s, s->topo->bridge.dest_lane.comm);
    }
}

static int64_t expert_layers(const struct deck *deck)
{
    int64_t n = 0;

    for (const char *c = deck->derived.pattern; *c; c++)
        n += *c == 'E';
    return n;
}

static int64_t expert_counts(const struct step *s)
{
    return s->n_moe * s->deck->moe.num_experts;
}

static bool encoder_trains(const struct deck *deck)
{
    return !deck->derived.freeze_encoder || !deck->derived.freeze_projector;
}

void step_init(struct step *s, const struct deck *deck, const struct topology *topo,
               struct model *model, struct optim *optim, const struct backend_ops *be,
               const struct comm_ops *comm, struct stream *stream)
{
    struct data_limits limits = data_limits(deck);
    int nmb = (int)deck->derived.num_microbatches;
    int64_t patch_dim = 3 * deck->vision.patch_dim * deck->vision.patch_dim;

    *s = (struct step){ .deck = deck,
                        .topo = topo,
                        .model = model,
                        .optim = optim,
                        .be = be,
                        .comm = comm,
                        .stream = stream };
    schedule_build(&s->train, topo, nmb, false, encoder_trains(deck));
    schedule_build(&s->forward, topo, nmb, true, false);
    if (topo->encoder.member)
        s->n_pictures = s->train.encoder_slots > 0 ? s->train.encoder_slots : 1;
    if (topo->language.member)
        s->n_text = s->train.language_slots > 0 ? s->train.language_slots : 1;
    ASSERT(s->forward.encoder_slots <= s->n_pictures && s->forward.language_slots <= s->n_text);
    if (topo->encoder.present)
        s->bridge = bridge_init(deck, topo, comm, be, stream);
    s->pictures = xcalloc((size_t)s->n_pictures, sizeof *s->pictures);
    s->embedding = xcalloc((size_t)s->n_pictures, sizeof *s->embedding);
    for (int i = 0; i < s->n_pictures; i++)
        picture_batch_init(&s->pictures[i], &limits, deck->derived.encoder_microbatch, patch_dim,
                           deck->derived.fp64);
    s->text = xcalloc((size_t)s->n_text, sizeof *s->text);
    s->text_loaded = xcalloc((size_t)s->n_text, sizeof *s->text_loaded);
    for (int i = 0; i < s->n_text; i++)
        text_batch_init(&s->text[i], &limits, deck->batch.micro_batch_size);
    s->n_moe = expert_layers(deck);
    s->sum = xcalloc(SUMS, sizeof *s->sum);
    s->pending.sum = xcalloc(SUMS, sizeof *s->pending.sum);
    be->event_create(&s->done);
    s->late = xcalloc((size_t)(LATE_EXPERTS + expert_counts(s)), sizeof *s->late);
    s->expert_count = xcalloc((size_t)expert_counts(s), sizeof *s->expert_count);
    find_senders(s);
}

void step_plan(struct step *s, struct arenas *arenas)
{
    if (s->bridge)
        bridge_plan(s->bridge, arenas);
    s->host_balance = arena_1d(&arenas->a[ARENA_DATA], "step.balance", s->model->acc, 1);
    s->host_count = arena_2d(&arenas->a[ARENA_DATA], "step.expert_counts", DTYPE_I64,
                             expert_layers(s->deck), s->deck->moe.num_experts);
}

void step_free(struct step *s)
{
    for (int i = 0; i < s->n_pictures; i++)
        picture_batch_free(&s->pictures[i]);
    for (int i = 0; i < s->n_text; i++)
        text_batch_free(&s->text[i]);
    free(s->pictures);
    free(s->embedding);
    free(s->text);
    free(s->text_loaded);
    free(s->sum);
    free(s->pending.sum);
    free(s->late);
    free(s->expert_count);
    s->be->event_destroy(&s->done);
    free(s->sender);
    bridge_free(s->bridge);
    schedule_free(&s->train);
    schedule_free(&s->forward);
    memset(s, 0, sizeof *s);
}

/* ---- batches --------------------------------------------------------------------------------- */

static void load_pictures(struct step *s, int m, int slot)
{
    const struct grid *g = &s->topo->encoder;
    struct picture_batch *b = &s->pictures[slot];

    enter(s, TIMER_DATA_WAIT);
    data_pictures(s->data, s->iteration, m, g->dp_rank, g->dp_size, b);
    if (s->change)
        s->change->change(s->change->ctx, b);
    if (s->dump)
        batch_dump_add(s->dump, m, NULL, b);
    leave(s, TIMER_DATA_WAIT);
    if (b->rows > 0)
        s->picture_seen = true;
    if (g->tp_rank != 0 || g->cp_rank != 0 || g->pp_rank != 0)
        return;
    s->sum[SUM_IMAGES] += (double)b->tiles;
    s->sum[SUM_PATCHES] += (double)b->patches;
    s->sum[SUM_ROWS] += (double)b->rows;
    for (int64_t i = 0; i < b->tiles; i++) {
        int64_t p = s->deck->vision.patch_dim,
                patches = b->tile_size[i][0] / p * (b->tile_size[i][1] / p);
        s->sum[SUM_ENCODER_FLOPS] += model_flops_encoder_tile(s->deck, (double)patches);
    }
}

/* Only one rank of a lane counts its tokens: the one whose module computes the loss. */
static bool counts_tokens(const struct step *s)
{
    const struct grid *g = &s->topo->language;

    return g->member && g->tp_rank == 0 && g->cp_rank == 0 && g->pp_rank == g->pp_size - 1;
}

/* Of a packed sequence its members count, not its padding. */
static void count_lengths(struct step *s, const struct text_batch *b)
{
    const double length = (double)b->seq_length;
    int64_t begin = 0;

    s->sum[SUM_TOKENS] += (double)b->loss_tokens;
    if (b->n_segments == 0) {
        s->sum[SUM_REAL_TOKENS] += (double)b->samples * length;
        s->sum[SUM_LENGTH2] += (double)b->samples * length * length;
        return;
    }
    s->sum[SUM_REAL_TOKENS] += (double)b->real_tokens;
    for (int64_t i = 0; i < b->n_segments && begin < b->real_tokens; begin = b->segment_end[i++])
        s->sum[SUM_LENGTH2] += pow((double)(b->segment_end[i] - begin), 2.0);
}

static struct text_batch *load_text(struct step *s, int m)
{
    const struct grid *g = &s->topo->language;
    int slot = m % s->n_text;
    struct text_batch *b = &s->text[slot];

    if (s->text_loaded[slot] == m)
        return b;
    enter(s, TIMER_DATA_WAIT);
    data_text(s->data, s->iteration, m, g->dp_rank, g->dp_size, b);
    s->text_loaded[slot] = m;
    if (s->dump)
        batch_dump_add(s->dump, m, b, NULL);
    if (counts_tokens(s))
        count_lengths(s, b);
    leave(s, TIMER_DATA_WAIT);
    return b;
}

/* ---- actions --------------------------------------------------------------------------------- */

static void run_encoder_forward(void *ctx, const struct action *a)
{
    struct step *s = ctx;

    load_pictures(s, a->microbatch, a->slot);
    enter(s, TIMER_BRIDGE_WAIT);
    bridge_embedding_free(s->bridge, a->slot);
    leave(s, TIMER_BRIDGE_WAIT);
    enter(s, TIMER_FORWARD);
    s->embedding[a->slot] =
        model_encoder_forward(s->model, a->slot, &s->pictures[a->slot], s->training);
    leave(s, TIMER_FORWARD);
}

/* Only the last backward's gradients are final: nothing is reduced before. */
static void announce_last(struct step *s, const struct action *a, bool language)
{
    if (a->microbatch == s->train.n_microbatches - 1)
        ddp_last_backward(s->model->ddp, language);
}

static void run_encoder_backward(void *ctx, const struct action *a)
{
    struct step *s = ctx;

    enter(s, TIMER_BACKWARD);
    announce_last(s, a, DDP_ENCODER);
    if (s->pictures[a->slot].rows > 0)
        model_encoder_backward(s->model, a->slot, &s->dembedding);
    else
        ddp_ready(s->model->ddp, DDP_ENCODER, 0);
    leave(s, TIMER_BACKWARD);
}

/* The experts that this rank's rows of micro-batch m went to, for batches.h5. */
static void dump_choice(struct step *s, int64_t m)
{
    const struct grid *g = &s->topo->language;
    const int64_t k = s->deck->moe.moe_router_topk;
    const int64_t rows =
        s->deck->batch.micro_batch_size * s->deck->language.seq_length / g->tp_size;
    int32_t *one = xcalloc((size_t)(rows * k), sizeof *one),
            *all = xcalloc((size_t)(rows * k * s->n_moe) + 1, sizeof *all);

    for (int l = 0; l < s->n_moe; l++) {
        const struct tensor choice = model_last_choice(s->model, l),
                            host = tensor_2d(one, DTYPE_I32, PLACE_HOST, rows, k);
        s->be->copy(s->stream, &choice, &host);
        s->be->stream_sync(s->stream);
        for (int64_t r = 0; r < rows; r++)
            memcpy(all + (r * s->n_moe + l) * k, one + r * k, (size_t)k * sizeof *all);
    }
    batch_dump_choice(s->dump, m, g->tp_rank * rows, rows, all);
    free(one);
    free(all);
}

/* Loss and log-sum-exp of every token of micro-batch m, for batches.h5; no label, no loss. */
static void dump_loss(struct step *s, int64_t m, const int64_t *labels)
{
    const struct tensor loss = model_token_loss(s->model);
    const int64_t n = tensor_numel(&loss);
    double *wide = xcalloc((size_t)n, sizeof *wide), *lse = xcalloc((size_t)n, sizeof *lse);
    const struct tensor host = tensor_1d(wide, DTYPE_F64, PLACE_HOST, n);

    s->be->cast(s->stream, &loss, &host);
    s->be->stream_sync(s->stream);
    model_token_lse(s->model, lse);
    for (int64_t i = 0; i < n; i++)
        if (labels[i] < 0)
            wide[i] = 0.0;
    batch_dump_loss(s->dump, m, wide, lse);
    free(wide);
    free(lse);
}

/* This rank's words of the logits of micro-batch m, for batches.h5. */
static void dump_logits(struct step *s, int64_t m)
{
    const struct grid *g = &s->topo->language;
    const struct tensor logits = model_logits(s->model);
    const int64_t rows = tensor_rows(&logits), words = tensor_cols(&logits);
    const enum dtype dtype = s->deck->derived.fp64 ? DTYPE_F64 : DTYPE_F32;
    void *wide = xmalloc((size_t)(rows * words), dtype_bytes(dtype));
    const struct tensor host = tensor_2d(wide, dtype, PLACE_HOST, rows, words);

    s->be->cast(s->stream, &logits, &host);
    s->be->stream_sync(s->stream);
    batch_dump_logits(s->dump, m, g->tp_rank * words, words, wide);
    free(wide);
}

static void run_language_forward(void *ctx, const struct action *a)
{
    struct step *s = ctx;
    const struct text_batch *text = load_text(s, a->microbatch);

    enter(s, TIMER_FORWARD);
    if (!s->topo->encoder.present)
        s->image = tensor_2d(NULL, s->model->act, PLACE_DEVICE, 0, s->deck->language.hidden_size);
    model_language_forward(s->model, a->slot, text, &s->image, s->training);
    leave(s, TIMER_FORWARD);
    if (s->dump && s->n_moe > 0)
        dump_choice(s, a->microbatch);
    if (s->dump && s->topo->language.tp_rank == 0 && s->topo->language.cp_rank == 0)
        dump_loss(s, a->microbatch, text->labels);
    if (s->dump && s->deck->log.dump_logits && s->topo->language.cp_rank == 0)
        dump_logits(s, a->microbatch);
}

static void run_language_backward(void *ctx, const struct action *a)
{
    struct step *s = ctx;

    if (s->bridge) {
        enter(s, TIMER_BRIDGE_WAIT);
        bridge_gradient_free(s->bridge);
        leave(s, TIMER_BRIDGE_WAIT);
    }
    enter(s, TIMER_BACKWARD);
    announce_last(s, a, DDP_LANGUAGE);
    s->dimage = model_language_backward(s->model, a->slot,
                                        s->topo->encoder.present && encoder_trains(s->deck));
    leave(s, TIMER_BACKWARD);
}

static void run_send_forward(void *ctx, const struct action *a)
{
    struct step *s = ctx;
    const struct picture_batch *b = &s->pictures[a->slot];

    enter(s, TIMER_BRIDGE_WAIT);
    bridge_send_forward(s->bridge, a->slot, &s->embedding[a->slot], b->rows_per_sample, b->samples);
    leave(s, TIMER_BRIDGE_WAIT);
}

static void run_recv_forward(void *ctx, const struct action *a)
{
    struct step *s = ctx;
    const struct text_batch *b = load_text(s, a->microbatch);

    enter(s, TIMER_BRIDGE_WAIT);
    s->image = bridge_recv_forward(s->bridge, a->slot, b->image_rows_per_sample, b->samples);
    leave(s, TIMER_BRIDGE_WAIT);
}

static void run_send_backward(void *ctx, const struct action *a)
{
    struct step *s = ctx;

    enter(s, TIMER_BRIDGE_WAIT);
    bridge_send_backward(s->bridge, a->slot, &s->dimage);
    leave(s, TIMER_BRIDGE_WAIT);
}

static void run_recv_backward(void *ctx, const struct action *a)
{
    struct step *s = ctx;

    enter(s, TIMER_BRIDGE_WAIT);
    s->dembedding = bridge_recv_backward(s->bridge, a->slot);
    leave(s, TIMER_BRIDGE_WAIT);
}

static void run_send_forward_recv_backward(void *ctx, const struct action *a)
{
    struct step *s = ctx;
    const struct picture_batch *b = &s->pictures[a->slot];

    enter(s, TIMER_BRIDGE_WAIT);
    s->dembedding = bridge_send_forward_recv_backward(s->bridge, a->slot, &s->embedding[a->slot],
                                                      b->rows_per_sample, b->samples,
                                                      a->partner % s->n_pictures);
    leave(s, TIMER_BRIDGE_WAIT);
}

static void run_send_backward_recv_forward(void *ctx, const struct action *a)
{
    struct step *s = ctx;
    const struct text_batch *b = load_text(s, a->partner);

    enter(s, TIMER_BRIDGE_WAIT);
    s->image =
        bridge_send_backward_recv_forward(s->bridge, a->slot, &s->dimage, a->partner % s->n_text,
                                          b->image_rows_per_sample, b->samples);
    leave(s, TIMER_BRIDGE_WAIT);
}

static void run_local_forward(void *ctx, const struct action *a)
{
    struct step *s = ctx;
    const struct picture_batch *p = &s->pictures[a->slot];
    const struct text_batch *b = load_text(s, a->microbatch);

    enter(s, TIMER_BRIDGE_WAIT);
    s->image = bridge_local_forward(s->bridge, &s->embedding[a->slot], p->rows_per_sample,
                                    p->samples, b->image_rows_per_sample, b->samples);
    leave(s, TIMER_BRIDGE_WAIT);
}

static void run_local_backward(void *ctx, const struct action *a)
{
    struct step *s = ctx;

    enter(s, TIMER_BRIDGE_WAIT);
    s->dembedding = bridge_local_backward(s->bridge, &s->dimage);
    leave(s, TIMER_BRIDGE_WAIT);
}

static void run_grad_sync(void *ctx, const struct action *a)
{
    struct step *s = ctx;

    enter(s, TIMER_GRAD_SYNC);
    optim_grad_sync(s->optim, a->module == SCHEDULE_LANGUAGE);
    leave(s, TIMER_GRAD_SYNC);
}

static void run_schedule(struct step *s, const struct schedule *list)
{
    const struct schedule_calls calls = {
        .ctx = s,
        .call = { [SCHEDULE_ENCODER_FORWARD] = run_encoder_forward,
                  [SCHEDULE_ENCODER_BACKWARD] = run_encoder_backward,
                  [SCHEDULE_LANGUAGE_FORWARD] = run_language_forward,
                  [SCHEDULE_LANGUAGE_BACKWARD] = run_language_backward,
                  [SCHEDULE_SEND_FORWARD] = run_send_forward,
                  [SCHEDULE_RECV_FORWARD] = run_recv_forward,
                  [SCHEDULE_SEND_BACKWARD] = run_send_backward,
                  [SCHEDULE_RECV_BACKWARD] = run_recv_backward,
                  [SCHEDULE_SEND_FORWARD_RECV_BACKWARD] = run_send_forward_recv_backward,
                  [SCHEDULE_SEND_BACKWARD_RECV_FORWARD] = run_send_backward_recv_forward,
                  [SCHEDULE_LOCAL_FORWARD] = run_local_forward,
                  [SCHEDULE_LOCAL_BACKWARD] = run_local_backward,
                  [SCHEDULE_GRAD_SYNC] = run_grad_sync }
    };

    s->picture_seen = false;
    for (int i = 0; i < s->n_text; i++)
        s->text_loaded[i] = -1;
    for (int i = 0; i < SUMS; i++)
        s->sum[i] = 0.0;
    model_zero_accumulators(s->model);
    schedule_run(list, &calls);
}

/* ---- the sums of an iteration ---------------------------------------------------------------- */

/* A device scalar of the accumulator type on the host; waits for the stream. */
static double read_scalar(struct step *s, struct tensor t)
{
    float f32 = 0.0f;
    double f64 = 0.0;
    struct tensor host =
        tensor_1d(t.dtype == DTYPE_F64 ? (void *)&f64 : (void *)&f32, t.dtype, PLACE_HOST, 1);

    s->be->copy(s->stream, &t, &host);
    s->be->stream_sync(s->stream);
    return t.dtype == DTYPE_F64 ? f64 : (double)f32;
}

/* What the host knows: after it every rank has the global batch's sums. */
static void add_up(struct step *s, bool *request)
{
    for (int i = 0; i < STEP_REQUESTS; i++)
        request[i] = false;
    if (s->poll.poll)
        s->poll.poll(s->poll.ctx, request);
    s->sum[SUM_PARTICIPANTS] = s->picture_seen ? 1.0 : 0.0;
    for (int i = 0; i < STEP_REQUESTS; i++)
        s->sum[SUM_REQUESTS + i] = request[i] ? 1.0 : 0.0;
    comm_host_reduce_f64(s->topo->world, s->sum, SUMS, COMM_SUM);
    for (int i = 0; i < STEP_REQUESTS; i++)
        request[i] = s->sum[SUM_REQUESTS + i] > 0.0;
}

/* The numbers of the micro-batches start for the host, before the update resets them. */
static void fetch_numbers(struct step *s)
{
    if (!s->topo->language.member)
        return;
    for (int i = 0; i < s->model->n_moe; i++) {
        const struct tensor count = model_tokens_per_expert(s->model, i),
                            host = tensor_row_range(&s->host_count, i, 1);
        s->be->copy(s->stream, &count, &host);
    }
    const struct tensor metric = model_balance_metric(s->model);
    if (s->model->n_moe > 0)
        s->be->copy(s->stream, &metric, &s->host_balance);
}

/* Each tensor-parallel rank routes its own rows: parts of the metric and of the counts. */
static void add_up_late(struct step *s)
{
    const int64_t n = expert_counts(s), *count = s->host_count.data;
    const void *balance = s->host_balance.data;

    for (int64_t i = 0; i < LATE_EXPERTS + n; i++)
        s->late[i] = 0.0;
    if (s->topo->language.member && n > 0) {
        s->late[LATE_BALANCE] =
            s->model->acc == DTYPE_F64 ? *(const double *)balance : (double)*(const float *)balance;
        for (int64_t i = 0; i < n; i++)
            s->late[LATE_EXPERTS + i] = (double)count[i];
    }
    comm_host_reduce_f64(s->topo->world, s->late, (int)(LATE_EXPERTS + n), COMM_SUM);
    for (int64_t i = 0; i < n; i++)
        s->expert_count[i] = (int64_t)s->late[LATE_EXPERTS + i];
}

/* parallel.md 6.7: D/k when k of the D encoder replicas saw a picture in the iteration. */
static double participation(const struct step *s)
{
    double all = (double)s->topo->encoder.size, seen = s->sum[SUM_PARTICIPANTS];

    if (!s->deck->optimizer.correct_encoder_grad_for_partial_participation ||
        !s->topo->encoder.present)
        return 1.0;
    return optim_participation(all, seen);
}

int64_t step_device_peak(struct step *s)
{
    size_t available, total;

    s->be->memory(&available, &total);
    if (total == SIZE_MAX)
        return -1;
    if ((int64_t)(total - available) > s->device_peak)
        s->device_peak = (int64_t)(total - available);
    return s->device_peak;
}

static void fill_row(struct step *s, const struct optim_result *o, struct trace_row *row)
{
    int64_t lanes = s->topo->language.dp_size;
    static const int section[TRACE_SECTIONS] = {
        [TRACE_FORWARD] = TIMER_FORWARD,         [TRACE_BACKWARD] = TIMER_BACKWARD,
        [TRACE_BRIDGE_WAIT] = TIMER_BRIDGE_WAIT, [TRACE_GRAD_SYNC] = TIMER_GRAD_SYNC,
        [TRACE_OPTIMIZER] = TIMER_OPTIMIZER,     [TRACE_DATA_WAIT] = TIMER_DATA_WAIT,
        [TRACE_AGREEMENT] = TIMER_AGREEMENT
    };
    double seconds[TIMER_ROWS];
    struct rusage usage;

    const struct step_pending *p = &s->pending;

    *row = (struct trace_row){ .learning_rate = p->lr, .weight_decay = p->weight_decay };
    row->iteration = p->iteration + 1;
    row->num_tokens = (int64_t)p->sum[SUM_TOKENS];
    row->images = (int64_t)p->sum[SUM_IMAGES];
    row->patches = (int64_t)p->sum[SUM_PATCHES];
    row->lm_loss = o->loss;
    row->grad_norm = o->grad_norm;
    row->num_zeros = o->num_zeros;
    row->params_norm = o->params_norm;
    row->skipped = (int8_t)!o->applied;
    row->seq_load_balancing_loss =
        s->n_moe > 0
            ? s->late[LATE_BALANCE] / (double)(lanes * s->deck->derived.num_microbatches * s->n_moe)
            : 0.0;
    row->tokens_per_expert = s->topo->rank == 0 && s->n_moe > 0 ? s->expert_count : NULL;
    row->iteration_seconds =
        timer_take_iteration(seconds) - seconds[TIMER_SAVE] - seconds[TIMER_EVAL];
    for (int i = 0; i < TRACE_SECTIONS; i++)
        row->section_seconds[i] = (float)seconds[section[i]];
    row->gemm_flops = p->gemm_flops;
    row->sent_bytes = p->sent_bytes;
    getrusage(RUSAGE_SELF, &usage);
    row->peak_bytes = (int64_t)usage.ru_maxrss * 1024;
    row->device_peak_bytes = step_device_peak(s);
}

/* The row's rates, from its own iteration_seconds. */
static void fill_rates(const struct step *s, struct trace_row *row)
{
    const struct deck *deck = s->deck;
    double seconds = row->iteration_seconds > 0.0 ? row->iteration_seconds : 1e-9;
    double tokens = s->pending.sum[SUM_REAL_TOKENS], sum_len2 = s->pending.sum[SUM_LENGTH2];
    double language = model_flops_language_exact(deck, tokens, sum_len2) *
                      (deck->derived.freeze_language ? 2.0 : 3.0);
    double encoder = s->pending.sum[SUM_ENCODER_FLOPS] * (deck->derived.freeze_encoder ? 1.0 : 3.0);
    double projector = s->pending.sum[SUM_ROWS] * model_flops_projector_row(deck) *
                       (deck->derived.freeze_encoder ? 2.0 : 3.0);

    row->tokens_per_second = tokens / seconds;
    row->tflops_per_gpu = 3.0 * model_flops_language_megatron(deck, tokens, sum_len2) /
                          (seconds * 1e12 * (double)s->topo->language.size);
    row->language_tflops_per_gpu = language / (seconds * 1e12 * (double)s->topo->language.size);
    row->model_tflops_per_gpu =
        (language + encoder + projector) / (seconds * 1e12 * (double)s->topo->size);
}

void step_begin(struct step *s, struct data *data, int64_t iteration, bool *request)
{
    s->data = data;
    s->change = NULL;
    s->iteration = iteration;
    s->training = true;
    timer_start(TIMER_OPTIMIZER);
    model_begin_grads(s->model);
    timer_stop(TIMER_OPTIMIZER);
    run_schedule(s, &s->train);
    timer_start(TIMER_GRAD_SYNC);
    timer_part(TIMER_AGREEMENT);
    add_up(s, request);
    timer_part(TIMER_NO_PART);
    timer_stop(TIMER_GRAD_SYNC);
}

void step_update(struct step *s, double lr, double weight_decay)
{
    struct step_pending *p = &s->pending;
    const struct tensor loss = counts_tokens(s) ? model_loss_sum(s->model) : (struct tensor){ 0 };

    timer_start(TIMER_OPTIMIZER);
    memcpy(p->sum, s->sum, SUMS * sizeof *p->sum);
    p->iteration = s->iteration;
    p->lr = lr;
    p->weight_decay = weight_decay;
    fetch_numbers(s);
    optim_expert_bias(s->optim);
    optim_begin(s->optim, counts_tokens(s) ? &loss : NULL, s->sum[SUM_TOKENS], participation(s), lr,
                weight_decay);
    p->gemm_flops = model_take_gemm_flops(s->model);
    p->sent_bytes = 0;
    for (int i = 0; i < s->n_senders; i++)
        p->sent_bytes += comm_take_sent_bytes(s->sender[i]);
    timer_stop(TIMER_OPTIMIZER);
    p->mark = timer_mark();
    s->be->event_record(&s->done, s->stream);
}

struct step_result step_finish(struct step *s, struct trace_row *row)
{
    struct optim_result o;

    timer_start(TIMER_GRAD_SYNC);
    s->be->event_sync(&s->done);
    timer_collect(s->pending.mark);
    o = optim_finish(s->optim);
    add_up_late(s);
    timer_stop(TIMER_GRAD_SYNC);
    s->real_tokens += s->pending.sum[SUM_REAL_TOKENS];
    s->positions += (double)(s->deck->batch.global_batch_size * s->deck->language.seq_length);
    fill_row(s, &o, row);
    fill_rates(s, row);
    return (struct step_result){ .applied = o.applied, .finite = o.finite };
}

void step_forward(struct step *s, struct data *data, int64_t iteration,
                  const struct step_pictures *change, double *loss_sum, double *tokens)
{
    s->data = data;
    s->change = change;
    s->iteration = iteration;
    s->training = false;
    run_schedule(s, &s->forward);
    if (counts_tokens(s)) {
        *loss_sum += read_scalar(s, model_loss_sum(s->model));
        *tokens += s->sum[SUM_TOKENS];
    }
    model_zero_accumulators(s->model);
}
