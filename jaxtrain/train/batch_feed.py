"""The feed of a run: what each step trains on. The data's batches are one; rollouts (`rollouts.py`) are another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from jaxtrain.data.pipeline import Data
from jaxtrain.train.prepared import Prepared

PyTree = Any


class Feed(ABC):
    """Gives each step its batch."""

    @abstractmethod
    def next(self, state: PyTree, step: int) -> PyTree | None:
        """Return the batch of the step after `step` steps, placed; None where a signal ends the run before it."""

    @abstractmethod
    def batch(self, step: int) -> PyTree:
        """Return the batch of a step that was taken, counted from 0, again."""

    @abstractmethod
    def close(self) -> None:
        """End threads and close files."""

    def stepped(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Take the metrics of the step that was just dispatched; return those to log."""
        return metrics

    def save(self, step: int) -> None:  # noqa: B027, most feeds need nothing
        """Keep on disk what a run needs, beside the state after `step` steps, to go on from there."""


class DataFeed(Feed):
    """The batches of the data, made ahead.

    Args:
      first: steps done.
      batch_of: step from 0 -> number of its batch.
      waiting: gives a context for the time that a step waits for its batch.
      completed: adds arrays to a placed batch.
    """

    def __init__(
        self,
        prepared: Prepared,
        data: Data,
        first: int,
        batch_of: Callable[[int], int],
        waiting: Callable[[], AbstractContextManager[None]],
        completed: Callable[[PyTree], PyTree] = lambda batch: batch,
    ):
        self._prepared, self._data, self._batch_of, self._waiting = prepared, data, batch_of, waiting
        self._completed = completed
        self._batches = data.train_batches(first, lambda batch: prepared.at(batch).rows(), batch_of)

    def next(self, state: PyTree, step: int) -> PyTree:
        with self._waiting():
            batch = next(self._batches)
        return self._completed(self._prepared.at(self._batch_of(step)).place(batch))

    def batch(self, step: int) -> PyTree:
        number = self._batch_of(step)
        prepared = self._prepared.at(number)
        return self._completed(prepared.place(self._data.train_batch(number, prepared.rows())))

    def close(self) -> None:
        self._batches.close()
