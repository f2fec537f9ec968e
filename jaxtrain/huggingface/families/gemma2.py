"""Gemma 2: norms before and after each block, soft caps, every second layer local."""

from __future__ import annotations

from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.families.gemma import shared
from jaxtrain.huggingface.fields import Family, Fields, layer_types, layer_types_back, pattern, standard_back
from jaxtrain.huggingface.rope import read_rope, write_rope
from jaxtrain.huggingface.rows import LAYER
from jaxtrain.huggingface.table import Row


def capped(fields: Fields) -> dict[str, Any]:
    """Translate the soft caps and the scale of attention."""
    return {
        "norm_placement": "both",
        "attention_scale": fields.take("query_pre_attn_scalar") ** -0.5,
        "attention_softcap": fields.take("attn_logit_softcapping", 0.0),
        "logit_softcap": fields.take("final_logit_softcapping", 0.0),
    }


def read(fields: Fields) -> dict[str, Any]:
    """Translate config.json."""
    model = shared(fields) | capped(fields) | read_rope(fields)
    kinds = layer_types(fields, lambda i: "full_attention" if i % 2 else "sliding_attention")
    return model | pattern(kinds, fields.take("sliding_window", 0))


def write_shared(model: ModelConfig) -> dict[str, Any]:
    """Return the fields that Gemma 3 shares."""
    own = {"attn_logit_softcapping": model.attention_softcap or None, "final_logit_softcapping": model.logit_softcap or None}
    own |= {"query_pre_attn_scalar": _whole(model.attention_scale**-2), "attention_bias": model.attention_bias == "all"}
    return standard_back(model, "hidden_activation") | own | layer_types_back(model)


def _whole(number: float) -> float:
    """Return the whole number where it is one up to rounding."""
    return round(number) if abs(number - round(number)) < 1e-9 * number else number


def write(model: ModelConfig) -> dict[str, Any]:
    """Return config.json's fields."""
    return write_shared(model) | write_rope(model)


def weights(model: ModelConfig) -> list[Row]:
    """Return the rows."""
    found = [*rows.outer(model), *rows.attention("layers/", model), *rows.mlp("layers/", model)]
    found += rows.norm("layers/attention/norm", f"{LAYER}input_layernorm", model)
    found += rows.norm("layers/attention/post_norm", f"{LAYER}post_attention_layernorm", model)
    found += rows.norm("layers/mlp/norm", f"{LAYER}pre_feedforward_layernorm", model)
    return found + rows.norm("layers/mlp/post_norm", f"{LAYER}post_feedforward_layernorm", model)


FAMILY = Family("gemma2", "Gemma2ForCausalLM", read, write, weights)
