/* optim.c - gradient finalisation, global norm, clip and AdamW on the shards of ddp.h (optim.h;
 * parallel.md 6.6, 7.2-7.4).
 *
 * Norm. Every element of the model counts once: a rank sums the squares of its owned, reduced
 * gradients per module (fp64 over one scalar per parameter), leaving out replicas of
 * tensor-parallel rank > 0. One exchange over the world brings every rank's sums and its part of
 * the loss to all of them, and each comes to the same decision (backend.h's decide_update): a rank
 * outside a grid has zeros there, so the sum over the world in the order of the ranks is that over
 * the grid.
 *
 * Clip. c = min(1, clip/(norm + 1e-6)), one coefficient for all modules.
 *
 * Nothing of this waits for the host: what AdamW multiplies gradients with lies on the device, and
 * is negative where the update is left out.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "ddp.h"
#include "optim.h"
#include "timer.h"

static bool is_language(const struct param *p)
{
    return p->module == MODEL_LANGUAGE;
}

void optim_init(struct optim *o, const struct deck *deck, const struct topology *topo,
                struct model *model, const struct backend_ops *be, const struct comm_ops *comm,
                struct stream *stream)
{
    *o = (struct optim){
        .deck = deck, .topo = topo, .model = model, .be = be, .comm = comm, .stream = stream
    };
}

/* Elements [first, first+n) of a dense tensor. */
static struct tensor range(const struct tensor *t, int64_t first, int64_t n)
{
    char *data = t->data;

    return tensor_1d(data ? data + (size_t)first * dtype_bytes(t->dtype) : NULL, t->dtype, t->place,
                     n);
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
        const struct tensor state[3] = { arena_1d(a, "masters", m->acc, b->shard_numel),
                                         arena_1d(a, "first moments", m->acc, b->shard_numel),
                                         arena_1d(a, "second moments", m->acc, b->shard_numel) };
        for (int k = 0; k < b->n_slots; k++) {
            const struct ddp_slot *s = &b->slot[k];
            struct param *p = &m->param[s->param];
            p->owned = s->first;
            p->master = range(&state[0], s->local, s->n);
            p->m = range(&state[1], s->local, s->n);
            p->v = range(&state[2], s->local, s->n);
            if (p->sum_tp)
                replicated += s->n;
        }
    }
    o->scalar = arena_1d(a, "squares of each parameter", m->acc, n);
    o->zeros = arena_1d(a, "zeros of each module", DTYPE_I64, MODEL_MODULES);
    o->numbers = arena_2d(&arenas->a[ARENA_COMM], "loss and squares of each rank", DTYPE_F64,
                          o->topo->size, 1 + MODEL_MODULES);
    o->result = arena_1d(&arenas->a[ARENA_COMM], "what becomes of the update", DTYPE_F64,
                         MODEL_MODULES + 3);
    o->masters =
        arena_1d(&arenas->a[ARENA_COMM], "squares of the masters", DTYPE_F64, MODEL_MODULES);
    o->host_result =
        arena_1d(&arenas->a[ARENA_DATA], "update on the host", DTYPE_F64, MODEL_MODULES + 3);
    o->host_zeros = arena_1d(&arenas->a[ARENA_DATA], "zeros on the host", DTYPE_I64, MODEL_MODULES);
    o->host_masters = arena_1d(&arenas->a[ARENA_DATA], "squares of the masters on the host",
                               DTYPE_F64, MODEL_MODULES);
    if (o->topo->language.tp_size == 1)
        replicated = 0;
    o->replicated =
        arena_1d(&arenas->a[ARENA_COMM], "gradients summed over tp", m->acc, replicated);
}

void optim_refresh_masters(struct optim *o)
{
    ddp_use_all(o->model->ddp);
    for (int i = 0; i < o->model->n_params; i++) {
        struct param *p = &o->model->param[i];
        if (tensor_numel(&p->master) == 0)
            continue;
        struct tensor value = owned(p, &p->value);
        o->be->cast(o->stream, &value, &p->master);
    }
}

/* One message: the owned pieces are packed in the order of the table, which all ranks of the group
 * share. */
static void sum_over_tp(struct optim *o)
{
    for (int out = 0; out < 2; out++) {
        int64_t at = 0;
        for (int i = 0; i < o->model->n_params; i++) {
            const struct param *p = &o->model->param[i];
            int64_t n = tensor_numel(&p->master);
            if (!p->trainable || !p->sum_tp || n == 0)
                continue;
            struct tensor grad = owned(p, &p->grad), packed = range(&o->replicated, at, n);
            o->be->copy(o->stream, out ? &packed : &grad, out ? &grad : &packed);
            at += n;
        }
        ASSERT(at == tensor_numel(&o->replicated));
        if (!out && at > 0)
            o->comm->all_reduce(o->topo->language.tp.comm, &o->replicated, COMM_SUM, o->stream);
    }
}

void optim_grad_sync(struct optim *o, bool language)
{
    ddp_reduce(o->model->ddp, language);
    if (language && o->topo->language.member && o->topo->language.tp_size > 1)
        sum_over_tp(o);
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

    if (!grid->member)
        return;
    for (int i = 0; i < m->n_moe; i++) {
        struct tensor count = model_tokens_per_expert(m, i);
        if (update) {
            if (grid->tp_dp_cp.size > 1)
                o->comm->all_reduce(grid->tp_dp_cp.comm, &count, COMM_SUM, o->stream);
            o->be->expert_bias_update(o->stream, o->deck->moe.moe_router_bias_update_rate,
                                      &model_expert_bias(m, i)->value, &count);
        } else {
            o->be->fill(o->stream, &count, 0.0);
        }
    }
}

/* Whether this rank's elements of p stand for themselves: replicas over tensor-parallel ranks count
 * once. */
static bool counts(const struct optim *o, const struct param *p)
{
    const struct grid *g = is_language(p) ? &o->topo->language : &o->topo->encoder;

    if (!p->trainable || tensor_numel(&p->master) == 0)
        return false;
    return p->shard != PARAM_REPLICATED || (p->expert ? g->expt_tp_rank : g->tp_rank) == 0;
}

/* Per module over all ranks of its grid; NaN and infinity survive the sum. */
static void sum_over_grids(const struct optim *o, double v[MODEL_MODULES])
{
    const struct grid *e = &o->topo->encoder, *l = &o->topo->language;

    if (e->member && e->all.size > 1)
        comm_host_reduce_f64(e->all.comm, &v[MODEL_VISION], 2, COMM_SUM);
    if (l->member && l->all.size > 1)
        comm_host_reduce_f64(l->all.comm, &v[MODEL_LANGUAGE], 1, COMM_SUM);
}

/* F64 [M]: sums of squares per module of every trainable parameter's gradient or master, of this
 * rank: one device scalar per parameter, a module's side by side in the order of the table, added
 * up in fp64. */
static void module_squares(struct optim *o, bool of_gradients, const struct tensor *squares)
{
    struct model *m = o->model;
    int64_t at = 0;

    o->be->fill(o->stream, &o->scalar, 0.0);
    for (int k = 0; k < MODEL_MODULES; k++) {
        const struct tensor total = range(squares, k, 1);
        const int64_t first = at;
        for (int i = 0; i < m->n_params; i++) {
            const struct param *p = &m->param[i];
            if (p->module != (enum model_module)k)
                continue;
            struct tensor into = range(&o->scalar, at++, 1),
                          x = of_gradients ? owned(p, &p->grad) : p->master;
            if (counts(o, p))
                o->be->sum_squares(o->stream, &x, &into);
        }
        const struct tensor all = range(&o->scalar, first, at - first);
        o->be->sum_wide(o->stream, &all, &total);
    }
}

static void module_zeros(struct optim *o)
{
    o->be->fill(o->stream, &o->zeros, 0.0);
    for (int i = 0; i < o->model->n_params; i++) {
        const struct param *p = &o->model->param[i];
        if (!counts(o, p))
            continue;
        struct tensor into = range(&o->zeros, p->module, 1), x = owned(p, &p->grad);
        o->be->count_zeros(o->stream, &x, &into);
    }
}

/* What every rank has to say about the loss and its gradients, to every rank; then one decision,
 * the same everywhere. */
static void decide(struct optim *o, const struct tensor *loss_sum, double n_tokens,
                   double encoder_factor)
{
    const struct deck_optimizer *k = &o->deck->optimizer;
    const double inverse = 1.0 / (n_tokens > 1.0 ? n_tokens : 1.0);
    const double factor[MODEL_MODULES] = { inverse * encoder_factor, inverse * encoder_factor,
                                           inverse };
    const struct tensor mine = tensor_row_range(&o->numbers, o->topo->rank, 1),
                        loss = tensor_col_range(&mine, 0, 1),
                        squares = tensor_col_range(&mine, 1, MODEL_MODULES);

    if (loss_sum)
        o->be->sum_wide(o->stream, loss_sum, &loss);
    else
        o->be->fill(o->stream, &loss, 0.0);
    module_squares(o, true, &squares);
    if (o->deck->log.log_num_zeros_in_grad)
        module_zeros(o);
    timer_part(TIMER_AGREEMENT);
    if (o->topo->size > 1)
        o->comm->all_gather(o->topo->world, &mine, &o->numbers, o->stream);
    timer_part(TIMER_NO_PART);
    o->be->decide_update(o->stream, &o->numbers, n_tokens, factor, k->clip_grad,
                         k->grad_norm_skip_threshold, &o->result);
}

static void update(struct optim *o, double lr, double weight_decay)
{
    const struct deck_optimizer *k = &o->deck->optimizer;

    for (int i = 0; i < o->model->n_params; i++) {
        struct param *p = &o->model->param[i];
        if (!p->trainable || tensor_numel(&p->master) == 0)
            continue;
        struct tensor grad = owned(p, &p->grad), value = owned(p, &p->value),
                      factor = range(&o->result, p->module, 1);
        o->be->adamw(o->stream, &grad, &factor, lr, k->adam_beta1, k->adam_beta2, k->adam_eps,
                     p->decay ? weight_decay : 0.0, o->step + 1, &p->master, &p->m, &p->v, &value);
    }
}

void optim_begin(struct optim *o, const struct tensor *loss_sum, double n_tokens,
                 double encoder_factor, double lr, double weight_decay)
{
    decide(o, loss_sum, n_tokens, encoder_factor);
    o->be->copy(o->stream, &o->result, &o->host_result);
    if (o->deck->log.log_num_zeros_in_grad)
        o->be->copy(o->stream, &o->zeros, &o->host_zeros);
    update(o, lr, weight_decay);
    ddp_gather(o->model->ddp);
    if (!o->deck->log.log_params_norm)
        return;
    module_squares(o, false, &o->masters);
    o->be->copy(o->stream, &o->masters, &o->host_masters);
}

/* Sum over the ranks of each module's grid, the same on all ranks of the world. */
static double agreed_sum(struct optim *o, double v[MODEL_MODULES])
{
    double sum = 0.0;

    sum_over_grids(o, v);
    comm_host_reduce_f64(o->topo->world, v, MODEL_MODULES, COMM_MAX);
    for (int i = 0; i < MODEL_MODULES; i++)
        sum += v[i];
    return sum;
}

static int64_t num_zeros(struct optim *o)
{
    const int64_t *count = o->host_zeros.data;
    double v[MODEL_MODULES];

    for (int i = 0; i < MODEL_MODULES; i++)
        v[i] = (double)count[i];
    return (int64_t)agreed_sum(o, v);
}

/* Of all trainable parameters, from the masters. */
static double params_norm(struct optim *o)
{
    double v[MODEL_MODULES];

    memcpy(v, o->host_masters.data, sizeof v);
    return sqrt(agreed_sum(o, v));
}

/* Of the many numbers that are none, the one that the host writes. */
static double plain(double x)
{
    return isnan(x) ? NAN : x;
}

static const char *spell(double x)
{
    return isnan(x) ? "nan" : x > 0.0 ? "inf" : "-inf";
}

static _Noreturn void abort_on(const struct optim *o, const char *what, double value)
{
    /* One rank speaks; the others wait to be ended, so that exactly one line names the cause. */
    if (o->topo->rank != 0)
        comm_host_barrier(o->topo->world);
    fatal(
        EXIT_NUMERICS, __FILE__, __LINE__,
        "optimizer.non_finite_policy = 'skip' goes on without this update; a lower lr.lr or a longer warm-up may cure it",
        "%s is %s", what, spell(value));
}

struct optim_result optim_finish(struct optim *o)
{
    const struct deck_optimizer *k = &o->deck->optimizer;
    const double *v = o->host_result.data;
    const int bad_module = (int)v[MODEL_MODULES + 2];
    struct optim_result r = { .applied = v[0] >= 0.0,
                              .loss = plain(v[MODEL_MODULES]),
                              .grad_norm = NAN,
                              .params_norm = NAN,
                              .num_zeros = -1 };
    char what[64];

    r.finite = isfinite(r.loss);
    if (!r.finite && k->non_finite_policy == DECK_NON_FINITE_ABORT)
        abort_on(o, "lm loss", r.loss);
    if (!r.finite)
        return r;
    r.grad_norm = plain(v[MODEL_MODULES + 1]);
    if (bad_module >= 0 && k->non_finite_policy == DECK_NON_FINITE_ABORT) {
        snprintf(what, sizeof what, "gradient norm of the %s module",
                 model_module_names[bad_module]);
        abort_on(o, what, r.grad_norm);
    }
    o->step += r.applied;
    if (o->deck->log.log_num_zeros_in_grad)
        r.num_zeros = num_zeros(o);
    if (o->deck->log.log_params_norm)
        r.params_norm = params_norm(o);
    return r;
}

struct optim_result optim_step(struct optim *o, double n_tokens, double encoder_factor, double lr,
                               double weight_decay)
{
    optim_begin(o, NULL, n_tokens, encoder_factor, lr, weight_decay);
    o->be->stream_sync(o->stream);
    return optim_finish(o);
}
