"""Objectives: what training minimises, as a pure function of each token's log-probability and named per-token floats.

For every such objective d loss / d logits = g (one_hot - softmax), with g = d loss / d log p of that token: so all of them
share one chunked, vocabulary-parallel kernel (`ops/losses.py`), and full logits never exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtrain.config import Config
from jaxtrain.ops.losses import TokenLoss, negative_log_likelihood


@dataclass(frozen=True)
class Objective:
    """The loss of a token, of which training minimises the mean over all tokens that carry one in the global batch."""

    loss: TokenLoss
    """(log p of the target, {name: value}), all float32 [B, L], -> float32 [B, L]: elementwise, since it sees the sequence in
    chunks; differentiable in log p. A token without a target does not count, whatever its loss."""
    inputs: tuple[str, ...] = ()
    """Names of float32 arrays [B, L] that a batch must hold beside its tokens (weights, advantages, reference
    log-probabilities), for `Trainer.step(batch)`: data.sources give none."""


PRETRAIN = Objective(negative_log_likelihood)


def objective_of(config: Config) -> Objective:
    """Return the objective that is plugged into a config, else that of pretraining."""
    part: Any = config.parts.objective
    return PRETRAIN if part is None else part if isinstance(part, Objective) else Objective(part)
