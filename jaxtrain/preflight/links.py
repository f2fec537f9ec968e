"""Check the links: run and time every mesh axis's collectives, on numbers whose result is known."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtrain.config import MESH_AXES
from jaxtrain.hardware import resolve_chip
from jaxtrain.measure.operations import collectives
from jaxtrain.preflight.checks import Check, Finding, Site
from jaxtrain.program.collectives import wire_factor

MESSAGE = {"cpu": 2**18}
"""Bytes of the larger side of a collective on one device."""
MESSAGE_ELSEWHERE = 2**25
REPETITIONS = 5
PRIME = 251
SLOW = 0.25
"""Share of the link's stated bandwidth below which a warning is given."""
_SPEC = PartitionSpec(("other", "group"))


def groups_of(mesh: Mesh, axis: str) -> Mesh:
    """Return the same devices as mesh ("other", "group"): the groups that communicate along an axis, in the axis's order."""
    table = np.moveaxis(mesh.devices, MESH_AXES.index(axis), -1).reshape(-1, mesh.shape[axis])
    return Mesh(table, ("other", "group"), axis_types=(AxisType.Auto,) * 2)


def numbers(place: int, count: int) -> np.ndarray:
    """Return the input of the device at `place` in its group, [count] float32: whole, below 251, so that sums are exact."""
    return ((np.arange(count) + 31 * place) % PRIME).astype(np.float32)


def expected(kind: str, size: int, place: int, count: int) -> np.ndarray:
    """Return the result of the device at `place`, computed by numpy."""
    group, rank = divmod(place, size)
    x = np.stack([numbers(group * size + member, count) for member in range(size)])
    return {
        "all-gather": lambda: x.reshape(-1),
        "reduce-scatter": lambda: x.sum(0).reshape(size, -1)[rank],
        "all-reduce": lambda: x.sum(0),
        "all-to-all": lambda: x.reshape(size, size, -1)[:, rank].reshape(-1),
        "collective-permute": lambda: x[rank - 1],
    }[kind]()


def run_collective(mesh: Mesh, kind: str, held: int) -> tuple[float, dict[str, str]]:
    """(seconds of the best repetition, {device of this process: what is wrong}).

    Args:
      mesh: from `groups_of`; all groups are active at once, as in training.
      held: numbers on a device before the collective.
    """
    size, sharding = mesh.shape["group"], NamedSharding(mesh, _SPEC)
    places = {device: place for place, device in enumerate(mesh.devices.flat)}
    shape = (held * mesh.size,)

    def given(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        return numbers((index[0].start or 0) // held, held)

    x = jax.make_array_from_callback(shape, sharding, given)
    program = jax.jit(
        jax.shard_map(collectives(size)[kind], mesh=mesh, in_specs=_SPEC, out_specs=_SPEC, check_vma=False),
        out_shardings=sharding,
    )
    result, seconds = jax.block_until_ready(program(x)), []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        jax.block_until_ready(program(x))
        seconds.append(time.perf_counter() - started)
    wrong = {}
    for shard in result.addressable_shards:
        found, right = np.asarray(shard.data), expected(kind, size, places[shard.device], held)
        bad = np.flatnonzero(found != right)
        if len(bad):
            i = bad[0]
            wrong[str(shard.device.id)] = f"{len(bad)} of {right.size} numbers, [{i}] is {found[i]:g} and not {right[i]:g}"
    return min(seconds), wrong


def look_along(axis: str, site: Site) -> dict[str, dict[str, Any]]:
    """Return for every collective along an axis: bytes sent per device, seconds, and what is wrong."""
    mesh, rows = groups_of(site.mesh, axis), {}
    size = mesh.shape["group"]
    message = MESSAGE.get(mesh.devices.flat[0].platform, MESSAGE_ELSEWHERE) // 4
    for kind in collectives(size):
        held = max(message // size // size, 1) * size * (1 if kind == "all-gather" else size)
        seconds, wrong = run_collective(mesh, kind, held)
        payload = 4 * held * (size if kind == "all-gather" else 1)
        rows[kind] = {"sent_bytes": wire_factor(kind, size) * payload, "seconds": seconds, "wrong": wrong}
    return rows


def judge_along(axis: str, site: Site, seen: list[dict[str, dict[str, Any]]]) -> list[Finding]:
    """Report devices that got wrong numbers, and the bandwidth of the slowest process."""
    check, findings, bandwidths = f"axis {axis}", [], {}
    for kind in seen[0]:
        for process, facts in enumerate(seen):
            for device, words in facts[kind]["wrong"].items():
                group = _group_of(site, axis, int(device))
                where = f"device {device} of {site.name(process)} got wrong numbers of {kind} over devices {group}"
                findings.append(Finding(check, "failed", f"{where}: {words}"))
        bandwidths[kind] = min(facts[kind]["sent_bytes"] / facts[kind]["seconds"] for facts in seen) / 1e9
    if findings:
        return findings
    link, name = _link(site, axis)
    shown = ", ".join(f"{kind} {value:.3g}" for kind, value in bandwidths.items())
    beside = f" (the {name}: {link / 1e9:,.0f})" if link else ""
    values = {"gigabytes_per_second": bandwidths, "link_gigabytes_per_second": link and link / 1e9}
    slowest = min(bandwidths, key=lambda kind: bandwidths[kind])
    if link and bandwidths[slowest] < SLOW * link / 1e9:
        words = f"right, but slow: {shown} GB/s a device{beside}"
        return [Finding(check, "warning", words, values)]
    return [Finding(check, "ok", f"right; {shown} GB/s a device{beside}", values)]


def _group_of(site: Site, axis: str, device: int) -> str:
    for group in groups_of(site.mesh, axis).devices:
        if device in [member.id for member in group]:
            return ", ".join(str(member.id) for member in group)
    return "?"


def _link(site: Site, axis: str) -> tuple[float | None, str]:
    """(stated bytes/s of the link that an axis uses, its name)."""
    chip = resolve_chip(site.config.telemetry.hardware, site.mesh.devices.flat[0].device_kind)
    hosts = [{site.hosts[device.process_index] for device in group} for group in groups_of(site.mesh, axis).devices]
    crosses = any(len(names) > 1 for names in hosts)
    return (chip.nic_bandwidth, "network") if crosses else (chip.link_bandwidth, "link")


def checks(site: Site) -> list[Check]:
    """Return one check for each mesh axis with more than one device."""
    return [
        Check(f"axis {axis}", functools.partial(look_along, axis), functools.partial(judge_along, axis))
        for axis in MESH_AXES
        if site.mesh.shape[axis] > 1
    ]
