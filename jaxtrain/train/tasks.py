"""Tasks in the loop: what the parameters being trained reach on train.tasks, every train.tasks_every steps."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import jax

from jaxtrain.data.pipeline import Data
from jaxtrain.errors import DataError
from jaxtrain.evaluation.measures import Settings, evaluate
from jaxtrain.evaluation.tasks import Task, read_task
from jaxtrain.inference.model import Model
from jaxtrain.train.evaluation import model_in_hand
from jaxtrain.train.hooks import Telemetry
from jaxtrain.train.loop import Hook
from jaxtrain.train.prepared import Prepared
from jaxtrain.train.stop import StopOnSignal

PyTree = Any


class _Unfinished(Exception):
    """A signal ends the run before all tasks are measured."""


def read_tasks(prepared: Prepared) -> list[Task]:
    """Return the tasks of train.tasks.

    Raises:
      DataError: one cannot be read, or there is no tokenizer.
    """
    config = prepared.config
    if config.train.tasks and config.data.tokenizer == "none":
        raise DataError("train.tasks are texts, but data.tokenizer=none; give the tokenizer that made the tokens")
    return [read_task(path) for path in config.train.tasks]


class Tasks(Hook):
    """Logs a row with a measure of each task, `task_NAME_accuracy` and the like. It takes no batch of the data.

    It leaves a measurement unfinished where `stop` says that a signal ends the run.
    """

    def __init__(self, telemetry: Telemetry, prepared: Prepared, data: Data, stop: StopOnSignal):
        self._telemetry, self._prepared, self._data, self._stop = telemetry, prepared, data, stop
        self._tasks, config = read_tasks(prepared), prepared.config
        self._settings = Settings(min(config.data.sequence_length, config.model.learned_positions or 2**31))
        self._model: Model | None = None

    def after_step(self, step: int, state: PyTree) -> None:
        jax.block_until_ready(state["params"])  # else XLA:CPU may run the step's collectives beside these programs'
        model = model_in_hand(self._prepared.for_validation(step - 1), state["params"], self._data)
        if self._model is not None and self._model.config.model == model.config.model:  # with the programs that are compiled
            model = replace(self._model, params=model.params)
        self._model = replace(model, params=None)
        with self._telemetry.pause("measuring tasks"):
            row = self._row(step, model)
        if row is None:
            self._telemetry.progress.say(f"tasks      those of step {step} are left unfinished")
            return
        self._telemetry.log.write(row)
        measured = [f"{name.removeprefix('task_')} {value:.4f}" for name, value in row.items() if name != "step"]
        self._telemetry.progress.say(f"tasks      step {step} | {' | '.join(measured)}")

    def _row(self, step: int, model: Model) -> dict[str, Any] | None:
        row, parts = {"step": step}, itertools.count(1)

        def advance(count: int) -> None:
            if self._stop.ends_before(f"tasks {step}", next(parts)):
                raise _Unfinished

        try:
            for task in self._tasks:
                found = evaluate(model, task, self._settings, advance).measures
                row |= {f"task_{task.name}_{name}": value for name, value in found.items()}
        except _Unfinished:
            return None
        return row
