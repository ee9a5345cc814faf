/* model.h - the model of this rank: parameter table, modules, one forward and one backward per
 * module and micro-batch.
 *
 * Glossary of the letters in shape comments (model.md 0.2):
 *   language   B samples of a micro-batch, S sequence length, T = B*S tokens, H width,
 *              V vocabulary, Vp padded vocabulary, L layers of the pattern
 *   attention  n query heads, g KV groups, d head width
 *   Mamba-2    mh heads of width P, Di = mh*P, G groups, N state, W taps, Q chunk
 *   experts    E experts, K chosen for a token, F expert width, Fs shared-expert width
 *   vision     p patch size, c class tokens, Wv width, hv heads, Fv MLP width, P_ patches,
 *              R = P_ + c*tiles rows, N_img picture embeddings
 *   ranks      t tensor-parallel ones: [T/t,H] is this rank's part
 * Gradients are d + name. Activations are batch-major [B,S,...] = [T,...].
 *
 * A parameter tensor is declared once (struct param); allocation, initialisation, gradient
 * reduction, optimizer and checkpoint iterate the table. Modules: 0 vision (encoder), 1 projector,
 * 2 language.
 */
#ifndef MIMO_MODEL_H
#define MIMO_MODEL_H

#include <stdbool.h>
#include "arena.h"
#include "backend.h"
#include "data.h"
#include "deck.h"
#include "rng.h"
#include "topology.h"

enum model_module { MODEL_VISION, MODEL_PROJECTOR, MODEL_LANGUAGE, MODEL_MODULES };
/* "vision", "projector", "language": HDF5 groups */
extern const char *const model_module_names[MODEL_MODULES];

/* How the full (logical) tensor is cut over tensor-parallel ranks. */
enum param_shard { PARAM_REPLICATED, PARAM_SPLIT_ROWS, PARAM_SPLIT_COLS };

enum { PARAM_MAX_BLOCKS = 5 };

struct param {
    char name[96]; /* as in model.md 1.2 / 2.1, below its module */
    enum model_module module;
    int ndim;
    int64_t shape[TENSOR_MAX_DIMS]; /* full, logical */
    enum param_shard shard;
    /* split rows of several blocks (in_proj z x B C dt): each block is cut on its own; else 1 */
    int n_blocks;
    int64_t block_rows[PARAM_MAX_BLOCKS]; /* full rows of each block; sum = shape[0] */
    bool expert;                          /* expert-parallel: reduced over expt_dp */
    bool decay;                           /* weight decay: ndim > 1 and no bias */
    bool trainable;                       /* and has gradient, master and moments on this rank */
    bool buffer;                          /* no gradient ever, kept in acc (expert_bias) */
    bool products; /* its gradient is a sum of matrix products and nothing else */
    bool fresh;    /* its gradient is zero, but not in memory: the next product overwrites it */
    /* replicated but fed with sequence-parallel rows: gradients are summed over language tp */
    bool sum_tp;
    /* of rng.h: a function of (seed, name, global element index) only */
    enum rng_init init;
    double init_scale;   /* standard deviation or half-width */
    struct tensor value; /* act (buffer: acc), this rank's shard */
    /* acc; data = NULL when not trainable. Views of the buffers of ddp.h, both. */
    struct tensor grad;
    /* acc [n], what this rank updates of its shard; n = 0 when nothing. Set by optim_plan. */
    struct tensor master, m, v;
    int64_t owned; /* these are the shard's elements [owned, owned + n) */
};

struct language; /* language.c */
struct encoder;  /* radio.c */
struct ddp;      /* ddp.h */

struct model {
    const struct deck *deck;
    const struct topology *topo;
    const struct backend_ops *be;
    struct stream *compute;
    const struct comm_ops *comm;
    struct ddp *ddp; /* buffers of gradients and trainable values */
    /* of parameters and activations; of statistics, gradients and masters */
    enum dtype act, acc;
    /* of tensor-parallel messages that overlap compute; tp > 1 only: see linear.h */
    struct stream tp;
    struct event tp_event, tp_gathered;
    /* [T,H] workspace of the sequence-parallel regions (linear.h); language tp > 1 only */
    struct tensor gathered, partial;
    bool has_encoder, has_language, has_tp_stream;
    struct param *param; /* [n_params] of this rank, in registration order */
    int n_params, param_capacity;
    struct encoder *encoder;
    struct language *language;
    int n_moe;          /* E layers */
    int64_t gemm_flops; /* counted by the layers since the last take */
};

/* Declare parameters and layers of the modules this rank holds. Pure function of (deck, topology):
 * any rank of any job can be described without allocating: a deck for another backend is counted
 * through the reference table, sizes follow deck->derived. Local. */
void model_init(struct model *m, const struct deck *deck, const struct topology *topo,
                const struct backend_ops *be, struct stream *compute);
/* The parameter table of the whole model, as one rank would hold it; no memory, no buffers. Fills
 * topo to match; model_free frees. Local. */
void model_describe(struct model *m, struct topology *topo, const struct deck *deck);
/* This rank's part of the logical shape of p, and its elements. Local. */
void model_local_shape(const struct model *m, const struct param *p,
                       int64_t shape[TENSOR_MAX_DIMS]);
int64_t model_param_numel(const struct model *m, const struct param *p);
/* One walk over every tensor of the model: counting or carving (arena.h). Local. */
void model_plan(struct model *m, struct arenas *arenas);
/* Initial values of every parameter. Local. */
void model_initialise(struct model *m);
/* Number of parameters of the full model, without duplicates: total per module; active = per token.
 * Local, from the deck. */
struct model_counts {
    int64_t vision, projector, language, language_active, language_active_no_embedding, total;
};
struct model_counts model_count(const struct deck *deck);
void model_free(struct model *m);

/* A new parameter of this rank; returns its index. For the modules' own files. n_blocks = 0 means
 * one block; trainable follows the freezing of its module. _matrix: [out,in], N(std), decayed.
 * _vector: [n], not decayed. Local. */
int model_add_param(struct model *m, const struct param *p);
int model_add_matrix(struct model *m, const struct param *base, int64_t out, int64_t in,
                     enum param_shard shard, double std);
int model_add_vector(struct model *m, const struct param *base, int64_t n, enum param_shard shard,
                     enum rng_init init, double scale);
struct param *model_param(struct model *m, int index);
/* NULL when absent */
struct param *model_find_param(struct model *m, enum model_module module, const char *name);

/* Index in the full tensor of element (row, col) of this rank's shard, rows counted over dimension
 * 0. Local. */
uint64_t model_full_index(const struct model *m, const struct param *p, int64_t row, int64_t col);

/* ---- one micro-batch ------------------------------------------------------------------------- */

/* Encoder and projector on pictures; `slot` holds what backward needs. Returns the embeddings
 * [N_img, H], valid until the slot is used again; the same on every encoder tp rank. train:
 * position augmentation unless the encoder is frozen. Collective over encoder tp. */
struct tensor model_encoder_forward(struct model *m, int slot, const struct picture_batch *pictures,
                                    bool train);
/* d_embedding [N_img, H] act, the same on every encoder tp rank. Accumulates parameter gradients.
 * Collective over encoder tp. */
void model_encoder_backward(struct model *m, int slot, const struct tensor *d_embedding);
/* Language module on tokens and picture embeddings [image_rows, H]; adds the micro-batch's loss sum
 * to model_loss_sum. train: counts tokens per expert, computes the auxiliary loss and keeps what
 * backward needs. `image` is read on tp rank 0 only. Collective over language tp and ep. */
void model_language_forward(struct model *m, int slot, const struct text_batch *text,
                            const struct tensor *image, bool train);
/* Its two halves. load: the micro-batch's ids, labels, mask and maps to the device. compute: the
 * rest. compute and model_language_backward give the device the same commands for every micro-batch
 * without pictures: on one rank they can be captured once in a CUDA graph and replayed after each
 * load (tests/gpu/gpu_graph.c). */
void model_language_load(struct model *m, int slot, const struct text_batch *text,
                         const struct tensor *image);
void model_language_compute(struct model *m, int slot, const struct tensor *image, bool train);
/* Returns d of the picture embeddings [image_rows, H] (valid until the next call); data NULL when
 * not wanted or on tp ranks other than 0. Collective over language tp and ep. */
struct tensor model_language_backward(struct model *m, int slot, bool want_image_gradient);

/* ---- accumulators of an iteration, device scalars that the step reads once at its end; Local - */
/* acc [1] sum of loss*mask over micro-batches */
struct tensor model_loss_sum(struct model *m);
/* acc [T] per-token loss of the last micro-batch */
struct tensor model_token_loss(struct model *m);
/* lse [T] on the host: log-sum-exp of the last micro-batch; waits */
void model_token_lse(struct model *m, double *lse);
/* act [T, Vp/t] of this rank's words, until the backward pass has begun */
struct tensor model_logits(struct model *m);
/* acc [1] sum over E layers and micro-batches of aux/coeff */
struct tensor model_balance_metric(struct model *m);
/* I64 [E] dispatched since the last reset */
struct tensor model_tokens_per_expert(struct model *m, int moe_layer);
/* I32 [T,K] experts of the last micro-batch (tests) */
struct tensor model_last_choice(struct model *m, int moe_layer);
struct param *model_expert_bias(struct model *m, int moe_layer);
/* loss sum, metric; not the expert counts */
void model_zero_accumulators(struct model *m);
void model_zero_grads(struct model *m);
/* The same for backward passes that ddp_reduce follows: the memory of a gradient that is a sum of
 * products (param.products) is left to the first of these, which saves a pass that clears it and
 * one that reads it. Local. */
void model_begin_grads(struct model *m);
/* All gradients of one grid's trainable parameters on this rank as one flat acc tensor (alignment
 * gaps hold zeros); numel 0 when none. language = false: vision and projector. For the
 * data-parallel reduction. Local. */
struct tensor model_grad_buffer(struct model *m, bool language);
int64_t model_take_gemm_flops(struct model *m);

#endif
