"""Normalisation over the last dim, in float32. The backward pass of a norm of one device keeps its arguments alone."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxtrain.ops.recompute import keeps_arguments
from jaxtrain.sharding import sum_over


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """x / sqrt(mean(x^2) + epsilon) * scale (Zhang & Sennrich 2019)."""
    return keeps_arguments(functools.partial(_rms_norm, epsilon))(x, scale)


def _rms_norm(epsilon: float, x: jax.Array, scale: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    normed = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """(x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias (Ba et al. 2016, arXiv:1607.06450)."""
    return keeps_arguments(functools.partial(_layer_norm, epsilon))(x, scale, bias)


def _layer_norm(epsilon: float, x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def heads_norm(x_BLHN: jax.Array, scale_HN: jax.Array, epsilon: float) -> jax.Array:
    """RMSNorm over the width of all heads, of which this device has its share over `tensor`."""
    x32 = x_BLHN.astype(jnp.float32)
    width = scale_HN.size * lax.axis_size("tensor")
    total = sum_over(jnp.square(x32).sum((-2, -1), keepdims=True), ("tensor",))
    return (x32 * lax.rsqrt(total / width + epsilon) * scale_HN.astype(jnp.float32)).astype(x_BLHN.dtype)
