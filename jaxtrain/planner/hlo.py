"""Reads a compiled program's text: matmul FLOPs as they will be executed, loop trip counts multiplied in.

`compiled.cost_analysis()` counts the body of a scan once; here every `while` counts as often as XLA says that it runs.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"^\w+\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRUE_FALSE = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_OPERAND = re.compile(r"%?([\w.\-]+)")
_FIRST_OPERAND = re.compile(r"(?:\w+\[[\d,]*\](?:\{[^}]*\})? )?%?([\w.\-]+)")  # its type may stand before it


@dataclass
class _Computation:
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    flops: float = 0.0
    calls: list[tuple[float, list[str]]] = field(default_factory=list)
    """(times, alternatives): one of the alternatives runs that many times."""


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _dot_flops(computation: _Computation, output: tuple[int, ...], operands: str) -> float:
    """2 * (elements of the output) * (length of the contraction)."""
    left = _FIRST_OPERAND.match(operands)
    contracted = _CONTRACTED.search(operands)
    if left is None or contracted is None:
        raise ValueError(f"a dot without operands or contracting dims: {operands[:200]}")
    shape = computation.shapes[left.group(1)]
    return 2.0 * math.prod(output) * math.prod(shape[i] for i in _dims(contracted.group(1)))


def _read(text: str) -> tuple[dict[str, _Computation], str]:
    """All computations by name, and the name of the entry."""
    computations: dict[str, _Computation] = {}
    entry, now = "", _Computation()
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            now = computations.setdefault(head.group(2), _Computation())
            entry = head.group(2) if head.group(1) else entry
            continue
        instruction = _INSTRUCTION.match(line)
        if not instruction:
            continue
        name, result, op, rest = instruction.groups()
        shape = _SHAPE.match(result)
        now.shapes[name] = _dims(shape.group(1)) if shape else ()
        if op == "dot":
            now.flops += _dot_flops(now, now.shapes[name], rest)
        elif op == "while":
            trips = _TRIP_COUNT.search(rest)
            if trips is None:
                raise ValueError(f"a loop without a known trip count: {line.strip()[:200]}")
            now.calls.append((float(trips.group(1)), _CALLED.findall(rest)))
        elif op == "conditional":
            branches = _BRANCHES.search(rest)
            names = _OPERAND.findall(branches.group(1)) if branches else _TRUE_FALSE.findall(rest)
            now.calls.append((1.0, names))
        elif op in ("fusion", "call", "custom-call", "async-start"):
            now.calls += [(1.0, [called]) for called in _CALLED.findall(rest)]
    return computations, entry


def matmul_flops(text: str) -> float:
    """FLOPs of all dots that one device executes in one run of the compiled program.

    A conditional counts as its most expensive branch: the busiest stage, tick by tick.

    Raises:
      ValueError: a loop whose trip count XLA did not write down.
    """
    computations, entry = _read(text)
    done: dict[str, float] = {}

    def total(name: str) -> float:
        if name not in done:
            computation = computations[name]
            done[name] = computation.flops + sum(
                times * max(total(alternative) for alternative in alternatives)
                for times, alternatives in computation.calls
                if alternatives
            )
        return done[name]

    return total(entry)
