/* backend_shadow_layers.c - the shadows of attention, of the Mamba-2 scan, of the mixture of
 * experts' routing and of the encoder's rows. */
#include <math.h>
#include <stdlib.h>
#include "backend_shadow_ops.h"
#include "shadow_choice.h"

/* ---- attention ---- */

/* Groups of heads that are compared whole, so that there are two heads at least: the last ones
 * first, others at later calls. */
static struct shadow_pick some_groups(const struct shadow_call *c, int groups, int per_group)
{
    const int64_t most = per_group > 1 ? 1 : 2, places = groups - most + 1;
    if (!c->sampled || places <= 1)
        return shadow_range(0, groups);
    return shadow_range(places - 1 - (c->number + c->number / places) % places, most);
}

static double attention_steps(in_t qkv, int64_t max_len, int n, int d)
{
    return (double)tensor_rows(qkv) * (double)max_len * n * d / 64;
}

void backend_shadow_attention_forward(struct stream *s, in_t qkv, in_t cu, int64_t max_len, int n,
                                      int g, int d, bool causal, in_t work, out_t o, out_t lse)
{
    const int per = n / g;
    BEGIN(attention_forward, attention_steps(qkv, max_len, n, d));
    const struct shadow_pick group = some_groups(&c, g, per),
                             wide = shadow_scaled(&group, (int64_t)(per + 2) * d, 0),
                             heads = shadow_scaled(&group, per, 0),
                             cols = shadow_scaled(&heads, d, 0);
    const int groups = (int)shadow_count(&group);
    const in_t hqkv = IN(qkv, NULL, &wide), hcu = IN(cu, NULL, NULL);
    const out_t ho = OUT(o, NULL, &cols), hlse = OUT(lse, NULL, &heads);
    shadow_sums(&c, max_len, 1);
    const in_t hwork =
        shadow_work(&c, DTYPE_U8,
                    c.truth->attention_work(tensor_rows(qkv), tensor_numel(cu) - 1, max_len,
                                            groups * per, groups, d, causal));
    c.primary->attention_forward(s, qkv, cu, max_len, n, g, d, causal, work, o, lse);
    c.truth->attention_forward(&c.cpu, hqkv, hcu, max_len, groups * per, groups, d, causal, hwork,
                               ho, hlse);
    shadow_end(&c);
}

void backend_shadow_attention_backward(struct stream *s, in_t qkv, in_t cu, int64_t max_len, int n,
                                       int g, int d, bool causal, in_t o, in_t lse, in_t do_,
                                       in_t work, out_t dqkv)
{
    const int per = n / g;
    BEGIN(attention_backward, 3 * attention_steps(qkv, max_len, n, d));
    const struct shadow_pick group = some_groups(&c, g, per),
                             wide = shadow_scaled(&group, (int64_t)(per + 2) * d, 0),
                             heads = shadow_scaled(&group, per, 0),
                             cols = shadow_scaled(&heads, d, 0);
    const int groups = (int)shadow_count(&group);
    const in_t hqkv = IN(qkv, NULL, &wide), hcu = IN(cu, NULL, NULL), ho = IN(o, NULL, &cols),
               hlse = IN(lse, NULL, &heads), hdo = IN(do_, NULL, &cols);
    const in_t hwork =
        shadow_work(&c, DTYPE_U8,
                    c.truth->attention_work(tensor_rows(qkv), tensor_numel(cu) - 1, max_len,
                                            groups * per, groups, d, causal));
    const out_t hdqkv = OUT(dqkv, NULL, &wide);
    shadow_sums(&c, max_len, 0);
    shadow_parts(&c, (int64_t)(per + 2) * d, (int64_t)per * d, (int64_t)(per + 1) * d);
    c.primary->attention_backward(s, qkv, cu, max_len, n, g, d, causal, o, lse, do_, work, dqkv);
    c.truth->attention_backward(&c.cpu, hqkv, hcu, max_len, groups * per, groups, d, causal, ho,
                                hlse, hdo, hwork, hdqkv);
    shadow_end(&c);
}

/* ---- Mamba-2 ---- */

void backend_shadow_conv_forward(struct stream *s, in_t x, in_t w, in_t b, in_t cu, int64_t max_len,
                                 out_t y)
{
    BEGIN(conv_forward, 10 * tensor_numel(y));
    const struct shadow_pick cols = shadow_columns(&c, tensor_cols(y));
    const in_t hx = IN(x, NULL, &cols), hw = IN(w, &cols, NULL), hb = IN(b, NULL, &cols),
               hcu = IN(cu, NULL, NULL);
    const out_t hy = OUT(y, NULL, &cols);
    shadow_sums(&c, 200, 0);
    c.primary->conv_forward(s, x, w, b, cu, max_len, y);
    c.truth->conv_forward(&c.cpu, hx, hw, hb, hcu, max_len, hy);
    shadow_end(&c);
}

void backend_shadow_conv_backward(struct stream *s, in_t x, in_t w, in_t b, in_t cu,
                                  int64_t max_len, in_t dy, out_t dx, out_t dw, out_t db)
{
    const int64_t rows = tensor_rows(dx);
    BEGIN(conv_backward, 20 * tensor_numel(dx));
    const struct shadow_pick cols = shadow_columns(&c, tensor_cols(dx));
    const in_t hx = IN(x, NULL, &cols), hw = IN(w, &cols, NULL), hb = IN(b, NULL, &cols),
               hcu = IN(cu, NULL, NULL), hdy = IN(dy, NULL, &cols);
    const double walk = sqrt((double)rows) * shadow_rms(hdy);
    const out_t hdx = OUT(dx, NULL, &cols);
    shadow_sums(&c, 200, 0);
    const out_t hdw = OUT(dw, &cols, NULL);
    if (dw)
        shadow_adds(&c, rows + 200, walk * shadow_rms(hx));
    const out_t hdb = OUT(db, NULL, &cols);
    if (db)
        shadow_adds(&c, rows + 200, walk);
    c.primary->conv_backward(s, x, w, b, cu, max_len, dy, dx, dw, db);
    c.truth->conv_backward(&c.cpu, hx, hw, hb, hcu, max_len, hdy, hdx, hdw, hdb);
    shadow_end(&c);
}

/* Whole groups of heads, with their columns in [x | B | C]. */
struct scan {
    struct shadow_pick heads, inner, wide;
    int groups, count; /* groups and heads compared */
};

static struct scan some_scan(const struct shadow_call *c, int heads, int head_dim, int groups,
                             int state)
{
    struct scan a;
    const struct shadow_pick group = some_groups(c, groups, 2);
    a.heads = shadow_scaled(&group, heads / groups, 0);
    a.inner = shadow_scaled(&a.heads, head_dim, 0);
    const struct shadow_pick b = shadow_scaled(&group, state, (int64_t)heads * head_dim),
                             last =
                                 shadow_scaled(&group, state,
                                               (int64_t)heads * head_dim + (int64_t)groups * state),
                             xb = shadow_joined(&a.inner, &b);
    a.wide = shadow_joined(&xb, &last);
    a.groups = (int)shadow_count(&group);
    a.count = (int)shadow_count(&a.heads);
    return a;
}

static double scan_steps(in_t xbc, int heads, int head_dim, int state, int chunk)
{
    return (double)tensor_rows(xbc) * heads * head_dim * (state + chunk) / 16;
}

void backend_shadow_ssd_forward(struct stream *s, in_t xbc, in_t dt, in_t dt_bias, in_t a_log,
                                in_t d_skip, in_t cu, int64_t max_len, int heads, int head_dim,
                                int groups, int state, int chunk, in_t work, out_t y)
{
    const int64_t tokens = tensor_rows(xbc);
    BEGIN(ssd_forward, scan_steps(xbc, heads, head_dim, state, chunk));
    const struct scan a = some_scan(&c, heads, head_dim, groups, state);
    const in_t hxbc = IN(xbc, NULL, &a.wide), hdt = IN(dt, NULL, &a.heads),
               hbias = IN(dt_bias, NULL, &a.heads), ha_log = IN(a_log, NULL, &a.heads),
               hskip = IN(d_skip, NULL, &a.heads), hcu = IN(cu, NULL, NULL);
    const out_t hy = OUT(y, NULL, &a.inner);
    const in_t hwork = shadow_work(
        &c, DTYPE_F32,
        c.truth->ssd_work(tokens, tensor_numel(cu) - 1, a.count, head_dim, a.groups, state, chunk));
    c.primary->ssd_forward(s, xbc, dt, dt_bias, a_log, d_skip, cu, max_len, heads, head_dim, groups,
                           state, chunk, work, y);
    c.truth->ssd_forward(&c.cpu, hxbc, hdt, hbias, ha_log, hskip, hcu, max_len, a.count, head_dim,
                         a.groups, state, chunk, hwork, hy);
    shadow_end(&c);
}

void backend_shadow_ssd_backward(struct stream *s, in_t xbc, in_t dt, in_t dt_bias, in_t a_log,
                                 in_t d_skip, in_t cu, int64_t max_len, int heads, int head_dim,
                                 int groups, int state, int chunk, in_t dy, in_t work, out_t dxbc,
                                 out_t ddt, out_t ddt_bias, out_t da_log, out_t dd_skip)
{
    const int64_t tokens = tensor_rows(xbc), inner = (int64_t)heads / groups * head_dim;
    BEGIN(ssd_backward, 3 * scan_steps(xbc, heads, head_dim, state, chunk));
    const struct scan a = some_scan(&c, heads, head_dim, groups, state);
    const in_t hxbc = IN(xbc, NULL, &a.wide), hdt = IN(dt, NULL, &a.heads),
               hbias = IN(dt_bias, NULL, &a.heads), ha_log = IN(a_log, NULL, &a.heads),
               hskip = IN(d_skip, NULL, &a.heads), hcu = IN(cu, NULL, NULL),
               hdy = IN(dy, NULL, &a.inner);
    const in_t hwork = shadow_work(
        &c, DTYPE_F32,
        c.truth->ssd_work(tokens, tensor_numel(cu) - 1, a.count, head_dim, a.groups, state, chunk));
    const out_t hdxbc = OUT(dxbc, NULL, &a.wide);
    shadow_parts(&c, shadow_count(&a.wide), inner * a.groups, (inner + state) * a.groups);
    const out_t hddt = OUT(ddt, NULL, &a.heads), hddt_bias = OUT(ddt_bias, NULL, &a.heads);
    if (ddt_bias)
        shadow_adds(&c, tokens, 0);
    const out_t hda_log = OUT(da_log, NULL, &a.heads);
    if (da_log)
        shadow_adds(&c, tokens, 0);
    const out_t hdd_skip = OUT(dd_skip, NULL, &a.heads);
    if (dd_skip)
        shadow_adds(&c, tokens, sqrt((double)tokens * head_dim) * shadow_rms(hdy));
    c.primary->ssd_backward(s, xbc, dt, dt_bias, a_log, d_skip, cu, max_len, heads, head_dim,
                            groups, state, chunk, dy, work, dxbc, ddt, ddt_bias, da_log, dd_skip);
    c.truth->ssd_backward(&c.cpu, hxbc, hdt, hbias, ha_log, hskip, hcu, max_len, a.count, head_dim,
                          a.groups, state, chunk, hdy, hwork, hdxbc, hddt, hddt_bias, hda_log,
                          hdd_skip);
    shadow_end(&c);
}

void backend_shadow_gated_norm_forward(struct stream *s, in_t y, in_t z, in_t w, int groups,
                                       double eps, out_t o, out_t rs)
{
    const int64_t width = tensor_cols(y) / groups;
    BEGIN(gated_norm_forward, 10 * tensor_numel(y));
    const struct shadow_pick rows = shadow_rows(&c, tensor_rows(y));
    const in_t hy = IN(y, &rows, NULL), hz = IN(z, &rows, NULL), hw = IN(w, NULL, NULL);
    const out_t ho = OUT(o, &rows, NULL);
    shadow_sums(&c, width + 200, 0);
    const out_t hrs = OUT(rs, &rows, NULL);
    shadow_sums(&c, width + 200, 0);
    c.primary->gated_norm_forward(s, y, z, w, groups, eps, o, rs);
    c.truth->gated_norm_forward(&c.cpu, hy, hz, hw, groups, eps, ho, hrs);
    shadow_end(&c);
}

void backend_shadow_gated_norm_backward(struct stream *s, in_t y, in_t z, in_t w, int groups,
                                        in_t rs, in_t do_, out_t dy, out_t dz, out_t dw)
{
    const int64_t width = tensor_cols(y) / groups, rows = tensor_rows(y);
    BEGIN(gated_norm_backward, 10 * tensor_numel(y));
    const struct shadow_pick group = some_groups(&c, groups, 1),
                             cols = shadow_scaled(&group, width, 0);
    const in_t hy = IN(y, NULL, &cols), hz = IN(z, NULL, &cols), hw = IN(w, NULL, &cols),
               hrs = IN(rs, NULL, &group), hdo = IN(do_, NULL, &cols);
    const double terms = backend_shadow_norm_terms(hw, hrs, hdo);
    const out_t hdy = OUT(dy, NULL, &cols);
    shadow_sums(&c, width + 200, terms * shadow_rms(hz));
    const out_t hdz = OUT(dz, NULL, &cols);
    shadow_sums(&c, width + 200, terms * shadow_rms(hy));
    const out_t hdw = OUT(dw, NULL, &cols);
    if (dw)
        shadow_adds(&c, rows + 200, sqrt((double)rows) * shadow_rms(hdo));
    c.primary->gated_norm_backward(s, y, z, w, groups, rs, do_, dy, dz, dw);
    c.truth->gated_norm_backward(&c.cpu, hy, hz, hw, (int)shadow_count(&group), hrs, hdo, hdy, hdz,
                                 hdw);
    shadow_end(&c);
}

/* ---- mixture of experts ---- */

void backend_shadow_router_forward(struct stream *s, in_t logits, in_t bias, double scaling,
                                   bool given, out_t scores, out_t expert, out_t prob)
{
    BEGIN(router_forward, tensor_numel(logits));
    const in_t hlogits = IN(logits, NULL, NULL), hbias = IN(bias, NULL, NULL);
    const out_t hscores = OUT(scores, NULL, NULL), hexpert = OUT(expert, NULL, NULL),
                hprob = OUT(prob, NULL, NULL);
    c.primary->router_forward(s, logits, bias, scaling, given, scores, expert, prob);
    if (!given) {
        shadow_adopt(&c, hexpert);
        shadow_choice_listed(&c, hexpert, tensor_cols(logits));
    }
    c.truth->router_forward(&c.cpu, hlogits, hbias, scaling, true, hscores, hexpert, hprob);
    if (!given)
        shadow_choice_best(&c, hscores, hbias, hexpert);
    shadow_end(&c);
}

void backend_shadow_router_balance(struct stream *s, in_t scores, int topk, int64_t first_row,
                                   int64_t seq_len, out_t count, out_t psum)
{
    BEGIN(router_balance, tensor_numel(scores));
    const in_t hscores = IN(scores, NULL, NULL);
    int64_t *ties = shadow_choice_ties(hscores, topk, first_row, seq_len, tensor_rows(count));
    const out_t hcount = OUT(count, NULL, NULL);
    shadow_slack(&c, ties);
    const out_t hpsum = OUT(psum, NULL, NULL);
    shadow_sums(&c, seq_len + tensor_cols(scores), 0);
    c.primary->router_balance(s, scores, topk, first_row, seq_len, count, psum);
    c.truth->router_balance(&c.cpu, hscores, topk, first_row, seq_len, hcount, hpsum);
    shadow_end(&c);
    free(ties);
}

void backend_shadow_router_balance_loss(struct stream *s, in_t count, in_t psum, int topk,
                                        int64_t seq_len, out_t metric)
{
    BEGIN(router_balance_loss, tensor_numel(count));
    const in_t hcount = IN(count, NULL, NULL), hpsum = IN(psum, NULL, NULL);
    const out_t hmetric = OUT(metric, NULL, NULL);
    shadow_adds(&c, tensor_numel(count), 0);
    c.primary->router_balance_loss(s, count, psum, topk, seq_len, metric);
    c.truth->router_balance_loss(&c.cpu, hcount, hpsum, topk, seq_len, hmetric);
    shadow_end(&c);
}

void backend_shadow_router_backward(struct stream *s, in_t scores, in_t expert, in_t prob,
                                    in_t dprob, double scaling, in_t count, double coeff,
                                    int64_t first_row, int64_t seq_len, out_t dlogits)
{
    BEGIN(router_backward, tensor_numel(scores));
    const in_t hscores = IN(scores, NULL, NULL), hexpert = IN(expert, NULL, NULL),
               hprob = IN(prob, NULL, NULL), hdprob = IN(dprob, NULL, NULL),
               hcount = IN(count, NULL, NULL);
    const out_t hdlogits = OUT(dlogits, NULL, NULL);
    /* What the mean is taken from, and sums to nothing for a single expert. */
    shadow_sums(&c, tensor_cols(scores), scaling * shadow_rms(hdprob));
    c.primary->router_backward(s, scores, expert, prob, dprob, scaling, count, coeff, first_row,
                               seq_len, dlogits);
    c.truth->router_backward(&c.cpu, hscores, hexpert, hprob, hdprob, scaling, hcount, coeff,
                             first_row, seq_len, hdlogits);
    shadow_end(&c);
}

void backend_shadow_moe_sort(struct stream *s, in_t expert, in_t prob, out_t offsets,
                             out_t row_token, out_t row_prob, out_t token_row,
                             out_t tokens_per_expert)
{
    BEGIN(moe_sort, tensor_numel(expert));
    const in_t hexpert = IN(expert, NULL, NULL), hprob = IN(prob, NULL, NULL);
    const out_t hoffsets = OUT(offsets, NULL, NULL), hrow_token = OUT(row_token, NULL, NULL),
                hrow_prob = OUT(row_prob, NULL, NULL), htoken_row = OUT(token_row, NULL, NULL),
                hcount = OUT(tokens_per_expert, NULL, NULL);
    c.primary->moe_sort(s, expert, prob, offsets, row_token, row_prob, token_row,
                        tokens_per_expert);
    c.truth->moe_sort(&c.cpu, hexpert, hprob, hoffsets, hrow_token, hrow_prob, htoken_row, hcount);
    shadow_end(&c);
}

void backend_shadow_dispatch_order(struct stream *s, in_t all, int64_t first, out_t offsets,
                                   out_t order, out_t inverse)
{
    BEGIN(dispatch_order, 0);
    const in_t hall = IN(all, NULL, NULL);
    const out_t hoffsets = OUT(offsets, NULL, NULL), horder = OUT(order, NULL, NULL),
                hinverse = OUT(inverse, NULL, NULL);
    c.primary->dispatch_order(s, all, first, offsets, order, inverse);
    c.truth->dispatch_order(&c.cpu, hall, first, hoffsets, horder, hinverse);
    shadow_end(&c);
}

void backend_shadow_moe_unsort_prob(struct stream *s, in_t drow, in_t token_row, out_t dprob)
{
    BEGIN(moe_unsort_prob, tensor_numel(dprob));
    const in_t hdrow = IN(drow, NULL, NULL), htoken_row = IN(token_row, NULL, NULL);
    const out_t hdprob = OUT(dprob, NULL, NULL);
    c.primary->moe_unsort_prob(s, drow, token_row, dprob);
    c.truth->moe_unsort_prob(&c.cpu, hdrow, htoken_row, hdprob);
    shadow_end(&c);
}

void backend_shadow_expert_act_forward(struct stream *s, in_t h, in_t prob, out_t y)
{
    BEGIN(expert_act_forward, tensor_numel(y));
    const struct shadow_pick rows = shadow_rows(&c, tensor_rows(h));
    const in_t hh = IN(h, &rows, NULL), hprob = IN(prob, &rows, NULL);
    const out_t hy = OUT(y, &rows, NULL);
    c.primary->expert_act_forward(s, h, prob, y);
    c.truth->expert_act_forward(&c.cpu, hh, hprob, hy);
    shadow_end(&c);
}

void backend_shadow_expert_act_backward(struct stream *s, in_t h, in_t prob, in_t dy, out_t dh,
                                        out_t dprob, out_t y)
{
    BEGIN(expert_act_backward, 2 * tensor_numel(dh));
    const struct shadow_pick rows = shadow_rows(&c, tensor_rows(h));
    const int64_t cols = tensor_cols(h);
    const in_t hh = IN(h, &rows, NULL), hprob = IN(prob, &rows, NULL), hdy = IN(dy, &rows, NULL);
    const double walk = sqrt((double)cols) * shadow_rms(hdy),
                 square = shadow_rms(hh) * shadow_rms(hh);
    const out_t hdh = OUT(dh, &rows, NULL), hdprob = OUT(dprob, &rows, NULL);
    shadow_sums(&c, cols, walk * square);
    const out_t hy = OUT(y, &rows, NULL);
    c.primary->expert_act_backward(s, h, prob, dy, dh, dprob, y);
    c.truth->expert_act_backward(&c.cpu, hh, hprob, hdy, hdh, hdprob, hy);
    shadow_end(&c);
}

void backend_shadow_expert_bias_update(struct stream *s, double rate, out_t bias, out_t count)
{
    BEGIN(expert_bias_update, tensor_numel(bias));
    const out_t hbias = OUT(bias, NULL, NULL);
    shadow_adds(&c, 1, rate);
    const out_t hcount = OUT(count, NULL, NULL);
    c.primary->expert_bias_update(s, rate, bias, count);
    c.truth->expert_bias_update(&c.cpu, rate, hbias, hcount);
    shadow_end(&c);
}

/* ---- vision ---- */

void backend_shadow_vit_assemble_forward(struct stream *s, in_t e, in_t class_token, in_t grid,
                                         in_t row_source, in_t pos_index, in_t pos_w, out_t x)
{
    BEGIN(vit_assemble_forward, 4 * tensor_numel(x));
    const struct shadow_pick cols = shadow_columns(&c, tensor_cols(x));
    const in_t he = IN(e, NULL, &cols), hclass = IN(class_token, NULL, &cols),
               hgrid = IN(grid, NULL, &cols), hsource = IN(row_source, NULL, NULL),
               hindex = IN(pos_index, NULL, NULL), hweight = IN(pos_w, NULL, NULL);
    const out_t hx = OUT(x, NULL, &cols);
    shadow_sums(&c, 4, shadow_rms(hgrid));
    c.primary->vit_assemble_forward(s, e, class_token, grid, row_source, pos_index, pos_w, x);
    c.truth->vit_assemble_forward(&c.cpu, he, hclass, hgrid, hsource, hindex, hweight, hx);
    shadow_end(&c);
}

void backend_shadow_vit_assemble_backward(struct stream *s, in_t dx, in_t row_source,
                                          in_t pos_index, in_t pos_w, out_t de, out_t dclass_token,
                                          out_t dgrid)
{
    const int64_t rows = tensor_rows(dx);
    BEGIN(vit_assemble_backward, 4 * tensor_numel(dx));
    const struct shadow_pick cols = shadow_columns(&c, tensor_cols(dx));
    const in_t hdx = IN(dx, NULL, &cols), hsource = IN(row_source, NULL, NULL),
               hindex = IN(pos_index, NULL, NULL), hweight = IN(pos_w, NULL, NULL);
    const double walk = sqrt((double)rows) * shadow_rms(hdx);
    const out_t hde = OUT(de, NULL, &cols), hdclass = OUT(dclass_token, NULL, &cols);
    shadow_adds(&c, rows, walk);
    const out_t hdgrid = OUT(dgrid, NULL, &cols);
    shadow_adds(&c, rows, walk);
    c.primary->vit_assemble_backward(s, dx, row_source, pos_index, pos_w, de, dclass_token, dgrid);
    c.truth->vit_assemble_backward(&c.cpu, hdx, hsource, hindex, hweight, hde, hdclass, hdgrid);
    shadow_end(&c);
}
