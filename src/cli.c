/* cli.c - the command line (interface in cli.h); one row per option makes parser, help and
 * suggestions. */
#include "cli.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "deck_table.h"
#include "path_hint.h"

enum { RANKS = -1, DTYPE = -2, SHARD_BYTES = -3, NOTICE_SECONDS = 10 };

static const struct option {
    const char *name;
    /* enum cli_action, or one of the above: goes with another option */
    int action;
    const char *values;  /* what follows, blank-separated */
    bool deck;           /* the action reads a deck */
    const char *missing; /* not built: the feature's name */
    const char *help;
} options[] = {
    { "--check", CLI_CHECK, "", true, NULL,
      "read the deck, print topology, memory table and schedule, do not run" },
    { "--plan", CLI_PLAN, "", true, "prediction of time and memory",
      "--check and predicted time and memory" },
    { "--ranks", RANKS, "N", false, NULL, "with --check or --plan: pretend N ranks" },
    { "--reference", CLI_REFERENCE, "", false, NULL,
      "print every group and key with type, default, range, unit and help" },
    { "--inspect", CLI_INSPECT, "FILE", false, NULL, "print what a checkpoint or trace holds" },
    { "--check-data", CLI_CHECK_DATA, "", true, NULL,
      "read every shard of the deck's data, print samples, sizes, tokens" },
    { "--show-sample", CLI_SHOW_SAMPLE, "N", true, NULL, "write sample N as the model sees it" },
    { "--export", CLI_EXPORT, "DIR FILE", false, NULL,
      "write checkpoint FILE as a Hugging Face directory DIR" },
    { "--dtype", DTYPE, "TYPE", false, NULL,
      "with --export: bf16, fp32 or fp64 (an fp64 run's numbers as they are) instead of bf16 or fp32 as the run" },
    { "--shard-bytes", SHARD_BYTES, "N", false, NULL,
      "with --export: bytes of tensors in a file at most (5e9)" },
    { "--deck-from-hf", CLI_DECK_FROM_HF, "DIR", false, NULL,
      "print the deck that fits a Hugging Face directory" },
    { "--doctor", CLI_DOCTOR, "", false, NULL, "tell what this machine and launcher offer" },
    { "--status", CLI_STATUS, "DIR", false, NULL,
      "print how the run in an output directory ended, and exit with that status" },
    { "--features", CLI_FEATURES, "", false, NULL,
      "print name=value lines: version, git, cuda, nccl, cudnn, hdf5, mpi" },
    { "--man", CLI_MAN, "", false, NULL, "print the manual page, for man -l" },
    { "--version", CLI_VERSION, "", false, NULL, "print the version" },
    { "--help", CLI_HELP, "", false, NULL, "print this" },
};
enum { OPTIONS = sizeof options / sizeof options[0] };

struct parser {
    struct cli *cli;
    int argc, at;
    char *const *argv;
    struct errors *errors;
    const struct option *chosen; /* the option that set the action */
    bool deck_given;
};

static void fault(struct parser *p, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void fault(struct parser *p, const char *fmt, ...)
{
    char text[512];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    errors_add(p->errors, EXIT_DECK, "command line: error: %s", text);
}

static const char *name_of(int action)
{
    for (int i = 0; i < OPTIONS; i++)
        if (options[i].action == action)
            return options[i].name;
    return "";
}

/* The next value of an option: after "=" or the next argument. NULL = reported. */
static const char *take_value(struct parser *p, const struct option *o, const char *inline_value,
                              const char *what)
{
    if (inline_value)
        return inline_value;
    if (p->at + 1 < p->argc && strncmp(p->argv[p->at + 1], "--", 2))
        return p->argv[++p->at];
    fault(p, "%s: %s is missing after it", o->name, what);
    return NULL;
}

static long take_number(struct parser *p, const struct option *o, const char *inline_value,
                        long least, long most)
{
    const char *text = take_value(p, o, inline_value, "N");
    if (!text)
        return least;
    char *end;
    errno = 0;
    long n = strtol(text, &end, 10);
    if (errno || end == text || *end || n < least || n > most) {
        fault(p, "%s %.60s: an integer from %ld on is expected", o->name, text, least);
        return least;
    }
    return n;
}

static void unknown_option(struct parser *p, const char *name)
{
    /* fewer letters wrong than half of it */
    int best = (int)strlen(name) / 2, found = -1;
    best = best < 4 ? best : 4;
    for (int i = 0; i < OPTIONS; i++) {
        int d = deck_table_distance(name, options[i].name, best);
        if (d < best)
            best = d, found = i;
    }
    if (found >= 0)
        fault(p, "there is no option %.60s; did you mean %s?", name, options[found].name);
    else
        fault(p, "there is no option %.60s; --help lists them", name);
}

static void parse_option(struct parser *p)
{
    const char *argument = p->argv[p->at], *equals = strchr(argument, '=');
    size_t n = equals ? (size_t)(equals - argument) : strlen(argument);
    const char *inline_value = equals ? equals + 1 : NULL;
    const struct option *o = NULL;
    if (!strcmp(argument, "-h"))
        o = &options[OPTIONS - 1];
    for (int i = 0; i < OPTIONS && !o; i++)
        if (strlen(options[i].name) == n && !strncmp(options[i].name, argument, n))
            o = &options[i];
    if (!o) {
        char *name = xasprintf("%.*s", (int)(n < 200 ? n : 200), argument);
        unknown_option(p, name);
        free(name);
        return;
    }
    if (inline_value && !*o->values)
        fault(p, "%s takes no value", o->name);
    if (o->action == RANKS) {
        if (p->cli->ranks)
            fault(p, "--ranks is given twice");
        p->cli->ranks = (int)take_number(p, o, inline_value, 1, INT_MAX);
        return;
    }
    if (o->action == DTYPE) {
        const char *type = take_value(p, o, inline_value, "TYPE");
        if (type && strcmp(type, "bf16") && strcmp(type, "fp32") && strcmp(type, "fp64"))
            fault(p, "--dtype %.60s: bf16, fp32 or fp64 is expected", type);
        p->cli->dtype = type;
        return;
    }
    if (o->action == SHARD_BYTES) {
        p->cli->shard_bytes = take_number(p, o, inline_value, 1, LONG_MAX);
        return;
    }
    if (p->chosen && p->chosen != o)
        fault(p, "%s and %s exclude each other", p->chosen->name, o->name);
    else if (p->chosen)
        fault(p, "%s is given twice", o->name);
    else
        p->cli->action = o->action;
    p->chosen = o;
    if (o->action == CLI_SHOW_SAMPLE) {
        p->cli->sample = take_number(p, o, inline_value, 0, INT_MAX);
    } else if (o->action == CLI_EXPORT) {
        p->cli->directory = take_value(p, o, inline_value, "DIR");
        if (p->cli->directory)
            p->cli->path = take_value(p, o, NULL, "FILE");
    } else if (*o->values) {
        p->cli->path = take_value(p, o, inline_value, o->values);
    }
    if (o->missing)
        fault(p, "%s: %s is not built yet", o->name, o->missing);
}

/* group.key=value, or something that can only be meant as that: a "=" before any "/". */
static bool is_override(const char *argument)
{
    const char *equals = strchr(argument, '='), *slash = strchr(argument, '/');
    return equals && (!slash || equals < slash);
}

void cli_parse(struct cli *cli, int argc, char *const *argv, struct errors *errors)
{
    *cli = (struct cli){ .overrides = xcalloc((size_t)argc + 1, sizeof(char *)) };
    struct parser p = { .cli = cli, .argc = argc, .argv = argv, .errors = errors };
    bool only_deck = false;
    for (p.at = 1; p.at < argc; p.at++) {
        char *argument = argv[p.at];
        if (!only_deck && !strcmp(argument, "--")) {
            only_deck = true;
        } else if (!only_deck && argument[0] == '-' && argument[1]) {
            parse_option(&p);
        } else if (is_override(argument)) {
            cli->overrides[cli->n_overrides++] = argument;
        } else if (!*argument) {
            fault(&p, "an argument is empty");
        } else if (p.deck_given) {
            fault(&p, "'%.60s': there is already a deck, '%.60s'; an override is group.key=value",
                  argument, cli->deck ? cli->deck : "-");
        } else {
            p.deck_given = true;
            cli->deck = strcmp(argument, "-") ? argument : NULL;
        }
    }
    if (cli->ranks && cli->action != CLI_CHECK && cli->action != CLI_PLAN)
        fault(&p, "--ranks is for --check and --plan; the launcher sets the ranks of a run");
    if ((cli->dtype || cli->shard_bytes) && cli->action != CLI_EXPORT)
        fault(&p, "%s is for --export", cli->dtype ? "--dtype" : "--shard-bytes");
    if (!cli_needs_deck(cli) && (p.deck_given || cli->n_overrides))
        fault(&p, "%s takes no deck and no overrides", name_of((int)cli->action));
}

bool cli_needs_deck(const struct cli *cli)
{
    for (int i = 0; i < OPTIONS; i++)
        if (options[i].action == (int)cli->action)
            return options[i].deck;
    return true;
}

const char *cli_deck_name(const struct cli *cli)
{
    return cli->deck ? cli->deck : "<stdin>";
}

/* Say once what the program waits for, when a pipe stays silent. */
static void notice_silence(int fd)
{
    struct pollfd p = { .fd = fd, .events = POLLIN };
    if (poll(&p, 1, NOTICE_SECONDS * 1000) == 0)
        fprintf(
            stderr,
            "mimo: waiting for the deck on standard input; a deck can also be given as an argument\n");
}

char *cli_read_deck_text(const struct cli *cli, size_t *length, struct errors *errors)
{
    const char *name = cli_deck_name(cli);
    int fd = STDIN_FILENO;
    *length = 0;
    if (cli->deck) {
        /* a FIFO without writer reads as empty */
        fd = open(cli->deck, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
        if (fd < 0) {
            char hint[512];
            const int error = errno;
            errors_add(
                errors, EXIT_DECK, "%s: error: cannot open the deck: %s%s", name, strerror(error),
                error == ENOENT || error == ENOTDIR ? path_hint(name, hint, sizeof hint) : "");
            return NULL;
        }
    } else if (isatty(fd)) {
        errors_add(errors, EXIT_DECK,
                   "%s: error: no deck: call mimo DECK or mimo < DECK (mimo --help)", name);
        return NULL;
    } else {
        notice_silence(fd);
    }
    char *text = xmalloc(DECK_FILE_MAX + 1, 1);
    ssize_t n = 0;
    while (*length <= DECK_FILE_MAX) {
        n = read(fd, text + *length, DECK_FILE_MAX + 1 - *length);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN) {
            struct pollfd wait = { .fd = fd, .events = POLLIN };
            poll(&wait, 1, -1);
            continue;
        }
        if (n <= 0)
            break;
        *length += (size_t)n;
    }
    if (n < 0)
        errors_add(errors, EXIT_DECK, "%s: error: cannot read the deck: %s", name, strerror(errno));
    else if (*length > DECK_FILE_MAX)
        errors_add(errors, EXIT_DECK, "%s: error: the deck is larger than %d bytes", name,
                   DECK_FILE_MAX);
    if (cli->deck)
        close(fd);
    else if (n == 0 && *length == 0) {
        errors_add(
            errors, EXIT_DECK,
            "%s:1:1: error: no deck: standard input is empty; call mimo DECK or mimo < DECK (mimo --help)",
            name);
        n = -1;
    }
    if (n >= 0 && *length <= DECK_FILE_MAX)
        return text;
    free(text);
    return NULL;
}

void cli_print_help(FILE *out)
{
    fputs(
        "usage: mimo [OPTIONS] [DECK] [group.key=value ...]\n"
        "       mpiexec -n 8 mimo < DECK\n\n"
        "Trains a vision-language model as the deck says. Without DECK the deck is standard input. group.key=value\n"
        "overrides a key of the deck; a string needs no quotes.\n\n",
        out);
    for (int i = 0; i < OPTIONS; i++) {
        char head[40];
        snprintf(head, sizeof head, "%s %s", options[i].name, options[i].values);
        fprintf(out, "  %-20s %s%s%s\n", head, options[i].help, options[i].deck ? " (DECK)" : "",
                options[i].missing ? " (not built yet)" : "");
    }
    fputs(
        "\nexit status: 0 done; 75 stopped as planned, submit again; 1 internal error; 2 deck or command line;\n"
        "3 environment; 4 data; 5 checkpoint; 6 writing failed; 7 numerics; 8 a rank died\n",
        out);
}

void cli_visit_options(cli_visit_option *visit, void *ctx)
{
    for (int i = 0; i < OPTIONS; i++)
        visit(ctx, options[i].name, options[i].values, options[i].help, options[i].deck,
              options[i].missing);
}

void cli_free(struct cli *cli)
{
    free(cli->overrides);
    *cli = (struct cli){ 0 };
}
