/* main.c - prolog, loop, epilog. Every rank takes the same way through main and leaves with the
 * same status. */
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include "backend.h"
#include "cli.h"
#include "code.h"
#include "device.h"
#include "header.h"
#include "io_hdf5.h"
#include "log.h"
#include "plan.h"
#include "run.h"
#include "timer.h"
#include "tool.h"
#include "train.h"

/* A closed standard descriptor would be given to the next file that is opened, and be read as the
 * deck or written as the log. */
static void open_standard_streams(void)
{
    for (int fd = 0; fd <= 2; fd++)
        if (fcntl(fd, F_GETFD) == -1 && open("/dev/null", O_RDWR) != fd)
            return;
}

/* Rank 0 reads the deck's text; every rank gets the same bytes and parses them. NULL: there is
 * none, said in errors. */
static char *share_deck_text(const struct cli *cli, struct comm *world, size_t *length,
                             struct errors *errors)
{
    char *text = world->rank == 0 ? cli_read_deck_text(cli, length, errors) : NULL;
    int64_t bytes = text ? (int64_t)*length : -1;

    comm_host_broadcast(world, &bytes, sizeof bytes, 0);
    *length = bytes > 0 ? (size_t)bytes : 0;
    if (bytes < 0)
        return NULL;
    if (!text)
        text = xcalloc(*length + 1, 1);
    comm_host_broadcast(world, text, *length, 0);
    return text;
}

/* One BLAS thread where ranks share the cores, unless the user has said otherwise. */
static int set_blas_threads(struct comm *world)
{
    int node_size, node_rank, n_nodes, threads;
    const char *given = getenv("OPENBLAS_NUM_THREADS");
    long asked = given ? strtol(given, NULL, 10) : 0;

    comm_node(world, &node_size, &node_rank, &n_nodes);
    threads = asked > 0 && asked < 1024 ? (int)asked : header_cores() / node_size;
    if (threads < 1)
        threads = 1;
    backend_blas_threads(threads);
    return threads;
}

/* Print what was collected on all ranks; returns the status they agree on, EXIT_OK when there is
 * nothing. */
static int agree(struct comm *world, struct errors *errors)
{
    if (comm_host_collect_errors(world, errors) == 0)
        return EXIT_OK;
    if (world->rank == 0)
        errors_print(errors);
    return errors->worst;
}

static int check_deck(struct deck *deck, int size, struct comm *world, struct errors *errors)
{
    FILE *out = world->rank == 0 ? stdout : NULL;

    if (out) {
        plan_print(deck, size, out, errors);
        CHECK_SYS(fflush(out) == 0 && !ferror(out), EXIT_WRITE, "standard output");
    }
    return agree(world, errors);
}

/* From a good deck to the end of the run. */
static int run_deck(const struct deck *deck, struct topology *topo, struct comm *world,
                    const char *text, size_t length)
{
    struct errors errors = { 0 };
    struct train_start start = { 0 };
    struct device device = { 0 };
    struct train train;
    struct run run;
    int status;

    /* 5. the directory belongs to this run from here on */
    run_init(&run, deck, world, &errors);
    if ((status = agree(world, &errors)) == EXIT_OK) {
        check_identify(world->rank, world->size, topology_role(topo), deck->run.output_dir);
        /* 6. groups, start, header */
        topology_connect(topo, world);
        device_take(&device, deck, world, &errors);
        train_find_start(&start, &run, deck, topo, &errors);
        run_check_progress(&run, start.iteration, start.own && deck->run.mode == DECK_MODE_TRAIN,
                           &errors);
        status = agree(world, &errors);
        if (status == EXIT_OK)
            topology_attach(topo, comm_select(deck));
    }
    if (status == EXIT_OK) {
        run_begin(&run, start.iteration, start.own && deck->run.mode == DECK_MODE_TRAIN);
        header_print(deck, topo, text, length, set_blas_threads(world), start.text);
        device_print(&device, world->size);
        /* 7. data, model, memory, checkpoint */
        train_init(&train, deck, topo, device.sharers, &run, &errors);
        if ((status = agree(world, &errors)) == EXIT_OK) {
            train_restore(&train, &start, &errors);
            status = agree(world, &errors);
        }
        /* 8. the loop */
        if (status == EXIT_OK) {
            timer_stop(TIMER_START);
            train_begin(&train);
            while (train_goes_on(&train))
                train_iterate(&train);
            status = train_end(&train);
        }
        /* 9. end: files closed, then the EXIT line */
        train_close(&train);
        const char *why = status == EXIT_OK || status == EXIT_STOPPED ? train.why
                          : errors.count > 0                          ? errors.line[0]
                                                                      : "";
        run_finish(&run, status, train.state.iteration, why);
        train_free(&train);
        log_close();
    } else {
        run_finish(&run, status, -1, errors.count > 0 ? errors.line[0] : "");
    }
    device_free(&device);
    errors_free(&errors);
    return status;
}

int main(int argc, char **argv)
{
    struct errors errors = { 0 };
    struct topology topo = { 0 };
    struct deck deck = { 0 };
    struct comm *world;
    struct cli cli;
    char why[512], *text = NULL;
    size_t length = 0;
    int status;

    /* 1. command line; what needs one process and no launcher is done at once */
    open_standard_streams();
    /* a file-size limit is an error of the write, MPI's own files included */
    signal(SIGXFSZ, SIG_IGN);
    backend_blas_start(argv);
    cli_parse(&cli, argc, argv, &errors);
    if (errors.count == 0 && tool_is_local(&cli))
        return tool_run(&cli);
    /* 2. MPI */
    if (!comm_start(&argc, &argv, &world, why, sizeof why)) {
        fprintf(stderr, "mimo: error: %s\n", why);
        return EXIT_ENVIRONMENT;
    }
    check_on_abort(comm_abort);
    check_catch_crashes();
    check_identify(world->rank, world->size, "", NULL);
    log_open(NULL, world->rank == 0);
    timer_reset();
    timer_start(TIMER_START);
    status = agree(world, &errors);
    /* 3. deck */
    int size = cli.ranks > 0 ? cli.ranks : world->size;
    if (status == EXIT_OK) {
        if (cli.action == CLI_RUN)
            log_line("mimo %s (git %s) on %d rank%s", code_version(), code_git(), size,
                     size == 1 ? "" : "s");
        text = share_deck_text(&cli, world, &length, &errors);
        if (text) {
            deck_read(&deck, cli_deck_name(&cli), text, length, cli.n_overrides, cli.overrides,
                      &errors);
            deck_resolve(&deck, size, &errors);
            if (cli.action == CLI_RUN)
                deck_need_backend(&deck, &errors);
        }
        if (text && cli.action == CLI_CHECK) {
            status = check_deck(&deck, size, world, &errors);
        } else {
            /* 4. topology */
            if (errors.count == 0)
                topology_init(&topo, &deck, size, world->rank, &errors);
            status = agree(world, &errors);
            if (status == EXIT_OK)
                status = run_deck(&deck, &topo, world, text, length);
            else if (text && world->rank == 0 && deck.run.output_dir)
                run_refuse(deck.run.output_dir, status, errors.line[0]);
            topology_free(&topo);
        }
    }
    /* 10. leave together */
    if (text)
        deck_free(&deck);
    free(text);
    cli_free(&cli);
    errors_free(&errors);
    comm_finish(world);
    return status;
}
