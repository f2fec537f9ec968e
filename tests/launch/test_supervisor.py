"""The supervisor against processes of a few lines that do on purpose what training processes do by accident."""

import dataclasses
import json
import signal
import sys
import textwrap

import pytest

from jaxtrain.launch.supervisor import Policy, Supervisor, how
from jaxtrain.telemetry.heartbeat import STACKS_VARIABLE, Doing, Heartbeat, open_stacks, read_heartbeat
from tests.lines import unstamped

# Limits that only a hang meets, on however busy a machine; and those of the tests in which one hangs or is stopped.
PATIENT = Policy(
    restarts=2, backoff_seconds=0.01, silent_seconds=60.0, start_seconds=60.0, grace_seconds=60.0, stop_seconds=60.0
)
HUNG = dataclasses.replace(PATIENT, silent_seconds=2.0)

# A process that makes steps, and in its first generations does what argument 1 says.
PROCESS = textwrap.dedent(
    """
    import os, signal, sys, time
    sys.path.insert(0, os.getcwd())
    from jaxtrain.telemetry.heartbeat import Heartbeat
    fault, faulty = sys.argv[1], int(sys.argv[2])
    index, generation = int(os.environ["JAXTRAIN_PROCESS_ID"]), int(os.environ["JAXTRAIN_STARTER"].split()[-1][:-1])
    signal.signal(signal.SIGTERM, lambda *_: os._exit(76))
    heartbeat = Heartbeat.from_environment()
    for step in range(1, 11):
        heartbeat.step(dispatched=step)
        if step == 5 and index == 1 and generation <= faulty:
            if fault == "kill": os.kill(os.getpid(), signal.SIGKILL)
            if fault == "raise": print("error: process 1 of 2 failed: ValueError: seven"); sys.exit(70)
            if fault == "refuse": print("error: no such file"); sys.exit(2)
            if fault == "hang": time.sleep(60)
            if fault == "freeze": os.kill(os.getpid(), signal.SIGSTOP)
        if step == 6 and index == 0 and generation <= faulty:
            if fault == "refuse": print("error: process 1 of 2 ended the run (exit code 2): no such file"); sys.exit(2)
            if fault in ("kill", "raise"): time.sleep(0.2); print("  @ 0x7f3a  absl::F()\\nerror: lost"); sys.exit(75)
            while fault in ("hang", "freeze"): heartbeat.tick(); time.sleep(0.02)  # its watchdog lives
        time.sleep(0.02)
        heartbeat.step(done=step)
    print("end", index, *sys.argv[3:])
    """
)


def supervise(folder, fault, faulty=1, policy=PATIENT, size=lambda: 2, extra=lambda processes: ()):
    """(exit code, what was said, events)"""
    said: list[str] = []
    command = [sys.executable, "-c", PROCESS, fault, str(faulty)]
    code = Supervisor(
        command, size, lambda index, processes: {}, folder, policy, extra, lambda line: said.append(unstamped(line))
    ).run()
    return code, said, [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("kill", "process 1 was ended by SIGKILL"),
        ("raise", "process 1 ended with exit code 70: error: process 1 of 2 failed: ValueError: seven"),
        ("hang", "process 1 is at step 5 and has not answered"),
        ("freeze", "process 1 is stopped (state T)"),
    ],
)
def test_the_culprit_is_named_and_the_run_goes_on(tmp_path, fault, words):
    code, said, events = supervise(tmp_path, fault, policy=HUNG if fault in ("hang", "freeze") else PATIENT)
    assert code == 0
    (line,) = [line for line in said if words in line]
    assert ("(<string>:15 in <module>)" in line) == (fault == "hang")  # where it is, by its stacks
    assert [event["culprit"] for event in events if event["event"] == "end"] == [1, None]
    assert "2 generations; goodput" in said[-1]
    ports = [event["coordinator"] for event in events if event["event"] == "start"]
    assert len(set(ports)) == 2  # a port that the first generation may still hold would be a trap
    if fault in ("kill", "raise"):
        assert "0x7f3a" in (tmp_path / "generation-1" / "process-0.log").read_text()
        assert [line for line in said if "0x7f3a" in line] == []  # a stack of jax's is for the log alone


def test_hung_processes_leave_their_stacks(tmp_path):
    supervise(tmp_path, "hang", policy=HUNG)
    assert "line" in (tmp_path / "generation-1" / "process-1.stacks").read_text()


def test_a_supervisor_started_again_goes_on_counting(tmp_path):
    supervise(tmp_path, "kill")
    code, said, events = supervise(tmp_path, "none")
    assert code == 0
    assert [event["generation"] for event in events if event["event"] == "start"] == [1, 2, 3]
    assert "3 generations; goodput" in said[-1]
    assert (tmp_path / "generation-1" / "process-1.log").exists()
    assert events[-1]["seconds"] > events[1]["seconds"]
    assert events[-1]["productive"] == pytest.approx(events[3]["productive"])  # no step of the third was a further one


def test_what_would_fail_again_is_not_tried_again(tmp_path):
    code, said, events = supervise(tmp_path, "refuse")
    assert code == 2
    assert said[-1] == "supervisor process 1: error: no such file"
    assert len(events) == 2
    assert events[-1]["culprit"] == 1  # though process 0 may have ended first, with the same code


def test_failures_without_a_further_step_come_to_an_end(tmp_path):
    code, said, _ = supervise(tmp_path, "kill", faulty=99)
    assert code == 128 + signal.SIGKILL
    assert "giving up" in said[-1]
    assert len([line for line in said if "; restart" in line]) == 2


def test_another_size_is_another_generation(tmp_path):
    sizes = iter([2] + [3] * 10_000)
    wanted = [2]

    def size():
        wanted[0] = next(sizes)
        return wanted[0]

    code, said, events = supervise(tmp_path, "none", size=size, extra=lambda processes: [f"mesh-of-{processes}"])
    assert code == 0
    assert [event["processes"] for event in events if event["event"] == "start"] == [2, 3]
    assert "end 0 mesh-of-3" in said


def test_exit_codes_in_words():
    assert how(-9).startswith("was ended by SIGKILL (out of host memory?")
    assert how(70) == "ended with exit code 70"


def test_a_full_disk_ends_neither_the_supervisor_nor_its_processes(tmp_path, disk):
    """Full until the first restart: events wait in memory, what the first generation printed is lost, heartbeats go on."""
    disk.room, said = 0, []

    def say(line):
        said.append(unstamped(line))
        if "; restart 1 in" in line:
            disk.room = 1 << 30

    command = [sys.executable, "-c", PROCESS, "raise", "1"]
    assert Supervisor(command, lambda: 2, lambda index, processes: {}, tmp_path, PATIENT, say=say).run() == 0
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "end", "start", "end"]
    assert "process 1 ended with exit code 70: error: process 1 of 2 failed: ValueError: seven" in events[1]["words"]
    assert (tmp_path / "generation-2" / "process-1.log").read_text() == "end 1\n"
    warned = [line for line in said if "warning" in line and str(tmp_path / "events.jsonl") in line]
    assert len(warned) == 1
    assert any("goodput" in line for line in said)


def test_without_a_file_for_stacks_they_go_to_standard_error(tmp_path, monkeypatch):
    monkeypatch.setenv(STACKS_VARIABLE, str(tmp_path / "no" / "folder" / "0.stacks"))
    assert open_stacks(tmp_path / "0.heartbeat") is sys.stderr


def test_beat(tmp_path):
    heartbeat = Heartbeat(tmp_path / "0.heartbeat")
    assert read_heartbeat(tmp_path / "0.heartbeat") == Doing(0, 0, "starting")
    heartbeat.step(dispatched=12)
    heartbeat.step(done=11)
    assert read_heartbeat(tmp_path / "0.heartbeat") == Doing(12, 11, "")
    heartbeat.tick()
    assert read_heartbeat(tmp_path / "0.heartbeat") == Doing(12, 11, "", ticks=1)
    heartbeat.phase("saving " + "x" * 200)
    assert read_heartbeat(tmp_path / "0.heartbeat").phase.startswith("saving xxx")
    assert read_heartbeat(tmp_path / "none") == Doing()
