"""Qwen3 with a mixture of experts in every layer."""

from __future__ import annotations

from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.fields import CHOSEN, Family, Fields, Part, biases, expects, fixed, mixture, same, standard, written
from jaxtrain.huggingface.rope import rope


def count(fields: Fields) -> dict[str, Any]:
    """Translate the number of experts, which has two names."""
    other = fields.take("num_local_experts", None)
    return {"num_experts": fields.take("num_experts", *[other] if other else [])}


def window(fields: Fields) -> dict[str, Any]:
    """Translate the window, which all layers have or none."""
    size, used = fields.take("sliding_window", 0), fields.take("use_sliding_window", False)
    return {"sliding_window": size if used else 0}


def window_back(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of `window`."""
    return {"sliding_window": model.sliding_window or None, "use_sliding_window": model.sliding_window > 0}


EXPERTS = (
    Part(count, lambda moe: {"num_experts": moe.num_experts}),
    CHOSEN,
    same("norm_topk_prob", "normalize_weights", False),
)
OWN = (
    expects("decoder_sparse_step", 1),
    expects("mlp_only_layers", []),
    fixed(qk_norm="head"),
    Part(window, window_back),
    mixture(*EXPERTS, same("moe_intermediate_size", "mlp_dim")),
    written(decoder_sparse_step=1, mlp_only_layers=[]),
)
FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", (*standard(), rope(), biases(), *OWN), rows.llama)
