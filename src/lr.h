/* lr.h - learning-rate and weight-decay schedules; every step is counted in samples (training.md
 * 2). Local. */
#ifndef MIMO_LR_H
#define MIMO_LR_H

#include <stdint.h>
#include "deck.h"

struct lr_schedule {
    int style, wsd_style, wd_style; /* DECK_LR_*, DECK_WSD_*, DECK_WD_* */
    double init, max, min;
    double warmup, decay, anneal; /* W, E, A in samples */
    double wd_start, wd_end, wd_steps;
    int64_t n; /* samples of successful updates so far */
};

/* From a resolved deck: iteration-based keys times the global batch size. */
void lr_init(struct lr_schedule *s, const struct deck *deck);
double lr_at(const struct lr_schedule *s, double n); /* learning rate at counter n */
double lr_weight_decay_at(const struct lr_schedule *s, double n);

#endif
