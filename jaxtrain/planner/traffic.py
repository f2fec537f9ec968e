"""Estimate the time of transfers: which mesh axes leave a host, a group's bandwidth there, and the bytes of a layer's pass.

**Links.** `mesh.make_mesh` fills a host with the last axes first (`split_over_hosts`). A ring of devices inside a host runs at
LINK of the chip's links. A group with k devices in each of h hosts has k NICs for one ring: NIC of k NICs'
bytes/s, or the links' if those are slower. A permute and an all-to-all send each device's bytes through that device's own
NIC.

    seconds = calls * latency + wire / bandwidth,    latency = begin + (k h - h) * link step + (h - 1) * nic step

as in NCCL's own model of a ring (src/graph/tuning.cc), with the chip's latencies. A permute takes one step; an all-reduce goes
up and down a tree over hosts, 2 (k - 1) link steps and 2 log2(h) nic steps. LINK: NCCL's all-reduce on 8 H100 takes 1,113 us
for 256 MiB and 325 us for 64 MiB (NVIDIA dgxc-benchmarking, nccl/README.md): 0.94 and 0.8 of the links. NIC: 43 of 50 GB/s,
about what NCCL's rings reach over 400 Gb/s InfiniBand. A calibrated chip's own measurements go before both.

**Bytes** are those of `formulas_collectives`, split into one layer's forward, one layer's backward, and so on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from jaxtrain.config import MESH_AXES
from jaxtrain.errors import ExplainedError
from jaxtrain.hardware import Chip
from jaxtrain.mesh import split_over_hosts
from jaxtrain.planner.formulas_collectives import Transfers
from jaxtrain.program.collectives import wire_factor

LINK, NIC = 0.85, 0.86
JOINED_BYTES = 256 * 2**20
"""XLA joins gathers and scatters of weights up to this many bytes (`train/xla_options.py`)."""
_AXIS = {name: i for i, name in enumerate(MESH_AXES)}


class Flow(NamedTuple):
    """Like transfers of one device."""

    axes: str
    kind: str
    dtype: str
    calls: float
    payload: float
    """Bytes of the whole arrays (`program.collectives`)."""


class Times(NamedTuple):
    """Seconds of transfers inside a host, and between hosts."""

    link: float = 0.0
    nic: float = 0.0

    @property
    def total(self) -> float:
        """One after the other."""
        return self.link + self.nic

    def plus(self, other: Times) -> Times:
        """self + other."""
        return Times(self.link + other.link, self.nic + other.nic)


@dataclass(frozen=True)
class Placement:
    """A mesh on hosts."""

    inside: tuple[int, ...]
    """Devices of each axis in one host."""
    across: tuple[int, ...]

    def of(self, axes: str) -> tuple[int, int]:
        """(devices of one group in one host, hosts that it spans)."""
        inside = hosts = 1
        for name in axes.split("+"):
            axis = _AXIS[name]
            inside, hosts = inside * self.inside[axis], hosts * self.across[axis]
        return inside, hosts


@functools.lru_cache(maxsize=65536)
def place(shape: tuple[int, ...], devices_per_host: int) -> Placement:
    """Return the place of `make_mesh`'s mesh of this shape.

    Raises:
      ConfigError: the axes do not fill a host evenly.
    """
    if math.prod(shape) <= devices_per_host:
        return Placement(shape, (1,) * len(shape))
    return Placement(*split_over_hosts(shape, devices_per_host))


def flows_by_phase(entries: Iterable[Transfers]) -> dict[str, tuple[Flow, ...]]:
    """Sum like transfers of each phase (`formulas_collectives.Transfers`)."""
    sums: dict[str, dict[tuple[str, str, str], tuple[float, float]]] = {}
    for entry in entries:
        if entry.axes and entry.payload:
            found, key = sums.setdefault(entry.phase, {}), (entry.axes, entry.kind, entry.dtype)
            calls, payload = found.get(key, (0.0, 0.0))
            found[key] = calls + entry.calls, payload + entry.payload
    return {phase: tuple(Flow(*key, *sent) for key, sent in found.items()) for phase, found in sums.items()}


def require_links(chip: Chip, hosts: int) -> None:
    """Check that the bandwidths of the chip's links are known.

    Raises:
      ExplainedError: one is not; names it.
    """
    if chip.link_bandwidth is None:
        raise ExplainedError(
            f"{chip.name}: the bytes/s of its links are not known, so no transfer can be timed; plan for one device, or "
            "measure them with jaxtrain calibrate"
        )
    if hosts > 1 and chip.nic_bandwidth is None:
        raise ExplainedError(
            f"{chip.name}: its maker states no network between hosts; plan for one host, or give the NIC's bytes/s with "
            "a chip of your own (hardware/chips.toml)"
        )


def wire(flow: Flow, placement: Placement) -> float:
    """Return the bytes that a device sends."""
    inside, hosts = placement.of(flow.axes)
    return flow.payload * wire_factor(flow.kind, inside * hosts)


def seconds(flow: Flow, placement: Placement, chip: Chip) -> Times:
    """Return the time of transfers if nothing else uses the links."""
    inside, hosts = placement.of(flow.axes)
    sent = flow.payload * wire_factor(flow.kind, inside * hosts)
    measured = chip.calibration
    link = ((measured and measured.link) or LINK) * (chip.link_bandwidth or math.inf)
    waits = _calls(flow) * _latency(flow, inside, hosts, chip)
    if hosts == 1:
        return Times(link=waits + sent / link)
    nic = ((measured and measured.nic) or NIC) * (chip.nic_bandwidth or chip.link_bandwidth or math.inf)
    if flow.kind == "collective-permute":
        return Times(nic=waits + sent / nic)
    if flow.kind.endswith("all-to-all"):
        leaves = sent * (hosts - 1) * inside / (inside * hosts - 1)
        return Times(nic=waits + max(leaves / nic, (sent - leaves) / link))
    return Times(nic=waits + sent / min(link, inside * nic))


def _calls(flow: Flow) -> float:
    """Return the number of calls after XLA has joined those for weights."""
    joins = flow.axes == "fsdp" and flow.kind in ("all-gather", "reduce-scatter")
    return min(flow.calls, math.ceil(flow.payload / JOINED_BYTES)) if joins else flow.calls


def _latency(flow: Flow, inside: int, hosts: int, chip: Chip) -> float:
    """Return the seconds of a call with an empty message; 0 if the chip's latencies are not known."""
    step, hop = chip.link_latency or 0.0, chip.nic_latency or 0.0
    if flow.kind == "collective-permute":
        return (chip.collective_latency or 0.0) + (hop if hosts > 1 else step)
    if flow.kind == "all-reduce":
        return (chip.collective_latency or 0.0) + 2 * ((inside - 1) * step + math.log2(hosts) * hop)
    return (chip.collective_latency or 0.0) + (inside - 1) * hosts * step + (hosts - 1) * hop
