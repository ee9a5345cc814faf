#!/usr/bin/env python3
"""Speed on GPUs, from a bundle (tools/bundle.sh) on a host with a driver and CUDA's libraries.

    bench_gpu --gpus 1,2,4 --out DIR [-k WORD ...]

Operations (one GPU): what tests/gpu measures at production sizes, beside the time that a card needs at least for the same bytes and products.
Whole runs: the decks of input/ at full width, their rates by both counts, where the time of each grid's GPUs went and how much of it the
language grid waited for the encoder, the memory in use against what was planned, all of it from their traces; and what follows from several
of them: the cost of spreading a model, of determinism. Each figure has a gate, or it is none: an operation agrees with the reference in the
same run, a run begins with the loss of an untrained model. Nothing else may run on the machine meanwhile. Writes DIR/bench_gpu.json and
DIR/bench_gpu.md; exit status 1 when a gate was not passed.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import gpu_host as host   # noqa: E402
import h5py   # noqa: E402
import numpy as np   # noqa: E402

PEAK_TFLOPS, PEAK_GBS = 790.0, 4300.0          # one H200: bf16 product 8192^3 in a burst; bytes of a device copy, read and written
FIRST_LOSS = (12.166, 12.206)                  # of the untrained 20-layer model, and of a part of its layers
WARM = 4                                       # iterations that do not count
LIMIT = 150.0                                  # seconds of one program
NOT_TIMED = ("gpu_graph", "gpu_shadow", "gpu_timer")   # of tests/gpu: they measure no single operation
SLOW = ("gpu_attention",)                      # last: its reference takes most of a minute
OVERLAP = ("optimizer.overlap_grad_reduce=T", "optimizer.overlap_param_gather=T")
ALONE = ("topology.layout=language_only", "topology.encoder_dp=0", "data.mock_text_only_every=1")   # a deck's language grid without its encoder
SECTIONS = ("forward", "backward", "bridge_wait", "grad_sync", "optimizer", "data_wait")
GIB = 2.0**30

# GPUs, name, deck, overrides
RUNS = (
    (1, "lm10", "lm10", ()),
    (1, "lm20e64", "lm20e64", ()),
    (1, "lm20e64, natural routing", "lm20e64", ("moe.moe_router_force_load_balancing=F",)),
    (1, "lm20e32", "lm20e64", ("moe.num_experts=32",)),
    (1, "lm10, sums in any order", "lm10", ("run.deterministic=F",)),
    (2, "l2", "lm20e64", ("moe.num_experts=128", "topology.llm_dp=2", "topology.llm_ep=2", "batch.global_batch_size=8")),
    (2, "l2, overlap", "lm20e64", ("moe.num_experts=128", "topology.llm_dp=2", "topology.llm_ep=2", "batch.global_batch_size=8", *OVERLAP)),
    (2, "v1l1, frozen", "v1l1", ()),
    (2, "v1l1, trained", "v1l1", ("stage.training_stage=3",)),
    (2, "v2l2, language alone", "v2l2", ALONE),
    (4, "v2l2, frozen", "v2l2", ()),
    (4, "v2l2, trained", "v2l2", ("stage.training_stage=3",)),
    (4, "l4", "lm20e64", ("moe.num_experts=128", "topology.llm_dp=4", "topology.llm_ep=4", "batch.global_batch_size=16")),
    (4, "l4, overlap", "lm20e64", ("moe.num_experts=128", "topology.llm_dp=4", "topology.llm_ep=4", "batch.global_batch_size=16", *OVERLAP)),
    (4, "colocated", "v2l2", ("topology.layout=colocated", "topology.encoder_dp=4", "topology.llm_dp=4", "topology.llm_ep=4")),
    (8, "mock_20l, frozen", "mock_20l", ()),
    (8, "mock_20l, trained", "mock_20l", ("stage.training_stage=3",)),
    (8, "l8", "lm20e64", ("moe.num_experts=128", "topology.llm_dp=8", "topology.llm_ep=8", "batch.global_batch_size=32")),
    (8, "l8, overlap", "lm20e64", ("moe.num_experts=128", "topology.llm_dp=8", "topology.llm_ep=8", "batch.global_batch_size=32", *OVERLAP)),
)


class Bench:
    def __init__(self, out, gpus, scratch):
        self.out, self.gpus, self.scratch = out, gpus, scratch
        self.operations, self.turns, self.runs, self.trouble = [], [], [], []
        self.machine = host.machine()

    def fail(self, what):
        self.trouble.append(what)
        print("FAILED " + what, flush=True)

    def write(self):
        with open(os.path.join(self.out, "bench_gpu.json"), "w") as f:
            json.dump({**self.machine, "operations": self.operations, "in_turn_hot": self.turns, "runs": self.runs, "goals": goals(self), "failed": self.trouble},
                      f, indent=1)
        with open(os.path.join(self.out, "bench_gpu.md"), "w") as f:
            f.write(page(self))


# ---- operations -----------------------------------------------------------------------------------------------------------

def operation(b, path):
    """Everything that one program of tests/gpu times at production sizes."""
    name = os.path.basename(path)
    p = host.Program([path, "--time", "--large"], host.environment(CUDA_VISIBLE_DEVICES=b.gpus[0], OPENBLAS_NUM_THREADS=str(host.cores())))
    p.wait(time.monotonic() + LIMIT)
    if p.killed or p.status:
        b.fail("%s: status %s after %.0f s" % (name, p.status, p.seconds))
    found = 0
    for ok, text, note in host.operation_lines(p.text):
        m = re.match(r"(\S+) (.*?) err (\S+) bound (\S+)(?: in .*?)? \| ([\d.]+) us(?: (\d+) GB/s)?(?: ([\d.]+) TFLOP/s)?$", text)
        if not m:
            continue
        op, shape, error, bound, us, gbs, tflops = m.groups()
        us, found = float(us), found + 1
        floor = max(us * float(gbs or 0) / PEAK_GBS, us * float(tflops or 0) / PEAK_TFLOPS)
        b.operations.append({"operation": op, "shape": shape, "us": us, "gbs": float(gbs) if gbs else None, "tflops": float(tflops) if tflops else None,
                             "floor_us": round(floor, 1) if floor else None, "error": float(error), "bound": float(bound), "passed": ok})
        if not ok:
            b.fail("%s %s %s" % (op, shape, note))
    for m in re.finditer(r"^# in turn, hot: (.*): dense ([\d.]+) us ([\d.]+) TFLOP/s, grouped ([\d.]+) us ([\d.]+) TFLOP/s", p.text, re.M):
        b.turns.append({"product": m.group(1), "dense_us": float(m.group(2)), "dense_tflops": float(m.group(3)), "grouped_us": float(m.group(4)),
                        "grouped_tflops": float(m.group(5))})
    print("%s: %d figures, %.1f s" % (name, found, p.seconds), flush=True)


# ---- whole runs -----------------------------------------------------------------------------------------------------------

def unbuilt(overrides):
    """Whether the program refuses one of the overrides until something is built."""
    text = host.ask(host.MIMO, "--reference")
    return any(re.search(r"^  %s = .*\n      ! .*\(only T until" % w.split(".")[1].split("=")[0], text, re.M) for w in overrides if w.endswith("=F"))


def grids(f):
    """{role: (first rank, ranks)} of a trace."""
    a = f["ranks"].attrs
    found = {r: (int(a[r + "_offset"]), int(a[r + "_size"])) for r in ("encoder", "language") if a[r + "_size"] > 0}
    return {"both": found["language"]} if len(found) == 2 and found["encoder"][0] == found["language"][0] else found


def where(f, rows, seconds):
    """{role: {section: its share of an iteration}}: means over the grid's ranks, medians over the iterations that count; `other` is what is in no
    section, `agreement` a part of two of them."""
    out = {}
    for role, (first, n) in grids(f).items():
        part = {s: f["ranks/%s_seconds" % s][WARM:rows, first:first + n].mean(axis=1) / seconds for s in SECTIONS}
        out[role] = {s: float(np.median(x)) for s, x in part.items()}
        out[role]["other"] = float(np.median(1 - sum(part.values())))
        out[role]["agreement"] = float(np.median(f["ranks/agreement_seconds"][WARM:rows, first:first + n].mean(axis=1) / seconds))
    return out


def waits(f, rows, seconds):
    """Share of an iteration in which the language grid waits for the encoder grid, at the bridge and before the update, or None where they are not two
    grids: mean over the lanes, of each the rank that receives; the others of a lane wait for that one, inside forward."""
    if "language" not in grids(f) or "encoder" not in grids(f):
        return None
    (first, n), tp = grids(f)["language"], int(f["deck"].attrs["topology.llm_tp"])
    waiting = sum(f["ranks/%s_seconds" % s][WARM:rows, first:first + n] for s in ("bridge_wait", "agreement"))
    lanes = waiting.reshape(-1, n // tp, tp).max(axis=2)
    return float(np.median(lanes.mean(axis=1) / seconds))


def memory(f, rows):
    """{role: [GiB in use on the GPU that has most of it in use, GiB planned for its rank]}."""
    used = f["ranks/device_peak_bytes"][rows - 1]
    names = [x.decode() if isinstance(x, bytes) else x for x in f["ranks/arena_bytes"].attrs["arenas"]]
    planned = f["ranks/arena_bytes"][:, [i for i, x in enumerate(names) if x != "data"]].sum(axis=1)   # samples lie on the host
    most = {role: first + int(np.argmax(used[first:first + n])) for role, (first, n) in grids(f).items()}
    return {role: [float(used[r]) / GIB, float(planned[r]) / GIB] for role, r in most.items()}


def measured(path):
    """What a trace says of a run, but for the gate."""
    with h5py.File(path, "r", locking=False) as f:
        rows = int(f["rows"][()])
        t = {k: f[k][:rows] for k in ("iteration_seconds", "tokens_per_second", "tflops_per_gpu", "model_tflops_per_gpu", "language_tflops_per_gpu",
                                      "lm_loss", "grad_norm")}
        seconds = t["iteration_seconds"][WARM:]
        middle = lambda k: float(np.median(t[k][WARM:]))
        row = {"iterations": rows - WARM, "ms": 1e3 * middle("iteration_seconds"), "ms_least": 1e3 * float(seconds.min()), "ms_most": 1e3 * float(seconds.max()),
               "tokens_per_second": middle("tokens_per_second"), "tflops_exact": middle("model_tflops_per_gpu"),
               "tflops_language": middle("language_tflops_per_gpu"), "tflops_megatron": middle("tflops_per_gpu"), "losses": [float(x) for x in t["lm_loss"]],
               "language_waits": waits(f, rows, seconds), "sections": where(f, rows, seconds), "memory_gib": memory(f, rows)}
    return row, bool(np.all(np.isfinite(t["lm_loss"])) and np.all(np.isfinite(t["grad_norm"])))


def whole_run(b, n, name, deck, overrides):
    if unbuilt(overrides):
        print("%s: not built yet" % name, flush=True)
        return
    out, deck = os.path.join(b.scratch, re.sub(r"\W+", "_", name)), os.path.join(host.ROOT, "input", deck + ".nml")
    arguments = [host.MIMO, deck, *overrides, "run.train_iters=14", "run.output_dir=" + out]
    p = host.Program(([host.MPIEXEC, "-n", str(n)] if n > 1 else []) + arguments, host.environment(CUDA_VISIBLE_DEVICES=",".join(b.gpus[:n])))
    p.wait(time.monotonic() + LIMIT)
    if p.killed or p.status:
        b.fail("%s: status %s after %.0f s\n%s" % (name, p.status, p.seconds, p.text[-800:]))
        return
    row, finite = measured(os.path.join(out, "trace.h5"))
    good = finite and FIRST_LOSS[0] <= row["losses"][0] <= FIRST_LOSS[1]
    row = {"name": name, "gpus": n, "command": " ".join(["mimo", "input/" + os.path.basename(deck), *overrides]), **row, "seconds": p.seconds, "passed": good}
    b.runs.append(row)
    if not good:
        b.fail("%s: first loss %.4f, wanted %g..%g, and every loss and norm finite" % (name, row["losses"][0], *FIRST_LOSS))
    print("%s: %.1f ms an iteration, %.1f k tokens/s, %.0f exact TFLOP/s a GPU, first loss %.4f, %.0f s" % (
        name, row["ms"], row["tokens_per_second"] / 1e3, row["tflops_exact"], row["losses"][0], p.seconds), flush=True)


# ---- what follows ---------------------------------------------------------------------------------------------------------

def goals(b):
    """[(what, unit, value, must, target, whether more is better)] of what was measured; must and target for one H200."""
    run = {r["name"]: r for r in b.runs if r["passed"]}
    ops = [o for o in b.operations if o["passed"]]
    out = []

    def goal(what, unit, must, target, more, value):
        try:
            out.append({"what": what, "unit": unit, "value": value(), "must": must, "target": target, "more_is_better": more})
        except (KeyError, IndexError, ValueError):
            pass   # not measured in this call

    def us(op, word):
        return [o["us"] for o in ops if o["operation"] == op and word in o["shape"]][0]

    def turn(word):
        return [t["grouped_tflops"] for t in b.turns if t["product"].startswith(word)][0]
    per_gpu = lambda r: r["tokens_per_second"] / r["gpus"]
    goal("lm20e64", "exact TFLOP/s", 465, 505, True, lambda: run["lm20e64"]["tflops_exact"])
    goal("lm10", "exact TFLOP/s", 425, 460, True, lambda: run["lm10"]["tflops_exact"])
    goal("grouped GEMM, 128 experts of 384 rows, hot", "TFLOP/s", 540, 580, True, lambda: turn("NT 128 experts"))
    goal("grouped GEMM, 64 experts of 768 rows, hot", "TFLOP/s", 620, 660, True, lambda: turn("NT 64 experts"))
    goal("experts' weight gradient added in fp32, 128 experts", "us", 1700, 1450, False, lambda: us("grouped_gemm", "TN += production 128 experts"))
    goal("scan forward, 8192 tokens", "us", 250, 180, False, lambda: us("ssd_forward", "8192"))
    goal("scan forward and backward, 8192 tokens", "us", 950, 700, False, lambda: us("ssd_forward", "8192") + us("ssd_backward", "8192"))
    goal("slowest streaming operation of 100 MB and more", "GB/s", 3400, 3800, True,
         lambda: min(o["gbs"] for o in ops
                     if o["gbs"] and not o["tflops"] and not o["operation"].startswith("ssd") and o["gbs"] * o["us"] * 1e-3 > 100))
    goal("memory in use against the prediction, at most", "%", 5, 2, False,
         lambda: max(100 * abs(u - m) / m for r in run.values() for u, m in r["memory_gib"].values() if m > 20))
    goal("l4 per GPU against lm20e32 on one", "%", 86, 92, True, lambda: 100 * per_gpu(run["l4"]) / per_gpu(run["lm20e32"]))
    goal("l8 per GPU against lm20e32 on one", "%", 86, 92, True, lambda: 100 * per_gpu(run["l8"]) / per_gpu(run["lm20e32"]))
    goal("l2 per GPU against lm20e32 on one", "%", 86, 92, True, lambda: 100 * per_gpu(run["l2"]) / per_gpu(run["lm20e32"]))
    goal("v2l2 frozen: the language grid waits", "%", 8, 3, False, lambda: 100 * run["v2l2, frozen"]["language_waits"])
    goal("cost of sums in a fixed order, lm10", "%", 6, 2, False, lambda: 100 * (run["lm10"]["ms"] / run["lm10, sums in any order"]["ms"] - 1))
    return out


def number(x, digits=0):
    return "" if x is None else "%.*f" % (digits, x)


def page(b):
    m = b.machine
    lines = ["# Measured on GPUs, %s" % m["date"], "", "%d x %s, driver %s, power limit %s, %d cores; mimo %s, git %s; CUDA %s, NCCL %s, cuDNN %s." % (
        len(m["devices"]), (m["devices"] or ["none"])[0], m["driver"], m["power_limit"], m["cores"], m["program"].get("version"), m["program"].get("git"),
        m["program"].get("cuda"), m["program"].get("nccl"), m["program"].get("cudnn")), ""]
    if goals(b):
        lines += ["| goal | measured | must | target | |", "|---|---|---|---|---|"]
        for g in goals(b):
            reached = lambda limit: g["value"] >= limit if g["more_is_better"] else g["value"] <= limit
            lines.append("| %s | %.4g %s | %g | %g | %s |" % (g["what"], g["value"], g["unit"], g["must"], g["target"],
                                                           "target" if reached(g["target"]) else "must" if reached(g["must"]) else "missed"))
        lines.append("")
    if b.runs:
        lines += ["Milliseconds: median of the iterations after the first %d, least and most. Exact TFLOP/s a GPU count all that the job computes over all its GPUs; of "
                  "the language grid alone, by both counts, over its own. Memory: of the GPU of each grid that has most in use. Gate: the first loss within %g..%g." % (
                      WARM, *FIRST_LOSS), "",
                  "| run | GPUs | ms an iteration | tokens/s | exact TFLOP/s a GPU | language grid: exact, Megatron's count | it waits | first loss | "
                  "memory used / planned, GiB | gate |", "|---|---|---|---|---|---|---|---|---|---|"]
        lines += ["| %s: `%s` | %d | %.0f (%.0f-%.0f) | %.1f k | %.0f | %.0f, %.0f | %s | %.4f | %s | %s |" % (
            r["name"], r["command"], r["gpus"], r["ms"], r["ms_least"], r["ms_most"], r["tokens_per_second"] / 1e3, r["tflops_exact"], r["tflops_language"],
            r["tflops_megatron"], "" if r["language_waits"] is None else "%.1f %%" % (100 * r["language_waits"]), r["losses"][0],
            ", ".join("%.1f / %.1f" % tuple(x) for x in r["memory_gib"].values()), "ok" if r["passed"] else "NOT PASSED") for r in b.runs]
        names = [*SECTIONS, "other", "agreement"]
        lines += ["", "Where an iteration goes on the GPUs, in % (agreement: of grad sync and optimizer, waiting for all ranks before the update):", "", "| run | grid | %s |" % " | ".join(x.replace("_", " ") for x in names), "|---" * (len(names) + 2) + "|"]
        lines += ["| %s | %s | %s |" % (r["name"], role, " | ".join("%.1f" % (100 * part[s]) for s in names)) for r in b.runs for role, part in r["sections"].items()] + [""]
    if b.turns:
        lines += ["Grouped and dense products in turn on a hot card:", "", "| product | dense us, TFLOP/s | grouped us, TFLOP/s | share |", "|---|---|---|---|"]
        lines += ["| %s | %.0f, %.0f | %.0f, %.0f | %.0f %% |" % (t["product"], t["dense_us"], t["dense_tflops"], t["grouped_us"], t["grouped_tflops"],
                                                            100 * t["grouped_tflops"] / t["dense_tflops"]) for t in b.turns] + [""]
    if b.operations:
        lines += ["Operations: median of 20 calls on rotating buffers; floor: the same bytes at %g GB/s or products at %g TFLOP/s. Gate: the error is below its bound." % (
            PEAK_GBS, PEAK_TFLOPS), "", "| operation | shape | us | GB/s | TFLOP/s | floor us | of the floor | error / bound | gate |", "|---|---|---|---|---|---|---|---|---|"]
        lines += ["| %s | %s | %.0f | %s | %s | %s | %s | %.1e / %.1e | %s |" % (
            o["operation"], o["shape"], o["us"], number(o["gbs"]), number(o["tflops"]), number(o["floor_us"]),
            "%.0f %%" % (100 * o["floor_us"] / o["us"]) if o["floor_us"] else "", o["error"], o["bound"], "ok" if o["passed"] else "NOT PASSED") for o in b.operations] + [""]
    return "\n".join(lines)


def main():
    ap = argparse.ArgumentParser(description="speed on GPUs")
    host.add_options(ap)
    arg = ap.parse_args()
    wanted, there = host.counts(arg.gpus), host.gpu.visible()
    if max(wanted) > len(there):
        sys.exit("bench_gpu: %d GPUs are asked for, here are %d" % (max(wanted), len(there)))
    chosen = lambda name: not arg.k or any(w in name for w in arg.k)
    os.makedirs(arg.out, exist_ok=True)
    scratch = tempfile.mkdtemp(prefix="mimo-bench-gpu-")
    b = Bench(arg.out, there, scratch)
    try:
        for path in sorted(host.operations(), key=lambda p: os.path.basename(p) in SLOW) if 1 in wanted else ():
            if os.path.basename(path) not in NOT_TIMED and chosen(os.path.basename(path)):
                operation(b, path)
                b.write()
        for n, name, deck, overrides in RUNS:
            if n in wanted and chosen(name):
                whole_run(b, n, name, deck, overrides)
                b.write()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(page(b))
    return 1 if b.trouble or not b.operations + b.runs else 0


if __name__ == "__main__":
    sys.exit(main())
