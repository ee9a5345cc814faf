/* ssd_sequential.c - the selective state space scan token by token: model.md 1.6.4 as it stands
 * there, forward and adjoint.
 *
 * This is the truth that the chunked form (ssd.c) is compared with; no table names it. Scratch: the
 * states of one head over the longest segment and one adjoint state.
 */
#include "ssd_sequential.h"

#include "ssd.h"

/* One head of one segment. */
struct sequence {
    int64_t first, len, head, group;
    double a; /* A */
};

static struct sequence sequence_of(const struct ssd *a, int64_t segment, int64_t head);
static void run_states(const struct ssd *a, const struct sequence *q, real *states);
static void sequence_backward(const struct ssd *a, const struct sequence *q, const real *states,
                              real *gm, in_t dy, out_t dxbc, out_t ddt, double sums[3]);

int64_t REF(ssd_sequential_work)(int64_t tokens, int64_t segments, int heads, int head_dim,
                                 int groups, int state, int chunk)
{
    return (tokens + 2) * head_dim * state;
}

void REF(ssd_sequential_forward)(struct stream *s, in_t xbc, in_t dt, in_t dt_bias, in_t a_log,
                                 in_t d_skip, in_t cu, int64_t max_len, int heads, int head_dim,
                                 int groups, int state, int chunk, in_t work, out_t y)
{
    const struct ssd a = ssd_arguments(xbc, dt, dt_bias, a_log, d_skip, cu, max_len, heads,
                                       head_dim, groups, state, chunk);
    ref_expect(y, a.tokens, a.heads * head_dim);
    ASSERT(tensor_numel(work) >=
           REF(ssd_sequential_work)(a.tokens, a.segments, heads, head_dim, groups, state, chunk));
    for (int64_t i = 0; i < a.segments; i++)
        for (int64_t h = 0; h < heads; h++) {
            const struct sequence q = sequence_of(&a, i, h);
            const real *st = work->data;
            run_states(&a, &q, work->data);
            for (int64_t t = q.first; t < q.first + q.len; t++) {
                const real *c = a.c + t * a.ld + q.group * state,
                           *x = a.x + t * a.ld + h * head_dim;
                st += head_dim * state; /* the state after token t */
                for (int64_t p = 0; p < head_dim; p++)
                    ref_row(y, t)[h * head_dim + p] =
                        (real)(ref_dot(st + p * state, c, state) + (double)a.d_skip[h] * x[p]);
            }
        }
}

void REF(ssd_sequential_backward)(struct stream *s, in_t xbc, in_t dt, in_t dt_bias, in_t a_log,
                                  in_t d_skip, in_t cu, int64_t max_len, int heads, int head_dim,
                                  int groups, int state, int chunk, in_t dy, in_t work, out_t dxbc,
                                  out_t ddt, out_t ddt_bias, out_t da_log, out_t dd_skip)
{
    const struct ssd a = ssd_arguments(xbc, dt, dt_bias, a_log, d_skip, cu, max_len, heads,
                                       head_dim, groups, state, chunk);
    ref_expect(dy, a.tokens, a.heads * head_dim);
    ref_expect(dxbc, a.tokens, tensor_cols(xbc));
    ref_expect(ddt, a.tokens, heads);
    ASSERT(tensor_numel(work) >=
           REF(ssd_sequential_work)(a.tokens, a.segments, heads, head_dim, groups, state, chunk));
    real *gm = work->data, *states = gm + (int64_t)head_dim * state;
    for (int64_t t = 0; t < a.tokens; t++)
        for (int64_t i = a.heads * head_dim; i < tensor_cols(dxbc); i++)
            /* dB and dC: the heads of a group add to them */
            ref_row(dxbc, t)[i] = 0;
    for (int64_t h = 0; h < heads; h++) {
        double sums[3] = { 0 };
        for (int64_t i = 0; i < a.segments; i++) {
            const struct sequence q = sequence_of(&a, i, h);
            run_states(&a, &q, states);
            sequence_backward(&a, &q, states, gm, dy, dxbc, ddt, sums);
        }
        if (ddt_bias != NULL)
            ref_vector(ddt_bias, heads)[h] += (real)sums[0];
        if (da_log != NULL)
            ref_vector(da_log, heads)[h] += (real)(sums[1] * ssd_a(&a, h));
        if (dd_skip != NULL)
            ref_vector(dd_skip, heads)[h] += (real)sums[2];
    }
}

static struct sequence sequence_of(const struct ssd *a, int64_t segment, int64_t head)
{
    return (struct sequence){ .first = a->cu[segment],
                              .len = a->cu[segment + 1] - a->cu[segment],
                              .head = head,
                              .group = head / a->per_group,
                              .a = ssd_a(a, head) };
}

/* states [len+1, P, N]: before the first token (zero), then after each. St = a St + del x (x) B */
static void run_states(const struct ssd *a, const struct sequence *q, real *states)
{
    const int64_t size = a->head_dim * a->state;
    for (int64_t i = 0; i < size; i++)
        states[i] = 0;
    for (int64_t t = q->first; t < q->first + q->len; t++, states += size) {
        const real *b = a->b + t * a->ld + q->group * a->state,
                   *x = a->x + t * a->ld + q->head * a->head_dim;
        const struct ssd_rate rate = ssd_rate_of(a, t, q->head, q->a);
        for (int64_t p = 0; p < a->head_dim; p++)
            for (int64_t n = 0; n < a->state; n++)
                states[size + p * a->state + n] =
                    (real)(rate.decay * states[p * a->state + n] + rate.del * x[p] * b[n]);
    }
}

/* Adds to sums: ddt_bias, dA, dD. gm [P,N] scratch. */
static void sequence_backward(const struct ssd *a, const struct sequence *q, const real *states,
                              real *gm, in_t dy, out_t dxbc, out_t ddt, double sums[3])
{
    const int64_t width = a->head_dim, n_state = a->state, size = width * n_state,
                  inner = a->heads * width;
    double decay_after = 0;
    for (int64_t i = 0; i < size; i++)
        gm[i] = 0;
    for (int64_t t = q->first + q->len - 1; t >= q->first; t--) {
        const real *x = a->x + t * a->ld + q->head * width,
                   *b = a->b + t * a->ld + q->group * n_state;
        const real *c = a->c + t * a->ld + q->group * n_state,
                   *gy = ref_row(dy, t) + q->head * width;
        const real *before = states + (t - q->first) * size, *after = before + size;
        const struct ssd_rate rate = ssd_rate_of(a, t, q->head, q->a);
        real *dx = ref_row(dxbc, t) + q->head * width,
             *db = ref_row(dxbc, t) + inner + q->group * n_state;
        real *dc = db + a->groups * n_state;
        for (int64_t p = 0; p < width; p++)
            for (int64_t n = 0; n < n_state; n++)
                gm[p * n_state + n] =
                    (real)(gy[p] * (double)c[n] + decay_after * gm[p * n_state + n]);
        decay_after = rate.decay;
        double ddel = 0, da = rate.decay * ref_dot(gm, before, size);
        for (int64_t p = 0; p < width; p++) {
            double gb = ref_dot(gm + p * n_state, b, n_state);
            dx[p] = (real)(rate.del * gb + (double)a->d_skip[q->head] * gy[p]);
            ddel += x[p] * gb;
            for (int64_t n = 0; n < n_state; n++) {
                dc[n] += after[p * n_state + n] * gy[p];
                db[n] += (real)(rate.del * gm[p * n_state + n] * x[p]);
            }
        }
        ddel = (ddel + q->a * da) * rate.slope;
        ref_row(ddt, t)[q->head] = (real)ddel;
        sums[0] += ddel;
        sums[1] += rate.del * da;
        sums[2] += ref_dot(gy, x, width);
    }
}
