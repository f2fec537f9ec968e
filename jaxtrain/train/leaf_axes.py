"""The array axes of a parameter leaf by their role, read from its logical dims, never from its name or sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from jaxtrain.sharding import Dims, is_dims

PyTree = Any
STACKING = ("chunk", "stage", "layer")
BATCH_DIMS = (*STACKING, "experts")  # leading dims of these names hold one matrix each


@dataclass(frozen=True)
class LeafAxes:
    """The array axes of a parameter leaf by their role."""

    layer: tuple[int, ...]
    """Axes of one layer's own parameter: all but the stacking."""
    inputs: tuple[int, ...]
    """Axes that the matrix product sums over; empty if the leaf is no matrix."""
    outputs: tuple[int, ...]
    """The other axes of the matrix; empty if the leaf is no matrix."""
    in_vocabulary: bool
    """Whether this is an embedding table or an output head."""

    @property
    def is_matrix(self) -> bool:
        """Return whether the leaf maps vectors to vectors. Norm scales and biases do not, those of a head [H, N] included."""
        return bool(self.inputs)

    @property
    def is_hidden_matrix(self) -> bool:
        """Return whether the leaf is a matrix, but neither an embedding table nor an output head: those that Muon updates."""
        return self.is_matrix and not self.in_vocabulary


def leaf_axes(dims: Dims) -> LeafAxes:
    """Return the axes of a leaf from its logical dims.

    After the leading stacking dims, "head_dim" belongs to the heads before it; of the rest the last group is the output and all
    before it the input: ("embed", "heads", "head_dim") is a matrix [D, (H N)], ("heads", "head_dim", "embed") is [(H N), D],
    ("norm",), and ("heads", "bias") for [H, N], are vectors.
    """
    first = next((i for i, name in enumerate(dims) if name not in BATCH_DIMS), len(dims))
    groups: list[list[int]] = []
    for axis in range(first, len(dims)):
        if dims[axis] == "head_dim" and groups and dims[axis - 1] in ("heads", "kv_heads"):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    is_table = "vocab" in dims or "positions" in dims
    if len(groups) < 2 or dims[-1] in ("norm", "bias"):
        return LeafAxes(tuple(range(first, len(dims))), (), (), is_table)
    outputs = tuple(groups[-1])
    return LeafAxes(tuple(range(first, len(dims))), tuple(range(first, outputs[0])), outputs, is_table)


def names_of_path(key_path: tuple) -> tuple[str, ...]:
    """Return the names on jax's way to a leaf."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in key_path)


def axes_tree(dims: PyTree) -> PyTree:
    """Return the `LeafAxes` of every leaf of a tree of dims."""
    return jax.tree.map(leaf_axes, dims, is_leaf=is_dims)
