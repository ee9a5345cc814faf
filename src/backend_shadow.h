/* backend_shadow.h - a table of operations that runs each one twice: first the primary's on the
 * device, then the truth's (ref fp32) on host copies of the same inputs, and compares what they
 * wrote (shadow.h). backend.h declares the product's two tables, whose primary is cuda; a test
 * gives another table a shadow by copying one of them, putting the primary's types and its members
 * without a stream in place, and a stream_create that attaches. Local, all.
 */
#ifndef MIMO_BACKEND_SHADOW_H
#define MIMO_BACKEND_SHADOW_H

#include "backend.h"

extern const struct backend_ops backend_shadow_bf16, backend_shadow_f32;
/* primary->stream_create, and the operations of *s are compared from now on. */
void backend_shadow_stream(struct stream *s, const char *name, const struct backend_ops *primary);

#endif
