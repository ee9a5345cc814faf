/* dispatch.c - see dispatch.h. The order arrays are made on the host from the counts that the host needs anyway for the splits. */
#include "dispatch.h"

#include <stdlib.h>

struct dispatch *dispatch_init(struct model *m, int64_t experts)
{
    const struct grid *g = &m->topo->language;
    struct dispatch *d = xcalloc(1, sizeof *d);
    d->be = m->be;
    d->stream = m->compute;
    if (m->deck->moe.moe_shared_expert_overlap) {
        d->be->stream_create(&d->own, "dispatch");
        d->own.deferred = true;
        d->stream = &d->own;
    }
    d->be->event_create(&d->event);
    d->size = g->ep_size;
    d->rank = g->ep_rank;
    d->experts = experts;
    d->owned = experts / g->ep_size;
    d->send_rows = xcalloc((size_t)d->size, sizeof *d->send_rows);
    d->recv_rows = xcalloc((size_t)d->size, sizeof *d->recv_rows);
    d->count = xcalloc((size_t)(d->size * experts), sizeof *d->count);
    return d;
}

void dispatch_free(struct dispatch *d)
{
    if (!d)
        return;
    d->be->event_destroy(&d->event);
    if (d->stream == &d->own)
        d->be->stream_destroy(&d->own);
    free(d->send_rows);
    free(d->recv_rows);
    free(d->count);
    free(d);
}

void dispatch_plan(struct model *m, struct dispatch *d, struct arenas *as, int64_t copies)
{
    struct arena *acts = &as->a[ARENA_ACTIVATIONS], *comm = &as->a[ARENA_COMM], *data = &as->a[ARENA_DATA];
    d->max_rows = copies * d->size;
    d->mine = arena_1d(acts, "dispatch.count", DTYPE_I32, d->experts);
    d->all = arena_2d(acts, "dispatch.counts", DTYPE_I32, d->size, d->experts);
    d->offsets = arena_1d(acts, "dispatch.offsets", DTYPE_I32, d->owned + 1);
    d->order = arena_1d(acts, "dispatch.order", DTYPE_I32, d->max_rows);
    d->inverse = arena_1d(acts, "dispatch.inverse", DTYPE_I32, d->max_rows);
    d->host_mine = arena_1d(data, "dispatch.host_count", DTYPE_I32, d->experts + 1);
    d->host_offsets = arena_1d(data, "dispatch.host_offsets", DTYPE_I32, d->owned + 1);
    d->host_order = arena_1d(data, "dispatch.host_order", DTYPE_I32, d->max_rows);
    d->host_inverse = arena_1d(data, "dispatch.host_inverse", DTYPE_I32, d->max_rows);
    const size_t mark = arena_mark(comm);
    d->buffer[DISPATCH_ROWS] = arena_2d(comm, "dispatch.rows", m->act, d->max_rows, m->deck->language.hidden_size);
    d->buffer[DISPATCH_PROBS] = arena_2d(comm, "dispatch.probs", m->acc, d->max_rows, 1);
    arena_rewind(comm, mark);   /* one layer exchanges at a time */
}

static int32_t count_of(const struct dispatch *d, int source, int64_t expert)
{
    return d->count[source * d->experts + d->rank * d->owned + expert];
}

/* Received rows lie by (source, owned expert); sorted rows by (owned expert, source). */
static void make_order(struct dispatch *d)
{
    int32_t *offsets = d->host_offsets.data, *order = d->host_order.data, *inverse = d->host_inverse.data;
    int32_t sorted = 0;
    for (int64_t x = 0; x < d->owned; x++) {
        offsets[x] = sorted;
        int32_t received = 0;
        for (int source = 0; source < d->size; source++) {
            for (int64_t y = 0; y < x; y++)
                received += count_of(d, source, y);
            for (int32_t i = 0; i < count_of(d, source, x); i++) {
                inverse[received + i] = sorted;
                order[sorted++] = received + i;
            }
            for (int64_t y = x; y < d->owned; y++)
                received += count_of(d, source, y);
        }
    }
    offsets[d->owned] = sorted;
    d->received = sorted;
}

void dispatch_begin(struct model *m, struct dispatch *d, const struct tensor *offsets)
{
    const struct backend_ops *be = m->be;
    struct comm *ep = m->topo->language.ep.comm;
    const struct tensor host = tensor_2d(d->count, DTYPE_I32, PLACE_HOST, d->size, d->experts);
    const struct tensor counts = tensor_first(&d->host_mine, d->experts);
    int32_t *mine = d->host_mine.data;
    be->copy(m->compute, offsets, &d->host_mine);
    be->stream_sync(m->compute);
    for (int64_t x = 0; x < d->experts; x++)
        mine[x] = mine[x + 1] - mine[x];
    be->copy(m->compute, &counts, &d->mine);
    m->comm->all_gather(ep, &d->mine, &d->all, m->compute);
    be->copy(m->compute, &d->all, &host);
    be->stream_sync(m->compute);
    d->sent = 0;
    for (int r = 0; r < d->size; r++) {
        d->send_rows[r] = d->recv_rows[r] = 0;
        for (int64_t x = 0; x < d->owned; x++) {
            d->send_rows[r] += d->count[d->rank * d->experts + r * d->owned + x];
            d->recv_rows[r] += count_of(d, r, x);
        }
        d->sent += d->send_rows[r];
    }
    make_order(d);
    const struct tensor order = tensor_first(&d->order, d->received), inverse = tensor_first(&d->inverse, d->received);
    const struct tensor from = tensor_first(&d->host_order, d->received), back = tensor_first(&d->host_inverse, d->received);
    be->copy(m->compute, &d->host_offsets, &d->offsets);
    be->copy(m->compute, &from, &order);
    be->copy(m->compute, &back, &inverse);
}

/* `later` goes on after what `first` holds now. */
static void order(struct dispatch *d, struct stream *first, struct stream *later)
{
    if (first == later)
        return;
    d->be->event_record(&d->event, first);
    d->be->stream_wait(later, &d->event);
}

static struct tensor received_rows(const struct dispatch *d, enum dispatch_load load)
{
    return tensor_first(&d->buffer[load], d->received);
}

void dispatch_send(struct model *m, struct dispatch *d, enum dispatch_load load, const struct tensor *rows)
{
    const struct tensor received = received_rows(d, load);
    order(d, m->compute, d->stream);
    m->comm->all_to_all_v(m->topo->language.ep.comm, rows, d->send_rows, &received, d->recv_rows, d->stream);
}

void dispatch_return(struct model *m, struct dispatch *d, enum dispatch_load load, const struct tensor *sorted,
                     const struct tensor *rows)
{
    const struct tensor received = received_rows(d, load), inverse = tensor_first(&d->inverse, d->received);
    m->be->gather_rows(m->compute, sorted, &inverse, &received);
    order(d, m->compute, d->stream);
    m->comm->all_to_all_v(m->topo->language.ep.comm, &received, d->recv_rows, rows, d->send_rows, d->stream);
}

void dispatch_wait(struct model *m, struct dispatch *d)
{
    m->comm->drain(d->stream);
    order(d, d->stream, m->compute);
}

void dispatch_unpack(struct model *m, const struct dispatch *d, enum dispatch_load load, const struct tensor *out)
{
    const struct tensor received = received_rows(d, load), from = tensor_first(&d->order, d->received);
    m->be->gather_rows(m->compute, &received, &from, out);
}
