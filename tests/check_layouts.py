#!/usr/bin/env python3
"""One trace on every layout: the same deck on data-parallel grids of every shape that the rules accept, and on encoder grids cut by
tensor parallelism.

fp64 agrees to 1e-9 without exception, fp32 to 2e-5 up to the first flip of a discrete choice; the iteration-0 model is bitwise
the same everywhere; the same layout twice gives the same bits.
"""
import hashlib
import os
import subprocess
import sys

import h5py
import numpy as np

from harness import ROOT, Mimo, Tap, compare, first_flip, flipped_token, trace

GLOBAL_BATCH, ITERATIONS = 24, 20
TOLERANCE = {"fp64": 1e-9, "fp32": 2e-5}


def splits(size):
    """(encoder dp, language dp, micro-batch) of `size` ranks that divide as the rules demand."""
    for enc in range(1, size):
        llm = size - enc
        for mbs in (1, 2, 3, 4, 6):
            divides = GLOBAL_BATCH % (mbs * llm) == 0 and (mbs * llm) % enc == 0
            if divides and (enc % llm == 0 or llm % enc == 0):
                yield enc, llm, mbs


# ranks, micro-batch, (encoder tp, dp), language dp: the language model on ranks of its own, and on the encoder's ranks.
TENSOR_PARALLEL = {
    "disjoint": ((4, 2, (2, 1), 2), (6, 3, (2, 2), 2), (6, 2, (4, 1), 2), (5, 4, (2, 2), 1), (8, 2, (2, 2), 4)),
    "colocated": ((2, 2, (2, 1), 2), (4, 2, (2, 2), 4), (4, 3, (4, 1), 4), (8, 1, (4, 2), 8)),
}


def model_hash(directory):
    """SHA-256 over every dataset of /model of the iteration-0 checkpoint."""
    digest = hashlib.sha256()
    with h5py.File(os.path.join(directory, "ckpt", "iter_0000000", "checkpoint.h5"), "r") as f:
        def add(name, obj):
            if isinstance(obj, h5py.Dataset):
                digest.update(name.encode() + np.ascontiguousarray(obj[()]).tobytes())
        f["model"].visititems(add)
    return digest.hexdigest()


def show_flip(tap, name, ours, theirs, rerun):
    """Both runs once more up to the iteration of the first flip, batches dumped: the token that chose other experts is shown."""
    flip = first_flip(ours, theirs)
    if flip is None:
        return
    iteration = int(ours["iteration"][flip[0]])
    a, b = rerun(["log.dump_batches=%d" % iteration, "run.exit_interval=%d" % iteration])
    token = flipped_token(a, b, iteration)
    print("# first flip: iteration %d, E layer %d, %s" % (iteration, flip[1], token))
    tap.result(token is not None, name + " names the token of the first flip")


def launch(m, name, precision, ranks, mbs, *layout):
    out = m.path(name)
    code, stdout, stderr = m.run(
        "input/mock_tiny.nml", "run.output_dir=" + out, "run.precision=" + precision, "run.train_iters=%d" % ITERATIONS,
        "batch.global_batch_size=%d" % GLOBAL_BATCH, "batch.micro_batch_size=%d" % mbs, "stage.training_stage=3",
        "data.mock_text_only_every=5", "checkpoint.save=" + os.path.join(out, "ckpt"), "checkpoint.save_initial=T",
        "checkpoint.no_save_optim=T", "log.log_interval=20", *layout, ranks=ranks)
    return out, code, stdout + stderr


def check(tap, m, reference, name, precision, ranks, mbs, *layout):
    out, code, text = launch(m, name, precision, ranks, mbs, *layout)
    if code != 0:
        return tap.result(False, name, "status %s\n%s" % (code, text))
    tap.result(model_hash(out) == reference["hash"], name + " starts from the same bits")
    fault = compare(trace(out), reference["trace"], TOLERANCE[precision], until_flip=precision == "fp32")
    tap.result(not fault, name + " gives the reference's trace", fault)
    show_flip(tap, name, trace(out), reference["trace"], lambda more: (
        launch(m, name + "_flip", precision, ranks, mbs, *layout, *more)[0],
        launch(m, name + "_flip_one_rank", precision, 1, 1, *more)[0]))


def real_data(tap, m):
    """input/stage2.nml on its own kind of shards, on every number of ranks that the deck promises."""
    data = m.path("data")
    made = subprocess.run([sys.executable, os.path.join(ROOT, "tools", "make_shards.py"), "--out", data], capture_output=True, text=True)
    if not tap.result(made.returncode == 0, "make_shards makes the demo's data", made.stderr):
        return
    for precision in ("fp64", "fp32"):
        reference = None

        def stage2(name, ranks, *more):
            return m.run(
                "input/stage2.nml", "run.output_dir=" + m.path(name), "run.precision=" + precision,
                "data.train_data_path=" + os.path.join(data, "train"), "data.valid_data_path=" + os.path.join(data, "valid"),
                "data.tokenizer=" + os.path.join(data, "tokenizer.json"), "eval.eval_iters=0", "eval.eval_interval=0", *more,
                ranks=ranks)

        def again(name, ranks, more):
            stage2(name, ranks, *more)
            return m.path(name)

        for ranks in (1, 2, 4, 6, 8):
            name = "stage2_%s_%d_ranks" % (precision, ranks)
            code, stdout, stderr = stage2(name, ranks, "run.exit_interval=%d" % ITERATIONS)
            if not tap.result(code == 75, name + " runs", stdout[-1500:] + stderr):
                continue
            t = trace(m.path(name))
            reference = reference or t
            fault = compare(t, reference, TOLERANCE[precision], until_flip=precision == "fp32")
            tap.result(not fault, name + " gives one rank's trace", fault)
            show_flip(tap, name, t, reference, lambda more: (again(name + "_flip", ranks, more), again(name + "_flip_one", 1, more)))


def main():
    tap, m = Tap(), Mimo()
    real_data(tap, m)
    for precision in ("fp64", "fp32"):
        out, code, text = launch(m, precision + "_one_rank", precision, 1, 1)
        if not tap.result(code == 0, precision + " one rank runs", text):
            continue
        reference = {"trace": trace(out), "hash": model_hash(out)}
        tap.result(bool(np.all(np.isfinite(reference["trace"]["lm_loss"]))) and len(reference["trace"]["lm_loss"]) == ITERATIONS,
                   precision + " reference has every row, all finite")
        for enc, llm, mbs in splits(8):
            check(tap, m, reference, "%s_encoder%d_language%d_mbs%d" % (precision, enc, llm, mbs), precision, 8, mbs,
                  "topology.layout=disjoint", "topology.encoder_dp=%d" % enc, "topology.llm_dp=%d" % llm)
        for ranks, mbs in ((1, 4), (2, 3), (4, 2)):
            check(tap, m, reference, "p12_51_%s_colocated%d_mbs%d" % (precision, ranks, mbs), precision, ranks, mbs,
                  "topology.layout=colocated")
        for layout, grids in TENSOR_PARALLEL.items():
            for ranks, mbs, (tp, dp), llm in grids:
                check(tap, m, reference, "%s_%s_encoder_tp%d_dp%d_language%d_mbs%d" % (precision, layout, tp, dp, llm, mbs), precision, ranks,
                      mbs, "topology.layout=" + layout, "topology.encoder_tp=%d" % tp, "topology.encoder_dp=%d" % dp,
                      "topology.llm_dp=%d" % llm)
        for ranks in (2, 4, 6, 8):
            check(tap, m, reference, "%s_auto%d" % (precision, ranks), precision, ranks, 1)
    name = "fp32_encoder2_language6_mbs2"
    again, code, text = launch(m, "again", "fp32", 8, 2, "topology.layout=disjoint", "topology.encoder_dp=2", "topology.llm_dp=6")
    same = code == 0 and all(np.array_equal(v, trace(again)[k], equal_nan=True) for k, v in trace(m.path(name)).items())
    tap.result(same, "the same layout twice gives the same bits", text)
    m.close()
    tap.close()


if __name__ == "__main__":
    main()
