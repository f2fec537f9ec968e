"""Tasks against plain statements of their measures, on a model whose log-probabilities are a table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxtrain.errors import DataError
from jaxtrain.evaluation.likelihoods import Asked, asked, likelihoods, windows
from jaxtrain.evaluation.measures import Settings, evaluate
from jaxtrain.evaluation.tasks import read_task

VOCABULARY = [*map(chr, range(32, 127)), " a", "ab", "b c"]


class Tokenizer:
    """Greedy longest match over a few tokens, some of which reach over the border of words."""

    separator = 94

    def encode(self, text: str) -> list[int]:
        ids = []
        while text:
            token = max((t for t in VOCABULARY if text.startswith(t)), key=len)
            ids.append(VOCABULARY.index(token))
            text = text[len(token) :]
        return ids


class Bigrams:
    """log p of a token depends on the one before it."""

    def __init__(self, begins: tuple[int, ...] = ()):
        table = np.random.default_rng(0).normal(size=(len(VOCABULARY), len(VOCABULARY)))
        self.table = (table - np.log(np.exp(table).sum(1, keepdims=True))).astype(np.float32)
        self.tokenizer, self.begins, self.calls = Tokenizer(), begins, []
        sizes = {"model": SimpleNamespace(padded_vocab_size=2**20), "mesh": SimpleNamespace(batch_shards=2)}
        self.config = SimpleNamespace(**sizes)

    def score(self, tokens, *, details: bool):
        assert details
        self.calls.append(tokens.shape)
        log_p = self.table[tokens[:, :-1], tokens[:, 1:]]
        return log_p, self.table[tokens[:, :-1]].argmax(-1) == tokens[:, 1:]

    def by_hand(self, context: str, text: str) -> float:
        """log p of the text after the context: of all but the tokens that the context alone has."""
        before = self.tokenizer.encode(context.rstrip())
        whole = self.tokenizer.encode(context + text)
        ids = [*(self.begins or () if before else self.begins or (94,)), *whole]
        first = len(ids) - len(whole) + len(before)
        return float(sum(self.table[ids[i - 1], ids[i]] for i in range(max(first, 1), len(ids))))


def task_of(tmp_path: Path, *rows: dict):
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return read_task(str(tmp_path / "some.jsonl"))


def test_choices(tmp_path: Path):
    model, rng = Bigrams(), np.random.default_rng(1)
    rows = [{"context": f"q{i}:", "choices": [" a", " bb", " long c"], "answer": int(rng.integers(3))} for i in range(40)]
    found = evaluate(model, task_of(tmp_path, *rows))
    log_ps = np.array([[model.by_hand(row["context"], choice) for choice in row["choices"]] for row in rows])
    right = np.array([row["answer"] for row in rows])
    plain = (log_ps.argmax(1) == right).mean()
    assert found.measures["accuracy"] == plain
    assert found.errors["accuracy"] == pytest.approx(math.sqrt(plain * (1 - plain) / 39))
    sizes = np.array([2, 3, 7])
    assert found.measures["accuracy_per_byte"] == ((log_ps / sizes).argmax(1) == right).mean()
    of_right = log_ps[range(40), right].sum() / math.log(2)
    assert found.measures["bits_per_byte"] == pytest.approx(-of_right / sizes[right].sum(), rel=1e-5)
    assert [row["chosen"] for row in found.rows] == [rows[0]["choices"][i] for i in log_ps.argmax(1)]


@pytest.mark.parametrize("begins", [(), (3,)])
def test_continuations_and_texts(tmp_path: Path, begins: tuple[int, ...]):
    model, pairs = Bigrams(begins), [("ab", "c"), ("", "ab c"), ("x ", "y"), ("x a", "b c")]
    found = evaluate(model, task_of(tmp_path, *({"context": c, "continuation": t} for c, t in pairs)))
    expected = [model.by_hand(context, text) for context, text in pairs]
    np.testing.assert_allclose([row["log_probability"] for row in found.rows], expected, rtol=1e-5)
    text = "ab c" * 30
    for length in (2, 7, 64, 1000):
        whole = evaluate(model, task_of(tmp_path, {"text": text}), Settings(length))
        expected = model.by_hand("", text)
        assert whole.rows[0]["log_probability"] == pytest.approx(expected, rel=1e-5)
        assert whole.measures["bits_per_byte"] == pytest.approx(-expected / math.log(2) / 120, rel=1e-5)
        assert whole.measures["nats_per_token"] == pytest.approx(-expected / len(Tokenizer().encode(text)), rel=1e-5)


def test_a_token_over_the_border_is_the_continuations():
    assert asked(Bigrams(), "x", " ab") == asked(Bigrams(), "x ", "ab") == Asked([88], [95, 66])


@pytest.mark.parametrize("length", [2, 3, 8, 50])
def test_windows_ask_for_every_token_once_after_as_many_as_fit(length: int):
    ids = list(range(1, 30))
    parts = windows([0], ids, length)
    assert [i for part in parts for i in part.ids] == ids
    done = 0
    for part in parts:
        assert len(part.before) + len(part.ids) == min(length, 1 + done + len(part.ids))
        assert [*part.before, *part.ids] == [0, *ids][1 + done + len(part.ids) - len([*part.before, *part.ids]) :][:length]
        done += len(part.ids)


def test_batches_hold_like_lengths_and_long_contexts_lose_their_beginning():
    model = Bigrams()
    requests = [Asked([i % 90 for i in range(n)], [5, 6]) for n in (1, 40, 3, 300, 2)]
    found = likelihoods(model, requests, 100)
    assert [shape[1] for shape in model.calls] == sorted((shape[1] for shape in model.calls), reverse=True)
    assert max(shape[1] for shape in model.calls) == 100
    alone = [likelihoods(Bigrams(), [request], 100)[0] for request in requests]
    assert found == alone
    assert all(one.tokens == 2 for one in found)
    assert likelihoods(model, [Asked([1], list(range(90)))], 10)[0].tokens == 9


def test_answers(tmp_path: Path):
    model = SimpleNamespace(generate=lambda prompts, *_, **__: [" 4 " if "2+2" in prompt else "no" for prompt in prompts])
    rows = [
        {"prompt": "2+2=", "answer": "4"},
        {"question": "3+3=", "answer": ["6", "six"]},
        {"prompt": "2+2 is", "answer": [" 4"]},
    ]
    found = evaluate(model, task_of(tmp_path, *rows))
    assert found.measures == {"exact_match": 2 / 3}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["{"], "line 1 is not JSON"),
        (["[]"], "a row is a JSON object, but this is a list"),
        (['{"context": "a"}'], "this one has the fields context"),
        (['{"context": "a", "choices": ["b", "c"], "answer": 2}'], "answer is 2; of 2 choices it is 0 to 1, A to B"),
        (['{"context": "a", "choices": ["b", "c"], "answer": "C"}'], "answer is 2; of 2 choices"),
        (['{"context": "a", "choices": [], "answer": 0}'], "choices must be of texts that are not empty"),
        (['{"context": "a", "continuation": ""}'], "continuation must be of texts that are not empty"),
        (['{"context": 1, "continuation": "b"}'], "the context is a int"),
        (['{"text": "a"}', '{"context": "a", "continuation": "b"}'], "line 1 is of text, but .*line 2 is of likelihood"),
        ([""], "the task has no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[str], words: str):
    (tmp_path / "bad.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError, match=words):
        read_task(str(tmp_path / "bad.jsonl"))


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="none.jsonl: the task cannot be read"):
        read_task(str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(("answer", "right"), [(1, 1), ("1", 1), ("B", 1), ("yes", 0)])
def test_the_right_choice_in_every_form(tmp_path: Path, answer: int | str, right: int):
    assert task_of(tmp_path, {"question": "?", "choices": ["yes", "no"], "answer": answer}).rows[0].right == right
