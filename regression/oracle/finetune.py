#!/usr/bin/env python3
"""Fine-tuning of a Hugging Face model from end to end: the page docs/models.md, and its test.

    regression/oracle/finetune.py draw DIR            a small model with random numbers, and the demo's tokenizer
    regression/oracle/finetune.py loss DIR BATCHES    held-out loss of a directory in transformers, on the batches that mimo dumped
    regression/oracle/finetune.py check               the page's commands as they stand, then the same in fp64

`check` expects mimo and transformers to agree about the held-out loss of the exported model: to 2e-6 in fp32, to 1e-11 in fp64, and each
token's loss too; and about the imported one before the training.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys

import h5py
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig, NemotronH_Omni_Reasoning_V3, NemotronH_Omni_Reasoning_V3_Config, NemotronHConfig, RadioConfig

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.dont_write_bytecode = True
import model as hf   # noqa: E402

TOLERANCE = {"fp32": 2e-6, "fp64": 1e-11}
TEXT = dict(hybrid_override_pattern="MEM*E-", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=96,
            ssm_state_size=16, mamba_num_heads=8, mamba_head_dim=8, n_groups=2, conv_kernel=4, chunk_size=16, n_routed_experts=8,
            num_experts_per_tok=2, moe_intermediate_size=32, moe_shared_expert_intermediate_size=64, routed_scaling_factor=2.5,
            layer_norm_epsilon=1e-5, time_step_min=1e-30, use_cache=False, num_nextn_predict_layers=1, bos_token_id=1, eos_token_id=2)
VISION = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2.0, hidden_act="gelu_fast", patch_size=4, max_img_size=64,
              num_cls_tokens=1, num_registers=1, summary_idxs=[0], video_temporal_patch_size=2)


def draw(directory, tokenizer):
    from tokenizers import Tokenizer
    t = Tokenizer.from_file(tokenizer)
    torch.manual_seed(0)
    model = NemotronH_Omni_Reasoning_V3(NemotronH_Omni_Reasoning_V3_Config(
        text_config=NemotronHConfig(vocab_size=-(-t.get_vocab_size() // 64) * 64, **TEXT), vision_config=RadioConfig(**VISION), audio_config=None,
        image_token_id=t.token_to_id("<image>"), projector_hidden_size=512, vision_hidden_size=32, downsample_ratio=0.5, video_temporal_patch_size=2))
    model.save_pretrained(directory)
    shutil.copy(tokenizer, os.path.join(directory, "tokenizer.json"))
    print("%s: %d parameters, vocabulary %d" % (directory, sum(p.numel() for p in model.parameters()), model.config.text_config.vocab_size))


def held_out(directory, batches, double):
    """(loss per token over all batches, tokens, largest difference of a token's loss from mimo's)."""
    hf.as_double(double)
    model = NemotronH_Omni_Reasoning_V3.from_pretrained(directory, dtype=torch.float64 if double else torch.float32).eval()
    if double:
        model.language_model.set_experts_implementation("eager")
    patch = AutoConfig.from_pretrained(directory).vision_config.patch_size
    total, tokens, far = 0.0, 0, 0.0
    with h5py.File(batches, "r") as f:
        for name in sorted(g for g in f if g.startswith("iteration_")):
            b = f[name]
            labels, more = torch.from_numpy(b["labels"][()]), {}
            if len(b["imgs_sizes"]):
                more = {"pixel_values": torch.from_numpy(b["patches"][()]).to(model.dtype), "image_grid_hw": torch.from_numpy(b["imgs_sizes"][()] // patch).long()}
            with torch.no_grad():
                logits = model(input_ids=torch.from_numpy(b["input_ids"][()]), use_cache=False, **more).logits
            loss = F.cross_entropy(logits.flatten(0, 1).double(), labels.flatten(), ignore_index=-100, reduction="none").reshape(labels.shape).numpy()
            total, tokens = total + float(loss.sum()), tokens + int((labels != -100).sum())
            far = max(far, float(np.abs(loss - b["token_loss"][()]).max()))
    return total / tokens, tokens, far


# ---- the page and its test -----------------------------------------------------------------------------------------------------

def page():
    """The commands of docs/models.md under "From end to end"."""
    with open(os.path.join(ROOT, "docs", "models.md")) as f:
        section = f.read().split("\n## From end to end\n")[1]
    return re.sub(r"\\\n\s*", "", "\n".join(l[4:] for l in section.splitlines() if l.startswith("    "))).splitlines()


def own_loss(run, row):
    with h5py.File(os.path.join(ROOT, run, "trace.h5"), "r") as f:
        return float(f["eval/lm_loss"][:int(f["eval/rows"][()])][row])


def check(arg):
    env = dict(os.environ, HWLOC_PLUGINS_PATH="/nonexistent", UCX_TLS="self,posix", OPENBLAS_NUM_THREADS="1",
               PATH=os.path.dirname(os.path.abspath(sys.executable)) + ":" + os.environ["PATH"])
    bad = 0
    for precision in ("fp32", "fp64"):
        double = precision == "fp64"
        shutil.rmtree(os.path.join(ROOT, "run", "mine"), ignore_errors=True)
        for line in page():
            command = line.split("#")[0].strip()
            if not command or command.startswith(("tools/bootstrap.sh", "make")):
                continue   # this Python has what they install
            command = command.replace(".oracle/bin/python", sys.executable).replace("mpiexec", arg.mpiexec, 1) if " " in command else command
            if double:
                command = command.replace("run.train_iters=", "run.precision=fp64 run.train_iters=") + (" --dtype fp64" if "--export" in command else
                                                                                                       " --fp64" if " loss " in command else "")
            print("$ " + command, flush=True)
            p = subprocess.run(["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True)
            if p.returncode:
                sys.exit("status %d\n%s\n%s" % (p.returncode, p.stdout[-3000:], p.stderr[-3000:]))
            print("\n".join(l for l in p.stdout.splitlines() if re.search(r"validation loss|held-out|imported|tensors", l)), flush=True)
        start, end, again = own_loss("run/mine/tuned", 0), own_loss("run/mine/tuned", -1), own_loss("run/mine/held", -1)
        loss, tokens, far = held_out(os.path.join(ROOT, "run/mine/exported"), os.path.join(ROOT, "run/mine/held/batches.h5"), double)
        before, _, _ = held_out(os.path.join(ROOT, "run/mine/small"), os.path.join(ROOT, "run/mine/held/batches.h5"), double)
        for name, a, b in (("held-out loss of the exported model: mimo %.15g, transformers %.15g", end, loss),
                           ("of the imported one, before the training: mimo %.15g, transformers %.15g", start, before),
                           ("of the checkpoint, evaluated on its own: %.15g, in the run %.15g", again, end)):
            ok = abs(a - b) <= TOLERANCE[precision] * b
            bad += not ok
            print("%s %s %s, relative %.1e" % ("ok  " if ok else "WRONG", precision, name % (a, b), abs(a - b) / b), flush=True)
        ok = far <= 20 * TOLERANCE[precision] and end < start - 1
        bad += not ok
        print("%s %s every token's loss: largest difference %.1e; %d tokens; the training went from %.3f to %.3f" % (
            "ok  " if ok else "WRONG", precision, far, tokens, start, end), flush=True)
    shutil.rmtree(os.path.join(ROOT, "run", "mine"), ignore_errors=True)
    return 1 if bad else 0


def main():
    ap = argparse.ArgumentParser(description="fine-tune a Hugging Face model from end to end")
    sub = ap.add_subparsers(dest="action", required=True)
    d = sub.add_parser("draw", help="write a small model with random numbers")
    d.add_argument("directory")
    d.add_argument("--tokenizer", default=os.path.join(ROOT, "data", "demo", "tokenizer.json"))
    x = sub.add_parser("loss", help="held-out loss in transformers")
    x.add_argument("directory")
    x.add_argument("batches")
    x.add_argument("--fp64", action="store_true")
    k = sub.add_parser("check", help="run the page docs/models.md and compare")
    k.add_argument("--mpiexec", default="mpiexec.mpich")
    arg = ap.parse_args()
    torch.set_num_threads(2)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arg.action == "draw":
        return draw(arg.directory, arg.tokenizer)
    if arg.action == "check":
        return check(arg)
    loss, tokens, far = held_out(arg.directory, arg.batches, arg.fp64)
    print("held-out loss in transformers: %.6E over %d tokens; mimo's losses of single tokens differ by at most %.1e" % (loss, tokens, far))


if __name__ == "__main__":
    sys.exit(main())
