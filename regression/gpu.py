"""Launches on GPUs: which there are, who gets them, how much of their memory a launch took, and what fp32 there is compared with."""
import contextlib
import os
import re
import subprocess
import tempfile
import threading
import time

import cases as c

# fp32 against numbers of fp64 (interface.md 3): up to the first flip of a choice. Gradients: what oracle.py measured of fp32, times four.
FP32 = {"iteration": (0.0, 0.0), "lm_loss": (0.0, 2e-5), "grad_norm": (0.0, 2e-5), "num_tokens": (0.0, 0.0),
        "seq_load_balancing_loss": (0.0, 2e-5), c.EXPERTS: (0.0, 0.0), "gradients": (0.0, 4e-5)}
CONTEXT = 1024    # MiB of a GPU that the table of --check leaves out: the driver's context, libraries' kernels, NCCL's buffers
SAMPLE_MS = 200   # between two readings of the memory in use


def visible():
    """Indices, as nvidia-smi counts, of the GPUs that a program here would see."""
    try:
        p = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                           timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    there = p.stdout.split() if p.returncode == 0 else []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return there if given is None else [i for i in given.split(",") if i in there]


def capacity():
    """MiB of memory of the smallest GPU here; 0 when there is none."""
    try:
        p = subprocess.run(["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"], stdin=subprocess.DEVNULL, capture_output=True,
                           text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return min((int(x) for x in p.stdout.split() if x.isdigit()), default=0)


class Devices:
    """Lends GPUs, first come, first served: each to `share` launches at a time, or to one that needs it alone."""

    def __init__(self, indices, share=1):
        self.load, self.share = {i: 0 for i in indices}, share
        self.turn, self.changed = threading.Lock(), threading.Condition()

    @contextlib.contextmanager
    def lend(self, n, alone=False):
        """The indices of n GPUs (at most those there are), the least used ones."""
        cost = self.share if alone else 1
        with self.turn, self.changed:
            free = lambda: [i for i in self.load if self.load[i] + cost <= self.share]
            self.changed.wait_for(lambda: len(free()) >= n)
            mine = sorted(sorted(free(), key=lambda i: self.load[i])[:n], key=int)
            for i in mine:
                self.load[i] += cost
        try:
            yield mine
        finally:
            with self.changed:
                for i in mine:
                    self.load[i] -= cost
                self.changed.notify_all()


class MemoryWatch:
    """The most memory in use on each GPU, in MiB, as the driver tells, above what was in use before."""

    def __enter__(self):
        self.file = tempfile.TemporaryFile("w+")
        command = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits", "-lms", str(SAMPLE_MS)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.file, stderr=subprocess.DEVNULL)
        time.sleep(3e-3 * SAMPLE_MS)
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()

    def most(self):
        """{index: MiB}; after the end."""
        self.file.seek(0)
        before, most = {}, {}
        for index, used in re.findall(r"^(\d+), (\d+)$", self.file.read(), re.M):
            before.setdefault(index, int(used))
            most[index] = max(most.get(index, 0), int(used) - before[index])
        self.file.close()
        return most


def predicted(text):
    """{rank: MiB on its GPU} of the memory table that --check prints: one row for each kind of rank."""
    table = re.search(r"^memory, MiB a rank\n(.*\n)((?:  \S+ .*\n)+)", text, re.M)
    if not table:
        return {}
    heads, out = table.group(1).split(), {}
    for line in table.group(2).splitlines():
        row = dict(zip(heads, line.split()))
        out[int(row["rank"])] = float(row["total"]) - float(row["data"])   # samples lie on the host
    return out


def sharers(ranks, gpus):
    """The ranks on each of so many GPUs, as run.ranks_per_gpu places them."""
    return [list(range(g, ranks, gpus)) for g in range(gpus)]


def wanted(table, ranks):
    """MiB of a GPU that these ranks share. table: of predicted, whose rows stand for the ranks that follow as well."""
    return sum(table[max(k for k in table if k <= r)] for r in ranks)


def precision(case, launch):
    """'fp64', 'fp32', 'bf16' or 'auto'."""
    given = [w.split("=")[1] for w in launch.overrides if w.startswith("run.precision=")]
    with open(case.deck) as f:
        deck = re.search(r"^\s*precision\s*=\s*'(\w+)'", f.read(), re.M)
    return given[-1] if given else deck.group(1) if deck else "auto"


def single(section):
    """The section an fp32 run of an fp64 launch is compared with: the case's own of fp32, or the same numbers in fp32's tolerance."""
    out = c.Section(section.group)
    out.tolerance = {k: (*FP32[k], "fp32 against fp64") for k in section.tolerance if k in FP32}
    out.until_flip = True
    return out


def adapt(case, launch):
    """(the launch as it runs on GPUs, ''), or (None, why it does not). fp64 exists on the CPU only: such launches run in fp32."""
    if launch.program:
        return None, "it judges itself, without a GPU"
    if case.speed:
        return None, "the reference backend is timed"
    overrides, section = launch.overrides, launch.section
    if precision(case, launch) == "fp64":
        overrides = [w for w in overrides if not w.startswith("run.precision=")] + ["run.precision=fp32"]
        for other in case.launches:
            if other is not launch and other.ranks == launch.ranks and sorted(other.overrides) == sorted(overrides):
                return None, "fp64 is for the CPU; in fp32 it is %s" % other.name
        own = [s for s in case.sections if s.group == "fp32"]
        section = own[0] if own else single(section)
    return c.Launch(launch.name, launch.ranks, [*overrides, "run.backend=cuda"], section), ""
