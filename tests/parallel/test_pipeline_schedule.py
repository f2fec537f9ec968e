"""Schedules as tables: each runs, costs what theory says, and every value waits in a slot of its own."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from jaxtrain.config import FOLDED_SCHEDULES, Config, MeshConfig, TrainConfig
from jaxtrain.errors import ExplainedError
from jaxtrain.layout import stage_of_part
from jaxtrain.parallel.pipeline_counts import waiting_time
from jaxtrain.parallel.pipeline_schedule import (
    IDLE,
    SCHEDULES,
    Schedule,
    bubble_fraction,
    check,
    cut_into_runs,
    forward_only,
    live_parts,
    make_schedule,
    schedule_of,
)
from jaxtrain.parallel.pipeline_slots import allocate_slots, count_slots
from jaxtrain.parts import Parts

STAGES, MICROBATCHES, CHUNKS = range(1, 7), range(1, 10), range(1, 5)
FEWEST = {name: 2 if name in FOLDED_SCHEDULES else 1 for name in SCHEDULES}
CASES = [
    (name, stages, FEWEST[name], microbatches) for name in SCHEDULES for stages in STAGES for microbatches in MICROBATCHES
] + [
    (name, stages, chunks, microbatches)
    for name in ("interleaved", "zero_bubble")
    for stages in STAGES
    for chunks in CHUNKS[1:]
    for microbatches in MICROBATCHES
]
BY_NAME = [(name, [case for case in CASES if case[0] == name]) for name in SCHEDULES]
make = functools.cache(make_schedule)


@pytest.mark.parametrize(("name", "cases"), BY_NAME)
def test_every_table_runs(name: str, cases: list):
    for case in cases:
        report = check(make(*case))
        assert report.ticks == make(*case).ticks
        assert report.bubble_fraction == bubble_fraction(make(*case))
        assert report.live_parts == live_parts(make(*case))


@pytest.mark.parametrize(("name", "cases"), BY_NAME)
def test_bubble_is_the_ideal_one(name: str, cases: list):
    """(S-1)/(kM+S-1), for interleaved where S divides M; else interleaved wastes the rest of its last group.

    Of zero_bubble (S-1)/(3kM+S-1), which is ZB-H1's, from M = 2(S-1) on; below, more, but less than with B whole. The folded
    ones have the bubble of one chunk.
    """
    for _, stages, own_chunks, microbatches in cases:
        chunks = 1 if name in FOLDED_SCHEDULES else own_chunks
        if name in ("zero_bubble", "zero_bubble_v"):
            whole, ideal = (
                (stages - 1) / (chunks * microbatches + stages - 1),
                (stages - 1) / (3 * chunks * microbatches + stages - 1),
            )
            bubble = bubble_fraction(make(name, stages, own_chunks, microbatches))
            if chunks > 1 and microbatches % stages:
                whole = bubble_fraction(make("interleaved", stages, chunks, microbatches))
            elif microbatches >= 2 * (stages - 1):
                assert bubble == pytest.approx(ideal, abs=1e-12), (stages, chunks, microbatches)
            assert ideal - 1e-12 < bubble < whole or stages == 1
            continue
        bubble = bubble_fraction(make(name, stages, own_chunks, microbatches))
        ideal = (stages - 1) / (chunks * microbatches + stages - 1)
        if chunks == 1 or microbatches % stages == 0:
            assert bubble == pytest.approx(ideal, abs=1e-12), (stages, chunks, microbatches)
        else:
            assert bubble > ideal


def test_live_parts():
    """1F1B in lock-step holds 2(S-1-i)+1 microbatches on stage i; GPipe holds them all."""
    for stages, microbatches in itertools.product(STAGES, MICROBATCHES):
        expected = [min(2 * (stages - 1 - i) + 1, microbatches) for i in range(stages)]
        assert live_parts(make("1f1b", stages, 1, microbatches)) == expected
        assert live_parts(make("interleaved", stages, 1, microbatches)) == expected
        assert live_parts(make("gpipe", stages, 1, microbatches)) == [microbatches] * stages
        # Folded: 2S halves of a microbatch on each stage, S microbatches.
        if microbatches >= 2 * stages:
            assert live_parts(make("v_shape", stages, 2, microbatches)) == [2 * stages] * stages
        assert max(live_parts(make("zero_bubble_v", stages, 2, microbatches))) == min(2 * stages, 2 * microbatches)


def test_interleaved_holds_less_than_everything():
    """With 2 chunks on 3 stages and 9 microbatches a stage never holds all its 18 (microbatch, chunk)."""
    assert max(live_parts(make("interleaved", 3, 2, 9))) < 12


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_chunks_are_refused_where_there_are_none(name: str):
    with pytest.raises(ExplainedError, match=f"schedule {name} has 1 chunk a stage, not 2; use interleaved"):
        make_schedule(name, 2, 2, 4)


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_folded_schedule_has_two_chunks(chunks: int):
    with pytest.raises(ExplainedError, match=f"has 2 chunks a stage, not {chunks}"):
        make_schedule("v_shape", 2, chunks, 4)


def test_a_bubble_is_that_of_the_costs_given():
    """ZB-H1's (S-1)(F + B - W) where W is no longer than F and B (Qi et al. 2023, table 1), F = 2, B = 5, W = 2 of 7."""
    for stages, microbatches in ((2, 4), (4, 8), (5, 20)):
        work, waits = microbatches * 9, (stages - 1) * 5
        found = bubble_fraction(make("zero_bubble", stages, 1, microbatches), 2.0, 7.0, 2.0)
        assert found == pytest.approx(waits / (work + waits))
        table = "zero_bubble", stages, 1, microbatches
        assert waiting_time(table, 2.0, 7.0, 2.0) == pytest.approx(waits)
        plain = "1f1b", stages, 1, microbatches
        assert waiting_time(plain, 2.0, 7.0, 2.0) == pytest.approx((stages - 1) * 9)


def test_put_off_weight_gradients_hold_2_s_minus_1_operands():
    """The rest is what 1F1B in lock-step holds."""
    for stages, microbatches in ((2, 4), (4, 8), (4, 16), (6, 20)):
        slots, plain = (allocate_slots(make(name, stages, 1, microbatches)) for name in ("zero_bubble", "1f1b"))
        assert (slots.operand_count, plain.operand_count) == (2 * (stages - 1), 0)
        assert slots.residual_count == plain.residual_count
        folded = allocate_slots(make("zero_bubble_v", stages, 2, microbatches))
        if microbatches >= 2 * stages:  # each of half the size
            assert (folded.residual_count, folded.operand_count) == (2 * stages, 3 * stages - 2)


def test_forward_only_holds_forwards_only():
    cases = [("1f1b", *case) for case in itertools.product(STAGES, CHUNKS, MICROBATCHES)]
    for name, stages, chunks, microbatches in (*cases, *(("v_shape", s, 2, m) for s in STAGES for m in MICROBATCHES)):
        schedule = forward_only(name, stages, chunks, microbatches)
        check(schedule, backward=False)
        assert (schedule.backward_microbatch == IDLE).all()
        slots = allocate_slots(schedule)
        assert (slots.residual_count, slots.gradient_count) == (0, 0)
        replay(schedule)
    with pytest.raises(ExplainedError, match="backward of .* is missing"):
        check(forward_only("1f1b", 2, 1, 2))


# ---------------------------------------------------------------------------------------------------------------------
# The checker


def tampered(schedule: Schedule, field: str, edits: dict[tuple[int, int], int]) -> Schedule:
    """The table with cells of one array changed."""
    array = getattr(schedule, field).copy()
    for cell, value in edits.items():
        array[cell] = value
    return dataclasses.replace(schedule, **{field: array})


def swapped(schedule: Schedule, kind: str, stage: int, one: int, other: int) -> Schedule:
    """The table with two ticks of a stage exchanged in one kind of pass."""
    for field in (f"{kind}_microbatch", f"{kind}_chunk"):
        array = getattr(schedule, field)
        schedule = tampered(schedule, field, {(one, stage): array[other, stage], (other, stage): array[one, stage]})
    return schedule


EVERY_KIND = [
    *(
        ((n, *c), k)
        for k in ("forward", "backward")
        for n, c in (("gpipe", (3, 1, 4)), ("1f1b", (3, 1, 4)), ("1f1b", (1, 1, 3)))
    ),
    *((case, kind) for case in (("interleaved", 2, 3, 4), ("v_shape", 3, 2, 4)) for kind in ("forward", "backward")),
    (("zero_bubble", 3, 1, 4), "weight"),
]


@pytest.mark.parametrize(("case", "kind"), EVERY_KIND, ids=str)
def test_every_pass_left_out_or_done_twice_is_refused(case: tuple, kind: str):
    schedule, field = make(*case), f"{kind}_microbatch"
    for tick, stage in np.argwhere(getattr(schedule, field) != IDLE):
        with pytest.raises(ExplainedError, match=f"{kind} of .* is missing"):
            check(tampered(schedule, field, {(tick, stage): IDLE}))
        other = (getattr(schedule, field)[tick, stage] + 1) % schedule.microbatches
        with pytest.raises(ExplainedError, match=f"passes microbatch {other} through chunk"):
            check(tampered(schedule, field, {(tick, stage): other}))
        with pytest.raises(ExplainedError, match=f"{kind} of .* is (missing|unknown)"):
            check(tampered(schedule, field, {(tick, stage): schedule.microbatches}))


def test_a_pass_that_comes_too_early_is_refused():
    schedule = make("1f1b", 3, 1, 4)
    # Stage 1 does its first forward in tick 1, when stage 0's has just been sent.
    early = swapped(schedule, "forward", 1, 0, 1)
    with pytest.raises(ExplainedError, match="forward of microbatch 0 on stage 1 chunk 0 at tick 0 has no input yet"):
        check(early)
    # Stage 1 does its first backward in tick 3, one after the last stage.
    early = swapped(schedule, "backward", 1, 2, 3)
    with pytest.raises(ExplainedError, match="backward of microbatch 0 on stage 1 chunk 0 at tick 2 has no gradient yet"):
        check(early)


def test_a_weight_gradient_before_its_backward_is_refused():
    schedule = make("zero_bubble", 3, 1, 4)
    tick = int(np.flatnonzero(schedule.weight_microbatch[:, 0] == 2)[0])
    before = int(np.flatnonzero(schedule.backward_microbatch[:, 0] == 2)[0]) - 1
    with pytest.raises(ExplainedError, match=r"weight of .* \(0, 2, 0\) at tick \d+ comes before its backward"):
        check(swapped(schedule, "weight", 0, before, tick))


def test_a_backward_before_its_own_forward_is_refused():
    """The last part needs no gradient from elsewhere, only its own forward."""
    schedule = make("1f1b", 1, 1, 3)
    with pytest.raises(ExplainedError, match="backward of microbatch 1 on stage 0 chunk 0 at tick 0 has no gradient yet"):
        check(swapped(schedule, "backward", 0, 0, 1))


def test_every_delay_of_an_input_is_refused():
    """Moving any forward to after the forward that needs it breaks the table (found wherever the last tick has room)."""
    schedule = make("gpipe", 3, 1, 3)
    for microbatch in range(3):
        late = np.vstack([schedule.forward_microbatch, np.full((1, 3), IDLE)])
        rest = {
            name: np.vstack([getattr(schedule, name), np.full((1, 3), IDLE)])
            for name in ("forward_chunk", "backward_microbatch", "backward_chunk", "weight_microbatch", "weight_chunk")
        }
        late[microbatch, 0], late[-1, 0] = IDLE, microbatch
        rest["forward_chunk"][-1, 0] = 0
        with pytest.raises(ExplainedError, match=f"forward of microbatch {microbatch} on stage 1 .* no input yet"):
            check(dataclasses.replace(schedule, forward_microbatch=late, **rest))


# ---------------------------------------------------------------------------------------------------------------------
# Slots


def replay(schedule: Schedule) -> int:
    """Run the table as the executor does, with names for values; return how many parts were done till a read gets a wrong one.

    In a tick all stages do F (read the activation, write residual and, where it is the last part, the loss's gradient), then
    B (read residual and gradient, write operands), then W (read operands), then the exchange writes what arrived. An idle
    stage writes too, to a slot that is never read; what arrives at it is rubbish.
    """
    slots, stages, rubbish = allocate_slots(schedule), schedule.stages, "rubbish"
    activation = [[rubbish] * (slots.activation_count + 1) for _ in range(stages)]
    gradient = [[rubbish] * (slots.gradient_count + 1) for _ in range(stages)]
    residual = [[rubbish] * (slots.residual_count + 1) for _ in range(stages)]
    operand = [[rubbish] * (slots.operand_count + 1) for _ in range(stages)]
    done = 0

    def part_of(stage: int, chunk: int) -> int:
        return chunk * stages + stage_of_part(chunk * stages + stage, stages, schedule.folded)  # its own inverse

    for t in range(schedule.ticks):
        sent, sent_back = [rubbish] * stages, [rubbish] * stages
        for i in range(stages):
            m, c = int(schedule.forward_microbatch[t, i]), int(schedule.forward_chunk[t, i])
            stored = loss = rubbish
            if m != IDLE:
                part = part_of(i, c)
                if part > 0 and activation[i][slots.activation_read[t, i]] != ("activation", m, part):
                    return done
                sent[i], stored = ("activation", m, part + 1), ("residual", m, part)
                loss = ("gradient", m, part) if part == schedule.parts - 1 else rubbish
                done += 1
            if slots.residual_count:
                residual[i][slots.residual_write[t, i]] = stored
                gradient[i][slots.gradient_write_loss[t, i]] = loss
        for i in range(stages):
            m, c = int(schedule.backward_microbatch[t, i]), int(schedule.backward_chunk[t, i])
            if m != IDLE:
                part = part_of(i, c)
                if residual[i][slots.residual_read[t, i]] != ("residual", m, part):
                    return done
                if gradient[i][slots.gradient_read[t, i]] != ("gradient", m, part):
                    return done
                sent_back[i] = ("gradient", m, part - 1)
                done += 1
            operand[i][slots.operand_write[t, i]] = ("operand", m, c) if m != IDLE else rubbish
            m, c = int(schedule.weight_microbatch[t, i]), int(schedule.weight_chunk[t, i])
            if m != IDLE:
                if operand[i][slots.operand_read[t, i]] != ("operand", m, c):
                    return done
                done += 1
        for i in range(stages):
            for n, way in enumerate((+1, -1, 0) if schedule.folded else (+1,)):
                activation[i][slots.activation_write[t, i, n]] = sent[(i - way) % stages]
                gradient[i][slots.gradient_write[t, i, n]] = sent_back[(i + way) % stages]
    return done


def work_of(schedule: Schedule) -> int:
    """Return the number of parts to do, forwards and, in training, backwards and weight gradients."""
    is_training = bool((schedule.backward_microbatch != IDLE).any())
    return schedule.microbatches * schedule.parts * (1 + is_training + schedule.splits_backward)


@pytest.mark.parametrize(("name", "cases"), BY_NAME)
def test_every_read_gets_the_value_meant(name: str, cases: list):
    for case in cases:
        assert replay(make(*case)) == work_of(make(*case)), case


@pytest.mark.parametrize(("name", "cases"), BY_NAME)
def test_slots_are_as_few_as_the_live_values(name: str, cases: list):
    for case in cases:
        assert allocate_slots(make(*case)).residual_count == max(live_parts(make(*case)))


def test_replay_notices_a_wrong_slot(monkeypatch):
    """The test of the test: with one slot too few, some value is overwritten before it is read."""
    schedule = make("1f1b", 3, 1, 6)
    slots = allocate_slots(schedule)
    full = slots.residual_count
    clamped = {
        name: np.minimum(getattr(slots, name), full - 1) for name in ("residual_write", "residual_read")
    }  # what writing out of bounds does on the device
    monkeypatch.setitem(replay.__globals__, "allocate_slots", lambda _: dataclasses.replace(slots, **clamped))
    assert replay(schedule) < work_of(schedule)


# ---------------------------------------------------------------------------------------------------------------------
# Runs of like ticks


def patterns_of(busy: np.ndarray) -> str:
    return "all" if busy.all() else "some" if busy.any() else "no"


@pytest.mark.parametrize(("name", "cases"), BY_NAME)
def test_runs_cover_all_ticks_and_say_the_truth(name: str, cases: list):
    for case in cases:
        schedule = make(*case)
        for most in (1, 2, 4, 6):
            runs = cut_into_runs(schedule, most)
            assert 1 <= len(runs) <= most
            assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])]
            assert runs[-1].stop == schedule.ticks
            for run in runs:
                assert run.forward == patterns_of(schedule.forward_microbatch[run.start : run.stop] != IDLE)
                assert run.backward == patterns_of(schedule.backward_microbatch[run.start : run.stop] != IDLE)


def test_the_steady_state_of_1f1b_has_no_conditionals():
    """Once the microbatches are at least twice the ticks of warm-up; below that it may be joined with its neighbours."""
    for stages, more in itertools.product(STAGES, range(1, 9)):
        microbatches = 4 * (stages - 1) + more
        steady = [run for run in cut_into_runs(make("1f1b", stages, 1, microbatches)) if run.forward == run.backward == "all"]
        assert len(steady) == 1
        assert steady[0].stop - steady[0].start == microbatches - 2 * (stages - 1)


def test_gradient_accumulation_is_one_run_without_conditionals():
    for microbatches in MICROBATCHES:
        (run,) = cut_into_runs(make("1f1b", 1, 1, microbatches))
        assert (run.start, run.stop, run.forward, run.backward) == (0, microbatches, "all", "all")


def test_gpipe_never_mixes_forward_and_backward():
    for stages, microbatches in itertools.product(STAGES, range(2, 10)):
        runs = cut_into_runs(make("gpipe", stages, 1, microbatches), most=6)
        assert all("no" in (run.forward, run.backward) for run in runs)


# ---------------------------------------------------------------------------------------------------------------------
# The worked example


def test_ten_parts_on_five_nodes():
    """Node i computes parts i and i + 5 of ten; a microbatch passes the parts in order, one a tick, and back likewise."""
    schedule = make("interleaved", 5, 2, 10)
    assert schedule.parts == 10
    for kind in ("forward", "backward"):
        microbatch, chunk = getattr(schedule, f"{kind}_microbatch"), getattr(schedule, f"{kind}_chunk")
        for m in range(10):
            ticks, nodes = np.nonzero(microbatch == m)
            parts = chunk[ticks, nodes] * 5 + nodes
            assert parts.tolist() == (list(range(10)) if kind == "forward" else list(range(10))[::-1])
            assert (np.diff(ticks) == 1).all()
        for node in range(5):
            held = {int(c) * 5 + node for c in chunk[:, node] if c != IDLE}
            assert held == {node, node + 5}
    assert bubble_fraction(schedule) == pytest.approx(4 / 24)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("microbatches", [1, 3, 4, 8])
def test_slots_are_counted_as_they_are_allocated(name: str, stages: int, microbatches: int):
    for chunks in (1, 2, 3) if name in ("interleaved", "zero_bubble") else (FEWEST[name],):
        schedule = make_schedule(name, stages, chunks, microbatches)
        slots = allocate_slots(schedule)
        counts = slots.activation_count, slots.gradient_count, slots.residual_count, slots.operand_count
        assert count_slots(schedule) == counts


@pytest.mark.parametrize(
    ("own", "problem"),
    [
        (
            lambda *sizes: make("1f1b", 2, 1, 4),
            r"\(2, 1, 4\), but was asked for one of \(2, 1, 8\)",
        ),
        (lambda *sizes: make("1f1b", 1, 1, 8), r"\(1, 1, 8\), but was asked for one of \(2, 1, 8\)"),
        (lambda *sizes: make("v_shape", 2, 2, 8), r"\(2, 2, 8\), but was asked for one of \(2, 1, 8\)"),
        (lambda *sizes: None, "gave a NoneType"),
    ],
)
def test_a_schedule_that_is_plugged_in_has_the_sizes_it_was_asked_for(own, problem):
    config = Config(mesh=MeshConfig(pipe=2), train=TrainConfig(microbatches=8))
    with pytest.raises(ExplainedError, match=problem):
        schedule_of(dataclasses.replace(config, parts=Parts(schedule=own)))
