"""gpt-oss: attention sinks, every second layer local, clipped SwiGLU experts with biases, fused and interleaved."""

from __future__ import annotations

from functools import partial
from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.fields import (
    CHOSEN,
    WIDTH,
    Family,
    Fields,
    Part,
    biases,
    expects,
    fixed,
    layers,
    mixture,
    same,
    standard,
    written,
)
from jaxtrain.huggingface.rope import rope
from jaxtrain.huggingface.rows import LAYER
from jaxtrain.huggingface.table import Row


def quantisation(fields: Fields) -> dict[str, Any]:
    """Check that a quantised file is MXFP4, which is expanded as it is read."""
    method = fields.take("quantization_config", {}).get("quant_method", "mxfp4")
    fields.one_of("quantization_config.quant_method", {"mxfp4": None}, method)
    return {}


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


OWN = (
    Part(quantisation),
    expects("swiglu_alpha", 1.702),
    mixture(same("num_local_experts", "num_experts"), CHOSEN, WIDTH, router_bias=True),
    layers(lambda _, i: i % 2 == 0, 128),
    fixed(mlp_bias=True, attention_sinks=True, activation="clipped_silu"),
    same("swiglu_limit", "activation_limit", 7.0),
    written(hidden_act="silu"),
)
PARTS = (*standard(), rope(1.5e5), biases(), *OWN)
FAMILY = Family("gpt_oss", "GptOssForCausalLM", PARTS, partial(rows.llama, mixture=experts))
