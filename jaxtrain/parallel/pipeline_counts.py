"""Counts of the ticks of a pipeline's table and the time that stages wait, for the planner. Numpy only."""

from __future__ import annotations

import functools
from collections import Counter
from typing import NamedTuple

import numpy as np

from jaxtrain.config import FOLDED_SCHEDULES
from jaxtrain.parallel.pipeline_schedule import IDLE, SCHEDULES, cut_into_runs, make_schedule


class Passes(NamedTuple):
    """Ticks of a schedule."""

    forward: int
    """Ticks in which some stage runs a forward pass."""
    backward: int
    both: int
    """Ticks with both."""


@functools.lru_cache(maxsize=65536)
def count_passes(name: str, stages: int, chunks: int, microbatches: int) -> Passes:
    """Count the ticks of a schedule's table in which any stage works: in closed form where microbatches come in whole groups
    (or groups do not matter), else from the table.

    Interleaved (1F1B is one chunk): kM + S - 1 ticks each, B from tick kS - 1 on. GPipe: M + S - 1 each, none with both.
    Folded: 2M + 2S - 2 each, B from tick 2S - 1 on.
    """
    if name in FOLDED_SCHEDULES:
        ticks = 2 * (microbatches + stages - 1)
        return Passes(ticks, ticks, 2 * microbatches - 1)
    if name == "gpipe":
        return Passes(microbatches + stages - 1, microbatches + stages - 1, 0)
    if chunks == 1 or microbatches % stages == 0:
        ticks = chunks * microbatches + stages - 1
        return Passes(ticks, ticks, max(0, ticks - (chunks * stages - 1)))
    table = make_schedule(name, stages, chunks, microbatches)
    forward, backward = ((m != IDLE).any(1) for m in (table.forward_microbatch, table.backward_microbatch))
    return Passes(int(forward.sum()), int(backward.sum()), int((forward & backward).sum()))


@functools.lru_cache(maxsize=4096)
def _work_of_ticks(name: str, stages: int, chunks: int, microbatches: int) -> dict[frozenset[tuple[bool, bool, bool]], int]:
    """{the sets of passes that stages do in a tick of the table: number of such ticks}."""
    table = SCHEDULES[name](stages, chunks, microbatches)
    doing = np.stack([table.forward_microbatch, table.backward_microbatch, table.weight_microbatch], -1) != IDLE
    return Counter(frozenset(map(tuple, tick.tolist())) for tick in doing)


def waiting_time(table: tuple[str, int, int, int], forward: float, backward: float, weight: float) -> float:
    """Return the time that a stage waits for others in a step, from the time of each pass; `backward` includes `weight`.

    Args:
      table: (name, stages, chunks, microbatches).
    """
    name, stages, chunks, microbatches = table
    busy = chunks * microbatches
    if name not in ("zero_bubble", "zero_bubble_v") or stages == 1:
        passes = count_passes(*table)
        return (passes.forward - busy) * forward + (passes.backward - busy) * backward
    costs = forward, backward - weight, weight
    ticks = _work_of_ticks(*table).items()
    longest = ((max(sum(c for c, does in zip(costs, work, strict=True) if does) for work in works), n) for works, n in ticks)
    return sum(n * time for time, n in longest) - busy * (forward + backward)


@functools.lru_cache(maxsize=1024)
def count_executed(name: str, stages: int, chunks: int, microbatches: int) -> tuple[int, int, int]:
    """(ticks with F, with B, with weight gradients) that the executor runs: all of a run of like ticks.

    There are more of them than `count_passes` counts where runs were joined.
    """
    schedule = make_schedule(name, stages, chunks, microbatches)
    runs = cut_into_runs(schedule)
    forward = sum(run.stop - run.start for run in runs if run.forward != "no")
    backward = sum(run.stop - run.start for run in runs if run.backward != "no")
    apart = schedule.splits_backward and not schedule.is_accumulation
    return forward, backward, sum(run.stop - run.start for run in runs if run.weight != "no") if apart else backward
