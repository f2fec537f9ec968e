"""Whatever happens to a process, the run ends with the parameters of a run without faults.

Each run has a whole list of faults, one a generation: every generation starts all processes again, and a state that has come
through all of them bit for bit has come through each. What the supervisor says of each is compared one by one. Faults of data
and config stand in tests/data/test_bad_input.py, tests/verbs/test_train.py and tests/checkpoint/test_writing.py;
jaxtrain/checkpoint/README.md lists all.
"""

import re
import subprocess

import pytest

from jaxtrain.checkpoint import committed_steps
from jaxtrain.errors import EXIT_DONE, EXIT_ERROR, EXIT_STOPPED
from tests.faults.runs import Faulty, uninterrupted
from tests.lines import unstamped

STEPS = 32  # a checkpoint every 4
# With two devices in each process a step takes three times as long; tests/launch/test_processes.py has those.
FOUR = {"launcher": ("--processes=4", "--devices_per_process=1"), "mesh": ("--mesh.data=2",)}
TWO = {"launcher": ("--processes=2", "--devices_per_process=1"), "mesh": ("--mesh.data=1",)}


@pytest.fixture(scope="module")
def shared(tmp_path_factory, worker_id):
    """The folder of the runs without faults, which all workers share."""
    base = tmp_path_factory.getbasetemp()
    return (base if worker_id == "master" else base.parent) / "faults"


@pytest.fixture(scope="module")
def whole_of_two(shared):
    """The run of two processes without faults."""
    return uninterrupted(shared / "two", STEPS, **TWO)


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.slow)], ids="{} processes".format)
def of(request, shared, tmp_path):
    """(number of processes, a run of so many, the one without faults): a start of four takes twice the CPU time of two."""
    kind = TWO if request.param == 2 else FOUR
    whole = uninterrupted(shared / ("two" if request.param == 2 else "four"), STEPS, **kind)
    return request.param, Faulty(tmp_path, STEPS, **kind), whole


def resumed_from(run: Faulty) -> list[int]:
    """The step that each start but the first went on from."""
    return [int(step) for step in re.findall(r"^resume     from step (\d+)", unstamped(run.log), re.M)]


def assert_nothing_lost(run: Faulty, whole: Faulty) -> None:
    """Losses, all arrays of the last checkpoint, and all token ids are those of the uninterrupted run, and nothing is left."""
    assert run.losses() == whole.losses()
    assert run.final_checksums() == whole.final_checksums()
    assert_same_data(run, whole)
    assert run.leftovers() == []


def assert_same_data(run: Faulty, whole: Faulty) -> None:
    """Every row of every global batch has the same token ids, whoever read it and however often."""
    rows = whole.token_ids()
    assert sorted(rows) == list(range(1, STEPS + 1))
    assert all(sorted(hashes) == list(range(8)) for hashes in rows.values())
    assert run.token_ids() == rows


# Of each life: steps, processes and deeds (see faulty.py); whom the supervisor blames, in which words; where the next start
# goes on from.
KILLED = r"was ended by SIGKILL"
LOST = [
    ([(5, 1, "saved:4+kill")], (1,), KILLED, 4),
    ([(9, 0, "saved:8+flip:8+kill")], (0,), KILLED, 4),  # the coordinator; and of two checkpoints the newer has rotted
    (
        [(14, 1, "saved:12+truncate:12+fake:8+throw")],
        (1,),
        r"ended with exit code 70: .*RuntimeError: a fault of the test's",
        8,
    ),
    ([(17, 0, "saved:16+stop")], (0,), r"is stopped \(state T\)", 16),
    (
        [(20, 1, "saved:16+hang")],
        (1,),
        r"ended with exit code 70: error: process 1 of 2 is at step 20 and has not moved for \d+ s.*; stacks in ",
        16,
    ),
]
BOTH = ([(6, 0, "kill"), (6, 1, "kill")], (0, 1), KILLED, 4)


@pytest.mark.parametrize("lost", [LOST, pytest.param([LOST[0], BOTH, *LOST[1:]], marks=pytest.mark.slow)], ids=["one", "both"])
def test_lost_frozen_and_stuck_processes_and_damaged_checkpoints(tmp_path, whole_of_two, lost):
    run = Faulty(tmp_path, STEPS, **TWO)
    run.plan(*(faults for faults, *_ in lost))
    assert run.run() == EXIT_DONE, run.log[-3000:]
    endings = run.events("end")
    assert len(endings) == len(lost) + 1
    for ending, (_, culprits, words, _) in zip(endings, lost, strict=False):
        assert ending["culprit"] in culprits
        assert re.search(f"process {ending['culprit']} {words}", ending["words"])
    assert resumed_from(run) == [step for *_, step in lost]
    set_aside = {path.name: (path / "why_set_aside.txt").read_text() for path in run.checkpoints.glob("*.damaged-1")}
    assert re.search("does not hold what was saved|cannot be read", set_aside["8.damaged-1"])  # the bit may lie in the format
    assert sorted(set_aside) == ["12.damaged-1", "8.damaged-1", "8000.damaged-1"]
    assert "the folder was renamed or copied over" in set_aside["8000.damaged-1"]
    assert "in hang" in (run.run_dir / "stacks" / "process-1.txt").read_text()
    (run.checkpoints / "8001").rmdir()  # the empty folder that looked like a later step: passed over, not ours to delete
    assert re.search(rf"supervisor done in \d+ s, {len(lost) + 1} generations; goodput \d+\.\d%", run.log)
    assert_nothing_lost(run, whole_of_two)


def test_signals_and_deaths_in_the_midst_of_saving(of):
    """One process is asked to end, another dies while a checkpoint is being written, then the supervisor itself."""
    count, run, whole = of
    run.plan([(6, count // 2, "terminate")], [(11, 1, "kill_in_save:12")], [(18, 0, "kill_supervisor")])
    assert run.run() == EXIT_STOPPED  # all stopped after one step and saved it
    (stopped,) = committed_steps(run.checkpoints)[-1:]
    assert stopped in (6, 7, 8)
    assert run.run() == -9
    run.wait_for_processes()  # which notice that their supervisor is gone, and save
    assert committed_steps(run.checkpoints)[-1] >= 18
    assert run.run() == EXIT_DONE, run.log[-3000:]
    first, second, third = resumed_from(run)
    assert first == stopped
    assert second in (8, 12)
    assert third >= 18
    assert_nothing_lost(run, whole)


def test_fewer_processes_and_more_again(tmp_path, of):
    """Half of the cluster goes, and comes back: another mesh, the same global batches."""
    count, run, whole = of
    run.plan([(6, 1, f"resize:{count // 2}")], [(14, 0, f"resize:{count}")])
    (tmp_path / "processes").write_text(str(count))
    assert run.run(f"--processes_file={tmp_path / 'processes'}") == EXIT_DONE, run.log[-3000:]
    assert [event["processes"] for event in run.events("start")] == [count, count // 2, count]
    assert [event["kind"] for event in run.events("end")] == ["resized", "resized", "done"]
    meshes = re.findall(r"^mesh       (.*?) \(", unstamped(run.log), re.M)
    assert meshes == (["fsdp=2", "one device", "fsdp=2"] if count == 2 else ["data=2 x fsdp=2", "fsdp=2", "data=2 x fsdp=2"])
    assert run.losses() == pytest.approx(whole.losses(), rel=1e-6)
    assert_same_data(run, whole)
    assert run.leftovers() == []


@pytest.fixture
def small_disk(tmp_path):
    """A run whose checkpoints have a file system of their own, with room for a few."""
    run = Faulty(tmp_path, STEPS, **TWO)
    run.checkpoints.mkdir(parents=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", run.checkpoints], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a file system of its own needs root: {made.stderr.strip()}")
    yield run
    subprocess.run(["umount", "-l", run.checkpoints], check=True)


def test_a_full_disk(small_disk, whole_of_two):
    """A save that fails costs no step; once there is space the next one is made; a run that cannot save its end says so."""
    run = small_disk
    run.plan([(6, 0, "saved:4+fill"), (11, 0, "free"), (14, 1, "saved:12+fill")])
    assert run.run() == EXIT_ERROR, run.log[-3000:]
    assert "warning    the checkpoint of step 8 could not be saved" in run.log
    assert "the disk is full: free some space" in run.log.splitlines()[-1]
    assert committed_steps(run.checkpoints) == [4, 12]
    (run.checkpoints / "filling").unlink()
    assert run.run() == EXIT_DONE, run.log[-3000:]
    assert resumed_from(run) == [12]
    assert_nothing_lost(run, whole_of_two)
