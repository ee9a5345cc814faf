/* sample.h - the parts of one shard sample as a document: text with pictures in between
 * (interface.md 5).
 *
 * Forms, the first that the json part has: `conversation` (turns of text and image fragments),
 * `texts` + `images` (interleaved), `caption` (a string); else the txt part. A caption stands
 * behind the pictures of the sample. No tokens and no pixels here.
 */
#ifndef MIMO_SAMPLE_H
#define MIMO_SAMPLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "shard.h"

enum { SAMPLE_PICTURE_MAX = 64 << 20, SAMPLE_TEXT_MAX = 4 << 20 }; /* bytes of a part */

enum sample_kind {
    SAMPLE_CAPTION,
    SAMPLE_TEXT,
    SAMPLE_INTERLEAVED,
    SAMPLE_CONVERSATION,
    SAMPLE_KINDS
};

/* A stretch of text and the picture that follows it; part = -1: none, the document ends here. */
struct sample_item {
    size_t text, length;
    int32_t part;
};

struct sample {
    enum sample_kind kind;
    struct sample_item
        *item;  /* [n_items], at least one; pictures are those of the first n_items - 1 */
    char *text; /* all stretches */
    int64_t n_items, item_capacity;
    size_t text_used, text_capacity;
    unsigned char *raw; /* bytes of the json or txt part */
    int64_t raw_capacity;
};

/* The document of sample `index`, with `before` and `after` around every picture; false with `why`
 * when it is broken. The buffers of *out are reused; zero it before the first call. Local. */
bool sample_read(struct sample *out, struct shard_set *set, int64_t index, const char *before,
                 const char *after, char *why, size_t why_size);
/* Whether a part of this name is a picture: jpg, jpeg, png, webp, alone or after a dot, in any
 * case. Local. */
bool sample_is_picture(const char *part_name);
const char *sample_kind_name(enum sample_kind kind); /* Local. */
void sample_free(struct sample *s);

#endif
