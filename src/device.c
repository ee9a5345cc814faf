/* device.c - see device.h. */
#include "device.h"
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include "backend.h"
#include "comm.h"
#include "deck.h"
#include "log.h"

enum { HOST_BYTES = 256 };

static const struct device none = { .gpu = -1, .most = 1 };

bool device_place(int node_size, int node_rank, int gpus, int allowed, int *gpu, int *slot,
                  char *why, size_t why_size)
{
    ASSERT(gpus > 0 && node_rank >= 0 && node_rank < node_size);
    const int needed = (node_size + gpus - 1) / gpus;
    *gpu = node_rank % gpus;
    *slot = node_rank / gpus;
    if (needed <= allowed)
        return true;
    snprintf(
        why, why_size,
        "%d ranks on this host but %d visible GPU%s: each rank needs a GPU of its own, or run.ranks_per_gpu = %d must be %d or "
        "more: then ranks share GPUs, for their numbers and not for speed",
        node_size, gpus, gpus == 1 ? "" : "s", allowed, needed);
    return false;
}

static void share_nccl(int slot, bool one_host)
{
    char host[HOST_BYTES] = "", id[HOST_BYTES + 16];

    if (gethostname(host, sizeof host - 1) != 0)
        snprintf(host, sizeof host, "unknown");
    snprintf(id, sizeof id, "%s-%d", host, slot);
    setenv("NCCL_HOSTID", id, 0);
    setenv("NCCL_NET", "Socket", 0);
    if (one_host)
        setenv("NCCL_SOCKET_IFNAME", "lo", 0);
    setenv("NCCL_MNNVL_ENABLE", "0", 0); /* slots are no hosts of one NVLink domain either */
}

bool device_arrange(struct device *d, struct comm *world, int gpus, int allowed, char *why,
                    size_t why_size)
{
    int node_size, node_rank, n_nodes;

    *d = none;
    comm_node(world, &node_size, &node_rank, &n_nodes);
    const bool placed = gpus > 0 && device_place(node_size, node_rank, gpus, allowed, &d->gpu,
                                                 &d->slot, why, why_size);
    int64_t all[2] = { !placed, d->slot + 1 }, used = d->slot == 0;
    comm_host_reduce_i64(world, all, 2, COMM_MAX);
    comm_host_reduce_i64(world, &used, 1, COMM_SUM);
    if (all[0]) {
        if (placed)
            *why = '\0';
        *d = none;
        return false;
    }
    d->gpus = (int)used;
    d->most = (int)all[1];
    /* One shared GPU is enough: messages between hosts must take the same way on all of them. */
    if (d->most > 1) {
        d->sharers = comm_split_node(world, d->gpu, "gpu");
        share_nccl(d->slot, n_nodes == 1);
    }
    return true;
}

void device_take(struct device *d, const struct deck *deck, struct comm *world,
                 struct errors *errors)
{
    char why[512] = "";

    *d = none;
    if (deck->run.backend == DECK_BACKEND_REF)
        return;
    const int gpus = backend_cuda_count(why, sizeof why);
    if (!device_arrange(d, world, gpus, (int)deck->run.ranks_per_gpu, why, sizeof why) ||
        !backend_cuda_start(d->gpu, d->most > 1, why, sizeof why)) {
        if (*why)
            errors_add(errors, EXIT_ENVIRONMENT, "mimo: error: run.backend = 'cuda': %s", why);
    }
}

void device_print(const struct device *d, int ranks)
{
    if (d->most < 2)
        return;
    log_line(
        "NOTE: %d ranks share %d GPU%s, up to %d on one: times, throughput and idle shares of this run say nothing",
        ranks, d->gpus, d->gpus == 1 ? "" : "s", d->most);
}

void device_free(struct device *d)
{
    comm_free(d->sharers);
    *d = none;
}
