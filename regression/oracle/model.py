"""transformers' own classes at the sizes of a deck, and the little that they lack.

NemotronHForCausalLM without pictures, else NemotronH_Omni_Reasoning_V3 with its RadioModel. What differs from Megatron is neutralised by
configuration: no lower bound of dt (time_step_min), the tanh GELU with the same constant (gelu_fast), a final LayerNorm of the encoder
(num_nextn_predict_layers), the padded vocabulary as vocabulary. What they lack is added: affine and unnormalised projectors, crops of
the position grid in training, the auxiliary loss and the expert bias that follows the load.

fp64: the classes cast to fp32 in many places; as_double() turns these casts into casts to fp64 for the whole process.
"""
import torch
import torch.nn.functional as F
from transformers import NemotronH_Omni_Reasoning_V3, NemotronH_Omni_Reasoning_V3_Config, NemotronHConfig, NemotronHForCausalLM, RadioConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.nemotron_h import modeling_nemotron_h
from transformers.models.nemotron_h_omni import modeling_nemotron_h_omni
from transformers.models.radio import modeling_radio

SINGLE = torch.Tensor.float


class DoubleTorch:
    """torch, whose float32 is float64."""
    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def as_double(on):
    for module in (modeling_nemotron_h, modeling_radio, modeling_nemotron_h_omni):
        module.torch = DoubleTorch() if on else torch
    torch.Tensor.float = torch.Tensor.double if on else SINGLE


def text_config(d):
    return NemotronHConfig(
        vocab_size=d["padded_vocab"], hidden_size=d["language.hidden_size"], hybrid_override_pattern=d["language.hybrid_layer_pattern"],
        num_attention_heads=d["language.num_attention_heads"], num_key_value_heads=d["language.num_query_groups"],
        head_dim=d["language.kv_channels"], intermediate_size=d["language.ffn_hidden_size"], layer_norm_epsilon=d["language.layernorm_epsilon"],
        ssm_state_size=d["mamba.mamba_state_dim"], mamba_num_heads=d["mamba.mamba_num_heads"], mamba_head_dim=d["mamba.mamba_head_dim"],
        n_groups=d["mamba.mamba_num_groups"], conv_kernel=d["mamba.linear_conv_kernel_dim"], chunk_size=d["mamba.mamba_chunk_size"],
        n_routed_experts=d["moe.num_experts"], num_experts_per_tok=d["moe.moe_router_topk"], moe_intermediate_size=d["moe.moe_ffn_hidden_size"],
        moe_shared_expert_intermediate_size=d["moe.moe_shared_expert_intermediate_size"],
        routed_scaling_factor=d["moe.moe_router_topk_scaling_factor"], norm_topk_prob=True, n_group=1, topk_group=1,
        time_step_min=1e-30, use_cache=False, tie_word_embeddings=False, num_nextn_predict_layers=int(d.get("vision.final_layernorm", False)))


def vision_config(d):
    c, p = d["vision.class_token_len"], d["vision.patch_dim"]
    if d["vision.max_img_h"] != d["vision.max_img_w"]:
        raise ValueError("RadioModel's position grid is square")
    return RadioConfig(
        hidden_size=d["vision.hidden_size"], num_hidden_layers=d["vision.num_layers"], num_attention_heads=d["vision.num_attention_heads"],
        mlp_ratio=d["vision.ffn_hidden_size"] / d["vision.hidden_size"], hidden_act="gelu_fast", layer_norm_eps=1e-6, patch_size=p,
        max_img_size=d["vision.max_img_h"], num_cls_tokens=1, num_registers=c - 1, summary_idxs=[0], video_temporal_patch_size=2)


def build(d, pictures, double):
    """The model in fp64 or fp32 with whatever weights its class draws."""
    as_double(double)
    if pictures:
        width = 4 * d["vision.hidden_size"]
        model = NemotronH_Omni_Reasoning_V3(NemotronH_Omni_Reasoning_V3_Config(
            text_config=text_config(d), vision_config=vision_config(d), audio_config=None, image_token_id=d["data.image_token_id"],
            projector_hidden_size=4 * width, vision_hidden_size=d["vision.hidden_size"], downsample_ratio=0.5, video_temporal_patch_size=2))
        if d["projector.vision_projection_type"] == "affine":
            model.multi_modal_projector = torch.nn.Linear(width, d["language.hidden_size"], bias=False)
        elif d["projector.projection_normalization"] == "none":
            model.multi_modal_projector.layer_norm = torch.nn.Identity()
        model.vision_model.config.torch_dtype = torch.float64 if double else torch.float32
    else:
        model = NemotronHForCausalLM(text_config(d))
    if double:   # the default, grouped GEMM, knows no fp64
        (model.language_model if pictures else model).set_experts_implementation("eager")
    return (model.double() if double else model.float()).eval()


def crop(grid, h, w, scale_x, scale_y, off_x, off_y):
    """Position grid [1, C, rows, columns] at h x w points of a part of it, corners aligned, zero outside: [h*w, C]."""
    def line(n, scale, off):
        return 2 * (torch.linspace(0, 1, n, dtype=grid.dtype) * scale + off) - 1 if n > 1 else torch.tensor([2 * off - 1], dtype=grid.dtype)
    y, x = torch.meshgrid(line(h, scale_y, off_y), line(w, scale_x, off_x), indexing="ij")
    return F.grid_sample(grid, torch.stack([x, y], -1)[None], mode="bilinear", padding_mode="zeros", align_corners=True).flatten(2)[0].T


def set_crops(model, tiles, cpe):
    """The next forward pass takes these crops, one [scale_x, scale_y, off_x, off_y] a tile; a picture of the grid's size takes the grid."""
    e = model.vision_model.embeddings
    grid = e.position_embedding.reshape(1, e.max_rows, e.max_cols, -1).permute(0, 3, 1, 2)
    whole = [(int(h), int(w)) == (e.max_rows, e.max_cols) for h, w in tiles]
    positions = [e.position_embedding[0] if full else crop(grid, int(h), int(w), *map(float, c)) for full, (h, w), c in zip(whole, tiles, cpe)]
    order = iter(positions)
    e._interpolate_position_embedding = lambda dims, dtype: next(order)[None]
    return positions


def dense_features(model, patches, side, positions):
    """The embeddings of pictures of one size through RadioModel's dense path: whole pictures instead of packed patches."""
    p, (h, w) = model.vision_model.patch_size, side
    pixels = patches.reshape(-1, h, w, 3, p, p).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, h * p, w * p)
    if positions is not None:
        model.vision_model.embeddings._interpolate_position_embedding = lambda dims, dtype: torch.stack(positions)
    features = model.vision_model(pixels).features
    return BaseModelOutputWithPooling(pooler_output=tuple(model.project_vision_features(features, h, w)))


class Routers:
    """Watches the routers of a model: auxiliary loss, its bare value and the tokens of each expert of one forward pass."""

    def __init__(self, model):
        self.gates = [m for m in model.modules() if isinstance(m, modeling_nemotron_h.NemotronHTopkRouter)]
        self.seen = []
        for g in self.gates:
            g.register_forward_hook(lambda g, args, out: self.seen.append((g, out[0], out[2])))

    def take(self, sequences):
        """(sum over sequences of what every parameter gradient is divided by the tokens with: model.md 1.8 step 5, bare value
        averaged over layers and sequences, counts [layers, experts])"""
        loss, bare, counts = 0.0, [], []
        for g, logits, chosen in self.seen:
            s = logits.sigmoid()
            a = (s / (s.sum(-1, keepdim=True) + 1e-20)).reshape(sequences, -1, g.num_experts)
            length = a.shape[1]
            load = F.one_hot(a.topk(g.top_k, -1).indices, g.num_experts).sum((1, 2)).to(a.dtype)
            balance = (a.sum(1) * load).sum(-1) * g.num_experts / g.top_k        # of each sequence, times S^2
            loss = loss + balance.sum() / length
            bare.append(balance.mean().item() / length ** 2)
            counts.append(torch.bincount(chosen.flatten(), minlength=g.num_experts))
        self.seen.clear()
        return loss, sum(bare) / len(bare) if bare else 0.0, torch.stack(counts) if counts else torch.zeros(0, 0, dtype=torch.long)
