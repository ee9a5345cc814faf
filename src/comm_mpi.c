/* comm_mpi.c - both planes of comm.h over MPI, host buffers.
 *
 * Reductions do not use MPI's: the parts of all ranks are exchanged and every element is added in
 * order of rank by comm_sum. So a sum does not depend on MPI's choice of algorithm, on the
 * message's length or on timing; it is bitwise the same on all ranks and in all runs, and
 * all_reduce equals reduce_scatter followed by all_gather. The volume is that of MPI's own
 * long-message algorithm. Everything else moves bytes. The large-count calls of MPI 4 are used
 * throughout.
 *
 * Every call is complete when it returns, but for reduce_scatter, all_gather and all_to_all_v on a
 * deferred stream: these start their exchange and join the stream's list; drain waits for each in
 * turn and adds the parts, in the same order of ranks. MPI moves long messages only inside its
 * calls, so each start also tests what is pending. The messages of a group bracket are all started
 * before the first is waited for, and waited for in group_end.
 */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "backend.h"
#include "comm.h"
#include "comm_sum.h"
#include "log.h"

enum { SMALL_BYTES = 32 << 10, PIECE_BYTES = 8 << 20, POINT_TAG = 1, ERRORS_TAG = 2, HOST_TAG = 3 };

/* Memory for the parts in flight, shared by all communicators of the process (calls do not
 * overlap). */
struct pool {
    void *data;
    size_t bytes;
    int users;
    struct comm_pending *idle; /* not in use, with memory that has grown to its size */
};

/* One collective that was started on a deferred stream. */
struct comm_pending {
    struct comm_pending *next;
    struct comm *comm;
    MPI_Request request;
    void *parts; /* of `bytes`; sum: [size, count], what all ranks sent; all-to-all: its counts */
    size_t bytes;
    bool sum; /* else complete when its request is */
    enum dtype dtype;
    enum comm_op op;
    int64_t count;
    void *out;
};

struct comm_native {
    MPI_Comm comm;
    struct pool *pool;
    MPI_Count *send_count, *recv_count; /* [size] bytes */
    MPI_Aint *send_at, *recv_at;        /* [size] byte offsets */
    bool open;                          /* between group_begin and group_end */
    MPI_Request *request;               /* [n_requests] of the open bracket */
    MPI_Status *status;
    int64_t *expected; /* bytes to receive, -1 = a send */
    int n_requests, request_capacity;
};

/* While the call lasts the watchdog knows where this rank waits; each that ends is a sign of
 * progress. */
#define CHECK_MPI(call, c) (enter_mpi(#call, (c)), check_mpi((call), #call, (c), __LINE__))
static void enter_mpi(const char *call, const struct comm *c);
static void check_mpi(int status, const char *call, const struct comm *c, int line);
static struct comm *wrap(MPI_Comm handle, const char *name, struct pool *pool);
static size_t bytes_of(const struct tensor *t);
static void *scratch(struct comm *c, size_t bytes);
static struct comm_pending *start_pending(struct comm *c, struct stream *s, size_t bytes);
static void reduce_all(struct comm *c, char *data, int64_t n, enum dtype dtype, enum comm_op op);
static void exchange(struct comm *c, const void *send, void *recv);
static void start_exchange(struct comm *c, struct stream *s, const void *send, void *recv);
static bool singleton_of_many(int size, char *why, size_t why_size);

/* ---- device plane ---- */

static void mpi_all_reduce(struct comm *c, const struct tensor *buf, enum comm_op op,
                           struct stream *s)
{
    ASSERT(c);
    const int64_t bytes = (int64_t)bytes_of(buf);
    reduce_all(c, buf->data, tensor_numel(buf), buf->dtype, op);
    c->sent_bytes += 2 * bytes / c->size * (c->size - 1);
}

static void mpi_all_gather(struct comm *c, const struct tensor *send, const struct tensor *recv,
                           struct stream *s)
{
    ASSERT(c);
    const size_t bytes = bytes_of(send);
    ASSERT(send->dtype == recv->dtype && bytes_of(recv) == bytes * (size_t)c->size);
    if (bytes == 0)
        return;
    char *own = (char *)recv->data + (size_t)c->rank * bytes;
    const void *from = send->data == own ? MPI_IN_PLACE : send->data;
    c->sent_bytes += (int64_t)bytes * (c->size - 1);
    if (s && s->deferred) {
        struct comm_pending *p = start_pending(c, s, 0);
        CHECK_MPI(MPI_Iallgather_c(from, (MPI_Count)bytes, MPI_BYTE, recv->data, (MPI_Count)bytes,
                                   MPI_BYTE, c->native->comm, &p->request),
                  c);
        return;
    }
    CHECK_MPI(MPI_Allgather_c(from, (MPI_Count)bytes, MPI_BYTE, recv->data, (MPI_Count)bytes,
                              MPI_BYTE, c->native->comm),
              c);
}

static void mpi_reduce_scatter(struct comm *c, const struct tensor *send, const struct tensor *recv,
                               enum comm_op op, struct stream *s)
{
    ASSERT(c);
    struct comm_native *m = c->native;
    const int64_t n = tensor_numel(recv);
    const size_t width = dtype_bytes(send->dtype);
    ASSERT(send->dtype == recv->dtype && bytes_of(send) == bytes_of(recv) * (size_t)c->size);
    c->sent_bytes += n * (int64_t)width * (c->size - 1);
    if (s && s->deferred && n > 0) {
        const MPI_Count part = n * (MPI_Count)width;
        struct comm_pending *p = start_pending(c, s, (size_t)part * (size_t)c->size);
        p->sum = true;
        p->dtype = send->dtype;
        p->op = op;
        p->count = n;
        p->out = recv->data;
        CHECK_MPI(MPI_Ialltoall_c(send->data, part, MPI_BYTE, p->parts, part, MPI_BYTE, m->comm,
                                  &p->request),
                  c);
        return;
    }
    const int64_t piece =
        PIECE_BYTES / ((int64_t)width * c->size) > 0 ? PIECE_BYTES / ((int64_t)width * c->size) : 1;
    for (int64_t first = 0; first < n; first += piece) {
        const int64_t count = n - first < piece ? n - first : piece;
        void *parts = scratch(c, (size_t)count * width * (size_t)c->size);
        for (int r = 0; r < c->size; r++) {
            m->send_count[r] = m->recv_count[r] = count * (int64_t)width;
            m->send_at[r] = (r * n + first) * (int64_t)width;
            m->recv_at[r] = r * count * (int64_t)width;
        }
        exchange(c, send->data, parts);
        /* Written over this rank's own part of `send` when they share memory: that part has been
         * sent. */
        comm_sum(send->dtype, op, parts, c->size, count,
                 (char *)recv->data + (size_t)first * width);
    }
}

static void mpi_broadcast(struct comm *c, const struct tensor *buf, int root, struct stream *s)
{
    ASSERT(c && root >= 0 && root < c->size);
    const size_t bytes = bytes_of(buf);
    if (bytes == 0 || c->size == 1)
        return;
    CHECK_MPI(MPI_Bcast_c(buf->data, (MPI_Count)bytes, MPI_BYTE, root, c->native->comm), c);
    if (c->rank == root)
        c->sent_bytes += (int64_t)bytes;
}

static void mpi_all_to_all_v(struct comm *c, const struct tensor *send, const int64_t *send_rows,
                             const struct tensor *recv, const int64_t *recv_rows, struct stream *s)
{
    ASSERT(c);
    struct comm_native *m = c->native;
    bytes_of(send);
    bytes_of(recv);
    ASSERT(send->dtype == recv->dtype && tensor_cols(send) == tensor_cols(recv));
    const int64_t row = tensor_cols(send) * (int64_t)dtype_bytes(send->dtype);
    int64_t out = 0, in = 0;
    for (int r = 0; r < c->size; r++) {
        ASSERT(send_rows[r] >= 0 && recv_rows[r] >= 0);
        m->send_count[r] = send_rows[r] * row;
        m->recv_count[r] = recv_rows[r] * row;
        m->send_at[r] = out * row;
        m->recv_at[r] = in * row;
        out += send_rows[r];
        in += recv_rows[r];
    }
    ASSERT(out <= tensor_rows(send) && in <= tensor_rows(recv));
    c->sent_bytes += (out - send_rows[c->rank]) * row;
    if (s && s->deferred)
        start_exchange(c, s, send->data, recv->data);
    else
        exchange(c, send->data, recv->data);
}

static void check_received(const struct comm *c, const MPI_Status *status, int64_t expected)
{
    MPI_Count got = 0;
    CHECK_MPI(MPI_Get_count_c(status, MPI_BYTE, &got), c);
    if (got != expected)
        FATAL(EXIT_INTERNAL, "%s: rank %d of the group sent %lld bytes, %lld were expected",
              c->name, status->MPI_SOURCE, (long long)got, (long long)expected);
}

static void mpi_group_begin(struct comm *c)
{
    ASSERT(c && !c->native->open);
    c->native->open = true;
}

/* Until every message of the bracket is done. */
static void wait_all(struct comm *c)
{
    struct comm_native *m = c->native;
    if (m->n_requests > 0) {
        enter_mpi("MPI_Waitall(", c);
        const int status = MPI_Waitall(m->n_requests, m->request, m->status);
        /* Then every message has a status of its own; the first that went wrong is named. */
        for (int i = 0; i < m->n_requests && status == MPI_ERR_IN_STATUS; i++)
            if (m->status[i].MPI_ERROR != MPI_ERR_PENDING)
                check_mpi(m->status[i].MPI_ERROR, "MPI_Waitall(", c, __LINE__);
        check_mpi(status, "MPI_Waitall(", c, __LINE__);
    }
    for (int i = 0; i < m->n_requests; i++)
        if (m->expected[i] >= 0)
            check_received(c, &m->status[i], m->expected[i]);
    m->n_requests = 0;
}

static void mpi_group_end(struct comm *c, struct stream *s)
{
    ASSERT(c->native->open);
    c->native->open = false;
    wait_all(c);
}

static MPI_Request *next_request(struct comm_native *m, int64_t expected)
{
    if (m->n_requests == m->request_capacity) {
        const size_t capacity = m->request_capacity ? 2 * (size_t)m->request_capacity : 16;
        m->request = xrealloc(m->request, capacity, sizeof *m->request);
        m->status = xrealloc(m->status, capacity, sizeof *m->status);
        m->expected = xrealloc(m->expected, capacity, sizeof *m->expected);
        m->request_capacity = (int)capacity;
    }
    m->expected[m->n_requests] = expected;
    return &m->request[m->n_requests++];
}

static void mpi_send(struct comm *c, const struct tensor *buf, int peer, struct stream *s)
{
    ASSERT(c && peer >= 0 && peer < c->size);
    const size_t bytes = bytes_of(buf);
    if (bytes == 0)
        return;
    c->sent_bytes += (int64_t)bytes;
    if (c->native->open)
        CHECK_MPI(MPI_Isend_c(buf->data, (MPI_Count)bytes, MPI_BYTE, peer, POINT_TAG,
                              c->native->comm, next_request(c->native, -1)),
                  c);
    else
        CHECK_MPI(
            MPI_Send_c(buf->data, (MPI_Count)bytes, MPI_BYTE, peer, POINT_TAG, c->native->comm), c);
}

static void mpi_recv(struct comm *c, const struct tensor *buf, int peer, struct stream *s)
{
    ASSERT(c && peer >= 0 && peer < c->size);
    const size_t bytes = bytes_of(buf);
    if (bytes == 0)
        return;
    if (c->native->open) {
        CHECK_MPI(MPI_Irecv_c(buf->data, (MPI_Count)bytes, MPI_BYTE, peer, POINT_TAG,
                              c->native->comm, next_request(c->native, (int64_t)bytes)),
                  c);
    } else {
        MPI_Status status;
        CHECK_MPI(MPI_Recv_c(buf->data, (MPI_Count)bytes, MPI_BYTE, peer, POINT_TAG,
                             c->native->comm, &status),
                  c);
        check_received(c, &status, (int64_t)bytes);
    }
}

static void mpi_drain(struct stream *s)
{
    while (s && s->pending) {
        struct comm_pending *p = s->pending;
        struct comm *c = p->comm;
        /* Started by whoever asked for start_pending. */
        CHECK_MPI(MPI_Wait(&p->request, MPI_STATUS_IGNORE),
                  c); /* NOLINT(clang-analyzer-optin.mpi.MPI-Checker) */
        if (p->sum)
            comm_sum(p->dtype, p->op, p->parts, c->size, p->count, p->out);
        s->pending = p->next;
        p->next = c->native->pool->idle;
        c->native->pool->idle = p;
    }
}

/* Messages over MPI need nothing beyond the communicator. */
static void mpi_attach(struct comm *c) {}
static void mpi_detach(struct comm *c) {}

const struct comm_ops comm_mpi = {
    .name = "mpi",
    .attach = mpi_attach,
    .detach = mpi_detach,
    .all_reduce = mpi_all_reduce,
    .all_gather = mpi_all_gather,
    .reduce_scatter = mpi_reduce_scatter,
    .broadcast = mpi_broadcast,
    .all_to_all_v = mpi_all_to_all_v,
    .group_begin = mpi_group_begin,
    .send = mpi_send,
    .recv = mpi_recv,
    .group_end = mpi_group_end,
    .drain = mpi_drain,
};

/* ---- MPI itself ---- */

bool comm_start(int *argc, char ***argv, struct comm **world, char *why, size_t why_size)
{
    int provided = 0, size = 0;
    MPI_Comm own;
    *world = NULL;
    if (MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided) != MPI_SUCCESS) {
        snprintf(why, why_size, "MPI could not start");
        return false;
    }
    CHECK_MPI(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN), NULL);
    CHECK_MPI(MPI_Comm_size(MPI_COMM_WORLD, &size), NULL);
    if (singleton_of_many(size, why, why_size)) {
        MPI_Finalize();
        return false;
    }
    if (provided < MPI_THREAD_FUNNELED) {
        snprintf(why, why_size,
                 "this MPI library offers no thread level FUNNELED, "
                 "which the data reader's threads need");
        MPI_Finalize();
        return false;
    }
    CHECK_MPI(MPI_Comm_dup(MPI_COMM_WORLD, &own), NULL);
    struct pool *pool = xcalloc(1, sizeof *pool);
    *world = wrap(own, "world", pool);
    return true;
}

void comm_finish(struct comm *world)
{
    comm_free(world);
    check_on_abort(NULL); /* MPI cannot end the job any more */
    MPI_Finalize();
}

_Noreturn void comm_abort(int code)
{
    MPI_Abort(MPI_COMM_WORLD, code);
    for (;;)
        pause();
}

struct comm *comm_split(struct comm *parent, int color, const char *name)
{
    MPI_Comm handle;
    CHECK_MPI(MPI_Comm_split(parent->native->comm, color < 0 ? MPI_UNDEFINED : color, parent->rank,
                             &handle),
              parent);
    return handle == MPI_COMM_NULL ? NULL : wrap(handle, name, parent->native->pool);
}

static MPI_Comm node_of(struct comm *world)
{
    MPI_Comm node;
    CHECK_MPI(MPI_Comm_split_type(world->native->comm, MPI_COMM_TYPE_SHARED, world->rank,
                                  MPI_INFO_NULL, &node),
              world);
    return node;
}

struct comm *comm_split_node(struct comm *world, int color, const char *name)
{
    MPI_Comm node = node_of(world), handle;
    CHECK_MPI(MPI_Comm_split(node, color, world->rank, &handle), world);
    CHECK_MPI(MPI_Comm_free(&node), world);
    return wrap(handle, name, world->native->pool);
}

void comm_free(struct comm *c)
{
    if (!c)
        return;
    struct comm_native *m = c->native;
    CHECK_MPI(MPI_Comm_free(&m->comm), c);
    if (--m->pool->users == 0) {
        for (struct comm_pending *p = m->pool->idle, *next; p; p = next) {
            next = p->next;
            free(p->parts);
            free(p);
        }
        free(m->pool->data);
        free(m->pool);
    }
    free(m->send_count);
    free(m->recv_count);
    free(m->send_at);
    free(m->recv_at);
    free(m->request);
    free(m->status);
    free(m->expected);
    free(m);
    free((char *)c->name);
    free(c);
}

void comm_node(struct comm *world, int *node_size, int *node_rank, int *n_nodes)
{
    MPI_Comm node = node_of(world);
    int64_t first;
    CHECK_MPI(MPI_Comm_size(node, node_size), world);
    CHECK_MPI(MPI_Comm_rank(node, node_rank), world);
    CHECK_MPI(MPI_Comm_free(&node), world);
    first = *node_rank == 0;
    comm_host_reduce_i64(world, &first, 1, COMM_SUM);
    *n_nodes = (int)first;
}

const char *comm_library(void)
{
    struct log_process *p = log_process();
    char text[MPI_MAX_LIBRARY_VERSION_STRING];
    int length = 0;
    if (!*p->library && MPI_Get_library_version(text, &length) == MPI_SUCCESS) {
        /* "MPICH Version:\t4.0.2\n..." or "Open MPI v4.1.6, ...": the first line, blanks for tabs.
         */
        text[strcspn(text, "\n")] = '\0';
        for (char *c = text; *c; c++)
            if (*c == '\t')
                *c = ' ';
        snprintf(p->library, sizeof p->library, "%.*s", (int)sizeof p->library - 1, text);
    }
    return p->library;
}

int64_t comm_take_sent_bytes(struct comm *c)
{
    if (!c)
        return 0;
    const int64_t bytes = c->sent_bytes;
    c->sent_bytes = 0;
    return bytes;
}

void *comm_mpi_handle(struct comm *c)
{
    return &c->native->comm;
}

/* ---- host plane ---- */

void comm_host_barrier(struct comm *c)
{
    CHECK_MPI(MPI_Barrier(c->native->comm), c);
}

void comm_host_broadcast(struct comm *c, void *buf, size_t bytes, int root)
{
    if (bytes > 0)
        CHECK_MPI(MPI_Bcast_c(buf, (MPI_Count)bytes, MPI_BYTE, root, c->native->comm), c);
}

void comm_host_reduce_i64(struct comm *c, int64_t *v, int n, enum comm_op op)
{
    reduce_all(c, (char *)v, n, DTYPE_I64, op);
}

void comm_host_reduce_f64(struct comm *c, double *v, int n, enum comm_op op)
{
    reduce_all(c, (char *)v, n, DTYPE_F64, op);
}

void comm_host_gather(struct comm *c, const void *send, size_t bytes, void *recv, int root)
{
    if (bytes > 0)
        CHECK_MPI(MPI_Gather_c(send, (MPI_Count)bytes, MPI_BYTE, recv, (MPI_Count)bytes, MPI_BYTE,
                               root, c->native->comm),
                  c);
}

void comm_host_exchange(struct comm *c, int n_send, const int *send_peer, const void *send,
                        int n_recv, const int *recv_peer, void *recv, size_t bytes)
{
    ASSERT(c && !c->native->open && c->native->n_requests == 0);
    for (int i = 0; i < n_recv; i++)
        CHECK_MPI(MPI_Irecv_c((char *)recv + (size_t)i * bytes, (MPI_Count)bytes, MPI_BYTE,
                              recv_peer[i], HOST_TAG, c->native->comm,
                              next_request(c->native, (int64_t)bytes)),
                  c);
    for (int i = 0; i < n_send; i++)
        CHECK_MPI(MPI_Isend_c((const char *)send + (size_t)i * bytes, (MPI_Count)bytes, MPI_BYTE,
                              send_peer[i], HOST_TAG, c->native->comm, next_request(c->native, -1)),
                  c);
    wait_all(c);
}

static void merge_lines(struct errors *e, const char *text, int64_t length)
{
    for (const char *line = text; line < text + length; line += strlen(line) + 1) {
        bool known = false;
        for (int i = 0; i < e->count && !known; i++)
            known = strcmp(e->line[i], line) == 0;
        if (!known)
            errors_add(e, e->worst, "%s", line);
    }
}

int comm_host_collect_errors(struct comm *c, struct errors *e)
{
    /* The usual case, no errors anywhere, costs one reduction. */
    int64_t v[2] = { e->count > 0 ? e->worst : INT64_MAX, 0 };
    comm_host_reduce_i64(c, v, 1, COMM_MIN);
    if (v[0] == INT64_MAX)
        return 0;
    int64_t length = 0, count;
    for (int i = 0; i < e->count; i++)
        length += (int64_t)strlen(e->line[i]) + 1;
    if (c->rank != 0) {
        char *text = xmalloc((size_t)length, 1), *p = text;
        for (int i = 0; i < e->count; i++)
            p = stpcpy(p, e->line[i]) + 1;
        CHECK_MPI(MPI_Send_c(text, length, MPI_BYTE, 0, ERRORS_TAG, c->native->comm), c);
        free(text);
    }
    for (int r = 1; r < c->size && c->rank == 0; r++) {
        MPI_Status status;
        MPI_Count bytes = 0;
        CHECK_MPI(MPI_Probe(r, ERRORS_TAG, c->native->comm, &status), c);
        CHECK_MPI(MPI_Get_count_c(&status, MPI_BYTE, &bytes), c);
        char *text = xmalloc((size_t)bytes, 1);
        CHECK_MPI(
            MPI_Recv_c(text, bytes, MPI_BYTE, r, ERRORS_TAG, c->native->comm, MPI_STATUS_IGNORE),
            c);
        merge_lines(e, text, bytes);
        free(text);
    }
    e->worst = (enum exit_code)v[0];
    count = e->count;
    comm_host_broadcast(c, &count, sizeof count, 0);
    return (int)count;
}

/* ---- helpers ---- */

static void enter_mpi(const char *call, const struct comm *c)
{
    struct log_process *p = log_process();
    p->group = c ? c->name : "world";
    p->call = call;
}

static void check_mpi(int status, const char *call, const struct comm *c, int line)
{
    log_process()->call = NULL;
    log_beat();
    if (status == MPI_SUCCESS)
        return;
    char text[MPI_MAX_ERROR_STRING] = "unknown error";
    int length = 0;
    MPI_Error_string(status, text, &length);
    text[strcspn(text, "\n")] = '\0';
    fatal(EXIT_INTERNAL, __FILE__, line, NULL, "%.*s on %s (%d ranks): %s", (int)strcspn(call, "("),
          call, c ? c->name : "world", c ? c->size : 0, text);
}

static struct comm *wrap(MPI_Comm handle, const char *name, struct pool *pool)
{
    struct comm *c = xcalloc(1, sizeof *c);
    c->name = xstrdup(name);
    c->native = xcalloc(1, sizeof *c->native);
    c->native->comm = handle;
    c->native->pool = pool;
    pool->users++;
    CHECK_MPI(MPI_Comm_set_errhandler(handle, MPI_ERRORS_RETURN), c);
    CHECK_MPI(MPI_Comm_size(handle, &c->size), c);
    CHECK_MPI(MPI_Comm_rank(handle, &c->rank), c);
    c->native->send_count = xcalloc((size_t)c->size, sizeof *c->native->send_count);
    c->native->recv_count = xcalloc((size_t)c->size, sizeof *c->native->recv_count);
    c->native->send_at = xcalloc((size_t)c->size, sizeof *c->native->send_at);
    c->native->recv_at = xcalloc((size_t)c->size, sizeof *c->native->recv_at);
    return c;
}

/* Bytes of a tensor that must be dense and lie on the host. */
static size_t bytes_of(const struct tensor *t)
{
    ASSERT(t->ld == tensor_cols(t) || tensor_rows(t) <= 1);
    return (size_t)tensor_numel(t) * dtype_bytes(t->dtype);
}

/* Grows to its final size in the first iteration and stays there. */
static void *scratch(struct comm *c, size_t bytes)
{
    struct pool *pool = c->native->pool;
    if (bytes > pool->bytes) {
        free(pool->data);
        pool->data = xmalloc(bytes, 1);
        pool->bytes = bytes;
    }
    return pool->data;
}

/* A new last entry of the stream's list with room for `bytes`; what is in it already gets a chance
 * to move. */
static struct comm_pending *start_pending(struct comm *c, struct stream *s, size_t bytes)
{
    struct pool *pool = c->native->pool;
    struct comm_pending *p, **best = NULL, **end = &s->pending;
    for (int done = 0; *end; end = &(*end)->next)
        CHECK_MPI(MPI_Test(&(*end)->request, &done, MPI_STATUS_IGNORE), c);
    /* The least that is large enough, or else the largest, which grows. */
    for (struct comm_pending **i = &pool->idle; *i; i = &(*i)->next) {
        const bool fits = (*i)->bytes >= bytes, had = best && (*best)->bytes >= bytes;
        if (!best || (fits && (!had || (*i)->bytes < (*best)->bytes)) ||
            (!fits && !had && (*i)->bytes > (*best)->bytes))
            best = i;
    }
    p = best ? *best : xcalloc(1, sizeof *p);
    if (best)
        *best = p->next;
    if (p->bytes < bytes) {
        free(p->parts);
        p->parts = xmalloc(bytes, 1);
        p->bytes = bytes;
    }
    *p = (struct comm_pending){ .comm = c, .parts = p->parts, .bytes = p->bytes };
    *end = p;
    return p;
}

/* MPI_Alltoallv with the counts and offsets of c->native. */
static void exchange(struct comm *c, const void *send, void *recv)
{
    const struct comm_native *m = c->native;
    CHECK_MPI(MPI_Alltoallv_c(send, m->send_count, m->send_at, MPI_BYTE, recv, m->recv_count,
                              m->recv_at, MPI_BYTE, m->comm),
              c);
}

/* The same, started: the counts and offsets must live until it is done, those of c->native may
 * not. */
static void start_exchange(struct comm *c, struct stream *s, const void *send, void *recv)
{
    const struct comm_native *m = c->native;
    const size_t n = (size_t)c->size;
    struct comm_pending *p = start_pending(c, s, 2 * n * (sizeof(MPI_Count) + sizeof(MPI_Aint)));
    MPI_Count *count = p->parts;
    MPI_Aint *at = (MPI_Aint *)(count + 2 * n);
    memcpy(count, m->send_count, n * sizeof *count);
    memcpy(count + n, m->recv_count, n * sizeof *count);
    memcpy(at, m->send_at, n * sizeof *at);
    memcpy(at + n, m->recv_at, n * sizeof *at);
    CHECK_MPI(MPI_Ialltoallv_c(send, count, at, MPI_BYTE, recv, count + n, at + n, MPI_BYTE,
                               m->comm, &p->request),
              c);
}

/* Short: every rank gets all parts and adds them. Long: rank r gets and adds the r-th slice of each
 * piece, then all get all slices. */
static void reduce_all(struct comm *c, char *data, int64_t n, enum dtype dtype, enum comm_op op)
{
    struct comm_native *m = c->native;
    const int64_t width = (int64_t)dtype_bytes(dtype), size = c->size;
    if (n == 0 || size == 1)
        return;
    if (n < size || n * width <= SMALL_BYTES / size) {
        void *parts = scratch(c, (size_t)(n * width * size));
        CHECK_MPI(MPI_Allgather_c(data, n * width, MPI_BYTE, parts, n * width, MPI_BYTE, m->comm),
                  c);
        comm_sum(dtype, op, parts, c->size, n, data);
        return;
    }
    const int64_t piece = PIECE_BYTES / width;
    for (int64_t first = 0; first < n; first += piece) {
        const int64_t count = n - first < piece ? n - first : piece,
                      slice = (count + size - 1) / size;
        const int64_t own_first = c->rank * slice < count ? c->rank * slice : count;
        const int64_t own = count - own_first < slice ? count - own_first : slice;
        char *base = data + first * width, *parts = scratch(c, (size_t)(slice * size * width));
        for (int64_t r = 0; r < size; r++) {
            const int64_t at = r * slice < count ? r * slice : count;
            m->send_count[r] = (count - at < slice ? count - at : slice) * width;
            m->send_at[r] = at * width;
            m->recv_count[r] = own * width;
            m->recv_at[r] = r * own * width;
        }
        exchange(c, base, parts);
        comm_sum(dtype, op, parts, c->size, own, base + own_first * width);
        CHECK_MPI(MPI_Allgatherv_c(MPI_IN_PLACE, 0, MPI_BYTE, base, m->send_count, m->send_at,
                                   MPI_BYTE, m->comm),
                  c);
    }
}

/* A launcher that does not speak this library's start-up protocol starts N programs that each
 * believe to be alone. */
static bool singleton_of_many(int size, char *why, size_t why_size)
{
    static const char *const pmi[] = { "PMI_RANK", "PMI_FD", "PMI_PORT", "PMIX_RANK" };
    const char *tasks = getenv("SLURM_NTASKS"), *step = getenv("SLURM_STEP_NUM_TASKS"),
               *pmi_size = getenv("PMI_SIZE"), *other = getenv("OMPI_COMM_WORLD_SIZE");
    bool spoken = false;
    if (size > 1)
        return false;
    if (pmi_size && atol(pmi_size) > 1) {
        snprintf(why, why_size,
                 "the launcher started %s ranks but this MPI library (%s) sees only one", pmi_size,
                 comm_library());
        return true;
    }
    if (other && atol(other) > 1) {
        snprintf(why, why_size,
                 "Open MPI's launcher started %s ranks, but this program uses %s: "
                 "use that library's mpiexec",
                 other, comm_library());
        return true;
    }
    for (size_t i = 0; i < sizeof pmi / sizeof *pmi; i++)
        spoken = spoken || getenv(pmi[i]);
    if (spoken || !tasks || atol(tasks) <= 1 || (step && atol(step) == 1))
        return false;
    snprintf(
        why, why_size,
        "Slurm says %s tasks but this program is alone: start it with 'srun --mpi=pmi2' or mpiexec "
        "(one rank on purpose: unset SLURM_NTASKS)",
        tasks);
    return true;
}
