"""Two real processes without a supervisor: what they refuse, how one ends that loses the other, how they roll back together.

That all stop after the same step and go on from there is held in tests/faults/test_faults.py.
"""

import json
import signal
import subprocess
import sys

import pytest

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
        both[1].wait(200)
    log = (tmp_path / "1.log").read_text()
    assert both[1].returncode == 2
    assert "train.steps=6 in process 1, but 5 in process 0" in log


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
