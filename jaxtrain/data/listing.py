"""Finds the files of a source, and gives each a name that is the same on every machine."""

from __future__ import annotations

import glob
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from jaxtrain.errors import DataError

NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class SourceFile:
    """A file of a source. `name` is relative to where its glob starts, with forward slashes."""

    name: str
    path: Path


def list_stdlib() -> list[SourceFile]:
    """The running Python's own standard library: every .py file outside tests and site-packages, sorted by name."""
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
    """Some Python versions ship a source file in another encoding; it is left out, being nobody's mistake."""
    try:
        path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return False
    return True


def list_files(patterns: str, source_name: str) -> list[SourceFile]:
    """The files that match comma-separated globs, each once: in the order of the globs, then sorted by name.

    Raises DataError where a glob matches no file, saying how far its path does exist.
    """
    files, seen = [], set()
    for pattern in _split_patterns(patterns):
        expanded = os.path.expanduser(pattern)
        root = _fixed_root(expanded)
        matches = [path for path in glob.glob(expanded, recursive=True) if os.path.isfile(path)]
        if not matches:
            raise DataError(f"{source_name}.path={pattern}: {_why_nothing(expanded, root)}")
        for name in sorted(os.path.relpath(path, root) for path in matches):
            path = root / name
            real = os.path.realpath(path)
            if real not in seen:
                seen.add(real)
                files.append(SourceFile(Path(name).as_posix(), path))
    return files


def _split_patterns(patterns: str) -> list[str]:
    if os.path.exists(os.path.expanduser(patterns)):  # a name may itself hold a comma
        return [patterns]
    return [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]


def _fixed_root(pattern: str) -> Path:
    """The deepest folder of a glob that comes before any wildcard."""
    path = Path(pattern)
    parts = path.parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:fixed]) if fixed > 0 else Path(".")


def _why_nothing(pattern: str, root: Path) -> str:
    if os.path.isdir(pattern):
        return f"is a folder; name the files in it, e.g. {os.path.join(pattern, '**', '*')}"
    if not root.is_dir():
        return f"matches no file: there is no folder {root} (the working directory is {Path.cwd()})"
    kinds = sorted({"*" + path.suffix for path in root.iterdir() if path.is_file() and path.suffix})
    return f"matches no file; {root} has {', '.join(kinds[:8]) if kinds else 'no files'} in it"
