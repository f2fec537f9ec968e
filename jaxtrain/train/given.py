"""Check what a caller gives to `Trainer`: parts of a run, and batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtrain.config import Config
from jaxtrain.errors import ExplainedError, violated
from jaxtrain.objectives import Objective, SequenceObjective
from jaxtrain.parts import ModelParts
from jaxtrain.train.gradients import abstract_batch
from jaxtrain.train.loop import Hook
from jaxtrain.train.prepared import Prepared


def check_parts(config: Any, parts: Mapping[str, Any]) -> None:
    """Check the arguments of `Trainer`.

    Raises:
      ExplainedError: one is of another kind than it takes; names each.
    """
    objective, optimizer = parts["objective"], parts["optimizer"]
    is_list = isinstance(parts["hooks"], list | tuple)
    is_transform = hasattr(optimizer, "init") and hasattr(optimizer, "update")
    problems = {
        "config is no Config: give one, such as load_config('quickstart')": not isinstance(config, Config),
        "model is no ModelParts: give ModelParts(mlp=...)": not isinstance(parts["model"], ModelParts | None),
        "objective is no Objective, and no function of log-probabilities": not (
            objective is None or isinstance(objective, Objective | SequenceObjective) or callable(objective)
        ),
        "optimizer is no optax transform": not (optimizer is None or is_transform),
        "hooks is no list of Hooks: give hooks=[MyHook()]": not is_list or not all(isinstance(h, Hook) for h in parts["hooks"]),
        "schedule is no function": not (parts["schedule"] is None or callable(parts["schedule"])),
        "documents is no function that gives texts": not (parts["documents"] is None or callable(parts["documents"])),
    }
    if found := violated(problems):
        raise ExplainedError(f"Trainer: {'; '.join(found)}")


def checked_batch(batch: Mapping[str, Any], prepared: Prepared) -> dict[str, np.ndarray]:
    """Return the arrays of this process's rows that a step reads, in their dtypes.

    Raises:
      ExplainedError: one has another shape, a token is not in the vocabulary, or numbers are not of its kind.
    """
    rows, vocabulary = prepared.rows(), prepared.config.model.vocab_size
    checked = {}
    for name, expected in abstract_batch(prepared.config, prepared.mesh).items():
        if name not in batch:
            continue
        array, shape = np.asarray(batch[name]), (rows.stop - rows.start, *expected.shape[1:])
        is_whole = jnp.issubdtype(expected.dtype, jnp.integer)
        if array.shape != shape:
            raise ExplainedError(f"the batch's {name} has shape {list(array.shape)}; this process gives {list(shape)}")
        if not np.issubdtype(array.dtype, np.integer) and (is_whole or not jnp.issubdtype(array.dtype, jnp.floating)):
            raise ExplainedError(f"the batch's {name} is {array.dtype}; give {expected.dtype}")
        least = {"tokens": 0, "targets": -1}.get(name)
        if least is not None and (array.min() < least or array.max() >= vocabulary):
            found = f"from {array.min()} to {array.max()}"
            raise ExplainedError(f"the batch's {name} are {found}; the vocabulary has ids up to {vocabulary - 1}")
        checked[name] = array.astype(expected.dtype)
    return checked
