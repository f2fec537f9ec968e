"""Estimates count what objectives do beside the pass that trains."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jaxtrain.config import Config, DistillConfig, DpoConfig, MeshConfig, ObjectiveConfig, PipelineConfig
from jaxtrain.config.loading import load_config
from jaxtrain.config.rules import validate
from jaxtrain.hardware import find_chip
from jaxtrain.objectives import SequenceObjective
from jaxtrain.planner import deviceless, other_models
from jaxtrain.planner.cost import estimate
from jaxtrain.planner.estimates import Cluster
from jaxtrain.planner.formulas import step_flops
from jaxtrain.planner.memory import estimate_memory
from tests.planner.test_formulas import Case

HOST = Cluster(find_chip("h100-sxm"), 1, 8)


def on_host(objective: ObjectiveConfig | None = None, **changes) -> Config:
    config = load_config("1b")
    config = replace(config, mesh=MeshConfig(fsdp=8), objective=objective or ObjectiveConfig(), **changes)
    return validate(replace(config, data=replace(config.data, mask_documents=True)), 8)


def test_preferences_score_first():
    plain, scored = estimate(on_host(), HOST), estimate(on_host(ObjectiveConfig("dpo")), HOST)
    without = replace(scored.time, other_models=0.0)
    assert without == plain.time
    assert 0.25 < scored.time.other_models / plain.time.total < 0.4  # a third of the matmuls
    assert scored.memory == plain.memory
    orpo = estimate(on_host(ObjectiveConfig("dpo", dpo=DpoConfig("orpo", reference="none"))), HOST)
    assert orpo.time == scored.time
    assert estimate(on_host(ObjectiveConfig("sft")), HOST).time == plain.time


def test_a_teacher_on_the_mesh_holds_weights_and_goes_forward(monkeypatch: pytest.MonkeyPatch):
    larger = load_config("7b").model
    monkeypatch.setattr(other_models, "_model_of", lambda source: None if source == "elsewhere" else larger)
    plain, distill = estimate(on_host(), HOST), lambda **fields: ObjectiveConfig("distill", distill=DistillConfig(**fields))
    taught = estimate(on_host(distill(teacher="seven")), HOST)
    weights = estimate_memory(replace(on_host(), model=replace(larger, param_dtype="bfloat16"))).parameters
    assert taught.memory.other_models == weights
    assert taught.time.other_models > 2 * plain.time.total / 3  # a 7b's forward pass
    for other in (distill(teacher="seven", kept="folder"), distill(teacher="elsewhere")):
        assert estimate(on_host(other), HOST).memory == plain.memory
    assert "elsewhere" in other_models.left_out(on_host(distill(teacher="elsewhere")))


@pytest.mark.plan
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "microbatches"), [(MeshConfig(fsdp=8), 1), (MeshConfig(pipe=2, fsdp=4), 4), (MeshConfig(fsdp=2, tensor=4), 2)]
)
def test_the_flops_of_scoring_are_those_of_the_compiled_program(mesh: MeshConfig, microbatches: int):
    config = Case(mesh, microbatches, pipeline=PipelineConfig()).config()
    objective = SequenceObjective(lambda log_p, batch: (-(log_p**2).mean(), {}))
    config = replace(config, parts=replace(config.parts, objective=objective))
    assert deviceless.report(config).flops == pytest.approx(step_flops(config, "cudnn"), rel=1e-6)
