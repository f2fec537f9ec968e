"""Rules for `train.stages`: each stage's fields, their order, and what of a run cannot change on the way."""

from __future__ import annotations

import itertools
from dataclasses import replace

from jaxtrain.config.fields import Config
from jaxtrain.config.stage_fields import Stage
from jaxtrain.config.stages import Recipe

_OF_SCHEDULE = ("warmup_steps", "schedule_steps", "decay_fraction", "final_lr_fraction")
_OF_RATE = ("schedule", "peak_lr", "weight_decay")
_OF_ROWS = ("weights", "global_batch_size", "sequence_length", "rope_theta", "rope_scaling")
_RANGES = {
    "at least 1": (("global_batch_size", "sequence_length"), lambda n: n >= 1),
    "0 or more": (
        ("from_step", "from_tokens", "warmup_steps", "schedule_steps", "weight_decay", "z_loss"),
        lambda n: n >= 0,
    ),
    "above 0": (("rope_theta", "peak_lr"), lambda n: n > 0),
    "0 to 1": (("decay_fraction", "final_lr_fraction"), lambda n: 0 <= n <= 1),
}


def stage_problems(config: Config) -> list[str]:
    """Return the problems of `train.stages`, of a config whose types are right."""
    stages = config.train.stages
    problems = [problem for i, stage in enumerate(stages) for problem in _own_problems(f"train.stages.{i}", stage, config)]
    if not stages or problems:
        return problems
    firsts = [Recipe(_up_to(config, i)).all[-1].first for i in range(len(stages))]
    for i, (before, first) in enumerate(itertools.pairwise([0, *firsts])):
        if first <= before:
            one = f"train.stages.{i - 1} with {before:,}" if i else "and the config's own fields hold until then"
            problems.append(
                f"train.stages.{i} begins with {first:,} steps done, {one}; give it a later from_step or from_tokens"
            )
    if problems:
        return problems
    recipe = Recipe(config)
    for stage in recipe.all:
        if not any(stage.weights):
            problems.append(f"train.stages, stage {stage.name}: all weights are 0; give one of data.sources a share")
    block, lengths = recipe.block_length, sorted({stage.config.data.sequence_length for stage in recipe.all})
    for length in lengths:
        if block % length:
            near = sorted((n for n in range(1, block + 1) if block % n == 0), key=lambda n: abs(n - length))
            problems.append(
                f"train.stages: sequence_length={length} does not divide the longest of all stages, {block}, which the data's "
                f"blocks have; use {near[0]}"
            )
    chats = [i for i, source in enumerate(config.data.sources) if source.kind == "chat"]
    packed = [f"data.sources.{i}, kind=chat," for i in chats] + ["data.packing=best_fit"] * (config.data.packing == "best_fit")
    if len(lengths) > 1 and packed:
        problems.append(
            f"train.stages: sequence_length changes, but the rows of {packed[0]} are packed for one "
            "length; keep it, or make the later stages a run of their own with --init_from=RUN --init_from_optimizer=True"
        )
    return problems


def _up_to(config: Config, index: int) -> Config:
    return replace(config, train=replace(config.train, stages=config.train.stages[: index + 1]))


def _own_problems(name: str, stage: Stage, config: Config) -> list[str]:
    problems = []
    for words, (fields, holds) in _RANGES.items():
        given = {field: value for field in fields if (value := getattr(stage, field)) is not None}
        problems += [f"{name}.{field}={value} must be {words}" for field, value in given.items() if not holds(value)]
    if stage.from_step and stage.from_tokens:
        problems.append(f"{name} has from_step={stage.from_step} and from_tokens={stage.from_tokens}; give one of them")
    sources = len(config.data.sources)
    if stage.weights and len(stage.weights) != sources:
        problems.append(f"{name}.weights has {len(stage.weights)} shares for {sources} data.sources; give one for each")
    problems += [f"{name}.weights={weight} is a share: 0 or more" for weight in stage.weights if weight < 0]
    idle = [field for field in _OF_SCHEDULE if getattr(stage, field)]
    if idle and not stage.schedule:
        problems.append(f"{name}.{idle[0]} belongs to a schedule that begins here; give {name}.schedule too")
    if stage.batch_rule != "none" and stage.peak_lr is not None:
        problems.append(f"{name} has peak_lr and batch_rule={stage.batch_rule}, which sets it; give one of them")
    changed = [field for field in (*_OF_RATE, *_OF_ROWS) if getattr(stage, field) not in (None, "", ())]
    rates = [field for field in changed if field in _OF_RATE]
    if rates and config.parts.optimizer is not None:
        problems.append(f"{name}.{rates[0]}: the optimizer is one of your own, with rates of its own; leave it out")
    rows = [field for field in changed if field in _OF_ROWS]
    if rows and config.objective.kind not in ("pretrain", "sft"):
        problems.append(f"{name}.{rows[0]} changes rows, which objective.kind={config.objective.kind} cannot; leave it out")
    return problems
