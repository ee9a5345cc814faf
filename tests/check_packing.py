#!/usr/bin/env python3
"""Several samples in one sequence (data.packing_buffer_size): they train like separate ones, the rows hold the samples of the unpacked
stream window by window, every layout sees the same rows, and a run goes on in the middle of a window.
"""
import os
from collections import Counter

import h5py
import numpy as np

from harness import ROOT, Mimo, Tap, compare, differing, everything, trace, write_shards, write_tokenizer

DECK = os.path.join(ROOT, "input", "mock_tiny.nml")
BUFFER, STREAMS = 6, 4


class Packing:
    def __init__(self):
        self.tap, self.m = Tap(), Mimo()
        write_shards(self.m.path("train"), 61, seed=3, pictures=2)
        write_tokenizer(self.m.path("tokenizer.json"))

    def at(self, *names):
        return self.m.path(*names)

    def go(self, name, *more, ranks=0, batch=STREAMS, iterations=4, length=160, stop=None):
        stop = ("run.exit_interval=%d" % stop,) if stop else ()
        return self.m.run(DECK, "run.output_dir=" + self.at(name), "run.precision=fp64", "run.train_iters=%d" % iterations,
                          "batch.global_batch_size=%d" % batch, "data.dataset_provider=webdataset", "data.train_data_path=" + self.at("train"),
                          "data.tokenizer=" + self.at("tokenizer.json"), "language.seq_length=%d" % length,
                          "vision.dynamic_resolution_max_patches=64", "log.log_interval=100", *stop, *more, ranks=ranks)

    def ok(self, name, got, code=0, *needles):
        text = "".join(map(str, got[1:]))
        return self.tap.result(got[0] == code and all(n in text for n in needles), name, "status %s\n%s" % (got[0], text[-2000:]))

    def saved(self, name, iteration):
        return everything(self.at(name, "ckpt", "iter_%07d" % iteration, "checkpoint.h5"))


def batches(p, name, iterations):
    with h5py.File(p.at(name, "batches.h5"), "r", locking=False) as f:
        return [{k: f["iteration_%06d" % (i + 1)][k][()] for k in ("input_ids", "labels", "loss_mask", "tiles_per_sample", "sample_key",
                                                                   *(("segment_ends",) if "segment_ends" in f["iteration_%06d" % (i + 1)] else ()))}
                for i in range(iterations)]


def like_separate_ones(p):
    """Four samples of each of four streams in one row each, or the same sixteen in rows of their own: one loss, one gradient. No layer may
    see more than its own sample; padding has no loss, and what it does to the balance of experts is switched off."""
    more = ("moe.moe_router_load_balancing_type=none", "log.dump_batches=1")
    if not (p.ok("packed", p.go("packed", *more, "data.packing_buffer_size=4", length=256, iterations=1)) and
            p.ok("separate", p.go("separate", *more, batch=16, length=256, iterations=1))):
        return
    rows = batches(p, "packed", 1)[0]
    p.tap.result(all(len(e[e >= 0]) == 5 for e in rows["segment_ends"]), "four_samples_and_padding_share_a_row", rows["segment_ends"][:, :7])
    a, b = trace(p.at("packed")), trace(p.at("separate"))
    p.tap.result(a["num_tokens"][0] == b["num_tokens"][0] > 0 and not any(
        abs(a[k][0] / b[k][0] - 1) > 1e-12 for k in ("lm_loss", "grad_norm")), "m6_10_p12_102_m6_40_packed_samples_train_like_separate_ones",
        [(k, a[k][0], b[k][0]) for k in ("num_tokens", "lm_loss", "grad_norm")])


def rows_of_the_stream(p):
    """Of each stream: the packs of its first window hold its first samples, each once; inside a row nothing predicts across an end."""
    if not (p.ok("rows", p.go("rows", "log.dump_batches=%d" % BUFFER, "data.packing_buffer_size=%d" % BUFFER, iterations=BUFFER)) and
            p.ok("plain", p.go("plain", "log.dump_batches=%d" % BUFFER, iterations=BUFFER))):
        return
    packed, plain = batches(p, "rows", BUFFER), batches(p, "plain", BUFFER)
    faults, several = [], 0
    ends = [[e[e >= 0] for e in b["segment_ends"]] for b in packed]
    real = np.array([sum(e[-2] if np.all(b["labels"][s][e[-2] if len(e) > 1 else 0:] == -100) else e[-1] for s, e in enumerate(row))
                     for row, b in zip(ends, packed)])
    t = everything(p.at("rows", "trace.h5"))
    p.tap.result(np.array_equal(np.rint(t["tokens_per_second"] * t["iteration_seconds"]), real), "throughput_counts_no_padding", real)
    with open(p.at("rows", "run.log")) as f:
        p.tap.result("packing: %.1f %% of the positions held tokens" % (100 * real.sum() / (160 * STREAMS * BUFFER)) in f.read(),
                     "the_log_tells_how_full_the_rows_were", real)
    for s in range(STREAMS):
        want = Counter()
        for b in plain:
            n = np.max(np.nonzero(b["labels"][s] >= 0)) + 2      # the last token of a sample is a label and has none
            want[tuple(b["input_ids"][s][:n])] += 1
        have, i = Counter(), 0
        while sum(have.values()) < BUFFER:
            b, begin = packed[i], 0
            ends = b["segment_ends"][s][b["segment_ends"][s] >= 0]
            if list(ends) != sorted(set(ends)) or ends[-1] != 160:
                faults.append("stream %d, row %d: ends %s" % (s, i, ends))
            padding = bool(np.all(b["labels"][s][ends[-2] if len(ends) > 1 else 0:] == -100))
            members = ends[:-1] if padding else ends
            for end in members:
                ids, labels = b["input_ids"][s][begin:end], b["labels"][s][begin:end]
                if labels[-1] != -100 or np.any((labels[:-1] != -100) & (labels[:-1] != ids[1:])):
                    faults.append("stream %d, row %d: labels before %d" % (s, i, end))
                have[tuple(ids)] += 1
                begin = end
            several += len(members) > 1
            faults += [] if np.array_equal(b["loss_mask"][s] != 0, b["labels"][s] >= 0) else ["stream %d, row %d: mask" % (s, i)]
            i += 1
        if have != want:
            faults.append("stream %d: %d of %d samples are those of the stream" % (s, sum((have & want).values()), BUFFER))
    p.tap.result(not faults, "a_window_holds_the_next_samples_of_its_stream_each_once", "\n".join(faults))
    p.tap.result(several > STREAMS, "rows_are_shared", several)


def layouts_and_restarts(p):
    more = ("data.packing_buffer_size=%d" % BUFFER, "stage.training_stage=3", "checkpoint.no_save_optim=F")

    def save(name):
        return "checkpoint.save=" + p.at(name, "ckpt")
    if not p.ok("one_rank", p.go("one", *more, save("one"))):
        return
    for name, ranks, layout in (
            ("fan_in", 3, ("topology.layout=disjoint", "topology.encoder_dp=2", "topology.llm_dp=1", "batch.micro_batch_size=1")),
            ("fan_out", 3, ("topology.layout=disjoint", "topology.encoder_dp=1", "topology.llm_dp=2")),
            ("tp_ep", 4, ("topology.layout=colocated", "topology.encoder_tp=2", "topology.encoder_dp=2", "topology.llm_tp=2", "topology.llm_dp=2",
                          "topology.llm_ep=4", "optimizer.overlap_grad_reduce=T", "language.recompute_granularity=full"))):
        got = p.go(name, *more, *layout, ranks=ranks)
        if name == "fan_in":                        # one sample of one lane cannot be halved
            p.ok("packed_fan_in_needs_a_sample_for_each_encoder_rank", got, 2, "encoder_dp")
            continue
        if p.ok("packed_" + name, got):
            fault = compare(trace(p.at(name)), trace(p.at("one")), 1e-9)
            p.tap.result(not fault, "packed_%s_gives_one_rank's_trace" % name, fault)
    p.ok("stopped_in_a_window", p.go("parts", *more, save("parts"), stop=2), 75)
    p.ok("another_buffer_is_refused", p.go("parts", *more[1:], "data.packing_buffer_size=5", save("parts")), 5, "packing_buffer_size = 6, this run has 5")
    p.ok("gone_on", p.go("parts", *more, save("parts")), 0, "restart from")
    same = differing(p.saved("one", 4), p.saved("parts", 4), lambda k: k.startswith(("deck", "code")))
    p.tap.result(not same, "p12_91_resume_in_the_middle_of_a_window_is_bitwise_the_unbroken_run", same)


def refusals(p):
    for name, more, needle in (("mock", ("data.dataset_provider=mock",), "only with dataset_provider = 'webdataset'"),
                               ("two_rows", ("batch.micro_batch_size=2",), "needs batch.micro_batch_size = 1, this is 2")):
        p.ok("packing_refuses_" + name, p.m.run("--check", DECK, "data.dataset_provider=webdataset", "data.train_data_path=x", "data.tokenizer=y",
                                                "data.packing_buffer_size=4", *more) if name != "mock" else
             p.m.run("--check", DECK, "data.packing_buffer_size=4"), 2, needle)


def main():
    p = Packing()
    for group in (like_separate_ones, rows_of_the_stream, layouts_and_restarts, refusals):
        group(p)
    p.m.close()
    p.tap.close()


if __name__ == "__main__":
    main()
