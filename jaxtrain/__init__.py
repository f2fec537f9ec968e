"""jaxtrain: a trainer for transformers that outgrow one device. README.md has the map of the code.

    from jaxtrain import Trainer, load_config

    trainer = Trainer(load_config("quickstart"))
    trainer.train()

Names are imported when they are first used, so that the command line answers before jax is there.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtrain.checkpoint import Checkpoints
    from jaxtrain.config import Config
    from jaxtrain.config.loading import load_config
    from jaxtrain.config.rules import validate
    from jaxtrain.errors import ExplainedError
    from jaxtrain.models.parameters import parameter
    from jaxtrain.objectives import Objective, SequenceObjective
    from jaxtrain.parts import ModelParts
    from jaxtrain.planner.plan import plan
    from jaxtrain.train.loading import load
    from jaxtrain.train.loop import Hook
    from jaxtrain.train.trainer import Trainer

__all__ = [
    "Checkpoints",
    "Config",
    "ExplainedError",
    "Hook",
    "ModelParts",
    "Objective",
    "SequenceObjective",
    "Trainer",
    "load",
    "load_config",
    "parameter",
    "plan",
    "validate",
]

_HOMES = {
    "Checkpoints": "checkpoint",
    "Config": "config",
    "ExplainedError": "errors",
    "Hook": "train.loop",
    "ModelParts": "parts",
    "Objective": "objectives",
    "SequenceObjective": "objectives",
    "Trainer": "train.trainer",
    "load": "train.loading",
    "load_config": "config.loading",
    "parameter": "models.parameters",
    "plan": "planner.plan",
    "validate": "config.rules",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxtrain' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxtrain.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
