/* comm_sum.h - the arithmetic of a reduction: equal parts of several ranks become one, in order of
 * rank. */
#ifndef MIMO_COMM_SUM_H
#define MIMO_COMM_SUM_H

#include "comm.h"

/* out[i] = parts[0*n+i] op parts[1*n+i] op ... , i < n; out may be parts' first part.
 * Floating-point sums of fp32 and bf16 run in double and are rounded once; COMM_MAX and COMM_MIN
 * return NaN when any part is NaN; integers wrap. Local. */
void comm_sum(enum dtype dtype, enum comm_op op, const void *parts, int n_parts, int64_t n,
              void *out);

#endif
