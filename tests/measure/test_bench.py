"""The bench on a tiny model: what it reports, not how fast."""

import json
from dataclasses import replace

import pytest

from jaxtrain.config import DistillConfig, MeshConfig, ObjectiveConfig
from jaxtrain.measure import bench
from jaxtrain.measure.layouts import BASE


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", [ObjectiveConfig("dpo"), ObjectiveConfig("distill", distill=DistillConfig("teacher", top_k=4))]
)
def test_the_step_of_every_objective_can_be_measured(objective: ObjectiveConfig):
    config = bench.bench_config(replace(BASE, mesh=MeshConfig(fsdp=8), objective=objective))
    assert min(bench.Bench(config).bare_steps(1)) > 0


def test_reports_what_the_issue_names(monkeypatch):
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "MOST_STEPS_PER_ROUND", 5)
    monkeypatch.setattr(bench, "SECONDS_PER_ROUND", 1e9)
    report = bench.Bench(bench.bench_config(replace(BASE, mesh=MeshConfig(fsdp=8)))).report()
    assert report["steps_measured"] == 5
    assert 0 < report["step_seconds_p10"] <= report["step_seconds"] <= report["step_seconds_p90"]
    tokens = BASE.train.global_batch_size * BASE.data.sequence_length
    assert abs(report["tokens_per_second"] * report["step_seconds"] / tokens - 1) < 1e-9
    assert report["tflops_per_second_per_device_full"] > report["tflops_per_second_per_device_causal"] > 0
    assert report["compile_seconds"] > 0
    assert report["host_overhead"] > -1
    assert report["state_bytes"] > 0
    assert json.loads(json.dumps(report)) == report
    assert len(bench.table(report).splitlines()) == len(report)
