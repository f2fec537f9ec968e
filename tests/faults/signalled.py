"""A config for runs that are signalled in one phase: a tiny model, and a process that halts in that phase until it may go on.

JAXTRAIN_TEST_PHASE names the phase, JAXTRAIN_TEST_FOLDER a folder: the process makes the file `reached` there, and goes on when
there is a file `go`. The product has no switch for this; a config is code, and this one wraps functions of the product.
"""

from __future__ import annotations

import atexit
import importlib.abc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtrain import signals
from jaxtrain.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DataSource,
    GuardConfig,
    OptimizerConfig,
    TrainConfig,
)
from tests.tiny import MODEL

STEPS, EVERY, HALT = 8, 3, 5
"""Steps of the run, between two checkpoints, and the step in which "step" halts."""


def get_config() -> Config:
    """The run: one device a process."""
    if os.environ.get("JAXTRAIN_PROCESS_ID", "0") == "0" and "JAXTRAIN_TEST_PHASE" in os.environ and not is_launcher():
        prepare(os.environ["JAXTRAIN_TEST_PHASE"])
    return Config(
        name="signalled",
        model=replace(MODEL, num_layers=1, mlp_dim=32, vocab_size=257),
        data=DataConfig(
            sources=(DataSource(kind="text", path="tests/faults/*.py"),),
            tokenizer="byte",
            sequence_length=32,
            validation_fraction=0.2,
        ),
        optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=2),
        train=TrainConfig(
            steps=STEPS,
            global_batch_size=8,
            log_every=1,
            validate_every=4,
            validate_batches=1,
            sample_tokens=4,
            compilation_cache=str(Path(tempfile.gettempdir(), f"jaxtrain-signalled-{os.getuid()}")),
        ),
        checkpoint=CheckpointConfig(every=EVERY),
        guard=GuardConfig(copies="off"),
    )


def is_launcher() -> bool:
    """Whether this is `jaxtrain launch`, which reads the config too."""
    return "jaxtrain.verbs.launch" in sys.modules


def halt() -> None:
    """Says that the phase is reached, and waits."""
    folder = Path(os.environ["JAXTRAIN_TEST_FOLDER"])
    (folder / "reached").touch()
    until = time.monotonic() + 60
    while not ((folder / "go").exists() and has_heard()) and time.monotonic() < until:
        time.sleep(0.01)


def has_heard() -> bool:
    """Whether a signal has been heard, or none is listened to: on a busy machine the listening thread may be late."""
    return not signals._watches or any(watch._requests.newest is not None for watch in signals._watches)


class Greedy(importlib.abc.MetaPathFinder):
    """Halts in the import of flax, and catches everything meanwhile, as some libraries do."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "flax":
            try:
                halt()
            except BaseException:
                halt()


def prepare(phase: str) -> None:
    """Makes this process halt in the phase, once."""
    if phase == "import":
        sys.meta_path.insert(0, Greedy())
        return
    if phase == "end":
        atexit.register(halt)
        return
    from jaxtrain.train import hooks, run, stop, trainer

    places: dict[str, tuple[Any, str, Callable[..., bool]]] = {
        "data": (trainer, "open_data", lambda *_: True),
        "compile": (run, "TrainSteps", lambda *_: True),
        "step": (stop.StopOnSignal, "before_step", lambda self, step, state: step == HALT),
        "save": (hooks.Saving, "after_step", lambda self, step, state: step == EVERY),
        "validation": (hooks.Validation, "after_step", lambda *_: True),
        "sampling": (run, "continue_text", lambda *_: True),
    }
    place, name, wants = places[phase]
    original, halted = getattr(place, name), []

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if not halted and wants(*arguments):
            halted.append(True)
            halt()
        return original(*arguments, **named)

    setattr(place, name, wrapped)
