/* radio.h - the encoder module: RADIO vision transformer, pixel shuffle, projector (model.md 2). */
#ifndef MIMO_RADIO_H
#define MIMO_RADIO_H

#include "model.h"

/* Declare every parameter of encoder and projector. Local. */
struct encoder *radio_init(struct model *m);
/* Every tensor for `slots` micro-batches in flight. Local. */
void radio_plan(struct model *m, struct encoder *v, struct arenas *as);
void radio_free(struct encoder *v);

#endif
