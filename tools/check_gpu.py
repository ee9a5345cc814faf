#!/usr/bin/env python3
"""Every test that needs GPUs, from a bundle (tools/bundle.sh) on a host with a driver and CUDA's libraries.

    check_gpu --gpus 1,2,4 --out DIR [--limit SECONDS] [--ranks-per-gpu K] [-k WORD ...]

For each count of GPUs, in this order: what a user is told when something is missing; updates that are not made, because a number is not
finite or the gradient too large, as the reference backend does not make them; every operation against the reference; the tiny model under
compute-sanitizer; the regression cases on GPUs (fp32, and family 600 in bf16: restart, repetition, 100 iterations beside the
reference backend); the cases of family 600 at full width, with their memory. What fits several times on the GPUs here runs at
the same time. With --ranks-per-gpu launches of up to K times as many ranks run as well, several on a GPU: nothing of them is timed, and what
does not fit is skipped. A count must be done within the limit: what is not is failed. One TAP line a test, at the end
`N passed, N failed, N skipped`, the same in DIR/check_gpu.json with times, device and versions. Exit status 1 on any failure.
"""
import argparse
import glob
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import gpu_host as host   # noqa: E402
import h5py   # noqa: E402
import numpy as np   # noqa: E402

ALONE = ("gpu_timer",)   # of tests/gpu: it judges times
SANITIZERS = ("memcheck", "racecheck", "initcheck")
# Library kernels whose shared memory is filled by bulk copies and read by wgmma behind barriers that the tool does not follow.
NOT_CHECKED = {"racecheck": ("cudnn",)}
TINY = os.path.join(host.ROOT, "input", "mock_tiny.nml")
TEXT_TINY = ("topology.layout=language_only", "data.mock_text_only_every=1")
LAUNCH = re.compile(r"^(OK|WRONG|CRASH|TIMEOUT|SKIP)\s+(\S+) \(\d+ ranks, ([\d.]+) s\)(?:: (.*))?$")
RANKS = {4: (3, 4)}   # counts of GPUs that also take launches of fewer ranks, for which there is no count of their own


class Report:
    """Results as TAP on standard output and as JSON in a file."""

    def __init__(self, name):
        self.name, self.results, self.times = name, [], []
        self.count = {"passed": 0, "failed": 0, "skipped": 0}
        self.machine, self.lock = host.machine(), threading.Lock()
        print("# " + ", ".join("%s %s" % x for x in self.machine.items() if x[0] != "program"))
        print("# " + ", ".join("%s %s" % x for x in self.machine["program"].items()), flush=True)

    def add(self, state, part, name, seconds, note=""):
        """state: passed, failed or skipped; note: shown below a failure, beside the others."""
        with self.lock:
            self.count[state] += 1
            self.results.append({"state": state, "gpus": part.n, "part": part.name, "name": name, "seconds": round(seconds, 2), "note": note})
            line = "%s %d - %d GPU: %s: %s" % ("not ok" if state == "failed" else "ok", len(self.results), part.n, part.name, name.replace("#", ""))
            if state == "skipped":
                line += " # SKIP " + note
            else:
                line += " (%.1f s)" % seconds + ("; " + note if note and state == "passed" else "")
            print(line)
            if state == "failed":
                for x in note.strip().splitlines()[-25:]:
                    print("#   " + x[:240])
            sys.stdout.flush()

    def write(self):
        with open(self.name + ".new", "w") as f:
            json.dump({**self.machine, **self.count, "seconds": self.times, "results": self.results}, f, indent=1)
        os.replace(self.name + ".new", self.name)


class Part:
    """One kind of test on n GPUs at a time."""

    def __init__(self, report, name, n, gpus, deadline, scratch):
        self.report, self.name, self.n, self.gpus, self.deadline = report, name, n, gpus, deadline
        self.scratch = os.path.join(scratch, "%d_%s" % (n, name.replace(" ", "_")))
        os.makedirs(self.scratch)

    def add(self, state, name, seconds, note=""):
        self.report.add(state, self, name, seconds, note)

    def late(self, name, p):
        """Whether the program was stopped for want of time, then reported as failed."""
        if p.killed:
            self.add("failed", name, p.seconds, "stopped: the time of this count was used up\n" + p.text[-1500:])
        return p.killed

    def mimo(self, ranks, *arguments, visible=None):
        command = [host.MIMO, *arguments]
        if ranks > 1:
            command = [host.MPIEXEC, "-n", str(ranks)] + command
        return host.Program(command, host.environment(CUDA_VISIBLE_DEVICES=",".join(self.gpus[:self.n] if visible is None else visible)))


# ---- what a user is told -------------------------------------------------------------------------------------------------

def status_of(folder):
    """The exit status that a run has left in its directory, or None."""
    try:
        with open(os.path.join(folder, "EXIT")) as f:
            return int(f.read().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def told(part, name, ranks, arguments, words, visible=None):
    """A run that must end with status 3 and one line that holds the words."""
    out = os.path.join(part.scratch, name.replace(" ", "_"))
    p = part.mimo(ranks, *arguments, "run.output_dir=" + out, visible=visible).wait(min(part.deadline, time.monotonic() + 60))
    if not part.late(name, p):
        lines = [x for x in p.text.splitlines() if "error:" in x]
        good = status_of(out) == 3 and len(lines) == 1 and all(w in lines[0] for w in words)
        part.add("passed" if good else "failed", name, p.seconds, lines[0].strip() if good else "EXIT %s, launcher %s\n%s" % (status_of(out), p.status, p.text))


def ranks_of(out):
    """Processes of the run that writes to this directory, without its launcher."""
    found = []
    for name in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            with open(name) as f:
                words = f.read().split("\0")
        except OSError:
            continue
        if os.path.basename(words[0]) == "mimo" and "run.output_dir=" + out in words:
            found.append(int(name.split("/")[2]))
    return sorted(found)


def killed_rank(part):
    """SIGKILL to one rank of a running job: everybody is gone within 30 s and the launcher says so."""
    name, out = "a killed rank ends the job", os.path.join(part.scratch, "killed")
    p = part.mimo(part.n, TINY, "run.backend=cuda", "run.output_dir=" + out, "run.train_iters=1000000", "log.log_interval=20", "batch.global_batch_size=%d" % (2 * part.n))
    up = min(part.deadline, time.monotonic() + 60)
    while "lm loss:" not in p.read() and p.process.poll() is None and time.monotonic() < up:
        time.sleep(0.1)
    ranks = ranks_of(out)
    start = time.monotonic()
    if len(ranks) == part.n and p.process.poll() is None:
        os.kill(ranks[-1], signal.SIGKILL)
    p.wait(min(part.deadline, start + 30))
    left = [x for x in ranks if os.path.exists("/proc/%d" % x)]
    good = len(ranks) == part.n and not p.killed and p.status != 0 and not left
    part.add("passed" if good else "failed", name, p.seconds, "over after %.1f s, launcher's status %s" % (time.monotonic() - start, p.status) if good
             else "%d ranks found, launcher's status %s, killed at the deadline: %s, left: %s\n%s" % (len(ranks), p.status, p.killed, left, p.text[-2000:]))


def sentences(part):
    n, batch = part.n, "batch.global_batch_size=%d" % (part.n + 1)
    cuda = (TINY, "run.backend=cuda", *TEXT_TINY)
    large = (os.path.join(host.ROOT, "input", "lm10.nml"), "run.train_iters=1", "language.preset=nemotron_54l", "language.hybrid_layer_pattern=" + "ME" * 27)
    jobs = [lambda: told(part, "no GPU is visible", n, (*cuda, "batch.global_batch_size=%d" % n), ["no GPU can be used"], visible=()),
            lambda: told(part, "fewer GPUs than ranks", n + 1, (*cuda, batch), ["%d ranks on this host but %d visible GPU" % (n + 1, n), "run.ranks_per_gpu"]),
            lambda: told(part, "a model larger than the GPU", n, (*large, "batch.global_batch_size=%d" % n), ["of device memory", "GiB"])]
    k = part.report.ranks_per_gpu
    if k > 1:
        share = "run.ranks_per_gpu=%d" % k
        jobs += [lambda: told(part, "more ranks than may share", k * n + 1, (*cuda, share, "batch.global_batch_size=%d" % (k * n + 1)),
                              ["%d ranks on this host but %d visible GPU" % (k * n + 1, n), "run.ranks_per_gpu = %d" % k]),
                 lambda: told(part, "models that share and do not fit together", k * n, (*large, share, "batch.global_batch_size=%d" % (k * n)),
                              ["the %d ranks on this GPU need" % k, "of device memory", "GiB"])]
    if n > 1:
        jobs.append(lambda: killed_rank(part))
    host.together(jobs, len(jobs))


# ---- updates that are not made --------------------------------------------------------------------------------------------

# Weights of 1e3 after one update, with which no loss is finite; a norm that the first gradient is above and the others are not.
TROUBLE = {"a loss that is not finite aborts": ("lr.lr=1e3",),
           "a loss that is not finite skips": ("lr.lr=1e3", "optimizer.non_finite_policy=skip"),
           "a norm above the threshold skips": ("optimizer.grad_norm_skip_threshold=1.685", "lr.lr_decay_style=linear")}
ROWS = 8
EXACT = ("iteration", "consumed_samples", "skipped", "num_tokens", "learning_rate", "weight_decay", "images", "patches")
NEAR = {"lm_loss": 2e-5, "grad_norm": 2e-5}        # fp32 on both, TF32 off


class Outcome:
    """What a run leaves that must not depend on the backend."""

    def __init__(self, part, out, *arguments):
        p = part.mimo(part.n, TINY, "run.precision=fp32", "run.train_iters=%d" % ROWS, "run.output_dir=" + out, *arguments)
        p.wait(min(part.deadline, time.monotonic() + 90))
        self.killed, self.seconds, self.text, self.status = p.killed, p.seconds, p.text, status_of(out)
        self.said = [x for x in p.text.splitlines() if "error:" in x]
        self.rows = {k: np.zeros(0) for k in (*EXACT, *NEAR)}
        if os.path.exists(os.path.join(out, "trace.h5")):
            with h5py.File(os.path.join(out, "trace.h5"), "r", locking=False) as f:
                self.rows = {k: f[k][:int(f["rows"][()])] for k in self.rows}

    def differs(self, other, near):
        """What is not the same as in the other; numbers of NEAR may be so far apart."""
        if (self.status, self.said) != (other.status, other.said):
            return "EXIT %s, %s against %s, %s" % (self.status, self.said, other.status, other.said)
        for k, x in self.rows.items():
            y = other.rows[k]
            if x.shape != y.shape or not np.allclose(x, y, rtol=NEAR.get(k, 0.0) if near else 0.0, atol=0.0, equal_nan=True):
                return "%s: %s against %s" % (k, x, y)
        return ""


def trouble(part, name, arguments):
    """On GPUs as on the reference backend, and whether iterations are settled late, as usual, or at once (where batches are written)."""
    at = lambda run: os.path.join(part.scratch, name.replace(" ", "_") + "_" + run)
    runs = [Outcome(part, at("ref"), "run.backend=ref", *arguments), Outcome(part, at("cuda"), "run.backend=cuda", *arguments)]
    if runs[0].status == 0:
        runs.append(Outcome(part, at("at_once"), "run.backend=cuda", "log.dump_batches=%d" % ROWS, *arguments))
    if any(part.late(name, r) for r in runs):
        return
    ref, cuda = runs[:2]
    fault = cuda.differs(ref, True) or (len(runs) > 2 and runs[2].differs(cuda, False)) or ""
    if not fault and not (len(ref.said) == 1 if name.endswith("aborts") else ref.status == 0 and len(set(ref.rows["skipped"])) == 2):
        fault = "the reference did not meet it: EXIT %s, %s, skipped %s" % (ref.status, ref.said, ref.rows["skipped"])
    part.add("failed" if fault else "passed", name, sum(r.seconds for r in runs), fault + "\n" + cuda.text[-1500:] if fault else
             cuda.said[0] if cuda.said else "skipped " + " ".join(str(int(x)) for x in ref.rows["skipped"]))


def numerics(part):
    host.together([lambda name=name, more=more: trouble(part, name, more) for name, more in TROUBLE.items()], len(TROUBLE))


# ---- operations -----------------------------------------------------------------------------------------------------------

def operations(part):
    share = max(1, host.cores() // (4 * len(part.gpus)))
    pool = host.gpu.Devices(part.gpus, share)

    def one(path):
        with pool.lend(1, os.path.basename(path) in ALONE) as mine:
            env = host.environment(CUDA_VISIBLE_DEVICES=mine[0], OPENBLAS_NUM_THREADS=str(max(1, host.cores() // (share * len(part.gpus)))))
            p = host.Program([path], env).wait(part.deadline)
        name = os.path.basename(path)
        if part.late(name, p):
            return
        cases = host.operation_lines(p.text)
        bad = [x for x in cases if not x[0]]
        if p.status or bad or not cases:
            part.add("failed", name, p.seconds, "status %s, %d of %d cases failed\n%s" % (p.status, len(bad), len(cases), "\n".join(
                x[1] + "\n" + x[2] for x in bad) or p.text[-1500:]))
        else:
            part.add("passed", name, p.seconds, "%d cases" % len(cases))
    host.together([lambda path=path: one(path) for path in sorted(host.operations(), key=os.path.getsize, reverse=True)], share * len(part.gpus))


# ---- compute-sanitizer ----------------------------------------------------------------------------------------------------

def sanitizer():
    """(its path or None, its option that leaves kernels out)"""
    found = shutil.which("compute-sanitizer") or next(iter(sorted(glob.glob("/usr/local/cuda*/bin/compute-sanitizer")
                                                                  + glob.glob("/opt/nvidia/*/*/compute-sanitizer"))), None)
    text = host.ask(found, "--help") if found else ""
    return found, next((o for o in ("--kernel-name-exclude", "--kernel-regex-exclude", "--exclude") if o in text), "--exclude")


def sanitize(part):
    program, leave_out = sanitizer()
    pool = host.gpu.Devices(part.gpus, len(SANITIZERS))

    def one(tool):
        if not program:
            part.add("skipped", tool, 0, "compute-sanitizer is not installed here")
            return
        out = os.path.join(part.scratch, tool)
        with pool.lend(1) as mine:
            command = [program, "--tool", tool, "--error-exitcode", "86", "--print-limit", "8",
                       *(x for word in NOT_CHECKED.get(tool, ()) for x in (leave_out, "kns=" + word)), host.MIMO, TINY, "run.backend=cuda", "run.train_iters=2",
                       "stage.training_stage=3", "batch.global_batch_size=2", "run.output_dir=" + out]
            p = host.Program(command, host.environment(CUDA_VISIBLE_DEVICES=mine[0])).wait(part.deadline)
        if part.late(tool, p):
            return
        summary = re.findall(r"={9} (?:ERROR|RACECHECK) SUMMARY: (.*)", p.text)
        clean = p.status == 0 and status_of(out) == 0 and summary and all(re.match(r"0 (errors|hazards)", x) for x in summary)
        part.add("passed" if clean else "failed", tool, p.seconds, summary[-1] if clean else "status %s, EXIT %s\n%s" % (
            p.status, status_of(out), "\n".join(x for x in p.text.splitlines() if x.startswith("=====")) or p.text))
    host.together([lambda tool=tool: one(tool) for tool in SANITIZERS], len(SANITIZERS))


# ---- whole runs -----------------------------------------------------------------------------------------------------------

def regression(part, words, share):
    """Launches of the regression cases, as they end."""
    share_of = part.report.ranks_per_gpu
    mine = part.gpus[:part.n] if share_of > 1 else part.gpus
    ranks = [x for r in (*RANKS.get(part.n, (part.n,)), *range(part.n + 1, share_of * part.n + 1)) for x in ("--ranks", str(r))]
    traces = os.path.join(part.report.out, "traces")
    command = [sys.executable, os.path.join(host.ROOT, "regression", "run"), "--backend", "cuda", "--mimo", host.MIMO, "--mpiexec", host.MPIEXEC, *ranks,
               "--ranks-per-gpu", str(share_of), "--share", str(share), "--jobs", str(max(1, share * len(mine) // part.n)), "--traces", traces, *(x for w in words for x in ("-k", w))]
    seen, last = 0, None

    def look(text):
        nonlocal seen, last
        lines = text.split("\n")[:-1]
        for line in lines[seen:]:
            m = LAUNCH.match(line)
            if m or not line.startswith("    |"):
                emit()
            if m:
                last = [m, []]
            elif last and line.startswith("    |"):
                last[1].append(line)
        seen = len(lines)

    def emit():
        nonlocal last
        if last:
            (word, name, seconds, note), more = last[0].groups(), last[1]
            state = {"OK": "passed", "SKIP": "skipped"}.get(word, "failed")
            part.add(state, name, float(seconds), note or "" if state != "failed" else "\n".join(["%s %s" % (word, note or "")] + more))
            last = None
    p = host.Program(command, host.environment(CUDA_VISIBLE_DEVICES=",".join(mine))).wait(part.deadline, look, 0.5)
    emit()
    if not part.late("the other launches", p) and not re.search(r"^\d+ passed, \d+ failed, \d+ skipped$", p.text, re.M):
        part.add("failed", "regression/run", p.seconds, "status %s\n%s" % (p.status, p.text))


def small_runs(part):
    regression(part, ("^3", "^4", "^5", "^60"), max(1, min(4, host.cores() // (4 * len(part.gpus)))) if part.n == 1 else 3)


def large_runs(part):
    regression(part, ("^61", "^62", "^63"), 1)


# name, function, whether it has something to say for more than one GPU
PARTS = (("sentences", sentences, True), ("numerics", numerics, True), ("operations", operations, False), ("sanitizer", sanitize, False), ("regression", small_runs, True),
         ("full width", large_runs, True))


def main():
    ap = argparse.ArgumentParser(description="every test that needs GPUs")
    host.add_options(ap)
    ap.add_argument("--limit", type=float, default=240.0, metavar="SECONDS", help="for each count of GPUs (240)")
    ap.add_argument("--ranks-per-gpu", type=int, default=1, metavar="K", help="also launches of up to K times as many ranks as GPUs, which share them (1)")
    arg = ap.parse_args()
    if arg.ranks_per_gpu < 1:
        ap.error("--ranks-per-gpu %d: wanted 1 or more" % arg.ranks_per_gpu)
    wanted, there = host.counts(arg.gpus), host.gpu.visible()
    os.makedirs(os.path.join(arg.out, "traces"), exist_ok=True)
    report = Report(os.path.join(arg.out, "check_gpu.json"))
    report.out, report.ranks_per_gpu = os.path.abspath(arg.out), arg.ranks_per_gpu
    scratch = tempfile.mkdtemp(prefix="mimo-check-gpu-")
    try:
        for n in wanted:
            start = time.monotonic()
            for name, run, several in PARTS:
                if (n > 1 and not several) or (arg.k and not any(w in name for w in arg.k)):
                    continue
                begin, part = time.monotonic(), Part(report, name, n, there, start + arg.limit, scratch)
                if n > len(there):
                    part.add("failed", "GPUs", 0, "%d GPUs are asked for, here are %d" % (n, len(there)))
                elif begin > part.deadline:
                    part.add("failed", "all", 0, "not begun: the time of this count was used up")
                else:
                    run(part)
                report.times.append({"gpus": n, "part": name, "seconds": round(time.monotonic() - begin, 1)})
                print("# %d GPU: %s took %.1f s, %.1f s of %g since the count began" % (n, name, time.monotonic() - begin, time.monotonic() - start, arg.limit), flush=True)
                report.write()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print("1..%d" % len(report.results))
    print("%d passed, %d failed, %d skipped" % tuple(report.count.values()))
    return 1 if report.count["failed"] or not report.results else 0


if __name__ == "__main__":
    sys.exit(main())
