"""Activations of the MLP and of experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxtrain.config import ModelConfig

CLIPPED_SILU_SLOPE = 1.702


def activate(config: ModelConfig, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Return act(gate) * up.

    clipped_silu (`GptOssExperts` in transformers/models/gpt_oss/modeling_gpt_oss.py) is (u + 1) g sigmoid(1.702 g) with
    g = min(gate, limit) and u = clip(up, -limit, limit).
    """
    if config.activation != "clipped_silu":
        return activate_alone(config, gate) * up
    limit = config.activation_limit
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(CLIPPED_SILU_SLOPE * gate)


def activate_alone(config: ModelConfig, x: jax.Array) -> jax.Array:
    """Return act(x), of an MLP without a gate: silu, gelu by the error function, or gelu by tanh (arXiv:1606.08415)."""
    if config.activation == "silu":
        return jax.nn.silu(x)
    return jax.nn.gelu(x, approximate=config.activation == "gelu_tanh")
