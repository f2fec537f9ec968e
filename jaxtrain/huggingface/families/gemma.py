"""Gemma: norms scaled by 1 + weight, GeGLU, embeddings times the square root of the width."""

from __future__ import annotations

import math
from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.fields import Family, Fields, biases, standard, standard_back
from jaxtrain.huggingface.rope import read_rope, write_rope


def shared(fields: Fields, activation: str = "hidden_activation") -> dict[str, Any]:
    """Translate what all Gemmas share."""
    fields.expect("use_bidirectional_attention", False)
    model = standard(fields, tied=True, activation=activation)
    fields.take("hidden_act", None)  # `transformers` reads hidden_activation alone; published files have both
    if model["activation"] == "gelu":  # as `transformers` reads it: the models were trained with the tanh form
        model["activation"] = "gelu_tanh"
    return model | biases(fields) | {"norm_offset": 1.0, "embedding_scale": math.sqrt(model["embed_dim"])}


def read(fields: Fields) -> dict[str, Any]:
    """Translate config.json."""
    newer = fields.take("hidden_activation", None)
    model = shared(fields, "hidden_act")
    if newer not in (None, "gelu_pytorch_tanh"):
        fields.one_of("hidden_activation", {"gelu_pytorch_tanh": None}, newer)
    return model | {"activation": "gelu_tanh"} | read_rope(fields)


def write(model: ModelConfig) -> dict[str, Any]:
    """Return config.json's fields."""
    return standard_back(model) | write_rope(model) | {"attention_bias": model.attention_bias == "all"}


FAMILY = Family("gemma", "GemmaForCausalLM", read, write, rows.llama)
