"""`--help` of every verb: its own flags first, then a config's, section by section; `--help=optimizer` prints one section.

The text of a flag is the string below its field in the source.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import shutil
import sys
import textwrap
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from jaxtrain.command.usage import Usage
from jaxtrain.config import Config
from jaxtrain.config.names import Section, default_of, hints_of, sections_of
from jaxtrain.errors import UsageError, nearest

COLUMN = 34
"""Column at which the texts begin."""
WIDTH = 128
KINDS = {int: "INT", float: "FLOAT", str: "TEXT", bool: "{True,False}"}


def print_help(usage: Usage[Any], config: Config, section: str = "") -> None:
    """Print a verb's usage with the values of a config, or one section of the config.

    Raises:
      UsageError: there is no such section.
    """
    sections = [] if usage.config == "none" else list(sections_of(config))
    if section:
        found = [each for each in sections if each.name == section or each.name.startswith(f"{section}.")]
        if not found:
            raise UsageError(f"--help={section}: there is no such section; {nearest(section, [s.name for s in sections])}")
        print("\n\n".join(map(_section_text, found)))
        return
    config_flags = {"needed": " --config=FILE [flags]", "taken": " [--config=FILE] [flags]", "none": " [flags]"}[usage.config]
    words = "".join(f" {name.upper()}" for name in usage.words)
    parts = [f"usage: jaxtrain {usage.verb}{words}{config_flags}", _filled(usage.about)]
    own = [_own_text(usage, field) for field in dataclasses.fields(usage.own)]
    if own:
        parts.append("\n".join(own))
    if sections:
        names = ", ".join(each.name for each in sections)
        parts.append(_filled(f"Every field of the config is a flag too; --help=SECTION prints one of: {names}."))
        parts += map(_section_text, sections)
    print("\n\n".join(parts))


def print_list(usage: str, about: str, items: Mapping[str, str]) -> None:
    """Print a command's usage, its description, and its words, one line each."""
    width = max(map(len, items))
    lines = [f"  {name:<{width}}  {words}" for name, words in items.items()]
    print("\n\n".join([f"usage: {usage}", _filled(about), "\n".join(lines)]))


@functools.cache
def texts_of(kind: type) -> dict[str, str]:
    """Return the string below each field of a dataclass, on one line."""
    texts = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        tops = _tree_of(base.__module__).body
        (body,) = (top.body for top in tops if isinstance(top, ast.ClassDef) and top.name == base.__name__)
        for field, below in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                texts[ast.unparse(field.target)] = " ".join(str(below.value.value).split())
    return texts


@functools.cache
def _tree_of(module: str) -> ast.Module:
    return ast.parse(inspect.getsource(sys.modules[module]))


def _section_text(section: Section) -> str:
    about = " ".join((section.kind.__doc__ or "").split("\n\n")[0].split())
    absent = "None until one of its flags is given. " if section.here is None else ""
    *_, several, last = "", *section.name.split(".")
    many = f"Of each; the next ones are {several}.1, {several}.2. " if last == "0" else ""
    lines = [f"{section.name}: {absent}{many}{about}" if section.prefix else "run: name and folder of the run."]
    hints, texts = hints_of(section.kind), texts_of(section.kind)
    defaults = {field.name: default_of(field) for field in dataclasses.fields(section.kind)}
    rows = []
    for name in section.fields:
        default, here = defaults[name], getattr(section.here, name, defaults[name])
        values = f"default: {shown(default)}" + (f"; here {shown(here)}" if here != default else "")
        rows.append(_row(f"--{section.prefix}{name} {kind_of(hints[name])}", f"{texts.get(name, '')} ({values})"))
    return "\n".join([_filled(lines[0]), *rows])


def _own_text(usage: Usage[Any], field: dataclasses.Field[Any]) -> str:
    hint, default, text = hints_of(usage.own)[field.name], default_of(field), texts_of(usage.own).get(field.name, "")
    kind = "" if hint is bool or field.name in usage.words else f" {kind_of(hint, own=True)}"
    if hint is not bool and default not in (dataclasses.MISSING, None, "", ()):
        text += f" (default: {shown(default)})"
    return _row(f"{usage.word(field.name)}{kind}", text)


def kind_of(hint: Any, own: bool = False) -> str:
    """Return the placeholder of a flag's value: INT, FLOAT, TEXT, the choices, or several of them."""
    if get_origin(hint) is UnionType:
        (hint,) = (kind for kind in get_args(hint) if kind is not NoneType)
    if get_origin(hint) is tuple:
        return kind_of(get_args(hint)[0]) + (" ..." if own else ",...")
    if get_origin(hint) is Literal:
        return f"{{{','.join(map(str, get_args(hint)))}}}"
    return KINDS[hint]


def shown(value: Any) -> str:
    """Return a value as its flag would be written; an empty text as ''."""
    return ",".join(map(str, value)) or "()" if isinstance(value, tuple) else str(value) or "''"


def _row(flag: str, text: str) -> str:
    """Return a flag with its text beside it, or below it if the flag is long."""
    lines = textwrap.wrap(text, _width() - COLUMN, break_long_words=False, break_on_hyphens=False) or [""]
    first = f"  {flag:<{COLUMN - 4}}  {lines[0]}" if len(flag) <= COLUMN - 4 else f"  {flag}\n{' ' * COLUMN}{lines[0]}"
    return "\n".join([first.rstrip(), *(" " * COLUMN + line for line in lines[1:])])


def _filled(text: str) -> str:
    return "\n".join(textwrap.wrap(text, _width(), break_long_words=False, break_on_hyphens=False))


def _width() -> int:
    return max(60, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))
