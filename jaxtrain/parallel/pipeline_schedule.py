"""Pipeline schedules as tables, and the checker that proves that a table runs. Numpy only.

Time is cut into ticks that all stages share. In a tick a stage does at most one forward (F) and then at most one backward (B)
of one microbatch through one chunk; then boundary activations go to the next stage and their gradients to the previous one. The
layer stack is cut into `stages * chunks` parts; part p is chunk p // stages of stage p % stages, or of stage
S - 1 - p % S in odd chunks if the table is folded (`layout.stage_of_part`).

A table may put the weight-gradient matmuls of a B off to a later W of the same microbatch and chunk, which sends nothing: the
third kind of pass of a tick, after B.

Sources: GPipe (Huang et al. 2019), 1F1B (PipeDream-flush, Narayanan et al. 2021a), interleaved 1F1B (Narayanan et al. 2021b),
ZB-H1 (Qi et al. 2023, arXiv:2401.10241), the V shape (Qi et al. 2024, arXiv:2405.15362).
In lock-step, F of microbatch m at tick m + i and B at m + 2(S-1) - i on stage i takes exactly the ideal 1F1B time, because
warm-up ticks hold only F and drain ticks only B; the price is that stage i holds up to 2(S-1-i)+1 microbatches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxtrain.config import FOLDED_SCHEDULES
from jaxtrain.errors import ExplainedError
from jaxtrain.layout import stage_of_part

IDLE = -1


@dataclass(frozen=True)
class Schedule:
    """A table of work. Each array is int32 [ticks, stages]; IDLE (-1) where a stage is idle."""

    stages: int
    chunks: int
    microbatches: int
    forward_microbatch: np.ndarray
    forward_chunk: np.ndarray
    backward_microbatch: np.ndarray
    backward_chunk: np.ndarray
    weight_microbatch: np.ndarray
    """IDLE everywhere if B computes the weights' gradients too."""
    weight_chunk: np.ndarray
    folded: bool = False
    """Whether odd chunks go through the stages from the last to the first, so that the last part is on the first stage."""

    @property
    def ways(self) -> tuple[int, ...]:
        """Stages by which a table sends activations on; gradients go by the negative. 0: to itself, where the stack turns."""
        return (+1, -1, 0) if self.folded else (+1,)

    @property
    def last_stage(self) -> int:
        """The stage of the last part, which does the loss."""
        return stage_of_part(self.parts - 1, self.stages, self.folded)

    @property
    def splits_backward(self) -> bool:
        """Return whether weight-gradient matmuls are passes of their own."""
        return bool((self.weight_microbatch != IDLE).any())

    @property
    def ticks(self) -> int:
        """Length of the table."""
        return len(self.forward_microbatch)

    @property
    def parts(self) -> int:
        """Number of parts of the layer stack."""
        return self.stages * self.chunks

    @property
    def is_accumulation(self) -> bool:
        """Return whether each microbatch goes forward and backward in one tick: nothing waits for a backward."""
        return self.parts == 1 and bool((self.forward_microbatch == self.backward_microbatch).all())


@dataclass(frozen=True)
class ScheduleCost:
    """The cost of a table."""

    ticks: int
    bubble_fraction: float
    """Share of the stages' time spent idle: B takes twice as long as F, half of it W if that is a pass of its own, and a tick
    takes as long as its slowest stage."""
    live_parts: list[int] = field(default_factory=list)
    """For each stage, the largest number of (microbatch, chunk) whose activations it holds at one time."""


Ticks = Mapping[tuple[int, int, int], int]
"""(stage, microbatch, chunk) -> the tick in which the stage does that pass."""


def make_table(
    stages: int,
    chunks: int,
    microbatches: int,
    forward: Ticks,
    backward: Ticks,
    weight: Ticks | None = None,
    folded: bool = False,
) -> Schedule:
    """Return the table of work that is to be done in these ticks; without `weight`, B computes the weights' gradients too.

    Raises:
      ExplainedError: a stage would do two passes of one kind in a tick.
    """
    works = forward, backward, weight or {}
    ticks = max(tick for work in works for tick in work.values()) + 1
    arrays = [np.full((ticks, stages), IDLE, np.int32) for _ in range(6)]
    for work, microbatch_array, chunk_array in zip(works, arrays[::2], arrays[1::2], strict=True):
        for (stage, microbatch, chunk), tick in work.items():
            if microbatch_array[tick, stage] != IDLE:
                raise ExplainedError(f"tick {tick}: stage {stage} would do two passes of one kind")
            microbatch_array[tick, stage], chunk_array[tick, stage] = microbatch, chunk
    return Schedule(stages, chunks, microbatches, *arrays, folded=folded)


def _units(stages: int, chunks: int, microbatches: int) -> Iterable[tuple[int, int, int, int]]:
    """Yield (stage, microbatch, chunk, group start): microbatches go in groups of `stages`, each group through all chunks."""
    for stage in range(stages):
        for microbatch in range(microbatches):
            for chunk in range(chunks):
                yield stage, microbatch, chunk, microbatch // stages * stages * chunks + microbatch % stages


def interleaved(stages: int, chunks: int, microbatches: int) -> Schedule:
    """Return interleaved 1F1B, which with one chunk is 1F1B. Bubble (S-1)/(kM+S-1) for M a multiple of S, in passes of a chunk.

    F of microbatch gS+r through chunk c runs on stage i at tick gSk + cS + r + i; B mirrors it, chunks from last to first, and
    starts on the last stage in the tick of the first microbatch's last F.
    """
    forward, backward = {}, {}
    for stage, microbatch, chunk, start in _units(stages, chunks, microbatches):
        key = (stage, microbatch, chunk)
        forward[key] = start + chunk * stages + stage
        backward[key] = stages * chunks - 1 + start + (chunks - 1 - chunk) * stages + stages - 1 - stage
    return make_table(stages, chunks, microbatches, forward, backward)


def zero_bubble(stages: int, chunks: int, microbatches: int) -> Schedule:
    """Return interleaved 1F1B with W put off into the ticks in which a stage would wait: ZB-H1 in lock-step.

    Bubble (S-1)/(3kM+S-1) for M >= 2(S-1) a multiple of S, if F, B and W take equally long; 1F1B's is 3(S-1)/k longer, less
    S-1. A W runs where its stage has time left in a tick, in ticks in which all stages do F and B, and in ticks of its own at
    the end. The price: operands of up to 2(S-1) W are held at a time (k = 1), and the lock-step already holds what ZB-H2 would.
    """
    return _put_off_weights(interleaved(stages, chunks, microbatches))


def v_shape(stages: int, chunks: int, microbatches: int) -> Schedule:
    """Return a folded table of two chunks: 1F1B's bubble, (S-1)/(M+S-1), and half of its activations, as many on each stage.

    F of microbatch m runs on stage i at ticks 2m + i and 2m + 2S-1 - i, B at 2m + 2S-1 + i and 2m + 4S-2 - i. So a stage holds
    its two parts of a microbatch, each half a stage's layers, for 2S ticks in all: S microbatches, where 1F1B in lock-step
    holds up to 2S - 1. The first and the last part are on stage 0.
    """
    if chunks != 2:
        raise ExplainedError(f"a folded schedule has 2 chunks a stage, not {chunks}")
    forward, backward, last = {}, {}, 2 * stages - 1
    for i in range(stages):
        for m in range(microbatches):
            forward |= {(i, m, 0): 2 * m + i, (i, m, 1): 2 * m + last - i}
            backward |= {(i, m, 1): 2 * m + last + i, (i, m, 0): 2 * m + 2 * last - i}
    return make_table(stages, 2, microbatches, forward, backward, folded=True)


def zero_bubble_v(stages: int, chunks: int, microbatches: int) -> Schedule:
    """Return `v_shape` with W put off, as `zero_bubble` does with interleaved 1F1B: ZB-V's placement in lock-step.

    Its bubble is that of `zero_bubble` with one chunk, for half of the residuals and operands of up to (3S-2)/2 W.
    """
    return _put_off_weights(v_shape(stages, chunks, microbatches))


def _put_off_weights(table: Schedule) -> Schedule:
    """Return the table with a W for each B, in the first tick in which it makes no tick longer, or in ticks at the end."""
    stages = table.stages
    doing = np.stack([table.forward_microbatch != IDLE, table.backward_microbatch != IDLE]).astype(int).sum(0)
    waiting: list[list[tuple[int, int, int]]] = [[] for _ in range(stages)]
    weight, tick = {}, 0
    while tick < table.ticks or any(waiting):
        for stage in range(stages) if tick < table.ticks else ():
            if table.backward_microbatch[tick, stage] != IDLE:
                key = (stage, int(table.backward_microbatch[tick, stage]), int(table.backward_chunk[tick, stage]))
                waiting[stage].append(key)
        busy = doing[tick] if tick < table.ticks else np.zeros(stages, int)
        for stage in np.flatnonzero((busy < busy.max()) | (busy.min() == busy.max()) & (busy.max() != 1)):
            if waiting[stage]:
                weight[waiting[stage].pop(0)] = tick
        tick += 1
    forward, backward = (
        ticks_of(table.forward_microbatch, table.forward_chunk),
        ticks_of(table.backward_microbatch, table.backward_chunk),
    )
    return make_table(stages, table.chunks, table.microbatches, forward, backward, weight, table.folded)


def one_f_one_b(stages: int, chunks: int, microbatches: int) -> Schedule:
    """Return 1F1B: a stage's backward of a microbatch starts as soon as its gradient arrives, so few activations are held."""
    _one_chunk("1f1b", chunks)
    return interleaved(stages, 1, microbatches)


def gpipe(stages: int, chunks: int, microbatches: int) -> Schedule:
    """Return GPipe: all forwards, then all backwards; every microbatch's activations are held in between."""
    _one_chunk("gpipe", chunks)
    forward = {(i, m, 0): m + i for i in range(stages) for m in range(microbatches)}
    turn = stages + microbatches - 1
    backward = {(i, m, 0): turn + m + stages - 1 - i for i in range(stages) for m in range(microbatches)}
    return make_table(stages, 1, microbatches, forward, backward)


def forward_only(name: str, stages: int, chunks: int, microbatches: int) -> Schedule:
    """Return a table of forwards alone, with the parts of the stack where schedule `name` has them."""
    if name in FOLDED_SCHEDULES:
        folded = v_shape(stages, chunks, microbatches)
        return make_table(stages, 2, microbatches, ticks_of(folded.forward_microbatch, folded.forward_chunk), {}, folded=True)
    forward = {(i, m, c): start + c * stages + i for i, m, c, start in _units(stages, chunks, microbatches)}
    return make_table(stages, chunks, microbatches, forward, {})


def _one_chunk(name: str, chunks: int) -> None:
    if chunks != 1:
        raise ExplainedError(f"schedule {name} has 1 chunk a stage, not {chunks}; use interleaved")


SCHEDULES = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zero_bubble": zero_bubble,
    "v_shape": v_shape,
    "zero_bubble_v": zero_bubble_v,
}


def schedule_of(config: Any) -> Schedule:
    """Return the schedule of a valid `Config`, checked: the one that is plugged in, else that of pipeline.schedule.

    Raises:
      ExplainedError: the schedule that is plugged in cannot run; names the pass. Or it is one of other sizes.
    """
    pipe, chunks, microbatches = config.mesh.pipe, config.pipeline.chunks, config.train.microbatches
    if config.parts.schedule is None:
        return make_schedule(config.pipeline.schedule, pipe, chunks, microbatches)
    schedule = config.parts.schedule(pipe, chunks, microbatches)
    if not isinstance(schedule, Schedule):
        raise ExplainedError(f"the schedule that is plugged in gave a {type(schedule).__name__}; return what make_table gives")
    made = schedule.stages, schedule.chunks, schedule.microbatches
    if made != (pipe, chunks, microbatches):
        raise ExplainedError(
            f"the schedule that is plugged in is one of (stages, chunks, microbatches) {made}, but was asked for one of "
            f"{(pipe, chunks, microbatches)} (mesh.pipe, pipeline.chunks, train.microbatches)"
        )
    check(schedule)
    if schedule.folded != (config.pipeline.schedule in FOLDED_SCHEDULES):
        raise ExplainedError(
            f"the schedule that is plugged in has folded={schedule.folded}, but pipeline.schedule={config.pipeline.schedule} "
            f"says where the layers lie; give --pipeline.schedule={'v_shape' if schedule.folded else '1f1b'} too"
        )
    return schedule


def forwards_of(config: Any, microbatches: int) -> Schedule:
    """Return a table of forwards alone, for evaluation, with the layers where the config's schedule has them."""
    return forward_only(config.pipeline.schedule, config.mesh.pipe, config.pipeline.chunks, microbatches)


def make_schedule(name: str, stages: int, chunks: int, microbatches: int) -> Schedule:
    """Return the named schedule, checked. To add one, add to SCHEDULES a function that returns a table."""
    schedule = SCHEDULES[name](stages, chunks, microbatches)
    check(schedule)
    return schedule


def ticks_of(microbatch: np.ndarray, chunk: np.ndarray) -> dict[tuple[int, int, int], int]:
    """{(stage, microbatch, chunk): tick} of one kind of pass.

    Raises:
      ExplainedError: a pass is done twice.
    """
    found: dict[tuple[int, int, int], int] = {}
    for tick, stage in zip(*np.nonzero(microbatch != IDLE), strict=True):
        key = (int(stage), int(microbatch[tick, stage]), int(chunk[tick, stage]))
        if key in found:
            raise ExplainedError(
                f"stage {key[0]} passes microbatch {key[1]} through chunk {key[2]} in ticks {found[key]} and {tick}"
            )
        found[key] = int(tick)
    return found


def neighbour(stage: int, chunk: int, schedule: Schedule, step: int) -> tuple[int, int] | None:
    """(stage, chunk) of the part `step` positions on, or None past either end."""
    part = chunk * schedule.stages + stage_of_part(stage + schedule.stages * chunk, schedule.stages, schedule.folded) + step
    if not 0 <= part < schedule.parts:
        return None
    return stage_of_part(part, schedule.stages, schedule.folded), part // schedule.stages


def check(schedule: Schedule, backward: bool = True) -> ScheduleCost:
    """Prove that a table runs, and return its cost.

    Every microbatch passes every part forward and back exactly once, each pass comes after the exchange that brings its input
    (which is all that a lock-step table needs to be free of deadlock), and W, if it is a pass of its own, after its B.

    Raises:
      ExplainedError: a pass cannot run; names it.
    """
    f = ticks_of(schedule.forward_microbatch, schedule.forward_chunk)
    b = ticks_of(schedule.backward_microbatch, schedule.backward_chunk)
    everything = {
        (s, m, c) for s in range(schedule.stages) for m in range(schedule.microbatches) for c in range(schedule.chunks)
    }
    w = ticks_of(schedule.weight_microbatch, schedule.weight_chunk)
    named = [("forward", f)] + [("backward", b)] * backward + [("weight", w)] * schedule.splits_backward
    for name, done in named:
        if set(done) != everything:
            odd = sorted(set(done) ^ everything)[0]
            raise ExplainedError(
                f"{name} of (stage, microbatch, chunk) {odd} is {'missing' if odd in everything else 'unknown'}"
            )
    for (stage, microbatch, chunk), tick in f.items():
        before = neighbour(stage, chunk, schedule, -1)
        if before and f[before[0], microbatch, before[1]] >= tick:
            raise ExplainedError(
                f"forward of microbatch {microbatch} on stage {stage} chunk {chunk} at tick {tick} has no input yet"
            )
    for (stage, microbatch, chunk), tick in b.items():
        after = neighbour(stage, chunk, schedule, +1)
        late = b[after[0], microbatch, after[1]] >= tick if after else False
        if late or f[stage, microbatch, chunk] > tick:
            raise ExplainedError(
                f"backward of microbatch {microbatch} on stage {stage} chunk {chunk} at tick {tick} has no gradient yet"
            )
    for key, tick in w.items():
        if b[key] > tick:
            raise ExplainedError(f"weight of (stage, microbatch, chunk) {key} at tick {tick} comes before its backward")
    return ScheduleCost(schedule.ticks, bubble_fraction(schedule), live_parts(schedule))


def bubble_fraction(
    schedule: Schedule, forward_cost: float = 1.0, backward_cost: float = 2.0, weight_cost: float = 1.0
) -> float:
    """1 - (work of one stage) / (time of the table); a tick lasts as long as the slowest stage in it.

    Warm-up ticks hold only F and drain ticks only B, so lock-step loses nothing there. `backward_cost` includes `weight_cost`.
    """
    backward_cost -= weight_cost * schedule.splits_backward
    cost = (schedule.forward_microbatch != IDLE) * forward_cost + (schedule.backward_microbatch != IDLE) * backward_cost
    cost = cost + (schedule.weight_microbatch != IDLE) * weight_cost
    return float(1 - cost.sum(0).max() / cost.max(1).sum())


def live_parts(schedule: Schedule) -> list[int]:
    """Return for each stage the largest number of (microbatch, chunk) between their F and their B."""
    forward = (schedule.forward_microbatch != IDLE).astype(int)
    backward = (schedule.backward_microbatch != IDLE).astype(int)
    return (np.cumsum(forward, 0) - np.cumsum(backward, 0) + backward).max(0).tolist()


@dataclass(frozen=True)
class TickRun:
    """Ticks [start, stop), in each of which "no", "some" or "all" stages do each kind of pass."""

    start: int
    stop: int
    forward: str
    backward: str
    weight: str = "no"


def _pattern(busy: np.ndarray) -> str:
    """Return whether no, some or all (tick, stage) cells are busy."""
    return "all" if busy.all() else "some" if busy.any() else "no"


def cut_into_runs(schedule: Schedule, most: int | None = None) -> list[TickRun]:
    """Cut the table into at most `most` runs of like ticks: 4, 5 if it is folded, or 6 if W is a pass of its own.

    The executor traces a run once, with a conditional only for a pass that "some" stages do, so the steady state has none.
    Adjacent runs are joined where that adds the fewest conditional passes, since every run is compiled separately.
    """
    most = most or (6 if schedule.splits_backward else 5 if schedule.folded else 4)
    busy = [m != IDLE for m in (schedule.forward_microbatch, schedule.backward_microbatch, schedule.weight_microbatch)]

    def run(start: int, stop: int) -> TickRun:
        return TickRun(start, stop, *(_pattern(kind[start:stop]) for kind in busy))

    def conditional_passes(r: TickRun) -> int:
        return (r.stop - r.start) * [r.forward, r.backward, r.weight].count("some")

    runs: list[TickRun] = []
    for tick in range(schedule.ticks):
        now = run(tick, tick + 1)
        same = bool(runs) and replace(runs[-1], start=tick, stop=tick + 1) == now
        runs[-1:] = [run(runs[-1].start, tick + 1)] if same else [*runs[-1:], now]
    while len(runs) > most:
        joined = [run(a.start, b.stop) for a, b in zip(runs, runs[1:], strict=False)]
        costs = [
            conditional_passes(j) - conditional_passes(a) - conditional_passes(b)
            for j, a, b in zip(joined, runs, runs[1:], strict=False)
        ]
        best = int(np.argmin(costs))
        runs[best : best + 2] = [joined[best]]
    return runs
