"""Token files of Megatron-LM: a .bin of ids, and an .idx that says where its documents are.

The .idx, little-endian: "MMIDIDX\\0\\0"; version 1, uint64; the dtype's code, uint8; the number of sequences, uint64, and of
document boundaries, uint64; the sequences' lengths, int32; their first bytes in the .bin, int64; the first sequence of each
document and the number of all, int64. Modes of multimodal sequences, int8, may follow.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from jaxtrain.data.file_hashes import reading
from jaxtrain.data.store_path import SourcePath
from jaxtrain.data.store_tokens import StoreTokens
from jaxtrain.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
NOT_IDS = {6: "float64", 7: "float32"}
LOOKED_AT = 1000
"""Documents of which the last id is looked at."""
_HEADER = struct.Struct("<9sQBQQ")


class DocumentTokens:
    """Ids of documents with the separator put before each and after the last, as `token_stream` has them; not a copy."""

    def __init__(self, tokens: np.ndarray | StoreTokens, starts: np.ndarray, separator: int):
        """Take `starts`, [documents + 1]: where each document begins in `tokens`, and the end of the last."""
        self.tokens, self._starts, self._separator = tokens, starts, separator
        self._places = starts + np.arange(len(starts))  # of the separators
        self.dtype, self.nbytes = tokens.dtype, tokens.nbytes

    def __len__(self) -> int:
        return int(self._places[-1]) + 1

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(len(self))
        assert step == 1, "ids are read in order"
        ids = np.full(max(0, stop - start), self._separator, np.int64)
        for place, begin, end in self._spans(start, stop):
            ids[place - start : place - start + end - begin] = self.tokens[begin:end]
        return ids

    def fetch(self, spans: Sequence[tuple[int, int]]) -> None:
        """Fetch what the spans [start, stop) need, where the ids lie in a store."""
        if isinstance(self.tokens, StoreTokens):
            self.tokens.fetch([(begin, end) for span in spans for _, begin, end in self._spans(*span)])

    def _spans(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Return for each document in [start, stop): where its ids begin there, and their span in `tokens`."""
        first = max(0, int(self._places.searchsorted(start, side="right")) - 1)
        last = int(self._places.searchsorted(stop, side="left"))
        found = []
        for place, begin, end in zip(
            self._places[first:last].tolist(),
            self._starts[first:last].tolist(),
            self._starts[first + 1 : last + 1].tolist(),
            strict=False,
        ):
            offset = place + 1 - begin  # place of an id - its index in `tokens`
            begin, end = max(begin, start - offset), min(end, stop - offset)
            if begin < end:
                found.append((begin + offset, begin, end))
        return found


def read_index(path: SourcePath, size: int) -> tuple[np.dtype, np.ndarray]:
    """Return the dtype of a .bin of `size` bytes and where its documents begin, [documents + 1], in ids, by the .idx `path`.

    Raises DataError where the index is none, cut short, or does not describe so many bytes.
    """
    with reading(path), path.open("rb") as file:
        content = file.read()
    if not content.startswith(MAGIC):
        raise DataError(f"{path}: begins with {content[:9]!r}, not {MAGIC!r}: it is no index of Megatron's")
    if len(content) < _HEADER.size:
        raise DataError(f"{path}: {len(content)} bytes; the index is cut short")
    _, version, code, sequences, boundaries = _HEADER.unpack_from(content)
    if version != 1 or code not in DTYPES:
        what = f"version {version}" if version != 1 else f"dtype code {code} ({NOT_IDS.get(code, 'unknown')})"
        raise DataError(f"{path}: {what}; version 1 is read, with ids of dtype codes {', '.join(map(str, DTYPES))}")
    needed = _HEADER.size + 12 * sequences + 8 * boundaries
    if len(content) < needed:
        raise DataError(f"{path}: {len(content)} bytes, but {sequences} sequences and {boundaries - 1} documents take {needed}")
    lengths = np.frombuffer(content, "<i4", sequences, _HEADER.size)
    pointers = np.frombuffer(content, "<i8", sequences, _HEADER.size + 4 * sequences)
    documents = np.frombuffer(content, "<i8", boundaries, _HEADER.size + 12 * sequences)
    dtype = np.dtype(DTYPES[code])
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if (lengths < 0).any() or not np.array_equal(pointers, ends[:-1] * dtype.itemsize):
        raise DataError(f"{path}: its sequences do not follow one another in the .bin; make the pair again")
    if not boundaries or documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise DataError(f"{path}: its documents do not divide its {sequences} sequences; make the pair again")
    if size != ends[-1] * dtype.itemsize:
        raise DataError(
            f"{path.with_suffix('.bin')}: {size} bytes, but {path.name} says {ends[-1]} ids of {dtype} = "
            f"{ends[-1] * dtype.itemsize} bytes; the file is damaged or cut short"
        )
    return dtype, ends[documents]


def with_separators(
    tokens: np.ndarray | StoreTokens, starts: np.ndarray, separator: int
) -> np.ndarray | StoreTokens | DocumentTokens:
    """Return the ids with separators: as they are, where the first LOOKED_AT documents end with it, as by --append-eod."""
    ends = starts[1 : LOOKED_AT + 1][np.diff(starts[: LOOKED_AT + 1]) > 0].tolist()
    ids = tokens[0 : ends[-1] if ends else 0]
    if ends and all(ids[end - 1] == separator for end in ends):
        return tokens
    return DocumentTokens(tokens, starts, separator)
