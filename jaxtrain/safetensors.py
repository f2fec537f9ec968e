"""Safetensors files: arrays by name, without executable content. Every header is checked before a byte of data is read.

The format (github.com/huggingface/safetensors): 8 bytes, the header's length as a little-endian integer; the header, a JSON
object {name: {"dtype", "shape", "data_offsets": [begin, end]}}, and under "__metadata__" strings by string; then the arrays'
bytes, little-endian and row-major, contiguous, at those offsets.

A file is refused if any of this does not hold exactly: a header longer than the file or than 100 MB, duplicate keys, an unknown
dtype, a shape that does not fill its span, arrays that overlap, leave holes, or end elsewhere than the file. (A reader that
trusts shapes may return unrelated memory.)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxtrain.errors import ExplainedError, nearest
from jaxtrain.files import replacing

LONGEST_HEADER = 100_000_000
MOST_DIMS = 32  # of NumPy arrays, before 2.0
METADATA = "__metadata__"
ALIGNMENT = 8
DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class SafetensorsError(ExplainedError):
    """A file is not a safetensors file, or not a whole one."""


@dataclass(frozen=True)
class StoredArray:
    """The position of one array."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    """Offset of its first byte from the start of the file."""
    end: int


class Safetensors:
    """A file with a checked header: arrays by name, each read on access.

    Raises:
      SafetensorsError: the file violates the format; says how.
    """

    def __init__(self, path: os.PathLike | str):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.entries, self.metadata = _parse(file.read(8), file.read, size)
        except OSError as error:
            raise SafetensorsError(f"{self.path} cannot be read: {error.strerror}") from error
        except _Refused as refused:
            raise SafetensorsError(f"{self.path} is not a whole safetensors file: {refused}") from None

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __getitem__(self, name: str) -> np.ndarray:
        """Return the array of that name.

        Raises:
          SafetensorsError: there is none; or the file was cut short since its header was read.
        """
        if name not in self.entries:
            raise SafetensorsError(f"{self.path} has no array {name!r}: {nearest(name, list(self.entries)[:50])}")
        entry = self.entries[name]
        raw = np.empty(entry.end - entry.begin, np.uint8)
        try:
            with open(self.path, "rb") as file:
                file.seek(entry.begin)
                count = file.readinto(raw.data) if raw.size else 0
        except OSError as error:
            raise SafetensorsError(f"{self.path} cannot be read: {error.strerror}") from error
        if count != raw.size:
            raise SafetensorsError(f"{self.path} ends inside {name!r}: it was cut short while it was read")
        return raw.view(entry.dtype).reshape(entry.shape)


def write_safetensors(path: os.PathLike | str, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a file atomically and durably.

    Raises:
      ValueError: a dtype that the format does not have, or a reserved name.
      OSError: it cannot be written.
    """
    header: dict[str, Any] = {METADATA: dict(metadata)}
    place = 0
    for name, array in arrays.items():
        if array.dtype not in _NAMES or name == METADATA:
            raise ValueError(f"array {name!r} of {array.dtype} cannot be written: {nearest(name, _NAMES.values())}")
        begin, place = place, place + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, place]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with replacing(path, durable=True) as beside, open(beside, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


class _Refused(Exception):
    """The fault of a file."""


def _parse(first: bytes, read: Any, size: int) -> tuple[dict[str, StoredArray], dict[str, str]]:
    """(entries in the order of their bytes, metadata) of a file of `size` bytes, of which the first 8 are read."""
    if len(first) < 8:
        raise _Refused(f"it has {size} bytes, and the header's length alone takes 8")
    length = int.from_bytes(first, "little")
    if length > min(size - 8, LONGEST_HEADER):
        raise _Refused(f"its header would have {length:,} bytes, of a file of {size:,} and of {LONGEST_HEADER:,} at most")
    header = _header(read(length), length)
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Refused(f"{METADATA} does not hold strings")
    entries = {name: _entry(name, value) for name, value in header.items()}
    place = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != place:
            what = "overlaps the one before" if entry.begin < place else "leaves a hole before it"
            raise _Refused(f"{_short(name)} begins at byte {entry.begin:,} of the data and not at {place:,}: it {what}")
        place = entry.end
    if place != size - 8 - length:
        raise _Refused(f"its arrays take {place:,} bytes, and {size - 8 - length:,} are there")
    start = 8 + length
    moved = {n: StoredArray(e.dtype, e.shape, e.begin + start, e.end + start) for n, e in entries.items()}
    return dict(sorted(moved.items(), key=lambda item: item[1].begin)), metadata


def _header(text: bytes, length: int) -> dict[str, Any]:
    """Return the JSON object of a header."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise _Refused("its header has a key twice")
        return dict(pairs)

    if len(text) < length or not text.startswith(b"{"):
        raise _Refused("its header does not begin with {")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise _Refused(f"its header is not JSON ({str(error)[:100]})") from None
    if not isinstance(header, dict):
        raise _Refused("its header is not an object")
    return header


def _entry(name: str, value: Any) -> StoredArray:
    """Return the header's entry of one array, checked; offsets from the start of the data."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Refused(f"{_short(name)} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Refused(f"{_short(name)} is of dtype {_short(dtype)}: {nearest(_short(dtype), DTYPES)}")
    if not _are_counts(shape) or len(shape) > MOST_DIMS:
        raise _Refused(f"the shape of {_short(name)} is {_short(shape)}: up to {MOST_DIMS} whole numbers from 0")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Refused(
            f"the offsets of {_short(name)} are {_short(offsets)}: two whole numbers, the first not above the second"
        )
    held, needed = offsets[1] - offsets[0], math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if held != needed:
        raise _Refused(f"{_short(name)} of {dtype}{_short(shape)} takes {needed:,} bytes, and its offsets hold {held:,}")
    return StoredArray(np.dtype(DTYPES[dtype]), tuple(shape), *offsets)


def _are_counts(value: Any) -> bool:
    """Return whether it is a list of whole numbers from 0 below 2^63."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
