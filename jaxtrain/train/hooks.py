"""The hooks of a training run: logging, validation, checkpoints, snapshots and profiling."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtrain.checkpoint import Checkpoints
from jaxtrain.errors import CheckpointError
from jaxtrain.files import ReplacedFiles
from jaxtrain.telemetry.clock import ROW_SHARE, StepClock, memory_row
from jaxtrain.telemetry.energy import EnergyLog
from jaxtrain.telemetry.heartbeat import Heartbeat
from jaxtrain.telemetry.metrics import MetricsLog
from jaxtrain.telemetry.profile import ProfileWindow
from jaxtrain.telemetry.progress import Progress
from jaxtrain.telemetry.stragglers import Stragglers
from jaxtrain.train.loop import Due, Hook
from jaxtrain.train.step import read_metrics

PyTree = Any


def multiples(every: int, *also: int) -> Due:
    """Return whether a step is a multiple of `every` (0 for none), or one of the others."""
    return lambda step: (every > 0 and step % every == 0) or step in also


@dataclass(frozen=True)
class Telemetry:
    """The outlets through which the hooks of a loop tell of it."""

    log: MetricsLog
    progress: Progress
    clock: StepClock

    @contextmanager
    def pause(self, words: str) -> Iterator[None]:
        """Show `words` ("saving") while the block runs, and leave it out of step times."""
        with self.clock.paused(), self.progress.during(words):
            yield


class Logging(Hook):
    """Logs a row after the steps that are due.

    Args:
      learning_rate: (step, updates made before it) -> its rate; None where an optimizer of the user's own has it.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        due: Due,
        learning_rate: Callable[[int, int], float] | None = None,
        energy: EnergyLog | None = None,
        stragglers: Stragglers | None = None,
    ):
        self._telemetry, self._due, self._learning_rate = telemetry, due, learning_rate
        self._energy, self._stragglers = energy or EnergyLog(None), stragglers
        self._losses: list[PyTree] = []
        """Of every step since the last row: its loss and targets, computed already, to be fetched where a row is logged."""

    def metrics_read(self, step: int, metrics: PyTree) -> None:
        self._telemetry.clock.step_done(step, metrics.get(ROW_SHARE, 1.0))
        self._telemetry.progress.advance(step)
        self._energy.poll()
        self._losses.append({name: metrics[name] for name in ("loss", "targets") if name in metrics})
        if self._due(step):
            row = self._row(step, read_metrics(metrics))
            self._telemetry.log.write(row)
            self._telemetry.progress.update(row)

    def _row(self, step: int, values: dict[str, float]) -> dict[str, Any]:
        is_bad = values.pop("bad_step", 0) != 0  # `BadSteps` writes a row of its own about such a step
        row: dict[str, Any] = {"step": step, "loss": values.pop("loss"), "loss_mean": self._mean()}
        row["grad_norm"] = values.pop("grad_norm")
        if self._learning_rate is not None:  # the optimizer has not counted the steps before that were skipped
            updates = step - 1 - int(values.get("skipped_steps", 0) - is_bad)
            row["learning_rate"] = float(self._learning_rate(step, updates))
        row |= {**values, **self._telemetry.clock.window(), **memory_row()}
        row |= self._energy.row(step)
        return row | (self._stragglers.row(step, row) if self._stragglers else {})

    def _mean(self) -> float | None:
        """Return the mean loss of a token over the steps since the last row; steps whose loss is not finite are left out."""
        read = [read_metrics(losses) for losses in self._losses]
        self._losses = []
        finite = [(values["loss"], values.get("targets", 1.0)) for values in read if math.isfinite(values["loss"])]
        tokens = sum(targets for _, targets in finite)
        return sum(loss * targets for loss, targets in finite) / tokens if tokens else None


class Retrying(Hook):
    """Tries again, every `every` steps, to write the files that could not be written."""

    def __init__(self, files: ReplacedFiles, every: int):
        self._files, self._every = files, every

    def metrics_read(self, step: int, metrics: PyTree) -> None:
        if step % self._every == 0:
            self._files.retry()


class HeartbeatHook(Hook):
    """Tells a watcher outside this process of every step."""

    def __init__(self, heartbeat: Heartbeat):
        self._heartbeat = heartbeat

    def before_step(self, step: int, state: PyTree) -> None:
        self._heartbeat.step(dispatched=step)

    def metrics_read(self, step: int, metrics: PyTree) -> None:
        self._heartbeat.step(done=step)


class Validation(Hook):
    """Scores held-out data, and stops the run where the row's `metric` is at most `stop_at_loss` (0: never).

    Args:
      evaluate: (state, ends) -> the row to log; None where `ends` ended it.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        evaluate: Callable[[PyTree, Callable[[int], bool]], dict[str, float | None] | None],
        ends_before: Callable[[str, int], bool],
        stop_at_loss: float,
        metric: str = "validation_loss",
    ):
        self._telemetry, self._evaluate = telemetry, evaluate
        self._ends_before = ends_before
        self._stop_at_loss, self._metric = stop_at_loss, metric
        self.newest: dict[str, Any] = {}

    def after_step(self, step: int, state: PyTree) -> None:
        with self._telemetry.pause("validating"):
            row = self._evaluate(state, functools.partial(self._ends_before, f"validating {step}"))
        if row is None:  # the grace of a signal may be shorter than a validation
            self._telemetry.progress.say(f"validation that of step {step} is left unfinished")
            return
        self.newest = {"step": step, **row}
        self._telemetry.log.write(self.newest)
        self._telemetry.progress.update(self.newest)

    def finite(self) -> dict[str, Any]:
        """Return the newest validation's step and numbers, without what is NaN or infinite; empty without one."""
        return {name: value for name, value in self.newest.items() if value is not None and math.isfinite(value)}

    def stop_reason(self) -> str | None:
        loss = self.newest.get(self._metric)
        if loss is None or not 0 < loss <= self._stop_at_loss:  # a NaN has reached nothing
            return None
        name = self._metric.replace("_", " ")
        return f"{name} {loss:.4f} has reached train.stop_at_validation_loss={self._stop_at_loss}"


class Saving(Hook):
    """Saves behind training.

    Args:
      save: (step, state, whether to wait) begins a save.
      stop_on_failure: a save that failed in the background ends the run; else it is told, and the run goes on with this one.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        checkpoints: Checkpoints,
        save: Callable[[int, PyTree, bool], None],
        stop_on_failure: bool = False,
    ):
        self._telemetry, self._checkpoints, self._save, self._stop_on_failure = telemetry, checkpoints, save, stop_on_failure

    def after_step(self, step: int, state: PyTree, wait: bool = False) -> None:
        """Begin a save, or `wait` until it is committed."""
        with self._telemetry.pause("saving"):
            try:
                self._checkpoints.wait()
            except CheckpointError as error:
                if self._stop_on_failure:
                    raise
                self._telemetry.progress.say(f"warning    {error}")
            self._save(step, state, wait)


class Profiling(Hook):
    """Opens and closes the profiler window around the steps that telemetry.profile names."""

    def __init__(self, window: ProfileWindow, progress: Progress):
        self._window, self._progress = window, progress

    def before_step(self, step: int, state: PyTree) -> None:
        self._say_if(self._window.on_step(step, state))

    def close(self) -> None:
        """End a trace that is still open."""
        self._say_if(self._window.close())

    def _say_if(self, written: bool) -> None:
        if written:
            self._progress.say(f"profile    written to {self._window.directory}")
