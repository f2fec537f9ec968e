"""A run with adapters: it resumes on another mesh, and its export and its model in hand compute what was trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtrain import Trainer, load
from jaxtrain.config import CheckpointConfig, Config, LoraConfig, MeshConfig, OptimizerConfig
from jaxtrain.errors import CheckpointError, ExplainedError
from jaxtrain.huggingface.exporting import export
from tests.huggingface.test_folders import make
from tests.huggingface.test_init_from import config_of

LORA = LoraConfig(rank=2, targets=("attention/*", "down"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of two steps from a folder's weights, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("lora")
    make(folder / "llama", "llama3_2")
    (folder / "llama" / "tokenizer.json").unlink()  # it has no tokens
    config = config_of(folder / "llama", folder / "run", fsdp=2, tensor=2, data=2)
    config = replace(config, lora=LORA, optimizer=OptimizerConfig(peak_lr=0.1, schedule="constant"))
    config = replace(config, checkpoint=CheckpointConfig(every=1, asynchronous=False))
    Trainer(config).train()
    return config


def restored(config: Config) -> Trainer:
    """Return a trainer at the run's newest checkpoint."""
    trainer = Trainer(config)
    assert trainer.restore() == 2
    return trainer


def canonical(trainer: Trainer) -> list[np.ndarray]:
    """Return the state's leaves in canonical form."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(trainer.prepared.canonical().from_state(trainer.state))]


def test_it_resumes_on_another_mesh_with_the_same_bits(run: Config):
    here = canonical(restored(run))
    elsewhere = restored(replace(run, mesh=MeshConfig(pipe=2, fsdp=4)))
    there = canonical(elsewhere)
    assert [a.tobytes() for a in here] == [b.tobytes() for b in there]
    factors = elsewhere.state["params"]["layers"]["lora"]["mlp"]["down"]
    assert np.asarray(factors["b"]).any()
    assert len(jax.tree.leaves(elsewhere.state["optimizer"])) == 2 * 2 * 5 + 2


def test_other_adapters_are_another_run(run: Config):
    with pytest.raises(CheckpointError, match=r"lora\.alpha: 0\.0 -> 1\.0"):
        restored(replace(run, lora=replace(LORA, alpha=1.0)))
    with pytest.raises(ExplainedError, match=r"trained with adapters \(lora\.rank=2, scale 2"):
        _ = Trainer(replace(run, init_from=run.run_dir, run_dir=f"{run.run_dir}_full", lora=LoraConfig())).state


def test_what_is_exported_is_what_was_trained(run: Config, tmp_path: Path):
    """The run's model in hand, the run loaded and the merged folder: equal logits and answers, which are not the base's."""
    export(run.run_dir, str(tmp_path / "out"))
    trained, loaded, merged = restored(run).model(), load(run.run_dir), load(tmp_path / "out")
    tokens = np.random.default_rng(0).integers(0, 101, (2, 12))
    truth = loaded.logits(tokens)
    for model in (trained, merged):
        assert np.abs(model.logits(tokens) - truth).max() <= 1e-5 * np.abs(truth).max()
    assert np.abs(load(run.init_from).logits(tokens) - truth[..., :101]).max() > 0.1 * np.abs(truth).max()
    prompt = tokens[0].tolist()
    assert loaded.generate(prompt, 8) == merged.generate(prompt, 8)
    loaded.save_hf(str(tmp_path / "again"))
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert first == second
