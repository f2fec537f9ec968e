"""Format figures and layouts for the planner: the same words in the terminal, in JSON's keys and on the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from jaxtrain.config import MESH_AXES, Config, MeshConfig
from jaxtrain.planner.estimates import Cluster, Estimate, Memory, StepTime, Wire

GIBI = 2**30
MEMORY_WORDS = {field.name: field.name.replace("_", " ") for field in fields(Memory)} | {"weights": "weights in use"}
"""Names of `estimates.Memory`'s fields in tables."""
TIME_WORDS = {field.name: field.name.replace("_", " ") for field in fields(StepTime)}
TIME_WORDS |= {"matmul": "matmuls", "memory_bound": "memory-bound", "exposed": "transfers"}
"""Names of `estimates.StepTime`'s fields in tables."""


def present(words: Mapping[str, str], parts: Sequence[Any]) -> dict[str, str]:
    """Return the names of fields, those that few layouts have only where one of the parts has some."""
    few = ("other_models", "kernels", "rollouts")
    return {name: title for name, title in words.items() if name not in few or any(getattr(part, name) for part in parts)}


def _three(value: float) -> str:
    """Return three digits, "8.00", or all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


def gib(count: float) -> str:
    """Return bytes as GiB: "61.3", or "0.021" for small ones."""
    value = count / GIBI
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}" if value >= 1 or not value else f"{value:.2g}"


def scaled(value: float, unit: str = "") -> str:
    """Return a number with three digits and a prefix: "1.41 M", "12.3 k"."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return (
                f"{value / factor:.3g} {prefix}{unit}"
                if abs(value) < 1000 * factor
                else f"{value / factor:,.0f} {prefix}{unit}"
            )
    return f"{value:.3g} {unit}".strip()


def seconds(value: float) -> str:
    """Return a short time: "12.4 s", "830 ms", "12 µs"."""
    if not math.isfinite(value):
        return "never"
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= factor:
            return f"{_three(value / factor)} {unit}"
    return "0 s" if not value else f"{value:.2g} s"


def duration(value: float) -> str:
    """Return a long time in a fitting unit: "41 min", "5.2 hours", "23 days", "2.1 years"."""
    for factor, unit in ((365.25 * 86400, "years"), (2 * 86400, "days"), (2 * 3600, "hours"), (120, "min")):
        if value >= factor:
            size = {"years": 365.25 * 86400, "days": 86400, "hours": 3600, "min": 60}[unit]
            return f"{_three(value / size)} {unit}"
    return seconds(value)


def percent(share: float | None) -> str:
    """Return "41.2%", or "?" if unknown."""
    return "?" if share is None else f"{share:.1%}"


def joules(value: float | None) -> str:
    """Return the joules per token in three digits, or "?"."""
    return "?" if value is None else f"{value:#.3g}".rstrip(".")


def mesh_words(mesh: MeshConfig) -> str:
    """Return the axes above 1: "pipe=4 × fsdp=4 × tensor=8"."""
    return shape_words(mesh.shape)


def shape_words(shape: Sequence[int]) -> str:
    """Return the axes above 1, from sizes in the order of MESH_AXES."""
    return " × ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True) if size > 1) or "one device"


def schedule_words(config: Config) -> str:
    """Return "1f1b" or "interleaved × 2"; "-" without a pipeline."""
    if config.mesh.pipe == 1:
        return "-"
    return config.pipeline.schedule + (f" × {config.pipeline.chunks}" if config.pipeline.chunks > 1 else "")


def remat_words(config: Config) -> str:
    """Return "full", or "named: attention, mlp_out"."""
    kept = ", ".join(config.train.remat_save)
    return f"named: {kept}" if config.train.remat == "named" else config.train.remat


def options_words(config: Config) -> str:
    """Return a layout's further choices: "ZeRO 2, ring"."""
    words = [f"ZeRO {config.sharding.zero}"] if config.mesh.fsdp > 1 else []
    return ", ".join(words + ([config.sharding.context_attention] if config.mesh.context > 1 else [])) or "-"


def how_words(config: Config) -> str:
    """Return a layout's choices beside its mesh: "1f1b, 16 microbatches, remat full, ZeRO 3"."""
    count = config.train.microbatches
    parts = [schedule_words(config)] if config.mesh.pipe > 1 else []
    parts += [f"{count} microbatch{'es' if count > 1 else ''}", f"remat {remat_words(config)}"]
    return ", ".join(parts + ([options_words(config)] if options_words(config) != "-" else []))


def layout_words(estimate: Estimate) -> str:
    """Return a layout in a sentence: "pipe=4 × tensor=8 (1f1b, 16 microbatches, remat full)"."""
    return f"{mesh_words(estimate.config.mesh)} ({how_words(estimate.config)})"


def cluster_words(cluster: Cluster) -> str:
    """Return "128 × h100-sxm (16 hosts of 8)"."""
    hosts = f"{cluster.hosts:,} host{'s' if cluster.hosts > 1 else ''} of {cluster.devices_per_host}"
    return f"{cluster.devices:,} × {cluster.chip.name} ({hosts})"


def link_words(wire: Wire) -> str:
    """Return the name of a transfer's links: inside a host, or the network between hosts."""
    return "the network between hosts" if wire.crosses_hosts else "the links inside a host"


FIGURES: Mapping[str, Callable[[Estimate], str]] = {
    "step": lambda layout: seconds(layout.time.total),
    "MFU": lambda layout: percent(layout.mfu),
    "tokens/s": lambda layout: f"{layout.tokens_per_second:,.0f}",
    "GiB": lambda layout: gib(layout.memory.total),
    "in-host GiB": lambda layout: gib(layout.sent(crosses_hosts=False)),
    "network GiB": lambda layout: gib(layout.sent(crosses_hosts=True)),
    "bubble": lambda layout: percent(layout.bubble),
    "J/token": lambda layout: joules(layout.joules_per_token),
}
"""{head of a column: what tables of layouts have in it}."""
