"""Runs that begin from weights of elsewhere: the same bits on any mesh, grown vocabularies, lineage, and the way back out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtrain import Trainer
from jaxtrain.checkpoint import blocks
from jaxtrain.checkpoint.stored import read_metadata
from jaxtrain.config import CheckpointConfig, Config, DataConfig, DataSource, MeshConfig, TrainConfig
from jaxtrain.errors import ConfigError, ExplainedError
from jaxtrain.huggingface.exporting import export
from jaxtrain.huggingface.files import WeightsFolder
from jaxtrain.huggingface.importing import TRAVELLING_FOLDER, canonical_shape, import_folder, read_block
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.train.initial_weights import keep_files
from jaxtrain.train.state import to_canonical
from tests.data.chat_folders import CHATML, CONTROL, make_folder
from tests.huggingface.test_folders import make, weights_of


def config_of(folder: Path, run: Path, **mesh: int) -> Config:
    """A short run over random tokens, from the folder's weights."""
    model = replace(WeightsFolder(folder).model, dtype="float32", attention="reference")
    data = DataConfig(
        sources=(DataSource(kind="synthetic"),), tokenizer="byte", sequence_length=16, cache_dir=str(run / "cache")
    )
    return Config(
        run_dir=str(run),
        init_from=str(folder),
        model=replace(model, vocab_size=300),
        mesh=MeshConfig(**(mesh or {"data": 8, "fsdp": 1})),
        data=data,
        train=TrainConfig(steps=2, global_batch_size=8, loss_chunk=16, validate_every=0, compilation_cache=""),
    )


def params_of(config: Config) -> dict[str, np.ndarray]:
    """The initial parameters, in canonical form."""
    trainer = Trainer(config)
    canonical = to_canonical(trainer.prepared.config, trainer.state["params"], parameter_dims(config.model))
    flat = jax.tree_util.tree_flatten_with_path(canonical)[0]
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in flat}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("init") / "llama"
    make(path, "llama3_2")
    return path


@pytest.fixture(scope="module")
def imported(folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", 5000)
        import_folder(str(folder), str(folder.parent / "run"), "float32")
    table = blocks.StoredArray(folder.parent / "run" / "checkpoints" / "0", "params/outer/table")
    assert table.block[0] < table.shape[0] / 2
    return folder.parent / "run"


@pytest.mark.parametrize(
    "mesh", [{"data": 8, "fsdp": 1}, {"pipe": 2, "fsdp": 2, "tensor": 2}], ids=["data", "pipe x fsdp x tensor"]
)
@pytest.mark.parametrize("source", ["folder", "run"])
def test_the_same_bits_on_any_mesh(source: str, mesh: dict[str, int], folder: Path, imported: Path, tmp_path: Path):
    """And rows of new tokens are the mean of the others."""
    config = config_of(folder, tmp_path, **mesh)
    params = params_of(replace(config, init_from=str(folder if source == "folder" else f"{imported}@0")))
    with WeightsFolder(folder) as opened:
        for ours in opened.table.parameters:
            whole = tuple(slice(0, size) for size in canonical_shape(opened.table, ours))
            expected = read_block(opened, ours, np.dtype(np.float32), whole)
            if ours != "outer/table":
                assert params[ours].tobytes() == expected.tobytes(), ours
                continue
            assert params[ours][:101].tobytes() == expected.tobytes()
            np.testing.assert_allclose(params[ours][101:300], np.tile(expected.mean(0), (199, 1)), rtol=1e-4, atol=1e-7)


def test_lineage_and_export(folder: Path, tmp_path: Path):
    """A second run from a checkpoint of the first has the same state, and knows where the weights first came from."""
    config = config_of(folder, tmp_path / "run")
    source = Trainer(config)
    source.save()
    origin = read_metadata(tmp_path / "run" / "checkpoints", 0)["origin"]
    assert origin == {"from": str(folder), "kind": "llama", "sha256": WeightsFolder(folder).sha256}
    again = replace(config, init_from=str(tmp_path / "run"), init_from_optimizer=True, run_dir=str(tmp_path / "more"))
    trainer = Trainer(again)
    for name in ("params", "optimizer"):
        here, there = jax.tree.leaves(trainer.state[name]), jax.tree.leaves(source.state[name])
        assert [np.asarray(a).tobytes() for a in here] == [np.asarray(b).tobytes() for b in there]
    assert trainer.prepared.origin["origin"] == origin
    assert export(str(tmp_path / "run"), str(tmp_path / "out"))["vocab_size"] == 300
    assert WeightsFolder(tmp_path / "out").model.vocab_size == 300
    assert weights_of(tmp_path / "out")["model.embed_tokens.weight"].shape == (300, 48)


@pytest.mark.slow
def test_a_run_exports_at_its_end(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    config = replace(config_of(folder, tmp_path / "run"), checkpoint=CheckpointConfig(export_hf=str(out), every=1))
    Trainer(config).train()
    assert f"of {folder}" in capsys.readouterr().out
    origins = [read_metadata(tmp_path / "run" / "checkpoints", step)["origin"]["from"] for step in (1, 2)]
    assert origins == [str(folder)] * 2
    assert (out / "chat_template.jinja").is_file()
    assert WeightsFolder(out).model.vocab_size == 300


def test_another_model_is_refused(folder: Path, tmp_path: Path):
    config = config_of(folder, tmp_path)
    with pytest.raises(ConfigError, match="model.num_layers: 5 in init_from, 4 in the config"):
        _ = Trainer(replace(config, model=replace(config.model, num_layers=4))).state
    with pytest.raises(ExplainedError, match="holds no optimizer state"):
        _ = Trainer(replace(config, init_from_optimizer=True)).state
    with pytest.raises(ExplainedError, match="nothing is no folder"):
        _ = Trainer(replace(config, init_from=str(tmp_path / "nothing"))).state


def test_a_run_on_chat_data_keeps_its_template_and_the_ends_of_its_answers(folder: Path, tmp_path: Path):
    chat = make_folder(tmp_path / "chat", CHATML.replace("<|im_end|>", "<|reserved_7|>"))
    data = DataConfig(
        sources=(DataSource(kind="chat", path="x"),), tokenizer=str(chat), chat_template=str(chat / "chat_template.jinja")
    )
    keep_files(replace(config_of(folder, tmp_path / "run"), data=data))
    beside = tmp_path / "run" / TRAVELLING_FOLDER
    assert (beside / "chat_template.jinja").read_text() == (chat / "chat_template.jinja").read_text()
    ends = json.loads((beside / "generation_config.json").read_text())["eos_token_id"]
    before = json.loads((folder / "config.json").read_text()).get("eos_token_id")
    before = [before] if isinstance(before, int) else before or []
    assert ends[: len(before)] == before
    assert {*map(CONTROL.index, ("<|endoftext|>", "<|im_end|>", "<|reserved_7|>"))} <= {*ends}
