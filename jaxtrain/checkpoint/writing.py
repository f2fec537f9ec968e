"""Save checkpoints in the background and restore the newest: what counts, what is kept, what a failure means.

Orbax's v1 `save_async` writes one folder. The rest is decided here, because Orbax's managers decide it badly (one damaged old
step blocks every start; one failed save swallows the next; a step still being written, or an empty folder named 7, is the
latest step; array data has no checksum).

The state is stored under its key paths as nested dicts of arrays, so that neither optax's class names nor tuples matter on
disk, and in the caller's canonical form, so that it can be restored on any mesh and pipeline layout.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from jaxtrain.checkpoint.abandoned_io import abandoned_io_unsaid
from jaxtrain.checkpoint.checksums import begin_checksums, total
from jaxtrain.checkpoint.mirror import Mirror
from jaxtrain.checkpoint.same_run import as_json_gives_it_back
from jaxtrain.checkpoint.stored import (
    COMMIT_MARK,
    FORMAT,
    LEFTOVER_NAME,
    METADATA_FILE,
    PARTIAL,
    STEP_NAME,
    absolute,
    cause,
    commit,
    committed_steps,
    delete,
    everywhere,
    from_first_process,
    is_committed,
    outdated,
    read_metadata,
    restore,
    set_aside,
)
from jaxtrain.checkpoint.trees import describe, leaves_by_path, nested
from jaxtrain.config import CheckpointConfig
from jaxtrain.errors import CheckpointError, DamagedCheckpoint, LostSave
from jaxtrain.processes import LONG_SECONDS, are_several, from_first, look, post, read_folder, tell

_PATIENCE = 20.0  # seconds between the first and the last process that sees the same failure
FULL = (errno.ENOSPC, errno.EDQUOT)
_SLACK = 1 << 20  # bytes: more than a checkpoint needs beside its arrays

log = logging.getLogger(__name__)


class _NoRepeatedTraceback(logging.Filter):
    """Drop the traceback that Orbax logs for a failed write: the same failure is raised as a `CheckpointError`."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "_SignalingThread.run() raised" not in str(record.msg)


logging.getLogger("absl").addFilter(_NoRepeatedTraceback())


class Checkpoints:
    """The checkpoints of one run: saved in the background, kept as the config says, no loss without an error.

    All processes make the same calls in the same order; the folder must be shared between hosts and have one writer.
    Use it as a context manager, or call `close` at the end, which raises if the last save failed.
    """

    def __init__(self, directory: os.PathLike | str, config: CheckpointConfig):
        """Make the folder, try to write into it, and remove what interrupted saves and deletions left there.

        Raises:
          CheckpointError: some process cannot write into `directory`.
        """
        self.directory = absolute(directory)
        self._config = config
        self._first_process = jax.process_index() == 0
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None  # of the last save that failed, until a later one is committed
        self._failure_raised = False
        self._saves = 0
        # Directories made by a thread would save a millisecond, and when that fails Orbax's waiting threads keep the
        # interpreter from exiting for 305 s.
        self._context = ocp.Context()
        self._context.async_options.create_directories_asynchronously = False
        self._context.array_options.saving.use_replica_parallel = are_several()  # one process would slice copies in vain
        problem = self._probe()
        if not everywhere(problem is None):
            raise CheckpointError(
                f"cannot write checkpoints into {self.directory}: {problem or 'another process cannot (its log says why)'}; "
                "give another --run_dir, or --checkpoint.every=0 to save nothing"
            )
        self._mirror: Mirror | None = None  # only in process 0
        if config.mirror:
            self._open_mirror()
        newest = self.latest_step()
        self._newest = -1 if newest is None else newest
        self._current: int | None = None  # the step of the state in memory, if it is saved or being saved

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
        """Open the mirror in process 0; if the folder holds no checkpoint, download the newest.

        Raises:
          CheckpointError: in all processes, if that fails.
        """
        said = ""
        if self._first_process:
            try:
                self._mirror, url = Mirror(self.directory, self._config), self._config.mirror
                steps = committed_steps(self.directory)
                step = self._mirror.open(fetch=self._config.resume != "never" and not steps and not self._broken())
                if step is not None:
                    log.warning("%s held no checkpoint; step %d was fetched from %s", self.directory, step, url)
                elif steps:
                    self._mirror.copy(steps[-1])
            except CheckpointError as error:
                said = str(error)
        said = from_first(said, LONG_SECONDS)  # process 0 may be downloading a checkpoint
        if said:
            raise CheckpointError(said)

    def latest_step(self) -> int | None:
        """Return the newest committed step, the same on all processes, or None."""
        steps = committed_steps(self.directory)
        newest = from_first_process(steps[-1] if steps else -1)
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
        broken = from_first_process(len(self._broken()) if self._first_process else 0)
        if step is None and broken:
            raise CheckpointError(
                f"{self.directory} holds no whole checkpoint, but {broken} damaged, unfinished or in an older format: "
                f"{', '.join(self._broken())}. Move them away to start afresh, or give another --run_dir"
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

    def _broken(self) -> list[str]:
        """Return the names of step folders that are damaged or incomplete."""
        names = [path.name for path in _children(self.directory) if path.is_dir()]
        whole = {str(step) for step in committed_steps(self.directory)}
        return sorted(n for n in names if ".damaged-" in n or (STEP_NAME.fullmatch(n) and n not in whole))

    def read_metadata(self, step: int) -> dict[str, Any]:
        """Return a step's metadata (see `stored.read_metadata`)."""
        return read_metadata(self.directory, step)

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Return a step's state (see `stored.restore`). A later save of the same step is then skipped."""
        state = restore(self.directory, step, abstract_state)
        self._current = step
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
        if step == self._current:
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
        self._saves += 1
        problem = self._obstacle(step, sum(leaf.nbytes for leaf in leaves.values()))
        if problem is not None:
            self._fail(step, problem)
        if not everywhere(problem is None):
            if problem is None:
                self._fail(step, OSError(look(self._notice)))
        else:
            self._begin(step, leaves, stored)
        if wait:
            self.wait()

    def _obstacle(self, step: int, size: int) -> OSError | None:
        """Return why a save of `size` bytes cannot succeed, as process 0 sees it; also free the name of the step's folder.

        Checked before any process begins: a process that stops inside Orbax's save leaves the others waiting in it.
        """
        try:
            if not self._first_process:
                return None
            if self._newest >= 0 and not self.directory.is_dir():  # Orbax would just make it again
                return FileNotFoundError(f"the folder has vanished, and step {self._newest} with it")
            if os.path.lexists(self.directory / str(step)):  # it counts for none, since `_newest` is a lower step
                aside = set_aside(
                    self.directory, step, "damaged", f"it was in the way of a new step {step}, and is no checkpoint"
                )
                log.warning(
                    "a folder %d without %s was in the way of the new step; set aside as %s", step, COMMIT_MARK, aside.name
                )
            if self._partial(step).exists():
                delete(self._partial(step))
            free = shutil.disk_usage(self.directory).free
            if free < size + _SLACK:
                return OSError(
                    errno.ENOSPC, f"No space left: the arrays take {size / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
                )
        except OSError as error:
            return error
        return None

    def _partial(self, step: int) -> epath.Path:
        """Return the folder into which Orbax writes a step."""
        return self.directory / f"{step}{PARTIAL}"

    def _begin(self, step: int, leaves: dict[tuple[str, ...], jax.Array], stored: dict[str, Any]) -> None:
        """Copy the arrays and start writing them in the background.

        Raises:
          LostSave: this one of several processes could not begin, and others may wait for it.
        """
        try:
            with self._context, abandoned_io_unsaid():
                response = ocp.save_async(self._partial(step), nested(leaves), custom_metadata=stored)
            # After Orbax, whose copies of the arrays would wait for the programs dispatched before them.
            sums = begin_checksums({"/".join(name): leaf for name, leaf in leaves.items()})
        except Exception as error:
            self._fail(step, error)
            if are_several():
                raise LostSave(f"{self._failure}; restarting from there") from error
            return
        self._current = step
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
        if self._failure is not None and not self._failure_raised:
            self._failure_raised = True
            raise self._failure

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

    def close(self) -> None:
        """Wait for the running save and its upload.

        Raises:
          CheckpointError: either failed, whether raised before or not.
        """
        self.wait()
        if self._failure is not None:
            raise self._failure
        if self._mirror is not None:
            self._mirror.wait()

    def leave_the_mirror(self) -> None:
        """Detach the mirror: `close` will not wait for uploads, since a stopped run has little time. The next start resumes."""
        self._mirror = None

    def _finish(self, stored: dict[str, Any], response: ocp.AsyncResponse, sums: Callable[[], dict[str, str]]) -> None:
        """Wait for Orbax in a background thread, commit, and remove the checkpoints that need not be kept."""
        step = stored["step"]
        try:
            with abandoned_io_unsaid():
                response.result()
            self._commit(stored, sums())
        except Exception as error:
            self._fail(step, error)
            return
        self._newest, self._failure = step, None
        if self._first_process:
            self._remove_old()
        if self._mirror is not None:
            self._mirror.copy(step)

    def _commit(self, stored: dict[str, Any], own: dict[str, str]) -> None:
        """Wait until all processes have the sums of their parts, then commit in process 0 while the others wait.

        Raises:
          OSError: another process could not do its part, or the folder cannot be written.
        """
        save, parts = str(self._saves), [json.dumps(own)]
        if are_several():
            tell(f"save-sums/{jax.process_index()}", f"{save} {parts[0]}")
            parts = self._hear("save-sums", jax.process_count(), save) if self._first_process else []
        if self._first_process:
            if not self._partial(stored["step"]).is_dir():
                raise FileNotFoundError(f"the folder {self.directory} has vanished")
            commit(self._partial(stored["step"]), stored, total([json.loads(part) for part in parts]))
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

    def _fail(self, step: int, error: Exception) -> None:
        why = cause(error)
        full = any(words in why for words in ("RESOURCE_EXHAUSTED", "No space left", "quota", "File too large"))
        hint = "; the disk is full: free some space, or keep fewer with --checkpoint.keep" if full else ""
        if self._first_process:
            for path in _children(self.directory):
                if path.name.startswith(f"{step}{PARTIAL}"):
                    delete(path)  # now, because on a full disk the next save needs the space
        steps = ", ".join(map(str, committed_steps(self.directory))) or "none"
        self._failure = CheckpointError(
            f"the checkpoint of step {step} could not be saved into {self.directory}: {why}{hint}. Steps kept intact: {steps}"
        )
        self._failure_raised = False
        self._current = None
        with contextlib.suppress(Exception):  # without the key-value store process 0 is gone, and all processes end
            post(self._notice, f"in process {jax.process_index()}, {why}")

    def _probe(self) -> str | None:
        """Return why this process cannot use the folder, or None. Process 0 also removes leftovers."""
        if glob.has_magic(os.fspath(self.directory)):
            return "the folder's name holds *, ? or [, which Orbax takes for wildcards; it would save nothing readable"
        probe = self.directory / f".write_probe_{jax.process_index()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                probe.write_bytes(b"x")
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            if error.errno not in FULL or not committed_steps(self.directory) or self._config.on_failure == "stop":
                log.error("cannot write %s: %s", probe, error)
                return f"{type(error).__name__}: {error}"
            log.warning("%s: %s; the run goes on from its checkpoint, and saves once there is space", self.directory, error)
        if self._first_process:
            for path in _children(self.directory):
                if LEFTOVER_NAME.fullmatch(path.name):
                    log.info("removing the rest of an interrupted save or deletion: %s", path)
                    delete(path)
                elif STEP_NAME.fullmatch(path.name) and not is_committed(path):
                    log.warning("%s is not a checkpoint (no %s or %s in it); ignored", path, COMMIT_MARK, METADATA_FILE)
        return None

    def _remove_old(self) -> None:
        """Keep the newest `keep` steps and every multiple of `keep_every`; delete the others."""
        for step in outdated(committed_steps(self.directory), self._config.keep, self._config.keep_every):
            delete(self.directory / str(step))


def _children(directory: epath.Path) -> Iterator[epath.Path]:
    return iter(list(directory.iterdir()) if directory.is_dir() else [])
