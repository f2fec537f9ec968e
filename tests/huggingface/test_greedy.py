"""Greedy answers of every family: the tokens of `transformers.generate`, in a ragged batch, on one device and on meshes."""

from __future__ import annotations

from pathlib import Path

import pytest

import jaxtrain
from jaxtrain.config import MeshConfig
from tests.huggingface import greedy, tiny
from tests.huggingface.test_oracle import CASES, MESHES


def answers(family: str, folder: Path, mesh: str) -> list[list[int]]:
    greedy.make_folder(folder / "in", family)
    model = jaxtrain.load(folder / "in", MeshConfig(**{"fsdp": 1, **MESHES[mesh]}))
    return model.generate(tiny.prompts(), tiny.NEW_TOKENS, slots=2)


@pytest.mark.parametrize("family", ["phi3"])
def test_answers(family: str, tmp_path: Path):
    """Answers outgrow LongRoPE's short factors, in a place that another prompt had before."""
    assert answers(family, tmp_path, "one device") == greedy.load(family)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mesh"), CASES)
def test_answers_on_every_mesh(family: str, mesh: str, tmp_path: Path):
    assert answers(family, tmp_path, mesh) == greedy.load(family)[0]
