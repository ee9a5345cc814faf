/* ssd.c - the selective state space scan in chunks (model.md 1.6.5), forward and backward.
 *
 * Chunks restart at each segment, so all tokens of a chunk belong to one segment and the state
 * enters a segment as zero: the masks of 1.6.5 vanish and two segments never meet in one matrix
 * product. One (group, segment) after the other:
 *
 *   CB = C B^T [q,q]                                          once per group
 *   M_ij = CB_ij L_ij del_j (i >= j)                          per head
 *   y    = M x + carry (C St^T) + D x
 *        C St^T for all heads of the group at once: St [heads*P, N]
 *   St   = keep St + (tail del x)^T B
 *
 * L_ij = a_{j+1}...a_i comes from L_{i-1,j} by one factor a_i = exp(del_i A) <= 1, in double;
 * carry, tail and keep are such products too. Nothing is ever divided and no exponent is positive.
 * Sums over tokens are in double, matrix products are the BLAS's.
 *
 * Backward first walks the segment forward and keeps the state before each chunk, then walks the
 * chunks backwards with the adjoint state Gm. Scratch: see `scratch_of`; it is large enough for one
 * segment of all tokens.
 */
#include <string.h>
#include "ssd.h"

/* The rates of one (group, segment), each [per_group][len]. */
struct rates {
    double *del, *slope, *decay;
    /* products of decays from the start of the chunk to here, and from behind here to its end */
    double *carry, *tail;
};

/* Letters: q = rows of a chunk at most, w = per_group*P, m = tokens. */
struct scratch {
    struct rates rates;         /* [per_group][m] each */
    double *row, *part, *e, *r; /* [q] */
    double *sums;               /* [per_group][3]: ddt_bias, dA, dD */
    /* [chunks][w,N] of the longest segment (forward uses one), [w,N] */
    real *state, *gm;
    real *cb, *mix, *gx, *z; /* [q,q] */
    real *v, *sc, *xs, *ys;  /* [q,w] */
};

/* One chunk of one group. */
struct chunk {
    int64_t first, at, q;  /* token, the same within the segment, rows */
    int64_t len;           /* of the segment: rows of `rates` lie so far apart */
    bool opens, closes;    /* the segment */
    int64_t group, head;   /* head: the group's first */
    const real *x, *b, *c; /* [q, w], [q, N], [q, N], rows ld apart */
};

static int64_t scratch_of(struct scratch *w, real *base, int64_t tokens, int64_t per_group,
                          int64_t head_dim, int64_t state, int64_t chunk);
static struct scratch scratch_in(const struct ssd *a, in_t work);
static struct chunk chunk_of(const struct ssd *a, int64_t group, int64_t segment, int64_t index);
static int64_t chunks_of(const struct ssd *a, int64_t segment);
static void find_rates(const struct ssd *a, const struct rates *r, int64_t group, int64_t segment);
static void forward_chunk(const struct ssd *a, const struct scratch *w, const struct chunk *k,
                          out_t y);
static void advance_state(const struct ssd *a, const struct scratch *w, const struct chunk *k,
                          const real *from, real *to);
static void backward_chunk(const struct ssd *a, const struct scratch *w, const struct chunk *k,
                           in_t dy, const real *state, out_t dxbc, out_t ddt);
static void backward_head(const struct ssd *a, const struct scratch *w, const struct chunk *k,
                          int64_t h, in_t dy, const real *state, out_t dxbc, out_t ddt);

int64_t REF(ssd_work)(int64_t tokens, int64_t segments, int heads, int head_dim, int groups,
                      int state, int chunk)
{
    struct scratch w;
    ASSERT(tokens >= 0 && groups > 0 && chunk > 0);
    return scratch_of(&w, NULL, tokens, heads / groups, head_dim, state, chunk);
}

void REF(ssd_forward)(struct stream *s, in_t xbc, in_t dt, in_t dt_bias, in_t a_log, in_t d_skip,
                      in_t cu, int64_t max_len, int heads, int head_dim, int groups, int state,
                      int chunk, in_t work, out_t y)
{
    const struct ssd a = ssd_arguments(xbc, dt, dt_bias, a_log, d_skip, cu, max_len, heads,
                                       head_dim, groups, state, chunk);
    const struct scratch w = scratch_in(&a, work);
    ref_expect(y, a.tokens, a.heads * head_dim);
    for (int64_t g = 0; g < groups; g++)
        for (int64_t i = 0; i < a.segments; i++) {
            find_rates(&a, &w.rates, g, i);
            for (int64_t c = 0; c < chunks_of(&a, i); c++) {
                const struct chunk k = chunk_of(&a, g, i, c);
                forward_chunk(&a, &w, &k, y);
                if (!k.closes)
                    advance_state(&a, &w, &k, w.state, w.state);
            }
        }
}

void REF(ssd_backward)(struct stream *s, in_t xbc, in_t dt, in_t dt_bias, in_t a_log, in_t d_skip,
                       in_t cu, int64_t max_len, int heads, int head_dim, int groups, int state,
                       int chunk, in_t dy, in_t work, out_t dxbc, out_t ddt, out_t ddt_bias,
                       out_t da_log, out_t dd_skip)
{
    const struct ssd a = ssd_arguments(xbc, dt, dt_bias, a_log, d_skip, cu, max_len, heads,
                                       head_dim, groups, state, chunk);
    const struct scratch w = scratch_in(&a, work);
    const int64_t size = a.per_group * head_dim * state;
    ref_expect(dy, a.tokens, a.heads * head_dim);
    ref_expect(dxbc, a.tokens, tensor_cols(xbc));
    ref_expect(ddt, a.tokens, heads);
    for (int64_t g = 0; g < groups; g++) {
        memset(w.sums, 0, (size_t)a.per_group * 3 * sizeof *w.sums);
        for (int64_t i = 0; i < a.segments; i++) {
            const int64_t chunks = chunks_of(&a, i);
            find_rates(&a, &w.rates, g, i);
            for (int64_t c = 0; c + 1 < chunks; c++) {
                const struct chunk k = chunk_of(&a, g, i, c);
                advance_state(&a, &w, &k, w.state + c * size, w.state + (c + 1) * size);
            }
            for (int64_t c = chunks - 1; c >= 0; c--) {
                const struct chunk k = chunk_of(&a, g, i, c);
                backward_chunk(&a, &w, &k, dy, w.state + c * size, dxbc, ddt);
            }
        }
        for (int64_t h = 0; h < a.per_group; h++) {
            const int64_t head = g * a.per_group + h;
            if (ddt_bias != NULL)
                ref_vector(ddt_bias, heads)[head] += (real)w.sums[3 * h];
            if (da_log != NULL)
                ref_vector(da_log, heads)[head] += (real)(w.sums[3 * h + 1] * ssd_a(&a, head));
            if (dd_skip != NULL)
                ref_vector(dd_skip, heads)[head] += (real)w.sums[3 * h + 2];
        }
    }
}

/* Lays the scratch out from `base` (NULL: only counts); returns its size in reals. The doubles come
 * first: the base is aligned for them. */
static int64_t scratch_of(struct scratch *w, real *base, int64_t tokens, int64_t per_group,
                          int64_t head_dim, int64_t state, int64_t chunk)
{
    const int64_t wide = sizeof(double) / sizeof(real), q = chunk < tokens ? chunk : tokens,
                  width = per_group * head_dim;
    const int64_t chunks = (tokens + chunk - 1) / chunk;
    const struct {
        double **wide;
        real **narrow;
        int64_t n;
    } part[] = {
        { &w->rates.del, NULL, per_group * tokens },
        { &w->rates.slope, NULL, per_group * tokens },
        { &w->rates.decay, NULL, per_group * tokens },
        { &w->rates.carry, NULL, per_group * tokens },
        { &w->rates.tail, NULL, per_group * tokens },
        { &w->row, NULL, q },
        { &w->part, NULL, q },
        { &w->e, NULL, q },
        { &w->r, NULL, q },
        { &w->sums, NULL, 3 * per_group },
        { NULL, &w->state, chunks * width * state },
        { NULL, &w->gm, width * state },
        { NULL, &w->cb, q * q },
        { NULL, &w->mix, q * q },
        { NULL, &w->gx, q * q },
        { NULL, &w->z, q * q },
        { NULL, &w->v, q * width },
        { NULL, &w->sc, q * width },
        { NULL, &w->xs, q * width },
        { NULL, &w->ys, q * width },
    };
    int64_t used = 0;
    for (size_t i = 0; i < sizeof part / sizeof *part; i++) {
        if (base != NULL && part[i].wide != NULL)
            *part[i].wide = (double *)(void *)(base + used);
        else if (base != NULL)
            *part[i].narrow = base + used;
        used += part[i].wide != NULL ? part[i].n * wide : part[i].n;
    }
    return used;
}

static struct scratch scratch_in(const struct ssd *a, in_t work)
{
    struct scratch w = { 0 };
    ASSERT(work->dtype == REF_DTYPE && (uintptr_t)work->data % sizeof(double) == 0);
    ASSERT(tensor_numel(work) >=
           scratch_of(&w, work->data, a->tokens, a->per_group, a->head_dim, a->state, a->chunk));
    return w;
}

static int64_t chunks_of(const struct ssd *a, int64_t segment)
{
    return (a->cu[segment + 1] - a->cu[segment] + a->chunk - 1) / a->chunk;
}

static struct chunk chunk_of(const struct ssd *a, int64_t group, int64_t segment, int64_t index)
{
    const int64_t len = a->cu[segment + 1] - a->cu[segment], at = index * a->chunk,
                  first = a->cu[segment] + at;
    const bool closes = len - at <= a->chunk;
    return (struct chunk){ .first = first,
                           .at = at,
                           .q = closes ? len - at : a->chunk,
                           .len = len,
                           .opens = at == 0,
                           .closes = closes,
                           .group = group,
                           .head = group * a->per_group,
                           .x = a->x + first * a->ld + group * a->per_group * a->head_dim,
                           .b = a->b + first * a->ld + group * a->state,
                           .c = a->c + first * a->ld + group * a->state };
}

/* c [m,n] = op(a) op(b) + beta c */
static void product(bool ta, bool tb, int64_t m, int64_t n, int64_t k, const real *a, int64_t lda,
                    const real *b, int64_t ldb, real beta, real *c, int64_t ldc)
{
    REF_GEMM(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans,
             ref_int(m), ref_int(n), ref_int(k), 1, a, ref_int(lda), b, ref_int(ldb), beta, c,
             ref_int(ldc));
}

static void find_rates(const struct ssd *a, const struct rates *r, int64_t group, int64_t segment)
{
    const int64_t start = a->cu[segment], len = a->cu[segment + 1] - start;
    for (int64_t h = 0; h < a->per_group; h++) {
        const int64_t head = group * a->per_group + h, o = h * len;
        const double a_head = ssd_a(a, head);
        for (int64_t i = 0; i < len; i++) {
            const struct ssd_rate rate = ssd_rate_of(a, start + i, head, a_head);
            r->del[o + i] = rate.del;
            r->slope[o + i] = rate.slope;
            r->decay[o + i] = rate.decay;
            r->carry[o + i] = i % a->chunk == 0 ? rate.decay : rate.decay * r->carry[o + i - 1];
        }
        for (int64_t i = len - 1; i >= 0; i--)
            r->tail[o + i] = i == len - 1 || (i + 1) % a->chunk == 0
                                 ? 1
                                 : r->decay[o + i + 1] * r->tail[o + i + 1];
    }
}

/* Row i of L from row i-1, in place. */
static void next_row(double *restrict row, int64_t i, double decay)
{
    for (int64_t j = 0; j < i; j++)
        row[j] *= decay;
    row[i] = 1;
}

/* mix = CB o L del, zero above the diagonal. */
static void mix_of(const struct scratch *w, int64_t q, const double *del, const double *decay)
{
    for (int64_t i = 0; i < q; i++) {
        const real *restrict cb = w->cb + i * q;
        const double *restrict row = w->row;
        real *restrict mix = w->mix + i * q;
        next_row(w->row, i, decay[i]);
        for (int64_t j = 0; j <= i; j++)
            mix[j] = (real)(row[j] * del[j]) * cb[j];
        for (int64_t j = i + 1; j < q; j++)
            mix[j] = 0;
    }
}

static void forward_chunk(const struct ssd *a, const struct scratch *w, const struct chunk *k,
                          out_t y)
{
    const int64_t q = k->q, n = a->state, width = a->head_dim;
    real *to = ref_row(y, k->first) + k->head * width;
    product(false, true, q, q, n, k->c, a->ld, k->b, a->ld, 0, w->cb, q);
    if (!k->opens)
        product(false, true, q, a->per_group * width, n, k->c, a->ld, w->state, n, 0, to, y->ld);
    for (int64_t h = 0; h < a->per_group; h++, to += width) {
        const int64_t o = h * k->len + k->at;
        const real *x = k->x + h * width, skip = a->d_skip[k->head + h];
        for (int64_t i = 0; i < q; i++) {
            const real *restrict from = x + i * a->ld, carry = (real)w->rates.carry[o + i];
            real *restrict out = to + i * y->ld;
            if (k->opens)
                for (int64_t p = 0; p < width; p++)
                    out[p] = skip * from[p];
            else
                for (int64_t p = 0; p < width; p++)
                    out[p] = carry * out[p] + skip * from[p];
        }
        mix_of(w, q, w->rates.del + o, w->rates.decay + o);
        product(false, false, q, width, q, w->mix, q, x, a->ld, 1, to, y->ld);
    }
}

/* to [q, w], the rows of a chunk times a factor per row and head: `scale`, and `more` unless
 * NULL. */
static void scale_rows(const struct ssd *a, const struct chunk *k, const real *from, int64_t ld,
                       const double *scale, const double *more, real *to)
{
    for (int64_t i = 0; i < k->q; i++)
        for (int64_t h = 0; h < a->per_group; h++) {
            const int64_t o = h * k->len + k->at + i;
            const real factor = (real)(more != NULL ? scale[o] * more[o] : scale[o]);
            const real *restrict in = from + i * ld + h * a->head_dim;
            real *restrict out = to + (i * a->per_group + h) * a->head_dim;
            for (int64_t p = 0; p < a->head_dim; p++)
                out[p] = factor * in[p];
        }
}

/* to = keep from, head by head; may be in place. */
static void keep_state(const struct ssd *a, const struct scratch *w, const struct chunk *k,
                       const real *from, real *to)
{
    const int64_t size = a->head_dim * a->state;
    for (int64_t h = 0; h < a->per_group; h++) {
        const real keep = (real)w->rates.carry[h * k->len + k->at + k->q - 1];
        for (int64_t i = h * size; i < (h + 1) * size; i++)
            to[i] = keep * from[i];
    }
}

/* The state behind the chunk from the state before it (not read when the chunk opens a segment);
 * may be in place. */
static void advance_state(const struct ssd *a, const struct scratch *w, const struct chunk *k,
                          const real *from, real *to)
{
    const int64_t wide = a->per_group * a->head_dim;
    if (!k->opens)
        keep_state(a, w, k, from, to);
    scale_rows(a, k, k->x, a->ld, w->rates.tail, w->rates.del, w->xs);
    product(true, false, wide, a->state, k->q, w->xs, wide, k->b, a->ld, k->opens ? 0 : 1, to,
            a->state);
}

/* One chunk of the adjoint; state: before the chunk. w->gm holds dL/d(state behind the chunk) and
 * becomes that before it. */
static void backward_chunk(const struct ssd *a, const struct scratch *w, const struct chunk *k,
                           in_t dy, const real *state, out_t dxbc, out_t ddt)
{
    const int64_t q = k->q, n = a->state, wide = a->per_group * a->head_dim,
                  inner = a->heads * a->head_dim;
    const real *gy = ref_row(dy, k->first) + k->head * a->head_dim;
    real *db = ref_row(dxbc, k->first) + inner + k->group * n, *dc = db + a->groups * n;
    product(false, true, q, q, n, k->c, a->ld, k->b, a->ld, 0, w->cb, q);
    if (!k->closes)
        product(false, true, q, wide, n, k->b, a->ld, w->gm, n, 0, w->v, wide); /* Gm B */
    if (!k->opens)
        product(false, true, q, wide, n, k->c, a->ld, state, n, 0, w->sc, wide); /* St C */
    memset(w->z, 0, (size_t)(q * q) * sizeof *w->z);
    for (int64_t h = 0; h < a->per_group; h++)
        backward_head(a, w, k, h, dy, state, dxbc, ddt);

    product(true, false, q, n, q, w->z, q, k->c, a->ld, 0, db, dxbc->ld);
    product(false, false, q, n, q, w->z, q, k->b, a->ld, 0, dc, dxbc->ld);
    if (!k->closes) {
        scale_rows(a, k, k->x, a->ld, w->rates.tail, w->rates.del, w->xs);
        product(false, false, q, n, wide, w->xs, wide, w->gm, n, 1, db, dxbc->ld);
    }
    if (!k->opens) {
        scale_rows(a, k, gy, dy->ld, w->rates.carry, NULL, w->ys);
        product(false, false, q, n, wide, w->ys, wide, state, n, 1, dc, dxbc->ld);
        if (!k->closes)
            keep_state(a, w, k, w->gm, w->gm);
        product(true, false, wide, n, q, w->ys, wide, k->c, a->ld, k->closes ? 0 : 1, w->gm, n);
    }
}

/* With G_ij = gy_i.x_j: mix = CB L del, z += L del G, e_j = sum over i >= j of CB L G, and with W =
 * mix G (below the diagonal) r_j = sum over k < j <= i of W_ik: every path that runs over the decay
 * of token j. This is R_j of 1.6.5 without its differences of row and column sums, which cancel
 * when del is large. */
static void mix_backward(const struct scratch *w, int64_t q, const double *restrict del,
                         const double *decay)
{
    double *restrict e = w->e, *restrict part = w->part, *restrict r = w->r;
    for (int64_t j = 0; j < q; j++)
        e[j] = r[j] = 0;
    for (int64_t i = 0; i < q; i++) {
        const real *restrict cb = w->cb + i * q, *restrict g = w->gx + i * q;
        const double *restrict row = w->row;
        real *restrict mix = w->mix + i * q, *restrict z = w->z + i * q;
        double before = 0;
        next_row(w->row, i, decay[i]);
        for (int64_t j = 0; j <= i; j++) {
            double lg = row[j] * g[j], term = lg * cb[j];
            mix[j] = (real)(row[j] * del[j]) * cb[j];
            z[j] += (real)(lg * del[j]);
            e[j] += term;
            part[j] = term * del[j];
        }
        for (int64_t j = i + 1; j < q; j++)
            mix[j] = 0;
        for (int64_t j = 0; j <= i; j++) {
            r[j] += before;
            before += part[j];
        }
    }
}

/* The rest of one head. The paths over the decay of token i also come from the state before the
 * chunk (carry: to i and later), lead to the state behind it (tail: from before i), or do both
 * (keep). */
static void backward_head(const struct ssd *a, const struct scratch *w, const struct chunk *k,
                          int64_t h, in_t dy, const real *state, out_t dxbc, out_t ddt)
{
    const int64_t q = k->q, width = a->head_dim, wide = a->per_group * width, head = k->head + h,
                  o = h * k->len + k->at;
    const double *del = w->rates.del + o, *carry = w->rates.carry + o, *tail = w->rates.tail + o,
                 a_head = ssd_a(a, head);
    const real *x = k->x + h * width, *gy = ref_row(dy, k->first) + head * width,
               skip = a->d_skip[head];
    real *dx = ref_row(dxbc, k->first) + head * width;
    double before = 0, *sums = w->sums + 3 * h;
    product(false, true, q, q, width, gy, dy->ld, x, a->ld, 0, w->gx, q);
    mix_backward(w, q, del, w->rates.decay + o);
    for (int64_t i = 0; i < q; i++) {
        const real *restrict from = gy + i * dy->ld, *restrict v = w->v + i * wide + h * width;
        const real behind = (real)(tail[i] * del[i]);
        real *restrict to = dx + i * dxbc->ld;
        sums[2] += w->gx[i * q + i];
        if (k->closes) {
            for (int64_t p = 0; p < width; p++)
                to[p] = skip * from[p];
            continue;
        }
        const double xv = tail[i] * ref_dot(x + i * a->ld, v, width);
        for (int64_t p = 0; p < width; p++)
            to[p] = skip * from[p] + behind * v[p];
        w->e[i] += xv;
        w->r[i] += before;
        before += del[i] * xv;
    }
    product(true, false, q, width, q, w->mix, q, gy, dy->ld, 1, dx, dxbc->ld);

    const int64_t size = width * a->state;
    double after = k->opens || k->closes
                       ? 0
                       : carry[q - 1] * ref_dot(w->gm + h * size, state + h * size, size);
    for (int64_t i = q - 1; i >= 0; i--) {
        if (!k->opens)
            after += carry[i] * ref_dot(gy + i * dy->ld, w->sc + i * wide + h * width, width);
        const double r = w->r[i] + after, d = (a_head * r + w->e[i]) * w->rates.slope[o + i];
        ref_row(ddt, k->first + i)[head] = (real)d;
        sums[0] += d;
        sums[1] += del[i] * r;
    }
}
