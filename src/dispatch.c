/* dispatch.c - see dispatch.h. All ranks' offsets are gathered on the device, which makes the order
 * of the rows of them; the host gets a copy for the splits of the messages alone, on a stream of
 * its own beside what the compute stream does meanwhile. */
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
    d->be->stream_create(&d->copies, "copy");
    d->be->event_create(&d->event);
    d->be->event_create(&d->known);
    d->size = g->ep_size;
    d->rank = g->ep_rank;
    d->experts = experts;
    d->owned = experts / g->ep_size;
    d->send_rows = xcalloc((size_t)d->size, sizeof *d->send_rows);
    d->recv_rows = xcalloc((size_t)d->size, sizeof *d->recv_rows);
    return d;
}

void dispatch_free(struct dispatch *d)
{
    if (!d)
        return;
    d->be->event_destroy(&d->event);
    d->be->event_destroy(&d->known);
    d->be->stream_destroy(&d->copies);
    if (d->stream == &d->own)
        d->be->stream_destroy(&d->own);
    free(d->send_rows);
    free(d->recv_rows);
    free(d);
}

void dispatch_plan(struct model *m, struct dispatch *d, struct arenas *as, enum arena_kind keep,
                   int64_t copies)
{
    struct arena *kept = &as->a[keep], *comm = &as->a[ARENA_COMM];
    d->max_rows = copies * d->size;
    d->all = arena_2d(kept, "dispatch.all_offsets", DTYPE_I32, d->size, d->experts + 1);
    d->offsets = arena_1d(kept, "dispatch.offsets", DTYPE_I32, d->owned + 1);
    d->order = arena_1d(kept, "dispatch.order", DTYPE_I32, d->max_rows);
    d->inverse = arena_1d(kept, "dispatch.inverse", DTYPE_I32, d->max_rows);
    d->host_all =
        arena_2d(&as->a[ARENA_DATA], "dispatch.host_offsets", DTYPE_I32, d->size, d->experts + 1);
    const size_t mark = arena_mark(comm);
    d->buffer[DISPATCH_ROWS] =
        arena_2d(comm, "dispatch.rows", m->act, d->max_rows, m->deck->language.hidden_size);
    d->buffer[DISPATCH_PROBS] = arena_2d(comm, "dispatch.probs", m->acc, d->max_rows, 1);
    arena_rewind(comm, mark); /* one layer exchanges at a time */
}

/* `later` goes on after what `first` holds now. */
static void order(struct dispatch *d, struct stream *first, struct stream *later)
{
    if (first == later)
        return;
    d->be->event_record(&d->event, first);
    d->be->stream_wait(later, &d->event);
}

void dispatch_begin(struct model *m, struct dispatch *d, const struct tensor *offsets)
{
    m->comm->all_gather(m->topo->language.ep.comm, offsets, &d->all, m->compute);
    order(d, m->compute, &d->copies);
    d->be->copy(&d->copies, &d->all, &d->host_all);
    d->be->event_record(&d->known, &d->copies);
    m->be->dispatch_order(m->compute, &d->all, d->rank * d->owned, &d->offsets, &d->order,
                          &d->inverse);
    d->sent = d->received = -1;
}

void dispatch_learn(struct dispatch *d)
{
    const int32_t *all = d->host_all.data;

    if (d->sent >= 0)
        return;
    d->be->event_sync(&d->known);
    d->sent = d->received = 0;
    for (int r = 0; r < d->size; r++) {
        const int32_t *mine = all + d->rank * (d->experts + 1) + r * d->owned,
                      *their = all + r * (d->experts + 1) + d->rank * d->owned;
        d->send_rows[r] = mine[d->owned] - mine[0];
        d->recv_rows[r] = their[d->owned] - their[0];
        d->sent += d->send_rows[r];
        d->received += d->recv_rows[r];
    }
}

static struct tensor received_rows(const struct dispatch *d, enum dispatch_load load)
{
    return tensor_first(&d->buffer[load], d->received);
}

void dispatch_send(struct model *m, struct dispatch *d, enum dispatch_load load,
                   const struct tensor *rows)
{
    dispatch_learn(d);
    const struct tensor received = received_rows(d, load);
    order(d, m->compute, d->stream);
    m->comm->all_to_all_v(m->topo->language.ep.comm, rows, d->send_rows, &received, d->recv_rows,
                          d->stream);
}

void dispatch_return(struct model *m, struct dispatch *d, enum dispatch_load load,
                     const struct tensor *sorted, const struct tensor *rows)
{
    const struct tensor received = received_rows(d, load),
                        inverse = tensor_first(&d->inverse, d->received);
    m->be->gather_rows(m->compute, sorted, &inverse, &received);
    order(d, m->compute, d->stream);
    m->comm->all_to_all_v(m->topo->language.ep.comm, &received, d->recv_rows, rows, d->send_rows,
                          d->stream);
}

void dispatch_wait(struct model *m, struct dispatch *d)
{
    m->comm->drain(d->stream);
    order(d, d->stream, m->compute);
}

void dispatch_unpack(struct model *m, const struct dispatch *d, enum dispatch_load load,
                     const struct tensor *out)
{
    const struct tensor received = received_rows(d, load),
                        from = tensor_first(&d->order, d->received);
    m->be->gather_rows(m->compute, &received, &from, out);
}
