"""Declare a parameter: shape, initializer and logical dims in one place."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.config import ModelConfig
from jaxtrain.parts import plugged
from jaxtrain.sharding import LORA, Dims


def held_dtype(dims: Dims, dtype: str) -> str:
    """Return a parameter's dtype by its logical dims: float32 for norms, routers, biases and adapters, else `dtype`.

    Those are few, and lie around 1 or decide by small differences, where bfloat16's steps of 0.8% matter.
    """
    is_fine = dims[-1] in ("norm", "router") or dims[-1].endswith("bias") or LORA in dims
    return "float32" if is_fine else dtype


def parameter(
    rngs: nnx.Rngs | None, shape: tuple[int, ...], dims: Dims, std: float | None, dtype: str = "float32"
) -> nnx.Param:
    """Return a parameter with its logical dims: normal with this standard deviation, or ones if std is None.

    Args:
      rngs: None for the shape alone (`declare`).
      dtype: `model.param_dtype`; see `held_dtype` for exceptions.
    """
    if rngs is None:
        return nnx.Param(jax.ShapeDtypeStruct(shape, held_dtype(dims, dtype)), dims=dims)
    key = rngs.params()
    value = jnp.ones(shape) if std is None else std * jax.random.normal(key, shape)
    return nnx.Param(value.astype(held_dtype(dims, dtype)), dims=dims)


def declare(module: Any, config: ModelConfig) -> nnx.Module:
    """Return `module(config)` with shapes in place of values.

    It takes a millisecond; with parts that are plugged in, which may use rngs as they like, it is traced, a hundred times that.
    """
    return nnx.eval_shape(lambda: module(config, nnx.Rngs(params=0))) if plugged(config.parts) else module(config, None)
