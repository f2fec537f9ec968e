"""Stop a run whose sampler and training program disagree about the same tokens' probabilities.

Both are the same layers on the same arrays, so in float32 they agree to rounding. Where they do not, rewards judge another
policy than the one in training; truncated importance weights correct for a little of it.
"""

from __future__ import annotations

from typing import Any

from jaxtrain.config import Config
from jaxtrain.errors import NumbersError
from jaxtrain.train.loop import Hook
from jaxtrain.train.step import read_metrics

PyTree = Any
LIMITS = {
    "sampler_difference": ("max_sampler_difference", "the mean |log p of training - log p of sampling|"),
    "sampler_outside": ("max_sampler_outside", "the share of tokens whose probability differs by more than a tenth"),
    "sampler_kl": ("max_sampler_kl", "the KL divergence of sampling from training"),
}
"""{metric: (field of objective.grpo, what it is)}."""


class SamplerLimits(Hook):
    """Raises NumbersError after a step whose metrics are beyond the limits of section `objective.grpo`."""

    def __init__(self, config: Config):
        self._config = config

    def metrics_read(self, step: int, metrics: PyTree) -> None:
        values = read_metrics({name: metrics[name] for name in LIMITS})
        for name, (field, words) in LIMITS.items():
            limit = getattr(self._config.objective.grpo, field)
            if 0 < limit < values[name]:
                raise NumbersError(
                    f"step {step}: {words} is {values[name]:.3g}, above objective.grpo.{field}={limit:g}. "
                    f"{likely_cause(self._config)}; or raise the limit (0: none)"
                )


def likely_cause(config: Config) -> str:
    """Return why training and sampling most likely differ, by what this config has."""
    if config.model.parts.layer or config.model.parts.attention or config.model.parts.mlp:
        return "The likely cause is a layer of your own that computes one new token otherwise than a whole sequence"
    if config.model.moe and not config.objective.grpo.replay_routing:
        return (
            "The likely cause is the router, whose choices are not replayed: a token with two nearly equal experts may go to "
            "another one in training; give --objective.grpo.replay_routing=True"
        )
    if config.model.dtype != "float32":
        return (
            f"The likely cause is rounding in {config.model.dtype}, which adds up over layers; --model.dtype=float32 shows "
            "whether it is"
        )
    return "In float32 rounding is no cause: please report it with this config"
