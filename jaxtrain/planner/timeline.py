"""Lay out a pipeline schedule in time: the same boxes for the page's Gantt chart and for the terminal's."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtrain.config import Config
from jaxtrain.parallel.pipeline_schedule import IDLE, Schedule, schedule_of

FORWARD, BACKWARD = 1, 2
"""Units of time: a backward pass takes twice as long as a forward one, as in `pipeline_schedule.bubble_fraction`."""


@dataclass(frozen=True)
class Box:
    """One pass of one microbatch through one chunk."""

    stage: int
    start: int
    length: int
    is_forward: bool
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
    """Return the boxes of a table in lock-step: a tick lasts as long as its slowest stage, forwards before backwards."""
    boxes, now = [], 0
    for tick in range(schedule.ticks):
        length = 0
        for stage in range(schedule.stages):
            start = now
            forward, backward = schedule.forward_microbatch[tick, stage], schedule.backward_microbatch[tick, stage]
            if forward != IDLE:
                boxes.append(Box(stage, start, FORWARD, True, int(forward), int(schedule.forward_chunk[tick, stage])))
                start += FORWARD
            if backward != IDLE:
                boxes.append(Box(stage, start, BACKWARD, False, int(backward), int(schedule.backward_chunk[tick, stage])))
                start += BACKWARD
            length = max(length, start - now)
        now += length
    return Timeline(tuple(boxes), schedule.stages, now)


def timeline_of(config: Config) -> Timeline:
    """Return the timeline of a valid config's step."""
    return timeline(schedule_of(config))


def text_gantt(line: Timeline, width: int) -> str:
    """Return one line per stage: "F3" for microbatch 3 forward, "B3" back ("F3'" through the second chunk), dots for its
    duration.

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
    return f"{'F' if box.is_forward else 'B'}{box.microbatch}{chunk}"


def _cell(box: Box, unit: int, label: int) -> str:
    """Return the text of a unit of a box: its name, then dots up to its end."""
    text = _name(box) if unit == box.start else ""
    fill = " " if box.length == 1 else "·"
    return text.ljust(label - 1, fill) + (" " if unit == box.start + box.length - 1 else fill)
