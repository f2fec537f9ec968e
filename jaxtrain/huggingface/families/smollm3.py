"""SmolLM3: every fourth layer has no positions."""

from __future__ import annotations

from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.errors import ExplainedError
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.fields import Family, Fields, Part, biases, expects, ignored, layer_types, pattern, same, standard
from jaxtrain.huggingface.rope import rope


def positions(fields: Fields) -> dict[str, Any]:
    """Translate which layers rotate; none may be local."""
    every, count = fields.peek("no_rope_layer_interval") or 4, fields.peek("num_hidden_layers")
    rotated = fields.take("no_rope_layers", [int((i + 1) % every != 0) for i in range(count)])
    if "local" in layer_types(fields, lambda i: "full_attention"):
        raise ExplainedError("config.json: sliding windows in a smollm3 are not supported")
    return pattern(["global" if with_rope else "nope" for with_rope in rotated], 0)


def positions_back(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of `positions`."""
    kinds = [model.kinds[i % len(model.kinds)] for i in range(model.num_layers)]
    return {"no_rope_layers": [int(kind != "nope") for kind in kinds], "layer_types": ["full_attention"] * model.num_layers}


OWN = (Part(positions, positions_back), expects("use_sliding_window", False), ignored("sliding_window"))
PARTS = (*standard(tied=True), rope(2e6), biases(), same("mlp_bias", "mlp_bias", False), *OWN)
FAMILY = Family("smollm3", "SmolLM3ForCausalLM", PARTS, rows.llama, left_out=["head_dim"])
