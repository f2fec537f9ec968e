"""The known chips (`chips.toml`), and how to name one."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from jaxtrain.errors import ExplainedError, nearest
from jaxtrain.files import user_path
from jaxtrain.hardware.chip import Chip
from jaxtrain.hardware.chip_file import ENDINGS, chip_of_table, read_chip

_TABLES = tomllib.loads(Path(__file__).with_name("chips.toml").read_text(encoding="utf-8"))
CHIPS: Mapping[str, Chip] = MappingProxyType(
    {name: chip_of_table({"name": name, **table}, f"chips.toml: {name}") for name, table in _TABLES.items()}
)
"""Every known chip, by name."""


def find_chip(name: str, flag: str = "--hardware") -> Chip:
    """Return the chip of that name; case, spaces, underscores and hyphens do not matter ("RTX 4090").

    Raises:
      ExplainedError: no such chip; the message names the nearest, and the flag that gave the name.
    """
    key = re.sub(r"[\s_]+", "-", name.strip().lower())
    if key not in CHIPS:
        raise ExplainedError(f"{flag}={name!r} is no chip we know: {nearest(key, CHIPS)}; or a file of your own, chip.json")
    return CHIPS[key]


def load_chip(name_or_path: str, flag: str = "--hardware") -> Chip:
    """Return the chip of that name, or the one that a file describes ("my_chip.json", "measured.toml": see `chip_file.py`).

    Raises:
      ExplainedError: no such chip, no such file, or a mistake in the file; the message says what would work.
    """
    if Path(name_or_path).suffix in ENDINGS:
        return read_chip(user_path(name_or_path), CHIPS, flag)
    return find_chip(name_or_path, flag)


def chip_of_device_kind(device_kind: str) -> Chip | None:
    """Return the chip with this `jax.Device.device_kind`, or None.

    The match is exact: a MIG slice ("NVIDIA H200 MIG 1g.18gb") or a cut-down variant ("RTX 4090 D") is another chip, and an MFU
    against the whole chip's peak would be wrong.
    """
    return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)


def resolve_chip(hardware: str, device_kind: str, flag: str = "telemetry.hardware") -> Chip:
    """Return the chip that MFU is measured against: `hardware`, or with "auto" the chip of this device kind.

    An unknown device kind gives a chip of that name without figures, so that MFU is reported as unknown.

    Raises:
      ExplainedError: `hardware` is neither "auto" nor a known name nor a chip file that can be read.
    """
    if hardware != "auto":
        return load_chip(hardware, flag)
    return chip_of_device_kind(device_kind) or Chip(
        name=device_kind, device_kinds=(device_kind,), peak_flops=MappingProxyType({})
    )
