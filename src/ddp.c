/* ddp.c - see ddp.h. */
#include "ddp.h"
#include <stdlib.h>
#include <string.h>

enum { PAD = 128 };

static const int64_t bucket_least = 40000000, bucket_per_rank = 1000000; /* parallel.md 6.2 */

/* ---- layout ---------------------------------------------------------------------------------- */

bool ddp_separate_experts(const struct grid *grid)
{
    return grid->ep_size > 1 || grid->expt_tp_size != grid->tp_size;
}

static int64_t round_up(int64_t n, int64_t to)
{
    return (n + to - 1) / to * to;
}

static int64_t padding_of(int64_t size)
{
    int64_t a = size, b = PAD;

    while (b != 0) {
        int64_t rest = a % b;
        a = b;
        b = rest;
    }
    return size / a * PAD;
}

/* This rank's run of each parameter of a bucket. */
static void cut_slots(struct ddp_buffer *b, const struct ddp_bucket *k)
{
    for (int i = k->first_slot; i < k->end_slot; i++) {
        struct ddp_slot *s = &b->slot[i];
        int64_t from = s->start > k->own ? s->start : k->own, to = s->start + s->numel;
        if (to > k->own + k->n)
            to = k->own + k->n;
        s->first = s->n = s->local = 0;
        if (from >= to)
            continue;
        s->first = from - s->start;
        s->n = to - from;
        s->local = k->local + from - k->own;
    }
}

void ddp_lay_out(struct ddp_buffer *b, int64_t bucket_size, int size, int rank)
{
    int64_t cursor = 0, pad = padding_of(size);
    struct ddp_bucket *k = NULL;

    ASSERT(size > 0 && rank >= 0 && rank < size);
    b->bucket = xcalloc((size_t)b->n_slots + 1, sizeof *b->bucket);
    b->n_buckets = 0;
    for (int i = 0; i < b->n_slots; i++) {
        struct ddp_slot *s = &b->slot[i];
        if (!k) {
            k = &b->bucket[b->n_buckets++];
            *k = (struct ddp_bucket){ .first_slot = i, .start = cursor, .local = cursor / size };
        }
        s->start = round_up(cursor, DDP_ALIGN);
        cursor = s->start + s->numel;
        if (cursor - k->start < bucket_size && i + 1 < b->n_slots)
            continue;
        k->end_slot = i + 1;
        k->used = cursor;
        cursor = k->end = round_up(cursor, pad);
        k->n = (k->end - k->start) / size;
        k->own = k->start + rank * k->n;
        cut_slots(b, k);
        k = NULL;
    }
    b->numel = cursor;
    b->shard_numel = cursor / size;
}

/* Largest number of elements before a bucket closes. */
static int64_t bucket_size_of(const struct ddp_buffer *b, const struct grid *grid,
                              const struct deck_optimizer *o)
{
    int64_t total = 0, per_rank = bucket_per_rank * b->group->size;

    if (!b->overlap_reduce || grid->pp_rank > 0)
        return INT64_MAX;
    if (o->ddp_bucket_size > 0)
        return o->ddp_bucket_size;
    if (o->ddp_num_buckets > 0) {
        for (int i = 0; i < b->n_slots; i++)
            total += b->slot[i].numel;
        return total > o->ddp_num_buckets ? total / o->ddp_num_buckets : 1;
    }
    return per_rank > bucket_least ? per_rank : bucket_least;
}

static bool belongs(const struct ddp_buffer *b, const struct param *p, const struct grid *grid)
{
    bool expert = p->expert && ddp_separate_experts(grid);

    return p->trainable && (p->module == MODEL_LANGUAGE) == b->language && expert == b->expert;
}

static void add_buffer(struct ddp *d, bool language, bool expert, const char *name)
{
    struct model *m = d->model;
    const struct deck_optimizer *o = &m->deck->optimizer;
    const struct grid *grid = language ? &m->topo->language : &m->topo->encoder;
    struct ddp_buffer *b = &d->buffer[d->n];

    *b = (struct ddp_buffer){ .name = name,
                              .language = language,
                              .expert = expert,
                              .group = expert ? &grid->expt_dp : &grid->dp_cp };
    b->slot = xcalloc((size_t)m->n_params + 1, sizeof *b->slot);
    for (int i = m->n_params - 1; i >= 0; i--)
        if (belongs(b, &m->param[i], grid))
            b->slot[b->n_slots++] =
                (struct ddp_slot){ .param = i, .numel = model_param_numel(m, &m->param[i]) };
    if (b->n_slots == 0) {
        free(b->slot);
        return;
    }
    b->overlap_reduce = o->overlap_grad_reduce && (language || o->encoder_ddp_overlap);
    b->overlap_gather = o->overlap_param_gather && (language || o->encoder_ddp_overlap);
    ddp_lay_out(b, bucket_size_of(b, grid, o), b->group->size, b->group->rank);
    m->be->stream_create(&b->stream, name);
    b->stream.deferred = true;
    m->be->event_create(&b->event);
    d->n++;
}

struct ddp *ddp_init(struct model *m)
{
    struct ddp *d = xcalloc(1, sizeof *d);

    d->model = m;
    if (m->has_encoder)
        add_buffer(d, DDP_ENCODER, false, "encoder");
    if (m->has_language)
        add_buffer(d, DDP_LANGUAGE, false, "language, dense");
    if (m->has_language)
        add_buffer(d, DDP_LANGUAGE, true, "language, experts");
    return d;
}

static struct tensor range(const struct tensor *t, int64_t first, int64_t n)
{
    char *data = t->data;

    return tensor_1d(data ? data + (size_t)first * dtype_bytes(t->dtype) : NULL, t->dtype, t->place,
                     n);
}

void ddp_plan(struct ddp *d, struct arenas *as)
{
    struct model *m = d->model;

    for (int i = 0; i < d->n; i++) {
        struct ddp_buffer *b = &d->buffer[i];
        b->value = arena_1d(&as->a[ARENA_PARAMS], b->name, m->act, b->numel);
        b->grad = arena_1d(&as->a[ARENA_GRADS], b->name, m->acc, b->numel);
        for (int k = 0; k < b->n_slots; k++) {
            const struct ddp_slot *s = &b->slot[k];
            struct param *p = &m->param[s->param];
            int64_t shape[TENSOR_MAX_DIMS];
            model_local_shape(m, p, shape);
            p->value = tensor_view(range(&b->value, s->start, s->numel).data, m->act,
                                   b->value.place, p->ndim, shape);
            p->grad = tensor_view(range(&b->grad, s->start, s->numel).data, m->acc, b->grad.place,
                                  p->ndim, shape);
        }
    }
}

void ddp_free(struct ddp *d)
{
    if (!d)
        return;
    for (int i = 0; i < d->n; i++) {
        struct ddp_buffer *b = &d->buffer[i];
        d->model->comm->drain(&b->stream);
        d->model->be->event_destroy(&b->event);
        d->model->be->stream_destroy(&b->stream);
        free(b->slot);
        free(b->bucket);
    }
    free(d);
}

/* ---- gradients ------------------------------------------------------------------------------- */

/* `later` goes on after what `first` holds now. */
static void order(struct ddp *d, struct ddp_buffer *b, struct stream *first, struct stream *later)
{
    d->model->be->event_record(&b->event, first);
    d->model->be->stream_wait(later, &b->event);
}

/* What the backward passes gave no product is zero in memory as well (model_begin_grads). */
static void finish_bucket(struct ddp *d, const struct ddp_buffer *b, const struct ddp_bucket *k)
{
    for (int i = k->first_slot; i < k->end_slot; i++) {
        struct param *p = &d->model->param[b->slot[i].param];
        if (p->fresh)
            d->model->be->fill(d->model->compute, &p->grad, 0.0);
        p->fresh = false;
    }
}

static void reduce_bucket(struct ddp *d, struct ddp_buffer *b, int i, struct stream *s)
{
    const struct ddp_bucket *k = &b->bucket[i];
    const struct tensor all = range(&b->grad, k->start, k->end - k->start),
                        own = range(&b->grad, k->own, k->n);

    ASSERT(i == b->reduced);
    b->reduced++;
    finish_bucket(d, b, k);
    if (s != d->model->compute)
        order(d, b, d->model->compute, s);
    if (b->group->size > 1)
        d->model->comm->reduce_scatter(b->group->comm, &all, &own, COMM_SUM, s);
}

void ddp_last_backward(struct ddp *d, bool language)
{
    for (int i = 0; i < d->n; i++) {
        struct ddp_buffer *b = &d->buffer[i];
        if (b->language != language || !b->overlap_reduce)
            continue;
        ASSERT(!b->armed && b->ready == 0 && b->reduced == 0);
        b->armed = true;
    }
}

void ddp_ready(struct ddp *d, bool language, int first)
{
    for (int i = 0; i < d->n; i++) {
        struct ddp_buffer *b = &d->buffer[i];
        if (b->language != language || !b->armed)
            continue;
        while (b->ready < b->n_slots && b->slot[b->ready].param >= first)
            b->ready++;
        while (b->reduced < b->n_buckets && b->bucket[b->reduced].end_slot <= b->ready)
            reduce_bucket(d, b, b->reduced, &b->stream);
    }
}

static void finish_overlap(struct ddp *d, struct ddp_buffer *b)
{
    if (b->ready < b->n_slots)
        FATAL(EXIT_INTERNAL,
              "%s: %d of %d parameters got no gradient in the last backward, the first is %s",
              b->name, b->n_slots - b->ready, b->n_slots,
              d->model->param[b->slot[b->ready].param].name);
    d->model->comm->drain(&b->stream);
    order(d, b, &b->stream, d->model->compute);
}

void ddp_reduce(struct ddp *d, bool language)
{
    for (int i = 0; i < d->n; i++) {
        struct ddp_buffer *b = &d->buffer[i];
        if (b->language != language)
            continue;
        if (b->overlap_reduce)
            finish_overlap(d, b);
        else
            while (b->reduced < b->n_buckets)
                reduce_bucket(d, b, b->reduced, d->model->compute);
        ASSERT(b->reduced == b->n_buckets);
        b->armed = false;
        b->ready = b->reduced = 0;
    }
}

void ddp_gather_grads(struct ddp *d)
{
    for (int i = 0; i < d->n; i++) {
        struct ddp_buffer *b = &d->buffer[i];
        for (int k = 0; k < b->n_buckets && b->group->size > 1; k++) {
            const struct ddp_bucket *c = &b->bucket[k];
            const struct tensor all = range(&b->grad, c->start, c->end - c->start),
                                own = range(&b->grad, c->own, c->n);
            d->model->comm->all_gather(b->group->comm, &own, &all, d->model->compute);
        }
    }
}

/* ---- values ---------------------------------------------------------------------------------- */

/* The forward pass meets the buckets from the last to the first. */
static void gather_bucket(struct ddp *d, struct ddp_buffer *b, struct stream *s)
{
    const struct ddp_bucket *k = &b->bucket[b->to_gather - 1];
    const struct tensor all = range(&b->value, k->start, k->end - k->start),
                        own = range(&b->value, k->own, k->n);

    if (b->group->size > 1)
        d->model->comm->all_gather(b->group->comm, &own, &all, s);
}

void ddp_gather(struct ddp *d)
{
    for (int i = 0; i < d->n; i++) {
        struct ddp_buffer *b = &d->buffer[i];
        ASSERT(b->to_gather == 0);
        b->to_gather = b->n_buckets;
        if (b->overlap_gather) {
            order(d, b, d->model->compute, &b->stream);
            gather_bucket(d, b, &b->stream);
        } else {
            for (; b->to_gather > 0; b->to_gather--)
                gather_bucket(d, b, d->model->compute);
        }
    }
}

/* Wait for the bucket on its way while it holds a parameter with index < end, and start the
 * next. */
static void use(struct ddp *d, struct ddp_buffer *b, int end)
{
    while (b->to_gather > 0 && b->slot[b->bucket[b->to_gather - 1].end_slot - 1].param < end) {
        d->model->comm->drain(&b->stream);
        order(d, b, &b->stream, d->model->compute);
        if (--b->to_gather > 0)
            gather_bucket(d, b, &b->stream);
    }
}

void ddp_use(struct ddp *d, bool language, int end)
{
    for (int i = 0; i < d->n; i++)
        if (d->buffer[i].language == language)
            use(d, &d->buffer[i], end);
}

void ddp_use_all(struct ddp *d)
{
    for (int i = 0; i < d->n; i++)
        use(d, &d->buffer[i], d->model->n_params);
}
