"""Read and write a checkpoint's arrays block by block, with TensorStore: what Orbax would hold whole in memory."""

from __future__ import annotations

import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from jaxtrain.errors import DamagedCheckpoint, cause

Index = tuple[slice, ...]
BLOCK_BYTES = 64 << 20
"""Bytes of an array that are in memory at a time, and lie in one piece in the checkpoint."""
_READS, _READ_AHEAD = 16, 1 << 30  # requests to the file system at a time; bytes on their way to the devices
T = TypeVar("T")


def in_blocks(key: Any, value: Any) -> Any:
    """Return how Orbax stores a large array: in blocks, cut along the layers first, as they are read one by one."""
    del key
    if value.nbytes <= BLOCK_BYTES:
        return None
    return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=BLOCK_BYTES, shard_axes=(0,))


def _spec(step: os.PathLike, name: str) -> dict[str, Any]:
    """Return where Orbax keeps an array."""
    files = {"driver": "file", "path": f"{os.fspath(step)}/state/"}
    return {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": files, "path": f"{name.replace('/', '.')}/"}}


def created(step: os.PathLike, name: str, shape: tuple[int, ...], dtype: Any, block: tuple[int, ...]) -> ts.TensorStore:
    """Return a new array, uncompressed, in place of one that is there; each block is written apart."""
    spec = _spec(step, name) | {"store_data_equal_to_fill_value": True}  # Orbax takes what is not stored for lost
    layout = ts.ChunkLayout(chunk_shape=block)
    return ts.open(spec, create=True, delete_existing=True, shape=shape, dtype=dtype, chunk_layout=layout).result()


def blocks_of(shape: tuple[int, ...], block: tuple[int, ...]) -> Iterator[Index]:
    """Yield the slices of an array's blocks, in row-major order."""
    starts = (range(0, size, part) for size, part in zip(shape, block, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(slice(i, min(i + part, size)) for i, part, size in zip(corner, block, shape, strict=True))


def read_arrays(step: os.PathLike, leaves: Mapping[tuple[str, ...], Any]) -> dict[tuple[str, ...], jax.Array]:
    """Return arrays in the shardings that `leaves` name: this process reads what its own devices hold, and waits for no other.

    Raises:
      ValueError, OSError: an array cannot be read, or is of another shape or dtype.
    """
    context = ts.Context({"file_io_concurrency": {"limit": _READS}})
    stores = {name: ts.open(_spec(step, "/".join(name)), open=True, read=True, context=context) for name in leaves}
    found: dict[tuple[str, ...], jax.Array] = {}
    begun: deque[tuple[tuple[str, ...], dict[str, np.ndarray], list[Any]]] = deque()

    def finish() -> None:
        name, pieces, reads = begun.popleft()
        for read in reads:
            read.result()
        leaf = leaves[name]
        found[name] = jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: pieces[str(index)])

    for name, leaf in leaves.items():
        store = stores.pop(name).result()
        if (held := f"{store.dtype.name}{list(store.shape)}") != (wanted := f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"):
            raise ValueError(f"{'/'.join(name)} is {held}, not {wanted}")
        pieces, reads = {}, []
        for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values():
            if str(index) not in pieces:
                pieces[str(index)] = _aligned(store[index].shape, leaf.dtype)
                reads.append(ts.array(pieces[str(index)]).write(store[index].translate_to[(0,) * store.rank]))
        begun.append((name, pieces, reads))
        while len(begun) > 1 and sum(piece.nbytes for _, pieces, _ in begun for piece in pieces.values()) > _READ_AHEAD:
            finish()
    while begun:
        finish()
    return found


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an array as XLA:CPU takes it over without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


class StoredArray:
    """An array of a checkpoint, of which no more is in memory than what was read last.

    Raises:
      DamagedCheckpoint: it cannot be read.
    """

    def __init__(self, step: os.PathLike, name: str):
        self._what = f"{os.fspath(step)}: {name}"
        self._store = self._or_damaged(lambda: ts.open(_spec(step, name), open=True, read=True).result())
        self.shape, self.dtype = tuple(self._store.shape), self._store.dtype.numpy_dtype
        self.block = tuple(int(size or 0) for size in self._store.chunk_layout.read_chunk.shape or ())
        """Shape of the blocks in which it is stored."""
        self._held: tuple[Any, Any] = (None, None)

    def _or_damaged(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except Exception as error:
            raise DamagedCheckpoint(f"{self._what} cannot be read: {cause(error)}") from error

    def read(self, lead: tuple[int, ...] = (), dtype: Any = None) -> np.ndarray:
        """Return self[lead]; the whole array in this dtype."""
        if not lead:
            out = np.empty(self.shape, dtype or self.dtype)
            for index in blocks_of(self.shape, self.block):
                out[index] = self._or_damaged(self._store[index].read().result)
            return out
        starts = tuple(i // part * part for i, part in zip(lead, self.block, strict=False))
        if starts != self._held[0]:
            self._held = (None, None)  # before the next is read
            index = tuple(slice(i, min(i + part, n)) for i, part, n in zip(starts, self.block, self.shape, strict=False))
            self._held = starts, self._or_damaged(self._store[index].read().result)
        return self._held[1][tuple(i - start for i, start in zip(lead, starts, strict=True))]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read(dtype=dtype)
