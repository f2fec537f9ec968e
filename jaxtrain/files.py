"""Interpret a path from the user, replace files atomically, and tolerate files that cannot be written.

A run goes on without any of them. If the disk is full, over quota, read-only or away, the run warns once per file, keeps the
missing records in memory, tries again at every further write, and reports once when the file is complete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxtrain.errors import ExplainedError, UsageError

MOST_RECORDS, MOST_BYTES = 100_000, 64 << 20
"""Records and bytes of one file that are kept in memory while it cannot be written; then the oldest are dropped."""

Say = Callable[[str], None]


def log_warning(text: str) -> None:
    """Log a line of a run as a warning, for use without a display."""
    logging.getLogger(__name__).warning("%s", text.removeprefix("warning    "))


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return the path, with a leading ~ or ~user expanded unless the working directory has an entry of that very name."""
    name = os.fspath(path)
    return Path(name if os.path.lexists(name.partition("/")[0]) else os.path.expanduser(name))


@contextlib.contextmanager
def replacing(path: os.PathLike | str, durable: bool = False) -> Iterator[Path]:
    """Yield a path beside `path` to write; it replaces `path` if the block succeeds, and is removed if it fails.

    A reader, and a crash at any moment, sees the whole old file or the whole new one. A link stays a link, to the new content.
    Anything but a regular file, as /dev/stdout or a pipe, is not replaced: then the path is its own.

    Args:
      durable: flush the new file to disk before the replacement, so that it also survives a power cut.

    Raises:
      OSError: it cannot be written; `path` is unchanged.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        yield Path(path)
        return
    target = Path(os.path.realpath(path))
    beside = target.with_name(f"{target.name}.{os.getpid()}-{os.urandom(4).hex()}.new")
    try:
        yield beside
        if durable:
            with open(beside, "rb") as file:
                os.fsync(file.fileno())
        beside.replace(target)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def replace_file(path: os.PathLike | str, content: str | bytes, durable: bool = False) -> None:
    """Replace the content of `path` atomically (see `replacing`).

    Raises:
      OSError: it cannot be written; `path` is unchanged.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    with replacing(path, durable) as beside:
        beside.write_bytes(data)


def check_output(flag: str, path: str, overwrite: bool = False) -> None:
    """Check, before the work, that an output file can be written and does not exist yet.

    Args:
      flag: the flag that names the file, for the message.
      overwrite: whether an existing file may be replaced: the verb's flag --overwrite.

    Raises:
      UsageError: it cannot, or exists; names the flag.
    """
    file = user_path(path)
    if file.is_file() and not overwrite:
        raise UsageError(f"{flag}={path}: there is a file already; give --overwrite to replace it, or another name")
    if file.is_dir():
        why = "that is a folder"
    elif not file.parent.is_dir():
        why = f"there is no folder {file.parent}"
    elif not os.access(file if file.exists() else file.parent, os.W_OK):
        why = "that cannot be written"
    else:
        return
    raise UsageError(f"{flag}={path}: {why}; give a file in a folder that can be written")


@contextlib.contextmanager
def file_lock(path: os.PathLike | str, wait: bool = True) -> Iterator[bool]:
    """Hold a file as a lock between processes, and give True; False where another holds it and this does not `wait`.

    The system frees it when the holder dies. A file system without locks gives True to all.

    Raises:
      OSError: the file cannot be made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        is_ours = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            is_ours = error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        yield is_ours
    finally:
        os.close(descriptor)


def write_output(flag: str, path: str, content: str) -> None:
    """Replace the file that a flag names (see `replace_file`).

    Raises:
      ExplainedError: it cannot be written; names the flag.
    """
    try:
        replace_file(user_path(path), content)
    except OSError as error:
        raise ExplainedError(f"{flag}={path} cannot be written: {error.strerror}; give a file in another folder") from error


def make_file(path: Path, content: str, way_out: str) -> None:
    """Replace the content of `path` atomically, and make its folder (see `replace_file`).

    Raises:
      ExplainedError: it cannot be written; ends with the way out.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    except OSError as error:
        raise ExplainedError(f"{path} cannot be written: {error.strerror}; {way_out}") from error


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file's lines, [] without a file; a line that is none, or only half written, is left out."""
    found: list[Any] = []
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict)]


def whole_lines(path: Path) -> int:
    """Return the bytes of a file up to its last line end: a killed process may have left half a line."""
    return path.read_bytes().rfind(b"\n") + 1


class Tolerance:
    """Reports once that something cannot be written, and once that it can again.

    Args:
      what: the thing written, for messages.
      say: called with a line.
    """

    def __init__(self, what: object, say: Say):
        self._what, self._say = what, say
        self.failing = False
        """Return whether the newest attempt failed."""

    def attempt(self, work: Callable[[], None], kept: str = "") -> bool:
        """Do the work; return whether it succeeded. An OSError is reported, unless the previous attempt failed too.

        Args:
          kept: what happens to the unwritten data, for the message.
        """
        try:
            work()
        except OSError as error:
            if not self.failing:
                self.failing = True
                rest = f"; {kept}" if kept else ""
                self._say(f"warning    {self._what} cannot be written: {error.strerror or error}{rest}; the run goes on")
            return False
        if self.failing:
            self.failing = False
            self._say(f"written    {self._what} again")
        return True


class AppendedFile:
    """A file with appended records, each whole or not at all; unwritten ones are kept in memory. It has one writer.

    Args:
      path: the file; its folder is made when it is first written.
      say: called with a line when it cannot be written, and when it can again.
      keep: bytes of the existing content to keep; the rest is cut off when the file is opened.
    """

    def __init__(self, path: Path, say: Say, keep: Callable[[Path], int] = whole_lines):
        self.path = path
        self._keep, self._say = keep, say
        self._tolerance = Tolerance(path, say)
        self._pending: deque[bytes] = deque()
        self._pending_bytes = self._dropped = 0
        self._lock = threading.RLock()
        self._descriptor: int | None = None
        self._size: int | None = None
        """Bytes of whole records in the file; None before it was first opened."""

    def append(self, record: bytes) -> None:
        """Write the record, after all records that could not be written so far."""
        with self._lock:
            self._pending.append(record)
            self._pending_bytes += len(record)
            while len(self._pending) > MOST_RECORDS or self._pending_bytes > MOST_BYTES:
                self._pending_bytes -= len(self._pending.popleft())
                self._dropped += 1
            self.flush()

    def begin(self) -> None:
        """Cut the existing content to `keep` bytes now, before there is a record to write."""
        with self._lock:
            self._tolerance.attempt(self._open, "what it lacks is kept in memory")

    def flush(self) -> bool:
        """Write the pending records; return whether none is left."""
        with self._lock:
            return not self._pending or self._tolerance.attempt(self._write_pending, "what it lacks is kept in memory")

    def close(self) -> None:
        """Try once more to write the pending records, and report what is lost. Safe to call twice."""
        self.flush()
        if self._pending or self._dropped:
            self._say(f"warning    {self.path} lacks {len(self._pending) + self._dropped} records that could not be written")
            self._pending.clear()
            self._dropped = 0
        self._release()

    def _write_pending(self) -> None:
        if self._descriptor is None:
            self._open()
        while self._pending:
            self._write(self._pending[0])
            self._pending_bytes -= len(self._pending.popleft())

    def _open(self) -> None:
        """Open the file, and cut the existing content to `keep` bytes."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._size is None:
            self._size = self._keep(self.path) if self.path.exists() else 0
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            there = os.fstat(descriptor).st_size
            if there > self._size:
                os.ftruncate(descriptor, self._size)
        except OSError:
            os.close(descriptor)
            raise
        self._size, self._descriptor = min(there, self._size), descriptor

    def _write(self, record: bytes) -> None:
        """Append one record; on failure the file is cut back, and reopened for the next attempt."""
        assert self._descriptor is not None
        assert self._size is not None
        rest = memoryview(record)
        try:
            while rest:  # a full disk or a signal can shorten a write
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            self._release()
            raise
        self._size += len(record)

    def _release(self) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):  # a delayed error of a network file system
                os.close(self._descriptor)
        self._descriptor = None


class ReplacedFiles:
    """Files that are written whole. The newest content of one that cannot be written is kept for `retry`.

    Args:
      say: called with a line when a file cannot be written, and when it can again.
    """

    def __init__(self, say: Say):
        self._say = say
        self._tolerances: dict[Path, Tolerance] = {}
        self._pending: dict[Path, tuple[str | bytes, bool]] = {}

    def write(self, path: Path, content: str | bytes, durable: bool = False) -> bool:
        """Replace the file's content (see `replace_file`); return whether that succeeded."""
        self._pending[path] = content, durable
        return self._attempt(path)

    def retry(self) -> None:
        """Try again to write pending files; free if there are none."""
        for path in tuple(self._pending):
            self._attempt(path)

    def _attempt(self, path: Path) -> bool:
        tolerance = self._tolerances.setdefault(path, Tolerance(path, self._say))
        written = tolerance.attempt(lambda: self._replace(path), "its content is kept in memory")
        if written:
            del self._pending[path]
        return written

    def _replace(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, *self._pending[path])
