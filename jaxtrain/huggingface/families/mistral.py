"""Mistral: Llama with a sliding window."""

from __future__ import annotations

from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.fields import Family, Fields, standard, standard_back
from jaxtrain.huggingface.rope import read_rope, write_rope


def read(fields: Fields) -> dict[str, Any]:
    """Translate config.json."""
    return standard(fields) | read_rope(fields) | {"sliding_window": fields.take("sliding_window", 0)}


def write(model: ModelConfig) -> dict[str, Any]:
    """Return config.json's fields."""
    return standard_back(model) | write_rope(model) | {"sliding_window": model.sliding_window or None}


FAMILY = Family("mistral", "MistralForCausalLM", read, write, rows.llama, [r".*rotary_emb\.inv_freq"])
