"""Buffer slots of the values that a pipeline's table hands on, with as few slots as their lifetimes allow. Numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxtrain.layout import stage_of_part
from jaxtrain.parallel.pipeline_schedule import IDLE, Schedule, neighbour, ticks_of

# Order of events inside a tick, to place buffer lifetimes on one time line.
_FORWARD, _BACKWARD, _WEIGHT, _EXCHANGE = 0, 1, 2, 3
_WAYS = {+1: _EXCHANGE, -1: _EXCHANGE + 1, 0: _EXCHANGE + 2}
"""Where a value comes from: stages that it was sent on by (0: it stayed) -> the event of its arrival."""
_PHASES = _EXCHANGE + len(_WAYS)


@dataclass(frozen=True)
class Slots:
    """The buffer slot of each value, int32 [ticks, stages]; slot `count` is written but never read.

    activation: boundary activations received, from the exchange of the sender's tick until the F that takes them; written
      [ticks, stages, ways], for each of `Schedule.ways` that one may come.
    gradient: boundary gradients, from the exchange (or from the loss, on the last part) until the B that takes them; written
      likewise.
    residual: the residuals that F stores for B.
    operand: the operands of matmuls that B stores for W.
    """

    activation_count: int
    activation_read: np.ndarray
    activation_write: np.ndarray
    gradient_count: int
    gradient_read: np.ndarray
    gradient_write: np.ndarray
    gradient_write_loss: np.ndarray
    residual_count: int
    residual_write: np.ndarray
    residual_read: np.ndarray
    operand_count: int
    operand_write: np.ndarray
    operand_read: np.ndarray


def allocate_slots(schedule: Schedule) -> Slots:
    """Give every stored value a slot, with as few slots as the lifetimes allow (interval colouring, stage by stage)."""
    f = ticks_of(schedule.forward_microbatch, schedule.forward_chunk)
    b = ticks_of(schedule.backward_microbatch, schedule.backward_chunk)
    shape = schedule.forward_microbatch.shape
    w = ticks_of(schedule.weight_microbatch, schedule.weight_chunk)
    activations, gradients, residuals = [], [], []  # (stage, write time, read time)
    operands = [(key[0], b[key] * _PHASES + _BACKWARD, tick * _PHASES + _WEIGHT) for key, tick in w.items()]
    for (stage, microbatch, chunk), tick in f.items():
        before = neighbour(stage, chunk, schedule, -1)
        if before:
            sent = f[before[0], microbatch, before[1]] * _PHASES + _arrival(schedule, chunk, before[1], +1)
            activations.append((stage, sent, tick * _PHASES + _FORWARD))
        if b:
            back = b[stage, microbatch, chunk] * _PHASES + _BACKWARD
            residuals.append((stage, tick * _PHASES + _FORWARD, back))
            after = neighbour(stage, chunk, schedule, +1)
            sent = tick * _PHASES + _FORWARD
            if after:
                sent = b[after[0], microbatch, after[1]] * _PHASES + _arrival(schedule, chunk, after[1], -1)
            gradients.append((stage, sent, back))
    activation_count, activation_write, activation_read = _colour(activations, shape)
    gradient_count, gradient_write, gradient_read = _colour(gradients, shape)
    residual_count, residual_write, residual_read = _colour(residuals, shape)
    operand_count, operand_write, operand_read = _colour(operands, shape)
    arrivals = [_WAYS[way] for way in schedule.ways]
    back_arrivals = [_WAYS[-way] for way in schedule.ways]
    return Slots(
        activation_count=activation_count,
        activation_read=activation_read[_FORWARD],
        activation_write=np.stack([activation_write[arrival] for arrival in arrivals], -1),
        gradient_count=gradient_count,
        gradient_read=gradient_read[_BACKWARD],
        gradient_write=np.stack([gradient_write[arrival] for arrival in back_arrivals], -1),
        gradient_write_loss=gradient_write[_FORWARD],
        residual_count=residual_count,
        residual_write=residual_write[_FORWARD],
        residual_read=residual_read[_BACKWARD],
        operand_count=operand_count,
        operand_write=operand_write[_BACKWARD],
        operand_read=operand_read[_WEIGHT],
    )


def _arrival(schedule: Schedule, chunk: int, sender: int, step: int) -> int:
    """Return the event in which what a part of chunk `sender` made arrives at its neighbour, of `chunk`, `step` parts on."""
    if not schedule.folded:
        return _WAYS[step]
    return _WAYS[0 if chunk != sender else -step if chunk % 2 else step]


def count_slots(schedule: Schedule) -> tuple[int, int, int, int]:
    """Return the number of slots of `allocate_slots` for (activations, gradients, residuals, operands), without allocating.

    It is the largest number of overlapping lifetimes on any stage. The planner calls it for many tables.
    """
    f = _tick_of_each(schedule, schedule.forward_microbatch, schedule.forward_chunk) * _PHASES
    b = _tick_of_each(schedule, schedule.backward_microbatch, schedule.backward_chunk) * _PHASES
    parts = f.reshape(schedule.parts, -1), b.reshape(schedule.parts, -1)  # [part, microbatch]
    lifetimes = {"activation": (parts[0][:-1] + _EXCHANGE, parts[0][1:] + _FORWARD, 1)}
    sent = np.concatenate([parts[1][1:] + _EXCHANGE, parts[0][-1:] + _FORWARD])
    lifetimes |= {"gradient": (sent, parts[1] + _BACKWARD, 0), "residual": (parts[0] + _FORWARD, parts[1] + _BACKWARD, 0)}
    if schedule.splits_backward:
        w = _tick_of_each(schedule, schedule.weight_microbatch, schedule.weight_chunk).reshape(schedule.parts, -1)
        lifetimes |= {"operand": (parts[1] + _BACKWARD, w * _PHASES + _WEIGHT, 0)}
    counts = []
    for writes, reads, first in lifetimes.values():
        stages = np.asarray([stage_of_part(first + i, schedule.stages, schedule.folded) for i in range(len(writes))])
        counts.append(max((_overlap(writes[stages == i], reads[stages == i]) for i in range(schedule.stages)), default=0))
    return counts[0], counts[1], counts[2], counts[3] if schedule.splits_backward else 0


def _tick_of_each(schedule: Schedule, microbatch: np.ndarray, chunk: np.ndarray) -> np.ndarray:
    """Return the tick of each pass of one kind, int [chunks, stages, microbatches], in the order of parts."""
    ticks = np.zeros((schedule.chunks, schedule.stages, schedule.microbatches), np.int64)
    tick, stage = np.nonzero(microbatch != IDLE)
    ticks[chunk[tick, stage], stage, microbatch[tick, stage]] = tick
    if schedule.folded:
        ticks[1::2] = ticks[1::2, ::-1].copy()
    return ticks


def _overlap(writes: np.ndarray, reads: np.ndarray) -> int:
    """Return the maximum number of overlapping intervals [write, read]; a slot is free only after its read."""
    begun, ended = np.sort(writes, axis=None), np.sort(reads, axis=None)
    alive = np.searchsorted(begun, begun, "right") - np.searchsorted(ended, begun, "left")
    return int(alive.max(initial=0))


def _colour(lifetimes: list[tuple[int, int, int]], shape: tuple[int, int]) -> tuple[int, np.ndarray, np.ndarray]:
    """Return for (stage, write time, read time): number of slots, and slots written and read as [phase, tick, stage]."""
    free: dict[int, list[tuple[int, int]]] = {}  # stage -> (time from which the slot is free, slot)
    placed, count = [], 0
    for stage, write, read in sorted(lifetimes):
        slots = free.setdefault(stage, [])
        ready = next((i for i, (since, _) in enumerate(slots) if since < write), None)
        slot = slots.pop(ready)[1] if ready is not None else len(slots)
        slots.append((read, slot))
        count = max(count, slot + 1)
        placed.append((stage, write, read, slot))
    writes, reads = (np.full((_PHASES, *shape), count, np.int32) for _ in range(2))
    for stage, write, read, slot in placed:
        writes[write % _PHASES, write // _PHASES, stage] = slot
        reads[read % _PHASES, read // _PHASES, stage] = slot
    return count, writes, reads
