"""Cohere's Command R: one LayerNorm for attention and MLP side by side, neighbours rotated, logits scaled."""

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
    fields.expect("use_qk_norm", False)
    model = standard(fields, tied=True) | read_rope(fields, 5e5) | biases(fields)
    own = {"norm": "layer", "norm_epsilon": fields.take("layer_norm_eps", 1e-5), "residual": "parallel_one_norm"}
    return model | own | {"logit_scale": fields.take("logit_scale", 0.0625)}


def write(model: ModelConfig) -> dict[str, Any]:
    """Return config.json's fields."""
    own = {"layer_norm_eps": model.norm_epsilon, "logit_scale": model.logit_scale, "use_qk_norm": False}
    shared = standard_back(model) | write_rope(model) | own | {"attention_bias": model.attention_bias == "all"}
    for name in ("head_dim", "rms_norm_eps"):
        del shared[name]
    return shared


def weights(model: ModelConfig) -> list[Row]:
    """Return the rows."""
    found = rows.outer(model) + rows.norm("layers/attention/norm", f"{LAYER}input_layernorm", model)
    return found + rows.attention("layers/", model, pairs=True) + rows.mlp("layers/", model)


FAMILY = Family("cohere", "CohereForCausalLM", read, write, weights)
