/* backend_cuda.c - the CUDA backend's tables, memory, streams and start. C, so that the tables
 * are checked member by member.
 *
 * One process drives one GPU, which others may drive too (device.h). Compute runs on the stream
 * the training loop makes. Copies from the host pass through pinned memory (staging.c) and return
 * at once; copies to the host do so too when they go to memory of alloc_host.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cublasLt.h>
#include <cudnn_version.h>
#include <nccl.h>
#include "backend_list.h"
#include "cuda_ops.h"
#include "cuda_sizes.h"
#include "cuda_util.h"

enum {
    COMPUTE_CAPABILITY = 90,
    NCCL_OLDEST = 22000,
    CUBLASLT_OLDEST = 130000,
    CUDNN_OLDEST = 91900
};

size_t cudnnGetVersion(void);

const char *backend_cuda_missing(void)
{
    return NULL;
}

int backend_cuda_count(char *why, size_t why_size)
{
    int n = 0, driver = 0;
    const cudaError_t status = cudaGetDeviceCount(&n);
    cudaDriverGetVersion(&driver);
    if (status == cudaSuccess && n > 0)
        return n;
    snprintf(why, why_size, "no GPU can be used: %s (driver's CUDA %d.%d, this binary's %d.%d)",
             status == cudaSuccess ? "none is visible" : cudaGetErrorString(status), driver / 1000,
             driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    return 0;
}

bool backend_cuda_start(int gpu, bool shared, char *why, size_t why_size)
{
    int nccl = 0, major = 0, minor = 0;
    CHECK_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, gpu));
    CHECK_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, gpu));
    if (10 * major + minor != COMPUTE_CAPABILITY) {
        snprintf(
            why, why_size,
            "GPU %d has compute capability %d.%d; this binary's kernels are for 9.0 (H100, H200)",
            gpu, major, minor);
        return false;
    }
    if (ncclGetVersion(&nccl) != ncclSuccess || nccl < NCCL_OLDEST ||
        cublasLtGetVersion() < CUBLASLT_OLDEST || cudnnGetVersion() < CUDNN_OLDEST) {
        snprintf(
            why, why_size,
            "libraries are too old: NCCL %d (needs %d), cuBLASLt %zu (needs %d), cuDNN %zu (needs %d)",
            nccl, NCCL_OLDEST, cublasLtGetVersion(), CUBLASLT_OLDEST, cudnnGetVersion(),
            CUDNN_OLDEST);
        return false;
    }
    cudaError_t status =
        shared ? cudaInitDevice(gpu, cudaDeviceScheduleBlockingSync, cudaInitDeviceFlagsAreValid)
               : cudaSuccess;
    if (status == cudaSuccess)
        status = cudaSetDevice(gpu);
    if (status != cudaSuccess)
        snprintf(why, why_size, "GPU %d cannot be taken: %s", gpu, cudaGetErrorString(status));
    return status == cudaSuccess;
}

/* ---- memory ---- */

static void *cuda_alloc(size_t bytes)
{
    void *p = NULL;
    const cudaError_t status = cudaMalloc(&p, bytes ? bytes : 256);
    if (status == cudaErrorMemoryAllocation) {
        size_t available = 0, total = 0;
        cudaMemGetInfo(&available, &total);
        FATAL(EXIT_ENVIRONMENT, "out of GPU memory: %zu bytes wanted, %zu of %zu are free", bytes,
              available, total);
    }
    CHECK_CUDA(status);
    return p;
}

static void cuda_memory(size_t *available, size_t *total)
{
    CHECK_CUDA(cudaMemGetInfo(available, total));
}

static void cuda_release(void *p)
{
    CHECK_CUDA(cudaFree(p));
}

static void *cuda_alloc_host(size_t bytes)
{
    void *p = NULL;
    CHECK_CUDA(cudaHostAlloc(&p, bytes ? bytes : 256, cudaHostAllocDefault));
    return p;
}

static void cuda_release_host(void *p)
{
    CHECK_CUDA(cudaFreeHost(p));
}

/* ---- streams ---- */

static void cuda_stream_create(struct stream *s, const char *name)
{
    struct cuda_context *c = xcalloc(1, sizeof *c);
    int device = 0, least, greatest;
    CHECK_CUDA(cudaGetDevice(&device));
    CHECK_CUDA(cudaDeviceGetAttribute(&c->sm_count, cudaDevAttrMultiProcessorCount, device));
    /* Messages and copies get the next free multiprocessors: what overlaps must start before the
     * products beside it end. */
    CHECK_CUDA(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    CHECK_CUDA(cudaStreamCreateWithPriority(&c->stream, cudaStreamNonBlocking,
                                            strcmp(name, "compute") == 0 ? least : greatest));
    *s = (struct stream){ .name = name, .native = c };
}

static void cuda_stream_destroy(struct stream *s)
{
    struct cuda_context *c = s->native;
    CHECK_CUDA(cudaStreamSynchronize(c->stream));
    cuda_gemm_free(c->gemm);
    cuda_attention_free(c->attention);
    cuda_staging_free(c->staging);
    CHECK_CUDA(cudaStreamDestroy(c->stream));
    free(c);
    *s = (struct stream){ 0 };
}

static void cuda_stream_scratch(struct stream *s, in_t memory)
{
    struct cuda_context *c = s->native;
    c->scratch = memory->data;
    c->scratch_bytes = (size_t)tensor_numel(memory);
    cuda_staging_start(c);
}

static void cuda_stream_sync(struct stream *s)
{
    CHECK_CUDA(cudaStreamSynchronize(cuda_stream_of(s)));
}

static void cuda_event_create(struct event *e)
{
    cudaEvent_t event;
    CHECK_CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    e->native = event;
}

static void cuda_event_create_timed(struct event *e)
{
    cudaEvent_t event;
    CHECK_CUDA(cudaEventCreate(&event));
    e->native = event;
}

static double cuda_event_seconds(const struct event *from, const struct event *to)
{
    float ms = 0;
    CHECK_CUDA(cudaEventElapsedTime(&ms, from->native, to->native));
    return 1e-3 * (double)ms;
}

static void cuda_event_destroy(struct event *e)
{
    if (e->native)
        CHECK_CUDA(cudaEventDestroy(e->native));
    e->native = NULL;
}

static void cuda_event_record(struct event *e, struct stream *s)
{
    CHECK_CUDA(cudaEventRecord(e->native, cuda_stream_of(s)));
}

static void cuda_stream_wait(struct stream *s, const struct event *e)
{
    CHECK_CUDA(cudaStreamWaitEvent(cuda_stream_of(s), e->native, 0));
}

static void cuda_event_sync(const struct event *e)
{
    CHECK_CUDA(cudaEventSynchronize(e->native));
}

/* attention_backward is the one that differs between the tables. */
_Static_assert(1 CUDA_OPS(BACKEND_COUNT) == 0 BACKEND_OPS(BACKEND_COUNT),
               "CUDA_OPS holds every other operation");

#define COMMON \
    .name = "cuda", .acc = DTYPE_F32, .scratch_bytes = CUDA_SCRATCH, .alloc = cuda_alloc, \
    .release = cuda_release, .memory = cuda_memory, .stream_create = cuda_stream_create, \
    .stream_destroy = cuda_stream_destroy, .stream_scratch = cuda_stream_scratch, \
    .stream_sync = cuda_stream_sync, .event_create = cuda_event_create, \
    .event_destroy = cuda_event_destroy, .event_record = cuda_event_record, \
    .stream_wait = cuda_stream_wait, .event_sync = cuda_event_sync, .asynchronous = true, \
    .event_create_timed = cuda_event_create_timed, .event_seconds = cuda_event_seconds, \
    .alloc_host = cuda_alloc_host, .release_host = cuda_release_host, .ssd_work = cuda_ssd_work,

#define X(op) .op = cuda_##op,
const struct backend_ops backend_cuda_bf16 = { COMMON.act = DTYPE_BF16,
                                               .attention_work = cuda_attention_work,
                                               .attention_backward = cuda_attention_backward,
                                               CUDA_OPS(X) };
const struct backend_ops backend_cuda_bf16_any_order = {
    COMMON.act = DTYPE_BF16, .attention_work = cuda_attention_work_any_order,
    .attention_backward = cuda_attention_backward_any_order, CUDA_OPS(X)
};
const struct backend_ops backend_cuda_f32 = { COMMON.act = DTYPE_F32,
                                              .attention_work = cuda_attention_work,
                                              .attention_backward = cuda_attention_backward,
                                              CUDA_OPS(X) };
#undef X
