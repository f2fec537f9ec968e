"""Tasks in the loop: measured on the parameters of the step, without a change of the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxtrain.config import Config, DataConfig, DataSource, MeshConfig
from jaxtrain.errors import DataError
from jaxtrain.evaluation.measures import Settings, evaluate
from jaxtrain.evaluation.tasks import read_task
from jaxtrain.train.trainer import Trainer
from tests.tiny import tiny


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "text.txt").write_text("\n".join(f"{n} and {n + 1} are {2 * n + 1}" for n in range(400)))
    rows = [{"question": f"{n} and {n + 1} are", "choices": [f" {2 * n + 1}", " no", "!"], "answer": 0} for n in range(5)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = DataSource(kind="text", path=str(tmp_path / "text.txt"))
    return tiny(
        run_dir=str(tmp_path / "run"),
        mesh=MeshConfig(fsdp=2, tensor=2, data=2),
        model={"vocab_size": 260},
        data=DataConfig((source,), sequence_length=64, cache_dir=str(tmp_path)),
        train={"steps": 3, "log_every": 1, "validate_every": 0, "tasks": (str(tmp_path / "sums.jsonl"),), "tasks_every": 2},
        checkpoint={"every": 0},
    )


def test_rows_are_those_of_the_parameters_and_the_run_is_the_same_without(config: Config, tmp_path: Path):
    trainer = Trainer(config)
    trainer.train()
    logged = [json.loads(line) for line in (config.directory / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in logged if "task_sums_accuracy" in row]
    assert [row["step"] for row in measured] == [2, 3]
    expected = evaluate(trainer.model(), read_task(config.train.tasks[0]), Settings(64)).measures
    assert {name: measured[-1][f"task_sums_{name}"] for name in expected} == pytest.approx(dict(expected), rel=1e-6)
    without = replace(config, run_dir=str(tmp_path / "without"), train=replace(config.train, tasks=()))
    other = Trainer(without)
    other.train()
    np.testing.assert_array_equal(other.metrics["loss"], [row["loss"] for row in logged if "loss" in row])


def test_a_missing_task_is_told_before_compiling(config: Config):
    missing = replace(config, train=replace(config.train, tasks=("none.jsonl",)))
    with pytest.raises(DataError, match="none.jsonl: the task cannot be read"):
        Trainer(missing).train()
