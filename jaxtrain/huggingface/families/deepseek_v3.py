"""DeepSeek-V3 and R1: latent attention, experts chosen in groups by sigmoid scores, YaRN, dense first layers."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from jaxtrain.config import LatentAttentionConfig, ModelConfig
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.families.glm4_moe import grouped, grouped_back
from jaxtrain.huggingface.fields import Family, Fields, standard, standard_back
from jaxtrain.huggingface.rope import mscale_of, read_rope, write_rope
from jaxtrain.huggingface.rows import LAYER
from jaxtrain.huggingface.table import Row

STEM = f"{LAYER}self_attn."


def latent(fields: Fields) -> dict[str, Any]:
    """Translate latent attention and its YaRN, whose mscale_all_dim scales the scores by its square."""
    fields.expect("attention_bias", False)
    fields.expect("mlp_bias", False)
    fields.expect("rms_norm_eps", 1e-6)  # what the norms of the latents have in `transformers`, whatever it says
    fields.take("head_dim", None)
    plain, turned = fields.take("qk_nope_head_dim"), fields.take("qk_rope_head_dim")
    ranks = {"query_rank": fields.take("q_lora_rank", 0), "kv_rank": fields.take("kv_lora_rank")}
    parts = LatentAttentionConfig(**ranks, rope_dim=turned, value_dim=fields.take("v_head_dim"))
    parameters = fields.peek("rope_parameters") or fields.peek("rope_scaling") or {}
    all_dims, own = parameters.get("mscale_all_dim") or 0, {"latent_attention": parts, "head_dim": plain}
    if all_dims and parameters.get("rope_type", parameters.get("type")) != "default":
        own["attention_scale"] = mscale_of(parameters["factor"], all_dims) ** 2 / math.sqrt(plain + turned)
    return standard(fields) | own | read_rope(fields)


def latent_back(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of `latent`."""
    parts, shared = model.latent_attention, standard_back(model) | write_rope(model)
    assert parts is not None
    shared |= {"q_lora_rank": parts.query_rank or None, "kv_lora_rank": parts.kv_rank, "v_head_dim": parts.value_dim}
    shared |= {"qk_nope_head_dim": model.head_dim, "qk_rope_head_dim": parts.rope_dim, "head_dim": parts.rope_dim}
    if model.attention_scale and model.rope_scaling:
        mscale = math.sqrt(model.attention_scale * math.sqrt(model.head_dim + parts.rope_dim))
        shared["rope_parameters"]["mscale_all_dim"] = round((mscale - 1) / 0.1 / math.log(model.rope_scaling.factor), 9)
    return shared


def read(fields: Fields) -> dict[str, Any]:
    """Translate config.json."""
    fields.expect("topk_method", "noaux_tc")
    fields.expect("rope_interleave", True)
    return latent(fields) | {"moe": grouped(fields)}


def write(model: ModelConfig) -> dict[str, Any]:
    """Return config.json's fields; the layers that predict further tokens are not part of the model."""
    return latent_back(model) | grouped_back(model) | {"rope_interleave": True, "num_nextn_predict_layers": 0}


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


weights = partial(rows.llama, own_attention=latent_rows)
FAMILY = Family("deepseek_v3", "DeepseekV3ForCausalLM", read, write, weights, [r"model\.layers\.61\..*"])
