/* model.c - the parameter table of this rank and what iterates it: allocation, initial values,
 * counts. The mathematics is in language.c and radio.c.
 *
 * Initial values (model.md 1.2, [CHOICE]): every element is a function of (seed, module, name,
 * index in the full logical tensor), made in double, rounded to float (and further to bf16 in a
 * bf16 run), so layouts and precisions start from the same numbers.
 */
#include "model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ddp.h"
#include "language.h"
#include "log.h"
#include "moe.h"
#include "radio.h"
#include "rng.h"

const char *const model_module_names[MODEL_MODULES] = { "vision", "projector", "language" };

/* ---- declaration ----------------------------------------------------------------------------- */

static bool module_frozen(const struct deck *deck, enum model_module module)
{
    switch (module) {
    case MODEL_VISION: return deck->derived.freeze_encoder;
    case MODEL_PROJECTOR: return deck->derived.freeze_projector;
    default: return deck->derived.freeze_language;
    }
}

static const struct grid *module_grid(const struct topology *topo, enum model_module module)
{
    return module == MODEL_LANGUAGE ? &topo->language : &topo->encoder;
}

int model_add_param(struct model *m, const struct param *p)
{
    if (m->n_params == m->param_capacity) {
        m->param_capacity = m->param_capacity ? 2 * m->param_capacity : 128;
        m->param = xrealloc(m->param, (size_t)m->param_capacity, sizeof *m->param);
    }
    struct param *q = &m->param[m->n_params];
    *q = *p;
    if (q->n_blocks == 0) {
        q->n_blocks = 1;
        q->block_rows[0] = q->shape[0];
    }
    q->trainable = !q->buffer && !module_frozen(m->deck, q->module);
    q->sum_tp =
        q->module == MODEL_LANGUAGE && q->shard == PARAM_REPLICATED && !q->expert && !q->buffer;
    q->master = q->m = q->v = tensor_1d(NULL, m->acc, PLACE_DEVICE, 0);
    return m->n_params++;
}

int model_add_matrix(struct model *m, const struct param *base, int64_t out, int64_t in,
                     enum param_shard shard, double std)
{
    struct param p = *base;
    p.ndim = 2;
    p.shape[0] = out;
    p.shape[1] = in;
    p.shard = shard;
    p.decay = true;
    p.init = RNG_NORMAL;
    p.init_scale = std;
    return model_add_param(m, &p);
}

int model_add_vector(struct model *m, const struct param *base, int64_t n, enum param_shard shard,
                     enum rng_init init, double scale)
{
    struct param p = *base;
    p.ndim = 1;
    p.shape[0] = n;
    p.shard = shard;
    p.decay = false;
    p.init = init;
    p.init_scale = scale;
    return model_add_param(m, &p);
}

struct param *model_param(struct model *m, int index)
{
    ASSERT(index >= 0 && index < m->n_params);
    return &m->param[index];
}

struct param *model_find_param(struct model *m, enum model_module module, const char *name)
{
    for (int i = 0; i < m->n_params; i++)
        if (m->param[i].module == module && strcmp(m->param[i].name, name) == 0)
            return &m->param[i];
    return NULL;
}

static void set_types(struct model *m)
{
    m->act = m->deck->derived.fp64 ? DTYPE_F64 : m->deck->derived.bf16 ? DTYPE_BF16 : DTYPE_F32;
    m->acc = m->deck->derived.fp64 ? DTYPE_F64 : DTYPE_F32;
}

static void declare(struct model *m)
{
    if (m->has_encoder)
        m->encoder = radio_init(m);
    if (m->has_language)
        m->language = language_init(m);
}

void model_init(struct model *m, const struct deck *deck, const struct topology *topo,
                const struct backend_ops *be, struct stream *compute)
{
    *m = (struct model){
        .deck = deck, .topo = topo, .be = be, .comm = comm_select(deck), .compute = compute
    };
    set_types(m);
    m->has_encoder = topo->encoder.member;
    m->has_language = topo->language.member;
    declare(m);
    m->ddp = ddp_init(m);
    m->has_tp_stream = topo->encoder.tp_size > 1 || topo->language.tp_size > 1;
    if (m->has_tp_stream) {
        be->stream_create(&m->tp, "tensor-parallel");
        be->event_create(&m->tp_event);
        be->event_create(&m->tp_gathered);
    }
}

void model_free(struct model *m)
{
    ddp_free(m->ddp);
    if (m->has_tp_stream) {
        m->be->event_destroy(&m->tp_event);
        m->be->event_destroy(&m->tp_gathered);
        m->be->stream_destroy(&m->tp);
    }
    radio_free(m->encoder);
    language_free(m->language);
    free(m->param);
    *m = (struct model){ 0 };
}

/* ---- memory ---------------------------------------------------------------------------------- */

void model_local_shape(const struct model *m, const struct param *p, int64_t shape[TENSOR_MAX_DIMS])
{
    const struct grid *g = module_grid(m->topo, p->module);
    memcpy(shape, p->shape, sizeof p->shape);
    if (p->expert)
        shape[0] /= g->ep_size;
    if (p->shard == PARAM_SPLIT_ROWS)
        shape[p->expert ? 1 : 0] /= p->expert ? g->expt_tp_size : g->tp_size;
    else if (p->shard == PARAM_SPLIT_COLS)
        shape[p->ndim - 1] /= p->expert ? g->expt_tp_size : g->tp_size;
}

int64_t model_param_numel(const struct model *m, const struct param *p)
{
    int64_t shape[TENSOR_MAX_DIMS], n = 1;
    model_local_shape(m, p, shape);
    for (int d = 0; d < p->ndim; d++)
        n *= shape[d];
    return n;
}

void model_plan(struct model *m, struct arenas *as)
{
    ddp_plan(m->ddp, as);
    const struct tensor scratch =
        arena_1d(&as->a[ARENA_WORKSPACE], "operations", DTYPE_U8, (int64_t)m->be->scratch_bytes);
    if (scratch.data)
        m->be->stream_scratch(m->compute, &scratch);
    for (int i = 0; i < m->n_params; i++) {
        struct param *p = &m->param[i];
        int64_t shape[TENSOR_MAX_DIMS];
        if (p->trainable)
            continue;
        model_local_shape(m, p, shape);
        p->value = arena_tensor(&as->a[ARENA_PARAMS], p->name, p->buffer ? m->acc : m->act, p->ndim,
                                shape);
    }
    if (m->has_encoder)
        radio_plan(m, m->encoder, as);
    if (m->has_language)
        language_plan(m, m->language, as);
}

struct tensor model_grad_buffer(struct model *m, bool language)
{
    const struct ddp_buffer *first = NULL;
    int64_t n = 0;
    for (int i = 0; i < m->ddp->n; i++) {
        const struct ddp_buffer *b = &m->ddp->buffer[i];
        if (b->language != language)
            continue;
        if (!first)
            first = b;
        n += b->numel; /* a multiple of the arena's alignment: buffers lie side by side */
    }
    return tensor_1d(first ? first->grad.data : NULL, m->acc, PLACE_DEVICE, n);
}

void model_zero_grads(struct model *m)
{
    for (int i = 0; i < m->n_params; i++)
        m->param[i].fresh = false;
    for (int language = 0; language < 2; language++) {
        const struct tensor g = model_grad_buffer(m, language);
        if (tensor_numel(&g) > 0)
            m->be->fill(m->compute, &g, 0.0);
    }
}

static void clear(struct model *m, const struct ddp_buffer *b, int64_t first, int64_t end)
{
    const struct tensor run = tensor_1d((char *)b->grad.data + (size_t)first * dtype_bytes(m->acc),
                                        m->acc, b->grad.place, end - first);
    if (end > first)
        m->be->fill(m->compute, &run, 0.0);
}

void model_begin_grads(struct model *m)
{
    for (int i = 0; i < m->ddp->n; i++) {
        const struct ddp_buffer *b = &m->ddp->buffer[i];
        int64_t end = 0; /* of what is zero already or need not be */
        for (int k = 0; k < b->n_slots; k++) {
            struct param *p = &m->param[b->slot[k].param];
            p->fresh = p->products;
            if (!p->fresh)
                continue;
            clear(m, b, end, b->slot[k].start);
            end = b->slot[k].start + b->slot[k].numel;
        }
        clear(m, b, end, b->numel);
    }
}

/* ---- initial values -------------------------------------------------------------------------- */

/* Full row (dimension 0) of local row r of a tensor whose rows are cut block by block over `size`
 * ranks. */
static int64_t full_row(const struct param *p, int64_t r, int size, int rank)
{
    int64_t first = 0;
    for (int b = 0; b < p->n_blocks; b++) {
        const int64_t part = p->block_rows[b] / size;
        if (r < part)
            return first + rank * part + r;
        r -= part;
        first += p->block_rows[b];
    }
    FATAL(EXIT_INTERNAL, "parameter %s: row outside its blocks", p->name);
}

uint64_t model_full_index(const struct model *m, const struct param *p, int64_t row, int64_t col)
{
    const struct grid *g = module_grid(m->topo, p->module);
    int64_t full_cols = 1;
    for (int d = 1; d < p->ndim; d++)
        full_cols *= p->shape[d];
    const int64_t size = p->expert ? g->expt_tp_size : g->tp_size,
                  rank = p->expert ? g->expt_tp_rank : g->tp_rank;
    if (p->expert)
        row += g->ep_rank * (p->shape[0] / g->ep_size);
    if (p->shard == PARAM_SPLIT_ROWS && p->expert)
        col += rank * (full_cols / size);
    else if (p->shard == PARAM_SPLIT_ROWS)
        row = full_row(p, row, g->tp_size, g->tp_rank);
    if (p->shard == PARAM_SPLIT_COLS) {
        const int64_t width = p->shape[p->ndim - 1], part = width / size;
        col = col / part * width + rank * part + col % part;
    }
    return (uint64_t)(row * full_cols + col);
}

/* Of element (0, 0) of line i: lines are what lies along the last dimension. */
static uint64_t line_index(const struct model *m, const struct param *p, int64_t i)
{
    const int64_t lines = p->ndim > 2 ? p->value.shape[1] : 1;
    return model_full_index(m, p, i / lines, i % lines * p->value.shape[p->ndim - 1]);
}

/* Runs of lines at equal distances in the full tensor are one operation. */
static void initialise_param(struct model *m, struct param *p)
{
    char purpose[160];
    snprintf(purpose, sizeof purpose, "init:%s.%s", model_module_names[p->module], p->name);
    const struct rng_key key = rng_key((uint64_t)m->deck->run.seed, purpose);
    const int64_t cols = p->ndim > 1 ? p->value.shape[p->ndim - 1] : 1;
    const int64_t lines = tensor_numel(&p->value) / (cols ? cols : 1);
    const struct tensor all = tensor_2d(p->value.data, p->value.dtype, p->value.place, lines, cols);
    for (int64_t first = 0, end; first < lines; first = end) {
        const uint64_t base = line_index(m, p, first);
        const uint64_t stride = first + 1 < lines ? line_index(m, p, first + 1) - base : 0;
        for (end = first + 1; end < lines; end++)
            if (line_index(m, p, end) != base + (uint64_t)(end - first) * stride)
                break;
        const struct tensor run = tensor_row_range(&all, first, end - first);
        m->be->initialise(m->compute, p->init, p->init_scale, key, base, stride, &run);
    }
}

void model_initialise(struct model *m)
{
    for (int i = 0; i < m->n_params; i++) {
        initialise_param(m, &m->param[i]);
        log_beat();
    }
    m->be->stream_sync(m->compute);
}

/* ---- the whole model ------------------------------------------------------------------------- */

void model_describe(struct model *m, struct topology *topo, const struct deck *deck)
{
    const bool encoder = deck->topology.layout != DECK_LAYOUT_LANGUAGE_ONLY;
    struct grid one = { .tp_size = 1,
                        .cp_size = 1,
                        .dp_size = 1,
                        .pp_size = 1,
                        .ep_size = 1,
                        .expt_tp_size = 1,
                        .expt_dp_size = 1,
                        .member = true,
                        .present = true };
    *topo = (struct topology){ .size = 1, .layout = deck->topology.layout, .language = one };
    if (encoder)
        topo->encoder = one;
    *m = (struct model){ .deck = deck, .topo = topo, .has_encoder = encoder, .has_language = true };
    set_types(m);
    declare(m);
}

struct model_counts model_count(const struct deck *deck)
{
    struct topology topo;
    struct model m;
    struct model_counts c = { 0 };
    int64_t idle_experts = 0, embedding = 0;
    model_describe(&m, &topo, deck);
    for (int i = 0; i < m.n_params; i++) {
        const struct param *p = &m.param[i];
        int64_t n = 1;
        for (int d = 0; d < p->ndim; d++)
            n *= p->shape[d];
        if (p->buffer)
            continue;
        *(p->module == MODEL_VISION      ? &c.vision
          : p->module == MODEL_PROJECTOR ? &c.projector
                                         : &c.language) += n;
        if (p->expert)
            idle_experts +=
                n / deck->moe.num_experts * (deck->moe.num_experts - deck->moe.moe_router_topk);
        if (strcmp(p->name, "embedding.word_embeddings.weight") == 0)
            embedding = n;
    }
    c.language_active = c.language - idle_experts;
    c.language_active_no_embedding = c.language_active - embedding;
    c.total = c.vision + c.projector + c.language;
    model_free(&m);
    return c;
}

int64_t model_take_gemm_flops(struct model *m)
{
    const int64_t n = m->gemm_flops;
    m->gemm_flops = 0;
    return n;
}

struct tensor model_tokens_per_expert(struct model *m, int moe_layer)
{
    return moe_tokens_per_expert(language_moe(m->language, moe_layer));
}

struct tensor model_last_choice(struct model *m, int moe_layer)
{
    return moe_last_choice(language_moe(m->language, moe_layer));
}

struct param *model_expert_bias(struct model *m, int moe_layer)
{
    return moe_expert_bias(m, language_moe(m->language, moe_layer));
}
