"""A checksum of an array's bits that does not depend on how the array is sharded, computed where the array lies.

Orbax keeps no checksum of array data: of 400 single bits flipped in a checkpoint's data files, 398 came back as other weights
without an error (measured, orbax-checkpoint 0.12.8). So every leaf gets two sums of its words w_i, modulo 2^32,

    S_k = sum_i w_i a_k(i),    a_1(i) = 2 i + 1,    a_2(i) = mix(i) | 1

with i the position in the whole array (row-major, modulo 2^32) and mix the 32-bit finaliser of MurmurHash3 (Appleby, public
domain). All a_k are odd, so a change of any one bit changes both sums; that they depend on the position catches words that
changed places. A sum modulo 2^32 is the same in any order, so any sharding and any number of processes gives the same one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain.sharding import is_in_host_memory, on_device

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def checksums(leaves: Mapping[str, jax.Array]) -> dict[str, str]:
    """Return every array's checksum, 16 hexadecimal digits; blocks until the arrays are ready. All processes call it
    together.
    """
    jax.block_until_ready(list(leaves.values()))  # XLA:CPU hangs where two programs with collectives are under way
    return _added_up(_begin(leaves, whole=True))


def block_checksum(block: np.ndarray, starts: Sequence[int], sizes: tuple[int, ...]) -> str:
    """Return what a block of an array on the host adds to its checksum (see `total`); the temporaries are twice its size."""
    return _digits(word_sums(jnp.asarray(block), list(starts), sizes))


def begin_checksums(leaves: Mapping[str, jax.Array]) -> Callable[[], dict[str, str]]:
    """Start summing this process's shards of each array; return a function that waits for the sums (see `total`).

    There is no collective in it, so the next step may be dispatched meanwhile, and the arrays may be donated to it.
    """
    begun = _begin(leaves, whole=False)
    return lambda: _added_up(begun)


def total(parts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the checksums of whole arrays: the sums modulo 2^32 of the processes' parts."""
    return {name: _digits(np.sum([_sums(part[name]) for part in parts], axis=0, dtype=np.uint32)) for name in parts[0]}


def _digits(sums: Any) -> str:
    return f"{int(sums[0]):08x}{int(sums[1]):08x}"


def _sums(digits: str) -> np.ndarray:
    return np.array([int(digits[:8], 16), int(digits[8:], 16)], np.uint32)


def _added_up(begun: list[tuple[list[str], jax.Array]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for names, rows in begun:
        shards = rows.addressable_shards[: 1 if rows.is_fully_replicated else None]
        sums = np.stack([np.asarray(shard.data)[0] for shard in shards]).sum(axis=0, dtype=np.uint32)
        found |= {name: _digits(values) for name, values in zip(names, sums, strict=True)}
    return found


def _begin(leaves: Mapping[str, jax.Array], whole: bool) -> list[tuple[list[str], jax.Array]]:
    """(names, sums [devices, names, 2]) of each mesh."""
    groups: dict[Any, list[str]] = {}
    for name in sorted(leaves):
        sharding = leaves[name].sharding
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        alone = name if is_in_host_memory(leaves[name]) else None  # so that one of them at a time is on the devices
        groups.setdefault((mesh, frozenset(sharding.device_set), alone), []).append(name)
    begun = []
    for (mesh, _, _), names in groups.items():  # a run has one mesh
        arrays = [leaves[name] for name in names]
        specs = tuple(array.sharding.spec for array in arrays if isinstance(array.sharding, NamedSharding))
        begun.append((names, _program(mesh, specs, whole)(arrays)))
    return begun


@functools.lru_cache(maxsize=32)
def _program(mesh: Any, specs: tuple[PartitionSpec, ...], whole: bool) -> Any:
    """(arrays) -> uint32 [1, arrays, 2] if `whole`, summed over all devices; else [devices, arrays, 2], one row per device.
    Only the first copy of a replicated shard counts.
    """
    if mesh is None:
        return jax.jit(lambda arrays: jnp.stack([word_sums(on_device(array)) for array in arrays])[None])

    def block_sums(block: jax.Array, spec: PartitionSpec) -> jax.Array:
        starts: list[Any] = [0] * block.ndim
        sizes, over = list(block.shape), ()
        for dim, axes in enumerate(spec):
            names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
            if names:
                starts[dim] = lax.axis_index(names).astype(jnp.uint32) * np.uint32(block.shape[dim])
                sizes[dim] *= math.prod(mesh.shape[name] for name in names)
                over += names
        others = tuple(name for name in mesh.axis_names if name not in over)
        if not others:
            return word_sums(block, starts, tuple(sizes))
        nothing = jnp.zeros(2, jnp.uint32)
        return lax.cond(lax.axis_index(others) == 0, lambda: word_sums(block, starts, tuple(sizes)), lambda: nothing)

    def region(arrays: list[jax.Array]) -> jax.Array:
        sums = jnp.stack([block_sums(array, spec) for array, spec in zip(arrays, specs, strict=True)])[None]
        return lax.psum(sums, mesh.axis_names) if whole else sums

    rows = PartitionSpec() if whole else PartitionSpec(tuple(mesh.axis_names))
    mapped = jax.shard_map(region, mesh=mesh, in_specs=(list(specs),), out_specs=rows, check_vma=False)
    return jax.jit(lambda arrays: mapped([on_device(array) for array in arrays]))


@functools.partial(jax.jit, static_argnames="sizes")  # traced once for a parameter and its moments
def word_sums(array: jax.Array, starts: Sequence[Any] = (), sizes: tuple[int, ...] = ()) -> jax.Array:
    """[S_1, S_2], uint32, of an array; or of its block that begins at `starts`, where the whole array has `sizes`."""
    words = _words(array)
    position, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for dim in reversed(range(words.ndim)):
        start = starts[dim] if dim < len(starts) else 0
        position += (lax.broadcasted_iota(jnp.uint32, words.shape, dim) + start) * np.uint32(stride % 2**32)
        stride *= sizes[dim] if dim < len(sizes) else words.shape[dim]
    ones, nothing = jnp.uint32(1), jnp.uint32(0)
    terms = words * (2 * position + ones), words * (_mix(position) | ones)
    # One reduction of two sums: XLA:CPU vectorises it, and not two of one sum each, which take ten times as long.
    return jnp.stack(lax.reduce(terms, (nothing, nothing), lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(words.ndim))))


def _words(array: jax.Array) -> jax.Array:
    """Return the bits as uint32, one word per element (two for 8-byte elements, along a new last dim)."""
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
