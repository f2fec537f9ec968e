"""The stage of a run that a plan is made for: the one that takes the most memory. The others take its layout."""

from __future__ import annotations

import math

from jaxtrain.config import Config, Recipe, ResolvedStage
from jaxtrain.config.rules import divisors, find_problems
from jaxtrain.planner.candidate import layout_of, with_layout
from jaxtrain.planner.memory import estimate_memory


def worst_stage(config: Config, backend: str = "cudnn") -> ResolvedStage:
    """Return the stage that takes the most memory by estimate, in the config's own layout, which is valid."""
    return max(Recipe(config).stages, key=lambda stage: estimate_memory(stage.config, backend).total)


def longest_stage(config: Config) -> ResolvedStage:
    """Return the stage with the longest sequences, of these with the largest batch: the worst whatever the layout."""
    stages = Recipe(config).stages
    return max(stages, key=lambda stage: (stage.config.data.sequence_length, stage.config.train.global_batch_size))


def stage_words(config: Config, stage: ResolvedStage) -> str:
    """Return a line that says which stage figures are of."""
    train, data = stage.config.train, stage.config.data
    return (
        f"stages     figures are of stage {stage.name}, {train.global_batch_size} x {data.sequence_length} tokens, which of "
        f"{len(Recipe(config).stages)} takes the most memory; all have one layout"
    )


def of_whole_run(config: Config, planned: Config) -> Config | None:
    """Return a run with the layout that was planned for its longest stage; None where another stage cannot have it.

    train.microbatches, those of the first stage, are such that the longest stage has the planned ones, or as many as it can.
    """
    layout, name = layout_of(planned), longest_stage(config).name
    found = None
    for count in divisors(layout.microbatches):
        made = with_layout(config, layout._replace(microbatches=count))
        if find_problems(made, math.prod(planned.mesh.shape))[1]:
            continue
        reached = next(stage for stage in Recipe(made).stages if stage.name == name).config.train.microbatches
        if reached == layout.microbatches:
            return made
        found = made
    return found
