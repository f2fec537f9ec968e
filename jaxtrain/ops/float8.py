"""Multiply in float8: operands with one scale a tensor, sums in float32, forward in E4M3 and gradients in E5M2.

x is held as s q with q = float8(x / s). s is a power of two, the smallest with max |x| / s <= M:

    float8_e4m3fn  M = 448    |x - s q| <= max(|x| / 16, s / 1024)
    float8_e5m2    M = 57344  |x - s q| <= max(|x| / 8,  s / 131072)

the second of each where q is subnormal: |x| / s below 2^-6, or 2^-14. So for the forward y = x W and the gradients
dx = g W^T, dW = x^T g the error of each product is at most |a| e(b) + e(a) |b| + e(a) e(b), summed over what the matmul sums.
Formats and their use: Micikevicius et al. 2022, arXiv:2209.05433.

The mesh changes nothing. A weight's scale is taken over the whole matrix, by one exchange of maxima a step, before shards
are gathered: it is the same on every mesh, and the gathered bytes are float8. Activations and gradients are scaled by what a
device holds of one microbatch: for a maximum over all devices every matmul would wait, and microbatches and parts that take
turns would differ still. A power of two as scale makes that harmless. Dividing by it changes no digit, so two scales give the
same numbers, but where the larger one makes q subnormal: for |x| below 2^-14 of that tensor's maximum (2^-29 in E5M2), and
there by at most 2^-17 of the maximum (2^-31; `tests/ops/test_float8.py`).

On GPUs from Ada and Hopper on, XLA calls cuBLAS' float8 matmuls with the product of the scales as factor (`train.xla_options`).
On a CPU it computes the same products: they are exact in float32.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxtrain.sharding import Float8, vary, varying_axes

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2
LARGEST = {FORWARD: 448.0, BACKWARD: 57344.0}
SCALE_NAME = "float8_scale"
"""Name of the scales of activations under remat: every policy keeps them, so that a maximum is taken once."""
_SMALLEST = 2.0**-126


def power_of_two(largest: jax.Array, dtype: Any) -> jax.Array:
    """Return the scale of a tensor whose numbers are at most `largest` in size: float32, NaN where that is not finite."""
    bits = lax.bitcast_convert_type(jnp.maximum(largest.astype(jnp.float32) / LARGEST[dtype], _SMALLEST), jnp.uint32)
    rounded_up = lax.bitcast_convert_type((bits + 0x7FFFFF) >> 23 << 23, jnp.float32)
    return jnp.where(jnp.isfinite(largest), rounded_up, jnp.nan)


def scaled(x: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """Return x / scale in a float8 dtype."""
    return (x * (1 / scale).astype(x.dtype)).astype(dtype)


def _quantised(x: jax.Array, dtype: Any, name: str = "") -> tuple[jax.Array, jax.Array]:
    """(float8 numbers, their scale)."""
    scale = power_of_two(jnp.max(jnp.abs(x)), dtype)
    scale = checkpoint_name(scale, name) if name else scale
    return scaled(x, scale, dtype), scale


class Products(Protocol):
    """The three products of a matmul y = x W, each of float8 operands, summed in float32, in the dtype asked for."""

    def forward(self, x: jax.Array, w: jax.Array, dtype: Any, *more: jax.Array) -> jax.Array:
        """Return x W."""
        ...

    def to_x(self, g: jax.Array, w: jax.Array, dtype: Any, *more: jax.Array) -> jax.Array:
        """Return g W^T."""
        ...

    def to_w(self, x: jax.Array, g: jax.Array, dtype: Any, *more: jax.Array) -> jax.Array:
        """Return x^T g."""
        ...


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_float8(products: Products, x: jax.Array, w: Float8, *more: jax.Array) -> jax.Array:
    """Return x W in x's dtype, with x quantised here; the gradient is quantised in the backward pass.

    Args:
      more: further operands of the products, without gradients.
    """
    return _forward(products, x, w, *more)[0]


def _forward(products: Products, x: jax.Array, w: Float8, *more: jax.Array) -> tuple[jax.Array, tuple]:
    q, scale = _quantised(x, FORWARD, SCALE_NAME)
    y = products.forward(q, w.values, x.dtype, *more)
    dtype_of_w = None if w.slot is None else jnp.zeros((0,), w.slot.dtype)
    # As bytes, because XLA:CPU (jaxlib 0.10.2) writes NaN where a scan stacks float8 residuals.
    kept = lax.bitcast_convert_type(q, jnp.uint8)
    return y * (scale * w.scale).astype(y.dtype), (kept, scale, w.values, w.scale, dtype_of_w, more)


def _backward(products: Products, kept: tuple, gradient: jax.Array) -> tuple:
    x, scale, w, of_w, dtype_of_w, more = kept
    x = lax.bitcast_convert_type(x, FORWARD)
    g, of_g = _quantised(gradient, BACKWARD)
    dx = products.to_x(g, w, gradient.dtype, *more)
    dx = dx * (of_g * of_w).astype(dx.dtype)
    dw = None
    if dtype_of_w is not None:
        dw = products.to_w(x, g, dtype_of_w.dtype, *more)
        dw = dw * (scale * of_g).astype(dw.dtype)
        if x.size > g.size:  # dW first, which frees x's transpose: XLA kept it until the layer's last products
            dx, dw = lax.optimization_barrier((dx, dw))
    no_values, no_scale = vary((jnp.zeros_like(w), jnp.zeros_like(of_w)), tuple(varying_axes(w)))
    return dx, Float8(no_values, no_scale, dw), *[None] * len(more)


in_float8.defvjp(_forward, _backward)


def weights_in_float8(weights: list[jax.Array], lead: list[int], axes: tuple[str, ...]) -> list[Float8]:
    """Return matrices in E4M3, each with its own scale; inside the manual region, from this device's shards.

    Args:
      lead: how many first dims of each number matrices (layers).
      axes: the mesh axes that cut a matrix. The maxima of all matrices are exchanged over them at once.
    """
    own = [jnp.max(jnp.abs(w), tuple(range(n, w.ndim))).astype(jnp.float32) for w, n in zip(weights, lead, strict=True)]
    with jax.named_scope("float8_weights"):
        largest = jnp.concatenate([each.reshape(-1) for each in own])
        axes = tuple(axis for axis in axes if lax.axis_size(axis) > 1)
        largest = vary(lax.pmax(largest, axes)) if axes else largest
        ends = list(itertools.accumulate(each.size for each in own))[:-1]
        made = []
        for w, each, of_w in zip(weights, own, jnp.split(largest, ends), strict=True):
            scale = power_of_two(of_w.reshape(each.shape), FORWARD)
            made.append(Float8(scaled(w, jnp.expand_dims(scale, tuple(range(each.ndim, w.ndim))), FORWARD), scale))
    return made
