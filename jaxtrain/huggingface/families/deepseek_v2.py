"""DeepSeek-V2 and V2-Lite: latent attention, softmax scores, groups scored by their best expert."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.huggingface.families.deepseek_v3 import latent, latent_back, weights
from jaxtrain.huggingface.families.glm4_moe import grouped, grouped_back
from jaxtrain.huggingface.fields import Family, Fields


def read(fields: Fields) -> dict[str, Any]:
    """Translate config.json; the weights of a token's experts are never divided by their sum, whatever norm_topk_prob says."""
    by_group = fields.one_of("topk_method", {"greedy": False, "group_limited_greedy": True}, "greedy")
    moe = replace(grouped(fields, "softmax"), group_score="max", normalize_weights=False)
    return latent(fields) | {"moe": moe if by_group else replace(moe, groups=1, groups_per_token=1)}


def write(model: ModelConfig) -> dict[str, Any]:
    """Return config.json's fields."""
    assert model.moe is not None
    method = "greedy" if model.moe.groups == 1 else "group_limited_greedy"
    return latent_back(model) | grouped_back(model) | {"topk_method": method, "attention_bias": False, "mlp_bias": False}


FAMILY = Family("deepseek_v2", "DeepseekV2ForCausalLM", read, write, weights)
