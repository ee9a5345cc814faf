/* shadow.c - copies of operands, the comparison and its tolerances; see shadow.h.
 *
 * An element x of an output is compared with the truth's w:
 *     |x - w| <= element (|w| + rms) + 20 u_n (|w| + max(rms, terms)),
 * and over a whole output (or part of it)
 *     |x - w|_2 <= frobenius |w|_2 + u_n max(|w|_2, terms sqrt(elements)),
 * rms that of w, element and frobenius from the table below, and u_n = 6e-8 sqrt(n) the rounding of
 * a sum of n fp32 numbers in any order; with bf16 operands it grows by n/16 truncations, as tensor
 * cores add. `terms` is the size of the sum's terms where they may cancel. Integers are equal. A
 * NaN agrees with a NaN only, an infinity with itself.
 */
#include "shadow.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "bf16.h"
#include "check.h"
#include "log.h"

struct bound {
    double frobenius, element;
};

/* The bounds of a type: half a unit in the last place of bf16 is 2^-8 of the number at most. */
#define EXACT \
    { \
        0, 0 \
    }
#define ROUND \
    { \
        4e-3, 4e-3 \
    }
#define TWICE \
    { \
        6e-3, 1e-2 \
    } /* rounded, added to and rounded again */
#define SQUARE \
    { \
        1.2e-2, 1.3e-2 \
    } /* the square of what was rounded, rounded */
#define SINGLE \
    { \
        1e-6, 1e-5 \
    }
#define OP(op) SHADOW_##op

/* A row for every output: results in bf16; in fp32 from operands in bf16; in fp32 from fp32. */
static const struct tolerance {
    enum shadow_op op;
    const char *output;
    struct bound bf16, mixed, fp32;
} table[] = {
    { OP(copy), "dst", EXACT, EXACT, EXACT },
    { OP(fill), "t", ROUND, SINGLE, SINGLE },
    { OP(cast), "dst", ROUND, SINGLE, SINGLE },
    { OP(initialise), "t", ROUND, SINGLE, SINGLE },
    { OP(gemm), "d", TWICE, SINGLE, SINGLE },
    { OP(grouped_gemm), "c", ROUND, SINGLE, SINGLE },
    { OP(add), "y", ROUND, SINGLE, SINGLE },
    { OP(add_bias), "y", ROUND, SINGLE, SINGLE },
    { OP(bias_backward), "dbias", ROUND, SINGLE, SINGLE },
    { OP(activation_forward), "y", ROUND, SINGLE, SINGLE },
    { OP(activation_backward), "dx", ROUND, SINGLE, SINGLE },
    { OP(rmsnorm_forward), "y", ROUND, SINGLE, SINGLE },
    { OP(rmsnorm_forward), "rs", ROUND, SINGLE, SINGLE },
    { OP(rmsnorm_backward), "dx", ROUND, SINGLE, SINGLE },
    { OP(rmsnorm_backward), "dw", ROUND, SINGLE, SINGLE },
    { OP(layernorm_forward), "y", ROUND, SINGLE, SINGLE },
    { OP(layernorm_forward), "mean", ROUND, SINGLE, SINGLE },
    { OP(layernorm_forward), "rs", ROUND, SINGLE, SINGLE },
    { OP(layernorm_backward), "dx", ROUND, SINGLE, SINGLE },
    { OP(layernorm_backward), "dw", ROUND, SINGLE, SINGLE },
    { OP(layernorm_backward), "db", ROUND, SINGLE, SINGLE },
    /* Probabilities meet the values, and their gradients the keys and queries, in bf16. */
    { OP(attention_forward), "o", { 6e-3, 0.1 }, { 3e-5, 3e-3 }, { 3e-5, 3e-3 } },
    { OP(attention_forward), "lse", ROUND, { 1e-5, 1e-3 }, { 1e-5, 1e-3 } },
    { OP(attention_backward), "dqkv", { 1e-2, 0.3 }, { 3e-5, 3e-3 }, { 3e-5, 3e-3 } },
    { OP(gather_rows), "out", EXACT, EXACT, EXACT },
    { OP(gather_sum_rows), "out", ROUND, SINGLE, SINGLE },
    { OP(embed_merge_forward), "out", EXACT, EXACT, EXACT },
    { OP(embed_merge_backward), "dtable", ROUND, SINGLE, SINGLE },
    { OP(embed_merge_backward), "dimage", EXACT, EXACT, EXACT },
    { OP(loss_sum), "mx", EXACT, EXACT, EXACT },
    { OP(loss_sum), "se", ROUND, SINGLE, SINGLE },
    { OP(loss_label), "se", ROUND, SINGLE, SINGLE },
    { OP(loss_label), "pl", ROUND, SINGLE, SINGLE },
    { OP(loss_finish), "loss", ROUND, SINGLE, SINGLE },
    { OP(loss_finish), "total", ROUND, SINGLE, SINGLE },
    { OP(loss_backward), "logits", { 4.2e-3, 5e-3 }, { 2e-6, 2e-5 }, { 2e-6, 2e-5 } },
    { OP(conv_forward), "y", ROUND, SINGLE, SINGLE },
    { OP(conv_backward), "dx", ROUND, SINGLE, SINGLE },
    { OP(conv_backward), "dw", ROUND, SINGLE, SINGLE },
    { OP(conv_backward), "db", ROUND, SINGLE, SINGLE },
    /* The chunked scan multiplies decayed operands in bf16. */
    { OP(ssd_forward), "y", { 8e-3, 0.05 }, { 2e-5, 1e-3 }, { 2e-5, 1e-3 } },
    { OP(ssd_backward), "dxbc", { 1e-2, 0.1 }, { 5e-5, 5e-3 }, { 5e-5, 5e-3 } },
    { OP(ssd_backward), "ddt", { 1e-2, 0.1 }, { 5e-5, 5e-3 }, { 5e-5, 5e-3 } },
    { OP(ssd_backward), "ddt_bias", ROUND, { 1e-2, 0.1 }, { 1e-4, 1e-3 } },
    { OP(ssd_backward), "da_log", ROUND, { 1e-2, 0.1 }, { 1e-4, 1e-3 } },
    { OP(ssd_backward), "dd_skip", ROUND, { 1e-2, 0.1 }, { 1e-4, 1e-3 } },
    { OP(gated_norm_forward), "o", ROUND, SINGLE, SINGLE },
    { OP(gated_norm_forward), "rs", ROUND, SINGLE, SINGLE },
    { OP(gated_norm_backward), "dy", ROUND, SINGLE, SINGLE },
    { OP(gated_norm_backward), "dz", ROUND, SINGLE, SINGLE },
    { OP(gated_norm_backward), "dw", ROUND, SINGLE, SINGLE },
    { OP(router_forward), "scores", ROUND, SINGLE, SINGLE },
    { OP(router_forward), "expert", EXACT, EXACT, EXACT },
    { OP(router_forward), "prob", ROUND, SINGLE, SINGLE },
    { OP(router_balance), "count", EXACT, EXACT, EXACT },
    { OP(router_balance), "psum", ROUND, SINGLE, SINGLE },
    { OP(router_balance_loss), "metric", ROUND, SINGLE, SINGLE },
    { OP(router_backward), "dlogits", ROUND, SINGLE, SINGLE },
    { OP(moe_sort), "offsets", EXACT, EXACT, EXACT },
    { OP(moe_sort), "row_token", EXACT, EXACT, EXACT },
    { OP(moe_sort), "row_prob", EXACT, EXACT, EXACT },
    { OP(moe_sort), "token_row", EXACT, EXACT, EXACT },
    { OP(moe_sort), "tokens_per_expert", EXACT, EXACT, EXACT },
    { OP(dispatch_order), "offsets", EXACT, EXACT, EXACT },
    { OP(dispatch_order), "order", EXACT, EXACT, EXACT },
    { OP(dispatch_order), "inverse", EXACT, EXACT, EXACT },
    { OP(moe_unsort_prob), "dprob", EXACT, EXACT, EXACT },
    { OP(expert_act_forward), "y", ROUND, SINGLE, SINGLE },
    { OP(expert_act_backward), "dh", ROUND, SINGLE, SINGLE },
    { OP(expert_act_backward), "dprob", ROUND, SINGLE, SINGLE },
    { OP(expert_act_backward), "y", ROUND, SINGLE, SINGLE },
    { OP(grouped_act_forward), "h", ROUND, SINGLE, SINGLE },
    { OP(grouped_act_forward), "y", SQUARE, SINGLE, SINGLE },
    { OP(grouped_act_backward), "dh", SQUARE, SINGLE, SINGLE },
    { OP(grouped_act_backward), "dprob", ROUND, TWICE, SINGLE },
    { OP(grouped_act_backward), "y", ROUND, SINGLE, SINGLE },
    { OP(expert_bias_update), "bias", ROUND, SINGLE, SINGLE },
    { OP(expert_bias_update), "count", EXACT, EXACT, EXACT },
    { OP(vit_assemble_forward), "x", TWICE, SINGLE, SINGLE },
    { OP(vit_assemble_backward), "de", EXACT, EXACT, EXACT },
    { OP(vit_assemble_backward), "dclass_token", ROUND, SINGLE, SINGLE },
    { OP(vit_assemble_backward), "dgrid", ROUND, SINGLE, SINGLE },
    { OP(sum_squares), "total", ROUND, SINGLE, SINGLE },
    { OP(count_zeros), "total", EXACT, EXACT, EXACT },
    { OP(sum_wide), "total", EXACT, SINGLE, SINGLE },
    { OP(decide_update), "result", EXACT, SINGLE, SINGLE },
    { OP(adamw), "master", ROUND, SINGLE, SINGLE },
    { OP(adamw), "m", ROUND, SINGLE, SINGLE },
    { OP(adamw), "v", ROUND, SINGLE, SINGLE },
    { OP(adamw), "param", ROUND, SINGLE, SINGLE },
};

#define NAME(op) #op,
static const char *const op_name[SHADOW_OPS] = { BACKEND_OPS(NAME) };

/* About a tenth of a second of one core. */
static const double SAMPLE_ABOVE = 8e6;

static struct {
    const struct backend_ops *primary, *truth;
    int streams;
    bool limited;
    double sample_above;
    int64_t calls[SHADOW_OPS], sampled[SHADOW_OPS];
    double nearest[SHADOW_OPS];     /* the largest error as a fraction of its tolerance */
    const char *output[SHADOW_OPS]; /* where */
} state;

static void fetch(const struct shadow_call *c, const struct shadow_operand *o,
                  const struct tensor *to);
static void compare(struct shadow_call *c, struct shadow_operand *o);
static void compare_integers(const struct shadow_call *c, const struct shadow_operand *o,
                             const struct tensor *got);
static void compare_part(struct shadow_call *c, const struct shadow_operand *o,
                         const struct tensor *got, struct bound b, int part);

/* ---- the process's shadow ---- */

void shadow_attach(const struct backend_ops *primary, const struct backend_ops *truth)
{
    ASSERT(state.streams == 0 || (state.primary == primary && state.truth == truth));
    if (state.streams++ == 0) {
        state.primary = primary;
        state.truth = truth;
        memset(state.calls, 0, sizeof state.calls);
        memset(state.sampled, 0, sizeof state.sampled);
        memset(state.nearest, 0, sizeof state.nearest);
    }
}

void shadow_detach(void)
{
    ASSERT(state.streams > 0);
    if (--state.streams > 0)
        return;
    for (int op = 0; op < SHADOW_OPS; op++)
        if (state.calls[op] > 0)
            log_line(
                "shadow: %-21s %8lld calls agree, %lld of them sampled; nearest to its tolerance: %.2f of it%s%s",
                op_name[op], (long long)state.calls[op], (long long)state.sampled[op],
                state.nearest[op], state.nearest[op] > 0 ? " in " : "",
                state.nearest[op] > 0 ? state.output[op] : "");
}

const struct backend_ops *shadow_primary(void)
{
    ASSERT(state.streams > 0);
    return state.primary;
}

void shadow_sample_above(double steps)
{
    state.limited = true;
    state.sample_above = steps;
}

int64_t shadow_calls(enum shadow_op op)
{
    return state.calls[op];
}

/* ---- operands ---- */

void shadow_begin(struct shadow_call *c, struct stream *s, enum shadow_op op, double steps)
{
    *c = (struct shadow_call){ .primary = state.primary,
                               .truth = state.truth,
                               .op = op,
                               .number = state.calls[op]++,
                               .sampled =
                                   steps > (state.limited ? state.sample_above : SAMPLE_ABOVE),
                               .stream = s,
                               .cpu = { .name = "shadow" } };
    ASSERT(state.streams > 0);
    state.sampled[op] += c->sampled;
    log_beat(); /* many times slower than the operation is no hang */
}

struct shadow_pick shadow_range(int64_t first, int64_t n)
{
    return (struct shadow_pick){ .blocks = 1, .first = { first }, .n = { n } };
}

/* One block in each quarter: the first and the last at the ends, the others anywhere. */
struct shadow_pick shadow_blocks(const struct shadow_call *c, int64_t n, int64_t block)
{
    if (!c->sampled || n <= SHADOW_SPREAD * block)
        return shadow_range(0, n);
    struct shadow_pick p = { .blocks = SHADOW_SPREAD };
    uint64_t random = ((uint64_t)c->number * SHADOW_OPS + c->op) * 0x9E3779B97F4A7C15u;
    for (int i = 0; i < SHADOW_SPREAD; i++) {
        const int64_t from = n * i / SHADOW_SPREAD, to = n * (i + 1) / SHADOW_SPREAD - block;
        random = (random ^ random >> 31) * 0xBF58476D1CE4E5B9u;
        p.first[i] = i == 0 ? 0
                     : i == SHADOW_SPREAD - 1
                         ? n - block
                         : from + (int64_t)((random >> 20) % (uint64_t)(to - from + 1));
        p.n[i] = block;
    }
    return p;
}

struct shadow_pick shadow_rows(const struct shadow_call *c, int64_t n)
{
    return shadow_blocks(c, n, SHADOW_ROWS);
}

struct shadow_pick shadow_columns(const struct shadow_call *c, int64_t n)
{
    return shadow_blocks(c, n, SHADOW_COLUMNS);
}

struct shadow_pick shadow_scaled(const struct shadow_pick *pick, int64_t width, int64_t offset)
{
    struct shadow_pick p = *pick;
    for (int i = 0; i < p.blocks; i++) {
        p.first[i] = offset + p.first[i] * width;
        p.n[i] *= width;
    }
    return p;
}

struct shadow_pick shadow_joined(const struct shadow_pick *a, const struct shadow_pick *b)
{
    struct shadow_pick p = *a;
    ASSERT(a->blocks + b->blocks <= SHADOW_BLOCKS);
    for (int i = 0; i < b->blocks; i++, p.blocks++) {
        p.first[p.blocks] = b->first[i];
        p.n[p.blocks] = b->n[i];
    }
    return p;
}

int64_t shadow_count(const struct shadow_pick *pick)
{
    int64_t n = 0;
    for (int i = 0; i < pick->blocks; i++)
        n += pick->n[i];
    return n;
}

static bool is_float(enum dtype dtype)
{
    return dtype == DTYPE_F32 || dtype == DTYPE_BF16 || dtype == DTYPE_F64;
}

static struct shadow_operand *add(struct shadow_call *c, const char *name, in_t t,
                                  const struct shadow_pick *rows, const struct shadow_pick *cols)
{
    ASSERT(c->count < SHADOW_OPERANDS);
    struct shadow_operand *o = &c->operand[c->count++];
    const enum dtype dtype =
        is_float(t->dtype) && !(c->wide && t->dtype == DTYPE_F64) ? DTYPE_F32 : t->dtype;
    const bool whole = !rows && !cols;
    *o = (struct shadow_operand){ .name = name, .dev = *t, .length = 1 };
    if (t->ndim == 1 && rows) {
        ASSERT(!cols);
        cols = rows;
        rows = NULL;
    }
    o->rows = rows ? *rows : shadow_range(0, tensor_rows(t));
    o->cols = cols ? *cols : shadow_range(0, tensor_cols(t));
    const int64_t shape[2] = { shadow_count(&o->rows), shadow_count(&o->cols) };
    o->host = whole ? tensor_view(NULL, dtype, PLACE_HOST, t->ndim, t->shape)
                    : tensor_view(NULL, dtype, PLACE_HOST, t->ndim == 1 ? 1 : 2,
                                  t->ndim == 1 ? &shape[1] : shape);
    o->host.data = xmalloc((size_t)tensor_numel(&o->host) + 1, dtype_bytes(dtype));
    c->bf16 |= t->dtype == DTYPE_BF16;
    fetch(c, o, &o->host);
    return o;
}

in_t shadow_in(struct shadow_call *c, const char *name, in_t t, const struct shadow_pick *rows,
               const struct shadow_pick *cols)
{
    return t ? &add(c, name, t, rows, cols)->host : NULL;
}

out_t shadow_out(struct shadow_call *c, const char *name, out_t t, const struct shadow_pick *rows,
                 const struct shadow_pick *cols)
{
    if (!t)
        return NULL;
    struct shadow_operand *o = add(c, name, t, rows, cols);
    o->compare = true;
    return &o->host;
}

in_t shadow_work(struct shadow_call *c, enum dtype dtype, int64_t n)
{
    ASSERT(c->count < SHADOW_OPERANDS);
    struct shadow_operand *o = &c->operand[c->count++];
    *o = (struct shadow_operand){ .name = "work",
                                  .host = tensor_1d(xmalloc((size_t)n + 1, dtype_bytes(dtype)),
                                                    dtype, PLACE_HOST, n) };
    return &o->host;
}

static struct shadow_operand *last(struct shadow_call *c)
{
    ASSERT(c->count > 0 && c->operand[c->count - 1].compare);
    return &c->operand[c->count - 1];
}

void shadow_sums(struct shadow_call *c, int64_t length, double terms)
{
    last(c)->length = length;
    last(c)->terms = terms;
}

void shadow_adds(struct shadow_call *c, int64_t length, double terms)
{
    shadow_sums(c, length, terms + shadow_rms(&last(c)->host));
}

void shadow_parts(struct shadow_call *c, int64_t period, int64_t first, int64_t second)
{
    last(c)->period = period;
    last(c)->edge[0] = first;
    last(c)->edge[1] = second;
}

void shadow_slack(struct shadow_call *c, const int64_t *slack)
{
    last(c)->slack = slack;
}

static struct tensor block_of(const struct tensor *t, int64_t row, int64_t rows, int64_t col,
                              int64_t cols)
{
    struct tensor b = *t;
    b.data = (char *)t->data + (row * t->ld + col) * (int64_t)dtype_bytes(t->dtype);
    b.ndim = 2;
    b.shape[0] = rows;
    b.shape[1] = cols;
    return b;
}

static float widened(const void *p, enum dtype dtype, int64_t i)
{
    return dtype == DTYPE_F32   ? ((const float *)p)[i]
           : dtype == DTYPE_F64 ? (float)((const double *)p)[i]
                                : bf16_to_float(((const uint16_t *)p)[i]);
}

/* The picked blocks of the primary's memory, side by side, in `to`: of the host copy's type and
 * shape. */
static void fetch(const struct shadow_call *c, const struct shadow_operand *o,
                  const struct tensor *to)
{
    const int64_t rows = shadow_count(&o->rows), cols = shadow_count(&o->cols);
    if (rows * cols == 0)
        return;
    const bool same = o->dev.dtype == to->dtype;
    struct tensor raw =
        tensor_2d(same ? to->data : xmalloc((size_t)(rows * cols), dtype_bytes(o->dev.dtype)),
                  o->dev.dtype, PLACE_HOST, rows, cols);
    int64_t row = 0;
    for (int i = 0; i < o->rows.blocks; row += o->rows.n[i++]) {
        int64_t col = 0;
        for (int j = 0; j < o->cols.blocks; col += o->cols.n[j++]) {
            ASSERT(o->rows.first[i] + o->rows.n[i] <= tensor_rows(&o->dev) &&
                   o->cols.first[j] + o->cols.n[j] <= tensor_cols(&o->dev));
            const struct tensor from =
                block_of(&o->dev, o->rows.first[i], o->rows.n[i], o->cols.first[j], o->cols.n[j]);
            const struct tensor into = block_of(&raw, row, o->rows.n[i], col, o->cols.n[j]);
            c->primary->copy(c->stream, &from, &into);
        }
    }
    c->primary->stream_sync(c->stream);
    if (same)
        return;
    for (int64_t i = 0; i < rows * cols; i++)
        ((float *)to->data)[i] = widened(raw.data, raw.dtype, i);
    free(raw.data);
}

double shadow_rms(in_t host)
{
    const int64_t n = tensor_numel(host);
    const float *x = host->data;
    double sum = 0;
    ASSERT(host->dtype == DTYPE_F32);
    for (int64_t i = 0; i < n; i++)
        sum += isfinite(x[i]) ? (double)x[i] * x[i] : 0;
    return n > 0 ? sqrt(sum / (double)n) : 0;
}

double shadow_largest(in_t host)
{
    const int64_t n = tensor_numel(host);
    const float *x = host->data;
    double most = 0;
    ASSERT(host->dtype == DTYPE_F32);
    for (int64_t i = 0; i < n; i++)
        most = isfinite(x[i]) && fabs((double)x[i]) > most ? fabs((double)x[i]) : most;
    return most;
}

void shadow_adopt(struct shadow_call *c, out_t host)
{
    for (int i = 0; i < c->count; i++)
        if (&c->operand[i].host == host) {
            c->operand[i].compare = false;
            fetch(c, &c->operand[i], &c->operand[i].host);
            return;
        }
    FATAL(EXIT_INTERNAL, "%s: no such operand", op_name[c->op]);
}

/* ---- the comparison ---- */

void shadow_end(struct shadow_call *c)
{
    for (int i = 0; i < c->count; i++)
        if (c->operand[i].compare && tensor_numel(&c->operand[i].host) > 0)
            compare(c, &c->operand[i]);
    for (int i = 0; i < c->count; i++)
        free(c->operand[i].host.data);
}

void shadow_fail(const struct shadow_call *c, const char *tensor, int64_t row, int64_t col,
                 double primary, double truth, double tolerance, const char *why)
{
    FATAL(
        EXIT_NUMERICS,
        "shadow: %s: %s[%lld,%lld] is %.9g of %s and %.9g of %s: they differ by %.3g, tolerance %.3g%s%s; call %lld of this operation",
        op_name[c->op], tensor, (long long)row, (long long)col, primary, c->primary->name, truth,
        c->truth->name, fabs(primary - truth), tolerance, *why ? "; " : "", why,
        (long long)c->number);
}

/* The index in the tensor of entry i of the picked ones. */
static int64_t original(const struct shadow_pick *pick, int64_t i)
{
    int b = 0;
    for (; i >= pick->n[b]; b++)
        i -= pick->n[b];
    return pick->first[b] + i;
}

static _Noreturn void fail_at(const struct shadow_call *c, const struct shadow_operand *o,
                              int64_t i, double primary, double truth, double tolerance,
                              const char *why)
{
    const int64_t cols = tensor_cols(&o->host);
    shadow_fail(c, o->name, original(&o->rows, i / cols), original(&o->cols, i % cols), primary,
                truth, tolerance, why);
}

static const struct tolerance *tolerance_of(const struct shadow_call *c, const char *output)
{
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (table[i].op == c->op && strcmp(table[i].output, output) == 0)
            return &table[i];
    FATAL(EXIT_INTERNAL, "shadow: %s: %s has no tolerance", op_name[c->op], output);
}

/* fp64 is compared as fp32. */
static void narrow(struct tensor *t)
{
    const double *from = t->data;
    float *to = t->data;
    for (int64_t i = 0; t->dtype == DTYPE_F64 && i < tensor_numel(t); i++) {
        const float x = (float)from[i];
        memcpy(&to[i], &x, sizeof x);
    }
    t->dtype = DTYPE_F32;
}

static void compare(struct shadow_call *c, struct shadow_operand *o)
{
    const struct tolerance *t = tolerance_of(c, o->name);
    struct tensor got = o->host;
    got.data = xmalloc((size_t)tensor_numel(&o->host), dtype_bytes(o->host.dtype));
    fetch(c, o, &got);
    if (!is_float(o->host.dtype))
        compare_integers(c, o, &got);
    else {
        const struct bound b = o->dev.dtype == DTYPE_BF16 ? t->bf16 : c->bf16 ? t->mixed : t->fp32;
        narrow(&got);
        narrow(&o->host);
        for (int part = 0; part < (o->period ? SHADOW_PARTS : 1); part++)
            compare_part(c, o, &got, b, part);
    }
    free(got.data);
}

static int64_t integer_at(const struct tensor *t, int64_t i)
{
    switch (t->dtype) {
    case DTYPE_I32: return ((const int32_t *)t->data)[i];
    case DTYPE_I64: return ((const int64_t *)t->data)[i];
    default: return ((const uint8_t *)t->data)[i];
    }
}

static void compare_integers(const struct shadow_call *c, const struct shadow_operand *o,
                             const struct tensor *got)
{
    for (int64_t i = 0; i < tensor_numel(got); i++) {
        const int64_t x = integer_at(got, i), w = integer_at(&o->host, i),
                      most = o->slack ? o->slack[i] : 0;
        if (x - w > most || w - x > most)
            fail_at(c, o, i, (double)x, (double)w, (double)most, "");
    }
}

static bool in_part(const struct shadow_operand *o, int64_t i, int part)
{
    if (!o->period)
        return true;
    const int64_t at = i % tensor_cols(&o->host) % o->period;
    return part == (at >= o->edge[0]) + (at >= o->edge[1]);
}

static void note(struct shadow_call *c, const char *output, double fraction)
{
    if (fraction > state.nearest[c->op]) {
        state.nearest[c->op] = fraction;
        state.output[c->op] = output;
    }
}

static void compare_part(struct shadow_call *c, const struct shadow_operand *o,
                         const struct tensor *got, struct bound b, int part)
{
    const float *x = got->data, *w = o->host.data;
    const int64_t n = tensor_numel(got);
    const double length = (double)(o->length > 1 ? o->length : 1);
    const double u = b.element == 0 ? 0 : 6e-8 * sqrt(length) + (c->bf16 ? 3e-8 * length / 16 : 0);
    double square = 0, difference = 0, count = 0, worst = -1, largest = 0;
    int64_t at = 0;
    for (int64_t i = 0; i < n; i++)
        if (in_part(o, i, part) && isfinite(w[i])) {
            square += (double)w[i] * w[i];
            count++;
        }
    const double rms = count > 0 ? sqrt(square / count) : 0, scale = fmax(rms, o->terms);
    for (int64_t i = 0; i < n; i++) {
        if (!in_part(o, i, part) || x[i] == w[i] || (isnan(x[i]) && isnan(w[i])))
            continue;
        const double error = fabs((double)x[i] - w[i]),
                     most = b.element * (fabs((double)w[i]) + rms) +
                            20 * u * (fabs((double)w[i]) + scale);
        if (!(error <= most))
            fail_at(c, o, i, x[i], w[i], most, "");
        difference += error * error;
        largest = fmax(largest, error / most);
        if (error > worst) {
            worst = error;
            at = i;
        }
    }
    const double norm = sqrt(difference),
                 most = b.frobenius * sqrt(square) + u * sqrt(count) * scale;
    if (norm > most) {
        char why[120];
        snprintf(why, sizeof why, "as a whole by %.3g, tolerance %.3g", norm, most);
        fail_at(c, o, at, x[at], w[at],
                b.element * (fabs((double)w[at]) + rms) + 20 * u * (fabs((double)w[at]) + scale),
                why);
    }
    note(c, o->name, fmax(largest, norm > 0 ? norm / most : 0));
}
