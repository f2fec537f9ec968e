"""Log-probabilities of the data under the weights that a run begins with, computed once and kept in run_dir/reference.

Preferences are compared with them (`objectives/dpo.py`). They belong to rows of the data, which are the same in every epoch; so
the reference model is not held while training goes on, and a resumed run reads the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain import processes
from jaxtrain.config import Config, to_plain
from jaxtrain.data.file_hashes import short_hash
from jaxtrain.data.pipeline import Data
from jaxtrain.errors import ExplainedError
from jaxtrain.files import replace_file, replacing
from jaxtrain.objectives import objective_of
from jaxtrain.objectives.dpo import REFERENCE
from jaxtrain.telemetry.progress import Progress
from jaxtrain.train.gradients import make_score
from jaxtrain.train.prepared import Prepared

PyTree = Any
FOLDER, NOTE = "reference", "reference.json"
SIDES = ("train", "validation")


def wants_reference(config: Config) -> bool:
    """Return whether the objective compares the data's answers with the initial weights."""
    return config.objective.kind == "dpo" and REFERENCE in objective_of(config).inputs


def attach_reference(
    prepared: Prepared,
    data: Data,
    initial_params: Callable[[], PyTree],
    progress: Progress | None = None,
    before_each: Callable[[], None] = lambda: None,
) -> None:
    """Give the data's batches the log-probabilities of their targets under the initial weights, float32 [B, L].

    All processes call it; process 0 writes the files.

    Args:
      initial_params: gives the weights of step 0; called where the run folder has no numbers of this data and these weights.
      before_each: called before each batch is scored; may raise to end it.

    Raises:
      ExplainedError: the files cannot be written, or another process cannot read them.
    """
    if data.has(REFERENCE):
        return
    folder, identity = prepared.config.directory / FOLDER, _identity(prepared, data)
    shapes = _shapes(prepared, data)
    if not processes.from_first(_held(folder, identity, shapes) is not None, processes.LONG_SECONDS):
        found = _computed(prepared, data, initial_params(), progress, before_each)
        problem = _written(folder, identity, found) if processes.own_index() == 0 else ""
        if problem := processes.from_first(problem, processes.LONG_SECONDS):
            raise ExplainedError(f"{folder}: the reference's log-probabilities cannot be written ({problem}); free some space")
    held = _held(folder, identity, shapes)
    if held is None:
        raise ExplainedError(f"{folder}: process 0 wrote the reference's log-probabilities, which this host does not see; "
                             "give a --run_dir that all hosts share")  # fmt: skip
    data.attach(REFERENCE, *held)


def _identity(prepared: Prepared, data: Data) -> str:
    config = prepared.config
    return short_hash([data.fingerprint, to_plain(config.model), config.train.seed, config.init_from, to_plain(config.lora)])


def _shapes(prepared: Prepared, data: Data) -> tuple[tuple[int, int], ...]:
    """Return the shapes of the numbers of training rows and of held-out ones, the latter in whole batches."""
    size, length = prepared.config.train.global_batch_size, prepared.config.data.sequence_length
    return (sum(data.row_counts), length), (data.num_validation_batches(size) * size, length)


def _held(folder: Path, identity: str, shapes: tuple[tuple[int, int], ...]) -> list[np.ndarray] | None:
    """Return the arrays of this data under these weights; None where the files are missing, damaged or of others."""
    try:
        if json.loads((folder / NOTE).read_text(encoding="utf-8"))["of"] != identity:
            return None
        arrays = [np.load(folder / f"{side}.npy", mmap_mode="r") for side in SIDES]
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    return arrays if tuple(array.shape for array in arrays) == shapes else None


def _written(folder: Path, identity: str, found: tuple[np.ndarray, ...]) -> str:
    """Write the files; return what prevented it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / NOTE).unlink(missing_ok=True)  # it goes with both arrays, or there is none
        for side, rows in zip(SIDES, found, strict=True):
            with replacing(folder / f"{side}.npy") as path, path.open("wb") as file:
                np.save(file, rows)
        replace_file(folder / NOTE, json.dumps({"of": identity}) + "\n")
    except OSError as error:
        return str(error)
    return ""


def _computed(
    prepared: Prepared, data: Data, params: PyTree, progress: Progress | None, before_each: Callable[[], None]
) -> tuple[np.ndarray, ...]:
    """Return the numbers of all training rows, one source after the other, and of all held-out ones, [rows, L] each."""
    config, size = prepared.config, prepared.config.train.global_batch_size
    score, own = make_score(config, prepared.mesh, prepared.backend), prepared.rows()
    training = [(source, row) for source, count in enumerate(data.row_counts) for row in range(count)]
    found = tuple(np.zeros(shape, np.float32) for shape in _shapes(prepared, data))

    def training_rows(first: int) -> dict[str, np.ndarray]:
        picks = [training[i] if i < len(training) else None for i in range(first + own.start, first + own.stop)]
        return data.rows(picks)

    readers = (training_rows, lambda first: data.validation_batch(first // size, own, size))
    total, done = sum(-(-len(into) // size) for into in found), 0
    for into, read in zip(found, readers, strict=True):
        for first in range(0, len(into), size):
            before_each()
            scored = _whole(score(params, prepared.place(read(first))))
            into[first : first + size] = scored[: len(into) - first]
            done += 1
            if progress is not None:
                progress.now(f"scoring the reference {done}/{total}")
    return found


def _whole(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
