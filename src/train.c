/* train.c - see train.h. The line that an iteration prints is training.md 3.2 plus an estimate of
 * the time left. */
#include "train.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include "ddp.h"
#include "io_hf.h"
#include "log.h"
#include "path_hint.h"
#include "timer.h"

/* ---- where to start -------------------------------------------------------------------------- */

static bool is_file(const char *path)
{
    struct stat st;

    return stat(path, &st) == 0 && !S_ISDIR(st.st_mode);
}

void train_find_start(struct train_start *s, const struct run *run, const struct deck *deck,
                      const struct topology *topo, struct errors *errors)
{
    const struct deck_checkpoint *k = &deck->checkpoint;
    int64_t found = -1, again = 0, own = 0;
    char hint[512];

    *s = (struct train_start){ .iteration = 0 };
    snprintf(s->text, sizeof s->text, "new");
    if (topo->rank == 0) {
        own = *k->load && *k->save && run_same_directory(k->load, k->save);
        again =
            *k->load && *k->save && !own && deck->run.mode == DECK_MODE_TRAIN && run_same_deck(run);
    }
    comm_host_broadcast(topo->world, &own, sizeof own, 0);
    comm_host_broadcast(topo->world, &again, sizeof again, 0);
    if (!*k->load || again) {
        s->load = k->save;
        if (*k->save)
            found = checkpoint_find(k->save, again ? -1 : k->ckpt_step, topo, errors);
        own = 1;
        s->finetune = !again && k->finetune;
    }
    if (found < 0 && *k->load) {
        s->load = k->load;
        found = checkpoint_find(k->load, k->ckpt_step, topo, errors);
        own = !again && own;
        s->finetune = k->finetune;
        if (found < 0 && topo->rank == 0 && errors->count == 0)
            log_warn("checkpoint.load = '%s' %s: starting at iteration 0%s", k->load,
                     is_file(k->load) ? "is a file, not a directory of checkpoints"
                                      : "holds no checkpoint",
                     path_hint(k->load, hint, sizeof hint));
    }
    if (comm_host_collect_errors(topo->world, errors) > 0 || found < 0) {
        if (deck->run.mode == DECK_MODE_EVAL && topo->rank == 0 && errors->count == 0 &&
            !import_wanted(deck))
            log_warn(
                "run.mode = 'eval' without a checkpoint: what is evaluated are the initial weights; checkpoint.load names a directory of checkpoints");
        if (!*k->load && *k->save && topo->rank == 0 && errors->count == 0)
            checkpoint_warn_untracked(k->save);
        s->load = NULL;
        s->finetune = false;
        if (import_wanted(deck))
            snprintf(s->text, sizeof s->text, "new, with imported weights");
        return;
    }
    s->own = own && !s->finetune;
    s->iteration = s->finetune ? 0 : found;
    s->checkpoint = found;
    snprintf(s->text, sizeof s->text, "%s %s iteration %lld (verified)",
             s->finetune ? "weights of" : "restart from", s->load, (long long)found);
}

/* ---- build ----------------------------------------------------------------------------------- */

static int64_t planned(struct train *t)
{
    const bool device = step_device_peak(&t->step) >= 0;
    int64_t bytes = 0;

    for (int i = 0; i < ARENA_COUNT; i++)
        if (!device || t->arenas.a[i].place == PLACE_DEVICE)
            bytes += (int64_t)t->arenas.a[i].capacity;
    return bytes;
}

/* Most changes of section or part (timer.h) of two iterations: the one that is settled and the one
 * that is issued meanwhile. An action has its own section, waits for the bridge and reads samples;
 * a pass has its layers, an expert layer a dozen parts, and forward may come again in backward. */
static int64_t timer_marks(const struct train *t)
{
    const int64_t passes = 2 * t->deck->derived.num_microbatches;
    const int64_t language = 2 * 13 * t->deck->derived.num_layers + 4,
                  encoder = 2 * t->deck->vision.num_layers + 4;

    return 2 * (6 * t->step.train.n + passes * (language + encoder) + 32);
}

void train_init(struct train *t, const struct deck *deck, const struct topology *topo,
                struct comm *sharers, struct run *run, struct errors *errors)
{
    char why[1024];

    memset(t, 0, sizeof *t);
    t->deck = deck;
    t->topo = topo;
    t->run = run;
    t->comm = comm_select(deck);
    t->last_saved = t->last_validated = -1;
    t->has_data = deck->run.mode == DECK_MODE_TRAIN;
    if (t->has_data)
        data_init(&t->data, deck, DATA_TRAIN, errors);
    if (errors->count == 0)
        eval_init(&t->eval, deck, topo, errors);
    /* Sharers go on together or not at all. */
    int64_t faults = errors->count;
    if (sharers)
        comm_host_reduce_i64(sharers, &faults, 1, COMM_MAX);
    if (faults > 0)
        return;
    t->be = backend_select(deck);
    t->late = t->be->asynchronous;
    t->be->stream_create(&t->stream, "compute");
    model_init(&t->model, deck, topo, t->be, &t->stream);
    optim_init(&t->optim, deck, topo, &t->model, t->be, t->comm, &t->stream);
    step_init(&t->step, deck, topo, &t->model, &t->optim, t->be, t->comm, &t->stream);
    t->step.poll = (struct step_poll){ .poll = run_poll, .ctx = run };
    timer_use_device(t->be, &t->stream, timer_marks(t));
    arenas_init(&t->arenas);
    for (int pass = 0; pass < 2; pass++) {
        model_plan(&t->model, &t->arenas);
        optim_plan(&t->optim, &t->arenas);
        step_plan(&t->step, &t->arenas);
        if (pass > 0)
            continue;
        if (!arenas_fit(&t->arenas, t->be, sharers, why, sizeof why))
            FATAL(EXIT_ENVIRONMENT, "%s", why);
        arenas_commit(&t->arenas, t->be);
    }
    t->planned = planned(t);
    if (sharers)
        comm_host_reduce_i64(sharers, &t->planned, 1, COMM_SUM);
    model_initialise(&t->model);
    optim_refresh_masters(&t->optim);
    lr_init(&t->state.lr, deck);
}

/* ---- restore --------------------------------------------------------------------------------- */

static void differs(const char *name, double stored, double deck, struct errors *errors)
{
    if (stored == deck)
        return;
    errors_add(
        errors, EXIT_CHECKPOINT,
        "mimo: error: the checkpoint's schedule has %s = %.9g, the deck %.9g; checkpoint.use_checkpoint_opt_param_scheduler "
        "or override_opt_param_scheduler chooses one",
        name, stored, deck);
}

/* Schedules may differ only where the curve does not show it: a constant curve has no end. */
static void compare_schedules(const struct lr_schedule *stored, const struct lr_schedule *deck,
                              struct errors *errors)
{
    differs("lr_decay_style", stored->style, deck->style, errors);
    differs("weight_decay_incr_style", stored->wd_style, deck->wd_style, errors);
    differs("lr", stored->max, deck->max, errors);
    differs("lr warm-up samples", stored->warmup, deck->warmup, errors);
    if (deck->warmup > 0.0)
        differs("lr_warmup_init", stored->init, deck->init, errors);
    if (deck->style != DECK_LR_CONSTANT) {
        differs("min_lr", stored->min, deck->min, errors);
        differs("lr decay samples", stored->decay, deck->decay, errors);
    }
    if (deck->style == DECK_LR_WSD) {
        differs("WSD tail samples", stored->anneal, deck->anneal, errors);
        differs("lr_wsd_decay_style", stored->wsd_style, deck->wsd_style, errors);
    }
    differs("end_weight_decay", stored->wd_end, deck->wd_end, errors);
    if (deck->wd_style != DECK_WD_CONSTANT) {
        differs("start_weight_decay", stored->wd_start, deck->wd_start, errors);
        differs("weight decay samples", stored->wd_steps, deck->wd_steps, errors);
    }
}

/* training.md 2.5. */
static void restore_schedule(struct train *t, struct errors *errors)
{
    struct lr_schedule own, *s = &t->state.lr;

    lr_init(&own, t->deck);
    if (t->deck->checkpoint.override_opt_param_scheduler) {
        own.n = t->state.consumed_train_samples;
        if (s->n != own.n && t->topo->rank == 0)
            log_warn(
                "override_opt_param_scheduler: the schedule goes on at %lld consumed samples, the checkpoint's was at %lld",
                (long long)own.n, (long long)s->n);
        *s = own;
    } else if (!t->deck->checkpoint.use_checkpoint_opt_param_scheduler && t->topo->rank == 0) {
        compare_schedules(s, &own, errors);
    }
    log_line("scheduler resumed: n=%lld, lr=%.6E, wd=%.6E", (long long)s->n, lr_at(s, (double)s->n),
             lr_weight_decay_at(s, (double)s->n));
}

static void load_checkpoint(struct train *t, const struct train_start *start, struct errors *errors)
{
    const struct deck_checkpoint *k = &t->deck->checkpoint;
    struct checkpoint_options options = { .model_only = !t->has_data,
                                          .no_optimizer = k->no_load_optim,
                                          .finetune = start->finetune };
    bool has_optimizer = false;

    checkpoint_load(start->load, start->checkpoint, t->deck, t->topo, &t->model, &t->state,
                    &options, &has_optimizer, errors);
    if (comm_host_collect_errors(t->topo->world, errors) > 0)
        return;
    if (!has_optimizer)
        optim_refresh_masters(&t->optim);
    t->optim.step = t->state.optim_step;
    t->eval.consumed = t->state.consumed_valid_samples;
    if (t->has_data && !start->finetune && !k->no_load_optim)
        restore_schedule(t, errors);
    if (k->no_load_rng)
        log_line(
            "no_load_rng: nothing to leave out, random numbers follow from run.seed and counters");
    if (start->own)
        t->last_saved = start->iteration;
    if (import_wanted(t->deck))
        log_line("checkpoint.import_* was read at iteration 0; now the checkpoint counts");
}

static void open_trace(struct train *t)
{
    int64_t bytes[ARENA_COUNT], first = t->run->first_iteration, done = t->state.iteration - first;
    int64_t rows = t->deck->derived.train_iterations - first;
    char *path = xasprintf("%s/trace.h5", t->run->dir);

    for (int i = 0; i < ARENA_COUNT; i++)
        bytes[i] = (int64_t)t->arenas.a[i].capacity;
    if (rows < done)
        rows = done;
    if (rows < 1)
        rows = 1;
    t->trace =
        trace_open(path, t->deck, t->topo, (int)t->step.n_moe, rows, t->run->continues ? done : 0,
                   eval_most(&t->eval, rows, t->run->starts), bytes);
    free(path);
    if (t->topo->rank == 0)
        t->board = tensorboard_open(t->deck->log.tensorboard_dir, t->run->continues);
    if (t->deck->log.dump_batches > (t->has_data ? t->state.iteration : 0)) {
        path = xasprintf("%s/batches.h5", t->run->dir);
        t->dump = batch_dump_open(path, t->deck, t->topo);
        free(path);
    }
    if (!t->has_data)
        t->eval.dump = t->dump;
}

void train_restore(struct train *t, const struct train_start *start, struct errors *errors)
{
    char shards[256];

    t->own = start->own;
    t->state.n_train_streams = t->has_data ? t->data.n_streams : 0;
    t->state.train_position = t->data.position;
    t->state.n_valid_streams = t->eval.active ? t->eval.data.n_streams : 0;
    t->state.valid_position = t->eval.data.position;
    if (start->load) {
        load_checkpoint(t, start, errors);
    } else if (import_wanted(t->deck)) {
        import_weights(&t->model, errors);
        optim_refresh_masters(&t->optim);
    }
    if (comm_host_collect_errors(t->topo->world, errors) > 0)
        return;
    if (t->has_data)
        run_note_data(t->run, data_fingerprint(&t->data, shards, sizeof shards));
    open_trace(t);
}

/* ---- saving and validating ------------------------------------------------------------------- */

static void save(struct train *t)
{
    const struct deck_checkpoint *k = &t->deck->checkpoint;
    double start = timer_now();

    if (!*k->save || t->last_saved == t->state.iteration)
        return;
    timer_start(TIMER_SAVE);
    if (t->has_data)
        data_gather_positions(&t->data, t->topo->world);
    if (t->eval.active)
        data_gather_positions(&t->eval.data, t->topo->world);
    t->state.optim_step = t->optim.step;
    ddp_use_all(t->model.ddp);
    checkpoint_check_replicas(t->topo, &t->model);
    if (t->trace)
        trace_sync(t->trace); /* a run that is resumed here rewrites no row before it */
    t->state.consumed_valid_samples = t->eval.consumed;
    checkpoint_save(k->save, t->deck, t->topo, &t->model, &t->state, !k->no_save_optim, t->own);
    checkpoint_retain(k->save, k->keep_last, k->save_retain_interval, t->topo);
    t->last_saved = t->state.iteration;
    timer_stop(TIMER_SAVE);
    log_line("saved iteration %lld in %s, %.2f s", (long long)t->state.iteration, k->save,
             timer_now() - start);
    run_progress_saved(t->run, t->state.iteration, t->flops, t->topo->language.size,
                       (double)t->state.consumed_train_samples *
                           (double)t->deck->language.seq_length);
    t->interval_start += timer_now() - start;
}

static void stop(struct train *t, const char *why);

static void validate(struct train *t, const char *suffix)
{
    char prefix[128];
    double start = timer_now();

    if (!t->eval.active || t->last_validated == t->state.iteration)
        return;
    snprintf(prefix, sizeof prefix, "iteration %lld%s", (long long)t->state.iteration, suffix);
    struct eval_result r = eval_run(&t->eval, &t->step, prefix);
    if (r.stop) {
        log_line("validation at %s left unfinished: %s", prefix, r.stop);
        stop(t, r.stop);
        return;
    }
    trace_write_eval(t->trace, t->state.iteration, r.lm_loss, r.lm_loss_ablated);
    tensorboard_put(t->board, "lm loss validation", TENSORBOARD_BOTH, r.lm_loss);
    tensorboard_put(t->board, "lm loss validation ppl", TENSORBOARD_BOTH,
                    exp(fmin(20.0, r.lm_loss)));
    if (!isnan(r.lm_loss_ablated))
        tensorboard_put(t->board, "lm loss validation ablated", TENSORBOARD_BOTH,
                        r.lm_loss_ablated);
    tensorboard_write(t->board, t->state.iteration, t->state.consumed_train_samples);
    t->last_validated = t->state.iteration;
    t->interval_start += timer_now() - start;
}

/* ---- the log line ---------------------------------------------------------------------------- */

static void put(char *line, size_t size, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
static void put(char *line, size_t size, const char *fmt, ...)
{
    size_t used = strlen(line);
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(line + used, size - used, fmt, ap);
    va_end(ap);
}

/* " name: value |" with six digits; what is not finite is "nan" or "inf", never "-NAN". */
static void put_value(char *line, size_t size, const char *name, double value)
{
    if (isfinite(value))
        put(line, size, " %s: %.6E |", name, value);
    else
        put(line, size, " %s: %s |", name, isnan(value) ? "nan" : value > 0.0 ? "inf" : "-inf");
}

static void put_eta(char *line, size_t size, double seconds)
{
    int64_t s = seconds < 1e9 ? (int64_t)(seconds + 0.5) : 1000000000;

    if (s >= 86400)
        put(line, size, " eta: %lldd %02lldh |", (long long)(s / 86400),
            (long long)(s / 3600 % 24));
    else
        put(line, size, " eta: %lld:%02lld:%02lld |", (long long)(s / 3600),
            (long long)(s / 60 % 60), (long long)(s % 60));
}

static bool has_balance_loss(const struct train *t)
{
    return t->step.n_moe > 0 &&
           t->deck->moe.moe_router_load_balancing_type == DECK_BALANCING_SEQ_AUX_LOSS;
}

static void print_line(const struct train *t, const struct trace_row *row, double elapsed,
                       double tflops)
{
    const struct deck *deck = t->deck;
    char line[2048] = "", stamp[40];
    struct timeval tv;
    struct tm tm;
    double updates = t->advanced > 0 ? (double)t->advanced : 1.0;

    gettimeofday(&tv, NULL);
    strftime(stamp, sizeof stamp, "%Y-%m-%d %H:%M:%S", localtime_r(&tv.tv_sec, &tm));
    put(line, sizeof line, " [%s.%06d] iteration %8lld/%8lld |", stamp, (int)tv.tv_usec,
        (long long)t->state.iteration, (long long)deck->derived.train_iterations);
    put(line, sizeof line, " consumed samples: %12lld |",
        (long long)t->state.consumed_train_samples);
    if (t->state.skipped_train_samples > 0)
        put(line, sizeof line, " skipped samples: %12lld |",
            (long long)t->state.skipped_train_samples);
    put(line, sizeof line, " elapsed time per iteration (ms): %.1f |", 1000.0 * elapsed);
    put(line, sizeof line, " throughput per GPU (TFLOP/s/GPU): %.1f |", tflops);
    if (!deck->derived.freeze_language)
        put(line, sizeof line, " learning rate: %.6E |",
            lr_at(&t->state.lr, (double)t->state.lr.n));
    put(line, sizeof line, " global batch size: %5lld |", (long long)deck->batch.global_batch_size);
    put_value(line, sizeof line, "lm loss", t->loss_sum / updates);
    if (has_balance_loss(t))
        put_value(line, sizeof line, "seq_load_balancing_loss", t->balance_sum / updates);
    put(line, sizeof line, " loss scale: %.1f | grad norm: %.3f |", 1.0, fabs(row->grad_norm));
    if (row->num_zeros >= 0)
        put(line, sizeof line, " num zeros: %lld |", (long long)row->num_zeros);
    if (deck->log.log_params_norm)
        put(line, sizeof line, " params norm: %.3f |", row->params_norm);
    put(line, sizeof line,
        " number of skipped iterations: %3lld | number of nan iterations: %3lld |",
        (long long)t->skipped, (long long)t->nan);
    put_eta(line, sizeof line,
            elapsed * (double)(deck->derived.train_iterations - t->state.iteration));
    log_line("%s", line);
}

static void print_progress(const struct train *t, const struct trace_row *row, double elapsed)
{
    int64_t done = t->state.iteration, all = t->deck->derived.train_iterations;
    char line[256] = "";

    put(line, sizeof line, " iteration %lld/%lld | %.0f %% |", (long long)done, (long long)all,
        100.0 * (double)done / (double)all);
    put_eta(line, sizeof line, elapsed * (double)(all - done));
    put_value(line, sizeof line, "lm loss", row->lm_loss);
    put(line, sizeof line, " %.1f ms |", 1000.0 * elapsed);
    log_progress("%s", line);
}

/* training.md 3.3. As in the line, the learning rate is the next iteration's. */
static void put_row(const struct train *t, const struct trace_row *row)
{
    struct tensorboard *b = t->board;

    if (!t->deck->derived.freeze_language)
        tensorboard_put(b, "learning-rate", TENSORBOARD_BOTH,
                        lr_at(&t->state.lr, (double)t->state.lr.n));
    if (t->state.skipped_train_samples > 0)
        tensorboard_put(b, "skipped-train-samples", TENSORBOARD_ITERATIONS,
                        (double)t->state.skipped_train_samples);
    tensorboard_put(b, "batch-size", TENSORBOARD_BOTH, (double)t->deck->batch.global_batch_size);
    tensorboard_put(b, "lm loss", TENSORBOARD_BOTH, row->lm_loss);
    if (has_balance_loss(t))
        tensorboard_put(b, "seq_load_balancing_loss", TENSORBOARD_ITERATIONS,
                        row->seq_load_balancing_loss);
    tensorboard_put(b, "loss-scale", TENSORBOARD_BOTH, 1.0);
    if (!isnan(row->grad_norm))
        tensorboard_put(b, "grad-norm", TENSORBOARD_BOTH, row->grad_norm);
    if (row->num_zeros >= 0)
        tensorboard_put(b, "num-zeros", TENSORBOARD_BOTH, (double)row->num_zeros);
    if (!isnan(row->params_norm))
        tensorboard_put(b, "params-norm", TENSORBOARD_BOTH, row->params_norm);
}

enum { ROLES = 3 };
static const char *const roles[ROLES] = { "encoder", "language", "both" };

static int role_of(const struct train *t)
{
    return t->topo->encoder.member ? t->topo->language.member ? 2 : 0 : 1;
}

/* Memory against what was planned, of each role's rank that has most of it in use: of its device,
 * or of its process where the host is the device. Collective over the world. */
static void report_memory(struct train *t)
{
    struct use {
        int64_t used, planned;
        int role, device;
    } own = { .used = step_device_peak(&t->step), .planned = t->planned, .role = role_of(t) },
      *all = NULL;
    struct rusage usage;

    own.device = own.used >= 0;
    getrusage(RUSAGE_SELF, &usage);
    if (!own.device)
        own.used = (int64_t)usage.ru_maxrss * 1024;
    if (t->topo->rank == 0)
        all = xcalloc((size_t)t->topo->size, sizeof *all);
    comm_host_gather(t->topo->world, &own, sizeof own, all, 0);
    for (int role = 0; all && role < ROLES; role++) {
        int most = -1;
        for (int r = 0; r < t->topo->size; r++)
            if (all[r].role == role && (most < 0 || all[r].used > all[most].used))
                most = r;
        if (most >= 0)
            log_line("memory: %s, at most %.0f MiB of a %s (rank %d), %.0f planned", roles[role],
                     (double)all[most].used / 0x1p20, all[most].device ? "GPU" : "process", most,
                     (double)all[most].planned / 0x1p20);
    }
    free(all);
}

/* The timers up to now; with a log line also as "<section>-time", seconds an iteration of the
 * slowest rank. */
static void report_timers(struct train *t, int64_t iterations)
{
    double seconds[TIMER_SECTIONS];

    timer_report(t->topo->world, role_of(t), roles, ROLES, seconds);
    if (!t->board || iterations == 0)
        return;
    for (int i = 0; i < TIMER_SECTIONS; i++) {
        char tag[40];
        int n = snprintf(tag, sizeof tag, "%s-time", timer_name(i));
        for (int j = 0; j < n; j++)
            if (tag[j] == ' ')
                tag[j] = '-';
        tensorboard_put(t->board, tag, TENSORBOARD_ITERATIONS, seconds[i] / (double)iterations);
    }
}

static void report_iteration(struct train *t, const struct trace_row *row)
{
    int64_t iterations = t->advanced + t->skipped;
    bool due = t->state.iteration % t->deck->log.log_interval == 0;
    /* Iterations that are settled late end before the host looks at the clock. */
    double elapsed = (t->late ? t->seconds : timer_now() - t->interval_start) / (double)iterations;
    double tflops = row->tflops_per_gpu * row->iteration_seconds / elapsed;

    timer_start(TIMER_LOG);
    if (due || !t->logged_first)
        print_line(t, row, elapsed, tflops);
    else
        print_progress(t, row, elapsed);
    t->logged_first = true;
    put_row(t, row);
    if (due) {
        tensorboard_put(t->board, "iteration-time", TENSORBOARD_ITERATIONS, elapsed);
        tensorboard_put(t->board, "throughput", TENSORBOARD_ITERATIONS, tflops);
        t->loss_sum = t->balance_sum = t->seconds = 0.0;
        t->advanced = t->skipped = t->nan = 0;
        t->interval_start = timer_now();
    }
    timer_stop(TIMER_LOG);
    if (due && t->deck->log.log_timers)
        report_timers(t, iterations);
    timer_start(TIMER_LOG);
    tensorboard_write(t->board, t->state.iteration, t->state.consumed_train_samples);
    timer_stop(TIMER_LOG);
}

/* ---- the loop -------------------------------------------------------------------------------- */

void train_begin(struct train *t)
{
    if (t->has_data && t->state.iteration >= t->deck->derived.train_iterations)
        log_line("nothing to train: iteration %lld of %lld is already done",
                 (long long)t->state.iteration, (long long)t->deck->derived.train_iterations);
    if (t->deck->checkpoint.save_initial && t->state.iteration == 0 && t->has_data)
        save(t);
    if (!t->run->continues || t->state.iteration == 0 || !t->has_data)
        validate(t, "");
    double seconds[TIMER_ROWS];
    timer_catch_up();
    timer_take_iteration(seconds);
    t->interval_start = timer_now();
}

bool train_goes_on(const struct train *t)
{
    return t->has_data && !t->stop &&
           t->state.iteration + t->pending < t->deck->derived.train_iterations;
}

static bool to_skip(const struct deck *deck, int64_t iteration)
{
    for (int i = 0; i < deck->batch.iterations_to_skip.n; i++)
        if (deck->batch.iterations_to_skip.v[i] == iteration)
            return true;
    return false;
}

/* Read the samples, train nothing; the row says so. */
static void skip_iteration(struct train *t)
{
    int64_t gbs = t->deck->batch.global_batch_size;
    struct trace_row row = { .iteration = t->state.iteration + 1,
                             .num_zeros = -1,
                             .lm_loss = NAN,
                             .grad_norm = NAN,
                             .params_norm = NAN,
                             .skipped = 1 };

    data_skip(&t->data, t->state.iteration);
    t->state.iteration++;
    t->state.consumed_train_samples += gbs;
    t->state.skipped_train_samples += gbs;
    row.consumed_samples = t->state.consumed_train_samples;
    row.learning_rate = lr_at(&t->state.lr, (double)t->state.lr.n);
    row.weight_decay = lr_weight_decay_at(&t->state.lr, (double)t->state.lr.n);
    trace_write(t->trace, t->state.iteration - 1 - t->run->first_iteration, &row);
}

/* Stop with a checkpoint; the text goes to the EXIT file. */
static void stop(struct train *t, const char *why)
{
    if (t->has_data)
        save(t);
    if (t->stop || (t->has_data && t->state.iteration >= t->deck->derived.train_iterations))
        return;
    t->stop = true;
    t->why = why;
}

static bool at_interval(int64_t interval, int64_t iteration)
{
    return interval > 0 && iteration % interval == 0;
}

static void save_and_decide(struct train *t, const bool *request)
{
    const struct deck *deck = t->deck;
    int64_t i = t->state.iteration;

    if (request[STEP_STOP_SIGNAL])
        stop(t, "stopped by a signal");
    if (request[STEP_STOP_FILE])
        stop(t, "stopped by the file STOP");
    if (at_interval(deck->checkpoint.save_interval, i))
        save(t);
    if (request[STEP_SAVE_FILE]) {
        save(t);
        run_save_served(t->run);
    }
    if (request[STEP_STOP_TIME])
        stop(t, "stopped by run.exit_duration_in_mins");
    if (at_interval(deck->run.exit_interval, i))
        stop(t, "stopped by run.exit_interval");
}

/* Whether the iteration must be settled before the next one begins. */
static bool settles_at_once(const struct train *t, int64_t iteration, const bool *request)
{
    const struct deck *deck = t->deck;

    for (int i = 0; i < STEP_REQUESTS; i++)
        if (request[i])
            return true;
    return !t->late || t->step.dump || eval_due(&t->eval, iteration) ||
           at_interval(deck->checkpoint.save_interval, iteration) ||
           at_interval(deck->run.exit_interval, iteration) ||
           iteration >= deck->derived.train_iterations;
}

/* The iteration that was updated last: its numbers are waited for, counted, written and printed. */
static void settle(struct train *t)
{
    int64_t gbs = t->deck->batch.global_batch_size;
    struct trace_row row;

    if (!t->pending)
        return;
    check_step((long)t->state.iteration + 1);
    struct step_result r = step_finish(&t->step, &row);
    t->pending = false;
    t->state.iteration++;
    t->state.consumed_train_samples += gbs;
    if (r.applied)
        t->state.lr.n += gbs;
    row.consumed_samples = t->state.consumed_train_samples;
    timer_start(TIMER_LOG);
    trace_write(t->trace, t->state.iteration - 1 - t->run->first_iteration, &row);
    timer_stop(TIMER_LOG);
    t->seconds += row.iteration_seconds;
    t->flops += 1e12 * row.tflops_per_gpu * row.iteration_seconds * t->topo->language.size;
    t->advanced += r.applied;
    t->skipped += !r.applied;
    t->nan += !r.finite;
    /* A loss that is not finite is never left out of the mean, applied or not. */
    if (r.applied || !r.finite) {
        t->loss_sum += row.lm_loss;
        t->balance_sum += row.seq_load_balancing_loss;
    }
    report_iteration(t, &row);
}

void train_iterate(struct train *t)
{
    const int64_t next = t->state.iteration + t->pending;
    bool request[STEP_REQUESTS];

    check_step((long)next + 1);
    if (to_skip(t->deck, next + 1)) {
        settle(t);
        skip_iteration(t);
        return;
    }
    t->step.dump = next < t->deck->log.dump_batches ? t->dump : NULL;
    step_begin(&t->step, &t->data, next, request);
    /* learning rate and AdamW's step depend on whether it was applied */
    settle(t);
    check_step((long)next + 1);
    step_update(&t->step, lr_at(&t->state.lr, (double)t->state.lr.n),
                lr_weight_decay_at(&t->state.lr, (double)t->state.lr.n));
    t->pending = true;
    if (!settles_at_once(t, next + 1, request))
        return;
    settle(t);
    if (t->step.dump)
        batch_dump_write(t->step.dump, t->state.iteration);
    if (eval_due(&t->eval, t->state.iteration))
        validate(t, "");
    if (!t->stop)
        save_and_decide(t, request);
}

/* How many samples were skipped because they are broken. Each lane of the language grid reads its
 * streams with several ranks, which find the same: one of them counts. */
static void report_broken_samples(const struct train *t)
{
    const struct grid *g = &t->topo->language;
    const bool counts = g->member && g->tp_rank == 0 && g->cp_rank == 0 && g->pp_rank == 0;
    int64_t broken[2] = { counts ? t->data.bad_samples : 0, counts ? t->eval.data.bad_samples : 0 };

    comm_host_reduce_i64(t->topo->world, broken, 2, COMM_SUM);
    if (broken[0] + broken[1] > 0)
        log_line("broken samples skipped since this start: %lld of the training data, %lld of the "
                 "validation data; each is named in a warning of the rank that met it",
                 (long long)broken[0], (long long)broken[1]);
}

int train_end(struct train *t)
{
    check_step(-1);
    if (t->has_data && !t->stop && t->state.iteration > 0)
        save(t);
    if (t->has_data && !t->stop)
        validate(t, " on validation set");
    report_broken_samples(t);
    if (t->deck->data.packing_buffer_size > 0 && t->step.positions > 0.0)
        log_line("packing: %.1f %% of the positions held tokens, the rest is padding",
                 100.0 * t->step.real_tokens / t->step.positions);
    timer_catch_up();
    report_timers(t, 0);
    report_memory(t);
    if (!t->stop) {
        t->why = t->has_data ? "all iterations done" : "evaluation done";
        return EXIT_OK;
    }
    log_line("%s at iteration %lld%s", t->why, (long long)t->state.iteration,
             !t->has_data                ? "; submit again to begin the evaluation anew"
             : *t->deck->checkpoint.save ? ", saved; submit again to go on"
                                         : "; nothing is saved, checkpoint.save is not set");
    return EXIT_STOPPED;
}

void train_close(struct train *t)
{
    if (t->dump)
        batch_dump_close(t->dump);
    if (t->trace)
        trace_close(t->trace);
    tensorboard_close(t->board);
    t->dump = NULL;
    t->trace = NULL;
    t->board = NULL;
}

void train_free(struct train *t)
{
    train_close(t);
    if (t->be) {
        timer_leave_device();
        step_free(&t->step);
        model_free(&t->model);
        arenas_free(&t->arenas, t->be);
        t->be->stream_destroy(&t->stream);
    }
    eval_free(&t->eval);
    data_free(&t->data);
    memset(t, 0, sizeof *t);
}
