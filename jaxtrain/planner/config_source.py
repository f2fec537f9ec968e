"""Write a config as a short Python file: only the differences from the defaults."""

from __future__ import annotations

import dataclasses
from typing import Any

import jaxtrain.config
from jaxtrain.config import NO_SETTINGS, Config, to_json, to_plain
from jaxtrain.config.loading import load_config
from jaxtrain.config.names import default_of
from jaxtrain.errors import ExplainedError
from jaxtrain.files import user_path, write_output

WIDTH = 128


def config_source(config: Config, docstring: str) -> str:
    """Return the Python source of a file whose `get_config()` gives exactly `config`.

    Fields and whole sections with their defaults are left out. `docstring` says where the layout comes from.
    """
    used: set[str] = set()
    body = _expression(config, 4, len("    return "), used)
    names = ", ".join(sorted(used))
    line = f"from jaxtrain.config import {names}\n"
    if len(line) > WIDTH:
        line = "from jaxtrain.config import (\n" + "".join(f"    {name},\n" for name in sorted(used)) + ")\n"
    quoted = docstring.replace("\\", "\\\\").replace('"""', "'''")
    return f'"""{quoted}"""\n\n{line}\n\ndef get_config() -> Config:\n    return {body}\n'


def write_config(config: Config, path: str, docstring: str) -> None:
    """Write a config to a file, as Python (`config_source`) or JSON, and read it back to check that it is the same.

    Raises:
      ExplainedError: the file cannot be written.
    """
    file = user_path(path)
    if config.parts.file and not path.endswith(".json"):
        raise ExplainedError(
            f"--write={path}: the config has parts that {config.parts.file} plugs in, which no other Python file can hold; "
            "give a name that ends in .json, which names that file"
        )
    if file.suffix not in (".py", ".json"):
        raise ExplainedError(f"--write={path}: a config is a Python or JSON file; give a name that ends in .py or .json")
    write_output("--write", path, to_json(config) + "\n" if file.suffix == ".json" else config_source(config, docstring))
    assert to_plain(load_config(file)) == to_plain(config), f"{path} does not give the config that was written to it"


def _expression(value: Any, indent: int, column: int, used: set[str]) -> str:
    """Return the source of one value that starts at `column`; too wide ones are broken into lines, indented by `indent` and
    more.
    """
    if dataclasses.is_dataclass(value):
        name = type(value).__name__
        assert getattr(jaxtrain.config, name) is type(value)
        used.add(name)
        fields = [f for f in dataclasses.fields(value) if f.name not in NO_SETTINGS]
        given = [(f"{f.name}=", held) for f in fields if (held := getattr(value, f.name)) != default_of(f)]
        return _call(f"{name}(", given, ")", indent, column, used)
    if isinstance(value, tuple):
        return _call("(", [("", item) for item in value], ",)" if len(value) == 1 else ")", indent, column, used)
    if isinstance(value, str):
        return '"' + repr(value)[1:-1].replace('"', '\\"') + '"' if "'" not in value else repr(value)
    if type(value) in (int, float) and value % 1000 == 0 and 10_000 <= abs(value) < 1e15:
        return f"{value:_}"
    return repr(value)


def _call(opening: str, items: list[tuple[str, Any]], closing: str, indent: int, column: int, used: set[str]) -> str:
    """Return `opening items closing` on one line, or with one item per line."""
    flat = opening + ", ".join(key + _expression(item, 0, 0, used) for key, item in items) + closing
    if "\n" not in flat and column + len(flat) + 1 <= WIDTH:
        return flat
    inner = " " * (indent + 4)
    lines = [f"{inner}{key}{_expression(item, indent + 4, indent + 4 + len(key), used)},\n" for key, item in items]
    return f"{opening}\n{''.join(lines)}{' ' * indent}{closing.lstrip(',')}"
