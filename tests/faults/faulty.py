"""A config for runs that are to fall: a tiny model, and in the processes of the run the faults that a test planned for them.

The folder JAXTRAIN_TEST_FOLDER holds faults.json: for each life of the run that is to end badly, a list of [step, process,
deeds]. When it comes to dispatch that step the process does the deeds, and marks it with a file fault-LIFE-NUMBER. Every
process notes there what it trains on: steps-P.jsonl has a row for each batch, with a hash of each of its rows of token ids.

The product has no switch for any of this. A config is code, and this one wraps two of its functions: what tells a watcher of
each step, and what hands out batches.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from jaxtrain.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DataSource,
    DistributedConfig,
    GuardConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from tests.tiny import MODEL

EVERY = 4
"""Steps between two checkpoints."""


def get_config() -> Config:
    """The run of every test here: 8 devices."""
    folder = os.environ.get("JAXTRAIN_TEST_FOLDER")
    if folder and process_id() is not None:
        Faults(Path(folder), process_id()).install()
        if os.environ.get("JAXTRAIN_TEST_CACHE") == "all":
            keep_programs_of_every_process()
    return Config(
        name="faulty",
        model=replace(MODEL, num_layers=1, mlp_dim=32, vocab_size=257),
        data=DataConfig(sources=(DataSource(kind="synthetic"),), tokenizer="byte", sequence_length=32),
        mesh=MeshConfig(data=4, fsdp=2),
        optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=2),
        train=TrainConfig(global_batch_size=8, log_every=1, validate_every=0, sample_tokens=0),
        checkpoint=CheckpointConfig(every=EVERY, keep=100),
        guard=GuardConfig(copies="off"),  # one program less to compile at every start; tests/train/test_bad_steps.py has it
        distributed=DistributedConfig(heartbeat_seconds=10, start_timeout_seconds=120, hang_seconds=12),
    )


def process_id() -> int | None:
    """Which process of the run this is, by whatever started it; None for the launcher, which reads the config too."""
    for name in ("JAXTRAIN_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX"):
        if name in os.environ:
            return int(os.environ[name])
    return None


def keep_programs_of_every_process() -> None:
    """On GPUs jax finds in its cache what process 0 compiled. On CPU each process has keys of its own (they contain a
    fingerprint of the devices as it sees them), and as process 0 alone writes, all others compile at every start: half of the
    CPU time of a start and a few steps. So here all write.
    """
    from types import SimpleNamespace

    from jax._src import compiler

    client = compiler.distributed.global_state  # its client is known only later

    class First:
        """Says to the compiler that this is process 0."""

        @property
        def global_state(self):
            return SimpleNamespace(process_id=0, client=client.client)

    compiler.distributed = First()


class Faults:
    """What this process does wrong, and a record of what it does."""

    def __init__(self, folder: Path, process: int):
        self.folder, self.process = folder, process
        lives = json.loads((folder / "faults.json").read_text()) if (folder / "faults.json").exists() else []
        life = max((int(mark.name.split("-")[1]) + 1 for mark in folder.glob("fault-*")), default=0)
        planned = lives[life] if life < len(lives) else []
        self.own = [
            (folder / f"fault-{life}-{i}", step, deeds.split("+"))
            for i, (step, who, deeds) in enumerate(planned)
            if who == process
        ]
        self.checkpoints = Path(next(a for a in sys.argv if a.startswith("--run_dir=")).partition("=")[2], "checkpoints")
        self.record = open(folder / f"steps-{process}.jsonl", "a", buffering=1)  # noqa: SIM115, for the life of the process
        self.starter, self.pause = os.environ.get("JAXTRAIN_STARTER", ""), 0.0
        self.stop_on_signal = None

    def install(self) -> None:
        """Wraps what tells of steps and what hands out batches."""
        from jaxtrain.data.pipeline import Data
        from jaxtrain.telemetry.heartbeat import Heartbeat
        from jaxtrain.train.stop import StopOnSignal

        tell, batches, enter = Heartbeat.step, Data.train_batches, StopOnSignal.__enter__

        def step(heartbeat, dispatched=None, done=None):
            tell(heartbeat, dispatched, done)
            if done is not None:
                self.note(done=done)
            if dispatched is not None:
                time.sleep(self.pause)
                self.due(dispatched)

        def train_batches(data, first_step, rows, *more):
            return Noted(batches(data, first_step, rows, *more), first_step, rows(first_step).start, self.note)

        def enter_and_note(stop):
            self.stop_on_signal = enter(stop)
            return self.stop_on_signal

        Heartbeat.step, Data.train_batches, StopOnSignal.__enter__ = step, train_batches, enter_and_note

    def note(self, **row) -> None:
        """A row of the record."""
        print(json.dumps({"time": time.time(), "starter": self.starter, **row}), file=self.record)

    def due(self, step: int) -> None:
        """Does what is planned for this step and has not been done."""
        for mark, when, deeds in self.own:
            if step >= when and not mark.exists():
                mark.write_text(f"{time.time()}")
                for deed in deeds:
                    name, _, argument = deed.partition(":")
                    getattr(self, name)(*([argument] if argument else []))

    # -----------------------------------------------------------------------------------------------------------------
    # Deeds

    def saved(self, step: str) -> None:
        """Waits until that step's checkpoint is committed."""
        until = time.monotonic() + 60
        while not (self.checkpoints / step / "committed.json").exists() and time.monotonic() < until:
            time.sleep(0.005)

    def wait_for(self, name: str) -> None:
        """Says that it waits for that file, so that the test can do something at this very step."""
        (self.folder / f"{name}-awaited").touch()
        while not (self.folder / name).exists():
            time.sleep(0.005)

    def kill(self) -> None:
        """As the kernel does when memory is short, or a node goes."""
        self.note(killed=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_supervisor(self) -> None:
        """Leaves all its processes behind; this one goes on when it has been told."""
        os.kill(os.getppid(), signal.SIGKILL)
        self.hear_of_it()

    def kill_in_save(self, step: str) -> None:
        """Dies while that step's checkpoint is being written."""

        def watch() -> None:
            while not any(self.checkpoints.glob(f"{step}.partial*")):
                time.sleep(0.001)
            self.kill()

        threading.Thread(target=watch, daemon=True).start()

    def slow(self, seconds: str) -> None:
        """Every step takes so long from now on."""
        self.pause = float(seconds)

    def stop(self) -> None:
        """Freezes, heartbeats and all."""
        os.kill(os.getpid(), signal.SIGSTOP)

    def hang(self) -> None:
        """Is stuck in Python; the heartbeats go on."""
        time.sleep(1e6)

    def throw(self) -> None:
        """Raise an error that the product does not explain."""
        raise RuntimeError("a fault of the test's")

    def terminate(self) -> None:
        """Is asked to end, alone of all, and goes on when it has heard."""
        os.kill(os.getpid(), signal.SIGTERM)
        self.hear_of_it()

    def hear_of_it(self) -> None:
        """Waits for the signal's receipt, which a busy machine puts off: then the step of the stop is known."""
        until = time.monotonic() + 60
        while self.stop_on_signal.received is None and time.monotonic() < until:
            time.sleep(0.005)

    def resize(self, processes: str) -> None:
        """The cluster has so many processes from now on."""
        (self.folder / "processes").write_text(processes)

    def flip(self, step: str) -> None:
        """One bit of that checkpoint's arrays changes on disk."""
        path = max((self.checkpoints / step).rglob("d/*"), key=lambda file: file.stat().st_size)
        data, bit = bytearray(path.read_bytes()), random.Random(step).randrange(8 * path.stat().st_size)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)

    def truncate(self, step: str) -> None:
        """Half of one of that checkpoint's files is lost."""
        path = max((self.checkpoints / step).rglob("d/*"), key=lambda file: file.stat().st_size)
        os.truncate(path, path.stat().st_size // 2)

    def fake(self, step: str) -> None:
        """A folder that looks like a later checkpoint, with the marks of this one and nothing else in it; and an empty one."""
        later = self.checkpoints / f"{step}000"
        later.mkdir()
        for name in ("committed.json", "_CHECKPOINT_METADATA"):
            (later / name).write_bytes((self.checkpoints / step / name).read_bytes())
        (self.checkpoints / f"{step}001").mkdir()

    def fill(self) -> None:
        """Takes all the space that is left on the disk of the checkpoints."""
        with open(self.checkpoints / "filling", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        """Gives it back."""
        (self.checkpoints / "filling").unlink()


class Noted:
    """Batches, each noted as it is taken: the step, and a hash of the ids in every row of the global batch that it holds."""

    def __init__(self, batches, first_step: int, first_row: int, note):
        self._batches, self._step, self._first_row, self._note = batches, first_step, first_row, note

    def __enter__(self):
        self._batches.__enter__()
        return self

    def __exit__(self, *error):
        return self._batches.__exit__(*error)

    def close(self):
        self._batches.close()

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self._batches)
        self._step += 1
        hashes = [hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in batch["tokens"]]
        self._note(step=self._step, rows={self._first_row + i: found for i, found in enumerate(hashes)})
        return batch
