/* none.c - linked in place of the CUDA backend when Makefile.inc names no CUDA_HOME. */
#include <stdio.h>
#include "backend.h"
#include "comm.h"

const struct backend_ops backend_cuda_bf16 = { .name = "cuda" },
                         backend_cuda_f32 = { .name = "cuda" },
                         backend_cuda_bf16_any_order = { .name = "cuda" };
static void nothing(struct stream *s) {}
/* a model that is only sized drains its streams */
const struct comm_ops comm_nccl = { .name = "nccl", .drain = nothing };

const char *backend_cuda_missing(void)
{
    return "this binary was built without CUDA";
}

int backend_cuda_count(char *why, size_t why_size)
{
    snprintf(why, why_size, "%s", backend_cuda_missing());
    return 0;
}

bool backend_cuda_start(int gpu, bool shared, char *why, size_t why_size)
{
    snprintf(why, why_size, "%s", backend_cuda_missing());
    return false;
}
