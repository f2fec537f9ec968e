"""Rows of whole documents (`data.packing=best_fit`): fewer are cut than where a stream is cut into windows.

Ding et al. 2024 (arXiv:2404.10830): a document longer than a row gives full rows and a rest; the rests and the other documents
go into rows by `best_fit`, `GROUP` pieces in the order of the files at a time. Which row has which pieces is a function of
where the documents begin, computed once and kept on disk, mapped into memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxtrain.data.best_fit import best_fit
from jaxtrain.data.file_hashes import short_hash
from jaxtrain.data.packing import Batch, put
from jaxtrain.data.progress import progress
from jaxtrain.data.stage_order import Span
from jaxtrain.data.token_cache import made_once
from jaxtrain.data.token_part import TokenPart, Tokens, fetch, lie_in_store
from jaxtrain.data.token_split import separators_of
from jaxtrain.errors import DataError

GROUP = 1 << 18
PIECE = np.dtype([("part", "<i4"), ("begin", "<i8"), ("size", "<i4")])
"""Consecutive ids of a part that are the inputs of one document in a row."""
_FILES = ("pieces.npy", "ends.npy", "documents.npy")


class DocumentRows:
    """The rows of several parts: windows of a source, each read whole.

    A document of n ids, its separator included, takes n slots: the target of its last id is what follows in the file, the next
    separator.
    """

    def __init__(self, parts: Sequence[TokenPart], length: int, name: str, cache_dir: Path):
        """Find the documents of all parts and pack them, at first use. Raises DataError where the documents cannot be told."""
        self.separator = parts[0].separator if parts else -1
        if self.separator < 0:
            raise DataError(
                f"{name}: data.packing=best_fit packs documents, and these ids are one stream; give {name}.separator, or "
                "data.packing=stream"
            )
        self._tokens = [part.tokens for part in parts]
        key = short_hash(["best-fit-1", [part.sha256 for part in parts], self.separator, length])

        def opened() -> tuple[np.ndarray, ...]:
            try:
                return tuple(np.load(folder / file, mmap_mode="r" if file != _FILES[2] else None) for file in _FILES)
            except (OSError, ValueError) as error:
                raise DataError(str(error)) from error

        def make(folder: Path) -> None:
            for file, array in zip(_FILES, _packed(self._tokens, self.separator, length, f"packing {name}"), strict=True):
                np.save(folder / file, array)

        folder = cache_dir / "rows" / key
        self._pieces, self._ends, (documents, cut, cut_by_windows) = made_once(folder, opened, make)
        self.count, self.num_targets = len(self._ends), int(self._pieces["size"].sum())
        full = self.num_targets / max(self.count * length, 1)
        self.words = (
            f"rows {full:.1%} full by best fit, {cut / max(documents, 1):.1%} of documents cut, windows would cut "
            f"{cut_by_windows / max(documents, 1):.1%}"
        )

    def _of_row(self, row: int) -> list[tuple[int, int, int]]:
        pieces = self._pieces[int(self._ends[row - 1]) if row else 0 : int(self._ends[row])]
        return [(int(part), int(begin), int(size)) for part, begin, size in pieces]

    def fill(self, index: int, batch: Batch, row: int) -> None:
        """Write row `index` into row `row` of a batch, which is padding so far."""
        place = 0
        for segment, (part, begin, size) in enumerate(self._of_row(index), 1):
            ids = self._tokens[part][begin : begin + size + 1]
            place = put(batch, row, place, segment, ids[:-1], ids[1:])

    @property
    def lie_in_store(self) -> bool:
        """Return whether rows are fetched over a network."""
        return any(map(lie_in_store, self._tokens))

    def fetch(self, spans: Sequence[Span]) -> None:
        """Fetch at the same time what lies in a store of some rows, each a span's block; `fill` would fetch piece by piece."""
        pieces = (piece for span in spans for piece in self._of_row(span.block))
        fetch(self._tokens, ((part, begin, begin + size + 1) for part, begin, size in pieces))


def _packed(files: Sequence[Tokens], separator: int, length: int, title: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pieces in the order of the rows; the number of pieces up to the end of each row; and the counts of documents,
    of those that are cut, and of those that windows of a stream would cut.
    """
    found, counts = [], np.zeros(3, np.int64)
    with progress(title, sum(map(len, files)), "ids") as advance:
        for number, tokens in enumerate(files):
            begins = np.union1d([0], separators_of(tokens, separator)) if len(tokens) > 1 else np.zeros(0, np.int64)
            sizes = np.diff(begins, append=max(len(tokens) - 1, 0))  # the last id is only a target
            begins, sizes = begins[sizes > 0], sizes[sizes > 0]
            counts += len(begins), (sizes > length).sum(), (begins // length != (begins + sizes - 1) // length).sum()
            parts = -(-sizes // length)
            piece = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
            whole = np.zeros(len(piece), PIECE)
            whole["part"], whole["begin"] = number, np.repeat(begins, parts) + piece * length
            whole["size"] = np.minimum(np.repeat(sizes, parts) - piece * length, length)
            found.append(whole)
            advance(len(tokens))
    pieces = np.concatenate(found) if found else np.zeros(0, PIECE)
    order, ends = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for first in range(0, len(pieces), GROUP):
        rows = best_fit(pieces["size"][first : first + GROUP].astype(np.int64), length)
        order.append(np.concatenate(rows) + first)
        ends.append(np.cumsum([len(row) for row in rows]) + first)
    return pieces[np.concatenate(order)], np.concatenate(ends), counts
