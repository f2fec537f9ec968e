"""SVG for the planner's page: elements as strings, text that fits, axes with round numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

GLYPH = 0.56
"""Mean width of a character of a sans-serif font, in font sizes."""


def element(name: str, *children: str, **attributes: object) -> str:
    """Return `<name attributes>children</name>`; `class_` becomes class, an underscore a hyphen, and None is left out.

    Children are markup already: escape text with `text` or `html.escape`.
    """
    words = "".join(
        f' {key.rstrip("_").replace("_", "-") if key != "viewBox" else key}="{_value(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{words}>{''.join(children)}</{name}>" if children else f"<{name}{words}/>"


def _value(value: object) -> str:
    return f"{round(value, 2):g}" if isinstance(value, float) else escape(str(value), quote=True)


def svg(width: float, height: float, parts: Iterable[str], label: str) -> str:
    """Return a picture that scales to its column, with a label for screen readers."""
    body = "".join(parts)
    return element(
        "svg", body, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label, style=f"min-width:{width * 0.65:.0f}px"
    )


def rect(x: float, y: float, width: float, height: float, title: str = "", **attributes: object) -> str:
    """Return a rectangle, with a title as its tooltip."""
    children = [element("title", escape(title))] if title else []
    return element("rect", *children, x=x, y=y, width=max(width, 0.0), height=height, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, **attributes: object) -> str:
    """Return a straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, **attributes)


def text(x: float, y: float, words: str, size: float = 12, anchor: str = "start", **attributes: object) -> str:
    """Return words whose baseline begins, is centred or ends (anchor start, middle, end) at (x, y)."""
    return element(
        "text", escape(words), x=x, y=y, font_size=size, text_anchor=None if anchor == "start" else anchor, **attributes
    )


def text_width(words: str, size: float) -> float:
    """Estimate the width of words."""
    return GLYPH * size * len(words)


def fitted(words: str, width: float, size: float) -> str:
    """Return the words, cut with an ellipsis if wider than `width`; "" if not even two letters fit."""
    if text_width(words, size) <= width:
        return words
    room = int(width / (GLYPH * size)) - 1
    return words[:room].rstrip() + "…" if room >= 2 else ""


def round_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Return round numbers (1, 2, 5 x 10^n) within a logarithmic range, few enough to read."""
    ticks: list[float] = []
    for steps in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [digit * 10.0**power for power in powers for digit in steps if low <= digit * 10.0**power <= high]
        if len(ticks) <= most:
            break
    return ticks


def polyline(points: Iterable[tuple[float, float]], **attributes: object) -> str:
    """Return a line through points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return element("polyline", points=path, fill="none", **attributes)


def legend(x: float, y: float, names: Iterable[tuple[str, str]], size: float = 12) -> str:
    """Return swatches side by side: (CSS class of the swatch, name)."""
    parts = []
    for css, name in names:
        parts.append(rect(x, y - 9, 11, 11, class_=css, rx=2.5))
        parts.append(text(x + 16, y, name, size, class_="soft"))
        x += 16 + text_width(name, size) + 20
    return "".join(parts)
