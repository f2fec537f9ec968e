"""A config to begin with from a HuggingFace folder: its model, its weights and its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from jaxtrain.config import Config, DataConfig
from jaxtrain.errors import ExplainedError


def is_model_folder(path: Path) -> bool:
    """Return whether the folder is of a HuggingFace model, not of a run of ours."""
    if (path / "checkpoints").is_dir() or not (path / "config.json").is_file():
        return False
    try:
        return "model_type" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # it says itself what is wrong


def folder_config(path: Path) -> Config:
    """Return the config of a folder's model, which trains its weights further, with its tokenizer where it has one.

    Raises:
      ExplainedError: its config.json cannot be read, or is of no family that we know.
    """
    from jaxtrain.huggingface.config import read_config  # slow, and every command line asks `is_model_folder`

    file, tokenizer = path / "config.json", path / "tokenizer.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExplainedError(f"{file}: cannot be read ({error})") from error
    data = DataConfig(tokenizer=str(tokenizer)) if tokenizer.is_file() else DataConfig()
    name = "".join(c if c.isalnum() or c in "._+-" else "-" for c in path.resolve().name)
    return Config(name=name, model=read_config(found, str(file)), data=data, init_from=str(path))
