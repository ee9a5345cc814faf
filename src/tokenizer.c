/* tokenizer.c - see tokenizer.h. Here: opening a file, cutting added tokens out of the text, ids
 * back to text. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include "check.h"
#include "file.h"
#include "tokenizer_internal.h"

static char *read_file(const char *path, size_t *n, char *why, size_t why_size);
static bool encode_with(struct tokenizer *t, int root, const char *text, size_t n,
                        struct token_sink *sink);
static size_t decode_token(const struct tokenizer *t, int64_t id, char *out, size_t size);

struct tokenizer *tokenizer_open(const char *path, char *why, size_t why_size)
{
    size_t n = 0;
    char *json = read_file(path, &n, why, why_size);
    if (!json)
        return NULL;
    struct tokenizer *t = xcalloc(1, sizeof *t);
    t->step = xcalloc(TOKENIZER_MAX_STEPS, sizeof *t->step);
    t->node_capacity = 64;
    t->node = xmalloc((size_t)t->node_capacity, sizeof *t->node);
    t->nodes = 2;
    t->node[0] = t->node[1] = (struct trie_node){ -1, -1, -1, 0 };
    const bool ok = tokenizer_parse(t, json, n, why, why_size);
    free(json);
    if (!ok) {
        tokenizer_free(t);
        return NULL;
    }
    return t;
}

void tokenizer_free(struct tokenizer *t)
{
    if (!t)
        return;
    vocab_free(&t->vocab);
    merges_free(&t->merges);
    free(t->added);
    free(t->added_of);
    free(t->node);
    regex_free(t->word);
    for (int64_t i = 0; i < t->steps; i++)
        regex_free(t->step[i].regex);
    free(t->step);
    regex_free(t->byte_level);
    free(t->now.piece);
    free(t->next.piece);
    free(t->matches.piece);
    free(t->symbol);
    free(t->heap);
    free(t->mapped);
    free(t->prefixed);
    free(t);
}

int64_t tokenizer_size(const struct tokenizer *t)
{
    return t->vocab.ids;
}

int64_t tokenizer_id(const struct tokenizer *t, const char *token)
{
    return vocab_find(&t->vocab, token, strlen(token));
}

bool tokenizer_is_added(const struct tokenizer *t, int64_t id)
{
    return id >= 0 && id < t->vocab.ids && t->added_of[id] >= 0;
}

int64_t tokenizer_encode(struct tokenizer *t, const char *text, size_t n, int64_t **ids,
                         int64_t *capacity, char *why, size_t why_size)
{
    struct token_sink sink = { .ids = ids, .capacity = capacity, .why = why, .why_size = why_size };
    if (n > TOKENIZER_MAX_TEXT) {
        snprintf(why, why_size, "a text of %zu bytes, more than %d", n, TOKENIZER_MAX_TEXT);
        return -1;
    }
    if (!utf8_valid(text, n)) {
        snprintf(why, why_size, "the text is not UTF-8");
        return -1;
    }
    return encode_with(t, 0, text, n, &sink) ? sink.count : -1;
}

size_t tokenizer_decode(const struct tokenizer *t, const int64_t *ids, int64_t n, char *out,
                        size_t size)
{
    size_t used = 0;
    for (int64_t i = 0; i < n; i++)
        used +=
            decode_token(t, ids[i], used < size ? out + used : NULL, used < size ? size - used : 0);
    if (size > 0)
        out[used < size ? used : size - 1] = '\0';
    return used;
}

/* --- file --- */

static char *read_file(const char *path, size_t *n, char *why, size_t why_size)
{
    struct stat st;
    const bool directory = stat(path, &st) == 0 && S_ISDIR(st.st_mode);
    char *file = directory ? xasprintf("%s/tokenizer.json", path) : xstrdup(path);
    char *text = file_read(file, TOKENIZER_MAX_FILE, n, why, why_size);
    free(file);
    return text;
}

/* --- added tokens --- */

void tokenizer_trie_add(struct tokenizer *t, int root, const char *text, size_t n, int32_t index)
{
    int32_t at = root;
    for (size_t i = 0; i < n; i++) {
        int32_t child = t->node[at].child;
        while (child >= 0 && t->node[child].byte != (uint8_t)text[i])
            child = t->node[child].sibling;
        if (child < 0) {
            if (t->nodes == t->node_capacity) {
                t->node_capacity *= 2;
                t->node = xrealloc(t->node, (size_t)t->node_capacity, sizeof *t->node);
            }
            child = (int32_t)t->nodes++;
            t->node[child] = (struct trie_node){ -1, t->node[at].child, -1, (uint8_t)text[i] };
            t->node[at].child = child;
        }
        at = child;
    }
    t->node[at].token = index;
}

/* The longest added token at the start of the text, or -1; its length in *length. */
static int32_t longest_token(const struct tokenizer *t, int root, const char *text, size_t n,
                             size_t *length)
{
    int32_t at = root, found = -1;
    for (size_t i = 0; i < n; i++) {
        at = t->node[at].child;
        while (at >= 0 && t->node[at].byte != (uint8_t)text[i])
            at = t->node[at].sibling;
        if (at < 0)
            break;
        if (t->node[at].token >= 0) {
            found = t->node[at].token;
            *length = i + 1;
        }
    }
    return found;
}

/* Unicode White_Space. */
static bool is_space(int32_t c)
{
    return (c >= 9 && c <= 13) || c == ' ' || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f ||
           c == 0x205f || c == 0x3000;
}

/* Start of the last code point before `end` > 0. */
static size_t previous_start(const char *text, size_t end)
{
    do
        end--;
    while (((unsigned char)text[end] & 0xc0) == 0x80);
    return end;
}

static bool stands_alone(const struct tokenizer *t, const char *text, size_t n, size_t start,
                         size_t stop)
{
    if (start > 0) {
        const size_t before = previous_start(text, start);
        if (regex_matches(t->word, text + before, start - before))
            return false;
    }
    return stop == n || !regex_matches(t->word, text + stop, n - stop);
}

/* Cut the tokens of trie `root` out of the text; what lies between goes to the next trie, then to
 * the pre-tokenizer. */
static bool encode_with(struct tokenizer *t, int root, const char *text, size_t n,
                        struct token_sink *sink)
{
    if (n == 0)
        return true;
    if (root == 2)
        return split_encode(t, text, n, sink);
    if (t->node[root].child < 0)
        return encode_with(t, root + 1, text, n, sink);
    size_t done = 0, at = 0;
    while (at < n) {
        size_t length = 0;
        const int32_t index = longest_token(t, root, text + at, n - at, &length);
        if (index < 0) {
            at++;
            continue;
        }
        const struct added_token *a = &t->added[index];
        size_t start = at, stop = at + length;
        at = stop; /* the search goes on behind the token itself, whatever is stripped */
        if (start < done || (a->single_word && !stands_alone(t, text, n, start, stop)))
            continue;
        while (a->lstrip && start > done) {
            const size_t before = previous_start(text, start);
            size_t bytes;
            if (!is_space(utf8_next(text + before, &bytes)))
                break;
            start = before;
        }
        while (a->rstrip && stop < n) {
            size_t bytes;
            if (!is_space(utf8_next(text + stop, &bytes)))
                break;
            stop += bytes;
        }
        if (!encode_with(t, root + 1, text + done, start - done, sink))
            return false;
        token_push(sink, a->id);
        done = stop;
    }
    return encode_with(t, root + 1, text + done, n - done, sink);
}

/* --- text --- */

/* Bytes of one id, at most `size` of them into out; returns how many there are. */
static size_t decode_token(const struct tokenizer *t, int64_t id, char *out, size_t size)
{
    if (id < 0 || id >= t->vocab.ids || t->vocab.text[id].length < 0)
        return 0;
    const char *text = t->vocab.pool + t->vocab.text[id].at;
    const size_t n = (size_t)t->vocab.text[id].length;
    size_t used = 0, bytes;
    bool spelled = t->added_of[id] < 0; /* in the byte-level alphabet, wholly */
    for (size_t i = 0; spelled && i < n; i += bytes)
        spelled = bpe_byte(utf8_next(text + i, &bytes)) >= 0;
    for (size_t i = 0; i < n; i += bytes, used++) {
        const int value = spelled ? bpe_byte(utf8_next(text + i, &bytes)) : (unsigned char)text[i];
        if (!spelled)
            bytes = 1;
        if (used < size)
            out[used] = (char)value;
    }
    return used;
}
