"""Act on a bad step as config section `guard` says: log it with its batch, count it, and go on, roll back or stop.

The compiled step has already decided whether its update is applied (`step_acceptance.py`), identically in every process; each
process acts on the step's metrics, so all act alike. If the step does not classify itself, which is the default, a non-finite
loss or gradient norm stops the run at most one step later; nothing is saved in between, since a save reads its own step's
metrics first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jaxtrain.config import Config, GuardConfig, Recipe
from jaxtrain.errors import NumbersError
from jaxtrain.telemetry.metrics import MetricsLog
from jaxtrain.telemetry.progress import Progress
from jaxtrain.train.loop import Hook
from jaxtrain.train.rollbacks import Rollbacks
from jaxtrain.train.step import read_metrics
from jaxtrain.train.step_acceptance import GOOD, LOSS_SPIKE, NOT_FINITE

PyTree = Any
_READ = ("loss", "total_loss", "targets", "grad_norm", "bad_step", "skipped_steps", "loss_deviations", "grad_norm_deviations")


class RollBack(Exception):
    """Ends the loop to resume from an older checkpoint; not an error of the run."""

    def __init__(self, step: int, reason: str, batches: int):
        super().__init__(reason)
        self.step, self.reason = step, reason
        self.batches = batches
        """Number of batches to leave out; the last is that of `step`."""


class BadSteps(Hook):
    """Reads every step's metrics, and applies the policy to a bad step.

    Args:
      diagnose: (state, step) -> description of where the step's numbers first went wrong, or None. With it the loop waits for
        every step; the state is that before the step, which was not applied.
    """

    def __init__(
        self,
        config: Config,
        log: MetricsLog,
        progress: Progress,
        rollbacks: Rollbacks,
        diagnose: Callable[[PyTree, int], str] | None = None,
    ):
        self._config, self._log, self._progress, self._rollbacks = config, log, progress, rollbacks
        self._diagnose = diagnose
        self._bad: dict[str, float] | None = None

    def metrics_read(self, step: int, metrics: PyTree) -> None:
        values = read_metrics({name: metrics[name] for name in _READ if name in metrics})
        kind = kind_of(values)
        if kind == GOOD or self._policy(kind) == "off":
            return
        if self._diagnose is not None and kind == NOT_FINITE:
            self._bad = values
            return
        self._act(step, values)

    def after_step(self, step: int, state: PyTree) -> None:
        values, self._bad = self._bad, None
        if values is not None and self._diagnose is not None:
            with self._progress.during("looking for the first bad number"):
                words = self._diagnose(state, step)
            self._act(step, values, f"; {words}")

    def _policy(self, kind: int) -> str:
        return self._config.guard.non_finite if kind == NOT_FINITE else self._config.guard.spike

    def _act(self, step: int, values: dict[str, float], found: str = "") -> None:
        kind = kind_of(values)
        policy, reason = self._policy(kind), describe(self._config.guard, values) + found
        batch = self._rollbacks.batch(step - 1)
        row, words = batch_row(self._config, batch)
        self._log.write({"step": step, "bad_step": reason, "policy": policy, **row})
        if policy == "stop":
            raise NumbersError(f"step {step} went wrong: {reason} ({words}). {self._way_out(kind)}")
        used = int(values["skipped_steps"]) + len(self._rollbacks)
        check_budget(self._config, step, used, reason)
        if policy == "rollback":
            raise RollBack(step, f"{reason} ({words})", self._config.guard.rollback_batches)
        self._progress.say(
            f"skipped    step {step}: {reason} ({words}); {used} of guard.budget={self._config.guard.budget} used"
        )

    def _way_out(self, kind: int) -> str:
        name, saved = ("non_finite" if kind == NOT_FINITE else "spike"), "Nothing was saved since"
        look = (
            ""
            if kind != NOT_FINITE or self._config.guard.debug_nans
            else "; --guard.debug_nans=True names the layer and the operation"
        )
        if self._config.sync.replicas_differ or self._config.sync.queued:
            return f"{saved}. Lower optimizer.peak_lr, or use sync.mode=every_step, which can leave such a batch out"
        return (
            f"{saved}, and the same command comes to the same step again. --guard.{name}=skip leaves such an update out, "
            f"--guard.{name}=rollback goes back to a checkpoint and leaves the batch out{look}"
        )


def check_budget(config: Config, step: int, used: int, reason: str) -> None:
    """Check that the number of skips and rollbacks is within guard.budget.

    Raises:
      NumbersError: it is not.
    """
    budget = config.guard.budget
    if used > budget:
        raise NumbersError(
            f"guard.budget={budget} exceeded: {used} skips and rollbacks; step {step} went wrong: {reason}. The rows with "
            f"bad_step in {config.directory / 'metrics.jsonl'} name them; lower optimizer.peak_lr, or raise --guard.budget"
        )


def kind_of(values: dict[str, float]) -> int:
    """Return the step's own classification, else GOOD or NOT_FINITE by its loss and gradient norm."""
    if "bad_step" in values:
        return int(values["bad_step"])
    finite = all(math.isfinite(values[name]) for name in ("loss", "total_loss", "grad_norm"))
    return GOOD if finite else NOT_FINITE


def describe(guard: GuardConfig, values: dict[str, float]) -> str:
    """Describe in a few words what is wrong with a bad step."""
    kind = kind_of(values)
    if kind == NOT_FINITE:
        names = [f"{words} is {values[name]:.4g}" for name, words in (("loss", "its loss"), ("grad_norm", "its gradient norm"))]
        return " and ".join(names)
    name, words = ("loss", "its loss") if kind == LOSS_SPIKE else ("grad_norm", "its gradient norm")
    return (
        f"{words} of {values[name]:.4g} is {values[f'{name}_deviations']:.3g} deviations above the median of the good steps "
        f"before it (guard.spike_deviations={guard.spike_deviations:g})"
    )


def batch_row(config: Config, batch: int) -> tuple[dict[str, int], str]:
    """(log row, description) of the samples, in the data's order, that a batch consists of."""
    recipe = Recipe(config)
    first, last = recipe.rows(batch), recipe.rows(batch + 1) - 1
    return {"batch": batch, "first_sample": first, "last_sample": last}, f"batch {batch}, samples {first} to {last}"
