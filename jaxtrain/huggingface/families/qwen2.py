"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.fields import Family, Fields, layer_types, layer_types_back, pattern, standard, standard_back
from jaxtrain.huggingface.rope import read_rope, write_rope


def windows(fields: Fields) -> dict[str, Any]:
    """Translate Qwen's windows: with use_sliding_window the layers from max_window_layers on are local."""
    first, used = fields.peek("max_window_layers", 28), fields.take("use_sliding_window", False)
    window = fields.take("sliding_window", 0)
    kinds = layer_types(fields, lambda i: "sliding_attention" if used and i >= first else "full_attention")
    return pattern(kinds, window)


def windows_back(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of `windows`."""
    return layer_types_back(model) | {"use_sliding_window": model.sliding_window > 0}


def read(fields: Fields) -> dict[str, Any]:
    """Translate config.json."""
    return standard(fields) | read_rope(fields) | windows(fields) | {"attention_bias": "qkv"}


def write(model: ModelConfig) -> dict[str, Any]:
    """Return config.json's fields."""
    return standard_back(model) | write_rope(model) | windows_back(model)


FAMILY = Family("qwen2", "Qwen2ForCausalLM", read, write, rows.llama)
