"""Stop a run on a signal: the first asks it to save and end, a second one ends the process at once."""

from __future__ import annotations

import itertools
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jaxtrain import processes
from jaxtrain.errors import Stopped
from jaxtrain.processes import are_several, look, post
from jaxtrain.signals import Request, Watch, end_at_once
from jaxtrain.telemetry.progress import Progress
from jaxtrain.train.loop import Hook

PyTree = Any


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
        """Return whether no process can finish a step before all have begun it."""
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
        """Let the first signal interrupt the block, which is long, anywhere."""
        self.check()
        self._breakable = True
        try:
            yield
        finally:
            self._breakable = False

    def check(self) -> None:
        """Raise `Stopped` if there was a signal; of several processes none leaves the others before they agree in the loop."""
        if self.received is not None and not are_several():
            raise Stopped(f"{self.received.name} received outside the training loop")

    def ends_before(self, what: str, part: int) -> bool:
        """Return whether a signal ends work of several parts before this one, from 0; all processes say the same.

        No process can finish a part before all have begun it. So when one is about to begin part n, others have at most begun
        it: it posts n + 1, and all look before that part (compare `_agree`).

        Args:
          what: the work, by a name that no other has.
        """
        if not are_several():
            return self.received is not None
        if self.received is not None and look(f"stop {what}") is None:
            post(f"stop {what}", str(part + 1))
        said = look(f"stop {what}")
        return said is not None and part >= int(said)

    def end_loop(self) -> bool:
        """End the loop before the step that is about to be dispatched, in all processes; called where `ends_before` is true."""
        if are_several():
            if self.received is not None:
                post("stop", f"{self.received.value} {self._step - 1}")  # for `agreed`
            processes.wait_for("stop", processes.limit_seconds)
        return True

    def before_step(self, step: int, state: PyTree) -> None:
        self._step = step

    def agreed(self) -> signal.Signals | None:
        """Return the signal that ended the loop. All processes say the same, and a signal too late for that counts nowhere."""
        said = look("stop") if are_several() else None
        return signal.Signals(int(said.split()[0])) if said else None if are_several() else self.received

    def stop_reason(self) -> str | None:
        if not are_several():
            return None if self.received is None else f"{self.received.name} received"
        return "a signal was received" if self._step >= self._agree() else None

    def _agree(self) -> float:
        """Return the last step that all processes run; infinite before any process has received a signal. Called between steps.

        The first process with a signal posts a step that no process can have passed, and all look after each dispatch. Let e be
        the first step that couples all processes and that this process has not dispatched yet; it posts e + 1. After
        dispatching a step, the loop waits for the one before it; so a process that has dispatched e + 1 and looks has seen e
        done, and e was dispatched after the post.
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
    """Say which steps a run loses that ends in step `step`, where `saved` is the newest one saved."""
    if step <= saved:
        return f"step {saved} is saved, and nothing is lost" if saved else "no step was taken"
    return f"steps {saved + 1} to {step} are not saved" if step > saved + 1 else f"step {step} is not saved"
