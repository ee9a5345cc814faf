/* tokenizer_split.c - the pre-tokenizer: Split steps, then ByteLevel's own expression.
 *
 * The patterns of a tokenizer.json are written for Oniguruma (Ruby syntax). They run here on PCRE2
 * in UTF mode with Unicode properties. Where the two dialects differ the pattern is rewritten
 * (classes of space, digit, word) or refused by name; nothing is passed on whose meaning could
 * silently change. Patterns come from files of the internet: start-of-pattern verbs are refused,
 * match, depth and heap limits are on, and a match that gives up is an error of the text.
 * Characters newer than PCRE2's Unicode version (14 in 10.42) have no category here and may be
 * split where a newer library would not.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "check.h"
#include "tokenizer_internal.h"

enum {
    PATTERN_BYTES = 32768,
    MATCH_LIMIT = 10000000,
    HEAP_KIB = 65536,
    JIT_STACK_START = 32 << 10,
    JIT_STACK_MAX = 8 << 20
};

struct regex {
    pcre2_code *code;
    pcre2_match_data *match;
    pcre2_match_context *context;
    pcre2_jit_stack *stack;
};

/* A pattern being rewritten. */
struct rewriting {
    const char *in;
    size_t n, at;
    char *out; /* [capacity] */
    size_t used, capacity;
    bool in_class;
    char *why;
    size_t why_size;
};

static bool rewrite(struct rewriting *w);
static bool split_pieces(struct tokenizer *t, const struct split_step *step, const char *text,
                         struct token_sink *sink);
static bool find_matches(struct regex *r, const char *text, struct piece whole, struct pieces *out,
                         struct token_sink *sink);
static bool encode_byte_level(struct tokenizer *t, const char *text, size_t n,
                              struct token_sink *sink);
static void pieces_push(struct pieces *p, struct piece piece);

struct regex *regex_new(const char *pattern, size_t n, bool literal, char *why, size_t why_size)
{
    if (n == 0 || n > PATTERN_BYTES) {
        snprintf(why, why_size, "a pattern of %zu bytes (1 to %d are accepted)", n, PATTERN_BYTES);
        return NULL;
    }
    struct rewriting w = {
        .in = pattern, .n = n, .capacity = 64 * n + 64, .why = why, .why_size = why_size
    };
    w.out = xmalloc(w.capacity, 1);
    if (!literal && !rewrite(&w)) {
        free(w.out);
        return NULL;
    }
    const uint32_t options =
        literal ? PCRE2_LITERAL | PCRE2_UTF
                : PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C;
    pcre2_compile_context *compile = pcre2_compile_context_create(NULL);
    ASSERT(compile);
    pcre2_set_newline(compile, PCRE2_NEWLINE_LF);
    int code = 0;
    PCRE2_SIZE offset = 0;
    struct regex *r = xcalloc(1, sizeof *r);
    r->code = pcre2_compile((PCRE2_SPTR)(literal ? pattern : w.out), literal ? n : w.used, options,
                            &code, &offset, compile);
    pcre2_compile_context_free(compile);
    free(w.out);
    if (!r->code) {
        char text[128] = "", shown[160];
        pcre2_get_error_message(code, (PCRE2_UCHAR *)text, sizeof text);
        snprintf(why, why_size, "the pattern '%s' does not compile: %s",
                 printable(shown, sizeof shown, pattern), text);
        free(r);
        return NULL;
    }
    pcre2_jit_compile(
        r->code, PCRE2_JIT_COMPLETE); /* without it the interpreter runs: slower, same result */
    r->match = pcre2_match_data_create_from_pattern(r->code, NULL);
    r->context = pcre2_match_context_create(NULL);
    r->stack = pcre2_jit_stack_create(JIT_STACK_START, JIT_STACK_MAX, NULL);
    ASSERT(r->match && r->context);
    pcre2_set_match_limit(r->context, MATCH_LIMIT);
    pcre2_set_heap_limit(r->context, HEAP_KIB);
    if (r->stack)
        pcre2_jit_stack_assign(r->context, NULL, r->stack);
    return r;
}

bool regex_matches(const struct regex *r, const char *text, size_t n)
{
    return pcre2_match(r->code, (PCRE2_SPTR)text, n, 0, PCRE2_NO_UTF_CHECK, r->match, r->context) >=
           0;
}

void regex_free(struct regex *r)
{
    if (!r)
        return;
    pcre2_match_data_free(r->match);
    pcre2_match_context_free(r->context);
    pcre2_jit_stack_free(r->stack);
    pcre2_code_free(r->code);
    free(r);
}

bool split_encode(struct tokenizer *t, const char *text, size_t n, struct token_sink *sink)
{
    t->now.count = 0;
    pieces_push(&t->now, (struct piece){ 0, n, false });
    for (int64_t i = 0; i < t->steps; i++) {
        if (!split_pieces(t, &t->step[i], text, sink))
            return false;
        const struct pieces swap = t->now;
        t->now = t->next;
        t->next = swap;
    }
    for (int64_t i = 0; i < t->now.count; i++)
        if (!encode_byte_level(t, text + t->now.piece[i].at, t->now.piece[i].n, sink))
            return false;
    return true;
}

/* --- steps --- */

/* t->now split into t->next. */
static bool split_pieces(struct tokenizer *t, const struct split_step *step, const char *text,
                         struct token_sink *sink)
{
    struct pieces *m = &t->matches, *out = &t->next;
    out->count = 0;
    for (int64_t i = 0; i < t->now.count; i++) {
        const int64_t start = out->count;
        if (!find_matches(step->regex, text, t->now.piece[i], m, sink))
            return false;
        bool previous = false;
        for (int64_t j = 0; j < m->count; j++) {
            struct piece p = m->piece[j];
            p.match ^= step->invert;
            struct piece *last = out->count > start ? &out->piece[out->count - 1] : NULL;
            bool join = false;
            if (step->behaviour == SPLIT_CONTIGUOUS)
                join = last && p.match == previous;
            else if (step->behaviour == SPLIT_MERGED_WITH_PREVIOUS)
                join = last && p.match && !previous;
            else if (step->behaviour == SPLIT_MERGED_WITH_NEXT)
                join = last && !p.match && previous;
            const bool dropped = step->behaviour == SPLIT_REMOVED && p.match;
            if (join)
                last->n += p.n;
            else if (!dropped)
                pieces_push(out, p);
            previous = p.match;
        }
        /* empty pieces vanish */
        int64_t kept = start;
        for (int64_t j = start; j < out->count; j++)
            if (out->piece[j].n > 0)
                out->piece[kept++] = out->piece[j];
        out->count = kept;
    }
    return true;
}

/* The whole piece as alternating matches and gaps, in order. An empty match counts, except right
 * behind another match. */
static bool find_matches(struct regex *r, const char *text, struct piece whole, struct pieces *out,
                         struct token_sink *sink)
{
    const char *base = text + whole.at;
    size_t from = 0, done = 0, last_end = (size_t)-1;
    out->count = 0;
    while (from <= whole.n) {
        const int code = pcre2_match(r->code, (PCRE2_SPTR)base, whole.n, from, PCRE2_NO_UTF_CHECK,
                                     r->match, r->context);
        if (code == PCRE2_ERROR_NOMATCH)
            break;
        if (code < 0) {
            char reason[128] = "";
            pcre2_get_error_message(code, (PCRE2_UCHAR *)reason, sizeof reason);
            snprintf(sink->why, sink->why_size,
                     "the tokenizer's pattern gave up on a text of %zu bytes: %s", whole.n, reason);
            return false;
        }
        const PCRE2_SIZE *range = pcre2_get_ovector_pointer(r->match);
        const size_t start = range[0], end = range[1];
        if (start == end && end == last_end) {
            size_t step = 1;
            if (from < whole.n)
                utf8_next(base + from, &step);
            from += step;
            continue;
        }
        if (start > done)
            pieces_push(out, (struct piece){ whole.at + done, start - done, false });
        pieces_push(out, (struct piece){ whole.at + start, end - start, true });
        done = from = last_end = end;
    }
    if (done < whole.n)
        pieces_push(out, (struct piece){ whole.at + done, whole.n - done, false });
    return true;
}

static bool encode_byte_level(struct tokenizer *t, const char *text, size_t n,
                              struct token_sink *sink)
{
    if (t->add_prefix_space && text[0] != ' ') {
        if (n + 1 > t->prefixed_capacity) {
            t->prefixed_capacity = 2 * (n + 1);
            t->prefixed = xrealloc(t->prefixed, t->prefixed_capacity, 1);
        }
        t->prefixed[0] = ' ';
        memcpy(t->prefixed + 1, text, n);
        text = t->prefixed;
        n++;
    }
    if (!t->byte_level)
        return bpe_encode(t, text, n, sink);
    if (!find_matches(t->byte_level, text, (struct piece){ 0, n, false }, &t->matches, sink))
        return false;
    for (int64_t i = 0; i < t->matches.count; i++) {
        const struct piece *p = &t->matches.piece[i];
        if (p->n > 0 && !bpe_encode(t, text + p->at, p->n, sink))
            return false;
    }
    return true;
}

static void pieces_push(struct pieces *p, struct piece piece)
{
    if (p->count == p->capacity) {
        p->capacity = p->capacity ? 2 * p->capacity : 64;
        p->piece = xrealloc(p->piece, (size_t)p->capacity, sizeof *p->piece);
    }
    ASSERT(p->piece);
    p->piece[p->count++] = piece;
}

/* --- patterns --- */

static bool refuse(struct rewriting *w, const char *what)
{
    char shown[160];
    snprintf(w->why, w->why_size, "the pattern '%s' uses %s at byte %zu, which is not supported",
             printable(shown, sizeof shown, w->in), what, w->at);
    return false;
}

static void emit(struct rewriting *w, const char *text, size_t n)
{
    ASSERT(w->used + n <= w->capacity);
    memcpy(w->out + w->used, text, n);
    w->used += n;
}

static void emit_text(struct rewriting *w, const char *text)
{
    emit(w, text, strlen(text));
}

/* w->at is behind the backslash. */
static bool rewrite_escape(struct rewriting *w)
{
    if (w->at == w->n)
        return refuse(w, "a backslash at its end");
    const char c = w->in[w->at];
    /* Oniguruma's table of Latin-1 counts the superscripts and fractions, too */
    const char *const word =
        "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}";
    w->at++;
    switch (c) {
    case 's': emit_text(w, "\\p{White_Space}"); return true;
    case 'S': emit_text(w, "\\P{White_Space}"); return true;
    case 'd': emit_text(w, "\\p{Nd}"); return true;
    case 'D': emit_text(w, "\\P{Nd}"); return true;
    case 'W':
        if (w->in_class)
            return refuse(w, "\\W inside a class");
        emit_text(w, "[^");
        emit_text(w, word);
        emit_text(w, "]");
        return true;
    case 'w':
        emit_text(w, w->in_class ? "" : "[");
        emit_text(w, word);
        emit_text(w, w->in_class ? "" : "]");
        return true;
    case 'p':
    case 'P':
    case 'x': { /* the braces belong to it, they are no counter */
        emit(w, w->in + w->at - 2, 2);
        if (w->at < w->n && w->in[w->at] == '{') {
            const char *close = memchr(w->in + w->at, '}', w->n - w->at);
            if (!close)
                return refuse(w, "an open brace");
            emit(w, w->in + w->at, (size_t)(close + 1 - (w->in + w->at)));
            w->at = (size_t)(close + 1 - w->in);
        } else if (c != 'x')
            return refuse(w, "a property without braces");
        return true;
    }
    case 'u':
        if (w->n - w->at < 4)
            return refuse(w, "\\u without four digits");
        emit_text(w, "\\x{");
        emit(w, w->in + w->at, 4);
        emit_text(w, "}");
        w->at += 4;
        return true;
    case 'r':
    case 'n':
    case 't':
    case 'f':
    case 'v':
    case 'e':
    case 'a':
    case 'A':
    case 'z':
        if (c == 'v') { /* PCRE2: any vertical space */
            emit_text(w, "\\x0b");
            return true;
        }
        emit(w, w->in + w->at - 2, 2);
        return true;
    default:
        if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9'))
            return refuse(w, "an escape of a letter or digit");
        emit(w, w->in + w->at - 2, 2);
        return true;
    }
}

static bool rewrite_group(struct rewriting *w)
{
    static const char *const known[] = {
        "(?:", "(?i:", "(?i)", "(?=", "(?!", "(?<=", "(?<!", "(?>"
    };
    if (w->at + 1 < w->n && w->in[w->at + 1] == '*')
        return refuse(w, "a verb");
    if (w->at + 1 >= w->n || w->in[w->at + 1] != '?') {
        emit(w, "(", 1);
        w->at++;
        return true;
    }
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        const size_t n = strlen(known[i]);
        if (w->n - w->at >= n && !memcmp(w->in + w->at, known[i], n)) {
            emit(w, known[i], n);
            w->at += n;
            return true;
        }
    }
    return refuse(w, "a group other than (?: (?i: (?i) (?= (?! (?<= (?<! (?>");
}

static bool rewrite_class_start(struct rewriting *w)
{
    w->in_class = true;
    emit(w, "[", 1);
    w->at++;
    if (w->at < w->n && w->in[w->at] == '^') {
        emit(w, "^", 1);
        w->at++;
    }
    return w->at < w->n && w->in[w->at] == ']' ? refuse(w, "an empty class") : true;
}

/* A counter {n}, {n,} or {n,m}; a plus behind it means something else in each dialect. */
static bool rewrite_counter(struct rewriting *w)
{
    size_t end = w->at + 1;
    while (end < w->n && ((w->in[end] >= '0' && w->in[end] <= '9') || w->in[end] == ','))
        end++;
    if (end >= w->n || w->in[end] != '}' || w->in[w->at + 1] == ',' || w->in[w->at + 1] == '}')
        return refuse(w, "a brace that is not a counter {n}, {n,} or {n,m}");
    if (end + 1 < w->n && w->in[end + 1] == '+')
        return refuse(w, "a counter followed by +");
    emit(w, w->in + w->at, end + 1 - w->at);
    w->at = end + 1;
    return true;
}

static bool rewrite(struct rewriting *w)
{
    while (w->at < w->n) {
        const char c = w->in[w->at];
        bool ok = true;
        if (c == '\\') {
            w->at++;
            ok = rewrite_escape(w);
        } else if (w->in_class) {
            if (c == '[')
                return refuse(w, "a class inside a class");
            if (c == '&' && w->at + 1 < w->n && w->in[w->at + 1] == '&')
                return refuse(w, "an intersection of classes");
            w->in_class = c != ']';
            emit(w, &c, 1);
            w->at++;
        } else if (c == '[') {
            ok = rewrite_class_start(w);
        } else if (c == '(') {
            ok = rewrite_group(w);
        } else if (c == '{') {
            ok = rewrite_counter(w);
        } else {
            emit(w, &c, 1);
            w->at++;
        }
        if (!ok)
            return false;
    }
    return true;
}
