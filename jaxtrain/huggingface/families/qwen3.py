"""Qwen3: RMSNorm on every head of queries and keys."""

from __future__ import annotations

from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.families.qwen2 import windows, windows_back
from jaxtrain.huggingface.fields import Family, Fields, biases, standard, standard_back
from jaxtrain.huggingface.rope import read_rope, write_rope


def read(fields: Fields) -> dict[str, Any]:
    """Translate config.json."""
    return standard(fields) | read_rope(fields) | windows(fields) | biases(fields) | {"qk_norm": "head"}


def write(model: ModelConfig) -> dict[str, Any]:
    """Return config.json's fields."""
    own = {"attention_bias": model.attention_bias == "all"}
    return standard_back(model) | write_rope(model) | windows_back(model) | own


FAMILY = Family("qwen3", "Qwen3ForCausalLM", read, write, rows.llama)
