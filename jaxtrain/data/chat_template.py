"""Chat templates of HuggingFace folders: a conversation as the text that the model was trained on.

A template is a program in Jinja that came with the weights, so it runs in Jinja's sandbox: it can change nothing and reaches no
attribute that begins with an underscore.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.errors import ExplainedError

Message = Mapping[str, Any]
"""role (system, user, assistant or tool) and content, a text; also what the template of a model knows, such as tool_calls."""

TODAY = datetime.datetime(2024, 7, 26)
"""What `strftime_now` gives while training, as Llama's templates do by default: batches must not depend on the day."""


class ChatTemplate:
    """A chat template with the special tokens that it names."""

    def __init__(self, source: str, tokens: dict[str, str], where: str, now: datetime.datetime | None = None):
        """Compile a template.

        Args:
          source: in Jinja.
          tokens: bos_token, eos_token and others.
          where: the file, for messages.
          now: the time that the template is told; None: that of each rendering.

        Raises:
          ExplainedError: the template is not Jinja.
        """
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        mark = secrets.token_hex(16)
        self._marks = f"<{mark}>", f"</{mark}>"
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_blocks()]
        )
        environment.extend(generation_marks=self._marks)
        # Without the HTML escapes of Jinja's own filter, with the arguments that transformers gives it.
        environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: (now or _now()).strftime(form)}
        self.source, self.tokens, self.where = source, tokens, where
        self.marks_answers = bool(re.search(r"\{%-?\s*generation\s*-?%\}", source))
        """Whether the template says by {% generation %} which text is the model's."""
        self.dated = "strftime_now" in source
        self.fingerprint = hashlib.sha256(json.dumps([source, tokens]).encode()).hexdigest()[:32]
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ExplainedError(f"{where}: the chat template is not Jinja ({error})") from error

    def render(self, messages: Sequence[Message], asks: bool = True, tools: Any = None) -> str:
        """Return the text of a conversation; where it `asks`, up to where the model's answer begins.

        Raises:
          ExplainedError: the template refuses the conversation, fails, or asks for what the sandbox forbids.
        """
        return self.render_spans(messages, asks, tools)[0]

    def render_spans(
        self, messages: Sequence[Message], asks: bool = False, tools: Any = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation, and (start, end) of each of its {% generation %} blocks.

        Raises:
          ExplainedError: like `render`.
        """
        try:
            text = self._template.render(messages=list(messages), add_generation_prompt=asks, tools=tools, **self.tokens)
        except ExplainedError as error:
            raise ExplainedError(f"{self.where}: the chat template refuses the conversation: {error}") from error
        except Exception as error:  # a template is a program: it raises whatever it likes
            raise ExplainedError(f"{self.where}: the chat template fails: {type(error).__name__}: {error}") from error
        return _without_marks(text, self._marks) if self.marks_answers else (text, [])


@functools.cache
def _generation_blocks() -> Any:
    """Return the Jinja extension that puts the environment's two marks around what a {% generation %} block renders."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class GenerationBlocks(Extension):
        tags = {"generation"}  # noqa: RUF012  # as in Jinja's own

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: Any) -> str:
            return caller().join(self.environment.generation_marks)  # type: ignore[attr-defined]

    return GenerationBlocks


def _without_marks(text: str, marks: tuple[str, str]) -> tuple[str, list[tuple[int, int]]]:
    """Return the text without its marks, and where they were, as (start, end)."""
    pieces, spans, length, start = [], [], 0, 0
    for piece in re.split(f"({marks[0]}|{marks[1]})", text):
        if piece == marks[0]:
            start = length
        elif piece == marks[1]:
            spans.append((start, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), spans


def read_chat_template(path: str | Path, beside: Path | None = None, now: datetime.datetime | None = None) -> ChatTemplate:
    """Return the template of a .jinja file, or of a folder: chat_template.jinja, or chat_template of tokenizer_config.json.

    Args:
      beside: folder whose tokenizer_config.json names the special tokens; None: the template's own.
      now: see `ChatTemplate`.

    Raises:
      ExplainedError: the folder has none, or it cannot be read.
    """
    path = Path(path)
    own_file = path / "chat_template.jinja" if path.is_dir() else path
    settings_file = path / "tokenizer_config.json" if path.is_dir() else path.with_name("tokenizer_config.json")
    named_by = settings_file if beside is None else beside / settings_file.name
    try:
        settings, names = _json_object(settings_file), _json_object(named_by)
        source = own_file.read_text(encoding="utf-8") if own_file.is_file() else settings.get("chat_template")
    except (OSError, ValueError, AttributeError) as error:
        raise ExplainedError(f"{path}: its chat template cannot be read ({error})") from error
    if isinstance(source, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default")
    if not isinstance(source, str):
        raise ExplainedError(
            f"{path} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): its model was "
            "not trained on conversations; give texts instead of messages"
        )
    tokens = {name: _text_of(value) for name, value in names.items() if name.endswith("_token") and value}
    return ChatTemplate(source, tokens, str(own_file if own_file.is_file() else settings_file), now)


def _json_object(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _text_of(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _refuse(message: str) -> None:
    raise ExplainedError(message)


def _now() -> datetime.datetime:
    return datetime.datetime.now()
