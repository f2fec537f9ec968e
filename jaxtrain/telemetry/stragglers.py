"""Name the straggler: the process that the others wait for.

A collective makes all processes step at the same pace, so step times do not show which one is slow. Their waiting times do: a
late process spends its time on the host (reading data, Python, a busy CPU) and finds its step done when it asks for it, while
the others wait. Each process posts its two figures to the key-value store whenever a row is logged; process 0 reads what is
there, and no process waits for another. A slow device keeps its own host waiting like all others; `jaxtrain preflight` finds
it.
"""

from __future__ import annotations

import json
import socket
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxtrain.processes import read_folder, tell

FOLDER = "stragglers"
SHARE = 0.1
"""Smallest share of a step that the others wait for a process that is named."""
LITTLE_WAIT = 0.2
"""Share of a step beyond which a process waits itself: its host work is then hidden behind the devices' work."""


@dataclass(frozen=True)
class Figures:
    """One process's seconds per step, means since its last row."""

    step: int
    """Newest step counted."""
    host: str
    step_seconds: float
    waiting: float
    """Waiting in dispatch and for results: for the devices and other processes."""
    data: float
    """Waiting for the next batch."""

    @property
    def own(self) -> float:
        """Working on the host: the rest of the step."""
        return max(self.step_seconds - self.waiting, 0.0)


def crossing_axes(mesh: Mesh, process: int) -> list[str]:
    """Return the axes along which a process's devices communicate with other processes' devices."""
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    held = owners == process
    return [
        axis
        for dim, axis in enumerate(mesh.axis_names)
        if (held.any(axis=dim) & ~held.all(axis=dim)).any()  # a group with devices of this process and of others
    ]


def find_straggler(figures: Mapping[int, Figures]) -> tuple[int, float] | None:
    """(process, seconds per step that the others wait for it), or None if there is no straggler."""
    if len(figures) < 2:
        return None
    slowest = max(figures, key=lambda process: figures[process].own)
    its = figures[slowest]
    late = its.own - statistics.median(other.own for process, other in figures.items() if process != slowest)
    if late > SHARE * its.step_seconds and its.waiting < LITTLE_WAIT * its.step_seconds:
        return slowest, late
    return None


def describe(figures: Mapping[int, Figures], process: int, late: float, axes: list[str]) -> str:
    """Describe whom the others wait for, how long, and what it does in that time."""
    its = figures[process]
    data = statistics.median(other.data for i, other in figures.items() if i != process)
    what = (
        f"{its.data:.3g} s for data, {data:.3g} s elsewhere" if its.data > its.own / 2 else "and not for data: its host is busy"
    )
    along = f", along {' and '.join(axes)}" if axes else ""
    return (
        f"the others wait {late:.3g} s of each step's {its.step_seconds:.3g} s for process {process} on {its.host}{along}: "
        f"it spends {its.own:.3g} s at work of its own ({what})"
    )


class Stragglers:
    """Posts this process's waiting times; in process 0, names the straggler.

    Args:
      process: this process's index.
      count: number of processes.
      say: prints a line; called when the straggler changes.
    """

    def __init__(self, process: int, count: int, mesh: Mesh, say: Callable[[str], None]):
        self._process, self._count, self._mesh, self._say = process, count, mesh, say
        self._named: int | None = None

    def row(self, step: int, timings: Mapping[str, Any]) -> dict[str, float | int | str | None]:
        """Return the logged row's figures on the processes' paces; empty for a single process.

        `own_seconds_median` and `own_seconds_max` are over the processes; `straggler_process` is the one that the others wait
        for and `straggler_seconds` how long per step; both None without a straggler.

        Args:
          timings: `StepClock.window`'s row.
        """
        if self._count == 1 or timings.get("step_seconds_mean") is None:
            return {}
        own = Figures(
            step,
            socket.gethostname(),
            timings["step_seconds_mean"],
            timings["device_wait_seconds"],
            timings["data_wait_seconds"],
        )
        tell(f"{FOLDER}/{self._process}", json.dumps(asdict(own)))
        if self._process != 0:
            return {}
        figures = {int(process): Figures(**json.loads(said)) for process, said in read_folder(FOLDER).items()}
        found = find_straggler(figures)
        if found is not None and found[0] != self._named:
            self._say(f"slow       {describe(figures, *found, crossing_axes(self._mesh, found[0]))}")
        self._named = None if found is None else found[0]
        times = [each.own for each in figures.values()]
        return {
            "own_seconds_median": statistics.median(times),
            "own_seconds_max": max(times),
            "straggler_process": None if found is None else found[0],
            "straggler_seconds": None if found is None else found[1],
        }
