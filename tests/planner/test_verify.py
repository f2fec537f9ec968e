"""Verification: compiled figures take the place of estimates, and what goes wrong in a compiler becomes one line."""

from dataclasses import replace

import pytest

from jaxtrain.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from jaxtrain.hardware import find_chip
from jaxtrain.planner import verify as verify_module
from jaxtrain.planner.cost import estimate
from jaxtrain.planner.deviceless import CompiledStep, CompilerDied
from jaxtrain.planner.estimates import Cluster, Estimate
from jaxtrain.planner.formulas import step_flops
from jaxtrain.planner.memory import estimate_memory
from jaxtrain.planner.verify import verify, with_report
from jaxtrain.program.collectives import CollectiveRow

H100 = Cluster(find_chip("h100-sxm"), hosts=1, devices_per_host=2)
CONFIG = Config(
    model=ModelConfig(num_layers=2, embed_dim=64, num_heads=2, num_kv_heads=2, head_dim=32, mlp_dim=128, vocab_size=256),
    mesh=MeshConfig(fsdp=2),
    data=DataConfig(sequence_length=32, mask_documents=False),
    train=TrainConfig(global_batch_size=4, steps=10),
)


def state_bytes(config: Config) -> float:
    """Return the bytes of parameters and optimizer state on one device."""
    memory = estimate_memory(config)
    return memory.parameters + memory.optimizer


def report_of(config: Config, *, wait: float, more_memory: int = 0) -> CompiledStep:
    """A program that computes what the formula says, and waits for half a gather of so many bytes."""
    state = round(state_bytes(config))
    row = CollectiveRow("fsdp", "all-gather", "bf16", 4, 2 * wait, wait, hidden=wait / 2, overlapped=wait, crosses_hosts=False)
    return CompiledStep(step_flops(config, "cudnn"), (row,), state, 1_000_000 + more_memory, state, state, "cudnn: why")


def test_what_was_compiled_takes_the_place_of_the_estimate():
    before = estimate(CONFIG, H100)
    after = with_report(before, report_of(CONFIG, wait=1e9))
    assert after.origin == "compiled"
    assert after.memory.total == pytest.approx(state_bytes(CONFIG) + 1_000_000)
    assert after.memory.parameters == pytest.approx(estimate_memory(CONFIG).parameters)
    assert (after.time.matmul, after.time.attention) == pytest.approx((before.time.matmul, before.time.attention))
    (wire,) = after.wires
    assert wire.bytes == 1e9
    assert wire.exposed_seconds == pytest.approx(wire.seconds / 2)
    assert after.time.exposed >= wire.exposed_seconds
    slower = with_report(before, replace(report_of(CONFIG, wait=1e9), flops=2 * before.flops))
    assert slower.time.matmul == pytest.approx(2 * before.time.matmul)


def test_the_best_are_ranked_anew_and_a_crash_is_one_line(monkeypatch: pytest.MonkeyPatch):
    """The first waits long, the second crashes the compiler, the third turns out too large, the fourth is not compiled."""
    layouts = [replace(CONFIG, train=replace(CONFIG.train, microbatches=m, remat=r)) for m in (1, 2) for r in ("none", "full")]
    estimates = [estimate(config, H100) for config in layouts]
    reports = {layouts[0]: report_of(layouts[0], wait=1e12), layouts[2]: report_of(layouts[2], wait=0, more_memory=10**12)}

    def report(config: Config, chip: str, devices_per_host: int) -> CompiledStep:
        assert (chip, devices_per_host) == ("h100-sxm", 2)
        if config not in reports:
            raise CompilerDied("compiling for h100-sxm ended with exit code -8: it said nothing")
        return reports[config]

    monkeypatch.setattr(verify_module, "has_plugin", lambda: True)
    monkeypatch.setattr(verify_module, "report_in_subprocess", report)
    lines: list[str] = []
    found = verify(estimates, k=3, tell=lines.append)
    assert [e.config for e in found] == [layouts[0], layouts[3], layouts[2]]
    assert [e.origin for e in found] == ["compiled", "estimate", "compiled"]
    assert [e.fits for e in found] == [True, True, False]
    first, second, third = sorted(lines)
    assert first.startswith(
        "verify     fsdp=2 (1 microbatch, remat full, ZeRO 3): left out: compiling for h100-sxm ended with exit"
    )
    assert second.startswith("verify     fsdp=2 (1 microbatch, remat none, ZeRO 3): compiled in ")
    assert third.startswith("verify     fsdp=2 (2 microbatches, remat none, ZeRO 3): compiled in ")
    assert "\n" not in first


def verified(config: Config, cluster: Cluster) -> tuple[list[Estimate], list[str]]:
    lines: list[str] = []
    return verify([estimate(config, cluster)], tell=lines.append), lines


def test_a_chip_that_xla_cannot_compile_for_is_checked_on_fake_devices():
    """TPUs have no target: the step is compiled for CPU devices, and labelled so; the state's bytes are exact."""
    tpus = Cluster(find_chip("tpu-v5e"), hosts=1, devices_per_host=2)
    (found,), (line,) = verified(CONFIG, tpus)
    assert found.origin == "approximate"
    assert "compiled in" in line
    assert found.memory.parameters + found.memory.optimizer == pytest.approx(state_bytes(CONFIG), rel=0.02)
    assert found.flops == pytest.approx(estimate(CONFIG, tpus).flops, rel=0.3)  # reference attention computes the whole square


def test_a_step_that_does_not_compile_on_fake_devices_is_one_line():
    tpus = Cluster(find_chip("tpu-v5e"), hosts=1, devices_per_host=2)
    found, lines = verified(replace(CONFIG, model=replace(CONFIG.model, attention="cudnn")), tpus)
    assert found == []
    assert len(lines) == 1
    assert "cuDNN needs an NVIDIA GPU" in lines[0]


def test_a_compiler_that_crashes_is_one_line(monkeypatch: pytest.MonkeyPatch):
    """XLA ends its process over a flag that it does not know, whatever the layout: the estimate stands, and a line says why."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_there_is_no_such_flag=1")
    found, lines = verified(CONFIG, Cluster(find_chip("tpu-v5e"), hosts=1, devices_per_host=2))
    assert [e.origin for e in found] == ["estimate"]
    assert len(lines) == 1
    assert "all figures are estimates: compiling for 2 fake CPU devices ended with exit code 1: F" in lines[0]
    assert "xla_there_is_no_such_flag" in lines[0]
    assert "\n" not in lines[0]
