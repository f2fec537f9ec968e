"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from jaxtrain.huggingface import rows
from jaxtrain.huggingface.fields import Family, Fields, Part, fixed, layer_types_back, layers, standard
from jaxtrain.huggingface.rope import rope


def windows(fields: Fields) -> dict[str, Any]:
    """Translate Qwen's windows: with use_sliding_window the layers from max_window_layers on are local."""
    first, used = fields.peek("max_window_layers", 28), fields.take("use_sliding_window", False)
    return layers(lambda _, i: used and i >= first).read(fields)


WINDOWS = Part(windows, lambda model: layer_types_back(model) | {"use_sliding_window": model.sliding_window > 0})
FAMILY = Family("qwen2", "Qwen2ForCausalLM", (*standard(), rope(), WINDOWS, fixed(attention_bias="qkv")), rows.llama)
