"""Sources as numbered windows of ids: cut from token streams, or synthetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from jaxtrain.data.packing import num_full_windows, num_padded_windows, read_window
from jaxtrain.data.token_part import TokenPart, lie_in_store

SYNTHETIC_WINDOWS = 2**31 - 1
SYNTHETIC_VALIDATION_WINDOWS = 64


class Windows(Protocol):
    """Numbered windows of L + 1 ids; neighbours share one id."""

    count: int
    """Number of windows."""
    num_targets: int
    """Number of tokens that the windows predict."""
    separator: int
    """The id that begins a document; -1: none."""

    def read(self, index: int, out: np.ndarray) -> int:
        """Copy window `index` into `out`, [L + 1], and return how many ids it has."""
        ...


class StreamWindows:
    """The windows of several parts, one part after the other; a window never reaches into the next part."""

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

    def read(self, index: int, out: np.ndarray) -> int:
        part = int(self._ends.searchsorted(index, side="right"))
        first = int(self._ends[part - 1]) if part else 0
        return read_window(self._parts[part].tokens, index - first, out)

    @property
    def lie_in_store(self) -> bool:
        """Return whether windows are fetched over a network."""
        return any(lie_in_store(part.tokens) for part in self._parts)

    def fetch(self, indices: Sequence[int]) -> None:
        """Fetch what windows need that lie in a store, at the same time; `read` would fetch one after the other."""
        wanted: dict[int, list[tuple[int, int]]] = {}
        for index in indices:
            part = int(self._ends.searchsorted(index, side="right"))
            start = (index - (int(self._ends[part - 1]) if part else 0)) * self._length
            wanted.setdefault(part, []).append((start, start + self._length + 1))
        for part, spans in wanted.items():
            if not isinstance(tokens := self._parts[part].tokens, np.ndarray):
                tokens.fetch(spans)


class SyntheticWindows:
    """Uniformly random ids, a pure function of (seed, window index)."""

    separator = -1

    def __init__(self, seed: int, vocab_size: int, length: int, first: int, count: int):
        """Take windows first to first + count - 1 of the endless sequence of `seed`."""
        self._seed, self._vocab_size, self._first = seed, vocab_size, first
        self.count, self.num_targets = count, count * length

    def read(self, index: int, out: np.ndarray) -> int:
        key = np.array([self._seed % 2**64, self._first + index], dtype=np.uint64)
        out[:] = np.random.Generator(np.random.Philox(key=key)).integers(0, self._vocab_size, len(out))
        return len(out)
