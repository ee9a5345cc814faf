/* code.h - what this program is: version, git, compiler, flags, and the libraries it runs with. */
#ifndef MIMO_CODE_H
#define MIMO_CODE_H

#include <stdio.h>

/* Calls visit for every fact, in a fixed order: version, git, compiler, flags, mpi, hdf5, blas, ...
 * (HDF5 group /code, run header). "no" = not part of this program. The texts live during the call
 * only. Works before MPI starts. Local. */
void code_visit(void (*visit)(void *ctx, const char *key, const char *value), void *ctx);
/* One name=value per line (mimo --features). Local. */
void code_print_features(FILE *out);
/* "0.1.0". Local. */
const char *code_version(void);
const char *code_git(void);

#endif
