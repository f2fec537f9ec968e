"""The learning rate over steps, from numbers that are inputs of the compiled step: another rate or length reuses the program.

Only the names of the run's schedules are part of the program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxtrain.config import Config, OptimizerConfig, Recipe
from jaxtrain.errors import ExplainedError, nearest

Number = Any
"""A float32 scalar: of numpy on the host, of jax in a program."""


class Hyperparameters(NamedTuple):
    """Numbers of the update rule that are inputs of a program, float32 scalars except the seed."""

    peak_lr: Number
    """Largest learning rate."""
    final_lr_fraction: Number
    """Final rate as a share of peak_lr."""
    warmup_steps: Number
    """Number of warm-up steps, `warmup_steps`."""
    decay_start: Number
    """Number of steps before the decay."""
    decay_steps: Number
    """Number of steps of the decay, at least 1."""
    weight_decay: Number
    """Decoupled weight decay."""
    seed: Any
    """`seed_words` of train.seed, for stochastic rounding."""
    first: Number = np.float32(0)
    """Steps before the schedule."""
    start_share: Number = np.float32(0)
    """Rate from which the warm-up begins, as a share of peak_lr."""
    schedule: Number = np.float32(0)
    """Index of the schedule's name among those of the run."""


def seed_words(seed: int) -> np.ndarray:
    """Return uint32 [2], the upper and the lower 32 bits of a seed of up to 63 bits: the data of its key."""
    return np.array(divmod(seed, 2**32), np.uint32)


def warmup_steps(config: OptimizerConfig, total_steps: int) -> int:
    """min(optimizer.warmup_steps, total_steps // 2): a short trial run warms up in its first half at most."""
    return min(config.warmup_steps, total_steps // 2)


def hyperparameters(config: OptimizerConfig, total_steps: int, seed: int = 0) -> Hyperparameters:
    """Return the program inputs of a run of `total_steps` optimizer steps, on the host; see `make_learning_rate`'s formulas."""
    warmup = warmup_steps(config, total_steps)
    decay = total_steps - warmup
    if config.schedule == "warmup_stable_decay":
        decay = min(max(round(config.decay_fraction * total_steps), 1), decay)
    start = total_steps - decay if total_steps > 1 else 1
    numbers = (config.peak_lr, config.final_lr_fraction, warmup, start, decay, config.weight_decay)
    return Hyperparameters(*map(np.float32, numbers), seed=seed_words(seed))  # type: ignore[call-arg]


def learning_rate(schedules: Sequence[str], numbers: Hyperparameters, step: Any, library: Any = jnp) -> Any:
    """Return the rate of step s = 0, 1, ... by the formulas of `make_learning_rate`, float32.

    Args:
      schedules: names of all schedules of the run, of which `numbers` choose one.
      step: optimizer steps taken before it, int32.
      library: jax.numpy in a program; numpy on the host, which then waits for no device.

    Raises:
      ExplainedError: an unknown schedule.
    """
    # Skipped steps are not counted, so a stage may begin before its schedule does.
    n, warmup = library.maximum(library.asarray(step, np.float32) - numbers.first, 0) + 1, numbers.warmup_steps
    x = library.clip((n - numbers.decay_start) / numbers.decay_steps, 0, 1)
    final = numbers.final_lr_fraction
    shapes: dict[str, Callable[[], Any]] = {
        "constant": lambda: library.ones_like(n),
        "cosine": lambda: final + (1 - final) * (1 + library.cos(np.float32(math.pi) * x)) / 2,
        "warmup_stable_decay": lambda: 1 - (1 - final) * x,
        "inverse_sqrt": lambda: library.sqrt(library.maximum(warmup, 1) / n),
    }
    for name in schedules:
        if name not in shapes:
            raise ExplainedError(f"optimizer.schedule={name!r}: {nearest(name, shapes)}")
    after = [shapes[name]() for name in schedules]
    fall = library.select([numbers.schedule == i for i in range(len(after))], after) if len(after) > 1 else after[0]
    rise = numbers.start_share + (1 - numbers.start_share) * (n / library.maximum(warmup, 1))
    return numbers.peak_lr * library.where(n <= warmup, rise, fall)


def make_learning_rate(config: OptimizerConfig, total_steps: int) -> Callable[[Any], Any]:
    """Return the learning rate of step s = 0, 1, ..., a float32 scalar, as a function on the host.

    With n = s + 1, peak p, T = total_steps, warm-up w = min(warmup_steps, T // 2) and final share f, the rate is p n / w for
    n <= w: the first step is taken at p / w, never at 0, and step w - 1 at p. After that:

    - constant: p.
    - cosine: p (f + (1 - f) (1 + cos(pi x)) / 2), x = (n - w) / (T - w) (Loshchilov & Hutter 2017, arXiv:1608.03983).
    - warmup_stable_decay: p, and over the last d steps p (1 - (1 - f) x), x = (n - (T - d)) / d, where d is
      round(decay_fraction T), but at least 1 and at most T - w (Hu et al. 2024, arXiv:2404.06395; linear decay as in Haegele et
      al. 2024, arXiv:2405.18392).
    - inverse_sqrt: p sqrt(max(w, 1) / n) (Vaswani et al. 2017, arXiv:1706.03762, section 5.3).

    cosine and warmup_stable_decay reach f p at step T - 1 and stay there. A run of one step takes it at p.

    Raises:
      ExplainedError: an unknown schedule.
    """
    numbers = hyperparameters(config, total_steps)
    learning_rate((config.schedule,), numbers, 0, np)
    return lambda step: learning_rate((config.schedule,), numbers, step, np)


def stage_numbers(config: Config) -> dict[int, Hyperparameters]:
    """Return {first step: its numbers} of all stages of a run, on the host.

    A schedule that begins with a stage counts its steps from there, and its warm-up rises from the rate r of the step
    before to a peak p in w steps by r + (p - r) n / w.
    """
    recipe, found = Recipe(config), dict[int, Hyperparameters]()
    for stage in recipe.all:
        own, share = hyperparameters(stage.config.optimizer, stage.rate_steps, config.train.seed), np.float32(0)
        if found:
            last = next(reversed(found.values()))
            before = learning_rate(recipe.schedules, last, stage.first - 1, np) / own.peak_lr
            share = before if stage.rate_first == stage.first else last.start_share
        index = recipe.schedules.index(stage.config.optimizer.schedule)
        found[stage.first] = own._replace(
            first=np.float32(stage.rate_first), start_share=np.float32(share), schedule=np.float32(index)
        )
    return found


def plan_words(config: Config) -> list[str]:
    """Return lines for the log: a warm-up that is cut short, and the stages with what each trains with."""
    warmup, asked, recipe = warmup_steps(config.optimizer, config.train.steps), config.optimizer.warmup_steps, Recipe(config)
    lines = []
    if warmup < asked:
        steps = f"train.steps={config.train.steps}"
        lines.append(f"schedule   warm-up of {warmup} steps: half of {steps}, for optimizer.warmup_steps={asked}")
    if not config.train.stages:
        return lines
    rates = rate_of_steps(config)
    for stage in recipe.stages:
        train, first, last = stage.config.train, stage.first, recipe.last_step(stage)
        begin, end = rates(first, first), rates(last - 1, last - 1)
        shares = ", ".join(f"{weight / sum(stage.weights):.0%}" for weight in stage.weights)
        mixture = f"; sources {shares}" if len(stage.weights) > 1 else ""
        micro = f" in {train.microbatches} microbatches" if train.microbatches > 1 else ""
        lines.append(
            f"stage      {stage.name}: steps {first + 1:,} to {last:,}, {train.global_batch_size} x "
            f"{stage.config.data.sequence_length} tokens{micro}, rate {begin:.3g} to {end:.3g} "
            f"({stage.config.optimizer.schedule}){mixture}"
        )
    return lines


def rate_of_steps(config: Config) -> Callable[[int, int], float]:
    """Return the rate of the step with `batches` batches before it in the data and `updates` made before it, on the host."""
    recipe, numbers = Recipe(config), stage_numbers(config)
    return lambda batches, updates: float(learning_rate(recipe.schedules, numbers[recipe.at(batches).first], updates, np))
