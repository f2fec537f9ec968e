"""Runs of four processes with two fake devices each, under the supervisor, and what is to be seen of them afterwards."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from jaxtrain.checkpoint import committed_steps
from jaxtrain.checkpoint.stored import read_stored
from jaxtrain.errors import EXIT_DONE
from tests import quick

ROOT = Path(__file__).parents[2]
CONFIG = "--config=tests/faults/faulty.py"
LAUNCHER = ("--processes=4", "--devices_per_process=2")
# One for every start of every test: the second start and all after it compile next to nothing.
COMPILED = Path(tempfile.gettempdir(), f"jaxtrain-faults-{os.getuid()}", "compiled")


@dataclass
class Faulty:
    """A run in a folder of its own: the launcher's output, and the records of its processes."""

    folder: Path
    steps: int
    xla_flags: str = quick.FLAGS
    launcher: Sequence[str] = LAUNCHER
    mesh: Sequence[str] = ()
    """Flags of the mesh, where it is not the config's."""

    @property
    def run_dir(self) -> Path:
        """The product's own folder."""
        return self.folder / "run"

    @property
    def checkpoints(self) -> Path:
        """Its checkpoints."""
        return self.run_dir / "checkpoints"

    def plan(self, *lives: Sequence[tuple[int, int, str]]) -> None:
        """Writes the faults of each life: (step, process, deeds)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "faults.json").write_text(json.dumps(lives))

    def command(self, launcher: Sequence[str], config: str = CONFIG) -> list[str]:
        """Of the launcher."""
        run = [config, f"--run_dir={self.run_dir}", f"--train.steps={self.steps}", f"--train.compilation_cache={COMPILED}"]
        return [sys.executable, "-m", "jaxtrain", "launch", *launcher, "--", *run, *self.mesh]

    def run(self, *launcher: str, config: str = CONFIG, seconds: float = 1200) -> int:
        """The launcher's exit code; what it says goes to launcher.log. It is asked to end where it takes too long."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "launcher.log", "a") as log:
            launched = subprocess.Popen(
                self.command([*self.launcher, *launcher], config),
                cwd=ROOT,
                env=environment(self.folder, self.xla_flags),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            return launched.wait(seconds)
        finally:
            while launched.poll() is None:
                launched.terminate()  # the second time it ends at once, and its processes with it
                time.sleep(0.5)

    def wait_for_processes(self, seconds: float = 60) -> None:
        """Until no process trains in the run's folder: those of a supervisor that was killed save first."""
        with open(self.run_dir / ".lock") as lock:
            wait_until(lambda: is_free(lock), seconds, f"the processes in {self.run_dir} end")

    @property
    def log(self) -> str:
        """All that the launcher said."""
        return (self.folder / "launcher.log").read_text()

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What the supervisor wrote down of that kind."""
        rows = [json.loads(line) for line in (self.run_dir / "launch" / "events.jsonl").read_text().splitlines()]
        return [row for row in rows if row["event"] == kind]

    def losses(self) -> dict[int, float]:
        """Loss by step."""
        rows = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]
        return {row["step"]: row["loss"] for row in rows if "loss" in row}

    def records(self) -> list[dict[str, Any]]:
        """What the processes noted, in no order."""
        files = sorted(self.folder.glob("steps-*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines() if line.endswith("}")]

    def token_ids(self) -> dict[int, dict[int, str]]:
        """{step: {row of the global batch: hash of its token ids}}; who trains a step again must get the same ids."""
        found: dict[int, dict[int, str]] = {}
        for record in self.records():
            for row, ids in record.get("rows", {}).items():
                assert found.setdefault(record["step"], {}).setdefault(int(row), ids) == ids, (record, row)
        return found

    def final_checksums(self) -> dict[str, str]:
        """Of every array of the last checkpoint: parameters, moments, step. The same on any mesh."""
        assert committed_steps(self.checkpoints)[-1] == self.steps
        return read_stored(self.checkpoints / str(self.steps))["checksums"]

    def leftovers(self) -> list[str]:
        """What stands among the checkpoints and is neither one nor one set aside."""
        steps = {str(step) for step in committed_steps(self.checkpoints)}
        return [p.name for p in self.checkpoints.iterdir() if p.name not in steps and ".damaged-" not in p.name]


def environment(folder: Path, xla_flags: str = quick.FLAGS) -> dict[str, str]:
    """Of a launcher: nothing of ours but the folder with the plan, and by default quick compiles."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_FLAGS", "JAX", "PYTEST"))}
    ours = {"JAX_PLATFORMS": "cpu", "JAXTRAIN_TEST_FOLDER": str(folder), "JAXTRAIN_TEST_CACHE": "all"}
    return kept | ours | {"XLA_FLAGS": xla_flags}


def uninterrupted(shared: Path, steps: int, **more: Any) -> Faulty:
    """The same run without faults; made once for all tests and workers that share a folder."""
    run = Faulty(shared / f"uninterrupted-{steps}", steps, **more)
    shared.mkdir(parents=True, exist_ok=True)
    with open(shared / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (run.folder / "done").exists():
            assert run.run() == EXIT_DONE, run.log[-3000:]
            (run.folder / "done").touch()
    return run


def is_free(lock: IO[str]) -> bool:
    """Whether no other process holds the lock."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(lock, fcntl.LOCK_UN)
    return True


def wait_until(condition: Callable[[], Any], seconds: float, words: str) -> None:
    """Until it holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds:.0f} s: {words}"
        time.sleep(0.05)
