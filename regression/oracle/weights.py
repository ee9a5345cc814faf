"""The tensors of a checkpoint.h5 as parameters of transformers' classes, and back (the in-library names of each).

A Link ties one tensor of ours to the parameters that hold its numbers. Every linear is [out, in] on both sides; only query, key and
value rows are arranged otherwise: one matrix of ours, group by group (language) or head by head (vision), three of theirs.
"""
import torch

ONE = (lambda x: [x], lambda parts: parts[0])


def grouped(groups, *sizes):
    """Rows laid out in `groups` equal groups of sizes[0], sizes[1], ... rows <-> one tensor for each size."""
    def split(x):
        parts = x.reshape(groups, sum(sizes), *x.shape[1:]).split(sizes, 1)
        return [p.reshape(-1, *x.shape[1:]) for p in parts]

    def join(parts):
        return torch.cat([p.reshape(groups, -1, *p.shape[1:]) for p in parts], 1).reshape(-1, *parts[0].shape[1:])
    return split, join


class Link:
    def __init__(self, ours, theirs, maps=ONE):
        self.ours, self.theirs = ours, [theirs] if isinstance(theirs, str) else theirs
        self.split, self.join = maps


def qkv(prefix):
    return [prefix + x + "_proj" for x in "qkv"]


def language(deck, prefix):
    """Of the model.language group; prefix '' for NemotronHForCausalLM, 'language_model.' inside the VLM."""
    heads, groups, width = (deck["language." + k] for k in ("num_attention_heads", "num_query_groups", "kv_channels"))
    rows = grouped(groups, heads // groups * width, width, width)
    links = [Link("embedding.word_embeddings.weight", prefix + "model.embeddings.weight"),
             Link("decoder.final_norm.weight", prefix + "model.norm_f.weight"),
             Link("output_layer.weight", prefix + "lm_head.weight")]
    for i, kind in enumerate(deck["language.hybrid_layer_pattern"]):
        y, x = "decoder.layers.%d." % i, prefix + "model.layers.%d." % i
        norm, pairs = {
            "M": ("mixer.in_proj.layer_norm_weight",
                  {"mixer.in_proj.weight": "in_proj.weight", "mixer.conv1d_weight": "conv1d.weight", "mixer.conv1d_bias": "conv1d.bias",
                   "mixer.dt_bias": "dt_bias", "mixer.A_log": "A_log", "mixer.D": "D", "mixer.norm.weight": "norm.weight",
                   "mixer.out_proj.weight": "out_proj.weight"}),
            "*": ("self_attention.linear_qkv.layer_norm_weight", {"self_attention.linear_proj.weight": "o_proj.weight"}),
            "-": ("mlp.linear_fc1.layer_norm_weight", {"mlp.linear_fc1.weight": "up_proj.weight", "mlp.linear_fc2.weight": "down_proj.weight"}),
            "E": ("pre_mlp_layernorm.weight",
                  {"mlp.router.weight": "gate.weight", "mlp.router.expert_bias": "gate.e_score_correction_bias",
                   "mlp.experts.linear_fc1.weight": "experts.up_proj", "mlp.experts.linear_fc2.weight": "experts.down_proj",
                   "mlp.shared_experts.linear_fc1.weight": "shared_experts.up_proj.weight",
                   "mlp.shared_experts.linear_fc2.weight": "shared_experts.down_proj.weight"})}[kind]
        links.append(Link(y + norm, x + "norm.weight"))
        links += [Link(y + ours, x + "mixer." + theirs) for ours, theirs in pairs.items()]
        if kind == "*":
            links.append(Link(y + "self_attention.linear_qkv.weight", [n + ".weight" for n in qkv(x + "mixer.")], rows))
    return links


def vision(deck):
    heads, width = deck["vision.num_attention_heads"], deck["vision.hidden_size"] // deck["vision.num_attention_heads"]
    rows = grouped(heads, width, width, width)
    links = [Link(ours, "vision_model.embeddings." + theirs) for ours, theirs in
             (("class_token", "cls_register_token"), ("position_embeddings", "position_embedding"), ("embedder.weight", "patch_projection.weight"))]
    if deck["vision.final_layernorm"]:
        links += [Link("decoder.final_layernorm." + p, "vision_final_layernorm." + p) for p in ("weight", "bias")]
    for i in range(deck["vision.num_layers"]):
        y, x = "decoder.layers.%d." % i, "vision_model.encoder.layer.%d." % i
        for p in ("weight", "bias"):
            links += [Link(y + ours + p, x + theirs + p) for ours, theirs in
                      (("self_attention.linear_qkv.layer_norm_", "norm1."), ("self_attention.linear_proj.", "attention.o_proj."),
                       ("mlp.linear_fc1.layer_norm_", "norm2."), ("mlp.linear_fc1.", "mlp.fc1."), ("mlp.linear_fc2.", "mlp.fc2."))]
            links.append(Link(y + "self_attention.linear_qkv." + p, [n + "." + p for n in qkv(x + "attention.")], rows))
    return links


def projector(deck):
    x = "multi_modal_projector."
    if deck["projector.vision_projection_type"] == "affine":
        return [Link("encoder.weight", x + "weight")]
    links = [Link("encoder.linear_fc%d.weight" % i, x + "linear_%d.weight" % i) for i in (1, 2)]
    if deck["projector.projection_normalization"] == "rmsnorm":
        links.append(Link("encoder.linear_fc1.layer_norm_weight", x + "layer_norm.weight"))
    return links


def links(deck, pictures):
    """{module of ours: links}"""
    if not pictures:
        return {"language": language(deck, "")}
    return {"language": language(deck, "language_model."), "vision": vision(deck), "projector": projector(deck)}


def load(model, links, tensors):
    """Every tensor of `tensors` ({module/name: array}) into the model, none left over on either side but what `model` alone has."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    left = set(tensors)
    for module, of_module in links.items():
        for link in of_module:
            name = module + "/" + link.ours
            left.remove(name)
            for their, part in zip(link.theirs, link.split(torch.as_tensor(tensors[name])), strict=True):
                if state[their].shape != part.shape:
                    raise ValueError("%s %s: %s %s" % (name, tuple(part.shape), their, tuple(state[their].shape)))
                state[their].data.copy_(part)
                del state[their]
    # Identities and parts that no picture passes: they keep what the class gives them.
    unused = [n for n in state if not n.endswith(("lambda1", "summary_idxs", "video_patch_projection.weight"))]
    if left or unused:
        raise ValueError("not in the model: %s; not in the checkpoint: %s" % (sorted(left), unused))


def gather(links, of):
    """{module/name: numpy array} of ours, of(name of theirs) being a tensor or None; tensors without are left out."""
    out = {}
    for module, of_module in links.items():
        for link in of_module:
            parts = [of(n) for n in link.theirs]
            if all(p is not None for p in parts):
                out[module + "/" + link.ours] = link.join([p.detach() for p in parts]).numpy()
    return out
