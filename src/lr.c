/* lr.c - learning rate and weight decay at a sample counter n (training.md 2.1-2.3; Megatron-LM
 * optimizer_param_scheduler.py).
 *
 * n counts the samples of successful updates only, so iteration i trains with lr((i-1)*gbs) when
 * nothing was skipped. Double precision throughout; the order of the cases in lr_at is part of the
 * definition.
 */
#include <math.h>
#include <string.h>
#include "lr.h"

static const double pi = 3.14159265358979323846;

/* A length that may be given in samples or in iterations; `otherwise` when neither is. */
static double in_samples(int64_t samples, int64_t iters, int64_t gbs, double otherwise)
{
    if (samples > 0)
        return (double)samples;
    if (iters > 0)
        return (double)iters * (double)gbs;
    return otherwise;
}

void lr_init(struct lr_schedule *s, const struct deck *deck)
{
    const struct deck_lr *k = &deck->lr;
    int64_t gbs = deck->batch.global_batch_size;
    double training = in_samples(deck->run.train_samples, deck->derived.train_iterations, gbs, 0.0);
    double decay = deck->optimizer.weight_decay;

    memset(s, 0, sizeof *s);
    s->style = k->lr_decay_style;
    s->wsd_style = k->lr_wsd_decay_style;
    s->wd_style = k->weight_decay_incr_style;
    s->init = k->lr_warmup_init;
    s->max = k->lr;
    s->min = k->min_lr;
    s->warmup = in_samples(k->lr_warmup_samples, k->lr_warmup_iters, gbs, 0.0);
    s->decay = in_samples(k->lr_decay_samples, k->lr_decay_iters, gbs, training);
    s->anneal = in_samples(k->lr_wsd_decay_samples, k->lr_wsd_decay_iters, gbs, 0.0);
    s->wd_start = k->start_weight_decay >= 0.0 ? k->start_weight_decay : decay;
    s->wd_end = k->end_weight_decay >= 0.0 ? k->end_weight_decay : decay;
    s->wd_steps = training;
}

/* Share of max - min that is left at progress q of the tail of WSD. */
static double tail(int style, double q)
{
    switch (style) {
    case DECK_WSD_LINEAR: return 1.0 - q;
    case DECK_WSD_COSINE: return 0.5 * (cos(pi * q) + 1.0);
    case DECK_WSD_MINUS_SQRT: return 1.0 - sqrt(q);
    default: return 2.0 * pow(0.5, q) - 1.0;
    }
}

double lr_at(const struct lr_schedule *s, double n)
{
    double c, r;

    if (s->warmup > 0.0 && n <= s->warmup)
        return s->init + (s->max - s->init) * n / s->warmup;
    if (s->style == DECK_LR_CONSTANT)
        return s->max;
    if (n > s->decay)
        return s->min;
    if (s->style == DECK_LR_INVERSE_SQUARE_ROOT)
        return fmax(s->min, s->max * sqrt(fmax(s->warmup, 1.0)) / sqrt(fmax(n, 1.0)));
    r = (n - s->warmup) / (s->decay - s->warmup);
    if (s->style == DECK_LR_LINEAR) {
        c = 1.0 - r;
    } else if (s->style == DECK_LR_COSINE) {
        c = 0.5 * (cos(pi * r) + 1.0);
    } else {
        double start = s->decay - s->anneal;
        c = n <= start ? 1.0 : tail(s->wsd_style, (n - start) / s->anneal);
    }
    return s->min + c * (s->max - s->min);
}

double lr_weight_decay_at(const struct lr_schedule *s, double n)
{
    double c;

    if (s->wd_style == DECK_WD_CONSTANT || n > s->wd_steps)
        return s->wd_end;
    c = s->wd_steps > 0.0 ? n / s->wd_steps : 0.0;
    if (s->wd_style == DECK_WD_COSINE)
        c = 0.5 * (cos(pi * (1.0 - c)) + 1.0);
    return s->wd_start + c * (s->wd_end - s->wd_start);
}
