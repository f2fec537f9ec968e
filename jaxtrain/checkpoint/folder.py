"""The folder of a run's checkpoints as a save finds it: whether it can be written, and what must be moved or deleted first."""

from __future__ import annotations

import errno
import glob
import logging
import os
import shutil

import jax
from etils import epath

from jaxtrain.checkpoint.stored import (
    COMMIT_MARK,
    LEFTOVER_NAME,
    METADATA_FILE,
    PARTIAL,
    STEP_NAME,
    committed_steps,
    delete,
    is_committed,
    set_aside,
)

_FULL = (errno.ENOSPC, errno.EDQUOT)
_SLACK = 1 << 20  # bytes: more than a checkpoint needs beside its arrays

log = logging.getLogger(__name__)


def probe(directory: epath.Path, full_is_fatal: bool) -> str | None:
    """Make the folder, and return why this process cannot use it, or None.

    Args:
      full_is_fatal: whether a full disk is a reason even where there is a checkpoint to go on from.
    """
    if glob.has_magic(os.fspath(directory)):
        return "the folder's name holds *, ? or [, which Orbax takes for wildcards; it would save nothing readable"
    file = directory / f".write_probe_{jax.process_index()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            file.write_bytes(b"x")
        finally:
            file.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in _FULL or not committed_steps(directory) or full_is_fatal:
            log.error("cannot write %s: %s", file, error)
            return f"{type(error).__name__}: {error}"
        log.warning("%s: %s; the run goes on from its checkpoint, and saves once there is space", directory, error)
    return None


def remove_leftovers(directory: epath.Path) -> None:
    """Delete what interrupted saves and deletions left. Only process 0 calls it."""
    for path in children(directory):
        if LEFTOVER_NAME.fullmatch(path.name):
            log.info("removing the rest of an interrupted save or deletion: %s", path)
            delete(path)
        elif STEP_NAME.fullmatch(path.name) and not is_committed(path):
            log.warning("%s is not a checkpoint (no %s or %s in it); ignored", path, COMMIT_MARK, METADATA_FILE)


def broken(directory: epath.Path) -> list[str]:
    """Return the names of step folders that are damaged or incomplete."""
    names = [path.name for path in children(directory) if path.is_dir()]
    whole = {str(step) for step in committed_steps(directory)}
    return sorted(n for n in names if ".damaged-" in n or (STEP_NAME.fullmatch(n) and n not in whole))


def obstacle(directory: epath.Path, step: int, size: int, newest: int) -> OSError | None:
    """Return why a save of `size` bytes cannot succeed; also free the name of the step's folder. Only process 0 calls it.

    Checked before any process begins: a process that stops inside Orbax's save leaves the others waiting in it.
    """
    try:
        if newest >= 0 and not directory.is_dir():  # Orbax would just make it again
            return FileNotFoundError(f"the folder has vanished, and step {newest} with it")
        if os.path.lexists(directory / str(step)):  # it counts for none, since `newest` is a lower step
            aside = set_aside(directory, step, "damaged", f"it was in the way of a new step {step}, and is no checkpoint")
            log.warning("a folder %d without %s was in the way of the new step; set aside as %s", step, COMMIT_MARK, aside.name)
        if partial(directory, step).exists():
            delete(partial(directory, step))
        free = shutil.disk_usage(directory).free
        if free < size + _SLACK:
            return OSError(errno.ENOSPC, f"No space left: the arrays take {size / 1e6:.1f} MB, {free / 1e6:.1f} MB are free")
    except OSError as error:
        return error
    return None


def partial(directory: epath.Path, step: int) -> epath.Path:
    """Return the folder into which a step is written until it is committed."""
    return directory / f"{step}{PARTIAL}"


def children(directory: epath.Path) -> list[epath.Path]:
    """Return the entries of a folder; none if it is not there."""
    return list(directory.iterdir()) if directory.is_dir() else []
