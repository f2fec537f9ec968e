"""Prompts from a file or a stream: one a line, as plain text or as JSON objects."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from jaxtrain.errors import ExplainedError
from jaxtrain.files import user_path

Message = dict[str, str]
"""role (system, user or assistant) and content."""


class Prompt(NamedTuple):
    """A text to continue, or a conversation to answer."""

    text: str
    messages: tuple[Message, ...] = ()


def read_prompts(path: str) -> list[Prompt]:
    """Return the prompts of a file: JSON objects with `prompt`, `text` or `messages` where its name ends in .jsonl, else lines.

    Raises:
      ExplainedError: it cannot be read, holds no prompt, or a line of it is wrong.
    """
    try:
        lines = user_path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ExplainedError(f"--prompts={path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ExplainedError(f"--prompts={path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    return prompts_of_objects(lines, path) if path.endswith(".jsonl") else prompts_of_lines(lines, path)


def prompts_of_lines(lines: Iterable[str], where: str) -> list[Prompt]:
    """Return one prompt for each line that is not blank. Raises ExplainedError where there is none."""
    return _some([Prompt(line.rstrip("\r\n")) for line in lines if line.strip()], where)


def prompts_of_objects(lines: Iterable[str], where: str) -> list[Prompt]:
    """Return one prompt for each JSON object. Raises ExplainedError with the number of the first wrong line."""
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    return _some([_prompt_of(line, f"{where}, line {number}") for number, line in numbered], where)


def _some(prompts: list[Prompt], where: str) -> list[Prompt]:
    if not prompts:
        raise ExplainedError(f"{where}: holds no prompt; write one a line")
    return prompts


def _prompt_of(line: str, where: str) -> Prompt:
    try:
        found: Any = json.loads(line)
    except ValueError as error:
        raise ExplainedError(
            f"{where}: is not JSON ({error}); for plain text use a name that does not end in .jsonl"
        ) from error
    if not isinstance(found, dict):
        raise ExplainedError(f"{where}: is a JSON {type(found).__name__}, not an object with prompt, text or messages")
    names = [name for name in ("prompt", "text", "messages") if name in found]
    if len(names) != 1:
        raise ExplainedError(f"{where}: has {' and '.join(names) or 'none'} of prompt, text and messages; give one of them")
    value = found[names[0]]
    if names[0] == "messages":
        return Prompt("", _messages_of(value, where))
    if not isinstance(value, str) or not value:
        raise ExplainedError(f"{where}: {names[0]} is {json.dumps(value)[:60]}, not a text of at least one character")
    return Prompt(value)


def _messages_of(value: Any, where: str) -> tuple[Message, ...]:
    is_list = isinstance(value, list) and bool(value)
    if is_list and all(isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content")) for m in value):
        return tuple(value)
    raise ExplainedError(f'{where}: messages is not a list of {{"role": "user", "content": "..."}}')
