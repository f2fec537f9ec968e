"""Lay out a pipeline schedule in time: the same boxes for the page's Gantt chart and for the terminal's."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtrain.config import Config
from jaxtrain.parallel.pipeline_schedule import IDLE, Schedule, schedule_of

FORWARD, BACKWARD, WEIGHT = 1, 2, 1
"""Units of time, as in `pipeline_schedule.bubble_fraction`: a backward pass takes twice as long as a forward one, half of it
the weights' gradients, where these are passes of their own."""


@dataclass(frozen=True)
class Box:
    """One pass of one microbatch through one chunk."""

    stage: int
    start: int
    length: int
    kind: str
    """F, B or W."""
    microbatch: int
    chunk: int


@dataclass(frozen=True)
class Timeline:
    """All passes of a step."""

    boxes: tuple[Box, ...]
    stages: int
    length: int
    """Total number of units."""


def timeline(schedule: Schedule) -> Timeline:
    """Return the boxes of a table in lock-step: a tick lasts as long as its slowest stage, F before B before W."""
    boxes, now = [], 0
    backward = BACKWARD - WEIGHT * schedule.splits_backward
    kinds = (
        ("F", FORWARD, schedule.forward_microbatch, schedule.forward_chunk),
        ("B", backward, schedule.backward_microbatch, schedule.backward_chunk),
        ("W", WEIGHT, schedule.weight_microbatch, schedule.weight_chunk),
    )
    for tick in range(schedule.ticks):
        length = 0
        for stage in range(schedule.stages):
            start = now
            for kind, takes, microbatches, chunks in kinds:
                if microbatches[tick, stage] != IDLE:
                    boxes.append(Box(stage, start, takes, kind, int(microbatches[tick, stage]), int(chunks[tick, stage])))
                    start += takes
            length = max(length, start - now)
        now += length
    return Timeline(tuple(boxes), schedule.stages, now)


def timeline_of(config: Config) -> Timeline:
    """Return the timeline of a valid config's step."""
    return timeline(schedule_of(config))


def text_gantt(line: Timeline, width: int) -> str:
    """Return one line per stage: "F3" for microbatch 3 forward, "B3" back, "W3" its weights' gradients where they are a pass of
    their own ("F3'" through the second chunk), dots for its duration.

    Longer steps are cut in the middle, so that the pipeline's filling and draining both show.
    """
    label = max((len(_name(box)) for box in line.boxes), default=2) + 1
    head = len(f"stage {line.stages - 1}  ")
    columns = max(4, (width - head) // label)
    shown = list(range(line.length))
    if line.length > columns:
        left = (columns - 1) * 2 // 3
        shown = [*range(left), -1, *range(line.length - (columns - 1 - left), line.length)]
    rows = []
    for stage in range(line.stages):
        cells = {unit: _cell(box, unit, label) for box in line.boxes if box.stage == stage for unit in _units(box)}
        row = "".join(" … ".center(label) if unit < 0 else cells.get(unit, " " * label) for unit in shown)
        rows.append(f"stage {stage:<{len(str(line.stages - 1))}}  {row}".rstrip())
    return "\n".join(rows)


def _units(box: Box) -> range:
    return range(box.start, box.start + box.length)


def _name(box: Box) -> str:
    chunk = "'" * box.chunk if box.chunk < 3 else f"/{box.chunk}"
    return f"{box.kind}{box.microbatch}{chunk}"


def _cell(box: Box, unit: int, label: int) -> str:
    """Return the text of a unit of a box: its name, then dots up to its end."""
    text = _name(box) if unit == box.start else ""
    fill = " " if box.length == 1 else "·"
    return text.ljust(label - 1, fill) + (" " if unit == box.start + box.length - 1 else fill)
