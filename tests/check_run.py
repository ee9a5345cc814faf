#!/usr/bin/env python3
"""Runs from outside: the files they leave, resuming bit by bit, stopping and being killed, locks, numerics, validation, batches, stages.

Every case is a tiny run of input/mock_tiny.nml or of shards written here. -k WORD picks groups by name.
"""
import gzip
import os
import re
import shutil
import signal
import subprocess
import time

import h5py
import numpy as np

from harness import ROOT, Mimo, Tap, byte_letters, differing, everything, trace, wait_for, write_shards, write_tokenizer

DECK = os.path.join(ROOT, "input", "mock_tiny.nml")
DISJOINT = "topology.layout=disjoint"
SECTIONS = ("forward", "backward", "bridge_wait", "grad_sync", "optimizer", "data_wait")
TRACE = {"rows": "i8", "iteration": "i8", "consumed_samples": "i8", "lm_loss": "f8", "grad_norm": "f8", "learning_rate": "f8",
         "weight_decay": "f8", "num_tokens": "i8", "seq_load_balancing_loss": "f8", "skipped": "i1", "num_zeros": "i8",
         "params_norm": "f8", "iteration_seconds": "f8", "tokens_per_second": "f8", "tflops_per_gpu": "f8",
         "model_tflops_per_gpu": "f8", "images": "i8", "patches": "i8", "moe/tokens_per_expert": "i8", "ranks/peak_bytes": "i8",
         "language_tflops_per_gpu": "f8", "ranks/device_peak_bytes": "i8", "ranks/agreement_seconds": "f4",
         "ranks/gemm_flops": "i8", "ranks/sent_bytes": "i8", "ranks/arena_bytes": "i8", "eval/rows": "i8", "eval/iteration": "i8",
         "eval/lm_loss": "f8", "eval/lm_loss_ablated": "f8", **{"ranks/%s_seconds" % s: "f4" for s in SECTIONS}}


def grids(encoder, language):
    return DISJOINT, "topology.encoder_dp=%d" % encoder, "topology.llm_dp=%d" % language


def timing(path):
    return path.endswith(("_seconds", "_per_second", "_per_gpu", "peak_bytes")) or path.startswith(("code", "deck"))


def valid(directory):
    """The valid rows of a trace, without what depends on the clock."""
    t = everything(os.path.join(directory, "trace.h5"))
    rows, evals = int(t["rows"]), int(t["eval/rows"])
    return {k: v if v.ndim == 0 or k == "ranks/arena_bytes" else v[:evals] if k.startswith("eval/") else v[:rows]
            for k, v in t.items() if not timing(k)}


def same_trace(a, b):
    return "\n".join(differing(valid(a), valid(b)))


def checkpoint(directory, iteration):
    return os.path.join(directory, "ckpt", "iter_%07d" % iteration, "checkpoint.h5")


def same_checkpoint(a, b, iteration):
    return "\n".join(differing(everything(checkpoint(a, iteration)), everything(checkpoint(b, iteration)), timing))


def changed(directory, first, last, prefix):
    """Names below `prefix` whose bits differ between two checkpoints of a run."""
    a, b = (everything(checkpoint(directory, i)) for i in (first, last))
    return [k for k in differing(a, b) if k.startswith(prefix)]


def read(*parts):
    with open(os.path.join(*parts), errors="replace") as f:
        return f.read()


def descendants(pid):
    """Process ids of the ranks below a launcher, in the order of their start."""
    parent = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = read("/proc", entry, "stat").rsplit(")", 1)
                parent[int(entry)] = (int(fields[1].split()[1]), fields[0].split("(", 1)[1])
            except OSError:
                pass
    below, found = {pid}, []
    for _ in range(4):
        below |= {p for p, (up, _) in parent.items() if up in below}
    return sorted(p for p in below if p in parent and parent[p][1] == "mimo" and p != pid)


def finish(process, limit=60):
    start = time.monotonic()
    try:
        return process.wait(limit), time.monotonic() - start
    except subprocess.TimeoutExpired:
        for p in descendants(process.pid):
            os.kill(p, signal.SIGKILL)
        process.kill()
        process.wait()
        return "still running after %d s" % limit, time.monotonic() - start


class Runs:
    def __init__(self):
        self.tap, self.m = Tap(), Mimo()
        self.data = self.m.path("data")

    def at(self, name, *more):
        return self.m.path(name, *more)

    def arguments(self, name, more, iterations=3, batch=4, save=False):
        given = {a.split("=")[0] for a in more}
        base = {"run.output_dir": self.at(name), "run.train_iters": iterations, "batch.global_batch_size": batch}
        if save:
            base["checkpoint.save"] = self.at(name, "ckpt")
        return [DECK, *("%s=%s" % x for x in base.items() if x[0] not in given), *more]

    def go(self, name, *more, ranks=0, limit=120, **kw):
        return self.m.run(*self.arguments(name, more, **kw), ranks=ranks, limit=limit)

    def begin(self, name, *more, ranks=0, **kw):
        return self.m.start(*self.arguments(name, more, **kw), ranks=ranks)

    def ok(self, name, got, code=0, *needles):
        """Status and words anywhere in the output."""
        status, text = got[0], "".join(map(str, got[1:]))
        lacks = ["lacks '%s'" % n for n in needles if n not in text]
        return self.tap.result(status == code and not lacks, name, "status %s, not %s; %s\n%s" % (status, code, "; ".join(lacks), text[-2500:]))

    def equal(self, name, fault):
        return self.tap.result(not fault, name, fault)

    def real(self):
        """Overrides for shards and tokenizer, written on first use."""
        if not os.path.exists(self.data):
            os.mkdir(self.data)
            write_shards(self.at("data", "train"), 21, seed=3)
            write_shards(self.at("data", "valid"), 9, seed=4)
            write_tokenizer(self.at("data", "tokenizer.json"))
        return ("data.dataset_provider=webdataset", "data.train_data_path=" + self.at("data", "train"),
                "data.valid_data_path=" + self.at("data", "valid"), "data.tokenizer=" + self.at("data", "tokenizer.json"),
                "language.seq_length=128", "vision.dynamic_resolution_max_patches=64")


# ---- the files of a run ----------------------------------------------------------------------------------------------------

def files(r):
    start = time.monotonic()
    p = r.begin("first", *grids(1, 1), "run.title=a title", "eval.eval_iters=1", "log.log_timers=T", "log.dump_batches=1", ranks=2, save=True)
    seen = wait_for(lambda: p.text().strip() or p.poll() is not None, 30)
    r.tap.result(seen and p.text().strip() and time.monotonic() - start < 5, "the_first_line_comes_within_5_s",
                 "%.1f s: '%s'" % (time.monotonic() - start, p.text()[:80]))
    code, _ = finish(p)
    if not r.ok("a_run_ends_with_0", (code, p.text())):
        return
    out = r.at("first")
    have = sorted(os.listdir(out))
    r.tap.result(have == ["EXIT", "batches.h5", "ckpt", "deck.nml", "progress.txt", "run.log", "trace.h5"], "the_files_of_a_run", have)
    r.tap.result(re.match(r"^0 \S+ \S+ 3 .+\n$", read(out, "EXIT")) is not None, "EXIT_is_one_line_with_0", read(out, "EXIT"))
    r.tap.result("Starting job\tIteration: 0" in read(out, "progress.txt") and "Saved checkpoint\tIteration: 3" in read(out, "progress.txt"),
                 "progress_names_start_and_save", read(out, "progress.txt"))
    r.tap.result(read(out, "ckpt", "latest_checkpointed_iteration.txt").strip() == "3" and
                 sorted(os.listdir(r.at("first", "ckpt"))) == ["iter_0000003", "latest_checkpointed_iteration.txt"], "p12_92_the_tracker_names_the_last",
                 os.listdir(r.at("first", "ckpt")))
    log_file(r, out, p.text())
    trace_file(r, out)
    echo = r.m.run(os.path.join(out, "deck.nml"), "run.output_dir=" + r.at("echo"), "checkpoint.save=" + r.at("echo", "ckpt"), ranks=2)
    if r.ok("the_echo_runs", echo):
        r.equal("run_of_the_echo_equals_run_of_the_deck", same_trace(out, r.at("echo")) + same_checkpoint(out, r.at("echo"), 3))
        plain = lambda d: [x.split(" ! ")[0].rstrip() for x in read(r.at(d), "deck.nml").splitlines() if "'" + r.at(d) not in x and x[:1] != "!"]
        r.tap.result(plain("first") == plain("echo"), "the_echo_of_the_echo_has_the_same_values")
    origins = re.findall(r"! (deck:\d+|command line|preset|default|derived)$", read(out, "deck.nml"), re.M)
    r.tap.result(len(origins) > 130 and {"command line", "preset", "default", "derived"} <= set(origins) and any(o[0:5] == "deck:" for o in origins),
                 "the_echo_tells_where_each_value_came_from", len(origins))


def log_file(r, out, text):
    log = read(out, "run.log")
    r.tap.result(all(line in text for line in log.splitlines()), "run_log_is_what_was_printed")
    at = [log.find("\n%s: " % k) for k in ("program", "version", "git", "compiler", "flags", "mpi", "hdf5", "blas", "hosts", "ranks", "deck",
                                         "run directory", "title", "start")]
    r.tap.result(min(at[1:]) > 0 and at[2:] == sorted(at[2:]), "the_header_has_every_line_in_order", list(zip(at)))
    r.tap.result(re.search(r"^deck: .* sha256 [0-9a-f]{64}$", log, re.M) is not None and
                 subprocess.run(["sha256sum", DECK], stdout=subprocess.PIPE, text=True).stdout.split()[0] in log, "the_header_has_the_decks_sha256")
    r.tap.result(re.search(r"^start: new$", log, re.M) is not None, "the_header_tells_the_start")
    number = r"-?\d\.\d{6}E[+-]\d\d"
    line = (r"^ \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}\] iteration +\d+/ +3 \| consumed samples: +\d+ \| elapsed time per iteration \(ms\): "
            r"\d+\.\d \| throughput per GPU \(TFLOP/s/GPU\): \d+\.\d \| learning rate: NUM \| global batch size: +4 \| lm loss: NUM \|"
            r" seq_load_balancing_loss: NUM \| loss scale: 1\.0 \| grad norm: \d+\.\d{3} \| number of skipped iterations: +0 \|"
            r" number of nan iterations: +0 \| eta: \d+:\d\d:\d\d \|$").replace("NUM", number)
    r.tap.result(len(re.findall(line, log, re.M)) == 3, "every_iteration_has_its_line", log[-3000:])
    r.tap.result(len(re.findall(r"^ validation loss at iteration \d+.* \| lm loss value: %s \| lm loss PPL: %s \| $" % (number, number), log,
                                re.M)) == 2, "validation_has_its_lines")
    r.tap.result(all(re.search(r"^\s+%s\s+\d+\s+\d" % s, log, re.M) for s in ("forward", "backward", "optimizer", "data wait")) and
                 log.count("timers:") >= 4, "the_timers_are_printed")


def trace_file(r, out):
    with h5py.File(os.path.join(out, "trace.h5"), "r") as f:
        got = {}
        f.visititems(lambda path, o: got.__setitem__(path, o) if isinstance(o, h5py.Dataset) else None)
        wrong = ["%s: %s" % (k, got[k].dtype if k in got else "missing") for k, d in TRACE.items() if k not in got or got[k].dtype.str[1:] != d]
        r.tap.result(not wrong, "the_trace_has_every_dataset_and_type", wrong)
        extra = set(got) - set(TRACE) - {"deck/text"}
        r.tap.result(not extra, "the_trace_has_nothing_undocumented", extra)
        bare = [k for k in TRACE if k in got and not (got[k].attrs.get("units") and got[k].attrs.get("description"))]
        r.tap.result(not bare, "every_dataset_has_units_and_description", bare)
        text = lambda v: v.decode() if isinstance(v, bytes) else v
        r.tap.result(text(f.attrs["format"]) == "mimo-trace" and f.attrs["format_version"] >= 1, "the_trace_names_format_and_version", dict(f.attrs))
        code = set(f["code"].attrs)
        r.tap.result({"version", "git", "compiler", "mpi", "hdf5"} <= code, "code_has_version_git_compiler_libraries", code)
        deck = text(f["deck/text"][()])
        r.tap.result(deck == read(out, "deck.nml") and len(f["deck"].attrs) > 130, "deck_is_the_echo_as_text_and_attributes", len(f["deck"].attrs))
        r.tap.result(len(f["ranks/arena_bytes"].attrs["arenas"]) == f["ranks/arena_bytes"].shape[1] and f["ranks/arena_bytes"].shape[0] == 2,
                     "arena_bytes_names_its_arenas")
        shapes = {"iteration": (3,), "moe/tokens_per_expert": (3, 2, 8), "ranks/peak_bytes": (3, 2)}
        r.tap.result(all(f[k].shape == s for k, s in shapes.items()) and f["rows"][()] == 3, "the_trace_is_laid_out_at_full_length")
        tokens = f["moe/tokens_per_expert"][()].sum(axis=2)
        r.tap.result(np.all(tokens == 4 * 64 * 2), "every_token_goes_to_topk_experts", tokens)
        numbers = [k for k in TRACE if got[k].ndim and k not in ("params_norm", "eval/lm_loss_ablated") and got[k].dtype.kind == "f"
                   and not np.all(np.isfinite(got[k][()]))]
        r.tap.result(not numbers, "every_number_is_finite", numbers)
        r.tap.result(list(f["iteration"]) == [1, 2, 3] and list(f["consumed_samples"]) == [4, 8, 12] and np.all(f["num_tokens"][()] == 4 * 36) and
                     np.all(f["images"][()] == 8) and np.all(f["patches"][()] == 4 * 28 * 4), "the_counts_of_the_trace_are_the_decks")
        seconds = sum(f["ranks/%s_seconds" % s][()] for s in SECTIONS)
        wall = f["iteration_seconds"][()]           # rank 0's clock; another rank's iteration begins and ends elsewhere, so only its sum is bounded
        r.tap.result(np.all(seconds[:, 0] <= 1.05 * wall + 1e-3) and np.all(seconds.sum(axis=0) <= 1.05 * wall.sum() + wall.max()) and
                     np.all(seconds > 0), "sections_fit_into_the_iteration", "%s\n%s" % (seconds, f["iteration_seconds"][()]))
        agreement = f["ranks/agreement_seconds"][()]
        r.tap.result(np.all(agreement > 0) and np.all(agreement <= 1e-6 + f["ranks/grad_sync_seconds"][()] + f["ranks/optimizer_seconds"][()]),
                     "agreement_is_part_of_grad_sync_and_optimizer", agreement)
        r.tap.result(np.all(f["ranks/gemm_flops"][()] > 0) and np.all(f["ranks/sent_bytes"][()] > 0), "ranks_count_their_work")


def kept(r):
    """A second, fresh start in a finished directory overwrites nothing."""
    r.ok("fresh_run", r.go("twice", iterations=2))
    before = {n: open(r.at("twice", n), "rb").read() for n in ("trace.h5", "run.log", "progress.txt", "deck.nml")}
    got = r.go("twice", "run.seed=5", iterations=2)
    r.ok("a_second_fresh_start_runs_and_says_so", got, 0, "kept as")
    r.tap.result(all(open(r.at("twice", n + ".1"), "rb").read() == b for n, b in before.items()), "earlier_files_have_numbered_names",
                 sorted(os.listdir(r.at("twice"))))
    r.ok("a_third_fresh_start", r.go("twice", iterations=2))
    r.tap.result(os.path.exists(r.at("twice", "trace.h5.2")) and os.path.exists(r.at("twice", "trace.h5.1")), "the_numbers_go_on")
    os.makedirs(r.at("once"))
    shutil.copy(r.at("twice", "trace.h5.1"), r.at("once", "trace.h5"))
    r.equal("a_fresh_start_of_the_same_deck_gives_the_same_trace", same_trace(r.at("twice"), r.at("once")))


# ---- resuming --------------------------------------------------------------------------------------------------------------

RESUME = (("colocated_fp32", 0, "fp32", ()), ("two_plus_two_fp64", 4, "fp64", grids(2, 2)), ("fan_in_fp64", 3, "fp64", grids(2, 1)),
          ("fan_out_fp32", 3, "fp32", grids(1, 2)))
RICH = ("stage.training_stage=3", "data.mock_text_only_every=3", "lr.lr_decay_style=cosine", "lr.lr_warmup_iters=3", "lr.min_lr=1e-4",
        "moe.moe_router_bias_update_rate=0.05", "eval.eval_interval=4", "eval.eval_iters=2", "eval.eval_picture_ablation=rotate")


def resume_case(r, name, ranks, *more):
    whole, parts = "whole_" + name, "parts_" + name
    more = ("batch.micro_batch_size=2", *RICH, *more)
    if not r.ok("resume_%s_unbroken" % name, r.go(whole, *more, ranks=ranks, iterations=10, save=True)):
        return
    got = r.go(parts, *more, "run.exit_interval=5", ranks=ranks, iterations=10, save=True)
    r.ok("resume_%s_stops_with_75" % name, got, 75, "exit_interval")
    r.tap.result(read(r.at(parts), "EXIT").startswith("75 ") and int(everything(r.at(parts, "trace.h5"))["rows"]) == 5,
                 "resume_%s_leaves_5_rows" % name, read(r.at(parts), "EXIT"))
    got = r.go(parts, *more, "run.exit_interval=5", ranks=ranks, iterations=10, save=True)
    r.ok("resume_%s_goes_on" % name, got, 0, "restart from", "iteration 5", "scheduler resumed")
    r.equal("p12_91_resume_%s_trace_is_bitwise_the_unbroken_one" % name, same_trace(r.at(whole), r.at(parts)))
    r.equal("resume_%s_checkpoint_is_bitwise_the_unbroken_one" % name, same_checkpoint(r.at(whole), r.at(parts), 10))


def resume(r):
    for name, ranks, precision, layout in RESUME:
        resume_case(r, name, ranks, "run.precision=" + precision, *layout)
    text = read(r.at("parts_fan_in_fp64"), "progress.txt")
    with h5py.File(r.at("parts_fan_in_fp64", "trace.h5"), "r") as f:
        flops = np.cumsum(f["tflops_per_gpu"][()] * f["iteration_seconds"][()]) * 1e12 * f["ranks"].attrs["language_size"]
    told = re.findall(r"# ranks: \d+\tSaved checkpoint\tIteration: (\d+)\tJob throughput: [\d.]+ TFLOP/s/GPU\tCumulative throughput: [\d.]+ TFLOP/s/GPU\t"
                      r"Floating-point operations: ([\d.e+]+)\tTokens \(in billions\): [\d.]+\n", text)
    r.tap.result(told and all(abs(float(x) / flops[int(i) - 1] - 1) < 0.01 for i, x in told), "progress_counts_operations_over_all_starts", text)
    r.tap.result(text.count("Starting job\tIteration: ") == 2 and "Starting job\tIteration: 5" in text, "a_resumed_run_appends_to_progress", text)
    log = read(r.at("parts_fan_in_fp64"), "run.log")
    r.tap.result(log.count("program: mimo") == 2, "a_resumed_run_appends_to_the_log")
    resume_case(r, "real_data", 2, *r.real(), *grids(1, 1))
    got = r.go("parts_fan_out_fp32", "batch.micro_batch_size=2", *RICH, *grids(1, 2), "lr.lr_decay_iters=10", ranks=3, iterations=12, save=True)
    r.ok("p12_92_a_longer_run_goes_on", got)
    r.tap.result(read(r.at("parts_fan_out_fp32", "ckpt", "latest_checkpointed_iteration.txt")).strip() == "12" and
                 all(os.path.exists(checkpoint(r.at("parts_fan_out_fp32"), i)) for i in (5, 10, 12)), "p12_92_its_tracker_and_directories_are_there",
                 os.listdir(r.at("parts_fan_out_fp32", "ckpt")))
    t, old = everything(r.at("parts_fan_out_fp32", "trace.h5")), everything(r.at("whole_fan_out_fp32", "trace.h5"))
    r.tap.result(int(t["rows"]) == 12 and list(t["iteration"]) == list(range(1, 13)) and np.array_equal(t["lm_loss"][:10], old["lm_loss"]),
                 "a_longer_run_rewrites_the_trace", t["iteration"])
    got = r.go("parts_fan_out_fp32", "batch.micro_batch_size=2", *RICH, *grids(1, 2), "lr.lr_decay_iters=10", ranks=3, iterations=12, save=True)
    r.ok("nothing_to_train_is_success", got, 0, "nothing to train")


def colocated(encoder, language, *more):
    """(tp, dp) of both."""
    return ("topology.layout=colocated", *("topology.%s_%s=%d" % (g, k, n) for g, size in (("encoder", encoder), ("llm", language))
                                           for k, n in zip(("tp", "dp"), size)), *more)


def resharding(r):
    """A checkpoint of each layout, read by another: every tensor, moment and counter bit by bit; and the run goes on there as the unbroken
    one does on one rank. From row to row tp, dp, ep, expt_tp and the grids' ranks change."""
    more = ("run.precision=fp64", "stage.training_stage=3", "batch.micro_batch_size=2", "data.mock_text_only_every=3",
            "optimizer.overlap_grad_reduce=T", "optimizer.ddp_bucket_size=5000")
    layouts = [("one", 0, ()), ("dp", 4, grids(2, 2)), ("tp_ep", 4, colocated((2, 2), (2, 2), "topology.llm_ep=2")),
               ("parts", 4, colocated((1, 4), (1, 4), "topology.llm_ep=2", "topology.llm_expt_tp=2")),
               ("tp_parts", 2, colocated((2, 1), (2, 1), "topology.llm_expt_tp=2")), ("fan_in", 3, grids(2, 1))]
    if not r.ok("unbroken_on_one_rank", r.go("unbroken", *more, iterations=6, batch=8, save=True)):
        return
    want = valid(r.at("unbroken"))
    for i, (a, ranks, layout) in enumerate(layouts):
        b, b_ranks, b_layout = layouts[(i + 1) % len(layouts)]
        name = "%s_to_%s" % (a, b)
        got = r.go(a, *more, *layout, "run.exit_interval=3", ranks=ranks, iterations=6, batch=8, save=True)
        if not r.ok("saved_on_" + a, got, 75):
            continue
        got = r.go("again_" + a, *more, *b_layout, "checkpoint.load=" + r.at(a, "ckpt"), "run.exit_interval=3", ranks=b_ranks, iterations=3, batch=8,
                   save=True)
        r.ok("read_%s" % name, got, 0, "written by the layout", "nothing to train")
        same = differing(*(everything(checkpoint(r.at(x), 3)) for x in (a, "again_" + a)),
                         lambda k: timing(k) or k.startswith(("deck", "manifest", "code")) or k == "state/layout")
        r.tap.result(not same, "p12_90_%s_reads_every_bit" % name, same)
        got = r.go(a, *more, *b_layout, ranks=b_ranks, iterations=6, batch=8, save=True)
        if not r.ok("goes_on_%s" % name, got, 0, "written by the layout"):
            continue
        t = valid(r.at(a))
        worst = max(np.max(np.abs(t[k] / want[k] - 1)) for k in ("lm_loss", "grad_norm"))
        r.tap.result(list(t["iteration"]) == [1, 2, 3, 4, 5, 6] and worst < 1e-9 and all(np.array_equal(t[k], want[k]) for k in (
            "moe/tokens_per_expert", "num_tokens", "consumed_samples", "learning_rate")), "p12_90_%s_goes_on_like_the_unbroken_run" % name, worst)
    real = (*r.real(), "run.precision=fp64", "batch.micro_batch_size=2")
    r.go("real_whole", *real, *grids(1, 1), ranks=2, iterations=6, save=True)
    r.ok("real_data_stop", r.go("real_moved", *real, *grids(1, 1), "run.exit_interval=3", ranks=2, iterations=6, save=True), 75)
    r.ok("real_data_go_on_elsewhere", r.go("real_moved", *real, *grids(1, 2), ranks=3, iterations=6, save=True), 0, "written by the layout")
    a, b = valid(r.at("real_whole")), valid(r.at("real_moved"))
    r.tap.result(np.array_equal(a["num_tokens"], b["num_tokens"]) and np.array_equal(a["patches"], b["patches"]) and
                 np.max(np.abs(a["lm_loss"] / b["lm_loss"] - 1)) < 1e-9, "p12_90_the_stream_of_samples_goes_on", (a["lm_loss"], b["lm_loss"]))


def loading(r):
    """Which checkpoint is loaded, what of it, and what stays on disk."""
    if not r.ok("six_checkpoints", r.go("six", "checkpoint.save_interval=1", "checkpoint.save_initial=T", iterations=6, save=True)):
        return
    names = lambda d: [int(x[5:]) for x in sorted(os.listdir(r.at(d, "ckpt"))) if x.startswith("iter_")]
    r.tap.result(names("six") == [0, 1, 2, 3, 4, 5, 6], "save_interval_and_save_initial", names("six"))
    r.go("kept2", "checkpoint.save_interval=1", "checkpoint.keep_last=2", iterations=6, save=True)
    r.tap.result(names("kept2") == [5, 6], "keep_last_2", names("kept2"))
    r.go("retain3", "checkpoint.save_interval=1", "checkpoint.save_retain_interval=3", iterations=5, save=True)
    r.tap.result(names("retain3") == [3, 5], "save_retain_interval_3", names("retain3"))
    r.go("both", "checkpoint.save_interval=1", "checkpoint.save_retain_interval=3", "checkpoint.keep_last=2", iterations=8, save=True)
    r.tap.result(names("both") == [3, 6, 7, 8], "keep_last_and_save_retain_interval", names("both"))

    # a directory of checkpoints that a new run does not go on from: nothing of it is lost, nothing is silent
    read_text = lambda *at: read(r.at(*at))
    r.go("untracked", "checkpoint.save_interval=1", iterations=2, save=True)
    os.unlink(r.at("untracked", "ckpt", "latest_checkpointed_iteration.txt"))
    before = read_text("untracked", "ckpt", "iter_0000002", "checkpoint.h5")
    got = r.go("untracked", "checkpoint.save_interval=1", "run.seed=5", iterations=2, save=True)
    r.ok("checkpoints_without_a_tracker_are_said", got, 0, "warning: checkpoint.save", "no tracker", "start: new", "iter_0000002.1")
    r.tap.result(before == read_text("untracked", "ckpt", "iter_0000002.1", "checkpoint.h5") and before != read_text("untracked", "ckpt", "iter_0000002", "checkpoint.h5"),
                 "and_kept_under_a_number", os.listdir(r.at("untracked", "ckpt")))
    r.ok("a_directory_that_cannot_hold_checkpoints_is_said_at_the_start", r.go("nowhere", "checkpoint.save=" + r.at("untracked", "run.log"), iterations=2), 6, "checkpoint.save", "Not a directory")
    r.tap.result(not os.path.exists(r.at("nowhere", "trace.h5")), "before_anything_is_trained", os.listdir(r.at("nowhere")))

    load = "checkpoint.load=" + r.at("six", "ckpt")
    got = r.go("onward", load, iterations=8, save=True)
    r.ok("load_from_another_directory", got, 0, "restart from", "iteration 6")
    t = everything(r.at("onward", "trace.h5"))
    r.tap.result(list(t["iteration"][:int(t["rows"])]) == [7, 8], "its_trace_starts_at_the_next_iteration", t["iteration"])
    r.go("eight", iterations=8, save=True)
    fault = same_checkpoint(r.at("eight"), r.at("onward"), 8).replace("state/scheduler/decay", "").replace("state/scheduler/wd_steps", "")
    r.tap.result(np.array_equal(everything(r.at("eight", "trace.h5"))["lm_loss"][6:], t["lm_loss"][:2]) and not fault.strip(),
                 "its_rows_are_the_unbroken_ones", fault)
    got = r.go("step2", load, "checkpoint.ckpt_step=2", iterations=4)
    r.ok("ckpt_step", got, 0, "iteration 2")
    t2, six = everything(r.at("step2", "trace.h5")), everything(r.at("six", "trace.h5"))
    r.tap.result(list(t2["iteration"][:2]) == [3, 4] and np.array_equal(t2["lm_loss"][:2], six["lm_loss"][2:4]), "ckpt_step_2_goes_on_at_3")
    r.ok("ckpt_step_that_is_not_there", r.go("step99", load, "checkpoint.ckpt_step=99", iterations=4), 5, "ckpt_step", "99")
    r.ok("finetune", r.go("tuned", load, "checkpoint.finetune=T", "checkpoint.save_initial=T", iterations=2, save=True), 0, "weights of")
    a, b = everything(checkpoint(r.at("six"), 6)), everything(checkpoint(r.at("tuned"), 0))
    model = lambda path: not path.startswith("model")
    t = everything(r.at("tuned", "trace.h5"))
    r.tap.result(not differing(a, b, model) and list(t["iteration"]) == [1, 2] and list(t["consumed_samples"]) == [4, 8] and
                 int(b["state/optimizer_step"]) == 0, "p12_93_finetune_takes_the_weights_and_starts_at_0", differing(a, b, model))
    masters = [k for k in b if k.endswith("/master")]
    stale = [k for k in masters if not np.array_equal(b[k], b["model/" + k[len("optimizer/"):-len("/master")]])]
    r.tap.result(masters and not stale, "m6_26_masters_are_the_loaded_weights", stale)
    r.ok("no_load_optim", r.go("noopt", load, "checkpoint.no_load_optim=T", iterations=7, save=True), 0)
    t = everything(r.at("noopt", "trace.h5"))
    r.tap.result(t["iteration"][0] == 7 and np.array_equal(t["lm_loss"][:1], everything(r.at("onward", "trace.h5"))["lm_loss"][:1]) and
                 int(everything(checkpoint(r.at("noopt"), 7))["state/optimizer_step"]) == 1,
                 "p12_93_no_load_optim_keeps_iteration_and_weights_and_forgets_the_moments", t["iteration"])
    os.mkdir(r.at("empty"))
    got = r.go("warned", "checkpoint.load=" + r.at("empty"), iterations=2)
    r.ok("load_without_a_tracker_starts_at_0", got, 0, "start: new")
    warned = [x for x in got[2].splitlines() if "warning" in x and r.at("empty") in x]
    r.tap.result(len(warned) == 1, "load_without_a_tracker_gives_one_warning", got[2])
    refused_checkpoints(r, load)


def refused_checkpoints(r, load):
    copy = r.at("copy")
    unbroken = everything(r.at("eight", "trace.h5"))["lm_loss"]

    def broken(title, change, *needles):
        """The newest of seven is damaged: the run says why and goes on from the one before; alone in its directory it is refused."""
        for older in (True, False):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(r.at("six", "ckpt"), copy)
            for i in range(6):
                if not older:
                    shutil.rmtree(os.path.join(copy, "iter_%07d" % i))
            change(copy, os.path.join(copy, "iter_0000006", "checkpoint.h5"))
            shutil.rmtree(r.at("try"), ignore_errors=True)
            got = r.go("try", "checkpoint.load=" + copy, iterations=8)
            if older:
                newest = 6 if "tracker" in title else 5
                r.ok("F16_%s_falls_back" % title, got, 0, "restart from %s iteration %d (verified)" % (copy, newest))
                lines = [x for x in got[2].splitlines() if x.startswith("warning: ") and copy in x]
                r.tap.result(len(lines) == 2 and all(n in lines[0] for n in needles) and "falling back to iteration %d" % newest in lines[1] and
                             "error" not in got[2] and all(x in read(r.at("try", "run.log")) for x in lines),
                             "F16_%s_is_said_in_a_warning" % title, got[2][-600:])
                t = everything(r.at("try", "trace.h5"))
                r.tap.result(list(t["iteration"][:int(t["rows"])]) == list(range(newest + 1, 9)) and np.array_equal(t["lm_loss"], unbroken[newest:]),
                             "F16_%s_goes_on_as_the_unbroken_run" % title, t["lm_loss"])
            elif "tracker" not in title:
                r.ok("F16_%s_and_nothing_older_is_5" % title, got, 5, "error:", *needles)
                r.tap.result(copy in [x for x in got[2].splitlines() if "error:" in x][0], "F16_%s_names_the_file" % title, got[2][-600:])

    def put(name, data):
        with open(name, "wb") as f:
            f.write(data)
    tracker = "latest_checkpointed_iteration.txt"
    broken("garbage_tracker", lambda d, f: put(os.path.join(d, tracker), b"six\n"), tracker, "'six'")
    broken("empty_tracker", lambda d, f: put(os.path.join(d, tracker), b""), tracker)
    broken("stale_tracker", lambda d, f: put(os.path.join(d, tracker), b"77\n"), "iter_0000077")
    broken("empty_file", lambda d, f: put(f, b""), "checkpoint.h5")
    broken("garbage_file", lambda d, f: put(f, os.urandom(5000)), "checkpoint.h5")
    broken("truncated_file", lambda d, f: os.truncate(f, os.path.getsize(f) // 2), "checkpoint.h5")
    broken("no_file", lambda d, f: os.unlink(f), "checkpoint.h5")

    def flip(d, f):
        with h5py.File(f, "r") as h:
            offset = h["model/language/embedding.word_embeddings.weight"].id.get_offset()
        with open(f, "r+b") as h:
            h.seek(offset + 1000)
            b = h.read(1)
            h.seek(offset + 1000)
            h.write(bytes([b[0] ^ 16]))
    broken("flipped_bit", flip, "embedding.word_embeddings.weight")

    def link(d, f):
        os.rename(f, f + ".real")
        os.symlink(f + ".real", f)
    broken("F43_symlink", link, "link")
    broken("only_an_unfinished_one", lambda d, f: (os.rename(os.path.dirname(f), os.path.join(d, ".tmp-iter_0000006-x-1"))), "iter_0000006")
    for title, more, words in (("F17_other_model", ("moe.num_experts=4",), ("num_experts", "8", "4")),
                               ("F17_other_precision", ("run.precision=fp64",), ("run.precision",)),
                               ("F17_other_lr", ("lr.lr=2e-3",), ("lr", "0.001", "0.002")),
                               ("F17_other_seed", ("run.seed=9",), ("seed", "1234", "9"))):
        r.ok(title, r.go("try", load, *more, iterations=8), 5, "error:", *words)


# ---- stopping --------------------------------------------------------------------------------------------------------------

def stopping(r):
    """A chain of stops of every kind in one directory; the joined trace is the unbroken one."""
    more = ("stage.training_stage=3", "run.exit_duration_in_mins=5", *grids(1, 1))
    ways = (("SIGTERM_to_one_rank", lambda p: os.kill(descendants(p.pid)[-1], signal.SIGTERM), "signal"),
            ("SIGUSR1_to_one_rank", lambda p: os.kill(descendants(p.pid)[0], signal.SIGUSR1), "signal"),
            ("SIGTERM_to_mpiexec", lambda p: p.send_signal(signal.SIGTERM), "signal"),
            ("SIGUSR1_to_mpiexec", lambda p: p.send_signal(signal.SIGUSR1), "signal"),
            ("STOP_file", lambda p: open(r.at("chain", "STOP"), "w").close(), "STOP"))
    at = 0
    for name, act, word in ways:
        p = r.begin("chain", *more, ranks=2, iterations=4000, batch=2, save=True)
        lines = p.text
        r.tap.result(wait_for(lambda: lines().count("lm loss:") >= 4 or p.poll() is not None) and p.poll() is None, name + "_was_running",
                     lines()[-1500:])
        if p.poll() is not None:
            return
        act(p)
        code, seconds = finish(p)
        exit_line = read(r.at("chain"), "EXIT") if os.path.exists(r.at("chain", "EXIT")) else "no EXIT"
        # A signalled mpiexec forwards the signal but may end with 0 itself: then the EXIT file is the truth.
        r.tap.result((code == 75 or "mpiexec" in name) and exit_line.startswith("75 ") and word in exit_line and seconds < 30, name + "_ends_with_75",
                     "status %s, %s\n%s" % (code, exit_line, lines()[-1500:]))
        tracker = r.at("chain", "ckpt", "latest_checkpointed_iteration.txt")
        now = int(read(tracker)) if os.path.exists(tracker) else -1
        r.tap.result(now > at and exit_line.split()[3:4] == [str(now)], name + "_saved_its_last_iteration", "%d, %s" % (now, exit_line))
        r.tap.result(not any(os.path.exists(r.at("chain", x)) for x in ("STOP", "LOCK")), name + "_leaves_no_request", os.listdir(r.at("chain")))
        if now <= at:
            return
        at = now
    p = r.begin("chain", *more, ranks=2, iterations=4000, batch=2, save=True)
    wait_for(lambda: p.text().count("lm loss:") >= 2 or p.poll() is not None)
    open(r.at("chain", "SAVE"), "w").close()
    served = wait_for(lambda: not os.path.exists(r.at("chain", "SAVE")), 30)
    saved = int(read(tracker))
    r.tap.result(served and saved > at and p.poll() is None, "SAVE_saves_and_goes_on", "%s %d %s" % (served, saved, p.text()[-800:]))
    wait_for(lambda: p.text().count("lm loss:") >= 12 or p.poll() is not None)
    ranks = descendants(p.pid)
    os.kill(ranks[-1], signal.SIGKILL)
    code, seconds = finish(p)
    r.tap.result(code not in (0, 75) and seconds < 30, "p12_105_F01_kill_9_of_a_rank_ends_the_job", "status %s after %.1f s" % (code, seconds))
    r.tap.result(wait_for(lambda: not any(os.path.exists("/proc/%d" % x) and "Z" not in read("/proc/%d/stat" % x).rsplit(")", 1)[1][:3]
                                          for x in ranks), 10), "F01_no_rank_is_left")
    r.tap.result(os.path.exists(r.at("chain", "LOCK")) and not os.path.exists(r.at("chain", "EXIT")), "F01_the_lock_stays_and_EXIT_is_absent",
                 os.listdir(r.at("chain")))
    r.ok("F01_status_says_8", r.m.run("--status", r.at("chain")), 8)
    last = saved + 3
    got = r.go("chain", *more, "run.exit_interval=%d" % last, ranks=2, iterations=4000, batch=2, save=True)
    r.ok("F41_a_stale_lock_is_taken_over", got, 75, "taken over", "restart from", "iteration %d" % saved)
    got = r.go("chainless", *more, "run.exit_interval=%d" % last, ranks=2, iterations=4000, batch=2, save=True)
    r.ok("the_unbroken_run_of_the_chain", got, 75)
    r.equal("F20_seven_starts_give_the_unbroken_trace", same_trace(r.at("chain"), r.at("chainless")))
    r.equal("F20_and_the_unbroken_checkpoint", same_checkpoint(r.at("chain"), r.at("chainless"), last))
    rows = valid(r.at("chain"))["iteration"]
    r.tap.result(list(rows) == list(range(1, last + 1)), "F48_the_trace_has_no_gap", rows)


def signals(r):
    p = r.begin("twosignals", *grids(1, 1), ranks=2, iterations=1000, batch=400, save=True)
    wait_for(lambda: len(descendants(p.pid)) == 2 and "start:" in p.text() or p.poll() is not None)
    time.sleep(0.3)
    rank = descendants(p.pid)[-1]
    os.kill(rank, signal.SIGTERM)
    time.sleep(0.05)
    os.kill(rank, signal.SIGTERM)
    code, seconds = finish(p)
    left = sorted(os.listdir(r.at("twosignals", "ckpt")))
    r.tap.result(code not in (0, 75) and seconds < 30 and left in ([], ["LOCK"]), "F23_a_second_signal_stops_at_once",
                 "status %s after %.1f s, %s" % (code, seconds, left))
    p = r.begin("early", *grids(1, 1), ranks=2, iterations=100000, batch=2, save=True)
    wait_for(lambda: len(descendants(p.pid)) == 2 or p.poll() is not None)
    p.send_signal(signal.SIGTERM)
    code, seconds = finish(p)
    said = r.m.run("--status", r.at("early"))                  # the launcher itself may return 0
    r.tap.result(said[0] != 0 and seconds < 30, "F22_a_signal_during_the_start_is_honoured", "%s after %.1f s; %s" % (code, seconds, said[1]))
    p = r.begin("midway", *grids(1, 1), "eval.eval_iters=100000", ranks=2, iterations=10, batch=2, save=True)
    wait_for(lambda: "start:" in p.text() or p.poll() is not None)
    time.sleep(0.5)
    p.send_signal(signal.SIGTERM)
    code, seconds = finish(p, 15)
    said = r.m.run("--status", r.at("midway"))
    r.tap.result(said[0] == 75 and seconds < 15, "F22_a_signal_during_validation_is_honoured", "%s after %.1f s; %s" % (code, seconds, said[1]))
    os.makedirs(r.at("early_stop"))
    open(r.at("early_stop", "STOP"), "w").close()
    r.ok("F24_a_STOP_file_before_the_start_is_refused", r.go("early_stop"), 2, "STOP")
    got = r.go("timed", "run.exit_duration_in_mins=0.001", iterations=3000, batch=2, save=True)
    r.ok("exit_duration_ends_with_75", got, 75, "exit_duration_in_mins")
    got = r.go("unsaved", "run.exit_interval=2", iterations=4)
    r.ok("a_stop_without_save_says_so", got, 75, "nothing is saved")


def locks(r):
    more = (*grids(1, 1),)
    p = r.begin("live", *more, ranks=2, iterations=4000, batch=2, save=True)
    wait_for(lambda: p.text().count("lm loss:") >= 2 or p.poll() is not None)
    lock = r.at("live", "LOCK")
    r.tap.result(os.path.exists(lock) and not os.path.exists(r.at("live", "EXIT")), "a_live_run_holds_LOCK")
    rows = []
    for _ in range(2):
        with h5py.File(r.at("live", "trace.h5"), "r", locking=False) as f:
            rows.append(int(f["rows"][()]))
            finite = np.all(np.isfinite(f["lm_loss"][:rows[-1]]))
        count = p.text().count("lm loss:")
        wait_for(lambda: p.text().count("lm loss:") > count + 2 or p.poll() is not None, 20)
    r.tap.result(rows[1] > rows[0] > 0 and finite, "the_trace_can_be_read_while_the_run_goes_on", rows)
    files_before = sorted(os.listdir(r.at("live")))
    for ranks in (0, 2):
        got = r.go("live", *(more if ranks else ()), ranks=ranks, iterations=4000, batch=2, save=True)
        r.ok("F40_a_second_run_on_%d_ranks_is_refused" % max(ranks, 1), got, 3, "live run", "LOCK")
    r.ok("F40_a_bad_second_run_does_not_touch_the_directory", r.go("live", "run.seed=x"), 2)
    r.tap.result(sorted(os.listdir(r.at("live"))) == files_before and p.poll() is None, "F40_the_first_run_is_untouched", os.listdir(r.at("live")))
    got = r.go("other", "checkpoint.save=" + os.path.dirname(os.path.dirname(checkpoint(r.at("live"), 1))), iterations=2, batch=2)
    r.ok("F40_a_run_that_would_save_into_another's_directory_is_refused", got, 3, "live run", "LOCK")
    p.send_signal(signal.SIGTERM)
    finish(p)
    r.ok("F40_the_first_run_ends_as_planned", r.m.run("--status", r.at("live")), 75)
    faults = []
    for trial in range(8):
        two = []
        for delay in (0.0, 0.03 * trial):
            time.sleep(delay)
            two.append(r.begin("race%d" % trial, iterations=40, batch=2))
        codes = sorted(finish(x)[0] for x in two)
        rows = [int(everything(r.at("race%d" % trial, f))["rows"]) for f in os.listdir(r.at("race%d" % trial)) if f.startswith("trace.h5")]
        if not (codes == [0, 3] and rows == [40] or codes == [0, 0] and rows == [40, 40]):
            faults.append("%s, rows %s: %s" % (codes, rows, sorted(os.listdir(r.at("race%d" % trial)))))
    r.tap.result(not faults, "F40_of_two_at_once_one_runs_at_a_time", "\n".join(faults))


# ---- numerics ----------------------------------------------------------------------------------------------------------------

def numerics(r):
    for ranks in (0, 2):
        got = r.go("burst%d" % ranks, "lr.lr=1e3", "language.init_method_std=1e3", "optimizer.clip_grad=0", "run.title=nan?", ranks=ranks,
                   iterations=20, save=True)
        tag = "nan_on_%d_ranks" % max(ranks, 1)
        r.ok(tag + "_aborts_with_7", got, 7)
        text = got[1] + got[2]
        r.tap.result(len([x for x in got[2].splitlines() if "error:" in x]) == 1 and re.search(r"iteration \d+.*\b(nan|inf)\b", got[2]) is not None,
                     "p12_105_" + tag + "_has_one_error_line_that_names_the_iteration", got[2])
        r.tap.result(re.search(r"lm loss[^|]*(nan|inf)\b", text) is not None, tag + "_prints_the_loss_of_that_iteration", text[-1200:])
        r.tap.result(read(r.at("burst%d" % ranks), "EXIT").startswith("7 "), tag + "_writes_EXIT")
        r.tap.result(not os.path.exists(r.at("burst%d" % ranks, "ckpt", "latest_checkpointed_iteration.txt")), tag + "_saves_nothing")
    got = r.go("skipped", "lr.lr=1e3", "language.init_method_std=1e3", "optimizer.clip_grad=0", "optimizer.non_finite_policy=skip",
               "checkpoint.save_interval=1", "checkpoint.save_initial=T", iterations=4, save=True)
    if r.ok("nan_with_policy_skip_goes_on", got, 0):
        t = everything(r.at("skipped", "trace.h5"))
        bad = [i for i in range(4) if t["skipped"][i]]
        r.tap.result(len(bad) > 0 and all(not np.isfinite(t["grad_norm"][i]) for i in bad), "nan_with_policy_skip_marks_the_rows",
                     "%s %s" % (t["skipped"], t["grad_norm"]))
        moved = [k for i in bad for k in changed(r.at("skipped"), i, i + 1, ("model", "optimizer")) if "expert_bias" not in k]
        r.tap.result(not moved, "p12_74_nan_with_policy_skip_keeps_parameters_and_moments", moved)
        r.tap.result(list(t["consumed_samples"]) == [4, 8, 12, 16] and
                     int(everything(checkpoint(r.at("skipped"), 4))["state/scheduler/n"]) == 4 * (4 - len(bad)),
                     "a_skipped_update_consumes_samples_and_does_not_move_the_schedule")
        r.tap.result(re.search(r"number of skipped iterations: +1 ", got[1]) is not None, "a_skipped_update_is_logged", got[1][-800:])
    got = r.go("threshold", "optimizer.grad_norm_skip_threshold=1e-3", "checkpoint.save_initial=T", save=True)
    r.ok("grad_norm_skip_threshold", got, 0)
    r.tap.result(np.all(everything(r.at("threshold", "trace.h5"))["skipped"] == 1) and not
                 [k for k in changed(r.at("threshold"), 0, 3, ("model", "optimizer")) if "expert_bias" not in k],
                 "grad_norm_skip_threshold_skips_every_update")
    got = r.go("leap", "batch.iterations_to_skip=2,3", "checkpoint.save_interval=1", "lr.lr_decay_style=linear", iterations=5, save=True)
    r.ok("iterations_to_skip", got, 0, "skipped samples:")
    t = everything(r.at("leap", "trace.h5"))
    state = {i: everything(checkpoint(r.at("leap"), i)) for i in (1, 3, 5) if os.path.exists(checkpoint(r.at("leap"), i))}
    r.tap.result(list(t["skipped"]) == [0, 1, 1, 0, 0] and list(t["consumed_samples"]) == [4, 8, 12, 16, 20] and
                 int(state[5]["state/skipped_train_samples"]) == 8 and int(state[5]["state/scheduler/n"]) == 12 and
                 int(state[5]["state/consumed_train_samples"]) == 20, "iterations_to_skip_counts", t["skipped"])
    whole = r.go("noleap", iterations=5)
    t2 = everything(r.at("noleap", "trace.h5"))
    r.tap.result(whole[0] == 0 and t["num_tokens"][3] == t2["num_tokens"][3] and t["lm_loss"][3] != t2["lm_loss"][3] and
                 t["lm_loss"][0] == t2["lm_loss"][0], "iterations_to_skip_reads_the_samples_and_trains_nothing")
    got = r.go("samples", "run.train_samples=11", "run.train_iters=0")
    t = everything(r.at("samples", "trace.h5"))
    r.tap.result(got[0] == 0 and list(t["consumed_samples"]) == [4, 8], "train_samples_is_rounded_down_to_iterations", t["consumed_samples"])
    got = r.go("counted", "log.log_num_zeros_in_grad=T", "log.log_params_norm=T", "stage.training_stage=3", "checkpoint.save_interval=1",
               ranks=2, iterations=2, save=True)
    r.ok("log_num_zeros_and_params_norm", got, 0, "num zeros:", "params norm:")
    t = everything(r.at("counted", "trace.h5"))
    masters = [v.astype(np.float64) for k, v in everything(checkpoint(r.at("counted"), 2)).items() if k.endswith("/master")]
    norm = np.sqrt(sum(float((v * v).sum()) for v in masters))
    r.tap.result(abs(t["params_norm"][1] / norm - 1) < 1e-5, "params_norm_is_the_norm_of_the_masters", "%r %r" % (t["params_norm"], norm))
    size = sum(v.size for v in masters)
    r.tap.result(np.all((0 < t["num_zeros"]) & (t["num_zeros"] < size)), "num_zeros_lies_between_nothing_and_everything",
                 "%s of %d" % (t["num_zeros"], size))
    one = r.go("counted1", "log.log_num_zeros_in_grad=T", "log.log_params_norm=T", "stage.training_stage=3", iterations=2)
    t1 = everything(r.at("counted1", "trace.h5"))
    r.tap.result(one[0] == 0 and abs(t1["params_norm"][1] / t["params_norm"][1] - 1) < 1e-5 and
                 abs(int(t1["num_zeros"][0]) - int(t["num_zeros"][0])) <= 0.001 * size, "both_agree_on_another_layout",
                 "%s %s" % (t1["num_zeros"], t["num_zeros"]))


def participation(r):
    """parallel.md 6.7 in a run of two encoder lanes and two micro-batches: sample 2m + d goes to lane d. Every second sample without a
    picture: lane 1 sees none, factor 2. Every fourth: lane 1 sees one in its first micro-batch alone, factor 1."""
    def norm(name, stage, every, corrected):
        got = r.go(name, "run.precision=fp64", "optimizer.clip_grad=0", "moe.moe_aux_loss_coeff=0", "stage.training_stage=%d" % stage,
                   "data.mock_text_only_every=%d" % every, "optimizer.correct_encoder_grad_for_partial_participation=" + corrected,
                   *grids(2, 2), ranks=4, iterations=1)
        r.ok(name, got)
        return float(valid(r.at(name))["grad_norm"][0])
    projector, corrected = norm("part_projector", 1, 2, "F"), norm("part_projector_corrected", 1, 2, "T")
    r.tap.result(projector > 0 and abs(corrected / projector - 2) < 1e-12, "p12_65_lanes_without_pictures_scale_the_encoder", (projector, corrected))
    both, corrected = norm("part_both", 2, 2, "F"), norm("part_both_corrected", 2, 2, "T")
    r.tap.result(both > projector and abs((corrected ** 2 - both ** 2) / (3 * projector ** 2) - 1) < 1e-9,
                 "p12_65_the_language_model_is_not_scaled", (both, corrected, projector))
    all_seen, corrected = norm("part_seen", 1, 4, "F"), norm("part_seen_corrected", 1, 4, "T")
    r.tap.result(all_seen == corrected, "p12_65_one_picture_in_any_microbatch_counts", (all_seen, corrected))


# ---- validation, batches, stages ---------------------------------------------------------------------------------------------

def validation(r):
    more = ("run.precision=fp64", "eval.eval_interval=2", "eval.eval_iters=2", "batch.micro_batch_size=2", "data.mock_text_only_every=3")
    layouts = (("one", 0, ()), ("two_plus_two", 4, grids(2, 2)), ("two_plus_one", 3, grids(2, 1)), ("colocated2", 2, ("topology.layout=colocated",)))
    for kind in ("rotate", "zero"):
        first = None
        for name, ranks, layout in layouts:
            out = "eval_%s_%s" % (kind, name)
            got = r.go(out, *more, *layout, "eval.eval_picture_ablation=" + kind, ranks=ranks, iterations=5, batch=8)
            if not r.ok(out, got, 0, "with rotated pictures" if kind == "rotate" else "with zeroed pictures"):
                continue
            t = everything(r.at(out, "trace.h5"))
            e = {k: t["eval/" + k][:int(t["eval/rows"])] for k in ("iteration", "lm_loss", "lm_loss_ablated")}
            if first is None:
                first = e
                r.tap.result(list(e["iteration"]) == [0, 2, 4, 5], "eval_%s_at_start_interval_and_end" % kind, e["iteration"])
                r.tap.result(np.all(np.abs(e["lm_loss"] - e["lm_loss_ablated"]) > 1e-9) and np.all(np.isfinite(e["lm_loss_ablated"])),
                             "eval_%s_gives_another_value" % kind, e)
                continue
            worst = max(np.max(np.abs(e[k] / first[k] - 1)) for k in ("lm_loss", "lm_loss_ablated"))
            r.tap.result(worst < 1e-9, out + "_is_layout_invariant", worst)
    got = r.go("noeval", *[x for x in more if not x.startswith("eval")], iterations=5, batch=8)
    a, b = valid(r.at("noeval")), valid(r.at("eval_rotate_one"))
    names = ("lm_loss", "grad_norm", "moe/tokens_per_expert")
    r.tap.result(got[0] == 0 and all(np.array_equal(a[k], b[k]) for k in names), "p12_49_validation_does_not_change_the_training")
    normalisation(r, a, valid(r.at("eval_rotate_two_plus_two")))
    r.go("evalstart", *more, "checkpoint.save_interval=2", iterations=4, batch=8, save=True)
    got = r.go("evalonly", *more, "run.mode=eval", "checkpoint.load=" + r.at("evalstart", "ckpt"), iterations=4, batch=8)
    if r.ok("mode_eval", got, 0, "validation loss"):
        t, s = everything(r.at("evalonly", "trace.h5")), everything(r.at("evalstart", "trace.h5"))
        r.tap.result(int(t["rows"]) == 0 and int(t["eval/rows"]) == 1 and t["eval/iteration"][0] == 4 and
                     t["eval/lm_loss"][0] == s["eval/lm_loss"][int(s["eval/rows"]) - 1], "mode_eval_gives_the_value_of_the_run",
                     "%s %s" % (t["eval/lm_loss"], s["eval/lm_loss"]))


def normalisation(r, one, four):
    """Logged numbers of one rank and of two plus two: means over the E layers, throughput by the ranks of the language grid."""
    rate = lambda name, k: everything(r.at(name, "trace.h5"))[k][:5]
    work = {n: {k: rate(n, k) * rate(n, "iteration_seconds") for k in ("tflops_per_gpu", "model_tflops_per_gpu")}
            for n in ("noeval", "eval_rotate_two_plus_two")}
    same = lambda k, a, b: np.all(np.abs(a * work["noeval"][k] / (b * work["eval_rotate_two_plus_two"][k]) - 1) < 1e-9)
    r.tap.result(same("tflops_per_gpu", 1, 2) and same("model_tflops_per_gpu", 1, 4),
                 "p12_104_throughput_counts_the_language_ranks_and_model_throughput_all", work)
    both = one["seq_load_balancing_loss"], four["seq_load_balancing_loss"]
    r.tap.result(all(np.all((0.9 < v) & (v < 1.6)) for v in both) and np.allclose(*both, rtol=1e-9, atol=0),
                 "p12_104_the_balance_is_a_mean_over_the_expert_layers", both)


def dump(r, name, iteration=1):
    with h5py.File(r.at(name, "batches.h5"), "r") as f:
        return {k: v[()] for k, v in f["iteration_%06d" % iteration].items()}


def same_batches(r, a, b, iterations):
    """What the model made of a batch, token_*, is rounded by the layout."""
    return "\n".join("iteration %d: %s" % (i, k) for i in range(1, iterations + 1) for k in differing(dump(r, a, i), dump(r, b, i))
                     if "token_" not in k and k != "logits")


def token_losses(r, name):
    """The dumped losses of tokens add up to the trace; losses and log-sum-exp are those of the dumped, nearly even logits."""
    d, rows = [dump(r, name, i) for i in (1, 2)], trace(r.at(name))
    means = [(x["token_loss"] * x["loss_mask"]).sum() / x["loss_mask"].sum() for x in d]
    return "" if np.allclose(means, rows["lm_loss"][:2], rtol=1e-6, atol=0) and all(
        np.all((x["token_loss"] > 0) == (x["labels"] >= 0)) and np.all(np.abs(x["token_lse"] - np.log(512)) < 1) and of_logits(x) for x in d) else str(
            (means, rows["lm_loss"]))


def of_logits(x):
    """Whether the dumped losses and log-sum-exps are those of the dumped logits."""
    logits, labels = x["logits"].astype(np.float64), x["labels"].ravel()
    lse = np.log(np.exp(logits).sum(1))
    loss = np.where(labels < 0, 0, lse - logits[np.arange(len(lse)), np.maximum(labels, 0)])
    return len(logits) == labels.size and np.allclose(lse, x["token_lse"].ravel(), rtol=1e-6) and np.allclose(loss, x["token_loss"].ravel(), rtol=0, atol=1e-5)


def batches(r):
    plain = ("log.dump_batches=2", "log.dump_logits=T", "batch.micro_batch_size=2", "data.mock_text_only_every=3")
    more = (*plain, "stage.training_stage=3")
    layouts = (("one", 0, ()), ("two_plus_two", 4, grids(2, 2)), ("one_plus_two", 3, grids(1, 2)))
    for name, ranks, layout in layouts:
        r.ok("batches_" + name, r.go("batches_" + name, *more, *layout, ranks=ranks, batch=8))
        r.ok("real_batches_" + name, r.go("real_" + name, *r.real(), *more, *layout, ranks=ranks, batch=8))
        if name != "one":
            r.equal("batches_on_%s_are_bitwise_the_same" % name, same_batches(r, "batches_one", "batches_" + name, 2))
            r.equal("real_batches_on_%s_are_bitwise_the_same" % name, same_batches(r, "real_one", "real_" + name, 2))
    with h5py.File(r.at("batches_one", "batches.h5"), "r") as f:
        groups = sorted(g for g in f if g.startswith("iteration_"))
    r.tap.result(groups == ["iteration_000001", "iteration_000002"], "dump_batches_writes_the_first_n", groups)
    r.ok("batches_cut", r.go("batches_cut", *more, *grids(1, 1), "topology.llm_tp=2", ranks=3, batch=8))
    r.equal("batches_of_a_cut_vocabulary_are_bitwise_the_same", same_batches(r, "batches_one", "batches_cut", 2))
    for name in ("batches_one", "batches_two_plus_two", "batches_cut", "real_one_plus_two"):
        r.equal("token_losses_of_%s_add_up" % name, token_losses(r, name))
    mock_batch(r, dump(r, "batches_one"))
    real_batch(r, dump(r, "real_one"), dump(r, "real_one", 2))
    r.ok("batches_of_a_validation", r.go("validated", "run.mode=eval", "eval.eval_iters=3", "log.dump_batches=3", *grids(2, 2), ranks=4, batch=8))
    d = [dump(r, "validated", i) for i in (1, 2, 3)]
    pooled = sum((x["token_loss"] * x["loss_mask"]).sum() for x in d) / sum(x["loss_mask"].sum() for x in d)
    loss = everything(r.at("validated", "trace.h5"))["eval/lm_loss"][0]
    r.tap.result(abs(pooled - loss) < 1e-6 * loss, "dumped_validation_batches_add_up_to_its_loss", (pooled, loss))
    r.ok("batches_frozen", r.go("frozen", *plain, "data.mock_pixels=zeros", "run.precision=fp64", batch=8))
    d = dump(r, "frozen")
    r.tap.result(not d["patches"].any() and d["patches"].dtype == np.float64 and "cpe" not in d, "zero_pixels_are_zero_and_fp64_in_an_fp64_run",
                 "%s %s" % (d["patches"].dtype, sorted(d)))


def mock_batch(r, d):
    ids, labels, mask, tiles = d["input_ids"], d["labels"], d["loss_mask"], d["tiles_per_sample"]
    r.tap.result(ids.shape == labels.shape == mask.shape == (8, 64) and ids.dtype == labels.dtype == np.int64 and mask.dtype == np.float32 and
                 tiles.shape == (8,) and tiles.dtype == np.int64 and d["imgs_sizes"].dtype == np.int32 and d["patches"].dtype == np.float32 and
                 d["cpe"].dtype == np.float64, "mock_batch_shapes_and_types", {k: (v.shape, v.dtype) for k, v in d.items()})
    bare = tiles == 0
    r.tap.result(sorted(set(tiles)) == [0, 2] and 2 <= bare.sum() <= 3, "mock_batch_every_third_is_text_only", tiles)
    r.tap.result(np.all(ids[~bare, :28] == 499) and np.all(ids[~bare, 28:] != 499) and np.all(ids[bare] != 499) and
                 np.all((ids >= 1) & (ids < 500)), "mock_batch_starts_with_its_image_tokens")
    want = np.full_like(ids, -100)
    want[:, :-1] = np.where(ids[:, 1:] == 499, -100, ids[:, 1:])
    r.tap.result(np.array_equal(labels, want), "mock_batch_labels_are_the_next_tokens")
    r.tap.result(np.array_equal(mask, (labels != -100).astype(np.float32)) and np.all(mask.sum(1) == np.where(bare, 63, 36)),
                 "mock_batch_mask_is_where_a_label_is")
    n = int((~bare).sum())
    r.tap.result(np.array_equal(d["imgs_sizes"], np.tile([[16, 56]], (2 * n, 1))) or np.array_equal(d["imgs_sizes"], np.tile([[8, 112]], (2 * n, 1))) or
                 (d["imgs_sizes"].shape == (2 * n, 2) and np.all(d["imgs_sizes"].prod(1) == 56 * 16)), "mock_batch_tile_sizes", d["imgs_sizes"][:2])
    r.tap.result(d["patches"].shape == (2 * n * 56, 48) and abs(d["patches"].mean()) < 0.02 and abs(d["patches"].std() - 1) < 0.02,
                 "mock_batch_pixels_are_normal_deviates", d["patches"].shape)
    r.tap.result(d["cpe"].shape == (2 * n, 4) and np.all((d["cpe"][:, :2] > 0) & (d["cpe"][:, :2] <= 1)), "mock_batch_crops", d["cpe"][:2])
    keys = [k.decode() if isinstance(k, bytes) else k for k in d["sample_key"]]
    r.tap.result(len(set(keys)) == 8, "mock_batch_keys_are_distinct", keys)


def real_batch(r, d, second):
    ids, labels, mask, tiles = d["input_ids"], d["labels"], d["loss_mask"], d["tiles_per_sample"]
    image = 257                                                      # write_tokenizer: </s> 256, <image> 257
    keys = [k.decode() if isinstance(k, bytes) else k for k in d["sample_key"]]
    text = re.compile(r"sample (\d+) of a test")
    letters = dict(enumerate(byte_letters()))
    words = ["".join(letters.get(int(t), "") for t in row if t < 256).replace("\u0120", " ") for row in ids]
    number = [int(m.group(1)) if (m := text.search(w)) else -1 for w in words]
    r.tap.result(-1 not in number and all("%04d" % n in k for n, k in zip(number, keys)), "real_batch_texts_are_those_of_their_keys",
                 list(zip(number, keys)))
    r.tap.result(all((t > 0) == (n % 4 > 0) for t, n in zip(tiles, number)), "real_batch_pictures_are_those_of_their_samples",
                 list(zip(tiles, number)))
    per = d["imgs_sizes"].prod(1) // 16
    r.tap.result(np.all(d["imgs_sizes"] % 8 == 0) and np.all((4 <= per) & (per <= 64)) and d["patches"].shape == (per.sum(), 48),
                 "real_batch_sizes_are_whole_and_within_the_limits", d["imgs_sizes"])
    slots = [int((row == image).sum()) for row in ids]
    emitted, at = [], 0
    for t in tiles:
        emitted.append(int(per[at:at + t].sum()) // 4)
        at += t
    r.tap.result(slots == emitted, "real_batch_image_tokens_are_what_the_pictures_emit", "%s %s" % (slots, emitted))
    length = [int(np.argmax(row == 256)) + 1 for row in ids]
    want = np.full_like(ids, -100)
    for row, n in enumerate(length):
        for j in range(n - 1):
            if ids[row, j] != image and ids[row, j + 1] != image:
                want[row, j] = ids[row, j + 1]
    ours, theirs = np.where(mask > 0, labels, -100), want
    r.tap.result(np.array_equal(ours, theirs) and all(not ids[i, n:].any() for i, n in enumerate(length)),
                 "real_batch_labels_mask_and_padding", "%s" % np.argwhere(ours != theirs)[:8])
    more = [k.decode() if isinstance(k, bytes) else k for k in second["sample_key"]]
    r.tap.result(len(set(keys) | set(more)) == 16, "real_batches_read_each_sample_once", sorted(keys + more))


def stages(r):
    parts = ("model/language", "model/vision", "model/projector")
    for name, more, moving in (("stage_1", ("stage.training_stage=1",), ("model/projector",)),
                               ("stage_2", ("stage.training_stage=2",), ("model/language", "model/projector")),
                               ("stage_3", ("stage.training_stage=3",), parts),
                               ("frozen_projector", ("stage.freeze_projection=T",), ("model/language",)),
                               ("frozen_language", ("stage.training_stage=3", "stage.freeze_lm=T"), ("model/vision", "model/projector"))):
        for ranks in (0, 2):
            tag = "%s_on_%d_ranks" % (name, max(ranks, 1))
            if not r.ok(tag, r.go(tag, *more, "checkpoint.save_initial=T", ranks=ranks, iterations=2, batch=2, save=True)):
                continue
            for p in parts:
                all_of = [k for k in everything(checkpoint(r.at(tag), 0)) if k.startswith(p)]
                moved = changed(r.at(tag), 0, 2, p)
                if p in moving:
                    still = [k for k in set(all_of) - set(moved) if "expert_bias" not in k]
                    r.tap.result(not still and all_of, "%s_trains_all_of_%s" % (tag, p[6:]), "unchanged: %s" % still)
                else:
                    r.tap.result(not moved and all_of, "%s_leaves_%s_alone" % (tag, p[6:]), "changed: %s" % moved)
    r.go("second_stage", iterations=2, save=True)
    got = r.go("second_stage", "stage.training_stage=1", iterations=4, save=True)
    r.ok("another_stage_goes_not_on", got, 5, "was written with stage.freeze_lm = .false., this run has .true.", "checkpoint.finetune")
    r.tap.result(got[2].count("error:") == 1, "and_is_told_in_one_line", got[2])


def layouts(r):
    for ranks in (1, 2):
        got = r.go("alone%d" % ranks, "topology.layout=language_only", "run.precision=fp64", ranks=ranks)
        r.ok("language_only_on_%d_ranks" % ranks, got)
    a, b = everything(r.at("alone1", "trace.h5")), everything(r.at("alone2", "trace.h5"))
    r.tap.result(np.all(np.abs(a["lm_loss"] / b["lm_loss"] - 1) < 1e-9) and not a["images"].any() and np.all(a["num_tokens"] == 4 * 63),
                 "language_only_trains_on_text", a["num_tokens"])
    r.ok("language_only_with_pictures_is_a_data_error", r.go("alone3", *r.real(), "topology.layout=language_only"), 4, "error:")
    got = r.go("eight", *grids(4, 4), ranks=8, iterations=2, batch=24, limit=200)
    if r.ok("eight_ranks", got):
        peak = everything(r.at("eight", "trace.h5"))["ranks/peak_bytes"][-1]
        r.tap.result(np.all((1e6 < peak) & (peak < 200e6)), "peak_memory_per_rank_is_below_200_MB", peak / 1e6)
    got = r.m.run("run.output_dir=" + r.at("bystdin"), "run.train_iters=1", stdin=read(DECK), ranks=2)
    r.ok("the_deck_on_stdin_of_mpiexec", got)


def samples(r):
    """Shards that are not as they should be, and the two commands that look at data."""
    more = (*r.real(), "log.dump_batches=3", "batch.micro_batch_size=2")
    write_shards(r.at("data", "torn"), 21, seed=3, broken=(5, 6))
    torn = [x.replace(r.at("data", "train"), r.at("data", "torn")) for x in more]
    for name, ranks, layout in (("one", 0, ()), ("two_plus_two", 4, grids(2, 2)), ("two_plus_one", 3, grids(2, 1))):
        got = r.go("torn_" + name, *torn, *layout, ranks=ranks, batch=8)
        r.ok("a_broken_sample_on_%s_is_named_counted_and_skipped" % name, got, 0, "0005", "0006", "broken samples skipped since this start: 2 of the training data")
        if name != "one":
            r.equal("a_broken_sample_on_%s_leaves_the_same_batches" % name, same_batches(r, "torn_one", "torn_" + name, 3))
    resume_case(r, "torn_data", 4, *[x for x in torn if x[:5] not in ("batch", "log.d")], *grids(2, 2))
    write_shards(r.at("data", "ruined"), 150, seed=3, broken=range(150), text_every=1000)
    ruined = [x.replace(r.at("data", "train"), r.at("data", "ruined")) for x in more]
    for ranks in (0, 2):
        r.ok("a_hundred_broken_samples_in_a_row_end_with_4_on_%d_ranks" % max(ranks, 1),
             r.go("ruined%d" % ranks, *ruined, ranks=ranks, iterations=40, batch=8), 4, "error:", "100")
    for title, change in (("a_missing_shard_directory", "data.train_data_path=" + r.at("data", "absent")),
                          ("an_empty_shard_directory", "data.train_data_path=" + r.at("empty_shards")),
                          ("a_missing_tokenizer", "data.tokenizer=" + r.at("data", "absent.json")),
                          ("a_tar_as_tokenizer", "data.tokenizer=" + r.at("data", "train", "000000.tar")),
                          ("a_tokenizer_as_shard", "data.train_data_path=" + r.at("data", "tokenizer.json")),
                          ("a_compressed_shard", "data.train_data_path=" + r.at("packed.tar.gz"))):
        os.makedirs(r.at("empty_shards"), exist_ok=True)
        if not os.path.exists(r.at("packed.tar.gz")):
            with open(r.at("data", "train", "000000.tar"), "rb") as f, gzip.open(r.at("packed.tar.gz"), "wb") as g:
                g.write(f.read())
        key = change.split("=")[0]
        given = [x for x in more if x.split("=")[0] != key] + [change]
        got = r.go("nodata", *given, ranks=2, batch=8)
        r.ok(title + "_ends_with_4", got, 4, "error:", change.split("=")[1])
    deck = [x for x in more if not x.startswith("log.")]
    got = r.m.run("--check-data", DECK, *deck)
    r.ok("check_data", got, 0)
    counts = [int(x) for x in re.findall(r"\b\d+\b", got[1])]
    r.tap.result(21 in counts and 9 in counts, "check_data_counts_both_splits", got[1])
    got = r.m.run("--check-data", DECK, *[x.replace(r.at("data", "train"), r.at("data", "torn")) for x in deck])
    r.tap.result(got[0] == 0 and "0005" in got[1] + got[2] and "0006" in got[1] + got[2], "check_data_names_the_broken_samples", got[1] + got[2])
    os.makedirs(r.at("shown"))
    got = r.m.run("--show-sample", "1", DECK, *deck, cwd=r.at("shown"))
    pictures = [os.path.join(d, f) for d, _, names in os.walk(r.at("shown")) for f in names if f.endswith(".png")]
    r.ok("show_sample", got, 0, "image")
    r.tap.result(len(pictures) == 1, "show_sample_writes_the_picture", pictures)


# ---- writing fails -----------------------------------------------------------------------------------------------------------

def writing(r):
    for title, directory in (("proc", "/proc/mimo_run"), ("file", DECK)):
        got = r.go("none", "run.output_dir=" + directory)
        r.ok("F42_output_dir_in_%s" % title, got, 6, "run.output_dir")
        r.tap.result(len([x for x in got[2].splitlines() if "error:" in x]) == 1, "F42_output_dir_in_%s_is_one_line" % title, got[2])
    probe = subprocess.run(["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=4m tmpfs /mnt"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cases = (("F42_read_only_directory", "ro,size=4m", ()), ("F06_full_at_the_start", "size=8k", ()),
             ("F06_full_at_the_save", "size=600k", ("checkpoint.save=%s/ckpt",)))
    for name, how, more in cases:
        if probe.returncode != 0:
            r.tap.skip(name, "this machine does not let us mount a tmpfs in a namespace of its own")
            continue
        disk = r.at(name)
        os.mkdir(disk)
        for ranks in (0, 2):
            command, env = r.m.command([*r.arguments("x", ["run.output_dir=" + disk]), *(m % disk for m in more)], ranks, None)
            script = "mount -t tmpfs -o %s tmpfs %s && exec \"$@\"" % (how, disk)
            try:
                p = subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, timeout=60, env=env, cwd=ROOT)
                got = p.returncode, p.stdout, p.stderr
            except subprocess.TimeoutExpired:
                got = "hang", "", ""
            r.ok("%s_on_%d_ranks_ends_with_6" % (name, max(ranks, 1)), got, 6)
            r.tap.result(len([x for x in got[2].splitlines() if "error:" in x]) == 1, "%s_on_%d_ranks_is_one_line" % (name, max(ranks, 1)), got[2])
    p = r.begin("vanish", *grids(1, 1), "checkpoint.save_interval=40", ranks=2, iterations=400, batch=2, save=True)
    wait_for(lambda: p.text().count("lm loss:") >= 2 or p.poll() is not None)
    shutil.rmtree(r.at("vanish"))
    code, seconds = finish(p)
    r.tap.result(code == 6, "F42_a_run_directory_deleted_during_the_run_ends_with_6", "%s after %.1f s\n%s" % (code, seconds, p.text()[-800:]))
    os.mkdir(r.at("links"))
    victim = r.at("victim")
    with open(victim, "w") as f:
        f.write("precious")
    for name in ("trace.h5", "run.log", "deck.nml", "progress.txt", "batches.h5", "EXIT", "EXIT.tmp", "deck.nml.tmp", "LOCK"):
        shutil.rmtree(r.at("links"), ignore_errors=True)
        os.mkdir(r.at("links"))
        os.symlink(victim, r.at("links", name))
        got = r.go("links", "log.dump_batches=1", iterations=1)
        r.tap.result(read(victim) == "precious", "F43_a_link_as_%s_is_not_written_through" % name, "%s\n%s" % (got[0], read(victim)[:200]))
        with open(victim, "w") as f:
            f.write("precious")


def main():
    r = Runs()
    for group in (files, kept, resume, resharding, loading, stopping, signals, locks, numerics, participation, validation, batches, samples, stages, layouts, writing):
        if r.m.arg.k and r.m.arg.k not in group.__name__:
            continue
        start = time.monotonic()
        try:
            group(r)
        except (KeyError, OSError, IndexError, ValueError) as e:
            r.tap.result(False, group.__name__ + "_can_be_examined", "%s: %s" % (type(e).__name__, e))
        print("# %s: %.1f s" % (group.__name__, time.monotonic() - start), flush=True)
    r.m.close()
    r.tap.close()


if __name__ == "__main__":
    main()
