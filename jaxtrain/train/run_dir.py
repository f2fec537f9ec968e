"""Create and lock the folder of a run, set up the compilation cache, and read what an earlier process logged."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_compilation_cache
from jax.sharding import Mesh

from jaxtrain.config import Config
from jaxtrain.errors import ExplainedError
from jaxtrain.files import file_lock, user_path
from jaxtrain.telemetry.metrics import read_rows
from jaxtrain.text import is_utf8, readable_size, tell

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
    file = directory / LOCK_FILE
    with file_lock(file, wait=False) as is_ours:
        if not is_ours:
            owner = file.read_text(encoding="utf-8").strip() or "another process"
            raise ExplainedError(
                f"{owner} is training in --run_dir={directory}; stop it or wait for it, or give another --run_dir"
            )
        with contextlib.suppress(OSError):  # the owner's name is not essential
            owner = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')},"
            file.write_text(owner, encoding="utf-8")
        yield


@contextlib.contextmanager
def compilation_cache(
    mesh: Mesh, directory: str = Config().train.compilation_cache, warn: Callable[[str], None] = tell
) -> Iterator[None]:
    """Use jax's persistent compilation cache during the block, so that a restart compiles nothing again.

    Not for pipelines on CPUs: a program with collectives in branches that XLA:CPU loads from the cache may start them in
    another order on each device, and then waits forever (jaxlib 0.10.2; never seen with the program as it was compiled).
    """
    folder = _usable_cache(directory, warn)
    if mesh.devices.flat[0].platform == "cpu" and mesh.shape["pipe"] > 1:
        settings: dict[str, Any] = {"jax_enable_compilation_cache": False}
    elif folder:
        # 0 seconds: a start has a hundred small programs.
        settings = {"jax_compilation_cache_dir": folder, "jax_persistent_cache_min_compile_time_secs": 0.0}
    else:
        settings = {}
    before = {name: jax.config.values[name] for name in settings}
    try:
        _set_cache(settings)
        yield
    finally:
        _set_cache(before)


def _set_cache(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    if settings:
        jax_compilation_cache.reset_cache()  # jax looks at these settings once


def _usable_cache(name: str, warn: Callable[[str], None]) -> str:
    """Return the cache's folder; empty where there is none, and say why it cannot be used."""
    if not name:
        return ""
    directory = user_path(name)
    if not is_utf8(str(directory.absolute())):
        warn(f"warning    no compilation cache: XLA cannot name {directory}, which is not UTF-8")
        return ""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warn(f"warning    no compilation cache: {directory} cannot be made ({error.strerror})")
        return ""
    free = shutil.disk_usage(directory).free
    if not os.access(directory, os.W_OK) or free < LEAST_CACHE_BYTES:
        why = f"has {readable_size(free)} of free space" if os.access(directory, os.W_OK) else "cannot be written"
        warn(f"warning    compilation cache: {directory} {why}; the next start may have to compile again")
        warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")  # one for each program
    return str(directory)


def largest_before(metrics_jsonl: Path, step: int, name: str) -> float:
    """Return the largest logged value of `name` (elapsed_seconds, energy_kwh) up to `step`; 0 if there is none."""
    try:
        rows = read_rows(metrics_jsonl)
    except OSError:  # metrics.jsonl is not essential
        return 0.0
    return max((row.get(name) or 0.0 for row in rows if row["step"] <= step), default=0.0)
