"""Matrices in 8 or 4 bits: int8, float8 or NormalFloat numbers, with float32 scales of channels or groups.

W[i, j] = scale[g(i), j] * number[i, j], where i is summed over in a matmul, j numbers the output channels, and g is the group
of i: one for all i, or one for each `group` neighbours. scale = max |W| of the group / the largest number, so the error of an
int8 number is at most half a scale (Dettmers et al. 2022, section 2; no outliers are treated apart).

nf4 is QLoRA's 4-bit NormalFloat (Dettmers et al. 2023, arXiv:2305.14314): a number is the nearest of 16 quantiles of a normal
distribution, in groups of 64 by default; scales are not quantised again. Embedding table and head stay as they are, as there.
Two numbers, neighbours along the last dim that is summed over, are packed into a uint8, the first in the upper bits. jax's
int4 (0.10.2) works in a manual region and in Orbax, but it is a byte a number on the host, its bits cannot be read for a
checksum, and its collectives are untried on GPUs.

Such a weight is frozen. It stands as a `Quantised` in trees of parameters and of their logical dims, so its two arrays are
sharded, saved, checked and counted like any others; only where a layer's weights are gathered do they become numbers again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import DictKey

from jaxtrain.config import LoraConfig
from jaxtrain.errors import ConfigError
from jaxtrain.models.parameters import held_dtype
from jaxtrain.sharding import RULES, Dims, is_dims, named

Kind = Literal["int8", "float8", "nf4"]
DTYPES: dict[str, Any] = {"int8": jnp.int8, "float8": jnp.float8_e4m3fn, "nf4": jnp.uint8}
LARGEST = {"int8": 127.0, "float8": 448.0, "nf4": 1.0}
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
"""The numbers of nf4, by code."""
NF4_GROUP = 64
NUMBERED = ("chunk", "stage", "layer", "experts")
"""Dims that number matrices."""
WHOLE = "rank"
"""A logical dim that no mesh axis cuts."""


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class Quantised:
    """A weight in few bits, in place of its array in a tree of parameters; or the logical dims of one, in a tree of dims."""

    values: Any
    """int8 or float8_e4m3fn of the weight's shape; of nf4 uint8, half as many along the last dim that is summed over."""
    scale: Any
    """float32; of the dims that are summed over, it has one number for each group."""

    def tree_flatten_with_keys(self) -> tuple[tuple, None]:
        return ((DictKey("values"), self.values), (DictKey("scale"), self.scale)), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple) -> Quantised:
        return cls(*children)


def is_weight(node: Any) -> bool:
    """Return whether a node of a tree of dims is that of a whole weight."""
    return is_dims(node) or isinstance(node, Quantised)


def summed(dims: Dims) -> tuple[int, ...]:
    """Return which of a weight's dims its matmul sums over; of an embedding table's rows, the columns."""
    own = [i for i, name in enumerate(dims) if name not in NUMBERED]
    if dims[own[0]] in ("vocab", "positions"):
        return (own[-1],)
    return tuple(own[:-1]) if dims[own[-1]] == "embed" else (own[0],)


def is_matrix(dims: Dims) -> bool:
    """Return whether a parameter is a matrix: no norm, router, bias, sink or adapter."""
    return held_dtype(dims, "int8") == "int8" and sum(name not in NUMBERED for name in dims) > 1


def is_held(lora: LoraConfig, dims: Dims) -> bool:
    """Return whether a parameter is held in few bits: all matrices are, but for table and head in nf4."""
    return bool(lora.base) and is_matrix(dims) and not (lora.base == "nf4" and {"vocab", "positions"} & {*dims})


def held_dims(lora: LoraConfig, dims_tree: Any) -> Any:
    """Return a tree of logical dims with a `Quantised` of them in place of the dims of each weight in few bits."""

    def leaf(dims: Dims) -> Any:
        if not is_held(lora, dims):
            return dims
        axes = () if _group(lora) else summed(dims)
        return Quantised(dims, tuple(WHOLE if i in axes else name for i, name in enumerate(dims)))

    return jax.tree.map(leaf, dims_tree, is_leaf=is_dims)


def _group(lora: LoraConfig) -> int:
    return lora.base_group or (NF4_GROUP if lora.base == "nf4" else 0)


def held_shapes(lora: LoraConfig, dims: Dims, shape: tuple[int, ...]) -> Quantised:
    """Return the shapes of the two arrays of a weight of this shape."""
    axes, group = summed(dims), _group(lora)
    last, size = axes[-1], shape[axes[-1]]
    scale = [1 if i in axes and not group else n for i, n in enumerate(shape)]
    if group:
        scale[last] = size // min(group, size)
    packed = 2 if lora.base == "nf4" else 1
    return Quantised(tuple(n // packed if i == last else n for i, n in enumerate(shape)), tuple(scale))


def check_groups(lora: LoraConfig, dims: Dims, shape: tuple[int, ...], parts_of: Callable[[str], int]) -> None:
    """Check that groups divide a weight, and its parts on devices.

    Args:
      parts_of: gives the devices along a mesh axis.

    Raises:
      ConfigError: they do not; says how many inputs a group may have.
    """
    axis = summed(dims)[-1]
    size, rule, group = shape[axis], RULES[dims[axis]], _group(lora)
    parts = parts_of(rule) if isinstance(rule, str) else 1
    length, pair = min(group, size) or size, 2 if lora.base == "nf4" else 1
    if not size % length and not length % pair and not (group and size // length % parts):
        return
    fits = [n for n in range(pair, size // parts + 1, pair) if size % (n * parts) == 0]
    among = f", in {parts} parts along mesh.{rule}" if parts > 1 else ""
    ways = f"use {', '.join(map(str, fits[-4:]))}" if fits else "use another mesh"
    raise ConfigError([f"groups of {length} do not divide {size}, the {dims[axis]} of {' x '.join(dims)}{among}: {ways}"])


def quantise(lora: LoraConfig, dims: Dims, weight: jax.Array) -> Quantised:
    """Return a weight in few bits, as `lora.base` and `lora.base_group` say; its groups must divide it (`check_groups`)."""
    axes, group = summed(dims), _group(lora)
    last, shape = axes[-1], weight.shape
    length = min(group, shape[last]) or shape[last]
    wide = _split(weight.astype(jnp.float32), last, length)
    over = (last + 1,) if group else (*axes, last + 1)
    scale = jnp.abs(wide).max(over, keepdims=True) / LARGEST[lora.base]
    scale = jnp.where(scale > 0, scale, 1.0)
    numbers = (wide / scale).reshape(shape)
    if lora.base == "nf4":
        values = _packed(numbers, last)
    else:
        values = (jnp.round(numbers) if lora.base == "int8" else numbers).astype(DTYPES[lora.base])
    return Quantised(values, scale.squeeze(last + 1))


def _split(array: Any, axis: int, length: int) -> Any:
    """Cut a dim of n into two, [n / length, length]."""
    return array.reshape(*array.shape[:axis], array.shape[axis] // length, length, *array.shape[axis + 1 :])


def _packed(numbers: jax.Array, axis: int) -> jax.Array:
    """Return the codes of the nearest numbers of nf4, two in a uint8; of two equally near ones the lower."""
    middles = (NF4[1:] + NF4[:-1]) / np.float32(2)
    codes = sum((numbers > middle).astype(jnp.uint8) for middle in middles)
    pairs = jnp.moveaxis(_split(codes, axis, 2), axis + 1, 0)
    return (pairs[0] << 4 | pairs[1]).astype(jnp.uint8)


def dequantise(numpy: Any, dims: Dims, held: Quantised) -> Any:
    """Return a weight as float32 numbers, scale * number.

    Args:
      numpy: the module to compute with, `numpy` or `jax.numpy`.
      dims: of the weight.
    """
    values, axis = held.values, summed(dims)[-1]
    if values.dtype == jnp.uint8:
        shape = [2 * n if i == axis else n for i, n in enumerate(values.shape)]
        codes = numpy.stack([values >> 4, values & 15], axis + 1).reshape(shape)
        numbers = numpy.take(numpy.asarray(NF4), codes.astype(numpy.int32), mode="clip")
    else:
        numbers = values.astype(numpy.float32)
    groups = held.scale.shape[axis]
    return (_split(numbers, axis, numbers.shape[axis] // groups) * numpy.expand_dims(held.scale, axis + 1)).reshape(
        numbers.shape
    )


def dequantised(params: Any, dims_tree: Any, dtype: str) -> Any:
    """Return a tree of parameters with its weights in few bits as numbers of this dtype."""

    def leaf(dims: Any, held: Any) -> Any:
        return dequantise(jnp, dims.values, held).astype(dtype) if isinstance(dims, Quantised) else held

    return jax.tree.map(leaf, dims_tree, params, is_leaf=is_weight)


def quantised(lora: LoraConfig, params: Any, dims_tree: Any) -> Any:
    """Return a tree of parameters with the arrays of its matrices in few bits.

    Args:
      dims_tree: `held_dims` of them.
    """

    def leaf(dims: Any, weight: Any) -> Any:
        return quantise(lora, dims.values, weight) if isinstance(dims, Quantised) else weight

    return jax.tree.map(leaf, dims_tree, params, is_leaf=is_weight)


def holding(lora: LoraConfig, mesh: Mesh) -> Callable[[Dims, jax.Array], Any]:
    """Return a function (dims, weight) -> the weight as `lora.base` holds it on the mesh; the original is freed.

    It raises ConfigError where groups do not divide a weight.
    """

    def hold(dims: Dims, weight: jax.Array) -> Any:
        if not is_held(lora, dims):
            return weight
        check_groups(lora, dims, weight.shape, lambda axis: mesh.shape[axis])
        places = named(mesh, held_dims(lora, dims))
        held = jax.block_until_ready(jax.jit(lambda array: quantise(lora, dims, array), out_shardings=places)(weight))
        weight.delete()
        return held

    return hold
