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

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.config import MeshConfig
from jaxtrain.sharding import RULES, Dims, is_dims
from jaxtrain.train.leaf_axes import leaf_axes, names_of_path
from jaxtrain.train.rounding import random_bits

PyTree = Any
LONGEST_BLOCK, SHORTEST_BLOCK = 64, 8
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


def in_8_bits(inner: optax.GradientTransformation, dims: PyTree, layer_numbers: Any) -> optax.GradientTransformation:
    """Return the transformation with its moments held in 8 bits between steps; each update computes in float32.

    Args:
      dims: logical dims of the trained parameters.
      layer_numbers: `Stacking.layer_numbers`.
    """
    inner = optax.with_extra_args_support(inner)
    of_params = {names_of_path(path): own for path, own in jax.tree_util.tree_flatten_with_path(dims, is_leaf=is_dims)[0]}

    def owner(path: tuple, leaf: jax.Array) -> tuple[Dims, int, int, bool] | None:
        """(dims, axis and length of blocks, whether it is a second moment) of a leaf that is held in 8 bits."""
        names = names_of_path(path)
        for suffix, own in of_params.items():
            if names[-len(suffix) :] == suffix and len(own) == leaf.ndim:
                axis, length = block_of(own, leaf.shape)
                return (own, axis, length, SECOND_MOMENT in names[: -len(suffix)]) if length else None
        return None

    def held(state: PyTree, step: jax.Array) -> HeldMoments:
        leaves, structure = jax.tree_util.tree_flatten_with_path(state)
        key, both = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), step), []
        for number, (path, leaf) in enumerate(leaves):
            if (found := owner(path, leaf)) is None:
                both.append((leaf, optax.MaskedNode()))
                continue
            own, axis, length, is_second = found
            bits = random_bits(jax.random.fold_in(key, number), leaf.shape, own, layer_numbers)
            both.append(encode(leaf, bits, axis, length, is_second))
        codes, scales = zip(*both, strict=True) if both else ((), ())
        return HeldMoments(step, structure.unflatten(codes), structure.unflatten(scales))

    def as_numbers(state: HeldMoments) -> PyTree:
        leaves, structure = jax.tree_util.tree_flatten_with_path(state.codes)
        numbers = []
        for (path, code), scale in zip(leaves, structure.flatten_up_to(state.scales), strict=True):
            found = owner(path, code)
            numbers.append(code if found is None else decode(code, scale, found[1], found[2]))
        return structure.unflatten(numbers)

    def init(params: PyTree) -> HeldMoments:
        return held(inner.init(params), jnp.zeros((), jnp.int32))

    def update(gradients: PyTree, state: HeldMoments, params: PyTree = None, **numbers: Any) -> tuple[PyTree, HeldMoments]:
        updates, new = inner.update(gradients, as_numbers(state), params, **numbers)
        return updates, held(new, state.step + 1)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


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
