"""Which checkpoints of a run are kept: the newest, the multiples of a number, and the best by a validation's metric."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from typing import Any

from jaxtrain.checkpoint.stored import committed_steps, read_stored, step_path
from jaxtrain.errors import CheckpointError

METRIC = "validation_loss"
_HIGHER = ("reward", "accuracy")
"""Parts of the names of metrics of which more is better."""


def outdated(steps: list[int], keep: int, keep_every: int, best: Collection[int] = ()) -> list[int]:
    """Return the steps to delete: all but the newest `keep`, the multiples of `keep_every` (0: none), and the best ones."""
    return [step for step in steps[: -max(keep, 1)] if not (keep_every and step % keep_every == 0) and step not in best]


def validated(directory: os.PathLike | str) -> dict[int, dict[str, Any]]:
    """Return {step: its own validation} of the whole checkpoints that were saved in a step that validated."""
    found = {}
    for step in committed_steps(directory):
        try:
            row = read_stored(step_path(directory, step))["metadata"].get("validation") or {}
        except CheckpointError:  # damaged, or deleted meanwhile
            continue
        if row.get("step") == step:
            found[step] = row
    return found


def best_steps(directory: os.PathLike | str, count: int, metric: str = METRIC) -> list[int]:
    """Return the best `count` checkpoints by a metric of their own validations, the best first; of equal ones the earlier."""
    sign = -1 if any(part in metric for part in _HIGHER) else 1
    held = {step: row.get(metric) for step, row in validated(directory).items()} if count else {}
    numbers = {step: sign * value for step, value in held.items() if isinstance(value, int | float) and math.isfinite(value)}
    return sorted(numbers, key=lambda step: (numbers[step], step))[:count]


def metric_of(directory: os.PathLike | str) -> str:
    """Return the metric of the newest checkpoint's config, train.validation_metric."""
    steps = committed_steps(directory)
    try:
        config = read_stored(step_path(directory, steps[-1]))["metadata"].get("config", {}) if steps else {}
    except CheckpointError:
        config = {}
    return config.get("train", {}).get("validation_metric", METRIC)


def best_step(directory: os.PathLike | str) -> int:
    """Return the best checkpoint by `metric_of`.

    Raises:
      CheckpointError: none was saved in a step that validated.
    """
    metric = metric_of(directory)
    best = best_steps(directory, 1, metric)
    if not best:
        steps = ", ".join(map(str, committed_steps(directory)))
        raise CheckpointError(
            f"{os.fspath(directory)} has no best checkpoint: none of its steps ({steps}) was saved with a {metric} of its own; "
            "name a step"
        )
    return best[0]
