/* io_replicas.c - whether data-parallel replicas still hold the same weights (robustness.md 4.7):
 * what the last update gathered is the same on all of them bit for bit, so another bit is a fault
 * of memory, GPU or network on one host.
 *
 * Each rank hashes its parameters; rank 0 puts those of equal name and equal tensor- and
 * expert-parallel coordinates side by side. The rank that differs from the most is accused, with
 * two replicas the higher one. Only hashes travel.
 */
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>
#include "io_internal.h"
#include "log.h"

enum { STAGING_BYTES = 16 << 20 };

struct entry { /* one parameter of one rank */
    uint64_t key, hash;
    int32_t rank, param;
};

static uint64_t key_of(const struct param *p, const struct grid *g)
{
    const int32_t place[] = { p->module, p->expert ? g->ep_rank : g->tp_rank,
                              p->expert ? g->expt_tp_rank : 0, g->pp_rank };
    return XXH3_64bits_withSeed(p->name, strlen(p->name), XXH3_64bits(place, sizeof place));
}

/* Of the bytes of a dense tensor, wherever it lies. */
static uint64_t hash_of(const struct model *m, const struct tensor *t, void *staging)
{
    const int64_t n = tensor_numel(t), width = (int64_t)dtype_bytes(t->dtype),
                  most = STAGING_BYTES / width;
    log_beat();
    if (t->place == PLACE_HOST)
        return XXH3_64bits(t->data, (size_t)(n * width));
    XXH3_state_t *state = XXH3_createState();
    XXH3_64bits_reset(state);
    for (int64_t first = 0, k; first < n; first += k) {
        k = n - first < most ? n - first : most;
        const struct tensor part =
            tensor_1d((char *)t->data + first * width, t->dtype, t->place, k);
        const struct tensor host = tensor_1d(staging, t->dtype, PLACE_HOST, k);
        m->be->copy(m->compute, &part, &host);
        m->be->stream_sync(m->compute);
        XXH3_64bits_update(state, staging, (size_t)(k * width));
        log_beat();
    }
    const uint64_t hash = XXH3_64bits_digest(state);
    XXH3_freeState(state);
    return hash;
}

static int by_key(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;
    if (x->key != y->key)
        return x->key < y->key ? -1 : 1;
    return (x->rank > y->rank) - (x->rank < y->rank);
}

/* The first entry of a run of replicas that is not what most are; NULL: all are equal. *usual = a
 * rank that has what most have. */
static const struct entry *odd_one(const struct entry *e, int64_t n, int *usual)
{
    int64_t best = 0, best_count = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t count = 0;
        for (int64_t k = 0; k < n; k++)
            count += e[k].hash == e[i].hash;
        if (count > best_count) {
            best = i;
            best_count = count;
        }
        if (best_count > n / 2)
            break;
    }
    *usual = e[best].rank;
    for (int64_t i = 0; i < n; i++)
        if (e[i].hash != e[best].hash)
            return &e[i];
    return NULL;
}

int checkpoint_odd_replica(const struct topology *topo, const struct model *model, int *param,
                           int *usual)
{
    int64_t most = model->n_params, verdict[3] = { -1, 0, 0 };
    comm_host_reduce_i64(topo->world, &most, 1, COMM_MAX);
    struct entry *mine = xcalloc((size_t)most, sizeof *mine), *all = NULL;
    void *staging = xmalloc(STAGING_BYTES, 1);
    for (int i = 0; i < most; i++) {
        mine[i].rank = -1;
        if (i >= model->n_params)
            continue;
        const struct param *p = &model->param[i];
        mine[i] = (struct entry){ .key = key_of(p, p->module == MODEL_LANGUAGE ? &topo->language
                                                                               : &topo->encoder),
                                  .hash = hash_of(model, &p->value, staging),
                                  .rank = topo->rank,
                                  .param = i };
    }
    free(staging);
    if (topo->rank == 0)
        all = xcalloc((size_t)(most * topo->size), sizeof *all);
    comm_host_gather(topo->world, mine, (size_t)most * sizeof *mine, all, 0);
    free(mine);
    if (all) {
        const int64_t n = most * topo->size;
        qsort(all, (size_t)n, sizeof *all, by_key);
        for (int64_t first = 0, end; first < n && verdict[0] < 0; first = end) {
            int other = 0;
            for (end = first; end < n && all[end].key == all[first].key;)
                end++;
            if (all[first].rank < 0)
                continue; /* ranks with fewer parameters */
            const struct entry *odd = odd_one(all + first, end - first, &other);
            if (odd)
                memcpy(verdict, (int64_t[3]){ odd->rank, odd->param, other }, sizeof verdict);
        }
        free(all);
    }
    comm_host_broadcast(topo->world, verdict, sizeof verdict, 0);
    *param = (int)verdict[1];
    *usual = (int)verdict[2];
    return (int)verdict[0];
}

void checkpoint_check_replicas(const struct topology *topo, const struct model *model)
{
    int param, usual;
    const int odd = checkpoint_odd_replica(topo, model, &param, &usual);
    if (odd < 0)
        return;
    /* The accused speaks, so that the line names its host; the others wait to be ended. */
    if (topo->rank != odd)
        comm_host_barrier(topo->world);
    fatal(
        EXIT_NUMERICS, __FILE__, __LINE__,
        "a bit was flipped here, in memory, GPU or network: leave this host out and submit again; nothing of it was saved, the last checkpoint is whole",
        "replicas differ: %s/%s has other bits than on rank %d",
        model_module_names[model->param[param].module], model->param[param].name, usual);
}
