"""Hold an optimizer's moments in 8 bits: one code a number, and one float32 scale for each block of up to 64.

A number of a block is s c with s = max |m| over the block and c given by its code q (Dettmers et al. 2022, arXiv:2110.02861,
has blocks too, with a table of codes):

    first moments, int8      c = sign(q) (q / 127)^2    1.6% apart near the largest, 6e-5 the smallest
    second moments, uint8    c = (q / 255)^4            1.6% apart near the largest, 2e-10 the smallest; 0 only for 0

y = 127 sqrt(|m| / s), or 255 (v / s)^(1/4), is rounded stochastically: beta2 = 0.999 moves v by at most 0.1% a step down, which
rounding to nearest would drop. The bits are a function of the step, the leaf, the layer and the place (`rounding.random_bits`).

A block lies along one dim of a matrix, its last one that is not the vocabulary, and not across layers; its length is 64, or
what 64 and the dim have in common. So blocks are the same on every mesh, and no device needs another's numbers, as long as the
mesh cuts between blocks (`cut_block`). Norms and biases, and dims with less than 8 in common with 64, stay in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxtrain.config import MeshConfig, OptimizerConfig
from jaxtrain.sharding import RULES, Dims, is_dims, is_in_host_memory, on_device, on_host
from jaxtrain.train.leaf_axes import leaf_axes, names_of_path
from jaxtrain.train.rounding import STACKED, random_bits

PyTree = Any
LONGEST_BLOCK, SHORTEST_BLOCK = 64, 8
LAYER = STACKED.index("layer")
SECOND_MOMENT = "nu"
"""Name of optax's trees of second moments."""


class HeldMoments(NamedTuple):
    """The state of an optimizer in two trees of its structure."""

    step: jax.Array
    """Steps taken, int32 scalar."""
    codes: PyTree
    """int8 or uint8 in place of a matrix' moments; all else as the optimizer has it."""
    scales: PyTree
    """Of each block, float32; `optax.MaskedNode()` in place of all else."""


def block_of(dims: Dims, shape: tuple[int, ...]) -> tuple[int, int]:
    """(axis, length) of the blocks of a parameter's moments; length 0 if they are held in float32."""
    axis = max((i for i, name in enumerate(dims) if name != "vocab"), default=0)
    length = math.gcd(shape[axis], LONGEST_BLOCK) if leaf_axes(dims).is_matrix else 0
    return axis, length if length >= SHORTEST_BLOCK else 0


def cut_block(dims: Dims, shape: tuple[int, ...], mesh: MeshConfig) -> str:
    """Return what is wrong where a mesh would cut through a block; "" if none would."""
    axis, length = block_of(dims, shape)
    rule = RULES[dims[axis]] if length else None
    parts = getattr(mesh, rule) if isinstance(rule, str) else 1
    if not length or shape[axis] % (parts * length) == 0:
        return ""
    most = shape[axis] // length
    return (
        f"mesh.{rule}={parts} cuts through the blocks of {length} that optimizer.moments_dtype=int8 makes of {shape[axis]}, "
        f"the {dims[axis]} of {' x '.join(dims)}: use a divisor of {most}, or optimizer.moments_dtype=float32"
    )


def in_8_bits(
    inner: optax.GradientTransformation, dims: PyTree, layer_numbers: np.ndarray, by_layer: bool = True
) -> optax.GradientTransformation:
    """Return the transformation with its moments held in 8 bits between steps; each update computes in float32.

    Args:
      dims: logical dims of the trained parameters.
      layer_numbers: `Stacking.layer_numbers`.
      by_layer: update stacked layers one after the other, so that one layer's moments at a time are there in float32. For rules
        that take each number by itself, without its parameter.
    """
    inner, owner = optax.with_extra_args_support(inner), _owners(dims)

    def held(state: PyTree, step: jax.Array, numbers: Any = layer_numbers) -> HeldMoments:
        leaves, structure = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_none)
        key, both = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), step), []
        for number, (path, leaf) in enumerate(leaves):
            own, axis, length, is_second = owner(path, leaf)
            if not length:
                both.append((leaf, optax.MaskedNode()))
                continue
            bits = random_bits(jax.random.fold_in(key, number), leaf.shape, own, numbers)
            both.append(encode(leaf, bits, axis, length, is_second))
        codes, scales = zip(*both, strict=True) if both else ((), ())
        return HeldMoments(step, structure.unflatten(codes), structure.unflatten(scales))

    def as_numbers(codes: PyTree, scales: PyTree) -> PyTree:
        leaves, structure = jax.tree_util.tree_flatten_with_path(codes, is_leaf=_is_none)
        numbers = []
        for (path, code), scale in zip(leaves, structure.flatten_up_to(scales), strict=True):
            _, axis, length, _ = owner(path, code)
            numbers.append(decode(code, scale, axis, length) if length else code)
        return structure.unflatten(numbers)

    def init(params: PyTree) -> HeldMoments:
        return held(inner.init(params), jnp.zeros((), jnp.int32))

    def update(
        gradients: PyTree, state: HeldMoments, params: PyTree = None, applies: Any = True, **numbers: Any
    ) -> tuple[PyTree, HeldMoments]:
        if not by_layer:
            updates, new = inner.update(gradients, as_numbers(state.codes, state.scales), params, **numbers)
            return updates, held(new, state.step + 1)

        def some(own: tuple, which: Any) -> tuple:
            updates, new = inner.update(own[0], as_numbers(*own[1:]), None, **numbers)
            return updates, *held(new, state.step + 1, which)[1:]

        whole = (gradients, *state[1:])
        updates, *moments = _layer_by_layer(some, whole, lambda *leaf: owner(*leaf)[0], layer_numbers, applies)
        return updates, HeldMoments(state.step + 1, *moments)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def in_host_memory(
    inner: optax.GradientTransformation, dims: PyTree, layer_numbers: np.ndarray
) -> optax.GradientTransformation:
    """Return the transformation for moments of which matrices' lie in host memory (`lies_on_host`), one layer at a time.

    The copies run beside the updates of the layers before and after. `update` takes `applies`, a traced boolean: without it
    the moments in host memory stay as they are, since a choice between old and new ones afterwards would need both.

    Args:
      inner: a rule that takes each number by itself, without its parameter.
      layer_numbers: `Stacking.layer_numbers`.
    """
    inner, owner = optax.with_extra_args_support(inner), _owners(dims)

    def update(
        gradients: PyTree, state: PyTree, params: PyTree = None, applies: Any = True, **numbers: Any
    ) -> tuple[PyTree, PyTree]:
        def some(own: tuple, which: Any) -> tuple:
            return inner.update(own[0], own[1], None, **numbers)

        return _layer_by_layer(some, (gradients, state), lambda *leaf: owner(*leaf)[0], layer_numbers, applies)

    return optax.GradientTransformationExtraArgs(inner.init, update)  # type: ignore[arg-type]


def lies_on_host(config: OptimizerConfig, dims: Dims) -> bool:
    """Return whether a leaf of the optimizer's state, sharded by these dims, lies in host memory: matrices' moments."""
    own = dims[1:] if dims[:1] == ("replica",) else dims
    return config.moments_memory == "host" and leaf_axes(own).is_matrix


def _owners(dims: PyTree) -> Callable[[tuple, jax.Array | None], tuple[Dims, int, int, bool]]:
    """Return `_owner` of a tree of dims."""
    flat = jax.tree_util.tree_flatten_with_path(dims, is_leaf=is_dims)[0]
    return functools.partial(_owner, {names_of_path(path): own for path, own in flat})


def _owner(of_params: Mapping[tuple, Dims], path: tuple, leaf: jax.Array | None) -> tuple[Dims, int, int, bool]:
    """(dims of a leaf's parameter, axis and length of its blocks, 0 if there are none, whether it is a second moment)."""
    names = names_of_path(path)
    for suffix, own in of_params.items():
        if leaf is not None and names[-len(suffix) :] == suffix and len(own) == leaf.ndim:
            return own, *block_of(own, leaf.shape), SECOND_MOMENT in names[: -len(suffix)]
    return (), 0, 0, False


def _layer_by_layer(
    some: Callable[[Any, Any], Any],
    whole: Any,
    dims_of: Callable[[tuple, jax.Array], Dims],
    layer_numbers: np.ndarray,
    applies: Any = True,
) -> Any:
    """Return what `some` makes of trees: of one layer of the stacked leaves after the other, then of all other leaves.

    Leaves in host memory are copied to the device for it and back.

    Args:
      some: (trees with None for leaves that are left out, but for scalars, layer numbers) -> trees to put in their place.
      dims_of: (path, leaf) -> logical dims.
      applies: whether leaves in host memory change.
    """

    def is_stacked(path: tuple, leaf: jax.Array) -> bool:
        return dims_of(path, leaf)[: len(STACKED)] == STACKED

    def part(whole: Any, layer: jax.Array | None = None) -> Any:
        def take(path: tuple, leaf: jax.Array) -> jax.Array | None:
            if layer is not None and is_stacked(path, leaf):
                return on_device(lax.dynamic_slice_in_dim(leaf, layer, 1, LAYER))
            return None if is_stacked(path, leaf) or (layer is not None and leaf.ndim) else on_device(leaf)

        def put(path: tuple, leaf: jax.Array, new: Any, old: Any) -> jax.Array:
            if is_stacked(path, leaf) == (layer is None):
                return leaf
            new = on_host(jnp.where(applies, new, old)) if is_in_host_memory(leaf) else new
            return new if layer is None else lax.dynamic_update_slice_in_dim(leaf, new, layer, LAYER)

        which = layer_numbers if layer is None else lax.dynamic_slice_in_dim(jnp.asarray(layer_numbers), layer, 1, LAYER)
        own = jax.tree_util.tree_map_with_path(take, whole)
        return jax.tree_util.tree_map_with_path(put, whole, some(own, which), own)

    return part(lax.fori_loop(0, layer_numbers.shape[LAYER], lambda layer, whole: part(whole, layer), whole))


def encode(x: jax.Array, bits: jax.Array, axis: int, length: int, is_second: bool) -> tuple[jax.Array, jax.Array]:
    """(codes, scales) of float32 moments, rounded by uint32 bits. Along `axis` there are as many scales as blocks."""
    blocks = _blocks(jnp.abs(x), axis, length)
    scales = blocks.max(axis + 1)
    shares = (blocks / jnp.expand_dims(jnp.where(scales > 0, scales, 1), axis + 1)).reshape(x.shape)
    share = (bits >> 8).astype(jnp.float32) * 2.0**-24
    if is_second:
        codes = jnp.clip(jnp.floor(255 * jnp.sqrt(jnp.sqrt(shares)) + share), 1, 255)
        return jnp.where(x > 0, codes, 0).astype(jnp.uint8), scales
    return (jnp.sign(x) * jnp.clip(jnp.floor(127 * jnp.sqrt(shares) + share), 0, 127)).astype(jnp.int8), scales


def decode(codes: jax.Array, scales: jax.Array, axis: int, length: int) -> jax.Array:
    """Return the moments of `encode`, float32."""
    q = codes.astype(jnp.float32)
    shares = jnp.square(jnp.square(q / 255)) if codes.dtype == jnp.uint8 else jnp.sign(q) * jnp.square(q / 127)
    return (_blocks(shares, axis, length) * jnp.expand_dims(scales, axis + 1)).reshape(codes.shape)


def _blocks(x: jax.Array, axis: int, length: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], -1, length, *x.shape[axis + 1 :])


def _is_none(leaf: Any) -> bool:
    return leaf is None
