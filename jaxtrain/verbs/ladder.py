"""`jaxtrain ladder --config=configs/1b.py --sizes=4`: what a large run will reach, and which learning rate it wants.

Trains small models of the config, fits the law of their losses (`planner/scaling_law.py`), and writes ladder.json, which
`jaxtrain plan --ladder` reads. The same command goes on with a ladder that was stopped.

Exit codes: 0 done, 1 an error explained in one message, 2 wrong usage, 76 stopped by a signal after saving.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtrain.command import CommandLine, Usage, parse
from jaxtrain.config import Config, MeshConfig, PipelineConfig, ShardingConfig
from jaxtrain.config.names import field_values, set_field
from jaxtrain.errors import EXIT_DONE, UsageError
from jaxtrain.files import user_path
from jaxtrain.planner.ladder_flags import LadderFlags
from jaxtrain.text import open_console

if TYPE_CHECKING:
    from jaxtrain.measure.ladder import Climb

WIDTH = 120
"""Columns of the tables without a terminal."""
USAGE = Usage(
    "ladder",
    "Train small models of a config on this machine's devices, fit the law of their losses, and foretell what the config "
    "itself reaches and which learning rate it wants. Layout flags given here (--mesh, --train.microbatches) are those of the "
    "small runs.",
    LadderFlags,
)


def main(arguments: Sequence[str]) -> int:
    """Parse, check, train what is left, print; return the exit code."""
    line = parse(USAGE, arguments)
    flags = line.own
    check_flags(flags)

    from jaxtrain.measure.ladder import Climb
    from jaxtrain.planner.ladder import FILE, check_config, forecast_words

    check_config(line.config)
    folder = user_path(flags.folder) if flags.folder else Path(f"{line.config.directory}-ladder")
    climb = Climb(of_one_machine(line), flags, folder, tell)
    show_sizes(climb)
    if flags.dry_run:
        return EXIT_DONE
    forecast = climb.run()
    if flags.json:
        print(climb.ladder.to_json(forecast), end="")
        return EXIT_DONE
    show_results(climb)
    law = climb.ladder.law
    alpha, beta = law.exponents
    console = open_console(WIDTH)
    console.print(
        f"\nloss(N, D) = {law.law.E:.3f} + {law.law.A:.4g} / N^{law.law.alpha:.3f} + {law.law.B:.4g} / D^{law.law.beta:.3f}; "
        f"90%: alpha {alpha.low:.3f} to {alpha.high:.3f}, beta {beta.low:.3f} to {beta.high:.3f}. {forecast_words(forecast)}",
        soft_wrap=not console.is_terminal,
    )
    tell(f"wrote {folder / FILE}; jaxtrain plan --ladder={folder / FILE} prints the predicted loss beside the cost")
    return EXIT_DONE


def check_flags(flags: LadderFlags) -> None:
    """Raise UsageError for flags that are out of range."""
    wrong = {
        f"--sizes={flags.sizes}: give at least 2": flags.sizes < 2,
        f"--largest={flags.largest:g}: give a share above 0 and below 1": not 0 < flags.largest < 1,
        f"--ratio={flags.ratio:g}: give more than 1": not 1 < flags.ratio < math.inf,
        f"--rates={flags.rates}: give at least 3, the points of a parabola": flags.rates < 3,
        f"--rate_step={flags.rate_step:g}: give more than 1": not 1 < flags.rate_step < math.inf,
        "--tokens: give at least two different multiples, all above 0, e.g. 1,0.5,2": len(set(flags.tokens)) < 2
        or len(set(flags.tokens)) < len(flags.tokens)
        or not all(0 < multiple < math.inf for multiple in flags.tokens),
        f"--sizes={flags.sizes} and {len(flags.tokens)} --tokens give fewer than the 6 losses that the law needs": flags.sizes
        * len(flags.tokens)
        < 6,
    }
    if problems := [words for words, is_wrong in wrong.items() if is_wrong]:
        raise UsageError("; ".join(problems))


def of_one_machine(line: CommandLine[LadderFlags]) -> Config:
    """Return the config without its file's layout, which is that of the large run; layout flags on the command line stay."""
    train, values = replace(line.config.train, microbatches=1), field_values(line.config)
    config = replace(line.config, mesh=MeshConfig(), pipeline=PipelineConfig(), sharding=ShardingConfig(), train=train)
    for name in line.given:
        if name.startswith(("mesh.", "pipeline.", "sharding.")) or name == "train.microbatches":
            config = set_field(config, name, values[name])
    return config


def show_sizes(climb: Climb) -> None:
    """Print the sizes, the runs and what they cost, to standard error: they are not the result."""
    from jaxtrain.planner.ladder import describe_sizes, flops_of, small_run, tokens_of
    from jaxtrain.text import listed

    runs = climb.planned()
    heads = ("layers", "width", "heads", "N", "D", "steps", "FLOPs")
    rows = describe_sizes([*(small_run(size, climb.config, climb.flags.tokens[0], 1.0) for size in climb.sizes), climb.config])
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    for name, row in zip(("", *(f"size {i + 1}" for i in range(len(climb.sizes))), "the config"), (heads, *rows), strict=True):
        tell(f"{name:<12}" + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
    others = listed(f"{multiple:g}" for multiple in climb.flags.tokens[1:])
    flops, whole = sum(flops_of(run, tokens_of(run)) for run in runs), flops_of(climb.config, tokens_of(climb.config))
    tell(
        f"{len(runs)} runs: each size with {climb.flags.rates} learning rates at {climb.flags.tokens[0]:g} times the config's "
        f"tokens per parameter, then at {others} times; more rates where the best is at an end. "
        f"{flops:.2e} FLOPs in all, {flops / whole:.1%} of the config's own run. N: parameters that a token is multiplied by, "
        "without the embedding's lookup; D: tokens."
    )


def show_results(climb: Climb) -> None:
    """Print each size's losses and best learning rate."""
    from jaxtrain.tables import plain_table, print_table

    ladder, law = climb.ladder, climb.ladder.law.law
    heads = ("N", "best rate", *(f"loss at {m:g}x tokens" for m in climb.flags.tokens), "by the law")
    table = plain_table(f"{climb.config.name}: final held-out loss, nats a token", right=heads)
    best, points = ladder.best_rates(), {(n, d): loss for n, d, loss in ladder.points()}
    for size, found in best.items():
        runs = {run.multiple: run for run in ladder.runs if run.size == size}
        n = runs[ladder.first].parameters
        losses = [
            f"{points[n, runs[m].tokens]:.4f}" if (n, runs[m].tokens) in points else "diverged" for m in climb.flags.tokens
        ]
        fitted = " ".join(f"{law.loss(n, runs[m].tokens):.4f}" for m in climb.flags.tokens)
        table.add_row(f"{n:,}", f"{found.rate:.3g}" + ("" if found.inside else " (at the end)"), *losses, fitted)
    print_table(open_console(WIDTH), table)


def tell(words: str) -> None:
    """Print a progress line to standard error."""
    print(words, file=sys.stderr, flush=True)
