"""One save at a time, in the background: begun, committed and failed by all processes together."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from jaxtrain.checkpoint.abandoned_io import abandoned_io_unsaid
from jaxtrain.checkpoint.blocks import in_blocks
from jaxtrain.checkpoint.checksums import begin_checksums, total
from jaxtrain.checkpoint.folder import children, partial
from jaxtrain.checkpoint.stored import PARTIAL, commit, committed_steps, delete, everywhere, flush
from jaxtrain.checkpoint.trees import nested
from jaxtrain.errors import CheckpointError, LostSave, cause
from jaxtrain.processes import are_several, look, post, read_folder, tell

_PATIENCE = 20.0  # seconds between the first and the last process that sees the same failure


# Orbax logs a failed write with its traceback, and the same failure is raised as a `CheckpointError`.
logging.getLogger("absl").addFilter(lambda record: "_SignalingThread.run() raised" not in str(record.msg))


class BackgroundSaves:
    """The saves of one process, one after the other. All processes make the same calls in the same order.

    Args:
      directory: the folder of the checkpoints.
      committed: called in the background with each step that all processes have saved.
    """

    def __init__(self, directory: epath.Path, committed: Callable[[int], None]):
        self._directory, self._committed = directory, committed
        self._first_process = jax.process_index() == 0
        self._thread: threading.Thread | None = None
        self._saves = 0
        self._raised = False
        self.failure: CheckpointError | None = None
        """The error of the last save that failed, until a later one is committed."""
        self.current: int | None = None
        """The step of the state in memory, if it is saved or being saved."""
        # Directories made by a thread would save a millisecond, and when that fails Orbax's waiting threads keep the
        # interpreter from exiting for 305 s.
        self._context = ocp.Context()
        self._context.async_options.create_directories_asynchronously = False
        self._context.array_options.saving.scoped_storage_options_creator = in_blocks
        self._context.array_options.saving.use_replica_parallel = are_several()  # one process would slice copies in vain
        # zstd takes 7% off float32 weights and moments, for eight times the CPU time of a save.
        self._context.array_options.saving.use_compression = False

    def begin(self, leaves: dict[tuple[str, ...], jax.Array], stored: dict[str, Any], obstacle: OSError | None) -> None:
        """Begin a save in all processes, or in none if one of them has an obstacle.

        Raises:
          LostSave: this one of several processes could not begin, and others may wait for it.
        """
        step = stored["step"]
        self._saves += 1
        if obstacle is not None:
            self._fail(step, obstacle)
        if everywhere(obstacle is None):
            self._begin(step, leaves, stored)
        elif obstacle is None:
            self._fail(step, OSError(look(self._notice)))

    def _begin(self, step: int, leaves: dict[tuple[str, ...], jax.Array], stored: dict[str, Any]) -> None:
        """Copy the arrays and start writing them in the background.

        Raises:
          LostSave: this one of several processes could not begin, and others may wait for it.
        """
        try:
            with self._context, abandoned_io_unsaid():
                response = ocp.save_async(partial(self._directory, step), nested(leaves), custom_metadata=stored)
            # After Orbax, whose copies of the arrays would wait for the programs dispatched before them.
            sums = begin_checksums({"/".join(name): leaf for name, leaf in leaves.items()})
        except Exception as error:
            self._fail(step, error)
            if are_several():
                raise LostSave(f"{self.failure}; restarting from there") from error
            return
        self.current = step
        self._thread = threading.Thread(target=self._finish, args=(stored, response, sums), name=f"save-{step}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until no save is running.

        Raises:
          CheckpointError: a save has failed since the last call; raised once.
          LostSave: another process could not write its part, for which this one's save would wait without end.
        """
        thread, self._thread = self._thread, None  # do not wait again for a save that was given up
        if thread is not None:
            self._join(thread)
        if self.failure is not None and not self._raised:
            self._raised = True
            raise self.failure

    def _join(self, thread: threading.Thread) -> None:
        """Wait for a save; at most `_PATIENCE` seconds after a process has reported that it could not do its part."""
        until = math.inf
        while thread.is_alive():
            thread.join(0.5 if are_several() else None)
            said = look(self._notice)
            if said is not None:
                until = min(until, time.monotonic() + _PATIENCE)
            if thread.is_alive() and time.monotonic() > until:
                raise LostSave(
                    f"save given up, because it needs all processes: {said}; restarting from the previous checkpoint"
                )

    @property
    def _notice(self) -> str:
        """Key under which a process reports that it failed its part of the newest save. All processes count saves alike."""
        return f"save-failed/{self._saves}"

    def _finish(self, stored: dict[str, Any], response: ocp.AsyncResponse, sums: Callable[[], dict[str, str]]) -> None:
        """Wait for Orbax in a background thread, then commit."""
        step = stored["step"]
        try:
            with abandoned_io_unsaid():
                response.result()
            self._commit(stored, sums())
        except Exception as error:
            self._fail(step, error)
            return
        self.failure = None
        self._committed(step)

    def _commit(self, stored: dict[str, Any], own: dict[str, str]) -> None:
        """Wait until all processes have the sums of their parts, then commit in process 0 while the others wait.

        Raises:
          OSError: another process could not do its part, or the folder cannot be written.
        """
        save, parts = str(self._saves), [json.dumps(own)]
        if are_several():
            flush(partial(self._directory, stored["step"]))
            tell(f"save-sums/{jax.process_index()}", f"{save} {parts[0]}")
            parts = self._hear("save-sums", jax.process_count(), save) if self._first_process else []
        if self._first_process:
            if not partial(self._directory, stored["step"]).is_dir():
                raise FileNotFoundError(f"the folder {self._directory} has vanished")
            commit(partial(self._directory, stored["step"]), stored, total([json.loads(part) for part in parts]))
            tell("save-committed/0", f"{save} ")
        else:
            self._hear("save-committed", 1, save)

    def _hear(self, folder: str, count: int, save: str) -> list[str]:
        """Return the values that `count` processes post under a folder of the key-value store for this save; waits for all.

        Raises:
          OSError: a process could not do its part. (One that dies or hangs is detected elsewhere.)
        """
        pause = 0.01
        while True:
            said = [text.partition(" ") for text in read_folder(folder).values()]
            heard = [words for number, _, words in said if number == save]
            if len(heard) == count:
                return heard
            problem = look(self._notice)
            if problem is not None:
                raise OSError(problem)
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def _remove(self, step: int) -> None:
        """Delete a save that failed now, because on a full disk the next one needs the space."""
        for pause in (0.2, 0.4, 0.8):  # TensorStore's writes under way may make their folder anew
            left = [path for path in children(self._directory) if path.name.startswith(f"{step}{PARTIAL}")]
            if not left:
                return
            for path in left:
                delete(path)
            time.sleep(pause)

    def _fail(self, step: int, error: Exception) -> None:
        why = cause(error)
        full = any(words in why for words in ("RESOURCE_EXHAUSTED", "No space left", "quota", "File too large"))
        hint = "; the disk is full: free some space, or keep fewer with --checkpoint.keep" if full else ""
        if self._first_process:
            self._remove(step)
        steps = ", ".join(map(str, committed_steps(self._directory))) or "none"
        self.failure = CheckpointError(
            f"the checkpoint of step {step} could not be saved into {self._directory}: {why}{hint}. Steps kept intact: {steps}"
        )
        self._raised = False
        self.current = None
        with contextlib.suppress(Exception):  # without the key-value store process 0 is gone, and all processes end
            post(self._notice, f"in process {jax.process_index()}, {why}")
