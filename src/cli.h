/* cli.h - the command line: what to do, with which deck, which overrides; and the deck's text from
 * a file or standard input.
 *
 * cli_parse looks at nothing but its arguments. The deck is the one argument that is no option and
 * no group.key=value; without it the deck comes from standard input, which only world rank 0 may
 * touch.
 */
#ifndef MIMO_CLI_H
#define MIMO_CLI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include "check.h"

enum cli_action {
    CLI_RUN,
    CLI_CHECK,
    CLI_PLAN,
    CLI_REFERENCE,
    CLI_INSPECT,
    CLI_CHECK_DATA,
    CLI_SHOW_SAMPLE,
    CLI_EXPORT,
    CLI_DECK_FROM_HF,
    CLI_DOCTOR,
    CLI_STATUS,
    CLI_FEATURES,
    CLI_MAN,
    CLI_VERSION,
    CLI_HELP
};

struct cli {
    enum cli_action action;
    const char *deck; /* path, NULL = standard input */
    int ranks;        /* --ranks, 0 = as many as are present */
    long sample;      /* --show-sample */
    /* --inspect FILE, --status DIR, --export FILE, --deck-from-hf DIR */
    const char *path;
    const char *directory; /* --export DIR */
    /* --dtype bf16, fp32 or fp64, with --export; NULL = that of the run */
    const char *dtype;
    int64_t shard_bytes; /* --shard-bytes, with --export; 0 = as it sees fit */
    int n_overrides;
    char **overrides; /* [n_overrides] point into argv; the array is owned */
};

/* Fill cli from the arguments; mistakes and options of features that do not exist yet are
 * collected. Local. */
void cli_parse(struct cli *cli, int argc, char *const *argv, struct errors *errors);
/* Whether the action reads a deck. Local. */
bool cli_needs_deck(const struct cli *cli);
/* The deck's name for messages: its path or "<stdin>". Local. */
const char *cli_deck_name(const struct cli *cli);
/* The deck's bytes, owned by the caller, NULL with an error added when there is none; call on world
 * rank 0 only. Local. */
char *cli_read_deck_text(const struct cli *cli, size_t *length, struct errors *errors);
/* Usage with every option. Local. */
void cli_print_help(FILE *out);
/* Each option of the command line in the order of the help: `values` follow it, `deck`: a deck
 * follows too, `missing`: the feature that is not built, or NULL. Local. */
typedef void cli_visit_option(void *ctx, const char *name, const char *values, const char *help,
                              bool deck, const char *missing);
void cli_visit_options(cli_visit_option *visit, void *ctx);
void cli_free(struct cli *cli);

#endif
