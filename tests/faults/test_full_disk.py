"""A run whose folder lies on a small disk, filled and freed at random moments, ends as a run on a disk with space."""

import fcntl
import json
import os
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jaxtrain.checkpoint import committed_steps
from jaxtrain.checkpoint.stored import read_stored
from tests.faults.runs import COMPILED, CONFIG, ROOT, environment
from tests.lines import unstamped
from tests.telemetry.test_metrics import tensorboard_scalars

STEPS, LAG = 240, 40
"""The output goes into a pipe of a page, so the run is never more than so many lines ahead of the test."""


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a file system of its own needs root: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, spare: int) -> None:
    """Take all the space there is, but for about `spare` bytes."""
    with open(folder / "filling", "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(file.tell() - spare, 0))


def train(folder: Path, run_dir: Path, on_step) -> str:
    """Run to the end, and call `on_step` with each step whose line is read; return all that was printed."""
    flags = ["--mesh.data=1", "--mesh.fsdp=1", f"--train.steps={STEPS}", f"--train.compilation_cache={COMPILED}"]
    flags += [f"--run_dir={run_dir}", "--checkpoint.keep=2", "--checkpoint.every=20"]
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxtrain.main", CONFIG, *flags],
        cwd=ROOT,
        env=environment(folder) | {"PYTHONUNBUFFERED": "1"},
        stdout=writing,
        stderr=subprocess.STDOUT,
    )
    os.close(writing)
    watchdog = threading.Timer(300, process.kill)
    watchdog.start()
    said = []
    with open(reading, encoding="utf-8") as output:
        for line in output:
            said.append(line)
            step = re.match(rf"step (\d+)/{STEPS} ", unstamped(line))
            if step:
                on_step(int(step[1]))
    watchdog.cancel()
    text = "".join(said)
    assert process.wait() == 0, text[-3000:]
    return text


def losses(run_dir: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_a_disk_that_is_filled_and_freed_costs_nothing(small_disk, tmp_path, seed):
    draw, run_dir = random.Random(seed), small_disk / "run"
    deeds = {step: draw.choice(("fill", "free")) for step in draw.sample(range(1, STEPS - 2 * LAG), 24)}
    deeds[STEPS - 2 * LAG] = "free"  # it must save its end

    def on_step(step: int) -> None:
        deed = deeds.get(step)
        if deed == "fill":
            fill(small_disk, draw.choice((0, 1000, 20_000)))
        elif deed == "free":
            (small_disk / "filling").unlink(missing_ok=True)

    said = train(tmp_path, run_dir, on_step)
    assert "Traceback" not in said
    assert "cannot be written: No space left on device" in said
    whole = tmp_path / "whole"
    train(tmp_path, whole, lambda step: None)
    assert losses(run_dir) == losses(whole)
    assert [step for tag, step, _ in tensorboard_scalars(run_dir)[0] if tag == "train/loss"] == list(range(1, STEPS + 1))
    assert committed_steps(run_dir / "checkpoints")[-1] == STEPS
    final = [read_stored(folder / "checkpoints" / str(STEPS))["checksums"] for folder in (run_dir, whole)]
    assert final[0] == final[1]
    assert json.loads((run_dir / "config.json").read_text())["name"] == "faulty"
    assert (run_dir / "loss.png").exists()
    assert [path for path in os.listdir(run_dir) if path.endswith(".new")] == []
