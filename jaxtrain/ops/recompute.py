"""Functions whose backward pass keeps their arguments alone, for what is cheap to compute again: activations and norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name


def keeps_arguments(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return `function` of arrays, with a backward pass that computes it again from them.

    Without it JAX keeps what each elementwise operation needs: of silu(g) u that is three arrays beside g and u, of an RMSNorm
    three in float32, which must be written and read again. XLA fuses the computation into the backward pass's own.
    """

    # jax.checkpoint would not do: the policy of the layer's own reaches into it, and `none` keeps everything in there.
    def backward(arrays: tuple[Any, ...], gradient: jax.Array) -> tuple[Any, ...]:
        return jax.vjp(function, *arrays)[1](gradient)

    def forward(*arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        # Named, so that remat `none` keeps what came through a barrier of take_turns, whose results it refuses, and not all
        # that went into the barrier.
        return function(*arrays), tuple(checkpoint_name(x, "argument") if x.ndim > 1 else x for x in arrays)

    own = jax.custom_vjp(function)
    own.defvjp(forward, backward)
    return own
