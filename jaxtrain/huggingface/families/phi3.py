"""Phi-3 and Phi-4: one projection for q, k and v, one for gate and up, and LongRoPE."""

from __future__ import annotations

from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.families.mistral import read
from jaxtrain.huggingface.families.mistral import write as write_mistral
from jaxtrain.huggingface.fields import Family
from jaxtrain.huggingface.rows import LAYER
from jaxtrain.huggingface.table import Row


def write(model: ModelConfig) -> dict[str, Any]:
    """Return config.json's fields."""
    found = write_mistral(model)
    del found["head_dim"]
    scaling = model.rope_scaling
    return found | ({"original_max_position_embeddings": scaling.original_length} if scaling else {})


def weights(model: ModelConfig) -> list[Row]:
    """Return the rows."""
    found = rows.outer(model) + rows.norm("layers/attention/norm", f"{LAYER}input_layernorm", model)
    found += rows.norm("layers/mlp/norm", f"{LAYER}post_attention_layernorm", model)
    pieces = ("[HN]+KN+KN D -> D H N", "HN+[KN]+KN D -> D K N", "HN+KN+[KN] D -> D K N")
    for name, axes in zip(("query", "key", "value"), pieces, strict=True):
        found += [Row(f"layers/attention/{name}", f"{LAYER}self_attn.qkv_proj.weight", axes)]
    found += [Row("layers/attention/out", f"{LAYER}self_attn.o_proj.weight", "D (H N) -> H N D")]
    found += [Row("layers/mlp/gate", f"{LAYER}mlp.gate_up_proj.weight", "[F]+F D -> D F")]
    found += [Row("layers/mlp/up", f"{LAYER}mlp.gate_up_proj.weight", "F+[F] D -> D F")]
    return [*found, Row("layers/mlp/down", f"{LAYER}mlp.down_proj.weight", "D F -> F D")]


FAMILY = Family("phi3", "Phi3ForCausalLM", read, write, weights)
