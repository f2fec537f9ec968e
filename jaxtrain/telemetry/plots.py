"""Draw a run's losses: loss.png, from metrics.jsonl. `jaxtrain report` draws several runs, and more of each."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtrain.files import replacing
from jaxtrain.telemetry.metrics import read_rows
from jaxtrain.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAINING, VALIDATION, BASELINE, RATE, INK, FAINT = "#2563eb", "#ea580c", "#64748b", "#0d9488", "#0f172a", "#e2e8f0"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#94a3b8",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "grid.color": FAINT,
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


def plot_losses(
    metrics_jsonl: Path, png_path: Path, title: str = "", baselines: Mapping[str, float] | None = None, dots_per_inch: int = 150
) -> bool:
    """Draw training loss (nats per token), learning rate, and validation (bits per byte) or rewards over steps into a PNG.

    Args:
      metrics_jsonl: the run's metrics.
      png_path: the picture; replaced atomically.
      title: drawn above it.
      baselines: horizontal lines on the validation panel, in bits per byte, e.g. {"gzip -9": 2.02}.
      dots_per_inch: the picture is 11 x 4.6 inches, or 6.8 x 4.6 without validation and rewards.

    Returns False, and draws nothing, if there is no training loss yet.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = read_rows(metrics_jsonl)
    if not column(rows, "loss")[0].size:
        return False
    beside: Callable[[Axes], None] | None = None
    if column(rows, "reward")[0].size:
        beside = functools.partial(_draw_reward, rows=rows)
    elif column(rows, "validation_bits_per_byte")[0].size:
        beside = functools.partial(_draw_validation, rows=rows, baselines=dict(baselines or {}))
    # A Figure of our own, not pyplot's, which would look for a window system and change global state.
    with mpl.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
        figure = Figure(figsize=(11 if beside else 6.8, 4.6), layout=layout, facecolor="white")
        FigureCanvasAgg(figure)
        _draw(figure, rows, beside)
        if title:
            figure.suptitle(literal(title), x=0.012, ha="left", fontsize=13.5, fontweight="bold")
        with replacing(png_path) as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # letters without a glyph become boxes
            figure.savefig(file, dpi=dots_per_inch, format="png")
    return True


def literal(text: str) -> str:
    """Return text that matplotlib draws as it is: a dollar sign does not start a formula."""
    return printable(text).replace("$", r"\$")


def column(rows: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of all rows with a number under `key`; null (not finite) is left out."""
    pairs = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]
    points = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def smooth(values: np.ndarray, width: float) -> np.ndarray:
    """Return at each value the line fitted around it with Gaussian weights of standard deviation `width` (in values).

    With w the weights and d the distances: (sum w d^2 sum w y - sum w d sum w d y) / (sum w sum w d^2 - (sum w d)^2). In the
    middle that is the weighted mean; at both ends, where a mean bends towards the side that has values, it continues straight.
    """
    distance = np.arange(-int(3 * width), int(3 * width) + 1)
    weight = np.exp(-0.5 * (distance / width) ** 2)
    middle = slice(len(distance) // 2, len(distance) // 2 + len(values))
    ones = np.ones(len(values))
    # np.convolve reverses the kernel, and with it the sign of odd distances.
    w, wd, wdd = (np.convolve(ones, weight * (-distance) ** power)[middle] for power in range(3))
    wy, wdy = (np.convolve(values, weight * (-distance) ** power)[middle] for power in range(2))
    below = w * wdd - wd**2
    flat = below < 1e-9 * w**2  # a single value under the weights
    return np.where(flat, wy / w, (wdd * wy - wd * wdy) / np.where(flat, 1.0, below))


def _draw(figure: Figure, rows: list[dict[str, Any]], beside: Callable[[Axes], None] | None) -> None:
    """Draw loss and learning rate, and `beside` in a panel to the right of them."""
    grid = figure.add_gridspec(2, 2 if beside else 1, height_ratios=(3.4, 1), width_ratios=None)
    loss = figure.add_subplot(grid[0, 0])
    rate = figure.add_subplot(grid[1, 0], sharex=loss)
    _draw_loss(loss, rows)
    loss.tick_params(labelbottom=False)
    steps, rates = column(rows, "learning_rate")
    rate.fill_between(steps, rates, color=RATE, alpha=0.12, linewidth=0)
    rate.plot(steps, rates, color=RATE, linewidth=1.6)
    rate.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    panels = [loss, rate]
    if beside:
        panels.append(figure.add_subplot(grid[:, 1]))
        beside(panels[-1])
    last = max(row["step"] for row in rows)
    _draw_stages(panels, rows, last)
    for panel in panels:
        panel.set_xlim(0, last * 1.02)
        panel.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")


def stages_of(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """Return (first step, name) of each stage that rows name, in order."""
    found: list[tuple[int, str]] = []
    for row in rows:
        if row.get("stage") is not None and (not found or found[-1][1] != str(row["stage"])):
            found.append((row["step"] if found else 0, str(row["stage"])))
    return found


def _draw_stages(panels: Sequence[Axes], rows: list[dict[str, Any]], last: int) -> None:
    """Draw every other stage as a band behind the panels, and their names into the first."""
    stages = stages_of(rows)
    ends = [begin for begin, _ in stages[1:]] + [last * 1.02]
    for number, ((begin, name), end) in enumerate(zip(stages, ends, strict=False)):
        for panel in panels:
            panel.axvspan(begin, end, color=FAINT, alpha=0.7 * (number % 2), linewidth=0, zorder=0)
        across = panels[0].get_xaxis_transform()
        panels[0].text(begin, 0.01, f" {literal(name)}", transform=across, color=BASELINE, va="bottom")


def shown_range(values: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """Return the bounds of a picture of logged values, which may have spikes, and of others, all of which are shown.

    Everything below the first value is shown; above it, the highest hundredth may be cut off.
    """
    visible = np.concatenate([values[:1], [np.quantile(values, 0.99)], others])
    return min(values.min(), visible.min()), visible.max()


def _draw_logged(axes: Axes, rows: list[dict[str, Any]], key: str, logged: str, held_out: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw a number of each logged step, as it is and smoothed, and that of validations; return both."""
    (steps, values), (held_out_steps, held_out_values) = column(rows, key), column(rows, f"validation_{key}")
    means = column(rows, f"{key}_mean")[1]
    smoothed = smooth(means if means.size == steps.size else values, width=max(len(values) / 40, 0.5))
    axes.plot(steps, values, color=TRAINING, alpha=0.35, linewidth=1.0, label=f"{logged}, each logged step")
    axes.plot(steps, smoothed, color=TRAINING, linewidth=2.0, label=f"{logged}, smoothed")
    if held_out_steps.size:
        look = {"color": VALIDATION, "linewidth": 1.6, "markersize": 4.5, "markeredgecolor": "white"}
        axes.plot(held_out_steps, held_out_values, "-o", **look, zorder=4, label=held_out)
    axes.legend(loc="best")
    return values, held_out_values


def _draw_loss(axes: Axes, rows: list[dict[str, Any]]) -> None:
    low, high = shown_range(*_draw_logged(axes, rows, "loss", "training", "held-out text"))
    margin = 0.06 * (high - low) or 0.1
    axes.set(title="Loss", ylabel="cross-entropy (nats per token)", ylim=(low - margin, high + margin))


def _draw_reward(axes: Axes, rows: list[dict[str, Any]]) -> None:
    _draw_logged(axes, rows, "reward", "sampled answers", "held-out prompts, likeliest answers")
    axes.set(title="Reward", xlabel="step", ylabel="mean reward of an answer")


def _draw_validation(axes: Axes, rows: list[dict[str, Any]], baselines: dict[str, float]) -> None:
    steps, bits = column(rows, "validation_bits_per_byte")
    axes.plot(steps, bits, "-o", color=VALIDATION, linewidth=2.0, markersize=5.5, markeredgecolor="white", zorder=3)
    falls = len(bits) > 1 and bits[-1] <= bits[-2]
    words = f"\n{bits[-1]:.3f}" if falls else f"{bits[-1]:.3f}\n"  # away from the line to the point
    look: dict[str, Any] = {"ha": "right", "va": "top" if falls else "bottom", "color": VALIDATION, "weight": "bold"}
    axes.text(steps[-1], bits[-1], words, **look)
    for name, level in baselines.items():
        axes.axhline(level, color=BASELINE, linewidth=1.4, linestyle=(0, (5, 3)), zorder=2)
        axes.text(0.01, level, f"{name}: {level:.3f}", transform=axes.get_yaxis_transform(), color=BASELINE, va="bottom")
    levels = [*bits, *baselines.values()]
    margin = 0.12 * (max(levels) - min(levels)) or 0.1
    axes.set(title="Held-out text", xlabel="step", ylabel="bits per byte", ylim=(min(levels) - margin, max(levels) + margin))
