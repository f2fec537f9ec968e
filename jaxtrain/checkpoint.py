"""Checkpoints: the training state and what it belongs to, one folder a step, committed whole or not at all.

    checkpoints/1000/commit_success.txt     written last: a folder without it is not a checkpoint
    checkpoints/1000/_CHECKPOINT_METADATA   JSON; "custom_metadata" holds ours, and every leaf's name, dtype and shape
    checkpoints/1000/state/                 the arrays: TensorStore, OCDBT, zstd

Orbax's v1 `save_async` and `load` write and read one folder. Which folders count, which are kept and what a failure
means is decided here, because Orbax's managers decide it badly (one damaged old step blocks every start; one failed
save swallows the next; a step still being written, or an empty folder named 7, is the latest step).

The state is stored under its key paths as nested dicts of arrays, so that neither optax's class names nor tuples matter
on disk, and in the canonical form that the caller hands over, so that it comes back on any mesh and pipeline layout.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from jaxtrain.config import CheckpointConfig
from jaxtrain.errors import CheckpointError

COMMIT_MARK = "commit_success.txt"  # Orbax writes it last, before the rename (local) or in place (object stores)
METADATA_FILE = "_CHECKPOINT_METADATA"
DELETION_MARK = "being_deleted.txt"
FORMAT = 1  # of what stands under custom_metadata
_PARTIAL = ".orbax-checkpoint-tmp"
_STEP_NAME = re.compile(r"0|[1-9]\d*")
_SHOWN = 12  # differing leaves that one error lists

log = logging.getLogger(__name__)


class _NoRepeatedTraceback(logging.Filter):
    """Drops the traceback that Orbax logs for a failed write: the same failure is raised as a `CheckpointError`."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "_SignalingThread.run() raised" not in str(record.msg)


logging.getLogger("absl").addFilter(_NoRepeatedTraceback())


# ---------------------------------------------------------------------------------------------------------------------
# Reading: these functions need only a folder, write nothing, and are safe beside a run that is saving into it


def committed_steps(directory: os.PathLike | str) -> list[int]:
    """The steps in `directory` that were saved to the end, ascending. Anything else in the folder is passed over."""
    root = _absolute(directory)
    if not root.is_dir():
        return []
    return sorted(int(path.name) for path in root.iterdir() if _STEP_NAME.fullmatch(path.name) and _is_committed(path))


def read_metadata(directory: os.PathLike | str, step: int) -> dict[str, Any]:
    """The JSON metadata that was saved with `step`.

    Raises:
      CheckpointError: there is no such checkpoint, or its metadata is damaged or belongs to another step.
    """
    return _read_stored(_step_path(directory, step))["metadata"]


def restore(directory: os.PathLike | str, step: int, abstract_state: Any) -> Any:
    """The state saved at `step`, as a tree like `abstract_state`, each leaf bit for bit and in the sharding it names.

    Args:
      abstract_state: pytree of jax.ShapeDtypeStruct, every leaf (scalars too) with its `.sharding`. The mesh may be any.
    Raises:
      CheckpointError: no such checkpoint; unreadable data; or its leaves are not exactly those of `abstract_state`
        (missing, extra, of another shape or dtype), each named with what is saved and what was expected.
    """
    path = _step_path(directory, step)
    leaves, treedef = _leaves_by_path(abstract_state)
    for name, leaf in leaves.items():
        if getattr(leaf, "sharding", None) is None:
            raise TypeError(f"abstract_state leaf {'/'.join(name)} has no sharding; every leaf must say where it goes")
    saved = _read_stored(path)["leaves"]
    _check_same_leaves(path, saved, {"/".join(name): _describe(leaf) for name, leaf in leaves.items()})
    try:
        loaded, _ = _leaves_by_path(ocp.load(path, _nested(leaves)))
    except Exception as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {_cause(error)}") from error
    for name, leaf in leaves.items():
        if not isinstance(loaded.get(name), jax.Array) or loaded[name].dtype != leaf.dtype:
            raise CheckpointError(f"checkpoint {path}: {'/'.join(name)} came back as {loaded.get(name)!r}")
    return jax.tree.unflatten(treedef, [loaded[name] for name in leaves])


def _absolute(directory: os.PathLike | str) -> epath.Path:
    text = os.fspath(directory)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def _is_committed(path: epath.Path) -> bool:
    return (path / COMMIT_MARK).exists() and (path / METADATA_FILE).exists()


def _step_path(directory: os.PathLike | str, step: int) -> epath.Path:
    path = _absolute(directory) / str(step)
    if not _is_committed(path):
        steps = committed_steps(directory)
        present = f"it holds steps {', '.join(map(str, steps))}" if steps else "it holds no checkpoint"
        raise CheckpointError(f"there is no checkpoint of step {step} in {_absolute(directory)}; {present}")
    return path


def _read_stored(path: epath.Path) -> dict[str, Any]:
    """What `save` put beside the arrays: format, step, leaves {"params/bias": "float32[16]"}, metadata."""
    try:
        stored = json.loads((path / METADATA_FILE).read_text())["custom_metadata"]
        saved_format, step, _, _ = stored["format"], stored["step"], stored["leaves"], stored["metadata"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / METADATA_FILE} cannot be read ({type(error).__name__}: {error})") from error
    if saved_format != FORMAT:
        raise CheckpointError(f"{path} is in checkpoint format {saved_format}, but this jaxtrain reads format {FORMAT}")
    if str(step) != path.name:
        raise CheckpointError(f"{path} holds step {step}, not {path.name}: the folder was renamed or copied over")
    return stored


def _cause(error: BaseException) -> str:
    """The first line of the deepest cause: Orbax wraps what happened in words about handlers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


# ---------------------------------------------------------------------------------------------------------------------
# Trees as nested dicts


def _leaves_by_path(tree: Any) -> tuple[dict[tuple[str, ...], Any], Any]:
    """The leaves of a tree under their key paths as plain strings, in the tree's order, and its treedef."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves: dict[tuple[str, ...], Any] = {}
    for path, leaf in flat:
        name = tuple(_key_name(entry) for entry in path)
        # Orbax joins keys with "." on disk, so {"a.b": x, "a": {"b": y}} would silently hold one value for both
        if name in leaves or not all(key and "." not in key and "/" not in key for key in name):
            raise ValueError(f"leaf {jax.tree_util.keystr(path)}: keys must be distinct, not empty, without '.' and '/'")
        leaves[name] = leaf
    return leaves, treedef


def _key_name(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):  # DictKey and FlattenedIndexKey, GetAttrKey, SequenceKey
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    raise TypeError(f"unknown key type {type(entry).__name__} in the state tree")


def _nested(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def _check_same_leaves(path: epath.Path, saved: Mapping[str, str], expected: Mapping[str, str]) -> None:
    problems = []
    for name in [*expected, *(extra for extra in saved if extra not in expected)]:
        if name not in saved:
            problems.append(f"{name} is not in the checkpoint; this run has {expected[name]}")
        elif name not in expected:
            problems.append(f"{name} is {saved[name]} in the checkpoint; this run has no such array")
        elif saved[name] != expected[name]:
            problems.append(f"{name} is {saved[name]} in the checkpoint, {expected[name]} in this run")
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        lines = "\n".join(f"  - {line}" for line in problems[:_SHOWN] + more)
        raise CheckpointError(
            f"checkpoint {path} does not fit this run:\n{lines}\n"
            "Use the model and optimizer that it was saved with, or another --run_dir."
        )


def _describe(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


# ---------------------------------------------------------------------------------------------------------------------
# Writing


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
        self.directory = _absolute(directory)
        self._config = config
        self._first_process = jax.process_index() == 0
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None  # of the last save that failed, until a later one is committed
        self._failure_raised = False
        # Directories made by a thread would save a millisecond, and when that fails Orbax's waiting threads keep the
        # interpreter from exiting for 305 s. On object stores, where a rename copies, the mark alone commits.
        self._context = ocp.Context()
        self._context.async_options.create_directories_asynchronously = False
        if "://" in str(self.directory):
            self._context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
        problem = self._probe()
        if not _everywhere(problem is None):
            raise CheckpointError(
                f"cannot write checkpoints into {self.directory}: {problem or 'another process cannot (its log says why)'}; "
                "give another --run_dir, or --checkpoint.every=0 to save nothing"
            )
        newest = self.latest_step()
        self._newest = -1 if newest is None else newest
        self._current: int | None = None  # the step of the state this run now holds, if it is on disk or on its way

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except CheckpointError as lost:
            if error is None:
                raise
            log.error("%s", lost)  # must not hide the error that ended the run

    def latest_step(self) -> int | None:
        """The newest committed step, the same on all processes; None where there is none."""
        steps = committed_steps(self.directory)
        newest = _from_first_process(steps[-1] if steps else -1)
        return None if newest < 0 else newest

    def step_to_resume(self) -> int | None:
        """The step to go on from as `checkpoint.resume` says, or None to start fresh.

        Raises:
          CheckpointError: resume=never and there are checkpoints, or resume=required and there are none.
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
        return step

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

        Measured on 2 CPU cores, 400 MB in ten arrays onto ext4, four rounds: the call returns after 0.03 s, 0.5 to 1.1 %
        of what the same save takes with `wait`. On a GPU the copy to host memory counts too.

        A step that this run has saved or restored already is not written again. With `wait`, or
        `checkpoint.asynchronous=False`, returns when the step is committed.

        Args:
          state: pytree of jax.Array in canonical form, over all processes.
          metadata: what JSON can hold, the same on all processes: the resolved config, the data fingerprint, versions.
        Raises:
          CheckpointError: an *earlier* save failed in the background (then this one has not begun, and the same call
            made again tries it); this one cannot begin; or there are checkpoints of this or a later step.
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
        leaves, _ = _leaves_by_path(state)
        for name, leaf in leaves.items():
            if not isinstance(leaf, jax.Array):
                raise TypeError(f"state leaf {'/'.join(name)} is a {type(leaf).__name__}, not a jax.Array")
        stored = {
            "format": FORMAT,
            "step": step,
            "leaves": {"/".join(name): _describe(leaf) for name, leaf in leaves.items()},
            "metadata": _normal(metadata),
        }
        path = self.directory / str(step)
        try:
            if self._first_process and self._newest >= 0 and not self.directory.is_dir():  # Orbax would just make it again
                raise FileNotFoundError(f"the folder has vanished, and step {self._newest} with it")
            if self._first_process and path.exists():
                _delete(path)  # never committed, see above
            with self._context:
                response = ocp.save_async(path, _nested(leaves), custom_metadata=stored)
        except Exception as error:
            self._fail(step, error)
            self.wait()
            raise  # not reached: wait raises the failure
        self._current = step
        self._thread = threading.Thread(target=self._finish, args=(step, response), name=f"save-{step}", daemon=True)
        self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when no save is under way. Raises CheckpointError, once, if one has failed since the last call."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None and not self._failure_raised:
            self._failure_raised = True
            raise self._failure

    def close(self) -> None:
        """Waits for the save under way. Raises CheckpointError if the last save was lost, raised before or not."""
        self.wait()
        if self._failure is not None:
            raise self._failure

    def _finish(self, step: int, response: ocp.AsyncResponse) -> None:
        """In the background: waits for the commit, then removes the checkpoints that need not be kept."""
        try:
            response.result()
            if self._first_process and not _is_committed(self.directory / str(step)):
                raise OSError(f"the folder {self.directory / str(step)} has vanished")
        except Exception as error:
            self._fail(step, error)
            return
        self._newest, self._failure = step, None
        if self._first_process:
            self._remove_old()

    def _fail(self, step: int, error: Exception) -> None:
        cause = _cause(error)
        full = any(words in cause for words in ("RESOURCE_EXHAUSTED", "No space left", "quota", "File too large"))
        hint = "; the disk is full: free some space, or keep fewer with --checkpoint.keep" if full else ""
        if self._first_process:
            for path in _children(self.directory):
                if path.name.startswith(f"{step}{_PARTIAL}"):
                    _delete(path)  # at once, because on a full disk the next save needs the space
        steps = ", ".join(map(str, committed_steps(self.directory))) or "none"
        self._failure = CheckpointError(
            f"the checkpoint of step {step} could not be saved into {self.directory}: {cause}{hint}. Steps kept intact: {steps}"
        )
        self._failure_raised = False
        self._current = None

    def _probe(self) -> str | None:
        """Why this process cannot use the folder, or None. The first process also cleans it."""
        probe = self.directory / f".write_probe_{jax.process_index()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.write_text("x")
            probe.unlink()
        except OSError as error:
            log.error("cannot write %s: %s", probe, error)
            return f"{type(error).__name__}: {error}"
        if self._first_process:
            for path in _children(self.directory):
                if _PARTIAL in path.name or (path / DELETION_MARK).exists():
                    log.info("removing what an interrupted save or deletion left: %s", path)
                    _delete(path)
                elif _STEP_NAME.fullmatch(path.name) and not _is_committed(path):
                    log.warning("%s is not a checkpoint (no %s or %s in it); passed over", path, COMMIT_MARK, METADATA_FILE)
        return None

    def _remove_old(self) -> None:
        """Keeps the newest `keep` steps and every multiple of `keep_every`; deletes the other ones."""
        steps, every = committed_steps(self.directory), self._config.keep_every
        for step in steps[: -max(self._config.keep, 1)]:
            if not (every and step % every == 0):
                _delete(self.directory / str(step))


def _children(directory: epath.Path) -> Iterator[epath.Path]:
    return iter(list(directory.iterdir()) if directory.is_dir() else [])


def _delete(path: epath.Path) -> None:
    """Deletes a checkpoint folder so that, killed at any moment, it is either whole or known to be on its way out."""
    mark = path / DELETION_MARK
    try:
        if (path / COMMIT_MARK).exists():
            (path / COMMIT_MARK).rename(mark)
        for child in path.iterdir():
            if child != mark:
                child.rmtree() if child.is_dir() else child.unlink()
        path.rmtree(missing_ok=True)
    except OSError as error:  # a checkpoint too many is no reason to stop a run
        log.warning("could not delete %s: %s", path, error)


def _from_first_process(value: int) -> int:
    """What the first process sees: file systems show changes to hosts at different times, and all must do the same."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _everywhere(flag: bool) -> bool:
    if jax.process_count() == 1:
        return flag
    return bool(np.all(multihost_utils.process_allgather(np.int32(flag))))


# ---------------------------------------------------------------------------------------------------------------------
# Is a resume the same run?

_HARD_FLAGS = (
    "data.tokenizer data.sequence_length data.mask_documents data.validation_fraction train.seed train.global_batch_size "
    "optimizer.name"
).split()
_HARD_SOURCE_FIELDS = ("kind", "text_field", "weight")  # not path: the same data may have moved
_SOFT_MODEL_FLAGS = "model.attention model.dtype model.init_std".split()


@dataclass(frozen=True)
class Differences:
    """What a checkpoint and the present run differ in, one line each, in the words of the flags, with both values."""

    hard: list[str] = field(default_factory=list)
    """It would be another run: other shapes, other data, or the same data in another order."""
    soft: list[str] = field(default_factory=list)
    """It would be the same run done otherwise: mesh, pipeline, schedule, steps, versions."""


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Differences:
    """Compares two metadata dicts: "config" (`dataclasses.asdict`), "data_fingerprint" and "versions", where present."""
    found = Differences()
    before, after = (_flags(metadata) for metadata in (saved, current))
    for flag in [*after, *(flag for flag in before if flag not in after)]:
        if flag in before and flag in after:
            if before[flag] != after[flag]:
                (found.hard if _is_hard(flag) else found.soft).append(f"{flag}: {before[flag]} -> {after[flag]}")
            continue
        line = f"{flag}: {before.get(flag, 'not in the checkpoint')} -> {after.get(flag, 'gone')}"
        # One more source is other data. Any other field is newer or older than the checkpoint: its default changes nothing.
        (found.hard if flag.startswith("data.sources.") and _is_hard(flag) else found.soft).append(line)
    old, new = (_normal(m.get("data_fingerprint")) for m in (saved, current))
    if old != new:
        (found.soft if old is None or new is None else found.hard).append(f"data fingerprint: {old} -> {new}")
    return found


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any], directory: os.PathLike | str) -> list[str]:
    """The soft differences, for the log.

    Raises:
      CheckpointError: there are hard ones; names them all, and the way out.
    """
    found = differences(saved, current)
    if found.hard:
        lines = "\n".join(f"  - {line}" for line in found.hard)
        raise CheckpointError(
            f"the checkpoint in {_absolute(directory)} is of another run (checkpoint -> now):\n{lines}\n"
            "Set these back to go on with it, or start a new run with another --run_dir "
            "(or with --checkpoint.resume=never and a fresh folder)."
        )
    return found.soft


def _is_hard(flag: str) -> bool:
    if flag.startswith("model."):
        return flag not in _SOFT_MODEL_FLAGS
    if flag.startswith("data.sources."):
        return flag.rpartition(".")[2] in _HARD_SOURCE_FIELDS
    return flag in _HARD_FLAGS


def _flags(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The config and the versions as {"model.num_layers": 12, "data.sources.0.kind": "text", "versions.jax": ...}."""
    sections = {**_normal(metadata.get("config", {})), "versions": _normal(metadata.get("versions", {}))}
    flat: dict[str, Any] = {}
    for section, fields in sections.items():
        for name, value in fields.items() if isinstance(fields, dict) else [("", fields)]:
            flag = f"{section}.{name}".rstrip(".")
            if flag == "data.sources":
                flat |= {f"{flag}.{i}.{key}": item for i, source in enumerate(value) for key, item in source.items()}
            else:
                flat[flag] = value
    return flat


def _normal(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(value))
