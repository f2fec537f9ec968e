"""Control tokens by their names: found in a rendered conversation, and kept apart from text that only spells them."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any


class ControlWords:
    """The names of a tokenizer's control tokens, each with a mark in its place that no text holds."""

    def __init__(self, marks: Mapping[str, str]):
        """Take {name: mark}."""
        self._marks = dict(marks)
        names = "|".join(map(re.escape, sorted(marks, key=len, reverse=True)))
        self._name, self._start = re.compile(f"(?:{names})"), re.compile(f"(?=(?:{names}))(.)", re.DOTALL)
        self._apart = secrets.token_hex(16)

    def spell_apart(self, value: Any) -> Any:
        """Return a text, or what holds texts, such that no control token that it spells is one in `marked`."""
        if isinstance(value, str):
            return self._start.sub(lambda match: match[1] + self._apart, value) if self._name.search(value) else value
        if isinstance(value, dict):
            return {self.spell_apart(key): self.spell_apart(item) for key, item in value.items()}
        return [self.spell_apart(item) for item in value] if isinstance(value, list) else value

    def together(self, text: str) -> str:
        """Return a text as it was before `spell_apart`."""
        return text.replace(self._apart, "")

    def found(self, text: str) -> list[tuple[int, int]]:
        """Return (start, end) of each control token in a rendered text."""
        return [match.span() for match in self._name.finditer(text)]

    def marked(self, text: str) -> str:
        """Return a rendered text with each control token as its mark, and the others' spelling together again."""
        return self.together(self._name.sub(lambda match: self._marks[match.group()], text))

    def marked_with_cuts(self, text: str, cuts: Iterable[int]) -> tuple[str, dict[int, int]]:
        """Return `marked(text)` and where each of the given positions of `text` is in it; no control token holds a position."""
        places = sorted({0, *cuts, len(text)})
        pieces: Sequence[str] = [self.marked(text[a:b]) for a, b in pairwise(places)]
        moved, length = {0: 0}, 0
        for place, piece in zip(places[1:], pieces, strict=True):
            length += len(piece)
            moved[place] = length
        return "".join(pieces), moved
