/* deck_table.c - the parameter table as data: defaults, formatting, ranges, nearest names.
 *
 * Numbers are written so that reading them gives the same bits: a real in the fewest of 15, 16 or
 * 17 digits that do.
 */
#include "deck_table.h"

#include <ctype.h>
#include <inttypes.h>
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define BUILT NULL, NULL
#define ONLY(values, what) values, what
#define ROW_(group_, key_, type_, ...) \
    [DECK_ROW(group_, key_)] = { .group = #group_, \
                                 .key = #key_, \
                                 .type = type_, \
                                 .offset = offsetof(struct deck, group_.key_), \
                                 __VA_ARGS__ },
#define ROW(...) ROW_(__VA_ARGS__)
/* The `built` column expands to two values; the second macro level splits them. */
#define BUILT_COLUMN_(only_, feature_) .only = only_, .feature = feature_
#define BUILT_COLUMN(...) BUILT_COLUMN_(__VA_ARGS__)

#define DECK_GROUP_BEGIN(group)
#define DECK_GROUP_END(group)
#define DECK_INTEGER(g, k, d, lo, hi, u, b, h) \
    ROW(g, k, DECK_TYPE_INTEGER, .integer = d, .min = lo, .max = hi, .unit = u, BUILT_COLUMN(b), \
        .help = h)
#define DECK_REAL(g, k, d, lo, hi, u, b, h) \
    ROW(g, k, DECK_TYPE_REAL, .real = d, .real_min = lo, .real_max = hi, .unit = u, \
        BUILT_COLUMN(b), .help = h)
#define DECK_LOGICAL(g, k, d, b, h) \
    ROW(g, k, DECK_TYPE_LOGICAL, .logical = d, .unit = "", BUILT_COLUMN(b), .help = h)
#define DECK_STRING(g, k, d, l, b, h) \
    ROW(g, k, DECK_TYPE_STRING, .text = d, .longest = l, .unit = "", BUILT_COLUMN(b), .help = h)
#define DECK_CHOICE(g, k, d, w, b, h) \
    ROW(g, k, DECK_TYPE_CHOICE, .text = d, .words = w, .unit = "", BUILT_COLUMN(b), .help = h)
#define DECK_INTEGERS(g, k, d, lo, hi, u, b, h) \
    ROW(g, k, DECK_TYPE_INTEGERS, .text = d, .min = lo, .max = hi, .unit = u, BUILT_COLUMN(b), \
        .help = h)
#define DECK_STRINGS(g, k, d, w, b, h) \
    ROW(g, k, DECK_TYPE_STRINGS, .text = d, .words = w, .unit = "", BUILT_COLUMN(b), .help = h)
const struct deck_param deck_table[DECK_ROWS] = {
#include "deck_params.def"
};

int deck_table_find(const char *group, const char *key)
{
    for (int r = 0; r < DECK_ROWS; r++)
        if (!strcasecmp(deck_table[r].group, group) && !strcasecmp(deck_table[r].key, key))
            return r;
    return -1;
}

int deck_table_group(const char *group)
{
    for (int r = 0; r < DECK_ROWS; r++)
        if (!strcasecmp(deck_table[r].group, group))
            return r;
    return -1;
}

char *deck_table_nth_word(const char *words, int n)
{
    for (const char *p = words;;) {
        p += strspn(p, " ");
        if (!*p)
            return NULL;
        size_t length = strcspn(p, " ");
        if (n-- == 0) {
            char *word = xmalloc(length + 1, 1);
            memcpy(word, p, length);
            word[length] = '\0';
            if (!strcmp(word, "''"))
                word[0] = '\0';
            return word;
        }
        p += length;
    }
}

int deck_table_word(const char *words, const char *word)
{
    for (int n = 0;; n++) {
        char *w = deck_table_nth_word(words, n);
        if (!w)
            return -1;
        bool same = !strcmp(w, word);
        free(w);
        if (same)
            return n;
    }
}

struct deck_text {
    char **block;
    int count, capacity;
};

const char *deck_table_keep(struct deck *deck, const char *text, size_t length)
{
    if (!deck->text)
        deck->text = xcalloc(1, sizeof *deck->text);
    struct deck_text *t = deck->text;
    if (t->count == t->capacity) {
        t->capacity = t->capacity ? 2 * t->capacity : 32;
        t->block = xrealloc(t->block, (size_t)t->capacity, sizeof *t->block);
    }
    char *copy = xmalloc(length + 1, 1);
    memcpy(copy, text, length);
    copy[length] = '\0';
    return t->block[t->count++] = copy;
}

void deck_table_release(struct deck *deck)
{
    if (!deck->text)
        return;
    for (int i = 0; i < deck->text->count; i++)
        free(deck->text->block[i]);
    free(deck->text->block);
    free(deck->text);
    deck->text = NULL;
}

void deck_table_default(struct deck *deck, int row)
{
    const struct deck_param *p = &deck_table[row];
    switch (p->type) {
    case DECK_TYPE_INTEGER: *deck_integer(deck, row) = p->integer; break;
    case DECK_TYPE_REAL: *deck_real(deck, row) = p->real; break;
    case DECK_TYPE_LOGICAL: *deck_logical(deck, row) = p->logical; break;
    case DECK_TYPE_STRING: *deck_string(deck, row) = p->text; break;
    case DECK_TYPE_CHOICE: *deck_choice(deck, row) = deck_table_word(p->words, p->text); break;
    case DECK_TYPE_INTEGERS: memset(deck_ints(deck, row), 0, sizeof(struct deck_ints)); break;
    case DECK_TYPE_STRINGS: {
        struct deck_strings *list = deck_strings(deck, row);
        memset(list, 0, sizeof *list);
        char *word;
        while (list->n < DECK_LIST_MAX && (word = deck_table_nth_word(p->text, list->n))) {
            list->v[list->n++] = deck_table_keep(deck, word, strlen(word));
            free(word);
        }
        break;
    }
    }
}

bool deck_table_equal(const struct deck *a, const struct deck *b, int row)
{
    const void *x = (const char *)a + deck_table[row].offset,
               *y = (const char *)b + deck_table[row].offset;
    switch (deck_table[row].type) {
    case DECK_TYPE_INTEGER: return *(const int64_t *)x == *(const int64_t *)y;
    case DECK_TYPE_REAL: return !memcmp(x, y, sizeof(double));
    case DECK_TYPE_LOGICAL: return *(const bool *)x == *(const bool *)y;
    case DECK_TYPE_STRING: return !strcmp(*(const char *const *)x, *(const char *const *)y);
    case DECK_TYPE_CHOICE: return *(const int *)x == *(const int *)y;
    case DECK_TYPE_INTEGERS: {
        const struct deck_ints *l = x, *m = y;
        return l->n == m->n && !memcmp(l->v, m->v, (size_t)l->n * sizeof l->v[0]);
    }
    case DECK_TYPE_STRINGS: {
        const struct deck_strings *l = x, *m = y;
        if (l->n != m->n)
            return false;
        for (int i = 0; i < l->n; i++)
            if (strcmp(l->v[i], m->v[i]))
                return false;
        return true;
    }
    }
    return false;
}

bool deck_table_is_default(const struct deck *deck, int row)
{
    struct deck *fresh = xcalloc(1, sizeof *fresh);
    deck_table_default(fresh, row);
    bool same = deck_table_equal(deck, fresh, row);
    deck_table_release(fresh);
    free(fresh);
    return same;
}

bool deck_table_is_unset(const struct deck *deck, int row)
{
    const struct deck_param *p = &deck_table[row];
    const void *x = (const char *)deck + p->offset;
    switch (p->type) {
    case DECK_TYPE_INTEGER:
        return *(const int64_t *)x == p->integer && (p->integer < p->min || p->integer > p->max);
    case DECK_TYPE_REAL:
        return *(const double *)x == p->real && (p->real < p->real_min || p->real > p->real_max);
    case DECK_TYPE_STRING: return !**(const char *const *)x && !*p->text;
    default: return false;
    }
}

static char *format_real(double x)
{
    char buffer[64];
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(buffer, sizeof buffer, "%.*g", digits, x);
        if (strtod(buffer, NULL) == x)
            break;
    }
    return xasprintf("%s%s", buffer, strpbrk(buffer, ".e") ? "" : ".0");
}

static char *format_string(const char *s)
{
    char *quoted = xmalloc(2 * strlen(s) + 3, 1), *q = quoted;
    *q++ = '\'';
    for (; *s; s++) {
        if (*s == '\'')
            *q++ = '\'';
        *q++ = *s;
    }
    *q++ = '\'';
    *q = '\0';
    return quoted;
}

char *deck_table_format(const struct deck *deck, int row)
{
    const void *x = (const char *)deck + deck_table[row].offset;
    char *all = NULL;
    switch (deck_table[row].type) {
    case DECK_TYPE_INTEGER: return xasprintf("%" PRId64, *(const int64_t *)x);
    case DECK_TYPE_REAL: return format_real(*(const double *)x);
    case DECK_TYPE_LOGICAL: return xstrdup(*(const bool *)x ? ".true." : ".false.");
    case DECK_TYPE_STRING: return format_string(*(const char *const *)x);
    case DECK_TYPE_CHOICE: {
        char *word = deck_table_nth_word(deck_table[row].words, *(const int *)x);
        char *quoted = format_string(word ? word : "");
        free(word);
        return quoted;
    }
    case DECK_TYPE_INTEGERS: {
        const struct deck_ints *list = x;
        for (int i = 0; i < list->n; i++) {
            char *longer = xasprintf("%s%s%" PRId64, all ? all : "", all ? ", " : "", list->v[i]);
            free(all);
            all = longer;
        }
        break;
    }
    case DECK_TYPE_STRINGS: {
        const struct deck_strings *list = x;
        for (int i = 0; i < list->n; i++) {
            char *one = format_string(list->v[i]);
            char *longer = xasprintf("%s%s%s", all ? all : "", all ? ", " : "", one);
            free(one);
            free(all);
            all = longer;
        }
        break;
    }
    }
    return all ? all : xstrdup("");
}

/* words as 'a', 'b' or 'c' */
static char *format_words(const char *words)
{
    char *all = xstrdup(""), *word;
    for (int n = 0; (word = deck_table_nth_word(words, n)); n++) {
        char *next = deck_table_nth_word(words, n + 1);
        char *longer = xasprintf("%s%s'%s'", all, n == 0 ? "" : next ? ", " : " or ", word);
        free(next);
        free(word);
        free(all);
        all = longer;
    }
    return all;
}

char *deck_table_range(int row)
{
    const struct deck_param *p = &deck_table[row];
    switch (p->type) {
    case DECK_TYPE_INTEGER:
    case DECK_TYPE_INTEGERS: {
        bool outside = p->type == DECK_TYPE_INTEGER && (p->integer < p->min || p->integer > p->max);
        char *apart = outside ? xasprintf("%" PRId64 " or ", p->integer) : xstrdup("");
        char *range = xasprintf("%s%" PRId64 "..%" PRId64, apart, p->min, p->max);
        free(apart);
        return range;
    }
    case DECK_TYPE_REAL: {
        bool outside = p->real < p->real_min || p->real > p->real_max;
        char *range = outside
                          ? xasprintf("%.10g or %.10g..%.10g", p->real, p->real_min, p->real_max)
                          : xasprintf("%.10g..%.10g", p->real_min, p->real_max);
        return range;
    }
    case DECK_TYPE_CHOICE:
    case DECK_TYPE_STRINGS: return format_words(p->words);
    case DECK_TYPE_LOGICAL: return xstrdup("T or F");
    case DECK_TYPE_STRING: return xasprintf("at most %zu bytes", p->longest);
    }
    return xstrdup("");
}

const char *deck_table_type(int row)
{
    switch (deck_table[row].type) {
    case DECK_TYPE_INTEGER:
    case DECK_TYPE_INTEGERS: return "integer";
    case DECK_TYPE_REAL: return "real";
    case DECK_TYPE_LOGICAL: return "logical";
    default: return "string";
    }
}

int deck_table_distance(const char *a, const char *b, int limit)
{
    enum { LONGEST = 2 * DECK_NAME_MAX };
    int m = (int)strnlen(a, LONGEST + 1), n = (int)strnlen(b, LONGEST + 1);
    if (m > LONGEST || n > LONGEST || abs(m - n) > limit)
        return limit + 1;
    int rows[3][LONGEST + 1], *before = rows[0], *last = rows[1], *row = rows[2];
    memset(rows, 0, sizeof rows);
    for (int j = 0; j <= n; j++)
        row[j] = j;
    for (int i = 1; i <= m; i++) {
        int *oldest = before;
        before = last;
        last = row;
        row = oldest;
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int x = tolower((unsigned char)a[i - 1]), y = tolower((unsigned char)b[j - 1]);
            int best = last[j - 1] + (x != y);
            if (last[j] + 1 < best)
                best = last[j] + 1;
            if (row[j - 1] + 1 < best)
                best = row[j - 1] + 1;
            bool swapped = i > 1 && j > 1 && x == tolower((unsigned char)b[j - 2]) &&
                           y == tolower((unsigned char)a[i - 2]);
            if (swapped && before[j - 2] + 1 < best)
                best = before[j - 2] + 1;
            row[j] = best;
        }
    }
    return row[n] <= limit ? row[n] : limit + 1;
}

/* How far a word may be from a name to be offered: a third of its length, at least 1. */
static int nearness(const char *word)
{
    int n = ((int)strlen(word) + 1) / 3;
    return n < 1 ? 1 : n;
}

/* Megatron-LM spells its flags with dashes and two of them in front; the deck does not. */
static bool same_but_dashes(const char *word, const char *name)
{
    word += strspn(word, "-");
    for (; *word && *name; word++, name++)
        if (tolower((unsigned char)*word) != tolower((unsigned char)*name) &&
            !(*word == '-' && *name == '_'))
            return false;
    return !*word && !*name;
}

const char *deck_table_suggest(const char *group, const char *key, char *out, size_t size)
{
    out[0] = '\0';
    if (!key) {
        int limit = nearness(group), best = limit + 1, found = -1;
        for (int r = 0; r < DECK_ROWS; r++) {
            int d = deck_table_distance(group, deck_table[r].group, limit);
            if (d < best)
                best = d, found = r;
        }
        if (found >= 0)
            snprintf(out, size, "; did you mean &%s?", deck_table[found].group);
        return out;
    }
    for (int r = 0; r < DECK_ROWS; r++)
        if (same_but_dashes(key, deck_table[r].key)) {
            if (!strcasecmp(deck_table[r].group, group))
                snprintf(out, size, "; did you mean %s?", deck_table[r].key);
            else
                snprintf(out, size, "; %s belongs to &%s", deck_table[r].key, deck_table[r].group);
            return out;
        }
    int limit = nearness(key), best = limit + 1, found = -1;
    for (int r = 0; r < DECK_ROWS; r++) {
        /* A name of the same group wins over an equally near one elsewhere. */
        bool here = !strcasecmp(deck_table[r].group, group);
        int d = deck_table_distance(key, deck_table[r].key, limit);
        if (d > limit)
            continue;
        bool better = d < best || (d == best && here && strcasecmp(deck_table[found].group, group));
        if (better)
            best = d, found = r;
    }
    if (found < 0)
        return out;
    if (!strcasecmp(deck_table[found].group, group))
        snprintf(out, size, "; did you mean %s?", deck_table[found].key);
    else
        snprintf(out, size, "; did you mean %s in &%s?", deck_table[found].key,
                 deck_table[found].group);
    return out;
}
