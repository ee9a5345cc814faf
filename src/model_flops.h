/* model_flops.h - forward floating-point operations of the model (multiply-add = 2; model.md 5),
 * for throughput. Training = 3 x forward where a module trains. From the deck. Local, all.
 */
#ifndef MIMO_MODEL_FLOPS_H
#define MIMO_MODEL_FLOPS_H

#include "deck.h"

/* Of `tokens` tokens of the language module, sum_len2 = sum of the squared lengths of their
 * sequences: as Megatron-LM's log counts them, and exact. */
double model_flops_language_megatron(const struct deck *deck, double tokens, double sum_len2);
double model_flops_language_exact(const struct deck *deck, double tokens, double sum_len2);
/* Of one tile of that many patches in the encoder. */
double model_flops_encoder_tile(const struct deck *deck, double patches);
/* Of one picture embedding in the projector. */
double model_flops_projector_row(const struct deck *deck);

#endif
