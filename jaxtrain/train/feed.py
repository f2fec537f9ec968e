"""Turn host rows into global arrays: each process reads only the rows that its devices hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding


def owned_rows(sharding: NamedSharding, shape: tuple[int, int]) -> slice:
    """Return the smallest range of global rows that covers this process's shards of a [B, L] batch."""
    indices = [index for index in sharding.addressable_devices_indices_map(shape).values() if index is not None]
    bounds = [rows.indices(shape[0])[:2] for rows, _ in indices]
    return slice(min(start for start, _ in bounds), max(stop for _, stop in bounds))


def on_every_host(array: jax.Array) -> np.ndarray:
    """Return a global array whole, in all processes; all call it."""
    return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))


def to_global(
    batch: Mapping[str, np.ndarray], rows: slice, num_rows: int, names: tuple[str, ...], sharding: NamedSharding
) -> dict[str, Any]:
    """Return global arrays [num_rows, L] of the named arrays, from this process's rows `rows` of them."""

    def place(local: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(num_rows)
            return local[start - rows.start : stop - rows.start, index[1]]

        return jax.make_array_from_callback((num_rows, *local.shape[1:]), sharding, shard)

    return {name: place(batch[name]) for name in names}
