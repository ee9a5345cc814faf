/* eval.c - see eval.h; text of the log lines: training.md 1.8.
 *
 * For 'rotate' an encoder rank needs pictures of samples that other ranks serve. Each rank
 * therefore reads the whole global batch from a second view of the streams (host memory, freed
 * after the batch), which needs no message and cannot depend on the layout.
 */
#include "eval.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "io_hdf5.h"
#include "log.h"
#include "timer.h"

/* The pictures of one sample of the global batch. */
struct album {
    int64_t index, tiles, bytes;
    int32_t (*size)[2]; /* [tiles] */
    char *pixels;       /* [bytes] */
    /* whose pictures it gets; itself when there is no other of equal sizes */
    const struct album *next;
};

/* What the change of a batch needs: the global batch of an iteration. */
struct ablation {
    const struct deck *deck;
    struct album *album; /* [n] in the order of the stream index */
    int64_t n;
    int64_t with_pictures, without_partner;
};

void eval_init(struct eval *e, const struct deck *deck, const struct topology *topo,
               struct errors *errors)
{
    *e = (struct eval){ .deck = deck, .topo = topo, .iters = deck->eval.eval_iters };
    if (e->iters <= 0)
        return;
    data_init(&e->data, deck, DATA_VALID, errors);
    if (errors->count > 0)
        return;
    if (topo->encoder.member && deck->eval.eval_picture_ablation == DECK_ABLATION_ROTATE)
        data_init(&e->whole, deck, DATA_VALID, errors);
    e->active = true;
}

bool eval_due(const struct eval *e, int64_t iteration)
{
    int64_t interval = e->deck->eval.eval_interval;

    return e->active && interval > 0 && iteration % interval == 0;
}

int64_t eval_most(const struct eval *e, int64_t iterations, int64_t starts)
{
    int64_t interval = e->deck->eval.eval_interval, room = 8;

    /* Each start can add a first and a last one off the interval. */
    while (room < starts)
        room *= 2;
    return e->active ? 2 * room + (interval > 0 ? iterations / interval : 0) : 0;
}

void eval_free(struct eval *e)
{
    data_free(&e->data);
    data_free(&e->whole);
    memset(e, 0, sizeof *e);
}

static void rewind_streams(struct data *d)
{
    if (d->position)
        memset(d->position, 0, (size_t)d->n_streams * sizeof *d->position);
}

/* ---- ablation -------------------------------------------------------------------------------- */

static int64_t patch_bytes(const struct deck *deck)
{
    int64_t p = deck->vision.patch_dim;

    return 3 * p * p * (int64_t)(deck->derived.fp64 ? sizeof(double) : sizeof(float));
}

static int64_t sample_patches(const struct deck *deck, int32_t (*size)[2], int64_t tiles)
{
    int64_t p = deck->vision.patch_dim, sum = 0;

    for (int64_t i = 0; i < tiles; i++)
        sum += size[i][0] / p * (size[i][1] / p);
    return sum;
}

static bool equal_sizes(const struct album *a, const struct album *b)
{
    return a->tiles == b->tiles &&
           memcmp(a->size, b->size, (size_t)a->tiles * sizeof *a->size) == 0;
}

static void zero_pictures(void *ctx, struct picture_batch *batch)
{
    const struct ablation *a = ctx;

    memset(batch->pixels, 0, (size_t)(batch->patches * patch_bytes(a->deck)));
}

static void rotate_pictures(void *ctx, struct picture_batch *batch)
{
    const struct ablation *a = ctx;
    char *at = batch->pixels;
    int64_t tile = 0, found = 0;

    for (int64_t i = 0; i < batch->samples; i++) {
        int64_t bytes =
            sample_patches(a->deck, batch->tile_size + tile, batch->tiles_per_sample[i]) *
            patch_bytes(a->deck);
        while (found < a->n && a->album[found].index != batch->sample_index[i])
            found++;
        ASSERT(found < a->n && a->album[found].next->bytes == bytes);
        if (bytes > 0)
            memcpy(at, a->album[found].next->pixels, (size_t)bytes);
        at += bytes;
        tile += batch->tiles_per_sample[i];
    }
}

static void add_albums(struct ablation *a, const struct picture_batch *batch)
{
    const char *at = batch->pixels;
    int64_t tile = 0;

    for (int64_t i = 0; i < batch->samples; i++) {
        struct album *b = &a->album[a->n++];
        b->index = batch->sample_index[i];
        b->tiles = batch->tiles_per_sample[i];
        b->size = xcalloc((size_t)b->tiles, sizeof *b->size);
        if (b->tiles > 0)
            memcpy(b->size, batch->tile_size + tile, (size_t)b->tiles * sizeof *b->size);
        b->bytes = sample_patches(a->deck, b->size, b->tiles) * patch_bytes(a->deck);
        b->pixels = xmalloc((size_t)b->bytes, 1);
        if (b->bytes > 0)
            memcpy(b->pixels, at, (size_t)b->bytes);
        at += b->bytes;
        tile += b->tiles;
    }
}

static void find_partners(struct ablation *a)
{
    for (int64_t i = 0; i < a->n; i++) {
        struct album *b = &a->album[i];
        int64_t j = (i + 1) % a->n;
        while (j != i && !equal_sizes(b, &a->album[j]))
            j = (j + 1) % a->n;
        b->next = &a->album[j];
        if (b->tiles == 0)
            continue;
        a->with_pictures++;
        if (j == i)
            a->without_partner++;
    }
}

/* Read the global batch of one iteration. */
static void open_album(struct ablation *a, struct eval *e, int64_t iteration)
{
    const struct deck *deck = e->deck;
    int64_t samples = deck->batch.global_batch_size / deck->derived.num_microbatches;
    int64_t patch_dim = 3 * deck->vision.patch_dim * deck->vision.patch_dim;
    struct picture_batch batch;

    a->n = 0;
    a->album = xcalloc((size_t)deck->batch.global_batch_size, sizeof *a->album);
    picture_batch_init(&batch, &e->whole.limits, samples, patch_dim, deck->derived.fp64);
    for (int64_t m = 0; m < deck->derived.num_microbatches; m++) {
        data_pictures(&e->whole, iteration, m, 0, 1, &batch);
        add_albums(a, &batch);
    }
    picture_batch_free(&batch);
    find_partners(a);
}

static void close_album(struct ablation *a)
{
    for (int64_t i = 0; i < a->n; i++) {
        free(a->album[i].size);
        free(a->album[i].pixels);
    }
    free(a->album);
    a->album = NULL;
}

/* ---- one validation -------------------------------------------------------------------------- */

/* Why the run is asked to stop, the same on every rank, or NULL. Collective over the world. */
static const char *asked_to_stop(const struct eval *e, const struct step *step)
{
    static const char *const why[] = { [STEP_STOP_SIGNAL] = "stopped by a signal",
                                       [STEP_STOP_FILE] = "stopped by the file STOP",
                                       [STEP_STOP_TIME] = "stopped by run.exit_duration_in_mins" };
    bool request[STEP_REQUESTS] = { false };
    int64_t asked[STEP_SAVE_FILE];

    if (step->poll.poll)
        step->poll.poll(step->poll.ctx, request);
    for (int i = 0; i < STEP_SAVE_FILE; i++)
        asked[i] = request[i];
    comm_host_reduce_i64(e->topo->world, asked, STEP_SAVE_FILE, COMM_MAX);
    for (int i = 0; i < STEP_SAVE_FILE; i++)
        if (asked[i])
            return why[i];
    return NULL;
}

/* Mean loss per token over all batches; `kind` is one of DECK_ABLATION_*. *stop: see
 * asked_to_stop. */
static double pass(struct eval *e, struct step *step, int kind, const char **stop)
{
    struct ablation a = { .deck = e->deck };
    struct step_pictures change = { .ctx = &a,
                                    .change = kind == DECK_ABLATION_ROTATE ? rotate_pictures
                                                                           : zero_pictures };
    bool rotate = kind == DECK_ABLATION_ROTATE && e->topo->encoder.member;
    double sum[2] = { 0.0, 0.0 };

    rewind_streams(&e->data);
    rewind_streams(&e->whole);
    for (int64_t i = 0; i < e->iters && !(*stop = asked_to_stop(e, step)); i++) {
        if (rotate)
            open_album(&a, e, i);
        step->dump = kind == DECK_ABLATION_NONE && i < e->deck->log.dump_batches ? e->dump : NULL;
        step_forward(step, &e->data, i, kind == DECK_ABLATION_NONE ? NULL : &change, &sum[0],
                     &sum[1]);
        if (rotate)
            close_album(&a);
        if (step->dump)
            batch_dump_write(step->dump, i + 1);
        log_progress(" validation: batch %lld/%lld%s", (long long)i + 1, (long long)e->iters,
                     kind == DECK_ABLATION_NONE ? "" : ", other pictures");
    }
    if (rotate && a.without_partner > 0 && e->consumed == 0)
        log_line(
            "validation: %lld of %lld samples with pictures keep their own, no other of their batch has equal picture sizes",
            (long long)a.without_partner, (long long)a.with_pictures);
    comm_host_reduce_f64(e->topo->world, sum, 2, COMM_SUM);
    return sum[1] > 0.0 ? sum[0] / sum[1] : NAN;
}

static void print_result(const char *prefix, const char *what, double loss)
{
    char text[512], dashes[514], value[2][32] = { "nan", "nan" };
    int n;

    if (!isnan(loss)) {
        snprintf(value[0], sizeof value[0], "%.6E", loss);
        snprintf(value[1], sizeof value[1], "%.6E", exp(fmin(20.0, loss)));
    }
    n = snprintf(text, sizeof text,
                 " validation loss at %s%s | lm loss value: %s | lm loss PPL: %s | ", prefix, what,
                 value[0], value[1]);

    if (n > (int)sizeof text - 1)
        n = (int)sizeof text - 1;
    memset(dashes, '-', (size_t)n + 1);
    dashes[n + 1] = '\0';
    log_line("%s", dashes);
    log_line("%s", text);
    log_line("%s", dashes);
}

struct eval_result eval_run(struct eval *e, struct step *step, const char *prefix)
{
    struct eval_result r = { .lm_loss_ablated = NAN };
    int kind = e->deck->eval.eval_picture_ablation;

    timer_start(TIMER_EVAL);
    r.lm_loss = pass(e, step, DECK_ABLATION_NONE, &r.stop);
    if (!r.stop)
        print_result(prefix, "", r.lm_loss);
    if (!r.stop && kind != DECK_ABLATION_NONE && e->topo->encoder.present) {
        r.lm_loss_ablated = pass(e, step, kind, &r.stop);
        if (!r.stop)
            print_result(prefix,
                         kind == DECK_ABLATION_ROTATE ? " with rotated pictures"
                                                      : " with zeroed pictures",
                         r.lm_loss_ablated);
    }
    if (!r.stop)
        e->consumed += e->iters * e->deck->batch.global_batch_size;
    timer_stop(TIMER_EVAL);
    return r;
}
