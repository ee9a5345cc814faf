#!/usr/bin/env python3
"""References of the regression cases 500 to 599 from transformers and torch: `make oracle`.

    regression/oracle/oracle.py [-k WORD ...] [--measure] [--mimo FILE] [--mpiexec FILE] [--cases DIR]

For each case, in fp64 and in fp32: `mimo` writes checkpoint.h5 of iteration 0 and batches.h5; transformers' classes take these weights
and train on these batches with torch's AdamW, clip_grad_norm_ and autograd; the trace, the gradients of iteration 1 and the parameters
after the last iteration become reference.h5, which stays as it is when they are the same bits. Nothing of mimo's numbers but weights,
batches and the deck enters.
"""
import argparse
import math
import os
import sys
import tempfile
import time

import h5py
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers.optimization import get_wsd_schedule

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)), os.path.join(ROOT, "regression")]
sys.dont_write_bytecode = True
import cases as c   # noqa: E402
import model as hf   # noqa: E402
import weights   # noqa: E402
from runner import LAST, Runner, harness   # noqa: E402


def deck_of(file):
    """{group.key: value} of the echo in a file's /deck, and the padded vocabulary."""
    def value(text):
        if text[:1] in "'\"":
            return text[1:-1]
        if text in (".true.", ".false."):
            return text == ".true."
        try:
            return int(text)
        except ValueError:
            return float(text)
    d = {k: value(v) for k, v in file["deck"].attrs.items() if v != ""}
    unit = d["language.make_vocab_size_divisible_by"]
    return d | {"padded_vocab": -(-d["language.vocab_size"] // unit) * unit}


def read_weights(name):
    with h5py.File(name, "r") as f:
        out = {}
        f["model"].visititems(lambda n, o: out.__setitem__(n, o[()]) if isinstance(o, h5py.Dataset) else None)
        return deck_of(f), out


def learning_rates(d, parameters):
    """A function that sets the groups' rate for each iteration."""
    o = torch.optim.AdamW(parameters, lr=d["lr.lr"], betas=(d["optimizer.adam_beta1"], d["optimizer.adam_beta2"]),
                          eps=d["optimizer.adam_eps"], weight_decay=0.0)
    style, iterations = d["lr.lr_decay_style"], d["run.train_iters"]
    if style == "constant":
        return o, None
    if style != "WSD" or d["lr.lr_warmup_init"] != d["lr.min_lr"]:
        raise ValueError("no public schedule for lr_decay_style = '%s'" % style)
    tail = {"linear": "linear", "cosine": "cosine", "minus_sqrt": "1-sqrt"}[d["lr.lr_wsd_decay_style"]]
    return o, get_wsd_schedule(o, num_warmup_steps=d["lr.lr_warmup_iters"], num_decay_steps=d["lr.lr_wsd_decay_iters"],
                               num_training_steps=iterations, decay_type=tail, min_lr_ratio=d["lr.min_lr"] / d["lr.lr"])


def forward(model, d, batch, double, augment):
    """Logits of the global batch."""
    ids = torch.from_numpy(batch["input_ids"][()])
    tiles = batch["imgs_sizes"][()] // d["vision.patch_dim"] if "imgs_sizes" in batch else []
    if len(tiles) == 0:
        return model(input_ids=ids, use_cache=False).logits
    patches = torch.from_numpy(batch["patches"][()]).to(torch.float64 if double else torch.float32)
    positions = hf.set_crops(model, tiles, batch["cpe"][()]) if augment else None
    if d["vision.dynamic_resolution"]:
        more = {"pixel_values": patches, "image_grid_hw": torch.from_numpy(tiles).long()}
    else:
        more = {"mm_encoder_outputs": {"image": hf.dense_features(model, patches, tiles[0].tolist(), positions)}}
    return model(input_ids=ids, use_cache=False, **more).logits


def next_words(d, ids):
    """Labels of model.md 3.3: the next id, none where that is a picture, the end or padding (which fills the end of a row). In real
    data a picture predicts nothing either (training.md 6.7)."""
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    padding = (ids.flip(1) == d["data.pad_token_id"]).long().cumprod(1).flip(1).bool()
    labels[:, :-1][padding[:, 1:]] = -100
    labels[labels == d["data.image_token_id"]] = -100
    if d["data.dataset_provider"] != "mock":
        labels[ids == d["data.image_token_id"]] = -100
    return labels


def train(checkpoint, batches, double):
    """The trace of the whole run as {name: array}, gradients of iteration 1, parameters at the end."""
    d, tensors = read_weights(checkpoint)
    pictures = any(n.startswith("vision/") for n in tensors)
    links = weights.links(d, pictures)
    model = hf.build(d, pictures, double)
    weights.load(model, links, tensors)
    frozen = {m for m, key in (("vision", "freeze_vit"), ("projector", "freeze_projection"), ("language", "freeze_lm")) if d["stage." + key]}
    trained = {n for m, ls in links.items() if m not in frozen for l in ls for n in l.theirs}
    named = dict(model.named_parameters())
    for n, p in named.items():
        p.requires_grad_(n in trained)
    trained = {n: p for n, p in named.items() if n in trained}
    decays = lambda n, p: p.ndim > 1 and not n.endswith(".bias")
    optimizer, schedule = learning_rates(d, [{"params": [p for n, p in trained.items() if decays(n, p) == w]} for w in (True, False)])
    optimizer.param_groups[0]["weight_decay"] = d["optimizer.weight_decay"]
    routers = hf.Routers(model)
    balanced = "language" not in frozen
    coefficient = d["moe.moe_aux_loss_coeff"] if balanced and d["moe.moe_router_load_balancing_type"] == "seq_aux_loss" else 0.0
    rows, gradients = [], {}
    with h5py.File(batches, "r") as f:
        for i in range(d["run.train_iters"]):
            batch = f["iteration_%06d" % (i + 1)]
            labels = next_words(d, torch.from_numpy(batch["input_ids"][()]))
            logits = forward(model, d, batch, double, "cpe" in batch and "vision" not in frozen)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
            tokens = int((labels != -100).sum())
            balance, bare, counts = routers.take(len(labels))
            counts *= balanced   # a frozen language model counts nothing and keeps its bias
            optimizer.zero_grad(set_to_none=False)
            (loss + coefficient * balance).backward()
            for p in trained.values():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad / tokens
            if i == 0:
                gradients = weights.gather(links, lambda n: trained[n].grad.clone() if n in trained else None)
            clip = d["optimizer.clip_grad"]
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), clip if clip > 0 else float("inf"))
            rows.append({"iteration": i + 1, "lm_loss": loss.item() / tokens, "grad_norm": norm.item(), "num_tokens": tokens,
                         "seq_load_balancing_loss": bare if coefficient else 0.0, "moe/tokens_per_expert": counts.numpy(),
                         "learning_rate": optimizer.param_groups[0]["lr"]})
            optimizer.step()
            if schedule:
                schedule.step()
            if balanced and d["moe.moe_router_enable_expert_bias"]:
                for gate, count in zip(routers.gates, counts.to(torch.float64)):
                    gate.e_score_correction_bias += d["moe.moe_router_bias_update_rate"] * torch.sign(count.mean() - count).to(gate.weight.dtype)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    parameters = weights.gather(links, lambda n: state[n])
    return {k: np.array([r[k] for r in rows]) for k in rows[0]}, gradients, parameters


# ---- the cases ------------------------------------------------------------------------------------------------------------

# What the two programs may differ by at most, whatever was measured before; loss for other quantities of rows.
BOUND = {"fp64": {"lm_loss": 1e-11, "gradients": 1e-9, "parameters": 1e-8}, "fp32": {"lm_loss": 2e-6, "gradients": 2e-5, "parameters": 1e-4}}
WHOLE = ("iteration", "num_tokens", "moe/tokens_per_expert")   # numbers that must be equal; others may differ by a rounding
EPSILON = {"fp64": 2.0 ** -52, "fp32": 2.0 ** -23}
# mimo's own rounding depends on the matrix kernels that OpenBLAS picks for a processor: --measure takes the largest of these.
KERNELS = ("Haswell", "SkylakeX", "Nehalem")


def classes(tensors):
    return "NemotronH_Omni_Reasoning_V3" if any(n.startswith("vision/") for n in tensors) else "NemotronHForCausalLM"


def reference(runner, case, section, file):
    """Train, write the section's group of reference.h5; all elements of {gradients, parameters}, or a text that says what failed."""
    launch = next(l for l in case.launches if l.section is section)
    more = ["checkpoint.save_initial=T", "log.dump_batches=%d" % case.rows(launch.overrides)]
    out, fault = runner.launch(case, launch.ranks, launch.overrides + more, saving=LAST)
    if fault:
        return fault
    rows, grads, params = train(c.checkpoint(out, 0), os.path.join(out, "batches.h5"), section.group == "fp64")
    group = file.require_group(section.group)
    for k in section.quantities():
        group[k] = rows[k]
    params = c.split_bias(params, c.heads(c.checkpoint(out, 0)))
    for kind, found in (("gradients", grads), ("parameters", params)):
        for n, x in found.items():
            group[kind + "/" + n] = c.sketch(x) if section.group == "fp64" else c.sketch(x).astype(np.float32)
    file.attrs["program"] = "%s of transformers %s, torch %s" % (classes(grads | params), transformers.__version__, torch.__version__)
    return {"gradients": grads, "parameters": params}


def measure(runner, case, section, file, full, kernels):
    """{quantity: largest relative difference over the section's launches and kernels}, or a text on what failed. `full` holds the oracle's
    tensors, all elements."""
    far = {}
    stored = {k: file[section.group][k][()] for k in section.quantities()}
    flat = {}
    file[section.group].visititems(lambda n, o: flat.__setitem__(n, o[()]) if isinstance(o, h5py.Dataset) else None)
    for launch in (l for l in case.launches if l.section is section):
        for kernel in kernels:
            runner.env = {"OPENBLAS_CORETYPE": kernel} if kernel else {}
            out, fault = runner.launch(case, launch.ranks, launch.overrides, saving=LAST)
            first, fault = (out, fault) if fault else runner.first_step(case, launch)
            runner.env = {}
            if fault:
                return fault
            rows = case.rows(launch.overrides)
            got = c.read_rows(os.path.join(out, "trace.h5"), section.quantities())
            for k in section.quantities():
                x, y = got[k].astype(np.float64), stored[k][:rows].astype(np.float64)
                d = np.abs(x - y)
                far[k] = max(far.get(k, 0.0), float((d[d > 0] / np.abs(y[d > 0])).max(initial=0.0)))
            for kind, of in (("gradients", c.gradients(first)), ("parameters", c.parameters(out, rows))):
                if kind == "parameters" and rows < case.iterations:
                    continue
                for n in of:
                    if kind == "parameters" and c.is_key_bias(n):
                        continue
                    far[kind] = max(far.get(kind, 0.0), c.distance(c.sketch(of[n]), flat[kind + "/" + n]))
                    whole = kind + ", all elements"
                    far[whole] = max(far.get(whole, 0.0), c.distance(of[n].astype(np.float64).reshape(full[kind][n].shape), full[kind][n]))
            runner.clean()
    return far


def two_digits(x):
    """x rounded up to two digits."""
    near = float("%.1e" % x)
    return near if near >= x else float("%.1e" % (near + 10.0 ** (math.floor(math.log10(x)) - 1)))


def state(case, section, far):
    """Put the measured numbers into the section's lines of `expect`, with four times as much as tolerance."""
    path, group, lines = os.path.join(case.folder, "expect"), "", []
    with open(path) as f:
        for line in f:
            words = line.split()
            group = words[1] if words[:1] == ["reference"] else group
            if group == section.group and words and words[0] in far:
                source = " ".join(words[3:]).partition(": measured")[0].strip()
                measured = 0.0 if words[0] in WHOLE else two_digits(max(far[words[0]], EPSILON["fp64" if words[0] == "learning_rate" else group]))
                line = "%-24s 0 %-8s %s%s\n" % (words[0], "%.2e" % (4 * measured) if measured else "0", source,
                                               ": measured %.1e" % measured if measured else "")
            lines.append(line)
    with open(path, "w") as f:
        f.writelines(lines)


def judge(case, section, far):
    """Sentences on what differs by more than it may."""
    out = []
    for k, d in far.items():
        bound = BOUND[section.group].get(k.partition(",")[0], BOUND[section.group]["gradients"])
        if not d <= bound:
            out.append("%s: %.2e, at most %.0e may be" % (k, d, bound))
        if k in section.tolerance and not d <= section.tolerance[k][1]:
            out.append("%s: %.2e, `expect` says %.2e" % (k, d, section.tolerance[k][1]))
    return out


def make(runner, case, arg):
    """One case: reference.h5, its comparison; whether all is well."""
    partial, good = case.reference + ".new", True
    with h5py.File(partial, "w") as f:
        f.attrs.update(version=transformers.__version__, git=runner.features.get("git", ""), date=time.strftime("%Y-%m-%d", time.gmtime()),
                       command="make oracle K=" + case.name)
        for section in case.sections:
            full = reference(runner, case, section, f)
            far = full if isinstance(full, str) else measure(runner, case, section, f, full, KERNELS if arg.measure else ("",))
            if isinstance(far, str):
                print("%s %s: %s" % (case.name, section.group, far), flush=True)
                return False
            wrong = [w for w in judge(case, section, far) if not (arg.measure and "`expect`" in w)]
            if arg.measure:
                state(case, section, far)
            print("%-28s %s  " % (case.name, section.group) + "  ".join("%s %.1e" % (k, d) for k, d in far.items() if d > 0), flush=True)
            for w in wrong:
                print("    WRONG " + w, flush=True)
            good = good and not wrong
    if os.path.exists(case.reference) and not harness.differing(harness.everything(partial), harness.everything(case.reference)):
        os.remove(partial)   # the same bits: the file with the date of their first making stays
    else:
        os.replace(partial, case.reference)
        print("%s: reference.h5 is another one now" % case.name, flush=True)
    return good


def main():
    ap = argparse.ArgumentParser(description="make and check the references of the cases 500 to 599")
    ap.add_argument("-k", action="append", default=[], metavar="WORD", help="only cases whose name holds the word")
    ap.add_argument("--mimo", default=os.path.join(ROOT, "mimo"), metavar="FILE")
    ap.add_argument("--mpiexec", default="mpiexec.mpich", metavar="FILE")
    ap.add_argument("--cases", default=os.path.join(ROOT, "regression"), metavar="DIR")
    ap.add_argument("--measure", action="store_true", help="write what was measured into each `expect`, four times as much as tolerance")
    arg = ap.parse_args()
    arg.record = arg.bitwise = None
    chosen = [x for x in c.cases(arg.cases) if x.oracle and (not arg.k or any(w in x.name for w in arg.k))]
    if not chosen:
        sys.exit("error: no case with an oracle matches " + " ".join(arg.k))
    torch.set_num_threads(1)   # small tensors: threads only wait for one another
    with tempfile.TemporaryDirectory(prefix="mimo-oracle-") as scratch:
        runner = Runner(arg, scratch)
        fault = runner.probe()
        if fault:
            sys.exit("error: " + fault)
        bad = [case.name for case in chosen if not make(runner, case, arg)]
    print("%d passed, %d failed, 0 skipped" % (len(chosen) - len(bad), len(bad)))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
