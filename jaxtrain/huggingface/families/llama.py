"""Llama 2, 3, 3.1 and 3.2."""

from __future__ import annotations

from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.fields import Family, Fields, biases, standard, standard_back
from jaxtrain.huggingface.rope import read_rope, write_rope


def read(fields: Fields) -> dict[str, Any]:
    """Translate config.json."""
    return standard(fields) | read_rope(fields) | biases(fields) | {"mlp_bias": fields.take("mlp_bias", False)}


def write(model: ModelConfig) -> dict[str, Any]:
    """Return config.json's fields."""
    own = {"attention_bias": model.attention_bias == "all", "mlp_bias": model.mlp_bias}
    return standard_back(model) | write_rope(model) | own


FAMILY = Family("llama", "LlamaForCausalLM", read, write, rows.llama, [r".*rotary_emb\.inv_freq"])
