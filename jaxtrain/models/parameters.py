"""How a module declares a parameter: shape, initializer and logical dims in one place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.sharding import Dims


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], dims: Dims, std: float | None, dtype: str) -> nnx.Param:
    """A parameter with its logical dims: normal with this standard deviation, or ones where std is None."""
    key = rngs.params()
    value = jnp.ones(shape) if std is None else std * jax.random.normal(key, shape)
    return nnx.Param(value.astype(dtype), dims=dims)
