"""Sources as numbered windows of ids: cut from token streams, or synthetic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxtrain.data.packing import num_full_windows, num_padded_windows, read_window
from jaxtrain.data.token_part import TokenPart, fetch, lie_in_store

SYNTHETIC_WINDOWS = 2**31 - 1
SYNTHETIC_VALIDATION_WINDOWS = 64


class StreamWindows:
    """The windows of several parts, one part after the other; a window never reaches into the next part.

    `count` is their number, `num_targets` that of the tokens that they predict; `separator` begins a document, -1: none.
    """

    def __init__(self, parts: Sequence[TokenPart], length: int, padded: bool):
        """Keep each part's last, incomplete window if `padded`, so that every token is predicted once; else drop it."""
        count_of = num_padded_windows if padded else num_full_windows
        counts = [count_of(len(part.tokens), length) for part in parts]
        targets = [max(0, len(part.tokens) - 1) for part in parts]
        self._parts, self._length = parts, length
        self._ends = np.cumsum(counts, dtype=np.int64)
        self.count = sum(counts)
        self.num_targets = sum(targets) if padded else self.count * length
        self.separator = parts[0].separator if parts else -1

    def _place(self, index: int, start: int) -> tuple[int, int]:
        """Return the part of a window, and where in it the window's token `start` is."""
        part = int(self._ends.searchsorted(index, side="right"))
        return part, (index - (int(self._ends[part - 1]) if part else 0)) * self._length + start

    def read(self, index: int, out: np.ndarray, start: int = 0) -> int:
        """Copy window `index` from token `start` on into `out`, [L + 1] or shorter, and return how many ids that were."""
        part, begin = self._place(index, start)
        return read_window(self._parts[part].tokens, begin, out)

    @property
    def lie_in_store(self) -> bool:
        """Return whether windows are fetched over a network."""
        return any(lie_in_store(part.tokens) for part in self._parts)

    def fetch(self, spans: Sequence[tuple[int, int, int]]) -> None:
        """Fetch what lies in a store of (window, first token, tokens), at the same time; `read` would fetch one by one."""
        places = ((*self._place(index, start), length) for index, start, length in spans)
        fetch([part.tokens for part in self._parts], ((part, begin, begin + length + 1) for part, begin, length in places))


class SyntheticWindows:
    """Uniformly random ids, a pure function of (seed, window index)."""

    separator = -1

    def __init__(self, seed: int, vocab_size: int, length: int, first: int, count: int):
        """Take windows first to first + count - 1 of the endless sequence of `seed`."""
        self._seed, self._vocab_size, self._first, self._length = seed, vocab_size, first, length
        self.count, self.num_targets = count, count * length

    def read(self, index: int, out: np.ndarray, start: int = 0) -> int:
        """Do as `StreamWindows.read`."""
        key = np.array([self._seed % 2**64, self._first + index], dtype=np.uint64)
        ids = np.random.Generator(np.random.Philox(key=key)).integers(0, self._vocab_size, self._length + 1)
        out[:] = ids[start : start + len(out)]
        return len(out)


Windows = StreamWindows | SyntheticWindows
"""Numbered windows of L + 1 ids; neighbours share one id."""
