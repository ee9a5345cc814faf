/* shadow_choice.c - see shadow_choice.h. */
#include "shadow_choice.h"
#include <math.h>
#include <stdlib.h>
#include "check.h"

/* Relative distance of scores whose order may come out either way. */
static const double NEAR = 2e-6;

/* Strictly ascending experts in every row: what the reference may index with. */
void shadow_choice_listed(const struct shadow_call *c, in_t expert, int64_t experts)
{
    const int64_t topk = tensor_cols(expert);
    const int32_t *choice = expert->data;
    for (int64_t i = 0; i < tensor_numel(expert); i++) {
        const int32_t before = i % topk ? choice[i - 1] : -1;
        if (choice[i] <= before || choice[i] >= experts)
            shadow_fail(c, "expert", i / topk, i % topk, choice[i], before + 1, 0,
                        "a choice is an ascending list of experts");
    }
}

static double key_of(float score, float bias)
{
    const double key = (double)score + bias;
    return isnan(key) ? INFINITY : key;
}

/* No expert that was passed over is better than a chosen one. */
void shadow_choice_best(const struct shadow_call *c, in_t scores, in_t bias, in_t expert)
{
    const int64_t experts = tensor_cols(scores), topk = tensor_cols(expert);
    const float *shift = bias ? bias->data : NULL;
    for (int64_t t = 0; t < tensor_rows(scores); t++) {
        const float *score = (const float *)scores->data + t * experts;
        const int32_t *choice = (const int32_t *)expert->data + t * topk;
        int64_t worst = 0, best = -1;
        double least = INFINITY, most = -INFINITY;
        for (int64_t e = 0, k = 0; e < experts; e++) {
            const double key = key_of(score[e], shift ? shift[e] : 0);
            if (k < topk && choice[k] == e) {
                if (key < least) {
                    least = key;
                    worst = k;
                }
                k++;
            } else if (key > most) {
                most = key;
                best = e;
            }
        }
        if (best >= 0 && most - least > NEAR * (1 + fabs(least)))
            shadow_fail(c, "expert", t, worst, choice[worst], (double)best, 0,
                        "an expert with a better score was passed over");
    }
}

static int descending(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

int64_t *shadow_choice_ties(in_t scores, int64_t topk, int64_t first_row, int64_t seq_len,
                            int64_t sequences)
{
    const int64_t experts = tensor_cols(scores);
    int64_t *ties = xcalloc((size_t)(sequences * experts) + 1, sizeof *ties);
    float *sorted = xmalloc((size_t)experts, sizeof *sorted);
    for (int64_t t = 0; t < tensor_rows(scores) && topk < experts; t++) {
        const float *score = (const float *)scores->data + t * experts;
        for (int64_t e = 0; e < experts; e++)
            sorted[e] = isnan(score[e]) ? INFINITY : score[e];
        qsort(sorted, (size_t)experts, sizeof *sorted, descending);
        const float last = sorted[topk - 1], near = (float)(NEAR * fabs((double)last));
        if (last - sorted[topk] > near)
            continue;
        for (int64_t e = 0; e < experts; e++)
            ties[(first_row + t) / seq_len * experts + e] +=
                !(fabs((double)(score[e] - last)) > near);
    }
    free(sorted);
    return ties;
}
