"""The command line: `--config=FILE`, and every field as a typed flag over it.

Flags are read by `config_fields.py`, all of them before anything is said, so that every wrong one is told at once; `tyro`
prints --help.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar, get_origin

from jaxtrain.config import Config
from jaxtrain.config_fields import NoSuchField, field_hint, hints_of, meant, nested, read_value, set_field
from jaxtrain.config_file import load_config
from jaxtrain.config_rules import value_problems
from jaxtrain.errors import ConfigError, ExplainedError

Flags = TypeVar("Flags")
HELP = {"-h", "--help"}
EXAMPLE = "e.g. --config=configs/quickstart.py"
OPTIONAL_PARTS = ("model.rope_scaling", "model.latent_attention", "model.moe")


@dataclasses.dataclass(frozen=True)
class NoFlags:
    """A verb without flags of its own."""


class Flag(NamedTuple):
    """A flag as it was written, and what it says."""

    written: str
    name: str
    """With underscores, without the dashes."""
    text: str | None
    """None for a bare `--name`."""


def parse_command_line(arguments: Sequence[str], description: str, prog: str) -> Config:
    """Reads `--config=FILE` and every field as a typed flag over it.

    Raises:
      ConfigError: lists every unknown or ill-typed flag with the nearest right one, and every value that cannot work.
    """
    return parse_with_flags(arguments, NoFlags, description, prog)[1]


def parse_with_flags(arguments: Sequence[str], flags: type[Flags], description: str, prog: str) -> tuple[Flags, Config]:
    """`parse_command_line` of a verb with flags of its own: the fields of a dataclass, listed first in --help.

    A bool is set by its bare name, `--json`. A tuple among the verb's own is added to by each further flag.
    """
    path, rest = _take_config(arguments)
    config = load_config(path) if path else Config()
    if HELP & set(arguments):
        _print_help(flags, config, description, prog)
    own, problems = flags(), []
    for flag in _flags_of(rest, flags):
        try:
            own, config = _apply(flag, own, config)
        except NoSuchField as error:
            problems.append(f"{flag.written}: {error}")
        except ExplainedError as error:
            value = "" if flag.text is None else f"={flag.text}"
            problems.append(f"--{flag.name}{value}: {error}")
    if problems:
        raise ConfigError(problems + value_problems(config))
    return own, config


def _apply(flag: Flag, own: Any, config: Config) -> tuple[Any, Config]:
    """(own, config) with the flag over them."""
    hints = hints_of(type(own))
    if not flag.written.startswith("--"):
        raise NoSuchField("flags begin with --; put a pattern such as 'books/*.txt' in quotes, or the shell makes words of it")
    if flag.name in hints:
        hint = hints[flag.name]
        if get_origin(hint) is tuple:  # given several times, with commas that are part of one value
            return dataclasses.replace(own, **{flag.name: (*getattr(own, flag.name), _text_of(flag))}), config
        return dataclasses.replace(own, **{flag.name: _value(flag, hint)}), config
    name = flag.name
    try:
        hint = field_hint(name)
    except NoSuchField:
        name, hint = name.removeprefix("no_"), None
        if name == flag.name or flag.text is not None or field_hint(name) is not bool:
            raise NoSuchField(f"no such flag; {meant(flag.name, tuple(hints), '--')}") from None
        return own, set_field(config, name, False)
    return own, set_field(config, name, _value(flag, hint))


def _value(flag: Flag, hint: Any) -> Any:
    return True if flag.text is None and hint is bool else read_value(_text_of(flag), hint)


def _text_of(flag: Flag) -> str:
    if flag.text is None:
        raise ExplainedError(f"has no value; write --{flag.name}=...")
    return flag.text


def _flags_of(arguments: Sequence[str], own: type) -> Iterator[Flag]:
    """The flags of a command line: `--name=value`, `--name value` (several, for a tuple) and a bare `--name`.

    Bools of the verb's own take no value from the next argument.
    """
    arguments, i = list(arguments), 0
    while i < len(arguments):
        written, i = arguments[i], i + 1
        name, equals, text = written.partition("=")
        if not name.startswith("--"):
            yield Flag(written, name, None)
            continue
        name, values = name[2:].replace("-", "_"), []
        if hints_of(own).get(name) is not bool:
            while not equals and i < len(arguments) and not (arguments[i].startswith("--") or arguments[i] in HELP):
                if values and not _is_tuple(name):
                    break
                values.append(arguments[i])
                i += 1
        yield Flag(written, name, text if equals else ",".join(values) if values or _is_tuple(name) else None)


def _is_tuple(name: str) -> bool:
    """Whether a field of Config takes several values."""
    try:
        return get_origin(field_hint(name)) is tuple
    except NoSuchField:
        return False


def _take_config(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """(what --config names, all other arguments); of several the last counts."""
    rest, path, i = [], None, 0
    while i < len(arguments):
        name, equals, text = arguments[i].partition("=")
        if name != "--config":
            rest.append(arguments[i])
        elif equals:
            path = text
        else:
            i += 1
            path = arguments[i] if i < len(arguments) else ""
        i += 1
    if path == "":
        raise ConfigError([f"--config needs a file, {EXAMPLE}"])
    if path is None and not HELP & set(arguments):
        raise ConfigError([f"--config is missing; give a config file, {EXAMPLE}"])
    return path or "", rest


def _print_help(flags: type[Any], config: Config, description: str, prog: str) -> None:
    """Prints all flags with the defaults of the config; ends the process with exit code 0.

    Parts that are None are listed with the values that they would begin with.
    """
    import tyro

    own = Annotated[flags, tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff]
    fields = Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands]
    both = dataclasses.make_dataclass("Arguments", [("own", own), ("config", fields)])
    shown, absent = _with_all_parts(config), [name for name in OPTIONAL_PARTS if _part(config, name) is None]
    if absent:
        description += f" None until one of their flags is given: {', '.join(absent)}."
    about: dict[str, Any] = {"prog": f"{prog} --config=FILE", "description": description, "use_underscores": True}
    tyro.cli(both, default=both(flags(), shown), args=["--help"], **about)


def _part(config: Config, name: str) -> Any:
    return getattr(config.model, name.removeprefix("model."))


def _with_all_parts(config: Config) -> Config:
    """The config with the defaults of each part that is None."""
    for name in OPTIONAL_PARTS:
        if _part(config, name) is None:
            kind = nested(field_hint(name))
            assert kind is not None
            config = set_field(config, name, kind())
    return config
