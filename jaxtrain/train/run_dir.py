"""Create and lock the folder of a run, set up the compilation cache, and read what an earlier process logged."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxtrain.config import Config
from jaxtrain.errors import ExplainedError
from jaxtrain.files import user_path
from jaxtrain.telemetry.metrics import read_rows
from jaxtrain.telemetry.progress import Progress
from jaxtrain.text import is_utf8, readable_size

LOCK_FILE = ".lock"
LEAST_CACHE_BYTES = 64 << 20
"""Smaller free space may not hold the programs of a run."""


def make_run_dir(directory: Path) -> None:
    """Create run_dir and check that it can be written.

    Raises:
      ExplainedError: it cannot.
    """
    if not is_utf8(str(directory.absolute())):
        raise ExplainedError(f"--run_dir={directory}: checkpoints need a path that is UTF-8; give another --run_dir")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / LOCK_FILE).touch()
    except OSError as error:
        why = "it is a file" if directory.is_file() else f"{error.strerror} ({error.filename})"
        raise ExplainedError(f"--run_dir={directory} cannot be written: {why}; give another --run_dir") from error


@contextlib.contextmanager
def only_run_in(directory: Path) -> Iterator[None]:
    """Lock run_dir against other runs until the block or the process ends; process 0 holds the lock for the whole run.

    Raises:
      ExplainedError: another process is training there; names it, if the lock file does.
    """
    if jax.process_index() != 0:
        yield
        return
    with open(directory / LOCK_FILE, "r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):  # other errors: the file system has no locks
                owner = file.read(200).strip() or "another process"
                raise ExplainedError(
                    f"{owner} is training in --run_dir={directory}; stop it or wait for it, or give another --run_dir"
                ) from error
        owner = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')},"
        with contextlib.suppress(OSError):  # the owner's name is not essential
            file.truncate(0)
            os.pwrite(file.fileno(), owner.encode(), 0)
        yield


def use_compilation_cache(config: Config, progress: Progress) -> None:
    """Turn on jax's persistent compilation cache, so that a restart compiles nothing again."""
    if not config.train.compilation_cache:
        return
    directory = user_path(config.train.compilation_cache)
    if not is_utf8(str(directory.absolute())):
        progress.say(f"warning    no compilation cache: XLA cannot name {directory}, which is not UTF-8")
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        progress.say(f"warning    no compilation cache: {directory} cannot be made ({error.strerror})")
        return
    free = shutil.disk_usage(directory).free
    if not os.access(directory, os.W_OK) or free < LEAST_CACHE_BYTES:
        why = f"has {readable_size(free)} of free space" if os.access(directory, os.W_OK) else "cannot be written"
        progress.say(f"warning    compilation cache: {directory} {why}; the next start may have to compile again")
        warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")  # one for each program
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a start has a hundred small programs


def largest_before(metrics_jsonl: Path, step: int, name: str) -> float:
    """Return the largest logged value of `name` (elapsed_seconds, energy_kwh) up to `step`; 0 if there is none."""
    try:
        rows = read_rows(metrics_jsonl)
    except OSError:  # metrics.jsonl is not essential
        return 0.0
    return max((row.get(name) or 0.0 for row in rows if row["step"] <= step), default=0.0)
