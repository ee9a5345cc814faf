/* device.h - which GPU of its host a rank drives, and with whom it shares it.
 *
 * Rank r of a host with n visible GPUs drives GPU r mod n; r / n is its slot there and must be
 * below run.ranks_per_gpu. Several ranks on a GPU are for running layouts on small machines:
 * their numbers are right, their times say nothing, since the GPU lets them take turns. NCCL
 * takes no two ranks of a communicator on one GPU of a host. It knows a host by NCCL_HOSTID (its
 * src/misc/utils.cc), so where ranks share GPUs each slot is given out as a host of its own:
 * messages inside a slot go from GPU to GPU, between slots through sockets.
 */
#ifndef MIMO_DEVICE_H
#define MIMO_DEVICE_H

#include <stdbool.h>
#include <stddef.h>
#include "check.h"

struct comm;
struct deck;

struct device {
    int gpu, slot;        /* of this rank; gpu -1: it drives none */
    int gpus, most;       /* of the job: GPUs in use, ranks on one of them at most */
    struct comm *sharers; /* the ranks on this GPU; NULL where no GPU of the job is shared */
};

/* GPU and slot of rank `node_rank` of a host's node_size ranks. False, with one sentence in why,
 * where run.ranks_per_gpu = allowed is too small; all ranks of a host get the same answer. Local.
 */
bool device_place(int node_size, int node_rank, int gpus, int allowed, int *gpu, int *slot,
                  char *why, size_t why_size);
/* Places all ranks, this one on one of the host's `gpus`; where some share, makes `sharers` and
 * sets the environment by which NCCL takes them, before NCCL's first call; a variable that the
 * user has set stays. False: a rank found no place, why says so if it is this one, else is "". No
 * GPU is touched. Collective over the world. */
bool device_arrange(struct device *d, struct comm *world, int gpus, int allowed, char *why,
                    size_t why_size);
/* Arranges and takes this rank's GPU where the deck's backend wants one; what prevents it is
 * collected (EXIT_ENVIRONMENT). Collective over the world. */
void device_take(struct device *d, const struct deck *deck, struct comm *world,
                 struct errors *errors);
/* A line of the log where GPUs are shared. Local. */
void device_print(const struct device *d, int ranks);
void device_free(struct device *d);

#endif
