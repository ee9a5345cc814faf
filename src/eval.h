/* eval.h - validation: the token-weighted loss of a fixed set of batches, forward only, and the
 * same with other pictures.
 *
 * Every validation starts at position 0 of the validation streams, so its values can be compared.
 * Ablation 'rotate': inside each global batch, samples in the order of their stream index, a sample
 * gets the pictures of the next one (cyclic) whose pictures have the same sizes; 'zero': all pixels
 * are 0. Both are functions of the batch alone, not of the ranks. A model that does not look has
 * equal values with and without.
 */
#ifndef MIMO_EVAL_H
#define MIMO_EVAL_H

#include "step.h"

struct eval {
    const struct deck *deck;
    const struct topology *topo;
    bool active; /* the run validates */
    int64_t iters;
    struct data data;  /* this rank's share of the validation stream */
    struct data whole; /* encoder ranks, rotate: the whole global batch */
    int64_t consumed;  /* samples of all validations so far */
    /* takes the first log.dump_batches batches; NULL = none. Set by the caller. */
    struct batch_dump *dump;
};

/* NaN: not asked, or not finite. stop: the validation was left unfinished because the run is asked
 * to stop, and says why; else NULL. */
struct eval_result {
    double lm_loss, lm_loss_ablated;
    const char *stop;
};

/* Opens the validation data when the deck asks for validation; mistakes are collected (EXIT_DATA).
 * Local. */
void eval_init(struct eval *e, const struct deck *deck, const struct topology *topo,
               struct errors *errors);
/* Whether a validation is due after `iteration` completed iterations. Local. */
bool eval_due(const struct eval *e, int64_t iteration);
/* Most validations that `starts` starts over these iterations can make together; the same for a few
 * more starts. Local. */
int64_t eval_most(const struct eval *e, int64_t iterations, int64_t starts);
/* One validation; logs it under `prefix`. Collective over the world. */
struct eval_result eval_run(struct eval *e, struct step *step, const char *prefix);
void eval_free(struct eval *e);

#endif
