"""The first law, held: layouts drawn by hypothesis, and an assertion that the layout never changes the result."""

from __future__ import annotations

from hypothesis import assume
from hypothesis import strategies as st

from jaxtrain.config import Config
from jaxtrain.measure.layouts import LAYOUTS_A_TASK, STEPS, Errors, compare, draw_configs


@st.composite
def configs(draw: st.DrawFn, devices: int = 8) -> list[Config]:
    """`draw_configs` by hypothesis."""
    assume(draw(st.booleans()))  # hypothesis begins with the first option of everything, which tells little
    found = draw_configs(lambda options: draw(st.sampled_from(options)), devices)
    assume(len(found) == LAYOUTS_A_TASK)
    return found


def check(config: Config, steps: int = STEPS) -> Errors:
    """`compare`, and an assertion that prints the config."""
    errors = compare(config, steps)
    assert errors.problem is None, f"{errors.problem}\n{config!r}"
    return errors
