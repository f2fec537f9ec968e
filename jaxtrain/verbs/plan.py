"""`jaxtrain plan --config=configs/70b.py --hardware=h100-sxm --hosts=16`: which mesh, does it fit, what does it cost.

Searches every layout of the config's model and batch on that cluster, which need not exist, compiles the best few for its chip,
and prints a ranking with its reasons. `--explain` describes the config's own layout instead, `--sweep` a grid of layouts.

Exit codes: 0 done, 1 nothing fits or another error explained in one message, 2 wrong usage.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from jaxtrain.command import Usage, parse
from jaxtrain.config import Config
from jaxtrain.errors import EXIT_DONE, ExplainedError, UsageError, violated
from jaxtrain.files import check_output, write_output
from jaxtrain.hardware import load_chip
from jaxtrain.text import open_console, tell

if TYPE_CHECKING:
    from jaxtrain.planner.answer import Plan
    from jaxtrain.planner.estimates import Cluster, Estimate

WIDTH = 180
"""Columns of the tables without a terminal."""


@dataclass(frozen=True)
class PlanFlags:
    """Flags of `jaxtrain plan`."""

    hardware: str = "h100-sxm"
    """Chip: a name in hardware/chips.toml, or a chip file (.json, .toml), as `jaxtrain calibrate` writes it."""
    hosts: int | None = None
    """Number of hosts; by default 1, with --explain as many as the mesh fills."""
    devices_per_host: int = 8
    """Chips per host, connected by the chip's own links."""
    objective: Literal["time", "energy", "cost"] = "time"
    """Quantity to rank by: seconds, joules or money per token."""
    verify: int | None = None
    """Number of best layouts to compile for that chip and rank again by the program's memory and traffic; 0: none. By default
    5 if this machine can compile for the chip; else a number compiles for fake CPU devices (slow, approximate)."""
    explain: bool = False
    """No search: print each device's memory, each axis's traffic, and the schedule of the config's own layout."""
    sweep: tuple[str, ...] = ()
    """No search: a grid, FIELD=VALUE,VALUE,... (mesh.tensor=1,2,4,8); several make a product."""
    compile: bool = False
    """With --explain: compare each collective of the compiled step with the closed form. With --sweep: compile every layout
    instead of estimating it."""
    run: bool = False
    """With --sweep: train every layout for --steps steps, on the devices at hand or, with --hardware=cpu, on fake ones."""
    steps: int = 5
    """With --sweep --run: steps to train."""
    tokens: float = 0
    """Total tokens to train on; prints days, GPU-hours, kWh."""
    days: float = 0
    """Days to train; prints the tokens that they give, or with --tokens whether they suffice."""
    price_per_gpu_hour: float = 0
    """Price of a GPU-hour, in any currency."""
    ladder: str = ""
    """File that `jaxtrain ladder` wrote: prints the loss that the tokens, or else train.steps, reach."""
    write: str = ""
    """File for the best layout as a config, .py or .json, which `jaxtrain train` runs unchanged."""
    html: str = ""
    """File for the answer as one page with pictures."""
    overwrite: bool = False
    """Let --write and --html replace an existing file."""
    json: bool = False
    """Print JSON instead of tables."""


USAGE = Usage(
    "plan",
    "Find the best layout of a config on a cluster that need not be there, and say what it takes. Layout flags of the config "
    "(mesh, pipeline, microbatches, remat, ZeRO) are what is searched; with --explain or --sweep they count as given.",
    PlanFlags,
)


def main(arguments: Sequence[str]) -> int:
    """Parse, check, plan, print; return the exit code."""
    line = parse(USAGE, arguments)
    flags, config = line.own, line.config
    check_flags(flags)
    cluster = make_cluster(config, flags)
    if config.train.stages and (flags.sweep or flags.explain):
        config = of_one_stage(config, cluster)
    if flags.sweep:
        return sweep(config, cluster, flags)
    if flags.explain:
        return explain(config, cluster, flags)

    from jaxtrain.planner.answer import plan_json
    from jaxtrain.planner.ladder import open_ladder, parameters_of, tokens_of
    from jaxtrain.planner.plan import make_plan

    ladder = open_ladder(flags.ladder, config) if flags.ladder else None
    plan = make_plan(config, cluster, flags.objective, flags.verify, flags.tokens, flags.days, flags.price_per_gpu_hour, tell)
    if ladder:
        tokens = plan.bill.tokens if plan.bill else tokens_of(config)
        plan = replace(plan, forecast=ladder.forecast(parameters_of(config.model), tokens))
    if flags.json:
        print(json.dumps(plan_json(plan)))
    if plan.best is None:
        raise ExplainedError(plan.words[0])
    try:
        if not flags.json:
            show(plan)
    finally:
        save(plan, flags, config)  # also if the reader of the tables is gone (`| head`)
    return EXIT_DONE


def of_one_stage(config: Config, cluster: Cluster) -> Config:
    """Return the config of the stage that takes the most memory in its own layout, and say which that is.

    Raises:
      ConfigError: the config is not valid.
    """
    from jaxtrain.config.rules import validate
    from jaxtrain.planner.stages import stage_words, worst_stage

    stage = worst_stage(validate(config, cluster.devices))
    tell(stage_words(config, stage))
    return stage.config


def sweep(config: Config, cluster: Cluster, flags: PlanFlags) -> int:
    """Print the layouts of a grid."""
    from jaxtrain.planner.sweep import Way, sweep, sweep_json, sweep_table
    from jaxtrain.tables import print_table

    way: Way = "run" if flags.run else "compile" if flags.compile else "estimate"
    rows = sweep(config, cluster, flags.sweep, way, flags.steps, tell)
    print(json.dumps(sweep_json(rows))) if flags.json else print_table(open_console(WIDTH), sweep_table(rows, way))
    return EXIT_DONE


def explain(config: Config, cluster: Cluster, flags: PlanFlags) -> int:
    """Print one layout's memory, traffic and waits; with --compile each collective of the compiled step."""
    from jaxtrain.planner import compiled_traffic
    from jaxtrain.planner.explain import explain, explain_json

    explanation = explain(config, cluster)
    found = compiled_traffic.examine(explanation.estimate.config, cluster, tell) if flags.compile else None
    if flags.json:
        print(json.dumps(explain_json(explanation) | ({"compiled": found} if found else {})))
        return EXIT_DONE
    console = open_console(WIDTH)
    explanation.show(console)
    if found:
        compiled_traffic.show(found, console)
    return EXIT_DONE


def check_flags(flags: PlanFlags) -> None:
    """Raise UsageError for flags that are out of range or do not go together."""
    least = {"hosts": 1, "devices_per_host": 1, "verify": 0, "steps": 1}
    values = {name: getattr(flags, name) for name in (*least, "tokens", "days", "price_per_gpu_hour")}
    files = {name: getattr(flags, name) for name in ("write", "html", "ladder")}
    rules = {f"--{n}={values[n]}: give at least {least[n]}": values[n] is not None and values[n] < least[n] for n in least}
    rules |= {
        f"--{name}={values[name]}: give a number of 0 or more": not 0 <= values[name] < math.inf
        for name in ("tokens", "days", "price_per_gpu_hour")
    }
    rules |= {
        "--price_per_gpu_hour needs to know for how long: give --tokens or --days too, e.g. --tokens=15e12": (
            flags.price_per_gpu_hour and not (flags.tokens or flags.days)
        ),
        "--explain speaks of one layout and --sweep of many; give one of them": flags.explain and flags.sweep,
        "--compile and --run go with --sweep, e.g. --sweep mesh.tensor=1,2 --run, --compile also with --explain": (
            (flags.run or (flags.compile and not flags.explain)) and not flags.sweep
        ),
        "--compile and --run: give one of them": flags.compile and flags.run,
    }
    rules |= {
        f"--{name} {does} the best layout of a search; leave out --explain and --sweep": (
            files[name] and (flags.explain or flags.sweep)
        )
        for name, does in {"write": "saves", "html": "saves", "ladder": "speaks of"}.items()
    }
    if problems := violated(rules):
        raise UsageError(problems[0])
    for name in ("write", "html"):
        if files[name]:
            check_output(f"--{name}", files[name], flags.overwrite)


def make_cluster(config: Config, flags: PlanFlags) -> Cluster:
    """Return the cluster that the flags name.

    Raises:
      UsageError: no such chip, or a chip file that cannot be read.
    """
    from jaxtrain.planner.estimates import Cluster

    hosts, per_host, devices = flags.hosts or 1, flags.devices_per_host, math.prod(config.mesh.shape)
    if flags.explain and flags.hosts is None and -1 not in config.mesh.shape:
        per_host = math.gcd(devices, per_host)
        hosts = devices // per_host
    try:
        return Cluster(load_chip(flags.hardware), hosts, per_host)
    except ExplainedError as error:
        raise UsageError(str(error)) from error


def show(plan: Plan) -> None:
    """Print the tables and the paragraphs."""
    from jaxtrain.planner.answer import memory_table, plan_title, ranking_table
    from jaxtrain.planner.ladder import forecast_words
    from jaxtrain.planner.words import bill_words
    from jaxtrain.tables import print_table

    console = open_console(WIDTH)
    print_table(console, ranking_table(plan.ranked, plan_title(plan)))
    print_table(console, memory_table(plan.ranked))
    foretold = [forecast_words(plan.forecast)] if plan.forecast else []
    for paragraph in (*plan.words, *([bill_words(plan.bill)] if plan.bill else []), *foretold):
        console.print()
        console.print(paragraph, soft_wrap=not console.is_terminal)


def save(plan: Plan, flags: PlanFlags, config: Config) -> None:
    """Write the requested page, and the config as it was asked about with its best layout.

    Raises:
      ExplainedError: a file cannot be written.
    """
    if flags.write and plan.best:
        from jaxtrain.planner.config_source import write_config
        from jaxtrain.planner.stages import of_whole_run

        made = of_whole_run(config, plan.best.config) if config.train.stages else plan.best.config
        assert made is not None, "make_plan leaves out layouts that a stage cannot have"
        write_config(made, flags.write, describe(plan.best))
        tell(f"wrote {flags.write}; run it: jaxtrain train --config={flags.write}")
    if flags.html:
        from jaxtrain.planner.page import render

        write_output("--html", flags.html, render(plan))
        tell(f"wrote {flags.html}")


def describe(best: Estimate) -> str:
    """Return the docstring of a written config: the planned cluster, and the estimate."""
    from jaxtrain.planner.wording import cluster_words, gib, layout_words, percent, seconds

    return (
        f"{best.config.name} on {cluster_words(best.cluster)}, as `jaxtrain plan` laid it out.\n\n"
        f"{layout_words(best)}: {seconds(best.time.total)} a step, {percent(best.mfu)} MFU, {best.tokens_per_second:,.0f} "
        f"tokens/s,\n{gib(best.memory.total)} GiB on the fullest device ({best.origin}).\n"
    )
