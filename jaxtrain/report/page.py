"""Report runs as one HTML page with nothing from the net and no script, or as tables for a terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape
from typing import Any

from rich.table import Table

from jaxtrain.command.help import shown
from jaxtrain.planner.page import document, section, table
from jaxtrain.planner.pictures import LIGHT
from jaxtrain.planner.wording import duration, joules, percent, scaled
from jaxtrain.report.curves import AXES, COLOURS, charts
from jaxtrain.report.runs import Event, RunRecord, differing_fields
from jaxtrain.tables import plain_table
from jaxtrain.text import printable

MOST_EVENTS = 40
"""Events of a run that are shown, the newest."""
LONGEST = 120
"""Letters of a value or an event that are shown in a terminal."""
FOOTER = """Made by jaxtrain report. FLOPs are model FLOPs, with the causal half of attention. Time is that of training, pauses
included, without what lies between a stop and a restart. Goodput: seconds of steps that were not repeated, over all seconds
under the supervisor, or without one over the time of training."""
_NAMES = {colour: name for name, colour in LIGHT.items()}
_SHOWN = "".join(f"#{axis}:checked ~ .curves .{axis} {{ display: grid; }}\n" for axis in AXES)
STYLE = (
    _SHOWN
    + """\
.charts { display: none; gap: 22px 28px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
.charts svg { min-width: 400px; }
.charts h3 { font-size: 14px; font-weight: 600; margin: 0; }
.charts figure { margin: 4px 0 0; }
.choice { position: absolute; opacity: 0; }
.choices { display: flex; gap: 8px; margin: 18px 0 -4px; align-items: center; color: var(--soft); font-size: 14px; }
.choices label { padding: 3px 14px; border: 1px solid var(--line); border-radius: 99px; background: var(--card); }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin-bottom: 14px; font-size: 14px; }
.scroll { overflow-x: auto; }
tbody tr:first-child { font-weight: 400; } td.text { white-space: normal; overflow-wrap: anywhere; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; }
.run { display: grid; gap: 4px 28px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.run { font-size: 14px; margin: 6px 0 16px; }
.run div span { display: block; color: var(--soft); font-size: 13px; }
"""
    + "".join(
        f"#{axis}:checked ~ .choices label[for={axis}], #{axis}:focus-visible ~ .choices label[for={axis}] "
        "{ border-color: var(--c0); color: var(--ink); }\n"
        for axis in AXES
    )
)


def render(runs: Sequence[RunRecord]) -> str:
    """Return the page of runs."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    lead = runs[0].state() if len(runs) == 1 else ", ".join(run.name for run in runs)
    latest = max((row.get("time") or 0 for run in runs for row in run.rows[-1:]), default=0)
    when = f"last row of {time.strftime('%Y-%m-%d %H:%M:%S %Z', time.localtime(latest))}" if latest else "no rows"
    differences = differing_fields(runs)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(lead)}; {escape(when)}</p>',
        section("Runs", "".join(_summary(run, number) for number, run in enumerate(runs))),
        _curves(runs),
        section("What differs in the configs", _differences(runs, differences)) if differences else "",
        *(section(f"{run.name}: what happened", _events(run)) for run in runs if run.events),
        *(section(f"{run.name}: a sample", f"<pre>{escape(printable(run.sample))}</pre>") for run in runs if run.sample),
        f"<footer>{escape(FOOTER)}</footer>",
    ]
    return document(title, body, STYLE)


def _swatch(number: int) -> str:
    colour = _NAMES[COLOURS[number % len(COLOURS)]]
    return f'<span class="swatch" style="background: var(--{colour})"></span>'


def facts(run: RunRecord) -> dict[str, str]:
    """Return what is said of a run in a line: name of the fact, figure."""
    parameters, tokens, elapsed = run.parameters(), run.last("tokens"), run.last("elapsed_seconds")
    held_out, bits, energy = run.last("validation_loss"), run.last("validation_bits_per_byte"), run.last("energy_kwh")
    tasks = {key: row[key] for row in run.rows for key in row if key.startswith("task_") and row[key] is not None}
    every = {
        "state": run.state(),
        "parameters": scaled(parameters) if parameters else "",
        "tokens": scaled(tokens) if tokens else "",
        "loss": _number(run.last("loss_mean") or run.last("loss")),
        "held-out loss": _number(held_out),
        "bits/byte": _number(bits),
        "reward": _number(run.last("reward")),
        "held-out reward": _number(run.last("validation_reward")),
        "time": duration(elapsed) if elapsed else "",
        "tokens/s": f"{run.last('tokens_per_second') or 0:,.0f}" if run.last("tokens_per_second") else "",
        "MFU": percent(run.last("mfu_causal")) if run.last("mfu_causal") is not None else "",
        "goodput": percent(run.goodput) if run.goodput is not None else "",
        "energy": f"{energy:.3g} kWh" if energy else "",
        "J/token": joules(run.last("joules_per_token")) if run.last("joules_per_token") else "",
        "starts": str(run.starts) if run.starts else "",
        "rollbacks": str(sum(event.kind == "rollback" for event in run.events) or ""),
    }
    every |= {key.removeprefix("task_").replace("_", " "): _number(value) for key, value in tasks.items()}
    return {name: words for name, words in every.items() if words}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _summary(run: RunRecord, number: int) -> str:
    cells = "".join(f"<div><span>{escape(name)}</span>{escape(words)}</div>" for name, words in facts(run).items())
    return f'<h3>{_swatch(number)}{escape(run.name)}</h3><div class="run">{cells}</div>'


def _curves(runs: Sequence[RunRecord]) -> str:
    """Return the charts over each axis, of which a choice without a script shows one."""
    if not any(run.rows for run in runs):
        return section("Curves", "<p>No run has logged a step yet.</p>")
    choices = "".join(
        f'<input class="choice" type="radio" name="axis" id="{axis}"{" checked" if axis == "tokens" else ""}>' for axis in AXES
    )
    labels = "".join(f'<label for="{axis}">{words}</label>' for axis, words in AXES.items())
    legend = "".join(f"<span>{_swatch(number)}{escape(run.name)}</span>" for number, run in enumerate(runs))
    note = "Thin lines are logged steps, thick ones smoothed. Triangles: resumes, rollbacks, skipped steps, failures."
    if any(run.stages() for run in runs):
        note += " Bands, or dotted lines, are stages."
    inner = ""
    for axis in AXES:
        figures = "".join(f"<div><h3>{escape(c.title)}</h3><figure>{c.svg}</figure></div>" for c in charts(runs, axis))
        inner += f'<div class="charts {axis}">{figures}</div>'
    curves = (
        f'<section class="curves"><h2>Curves</h2><div class="legend">{legend}</div>{inner}<p class="note">{note}</p></section>'
    )
    return f'{choices}<div class="choices">over {labels}</div>{curves}'


def _differences(runs: Sequence[RunRecord], differences: dict[str, list[Any]]) -> str:
    rows = [(name, *(shown_value(value) for value in values)) for name, values in differences.items()]
    heads = ("field", *(run.name for run in runs))
    return f'<div class="scroll">{table(heads, rows, heads)}</div>'


def shown_value(value: Any) -> str:
    """Return a field's value as its flag is written; "-" where a run has none."""
    return "-" if value is None else shown(value)


def _events(run: RunRecord) -> str:
    left_out = len(run.events) - MOST_EVENTS
    more = f'<p class="note">{left_out} earlier ones are in log.txt.</p>' if left_out > 0 else ""
    rows = "".join(
        f'<tr><td class="left">{escape(moment(event))}</td><td class="left">{escape(event.kind)}</td>'
        f'<td class="left text">{escape(printable(event.words))}</td></tr>'
        for event in run.events[-MOST_EVENTS:]
    )
    return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>{more}'


def moment(event: Event) -> str:
    """Return an event's local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time))


# ---------------------------------------------------------------------------------------------------------------------
# For a terminal


def tables(runs: Sequence[RunRecord]) -> list[Table]:
    """Return the facts, the differences and the newest events of runs as tables."""
    every = [facts(run) for run in runs]
    names = list(dict.fromkeys(name for known in every for name in known))
    found = [plain_table("Runs", ("", *(run.name for run in runs)))]
    for name in names:
        found[0].add_row(name, *(known.get(name, "") for known in every))
    if differences := differing_fields(runs):
        found.append(plain_table("What differs in the configs", ("field", *(run.name for run in runs))))
        for name, values in differences.items():
            found[-1].add_row(name, *(shown_value(value)[:LONGEST] for value in values))
    for run in runs:
        if run.events:
            found.append(plain_table(f"{run.name}: what happened", ("time", "", "words")))
            for event in run.events[-MOST_EVENTS:]:
                found[-1].add_row(moment(event), event.kind, event.words[:LONGEST])
    return found
