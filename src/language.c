/* language.c - the language module of one rank (model.md 1.1-1.3, 1.9, 3.1):
 *
 *   x_0 = text embeddings with picture embeddings merged in
 *   x_{l+1} = x_l + f_l(norm(x_l)) for each letter of the pattern
 *   logits = RMSNorm(x_L) W_out^T
 *   loss_sum = sum over tokens of mask * (log-sum-exp - logit[label])
 *
 * Backward starts from the SUM (g = mask): no division by tokens or micro-batches happens here; the
 * optimizer divides once by the global number of loss tokens. Padded vocabulary rows take part in
 * the softmax. One activation slot: a forward is followed by its backward before the next forward.
 *
 * Tensor parallelism (t ranks): embedding and output rows are cut over the vocabulary, the residual
 * stream by tokens (T/t rows, linear.h). The embedding's partial rows are summed and cut in one
 * step; pictures are merged on tp rank 0 alone, the others add zero there, so only that rank needs
 * the embeddings and only it returns their gradient. Every rank holds the whole loss; one of them
 * counts.
 */
#include "language.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "ddp.h"
#include "linear.h"
#include "mamba.h"
#include "mlp.h"
#include "moe.h"
#include "timer.h"

struct layer { /* one letter of the pattern */
    char kind; /* 'M' '*' 'E' '-' */
    union {
        struct mamba *mamba;
        struct moe *moe;
        struct attention *attention;
        struct mlp *mlp;
    };
    int first, end;  /* its parameters in the table */
    bool again;      /* only x is kept, the rest is made again in backward (recomputation) */
    struct tensor x; /* [T,H] input of the layer, kept for backward */
};

struct language {
    int n_layers;
    struct layer *layer;               /* [L] */
    int embedding, final_norm, output; /* parameter indices */
    double eps;
    struct ragged batch;
    struct tensor cu;          /* I32 [most segments + 1], of which batch.cu is the beginning */
    struct tensor ids, labels; /* I64 [T] */
    struct tensor mask;        /* acc [T] */
    struct tensor image_row;   /* I32 [T] */
    struct tensor x_last;      /* [T/t,H] output of the last layer */
    struct tensor rs, hidden;  /* acc [T/t], [T/t,H]: final norm */
    struct tensor logits;      /* [T,Vp/t], in backward their gradient */
    struct tensor own_mx, mx, se, pl,
        loss; /* acc [T]; of this rank's words: with tensor parallelism only */
    struct tensor loss_sum, metric; /* acc [1] over micro-batches */
    struct tensor dx, dhidden;      /* [T/t,H] */
    struct tensor dimage;           /* [rows,H] */
    int64_t image_rows;             /* of the micro-batch in the slot */
    struct tensor host_cu;          /* I32 [B+1] on the host, for the copy to the device */
};

/* Whether only the layer's input is kept and the rest made again in backward. */
static bool recomputed(const struct deck *deck, char kind)
{
    return deck->language.recompute_granularity == DECK_RECOMPUTE_FULL ||
           (kind == 'E' && deck_recomputes(deck, "moe")) ||
           (kind == '-' && deck_recomputes(deck, "mlp"));
}

struct language *language_init(struct model *m)
{
    const struct deck *deck = m->deck;
    struct language *lm = xcalloc(1, sizeof *lm);
    const int64_t h = deck->language.hidden_size, vp = deck->derived.padded_vocab;
    const double sigma = deck->language.init_method_std;
    lm->eps = deck->language.layernorm_epsilon;
    lm->n_layers = (int)deck->derived.num_layers;
    lm->layer = xcalloc((size_t)lm->n_layers, sizeof *lm->layer);
    struct param p = { .module = MODEL_LANGUAGE, .name = "embedding.word_embeddings.weight" };
    lm->embedding = model_add_matrix(m, &p, vp, h, PARAM_SPLIT_ROWS, sigma);
    for (int i = 0; i < lm->n_layers; i++) {
        struct layer *l = &lm->layer[i];
        l->kind = deck->derived.pattern[i];
        l->again = recomputed(deck, l->kind);
        l->first = m->n_params;
        switch (l->kind) {
        case 'M': l->mamba = mamba_init(m, i); break;
        case '*': l->attention = attention_init(m, i); break;
        case '-': l->mlp = mlp_init(m, i); break;
        case 'E':
            l->moe = moe_init(m, i);
            m->n_moe++;
            break;
        default: FATAL(EXIT_INTERNAL, "layer %d has the unknown kind '%c'", i, l->kind);
        }
        l->end = m->n_params;
    }
    snprintf(p.name, sizeof p.name, "decoder.final_norm.weight");
    lm->final_norm = model_add_vector(m, &p, h, PARAM_REPLICATED, RNG_ONES, 0.0);
    snprintf(p.name, sizeof p.name, "output_layer.weight");
    lm->output = linear_add(m, &p, vp, h, PARAM_SPLIT_ROWS, sigma);
    return lm;
}

/* What a recomputed layer makes again lives for its own backward alone: such layers share the
 * workspace, each in front of its temporaries. */
static void plan_layer(struct model *m, struct layer *l, struct arenas *as, int64_t tokens,
                       int64_t sequences, int64_t segments)
{
    const enum arena_kind keep = l->again ? ARENA_WORKSPACE : ARENA_ACTIVATIONS;
    const size_t mark = arena_mark(&as->a[ARENA_WORKSPACE]);
    l->x = arena_2d(&as->a[ARENA_ACTIVATIONS], "layer.x", m->act, linear_local_rows(m, tokens),
                    m->deck->language.hidden_size);
    switch (l->kind) {
    case 'M': mamba_plan(m, l->mamba, as, keep, tokens, segments); break;
    case '*':
        attention_plan(m, l->attention, as, keep, tokens, segments, tokens / sequences);
        break;
    case '-': mlp_plan(m, l->mlp, as, keep, tokens); break;
    default: moe_plan(m, l->moe, as, keep, tokens, sequences); break;
    }
    arena_rewind(&as->a[ARENA_WORKSPACE], mark);
}

/* Segments of a micro-batch at most: samples, or the members of a packed one and its padding. */
static int64_t most_segments(const struct deck *deck)
{
    const int64_t members = deck->data.packing_buffer_size, s = deck->language.seq_length;
    return members == 0 ? deck->batch.micro_batch_size : (members < s ? members : s) + 1;
}

void language_plan(struct model *m, struct language *lm, struct arenas *as)
{
    struct arena *acts = &as->a[ARENA_ACTIVATIONS], *work = &as->a[ARENA_WORKSPACE];
    const struct deck *deck = m->deck;
    const int64_t b = deck->batch.micro_batch_size, s = deck->language.seq_length, t = b * s;
    const int64_t h = deck->language.hidden_size,
                  vp = deck->derived.padded_vocab / m->topo->language.tp_size;
    const int64_t local = linear_local_rows(m, t);
    const int64_t segments = most_segments(deck);
    lm->batch = (struct ragged){ .tokens = t, .segments = b, .max_len = s, .seq_len = s };
    lm->cu = arena_1d(acts, "language.cu", DTYPE_I32, segments + 1);
    lm->ids = arena_1d(acts, "language.ids", DTYPE_I64, t);
    lm->labels = arena_1d(acts, "language.labels", DTYPE_I64, t);
    lm->mask = arena_1d(acts, "language.mask", m->acc, t);
    lm->image_row = arena_1d(acts, "language.image_row", DTYPE_I32, t);
    const size_t mark = arena_mark(work);
    if (m->topo->language.tp_size > 1) {
        m->gathered = arena_2d(work, "language.gathered", m->act, t, h);
        m->partial = arena_2d(work, "language.partial", m->act, t, h);
    }
    for (int i = 0; i < lm->n_layers; i++)
        plan_layer(m, &lm->layer[i], as, t, b, segments);
    lm->x_last = arena_2d(acts, "language.x_last", m->act, local, h);
    lm->rs = arena_1d(acts, "language.rs", m->acc, local);
    lm->hidden = arena_2d(acts, "language.hidden", m->act, local, h);
    lm->logits = arena_2d(acts, "language.logits", m->act, t, vp);
    lm->mx = arena_1d(acts, "language.loss_max", m->acc, t);
    lm->own_mx =
        m->topo->language.tp_size > 1 ? arena_1d(acts, "language.loss_own_max", m->acc, t) : lm->mx;
    lm->se = arena_1d(acts, "language.loss_sum_exp", m->acc, t);
    lm->pl = arena_1d(acts, "language.loss_label", m->acc, t);
    lm->loss = arena_1d(acts, "language.loss", m->acc, t);
    lm->loss_sum = arena_1d(acts, "language.total_loss", m->acc, 1);
    lm->metric = arena_1d(acts, "language.balance_metric", m->acc, 1);
    lm->dx = arena_2d(acts, "language.dx", m->act, local, h);
    lm->dimage = arena_2d(acts, "language.dimage", m->act, t, h);
    lm->dhidden = arena_2d(work, "language.dhidden", m->act, local, h);
    arena_rewind(work, mark);
    lm->host_cu = arena_1d(&as->a[ARENA_DATA], "language.host_cu", DTYPE_I32, segments + 1);
}

void language_free(struct language *lm)
{
    if (!lm)
        return;
    for (int i = 0; i < lm->n_layers; i++) {
        struct layer *l = &lm->layer[i];
        switch (l->kind) {
        case 'M': mamba_free(l->mamba); break;
        case '*': attention_free(l->attention); break;
        case '-': mlp_free(l->mlp); break;
        case 'E': moe_free(l->moe); break;
        default: break;
        }
    }
    free(lm->layer);
    free(lm);
}

/* The time of a layer; an expert layer books its own steps. */
static enum timer_part part_of(const struct layer *l)
{
    return l->kind == 'M'   ? TIMER_MAMBA
           : l->kind == '*' ? TIMER_ATTENTION
           : l->kind == '-' ? TIMER_DENSE
                            : TIMER_NO_PART;
}

struct moe *language_moe(const struct language *lm, int moe_layer)
{
    int seen = 0;
    for (int i = 0; i < lm->n_layers; i++)
        if (lm->layer[i].kind == 'E' && seen++ == moe_layer)
            return lm->layer[i].moe;
    FATAL(EXIT_INTERNAL, "the pattern has no expert layer number %d", moe_layer);
}

/* The micro-batch's ids, labels, mask and merge map to the device. */
static void load_batch(struct model *m, struct language *lm, const struct text_batch *text)
{
    const struct backend_ops *be = m->be;
    const int64_t t = lm->batch.tokens, s = lm->batch.seq_len;
    ASSERT(text->samples * s == t && text->seq_length == s);
    const struct tensor ids = tensor_1d(text->input_ids, DTYPE_I64, PLACE_HOST, t);
    const struct tensor labels = tensor_1d(text->labels, DTYPE_I64, PLACE_HOST, t);
    const struct tensor rows = tensor_1d(text->image_row, DTYPE_I32, PLACE_HOST, t);
    const struct tensor mask = tensor_1d(text->loss_mask, DTYPE_F32, PLACE_HOST, t);
    int32_t *cu = lm->host_cu.data;
    lm->batch.segments = text->n_segments > 0 ? text->n_segments : text->samples;
    lm->batch.max_len = text->n_segments > 0 ? text->longest : s;
    lm->batch.cu = tensor_first(&lm->cu, lm->batch.segments + 1);
    const struct tensor host_cu = tensor_first(&lm->host_cu, lm->batch.segments + 1);
    cu[0] = 0;
    for (int64_t b = 0; b < lm->batch.segments; b++)
        cu[b + 1] = text->n_segments > 0 ? text->segment_end[b] : (int32_t)((b + 1) * s);
    ASSERT(cu[lm->batch.segments] == t);
    lm->image_rows = text->image_rows;
    be->copy(m->compute, &host_cu, &lm->batch.cu);
    be->copy(m->compute, &ids, &lm->ids);
    be->copy(m->compute, &labels, &lm->labels);
    be->copy(m->compute, &rows, &lm->image_row);
    be->cast(m->compute, &mask, &lm->mask);
    for (int i = 0; i < lm->n_layers; i++)
        if (lm->layer[i].kind == 'E')
            moe_force_choice(m, lm->layer[i].moe, &lm->batch, text->sample_index);
}

static const struct tensor *layer_output(const struct language *lm, int i)
{
    return i + 1 < lm->n_layers ? &lm->layer[i + 1].x : &lm->x_last;
}

static const struct tensor *first_input(const struct language *lm)
{
    return lm->n_layers > 0 ? &lm->layer[0].x : &lm->x_last;
}

/* First vocabulary row of this rank's part of embedding and output. */
static int64_t first_word(const struct model *m)
{
    const struct grid *g = &m->topo->language;
    return g->tp_rank * (m->deck->derived.padded_vocab / g->tp_size);
}

static void embed(struct model *m, struct language *lm, const struct tensor *image,
                  const struct tensor *x)
{
    const bool alone = m->topo->language.tp_size == 1;
    const struct tensor *whole = alone ? x : &m->partial;
    m->be->embed_merge_forward(m->compute, &lm->ids, &lm->image_row,
                               &model_param(m, lm->embedding)->value, first_word(m),
                               m->topo->language.tp_rank == 0 ? image : NULL, whole);
    linear_reduce(m, whole, x);
}

/* Loss of every token from the logits of all ranks' words. */
static void loss(struct model *m, struct language *lm)
{
    const struct backend_ops *be = m->be;
    const struct group *tp = &m->topo->language.tp;
    struct stream *s = m->compute;
    be->loss_sum(s, &lm->logits, &lm->own_mx, &lm->se);
    if (tp->size > 1) {
        be->copy(s, &lm->own_mx, &lm->mx);
        m->comm->all_reduce(tp->comm, &lm->mx, COMM_MAX, s);
    }
    be->loss_label(s, &lm->logits, &lm->labels, first_word(m), &lm->own_mx, &lm->mx, &lm->se,
                   &lm->pl);
    if (tp->size > 1) {
        m->comm->all_reduce(tp->comm, &lm->se, COMM_SUM, s);
        m->comm->all_reduce(tp->comm, &lm->pl, COMM_SUM, s);
    }
    be->loss_finish(s, &lm->se, &lm->pl, &lm->mask, &lm->loss, &lm->loss_sum);
}

void model_language_load(struct model *m, int slot, const struct text_batch *text,
                         const struct tensor *image)
{
    ASSERT(slot == 0);
    if (m->topo->language.tp_rank == 0 && tensor_rows(image) != text->image_rows)
        FATAL(
            EXIT_DATA,
            "the tokens of the micro-batch have places for %lld picture embeddings, the encoder gave %lld (first sample %s)",
            (long long)text->image_rows, (long long)tensor_rows(image),
            text->key ? text->key[0] : "unnamed");
    load_batch(m, m->language, text);
}

void model_language_forward(struct model *m, int slot, const struct text_batch *text,
                            const struct tensor *image, bool train)
{
    model_language_load(m, slot, text, image);
    model_language_compute(m, slot, image, train);
}

/* y NULL: what the layer's backward reads, once more. */
static void forward_layer(struct model *m, struct language *lm, struct layer *l,
                          const struct tensor *y, bool train)
{
    switch (l->kind) {
    case 'M': mamba_forward(m, l->mamba, &lm->batch, &l->x, y); break;
    case '*': attention_forward(m, l->attention, &lm->batch, &l->x, y); break;
    case '-': mlp_forward(m, l->mlp, &l->x, y); break;
    default: moe_forward(m, l->moe, &lm->batch, &l->x, y, train, &lm->metric); break;
    }
}

void model_language_compute(struct model *m, int slot, const struct tensor *image, bool train)
{
    struct language *lm = m->language;
    const struct backend_ops *be = m->be;
    struct stream *s = m->compute;
    ASSERT(slot == 0);
    ddp_use(m->ddp, DDP_LANGUAGE, lm->embedding + 1);
    timer_part(TIMER_VOCABULARY);
    embed(m, lm, image, first_input(lm));
    timer_part(TIMER_NO_PART);
    for (int i = 0; i < lm->n_layers; i++) {
        struct layer *l = &lm->layer[i];
        ddp_use(m->ddp, DDP_LANGUAGE, l->end);
        timer_part(part_of(l));
        forward_layer(m, lm, l, layer_output(lm, i), train);
        timer_part(TIMER_NO_PART);
    }
    ddp_use(m->ddp, DDP_LANGUAGE, lm->output + 1);
    timer_part(TIMER_VOCABULARY);
    be->rmsnorm_forward(s, &lm->x_last, &model_param(m, lm->final_norm)->value, lm->eps,
                        &lm->hidden, &lm->rs);
    linear_forward(m, model_param(m, lm->output), linear_gather(m, &lm->hidden, &m->gathered), NULL,
                   &lm->logits);
    loss(m, lm);
    timer_part(TIMER_NO_PART);
}

struct tensor model_language_backward(struct model *m, int slot, bool want_image_gradient)
{
    struct language *lm = m->language;
    const struct backend_ops *be = m->be;
    struct stream *s = m->compute;
    const struct param *norm = model_param(m, lm->final_norm);
    ASSERT(slot == 0);
    timer_part(TIMER_VOCABULARY);
    be->loss_backward(s, &lm->labels, first_word(m), &lm->mx, &lm->se, &lm->mask, &lm->logits);
    linear_column_backward(m, model_param(m, lm->output), &lm->hidden, &lm->logits, &lm->dhidden);
    be->fill(s, &lm->dx, 0.0);
    be->rmsnorm_backward(s, &lm->x_last, &norm->value, &lm->rs, &lm->dhidden, &lm->dx,
                         param_grad(norm));
    timer_part(TIMER_NO_PART);
    ddp_ready(m->ddp, DDP_LANGUAGE, lm->final_norm);
    for (int i = lm->n_layers - 1; i >= 0; i--) {
        struct layer *l = &lm->layer[i];
        timer_part(part_of(l));
        if (l->again)
            forward_layer(m, lm, l, NULL, true);
        switch (l->kind) {
        case 'M': mamba_backward(m, l->mamba, &lm->batch, &l->x, &lm->dx); break;
        case '*': attention_backward(m, l->attention, &lm->batch, &l->x, &lm->dx); break;
        case '-': mlp_backward(m, l->mlp, &l->x, &lm->dx); break;
        default: moe_backward(m, l->moe, &lm->batch, &l->x, &lm->dx); break;
        }
        timer_part(TIMER_NO_PART);
        ddp_ready(m->ddp, DDP_LANGUAGE, l->first);
    }
    timer_part(TIMER_VOCABULARY);
    struct tensor dimage = { 0 };
    if (want_image_gradient && m->topo->language.tp_rank == 0)
        dimage = tensor_row_range(&lm->dimage, 0, lm->image_rows);
    be->embed_merge_backward(s, &lm->ids, &lm->image_row, linear_gather(m, &lm->dx, &m->gathered),
                             first_word(m), param_grad(model_param(m, lm->embedding)),
                             dimage.data ? &dimage : NULL);
    timer_part(TIMER_NO_PART);
    ddp_ready(m->ddp, DDP_LANGUAGE, lm->embedding);
    return dimage;
}

struct tensor model_loss_sum(struct model *m)
{
    return m->language->loss_sum;
}

struct tensor model_token_loss(struct model *m)
{
    return m->language->loss;
}

struct tensor model_logits(struct model *m)
{
    return m->language->logits;
}

struct tensor model_balance_metric(struct model *m)
{
    return m->language->metric;
}

void model_token_lse(struct model *m, double *lse)
{
    struct language *lm = m->language;
    const int64_t t = lm->batch.tokens;
    double *mx = xcalloc((size_t)t, sizeof *mx), *se = xcalloc((size_t)t, sizeof *se);
    const struct tensor mx_host = tensor_1d(mx, DTYPE_F64, PLACE_HOST, t),
                        se_host = tensor_1d(se, DTYPE_F64, PLACE_HOST, t);
    m->be->cast(m->compute, &lm->mx, &mx_host);
    m->be->cast(m->compute, &lm->se, &se_host);
    m->be->stream_sync(m->compute);
    for (int64_t i = 0; i < t; i++)
        lse[i] = mx[i] + log(se[i]);
    free(mx);
    free(se);
}

void model_zero_accumulators(struct model *m)
{
    if (!m->has_language)
        return;
    m->be->fill(m->compute, &m->language->loss_sum, 0.0);
    m->be->fill(m->compute, &m->language->metric, 0.0);
}
