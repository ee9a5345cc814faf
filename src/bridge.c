/* bridge.c - rows of picture embeddings between encoder and language lanes (bridge.h; parallel.md
 * 3.1, 3.2, 3.7).
 *
 * Lanes in order: with n_source > n_dest lanes k = n_source/n_dest sources feed one destination
 * (fan-in), else one source feeds k = n_dest/n_source destinations (fan-out). A part carries the
 * rows of whole samples: the k parts of the side that talks to k lanes are equal numbers of
 * consecutive samples, with any number of rows each.
 *
 * Forward: counts first, then rows, each phase started for all peers before any is waited for. The
 * counts of a slot are kept until its gradient passes, so a fan-in gradient is cut exactly as the
 * embeddings arrived and backward needs no counts of its own. Inside an encoder lane each part of a
 * gradient is broadcast by its holder.
 *
 * Messages have a stream of their own: it goes on after what the compute stream holds when a call
 * is made, and the compute stream waits for what was received. What is sent may be overwritten only
 * behind bridge_embedding_free and bridge_gradient_free, so that a rank computes while its peer is
 * not ready yet.
 */
#include <stdlib.h>
#include <string.h>
#include "bridge.h"
#include "schedule.h"

enum { NOBODY = -1, SELF = -2 };

/* This rank's lane on one side. */
struct end {
    bool here; /* this rank is in the side's boundary stage */
    int n;     /* parts of a micro-batch */
    /* [n] with whom this rank exchanges the part: rank inside comm, SELF, or NOBODY */
    int *peer;
    int n_slots;
    int64_t *rows; /* [n_slots, n] of the micro-batch in the slot */
    int64_t max_rows;
    int n_received;
    /* dest: [n_slots] embeddings [max_rows, H]; source: [1] gradients; none where nothing
     * arrives */
    struct tensor *received;
};

struct bridge {
    const struct topology *topo;
    const struct comm_ops *ops;
    const struct backend_ops *be;
    struct comm *comm;            /* of the leaders */
    struct stream *compute, own;  /* messages travel on `own` */
    struct event event;           /* between the two */
    struct event *embedding_sent; /* [source.n_slots] */
    struct event gradient_sent;
    enum dtype act;
    int64_t width;
    struct end source, dest;
    /* [source.n] rank inside the encoder lane that sends the part */
    int *holder;
    bool leads;       /* this rank receives for its language lane */
    int *call_peer;   /* [source.n + dest.n] of a count message */
    int64_t *count;   /* [source.n + dest.n] */
    int64_t *leaving; /* [dest.n] rows of a gradient whose slot is taken over */
};

static int64_t max_rows_per_sample(const struct deck *deck)
{
    const struct deck_vision *v = &deck->vision;
    struct data_limits l = data_limits(deck);
    int64_t rows = l.max_patches_per_sample;

    if (!v->disable_vision_class_token)
        rows += l.max_tiles_per_sample * v->class_token_len;
    if (v->pixel_shuffle)
        rows /= 4;
    return rows < l.seq_length ? rows : l.seq_length;
}

/* ---- who holds what -------------------------------------------------------------------------- */

/* World rank that sends the rows of encoder lane `source` for language lane `dest`. */
static int holder_of(const struct topology *t, int source, int dest)
{
    const int receiver = t->bridge.dest_leader[dest];

    if (t->layout == DECK_LAYOUT_COLOCATED &&
        (receiver - t->encoder.offset) / t->encoder.tp_size == source)
        return receiver;
    return t->bridge.source_leader[source];
}

static int rank_of_leader(const struct bridge_map *map, int world_rank)
{
    int i = 0;

    while (i < map->leaders.size && map->leaders.member[i] != world_rank)
        i++;
    ASSERT(i < map->leaders.size);
    return i;
}

/* Lanes of the other side that share samples with `lane`: *n from the returned first one on. */
static int lanes_of(int lane, int own, int other, int *n)
{
    *n = other > own ? other / own : 1;
    return other > own ? lane * *n : lane / (own / other);
}

static void init_end(struct end *e, int n, int n_slots, int64_t max_rows)
{
    e->here = true;
    e->n = n;
    e->n_slots = n_slots;
    e->max_rows = max_rows;
    e->peer = xcalloc((size_t)n, sizeof *e->peer);
    e->rows = xcalloc((size_t)n_slots * (size_t)n, sizeof *e->rows);
}

static void find_source(struct bridge *b, int n_slots, int64_t max_rows)
{
    const struct topology *t = b->topo;
    const struct bridge_map *map = &t->bridge;
    int n, first = lanes_of(t->encoder.dp_rank, map->n_source, map->n_dest, &n);

    init_end(&b->source, n, n_slots, max_rows);
    b->holder = xcalloc((size_t)n, sizeof *b->holder);
    for (int i = 0; i < n; i++) {
        const int holder = holder_of(t, t->encoder.dp_rank, first + i),
                  receiver = map->dest_leader[first + i];
        b->holder[i] = holder - map->source_lane.member[0];
        b->source.peer[i] = holder != t->rank     ? NOBODY
                            : receiver == t->rank ? SELF
                                                  : rank_of_leader(map, receiver);
    }
}

static void find_dest(struct bridge *b, int n_slots, int64_t max_rows)
{
    const struct topology *t = b->topo;
    const struct bridge_map *map = &t->bridge;
    int n, first = lanes_of(t->language.dp_rank, map->n_dest, map->n_source, &n);

    init_end(&b->dest, n, n_slots, max_rows);
    b->leads = map->dest_leader[t->language.dp_rank] == t->rank;
    for (int i = 0; i < n; i++) {
        const int holder = holder_of(t, first + i, t->language.dp_rank);
        b->dest.peer[i] = !b->leads           ? NOBODY
                          : holder == t->rank ? SELF
                                              : rank_of_leader(map, holder);
    }
}

/* Is a part of this side the whole micro-batch of a lane whose only reader is this rank itself: a
 * view, no buffer. */
static bool hands_over(const struct end *e)
{
    return e->n == 1 && e->peer[0] == SELF;
}

struct bridge *bridge_init(const struct deck *deck, const struct topology *topo,
                           const struct comm_ops *comm, const struct backend_ops *be,
                           struct stream *stream)
{
    struct bridge *b = xcalloc(1, sizeof *b);
    const int64_t most = max_rows_per_sample(deck);
    const bool trains = !deck->derived.freeze_encoder || !deck->derived.freeze_projector;
    struct schedule s;

    ASSERT(topo->encoder.present);
    b->topo = topo;
    b->ops = comm;
    b->be = be;
    b->compute = stream;
    be->stream_create(&b->own, "bridge");
    be->event_create(&b->event);
    be->event_create(&b->gradient_sent);
    b->act = deck->derived.fp64 ? DTYPE_F64 : deck->derived.bf16 ? DTYPE_BF16 : DTYPE_F32;
    b->comm = topo->bridge.leaders.comm;
    b->width = deck->language.hidden_size;
    schedule_build(&s, topo, (int)deck->derived.num_microbatches, false, true);
    if (topo->bridge.source_lane.rank >= 0)
        find_source(b, s.encoder_slots, most * deck->derived.encoder_microbatch);
    if (topo->language.member && topo->language.pp_rank == 0)
        find_dest(b, s.language_slots, most * deck->batch.micro_batch_size);
    schedule_free(&s);
    if (b->source.here && trains && !hands_over(&b->source))
        b->source.n_received = 1;
    if (b->leads && !hands_over(&b->dest))
        b->dest.n_received = b->dest.n_slots;
    b->source.received = xcalloc((size_t)b->source.n_received, sizeof *b->source.received);
    b->dest.received = xcalloc((size_t)b->dest.n_received, sizeof *b->dest.received);
    b->call_peer = xcalloc((size_t)b->source.n + (size_t)b->dest.n, sizeof *b->call_peer);
    b->count = xcalloc((size_t)b->source.n + (size_t)b->dest.n, sizeof *b->count);
    b->leaving = xcalloc((size_t)b->dest.n, sizeof *b->leaving);
    b->embedding_sent = xcalloc((size_t)b->source.n_slots, sizeof *b->embedding_sent);
    for (int i = 0; i < b->source.n_slots; i++)
        be->event_create(&b->embedding_sent[i]);
    return b;
}

static void plan_end(const struct bridge *b, struct end *e, const char *name, struct arena *a)
{
    for (int i = 0; i < e->n_received; i++)
        e->received[i] = arena_2d(a, name, b->act, e->max_rows, b->width);
}

void bridge_plan(struct bridge *b, struct arenas *arenas)
{
    plan_end(b, &b->source, "bridge.gradient", &arenas->a[ARENA_COMM]);
    plan_end(b, &b->dest, "bridge.embedding", &arenas->a[ARENA_COMM]);
}

void bridge_free(struct bridge *b)
{
    if (!b)
        return;
    for (int i = 0; i < b->source.n_slots; i++)
        b->be->event_destroy(&b->embedding_sent[i]);
    b->be->event_destroy(&b->gradient_sent);
    b->be->event_destroy(&b->event);
    b->be->stream_destroy(&b->own);
    free(b->embedding_sent);
    for (int i = 0; i < 2; i++) {
        struct end *e = i ? &b->dest : &b->source;
        free(e->peer);
        free(e->rows);
        free(e->received);
    }
    free(b->holder);
    free(b->call_peer);
    free(b->count);
    free(b->leaving);
    free(b);
}

/* ---- rows ------------------------------------------------------------------------------------ */

static int64_t *slot_counts(const struct end *e, int slot)
{
    ASSERT(e->here && slot >= 0 && slot < e->n_slots);
    return e->rows + (int64_t)slot * e->n;
}

/* Rows of each part of the slot's micro-batch: equal runs of consecutive samples. */
static void cut_samples(struct end *e, int slot, const int64_t *rows_per_sample, int64_t samples)
{
    int64_t *rows = slot_counts(e, slot), each = samples / e->n, sum = 0;

    if (each * e->n != samples)
        FATAL(EXIT_INTERNAL, "bridge: %lld samples do not divide over %d lanes", (long long)samples,
              e->n);
    for (int i = 0; i < e->n; i++) {
        rows[i] = 0;
        for (int64_t j = 0; j < each; j++)
            rows[i] += rows_per_sample[i * each + j];
        sum += rows[i];
    }
    if (sum > e->max_rows)
        FATAL(EXIT_INTERNAL, "bridge: micro-batch of %lld embeddings, at most %lld fit",
              (long long)sum, (long long)e->max_rows);
}

static int64_t slot_rows(const struct end *e, int slot)
{
    const int64_t *rows = slot_counts(e, slot);
    int64_t sum = 0;

    for (int i = 0; i < e->n; i++)
        sum += rows[i];
    return sum;
}

/* Part i of a tensor that holds all parts. */
static struct tensor part_of(const int64_t *rows, const struct tensor *t, int i)
{
    int64_t first = 0;

    for (int j = 0; j < i; j++)
        first += rows[j];
    return tensor_row_range(t, first, rows[i]);
}

static int self_part(const struct end *e)
{
    for (int i = 0; i < e->n; i++)
        if (e->peer[i] == SELF)
            return i;
    return NOBODY;
}

static struct tensor no_rows(const struct bridge *b)
{
    return tensor_2d(NULL, b->act, PLACE_DEVICE, 0, b->width);
}

static void compare_counts(const struct bridge *b, int from, int64_t sent, int64_t expected)
{
    if (sent != expected)
        FATAL(
            EXIT_INTERNAL,
            "bridge: encoder rank %d sends %lld picture embeddings, language rank %d expects %lld",
            from, (long long)sent, b->topo->rank, (long long)expected);
}

/* First phase of a forward message: the source's counts, checked against what the destination
 * expects from its own data. A side that this rank is not on, or does not serve in this call, has
 * no rows. */
static void exchange_counts(struct bridge *b, const int64_t *source_rows, const int64_t *dest_rows)
{
    int sent = 0, received = 0, *from = b->call_peer + b->source.n;
    int64_t *in = b->count + b->source.n;

    for (int i = 0; source_rows && i < b->source.n; i++)
        if (b->source.peer[i] >= 0) {
            b->call_peer[sent] = b->source.peer[i];
            b->count[sent++] = source_rows[i];
        }
    for (int i = 0; dest_rows && i < b->dest.n; i++)
        if (b->dest.peer[i] >= 0)
            from[received++] = b->dest.peer[i];
    if (sent + received > 0)
        comm_host_exchange(b->comm, sent, b->call_peer, b->count, received, from, in, sizeof *in);
    for (int i = 0, k = 0; dest_rows && i < b->dest.n; i++)
        if (b->dest.peer[i] >= 0) {
            compare_counts(b, b->topo->bridge.leaders.member[b->dest.peer[i]], in[k], dest_rows[i]);
            k++;
        }
}

/* `later` goes on after what `first` holds now. */
static void order(struct bridge *b, struct stream *first, struct stream *later)
{
    b->be->event_record(&b->event, first);
    b->be->stream_wait(later, &b->event);
}

void bridge_embedding_free(struct bridge *b, int slot)
{
    if (b->source.here)
        b->be->stream_wait(b->compute, &b->embedding_sent[slot]);
}

void bridge_gradient_free(struct bridge *b)
{
    b->be->stream_wait(b->compute, &b->gradient_sent);
}

/* Start the messages of one tensor that holds all parts of its side. */
static void start_parts(struct bridge *b, const struct end *e, const int64_t *rows,
                        const struct tensor *t, bool send)
{
    for (int i = 0; i < e->n; i++) {
        const struct tensor part = part_of(rows, t, i);
        if (rows[i] > 0 && e->peer[i] >= 0)
            (send ? b->ops->send : b->ops->recv)(b->comm, &part, e->peer[i], &b->own);
    }
}

static bool has_peers(const struct end *e)
{
    for (int i = 0; i < e->n; i++)
        if (e->peer[i] >= 0)
            return true;
    return false;
}

/* Send one tensor and receive another, either may be absent (NULL); all messages are started before
 * any is waited for. out and in belong to the given sides. */
static void exchange_rows(struct bridge *b, const struct end *from, const int64_t *out_rows,
                          const struct tensor *out, const struct end *to, const int64_t *in_rows,
                          const struct tensor *in)
{
    order(b, b->compute, &b->own);
    if (!(out && has_peers(from)) && !(in && has_peers(to)))
        return;
    b->ops->group_begin(b->comm);
    if (out)
        start_parts(b, from, out_rows, out, true);
    if (in)
        start_parts(b, to, in_rows, in, false);
    b->ops->group_end(b->comm, &b->own);
    b->ops->drain(&b->own);
}

/* Every part of a gradient from its holder to the other tp ranks of the encoder lane. */
static void share_in_lane(struct bridge *b, const int64_t *rows, const struct tensor *gradient)
{
    for (int i = 0; b->topo->bridge.source_lane.size > 1 && i < b->source.n; i++) {
        const struct tensor part = part_of(rows, gradient, i);
        if (rows[i] > 0)
            b->ops->broadcast(b->topo->bridge.source_lane.comm, &part, b->holder[i], &b->own);
    }
}

static void check_rows(const struct bridge *b, const struct end *e, int slot,
                       const struct tensor *t)
{
    if (tensor_rows(t) != slot_rows(e, slot) || tensor_cols(t) != b->width || t->dtype != b->act)
        FATAL(EXIT_INTERNAL, "bridge: [%lld, %lld] %s to send, the data say %lld rows of %lld %s",
              (long long)tensor_rows(t), (long long)tensor_cols(t), dtype_name(t->dtype),
              (long long)slot_rows(e, slot), (long long)b->width, dtype_name(b->act));
}

/* Where the rows of a slot are received. */
static struct tensor inbox(const struct end *e, int slot, int buffer)
{
    ASSERT(buffer < e->n_received);
    return tensor_row_range(&e->received[buffer], 0, slot_rows(e, slot));
}

/* ---- disjoint grids -------------------------------------------------------------------------- */

void bridge_send_forward(struct bridge *b, int slot, const struct tensor *e,
                         const int64_t *rows_per_sample, int64_t samples)
{
    cut_samples(&b->source, slot, rows_per_sample, samples);
    check_rows(b, &b->source, slot, e);
    exchange_counts(b, slot_counts(&b->source, slot), NULL);
    exchange_rows(b, &b->source, slot_counts(&b->source, slot), e, NULL, NULL, NULL);
    b->be->event_record(&b->embedding_sent[slot], &b->own);
}

struct tensor bridge_recv_forward(struct bridge *b, int slot, const int64_t *rows_per_sample,
                                  int64_t samples)
{
    struct tensor in;

    cut_samples(&b->dest, slot, rows_per_sample, samples);
    if (!b->leads)
        return no_rows(b);
    in = inbox(&b->dest, slot, slot);
    exchange_counts(b, NULL, slot_counts(&b->dest, slot));
    exchange_rows(b, NULL, NULL, NULL, &b->dest, slot_counts(&b->dest, slot), &in);
    order(b, &b->own, b->compute);
    return in;
}

void bridge_send_backward(struct bridge *b, int slot, const struct tensor *de)
{
    ASSERT(b->dest.here);
    if (!b->leads)
        return;
    check_rows(b, &b->dest, slot, de);
    exchange_rows(b, &b->dest, slot_counts(&b->dest, slot), de, NULL, NULL, NULL);
    b->be->event_record(&b->gradient_sent, &b->own);
}

struct tensor bridge_recv_backward(struct bridge *b, int slot)
{
    const struct tensor in = inbox(&b->source, slot, 0);

    exchange_rows(b, NULL, NULL, NULL, &b->source, slot_counts(&b->source, slot), &in);
    share_in_lane(b, slot_counts(&b->source, slot), &in);
    order(b, &b->own, b->compute);
    return in;
}

struct tensor bridge_send_forward_recv_backward(struct bridge *b, int slot, const struct tensor *e,
                                                const int64_t *rows_per_sample, int64_t samples,
                                                int backward_slot)
{
    const struct tensor in = inbox(&b->source, backward_slot, 0);

    ASSERT(slot != backward_slot);
    cut_samples(&b->source, slot, rows_per_sample, samples);
    check_rows(b, &b->source, slot, e);
    exchange_counts(b, slot_counts(&b->source, slot), NULL);
    exchange_rows(b, &b->source, slot_counts(&b->source, slot), e, &b->source,
                  slot_counts(&b->source, backward_slot), &in);
    b->be->event_record(&b->embedding_sent[slot], &b->own);
    share_in_lane(b, slot_counts(&b->source, backward_slot), &in);
    order(b, &b->own, b->compute);
    return in;
}

struct tensor bridge_send_backward_recv_forward(struct bridge *b, int slot, const struct tensor *de,
                                                int forward_slot, const int64_t *rows_per_sample,
                                                int64_t samples)
{
    struct tensor in;

    ASSERT(b->dest.here);
    if (b->leads) {
        check_rows(b, &b->dest, slot, de);
        /* With one slot the gradient still leaves by the old counts while the new ones take their
         * place. */
        memcpy(b->leaving, slot_counts(&b->dest, slot), (size_t)b->dest.n * sizeof *b->leaving);
    }
    cut_samples(&b->dest, forward_slot, rows_per_sample, samples);
    if (!b->leads)
        return no_rows(b);
    in = inbox(&b->dest, forward_slot, forward_slot);
    exchange_counts(b, NULL, slot_counts(&b->dest, forward_slot));
    exchange_rows(b, &b->dest, b->leaving, de, &b->dest, slot_counts(&b->dest, forward_slot), &in);
    b->be->event_record(&b->gradient_sent, &b->own);
    order(b, &b->own, b->compute);
    return in;
}

/* ---- colocated grids ------------------------------------------------------------------------- */

/* The part that this rank has on both sides, from one tensor to the other. */
static void copy_own(struct bridge *b, const int64_t *from_rows, const struct tensor *from,
                     int from_part, const int64_t *to_rows, const struct tensor *to, int to_part)
{
    const struct tensor out = part_of(from_rows, from, from_part),
                        in = part_of(to_rows, to, to_part);

    if (tensor_rows(&out) > 0)
        b->be->copy(b->compute, &out, &in);
}

struct tensor bridge_local_forward(struct bridge *b, const struct tensor *e,
                                   const int64_t *encoder_rows, int64_t encoder_samples,
                                   const int64_t *language_rows, int64_t language_samples)
{
    const int64_t *source = slot_counts(&b->source, 0), *dest = slot_counts(&b->dest, 0);
    const int sent = self_part(&b->source), received = self_part(&b->dest);
    struct tensor in = no_rows(b);

    cut_samples(&b->source, 0, encoder_rows, encoder_samples);
    cut_samples(&b->dest, 0, language_rows, language_samples);
    check_rows(b, &b->source, 0, e);
    ASSERT((sent >= 0) == b->leads && (received >= 0) == b->leads);
    if (b->leads)
        compare_counts(b, b->topo->rank, source[sent], dest[received]);
    exchange_counts(b, source, b->leads ? dest : NULL);
    if (b->leads && hands_over(&b->dest)) {
        in = part_of(source, e, sent);
    } else if (b->leads) {
        in = inbox(&b->dest, 0, 0);
        copy_own(b, source, e, sent, dest, &in, received);
    }
    exchange_rows(b, &b->source, source, e, &b->dest, dest, b->leads ? &in : NULL);
    order(b, &b->own, b->compute);
    return in;
}

struct tensor bridge_local_backward(struct bridge *b, const struct tensor *de)
{
    const int64_t *source = slot_counts(&b->source, 0), *dest = slot_counts(&b->dest, 0);
    const int received = self_part(&b->source), sent = self_part(&b->dest);
    struct tensor in;

    if (b->leads)
        check_rows(b, &b->dest, 0, de);
    if (hands_over(&b->source)) {
        in = part_of(dest, de, sent);
    } else {
        in = inbox(&b->source, 0, 0);
        if (b->leads)
            copy_own(b, dest, de, sent, source, &in, received);
    }
    exchange_rows(b, &b->dest, dest, b->leads ? de : NULL, &b->source, source, &in);
    share_in_lane(b, source, &in);
    order(b, &b->own, b->compute);
    return in;
}
