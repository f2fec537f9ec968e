"""How a module declares a parameter: shape, initializer and logical dims in one place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.sharding import Dims


def held_dtype(dims: Dims, dtype: str) -> str:
    """Return the dtype of a parameter by its logical dims: float32 for norms, routers and biases, else `dtype`.

    They are few, and stand around 1 or decide by small differences: bfloat16's steps of 0.8% would be theirs too.
    """
    return "float32" if dims[-1] in ("norm", "router") else dtype


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], dims: Dims, std: float | None, dtype: str = "float32") -> nnx.Param:
    """Declare a parameter: normal with this standard deviation, or ones where std is None.

    Args:
      dims: the logical name of each dim (`sharding.RULES`), which says what shards it: "embed" fsdp; "heads", "kv_heads" and
        "mlp" tensor; "head_dim", "rank" and "norm" nothing.
      dtype: `model.param_dtype`; `held_dtype` says for which parameters it holds.
    """
    key = rngs.params()
    value = jnp.ones(shape) if std is None else std * jax.random.normal(key, shape)
    return nnx.Param(value.astype(held_dtype(dims, dtype)), dims=dims)
