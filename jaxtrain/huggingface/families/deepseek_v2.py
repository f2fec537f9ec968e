"""DeepSeek-V2 and V2-Lite: latent attention, softmax scores, groups scored by their best expert."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.huggingface.families.deepseek_v3 import LATENT, weights
from jaxtrain.huggingface.families.glm4_moe import grouped
from jaxtrain.huggingface.fields import Family, Fields, Part, mixture, written

SOFTMAX = mixture(*grouped("softmax"), router="softmax", group_score="max", selection_bias=False)


def experts(fields: Fields) -> dict[str, Any]:
    """Translate the experts; a token's weights are never divided by their sum, whatever norm_topk_prob says."""
    by_group = fields.one_of("topk_method", {"greedy": False, "group_limited_greedy": True}, "greedy")
    moe = replace(SOFTMAX.read(fields)["moe"], normalize_weights=False)
    return {"moe": moe if by_group else replace(moe, groups=1, groups_per_token=1)}


def experts_back(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of `experts`."""
    found = SOFTMAX.write(model)
    return found | {"topk_method": "greedy" if found["n_group"] == 1 else "group_limited_greedy"}


PARTS = (*LATENT, Part(experts, experts_back), written(attention_bias=False, mlp_bias=False))
FAMILY = Family("deepseek_v2", "DeepseekV2ForCausalLM", PARTS, weights)
