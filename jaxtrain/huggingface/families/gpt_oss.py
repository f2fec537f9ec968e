"""gpt-oss: attention sinks, every second layer local, clipped SwiGLU experts with biases, fused and interleaved."""

from __future__ import annotations

from typing import Any

from jaxtrain.config import ModelConfig, MoEConfig
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.fields import Family, Fields, biases, layer_types, layer_types_back, pattern, standard, standard_back
from jaxtrain.huggingface.rope import read_rope, write_rope
from jaxtrain.huggingface.rows import LAYER
from jaxtrain.huggingface.table import Row


def read(fields: Fields) -> dict[str, Any]:
    """Translate config.json; MXFP4 files are expanded as they are read."""
    method = fields.take("quantization_config", {}).get("quant_method", "mxfp4")
    fields.one_of("quantization_config.quant_method", {"mxfp4": None}, method)
    fields.expect("swiglu_alpha", 1.702)
    model = standard(fields) | read_rope(fields, 1.5e5) | biases(fields)
    moe = MoEConfig(
        num_experts=fields.take("num_local_experts"),
        experts_per_token=fields.take("num_experts_per_tok"),
        mlp_dim=model["mlp_dim"],
        router_bias=True,
    )
    kinds = layer_types(fields, lambda i: "full_attention" if i % 2 else "sliding_attention")
    own = {"moe": moe, "mlp_bias": True, "attention_sinks": True, "activation": "clipped_silu"}
    own |= {"activation_limit": fields.take("swiglu_limit", 7.0)}
    return model | own | pattern(kinds, fields.take("sliding_window", 128))


def write(model: ModelConfig) -> dict[str, Any]:
    """Return config.json's fields."""
    assert model.moe is not None
    own = {"num_local_experts": model.moe.num_experts, "num_experts_per_tok": model.moe.experts_per_token}
    own |= {"swiglu_limit": model.activation_limit, "hidden_act": "silu", "intermediate_size": model.moe.mlp_dim}
    own |= {"attention_bias": model.attention_bias == "all"}
    return standard_back(model) | write_rope(model) | layer_types_back(model) | own


def experts(prefix: str, model: ModelConfig) -> list[Row]:
    """Return the rows of the experts: one tensor for all, gate and up in turn."""
    own, stem = f"{prefix}moe/", f"{LAYER}mlp."
    found = [
        Row(f"{own}router", f"{stem}router.weight", "E D -> D E"),
        Row(f"{own}router_bias", f"{stem}router.bias", "E -> E"),
    ]
    for number, name in enumerate(("gate", "up")):
        found += [Row(f"{own}{name}", f"{stem}experts.gate_up_proj", f"E D (X {number}/2) -> E D X")]
        found += [Row(f"{own}{name}_bias", f"{stem}experts.gate_up_proj_bias", f"E (X {number}/2) -> E X")]
    found += [Row(f"{own}down", f"{stem}experts.down_proj", "E X D -> E X D")]
    return [*found, Row(f"{own}down_bias", f"{stem}experts.down_proj_bias", "E D -> E D")]


def weights(model: ModelConfig) -> list[Row]:
    """Return the rows."""
    return rows.llama(model, experts)


FAMILY = Family("gpt_oss", "GptOssForCausalLM", read, write, weights)
