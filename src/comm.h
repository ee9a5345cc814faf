/* comm.h - collectives and point-to-point messages behind one struct of function pointers.
 *
 * Two planes:
 *   device  struct comm_ops moves tensors that lie where the backend computes. Its calls are
 *           ordered by a stream like kernels are and may return before they are done; until they
 *           are, nobody else may touch their tensors. (comm_mpi returns early for reduce_scatter,
 *           all_gather and all_to_all_v on a stream that is marked `deferred`, and completes them
 *           in drain; comm_nccl enqueues everything.)
 *   host    comm_host_* moves small metadata (shapes, counts, status) over MPI at any time; it
 *           blocks.
 * One rule of order: all ranks of a communicator make the same calls in the same order. A failed
 * message is fatal (check.h), never a status.
 */
#ifndef MIMO_COMM_H
#define MIMO_COMM_H

#include <stdbool.h>
#include "check.h"
#include "tensor.h"

struct stream; /* backend.h */

enum comm_op { COMM_SUM, COMM_MAX, COMM_MIN };

/* a group of ranks with a context of its own; NULL handle = this rank is no member */
struct comm {
    int size, rank;   /* rank inside the group */
    const char *name; /* family, for messages: "language.dp" */
    struct comm_native *native;
    void *device; /* comm_ops.attach's; NULL: nothing attached */
    /* by this rank through the device plane since the last comm_take_sent_bytes */
    int64_t sent_bytes;
};

struct comm_ops {
    const char *name;
    /* Prepares c for the device plane; every communicator that a tensor crosses, once, after the
     * device was taken. detach before comm_free. Collective over c. */
    void (*attach)(struct comm *c);
    void (*detach)(struct comm *c);
    /* In place. buf: any dense tensor. Collective over c. */
    void (*all_reduce)(struct comm *c, const struct tensor *buf, enum comm_op op, struct stream *s);
    /* recv = the ranks' send one after the other, in rank order; send may be recv's own slice.
     * Collective over c. */
    void (*all_gather)(struct comm *c, const struct tensor *send, const struct tensor *recv,
                       struct stream *s);
    /* recv = this rank's slice (numel(send)/size) of the sum over ranks of send. Collective over
     * c. */
    void (*reduce_scatter)(struct comm *c, const struct tensor *send, const struct tensor *recv,
                           enum comm_op op, struct stream *s);
    void (*broadcast)(struct comm *c, const struct tensor *buf, int root, struct stream *s);
    /* Rows to and from every rank: send_rows[size], recv_rows[size] on the host; rows packed in
     * rank order. Collective over c. */
    void (*all_to_all_v)(struct comm *c, const struct tensor *send, const int64_t *send_rows,
                         const struct tensor *recv, const int64_t *recv_rows, struct stream *s);
    /* Point to point inside c; all of a group_begin/group_end bracket are started before any is
     * waited for, so a bracket can never deadlock on order. Zero rows: no message on either side.
     * Local to the two ranks. */
    void (*group_begin)(struct comm *c);
    void (*send)(struct comm *c, const struct tensor *buf, int peer, struct stream *s);
    void (*recv)(struct comm *c, const struct tensor *buf, int peer, struct stream *s);
    void (*group_end)(struct comm *c, struct stream *s);
    /* Complete everything that was started on s, in the order of starting. Local, but waits for the
     * other ranks. */
    void (*drain)(struct stream *s);
};

extern const struct comm_ops comm_mpi; /* host buffers, used with ref */
/* device buffers, used with cuda; empty in a binary without CUDA */
extern const struct comm_ops comm_nccl;
struct deck;
/* The device plane that goes with the deck's backend. Local. */
const struct comm_ops *comm_select(const struct deck *deck);

/* MPI itself. comm_start: MPI_Init_thread(FUNNELED) and the world communicator; refuses (message,
 * false) a launcher that started N singletons while SLURM_NTASKS or PMI_SIZE say otherwise.
 * Collective over the world. */
bool comm_start(int *argc, char ***argv, struct comm **world, char *why, size_t why_size);
void comm_finish(struct comm *world);
_Noreturn void comm_abort(int code); /* MPI_Abort on the world. Local. */
/* One new communicator per color (members in order of world rank); color < 0: no member, returns
 * NULL. Collective over parent, in one globally identical order. */
struct comm *comm_split(struct comm *parent, int color, const char *name);
/* The same among the ranks of each host; color >= 0. Collective over the world. */
struct comm *comm_split_node(struct comm *world, int color, const char *name);
void comm_free(struct comm *c);
/* Ranks of this host: size and rank. Collective over the world. */
void comm_node(struct comm *world, int *node_size, int *node_rank, int *n_nodes);
const char *comm_library(void);               /* MPI library version, one line. Local. */
int64_t comm_take_sent_bytes(struct comm *c); /* and reset. Local. */
void *comm_mpi_handle(struct comm *c);        /* MPI_Comm *, for io_hdf5.c only. Local. */

/* Host plane; collective over c unless said otherwise. */
void comm_host_barrier(struct comm *c);
void comm_host_broadcast(struct comm *c, void *buf, size_t bytes, int root);
/* all-reduce, in place */
void comm_host_reduce_i64(struct comm *c, int64_t *v, int n, enum comm_op op);
/* all-reduce, in place */
void comm_host_reduce_f64(struct comm *c, double *v, int n, enum comm_op op);
/* recv [size*bytes] on root */
void comm_host_gather(struct comm *c, const void *send, size_t bytes, void *recv, int root);
/* Point to point: `bytes` at send + i*bytes go to send_peer[i], those from recv_peer[i] to recv +
 * i*bytes; all are started before any is waited for. Local to the ranks that name each other. */
void comm_host_exchange(struct comm *c, int n_send, const int *send_peer, const void *send,
                        int n_recv, const int *recv_peer, void *recv, size_t bytes);
/* Errors found by any rank reach every rank: returns the number of lines over all ranks, and on
 * rank 0 `e` holds them all, in rank order, equal lines once; `worst` agrees everywhere (the
 * smallest non-zero code). */
int comm_host_collect_errors(struct comm *c, struct errors *e);

#endif
