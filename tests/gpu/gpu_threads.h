/* gpu_threads.h - loops over elements on all cores, for gpu_check.c: production shapes have
 * hundreds of millions of them. What is drawn, rounded and added up depends on their number only,
 * not on the machine. */
#ifndef MIMO_GPU_THREADS_H
#define MIMO_GPU_THREADS_H

#include <math.h>
#include <pthread.h>
#include "check.h"

enum { THREADS = 16, ALONE = 1 << 16 };

/* What a loop over elements adds up, and its largest number. */
struct found {
    double square, difference, worst;
};
/* Elements [first, end). */
typedef void element_work(const void *ctx, int64_t first, int64_t end, struct found *found);
struct piece {
    element_work *work;
    const void *ctx;
    int64_t first, end;
    struct found found;
};

static inline void *run_piece(void *p)
{
    struct piece *piece = p;
    piece->work(piece->ctx, piece->first, piece->end, &piece->found);
    return NULL;
}

/* work over elements 0..n-1; what its runs found, in their order. */
static inline struct found on_all_cores(int64_t n, element_work *work, const void *ctx)
{
    struct piece piece[THREADS];
    pthread_t thread[THREADS];
    struct found all = { .worst = 0 };
    const int count = n < ALONE ? 1 : THREADS;
    for (int i = 0; i < count; i++) {
        piece[i] = (struct piece){ .work = work, .ctx = ctx, .first = n / count * i };
        piece[i].end = i + 1 == count ? n : n / count * (i + 1);
        if (count > 1 && pthread_create(&thread[i], NULL, run_piece, &piece[i]) != 0)
            FATAL(EXIT_ENVIRONMENT, "cannot start a thread");
    }
    for (int i = 0; i < count; i++) {
        if (count > 1)
            pthread_join(thread[i], NULL);
        else
            run_piece(&piece[i]);
        all.square += piece[i].found.square;
        all.difference += piece[i].found.difference;
        all.worst = fmax(all.worst, piece[i].found.worst);
    }
    return all;
}

#endif
