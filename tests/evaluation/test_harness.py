"""lm-eval through our model against lm-eval's own backend for transformers, on the same weights; where both are installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import jaxtrain
from tests.verbs.test_generate import folder  # noqa: F401, a fixture

lm_eval = pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")
LENGTH = 48


@pytest.fixture(scope="module")
def both(folder: Path):  # noqa: F811
    """(ours, that of transformers)."""
    from lm_eval.models.huggingface import HFLM

    from jaxtrain.evaluation.harness import Harness

    file, special = str(folder / "tokenizer.json"), {"eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file, **special)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=LENGTH, batch_size=3, device="cpu")
    return Harness(jaxtrain.load(folder), LENGTH, prefix=theirs.prefix_token_id, max_new_tokens=5), theirs


def asked(kind: str, *arguments: tuple):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, argument, i) for i, argument in enumerate(arguments)]


def test_likelihoods_and_answers_are_those_of_transformers(both):
    ours, theirs = both
    pairs = [("one two", " three"), ("", "four"), ("ends in a space ", "x"), ("a" * 80, "b" * 20), ("a", "b" * LENGTH)]
    requests = asked("loglikelihood", *pairs)
    found, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    np.testing.assert_allclose([log_p for log_p, _ in found], [log_p for log_p, _ in expected], rtol=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]

    requests = asked("loglikelihood_rolling", ("short",), ("x" * LENGTH,), ("a longer text " * 20,))
    np.testing.assert_allclose(ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests), rtol=1e-5)

    settings = {"until": ["\n", "ab"], "max_gen_toks": 9, "do_sample": False}
    requests = asked("generate_until", ("one two", settings), ("three", settings), ("x" * 90, settings | {"max_gen_toks": 4}))
    assert ours.generate_until(requests) == theirs.generate_until(requests)


def test_a_task_of_lm_eval_gives_the_same_table(both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"question": f"{n} and {n % 5}?", "choices": [" yes", " no", " perhaps so"], "answer": n % 3} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "local", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    settings = {"tasks": [task], "bootstrap_iters": 0, "log_samples": False}
    settings = {"tasks": [task], "bootstrap_iters": 0, "log_samples": False}
    tables = [lm_eval.simple_evaluate(model=model, **settings)["results"]["local"] for model in both]
    assert tables[0] == tables[1]
    assert 0 <= tables[0]["acc,none"] <= 1
