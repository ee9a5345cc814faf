/* ssd.h - what the two forms of the selective state space scan share (model.md 1.6.3): the checked
 * arguments and the rates of a token. ssd_sequential.c is the definition, ssd.c (chunks) what runs.
 */
#ifndef MIMO_REF_SSD_H
#define MIMO_REF_SSD_H

#include "ref_row.h"

/* Head h reads x at columns h*P, and B and C at columns (h/per_group)*N of theirs. */
struct ssd {
    int64_t tokens, segments, heads, head_dim, groups, per_group, state, chunk;
    const int32_t *cu;
    const real *x, *b, *c; /* column ranges of xbc, rows `ld` apart */
    int64_t ld;
    const real *dt; /* raw, rows `ld_dt` apart */
    int64_t ld_dt;
    const real *dt_bias, *a_log, *d_skip; /* [heads] */
};

/* The number of segments of cu [n+1], after checking that they cover `rows` rows in order. */
static inline int64_t ref_segments(in_t cu, int64_t rows, int64_t max_len)
{
    int64_t segments = tensor_numel(cu) - 1;
    const int32_t *first = ref_index(cu, segments + 1);
    ASSERT(segments >= 0 && first[0] == 0 && first[segments] == rows);
    for (int64_t i = 0; i < segments; i++)
        ASSERT(first[i + 1] >= first[i] && first[i + 1] - first[i] <= max_len);
    return segments;
}

/* One token of one head. */
struct ssd_rate {
    double del, slope; /* softplus(dt + bias) and its derivative */
    double decay;      /* exp(del A), A = -exp(A_log) */
};

static inline struct ssd ssd_arguments(in_t xbc, in_t dt, in_t dt_bias, in_t a_log, in_t d_skip,
                                       in_t cu, int64_t max_len, int heads, int head_dim,
                                       int groups, int state, int chunk)
{
    ASSERT(heads > 0 && head_dim > 0 && groups > 0 && state > 0 && chunk > 0 &&
           heads % groups == 0);
    struct ssd a = { .tokens = tensor_rows(xbc),
                     .heads = heads,
                     .head_dim = head_dim,
                     .groups = groups,
                     .per_group = heads / groups,
                     .state = state,
                     .chunk = chunk,
                     .cu = cu->data,
                     .ld = xbc->ld,
                     .ld_dt = dt->ld };
    int64_t inner = a.heads * head_dim, shared = a.groups * state;
    ref_expect(xbc, a.tokens, inner + 2 * shared);
    ref_expect(dt, a.tokens, heads);
    a.segments = ref_segments(cu, a.tokens, max_len);
    a.x = xbc->data;
    a.b = a.x + inner;
    a.c = a.b + shared;
    a.dt = dt->data;
    a.dt_bias = ref_vector(dt_bias, heads);
    a.a_log = ref_vector(a_log, heads);
    a.d_skip = ref_vector(d_skip, heads);
    return a;
}

/* A of a head: negative. */
static inline double ssd_a(const struct ssd *a, int64_t head)
{
    return -exp((double)a->a_log[head]);
}

static inline struct ssd_rate ssd_rate_of(const struct ssd *a, int64_t token, int64_t head,
                                          double a_head)
{
    double v = (double)a->dt[token * a->ld_dt + head] + a->dt_bias[head], e = exp(v);
    struct ssd_rate rate = { .del = v > 20 ? v : log1p(e), .slope = v > 20 ? 1 : e / (1 + e) };
    rate.decay = exp(rate.del * a_head);
    return rate;
}

#endif
