"""Phi-3 and Phi-4: one projection for q, k and v, one for gate and up, and LongRoPE."""

from __future__ import annotations

from functools import partial
from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.families import mistral
from jaxtrain.huggingface.fields import Family, Part
from jaxtrain.huggingface.rows import LAYER
from jaxtrain.huggingface.table import Row


def stretched_back(model: ModelConfig) -> dict[str, Any]:
    """Return the context before LongRoPE, which these files have outside of RoPE's fields."""
    return {"original_max_position_embeddings": model.rope_scaling.original_length} if model.rope_scaling else {}


def attention(prefix: str, model: ModelConfig) -> list[Row]:
    """Return the rows of attention."""
    pieces = {"query": "[HN]+KN+KN D -> D H N", "key": "HN+[KN]+KN D -> D K N", "value": "HN+KN+[KN] D -> D K N"}
    found = [Row(f"{prefix}attention/{name}", f"{LAYER}self_attn.qkv_proj.weight", axes) for name, axes in pieces.items()]
    return [*found, Row(f"{prefix}attention/out", f"{LAYER}self_attn.o_proj.weight", "D (H N) -> H N D")]


def mlp(prefix: str, model: ModelConfig) -> list[Row]:
    """Return the rows of the MLP."""
    fused, down = f"{LAYER}mlp.gate_up_proj.weight", Row(f"{prefix}mlp/down", f"{LAYER}mlp.down_proj.weight", "D F -> F D")
    return [Row(f"{prefix}mlp/gate", fused, "[F]+F D -> D F"), Row(f"{prefix}mlp/up", fused, "F+[F] D -> D F"), down]


PARTS = (*mistral.PARTS, Part(lambda fields: {}, stretched_back))
FAMILY = Family(
    "phi3", "Phi3ForCausalLM", PARTS, partial(rows.llama, own_attention=attention, own_mlp=mlp), left_out=["head_dim"]
)
