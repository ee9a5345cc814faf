/* plan.h - mimo --check: what a deck means on N ranks, computed by one process without GPU, data or
 * memory.
 *
 * Parameter counts, grids and groups, one memory row per distinct role from the counting pass that
 * a run allocates with, and the schedule of each role after all ranks' lists have been verified
 * together.
 */
#ifndef MIMO_PLAN_H
#define MIMO_PLAN_H

#include <stdio.h>
#include "deck.h"

/* Print everything that can be computed for a resolved deck (derived.complete); mistakes found on
 * the way are collected. Local. */
void plan_print(const struct deck *deck, int size, FILE *out, struct errors *errors);

#endif
