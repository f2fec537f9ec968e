"""Fill a grid of layouts: by estimates, by compiling each, or by training each for a few steps."""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_origin

from rich.table import Table

from jaxtrain.config import Config
from jaxtrain.config.loading import for_another_process
from jaxtrain.config.names import NoSuchField, field_hint, read_value, set_field, with_fields
from jaxtrain.config.rules import find_problems
from jaxtrain.errors import ExplainedError, UsageError
from jaxtrain.planner.answer import estimate_json
from jaxtrain.planner.cost import estimate
from jaxtrain.planner.estimates import Cluster, Estimate
from jaxtrain.planner.verify import compiled
from jaxtrain.planner.wording import FIGURES, mesh_words, seconds
from jaxtrain.tables import plain_table
from jaxtrain.telemetry.metrics import read_rows

Way = Literal["estimate", "compile", "run"]
MOST_ROWS = 512
MEASURED = ("first loss", "last loss", "measured step", "estimated")
ESTIMATED = ("step", "MFU", "tokens/s", "GiB", "of budget", "bubble", "J/token")


@dataclass(frozen=True)
class Measured:
    """Measurements of a real run of a few steps."""

    losses: tuple[float, ...]
    """Loss of each step, nats per token."""
    step_seconds: float
    """Median of the steps after the first."""


@dataclass(frozen=True)
class SweepRow:
    """One point of the grid."""

    values: dict[str, str]
    """Fields and their values, as given."""
    estimate: Estimate | None = None
    measured: Measured | None = None
    config: Config | None = None
    """A valid config with a resolved mesh."""
    problem: str = ""
    """Why there is no result: the config is not valid, or the compiler or the run failed."""


# ---------------------------------------------------------------------------------------------------------------------
# The grid


def parse_axis(text: str) -> tuple[str, list[str]]:
    """Parse "mesh.tensor=1,2,4" into a field and its values.

    Raises:
      UsageError: it has another form.
    """
    name, equals, values = text.partition("=")
    items = [item.strip() for item in values.split(",")]
    if not equals or not all((name, *items)):
        raise UsageError(f"--sweep {text}: give FIELD=VALUE,VALUE,... such as mesh.tensor=1,2,4,8")
    return name, list(dict.fromkeys(items))


def replace_field(config: Config, name: str, text: str) -> Config:
    """Return the config with one field, given by its dotted name, read from text; items of a tuple are joined by +.

    Raises:
      UsageError: no such field, or text that is no value of its type.
    """
    try:
        hint = field_hint(name)
        return set_field(config, name, read_value(text.replace("+", ",") if get_origin(hint) is tuple else text, hint))
    except NoSuchField as error:
        raise UsageError(f"--sweep {name}: {error}") from None
    except ExplainedError as error:
        raise UsageError(f"--sweep {name}={text}: {error}") from None


def grid(config: Config, sweeps: Sequence[str]) -> list[tuple[dict[str, str], Config]]:
    """Return every combination of the values, the last field changing fastest, with its config.

    Raises:
      UsageError: an invalid field or value, or more than MOST_ROWS combinations.
    """
    axes = dict(parse_axis(text) for text in sweeps)
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if len(combinations) > MOST_ROWS:
        raise UsageError(f"--sweep: {len(combinations):,} combinations; give at most {MOST_ROWS}")
    configs = []
    for values in combinations:
        changed = config
        for name, text in values.items():
            changed = replace_field(changed, name, text)
        configs.append((values, changed))
    return configs


# ---------------------------------------------------------------------------------------------------------------------
# The ways to fill it


def sweep(
    config: Config, cluster: Cluster, sweeps: Sequence[str], way: Way, steps: int, tell: Callable[[str], None]
) -> list[SweepRow]:
    """Fill the grid row by row.

    Args:
      way: estimate by closed forms, compile for the chip, or run `steps` steps of training in a process of its own.
      tell: called with progress lines.
    """
    rows, points = [], grid(config, sweeps)
    for number, (values, changed) in enumerate(points, 1):
        if way != "estimate":
            tell(f"{number} of {len(points)}: {', '.join(f'{name}={text}' for name, text in values.items())}")
        resolved, problems = find_problems(changed, cluster.devices)
        rows.append(SweepRow(values, problem=problems[0]) if problems else _fill(values, resolved, cluster, way, steps))
    return rows


def _fill(values: dict[str, str], config: Config, cluster: Cluster, way: Way, steps: int) -> SweepRow:
    """Return one row of a valid config."""
    try:
        if way == "run":
            return SweepRow(values, _estimate_if_known(config, cluster), run(config, cluster, steps), config)
        layout = estimate(config, cluster)
        return SweepRow(values, compiled(layout) if way == "compile" else layout, config=config)
    except ExplainedError as error:
        return SweepRow(values, problem=str(error).splitlines()[0])


def _estimate_if_known(config: Config, cluster: Cluster) -> Estimate | None:
    """Return the estimate beside a measurement; None for a chip without stated figures."""
    try:
        return estimate(config, cluster)
    except ExplainedError:
        return None


def run(config: Config, cluster: Cluster, steps: int) -> Measured:
    """Train in a process of its own, `jaxtrain train`, and read its metrics.

    On a chip named cpu the devices are fake ones, as many as the cluster has; else they are those that jax finds.

    Raises:
      ExplainedError: the run failed; gives its last line.
    """
    bare = {"train.steps": steps, "train.log_every": 1, "train.validate_every": 0, "train.sample_tokens": 0}
    bare |= {"checkpoint.every": 0, "checkpoint.resume": "never", "telemetry.profile": ""}
    with tempfile.TemporaryDirectory(prefix="jaxtrain-sweep-") as folder:
        file, run_dir = Path(folder) / "config.json", Path(folder) / "run"
        file.write_text(for_another_process(with_fields(config, bare | {"run_dir": str(run_dir)})), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "jaxtrain", "train", f"--config={file}"],
            env=_environment(cluster),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if done.returncode:
            said = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()] or ["no output"]
            explained = next((line for line in said if line.startswith("error: ")), said[-1])
            raise ExplainedError(f"the run ended with exit code {done.returncode}: {explained.removeprefix('error: ')}")
        return read_metrics(run_dir / "metrics.jsonl")


def _environment(cluster: Cluster) -> dict[str, str]:
    if cluster.chip.name != "cpu":
        return dict(os.environ)
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={cluster.devices}")
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}


def read_metrics(metrics_jsonl: Path) -> Measured:
    """Return the losses of all steps, and the median of their times without the first, which warms up."""
    rows = read_rows(metrics_jsonl)
    losses, times = (tuple(row[name] for row in rows if row.get(name) is not None) for name in ("loss", "step_seconds"))
    return Measured(losses, statistics.median(times[1:] or times))


# ---------------------------------------------------------------------------------------------------------------------
# The answer


def sweep_table(rows: Sequence[SweepRow], way: Way) -> Table:
    """Return the grid as a table; the fastest row that fits is bold."""
    table = plain_table(f"Sweep, by {way}")
    for name in rows[0].values:
        table.add_column(name, justify="right")
    heads = MEASURED if way == "run" else ESTIMATED
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("mesh")
    best = min((row for row in rows if _time(row) is not None), key=lambda row: _time(row) or 0.0, default=None)
    for row in rows:
        cells = [""] * len(heads) if row.problem else _measured_cells(row) if way == "run" else _estimated_cells(row)
        tail = row.problem or (mesh_words(row.config.mesh) if row.config else "")
        style = "dim" if row.problem else "bold green" if row is best else None
        table.add_row(*row.values.values(), *cells, tail, style=style)
    return table


def _time(row: SweepRow) -> float | None:
    """Return the time that rows are compared by: measured, or estimated if it fits."""
    if row.measured:
        return row.measured.step_seconds
    return row.estimate.time.total if row.estimate and row.estimate.fits and not row.problem else None


def _measured_cells(row: SweepRow) -> list[str]:
    assert row.measured is not None
    beside = seconds(row.estimate.time.total) if row.estimate else "?"
    losses = row.measured.losses
    return [f"{losses[0]:.4f}", f"{losses[-1]:.4f}", seconds(row.measured.step_seconds), beside]


def _estimated_cells(row: SweepRow) -> list[str]:
    layout = row.estimate
    assert layout is not None
    used = layout.memory.total / layout.cluster.budget_bytes
    figures = {head: figure(layout) for head, figure in FIGURES.items()}
    figures["of budget"] = f"{used:.0%}" + ("" if layout.fits else " does not fit")
    return [figures[head] for head in ESTIMATED]


def sweep_json(rows: Sequence[SweepRow]) -> list[dict[str, Any]]:
    """Return the grid as JSON values."""
    return [
        {
            "values": row.values,
            "problem": row.problem,
            "estimate": estimate_json(row.estimate) if row.estimate else None,
            "measured": dataclasses.asdict(row.measured) if row.measured else None,
        }
        for row in rows
    ]
