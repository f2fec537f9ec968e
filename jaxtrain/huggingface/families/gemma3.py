"""Gemma 3, text: five local layers to a global one, each kind with its RoPE, and norms on queries and keys."""

from __future__ import annotations

from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.errors import ExplainedError
from jaxtrain.huggingface.families.gemma import shared
from jaxtrain.huggingface.families.gemma2 import capped, weights, write_shared
from jaxtrain.huggingface.fields import Family, Fields, layer_types, pattern
from jaxtrain.huggingface.rope import read_scaling, write_scaling


def ropes(fields: Fields) -> dict[str, Any]:
    """Translate the two RoPEs."""
    new, old = fields.take("rope_parameters", {}), fields.take("rope_scaling", {})
    whole = {**old, **(new.get("full_attention") or {})}
    near = dict(new.get("sliding_attention") or {})
    base = whole.pop("rope_theta", fields.take("rope_theta", 1e6))
    local = near.pop("rope_theta", fields.take("rope_local_base_freq", 1e4))
    if near.get("rope_type", "default") != "default":
        raise ExplainedError("config.json: a scaled RoPE in Gemma 3's local layers is not supported")
    scaling = read_scaling(whole, None, fields.peek("max_position_embeddings"))
    return {"rope_theta": float(base), "local_rope_theta": float(local), "rope_scaling": scaling}


def read(fields: Fields) -> dict[str, Any]:
    """Translate config.json."""
    every = fields.peek("sliding_window_pattern") or fields.peek("_sliding_window_pattern") or 6
    model = shared(fields) | capped(fields) | ropes(fields) | {"qk_norm": "head"}
    kinds = layer_types(fields, lambda i: "sliding_attention" if (i + 1) % every else "full_attention")
    return model | pattern(kinds, fields.take("sliding_window", 0))


def write(model: ModelConfig) -> dict[str, Any]:
    """Return config.json's fields."""
    whole = {"rope_theta": model.rope_theta, **write_scaling(model.rope_scaling)}
    near = {"rope_theta": model.local_rope_theta, "rope_type": "default"}
    return write_shared(model) | {"rope_parameters": {"full_attention": whole, "sliding_attention": near}}


FAMILY = Family("gemma3_text", "Gemma3ForCausalLM", read, write, weights)
