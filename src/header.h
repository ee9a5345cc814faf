/* header.h - the first lines of a run: everything that is needed to run it again, as `key: value`
 * (robustness.md R1.2). */
#ifndef MIMO_HEADER_H
#define MIMO_HEADER_H

#include <stddef.h>
#include "deck.h"
#include "topology.h"

/* `start` says why the run starts where it does; `threads` of the BLAS on this rank. Collective
 * over the world. */
void header_print(const struct deck *deck, const struct topology *topo, const char *deck_text,
                  size_t deck_bytes, int threads, const char *start);
/* Cores that this process may use. Local. */
int header_cores(void);

#endif
