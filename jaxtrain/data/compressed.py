"""Read gzip, bzip2, xz and zstd files decompressed; a file's kind is known by its first bytes, not by its name."""

from __future__ import annotations

import bz2
import io
import lzma
import re
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from jaxtrain.data.optional import require
from jaxtrain.data.store_path import SourcePath
from jaxtrain.errors import DataError

BLOCK_BYTES = 1 << 16
HEAD_BYTES = 8192
# zstd: a frame, or a skippable frame, with which multi-threaded zstd files begin.
FIRST_BYTES = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", re.DOTALL),
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "zstd": re.compile(rb"(\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)", re.DOTALL),
}
SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
SHORTEST = 8  # bytes: no compressed file is shorter


def compression_of(head: bytes) -> str | None:
    """Return the entry of FIRST_BYTES that a file beginning with `head` matches, or None."""
    return next((name for name, pattern in FIRST_BYTES.items() if pattern.match(head)), None)


def open_content(path: SourcePath) -> io.BufferedReader:
    """Open a file for reading; a compressed file is decompressed as it is read, all of its members in order.

    A file with a compressed file's suffix but other content is read as it is. Raises OSError; DataError, here or while reading,
    where the file is cut short or damaged.
    """
    file = path.open("rb")
    try:
        head = file.peek(HEAD_BYTES)
        kind = compression_of(head)
        if kind is None and path.suffix in SUFFIXES and len(head) < SHORTEST:
            raise DataError(f"{path}: the {SUFFIXES[path.suffix]} file is cut short: it has {len(head)} bytes; fetch it again")
        if kind is None:
            return file
        raw = _Zstd(file, path) if kind == "zstd" else _Members(file, path, kind)
        return io.BufferedReader(raw, BLOCK_BYTES)
    except BaseException:
        file.close()
        raise


class _GzipMember:
    """A gzip member with the interface of bz2's and lzma's decompressors. zlib checks length and checksum at its end."""

    def __init__(self):
        self._member = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._member.eof

    @property
    def unused_data(self) -> bytes:
        return self._member.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        content = self._member.decompress(self._member.unconsumed_tail + data, max_length)
        self.needs_input = not self._member.unconsumed_tail and len(content) < max_length
        return content


NEW_MEMBER: dict[str, Callable[[], Any]] = {
    "gzip": _GzipMember,
    "bzip2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
}


class _Content(io.RawIOBase):
    """The content of a compressed file, by a method `_read`."""

    def __init__(self, file: BinaryIO, path: SourcePath, kind: str):
        self._file, self._path, self._kind = file, path, kind

    def _read(self, most: int) -> bytes:
        """Return up to `most` bytes; none at the end of the file."""
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._read(len(buffer))
        except (zlib.error, lzma.LZMAError, OSError, EOFError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # a disk error; libraries' own have no number
                raise
            raise _damaged(self._path, self._kind, self._file, error) from error
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Members(_Content):
    """The content of a gzip, bzip2 or xz file.

    Unlike the standard library's readers, it does not take damage in a later member for the end of the file.
    """

    def __init__(self, file: BinaryIO, path: SourcePath, kind: str):
        super().__init__(file, path, kind)
        self._member = NEW_MEMBER[kind]()

    def _read(self, most: int) -> bytes:
        while True:
            block = b""
            if self._member.eof:
                block = self._next_member()
                if not block:
                    return b""
                self._member = NEW_MEMBER[self._kind]()
            elif self._member.needs_input and not (block := self._file.read(BLOCK_BYTES)):
                raise _cut_short(self._path, self._kind, self._file)
            if content := self._member.decompress(block, most):
                return content

    def _next_member(self) -> bytes:
        """Return what follows the finished member and its zero padding; empty at the end of the file."""
        rest = self._member.unused_data.lstrip(b"\0")
        while not rest and (block := self._file.read(BLOCK_BYTES)):
            rest = block.lstrip(b"\0")
        return rest


class _Zstd(_Content):
    """The contents of a zstd file, frame after frame."""

    def __init__(self, file: BinaryIO, path: SourcePath):
        super().__init__(file, path, "zstd")
        arrow = require("pyarrow", f"{path}, a zstd file,")
        self._read = arrow.CompressedInputStream(arrow.PythonFile(file, mode="r"), "zstd").read


def _cut_short(path: SourcePath, kind: str, file: BinaryIO) -> DataError:
    return DataError(f"{path}: the {kind} file is cut short: it ends at byte {file.tell()}, in the middle; fetch it again")


def _damaged(path: SourcePath, kind: str, file: BinaryIO, error: Exception) -> DataError:
    why = str(error).partition("decompress failed: ")[2] or str(error)
    if "Truncated" in why:
        return _cut_short(path, kind, file)
    if "too much memory" in why:
        return DataError(f"{path}: the zstd file has a window beyond 128 MiB; write it anew without --long (zstd -d --long=31)")
    return DataError(f"{path}: the {kind} file is damaged before byte {file.tell()} ({why}); fetch it again")
