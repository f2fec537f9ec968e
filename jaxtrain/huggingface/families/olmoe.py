"""OLMoE: a mixture of experts in every layer, and norms on queries and keys over the whole width."""

from __future__ import annotations

from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.families.qwen3_moe import mixture, mixture_back
from jaxtrain.huggingface.fields import Family, Fields, biases, standard, standard_back
from jaxtrain.huggingface.rope import read_rope, write_rope


def read(fields: Fields) -> dict[str, Any]:
    """Translate config.json."""
    fields.expect("clip_qkv")
    model = standard(fields) | read_rope(fields) | biases(fields)
    return model | {"qk_norm": "width", "moe": mixture(fields, model["mlp_dim"])}


def write(model: ModelConfig) -> dict[str, Any]:
    """Return config.json's fields."""
    own = {"attention_bias": model.attention_bias == "all"}
    return standard_back(model) | write_rope(model) | mixture_back(model, "intermediate_size") | own


FAMILY = Family("olmoe", "OlmoeForCausalLM", read, write, rows.llama)
