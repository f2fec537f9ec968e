"""Stretches of ids, each cut into windows by itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxtrain.data.token_stream import TokenStream


class JoinedTokens:
    """Spans of an array of ids, joined without a copy; has a length and can be sliced."""

    def __init__(self, tokens: np.ndarray, spans: np.ndarray):
        """Take `spans`, [n, 2]: the first index of each and the one after its last."""
        self._tokens, self._spans = tokens, spans
        self._ends = np.cumsum(spans[:, 1] - spans[:, 0])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(len(self))
        assert step == 1, "ids are read in order"
        pieces = []
        first = np.searchsorted(self._ends, start, side="right")
        for (begin, end), joined_end in zip(self._spans[first:], self._ends[first:], strict=True):
            offset = joined_end - end  # index in the joined ids - index in the array
            if begin + offset >= stop:
                break
            pieces.append(self._tokens[max(begin, start - offset) : min(end, stop - offset)])
        return np.concatenate(pieces) if pieces else self._tokens[:0]


@dataclass(frozen=True)
class TokenPart:
    """A stretch of ids, [count], that is cut into windows by itself.

    `largest_id` is -1 if the ids were never checked. `utf8_bytes`, `gzip_bytes` and `gzip_input_bytes` describe the text that
    the ids came from (0: unknown), as does `split_rule` (see `split`; empty: unknown).
    """

    tokens: np.ndarray | JoinedTokens
    sha256: str
    separator: int
    largest_id: int = -1
    utf8_bytes: int = 0
    gzip_bytes: int = 0
    gzip_input_bytes: int = 0
    split_rule: str = ""


def part_of_stream(stream: TokenStream) -> TokenPart:
    """Return a whole stream as one part."""
    data = stream.metadata
    gzip = data.gzip_bytes, data.gzip_input_bytes
    return TokenPart(
        stream.tokens, data.sha256, data.separator, data.largest_id, data.utf8_bytes, *gzip, split_rule=data.split_rule
    )
