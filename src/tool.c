/* tool.c - see tool.h. */
#include "tool.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "code.h"
#include "data.h"
#include "deck.h"
#include "doctor.h"
#include "hf_config.h"
#include "io_hdf5.h"
#include "manual.h"
#include "io_hf.h"
#include "run.h"

enum { RANKS_TRIED = 4096 };

bool tool_is_local(const struct cli *cli)
{
    return cli->action != CLI_RUN && cli->action != CLI_CHECK;
}

/* Data depend neither on the layout nor on the backend, so any number of ranks that the deck
 * accepts will do, and what is not built yet is passed over. Reported is what the number of ranks
 * with the fewest mistakes leaves. */
static bool resolve(struct deck *deck, const struct cli *cli, const char *text, size_t length,
                    struct errors *errors)
{
    for (int size = 1; size <= RANKS_TRIED; size++) {
        struct errors tried = { 0 };
        deck_read(deck, cli_deck_name(cli), text, length, cli->n_overrides, cli->overrides, &tried);
        bool readable = tried.count == 0;
        deck_resolve(deck, size, &tried);
        if (readable && deck->derived.complete) {
            errors_free(&tried);
            return true;
        }
        if (size == 1 || tried.count < errors->count) {
            errors_free(errors);
            *errors = tried;
        } else {
            errors_free(&tried);
        }
        deck_free(deck);
        if (!readable)
            break;
    }
    return false;
}

static int with_deck(const struct cli *cli)
{
    struct errors errors = { 0 };
    struct deck deck;
    size_t length = 0;
    char *text = cli_read_deck_text(cli, &length, &errors), *directory;
    int status = EXIT_OK;

    if (text && resolve(&deck, cli, text, length, &errors)) {
        if (cli->action == CLI_CHECK_DATA) {
            status = data_check(&deck, stdout);
        } else {
            directory = xasprintf("sample_%ld", cli->sample);
            status = data_show_sample(&deck, cli->sample, directory, stdout);
            free(directory);
        }
        deck_free(&deck);
        errors_free(&errors);
    } else {
        errors_print(&errors);
        status = errors.worst;
        errors_free(&errors);
    }
    free(text);
    return status;
}

/* Hugging Face directories: write one, or print the deck of one. */
static int with_directory(const struct cli *cli)
{
    const struct export_options options = { .dtype = cli->dtype, .shard_bytes = cli->shard_bytes };
    struct errors errors = { 0 };

    if (cli->action == CLI_EXPORT)
        export_checkpoint(cli->directory, cli->path, &options, stdout, &errors);
    else
        hf_config_print_deck(cli->path, stdout, &errors);
    int status = errors.count > 0 ? (int)errors.worst : EXIT_OK;
    errors_print(&errors);
    errors_free(&errors);
    return status;
}

int tool_run(struct cli *cli)
{
    int status = EXIT_OK;

    switch (cli->action) {
    case CLI_REFERENCE: deck_print_reference(stdout); break;
    case CLI_INSPECT: status = io_inspect(cli->path, stdout); break;
    case CLI_CHECK_DATA:
    case CLI_SHOW_SAMPLE: status = with_deck(cli); break;
    case CLI_EXPORT:
    case CLI_DECK_FROM_HF: status = with_directory(cli); break;
    case CLI_DOCTOR: doctor_print(stdout); break;
    case CLI_STATUS: status = run_status(cli->path, stdout); break;
    case CLI_FEATURES: code_print_features(stdout); break;
    case CLI_MAN: manual_print(stdout); break;
    case CLI_VERSION: printf("mimo %s (git %s)\n", code_version(), code_git()); break;
    case CLI_HELP: cli_print_help(stdout); break;
    default: FATAL(EXIT_INTERNAL, "option %d has no tool", (int)cli->action);
    }
    if (fflush(stdout) != 0 || ferror(stdout)) {
        fprintf(stderr, "mimo: error: standard output: %s\n", strerror(errno));
        status = EXIT_WRITE;
    }
    cli_free(cli);
    return status;
}
