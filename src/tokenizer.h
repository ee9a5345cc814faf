/* tokenizer.h - text to token ids and back: byte-level BPE as a Hugging Face tokenizer.json
 * describes it (training.md 6.11).
 *
 * Steps: added tokens are cut out verbatim (at each place the longest; lstrip, rstrip and
 * single_word honoured), the text between them is split by the file's regular expressions, bytes
 * become the 256 printable code points, pieces are merged pair by pair in the order of the merge
 * list (leftmost first; the whole piece at once if `ignore_merges` and the vocabulary has it). No
 * BOS or EOS is added, whatever the post-processor says. Read: model BPE (both spellings of
 * merges), normaliser none or an empty sequence, pre-tokenizers Split, ByteLevel and Sequences of
 * them. Anything else (NFC, Metaspace, dropout, unk fallback to bytes, ...) would give other ids
 * and is refused by name. Ids are resolved by string, never by number.
 */
#ifndef MIMO_TOKENIZER_H
#define MIMO_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct tokenizer;

/* From a tokenizer.json or the directory that holds one; NULL with one sentence in `why`. Local. */
struct tokenizer *tokenizer_open(const char *path, char *why, size_t why_size);
void tokenizer_free(struct tokenizer *t); /* NULL is allowed. Local. */

/* The largest id plus one, added tokens included. Local. */
int64_t tokenizer_size(const struct tokenizer *t);
/* Id of a token by its string (added tokens verbatim, others as the vocabulary spells them), -1 if
 * absent. Local. */
int64_t tokenizer_id(const struct tokenizer *t, const char *token);
/* Whether an id belongs to an added token; such a token is cut out of any text verbatim. Local. */
bool tokenizer_is_added(const struct tokenizer *t, int64_t id);

/* Ids of `n` bytes of UTF-8 into *ids, which is grown as needed (start with NULL and 0). Returns
 * their number, or -1 with `why` (bytes that are not UTF-8, a regular expression that gives up, a
 * token that the vocabulary lacks). Local. */
int64_t tokenizer_encode(struct tokenizer *t, const char *text, size_t n, int64_t **ids,
                         int64_t *capacity, char *why, size_t why_size);
/* Bytes of `n` ids into out (at most size, NUL-terminated); returns the length of the whole text,
 * as snprintf does. Single ids need not be whole UTF-8 characters; an id without a token gives
 * nothing. Local. */
size_t tokenizer_decode(const struct tokenizer *t, const int64_t *ids, int64_t n, char *out,
                        size_t size);

#endif
