"""What a ladder says to people: its sizes and what they cost, the losses of each, the law."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from jaxtrain.config import Config
from jaxtrain.planner.ladder import Forecast, Ladder, describe_sizes, flops_of, forecast_words, small_run, tokens_of
from jaxtrain.planner.ladder_flags import LadderFlags
from jaxtrain.tables import plain_table
from jaxtrain.text import listed

if TYPE_CHECKING:
    from rich.table import Table


def size_lines(config: Config, sizes: Sequence[Config], runs: Sequence[Config], flags: LadderFlags) -> Iterator[str]:
    """Yield a line for each size, and one on the runs that are sure to come."""
    heads = ("layers", "width", "heads", "N", "D", "steps", "FLOPs")
    rows = describe_sizes([*(small_run(size, config, flags.tokens[0], 1.0) for size in sizes), config])
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    for name, row in zip(("", *(f"size {i + 1}" for i in range(len(sizes))), "the config"), (heads, *rows), strict=True):
        yield f"{name:<12}" + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
    others = listed(f"{multiple:g}" for multiple in flags.tokens[1:])
    flops, whole = sum(flops_of(run, tokens_of(run)) for run in runs), flops_of(config, tokens_of(config))
    yield (
        f"{len(runs)} runs: each size with {flags.rates} learning rates at {flags.tokens[0]:g} times the config's "
        f"tokens per parameter, then at {others} times; more rates where the best is at an end. "
        f"{flops:.2e} FLOPs in all, {flops / whole:.1%} of the config's own run. N: parameters that a token is multiplied by, "
        "without the embedding's lookup; D: tokens."
    )


def result_table(ladder: Ladder, name: str, multiples: Sequence[float]) -> Table:
    """Return each size's losses and best learning rate."""
    law = ladder.law.law
    heads = ("N", "best rate", *(f"loss at {m:g}x tokens" for m in multiples), "by the law")
    table = plain_table(f"{name}: final held-out loss, nats a token", right=heads)
    best, points = ladder.best_rates(), {(n, d): loss for n, d, loss in ladder.points()}
    for size, found in best.items():
        runs = {run.multiple: run for run in ladder.runs if run.size == size}
        n = runs[ladder.first].parameters
        losses = [f"{points[n, runs[m].tokens]:.4f}" if (n, runs[m].tokens) in points else "diverged" for m in multiples]
        fitted = " ".join(f"{law.loss(n, runs[m].tokens):.4f}" for m in multiples)
        table.add_row(f"{n:,}", f"{found.rate:.3g}" + ("" if found.inside else " (at the end)"), *losses, fitted)
    return table


def law_words(ladder: Ladder, forecast: Forecast) -> str:
    """Return the law with its intervals, and the forecast."""
    law, (alpha, beta) = ladder.law.law, ladder.law.exponents
    return (
        f"loss(N, D) = {law.E:.3f} + {law.A:.4g} / N^{law.alpha:.3f} + {law.B:.4g} / D^{law.beta:.3f}; "
        f"90%: alpha {alpha.low:.3f} to {alpha.high:.3f}, beta {beta.low:.3f} to {beta.high:.3f}. {forecast_words(forecast)}"
    )
