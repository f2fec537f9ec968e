"""Preferences in a run: the reference is scored once, and a run goes on with the same numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxtrain.config import Config, DataConfig, DataSource, DpoConfig, MeshConfig, ObjectiveConfig, OptimizerConfig
from jaxtrain.train import completion
from jaxtrain.train.trainer import Trainer
from tests.tiny import tiny

STEPS = 6


@pytest.fixture
def config(tmp_path: Path) -> Config:
    rows = [{"prompt": f"{i}?", "chosen": "yes" * (1 + i % 3), "rejected": "no" * (1 + i % 4)} for i in range(64)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DataSource(kind="chat", path=str(tmp_path / "pairs.jsonl"))
    return tiny(
        run_dir=str(tmp_path / "run"),
        mesh=MeshConfig(fsdp=2, data=4),
        model={"vocab_size": 384},
        data=DataConfig((source,), sequence_length=64, cache_dir=str(tmp_path / "cache"), validation_fraction=0.2),
        objective=ObjectiveConfig("dpo", dpo=DpoConfig(beta=0.5)),
        optimizer=OptimizerConfig(peak_lr=0.02, schedule="constant"),
        train={"steps": STEPS, "log_every": 1, "validate_every": STEPS, "compilation_cache": str(tmp_path / "programs")},
        checkpoint={"every": 3, "asynchronous": False},
    )


def test_preferences_are_learned_and_a_resumed_run_keeps_its_reference(config: Config, monkeypatch: pytest.MonkeyPatch):
    whole = Trainer(config)
    assert whole.train().step == STEPS
    rows = whole.metrics
    np.testing.assert_allclose(rows["loss"][0], np.log(2), atol=1e-6)  # the model is still its own reference
    np.testing.assert_allclose(rows["reward_margin"][0], 0, atol=1e-6)
    assert rows["loss"][-1] < rows["loss"][0] - 0.1
    assert rows["preference_accuracy"][-1] > 0.9
    logged = [json.loads(line) for line in (config.directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["validation_preference_accuracy"] for row in logged if "validation_loss" in row][-1] > 0.9

    halves = replace(config, run_dir=config.run_dir + "2")
    Trainer(replace(halves, train=replace(halves.train, steps=3))).train()
    monkeypatch.setattr(completion, "reference_numbers", lambda *_: pytest.fail("the reference is computed again"))
    resumed = Trainer(halves)
    resumed.train()
    np.testing.assert_array_equal(resumed.metrics["loss"], rows["loss"])
