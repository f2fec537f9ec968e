"""What each step of a run trains with: `train.stages`, resolved. Trainer, data, planner and telemetry all ask here.

Step n + 1 is the one that has n steps before it, and takes batch n; stages are found by n.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, replace
from typing import Any

from jaxtrain.config.as_json import to_plain
from jaxtrain.config.fields import Config
from jaxtrain.config.stage_fields import Stage

_NO_CHANGE = ("name", "from_step", "from_tokens")
MOST_MICROBATCHES = 2**14
"""Most rows of a step's table."""


@dataclass(frozen=True)
class ResolvedStage:
    """Consecutive steps that train with one config."""

    name: str
    first: int
    """Steps before it."""
    config: Config
    """The run's, with what the stages so far have changed, and without `train.stages`."""
    tokens: int = 0
    """Tokens in the steps before it, padding included."""
    rate_first: int = 0
    """Steps before its learning-rate schedule, which may have begun in an earlier stage."""
    rate_steps: int = 0
    """Steps of that schedule."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step, padding included."""
        return self.config.train.global_batch_size * self.config.data.sequence_length

    @property
    def program(self) -> tuple[Any, ...]:
        """Return what its compiled step depends on and stages can change; other numbers are inputs of the program."""
        train, model = self.config.train, self.config.model
        shape = (train.global_batch_size, train.microbatches, self.config.data.sequence_length)
        return (*shape, model.rope_theta, model.rope_scaling, train.z_loss)

    @property
    def weights(self) -> tuple[float, ...]:
        """Share of each source, relative to the others."""
        return tuple(source.weight for source in self.config.data.sources)


class Recipe:
    """The stages of a config, one where it has no `train.stages`."""

    def __init__(self, config: Config):
        train = replace(config.train, stages=())
        self.all = [ResolvedStage("1", 0, replace(config, train=train), rate_steps=train.steps)]
        """All stages, also those that begin after train.steps."""
        self._table, self._table_firsts = config.train.stages, list[int]()
        for number, stage in enumerate(config.train.stages, 2):
            last = self.all[-1]
            first = _first_step(stage, last)
            self._table_firsts.append(first)
            self.all.append(_after(config, last, stage, first, stage.name or str(number)))
        self.stages = [stage for stage in self.all if stage.first < train.steps] or self.all[:1]
        """Those that the run reaches, the last without an end."""
        self._firsts, self._steps = [stage.first for stage in self.stages], train.steps

    def at(self, steps_before: int) -> ResolvedStage:
        """Return the stage of the step that has so many before it."""
        return self.stages[bisect.bisect_right(self._firsts, steps_before) - 1]

    def tokens(self, steps: int) -> int:
        """Return the tokens in the first `steps` steps, padding included."""
        stage = self.at(steps)
        return stage.tokens + (steps - stage.first) * stage.tokens_per_step

    def rows(self, steps: int) -> int:
        """Return the rows in the first `steps` steps."""
        ends = [*self._firsts[1:], steps]
        counts = [max(min(end, steps) - first, 0) for first, end in zip(self._firsts, ends, strict=True)]
        return sum(count * stage.config.train.global_batch_size for count, stage in zip(counts, self.stages, strict=True))

    def last_step(self, stage: ResolvedStage) -> int:
        """Return the step with which a stage ends."""
        later = [first for first in self._firsts if first > stage.first]
        return later[0] if later else self._steps

    @property
    def block_length(self) -> int:
        """The longest sequence of any stage, also of those that are never reached: the data's order is made of such blocks."""
        return max(stage.config.data.sequence_length for stage in self.all)

    def to_plain(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it: the longest sequence, and what each stage changes."""
        default, stages = Stage(), []
        for stage, first in zip(self._table, self._table_firsts, strict=True):
            given = {name: value for name, value in to_plain(stage).items() if value != getattr(default, name)}
            stages.append({"first": first, **{name: given[name] for name in given if name not in _NO_CHANGE}})
        return {"block_length": self.block_length, "stages": stages}

    @property
    def schedules(self) -> tuple[str, ...]:
        """Names of all learning-rate schedules, each once: part of the program."""
        return tuple(dict.fromkeys(stage.config.optimizer.schedule for stage in self.all))


def config_at(config: Config, steps: int) -> Config:
    """Return the config with which the last of `steps` steps was trained: what a checkpoint's weights are used with."""
    return Recipe(config).at(max(steps - 1, 0)).config if config.train.stages else config


def _first_step(stage: Stage, last: ResolvedStage) -> int:
    """Return the steps before a stage, from the one before it."""
    if not stage.from_tokens:
        return stage.from_step
    return last.first + math.ceil(max(stage.from_tokens - last.tokens, 0) / last.tokens_per_step)


def _after(run: Config, last: ResolvedStage, stage: Stage, first: int, name: str) -> ResolvedStage:
    """Return the stage of a run that follows `last` at step `first`."""
    config, train = last.config, last.config.train
    tokens = last.tokens + (first - last.first) * last.tokens_per_step
    model, data = replace(config.model, **_given(stage, "rope_theta", "rope_scaling")), config.data
    data = replace(data, **_given(stage, "sequence_length"))
    if stage.weights:
        weighed = zip(data.sources, stage.weights, strict=False)
        data = replace(data, sources=tuple(replace(source, weight=weight) for source, weight in weighed))
    new = replace(train, **_given(stage, "global_batch_size", "z_loss"))
    step_tokens = new.global_batch_size * data.sequence_length
    grown = step_tokens / last.tokens_per_step
    new = replace(new, microbatches=_microbatches(run, step_tokens, new.global_batch_size))
    power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[stage.batch_rule]
    optimizer = replace(config.optimizer, peak_lr=config.optimizer.peak_lr * grown**power)
    optimizer = replace(optimizer, **_given(stage, "peak_lr", "weight_decay"))
    config = replace(config, model=model, data=data, train=new)
    if not stage.schedule:
        return ResolvedStage(name, first, replace(config, optimizer=optimizer), tokens, last.rate_first, last.rate_steps)
    own = _given(stage, "schedule", "warmup_steps", "decay_fraction", "final_lr_fraction")
    steps = stage.schedule_steps or max(train.steps - first, 1)
    return ResolvedStage(name, first, replace(config, optimizer=replace(optimizer, **own)), tokens, first, steps)


def _given(stage: Stage, *names: str) -> dict[str, Any]:
    """Return what a stage gives of some fields."""
    return {name: value for name in names if (value := getattr(stage, name)) is not None}


def _microbatches(run: Config, tokens: int, batch: int) -> int:
    """Return the multiple of train.microbatches that keeps a microbatch's tokens, as far as the batch divides by it."""
    mesh, now = run.mesh, run.train.microbatches
    grown = tokens / (run.train.global_batch_size * run.data.sequence_length)
    shards = math.prod(max(size, 1) for size in (mesh.replica, mesh.data, mesh.fsdp, mesh.expert))
    counts = range(now, min(batch // shards, MOST_MICROBATCHES) + 1, now) if grown > 1 else ()
    fitting = [count for count in counts if batch % (shards * count) == 0]
    return next((count for count in fitting if count >= now * grown), max(fitting, default=now))
