"""Activations of the MLP and of experts."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtrain.config import ModelConfig
from jaxtrain.ops.recompute import keeps_arguments

CLIPPED_SILU_SLOPE = 1.702


def activate(config: ModelConfig, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Return act(gate) * up; the backward pass keeps these two.

    clipped_silu (`GptOssExperts` in transformers/models/gpt_oss/modeling_gpt_oss.py) is (u + 1) g sigmoid(1.702 g) with
    g = min(gate, limit) and u = clip(up, -limit, limit).
    """
    return keeps_arguments(functools.partial(_gated, config))(gate, up)


def _gated(config: ModelConfig, gate: jax.Array, up: jax.Array) -> jax.Array:
    if config.activation != "clipped_silu":
        return _alone(config, gate) * up
    limit = config.activation_limit
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(CLIPPED_SILU_SLOPE * gate)


def activate_alone(config: ModelConfig, x: jax.Array) -> jax.Array:
    """Return act(x), of an MLP without a gate: silu, gelu by the error function, or gelu by tanh (arXiv:1606.08415).

    The backward pass keeps x.
    """
    return keeps_arguments(functools.partial(_alone, config))(x)


def _alone(config: ModelConfig, x: jax.Array) -> jax.Array:
    if config.activation == "silu":
        return jax.nn.silu(x)
    return jax.nn.gelu(x) if config.activation == "gelu_tanh" else gelu(x)


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Return x Phi(x), with Phi(x) = erfc(-x / sqrt(2)) / 2 (arXiv:1606.08415).

    Its derivative is said here, Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi), since that of jax 0.12.0's erfc cannot be had inside a
    shard_map that checks what varies.
    """
    return x * _normal_cdf(x)


@gelu.defjvp
def _gelu_derivative(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    density = jnp.exp(-0.5 * jnp.square(x)) * np.asarray(1 / math.sqrt(2 * math.pi), x.dtype)
    return gelu(x), (_normal_cdf(x) + x * density) * dx


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * lax.erfc(x * np.asarray(-math.sqrt(0.5), x.dtype))
