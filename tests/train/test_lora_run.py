"""A run with adapters: it resumes on another mesh, and its export and its model in hand compute what was trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxtrain import Trainer, load
from jaxtrain.checkpoint.inspection import diff, inspect
from jaxtrain.config import CheckpointConfig, Config, GuardConfig, LoraConfig, MeshConfig, OptimizerConfig
from jaxtrain.errors import CheckpointError, ExplainedError
from jaxtrain.huggingface.adapters import adapter_table, export_adapter
from jaxtrain.huggingface.config import family_of, read_config, table_of
from jaxtrain.huggingface.exporting import export
from jaxtrain.models.decoder import STACKED
from jaxtrain.models.quantised_weights import Quantised, dequantise
from tests.huggingface import goldens
from tests.huggingface.test_folders import make, weights_of
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


def test_an_adapter_of_peft_goes_out_and_comes_in(run: Config, tmp_path: Path):
    """PEFT's form is x W^T + s (x lora_A^T) lora_B^T; other settings, and other matrices, are refused by name."""
    target = tmp_path / "adapter"
    modules = export_adapter(run.run_dir, str(target))
    assert modules == [*(f"self_attn.{name}_proj" for name in "qkvo"), "mlp.down_proj"]
    described, held = json.loads((target / "adapter_config.json").read_text()), load_file(target / "adapter_model.safetensors")
    assert {name: described[name] for name in ("r", "lora_alpha", "target_modules")} == {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": modules,
    }
    export(run.run_dir, str(tmp_path / "merged"))
    base, merged = weights_of(Path(run.init_from)), weights_of(tmp_path / "merged")
    changed = [name for name in base if name != "model.embed_tokens.weight" and not np.array_equal(base[name], merged[name])]
    assert len(held) == 2 * len(changed) == 2 * 5 * run.model.num_layers
    for name in changed:
        a, b = (held[f"base_model.model.{name.removesuffix('.weight')}.lora_{factor}.weight"] for factor in "AB")
        assert np.abs(base[name] + 2 * b @ a - merged[name]).max() <= 1e-6
    again = replace(run, run_dir=str(tmp_path / "again"), lora=replace(LORA, init_from=str(target)))
    ours, theirs = (trainer.state["params"]["layers"]["lora"] for trainer in (restored(run), Trainer(again)))
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))
    for wrong, words in (
        ({"alpha": 3.0}, r"lora_alpha=4 with use_rslora=False scales by 2, but lora\.alpha=3 .* by 1\.5"),
        ({"targets": ("attention/*",)}, "which lora.targets does not name"),
        ({"targets": ()}, "leave them out of lora.targets"),
    ):
        with pytest.raises(ExplainedError, match=words):
            _ = Trainer(replace(again, lora=replace(again.lora, **wrong))).state


@pytest.mark.parametrize(
    ("family", "targets", "words"),
    [
        ("phi3", (), "layers/attention/query: .* holds other matrices too"),
        ("gpt_oss", (), "layers/moe/gate: it is of experts whose file has one tensor for all"),
        ("qwen3_moe", ("moe/up",), "layers/moe/up: PEFT holds experts' gate and up as one: have both"),
        ("gpt2", ("down",), "layers/mlp/down: .* is stored with its inputs first"),
        ("deepseek_v3", ("mlp/*",), "outer/first_layers/mlp/gate: beside experts"),
    ],
)
def test_what_peft_cannot_hold_is_refused_with_the_reason(family: str, targets: tuple[str, ...], words: str):
    config = goldens.load(family)["config"]
    model = replace(read_config(config), adapters=LoraConfig(rank=2, targets=targets))
    with pytest.raises(ExplainedError, match=words):
        adapter_table(table_of(family_of(config), model), model)


def in_nf4(run: Config, target: Path) -> Config:
    """Return the config of the same run with a base in nf4."""
    return replace(run, run_dir=str(target), lora=replace(LORA, base="nf4", base_group=4))


def test_a_base_in_few_bits_is_saved_read_and_merged(run: Config, tmp_path: Path, capsys: pytest.CaptureFixture):
    """A run in nf4 resumes on another mesh with the same bits; its export holds W + s A B of W's numbers."""
    config = in_nf4(run, tmp_path / "run")
    trainer = Trainer(config)
    before = np.asarray(trainer.state["params"]["layers"]["mlp"]["down"].values)
    trainer.train()
    there = restored(replace(config, mesh=MeshConfig(pipe=2, fsdp=4)))
    assert [a.tobytes() for a in canonical(trainer)] == [b.tobytes() for b in canonical(there)]
    assert len(jax.tree.leaves(there.state["optimizer"])) == 2 * 2 * 5 + 2
    held = jax.device_get(trainer.state["params"]["layers"])
    assert np.array_equal(held["mlp"]["down"].values, before)
    export(config.run_dir, str(tmp_path / "out"))
    a, b = (held["lora"]["mlp"]["down"][name][0, 0] for name in "ab")
    numbers = dequantise(np, STACKED + ("mlp", "embed"), held["mlp"]["down"])[0, 0]
    assert np.abs(numbers).max() > 0
    for layer, (own, one, other) in enumerate(zip(numbers, a, b, strict=True)):
        merged = weights_of(tmp_path / "out")[f"model.layers.{layer}.mlp.down_proj.weight"]
        assert np.abs(own + 2 * one @ other - merged.T).max() <= 1e-6
    assert inspect(config.run_dir) == 0
    assert "params/layers/mlp/down/scale" in capsys.readouterr().out
    assert diff(f"{config.run_dir}:1", f"{config.run_dir}:2") == 1
    assert "down/values" not in capsys.readouterr().out  # the base is the same
    assert len(export_adapter(config.run_dir, str(tmp_path / "adapter"))) == 5
    with pytest.raises(CheckpointError, match=r"lora\.base: nf4 -> int8"):
        restored(replace(config, lora=replace(config.lora, base="int8")))


@pytest.mark.slow
def test_models_of_a_base_in_few_bits(run: Config, tmp_path: Path):
    """The run's model in hand, the run loaded and the merged folder are one; its weights begin runs with such a base only."""
    config = replace(in_nf4(run, tmp_path / "run"), guard=GuardConfig(debug_nans=True, copies_every=1))
    Trainer(config).train()
    export(config.run_dir, str(tmp_path / "out"))
    loaded, merged = load(config.run_dir), load(tmp_path / "out")
    tokens = np.random.default_rng(0).integers(0, 101, (2, 12))
    truth = loaded.logits(tokens)
    for model in (restored(config).model(), merged):
        assert np.abs(model.logits(tokens) - truth).max() <= 1e-5 * np.abs(truth).max()
    loaded.save_hf(str(tmp_path / "again"))
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert first == second
    with pytest.raises(ExplainedError, match=r"targets attention/\*,down, lora\.base=nf4\), which"):
        _ = Trainer(replace(run, init_from=config.run_dir, run_dir=str(tmp_path / "plain"))).state
    onwards = Trainer(replace(config, init_from=run.run_dir, run_dir=str(tmp_path / "onwards"))).state["params"]["layers"]
    assert isinstance(onwards["mlp"]["up"], Quantised)
    before = restored(run).state["params"]["layers"]["lora"]["mlp"]["down"]["b"]
    assert np.array_equal(onwards["lora"]["mlp"]["down"]["b"], before)
