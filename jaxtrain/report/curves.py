"""Draw the curves of several runs over tokens, FLOPs or time, as SVG in the colours of the planner's page."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from jaxtrain.planner.pictures import DRAWN, LIGHT, PARTS, svg
from jaxtrain.planner.wording import scaled
from jaxtrain.report.runs import Axis, RunRecord
from jaxtrain.telemetry.plots import column, literal, shown_range, smooth

COLOURS = [PARTS[i] for i in (0, 5, 2, 7, 3, 4, 1, 6)]
"""Of the runs, in order, neighbours far apart."""
AXES: dict[Axis, str] = {"tokens": "tokens", "flops": "FLOPs", "time": "time"}
TIMES = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (120, 60, "minutes"), (0, 1, "seconds"))
"""(least length, seconds of the unit, name) of the units of the time axis."""
WIDTH, HEIGHT = 540, 300
MOST_POINTS = 500
"""Points of a curve; of more, the lowest and the highest of each stretch are drawn."""
SMOOTHED = 50
"""Parts that a curve is smoothed in."""
TRAINING = {
    "loss": "Training loss, nats a token",
    "reward": "Reward of sampled answers",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens a second",
    "joules_per_token": "Joules a token",
}
"""Keys of training rows that get a chart, and its title."""
HELD_OUT = re.compile(r"(validation_(?!tokens)|task_)")
EXACT = re.compile(r"validation_|task_|learning_rate$")
"""Keys whose curves are drawn as they are, not smoothed."""
KNOWN = {"validation_loss": "Held-out loss, nats a token", "validation_bits_per_byte": "Held-out text, bits per byte"}
MOST_CHARTS = 30


@dataclass(frozen=True)
class Chart:
    """A quantity of the runs, drawn over one axis."""

    title: str
    svg: str


def chart_keys(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Return {key of the rows: title} of what is drawn: first losses and measures, then how the training went."""
    held_out = [key for run in runs for row in run.rows for key in row if HELD_OUT.match(key)]
    titles = {key: KNOWN.get(key, words_of(key)) for key in dict.fromkeys([*KNOWN, *sorted(set(held_out))])}
    first, *others = TRAINING.items()
    whole = dict([first, *titles.items(), *others])
    drawn = {key: title for key, title in whole.items() if any(column(run.rows, key)[0].size for run in runs)}
    return dict(list(drawn.items())[:MOST_CHARTS])


def words_of(key: str) -> str:
    """Return a row's key as a title: "task_sums_accuracy" is "Task sums: accuracy"; a set or source follows a slash."""
    if "/" in key:
        whole, _, part = key.partition("/")
        return f"{KNOWN.get(whole, words_of(whole)).partition(',')[0]}: {part.replace('_', ' ')}"
    kind, _, rest = key.partition("_")
    name, _, measure = rest.rpartition("_")
    return f"Task {name}: {measure}" if kind == "task" and name else f"Held-out {rest.replace('_', ' ')}"


def charts(runs: Sequence[RunRecord], axis: Axis) -> list[Chart]:
    """Return the charts over an axis, all of one range; a run that does not know that axis is left out of them."""
    ends = [place for run in runs for place in run.place(np.array([float(run.steps)]), axis)]
    end = float(max(ends, default=0)) or 1.0
    return [Chart(title, svg(_chart(runs, key, title, axis, end))) for key, title in chart_keys(runs).items()]


@mpl.rc_context(DRAWN)
def _chart(runs: Sequence[RunRecord], key: str, title: str, axis: Axis, end: float) -> Figure:
    figure = Figure((WIDTH / 72, HEIGHT / 72), dpi=72, facecolor="none", label=f"{title} over {AXES[axis]}")
    axes = figure.add_axes((58 / WIDTH, 40 / HEIGHT, 1 - 70 / WIDTH, 1 - 56 / HEIGHT), frameon=False)
    levels: list[np.ndarray] = []
    for number, run in enumerate(runs):
        x, y = run.curve(key, axis)
        if x.size:
            levels.append(_draw(axes, x, y, COLOURS[number % len(COLOURS)], is_exact=bool(EXACT.match(key))))
            _mark(axes, run, axis, COLOURS[number % len(COLOURS)], alone=len(runs) == 1)
    if levels:
        low, high = min(level.min() for level in levels), max(level.max() for level in levels)
        margin = 0.07 * (high - low) or 0.05 * abs(high) or 0.1
        axes.set_ylim(low - margin, high + margin)
    else:
        axes.text(0.5, 0.5, f"no run knows its {AXES[axis]}", transform=axes.transAxes, ha="center", color=LIGHT["soft"])
    unit, words = next((unit, words) for least, unit, words in TIMES if end >= least) if axis == "time" else (1, AXES[axis])
    axes.set(xlabel=words, xlim=(-0.01 * end, 1.02 * end))
    axes.xaxis.set_major_locator(MultipleLocator(unit * _step(end / unit)))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    for ticks, size in ((axes.xaxis, unit), (axes.yaxis, 1)):
        ticks.set_major_formatter(FuncFormatter(lambda value, _, size=size: tick(value / size)))
    axes.grid(visible=True)
    return figure


def _step(end: float) -> float:
    """Return the distance of ticks from 0 to `end`: 1, 2 or 5 times a power of ten, 4 to 9 of them."""
    power = 10 ** math.floor(math.log10(end / 4))
    return power * max(factor for factor in (1, 2, 5) if factor * power <= end / 4)


def tick(value: float) -> str:
    """Return a tick's number: "1.5 M", "0.25", "4.5e-3"; of no more than three decimals, since `svg` cuts what is longer."""
    if abs(value) >= 1000:
        return scaled(value)
    if value == 0 or abs(value) >= 0.01:
        return f"{value:.3f}".rstrip("0").rstrip(".")
    digits, power = f"{value:.3e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def _draw(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, is_exact: bool) -> np.ndarray:
    """Draw a curve; return the values between which the chart must reach."""
    if is_exact or len(x) < 20:
        axes.plot(*thinned(x, y), "-o" if len(x) < 40 else "-", color=colour, linewidth=1.6, markersize=4)
        return y
    middle_x, middle_y = averaged(x, y)
    smoothed = smooth(middle_y, max(len(middle_y) / SMOOTHED, 0.5))
    axes.plot(middle_x, smoothed, color=colour, linewidth=1.8)
    shown = np.array(shown_range(y, smoothed))
    thin_x, thin_y = thinned(x, y)
    axes.plot(thin_x, np.clip(thin_y, *shown), color=colour, linewidth=0.8, alpha=0.3)
    return shown


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return at most about MOST_POINTS: first, last, and of each stretch the lowest and the highest, so that spikes stay."""
    if len(x) <= MOST_POINTS:
        return x, y
    edges = np.linspace(0, len(x), MOST_POINTS // 2 + 1).astype(int)
    kept = {0, len(x) - 1}
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        kept |= {start + int(y[start:stop].argmin()), start + int(y[start:stop].argmax())}
    places = sorted(kept)
    return x[places], y[places]


def averaged(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of x and y over at most MOST_POINTS stretches of equal length."""
    if len(x) <= MOST_POINTS:
        return x, y
    edges = np.linspace(0, len(x), MOST_POINTS + 1).astype(int)
    counts = np.diff(edges)
    return np.add.reduceat(x, edges[:-1]) / counts, np.add.reduceat(y, edges[:-1]) / counts


def _mark(axes: Axes, run: RunRecord, axis: Axis, colour: str, alone: bool) -> None:
    """Draw stages as bands, or as lines in the run's colour if there are several runs, and events as triangles."""
    stages = run.stages()
    edges = run.place(np.array([step for step, _ in stages] + [run.steps], float), axis)
    for number, (_, name) in enumerate(stages):
        if alone and number % 2:
            axes.axvspan(edges[number], edges[number + 1], color=LIGHT["idle"], linewidth=0, zorder=0)
        elif number and not alone:
            axes.axvline(edges[number], color=colour, linewidth=1, linestyle=(0, (1, 2)), zorder=0)
        if alone:
            middle, look = (edges[number] + edges[number + 1]) / 2, {"ha": "center", "va": "top", "fontsize": 10}
            axes.text(middle, 0.995, literal(name), transform=axes.get_xaxis_transform(), color=LIGHT["soft"], **look)
    marked = [event for event in run.events if event.step is not None and event.step <= run.steps]
    places = run.place(np.array([event.step for event in marked], float), axis)
    if places.size:
        look = {"marker": "^", "urls": [f"{event.kind}: {event.words}" for event in marked], "clip_on": False}
        axes.scatter(places, np.full(places.size, 0.025), 30, color=colour, transform=axes.get_xaxis_transform(), **look)
