/* gpu_shadow.c - the product's shadow of the CUDA backend: every operation in every kind of shape
 * (tests/shadow_cases.h), in bf16 and fp32, whole or sampled; and every operation with one wrong
 * number, which the shadow must find and name.
 *
 *     gpu_shadow [--seed N] [--only WORD]... [--quick] [--large] [--time]
 * --quick leaves out shapes of production size, --large all others; --time is taken for the other
 * tests' sake.
 */
#include <cuda_runtime_api.h>
#include <limits.h>
#include <malloc.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "../shadow_broken.h"
#include "../shadow_cases.h"
#include "backend_shadow.h"
#include "cuda_util.h"
#include "log.h"
#include "shadow.h"

enum { ONLY = 16 };

static struct backend_ops primary; /* of the shadow */
static jmp_buf caught;

static void on_abort(int code)
{
    atomic_flag_clear(&log_process()->failing);
    longjmp(caught, 1);
}

struct suite {
    struct backend_ops table;
    const struct backend_ops *whole;
    struct stream stream, side;
    uint64_t seed;
    const char *only[ONLY];
    int only_count, cases, failed;
    bool quick, large;
};

static bool chosen(const struct suite *s, const char *op)
{
    bool any = s->only_count == 0;
    for (int i = 0; i < s->only_count; i++)
        any = any || strstr(op, s->only[i]);
    return any;
}

/* 0: agreed and the bench found nothing; 1: the shadow stopped it; 2: the bench found something, in
 * `trouble`. */
static int run_case(struct suite *s, int op, enum bench_kind kind, char *trouble, size_t size)
{
    struct bench b = { .be = &s->table,
                       .plain = s->whole,
                       .stream = &s->stream,
                       .side = &s->side,
                       .act = s->whole->act,
                       .acc = DTYPE_F32 };
    if (setjmp(caught))
        return 1; /* what the case held is lost; the process is short */
    const bool ok = shadow_case_run(&b, op, kind, s->seed);
    snprintf(trouble, size, "%s", b.trouble);
    return ok ? 0 : 2;
}

static void report(struct suite *s, bool ok, const char *what, const char *kind,
                   const char *trouble)
{
    printf("%s - shadow %s %s %s%s%s\n", ok ? "ok" : "not ok", what, kind,
           dtype_name(s->whole->act), *trouble ? ": " : "", trouble);
    fflush(stdout);
    s->cases++;
    s->failed += !ok;
}

static void right_case(struct suite *s, int op, enum bench_kind kind)
{
    char trouble[300] = "";
    struct timespec from, to;
    clock_gettime(CLOCK_MONOTONIC, &from);
    shadow_sample_above(kind == BENCH_RAGGED ? 0 : kind == BENCH_PRODUCTION ? 8e6 : INFINITY);
    const int found = run_case(s, op, kind, trouble, sizeof trouble);
    clock_gettime(CLOCK_MONOTONIC, &to);
    const double seconds =
        (double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec);
    if (seconds > 1)
        printf("# %.1f s\n", seconds);
    report(s, found == 0, shadow_case[op].name, bench_kind_name[kind], trouble);
}

/* What went to standard error while a broken operation ran. */
static void broken_case(struct suite *s, int op, bool sampled)
{
    char said[2000] = "", trouble[300] = "", name[64];
    FILE *f = tmpfile();
    const int kept = dup(STDERR_FILENO);
    ASSERT(f && kept >= 0);
    dup2(fileno(f), STDERR_FILENO);
    primary = broken_make(s->whole, op);
    shadow_sample_above(sampled ? 0 : INFINITY);
    /* Of groups of heads, another is compared at each call: at the fourth they were all. */
    int found = 0;
    for (int i = 0; i < (sampled ? 4 : 1) && found == 0; i++)
        found = run_case(s, op, BENCH_RAGGED, trouble, sizeof trouble);
    primary = *s->whole;
    dup2(kept, STDERR_FILENO);
    close(kept);
    rewind(f);
    said[fread(said, 1, sizeof said - 1, f)] = '\0';
    fclose(f);
    said[strcspn(said, "\n")] = '\0';
    snprintf(name, sizeof name, "shadow: %s: ", shadow_case[op].name);
    const bool ok = found == 1 && strstr(said, name) && strstr(said, "tolerance");
    report(s, ok, shadow_case[op].name, sampled ? "broken, sampled" : "broken",
           ok           ? ""
           : found == 1 ? said
                        : "not found");
}

static void type_cases(struct suite *s, const struct backend_ops *whole,
                       const struct backend_ops *table)
{
    s->whole = whole;
    s->table = *table;
    primary = *whole;
    backend_shadow_stream(&s->stream, "compute", &primary);
    whole->stream_create(&s->side, "side");
    const struct tensor scratch = tensor_1d(whole->alloc(whole->scratch_bytes), DTYPE_U8,
                                            PLACE_DEVICE, (int64_t)whole->scratch_bytes);
    s->table.stream_scratch(&s->stream, &scratch);
    for (int op = 0; op < SHADOW_CASES; op++) {
        if (!chosen(s, shadow_case[op].name))
            continue;
        for (int kind = s->large ? BENCH_PRODUCTION : BENCH_TINY;
             kind < (s->quick ? BENCH_PRODUCTION : BENCH_KINDS); kind++)
            right_case(s, op, (enum bench_kind)kind);
        for (int sampled = 0; sampled < 2 && !s->large; sampled++)
            broken_case(s, op, sampled);
    }
    whole->stream_destroy(&s->side);
    s->table.stream_destroy(&s->stream);
    whole->release(scratch.data);
}

int main(int argc, char **argv)
{
    struct suite *s = xcalloc(1, sizeof *s);
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    s->seed = (uint64_t)now.tv_sec * 1000000007u + (uint64_t)now.tv_nsec;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--quick") == 0)
            s->quick = true;
        else if (strcmp(argv[i], "--large") == 0)
            s->large = true;
        else if (strcmp(argv[i], "--seed") == 0 && i + 1 < argc)
            s->seed = strtoull(argv[++i], NULL, 0);
        else if (strcmp(argv[i], "--only") == 0 && i + 1 < argc && s->only_count < ONLY)
            s->only[s->only_count++] = argv[++i];
        else if (strcmp(argv[i], "--time") != 0)
            FATAL(EXIT_DECK, "%s: usage: [--time] [--quick] [--large] [--seed N] [--only WORD]...",
                  argv[i]);
    }
    mallopt(M_MMAP_MAX, 0); /* gigabytes come and go: without fresh pages each time */
    mallopt(M_TRIM_THRESHOLD, INT_MAX);
    CHECK_CUDA(cudaSetDevice(0));
    log_open(NULL, true);
    check_on_abort(on_abort);
    printf("# %s: seed %llu\n", argv[0], (unsigned long long)s->seed);
    type_cases(s, &backend_cuda_bf16, &backend_shadow_bf16);
    type_cases(s, &backend_cuda_f32, &backend_shadow_f32);
    printf("# %d cases, %d failed\n", s->cases, s->failed);
    const bool failed = s->failed > 0 || s->cases == 0;
    free(s);
    return failed;
}
