"""Draw the pictures of the planner's page as SVG: mesh, schedule, bars, map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from jaxtrain.config import MESH_AXES
from jaxtrain.mesh import split_over_hosts
from jaxtrain.planner.estimates import Estimate, Point
from jaxtrain.planner.svg import fitted, legend, line, polyline, rect, round_ticks, svg, text, text_width
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

WIDTH = 1080
MOST_HOSTS = 32
CELL, GAP, HOST_GAP = 24, 3, 14
UNIT = 7.0
"""Smallest width of a unit of the schedule's time."""
MOST_POINTS = 1500
SLOWEST, LARGEST = 8, 4
"""The map omits layouts that take longer than this many times the first, or need more than this many times the budget."""


# ---------------------------------------------------------------------------------------------------------------------
# The mesh on hosts


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


def hue(index: int, count: int) -> str:
    """Return the colour of one of `count` groups, with neighbours far enough apart."""
    return f"hsl({(212 + 360 * index / max(count, 1)) % 360:.0f} 48% 47%)"


def mesh_picture(layout: Estimate) -> str:
    """Draw hosts as boxes and devices as squares: coordinates that differ inside a host on its devices, others above it."""
    shape, per_host = layout.config.mesh.shape, layout.cluster.devices_per_host
    places = coordinates(shape, per_host)
    hosts, devices, _ = places.shape
    stride = math.ceil(hosts / MOST_HOSTS)
    shown = range(0, hosts, stride)
    varying = [axis for axis in range(len(shape)) if len(np.unique(places[0, :, axis])) > 1]
    fixed = [axis for axis, size in enumerate(shape) if size > 1 and axis not in varying]
    columns = 4 if devices <= 16 else 12
    rows = math.ceil(devices / columns)
    wide = min(devices, columns) * (CELL + GAP) - GAP + 16
    wide = max(wide, 118)
    tall = rows * (CELL + GAP) - GAP + 34
    per_row = max(1, int((WIDTH + HOST_GAP) / (wide + HOST_GAP)))
    parts, painted = [], colour_axis(shape)
    for number, host in enumerate(shown):
        x, y = number % per_row * (wide + HOST_GAP), number // per_row * (tall + HOST_GAP)
        parts.append(rect(x + 0.5, y + 0.5, wide - 1, tall - 1, class_="host", rx=8))
        name = _host_name([(MESH_AXES[axis], int(places[host, 0, axis])) for axis in fixed], wide - 16) or f"host {host}"
        parts.append(text(x + 8, y + 17, fitted(name, wide - 16, 11), 11, class_="soft"))
        for device in range(devices):
            place = places[host, device]
            left, top = x + 8 + device % columns * (CELL + GAP), y + 26 + device // columns * (CELL + GAP)
            whole = ", ".join(f"{MESH_AXES[axis]} {place[axis]}" for axis in range(len(shape)) if shape[axis] > 1)
            fill = hue(int(place[painted]), shape[painted])
            parts.append(rect(left, top, CELL, CELL, f"host {host}, device {device}: {whole or 'alone'}", fill=fill, rx=4))
            parts += _device_words([f"{MESH_AXES[axis][0]}{place[axis]}" for axis in varying], left, top)
    height = math.ceil(len(shown) / per_row) * (tall + HOST_GAP) - HOST_GAP
    return svg(WIDTH, height, parts, f"{hosts} hosts of {devices} devices")


def _host_name(place: list[tuple[str, int]], width: float) -> str:
    """Return "pipe 1, fsdp 3", or "p1 f3" if that is too wide."""
    name = ", ".join(f"{axis} {index}" for axis, index in place)
    return name if text_width(name, 11) <= width else " ".join(f"{axis[0]}{index}" for axis, index in place)


def _device_words(words: list[str], left: float, top: float) -> list[str]:
    """Return up to three coordinates, centred on a device's square, one per line."""
    words = words[-3:]
    longest = max((text_width(word, 1) for word in words), default=1)
    size = min({0: 11, 1: 11, 2: 9.5, 3: 7.5}[len(words)], (CELL - 2) / longest)
    first = top + CELL / 2 - (len(words) - 1) * size / 2 + size * 0.36
    return [text(left + CELL / 2, first + i * size, word, size, "middle", class_="on") for i, word in enumerate(words)]


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


def gantt_picture(layout: Estimate) -> str:
    """Draw one row per stage, time to the right; long steps are cut in the middle."""
    whole = timeline_of(layout.config)
    left, tall = 64.0, 24.0
    most = int((WIDTH - left) / UNIT)
    if whole.length <= most:
        windows = [(0, whole.length)]
    else:
        head = (most - 4) * 2 // 3
        windows = [(0, head), (whole.length - (most - 4 - head), whole.length)]
    units = sum(stop - start for start, stop in windows) + 4 * (len(windows) - 1)
    unit = min((WIDTH - left) / units, 40.0)
    parts = [legend(left, 12, [("forward", "forward"), ("backward", "backward"), ("idle", "waiting for other stages")])]
    top = 28.0
    origins = [left, left + (windows[0][1] - windows[0][0] + 4) * unit]
    for stage in range(whole.stages):
        parts.append(text(left - 10, top + stage * (tall + 3) + tall * 0.68, f"stage {stage}", 12, "end", class_="soft"))
        for (start, stop), origin in zip(windows, origins, strict=False):
            parts.append(rect(origin, top + stage * (tall + 3), (stop - start) * unit, tall, class_="idle", rx=3))
    for (start, stop), origin in zip(windows, origins, strict=False):
        for box in whole.boxes:
            paler = 1 - 0.6 * box.chunk / layout.config.pipeline.chunks
            first, last = max(box.start, start), min(box.start + box.length, stop)
            if first < last:
                y = top + box.stage * (tall + 3)
                parts += _box(box, origin + (first - start) * unit, y, (last - first) * unit, tall, paler)
    height = top + whole.stages * (tall + 3)
    if len(windows) > 1:
        parts.append(text(origins[1] - 2 * unit, top + (height - top) / 2, "…", 20, "middle", class_="soft"))
    return svg(WIDTH, height, parts, "the pipeline's schedule")


def _box(box: Box, x: float, y: float, width: float, height: float, opacity: float) -> list[str]:
    kind = "forward" if box.is_forward else "backward"
    title = f"{kind} of microbatch {box.microbatch} on stage {box.stage}" + (f", chunk {box.chunk}" if box.chunk else "")
    parts = [rect(x + 0.4, y, width - 0.8, height, title, class_=kind, opacity=opacity, rx=3)]
    if text_width(str(box.microbatch), 10) + 3 <= width:
        parts.append(text(x + width / 2, y + height * 0.65, str(box.microbatch), 10, "middle", class_="on"))
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# Bars


def memory_picture(ranked: Sequence[Estimate]) -> str:
    """Draw the memory of the fullest device by category, against the budget."""
    names = present(MEMORY_WORDS, [layout.memory for layout in ranked])
    rows = [(layout, {name: getattr(layout.memory, name) / GIBI for name in names}) for layout in ranked]
    budget = ranked[0].cluster.budget_bytes / GIBI
    limit = (budget, f"budget {gib(ranked[0].cluster.budget_bytes)} GiB") if math.isfinite(budget) else None
    return _bars(rows, names, "GiB", limit, lambda value: f"{gib(value * GIBI)} GiB")


def time_picture(ranked: Sequence[Estimate]) -> str:
    """Draw the seconds of a step by part."""
    names = present(TIME_WORDS, [layout.time for layout in ranked])
    rows = [(layout, {name: getattr(layout.time, name) for name in names}) for layout in ranked]
    return _bars(rows, names, "s", None, seconds)


def _bars(rows: Sequence[tuple[Estimate, Mapping[str, float]]], names: Mapping[str, str], unit: str, limit, write) -> str:
    """Draw stacked horizontal bars, one per layout, its name on the left and its sum on the right.

    Args:
      limit: (value, words) of a line across the bars, or None.
      write: formats a value.
    """
    left, right, tall, pitch, top = 366.0, 84.0, 22.0, 40.0, 46.0 if limit else 30.0
    longest = max([sum(values.values()) for _, values in rows] + ([limit[0]] if limit else []))
    scale = (WIDTH - left - right) / longest
    parts = [legend(left, 12, [(f"c{i}", name) for i, name in enumerate(names.values())])]
    for number, (layout, values) in enumerate(rows):
        y, x = top + number * pitch, left
        weight = "600" if number == 0 else None
        name = fitted(f"{number + 1}  {mesh_words(layout.config.mesh)}", left - 10, 11.8 if number else 13)
        parts.append(text(0, y + 9, name, 11.8, class_="ink", font_weight=weight))
        parts.append(text(16, y + 24, fitted(how_words(layout.config), left - 26, 10.8), 10.8, class_="soft"))
        for i, key in enumerate(names):
            wide = values[key] * scale
            parts.append(rect(x, y, wide, tall, f"{names[key]}: {write(values[key])}", class_=f"c{i}"))
            x += wide
        parts.append(text(x + 8, y + tall * 0.7, write(sum(values.values())), 12, class_="ink", font_weight=weight))
    height = top + len(rows) * pitch - (pitch - tall) + 4
    if limit:
        x = left + limit[0] * scale
        parts.append(line(x, top - 8, x, height, class_="limit"))
        anchor = "end" if x > WIDTH - text_width(limit[1], 11.5) / 2 else "middle"
        parts.append(text(x, top - 13, limit[1], 11.5, anchor, class_="limit-words"))
    return svg(WIDTH, height, parts, f"{', '.join(names.values())} of each layout, in {unit}")


# ---------------------------------------------------------------------------------------------------------------------
# The map

KINDS = ("data alone", "tensor", "pipe", "pipe and tensor")


def kind_of(mesh: Sequence[int]) -> int:
    """Return the index into KINDS: whether a mesh uses pipe and tensor."""
    return 2 * (mesh[MESH_AXES.index("pipe")] > 1) + (mesh[MESH_AXES.index("tensor")] > 1)


def map_picture(points: Sequence[Point], pareto: Sequence[Estimate], ranked: Sequence[Estimate]) -> str:
    """Draw step time over memory of the examined layouts, both logarithmic, with the Pareto front."""
    longest, largest = SLOWEST * ranked[0].time.total, LARGEST * ranked[0].cluster.budget_bytes
    drawn = [p for p in points if 0 < p.bytes <= largest and 0 < p.seconds <= longest]
    drawn = drawn[:: math.ceil(len(drawn) / MOST_POINTS) or 1]
    ends = [(e.memory.total, e.time.total) for e in (*pareto, *ranked)] + [(p.bytes, p.seconds) for p in drawn]
    plot = _Plot([x / GIBI for x, _ in ends], [y for _, y in ends])
    budget = ranked[0].cluster.budget_bytes / GIBI
    parts = plot.grid()
    if math.isfinite(budget) and plot.low_x < budget < plot.high_x:
        x = plot.x(budget)
        parts.append(rect(x, plot.top, plot.right - x, plot.bottom - plot.top, class_="beyond"))
        parts.append(line(x, plot.top, x, plot.bottom, class_="limit"))
        parts.append(text(x + 6, plot.top + 14, "does not fit", 11.5, class_="limit-words"))
    for point in drawn:
        mesh = shape_words(point.mesh)
        css = f"dot k{kind_of(point.mesh)}" + ("" if point.fits else " faint")
        parts.append(
            plot.dot(point.bytes / GIBI, point.seconds, 2.6, css, f"{mesh}: {seconds(point.seconds)}, {gib(point.bytes)} GiB")
        )
    front = sorted((e.memory.total / GIBI, e.time.total) for e in pareto)
    parts.append(polyline([(plot.x(x), plot.y(y)) for x, y in front], class_="front"))
    for estimate in pareto:
        label = f"{mesh_words(estimate.config.mesh)}: {seconds(estimate.time.total)}, {gib(estimate.memory.total)} GiB"
        parts.append(plot.dot(estimate.memory.total / GIBI, estimate.time.total, 4, "on-front", label))
    best = ranked[0]
    parts.append(plot.dot(best.memory.total / GIBI, best.time.total, 8, "winner", f"first: {mesh_words(best.config.mesh)}"))
    names = [(f"k{i}", name) for i, name in enumerate(KINDS) if any(kind_of(p.mesh) == i for p in drawn)]
    parts.append(
        legend(plot.left, 12, [*names, ("swatch-front", "none is both faster and smaller"), ("swatch-winner", "the first")])
    )
    return svg(WIDTH, plot.height, parts, "step time over memory of the layouts that were looked at")


class _Plot:
    """A logarithmic plane: memory in GiB to the right, seconds up."""

    left, right, top, bottom, height = 64.0, WIDTH - 8.0, 30.0, 440.0, 486.0

    def __init__(self, xs: Sequence[float], ys: Sequence[float]):
        self.low_x, self.high_x = min(xs) / 1.12, max(xs) * 1.12
        self.low_y, self.high_y = min(ys) / 1.12, max(ys) * 1.12

    def x(self, value: float) -> float:
        """Return the pixels from the left."""
        share = math.log(value / self.low_x) / math.log(self.high_x / self.low_x)
        return self.left + share * (self.right - self.left)

    def y(self, value: float) -> float:
        """Return the pixels from above."""
        share = math.log(value / self.low_y) / math.log(self.high_y / self.low_y)
        return self.bottom - share * (self.bottom - self.top)

    def grid(self) -> list[str]:
        """Return the lines at round numbers, and their labels."""
        parts = []
        for value in round_ticks(self.low_x, self.high_x, 12):
            parts.append(line(self.x(value), self.top, self.x(value), self.bottom, class_="grid"))
            parts.append(text(self.x(value), self.bottom + 18, f"{value:g}", 11.5, "middle", class_="soft"))
        for value in round_ticks(self.low_y, self.high_y):
            parts.append(line(self.left, self.y(value), self.right, self.y(value), class_="grid"))
            parts.append(text(self.left - 8, self.y(value) + 4, seconds(value), 11.5, "end", class_="soft"))
        middle = (self.left + self.right) / 2
        parts.append(text(middle, self.bottom + 40, "GiB on the fullest device", 12, "middle", class_="soft"))
        return parts

    def dot(self, x: float, y: float, radius: float, css: str, title: str) -> str:
        """Return a point with a title."""
        from html import escape

        from jaxtrain.planner.svg import element

        return element("circle", element("title", escape(title)), cx=self.x(x), cy=self.y(y), r=radius, class_=css)
