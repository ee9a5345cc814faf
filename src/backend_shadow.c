/* backend_shadow.c - the shadow tables: every operation of backend.h run by the primary and by ref
 * fp32 on copies of its inputs, and compared. What is sampled of a large operation is chosen so
 * that the reference still sees whole sums: rows of what treats rows apart, columns of what treats
 * columns apart, blocks of a product's result, four experts, whole heads or groups of heads.
 */
#include "backend_shadow.h"
#include <math.h>
#include "backend_shadow_ops.h"
#include "cuda/cuda_sizes.h"

/* ---- memory ---- */

static bool dense(in_t t)
{
    return t->ld == tensor_cols(t) || tensor_rows(t) <= 1;
}

void backend_shadow_copy(struct stream *s, in_t src, out_t dst)
{
    const bool flat = dense(src) && dense(dst);
    const int64_t n = tensor_numel(src);
    const struct tensor from = tensor_1d(src->data, src->dtype, src->place, n),
                        to = tensor_1d(dst->data, dst->dtype, dst->place, n);
    BEGIN(copy, n);
    const struct shadow_pick cols = shadow_columns(&c, flat ? n : tensor_cols(dst));
    const in_t hsrc = shadow_in(&c, "src", flat ? &from : src, NULL, &cols);
    const out_t hdst = shadow_out(&c, "dst", flat ? &to : dst, NULL, &cols);
    c.primary->copy(s, src, dst);
    c.truth->copy(&c.cpu, hsrc, hdst);
    shadow_end(&c);
}

void backend_shadow_fill(struct stream *s, out_t t, double value)
{
    BEGIN(fill, tensor_numel(t));
    const struct shadow_pick cols = shadow_columns(&c, tensor_cols(t));
    const out_t ht = OUT(t, NULL, &cols);
    c.primary->fill(s, t, value);
    c.truth->fill(&c.cpu, ht, value);
    shadow_end(&c);
}

void backend_shadow_cast(struct stream *s, in_t src, out_t dst)
{
    BEGIN(cast, tensor_numel(dst));
    const struct shadow_pick cols = shadow_columns(&c, tensor_cols(dst));
    const in_t hsrc = IN(src, NULL, &cols);
    const out_t hdst = OUT(dst, NULL, &cols);
    c.primary->cast(s, src, dst);
    c.truth->cast(&c.cpu, hsrc, hdst);
    shadow_end(&c);
}

/* The last columns of the last rows, if not all. */
void backend_shadow_initialise(struct stream *s, enum rng_init init, double scale,
                               struct rng_key key, uint64_t base, uint64_t stride, out_t t)
{
    enum { SIDE = 256 };
    BEGIN(initialise, 20 * tensor_numel(t));
    const int64_t row = c.sampled && tensor_rows(t) > SIDE ? tensor_rows(t) - SIDE : 0,
                  col = c.sampled && tensor_cols(t) > SIDE ? tensor_cols(t) - SIDE : 0;
    const struct shadow_pick rows = shadow_range(row, tensor_rows(t) - row),
                             cols = shadow_range(col, tensor_cols(t) - col);
    const out_t ht = OUT(t, t->ndim > 1 ? &rows : NULL, &cols);
    c.primary->initialise(s, init, scale, key, base, stride, t);
    c.truth->initialise(&c.cpu, init, scale, key, base + (uint64_t)row * stride + (uint64_t)col,
                        stride, ht);
    shadow_end(&c);
}

/* ---- dense ---- */

void backend_shadow_gemm(struct stream *s, bool ta, bool tb, double alpha, in_t a, in_t b,
                         double beta, in_t c_, out_t d)
{
    const int64_t m = tensor_rows(d), n = tensor_cols(d), k = ta ? tensor_rows(a) : tensor_cols(a);
    BEGIN(gemm, (double)m * (double)n * (double)(k + 64) / 64);
    const struct shadow_pick rows = shadow_rows(&c, m), cols = shadow_columns(&c, n);
    const in_t ha = IN(a, ta ? NULL : &rows, ta ? &rows : NULL),
               hb = IN(b, tb ? &cols : NULL, tb ? NULL : &cols);
    const in_t hc = shadow_in(&c, "c", c_, &rows, &cols);
    const out_t hd = OUT(d, &rows, &cols);
    shadow_sums(&c, k,
                fabs(alpha) * sqrt((double)k) * shadow_rms(ha) * shadow_rms(hb) +
                    (hc ? fabs(beta) * shadow_rms(hc) : 0));
    c.primary->gemm(s, ta, tb, alpha, a, b, beta, c_, d);
    c.truth->gemm(&c.cpu, ta, tb, alpha, ha, hb, beta, hc, hd);
    shadow_end(&c);
}

/* The experts compared, and their rows: at most `most` of each. */
struct experts {
    struct shadow_pick weights, rows;
    int64_t shape[3], longest; /* of their weights [n, out, in]; the most rows of one */
    int32_t offset[SHADOW_SPREAD + 1];
    struct tensor offsets; /* theirs, on the host */
};

static void pick_experts(struct experts *e, const struct shadow_call *c, in_t offsets, in_t w,
                         int64_t most)
{
    const int32_t *first = offsets->data;
    const int64_t n = w->shape[0], out = w->shape[1];
    *e = (struct experts){ .weights = shadow_range(0, n * out),
                           .rows = shadow_range(0, first[n]),
                           .shape = { n, out, w->shape[2] },
                           .offsets = *offsets };
    if (c->sampled && n > SHADOW_SPREAD) {
        const struct shadow_pick chosen = shadow_blocks(c, n, 1);
        e->weights = shadow_scaled(&chosen, out, 0);
        e->rows.blocks = SHADOW_SPREAD;
        e->shape[0] = SHADOW_SPREAD;
        for (int i = 0; i < SHADOW_SPREAD; i++) {
            const int64_t begin = first[chosen.first[i]], rows = first[chosen.first[i] + 1] - begin;
            e->rows.first[i] = begin;
            e->rows.n[i] = rows < most ? rows : most;
            e->offset[i + 1] = e->offset[i] + (int32_t)e->rows.n[i];
        }
        e->offsets = tensor_1d(e->offset, DTYPE_I32, PLACE_HOST, SHADOW_SPREAD + 1);
    }
    for (int64_t i = 0; i < e->shape[0]; i++) {
        const int64_t rows =
            ((const int32_t *)e->offsets.data)[i + 1] - ((const int32_t *)e->offsets.data)[i];
        e->longest = rows > e->longest ? rows : e->longest;
    }
}

/* Rows compared of an expert whose rows do not depend on each other. */
enum { EXPERT_ROWS = 4 * SHADOW_ROWS };

static double experts_steps(int64_t rows, in_t w)
{
    return (double)rows * (double)w->shape[1] * (double)w->shape[2] / 64;
}

void backend_shadow_grouped_gemm(struct stream *s, enum backend_grouped mode, in_t a, in_t b,
                                 in_t offsets, int64_t max_rows, double beta, out_t c_)
{
    const bool tn = mode == BACKEND_GROUPED_TN;
    in_t w = tn ? c_ : b;
    struct experts e;
    BEGIN(grouped_gemm, experts_steps(max_rows, w));
    pick_experts(&e, &c, IN(offsets, NULL, NULL), w, tn ? max_rows : EXPERT_ROWS);
    const in_t ha = IN(a, &e.rows, NULL), hb = IN(b, tn ? &e.rows : &e.weights, NULL);
    const out_t hc = shadow_out(&c, "c", c_, tn ? &e.weights : &e.rows, NULL);
    const int64_t length = tn ? e.longest : mode == BACKEND_GROUPED_NT ? e.shape[2] : e.shape[1];
    const double terms = sqrt((double)length) * shadow_rms(ha) * shadow_rms(hb);
    if (tn)
        shadow_adds(&c, length, terms);
    else
        shadow_sums(&c, length, terms);
    const struct tensor stack = tensor_reshape(tn ? hc : hb, 3, e.shape);
    c.primary->grouped_gemm(s, mode, a, b, offsets, max_rows, beta, c_);
    c.truth->grouped_gemm(&c.cpu, mode, ha, tn ? hb : &stack, &e.offsets, shadow_count(&e.rows),
                          beta, tn ? &stack : hc);
    shadow_end(&c);
}

/* The truth's fused operations are its single ones in turn. A square of a sum has twice its
 * relative error, and a little more. */
void backend_shadow_grouped_act_forward(struct stream *s, in_t a, in_t w, in_t offsets, in_t prob,
                                        out_t h, out_t y)
{
    struct experts e;
    BEGIN(grouped_act_forward, experts_steps(tensor_rows(h), w));
    pick_experts(&e, &c, IN(offsets, NULL, NULL), w, EXPERT_ROWS);
    const in_t ha = IN(a, &e.rows, NULL), hw = IN(w, &e.weights, NULL),
               hprob = IN(prob, &e.rows, NULL);
    const double terms = sqrt((double)e.shape[2]) * shadow_rms(ha) * shadow_rms(hw);
    const out_t hh = OUT(h, &e.rows, NULL);
    shadow_sums(&c, e.shape[2], terms);
    const out_t hy = OUT(y, &e.rows, NULL);
    shadow_sums(&c, 9 * e.shape[2], terms * terms);
    const struct tensor stack = tensor_reshape(hw, 3, e.shape);
    c.primary->grouped_act_forward(s, a, w, offsets, prob, h, y);
    c.truth->grouped_gemm(&c.cpu, BACKEND_GROUPED_NT, ha, &stack, &e.offsets, shadow_count(&e.rows),
                          0.0, hh);
    c.truth->expert_act_forward(&c.cpu, hh, hprob, hy);
    shadow_end(&c);
}

void backend_shadow_grouped_act_backward(struct stream *s, in_t a, in_t w, in_t offsets, in_t h,
                                         in_t prob, out_t dh, out_t dprob, out_t y)
{
    struct experts e;
    BEGIN(grouped_act_backward, experts_steps(tensor_rows(h), w));
    pick_experts(&e, &c, IN(offsets, NULL, NULL), w, EXPERT_ROWS);
    const in_t ha = IN(a, &e.rows, NULL), hw = IN(w, &e.weights, NULL), hh = IN(h, &e.rows, NULL),
               hprob = IN(prob, &e.rows, NULL);
    const double size = shadow_rms(hh),
                 terms = sqrt((double)e.shape[1]) * shadow_rms(ha) * shadow_rms(hw);
    const out_t hdh = OUT(dh, &e.rows, NULL);
    shadow_sums(&c, 9 * e.shape[1], terms * size);
    const out_t hdprob = OUT(dprob, &e.rows, NULL);
    shadow_sums(&c, e.shape[1] + e.shape[2], sqrt((double)e.shape[2]) * terms * size * size);
    const out_t hy = OUT(y, &e.rows, NULL);
    const struct tensor stack = tensor_reshape(hw, 3, e.shape);
    c.primary->grouped_act_backward(s, a, w, offsets, h, prob, dh, dprob, y);
    c.truth->grouped_gemm(&c.cpu, BACKEND_GROUPED_NN, ha, &stack, &e.offsets, shadow_count(&e.rows),
                          0.0, hdh);
    c.truth->expert_act_backward(&c.cpu, hh, hprob, hdh, hdh, hdprob, hy);
    shadow_end(&c);
}

void backend_shadow_add(struct stream *s, in_t x, out_t y)
{
    BEGIN(add, tensor_numel(y));
    const struct shadow_pick cols = shadow_columns(&c, tensor_cols(y));
    const in_t hx = IN(x, NULL, &cols);
    const out_t hy = OUT(y, NULL, &cols);
    shadow_adds(&c, 1, shadow_rms(hx));
    c.primary->add(s, x, y);
    c.truth->add(&c.cpu, hx, hy);
    shadow_end(&c);
}

void backend_shadow_add_bias(struct stream *s, in_t bias, out_t y)
{
    BEGIN(add_bias, tensor_numel(y));
    const struct shadow_pick cols = shadow_columns(&c, tensor_cols(y));
    const in_t hbias = IN(bias, NULL, &cols);
    const out_t hy = OUT(y, NULL, &cols);
    shadow_adds(&c, 1, shadow_rms(hbias));
    c.primary->add_bias(s, bias, y);
    c.truth->add_bias(&c.cpu, hbias, hy);
    shadow_end(&c);
}

void backend_shadow_bias_backward(struct stream *s, in_t dy, out_t dbias)
{
    BEGIN(bias_backward, tensor_numel(dy));
    const struct shadow_pick cols = shadow_columns(&c, tensor_cols(dy));
    const in_t hdy = IN(dy, NULL, &cols);
    const out_t hdbias = OUT(dbias, NULL, &cols);
    shadow_adds(&c, tensor_rows(dy), sqrt((double)tensor_rows(dy)) * shadow_rms(hdy));
    c.primary->bias_backward(s, dy, dbias);
    c.truth->bias_backward(&c.cpu, hdy, hdbias);
    shadow_end(&c);
}

void backend_shadow_activation_forward(struct stream *s, enum backend_activation f, in_t x, out_t y)
{
    BEGIN(activation_forward, 10 * tensor_numel(y));
    const struct shadow_pick cols = shadow_columns(&c, tensor_cols(y));
    const in_t hx = IN(x, NULL, &cols);
    const out_t hy = OUT(y, NULL, &cols);
    c.primary->activation_forward(s, f, x, y);
    c.truth->activation_forward(&c.cpu, f, hx, hy);
    shadow_end(&c);
}

void backend_shadow_activation_backward(struct stream *s, enum backend_activation f, in_t x,
                                        in_t dy, out_t dx)
{
    BEGIN(activation_backward, 10 * tensor_numel(dx));
    const struct shadow_pick cols = shadow_columns(&c, tensor_cols(dx));
    const in_t hx = IN(x, NULL, &cols), hdy = IN(dy, NULL, &cols);
    const out_t hdx = OUT(dx, NULL, &cols);
    c.primary->activation_backward(s, f, x, dy, dx);
    c.truth->activation_backward(&c.cpu, f, hx, hdy, hdx);
    shadow_end(&c);
}

void backend_shadow_rmsnorm_forward(struct stream *s, in_t x, in_t w, double eps, out_t y, out_t rs)
{
    BEGIN(rmsnorm_forward, tensor_numel(x));
    const struct shadow_pick rows = shadow_rows(&c, tensor_rows(x));
    const in_t hx = IN(x, &rows, NULL), hw = IN(w, NULL, NULL);
    const out_t hy = OUT(y, &rows, NULL);
    shadow_sums(&c, tensor_cols(x), 0);
    const out_t hrs = OUT(rs, &rows, NULL);
    shadow_sums(&c, tensor_cols(x), 0);
    c.primary->rmsnorm_forward(s, x, w, eps, y, rs);
    c.truth->rmsnorm_forward(&c.cpu, hx, hw, eps, hy, hrs);
    shadow_end(&c);
}

void backend_shadow_rmsnorm_backward(struct stream *s, in_t x, in_t w, in_t rs, in_t dy, out_t dx,
                                     out_t dw)
{
    const int64_t rows = tensor_rows(x);
    BEGIN(rmsnorm_backward, tensor_numel(x));
    const in_t hx = IN(x, NULL, NULL), hw = IN(w, NULL, NULL), hrs = IN(rs, NULL, NULL),
               hdy = IN(dy, NULL, NULL);
    const out_t hdx = OUT(dx, NULL, NULL);
    shadow_adds(&c, tensor_cols(x), backend_shadow_norm_terms(hw, hrs, hdy));
    const out_t hdw = OUT(dw, NULL, NULL);
    if (dw)
        shadow_adds(&c, rows, sqrt((double)rows) * shadow_rms(hdy));
    c.primary->rmsnorm_backward(s, x, w, rs, dy, dx, dw);
    c.truth->rmsnorm_backward(&c.cpu, hx, hw, hrs, hdy, hdx, hdw);
    shadow_end(&c);
}

void backend_shadow_layernorm_forward(struct stream *s, in_t x, in_t w, in_t b, double eps, out_t y,
                                      out_t mean, out_t rs)
{
    BEGIN(layernorm_forward, tensor_numel(x));
    const struct shadow_pick rows = shadow_rows(&c, tensor_rows(x));
    const int64_t cols = tensor_cols(x);
    const in_t hx = IN(x, &rows, NULL), hw = IN(w, NULL, NULL), hb = IN(b, NULL, NULL);
    const double spread = shadow_rms(hx);
    const out_t hmean = OUT(mean, &rows, NULL);
    shadow_sums(&c, cols, spread);
    const out_t hrs = OUT(rs, &rows, NULL);
    shadow_sums(&c, cols, 0);
    const out_t hy = OUT(y, &rows, NULL);
    struct shadow_operand *o = &c.operand[c.count - 1];
    c.primary->layernorm_forward(s, x, w, b, eps, y, mean, rs);
    c.truth->layernorm_forward(&c.cpu, hx, hw, hb, eps, hy, hmean, hrs);
    /* A mean far larger than the spread cancels. */
    o->length = cols;
    o->terms = spread * shadow_rms(hw) * shadow_largest(hrs);
    shadow_end(&c);
}

void backend_shadow_layernorm_backward(struct stream *s, in_t x, in_t w, in_t mean, in_t rs,
                                       in_t dy, out_t dx, out_t dw, out_t db)
{
    const int64_t rows = tensor_rows(x);
    BEGIN(layernorm_backward, tensor_numel(x));
    const in_t hx = IN(x, NULL, NULL), hw = IN(w, NULL, NULL), hmean = IN(mean, NULL, NULL),
               hrs = IN(rs, NULL, NULL), hdy = IN(dy, NULL, NULL);
    const double terms = sqrt((double)rows) * shadow_rms(hdy);
    const out_t hdx = OUT(dx, NULL, NULL);
    shadow_adds(&c, tensor_cols(x), backend_shadow_norm_terms(hw, hrs, hdy));
    const out_t hdw = OUT(dw, NULL, NULL);
    if (dw)
        shadow_adds(&c, rows, terms);
    const out_t hdb = OUT(db, NULL, NULL);
    if (db)
        shadow_adds(&c, rows, terms);
    c.primary->layernorm_backward(s, x, w, mean, rs, dy, dx, dw, db);
    c.truth->layernorm_backward(&c.cpu, hx, hw, hmean, hrs, hdy, hdx, hdw, hdb);
    shadow_end(&c);
}

/* ---- rows ---- */

void backend_shadow_gather_rows(struct stream *s, in_t in, in_t index, out_t out)
{
    BEGIN(gather_rows, tensor_numel(out));
    const struct shadow_pick cols = shadow_columns(&c, tensor_cols(out));
    const in_t hin = IN(in, NULL, &cols), hindex = IN(index, NULL, NULL);
    const out_t hout = OUT(out, NULL, &cols);
    c.primary->gather_rows(s, in, index, out);
    c.truth->gather_rows(&c.cpu, hin, hindex, hout);
    shadow_end(&c);
}

void backend_shadow_gather_sum_rows(struct stream *s, in_t in, in_t index, double beta, out_t out)
{
    const int64_t k = tensor_cols(index);
    BEGIN(gather_sum_rows, tensor_numel(out) * k);
    const struct shadow_pick cols = shadow_columns(&c, tensor_cols(out));
    const in_t hin = IN(in, NULL, &cols), hindex = IN(index, NULL, NULL);
    const out_t hout = OUT(out, NULL, &cols);
    shadow_sums(&c, k, sqrt((double)k) * shadow_rms(hin) + (beta != 0 ? shadow_rms(hout) : 0));
    c.primary->gather_sum_rows(s, in, index, beta, out);
    c.truth->gather_sum_rows(&c.cpu, hin, hindex, beta, hout);
    shadow_end(&c);
}

void backend_shadow_embed_merge_forward(struct stream *s, in_t ids, in_t image_row, in_t table,
                                        int64_t first, in_t image, out_t out)
{
    BEGIN(embed_merge_forward, tensor_numel(out) + tensor_numel(table));
    const struct shadow_pick cols = shadow_columns(&c, tensor_cols(out));
    const in_t hids = IN(ids, NULL, NULL), hrow = IN(image_row, NULL, NULL),
               htable = IN(table, NULL, &cols), himage = IN(image, NULL, &cols);
    const out_t hout = OUT(out, NULL, &cols);
    c.primary->embed_merge_forward(s, ids, image_row, table, first, image, out);
    c.truth->embed_merge_forward(&c.cpu, hids, hrow, htable, first, himage, hout);
    shadow_end(&c);
}

void backend_shadow_embed_merge_backward(struct stream *s, in_t ids, in_t image_row, in_t dout,
                                         int64_t first, out_t dtable, out_t dimage)
{
    const int64_t tokens = tensor_rows(dout);
    BEGIN(embed_merge_backward, tensor_numel(dout) + (dtable ? tensor_numel(dtable) : 0));
    const struct shadow_pick cols = shadow_columns(&c, tensor_cols(dout));
    const in_t hids = IN(ids, NULL, NULL), hrow = IN(image_row, NULL, NULL),
               hdout = IN(dout, NULL, &cols);
    const out_t hdtable = OUT(dtable, NULL, &cols);
    if (dtable)
        shadow_adds(&c, tokens, sqrt((double)tokens) * shadow_rms(hdout));
    const out_t hdimage = OUT(dimage, NULL, &cols);
    c.primary->embed_merge_backward(s, ids, image_row, dout, first, dtable, dimage);
    c.truth->embed_merge_backward(&c.cpu, hids, hrow, hdout, first, hdtable, hdimage);
    shadow_end(&c);
}

/* ---- loss ---- */

void backend_shadow_loss_sum(struct stream *s, in_t logits, out_t mx, out_t se)
{
    BEGIN(loss_sum, 4 * tensor_numel(logits));
    const struct shadow_pick rows = shadow_rows(&c, tensor_rows(logits));
    const in_t hlogits = IN(logits, &rows, NULL);
    const out_t hmx = OUT(mx, &rows, NULL), hse = OUT(se, &rows, NULL);
    shadow_sums(&c, tensor_cols(logits) + 200, 0);
    c.primary->loss_sum(s, logits, mx, se);
    c.truth->loss_sum(&c.cpu, hlogits, hmx, hse);
    shadow_end(&c);
}

void backend_shadow_loss_label(struct stream *s, in_t logits, in_t labels, int64_t first, in_t own,
                               in_t mx, out_t se, out_t pl)
{
    BEGIN(loss_label, tensor_numel(pl));
    const struct shadow_pick rows = shadow_rows(&c, tensor_rows(logits));
    const in_t hlogits = IN(logits, &rows, NULL), hlabels = IN(labels, &rows, NULL),
               hown = IN(own, &rows, NULL), hmx = IN(mx, &rows, NULL);
    const out_t hse = OUT(se, &rows, NULL), hpl = OUT(pl, &rows, NULL);
    c.primary->loss_label(s, logits, labels, first, own, mx, se, pl);
    c.truth->loss_label(&c.cpu, hlogits, hlabels, first, hown, hmx, hse, hpl);
    shadow_end(&c);
}

void backend_shadow_loss_finish(struct stream *s, in_t se, in_t pl, in_t mask, out_t loss,
                                out_t total)
{
    BEGIN(loss_finish, tensor_numel(loss));
    const in_t hse = IN(se, NULL, NULL), hpl = IN(pl, NULL, NULL), hmask = IN(mask, NULL, NULL);
    const int64_t n = tensor_numel(loss);
    /* the logarithm of a sum that was rounded, and what is taken from it */
    const double terms = 1 + shadow_rms(hpl);
    const out_t hloss = OUT(loss, NULL, NULL);
    shadow_sums(&c, 4, terms);
    const out_t htotal = OUT(total, NULL, NULL);
    struct shadow_operand *o = &c.operand[c.count - 1];
    shadow_adds(&c, n, sqrt((double)n) * terms);
    c.primary->loss_finish(s, se, pl, mask, loss, total);
    c.truth->loss_finish(&c.cpu, hse, hpl, hmask, hloss, htotal);
    o->terms += sqrt((double)n) * shadow_rms(hloss);
    shadow_end(&c);
}

void backend_shadow_loss_backward(struct stream *s, in_t labels, int64_t first, in_t mx, in_t se,
                                  in_t mask, out_t logits)
{
    BEGIN(loss_backward, 4 * tensor_numel(logits));
    const struct shadow_pick rows = shadow_rows(&c, tensor_rows(logits));
    const in_t hlabels = IN(labels, &rows, NULL), hmx = IN(mx, &rows, NULL),
               hse = IN(se, &rows, NULL), hmask = IN(mask, &rows, NULL);
    const out_t hlogits = OUT(logits, &rows, NULL);
    /* the label's element is a difference from 1: a few units of its last place */
    shadow_sums(&c, 1, 0.25);
    c.primary->loss_backward(s, labels, first, mx, se, mask, logits);
    c.truth->loss_backward(&c.cpu, hlabels, first, hmx, hse, hmask, hlogits);
    shadow_end(&c);
}

/* ---- optimizer ---- */

void backend_shadow_sum_squares(struct stream *s, in_t x, out_t total)
{
    BEGIN(sum_squares, 0);
    const in_t hx = IN(x, NULL, NULL);
    const out_t htotal = OUT(total, NULL, NULL);
    shadow_adds(&c, 1, 0);
    c.primary->sum_squares(s, x, total);
    c.truth->sum_squares(&c.cpu, hx, htotal);
    shadow_end(&c);
}

void backend_shadow_count_zeros(struct stream *s, in_t x, out_t total)
{
    BEGIN(count_zeros, 0);
    const in_t hx = IN(x, NULL, NULL);
    const out_t htotal = OUT(total, NULL, NULL);
    c.primary->count_zeros(s, x, total);
    c.truth->count_zeros(&c.cpu, hx, htotal);
    shadow_end(&c);
}

void backend_shadow_sum_wide(struct stream *s, in_t x, out_t total)
{
    BEGIN(sum_wide, 0);
    const in_t hx = IN(x, NULL, NULL);
    c.wide = true;
    const out_t htotal = OUT(total, NULL, NULL);
    shadow_sums(&c, 1, sqrt((double)tensor_numel(x)) * shadow_rms(hx));
    c.primary->sum_wide(s, x, total);
    c.truth->sum_wide(&c.cpu, hx, htotal);
    shadow_end(&c);
}

void backend_shadow_decide_update(struct stream *s, in_t numbers, double tokens,
                                  const double *factor, double clip, double threshold, out_t result)
{
    BEGIN(decide_update, 0);
    c.wide = true;
    const in_t hnumbers = IN(numbers, NULL, NULL);
    const out_t hresult = OUT(result, NULL, NULL);
    c.primary->decide_update(s, numbers, tokens, factor, clip, threshold, result);
    c.truth->decide_update(&c.cpu, hnumbers, tokens, factor, clip, threshold, hresult);
    shadow_end(&c);
}

void backend_shadow_adamw(struct stream *s, in_t grad, in_t factor, double lr, double beta1,
                          double beta2, double eps, double wd, int64_t step, out_t master, out_t m,
                          out_t v, out_t param)
{
    BEGIN(adamw, 10 * tensor_numel(master));
    const struct shadow_pick cols = shadow_columns(&c, tensor_cols(master));
    const in_t hgrad = IN(grad, NULL, &cols);
    c.wide = true;
    const in_t hfactor = IN(factor, NULL, NULL);
    c.wide = false;
    const out_t hmaster = OUT(master, NULL, &cols);
    shadow_adds(&c, 1, lr);
    const out_t hm = OUT(m, NULL, &cols);
    shadow_adds(&c, 1, fabs(*(const double *)hfactor->data) * shadow_rms(hgrad));
    const out_t hv = OUT(v, NULL, &cols), hparam = OUT(param, NULL, &cols);
    c.primary->adamw(s, grad, factor, lr, beta1, beta2, eps, wd, step, master, m, v, param);
    c.truth->adamw(&c.cpu, hgrad, hfactor, lr, beta1, beta2, eps, wd, step, hmaster, hm, hv,
                   hparam);
    shadow_end(&c);
}

/* ---- streams, and what needs none: the primary's ---- */

void backend_shadow_stream(struct stream *s, const char *name, const struct backend_ops *primary)
{
    primary->stream_create(s, name);
    shadow_attach(primary, &backend_ref_f32);
}

static void shadow_stream_destroy(struct stream *s)
{
    shadow_primary()->stream_destroy(s);
    shadow_detach();
}

static void shadow_stream_scratch(struct stream *s, in_t memory)
{
    shadow_primary()->stream_scratch(s, memory);
}
static void shadow_stream_sync(struct stream *s)
{
    shadow_primary()->stream_sync(s);
}
static void shadow_event_record(struct event *e, struct stream *s)
{
    shadow_primary()->event_record(e, s);
}
static void shadow_event_sync(const struct event *e)
{
    shadow_primary()->event_sync(e);
}
static void shadow_stream_wait(struct stream *s, const struct event *e)
{
    shadow_primary()->stream_wait(s, e);
}

static void create_bf16(struct stream *s, const char *name)
{
    backend_shadow_stream(s, name, &backend_cuda_bf16);
}
static void create_f32(struct stream *s, const char *name)
{
    backend_shadow_stream(s, name, &backend_cuda_f32);
}
static void *shadow_alloc(size_t bytes)
{
    return backend_cuda_f32.alloc(bytes);
}
static void shadow_release(void *p)
{
    backend_cuda_f32.release(p);
}
static void *shadow_alloc_host(size_t bytes)
{
    return backend_cuda_f32.alloc_host(bytes);
}
static void shadow_release_host(void *p)
{
    backend_cuda_f32.release_host(p);
}
static void shadow_memory(size_t *available, size_t *total)
{
    backend_cuda_f32.memory(available, total);
}
static void shadow_event_create(struct event *e)
{
    backend_cuda_f32.event_create(e);
}
static void shadow_event_create_timed(struct event *e)
{
    backend_cuda_f32.event_create_timed(e);
}
static double shadow_event_seconds(const struct event *from, const struct event *to)
{
    return backend_cuda_f32.event_seconds(from, to);
}
static void shadow_event_destroy(struct event *e)
{
    backend_cuda_f32.event_destroy(e);
}

#define OP(op) .op = backend_shadow_##op,
#define COMMON \
    .name = "shadow", .acc = DTYPE_F32, .scratch_bytes = CUDA_SCRATCH, \
    .attention_work = cuda_attention_work, .ssd_work = cuda_ssd_work, .alloc = shadow_alloc, \
    .release = shadow_release, .alloc_host = shadow_alloc_host, \
    .release_host = shadow_release_host, .asynchronous = true, .event_sync = shadow_event_sync, \
    .memory = shadow_memory, .stream_destroy = shadow_stream_destroy, \
    .stream_scratch = shadow_stream_scratch, .stream_sync = shadow_stream_sync, \
    .event_create = shadow_event_create, .event_destroy = shadow_event_destroy, \
    .event_create_timed = shadow_event_create_timed, .event_seconds = shadow_event_seconds, \
    .event_record = shadow_event_record, .stream_wait = shadow_stream_wait, BACKEND_OPS(OP)

const struct backend_ops backend_shadow_bf16 = { COMMON.act = DTYPE_BF16,
                                                 .stream_create = create_bf16 };
const struct backend_ops backend_shadow_f32 = { COMMON.act = DTYPE_F32,
                                                .stream_create = create_f32 };
