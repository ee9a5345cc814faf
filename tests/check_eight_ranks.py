#!/usr/bin/env python3
"""Eight ranks on real shards, every feature of a run at once: all layouts' kinds, overlaps, validation, saving, resuming.

Of these it is asked that each run ends well with finite numbers and without a word from a sanitizer: tests/run --asan gives it the
sanitizers' build. The decks for four and eight GPUs, in tiny widths on their own grids, give one rank's losses.
"""
import re

import numpy as np

from harness import Mimo, Tap, trace, write_shards, write_tokenizer

OVERLAP = ("optimizer.overlap_grad_reduce=T", "optimizer.overlap_param_gather=T", "optimizer.encoder_ddp_overlap=T", "optimizer.ddp_num_buckets=3",
           "moe.moe_shared_expert_overlap=T")
RICH = ("log.dump_batches=2", "log.dump_logits=T", "log.log_num_zeros_in_grad=T", "log.log_params_norm=T", "eval.eval_interval=2", "eval.eval_iters=1",
        "eval.eval_picture_ablation=rotate", "optimizer.correct_encoder_grad_for_partial_participation=T")


def grids(layout, encoder, language, ep):
    return ("topology.layout=" + layout, "topology.encoder_tp=%d" % encoder[0], "topology.encoder_dp=%d" % encoder[1], "topology.llm_tp=%d" % language[0],
            "topology.llm_dp=%d" % language[1], "topology.llm_ep=%d" % ep)


# name: (overrides, starts); a start stops after its share of the iterations and the next one resumes.
RUNS = {
    "auto_all_overlaps": ((*OVERLAP, *RICH), 2),
    "disjoint_tp2_ep4_stage3": ((*grids("disjoint", (2, 2), (2, 2), 4), "stage.training_stage=3"), 1),
    "fan_in_projector_mlp": ((*grids("disjoint", (1, 4), (2, 2), 2), "stage.training_stage=3", "projector.vision_projection_type=mlp",
                              "projector.projection_normalization=rmsnorm", "batch.micro_batch_size=2", *OVERLAP), 1),
    "colocated_tp1_to_tp2_ep8": ((*grids("colocated", (1, 8), (2, 4), 8), "stage.training_stage=3", "batch.micro_batch_size=2", *OVERLAP), 2),
}
ITERATIONS = 4

# Decks and their ranks.
GRIDS = {"mock_20l": 8, "l8": 8, "v2l2": 4, "l4": 4}
ONE = ["topology.%s=1" % k for k in ("llm_tp", "llm_dp", "llm_ep")]


def deck_in_tiny_widths(tap, m, deck, ranks):
    tiny = ("input/%s.nml" % deck, "run.backend=ref", "language.preset=tiny", "vision.preset=tiny", "run.train_iters=3")
    one = ONE if deck.startswith("l") else [*ONE, "topology.layout=colocated", "topology.encoder_tp=1", "topology.encoder_dp=1"]
    losses = []
    for n, overrides in ((ranks, []), (1, one)):
        name = "%s_on_%d" % (deck, n)
        code, out, err = m.run(*tiny, "run.output_dir=" + m.path(name), *overrides, ranks=n, limit=600)
        if not tap.result(code == 0 and not re.search(r"Sanitizer|runtime error", out + err), name, "status %s\n%s\n%s" % (code, out[-1500:], err[-3000:])):
            return
        losses.append(trace(m.path(name))["lm_loss"])
    tap.result(len(losses[0]) == 3 and np.all(np.abs(losses[0] - losses[1]) <= 2e-5 * np.abs(losses[1])), deck + "_gives_the_losses_of_one_rank", losses)


def main():
    tap, m = Tap(), Mimo()
    for name, seed in (("train", 3), ("valid", 4)):
        write_shards(m.path(name), 40, seed=seed, broken=(5,) if name == "train" else (), pictures=3)
    write_tokenizer(m.path("tokenizer.json"))
    data = ("data.train_data_path=" + m.path("train"), "data.valid_data_path=" + m.path("valid"), "data.tokenizer=" + m.path("tokenizer.json"),
            "language.seq_length=128", "vision.dynamic_resolution_max_patches=64", "lr.lr_warmup_iters=1")
    for name, (overrides, starts) in RUNS.items():
        for start in range(starts):
            given = {w.split("=")[0] for w in overrides}
            base = [w for w in ("eval.eval_iters=0", "eval.eval_interval=0") if w.split("=")[0] not in given]
            code, out, err = m.run("input/stage2.nml", "run.output_dir=" + m.path(name), "run.train_iters=%d" % ITERATIONS,
                                   "checkpoint.save=" + m.path(name, "ckpt"), *data, *base, *overrides,
                                   *(["run.exit_interval=%d" % (ITERATIONS // starts)] if start < starts - 1 else []), ranks=8, limit=900)
            fine = code == (0 if start == starts - 1 else 75) and not re.search(r"Sanitizer|runtime error", out + err)
            if not tap.result(fine, "%s_start_%d" % (name, start + 1), "status %s\n%s\n%s" % (code, out[-1500:], err[-3000:])):
                break
        else:
            t = trace(m.path(name))
            tap.result(list(t["iteration"]) == list(range(1, ITERATIONS + 1)) and np.all(np.isfinite(t["lm_loss"])) and np.all(np.isfinite(t["grad_norm"])),
                       name + "_has_every_row", t["lm_loss"])
    for deck, ranks in GRIDS.items():
        deck_in_tiny_widths(tap, m, deck, ranks)
    m.close()
    tap.close()


if __name__ == "__main__":
    main()
