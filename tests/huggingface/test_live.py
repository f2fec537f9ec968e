"""What `transformers` makes of our exports, and its greedy answers beside ours, live: needs the extra `hf`; skipped without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import jaxtrain
from jaxtrain.huggingface.exporting import export
from jaxtrain.huggingface.importing import import_folder
from tests.huggingface import goldens, greedy, tiny
from tests.huggingface.test_folders import make

pytestmark = pytest.mark.slow


def error_of_export(family: str, folder: Path) -> float:
    """Largest difference of the logits that `transformers` computes from our export, and from what it wrote itself."""
    pytest.importorskip("transformers")
    make(folder / "in", family)
    import_folder(str(folder / "in"), str(folder / "run"), "float32")
    export(str(folder / "run"), str(folder / "out"))
    (folder / "out" / "tokenizer.json").unlink()  # holds none
    seen = tiny.batch()["segments"] > 0
    return float(np.abs(goldens.compute(folder / "out")[0] - goldens.load(family)["logits"])[seen].max())


def compare_answers(family: str, folder: Path) -> tuple[list[int], list[float]]:
    """Tokens of each answer before the first that differs from live `transformers`, and its smallest margins."""
    pytest.importorskip("transformers")
    greedy.make_folder(folder / "in", family)
    ours = jaxtrain.load(folder / "in").generate(tiny.prompts(), tiny.NEW_TOKENS)
    equal, margins = [], []
    for prompt, answer in zip(tiny.prompts(), ours, strict=True):
        theirs, distance = greedy.by_transformers(folder / "in", [prompt])
        equal.append(int((theirs[0] == answer).cumprod().sum()))
        margins.append(float(distance.min()))
    return equal, margins


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_transformers_reads_our_export(family: str, tmp_path: Path):
    assert error_of_export(family, tmp_path) < 1e-6


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_answers_are_those_of_transformers(family: str, tmp_path: Path):
    equal, margins = compare_answers(family, tmp_path)
    assert equal == [tiny.NEW_TOKENS] * len(equal), margins
