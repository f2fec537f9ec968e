"""Preferences in a run: the reference is scored once, and a run goes on with the same numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxtrain.config import Config, DataConfig, DataSource, DpoConfig, MeshConfig, ObjectiveConfig, OptimizerConfig
from jaxtrain.train import reference
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
    monkeypatch.setattr(reference, "_computed", lambda *_: pytest.fail("the reference is computed again"))
    resumed = Trainer(halves)
    resumed.train()
    np.testing.assert_array_equal(resumed.metrics["loss"], rows["loss"])


def test_damaged_files_are_none_and_a_full_disk_is_told(tmp_path: Path):
    folder, arrays = tmp_path / "reference", (np.ones((3, 4), np.float32), np.ones((2, 4), np.float32))
    shapes = tuple(array.shape for array in arrays)
    assert reference._held(folder, "a", shapes) is None
    assert reference._written(folder, "a", arrays) == ""
    held = reference._held(folder, "a", shapes)
    assert held is not None
    np.testing.assert_array_equal(held[0], arrays[0])
    assert reference._held(folder, "b", shapes) is None
    assert reference._held(folder, "a", ((4, 4), (2, 4))) is None
    for content in (b"", (folder / "train.npy").read_bytes()[:-3], b"rubbish"):
        (folder / "train.npy").write_bytes(content)
        assert reference._held(folder, "a", shapes) is None
    (folder / "reference.json").write_text("[]")
    assert reference._held(folder, "a", shapes) is None
    (tmp_path / "file").touch()
    assert "Not a directory" in reference._written(tmp_path / "file" / "reference", "a", arrays)
