"""Draws of layouts for tests: by hypothesis, and a fixed few that together have as much as possible of what can be drawn."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable

from hypothesis import assume
from hypothesis import strategies as st

from jaxtrain.config import MESH_AXES, Config
from jaxtrain.config.names import field_values
from jaxtrain.measure.layouts import LAYOUTS_A_TASK, draw_configs

DEVICES, CANDIDATES = 8, 250
SURE = {
    ("expert", "pipe"),
    ("expert", "fsdp"),
    ("expert", "tensor"),
    ("context", "sharding.context_attention=ring"),
    ("tensor", "sharding.context_attention=ulysses"),
    ("fsdp", "sharding.context_attention=gather"),
    ("context", "model.latent_attention.query_rank=12"),
    ("pipe", "pipeline.schedule=zero_bubble"),
    ("tensor", "lora.rank=4"),
    ("fsdp", "lora.base=nf4"),
}
"""Features that the few of every run must have, since no other test of a run has them."""


@st.composite
def configs(draw: st.DrawFn, devices: int = DEVICES) -> list[Config]:
    """Draw the layouts of one task."""
    assume(draw(st.booleans()))  # hypothesis begins with the first option of everything, which tells little
    found = draw_configs(lambda options: draw(st.sampled_from(options)), devices)
    assume(len(found) == LAYOUTS_A_TASK)
    return found


@functools.cache
def candidates() -> list[list[Config]]:
    """Return the layouts of drawn tasks, the same in every run."""
    chance = random.Random(7)
    drawn = (draw_configs(chance.choice, DEVICES) for _ in range(CANDIDATES))
    return [layouts for layouts in drawn if len(layouts) == LAYOUTS_A_TASK]


@functools.cache
def features(config: Config) -> frozenset[tuple[str, str]]:
    """Return a pair (axis, what it meets) of every axis above 1 with every other one and with the value of every field."""
    axes = [axis for axis in MESH_AXES if getattr(config.mesh, axis) > 1]
    fields = [f"{name}={value}" for name, value in field_values(config).items() if not name.startswith("mesh.")]
    return frozenset((axis, met) for axis in axes for met in (*axes, *fields))


def features_of(tasks: Iterable[list[Config]]) -> set[tuple[str, str]]:
    """Return the features of all layouts of the tasks."""
    return {feature for layouts in tasks for config in layouts for feature in features(config)}


def seconds_of(layouts: list[Config]) -> int:
    """Estimate the CPU seconds of a task: what is traced and compiled grows with the kinds of layers and their programs."""

    def seconds(config: Config, in_turns: bool) -> int:
        of_kind = 3 * (2 if config.model.moe else 1) * (2 if in_turns else 1)
        return (8 + max(1, len(config.model.pattern)) * of_kind) * (1 + len(config.train.stages))

    in_turns = [config.mesh.tensor > 1 or config.mesh.expert > 1 for config in layouts]
    return seconds(layouts[0], False) + sum(map(seconds, layouts, in_turns))


@functools.cache
def covering(count: int) -> list[list[Config]]:
    """Choose `count` of the candidates, one by one: that with most new features in its time; SURE and new values weigh more."""
    chosen: list[list[Config]] = []
    for _ in range(count):
        seen = features_of(chosen)
        values = {met for _, met in seen}

        def worth(layouts: list[Config], seen: set = seen, values: set = values) -> float:
            new = features_of([layouts]) - seen
            return (len(new) + 10 * len({met for _, met in new} - values) + 300 * len(new & SURE)) / seconds_of(layouts)

        chosen.append(max(candidates(), key=worth))
    return chosen
