/* tokenizer_internal.h - between the four files of the tokenizer; nobody else includes it.
 *
 *   tokenizer.c        the public functions; added tokens cut out of the text
 *   tokenizer_json.c   tokenizer.json -> struct tokenizer, every check of a foreign file
 *   tokenizer_split.c  the pre-tokenizer: regular expressions (the only file with PCRE2)
 *   tokenizer_bpe.c    strings and pairs in hash tables; merging one piece
 *
 * Everything works on raw UTF-8 bytes. The byte-level alphabet (a printable code point for each
 * byte) appears only where the file spells tokens with it. The file is foreign: its counts, ids and
 * strings are bounded before they size anything.
 */
#ifndef MIMO_TOKENIZER_INTERNAL_H
#define MIMO_TOKENIZER_INTERNAL_H

#include "tokenizer.h"

enum {
    TOKENIZER_MAX_FILE = 256 << 20, /* bytes; published ones have 10 to 35 million */
    TOKENIZER_MAX_IDS = 4 << 20,
    TOKENIZER_MAX_MERGES = 8 << 20,
    TOKENIZER_MAX_TOKEN = 4096, /* bytes of one token's string */
    TOKENIZER_MAX_STEPS = 64,   /* of the pre-tokenizer */
    TOKENIZER_MAX_TEXT = 1 << 30
};

/* Token strings by id and ids by string (open addressing). */
struct vocab {
    char *pool; /* all strings */
    size_t pool_used, pool_capacity;
    struct vocab_text {
        size_t at;
        int32_t length;
    } * text;                 /* [ids]; length -1 = unused id */
    int64_t ids, id_capacity; /* largest id plus one */
    int32_t *slot;            /* [slots] id, -1 = free; slots is a power of two */
    size_t slots, used;
};
/* Add a token; false if the string or the id is taken. Local. */
bool vocab_add(struct vocab *v, const char *text, size_t n, int64_t id);
int64_t vocab_find(const struct vocab *v, const char *text, size_t n); /* -1 if absent. Local. */
void vocab_free(struct vocab *v);

/* Pairs of ids to rank and result. */
struct merges {
    struct merges_slot {
        int32_t left, right, rank, result;
    } * slot; /* [slots]; left -1 = free */
    size_t slots, used;
};
void merges_init(struct merges *m, size_t count); /* room for `count`. Local. */
/* A pair given twice keeps the later rank, as the Hugging Face reader does. Local. */
void merges_add(struct merges *m, int32_t left, int32_t right, int32_t rank, int32_t result);
void merges_free(struct merges *m);

struct added_token {
    int32_t id;
    bool single_word, lstrip, rstrip, normalized;
    bool in_model; /* the model's vocabulary has it, too */
};
/* Byte tries of the added tokens: root 0 those to be found first (normalized = false), root 1 the
 * others. */
struct trie_node {
    int32_t child, sibling, token;
    uint8_t byte;
};

enum split_behaviour {
    SPLIT_ISOLATED,
    SPLIT_REMOVED,
    SPLIT_CONTIGUOUS,
    SPLIT_MERGED_WITH_PREVIOUS,
    SPLIT_MERGED_WITH_NEXT
};
struct regex; /* tokenizer_split.c */
struct split_step {
    struct regex *regex;
    enum split_behaviour behaviour;
    bool invert;
};

struct piece {
    size_t at, n;
    bool match;
};
struct pieces {
    struct piece *piece;
    int64_t count, capacity;
};

struct symbol {
    int32_t id, previous, next;
}; /* next = -1: last; id = -1: merged away */
struct candidate {
    int32_t rank, at, result;
}; /* heap element */

struct tokenizer {
    struct vocab vocab;
    struct merges merges;
    bool ignore_merges;
    int32_t byte_id[256]; /* token of a single byte, -1 = none */

    struct added_token *added; /* [added_count] */
    int64_t added_count;
    int32_t *added_of;      /* [ids] index into added, -1 = from the vocabulary */
    struct trie_node *node; /* nodes 0 and 1 are the roots */
    int64_t nodes, node_capacity;
    struct regex *word; /* one word character; NULL unless a token is single_word */

    struct split_step *step; /* [steps] before ByteLevel */
    int64_t steps;
    bool add_prefix_space;
    struct regex *byte_level; /* ByteLevel's own expression, NULL = use_regex false */

    /* scratch, grown as needed */
    struct pieces now, next, matches;
    struct symbol *symbol;
    struct candidate *heap;
    int64_t symbol_capacity, heap_capacity;
    char *mapped, *prefixed;
    size_t mapped_capacity, prefixed_capacity;
};

/* Where ids go and why it failed. */
struct token_sink {
    int64_t **ids, *capacity, count;
    char *why;
    size_t why_size;
};
void token_push(struct token_sink *sink, int64_t id); /* Local. */

/* Fill an empty tokenizer from the file's text; false with `why`. Local. */
bool tokenizer_parse(struct tokenizer *t, const char *json, size_t n, char *why, size_t why_size);
/* Add an added token (its string is in the vocabulary table already) to its trie. Local. */
void tokenizer_trie_add(struct tokenizer *t, int root, const char *text, size_t n, int32_t index);

/* A stretch without added tokens: split, merge, push. False with why. Local. */
bool split_encode(struct tokenizer *t, const char *text, size_t n, struct token_sink *sink);
/* Compile; `literal` takes the pattern as a plain string. NULL with `why`. Local. */
struct regex *regex_new(const char *pattern, size_t n, bool literal, char *why, size_t why_size);
/* Whether it matches anywhere in the text. Local. */
bool regex_matches(const struct regex *r, const char *text, size_t n);
void regex_free(struct regex *r);

/* Byte-level alphabet: byte -> code point, and code point -> byte or -1. Local. */
int32_t bpe_code_point(uint8_t byte);
int bpe_byte(int32_t code_point);
/* One code point of valid UTF-8, and its length. Local. */
int32_t utf8_next(const char *text, size_t *length);
bool utf8_valid(const char *text, size_t n);
/* Ids of one piece, n >= 1. False with why. Local. */
bool bpe_encode(struct tokenizer *t, const char *text, size_t n, struct token_sink *sink);

#endif
