/* gpu_moe.c - routing, balance, sort and activation of the mixture of experts on the GPU against
 * the reference.
 *
 * A choice of experts is compared with the top-K of the scores the GPU itself wrote, bit by bit:
 * two scores that differ in the last place only may come in either order from two exponentials. The
 * scores are compared with the reference's.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "check.h"
#include "gpu_check.h"

static const double SCALING = 2.5;

static float got_float(const struct gpu_tensor *t, int64_t r, int64_t c)
{
    float x;
    memcpy(&x, t->got + t->begin + 4 * (size_t)(r * t->dev.ld + c), sizeof x);
    return x;
}

static float host_float(const struct gpu_tensor *t, int64_t r, int64_t c)
{
    return ((const float *)t->host.data)[r * t->host.ld + c];
}

/* The K largest keys, lower index on ties, a NaN above all; ascending. */
static void top_k(const float *key, int64_t experts, int64_t topk, int32_t *choice)
{
    for (int64_t e = 0, n = 0; e < experts && n < topk; e++) {
        int64_t better = 0;
        const float mine = isnan(key[e]) ? INFINITY : key[e];
        for (int64_t f = 0; f < experts; f++) {
            const float other = isnan(key[f]) ? INFINITY : key[f];
            better += other > mine || (other == mine && f < e);
        }
        if (better < topk)
            choice[n++] = (int32_t)e;
    }
}

/* Ascending experts of random tokens. `few` > 0: all tokens take them from the first few. */
static void random_choice(struct gpu_check *g, struct gpu_tensor *expert, int64_t experts,
                          int64_t few)
{
    const int64_t tokens = tensor_rows(&expert->host), topk = tensor_cols(&expert->host),
                  from = few ? few : experts;
    for (int64_t t = 0; t < tokens; t++) {
        /* Selection sampling: every set of K of `from` with equal chance, in ascending order. */
        int32_t *choice = (int32_t *)expert->host.data + t * topk;
        for (int64_t e = 0, n = 0; n < topk; e++)
            if ((int64_t)(gpu_random(g) % (uint64_t)(from - e)) < topk - n)
                choice[n++] = (int32_t)e;
    }
    gpu_upload(g, expert);
}

/* I32 or I64 vectors and dense matrices, whatever the layout of the case. */
static struct gpu_tensor *integers(struct gpu_check *g, enum dtype dtype, int64_t rows,
                                   int64_t cols)
{
    const int pad = g->pad;
    g->pad = 0;
    struct gpu_tensor *t = gpu_matrix(g, dtype, rows, cols);
    g->pad = pad;
    return t;
}

/* ---- routing ---- */

enum logits { SMOOTH, TIED, SATURATED, POISONED };

static void fill_logits(struct gpu_check *g, struct gpu_tensor *logits, enum logits kind)
{
    const int64_t n = tensor_numel(&logits->host);
    float *l = logits->host.data;
    gpu_normal(g, logits, 1.5);
    for (int64_t i = 0; i < n; i++)
        if (kind == TIED)
            l[i] = rintf(l[i]);
        else if (kind == SATURATED)
            l[i] = l[i] * 100;
        else if (kind == POISONED && i % 11 == 3)
            l[i] = NAN;
    gpu_upload(g, logits);
}

static void forward_case(struct gpu_check *g, int64_t tokens, int64_t experts, int64_t topk,
                         enum logits kind, bool biased, bool given)
{
    static const char *const name[] = { "smooth", "tied", "saturated", "NaN" };
    if (!gpu_case(g, "router_forward", "%lldx%lld top %lld %s%s%s", (long long)tokens,
                  (long long)experts, (long long)topk, name[kind], biased ? " bias" : "",
                  given ? " given" : ""))
        return;
    struct gpu_tensor *logits = gpu_matrix(g, DTYPE_F32, tokens, experts),
                      *scores = gpu_matrix(g, DTYPE_F32, tokens, experts);
    struct gpu_tensor *prob = gpu_matrix(g, DTYPE_F32, tokens, topk),
                      *expert = integers(g, DTYPE_I32, tokens, topk);
    struct gpu_tensor *bias = biased ? gpu_vector(g, DTYPE_F32, experts) : NULL;
    fill_logits(g, logits, kind);
    if (biased)
        gpu_normal(g, bias, 0.1);
    if (given) {
        random_choice(g, expert, experts, 0);
        gpu_inout(expert);
    }
    const struct tensor *dev_bias = biased ? &bias->dev : NULL,
                        *host_bias = biased ? &bias->host : NULL;
    gpu_run(g) cuda_router_forward(g->stream, &logits->dev, dev_bias, SCALING, given, &scores->dev,
                                   &expert->dev, &prob->dev);
    float *key = xmalloc((size_t)experts, sizeof *key);
    for (int64_t t = 0; !given && t < tokens; t++) {
        for (int64_t e = 0; e < experts; e++)
            key[e] = got_float(scores, t, e) + (biased ? host_float(bias, 0, e) : 0);
        top_k(key, experts, topk, (int32_t *)expert->host.data + t * topk);
    }
    free(key);
    gpu_equal(g, expert, "expert");
    backend_ref_f32.router_forward(g->cpu, &logits->host, host_bias, SCALING, true, &scores->host,
                                   &expert->host, &prob->host);
    if (kind == POISONED) {
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t k = 0; k < topk; k++)
                if (isnan(got_float(prob, t, k)) != isnan(host_float(prob, t, k)))
                    gpu_fail(g, "prob[%lld,%lld]: got %g, want %g", (long long)t, (long long)k,
                             (double)got_float(prob, t, k), (double)host_float(prob, t, k));
    } else {
        gpu_close(g, scores, "scores", gpu_rounding(DTYPE_F32));
        gpu_close(g, prob, "prob", gpu_rounding(DTYPE_F32));
    }
    gpu_report(g, 8.0 * (double)(tokens * (experts + topk)), 0);
}

/* Tokens whose K-th and next normalised scores are different but so near that their order may come
 * out either way. */
static int64_t near_ties(const struct gpu_tensor *scores, int64_t topk)
{
    const int64_t tokens = tensor_rows(&scores->host), experts = tensor_cols(&scores->host);
    int64_t found = 0;
    float *key = xmalloc((size_t)experts, sizeof *key);
    int32_t *choice = xmalloc((size_t)topk, sizeof *choice);
    for (int64_t t = 0; t < tokens; t++) {
        float least = INFINITY, next = -INFINITY;
        for (int64_t e = 0; e < experts; e++)
            key[e] = host_float(scores, t, e);
        top_k(key, experts, topk, choice);
        for (int64_t e = 0, k = 0; e < experts; e++)
            if (k < topk && choice[k] == e) {
                least = fminf(least, key[e]);
                k++;
            } else
                next = fmaxf(next, key[e]);
        found += next < least && next > least * (1 - 1e-6f);
    }
    free(key);
    free(choice);
    return found;
}

/* A rank that holds `tokens` rows from first_row of `sequences` sequences. */
static void balance_case(struct gpu_check *g, int64_t tokens, int64_t experts, int topk,
                         int64_t first_row, int64_t seq_len, int64_t sequences, bool tied)
{
    if (!gpu_case(g, "router_balance", "%lldx%lld top %d from row %lld of %lldx%lld%s",
                  (long long)tokens, (long long)experts, topk, (long long)first_row,
                  (long long)sequences, (long long)seq_len, tied ? " tied" : ""))
        return;
    struct gpu_tensor *scores = gpu_matrix(g, DTYPE_F32, tokens, experts);
    struct gpu_tensor *count = integers(g, DTYPE_I64, sequences, experts),
                      *psum = gpu_matrix(g, DTYPE_F32, sequences, experts);
    gpu_uniform(g, scores, 0.02, 0.98);
    for (int64_t i = 0; tied && i < tokens * experts; i++)
        ((float *)scores->host.data)[i] = rintf(8 * ((float *)scores->host.data)[i]) / 8;
    gpu_upload(g, scores);
    gpu_run(g) cuda_router_balance(g->stream, &scores->dev, topk, first_row, seq_len, &count->dev,
                                   &psum->dev);
    backend_ref_f32.router_balance(g->cpu, &scores->host, topk, first_row, seq_len, &count->host,
                                   &psum->host);
    int64_t moved = 0, ties = 0;
    for (int64_t i = 0; i < sequences * experts; i++) {
        const int64_t *got = (const int64_t *)(const void *)(count->got + count->begin);
        const int64_t d = got[i] - ((const int64_t *)count->host.data)[i];
        moved += d < 0 ? -d : d;
    }
    if (moved > 0) {
        ties = near_ties(scores, topk);
        if (moved > 2 * ties)
            gpu_equal(g, count, "count");
    }
    gpu_close(g, psum, "psum", gpu_summing(DTYPE_F32, seq_len));
    gpu_report(g, 4.0 * (double)(tokens * experts), 0);
}

static void balance_loss_case(struct gpu_check *g, int64_t sequences, int64_t experts)
{
    if (!gpu_case(g, "router_balance_loss", "%lldx%lld", (long long)sequences, (long long)experts))
        return;
    struct gpu_tensor *count = integers(g, DTYPE_I64, sequences, experts),
                      *psum = gpu_matrix(g, DTYPE_F32, sequences, experts);
    struct gpu_tensor *metric = gpu_vector(g, DTYPE_F32, 1);
    gpu_integers(g, count, 0, 8192);
    gpu_uniform(g, psum, 0, 100);
    gpu_uniform(g, metric, 1, 2);
    gpu_inout(metric);
    gpu_run(g) cuda_router_balance_loss(g->stream, &count->dev, &psum->dev, 6, 8192, &metric->dev);
    backend_ref_f32.router_balance_loss(g->cpu, &count->host, &psum->host, 6, 8192, &metric->host);
    gpu_close(g, metric, "metric", gpu_summing(DTYPE_F32, sequences * experts));
    gpu_report(g, 0, 0);
}

static void backward_case(struct gpu_check *g, int64_t tokens, int64_t experts, int64_t topk,
                          int64_t first_row, int64_t seq_len, bool balanced)
{
    if (!gpu_case(g, "router_backward", "%lldx%lld top %lld%s from row %lld of %lld",
                  (long long)tokens, (long long)experts, (long long)topk,
                  balanced ? " balanced" : "", (long long)first_row, (long long)seq_len))
        return;
    const int64_t sequences = (first_row + tokens + seq_len - 1) / seq_len;
    struct gpu_tensor *scores = gpu_matrix(g, DTYPE_F32, tokens, experts),
                      *dlogits = gpu_matrix(g, DTYPE_F32, tokens, experts);
    struct gpu_tensor *prob = gpu_matrix(g, DTYPE_F32, tokens, topk),
                      *dprob = gpu_matrix(g, DTYPE_F32, tokens, topk);
    struct gpu_tensor *expert = integers(g, DTYPE_I32, tokens, topk),
                      *count = integers(g, DTYPE_I64, sequences, experts);
    gpu_uniform(g, scores, 0.02, 0.98);
    gpu_uniform(g, prob, 0, 1);
    gpu_normal(g, dprob, 1e-2);
    random_choice(g, expert, experts, 0);
    gpu_integers(g, count, 0, seq_len);
    const struct tensor *dev_count = balanced ? &count->dev : NULL,
                        *host_count = balanced ? &count->host : NULL;
    gpu_run(g) cuda_router_backward(g->stream, &scores->dev, &expert->dev, &prob->dev, &dprob->dev,
                                    SCALING, dev_count, 1e-2, first_row, seq_len, &dlogits->dev);
    backend_ref_f32.router_backward(g->cpu, &scores->host, &expert->host, &prob->host, &dprob->host,
                                    SCALING, host_count, 1e-2, first_row, seq_len, &dlogits->host);
    /* g - mean cancels: its error is one of g, relative to a row's typical difference. */
    gpu_close(g, dlogits, "dlogits", gpu_summing(DTYPE_F32, experts));
    gpu_report(g, 8.0 * (double)(tokens * (experts + topk)), 0);
}

/* What a table of shapes, the last `large` of production size, is run for. */
struct range {
    size_t first, end;
};

static struct range range_of(const struct gpu_check *g, size_t shapes, size_t large,
                             bool production)
{
    return (struct range){ gpu_small(g) ? 0 : shapes - large, shapes - (production ? 0 : large) };
}

static void routing_cases(struct gpu_check *g, bool production)
{
    static const int64_t shape[][3] = { { 1, 1, 1 },      { 5, 4, 2 },      { 37, 7, 3 },
                                        { 251, 61, 6 },   { 1009, 128, 6 }, { 97, 509, 8 },
                                        { 33, 40, 17 },   { 0, 8, 2 },      { 8192, 128, 6 },
                                        { 65536, 128, 8 } };
    const struct range range = range_of(g, sizeof shape / sizeof *shape, 2, production);
    for (size_t i = range.first; i < range.end; i++) {
        const int64_t t = shape[i][0], e = shape[i][1], k = shape[i][2];
        for (int kind = SMOOTH; kind <= POISONED; kind++)
            forward_case(g, t, e, k, (enum logits)kind, kind == SMOOTH, false);
        forward_case(g, t, e, k, SMOOTH, false, true);
        balance_case(g, t, e, (int)k, 0, t ? t : 3, 1, false);
        balance_case(g, t, e, (int)k, 0, t ? t : 3, 1, true);
        balance_case(g, t, e, (int)k, t / 3, (t + 1) / 2 + 1, 4, false);
        /* of one expert it is rounding and nothing else */
        backward_case(g, t, e > 1 ? e : 2, k, t / 3, (t + 1) / 2 + 1, true);
        if (k > 1)
            backward_case(g, t, e, k, 0, t ? t : 3, false);
    }
    balance_loss_case(g, 1, 128);
    balance_loss_case(g, 7, 509);
}

/* ---- the sort ---- */

static void sort_case(struct gpu_check *g, int64_t tokens, int64_t experts, int64_t topk,
                      int64_t few, bool counted)
{
    const int64_t copies = tokens * topk;
    if (!gpu_case(g, "moe_sort", "%lldx%lld of %lld%s%s", (long long)tokens, (long long)topk,
                  (long long)experts, few ? " to few" : "", counted ? " counted" : ""))
        return;
    struct gpu_tensor *expert = integers(g, DTYPE_I32, tokens, topk),
                      *prob = gpu_matrix(g, DTYPE_F32, tokens, topk);
    struct gpu_tensor *offsets = gpu_vector(g, DTYPE_I32, experts + 1),
                      *row_token = gpu_vector(g, DTYPE_I32, copies);
    struct gpu_tensor *row_prob = gpu_vector(g, DTYPE_F32, copies),
                      *token_row = integers(g, DTYPE_I32, tokens, topk);
    struct gpu_tensor *count = counted ? gpu_vector(g, DTYPE_I64, experts) : NULL;
    random_choice(g, expert, experts, few);
    gpu_uniform(g, prob, 0, 1);
    if (counted) {
        gpu_integers(g, count, 0, 1000000);
        gpu_inout(count);
    }
    gpu_run(g) cuda_moe_sort(g->stream, &expert->dev, &prob->dev, &offsets->dev, &row_token->dev,
                             &row_prob->dev, &token_row->dev, counted ? &count->dev : NULL);
    backend_ref_f32.moe_sort(g->cpu, &expert->host, &prob->host, &offsets->host, &row_token->host,
                             &row_prob->host, &token_row->host, counted ? &count->host : NULL);
    gpu_equal(g, offsets, "offsets");
    gpu_equal(g, row_token, "row_token");
    gpu_equal(g, token_row, "token_row");
    gpu_close(g, row_prob, "row_prob", (struct gpu_bound){ 0, 0 });
    if (counted)
        gpu_equal(g, count, "tokens_per_expert");
    gpu_report(g, 20.0 * (double)copies, 0);
    if (!gpu_case(g, "moe_unsort_prob", "%lldx%lld", (long long)tokens, (long long)topk))
        return;
    struct gpu_tensor *drow = gpu_vector(g, DTYPE_F32, copies),
                      *from = integers(g, DTYPE_I32, tokens, topk);
    struct gpu_tensor *dprob = gpu_matrix(g, DTYPE_F32, tokens, topk);
    gpu_normal(g, drow, 1);
    gpu_integers(g, from, 0, copies ? copies : 1);
    gpu_run(g) cuda_moe_unsort_prob(g->stream, &drow->dev, &from->dev, &dprob->dev);
    backend_ref_f32.moe_unsort_prob(g->cpu, &drow->host, &from->host, &dprob->host);
    gpu_close(g, dprob, "dprob", (struct gpu_bound){ 0, 0 });
    gpu_report(g, 12.0 * (double)copies, 0);
}

/* `ranks` sources with random counts, some experts of some ranks without rows; order and inverse
 * hold `most` rows. */
static void dispatch_case(struct gpu_check *g, int64_t ranks, int64_t experts, int64_t rows,
                          bool short_of_room)
{
    if (!gpu_case(g, "dispatch_order", "%lld ranks, %lld experts, about %lld rows%s",
                  (long long)ranks, (long long)experts, (long long)rows,
                  short_of_room ? ", too many" : ""))
        return;
    const int64_t owned = experts / ranks;
    struct gpu_tensor *all = integers(g, DTYPE_I32, ranks, experts + 1),
                      *offsets = gpu_vector(g, DTYPE_I32, owned + 1);
    const int64_t first = owned * (int64_t)(gpu_random(g) % (uint64_t)ranks);
    int64_t received = 0;
    for (int64_t r = 0; r < ranks; r++) {
        int32_t *own = (int32_t *)all->host.data + r * (experts + 1);
        own[0] = 0;
        for (int64_t e = 0; e < experts; e++)
            own[e + 1] =
                own[e] +
                (gpu_random(g) % 4 == 0
                     ? 0
                     : (int32_t)(gpu_random(g) % (uint64_t)(1 + 2 * rows / experts / ranks)));
        received += own[first + owned] - own[first];
    }
    gpu_upload(g, all);
    const int64_t most = short_of_room ? received / 2 : received;
    struct gpu_tensor *order = gpu_vector(g, DTYPE_I32, most),
                      *inverse = gpu_vector(g, DTYPE_I32, most);
    gpu_run(g)
        cuda_dispatch_order(g->stream, &all->dev, first, &offsets->dev, &order->dev, &inverse->dev);
    backend_ref_f32.dispatch_order(g->cpu, &all->host, first, &offsets->host, &order->host,
                                   &inverse->host);
    gpu_equal(g, offsets, "offsets");
    gpu_equal(g, order, "order");
    gpu_equal(g, inverse, "inverse");
    gpu_report(g, 0, 0);
}

static void dispatch_cases(struct gpu_check *g)
{
    for (int64_t ranks = 1; ranks <= 64; ranks *= 2)
        for (int few = 0; few < 2; few++) {
            dispatch_case(g, ranks, 64, 500, few);
            dispatch_case(g, ranks, 128, 49152, few);
        }
    dispatch_case(g, 3, 3, 0, false);
}

static void sort_cases(struct gpu_check *g, bool production)
{
    /* tokens, experts, K, experts in use (0: all), counted */
    static const int64_t shape[][5] = { { 0, 4, 2, 0, 1 },       { 1, 1, 1, 0, 1 },
                                        { 33, 2, 2, 0, 0 },      { 251, 7, 3, 0, 1 },
                                        { 1009, 128, 6, 0, 1 },  { 1009, 509, 8, 9, 1 },
                                        { 20011, 61, 1, 0, 1 },  { 8191, 512, 8, 8, 0 },
                                        { 8192, 128, 6, 0, 1 },  { 65536, 128, 8, 0, 1 },
                                        { 65536, 512, 8, 0, 0 }, { 200003, 16, 2, 0, 1 } };
    const struct range range = range_of(g, sizeof shape / sizeof *shape, 4, production);
    for (size_t i = range.first; i < range.end; i++)
        sort_case(g, shape[i][0], shape[i][1], shape[i][2], shape[i][3], shape[i][4] != 0);
}

/* ---- the experts' activation ---- */

/* Of products of several random numbers a few large ones make the norm, which then sees single
 * roundings: 2^-8 at most. */
static struct gpu_bound product_rounding(enum dtype dtype, int64_t elements)
{
    struct gpu_bound bound = gpu_rounding(dtype);
    if (dtype == DTYPE_BF16 && elements < 10000)
        bound.frobenius = bound.element;
    return bound;
}

static void act_case(struct gpu_check *g, enum dtype dtype, int64_t rows, int64_t cols)
{
    const double elements = (double)(rows * cols), bytes = (double)dtype_bytes(dtype);
    if (!gpu_case(g, "expert_act_forward", "%lldx%lld %s", (long long)rows, (long long)cols,
                  dtype_name(dtype)))
        return;
    struct gpu_tensor *h = gpu_matrix(g, dtype, rows, cols), *y = gpu_matrix(g, dtype, rows, cols);
    struct gpu_tensor *prob = gpu_vector(g, DTYPE_F32, rows);
    gpu_normal(g, h, 1);
    gpu_uniform(g, prob, 0, 1);
    gpu_run(g) cuda_expert_act_forward(g->stream, &h->dev, &prob->dev, &y->dev);
    backend_ref_f32.expert_act_forward(g->cpu, &h->host, &prob->host, &y->host);
    gpu_close(g, y, "y", product_rounding(dtype, rows * cols));
    gpu_report(g, 2 * bytes * elements + 4.0 * (double)rows, 0);
}

static void act_backward_case(struct gpu_check *g, enum dtype dtype, int64_t rows, int64_t cols,
                              bool in_place, bool again)
{
    const double elements = (double)(rows * cols), bytes = (double)dtype_bytes(dtype);
    if (!gpu_case(g, "expert_act_backward", "%lldx%lld %s%s%s", (long long)rows, (long long)cols,
                  dtype_name(dtype), in_place ? " in place" : "", again ? " and forward" : ""))
        return;
    struct gpu_tensor *h = gpu_matrix(g, dtype, rows, cols), *dy = gpu_matrix(g, dtype, rows, cols);
    struct gpu_tensor *dh = in_place ? dy : gpu_matrix(g, dtype, rows, cols);
    struct gpu_tensor *prob = gpu_vector(g, DTYPE_F32, rows),
                      *dprob = gpu_vector(g, DTYPE_F32, rows);
    struct gpu_tensor *y = again ? gpu_matrix(g, dtype, rows, cols) : NULL;
    gpu_normal(g, h, 1);
    gpu_normal(g, dy, 1);
    gpu_uniform(g, prob, 0, 1);
    if (in_place)
        gpu_inout(dy);
    gpu_run(g) cuda_expert_act_backward(g->stream, &h->dev, &prob->dev, &dy->dev, &dh->dev,
                                        &dprob->dev, again ? &y->dev : NULL);
    backend_ref_f32.expert_act_backward(g->cpu, &h->host, &prob->host, &dy->host, &dh->host,
                                        &dprob->host, again ? &y->host : NULL);
    gpu_close(g, dh, "dh", product_rounding(dtype, rows * cols));
    gpu_close(g, dprob, "dprob", gpu_summing(DTYPE_F32, cols));
    if (again)
        gpu_close(g, y, "y", product_rounding(dtype, rows * cols));
    gpu_report(g, (again ? 4 : 3) * bytes * elements + 8.0 * (double)rows, 0);
}

static void act_cases(struct gpu_check *g, bool production)
{
    static const int64_t shape[][2] = { { 1, 1 },      { 0, 5 },    { 7, 13 },      { 61, 256 },
                                        { 251, 1009 }, { 9, 1856 }, { 49152, 1856 } };
    const struct range range = range_of(g, sizeof shape / sizeof *shape, 1, production);
    for (size_t i = range.first; i < range.end; i++)
        for (int type = 0; type < 2; type++) {
            const enum dtype dtype = type ? DTYPE_BF16 : DTYPE_F32;
            act_case(g, dtype, shape[i][0], shape[i][1]);
            for (int in_place = 0; in_place < 2; in_place++)
                for (int again = 0; again < 2; again++)
                    act_backward_case(g, dtype, shape[i][0], shape[i][1], in_place, again);
        }
}

int main(int argc, char **argv)
{
    static const int layout[][2] = { { 0, 0 }, { 3, 1 }, { 8, 8 } };
    struct gpu_check *g = gpu_check_start(argc, argv);
    for (int i = 0; i < 3; i++) {
        gpu_layout(g, layout[i][0], layout[i][1]);
        const bool production = i == 0 && gpu_production(g);
        routing_cases(g, production);
        sort_cases(g, production);
        act_cases(g, production);
    }
    gpu_layout(g, 0, 0);
    dispatch_cases(g);
    return gpu_check_end(g);
}
