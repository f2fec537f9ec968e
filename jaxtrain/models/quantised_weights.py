"""Weights in 8 bits for inference: int8 or float8 numbers, with float32 scales of channels or groups.

W[i, j] = scale[g(i), j] * values[i, j], where i is summed over in a matmul, j numbers the output channels, and g is the group
of i: one for all i, or one for each `group` neighbours. scale = max |W| of the group / the dtype's largest number, so the
error of an int8 number is at most half a scale (Dettmers et al. 2022, section 2; no outliers are treated apart).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxtrain.errors import ExplainedError
from jaxtrain.models.parameters import held_dtype
from jaxtrain.sharding import RULES, Dims, gather_weight, is_dims, spec

Kind = Literal["int8", "float8"]
DTYPES: dict[str, Any] = {"int8": jnp.int8, "float8": jnp.float8_e4m3fn}
LARGEST = {"int8": 127.0, "float8": 448.0}
NUMBERED = ("chunk", "stage", "layer", "experts")
"""Dims that number matrices."""
WHOLE = "rank"
"""A logical dim that no mesh axis cuts."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=["scale_dims", "dtype"])
@dataclass(frozen=True)
class Quantised:
    """A weight in 8 bits, in place of its array in a tree of parameters: it is cast and gathered like one."""

    values: Any
    """int8 or float8_e4m3fn, of the weight's shape and sharding."""
    scale: Any
    """float32; of the dims that are summed over, it has one number for each group."""
    scale_dims: Dims
    """Logical dims of `scale`; those of one layer may still have the dims before them that number layers."""
    dtype: str = "float32"
    """What `gathered` returns."""

    def astype(self, dtype: str) -> Quantised:
        """Return the weight that is this dtype once it is gathered."""
        return replace(self, dtype=dtype)

    def gathered(self, dims: Dims) -> jax.Array:
        """Return the weight as numbers again, gathered over fsdp in 8 bits. In the manual region."""
        values = gather_weight(self.values, self.values, dims, "float32")
        scale = gather_weight(self.scale, self.scale, self.scale_dims[-len(dims) :], "float32")
        split = [part for n, m in zip(values.shape, scale.shape, strict=True) for part in (m, n // m)]
        scale = scale.reshape([part for m in scale.shape for part in (m, 1)])
        return (values.reshape(split).astype(jnp.float32) * scale).astype(self.dtype).reshape(values.shape)


def summed(dims: Dims) -> tuple[int, ...]:
    """Return which of a weight's dims its matmul sums over; of an embedding table's rows, the columns."""
    own = [i for i, name in enumerate(dims) if name not in NUMBERED]
    if dims[own[0]] in ("vocab", "positions"):
        return (own[-1],)
    return tuple(own[:-1]) if dims[own[-1]] == "embed" else (own[0],)


def is_matrix(dims: Dims) -> bool:
    """Return whether a parameter is quantised: norms, routers, biases and sinks stay as they are."""
    return held_dtype(dims, "int8") == "int8" and sum(name not in NUMBERED for name in dims) > 1


def quantise(weight: jax.Array, dims: Dims, kind: Kind, group: int, mesh: Mesh) -> Quantised:
    """Return a weight in 8 bits; the weight itself is freed.

    Args:
      group: neighbours with a scale of their own, along the last dim that is summed over (all of it where it is shorter);
        0: all of a channel have one.

    Raises:
      ExplainedError: the group does not divide that dim, or its groups do not divide among the devices that cut it.
    """
    axes = summed(dims)
    last = axes[-1]
    size, axis = weight.shape[last], RULES[dims[last]]
    length = min(group, size) or size
    parts = mesh.shape[axis] if isinstance(axis, str) else 1
    if size % length or group and size // length % parts:
        among = f", into groups for each of the {parts} devices of mesh.{axis}" if parts > 1 else ""
        raise ExplainedError(f"group={group} does not divide {size}, the {dims[last]} of a matrix {' x '.join(dims)}{among}")
    scale_dims = dims if group else tuple(WHOLE if i in axes else name for i, name in enumerate(dims))
    over = (last + 1,) if group else (*axes, last + 1)
    places = [NamedSharding(mesh, spec(names)) for names in (dims, scale_dims)]

    def convert(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        wide = weight.astype(jnp.float32).reshape(*weight.shape[:last], size // length, length, *weight.shape[last + 1 :])
        scale = jnp.abs(wide).max(over, keepdims=True) / LARGEST[kind]
        scale = jnp.where(scale > 0, scale, 1.0)
        numbers = wide / scale
        values = (jnp.round(numbers) if kind == "int8" else numbers).astype(DTYPES[kind]).reshape(weight.shape)
        return values, scale.squeeze(last + 1)

    values, scale = jax.jit(convert, out_shardings=tuple(places))(weight)
    weight.delete()
    return Quantised(values, scale, scale_dims)


def quantised(params: Any, dims_tree: Any, kind: Kind, group: int, mesh: Mesh) -> Any:
    """Return a tree of parameters with its matrices in 8 bits; those of `params` are freed one by one."""

    def leaf(dims: Dims, weight: jax.Array) -> Any:
        return quantise(weight, dims, kind, group, mesh) if is_matrix(dims) else weight

    return jax.tree.map(leaf, dims_tree, params, is_leaf=is_dims)


def weight_specs(params: Any, dims_tree: Any) -> Any:
    """Return the PartitionSpec of every leaf of parameters, in 8 bits or not."""

    def leaf(dims: Dims, weight: Any) -> Any:
        if isinstance(weight, Quantised):
            return replace(weight, values=spec(dims), scale=spec(weight.scale_dims))
        return spec(dims)

    return jax.tree.map(leaf, dims_tree, params, is_leaf=is_dims)
