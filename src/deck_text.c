/* deck_text.c - from the deck's text to its fields: the strict namelist grammar.
 *
 *   deck   = [BOM] { comment | blank | group }             nothing else may stand outside a group
 *   group  = "&" name { item } "/"
 *          after "/" only blanks and a comment up to the end of the line
 *   item   = name [ "(" int [ ":" int ] ")" ] "=" value { ("," | blank) value } [ "," ]
 *   value  = [ count "*" ] ( integer | real | logical | string )
 *
 * Every deck accepted here means the same to gfortran and f90nml; what those two read differently,
 * drop or guess is refused. All mistakes are reported as file:line:column (columns count bytes from
 * 1); after one the parser goes on at the next line that it can understand. Whether a value suits
 * its key is decided in deck_value.c, by the table's row.
 */
#include "deck_text.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

/* ---- messages -------------------------------------------------------------------------------- */

static void report(struct deck_reader *r, struct deck_place p, const char *fmt, va_list args)
{
    if (r->stop)
        return;
    char message[1024];
    vsnprintf(message, sizeof message, fmt, args);
    const char *file = r->deck->file;
    if (r->command_line)
        errors_add(r->errors, EXIT_DECK, "command line: error: %s", message);
    else
        errors_add(r->errors, EXIT_DECK, "%s:%d:%d: error: %s", file, p.line, p.column, message);
    if (++r->faults >= DECK_ERRORS_MAX) {
        r->stop = true;
        errors_add(r->errors, EXIT_DECK,
                   "%s: error: too many errors, the rest of the deck was not read",
                   r->command_line ? "command line" : file);
    }
}

/* A mistake after which part of the text is skipped (deck->unread). */
static void fault(struct deck_reader *r, struct deck_place p, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
static void fault(struct deck_reader *r, struct deck_place p, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    report(r, p, fmt, args);
    va_end(args);
    r->deck->unread = true;
}

/* A mistake that is confined to one item. */
void deck_text_fault_item(struct deck_reader *r, struct deck_place p, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    report(r, p, fmt, args);
    va_end(args);
}

/* A piece of user text for a message: cut when long, never inside a character. */
const char *deck_text_shown(char out[DECK_SHOWN], const char *text, size_t length)
{
    size_t n = length < DECK_SHOWN_MAX ? length : DECK_SHOWN_MAX;
    while (n < length && n > 0 && ((unsigned char)text[n] & 0xC0) == 0x80)
        n--;
    memcpy(out, text, n);
    memcpy(out + n, n < length ? "..." : "", n < length ? sizeof "..." : 1);
    return out;
}

/* ---- characters ------------------------------------------------------------------------------ */

static int peek_at(const struct deck_reader *r, size_t ahead)
{
    return r->at + ahead < r->length ? (unsigned char)r->text[r->at + ahead] : -1;
}

static int peek(const struct deck_reader *r)
{
    return peek_at(r, 0);
}

static void advance(struct deck_reader *r)
{
    if (r->at >= r->length)
        return;
    if (r->text[r->at++] == '\n') {
        r->line++;
        r->column = 1;
    } else {
        r->column++;
    }
}

static struct deck_place here(const struct deck_reader *r)
{
    return (struct deck_place){ r->line, r->column };
}

static bool is_blank(int c)
{
    return c == ' ' || c == '\t';
}
static bool is_letter(int c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}
static bool is_digit(int c)
{
    return c >= '0' && c <= '9';
}
static bool is_name(int c)
{
    return is_letter(c) || is_digit(c) || c == '_';
}
/* What may follow a complete "/" or value. */
static bool is_end(int c)
{
    return c < 0 || is_blank(c) || c == '\n' || c == '!';
}

static void skip_blanks(struct deck_reader *r)
{
    while (is_blank(peek(r)))
        advance(r);
}

static void skip_line(struct deck_reader *r)
{
    while (peek(r) >= 0 && peek(r) != '\n')
        advance(r);
}

static void skip_space(struct deck_reader *r)
{
    for (;;) {
        skip_blanks(r);
        if (peek(r) == '!')
            skip_line(r);
        if (peek(r) != '\n')
            return;
        advance(r);
    }
}

/* Length of the UTF-8 character at p, 0 when it is none (overlong forms and surrogates are
 * none). */
static size_t utf8_length(const unsigned char *p, size_t left)
{
    if (p[0] < 0x80)
        return 1;
    size_t n = p[0] >= 0xF0 ? 4 : p[0] >= 0xE0 ? 3 : p[0] >= 0xC2 ? 2 : 0;
    if (n == 0 || n > left || p[0] > 0xF4)
        return 0;
    for (size_t i = 1; i < n; i++)
        if ((p[i] & 0xC0) != 0x80)
            return 0;
    if ((p[0] == 0xE0 && p[1] < 0xA0) || (p[0] == 0xED && p[1] > 0x9F) ||
        (p[0] == 0xF0 && p[1] < 0x90) || (p[0] == 0xF4 && p[1] > 0x8F))
        return 0;
    return n;
}

bool deck_text_load(struct deck_reader *r, const char *text, size_t length, char *copy)
{
    struct deck_place p = { 1, 1 };
    size_t n = 0;
    const unsigned char *t = (const unsigned char *)text;
    if (length >= 2 && ((t[0] == 0xFF && t[1] == 0xFE) || (t[0] == 0xFE && t[1] == 0xFF))) {
        fault(r, p, "the text is UTF-16: save it as UTF-8");
        return false;
    }
    size_t start = length >= 3 && !memcmp(t, "\xEF\xBB\xBF", 3) ? 3 : 0;
    for (size_t i = start; i < length;) {
        size_t bytes = utf8_length(t + i, length - i);
        bool crlf = t[i] == '\r' && i + 1 < length && t[i + 1] == '\n';
        bool control = (t[i] < 0x20 && t[i] != '\n' && t[i] != '\t' && !crlf) || t[i] == 0x7F;
        if (bytes == 0 || control || (r->command_line && t[i] == '\n')) {
            fault(r, p, "byte 0x%02X is not text (%s)", t[i],
                  bytes == 0 ? "not UTF-8" : "control character");
            return false;
        }
        if (crlf) {
            i++;
            continue;
        }
        memcpy(copy + n, t + i, bytes);
        n += bytes;
        i += bytes;
        if (copy[n - 1] == '\n')
            p = (struct deck_place){ p.line + 1, 1 };
        else
            p.column += (int)bytes;
        if (p.column > DECK_LINE_MAX) {
            p.column = 1;
            fault(r, p, "line longer than %d bytes", DECK_LINE_MAX);
            return false;
        }
    }
    r->text = copy;
    r->length = n;
    return true;
}

/* ---- groups and items ------------------------------------------------------------------------ */

/* Read a name into out; longer ones are reported and cut. */
static void read_name(struct deck_reader *r, char out[DECK_NAME_MAX + 1])
{
    struct deck_place p = here(r);
    const char *start = r->text + r->at;
    size_t n = 0;
    while (is_name(peek(r))) {
        if (n < DECK_NAME_MAX)
            out[n] = (char)peek(r);
        n++;
        advance(r);
    }
    out[n < DECK_NAME_MAX ? n : DECK_NAME_MAX] = '\0';
    char text[DECK_SHOWN];
    if (n > DECK_NAME_MAX)
        fault(r, p, "'%s': a name has at most %d letters", deck_text_shown(text, start, n),
              DECK_NAME_MAX);
}

/* The blank-separated text at the cursor, for messages. */
static const char *text_here(const struct deck_reader *r, char out[DECK_SHOWN])
{
    size_t n = 0;
    while (peek_at(r, n) >= 0 && !is_blank(peek_at(r, n)) && peek_at(r, n) != '\n')
        n++;
    return deck_text_shown(out, r->text + r->at, n);
}

/* A letter at the cursor: does `name =`, `name(` or `name %` stand here, the next item? */
static bool item_follows(struct deck_reader *r)
{
    struct deck_reader ahead = { .text = r->text, .length = r->length, .at = r->at };
    while (is_name(peek(&ahead)))
        advance(&ahead);
    if (peek(&ahead) == '(' || peek(&ahead) == '%')
        return true;
    skip_blanks(&ahead);
    if (peek(&ahead) == '(' || peek(&ahead) == '%')
        return true;
    skip_space(&ahead);
    return peek(&ahead) == '=';
}

static bool add_value(struct deck_reader *r, struct deck_values *values, struct deck_value v)
{
    if (++r->items > DECK_ITEMS_MAX && !r->stop) {
        fault(r, v.place, "more than %d items", DECK_ITEMS_MAX);
        r->stop = true;
    }
    if (values->total > INT64_MAX - v.count)
        values->total = INT64_MAX;
    else
        values->total += v.count;
    if (values->n > DECK_LIST_MAX) {
        free(v.token);
        return false;
    }
    values->v[values->n++] = v;
    return true;
}

/* Fortran programs look for a group in all text before it, also inside strings. */
static void refuse_group_names(struct deck_reader *r, struct deck_place p, const char *string)
{
    for (const char *q = string; *q; q++) {
        char name[DECK_NAME_MAX + 1], shown[DECK_SHOWN];
        size_t n = 0;
        if (*q != '&' && *q != '$')
            continue;
        while (n < DECK_NAME_MAX && is_name((unsigned char)q[1 + n]))
            name[n] = q[1 + n], n++;
        name[n] = '\0';
        if (deck_table_group(name) >= 0)
            deck_text_fault_item(r, p,
                                 "'%s' inside a string would begin a group to a Fortran program",
                                 deck_text_shown(shown, q, 1 + n));
    }
}

/* The quoted string at the cursor; NULL when it does not end on its line. */
static char *read_quoted(struct deck_reader *r)
{
    struct deck_place p = here(r);
    int quote = peek(r);
    advance(r);
    size_t capacity = 64, n = 0;
    char *s = xmalloc(capacity, 1);
    for (;;) {
        int c = peek(r);
        if (c < 0 || c == '\n') {
            fault(r, p, "string opened at %d:%d is not closed on line %d", p.line, p.column,
                  p.line);
            free(s);
            return NULL;
        }
        advance(r);
        if (c == quote) {
            if (peek(r) != quote)
                break;
            advance(r);
        }
        if (n + 2 > capacity)
            s = xrealloc(s, capacity *= 2, 1);
        s[n++] = (char)c;
    }
    s[n] = '\0';
    refuse_group_names(r, p, s);
    return s;
}

/* The bare word at the cursor. "/" belongs to it unless it could end the group. */
static char *read_word(struct deck_reader *r)
{
    size_t start = r->at;
    for (;;) {
        int c = peek(r);
        if (is_end(c) || c == ',' || c == '\'' || c == '"' || c == '=')
            break;
        if (c == '/' && is_end(peek_at(r, 1)))
            break;
        advance(r);
    }
    size_t n = r->at - start;
    char *word = xmalloc(n + 1, 1);
    memcpy(word, r->text + start, n);
    word[n] = '\0';
    return word;
}

/* Split "3*x": the count, with the rest moved to the front of word; 1 without "*"; 0 when it is no
 * valid count (reported). */
static int64_t take_count(struct deck_reader *r, struct deck_place p, char *word)
{
    char *star = strchr(word, '*'), text[DECK_SHOWN];
    if (!star)
        return 1;
    deck_text_shown(text, word, strlen(word));
    if (star == word) {
        fault(r, p, "'%s': no blank may stand before or after the * of a repeat count", text);
        return 0;
    }
    int64_t count = 0;
    for (char *q = word; q < star; q++) {
        if (!is_digit((unsigned char)*q)) {
            fault(r, p, "'%s': a repeat count is digits, then *, then the value", text);
            return 0;
        }
        /* huge is huge; refused by the number of values */
        if (count > (INT64_MAX - 9) / 10)
            count = (INT64_MAX - 9) / 10;
        count = 10 * count + (*q - '0');
    }
    if (count == 0)
        fault(r, p, "'%s': a repeat count is at least 1", text);
    memmove(word, star + 1, strlen(star + 1) + 1);
    return count;
}

/* One value at the cursor. False: reported, and the rest of the line makes no sense. */
static bool read_value(struct deck_reader *r, struct deck_values *values)
{
    struct deck_value v = { .count = 1, .place = here(r) };
    char text[DECK_SHOWN];
    if (peek(r) != '\'' && peek(r) != '"') {
        v.token = read_word(r);
        if (!*v.token) {
            fault(r, v.place, "unexpected '%s'", text_here(r, text));
            free(v.token);
            return false;
        }
        v.count = take_count(r, v.place, v.token);
        bool quote = peek(r) == '\'' || peek(r) == '"';
        if (v.count < 1) {
            free(v.token);
            return false;
        }
        if (!*v.token && !quote) {
            fault(r, v.place, "value missing after the * of a repeat count");
            free(v.token);
            return false;
        }
        if (*v.token || !quote) {
            if (quote) {
                fault(r, here(r), "unexpected quote after '%s'",
                      deck_text_shown(text, v.token, strlen(v.token)));
                free(v.token);
                return false;
            }
            add_value(r, values, v);
            return true;
        }
        free(v.token);
    }
    v.quoted = true;
    v.token = read_quoted(r);
    if (!v.token)
        return false;
    int c = peek(r);
    if (!is_end(c) && c != ',' && !(c == '/' && is_end(peek_at(r, 1)))) {
        fault(r, here(r), "unexpected '%s' after a string", text_here(r, text));
        free(v.token);
        return false;
    }
    add_value(r, values, v);
    return true;
}

/* "&end" or "$end" at the cursor. */
static bool at_end_word(const struct deck_reader *r)
{
    return (peek(r) == '&' || peek(r) == '$') && r->length - r->at >= 4 &&
           !strncasecmp(r->text + r->at + 1, "end", 3) && !is_name(peek_at(r, 4));
}

static void fault_comma(struct deck_reader *r, const char *name, struct deck_place p,
                        const char *where, struct deck_values *values)
{
    if (!values->faulty)
        fault(r, p, "%s: a comma may not stand %s", name, where);
    values->faulty = true;
}

/* All values of an item, up to the next item, "/" or "&". gfortran takes some commas at the start
 * of a line, and between two values any there and one before a comment, for a missing value; such
 * lists are refused, so that a deck means the same to every reader. */
static void read_values(struct deck_reader *r, const char *name, struct deck_place name_place,
                        struct deck_values *values)
{
    bool comma = true; /* a value may follow; two commas in a row are a missing value */
    int value_line = r->line;
    struct deck_place comma_place = { 0, 0 };
    const char *ambiguous = NULL; /* where that comma may not stand between two values */
    for (;;) {
        skip_blanks(r);
        size_t gap = r->at;
        skip_space(r);
        int c = peek(r);
        bool comment = r->at > gap && r->text[gap] == '!';
        if (comma && comma_place.line > value_line && comment)
            fault_comma(r, name, comma_place, "at the start of a line before a comment", values);
        else if (comma && comma_place.line && comment)
            ambiguous = "before a comment";
        if (c < 0 || c == '&' || at_end_word(r) || (c == '/' && is_end(peek_at(r, 1))) ||
            (is_letter(c) && item_follows(r))) {
            if (values->n == 0 && !values->faulty) {
                fault(r, name_place, "%s: value missing", name);
                values->faulty = true;
            }
            return;
        }
        if (c == ',') {
            if (comma) {
                fault(r, here(r), "%s: value missing before ','", name);
                values->faulty = true;
            } else if (r->line > value_line + (comment ? 0 : 1)) {
                fault_comma(r, name, here(r),
                            "at the start of a line after a comment or an empty line", values);
            }
            comma = true;
            comma_place = here(r);
            ambiguous = r->line != value_line ? "at the start of a line" : NULL;
            advance(r);
            continue;
        }
        if (ambiguous && !values->faulty) {
            fault(r, comma_place, "%s: between two values a comma may not stand %s", name,
                  ambiguous);
            values->faulty = true;
        }
        ambiguous = NULL;
        if (!read_value(r, values)) {
            values->faulty = r->recovering = true;
            skip_line(r);
            return;
        }
        value_line = r->line;
        comma = false;
        if (r->stop)
            return;
    }
}

void deck_text_values(struct deck_reader *r, const char *name, struct deck_values *values)
{
    char text[DECK_SHOWN];
    read_values(r, name, here(r), values);
    if (!values->faulty && peek(r) >= 0) {
        deck_text_fault_item(r, here(r), "%s: unexpected '%s'", name, text_here(r, text));
        values->faulty = true;
    }
}

/* A signed number of an index; false when there is none. Far out of bounds is as good as any number
 * out of bounds. */
static bool read_bound(struct deck_reader *r, int64_t *bound)
{
    bool negative = peek(r) == '-';
    if (negative || peek(r) == '+')
        advance(r);
    if (!is_digit(peek(r)))
        return false;
    for (*bound = 0; is_digit(peek(r)); advance(r))
        if (*bound < INT32_MAX)
            *bound = 10 * *bound + (peek(r) - '0');
    if (negative)
        *bound = -*bound;
    return true;
}

/* "(3)" or "(2:4)" at the cursor, no blanks inside (gfortran takes only some of them). False:
 * reported. */
static bool read_index(struct deck_reader *r, const char *name, int64_t *first, int64_t *last)
{
    struct deck_place p = here(r);
    advance(r);
    bool ok = read_bound(r, first);
    *last = *first;
    if (ok && peek(r) == ':') {
        advance(r);
        ok = read_bound(r, last);
    }
    if (!ok || peek(r) != ')') {
        fault(r, p, "%s: an index is (3) or (1:3), without blanks", name);
        return false;
    }
    advance(r);
    if (*first < 1 || *last > DECK_LIST_MAX || *last < *first) {
        fault(r, p, "%s: index outside 1..%d", name, DECK_LIST_MAX);
        return false;
    }
    return true;
}

static void read_item(struct deck_reader *r, const char *group, bool known)
{
    struct deck_place p = here(r);
    char name[DECK_NAME_MAX + 1], hint[200];
    int64_t first = 0, last = 0;
    read_name(r, name);
    if (++r->items > DECK_ITEMS_MAX) {
        fault(r, p, "more than %d items", DECK_ITEMS_MAX);
        r->stop = true;
        return;
    }
    int row = known ? deck_table_find(group, name) : -1;
    bool blank = is_blank(peek(r));
    skip_blanks(r);
    if (peek(r) == '%') {
        fault(r, p, "%s: this deck has no components (%%)", name);
        r->recovering = true;
        skip_line(r);
        return;
    }
    if (peek(r) == '(') {
        if (blank)
            fault(r, here(r), "%s: no blank between a name and its index", name);
        if (blank || !read_index(r, name, &first, &last)) {
            if (row >= 0)
                r->deck->source[row].bad = true;
            r->recovering = true;
            skip_line(r);
            return;
        }
    }
    struct deck_reader before = *r;
    skip_space(r);
    if (peek(r) != '=') {
        if (!r->recovering)
            fault(r, p, "'=' missing after %s", name);
        r->at = before.at, r->line = before.line, r->column = before.column;
        r->recovering = true;
        skip_line(r);
        return;
    }
    advance(r);
    r->recovering = false;
    skip_blanks(r);
    bool comment = peek(r) == '!'; /* gfortran reads no value after it */
    if (comment)
        fault(r, here(r), "%s: no comment between = and the value on the same line", name);
    struct deck_values *values = xcalloc(1, sizeof *values);
    values->faulty = comment;
    read_values(r, name, p, values);
    if (known && row < 0) {
        deck_text_fault_item(r, p, "&%s has no key '%s'%s",
                             deck_table[deck_table_group(group)].group, name,
                             deck_table_suggest(group, name, hint, sizeof hint));
    } else if (row >= 0) {
        deck_value_set_item(r, row, p, first, last, values);
    }
    for (int i = 0; i < values->n; i++)
        free(values->v[i].token);
    free(values);
}

/* From "&" to "/". */
static void read_group(struct deck_reader *r)
{
    struct deck_place p = here(r);
    char name[DECK_NAME_MAX + 1], hint[200], text[DECK_SHOWN];
    advance(r);
    r->groups++;
    if (is_blank(peek(r)))
        fault(r, here(r), "no blank between & and the name of a group");
    skip_blanks(r);
    if (!is_letter(peek(r))) {
        fault(r, p, "the name of a group is missing after &");
        skip_line(r);
        return;
    }
    read_name(r, name);
    if (!strcasecmp(name, "end")) {
        fault(r, p, "&end outside a group; a group ends with /");
        skip_line(r);
        return;
    }
    if (!is_end(peek(r)) && peek(r) != '/') {
        fault(r, here(r), "unexpected '%s' after &%s", text_here(r, text), name);
        skip_line(r);
    }
    int row = deck_table_group(name);
    if (row < 0) {
        fault(r, p, "there is no group &%s%s", name,
              deck_table_suggest(name, NULL, hint, sizeof hint));
    } else if (r->group_line[row]) {
        fault(r, p, "&%s is given twice, on lines %d and %d", name, r->group_line[row], p.line);
        row = -1;
    } else {
        r->group_line[row] = p.line;
    }
    while (!r->stop) {
        skip_space(r);
        int c = peek(r);
        if (c < 0) {
            fault(r, here(r), "&%s opened at line %d is not closed: '/' is missing", name, p.line);
            return;
        }
        if (c == '&' || c == '$') {
            if (at_end_word(r)) {
                fault(r, here(r), "write / to end a group, not %cend", c);
                skip_line(r);
            } else {
                fault(r, here(r), "&%s opened at line %d is not closed before '%s': '/' is missing",
                      name, p.line, text_here(r, text));
            }
            return;
        }
        if (c == '/') {
            advance(r);
            skip_blanks(r);
            if (!is_end(peek(r))) {
                fault(r, here(r), "unexpected '%s' after the / that ends &%s", text_here(r, text),
                      name);
                skip_line(r);
            }
            return;
        }
        if (is_letter(c)) {
            read_item(r, name, row >= 0);
            continue;
        }
        if (!r->recovering) {
            fault(r, here(r), "unexpected '%s' in &%s%s", text_here(r, text), name,
                  c == '#' ? "; comments start with !" : "");
            r->recovering = true;
        }
        skip_line(r);
    }
}

int deck_text_parse(struct deck *deck, const char *text, size_t length, struct errors *errors)
{
    struct deck_reader *r = xcalloc(1, sizeof *r);
    *r = (struct deck_reader){ .deck = deck, .errors = errors, .line = 1, .column = 1 };
    char *copy = NULL, shown_text[DECK_SHOWN];
    int groups = -1;
    if (length > DECK_FILE_MAX) {
        fault(r, here(r), "the deck is larger than %d bytes", DECK_FILE_MAX);
    } else {
        copy = xmalloc(length + 1, 1);
        if (deck_text_load(r, text, length, copy)) {
            bool stray = false;
            while (!r->stop) {
                skip_space(r);
                int c = peek(r);
                if (c < 0)
                    break;
                if (c == '&') {
                    stray = false;
                    read_group(r);
                    continue;
                }
                if (!stray) {
                    const char *hint = c == '#'   ? "; comments start with !"
                                       : c == '$' ? "; a group starts with &"
                                                  : "; did you forget &?";
                    fault(r, here(r), "text outside a group: '%s'%s", text_here(r, shown_text),
                          hint);
                }
                stray = true;
                skip_line(r);
            }
            groups = r->groups;
            if (groups == 0 && !stray)
                fault(r, (struct deck_place){ 1, 1 }, "the deck is empty: it has no group");
        }
    }
    free(copy);
    free(r);
    return groups;
}
