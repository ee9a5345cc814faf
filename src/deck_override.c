/* deck_override.c - overrides of the command line: group.key=value, the value as in a deck but that
 * strings need no quotes (shells eat them). Messages name no place but "command line".
 */
#include "deck_text.h"

#include <stdlib.h>
#include <string.h>

static const struct deck_place nowhere = { 1, 1 };

/* Row named by the text before "=", -1 = reported. */
static int override_row(struct deck_reader *r, const char *argument, const char *equals)
{
    char name[2 * DECK_NAME_MAX + 2], hint[200], text[DECK_SHOWN];
    size_t n = equals ? (size_t)(equals - argument) : 0;
    while (n && (argument[n - 1] == ' ' || argument[n - 1] == '\t'))
        n--;
    const char *dot = equals ? memchr(argument, '.', n) : NULL;
    deck_text_shown(text, argument, strlen(argument));
    if (!equals || n == 0 || n >= sizeof name) {
        deck_text_fault_item(r, nowhere, "'%s': an override is group.key=value", text);
        return -1;
    }
    memcpy(name, argument, n);
    name[n] = '\0';
    if (!dot) {
        deck_text_fault_item(r, nowhere, "'%s': an override is group.key=value%s", text,
                             deck_table_suggest("", name, hint, sizeof hint));
        return -1;
    }
    name[dot - argument] = '\0';
    const char *key = name + (dot - argument) + 1;
    int row = deck_table_find(name, key);
    if (row >= 0)
        return row;
    if (strchr(key, '('))
        deck_text_fault_item(r, nowhere, "'%s': give the whole list, an element cannot be set here",
                             text);
    else if (deck_table_group(name) < 0)
        deck_text_fault_item(r, nowhere, "'%s': there is no group &%s%s", text, name,
                             deck_table_suggest(name, NULL, hint, sizeof hint));
    else
        deck_text_fault_item(r, nowhere, "'%s': &%s has no key '%s'%s", text, name, key,
                             deck_table_suggest(name, key, hint, sizeof hint));
    return -1;
}

void deck_override(struct deck *deck, const char *argument, struct errors *errors)
{
    struct deck_reader *r = xcalloc(1, sizeof *r);
    *r = (struct deck_reader){
        .deck = deck, .errors = errors, .line = 1, .column = 1, .command_line = true
    };
    struct deck_values *values = xcalloc(1, sizeof *values);
    const char *equals = strchr(argument, '=');
    char *copy = xmalloc(strlen(argument) + 1, 1);
    int row = deck_text_load(r, argument, strlen(argument), copy)
                  ? override_row(r, argument, equals)
                  : -1;
    if (row < 0)
        goto done;
    const struct deck_param *p = &deck_table[row];
    struct deck_source *source = &deck->source[row];
    if (source->origin == DECK_FROM_COMMAND_LINE) {
        deck_text_fault_item(r, nowhere, "%s.%s is given twice", p->group, p->key);
        goto done;
    }
    bool ok;
    if (p->type == DECK_TYPE_STRING || p->type == DECK_TYPE_CHOICE) {
        /* Everything after "=", one pair of outer quotes removed: shells eat quotes, so they are
         * optional. */
        const char *start = equals + 1;
        size_t n = strlen(start);
        bool quoted = n >= 2 && (start[0] == '\'' || start[0] == '"') && start[n - 1] == start[0];
        struct deck_value v = { .token = xstrdup(start + quoted), .quoted = true, .count = 1 };
        if (quoted)
            v.token[n - 2] = '\0';
        values->v[values->n++] = v;
        values->total = 1;
        ok = deck_value_set_scalar(r, row, values);
    } else {
        r->at = (size_t)(equals + 1 - argument);
        char name[2 * DECK_NAME_MAX + 2];
        snprintf(name, sizeof name, "%s.%s", p->group, p->key);
        deck_text_values(r, name, values);
        source->elements = 0;
        ok = !values->faulty && (p->type == DECK_TYPE_INTEGERS || p->type == DECK_TYPE_STRINGS
                                     ? deck_value_set_list(r, row, nowhere, 0, 0, values)
                                     : deck_value_set_scalar(r, row, values));
    }
    source->origin = DECK_FROM_COMMAND_LINE;
    source->where = "command line";
    source->bad = !ok;
done:
    for (int i = 0; i < values->n; i++)
        free(values->v[i].token);
    free(values);
    free(copy);
    free(r);
}
