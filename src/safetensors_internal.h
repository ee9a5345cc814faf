/* safetensors_internal.h - between safetensors.c and safetensors_write.c. */
#ifndef MIMO_SAFETENSORS_INTERNAL_H
#define MIMO_SAFETENSORS_INTERNAL_H

#include "safetensors.h"

enum { SAFETENSORS_RAW = 1 << 20 }; /* bytes of an access's scratch */

/* Bytes of an element and the type's name; of the four kinds that hold weights. Local, both. */
int safetensors_bytes(int kind);
const char *safetensors_type(int kind);
/* Open a file of the set unless it is open. A mistake is collected. Local. */
bool safetensors_use(struct safetensors_access *a, int file, struct errors *errors);

#endif
