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
    from jaxtrain.checkpoint import Checkpoints as Checkpoints
    from jaxtrain.config import Config as Config
    from jaxtrain.config.loading import load_config as load_config
    from jaxtrain.config.rules import validate as validate
    from jaxtrain.errors import ExplainedError as ExplainedError
    from jaxtrain.models.parameters import parameter as parameter
    from jaxtrain.objectives import Objective as Objective
    from jaxtrain.objectives import SequenceObjective as SequenceObjective
    from jaxtrain.parts import ModelParts as ModelParts
    from jaxtrain.planner.plan import plan as plan
    from jaxtrain.train.loading import load as load
    from jaxtrain.train.loop import Hook as Hook
    from jaxtrain.train.trainer import Trainer as Trainer

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
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxtrain' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxtrain.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
