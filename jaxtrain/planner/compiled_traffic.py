"""Compare a layout's traffic in the compiled train step, collective by collective, with the closed form.

The step is compiled for GPUs that need not be present (`planner/deviceless.py`); without XLA's compiler for NVIDIA GPUs (the
extra `plan`) only the closed form is shown. `jaxtrain plan --explain --compile` prints it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from rich.console import Console

from jaxtrain.config import MESH_AXES, Config
from jaxtrain.planner import deviceless
from jaxtrain.planner.estimates import Cluster
from jaxtrain.planner.formulas import step_flops
from jaxtrain.planner.formulas_collectives import collectives
from jaxtrain.planner.targets import find_target
from jaxtrain.program.collectives import summed
from jaxtrain.tables import plain_table, print_table
from jaxtrain.text import readable_size

MEBI = 2**20
TOLERANCE = 0.02
SMALL = 1024
"""Bytes below which a deviation is ignored: single numbers, which XLA sums in its own way."""


def expectation(config: Config) -> tuple[dict[tuple[str, str, str], dict[str, float]], str]:
    """({(axes, kind, dtype): calls, payload, wire and unread bytes} by the closed form, what it does not cover)."""
    names = ("calls", "payload", "wire", "unread")
    try:
        return summed(collectives(config), lambda entry: (entry.axes, entry.kind, entry.dtype), names), ""
    except ValueError as error:
        return {}, str(error)


def _flops(config: Config, attention: str) -> float | None:
    try:
        return step_flops(config, attention)
    except ValueError:
        return None


def examine(config: Config, cluster: Cluster, tell: Callable[[str], None]) -> dict[str, Any]:
    """Return all that is printed: compiled rows (`program.collectives.CollectiveRow`) beside the closed form, or that alone.

    Args:
      config: a valid config with a resolved mesh.
      tell: called with progress lines.

    Raises:
      ExplainedError: programs cannot be compiled for the chip.
    """
    chip, obstacle = cluster.chip.target, deviceless.find_obstacle()
    find_target(chip)
    tell(f"the closed form alone: {obstacle}" if obstacle else f"compiling for {cluster.devices} x {chip} ...")
    sums, missing = expectation(config)
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    whole: dict[str, Any] = {
        "config": config.name,
        "chip": chip,
        "devices": math.prod(config.mesh.shape),
        "mesh": {axis: size for axis, size in zip(MESH_AXES, config.mesh.shape, strict=True) if size > 1},
        "compiled": obstacle is None,
        "no_formula": missing,
    }
    if whole["compiled"]:
        report = deviceless.report_in_subprocess(config, chip, cluster.devices_per_host)
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
    """Return whether the compiled bytes are more than 2% off the closed form, or absent from it."""
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


def show(whole: dict[str, Any], console: Console) -> None:
    """Print the table and three lines below it."""
    compiled, has_formula = whole["compiled"], not whole["no_formula"]
    mesh = " x ".join(f"{axis}={size}" for axis, size in whole["mesh"].items()) or "one device"
    source = "compiled" if compiled else "closed form"
    table = plain_table(f"{whole['config']} on {whole['devices']} x {whole['chip']}, {mesh}: a device's step, {source}")
    heads = ["axes", "collective", "dtype", "calls", "MiB", "wire MiB"]
    heads += (["hidden", "exposed"] + (["formula MiB", ""] if has_formula else [])) if compiled else []
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i < 3 or not head else "right", no_wrap=True)
    for row in whole["rows"]:
        table.add_row(*_cells(row, compiled, has_formula), style="bold red" if row["deviates"] else None)
    if not whole["rows"]:
        table.caption = "nothing travels"
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
