#!/usr/bin/env python3
"""Hugging Face directories in and out, against transformers itself (hf.md; without it: tests/check_hf.py).

    regression/oracle/import_export.py [--mimo FILE] [--mpiexec FILE] [-k WORD]

In: transformers draws models, save_pretrained writes them in one file or several, `mimo` imports them and dumps loss, log-sum-exp and all
logits of every token of a batch, pictures included; the saved model gives the same on that batch. Out: `mimo` trains, --export writes the model,
from_pretrained loads it and gives the same on the next batch. And back: import(export) and export(import) are the same bits. The names
and shapes that tests/check_hf.py believes in are those that transformers writes. fp64 agrees to 1e-11, the unmodified classes in fp32
to 2e-5.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile

import h5py
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import NemotronH_Omni_Reasoning_V3, NemotronHForCausalLM, RadioConfig, RadioModel

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)), os.path.join(ROOT, "tests")]
sys.dont_write_bytecode = True
import hf_files   # noqa: E402
import model as hf   # noqa: E402

TOLERANCE = {"fp64": 1e-11, "fp32": 2e-5}
DECK = ("&language preset = 'tiny' make_vocab_size_divisible_by = 4 /\n&projector vision_projection_type = 'mlp' projection_normalization = 'rmsnorm' /\n"
        "&data mock_pixels = 'normal' mock_text_only_every = 5 /\n&batch global_batch_size = 8 /\n&lr lr = 1e-2 lr_decay_style = 'constant' /\n"
        "&log dump_batches = 1000 dump_logits = T /\n")
# The deck's values as oracle.py reads them from a checkpoint, for model.text_config and model.vision_config.
SIZES = {"padded_vocab": 500, "language.hidden_size": 64, "language.hybrid_layer_pattern": "MEM*E-", "language.num_attention_heads": 4,
         "language.num_query_groups": 2, "language.kv_channels": 16, "language.ffn_hidden_size": 96, "language.layernorm_epsilon": 1e-5,
         "mamba.mamba_state_dim": 16, "mamba.mamba_num_heads": 8, "mamba.mamba_head_dim": 8, "mamba.mamba_num_groups": 2,
         "mamba.linear_conv_kernel_dim": 4, "mamba.mamba_chunk_size": 16, "moe.num_experts": 8, "moe.moe_router_topk": 2,
         "moe.moe_ffn_hidden_size": 32, "moe.moe_shared_expert_intermediate_size": 64, "moe.moe_router_topk_scaling_factor": 2.5,
         "vision.class_token_len": 2, "vision.patch_dim": 4, "vision.max_img_h": 64, "vision.max_img_w": 64, "vision.hidden_size": 32,
         "vision.num_layers": 2, "vision.num_attention_heads": 4, "vision.ffn_hidden_size": 64, "data.image_token_id": 499,
         "projector.vision_projection_type": "mlp", "projector.projection_normalization": "rmsnorm"}


def randomise(model, seed):
    """Every number that training could change; identities and parts without pictures keep what they are."""
    torch.manual_seed(seed)
    for n, x in list(model.named_parameters()) + [b for b in model.named_buffers() if b[0].endswith("e_score_correction_bias")]:
        if n.endswith("lambda1"):
            continue
        with torch.no_grad():
            if "norm" in n and n.endswith("weight") or n.endswith(".D"):
                x.copy_(1 + 0.2 * torch.randn_like(x))
            elif n.endswith(("A_log", "dt_bias", "conv1d.weight")):
                x.add_(0.1 * torch.randn_like(x))
            else:
                x.copy_(torch.randn_like(x) * (0.02 if x.ndim < 2 else 0.1))
    return model


def drawn(kind, double, seed=1):
    """A model of transformers with random numbers; kind: language, vision, pictures, pictures-bare (no last LayerNorm)."""
    hf.as_double(double)
    d = dict(SIZES, **{"vision.final_layernorm": kind == "pictures"})
    if kind == "vision":
        model = RadioModel(RadioConfig(**{k: v for k, v in hf.vision_config(d).to_dict().items() if not k.startswith("video")}))
        model = model.double() if double else model.float()
    else:
        model = hf.build(d, kind != "language", double)
    return randomise(model.eval(), seed)


def load(directory, kind, double):
    hf.as_double(double)
    cls = {"language": NemotronHForCausalLM, "vision": RadioModel}.get(kind, NemotronH_Omni_Reasoning_V3)
    model, info = cls.from_pretrained(directory, dtype=torch.float64 if double else torch.float32, output_loading_info=True)
    if double and kind != "vision":
        (model if kind == "language" else model.language_model).set_experts_implementation("eager")
    # Layer scales are drawn as one, the video embedder at random: no picture passes it. The rest must be there.
    missing = [n for n in info["missing_keys"] if not n.endswith(("lambda1", "video_patch_projection.weight", "summary_idxs"))]
    unexpected = [n for n in info["unexpected_keys"] if "input_conditioner" not in n and ".norm." not in n]
    return model.eval(), (missing, unexpected, list(info["mismatched_keys"]))


def tokens(model, batch, patch, double):
    """Loss and log-sum-exp of every token and all logits, as in batches.h5."""
    ids, labels = (torch.from_numpy(batch[n][()]) for n in ("input_ids", "labels"))
    more = {}
    if batch["imgs_sizes"].shape[0]:
        more = {"pixel_values": torch.from_numpy(batch["patches"][()]).to(torch.float64 if double else torch.float32),
                "image_grid_hw": torch.from_numpy(batch["imgs_sizes"][()] // patch).long()}
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, **more).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none").reshape(labels.shape)
    return loss.double().numpy(), torch.logsumexp(logits.double(), -1).numpy(), logits.double().flatten(0, 1).numpy()


class Check:
    def __init__(self, arg):
        self.arg, self.scratch, self.n, self.bad = arg, tempfile.mkdtemp(prefix="mimo-import-"), 0, 0
        with open(self.path("deck.nml"), "w") as f:
            f.write(DECK)

    def path(self, *parts):
        return os.path.join(self.scratch, *parts)

    def say(self, ok, name, note=""):
        self.n, self.bad = self.n + 1, self.bad + (not ok)
        print("%s %-90s %s" % ("ok  " if ok else "WRONG", name, note), flush=True)
        return ok

    def mimo(self, *words, ranks=0):
        command = ([self.arg.mpiexec, "-n", str(ranks)] if ranks else []) + [os.path.abspath(self.arg.mimo), *words]
        p = subprocess.run(command, capture_output=True, text=True, cwd=self.scratch,
                           env=dict(os.environ, HWLOC_PLUGINS_PATH="/nonexistent", UCX_TLS="self,posix", OPENBLAS_NUM_THREADS="1"))
        if p.returncode:
            raise RuntimeError("mimo %s: status %d\n%s%s" % (" ".join(words), p.returncode, p.stdout[-2000:], p.stderr[-2000:]))
        return p.stdout

    def run(self, name, iterations, *words, ranks=0):
        self.mimo("deck.nml", "run.output_dir=" + name, "checkpoint.save=" + name, "checkpoint.save_initial=T", "checkpoint.save_interval=1",
                  "run.train_iters=%d" % iterations, *words, ranks=ranks)
        return self.path(name)

    def same_numbers(self, name, model, run, iteration, double):
        """Loss and log-sum-exp of every token of an iteration and every logit, largest difference relative to the largest value."""
        with h5py.File(os.path.join(run, "batches.h5"), "r") as f:
            batch = f["iteration_%06d" % iteration]
            ours, theirs = [batch[n][()] for n in ("token_loss", "token_lse", "logits")], tokens(model, batch, 4, double)
        far = [float(np.abs(a - b).max() / np.abs(b).max()) if a.shape == b.shape else np.inf for a, b in zip(ours, theirs)]
        limit = TOLERANCE["fp64" if double else "fp32"]
        self.say(max(far) <= limit, name, "loss %.1e, log-sum-exp %.1e of every token, every logit %.1e, at most %.0e" % (*far, limit))


IMPORTS = ("checkpoint.import_language=%s", "checkpoint.import_vision=%s", "checkpoint.import_projector=%s")
ALONE = ("topology.layout=language_only",)


def words_of(kind, directory):
    if kind == "language":
        return ALONE + (IMPORTS[0] % directory,)
    return tuple(w % directory for w in IMPORTS) + (() if kind == "pictures" else ("vision.final_layernorm=F",))


def state(model):
    """Parameters and buffers by name but those that are not this program's."""
    return {n: x.detach().clone() for n, x in model.state_dict().items() if not n.endswith(("lambda1", "video_patch_projection.weight", "summary_idxs"))
            and "input_conditioner" not in n}


def unequal(a, b):
    return sorted(set(a) ^ set(b)) + [n for n in sorted(set(a) & set(b)) if a[n].dtype != b[n].dtype or not torch.equal(a[n], b[n])]


def said(faults):
    return "; ".join("%s: %s" % x for x in zip(("missing", "unexpected", "mismatched"), faults) if x[1])


def names(c):
    """What transformers writes is what tests/hf_files.py lists, at tiny width and for every part."""
    tiny, v = hf_files.TINY, hf_files.TINY_VISION
    scales = {"radio_model.model.blocks.%d.layer_scale%d.lambda1" % (i, k): (32,) for i in range(2) for k in (1, 2)}
    inside = lambda x, prefix: {prefix + n: s for n, s in x.items()}
    video = {n: s for n, s in hf_files.more_vision(v).items() if "video" in n}
    idxs = {"radio_model.summary_idxs": (1,)}
    conditioner = {n: s for n, s in hf_files.more_vision(v).items() if "video" not in n}
    for kind, listed in (("language", hf_files.language(tiny)), ("vision", {**hf_files.vision(v), **scales, **conditioner, **idxs}),
                         ("pictures", {**hf_files.language(tiny, "language_model."), **inside({**hf_files.vision(v), **scales, **video, **idxs}, "vision_model."),
                                       **hf_files.projector(tiny, v), **hf_files.final_norm(v)})):
        model = drawn(kind, False)
        model.save_pretrained(c.path("names-" + kind))
        found = {n: x.shape for n, (_, x) in hf_files.read_directory(c.path("names-" + kind)).items()}
        wrong = sorted(set(found) ^ set(listed)) or [n for n in found if found[n] != listed[n]]
        c.say(not wrong, "names and shapes that transformers writes, " + kind, wrong[:4] or "%d tensors" % len(found))
        library = {"language": hf_files.language(tiny, library=True, fused=True), "vision": {**hf_files.vision(v, library=True)},
                   "pictures": {**hf_files.language(tiny, "language_model.", library=True, fused=True), **hf_files.vision(v, "vision_model.", library=True),
                                **hf_files.projector(tiny, v, library=True), **hf_files.final_norm(v)}}[kind]
        found = {n: tuple(x.shape) for n, x in state(model).items()}
        wrong = sorted(set(found) ^ set(library)) or [n for n in found if found[n] != library[n]]
        c.say(not wrong, "names and shapes that transformers has in memory, " + kind, wrong[:4] or "%d tensors" % len(found))


def imports(c):
    for kind in ("language", "pictures", "pictures-bare"):
        for precision in ("fp64", "fp32"):
            double = precision == "fp64"
            model = drawn(kind, double, seed=len(kind))
            directory = "saved-%s-%s" % (kind, precision)
            model.save_pretrained(c.path(directory), max_shard_size="200KB" if double else "10GB")
            layouts = [(0, ())]
            if double and kind != "language":
                layouts += [(4, ("topology.layout=disjoint", "topology.encoder_tp=2", "topology.llm_tp=2")), (4, ("topology.layout=colocated", "topology.llm_ep=4"))]
            if double and kind == "language":
                layouts += [(2, ("topology.llm_tp=2", "topology.llm_ep=2"))]
            for ranks, layout in layouts:
                run = c.run("in-%s-%s-%d%s" % (kind, precision, ranks, len(" ".join(layout))), 1, "run.precision=" + precision,
                            *words_of(kind, directory), *layout, ranks=ranks)
                c.same_numbers("import: %s %s, %d rank%s %s" % (kind, precision, max(ranks, 1), "s" * (ranks > 1), " ".join(w[9:] for w in layout)),
                               model, run, 1, double)
            out = "back-%s-%s" % (kind, precision)
            c.mimo("--export", out, os.path.join(run, "iter_0000000", "checkpoint.h5"), "--dtype", precision)
            back, faults = load(c.path(out), kind, double)
            wrong = unequal(state(model), state(back))
            c.say(not wrong and not any(faults), "export(import(saved)) is what was saved, bit by bit: %s %s" % (kind, precision), wrong[:3] or said(faults))


def exports(c):
    for kind in ("language", "pictures", "pictures-bare"):
        more = ALONE if kind == "language" else ("stage.training_stage=3", "vision.force_cpe_eval_mode=T",
                                                 *(() if kind == "pictures" else ("vision.final_layernorm=F",)))
        for precision in ("fp64", "fp32"):
            run = c.run("out-%s-%s" % (kind, precision), 3, "run.precision=" + precision, *more)
            for shards in (("--shard-bytes", "300000"), ()) if precision == "fp64" else ((),):
                out = "exported-%s-%s%d" % (kind, precision, len(shards))
                c.mimo("--export", out, os.path.join(run, "iter_0000002", "checkpoint.h5"), "--dtype", precision, *shards)
                model, faults = load(c.path(out), kind, precision == "fp64")
                c.say(not any(faults), "from_pretrained finds every tensor: %s %s%s" % (kind, precision, " in shards" if shards else ""), said(faults))
                c.same_numbers("export: %s %s%s" % (kind, precision, " in shards" if shards else ""), model, run, 3, precision == "fp64")


def encoders(c):
    """RADIO alone: imported into a run with an affine projector, exported apart again."""
    model = drawn("vision", True, seed=9)
    model.save_pretrained(c.path("radio"))
    run = c.run("radio-in", 1, "run.precision=fp64", "projector.vision_projection_type=affine", "projector.projection_normalization=none",
                "checkpoint.import_vision=radio")
    c.mimo("--export", "radio-out", os.path.join(run, "iter_0000000", "checkpoint.h5"), "--dtype", "fp64")
    back, faults = load(c.path("radio-out", "vision"), "vision", True)
    wrong = unequal(state(model), state(back))
    c.say(not wrong and not any(faults), "RadioModel alone, in and out again, bit by bit", wrong[:3] or said(faults))
    pixels = torch.rand(1, 3, 32, 48, dtype=torch.float64)
    # The drawn model's mean and deviation are fp32, those written have all the digits of fp64.
    for name, limit in (("RadioModel's features on a picture, its own normalisation included", 1e-6), ("and on pixels that are normalised already", 1e-11)):
        with torch.no_grad():
            a, b = model(pixels).features, back(pixels).features
        far = float((a - b).abs().max() / a.abs().max())
        c.say(far <= limit, name, "%.1e, at most %.0e" % (far, limit))
        for m in (model, back):
            m.make_preprocessor_external()


def main():
    ap = argparse.ArgumentParser(description="compare import and export with transformers")
    ap.add_argument("-k", default="", metavar="WORD", help="only parts whose name holds the word: names, imports, exports, encoders")
    ap.add_argument("--mimo", default=os.path.join(ROOT, "mimo"), metavar="FILE")
    ap.add_argument("--mpiexec", default="mpiexec.mpich", metavar="FILE")
    arg = ap.parse_args()
    torch.set_num_threads(2)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    c = Check(arg)
    try:
        for part in (names, imports, exports, encoders):
            if arg.k in part.__name__:
                part(c)
    finally:
        shutil.rmtree(c.scratch, ignore_errors=True)
    print("%d passed, %d failed, 0 skipped" % (c.n - c.bad, c.bad))
    return 1 if c.bad or not c.n else 0


if __name__ == "__main__":
    sys.exit(main())
