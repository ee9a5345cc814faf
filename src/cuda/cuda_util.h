/* cuda_util.h - what every file of this folder shares: the context behind a stream, checks, small
 * helpers. C and C++.
 *
 * stream->native is a struct cuda_context. Operations take their temporaries from its scratch
 * (cuda_scratch), which the next operation on the stream overwrites: no operation may keep anything
 * there. Library handles and chosen plans hang on the context as well; each library's file owns its
 * member, makes it at first use and frees it in its *_free.
 */
#ifndef MIMO_CUDA_UTIL_H
#define MIMO_CUDA_UTIL_H

#ifdef __cplusplus
extern "C" {
#endif

#include <cuda_runtime_api.h>
#include "backend.h"
#include "check.h"

struct cuda_gemm;      /* gemm.c: cuBLASLt's handle, workspace and chosen algorithms */
struct cuda_staging;   /* staging.c: pinned memory */
struct cuda_attention; /* attention_cudnn.cpp: cuDNN's handle and plans */

struct cuda_context {
    cudaStream_t stream;
    char *scratch;
    size_t scratch_bytes;
    int sm_count;
    struct cuda_gemm *gemm;
    struct cuda_attention *attention;
    /* of a stream that computes; NULL: copies from the host are the driver's business */
    struct cuda_staging *staging;
};

enum { CUDA_STAGING_PIECE = 4 << 20 };
/* Local. Pinned memory of at most CUDA_STAGING_PIECE bytes for one copy to the device, which
 * cuda_staged must follow at once; start allocates. */
void cuda_staging_start(struct cuda_context *c);
void cuda_staging_free(struct cuda_staging *g);
void *cuda_stage(struct cuda_context *c, size_t bytes);
void cuda_staged(struct cuda_context *c);

/* Local. */
void cuda_gemm_free(struct cuda_gemm *g);
/* dense.cu, for gemm.c: d = product + beta*c in fp32, rounded once; product dense, of d's shape,
 * NULL = 0; c NULL when beta is 0. */
void cuda_gemm_finish(struct stream *s, const float *product, double beta, in_t c, out_t d);
/* dense.cu, for gemm.c: three BF16 matrices like t at `to`, `apart` elements from each other, rows
 * `ld` apart: of F32 numbers the three terms whose sum they are, BF16 numbers three times. */
void cuda_gemm_terms(struct stream *s, in_t t, void *to, int64_t apart, int64_t ld);
/* d = sum of three products + beta*c, all F32; the products dense, of d's shape, one behind the
 * other; c NULL when beta is 0. */
void cuda_gemm_add_terms(struct stream *s, const float *products, double beta, in_t c, out_t d);
void cuda_attention_free(struct cuda_attention *a);

#define CHECK_CUDA(call) cuda_check((call), #call, __FILE__, __LINE__)
/* After a kernel launch. */
#define CHECK_LAUNCH() cuda_check(cudaGetLastError(), "kernel launch", __FILE__, __LINE__)

static inline void cuda_check(cudaError_t status, const char *call, const char *file, int line)
{
    if (status != cudaSuccess)
        fatal(status == cudaErrorMemoryAllocation ? EXIT_ENVIRONMENT : EXIT_INTERNAL, file, line,
              NULL, "%s: %s (%s)", call, cudaGetErrorString(status), cudaGetErrorName(status));
}

static inline struct cuda_context *cuda_context_of(const struct stream *s)
{
    return (struct cuda_context *)s->native;
}

static inline cudaStream_t cuda_stream_of(const struct stream *s)
{
    return cuda_context_of(s)->stream;
}

/* The first `bytes` of the stream's scratch, 256-byte aligned; fatal when it is smaller. */
static inline void *cuda_scratch(const struct stream *s, size_t bytes)
{
    const struct cuda_context *c = cuda_context_of(s);
    if (bytes > c->scratch_bytes)
        fatal(EXIT_INTERNAL, __FILE__, __LINE__, NULL,
              "an operation on stream %s needs %zu bytes of scratch, %zu are there", s->name, bytes,
              c->scratch_bytes);
    return c->scratch;
}

#ifdef __cplusplus
}
#endif
#endif
