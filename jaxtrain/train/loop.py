"""A loop that only loops: it takes a batch, dispatches a step, and tells the hooks. All I/O lives in the hooks.

Metrics are read one step late, so the device always has the next step to work on while the host looks at the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

PyTree = Any
Due = Callable[[int], bool]
"""Whether something is to happen after this step, counted from 1."""


class Hook:
    """An observer of steps. Every method may be left out."""

    every: int = 0
    """Steps between two calls of `after_step`, where `Hooks.add` is not told otherwise; 0 for no call."""

    def before_step(self, step: int, state: PyTree) -> None:
        """Step number `step` (from 1) is about to be dispatched; `state` may still be being computed."""

    def metrics_read(self, step: int, metrics: PyTree) -> None:
        """Step `step` is done, and these are its metrics, on the host or cheap to fetch."""

    def after_step(self, step: int, state: PyTree) -> None:
        """Step `step` is done and its metrics have been read: the loop waits for them. Do not keep `state`: it is donated."""

    def stop_reason(self) -> str | None:
        """Return why the run should end now, or None."""
        return None

    def close(self) -> None:
        """Clean up after the loop, which may have ended with an error."""


class Hooks:
    """The hooks of a loop, in the order in which they are told."""

    def __init__(self) -> None:
        self._all: list[tuple[Hook, Due]] = []

    def add(self, hook: Hook | Callable[[int, PyTree], None], every: int | Due | None = None) -> None:
        """Register a hook, or a function as the `after_step` of one.

        Args:
          every: steps between two calls of `after_step`, or a function that says for each step whether it is due; None for
            `hook.every`, and for a function for every step.
        """
        if not isinstance(hook, Hook):
            function, hook, every = hook, Hook(), 1 if every is None else every
            hook.after_step = function  # type: ignore[method-assign]
        due = hook.every if every is None else every
        self._all.append((hook, due if callable(due) else lambda step: due > 0 and step % due == 0))

    def due(self, step: int) -> list[Hook]:
        """Return the hooks whose `after_step` is to be called."""
        return [hook for hook, is_due in self._all if is_due(step)]

    def close(self) -> None:
        """Close them all, the last one first."""
        for hook in reversed(list(self)):
            hook.close()

    def __iter__(self) -> Iterator[Hook]:
        return (hook for hook, _ in self._all)


@dataclass
class Loop:
    """Trains from `step` (steps done) to `last_step`, or until a hook gives a reason to stop.

    Attributes:
      step_function: (state, batch) -> (state, metrics), compiled; the state is donated.
      next_batch: (state, steps done) -> the batch of the next step, in order; None ends the run, as a signal asked for.
      wait: blocks until a step's metrics are there.
      outside: gives a context for the `after_step` of a hook, to leave its time out of the step's.
    """

    step_function: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
    next_batch: Callable[[PyTree, int], PyTree | None]
    wait: Callable[[PyTree], PyTree]
    hooks: Hooks
    state: PyTree
    step: int
    last_step: int
    outside: Callable[[Hook], AbstractContextManager[Any]] = lambda hook: nullcontext()

    def run(self) -> str | None:
        """Run; return the reason of a stop before last_step, or None. `state` and `step` are then as trained."""
        unread: list[tuple[int, PyTree]] = []
        while self.step < self.last_step:
            for hook in self.hooks:
                hook.before_step(self.step + 1, self.state)
            batch = self.next_batch(self.state, self.step)
            if batch is None:
                self._read(unread, keep=0)
                return "a signal was received"
            self.state, metrics = self.step_function(self.state, batch)
            self.step += 1
            unread.append((self.step, metrics))
            due = self.hooks.due(self.step)
            self._read(unread, keep=0 if due or self.step == self.last_step else 1)
            for hook in due:
                with self.outside(hook):
                    hook.after_step(self.step, self.state)
            reason = next((reason for hook in self.hooks if (reason := hook.stop_reason())), None)
            if reason:
                self._read(unread, keep=0)
                return reason
        return None

    def _read(self, unread: list[tuple[int, PyTree]], keep: int) -> None:
        """Read all but the newest `keep` metrics."""
        while len(unread) > keep:
            step, metrics = unread.pop(0)
            metrics = self.wait(metrics)
            for hook in self.hooks:
                hook.metrics_read(step, metrics)
