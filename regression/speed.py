"""Speed cases: the time of an iteration as a multiple of a fixed piece of work, its cost.

tests/bench_yardstick.c does this work before and after every run, on as many processors as the run can use, so that a cost means the
same on a slower machine or with other matrix kernels. A machine that does something else besides gives no number: a SKIP says what a
yardstick got of a processor. Up to ROUNDS rounds are made; a case asks that the cost be at most so many times that in reference.h5.
"""
import os
import shutil
import subprocess
import time

import h5py
import numpy as np

ROUNDS, WARM = 5, 5
QUIET = 0.85   # of a processor


class Busy(Exception):
    """Something else runs on this machine."""


def cores():
    return len(os.sched_getaffinity(0))


def processors(ranks):
    return min(ranks, cores())


def yardstick(runner, copies, seconds=0.4):
    """Seconds of its work with so many copies side by side; Busy when one of them had to wait for a processor."""
    command = [os.path.join(runner.tests, "bench_yardstick"), str(seconds)]
    p = [subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=runner.environment()) for _ in range(copies)]
    said = [np.array([float(x) for x in x.communicate()[0].split()]) for x in p]
    share = min(processor / clock for _, clock, processor in said)
    if share < QUIET:
        raise Busy("the machine is busy: the yardstick got %.0f %% of a processor (load average %.1f, %d processors)" % (
            100 * share, os.getloadavg()[0], cores()))
    return float(np.mean([median for median, _, _ in said]))


class Best:
    """The shortest iteration and the shortest yardstick of the rounds so far: whatever disturbs a measurement makes it longer."""

    def __init__(self):
        self.seconds = self.unit = np.inf

    def measure(self, runner, case, launch):
        """One round more: the cost so far."""
        copies = processors(launch.ranks)
        yardstick(runner, cores(), 0.1)   # all processors: those that the run leaves idle share caches and clocks with it
        before = yardstick(runner, copies)
        out, fault = runner.launch(case, launch.ranks, launch.overrides)
        if fault:
            raise RuntimeError(fault)
        self.unit = min(self.unit, before, yardstick(runner, copies))
        yardstick(runner, cores(), 0.1)
        with h5py.File(os.path.join(out, "trace.h5"), "r", locking=False) as f:
            self.seconds = min(self.seconds, float(np.median(f["iteration_seconds"][WARM:int(f["rows"][()])])))
        shutil.rmtree(out)
        return self.seconds * copies / self.unit


def judge(cost, reference, most):
    """'' or what is wrong with a cost."""
    if cost <= most * reference:   # false for NaN
        return ""
    return "cost: an iteration takes %.3g yardsticks, reference %.3g: %.2f times as long, tolerance %.2f" % (cost, reference, cost / reference, most)


def check(runner, case, launch):
    """The outcome of one launch: a round that is fast enough ends it."""
    if not os.path.exists(case.reference):
        return "WRONG reference.h5 is missing (regression/run --update -k %s writes it)" % case.name
    if not os.path.exists(os.path.join(runner.tests, "bench_yardstick")):
        return "SKIP bench_yardstick is not built"
    try:
        with h5py.File(case.reference, "r", locking=False) as f:
            reference, theirs = float(f["cost/" + launch.name][()]), int(f.attrs["processors"])
    except (OSError, KeyError) as e:
        return "WRONG reference.h5: %s" % e
    if launch.ranks > 1 and processors(launch.ranks) != processors(theirs):
        return "SKIP the reference of several ranks is for %d processors, there are %d" % (theirs, cores())
    best, cost = Best(), np.inf
    try:
        for _ in range(ROUNDS):
            cost = best.measure(runner, case, launch)
            if not judge(cost, reference, case.speed):
                return "OK %.2f times the reference's cost, %.1f iterations/s" % (cost / reference, 1 / best.seconds)
    except Busy as e:
        return "SKIP %s" % e
    except RuntimeError as e:
        return str(e)
    return "WRONG " + judge(cost, reference, case.speed)


def update(runner, case):
    """Write the costs of this machine into reference.h5; '' or the outcome that prevented it."""
    partial = case.reference + ".new"
    try:
        cost = {}
        for l in case.launches:
            best = Best()
            cost[l.name] = [best.measure(runner, case, l) for _ in range(ROUNDS)][-1], 1 / best.seconds
    except Busy as e:
        return "SKIP %s" % e
    except RuntimeError as e:
        return str(e)
    with h5py.File(partial, "w") as f:
        for name, (value, speed) in cost.items():
            f["cost/" + name] = value
            f["cost/" + name].attrs.update(units="yardsticks", iterations_per_second=speed)
        f.attrs.update(program="mimo", version=runner.features.get("version", ""), git=runner.features.get("git", ""), processors=cores(),
                       date=time.strftime("%Y-%m-%d", time.gmtime()), command="regression/run --update -k " + case.name)
    os.replace(partial, case.reference)
    return ""
