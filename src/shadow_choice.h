/* shadow_choice.h - choices of experts under the shadow. A choice is not unique where two scores
 * nearly tie: the primary's is accepted when no expert that it passed over is better by more than
 * the rounding of scores, and the reference goes on from it. Counts of choices may differ by the
 * ties. All tensors are host copies. Local, all.
 */
#ifndef MIMO_SHADOW_CHOICE_H
#define MIMO_SHADOW_CHOICE_H

#include "shadow.h"

/* expert I32 [T,K] holds strictly ascending experts of 0..experts-1 in every row, which the
 * reference may index with; dies if not. */
void shadow_choice_listed(const struct shadow_call *c, in_t expert, int64_t experts);
/* No expert with a better score + bias was passed over; dies if one was. scores F32 [T,E], bias F32
 * [E] or NULL. */
void shadow_choice_best(const struct shadow_call *c, in_t scores, in_t bias, in_t expert);
/* For every sequence and expert [B,E] the rows that may or may not choose it, because its score is
 * that of the K-th best, or nearly. The caller frees them. */
int64_t *shadow_choice_ties(in_t scores, int64_t topk, int64_t first_row, int64_t seq_len,
                            int64_t sequences);

#endif
