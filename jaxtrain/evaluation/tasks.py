"""Tasks: files of JSON lines, each row a question that log-probabilities or an answer decide, or a text.

| kind | fields | what is measured |
| --- | --- | --- |
| choice | context (or question), choices, answer (number from 0, letter from A, or the choice itself) | the likeliest choice |
| likelihood | context, continuation | its log-probability; whether it is what greedy decoding gives |
| answer | prompt (or question), answer (a text, or several that are right) | whether the greedy answer is one of them |
| text | text | log-probability of all of it |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxtrain.errors import DataError
from jaxtrain.files import user_path

Kind = Literal["choice", "likelihood", "answer", "text"]
FIELDS = (
    "context and choices and answer; context and continuation; prompt and answer; or text",
    "question may stand for context or prompt",
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class TaskRow:
    """One row: what stands before, and what may follow."""

    context: str
    options: tuple[str, ...]
    """choice: the choices. likelihood: the continuation. answer: the answers that are right. text: the text."""
    right: int = 0
    """choice: which one is right, from 0."""


@dataclass(frozen=True)
class Task:
    """Rows of one kind."""

    name: str
    kind: Kind
    rows: tuple[TaskRow, ...]


def read_task(path: str) -> Task:
    """Return the task of a file; its name is the file's.

    Raises:
      DataError: it cannot be read, a row is none of these, or rows are of several kinds; with the line.
    """
    file = user_path(path)
    rows: list[TaskRow] = []
    kinds: dict[Kind, str] = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the task cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}: line {number}"
            kind, row = _row(line, where)
            kinds.setdefault(kind, where)
            rows.append(row)
    if len(kinds) > 1:
        found = ", but ".join(f"{where} is of {kind}" for kind, where in kinds.items())
        raise DataError(f"a task has rows of one kind: {found}")
    if not rows:
        raise DataError(f"{path}: the task has no rows")
    return Task(Path(file).stem, next(iter(kinds)), tuple(rows))


def _row(line: str, where: str) -> tuple[Kind, TaskRow]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise DataError(f"{where}: a row is a JSON object, but this is a {type(fields).__name__}")
    context = fields.get("context", fields.get("question", fields.get("prompt", "")))
    if not isinstance(context, str):
        raise DataError(f"{where}: the context is a {type(context).__name__}, not a text")
    if "choices" in fields:
        choices = _texts(fields["choices"], "choices", where)
        return "choice", TaskRow(context, choices, _right(fields, choices, where))
    if "continuation" in fields:
        return "likelihood", TaskRow(context, _texts([fields["continuation"]], "continuation", where))
    if "answer" in fields and context:
        answers = fields["answer"] if isinstance(fields["answer"], list) else [fields["answer"]]
        return "answer", TaskRow(context, _texts(answers, "answer", where))
    if "text" in fields:
        return "text", TaskRow("", _texts([fields["text"]], "text", where))
    found = ", ".join(map(str, fields)) or "none"
    raise DataError(f"{where}: a row has {FIELDS[0]} ({FIELDS[1]}); this one has the fields {found}")


def _texts(value: Any, name: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        raise DataError(f"{where}: {name} must be of texts that are not empty")
    return tuple(value)


def _right(fields: Mapping[str, Any], choices: tuple[str, ...], where: str) -> int:
    answer = fields.get("answer", fields.get("label"))
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, str) and len(answer) == 1 and answer in LETTERS:
        answer = LETTERS.index(answer)
    if isinstance(answer, str) and answer.isdigit():
        answer = int(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        known = f"0 to {len(choices) - 1}, {LETTERS[0]} to {LETTERS[len(choices) - 1]}" if len(choices) <= 26 else "a number"
        raise DataError(f"{where}: answer is {answer!r}; of {len(choices)} choices it is {known}, or the text of one")
    return answer
