"""The command line of every verb: its own flags, and over `--config=FILE` every field of a config as a typed flag.

The verb's flags are the fields of a dataclass, and both kinds are read by `config/names.py`, all of them before any error is
reported, so that every wrong one is listed at once. `--help` is in `help.py`.

Why a parser of our own: tyro 1.0.17, given the 140 fields, stops at the first wrong flag, does not know other trainers' names
of a field, rejects 1e3 for a whole number and lists joined by commas, and creates no part that is None; its --help of
`--config=configs/7b.py` takes 0.68 s of CPU time where this one takes 0.2 s, of which Python's start is 0.04 s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Generic, NamedTuple, get_args, get_origin

from jaxtrain.command.help import print_help
from jaxtrain.command.usage import Flags, NoFlags, Usage
from jaxtrain.config import Config
from jaxtrain.config.loading import read_config
from jaxtrain.config.names import NoSuchField, default_of, field_hint, field_names, hints_of, meant, read_value, set_field
from jaxtrain.errors import ConfigError, ExplainedError
from jaxtrain.files import user_path
from jaxtrain.huggingface.starting import folder_config, is_model_folder

EXAMPLE = "e.g. --config=configs/quickstart.py"


@dataclasses.dataclass(frozen=True)
class CommandLine(Generic[Flags]):
    """A parsed command line."""

    own: Flags
    path: str
    """The value of --config; empty without it."""
    config: Config
    file: Config
    """The file's config, before the flags."""
    given: tuple[str, ...]
    """Dotted names of the config's fields that flags have set."""


class Flag(NamedTuple):
    """A flag as written, with its name and values."""

    written: str
    name: str
    """Name with underscores, without the dashes."""
    values: list[str] | None
    """None for a bare `--name`."""


def parse_config(arguments: Sequence[str]) -> Config:
    """Read `--config=FILE` and every field as a typed flag over it.

    Raises:
      ConfigError: lists every unknown or ill-typed flag with the nearest right one, and every value that cannot work.
    """
    return parse(Usage("", "", NoFlags), arguments).config


def parse(usage: Usage[Flags], arguments: Sequence[str], over: Config | None = None) -> CommandLine[Flags]:
    """Parse a verb's command line; if it asks for help, print that and end the process with exit code 0.

    Args:
      over: the config that the flags modify, in place of the one that --config names.

    Raises:
      ConfigError: lists everything that is wrong with it, with the nearest right flags.
    """
    section = wanted_help(arguments)
    path, rest = "", list(arguments)
    if usage.config != "none" and over is None:
        path, rest = _take_config(arguments, usage.config == "needed" and section is None)
    folder = user_path(path) if path and is_model_folder(user_path(path)) else None
    source = read_config(path) if path and folder is None else None
    file = folder_config(folder) if folder else source.config if source else over or Config()
    if section is not None:
        print_help(usage, file, section)
        raise SystemExit(0)
    reading = _Reading(usage, file)
    problems = []
    for flag in _flags_of(rest, usage, file):
        try:
            reading.take(flag)
        except NoSuchField as error:
            problems.append(f"{flag.written}: {error}")
        except ExplainedError as error:
            value = "" if flag.values is None else f"={','.join(flag.values)}"
            problems.append(f"--{flag.name}{value}: {error}")
    problems += reading.missing()
    if problems and usage.config != "none":
        from jaxtrain.config.rules import value_problems

        raise ConfigError(problems + value_problems(reading.config))
    if problems:
        raise ConfigError(problems, "on the command line")
    config = source.plug(reading.config) if source else reading.config
    return CommandLine(usage.own(**reading.own), path, config, file, tuple(reading.given))


def flag_names(usage: Usage[Any]) -> list[str]:
    """Return every flag of a verb, as written on the command line."""
    own = [f"--{name}" for name in hints_of(usage.own) if name not in usage.words]
    return own if usage.config == "none" else [*own, "--config", *(f"--{name}" for name in field_names())]


def wanted_help(arguments: Sequence[str]) -> str | None:
    """Return the section of `--help=SECTION`, "" for plain --help, None without it."""
    for argument in arguments:
        name, _, section = argument.partition("=")
        if name in ("-h", "--help"):
            return section
    return None


class _Reading:
    """The state after the flags read so far."""

    def __init__(self, usage: Usage[Any], config: Config):
        self.own: dict[str, Any] = {}
        self.config, self.given = config, dict[str, None]()
        self._usage, self._hints, self._words = usage, hints_of(usage.own), list(usage.words)

    def take(self, flag: Flag) -> None:
        """Set the flag's field.

        Raises:
          ExplainedError: there is no such flag, or it has no such value.
        """
        if not flag.written.startswith("--"):
            self._take_word(flag.written)
        elif flag.name in self._hints:
            self._set_own(flag.name, flag)
        elif self._usage.config != "none" and (name := self._field_of(flag)) is not None:
            self.config = set_field(self.config, name, name == flag.name and _value(flag, field_hint(name, self.config)))
            self.given[name] = None
        else:
            others = tuple(name for name in self._hints if name not in self._usage.words)
            raise NoSuchField(f"no such flag; {meant(flag.name, others, '--', self._usage.config != 'none', self.config)}")

    def missing(self) -> list[str]:
        """Return a line for each required flag or word of the verb that is missing."""
        usage = self._usage
        required = [field.name for field in dataclasses.fields(usage.own) if default_of(field) is dataclasses.MISSING]
        needed = [name for name in required if name not in self.own]
        return [f"{usage.word(name)} is missing; see `jaxtrain {usage.verb} --help`" for name in needed]

    def _take_word(self, word: str) -> None:
        if not self._words:
            quotes = "put a pattern such as 'books/*.txt' in quotes, or the shell makes words of it"
            raise NoSuchField(f"flags begin with --; {quotes}")
        name = self._words[0]
        if get_origin(self._hints[name]) is not tuple:
            del self._words[0]
        self._set_own(name, Flag(word, name, [word]))

    def _set_own(self, name: str, flag: Flag) -> None:
        if get_origin(self._hints[name]) is tuple:
            hint, values = self._hints[name], _values_of(flag)
            given = values if get_args(hint)[0] is str else read_value(",".join(values), hint)
            self.own[name] = (*self.own.get(name, ()), *given)
        else:
            self.own[name] = _value(flag, self._hints[name])

    def _field_of(self, flag: Flag) -> str | None:
        """Return the name of the field that a flag sets, also by a bare `--no_NAME`; None if there is none."""
        for name in (flag.name, flag.name.removeprefix("no_")):
            try:
                if name == flag.name or (flag.values is None and field_hint(name, self.config) is bool):
                    field_hint(name, self.config)
                    return name
            except NoSuchField:
                pass
        return None


def _value(flag: Flag, hint: Any) -> Any:
    return True if flag.values is None and hint is bool else read_value(",".join(_values_of(flag)), hint)


def _values_of(flag: Flag) -> list[str]:
    if flag.values is None:
        raise ExplainedError(f"has no value; write --{flag.name}=...")
    return flag.values


def _flags_of(arguments: Sequence[str], usage: Usage[Any], config: Config) -> Iterator[Flag]:
    """Split into flags: `--name=value`, `--name value` (several, for a tuple), a bare `--name`, and words.

    The verb's own bools take no value from the next argument.
    """
    arguments, i = list(arguments), 0
    while i < len(arguments):
        written, i = arguments[i], i + 1
        name, equals, text = written.partition("=")
        if not name.startswith("--"):
            yield Flag(written, name, None)
            continue
        name, values = name[2:].replace("-", "_"), []
        hint = hints_of(usage.own).get(name) or (_hint_or_none(name, config) if usage.config != "none" else None)
        is_tuple = get_origin(hint) is tuple
        if hint is not bool or name not in hints_of(usage.own):
            while not equals and i < len(arguments) and not arguments[i].startswith("--"):
                if values and not is_tuple:
                    break
                values.append(arguments[i])
                i += 1
        yield Flag(written, name, [text] if equals else values if values or is_tuple else None)


def _hint_or_none(name: str, config: Config) -> Any:
    try:
        return field_hint(name, config)
    except NoSuchField:
        return None


def _take_config(arguments: Sequence[str], needed: bool) -> tuple[str, list[str]]:
    """(value of --config, all other arguments); of several --config the last counts.

    Without it, a HuggingFace folder that --init_from names is its own config.
    """
    path, rest = _taken("config", arguments)
    if path == "":
        raise ConfigError([f"--config needs a file, {EXAMPLE}"])
    source = (_taken("init_from", rest)[0] or "") if path is None else ""
    if source and is_model_folder(user_path(source)):
        return source, rest
    if path is None and needed:
        other = f"; {source}, of --init_from, is no folder of a HuggingFace model, which would do" if source else ""
        raise ConfigError([f"--config is missing; give a config file, {EXAMPLE}{other}"])
    return path or "", rest


def _taken(flag: str, arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """(the last value of --FLAG, None without it and empty without a value; the other arguments)."""
    rest, value, left = [], None, iter(arguments)
    for argument in left:
        name, equals, text = argument.partition("=")
        if name.replace("-", "_") == f"__{flag}":
            value = text if equals else next(left, "")
        else:
            rest.append(argument)
    return value, rest
