"""The fast tier: snapshots of the state on each host's own memory or disk, between durable checkpoints.

Each process writes its own devices' shards into a file of its own: no process waits for another, nothing crosses the network,
and the loop waits only for the copy from the devices. A snapshot helps when processes die and their hosts survive (a crash, a
hang, a preemption that left the host). It is used only if *every* process has its file of the same step, newer than the
newest checkpoint, with correct checksums, of the same run on the same mesh; else the run resumes from the newest checkpoint.

    fast_dir/jaxtrain-UID/RUN/120/process-3.safetensors    RUN is a hash of the run's folder

Orbax has managers for this (`experimental.emergency`: local and multi-tier checkpoints). They are not used: they are
"experimental; do not use without specific approval" (orbax-checkpoint 0.12.8), keep no checksum of array data, and their
peer-to-peer service listens on every network interface without authentication.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import stat
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxtrain.checkpoint.same_run import as_json_gives_it_back
from jaxtrain.checkpoint.stored import everywhere
from jaxtrain.checkpoint.trees import leaves_by_path
from jaxtrain.files import Tolerance, log_warning, replace_file, replacing
from jaxtrain.processes import from_first

TOKEN_FILE = ".fast_tier"
KEPT = 2
"""Snapshots kept per process: it may die while it writes the newest."""
log = logging.getLogger(__name__)


class FastTier:
    """Snapshots of one process of a run. All processes make the same calls in the same order.

    Args:
      folder: on the host's own memory or disk; the same path on every host.
      run_dir: the run's shared folder. A snapshot from a deleted folder of that name, or from before a rollback, is ignored.
      rollbacks: returns the run's list of rollbacks as text.
    """

    def __init__(self, folder: Path, run_dir: Path, rollbacks: Callable[[], str]):
        self._root = Path(folder) / f"jaxtrain-{os.getuid()}"
        self._run_dir, self._rollbacks = run_dir, rollbacks
        self._folder = self._root / hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:16]
        self._thread: threading.Thread | None = None
        self._tolerance = Tolerance(f"a snapshot in {self._root}", log_warning)
        with contextlib.suppress(OSError):  # `save` tries again and logs the failure
            self._make_word()
        everywhere(True)  # barrier: the token exists before any process reads it
        for unfinished in self._folder.glob(f"*/{self._file}.*.new"):
            unfinished.unlink(missing_ok=True)

    # -----------------------------------------------------------------------------------------------------------------
    # Saving

    def save(self, step: int, state: Any, metadata: Mapping[str, Any]) -> None:
        """Copy this process's shards to host memory and write them in the background.

        A snapshot that cannot be written is logged once; training goes on.
        """
        self.wait()
        shards = list(_own_shards(state))
        for shard in shards:
            shard.data.copy_to_host_async()
        arrays = {f"{i}": np.array(shard.data, order="C") for i, shard in enumerate(shards)}  # save_file ignores strides
        about = {
            "step": str(step),
            "layout": _layout(state),
            "metadata": json.dumps(as_json_gives_it_back(metadata)),
        }
        self._thread = threading.Thread(target=self._write, args=(step, arrays, about), name=f"snapshot-{step}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until no snapshot is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, arrays: dict[str, np.ndarray], about: dict[str, str]) -> None:
        def work() -> None:
            self._make_word()
            sums = [_checksum(array) for array in arrays.values()]
            self._make_folder(step)
            with replacing(self._path(step), durable=True) as beside:
                try:
                    save_file(arrays, beside, about | {"token": self._token(), "crc32": json.dumps(sums)})
                except SafetensorError as error:  # a full disk, for example
                    raise OSError(str(error)) from error
            steps = self._steps()
            for old in [*sorted(s for s in steps if s <= step)[:-KEPT], *(s for s in steps if s > step)]:
                self._delete(old)  # later steps were rolled back

        self._tolerance.attempt(work, "checkpoints are saved as without it")

    # -----------------------------------------------------------------------------------------------------------------
    # Restoring

    def restore(self, newer_than: int, abstract: Any, accept: Callable[[int, dict[str, Any]], None]) -> tuple[int, Any] | None:
        """Return (step, state) of the newest snapshot after `newer_than` that all processes hold intact, or None.

        Args:
          abstract: the state's layout in memory: ShapeDtypeStructs with shardings.
          accept: called with a step and its metadata; may raise, as in `Checkpoints.restore_newest`.
        """
        layout, candidates = _layout(abstract), sorted(step for step in self._steps() if step > newer_than)
        while True:
            step = _newest_of_all(candidates)
            if step is None:
                return None
            found = self._read(step, abstract, layout)
            if everywhere(found is not None):
                assert found is not None
                accept(step, found[1])
                return step, _join(abstract, found[0])
            candidates = [other for other in candidates if other < step]

    def _read(self, step: int, abstract: Any, layout: str) -> tuple[list[np.ndarray], dict[str, Any]] | None:
        """(this process's shards, metadata) of a step, verified; None if any is missing or damaged."""
        path = self._path(step)
        try:
            with safe_open(path, framework="numpy", backend="pread") as file:
                about = file.metadata()
                if (about["step"], about["layout"], about["token"]) != (str(step), layout, self._token()):
                    return None
                arrays = [file.get_tensor(f"{i}") for i in range(len(file.keys()))]
            if [_checksum(array) for array in arrays] != json.loads(about["crc32"]):
                log.warning("snapshot %s skipped: its checksum differs from the saved one", path)
                return None
            return arrays, json.loads(about["metadata"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            log.warning("snapshot %s skipped: %s", path, error)
            return None

    # -----------------------------------------------------------------------------------------------------------------
    # Folders

    def clear(self) -> None:
        """Remove this process's snapshots: the run has ended, and its checkpoints hold the state."""
        self.wait()
        for step in self._steps():
            self._delete(step)

    @property
    def _file(self) -> str:
        return f"process-{jax.process_index()}.safetensors"

    def _path(self, step: int) -> Path:
        return self._folder / str(step) / self._file

    def _make_folder(self, step: int) -> None:
        """Create the step's folder, under a root that only we can write: a host's memory folder is shared by all its users.

        Raises:
          PermissionError: others can write that root.
        """
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self._is_ours():
            raise PermissionError(13, f"{self._root} can be written by others; give another --checkpoint.fast_dir")
        self._path(step).parent.mkdir(parents=True, exist_ok=True)

    def _is_ours(self) -> bool:
        try:
            owner = self._root.lstat()
        except OSError:
            return False
        return stat.S_ISDIR(owner.st_mode) and owner.st_uid == os.getuid() and not owner.st_mode & 0o022

    def _make_word(self) -> None:
        """Have process 0 write a random token into run_dir, which tells this run from another of the same name.

        Raises:
          OSError: the token cannot be written, or in another process, is not there.
        """
        word = self._run_dir / TOKEN_FILE
        if jax.process_index() == 0 and not word.exists():
            replace_file(word, secrets.token_hex(8))
        word.stat()

    def _token(self) -> str:
        """Return a hash of the run's token and its list of rollbacks: a snapshot counts only with the same value.

        The list is taken from memory: on a full disk the file may lack its end.
        """
        word = (self._run_dir / TOKEN_FILE).read_bytes()
        return hashlib.sha256(word + self._rollbacks().encode()).hexdigest()[:16]

    def _steps(self) -> list[int]:
        """Return the steps of which this process has a file."""
        if not self._is_ours() or not self._folder.is_dir():
            return []
        return [int(path.parent.name) for path in self._folder.glob(f"*/{self._file}") if path.parent.name.isdecimal()]

    def _delete(self, step: int) -> None:
        self._path(step).unlink(missing_ok=True)
        for folder in (self._path(step).parent, self._folder):
            with contextlib.suppress(OSError):  # another process has something in it
                folder.rmdir()


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(array.reshape(-1).view(np.uint8).data)


def _own_shards(state: Any) -> Iterator[Any]:
    """Yield each distinct shard on this process's devices once, always in the same order."""
    for leaf in jax.tree.leaves(state):
        different = {_place(shard.index): shard for shard in leaf.addressable_shards}
        yield from (different[place] for place in sorted(different))


def _place(index: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
    """Return a shard's slices as plain numbers; (-1, -1) for a whole dim."""
    return tuple(
        (-1, -1) if part == slice(None) else (part.start or 0, part.stop if part.stop is not None else -1) for part in index
    )


def _layout(state: Any) -> str:
    """Return a hash of leaves, shapes, dtypes and each device's slices: equal if this process's file can be reused."""
    lines = []
    for name, leaf in leaves_by_path(state)[0].items():
        places = leaf.sharding.devices_indices_map(leaf.shape)
        own = sorted((d.process_index, d.id, _place(index)) for d, index in places.items() if index is not None)
        lines.append(f"{'/'.join(name)} {leaf.dtype} {leaf.shape} {own}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _join(abstract: Any, arrays: list[np.ndarray]) -> Any:
    """Return the state made of this process's shards, given in the order of `_own_shards`."""
    parts = iter(arrays)
    leaves, treedef = leaves_by_path(abstract)

    def leaf(like: Any) -> jax.Array:
        devices = like.sharding.addressable_devices_indices_map(like.shape)
        held = {place: next(parts) for place in sorted({_place(index) for index in devices.values()})}
        on_devices = [_on_its_own(held[_place(index)], device) for device, index in devices.items()]
        return jax.make_array_from_single_device_arrays(like.shape, like.sharding, on_devices)

    return jax.tree.unflatten(treedef, [leaf(like) for like in leaves.values()])


def _on_its_own(array: np.ndarray, device: Any) -> jax.Array:
    """Return the array in device memory of its own, so that the first step can take it by donation.

    On CPU `device_put` aliases the host array, shared by all devices, and the step would copy it.
    """
    placed = jax.device_put(array, device)
    return placed.copy() if device.platform == "cpu" else placed


def _newest_of_all(candidates: list[int]) -> int | None:
    """Return the newest step that every process has, asking once for each of process 0's candidates."""
    for step in reversed(range(from_first(len(candidates)))):
        asked = from_first(candidates[step] if step < len(candidates) else -1)
        if everywhere(asked in candidates):
            return asked
    return None
