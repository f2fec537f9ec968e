"""`python -m jaxtrain.collectives --config=configs/70b.py --mesh.fsdp=64 --mesh.tensor=8`: what a layout moves, byte by byte.

Compiles the train step for those GPUs, none of which needs to be there, and prints what a device sends in a step along each
mesh axis: how much of it travels behind compute, and beside it what the closed form says. Without XLA's compiler for NVIDIA
GPUs (the extra `plan`) it prints the closed form alone.
"""

from __future__ import annotations

if __name__ == "__main__":
    import jaxtrain.early  # noqa: F401, before all else: Ctrl-C ends the program from here on
    from jaxtrain import cli

    cli.run("jaxtrain.collectives")

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from jaxtrain.command_line import parse_command_line
from jaxtrain.config import MESH_AXES, Config
from jaxtrain.config_rules import validate
from jaxtrain.errors import ConfigError
from jaxtrain.text import open_console

DESCRIPTION = (
    "Print what a device moves in a training step on a mesh of GPUs that need not be there. Beside the config's flags: "
    "--chip=h100-sxm|h200|b200, --devices=N (where a mesh axis is -1), --json."
)
MEBI = 2**20
TOLERANCE = 0.02
SMALL = 1024
"""Bytes below which a deviation is of single numbers, which XLA adds up as it likes."""


def take_flag(arguments: list[str], name: str, default: str) -> str:
    """Takes `--name=value`, `--name value` or, where the default is "", a bare `--name` (as "yes") out of the arguments."""
    for i, argument in enumerate(arguments):
        if argument == f"--{name}" and default == "":
            del arguments[i]
            return "yes"
        if argument.startswith(f"--{name}="):
            del arguments[i]
            return argument.partition("=")[2]
        if argument == f"--{name}" and i + 1 < len(arguments):
            value = arguments[i + 1]
            del arguments[i : i + 2]
            return value
    return default


def count_devices(config: Config, devices: str) -> int:
    """How many devices the mesh is for: `devices` if given, else the product of its axes.

    Raises:
      ConfigError: an axis is -1 and nobody says of how many devices, or `devices` is no number.
    """
    if devices != "0":
        if not devices.isdigit():
            raise ConfigError([f"--devices={devices}: give a whole number, e.g. --devices=64"])
        return int(devices)
    free = [axis for axis in MESH_AXES if getattr(config.mesh, axis) == -1]
    if free:
        raise ConfigError([f"mesh.{free[0]}=-1: give it a size, or say how many devices there are, e.g. --devices=64"])
    return math.prod(config.mesh.shape)


def expectation(config: Config) -> tuple[dict[tuple[str, str, str], dict[str, float]], str]:
    """(calls, payload, wire and unread bytes by axes, kind and dtype, from the closed form; what it does not cover, if so)."""
    from jaxtrain.planner.formulas_collectives import collectives

    try:
        entries = collectives(config)
    except ValueError as error:
        return {}, str(error)
    sums: dict[tuple[str, str, str], dict[str, float]] = {}
    for entry in entries:
        row = sums.setdefault((entry.axes, entry.kind, entry.dtype), dict.fromkeys(("calls", "payload", "wire", "unread"), 0.0))
        for name in row:
            row[name] += getattr(entry, name)
    return sums, ""


def _flops(config: Config, attention: str) -> float | None:
    from jaxtrain.planner.formulas import step_flops

    try:
        return step_flops(config, attention)
    except ValueError:
        return None


def examine(config: Config, chip: str) -> dict[str, Any]:
    """All that is printed: rows as compiled (`hlo_collectives.Row`) beside the closed form, or the closed form alone."""
    from jaxtrain.planner import deviceless

    sums, missing = expectation(config)
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    whole: dict[str, Any] = {
        "config": config.name,
        "chip": chip,
        "devices": math.prod(config.mesh.shape),
        "mesh": {axis: size for axis, size in zip(MESH_AXES, config.mesh.shape, strict=True) if size > 1},
        "compiled": deviceless.has_plugin(),
        "no_formula": missing,
    }
    if whole["compiled"]:
        report = deviceless.report_in_subprocess(config, chip)
        found = {(row.axes, row.kind, row.dtype): dataclasses.asdict(row) for row in report.rows}
        whole |= {"attention": report.attention, "flops": report.flops, "memory_bytes": report.memory_bytes}
        whole |= {"flops_formula": None if missing else _flops(config, report.attention.partition(":")[0])}
    rows = []
    for axes, kind, dtype in dict.fromkeys((*found, *sums)):
        formula = sums.get((axes, kind, dtype))
        row = {"axes": axes, "kind": kind, "dtype": dtype, **found.get((axes, kind, dtype), {})}
        rows.append(row | {"formula": formula, "deviates": whole["compiled"] and not missing and deviates(row, formula)})
    return whole | {"rows": rows}


def deviates(row: dict[str, Any], formula: dict[str, float] | None) -> bool:
    """Whether the compiled bytes are more than 2% off the closed form, or not in it at all."""
    want, unread = (formula["payload"], formula["unread"]) if formula else (0.0, 0.0)
    got = row.get("payload", 0.0)
    slack = max(SMALL, TOLERANCE * want)
    return not want - unread - slack <= got <= want + slack


def _cells(row: dict[str, Any], compiled: bool, has_formula: bool) -> list[str]:
    formula = row["formula"] or {}
    shown = row if compiled else formula
    cells = [row["axes"], row["kind"], row["dtype"]]
    cells += [f"{shown.get('calls', 0):,.0f}", f"{shown.get('payload', 0) / MEBI:,.3f}", f"{shown.get('wire', 0) / MEBI:,.3f}"]
    if not compiled:
        return cells
    wire, hidden = row.get("wire", 0.0), row.get("hidden", 0.0)
    cells += [f"{hidden / MEBI:,.1f}", f"{(wire - hidden) / MEBI:,.1f}"]
    if has_formula:
        cells += [f"{formula.get('payload', 0) / MEBI:,.3f}", "differs" if row["deviates"] else "="]
    return cells


def show(whole: dict[str, Any]) -> None:
    """Prints the table and three lines below it."""
    from rich.table import Table

    from jaxtrain.planner.tables import print_table
    from jaxtrain.telemetry.progress import readable_size

    compiled, has_formula = whole["compiled"], not whole["no_formula"]
    mesh = " x ".join(f"{axis}={size}" for axis, size in whole["mesh"].items()) or "one device"
    source = "compiled" if compiled else "closed form"
    table = Table(title=f"{whole['config']} on {whole['devices']} x {whole['chip']}, {mesh}: a device's step, {source}")
    heads = ["axes", "collective", "dtype", "calls", "MiB", "wire MiB"]
    heads += (["hidden", "exposed"] + (["formula MiB", ""] if has_formula else [])) if compiled else []
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i < 3 or not head else "right", no_wrap=True)
    for row in whole["rows"]:
        table.add_row(*_cells(row, compiled, has_formula), style="bold red" if row["deviates"] else None)
    console = open_console(160)
    print_table(console, table)
    if whole["no_formula"]:
        console.print(whole["no_formula"])
    if not compiled:
        return
    wire = sum(row.get("wire", 0.0) for row in whole["rows"])
    exposed = wire - sum(row.get("hidden", 0.0) for row in whole["rows"])
    console.print(f"{exposed / max(wire, 1):.1%} of {readable_size(wire)} on the wire is exposed")
    beside = f", {whole['flops'] / whole['flops_formula'] - 1:+.2%} from the closed form" if whole["flops_formula"] else ""
    console.print(f"{whole['flops'] / 1e12:,.2f} matmul TFLOP{beside}; attention {whole['attention']}")
    console.print(f"{readable_size(whole['memory_bytes'])} for state, batch and temporaries")


def main(arguments: Sequence[str]) -> int:
    """Parses, validates, compiles, prints; returns the exit code."""
    rest = list(arguments)
    chip, devices, as_json = take_flag(rest, "chip", "h100-sxm"), take_flag(rest, "devices", "0"), take_flag(rest, "json", "")
    config = parse_command_line(rest, DESCRIPTION, "python -m jaxtrain.collectives")

    from jaxtrain.planner.deviceless import find_obstacle
    from jaxtrain.planner.targets import find_target

    find_target(chip)
    config = validate(config, count_devices(config, devices))
    obstacle = find_obstacle()
    doing = f"the closed form alone: {obstacle}" if obstacle else f"compiling for {math.prod(config.mesh.shape)} x {chip} ..."
    print(doing, file=sys.stderr)
    whole = examine(config, chip)
    if as_json:
        print(json.dumps(whole))
    else:
        show(whole)
    return 0
