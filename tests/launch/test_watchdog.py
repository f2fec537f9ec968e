"""When a process counts as hung, whom it blames, and what a peer ends with; real processes: test_processes.py."""

import pytest

from jaxtrain import processes
from jaxtrain.config import Config, DistributedConfig
from jaxtrain.errors import EXIT_ERROR, EXIT_FAULT, EXIT_PEER, EXIT_USAGE
from jaxtrain.launch.watchdog import Position, Stall, Watchdog, code_for, words_for
from jaxtrain.processes import LONG_SECONDS, Failure
from jaxtrain.telemetry.heartbeat import Heartbeat
from tests.fake_store import run_as

LIMITS = DistributedConfig(hang_seconds=60, phase_seconds=600)
TRAINING = Position(12, 11, 5, "")


def watch(stall, position, seconds, peers=None):
    """The failure and after how many seconds it came, of a process that stays at a position; (None, seconds) without any."""
    for second in range(1, seconds + 1):
        failure = stall.see(position, 1.0, lambda second=second: (peers(second) if callable(peers) else peers) or {})
        if failure:
            return failure, second
    return None, seconds


def test_a_step_of_a_lone_process_that_does_not_end():
    failure, after = watch(Stall(LIMITS, 0), TRAINING, 200)
    assert 60 < after <= 70
    assert failure.hang
    assert failure.code == EXIT_FAULT
    assert failure.reason == f"the run is at step 12 and has not moved for {after - 1} s"


@pytest.mark.parametrize(
    ("position", "limit"),
    [
        (Position(12, 11, 0, "saving"), 600),
        (Position(12, 12, 0, "validating"), 600),
        (Position(12, 12, 0, ""), 600),  # between the last step and the end of the loop
        (Position(1, 0, 0, ""), 600),  # processes connect in the first step
        (Position(0, 0, 3, "starting"), 600),
        (Position(0, 0, 0, "restoring"), 600),
        (Position(0, 0, 0, "compiling"), LONG_SECONDS),
        (Position(0, 0, 0, "reading data"), LONG_SECONDS),
        (Position(40, 40, 0, "ending"), LONG_SECONDS),
        (Position(0, 0, 0, "preflight: matmul"), LONG_SECONDS),
    ],
)
def test_limits(position, limit):
    assert Stall(LIMITS, 0).limit(position) == limit


def test_zero_means_never():
    stall = Stall(DistributedConfig(hang_seconds=0, phase_seconds=0), 0)
    assert stall.limit(TRAINING) == stall.limit(Position(0, 0, 0, "saving")) == float("inf")


def test_slow_steps_get_twenty_times_the_usual():
    stall = Stall(LIMITS, 0)
    for step in range(1, 12):
        for _ in range(10):
            assert stall.see(Position(step + 1, step, 0, ""), 1.0, dict) is None
    assert 190 < stall.limit(Position(12, 11, 0, "")) <= 210


def test_the_one_behind_is_blamed_by_all():
    behind = Position(11, 10, 5, "")
    peers = {0: TRAINING, 1: TRAINING, 2: behind, 3: TRAINING}
    for process, position in peers.items():
        failure, _ = watch(Stall(LIMITS, process), position, 200, peers)
        assert failure.process == 2
        assert failure.reason.startswith("process 2 of 4 is at step 11 and has not moved for ")


def test_of_two_in_a_barrier_the_one_that_did_not_enter_it_is_behind():
    at_barrier, before = Position(0, 0, 4, "restoring"), Position(0, 0, 3, "restoring")
    failure, _ = watch(Stall(LIMITS, 0), at_barrier, 2000, {0: at_barrier, 1: before})
    assert failure.process == 1
    assert "process 1 of 2 is at step 0, restoring" in failure.reason


def test_where_all_stand_at_one_place_none_is_blamed():
    failure, _ = watch(Stall(LIMITS, 1), TRAINING, 200, {0: TRAINING, 1: TRAINING})
    assert failure.reason.startswith("each of 2 processes is at step 12")


def test_who_waits_for_a_peer_that_validates_does_not_hang():
    """It waits as long as that peer may take, and a step longer."""

    def peers(second):
        return {0: TRAINING, 1: Position(11, 11, 5, "validating") if second < 400 else Position(12, 11, 5, "")}

    assert watch(Stall(LIMITS, 0), TRAINING, 430, peers) == (None, 430)
    failure, after = watch(Stall(LIMITS, 0), TRAINING, 900, {0: TRAINING, 1: Position(11, 11, 5, "validating")})
    assert 600 < after < 620
    assert "process 1 of 2 is at step 11, validating" in failure.reason


def test_peers_are_asked_rarely_and_not_while_steps_go_on():
    asked = []
    stall = Stall(LIMITS, 0)
    for step in range(1, 100):
        stall.see(Position(step + 1, step, 0, ""), 1.0, lambda: asked.append(0) or {})
    assert asked == []
    watch(stall, TRAINING, 60, lambda second: asked.append(second) or {})
    assert len(asked) <= 8


@pytest.mark.parametrize(
    ("code", "own", "peer"),
    [(EXIT_USAGE, EXIT_USAGE, EXIT_USAGE), (EXIT_ERROR, EXIT_ERROR, EXIT_ERROR), (EXIT_FAULT, EXIT_FAULT, EXIT_PEER)]
    + [(EXIT_PEER, EXIT_PEER, EXIT_PEER), (130, 130, 130)],
)
def test_what_a_restart_would_repeat_ends_all_with_the_same_code(monkeypatch, code, own, peer):
    assert run_as(monkeypatch, 2, lambda p: code_for(Failure(0, code, "why"))) == [own, peer]


def test_a_peers_reason_is_told_in_one_line(monkeypatch, tmp_path):
    lines = run_as(monkeypatch, 2, lambda p: words_for(Failure(1, 2, "no such file"), "", tmp_path))
    assert set(lines) == {"process 1 of 2 ended the run (exit code 2): no such file"}


def test_the_first_failure_counts_and_ends_the_others_only(monkeypatch, tmp_path):
    config = Config(run_dir=str(tmp_path))

    def work(process):
        watchdog = Watchdog(config, Heartbeat())
        watchdog.look(1.0)
        processes.exchange_next(None, 20.0)
        if process == 1:
            processes.announce(2, "no such\nfile")
            processes.announce(1, "later")
        processes.exchange_next(None, 20.0)
        return watchdog.look(1.0)

    assert run_as(monkeypatch, 3, work) == [Failure(1, 2, "no such file"), None, Failure(1, 2, "no such file")]


def test_a_hang_ends_all_even_the_one_that_hangs(monkeypatch, tmp_path):
    config = Config(run_dir=str(tmp_path), distributed=LIMITS)

    def work(process):
        watchdog, found = Watchdog(config, Heartbeat()), []
        watchdog.heartbeat.step(dispatched=12 - (process == 1), done=10)
        watchdog.look(1.0)
        processes.barrier("all have published", 20.0)
        for _ in range(80):
            found.append(watchdog.look(1.0))
        return next(failure for failure in found if failure)

    failures = run_as(monkeypatch, 3, work)
    assert {failure.process for failure in failures} == {1}
    assert all(failure.hang for failure in failures)
