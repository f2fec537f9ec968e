"""Qwen3 with a mixture of experts in every layer."""

from __future__ import annotations

from typing import Any

from jaxtrain.config import ModelConfig, MoEConfig
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.fields import Family, Fields, biases, standard, standard_back
from jaxtrain.huggingface.rope import read_rope, write_rope


def mixture(fields: Fields, width: int | None = None, normalised: bool = False) -> MoEConfig:
    """Translate the experts; `width` is that of one where the file has no field for it."""
    count = fields.take("num_local_experts", None)
    return MoEConfig(
        num_experts=fields.take("num_experts", *[count] if count else []),
        experts_per_token=fields.take("num_experts_per_tok"),
        mlp_dim=width or fields.take("moe_intermediate_size"),
        normalize_weights=fields.take("norm_topk_prob", normalised),
    )


def mixture_back(model: ModelConfig, width: str = "moe_intermediate_size") -> dict[str, Any]:
    """Return the fields of `mixture`."""
    assert model.moe is not None
    own = {"num_experts": model.moe.num_experts, "num_experts_per_tok": model.moe.experts_per_token}
    return own | {width: model.moe.mlp_dim, "norm_topk_prob": model.moe.normalize_weights}


def read(fields: Fields) -> dict[str, Any]:
    """Translate config.json."""
    fields.expect("decoder_sparse_step", 1)
    fields.expect("mlp_only_layers", [])
    local = fields.take("sliding_window", 0) if fields.take("use_sliding_window", False) else 0
    fields.take("sliding_window", None)
    own = {"qk_norm": "head", "moe": mixture(fields), "sliding_window": local}
    return standard(fields) | read_rope(fields) | biases(fields) | own


def write(model: ModelConfig) -> dict[str, Any]:
    """Return config.json's fields."""
    own = {"attention_bias": model.attention_bias == "all", "decoder_sparse_step": 1, "mlp_only_layers": []}
    own |= {"sliding_window": model.sliding_window or None, "use_sliding_window": model.sliding_window > 0}
    return standard_back(model) | write_rope(model) | mixture_back(model) | own


FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", read, write, rows.llama)
