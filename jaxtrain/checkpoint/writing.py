"""Saving in the background and going on from what was saved: what counts, what is kept, and what a failure means.

Orbax's v1 `save_async` writes one folder. The rest is decided here, because Orbax's managers decide it badly (one damaged old
step blocks every start; one failed save swallows the next; a step still being written, or an empty folder named 7, is the
latest step; array data has no checksum).

The state is stored under its key paths as nested dicts of arrays, so that neither optax's class names nor tuples matter
on disk, and in the canonical form that the caller hands over, so that it comes back on any mesh and pipeline layout.
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

_PATIENCE = 20.0  # seconds that processes may differ in how soon they see the same failure
FULL = (errno.ENOSPC, errno.EDQUOT)
_SLACK = 1 << 20  # bytes of a checkpoint beside its arrays, and then some

log = logging.getLogger(__name__)


class _NoRepeatedTraceback(logging.Filter):
    """Drops the traceback that Orbax logs for a failed write: the same failure is raised as a `CheckpointError`."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "_SignalingThread.run() raised" not in str(record.msg)


logging.getLogger("absl").addFilter(_NoRepeatedTraceback())


class Checkpoints:
    """The checkpoints of one run: saves in the background, keeps what the config says, loses nothing silently.

    All processes make the same calls in the same order; the folder must be shared between hosts. One writer a folder.
    Use it as a context manager, or call `close` at the end: only there can the last save's failure show.
    """

    def __init__(self, directory: os.PathLike | str, config: CheckpointConfig):
        """Makes the folder, tries to write into it, and removes what interrupted saves and deletions left there.

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
        self._context.array_options.saving.use_replica_parallel = are_several()  # else copies are sliced for nothing
        problem = self._probe()
        if not everywhere(problem is None):
            raise CheckpointError(
                f"cannot write checkpoints into {self.directory}: {problem or 'another process cannot (its log says why)'}; "
                "give another --run_dir, or --checkpoint.every=0 to save nothing"
            )
        self._mirror: Mirror | None = None  # in the first process
        if config.mirror:
            self._open_mirror()
        newest = self.latest_step()
        self._newest = -1 if newest is None else newest
        self._current: int | None = None  # the step of the state this run now holds, if it is on disk or on its way

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
            log.error("%s", lost)  # must not hide the error that ended the run

    def _open_mirror(self) -> None:
        """The first process opens it; where the folder holds no checkpoint, it fetches the newest from there.

        Raises:
          CheckpointError: that is impossible, in all processes.
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
        said = from_first(said, LONG_SECONDS)  # a checkpoint may be on its way
        if said:
            raise CheckpointError(said)

    def latest_step(self) -> int | None:
        """The newest committed step, the same on all processes; None where there is none."""
        steps = committed_steps(self.directory)
        newest = from_first_process(steps[-1] if steps else -1)
        return None if newest < 0 else newest

    def step_to_resume(self) -> int | None:
        """The step to go on from as `checkpoint.resume` says, or None to start fresh.

        Raises:
          CheckpointError: resume=never and there are checkpoints, or resume=required and there are none; or there is nothing
            but damaged ones, which nobody should take for a fresh start.
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
        """(step, state) of the newest checkpoint that holds what was saved; None to start fresh (see `step_to_resume`).

        A damaged one is set aside, never deleted, and the one before it is tried.

        Args:
          accept: is called with a step and its metadata before its state is read, and may raise.
        Raises:
          CheckpointError: as `step_to_resume` and `restore`; or all checkpoints are damaged, each with what is wrong.
        """
        return self._restore_from(self.step_to_resume(), abstract_state, accept)

    def return_to_newest(self, abstract_state: Any, accept: Callable[[int, dict[str, Any]], None]) -> tuple[int, Any] | None:
        """`restore_newest` in the midst of a run, whatever checkpoint.resume says of its start; None before the first save.

        Raises:
          CheckpointError: an earlier save failed in the background; else as `restore_newest`.
        """
        self.wait()
        return self._restore_from(self.latest_step(), abstract_state, accept)

    def _restore_from(
        self, step: int | None, abstract_state: Any, accept: Callable[[int, dict[str, Any]], None]
    ) -> tuple[int, Any] | None:
        """(step, state) of that step, or of the newest before it that is not damaged."""
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
        """After a return to `step`: later checkpoints count no more, and their numbers are free again."""
        self.wait()
        for later in [s for s in committed_steps(self.directory) if s > step]:
            self._set_aside(later, "rolled-back", why)
        self._newest = min(self._newest, step)

    def _set_aside(self, step: int, word: str, why: str) -> None:
        if self._first_process:
            aside = set_aside(self.directory, step, word, why)
            log.warning("%s; set aside as %s", why, aside.name)
        everywhere(True)  # nobody looks before it is done
        newest = self.latest_step()
        self._newest = -1 if newest is None else newest

    def _broken(self) -> list[str]:
        """Folders that are, or may have been, checkpoints, and are not whole."""
        names = [path.name for path in _children(self.directory) if path.is_dir()]
        whole = {str(step) for step in committed_steps(self.directory)}
        return sorted(n for n in names if ".damaged-" in n or (STEP_NAME.fullmatch(n) and n not in whole))

    def read_metadata(self, step: int) -> dict[str, Any]:
        """See `read_metadata`."""
        return read_metadata(self.directory, step)

    def restore(self, step: int, abstract_state: Any) -> Any:
        """See `restore`. The run then holds `step`, and saving that step again is no work."""
        state = restore(self.directory, step, abstract_state)
        self._current = step
        return state

    def save(self, step: int, state: Any, metadata: Mapping[str, Any], wait: bool = False) -> None:
        """Saves `state` as `step`; returns once it is copied to host memory, so its buffers may be donated.

        Checksums are computed behind that, beside training; `tests/save_blocking.py` measures how long a save keeps it waiting.

        A step that this run has saved or restored already is not written again. With `wait`, or
        `checkpoint.asynchronous=False`, returns when the step is committed.

        Args:
          state: pytree of jax.Array in canonical form, over all processes.
          metadata: what JSON can hold, the same on all processes: the resolved config, the data fingerprint, versions.
        Raises:
          CheckpointError: an *earlier* save failed (then this one has not begun, and the same call made again tries it); with
            `wait`, this one did; or there are checkpoints of this or a later step.
          LostSave: as `wait`, or this one of several processes could not begin.
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
        """Why a save of so many bytes cannot succeed, seen by the first process; also makes room for the step's folder.

        Looked at by all before any begins: what stops one process in the midst of Orbax's save leaves the others waiting in it.
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
        """Where Orbax writes a step."""
        return self.directory / f"{step}{PARTIAL}"

    def _begin(self, step: int, leaves: dict[tuple[str, ...], jax.Array], stored: dict[str, Any]) -> None:
        """Copies the arrays, and writes them in the background.

        Raises:
          LostSave: of several processes this one could not begin, and others may wait for it.
        """
        try:
            with self._context:
                response = ocp.save_async(self._partial(step), nested(leaves), custom_metadata=stored)
            # After Orbax: its copies of the arrays would wait for what was asked of the devices before them.
            sums = begin_checksums({"/".join(name): leaf for name, leaf in leaves.items()})
        except Exception as error:
            self._fail(step, error)
            if are_several():
                raise LostSave(f"{self._failure}; starting again from there") from error
            return
        self._current = step
        self._thread = threading.Thread(target=self._finish, args=(stored, response, sums), name=f"save-{step}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when no save is under way.

        Raises:
          CheckpointError: one has failed since the last call; once.
          LostSave: another process could not write its part, and this one's save waits for that without end.
        """
        thread, self._thread = self._thread, None  # one that is given up is not waited for again
        if thread is not None:
            self._join(thread)
        if self._failure is not None and not self._failure_raised:
            self._failure_raised = True
            raise self._failure

    def _join(self, thread: threading.Thread) -> None:
        """Waits for a save, but not long for a process that has said that it could not do its part."""
        until = math.inf
        while thread.is_alive():
            thread.join(0.5 if are_several() else None)
            said = look(self._notice)
            if said is not None:
                until = min(until, time.monotonic() + _PATIENCE)
            if thread.is_alive() and time.monotonic() > until:
                raise LostSave(f"a save that needs all processes is given up: {said}; starting again from the one before")

    @property
    def _notice(self) -> str:
        """Where a process says that it could not do its part of the newest save. All processes count their saves alike."""
        return f"save-failed/{self._saves}"

    def close(self) -> None:
        """Waits for the save under way and its copy. Raises CheckpointError if either was lost, raised before or not."""
        self.wait()
        if self._failure is not None:
            raise self._failure
        if self._mirror is not None:
            self._mirror.wait()

    def leave_the_mirror(self) -> None:
        """`close` does not wait for it any more: whoever stops a run gives it little time. The next start copies what lacks."""
        self._mirror = None

    def _finish(self, stored: dict[str, Any], response: ocp.AsyncResponse, sums: Callable[[], dict[str, str]]) -> None:
        """In the background: waits for Orbax, commits, and removes the checkpoints that need not be kept."""
        step = stored["step"]
        try:
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
        """Once all processes have the sums of their parts: the first one commits, and the others wait for it.

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
        """Return what `count` processes say under a folder of the store about this save, once all have; keys serve every save.

        Raises:
          OSError: one could not do its part. One that dies or hangs is seen by others than this thread.
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
                    delete(path)  # at once, because on a full disk the next save needs the space
        steps = ", ".join(map(str, committed_steps(self.directory))) or "none"
        self._failure = CheckpointError(
            f"the checkpoint of step {step} could not be saved into {self.directory}: {why}{hint}. Steps kept intact: {steps}"
        )
        self._failure_raised = False
        self._current = None
        with contextlib.suppress(Exception):  # the store is gone: so is the first process, and all end
            post(self._notice, f"in process {jax.process_index()}, {why}")

    def _probe(self) -> str | None:
        """Why this process cannot use the folder, or None. The first process also cleans it."""
        if glob.has_magic(os.fspath(self.directory)):
            return "Orbax takes *, ? and [ in the name of a folder for wildcards, and would save nothing that can be read"
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
                    log.info("removing what an interrupted save or deletion left: %s", path)
                    delete(path)
                elif STEP_NAME.fullmatch(path.name) and not is_committed(path):
                    log.warning("%s is not a checkpoint (no %s or %s in it); passed over", path, COMMIT_MARK, METADATA_FILE)
        return None

    def _remove_old(self) -> None:
        """Keeps the newest `keep` steps and every multiple of `keep_every`; deletes the other ones."""
        for step in outdated(committed_steps(self.directory), self._config.keep, self._config.keep_every):
            delete(self.directory / str(step))


def _children(directory: epath.Path) -> Iterator[epath.Path]:
    return iter(list(directory.iterdir()) if directory.is_dir() else [])
