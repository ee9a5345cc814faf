/* tokenizer_bpe.c - the byte-level alphabet, hash tables, and the merging of one piece.
 *
 * Merging: symbols in a doubly linked list, candidate pairs in a binary heap by (rank, position),
 * so the lowest rank goes first and of equal ranks the leftmost. Stale candidates are recognised
 * when they come up: O(n log n) for a piece of n bytes.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "check.h"
#include "tokenizer_internal.h"

static uint64_t hash_bytes(const char *text, size_t n);
static uint64_t hash_pair(int32_t left, int32_t right);
static void heap_push(struct tokenizer *t, int64_t *count, struct candidate c);
static struct candidate heap_pop(struct tokenizer *t, int64_t *count);

/* --- alphabet and UTF-8 --- */

static bool byte_is_printable(int byte)
{
    return (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
}

int32_t bpe_code_point(uint8_t byte)
{
    if (byte_is_printable(byte))
        return byte;
    int32_t code_point = 256; /* the other 68 in ascending order */
    for (int b = 0; b < byte; b++)
        code_point += !byte_is_printable(b);
    return code_point;
}

int bpe_byte(int32_t code_point)
{
    if (code_point < 256)
        return code_point >= 0 && byte_is_printable(code_point) ? code_point : -1;
    for (int b = 0, next = 256; b < 256; b++)
        if (!byte_is_printable(b) && next++ == code_point)
            return b;
    return -1;
}

int32_t utf8_next(const char *text, size_t *length)
{
    const unsigned char *s = (const unsigned char *)text;
    if (s[0] < 0x80) {
        *length = 1;
        return s[0];
    }
    const int more = s[0] >= 0xf0 ? 3 : s[0] >= 0xe0 ? 2 : 1;
    int32_t code_point = s[0] & (0x3f >> more);
    for (int i = 1; i <= more; i++)
        code_point = code_point << 6 | (s[i] & 0x3f);
    *length = (size_t)more + 1;
    return code_point;
}

bool utf8_valid(const char *text, size_t n)
{
    const unsigned char *s = (const unsigned char *)text;
    for (size_t i = 0; i < n;) {
        if (s[i] < 0x80) {
            i++;
            continue;
        }
        const size_t more = s[i] >= 0xf0 ? 3 : s[i] >= 0xe0 ? 2 : 1;
        if (s[i] < 0xc2 || s[i] > 0xf4 || more >= n - i)
            return false;
        for (size_t k = 1; k <= more; k++)
            if ((s[i + k] & 0xc0) != 0x80)
                return false;
        /* overlong forms, surrogates, beyond U+10FFFF */
        if ((s[i] == 0xe0 && s[i + 1] < 0xa0) || (s[i] == 0xed && s[i + 1] > 0x9f) ||
            (s[i] == 0xf0 && s[i + 1] < 0x90) || (s[i] == 0xf4 && s[i + 1] > 0x8f))
            return false;
        i += more + 1;
    }
    return true;
}

/* --- strings --- */

static void vocab_place(struct vocab *v, int64_t id)
{
    const struct vocab_text *t = &v->text[id];
    size_t s = hash_bytes(v->pool + t->at, (size_t)t->length) & (v->slots - 1);
    while (v->slot[s] >= 0)
        s = (s + 1) & (v->slots - 1);
    v->slot[s] = (int32_t)id;
}

static void vocab_grow(struct vocab *v)
{
    v->slots = v->slots ? v->slots * 2 : 1024;
    v->slot = xrealloc(v->slot, v->slots, sizeof *v->slot);
    for (size_t s = 0; s < v->slots; s++)
        v->slot[s] = -1;
    for (int64_t id = 0; id < v->ids; id++)
        if (v->text[id].length >= 0)
            vocab_place(v, id);
}

bool vocab_add(struct vocab *v, const char *text, size_t n, int64_t id)
{
    ASSERT(id >= 0 && id < TOKENIZER_MAX_IDS && n <= TOKENIZER_MAX_TOKEN);
    if (vocab_find(v, text, n) >= 0 || (id < v->ids && v->text[id].length >= 0))
        return false;
    if (id >= v->id_capacity) {
        int64_t capacity = v->id_capacity ? v->id_capacity : 512;
        while (capacity <= id)
            capacity *= 2;
        v->text = xrealloc(v->text, (size_t)capacity, sizeof *v->text);
        v->id_capacity = capacity;
    }
    for (; v->ids <= id; v->ids++)
        v->text[v->ids].length = -1;
    while (!v->pool || v->pool_used + n > v->pool_capacity) { /* an empty token needs a pool, too */
        v->pool_capacity = v->pool_capacity ? v->pool_capacity * 2 : 65536;
        v->pool = xrealloc(v->pool, v->pool_capacity, 1);
    }
    memcpy(v->pool + v->pool_used, text, n);
    v->text[id] = (struct vocab_text){ v->pool_used, (int32_t)n };
    v->pool_used += n;
    v->used++;
    if (2 * v->used > v->slots)
        vocab_grow(v); /* places the new one, too */
    else
        vocab_place(v, id);
    return true;
}

int64_t vocab_find(const struct vocab *v, const char *text, size_t n)
{
    if (v->slots == 0)
        return -1;
    for (size_t s = hash_bytes(text, n) & (v->slots - 1); v->slot[s] >= 0;
         s = (s + 1) & (v->slots - 1)) {
        const struct vocab_text *t = &v->text[v->slot[s]];
        if ((size_t)t->length == n && !memcmp(v->pool + t->at, text, n))
            return v->slot[s];
    }
    return -1;
}

void vocab_free(struct vocab *v)
{
    free(v->pool);
    free(v->text);
    free(v->slot);
    memset(v, 0, sizeof *v);
}

/* --- pairs --- */

void merges_init(struct merges *m, size_t count)
{
    m->slots = 16;
    while (m->slots < 2 * count)
        m->slots *= 2;
    m->slot = xmalloc(m->slots, sizeof *m->slot);
    m->used = 0;
    for (size_t s = 0; s < m->slots; s++)
        m->slot[s].left = -1;
}

static struct merges_slot *merges_place(const struct merges *m, int32_t left, int32_t right)
{
    size_t s = hash_pair(left, right) & (m->slots - 1);
    while (m->slot[s].left >= 0 && (m->slot[s].left != left || m->slot[s].right != right))
        s = (s + 1) & (m->slots - 1);
    return &m->slot[s];
}

void merges_add(struct merges *m, int32_t left, int32_t right, int32_t rank, int32_t result)
{
    struct merges_slot *slot = merges_place(m, left, right);
    if (slot->left < 0)
        m->used++;
    ASSERT(2 * m->used <= m->slots + 1);
    *slot = (struct merges_slot){ left, right, rank, result };
}

/* NULL if the two do not merge. */
static const struct merges_slot *find_merge(const struct merges *m, int32_t left, int32_t right)
{
    const struct merges_slot *slot = merges_place(m, left, right);
    return slot->left < 0 ? NULL : slot;
}

void merges_free(struct merges *m)
{
    free(m->slot);
    memset(m, 0, sizeof *m);
}

/* --- one piece --- */

void token_push(struct token_sink *sink, int64_t id)
{
    if (sink->count == *sink->capacity) {
        *sink->capacity = *sink->capacity ? 2 * *sink->capacity : 256;
        *sink->ids = xrealloc(*sink->ids, (size_t)*sink->capacity, sizeof **sink->ids);
    }
    (*sink->ids)[sink->count++] = id;
}

/* The id of the piece as one token, spelled in the byte-level alphabet; -1 if there is none. */
static int64_t whole_piece(struct tokenizer *t, const char *text, size_t n)
{
    if (2 * n > t->mapped_capacity) {
        t->mapped_capacity = 4 * n;
        t->mapped = xrealloc(t->mapped, t->mapped_capacity, 1);
    }
    size_t used = 0;
    for (size_t i = 0; i < n; i++) {
        const int32_t c = bpe_code_point((uint8_t)text[i]);
        if (c < 0x80)
            t->mapped[used++] = (char)c;
        else {
            t->mapped[used++] = (char)(0xc0 | c >> 6);
            t->mapped[used++] = (char)(0x80 | (c & 0x3f));
        }
    }
    const int64_t id = vocab_find(&t->vocab, t->mapped, used);
    return id >= 0 && t->added_of[id] >= 0 && !t->added[t->added_of[id]].in_model ? -1 : id;
}

static void reserve_symbols(struct tokenizer *t, int64_t n)
{
    if (n <= t->symbol_capacity)
        return;
    t->symbol_capacity = 2 * n;
    t->heap_capacity =
        3 * t->symbol_capacity; /* n - 1 pairs at first, at most two more for each merge */
    t->symbol = xrealloc(t->symbol, (size_t)t->symbol_capacity, sizeof *t->symbol);
    t->heap = xrealloc(t->heap, (size_t)t->heap_capacity, sizeof *t->heap);
}

static void offer_pair(struct tokenizer *t, int64_t *heap_count, int32_t at)
{
    const struct symbol *s = &t->symbol[at];
    const struct merges_slot *m = find_merge(&t->merges, s->id, t->symbol[s->next].id);
    if (m)
        heap_push(t, heap_count, (struct candidate){ m->rank, at, m->result });
}

bool bpe_encode(struct tokenizer *t, const char *text, size_t n, struct token_sink *sink)
{
    if (t->ignore_merges && n <= TOKENIZER_MAX_TOKEN) {
        const int64_t id = whole_piece(t, text, n);
        if (id >= 0) {
            token_push(sink, id);
            return true;
        }
    }
    reserve_symbols(t, (int64_t)n);
    struct symbol *symbol = t->symbol;
    for (size_t i = 0; i < n; i++) {
        const int32_t id = t->byte_id[(uint8_t)text[i]];
        if (id < 0) {
            snprintf(sink->why, sink->why_size, "the tokenizer has no token for the byte 0x%02x",
                     (uint8_t)text[i]);
            return false;
        }
        symbol[i] = (struct symbol){ id, (int32_t)i - 1, i + 1 < n ? (int32_t)i + 1 : -1 };
    }
    int64_t heap_count = 0;
    for (size_t i = 0; i + 1 < n; i++)
        offer_pair(t, &heap_count, (int32_t)i);
    while (heap_count > 0) {
        const struct candidate c = heap_pop(t, &heap_count);
        struct symbol *left = &symbol[c.at];
        if (left->id < 0 || left->next < 0)
            continue;
        struct symbol *right = &symbol[left->next];
        const struct merges_slot *m = find_merge(&t->merges, left->id, right->id);
        if (!m || m->result != c.result)
            continue; /* one of the two has changed since */
        left->id = c.result;
        left->next = right->next;
        right->id = -1;
        if (left->next >= 0) {
            symbol[left->next].previous = c.at;
            offer_pair(t, &heap_count, c.at);
        }
        if (left->previous >= 0)
            offer_pair(t, &heap_count, left->previous);
    }
    for (int32_t i = 0; i >= 0; i = symbol[i].next)
        token_push(sink, symbol[i].id);
    return true;
}

/* --- heap of candidates: smallest (rank, at) on top --- */

static bool before(struct candidate a, struct candidate b)
{
    return a.rank != b.rank ? a.rank < b.rank : a.at < b.at;
}

static void heap_push(struct tokenizer *t, int64_t *count, struct candidate c)
{
    ASSERT(*count < t->heap_capacity);
    struct candidate *heap = t->heap;
    int64_t i = (*count)++;
    for (; i > 0 && before(c, heap[(i - 1) / 2]); i = (i - 1) / 2)
        heap[i] = heap[(i - 1) / 2];
    heap[i] = c;
}

static struct candidate heap_pop(struct tokenizer *t, int64_t *count)
{
    struct candidate *heap = t->heap;
    const struct candidate top = heap[0], last = heap[--*count];
    int64_t i = 0;
    for (int64_t child = 1; child < *count; child = 2 * i + 1) {
        if (child + 1 < *count && before(heap[child + 1], heap[child]))
            child++;
        if (!before(heap[child], last))
            break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = last;
    return top;
}

/* FNV-1a with a final mix: the low bits select the slot. */
static uint64_t hash_bytes(const char *text, size_t n)
{
    uint64_t h = UINT64_C(14695981039346656037);
    for (size_t i = 0; i < n; i++)
        h = (h ^ (uint8_t)text[i]) * UINT64_C(1099511628211);
    return h ^ h >> 29;
}

static uint64_t hash_pair(int32_t left, int32_t right)
{
    uint64_t h = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * UINT64_C(0x9e3779b97f4a7c15);
    return h ^ h >> 32;
}
