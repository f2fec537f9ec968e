"""The table of a family's weights: which tensor of a file is which part of which of our parameters. Read in both directions.

Our parameters are named by their path in canonical form: "outer/table", "layers/attention/query", "outer/first_layers/mlp/up".
A file's tensor is named by a template: {layer} is the number of the layer from the bottom of the model, {expert} that of the
expert, which is then the first axis of our parameter.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtrain.config import ModelConfig
from jaxtrain.huggingface.axes import AxisPart, copy, names_of, narrowed, parse, shape_of, view

FIRST = "outer/first_layers/"
"""Path of the dense layers before a mixture of experts."""


@dataclass(frozen=True)
class Row:
    """One entry: a part of our parameter is a part of their tensor."""

    ours: str
    theirs: str
    axes: str
    """Pattern of `axes.py`, of one layer and, with {expert}, of one expert."""
    dtype: str = ""
    """Dtype in files; empty: the folder's."""

    @property
    def per_expert(self) -> bool:
        """Return whether each expert has a tensor of its own."""
        return "{expert}" in self.theirs


Fetch = Callable[[str, tuple[slice, ...]], np.ndarray]
"""(name of a file's tensor, slices of its axes) -> the numbers."""


def sizes_of(model: ModelConfig) -> dict[str, int]:
    """Return the sizes of the letters in the patterns.

    D width, H heads, K kv heads, N width of a head, F of the MLP, V vocabulary, P learned positions; E experts, X width of an
    expert, S of the shared experts; with latent attention Q and C the ranks, R width of the rotated part, p R / 2, M of a
    value. Where neighbours of a whole head are rotated, p is N / 2. r is the rank of adapters.
    """
    sizes = {"D": model.embed_dim, "H": model.num_heads, "K": model.num_kv_heads, "N": model.head_dim, "F": model.mlp_dim}
    sizes |= {"V": model.vocab_size, "P": model.learned_positions, "p": model.head_dim // 2}
    sizes["r"] = model.adapters.rank
    if moe := model.moe:
        sizes |= {"E": moe.num_experts, "X": moe.mlp_dim, "S": moe.shared_experts * moe.mlp_dim}
    if latent := model.latent_attention:
        sizes |= {"Q": latent.query_rank, "C": latent.kv_rank, "R": latent.rope_dim, "M": latent.value_dim}
        sizes |= {"p": latent.rope_dim // 2}
    return sizes


class Table:
    """The rows of a family for a model of these sizes."""

    def __init__(self, rows: Sequence[Row], model: ModelConfig):
        self.rows, self.sizes = tuple(rows), sizes_of(model)
        self._layers = {"outer": 1, "first": model.first_dense_layers, "layers": model.stacked_layers}
        self._below = model.first_dense_layers
        self._of_ours: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            self._of_ours[row.ours].append(row)

    def names(self, row: Row, layer: int | None = None) -> Iterator[tuple[str, int, int]]:
        """Yield (name of a file's tensor, layer of our stack, expert) for a row, of all its layers or one."""
        below = self._below if row.ours.startswith("layers/") else 0
        for number in range(self.count(row.ours)) if layer is None else [layer]:
            for expert in range(self.sizes["E"] if row.per_expert else 1):
                yield row.theirs.format(layer=number + below, expert=expert), number, expert

    def count(self, ours: str) -> int:
        """Return the layers in the stack that a parameter of ours is part of; 1 where it is in none."""
        return self._layers["first" if ours.startswith(FIRST) else ours.partition("/")[0]]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of a folder, by name."""
        return {name: shape_of(parse(row.axes)[0], self.sizes) for row in self.rows for name, _, _ in self.names(row)}

    def dtypes(self, dtype: str) -> dict[str, str]:
        """Return the dtype of every tensor of a folder whose own is `dtype`."""
        return {name: row.dtype or dtype for row in self.rows for name, _, _ in self.names(row)}

    def shape_of_ours(self, ours: str) -> tuple[int, ...]:
        """Return the shape of one layer's part of our parameter."""
        row = self._of_ours[ours][0]
        lead = (self.sizes["E"],) if row.per_expert else ()
        return lead + shape_of(parse(row.axes)[1], self.sizes)

    def axes(self, ours: str) -> list[str]:
        """Return the names of each axis of one layer's part of our parameter, as letters."""
        row = self._of_ours[ours][0]
        return ["E"] * row.per_expert + ["".join(names_of((axis,))) for axis in parse(row.axes)[1]]

    @property
    def parameters(self) -> tuple[str, ...]:
        """The paths of our parameters."""
        return tuple(self._of_ours)

    def read(self, ours: str, layer: int, index: tuple[slice, ...], out: np.ndarray, fetch: Fetch) -> None:
        """Fill `out` with a slice of one layer's part of our parameter, reading no more of the files than rows that hold it.

        Args:
          layer: number in our stack.
          index: slices of that part, without steps.
          out: of the slice's shape, in the dtype to hold.
        """
        whole = self.shape_of_ours(ours)
        bounds = [part.indices(size)[:2] for part, size in zip(index, whole, strict=True)]
        for row in self._of_ours[ours]:
            if not row.per_expert:
                self._read_row(row, next(self.names(row, layer))[0], bounds, out, fetch)
                continue
            (first, last), *inner = bounds
            for name, _, expert in self.names(row, layer):
                if first <= expert < last:
                    self._read_row(row, name, inner, out[expert - first], fetch)

    def _read_row(self, row: Row, name: str, bounds: Sequence[tuple[int, int]], out: np.ndarray, fetch: Fetch) -> None:
        theirs, ours = parse(row.axes)
        shape, ranges = shape_of(ours, self.sizes), {}
        for axis, size, (start, stop) in zip(ours, shape, bounds, strict=True):
            if (start, stop) == (0, size):
                continue
            part, *inner = axis
            if inner or len(part.pieces) > 1 or len(part.names) != 1:  # no mesh axis shards such a dim
                raise ValueError(f"{row.ours}: {row.axes} cannot be cut at {start}:{stop}")
            ranges[part.names[0]] = (start, stop)
        slices, read, honoured = [], [], set()
        for axis in theirs:
            (start, stop), alone, done = narrowed(axis, ranges, self.sizes)
            slices.append(slice(start, stop))
            read.append(alone)
            honoured |= done
        cut = self.sizes | {letter: stop - start for letter, (start, stop) in ranges.items()}
        held = self.sizes | {letter: cut[letter] for letter in honoured}
        array = view(fetch(name, tuple(slices)), tuple(read), held)
        names = names_of(tuple(read))
        array = array[tuple(slice(*ranges[n]) if n in ranges and n not in honoured else slice(None) for n in names)]
        plain = tuple((AxisPart((n,), ((n,),), 0),) for n in names)
        copy(array, plain, out, ours, cut)

    def write(self, theirs: str, get: Callable[[str, int, int | None], np.ndarray], dtype: Any) -> np.ndarray:
        """Return a file's tensor, put together from our parameters.

        Args:
          get: (path of our parameter, layer of our stack, expert or None) -> its numbers, of that layer and expert.
        """
        rows = self._of_theirs[theirs]
        target = np.empty(shape_of(parse(rows[0][0].axes)[0], self.sizes), dtype)
        for row, layer, expert in rows:
            left, right = parse(row.axes)
            copy(get(row.ours, layer, expert if row.per_expert else None), right, target, left, self.sizes)
        return target

    def groups(self) -> Iterator[tuple[list[str], list[str]]]:
        """Yield (paths of our parameters, names of their tensors) that can be written without any others."""
        left = dict(self._of_ours)
        while left:
            ours, theirs = [next(iter(left))], dict[str, None]()
            for path in ours:  # grows
                for row in left.pop(path):
                    theirs |= dict.fromkeys(name for name, _, _ in self.names(row))
                    sharing = dict.fromkeys(other.ours for other in self.rows if other.theirs == row.theirs)
                    ours += [other for other in sharing if other not in ours]
            yield ours, list(theirs)

    @functools.cached_property
    def _of_theirs(self) -> dict[str, list[tuple[Row, int, int]]]:
        """(row, layer of our stack, expert) of every part of each of a file's tensors."""
        found: dict[str, list[tuple[Row, int, int]]] = defaultdict(list)
        for row in self.rows:
            for name, layer, expert in self.names(row):
                found[name].append((row, layer, expert))
        return found
