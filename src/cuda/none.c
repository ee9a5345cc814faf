/* none.c - linked in place of the CUDA backend when Makefile.inc names no CUDA_HOME. */
#include "backend.h"

const char *backend_cuda_missing(void)
{
    return "this binary was built without CUDA";
}
