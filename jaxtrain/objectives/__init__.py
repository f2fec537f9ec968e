"""Objectives: what training minimises, as a pure function of log-probabilities and named per-token floats.

For every such objective d loss / d logits = g (one_hot - softmax), with g = d loss / d log p of that token: so all of them
share one chunked, vocabulary-parallel kernel (`ops/losses.py`), and full logits never exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtrain.config import Config
from jaxtrain.objectives.distill import distill_objective
from jaxtrain.objectives.dpo import dpo_objective
from jaxtrain.objectives.grpo import grpo_objective
from jaxtrain.objectives.kinds import COEFFICIENTS, PRETRAIN, SCORE, WEIGHTED, Objective, SequenceObjective

__all__ = ["COEFFICIENTS", "PRETRAIN", "SCORE", "WEIGHTED", "Objective", "SequenceObjective", "objective_of"]


def objective_of(config: Config) -> Objective | SequenceObjective:
    """Return the objective that is plugged into a config, else that of section `objective`.

    Fine-tuning on conversations (sft) is pretraining's: which tokens count is said by the batch's targets.
    """
    part: Any = config.parts.objective
    if part is not None:
        return part if isinstance(part, Objective | SequenceObjective) else Objective(part)
    section = config.objective
    kinds: dict[str, Callable[[], Objective | SequenceObjective]] = {
        "dpo": lambda: dpo_objective(section.dpo),
        "distill": lambda: distill_objective(section.distill),
        "grpo": lambda: grpo_objective(section.grpo),
    }
    return kinds.get(section.kind, lambda: PRETRAIN)()
