"""Log-probabilities of the data under the weights that a run begins with, computed once and kept in run_dir/reference.

Preferences are compared with them (`objectives/dpo.py`). They belong to rows of the data, which are the same in every epoch; so
the reference model is not held while training goes on, and a resumed run reads the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain import processes
from jaxtrain.config import Config, to_plain
from jaxtrain.data.file_hashes import short_hash
from jaxtrain.data.pipeline import Data
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
    prepared: Prepared, data: Data, initial_params: Callable[[], PyTree], progress: Progress | None = None
) -> None:
    """Give the data's batches the log-probabilities of their targets under the initial weights, float32 [B, L].

    All processes call it; process 0 writes the files.

    Args:
      initial_params: gives the weights of step 0; called where the run folder has no numbers of this data and these weights.
    """
    if data.has(REFERENCE):
        return
    folder, identity = prepared.config.directory / FOLDER, _identity(prepared, data)
    if not processes.from_first(_is_there(folder, identity), processes.LONG_SECONDS):
        found = _computed(prepared, data, initial_params(), progress)
        if processes.own_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for side, rows in zip(SIDES, found, strict=True):
                with replacing(folder / f"{side}.npy") as path, path.open("wb") as file:
                    np.save(file, rows)
            replace_file(folder / NOTE, json.dumps({"of": identity}) + "\n")
        processes.barrier("reference", processes.LONG_SECONDS)
    data.attach(REFERENCE, *(np.load(folder / f"{side}.npy", mmap_mode="r") for side in SIDES))


def _identity(prepared: Prepared, data: Data) -> str:
    config = prepared.config
    return short_hash([data.fingerprint, to_plain(config.model), config.train.seed, config.init_from, to_plain(config.lora)])


def _is_there(folder: Any, identity: str) -> bool:
    """Return whether the files hold the numbers of this data under these weights."""
    try:
        return json.loads((folder / NOTE).read_text(encoding="utf-8"))["of"] == identity
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _computed(prepared: Prepared, data: Data, params: PyTree, progress: Progress | None) -> tuple[np.ndarray, ...]:
    """Return the numbers of all training rows, one source after the other, and of all held-out ones, [rows, L] each."""
    config, size = prepared.config, prepared.config.train.global_batch_size
    score, own = make_score(config, prepared.mesh, prepared.backend), prepared.rows()
    training = [(source, row) for source, count in enumerate(data.row_counts) for row in range(count)]
    counts = len(training), data.num_validation_batches(size) * size
    found = tuple(np.zeros((count, config.data.sequence_length), np.float32) for count in counts)

    def training_rows(first: int) -> dict[str, np.ndarray]:
        picks = [training[i] if i < len(training) else None for i in range(first + own.start, first + own.stop)]
        return data.rows(picks)

    readers = (training_rows, lambda first: data.validation_batch(first // size, own, size))
    total, done = sum(-(-count // size) for count in counts), 0
    for into, read in zip(found, readers, strict=True):
        for first in range(0, len(into), size):
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
