"""Files behind URLs, with the part of pathlib's interface that readers of data use."""

from __future__ import annotations

import io
import posixpath
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jaxtrain.errors import DataError
from jaxtrain.stores import StoreError, explained, open_store, patiently

READ_BYTES = 1 << 23
"""Bytes that are asked for at a time; so many more are read ahead."""
_STAMPS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "last_commit", "mtime", "created")
"""Fields of fsspec's file information of which each changes with the content; stores have one or another."""
T = TypeVar("T")


class StoreStat(NamedTuple):
    """Size and version of a file in a store, by the names of os.stat_result."""

    st_size: int
    st_mtime_ns: int
    st_ino: str


@dataclass(frozen=True)
class StorePath:
    """A file or folder behind a URL. Every failure is a DataError of one line; what may pass is tried again."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return posixpath.basename(self.url)

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1]

    @property
    def stem(self) -> str:
        return posixpath.splitext(self.name)[0]

    @property
    def parent(self) -> StorePath:
        return StorePath(posixpath.dirname(self.url))

    def with_name(self, name: str) -> StorePath:
        return StorePath(f"{posixpath.dirname(self.url)}/{name}")

    def with_suffix(self, suffix: str) -> StorePath:
        return self.with_name(self.stem + suffix)

    def absolute(self) -> StorePath:
        return self

    @cached_property
    def _place(self) -> tuple[Any, str]:
        try:
            return open_store(self.url)
        except StoreError as error:
            raise DataError(f"{self.url}: {error}") from error

    def ask(self, work: Callable[[Any, str], T]) -> T:
        """Return work(file system, path in it). Raises DataError where it fails for good."""
        place = self._place
        try:
            return patiently(self.url, lambda: work(*place))
        except Exception as error:
            raise DataError(str(explained(self.url, error))) from error

    @cached_property
    def _stat(self) -> StoreStat:
        about = self.ask(lambda store, path: store.info(path))
        stamp = next((str(about[name]) for name in _STAMPS if about.get(name)), "")
        return StoreStat(int(about["size"] or 0), 0, stamp)

    def stat(self) -> StoreStat:
        """Return size and version, asked for once."""
        return self._stat

    def exists(self) -> bool:
        return self.ask(lambda store, path: bool(store.exists(path)))

    def is_dir(self) -> bool:
        return self.ask(lambda store, path: bool(store.isdir(path)))

    def read_bytes(self) -> bytes:
        return self.ask(lambda store, path: bytes(store.cat_file(path)))

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes [start, stop) of each range, asked for at the same time. Raises DataError for one cut short."""

        def read(store: Any, path: str) -> list[bytes]:
            starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]
            return store.cat_ranges([path] * len(ranges), starts, stops, on_error="raise")

        found = self.ask(read)
        for (start, stop), content in zip(ranges, found, strict=True):
            if len(content) != stop - start:
                raise DataError(f"{self.url}: {start + len(content)} bytes, but was longer; it was changed while it was read")
        return found

    def glob(self, pattern: str) -> list[StorePath]:
        """Return the files of this folder that match, sorted by name."""
        return [file for _, file in self.matches(pattern)]

    def matches(self, pattern: str) -> list[tuple[str, StorePath]]:
        """Return (path from this folder on, file) of all files that match, sorted."""

        def find(store: Any, path: str) -> list[str]:
            root = path.rstrip("/")
            found = store.glob(f"{root}/{pattern}", detail=True)
            names = (posixpath.relpath(name, root) for name, about in found.items() if about["type"] == "file")
            return sorted(names)

        return [(name, StorePath(f"{self.url.rstrip('/')}/{name}")) for name in self.ask(find)]

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Open the file for reading, ahead of the reader."""
        assert mode == "rb", "files of stores are read as bytes"
        return io.BufferedReader(_Ahead(self), 1 << 16)


SourcePath = Path | StorePath


class _Ahead(io.RawIOBase):
    """Reads a file of a store in large ranges; of one that is read in order, the next range while this one is used."""

    def __init__(self, path: StorePath):
        self._path, self._size, self._position = path, path.stat().st_size, 0
        self._number, self._held = -1, b""
        self._next: tuple[int, Future[bytes]] | None = None
        self._thread = ThreadPoolExecutor(1, "jaxtrain-store")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._size:
            return 0
        number, place = divmod(self._position, READ_BYTES)
        if number != self._number:
            self._take(number)
        content = self._held[place : place + len(buffer)]
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def _take(self, number: int) -> None:
        ahead, self._next = self._next, None
        held = ahead[1].result() if ahead is not None and ahead[0] == number else self._read(number)
        if number == self._number + 1 and (number + 1) * READ_BYTES < self._size:
            self._next = number + 1, self._thread.submit(self._read, number + 1)
        self._number, self._held = number, held

    def _read(self, number: int) -> bytes:
        start = number * READ_BYTES
        return self._path.read_ranges([(start, min(start + READ_BYTES, self._size))])[0]

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        super().close()
