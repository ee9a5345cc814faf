/* optim.c - data-parallel reduction, global norm, clip and AdamW over the parameter table (optim.h; parallel.md 6.6, 7.2-7.4).
 *
 * Norm. Every rank sums the squares of its own reduced gradients per module (fp64 on the host over one device scalar per parameter);
 * replicas hold equal values, so one MAX over the world gives each module's value to everybody. A MAX hides a NaN, so finiteness
 * travels as a flag of its own (0 finite, 1 infinite, 2 NaN) and the value is replaced by 0. One message carries everything.
 * Clip: c = min(1, clip/(norm + 1e-6)), one coefficient for all modules.
 */
#include <math.h>
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

void optim_plan(struct optim *o, struct arenas *arenas)
{
    struct arena *a = &arenas->a[ARENA_OPTIMIZER];
    struct model *m = o->model;
    int64_t n = m->n_params > 0 ? m->n_params : 1;

    for (int i = 0; i < m->n_params; i++) {
        struct param *p = &m->param[i];
        if (!p->trainable) continue;
        p->master = arena_tensor(a, p->name, m->acc, p->value.ndim, p->value.shape);
        p->m = arena_tensor(a, p->name, m->acc, p->value.ndim, p->value.shape);
        p->v = arena_tensor(a, p->name, m->acc, p->value.ndim, p->value.shape);
    }
    o->scalar = arena_1d(a, "squares of each parameter", m->acc, n);
    o->zeros = arena_1d(a, "zeros of each module", DTYPE_I64, MODEL_MODULES);
}

void optim_refresh_masters(struct optim *o)
{
    for (int i = 0; i < o->model->n_params; i++) {
        struct param *p = &o->model->param[i];
        if (p->trainable) o->be->cast(o->stream, &p->value, &p->master);
    }
}

void optim_grad_sync(struct optim *o, bool language)
{
    const struct grid *grid = language ? &o->topo->language : &o->topo->encoder;
    struct tensor flat = model_grad_buffer(o->model, language);

    if (!grid->member || grid->dp.size == 1 || tensor_numel(&flat) == 0) return;
    o->comm->all_reduce(grid->dp.comm, &flat, COMM_SUM, o->stream);
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

/* Sum of squares per module of every trainable parameter's gradient or master, on the host: one device scalar per parameter, read in
 * pieces through a buffer on the stack because nothing is allocated inside a step. */
static void module_squares(struct optim *o, bool of_gradients, double *squares)
{
    struct model *m = o->model;
    union { float f32[512]; double f64[512]; } piece;
    const int piece_max = 512;

    o->be->fill(o->stream, &o->scalar, 0.0);
    for (int i = 0; i < m->n_params; i++) {
        struct tensor into = tensor_1d((char *)o->scalar.data + (size_t)i * dtype_bytes(m->acc), m->acc, o->scalar.place, 1);
        if (m->param[i].trainable)
            o->be->sum_squares(o->stream, of_gradients ? &m->param[i].grad : &m->param[i].master, &into);
    }
    for (int i = 0; i < MODEL_MODULES; i++) squares[i] = 0.0;
    for (int first = 0; first < m->n_params; first += piece_max) {
        int n = m->n_params - first < piece_max ? m->n_params - first : piece_max;
        struct tensor from = tensor_1d((char *)o->scalar.data + (size_t)first * dtype_bytes(m->acc), m->acc, o->scalar.place, n);
        struct tensor to = tensor_1d(&piece, m->acc, PLACE_HOST, n);
        o->be->copy(o->stream, &from, &to);
        o->be->stream_sync(o->stream);
        for (int i = 0; i < n; i++)
            squares[m->param[first + i].module] += m->acc == DTYPE_F64 ? piece.f64[i] : (double)piece.f32[i];
    }
}

static void module_zeros(struct optim *o, double *zeros)
{
    int64_t count[MODEL_MODULES];
    struct tensor host = tensor_1d(count, DTYPE_I64, PLACE_HOST, MODEL_MODULES);

    o->be->fill(o->stream, &o->zeros, 0.0);
    for (int i = 0; i < o->model->n_params; i++) {
        const struct param *p = &o->model->param[i];
        struct tensor into = tensor_1d((int64_t *)o->zeros.data + p->module, DTYPE_I64, o->zeros.place, 1);
        if (p->trainable) o->be->count_zeros(o->stream, &p->grad, &into);
    }
    o->be->copy(o->stream, &o->zeros, &host);
    o->be->stream_sync(o->stream);
    for (int i = 0; i < MODEL_MODULES; i++) zeros[i] = (double)count[i];
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
        for (int i = 0; i < o->model->n_params; i++) {
            struct param *p = &o->model->param[i];
            if (!p->trainable) continue;
            o->be->adamw(o->stream, &p->grad, factor[is_language(p) ? MODEL_LANGUAGE : MODEL_VISION] * clip, lr, k->adam_beta1,
                         k->adam_beta2, k->adam_eps, p->decay ? weight_decay : 0.0, o->step, &p->master, &p->m, &p->v,
                         &p->value);
        }
    }
    if (o->deck->log.log_params_norm) r.params_norm = params_norm(o);
    return r;
}
