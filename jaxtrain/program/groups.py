"""Parse the device groups of collectives, in XLA's three forms, and locate them in the mesh."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxtrain.errors import ProgramError

_LISTED = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})?\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=@?mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([\d,]+\))?[^)]*)\))? ?\{([^}]*)\}")
_MESH_IOTA = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_SUB_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{([\d,{} ]*)\}")


@dataclass(frozen=True)
class MeshOrder:
    """The mesh of a compiled program; id i in its text is the i-th device of the mesh."""

    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    hosts: tuple[int, ...]
    """The host of each device."""

    @property
    def count(self) -> int:
        """Number of devices."""
        return math.prod(self.sizes)


def layout_of(mesh: Any) -> MeshOrder:
    """Return the device order of a `jax.sharding.Mesh`."""
    hosts = tuple(int(device.process_index) for device in mesh.devices.flat)
    return MeshOrder(tuple(mesh.axis_names), tuple(int(n) for n in mesh.devices.shape), hosts)


@dataclass(frozen=True)
class Group:
    """The devices of one collective, and their place in the mesh."""

    axes: str
    """Mesh axes along which a group varies, "data+expert"; "" if a device communicates only with itself."""
    size: int
    """Devices in a group (of a permute: along its axes)."""
    crosses_hosts: bool
    per_host: int
    """Devices of one group in one host."""


def _numbers(text: str | None) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text or ""))


def _iota(shape: Sequence[int], transpose: Sequence[int], count: int) -> np.ndarray:
    if math.prod(shape) != count:  # before memory is asked for
        raise ProgramError(f"device groups over {shape} = {math.prod(shape)} devices, but the mesh has {count}")
    ids = np.arange(count).reshape(shape)
    return ids.transpose(transpose) if transpose else ids


def _groups_by_mesh(match: re.Match[str], count: int) -> np.ndarray:
    """Parse `mesh['a'=8,'b'=8], device_ids=([8,8]T(1,0)) {'a','b':(2)4}`: the axes in braces vary inside a group.

    'b':(2)4 is a part of an axis: its factor 4 after a factor 2.
    """
    names = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match.group(1))}
    shape = tuple(names.values())
    order = _MESH_IOTA.search(match.group(2) or "")
    ids = _iota(_numbers(order.group(1)), _numbers(order.group(2)), count) if order else _iota(shape, (), count)
    factors: list[int] = []
    place: dict[str, int] = {}
    parts = {name: (int(before or 1), int(size or names[name])) for name, before, size in _SUB_AXIS.findall(match.group(3))}
    for name, size in names.items():
        before, own = parts.get(name, (1, size))
        place[name] = len(factors) + 1
        factors += [before, own, size // (before * own)]
    inside = [place[name] for name in parts]
    outside = [i for i in range(len(factors)) if i not in inside]
    own = math.prod(factors[i] for i in inside)
    return ids.reshape(factors).transpose(*outside, *inside).reshape(-1, own)


def device_groups(attributes: str, count: int) -> np.ndarray | list[list[int]]:
    """Return the groups of a collective, each a row of device ids, from any of the three forms that XLA writes.

    `{{0,1},{2,3}}`; `[4,2]<=[2,4]T(1,0)`; `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}`. `{}` is all devices.

    Raises:
      ProgramError: another form.
    """
    iota, by_mesh, listed = _IOTA.search(attributes), _MESH.search(attributes), _LISTED.search(attributes)
    if iota:
        shape = _numbers(iota.group(1))
        return _iota(_numbers(iota.group(2)), _numbers(iota.group(3)), count).reshape(shape)
    if by_mesh:
        return _groups_by_mesh(by_mesh, count)
    if listed:
        return [list(_numbers(group)) for group in re.findall(r"\{([\d, ]+)\}", listed.group(1) or "")] or [list(range(count))]
    raise ProgramError(f"device groups in an unknown form: {attributes[:200]}")


def locate(groups: Iterable[Sequence[int]] | np.ndarray, layout: MeshOrder) -> Group:
    """Return the place of groups (or of the pairs of a permute) in the mesh.

    Raises:
      ProgramError: an empty group, or one with a device outside the mesh.
    """
    hosts = np.array(layout.hosts)
    varies, per_host, crosses = np.zeros(len(layout.sizes), bool), 1, False
    for row in groups:
        if len(row) == 0 or max(row) >= layout.count:  # before NumPy, whose integers cannot hold a number of 20 digits
            raise ProgramError(f"a group of devices {list(row)[:8]}, but the mesh has {layout.count}")
        ids = np.asarray(row)
        places = np.stack(np.unravel_index(ids, layout.sizes))
        varies |= (places != places[:, :1]).any(axis=1)
        of_hosts = np.unique(hosts[ids], return_counts=True)[1]
        per_host, crosses = max(per_host, int(of_hosts.max())), crosses or len(of_hosts) > 1
    axes = "+".join(axis for axis, differs in zip(layout.axes, varies, strict=True) if differs)
    return Group(axes, max(len(row) for row in groups), crosses, per_host)


def group_of(attributes: str, layout: MeshOrder) -> Group:
    """Return the group of a collective from its attributes: replica groups, or the source-target pairs of a permute."""
    pairs = _PAIRS.search(attributes)
    if pairs:
        ids = _numbers(pairs.group(1))
        if len(ids) % 2:
            raise ProgramError(f"a permute between an odd number of devices: {pairs.group(1)[:200]}")
        located = locate(list(zip(ids[::2], ids[1::2], strict=True)), layout)
        return replace(located, per_host=1)  # each device sends by itself
    return locate(device_groups(attributes, layout.count), layout)
