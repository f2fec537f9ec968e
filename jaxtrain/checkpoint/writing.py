"""Save checkpoints in the background and restore the newest: what counts, what is kept, what a failure means.

Orbax's v1 `save_async` writes one folder. The rest is decided here, because Orbax's managers decide it badly (one damaged old
step blocks every start; one failed save swallows the next; a step still being written, or an empty folder named 7, is the
latest step; array data has no checksum).

The state is stored under its key paths as nested dicts of arrays, so that neither optax's class names nor tuples matter on
disk, and in the caller's canonical form, so that it can be restored on any mesh and pipeline layout.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxtrain.checkpoint.branches import finish
from jaxtrain.checkpoint.folder import broken, obstacle, probe, remove_leftovers
from jaxtrain.checkpoint.mirror import Mirror
from jaxtrain.checkpoint.retention import METRIC, best_steps, outdated
from jaxtrain.checkpoint.same_run import as_json_gives_it_back
from jaxtrain.checkpoint.saving import BackgroundSaves
from jaxtrain.checkpoint.stored import (
    FORMAT,
    absolute,
    committed_steps,
    delete,
    everywhere,
    read_metadata,
    restore,
    set_aside,
)
from jaxtrain.checkpoint.trees import describe, leaves_by_path
from jaxtrain.config import CheckpointConfig
from jaxtrain.errors import CheckpointError, DamagedCheckpoint
from jaxtrain.processes import LONG_SECONDS, from_first, in_first

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run: saved in the background, kept as the config says, no loss without an error.

    All processes make the same calls in the same order; the folder must be shared between hosts and have one writer.
    Use it as a context manager, or call `close` at the end, which raises if the last save failed.
    """

    def __init__(self, directory: os.PathLike | str, config: CheckpointConfig, metric: str = METRIC):
        """Make the folder, try to write into it, and remove what interrupted saves and deletions left there.

        Args:
          metric: the name in "validation" of a checkpoint's metadata by which keep_best keeps.

        Raises:
          CheckpointError: some process cannot write into `directory`.
        """
        self.directory = absolute(directory)
        self._config, self._metric = config, metric
        self._first_process = jax.process_index() == 0
        problem = probe(self.directory, full_is_fatal=config.on_failure == "stop")
        if problem is None and self._first_process:
            try:
                finish(Path(self.directory).parent)
            except OSError as error:
                problem = str(error)
            remove_leftovers(self.directory)
        if not everywhere(problem is None):
            raise CheckpointError(
                f"cannot write checkpoints into {self.directory}: {problem or 'another process cannot (its log says why)'}; "
                "give another --run_dir, or --checkpoint.every=0 to save nothing"
            )
        self._saves = BackgroundSaves(self.directory, self._committed)
        self._mirror: Mirror | None = None  # only in process 0
        if config.mirror:
            in_first(self._open_mirror, CheckpointError, LONG_SECONDS)  # it may download a checkpoint
        newest = self.latest_step()
        self._newest = -1 if newest is None else newest

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.leave_the_mirror()
        try:
            self.close()
        except CheckpointError as lost:
            if error is None:
                raise
            log.error("%s", lost)  # do not hide the error that ended the run

    def _open_mirror(self) -> None:
        """Open the mirror, in process 0; if the folder holds no checkpoint, download the newest."""
        self._mirror, steps = Mirror(self.directory, self._config, self._metric), committed_steps(self.directory)
        may_fetch = self._config.resume in ("auto", "required")
        step = self._mirror.open(fetch=may_fetch and not steps and not broken(self.directory))
        if step is not None:
            log.warning("%s held no checkpoint; step %d was fetched from %s", self.directory, step, self._config.mirror)
        elif steps and not self._config.resume.isdecimal():  # else only once the run is known to go on from there
            self._mirror.copy(steps[-1])

    def latest_step(self) -> int | None:
        """Return the newest committed step, the same on all processes, or None."""
        steps = committed_steps(self.directory)
        newest = from_first(steps[-1] if steps else -1)
        return None if newest < 0 else newest

    def step_to_resume(self) -> int | None:
        """Return the step to resume from under `checkpoint.resume`, or None to start fresh.

        Raises:
          CheckpointError: resume=never and there are checkpoints; resume=required and there are none; or there are only damaged
            ones, which must not pass for a fresh start.
        """
        step = self.latest_step()
        if self._config.resume == "never" and step is not None:
            raise CheckpointError(
                f"--checkpoint.resume=never, but {self.directory} holds a checkpoint of step {step}; "
                "give another --run_dir, or --checkpoint.resume=auto to go on from it"
            )
        if self._config.resume == "required" and step is None:
            raise CheckpointError(
                f"--checkpoint.resume=required, but {self.directory} holds no checkpoint; "
                "give the --run_dir of the run to go on with, or --checkpoint.resume=auto"
            )
        damaged = from_first(len(broken(self.directory)) if self._first_process else 0)
        if step is None and damaged:
            raise CheckpointError(
                f"{self.directory} holds no whole checkpoint, but {damaged} damaged, unfinished or in an older format: "
                f"{', '.join(broken(self.directory))}. Move them away to start afresh, or give another --run_dir"
            )
        return step

    def restore_newest(self, abstract_state: Any, accept: Callable[[int, dict[str, Any]], None]) -> tuple[int, Any] | None:
        """Return (step, state) of the newest intact checkpoint; None to start fresh (see `step_to_resume`).

        A damaged checkpoint is set aside, never deleted, and the one before it is tried.

        Args:
          accept: called with a step and its metadata before its state is read; may raise.
        Raises:
          CheckpointError: as `step_to_resume` and `restore`; or all checkpoints are damaged, each with its reason.
        """
        return self._restore_from(self.step_to_resume(), abstract_state, accept)

    def restore_chosen(
        self, folder: os.PathLike | str, step: int, abstract_state: Any, accept: Callable[[int, dict[str, Any]], None]
    ) -> tuple[int, Any]:
        """Return (step, state) of exactly this checkpoint, which may be another run's.

        Raises:
          CheckpointError: as `restore`; the folder is left as it is.
        """
        accept(step, read_metadata(folder, step))
        return step, restore(folder, step, abstract_state)

    def went_back_to(self, step: int) -> None:
        """Take note that the steps after this one, whose state was restored, were moved away; have the mirror follow."""
        self._newest = self._saves.current = step
        if self._mirror is not None:
            self._mirror.copy(step)

    def return_to_newest(self, abstract_state: Any, accept: Callable[[int, dict[str, Any]], None]) -> tuple[int, Any] | None:
        """Do `restore_newest` during a run, whatever checkpoint.resume says; return None before the first save.

        Raises:
          CheckpointError: an earlier save failed in the background; else as `restore_newest`.
        """
        self.wait()
        return self._restore_from(self.latest_step(), abstract_state, accept)

    def _restore_from(
        self, step: int | None, abstract_state: Any, accept: Callable[[int, dict[str, Any]], None]
    ) -> tuple[int, Any] | None:
        """Return (step, state) of that step, or of the newest intact one before it."""
        problems: list[str] = []
        while step is not None:
            try:
                accept(step, self.read_metadata(step))
                return step, self.restore(step, abstract_state)
            except DamagedCheckpoint as error:
                problems.append(str(error))
                self._set_aside(step, "damaged", str(error))
                step = self.latest_step()
        if problems:
            lines = "\n".join(f"  - {problem}" for problem in problems)
            raise CheckpointError(
                f"all checkpoints in {self.directory} are damaged:\n{lines}\nThey are set aside there. Bring back a copy, or "
                "move them away to start afresh"
            )
        return None

    def set_aside_after(self, step: int, why: str) -> None:
        """Set aside the checkpoints after `step`, to which the run has returned; their numbers are free again."""
        self.wait()
        for later in [s for s in committed_steps(self.directory) if s > step]:
            self._set_aside(later, "rolled-back", why)
        self._newest = min(self._newest, step)

    def _set_aside(self, step: int, word: str, why: str) -> None:
        if self._first_process:
            aside = set_aside(self.directory, step, word, why)
            log.warning("%s; set aside as %s", why, aside.name)
        everywhere(True)  # barrier: the rename is visible before any process lists the folder
        newest = self.latest_step()
        self._newest = -1 if newest is None else newest

    def read_metadata(self, step: int) -> dict[str, Any]:
        """Return a step's metadata (see `stored.read_metadata`)."""
        return read_metadata(self.directory, step)

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Return a step's state (see `stored.restore`). A later save of the same step is then skipped."""
        state = restore(self.directory, step, abstract_state)
        self._saves.current = step
        return state

    def save(self, step: int, state: Any, metadata: Mapping[str, Any], wait: bool = False) -> None:
        """Save `state` as `step`; return once it is copied to host memory, so that its buffers may be donated.

        Checksums are computed after the copy, beside training (`tests/measure/save_blocking.py` says how long a save blocks).
        A step that this run has already saved or restored is not written again. With `wait`, or
        `checkpoint.asynchronous=False`, return when the step is committed.

        Args:
          state: pytree of jax.Array in canonical form, over all processes.
          metadata: JSON values, the same on all processes: the resolved config, the data fingerprint, versions.
        Raises:
          CheckpointError: an *earlier* save failed (this one has not begun; call again to try it); with `wait`, this one
            failed; or there are checkpoints of this or a later step.
          LostSave: as `wait`, or one of several processes could not begin this save.
        """
        self.wait()
        wait = wait or not self._config.asynchronous
        if step == self._saves.current:
            return
        if step < 0 or step <= self._newest:
            raise CheckpointError(
                f"step {step} cannot be saved into {self.directory}, which already holds step {self._newest}; "
                "move the later steps away, or give another --run_dir"
            )
        leaves, _ = leaves_by_path(state)
        for name, leaf in leaves.items():
            if not isinstance(leaf, jax.Array):
                raise TypeError(f"state leaf {'/'.join(name)} is a {type(leaf).__name__}, not a jax.Array")
        stored = {
            "format": FORMAT,
            "step": step,
            "leaves": {"/".join(name): describe(leaf) for name, leaf in leaves.items()},
            "metadata": as_json_gives_it_back(metadata),
        }
        size = sum(leaf.nbytes for leaf in leaves.values())
        self._saves.begin(leaves, stored, obstacle(self.directory, step, size, self._newest) if self._first_process else None)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until no save is running.

        Raises:
          CheckpointError: a save has failed since the last call; raised once.
          LostSave: another process could not write its part, for which this one's save would wait without end.
        """
        self._saves.wait()

    def close(self) -> None:
        """Wait for the running save and its upload.

        Raises:
          CheckpointError: either failed, whether raised before or not.
        """
        self.wait()
        if self._saves.failure is not None:
            raise self._saves.failure
        if self._mirror is not None:
            self._mirror.wait()

    def leave_the_mirror(self) -> None:
        """Detach the mirror: `close` will not wait for uploads, since a stopped run has little time. The next start resumes."""
        self._mirror = None

    def _committed(self, step: int) -> None:
        """Take note of a new checkpoint; delete what the config does not keep; have the mirror copy it."""
        self._newest, config = step, self._config
        if self._first_process:
            best = best_steps(self.directory, config.keep_best, self._metric)
            for old in outdated(committed_steps(self.directory), config.keep, config.keep_every, best):
                delete(self.directory / str(old))
        if self._mirror is not None:
            self._mirror.copy(step)
