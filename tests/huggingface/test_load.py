"""`jaxtrain.load`: a folder's or a run's model in Python, with the logits of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import jaxtrain
from jaxtrain.config import MeshConfig
from jaxtrain.errors import ExplainedError
from jaxtrain.huggingface.importing import import_folder
from tests.huggingface import tiny
from tests.huggingface.test_folders import make
from tests.huggingface.test_oracle import described


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder") / "gemma2"
    make(path, "gemma2")
    (path / "tokenizer.json").unlink()  # holds none
    return path


def first_documents() -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the golden batch, and where their first documents lie, which see nothing else."""
    batch = tiny.batch()
    return batch["tokens"], batch["segments"] == batch["segments"][:, :1]


@pytest.mark.parametrize("mesh", [None, MeshConfig(fsdp=2, pipe=2)], ids=["one", "pipe"])
def test_logits_of_a_folder_are_those_of_transformers(folder: Path, mesh: MeshConfig | None):
    golden, _, _ = described("gemma2")
    tokens, is_first = first_documents()
    model = jaxtrain.load(folder, mesh)
    logits = model.logits(tokens)
    assert np.abs(logits - golden["logits"])[is_first].max() < 2e-5
    answer = model.generate(tokens[0, :3].tolist(), 5)
    assert model.logits([tokens[0, :3].tolist() + answer])[0, 2:-1].argmax(-1).tolist()[: len(answer)] == answer


def test_a_run_gives_what_its_folder_gives(folder: Path, tmp_path: Path):
    import_folder(str(folder), str(tmp_path / "run"), "float32")
    tokens = first_documents()[0]
    of_run = jaxtrain.load(tmp_path / "run", dtype="float32").score(tokens)
    np.testing.assert_array_equal(of_run, jaxtrain.load(folder).score(tokens))


def test_what_cannot_be_loaded_is_said(folder: Path, tmp_path: Path):
    with pytest.raises(ExplainedError, match=str(tmp_path / "none")):
        jaxtrain.load(tmp_path / "none")
    with pytest.raises(ExplainedError, match=r"mesh\.tensor=7 does not divide"):
        jaxtrain.load(folder, MeshConfig(fsdp=1, tensor=7))
