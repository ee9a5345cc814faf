/* comm_nccl.c - the device plane of comm.h over NCCL: everything is enqueued on the stream and
 * returns at once.
 *
 * Each attached communicator has a ncclComm_t of its own, made from an id that its first rank
 * spreads over MPI. Groups of one rank have none. Sums are taken in NCCL's order, which depends on
 * the group alone: runs of one layout repeat bitwise.
 */
#include <nccl.h>
#include <stdlib.h>
#include "comm.h"
#include "cuda_util.h"

#define CHECK_NCCL(call, c) check_nccl((call), #call, (c), __LINE__)

static void check_nccl(ncclResult_t status, const char *call, const struct comm *c, int line)
{
    if (status != ncclSuccess)
        fatal(EXIT_INTERNAL, __FILE__, line, NULL, "%s on %s (%d ranks): %s; %s", call, c->name,
              c->size, ncclGetErrorString(status), ncclGetLastError(NULL));
}

static ncclComm_t handle_of(const struct comm *c)
{
    ASSERT(c);
    if (!c->device)
        FATAL(EXIT_INTERNAL, "%s: no NCCL communicator was attached", c->name);
    return c->device;
}

static void nccl_attach(struct comm *c)
{
    ncclUniqueId id;
    ncclComm_t handle;
    ASSERT(c && !c->device && c->size > 1);
    if (c->rank == 0)
        CHECK_NCCL(ncclGetUniqueId(&id), c);
    comm_host_broadcast(c, &id, sizeof id, 0);
    CHECK_NCCL(ncclCommInitRank(&handle, c->size, id, c->rank), c);
    c->device = handle;
}

static void nccl_detach(struct comm *c)
{
    if (c->device)
        CHECK_NCCL(ncclCommDestroy(c->device), c);
    c->device = NULL;
}

static ncclDataType_t type_of(enum dtype dtype)
{
    switch (dtype) {
    case DTYPE_F32: return ncclFloat32;
    case DTYPE_F64: return ncclFloat64;
    case DTYPE_BF16: return ncclBfloat16;
    case DTYPE_I32: return ncclInt32;
    case DTYPE_I64: return ncclInt64;
    case DTYPE_U8: return ncclUint8;
    }
    FATAL(EXIT_INTERNAL, "no NCCL type for dtype %d", (int)dtype);
}

static ncclRedOp_t operation_of(enum comm_op op)
{
    return op == COMM_SUM ? ncclSum : op == COMM_MAX ? ncclMax : ncclMin;
}

/* Elements of a tensor that must be dense and lie on the device. */
static int64_t elements_of(const struct tensor *t)
{
    ASSERT(t->place == PLACE_DEVICE && (t->ld == tensor_cols(t) || tensor_rows(t) <= 1));
    return tensor_numel(t);
}

static int64_t bytes_of(const struct tensor *t)
{
    return elements_of(t) * (int64_t)dtype_bytes(t->dtype);
}

static void nccl_all_reduce(struct comm *c, const struct tensor *buf, enum comm_op op,
                            struct stream *s)
{
    const int64_t n = elements_of(buf);
    if (n == 0)
        return;
    CHECK_NCCL(ncclAllReduce(buf->data, buf->data, (size_t)n, type_of(buf->dtype), operation_of(op),
                             handle_of(c), cuda_stream_of(s)),
               c);
    c->sent_bytes += 2 * bytes_of(buf) / c->size * (c->size - 1);
}

static void nccl_all_gather(struct comm *c, const struct tensor *send, const struct tensor *recv,
                            struct stream *s)
{
    const int64_t n = elements_of(send);
    ASSERT(send->dtype == recv->dtype && elements_of(recv) == n * c->size);
    if (n == 0)
        return;
    CHECK_NCCL(ncclAllGather(send->data, recv->data, (size_t)n, type_of(send->dtype), handle_of(c),
                             cuda_stream_of(s)),
               c);
    c->sent_bytes += bytes_of(send) * (c->size - 1);
}

static void nccl_reduce_scatter(struct comm *c, const struct tensor *send,
                                const struct tensor *recv, enum comm_op op, struct stream *s)
{
    const int64_t n = elements_of(recv);
    ASSERT(send->dtype == recv->dtype && elements_of(send) == n * c->size);
    if (n == 0)
        return;
    CHECK_NCCL(ncclReduceScatter(send->data, recv->data, (size_t)n, type_of(send->dtype),
                                 operation_of(op), handle_of(c), cuda_stream_of(s)),
               c);
    c->sent_bytes += bytes_of(recv) * (c->size - 1);
}

static void nccl_broadcast(struct comm *c, const struct tensor *buf, int root, struct stream *s)
{
    const int64_t n = elements_of(buf);
    if (n == 0 || c->size == 1)
        return;
    CHECK_NCCL(ncclBroadcast(buf->data, buf->data, (size_t)n, type_of(buf->dtype), root,
                             handle_of(c), cuda_stream_of(s)),
               c);
    if (c->rank == root)
        c->sent_bytes += bytes_of(buf);
}

static void nccl_send(struct comm *c, const struct tensor *buf, int peer, struct stream *s)
{
    const int64_t n = elements_of(buf);
    ASSERT(peer >= 0 && peer < c->size);
    if (n == 0)
        return;
    CHECK_NCCL(
        ncclSend(buf->data, (size_t)n, type_of(buf->dtype), peer, handle_of(c), cuda_stream_of(s)),
        c);
    c->sent_bytes += bytes_of(buf);
}

static void nccl_recv(struct comm *c, const struct tensor *buf, int peer, struct stream *s)
{
    const int64_t n = elements_of(buf);
    ASSERT(peer >= 0 && peer < c->size);
    if (n == 0)
        return;
    CHECK_NCCL(
        ncclRecv(buf->data, (size_t)n, type_of(buf->dtype), peer, handle_of(c), cuda_stream_of(s)),
        c);
}

static void nccl_group_begin(struct comm *c)
{
    CHECK_NCCL(ncclGroupStart(), c);
}

static void nccl_group_end(struct comm *c, struct stream *s)
{
    CHECK_NCCL(ncclGroupEnd(), c);
}

/* A rank's own rows are a copy; the rest is one bracket of messages. */
static void nccl_all_to_all_v(struct comm *c, const struct tensor *send, const int64_t *send_rows,
                              const struct tensor *recv, const int64_t *recv_rows, struct stream *s)
{
    int64_t out = 0, in = 0;
    elements_of(send);
    elements_of(recv);
    ASSERT(send->dtype == recv->dtype && tensor_cols(send) == tensor_cols(recv));
    ASSERT(send_rows[c->rank] == recv_rows[c->rank]);
    nccl_group_begin(c);
    for (int r = 0; r < c->size; r++) {
        const struct tensor to = tensor_row_range(send, out, send_rows[r]),
                            from = tensor_row_range(recv, in, recv_rows[r]);
        out += send_rows[r];
        in += recv_rows[r];
        if (r == c->rank) {
            if (tensor_numel(&to) > 0)
                CHECK_CUDA(cudaMemcpyAsync(from.data, to.data, (size_t)bytes_of(&to),
                                           cudaMemcpyDeviceToDevice, cuda_stream_of(s)));
            continue;
        }
        nccl_send(c, &to, r, s);
        nccl_recv(c, &from, r, s);
    }
    nccl_group_end(c, s);
}

/* Nothing is left to the host. */
static void nccl_drain(struct stream *s) {}

const struct comm_ops comm_nccl = {
    .name = "nccl",
    .attach = nccl_attach,
    .detach = nccl_detach,
    .all_reduce = nccl_all_reduce,
    .all_gather = nccl_all_gather,
    .reduce_scatter = nccl_reduce_scatter,
    .broadcast = nccl_broadcast,
    .all_to_all_v = nccl_all_to_all_v,
    .group_begin = nccl_group_begin,
    .send = nccl_send,
    .recv = nccl_recv,
    .group_end = nccl_group_end,
    .drain = nccl_drain,
};
