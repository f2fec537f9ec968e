"""SHA-256 of files, remembered by size and modification time, so that an unchanged file is read only once."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from jaxtrain.data.progress import progress
from jaxtrain.data.store_path import SourcePath, StoreStat
from jaxtrain.errors import DataError
from jaxtrain.files import replace_file

READ_BYTES = 1 << 22
# A file changed twice within the clock's resolution keeps its time stamp, so a younger stamp than this proves nothing.
SETTLED_SECONDS = 2.0


def short_hash(value: object) -> str:
    """Return 32 hexadecimal digits of the SHA-256 of a JSON value, equal for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def unreadable(path: SourcePath, error: OSError) -> DataError:
    """Return the error for a failed read of `path`."""
    return DataError(f"{path}: cannot be read ({error.strerror or error})")


@contextmanager
def reading(path: SourcePath) -> Iterator[None]:
    """Turn a failure to read `path` into its DataError."""
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error


def keep_note(path: Path, content: str | bytes) -> None:
    """Keep what only saves time: where it cannot be written, it is found again."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)


def file_hashes(paths: Sequence[SourcePath], cache_dir: Path, title: str) -> list[str]:
    """Return the SHA-256 of each file's content, in hexadecimal.

    A file is read only if its size, inode or modification time differs from the record in `cache_dir/hashes`. A record that
    cannot be written is no error: the next run reads the file again. Raises DataError for a file that cannot be read.
    """
    note_path = cache_dir / "hashes" / f"{short_hash([str(path.absolute()) for path in paths])}.json"
    noted = _read_note(note_path)
    stats = [_stat(path) for path in paths]
    stamps = [[stat.st_size, stat.st_mtime_ns, stat.st_ino] for stat in stats]
    known = [noted.get(str(path.absolute())) for path in paths]
    changed = [i for i, entry in enumerate(known) if entry is None or entry[:3] != stamps[i]]
    hashes = ["" if entry is None else str(entry[3]) for entry in known]
    with progress(title, sum(stats[i].st_size for i in changed)) as advance:
        for i in changed:
            hashes[i] = _hash_file(paths[i], advance)
    settled_before = time.time_ns() - int(SETTLED_SECONDS * 1e9)
    if any(stats[i].st_mtime_ns < settled_before for i in changed):
        note = {
            str(path.absolute()): [*stamps[i], hashes[i]]
            for i, path in enumerate(paths)
            if stats[i].st_mtime_ns < settled_before
        }
        keep_note(note_path, json.dumps(note))
    return hashes


def _stat(path: SourcePath) -> os.stat_result | StoreStat:
    with reading(path):
        return path.stat()


def _hash_file(path: SourcePath, advance) -> str:
    digest = hashlib.sha256()
    with reading(path), path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def _read_note(path: Path) -> dict[str, list]:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    good = isinstance(note, dict) and all(isinstance(entry, list) and len(entry) == 4 for entry in note.values())
    return note if good else {}
