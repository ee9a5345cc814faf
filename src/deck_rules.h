/* deck_rules.h - between deck_rules.c and deck_grids.c only: how a condition between keys
 * reports. */
#ifndef MIMO_DECK_RULES_H
#define MIMO_DECK_RULES_H

#include "deck_table.h"

struct deck_rules {
    struct deck *deck;
    struct errors *errors;
    int size;               /* ranks of the job */
    bool failed;            /* a value is wrong or missing, not just unbuilt */
    bool blamed[DECK_ROWS]; /* already complained about */
};

/* Report that the row's value breaks a rule; silent when the reader refused the value. Local. */
void deck_rules_fail(struct deck_rules *c, int row, enum exit_code code, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
/* Set an integer row, origin derived. Local. */
void deck_rules_derive(struct deck_rules *c, int row, int64_t value);
/* a * b of numbers >= 0, INT64_MAX when it does not fit. Local. */
int64_t deck_rules_mul(int64_t a, int64_t b);

/* Layout, dp sizes, offset and the rules on grids. Local. */
void deck_grids_resolve(struct deck_rules *c);

#endif
