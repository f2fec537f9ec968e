"""A source of the mixture, opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtrain.data.chat_store import StoredSamples
from jaxtrain.data.chat_windows import PackedRows
from jaxtrain.data.document_rows import DocumentRows
from jaxtrain.data.token_part import TokenPart
from jaxtrain.data.windows import Windows

Rows = Windows | PackedRows | DocumentRows


@dataclass(frozen=True)
class OpenSource:
    """One source of the mixture, or a set of data.validation, ready to read. `identity` is its part of the fingerprint."""

    words: str
    weight: float
    train: Rows
    validation: Rows
    identity: object
    validation_parts: tuple[TokenPart, ...] = ()
    split_rules: frozenset[str] = frozenset()
    chat: StoredSamples | None = None


def text_bytes(sources: Sequence[OpenSource]) -> int:
    """Return the UTF-8 bytes of the held-out documents of some sources; 0 where unknown."""
    parts = [part for source in sources for part in source.validation_parts if len(part.tokens) > 1]
    is_text = all(part.utf8_bytes for part in parts) and not any(isinstance(s.validation, PackedRows) for s in sources)
    return sum(part.utf8_bytes for part in parts) if is_text else 0
