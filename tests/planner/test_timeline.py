"""Schedules in time: the boxes are the table's passes, and what is left between them is the bubble."""

from collections import Counter

import pytest

from jaxtrain.parallel.pipeline_schedule import bubble_fraction, make_schedule
from jaxtrain.planner.timeline import text_gantt, timeline

SCHEDULES = [("gpipe", 4, 1, 6), ("1f1b", 4, 1, 8), ("1f1b", 1, 1, 3), ("interleaved", 3, 2, 6), ("zero_bubble", 4, 1, 8)]
SCHEDULES += [("v_shape", 4, 2, 8), ("zero_bubble_v", 3, 2, 6)]


@pytest.mark.parametrize("arguments", SCHEDULES, ids=str)
def test_what_the_boxes_leave_is_the_bubble(arguments: tuple[str, int, int, int]):
    schedule = make_schedule(*arguments)
    line = timeline(schedule)
    work = Counter(box.stage for box in line.boxes for _ in range(box.length))
    assert 1 - max(work.values()) / line.length == pytest.approx(bubble_fraction(schedule))
    busy = [(box.stage, unit) for box in line.boxes for unit in range(box.start, box.start + box.length)]
    assert len(set(busy)) == len(busy)
    passes = {(box.stage, box.microbatch, box.chunk, box.kind) for box in line.boxes}
    assert len(passes) == len(line.boxes) == (2 + schedule.splits_backward) * schedule.parts * schedule.microbatches
    assert max(box.start + box.length for box in line.boxes) == line.length


def test_a_pass_comes_after_what_it_needs():
    boxes = {(b.stage, b.microbatch, b.kind): b for b in timeline(make_schedule("zero_bubble", 4, 1, 8)).boxes}
    for (stage, microbatch, kind), box in boxes.items():
        before = boxes.get((stage, microbatch, "B") if kind == "W" else (stage + (-1 if kind == "F" else 1), microbatch, kind))
        assert before is None or before.start + before.length <= box.start


def test_text():
    assert text_gantt(timeline(make_schedule("1f1b", 2, 1, 2)), 80) == (
        "stage 0  F0 F1       B0···    B1···\n"  # in lock-step: stage 1 does F1 and B1 while B0 runs
        "stage 1     F0 B0··· F1 B1···"
    )


def test_long_steps_are_cut_in_the_middle():
    rows = text_gantt(timeline(make_schedule("1f1b", 4, 1, 64)), 100).splitlines()
    assert all(len(row) <= 100 and "…" in row for row in rows)
    assert "F0" in rows[0]
    assert rows[0].rstrip().endswith("B63····")
