"""DeepSeek-V3 and R1: latent attention, experts chosen in groups by sigmoid scores, YaRN, dense first layers."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from jaxtrain.config import LatentAttentionConfig, ModelConfig
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.families.glm4_moe import SIGMOID
from jaxtrain.huggingface.fields import Family, Fields, Part, expects, ignored, standard, written
from jaxtrain.huggingface.rope import mscale_of, rope, write_rope
from jaxtrain.huggingface.rows import LAYER
from jaxtrain.huggingface.table import Row

STEM = f"{LAYER}self_attn."


def latent(fields: Fields) -> dict[str, Any]:
    """Translate latent attention; the mscale_all_dim of its YaRN scales the scores by its square."""
    plain, turned = fields.take("qk_nope_head_dim"), fields.take("qk_rope_head_dim")
    ranks = {"query_rank": fields.take("q_lora_rank", 0), "kv_rank": fields.take("kv_lora_rank")}
    parts = LatentAttentionConfig(**ranks, rope_dim=turned, value_dim=fields.take("v_head_dim"))
    parameters = fields.peek("rope_parameters") or fields.peek("rope_scaling") or {}
    all_dims, own = parameters.get("mscale_all_dim") or 0, {"latent_attention": parts, "head_dim": plain}
    if all_dims and parameters.get("rope_type", parameters.get("type")) != "default":
        own["attention_scale"] = mscale_of(parameters["factor"], all_dims) ** 2 / math.sqrt(plain + turned)
    return own


def latent_back(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of `latent`, and RoPE's."""
    parts, found = model.latent_attention, write_rope(model)
    assert parts is not None
    found |= {"q_lora_rank": parts.query_rank or None, "kv_lora_rank": parts.kv_rank, "v_head_dim": parts.value_dim}
    found |= {"qk_nope_head_dim": model.head_dim, "qk_rope_head_dim": parts.rope_dim, "head_dim": parts.rope_dim}
    if model.attention_scale and model.rope_scaling:
        mscale = math.sqrt(model.attention_scale * math.sqrt(model.head_dim + parts.rope_dim))
        found["rope_parameters"]["mscale_all_dim"] = round((mscale - 1) / 0.1 / math.log(model.rope_scaling.factor), 9)
    return found


def latent_rows(prefix: str, model: ModelConfig) -> list[Row]:
    """Return the rows of latent attention, whose RoPE rotates neighbours."""
    assert model.latent_attention is not None
    own, ranked = f"{prefix}attention/", model.latent_attention.query_rank > 0
    up, width = ("q_b_proj", "Q") if ranked else ("q_proj", "D")
    return [
        *([Row(f"{own}query_down", f"{STEM}q_a_proj.weight", "Q D -> D Q")] if ranked else []),
        *([Row(f"{own}query_norm", f"{STEM}q_a_layernorm.weight", "Q -> Q")] if ranked else []),
        Row(f"{own}query_up", f"{STEM}{up}.weight", f"(H [N]+R) {width} -> {width} H [N]+R"),
        Row(f"{own}query_up", f"{STEM}{up}.weight", f"(H N+[p2]) {width} -> {width} H N+[2p]"),
        Row(f"{own}kv_down", f"{STEM}kv_a_proj_with_mqa.weight", "[C]+R D -> D C"),
        Row(f"{own}rope_key", f"{STEM}kv_a_proj_with_mqa.weight", "C+[p2] D -> D (2 p)"),
        Row(f"{own}kv_norm", f"{STEM}kv_a_layernorm.weight", "C -> C"),
        Row(f"{own}key_up", f"{STEM}kv_b_proj.weight", "(H [N]+M) C -> C H N"),
        Row(f"{own}value_up", f"{STEM}kv_b_proj.weight", "(H N+[M]) C -> C H M"),
        Row(f"{own}out", f"{STEM}o_proj.weight", "D (H M) -> H M D"),
    ]


LATENT = (
    expects("attention_bias", False),
    expects("mlp_bias", False),
    expects("rms_norm_eps", 1e-6),  # what the norms of the latents have in `transformers`, whatever it says
    ignored("head_dim"),
    *standard(),
    rope(),
    Part(latent, latent_back),
)
OWN = (
    expects("topk_method", "noaux_tc"),
    expects("rope_interleave", True),
    SIGMOID,
    # The layers that predict further tokens are not part of the model.
    written(rope_interleave=True, num_nextn_predict_layers=0),
)
weights = partial(rows.llama, own_attention=latent_rows)
FAMILY = Family("deepseek_v3", "DeepseekV3ForCausalLM", (*LATENT, *OWN), weights, [r"model\.layers\.61\..*"])
