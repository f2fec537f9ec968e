"""Cut a token stream into sequences, and mark where its documents begin.

Shapes: R rows (sequences), L length of a sequence.
"""

from __future__ import annotations

import numpy as np

from jaxtrain.data.token_part import Tokens

Ids = np.ndarray | list[int]
Batch = dict[str, np.ndarray]
"""int32 arrays, each [R, L]: `tokens`; `targets`, the token that follows each (-1 where there is no loss); `segments`,
the number of the document inside the row (1, 2, ...; 0 for padding); `positions`, counted from 0 in each document."""

NO_TARGET = -1


def num_full_windows(num_tokens: int, length: int) -> int:
    """Return how many windows of `length` inputs, each with its next token, a stream of `num_tokens` fills."""
    return max(0, num_tokens - 1) // length


def num_padded_windows(num_tokens: int, length: int) -> int:
    """Return how many windows hold every target of a stream, the last one padded."""
    return -(-max(0, num_tokens - 1) // length)


def read_window(stream: Tokens, begin: int, out: np.ndarray) -> int:
    """Copy stream[begin : begin + L + 1] into `out`, [L + 1], and return the number of tokens copied."""
    window = stream[begin : begin + len(out)]
    out[: len(window)] = window
    return len(window)


def pack(windows: np.ndarray, sizes: np.ndarray, separators: np.ndarray, mask_documents: bool) -> Batch:
    """Return a batch from windows of a stream.

    windows: [R, L + 1] ids. sizes: [R], how many ids of a row are real; the others become padding (tokens and segments 0,
    targets -1). separators: [R], the id that begins a new document in that row and belongs to it; what precedes the first
    separator is a document too. Without `mask_documents` a row is one document: segments 1 and positions 0 to L-1.
    """
    rows, length = windows.shape[0], windows.shape[1] - 1
    tokens, targets = windows[:, :-1].astype(np.int32), windows[:, 1:].astype(np.int32)  # copies: the two overlap
    index = np.arange(length, dtype=np.int32)
    if mask_documents:
        begins = tokens == separators[:, None]
        begins[:, 0] = True
        segments = np.cumsum(begins, axis=1, dtype=np.int32)
        positions = index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    else:
        segments = np.ones((rows, length), np.int32)
        positions = np.broadcast_to(index, (rows, length)).copy()
    batch = {"tokens": tokens, "targets": targets, "positions": positions, "segments": segments}
    if (sizes <= length).any():
        padding = index >= np.maximum(sizes - 1, 0)[:, None]
        for name, array in batch.items():
            array[padding] = NO_TARGET if name == "targets" else 0
    return batch


def joined(parts: list[Batch], length: int, mask_documents: bool) -> Batch:
    """Return one row of `length` from the rows of `parts`, each [1, n], one after the other; the rest is padding.

    Each begins a document, or without `mask_documents` all are one.
    """
    row = {name: np.concatenate([part[name][0] for part in parts]) for name in parts[0]}
    if mask_documents:
        before = np.cumsum([0, *(part["segments"].max() for part in parts[:-1])])
        row["segments"] += np.repeat(before, [part["segments"].shape[1] for part in parts]).astype(np.int32)
    else:
        row["positions"] = np.arange(len(row["tokens"]), dtype=np.int32)
    missing = length - len(row["tokens"])
    return {name: np.pad(a, (0, missing), constant_values=NO_TARGET if name == "targets" else 0) for name, a in row.items()}


def put(batch: Batch, row: int, place: int, segment: int, tokens: Ids, targets: Ids) -> int:
    """Write a document into a row of a batch from `place` on, where it is padding so far; return the place after it."""
    stretch = slice(place, place + len(tokens))
    batch["tokens"][row, stretch], batch["targets"][row, stretch] = tokens, targets
    batch["positions"][row, stretch], batch["segments"][row, stretch] = np.arange(len(tokens)), segment
    return stretch.stop


def document_start(ids: np.ndarray, separator: int, length: int) -> int:
    """Return the position of the first document of at least `length` ids (its separator); 0 if there is none."""
    starts = np.flatnonzero(ids == separator)
    long_enough = np.flatnonzero(np.diff(starts) > length)
    return int(starts[long_enough[0]]) if long_enough.size else 0
