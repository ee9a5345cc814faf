#!/usr/bin/env python3
"""Sharding that is real: what the ranks of a layout count in their trace (matrix products, arenas, sent bytes) adds up to the one-rank
run plus exactly the parts that are named here as replicated. The expectation is computed from the logical shapes of the
checkpoint, a table of how each tensor is cut and the deck's sizes (parallel.md 6.2, model.md 0.4). The checker itself is
tested with faked numbers of layouts where each rank does everything. Then: forced load balancing gives one trace on every layout.
"""
import glob
import math
import os

import h5py
import numpy as np

from harness import Mimo, Tap, compare, trace

ITEM = 8                                   # bytes of an element, fp64
BLOCK, SLOT, BUCKET = 256, 64, 128         # arena alignment in bytes; elements that parameters and buckets are padded to
BATCH, S, H, EXPERTS, TOPK, E_LAYERS, LAYERS = 8, 64, 64, 8, 2, 2, 6
ITERATIONS = 2

# How tensor parallelism cuts a tensor, by the end of its name; experts are cut by expert parallelism.
CUT = ("word_embeddings.weight", "output_layer.weight", "in_proj.weight", "conv1d_weight", "conv1d_bias", "dt_bias", "A_log", ".D",
       "mixer.norm.weight", "out_proj.weight", "linear_qkv.weight", "linear_qkv.bias", "linear_proj.weight", "linear_fc1.weight",
       "linear_fc1.bias", "linear_fc2.weight", "embedder.weight", "projector/encoder.weight")
REPLICATED = ("layer_norm_weight", "layer_norm_bias", "layernorm.weight", "layernorm.bias", "final_norm.weight", "router.weight",
              "expert_bias", "class_token", "position_embeddings", "linear_proj.bias", "linear_fc2.bias")

# Matrix products that more than one rank computes, as {name: FLOP}: none. The router works on each rank's own rows, picture
# embeddings are computed once, and nothing is recomputed.
REPLICATED_FLOPS = {}


def up(n, to):
    return -(-n // to) * to


class Layout:
    """tp and dp of both grids, ep of the language grid; `stage` says what trains."""

    def __init__(self, kind="colocated", encoder=(1, 1), language=(1, 1), ep=1, stage=3, forced=False, mbs=1):
        self.kind, self.encoder, self.language, self.ep, self.stage, self.forced, self.mbs = (kind, encoder, language, ep, stage, forced, mbs)
        size = [tp * dp for tp, dp in (encoder, language)]
        self.ranks = sum(size) if kind == "disjoint" else size[1]
        # Which grids each rank is in.
        self.grids = [("encoder",)] * size[0] + [("language",)] * size[1] if kind == "disjoint" else [("encoder", "language")] * self.ranks

    def size(self, grid):
        tp, dp = getattr(self, grid)
        return tp * dp

    def arguments(self):
        return ("topology.layout=" + self.kind, "topology.encoder_tp=%d" % self.encoder[0], "topology.encoder_dp=%d" % self.encoder[1],
                "topology.llm_tp=%d" % self.language[0], "topology.llm_dp=%d" % self.language[1], "topology.llm_ep=%d" % self.ep,
                "stage.training_stage=%d" % self.stage, "batch.micro_batch_size=%d" % self.mbs,
                "moe.moe_router_force_load_balancing=%s" % ("T" if self.forced else "F"))


class Tensor:
    def __init__(self, name, shape):
        self.name, self.numel = name, int(np.prod(shape))
        self.module = name.split("/")[0]
        self.grid = "language" if self.module == "language" else "encoder"
        self.expert, self.buffer = ".experts." in name, name.endswith("expert_bias")
        self.cut = not self.expert and name.endswith(CUT)
        if self.expert + self.cut + name.endswith(REPLICATED) != 1:
            raise ValueError("no one rule for " + name)

    def trains(self, layout):
        return not self.buffer and {"language": layout.stage >= 2, "projector": True, "vision": layout.stage >= 3}[self.module]

    def parts(self, layout):
        """Into how many different parts the tensor is cut."""
        return layout.ep if self.expert else getattr(layout, self.grid)[0] if self.cut else 1

    def copies(self, layout):
        """Ranks that hold the same part."""
        return layout.size(self.grid) // self.parts(layout)


def buffers(tensors, layout, grids):
    """(local elements of each trained tensor, ranks that share them) for every gradient buffer of a rank in `grids`."""
    for grid in grids:
        mine = [t for t in tensors if t.grid == grid and t.trains(layout)]
        tp, dp = getattr(layout, grid)
        apart = grid == "language" and (layout.ep > 1 or tp > 1)
        yield [t.numel // t.parts(layout) for t in mine if not (apart and t.expert)], dp
        if apart:
            yield [t.numel // layout.ep for t in mine if t.expert], tp * dp // layout.ep


def padded(numels, shares):
    return up(sum(up(n, SLOT) for n in numels), shares * BUCKET // math.gcd(shares, BUCKET))


def expected_rank(tensors, layout, grids):
    """Bytes of the parameter and optimizer arenas of one rank, and what of them is padding or scalars."""
    mine = [t for t in tensors if t.grid in grids]
    still = [t.numel // t.parts(layout) for t in mine if not t.trains(layout)]
    params, optimizer = sum(up(n * ITEM, BLOCK) for n in still), up(len(mine) * ITEM, BLOCK) + up(3 * 8, BLOCK)
    params_used, optimizer_used = sum(still) * ITEM, 0
    for numels, shares in buffers(tensors, layout, grids):
        n = padded(numels, shares)
        params += n * ITEM
        params_used += sum(numels) * ITEM
        optimizer += 3 * up(n // shares * ITEM, BLOCK)
        optimizer_used += 3.0 * sum(numels) / shares * ITEM    # this rank's mean share
    return {"params": params, "params_padding": params - params_used, "optimizer": optimizer,
            "optimizer_padding": optimizer - optimizer_used}


def sharding_faults(tensors, one, measured, layout):
    """Sentences, one for each count that does not add up."""
    out = []
    replicated = sum(REPLICATED_FLOPS.values())
    flops, alone = measured["gemm_flops"].sum(axis=1), one["gemm_flops"].sum(axis=1)
    if not np.array_equal(flops, alone + replicated):
        out.append("gemm_flops: the ranks' sum %s, one rank %s and %d replicated" % (flops, alone, replicated))
    if np.any(measured["gemm_flops"] <= 0):
        out.append("gemm_flops: a rank computes nothing")
    each = [expected_rank(tensors, layout, grids) for grids in layout.grids]
    for arena in ("params", "optimizer"):
        got = measured[arena]
        if [int(x) for x in got] != [e[arena] for e in each]:
            out.append("%s: bytes of the ranks %s, expected %s" % (arena, list(got), [e[arena] for e in each]))
        padding = sum(e[arena + "_padding"] for e in each)
        if arena == "params":      # every copy counts
            want = sum(t.numel * t.copies(layout) for t in tensors) * ITEM
        else:                      # data-parallel replicas share one state; dense tensors that tp does not cut have one on every tp rank
            want = 3 * ITEM * sum(t.numel * (1 if t.expert or t.cut else getattr(layout, t.grid)[0]) for t in tensors if t.trains(layout))
        if abs(sum(int(x) for x in got) - padding - want) > 0.5:
            out.append("%s: %d bytes on all ranks without padding, %d expected" % (arena, sum(int(x) for x in got) - padding, want))
    sent = measured["sent_bytes"]
    if layout.ranks == 1 and np.any(sent != 0):
        out.append("sent_bytes: one rank sent %s" % sent)
    if layout.ranks > 1 and np.any(sent <= 0):
        out.append("sent_bytes: a rank of several sent nothing: %s" % sent.tolist())
    return out


# ---- closed forms of what a rank sends in an iteration -----------------------------------------------------------------------

def ring(bytes_, size):
    """Reduce-scatter or all-gather of a buffer of `bytes_` over `size` ranks."""
    return bytes_ * (size - 1) // size


def gradients_sent(tensors, layout, grids):
    """Reduce-scatter of the gradients and all-gather of the values, every buffer over the ranks that share it."""
    return sum(2 * ring(padded(n, shares) * ITEM, shares) for n, shares in buffers(tensors, layout, grids))


def bias_sent(size):
    """Sum of the experts' token counts over all ranks of the language grid, each E layer."""
    return E_LAYERS * 2 * ring(8 * EXPERTS, size)


def numbers_sent(ranks):
    """The loss and three modules' squares, from every rank to every other."""
    return 4 * 8 * (ranks - 1)


def data_parallel_sent(tensors, layout):
    return gradients_sent(tensors, layout, ("encoder", "language")) + bias_sent(layout.ranks) + numbers_sent(layout.ranks)


def tensor_parallel_sent(tensors, layout):
    """A language rank without data parallelism. Layers: gather and reduce-scatter in forward, two gathers and a reduce-scatter in
    backward; embedding 1 + 1, output layer 1 + 2; the loss: maximum, sum and label's logit of each token; the balancing loss: counts of
    the experts; replicated parameters: their gradients."""
    tp = layout.language[0]
    tokens = layout.mbs * S
    regions = ring(tokens * H * ITEM, tp) * (5 * LAYERS + 2 + 3)
    loss = 3 * 2 * ring(tokens * ITEM, tp)
    balance = E_LAYERS * 2 * ring(layout.mbs * EXPERTS * 8, tp)
    whole = sum(t.numel for t in tensors if t.grid == "language" and t.trains(layout) and not t.cut and not t.expert)
    return (BATCH // layout.mbs * (regions + loss + balance) + 2 * ring(whole * ITEM, tp)
            + gradients_sent(tensors, layout, ("language",)) + bias_sent(tp) + numbers_sent(layout.ranks))


def expert_parallel_sent(tensors, layout):
    """Balanced by force, a rank sends (ep-1)/ep of its rows' copies: each passes there and back in forward and backward, its
    probability there and back; and its offsets to every other rank."""
    ep = layout.ep
    copies = layout.mbs * S * TOPK * (ep - 1) // ep
    layer = 4 * copies * H * ITEM + 2 * copies * ITEM + 4 * (EXPERTS + 1) * (ep - 1)
    microbatches = BATCH // (layout.mbs * layout.language[1])
    return microbatches * E_LAYERS * layer + data_parallel_sent(tensors, layout)


# ---- runs --------------------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "colocated_dp2": Layout(encoder=(1, 2), language=(1, 2)),
    "colocated_dp4": Layout(encoder=(1, 4), language=(1, 4)),
    "disjoint_1_1": Layout("disjoint"),
    "disjoint_dp2_dp4": Layout("disjoint", encoder=(1, 2), language=(1, 4)),
    "disjoint_language_tp2": Layout("disjoint", language=(2, 1)),
    "colocated_tp2": Layout(encoder=(2, 1), language=(2, 1)),
    "colocated_encoder_tp2": Layout(encoder=(2, 1), language=(1, 2)),
    "colocated_language_tp2": Layout(encoder=(1, 2), language=(2, 1), mbs=2),
    "colocated_ep2": Layout(encoder=(1, 2), language=(1, 2), ep=2),
    "colocated_ep4": Layout(encoder=(1, 4), language=(1, 4), ep=4),
    "disjoint_tp2_dp2_ep2": Layout("disjoint", encoder=(2, 2), language=(2, 2), ep=2),
    "colocated_tp2_dp4_ep4": Layout(encoder=(2, 4), language=(2, 4), ep=4),
    "colocated_dp4_stage1": Layout(encoder=(1, 4), language=(1, 4), stage=1),
    "disjoint_tp2_ep2_stage2": Layout("disjoint", encoder=(2, 1), language=(2, 1), ep=2, stage=2),
}
FORCED = {
    "dp4": Layout(encoder=(1, 4), language=(1, 4), forced=True),
    "language_tp2": Layout("disjoint", language=(2, 1), mbs=4, forced=True),
    "ep2": Layout(encoder=(1, 2), language=(1, 2), ep=2, forced=True),
    "ep4": Layout(encoder=(1, 4), language=(1, 4), ep=4, forced=True),
    "tp2_dp2_ep4": Layout("disjoint", encoder=(2, 2), language=(2, 2), ep=4, forced=True),
}


def launch(m, name, layout):
    out = m.path(name)
    code, stdout, stderr = m.run(
        "input/mock_tiny.nml", "run.output_dir=" + out, "run.precision=fp64", "run.train_iters=%d" % ITERATIONS,
        "batch.global_batch_size=%d" % BATCH, "checkpoint.save=" + out + "/ckpt", "checkpoint.no_save_optim=T", *layout.arguments(),
        ranks=layout.ranks)
    return out, code, stdout + stderr


def counts(directory):
    with h5py.File(os.path.join(directory, "trace.h5"), "r", locking=False) as f:
        names = [x.decode() if isinstance(x, bytes) else x for x in f["ranks/arena_bytes"].attrs["arenas"]]
        arenas = f["ranks/arena_bytes"][()]
        return {"gemm_flops": f["ranks/gemm_flops"][:ITERATIONS], "sent_bytes": f["ranks/sent_bytes"][:ITERATIONS],
                "params": arenas[:, names.index("params")], "optimizer": arenas[:, names.index("optimizer")]}


def logical_tensors(directory):
    out = []
    with h5py.File(glob.glob(os.path.join(directory, "ckpt", "iter_*", "checkpoint.h5"))[0], "r") as f:
        f["model"].visititems(lambda name, o: out.append(Tensor(name, o.shape)) if isinstance(o, h5py.Dataset) else None)
    return out


def everything_everywhere(one, ranks):
    """What a layout would count whose ranks all do the whole work."""
    return {"gemm_flops": np.repeat(one["gemm_flops"], ranks, axis=1), "sent_bytes": np.repeat(one["sent_bytes"], ranks, axis=1),
            "params": np.repeat(one["params"], ranks), "optimizer": np.repeat(one["optimizer"], ranks)}


def check_counts(tap, m):
    ones = {}
    for stage in (3, 1, 2):
        layout = Layout(stage=stage)
        out, code, text = launch(m, "one_rank_stage%d" % stage, layout)
        if not tap.result(code == 0, "one rank runs in stage %d" % stage, text):
            return
        tensors, ones[stage] = logical_tensors(out), counts(out)
        tap.result(not sharding_faults(tensors, ones[stage], ones[stage], layout), "one rank in stage %d adds up and sends nothing" % stage,
                   "\n".join(sharding_faults(tensors, ones[stage], ones[stage], layout)))
    seen = {}
    for name, layout in LAYOUTS.items():
        out, code, text = launch(m, name, layout)
        if not tap.result(code == 0, name + " runs", text):
            continue
        seen[name] = counts(out)
        faults = sharding_faults(tensors, ones[layout.stage], seen[name], layout)
        tap.result(not faults, name + " adds up to one rank and the named replicated parts", "\n".join(faults))
        fake = sharding_faults(tensors, ones[layout.stage], everything_everywhere(ones[layout.stage], layout.ranks), layout)
        tap.result(all(any(f.startswith(k) for f in fake) for k in ("gemm_flops", "optimizer", "sent_bytes")),
                   name + " is refused when each rank does everything", "\n".join(fake))
    if "colocated_tp2" in seen:    # one number wrong at a time
        layout, one = LAYOUTS["colocated_tp2"], ones[3]
        for key in ("gemm_flops", "params", "optimizer", "sent_bytes"):
            fake = dict(seen["colocated_tp2"], **{key: everything_everywhere(one, layout.ranks)[key]})
            faults = sharding_faults(tensors, one, fake, layout)
            tap.result(faults and all(f.startswith(key) for f in faults), "one rank's %s on every rank is found" % key, "\n".join(faults))
    exact(tap, "colocated_dp2", seen, data_parallel_sent(tensors, LAYOUTS["colocated_dp2"]), slice(None))
    exact(tap, "colocated_dp4", seen, data_parallel_sent(tensors, LAYOUTS["colocated_dp4"]), slice(None))
    # Language rank 0 also sends the gradient of the embeddings; rank 1 talks to nobody but its tensor-parallel partner.
    exact(tap, "disjoint_language_tp2", seen, tensor_parallel_sent(tensors, LAYOUTS["disjoint_language_tp2"]), slice(2, 3))
    return tensors


def exact(tap, name, seen, want, ranks):
    if name in seen:
        got = seen[name]["sent_bytes"][:, ranks]
        tap.result(np.all(got == want), name + " sends the closed-form volume", "sent %s, expected %d" % (got.tolist(), want))


def check_forced(tap, m, tensors):
    """The replaced choice knows no ranks: one trace, a flat load."""
    reference, code, text = launch(m, "forced_one_rank", Layout(forced=True, mbs=4))
    if not tap.result(code == 0, "forced load balancing runs on one rank", text):
        return
    load = trace(reference)["tokens_per_expert"]
    flat = BATCH * S * TOPK // EXPERTS
    tap.result(load.size == ITERATIONS * E_LAYERS * EXPERTS and np.all(load == flat), "forced: every expert gets %d copies" % flat, load)
    tap.result(bool(compare(trace(reference), trace(m.path("one_rank_stage3")), 1e-9)), "forced: the trace is not the router's")
    seen = {}
    for name, layout in FORCED.items():
        out, code, text = launch(m, "forced_" + name, layout)
        if not tap.result(code == 0, "forced %s runs" % name, text):
            continue
        fault = compare(trace(out), trace(reference), 1e-9)
        tap.result(not fault, "forced %s gives the one-rank trace" % name, fault)
        seen[name] = counts(out)
    for name in ("ep2", "ep4"):
        exact(tap, name, seen, expert_parallel_sent(tensors, FORCED[name]), slice(None))


def main():
    tap, m = Tap(), Mimo()
    tensors = check_counts(tap, m)
    if tensors:
        check_forced(tap, m, tensors)
    m.close()
    tap.close()


if __name__ == "__main__":
    main()
