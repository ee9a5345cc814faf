/* tensorboard.h - scalars for TensorBoard (training.md 3.3 and 3.4): one event file per start.
 *
 * trace.h5 is the truth; these files are a view of it that must never cost a run. A write that
 * fails, at the start or later, is one warning, and the run goes on without. All functions accept
 * NULL, which is what every rank but rank 0 holds.
 */
#ifndef MIMO_TENSORBOARD_H
#define MIMO_TENSORBOARD_H

#include <stdbool.h>
#include <stdint.h>

/* The x axis of a scalar: the iteration; or both, the second time as "<tag> vs samples" over
 * consumed samples. */
enum tensorboard_axis { TENSORBOARD_ITERATIONS, TENSORBOARD_BOTH };

struct tensorboard;
/* Create an event file in `dir`, which is made if it is missing. `continues`: event files that lie
 * there are earlier parts of this run; else they are said to be another's. NULL after a warning, or
 * when dir is "". Local. */
struct tensorboard *tensorboard_open(const char *dir, bool continues);
/* Keep one scalar for the next tensorboard_write; stored as float. Local. */
void tensorboard_put(struct tensorboard *t, const char *tag, enum tensorboard_axis axis,
                     double value);
/* Write what was kept since the last call at these places of the two axes. Local. */
void tensorboard_write(struct tensorboard *t, int64_t iteration, int64_t samples);
void tensorboard_close(struct tensorboard *t);

#endif
