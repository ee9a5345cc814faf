/* backend.h - every operation of the program on tensors, once, with its contract.
 *
 * A backend is one const struct backend_ops. Entries take views and a stream, never configuration
 * structs; they are asynchronous on that stream, deterministic, allocate nothing and never read a
 * device value on the host. A copy or cast from the host has read its source when it returns; one
 * to the host has written only once the stream or an event after it was waited for. Types: `act` is
 * the dtype of parameters and activations, `acc` that of statistics, router numbers, losses, main
 * gradients, masters and moments. ref fp32: act = acc = F32; ref fp64: act = acc = F64; cuda: act =
 * BF16 (or F32), acc = F32. Index tensors are I32, token ids I64. Unless said otherwise outputs are
 * overwritten; "+=" accumulates. Aliasing is allowed only where an entry says so. Letters: T
 * tokens, see model.h for the rest.
 *
 * Ragged batches: `cu` I32 [n+1] on the device are the first rows of n segments, cu[n] = rows in
 * all, max_len bounds every segment (host). Attention, convolution and scan never look across a
 * segment boundary. An unpacked micro-batch of B samples is B segments of S rows.
 */
#ifndef MIMO_BACKEND_H
#define MIMO_BACKEND_H

#include <stdbool.h>
#include "rng.h"
#include "tensor.h"

struct comm_pending; /* comm.h's */
struct stream {
    const char *name;
    void *native;
    /* communication on it may return before it is done: comm->drain */
    bool deferred;
    struct comm_pending *pending; /* what was started and not drained; owned by comm */
};
struct event {
    void *native;
};

/* relu(x)^2; fgelu of model.md 2.5 */
enum backend_activation { BACKEND_RELU2, BACKEND_GELU };
enum backend_grouped { BACKEND_GROUPED_NT, BACKEND_GROUPED_NN, BACKEND_GROUPED_TN };

typedef const struct tensor *in_t;  /* read */
typedef const struct tensor *out_t; /* written: the view is const, its memory is not */

struct backend_ops {
    const char *name; /* "ref" */
    enum dtype act, acc;
    /* operations return before they are done; else each is complete when it returns */
    bool asynchronous;
    /* temporaries of single operations on a stream that computes: see stream_scratch */
    size_t scratch_bytes;

    /* ---- memory ------------------------------------------------------------------------------ */
    /* device memory, 256-byte aligned; fatal when none */
    void *(*alloc)(size_t bytes);
    void (*release)(void *p);
    /* host memory, 256-byte aligned, that `copy` fills without waiting */
    void *(*alloc_host)(size_t bytes);
    void (*release_host)(void *p);
    /* bytes of the device; SIZE_MAX: unknown */
    void (*memory)(size_t *available, size_t *total);
    /* equal dtype and numel, any places, rows of any ld */
    void (*copy)(struct stream *s, in_t src, out_t dst);
    void (*fill)(struct stream *s, out_t t, double value); /* any dtype */
    /* dst = (dtype)src, round to nearest even; floats only */
    void (*cast)(struct stream *s, in_t src, out_t dst);
    /* t[r,c] = initial value base + r*stride + c (rng_initial_at), rounded to float and then to t's
     * type. Never inside a step. */
    void (*initialise)(struct stream *s, enum rng_init init, double scale, struct rng_key key,
                       uint64_t base, uint64_t stride, out_t t);

    /* ---- streams ----------------------------------------------------------------------------- */
    void (*stream_create)(struct stream *s, const char *name);
    void (*stream_destroy)(struct stream *s);
    /* Hands s its scratch, U8 [scratch_bytes] on the device; the caller keeps it alive. A stream
     * without one only copies, fills, communicates and waits. Call it before the first
     * operation. */
    void (*stream_scratch)(struct stream *s, in_t memory);
    /* host waits for s; not inside a step */
    void (*stream_sync)(struct stream *s);
    void (*event_create)(struct event *e);
    void (*event_destroy)(struct event *e);
    void (*event_record)(struct event *e, struct stream *s);
    /* s continues after what e recorded */
    void (*stream_wait)(struct stream *s, const struct event *e);
    /* host waits for what e recorded */
    void (*event_sync)(const struct event *e);
    /* Events that know when the device passed them, and seconds between two that it passed; by the
     * host's clock where operations are complete when they return. */
    void (*event_create_timed)(struct event *e);
    double (*event_seconds)(const struct event *from, const struct event *to);

    /* ---- dense ------------------------------------------------------------------------------- */
    /* d[m,n] = alpha * op(a) op(b) + beta * c, op = transpose if ta/tb; c may be d, NULL when beta
     * = 0; accumulation in acc. a, b act, or a acc (the router's gradient; as if b were widened);
     * c, d act or acc. Rows of any ld. m, n or k = 0 is legal. */
    void (*gemm)(struct stream *s, bool ta, bool tb, double alpha, in_t a, in_t b, double beta,
                 in_t c, out_t d);
    /* Experts e = 0..E-1 own rows offsets[e]..offsets[e+1] (I32 [E+1], device) of the row matrices;
     * w [E, out, in]. NT: c[rows, out] = a[rows, in] w_e^T     NN: c[rows, in] = a[rows, out] w_e
     * TN: w_e (here c [E, out, in], acc) = beta*w_e + a[rows, out]^T b[rows, in]. beta is 0 or 1,
     * in NT and NN 0. max_rows bounds offsets[E] (host). Empty experts are legal. */
    void (*grouped_gemm)(struct stream *s, enum backend_grouped mode, in_t a, in_t b, in_t offsets,
                         int64_t max_rows, double beta, out_t c);
    /* y += x; dtypes may differ */
    void (*add)(struct stream *s, in_t x, out_t y);
    void (*add_bias)(struct stream *s, in_t bias, out_t y); /* y[r,:] += bias */
    /* dbias (acc) += column sums */
    void (*bias_backward)(struct stream *s, in_t dy, out_t dbias);
    /* y may be x */
    void (*activation_forward)(struct stream *s, enum backend_activation f, in_t x, out_t y);
    /* dx may be dy */
    void (*activation_backward)(struct stream *s, enum backend_activation f, in_t x, in_t dy,
                                out_t dx);
    /* y = x*rs*w per row, rs = 1/sqrt(mean x^2 + eps); rs acc [rows]. model.md 1.4 */
    void (*rmsnorm_forward)(struct stream *s, in_t x, in_t w, double eps, out_t y, out_t rs);
    /* dx += (the gradient is added to what dx holds: the residual stream's); dw acc [width] +=,
     * NULL when frozen. */
    void (*rmsnorm_backward)(struct stream *s, in_t x, in_t w, in_t rs, in_t dy, out_t dx,
                             out_t dw);
    /* LayerNorm: mean and rs acc [rows]; dx +=, dw db acc +=, both NULL when frozen. */
    void (*layernorm_forward)(struct stream *s, in_t x, in_t w, in_t b, double eps, out_t y,
                              out_t mean, out_t rs);
    void (*layernorm_backward)(struct stream *s, in_t x, in_t w, in_t mean, in_t rs, in_t dy,
                               out_t dx, out_t dw, out_t db);
    /* qkv [T, (n+2g)d], rows grouped per KV group: n/g query heads, key, value (g = n: q k v of
     * each head). o [T, n*d]; lse acc [T, n] = log-sum-exp of the scaled scores. scale = 1/sqrt(d).
     * work: scratch of attention_work() bytes, U8. */
    void (*attention_forward)(struct stream *s, in_t qkv, in_t cu, int64_t max_len, int n, int g,
                              int d, bool causal, in_t work, out_t o, out_t lse);
    void (*attention_backward)(struct stream *s, in_t qkv, in_t cu, int64_t max_len, int n, int g,
                               int d, bool causal, in_t o, in_t lse, in_t do_, in_t work,
                               out_t dqkv);
    /* Scratch for `tokens` rows in at most `segments` segments of at most max_len rows, in bytes;
     * enough for both directions. */
    int64_t (*attention_work)(int64_t tokens, int64_t segments, int64_t max_len, int n, int g,
                              int d, bool causal);

    /* ---- rows -------------------------------------------------------------------------------- */
    /* out[i,:] = index[i] >= 0 ? in[index[i],:] : 0. */
    void (*gather_rows)(struct stream *s, in_t in, in_t index, out_t out);
    /* out[i,:] = sum over k of in[index[i,k],:] in order of k, accumulated in acc, rounded once;
     * beta 0 or 1: out = beta*out + sum. */
    void (*gather_sum_rows)(struct stream *s, in_t in, in_t index, double beta, out_t out);
    /* Text and pictures merged: out[t,:] = image_row[t] >= 0 ? image[image_row[t],:] (0 when image
     * is NULL) : (first <= ids[t] < first+rows(table) ? table[ids[t]-first,:] : 0). image_row I32
     * [T]. */
    void (*embed_merge_forward)(struct stream *s, in_t ids, in_t image_row, in_t table,
                                int64_t first, in_t image, out_t out);
    /* dimage[image_row[t],:] = dout[t,:] (NULL: not needed); dtable (acc; NULL when frozen) +=,
     * tokens in ascending order. */
    void (*embed_merge_backward)(struct stream *s, in_t ids, in_t image_row, in_t dout,
                                 int64_t first, out_t dtable, out_t dimage);

    /* ---- loss (vocabulary rows [first, first+cols) of Vp on this rank; the caller reduces mx,
     * then se and pl over tp) --- */
    /* mx = the row's largest logit, se = sum exp(logit-mx); acc [T]; -infinity and 0 without
     * columns. */
    void (*loss_sum)(struct stream *s, in_t logits, out_t mx, out_t se);
    /* mx the largest of all ranks' own, which loss_sum gave (mx itself on one rank): se *=
     * exp(own-mx); pl = logit[label]-mx, 0 when the label is not in this rank's rows. */
    void (*loss_label)(struct stream *s, in_t logits, in_t labels, int64_t first, in_t own, in_t mx,
                       out_t se, out_t pl);
    /* loss[t] = log(se)-pl (acc [T]); total acc [1] += sum loss*mask (mask acc [T]). */
    void (*loss_finish)(struct stream *s, in_t se, in_t pl, in_t mask, out_t loss, out_t total);
    /* logits become dlogits = (exp(logit-mx)/se - onehot) * mask, in place. */
    void (*loss_backward)(struct stream *s, in_t labels, int64_t first, in_t mx, in_t se, in_t mask,
                          out_t logits);

    /* ---- Mamba-2 (model.md 1.6) -------------------------------------------------------------- */
    /* Causal depthwise convolution of width W, then SiLU. x, y [T, C]; w act [C, W] (tap W-1 is the
     * current token), b [C]. */
    void (*conv_forward)(struct stream *s, in_t x, in_t w, in_t b, in_t cu, int64_t max_len,
                         out_t y);
    void (*conv_backward)(struct stream *s, in_t x, in_t w, in_t b, in_t cu, int64_t max_len,
                          in_t dy, out_t dx, out_t dw,
                          out_t db); /* dw db acc +=, NULL when frozen */
    /* Selective state space scan in chunks of Q. xbc [T, mh*P + 2GN] = x | B | C after the
     * convolution; dt act [T, mh] (raw); dt_bias, a_log, d_skip [mh]; y [T, mh*P] = scan + D x.
     * work: acc scratch of ssd_work() elements. */
    void (*ssd_forward)(struct stream *s, in_t xbc, in_t dt, in_t dt_bias, in_t a_log, in_t d_skip,
                        in_t cu, int64_t max_len, int heads, int head_dim, int groups, int state,
                        int chunk, in_t work, out_t y);
    /* dxbc, ddt overwritten; ddt_bias, da_log, dd_skip acc [mh] +=, NULL when frozen. Everything
     * else is recomputed. */
    void (*ssd_backward)(struct stream *s, in_t xbc, in_t dt, in_t dt_bias, in_t a_log, in_t d_skip,
                         in_t cu, int64_t max_len, int heads, int head_dim, int groups, int state,
                         int chunk, in_t dy, in_t work, out_t dxbc, out_t ddt, out_t ddt_bias,
                         out_t da_log, out_t dd_skip);
    /* Scratch for `tokens` rows in at most `segments` segments, in elements of acc; enough for both
     * directions. */
    int64_t (*ssd_work)(int64_t tokens, int64_t segments, int heads, int head_dim, int groups,
                        int state, int chunk);
    /* u = y*silu(z); o = u*rs*w, RMS over groups of width/groups; rs acc [T, groups]. */
    void (*gated_norm_forward)(struct stream *s, in_t y, in_t z, in_t w, int groups, double eps,
                               out_t o, out_t rs);
    void (*gated_norm_backward)(struct stream *s, in_t y, in_t z, in_t w, int groups, in_t rs,
                                in_t do_, out_t dy, out_t dz,
                                out_t dw); /* dw acc +=, NULL when frozen */

    /* ---- mixture of experts (model.md 1.8) --------------------------------------------------- */
    /* logits acc [T,E] -> scores acc [T,E] = sigmoid; expert I32 [T,K] ascending by expert index,
     * the top-K of score+bias (ties: the lower index); prob acc [T,K] = scaling * score / (sum +
     * 1e-20). bias acc [E] or NULL. given: expert is not chosen but read, ascending in a row. */
    void (*router_forward)(struct stream *s, in_t logits, in_t bias, double scaling, bool given,
                           out_t scores, out_t expert, out_t prob);
    /* Sequence auxiliary loss; row r is a token of sequence (first_row + r)/seq_len, so a rank may
     * hold any run of rows of the B sequences. count I64 [B,E] = rows of sequence b here whose
     * top-K of the normalised scores (no bias) contains e; psum acc [B,E] = sum over rows here of
     * score/(sum scores + 1e-20). */
    void (*router_balance)(struct stream *s, in_t scores, int topk, int64_t first_row,
                           int64_t seq_len, out_t count, out_t psum);
    /* metric acc [1] += (1/B) sum_b E/(K*S^2) sum_e psum*count: this rank's part of the loss
     * without its coefficient; count is that of all ranks of the sequence, S = seq_len. */
    void (*router_balance_loss)(struct stream *s, in_t count, in_t psum, int topk, int64_t seq_len,
                                out_t metric);
    /* dlogits acc [T,E] from dprob acc [T,K] and, when count is not NULL, the injected dL/da =
     * coeff*E*count/(K*seq_len). */
    void (*router_backward)(struct stream *s, in_t scores, in_t expert, in_t prob, in_t dprob,
                            double scaling, in_t count, double coeff, int64_t first_row,
                            int64_t seq_len, out_t dlogits);
    /* Stable sort of the T*K copies by expert, then token. offsets I32 [E+1]; row_token I32 [T*K]
     * token of each sorted row; row_prob acc [T*K]; token_row I32 [T,K] sorted row of each copy;
     * tokens_per_expert I64 [E] += (NULL: not counted). */
    void (*moe_sort)(struct stream *s, in_t expert, in_t prob, out_t offsets, out_t row_token,
                     out_t row_prob, out_t token_row, out_t tokens_per_expert);
    /* Rows on their way to the rank that owns experts [first, first+n). all I32 [ranks,E+1]:
     * each rank's offsets as of moe_sort. It receives by (rank, expert, row) and wants (expert,
     * rank, row): offsets I32 [n+1] of the experts' wanted rows; order I32 [most] the received
     * row of each wanted one; inverse I32 [most] the other way. Rows from `most` on are left out
     * of both. */
    void (*dispatch_order)(struct stream *s, in_t all, int64_t first, out_t offsets, out_t order,
                           out_t inverse);
    /* dprob [T,K] = drow[token_row]. */
    void (*moe_unsort_prob)(struct stream *s, in_t drow, in_t token_row, out_t dprob);
    /* y = relu(h)^2 * prob[row]; backward: dh = 2 relu(h) dy prob, dprob[row] = sum_F relu(h)^2 dy,
     * and y once more for the gradient of the weights behind it (NULL: not needed). rows =
     * offsets[E]. dh may be dy. */
    void (*expert_act_forward)(struct stream *s, in_t h, in_t prob, out_t y);
    void (*expert_act_backward)(struct stream *s, in_t h, in_t prob, in_t dy, out_t dh, out_t dprob,
                                out_t y);
    /* Optional, NULL: backend_grouped_act_* composes them. Rows of all experts: offsets[E] = rows.
     * h = a w^T by experts, y = relu(h)^2 * prob[row]; a [rows, in], w [E, out, in], h and y [rows,
     * out]. */
    void (*grouped_act_forward)(struct stream *s, in_t a, in_t w, in_t offsets, in_t prob, out_t h,
                                out_t y);
    /* dy = a w by experts, then as expert_act_backward; a [rows, out], h, dh and y [rows, in]. dy
     * is kept nowhere and may or may not be rounded to act. */
    void (*grouped_act_backward)(struct stream *s, in_t a, in_t w, in_t offsets, in_t h, in_t prob,
                                 out_t dh, out_t dprob, out_t y);
    /* bias_e += rate * sign(mean(count) - count_e), then count = 0. bias acc [E], count I64 [E]. */
    void (*expert_bias_update)(struct stream *s, double rate, out_t bias, out_t count);

    /* ---- vision (model.md 2) ----------------------------------------------------------------- */
    /* Token rows of all tiles: row_source I32 [R]: >= 0 patch row of e, -1-j class token j. x[r,:]
     * = e[p,:] + sum_k pos_w[p,k] * grid[pos_index[p,k],:], the sum in acc and rounded to act
     * first; class rows get class_token[j,:]. pos_index I32 [P,4], pos_w acc [P,4]. */
    void (*vit_assemble_forward)(struct stream *s, in_t e, in_t class_token, in_t grid,
                                 in_t row_source, in_t pos_index, in_t pos_w, out_t x);
    void (*vit_assemble_backward)(struct stream *s, in_t dx, in_t row_source, in_t pos_index,
                                  in_t pos_w, out_t de, out_t dclass_token,
                                  out_t dgrid); /* dclass, dgrid acc += */

    /* ---- optimizer --------------------------------------------------------------------------- */
    /* total acc [1] +=; fp64 accumulation on ref */
    void (*sum_squares)(struct stream *s, in_t x, out_t total);
    void (*count_zeros)(struct stream *s, in_t x, out_t total); /* total I64 [1] += */
    /* total F64 [1] = x acc [n], added up in ascending order in fp64 */
    void (*sum_wide)(struct stream *s, in_t x, out_t total);
    /* Whether an iteration's update is made (parallel.md 7.2). numbers F64 [ranks, 1+M]: of each
     * rank its loss sum and the sum of squares of its gradients per module. Added up over the ranks
     * in order: loss = sum/max(tokens,1), norm = that of all modules' gradients times factor [M]
     * (host, read in the call). No update when the loss or a norm is not finite, or the norm is
     * above threshold (0: no threshold). result F64 [M+3]: what adamw takes as factor of each
     * module, clipped by min(1, clip/(norm+1e-6)) (clip 0: never), -1 for no update; loss; norm;
     * the first module with the worst norm (NaN before infinite) or -1. */
    void (*decide_update)(struct stream *s, in_t numbers, double tokens, const double *factor,
                          double clip, double threshold, out_t result);
    /* AdamW (parallel.md 7.3) on acc master, m, v [n]; g = grad*factor; param = (act)master. factor
     * F64 [1] on the device; negative: nothing is changed. step counts from 1. */
    void (*adamw)(struct stream *s, in_t grad, in_t factor, double lr, double beta1, double beta2,
                  double eps, double wd, int64_t step, out_t master, out_t m, out_t v, out_t param);
};

extern const struct backend_ops backend_ref_f32, backend_ref_f64;
/* act = BF16, F32; empty in a binary without CUDA (cuda/none.c). */
extern const struct backend_ops backend_cuda_bf16, backend_cuda_f32;
/* The same with operations that need not repeat bitwise where that is faster: run.deterministic =
 * .false. */
extern const struct backend_ops backend_cuda_bf16_any_order;
struct deck;
/* The table for a resolved deck (backend, precision). Local. */
const struct backend_ops *backend_select(const struct deck *deck);
/* The same table's types and sizes, with streams that do nothing: what counts memory where no GPU
 * is. Local. */
const struct backend_ops *backend_sizing(const struct deck *deck);
/* of the cuda tables */
extern const struct backend_ops backend_sizes_bf16, backend_sizes_bf16_any_order, backend_sizes_f32;
/* The table's optional entries, or the same made of its others. Local. */
void backend_grouped_act_forward(const struct backend_ops *be, struct stream *s, in_t a, in_t w,
                                 in_t offsets, in_t prob, out_t h, out_t y);
void backend_grouped_act_backward(const struct backend_ops *be, struct stream *s, in_t a, in_t w,
                                  in_t offsets, in_t h, in_t prob, out_t dh, out_t dprob, out_t y);
/* NULL when this binary has the CUDA backend, else one sentence for the user. Local. */
const char *backend_cuda_missing(void);
/* How many GPUs this process sees; 0 with one sentence in why when none can be used. Local. */
int backend_cuda_count(char *why, size_t why_size);
/* Takes that GPU for this process. False, with one sentence in why, when it has another compute
 * capability than 9.0, cannot be taken, or the libraries are too old. shared: other processes drive
 * it too, so that waiting hosts sleep. Local. */
bool backend_cuda_start(int gpu, bool shared, char *why, size_t why_size);
/* "SkylakeX", "Prescott", ...: what the BLAS chose, and whether the CPU has wider vectors than it
 * uses (`warning` gets one sentence or ""); backend_blas_start must be the first call of the
 * program: it restarts the process once with OPENBLAS_CORETYPE set when the library does not know
 * this CPU and would run several times slower. Local. */
void backend_blas_start(char **argv);
void backend_blas_threads(int n);
const char *backend_blas_core(char *warning, size_t size);

#endif
