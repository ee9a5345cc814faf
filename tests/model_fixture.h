/* model_fixture.h - a whole model in one process from a few lines of deck: what the tests of model,
 * layers and encoder share. */
#ifndef MIMO_MODEL_FIXTURE_H
#define MIMO_MODEL_FIXTURE_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "arena.h"
#include "data.h"
#include "deck.h"
#include "model.h"

struct fixture {
    struct deck deck;
    struct topology topo;
    const struct backend_ops *be;
    struct stream stream;
    struct arenas arenas;
    struct model model;
    struct data data;
    struct text_batch text;
    struct picture_batch pictures;
};

/* `overrides` are n strings "group.key=value" on top of a colocated one-rank tiny deck with mock
 * data; be NULL: the deck's backend. */
static inline void fixture_open_on(struct fixture *f, const struct backend_ops *be, int n,
                                   const char *const *overrides)
{
    static const char deck_text[] =
        "&run seed = 7 train_iters = 4 /\n&topology layout = 'colocated' /\n&language preset = 'tiny' /\n"
        "&data dataset_provider = 'mock' mock_pixels = 'normal' /\n&batch micro_batch_size = 2 global_batch_size = 2 /\n"
        "&stage training_stage = 3 /\n&lr lr = 1e-3 lr_decay_style = 'constant' /\n";
    struct errors e = { 0 };
    memset(f, 0, sizeof *f);
    char **copy = xcalloc((size_t)n + 1, sizeof *copy);
    for (int i = 0; i < n; i++)
        copy[i] = xstrdup(overrides[i]);
    deck_read(&f->deck, "fixture", deck_text, strlen(deck_text), n, copy, &e);
    deck_resolve(&f->deck, 1, &e);
    if (e.count)
        errors_print(&e);
    assert_int_equal(e.count, 0);
    topology_init(&f->topo, &f->deck, 1, 0, &e);
    f->be = be ? be : backend_select(&f->deck);
    f->be->stream_create(&f->stream, "compute");
    model_init(&f->model, &f->deck, &f->topo, f->be, &f->stream);
    arenas_init(&f->arenas);
    model_plan(&f->model, &f->arenas);
    arenas_commit(&f->arenas, f->be);
    model_plan(&f->model, &f->arenas);
    model_initialise(&f->model);
    data_init(&f->data, &f->deck, DATA_TRAIN, &e);
    if (e.count)
        errors_print(&e);
    assert_int_equal(e.count, 0);
    text_batch_init(&f->text, &f->data.limits, f->deck.batch.micro_batch_size);
    if (f->topo.encoder.present)
        picture_batch_init(&f->pictures, &f->data.limits, f->deck.derived.encoder_microbatch,
                           3 * f->deck.vision.patch_dim * f->deck.vision.patch_dim,
                           f->deck.derived.fp64);
    for (int i = 0; i < n; i++)
        free(copy[i]);
    free(copy);
    errors_free(&e);
}

static inline void fixture_open(struct fixture *f, int n, const char *const *overrides)
{
    fixture_open_on(f, NULL, n, overrides);
}

static inline void fixture_close(struct fixture *f)
{
    text_batch_free(&f->text);
    if (f->topo.encoder.present)
        picture_batch_free(&f->pictures);
    data_free(&f->data);
    model_free(&f->model);
    arenas_free(&f->arenas, f->be);
    f->be->stream_destroy(&f->stream);
    topology_free(&f->topo);
    deck_free(&f->deck);
}

/* Fetch micro-batch m of iteration i into the fixture's batches (one lane, one encoder rank). */
static inline void fixture_batch(struct fixture *f, int64_t i, int64_t m)
{
    data_text(&f->data, i, m, 0, 1, &f->text);
    if (!f->topo.encoder.present)
        return;
    struct data other;
    struct errors e = { 0 };
    data_init(&other, &f->deck, DATA_TRAIN, &e); /* the encoder reads the stream for itself */
    assert_int_equal(e.count, 0);
    data_pictures(&other, i, m, 0, 1, &f->pictures);
    data_free(&other);
}

/* loss_sum of the batch, per-token sums in long double, plus the attached auxiliary term
 * coeff*B*S*metric. */
static inline double fixture_forward(struct fixture *f, bool train)
{
    struct tensor image =
        tensor_2d(NULL, f->model.act, PLACE_DEVICE, 0, f->deck.language.hidden_size);
    model_zero_accumulators(&f->model);
    if (f->topo.encoder.present)
        image = model_encoder_forward(&f->model, 0, &f->pictures, train);
    model_language_forward(&f->model, 0, &f->text, &image, train);
    const struct tensor loss = model_token_loss(&f->model),
                        metric = model_balance_metric(&f->model);
    const int64_t t = tensor_numel(&loss);
    long double sum = 0;
    for (int64_t i = 0; i < t; i++)
        if (f->text.loss_mask[i] != 0.0f)
            sum +=
                f->deck.derived.fp64 ? ((double *)loss.data)[i] : (double)((float *)loss.data)[i];
    const double aux =
        f->deck.derived.fp64 ? *(double *)metric.data : (double)*(float *)metric.data;
    return (double)(sum + (long double)(f->deck.moe.moe_aux_loss_coeff * (double)t * aux));
}

static inline void fixture_backward(struct fixture *f)
{
    const bool encoder = f->topo.encoder.present;
    const struct tensor d = model_language_backward(&f->model, 0, encoder);
    if (encoder)
        model_encoder_backward(&f->model, 0, &d);
}

/* Of a float tensor. */
static inline double element(const struct tensor *t, int64_t i)
{
    return t->dtype == DTYPE_F64 ? ((double *)t->data)[i] : (double)((float *)t->data)[i];
}

#endif
