"""A HuggingFace folder as the config: `--init_from=DIR` alone, or `--config=DIR`."""

import json
from pathlib import Path

import pytest

from jaxtrain.command.parsing import parse_config
from jaxtrain.errors import ConfigError, ExplainedError

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 260, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "a model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA))
    return path


@pytest.mark.parametrize("flags", [["--init_from={}"], ["--init-from", "{}"], ["--config={}"]])
def test_a_folder_is_its_own_config(folder: Path, flags: list[str]):
    config = parse_config([*(flag.format(folder) for flag in flags), "--train.steps=7"])
    assert (config.model.num_layers, config.model.mlp_dim, config.train.steps) == (3, 48, 7)
    assert (config.init_from, config.name, config.data.tokenizer) == (str(folder), "a-model", "byte")
    (folder / "tokenizer.json").write_text("{}")
    assert parse_config([f"--config={folder}"]).data.tokenizer == str(folder / "tokenizer.json")


def test_other_folders_are_refused_as_before(folder: Path):
    with pytest.raises(ConfigError, match="--config is missing.*of --init_from, is no folder of a HuggingFace model"):
        parse_config([f"--init_from={folder.parent}"])
    with pytest.raises(ExplainedError, match="that is a folder"):
        parse_config([f"--config={folder.parent}"])
    (folder / "config.json").write_text('{"model_type": "lama"}')
    with pytest.raises(ExplainedError, match="llama"):
        parse_config([f"--init_from={folder}"])
