#!/usr/bin/env python3
"""The tools for GPU hosts on a machine without GPUs: how launches of the regression cases are adapted, lent GPUs and judged, and
tools/check_gpu.py in a bundle of stand-ins: a nvidia-smi that shows two GPUs, tests of operations that print what they are told to, and a mimo
that runs cuda's launches on the reference backend. It must count what fails, and fail what does not end in time."""
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import h5py
import numpy as np

from harness import ROOT, Mimo, Tap, wait_for

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(ROOT, "regression"))
import gpu   # noqa: E402
from cases import cases   # noqa: E402

RUN = os.path.join(ROOT, "regression", "run")
PYTHON = [n for n in os.listdir(os.path.dirname(RUN)) if n.endswith(".py")]


def adapted(tap):
    """Every launch with a number that a GPU can give is run there once, in a precision that exists there."""
    fault, count = [], 0
    for case in cases(os.path.join(ROOT, "regression")):
        for launch in case.launches if not case.backend and not case.speed else ():
            other, reason = gpu.adapt(case, launch)
            if launch.program:
                fault += [launch.name] * (other is not None)
                continue
            if other is None:
                twin = reason.rpartition(" ")[2]
                if not reason.startswith("fp64") or gpu.precision(case, next(l for l in case.launches if l.name == twin)) != "fp32":
                    fault.append("%s/%s: %s" % (case.name, launch.name, reason))
                continue
            count += 1
            tolerance = other.section.tolerance["lm_loss"]
            if gpu.precision(case, other) != "fp32" or "run.backend=cuda" not in other.overrides or not 1e-7 < tolerance[1] <= 2e-5:
                fault.append("%s/%s: %s %s" % (case.name, launch.name, other.overrides, tolerance))
    tap.result(count > 80 and not fault, "fp64_launches_run_in_fp32_once_with_its_tolerance", fault)


def lent(tap):
    devices, together, most, lock = gpu.Devices("0123", share=2), {i: 0 for i in "0123"}, {i: 0 for i in "0123"}, threading.Lock()
    fault = []

    def use(n, alone):
        with devices.lend(n, alone) as mine:
            with lock:
                for i in mine:
                    together[i] += 1
                    most[i] = max(most[i], together[i])
                if len(set(mine)) != n or mine != sorted(mine) or (alone and any(together[i] > 1 for i in mine)):
                    fault.append(mine)
            time.sleep(0.002)
            with lock:
                for i in mine:
                    together[i] -= 1
    threads = [threading.Thread(target=use, args=(1 + k % 4, k % 5 == 0)) for k in range(60)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    tap.result(not fault and max(most.values()) == 2 and not any(t.is_alive() for t in threads) and set(devices.load.values()) == {0},
               "gpus_are_lent_to_as_many_as_may_share_them", "%s %s" % (fault, most))


def predicted(tap, m):
    text = m.run("--check", "--ranks", "4", os.path.join(ROOT, "input", "v2l2.nml"))[1]
    rows = {int(r[1]): r for r in (line.split() for line in text.splitlines()) if len(r) == 10 and r[0] in ("encoder", "language") and "." in r[9]}
    got = gpu.predicted(text)
    alike = gpu.sharers(4, 2) == [[0, 2], [1, 3]] and gpu.sharers(5, 2) == [[0, 2, 4], [1, 3]] and gpu.sharers(2, 2) == [[0], [1]]
    tap.result(alike and all(abs(gpu.wanted(got, r) - got[0] - got[2]) < 0.01 for r in ([0, 2], [1, 3])), "ranks_that_share_a_gpu_are_added_up", got)
    tap.result(sorted(got) == [0, 2] and all(abs(got[r] - (float(rows[r][9]) - float(rows[r][8]))) < 0.01 for r in got) and got[2] > 100e3,
               "the_memory_table_is_read", "%s %s" % (got, rows))


class Folder:
    """A folder with one case of family 600 and a run of it on the reference backend."""

    def __init__(self, m, name):
        self.m, self.folder, self.name = m, m.path("cases_" + name), name
        shutil.copytree(os.path.join(ROOT, "regression", name), os.path.join(self.folder, name))
        self.expect = os.path.join(self.folder, name, "expect")

    def run(self, *more):
        p = subprocess.run([RUN, "--mimo", self.m.binary, "--mpiexec", self.m.arg.mpiexec, "--cases", self.folder, *more], stdin=subprocess.DEVNULL,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
        return p.returncode, p.stdout

    def edit(self, old, new):
        with open(self.expect) as f:
            text = f.read()
        assert old in text
        with open(self.expect, "w") as f:
            f.write(text.replace(old, new, 1))


def launches(tap, m):
    c = Folder(m, "601_gpu_resume")
    code, text = c.run("-k", "/one")
    tap.result(code == 0 and re.search(r"^SKIP .*/one .*: for GPUs, and this program was built without CUDA$", text, re.M), "without_cuda_a_launch_for_gpus_is_skipped", text)
    code, text = c.run("--backend", "ref", "--ranks", "1", "--ranks", "2", "--jobs", "3")
    tap.result(code == 0 and text.endswith("3 passed, 0 failed, 0 skipped\n"), "launches_run_at_the_same_time", text)
    c.edit("identity resume 6", "identity restart 5\nwithin lm_loss 2 4 6.0 6.5 wide")
    code, text = c.run("--backend", "ref", "-k", "/one")
    tap.result(code == 0, "a_restart_without_a_second_checkpoint_is_bitwise_too", text)
    c.edit("within lm_loss 2 4 6.0 6.5 wide", "within lm_loss 2 4 6.0 6.1 narrow")
    code, text = c.run("--backend", "ref", "-k", "/one")
    tap.result(code == 1 and re.search(r"^WRONG .*: lm_loss: value 6\.\d+ in iteration 2, must lie within 6 and 6\.1 \(narrow\)$", text, re.M),
               "a_value_outside_its_range_is_wrong", text)
    os.remove(os.path.join(c.folder, c.name, "reference.h5"))
    c.edit("identity restart", "unpinned\nidentity restart")
    code, text = c.run("--backend", "ref", "-k", "/one")
    tap.result(code == 1 and "must lie within 6 and 6.1 (narrow)" in text, "without_a_reference_the_range_is_looked_at", text)
    c.edit("within lm_loss 2 4 6.0 6.1 narrow", "within lm_loss 2 4 6.0 6.5 wide")
    code, text = c.run("--backend", "ref", "-k", "/one")
    tap.result(code == 0 and re.search(r"^OK .*/one .*: without a reference$", text, re.M), "an_outcome_without_a_reference_says_so", text)
    c.edit("within lm_loss", "within lr")
    code, text = c.run("--list")
    tap.result(code == 1 and "unknown word 'within'" in text, "a_range_for_what_is_not_compared_is_refused", text)


def stopped(tap, m):
    """SIGTERM to the runner ends its launches, which have sessions of their own, those that others of its threads would begin as well."""
    c, note, slow = Folder(m, "602_gpu_repeat"), m.path("pids"), m.path("slow_mimo")
    script(slow, 'case "$*" in *--features*) exec %s --features;; esac\necho $$ >> %s\nexec sleep 100\n' % (m.binary, note))
    p = subprocess.Popen([RUN, "--mimo", slow, "--mpiexec", m.arg.mpiexec, "--cases", c.folder, "--backend", "ref", "--ranks", "1", "--jobs", "2"],
                         stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: os.path.exists(note), 60)
    p.terminate()
    try:
        text = p.communicate(timeout=30)[0]
    except subprocess.TimeoutExpired:
        p.kill()
        text = "it did not end"
    with open(note) as f:
        left = [x for x in f.read().split() if os.path.exists("/proc/%s/cmdline" % x)]
    tap.result(p.returncode == 1 and not left, "a_stopped_runner_leaves_no_launch", "%s %s %s" % (p.returncode, left, text))


# ---- check_gpu in a bundle of stand-ins -----------------------------------------------------------------------------------------------

def script(path, text):
    with open(path, "w") as f:
        f.write("#!/bin/bash\n" + text)
    os.chmod(path, 0o755)


SMI = """case "$*" in
*-lms*) while :; do echo "0, 1024"; echo "1, 1024"; sleep 0.1; done ;;
*query-gpu=index*) echo 0; echo 1 ;;
*query-gpu=memory.total*) echo 143771; echo 143771 ;;
*) echo "Stand-in, 1.0, 700.00 W, 143771 MiB"; echo "Stand-in, 1.0, 700.00 W, 143771 MiB" ;;
esac
"""
MIMO = """a=(); for x in "$@"; do case "$x" in run.backend=cuda|run.backend=shadow) x=run.backend=ref;;
run.ranks_per_gpu=*) echo "$x ${CUDA_VISIBLE_DEVICES}" >> $(dirname $0)/shared; continue;; esac; a+=("$x"); done
case "$*" in *--features*) %s --features | sed 's/^cuda=.*/cuda=13.0/'; exit ;; esac
exec %s "${a[@]}"
"""


class Bundle:
    def __init__(self, m):
        self.m, self.root = m, m.path("bundle")
        for d in ("bin", "tests", "tools", "regression", "path"):
            os.makedirs(os.path.join(self.root, d))
        for d, names in (("tools", ("check_gpu.py", "bench_gpu.py", "gpu_host.py")), ("regression", ("run", *PYTHON, "503_mlp", "602_gpu_repeat")),
                         ("tests", ("harness.py",))):
            for n in names:
                at = os.path.join(ROOT, d, n)
                (shutil.copytree if os.path.isdir(at) else shutil.copy)(at, os.path.join(self.root, d, n))
        shutil.copytree(os.path.join(ROOT, "input"), os.path.join(self.root, "input"))
        script(os.path.join(self.root, "bin", "mpiexec.hydra"), "exec %s \"$@\"\n" % m.arg.mpiexec)
        script(os.path.join(self.root, "bin", "mimo"), MIMO % (m.binary, m.binary))
        script(os.path.join(self.root, "path", "nvidia-smi"), SMI)
        script(os.path.join(self.root, "path", "compute-sanitizer"), "echo '========= ERROR SUMMARY: 3 errors'; exit 86\n")
        self.operation("gpu_good", "echo 'ok - add 3x4 bf16 err 1.0e-03 bound 2.0e-03'")
        self.operation("gpu_bad", "echo 'ok - add 1x1 err 0 bound 1'; echo 'not ok - add 5x6 err 1 bound 0'; echo '#   y[0,1]: got 1, want 0'; exit 1")
        self.operation("gpu_mute", "true")
        self.operation("gpu_slow", "echo 'ok - add 1x1 err 0 bound 1'; sleep 60")

    def operation(self, name, text):
        script(os.path.join(self.root, "tests", name), text + "\n")

    def check(self, *arguments):
        """(status, lines, what the JSON file holds, seconds)"""
        start, out = time.monotonic(), os.path.join(self.root, "out")
        p = subprocess.run([sys.executable, os.path.join(self.root, "tools", "check_gpu.py"), "--out", out, *arguments], stdin=subprocess.DEVNULL,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
                           env=dict(os.environ, PATH=os.path.join(self.root, "path") + ":" + os.environ["PATH"]))
        with open(os.path.join(out, "check_gpu.json")) as f:
            return p.returncode, p.stdout.splitlines(), json.load(f), time.monotonic() - start


TIMED = """echo 'ok - gemm NT 8x8x8 bf16 to bf16 err 1.7e-03 bound 2.1e-03 in c | 100.0 us 395.0 TFLOP/s'
echo 'ok - rmsnorm_forward 8192x2688 bf16 err 1.0e-03 bound 2.0e-03 in y | 20.0 us 2150 GB/s'
echo '# in turn, hot: NT 128 experts 2688->1856: dense 800.0 us 612.0 TFLOP/s, grouped 850.0 us 576.0 TFLOP/s, 94 %'
"""


def figures(tap, b):
    """bench_gpu reads what a test of operations prints, counts from the machine's peaks, and fails where a figure's gate is not passed."""
    def bench():
        out = os.path.join(b.root, "bench")
        p = subprocess.run([sys.executable, os.path.join(b.root, "tools", "bench_gpu.py"), "--gpus", "1", "--out", out, "-k", "gpu_good", "-k", "gpu_bad"],
                           stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
                           env=dict(os.environ, PATH=os.path.join(b.root, "path") + ":" + os.environ["PATH"]))
        with open(os.path.join(out, "bench_gpu.json")) as f, open(os.path.join(out, "bench_gpu.md")) as g:
            return p.returncode, json.load(f), g.read(), p.stdout
    b.operation("gpu_good", TIMED)
    b.operation("gpu_bad", "echo 'ok - add 1x1 bf16 err 0.0e+00 bound 1.0e-03'")
    code, found, page, text = bench()
    tap.result(code == 0 and [(o["us"], o["floor_us"], o["passed"]) for o in found["operations"]] == [(100.0, 50.0, True), (20.0, 10.0, True)] and
               found["in_turn_hot"][0]["grouped_tflops"] == 576.0, "figures_are_read_with_their_floor", text)
    tap.result("| gemm | NT 8x8x8 bf16 to bf16 | 100 |  | 395 | 50 | 50 % | 1.7e-03 / 2.1e-03 | ok |" in page.splitlines() and
               any(x.startswith("| grouped GEMM, 128 experts of 384 rows, hot | 576 TFLOP/s | 540 | 580 | must |") for x in page.splitlines()), "the_page_shows_them", page)
    b.operation("gpu_bad", TIMED.replace("ok - rms", "not ok - rms") + "exit 1")
    code, found, page, text = bench()
    tap.result(code == 1 and len(found["failed"]) == 2 and "NOT PASSED" in page, "a_figure_whose_gate_is_not_passed_fails", text)


def measured(tap, m):
    """What bench_gpu reads from a trace: here of a tiny run on two grids of the reference backend."""
    sys.path.insert(0, os.path.join(ROOT, "tools"))
    import bench_gpu
    out = m.path("measured")
    code, text, errors = m.run(os.path.join(ROOT, "input", "mock_tiny.nml"), "topology.layout=disjoint", "topology.encoder_dp=1", "topology.llm_tp=2",
                               "topology.llm_dp=1", "run.train_iters=8", "run.output_dir=" + out, ranks=3)
    row, finite = bench_gpu.measured(os.path.join(out, "trace.h5"))
    with h5py.File(os.path.join(out, "trace.h5"), "r") as f:
        shares = (f["ranks/bridge_wait_seconds"][4:, 1:] + f["ranks/agreement_seconds"][4:, 1:]).max(axis=1) / f["iteration_seconds"][4:]
    parts = row["sections"]
    tap.result(code == 0 and finite and row["iterations"] == 4 and len(row["losses"]) == 8 and row["tflops_language"] > 0
               and abs(row["language_waits"] - float(np.median(shares))) < 1e-6 and set(parts) == {"encoder", "language"}
               and all(-0.05 < x < 1 for p in parts.values() for x in p.values()) and set(row["memory_gib"]) == {"encoder", "language"},
               "a_trace_tells_how_long_the_language_grid_waited", "%s\n%s\n%s" % (row, text, errors))
    bench = bench_gpu.Bench(out, [], out)
    bench.runs.append({"name": "tiny", "gpus": 3, "command": "mimo", **row, "seconds": 1.0, "passed": True})
    page = bench_gpu.page(bench).splitlines()
    tap.result(any(x.startswith("| tiny: `mimo` | 3 |") and "| %.1f %% |" % (100 * row["language_waits"]) in x for x in page)
               and any(x.startswith("| tiny | language | ") for x in page), "the_page_shows_it", "\n".join(page))


def numerics(tap, b):
    """Updates that are not made are compared with the reference backend's, number by number."""
    code, lines, found, seconds = b.check("--gpus", "2", "-k", "numerics", "--limit", "200")
    notes = {r["name"]: r["note"] for r in found["results"] if r["state"] == "passed"}
    tap.result(code == 0 and len(notes) == 3 and "iteration 2: lm loss is nan" in notes.get("a loss that is not finite aborts", "") and
               notes.get("a loss that is not finite skips") == "skipped 0 1 1 1 1 1 1 1" and
               notes.get("a norm above the threshold skips") == "skipped 1 0 0 0 0 0 0 0", "updates_are_not_made_as_on_the_reference_backend", "\n".join(lines))
    path = os.path.join(b.root, "bin", "mimo")
    with open(path) as f:
        right = f.read()
    script(path, right.replace("x=run.backend=ref", "x='run.backend=ref run.seed=7'").replace('a+=("$x")', "a+=($x)").replace("#!/bin/bash\n", ""))
    code, lines, found, seconds = b.check("--gpus", "1", "-k", "numerics", "--limit", "200")
    tap.result(code == 1 and [r["state"] for r in found["results"]] == ["failed"] * 3, "other_numbers_are_a_failure", "\n".join(lines))
    script(path, right.replace("#!/bin/bash\n", ""))


def states(lines, word):
    return {m.group(2): m.group(1) for m in (re.match(r"(not ok|ok) \d+ - \d GPU: %s: (\S+)" % word, x) for x in lines) if m}


def bundle(tap, m):
    b = Bundle(m)
    code, lines, found, seconds = b.check("--gpus", "1", "-k", "operations", "-k", "sanitizer", "--limit", "6")
    text = "\n".join(lines)
    tap.result(code == 1 and states(lines, "operations") == {"gpu_good": "ok", "gpu_bad": "not ok", "gpu_mute": "not ok", "gpu_slow": "not ok"},
               "an_operation_is_believed_only_when_it_says_so", text)
    tap.result("#   y[0,1]: got 1, want 0" in lines and any("1 of 2 cases failed" in x for x in lines), "what_is_wrong_is_shown", text)
    tap.result(seconds < 40 and any("stopped: the time of this count was used up" in x for x in lines), "what_does_not_end_in_time_has_failed", text)
    tap.result(any("not begun: the time of this count was used up" in x for x in lines) or states(lines, "sanitizer") == dict.fromkeys(
        ("memcheck", "racecheck", "initcheck"), "not ok"), "what_the_sanitizer_finds_is_a_failure", text)
    last = re.match(r"(\d+) passed, (\d+) failed, (\d+) skipped$", lines[-1])
    tap.result(last and [int(x) for x in last.groups()] == [found["passed"], found["failed"], found["skipped"]] and found["devices"] == ["Stand-in"] * 2
               and len(found["results"]) == sum(int(x) for x in last.groups()) and found["program"]["version"] and found["date"], "the_file_holds_the_same", text)
    b.operation("gpu_slow", "echo 'ok - add 1x1 err 0 bound 1'")
    code, lines, found, seconds = b.check("--gpus", "1,2", "-k", "regression", "--limit", "200")
    runs = [r for r in found["results"] if r["part"] == "regression"]
    tap.result(code == 0 and {r["name"] for r in runs if r["state"] == "passed"} == {
        "503_mlp/fp32", "503_mlp/fp64_l2x1", "602_gpu_repeat/reference", "602_gpu_repeat/one", "602_gpu_repeat/shadow", "602_gpu_repeat/shadow_e1x1_l1x1", "602_gpu_repeat/e1x1_l1x1", "602_gpu_repeat/e1x2_l1x2_ep2_colocated"}
               and {(r["name"], r["gpus"]) for r in runs if r["state"] == "skipped"} == {("503_mlp/fp64", 1)}, "the_regression_cases_of_each_count_are_run", "\n".join(lines))
    figures(tap, b)
    sharing(tap, b)
    numerics(tap, b)
    code, lines, found, seconds = b.check("--gpus", "4", "-k", "operations", "-k", "sentences")
    tap.result(code == 1 and any("4 GPUs are asked for, here are 2" in x for x in lines), "gpus_that_are_not_there_are_a_failure", "\n".join(lines))
    code, lines, found, seconds = b.check("--gpus", "2", "-k", "sentences")
    killed = [r for r in found["results"] if r["name"] == "a killed rank ends the job"]
    others = [r for r in found["results"] if r not in killed]
    tap.result(killed and killed[0]["state"] == "passed", "a_killed_rank_is_seen", "\n".join(lines))
    tap.result(len(others) == 3 and all(r["state"] == "failed" for r in others), "a_run_that_lacks_no_gpu_is_no_sentence", "\n".join(lines))


def sharing(tap, b):
    """Launches of more ranks than GPUs run where they are asked for, told that they share, or are skipped where their memory is too small."""
    note = os.path.join(b.root, "bin", "shared")
    shutil.rmtree(os.path.join(b.root, "regression", "503_mlp"))
    code, lines, found, seconds = b.check("--gpus", "2", "--ranks-per-gpu", "2", "-k", "regression", "--limit", "200")
    runs = {r["name"]: r["state"] for r in found["results"]}
    with open(note) as f:
        told = set(f.read().split("\n")[:-1])
    tap.result(code == 0 and runs["602_gpu_repeat/e1x2_l2x1_mbs2_all"] == "passed" and runs["602_gpu_repeat/e1x1_l1x1"] == "passed" and
               told == {"run.ranks_per_gpu=2 0,1"}, "launches_of_more_ranks_than_gpus_share_them", "%s\n%s" % (told, "\n".join(lines)))
    shutil.copytree(os.path.join(ROOT, "regression", "631_gpu_l4"), os.path.join(b.root, "regression", "631_gpu_l4"))
    code, lines, found, seconds = b.check("--gpus", "2", "--ranks-per-gpu", "2", "-k", "full width")
    tap.result(code == 0 and found["skipped"] == len(found["results"]) == 3 and all("GiB of a GPU of 140.4 together" in r["note"] for r in found["results"]),
               "what_does_not_fit_together_is_skipped", "\n".join(lines))


def main():
    tap, m = Tap(), Mimo()
    adapted(tap)
    lent(tap)
    predicted(tap, m)
    launches(tap, m)
    stopped(tap, m)
    measured(tap, m)
    bundle(tap, m)
    m.close()
    tap.close()


if __name__ == "__main__":
    main()
