/* backend.c - which table of operations a run uses, and how the BLAS below the reference table is
 * set up.
 *
 * OpenBLAS of a distribution may be older than the CPU: it then falls back to kernels of a much
 * older one ("Prescott": no AVX at all, five times slower). The kernels can be named in
 * OPENBLAS_CORETYPE, but the library reads it when it is loaded, before main; hence the one
 * restart. Its functions are found through the dynamic linker: another BLAS links as well.
 */
#include "backend.h"
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "backend_shadow.h"
#include "comm.h"
#include "deck.h"

enum width { WIDTH_UNKNOWN, WIDTH_128, WIDTH_256, WIDTH_512 };

static const char *core_name(void);
static enum width core_width(const char *core);
static enum width cpu_width(void);
static bool has_flag(const char *line, const char *flag);

/* What a shadow compares is the table that repeats. */
static bool any_order(const struct deck *deck)
{
    return deck->run.backend == DECK_BACKEND_CUDA && deck->derived.bf16 && !deck->run.deterministic;
}

const struct backend_ops *backend_select(const struct deck *deck)
{
    if (deck->run.backend == DECK_BACKEND_REF)
        return deck->derived.fp64 ? &backend_ref_f64 : &backend_ref_f32;
    if (deck->run.backend == DECK_BACKEND_SHADOW)
        return deck->derived.bf16 ? &backend_shadow_bf16 : &backend_shadow_f32;
    if (any_order(deck))
        return &backend_cuda_bf16_any_order;
    return deck->derived.bf16 ? &backend_cuda_bf16 : &backend_cuda_f32;
}

const struct backend_ops *backend_sizing(const struct deck *deck)
{
    if (deck->run.backend == DECK_BACKEND_REF)
        return backend_select(deck);
    if (any_order(deck))
        return &backend_sizes_bf16_any_order;
    return deck->derived.bf16 ? &backend_sizes_bf16 : &backend_sizes_f32;
}

const struct comm_ops *comm_select(const struct deck *deck)
{
    return deck->run.backend == DECK_BACKEND_REF ? &comm_mpi : &comm_nccl;
}

void backend_grouped_act_forward(const struct backend_ops *be, struct stream *s, in_t a, in_t w,
                                 in_t offsets, in_t prob, out_t h, out_t y)
{
    if (be->grouped_act_forward) {
        be->grouped_act_forward(s, a, w, offsets, prob, h, y);
        return;
    }
    be->grouped_gemm(s, BACKEND_GROUPED_NT, a, w, offsets, tensor_rows(h), 0.0, h);
    be->expert_act_forward(s, h, prob, y);
}

void backend_grouped_act_backward(const struct backend_ops *be, struct stream *s, in_t a, in_t w,
                                  in_t offsets, in_t h, in_t prob, out_t dh, out_t dprob, out_t y)
{
    if (be->grouped_act_backward) {
        be->grouped_act_backward(s, a, w, offsets, h, prob, dh, dprob, y);
        return;
    }
    be->grouped_gemm(s, BACKEND_GROUPED_NN, a, w, offsets, tensor_rows(h), 0.0, dh);
    be->expert_act_backward(s, h, prob, dh, dh, dprob, y);
}

void backend_blas_start(char **argv)
{
    const char *preload = getenv("LD_PRELOAD");
    /* Valgrind shows the machine's CPU flags but cannot execute AVX-512. */
    const bool valgrind = preload && (strstr(preload, "vgpreload") || strstr(preload, "valgrind"));
    const char *core = core_name();
    if (getenv("OPENBLAS_CORETYPE") || valgrind || !core)
        return;
    const enum width cpu = cpu_width(), used = core_width(core);
    if (used == WIDTH_UNKNOWN || cpu <= used || cpu < WIDTH_256)
        return;
    if (setenv("OPENBLAS_CORETYPE", cpu == WIDTH_512 ? "SkylakeX" : "Haswell", 0) == 0)
        execv("/proc/self/exe", argv);
    /* Without /proc the program still runs; backend_blas_core tells that it is slow. */
    unsetenv("OPENBLAS_CORETYPE");
}

void backend_blas_threads(int n)
{
    static const char *const setter[] = { "openblas_set_num_threads", "bli_thread_set_num_threads",
                                          "MKL_Set_Num_Threads" };
    for (size_t i = 0; i < sizeof setter / sizeof *setter; i++) {
        void *symbol = dlsym(RTLD_DEFAULT, setter[i]);
        if (!symbol)
            continue;
        if (strncmp(setter[i], "bli", 3) == 0) {
            void (*set)(int64_t); /* dim_t */
            memcpy(&set, &symbol, sizeof set);
            set(n);
        } else {
            void (*set)(int);
            memcpy(&set, &symbol, sizeof set);
            set(n);
        }
    }
}

const char *backend_blas_core(char *warning, size_t size)
{
    const char *core = core_name();
    snprintf(warning, size, "%s", "");
    if (!core)
        return "unknown";
    const enum width cpu = cpu_width(), used = core_width(core);
    if (used != WIDTH_UNKNOWN && cpu > used && cpu >= WIDTH_256)
        snprintf(warning, size,
                 "OpenBLAS uses its %s kernels although this CPU has %s: "
                 "start with OPENBLAS_CORETYPE=%s",
                 core, cpu == WIDTH_512 ? "AVX-512" : "AVX2",
                 cpu == WIDTH_512 ? "SkylakeX" : "Haswell");
    return core;
}

/* NULL when the BLAS is not OpenBLAS. */
static const char *core_name(void)
{
    char *(*get)(void);
    void *symbol = dlsym(RTLD_DEFAULT, "openblas_get_corename");
    if (!symbol)
        return NULL;
    memcpy(&get, &symbol, sizeof get);
    return get();
}

/* Vector width of OpenBLAS's x86-64 kernels by their names; names of other architectures are
 * unknown and left alone. */
static enum width core_width(const char *core)
{
    static const struct {
        const char *name;
        enum width width;
    } known[] = {
        { "SkylakeX", WIDTH_512 },
        { "Cooperlake", WIDTH_512 },
        { "SapphireRapids", WIDTH_512 },
        { "Haswell", WIDTH_256 },
        { "Zen", WIDTH_256 },
        { "Excavator", WIDTH_256 },
        /* AVX without AVX2 and FMA counts as the narrow class: it loses half of the throughput as
           well. */
        { "Sandybridge", WIDTH_128 },
        { "Bulldozer", WIDTH_128 },
        { "Piledriver", WIDTH_128 },
        { "Steamroller", WIDTH_128 },
        { "Prescott", WIDTH_128 },
        { "Core2", WIDTH_128 },
        { "Penryn", WIDTH_128 },
        { "Dunnington", WIDTH_128 },
        { "Nehalem", WIDTH_128 },
        { "Atom", WIDTH_128 },
        { "Nano", WIDTH_128 },
        { "Katmai", WIDTH_128 },
        { "Coppermine", WIDTH_128 },
        { "Northwood", WIDTH_128 },
        { "Banias", WIDTH_128 },
        { "Athlon", WIDTH_128 },
        { "Opteron", WIDTH_128 },
        { "Opteron_SSE3", WIDTH_128 },
        { "Barcelona", WIDTH_128 },
        { "Bobcat", WIDTH_128 },
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcmp(core, known[i].name) == 0)
            return known[i].width;
    return WIDTH_UNKNOWN;
}

/* From the flags of the first CPU; the AVX-512 subset is what the SkylakeX kernels are compiled
 * for. */
static enum width cpu_width(void)
{
    FILE *f = fopen("/proc/cpuinfo", "re");
    enum width width = WIDTH_UNKNOWN;
    char *line = NULL;
    size_t capacity = 0;
    if (!f)
        return WIDTH_UNKNOWN;
    while (width == WIDTH_UNKNOWN && getline(&line, &capacity, f) > 0) {
        if (strncmp(line, "flags", 5) != 0)
            continue;
        width = WIDTH_128;
        if (has_flag(line, "avx2") && has_flag(line, "fma"))
            width = WIDTH_256;
        if (width == WIDTH_256 && has_flag(line, "avx512f") && has_flag(line, "avx512dq") &&
            has_flag(line, "avx512bw") && has_flag(line, "avx512vl") && has_flag(line, "avx512cd"))
            width = WIDTH_512;
    }
    free(line);
    fclose(f);
    return width;
}

static bool has_flag(const char *line, const char *flag)
{
    const size_t n = strlen(flag);
    for (const char *p = strstr(line, flag); p; p = strstr(p + n, flag))
        if (p[-1] == ' ' && (p[n] == ' ' || p[n] == '\n' || p[n] == '\0'))
            return true;
    return false;
}
