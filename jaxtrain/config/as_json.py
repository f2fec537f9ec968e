"""A config as JSON, as in run_dir/config.json and every checkpoint, and back."""

from __future__ import annotations

import dataclasses
import json
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from jaxtrain.config.fields import Config
from jaxtrain.errors import ConfigError, nearest

PARTS = "parts"
"""The field of `Config` and `ModelConfig` that holds plugged-in parts."""
NO_SETTINGS = (PARTS, "adapters")
"""Fields of `Config` and `ModelConfig` that no flag and no JSON holds: plugged-in parts, and the model's copy of `lora`."""


def to_plain(part: Any) -> Any:
    """Return a config, or a section of one, as dicts, without the plugged-in parts."""
    if dataclasses.is_dataclass(part):
        names = [field.name for field in dataclasses.fields(part) if field.name not in NO_SETTINGS]
        return {name: to_plain(getattr(part, name)) for name in names}
    return tuple(map(to_plain, part)) if isinstance(part, tuple) else part


def to_json(config: Config) -> str:
    """Return the fully resolved config as JSON, as in run_dir/config.json and every checkpoint."""
    plugged_by = {PARTS: config.parts.file} if config.parts.file else {}  # `loading.written_config` plugs them in again
    return json.dumps(to_plain(config) | plugged_by, indent=2)


def from_json(text: str, like: Config | None = None) -> Config:
    """Return the config that `to_json` wrote. It only builds dataclasses; `validate` checks the values.

    Args:
      like: a config of the same sections, which may be subclasses, and with the parts to plug in; None: `Config()`.

    Raises:
      ConfigError: the text is no such JSON; names the field.
    """
    try:
        return _from_plain(json.loads(text), Config, "config", like or Config())
    except (ValueError, RecursionError) as error:  # raised by json
        raise ConfigError([f"not the JSON of a config: {error}"]) from error


def _from_plain(value: Any, hint: Any, path: str, like: Any = None) -> Any:
    """Return a JSON value as a field's type: objects become dataclasses, lists tuples; other values are unchanged."""
    if get_origin(hint) is UnionType:  # X | None
        return None if value is None else _from_plain(value, get_args(hint)[0], path, like)
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_from_plain(item, get_args(hint)[0], f"{path}.{i}") for i, item in enumerate(value))
    if not (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
        return value
    if not isinstance(value, dict):
        raise ConfigError([f"{path}={value!r} is not an object of fields"])
    kind = type(like) if isinstance(like, hint) else hint
    hints = {name: of for name, of in get_type_hints(kind).items() if name not in NO_SETTINGS}
    unknown = [f"{path}.{name}: there is no such field; {nearest(name, hints)}" for name in value if name not in hints]
    if unknown:
        raise ConfigError(unknown)
    fields = {n: _from_plain(item, hints[n], f"{path}.{n}", getattr(like, n, None)) for n, item in value.items()}
    return kind(**fields, **({PARTS: getattr(like, PARTS)} if hasattr(like, PARTS) else {}))
