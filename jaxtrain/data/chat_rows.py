"""Rows of chat data: what each of them trains on, as its fields say."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from jaxtrain.data.chat_template import Message
from jaxtrain.data.compressed import HEAD_BYTES
from jaxtrain.data.documents import BadRows, broken_file, json_rows, open_parquet
from jaxtrain.data.file_hashes import reading
from jaxtrain.data.optional import require
from jaxtrain.data.store_path import SourcePath
from jaxtrain.errors import DataError

ROWS_AT_ONCE = 1024
LAYOUTS = (
    "messages (or conversations); prompt and completion (or instruction and output); chosen and rejected, texts with a prompt; "
    "or a prompt alone"
)
SPEAKERS = {"human": "user", "gpt": "assistant", "model": "assistant"}
"""Names of roles in rows of `from` and `value` (ShareGPT), where they are not the roles' own."""
ROLES = ("system", "user", "assistant", "tool")

Sort = Literal["samples", "pairs", "prompts"]
"""samples: with answers to learn. pairs: of a chosen and a rejected answer. prompts: for the model to answer."""


@dataclass(frozen=True)
class Conversation:
    """Messages, and for each whether its tokens carry loss. A conversation that `asks` ends where the model's answer begins."""

    messages: Sequence[Message]
    learned: Sequence[bool]
    tools: Any = None
    asks: bool = False


class Texts(NamedTuple):
    """A text and its continuation, which carries loss; a prompt has none."""

    prompt: str
    completion: str | None

    @property
    def text(self) -> str:
        return self.prompt + (self.completion or "")


@dataclass(frozen=True)
class ChatSample:
    """One row. `parts` are one, or the chosen and the rejected of a pair; `key` is what decides if the sample is held out."""

    where: str
    sort: Sort
    parts: tuple[Conversation | Texts, ...]
    key: str
    row: Mapping[str, Any]
    empty_answers: int = 0


class ChatRow(NamedTuple):
    """A row as read. `size` is its share of the file, in bytes."""

    where: str
    fields: Any
    size: int


def read_rows(path: SourcePath, bad_rows: BadRows) -> Iterator[ChatRow]:
    """Yield each row of a JSON Lines or Parquet file, known by its first bytes.

    A row that is no JSON is counted in `bad_rows`. Raises DataError with the place.
    """
    with reading(path):
        with path.open("rb") as file:
            is_parquet = file.read(HEAD_BYTES).startswith(b"PAR1")
        yield from _parquet_rows(path, bad_rows) if is_parquet else _json_rows(path, bad_rows)


def _json_rows(path: SourcePath, bad_rows: BadRows) -> Iterator[ChatRow]:
    for where, row, size in json_rows(path):
        bad_rows.rows += row is not None
        if isinstance(row, DataError):
            bad_rows.leave_out(row)
        elif row is not None:
            yield ChatRow(where, row, size)


def _parquet_rows(path: SourcePath, bad_rows: BadRows) -> Iterator[ChatRow]:
    arrow = require("pyarrow", "a Parquet file")
    try:
        with open_parquet(path) as file:
            number, size = 0, path.stat().st_size // max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    bad_rows.rows += 1
                    fields = {name: value for name, value in row.items() if value is not None}
                    yield ChatRow(f"{path}: row {number}", fields, size)
                    number += 1
    except arrow.ArrowException as error:
        raise broken_file(path, "Parquet", error) from error


def sample_of(row: Any, where: str) -> ChatSample:
    """Return what a row trains on. Raises DataError with the place where its fields are none of LAYOUTS, or of wrong types."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be a JSON object, but this is a {type(row).__name__}")
    given, row = row, _with_standard_fields(row)
    return replace(_sample_of(row, where), row=given)


def _with_standard_fields(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of ShareGPT (conversations) or Alpaca (instruction, input, output) as one of messages, or prompt and answer.

    A `system` text beside them is their first message.
    """
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    if "messages" not in row and isinstance(row.get("conversations"), list):
        name = "prompt" if "chosen" in row else "messages"
        row = {name: [*system, *row["conversations"]], **{key: row[key] for key in row if key != "conversations"}}
    elif "instruction" in row and "prompt" not in row and "messages" not in row:
        asked = [text for text in (row["instruction"], row.get("input")) if text]
        content = "\n\n".join(asked) if all(isinstance(text, str) for text in asked) else row["instruction"]
        answer = {"completion": row["output"]} if "output" in row else {}
        row = row | {"prompt": [*system, {"role": "user", "content": content}]} | answer
    # The answers of a pair may be single messages.
    return row | {name: [row[name]] for name in ("chosen", "rejected") if isinstance(row.get(name), dict)}


def _sample_of(row: dict[str, Any], where: str) -> ChatSample:
    tools = _tools(row.get("tools"), where)
    if "chosen" in row and "rejected" in row:
        return _pair(row, tools, where)
    if "messages" in row:
        messages, learned, empty = _messages(row["messages"], "messages", where)
        whole = Conversation(messages, learned, tools)
        return ChatSample(where, "samples", (whole,), _key(messages), row, empty)
    if "prompt" in row and "completion" in row:
        part, empty = _continued(row["prompt"], row["completion"], "completion", tools, where)
        return ChatSample(where, "samples", (part,), _key([row["prompt"], row["completion"]]), row, empty)
    if "prompt" in row:
        return _prompt(row, tools, where)
    found = ", ".join(map(str, row)) or "none"
    raise DataError(f"{where}: a row of chat data has {LAYOUTS}; this one has the fields {found}")


def _prompt(row: dict[str, Any], tools: Any, where: str) -> ChatSample:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        part = Texts(_text(prompt, "prompt", where), None)
    else:
        messages, learned, _ = _messages(prompt, "prompt", where)
        part = Conversation(messages, [False] * len(learned), tools, asks=True)
    return ChatSample(where, "prompts", (part,), _key(prompt), row)


def _pair(row: dict[str, Any], tools: Any, where: str) -> ChatSample:
    """Return a pair; loss lies on what follows the messages that chosen and rejected begin with in common."""
    names, prompt = ("chosen", "rejected"), row.get("prompt")
    if all(isinstance(row[name], list) for name in names) and not isinstance(prompt, list):
        prompt = []
    if prompt is None:
        raise DataError(f"{where}: chosen and rejected are texts without a prompt; give the prompt, or lists of messages")
    if isinstance(prompt, list) and prompt and isinstance(row["chosen"], list) and row["chosen"][: len(prompt)] == prompt:
        prompt = []
    found = [_continued(prompt, row[name], name, tools, where) for name in names]
    parts, empty = tuple(part for part, _ in found), sum(count for _, count in found)
    chosen, rejected = parts
    if isinstance(chosen, Texts) or isinstance(rejected, Texts):
        return ChatSample(where, "pairs", parts, _key(prompt), row, empty)
    most = min(len(chosen.messages), len(rejected.messages)) - 1
    pairs = zip(chosen.messages, rejected.messages, strict=False)
    common = next((i for i, (one, other) in enumerate(pairs) if one != other), most)
    common = min(common, most)
    both = tuple(
        Conversation(part.messages, [i >= common and learns for i, learns in enumerate(part.learned)], tools)
        for part in (chosen, rejected)
    )
    return ChatSample(where, "pairs", both, _key(chosen.messages[:common]), row, empty)


def _continued(prompt: Any, answer: Any, name: str, tools: Any, where: str) -> tuple[Conversation | Texts, int]:
    """Return a prompt with an answer, of which only the answer carries loss, and how many answers are empty."""
    if isinstance(prompt, str) and isinstance(answer, str):
        return Texts(_text(prompt, "prompt", where), _text(answer, name, where)), int(not answer)
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    after = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    first, learned, _ = _messages(before, "prompt", where) if before else ([], [], 0)
    rest, also_learned, empty = _messages(after, name, where)
    return Conversation([*first, *rest], [*[False] * len(learned), *also_learned], tools), empty


def _messages(value: Any, name: str, where: str) -> tuple[list[Message], list[bool], int]:
    """Return the messages, which of them carry loss, and how many of those would be empty."""
    if not isinstance(value, list) or not value:
        raise DataError(f'{where}: {name} is not a list of {{"role": "user", "content": "..."}}')
    found = [_message(message, f"{where}: {name}[{i}]") for i, message in enumerate(value)]
    wanted = [message["role"] == "assistant" and weight for message, weight in found]
    is_empty = [not any(message.get(field) for field in ("content", "tool_calls", "reasoning_content")) for message, _ in found]
    learned = [wants and not empty for wants, empty in zip(wanted, is_empty, strict=True)]
    return [message for message, _ in found], learned, sum(wanted) - sum(learned)


def _message(value: Any, where: str) -> tuple[Message, bool]:
    """Return a message and whether its weight is 1."""
    if isinstance(value, dict) and "role" not in value and {"from", "value"} <= set(value):
        value = {("content" if key == "value" else key): item for key, item in value.items() if key != "from"} | {
            "role": SPEAKERS.get(value["from"], value["from"])
        }
        if value["role"] not in ROLES:
            raise DataError(f"{where} is from {value['role']!r}: known are {', '.join((*SPEAKERS, *ROLES))}")
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise DataError(f'{where} is no message {{"role": "user", "content": "..."}}')
    message = {key: item for key, item in value.items() if item is not None and key != "weight"}  # Parquet fills with nulls
    content = message.get("content", "")
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        content = "".join(part["text"] for part in content)
    weight = 1 if value.get("weight") is None else value["weight"]
    if weight not in (0, 1):
        raise DataError(f"{where}: its weight is {weight!r}; a message is learned (1) or not (0)")
    return message | {"content": _text(content, "content", where)}, bool(weight)


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is a {type(value).__name__}, not a text")
    return value


def _tools(value: Any, where: str) -> Any:
    """Return the tools of a row, which Parquet files often hold as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"{where}: tools is not JSON ({error})") from error


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
