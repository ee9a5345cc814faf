/* tokenizer_json.c - tokenizer.json to struct tokenizer.
 *
 * Whatever would change ids and is not implemented is refused with its place in the file; a key
 * this reader does not know is ignored only where the Hugging Face reader ignores it, too.
 * `truncation`, `padding`, `decoder` and `post_processor` do not matter here: nothing is cut,
 * padded or added, and ids become text as ByteLevel does it.
 */
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <jansson.h>
#include "check.h"
#include "tokenizer_internal.h"

struct parsing {
    struct tokenizer *t;
    char *why;
    size_t why_size;
    bool byte_level_seen;
};

static bool fail(struct parsing *p, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static bool read_flag(struct parsing *p, const json_t *object, const char *where, const char *key,
                      bool missing, bool *value);
static bool read_normalizer(struct parsing *p, const json_t *normalizer);
static bool read_model(struct parsing *p, const json_t *model);
static bool read_vocab(struct parsing *p, json_t *vocab);
static bool read_bytes(struct parsing *p, const json_t *model);
static bool read_merges(struct parsing *p, const json_t *merges);
static bool read_added(struct parsing *p, const json_t *added);
static bool read_pre_tokenizer(struct parsing *p, const json_t *pre, int depth);

bool tokenizer_parse(struct tokenizer *t, const char *json, size_t n, char *why, size_t why_size)
{
    struct parsing p = { .t = t, .why = why, .why_size = why_size };
    json_error_t error;
    json_t *root = json_loadb(json, n, JSON_REJECT_DUPLICATES, &error);
    if (!root) {
        char text[JSON_ERROR_TEXT_LENGTH * 4];
        return fail(&p, "line %d, column %d: %s", error.line, error.column,
                    error.text[0] ? printable(text, sizeof text, error.text) : "out of memory");
    }
    const json_t *added = json_object_get(root, "added_tokens");
    bool ok = json_is_object(root) && json_is_object(json_object_get(root, "model"));
    if (!ok)
        fail(&p, "no object with a 'model' object in it; is this a tokenizer.json?");
    ok = ok && read_normalizer(&p, json_object_get(root, "normalizer")) &&
         read_model(&p, json_object_get(root, "model")) && read_added(&p, added);
    if (ok && !json_is_object(json_object_get(root, "pre_tokenizer")))
        ok = fail(&p, "no 'pre_tokenizer': only byte-level tokenizers are supported");
    ok = ok && read_pre_tokenizer(&p, json_object_get(root, "pre_tokenizer"), 0);
    if (ok && !p.byte_level_seen)
        ok =
            fail(&p, "pre_tokenizer: no ByteLevel in it; only byte-level tokenizers are supported");
    json_decref(root);
    return ok;
}

static bool fail(struct parsing *p, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    vsnprintf(p->why, p->why_size, fmt, args);
    va_end(args);
    return false;
}

/* true or false at `key`; `missing` if it is absent or null. */
static bool read_flag(struct parsing *p, const json_t *object, const char *where, const char *key,
                      bool missing, bool *value)
{
    const json_t *v = json_object_get(object, key);
    *value = v && !json_is_null(v) ? json_is_true(v) : missing;
    return !v || json_is_null(v) || json_is_boolean(v)
               ? true
               : fail(p, "%s.%s: must be true or false", where, key);
}

static const char *type_of(const json_t *object)
{
    const char *type = json_string_value(json_object_get(object, "type"));
    return type ? type : "";
}

static bool read_normalizer(struct parsing *p, const json_t *normalizer)
{
    if (!normalizer || json_is_null(normalizer))
        return true;
    const json_t *list = json_object_get(normalizer, "normalizers");
    if (!strcmp(type_of(normalizer), "Sequence") && json_is_array(list) &&
        json_array_size(list) == 0)
        return true;
    char shown[64];
    return fail(p,
                "normalizer '%s': text is taken as it is, so a normalizer would give other tokens "
                "than the file means",
                printable(shown, sizeof shown, type_of(normalizer)));
}

/* --- model --- */

static bool read_model(struct parsing *p, const json_t *model)
{
    char shown[64];
    const json_t *type = json_object_get(model, "type");
    if (type && strcmp(type_of(model), "BPE") != 0)
        return fail(p, "model.type is '%s', only BPE is supported",
                    printable(shown, sizeof shown, type_of(model)));
    static const char *const affix[] = { "continuing_subword_prefix", "end_of_word_suffix" };
    for (int i = 0; i < 2; i++) {
        const json_t *v = json_object_get(model, affix[i]);
        if (v && !json_is_null(v) && !(json_is_string(v) && json_string_length(v) == 0))
            return fail(p, "model.%s: not supported", affix[i]);
    }
    const json_t *dropout = json_object_get(model, "dropout");
    if (dropout && !json_is_null(dropout) &&
        !(json_is_number(dropout) && json_number_value(dropout) == 0))
        return fail(p, "model.dropout: not supported, tokens would be random");
    bool byte_fallback = false;
    if (!read_flag(p, model, "model", "byte_fallback", false, &byte_fallback) ||
        !read_flag(p, model, "model", "ignore_merges", false, &p->t->ignore_merges))
        return false;
    if (byte_fallback)
        return fail(p, "model.byte_fallback: not supported");
    return read_vocab(p, json_object_get(model, "vocab")) && read_bytes(p, model) &&
           read_merges(p, json_object_get(model, "merges"));
}

static bool read_vocab(struct parsing *p, json_t *vocab)
{
    if (!json_is_object(vocab) || json_object_size(vocab) == 0)
        return fail(p, "model.vocab: must be an object of token: id");
    const char *text;
    json_t *value;
    char shown[64];
    json_object_foreach(vocab, text, value)
    {
        const size_t n = strlen(text);
        const json_int_t id = json_is_integer(value) ? json_integer_value(value) : -1;
        if (id < 0 || id >= TOKENIZER_MAX_IDS)
            return fail(p, "model.vocab['%s']: the id must be an integer in 0..%d",
                        printable(shown, sizeof shown, text), TOKENIZER_MAX_IDS - 1);
        if (n > TOKENIZER_MAX_TOKEN)
            return fail(p, "model.vocab: the token of id %" PRId64 " has %zu bytes, more than %d",
                        (int64_t)id, n, TOKENIZER_MAX_TOKEN);
        if (!vocab_add(&p->t->vocab, text, n, id))
            return fail(p, "model.vocab['%s']: id %" PRId64 " is used twice",
                        printable(shown, sizeof shown, text), (int64_t)id);
    }
    return true;
}

/* Tokens of the 256 bytes. A byte without one becomes unk_token if the model has that. */
static bool read_bytes(struct parsing *p, const json_t *model)
{
    const struct vocab *v = &p->t->vocab;
    const json_t *unk = json_object_get(model, "unk_token");
    int64_t unk_id = -1;
    bool fuse = false;
    char shown[64];
    if (unk && !json_is_null(unk)) {
        if (!json_is_string(unk))
            return fail(p, "model.unk_token: must be a string");
        unk_id = vocab_find(v, json_string_value(unk), json_string_length(unk));
        /* a file may name a token that only added_tokens has; it matters only if a byte has none */
    }
    if (!read_flag(p, model, "model", "fuse_unk", false, &fuse))
        return false;
    int lacking = 0;
    for (int b = 0; b < 256; b++) {
        const int32_t c = bpe_code_point((uint8_t)b);
        const char utf8[2] = { (char)(c < 0x80 ? c : 0xc0 | c >> 6), (char)(0x80 | (c & 0x3f)) };
        const int64_t id = vocab_find(v, utf8, c < 0x80 ? 1 : 2);
        lacking += id < 0;
        p->t->byte_id[b] = (int32_t)(id >= 0 ? id : unk_id);
    }
    if (lacking && unk_id < 0 && unk && !json_is_null(unk))
        return fail(p, "model.unk_token '%s': not in model.vocab, and %d bytes have no token",
                    printable(shown, sizeof shown, json_string_value(unk)), lacking);
    if (lacking && fuse && unk_id >= 0)
        return fail(p, "model.fuse_unk: not supported when bytes lack tokens (%d do)", lacking);
    return true;
}

/* One merge: its two strings in either spelling; false with why. */
static bool merge_parts(struct parsing *p, const json_t *entry, size_t index, const char *part[2],
                        size_t length[2])
{
    if (json_is_array(entry) && json_array_size(entry) == 2 &&
        json_is_string(json_array_get(entry, 0)) && json_is_string(json_array_get(entry, 1))) {
        part[0] = json_string_value(json_array_get(entry, 0));
        length[0] = json_string_length(json_array_get(entry, 0));
        part[1] = json_string_value(json_array_get(entry, 1));
        length[1] = json_string_length(json_array_get(entry, 1));
    } else if (json_is_string(entry)) {
        const char *text = json_string_value(entry), *space = strchr(text, ' ');
        if (!space || strchr(space + 1, ' '))
            return fail(p, "model.merges[%zu]: must be two tokens with one blank between", index);
        part[0] = text;
        length[0] = (size_t)(space - text);
        part[1] = space + 1;
        length[1] = strlen(space + 1);
    } else {
        return fail(p, "model.merges[%zu]: must be \"a b\" or [\"a\", \"b\"]", index);
    }
    if (length[0] == 0 || length[1] == 0 || length[0] + length[1] > TOKENIZER_MAX_TOKEN)
        return fail(p, "model.merges[%zu]: an empty or oversized token", index);
    return true;
}

static bool read_merges(struct parsing *p, const json_t *merges)
{
    if (!json_is_array(merges))
        return fail(p, "model.merges: must be a list");
    const size_t count = json_array_size(merges);
    if (count > TOKENIZER_MAX_MERGES)
        return fail(p, "model.merges: %zu entries, more than %d", count, TOKENIZER_MAX_MERGES);
    const struct vocab *v = &p->t->vocab;
    merges_init(&p->t->merges, count);
    char joined[TOKENIZER_MAX_TOKEN];
    int32_t rank = 0;
    for (size_t i = 0; i < count; i++) {
        const json_t *entry = json_array_get(merges, i);
        if (json_is_string(entry) && !strncmp(json_string_value(entry), "#version", 8))
            continue; /* first line of a merges.txt */
        const char *part[2] = { "", "" };
        size_t length[2] = { 0 };
        if (!merge_parts(p, entry, i, part, length))
            return false;
        memcpy(joined, part[0], length[0]);
        memcpy(joined + length[0], part[1], length[1]);
        const int64_t left = vocab_find(v, part[0], length[0]),
                      right = vocab_find(v, part[1], length[1]);
        const int64_t result = vocab_find(v, joined, length[0] + length[1]);
        if (left < 0 || right < 0 || result < 0)
            return fail(p, "model.merges[%zu]: %s is not in model.vocab", i,
                        left < 0    ? "its first token"
                        : right < 0 ? "its second token"
                                    : "the merged token");
        merges_add(&p->t->merges, (int32_t)left, (int32_t)right, rank++, (int32_t)result);
    }
    return true;
}

/* --- added tokens --- */

static bool read_added_token(struct parsing *p, const json_t *entry, size_t index)
{
    struct tokenizer *t = p->t;
    char where[48], shown[64];
    snprintf(where, sizeof where, "added_tokens[%zu]", index);
    const json_t *content = json_object_get(entry, "content"),
                 *number = json_object_get(entry, "id");
    if (!json_is_string(content) || !json_is_integer(number) || json_integer_value(number) < 0 ||
        json_integer_value(number) >= TOKENIZER_MAX_IDS)
        return fail(p, "%s: needs a string 'content' and an 'id' in 0..%d", where,
                    TOKENIZER_MAX_IDS - 1);
    const char *text = json_string_value(content);
    const size_t n = json_string_length(content);
    const int64_t id = json_integer_value(number);
    if (n == 0)
        return true; /* the Hugging Face reader ignores it */
    if (n > TOKENIZER_MAX_TOKEN)
        return fail(p, "%s: a token of %zu bytes, more than %d", where, n, TOKENIZER_MAX_TOKEN);
    struct added_token a = { .id = (int32_t)id };
    bool special = false;
    if (!read_flag(p, entry, where, "special", false, &special) ||
        !read_flag(p, entry, where, "single_word", false, &a.single_word) ||
        !read_flag(p, entry, where, "lstrip", false, &a.lstrip) ||
        !read_flag(p, entry, where, "rstrip", false, &a.rstrip) ||
        !read_flag(p, entry, where, "normalized", !special, &a.normalized))
        return false;
    const int64_t known = vocab_find(&t->vocab, text, n);
    if (known >= 0 && known != id)
        return fail(p, "%s: '%s' has id %" PRId64 " here and %" PRId64 " before", where,
                    printable(shown, sizeof shown, text), id, known);
    for (int64_t i = 0; i < t->added_count; i++)
        if (known >= 0 && t->added[i].id == id)
            return true; /* listed twice */
    a.in_model = known >= 0;
    if (known < 0 && !vocab_add(&t->vocab, text, n, id))
        return fail(p, "%s: '%s' has id %" PRId64 ", which is another token's", where,
                    printable(shown, sizeof shown, text), id);
    if (a.single_word && !t->word) {
        static const char word[] = "\\A[\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\p{Join_Control}]";
        t->word = regex_new(word, sizeof word - 1, false, p->why, p->why_size);
        if (!t->word)
            return false;
    }
    tokenizer_trie_add(t, a.normalized, text, n, (int32_t)t->added_count);
    t->added[t->added_count++] = a;
    return true;
}

static bool read_added(struct parsing *p, const json_t *added)
{
    struct tokenizer *t = p->t;
    const size_t count = added && !json_is_null(added) ? json_array_size(added) : 0;
    if (added && !json_is_null(added) && !json_is_array(added))
        return fail(p, "added_tokens: must be a list");
    if (count > 65536)
        return fail(p, "added_tokens: %zu entries, more than 65536", count);
    t->added = xcalloc(count + 1, sizeof *t->added);
    for (size_t i = 0; i < count; i++)
        if (!read_added_token(p, json_array_get(added, i), i))
            return false;
    t->added_of = xmalloc((size_t)t->vocab.ids, sizeof *t->added_of);
    for (int64_t id = 0; id < t->vocab.ids; id++)
        t->added_of[id] = -1;
    for (int64_t i = 0; i < t->added_count; i++)
        t->added_of[t->added[i].id] = (int32_t)i;
    return true;
}

/* --- pre-tokenizer --- */

static bool read_split(struct parsing *p, const json_t *split)
{
    static const char *const name[] = { "Isolated", "Removed", "Contiguous", "MergedWithPrevious",
                                        "MergedWithNext" };
    struct tokenizer *t = p->t;
    if (t->steps == TOKENIZER_MAX_STEPS)
        return fail(p, "pre_tokenizer: more than %d Split steps", TOKENIZER_MAX_STEPS);
    struct split_step *step = &t->step[t->steps];
    const json_t *pattern = json_object_get(split, "pattern");
    const json_t *regex = json_object_get(pattern, "Regex"),
                 *literal = json_object_get(pattern, "String");
    const json_t *text = json_is_string(regex) ? regex : literal;
    if (!json_is_string(text) || json_object_size(pattern) != 1)
        return fail(p,
                    "pre_tokenizer: Split.pattern must be {\"Regex\": ...} or {\"String\": ...}");
    const char *behaviour = json_string_value(json_object_get(split, "behavior"));
    int b = 0;
    while (b < 5 && (!behaviour || strcmp(behaviour, name[b]) != 0))
        b++;
    if (b == 5) {
        char shown[64];
        return fail(p, "pre_tokenizer: Split.behavior is '%s', which is none of those known",
                    printable(shown, sizeof shown, behaviour ? behaviour : ""));
    }
    step->behaviour = (enum split_behaviour)b;
    if (!read_flag(p, split, "pre_tokenizer: Split", "invert", false, &step->invert))
        return false;
    char why[400];
    step->regex = regex_new(json_string_value(text), json_string_length(text), text == literal, why,
                            sizeof why);
    if (!step->regex)
        return fail(p, "pre_tokenizer: %s", why);
    t->steps++;
    return true;
}

static bool read_byte_level(struct parsing *p, const json_t *byte_level)
{
    static const char gpt2[] =
        "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
    bool use_regex = true;
    if (!read_flag(p, byte_level, "pre_tokenizer: ByteLevel", "add_prefix_space", true,
                   &p->t->add_prefix_space) ||
        !read_flag(p, byte_level, "pre_tokenizer: ByteLevel", "use_regex", true, &use_regex))
        return false;
    if (use_regex) {
        p->t->byte_level = regex_new(gpt2, sizeof gpt2 - 1, false, p->why, p->why_size);
        ASSERT(p->t->byte_level);
    }
    p->byte_level_seen = true;
    return true;
}

static bool read_pre_tokenizer(struct parsing *p, const json_t *pre, int depth)
{
    char shown[64];
    const char *type = type_of(pre);
    if (p->byte_level_seen)
        return fail(p, "pre_tokenizer: '%s' after ByteLevel: not supported",
                    printable(shown, sizeof shown, type));
    if (!strcmp(type, "Split"))
        return read_split(p, pre);
    if (!strcmp(type, "ByteLevel"))
        return read_byte_level(p, pre);
    const json_t *list = json_object_get(pre, "pretokenizers");
    if (!strcmp(type, "Sequence") && json_is_array(list) && depth < 8) {
        for (size_t i = 0; i < json_array_size(list); i++)
            if (!read_pre_tokenizer(p, json_array_get(list, i), depth + 1))
                return false;
        return true;
    }
    return fail(p, "pre_tokenizer: type '%s' is not supported (Sequence, Split and ByteLevel are)",
                printable(shown, sizeof shown, type));
}
