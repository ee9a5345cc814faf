/* ssd_sequential.h - the selective state space scan by definition, token by token (model.md 1.6.4).
 * The operation tables hold the chunked form; this one takes the same arguments (chunk is not used,
 * work has its own size) and exists to be compared with.
 */
#ifndef MIMO_REF_SSD_SEQUENTIAL_H
#define MIMO_REF_SSD_SEQUENTIAL_H

#include "ref.h"

/* Contracts of the members of struct backend_ops. Local. */
#define X(op) \
    extern __typeof__(*((struct backend_ops *)0)->ssd_##op) ref_ssd_sequential_##op##_f32, \
        ref_ssd_sequential_##op##_f64;
X(forward) X(backward) X(work)
#undef X

#endif
