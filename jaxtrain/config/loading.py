"""Load config files: Python with `get_config() -> Config`, by path or by the name of a shipped one; or JSON from a run or plan.

A Python file may import its neighbours, and may define `get_trainer(config) -> Trainer`, whose parts go into the config
(`jaxtrain.parts`). An error in a file is reported as `file:line: what`, not as a traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from jaxtrain.config import PARTS, Config, from_json, to_json
from jaxtrain.errors import ConfigError, ExplainedError, nearest
from jaxtrain.files import user_path
from jaxtrain.parts import plugged

SHIPPED = Path(__file__).parent.parent.parent / "configs"
"""Folder of the configs in a checkout. The installed package has none, since configs are meant to be read and changed."""


def find_config(name: str | Path) -> Path:
    """Return the file that --config names: a path, or a shipped config by its bare name, `--config=quickstart` or `tiny-moe`.

    Raises:
      ExplainedError: there is none; names the nearest.
    """
    path = user_path(name)
    for file in (path, path.with_name(f"{path.name}.py") if path.name else path):
        if file.is_file():
            return file
    shipped = shipped_configs()
    bare = path.parent == Path() and path.suffix in ("", ".py")
    if bare and (file := shipped.get(path.stem.replace("-", "_"))):
        return file
    beside = sorted(p.name for p in path.parent.glob("*.py"))
    if path.is_dir():
        hint = f"that is a folder; {nearest(path.name, beside)}" if beside else "that is a folder"
    elif bare and shipped:
        hint = f"no such file; {nearest(path.stem, [*shipped, *beside])}"
    elif beside:
        hint = f"no such file; {nearest(path.name, beside)}"
    else:
        hint = f"no such file; there is no .py file in {path.parent.resolve()}; see configs/"
    raise ExplainedError(f"--config={name}: {hint}")


class ConfigFile(NamedTuple):
    """A read config file."""

    path: Path
    config: Config
    get_trainer: Callable[[Config], Any] | None

    def plug(self, config: Config) -> Config:
        """Return the config with the parts that the file's `get_trainer` plugs in.

        Raises:
          ExplainedError: it does not return a Trainer; names file and line.
        """
        if self.get_trainer is None:
            return config
        with _explained(self.path):
            trainer = self.get_trainer(config)
        made = getattr(trainer, "config", None)
        if not isinstance(made, Config):
            raise ExplainedError(f"--config={self.path}: get_trainer(config) gave a {type(trainer).__name__}, not a Trainer")
        return _of_file(made, self.path)


def _of_file(config: Config, path: Path) -> Config:
    return dataclasses.replace(config, parts=dataclasses.replace(config.parts, file=str(path.resolve())))


def load_config(name: str | Path) -> Config:
    """Return the config of a file with its parts plugged in (`read_config`, `ConfigFile.plug`)."""
    file = read_config(name)
    return file.plug(file.config)


def read_config(name: str | Path) -> ConfigFile:
    """Read a config file: run its Python code for `get_config()`, or read its JSON.

    Raises:
      ExplainedError: there is no such file, or it does not give a Config; names file and line.
    """
    path = find_config(name)
    if path.suffix == ".json":
        return _read_json(path)
    spec = importlib.util.spec_from_file_location(f"jaxtrain_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ExplainedError(f"--config={name}: not a Python file; give one that defines get_config(), such as configs/7b.py")
    module = importlib.util.module_from_spec(spec)
    with _explained(path):
        sys.modules[module.__name__] = module
        spec.loader.exec_module(module)
        get_config = _get_config_of(module, path)
        config = get_config()
    if not isinstance(config, Config):
        where = f"{path}:{get_config.__code__.co_firstlineno}" if hasattr(get_config, "__code__") else path
        raise ExplainedError(f"--config={where}: get_config() gave a {type(config).__name__}, not a jaxtrain.config.Config")
    get_trainer = getattr(module, "get_trainer", None)
    sections = [config, *(getattr(config, field.name) for field in dataclasses.fields(config))]
    if any(type(section).__module__ == module.__name__ for section in sections):  # subclasses of our sections, with more fields
        config = _of_file(config, path)
    elif get_trainer is None:
        del sys.modules[module.__name__]  # but keep it for subclasses: Python looks there for their types and source
    return ConfigFile(path, config, get_trainer)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Run code of a config file with its neighbours importable; report its exceptions as `file:line: what`."""
    with neighbours_importable(path.resolve().parent):
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit() too
            if isinstance(error, ExplainedError) and error.__traceback__ and not _lines_of(error, path):
                raise
            raise ExplainedError(f"--config={describe(error, path)}") from error


def _read_json(path: Path) -> ConfigFile:
    """Return what the config says that a run (config.json) or a plan (--write, --json) wrote."""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(written, dict) and "best_config" in written:
            written = written["best_config"]
        return written_config(json.dumps(written))
    except (OSError, ValueError, RecursionError) as error:
        raise ExplainedError(f"--config={path}: {getattr(error, 'strerror', None) or error}") from error
    except ConfigError as error:
        raise ConfigError([f"--config={path}: {problem}" for problem in error.problems]) from error


def written_config(text: str) -> ConfigFile:
    """Return what the JSON of `to_json` says; the parts are to be plugged in by the config file that it names.

    Raises:
      ConfigError: it is no such text; names the field.
      ExplainedError: the config file that plugged in its parts is gone, or no longer works.
    """
    written = json.loads(text)
    file = written.pop(PARTS, "") if isinstance(written, dict) else ""
    if not file:
        return ConfigFile(Path(), from_json(text), None)
    source = read_config(file)
    return source._replace(config=from_json(json.dumps(written), like=source.config))


def config_of(text: str) -> Config:
    """Return the config of the JSON of `to_json`, with its parts (`written_config`)."""
    file = written_config(text)
    return file.plug(file.config)


def for_another_process(config: Config) -> str:
    """Return the JSON from which another process makes the same config, by `config_of`.

    Raises:
      ExplainedError: parts were plugged in without a file, so that no other process can have them.
    """
    held = plugged(config.parts) | plugged(config.model.parts)
    if held and not config.parts.file:
        raise ExplainedError(
            f"{', '.join(held)}: what is plugged in in Python cannot go to another process; put it into a config file that "
            "defines get_trainer(config), and use load_config of that"
        )
    return to_json(config)


def shipped_configs() -> dict[str, Path]:
    """Return the files of the shipped configs by their names."""
    return {file.stem: file for file in sorted(SHIPPED.glob("*.py"))}


def _get_config_of(module: ModuleType, path: Path) -> Callable[[], object]:
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ExplainedError(f"--config={path}: defines no get_config() -> Config")
    with contextlib.suppress(ValueError):  # a builtin has no signature
        needed = [p.name for p in inspect.signature(get_config).parameters.values() if _is_needed(p)]
        if needed:
            raise ExplainedError(f"--config={path}: get_config() is called without arguments; give {needed[0]} a default")
    return get_config


def _is_needed(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)


@contextlib.contextmanager
def neighbours_importable(folder: Path) -> Iterator[None]:
    """Let a config import the modules of its folder, as a script could, during the block.

    Afterwards `sys.path` and `sys.modules` are as before, so that two folders may each have a `base.py`. Names of the standard
    library and of this package keep their meaning.
    """
    own = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    own -= sys.stdlib_module_names | {"jaxtrain"}
    before = _take_modules(own)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))
        _take_modules(own)
        sys.modules.update(before)


def _take_modules(names: set[str]) -> dict[str, ModuleType]:
    """Remove the modules of these top-level names from `sys.modules`, and return them."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in names}


def _lines_of(error: BaseException, path: Path) -> list[traceback.FrameSummary]:
    """Return the frames of the traceback in the config file's folder, the innermost last."""
    folder = path.resolve().parent
    return [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve().parent == folder]


def describe(error: BaseException, path: Path) -> str:
    """Return `file:line: Type: message` of a config file's exception, at its own or a neighbour's innermost line."""
    words = str(error)
    if isinstance(error, SyntaxError) and error.filename:
        where, line, words = Path(error.filename), error.lineno, error.msg
    else:
        frames = _lines_of(error, path)
        where, line = (Path(frames[-1].filename), frames[-1].lineno) if frames else (path, None)
    if isinstance(error, SystemExit):
        words = f"the file ends the program ({error.code})"
    shown = path if where.resolve() == path.resolve() else where
    return f"{shown}{f':{line}' if line else ''}: {type(error).__name__}{f': {words}' if words else ''}"
