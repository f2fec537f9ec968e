"""SmolLM3: every fourth layer has no positions."""

from __future__ import annotations

from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.errors import ExplainedError
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.fields import Family, Fields, biases, layer_types, pattern, standard, standard_back
from jaxtrain.huggingface.rope import read_rope, write_rope


def read(fields: Fields) -> dict[str, Any]:
    """Translate config.json."""
    every, count = fields.peek("no_rope_layer_interval") or 4, fields.peek("num_hidden_layers")
    rotated = fields.take("no_rope_layers", [int((i + 1) % every != 0) for i in range(count)])
    fields.expect("use_sliding_window", False)
    if "local" in layer_types(fields, lambda i: "full_attention"):
        raise ExplainedError("config.json: sliding windows in a smollm3 are not supported")
    fields.take("sliding_window", None)
    model = standard(fields, tied=True) | read_rope(fields, 2e6) | biases(fields)
    return (
        model
        | pattern(["global" if with_rope else "nope" for with_rope in rotated], 0)
        | {"mlp_bias": fields.take("mlp_bias", False)}
    )


def write(model: ModelConfig) -> dict[str, Any]:
    """Return config.json's fields."""
    kinds = [model.kinds[i % len(model.kinds)] for i in range(model.num_layers)]
    own = {"no_rope_layers": [int(kind != "nope") for kind in kinds], "layer_types": ["full_attention"] * model.num_layers}
    own |= {"attention_bias": model.attention_bias == "all", "mlp_bias": model.mlp_bias}
    shared = standard_back(model) | write_rope(model) | own
    del shared["head_dim"]
    return shared


FAMILY = Family("smollm3", "SmolLM3ForCausalLM", read, write, rows.llama)
