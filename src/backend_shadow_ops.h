/* backend_shadow_ops.h - the shadow of every operation, backend_shadow_<op> with the prototype of
 * the table's member, and what they are written with (shadow.h). Local, all.
 */
#ifndef MIMO_BACKEND_SHADOW_OPS_H
#define MIMO_BACKEND_SHADOW_OPS_H

#include "shadow.h"

#define BACKEND_SHADOW(op) extern __typeof__(*((struct backend_ops *)0)->op) backend_shadow_##op;
BACKEND_OPS(BACKEND_SHADOW)
#undef BACKEND_SHADOW

/* In each: the call `c` of an operation; an argument's copy on the host; that of an argument that
 * is written. */
#define BEGIN(op, steps) \
    struct shadow_call c; \
    shadow_begin(&c, s, SHADOW_##op, (double)(steps))
#define IN(t, rows, cols) shadow_in(&c, #t, t, rows, cols)
#define OUT(t, rows, cols) shadow_out(&c, #t, t, rows, cols)

/* The size of a row's gradient through a norm, before its mean is taken out. */
static inline double backend_shadow_norm_terms(in_t w, in_t rs, in_t dy)
{
    return shadow_rms(dy) * shadow_rms(w) * shadow_largest(rs);
}

#endif
