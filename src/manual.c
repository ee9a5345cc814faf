/* manual.c - see manual.h. Options come from cli.c, keys from deck_params.def; only what no table
 * holds is written here. */
#include "manual.h"
#include <stdlib.h>
#include <string.h>
#include "cli.h"
#include "code.h"
#include "deck_table.h"

/* Text that roff prints as it is. */
static void put(FILE *out, const char *text)
{
    if (*text == '.' || *text == '\'')
        fputs("\\&", out);
    for (; *text; text++) {
        if (*text == '\\')
            fputs("\\e", out);
        else if (*text == '-')
            fputs("\\-", out);
        else
            fputc(*text, out);
    }
}

static void put_option(void *ctx, const char *name, const char *values, const char *help, bool deck,
                       const char *missing)
{
    FILE *out = ctx;

    fputs(".TP\n\\fB", out);
    put(out, name);
    fputs("\\fR", out);
    if (*values)
        fprintf(out, " \\fI%s\\fR", values);
    if (deck)
        fputs(" \\fIDECK\\fR", out);
    fputc('\n', out);
    put(out, help);
    fprintf(out, "%s.\n", missing ? " (not built yet)" : "");
}

static void put_key(FILE *out, int row)
{
    const struct deck_param *p = &deck_table[row];
    char *range = deck_table_range(row);

    fputs(".TP\n\\fB", out);
    put(out, p->key);
    fprintf(out, "\\fR (%s%s", deck_table_type(row), *range ? ", " : "");
    put(out, range);
    if (p->unit && *p->unit)
        fprintf(out, ", %s", p->unit);
    fputs(")\n", out);
    put(out, p->help);
    if (p->only) {
        fputs(". Until there is ", out);
        put(out, p->feature);
        fputs(": ", out);
        put(out, p->only);
    }
    fputs(".\n", out);
    free(range);
}

void manual_print(FILE *out)
{
    fprintf(out, ".TH MIMO 1 \"\" \"mimo %s\" \"\"\n", code_version());
    fputs(
        ".SH NAME\nmimo \\- train a vision\\-language model on two grids of ranks\n"
        ".SH SYNOPSIS\n.B mimo\n[\\fIOPTIONS\\fR] [\\fIDECK\\fR] [\\fIgroup.key\\fR=\\fIvalue\\fR ...]\n.br\n"
        ".B mpiexec \\-n 8 mimo\n< \\fIDECK\\fR\n"
        ".SH DESCRIPTION\nTrains a vision\\-language model as the deck, a Fortran namelist, says.\nWithout \\fIDECK\\fR the deck is standard "
        "input.\n\\fIgroup.key\\fR=\\fIvalue\\fR overrides a key of the deck; a string needs no quotes.\n"
        "SIGTERM, SIGUSR1 or a file STOP in the output directory save and stop the run; the same command goes on.\n"
        ".SH OPTIONS\n",
        out);
    cli_visit_options(put_option, out);
    fputs(".SH DECK\nEvery key with its type, range and unit.\n"
          "\\fBmimo \\-\\-reference\\fR prints the same as a deck with the defaults.\n",
          out);
    for (int row = 0; row < DECK_ROWS; row++) {
        if (row == 0 || strcmp(deck_table[row].group, deck_table[row - 1].group) != 0) {
            fputs(".SS &", out);
            put(out, deck_table[row].group);
            fputc('\n', out);
        }
        put_key(out, row);
    }
    fputs(
        ".SH FILES\nIn the output directory: deck.nml, run.log, progress.txt, trace.h5, EXIT, LOCK while live.\n"
        ".SH EXIT STATUS\n0 done; 75 stopped as planned, submit again; 1 internal error; 2 deck or command line; 3 environment; 4 data;\n"
        "5 checkpoint; 6 writing failed; 7 numerics; 8 a rank died.\n"
        "Launchers change it: \\fBmimo \\-\\-status\\fR \\fIDIR\\fR tells the truth.\n",
        out);
}
