"""The hooks of a training run: logging, validation, checkpoints, profiling, and stopping on a signal."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from jaxtrain.checkpoint import Checkpoints
from jaxtrain.telemetry.clock import StepClock, memory_row
from jaxtrain.telemetry.metrics import MetricsLog
from jaxtrain.telemetry.profile import ProfileWindow
from jaxtrain.telemetry.progress import Progress
from jaxtrain.train.loop import Hook

PyTree = Any


class Logging(Hook):
    """Logs a row every `every` steps, and the first and the last one."""

    def __init__(
        self,
        log: MetricsLog,
        progress: Progress,
        clock: StepClock,
        learning_rate: Callable[[int], float],
        every: int,
        first_step: int,
        last_step: int,
    ):
        self._log, self._progress, self._clock, self._learning_rate = log, progress, clock, learning_rate
        self._every, self._first_step, self._last_step = every, first_step, last_step

    def metrics_read(self, step: int, metrics: PyTree) -> None:
        self._clock.step_done(step)
        self._progress.advance(step)
        if step % self._every == 0 or step in (self._first_step, self._last_step):
            values = {name: float(value) for name, value in metrics.items()}
            row = {"step": step, "loss": values.pop("loss"), "grad_norm": values.pop("grad_norm")}
            row |= {"learning_rate": self._learning_rate(step - 1), **values, **self._clock.window(), **memory_row()}
            self._log.write(row)
            self._progress.update(row)


class Validation(Hook):
    """Scores held-out data every `every` steps and at the last one; stops the run at `stop_at_loss` nats a token (0: never)."""

    def __init__(
        self,
        evaluate: Callable[[PyTree], float],
        bits_per_byte: Callable[[float], float | None],
        log: MetricsLog,
        progress: Progress,
        clock: StepClock,
        every: int,
        last_step: int,
        stop_at_loss: float,
    ):
        self._evaluate, self._bits_per_byte, self._log = evaluate, bits_per_byte, log
        self._progress, self._clock, self._every = progress, clock, every
        self._last_step, self._stop_at_loss = last_step, stop_at_loss
        self.newest: dict[str, Any] = {}

    def wants(self, step: int) -> bool:
        return self._every > 0 and (step % self._every == 0 or step == self._last_step)

    def after_step(self, step: int, state: PyTree) -> None:
        with self._clock.paused():
            loss = self._evaluate(state["params"])
        self.newest = {"step": step, "validation_loss": loss, "validation_bits_per_byte": self._bits_per_byte(loss)}
        self._log.write(self.newest)
        self._progress.update(self.newest)

    def stop_reason(self) -> str | None:
        loss = self.newest.get("validation_loss")
        if loss is None or loss > self._stop_at_loss:
            return None
        return f"validation loss {loss:.4f} has reached train.stop_at_validation_loss={self._stop_at_loss}"


class Saving(Hook):
    """Saves every `every` steps; `save_now` is for the end of the run."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        to_canonical: Callable[[PyTree], PyTree],
        metadata: dict[str, Any],
        clock: StepClock,
        every: int,
    ):
        self._checkpoints, self._to_canonical, self._metadata = checkpoints, to_canonical, metadata
        self._clock, self._every = clock, every

    def wants(self, step: int) -> bool:
        return step % self._every == 0

    def after_step(self, step: int, state: PyTree) -> None:
        with self._clock.paused():
            self._checkpoints.save(step, self._to_canonical(state), self._metadata)

    def save_now(self, step: int, state: PyTree) -> None:
        """Saves and waits until it is committed."""
        self._checkpoints.save(step, self._to_canonical(state), self._metadata, wait=True)


class Profiling(Hook):
    """Opens and closes the profiler window around the steps that telemetry.profile names."""

    def __init__(self, window: ProfileWindow, progress: Progress):
        self._window, self._progress = window, progress

    def before_step(self, step: int, state: PyTree) -> None:
        if self._window.on_step(step, state):
            self._progress.say(f"profile written to {self._window.directory}")


class StopOnSignal(Hook):
    """The first SIGINT or SIGTERM asks the loop to end after the step under way; a second one ends the process at once.

    Use it as a context manager around the loop.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, progress: Progress):
        self._progress = progress
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self._progress.close()
            os._exit(128 + number)
        self.received = signal.Signals(number)

    def stop_reason(self) -> str | None:
        return None if self.received is None else f"{self.received.name} received"
