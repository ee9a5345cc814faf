#!/usr/bin/env python3
"""TensorBoard event files (log.tensorboard_dir): framing, checksums, tags, steps and values against trace.h5, resuming, failing disks.

The reader here knows only the public record format, so that it needs no package; where a Python with the `tensorboard` package is
found (harness.python_with), that reads the same files too.
"""
import glob
import json
import os
import struct
import subprocess

import numpy as np

from harness import ROOT, Mimo, Tap, everything, python_with, wait_for

DECK = os.path.join(ROOT, "input", "mock_tiny.nml")
ALWAYS = {"learning-rate", "batch-size", "lm loss", "loss-scale", "grad-norm"}
BOTH = {a + b for a in ALWAYS for b in ("", " vs samples")} | {"seq_load_balancing_loss"}
SECTIONS = ("start", "forward", "backward", "bridge-wait", "grad-sync", "optimizer", "data-wait", "save", "eval", "log", "idle")

# Prints {tag: [[step, value], ...]} of a directory as TensorBoard understands it.
PACKAGE = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
e = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0})
e.Reload()
print(json.dumps({t: [[x.step, x.value] for x in e.Scalars(t)] for t in e.Tags()["scalars"]}))
"""


class Broken(Exception):
    pass


# ---- a reader of the record format -------------------------------------------------------------------------------------------

def crc_table():
    table = []
    for n in range(256):
        for _ in range(8):
            n = n >> 1 ^ (0x82f63b78 if n & 1 else 0)
        table.append(n)
    return table


TABLE = crc_table()


def masked_crc(data):
    crc = 0xffffffff
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 255]
    crc ^= 0xffffffff
    return ((crc >> 15 | crc << 17) + 0xa282ead8) & 0xffffffff


def records(name):
    """Payloads of a file; Broken if a byte does not belong to a whole record with right checksums."""
    with open(name, "rb") as f:
        data = f.read()
    at = 0
    while at < len(data):
        if len(data) - at < 16:
            raise Broken("%d bytes are left at %d" % (len(data) - at, at))
        length, = struct.unpack_from("<Q", data, at)
        if struct.unpack_from("<I", data, at + 8)[0] != masked_crc(data[at:at + 8]):
            raise Broken("checksum of the length at %d" % at)
        payload = data[at + 12:at + 12 + length]
        if len(payload) != length or len(data) < at + 16 + length:
            raise Broken("the record at %d ends too early" % at)
        if struct.unpack_from("<I", data, at + 12 + length)[0] != masked_crc(payload):
            raise Broken("checksum of the record at %d" % at)
        yield payload
        at += 16 + length


def varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def fields(data):
    """(number, value) of each field of a protobuf message; bytes for 64- and 32-bit and nested ones."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = varint(data, at)
        elif wire in (1, 5):
            value, at = data[at:at + (8 if wire == 1 else 4)], at + (8 if wire == 1 else 4)
        elif wire == 2:
            length, at = varint(data, at)
            value, at = data[at:at + length], at + length
        else:
            raise Broken("wire type %d" % wire)
        yield key >> 3, value


def scalars(name):
    """{tag: [(step, value)]} of one file; Broken when it does not start with the version or an event is odd."""
    out, last = {}, 0.0
    for i, payload in enumerate(records(name)):
        event = dict(fields(payload))
        time, = struct.unpack("<d", event[1])
        if not 1.6e9 < time < 1e10 or time < last:
            raise Broken("event %d has wall time %r after %r" % (i, time, last))
        last = time
        if i == 0:
            if event.get(3) != b"brain.Event:2":
                raise Broken("the first event is no version")
            continue
        if set(event) != {1, 2, 5}:
            raise Broken("event %d has the fields %s" % (i, sorted(event)))
        for number, value in fields(event[5]):
            value = dict(fields(value))
            if number != 1 or set(value) != {1, 2}:
                raise Broken("value of event %d: fields %s" % (i, sorted(value)))
            out.setdefault(value[1].decode(), []).append((event[2], struct.unpack("<f", value[2])[0]))
    return out


def files(directory):
    return sorted(glob.glob(os.path.join(directory, "events.out.tfevents.*")), key=os.path.getmtime)


def merged(directory):
    out = {}
    for name in files(directory):
        for tag, values in scalars(name).items():
            out.setdefault(tag, []).extend(values)
    return out


# ---- comparison ----------------------------------------------------------------------------------------------------------------

def single(x):
    return np.asarray(x, np.float64).astype(np.float32).astype(np.float64)


def differs(board, tag, steps, values):
    """'' when a tag holds exactly these steps and values (as float), nan equal to nan."""
    got = board.get(tag, [])
    if [s for s, _ in got] != [int(s) for s in steps]:
        return "%s: steps %s, not %s\n" % (tag, [s for s, _ in got][:20], [int(s) for s in steps][:20])
    if not np.array_equal(np.asarray([v for _, v in got]), single(values), equal_nan=True):
        return "%s: %s, not %s\n" % (tag, [v for _, v in got][:8], single(values)[:8].tolist())
    return ""


def compare_with_trace(board, directory, batch):
    """Tags of every trained iteration against the rows of the trace, float by float."""
    t = everything(os.path.join(directory, "trace.h5"))
    n = int(t["rows"])
    trained = np.isfinite(t["lm_loss"][:n]) | (t["skipped"][:n] == 0)
    it, samples = t["iteration"][:n][trained], t["consumed_samples"][:n][trained]
    fault = ""
    for tag, x in (("lm loss", t["lm_loss"][:n][trained]), ("batch-size", np.full(len(it), batch)), ("loss-scale", np.ones(len(it)))):
        fault += differs(board, tag, it, x) + differs(board, tag + " vs samples", samples, x)
    known = ~np.isnan(t["grad_norm"][:n][trained])
    fault += differs(board, "grad-norm", it[known], t["grad_norm"][:n][trained][known])
    fault += differs(board, "seq_load_balancing_loss", it, t["seq_load_balancing_loss"][:n][trained])
    # The line's and the tag's learning rate is what the next iteration uses.
    rates = dict(board.get("learning-rate", []))
    for i in range(n - 1):
        if trained[i] and rates.get(int(t["iteration"][i])) != float(single(t["learning_rate"][i + 1])):
            fault += "learning-rate at %d: %s, not %s\n" % (t["iteration"][i], rates.get(int(t["iteration"][i])), t["learning_rate"][i + 1])
    return fault


class Boards:
    def __init__(self):
        self.tap, self.m = Tap(), Mimo()
        self.package = python_with("tensorboard")

    def go(self, name, *more, ranks=0, board=None):
        return self.m.run(DECK, "run.output_dir=" + self.m.path(name), "run.train_iters=6", "batch.global_batch_size=4",
                          "log.tensorboard_dir=" + (board or self.board(name)), *more, ranks=ranks)

    def board(self, name):
        return self.m.path(name, "deep", "er")

    def clean(self, title, got, code=0):
        return self.tap.result(got[0] == code, title, "status %s\n%s" % (got[0], got[2][-2000:]))

    def equal(self, title, fault):
        return self.tap.result(not fault, title, fault)

    def by_package(self, title, directory):
        """What the package reads is what the reader here reads."""
        if not self.package:
            self.tap.skip(title, "no Python with the package tensorboard was found (tools/bootstrap.sh --oracle, or ORACLE_PYTHON names one)")
            return
        p = subprocess.run([self.package, "-c", PACKAGE, directory], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if p.returncode != 0:
            self.tap.result(False, title, p.stderr)
            return
        theirs = {t: [(s, v) for s, v in x] for t, x in json.loads(p.stdout).items()}
        ours = merged(directory)
        bad = [t for t in sorted(set(ours) | set(theirs)) if repr(ours.get(t)) != repr(theirs.get(t))]
        self.tap.result(not bad and len(ours) > 5, title, "%s: %s and %s" % (bad[:1], ours.get((bad + [""])[0]), theirs.get((bad + [""])[0])))


# ---- cases ---------------------------------------------------------------------------------------------------------------------

def values(b):
    got = b.go("first", "topology.layout=disjoint", "log.log_interval=2", "log.log_timers=T", "log.log_params_norm=T",
               "log.log_num_zeros_in_grad=T", "lr.lr_decay_style=linear", "lr.lr_warmup_iters=2", "eval.eval_iters=1",
               "eval.eval_picture_ablation=zero", ranks=4)
    if not b.clean("a_run_with_tensorboard_ends_with_0", got):
        return
    names = files(b.board("first"))
    b.tap.result(len(names) == 1 and names[0] in got[1], "one_rank_writes_one_file_that_the_log_names", names)
    board = scalars(names[0])
    b.equal("every_value_is_the_traces", compare_with_trace(board, b.m.path("first"), 4))
    t = everything(b.m.path("first", "trace.h5"))
    it, samples = t["iteration"], t["consumed_samples"]
    b.equal("counts_and_norms_are_the_traces",
            differs(board, "num-zeros", it, t["num_zeros"]) + differs(board, "num-zeros vs samples", samples, t["num_zeros"]) +
            differs(board, "params-norm", it, t["params_norm"]) + differs(board, "grad-norm vs samples", samples, t["grad_norm"]))
    e, loss = t["eval/iteration"][:2], t["eval/lm_loss"][:2]
    b.equal("validation_is_the_traces",
            differs(board, "lm loss validation", e, loss) + differs(board, "lm loss validation vs samples", 4 * e, loss) +
            differs(board, "lm loss validation ppl", e, np.exp(loss)) + differs(board, "lm loss validation ablated", e, t["eval/lm_loss_ablated"][:2]))
    timed = {"iteration-time", "throughput"} | {s + "-time" for s in SECTIONS}
    steps = {t: [s for s, _ in board.get(t, [])] for t in timed}
    b.tap.result(all(s == [2, 4, 6] for s in steps.values()), "timers_come_with_the_log_lines", steps)
    seconds = {t: [v for _, v in board.get(t, [])] for t in timed}
    rows = t["ranks/backward_seconds"]
    most = [max(rows[i:i + 2].sum(axis=0)) / 2 for i in (0, 2, 4)]
    b.tap.result(np.allclose(seconds["backward-time"], most, rtol=1e-3, atol=1e-6), "a_timer_is_the_slowest_ranks_mean_of_the_interval",
                 "%s %s" % (seconds["backward-time"], most))
    b.tap.result(all(0 < x < 60 for x in seconds["iteration-time"]) and all(x > 0 for x in seconds["throughput"]), "time_and_throughput_are_positive",
                 seconds)
    every = BOTH | timed | {x + y for x in ("num-zeros", "params-norm", "lm loss validation", "lm loss validation ppl", "lm loss validation ablated")
                            for y in ("", " vs samples")}
    b.tap.result(set(board) == every, "there_are_no_other_tags", sorted(set(board) ^ every))
    b.by_package("the_tensorboard_package_reads_the_same", b.board("first"))
    plain = b.m.run(DECK, "run.output_dir=" + b.m.path("plain"), "run.train_iters=6", "batch.global_batch_size=4", "topology.layout=disjoint",
                    "lr.lr_decay_style=linear", "lr.lr_warmup_iters=2", ranks=4)
    t2 = everything(b.m.path("plain", "trace.h5"))
    b.tap.result(plain[0] == 0 and t["lm_loss"].tobytes() == t2["lm_loss"].tobytes(), "a_run_without_computes_the_same_bits")


def resuming(b):
    save = "checkpoint.save=" + b.m.path("resumed", "ckpt")
    first = b.go("resumed", save, "run.exit_interval=3")
    second = b.go("resumed", save)
    if not (b.clean("the_first_half", first, 75) and b.clean("the_second_half", second)):
        return
    b.tap.result(len(files(b.board("resumed"))) == 2, "each_start_has_its_file", files(b.board("resumed")))
    b.equal("the_files_of_a_resumed_run_join", compare_with_trace(merged(b.board("resumed")), b.m.path("resumed"), 4))
    b.by_package("the_tensorboard_package_joins_them", b.board("resumed"))
    b.tap.result("another run" not in first[2] + second[2], "a_resumed_run_does_not_warn", second[2])
    again = b.go("other", board=b.board("resumed"))
    warned = [x for x in again[2].splitlines() if "another run" in x]
    b.tap.result(again[0] == 0 and len(warned) == 1 and len(files(b.board("resumed"))) == 3, "another_runs_events_are_a_warning", again[2])


def skipped(b):
    got = b.go("leap", "batch.iterations_to_skip=2,3")
    board = merged(b.board("leap"))
    b.clean("iterations_to_skip", got)
    b.equal("an_iteration_that_is_left_out_has_no_value", compare_with_trace(board, b.m.path("leap"), 4) +
            differs(board, "skipped-train-samples", [4, 5, 6], [8, 8, 8]))
    got = b.go("nan", "lr.lr=1e3", "language.init_method_std=1e3", "optimizer.clip_grad=0", "optimizer.non_finite_policy=skip")
    board = merged(b.board("nan"))
    t = everything(b.m.path("nan", "trace.h5"))
    b.clean("a_run_with_nan", got)
    b.tap.result(not np.all(np.isfinite(t["lm_loss"])), "the_loss_is_not_finite_somewhere", t["lm_loss"])
    b.equal("a_loss_that_is_not_finite_is_shown", differs(board, "lm loss", t["iteration"], t["lm_loss"]))
    b.by_package("the_tensorboard_package_reads_nan", b.board("nan"))
    got = b.go("stage1", "stage.training_stage=1")
    b.tap.result(got[0] == 0 and "learning-rate" not in merged(b.board("stage1")), "a_frozen_language_has_no_learning_rate", got[2])


def killed(b):
    directory = b.board("killed")
    p = b.m.start(DECK, "run.output_dir=" + b.m.path("killed"), "run.train_iters=100000", "log.tensorboard_dir=" + directory)
    wait_for(lambda: p.poll() is not None or p.text().count("lm loss:") >= 3)
    p.kill()
    p.wait()
    try:
        n, fault = len(merged(directory).get("lm loss", [])), ""
    except Broken as e:
        n, fault = 0, str(e)
    b.tap.result(n >= 3 and not fault, "a_killed_run_leaves_whole_records", "%d; %s" % (n, fault))


def failing(b):
    """Nothing that happens to the event file ends a run: one warning, the same trace, status 0."""
    base = b.go("good")
    b.clean("the_run_to_compare_with", base)
    want = everything(b.m.path("good", "trace.h5"))["lm_loss"].tobytes()

    def check(title, got, name):
        warned = [x for x in got[2].splitlines() if x.startswith("warning:") and "TensorBoard gets no" in x]
        b.tap.result(got[0] == 0 and len(warned) == 1, title + "_is_one_warning", "status %s\n%s" % (got[0], got[2][-1500:]))
        trace = b.m.path(name, "trace.h5")
        b.tap.result(os.path.exists(trace) and everything(trace)["lm_loss"].tobytes() == want, title + "_does_not_touch_the_training")

    for title, directory in (("a_file_in_the_way", DECK), ("proc", "/proc/mimo_board"), ("a_long_name", b.m.path("x" * 300))):
        check(title, b.go(title, board=directory), title)
    disk = b.m.path("disk")
    os.mkdir(disk)
    probe = subprocess.run(["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=4m tmpfs /mnt"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if probe.returncode != 0:
        b.tap.skip("a_full_disk_is_one_warning", "this machine does not let us mount a tmpfs in a namespace of its own")
        return
    command, env = b.m.command([DECK, "run.output_dir=" + b.m.path("full"), "run.train_iters=100", "batch.global_batch_size=4",
                                "log.tensorboard_dir=" + disk], 0, None)
    script = "mount -t tmpfs -o size=16k tmpfs %s && \"$@\"; s=$?; cp -r %s/. %s; exit $s" % (disk, disk, b.m.path("saved"))
    os.mkdir(b.m.path("saved"))
    p = subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                       stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT)
    warned = [x for x in p.stderr.splitlines() if "TensorBoard gets no more values" in x]
    b.tap.result(p.returncode == 0 and len(warned) == 1, "a_full_disk_is_one_warning", "%s\n%s" % (p.returncode, p.stderr[-1500:]))
    t = everything(b.m.path("full", "trace.h5"))
    try:
        kept, fault = merged(b.m.path("saved")), ""
    except Broken as e:
        kept, fault = {}, str(e)
    n = len(kept.get("lm loss", []))
    b.tap.result(0 < n < 100 and int(t["rows"]) == 100 and not fault and not differs(kept, "lm loss", t["iteration"][:n], t["lm_loss"][:n]),
                 "the_file_ends_with_a_whole_record_before_the_disk_was_full", "%d of 100; %s" % (n, fault))


def main():
    b = Boards()
    b.tap.result(masked_crc(b"123456789") == ((0xe3069283 >> 15 | 0xe3069283 << 17) + 0xa282ead8) & 0xffffffff, "the_readers_crc_has_its_check_value")
    for group in (values, resuming, skipped, killed, failing):
        if b.m.arg.k and b.m.arg.k not in group.__name__:
            continue
        try:
            group(b)
        except (Broken, KeyError, OSError, IndexError, ValueError) as e:
            b.tap.result(False, group.__name__ + "_can_be_examined", "%s: %s" % (type(e).__name__, e))
    b.m.close()
    b.tap.close()


if __name__ == "__main__":
    main()
