"""The hooks of a training run: logging, validation, checkpoints, profiling, and stopping on a signal."""

from __future__ import annotations

import itertools
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jaxtrain.checkpoint import Checkpoints
from jaxtrain.checkpoint.fast import FastTier
from jaxtrain.errors import CheckpointError, Stopped
from jaxtrain.files import ReplacedFiles
from jaxtrain.processes import are_several, look, post
from jaxtrain.signals import Request, Watch, end_at_once
from jaxtrain.telemetry.clock import StepClock, memory_row
from jaxtrain.telemetry.energy import EnergyLog
from jaxtrain.telemetry.heartbeat import Heartbeat
from jaxtrain.telemetry.metrics import MetricsLog
from jaxtrain.telemetry.profile import ProfileWindow
from jaxtrain.telemetry.progress import Progress
from jaxtrain.telemetry.stragglers import Stragglers
from jaxtrain.train.loop import Hook
from jaxtrain.train.step import read_metrics

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
        energy: EnergyLog | None = None,
        stragglers: Stragglers | None = None,
    ):
        self._log, self._progress, self._clock, self._learning_rate = log, progress, clock, learning_rate
        self._energy, self._stragglers = energy or EnergyLog(None), stragglers
        self._every, self._first_step, self._last_step = every, first_step, last_step
        self._losses: list[PyTree] = []
        """Of every step since the last row: its loss and targets, computed already, to be fetched where a row is logged."""

    def metrics_read(self, step: int, metrics: PyTree) -> None:
        self._clock.step_done(step)
        self._progress.advance(step)
        self._energy.poll()
        self._losses.append({name: metrics[name] for name in ("loss", "targets") if name in metrics})
        if step % self._every == 0 or step in (self._first_step, self._last_step):
            values = read_metrics(metrics)
            is_bad = values.pop("bad_step", 0) != 0  # `BadSteps` writes a row of its own about such a step
            row = {"step": step, "loss": values.pop("loss"), "loss_mean": self._mean(), "grad_norm": values.pop("grad_norm")}
            # The optimizer has not counted the steps before that were skipped.
            steps_taken = step - 1 - int(values.get("skipped_steps", 0) - is_bad)
            row |= {"learning_rate": float(self._learning_rate(steps_taken)), **values, **self._clock.window(), **memory_row()}
            row |= self._energy.row(step)
            row |= self._stragglers.row(step, row) if self._stragglers else {}
            self._log.write(row)
            self._progress.update(row)

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
        with self._clock.paused(), self._progress.during("validating"):
            loss = self._evaluate(state["params"])
        self.newest = {"step": step, "validation_loss": loss, "validation_bits_per_byte": self._bits_per_byte(loss)}
        self._log.write(self.newest)
        self._progress.update(self.newest)

    def finite(self) -> dict[str, Any]:
        """Return the newest validation's step and loss, empty without one or where the loss is NaN or infinite."""
        loss = self.newest.get("validation_loss", math.nan)
        return {"step": self.newest["step"], "validation_loss": loss} if math.isfinite(loss) else {}

    def stop_reason(self) -> str | None:
        loss = self.newest.get("validation_loss")
        if loss is None or not 0 < loss <= self._stop_at_loss:  # a NaN has reached nothing
            return None
        return f"validation loss {loss:.4f} has reached train.stop_at_validation_loss={self._stop_at_loss}"


class Saving(Hook):
    """Saves every `every` steps; `save_now` is for the end of the run.

    Args:
      stop_on_failure: a save that failed in the background ends the run; else it is told, and the run goes on with this one.
      metadata: of the state, what goes beside it.
      check: raises where a state is not fit to be saved, and is asked before every save.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        to_canonical: Callable[[PyTree], PyTree],
        metadata: Callable[[PyTree], dict[str, Any]],
        progress: Progress,
        clock: StepClock,
        every: int,
        check: Callable[[int, PyTree], None],
        stop_on_failure: bool = False,
    ):
        self._checkpoints, self._to_canonical, self._metadata, self._check = checkpoints, to_canonical, metadata, check
        self._progress, self._clock, self._every, self._stop_on_failure = progress, clock, every, stop_on_failure

    def wants(self, step: int) -> bool:
        return step % self._every == 0

    def after_step(self, step: int, state: PyTree) -> None:
        self._save(step, state, wait=False)

    def save_now(self, step: int, state: PyTree) -> None:
        """Saves and waits until it is committed."""
        self._save(step, state, wait=True)

    def _save(self, step: int, state: PyTree, wait: bool) -> None:
        with self._clock.paused(), self._progress.during("saving"):
            self._check(step, state)
            try:
                self._checkpoints.wait()
            except CheckpointError as error:
                if self._stop_on_failure:
                    raise
                self._progress.say(f"warning    {error}")
            self._checkpoints.save(step, self._to_canonical(state), self._metadata(state), wait=wait)


class Snapshots(Hook):
    """Takes a snapshot every `every` steps, but where a checkpoint is saved: every `save_every` steps, and after the last."""

    def __init__(
        self,
        fast: FastTier,
        metadata: dict[str, Any],
        progress: Progress,
        clock: StepClock,
        every: int,
        save_every: int,
        last_step: int,
    ):
        self._fast, self._metadata, self._progress, self._clock = fast, metadata, progress, clock
        self._every, self._save_every, self._last_step = every, save_every, last_step

    def wants(self, step: int) -> bool:
        return step % self._every == 0 and step % self._save_every != 0 and step != self._last_step

    def after_step(self, step: int, state: PyTree) -> None:
        with self._clock.paused(), self._progress.during("taking a snapshot"):
            self._fast.save(step, state, self._metadata)


class Profiling(Hook):
    """Opens and closes the profiler window around the steps that telemetry.profile names."""

    def __init__(self, window: ProfileWindow, progress: Progress):
        self._window, self._progress = window, progress

    def before_step(self, step: int, state: PyTree) -> None:
        if self._window.on_step(step, state):
            self._say_where()

    def close(self) -> None:
        """Ends a trace that the run ended in."""
        if self._window.close():
            self._say_where()

    def _say_where(self) -> None:
        self._progress.say(f"profile    written to {self._window.directory}")


class StopOnSignal(Hook):
    """The first signal asks the run to save and end; a second request ends the process at once, as 128 + its number.

    Signals: SIGINT, SIGTERM, SIGUSR1, SIGHUP. Which of them are one request, `jaxtrain.signals.Requests` says.

    The loop stops after the step under way. Of several processes, each of which may hear of it alone and at another moment, all
    stop after the same step (`_agree`). Before and after the loop, `check` raises `Stopped` where the run may end. Inside
    `breakable` the signal itself does: only around what is not jax, which crashes at exit if a lowering was broken off
    (jax 0.10.2).

    Use it as a context manager, in the main thread.
    """

    def __init__(self, progress: Progress):
        self._progress = progress
        self.received: signal.Signals | None = None
        """The first signal."""
        self.couples: Callable[[int], bool] = lambda step: True
        """Whether no process can finish a step before all have begun it."""
        self.newest_saved: Callable[[], int] = lambda: 0
        """The step that a run started now would go on from."""
        self._last_step: int | None = None
        self._step = 0
        self._breakable = False
        self._watch = Watch(self._hear, self._in_main_thread)
        self._announcement: threading.Thread | None = None

    def __enter__(self) -> StopOnSignal:
        self._watch.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.__exit__()
        if self._announcement is not None:
            self._announcement.join(1.0)  # Python aborts where a thread still writes to standard output when it ends

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """Around long work that the first signal may break off anywhere."""
        self.check()
        self._breakable = True
        try:
            yield
        finally:
            self._breakable = False

    def check(self) -> None:
        """Raises `Stopped` if there was a signal; of several processes none leaves the others before they agree in the loop."""
        if self.received is not None and not are_several():
            raise Stopped(f"{self.received.name} received outside the training loop")

    def before_step(self, step: int, state: PyTree) -> None:
        self._step = step

    def agreed(self) -> signal.Signals | None:
        """The signal that ended the loop. All processes say the same, and a signal too late for that counts nowhere."""
        said = look("stop") if are_several() else None
        return signal.Signals(int(said.split()[0])) if said else None if are_several() else self.received

    def stop_reason(self) -> str | None:
        if not are_several():
            return None if self.received is None else f"{self.received.name} received"
        return "a signal was received" if self._step >= self._agree() else None

    def _agree(self) -> float:
        """The last step that all processes run; infinite while nobody has heard a signal. Asked between steps.

        The first process that heard posts a step that nobody can have gone beyond, and everybody looks after each dispatch.
        Let e be the first step that couples all processes and that the one who heard has not dispatched yet; it posts e + 1.
        Having dispatched a step, the loop waits for the one before it; so who has dispatched e + 1 and looks has seen e done,
        and e was dispatched after the notice was up.
        """
        if self._last_step is None:
            if self.received is not None:
                coupling = next(n for n in itertools.count(self._step + 1) if self.couples(n))
                post("stop", f"{self.received.value} {coupling + 1}")
            said = look("stop")
            self._last_step = None if said is None else int(said.split()[1])
        return math.inf if self._last_step is None else self._last_step

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        if self._breakable and not are_several():
            raise Stopped(f"{signal.Signals(number).name} received outside the training loop")

    def _hear(self, number: int, request: Request) -> None:
        if request == "at once":
            end_at_once(128 + number, self._last_words)
        if request == "stop":
            self.received = signal.Signals(number)
            # In a thread, because a terminal that hangs must not keep the next signal from being heard.
            self._announcement = threading.Thread(target=self._announce, args=(self.received.name,), daemon=True)
            self._announcement.start()

    def _announce(self, name: str) -> None:
        self._progress.say(
            f"{name} received: finishing the step under way, then saving; another one, over a second later, ends at once"
        )

    def _last_words(self) -> None:
        try:
            self._progress.say(f"ended      at once: {describe_lost(self.newest_saved(), self._step)}")
        finally:
            self._progress.close()


def describe_lost(saved: int, step: int) -> str:
    """Says which steps a run loses that ends in step `step`, where `saved` is the newest one saved."""
    if step <= saved:
        return f"step {saved} is saved, and nothing is lost" if saved else "no step was taken"
    return f"steps {saved + 1} to {step} are not saved" if step > saved + 1 else f"step {step} is not saved"
