"""Chat templates of HuggingFace folders: a conversation as the text that the model was trained on.

A template is a program in Jinja that came with the weights, so it runs in Jinja's sandbox: it can change nothing and reaches no
attribute that begins with an underscore.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtrain.errors import ExplainedError

Message = dict[str, str]
"""role (system, user or assistant) and content."""


class ChatTemplate:
    """A chat template with the special tokens that it names."""

    def __init__(self, source: str, tokens: dict[str, str], where: str):
        """Compile a template.

        Args:
          source: in Jinja.
          tokens: bos_token, eos_token and others.
          where: the file, for messages.

        Raises:
          ExplainedError: the template is not Jinja.
        """
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        self._tokens, self._where = tokens, where
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ExplainedError(f"{where}: the chat template is not Jinja ({error})") from error

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text of a conversation, up to where the model's answer begins.

        Raises:
          ExplainedError: the template refuses the conversation, fails, or asks for what the sandbox forbids.
        """
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, tools=None, **self._tokens)
        except ExplainedError as error:
            raise ExplainedError(f"{self._where}: the chat template refuses the conversation: {error}") from error
        except Exception as error:  # a template is a program: it raises whatever it likes
            raise ExplainedError(f"{self._where}: the chat template fails: {type(error).__name__}: {error}") from error


def read_chat_template(folder: str | Path) -> ChatTemplate:
    """Return the template of a folder: chat_template.jinja, or chat_template of tokenizer_config.json.

    Raises:
      ExplainedError: the folder has none, or it cannot be read.
    """
    folder = Path(folder)
    settings_file, own_file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    try:
        settings: Any = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
        source = own_file.read_text(encoding="utf-8") if own_file.is_file() else settings.get("chat_template")
    except (OSError, ValueError, AttributeError) as error:
        raise ExplainedError(f"{folder}: its chat template cannot be read ({error})") from error
    if isinstance(source, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default")
    if not isinstance(source, str):
        raise ExplainedError(
            f"{folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): its model was "
            "not trained on conversations; give texts to continue, without --chat and without messages"
        )
    tokens = {name: _text_of(value) for name, value in settings.items() if name.endswith("_token") and value}
    return ChatTemplate(source, tokens, str(own_file if own_file.is_file() else settings_file))


def _text_of(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise ExplainedError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
