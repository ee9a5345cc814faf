/* attention_cudnn.cpp - scaled dot-product attention through cuDNN's graphs (cudnn-frontend),
 * behind attention.h.
 *
 * The only file that speaks C++ to cuDNN. A plan belongs to one shape and is kept for the life of
 * the stream; the backward is the deterministic one unless any order is allowed. Statistics are
 * log-sum-exps in fp32.
 */
#define CUDNN_FRONTEND_SKIP_JSON_LIB
#include <cudnn_frontend.h>
#include <cstring>
#include <map>
#include <memory>
#include <vector>
#include "attention.h"
#include "cuda_util.h"

namespace fe = cudnn_frontend;

enum uid : int64_t {
    Q = 1,
    K,
    V,
    O,
    STATS,
    DO,
    DQ,
    DK,
    DV,
    QKV_OFFSET,
    O_OFFSET,
    STATS_OFFSET,
    LENGTH
};

struct less_shape {
    static std::vector<int64_t> key(const cuda_attention_shape &s)
    {
        return { s.batch, s.heads,     s.d,     s.max_len, s.row,    s.head,     s.group,
                 s.o_row, s.stats_row, s.total, s.packed,  s.causal, s.backward, s.any_order };
    }
    bool operator()(const cuda_attention_shape &a, const cuda_attention_shape &b) const
    {
        return key(a) < key(b);
    }
};

struct plan {
    std::shared_ptr<fe::graph::Graph> graph;
    int64_t workspace = 0;
};

struct cuda_attention {
    cudnnHandle_t handle = nullptr;
    std::map<cuda_attention_shape, plan, less_shape> plans;
};

static void check_cudnn(cudnnStatus_t status, const char *call)
{
    if (status != CUDNN_STATUS_SUCCESS)
        fatal(EXIT_INTERNAL, __FILE__, __LINE__, nullptr, "%s: %s", call,
              cudnnGetErrorString(status));
}

static void check_graph(fe::error_t e, const char *step, const cuda_attention_shape &s)
{
    if (e.is_bad())
        fatal(EXIT_INTERNAL, __FILE__, __LINE__, nullptr,
              "cuDNN attention, %s of %s %s, batch %lld heads %lld d %lld length %lld: %s", step,
              s.packed ? "packed" : "plain", s.backward ? "backward" : "forward",
              (long long)s.batch, (long long)s.heads, (long long)s.d, (long long)s.max_len,
              e.get_message().c_str());
}

using tensor_ptr = std::shared_ptr<fe::graph::Tensor_attributes>;

/* The shape of one operand: batch x heads x length x d. */
struct layout {
    std::vector<int64_t> dim, stride;
    tensor_ptr offset;
};

static fe::graph::Tensor_attributes describe(const char *name, int64_t id, const layout &l,
                                             fe::DataType_t type)
{
    auto t = fe::graph::Tensor_attributes()
                 .set_name(name)
                 .set_uid(id)
                 .set_dim(l.dim)
                 .set_stride(l.stride)
                 .set_data_type(type);
    if (l.offset)
        t.set_ragged_offset(l.offset);
    return t;
}

static tensor_ptr whole_numbers(fe::graph::Graph &g, const char *name, int64_t id, int64_t n,
                                fe::DataType_t type)
{
    return g.tensor(fe::graph::Tensor_attributes()
                        .set_name(name)
                        .set_uid(id)
                        .set_dim({ n, 1, 1, 1 })
                        .set_stride({ 1, 1, 1, 1 })
                        .set_data_type(type));
}

static void describe_output(const tensor_ptr &t, int64_t id, const layout &l, fe::DataType_t type)
{
    t->set_output(true).set_uid(id).set_dim(l.dim).set_stride(l.stride).set_data_type(type);
    if (l.offset)
        t->set_ragged_offset(l.offset);
}

static plan build(cudnnHandle_t handle, const cuda_attention_shape &s)
{
    const auto half = fe::DataType_t::BFLOAT16, full = fe::DataType_t::FLOAT;
    plan p;
    p.graph = std::make_shared<fe::graph::Graph>();
    fe::graph::Graph &g = *p.graph;
    g.set_io_data_type(half).set_intermediate_data_type(full).set_compute_data_type(full);

    tensor_ptr qkv_offset, o_offset, stats_offset, length;
    if (s.packed) {
        qkv_offset = whole_numbers(g, "qkv_offset", QKV_OFFSET, s.batch + 1, fe::DataType_t::INT64);
        o_offset = whole_numbers(g, "o_offset", O_OFFSET, s.batch + 1, fe::DataType_t::INT64);
        stats_offset =
            whole_numbers(g, "stats_offset", STATS_OFFSET, s.batch + 1, fe::DataType_t::INT64);
        length = whole_numbers(g, "length", LENGTH, s.batch, fe::DataType_t::INT32);
    }
    /* Packed: a batch stride is never used but must be there. */
    const int64_t next = s.packed ? s.max_len * s.row : s.group, keys = s.packed ? s.heads : 1;
    const layout q{ { s.batch, s.heads, s.max_len, s.d }, { next, s.head, s.row, 1 }, qkv_offset };
    const layout kv{ { s.batch, keys, s.max_len, s.d },
                     { next, s.packed ? s.head : s.group, s.row, 1 },
                     qkv_offset };
    const layout o{ { s.batch, s.heads, s.max_len, s.d },
                    { s.packed ? s.max_len * s.o_row : s.heads * s.d, s.d, s.o_row, 1 },
                    o_offset };
    const layout stats = s.packed ? layout{ { s.batch, s.heads, s.max_len, 1 },
                                            { s.max_len * s.stats_row, 1, s.stats_row, 1 },
                                            stats_offset }
                                  : layout{ { s.batch, s.heads, s.max_len, 1 },
                                            { s.heads * s.max_len, s.max_len, 1, 1 },
                                            nullptr };
    const float scale = 1.0f / std::sqrt((float)s.d);
    auto tq = g.tensor(describe("q", Q, q, half)), tk = g.tensor(describe("k", K, kv, half)),
         tv = g.tensor(describe("v", V, kv, half));
    if (!s.backward) {
        auto a = fe::graph::SDPA_attributes()
                     .set_name("attention")
                     .set_generate_stats(true)
                     .set_attn_scale(scale)
                     .set_causal_mask(s.causal);
        if (s.packed)
            a.set_padding_mask(true).set_seq_len_q(length).set_seq_len_kv(length);
        auto [to, ts] = g.sdpa(tq, tk, tv, a);
        describe_output(to, O, o, half);
        describe_output(ts, STATS, stats, full);
    } else {
        auto to = g.tensor(describe("o", O, o, half)), tdo = g.tensor(describe("do", DO, o, half)),
             ts = g.tensor(describe("stats", STATS, stats, full));
        auto a = fe::graph::SDPA_backward_attributes()
                     .set_name("attention_backward")
                     .set_attn_scale(scale)
                     .set_causal_mask(s.causal)
                     .set_deterministic_algorithm(!s.any_order);
        if (s.packed)
            a.set_padding_mask(true)
                .set_seq_len_q(length)
                .set_seq_len_kv(length)
                .set_max_total_seq_len_q(s.total)
                .set_max_total_seq_len_kv(s.total);
        auto [dq, dk, dv] = g.sdpa_backward(tq, tk, tv, to, tdo, ts, a);
        describe_output(dq, DQ, q, half);
        describe_output(dk, DK, kv, half);
        describe_output(dv, DV, kv, half);
    }
    check_graph(g.validate(), "description", s);
    check_graph(g.build_operation_graph(handle), "graph", s);
    check_graph(g.create_execution_plans({ fe::HeurMode_t::A }), "choice of a plan", s);
    check_graph(g.check_support(handle), "support", s);
    check_graph(g.build_plans(handle), "plan", s);
    check_graph(g.get_workspace_size(p.workspace), "workspace", s);
    return p;
}

static plan &plan_of(struct cuda_context *c, const cuda_attention_shape &s)
{
    if (!c->attention) {
        c->attention = new cuda_attention;
        check_cudnn(cudnnCreate(&c->attention->handle), "cudnnCreate");
        check_cudnn(cudnnSetStream(c->attention->handle, c->stream), "cudnnSetStream");
    }
    auto at = c->attention->plans.find(s);
    if (at == c->attention->plans.end())
        at = c->attention->plans.emplace(s, build(c->attention->handle, s)).first;
    return at->second;
}

extern "C" size_t cuda_attention_workspace(struct cuda_context *c,
                                           const struct cuda_attention_shape *shape)
{
    return (size_t)plan_of(c, *shape).workspace;
}

extern "C" void cuda_attention_run(struct cuda_context *c, const struct cuda_attention_shape *shape,
                                   const struct cuda_attention_pointers *p)
{
    plan &use = plan_of(c, *shape);
    if ((size_t)use.workspace > p->workspace_bytes)
        fatal(EXIT_INTERNAL, __FILE__, __LINE__, nullptr,
              "cuDNN attention wants %lld bytes of workspace, %zu are there",
              (long long)use.workspace, p->workspace_bytes);
    std::unordered_map<int64_t, void *> pack = {
        { Q, p->q }, { K, p->k }, { V, p->v }, { O, p->o }, { STATS, p->stats }
    };
    if (shape->packed) {
        pack[QKV_OFFSET] = (void *)p->qkv_offset;
        pack[O_OFFSET] = (void *)p->o_offset;
        pack[STATS_OFFSET] = (void *)p->stats_offset;
        pack[LENGTH] = (void *)p->length;
    }
    if (shape->backward) {
        pack[DO] = p->d_o;
        pack[DQ] = p->dq;
        pack[DK] = p->dk;
        pack[DV] = p->dv;
    }
    check_graph(use.graph->execute(c->attention->handle, pack, p->workspace), "execution", *shape);
}

extern "C" void cuda_attention_free(struct cuda_attention *a)
{
    if (!a)
        return;
    check_cudnn(cudnnDestroy(a->handle), "cudnnDestroy");
    delete a;
}
