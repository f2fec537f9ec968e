"""How the devices of a mesh share the matrices that Muon orthogonalises; trainer and planner both read it here.

A matrix is orthogonalised whole, on one device. Each device holds a shard of every matrix of its stage, so one all-to-all over
the axes that cut a matrix (fsdp, tensor) brings each device whole matrices of its share of the layers, and a second one takes
the results back: with n matrices on c devices, n / c on each, in place of all n in shards. Devices along other axes hold copies
of the same shards; they divide the matrices further, and an all-gather over those axes brings the results together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxtrain.config import MESH_AXES
from jaxtrain.sharding import RULES, Dims
from jaxtrain.train.leaf_axes import leaf_axes

MUON_ITERATIONS = 5
NUMBERS_AT_ONCE = 2**25
"""Numbers of the matrices that a device orthogonalises at once: enough to fill a GPU; more would only take memory."""
SHARED_ROWS = 512
"""Shorter side from which copies share the work. For a matrix of shorter side r an iteration is at least 6 r^2 s FLOPs, so all
five are 15 r for each byte of bfloat16 that is gathered; a GPU does about 8,000 FLOPs while its NIC sends one byte."""


@dataclass(frozen=True)
class Share:
    """Matrices of the same size and cut, of one or several leaves, and how the devices share them."""

    leaves: tuple[int, ...]
    """Numbers of the leaves."""
    transposed: tuple[bool, ...]
    """For each leaf, whether its rows are its outputs."""
    rows: int
    """Of a whole matrix."""
    columns: int
    row_axes: tuple[str, ...]
    """Mesh axes that cut the rows."""
    column_axes: tuple[str, ...]
    copy_axes: tuple[str, ...]
    """Mesh axes over which copies divide the matrices."""
    cut: int
    """Devices that hold the parts of one matrix."""
    copies: int
    """Devices along the copy axes."""
    matrices: int
    """Matrices of which a device holds a part."""

    @property
    def each(self) -> int:
        """Matrices that one device orthogonalises; what is missing to whole shares is filled with zeros."""
        return math.ceil(self.matrices / (self.cut * self.copies))

    @property
    def at_once(self) -> int:
        """Matrices that a device orthogonalises at once."""
        return max(1, min(self.each, NUMBERS_AT_ONCE // (self.rows * self.columns)))

    @property
    def products(self) -> tuple[tuple[int, int, int], ...]:
        """Return (m, k, n) of the matmuls of one matrix's iteration: X X^T, its square, and their sum times X."""
        r, s = sorted((self.rows, self.columns))
        return (r, s, r), (r, r, r), (r, r, s)


def shares(leaves: Sequence[tuple[Dims, tuple[int, ...]]], mesh: Mapping[str, int]) -> list[Share]:
    """Return the shares of hidden matrices.

    Leaves of the same size and cut, either way round, share their devices as one stack, so that fewer are left idle: gate, up
    and down are 3 x 32 matrices for 64 devices.

    Args:
      leaves: logical dims and whole shape of each.
      mesh: size of each mesh axis.
    """
    groups: dict[tuple[Side, Side, tuple[str, ...]], list[_Member]] = {}
    for number, (dims, shape) in enumerate(leaves):
        axes = leaf_axes(dims)
        inputs, outputs = (_side(dims, shape, side, mesh) for side in (axes.inputs, axes.outputs))
        is_transposed = _order(dims, axes.outputs) < _order(dims, axes.inputs)
        rows, columns = (outputs, inputs) if is_transposed else (inputs, outputs)
        stack = math.prod(shape[i] // _parts(dims[i], mesh) for i in range(axes.layer[0]))
        groups.setdefault((rows, columns, _copies(dims, mesh)), []).append(_Member(number, is_transposed, stack))
    return [_share(*key, members, mesh) for key, members in groups.items()]


class _Member(NamedTuple):
    number: int
    is_transposed: bool
    matrices: int
    """Those of which a device holds a part."""


class Side(NamedTuple):
    """A side of a matrix."""

    axes: tuple[str, ...]
    """Mesh axes that cut it."""
    length: int
    """Its whole length."""


def _parts(name: str, mesh: Mapping[str, int]) -> int:
    """Return into how many parts a mesh cuts a dim."""
    return mesh.get(str(RULES[name]), 1)


def _side(dims: Dims, shape: tuple[int, ...], side: tuple[int, ...], mesh: Mapping[str, int]) -> Side:
    cut = tuple(str(RULES[dims[i]]) for i in side if _parts(dims[i], mesh) > 1)
    return Side(cut, math.prod(shape[i] for i in side))


def _order(dims: Dims, side: tuple[int, ...]) -> tuple:
    """Return a key by which a side that fsdp may cut comes before one that tensor may cut, and that before others.

    It depends on no mesh: a square matrix and its transpose are not rounded alike.
    """
    axes = sorted(str(RULES[dims[i]]) for i in side if RULES[dims[i]])
    return not axes, axes


def _copies(dims: Dims, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Return the axes along which devices hold copies of a leaf, those on the fastest links first; not replica, whose links
    are slow and whose parameters may differ."""
    own = {RULES[name] for name in dims}
    return tuple(axis for axis in reversed(MESH_AXES) if axis not in own and axis != "replica" and mesh.get(axis, 1) > 1)


def _share(rows: Side, columns: Side, copies: tuple[str, ...], members: list[_Member], mesh: Mapping[str, int]) -> Share:
    matrices, cut = sum(each.matrices for each in members), math.prod(mesh[axis] for axis in rows.axes + columns.axes)
    taken, devices = [], cut
    for axis in copies if min(rows.length, columns.length) >= SHARED_ROWS else ():
        if math.ceil(matrices / (devices * mesh[axis])) < math.ceil(matrices / devices):
            taken.append(axis)
            devices *= mesh[axis]
    numbers, transposed = (tuple(column) for column in list(zip(*members, strict=True))[:2])
    sides = rows.length, columns.length, rows.axes, columns.axes
    return Share(numbers, transposed, *sides, tuple(taken), cut, devices // cut, matrices)
