/* bench_gemm.c - the machine's own rate: the best of five sgemm of n x n, in FLOP/s, on the threads
 * that the environment gives. */
#include <cblas.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int main(int argc, char **argv)
{
    const int n = argc > 1 ? (int)strtol(argv[1], NULL, 10) : 2048;
    if (n < 1 || n > 16384) {
        fprintf(stderr, "bench_gemm: n must be in 1..16384\n");
        return 2;
    }
    const size_t size = (size_t)n * (size_t)n;
    float *a = malloc(size * sizeof *a), *b = malloc(size * sizeof *b),
          *c = calloc(size, sizeof *c);
    if (!a || !b || !c)
        return 1;
    for (size_t i = 0; i < size; i++) {
        a[i] = (float)(i % 97) * 0.01f;
        b[i] = (float)(i % 89) * 0.01f;
    }
    double best = 1e30;
    for (int k = 0; k < 5; k++) {
        const double start = seconds();
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, n, n, n, 1.0f, a, n, b, n, 0.0f, c, n);
        const double t = seconds() - start;
        best = t < best ? t : best;
    }
    printf("%.6e\n", 2.0 * n * (double)n * n / best);
    free(a);
    free(b);
    free(c);
    return 0;
}
