"""Read and write a checkpoint's arrays block by block, with TensorStore: what Orbax would hold whole in memory."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from jaxtrain.checkpoint.stored import cause
from jaxtrain.errors import DamagedCheckpoint

Index = tuple[slice, ...]
BLOCK_BYTES = 64 << 20
"""Bytes of an array that are in memory at a time, and lie in one piece in the checkpoint."""
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
