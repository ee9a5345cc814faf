"""Hugging Face directories made and read without any of their libraries: safetensors files byte by byte, the published and in-library
names with shapes (hf.md 2-4), configurations, and the tensors of a checkpoint.h5 as those of a directory.

The names here are written from the published lists, not from the program's table: one is the test of the other.
"""
import json
import os
import struct

import h5py
import numpy as np

PATTERN = {
    "30B-A3B": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "9B-v2": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    "12B-v2": "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# The tiny preset's language model and encoder.
TINY = dict(hybrid_override_pattern="MEM*E-", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=96,
            vocab_size=500, layer_norm_epsilon=1e-5, mamba_num_heads=8, mamba_head_dim=8, n_groups=2, ssm_state_size=16, conv_kernel=4,
            chunk_size=16, n_routed_experts=8, num_experts_per_tok=2, routed_scaling_factor=2.5, moe_intermediate_size=32,
            moe_shared_expert_intermediate_size=64, norm_topk_prob=True, n_group=1, topk_group=1, n_shared_experts=1, mlp_hidden_act="relu2",
            mamba_hidden_act="silu", use_conv_bias=True, tie_word_embeddings=False, attention_bias=False, mlp_bias=False, use_bias=False,
            mamba_proj_bias=False, max_position_embeddings=4096)
TINY_VISION = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2.0, patch_size=4, max_img_size=64, num_cls_tokens=1,
                   num_registers=1, hidden_act="gelu_fast", layer_norm_eps=1e-6, qkv_bias=True, use_swiglu_ffn=False, norm_mean=MEAN,
                   norm_std=STD)


# ---- names and shapes -----------------------------------------------------------------------------------------------------------

def language(c, prefix="", library=False, fused=False):
    """{name: shape} of a language model with configuration c."""
    h, b = c["hidden_size"], prefix + ("model." if library else "backbone.")
    di = c["mamba_num_heads"] * c["mamba_head_dim"]
    channels = di + 2 * c["n_groups"] * c["ssm_state_size"]
    q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    out = {b + "embeddings.weight": (c["vocab_size"], h), b + "norm_f.weight": (h,), prefix + "lm_head.weight": (c["vocab_size"], h)}
    for i, kind in enumerate(c["hybrid_override_pattern"]):
        x = b + "layers.%d." % i
        out[x + "norm.weight"] = (h,)
        x += "mixer."
        if kind == "M":
            out.update({x + "in_proj.weight": (di + channels + c["mamba_num_heads"], h), x + "conv1d.weight": (channels, 1, c["conv_kernel"]),
                        x + "conv1d.bias": (channels,), x + "dt_bias": (c["mamba_num_heads"],), x + "A_log": (c["mamba_num_heads"],),
                        x + "D": (c["mamba_num_heads"],), x + "norm.weight": (di,), x + "out_proj.weight": (h, di)})
        elif kind == "*":
            out.update({x + "q_proj.weight": (q, h), x + "k_proj.weight": (kv, h), x + "v_proj.weight": (kv, h), x + "o_proj.weight": (h, q)})
        elif kind == "-":
            out.update({x + "up_proj.weight": (c["intermediate_size"], h), x + "down_proj.weight": (h, c["intermediate_size"])})
        else:
            e, f, fs = c["n_routed_experts"], c["moe_intermediate_size"], c["moe_shared_expert_intermediate_size"]
            out.update({x + "gate.weight": (e, h), x + "gate.e_score_correction_bias": (e,), x + "shared_experts.up_proj.weight": (fs, h),
                        x + "shared_experts.down_proj.weight": (h, fs)})
            if fused:
                out.update({x + "experts.up_proj": (e, f, h), x + "experts.down_proj": (e, h, f)})
            for j in range(0 if fused else e):
                out.update({x + "experts.%d.up_proj.weight" % j: (f, h), x + "experts.%d.down_proj.weight" % j: (h, f)})
    return out


def vision(v, prefix="", library=False, split=False):
    """{name: shape} of an encoder; its two constants and the video embedder are in more_vision."""
    w, p, side = v["hidden_size"], v["patch_size"], v["max_img_size"] // v["patch_size"]
    f, c = int(w * v["mlp_ratio"]), v["num_cls_tokens"] + v["num_registers"]
    if library:
        g, block, proj = prefix + "embeddings.", prefix + "encoder.layer.%d.", "attention.o_proj."
        out = {g + "cls_register_token": (c, w), g + "position_embedding": (1, side * side, w), g + "patch_projection.weight": (w, 3 * p * p)}
    else:
        g, block, proj = prefix + "radio_model.model.patch_generator.", prefix + "radio_model.model.blocks.%d.", "attn.proj."
        out = {g + "cls_token.token": (c, w), g + "pos_embed": (1, side * side, w), g + "embedder.weight": (w, 3 * p * p)}
    for i in range(v["num_hidden_layers"]):
        x = block % i
        for end, rows in (("weight", lambda n, m: (n, m)), ("bias", lambda n, m: (n,))):
            out.update({x + "norm1." + end: (w,), x + "norm2." + end: (w,), x + proj + end: rows(w, w), x + "mlp.fc1." + end: rows(f, w),
                        x + "mlp.fc2." + end: rows(w, f)})
            if library or split:
                out.update({x + ("attention." if library else "attn.") + k + "_proj." + end: rows(w, w) for k in "qkv"})
            else:
                out[x + "attn.qkv." + end] = rows(3 * w, w)
    return out


def more_vision(v, prefix=""):
    """What published encoders hold and this program does not use, but for the two constants that it compares."""
    r = prefix + "radio_model."
    return {r + "model.patch_generator.video_embedder.weight": (v["hidden_size"], 6 * v["patch_size"] ** 2),
            r + "input_conditioner.norm_mean": (3, 1, 1), r + "input_conditioner.norm_std": (3, 1, 1)}


def projector(c, v, library=False):
    w, h, p = 4 * v["hidden_size"], c["hidden_size"], "multi_modal_projector." if library else "mlp1."
    names = ("layer_norm.weight", "linear_1.weight", "linear_2.weight") if library else ("0.weight", "1.weight", "3.weight")
    return dict(zip((p + n for n in names), ((w,), (4 * w, w), (h, 4 * w))))


def final_norm(v, name="vision_final_layernorm."):
    return {name + "weight": (v["hidden_size"],), name + "bias": (v["hidden_size"],)}


def audio(tensors=713):
    return {"sound_encoder.encoder.layers.%d.weight" % i: (8,) for i in range(tensors)}


# ---- configurations -------------------------------------------------------------------------------------------------------------

def vlm_config(c, v, published=True, **more):
    names = ("llm_config", "img_context_token_id", "vit_hidden_size") if published else ("text_config", "image_token_id", "vision_hidden_size")
    return {names[0]: c, "vision_config": v, names[1]: 499, names[2]: v.get("hidden_size", 1280), "downsample_ratio": 0.5,
            "projector_hidden_size": 16 * v.get("hidden_size", 1280), **({"ps_version": "v2"} if published else {}), **more}


def write_config(directory, config, name="config.json"):
    with open(os.path.join(directory, name), "w") as f:
        f.write(config if isinstance(config, str) else json.dumps(config, indent=1))


# ---- safetensors ----------------------------------------------------------------------------------------------------------------

WIDTH = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "I8": 1}


def encode(x, dtype):
    """The bytes of numbers in a type, rounded to nearest even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(x, "<f4").view("<u4")
        return ((bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()
    return np.ascontiguousarray(x, {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "I8": "i1"}[dtype]).tobytes()


def decode(raw, dtype, shape):
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
    return np.frombuffer(raw, {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "I8": "i1"}[dtype]).reshape(shape)


def write_file(name, tensors, data=None):
    """tensors: {name: (dtype, shape)}; data(name) -> bytes, None: a sparse file with a header only."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for n, (dtype, shape) in tensors.items():
        size = int(np.prod(shape, dtype=np.int64)) * WIDTH[dtype]
        header[n] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(name, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        if data is None:
            f.truncate(8 + len(text) + at)
        else:
            for n in tensors:
                f.write(data(n))


def write_directory(directory, tensors, data=None, shards=1):
    os.makedirs(directory, exist_ok=True)
    if shards == 1:
        return write_file(os.path.join(directory, "model.safetensors"), tensors, data)
    names, where = list(tensors), {}
    for k in range(shards):
        file = "model-%05d-of-%05d.safetensors" % (k + 1, shards)
        part = names[k * len(names) // shards:(k + 1) * len(names) // shards]
        where.update({n: file for n in part})
        write_file(os.path.join(directory, file), {n: tensors[n] for n in part}, data)
    total = sum(int(np.prod(s, dtype=np.int64)) * WIDTH[d] for d, s in tensors.values())
    write_config(directory, {"metadata": {"total_size": total}, "weight_map": where}, "model.safetensors.index.json")


def read_file(name):
    """{name: (dtype, array)} and the metadata."""
    with open(name, "rb") as f:
        n, = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(n))
        raw = f.read()
    meta = header.pop("__metadata__", None)
    return {k: (e["dtype"], decode(raw[e["data_offsets"][0]:e["data_offsets"][1]], e["dtype"], e["shape"])) for k, e in header.items()}, meta


def read_directory(directory):
    index = os.path.join(directory, "model.safetensors.index.json")
    if not os.path.exists(index):
        return read_file(os.path.join(directory, "model.safetensors"))[0]
    with open(index) as f:
        where = json.load(f)["weight_map"]
    out = {}
    for file in sorted(set(where.values())):
        part = read_file(os.path.join(directory, file))[0]
        assert {n for n in where if where[n] == file} == set(part), file
        out.update(part)
    return out


class Random:
    """Numbers for every tensor of a list, drawn by name, exact in their type; layer norms about 1."""

    def __init__(self, seed=0):
        self.seed, self.made = seed, {}

    def array(self, name, shape):
        if name not in self.made:
            rng = np.random.default_rng([self.seed, *name.encode()])
            x = MEAN if name.endswith("norm_mean") else STD if name.endswith("norm_std") else rng.normal(0, 0.05, shape)
            self.made[name] = np.asarray(x, "<f8").reshape(shape)
        return self.made[name]

    def bytes(self, tensors):
        return lambda n: encode(self.array(n, tensors[n][1]), tensors[n][0])


# ---- a checkpoint as a directory ------------------------------------------------------------------------------------------------

def rows_by_group(x, groups, per_group):
    """Query, key and value rows of [(queries, key, value of a group), ...]; per_group query heads in a group."""
    y = x.reshape(groups, per_group + 2, -1, *x.shape[1:])
    flat = lambda z: z.reshape(-1, *x.shape[1:])
    return flat(y[:, :per_group]), flat(y[:, per_group]), flat(y[:, per_group + 1])


def from_checkpoint(name, c, v=None):
    """{published name without language_model. / vision_model.: array} of a checkpoint.h5."""
    out, vocab = {}, c["vocab_size"]
    with h5py.File(name, "r") as f:
        m = {}
        f["model"].visititems(lambda n, o: m.__setitem__(n, o[()]) if isinstance(o, h5py.Dataset) else None)
    lm = lambda n: m["language/" + n]
    out["backbone.embeddings.weight"], out["lm_head.weight"] = lm("embedding.word_embeddings.weight")[:vocab], lm("output_layer.weight")[:vocab]
    out["backbone.norm_f.weight"] = lm("decoder.final_norm.weight")
    for i, kind in enumerate(c["hybrid_override_pattern"]):
        y, x = "decoder.layers.%d." % i, "backbone.layers.%d.mixer." % i
        norm = {"M": "mixer.in_proj.layer_norm_weight", "*": "self_attention.linear_qkv.layer_norm_weight",
                "-": "mlp.linear_fc1.layer_norm_weight", "E": "pre_mlp_layernorm.weight"}[kind]
        out["backbone.layers.%d.norm.weight" % i] = lm(y + norm)
        if kind == "M":
            for a, b in (("in_proj.weight", "in_proj.weight"), ("conv1d_weight", "conv1d.weight"), ("conv1d_bias", "conv1d.bias"),
                         ("dt_bias", "dt_bias"), ("A_log", "A_log"), ("D", "D"), ("norm.weight", "norm.weight"), ("out_proj.weight", "out_proj.weight")):
                out[x + b] = lm(y + "mixer." + a)
        elif kind == "*":
            g = c["num_key_value_heads"]
            parts = rows_by_group(lm(y + "self_attention.linear_qkv.weight"), g, c["num_attention_heads"] // g)
            out.update({x + k + "_proj.weight": p for k, p in zip("qkv", parts)})
            out[x + "o_proj.weight"] = lm(y + "self_attention.linear_proj.weight")
        elif kind == "-":
            out[x + "up_proj.weight"], out[x + "down_proj.weight"] = lm(y + "mlp.linear_fc1.weight"), lm(y + "mlp.linear_fc2.weight")
        else:
            out[x + "gate.weight"], out[x + "gate.e_score_correction_bias"] = lm(y + "mlp.router.weight"), lm(y + "mlp.router.expert_bias")
            for a, b in (("linear_fc1", "up_proj"), ("linear_fc2", "down_proj")):
                out[x + "shared_experts.%s.weight" % b] = lm(y + "mlp.shared_experts.%s.weight" % a)
                for j, e in enumerate(lm(y + "mlp.experts.%s.weight" % a)):
                    out[x + "experts.%d.%s.weight" % (j, b)] = e
    if v is None:
        return out
    vit, u = (lambda n: m["vision/" + n]), "radio_model.model."
    out[u + "patch_generator.cls_token.token"], out[u + "patch_generator.pos_embed"] = vit("class_token"), vit("position_embeddings")
    out[u + "patch_generator.embedder.weight"] = vit("embedder.weight")
    for i in range(v["num_hidden_layers"]):
        y, x = "decoder.layers.%d." % i, u + "blocks.%d." % i
        for e in ("weight", "bias"):
            out[x + "attn.qkv." + e] = np.concatenate(rows_by_group(vit(y + "self_attention.linear_qkv." + e), v["num_attention_heads"], 1))
            for a, b in (("self_attention.linear_qkv.layer_norm_", "norm1."), ("self_attention.linear_proj.", "attn.proj."),
                         ("mlp.linear_fc1.layer_norm_", "norm2."), ("mlp.linear_fc1.", "mlp.fc1."), ("mlp.linear_fc2.", "mlp.fc2.")):
                out[x + b + e] = vit(y + a + e)
    if "vision/decoder.final_layernorm.weight" in m:
        out.update({"vision_final_layernorm." + e: vit("decoder.final_layernorm." + e) for e in ("weight", "bias")})
    for a, b in (("encoder.linear_fc1.layer_norm_weight", "mlp1.0.weight"), ("encoder.linear_fc1.weight", "mlp1.1.weight"),
                 ("encoder.linear_fc2.weight", "mlp1.3.weight"), ("encoder.weight", "encoder.weight")):
        if "projector/" + a in m:
            out[b] = m["projector/" + a]
    return out


def strip(name):
    """The name without what tells that the tensor lies in a vision-language model."""
    for prefix in ("language_model.", "vision_model."):
        if name.startswith(prefix):
            return name[len(prefix):]
    return name
