"""Gemma 3, text: five local layers to a global one, each kind with its RoPE, and norms on queries and keys."""

from __future__ import annotations

from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.errors import ExplainedError
from jaxtrain.huggingface.families.gemma2 import SHARED, weights
from jaxtrain.huggingface.fields import Family, Fields, Part, fixed, layers
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


def ropes_back(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of `ropes`."""
    whole = {"rope_theta": model.rope_theta, **write_scaling(model.rope_scaling)}
    near = {"rope_theta": model.local_rope_theta, "rope_type": "default"}
    return {"rope_parameters": {"full_attention": whole, "sliding_attention": near}}


def is_local(fields: Fields, layer: int) -> bool:
    """Return whether a layer is local where the file has no list of them."""
    every = fields.peek("sliding_window_pattern") or fields.peek("_sliding_window_pattern") or 6
    return (layer + 1) % every != 0


OWN = (Part(ropes, ropes_back), fixed(qk_norm="head"), layers(is_local))
FAMILY = Family("gemma3_text", "Gemma3ForCausalLM", (*SHARED, *OWN), weights)
