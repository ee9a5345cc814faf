/* radio.c - RADIO vision transformer and projector of one rank (model.md 2):
 *
 *   e = patches W_emb^T + position encoding
 *   x_0 = per tile [class tokens ; e]
 *   x <- x + Attn(LN1(x)) W_o^T + b_o                (attention inside a tile, not causal)
 *   x <- x + gelu(LN2(x) W1^T + b1) W2^T + b2
 *   f = pixel shuffle of the patch rows of LN(x_L)
 *   E = projector(f)
 *
 * The tiles of a micro-batch are one ragged batch. Positions are a sparse gather from the position
 * grid; class-token removal and pixel shuffle are one row gather (vit_map.h). Over encoder tp the
 * heads and the MLP are cut and every activation outside attention and MLP is the same on all ranks
 * (replicated.h). While the encoder trains, every block of every micro-batch in flight keeps its
 * tensors; a frozen encoder reuses one set, its output is a constant, it never uses the position
 * augmentation, and backward stops at the projector.
 */
#include "radio.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ddp.h"
#include "linear.h"
#include "projector.h"
#include "replicated.h"
#include "timer.h"
#include "vit_map.h"

enum { RADIO_SLOTS = 2 }; /* micro-batches in flight at most: two stages */

struct radio_block { /* parameter indices */
    int ln1_w, ln1_b, qkv_w, qkv_b, proj_w, proj_b, ln2_w, ln2_b, fc1_w, fc1_b, fc2_w, fc2_b;
};

struct radio_kept {                       /* of one block and micro-batch */
    struct tensor x;                      /* [R,Wv] input */
    struct tensor mid;                    /* [R,Wv] after attention */
    struct tensor mean1, rs1, mean2, rs2; /* acc [R] */
    struct tensor qkv, o;                 /* [R,3Wv/t], [R,Wv/t] */
    struct tensor lse;                    /* acc [R,hv/t] */
    struct tensor h;                      /* [R,Fv/t] fc1 output before the activation */
};

struct radio_slot {
    int64_t tiles, patches, rows, outputs; /* of the micro-batch in the slot: n, P, R, N_img */
    int64_t max_len;                       /* rows of the largest tile */
    bool empty;
    struct tensor pixels;                /* [P,3pp] */
    struct tensor cu;                    /* I32 [n+1] over encoder rows */
    struct tensor row_source;            /* I32 [R] */
    struct tensor pos_index, pos_weight; /* I32, acc [P,4] */
    struct tensor out_rows, out_inverse; /* I32 [N*per], [R] */
    struct radio_kept *kept;             /* [L] while training, else [1] */
    struct tensor x_last, normed;        /* [R,Wv] last block's output, final LayerNorm */
    struct tensor mean, rs;              /* acc [R] */
    struct tensor features;              /* [N,per*Wv] */
    struct tensor embedding;             /* [N,H] */
    struct projector_kept projector;
    struct tensor host_tiles; /* I32 [n,2] height, width in patches */
    /* what is copied to the device */
    struct tensor host_cu, host_source, host_index, host_weight, host_rows, host_inverse;
};

struct encoder {
    int64_t width, ffn, patch_in;              /* Wv, Fv, 3pp */
    int heads;                                 /* of this rank: hv/t */
    int head_dim, n_blocks, class_tokens, per; /* per = patches of one embedding: 4 or 1 */
    int grid_h, grid_w;
    double eps;
    bool trains, final_norm;
    int class_token, positions, embedder, final_w, final_b; /* parameter indices */
    struct radio_block *block;                              /* [L] */
    struct projector *projector;
    struct radio_slot slot[RADIO_SLOTS];
    int n_slots;
    int64_t max_rows, max_outputs;
    struct tensor e;                    /* [P,Wv] temporary */
    struct replicated_columns gathered; /* of the embedder's output */
    struct tensor u, a;                 /* [R,Wv], [R,Fv/t] temporaries */
    struct tensor work;                 /* U8: attention's scratch */
    struct tensor du, d_o, dqkv, da;    /* [R,Wv], [R,Wv/t], [R,3Wv/t], [R,Fv/t] temporaries */
    struct tensor dx, dnormed;          /* [R,Wv] */
    struct tensor dfeatures;            /* [N,per*Wv] */
};

/* ---- declaration ----------------------------------------------------------------------------- */

static int add_vector(struct model *m, const char *prefix, const char *name, int64_t n,
                      enum param_shard shard, enum rng_init init)
{
    struct param p = { .module = MODEL_VISION };
    snprintf(p.name, sizeof p.name, "%s%s", prefix, name);
    return model_add_vector(m, &p, n, shard, init, 0.0);
}

static int add_matrix(struct model *m, const char *prefix, const char *name, int64_t out,
                      int64_t in, enum param_shard shard, double std)
{
    struct param p = { .module = MODEL_VISION };
    snprintf(p.name, sizeof p.name, "%s%s", prefix, name);
    return linear_add(m, &p, out, in, shard, std);
}

/* sigma and sigma/sqrt(L) are the language model's values (model.md 2.1). */
static void declare_block(struct model *m, struct encoder *v, int i)
{
    const double sigma = m->deck->language.init_method_std,
                 so = sigma / sqrt((double)m->deck->derived.num_layers);
    const int64_t w = v->width, f = v->ffn;
    struct radio_block *b = &v->block[i];
    char p[32];
    snprintf(p, sizeof p, "decoder.layers.%d.", i);
    b->ln1_w = add_vector(m, p, "self_attention.linear_qkv.layer_norm_weight", w, PARAM_REPLICATED,
                          RNG_ONES);
    b->ln1_b = add_vector(m, p, "self_attention.linear_qkv.layer_norm_bias", w, PARAM_REPLICATED,
                          RNG_ZEROS);
    b->qkv_w =
        add_matrix(m, p, "self_attention.linear_qkv.weight", 3 * w, w, PARAM_SPLIT_ROWS, sigma);
    b->qkv_b =
        add_vector(m, p, "self_attention.linear_qkv.bias", 3 * w, PARAM_SPLIT_ROWS, RNG_ZEROS);
    b->proj_w = add_matrix(m, p, "self_attention.linear_proj.weight", w, w, PARAM_SPLIT_COLS, so);
    b->proj_b = add_vector(m, p, "self_attention.linear_proj.bias", w, PARAM_REPLICATED, RNG_ZEROS);
    b->ln2_w = add_vector(m, p, "mlp.linear_fc1.layer_norm_weight", w, PARAM_REPLICATED, RNG_ONES);
    b->ln2_b = add_vector(m, p, "mlp.linear_fc1.layer_norm_bias", w, PARAM_REPLICATED, RNG_ZEROS);
    b->fc1_w = add_matrix(m, p, "mlp.linear_fc1.weight", f, w, PARAM_SPLIT_ROWS, sigma);
    b->fc1_b = add_vector(m, p, "mlp.linear_fc1.bias", f, PARAM_SPLIT_ROWS, RNG_ZEROS);
    b->fc2_w = add_matrix(m, p, "mlp.linear_fc2.weight", w, f, PARAM_SPLIT_COLS, so);
    b->fc2_b = add_vector(m, p, "mlp.linear_fc2.bias", w, PARAM_REPLICATED, RNG_ZEROS);
}

static void declare(struct model *m, struct encoder *v)
{
    const int64_t w = v->width;
    struct param c = { .module = MODEL_VISION, .name = "class_token" };
    v->class_token = model_add_matrix(m, &c, v->class_tokens, w, PARAM_REPLICATED, 1.0);
    struct param g = { .module = MODEL_VISION,
                       .name = "position_embeddings",
                       .ndim = 3,
                       .shape = { 1, (int64_t)v->grid_h * v->grid_w, w },
                       .decay = true,
                       .init = RNG_NORMAL,
                       .init_scale = 1.0 / sqrt((double)w) };
    v->positions = model_add_param(m, &g);
    v->embedder = add_matrix(m, "", "embedder.weight", w, v->patch_in, PARAM_SPLIT_ROWS, 1.0);
    for (int i = 0; i < v->n_blocks; i++)
        declare_block(m, v, i);
    v->final_w = v->final_b = -1;
    if (v->final_norm) {
        v->final_w =
            add_vector(m, "decoder.final_layernorm.", "weight", w, PARAM_REPLICATED, RNG_ONES);
        v->final_b =
            add_vector(m, "decoder.final_layernorm.", "bias", w, PARAM_REPLICATED, RNG_ZEROS);
    }
}

struct encoder *radio_init(struct model *m)
{
    const struct deck *deck = m->deck;
    struct encoder *v = xcalloc(1, sizeof *v);
    v->width = deck->vision.hidden_size;
    v->ffn = deck->vision.ffn_hidden_size;
    v->patch_in = 3 * deck->vision.patch_dim * deck->vision.patch_dim;
    const int64_t t = m->topo->encoder.tp_size;
    ASSERT(deck->vision.num_attention_heads % t == 0 && deck->vision.ffn_hidden_size % t == 0);
    v->heads = (int)(deck->vision.num_attention_heads / t);
    v->head_dim = (int)(deck->vision.hidden_size / deck->vision.num_attention_heads);
    v->n_blocks = (int)deck->vision.num_layers;
    v->class_tokens = (int)deck->vision.class_token_len;
    v->per = deck->vision.pixel_shuffle ? 4 : 1;
    v->grid_h = (int)(deck->vision.max_img_h / deck->vision.patch_dim);
    v->grid_w = (int)(deck->vision.max_img_w / deck->vision.patch_dim);
    v->eps = 1e-6;
    v->trains = !deck->derived.freeze_encoder;
    v->final_norm = deck->vision.final_layernorm;
    v->n_slots = m->topo->layout == DECK_LAYOUT_DISJOINT ? RADIO_SLOTS : 1;
    v->block = xcalloc((size_t)v->n_blocks, sizeof *v->block);
    declare(m, v);
    v->projector = projector_init(m, v->per * v->width);
    for (int s = 0; s < v->n_slots; s++)
        v->slot[s].kept = xcalloc((size_t)v->n_blocks + 1, sizeof *v->slot[s].kept);
    return v;
}

void radio_free(struct encoder *v)
{
    if (!v)
        return;
    for (int s = 0; s < v->n_slots; s++)
        free(v->slot[s].kept);
    projector_free(v->projector);
    free(v->block);
    free(v);
}

/* ---- memory ---------------------------------------------------------------------------------- */

static void plan_kept(struct model *m, struct encoder *v, struct arena *acts, struct radio_kept *k,
                      int64_t rows)
{
    const int64_t t = m->topo->encoder.tp_size;
    k->x = arena_2d(acts, "radio.x", m->act, rows, v->width);
    k->mid = arena_2d(acts, "radio.mid", m->act, rows, v->width);
    k->mean1 = arena_1d(acts, "radio.mean1", m->acc, rows);
    k->rs1 = arena_1d(acts, "radio.rs1", m->acc, rows);
    k->mean2 = arena_1d(acts, "radio.mean2", m->acc, rows);
    k->rs2 = arena_1d(acts, "radio.rs2", m->acc, rows);
    k->qkv = arena_2d(acts, "radio.qkv", m->act, rows, 3 * v->width / t);
    k->o = arena_2d(acts, "radio.o", m->act, rows, v->width / t);
    k->lse = arena_2d(acts, "radio.lse", m->acc, rows, v->heads);
    k->h = arena_2d(acts, "radio.h", m->act, rows, v->ffn / t);
}

static void plan_maps(struct model *m, struct encoder *v, struct arenas *as, struct radio_slot *s,
                      int64_t patches, int64_t tiles, int64_t rows, int64_t outputs)
{
    struct arena *acts = &as->a[ARENA_ACTIVATIONS], *data = &as->a[ARENA_DATA];
    s->cu = arena_1d(acts, "radio.cu", DTYPE_I32, tiles + 1);
    s->row_source = arena_1d(acts, "radio.row_source", DTYPE_I32, rows);
    s->pos_index = arena_2d(acts, "radio.pos_index", DTYPE_I32, patches, 4);
    s->pos_weight = arena_2d(acts, "radio.pos_weight", m->acc, patches, 4);
    s->out_rows = arena_1d(acts, "radio.out_rows", DTYPE_I32, outputs * v->per);
    s->out_inverse = arena_1d(acts, "radio.out_inverse", DTYPE_I32, rows);
    s->host_tiles = arena_2d(data, "radio.host_tiles", DTYPE_I32, tiles, 2);
    s->host_cu = arena_1d(data, "radio.host_cu", DTYPE_I32, tiles + 1);
    s->host_source = arena_1d(data, "radio.host_source", DTYPE_I32, rows);
    s->host_index = arena_2d(data, "radio.host_index", DTYPE_I32, patches, 4);
    s->host_weight = arena_2d(data, "radio.host_weight", DTYPE_F64, patches, 4);
    s->host_rows = arena_1d(data, "radio.host_rows", DTYPE_I32, outputs * v->per);
    s->host_inverse = arena_1d(data, "radio.host_inverse", DTYPE_I32, rows);
}

static void plan_slot(struct model *m, struct encoder *v, struct arenas *as, struct radio_slot *s,
                      int64_t patches, int64_t tiles)
{
    struct arena *acts = &as->a[ARENA_ACTIVATIONS];
    const int64_t rows = v->max_rows, outputs = v->max_outputs;
    plan_maps(m, v, as, s, patches, tiles, rows, outputs);
    s->pixels = arena_2d(acts, "radio.pixels", m->act, patches, v->patch_in);
    const int n = v->trains ? v->n_blocks : 1;
    for (int i = 0; i < n; i++)
        plan_kept(m, v, acts, &s->kept[i], rows);
    s->x_last = arena_2d(acts, "radio.x_last", m->act, rows, v->width);
    s->normed = arena_2d(acts, "radio.normed", m->act, rows, v->width);
    s->mean = arena_1d(acts, "radio.mean", m->acc, rows);
    s->rs = arena_1d(acts, "radio.rs", m->acc, rows);
    s->features = arena_2d(acts, "radio.features", m->act, outputs, v->per * v->width);
    s->embedding =
        arena_2d(acts, "radio.embedding", m->act, outputs, m->deck->language.hidden_size);
}

void radio_plan(struct model *m, struct encoder *v, struct arenas *as)
{
    const struct data_limits lim = data_limits(m->deck);
    const int64_t samples = m->deck->derived.encoder_microbatch;
    const int64_t patches = samples * lim.max_patches_per_sample,
                  tiles = samples * lim.max_tiles_per_sample;
    const int64_t t = m->topo->encoder.tp_size;
    struct arena *work = &as->a[ARENA_WORKSPACE];
    struct projector_kept kept[RADIO_SLOTS];
    v->max_rows = patches + v->class_tokens * tiles;
    v->max_outputs = patches / v->per;
    for (int s = 0; s < v->n_slots; s++)
        plan_slot(m, v, as, &v->slot[s], patches, tiles);
    const size_t mark = arena_mark(work);
    v->e = arena_2d(work, "radio.e", m->act, patches, v->width);
    replicated_plan(m, &v->gathered, work, patches, v->width);
    v->u = arena_2d(work, "radio.u", m->act, v->max_rows, v->width);
    v->a = arena_2d(work, "radio.a", m->act, v->max_rows, v->ffn / t);
    v->work = arena_1d(work, "radio.attention", DTYPE_U8,
                       m->be->attention_work(v->max_rows, tiles,
                                             lim.max_patches_per_sample + v->class_tokens, v->heads,
                                             v->heads, v->head_dim, false));
    if (v->trains) {
        v->du = arena_2d(work, "radio.du", m->act, v->max_rows, v->width);
        v->d_o = arena_2d(work, "radio.do", m->act, v->max_rows, v->width / t);
        v->dqkv = arena_2d(work, "radio.dqkv", m->act, v->max_rows, 3 * v->width / t);
        v->da = arena_2d(work, "radio.da", m->act, v->max_rows, v->ffn / t);
        v->dx = arena_2d(work, "radio.dx", m->act, v->max_rows, v->width);
        v->dnormed = arena_2d(work, "radio.dnormed", m->act, v->max_rows, v->width);
        v->dfeatures = arena_2d(work, "radio.dfeatures", m->act, v->max_outputs, v->per * v->width);
    }
    projector_plan(m, v->projector, as, v->max_outputs, kept, v->n_slots);
    for (int s = 0; s < v->n_slots; s++)
        v->slot[s].projector = kept[s];
    arena_rewind(work, mark);
}

/* ---- forward --------------------------------------------------------------------------------- */

static void upload(struct model *m, const struct tensor *host, const struct tensor *device,
                   int64_t rows)
{
    const struct tensor from = tensor_first(host, rows), to = tensor_first(device, rows);
    if (host->dtype == device->dtype)
        m->be->copy(m->compute, &from, &to);
    else
        m->be->cast(m->compute, &from, &to);
}

/* Row maps and position weights of the micro-batch: host arithmetic, then copies. */
static void load_pictures(struct model *m, struct encoder *v, struct radio_slot *s,
                          const struct picture_batch *p, bool augment)
{
    const int64_t patch = m->deck->vision.patch_dim, n = p->tiles;
    int32_t(*tile)[2] = s->host_tiles.data, *index = s->host_index.data;
    double *weight = s->host_weight.data;
    ASSERT(n <= tensor_rows(&s->host_tiles) && p->patches <= tensor_rows(&s->pixels));
    for (int64_t i = 0; i < n; i++)
        for (int side = 0; side < 2; side++)
            tile[i][side] = (int32_t)(p->tile_size[i][side] / patch);
    const int32_t(*sizes)[2] = (const int32_t(*)[2])tile;
    s->tiles = n;
    s->patches = vit_map_patches(sizes, n);
    s->rows = vit_map_rows(sizes, n, v->class_tokens);
    s->outputs = vit_map_outputs(sizes, n, v->class_tokens, true, v->per == 4);
    ASSERT(s->patches == p->patches && s->outputs == p->rows && s->rows <= v->max_rows);
    s->max_len = vit_map_cu(sizes, n, v->class_tokens, s->host_cu.data);
    for (int64_t i = 0, patches = 0; i < n; i++) {
        vit_map_positions(tile[i][0], tile[i][1], v->grid_h, v->grid_w, v->width,
                          augment ? p->cpe[i] : NULL, index + 4 * patches, weight + 4 * patches);
        patches += vit_map_patches(sizes + i, 1);
    }
    vit_map_sources(sizes, n, v->class_tokens, s->host_source.data);
    vit_map_output_rows(sizes, n, v->class_tokens, true, v->per == 4, s->host_rows.data);
    vit_map_invert(s->host_rows.data, s->outputs * v->per, s->rows, s->host_inverse.data);

    const struct tensor pixels = tensor_2d(p->pixels, m->deck->derived.fp64 ? DTYPE_F64 : DTYPE_F32,
                                           PLACE_HOST, p->patches, v->patch_in);
    upload(m, &pixels, &s->pixels, p->patches);
    upload(m, &s->host_cu, &s->cu, n + 1);
    upload(m, &s->host_source, &s->row_source, s->rows);
    upload(m, &s->host_index, &s->pos_index, s->patches);
    upload(m, &s->host_weight, &s->pos_weight, s->patches);
    upload(m, &s->host_rows, &s->out_rows, s->outputs * v->per);
    upload(m, &s->host_inverse, &s->out_inverse, s->rows);
}

static struct radio_kept *kept_of(const struct encoder *v, struct radio_slot *s, int i)
{
    return &s->kept[v->trains ? i : 0];
}

/* Views of the rows in use. */
static struct radio_kept kept_rows(const struct radio_kept *k, int64_t rows)
{
    return (struct radio_kept){ tensor_first(&k->x, rows),     tensor_first(&k->mid, rows),
                                tensor_first(&k->mean1, rows), tensor_first(&k->rs1, rows),
                                tensor_first(&k->mean2, rows), tensor_first(&k->rs2, rows),
                                tensor_first(&k->qkv, rows),   tensor_first(&k->o, rows),
                                tensor_first(&k->lse, rows),   tensor_first(&k->h, rows) };
}

static const struct tensor *value(struct model *m, int index)
{
    return &model_param(m, index)->value;
}

static void block_forward(struct model *m, struct encoder *v, struct radio_slot *s, int i,
                          const struct tensor *y)
{
    const struct backend_ops *be = m->be;
    const struct radio_block *b = &v->block[i];
    const struct radio_kept k = kept_rows(kept_of(v, s, i), s->rows);
    const struct tensor u = tensor_first(&v->u, s->rows), a = tensor_first(&v->a, s->rows),
                        cu = tensor_first(&s->cu, s->tiles + 1);
    ddp_use(m->ddp, DDP_ENCODER, b->fc2_b + 1);
    be->layernorm_forward(m->compute, &k.x, value(m, b->ln1_w), value(m, b->ln1_b), v->eps, &u,
                          &k.mean1, &k.rs1);
    linear_forward(m, model_param(m, b->qkv_w), &u, NULL, &k.qkv);
    be->add_bias(m->compute, value(m, b->qkv_b), &k.qkv);
    be->attention_forward(m->compute, &k.qkv, &cu, s->max_len, v->heads, v->heads, v->head_dim,
                          false, &v->work, &k.o, &k.lse);
    replicated_row_forward(m, model_param(m, b->proj_w), model_param(m, b->proj_b), &k.o, &k.x,
                           &k.mid);
    be->layernorm_forward(m->compute, &k.mid, value(m, b->ln2_w), value(m, b->ln2_b), v->eps, &u,
                          &k.mean2, &k.rs2);
    linear_forward(m, model_param(m, b->fc1_w), &u, NULL, &k.h);
    be->add_bias(m->compute, value(m, b->fc1_b), &k.h);
    be->activation_forward(m->compute, BACKEND_GELU, &k.h, &a);
    replicated_row_forward(m, model_param(m, b->fc2_w), model_param(m, b->fc2_b), &a, &k.mid, y);
}

/* A view of the position grid as a matrix [grid_h*grid_w, Wv]. */
static struct tensor as_matrix(const struct tensor *t)
{
    return tensor_2d(t->data, t->dtype, t->place, tensor_rows(t), tensor_cols(t));
}

struct tensor model_encoder_forward(struct model *m, int slot, const struct picture_batch *pictures,
                                    bool train)
{
    struct encoder *v = m->encoder;
    const struct backend_ops *be = m->be;
    ASSERT(slot >= 0 && slot < v->n_slots);
    struct radio_slot *s = &v->slot[slot];
    s->empty = pictures->tiles == 0;
    ddp_use(m->ddp, DDP_ENCODER, s->empty || v->n_blocks == 0 ? m->n_params : v->block[0].ln1_w);
    if (s->empty) {
        s->tiles = s->patches = s->rows = s->outputs = 0;
        return tensor_first(&s->embedding, 0);
    }
    load_pictures(m, v, s, pictures, train && v->trains && !m->deck->vision.force_cpe_eval_mode);
    const struct tensor pixels = tensor_first(&s->pixels, s->patches),
                        e = tensor_first(&v->e, s->patches);
    const struct tensor x0 = tensor_first(&kept_of(v, s, 0)->x, s->rows),
                        source = tensor_first(&s->row_source, s->rows);
    const struct tensor index = tensor_first(&s->pos_index, s->patches),
                        weight = tensor_first(&s->pos_weight, s->patches);
    const struct tensor grid = as_matrix(value(m, v->positions));
    replicated_gather_forward(m, &v->gathered, model_param(m, v->embedder), &pixels, &e);
    be->vit_assemble_forward(m->compute, &e, value(m, v->class_token), &grid, &source, &index,
                             &weight, &x0);

    const struct tensor x_last = tensor_first(&s->x_last, s->rows);
    for (int i = 0; i < v->n_blocks; i++) {
        const bool last = i == v->n_blocks - 1;
        const struct tensor y = last ? x_last : tensor_first(&kept_of(v, s, i + 1)->x, s->rows);
        timer_part(TIMER_ENCODER);
        block_forward(m, v, s, i, &y);
        timer_part(TIMER_NO_PART);
    }
    struct tensor normed = x_last;
    ddp_use(m->ddp, DDP_ENCODER, m->n_params);
    if (v->final_norm) {
        const struct tensor mean = tensor_first(&s->mean, s->rows),
                            rs = tensor_first(&s->rs, s->rows);
        normed = tensor_first(&s->normed, s->rows);
        be->layernorm_forward(m->compute, &x_last, value(m, v->final_w), value(m, v->final_b),
                              v->eps, &normed, &mean, &rs);
    }
    const struct tensor features = tensor_first(&s->features, s->outputs),
                        out = tensor_first(&s->embedding, s->outputs);
    const struct tensor pieces =
        tensor_2d(features.data, m->act, features.place, s->outputs * v->per, v->width);
    const struct tensor rows = tensor_first(&s->out_rows, s->outputs * v->per);
    be->gather_rows(m->compute, &normed, &rows, &pieces);
    timer_part(TIMER_PROJECTOR);
    projector_forward(m, v->projector, &s->projector, &features, &out);
    timer_part(TIMER_NO_PART);
    return out;
}

/* ---- backward -------------------------------------------------------------------------------- */

/* dx [R,Wv]: on entry the gradient of the block's output, on return of its input. */
static void block_backward(struct model *m, struct encoder *v, struct radio_slot *s, int i,
                           const struct tensor *dx)
{
    const struct backend_ops *be = m->be;
    struct stream *st = m->compute;
    const struct radio_block *b = &v->block[i];
    const struct radio_kept k = kept_rows(&s->kept[i], s->rows);
    const struct tensor u = tensor_first(&v->u, s->rows), a = tensor_first(&v->a, s->rows),
                        cu = tensor_first(&s->cu, s->tiles + 1);
    const struct tensor du = tensor_first(&v->du, s->rows), da = tensor_first(&v->da, s->rows);
    const struct tensor d_o = tensor_first(&v->d_o, s->rows),
                        dqkv = tensor_first(&v->dqkv, s->rows);

    be->bias_backward(st, dx, param_grad(model_param(m, b->fc2_b)));
    be->activation_forward(st, BACKEND_GELU, &k.h, &a);
    linear_backward(m, model_param(m, b->fc2_w), &a, dx, 0.0, &da);
    be->activation_backward(st, BACKEND_GELU, &k.h, &da, &da);
    be->bias_backward(st, &da, param_grad(model_param(m, b->fc1_b)));
    be->layernorm_forward(st, &k.mid, value(m, b->ln2_w), value(m, b->ln2_b), v->eps, &u, &k.mean2,
                          &k.rs2);
    replicated_column_backward(m, model_param(m, b->fc1_w), &u, &da, &du);
    be->layernorm_backward(st, &k.mid, value(m, b->ln2_w), &k.mean2, &k.rs2, &du, dx,
                           param_grad(model_param(m, b->ln2_w)),
                           param_grad(model_param(m, b->ln2_b)));

    be->bias_backward(st, dx, param_grad(model_param(m, b->proj_b)));
    linear_backward(m, model_param(m, b->proj_w), &k.o, dx, 0.0, &d_o);
    be->attention_backward(st, &k.qkv, &cu, s->max_len, v->heads, v->heads, v->head_dim, false,
                           &k.o, &k.lse, &d_o, &v->work, &dqkv);
    be->bias_backward(st, &dqkv, param_grad(model_param(m, b->qkv_b)));
    be->layernorm_forward(st, &k.x, value(m, b->ln1_w), value(m, b->ln1_b), v->eps, &u, &k.mean1,
                          &k.rs1);
    replicated_column_backward(m, model_param(m, b->qkv_w), &u, &dqkv, &du);
    be->layernorm_backward(st, &k.x, value(m, b->ln1_w), &k.mean1, &k.rs1, &du, dx,
                           param_grad(model_param(m, b->ln1_w)),
                           param_grad(model_param(m, b->ln1_b)));
}

/* From the gradient of the last block's output to the embedder, class tokens and position grid. */
static void blocks_backward(struct model *m, struct encoder *v, struct radio_slot *s,
                            const struct tensor *dx)
{
    for (int i = v->n_blocks - 1; i >= 0; i--) {
        timer_part(TIMER_ENCODER);
        block_backward(m, v, s, i, dx);
        timer_part(TIMER_NO_PART);
        ddp_ready(m->ddp, DDP_ENCODER, v->block[i].ln1_w);
    }
    const struct tensor pixels = tensor_first(&s->pixels, s->patches),
                        de = tensor_first(&v->e, s->patches);
    const struct tensor source = tensor_first(&s->row_source, s->rows),
                        index = tensor_first(&s->pos_index, s->patches);
    const struct tensor weight = tensor_first(&s->pos_weight, s->patches);
    const struct tensor dgrid = as_matrix(&model_param(m, v->positions)->grad);
    m->be->vit_assemble_backward(m->compute, dx, &source, &index, &weight, &de,
                                 param_grad(model_param(m, v->class_token)), &dgrid);
    replicated_gather_backward(m, model_param(m, v->embedder), &pixels, &de, NULL);
    ddp_ready(m->ddp, DDP_ENCODER, 0);
}

void model_encoder_backward(struct model *m, int slot, const struct tensor *d_embedding)
{
    struct encoder *v = m->encoder;
    const struct backend_ops *be = m->be;
    ASSERT(slot >= 0 && slot < v->n_slots);
    struct radio_slot *s = &v->slot[slot];
    ASSERT(tensor_rows(d_embedding) == s->outputs);
    if (s->empty) {
        ddp_ready(m->ddp, DDP_ENCODER, 0); /* it adds nothing to any gradient */
        return;
    }
    const struct tensor features = tensor_first(&s->features, s->outputs);
    timer_part(TIMER_PROJECTOR);
    if (!v->trains) {
        projector_backward(m, v->projector, &s->projector, &features, d_embedding, NULL);
        timer_part(TIMER_NO_PART);
        ddp_ready(m->ddp, DDP_ENCODER, 0);
        return;
    }
    const struct tensor dfeatures = tensor_first(&v->dfeatures, s->outputs),
                        dx = tensor_first(&v->dx, s->rows);
    projector_backward(m, v->projector, &s->projector, &features, d_embedding, &dfeatures);
    timer_part(TIMER_NO_PART);
    const struct tensor pieces =
        tensor_2d(dfeatures.data, m->act, dfeatures.place, s->outputs * v->per, v->width);
    const struct tensor inverse = tensor_first(&s->out_inverse, s->rows),
                        dnormed = tensor_first(&v->dnormed, s->rows);
    if (!v->final_norm) {
        be->gather_rows(m->compute, &pieces, &inverse, &dx);
    } else {
        const struct tensor x_last = tensor_first(&s->x_last, s->rows),
                            mean = tensor_first(&s->mean, s->rows),
                            rs = tensor_first(&s->rs, s->rows);
        be->gather_rows(m->compute, &pieces, &inverse, &dnormed);
        be->fill(m->compute, &dx, 0.0);
        be->layernorm_backward(m->compute, &x_last, value(m, v->final_w), &mean, &rs, &dnormed, &dx,
                               param_grad(model_param(m, v->final_w)),
                               param_grad(model_param(m, v->final_b)));
    }
    blocks_backward(m, v, s, &dx);
}
