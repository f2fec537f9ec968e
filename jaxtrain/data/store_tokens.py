"""Arrays of ids in files behind URLs. A row that is not here is read by itself, the bytes of it alone; behind the rows, files
that fit into a bounded folder are read whole, in order, and kept there in blocks for all processes of a host.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from jaxtrain.data.file_hashes import short_hash
from jaxtrain.data.store_path import READ_BYTES, StorePath
from jaxtrain.errors import DataError
from jaxtrain.files import Tolerance, file_lock, log_warning, replace_file

BLOCK_BYTES = 1 << 17
"""Bytes of a file that are kept together: a shuffled row needs one or two blocks."""
AT_ONCE = 4
"""Stretches of READ_BYTES of a file that are asked for at the same time."""
MEMORY_BYTES = 1 << 28
"""Bytes of rows and blocks that a process keeps in memory."""
DIRECT_BYTES = 1 << 21
"""A longer stretch is read in passing, as a scan does, and not kept."""
_CHECK_BYTES = 4
Part = int | tuple[int, int]
"""The number of a block, or the first byte and the one after the last."""


class BlockCache:
    """Blocks of files, in memory and in a folder. Threads and processes may share it.

    A block is a file of its own, with a checksum, renamed into place; the oldest go when there are more bytes than `most`.
    """

    def __init__(self, folder: Path, most: int):
        self._folder, self._most = folder, most
        self._recent: OrderedDict[tuple[str, Part], bytes] = OrderedDict()
        self._whole: dict[str, int] = {}
        self._work, self._works = SimpleQueue[Callable[[], None]](), False
        self._recent_bytes = 0
        self._lock = threading.Lock()
        self._unswept = most  # bytes written since the folder was last measured; the first write measures it
        self._tolerance = Tolerance(folder, log_warning)

    def recent(self, key: str, part: Part) -> bytes | None:
        """Return what is in memory of that name."""
        with self._lock:
            if (content := self._recent.get((key, part))) is not None:
                self._recent.move_to_end((key, part))
            return content

    def get(self, key: str, number: int) -> bytes | None:
        """Return a block; None if it is not here whole."""
        if (block := self.recent(key, number)) is not None:
            return block
        try:
            content = self._file(key, number).read_bytes()
        except OSError:
            return None
        block, check = content[:-_CHECK_BYTES], content[-_CHECK_BYTES:]
        if zlib.crc32(block).to_bytes(_CHECK_BYTES, "big") != check:
            return None
        self.remember(key, number, block)
        return block

    def has(self, key: str, part: range) -> bool:
        """Return whether there is a file of each block of some bytes."""
        return all(self._file(key, n).exists() for n in range(part.start // BLOCK_BYTES, (part.stop - 1) // BLOCK_BYTES + 1))

    def put(self, key: str, number: int, block: bytes) -> bool:
        """Keep a block in the folder; return whether it could be written."""
        with self._lock:
            done = self._tolerance.attempt(lambda: self._write(self._file(key, number), block), "blocks are fetched again")
            self._unswept += len(block)
            if self._unswept > self._most // 16:
                self._unswept = 0
                self._sweep()
        return done

    def reserve(self, key: str, size: int) -> bool:
        """Return whether all of a file's blocks may be kept, beside those of the files that were asked for before."""
        with self._lock:
            fits = sum(self._whole.values()) + size <= 0.9 * self._most  # `_sweep` leaves so much
            self._whole |= {key: size} if fits else {}
            return fits

    def behind(self, work: Callable[[], None]) -> None:
        """Do some work in the cache's one thread, after what was given before; it ends with the process."""
        self._work.put(work)
        with self._lock:
            if not self._works:
                self._works = True
                threading.Thread(target=self._do, name="jaxtrain-store", daemon=True).start()

    def _do(self) -> None:
        while True:
            self._work.get()()

    def alone(self, key: str) -> AbstractContextManager[bool]:
        """Give True to one process of the host at a time, for a file. Raises OSError where the folder cannot be written."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return file_lock(self._folder / f"{key}.lock", wait=False)

    def _file(self, key: str, number: int) -> Path:
        return self._folder / key / str(number)

    def _write(self, file: Path, block: bytes) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, block + zlib.crc32(block).to_bytes(_CHECK_BYTES, "big"))

    def remember(self, key: str, part: Part, content: bytes) -> None:
        """Keep a block, or bytes [first, last) of a file, in memory."""
        with self._lock:
            if (key, part) not in self._recent:
                self._recent[key, part] = content
                self._recent_bytes += len(content)
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
        self._key, self._asked = short_hash([str(path), *stat, BLOCK_BYTES]), False

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
        elif (content := self._held(first, last)) is None:
            content = self._path.read_ranges([(first, last)])[0]
        return np.frombuffer(content, self.dtype)

    def fetch(self, spans: Sequence[tuple[int, int]]) -> None:
        """Fetch all spans [start, stop) at the same time, unless they are here; and all blocks behind it, where they fit."""
        if not self._asked:
            self._asked = True
            if self._cache.reserve(self._key, self._end):
                self._cache.behind(self._fetch_all)
        size = self.dtype.itemsize
        wanted = [(self._offset + start * size, self._offset + min(stop, self._count) * size) for start, stop in spans]
        missing = [span for span in dict.fromkeys(wanted) if self._held(*span) is None]
        if missing:
            for span, content in zip(missing, self._path.read_ranges(missing), strict=True):
                self._cache.remember(self._key, span, content)

    def _held(self, first: int, last: int) -> bytes | None:
        """Return bytes first to last - 1, None unless all are here."""
        if (content := self._cache.recent(self._key, (first, last))) is not None:
            return content
        blocks, numbers = [], range(first // BLOCK_BYTES, (last - 1) // BLOCK_BYTES + 1)
        for number in numbers:
            if (block := self._cache.get(self._key, number)) is None:
                return None
            blocks.append(block)
        before = first - numbers[0] * BLOCK_BYTES
        return b"".join(blocks)[before : before + last - first]

    def _fetch_all(self) -> None:
        """Keep all blocks, in order, in one process of a host. Where it fails, what is not here is read when it is needed."""
        step, end = READ_BYTES // BLOCK_BYTES * BLOCK_BYTES or BLOCK_BYTES, self._end
        with suppress(DataError, OSError), self._cache.alone(self._key) as is_ours:
            for begin in range(0, end if is_ours else 0, AT_ONCE * step):
                starts = range(begin, min(begin + AT_ONCE * step, end), step)
                lacking = [start for start in starts if not self._cache.has(self._key, range(start, min(start + step, end)))]
                contents = self._path.read_ranges([(start, min(start + step, end)) for start in lacking]) if lacking else []
                for start, content in zip(lacking, contents, strict=True):
                    for place in range(0, len(content), BLOCK_BYTES):
                        number = (start + place) // BLOCK_BYTES
                        if not self._cache.put(self._key, number, content[place : place + BLOCK_BYTES]):
                            return
