"""Render the answer as one page: self-contained HTML with its pictures inside, light or dark as the reader's screen."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from html import escape

from matplotlib.figure import Figure

from jaxtrain.planner.answer import Bill, Plan
from jaxtrain.planner.estimates import Estimate
from jaxtrain.planner.ladder import forecast_words
from jaxtrain.planner.pictures import (
    DARK,
    LARGEST,
    LIGHT,
    SLOWEST,
    gantt_picture,
    map_picture,
    memory_picture,
    mesh_caption,
    mesh_picture,
    svg,
    time_picture,
)
from jaxtrain.planner.wording import (
    FIGURES,
    cluster_words,
    duration,
    gib,
    joules,
    layout_words,
    mesh_words,
    options_words,
    percent,
    remat_words,
    scaled,
    schedule_words,
    seconds,
)
from jaxtrain.planner.words import bill_words

VARIABLES, DARK_VARIABLES = ("".join(f"--{name}: {colour}; " for name, colour in part.items()) for part in (LIGHT, DARK))
STYLE = (
    f"""
:root {{ color-scheme: light dark; {VARIABLES}
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK_VARIABLES}}} }}
"""
    + """\
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 var(--font); }
main { max-width: 1176px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 0 0 10px; }
.lead { color: var(--soft); margin: 0 0 26px; }
.lead b { color: var(--ink); font-weight: 600; }
section, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 14px; }
section { padding: 22px 24px 20px; margin-top: 18px; }
p { margin: 0; max-width: 92ch; }
h2 + p { margin-top: -2px; }
.columns { display: grid; gap: 18px 36px; grid-template-columns: repeat(auto-fit, minmax(360px, 1fr)); margin-top: 20px; }
h3 { font-size: 16px; margin: 0 0 6px; }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); }
.tile { padding: 13px 16px 12px; }
.tile .name { color: var(--soft); font-size: 13px; }
.tile .figure { font-size: 23px; font-weight: 600; letter-spacing: -0.01em; font-variant-numeric: tabular-nums; }
.tile .beside { color: var(--soft); font-size: 13px; }
figure { margin: 14px 0 0; overflow-x: auto; }
figcaption, .note { color: var(--soft); font-size: 14px; margin-top: 10px; }
svg { display: block; width: 100%; min-width: 864px; height: auto; }
svg text { font-family: var(--font) !important; }
table { border-collapse: collapse; font-size: 13px; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 7px 7px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
tr:last-child td { border-bottom: 0; } tbody tr:first-child { font-weight: 600; }
.left { text-align: left; }
footer { color: var(--soft); font-size: 14px; margin-top: 22px; max-width: 88ch; }
"""
)
HEADINGS = ("Why this one", "What limits it", "What would change the answer")
"""Headings of the three paragraphs of `words.explain_plan`."""


def render(plan: Plan) -> str:
    """Return the page of a plan that found something."""
    best = plan.best
    assert best is not None
    chart = map_picture(plan.search.points, plan.search.pareto, plan.ranked)
    body = [
        f"<h1>{escape(plan.config.name)} on {escape(cluster_words(plan.cluster))}</h1>",
        f'<p class="lead"><b>{escape(layout_words(best))}</b></p>',
        _tiles(best, plan.bill),
        _words(plan),
        section("The mesh on its hosts", _figure(mesh_picture(best), mesh_caption(best))),
        section("The schedule of a step", _figure(gantt_picture(best), _schedule_caption(best))),
        section("Memory of the fullest device", _figure(memory_picture(plan.ranked), "")),
        section("Where a step's time goes", _figure(time_picture(plan.ranked), "")),
        section("All layouts: time against memory", _figure(chart, _map_caption(plan))),
        section("The ranking", f"<figure>{_ranking(plan)}</figure>"),
        _footer(plan),
    ]
    return document(f"{plan.config.name} on {cluster_words(plan.cluster)}", body)


def document(title: str, body: Sequence[str], style: str = "") -> str:
    """Return a page with nothing from the net.

    Args:
      body: its parts, as HTML.
      style: rules beside STYLE.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, inner: str) -> str:
    """Return a card with a heading, of HTML."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{inner}\n</section>"


def _words(plan: Plan) -> str:
    """Return the paragraphs: the first across, the others side by side below it."""
    first, *others = [f"<h3>{title}</h3><p>{escape(words)}</p>" for title, words in zip(HEADINGS, plan.words, strict=False)]
    if plan.bill:
        others.append(f"<h3>The whole run</h3><p>{escape(bill_words(plan.bill))}</p>")
    if plan.forecast:
        others.append(f"<h3>What it reaches</h3><p>{escape(forecast_words(plan.forecast))}</p>")
    columns = "".join(f"<div>{paragraph}</div>" for paragraph in others)
    return f'<section>{first}<div class="columns">{columns}</div></section>'


def _figure(picture: Figure, caption: str) -> str:
    words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{svg(picture)}</figure>{words}"


def _tiles(best: Estimate, bill: Bill | None) -> str:
    budget = best.cluster.budget_bytes
    used = f"{best.memory.total / budget:.0%} of {gib(budget)} GiB" if math.isfinite(budget) else "budget not known"
    tiles = [
        ("Step", seconds(best.time.total), f"{best.tokens:,} tokens"),
        ("MFU", percent(best.mfu), f"bubble {percent(best.bubble)}"),
        ("Tokens a second", scaled(best.tokens_per_second), f"{best.tokens_per_second / best.cluster.devices:,.0f} a device"),
        ("Memory", f"{gib(best.memory.total)} GiB", used),
        ("Sent between hosts", f"{FIGURES['network GiB'](best)} GiB", f"{FIGURES['in-host GiB'](best)} GiB in a host"),
        ("Joules a token", joules(best.joules_per_token), "chips alone"),
    ]
    if bill:
        tiles.append(("Time in all", duration(bill.seconds), f"{scaled(bill.tokens)} tokens"))
        tiles.append(("GPU-hours", scaled(bill.gpu_hours), f"{bill.steps:,} steps"))
        if bill.kilowatt_hours is not None:
            tiles.append(("Energy in all", scaled(1000 * bill.kilowatt_hours, "Wh"), "chips alone"))
        if bill.money is not None:
            tiles.append(("Money", scaled(bill.money), "at the price given"))
    inner = "".join(
        f'<div class="tile"><div class="name">{escape(name)}</div><div class="figure">{escape(figure)}</div>'
        f'<div class="beside">{escape(beside)}</div></div>'
        for name, figure, beside in tiles
    )
    return f'<div class="tiles">{inner}</div>'


def _schedule_caption(best: Estimate) -> str:
    config = best.config
    if config.mesh.pipe == 1:
        return "One stage: microbatches follow one another, and gradients add up."
    return (
        f"{config.pipeline.schedule}, {config.train.microbatches} microbatches; numbers are microbatches, paler boxes later "
        "chunks. A backward pass is drawn twice as long as a forward one; stages go in lock-step. "
        f"Waiting: {percent(best.bubble)} of a step."
    )


def _map_caption(plan: Plan) -> str:
    pruned = "; ".join(f"{reason}: {count:,}" for reason, count in plan.search.pruned.items())
    return (
        f"{plan.search.candidates:,} layouts were looked at"
        + (f" (left out: {pruned})" if pruned else "")
        + f". Drawn: a sample of those within {SLOWEST} times the time of the first and {LARGEST} times the budget. Both axes "
        "are logarithmic; dots are estimates, the ring is the first of the ranking. Point at a dot for its mesh."
    )


def _ranking(plan: Plan) -> str:
    words = ("mesh", "schedule", "remat", "choices", "from")
    heads = ("#", "mesh", "schedule", "microbatches", "remat", "choices", *FIGURES, "from")
    rows = []
    for rank, layout in enumerate(plan.ranked, 1):
        config = layout.config
        choices = schedule_words(config), str(config.train.microbatches), remat_words(config), options_words(config)
        figures = (figure(layout) for figure in FIGURES.values())
        rows.append((str(rank), mesh_words(config.mesh), *choices, *figures, layout.origin))
    return table(heads, rows, words)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[str]) -> str:
    """Return a table; columns whose head is among `words` are aligned to the left."""
    sides = [' class="left"' if head in words else "" for head in heads]
    head = "".join(f"<th{side}>{escape(name)}</th>" for side, name in zip(sides, heads, strict=True))
    cells = ["".join(f"<td{side}>{escape(cell)}</td>" for side, cell in zip(sides, row, strict=True)) for row in rows]
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _footer(plan: Plan) -> str:
    origins = {layout.origin for layout in plan.ranked}
    said = ["Made by jaxtrain plan, without a GPU."]
    if "compiled" in origins:
        said.append("Rows marked compiled hold memory, FLOPs and bytes of the program that these chips would run.")
    if "approximate" in origins:
        said.append(
            "Rows marked approximate were compiled for fake CPU devices, or are of a model that the closed forms only approach."
        )
    if "estimate" in origins:
        said.append("Rows marked estimate are closed forms alone.")
    said.append(f"The budget is the chip's memory less {gib(plan.cluster.reserved_bytes)} GiB for CUDA, NCCL and cuBLAS.")
    return f"<footer>{escape(' '.join(said))}</footer>"
