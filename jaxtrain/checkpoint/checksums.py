"""A checksum of an array's bits that does not depend on how the array is sharded, computed where the array lies.

Orbax keeps no checksum of array data: of 400 single bits flipped in a checkpoint's data files, 398 came back as other weights
without a word (measured, orbax-checkpoint 0.12.8). So every leaf gets two sums of its words w_i, modulo 2^32,

    S_k = sum_i w_i a_k(i),    a_1(i) = 2 i + 1,    a_2(i) = mix(i) | 1

with i the position in the whole array (row-major, modulo 2^32) and mix the 32-bit finaliser of MurmurHash3 (Appleby, public
domain). All a_k are odd, so a change of any one bit changes both sums; that they depend on the position catches words that
changed places. A sum modulo 2^32 is the same in any order, so any sharding and any number of processes gives the same one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def checksums(leaves: Mapping[str, jax.Array]) -> dict[str, str]:
    """The checksum of every array, as 16 hexadecimal digits; waits for the arrays. All processes call it together."""
    jax.block_until_ready(list(leaves.values()))  # XLA:CPU hangs where two programs with collectives are under way
    groups: dict[Any, list[str]] = {}
    for name in sorted(leaves):
        groups.setdefault(frozenset(leaves[name].sharding.device_set), []).append(name)
    found: dict[str, str] = {}
    for names in groups.values():  # one, in a run
        sums = np.asarray(_program(_replicated(leaves[names[0]]))([leaves[name] for name in names])).tolist()
        found |= {name: f"{first:08x}{second:08x}" for name, (first, second) in zip(names, sums, strict=True)}
    return found


@functools.lru_cache(maxsize=8)
def _program(sharding: NamedSharding | None) -> Any:
    return jax.jit(lambda arrays: jnp.stack([word_sums(array) for array in arrays]), out_shardings=sharding)


def _replicated(leaf: jax.Array) -> NamedSharding | None:
    return NamedSharding(leaf.sharding.mesh, PartitionSpec()) if isinstance(leaf.sharding, NamedSharding) else None


def word_sums(array: jax.Array) -> jax.Array:
    """[S_1, S_2] of one array, uint32, in a jitted function."""
    words = _words(array)
    position, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for dim in reversed(range(words.ndim)):
        position += lax.broadcasted_iota(jnp.uint32, words.shape, dim) * np.uint32(stride % 2**32)
        stride *= words.shape[dim]
    ones = jnp.uint32(1)
    sums = (
        jnp.sum(words * (2 * position + ones), dtype=jnp.uint32),
        jnp.sum(words * (_mix(position) | ones), dtype=jnp.uint32),
    )
    return jnp.stack(sums)


def _words(array: jax.Array) -> jax.Array:
    """The bits as uint32, one word an element (two of an 8-byte one, along a new last dim)."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    size = array.dtype.itemsize
    return lax.bitcast_convert_type(array, _WORDS[min(size, 4)]).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
