/* topology.h - the two grids, every process group, who is in them, and the bridge between the
 * grids.
 *
 * Rank order inside a grid (parallel.md 1.2). Dense view, fastest first: tp, cp, dp, pp; expert
 * view over the same ranks: expt_tp, ep, expt_dp, pp. topology_init is a pure function of (deck,
 * size, rank): it can describe any rank of any job in one process (--check, tests).
 * topology_connect then makes the communicators, in one globally identical order.
 */
#ifndef MIMO_TOPOLOGY_H
#define MIMO_TOPOLOGY_H

#include <stdbool.h>
#include <stdio.h>
#include "comm.h"
#include "deck.h"

/* Families of groups in creation order: X(name, view, dims...). view 0 = dense (tp cp dp pp), 1 =
 * expert (expt_tp ep expt_dp pp); the four flags say which of the view's dims vary inside the
 * group, fastest first. */
/* clang-format off */
#define TOPOLOGY_FAMILIES(X) \
    X(tp, 0, 1,0,0,0) X(cp, 0, 0,1,0,0) X(pp, 0, 0,0,0,1) X(dp, 0, 0,0,1,0) X(dp_cp, 0, 0,1,1,0) \
    X(tp_cp, 0, 1,1,0,0) X(mp, 0, 1,0,0,1) X(tp_dp, 0, 1,0,1,0) X(tp_dp_cp, 0, 1,1,1,0) \
    X(all, 0, 1,1,1,1) X(ep, 1, 0,1,0,0) X(expt_tp, 1, 1,0,0,0) X(expt_dp, 1, 0,0,1,0) \
    X(tp_ep, 1, 1,1,0,0) X(tp_ep_pp, 1, 1,1,0,1)
/* clang-format on */

struct group {
    /* this rank's position; no member: rank = -1 and size = 0 (bridge.leaders: its true size) */
    int size, rank;
    const int *member; /* [size] world ranks, ascending; owned by the topology */
    /* NULL before topology_connect, for groups of one rank, and for non-members */
    struct comm *comm;
};

struct grid {
    const char *name; /* "encoder" or "language" */
    bool present;     /* the job has this grid */
    bool member;      /* this rank is in it */
    int offset, size; /* span of world ranks */
    int tp_size, cp_size, dp_size, pp_size, ep_size, expt_tp_size, expt_dp_size;
    /* this rank's coordinates; -1 = no member */
    int tp_rank, cp_rank, dp_rank, pp_rank, ep_rank, expt_tp_rank, expt_dp_rank;
#define X(name_, ...) struct group name_;
    TOPOLOGY_FAMILIES(X)
#undef X
};

/* The edge encoder -> language (parallel.md 3.1, 3.7). Lane l = dp coordinate. Colocated lanes of
 * the two grids share ranks: the leader of a language lane then has the embeddings of its own
 * encoder lane, so only the leaders of a fan-in exchange messages. */
struct bridge_map {
    int n_source, n_dest; /* encoder_dp, llm_dp */
    int fan;              /* max/min */
    /* [n_source] world ranks: tp = T-1, cp = C-1, pp = P-1; colocated: tp = 0 */
    const int *source_leader;
    const int *dest_leader; /* [n_dest] world ranks: tp = cp = pp = 0 */
    /* who exchanges messages: sorted union of both; colocated: of a fan-in, else empty */
    struct group leaders;
    struct group source_lane; /* tp x cp ranks of this rank's boundary stage */
    struct group dest_lane;   /* the same of the language grid; disjoint only */
};

struct topology {
    int size, rank; /* the world */
    int layout;     /* DECK_LAYOUT_*, resolved (never auto) */
    struct grid encoder, language;
    struct bridge_map bridge; /* with an encoder grid */
    /* world rank that owns the global token count (parallel.md 6.6 step 1) */
    int token_source;
    struct comm *world; /* set by topology_connect */
    void *storage;      /* member lists */
};

/* One grid as asked for; the data-parallel sizes follow from num_ranks. name: "encoder" or
 * "language". */
struct topology_spec {
    const char *name;
    int num_ranks, offset, tp, cp, pp, ep, expt_tp;
};

/* Describe `rank` of a job of `size` ranks with these grids, in this order; whatever is wrong
 * (parallel.md 1.2, 1.3, 3.1, 3.7 and L1-L4) is collected, and then *t holds no grid. The deck
 * cannot ask for every grid yet; this can. Local. */
void topology_describe(struct topology *t, const struct topology_spec *specs, int n_specs, int size,
                       int rank, struct errors *errors);
/* Describe `rank` of a job of `size` ranks; rules L1-L6 are collected. The deck must have been
 * resolved for this size. Local. */
void topology_init(struct topology *t, const struct deck *deck, int size, int rank,
                   struct errors *errors);
/* Make every communicator of more than one rank. Collective over the world. */
void topology_connect(struct topology *t, struct comm *world);
/* Prepare for the device plane the communicators that tensors cross; after the device was taken.
 * Collective over the world. */
void topology_attach(struct topology *t, const struct comm_ops *ops);
/* Grids, groups and the bridge map as text. Local. */
void topology_print(const struct topology *t, FILE *out);
/* Members of the group of family `name` ("tp", "expt_dp", ...) that holds world rank `rank` in
 * `grid`; returns the size, 0 for a rank outside; asking a family that the views do not have is an
 * error (fatal). For tests and printing. Local. */
int topology_members(const struct grid *grid, const char *name, int rank, int *member);
/* "encoder", "language", or "both" (colocated). Local. */
const char *topology_role(const struct topology *t);
void topology_free(struct topology *t);

#endif
