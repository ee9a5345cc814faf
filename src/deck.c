/* deck.c - the deck as a struct: reading, the echo, the reference deck, and where each value came
 * from.
 *
 * The table (deck_params.def, deck_table.c) is the only list of keys. Reading is deck_text.c
 * (grammar) and deck_value.c (types and ranges); presets are deck_presets.c; derived values and
 * conditions between keys are deck_rules.c. The echo is complete and can be read again: run(echo)
 * equals run(deck). Two values are written as comments or marks, because the grammar or the meaning
 * of "given" asks for it: an empty list, and an image token id that gives way to the tokenizer.
 */
#include "deck_table.h"

#include <stdlib.h>
#include <string.h>

void deck_read(struct deck *deck, const char *file, const char *text, size_t length,
               int n_overrides, char *const *overrides, struct errors *errors)
{
    memset(deck, 0, sizeof *deck);
    deck->file = xstrdup(file);
    deck->source = xcalloc(DECK_ROWS, sizeof *deck->source);
    for (int row = 0; row < DECK_ROWS; row++)
        deck_table_default(deck, row);
    deck_text_parse(deck, text, length, errors);
    for (int row = 0; row < DECK_ROWS; row++) {
        const struct deck_param *p = &deck_table[row];
        struct deck_source *source = &deck->source[row];
        if (source->bad || source->elements == 0)
            continue;
        int n =
            p->type == DECK_TYPE_INTEGERS ? deck_ints(deck, row)->n : deck_strings(deck, row)->n;
        for (int i = 0; i < n; i++)
            if (!(source->elements >> i & 1)) {
                errors_add(errors, EXIT_DECK, "%s: error: %s.%s(%d) is missing, (%d) is given",
                           source->where, p->group, p->key, i + 1, n);
                source->bad = true;
                break;
            }
    }
    for (int i = 0; i < n_overrides; i++)
        deck_override(deck, overrides[i], errors);
}

void deck_resolve(struct deck *deck, int size, struct errors *errors)
{
    deck_rules_resolve(deck, size, errors);
}

bool deck_given(const struct deck *deck, const char *group, const char *key)
{
    int row = deck_table_find(group, key);
    ASSERT(row >= 0);
    return deck->source[row].origin >= DECK_FROM_DECK;
}

bool deck_recomputes(const struct deck *deck, const char *module)
{
    const struct deck_strings *words = &deck->language.recompute_modules;
    const bool selective = deck->language.recompute_granularity == DECK_RECOMPUTE_SELECTIVE;
    for (int i = 0; selective && i < words->n; i++)
        if (strcmp(words->v[i], module) == 0)
            return true;
    return false;
}

const char *deck_where(const struct deck *deck, const char *group, const char *key)
{
    int row = deck_table_find(group, key);
    ASSERT(row >= 0);
    return deck->source[row].origin >= DECK_FROM_DECK ? deck->source[row].where : deck->file;
}

/* The value as the echo writes it. A preset's image token id gives way to the tokenizer's, so with
 * a tokenizer it must not come back as given: -1 leaves it to preset and tokenizer again. */
static char *echo_value(const struct deck *deck, int row)
{
    bool gives_way = row == DECK_ROW(data, image_token_id) &&
                     deck->source[row].origin == DECK_FROM_PRESET &&
                     deck->data.dataset_provider == DECK_PROVIDER_WEBDATASET;
    return gives_way ? xstrdup("-1") : deck_table_format(deck, row);
}

void deck_echo(const struct deck *deck, FILE *out)
{
    static const char *const origins[] = { "default", "preset", "derived", "deck", "command line" };
    char *file = xmalloc(4 * strlen(deck->file) + 1, 1);
    fprintf(out,
            "! echo of %s: every value and where it came from; as a deck it gives the same run\n",
            printable(file, 4 * strlen(deck->file) + 1, deck->file));
    free(file);
    for (int row = 0; row < DECK_ROWS; row++) {
        const struct deck_param *p = &deck_table[row];
        if (row == 0 || strcmp(p->group, deck_table[row - 1].group))
            fprintf(out, "%s&%s\n", row ? "/\n\n" : "\n", p->group);
        char *value = echo_value(deck, row);
        char *item =
            *value ? xasprintf("%s = %s", p->key, value) : xasprintf("! %s is empty", p->key);
        fprintf(out, "  %-48s ! %s", item, origins[deck->source[row].origin]);
        if (deck->source[row].origin == DECK_FROM_DECK)
            fprintf(out, ":%d", deck->source[row].line);
        fputc('\n', out);
        free(item);
        free(value);
    }
    fputs("/\n", out);
}

void deck_print_reference(FILE *out)
{
    static const char text[] = "&run /";
    struct deck *plain = xcalloc(1, sizeof *plain), *resolved = xcalloc(1, sizeof *resolved);
    struct errors ignored = { 0 };
    deck_read(plain, "reference", text, sizeof text - 1, 0, NULL, &ignored);
    deck_read(resolved, "reference", text, sizeof text - 1, 0, NULL, &ignored);
    deck_resolve(resolved, 1, &ignored);
    fputs(
        "! Reference deck: every group and key with its default, type, range, unit and meaning (mimo --reference).\n"
        "! A key in a comment is set by preset or stage unless it is given. Names in any letter case; values with commas or\n"
        "! blanks between them: 'text' or \"text\", T or .true., 1.5d-4, 3*0.5; a comment starts with an exclamation mark.\n",
        out);
    for (int row = 0; row < DECK_ROWS; row++) {
        const struct deck_param *p = &deck_table[row];
        if (row == 0 || strcmp(p->group, deck_table[row - 1].group))
            fprintf(out, "%s&%s\n", row ? "/\n\n" : "\n", p->group);
        char *value = deck_table_format(plain, row), *range = deck_table_range(row);
        /* What a preset or the stage sets must not be given by whoever reads this deck, unless the
         * default says "not given". */
        bool hidden = !*value || (p->type != DECK_TYPE_CHOICE && !deck_table_is_unset(plain, row) &&
                                  resolved->source[row].origin != DECK_FROM_DEFAULT);
        bool list = p->type == DECK_TYPE_INTEGERS || p->type == DECK_TYPE_STRINGS;
        fprintf(out, "  %s%s = %s\n      ! %s%s%s, %s%s%s: %s", hidden ? "! " : "", p->key, value,
                list ? "list of " : "", deck_table_type(row), list ? "s" : "", range,
                *p->unit ? " " : "", p->unit, p->help);
        if (p->only)
            fprintf(out, " (only %s until %s exists)", p->only, p->feature);
        fputc('\n', out);
        free(value);
        free(range);
    }
    fputs("/\n", out);
    deck_free(plain);
    deck_free(resolved);
    free(plain);
    free(resolved);
    errors_free(&ignored);
}

void deck_visit(const struct deck *deck,
                void (*visit)(void *ctx, const char *group, const char *key, const char *value,
                              enum deck_origin origin),
                void *ctx)
{
    for (int row = 0; row < DECK_ROWS; row++) {
        char *value = echo_value(deck, row);
        visit(ctx, deck_table[row].group, deck_table[row].key, value, deck->source[row].origin);
        free(value);
    }
}

void deck_free(struct deck *deck)
{
    deck_table_release(deck);
    free(deck->source);
    free(deck->file);
    memset(deck, 0, sizeof *deck);
}
