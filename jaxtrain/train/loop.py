"""A loop that only loops: it takes a batch, dispatches a step, and tells the hooks. All I/O lives in the hooks.

Metrics are read one step late, so the device always has the next step to work on while the host looks at the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

PyTree = Any


class Hook:
    """What may happen around a step. Every method may be left out."""

    def before_step(self, step: int, state: PyTree) -> None:
        """Step number `step` (from 1) is about to be dispatched; `state` may still be being computed."""

    def metrics_read(self, step: int, metrics: PyTree) -> None:
        """Step `step` is done, and these are its metrics, on the host or cheap to fetch."""

    def wants(self, step: int) -> bool:
        """Whether `after_step` must be called for this step; the loop then waits for the step's own metrics first."""
        return False

    def after_step(self, step: int, state: PyTree) -> None:
        """Step `step` is done and its metrics have been read; only called where `wants` says so."""

    def stop_reason(self) -> str | None:
        """Why the run should end now, or None."""
        return None


@dataclass
class Loop:
    """Trains from `step` (steps done) to `last_step`, or until a hook gives a reason to stop.

    Attributes:
      step_function: (state, batch) -> (state, metrics), compiled; the state is donated.
      next_batch: gives the batch of the next step, in order.
      wait: blocks until a step's metrics are there.
    """

    step_function: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
    next_batch: Callable[[], PyTree]
    wait: Callable[[PyTree], PyTree]
    hooks: Sequence[Hook]
    state: PyTree
    step: int
    last_step: int

    def run(self) -> str | None:
        """Runs; returns the reason of a stop before last_step, or None. `state` and `step` are then as trained."""
        unread: list[tuple[int, PyTree]] = []
        while self.step < self.last_step:
            for hook in self.hooks:
                hook.before_step(self.step + 1, self.state)
            batch = self.next_batch()
            self.state, metrics = self.step_function(self.state, batch)
            self.step += 1
            unread.append((self.step, metrics))
            wanting = [hook for hook in self.hooks if hook.wants(self.step)]
            self._read(unread, keep=0 if wanting or self.step == self.last_step else 1)
            for hook in wanting:
                hook.after_step(self.step, self.state)
            reason = next(self._reasons(), None)
            if reason:
                self._read(unread, keep=0)
                return reason
        return None

    def _read(self, unread: list[tuple[int, PyTree]], keep: int) -> None:
        """Reads all but the newest `keep` metrics."""
        while len(unread) > keep:
            step, metrics = unread.pop(0)
            metrics = self.wait(metrics)
            for hook in self.hooks:
                hook.metrics_read(step, metrics)

    def _reasons(self) -> Iterator[str]:
        return (reason for hook in self.hooks if (reason := hook.stop_reason()))
