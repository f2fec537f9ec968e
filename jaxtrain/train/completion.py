"""What batches hold beside the data: numbers that another model gives, of a batch as it comes, or of all rows before."""

from __future__ import annotations

from collections.abc import Callable

import jax

from jaxtrain.data.pipeline import Data
from jaxtrain.objectives import objective_of
from jaxtrain.objectives.dpo import REFERENCE
from jaxtrain.telemetry.progress import Progress
from jaxtrain.train.kept_numbers import attach
from jaxtrain.train.prepared import Prepared, PyTree
from jaxtrain.train.reference import kept_reference, reference_numbers
from jaxtrain.train.teacher import Teacher, kept_by_teacher

Completion = Callable[[dict[str, jax.Array]], dict[str, jax.Array]]
"""A placed batch -> the same with further arrays."""


def completion_of(
    prepared: Prepared,
    data: Callable[[], Data],
    initial_params: Callable[[], PyTree],
    progress: Progress | None = None,
    before_each: Callable[[], None] = lambda: None,
) -> Completion:
    """Return what adds to a placed batch the arrays that the data does not give. All processes call it.

    Args:
      data: gives the data whose batches get the numbers that are kept.
      initial_params: gives the weights of step 0; called if preferences are compared with them, and no file holds the numbers.
      progress, before_each: see `kept_numbers.attach`.

    Raises:
      ExplainedError: the other model cannot be read or does not fit, or the files cannot be written or read.
    """
    objective = prepared.config.objective
    if objective.kind == "dpo" and REFERENCE in objective_of(prepared.config).inputs:
        numbers = lambda: reference_numbers(prepared, initial_params())  # noqa: E731
        attach(kept_reference(prepared, rows := data()), prepared, rows, numbers, progress, before_each)
    elif objective.kind == "distill" and objective.distill.kept:
        kept = kept_by_teacher(prepared.config, rows := data())
        attach(kept, prepared, rows, lambda: Teacher(prepared).numbers, progress, before_each)
    elif objective.kind == "distill":
        return Teacher(prepared)
    return lambda batch: batch
