"""OLMo 2: norms after each block only, and norms on queries and keys over the whole width."""

from __future__ import annotations

from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.fields import Family, Fields, biases, standard, standard_back
from jaxtrain.huggingface.rope import read_rope, write_rope
from jaxtrain.huggingface.rows import LAYER
from jaxtrain.huggingface.table import Row


def read(fields: Fields) -> dict[str, Any]:
    """Translate config.json."""
    return standard(fields) | read_rope(fields) | biases(fields) | {"norm_placement": "post", "qk_norm": "width"}


def write(model: ModelConfig) -> dict[str, Any]:
    """Return config.json's fields."""
    return standard_back(model) | write_rope(model) | {"attention_bias": model.attention_bias == "all"}


def weights(model: ModelConfig) -> list[Row]:
    """Return the rows."""
    found = [*rows.outer(model), *rows.attention("layers/", model), *rows.mlp("layers/", model)]
    found += rows.norm("layers/attention/post_norm", f"{LAYER}post_attention_layernorm", model)
    return found + rows.norm("layers/mlp/post_norm", f"{LAYER}post_feedforward_layernorm", model)


FAMILY = Family("olmo2", "Olmo2ForCausalLM", read, write, weights)
