"""What a model reaches on a task: accuracies, bits a byte, exact matches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtrain.evaluation.likelihoods import Likelihood, Scorer, asked, encode, likelihoods, windows
from jaxtrain.evaluation.tasks import Task, TaskRow

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Settings:
    """Limits of the sequences and answers of tasks."""

    length: int = 2048
    """Most tokens of a sequence: longer contexts lose their beginning, longer texts are cut into windows."""
    max_new_tokens: int = 64
    """Most tokens of an answer."""
    stop: tuple[str, ...] = ("\n",)
    """Texts that end an answer."""


@dataclass(frozen=True)
class TaskResult:
    """A task's measures, and those of its rows."""

    task: Task
    measures: Mapping[str, float]
    errors: Mapping[str, float]
    """Standard error of the mean of an accuracy, sqrt(p (1 - p) / (n - 1))."""
    rows: Sequence[Mapping[str, Any]]


def evaluate(scorer: Any, task: Task, settings: Settings = Settings(), advance: Advance = lambda count: None) -> TaskResult:  # noqa: B008
    """Return what the model reaches on a task.

    | measure | of | meaning |
    | --- | --- | --- |
    | accuracy | choice | the choice with the largest log p is right |
    | accuracy_per_byte | choice | the same with log p / bytes of the choice, which does not favour short ones |
    | accuracy | likelihood | the continuation is what greedy decoding gives |
    | bits_per_byte | choice, likelihood, text | -log2 p of the right choice, continuation or text, over its bytes in UTF-8 |
    | nats_per_token | likelihood, text | -ln p over tokens, which depends on the tokenizer |
    | exact_match | answer | the greedy answer, without spaces around it, is one of the right ones |

    Args:
      scorer: a `Model`, of `jaxtrain.load` or `Trainer.model()`.
      advance: called with the number of rows that are done, or choices of them.
    """
    measure = {"choice": _choices, "likelihood": _continuations, "text": _texts, "answer": _answers}[task.kind]
    rows = measure(scorer, task.rows, settings, advance)
    return TaskResult(task, *_means(rows), rows)


def _means(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the means of what is true or false of rows, and log-probabilities over bytes and tokens; and standard errors."""
    count = len(rows)
    found = {name: sum(row[name] for row in rows) / count for name, value in rows[0].items() if isinstance(value, bool)}
    errors = {name: math.sqrt(p * (1 - p) / max(count - 1, 1)) for name, p in found.items()}
    for name, unit, scale in (("bits_per_byte", "bytes", math.log(2)), ("nats_per_token", "tokens", 1.0)):
        if unit in rows[0]:
            found[name] = -sum(row["log_probability"] for row in rows) / scale / sum(row[unit] for row in rows)
    return found, errors


def size(text: str) -> int:
    """Return the bytes of a text in UTF-8."""
    return len(text.encode("utf-8", "surrogatepass"))


def _choices(scorer: Scorer, rows: Sequence[TaskRow], settings: Settings, advance: Advance) -> list[dict[str, Any]]:
    requests = [asked(scorer, row.context, option) for row in rows for option in row.options]
    scored, results = iter(likelihoods(scorer, requests, settings.length, advance)), []
    for row in rows:
        log_ps = [next(scored).log_probability for _ in row.options]
        per_byte = [log_p / size(option) for log_p, option in zip(log_ps, row.options, strict=True)]
        best, best_per_byte = log_ps.index(max(log_ps)), per_byte.index(max(per_byte))
        results.append(
            {
                "context": row.context,
                "chosen": row.options[best],
                "right": row.options[row.right],
                "accuracy": best == row.right,
                "accuracy_per_byte": best_per_byte == row.right,
                "log_probabilities": log_ps,
                "log_probability": log_ps[row.right],
                "bytes": size(row.options[row.right]),
            }
        )
    return results


def _continuations(scorer: Scorer, rows: Sequence[TaskRow], settings: Settings, advance: Advance) -> list[dict[str, Any]]:
    requests = [asked(scorer, row.context, row.options[0]) for row in rows]
    return [
        {"context": row.context, "continuation": row.options[0], "accuracy": one.is_greedy, **_of(one, row.options[0])}
        for row, one in zip(rows, likelihoods(scorer, requests, settings.length, advance), strict=True)
    ]


def _texts(scorer: Scorer, rows: Sequence[TaskRow], settings: Settings, advance: Advance) -> list[dict[str, Any]]:
    parts = [text_windows(scorer, row.options[0], settings.length) for row in rows]
    scored, results = iter(likelihoods(scorer, [one for of_row in parts for one in of_row], settings.length)), []
    for row, of_row in zip(rows, parts, strict=True):
        advance(1)
        own = [next(scored) for _ in of_row]
        whole = Likelihood(sum(one.log_probability for one in own), True, sum(one.tokens for one in own))
        results.append({"text": row.options[0], **_of(whole, row.options[0])})
    return results


def text_windows(scorer: Scorer, text: str, length: int) -> list[Any]:
    """Return the parts of a text whose log-probabilities add up to its own."""
    return windows(asked(scorer, "", text).before, encode(scorer, text), length)


def _of(one: Likelihood, text: str) -> dict[str, Any]:
    return {"log_probability": one.log_probability, "bytes": size(text), "tokens": one.tokens}


def _answers(model: Any, rows: Sequence[TaskRow], settings: Settings, advance: Advance) -> list[dict[str, Any]]:
    answers: list[str] = model.generate(
        [row.context for row in rows],
        settings.max_new_tokens,
        stop=settings.stop,
        on_done=lambda *_: advance(1),
    )
    return [
        {"context": row.context, "answer": made, "right": list(row.options), "exact_match": made.strip() in _stripped(row)}
        for row, made in zip(rows, answers, strict=True)
    ]


def _stripped(row: TaskRow) -> set[str]:
    return {option.strip() for option in row.options}
