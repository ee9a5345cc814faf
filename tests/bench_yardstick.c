/* bench_yardstick.c - a fixed piece of work with the mixture of a training step of the tiny model
 * on the reference backend, to measure this machine with: speeds of mimo are compared as multiples
 * of it (regression/speed.py).
 *
 * About a third each, by a profile of such a step: exponentials one at a time; matrix products of
 * the tiny model's shapes; plain loops over rows in single precision with sums in double. Prints
 * seconds of a pass: the median by the clock, the mean by the clock, and the processor time it
 * took, which is less than the clock's when the machine is busy with something else.
 */
#include <cblas.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { ROWS = 512, COLS = 64, WIDE = 200, WORDS = 512, MOST = 4096 };

struct work {
    float *x, *w, *y, *z; /* [ROWS, WORDS] each */
};

static double now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* y = silu(x) and the sum of exp(x) of each row, as gates and the loss do. */
static void exponentials(struct work *w)
{
    for (int r = 0; r < ROWS; r++) {
        double sum = 0;
        for (int c = 0; c < WIDE; c++) {
            const float v = w->x[r * WORDS + c], e = expf(-v);
            w->y[r * WORDS + c] = v / (1.0f + e);
            sum += e;
        }
        w->z[r * WORDS] = (float)log(sum);
    }
}

static void product(const float *a, const float *b, float *c, int m, int n, int k)
{
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, m, n, k, 1.0f, a, k, b, k, 0.0f, c, n);
}

static void products(struct work *w)
{
    product(w->x, w->w, w->y, ROWS, WIDE, COLS);
    product(w->x, w->w, w->z, ROWS, WORDS, COLS);
    for (int e = 0; e < 16; e++)
        product(w->x + e * 64 * COLS, w->w, w->y, 64, 32, COLS);
}

/* Normalise rows, convolve down the columns, update as an optimizer does. */
static void loops(struct work *w)
{
    for (int r = 0; r < ROWS; r++) {
        double mean = 0, square = 0;
        for (int c = 0; c < WIDE; c++) {
            const double v = w->x[r * WORDS + c];
            mean += v;
            square += v * v;
        }
        mean /= WIDE;
        const float rs = (float)(1.0 / sqrt(square / WIDE - mean * mean + 1e-5));
        for (int c = 0; c < WIDE; c++)
            w->y[r * WORDS + c] = (w->x[r * WORDS + c] - (float)mean) * rs * w->w[c];
    }
    for (int r = 3; r < ROWS; r++)
        for (int c = 0; c < WIDE; c++) {
            float v = w->w[c];
            for (int k = 0; k < 4; k++)
                v += w->w[4 * c + k] * w->y[(r - 3 + k) * WORDS + c];
            w->z[r * WORDS + c] = v;
        }
    for (int i = 0; i < ROWS * WORDS / 4; i++) {
        const float g = w->x[i];
        w->y[i] = 0.9f * w->y[i] + 0.1f * g;
        w->z[i] = 0.99f * fabsf(w->z[i]) + 0.01f * g * g;
        w->w[i] -= 1e-9f * w->y[i] / (sqrtf(w->z[i]) + 1e-8f);
    }
}

int main(int argc, char **argv)
{
    const double seconds = argc > 1 ? strtod(argv[1], NULL) : 0.5;
    static double pass[MOST];
    struct work w = { NULL, NULL, NULL, NULL };
    float **const array[] = { &w.x, &w.w, &w.y, &w.z };
    for (int k = 0; k < 4; k++) {
        *array[k] = malloc(ROWS * WORDS * sizeof(float));
        if (!*array[k])
            return 1;
        for (int i = 0; i < ROWS * WORDS; i++)
            (*array[k])[i] = (float)(i % 97 - 48) * 0.02f;
    }
    int n = 0;
    const double start = now(CLOCK_MONOTONIC), begin = now(CLOCK_PROCESS_CPUTIME_ID);
    for (double last = start, t; n < MOST && (n < 5 || last - start < seconds); last = t, n++) {
        for (int k = 0; k < 8; k++)
            exponentials(&w);
        for (int k = 0; k < 3; k++)
            products(&w);
        for (int k = 0; k < 2; k++)
            loops(&w);
        t = now(CLOCK_MONOTONIC);
        pass[n] = t - last;
    }
    const double processor = (now(CLOCK_PROCESS_CPUTIME_ID) - begin) / n;
    const double clock = (now(CLOCK_MONOTONIC) - start) / n;
    qsort(pass, (size_t)n, sizeof pass[0], ascending);
    printf("%.6e %.6e %.6e\n", pass[n / 2], clock, processor);
    for (int k = 0; k < 4; k++)
        free(*array[k]);
    return 0;
}
