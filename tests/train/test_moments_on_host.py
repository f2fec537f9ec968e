"""Moments in host memory: the same training as with moments on the device, in steps, bad steps, checkpoints and checks."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from jaxtrain import Trainer
from jaxtrain.config import CheckpointConfig, Config, DataConfig, GuardConfig, MeshConfig, OptimizerConfig, SyncConfig
from jaxtrain.config.rules import find_problems
from jaxtrain.measure.layouts import batch_of
from jaxtrain.mesh import make_mesh
from jaxtrain.parts import Parts
from jaxtrain.planner import deviceless
from jaxtrain.planner.memory import estimate_memory
from jaxtrain.planner.state_memory import moments_on_host
from jaxtrain.train.gradients import batch_names, batch_sharding
from jaxtrain.train.optimizer import optimizer_of
from jaxtrain.train.state import create_state, to_canonical, trained_of_each_replica
from jaxtrain.train.step import compile_train_step, place_numbers, read_metrics
from tests.tiny import UNEVEN, tiny

HOST = "pinned_host"
BASE = tiny(
    model=UNEVEN | {"embed_dim": 64, "mlp_dim": 32},
    optimizer=OptimizerConfig(peak_lr=1e-2, moments_memory="host"),
    train={"microbatches": 2, "loss_chunk": 4},
)
LAYOUTS = {
    "one device, watched": replace(BASE, guard=GuardConfig(non_finite="skip", spike="skip")),
    "stages, lion": replace(BASE, mesh=MeshConfig(pipe=2, fsdp=2), optimizer=replace(BASE.optimizer, name="lion")),
    "8 bits": replace(BASE, optimizer=replace(BASE.optimizer, moments_dtype="int8")),
}


def on_device(config: Config) -> Config:
    return replace(config, optimizer=replace(config.optimizer, moments_memory="device"))


def kinds(tree: Any) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


def stepper(config: Config) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
    """(the state at step 0, state -> (state, metrics) on a batch that is always the same)."""
    mesh, optimizer = make_mesh(config.mesh, jax.devices()[: math.prod(config.mesh.shape)]), optimizer_of(config)
    numbers, arrays = place_numbers(config, mesh), batch_of(8, 8, vocabulary=100)
    batch = jax.device_put({name: arrays[name] for name in batch_names(config)}, batch_sharding(mesh))
    step = compile_train_step(config, mesh, optimizer, "reference")
    return create_state(config, mesh, optimizer), lambda state: step(state, batch, numbers)


def steps_of(config: Config) -> tuple[Any, list[dict[str, float]]]:
    """(the state after three steps, their metrics)."""
    (state, step), found = stepper(config), []
    for _ in range(3):
        state, metrics = step(state)
        found.append(read_metrics(metrics))
    return state, found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_those_of_moments_on_the_device(layout: str):
    config = LAYOUTS[layout]
    (state, metrics), (other, others) = steps_of(config), steps_of(on_device(config))
    assert kinds(other) == {"device"}
    dims = trained_of_each_replica(config)
    for own in (state, other):
        own["params"] = jax.tree.map(np.asarray, to_canonical(config, own["params"], dims))
    matrices = [leaf for leaf in jax.tree.leaves(state["optimizer"]) if leaf.sharding.memory_kind == HOST]
    assert len(matrices) >= 9 * (1 if config.optimizer.name == "lion" else 2)
    assert sum(leaf.size for leaf in matrices) > 0.9 * sum(leaf.size for leaf in jax.tree.leaves(state["optimizer"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), state["params"], other["params"])
    for one, two in zip(metrics, others, strict=True):
        assert one == pytest.approx(two, rel=1e-5)


def test_a_bad_step_leaves_them_as_they_are():
    state, step = stepper(LAYOUTS["one device, watched"])
    state, _ = step(state)
    before = jax.tree.map(np.array, state["optimizer"])
    bad, metrics = step(state | {"params": jax.tree.map(lambda p: p * math.nan, state["params"])})
    assert read_metrics(metrics)["bad_step"]
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, bad["optimizer"]))


def test_a_run_saves_checks_and_goes_on_wherever_its_moments_lie(tmp_path: Path):
    """Six steps with host, device and host moments, saved and restored in between, end as six steps in one go."""
    (tmp_path / "text.txt").write_text("\n".join(f"{n} is {n % 7} and {n * n}" for n in range(300)))
    data = DataConfig((replace(DataConfig().sources[0], kind="text", path=str(tmp_path / "text.txt")),), sequence_length=8)
    whole = replace(
        BASE,
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        data=replace(data, cache_dir=str(tmp_path / "cache")),
        model=replace(BASE.model, vocab_size=260),
        train=replace(BASE.train, steps=6, validate_every=0, compilation_cache=""),
        optimizer=replace(BASE.optimizer, schedule="constant"),
        checkpoint=CheckpointConfig(every=2),
        guard=GuardConfig(copies="stop", copies_every=1),
        run_dir=str(tmp_path / "whole"),
    )
    expected = Trainer(whole)
    expected.train()
    for last, where in ((2, "host"), (4, "device"), (6, "host")):
        optimizer = replace(whole.optimizer, moments_memory=where)
        train = replace(whole.train, steps=last)
        trainer = Trainer(replace(whole, optimizer=optimizer, train=train, run_dir=str(tmp_path / "parts")))
        trainer.train()
        assert (HOST in kinds(trainer.state["optimizer"])) == (where == "host")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-6), expected.state, trainer.state
    )


def test_what_the_device_and_the_host_hold():
    both = BASE, on_device(BASE)
    (memory, other), on_host = map(estimate_memory, both), moments_on_host(BASE)
    state = create_state(BASE, make_mesh(BASE.mesh, jax.devices()[:1]), optimizer_of(BASE))
    sizes = {kind: 0 for kind in (HOST, "device")}
    for leaf in jax.tree.leaves(state["optimizer"]):
        sizes[leaf.sharding.memory_kind] += leaf.nbytes if leaf.ndim else 0
    assert (on_host, memory.optimizer) == (sizes[HOST], sizes["device"])
    assert memory.total == pytest.approx(other.total - on_host, rel=1e-3)


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_what_needs_all_of_them_at_once_is_refused(name: Any):
    config = replace(BASE, optimizer=replace(BASE.optimizer, name=name))
    assert any(f"moments_memory=host: {name}" in problem for problem in find_problems(config, 1)[1])
    apart = replace(BASE, mesh=MeshConfig(replica=2, fsdp=1), sync=SyncConfig(mode="local", every=2))
    assert any("moments_memory=host does not go with sync.mode=local" in problem for problem in find_problems(apart, 2)[1])


@pytest.mark.plan
def test_a_program_for_gpus_copies_them_beside_its_compute():
    """The program for eight H100s takes matrices' moments from host memory, and each copy begins before it is waited for."""
    train = replace(BASE.train, microbatches=1)
    config = replace(BASE, mesh=MeshConfig(fsdp=8), model=replace(BASE.model, dtype="bfloat16"), train=train)
    program, _, _ = deviceless.compile_for(config)
    memory, text, on_host = program.memory_analysis(), program.as_text(), moments_on_host(config)
    assert memory.host_argument_size_in_bytes == memory.host_alias_size_in_bytes == on_host
    other = deviceless.compile_for(on_device(config))[0].memory_analysis()
    assert other.argument_size_in_bytes - memory.argument_size_in_bytes == on_host
    matrices = 2 * 7
    for copy in ("dynamic-slice", "dynamic-update-slice"):
        begun = re.findall(rf"%({copy}-start[\w.]*) = [^\n]*S\(5\)", text)
        assert len(begun) >= matrices
        for name in begun:
            assert f"(%{name})" in text.partition(f"%{name} = ")[2]  # its end, later in the schedule


@pytest.mark.parametrize("field", [{"moments_memory": "host"}, {"moments_memory": "device", "moments_dtype": "int8"}])
def test_a_plugged_optimizer_keeps_its_own_moments(field: Any):
    config = replace(BASE, optimizer=replace(BASE.optimizer, **field), parts=Parts(optimizer=optax.sgd(0.1)))
    assert [problem for problem in find_problems(config, 1)[1] if "a plugged optimizer keeps its own moments" in problem]
