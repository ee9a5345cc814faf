/* language.h - the language module: merged embedding, the layers of the pattern, final norm, output
 * layer, loss. */
#ifndef MIMO_LANGUAGE_H
#define MIMO_LANGUAGE_H

#include "model.h"

/* A micro-batch of B sequences as a ragged batch: what the sequence-mixing operations take
 * (backend.h). */
struct ragged {
    struct tensor cu;         /* I32 [segments+1] */
    int64_t tokens, segments; /* T; B, or more when samples are packed */
    int64_t max_len;          /* of a segment: S, or less */
    int64_t seq_len;          /* S */
};

/* Declare every parameter and layer. Local. */
struct language *language_init(struct model *m);
void language_plan(struct model *m, struct language *lm, struct arenas *as);
void language_free(struct language *lm);

struct moe;
/* Reads of one layer's kind for model.c: the E layers in order. Local. */
struct moe *language_moe(const struct language *lm, int moe_layer);

#endif
