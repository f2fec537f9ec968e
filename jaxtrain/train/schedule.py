"""The learning rate over steps, from numbers that are inputs of the compiled step: another rate or length reuses the program.

Only a schedule's name is part of the program.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxtrain.config import OptimizerConfig
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


def learning_rate(schedule: str, numbers: Hyperparameters, step: Any, library: Any = jnp) -> Any:
    """Return the rate of step s = 0, 1, ... by the formulas of `make_learning_rate`, float32.

    Args:
      step: optimizer steps taken before it, int32.
      library: jax.numpy in a program; numpy on the host, which then waits for no device.

    Raises:
      ExplainedError: an unknown schedule.
    """
    n, warmup = library.asarray(step, np.float32) + 1, numbers.warmup_steps
    x = library.clip((n - numbers.decay_start) / numbers.decay_steps, 0, 1)
    final = numbers.final_lr_fraction
    shapes: dict[str, Callable[[], Any]] = {
        "constant": lambda: library.ones_like(n),
        "cosine": lambda: final + (1 - final) * (1 + library.cos(np.float32(math.pi) * x)) / 2,
        "warmup_stable_decay": lambda: 1 - (1 - final) * x,
        "inverse_sqrt": lambda: library.sqrt(library.maximum(warmup, 1) / n),
    }
    if schedule not in shapes:
        raise ExplainedError(f"optimizer.schedule={schedule!r}: {nearest(schedule, shapes)}")
    return numbers.peak_lr * library.where(n <= warmup, n / library.maximum(warmup, 1), shapes[schedule]())


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
    learning_rate(config.schedule, numbers, 0, np)
    return lambda step: learning_rate(config.schedule, numbers, step, np)
