/* deck_value.c - whether a value suits its key: type, range, words and number of values, all from
 * the table's row.
 *
 * Integers are 64-bit decimal digits and nothing else (3.0 and 1e5 are refused with the integer
 * that they mean); reals may be written as integers, with exponents e or d; NaN, infinities and
 * what overflows or vanishes in 64 bits are refused.
 */
#include "deck_text.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

static bool is_digit(int c)
{
    return c >= '0' && c <= '9';
}

static void refuse(struct deck_reader *r, int row, const struct deck_value *v, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
static void refuse(struct deck_reader *r, int row, const struct deck_value *v, const char *fmt, ...)
{
    char why[512], text[DECK_SHOWN];
    va_list args;
    va_start(args, fmt);
    vsnprintf(why, sizeof why, fmt, args);
    va_end(args);
    const char *quote = v->quoted ? "'" : "";
    deck_text_fault_item(r, v->place, "%s.%s = %s%s%s: %s", deck_table[row].group,
                         deck_table[row].key, quote,
                         deck_text_shown(text, v->token, strlen(v->token)), quote, why);
}

enum number { NUMBER_NONE, NUMBER_INTEGER, NUMBER_REAL };

static enum number number_kind(const char *s)
{
    if (*s == '+' || *s == '-')
        s++;
    const char *digits = s;
    while (is_digit((unsigned char)*s))
        s++;
    size_t n = (size_t)(s - digits);
    if (!*s)
        return n ? NUMBER_INTEGER : NUMBER_NONE;
    if (*s == '.') {
        s++;
        const char *fraction = s;
        while (is_digit((unsigned char)*s))
            s++;
        n += (size_t)(s - fraction);
    }
    if (!n)
        return NUMBER_NONE;
    if (*s && strchr("eEdD", *s)) {
        s++;
        if (*s == '+' || *s == '-')
            s++;
        if (!is_digit((unsigned char)*s))
            return NUMBER_NONE;
        while (is_digit((unsigned char)*s))
            s++;
    }
    return *s ? NUMBER_NONE : NUMBER_REAL;
}

/* Value of a token that number_kind accepts; false = not representable. */
static bool real_value(const char *token, double *x)
{
    char *c_syntax = xstrdup(token);
    bool nonzero = false;
    for (char *q = c_syntax; *q; q++)
        if (*q == 'd' || *q == 'D')
            *q = 'e';
    for (const char *q = c_syntax; *q && *q != 'e' && *q != 'E'; q++)
        nonzero |= *q >= '1' && *q <= '9';
    *x = strtod(c_syntax, NULL);
    free(c_syntax);
    return isfinite(*x) && (*x != 0 || !nonzero);
}

static bool set_integer(struct deck_reader *r, int row, const struct deck_value *v, int64_t *out)
{
    const struct deck_param *p = &deck_table[row];
    if (v->quoted)
        return refuse(r, row, v, "integer expected, not a string"), false;
    enum number kind = number_kind(v->token);
    if (kind != NUMBER_INTEGER) {
        double x;
        if (kind == NUMBER_REAL && real_value(v->token, &x) && x == floor(x) && fabs(x) < 9e18)
            refuse(r, row, v, "integer expected, write %.0f", x);
        else
            refuse(r, row, v, "integer expected%s", strchr(v->token, '_') ? ", digits only" : "");
        return false;
    }
    errno = 0;
    long long x = strtoll(v->token, NULL, 10);
    bool outside = p->integer < p->min || p->integer > p->max;
    if (errno == ERANGE ||
        ((x < p->min || x > p->max) && !(p->type == DECK_TYPE_INTEGER && x == p->integer))) {
        if (p->type == DECK_TYPE_INTEGER && outside)
            refuse(r, row, v, "must be in %" PRId64 "..%" PRId64 ", or %" PRId64, p->min, p->max,
                   p->integer);
        else
            refuse(r, row, v, "must be in %" PRId64 "..%" PRId64, p->min, p->max);
        return false;
    }
    *out = x;
    return true;
}

static bool set_real(struct deck_reader *r, int row, const struct deck_value *v, double *out)
{
    const struct deck_param *p = &deck_table[row];
    if (v->quoted)
        return refuse(r, row, v, "real expected, not a string"), false;
    if (number_kind(v->token) == NUMBER_NONE)
        return refuse(r, row, v, "real expected"), false;
    double x;
    if (!real_value(v->token, &x))
        return refuse(r, row, v, "real expected, this one does not fit 64 bits"), false;
    if ((x < p->real_min || x > p->real_max) && x != p->real) {
        char *range = deck_table_range(row);
        refuse(r, row, v, "must be in %s", range);
        free(range);
        return false;
    }
    *out = x;
    return true;
}

static bool set_logical(struct deck_reader *r, int row, const struct deck_value *v, bool *out)
{
    static const char *const yes[] = { ".true.", ".t.", "true", "t" }, *const no[] = {
        ".false.", ".f.", "false", "f"
    };
    for (int i = 0; i < 4 && !v->quoted; i++) {
        if (!strcasecmp(v->token, yes[i]))
            return *out = true, true;
        if (!strcasecmp(v->token, no[i]))
            return *out = false, true;
    }
    refuse(r, row, v, "logical expected, write T or F");
    return false;
}

static bool need_string(struct deck_reader *r, int row, const struct deck_value *v)
{
    if (v->quoted || r->command_line)
        return true;
    char text[DECK_SHOWN];
    refuse(r, row, v, "string expected, quote it: '%s'",
           deck_text_shown(text, v->token, strlen(v->token)));
    return false;
}

static bool set_string(struct deck_reader *r, int row, const struct deck_value *v, const char **out)
{
    if (!need_string(r, row, v))
        return false;
    size_t n = strlen(v->token);
    if (n > deck_table[row].longest) {
        refuse(r, row, v, "%zu bytes, at most %zu", n, deck_table[row].longest);
        return false;
    }
    *out = deck_table_keep(r->deck, v->token, n);
    return true;
}

static bool set_word(struct deck_reader *r, int row, const struct deck_value *v, int *out)
{
    if (!need_string(r, row, v))
        return false;
    *out = deck_table_word(deck_table[row].words, v->token);
    if (*out >= 0)
        return true;
    char *words = deck_table_range(row), near[80] = "", *word;
    int best = 1 + ((int)strlen(v->token) + 1) / 3;
    for (int i = 0; (word = deck_table_nth_word(deck_table[row].words, i)); i++) {
        int d = deck_table_distance(v->token, word, best);
        if (*word && d < best) {
            best = d;
            snprintf(near, sizeof near, "; did you mean '%s'?", word);
        }
        free(word);
    }
    refuse(r, row, v, "must be %s%s", words, near);
    free(words);
    return false;
}

/* Elements first..last (1-based; 0: the whole list) of a list row. */
bool deck_value_set_list(struct deck_reader *r, int row, struct deck_place p, int64_t first,
                         int64_t last, const struct deck_values *values)
{
    struct deck *deck = r->deck;
    const struct deck_param *param = &deck_table[row];
    struct deck_source *source = &deck->source[row];
    int64_t start = first ? first : 1, room = first ? last - first + 1 : DECK_LIST_MAX;
    if (values->total > room || (first && values->total < room)) {
        deck_text_fault_item(r, values->v[0].place, "%s.%s: %" PRId64 " value%s, %s %" PRId64,
                             param->group, param->key, values->total, values->total == 1 ? "" : "s",
                             first ? "expected" : "at most", room);
        return false;
    }
    int64_t at = start - 1;
    if (source->elements == 0) {
        if (param->type == DECK_TYPE_INTEGERS)
            memset(deck_ints(deck, row), 0, sizeof(struct deck_ints));
        else
            memset(deck_strings(deck, row), 0, sizeof(struct deck_strings));
    }
    for (int i = 0; i < values->n; i++)
        for (int64_t k = 0; k < values->v[i].count; k++, at++) {
            const struct deck_value *v = &values->v[i];
            if (source->elements >> at & 1) {
                deck_text_fault_item(r, p, "%s.%s(%d) is given twice, on lines %d and %d",
                                     param->group, param->key, (int)at + 1, source->line,
                                     v->place.line);
                return false;
            }
            int ignored, *n;
            if (param->type == DECK_TYPE_INTEGERS) {
                struct deck_ints *list = deck_ints(deck, row);
                if (!set_integer(r, row, v, &list->v[at]))
                    return false;
                n = &list->n;
            } else {
                struct deck_strings *list = deck_strings(deck, row);
                if (!set_word(r, row, v, &ignored))
                    return false;
                list->v[at] = deck_table_keep(deck, v->token, strlen(v->token));
                n = &list->n;
            }
            if (at + 1 > *n)
                *n = (int)at + 1;
            source->elements |= (uint64_t)1 << at;
        }
    return true;
}

bool deck_value_set_scalar(struct deck_reader *r, int row, const struct deck_values *values)
{
    const struct deck_param *p = &deck_table[row];
    if (values->total != 1) {
        char first[DECK_SHOWN], second[DECK_SHOWN];
        const struct deck_value *v = &values->v[values->n > 1];
        if (values->n > 1)
            deck_text_fault_item(
                r, v->place, "%s.%s = %s, %s: %" PRId64 " values, at most 1", p->group, p->key,
                deck_text_shown(first, values->v[0].token, strlen(values->v[0].token)),
                deck_text_shown(second, v->token, strlen(v->token)), values->total);
        else
            deck_text_fault_item(r, v->place, "%s.%s: %" PRId64 " values, at most 1", p->group,
                                 p->key, values->total);
        return false;
    }
    const struct deck_value *v = &values->v[0];
    switch (p->type) {
    case DECK_TYPE_INTEGER: return set_integer(r, row, v, deck_integer(r->deck, row));
    case DECK_TYPE_REAL: return set_real(r, row, v, deck_real(r->deck, row));
    case DECK_TYPE_LOGICAL: return set_logical(r, row, v, deck_logical(r->deck, row));
    case DECK_TYPE_STRING: return set_string(r, row, v, deck_string(r->deck, row));
    default: {
        int word;
        if (!set_word(r, row, v, &word))
            return false;
        *deck_choice(r->deck, row) = word;
        return true;
    }
    }
}

/* Give the values of one item to its row, once. */
void deck_value_set_item(struct deck_reader *r, int row, struct deck_place p, int64_t first,
                         int64_t last, struct deck_values *values)
{
    const struct deck_param *param = &deck_table[row];
    struct deck_source *source = &r->deck->source[row];
    bool list = param->type == DECK_TYPE_INTEGERS || param->type == DECK_TYPE_STRINGS;
    if (first && !list) {
        deck_text_fault_item(r, p, "%s.%s is not a list: no index", param->group, param->key);
        source->bad = true;
        return;
    }
    if (source->line && !(list && first && source->elements)) {
        deck_text_fault_item(r, p, "%s.%s is given twice, on lines %d and %d", param->group,
                             param->key, source->line, p.line);
        return;
    }
    bool ok = !values->faulty && (list ? deck_value_set_list(r, row, p, first, last, values)
                                       : deck_value_set_scalar(r, row, values));
    if (!ok) {
        source->bad = true;
        if (list)
            deck_table_default(r->deck, row); /* nothing of a refused list stays */
    }
    if (source->line)
        return;
    source->origin = DECK_FROM_DECK;
    source->line = p.line;
    source->column = p.column;
    if (values->n) {
        source->line = values->v[0].place.line;
        source->column = values->v[0].place.column;
    }
    char file[1280], *where = xasprintf("%s:%d:%d", printable(file, sizeof file, r->deck->file),
                                        source->line, source->column);
    source->where = deck_table_keep(r->deck, where, strlen(where));
    free(where);
}
