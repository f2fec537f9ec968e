"""What an objective needs beside the pass that trains: a scoring pass, a teacher, the weights that rewards stay near."""

from __future__ import annotations

import functools
from dataclasses import replace

from jaxtrain.config import Config, LoraConfig, ObjectiveConfig
from jaxtrain.errors import ExplainedError
from jaxtrain.objectives import objective_of
from jaxtrain.objectives.kinds import Objective
from jaxtrain.planner.layer_table import BYTES, FLOAT32
from jaxtrain.planner.state_memory import cut_model, parameter_bytes
from jaxtrain.train.loading import config_of_source


def forward_model(config: Config) -> Config | None:
    """Return a config of the model that goes forward over each batch before the step, or None.

    It is the model itself for an objective of sequences, which scores first, and a teacher that stays on the mesh.
    """
    if not isinstance(objective_of(config), Objective):
        return _pretraining(config)
    if teacher := _teacher(config):
        return replace(_pretraining(config), model=teacher, lora=LoraConfig(), train=replace(config.train, frozen=()))
    return None


def _pretraining(config: Config) -> Config:
    return replace(config, objective=ObjectiveConfig(), parts=replace(config.parts, objective=None))


def _teacher(config: Config):
    distill = config.objective.distill
    if config.objective.kind != "distill" or distill.kept:
        return None
    model = _model_of(distill.teacher)
    return model and replace(model, dtype=config.model.dtype, param_dtype=config.model.dtype)


@functools.lru_cache(maxsize=16)
def _model_of(source: str):
    """Return the model of a folder or run, None where this machine does not have it."""
    try:
        return config_of_source(source).model
    except ExplainedError:
        return None


def other_weights(config: Config) -> float:
    """Return the bytes of a device's other weights: a teacher's, or of the trained weights as they were at first."""
    if config.objective.kind == "grpo" and config.objective.grpo.kl:
        cut = cut_model(config)
        fine = cut.chunks * cut.layers * cut.trained.float32 + cut.trained_outer.float32
        fine = cut.moving if config.lora.rank else fine
        return BYTES[config.model.param_dtype] * (cut.moving - fine) + FLOAT32 * fine
    if _teacher(config):
        teacher = forward_model(config)
        assert teacher is not None
        return parameter_bytes(teacher, cut_model(teacher))
    return 0.0


def left_out(config: Config) -> str:
    """Return what estimates leave out of an objective, or nothing."""
    if config.objective.kind == "grpo":
        return "rewards; answers count as long as objective.grpo.max_new_tokens, and rows as not packed"
    if config.objective.kind == "distill" and not config.objective.distill.kept and _teacher(config) is None:
        return f"the teacher, which this machine does not have ({config.objective.distill.teacher})"
    return ""
