"""Draw the pictures of the planner's page: mesh, schedule, bars, map."""

from __future__ import annotations

import colorsys
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from textwrap import shorten
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerPathCollection
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from jaxtrain.config import MESH_AXES
from jaxtrain.mesh import split_over_hosts
from jaxtrain.planner.estimates import Estimate, Point
from jaxtrain.planner.timeline import Box, timeline_of
from jaxtrain.planner.wording import (
    GIBI,
    MEMORY_WORDS,
    TIME_WORDS,
    gib,
    how_words,
    mesh_words,
    present,
    seconds,
    shape_words,
)

NAMES = "page card ink soft line idle grid limit c0 c1 c2 c3 c4 c5 c6 c7".split()
"""Colours of the page; `svg` makes a CSS variable of each that a picture uses, so that LIGHT and DARK may differ."""
LIGHT, DARK = (
    {name: f"#{colour}" for name, colour in zip(NAMES, colours.split(), strict=True)}
    for colours in (
        "f7f7f5 fefefe 16191d 5c6570 e3e3df ececea eeeeeb c22f2f 3d68cf 7a9bea 2aa198 86b94c eab02e e5703a a1a7b0 a974c4",
        "111316 191c20 e9ebee 9aa3ad 2a2f35 23272c 24282d f07070 5b82e0 93aff2 35b3a9 93c45c e8b844 e88352 7c848e c194d8",
    )
)
PARTS = [LIGHT[f"c{i}"] for i in range(8)]
DRAWN: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # wider than most: what fits in it fits in the reader's font
    "font.size": 11.5,
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["soft"],
    "axes.axisbelow": True,
    "grid.color": LIGHT["grid"],
    "xtick.color": LIGHT["soft"],
    "ytick.color": LIGHT["soft"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": LIGHT["soft"],
    "legend.handlelength": 1,
    "legend.handleheight": 1,
    "legend.borderaxespad": 0,
    "legend.borderpad": 0.1,
    "svg.fonttype": "none",  # words stay words: to select, to search, and small
    "svg.hashsalt": "jaxtrain",
}
CLEANED = (
    (r' (clip-path|xmlns\S*|target)="[^"]*"| id="[A-Za-z]+_\d+"| transform="rotate\(-0 [^"]*"|xlink:', ""),
    (r'<a href="([^"]*)">', r"<g><title>\1</title>"),
    ("</a>", "</g>"),
    (r"(\.\d\d)\d\d+|\n *", r"\1"),  # digits and spaces that do not show
)
"""What `svg` replaces, by what: an artist's URL holds its tooltip, and a page needs no name spaces, clipping and ids."""
WIDTH = 1080
"""Pixels across; a matplotlib point is a pixel here, as an SVG has 72 points to the inch."""
ROUND: dict[str, Any] = {"linewidth": 4, "joinstyle": "round"}
"""An outline that rounds the corners of a filled rectangle, two pixels wider on all sides."""
DASHED: dict[str, Any] = {"linewidth": 1.4, "linestyle": (0, (5, 4)), "zorder": 0}
LETTER = 0.6
"""Width of a letter in font sizes, on average at most."""
MOST_HOSTS = 32
CELL, GAP, HOST_GAP = 24, 3, 14
UNIT = 7.0
"""Smallest width of a unit of the schedule's time."""
MOST_POINTS = 1500
SLOWEST, LARGEST = 8, 4
"""The map omits layouts that take longer than this many times the first, or need more than this many times the budget."""


def svg(figure: Figure) -> str:
    """Return a figure as an `<svg>` element for an HTML page: colours as CSS variables, the artists' URLs as tooltips."""
    file = io.StringIO()
    with mpl.rc_context(DRAWN):
        FigureCanvasSVG(figure).print_svg(file, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    (frame,) = re.findall(r'<svg [^>]*(viewBox="[^"]*")', file.getvalue())
    text = (
        f'<svg {frame} role="img" aria-label="{escape(str(figure.get_label()))}">' + re.split("<svg [^>]*>", file.getvalue())[1]
    )
    for pattern, replacement in CLEANED:
        text = re.sub(pattern, replacement, text)
    for name, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def figure_of(
    height: float, label: str, left: float = 0, right: float = 0, top: float = 0, bottom: float = 0
) -> tuple[Figure, Axes]:
    """Return a figure WIDTH wide with a label for screen readers, and axes within margins in pixels."""
    figure = Figure((WIDTH / 72, height / 72), dpi=72, facecolor="none", label=label)
    place = (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (top + bottom) / height)
    return figure, figure.add_axes(place, frameon=False)


def coordinates(shape: Sequence[int], devices_per_host: int) -> np.ndarray:
    """Return [host, device of the host, axis]: each device's place on the mesh, as `mesh.make_mesh` lays it."""
    per_host = min(devices_per_host, math.prod(shape))
    inside, across = split_over_hosts(shape, per_host)
    hosts = np.array(np.unravel_index(np.arange(math.prod(across)), across)).T
    own = np.array(np.unravel_index(np.arange(per_host), inside)).T
    return hosts[:, None, :] * np.array(inside) + own[None, :, :]


def colour_axis(shape: Sequence[int]) -> int:
    """Return the axis shown by colours: pipe if used, else the outermost in use."""
    pipe = MESH_AXES.index("pipe")
    return pipe if shape[pipe] > 1 else next((i for i, size in enumerate(shape) if size > 1), pipe)


def hue(index: int, count: int) -> tuple[float, float, float]:
    """Return the colour of one of `count` groups, with neighbours far enough apart."""
    return colorsys.hls_to_rgb((212 / 360 + index / max(count, 1)) % 1, 0.47, 0.48)


@mpl.rc_context(DRAWN)
def mesh_picture(layout: Estimate) -> Figure:
    """Draw hosts as boxes and devices as squares: coordinates that differ inside a host on its devices, others above it."""
    shape, painted = layout.config.mesh.shape, colour_axis(layout.config.mesh.shape)
    places = coordinates(shape, layout.cluster.devices_per_host)
    hosts, devices, _ = places.shape
    shown = range(0, hosts, math.ceil(hosts / MOST_HOSTS))
    varying = [axis for axis in range(len(shape)) if len(np.unique(places[0, :, axis])) > 1]
    fixed = [axis for axis, size in enumerate(shape) if size > 1 and axis not in varying]
    columns = 4 if devices <= 16 else 12
    wide = max(min(devices, columns) * (CELL + GAP) - GAP + 16, 118)
    tall = math.ceil(devices / columns) * (CELL + GAP) - GAP + 34
    per_row = max(1, int((WIDTH + HOST_GAP) / (wide + HOST_GAP)))
    height = math.ceil(len(shown) / per_row) * (tall + HOST_GAP) - HOST_GAP
    figure, axes = figure_of(height, f"{hosts} hosts of {devices} devices")
    axes.set(xlim=(0, WIDTH), ylim=(height, 0), xticks=[], yticks=[])
    for number, host in enumerate(shown):
        x, y = number % per_row * (wide + HOST_GAP), number // per_row * (tall + HOST_GAP)
        frame = {"boxstyle": "round,pad=8", "facecolor": "none", "edgecolor": LIGHT["line"], "linewidth": 1.2}
        axes.add_artist(FancyBboxPatch((x + 9, y + 9), wide - 18, tall - 18, **frame))
        name = ", ".join(f"{MESH_AXES[axis]} {places[host, 0, axis]}" for axis in fixed) or f"host {host}"
        if len(name) * LETTER * 11 > wide - 12:
            name = " ".join(_short_words(places[host, 0], fixed))
        axes.text(x + 8, y + 17, name, fontsize=11, color=LIGHT["soft"])
        for device, place in enumerate(places[host]):
            left, top = x + 8 + device % columns * (CELL + GAP), y + 26 + device // columns * (CELL + GAP)
            whole = ", ".join(f"{MESH_AXES[axis]} {place[axis]}" for axis in range(len(shape)) if shape[axis] > 1)
            title = f"host {host}, device {device}: {whole or 'alone'}"
            fill = hue(int(place[painted]), shape[painted])
            axes.add_artist(Rectangle((left + 2, top + 2), CELL - 4, CELL - 4, color=fill, **ROUND, url=title))
            words = _short_words(place, varying[-3:])
            size = min([(11, 11, 9.5, 7.5)[len(words)], *((CELL - 2) / LETTER / len(word) for word in words)])
            for i, word in enumerate(words):
                y_word = top + CELL / 2 + (i - len(words) / 2 + 0.86) * size
                axes.text(left + CELL / 2, y_word, word, fontsize=size, color="white", ha="center")
    return figure


def _short_words(place: np.ndarray, axes: Sequence[int]) -> list[str]:
    """Return ["p1", "f3"] for positions along axes."""
    return [f"{MESH_AXES[axis][0]}{place[axis]}" for axis in axes]


def mesh_caption(layout: Estimate) -> str:
    """Describe the picture of the mesh in one to three sentences."""
    shape = layout.config.mesh.shape
    places = coordinates(shape, layout.cluster.devices_per_host)
    hosts, stride = len(places), math.ceil(len(places) / MOST_HOSTS)
    painted = colour_axis(shape)
    said = [f"A box is a host, a square a {layout.cluster.chip.name}."]
    if shape[painted] > 1:
        said.append(f"Colour tells apart the {shape[painted]} positions along {MESH_AXES[painted]}.")
    used = [MESH_AXES[axis] for axis, size in enumerate(shape) if size > 1]
    inside = [MESH_AXES[axis] for axis in range(len(shape)) if len(np.unique(places[0, :, axis])) > 1]
    if inside:
        letters = ", ".join(f"{axis[0]} = {axis}" for axis in used)
        said.append(f"On the squares: positions along the axes inside a host; above them those of the host ({letters}).")
    if stride > 1:
        said.append(f"Of {hosts:,} hosts, every {stride}th is drawn.")
    return " ".join(said)


# ---------------------------------------------------------------------------------------------------------------------
# The schedule


PASSES = {"F": ("forward", PARTS[0]), "B": ("backward", PARTS[5]), "W": ("weights' gradients", PARTS[2])}


@mpl.rc_context(DRAWN)
def gantt_picture(layout: Estimate) -> Figure:
    """Draw one row per stage, time to the right; long steps are cut in the middle."""
    whole, left, top, tall = timeline_of(layout.config), 64, 28, 27
    most, cut = int((WIDTH - left) / UNIT), 4
    head = (most - cut) * 2 // 3
    units = min(whole.length, most)
    windows = [(0, units, 0)]
    if whole.length > most:
        windows = [(0, head, 0), (whole.length - (most - cut - head), whole.length, most - whole.length)]
    unit = min((WIDTH - left) / units, 40.0)
    height = top + whole.stages * tall
    figure, axes = figure_of(height, "the pipeline's schedule", left, WIDTH - left - units * unit, top)
    stages = range(whole.stages)
    axes.set(xlim=(0, units), ylim=(whole.stages - 0.5, -0.5), xticks=[])
    axes.set_yticks(stages, [f"stage {stage}" for stage in stages])
    for start, stop, shift in windows:
        axes.barh(stages, stop - start, 0.88, left=start + shift, color=LIGHT["idle"])
        for box in whole.boxes:
            first, last = max(box.start, start), min(box.start + box.length, stop)
            if first < last:
                _add_box(axes, box, first + shift, last - first, unit, 1 - 0.6 * box.chunk / layout.config.pipeline.chunks)
    if len(windows) > 1:
        axes.text(head + cut / 2, (whole.stages - 1) / 2, "…", fontsize=20, color=LIGHT["soft"], ha="center", va="center")
    kinds = [PASSES[kind] for kind in "FBW" if any(box.kind == kind for box in whole.boxes)]
    kinds.append(("waiting for other stages", LIGHT["idle"]))
    _legend(axes, handles=[Patch(color=colour, label=name) for name, colour in kinds])
    return figure


def _add_box(axes: Axes, box: Box, start: float, length: float, unit: float, opacity: float) -> None:
    kind, fill = PASSES[box.kind]
    title = f"{kind} of microbatch {box.microbatch} on stage {box.stage}" + (f", chunk {box.chunk}" if box.chunk else "")
    place, size = (start + 2.4 / unit, box.stage - 0.37), (length - 4.8 / unit, 0.74)
    axes.add_artist(Rectangle(place, *size, color=fill, **ROUND, alpha=opacity, url=title))
    if len(str(box.microbatch)) * LETTER * 10 + 3 <= length * unit:
        axes.text(start + length / 2, box.stage + 0.14, str(box.microbatch), fontsize=10, color="white", ha="center")


def _legend(axes: Axes, **settings: Any) -> None:
    """Add a row of names at the top of the figure, from the left of the axes."""
    place = {"loc": "upper left", "bbox_to_anchor": (axes.get_position().x0, 1), "bbox_transform": axes.figure.transFigure}
    axes.legend(ncols=9, **place, handletextpad=0.5, columnspacing=1.6, **settings)


# ---------------------------------------------------------------------------------------------------------------------
# Bars


def memory_picture(ranked: Sequence[Estimate]) -> Figure:
    """Draw the memory of the fullest device by category, against the budget."""
    names = present(MEMORY_WORDS, [layout.memory for layout in ranked])
    rows = [(layout, {name: getattr(layout.memory, name) / GIBI for name in names}) for layout in ranked]
    budget = ranked[0].cluster.budget_bytes / GIBI
    limit = (budget, 1, f"budget {gib(ranked[0].cluster.budget_bytes)} GiB") if math.isfinite(budget) else None
    return _bars(rows, names, "GiB", limit, lambda value: f"{gib(value * GIBI)} GiB")


def time_picture(ranked: Sequence[Estimate]) -> Figure:
    """Draw the seconds of a step by part."""
    names = present(TIME_WORDS, [layout.time for layout in ranked])
    rows = [(layout, {name: getattr(layout.time, name) for name in names}) for layout in ranked]
    return _bars(rows, names, "s", None, seconds)


@mpl.rc_context(DRAWN)
def _bars(
    rows: Sequence[tuple[Estimate, Mapping[str, float]]],
    names: Mapping[str, str],
    unit: str,
    limit: tuple[float, float, str] | None,
    write: Callable[[float], str],
) -> Figure:
    """Draw stacked horizontal bars, one per layout, its name on the left and its sum on the right.

    Args:
      limit: (value, height in axes, words) of a line across the bars, or None.
      write: formats a value.
    """
    left, right, top, places = 366, 84, 46 if limit else 30, np.arange(len(rows))
    figure, axes = figure_of(top + 40 * len(rows), f"{', '.join(names.values())} of each layout, in {unit}", left, right, top)
    sums = np.zeros(len(rows))
    for (key, name), colour in zip(names.items(), PARTS, strict=False):
        values = np.array([row[key] for _, row in rows])
        for bar, value in zip(axes.barh(places, values, 0.55, left=sums, color=colour, label=name), values, strict=True):
            bar.set_url(f"{name}: {write(value)}")
        sums += values
    longest = max(*sums, limit[0] if limit else 0)
    behind = {"facecolor": LIGHT["card"], "edgecolor": "none", "pad": 1}  # hides the limit's line
    across, pixel = axes.get_yaxis_transform(), 1 / axes.bbox.width
    for place, (layout, _) in enumerate(rows):
        name = shorten(f"{place + 1}. {mesh_words(layout.config.mesh)}", 44, placeholder="…")
        how = shorten(how_words(layout.config), 50, placeholder="…")
        weight = None if place else "bold"
        axes.text(-left * pixel, place, name, weight=weight, transform=across)
        axes.text((16 - left) * pixel, place + 0.37, how, fontsize=10.5, color=LIGHT["soft"], transform=across)
        end = sums[place] + 8 * pixel * longest
        axes.text(end, place, write(sums[place]), weight=weight, va="center_baseline", bbox=behind)
    if limit:
        axes.axvline(limit[0], color=LIGHT["limit"], **DASHED)
        axes.text(*limit, transform=axes.get_xaxis_transform(), color=LIGHT["limit"], ha="center", va="bottom")
    axes.set(xlim=(0, longest), ylim=(len(rows) - 0.5, -0.5), xticks=[], yticks=[])
    _legend(axes)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# The map

KINDS = ("data alone", "tensor", "pipe", "pipe and tensor")
KIND_COLOURS = [PARTS[6], PARTS[2], PARTS[4], PARTS[0]]


def kind_of(mesh: Sequence[int]) -> int:
    """Return the index into KINDS: whether a mesh uses pipe and tensor."""
    return 2 * (mesh[MESH_AXES.index("pipe")] > 1) + (mesh[MESH_AXES.index("tensor")] > 1)


@mpl.rc_context(DRAWN)
def map_picture(points: Sequence[Point], pareto: Sequence[Estimate], ranked: Sequence[Estimate]) -> Figure:
    """Draw step time over memory of the examined layouts, both logarithmic, with the Pareto front."""
    best, budget = ranked[0], ranked[0].cluster.budget_bytes / GIBI
    longest, largest = SLOWEST * best.time.total, LARGEST * best.cluster.budget_bytes
    drawn = [p for p in points if 0 < p.bytes <= largest and 0 < p.seconds <= longest]
    drawn = drawn[:: math.ceil(len(drawn) / MOST_POINTS) or 1]
    figure, axes = figure_of(486, "step time over memory of the layouts that were looked at", 64, 8, 30, 46)
    axes.set(xscale="log", yscale="log", xlabel="GiB on the fullest device")
    for kind, name in enumerate(KINDS):
        found = sorted((p for p in drawn if kind_of(p.mesh) == kind), key=lambda p: not p.fits)  # the legend shows the first
        if found:
            titles = [f"{shape_words(p.mesh)}: {seconds(p.seconds)}, {gib(p.bytes)} GiB" for p in found]
            alpha = [0.75 if point.fits else 0.25 for point in found]
            _dots(axes, [(p.bytes, p.seconds) for p in found], 2.6, titles, color=KIND_COLOURS[kind], alpha=alpha, label=name)
    front = sorted((e.memory.total, e.time.total, mesh_words(e.config.mesh)) for e in pareto)
    axes.plot([x / GIBI for x, _, _ in front], [y for _, y, _ in front], color=LIGHT["ink"], linewidth=1.6)
    titles = [f"{mesh}: {seconds(y)}, {gib(x)} GiB" for x, y, mesh in front]
    _dots(axes, [(x, y) for x, y, _ in front], 4, titles, color=LIGHT["ink"], label="none is both faster and smaller")
    ring = {"facecolor": "none", "edgecolor": LIGHT["limit"], "linewidth": 2.6, "label": "the first"}
    _dots(axes, [(best.memory.total, best.time.total)], 8, [f"first: {mesh_words(best.config.mesh)}"], **ring)
    for axis, write in ((axes.xaxis, "{:g}".format), (axes.yaxis, seconds)):
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axis.set_major_formatter(FuncFormatter(lambda value, _, write=write: write(value)))
        axis.set_minor_locator(NullLocator())
    axes.grid(visible=True)
    (low, fastest), (high, slowest) = axes.dataLim.get_points()
    axes.set(xlim=(low / 1.12, high * 1.12), ylim=(fastest / 1.12, slowest * 1.12))
    if low < budget < high * 1.12:
        axes.axvspan(budget, high * 1.12, color=LIGHT["limit"], alpha=0.06, linewidth=0, zorder=0)
        axes.axvline(budget, color=LIGHT["limit"], **DASHED)
        axes.text(budget * 1.01, 0.98, "does not fit", color=LIGHT["limit"], va="top", transform=axes.get_xaxis_transform())
    _legend(axes, handler_map={PathCollection: HandlerPathCollection(sizes=[60])})
    return figure


def _dots(
    axes: Axes, places: list[tuple[float, float]], radius: float, titles: list[str], linewidth=0.0, **settings: Any
) -> None:
    """Add dots at (bytes, seconds) with titles."""
    xs, ys = np.array(places).T
    axes.scatter(xs / GIBI, ys, (2 * radius) ** 2, urls=titles, zorder=radius, linewidth=linewidth, **settings)
