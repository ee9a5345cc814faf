/* doctor.h - mimo --doctor: what this machine and launcher offer, on one page, and what stands in
 * the way of a run. */
#ifndef MIMO_DOCTOR_H
#define MIMO_DOCTOR_H

#include <stdio.h>

/* The page as `key: value` lines, each followed by its `warning:` where something is wrong, and a
 * last line that counts those. Under a launcher rank 0 alone prints. Needs no MPI start. Local. */
void doctor_print(FILE *out);

#endif
