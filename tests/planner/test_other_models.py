"""Estimates count what objectives do beside the pass that trains."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest

from jaxtrain.config import Config, DistillConfig, DpoConfig, GrpoConfig, MeshConfig, ObjectiveConfig, PipelineConfig
from jaxtrain.config.loading import load_config
from jaxtrain.config.rules import validate
from jaxtrain.hardware import find_chip
from jaxtrain.inference.engine import Engine, Sampling, _Request
from jaxtrain.mesh import make_mesh
from jaxtrain.objectives import SequenceObjective
from jaxtrain.planner import deviceless, other_models
from jaxtrain.planner.cost import estimate
from jaxtrain.planner.estimates import Cluster
from jaxtrain.planner.formulas import step_flops
from jaxtrain.planner.memory import estimate_memory
from jaxtrain.planner.rollouts import cache_of_device, cache_size, memory_of_device
from jaxtrain.telemetry.flops import num_parameters
from tests.planner.test_formulas import Case
from tests.tiny import tiny

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


def rewarded(mesh: MeshConfig = MeshConfig(fsdp=8), rows: int = 64, length: int = 4096, **grpo) -> Config:  # noqa: B008
    objective = ObjectiveConfig("grpo", grpo=GrpoConfig("reward.py", **{"max_new_tokens": 3072} | grpo))
    config = replace(on_host(), objective=objective)
    train = replace(config.train, global_batch_size=rows, microbatches=rows // 8)
    return replace(config, mesh=mesh, train=train, data=replace(config.data, sequence_length=length))


def test_rollouts_read_weights_and_cache_for_each_token():
    whole, half, twice = (
        estimate(rewarded(**grpo), HOST).time.rollouts for grpo in ({}, {"max_new_tokens": 1536}, {"updates": 2})
    )
    config = rewarded()
    read = cache_of_device(config) + 2 * num_parameters(config.model).total
    assert 3072 * read / HOST.chip.memory_bandwidth < whole < 10 * 3072 * read / HOST.chip.memory_bandwidth
    assert whole / 2 < half < 0.6 * whole  # longer prompts
    assert twice == whole / 2
    on_tensor = estimate(rewarded(MeshConfig(fsdp=1, tensor=8)), HOST).time.rollouts
    assert on_tensor < whole  # nothing is gathered


def test_a_rollout_holds_its_cache_where_a_step_holds_more():
    few, many = (estimate_memory(rewarded(rows=rows)) for rows in (8, 2048))
    assert few.rollouts == 0
    assert many.total == many.parameters + many.optimizer + many.weights + memory_of_device(rewarded(rows=2048))


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=8), MeshConfig(fsdp=2, tensor=4), MeshConfig(pipe=2, data=2, tensor=2)])
def test_the_cache_is_that_of_the_engine(mesh: MeshConfig):
    config = tiny(mesh=mesh, data={"sequence_length": 100}, train={"global_batch_size": 8},
                  objective=ObjectiveConfig("grpo", grpo=GrpoConfig(max_new_tokens=30)))  # fmt: skip
    engine = Engine(config, make_mesh(mesh))
    requests = deque(_Request(i, [1] * 71, Sampling(30)) for i in range(8))
    assert engine._programs_for(requests, 8, keeps_experts=False).room == cache_size(config)


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
