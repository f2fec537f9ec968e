"""Check the float8 matmul of the devices: its three products must be those of the same float8 numbers in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxtrain.ops.float8 import BACKWARD, FORWARD, power_of_two, scaled
from jaxtrain.ops.matmul import multiply
from jaxtrain.preflight.checks import Check, Finding, Site, judge_errors, relative_error
from jaxtrain.sharding import Float8

ROWS, LARGEST_WIDTH = 256, 2048
LARGEST_ERROR = 0.02
"""Of the norm: the operands are the same numbers, so that only sums and the rounding of a bfloat16 result (0.002) differ."""
NAMES: tuple[str, ...] = ("the output", "the gradient of the input", "the gradient of the weight")


def look_at_float8(site: Site) -> list[float]:
    """Return the errors of y = x W, dx and dW on this process's first device, as shares of the norm."""
    model = site.config.model
    k, n = min(model.embed_dim, LARGEST_WIDTH), min(model.moe.mlp_dim if model.moe else model.mlp_dim, LARGEST_WIDTH)

    def operand(number: int, shape: tuple[int, int]) -> jax.Array:
        return (3.0**number * jax.random.normal(jax.random.key(number), shape)).astype(model.dtype)

    def held(x: jax.Array, dtype: type) -> tuple[jax.Array, jax.Array]:
        scale = power_of_two(jnp.abs(x).max(), dtype)
        return scaled(x, scale, dtype), scale

    def compare() -> jax.Array:
        x, w, g = operand(0, (ROWS, k)), operand(1, (k, n)), operand(2, (ROWS, n))
        weight = Float8(*held(w, FORWARD), jnp.zeros(w.shape))
        y, pull = jax.vjp(lambda x, w: multiply("BD,DF->BF", x, w), x, weight)
        dx, dw = pull(g.astype(y.dtype))
        kinds = ((x, FORWARD), (w, FORWARD), (g, BACKWARD))
        x, w, g = (q.astype(jnp.float32) * scale for q, scale in (held(*kind) for kind in kinds))
        with jax.default_matmul_precision("highest"):
            pairs = ((y, x @ w), (dx, g @ w.T), (dw.slot, x.T @ g))
        return jnp.stack([relative_error(*pair) for pair in pairs])

    with jax.default_device(jax.local_devices()[0]):
        return [float(error) for error in jax.jit(compare)()]


def judge_float8(site: Site, seen: list[list[float]]) -> list[Finding]:
    """Name each process whose products are wrong, by what is worst."""
    errors = [("a float8 matmul", dict(zip(NAMES, of_process, strict=True))) for of_process in seen]
    findings, worst = judge_errors(site, "float8", errors, LARGEST_ERROR, "--model.matmul_dtype=default")
    words = f"a matmul is within {worst:.2%} of the same numbers' in float32, gradients too"
    return findings or [Finding("float8", "ok", words, {"processes": seen})]


def checks(site: Site) -> list[Check]:
    """Return the single check of float8, if the run may multiply in it."""
    return [Check("float8", look_at_float8, judge_float8)] if site.config.model.matmul_dtype != "default" else []
