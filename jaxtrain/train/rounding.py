"""Update bfloat16 parameters by stochastic rounding, so that updates smaller than half a unit in the last place add up.

bfloat16 keeps 8 bits: a weight of 1 has neighbours 0.004 and 0.008 away, and rounding to nearest would drop an update of 0.001.
Rounded up with the probability of the lost share, every update counts in the mean (Gupta et al. 2015, arXiv:1502.02551).
It costs no memory, whereas a compensated update keeps a second number for each parameter, as much as float32 does.

The random bits are a function of train.seed, the step, the leaf, the layer and the element's place in its layer: the same on
every mesh, after a resume, and on all copies of a parameter.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxtrain.sharding import is_dims

PyTree = Any
STACKED = ("chunk", "stage", "layer")


def apply_updates(
    params: PyTree, updates: PyTree, dims: PyTree, layer_numbers: np.ndarray, seed: jax.Array, step: jax.Array
) -> PyTree:
    """params + updates: float32 leaves added exactly in float32, bfloat16 leaves rounded stochastically.

    Args:
      updates: float32.
      dims: logical dims of every leaf.
      layer_numbers: `Stacking.layer_numbers` of stacked leaves.
      seed: `seed_words`.
      step: steps taken before this one, int32 scalar.
    """
    leaves, structure = jax.tree.flatten(params)
    if all(leaf.dtype != jnp.bfloat16 for leaf in leaves):
        return optax.apply_updates(params, updates)
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), step)
    every = zip(leaves, structure.flatten_up_to(updates), jax.tree.leaves(dims, is_leaf=is_dims), strict=True)

    def moved(number: int, leaf: jax.Array, update: jax.Array, own_dims: tuple[str, ...]) -> jax.Array:
        exact = leaf.astype(jnp.float32) + update
        if leaf.dtype != jnp.bfloat16:
            return exact.astype(leaf.dtype)
        bits = random_bits(jax.random.fold_in(key, number), leaf.shape, own_dims, layer_numbers)
        return round_stochastically(exact, bits)

    return structure.unflatten([moved(number, *each) for number, each in enumerate(every)])


def round_stochastically(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Return bfloat16: x's neighbour farther from zero with probability |x - nearer| / |farther - nearer|, else the nearer.

    Numbers that bfloat16 can hold, infinities and NaNs are unchanged.

    Args:
      x: float32.
      bits: uint32, of which the upper 16 count.
    """
    words = lax.bitcast_convert_type(x, jnp.uint32) + (bits >> 16)
    rounded = lax.bitcast_convert_type((words >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def random_bits(key: jax.Array, shape: tuple[int, ...], dims: tuple[str, ...], layer_numbers: np.ndarray) -> jax.Array:
    """Return uint32 of this shape: a hash of the key, the layer's number and the index in the layer, for any stacking.

    Two rounds of murmur3's keyed finaliser: a tenth of the work of threefry, from iotas, which shard like the leaf.
    """
    stacking = len(STACKED) if dims[: len(STACKED)] == STACKED else 0
    words = jax.random.key_data(key)
    if stacking:
        of_each = jnp.asarray(layer_numbers.reshape(-1).astype(np.uint32))
        words = jax.random.key_data(jax.vmap(lambda number: jax.random.fold_in(key, number))(of_each))
        words = words.reshape(*layer_numbers.shape, *(1,) * (len(shape) - stacking), 2)
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(stacking, len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        place = place + stride * lax.broadcasted_iota(jnp.uint32, shape, axis)
    return _mixed(_mixed(place + words[..., 0]) ^ words[..., 1])


def _mixed(x: jax.Array) -> jax.Array:
    """Return murmur3's finaliser (Appleby 2011): every bit of x changes half of the result's bits."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
