/* ranks: 1 2 4 */
/* mpi_train.c - the training loop settles an iteration late on an asynchronous backend: the same
 * numbers and the same files.
 *
 * Every case runs through the whole of train.h, at once and late, in this process; the reference
 * backend does not care when it is asked. Compared are the trace's rows, the counters and all
 * parameters, masters and moments at the end, and the bytes of saved tensors.
 */
#include "io_fixture.h"
#include "log.h"
#include "timer.h"
#include "train.h"

/* What a run leaves. */
struct outcome {
    int64_t rows, iteration, consumed, skipped_samples, lr_n, optim_step, saved;
    int status;
    double *trace; /* [FIELDS, rows] */
    int64_t numbers;
    double *state; /* [numbers] */
    /* most iterations that were updated and not settled after a pass */
    int most_behind;
};

static const char *const fields[] = {
    "/iteration",     "/consumed_samples", "/lm_loss",     "/grad_norm",
    "/learning_rate", "/weight_decay",     "/num_tokens",  "/seq_load_balancing_loss",
    "/skipped",       "/num_zeros",        "/params_norm", "/images",
    "/patches"
};
enum { FIELDS = sizeof fields / sizeof fields[0] };

struct request {
    int kind, at, polls;
};

/* Asks on the last rank, in the at-th iteration. */
static void ask(void *ctx, bool *request)
{
    struct request *r = ctx;
    for (int i = 0; i < STEP_REQUESTS; i++)
        request[i] = false;
    request[r->kind] = ++r->polls == r->at && world->rank == world->size - 1;
}

static void read_trace(struct outcome *o, const char *path)
{
    hid_t file = io_open(path, false);
    ASSERT(file >= 0 && io_get(file, "/rows", H5T_NATIVE_INT64, 1, &o->rows));
    o->trace = xcalloc((size_t)(FIELDS * o->rows) + 1, sizeof *o->trace);
    for (int i = 0; i < FIELDS && o->rows > 0; i++) {
        hid_t set = H5Dopen2(file, fields[i], H5P_DEFAULT);
        ASSERT(set >= 0 && io_get_box(set, H5T_NATIVE_DOUBLE, 1, (int64_t[1]){ 0 }, &o->rows,
                                      o->trace + i * o->rows));
        H5Dclose(set);
    }
    H5Fclose(file);
}

static void keep_state(struct outcome *o, struct train *t)
{
    for (int pass = 0; pass < 2; pass++) {
        int64_t n = 0;
        for (int i = 0; i < t->model.n_params; i++)
            for (int part = 0; part < 4; part++) {
                const struct tensor *x = part_of(&t->model.param[i], part);
                for (int64_t k = 0; x->data && k < tensor_numel(x); k++, n++)
                    if (pass)
                        o->state[n] = get(x, k);
            }
        if (!pass)
            o->state = xcalloc((size_t)n + 1, sizeof *o->state);
        o->numbers = n;
    }
}

static struct outcome go(const char *name, bool late, const char *const *overrides,
                         struct request request)
{
    static const char text[] =
        "&run backend = 'ref' train_iters = 7 seed = 5 /\n&language preset = 'tiny' /\n&batch global_batch_size = 4 /\n"
        "&lr lr = 1e-3 lr_decay_style = 'linear' lr_decay_iters = 9 /\n&log log_num_zeros_in_grad = T log_params_norm = T log_interval = 3 /\n";
    struct outcome o = { .status = -1 };
    struct errors e = { 0 };
    struct topology topo;
    struct train_start start;
    struct train t;
    struct deck deck;
    struct run run;
    char *given[8], dir[IO_PATH], path[IO_PATH + 16];
    int n = 0;

    snprintf(dir, sizeof dir, "%.3000s/%.200s_%s", scratch, name, late ? "late" : "at_once");
    snprintf(path, sizeof path, "run.output_dir=%.3900s", dir);
    given[n++] = xstrdup(path);
    snprintf(path, sizeof path, "checkpoint.save=%.3900s/ckpt", dir);
    given[n++] = xstrdup(path);
    for (; *overrides; overrides++)
        given[n++] = xstrdup(*overrides);
    deck_read(&deck, "test", text, strlen(text), n, given, &e);
    deck_resolve(&deck, world->size, &e);
    if (e.count == 0)
        topology_init(&topo, &deck, world->size, world->rank, &e);
    errors_print(&e);
    ASSERT(e.count == 0);
    run_init(&run, &deck, world, &e);
    topology_connect(&topo, world);
    topology_attach(&topo, comm_select(&deck));
    train_find_start(&start, &run, &deck, &topo, &e);
    run_begin(&run, start.iteration, false);
    train_init(&t, &deck, &topo, NULL, &run, &e);
    ASSERT(!t.late);
    t.late = late;
    if (request.at > 0)
        t.step.poll = (struct step_poll){ .poll = ask, .ctx = &request };
    train_restore(&t, &start, &e);
    errors_print(&e);
    ASSERT(e.count == 0);
    train_begin(&t);
    while (train_goes_on(&t)) {
        train_iterate(&t);
        if (t.pending && o.most_behind < 1)
            o.most_behind = 1;
    }
    o.status = train_end(&t);
    o.iteration = t.state.iteration;
    o.consumed = t.state.consumed_train_samples;
    o.skipped_samples = t.state.skipped_train_samples;
    o.lr_n = t.state.lr.n;
    o.optim_step = t.optim.step;
    o.saved = t.last_saved;
    keep_state(&o, &t);
    run_finish(&run, o.status, o.iteration, "");
    train_free(&t);
    log_close();
    comm_host_barrier(world);
    snprintf(path, sizeof path, "%.3900s/trace.h5", dir);
    read_trace(&o, path);
    topology_free(&topo);
    deck_free(&deck);
    for (int i = 0; i < n; i++)
        free(given[i]);
    return o;
}

static bool same(const struct outcome *a, const struct outcome *b)
{
    return a->rows == b->rows && a->iteration == b->iteration && a->consumed == b->consumed &&
           a->skipped_samples == b->skipped_samples && a->lr_n == b->lr_n &&
           a->optim_step == b->optim_step && a->saved == b->saved && a->status == b->status &&
           memcmp(a->trace, b->trace, (size_t)(FIELDS * a->rows) * sizeof *a->trace) == 0 &&
           a->numbers == b->numbers &&
           memcmp(a->state, b->state, (size_t)a->numbers * sizeof *a->state) == 0;
}

static double field(const struct outcome *o, const char *name, int64_t row)
{
    for (int i = 0; i < FIELDS; i++)
        if (strcmp(fields[i], name) == 0)
            return o->trace[i * o->rows + row];
    FATAL(EXIT_INTERNAL, "no field %s", name);
}

static void forget(struct outcome *o)
{
    free(o->trace);
    free(o->state);
}

/* The late run equals the other; both are returned in `a`. Each test asks for more of it and frees
 * it. */
static struct outcome both(const char *name, const char *const *overrides, struct request request)
{
    struct outcome a = go(name, false, overrides, request), b = go(name, true, overrides, request);
    agree(same(&a, &b) && a.most_behind == 0 && b.most_behind == 1);
    forget(&b);
    return a;
}

static void late_equals_at_once(void **state)
{
    struct outcome o = both("plain", (const char *const[]){ NULL }, (struct request){ 0 });
    agree(o.rows == 7 && o.iteration == 7 && o.optim_step == 7 && o.saved == 7 &&
          o.status == EXIT_OK && o.lr_n == 28);
    forget(&o);
}

static void saving_and_validating_between_late_iterations(void **state)
{
    struct outcome o =
        both("saves",
             (const char *const[]){ "checkpoint.save_interval=4", "eval.eval_iters=1",
                                    "eval.eval_interval=3", NULL },
             (struct request){ 0 });
    char path[IO_PATH + 64];
    struct stat st;
    snprintf(path, sizeof path, "%.3000s/saves_late/ckpt/iter_0000004/checkpoint.h5", scratch);
    agree(o.rows == 7 && o.saved == 7 && stat(path, &st) == 0);
    forget(&o);
}

/* The learning rate and AdamW's step of an iteration follow from whether the one before it was
 * applied. */
static void skipped_updates_are_known_in_time(void **state)
{
    struct outcome plain = both("norms", (const char *const[]){ NULL }, (struct request){ 0 });
    double least = INFINITY, most = 0;
    char threshold[64];
    for (int64_t i = 0; i < plain.rows; i++) {
        least = fmin(least, field(&plain, "/grad_norm", i));
        most = fmax(most, field(&plain, "/grad_norm", i));
    }
    snprintf(threshold, sizeof threshold, "optimizer.grad_norm_skip_threshold=%.6f",
             0.5 * (least + most));
    struct outcome o =
        both("skips", (const char *const[]){ threshold, NULL }, (struct request){ 0 });
    double skipped = 0;
    bool held = true;
    for (int64_t i = 0; i < o.rows; i++) {
        skipped += field(&o, "/skipped", i);
        if (i > 0 && field(&o, "/skipped", i - 1) > 0)
            held = held && field(&o, "/learning_rate", i) == field(&o, "/learning_rate", i - 1);
    }
    agree(o.rows == 7 && skipped > 0 && skipped <= 7 && held &&
          o.optim_step == 7 - (int64_t)skipped && o.lr_n == 4 * o.optim_step);
    forget(&plain);
    forget(&o);
}

static void a_loss_that_is_not_finite_skips_its_own_update(void **state)
{
    struct outcome o = both("nan",
                            (const char *const[]){ "lr.lr=1e3", "language.init_method_std=1e3",
                                                   "optimizer.non_finite_policy='skip'",
                                                   "optimizer.clip_grad=0", NULL },
                            (struct request){ 0 });
    double skipped = 0;
    bool marked = true;
    for (int64_t i = 0; i < o.rows; i++) {
        skipped += field(&o, "/skipped", i);
        marked = marked && (field(&o, "/skipped", i) == 1) == !isfinite(field(&o, "/grad_norm", i));
    }
    agree(o.rows == 7 && skipped > 0 && marked && o.optim_step == 7 - (int64_t)skipped &&
          o.consumed == 28);
    forget(&o);
}

static void left_out_iterations_come_in_their_place(void **state)
{
    struct outcome o =
        both("left_out", (const char *const[]){ "batch.iterations_to_skip=3,7", NULL },
             (struct request){ 0 });
    agree(o.rows == 7 && o.skipped_samples == 8 && o.optim_step == 5 &&
          isnan(field(&o, "/lm_loss", 2)) && !isnan(field(&o, "/lm_loss", 3)));
    forget(&o);
}

static void a_request_ends_the_iteration_that_heard_it(void **state)
{
    static const int kind[] = { STEP_STOP_SIGNAL, STEP_STOP_FILE, STEP_STOP_TIME };
    for (int i = 0; i < 3; i++) {
        char name[32];
        snprintf(name, sizeof name, "stop%d", i);
        struct outcome o =
            both(name, (const char *const[]){ NULL }, (struct request){ .kind = kind[i], .at = 3 });
        agree(o.rows == 3 && o.iteration == 3 && o.saved == 3 && o.status == EXIT_STOPPED);
        forget(&o);
    }
    struct outcome o = both("interval", (const char *const[]){ "run.exit_interval=5", NULL },
                            (struct request){ 0 });
    agree(o.rows == 5 && o.saved == 5 && o.status == EXIT_STOPPED);
    forget(&o);
}

int main(int argc, char **argv)
{
    if (!fixture_start(&argc, &argv))
        return EXIT_ENVIRONMENT;
    timer_reset();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(late_equals_at_once),
        cmocka_unit_test(saving_and_validating_between_late_iterations),
        cmocka_unit_test(skipped_updates_are_known_in_time),
        cmocka_unit_test(a_loss_that_is_not_finite_skips_its_own_update),
        cmocka_unit_test(left_out_iterations_come_in_their_place),
        cmocka_unit_test(a_request_ends_the_iteration_that_heard_it),
    };
    return fixture_finish(cmocka_run_group_tests(tests, NULL, NULL));
}
