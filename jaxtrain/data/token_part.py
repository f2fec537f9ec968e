"""Stretches of ids, each cut into windows by itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxtrain.data.megatron import DocumentTokens
from jaxtrain.data.store_tokens import StoreTokens

FileTokens = np.ndarray | StoreTokens | DocumentTokens
"""The ids of a file, [count]: mapped into memory, or behind a URL, or with separators between its documents."""


class JoinedTokens:
    """Spans of an array of ids, joined without a copy; has a length and can be sliced."""

    def __init__(self, tokens: FileTokens, spans: np.ndarray):
        """Take `spans`, [n, 2]: the first index of each and the one after its last."""
        self.tokens, self._spans = tokens, spans
        self._ends = np.cumsum(spans[:, 1] - spans[:, 0])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(len(self))
        assert step == 1, "ids are read in order"
        if start >= stop:
            return self.tokens[:0]
        first, last = self._ends.searchsorted((start, stop - 1), side="right").tolist()
        # Index in the joined ids - index in the array, of the first span and of the last.
        offset, last_offset = (int(self._ends[i] - self._spans[i, 1]) for i in (first, last))
        if first == last:
            return self.tokens[start - offset : stop - offset]
        middle = [self.tokens[begin:end] for begin, end in self._spans[first + 1 : last].tolist()]
        ends = self.tokens[start - offset : self._spans[first, 1]], self.tokens[self._spans[last, 0] : stop - last_offset]
        return np.concatenate([ends[0], *middle, ends[1]])

    def fetch(self, spans: Sequence[tuple[int, int]]) -> None:
        """Fetch what the joined spans [start, stop) need, where the array lies in a store."""
        if isinstance(self.tokens, np.ndarray):
            return
        wanted = []
        for start, stop in spans:
            first, last = self._ends.searchsorted((start, min(stop, len(self)) - 1), side="right").tolist()
            for (begin, end), joined_end in zip(self._spans[first : last + 1], self._ends[first : last + 1], strict=True):
                offset = joined_end - end
                wanted.append((int(max(begin, start - offset)), int(min(end, stop - offset))))
        self.tokens.fetch(wanted)


Tokens = FileTokens | JoinedTokens


def lie_in_store(tokens: Tokens) -> bool:
    """Return whether ids are fetched over a network."""
    return lie_in_store(tokens.tokens) if isinstance(tokens, JoinedTokens | DocumentTokens) else isinstance(tokens, StoreTokens)


def fetch(tokens: Sequence[Tokens], spans: Iterable[tuple[int, int, int]]) -> None:
    """Fetch what lies in a store of spans (number of `tokens`, first id, the one after the last), those of each at the same
    time; reading them would fetch one by one.
    """
    wanted: dict[int, list[tuple[int, int]]] = {}
    for number, start, stop in spans:
        wanted.setdefault(number, []).append((start, stop))
    for number, stretches in wanted.items():
        if not isinstance(own := tokens[number], np.ndarray):
            own.fetch(stretches)


def stretch_of(tokens: FileTokens, start: int, stop: int) -> Tokens:
    """Return the ids [start, stop), which are not read yet."""
    return tokens[start:stop] if isinstance(tokens, np.ndarray) else JoinedTokens(tokens, np.array([[start, stop]]))


@dataclass(frozen=True)
class TokenPart:
    """A stretch of ids, [count], that is cut into windows by itself.

    `largest_id` is -1 if the ids were never checked. `utf8_bytes`, `gzip_bytes` and `gzip_input_bytes` describe the text that
    the ids came from (0: unknown), as does `split_rule` (see `split`; empty: unknown).
    """

    tokens: Tokens
    sha256: str
    separator: int
    largest_id: int = -1
    utf8_bytes: int = 0
    gzip_bytes: int = 0
    gzip_input_bytes: int = 0
    split_rule: str = ""
