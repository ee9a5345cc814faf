/* test_ddp.c - buckets and slices against a computation by hand and against their definition, which
 * parameters go into which buffer, and what a backward that leaves out a parameter is told.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>
#include "child.h"
#include "ddp.h"
#include "optim.h"

/* ---- layout ---- */

enum { MAX_SLOTS = 64 };

static void lay_out(struct ddp_buffer *b, struct ddp_slot *slot, const int64_t *numel, int n,
                    int64_t bucket_size, int size, int rank)
{
    *b = (struct ddp_buffer){ .slot = slot, .n_slots = n };
    for (int i = 0; i < n; i++)
        slot[i] = (struct ddp_slot){ .param = n - 1 - i, .numel = numel[i] };
    ddp_lay_out(b, bucket_size, size, rank);
}

/* Starts 0, 128 | 256 | 768, 832: a bucket closes with the parameter that brings it to 128
 * elements; ends are padded to lcm(4,128). */
static void p12_60_buckets_of_five_parameters_on_four_ranks(void **state)
{
    static const int64_t numel[] = { 100, 30, 500, 64, 1 }, start[] = { 0, 128, 256, 768, 832 };
    static const int64_t begin[] = { 0, 256, 768 }, used[] = { 158, 756, 833 },
                         end[] = { 256, 768, 896 };
    struct ddp_slot slot[5];
    struct ddp_buffer b;

    for (int rank = 0; rank < 4; rank++) {
        lay_out(&b, slot, numel, 5, 128, 4, rank);
        assert_int_equal(b.n_buckets, 3);
        assert_int_equal(b.numel, 896);
        assert_int_equal(b.shard_numel, 224);
        for (int i = 0; i < 5; i++)
            assert_int_equal(slot[i].start, start[i]);
        for (int i = 0; i < 3; i++) {
            assert_int_equal(b.bucket[i].start, begin[i]);
            assert_int_equal(b.bucket[i].used, used[i]);
            assert_int_equal(b.bucket[i].end, end[i]);
            assert_int_equal(b.bucket[i].n, (end[i] - begin[i]) / 4);
            assert_int_equal(b.bucket[i].own, begin[i] + rank * b.bucket[i].n);
        }
        /* The first bucket's slices have 64 elements: [0,64) and [64,100) of the first parameter,
         * then the second, then padding. */
        static const int64_t first[] = { 0, 64, 0, 0 }, n[] = { 64, 36, 0, 0 },
                             second[] = { 0, 0, 30, 0 };
        assert_int_equal(slot[0].first, first[rank]);
        assert_int_equal(slot[0].n, n[rank]);
        assert_int_equal(slot[1].n, second[rank]);
        assert_int_equal(slot[4].n, rank == 2 ? 1 : 0);
        assert_int_equal(slot[2].local, 64);
        free(b.bucket);
    }
}

static void p12_60_ends_are_multiples_of_lcm_and_one_bucket_holds_all(void **state)
{
    static const struct {
        int size;
        int64_t end;
    } want[] = { { 1, 128 },    { 3, 384 },   { 6, 384 },  { 8, 128 },
                 { 100, 3200 }, { 128, 128 }, { 256, 256 } };
    static const int64_t numel[] = { 1, 63 };
    struct ddp_slot slot[2];
    struct ddp_buffer b;

    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        lay_out(&b, slot, numel, 2, INT64_MAX, want[i].size, 0);
        assert_int_equal(b.n_buckets, 1);
        assert_int_equal(b.numel, want[i].end);
        assert_int_equal(slot[1].start, 64);
        free(b.bucket);
    }
}

/* For any sizes: no overlap, every element owned once, the owned runs tile the shard in order. */
static void slices_own_every_element_once(void **state)
{
    static const int sizes[] = { 1, 2, 3, 4, 7, 8, 33 };
    struct ddp_slot slot[MAX_SLOTS];
    struct ddp_buffer b;
    uint64_t h = 12345;

    for (int trial = 0; trial < 60; trial++) {
        int64_t numel[MAX_SLOTS], owned[MAX_SLOTS] = { 0 };
        int n = 1 + trial % MAX_SLOTS, size = sizes[trial % 7];
        for (int i = 0; i < n; i++) {
            h = h * 6364136223846793005u + 1442695040888963407u;
            numel[i] = 1 + (int64_t)(h >> 33) % (trial % 3 ? 700 : 5);
        }
        for (int rank = 0; rank < size; rank++) {
            int64_t shard = 0, last = 0;
            lay_out(&b, slot, numel, n, trial % 2 ? 1000 : INT64_MAX, size, rank);
            for (int k = 0; k < b.n_buckets; k++) {
                const struct ddp_bucket *c = &b.bucket[k];
                assert_int_equal(c->start, last);
                assert_int_equal((c->end - c->start) % size, 0);
                assert_int_equal(c->end % 128, 0);
                assert_int_equal(c->local, shard);
                shard += c->n;
                last = c->end;
                for (int i = c->first_slot; i < c->end_slot; i++) {
                    assert_int_equal(slot[i].start % DDP_ALIGN, 0);
                    assert_true(slot[i].start >= c->start && slot[i].start + numel[i] <= c->used);
                    if (slot[i].n == 0)
                        continue;
                    assert_int_equal(slot[i].first, owned[i]);
                    owned[i] += slot[i].n;
                    assert_int_equal(slot[i].start + slot[i].first - c->own,
                                     slot[i].local - c->local);
                    assert_true(slot[i].local + slot[i].n <= c->local + c->n);
                }
            }
            assert_int_equal(last, b.numel);
            assert_int_equal(shard, b.shard_numel);
            free(b.bucket);
        }
        for (int i = 0; i < n; i++)
            assert_int_equal(owned[i], numel[i]);
    }
}

/* ---- buffers of a model ---- */

struct job {
    struct deck deck;
    struct topology topo;
    struct stream stream;
    struct arenas arenas;
    struct model model;
    struct optim optim;
};

/* The tiny model on rank `rank` of `size` with these grids; nothing communicates. */
static void open_job(struct job *j, int size, int rank, const struct topology_spec *grids,
                     int n_grids, int n, const char *const *overrides)
{
    static const char text[] =
        "&run train_iters = 4 precision = 'fp64' /\n&language preset = 'tiny' /\n&lr lr = 1e-3 /\n"
        "&batch global_batch_size = 8 /\n&stage training_stage = 3 /\n&topology layout = 'colocated' /\n";
    const struct backend_ops *be = &backend_ref_f64;
    struct errors e = { 0 };
    char *copy[8] = { NULL };

    memset(j, 0, sizeof *j);
    for (int i = 0; i < n; i++)
        copy[i] = xstrdup(overrides[i]);
    deck_read(&j->deck, "test", text, strlen(text), n, copy, &e);
    deck_resolve(&j->deck, 1, &e);
    topology_describe(&j->topo, grids, n_grids, size, rank, &e);
    errors_print(&e);
    assert_int_equal(e.count, 0);
    for (int i = 0; i < n; i++)
        free(copy[i]);
    be->stream_create(&j->stream, "compute");
    model_init(&j->model, &j->deck, &j->topo, be, &j->stream);
    optim_init(&j->optim, &j->deck, &j->topo, &j->model, be, &comm_mpi, &j->stream);
    arenas_init(&j->arenas);
    for (int pass = 0; pass < 2; pass++) {
        model_plan(&j->model, &j->arenas);
        optim_plan(&j->optim, &j->arenas);
        if (pass == 0)
            arenas_commit(&j->arenas, be);
    }
}

static void close_job(struct job *j)
{
    model_free(&j->model);
    arenas_free(&j->arenas, &backend_ref_f64);
    topology_free(&j->topo);
    deck_free(&j->deck);
}

static const struct topology_spec colocated[] = { { "encoder", 4, 0, 1, 1, 1, 1, 1 },
                                                  { "language", 4, 0, 1, 1, 1, 1, 1 } };

static void p12_60_parameters_lie_in_reverse_order_at_equal_offsets(void **state)
{
    struct job j;
    int seen = 0;

    open_job(&j, 4, 1, colocated, 2, 0, NULL);
    assert_int_equal(j.model.ddp->n, 2);
    for (int i = 0; i < j.model.ddp->n; i++) {
        const struct ddp_buffer *b = &j.model.ddp->buffer[i];
        for (int k = 0; k < b->n_slots; k++) {
            const struct param *p = &j.model.param[b->slot[k].param];
            assert_true(k == 0 || b->slot[k].param < b->slot[k - 1].param);
            assert_ptr_equal(p->value.data, (double *)b->value.data + b->slot[k].start);
            assert_ptr_equal(p->grad.data, (double *)b->grad.data + b->slot[k].start);
            assert_int_equal(tensor_numel(&p->value), b->slot[k].numel);
            assert_int_equal(p->owned, b->slot[k].first);
            assert_int_equal(tensor_numel(&p->master), b->slot[k].n);
            seen++;
        }
    }
    for (int i = 0; i < j.model.n_params; i++)
        seen += j.model.param[i].buffer;
    assert_int_equal(seen, j.model.n_params);
    close_job(&j);
}

/* Gradients and state take exactly what the layout says, and the carving pass used all of it. */
static void memory_is_that_of_the_buffers(void **state)
{
    const char *overrides[] = { "optimizer.overlap_grad_reduce=T",
                                "optimizer.ddp_bucket_size=500" };
    static const int kinds[] = { ARENA_PARAMS, ARENA_GRADS, ARENA_OPTIMIZER, ARENA_COMM };
    struct job j;
    int64_t grads = 0, shards = 0;

    open_job(&j, 4, 3, colocated, 2, 2, overrides);
    for (int i = 0; i < j.model.ddp->n; i++) {
        grads += j.model.ddp->buffer[i].numel * 8;
        shards +=
            (j.model.ddp->buffer[i].shard_numel * 8 + ARENA_ALIGN - 1) / ARENA_ALIGN * ARENA_ALIGN;
    }
    assert_int_equal(j.arenas.a[ARENA_GRADS].capacity, grads);
    assert_in_range(j.arenas.a[ARENA_OPTIMIZER].capacity, 3 * shards,
                    3 * shards + 8 * j.model.n_params + 2 * ARENA_ALIGN);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(j.arenas.a[kinds[i]].used, j.arenas.a[kinds[i]].capacity);
        assert_int_equal(j.arenas.a[kinds[i]].next_block, j.arenas.a[kinds[i]].n_blocks);
    }
    close_job(&j);
}

static void p12_60_buckets_only_with_overlap_and_on_the_first_stage(void **state)
{
    const char *small[] = { "optimizer.overlap_grad_reduce=T", "optimizer.ddp_bucket_size=1000" };
    const char *five[] = { "optimizer.overlap_grad_reduce=T", "optimizer.ddp_num_buckets=5" };
    static const struct topology_spec stages[] = { { "language", 4, 0, 1, 1, 2, 1, 1 } };
    struct job j;

    open_job(&j, 4, 0, colocated, 2, 1, small + 1);
    assert_int_equal(j.model.ddp->buffer[1].n_buckets, 1);
    close_job(&j);
    /* 40e6 elements are more than the model has */
    open_job(&j, 4, 0, colocated, 2, 1, small);
    assert_int_equal(j.model.ddp->buffer[1].n_buckets, 1);
    close_job(&j);
    open_job(&j, 4, 0, colocated, 2, 2, five);
    assert_in_range(j.model.ddp->buffer[1].n_buckets, 3, 5);
    close_job(&j);
    for (int rank = 0; rank < 4; rank += 2) {
        open_job(&j, 4, rank, stages, 1, 2, small);
        assert_true(rank == 0 ? j.model.ddp->buffer[0].n_buckets > 5
                              : j.model.ddp->buffer[0].n_buckets == 1);
        close_job(&j);
    }
}

static void p12_61_experts_have_a_buffer_iff_they_are_cut_otherwise(void **state)
{
    static const struct {
        int tp, ep, expt_tp;
        bool separate;
    } rule[] = { { 1, 1, 1, false }, { 2, 1, 1, true }, { 2, 1, 2, false },
                 { 1, 2, 1, true },  { 2, 2, 2, true }, { 4, 1, 2, true } };

    for (size_t i = 0; i < sizeof rule / sizeof *rule; i++) {
        struct grid g = { .tp_size = rule[i].tp,
                          .ep_size = rule[i].ep,
                          .expt_tp_size = rule[i].expt_tp };
        assert_int_equal(ddp_separate_experts(&g), rule[i].separate);
    }
    for (int tp = 1; tp <= 2; tp++)
        for (int ep = 1; ep <= 4; ep *= 2) {
            struct topology_spec grid[] = { { "language", 8, 0, tp, 1, 1, ep, 1 } };
            bool separate = tp > 1 || ep > 1;
            struct job j;
            open_job(&j, 8, 5, grid, 1, 0, NULL);
            assert_int_equal(j.model.ddp->n, separate ? 2 : 1);
            for (int b = 0; b < j.model.ddp->n; b++) {
                const struct ddp_buffer *buffer = &j.model.ddp->buffer[b];
                assert_ptr_equal(buffer->group,
                                 b == 1 ? &j.topo.language.expt_dp : &j.topo.language.dp_cp);
                assert_int_equal(buffer->group->size, b == 1 ? 8 / ep : 8 / tp);
                for (int k = 0; k < buffer->n_slots; k++)
                    if (separate)
                        assert_int_equal(j.model.param[buffer->slot[k].param].expert, b == 1);
            }
            close_job(&j);
        }
}

static void p12_62_68_each_grid_has_its_group_and_the_encoder_overlaps_only_when_asked(void **state)
{
    static const struct topology_spec grids[] = { { "encoder", 2, 0, 2, 1, 1, 1, 1 },
                                                  { "language", 6, 2, 2, 1, 1, 1, 1 } };
    const char *overrides[] = { "optimizer.overlap_grad_reduce=T",
                                "optimizer.overlap_param_gather=T",
                                "optimizer.encoder_ddp_overlap=T" };
    struct job j;

    for (int n = 0; n <= 3; n++) {
        open_job(&j, 8, 1, grids, 2, n, overrides);
        assert_int_equal(j.model.ddp->n, 1);
        assert_ptr_equal(j.model.ddp->buffer[0].group, &j.topo.encoder.dp_cp);
        assert_int_equal(j.model.ddp->buffer[0].group->size, 1);
        assert_int_equal(j.model.ddp->buffer[0].overlap_reduce, n == 3);
        assert_int_equal(j.model.ddp->buffer[0].overlap_gather, n == 3);
        close_job(&j);
        open_job(&j, 8, 4, grids, 2, n, overrides);
        assert_ptr_equal(j.model.ddp->buffer[0].group, &j.topo.language.dp_cp);
        assert_int_equal(j.model.ddp->buffer[0].group->size, 3);
        assert_int_equal(j.model.ddp->buffer[0].overlap_reduce, n >= 1);
        assert_int_equal(j.model.ddp->buffer[0].overlap_gather, n >= 2);
        close_job(&j);
    }
}

static void frozen_modules_are_in_no_buffer(void **state)
{
    const char *overrides[] = { "stage.training_stage=1" };
    struct job j;

    open_job(&j, 4, 0, colocated, 2, 1, overrides);
    assert_int_equal(j.model.ddp->n, 1);
    assert_false(j.model.ddp->buffer[0].language);
    for (int k = 0; k < j.model.ddp->buffer[0].n_slots; k++)
        assert_int_equal(j.model.param[j.model.ddp->buffer[0].slot[k].param].module,
                         MODEL_PROJECTOR);
    for (int i = 0; i < j.model.n_params; i++)
        if (j.model.param[i].module != MODEL_PROJECTOR) {
            assert_null(j.model.param[i].grad.data);
            assert_int_equal(tensor_numel(&j.model.param[i].master), 0);
        }
    close_job(&j);
}

/* ---- readiness ---- */

static const struct topology_spec alone[] = { { "language", 1, 0, 1, 1, 1, 1, 1 } };
static const char *const overlap[] = { "optimizer.overlap_grad_reduce=T",
                                       "optimizer.ddp_bucket_size=1000" };

/* No reduction before the last micro-batch; then a bucket as soon as backward has passed its last
 * parameter. */
static void p12_66_buckets_are_reduced_when_the_last_backward_has_passed_them(void **state)
{
    struct job j;

    open_job(&j, 1, 0, alone, 1, 2, overlap);
    struct ddp_buffer *b = &j.model.ddp->buffer[0];
    assert_true(b->n_buckets > 5);
    ddp_ready(j.model.ddp, true, 0);
    assert_int_equal(b->reduced, 0);
    for (int iteration = 0; iteration < 2; iteration++) {
        ddp_last_backward(j.model.ddp, true);
        for (int i = j.model.n_params - 1; i >= 0; i--) {
            int done = 0;
            ddp_ready(j.model.ddp, true, i);
            while (done < b->n_buckets && b->slot[b->bucket[done].end_slot - 1].param >= i)
                done++;
            assert_int_equal(b->reduced, done);
        }
        assert_int_equal(b->reduced, b->n_buckets);
        ddp_reduce(j.model.ddp, true);
        assert_int_equal(b->reduced, 0);
    }
    close_job(&j);
}

static void leave_one_out(void *unused)
{
    struct job j;

    open_job(&j, 1, 0, alone, 1, 2, overlap);
    ddp_last_backward(j.model.ddp, true);
    ddp_ready(j.model.ddp, true, 1);
    ddp_reduce(j.model.ddp, true);
}

static void p12_70_a_parameter_without_gradient_is_named(void **state)
{
    char text[4096];
    assert_int_equal(child_run(leave_one_out, NULL, text, sizeof text), EXIT_INTERNAL);
    assert_non_null(strstr(text, "language, dense: 1 of "));
    assert_non_null(strstr(text, "the first is embedding.word_embeddings.weight"));
}

static void p12_65_participation_factor(void **state)
{
    assert_true(optim_participation(8, 4) == 2.0);
    assert_true(optim_participation(8, 8) == 1.0);
    assert_true(optim_participation(8, 0) == 1.0);
    assert_true(optim_participation(1, 1) == 1.0);
    assert_true(optim_participation(6, 4) == 1.5);
}

/* Gradients are accumulated and reduced in fp32 in a bf16 run, whose parameters are bf16. */
static void p12_71_gradients_of_a_bf16_run_are_fp32(void **state)
{
    static const char text[] =
        "&run train_iters = 4 precision = 'fp32' /\n&language preset = 'tiny' /\n&lr lr = 1e-3 /\n"
        "&stage training_stage = 3 /\n&topology layout = 'colocated' /\n";
    struct errors e = { 0 };
    struct deck deck;
    struct topology topo;
    struct stream stream = { .name = "none" };
    struct arenas arenas;
    struct model model;

    deck_read(&deck, "test", text, strlen(text), 0, NULL, &e);
    deck_resolve(&deck, 1, &e);
    assert_int_equal(e.count, 0);
    deck.derived.bf16 = true; /* as the CUDA backend resolves it */
    topology_init(&topo, &deck, 1, 0, &e);
    model_init(&model, &deck, &topo, &backend_ref_f32, &stream);
    arenas_init(&arenas);
    model_plan(&model, &arenas);
    for (int i = 0; i < model.n_params; i++) {
        assert_int_equal(model.param[i].value.dtype,
                         model.param[i].buffer ? DTYPE_F32 : DTYPE_BF16);
        assert_true(model.param[i].buffer || model.param[i].grad.dtype == DTYPE_F32);
    }
    for (int i = 0; i < model.ddp->n; i++)
        assert_int_equal(model.ddp->buffer[i].grad.dtype, DTYPE_F32);
    model_free(&model);
    arenas_free(&arenas, &backend_ref_f32);
    topology_free(&topo);
    deck_free(&deck);
}

static int gathers; /* of parameters, by the fake messages below */

static void count_gather(struct comm *c, const struct tensor *send, const struct tensor *recv,
                         struct stream *s)
{
    gathers++;
}

static void nothing_to_drain(struct stream *s) {}

/* New values are staged once: every bucket of every buffer is gathered exactly once after an
 * update, at once or, under overlap, one by one as the forward pass asks for it, which it may do
 * often. */
static void p12_80_every_bucket_is_gathered_once_after_an_update(void **state)
{
    const char *overrides[] = { "optimizer.overlap_grad_reduce=T", "optimizer.ddp_bucket_size=1000",
                                "optimizer.overlap_param_gather=T" };
    const struct comm_ops fake = { .name = "fake",
                                   .all_gather = count_gather,
                                   .drain = nothing_to_drain };

    for (int n = 2; n <= 3; n++) {
        struct job j;
        int buckets = 0;
        open_job(&j, 4, 1, colocated, 2, n, overrides);
        j.model.comm = &fake;
        for (int i = 0; i < j.model.ddp->n; i++)
            buckets += j.model.ddp->buffer[i].n_buckets;
        assert_true(buckets > 6);
        for (int update = 1; update <= 2; update++) {
            gathers = 0;
            ddp_gather(j.model.ddp);
            /* The encoder has no overlap of its own: one bucket, gathered at once. */
            assert_int_equal(gathers, n == 2 ? buckets : 2);
            for (int end = 1; end <= j.model.n_params; end++) {
                ddp_use(j.model.ddp, true, end);
                ddp_use(j.model.ddp, false, end);
            }
            assert_int_equal(gathers, buckets);
            ddp_use_all(j.model.ddp);
            assert_int_equal(gathers, buckets);
        }
        j.model.comm = &comm_mpi;
        close_job(&j);
    }
}

/* Element `k` of this rank's shard of p as the logical tensor has it. */
static bool is_logical(const struct job *j, const struct param *p, const struct param *whole,
                       int64_t k)
{
    const int64_t cols = tensor_numel(&p->value) / p->value.shape[0];

    return ((double *)p->value.data)[k] ==
           ((double *)whole->value.data)[model_full_index(&j->model, p, k / cols, k % cols)];
}

/* Initial weights over a grid of tp 2, ep 2, dp 2: data-parallel replicas are equal, tensor- and
 * expert-parallel ranks hold other parts of the same logical tensor, and equal shapes of different
 * modules or layers hold different numbers. */
static void p12_17_weights_follow_the_logical_tensor_not_the_rank(void **state)
{
    static const struct topology_spec cut[] = { { "language", 8, 0, 2, 1, 1, 2, 1 } };
    struct job one, part[8];

    open_job(&one, 1, 0, alone, 1, 0, NULL);
    model_initialise(&one.model);
    for (int r = 0; r < 8; r++) {
        open_job(&part[r], 8, r, cut, 1, 0, NULL);
        model_initialise(&part[r].model);
        for (int i = 0; i < one.model.n_params; i++)
            for (int64_t k = 0; k < tensor_numel(&part[r].model.param[i].value); k++)
                assert_true(is_logical(&part[r], &part[r].model.param[i], &one.model.param[i], k));
    }
    for (int i = 0; i < one.model.n_params; i++) {
        const struct param *a = &part[0].model.param[i], *tp = &part[1].model.param[i],
                           *dp = &part[2].model.param[i];
        const size_t bytes = (size_t)tensor_numel(&a->value) * sizeof(double);
        if (a->init != RNG_NORMAL)
            continue;
        assert_int_equal(memcmp(a->value.data, dp->value.data, bytes) == 0, true);
        /* Rank 1 is the next of tp and of ep. */
        assert_int_equal(memcmp(a->value.data, tp->value.data, bytes) == 0,
                         a->shard == PARAM_REPLICATED && !a->expert);
    }
    const struct param *in =
        model_find_param(&one.model, MODEL_LANGUAGE, "embedding.word_embeddings.weight");
    const struct param *out = model_find_param(&one.model, MODEL_LANGUAGE, "output_layer.weight");
    assert_int_equal(tensor_numel(&in->value), tensor_numel(&out->value));
    assert_memory_not_equal(in->value.data, out->value.data,
                            (size_t)tensor_numel(&in->value) * sizeof(double));
    for (int r = 0; r < 8; r++)
        close_job(&part[r]);
    close_job(&one);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(p12_60_buckets_of_five_parameters_on_four_ranks),
        cmocka_unit_test(p12_60_ends_are_multiples_of_lcm_and_one_bucket_holds_all),
        cmocka_unit_test(slices_own_every_element_once),
        cmocka_unit_test(p12_60_parameters_lie_in_reverse_order_at_equal_offsets),
        cmocka_unit_test(memory_is_that_of_the_buffers),
        cmocka_unit_test(p12_60_buckets_only_with_overlap_and_on_the_first_stage),
        cmocka_unit_test(p12_61_experts_have_a_buffer_iff_they_are_cut_otherwise),
        cmocka_unit_test(
            p12_62_68_each_grid_has_its_group_and_the_encoder_overlaps_only_when_asked),
        cmocka_unit_test(frozen_modules_are_in_no_buffer),
        cmocka_unit_test(p12_66_buckets_are_reduced_when_the_last_backward_has_passed_them),
        cmocka_unit_test(p12_70_a_parameter_without_gradient_is_named),
        cmocka_unit_test(p12_65_participation_factor),
        cmocka_unit_test(p12_71_gradients_of_a_bf16_run_are_fp32),
        cmocka_unit_test(p12_80_every_bucket_is_gathered_once_after_an_update),
        cmocka_unit_test(p12_17_weights_follow_the_logical_tensor_not_the_rank),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
