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
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        found |= {name: _hexadecimal(values) for name, values in zip(names, sums, strict=True)}
    return found


def begin_parts(leaves: Mapping[str, jax.Array]) -> Callable[[], dict[str, str]]:
    """Starts adding up what this process holds of each array, and returns at once; the result waits for it. See `total`.

    Of replicas the first counts. No collective is in it, so that the next step may be dispatched meanwhile (XLA:CPU hangs where
    two programs with collectives are under way), and the arrays may be donated to it.
    """
    groups: dict[Any, list[str]] = {}
    for name in sorted(leaves):
        sharding = leaves[name].sharding
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        groups.setdefault((mesh, frozenset(sharding.device_set)), []).append(name)
    begun = []
    for (mesh, _), names in groups.items():
        shardings = [leaves[name].sharding for name in names]
        specs = tuple(sharding.spec for sharding in shardings if isinstance(sharding, NamedSharding))
        owners = [{s.device for s in leaves[name].addressable_shards if s.replica_id == 0} for name in names]
        begun.append((names, owners, _parts_program(mesh, specs)([leaves[name] for name in names])))

    def finish() -> dict[str, str]:
        found = {name: np.zeros(2, np.uint32) for name in leaves}
        for names, owners, sums in begun:
            for shard in sums.addressable_shards:
                values = np.asarray(shard.data)[0]
                for name, devices, value in zip(names, owners, values, strict=True):
                    if shard.device in devices:
                        found[name] += value
        return {name: _hexadecimal(value) for name, value in found.items()}

    return finish


def total(parts: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The checksums of whole arrays, of every process's parts: their sums modulo 2^32."""
    found: dict[str, np.ndarray] = {}
    for part in parts:
        for name, digits in part.items():
            value = np.array([int(digits[:8], 16), int(digits[8:], 16)], np.uint32)
            found[name] = found[name] + value if name in found else value
    return {name: _hexadecimal(value) for name, value in found.items()}


def _hexadecimal(sums: Sequence[int] | np.ndarray) -> str:
    return f"{int(sums[0]):08x}{int(sums[1]):08x}"


@functools.lru_cache(maxsize=8)
def _parts_program(mesh: Any, specs: tuple[PartitionSpec, ...]) -> Any:
    """(arrays) -> [devices, arrays, 2], each device's own row from its own shards."""
    if mesh is None:
        return jax.jit(lambda arrays: jnp.stack([word_sums(array) for array in arrays])[None])

    def region(arrays: list[jax.Array]) -> jax.Array:
        return jnp.stack([word_sums(array, *_place(array, spec)) for array, spec in zip(arrays, specs, strict=True)])[None]

    def _place(block: jax.Array, spec: PartitionSpec) -> tuple[list[Any], list[int]]:
        """Where this device's block begins along each dim, and the sizes of the whole."""
        starts: list[Any] = [0] * block.ndim
        sizes = list(block.shape)
        for dim, axes in enumerate(spec):
            names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
            if names:
                starts[dim] = lax.axis_index(names).astype(jnp.uint32) * np.uint32(block.shape[dim])
                sizes[dim] *= int(np.prod([mesh.shape[name] for name in names]))
        return starts, sizes

    rows = PartitionSpec(tuple(mesh.axis_names))
    return jax.jit(jax.shard_map(region, mesh=mesh, in_specs=(list(specs),), out_specs=rows, check_vma=False))


@functools.lru_cache(maxsize=8)
def _program(sharding: NamedSharding | None) -> Any:
    return jax.jit(lambda arrays: jnp.stack([word_sums(array) for array in arrays]), out_shardings=sharding)


def _replicated(leaf: jax.Array) -> NamedSharding | None:
    return NamedSharding(leaf.sharding.mesh, PartitionSpec()) if isinstance(leaf.sharding, NamedSharding) else None


def word_sums(array: jax.Array, starts: Sequence[Any] = (), sizes: Sequence[int] = ()) -> jax.Array:
    """[S_1, S_2] of one array, uint32, in a jitted function; or of a block of one that begins at `starts` and has `sizes`
    in all."""
    words = _words(array)
    position, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for dim in reversed(range(words.ndim)):
        start = starts[dim] if dim < len(starts) else 0
        position += (lax.broadcasted_iota(jnp.uint32, words.shape, dim) + start) * np.uint32(stride % 2**32)
        stride *= sizes[dim] if dim < len(sizes) else words.shape[dim]
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
