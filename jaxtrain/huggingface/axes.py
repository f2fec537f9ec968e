"""Axes patterns, "(H N) D -> D H N": how a tensor of a HuggingFace file lies in one of our arrays. Exact in bits both ways.

Left stand the axes of their tensor, right those of ours, separated by blanks. An axis is

    D            a letter, whose size the caller gives;
    2            a number, an axis of that size;
    (H N)        several axes in one, the first varying slowest;
    1/3          one slice of an axis of 3 (in the file of a fused tensor);
    [HN]+KN+KN   one piece, in brackets, of pieces that lie behind one another; letters inside a piece are axes in one.

So "(H 1/3 N) D -> D H N" are the keys in GPT-NeoX's fused projection, and "(H (N+[p2])) C -> C H N+[2p]" the part of DeepSeek's
queries whose neighbours p are rotated together, where ours pairs halves.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Range = tuple[int, int]
Ranges = Mapping[str, Range]
Sizes = Mapping[str, int]
CACHED_BYTES = 1 << 20
"""Bytes of the rows that `copy` transposes at a time."""


@dataclass(frozen=True)
class AxisPart:
    """A part of an axis: `names` are the axes in it; of `pieces` (products of axes) it is number `chosen`."""

    names: tuple[str, ...]
    pieces: tuple[tuple[str, ...], ...]
    chosen: int

    def bounds(self, sizes: Sizes) -> Range:
        """Return where the piece begins and ends."""
        widths = [_product(piece, sizes) for piece in self.pieces]
        start = sum(widths[: self.chosen])
        return start, start + widths[self.chosen]

    def width(self, sizes: Sizes) -> int:
        """Return the size of the whole axis."""
        return sum(_product(piece, sizes) for piece in self.pieces)


Axis = tuple[AxisPart, ...]


def _size(name: str, sizes: Sizes) -> int:
    return int(name) if name.isdigit() else sizes[name]


def _product(names: tuple[str, ...], sizes: Sizes) -> int:
    return math.prod(_size(name, sizes) for name in names)


def _piece(word: str) -> AxisPart:
    if "/" in word:
        chosen, count = word.split("/")
        return AxisPart((), ((),) * int(count), int(chosen))
    parts = word.split("+")
    if len(parts) == 1:
        return AxisPart((word,), ((word,),), 0)
    pieces = tuple(tuple(part.strip("[]")) for part in parts)
    (chosen,) = (number for number, part in enumerate(parts) if part.startswith("["))
    return AxisPart(pieces[chosen], pieces, chosen)


@functools.lru_cache(maxsize=512)
def parse(pattern: str) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """Return the axes of their tensor and of ours."""

    def side(text: str) -> tuple[Axis, ...]:
        words = re.findall(r"\([^)]*\)|\S+", text)
        return tuple(tuple(_piece(part) for part in word.strip("()").split()) for word in words)

    theirs, ours = pattern.split("->")
    return side(theirs), side(ours)


def shape_of(axes: tuple[Axis, ...], sizes: Sizes) -> tuple[int, ...]:
    """Return the shape of the whole tensor."""
    return tuple(math.prod(piece.width(sizes) for piece in axis) for axis in axes)


def names_of(axes: tuple[Axis, ...]) -> list[str]:
    """Return the names of the axes that `view` gives."""
    return [name for axis in axes for piece in axis for name in piece.names]


def view(array: np.ndarray, axes: tuple[Axis, ...], sizes: Sizes) -> np.ndarray:
    """Return a view of a whole tensor, cut to its pieces, with one axis for each name in `names_of`, in that order."""
    pieces = [piece for axis in axes for piece in axis]
    cut = array.reshape([piece.width(sizes) for piece in pieces])[tuple(slice(*piece.bounds(sizes)) for piece in pieces)]
    return cut.reshape([_size(name, sizes) for name in names_of(axes)])  # axes are only split, so this is a view too


def copy(source: np.ndarray, source_axes: tuple[Axis, ...], target: np.ndarray, target_axes: tuple[Axis, ...], sizes: Sizes):
    """Copy the piece of `source` that its axes name to the place in `target` that its axes name, in the target's dtype.

    Rows that a cache holds are cast and then transposed: 2 to 5 times as fast as all at once (2,048 x 8,192 numbers).
    """
    order = [names_of(source_axes).index(name) for name in names_of(target_axes)]
    found, place = view(source, source_axes, sizes), view(target, target_axes, sizes)
    if order == sorted(order):
        place[...] = found
        return
    rows = max(1, CACHED_BYTES // max(1, math.prod(found.shape[1:]) * place.itemsize))
    for start in range(0, len(found), rows):
        part = slice(start, start + rows)
        place[(*[slice(None)] * order.index(0), part)] = found[part].astype(place.dtype).transpose(order)


def narrowed(axis: Axis, ranges: Ranges, sizes: Sizes) -> tuple[Range, Axis, set[str]]:
    """Return the shortest range of whole rows of an axis that holds what `ranges` asks for.

    Returns:
      the range, the axis that it is by itself, and the names whose ranges it honours: at most the one that varies slowest.
    """
    piece, *inner = axis
    below = math.prod(part.width(sizes) for part in inner)
    start, stop = piece.bounds(sizes)
    honoured = {name for name in piece.names[:1] if name in ranges}
    for name in honoured:
        unit = _product(piece.names[1:], sizes)
        start, stop = start + ranges[name][0] * unit, start + ranges[name][1] * unit
    return (start * below, stop * below), (AxisPart(piece.names, (piece.names,), 0), *inner), honoured
