"""Two real processes without a supervisor: what they refuse, how one ends that loses the other, how they roll back together.

That all stop after the same step and go on from there is held in tests/faults/test_faults.py.
"""

import json
import signal
import subprocess
import sys

import pytest

from jaxtrain.errors import EXIT_ERROR, EXIT_FAULT, EXIT_PEER, EXIT_USAGE
from tests.launch.processes import ROOT, environment, started, wait_for_line

FLAGS = (
    "--config=configs/quickstart.py --model.num_layers=2 --model.embed_dim=32 --model.num_heads=2 "
    "--model.num_kv_heads=2 --model.head_dim=16 --model.mlp_dim=64 --model.vocab_size=257 --data.tokenizer=byte "
    "--data.sources.0.kind=synthetic --data.sequence_length=32 --train.global_batch_size=8 --train.log_every=1 "
    "--optimizer.warmup_steps=2 --train.validate_every=0 --train.sample_tokens=0 --mesh.data=2 --mesh.fsdp=2 "
    "--checkpoint.every=1000 --checkpoint.keep=100 --model.dtype=float32"
).split()


def losses(folder):
    """Loss by step, of a run's rows; a step trained twice must have come out the same."""
    rows = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "loss" in row:
            assert rows.setdefault(row["step"], row["loss"]) == row["loss"]
    return rows


def test_processes_with_different_configs_are_refused(tmp_path):
    with started(2, 2, [*FLAGS, f"--run_dir={tmp_path / 'run'}"], tmp_path, (["--train.steps=5"], ["--train.steps=6"])) as both:
        assert [process.wait(200) for process in both] == [EXIT_USAGE] * 2
    for log in logs(tmp_path):
        assert "train.steps=6 in process 1, but 5 in process 0" in log


def run_faulty(folder, how, process, *flags, hosts=None, seconds=240):
    """Exit codes of both processes of a run in which one does `how`, one of tests/launch/faulty.py."""
    more = {"FAULTY_HOW": how, "FAULTY_PROCESS": str(process), **({"FAULTY_HOSTS": str(hosts)} if hosts else {})}
    flags = [*FLAGS, f"--run_dir={folder / 'run'}", "--train.steps=400", *flags]
    with started(2, 2, flags, folder, module="tests.launch.faulty", **more) as both:
        return [running.wait(seconds) for running in both]


def logs(folder):
    return [(folder / f"{process}.log").read_text() for process in range(2)]


def assert_one_line(log, *words):
    """One line explains the end, and nothing in the log is a stack of C++ or Python."""
    errors = [line for line in log.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, log[-3000:]
    assert all(word in errors[0] for word in words), errors
    assert "@ 0x" not in log
    assert "Traceback" not in log
    assert "Check failure" not in log


def test_processes_with_different_data_files_are_refused(tmp_path):
    """Under one name, on hosts that share no folder: other text, and another number of held-out windows."""
    for host in range(2):
        books = tmp_path / str(host) / "books"
        books.mkdir(parents=True)
        for number in range(8 + 16 * host):
            (books / f"{number}.txt").write_text(f"{number} " * 200)
    flags = ["--data.sources.0.kind=text", "--data.sources.0.path=books/*.txt", "--train.validate_every=1"]
    flags += [f"--data.cache_dir={tmp_path / 'cache'}", "--data.validation_fraction=0.4"]
    config = [f"--config={ROOT / 'configs' / 'quickstart.py'}"]
    assert run_faulty(tmp_path, "nothing", 1, *config, *flags, hosts=tmp_path) == [EXIT_USAGE] * 2
    for log in logs(tmp_path):
        assert_one_line(log, "data fingerprint=", "in process 1", "in process 0", "validation batches=", "the same data")


def test_another_program_is_refused_before_it_is_compiled(tmp_path):
    assert run_faulty(tmp_path, "program", 1) == [EXIT_USAGE] * 2
    for log in logs(tmp_path):
        assert "the lowered train step of process 1 of 2 is not that of process 0, first in line" in log
        assert "compiled" not in log


REFUSALS = [
    (how, process)
    for process in (1, 0)
    for how in ("at_command_line", "at_validate", "at_data", "at_restore", "at_compile", "at_first_step", "unforeseen")
]


@pytest.mark.parametrize(
    ("how", "process"),
    [
        pytest.param(how, process, marks=() if (how, process) == ("at_restore", 1) else pytest.mark.slow)
        for how, process in REFUSALS
    ],
)
def test_a_peer_that_refuses_ends_all_in_one_line(tmp_path, how, process):
    own_code = {"unforeseen": EXIT_FAULT, "at_command_line": EXIT_USAGE}.get(how, EXIT_ERROR)
    codes = run_faulty(tmp_path, how, process)
    assert codes[process] == own_code
    assert codes[1 - process] == (EXIT_PEER if own_code == EXIT_FAULT else own_code)
    reason = {"unforeseen": "ZeroDivisionError", "at_command_line": "--no.such.flag=1"}.get(how, "this host has no such thing")
    assert_one_line(logs(tmp_path)[1 - process], f"process {process} of 2 ended the run (exit code {own_code}): ", reason)


@pytest.mark.parametrize(
    ("how", "process", "flags", "where"),
    [
        ("hang_in_step", 1, ["--distributed.hang_seconds=5"], "at step 4"),
        pytest.param("hang_in_step", 0, ["--distributed.hang_seconds=5"], "at step 4", marks=pytest.mark.slow),
        pytest.param("hang_in_restore", 1, ["--distributed.phase_seconds=40"], "restoring", marks=pytest.mark.slow),
        pytest.param(
            "hang_in_save", 1, ["--distributed.phase_seconds=40", "--checkpoint.every=3"], "saving", marks=pytest.mark.slow
        ),
    ],
)
def test_a_hang_without_a_supervisor(tmp_path, how, process, flags, where):
    """The one behind is named by both; it ends with 70, its peer with 75; both leave their stacks. Where one hangs in a save
    none is behind, since its peer stands in the same save: then one is at fault, and both say that each has not moved.
    """
    codes = run_faulty(tmp_path, how, process, *flags)
    alike = how == "hang_in_save"
    assert sorted(codes) == sorted([EXIT_FAULT, EXIT_PEER])
    assert alike or codes[process] == EXIT_FAULT
    for log in logs(tmp_path):
        assert (f"process {process} of 2 is at step", "each of 2 processes is at step")[alike] in log
        assert where in log.splitlines()[-1]
    stacks = tmp_path / "run" / "stacks"
    assert "faulty.py" in (stacks / f"process-{process}.txt").read_text()
    assert (stacks / f"process-{1 - process}.txt").exists()


@pytest.mark.slow
def test_a_lone_process_that_hangs(tmp_path):
    flags = [*FLAGS, "--mesh.data=1", f"--run_dir={tmp_path / 'run'}", "--train.steps=400", "--distributed.hang_seconds=5"]
    faulty = environment(2, FAULTY_HOW="hang_in_step", FAULTY_PROCESS="0")
    command = [sys.executable, "-m", "tests.launch.faulty", *flags]
    ended = subprocess.run(command, cwd=ROOT, env=faulty, capture_output=True, text=True, timeout=240)
    assert ended.returncode == EXIT_FAULT, ended.stderr[-2000:]
    assert "error: the run is at step 4 and has not moved for" in ended.stderr.splitlines()[-1]
    assert "faulty.py" in (tmp_path / "run" / "stacks" / "process-0.txt").read_text()


def test_a_process_that_loses_its_peer_ends(tmp_path):
    """By the collective's error, or where another device of the process still waits for it, by the missed heartbeats."""
    flags = [*FLAGS, f"--run_dir={tmp_path / 'run'}", "--train.steps=100000", "--distributed.heartbeat_seconds=5"]
    with started(2, 2, flags, tmp_path) as (first, second):
        wait_for_line(tmp_path / "0.log", "compiled")
        wait_for_line(tmp_path / "run" / "metrics.jsonl", '"step": 3')
        second.send_signal(signal.SIGKILL)
        code = first.wait(90)
    assert code in (75, -signal.SIGABRT)
    assert code != 75 or "error: process 0 of 2 lost another process" in (tmp_path / "0.log").read_text()


def test_two_processes_roll_back_together(tmp_path):
    """A NaN in the rows of one: both go back to step 4 and leave the batch out, as one process with both devices does."""
    flags = ["--config=tests/train/poisoned.py"]
    (tmp_path / "two").mkdir()
    alone = subprocess.run(
        [sys.executable, "-m", "jaxtrain.main", *flags, f"--run_dir={tmp_path / 'one' / 'run'}"],
        cwd=ROOT,
        env=environment(2),
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 0, alone.stdout + alone.stderr
    with started(2, 1, [*flags, f"--run_dir={tmp_path / 'two' / 'run'}"], tmp_path / "two") as both:
        assert [process.wait(200) for process in both] == [0, 0], (tmp_path / "two" / "1.log").read_text()[-2000:]
    told = "rollback   step 6: its loss is nan"
    assert told in alone.stdout
    assert told in (tmp_path / "two" / "0.log").read_text()
    one, two = (json.loads((tmp_path / name / "run" / "rollbacks.json").read_text()) for name in ("one", "two"))
    assert one == two
    assert [(entry["bad_step"], entry["back_to"], entry["first_batch"], entry["last_batch"]) for entry in two] == [(6, 4, 5, 5)]
    assert losses(tmp_path / "two" / "run") == pytest.approx(losses(tmp_path / "one" / "run"), rel=1e-6)
    assert sorted(losses(tmp_path / "two" / "run")) == list(range(1, 13))
