/* staging.c - pinned host memory that copies from the host pass through, so that neither they nor
 * the host wait (cuda_util.h).
 *
 * Pieces are used in turn; after each copy out of a piece its event is recorded, and a piece that
 * comes round again is waited for. The host thus waits only when it is a whole round ahead of the
 * device.
 */
#include <stdlib.h>
#include "cuda_util.h"

enum { PIECES = 32 };

struct cuda_staging {
    char *base;
    cudaEvent_t done[PIECES];
    int piece;   /* in use */
    size_t used; /* bytes of it */
};

void cuda_staging_start(struct cuda_context *c)
{
    if (c->staging)
        return;
    c->staging = xcalloc(1, sizeof *c->staging);
    CHECK_CUDA(cudaHostAlloc((void **)&c->staging->base, (size_t)PIECES * CUDA_STAGING_PIECE,
                             cudaHostAllocDefault));
    for (int i = 0; i < PIECES; i++)
        CHECK_CUDA(cudaEventCreateWithFlags(&c->staging->done[i], cudaEventDisableTiming));
}

void cuda_staging_free(struct cuda_staging *g)
{
    if (!g)
        return;
    for (int i = 0; i < PIECES; i++)
        CHECK_CUDA(cudaEventDestroy(g->done[i]));
    CHECK_CUDA(cudaFreeHost(g->base));
    free(g);
}

void *cuda_stage(struct cuda_context *c, size_t bytes)
{
    struct cuda_staging *g = c->staging;
    const size_t rounded = (bytes + 255) / 256 * 256;
    ASSERT(rounded <= CUDA_STAGING_PIECE);
    if (g->used + rounded > CUDA_STAGING_PIECE) {
        g->piece = (g->piece + 1) % PIECES;
        g->used = 0;
        CHECK_CUDA(cudaEventSynchronize(g->done[g->piece]));
    }
    void *p = g->base + (size_t)g->piece * CUDA_STAGING_PIECE + g->used;
    g->used += rounded;
    return p;
}

void cuda_staged(struct cuda_context *c)
{
    CHECK_CUDA(cudaEventRecord(c->staging->done[c->staging->piece], c->stream));
}
