"""`python -m jaxtrain.plan --config=configs/70b.py --hardware=h100-sxm --hosts=16`: which mesh, does it fit, what does it cost.

Searches every layout of the config's model and batch on that cluster, none of which needs to be there, compiles the best few
for its chip, and prints a ranking with its reasons. `--explain` speaks of the config's own layout instead, `--sweep` of a grid.

Exit codes: 0 done, 1 nothing fits or another error explained in one message, 2 wrong usage.
"""

from __future__ import annotations

if __name__ == "__main__":
    import jaxtrain.early  # noqa: F401, before all else: Ctrl-C ends the program from here on
    from jaxtrain import cli

    cli.run("jaxtrain.plan")

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from jaxtrain.command_line import parse_with_flags
from jaxtrain.config import MESH_AXES, Config, MeshConfig, PipelineConfig
from jaxtrain.config_rules import validate
from jaxtrain.errors import EXIT_DONE, ExplainedError, UsageError, check_output
from jaxtrain.files import replace_file
from jaxtrain.hardware import load_chip
from jaxtrain.paths import user_path
from jaxtrain.planner.estimates import Cluster, Estimate
from jaxtrain.text import open_console

DESCRIPTION = (
    "Find the best layout of a config on a cluster that need not be there, and say what it takes. Layout flags of the config "
    "(mesh, pipeline, microbatches, remat, ZeRO) are what is searched; with --explain or --sweep they count as given."
)
MOST_SHOWN = 10
WIDTH = 180
"""Columns of the tables where there is no terminal."""


@dataclass(frozen=True)
class Flags:
    """What to plan for, and what to make of it."""

    hardware: str = "h100-sxm"
    """Chip: a name in hardware.py, or a file (.json, .toml) that describes one, as `python -m jaxtrain.calibrate` writes it."""
    hosts: int = 1
    """Hosts in the cluster."""
    devices_per_host: int = 8
    """Chips in a host, which reach each other over the chip's own links."""
    objective: Literal["time", "energy", "cost"] = "time"
    """What to rank by: seconds, joules or money a token."""
    verify: int | None = None
    """How many of the best to compile for that chip, and rank again by what the program holds and moves; 0 for none. By default
    5 where this machine can compile for the chip; without that, a number compiles for fake CPU devices (slow, approximate)."""
    explain: bool = False
    """No search: what each device holds, what each axis moves, and the schedule of the config's own layout."""
    sweep: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """No search: a grid, FIELD=VALUE,VALUE,... (mesh.tensor=1,2,4,8); several make a product."""
    compile: bool = False
    """With --sweep: compile every layout instead of estimating it."""
    run: bool = False
    """With --sweep: train every layout for --steps steps, on the devices at hand or, with --hardware=cpu, on fake ones."""
    steps: int = 5
    """With --sweep --run: steps to train."""
    tokens: float = 0
    """Tokens to train on in all: how long, GPU-hours, kWh."""
    days: float = 0
    """How many tokens so many days give; with --tokens, whether they suffice."""
    price_per_gpu_hour: float = 0
    """Money for a GPU-hour, in any currency."""
    write: str = ""
    """Save the best layout as a config file, which jaxtrain.main runs unchanged."""
    html: str = ""
    """Save the answer as one page with pictures."""
    overwrite: bool = False
    """Let --write and --html replace a file that is there."""
    json: bool = False
    """Print JSON instead of tables."""


def check_flags(flags: Flags) -> None:
    """Raises UsageError for flags that are out of range or do not go together."""
    for name, least in (("hosts", 1), ("devices_per_host", 1), ("verify", 0), ("steps", 1)):
        value = getattr(flags, name)
        if value is not None and value < least:
            raise UsageError(f"--{name}={value}: give at least {least}")
    for name in ("tokens", "days", "price_per_gpu_hour"):
        value = getattr(flags, name)
        if not math.isfinite(value) or value < 0:
            raise UsageError(f"--{name}={value}: give a number of 0 or more")
    if flags.price_per_gpu_hour and not (flags.tokens or flags.days):
        raise UsageError("--price_per_gpu_hour needs to know for how long: give --tokens or --days too, e.g. --tokens=15e12")
    if flags.explain and flags.sweep:
        raise UsageError("--explain speaks of one layout and --sweep of many; give one of them")
    if (flags.compile or flags.run) and not flags.sweep:
        raise UsageError("--compile and --run go with --sweep, e.g. --sweep mesh.tensor=1,2,4 --run")
    if flags.compile and flags.run:
        raise UsageError("--compile and --run: give one of them")
    for name in ("write", "html"):
        if getattr(flags, name) and (flags.explain or flags.sweep):
            raise UsageError(f"--{name} saves the best layout of a search; leave out --explain and --sweep")
        if getattr(flags, name):
            check_output(f"--{name}", getattr(flags, name), flags.overwrite)


def make_cluster(flags: Flags) -> Cluster:
    """The cluster that the flags name.

    Raises:
      UsageError: no such chip, or a chip file that cannot be read.
    """
    try:
        return Cluster(load_chip(flags.hardware), flags.hosts, flags.devices_per_host)
    except UsageError:
        raise
    except ExplainedError as error:
        raise UsageError(str(error)) from error


def check_model(config: Config) -> None:
    """Raises ConfigError for what no layout can mend: whatever is wrong with the config on one device."""
    mesh = MeshConfig(**dict.fromkeys(MESH_AXES, 1))
    train, sync = dataclasses.replace(config.train, microbatches=1), dataclasses.replace(config.sync, mode="every_step")
    validate(dataclasses.replace(config, mesh=mesh, train=train, sync=sync, pipeline=PipelineConfig()), 1)


def tell(words: str) -> None:
    """A line on what is being done, beside the answer itself."""
    print(words, file=sys.stderr, flush=True)


def search_and_answer(config: Config, cluster: Cluster, flags: Flags) -> int:
    """Searches, verifies, explains, prints and saves; returns the exit code.

    Raises:
      ExplainedError: nothing fits; the message says what would.
    """
    check_model(config)

    import functools

    from jaxtrain.planner.answer import Plan, make_bill, plan_json
    from jaxtrain.planner.search import search
    from jaxtrain.planner.verify import choose_count, verify
    from jaxtrain.planner.words import explain_plan

    count, basis = choose_count(cluster.chip, flags.verify)
    tell(basis)
    look = functools.partial(search, objective=flags.objective)
    found = look(config, cluster)
    tell(f"{found.candidates:,} layouts in {found.seconds:.1f} s")
    ranked = found.ranked
    if ranked and count:
        ranked = tuple(verify(ranked, count, objective=flags.objective))
    words = explain_plan(config, cluster, flags.objective, found, ranked, look)
    bill = make_bill(ranked[0], flags.tokens, flags.days, flags.price_per_gpu_hour) if ranked else None
    plan = Plan(config, cluster, flags.objective, found, ranked[:MOST_SHOWN], words, bill)
    if flags.json:
        print(json.dumps(plan_json(plan)))
    if not ranked:
        raise ExplainedError(words[0])
    try:
        if not flags.json:
            show(plan)
    finally:
        save(plan, flags)  # also where nobody reads the tables (`| head`)
    return EXIT_DONE


def show(plan: Any) -> None:
    """Prints the tables and the paragraphs."""
    from jaxtrain.planner.answer import memory_table, plan_title, ranking_table
    from jaxtrain.planner.tables import print_table
    from jaxtrain.planner.words import bill_words

    console = open_console(WIDTH)
    print_table(console, ranking_table(plan.ranked, plan_title(plan)))
    print_table(console, memory_table(plan.ranked))
    for paragraph in (*plan.words, *([bill_words(plan.bill)] if plan.bill else [])):
        console.print()
        console.print(paragraph, soft_wrap=not console.is_terminal)


def save(plan: Any, flags: Flags) -> None:
    """Writes the config and the page that were asked for.

    Raises:
      ExplainedError: a file cannot be written.
    """
    if flags.write:
        from jaxtrain.planner.config_source import write_config

        write_config(plan.best.config, flags.write, describe(plan.best))
        tell(f"wrote {flags.write}; run it: python -m jaxtrain.main --config={flags.write}")
    if flags.html:
        from jaxtrain.planner.page import render

        try:
            replace_file(user_path(flags.html), render(plan))
        except OSError as error:
            raise ExplainedError(
                f"--html={flags.html}: {error.strerror}; give a file in a folder that can be written"
            ) from error
        tell(f"wrote {flags.html}")


def describe(best: Estimate) -> str:
    """The docstring of a written config: what was planned, and what it said."""
    from jaxtrain.planner.wording import cluster_words, gib, layout_words, percent, seconds

    return (
        f"{best.config.name} on {cluster_words(best.cluster)}, as `python -m jaxtrain.plan` laid it out.\n\n"
        f"{layout_words(best)}: {seconds(best.time.total)} a step, {percent(best.mfu)} MFU, {best.tokens_per_second:,.0f} "
        f"tokens/s,\n{gib(best.memory.total)} GiB on the fullest device ({best.origin}).\n"
    )


def main(arguments: Sequence[str]) -> int:
    """Parses, checks, plans, prints; returns the exit code."""
    from jaxtrain.planner.tables import print_table

    flags, config = parse_with_flags(arguments, Flags, DESCRIPTION, "python -m jaxtrain.plan")
    check_flags(flags)
    cluster = make_cluster(flags)
    if flags.sweep:
        from jaxtrain.planner.sweep import Way, sweep, sweep_json, sweep_table

        way: Way = "run" if flags.run else "compile" if flags.compile else "estimate"
        rows = sweep(config, cluster, flags.sweep, way, flags.steps, tell)
        print(json.dumps(sweep_json(rows))) if flags.json else print_table(open_console(WIDTH), sweep_table(rows, way))
        return EXIT_DONE
    if flags.explain:
        from jaxtrain.planner.explain import explain, explain_json

        explanation = explain(config, cluster)
        print(json.dumps(explain_json(explanation))) if flags.json else explanation.show(open_console(WIDTH))
        return EXIT_DONE
    return search_and_answer(config, cluster, flags)
