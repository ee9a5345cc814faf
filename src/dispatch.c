/* dispatch.c - see dispatch.h. All ranks' offsets are gathered on the device, where the order of
 * the rows is made from them. The host needs a copy only for the sizes of the messages: it travels
 * on a stream of its own, beside what the compute stream does meanwhile. */
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
    d->parts = g->expt_tp_size;
    d->group = d->parts > 1 ? &g->tp_ep : &g->ep;
    d->size = d->group->size;
    d->rank = d->group->rank;
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

/* The index is made once: it must outlive what a recomputed layer makes again. */
static void plan_parts(struct model *m, struct dispatch *d, struct arenas *as, int64_t copies)
{
    struct arena *comm = &as->a[ARENA_COMM];
    d->apart[DISPATCH_ROWS] = arena_2d(comm, "dispatch.row_parts", m->act, d->parts * copies,
                                       m->deck->language.hidden_size);
    d->apart[DISPATCH_PROBS] = arena_2d(comm, "dispatch.prob_parts", m->acc, d->parts * copies, 1);
    d->summands =
        arena_2d(&as->a[ARENA_ACTIVATIONS], "dispatch.summands", DTYPE_I32, copies, d->parts);
    d->host_summands =
        arena_2d(&as->a[ARENA_DATA], "dispatch.host_summands", DTYPE_I32, copies, d->parts);
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
    if (d->parts > 1)
        plan_parts(m, d, as, copies);
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

static void make_summands(struct model *m, struct dispatch *d)
{
    const int64_t copies = tensor_rows(&d->host_summands);
    int32_t *row = d->host_summands.data;
    if (d->has_summands)
        return;
    for (int64_t i = 0; i < copies; i++)
        for (int k = 0; k < d->parts; k++)
            *row++ = (int32_t)(k * copies + i);
    m->be->copy(m->compute, &d->host_summands, &d->summands);
    d->has_summands = true;
}

/* First of the experts that a rank of the group owns. */
static int64_t first_expert(const struct dispatch *d, int rank)
{
    return rank / d->parts * d->owned;
}

void dispatch_begin(struct model *m, struct dispatch *d, const struct tensor *offsets)
{
    if (d->parts > 1)
        make_summands(m, d);
    m->comm->all_gather(d->group->comm, offsets, &d->all, m->compute);
    order(d, m->compute, &d->copies);
    d->be->copy(&d->copies, &d->all, &d->host_all);
    d->be->event_record(&d->known, &d->copies);
    m->be->dispatch_order(m->compute, &d->all, first_expert(d, d->rank), &d->offsets, &d->order,
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
        const int32_t *mine = all + d->rank * (d->experts + 1) + first_expert(d, r),
                      *their = all + r * (d->experts + 1) + first_expert(d, d->rank);
        d->send_rows[r] = mine[d->owned] - mine[0];
        d->recv_rows[r] = their[d->owned] - their[0];
        d->sent += r % d->parts == 0 ? d->send_rows[r] : 0;
        d->received += d->recv_rows[r];
    }
}

static struct tensor received_rows(const struct dispatch *d, enum dispatch_load load)
{
    return tensor_first(&d->buffer[load], d->received);
}

/* Where this rank's sorted copies for the owner r begin. */
static int64_t first_copy(const struct dispatch *d, int r)
{
    const int32_t *all = d->host_all.data;
    return all[d->rank * (d->experts + 1) + first_expert(d, r)];
}

/* The run of this rank's copies for each owner goes to all of its parts, or (back) comes from each
 * of them: those of part k lie k * stride rows further on. The runs of others lie in `received`,
 * packed in the order of the ranks. */
static void exchange_parts(struct model *m, struct dispatch *d, const struct tensor *received,
                           const struct tensor *runs, int64_t stride, bool back)
{
    int64_t at = 0;
    m->comm->group_begin(d->group->comm);
    for (int r = 0; r < d->size; r++) {
        const struct tensor run = tensor_row_range(runs, first_copy(d, r) + r % d->parts * stride,
                                                   d->send_rows[r]),
                            packed = tensor_row_range(received, at, d->recv_rows[r]);
        at += d->recv_rows[r];
        if (r == d->rank) {
            d->be->copy(d->stream, back ? &packed : &run, back ? &run : &packed);
            continue;
        }
        m->comm->send(d->group->comm, back ? &packed : &run, r, d->stream);
        m->comm->recv(d->group->comm, back ? &run : &packed, r, d->stream);
    }
    m->comm->group_end(d->group->comm, d->stream);
}

void dispatch_send(struct model *m, struct dispatch *d, enum dispatch_load load,
                   const struct tensor *rows)
{
    dispatch_learn(d);
    const struct tensor received = received_rows(d, load);
    order(d, m->compute, d->stream);
    if (d->parts > 1)
        exchange_parts(m, d, &received, rows, 0, false);
    else
        m->comm->all_to_all_v(d->group->comm, rows, d->send_rows, &received, d->recv_rows,
                              d->stream);
}

void dispatch_return(struct model *m, struct dispatch *d, enum dispatch_load load,
                     const struct tensor *sorted, const struct tensor *rows)
{
    const struct tensor received = received_rows(d, load),
                        inverse = tensor_first(&d->inverse, d->received);
    m->be->gather_rows(m->compute, sorted, &inverse, &received);
    order(d, m->compute, d->stream);
    if (d->parts > 1) {
        exchange_parts(m, d, &received, &d->apart[load], tensor_rows(&d->summands), true);
        d->into[load] = *rows;
    } else {
        m->comm->all_to_all_v(d->group->comm, &received, d->recv_rows, rows, d->send_rows,
                              d->stream);
    }
}

/* What the parts of the experts gave becomes what the experts give. */
static void add_parts(struct model *m, struct dispatch *d)
{
    const int64_t copies = tensor_rows(&d->summands);
    const struct tensor summands = tensor_first(&d->summands, d->sent);
    struct tensor *rows = &d->into[DISPATCH_ROWS], *probs = &d->into[DISPATCH_PROBS];
    if (rows->data)
        m->be->gather_sum_rows(m->compute, &d->apart[DISPATCH_ROWS], &summands, 0.0, rows);
    for (int k = 0; probs->data && k < d->parts; k++) {
        const struct tensor part = tensor_row_range(&d->apart[DISPATCH_PROBS], k * copies, d->sent);
        if (k == 0)
            m->be->copy(m->compute, &part, probs);
        else
            m->be->add(m->compute, &part, probs);
    }
    rows->data = probs->data = NULL;
}

void dispatch_wait(struct model *m, struct dispatch *d)
{
    m->comm->drain(d->stream);
    order(d, d->stream, m->compute);
    if (d->parts > 1)
        add_parts(m, d);
}

void dispatch_unpack(struct model *m, const struct dispatch *d, enum dispatch_load load,
                     const struct tensor *out)
{
    const struct tensor received = received_rows(d, load),
                        from = tensor_first(&d->order, d->received);
    m->be->gather_rows(m->compute, &received, &from, out);
}
