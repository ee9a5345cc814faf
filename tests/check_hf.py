#!/usr/bin/env python3
"""Hugging Face directories in and out, without any of their libraries (hf.md; the comparison with transformers itself is
regression/oracle/import_*.py).

Export: names, shapes, types and every number against the checkpoint's own. Import: published and in-library spellings, four types, one
file and shards, alone and inside a vision-language model, on several layouts; import of an export is the same bits. Then everything that
must be refused: tensors missing, unexpected, of another shape, quantised, damaged, not finite; each key of config.json that contradicts
the deck. At last the published layouts: all names at tiny width, full size with sparse files whose headers alone are read.
"""
import ctypes
import json
import os
import resource
import shutil
import struct
import subprocess

import h5py
import numpy as np

import hf_files as hf
from harness import Mimo, Tap, everything

DECK = ("&run title = 'hf' backend = 'ref' train_iters = 1 /\n&language preset = 'tiny' make_vocab_size_divisible_by = %d /\n"
        "&data mock_pixels = 'normal' /\n&batch global_batch_size = 4 /\n&lr lr = 1e-3 lr_decay_style = 'constant' /\n&log log_interval = 1 /\n")
MLP = ("projector.vision_projection_type=mlp", "projector.projection_normalization=rmsnorm")
VLM = ("checkpoint.import_language=%s", "checkpoint.import_vision=%s", "checkpoint.import_projector=%s")


class Hf:
    def __init__(self):
        self.tap, self.m = Tap(), Mimo()
        self.runs = 0
        for unit in (4, 128):
            with open(self.m.path("deck%d.nml" % unit), "w") as f:
                f.write(DECK % unit)
        self.deck, self.padded = self.m.path("deck4.nml"), self.m.path("deck128.nml")

    def test(self, name, fault):
        self.tap.result(not fault, name, fault)

    def wanted(self, name):
        return not self.m.arg.k or self.m.arg.k in name

    def train(self, *overrides, ranks=0, deck=None):
        """(checkpoint of iteration 0, of iteration 1, stdout) or a text."""
        self.runs += 1
        out = self.m.path("run%d" % self.runs)
        status, stdout, stderr = self.m.run(deck or self.deck, "run.output_dir=" + out, "checkpoint.save=" + out, "checkpoint.save_initial=T",
                                            *overrides, ranks=ranks)
        if status != 0:
            return "status %s\n%s%s" % (status, stdout[-2000:], stderr[-2000:])
        return [os.path.join(out, "iter_%07d" % i, "checkpoint.h5") for i in (0, 1)] + [stdout + stderr]

    def export(self, checkpoint, name, *options):
        directory = self.m.path(name)
        status, stdout, stderr = self.m.run("--export", directory, checkpoint, *options)
        return directory if status == 0 else "status %s\n%s%s" % (status, stdout, stderr), stdout

    def check(self, directory, *overrides, want=5, words=(), never=(), deck=None, keys=VLM):
        """Text about `mimo --check` of an import: its status, and words that its errors must (not) say."""
        keys = [k % directory for k in keys]
        status, stdout, stderr = self.m.run("--check", deck or self.deck, *overrides, *keys)
        text = stderr if want else stdout
        faults = ["status %s, expected %s" % (status, want)] if status != want else []
        faults += ["says nothing of '%s'" % w for w in words if w not in text] + ["says '%s'" % w for w in never if w in text]
        return "\n".join(faults + [text[-3000:]]) if faults else ""


def same(found, expected):
    """Text on the first differences of two {name: array}, bit by bit."""
    out = ["only in one: %s" % n for n in sorted(set(found) ^ set(expected))]
    for n in sorted(set(found) & set(expected)):
        a, b = np.ascontiguousarray(found[n]), np.ascontiguousarray(expected[n])
        if a.shape != b.shape or a.dtype != b.dtype or a.tobytes() != b.tobytes():
            out.append("%s: %s %s and %s %s differ" % (n, a.dtype, a.shape, b.dtype, b.shape))
    return "\n".join(out[:10])


def model_of(checkpoint):
    with h5py.File(checkpoint, "r", locking=False) as f:
        out = {}
        f["model"].visititems(lambda n, o: out.__setitem__(n, o[()]) if isinstance(o, h5py.Dataset) else None)
        masters = {}
        if "optimizer" in f:
            f["optimizer"].visititems(lambda n, o: masters.__setitem__(n[:-7], o[()]) if n.endswith("/master") else None)
    return out, masters


# ---- export -----------------------------------------------------------------------------------------------------------------------

def export_vlm(t):
    got = t.train(*MLP, "stage.training_stage=3", deck=t.padded)
    if isinstance(got, str):
        return t.test("a vision-language model is exported", got)
    directory, said = t.export(got[1], "vlm")
    if not os.path.isdir(directory):
        return t.test("a vision-language model is exported", directory)
    tensors, meta = hf.read_file(os.path.join(directory, "model.safetensors"))
    constants = {n: x for n, x in tensors.items() if "input_conditioner" in n}
    plain = {hf.strip(n): x for n, (_, x) in tensors.items() if n not in constants}
    names = {**hf.language(hf.TINY, "language_model."), **hf.vision(hf.TINY_VISION, "vision_model."), **hf.final_norm(hf.TINY_VISION),
             **hf.projector(hf.TINY, hf.TINY_VISION)}
    fault = "" if {n: x.shape for n, (_, x) in tensors.items() if n not in constants} == names else "names or shapes: %s" % sorted(set(names) ^ set(tensors))
    fault = fault or same(plain, hf.from_checkpoint(got[1], hf.TINY, hf.TINY_VISION))
    fault = fault or ("" if {d for d, _ in tensors.values()} == {"F32"} and meta == {"format": "pt"} else "types or metadata")
    t.test("a vision-language model is exported: names, shapes, every number, the padding cut off", fault)
    wrong = [n for n, (_, x) in constants.items() if not np.array_equal(x.ravel(), np.float32(hf.MEAN if "mean" in n else hf.STD))]
    t.test("the two constants of the pictures are written", "" if len(constants) == 2 and not wrong else str(sorted(constants)))
    with open(os.path.join(directory, "config.json")) as f:
        config = json.load(f)
    text, v = config.get("text_config", {}), config.get("vision_config", {})
    wrong = [k for k in hf.TINY if k != "max_position_embeddings" and text.get(k) != hf.TINY[k]]
    wrong += [k for k in hf.TINY_VISION if v.get(k) != (list(hf.TINY_VISION[k]) if isinstance(hf.TINY_VISION[k], tuple) else hf.TINY_VISION[k])]
    more = {"architectures": ["NemotronH_Omni_Reasoning_V3"], "model_type": "nemotron_h_omni", "image_token_id": 499, "audio_config": None,
            "projector_hidden_size": 512, "vision_hidden_size": 32, "downsample_ratio": 0.5, "video_temporal_patch_size": 2,
            "dtype": "float32", "torch_dtype": "float32"}
    wrong += [k for k in more if config.get(k, "absent") != more[k]]
    wrong += [k for k, x in (("time_step_min", 1e-30), ("num_nextn_predict_layers", 1), ("model_type", "nemotron_h")) if text.get(k) != x]
    wrong += [k for k, x in (("video_temporal_patch_size", 2), ("model_type", "radio")) if v.get(k) != x] + [k for k in ("time_step_limit",) if k in text]
    t.test("its config.json says the run's sizes", "keys: %s" % wrong if wrong else "")
    again, _ = t.export(got[1], "vlm")
    t.test("an export overwrites nothing", "" if "status 6" in again and "not empty" in again else again)
    sharded, _ = t.export(got[1], "vlm-shards", "--shard-bytes", "100000")
    parts = hf.read_directory(sharded) if os.path.isdir(sharded) else {}
    files = len([n for n in os.listdir(sharded) if n.endswith(".safetensors")]) if parts else 0
    t.test("shards and their index hold the same tensors (%d files)" % files,
           "" if files > 5 and not same({n: x for n, (_, x) in parts.items()}, {n: x for n, (_, x) in tensors.items()}) else sharded)
    leftovers = [n for n in os.listdir(t.m.scratch) if ".tmp-" in n]
    t.test("no temporary directory is left", str(leftovers) if leftovers else "")


def export_types(t):
    got = t.train(*MLP, "run.precision=fp64", "vision.final_layernorm=F")
    if isinstance(got, str):
        return t.test("an fp64 run is exported", got)
    single, said = t.export(got[1], "single")
    double, _ = t.export(got[1], "double", "--dtype", "fp64")
    if not (os.path.isdir(single) and os.path.isdir(double)):
        return t.test("an fp64 run is exported", single + double)
    exact = hf.from_checkpoint(got[1], hf.TINY, hf.TINY_VISION)
    a = {hf.strip(n): x for n, (_, x) in hf.read_directory(single).items() if "conditioner" not in n}
    b = {hf.strip(n): x for n, (_, x) in hf.read_directory(double).items() if "conditioner" not in n}
    t.test("an fp64 run is exported as F32, and says how many numbers were rounded",
           same(a, {n: x.astype(np.float32) for n, x in exact.items()}) or ("" if "were rounded to F32" in said else said))
    t.test("an fp64 run is exported as F64 with --dtype fp64, without a last LayerNorm that it lacks", same(b, exact))
    with open(os.path.join(double, "config.json")) as f:
        config = json.load(f)
    t.test("config.json says so", "" if config["dtype"] == "float64" and config["text_config"]["num_nextn_predict_layers"] == 0 else str(config))


def as_bf16(name, out):
    """A checkpoint as a bf16 run on a GPU would have written it: every parameter bfloat16, expert biases fp32, all checksums right."""
    xxh = ctypes.CDLL("libxxhash.so.0").XXH3_64bits
    xxh.restype, xxh.argtypes = ctypes.c_uint64, (ctypes.c_char_p, ctypes.c_size_t)
    shutil.copy(name, out)
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_size(2)
    kind.set_ebias(127)
    with h5py.File(out, "r+", locking=False) as f:
        paths, blocks = f["manifest/path"][()], f["manifest/block"][()]
        raw = {}
        for k, path in enumerate(p.decode() for p in paths):
            if not path.startswith("/model/") or path.endswith("expert_bias"):
                continue
            x = f[path][()]
            raw[k] = np.frombuffer(hf.encode(x, "BF16"), "<u2").reshape(x.shape)
            attributes = dict(f[path].attrs)
            del f[path]
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_layout(h5py.h5d.CONTIGUOUS)
            d = h5py.h5d.create(f.id, path.encode(), kind, h5py.h5s.create_simple(x.shape), plist)
            d.write(h5py.h5s.ALL, h5py.h5s.ALL, raw[k], kind)
            for a, v in attributes.items():
                f[path].attrs[a] = v
        for b in blocks:
            if int(b["tensor"]) in raw:
                x = raw[int(b["tensor"])]
                part = x[tuple(slice(int(s), int(s + c)) for s, c in zip(b["start"], b["count"]))[:x.ndim]].tobytes()
                b["xxh3"] = xxh(part, len(part))
        f["manifest/block"][...] = blocks
        whole = b"".join(p.ljust(192, b"\0") for p in paths.tolist()) + b"".join(
            struct.pack("<q4q4qQ", b["tensor"], *b["start"], *b["count"], b["xxh3"]) for b in blocks)
        f["manifest"].attrs.modify("xxh3", np.uint64(xxh(whole, len(whole))))
        text = f["deck/text"][()].decode().replace("precision = 'fp32'", "precision = 'bf16'").replace("backend = 'ref'", "backend = 'cuda'")
        f["deck/text"][()] = text.encode()


def export_bf16(t):
    """What a run on GPUs saves is exported by any binary: BF16 as it is, expert biases F32."""
    got = t.train(*MLP, "stage.training_stage=3", ranks=4)
    if isinstance(got, str):
        return t.test("a bf16 run is exported", got)
    name = t.m.path("bf16.h5")
    as_bf16(got[1], name)
    directory, _ = t.export(name, "bf16")
    if not os.path.isdir(directory):
        return t.test("a bf16 run is exported", directory)
    found = {hf.strip(n): x for n, x in hf.read_directory(directory).items() if "conditioner" not in n}
    exact = hf.from_checkpoint(got[1], hf.TINY, hf.TINY_VISION)
    rounded = {n: x if n.endswith("correction_bias") else hf.decode(hf.encode(x, "BF16"), "BF16", x.shape) for n, x in exact.items()}
    kinds = {n for n, (d, _) in found.items() if d != ("F32" if n.endswith("correction_bias") else "BF16")}
    t.test("a bf16 run is exported: BF16 as it is, expert biases F32", same({n: x for n, (_, x) in found.items()}, rounded) or (str(kinds) if kinds else ""))
    wide, _ = t.export(name, "bf16-wide", "--dtype", "fp32")
    t.test("and as F32 without a change", same({hf.strip(n): x for n, (_, x) in hf.read_directory(wide).items() if "conditioner" not in n}, rounded)
           if os.path.isdir(wide) else wide)


def export_apart(t):
    got = t.train(ranks=2)   # affine projector
    if isinstance(got, str):
        return t.test("parts without a common form are exported apart", got)
    directory, said = t.export(got[1], "apart")
    if not os.path.isdir(directory):
        return t.test("parts without a common form are exported apart", directory)
    exact, found = hf.from_checkpoint(got[1], hf.TINY, hf.TINY_VISION), {}
    for part in ("language", "vision"):
        found.update({n: x for n, (_, x) in hf.read_directory(os.path.join(directory, part)).items() if "conditioner" not in n})
    found.update({n: x for n, (_, x) in hf.read_file(os.path.join(directory, "projector.safetensors"))[0].items()})
    moved = {n.replace("vision_final_layernorm.", "radio_model.model.norm."): x for n, x in exact.items()}
    kinds = [json.load(open(os.path.join(directory, p, "config.json")))["architectures"][0] for p in ("language", "vision")]
    t.test("parts without a common form are exported apart, and it says so",
           same(found, moved) or ("" if kinds == ["NemotronHForCausalLM", "RadioModel"] and "written apart" in said and "LayerNorm" in said else said))
    keys = ("checkpoint.import_language=%s/language" % directory, "checkpoint.import_vision=%s/vision" % directory,
            "checkpoint.import_projector=%s" % directory)
    back = t.train(*keys)
    t.test("and imported again they are the same bits", back if isinstance(back, str) else same(model_of(back[0])[0], model_of(got[1])[0]))
    alone = t.train("topology.layout=language_only", "checkpoint.import_language=%s/language" % directory)
    part = {n: x for n, x in model_of(got[1])[0].items() if n.startswith("language/")}
    if isinstance(alone, str):
        return t.test("a language model alone is imported and exported", alone)
    directory, _ = t.export(alone[0], "alone")
    found = {n: x for n, (_, x) in hf.read_directory(directory).items()} if os.path.isdir(directory) else {}
    t.test("a language model alone is imported and exported", same(model_of(alone[0])[0], part) or
           same(found, {n: x for n, x in hf.from_checkpoint(alone[0], hf.TINY).items()}))


def export_refused(t):
    def refuses(name, path, code, word, directory="never"):
        status, stdout, stderr = t.m.run("--export", t.m.path(directory), path)
        t.test("export refuses " + name, "" if status == code and word in stderr and not os.path.exists(t.m.path("never")) else
               "status %s\n%s%s" % (status, stdout, stderr))
    with open(t.m.path("text"), "w") as f:
        f.write("no checkpoint\n")
    got = t.train(*MLP, "stage.training_stage=3")
    if isinstance(got, str):
        return t.test("export refuses damaged checkpoints", got)
    trace = os.path.join(os.path.dirname(got[1]), "..", "trace.h5")
    damaged = t.m.path("damaged.h5")
    shutil.copy(got[1], damaged)
    with h5py.File(damaged, "r+", locking=False) as f:
        f["model/language/decoder.layers.4.mlp.experts.linear_fc2.weight"][5, 3, 7] += 1.0
    lacking = t.m.path("lacking.h5")
    shutil.copy(got[1], lacking)
    with h5py.File(lacking, "r+", locking=False) as f:
        del f["model/vision/class_token"]
    refuses("what is no checkpoint", t.m.path("text"), 5, "error")
    refuses("what is not there", t.m.path("absent"), 5, "No such file")
    refuses("a trace", trace, 5, "no checkpoint of mimo")
    refuses("a damaged number", damaged, 5, "are damaged")
    refuses("a missing tensor", lacking, 5, "class_token: missing")
    p = subprocess.run([t.m.binary, "--export", t.m.path("never"), got[1]], capture_output=True, text=True,
                       preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000)))
    left = [n for n in os.listdir(t.m.scratch) if n.startswith("never")]
    t.test("an export that finds no room leaves nothing", "" if p.returncode == 6 and "File too large" in p.stderr and not left else
           "status %s %s %s" % (p.returncode, p.stderr, left))
    refuses("a directory in nowhere", got[1], 6, "cannot make the directory", "no/such/place")


def export_streams(t):
    """Stage 1 trains the projector only, so that a large language model needs no optimizer."""
    got = t.train("stage.training_stage=1", "language.vocab_size=262144", "language.hybrid_layer_pattern=----", "language.ffn_hidden_size=65536",
                  "language.hidden_size=256", "mamba.mamba_num_heads=8", "checkpoint.no_save_optim=T", "batch.global_batch_size=1",
                  "language.seq_length=32", "data.image_seq_length=4", "data.num_image_tiles=1", deck=t.padded)
    if isinstance(got, str):
        return t.test("an export streams", got)
    size = os.path.getsize(got[1])
    with h5py.File(got[1], "r") as f:
        largest = f["model/language/output_layer.weight"].nbytes
    p = subprocess.Popen([t.m.binary, "--export", t.m.path("large"), got[1]], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    text = p.stderr.read().decode()
    _, status, usage = os.wait4(p.pid, 0)
    peak = usage.ru_maxrss * 1024
    t.test("an export streams: %.0f MB at the peak for %.0f MB, the largest tensor %.0f MB" % (peak / 1e6, size / 1e6, largest / 1e6),
           "" if status == 0 and size > 8e8 and peak < 2e8 else "status %s, %s" % (status, text))
    for name in ("large", "run%d" % t.runs):
        shutil.rmtree(t.m.path(name), ignore_errors=True)


# ---- import -----------------------------------------------------------------------------------------------------------------------

def import_layouts(t):
    for precision, option in (("fp32", ()), ("fp64", ("--dtype", "fp64"))):
        got = t.train(*MLP, "run.precision=" + precision, "stage.training_stage=3")
        directory = got if isinstance(got, str) else t.export(got[1], "out-" + precision, *option, "--shard-bytes", "200000")[0]
        if not os.path.isdir(directory):
            t.test("import of an export, " + precision, directory)
            continue
        exact = model_of(got[1])[0]
        keys = [k % directory for k in VLM]
        for ranks, layout in ((0, ()), (2, ("topology.layout=disjoint",)), (4, ("topology.layout=disjoint", "topology.encoder_tp=2", "topology.llm_tp=2")),
                              (4, ("topology.layout=colocated", "topology.llm_tp=2", "topology.llm_ep=2", "topology.encoder_tp=4")),
                              (4, ("topology.layout=colocated", "topology.llm_ep=4"))):
            back = t.train(*MLP, "run.precision=" + precision, "stage.training_stage=3", "run.seed=99", *keys, *layout, ranks=ranks)
            fault = back if isinstance(back, str) else same(model_of(back[0])[0], exact)
            if not fault:
                masters = model_of(back[0])[1]
                fault = "" if len(masters) == len(exact) - 2 else "%d masters" % len(masters)   # two expert biases have none
                fault = fault or same(masters, {n: exact[n] for n in masters})
            t.test("import of an export is the same bits, masters too: %s, %d ranks %s" % (precision, max(ranks, 1), " ".join(layout)), fault)
        if precision == "fp32":
            end = model_of(back[1])[0]
            t.test("the step after it starts from the imported numbers",
                   "" if max(float(np.abs(end[n] - exact[n]).max()) for n in exact if "bias" not in n) < 0.01 else "far away")


def import_bf16(t):
    """From fp32 into a run on a GPU: each number rounded once, masters as loaded, and the export has the same bytes."""
    name = "import into a bf16 run: rounded to nearest even, masters too, exported as they are"
    if "cuda=no" in t.m.run("--features")[1].split():
        return t.tap.skip(name, "this program has no CUDA")
    b = Base(t)
    got = t.train(*NO_NORM, *[k % b.write() for k in VLM], "stage.training_stage=3", "run.backend=cuda", "run.precision=bf16")
    if isinstance(got, str):
        return t.tap.skip(name, "no GPU here") if got.startswith("status 3") else t.test(name, got)
    kinds = {hf.strip(n): "F32" if n.endswith("correction_bias") else "BF16" for n in b.names}
    exact = {hf.strip(n): hf.decode(hf.encode(b.r.array(n, s), kinds[hf.strip(n)]), kinds[hf.strip(n)], s) for n, s in b.names.items()}
    found = hf.from_checkpoint(got[0], hf.TINY, hf.TINY_VISION)
    fault = same({n: np.asarray(x, np.float32) for n, x in found.items()}, {n: exact[n] for n in found})
    model, masters = model_of(got[0])
    fault = fault or same(masters, {n: np.asarray(model[n], np.float32) for n in masters}) or ("" if len(masters) == len(model) - 2 else "%d masters" % len(masters))
    directory, _ = t.export(got[0], "bf16-back")
    back = {hf.strip(n): x for n, x in hf.read_directory(directory).items() if "conditioner" not in n} if os.path.isdir(directory) else {}
    t.test(name, fault or same({n: x for n, (_, x) in back.items()}, {n: exact[n] for n in found}) or
           ("" if all(back[n][0] == kinds[n] for n in back) else "types"))


def spelled(t, name, tensors, values, config, expected, keys, *overrides, shards=1, notes=()):
    """Import a directory and compare the checkpoint with `expected` {published name: array}."""
    if not (t.wanted(name) or t.wanted("import_spellings")):
        return
    directory = t.m.path(name.replace(" ", "-"))
    hf.write_directory(directory, tensors, values, shards)
    hf.write_config(directory, config)
    got = t.train(*[k % directory for k in keys], *overrides)
    if isinstance(got, str):
        return t.test(name, got)
    found = hf.from_checkpoint(got[0], hf.TINY, None if "topology.layout=language_only" in overrides else hf.TINY_VISION)
    found = {n: x for n, x in found.items() if n in expected}
    fault = same(found, {n: np.asarray(x, np.float32) for n, x in expected.items()})
    t.test(name, fault or "\n".join("the log lacks '%s'" % n for n in notes if n not in got[2]))


def import_spellings(t):
    """Every way to write a model down gives the same numbers."""
    only, lm = ("topology.layout=language_only",), ("checkpoint.import_language=%s",)
    names = hf.language(hf.TINY)
    for dtype in ("BF16", "F16", "F32", "F64"):
        r = hf.Random(1)
        tensors = {n: (dtype, s) for n, s in names.items()}
        exact = {n: hf.decode(hf.encode(r.array(n, s), dtype), dtype, s).astype(np.float32) for n, s in names.items()}
        rounded = "0 of them" if dtype != "F64" else " of them rounded to fp32"
        spelled(t, "published language model " + dtype, tensors, r.bytes(tensors), hf.TINY, exact, lm, *only, shards=3 if dtype == "F16" else 1,
                notes=("of them rounded to fp32" if dtype == "F64" else ", 0 of them rounded",))
    r = hf.Random(2)
    for n, s in names.items():
        r.made[n] = hf.decode(hf.encode(r.array(n, s), "BF16"), "BF16", s).astype("<f8")
    mixed = {n: ("F32" if n.endswith(("A_log", "D", "dt_bias", "e_score_correction_bias")) else "BF16", s) for n, s in names.items()}
    exact = {n: r.array(n, s) for n, s in names.items()}
    spelled(t, "mixed types", mixed, r.bytes(mixed), hf.TINY, exact, lm, *only)

    def renamed(of):
        """The numbers of other names: {new: (dtype, shape)}, bytes."""
        tensors = {new: ("F32", np.asarray(x).shape) for new, x in of.items()}
        return tensors, lambda n: hf.encode(of[n], "F32")

    def fused(values):
        out = {n: x for n, x in values.items() if ".experts." not in n}
        for i, kind in enumerate(hf.TINY["hybrid_override_pattern"]):
            for k in ("up_proj", "down_proj") if kind == "E" else ():
                out["backbone.layers.%d.mixer.experts.%s" % (i, k)] = np.stack(
                    [values["backbone.layers.%d.mixer.experts.%d.%s.weight" % (i, j, k)] for j in range(8)])
        return out
    in_library = {n.replace("backbone.", "model."): x for n, x in fused(exact).items()}
    assert {n: x.shape for n, x in in_library.items()} == hf.language(hf.TINY, library=True, fused=True)
    list_config = {k: v for k, v in hf.TINY.items() if k != "hybrid_override_pattern"}
    list_config["layers_block_type"] = ["linear_attention", "moe", "mamba", "full_attention", "moe", "mlp"]
    spelled(t, "in-library language model", *renamed(in_library), list_config, exact, lm, *only)

    v = hf.TINY_VISION
    vnames = {**hf.vision(v), **hf.more_vision(v)}
    r.made.update({n: np.float32(r.array(n, s)).astype("<f8") for n, s in vnames.items()})
    vexact = {n: r.array(n, s) for n, s in hf.vision(v).items()}
    everything_ = {n: r.array(n, s) for n, s in vnames.items()}
    radio = ("checkpoint.import_vision=%s",)
    spelled(t, "published encoder", *renamed(everything_), v, vexact, radio, notes=("video embedder 1", "starts with weight 1 and bias 0"))
    aliases = {"patch_generator.cls_token.token": "embeddings.cls_register_token", "patch_generator.pos_embed": "embeddings.position_embedding",
               "patch_generator.embedder.weight": "embeddings.patch_projection.weight"}

    def library(values):
        out = {}
        for n, x in values.items():
            n = n.replace("radio_model.model.", "")
            n = aliases.get(n, n.replace("blocks.", "encoder.layer.").replace("attn.proj", "attention.o_proj"))
            if "attn.qkv" in n:
                out.update({n.replace("attn.qkv", "attention.%s_proj" % k): p for k, p in zip("qkv", np.split(x, 3))})
            else:
                out[n] = x
        return out
    assert {n: x.shape for n, x in library(vexact).items()} == hf.vision(v, library=True)
    spelled(t, "in-library encoder", *renamed(library(vexact)), v, vexact, radio)
    split = {}
    for n, x in vexact.items():
        split.update({n.replace("attn.qkv", "attn.%s_proj" % k): p for k, p in zip("qkv", np.split(x, 3))} if "attn.qkv" in n else {n: x})
    assert {n: x.shape for n, x in split.items()} == hf.vision(v, split=True)
    spelled(t, "encoder with split attention", *renamed(split), v, vexact, radio)
    ones = {**vexact, **{"radio_model.model.blocks.%d.layer_scale%d.lambda1" % (i, k): np.ones(32) for i in range(2) for k in (1, 2)}}
    spelled(t, "layer scales of one", *renamed(ones), v, vexact, radio)
    scaled, folded = dict(vexact), dict(vexact)
    for i in range(2):
        for k, target in ((1, "attn.proj"), (2, "mlp.fc2")):
            s = np.float32(np.linspace(0.5, 1.5, 32)).astype("<f8")
            scaled["radio_model.model.blocks.%d.ls%d.gamma" % (i, k)] = s
            for e in ("weight", "bias"):
                n = "radio_model.model.blocks.%d.%s.%s" % (i, target, e)
                folded[n] = (folded[n].T * s).T
    spelled(t, "layer scales are folded", *renamed(scaled), v, folded, radio, notes=("folded the layer scales",))
    normed = {**vexact, **{"radio_model.model.norm.weight": np.linspace(1, 2, 32), "radio_model.model.norm.bias": np.linspace(-1, 1, 32)}}
    both = {**vexact, "vision_final_layernorm.weight": np.linspace(1, 2, 32), "vision_final_layernorm.bias": np.linspace(-1, 1, 32)}
    spelled(t, "encoder with its own last norm", *renamed(normed), v, both, radio)

    # the whole: published names, two shards, with audio; and the in-library one
    whole = {**{"language_model." + n: x for n, x in exact.items()}, **{"vision_model." + n: x for n, x in everything_.items()},
             **{n: np.float32(r.array(n, s)) for n, s in hf.projector(hf.TINY, v).items()},
             **{n: np.zeros(s) for n, s in hf.audio(20).items()}, "mtp.layers.0.norm.weight": np.zeros(64)}
    inside = {**exact, **vexact, **{n: np.float32(r.array(n, s)) for n, s in hf.projector(hf.TINY, v).items()}}
    spelled(t, "published vision-language model", *renamed(whole), hf.vlm_config(hf.TINY, v), inside, VLM, *MLP, "vision.final_layernorm=F", shards=4,
            notes=("audio 20", "multi-token prediction 1", "video embedder 1"))
    later = {**whole, **{"vision_projector.vision_final_layernorm." + e: both["vision_final_layernorm." + e] for e in ("weight", "bias")}}
    spelled(t, "vision-language model with a last norm", *renamed(later), hf.vlm_config(hf.TINY, v), {**inside, **both}, VLM, *MLP)
    spelled(t, "only the language model of it", *renamed(whole), hf.vlm_config(hf.TINY, v), exact, lm, *MLP, notes=("encoder ", "projector "))
    lib = {**{"language_model." + n: x for n, x in in_library.items()}, **{"vision_model." + n: x for n, x in library(vexact).items()},
           **dict(zip(hf.projector(hf.TINY, v, library=True), (inside["mlp1.%d.weight" % k] for k in (0, 1, 3))))}
    spelled(t, "in-library vision-language model", *renamed(lib), hf.vlm_config(list_config, v, published=False), inside, VLM, *MLP,
            "vision.final_layernorm=F")


def published_bytes(t):
    """BF16 -> checkpoint.h5 -> BF16: the very bytes of every tensor that has a parameter, the companions unchanged."""
    names = {**hf.language(hf.TINY, "language_model."), **hf.vision(hf.TINY_VISION, "vision_model."), **hf.more_vision(hf.TINY_VISION, "vision_model."),
             **hf.projector(hf.TINY, hf.TINY_VISION), **hf.final_norm(hf.TINY_VISION)}
    tensors, r = {n: ("F32" if n.endswith("correction_bias") else "BF16", s) for n, s in names.items()}, hf.Random(6)
    directory = t.m.path("bytes")
    hf.write_directory(directory, tensors, r.bytes(tensors), 2)
    hf.write_config(directory, hf.vlm_config({**hf.TINY, "bos_token_id": 1, "eos_token_id": [2, 11], "pad_token_id": 0, "max_position_embeddings": 262144},
                                             hf.TINY_VISION))
    companions = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json",
                  "preprocessor_config.json", "processor_config.json", "LICENSE")
    for n in companions:
        with open(os.path.join(directory, n), "wb") as f:
            f.write(b"{}" if n == "preprocessor_config.json" else b"any bytes \xff of " + n.encode())
    got = t.train(*MLP, *[k % directory for k in VLM])
    out = got if isinstance(got, str) else t.export(got[0], "bytes-out", "--dtype", "bf16")[0]
    if not os.path.isdir(out):
        return t.test("published, imported and exported again: the same bytes", out)
    back = hf.read_directory(out)
    wrong = [n for n in names if "video" not in n and (n not in back or back[n][0] != tensors[n][0] or
                                                       hf.encode(back[n][1], back[n][0]) != r.bytes(tensors)(n))]
    t.test("published, imported and exported again: the same bytes", str(wrong[:5]) if wrong or len(back) != len(names) - 1 else "")
    wrong = [n for n in companions if open(os.path.join(out, n), "rb").read() != open(os.path.join(directory, n), "rb").read()]
    with open(os.path.join(out, "config.json")) as f:
        config = json.load(f)
    kept = [config["text_config"].get(k) for k in ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")]
    t.test("tokenizer, template, licence and token ids go with it", "" if not wrong and kept == [1, [2, 11], 0, 262144] and
           config["dtype"] == "bfloat16" else "%s %s %s" % (wrong, kept, config["dtype"]))


class Base:
    """A good published directory at tiny width, to be spoiled."""

    def __init__(self, t, name="base"):
        self.t, self.r, self.n = t, hf.Random(3), 0
        self.names = {**hf.language(hf.TINY, "language_model."), **hf.vision(hf.TINY_VISION, "vision_model."), **hf.more_vision(hf.TINY_VISION, "vision_model."),
                      **hf.projector(hf.TINY, hf.TINY_VISION)}
        self.config = hf.vlm_config(hf.TINY, hf.TINY_VISION)

    def write(self, tensors=None, config=None, values=None, directory=None):
        self.n += 1
        directory = directory or self.t.m.path("spoiled%d" % self.n)
        tensors = tensors or {n: ("F32", s) for n, s in self.names.items()}
        hf.write_directory(directory, tensors, values or self.r.bytes(tensors))
        hf.write_config(directory, config or self.config)
        return directory


NO_NORM = MLP + ("vision.final_layernorm=F",)


def import_strict(t):
    b = Base(t)
    good = b.write()
    t.test("a good directory passes --check, which says what is not used",
           t.check(good, *NO_NORM, want=0, words=("101 of 104 tensors", "video embedder 1", "MiB read")))
    tensors = {n: ("F32", s) for n, s in b.names.items()}
    x = "language_model.backbone.layers."
    for n in (x + "0.mixer.A_log", x + "2.mixer.A_log", "mlp1.0.weight", "vision_model.radio_model.model.blocks.1.attn.qkv.bias",
              *(x + "1.mixer.experts.%d.up_proj.weight" % j for j in (1, 2, 3, 7))):
        del tensors[n]
    tensors[x + "0.mixer.surplus"] = tensors[x + "2.mixer.surplus"] = ("F32", (2,))
    tensors["extra"] = ("F32", (2,))
    tensors["vision_model.radio_model.model.blocks.2.norm1.weight"] = ("F32", (32,))
    tensors[x + "0.mixer.D"] = ("F32", (9,))
    tensors["mlp1.3.weight"] = ("F32", (512, 64))
    tensors[x + "4.mixer.gate.weight"] = ("I64", (8, 64))
    t.test("missing, unexpected, wrong shape and wrong type are all listed at once",
           t.check(b.write(tensors, values=hf.Random(4).bytes(tensors)), *NO_NORM, words=(
               "backbone.layers.{0,2}.mixer.A_log: missing, of shape [8]", "mlp1.0.weight: missing", "blocks.1.attn.qkv.bias: missing, of shape [96]",
               "backbone.layers.1.mixer.experts.{1-3,7}.up_proj.weight: missing", "layers.{0,2}.mixer.surplus: unexpected", "extra: unexpected",
               "blocks.2.norm1.weight: unexpected", "layers.0.mixer.D: has shape [9], this model needs [8]",
               "mlp1.3.weight: has shape [512,64], this model needs [64,512]", "layers.4.mixer.gate.weight: has type I64")))
    got = t.train(*NO_NORM, *[k % t.m.path("spoiled2") for k in VLM], ranks=2)
    t.test("and they end a run with 5, on two ranks", "" if isinstance(got, str) and got.startswith("status 5") and "extra: unexpected" in got else str(got))
    for name, dtype, word in ((x + "0.mixer.in_proj.bias", "F32", "no bias"), (x + "1.mixer.experts.0.up_proj.weight_scale_inv", "F32", "quantised"),
                              (x + "1.mixer.fc1_latent_proj.weight", "F32", "latent"), (x + "0.mixer.in_proj.weight_scale", "F32", "quantised"),
                              ("vision_model.radio_model.model.blocks.0.attn.qkv.parametrizations.weight.0.scale", "F32", "parametri")):
        tensors = {n: ("F32", s) for n, s in b.names.items()}
        tensors[name] = (dtype, (4,))
        t.test("refused by its kind: " + name, t.check(b.write(tensors), *NO_NORM, words=(word,)))
    tensors = {n: ("F32", s) for n, s in b.names.items()}
    tensors[x.replace("language_model.backbone", "language_model.model") + "0.mixer.D"] = ("F32", (8,))
    t.test("two spellings of one parameter are refused", t.check(b.write(tensors), *NO_NORM, words=("are the same parameter",)))
    r = hf.Random(3)
    r.made["vision_model.radio_model.input_conditioner.norm_mean"] = np.full((3, 1, 1), 0.5)
    tensors = {n: ("F32", s) for n, s in b.names.items()}
    t.test("other constants of the pictures are refused", t.check(b.write(tensors, values=r.bytes(tensors)), *NO_NORM, words=("norm_mean: 0.5, 0.5, 0.5",)))
    half = {n: ("BF16", s) for n, s in b.names.items()}
    t.test("in BF16 they are as good as BF16", t.check(b.write(half), *NO_NORM, want=0))
    for kind in ("BF16", "F16", "F32", "F64"):
        tensors = {n: (kind, s) for n, s in b.names.items()}
        t.test("--check of a bf16 run on GPUs takes %s" % kind, t.check(b.write(tensors), *NO_NORM, "run.backend=cuda", "run.precision=bf16", want=0,
                                                                       words=("101 of 104 tensors", "MiB read")))
    tensors = {n: ("F32", s) for n, s in b.names.items()}
    for bad in (np.nan, np.inf):
        r = hf.Random(3)
        name = x + "4.mixer.experts.3.down_proj.weight"
        r.array(name, (64, 32))[5, 5] = bad
        directory = b.write(tensors, values=r.bytes(tensors))
        got = t.train(*NO_NORM, *[k % directory for k in VLM])
        t.test("%s in the weights ends the run with 5" % bad, "" if isinstance(got, str) and got.startswith("status 5") and name + ": elements" in got else str(got))
    t.test("an encoder that ends with no LayerNorm, but with its projector, needs vision.final_layernorm = .false.",
           t.check(good, *MLP, words=("vision.final_layernorm = .false.",)))
    t.test("a last LayerNorm in the directory needs vision.final_layernorm = .true.",
           t.check(b.write({**tensors, **{n: ("F32", s) for n, s in hf.final_norm(hf.TINY_VISION).items()}}), *NO_NORM,
                   words=("vision_final_layernorm.weight: unexpected", "vision.final_layernorm = .true.")))
    t.test("a projector of another kind is named by its key", t.check(good, "vision.final_layernorm=F", words=(
        "encoder.weight: missing", "mlp1.{1,3}.weight: unexpected", "vision_projection_type = 'mlp'")))
    t.test("without the expert bias its tensors are unexpected", t.check(good, *NO_NORM, "moe.moe_router_enable_expert_bias=F", words=(
        "backbone.layers.{1,4}.mixer.gate.e_score_correction_bias: unexpected", "moe_router_enable_expert_bias")))


def import_damaged(t):
    b = Base(t)
    good = b.write()
    data = open(os.path.join(good, "model.safetensors"), "rb").read()

    def spoil(name, change, words, run=False):
        directory = b.write()
        change(directory)
        fault = t.check(directory, *NO_NORM, words=words)
        t.test("damaged: " + name, fault)
    file = lambda d: os.path.join(d, "model.safetensors")
    rewrite = lambda content: lambda d: open(file(d), "wb").write(content)
    spoil("cut in the data", rewrite(data[:-5]), ("bytes of data",))
    spoil("cut in the header", rewrite(data[:100]), ("claims a header",))
    spoil("empty", rewrite(b""), ("no safetensors file",))
    spoil("longer than its tensors", rewrite(data + b"x"), ("end at byte",))
    spoil("huge header", rewrite(b"\xff" * 8 + data[8:]), ("claims a header",))
    spoil("no JSON", rewrite(data[:8] + b"{" + b"x" * (len(data) - 9)), ("no JSON",))
    spoil("no file", lambda d: os.unlink(file(d)), ("neither",))
    spoil("no config.json", lambda d: os.unlink(os.path.join(d, "config.json")), ("config.json: No such file",))
    spoil("a config.json that is no JSON", lambda d: hf.write_config(d, "{"), ("config.json",))
    spoil("a config.json that is a list", lambda d: hf.write_config(d, "[]"), ("no object",))
    spoil("a config.json of brackets", lambda d: hf.write_config(d, "[" * 100000), ("deeper",))
    link = lambda d: (os.unlink(file(d)), os.symlink("model.safetensors", file(d)))
    spoil("a link to itself", link, ("Too many levels",))
    t.test("a directory that is not there is a note of --check", t.check(t.m.path("nowhere"), *NO_NORM, want=0, words=("not here: not checked",)))
    got = t.train(*NO_NORM, *[k % t.m.path("nowhere") for k in VLM])
    t.test("and the end of a run", "" if isinstance(got, str) and got.startswith("status 5") and "No such file" in got else str(got))
    linked = t.m.path("linked")
    os.makedirs(linked)
    for n in os.listdir(good):
        os.symlink(os.path.join(good, n), os.path.join(linked, n))
    t.test("a download cache of links is read", t.check(linked, *NO_NORM, want=0, words=("101 of 104",)))


# A key of the configuration (text, vision, top) with a value that contradicts the deck, and a word of the complaint.
CONTRADICTIONS = [
    ("text", "hidden_size", 65, "language.hidden_size"), ("text", "vocab_size", 501, "language.vocab_size"),
    ("text", "layer_norm_epsilon", 1e-6, "language.layernorm_epsilon"), ("text", "num_attention_heads", 8, "language.num_attention_heads"),
    ("text", "num_key_value_heads", 4, "language.num_query_groups"), ("text", "head_dim", 8, "language.kv_channels"),
    ("text", "intermediate_size", 97, "language.ffn_hidden_size"), ("text", "mamba_num_heads", 4, "mamba.mamba_num_heads"),
    ("text", "mamba_head_dim", 16, "mamba.mamba_head_dim"), ("text", "n_groups", 4, "mamba.mamba_num_groups"),
    ("text", "ssm_state_size", 8, "mamba.mamba_state_dim"), ("text", "conv_kernel", 5, "mamba.linear_conv_kernel_dim"),
    ("text", "n_routed_experts", 9, "moe.num_experts"), ("text", "num_experts_per_tok", 3, "moe.moe_router_topk"),
    ("text", "routed_scaling_factor", 1.0, "moe.moe_router_topk_scaling_factor"), ("text", "moe_intermediate_size", 33, "moe.moe_ffn_hidden_size"),
    ("text", "moe_shared_expert_intermediate_size", 65, "moe.moe_shared_expert_intermediate_size"),
    ("text", "hybrid_override_pattern", "MEM*EE", "language.hybrid_layer_pattern"), ("text", "hybrid_override_pattern", "MEM*E?", "a layer is"),
    ("text", "num_hidden_layers", 7, "has 6 layers"), ("text", "layers_block_type", ["moe"] * 6, "differ"), ("text", "layers_block_type", ["rnn"], "rnn"),
    ("text", "norm_topk_prob", False, "has only true"), ("text", "n_group", 2, "has only 1"), ("text", "topk_group", 2, "has only 1"),
    ("text", "n_shared_experts", 2, "has only 1"), ("text", "moe_latent_size", 1024, "has only null"), ("text", "mlp_hidden_act", "silu", "relu2"),
    ("text", "mamba_hidden_act", "gelu", "silu"), ("text", "use_conv_bias", False, "has only true"), ("text", "tie_word_embeddings", True, "has only false"),
    ("text", "attention_bias", True, "has only false"), ("text", "mlp_bias", True, "has only false"), ("text", "use_bias", True, "has only false"),
    ("text", "mamba_proj_bias", True, "has only false"), ("text", "n_groups", None, "n_groups is not given"), ("text", "hidden_size", "64", "no integer"),
    ("text", "hidden_size", 64.5, "no integer"), ("vision", "hidden_size", 64, "vision.hidden_size"), ("vision", "num_hidden_layers", 3, "vision.num_layers"),
    ("vision", "num_attention_heads", 2, "vision.num_attention_heads"), ("vision", "mlp_ratio", 4.0, "vision.ffn_hidden_size"),
    ("vision", "patch_size", 8, "vision.patch_dim"), ("vision", "max_img_size", 128, "vision.max_img_h"), ("vision", "num_registers", 3, "vision.class_token_len"),
    ("vision", "use_swiglu_ffn", True, "has only false"), ("vision", "qkv_bias", False, "has only true"), ("vision", "vitdet_window_size", 14, "has only null"),
    ("vision", "layer_norm_eps", 1e-5, "has only 1e-6"), ("vision", "norm_mean", [0.5, 0.5, 0.5], "norm_mean differs"), ("top", "downsample_ratio", 0.25, "has only 0.5"),
    ("top", "ps_version", "v1", '"v2"'), ("top", "projector_hidden_size", 128, "projector_hidden_size"), ("top", "vit_hidden_size", 64, "vision_hidden_size"),
]


def config_keys(t):
    b = Base(t)
    directory = b.write()
    for section, key, value, word in CONTRADICTIONS:
        config = json.loads(json.dumps(b.config))
        (config if section == "top" else config["llm_config" if section == "text" else "vision_config"])[key] = value
        hf.write_config(directory, config)
        t.test("config.json: %s %s = %s" % (section, key, value), t.check(directory, *NO_NORM, words=(word,)))
    for section, aliases in (("llm_config", {"layer_norm_epsilon": "norm_eps", "head_dim": "attention_head_dim", "n_groups": "mamba_n_groups",
                                             "conv_kernel": "mamba_d_conv", "chunk_size": "mamba_chunk_size", "n_routed_experts": "num_local_experts"}),):
        config = json.loads(json.dumps(b.config))
        config[section] = {aliases.get(k, k): x for k, x in config[section].items()}
        hf.write_config(directory, config)
        t.test("config.json: aliases of keys", t.check(directory, *NO_NORM, want=0))
        config[section]["norm_eps"] = 2e-5
        hf.write_config(directory, config)
        t.test("config.json: an alias counts", t.check(directory, *NO_NORM, words=("norm_eps = 2e-05",)))
    text = json.dumps(b.config)
    traps = text.replace('"chunk_size": 16', '"time_step_limit": [0.0, Infinity], "a": -Infinity, "b": NaN, "c": "NaN, \\"Infinity", '
                         '"d": {"__float__": "Infinity"}, "eos_token_id": [1, 2], "n_groups": 7, "n_groups": 2, "chunk_size": 16')
    hf.write_config(directory, traps)
    t.test("config.json: Infinity, NaN and repeated keys are read", t.check(directory, *NO_NORM, want=0) if traps != text else "no trap")
    hf.write_config(directory, traps.replace('"n_groups": 7, "n_groups": 2', '"n_groups": 2, "n_groups": 7').replace('"n_groups": 2, "ssm', '"ssm'))
    t.test("config.json: the last of repeated keys counts", t.check(directory, *NO_NORM, words=("n_groups = 7",)))
    config = json.loads(json.dumps(b.config))
    config["llm_config"].update(max_position_embeddings=32, chunk_size=32)
    config["vision_config"]["hidden_act"] = "gelu"
    hf.write_config(directory, config)
    hf.write_config(directory, {"min_num_patches": 1024, "max_num_patches": 13312}, "preprocessor_config.json")
    t.test("config.json: what only deserves to be known is a note", t.check(directory, *NO_NORM, want=0, words=(
        "max_position_embeddings = 32", "mamba_chunk_size", "tanh form of GELU", "dynamic_resolution_min_patches", "= 13312")))
    hf.write_config(directory, {**b.config, "img_context_token_id": 18})
    t.test("config.json: another picture token than the deck's preset is a note", t.check(directory, *NO_NORM, want=0, words=("img_context_token_id = 18",)))
    t.test("config.json: another than the deck's own is an error", t.check(directory, *NO_NORM, "data.image_token_id=499", words=("img_context_token_id = 18",)))


def deck_rules(t):
    def refused(name, words, *overrides):
        status, stdout, stderr = t.m.run("--check", t.deck, *overrides)
        t.test(name, "" if status == 2 and all(w in stderr for w in words) else "status %s\n%s" % (status, stderr))
    refused("import and load exclude each other", ("exclusive with checkpoint.load",), "checkpoint.import_language=x", "checkpoint.load=y")
    refused("import and finetune exclude each other", ("exclusive with checkpoint.finetune",), "checkpoint.import_language=x", "checkpoint.save=y", "checkpoint.finetune=T")
    refused("a language model alone imports no encoder", ("has no pictures",), "checkpoint.import_vision=x", "topology.layout=language_only")


def resumed(t):
    """A run that goes on from its own checkpoint does not import again."""
    directory = Base(t).write()
    out = t.m.path("resumed")
    words = [t.deck, "run.output_dir=" + out, "checkpoint.save=" + out, *NO_NORM, *[k % directory for k in VLM], "run.train_iters=2"]
    first = t.m.run(*words, "run.exit_interval=1")
    shutil.rmtree(directory)
    second = t.m.run(*words)
    t.test("a resumed run takes its checkpoint, not the import", "" if (first[0], second[0]) == (75, 0) and "now the checkpoint counts" in second[1] and
           "imported" in first[1] else "%s\n%s\n%s" % (first, second[1][-1500:], second[2]))
    whole = t.m.path("whole")
    hf_dir = Base(t).write(directory=directory)
    third = t.m.run(t.deck, "run.output_dir=" + whole, "checkpoint.save=" + whole, *NO_NORM, *[k % hf_dir for k in VLM], "run.train_iters=2")
    end = [os.path.join(d, "iter_0000002", "checkpoint.h5") for d in (out, whole)]
    t.test("and ends with the same bits as the unbroken run", third[2] if third[0] else same(model_of(end[0])[0], model_of(end[1])[0]))


# ---- published layouts ------------------------------------------------------------------------------------------------------------

def published(name):
    """(tensors {name: (dtype, shape)}, config, preprocessor or None, options, tensors of language/vision/projector, parameters) of the full size."""
    big = dict(hf.TINY, hidden_size=2688, num_attention_heads=32, num_key_value_heads=2, head_dim=128, intermediate_size=1856, vocab_size=131072,
               mamba_num_heads=64, mamba_head_dim=64, n_groups=8, ssm_state_size=128, chunk_size=128, n_routed_experts=128, num_experts_per_tok=6,
               moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712, hybrid_override_pattern=hf.PATTERN["30B-A3B"],
               num_hidden_layers=52, max_position_embeddings=262144)
    vit = dict(hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, mlp_ratio=4.0, patch_size=16, max_img_size=2048, num_cls_tokens=3, num_registers=7)
    remote = {"args": {"model": "vit_huge_patch16_224", "cpe_max_size": 2048, "model_norm": None, "register_multiple": None,
                       "min_num_patches": 1024, "max_num_patches": 13312}, "patch_size": 16, "vitdet_window_size": None}
    bf16 = lambda names: {n: ("F32" if n.endswith("e_score_correction_bias") else "BF16", s) for n, s in names.items()}
    dense = lambda **more: {k: x for k, x in dict(big, **more).items() if "expert" not in k and "moe" not in k and not k.startswith(("norm_topk", "n_group", "topk", "routed"))} | {"n_groups": 8}
    if name == "Nemotron-3-Nano-30B-A3B":
        return bf16(hf.language(big)), big, None, (6243, 0, 0), (31577937344, 0)
    if name == "Nemotron-Nano-9B-v2":
        c = dense(hidden_size=4480, num_attention_heads=40, num_key_value_heads=8, intermediate_size=15680, mamba_num_heads=128, mamba_head_dim=80,
                  hybrid_override_pattern=hf.PATTERN["9B-v2"], num_hidden_layers=56, max_position_embeddings=131072)
        return bf16(hf.language(c)), c, None, (len(hf.language(c)), 0, 0), (8888227328, 0)
    if name in ("C-RADIOv2-H", "C-RADIOv4-H"):
        v = dict(vit, num_cls_tokens=4, num_registers=4) if name.startswith("C-RADIOv2") else vit
        tensors = {**hf.vision(v), **{n: s for n, s in hf.more_vision(v).items() if "video" not in n}, "radio_model.summary_idxs": (3,),
                   "adaptors.clip.head.weight": (1280, 1280), "feature_normalizer.clip.mean": (1280,)}
        config = {**remote, "args": {**remote["args"], "teachers": [{"name": "clip"}] * 3}, "version": "c-radio_" + name[8:10] + "-h"}
        return {n: ("I64" if "idxs" in n else "F32", s) for n, s in tensors.items()}, config, None, (0, 387, 0), (0, 651645440 if "v2" in name else 651648000)
    if name == "Nemotron-Nano-12B-v2-VL":
        c = dense(hidden_size=5120, num_attention_heads=40, num_key_value_heads=8, intermediate_size=20480, mamba_num_heads=128, mamba_head_dim=80,
                  hybrid_override_pattern=hf.PATTERN["12B-v2"], num_hidden_layers=62, vocab_size=131075, max_position_embeddings=131072)
        v = dict(vit, num_cls_tokens=16, num_registers=0)
        tensors = {**hf.language(c, "language_model."), **hf.vision(v, "vision_model."), **hf.more_vision(v, "vision_model."), **hf.projector(c, v)}
        return bf16(tensors), hf.vlm_config(c, {**remote, "hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "mlp_ratio": 4}) | {
            "img_context_token_id": 131072, "force_image_size": 512}, None, (len(hf.language(c)), 387, 3), (0, 651648000 - 2 * 1280 + 6 * 1280)
    tensors = {**hf.language(big, "language_model."), **hf.vision(vit, "vision_model."), **hf.more_vision(vit, "vision_model."),
               **hf.projector(big, vit), **hf.audio()}
    return bf16(tensors), hf.vlm_config(big, {**remote, "hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "mlp_ratio": 4}, published=True) | {
        "img_context_token_id": 18, "force_image_size": 512}, {"min_num_patches": 1024, "max_num_patches": 13312}, (6243, 387, 3), (31577937344, 651648000 - 2 * 1280)   # no last LayerNorm


FAMILIES = ("Nemotron-3-Nano-30B-A3B", "Nemotron-Nano-9B-v2", "Nemotron-Nano-12B-v2-VL", "C-RADIOv2-H", "C-RADIOv4-H", "Nemotron-Nano-Omni")
TEXT_ONLY = ("Nemotron-3-Nano-30B-A3B", "Nemotron-Nano-9B-v2")
# What 12 or 16 ranks are cut into; an odd vocabulary cannot be cut.
CUT = {"Nemotron-3-Nano-30B-A3B": ("topology.llm_tp=2", "topology.llm_ep=8"), "Nemotron-Nano-9B-v2": ("topology.llm_tp=2",),
       "Nemotron-Nano-12B-v2-VL": ("topology.layout=disjoint", "topology.encoder_dp=4", "topology.llm_dp=8")}
CUT_PICTURES = ("topology.layout=disjoint", "topology.encoder_dp=4", "topology.llm_tp=2", "topology.llm_dp=4", "topology.llm_ep=4")
RUN = ("run.train_iters=1", "lr.lr=1e-5", "run.precision=fp32")


def deck_of(t, directory):
    status, stdout, stderr = t.m.run("--deck-from-hf", directory)
    path = directory + ".nml"
    with open(path, "w") as f:
        f.write(stdout)
    return path if status == 0 else "status %s\n%s" % (status, stderr)


def tiny_widths(name):
    """The family's own names at tiny width."""
    tensors, config, preprocessor, count, _ = published(name)
    shrink = {k: hf.TINY[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "mamba_num_heads",
                                      "mamba_head_dim", "n_groups", "ssm_state_size", "chunk_size", "moe_intermediate_size",
                                      "moe_shared_expert_intermediate_size")} | {"vocab_size": 512}
    v = dict(hf.TINY_VISION, num_hidden_layers=32)
    if name.startswith("C-RADIO"):
        v["num_registers"] = 7 if "v2" in name else 9
        names = {**hf.vision(v), "radio_model.input_conditioner.norm_mean": (3, 1, 1), "radio_model.input_conditioner.norm_std": (3, 1, 1),
                 "radio_model.summary_idxs": (3,), "adaptors.clip.head.weight": (4, 4), "feature_normalizer.clip.mean": (4,)}
        return {n: ("I64" if "idxs" in n else "F32", s) for n, s in names.items()}, v, None, count
    text = {**config.get("llm_config", config), **{k: x for k, x in shrink.items() if k in config.get("llm_config", config)}}
    full = {**hf.TINY, **text}
    if "llm_config" not in config:
        return {n: (tensors[n][0], s) for n, s in hf.language(full).items()}, text, None, count
    v["num_registers"] = 9
    names = {**hf.language(full, "language_model."), **hf.vision(v, "vision_model."), **hf.more_vision(v, "vision_model."), **hf.projector(full, v), **hf.audio()}
    return {n: (tensors[n][0], s) for n, s in names.items() if n in tensors or "sound" not in n}, hf.vlm_config(text, v), None, count


def published_tiny(t, name):
    tensors, config, preprocessor, count = tiny_widths(name)
    directory = t.m.path("tiny-" + name)
    r = hf.Random(5)
    hf.write_directory(directory, tensors, r.bytes(tensors), shards=1 if name.startswith("C-RADIO") else 3)
    hf.write_config(directory, config)
    assert set(tensors) == set(published(name)[0]), "other names than at full size"
    deck = deck_of(t, directory)
    if not os.path.exists(deck):
        return t.test("published names of %s at tiny width" % name, deck)
    extra = ("language.preset=tiny", "vision.preset=custom") if name.startswith("C-RADIO") else ()
    got = t.train(*RUN, *extra, "language.seq_length=64", "batch.global_batch_size=1", *(() if name in TEXT_ONLY else
                  ("data.image_seq_length=16", "data.num_image_tiles=1", "vision.dynamic_resolution=T", "vision.dynamic_resolution_min_patches=4")), deck=deck)
    if isinstance(got, str):
        return t.test("published names of %s at tiny width" % name, got)
    text, v = config.get("llm_config", config), config.get("vision_config", config)
    used = {n: hf.decode(r.bytes(tensors)(n), *tensors[n]).astype(np.float32) for n in tensors}
    with h5py.File(got[0], "r") as f:
        held = {k: len(f["model/" + k]) for k in f["model"]}
    if name.startswith("C-RADIO"):
        whole = hf.from_checkpoint(got[0], hf.TINY, v)
        found = {n: x for n, x in whole.items() if n.startswith("radio_model.")}
        expected = {n: used[n] for n in found}
        fault = same(found, expected) or ("" if len(found) == count[1] else "%d tensors" % len(found))
    else:
        found = hf.from_checkpoint(got[0], {**hf.TINY, **text}, None if name in TEXT_ONLY else v)
        plain = {hf.strip(n): x for n, x in used.items()}
        fault = same(found, {n: plain[n] for n in found}) or ("" if len(found) == sum(count) else "%d tensors" % len(found))
    t.test("published names of %s at tiny width: %d tensors of %d, every number" % (name, len(found), len(tensors)), fault)
    shutil.rmtree(directory)


def published_full(t, name):
    tensors, config, preprocessor, count, parameters = published(name)
    directory = t.m.path("full-" + name)
    hf.write_directory(directory, tensors, None, shards=1 if name.startswith("C-RADIO") else 17)
    hf.write_config(directory, config)
    # Sparse files read as zeros: the two constants must be what they are.
    for n in tensors:
        if "input_conditioner" in n:
            patch(directory, n, hf.encode(hf.MEAN if "mean" in n else hf.STD, tensors[n][0]))
    if preprocessor:
        hf.write_config(directory, preprocessor, "preprocessor_config.json")
    deck = deck_of(t, directory)
    if not os.path.exists(deck):
        return t.test("full size of %s from headers" % name, deck)
    command = ("--check", deck, *RUN[:2], "--ranks", "16" if name in TEXT_ONLY else "12", *CUT.get(name, CUT_PICTURES))
    status, stdout, stderr = t.m.run(*command, "run.backend=ref", RUN[2])
    numbers = {l.split()[0]: int(l.split()[1]) for l in stdout.partition("\nlayout ")[0].splitlines()
               if l.startswith(("  language  ", "  vision  ")) and l.split()[1].isdigit()}
    fault = "" if status == 0 else "status %s\n%s" % (status, stderr[-3000:])
    if not fault and parameters[0] and numbers.get("language") != parameters[0]:
        fault = "language parameters %s, published %d" % (numbers.get("language"), parameters[0])
    if not fault and parameters[1] and numbers.get("vision") != parameters[1]:
        fault = "vision parameters %s, published %d" % (numbers.get("vision"), parameters[1])
    word = "%d of %d tensors" % (sum(count), len(tensors))
    if not fault and (word not in stdout or "MiB read" not in stdout):
        fault = "lacks '%s'\n%s" % (word, stdout[-2500:])
    # What the ranks read: an encoder rank all of its module, a language rank half of the dense and a quarter or an eighth of the experts.
    if not fault:
        rows = [l.split() for l in stdout[stdout.index("import, from headers"):].splitlines() if l.startswith(("  encoder  ", "  language  "))]
        read = {r[0]: float(r[2]) for r in rows if len(r) == 4}
        size = sum(int(np.prod(s)) * hf.WIDTH[d] for n, (d, s) in tensors.items() if "backbone" in n or "lm_head" in n) / 2.0 ** 20
        if "A3B" in name and not size / 10 < read["language"] < size / 6:
            fault = "a language rank reads %.0f of %.0f MiB" % (read["language"], size)
        if "9B" in name and not 0.5 * size <= read["language"] < 0.501 * size:
            fault = "a language rank reads %.0f of %.0f MiB" % (read["language"], size)
    t.test("full size of %s from headers: %s, %s parameters" % (name, word, " + ".join(str(p) for p in parameters if p)), fault)
    status, bf16, stderr = t.m.run(*command, "run.backend=cuda", "run.precision=bf16")
    held, half = memory(stdout), memory(bf16)
    fault = stderr[-3000:] if status or word not in bf16 or not held else ""
    for role, mib in held.items():   # parameters, all memory of a rank
        if not fault and not (abs(2 * half[role][0] - mib[0]) < 1e-3 * mib[0] + 1 and half[role][0] < half[role][1]):
            fault = "%s: %s MiB in fp32, %s in bf16" % (role, mib, half[role])
    t.test("full size of %s into a bf16 run on GPUs: " % name + ", ".join("%s %.1f of %.1f GiB a rank" % (role, p / 1024, whole / 1024) for role, (p, whole) in sorted(half.items())), fault)
    shutil.rmtree(directory)


def memory(text):
    """{role: (parameters, total)} of --check's table, MiB a rank."""
    table = text.partition("memory, MiB a rank\n")[2].partition("\n\n")[0].splitlines()[1:]
    return {row[0]: (float(row[2]), float(row[-1])) for row in (line.split() for line in table)}


def patch(directory, name, raw):
    """Overwrite a tensor's bytes."""
    for file in os.listdir(directory):
        if not file.endswith(".safetensors"):
            continue
        with open(os.path.join(directory, file), "r+b") as f:
            n, = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(n))
            if name in header:
                f.seek(8 + n + header[name]["data_offsets"][0])
                f.write(raw)


def deck_from_hf(t):
    b = Base(t)
    directory = b.write()
    deck = deck_of(t, directory)
    if not os.path.exists(deck):
        return t.test("--deck-from-hf prints a deck", deck)
    got = t.train(*RUN, "batch.global_batch_size=1", "language.seq_length=64", "data.image_seq_length=16", deck=deck)
    t.test("--deck-from-hf prints a deck that imports the directory as it stands", got if isinstance(got, str) else
           same({n: x for n, x in hf.from_checkpoint(got[0], hf.TINY, hf.TINY_VISION).items()},
                {hf.strip(n): np.float32(b.r.array(n, s)) for n, s in b.names.items() if "conditioner" not in n and "video" not in n}))
    hf.write_config(directory, {**b.config, "llm_config": {**b.config["llm_config"], "vocab_size": 499}})
    status, _, stderr = t.m.run("--deck-from-hf", directory)
    t.test("--deck-from-hf refuses a vocabulary that the embedding does not have", "" if status == 5 and "has 500 rows" in stderr else stderr)
    status, _, stderr = t.m.run("--deck-from-hf", t.m.path("nowhere"))
    t.test("--deck-from-hf of nothing", "" if status == 5 and "No such file" in stderr else stderr)
    quote = t.m.path("o'quote")
    b.write(directory=quote)
    deck = deck_of(t, quote)
    status, stdout, stderr = t.m.run("--check", deck, *RUN)
    t.test("--deck-from-hf quotes a path with a quote", "" if status == 0 and "101 of 104" in stdout else stderr)


def main():
    t = Hf()
    cases = [export_vlm, export_types, export_bf16, export_apart, export_refused, export_streams, import_layouts, import_bf16, import_spellings, published_bytes,
             import_strict, import_damaged, config_keys, deck_rules, resumed, deck_from_hf]
    for case in cases:
        if t.wanted(case.__name__) or case is import_spellings:   # its cases have names of their own
            case(t)
    for name in FAMILIES:
        if t.wanted("published_tiny " + name):
            published_tiny(t, name)
        if t.wanted("published_full " + name):
            published_full(t, name)
    t.m.close()
    t.tap.close()


if __name__ == "__main__":
    main()
