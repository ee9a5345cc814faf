/* optim.c - gradient finalisation, global norm, clip and AdamW on the shards of ddp.h (optim.h; parallel.md 6.6, 7.2-7.4).
 *
 * Norm. Every element of the model counts once: a rank sums the squares of its owned, reduced gradients per module (fp64 on the host over
 * one device scalar per parameter), leaving out replicas of tensor-parallel rank > 0; one sum over all ranks of the grid gives the module's value;
 * one MAX over the world gives it to everybody. A MAX hides a NaN, so finiteness travels as a flag of its own (0 finite, 1 infinite, 2 NaN)
 * and the value is replaced by 0.
 * Clip: c = min(1, clip/(norm + 1e-6)), one coefficient for all modules.
 */
#include <math.h>
#include "ddp.h"
#include "optim.h"

/* What the world agrees on, MAX over ranks; a rank without a module sends the neutral value. */
enum { SQUARES, NON_FINITE = MODEL_MODULES, ZEROS = 2 * MODEL_MODULES, SUMMARY = 3 * MODEL_MODULES };

static bool is_language(const struct param *p)
{
    return p->module == MODEL_LANGUAGE;
}

void optim_init(struct optim *o, const struct deck *deck, const struct topology *topo, struct model *model,
                const struct backend_ops *be, const struct comm_ops *comm, struct stream *stream)
{
    *o = (struct optim){.deck = deck, .topo = topo, .model = model, .be = be, .comm = comm, .stream = stream};
}

/* Elements [first, first+n) of a dense tensor. */
static struct tensor range(const struct tensor *t, int64_t first, int64_t n)
{
    char *data = t->data;

    return tensor_1d(data ? data + (size_t)first * dtype_bytes(t->dtype) : NULL, t->dtype, t->place, n);
}

static struct tensor owned(const struct param *p, const struct tensor *whole)
{
    return range(whole, p->owned, tensor_numel(&p->master));
}

void optim_plan(struct optim *o, struct arenas *arenas)
{
    struct arena *a = &arenas->a[ARENA_OPTIMIZER];
    struct model *m = o->model;
    int64_t n = m->n_params > 0 ? m->n_params : 1, replicated = 0;

    for (int i = 0; i < m->ddp->n; i++) {
        const struct ddp_buffer *b = &m->ddp->buffer[i];
        const struct tensor state[3] = {arena_1d(a, "masters", m->acc, b->shard_numel),
                                        arena_1d(a, "first moments", m->acc, b->shard_numel),
                                        arena_1d(a, "second moments", m->acc, b->shard_numel)};
        for (int k = 0; k < b->n_slots; k++) {
            const struct ddp_slot *s = &b->slot[k];
            struct param *p = &m->param[s->param];
            p->owned = s->first;
            p->master = range(&state[0], s->local, s->n);
            p->m = range(&state[1], s->local, s->n);
            p->v = range(&state[2], s->local, s->n);
            if (p->sum_tp) replicated += s->n;
        }
    }
    o->scalar = arena_1d(a, "squares of each parameter", m->acc, n);
    o->zeros = arena_1d(a, "zeros of each module", DTYPE_I64, MODEL_MODULES);
    if (o->topo->language.tp_size == 1) replicated = 0;
    o->replicated = arena_1d(&arenas->a[ARENA_COMM], "gradients summed over tp", m->acc, replicated);
}

void optim_refresh_masters(struct optim *o)
{
    ddp_use_all(o->model->ddp);
    for (int i = 0; i < o->model->n_params; i++) {
        struct param *p = &o->model->param[i];
        if (tensor_numel(&p->master) == 0) continue;
        struct tensor value = owned(p, &p->value);
        o->be->cast(o->stream, &value, &p->master);
    }
}

/* One message: the owned pieces are packed in the order of the table, which all ranks of the group share. */
static void sum_over_tp(struct optim *o)
{
    for (int out = 0; out < 2; out++) {
        int64_t at = 0;
        for (int i = 0; i < o->model->n_params; i++) {
            const struct param *p = &o->model->param[i];
            int64_t n = tensor_numel(&p->master);
            if (!p->trainable || !p->sum_tp || n == 0) continue;
            struct tensor grad = owned(p, &p->grad), packed = range(&o->replicated, at, n);
            o->be->copy(o->stream, out ? &packed : &grad, out ? &grad : &packed);
            at += n;
        }
        ASSERT(at == tensor_numel(&o->replicated));
        if (!out && at > 0) o->comm->all_reduce(o->topo->language.tp.comm, &o->replicated, COMM_SUM, o->stream);
    }
}

void optim_grad_sync(struct optim *o, bool language)
{
    ddp_reduce(o->model->ddp, language);
    if (language && o->topo->language.member && o->topo->language.tp_size > 1) sum_over_tp(o);
}

double optim_participation(double all, double seen)
{
    return seen > 0.0 && seen < all ? all / seen : 1.0;
}

void optim_expert_bias(struct optim *o)
{
    const struct grid *grid = &o->topo->language;
    struct model *m = o->model;
    bool update = o->deck->moe.moe_router_enable_expert_bias && !o->deck->derived.freeze_language;

    if (!grid->member) return;
    for (int i = 0; i < m->n_moe; i++) {
        struct tensor count = model_tokens_per_expert(m, i);
        if (update) {
            if (grid->tp_dp_cp.size > 1) o->comm->all_reduce(grid->tp_dp_cp.comm, &count, COMM_SUM, o->stream);
            o->be->expert_bias_update(o->stream, o->deck->moe.moe_router_bias_update_rate, &model_expert_bias(m, i)->value,
                                      &count);
        } else {
            o->be->fill(o->stream, &count, 0.0);
        }
    }
}

/* Whether this rank's elements of p stand for themselves: replicas over tensor-parallel ranks count once. */
static bool counts(const struct optim *o, const struct param *p)
{
    const struct grid *g = is_language(p) ? &o->topo->language : &o->topo->encoder;

    if (!p->trainable || tensor_numel(&p->master) == 0) return false;
    return p->shard != PARAM_REPLICATED || (p->expert ? g->expt_tp_rank : g->tp_rank) == 0;
}

/* Per module over all ranks of its grid; NaN and infinity survive the sum. */
static void sum_over_grids(const struct optim *o, double v[MODEL_MODULES])
{
    const struct grid *e = &o->topo->encoder, *l = &o->topo->language;

    if (e->member && e->all.size > 1) comm_host_reduce_f64(e->all.comm, &v[MODEL_VISION], 2, COMM_SUM);
    if (l->member && l->all.size > 1) comm_host_reduce_f64(l->all.comm, &v[MODEL_LANGUAGE], 1, COMM_SUM);
}

/* Sum of squares per module of every trainable parameter's gradient or master, on the host: one device scalar per parameter, read in
 * pieces through a buffer on the stack because nothing is allocated inside a step. */
static void module_squares(struct optim *o, bool of_gradients, double *squares)
{
    struct model *m = o->model;
    union { float f32[512]; double f64[512]; } piece;
    const int piece_max = 512;

    o->be->fill(o->stream, &o->scalar, 0.0);
    for (int i = 0; i < m->n_params; i++) {
        const struct param *p = &m->param[i];
        if (!counts(o, p)) continue;
        struct tensor into = range(&o->scalar, i, 1), x = of_gradients ? owned(p, &p->grad) : p->master;
        o->be->sum_squares(o->stream, &x, &into);
    }
    for (int i = 0; i < MODEL_MODULES; i++) squares[i] = 0.0;
    for (int first = 0; first < m->n_params; first += piece_max) {
        int n = m->n_params - first < piece_max ? m->n_params - first : piece_max;
        struct tensor from = range(&o->scalar, first, n), to = tensor_1d(&piece, m->acc, PLACE_HOST, n);
        o->be->copy(o->stream, &from, &to);
        o->be->stream_sync(o->stream);
        for (int i = 0; i < n; i++)
            squares[m->param[first + i].module] += m->acc == DTYPE_F64 ? piece.f64[i] : (double)piece.f32[i];
    }
    sum_over_grids(o, squares);
}

static void module_zeros(struct optim *o, double *zeros)
{
    int64_t count[MODEL_MODULES];
    struct tensor host = tensor_1d(count, DTYPE_I64, PLACE_HOST, MODEL_MODULES);

    o->be->fill(o->stream, &o->zeros, 0.0);
    for (int i = 0; i < o->model->n_params; i++) {
        const struct param *p = &o->model->param[i];
        if (!counts(o, p)) continue;
        struct tensor into = range(&o->zeros, p->module, 1), x = owned(p, &p->grad);
        o->be->count_zeros(o->stream, &x, &into);
    }
    o->be->copy(o->stream, &o->zeros, &host);
    o->be->stream_sync(o->stream);
    for (int i = 0; i < MODEL_MODULES; i++) zeros[i] = (double)count[i];
    sum_over_grids(o, zeros);
}

/* Gradients of all modules as the world sees them; returns the norm after the factors and names a module that is not finite. */
static double global_norm(struct optim *o, const double factor[MODEL_MODULES], int64_t *num_zeros, int *bad_module)
{
    double v[SUMMARY] = {0}, sum = 0.0;
    int worst = 0;

    module_squares(o, true, v + SQUARES);
    if (o->deck->log.log_num_zeros_in_grad) module_zeros(o, v + ZEROS);
    for (int i = 0; i < MODEL_MODULES; i++) {
        double square = v[SQUARES + i] * factor[i] * factor[i];
        v[NON_FINITE + i] = isnan(square) ? 2.0 : isinf(square) ? 1.0 : 0.0;
        v[SQUARES + i] = isfinite(square) ? square : 0.0;
    }
    comm_host_reduce_f64(o->topo->world, v, SUMMARY, COMM_MAX);
    *num_zeros = o->deck->log.log_num_zeros_in_grad ? 0 : -1;
    *bad_module = -1;
    for (int i = 0; i < MODEL_MODULES; i++) {
        sum += v[SQUARES + i];
        if (*num_zeros >= 0) *num_zeros += (int64_t)v[ZEROS + i];
        if ((int)v[NON_FINITE + i] > worst) {
            worst = (int)v[NON_FINITE + i];
            *bad_module = i;
        }
    }
    return worst == 2 ? NAN : worst == 1 ? INFINITY : sqrt(sum);
}

/* Of all trainable parameters, from the masters. */
static double params_norm(struct optim *o)
{
    double v[MODEL_MODULES], sum = 0.0;

    module_squares(o, false, v);
    comm_host_reduce_f64(o->topo->world, v, MODEL_MODULES, COMM_MAX);
    for (int i = 0; i < MODEL_MODULES; i++) sum += v[i];
    return sqrt(sum);
}

static void update(struct optim *o, const double factor[MODEL_MODULES], double clip, double lr, double weight_decay)
{
    const struct deck_optimizer *k = &o->deck->optimizer;

    for (int i = 0; i < o->model->n_params; i++) {
        struct param *p = &o->model->param[i];
        if (!p->trainable || tensor_numel(&p->master) == 0) continue;
        struct tensor grad = owned(p, &p->grad), value = owned(p, &p->value);
        o->be->adamw(o->stream, &grad, factor[p->module] * clip, lr, k->adam_beta1, k->adam_beta2, k->adam_eps,
                     p->decay ? weight_decay : 0.0, o->step, &p->master, &p->m, &p->v, &value);
    }
}

struct optim_result optim_step(struct optim *o, double n_tokens, double encoder_factor, double lr, double weight_decay)
{
    const struct deck_optimizer *k = &o->deck->optimizer;
    double inverse = 1.0 / (n_tokens > 1.0 ? n_tokens : 1.0), clip = 1.0;
    double factor[MODEL_MODULES] = {inverse * encoder_factor, inverse * encoder_factor, inverse};
    struct optim_result r = {.params_norm = NAN};
    int bad_module;

    r.grad_norm = global_norm(o, factor, &r.num_zeros, &bad_module);
    if (bad_module >= 0 && k->non_finite_policy == DECK_NON_FINITE_ABORT) {
        /* One rank speaks; the others wait to be ended, so that exactly one line names the cause. */
        if (o->topo->rank != 0) comm_host_barrier(o->topo->world);
        fatal(EXIT_NUMERICS, __FILE__, __LINE__,
              "optimizer.non_finite_policy = 'skip' goes on without this update; a lower lr.lr or a longer warm-up may cure it",
              "gradient norm of the %s module is %s", model_module_names[bad_module], isnan(r.grad_norm) ? "nan" : "inf");
    }
    r.applied = bad_module < 0 && !(k->grad_norm_skip_threshold > 0.0 && r.grad_norm > k->grad_norm_skip_threshold);
    if (r.applied) {
        if (k->clip_grad > 0.0 && k->clip_grad < r.grad_norm + 1e-6) clip = k->clip_grad / (r.grad_norm + 1e-6);
        o->step++;
        update(o, factor, clip, lr, weight_decay);
        ddp_gather(o->model->ddp);
    }
    if (o->deck->log.log_params_norm) r.params_norm = params_norm(o);
    return r;
}
