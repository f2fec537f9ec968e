"""List every transfer of a compiled program: mesh axis, kind, calls, bytes, and how much of it overlaps with compute.

**Bytes**, per device and step. *Payload* is the whole array: the output of an all-gather, the input of a reduce-scatter, the
operand of an all-reduce, all-to-all (of a ragged one at most the rows that fit both of its buffers) or permute. *Wire* is what
a device sends in a bandwidth-optimal ring of n devices (Patarasu & Yuan 2009; NCCL's bus bandwidth):

    all-gather, reduce-scatter, all-to-all   (n-1)/n payload        all-reduce   2 (n-1)/n payload        permute   payload

**Hidden** bytes move while the device computes. The text of a scheduled program is run in order: matmuls take FLOPs / peak (the
one of float8 where both operands are), nothing else takes time (so compute is never overestimated); a transfer begins at its
`-start`, after those still in flight on the same kind of link, and takes wire / bandwidth; at its `-done` the device waits.
Bytes that move during waits are exposed, the others hidden. A transfer that XLA marks as synchronous is waited for at once. A
simpler measure is given too: bytes of transfers with any matmul at all between start and done.

**Links.** A group inside a host has the chip's links. A group of k devices in each of several hosts has k NICs for its ring,
or the links if those are slower.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from jaxtrain.errors import ProgramError
from jaxtrain.hardware import Chip, find_chip
from jaxtrain.program.groups import Group, MeshOrder, group_of
from jaxtrain.program.hlo import Array, Computation, Instruction, Measure, Program, is_float8, own_flops, parse, understood

T = TypeVar("T")
KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_SOURCE = re.compile(r'op_name="([^"]*)"')
_INDEX = re.compile(r"index=(\d+)")
_NO_TIME = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call")
SHORTEST = 1e-6
"""Smallest duration of an instruction, in seconds, in a profile for XLA's scheduler."""


@dataclass
class Transfer:
    """All runs of one collective instruction in a step, for one dtype."""

    kind: str
    dtype: str
    group: Group
    source: str
    """The op_name: the model line that it comes from."""
    payload_once: float
    """Bytes of one call."""
    calls: float = 0.0
    seconds: float = 0.0
    """Seconds on the wire."""
    hidden_seconds: float = 0.0
    overlapped_calls: float = 0.0
    """Calls with any matmul between start and done."""

    @property
    def payload(self) -> float:
        """Bytes, all calls together."""
        return self.calls * self.payload_once

    @property
    def wire(self) -> float:
        """Bytes that a device sends, all calls together."""
        return self.payload * wire_factor(self.kind, self.group.size)

    @property
    def hidden(self) -> float:
        """Wire bytes that move while the device computes."""
        return self.wire * (self.hidden_seconds / self.seconds) if self.seconds else 0.0

    @property
    def overlapped(self) -> float:
        """Wire bytes of the calls that have any matmul between start and done."""
        return self.wire * self.overlapped_calls / self.calls if self.calls else 0.0


@dataclass(frozen=True)
class CollectiveRow:
    """One device's transfers in a step along one set of mesh axes, by one kind of collective, in one dtype."""

    axes: str
    kind: str
    dtype: str
    calls: float
    payload: float
    wire: float
    hidden: float
    """Wire bytes that move while the device computes; the rest is exposed."""
    overlapped: float
    """Wire bytes of calls with any matmul between start and done."""
    crosses_hosts: bool

    @property
    def exposed(self) -> float:
        """Wire bytes that the device waits for."""
        return self.wire - self.hidden


def wire_factor(kind: str, size: int) -> float:
    """Return the bytes that a device sends in a ring of `size` devices, over the payload (formulas above)."""
    if kind in ("collective-permute", "collective-broadcast"):
        return 1.0
    return (2.0 if kind == "all-reduce" else 1.0) * (size - 1) / size


def read_collectives(
    text: str,
    layout: MeshOrder,
    chip: Chip | None = None,
    flops_per_second: float | None = None,
) -> list[Transfer]:
    """Return every transfer between devices in one run of a compiled program (module docstring).

    Args:
      text: `compiled.as_text()`.
      layout: device order of the mesh that it was compiled for.
      chip: its links and peak decide what is hidden; H100 SXM by default.
      flops_per_second: speed of matmuls; by default the chip's float8 peak for those of float8, its bfloat16 peak for others.

    Raises:
      ProgramError: a loop without trip count, device groups in an unknown form, or an inconsistent text.
      ValueError: the chip's figures are unknown.
    """
    replay = _replay(text, layout, chip, flops_per_second)
    with understood():
        replay.run(replay.program.computations[replay.program.entry], [], 1.0)
        return sorted(replay.transfers.values(), key=lambda t: -t.wire)


def instruction_seconds(text: str, layout: MeshOrder, chip: Chip | None = None) -> dict[str, float]:
    """Return the seconds of each instruction by name: a matmul FLOPs / peak, a transfer wire / bandwidth, all others
    `SHORTEST`.

    For loops, calls and conditionals the parts are listed, not the whole. Arguments and errors are those of `read_collectives`.
    """
    replay = _replay(text, layout, chip, None)
    with understood():
        return {
            instruction.name: max(SHORTEST, replay.seconds(computation, instruction))
            for computation in replay.program.computations.values()
            if computation.name in replay.busy_seconds
            for instruction in computation.instructions
            if instruction.op not in _NO_TIME and not instruction.op.endswith("-done")
        }


def _replay(text: str, layout: MeshOrder, chip: Chip | None, flops_per_second: float | None) -> _Replay:
    chip = chip or find_chip("h100-sxm")
    peak = flops_per_second or chip.peak("bfloat16")
    if peak is None or chip.link_bandwidth is None:
        raise ValueError(f"{chip.name}: peak FLOP/s {peak} and link bytes/s {chip.link_bandwidth} must be known")
    of_float8 = flops_per_second or chip.peak("float8") or peak
    program = parse(text)

    def busy(computation: Computation, instruction: Instruction) -> float:
        flops = own_flops(computation, instruction)
        return flops / (of_float8 if flops and is_float8(computation, instruction) else peak)

    with understood():
        return _Replay(program, layout, chip, busy, program.sums(busy))


def table(transfers: Sequence[Transfer]) -> list[CollectiveRow]:
    """Sum the transfers by axes, kind and dtype, the largest first."""
    names = ("calls", "payload", "wire", "hidden", "overlapped")
    sums = summed(transfers, lambda transfer: (transfer.group.axes, transfer.kind, transfer.dtype), names)
    across = {transfer.group.axes for transfer in transfers if transfer.group.crosses_hosts}
    rows = [CollectiveRow(*key, **values, crosses_hosts=key[0] in across) for key, values in sums.items()]
    return sorted(rows, key=lambda row: -row.wire)


def summed(entries: Iterable[T], key: Callable[[T], tuple[str, ...]], names: Sequence[str]) -> dict[Any, dict[str, float]]:
    """Return {key: {name: sum}} of numbers of entries, by their names."""
    sums: dict[tuple[str, ...], dict[str, float]] = {}
    for entry in entries:
        row = sums.setdefault(key(entry), dict.fromkeys(names, 0.0))
        for name in names:
            row[name] += getattr(entry, name)
    return sums


# ---------------------------------------------------------------------------------------------------------------------
# Running the schedule


@dataclass
class _Flight:
    """A transfer in flight."""

    transfers: list[Transfer]
    begin: float
    end: float
    busy_at_start: float
    weight: float
    waited: bool = False
    exposed: float = 0.0

    def shift(self, seconds: float, busy: float) -> None:
        """Move the transfer to a later time."""
        self.begin, self.end, self.busy_at_start = self.begin + seconds, self.end + seconds, self.busy_at_start + busy


_Value = Any
"""The tracked value of a name: a `_Flight`, a list of values (a tuple), or None."""


@dataclass
class _Replay:
    """Runs computations in the order of their text; of a loop three iterations, the middle one with weight trips - 2."""

    program: Program
    layout: MeshOrder
    chip: Chip
    own_seconds: Measure
    """Seconds of the matmuls of an instruction."""
    busy_seconds: dict[str, float]
    """Seconds of the matmuls of each computation."""
    transfers: dict[tuple[str, str], Transfer] = field(default_factory=dict)
    now: float = 0.0
    busy: float = 0.0
    """Seconds of all matmuls so far."""
    link_free: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})
    under_way: list[_Flight] = field(default_factory=list)
    groups: dict[str, Group] = field(default_factory=dict)
    moves: dict[str, bool] = field(default_factory=dict)
    costs: dict[str, tuple[float, float]] = field(default_factory=dict)

    def run(self, computation: Computation, arguments: list[_Value], weight: float) -> _Value:
        """Run a computation once, counting everything in it `weight` times; return its root's value."""
        values: dict[str, _Value] = {}
        for instruction in computation.instructions:
            value = self._step(computation, instruction, values, arguments, weight)
            if value is not None:
                values[instruction.name] = value
        return values.get(computation.root.name)

    def _step(
        self, computation: Computation, instruction: Instruction, values: dict[str, _Value], arguments: list, weight: float
    ) -> _Value:
        op, operands = instruction.op, instruction.operands
        if op == "parameter":
            return arguments[int(operands[0])] if int(operands[0]) < len(arguments) else None
        if op == "get-tuple-element":
            source = values.get(operands[0])
            return source[int(_INDEX.findall(instruction.attributes)[0])] if isinstance(source, list) else None
        if op == "tuple":
            elements = [values.get(name) for name in operands]
            return elements if any(element is not None for element in elements) else None
        if op in ("copy", "bitcast", "opt-barrier", "async-update"):
            return values.get(operands[0])
        if op in ("send", "recv") and "is_host_transfer=true" not in instruction.attributes:
            raise ProgramError(f"%{instruction.name}: a point-to-point {op} is not counted here; compile without send/recv")
        if op.endswith("-done"):
            self._wait(values.get(operands[0]), weight)
            return None
        if op == "while" and self._moves_bytes(instruction.body):
            return self._loop(computation, instruction, values.get(operands[0]), weight)
        if op == "conditional" and any(self._moves_bytes(name) for name in instruction.branches):
            dearest = max(instruction.branches, key=self._cost)
            self.run(self.program.computations[dearest], [], weight)
            return None
        if op == "call" and self._moves_bytes(instruction.called[0]):
            return self.run(self.program.computations[instruction.called[0]], [values.get(name) for name in operands], weight)
        collectives = self._collectives(computation, instruction)
        if collectives:
            return self._start(instruction, collectives, weight)
        busy = self._busy(computation, instruction)
        self.busy, self.now = self.busy + busy, self.now + busy
        return None

    def _loop(self, computation: Computation, loop: Instruction, value: _Value, weight: float) -> _Value:
        """Run the first iteration, a middle one with the rest's weight, and the last: transfers may span two iterations."""
        trips, body = self.program.trip_count(computation, loop), self.program.computations[loop.body]
        middle = max(0, trips - 2)
        for times in (min(trips, 1), middle, min(max(0, trips - 1), 1)):
            if not times:
                continue
            before = self.now, self.busy
            value = self.run(body, [value], weight * times)
            passed, done = (times - 1) * (self.now - before[0]), (times - 1) * (self.busy - before[1])
            self.now, self.busy = self.now + passed, self.busy + done
            for flight in self.under_way:
                if flight.begin >= before[0]:  # it began in the iteration just run
                    flight.shift(passed, done)
            self.link_free = {crosses: until + passed * (until > before[0]) for crosses, until in self.link_free.items()}
        return value

    def _cost(self, name: str) -> tuple[float, float]:
        """Return (seconds of matmuls, bytes) of a branch."""
        if name not in self.costs:
            shared = {"groups": self.groups, "moves": self.moves, "costs": self.costs}
            trial = _Replay(self.program, self.layout, self.chip, self.own_seconds, self.busy_seconds, **shared)
            if self._moves_bytes(name):
                trial.run(self.program.computations[name], [], 1.0)
            self.costs[name] = self.busy_seconds[name], sum(transfer.wire for transfer in trial.transfers.values())
        return self.costs[name]

    def seconds(self, computation: Computation, instruction: Instruction) -> float:
        """Return the seconds of an instruction: its matmuls, and the transfers that it is or begins."""
        transfers = [t for inside, i in self._collectives(computation, instruction) for t in self._transfers(inside, i)]
        return sum(map(self._on_wire, transfers)) + self._busy(computation, instruction)

    def _busy(self, computation: Computation, instruction: Instruction) -> float:
        """Return the seconds of the matmuls of an instruction and of all that it calls."""
        return self.program.sum_of(computation, instruction, self.own_seconds, self.busy_seconds.__getitem__)

    def _on_wire(self, transfer: Transfer) -> float:
        """Return the seconds of one call."""
        sent = transfer.payload_once * wire_factor(transfer.kind, transfer.group.size)
        return sent / bandwidth(transfer.group, self.chip)

    def _moves_bytes(self, name: str) -> bool:
        """Return whether a computation, or one that it calls, holds a collective."""
        if name not in self.moves:
            self.moves[name] = False
            for i in self.program.computations[name].instructions:
                called = (*i.called, *i.branches, *([i.body] if i.op == "while" else []))
                inside = any(self._moves_bytes(c) for c in called if c in self.program.computations)
                self.moves[name] = self.moves[name] or inside or i.op.removesuffix("-start") in KINDS
                self.moves[name] = self.moves[name] or i.op.endswith("-done")
        return self.moves[name]

    def _collectives(self, computation: Computation, instruction: Instruction) -> list[tuple[Computation, Instruction]]:
        """Return the collectives of an instruction: itself, or those inside the fusion or asynchronous wrapper that it is."""
        if instruction.op.removesuffix("-start") in KINDS:
            return [(computation, instruction)]
        if instruction.op not in ("fusion", "async-start") or not instruction.called:
            return []
        inside = self.program.computations[instruction.called[0]]
        if not self._moves_bytes(inside.name):
            return []
        return [found for i in inside.instructions for found in self._collectives(inside, i)]

    def _start(self, outer: Instruction, collectives: list[tuple[Computation, Instruction]], weight: float) -> _Flight | None:
        """Begin a transfer, after those on the same kind of link; one without a -start is waited for at once."""
        transfers = [t for computation, i in collectives for t in self._transfers(computation, i)]
        if not transfers:
            return None
        crosses = transfers[0].group.crosses_hosts
        seconds = sum(map(self._on_wire, transfers))
        begin = max(self.now, self.link_free[crosses])
        flight = _Flight(transfers, begin, begin + seconds, self.busy, weight)
        self.link_free[crosses] = flight.end
        self.under_way.append(flight)
        for transfer in transfers:
            transfer.calls += weight
            transfer.seconds += weight * seconds
        if not outer.op.endswith("-start") or '"is_sync":true' in outer.attributes:
            self._wait(flight, weight)
        return flight

    def _wait(self, flight: _Value, weight: float) -> None:
        """Wait until the transfer is over; the bytes that move meanwhile are exposed."""
        if not isinstance(flight, _Flight) or flight.waited:
            return
        until = max(self.now, flight.end)
        for other in self.under_way:
            other.exposed += max(0.0, min(other.end, until) - max(other.begin, self.now))
        self.now, flight.waited = until, True
        between = self.busy - flight.busy_at_start
        for transfer in flight.transfers:
            transfer.hidden_seconds += flight.weight * max(0.0, flight.end - flight.begin - flight.exposed)
            transfer.overlapped_calls += flight.weight * (between > 0)
        self.under_way = [other for other in self.under_way if not other.waited]

    def _transfers(self, computation: Computation, instruction: Instruction) -> list[Transfer]:
        """Return one entry for each dtype of a collective; none if no byte leaves the device."""
        kind, group = instruction.op.removesuffix("-start"), self._group(instruction)
        if not group.axes:
            return []
        found = []
        for dtype, sent in _bytes_sent(computation, instruction, kind).items():
            payload = sent * group.size if kind == "all-gather" else sent
            source = _SOURCE.search(instruction.attributes)
            new = Transfer(kind, dtype, group, source.group(1) if source else "", payload)
            found.append(self.transfers.setdefault((f"{computation.name}/{instruction.name}", dtype), new))
        return found

    def _group(self, instruction: Instruction) -> Group:
        key = instruction.attributes.partition("metadata=")[0]
        key = key[max(key.find("replica_groups="), key.find("source_target_pairs="), 0) :]
        if key not in self.groups:
            self.groups[key] = group_of(key, self.layout)
        return self.groups[key]


def bandwidth(group: Group, chip: Chip) -> float:
    """Return a device's bytes/s in a ring: its links inside a host, else the NICs of the group's devices in that host."""
    link = chip.link_bandwidth or math.nan
    if not group.crosses_hosts:
        return link
    return min(link, group.per_host * (chip.nic_bandwidth or link))


def _bytes_sent(computation: Computation, instruction: Instruction, kind: str) -> dict[str, int]:
    """Return {dtype: bytes} of the operands; of a ragged all-to-all's worst-case buffers the bytes that fit both."""
    arrays: list[Array] = []
    for name in instruction.operands[: 2 if kind == "ragged-all-to-all" else None]:
        source = computation.by_name.get(name)
        if source is None:
            raise ProgramError(f"%{instruction.name}: its operand {name} is not in the text")
        arrays.append(source.result[0])
    if kind == "ragged-all-to-all":
        arrays = [min(arrays, key=lambda array: array.bytes)]
    sent: dict[str, int] = defaultdict(int)
    for array in arrays:
        sent[array.dtype] += array.bytes
    return dict(sent)
