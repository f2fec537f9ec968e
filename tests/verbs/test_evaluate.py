"""`jaxtrain evaluate`: measures of a model that is really there, as tables, JSON and rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import jaxtrain
from jaxtrain.errors import ExplainedError
from jaxtrain.inference.model import Model
from jaxtrain.verbs import evaluate
from tests.verbs.test_generate import folder  # noqa: F401, a fixture

CHOICES = [{"context": "one two", "choices": [" three", " four five", "!"], "answer": n % 3} for n in range(3)]
TEXTS = [{"text": "a text of some length, longer than a window"}]
ANSWERS = [{"prompt": "one", "answer": "never this"}]


@pytest.fixture
def tasks(tmp_path: Path) -> list[str]:
    """The flags of three tasks."""
    for name, rows in (("choices", CHOICES), ("texts", TEXTS), ("answers", ANSWERS)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [f"--tasks={tmp_path / name}.jsonl" for name in ("choices", "texts", "answers")]


def by_hand(model: Model, context: str, text: str) -> float:
    """log p of the text from the logits of all of it; each character is a token here."""
    ids = [*model.begins, *map(int, model.tokenizer.encode(context + text))]
    logits = model.logits([ids])[0].astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(log_p[i - 1, ids[i]] for i in range(len(ids) - len(text), len(ids)))


def test_measures_are_those_of_the_logits(folder: Path, tasks, tmp_path: Path, capsys: pytest.CaptureFixture[str]):  # noqa: F811
    rows = tmp_path / "rows.jsonl"
    assert evaluate.main([str(folder), *tasks, "--length=20", "--max_new_tokens=4", "--json", f"--output={rows}"]) == 0
    found = {one["task"]: one for one in map(json.loads, capsys.readouterr().out.splitlines())}
    model = jaxtrain.load(folder)
    log_ps = [by_hand(model, "one two", choice) for choice in CHOICES[0]["choices"]]
    assert found["choices"]["accuracy"] == pytest.approx(1 / 3)  # each choice is right once
    assert found["answers"]["exact_match"] == 0
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    np.testing.assert_allclose(written[0]["log_probabilities"], log_ps, rtol=1e-5)
    assert written[0]["chosen"] == CHOICES[0]["choices"][int(np.argmax(log_ps))]
    assert found["texts"]["nats_per_token"] == pytest.approx(-written[3]["log_probability"] / len(TEXTS[0]["text"]))

    assert evaluate.main([str(folder), tasks[0], "--limit=2", "--mesh.fsdp=2", "--mesh.tensor=2", f"--output={rows}"]) == 0
    on_mesh = [json.loads(line) for line in rows.read_text().splitlines()]
    np.testing.assert_allclose(on_mesh[0]["log_probabilities"], log_ps, rtol=1e-5)
    assert len(on_mesh) == 2
    assert "accuracy per byte" in capsys.readouterr().out


def test_what_cannot_be_done_is_told(folder: Path, tasks, tmp_path: Path):  # noqa: F811
    for flags, words in (
        ([], "no task"),
        ([*tasks, "--length=1"], "--length is at least 2"),
        ([*tasks, "--train.steps=3"], "--train.steps"),
        (["--tasks=/nowhere.jsonl"], "cannot be read"),
        ([tasks[1], f"--output={tmp_path}/no/file"], "cannot be written"),
    ):
        with pytest.raises(ExplainedError, match=words):
            evaluate.main([str(folder), *flags])
