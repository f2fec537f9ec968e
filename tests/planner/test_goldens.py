"""Figures of fixed layouts are those of goldens.json; `python -m tests.planner.goldens --write` writes it anew."""

import json
import math

from tests.planner.goldens import FILE, figures, flat


def test_no_figure_has_changed():
    """A difference names the layout, the field, what it was and what it is now."""
    kept, differences = json.loads(FILE.read_text(encoding="utf-8")), []
    found = dict(figures())
    for name in kept | found:
        was, now = flat(kept.get(name, {})), flat(found.get(name, {}))
        for field in was | now:
            if not _is_alike(was.get(field), now.get(field)):
                differences.append(f"{name}: {field}: was {was.get(field)}, now {now.get(field)}")
    assert not differences, "\n".join(differences)


def _is_alike(was: object, now: object) -> bool:
    """Whether two figures are the same but for the last digit that is kept."""
    if isinstance(was, list) and isinstance(now, list):
        return len(was) == len(now) and all(map(_is_alike, was, now))
    if isinstance(was, int | float) and isinstance(now, int | float):
        return math.isclose(was, now, rel_tol=2e-5)
    return was == now
