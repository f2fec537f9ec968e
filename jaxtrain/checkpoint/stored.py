"""Read the folder of a run's checkpoints: its steps, the metadata beside the arrays, and the arrays, verified.

    checkpoints/1000/committed.json         written last: every leaf's checksum; a folder without it is not a checkpoint
    checkpoints/1000/_CHECKPOINT_METADATA   JSON; "custom_metadata" holds ours: every leaf's name, dtype and shape, the config
    checkpoints/1000/state/                 the arrays: TensorStore, OCDBT, uncompressed
    checkpoints/900.damaged-1/              set aside: did not hold what was saved; why_set_aside.txt gives the reason

These functions need only a folder, write nothing unless they say so, and are safe beside a run that is saving into it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
from etils import epath

from jaxtrain.checkpoint.blocks import read_arrays
from jaxtrain.checkpoint.checksums import checksums
from jaxtrain.checkpoint.trees import check_same_leaves, describe, leaves_by_path
from jaxtrain.errors import CheckpointError, DamagedCheckpoint, cause
from jaxtrain.files import user_path
from jaxtrain.processes import exchange_next, own_index
from jaxtrain.text import printable

COMMIT_MARK = "committed.json"
METADATA_FILE = "_CHECKPOINT_METADATA"
WHY_FILE = "why_set_aside.txt"
PARTIAL = ".partial"  # after a step's number: it is being written, or being deleted
FORMAT = 3  # of the content of custom_metadata
OPTIONAL = ("ema",)
"""Parts of a state with which a run may begin, or which it may drop, between two steps."""
STEP_NAME = re.compile(r"0|[1-9]\d*")
LEFTOVER_NAME = re.compile(rf"\d+(\.[a-z-]+\d+)?{re.escape(PARTIAL)}(\.orbax.*|\.partial_save.*)?")
LEAF_NAME = re.compile(r"[^./]+(/[^./]+)*")  # see trees.leaves_by_path
LEAF = re.compile(r"\w+\[(\d+(,\d+)*)?\]")  # trees.describe
# Failures of the host, not of the checkpoint: no reason to set it aside.
_ELSEWHERE = re.compile(r"RESOURCE_EXHAUSTED|out of memory|MemoryError|PermissionError|Too many open files", re.IGNORECASE)

_KINDS = (DamagedCheckpoint, CheckpointError)  # the worst last

T = TypeVar("T")
log = logging.getLogger(__name__)


def committed_steps(directory: os.PathLike | str) -> list[int]:
    """Return the committed steps in `directory`, ascending. Other entries of the folder are ignored."""
    root = absolute(directory)
    if not root.is_dir():
        return []
    return sorted(int(path.name) for path in root.iterdir() if STEP_NAME.fullmatch(path.name) and is_committed(path))


def read_metadata(directory: os.PathLike | str, step: int) -> dict[str, Any]:
    """Return the JSON metadata saved with `step`. All processes call it together, and it raises on all of them or on none.

    Raises:
      CheckpointError: there is no such checkpoint, or it is in another format.
      DamagedCheckpoint: its metadata is not what was saved, or belongs to another step.
    """
    return agreed(absolute(directory) / str(step), lambda: read_stored(step_path(directory, step))["metadata"])


def restore(directory: os.PathLike | str, step: int, abstract_state: Any, part: bool = False) -> Any:
    """Return the state saved at `step`, shaped like `abstract_state`, each leaf bit for bit in the sharding it names.

    All processes call it together, and it raises on all of them or on none.

    A part of OPTIONAL that the checkpoint lacks is left out of the state; one that the state lacks is not read.

    Args:
      abstract_state: pytree of jax.ShapeDtypeStruct, every leaf (scalars too) with its `.sharding`. The mesh may be any.
      part: whether the checkpoint may hold further leaves.
    Raises:
      CheckpointError: no such checkpoint; or its leaves are not exactly those of `abstract_state` (missing, extra, of
        another shape or dtype), each named with the saved and the expected value.
      DamagedCheckpoint: it cannot be read, or a leaf's checksum differs from the saved one.
    """
    path = absolute(directory) / str(step)
    for name, leaf in leaves_by_path(abstract_state)[0].items():
        if getattr(leaf, "sharding", None) is None:
            raise TypeError(f"abstract_state leaf {'/'.join(name)} has no sharding; every leaf must have one")

    def stored_leaves() -> tuple[dict[str, Any], Any]:
        stored = read_stored(step_path(directory, step))
        lacks = [name for name in OPTIONAL if not any(leaf.startswith(f"{name}/") for leaf in stored["leaves"])]
        like = {name: tree for name, tree in abstract_state.items() if name not in lacks}
        wanted = {"/".join(name): describe(leaf) for name, leaf in leaves_by_path(like)[0].items()}
        unread = tuple(f"{name}/" for name in OPTIONAL if name not in like)
        held = {name: words for name, words in stored["leaves"].items() if not name.startswith(unread)}
        check_same_leaves(path, {name: words for name, words in held.items() if name in wanted or not part}, wanted)
        return stored, like

    stored, like = agreed(path, stored_leaves)
    leaves, treedef = leaves_by_path(like)
    loaded = _load(path, leaves)
    bad = wrong_leaves(stored["checksums"], {"/".join(name): leaf for name, leaf in loaded.items()})
    if bad:
        raise DamagedCheckpoint(f"checkpoint {path} does not hold what was saved: {', '.join(bad[:5])} ({len(bad)} arrays)")
    return jax.tree.unflatten(treedef, [loaded[name] for name in leaves])


def wrong_leaves(saved: dict[str, str], leaves: dict[str, jax.Array]) -> list[str]:
    """Return the names of the leaves whose checksum differs from the saved one."""
    return [name for name, found in checksums(leaves).items() if saved.get(name) != found]


def _load(path: epath.Path, leaves: dict[tuple[str, ...], Any]) -> dict[tuple[str, ...], jax.Array]:
    problem: Exception | None = None
    loaded: dict[tuple[str, ...], jax.Array] = {}
    try:
        loaded = read_arrays(path, leaves)
    except Exception as error:
        problem = error
    if not everywhere(problem is None):
        words = (
            f"checkpoint {path} cannot be read: {cause(problem) if problem else 'another process failed (its log says why)'}"
        )
        raise (CheckpointError if _ELSEWHERE.search(words) else DamagedCheckpoint)(words) from problem
    return loaded


def absolute(directory: os.PathLike | str) -> epath.Path:
    """Return the absolute path, with `~` expanded."""
    return epath.Path(os.path.abspath(user_path(directory)))


def is_committed(path: epath.Path) -> bool:
    """Return whether a step's folder was saved completely."""
    return (path / COMMIT_MARK).exists() and (path / METADATA_FILE).exists()


def step_path(directory: os.PathLike | str, step: int) -> epath.Path:
    """Return the folder of a committed step.

    Raises:
      CheckpointError: there is none.
    """
    path = absolute(directory) / str(step)
    if not is_committed(path):
        steps = committed_steps(directory)
        present = f"it holds steps {', '.join(map(str, steps))}" if steps else "it holds no checkpoint"
        raise CheckpointError(f"there is no checkpoint of step {step} in {absolute(directory)}; {present}")
    return path


def read_stored(path: epath.Path) -> dict[str, Any]:
    """Return what `save` wrote beside the arrays: format, step, leaves {"params/bias": "float32[16]"}, checksums, metadata.

    Raises:
      CheckpointError: it is in another format.
      DamagedCheckpoint: it is not what was saved, or belongs to another step.
    """
    try:
        mark = json.loads((path / COMMIT_MARK).read_text(encoding="utf-8"))
        stored = json.loads((path / METADATA_FILE).read_text(encoding="utf-8"))["custom_metadata"]
        stored |= {"checksums": mark["checksums"]}
        seal, saved_format, step = mark["digest"], stored["format"], stored["step"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"the metadata in {path} cannot be read ({type(error).__name__}: {error})") from error
    if digest(stored) != seal:
        raise DamagedCheckpoint(f"{path / METADATA_FILE} or {COMMIT_MARK} is not what was saved: the SHA-256 differs")
    if saved_format != FORMAT:
        raise CheckpointError(f"{path} is in checkpoint format {saved_format}, but this jaxtrain reads format {FORMAT}")
    if str(step) != path.name:
        raise DamagedCheckpoint(f"{path} holds step {step}, not {path.name}: the folder was renamed or copied over")
    if not _is_sound(stored):
        raise DamagedCheckpoint(f"{path / METADATA_FILE} is not what a save writes: wrong types of names or shapes")
    return stored


def _is_sound(stored: dict[str, Any]) -> bool:
    """Return whether the parts have the types that `save` writes: the digest detects accidents, but anyone can compute one."""
    leaves, sums, metadata = (stored.get(name) for name in ("leaves", "checksums", "metadata"))
    config = metadata.get("config", {}) if isinstance(metadata, dict) else None
    return (
        isinstance(leaves, dict)
        and all(LEAF_NAME.fullmatch(name) and LEAF.fullmatch(str(words)) for name, words in leaves.items())
        and isinstance(sums, dict)
        and sums.keys() == leaves.keys()
        and isinstance(config, dict)
        and all(isinstance(config.get(section, {}), dict) for section in ("mesh", "sync"))
    )


def commit(path: epath.Path, stored: dict[str, Any], sums: dict[str, str]) -> None:
    """Commit a folder with all its arrays: write the checksums beside them, then give it the step's name. Process 0 calls it,
    after all processes have called `flush`.
    """
    mark = {"checksums": sums, "digest": digest(stored | {"checksums": sums})}
    (path / COMMIT_MARK).write_text(json.dumps(mark), encoding="utf-8")
    flush(path)
    path.rename(path.parent / str(stored["step"]))
    _fsync(path.parent)


def flush(path: os.PathLike) -> None:
    """Have the disk hold the files and folders below `path` that this process wrote; process 0 also those of no process.

    TensorStore flushes the arrays; Orbax leaves its metadata to the kernel, which may write it long after the rename.
    """
    own, written = own_index(), []
    for folder, folders, files in os.walk(path):
        below = (folder, *(os.path.join(folder, name) for name in files))
        written += [each for each in below if _writer(os.path.relpath(each, path), 0) == own]
        folders[:] = [name for name in folders if _writer(name, own) == own]
    with ThreadPoolExecutor(8) as threads:  # so that they share the file system's commits
        list(threads.map(_fsync, written))


def _writer(path: str, otherwise: int) -> int:
    """Return the index of the process that writes what Orbax has named so."""
    found = re.search(r"process_(\d+)", path)
    return int(found[1]) if found else otherwise


def _fsync(path: os.PathLike | str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Not every file system flushes folders (SMB, some of FUSE).
        if not os.path.isdir(path) or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def digest(stored: dict[str, Any]) -> str:
    """Return the SHA-256 of the stored metadata as hexadecimal digits."""
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()


def set_aside(directory: os.PathLike | str, step: int, word: str, why: str) -> epath.Path:
    """Rename a step's folder so that it no longer counts but nothing is lost; return the new path. Only process 0 calls it."""
    root = absolute(directory)
    number = next(n for n in range(1, 10_000) if not (root / f"{step}.{word}-{n}").exists())
    aside = root / f"{step}.{word}-{number}"
    (root / str(step)).rename(aside)
    if aside.is_dir() and not os.path.islink(aside):  # the target of a link is not ours
        try:
            (aside / WHY_FILE).write_text(printable(why) + "\n", encoding="utf-8")
        except OSError as error:  # not fatal: the log holds the reason too
            log.warning("%s cannot be written: %s", aside / WHY_FILE, error)
    return aside


def delete(path: epath.Path) -> None:
    """Delete a checkpoint folder; a kill at any moment leaves it either whole or named as partly deleted."""
    try:
        if os.path.islink(path):  # its target is not ours
            os.unlink(path)
            return
        if PARTIAL not in path.name:
            gone = path.parent / f"{path.name}{PARTIAL}"
            gone.rmtree(missing_ok=True)
            path = path.rename(gone)
        for pause in (0.1, 0.2, 0.4, 0.8):  # TensorStore may still be at other files of a save that failed
            with contextlib.suppress(OSError):
                path.rmtree(missing_ok=True)
                return
            time.sleep(pause)
        path.rmtree(missing_ok=True)
    except OSError as error:  # a superfluous checkpoint is no reason to stop a run
        log.warning("could not delete %s: %s", path, error)


def everywhere(flag: bool) -> bool:
    """Return whether `flag` is true in every process (a barrier)."""
    return _worst(int(not flag)) == 0


def agreed(path: epath.Path, read: Callable[[], T]) -> T:
    """Return `read()` after it succeeded or failed in every process, so that none sets aside what another still reads.

    Raises:
      CheckpointError, DamagedCheckpoint: as `read` here, or the worse error of another process.
    """
    try:
        found, mine = read(), 0
    except CheckpointError as error:
        found, mine = error, 1 + _KINDS.index(type(error))
    worst = _worst(mine)
    if worst > mine:
        raise _KINDS[worst - 1](f"checkpoint {path} cannot be read by another process (its log says why)")
    if isinstance(found, CheckpointError):
        raise found
    return found


def _worst(value: int) -> int:
    """Return the maximum over all processes."""
    return max(exchange_next(value))
