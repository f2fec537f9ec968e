"""Find the files of a source, and give each a name that is the same on every machine."""

from __future__ import annotations

import glob
import os
import re
import stat
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from pathlib import Path

from jaxtrain.data.file_hashes import unreadable
from jaxtrain.data.store_path import SourcePath, StorePath
from jaxtrain.errors import DataError
from jaxtrain.files import user_path
from jaxtrain.stores import protocol_of

NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
LONGEST_PATH = 4096  # characters


@dataclass(frozen=True)
class SourceFile:
    """A file of a source. `name` is relative to where its glob starts, with forward slashes."""

    name: str
    path: SourcePath


def list_stdlib() -> list[SourceFile]:
    """List the running Python's standard library: every .py file outside tests and site-packages, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_STDLIB]
        paths = [Path(folder) / name for name in names if name.endswith(".py")]
        files += [SourceFile(path.relative_to(root).as_posix(), path) for path in paths if _is_utf8(path)]
    if not files:
        raise DataError(f"kind=stdlib: this Python has no library source in {root}; use kind=text with files of your own")
    return sorted(files, key=lambda file: file.name)


def _is_utf8(path: Path) -> bool:
    """Return whether a file is UTF-8: some Python versions ship a source file in another encoding, which is left out."""
    try:
        path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return False
    return True


def list_files(patterns: str, flag: str, in_folder: Sequence[str] = ()) -> list[SourceFile]:
    """List the files that comma-separated globs match, each once: in the order of the globs, then sorted by name.

    A name that exists exactly as given is taken literally, commas and wildcards included: a whole path, and the leading folders
    of a glob. A folder stands for its files that match the first glob of `in_folder` that matches any. `flag` is the patterns'
    name in errors ("data.sources.0.path"). Raises DataError for a glob without a match, with the part of its path that exists,
    and for a dangling link.
    A URL, or a glob in one, names files in a store; file:// is left out.
    """
    files, seen = [], set()
    for pattern in split_patterns(patterns):
        if protocol_of(pattern) not in ("", "file"):
            new = [file for file in _list_store(pattern, flag, in_folder) if file.path not in seen]
            seen.update(file.path for file in new)
            files += new
            continue
        pattern = re.sub("^file://", "", pattern, flags=re.IGNORECASE)
        root, rest = _fixed_root(user_path(pattern))
        if not rest and root.is_dir():
            rest = next((name for name in in_folder if any(root.glob(name))), "")
        paths = glob.glob(os.path.join(glob.escape(str(root)), rest), recursive=True) if rest else [str(root)]
        matches = [path for path in paths if _is_file(path)]
        if not matches:
            raise DataError(f"{flag}={pattern}: {_why_nothing(root, rest)}")
        folder = root if rest else root.parent
        for name in sorted(os.path.relpath(path, folder) for path in matches):
            path = folder / name
            real = os.path.realpath(path)
            if real not in seen:
                seen.add(real)
                files.append(SourceFile(Path(name).as_posix(), path))
    return files


def _list_store(pattern: str, flag: str, in_folder: Sequence[str]) -> list[SourceFile]:
    """List the files that a URL, or the glob in one, matches, sorted by name."""
    start, _, rest = pattern.partition("://")
    parts = rest.split("/")
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    whole = StorePath(pattern.rstrip("/"))
    root = StorePath(f"{start}://{'/'.join(parts[:fixed])}") if fixed < len(parts) else whole.parent
    try:
        if fixed < len(parts):
            found = root.matches("/".join(parts[fixed:]))
        elif whole.is_dir():
            root = whole
            found = next((found for glob in in_folder if (found := whole.matches(glob))), [])
        else:
            return [SourceFile(whole.name, whole)] if whole.stat() else []
        beside = [] if found else root.matches("*")
        if not found and not beside and not root.is_dir():
            root.stat()  # says what is missing: the folder, or its bucket
    except DataError as error:
        raise DataError(f"{flag}={pattern}: {error}") from error
    if not found:
        kinds = sorted({"*" + file.suffix for _, file in beside if file.suffix})
        raise DataError(f"{flag}={pattern}: matches no file; {root} has {', '.join(kinds[:8]) if kinds else 'no files'} in it")
    return [SourceFile(name, file) for name, file in found]


def split_patterns(patterns: str) -> list[str]:
    """Split at the commas, and strip spaces around a piece, but not inside the name of something that exists."""
    pieces, found = patterns.split(","), []
    while pieces:
        taken = next((n for n in _joinable(pieces) if _are_named(",".join(pieces[:n]))), 0)
        found.append(",".join(pieces[:taken]) if taken else pieces[0].strip())
        del pieces[: max(taken, 1)]
    return [pattern for pattern in found if pattern]


def _joinable(pieces: list[str]) -> range:
    """Return how many pieces may form one path, descending: no path is longer than LONGEST_PATH."""
    lengths = accumulate(len(piece) + 1 for piece in pieces)
    return range(sum(1 for _ in takewhile(lambda length: length <= LONGEST_PATH, lengths)), 0, -1)


def _are_named(path: str) -> bool:
    """Return whether the commas and spaces of a path belong to existing files or folders."""
    last = max(path.rfind(","), path.rfind(" "))
    end = path.find("/", last)
    return last < 0 or os.path.lexists(user_path(path if end < 0 else path[:end]))


def _is_file(path: str) -> bool:
    """Return whether a match is a file, not a folder. Raises DataError if it cannot be examined: data would go missing."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        if os.path.islink(path):
            raise DataError(
                f"{path}: is a link to {os.readlink(path)}, which cannot be opened ({error.strerror}); mend or remove the link"
            ) from error
        raise unreadable(Path(path), error) from error


def _fixed_root(path: Path) -> tuple[Path, str]:
    """(leading part that exists literally or has no wildcard, remaining glob) of a pattern; no glob if all exists."""
    parts = path.parts
    exists = next((n for n in range(len(parts), 0, -1) if os.path.lexists(Path(*parts[:n]))), 0)
    fixed = next((n for n in range(exists, len(parts)) if glob.has_magic(parts[n])), max(exists, len(parts) - 1))
    return Path(*parts[:fixed]), os.path.join("", *parts[fixed:])


def _why_nothing(root: Path, rest: str) -> str:
    if not rest and root.is_dir():
        return f"is a folder; name the files in it, e.g. {os.path.join(root, '**', '*')}"
    if not rest:
        return "is no file to read"
    if not root.is_dir():
        return f"matches no file: there is no folder {root} (the working directory is {Path.cwd()})"
    kinds = sorted({"*" + path.suffix for path in root.iterdir() if path.is_file() and path.suffix})
    return f"matches no file; {root} has {', '.join(kinds[:8]) if kinds else 'no files'} in it"
