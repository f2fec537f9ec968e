"""What is alive in the working memory of the step compiled for H100s: at its worst moment, and at the update's.

JAX_PLATFORMS=cpu .venv/bin/python -m tests.measure.alive --config=configs/8b.py --mesh.fsdp=8

XLA's dump gives each array's size and the instructions between which it lives. The update begins after the last transfer.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

VALUE = re.compile(r"\s*value: <\d+ (\S+?)(\{[\d,]*\})?(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (\S+)")
RANGE = re.compile(r"\s+(\S+?)(\{[\d,]*\}):(\d+)-(\d+)")
MIB = 2**20


class Array(NamedTuple):
    """An array in working memory."""

    size: int
    name: str
    shape: str
    begin: int
    end: int


def arrays_of(assignment: str, ranges: str) -> tuple[list[Array], list[str]]:
    """(arrays in working memory, names of instructions in order) from the text of XLA's two files."""
    order, places = [], {}
    for line in ranges.splitlines():
        if found := RANGE.match(line):
            places[found[1], found[2]] = int(found[3]), int(found[4])
        elif found := re.match(r"\s+\d+:(\S+)", line):
            order.append(found[1])
    arrays: dict[tuple[str, str], list[Array]] = defaultdict(list)
    is_working = False
    for line in assignment.splitlines():
        if line.startswith("allocation"):
            is_working = "preallocated-temp" in line
        elif is_working and (found := VALUE.match(line)) and (key := (found[1], found[2] or "{}")) in places:
            arrays[found[3], found[4]].append(Array(int(found[3]), found[1], found[5], *places[key]))
    return [array for same in arrays.values() for array in _joined(same)], order


def _joined(same: list[Array]) -> list[Array]:
    """Join arrays in one place while they overlap: a loop's inputs, its body's and its results have names of their own."""
    joined: list[Array] = []
    for array in sorted(same, key=lambda array: array.begin):
        if joined and array.begin <= joined[-1].end:
            joined[-1] = joined[-1]._replace(end=max(joined[-1].end, array.end))
        else:
            joined.append(array)
    return joined


def main() -> None:
    """Compile, and print the largest arrays of both moments."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_hlo_module_re=train_step --xla_dump_hlo_as_text"
        from jaxtrain.command.parsing import parse_config
        from jaxtrain.planner import deviceless

        program, _, _ = deviceless.compile_for(parse_config(sys.argv[1:]))
        # A mixture is compiled twice (`program/xla_costs.py`).
        paths = [max(Path(folder).glob(f"*{kind}.txt")) for kind in ("buffer-assignment", "live-range")]
        arrays, order = arrays_of(*(path.read_text() for path in paths))
    print(f"working memory {program.memory_analysis().temp_size_in_bytes / MIB:,.0f} MiB")
    update = max(i for i, name in enumerate(order) if re.match(r"(all|reduce|ragged|collective)[a-z-]*-done", name))
    for what, first in (("the worst moment", 0), ("the update", update)):
        alive = [0] * (len(order) + 1)
        for array in arrays:
            for i in range(max(first, array.begin), array.end + 1):
                alive[i] += array.size
        worst = alive.index(max(alive))
        print(f"{what}: {alive[worst] / MIB:,.0f} MiB alive at {order[worst]}")
        there = sorted((a for a in arrays if a.begin <= worst <= a.end), reverse=True)
        for array in there[:20]:
            print(f"{array.size / MIB:10,.1f}  {array.shape:40} {array.name}")


if __name__ == "__main__":
    main()
