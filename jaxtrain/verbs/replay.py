"""`jaxtrain replay --config=... --step=120`: compute a recorded step again, and report where the result differs.

The step is computed on the flags' mesh and dtype: `--mesh.tensor=2 --model.dtype=float32`; with `--against
"mesh.tensor=2,mesh.data=1"` it is compared with the same step in that layout.

Exit codes: 0 equal within the tolerance, 1 different, or another error explained in one message, 2 wrong usage.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtrain.command import NoFlags, Usage, parse
from jaxtrain.config import Config
from jaxtrain.config.names import split_items
from jaxtrain.config.rules import validate
from jaxtrain.errors import EXIT_DONE, EXIT_ERROR, UsageError
from jaxtrain.text import open_console, tell

if TYPE_CHECKING:
    from jaxtrain.train.layer_moments import Difference
    from jaxtrain.train.replay import Replayed

MOST_SHOWN = 12


@dataclass(frozen=True)
class ReplayFlags:
    """Flags of `jaxtrain replay`."""

    step: int
    """Number of the step, from 1."""
    against: str = ""
    """Another layout, as flags over the config: "mesh.tensor=2,mesh.data=1,model.dtype=float32". Empty: the record."""
    tolerance: float = 0.0
    """Largest relative difference to accept; 0: 1e-3, or 5e-2 if either is computed in bfloat16."""
    json: bool = False
    """Print JSON instead of a table."""


USAGE = Usage(
    "replay",
    "Compute a recorded step again, on any mesh, and compare it with the record or with another layout. Writes nothing.",
    ReplayFlags,
)


def main(arguments: Sequence[str]) -> int:
    """Parse, restore, compute, compare, print; return the exit code."""
    line = parse(USAGE, arguments)
    flags, config = line.own, line.config
    if flags.step < 1:
        raise UsageError(f"--step={flags.step}: give the number of a step, from 1")
    if not 0 <= flags.tolerance < 1:
        raise UsageError(f"--tolerance={flags.tolerance}: give a relative difference from 0 to 1")
    against = other_config(config, flags.against) if flags.against else None

    from jaxtrain.launch import distributed
    from jaxtrain.launch.watchdog import Watchdog
    from jaxtrain.mesh import count_devices
    from jaxtrain.numerics import settle
    from jaxtrain.planner.memory_check import ask_for_memory
    from jaxtrain.processes import own_index
    from jaxtrain.telemetry.heartbeat import Heartbeat
    from jaxtrain.train.replay import replay

    settle()
    place = distributed.start(config.distributed)
    heartbeat = Heartbeat.from_environment()
    heartbeat.phase("replaying")
    with Watchdog(config, heartbeat):
        devices = count_devices()
        config = validate(config, devices)
        ask_for_memory(config, place.local_processes if place else 1, tell)
        replayed = replay(config, flags.step, against and validate(against, devices), flags.tolerance)
        if own_index() == 0 and flags.json:
            found = [dataclasses.asdict(each) for each in replayed.differences]
            answer = {"same": replayed.same, "title": replayed.title, "tolerance": replayed.tolerance, "differences": found}
            print(json.dumps(answer))
        elif own_index() == 0:
            show(replayed)
    return EXIT_DONE if replayed.same else EXIT_ERROR


def other_config(config: Config, against: str) -> Config:
    """Return the config with the flags of --against over it.

    Raises:
      UsageError: it is not of the form name=value,name=value.
    """
    parts = split_items(against)
    if any("=" not in part or part.startswith("-") for part in parts):
        raise UsageError(f"--against={against!r}: give flags over the config, e.g. --against mesh.tensor=2,mesh.data=1")
    return parse(Usage("replay", "", NoFlags), [f"--{part}" for part in parts], config).config


def show(replayed: Replayed) -> None:
    """Print the comparison: all of it, or if it is long the parts that differ and those before."""
    from jaxtrain.tables import plain_table, print_table

    found, tolerance = replayed.differences, replayed.tolerance
    table = plain_table(replayed.title, ["computed", "farthest apart", ""], ["difference"])
    wrong = [i for i, each in enumerate(found) if each.difference > tolerance]
    start = max(wrong[0] - 2, 0) if wrong and len(found) > MOST_SHOWN else 0
    for each in found[start : start + MOST_SHOWN]:
        differs = each.difference > tolerance
        mark, style = ("differs", "red") if differs else ("=", "")
        table.add_row(each.what, each.where, mark, f"{each.difference:.2g}", style=style)
    console = open_console(140)
    print_table(console, table)
    if len(found) > table.row_count:
        console.print(f"{len(found) - table.row_count} more were compared; --json has all")
    console.print(verdict(found, tolerance))


def verdict(found: Sequence[Difference], tolerance: float) -> str:
    """Return one line on the first difference, in the order of computation."""
    wrong = [each for each in found if each.difference > tolerance]
    if not wrong:
        return f"the same: no more than {max(each.difference for each in found):.2g} apart (tolerance {tolerance:.2g})"
    return f"first to differ: {wrong[0].what}, by {wrong[0].difference:.2g} (tolerance {tolerance:.2g}; {wrong[0].where})"
