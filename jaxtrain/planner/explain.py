"""Explain one layout: each device's memory, each mesh axis's traffic in a step, and the schedule as a text picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxtrain.config import MESH_AXES, Config
from jaxtrain.config.rules import validate
from jaxtrain.mesh import split_over_hosts
from jaxtrain.ops.float8_choice import choose_matmuls
from jaxtrain.parallel.pipeline_schedule import bubble_fraction, live_parts, make_schedule, schedule_of
from jaxtrain.planner import formulas
from jaxtrain.planner.answer import estimate_json
from jaxtrain.planner.cost import estimate
from jaxtrain.planner.estimates import Cluster, Estimate
from jaxtrain.planner.formulas_collectives import Transfers, collectives
from jaxtrain.planner.memory import host_bytes
from jaxtrain.planner.timeline import text_gantt, timeline_of
from jaxtrain.planner.wording import MEMORY_WORDS, TIME_WORDS, cluster_words, gib, layout_words, percent, present, seconds
from jaxtrain.program.collectives import summed
from jaxtrain.tables import plain_table, print_table
from jaxtrain.telemetry.flops import num_parameters

SMALL = 8 * 2**20
"""Bytes below which transfers are listed together as small ones."""
HOLDS = {
    "parameters": "master weights in {param_dtype}, {held:,} of {all:,}",
    "optimizer": "state of {optimizer}",
    "gradients": "in float32, as they are accumulated",
    "weights": "copies in {dtype}, and those gathered",
    "activations": "kept for the backward pass, of at most {live} passes at a time",
    "other_models": "a teacher's weights, or those that rewards stay near",
    "rollouts": "the cache of rollouts, beyond what only a step holds",
    "kernels": "what cuDNN's attention within documents needs for gradients",
    "working": "one layer or the head while it is computed, buffers of transfers",
}


@dataclass(frozen=True)
class Explanation:
    """A layout, and the place of its axes."""

    estimate: Estimate
    entries: tuple[Transfers, ...]
    """The closed form's transfers with their purposes; empty if it does not cover the config."""
    uncovered: str
    """Why the closed form does not cover the config."""
    inside: tuple[int, ...]
    """Factor of each mesh axis inside a host."""
    live_parts: int
    """Largest number of (microbatch, chunk) whose activations a stage keeps at one time."""

    def show(self, console: Console) -> None:
        """Print everything."""
        layout = self.estimate
        console.print(
            f"{layout.config.name} on {cluster_words(layout.cluster)}: {layout_words(layout)}", style="bold", highlight=False
        )
        if not layout.fits:
            over = layout.memory.total - layout.cluster.budget_bytes
            console.print(
                f"does not fit: {gib(over)} GiB over the budget of the fullest device", style="bold red", highlight=False
            )
        for table in (holdings_table(self), axes_table(self), time_table(layout)):
            print_table(console, table)
        console.print(schedule_heading(layout.config), style="bold", highlight=False)
        console.print(text_gantt(timeline_of(layout.config), console.width), highlight=False, soft_wrap=True)


def explain(config: Config, cluster: Cluster) -> Explanation:
    """Return the explanation of the config's own layout on a cluster.

    Raises:
      ConfigError: the config is not valid on so many devices, or its mesh does not fill the hosts.
    """
    config, _ = choose_matmuls(validate(config, cluster.devices), cluster.chip)
    inside, _ = split_over_hosts(config.mesh.shape, min(cluster.devices_per_host, cluster.devices))
    try:
        entries, uncovered = tuple(collectives(config)), ""
    except ValueError as error:
        entries, uncovered = (), str(error)
    schedule = schedule_of(config)
    return Explanation(estimate(config, cluster), entries, uncovered, inside, max(live_parts(schedule)))


def explain_json(explanation: Explanation) -> dict[str, Any]:
    """Return the explanation as JSON values."""
    return estimate_json(explanation.estimate) | {
        "devices": explanation.estimate.cluster.devices,
        "inside_hosts": dict(zip(MESH_AXES, explanation.inside, strict=True)),
        "live_parts": explanation.live_parts,
        "bytes_on_host": host_bytes(explanation.estimate.config),
        "transfers": [dataclasses.asdict(entry) | {"wire": entry.wire} for entry in explanation.entries],
        "uncovered": explanation.uncovered,
    }


def holdings_table(explanation: Explanation) -> Table:
    """Return a table of the fullest device's memory."""
    layout = explanation.estimate
    config, memory, budget = layout.config, layout.memory, layout.cluster.budget_bytes
    words = {
        "param_dtype": " and ".join(filter(None, (config.lora.base, config.model.param_dtype))),
        "dtype": " and ".join(("float8",) * (config.model.matmul_dtype == "float8") + (config.model.dtype,)),
        "optimizer": config.optimizer.name,
        "held": formulas.parameters_held(config),
        "all": num_parameters(config.model).total,
        "live": explanation.live_parts,
    }
    table = _table("The fullest device holds", ("", "GiB", "of the budget", "what"), numbers=("GiB", "of the budget"))
    for name, title in present(MEMORY_WORDS, [memory]).items():
        value = getattr(memory, name)
        table.add_row(title, gib(value), _share(value, budget), HOLDS[name].format(**words))
    room = f"budget {gib(budget)} GiB" if math.isfinite(budget) else "the chip's memory is not known"
    table.add_row("in all", gib(memory.total), _share(memory.total, budget), room, style="bold" if layout.fits else "bold red")
    if on_host := host_bytes(config):
        parts = " and ".join(f"{gib(size)} GiB of {name}" for name, size in on_host.items())
        of_all = gib(sum(on_host.values()) * min(layout.cluster.devices_per_host, layout.cluster.devices))
        table.caption = f"and {parts} in the host's memory, of all its devices {of_all} GiB"
    return table


def axes_table(explanation: Explanation) -> Table:
    """Return a table of a device's traffic along each axis in a step, with its purpose; times are those of the cost model."""
    layout = explanation.estimate
    heads = ("axes", "what", "collective", "dtype", "calls", "GiB sent", "over")
    table = _table("Each axis moves, a device and step", heads, numbers=("calls", "GiB sent"))
    for (axes, purpose, kind, dtype), sums in grouped(explanation.entries).items():
        across = any(getattr(layout.config.mesh, axis) > explanation.inside[MESH_AXES.index(axis)] for axis in axes.split("+"))
        table.add_row(
            axes, purpose, kind, dtype, f"{sums['calls']:,.0f}", gib(sums["wire"]), "network" if across else "in host"
        )
    small = sum(entry.wire for entry in explanation.entries if entry.wire < SMALL)
    if small:
        table.add_row("", "counts, losses, norms and what else is small", "", "", "", gib(small), "", style="dim")
    if not explanation.entries and explanation.uncovered:
        for wire in layout.wires:
            across = "network" if wire.crosses_hosts else "in host"
            table.add_row(wire.axes, "", wire.kind, wire.dtype, "", gib(wire.bytes), across)
        table.caption = explanation.uncovered
    elif not explanation.entries:
        table.caption = "nothing: one device"
    return table


def grouped(entries: Sequence[Transfers]) -> dict[tuple[str, str, str, str], dict[str, float]]:
    """{(axes, purpose, kind, dtype): calls and bytes sent (wire)}, without small entries."""

    def key(entry: Transfers) -> tuple[str, str, str, str]:
        purpose = "gradients of weights" if entry.purpose.startswith("gradient of ") else entry.purpose
        return entry.axes, purpose, entry.kind, entry.dtype

    return summed([entry for entry in entries if entry.wire >= SMALL], key, ("calls", "wire"))


def time_table(layout: Estimate) -> Table:
    """Return a table of the step's time by part."""
    table = _table("A step takes", ("", "time", "share"), numbers=("time", "share"))
    for name, title in present(TIME_WORDS, [layout.time]).items():
        value = getattr(layout.time, name)
        table.add_row(title, seconds(value), f"{value / layout.time.total:.1%}")
    rate = f"{layout.tokens_per_second:,.0f} tokens/s, MFU {percent(layout.mfu)}"
    table.add_row("in all", seconds(layout.time.total), rate, style="bold")
    return table


def schedule_heading(config: Config) -> str:
    """Return the line above the picture of the schedule."""
    count = config.train.microbatches
    if config.mesh.pipe == 1:
        return f"Schedule: one stage, {count} microbatch{'es' if count > 1 else ''} one after the other"
    schedule = make_schedule(config.pipeline.schedule, config.mesh.pipe, config.pipeline.chunks, count)
    chunks = f", {config.pipeline.chunks} chunks a stage" if config.pipeline.chunks > 1 else ""
    return (
        f"Schedule: {config.pipeline.schedule}, {config.mesh.pipe} stages{chunks}, {count} microbatches, "
        f"bubble {bubble_fraction(schedule):.1%}"
    )


def _table(title: str, heads: Sequence[str], numbers: Sequence[str]) -> Table:
    table = plain_table(title)
    table.caption_justify = "left"
    for head in heads:
        table.add_column(head, justify="right" if head in numbers else "left", no_wrap=head in numbers)
    return table


def _share(value: float, budget: float) -> str:
    return f"{value / budget:.1%}" if math.isfinite(budget) else "?"
