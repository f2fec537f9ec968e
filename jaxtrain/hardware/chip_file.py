"""Read a user's or a measured chip from a JSON or TOML file: the fields of `Chip`, over those of a known chip.

    {"name": "my-h100", "based_on": "h100-sxm", "nic_bandwidth": 12.5e9, "devices_per_host": 4}

Omitted fields are the known chip's, or unknown without `based_on`. `jaxtrain calibrate` writes such files.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtrain.errors import ExplainedError, nearest
from jaxtrain.files import make_file, user_path
from jaxtrain.hardware.chip import DTYPE_ALIASES, PEAK_DTYPES, Calibration, Chip

ENDINGS = (".json", ".toml")

_BOUNDS: Mapping[str, tuple[float, float, str]] = {
    "peak_flops": (1e9, 1e18, "FLOP/s, e.g. 989e12"),
    "memory_bytes": (1e8, 1e14, "bytes, e.g. 80e9"),
    "memory_bandwidth": (1e8, 1e15, "bytes/s, e.g. 3.35e12"),
    "link_bandwidth": (1e6, 1e14, "bytes/s, one direction, e.g. 450e9"),
    "nic_bandwidth": (1e6, 1e14, "bytes/s per chip, e.g. 50e9"),
    "host_bandwidth": (1e6, 1e14, "bytes/s, one direction, e.g. 64e9"),
    "watts": (0.1, 1e5, "watts, e.g. 700"),
    "idle_watts": (0.0, 1e5, "watts, e.g. 100"),
    "devices_per_host": (1, 1e6, "a whole number of chips, e.g. 8"),
    "collective_latency": (0.0, 10.0, "seconds, e.g. 8e-6"),
    "link_latency": (0.0, 10.0, "seconds a step, e.g. 3e-6"),
    "nic_latency": (0.0, 10.0, "seconds a step, e.g. 14e-6"),
    "fraction": (0.0, 2.0, "a share of the chip's peak, e.g. 0.7"),
    "memory": (0.0, 2.0, "a share of memory_bandwidth, e.g. 0.9"),
    "link": (0.0, 2.0, "a share of link_bandwidth, e.g. 0.8"),
    "nic": (0.0, 2.0, "a share of nic_bandwidth, e.g. 0.9"),
    "size": (1, 1e9, "a whole number, e.g. 4096"),
}
"""(smallest, largest possible value, unit) of each field, to catch for example GB given for bytes."""


def read_chip(path: str | Path, known: Mapping[str, Chip], flag: str = "--hardware") -> Chip:
    """Read the chip that a file describes.

    Args:
      path: a .json or .toml file.
      known: chips that `based_on` may name.
      flag: the flag that named the file, for messages.

    Raises:
      ExplainedError: the file cannot be read; a field is unknown, missing, of the wrong type or not in its unit. The message
        names the field, its value, and what would work.
    """
    path = Path(path)
    where = f"{flag}={path}"
    table = _read_table(path, where)
    below = _based_on(table.get("based_on"), known, where)
    if "name" not in table and below is None:
        raise ExplainedError(f"{where}: give the chip a name, or say what it is based on: {', '.join(known)}")
    return chip_of_table({"name": path.stem, **table}, where, below)


def chip_of_table(table: Mapping[str, Any], where: str, below: Chip | None = None) -> Chip:
    """Return the chip whose fields a table holds, over those of `below`.

    Raises:
      ExplainedError: as `read_chip`; the message begins with `where`.
    """
    values = _values(Chip, table, where)
    values["peak_flops"] = _peaks(table.get("peak_flops", {}), below, where)
    _check_calibration(values.get("calibration"), where)
    if below is not None:  # device_kinds stay, so that the present chip is recognised
        return dataclasses.replace(below, **values)
    values.setdefault("device_kinds", ())
    return Chip(**values)


def write_chip(path: str | Path, chip: Chip) -> None:
    """Write `chip` as a JSON file that `read_chip` reads back; fields that are None or empty are left out.

    Raises:
      ExplainedError: the file cannot be written.
    """
    table = {field.name: getattr(chip, field.name) for field in dataclasses.fields(chip)}
    table["peak_flops"] = dict(chip.peak_flops)
    table["calibration"] = chip.calibration and dataclasses.asdict(chip.calibration)
    kept = {name: value for name, value in table.items() if value not in (None, "", {}, ())}
    make_file(user_path(path), json.dumps(kept, indent=2) + "\n", "give another --output")


def _read_table(path: Path, where: str) -> dict[str, Any]:
    if path.suffix not in ENDINGS:
        raise ExplainedError(f"{where}: a chip file ends in .json or .toml")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ExplainedError(f"{where}: {error.strerror}; `jaxtrain calibrate --output {path}` writes one") from error
    try:
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise ExplainedError(f"{where}: not {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(table, dict):
        raise ExplainedError(f"{where}: holds a {type(table).__name__}; give the fields of one chip by name")
    return table


def _based_on(name: Any, known: Mapping[str, Chip], where: str) -> Chip | None:
    if name is None:
        return None
    if name not in known:
        raise ExplainedError(f"{where}: based_on={name!r} is no chip we know: {nearest(str(name), known)}")
    return known[name]


def _values(cls: type, table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the table's entries as checked values of the dataclass's fields."""
    hints = typing.get_type_hints(cls)
    values = {}
    for name, entry in table.items():
        if name not in hints:
            raise ExplainedError(f"{where}: {name} is no field of {cls.__name__.lower()}: {nearest(name, hints)}")
        values[name] = _value(hints[name], entry, name, f"{where}: {name}")
    return values


def _value(hint: Any, entry: Any, name: str, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # X | None
        hint = next(argument for argument in arguments if argument is not type(None))
        return None if entry is None else _value(hint, entry, name, where)
    if origin is Mapping:
        return entry  # the peaks, see `_peaks`
    if origin is tuple:
        if not isinstance(entry, list):
            raise ExplainedError(f"{where}={entry!r}: give a list")
        return tuple(_value(arguments[0], one, name, f"{where}[{i}]") for i, one in enumerate(entry))
    if origin is typing.Literal:
        if entry not in arguments:
            raise ExplainedError(f"{where}={entry!r}: {nearest(str(entry), arguments)}")
        return entry
    if dataclasses.is_dataclass(hint):
        return _record(typing.cast(type, hint), entry, where)
    if hint in (int, float):
        return hint(_number(entry, name, where, whole=hint is int))
    if not isinstance(entry, hint):
        raise ExplainedError(f"{where}={entry!r}: give {'true or false' if hint is bool else 'a text'}")
    return entry


def _record(cls: type, entry: Any, where: str) -> Any:
    if not isinstance(entry, dict):
        raise ExplainedError(f"{where}={entry!r}: give the fields of a {cls.__name__.lower()} by name")
    values = _values(cls, entry, where)
    required = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise ExplainedError(f"{where}: {missing[0]} is missing; it takes {', '.join(required)}")
    return cls(**values)


def _number(entry: Any, name: str, where: str, whole: bool = False) -> float:
    low, high, unit = _BOUNDS.get(name, (0.0, math.inf, "a number"))
    right = isinstance(entry, int | float) and not isinstance(entry, bool) and low <= entry <= high  # NaN is not
    if not right or (whole and entry != int(entry)):
        raise ExplainedError(f"{where}={entry!r}: give {unit}, from {low:g} to {high:g}")
    return entry


def _peaks(entry: Any, below: Chip | None, where: str) -> Mapping[str, float]:
    if not isinstance(entry, dict):
        raise ExplainedError(f'{where}: peak_flops={entry!r}: give FLOP/s by dtype, e.g. {{"bfloat16": 989e12}}')
    peaks = dict(below.peak_flops) if below else {}
    for name, rate in entry.items():
        dtype = DTYPE_ALIASES.get(name, name)
        if dtype not in PEAK_DTYPES:
            raise ExplainedError(f"{where}: peak_flops.{name} is no dtype we know: {nearest(name, PEAK_DTYPES)}")
        peaks[dtype] = float(_number(rate, "peak_flops", f"{where}: peak_flops.{name}"))
    return types.MappingProxyType(peaks)


def _check_calibration(calibration: Calibration | None, where: str) -> None:
    for rate in (*calibration.matmul, *calibration.attention) if calibration else ():
        if rate.dtype not in PEAK_DTYPES:
            raise ExplainedError(f"{where}: calibration: dtype={rate.dtype!r}: {nearest(rate.dtype, PEAK_DTYPES)}")
