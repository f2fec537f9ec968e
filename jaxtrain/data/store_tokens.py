"""Arrays of ids in files behind URLs: read in blocks, which a bounded folder keeps for all processes of a host."""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np

from jaxtrain.data.file_hashes import short_hash
from jaxtrain.data.store_path import READ_BYTES, StorePath
from jaxtrain.errors import DataError
from jaxtrain.files import Tolerance, log_warning, replace_file

BLOCK_BYTES = 1 << 17
"""Bytes of a file that are fetched and kept together: a shuffled row needs one or two blocks."""
MEMORY_BYTES = 1 << 28
"""Bytes of blocks that a process keeps in memory."""
DIRECT_BYTES = 1 << 21
"""A longer stretch is read in passing, as a scan does, and not kept."""
_CHECK_BYTES = 4


class BlockCache:
    """Blocks of files, in memory and in a folder. Threads and processes may share it.

    A block is a file of its own, with a checksum, renamed into place; the oldest go when there are more bytes than `most`. What
    cannot be written is fetched again when it is needed again.
    """

    def __init__(self, folder: Path, most: int):
        self._folder, self._most = folder, most
        self._recent: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._recent_bytes = 0
        self._lock = threading.Lock()
        self._unswept = most  # bytes written since the folder was last measured; the first write measures it
        self._tolerance = Tolerance(folder, log_warning)

    def get(self, key: str, number: int) -> bytes | None:
        """Return a block; None if it is not here whole."""
        with self._lock:
            if (block := self._recent.get((key, number))) is not None:
                self._recent.move_to_end((key, number))
                return block
        try:
            content = self._file(key, number).read_bytes()
        except OSError:
            return None
        block, check = content[:-_CHECK_BYTES], content[-_CHECK_BYTES:]
        if zlib.crc32(block).to_bytes(_CHECK_BYTES, "big") != check:
            return None
        self._remember(key, number, block)
        return block

    def put(self, key: str, number: int, block: bytes) -> None:
        """Keep a block."""
        self._remember(key, number, block)
        if self._most <= 0:
            return
        with self._lock:
            self._tolerance.attempt(lambda: self._write(self._file(key, number), block), "blocks are fetched again")
            self._unswept += len(block)
            if self._unswept > self._most // 16:
                self._unswept = 0
                self._sweep()

    def _file(self, key: str, number: int) -> Path:
        return self._folder / key / str(number)

    def _write(self, file: Path, block: bytes) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, block + zlib.crc32(block).to_bytes(_CHECK_BYTES, "big"))

    def _remember(self, key: str, number: int, block: bytes) -> None:
        with self._lock:
            if (key, number) not in self._recent:
                self._recent[key, number] = block
                self._recent_bytes += len(block)
            while self._recent_bytes > MEMORY_BYTES:
                self._recent_bytes -= len(self._recent.popitem(last=False)[1])

    def _sweep(self) -> None:
        """Remove the oldest files until nine tenths of the bytes allowed are left, if there are more than allowed."""
        found: list[tuple[float, int, str]] = []
        with suppress(OSError):
            for folder in [entry.path for entry in os.scandir(self._folder) if entry.is_dir()]:
                for entry in os.scandir(folder):
                    with suppress(OSError):  # another process may have removed it
                        about = entry.stat()
                        found.append((about.st_mtime, about.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        if total <= self._most:
            return
        for _, size, path in sorted(found):
            with suppress(OSError):
                os.unlink(path)
            total -= size
            if total <= 0.9 * self._most:
                return


@lru_cache
def block_cache(folder: Path, most: int) -> BlockCache:
    """Return the process's one cache in that folder."""
    return BlockCache(folder, most)


class StoreTokens:
    """An array of ids in a file behind a URL, [count]; it has a length and can be sliced."""

    def __init__(self, path: StorePath, dtype: np.dtype, count: int, offset: int, cache: BlockCache):
        """Take `count` numbers from byte `offset` on. Raises DataError where the file is shorter."""
        stat = path.stat()
        self._end = offset + count * dtype.itemsize
        if stat.st_size < self._end:
            raise DataError(
                f"{path}: {stat.st_size} bytes, but {count} numbers of {dtype} end at byte {self._end}; it is cut short"
            )
        self.dtype, self.nbytes = dtype, count * dtype.itemsize
        self._path, self._count, self._offset, self._cache = path, count, offset, cache
        self._key = short_hash([str(path), *stat, BLOCK_BYTES])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(self._count)
        assert step == 1, "ids are read in order"
        if start >= stop:
            return np.zeros(0, self.dtype)
        first, last = self._offset + start * self.dtype.itemsize, self._offset + stop * self.dtype.itemsize
        if last - first > DIRECT_BYTES:
            bounds = [*range(first, last, READ_BYTES // 4), last]
            content = b"".join(self._path.read_ranges(list(zip(bounds, bounds[1:], strict=False))))
        else:
            numbers = range(first // BLOCK_BYTES, (last - 1) // BLOCK_BYTES + 1)
            blocks = self._blocks(numbers)
            before = first - numbers[0] * BLOCK_BYTES
            content = b"".join(blocks[number] for number in numbers)[before : before + last - first]
        return np.frombuffer(content, self.dtype)

    def fetch(self, spans: Sequence[tuple[int, int]]) -> None:
        """Fetch the blocks of all spans [start, stop) at the same time, unless they are here."""
        size = self.dtype.itemsize
        numbers = set()
        for start, stop in spans:
            first, last = self._offset + start * size, self._offset + min(stop, self._count) * size
            numbers.update(range(first // BLOCK_BYTES, (last - 1) // BLOCK_BYTES + 1))
        self._blocks(sorted(numbers))

    def _blocks(self, numbers: Iterable[int]) -> dict[int, bytes]:
        found, missing = {}, []
        for number in numbers:
            if (block := self._cache.get(self._key, number)) is None:
                missing.append(number)
            else:
                found[number] = block
        if missing:
            ranges = [(number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, self._end)) for number in missing]
            for number, block in zip(missing, self._path.read_ranges(ranges), strict=True):
                self._cache.put(self._key, number, block)
                found[number] = block
        return found
