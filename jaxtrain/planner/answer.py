"""The planner's answer: the question and the result, as tables and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from jaxtrain.config import Config, to_plain
from jaxtrain.planner.estimates import Cluster, Estimate, SearchResult
from jaxtrain.planner.ladder import Forecast
from jaxtrain.planner.wording import (
    FIGURES,
    MEMORY_WORDS,
    cluster_words,
    gib,
    how_words,
    mesh_words,
    present,
)
from jaxtrain.tables import plain_table

SECONDS_A_DAY = 86400.0
JOULES_A_KWH = 3.6e6


@dataclass(frozen=True)
class Bill:
    """The cost of a whole training run."""

    tokens: float
    steps: int
    seconds: float
    gpu_hours: float
    kilowatt_hours: float | None
    """Energy of the chips alone: hosts, network and cooling come on top. None if the chip's power is not published."""
    money: float | None
    """Price of all GPU-hours; None without a price."""
    deadline_seconds: float | None = None
    """The requested duration, if any."""


@dataclass(frozen=True)
class Plan:
    """A question and its answer."""

    config: Config
    """The given config, whose layout the search replaces."""
    cluster: Cluster
    objective: str
    search: SearchResult
    ranked: tuple[Estimate, ...]
    """Best first; verified ones have the compiled program's figures."""
    words: tuple[str, ...]
    """The reasons, one paragraph each."""
    bill: Bill | None = None
    forecast: Forecast | None = None
    """The loss that the bill's tokens reach, by a ladder."""

    @property
    def best(self) -> Estimate | None:
        """The best layout, or None if none fits."""
        return self.ranked[0] if self.ranked else None


def make_bill(estimate: Estimate, tokens: float, days: float, price_per_gpu_hour: float) -> Bill | None:
    """Return the cost of `tokens` tokens, else of `days` days, or None if neither is given.

    GPU-hours = devices x hours; kWh = joules per step x steps / 3.6e6; money = GPU-hours x price.
    """
    if not tokens and not days:
        return None
    wanted = tokens or estimate.tokens_per_second * days * SECONDS_A_DAY
    steps = math.ceil(wanted / estimate.tokens)
    duration = steps * estimate.time.total
    hours = estimate.cluster.devices * duration / 3600
    return Bill(
        tokens=wanted,
        steps=steps,
        seconds=duration,
        gpu_hours=hours,
        kilowatt_hours=None if estimate.joules is None else estimate.joules * steps / JOULES_A_KWH,
        money=hours * price_per_gpu_hour if price_per_gpu_hour else None,
        deadline_seconds=days * SECONDS_A_DAY if tokens and days else None,
    )


def ranking_table(ranked: Sequence[Estimate], title: str) -> Table:
    """Return a table of the layouts, best first: time, use of the chips, and traffic."""
    table, heads = plain_table(title), [head for head in FIGURES if head != "GiB"]
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("mesh; schedule, microbatches,\nremat, choices", min_width=30)
    for head in heads:
        table.add_column(head.replace(" GiB", "\nGiB"), justify="right", no_wrap=True)
    table.add_column("from", no_wrap=True)
    for rank, layout in enumerate(ranked, 1):
        name = Text.assemble(mesh_words(layout.config.mesh), "\n", (how_words(layout.config), "dim"))
        figures = (FIGURES[head](layout) for head in heads)
        table.add_row(str(rank), name, *figures, layout.origin, style="bold" if rank == 1 else None)
    return table


def memory_table(ranked: Sequence[Estimate]) -> Table:
    """Return a table of the fullest device's memory by category, against its budget."""
    table = plain_table("Memory of the fullest device, GiB")
    table.add_column("#", justify="right")
    words = present(MEMORY_WORDS, [estimate.memory for estimate in ranked])
    for head in (*words.values(), "total", "budget", "used"):
        table.add_column(head, justify="right", no_wrap=True)
    for rank, estimate in enumerate(ranked, 1):
        budget = estimate.cluster.budget_bytes
        table.add_row(
            str(rank),
            *(gib(getattr(estimate.memory, name)) for name in words),
            gib(estimate.memory.total),
            gib(budget) if math.isfinite(budget) else "?",
            f"{estimate.memory.total / budget:.0%}" if math.isfinite(budget) else "?",
            style=None if estimate.fits else "red",
        )
    return table


def plan_title(plan: Plan) -> str:
    """Return a title: "70b on 128 × h100-sxm (16 hosts of 8), best by time"."""
    return f"{plan.config.name} on {cluster_words(plan.cluster)}, best by {plan.objective}"


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def estimate_json(estimate: Estimate) -> dict[str, Any]:
    """Return one layout with every figure, in base units (bytes, seconds, joules); unknown ones are null."""
    config = estimate.config
    same = ("mesh", "origin", "fits", "mfu", "tokens_per_second", "bubble", "model_flops", "joules_per_token")
    return {name: getattr(estimate, name) for name in same} | {
        "schedule": config.pipeline.schedule,
        "chunks": config.pipeline.chunks,
        "microbatches": config.train.microbatches,
        "remat": config.train.remat,
        "remat_save": list(config.train.remat_save),
        "zero": config.sharding.zero,
        "context_attention": config.sharding.context_attention,
        "take_turns": config.sharding.take_turns,
        "step_seconds": estimate.time.total,
        "time": dataclasses.asdict(estimate.time),
        "memory_bytes": estimate.memory.total,
        "memory": dataclasses.asdict(estimate.memory),
        "budget_bytes": _finite(estimate.cluster.budget_bytes),
        "in_host_bytes": estimate.sent(crosses_hosts=False),
        "network_bytes": estimate.sent(crosses_hosts=True),
        "wires": [dataclasses.asdict(wire) for wire in estimate.wires],
        "flops_per_device": estimate.flops,
    }


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return the whole answer, with the winner's whole config."""
    found = plan.search
    return {
        "config": plan.config.name,
        "cluster": cluster_json(plan.cluster),
        "objective": plan.objective,
        "ranked": [estimate_json(estimate) for estimate in plan.ranked],
        "best_config": to_plain(plan.best.config) if plan.best else None,
        "words": list(plan.words),
        "bill": dataclasses.asdict(plan.bill) if plan.bill else None,
        "forecast": dataclasses.asdict(plan.forecast) if plan.forecast else None,
        "search": {"candidates": found.candidates, "pruned": dict(found.pruned), "seconds": found.seconds},
        "pareto": [estimate_json(estimate) for estimate in found.pareto],
        "leanest": estimate_json(found.leanest) if found.leanest else None,
        "smallest_cluster": cluster_json(found.smallest) if found.smallest else None,
    }


def cluster_json(cluster: Cluster) -> dict[str, Any]:
    """Return the cluster of the plan."""
    return {
        "hardware": cluster.chip.name,
        "hosts": cluster.hosts,
        "devices_per_host": cluster.devices_per_host,
        "devices": cluster.devices,
        "budget_bytes": _finite(cluster.budget_bytes),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
