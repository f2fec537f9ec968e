"""Chat samples packed into rows: the windows of a chat source, each read whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxtrain.config import TooLong
from jaxtrain.data.best_fit import best_fit
from jaxtrain.data.chat_store import StoredSide, ids_of, lengths_of
from jaxtrain.data.packing import NO_TARGET, Batch, put
from jaxtrain.errors import DataError


class Fit(NamedTuple):
    """The samples that fit into rows; `slots` that each of their sequences takes: [samples, sequences of a sample]."""

    kept: np.ndarray
    slots: np.ndarray
    targets: int
    left_out: int
    cut: int


class PackedRows:
    """Rows of `length` slots, each with whole samples one after the other.

    A sequence of n ids takes n - 1 slots: its last id is only a target. The two of a pair lie in one row, chosen before
    rejected, so odd segments are chosen and even ones rejected.
    """

    separator = -1

    def __init__(self, side: StoredSide, per_sample: int, length: int, too_long: TooLong, name: str):
        """Group the samples of a side into rows by `best_fit`.

        Args:
          per_sample: sequences of a sample: 2 for pairs, else 1.
          name: the source's, for messages.

        Raises:
          DataError: with too_long="refuse", a sample does not fit.
        """
        self._side, self._per_sample = side, per_sample
        self.fit = _fit(side, per_sample, length, too_long, name)
        self._rows = best_fit(self.fit.slots.sum(axis=1), length)
        self.count = len(self._rows)
        self.slots = int(self.fit.slots.sum())
        self.num_targets = self.fit.targets

    def _sequences(self, row: int) -> Iterator[np.ndarray]:
        """Yield the sequences of a row's samples in order, as they are stored (see `chat_store`)."""
        for sample in self._rows[row].tolist():
            first = int(self.fit.kept[sample]) * self._per_sample
            for i, count in enumerate(self.fit.slots[sample].tolist()):
                yield self._side.sequence(first + i)[: count + 1]

    def fill(self, index: int, batch: Batch, row: int) -> None:
        """Write window `index` into row `row` of a batch, which is padding so far."""
        place = 0
        for segment, marked in enumerate(self._sequences(index), 1):
            ids = ids_of(marked)
            place = put(batch, row, place, segment, ids[:-1], np.where(marked[1:] < 0, ids[1:], NO_TARGET))


def _fit(side: StoredSide, per_sample: int, length: int, too_long: TooLong, name: str) -> Fit:
    """Return what of each sample goes into a row of `length`, by the policy for those that are too long."""
    slots = np.maximum(lengths_of(side) - 1, 1).reshape(-1, per_sample)
    fits = slots.sum(axis=1) <= length
    if too_long == "refuse" and not fits.all():
        first = int(np.flatnonzero(~fits)[0])
        raise DataError(
            f"{name}: {int((~fits).sum())} of {len(slots)} samples are longer than data.sequence_length={length}, the first "
            f"of {int(slots[first].sum())} tokens; use --data.sequence_length={int(slots.sum(axis=1).max())}, "
            "or --data.too_long=drop or truncate"
        )
    targets, cut = side.targets.reshape(-1, per_sample).sum(axis=1), np.zeros(len(slots), bool)
    if too_long == "truncate" and per_sample == 1:
        for i in np.flatnonzero(~fits).tolist():
            targets[i] = (side.sequence(i)[1 : length + 1] < 0).sum()
        cut = ~fits & (targets > 0)
        slots = np.where(cut[:, None], length, slots)
    kept = np.flatnonzero(fits | cut)
    return Fit(kept, slots[kept], int(targets[kept].sum()), int(len(slots) - len(kept)), int(cut.sum()))
