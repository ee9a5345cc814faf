#!/usr/bin/env python3
"""Speed of the reference backend on this machine; prints a table and, with --json FILE, writes it.

    make bench-cpu [PEER='python3 peer.py']

Cases: those of regression/900_speed (the tiny model and its language part on one rank and one thread, 8 sequences in one micro-batch; eight
ranks at global batch 24), three layers at the production width against this machine's sgemm, overlap on against off, weak scaling to eight ranks, and what the
interpreter of the schedule costs. Runs that are compared alternate (--rounds times each) and the medians of their pairs count.
PEER is a command that prints one JSON line with `it_per_s` for the same one-thread case; it runs before and after ours, in the same
minute.
"""
import argparse, json, os, re, shutil, subprocess, sys, tempfile

import h5py
import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(ROOT, "regression"))
from cases import Case   # noqa: E402
SCRATCH = tempfile.mkdtemp(prefix="mimo-bench-")


def run(a, name, ranks, threads, *overrides, deck="input/mock_tiny.nml"):
    out = os.path.join(SCRATCH, name)
    command = [a.mimo, deck, "run.output_dir=" + out, *overrides]
    if ranks > 1:
        command = [a.mpiexec, "-n", str(ranks)] + command
    env = dict(os.environ, OPENBLAS_NUM_THREADS=str(threads), HWLOC_PLUGINS_PATH="/nonexistent", UCX_TLS="self,posix")
    p = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if p.returncode:
        sys.exit("bench-cpu: %s ended with %d\n%s%s" % (" ".join(command), p.returncode, p.stdout[-2000:], p.stderr[-2000:]))
    with h5py.File(os.path.join(out, "trace.h5"), "r", locking=False) as f:
        return {k: f[k][()] for k in ("iteration_seconds", "lm_loss", "ranks/forward_seconds", "ranks/backward_seconds",
                                      "ranks/gemm_flops", "ranks/peak_bytes")}


def per_second(t, skip=5):
    return 1.0 / float(np.median(t["iteration_seconds"][skip:]))


def timed(a, name):
    """A launch of the speed family."""
    case = Case(os.path.join(ROOT, "regression", "900_speed"))
    launch, = (l for l in case.launches if l.name == name)
    return run(a, name, launch.ranks, 1, *launch.overrides, deck=case.deck)


def peer(command):
    if not command:
        return None
    p = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    lines = [l for l in p.stdout.splitlines() if l.startswith("{")]
    if p.returncode or not lines:
        sys.exit("bench-cpu: the peer failed: %s\n%s" % (command, p.stderr[-2000:]))
    return float(json.loads(lines[-1])["it_per_s"])


OVERLAP = ("optimizer.overlap_grad_reduce=T", "optimizer.overlap_param_gather=T", "optimizer.encoder_ddp_overlap=T", "optimizer.ddp_num_buckets=3",
           "moe.moe_shared_expert_overlap=T")


def alternate(a, runs, iterations):
    """Median iteration seconds of each run {name: (ranks, overrides)} in each round; every other round goes backwards."""
    seconds = {name: [] for name in runs}
    for i in range(a.rounds):
        for name in list(runs)[::-1 if i % 2 else 1]:
            ranks, overrides = runs[name]
            t = run(a, "%s_%d" % (name, i), ranks, 1, "run.train_iters=%d" % iterations, "log.log_interval=1000", *overrides)
            seconds[name].append(1.0 / per_second(t))
    return {name: np.array(s) for name, s in seconds.items()}


def overlap(a, row):
    """All overlaps of a job of 4 + 4 ranks against none."""
    base = ("topology.layout=disjoint", "topology.encoder_dp=4", "topology.llm_dp=4", "topology.llm_ep=4", "stage.training_stage=3",
            "batch.global_batch_size=24")
    s = alternate(a, {"off": (8, base), "on": (8, (*base, *OVERLAP))}, a.iterations)
    row("tiny, 8 ranks (4 + 4), overlap off", 1e3 * float(np.median(s["off"])), "ms")
    row("  overlap of gradients, parameters, shared expert on", 1e3 * float(np.median(s["on"])), "ms",
        "on / off %.3f, median of %d pairs" % (np.median(s["on"] / s["off"]), a.rounds))


def weak_scaling(a, row):
    """Three samples a rank and iteration on 1 to 8 ranks; more ranks than cores share them."""
    cores = os.cpu_count()
    runs = {"weak%d" % n: (n, ("topology.layout=colocated", "topology.encoder_dp=%d" % n, "topology.llm_dp=%d" % n, "stage.training_stage=3",
                               "batch.global_batch_size=%d" % (3 * n))) for n in (1, 2, 4, 8)}
    s = alternate(a, runs, a.iterations)
    for name, (n, _) in runs.items():
        ideal = s["weak1"] * max(1.0, n / cores)
        row("tiny, colocated, %d rank%s, 3 samples each" % (n, "s" if n > 1 else ""), 3 * n / float(np.median(s[name])), "samples/s",
            "%.0f %% of ideal on %d cores, median of %d rounds" % (100 * np.median(ideal / s[name]), cores, a.rounds))


def interpreter(a, row):
    p = subprocess.run([a.schedule], capture_output=True, text=True, cwd=ROOT)
    m = re.search(r"interpreter: ([\d.]+) us per action", p.stdout)
    if p.returncode or not m:
        sys.exit("bench-cpu: %s ended with %d\n%s" % (a.schedule, p.returncode, p.stdout[-2000:]))
    row("interpreter of the schedule, besides its actions", float(m.group(1)), "us/action", "at most 2")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--mimo", default="./mimo")
    ap.add_argument("--mpiexec", default="mpiexec.mpich")
    ap.add_argument("--gemm", default="build/tests/bench_gemm")
    ap.add_argument("--peer", default="", help="command of the peer on the whole model")
    ap.add_argument("--peer-lm", default="", help="command of the peer on the language part")
    ap.add_argument("--no-full-width", action="store_true", help="leave out the case that needs 16 GB")
    ap.add_argument("--schedule", default="build/tests/test_schedule")
    ap.add_argument("--rounds", type=int, default=5, help="of runs that are compared")
    ap.add_argument("--iterations", type=int, default=30, help="of each such run")
    ap.add_argument("--only-compared", action="store_true", help="only overlap, weak scaling and interpreter")
    ap.add_argument("--json", default="")
    a = ap.parse_args()
    rows = []

    def row(name, value, unit, note=""):
        rows.append({"case": name, "value": value, "unit": unit, "note": note})
        print("%-58s %10.3f %-14s %s" % (name, value, unit, note), flush=True)

    if not a.only_compared:
        before = peer(a.peer)
        t = timed(a, "whole")
        ours = per_second(t)
        row("tiny, whole model, 1 rank, 1 thread, 8 sequences", ours, "iterations/s", "loss %.4f -> %.4f" % (t["lm_loss"][0], t["lm_loss"][-1]))
        if before:
            theirs = max(before, peer(a.peer))
            row("  the peer on the same case", theirs, "iterations/s", "ratio %.2f" % (ours / theirs))
        lm = per_second(timed(a, "language"))
        row("tiny, language part alone, 1 rank, 1 thread", lm, "iterations/s")
        if a.peer_lm:
            theirs = peer(a.peer_lm)
            row("  the peer on the same case", theirs, "iterations/s", "ratio %.2f" % (lm / theirs))
        t = timed(a, "eight")
        row("tiny, 8 ranks (4 + 4), global batch 24, micro-batch 1", per_second(t), "iterations/s")
        row("  peak memory of the largest rank", float(t["ranks/peak_bytes"].max()) / 2**20, "MiB")
        if not a.no_full_width:
            threads = os.cpu_count()
            env = dict(os.environ, OPENBLAS_NUM_THREADS=str(threads))
            rate = float(subprocess.run([a.gemm, "3072"], env=env, capture_output=True, text=True, check=True).stdout)
            row("sgemm, n = 3072, %d threads" % threads, rate / 1e9, "GFLOP/s")
            t = run(a, "wide", 1, threads, "language.preset=nemotron_20l", "language.hybrid_layer_pattern=M*-", "language.seq_length=64",
                    "vision.preset=tiny", "data.image_seq_length=28", "data.num_image_tiles=2", "batch.global_batch_size=1",
                    "batch.micro_batch_size=1", "run.train_iters=2", "topology.layout=colocated")
            spent = float(t["ranks/forward_seconds"][1, 0] + t["ranks/backward_seconds"][1, 0])
            got = float(t["ranks/gemm_flops"][1, 0]) / spent
            row("full width M*-, S 64: forward + backward of iteration 2", got / 1e9, "GFLOP/s", "%.0f %% of sgemm, loss %.4f" % (100 * got / rate, t["lm_loss"][0]))
    interpreter(a, row)
    overlap(a, row)
    weak_scaling(a, row)
    if a.json:
        with open(a.json, "w") as f:
            json.dump(rows, f, indent=1)
    shutil.rmtree(SCRATCH, ignore_errors=True)


if __name__ == "__main__":
    main()
