/* bridge.c - rows of picture embeddings between the leaders of encoder and language lanes (bridge.h; parallel.md 3.1, 3.2).
 *
 * Lanes in order: with n_source > n_dest lanes k = n_source/n_dest sources feed one destination (fan-in), else one source feeds
 * k = n_dest/n_source destinations (fan-out). A message between a source and a destination carries the rows of whole samples: the
 * k parts of the side that talks to k peers are equal numbers of consecutive samples, with any number of rows each.
 *
 * Forward: counts first, then rows, each phase started for all peers before any is waited for. The counts of a slot are kept until
 * its gradient passes, so a fan-in gradient is cut exactly as the embeddings arrived and backward needs no counts of its own.
 * The counts travel as one-element tensors because the host plane has no point-to-point call.
 */
#include <stdlib.h>
#include <string.h>
#include "bridge.h"
#include "schedule.h"
#include "timer.h"

struct bridge {
    const struct topology *topo;
    const struct comm_ops *ops;
    struct comm *comm;               /* of the leaders */
    struct stream *stream;
    enum dtype act;
    bool source, dest;               /* which side this rank leads */
    int n_peers;
    int *peer;                       /* [n_peers] ranks inside comm, in lane order */
    int n_slots;
    int64_t *rows;                   /* [n_slots, n_peers] of the micro-batch in the slot */
    int64_t max_rows, width;
    struct tensor *received;         /* dest: [n_slots] embeddings [max_rows, H]; source: [1] gradients */
    int n_received;
    int64_t *count, *leaving;        /* [n_peers] as sent or received; of a gradient whose slot is taken over */
    double wait_seconds;
};

static int64_t max_rows_per_sample(const struct deck *deck)
{
    const struct deck_vision *v = &deck->vision;
    struct data_limits l = data_limits(deck);
    int64_t rows = l.max_patches_per_sample;

    if (!v->disable_vision_class_token) rows += l.max_tiles_per_sample * v->class_token_len;
    if (v->pixel_shuffle) rows /= 4;
    return rows < l.seq_length ? rows : l.seq_length;
}

static void find_peers(struct bridge *b)
{
    const struct bridge_map *map = &b->topo->bridge;
    int n_own = b->source ? map->n_source : map->n_dest, n_other = b->source ? map->n_dest : map->n_source;
    const int *own = b->source ? map->source_leader : map->dest_leader;
    const int *other = b->source ? map->dest_leader : map->source_leader;
    int lane = 0, first;

    while (lane < n_own && own[lane] != b->topo->rank) lane++;
    ASSERT(lane < n_own);
    b->n_peers = n_other > n_own ? n_other / n_own : 1;
    first = n_other > n_own ? lane * b->n_peers : lane / (n_own / n_other);
    b->peer = xcalloc((size_t)b->n_peers, sizeof *b->peer);
    for (int i = 0; i < b->n_peers; i++) {
        while (b->peer[i] < map->leaders.size && map->leaders.member[b->peer[i]] != other[first + i]) b->peer[i]++;
        ASSERT(b->peer[i] < map->leaders.size);
    }
}

struct bridge *bridge_init(const struct deck *deck, const struct topology *topo, const struct comm_ops *comm,
                           const struct backend_ops *be, struct stream *stream)
{
    struct bridge *b = xcalloc(1, sizeof *b);
    struct schedule s;

    b->topo = topo;
    b->ops = comm;
    b->stream = stream;
    b->act = deck->derived.fp64 ? DTYPE_F64 : deck->derived.bf16 ? DTYPE_BF16 : DTYPE_F32;
    b->comm = topo->bridge.leaders.comm;
    if (topo->layout != DECK_LAYOUT_DISJOINT || topo->bridge.leaders.rank < 0) return b;
    for (int i = 0; i < topo->bridge.n_source; i++) b->source |= topo->bridge.source_leader[i] == topo->rank;
    for (int i = 0; i < topo->bridge.n_dest; i++) b->dest |= topo->bridge.dest_leader[i] == topo->rank;
    ASSERT(b->source != b->dest);
    find_peers(b);
    schedule_build(&s, topo, (int)deck->derived.num_microbatches, false, true);
    b->n_slots = b->source ? s.encoder_slots : s.language_slots;
    schedule_free(&s);
    b->n_received = b->source ? 1 : b->n_slots;
    b->rows = xcalloc((size_t)(b->n_slots * b->n_peers), sizeof *b->rows);
    b->count = xcalloc((size_t)b->n_peers, sizeof *b->count);
    b->leaving = xcalloc((size_t)b->n_peers, sizeof *b->leaving);
    b->received = xcalloc((size_t)b->n_received, sizeof *b->received);
    b->width = deck->language.hidden_size;
    b->max_rows = max_rows_per_sample(deck) * (b->source ? deck->derived.encoder_microbatch : deck->batch.micro_batch_size);
    return b;
}

void bridge_plan(struct bridge *b, struct arenas *arenas)
{
    for (int i = 0; i < b->n_received; i++)
        b->received[i] = arena_2d(&arenas->a[ARENA_COMM], b->source ? "bridge.gradient" : "bridge.embedding", b->act, b->max_rows,
                                  b->width);
}

void bridge_free(struct bridge *b)
{
    if (!b) return;
    free(b->peer);
    free(b->rows);
    free(b->count);
    free(b->leaving);
    free(b->received);
    free(b);
}

double bridge_take_wait_seconds(struct bridge *b)
{
    double seconds = b->wait_seconds;

    b->wait_seconds = 0.0;
    return seconds;
}

static int64_t *slot_counts(const struct bridge *b, int slot)
{
    return b->rows + (int64_t)slot * b->n_peers;
}

/* Rows of each peer's part of the slot's micro-batch: equal runs of consecutive samples. Returns their sum. */
static int64_t cut_samples(struct bridge *b, int slot, const int64_t *rows_per_sample, int64_t samples)
{
    int64_t *rows = slot_counts(b, slot), each = samples / b->n_peers, sum = 0;

    ASSERT(slot >= 0 && slot < b->n_slots);
    if (each * b->n_peers != samples)
        FATAL(EXIT_INTERNAL, "bridge: %lld samples do not divide over %d lanes", (long long)samples, b->n_peers);
    for (int i = 0; i < b->n_peers; i++) {
        rows[i] = 0;
        for (int64_t j = 0; j < each; j++) rows[i] += rows_per_sample[i * each + j];
        sum += rows[i];
    }
    if (sum > b->max_rows)
        FATAL(EXIT_INTERNAL, "bridge: micro-batch of %lld embeddings, at most %lld fit", (long long)sum, (long long)b->max_rows);
    return sum;
}

static int64_t slot_rows(const struct bridge *b, int slot)
{
    int64_t sum = 0;

    ASSERT(slot >= 0 && slot < b->n_slots);
    for (int i = 0; i < b->n_peers; i++) sum += slot_counts(b, slot)[i];
    return sum;
}

/* First phase of a forward message: the source's counts, checked against what the destination expects from its own data. */
static void exchange_counts(struct bridge *b, int slot)
{
    const int64_t *rows = slot_counts(b, slot);

    b->ops->group_begin(b->comm);
    for (int i = 0; i < b->n_peers; i++) {
        struct tensor t = tensor_1d(&b->count[i], DTYPE_I64, PLACE_HOST, 1);
        if (b->source) b->count[i] = rows[i];
        (b->source ? b->ops->send : b->ops->recv)(b->comm, &t, b->peer[i], b->stream);
    }
    b->ops->group_end(b->comm, b->stream);
    b->ops->drain(b->stream);
    for (int i = 0; b->dest && i < b->n_peers; i++)
        if (b->count[i] != rows[i])
            FATAL(EXIT_INTERNAL, "bridge: encoder rank %d sends %lld picture embeddings, language rank %d expects %lld",
                  b->topo->bridge.leaders.member[b->peer[i]], (long long)b->count[i], b->topo->rank, (long long)rows[i]);
}

/* Start the messages of one tensor; part i, rows[i] rows, belongs to peer i. */
static void start_parts(struct bridge *b, const int64_t *rows, const struct tensor *t, bool send)
{
    int64_t first = 0;

    for (int i = 0; i < b->n_peers; i++) {
        struct tensor part = tensor_row_range(t, first, rows[i]);
        first += rows[i];
        if (rows[i] > 0) (send ? b->ops->send : b->ops->recv)(b->comm, &part, b->peer[i], b->stream);
    }
}

/* Send one tensor and receive another, either may be absent (NULL); all messages are started before any is waited for. */
static void exchange_rows(struct bridge *b, const struct tensor *out, const int64_t *out_rows, const struct tensor *in,
                          const int64_t *in_rows)
{
    b->ops->group_begin(b->comm);
    if (out) start_parts(b, out_rows, out, true);
    if (in) start_parts(b, in_rows, in, false);
    b->ops->group_end(b->comm, b->stream);
    b->ops->drain(b->stream);
}

static void check_rows(const struct bridge *b, int slot, const struct tensor *t)
{
    if (tensor_rows(t) != slot_rows(b, slot) || tensor_cols(t) != b->width || t->dtype != b->act)
        FATAL(EXIT_INTERNAL, "bridge: [%lld, %lld] %s to send, the data say %lld rows of %lld %s", (long long)tensor_rows(t),
              (long long)tensor_cols(t), dtype_name(t->dtype), (long long)slot_rows(b, slot), (long long)b->width,
              dtype_name(b->act));
}

/* Where the rows of a slot are received. */
static struct tensor inbox(struct bridge *b, int slot)
{
    return tensor_row_range(&b->received[b->source ? 0 : slot], 0, slot_rows(b, slot));
}

void bridge_send_forward(struct bridge *b, int slot, const struct tensor *e, const int64_t *rows_per_sample, int64_t samples)
{
    double start = timer_now();

    ASSERT(b->source);
    cut_samples(b, slot, rows_per_sample, samples);
    check_rows(b, slot, e);
    exchange_counts(b, slot);
    exchange_rows(b, e, slot_counts(b, slot), NULL, NULL);
    b->wait_seconds += timer_now() - start;
}

struct tensor bridge_recv_forward(struct bridge *b, int slot, const int64_t *rows_per_sample, int64_t samples)
{
    double start = timer_now();
    struct tensor in;

    ASSERT(b->dest);
    cut_samples(b, slot, rows_per_sample, samples);
    in = inbox(b, slot);
    exchange_counts(b, slot);
    exchange_rows(b, NULL, NULL, &in, slot_counts(b, slot));
    b->wait_seconds += timer_now() - start;
    return in;
}

void bridge_send_backward(struct bridge *b, int slot, const struct tensor *de)
{
    double start = timer_now();

    ASSERT(b->dest);
    check_rows(b, slot, de);
    exchange_rows(b, de, slot_counts(b, slot), NULL, NULL);
    b->wait_seconds += timer_now() - start;
}

struct tensor bridge_recv_backward(struct bridge *b, int slot)
{
    double start = timer_now();
    struct tensor in;

    ASSERT(b->source);
    in = inbox(b, slot);
    exchange_rows(b, NULL, NULL, &in, slot_counts(b, slot));
    b->wait_seconds += timer_now() - start;
    return in;
}

struct tensor bridge_send_forward_recv_backward(struct bridge *b, int slot, const struct tensor *e, const int64_t *rows_per_sample,
                                                int64_t samples, int backward_slot)
{
    double start = timer_now();
    struct tensor in;

    ASSERT(b->source && slot != backward_slot);
    in = inbox(b, backward_slot);
    cut_samples(b, slot, rows_per_sample, samples);
    check_rows(b, slot, e);
    exchange_counts(b, slot);
    exchange_rows(b, e, slot_counts(b, slot), &in, slot_counts(b, backward_slot));
    b->wait_seconds += timer_now() - start;
    return in;
}

struct tensor bridge_send_backward_recv_forward(struct bridge *b, int slot, const struct tensor *de, int forward_slot,
                                                const int64_t *rows_per_sample, int64_t samples)
{
    double start = timer_now();
    struct tensor in;

    ASSERT(b->dest);
    check_rows(b, slot, de);
    /* With one slot the gradient still leaves by the old counts while the new ones take their place. */
    memcpy(b->leaving, slot_counts(b, slot), (size_t)b->n_peers * sizeof *b->leaving);
    cut_samples(b, forward_slot, rows_per_sample, samples);
    in = inbox(b, forward_slot);
    exchange_counts(b, forward_slot);
    exchange_rows(b, de, b->leaving, &in, slot_counts(b, forward_slot));
    b->wait_seconds += timer_now() - start;
    return in;
}
