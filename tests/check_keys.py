#!/usr/bin/env python3
"""Every key of `mimo --reference` is either refused by name or changes something that can be observed.

KEYS maps each key to a value, what must change against the same run without it, and the context that both runs share. A key
that the program knows and this table does not (or the reverse) fails. The echo of a value does not count as a change.
"""
import concurrent.futures
import os
import re
import signal
import subprocess

import h5py
import numpy as np

from check_run import descendants
from harness import ROOT, Mimo, Tap, everything, wait_for, write_shards, write_tokenizer

DECK = os.path.join(ROOT, "input", "mock_tiny.nml")
BASE = ("run.train_iters=3", "batch.global_batch_size=2")
TABLES = ("parameters", "layout", "memory", "schedule")


class Probe:
    def __init__(self, value, observe, *context, ranks=0, also=()):
        """`context` belongs to both runs, `also` only to the one with the key."""
        self.value, self.observe, self.context, self.ranks, self.also = value, observe, context, ranks, also


class Outcome:
    """What one call left behind."""

    def __init__(self, k, arguments, ranks, check):
        self.directory = k.directory()
        arguments = [a.replace("%OUT%", self.directory) for a in arguments]
        given = [a.split("=")[0] for a in arguments]
        base = [b for b in BASE if b.split("=")[0] not in given]
        if check:
            extra = ("--ranks", str(ranks)) if ranks else ()
            self.status, self.stdout, self.stderr = k.m.run("--check", DECK, *extra, *base, *arguments, limit=120)
            return
        out = [] if "run.output_dir" in given else ["run.output_dir=" + self.directory]
        self.status, self.stdout, self.stderr = k.m.run(DECK, *base, *out, *arguments, ranks=ranks, limit=120)
        trace = os.path.join(self.directory, "trace.h5")
        self.trace = everything(trace) if os.path.exists(trace) else {}
        self.rows, validations = int(self.trace.get("rows", -1)), int(self.trace.get("eval/rows", -1))
        for name, v in self.trace.items():
            if v.ndim and name != "ranks/arena_bytes":
                self.trace[name] = v[:validations if name.startswith("eval/") else self.rows]

    def table(self, name):
        """The lines of a table of --check, without the echo."""
        lines = self.stdout.split("\nparameters\n", 1)
        text = "parameters\n" + (lines[1] if len(lines) == 2 else "")
        at = [i for i in (text.find("\n" + t) for t in TABLES) if i >= 0]
        start = 0 if name == "parameters" else text.find("\n" + name)
        end = min([i for i in at if i > start], default=len(text))
        return text[start:end] if start >= 0 else ""

    def has(self, name):
        return os.path.exists(os.path.join(self.directory, name))


# ---- what can be observed: each gives a function (outcome without, outcome with) -> "" or what is wrong ----------------------

def refused(value, *context, ranks=0):
    """Exit 2 with one sentence that names the key and says that it is not built."""
    def look(key, base, now):
        said = [x for x in now.stderr.splitlines() if ": error: " + key in x and "not built" in x]
        return "" if now.status == 2 and said else "status %s:\n%s" % (now.status, now.stderr)
    return Probe(value, ("check", look), *context, ranks=ranks)


def ends(code, word=""):
    def look(key, base, now):
        good = now.status == code and base.status != code and word in now.stderr + now.stdout
        return "" if good else "status %s, without the key %s:\n%s" % (now.status, base.status, now.stderr)
    return "run", look


def table(*names):
    def look(key, base, now):
        if base.status != 0 or now.status != 0:
            return "status %s, without the key %s:\n%s" % (now.status, base.status, now.stderr)
        return "".join("table '%s' is the same\n" % n for n in names if base.table(n) == now.table(n) or not now.table(n))
    return "check", look


def changes(*names):
    def look(key, base, now):
        if base.status != 0 or now.status != 0:
            return "status %s, without the key %s:\n%s" % (now.status, base.status, now.stderr or base.stderr)
        same = [n for n in names if np.array_equal(base.trace[n], now.trace[n], equal_nan=now.trace[n].dtype.kind == "f")]
        return "unchanged: " + ", ".join(same) if same else ""
    return "run", look


def holds(condition, what):
    """A condition on both outcomes."""
    def look(key, base, now):
        try:
            good = condition(base, now)
        except (KeyError, OSError, IndexError, ValueError) as e:
            good, now.stderr = False, "%s\n%s" % (e, now.stderr)
        return "" if good else "%s does not hold; status %s:\n%s" % (what, now.status, now.stderr)
    return "run", look


def logs(pattern):
    return holds(lambda base, now: now.status == 0 and re.search(pattern, now.stdout, re.M) and not re.search(pattern, base.stdout, re.M),
                 "only the run with the key logs /%s/" % pattern)


def makes(name):
    return holds(lambda base, now: now.status == 0 and now.has(name) and not base.has(name), "only the run with the key makes " + name)


def checkpoint(o, iteration):
    return everything(os.path.join(o.directory, "ckpt", "iter_%07d" % iteration, "checkpoint.h5"))


SAVE = "checkpoint.save=%OUT%/ckpt"
REAL = ("data.dataset_provider=webdataset", "data.train_data_path=%DATA%/train", "data.tokenizer=%DATA%/tokenizer.json",
        "language.seq_length=128", "vision.dynamic_resolution_max_patches=64", "log.dump_batches=3")
FIXED = ("vision.dynamic_resolution=F", "vision.pixel_shuffle=F", "data.num_image_tiles=1", "data.image_seq_length=0",
         "vision.img_h=16", "vision.img_w=16")
LINEAR = ("lr.lr_decay_style=linear",)
WSD = ("lr.lr_decay_style=WSD",)
WD = ("lr.weight_decay_incr_style=linear", "lr.end_weight_decay=0.5")
LOAD = ("checkpoint.load=%CKPT%", "run.train_iters=6")
ONE_EACH = ("topology.layout=disjoint", "topology.encoder_dp=1", "topology.llm_dp=1")
TWO_EACH = ("topology.layout=disjoint", "topology.encoder_dp=2", "topology.llm_dp=2")
EVAL = ("eval.eval_iters=1",)


def dumped(name):
    """A dataset of the first dumped batches changes."""
    def batches(o):
        with h5py.File(os.path.join(o.directory, "batches.h5"), "r") as f:
            return [f[g][name][()].tobytes() for g in f if g.startswith("iteration_")]
    return holds(lambda base, now: now.status == base.status == 0 and batches(base) != batches(now), name + " of the batches changes")


def has_logits(o):
    """Dumped batches that hold logits of every word."""
    with h5py.File(os.path.join(o.directory, "batches.h5"), "r") as f:
        return sum("logits" in f[g] and f[g]["logits"].shape[1] == 512 and np.all(f[g]["logits"][()] != 0) for g in f if g.startswith("iteration_"))


KEYS = {
    "run.title": Probe("a title", logs(r"^title: a title$")),
    "run.mode": Probe("eval", holds(lambda b, n: n.status == 0 and n.rows == 0 and n.trace["eval/rows"] == 1, "one validation, no row"), *EVAL),
    "run.backend": Probe("cuda", ends(3, "run.backend")),
    "run.precision": Probe("fp64", changes("lm_loss", "ranks/arena_bytes")),
    "run.ranks_per_gpu": Probe("2", table("memory"), "run.backend=cuda", "batch.global_batch_size=4", ranks=4),
    "run.deterministic": Probe("F", table("memory"), "run.backend=cuda"),
    "run.seed": Probe("7", changes("lm_loss")),
    "run.output_dir": Probe("%OUT%/elsewhere", makes("elsewhere/trace.h5")),
    "run.train_iters": Probe("2", holds(lambda b, n: (b.rows, n.rows) == (3, 2), "2 rows, not 3")),
    "run.train_samples": Probe("9", holds(lambda b, n: b.status == 2 and n.rows == 4, "4 rows"), "run.train_iters=0"),
    "run.exit_interval": Probe("2", ends(75, "exit_interval")),
    "run.exit_duration_in_mins": Probe("0.001", ends(75, "exit_duration_in_mins"), "run.train_iters=40"),
    "run.exit_signal": "exit_signal",
    "run.distributed_timeout_minutes": "distributed_timeout",
    "topology.layout": Probe("colocated", table("layout", "memory"), ranks=2),
    "topology.encoder_tp": Probe("2", table("layout", "memory"), "topology.layout=disjoint", "topology.llm_dp=2", ranks=4),
    "topology.encoder_pp": refused("2", *ONE_EACH, ranks=3),
    "topology.encoder_dp": Probe("1", table("layout"), "topology.layout=disjoint", "batch.global_batch_size=6", ranks=4),
    "topology.llm_offset": Probe("0", ends(2, "topology.llm_offset"), "topology.layout=disjoint", "topology.encoder_dp=1", ranks=2),
    "topology.llm_tp": Probe("2", table("layout", "memory"), "topology.layout=disjoint", "topology.encoder_dp=1", ranks=3),
    "topology.llm_cp": refused("2", "topology.layout=language_only", "topology.llm_dp=1", ranks=2),
    "topology.llm_pp": refused("2", *ONE_EACH, ranks=3),
    "topology.llm_dp": Probe("1", table("layout"), "topology.layout=disjoint", "batch.micro_batch_size=3", "batch.global_batch_size=6",
                             ranks=4),
    "topology.llm_ep": Probe("2", table("layout", "memory"), *TWO_EACH, ranks=4),
    "topology.llm_expt_tp": Probe("2", table("layout", "memory"), *TWO_EACH, ranks=4),
    "language.preset": Probe("nemotron_54l", table("parameters")),
    "language.hybrid_layer_pattern": Probe("M*E", table("parameters")),
    "language.hidden_size": Probe("128", table("parameters")),
    "language.num_attention_heads": Probe("8", table("parameters")),
    "language.num_query_groups": Probe("4", table("parameters")),
    "language.kv_channels": Probe("8", table("parameters")),
    "language.ffn_hidden_size": Probe("64", table("parameters")),
    "language.vocab_size": Probe("300", table("parameters")),
    "language.make_vocab_size_divisible_by": Probe("100", table("parameters")),
    "language.seq_length": Probe("48", changes("num_tokens", "lm_loss")),
    "language.init_method_std": Probe("0.1", changes("lm_loss")),
    "language.layernorm_epsilon": Probe("0.1", changes("lm_loss")),
    "language.recompute_granularity": Probe("full", table("memory")),
    "language.recompute_modules": Probe("mlp", table("memory"), "language.recompute_granularity=selective"),
    "moe.num_experts": Probe("4", table("parameters")),
    "moe.moe_router_topk": Probe("3", changes("moe/tokens_per_expert", "lm_loss")),
    "moe.moe_ffn_hidden_size": Probe("16", table("parameters")),
    "moe.moe_shared_expert_intermediate_size": Probe("32", table("parameters")),
    "moe.moe_router_topk_scaling_factor": Probe("1.0", changes("lm_loss")),
    "moe.moe_router_load_balancing_type": Probe("none", changes("grad_norm"), "moe.moe_aux_loss_coeff=1"),
    "moe.moe_aux_loss_coeff": Probe("1", changes("grad_norm")),
    "moe.moe_router_enable_expert_bias": Probe("F", changes("lm_loss", "moe/tokens_per_expert"), "moe.moe_router_bias_update_rate=1"),
    "moe.moe_router_bias_update_rate": Probe("1", changes("lm_loss", "moe/tokens_per_expert")),
    "moe.moe_router_force_load_balancing": Probe("T", changes("lm_loss", "moe/tokens_per_expert")),
    "moe.moe_shared_expert_overlap": Probe("T", table("schedule")),
    "mamba.mamba_num_heads": Probe("4", table("parameters")),
    "mamba.mamba_head_dim": Probe("4", table("parameters")),
    "mamba.mamba_num_groups": Probe("4", table("parameters")),
    "mamba.mamba_state_dim": Probe("8", table("parameters")),
    "mamba.linear_conv_kernel_dim": Probe("3", table("parameters")),
    "mamba.mamba_chunk_size": Probe("64", table("memory")),
    "mamba.mamba_fp32_params": refused("T"),
    "vision.preset": Probe("radio_vit_h", table("parameters")),
    "vision.num_layers": Probe("1", table("parameters")),
    "vision.hidden_size": Probe("16", table("parameters")),
    "vision.num_attention_heads": Probe("2", changes("lm_loss")),
    "vision.ffn_hidden_size": Probe("32", table("parameters")),
    "vision.patch_dim": Probe("2", table("parameters")),
    "vision.img_h": Probe("8", changes("patches", "num_tokens"), *FIXED),
    "vision.img_w": Probe("8", changes("patches", "num_tokens"), *FIXED),
    "vision.max_img_h": Probe("128", table("parameters"), also=("vision.max_img_w=128",)),
    "vision.max_img_w": Probe("128", table("parameters"), also=("vision.max_img_h=128",)),
    "vision.class_token_len": Probe("4", table("parameters")),
    "vision.disable_vision_class_token": refused("F"),
    "vision.pixel_shuffle": Probe("F", table("parameters")),
    "vision.dynamic_resolution": Probe("F", changes("patches"), *REAL),
    "vision.dynamic_resolution_min_patches": Probe("60", changes("patches"), *REAL),
    "vision.dynamic_resolution_max_patches": Probe("16", changes("patches"), *REAL),
    "vision.final_layernorm": Probe("F", table("parameters")),
    "vision.force_cpe_eval_mode": Probe("T", changes("lm_loss"), "stage.training_stage=3"),
    "projector.vision_projection_type": Probe("mlp", table("parameters")),
    "projector.projection_normalization": Probe("rmsnorm", table("parameters"), "projector.vision_projection_type=mlp"),
    "stage.training_stage": Probe("3", changes("grad_norm")),
    "stage.freeze_vit": Probe("F", changes("grad_norm")),
    "stage.freeze_projection": Probe("T", changes("grad_norm")),
    "stage.freeze_lm": Probe("T", changes("grad_norm")),
    "stage.encoder_prefetch_depth": refused("1"),
    "data.dataset_provider": Probe("mock", changes("lm_loss"), *REAL),
    "data.train_data_path": Probe("%DATA%/valid", changes("lm_loss"), *REAL),
    "data.valid_data_path": Probe("%DATA%/valid", changes("eval/lm_loss"), "data.valid_data_path=%DATA%/train", *EVAL, *REAL),
    "data.tokenizer": Probe("%DATA%/other.json", changes("lm_loss"), *REAL),
    "data.image_token": Probe("<pic>", dumped("input_ids"), *REAL),
    "data.image_token_id": Probe("498", dumped("input_ids"), "log.dump_batches=3"),
    "data.pad_token_id": Probe("300", dumped("input_ids"), *REAL),
    "data.image_tag_type": Probe("internvl", changes("lm_loss"), *REAL),
    "data.end_of_document": Probe("<|endoftext|>", changes("lm_loss"), *REAL),
    "data.image_seq_length": Probe("16", changes("patches", "lm_loss")),
    "data.num_image_tiles": Probe("1", changes("images", "lm_loss")),
    "data.mock_dataset_size": Probe("1", changes("lm_loss")),
    "data.mock_pixels": Probe("zeros", changes("lm_loss")),
    "data.mock_text_only_every": Probe("2", changes("images", "num_tokens")),
    "data.data_streams": Probe("8", holds(lambda b, n: (len(checkpoint(b, 3)["state/train_position"]), len(checkpoint(n, 3)["state/train_position"])) ==
                                          (2, 8), "8 positions, not 2"), SAVE, *REAL),
    "data.num_workers": refused("1"),
    "data.packing_buffer_size": Probe("4", changes("num_tokens", "lm_loss"), *REAL),
    "data.shuffle_buffer_size": Probe("0", changes("lm_loss"), *REAL),
    "batch.micro_batch_size": Probe("2", table("schedule", "memory")),
    "batch.global_batch_size": Probe("4", changes("num_tokens", "consumed_samples")),
    "batch.step_batch_size_schedule": refused("0:2 100:4"),
    "batch.iterations_to_skip": Probe("2", changes("skipped")),
    "optimizer.adam_beta1": Probe("0.5", changes("lm_loss")),
    "optimizer.adam_beta2": Probe("0.5", changes("lm_loss")),
    "optimizer.adam_eps": Probe("0.01", changes("lm_loss")),
    "optimizer.weight_decay": Probe("10", changes("lm_loss", "weight_decay")),
    "optimizer.clip_grad": Probe("1e-7", changes("lm_loss")),
    "optimizer.overlap_grad_reduce": Probe("T", table("memory")),
    "optimizer.overlap_param_gather": Probe("T", table("memory")),
    "optimizer.ddp_bucket_size": Probe("1000", table("memory"), "optimizer.overlap_grad_reduce=T"),
    "optimizer.ddp_num_buckets": Probe("2", table("memory"), "optimizer.overlap_grad_reduce=T"),
    "optimizer.encoder_ddp_overlap": Probe("T", table("memory"), "optimizer.overlap_grad_reduce=T", "stage.training_stage=3"),
    "optimizer.correct_encoder_grad_for_partial_participation":
        Probe("T", changes("grad_norm"), "topology.layout=disjoint", "topology.encoder_dp=2", "topology.llm_dp=1",
              "batch.micro_batch_size=2", "data.mock_text_only_every=2", "stage.training_stage=3", ranks=3),
    "optimizer.grad_norm_skip_threshold": Probe("1e-6", changes("skipped", "lm_loss")),
    "optimizer.non_finite_policy": Probe("skip", holds(lambda b, n: b.status == 7 and n.status == 0, "7 becomes 0"), "lr.lr=1000",
                                         "language.init_method_std=1000", "optimizer.clip_grad=0"),
    "lr.lr": Probe("2e-3", changes("learning_rate", "lm_loss")),
    "lr.min_lr": Probe("5e-4", changes("learning_rate"), *LINEAR),
    "lr.lr_warmup_init": Probe("1e-4", changes("learning_rate"), "lr.lr_warmup_iters=2"),
    "lr.lr_decay_style": Probe("cosine", changes("learning_rate"), *LINEAR),
    "lr.lr_warmup_iters": Probe("2", changes("learning_rate")),
    "lr.lr_warmup_samples": Probe("3", changes("learning_rate")),
    "lr.lr_decay_iters": Probe("2", changes("learning_rate"), *LINEAR),
    "lr.lr_decay_samples": Probe("5", changes("learning_rate"), *LINEAR),
    "lr.lr_wsd_decay_iters": Probe("3", changes("learning_rate"), "lr.lr_wsd_decay_iters=2", *WSD),
    "lr.lr_wsd_decay_samples": Probe("5", changes("learning_rate"), "lr.lr_wsd_decay_samples=3", *WSD),
    "lr.lr_wsd_decay_style": Probe("minus_sqrt", changes("learning_rate"), "lr.lr_wsd_decay_iters=3", *WSD),
    "lr.weight_decay_incr_style": Probe("cosine", changes("weight_decay"), "lr.start_weight_decay=0", *WD),
    "lr.start_weight_decay": Probe("0.1", changes("weight_decay"), "lr.start_weight_decay=0", *WD),
    "lr.end_weight_decay": Probe("0.2", changes("weight_decay"), "lr.start_weight_decay=0", *WD),
    "checkpoint.save": Probe("%OUT%/ckpt", makes("ckpt/iter_0000003/checkpoint.h5")),
    "checkpoint.load": Probe("%CKPT%", logs(r"^start: restart from .* iteration 4 \(verified\)$"), "run.train_iters=6"),
    "checkpoint.save_interval": Probe("2", makes("ckpt/iter_0000002/checkpoint.h5"), SAVE),
    "checkpoint.save_initial": Probe("T", makes("ckpt/iter_0000000/checkpoint.h5"), SAVE),
    "checkpoint.save_retain_interval": Probe("2", holds(lambda b, n: b.has("ckpt/iter_0000001") and not n.has("ckpt/iter_0000001") and
                                                        n.has("ckpt/iter_0000002"), "iteration 1 is deleted, 2 stays"), SAVE,
                                             "checkpoint.save_interval=1"),
    "checkpoint.keep_last": Probe("2", holds(lambda b, n: b.has("ckpt/iter_0000001") and not n.has("ckpt/iter_0000001") and
                                             n.has("ckpt/iter_0000002"), "the oldest is deleted"), SAVE, "checkpoint.save_interval=1"),
    "checkpoint.async_save": refused("T"),
    "checkpoint.finetune": Probe("T", holds(lambda b, n: n.status == 0 and (b.rows, n.rows) == (2, 6), "the iterations start anew"), *LOAD),
    "checkpoint.no_load_optim": Probe("T", changes("lm_loss"), *LOAD),
    "checkpoint.no_load_rng": Probe("T", logs("no_load_rng"), *LOAD),
    "checkpoint.no_save_optim": Probe("T", holds(lambda b, n: any(x.startswith("optimizer") for x in checkpoint(b, 3)) and
                                                 not any(x.startswith("optimizer") for x in checkpoint(n, 3)), "no optimizer is stored"), SAVE),
    "checkpoint.ckpt_step": Probe("2", logs(r"^start: restart from .* iteration 2 \(verified\)$"), *LOAD),
    "checkpoint.use_checkpoint_opt_param_scheduler":
        Probe("T", holds(lambda b, n: b.status == 5 and n.status == 0 and n.trace["learning_rate"][0] == 1e-3, "the stored curve goes on"),
              "lr.lr=5e-4", *LOAD),
    "checkpoint.override_opt_param_scheduler":
        Probe("T", holds(lambda b, n: b.status == 5 and n.status == 0 and n.trace["learning_rate"][0] == 5e-4, "the deck's curve rules"),
              "lr.lr=5e-4", *LOAD),
    "checkpoint.import_language": Probe("absent", ends(5, "= 'absent': No such file")),
    "checkpoint.import_vision": Probe("absent", ends(5, "= 'absent': No such file")),
    "checkpoint.import_projector": Probe("absent", ends(5, "= 'absent': No such file")),
    "log.log_interval": Probe("3", holds(lambda b, n: b.stdout.count("lm loss:") == 3 and 1 <= n.stdout.count("lm loss:") <= 2,
                                         "fewer lines")),
    "log.tensorboard_dir": Probe("%OUT%/tb", makes("tb")),
    "log.log_timers": Probe("T", holds(lambda b, n: n.stdout.count("timers:") == 3 + b.stdout.count("timers:"), "timers at each line")),
    "log.log_num_zeros_in_grad": Probe("T", holds(lambda b, n: all(b.trace["num_zeros"] == -1) and all(n.trace["num_zeros"] > 0) and
                                                  "num zeros:" in n.stdout, "zeros are counted and logged")),
    "log.log_params_norm": Probe("T", holds(lambda b, n: np.all(np.isnan(b.trace["params_norm"])) and np.all(n.trace["params_norm"] > 1)
                                            and "params norm:" in n.stdout, "the norm is computed and logged")),
    "log.dump_batches": Probe("1", makes("batches.h5")),
    "log.dump_logits": Probe("T", holds(lambda b, n: b.status == n.status == 0 and [has_logits(o) for o in (b, n)] == [0, 3], "logits of three batches"),
                             "log.dump_batches=3"),
    "eval.eval_interval": Probe("1", holds(lambda b, n: (b.trace["eval/rows"], n.trace["eval/rows"]) == (2, 4), "4 validations, not 2"), *EVAL),
    "eval.eval_iters": Probe("1", holds(lambda b, n: (b.trace["eval/rows"], n.trace["eval/rows"]) == (0, 2), "2 validations, not 0")),
    "eval.eval_picture_ablation": Probe("zero", holds(lambda b, n: np.all(np.isnan(b.trace["eval/lm_loss_ablated"])) and
                                                      np.all(n.trace["eval/lm_loss_ablated"] > 0), "a second value"), *EVAL),
}

# values that are refused of keys whose other values work
PARTLY = {"data.shuffle_buffer_size": refused("5"), "run.backend": Probe("shadow", ends(3, "run.backend"))}


class Keys:
    def __init__(self):
        self.tap, self.m = Tap(), Mimo()
        self.count, self.cache = 0, {}

    def directory(self):
        self.count += 1
        return self.m.path("run%d" % self.count)

    def fill(self, text):
        return text.replace("%DATA%", self.m.path("data")).replace("%CKPT%", self.m.path("ckpt"))

    def prepare(self):
        os.mkdir(self.m.path("data"))
        write_shards(self.m.path("data", "train"), 24, seed=1)
        write_shards(self.m.path("data", "valid"), 12, seed=2)
        write_tokenizer(self.m.path("data", "tokenizer.json"))
        write_tokenizer(self.m.path("data", "other.json"), ("<|endoftext|>", "</s>", "<image>"))
        return self.m.run(DECK, *BASE[1:], "run.train_iters=4", "run.output_dir=" + self.m.path("first"), "checkpoint.save_interval=2",
                          "checkpoint.save=" + self.m.path("ckpt"))

    def outcome(self, arguments, ranks, check):
        """One call for equal arguments; the second who asks waits for the first."""
        name = (tuple(arguments), ranks, check)
        if name not in self.cache:
            self.cache[name] = self.pool.submit(Outcome, self, [self.fill(a) for a in arguments], ranks, check)
        return self.cache[name]

    def probe(self, key, p):
        kind, look = p.observe
        context = [c for c in p.context if c.split("=")[0] != key]
        without = self.outcome(p.context, p.ranks, kind == "check")
        return look, without, self.outcome([*context, *p.also, "%s=%s" % (key, p.value)], p.ranks, kind == "check")

    def distributed_timeout(self):
        """A stopped rank ends the job after this time, and not before with ten times as much."""
        got = []
        for minutes in ("0.05", "0.5"):
            p = self.m.start(DECK, "run.train_iters=100000", "run.output_dir=" + self.directory(), "batch.global_batch_size=2",
                             "run.distributed_timeout_minutes=" + minutes, ranks=2)
            wait_for(lambda: "lm loss:" in p.text() or p.poll() is not None)
            ranks = descendants(p.pid)
            if ranks:
                os.kill(ranks[-1], signal.SIGSTOP)
            try:
                got.append(p.wait(12 if minutes == "0.5" else 60))
            except subprocess.TimeoutExpired:
                got.append("alive")
                for pid in ranks:
                    os.kill(pid, signal.SIGKILL)
                p.wait(20)
        return "" if got == [8, "alive"] else "ended with %s" % got

    def exit_signal(self):
        """With 'TERM' a SIGTERM is a planned stop; with 'USR1' it is not, and SIGUSR1 is."""
        got = []
        for word, number in (("TERM", signal.SIGTERM), ("USR1", signal.SIGTERM), ("USR1", signal.SIGUSR1)):
            out = self.directory()
            p = self.m.start(DECK, "run.train_iters=100000", "run.exit_signal=" + word, "run.output_dir=" + out, "batch.global_batch_size=1")
            wait_for(lambda: "lm loss:" in p.text() or p.poll() is not None)
            p.send_signal(number)
            try:
                got.append(p.wait(60))
            except Exception as e:
                p.kill()
                got.append(str(e))
        return "" if got == [75, -signal.SIGTERM, 75] else "ended with %s" % got


def main():
    k = Keys()
    status, reference, _ = k.m.run("--reference")
    known, group = [], ""
    for line in reference.splitlines():
        if line.startswith("&"):
            group = line[1:].strip()
        m = re.match(r"^  (?:! )?([a-z]\w*) = ", line)
        if m:
            known.append(group + "." + m.group(1))
    k.tap.result(status == 0 and len(known) > 130, "the_reference_lists_the_keys", "%d keys" % len(known))
    k.tap.result(set(known) == set(KEYS) and len(known) == len(set(known)), "the_table_holds_every_key",
                 "not in the table: %s\nnot in the program: %s" % (sorted(set(known) - set(KEYS)), sorted(set(KEYS) - set(known))))
    got = k.prepare()
    k.tap.result(got[0] == 0, "the_checkpoint_to_load_is_written", got[2])
    with concurrent.futures.ThreadPoolExecutor(2) as k.pool:
        jobs = [(key, p, None if isinstance(p, str) else k.probe(key, p))
                for key, p in [*KEYS.items(), *PARTLY.items()] if key in known and k.m.arg.k in key]
        for key, p, job in jobs:
            fault = getattr(k, p)() if job is None else job[0](key, job[1].result(), job[2].result())
            k.tap.result(not fault, "key_%s%s" % (key, "" if KEYS[key] is p else "_" + p.value), fault)
    k.m.close()
    k.tap.close()


if __name__ == "__main__":
    main()
