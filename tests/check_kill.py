#!/usr/bin/env python3
"""A run killed at fifty random moments (F01, F02, F04, F48): its trace can be read, its valid rows are the unbroken run's, nobody is left
waiting; with saving on it resumes until trace and checkpoint are bitwise those of the unbroken run. Signals that arrive while it saves,
and a damaged newest checkpoint of its own, do no more harm.

A moment is one of three kinds: any time from the start on, some time after the first iteration, or while a checkpoint is being written.
"""
import os
import random
import re
import shutil
import signal
import time

import h5py

from check_run import Runs, checkpoint, descendants, everything, finish, grids, read, same_checkpoint, same_trace, valid, wait_for

ROWS, BATCH, SAVE = 150, 2, 7
# name, ranks (0: without a launcher), overrides, kills with saving on, kills without
LAYOUTS = (("one_rank", 0, (), 17, 5), ("two_ranks", 2, grids(1, 1), 24, 4))
SEED = 20


def more(layout, save):
    return (*layout, "stage.training_stage=3", *(("checkpoint.save_interval=%d" % SAVE, "checkpoint.keep_last=3") if save else ()))


def saving(directory):
    return os.path.isdir(directory) and any(n.startswith(".tmp-iter_") for n in os.listdir(directory))


def wait_for_moment(rng, r, name, p):
    """Until the moment has come or the run is over; what kind it was."""
    kind = rng.choice(("start", "loop", "loop", "save"))
    over = lambda: p.poll() is not None
    if kind == "start":
        time.sleep(rng.uniform(0.0, 0.6))
        return kind
    wait_for(lambda: "lm loss:" in p.text() or over())
    if kind == "loop":
        count = p.text().count("lm loss:") + rng.randrange(30)
        wait_for(lambda: p.text().count("lm loss:") >= count or over())
        time.sleep(rng.uniform(0.0, 0.02))
    else:
        end = time.monotonic() + 20
        while not saving(r.at(name, "ckpt")) and not over() and time.monotonic() < end:
            pass
        time.sleep(rng.choice((0.0, 0.0, 0.002, 0.01, 0.03)))
    return kind


def kill(rng, p, ranks):
    """SIGKILL to one rank or to all at once; true when everybody has gone."""
    pids = descendants(p.pid) if ranks else [p.pid]
    for pid in pids if rng.random() < 0.3 else rng.sample(pids, min(1, len(pids))):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    if not pids:
        p.kill()
    finish(p, 30)
    alive = lambda x: os.path.exists("/proc/%d" % x) and "Z" not in read("/proc", str(x), "stat").rsplit(")", 1)[1][:3]
    return wait_for(lambda: not any(alive(x) for x in pids), 30)


def wrong_rows(directory, unbroken):
    """'' when the trace, if there is one yet, can be read and its valid rows are the unbroken run's."""
    if not os.path.exists(os.path.join(directory, "trace.h5")):
        return ""
    try:
        t = valid(directory)
    except (OSError, KeyError) as e:
        return "the trace cannot be read: %s" % e
    rows = int(t["rows"])
    for name, rows_of in t.items():
        if rows_of.ndim and name != "ranks/arena_bytes" and not name.startswith("eval/") and rows_of.tobytes() != unbroken[name][:rows].tobytes():
            return "%d rows, %s is wrong" % (rows, name)
    return ""


def killed(r, name, ranks, layout, kills, kills_unsaved):
    rng = random.Random(SEED)
    got = r.go("whole_" + name, *more(layout, True), ranks=ranks, iterations=ROWS, batch=BATCH, save=True)
    if not r.ok(name + "_unbroken", got):
        return
    unbroken = valid(r.at("whole_" + name))
    faults, moments, chain, done, starts = [], [], 0, 0, 0
    while done < kills:
        run = "%s_%d" % (name, chain)
        p = r.begin(run, *more(layout, True), ranks=ranks, iterations=ROWS, batch=BATCH, save=True)
        starts += 1
        kind = wait_for_moment(rng, r, run, p)
        if p.poll() is None:
            done += 1
            moments.append(kind)
            if not kill(rng, p, ranks):
                faults.append("kill %d (%s): a process is left" % (done, kind))
        code = finish(p)[0]
        fault = wrong_rows(r.at(run), unbroken)
        if fault:
            faults.append("kill %d (%s): %s" % (done, kind, fault))
        if code == 0:   # this one has come to its end: start another
            faults += compare_end(r, name, run)
            chain += 1
        elif code in (1, 2, 3, 4, 5, 6, 7, 75):
            faults.append("start %d ended with %s\n%s" % (starts, code, p.text()[-1000:]))
            break
    run = "%s_%d" % (name, chain)
    got = r.go(run, *more(layout, True), ranks=ranks, iterations=ROWS, batch=BATCH, save=True)
    if r.ok(name + "_goes_on_after_the_last_kill", got):
        faults += compare_end(r, name, run)
    r.tap.result(not faults and {"start", "loop", "save"} <= set(moments), "%s_survives_%d_kills" % (name, kills), "%s\n%s" % (moments, "\n".join(faults)))
    left = [n for n in os.listdir(r.at(run, "ckpt")) if not re.match(r"(iter_\d{7}|latest_checkpointed_iteration\.txt)$", n)]
    left += [n for n in os.listdir(r.at(run)) if not re.match(r"(EXIT|ckpt|(deck.nml|progress.txt|run.log|trace.h5)(\.\d+)?)$", n)]
    r.tap.result(not left, name + "_leaves_nothing_half_done", left)
    faults = []
    for i in range(kills_unsaved):
        run = "%s_unsaved_%d" % (name, i)
        p = r.begin(run, *more(layout, False), ranks=ranks, iterations=ROWS, batch=BATCH)
        wait_for(lambda: "lm loss:" in p.text() or p.poll() is not None)
        time.sleep(rng.uniform(0.0, 0.5))
        kill(rng, p, ranks)
        fault = wrong_rows(r.at(run), unbroken)
        if fault or not os.path.exists(r.at(run, "trace.h5")):
            faults.append("kill %d: %s" % (i + 1, fault or "no trace"))
        else:
            with h5py.File(r.at(run, "trace.h5"), "r", locking=False) as f:
                if int(f["rows"][()]) < 1:
                    faults.append("kill %d: no row is valid after a printed iteration" % (i + 1))
    r.tap.result(not faults, "%s_leaves_right_rows_in_%d_kills_without_saving" % (name, kills_unsaved), "\n".join(faults))


def compare_end(r, name, run):
    trace, saved = same_trace(r.at("whole_" + name), r.at(run)), same_checkpoint(r.at("whole_" + name), r.at(run), ROWS)
    return ["%s: trace differs: %s" % (run, trace)] * bool(trace) + ["%s: checkpoint differs: %s" % (run, saved)] * bool(saved)


def signals_while_saving(r):
    """F22: a signal while a checkpoint is written is honoured behind it."""
    for number, ranks, layout in ((signal.SIGTERM, 2, grids(1, 1)), (signal.SIGUSR1, 0, ())):
        name = "saving_%s" % signal.Signals(number).name
        p = r.begin(name, *more(layout, True), ranks=ranks, iterations=100000, batch=BATCH, save=True)
        seen = wait_for(lambda: saving(r.at(name, "ckpt")) or p.poll() is not None)
        os.kill(descendants(p.pid)[-1] if ranks else p.pid, number)
        code, seconds = finish(p)
        last = read(r.at(name, "ckpt", "latest_checkpointed_iteration.txt")).strip() if code == 75 else ""
        r.tap.result(seen and code == 75 and seconds < 30 and read(r.at(name), "EXIT").split()[3] == last and
                     r.m.run("--inspect", checkpoint(r.at(name), int(last)))[0] == 0, "F22_a_%s_while_saving_ends_with_75" % signal.Signals(number).name,
                     "status %s after %.1f s, tracker %s\n%s" % (code, seconds, last, p.text()[-1000:]))


def damaged(r):
    """F16, robustness.md 4.4.7: the newest own checkpoint is damaged between two starts; the run goes back to the one before and ends as
    the unbroken one. A job that is submitted again and again goes on, too."""
    name, layout = "damaged", grids(1, 1)
    args = more(layout, True)
    r.ok("damaged_unbroken", r.go("whole_damaged", *args, ranks=2, iterations=30, batch=BATCH, save=True))
    r.ok("damaged_first_part", r.go(name, *args, "run.exit_interval=24", ranks=2, iterations=30, batch=BATCH, save=True), 75)
    newest = checkpoint(r.at(name), 24)
    os.truncate(newest, os.path.getsize(newest) - 4096)
    p = r.begin(name, *args, "run.exit_interval=100", ranks=2, iterations=30, batch=BATCH, save=True)
    wait_for(lambda: "iteration       22/" in p.text() or p.poll() is not None)
    kill(random.Random(1), p, 2)     # before anything newer than 21 is saved, the damaged one is still what the tracker names
    got = r.go(name, *args, ranks=2, iterations=30, batch=BATCH, save=True)
    r.ok("damaged_newest_checkpoint_falls_back", got, 0, "falling back to iteration 21", "restart from %s iteration 21" % r.at(name, "ckpt"))
    r.equal("damaged_run_has_the_unbroken_trace", same_trace(r.at("whole_damaged"), r.at(name)))
    r.equal("damaged_run_has_the_unbroken_checkpoint", same_checkpoint(r.at("whole_damaged"), r.at(name), 30))
    rows = everything(r.at(name, "trace.h5"))["iteration"]
    r.tap.result(list(rows) == list(range(1, 31)), "damaged_run_has_no_gap_in_its_trace", rows)
    shutil.rmtree(r.at(name))


def main():
    r = Runs()
    for name, ranks, layout, kills, unsaved in LAYOUTS:
        if r.m.arg.k in "killed_" + name:
            start = time.monotonic()
            killed(r, name, ranks, layout, kills, unsaved)
            print("# %s: %.1f s" % (name, time.monotonic() - start), flush=True)
    for group in (signals_while_saving, damaged):
        if r.m.arg.k in group.__name__:
            group(r)
    r.m.close()
    r.tap.close()


if __name__ == "__main__":
    main()
