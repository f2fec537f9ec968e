"""Layers' inputs in host memory: the same loss and gradients, in every way that layers keep them."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxtrain.config import Config, MeshConfig, MoEConfig
from jaxtrain.config.rules import find_problems
from jaxtrain.measure.layouts import batch_of
from jaxtrain.mesh import make_mesh
from jaxtrain.planner import deviceless
from jaxtrain.planner.memory import estimate_memory, host_bytes
from jaxtrain.train.gradients import batch_names, batch_sharding, make_loss_and_gradients
from jaxtrain.train.optimizer import optimizer_of
from jaxtrain.train.state import create_state
from tests.tiny import UNEVEN, tiny

BASE = tiny(model=UNEVEN, mesh=MeshConfig(fsdp=2), train={"layer_inputs_memory": "host", "loss_chunk": 4})
EXPERTS = MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=16, dispatch="capacity", first_dense_layers=1)
LAYOUTS = {
    "full, microbatches": replace(BASE, train=replace(BASE.train, microbatches=2)),
    "named": replace(BASE, train=replace(BASE.train, remat="named")),
    "experts, first layers, context": replace(BASE, model=replace(BASE.model, moe=EXPERTS), mesh=MeshConfig(fsdp=1, context=2)),
}


def on_device(config: Config) -> Config:
    return replace(config, train=replace(config.train, layer_inputs_memory="device"))


def loss_and_gradients(config: Config) -> tuple[jax.Array, dict, str]:
    """(loss, gradients, the program as JAX traces it: XLA has no host memory on CPUs)."""
    mesh = make_mesh(config.mesh, jax.devices()[: math.prod(config.mesh.shape)])
    params = create_state(config, mesh, optimizer_of(config))["params"]
    arrays = batch_of(8, 8, vocabulary=100)
    batch = jax.device_put({name: arrays[name] for name in batch_names(config)}, batch_sharding(mesh))
    traced = jax.jit(make_loss_and_gradients(config, mesh, "reference")).trace(params, batch)
    metrics, _, gradients = traced.lower().compile()(params, batch)
    return metrics["total_loss"], gradients, str(traced.jaxpr)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_inputs_on_the_device(layout: str):
    config = LAYOUTS[layout]
    (loss, gradients, text), (other, others, plain) = map(loss_and_gradients, (config, on_device(config)))
    assert "<host>" in text
    assert "<host>" not in plain
    np.testing.assert_allclose(loss, other, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-6), gradients, others)


@pytest.mark.parametrize("axis", ["pipe", "tensor"])
def test_what_joins_layers_on_the_device_is_refused(axis: str):
    config = replace(BASE, mesh=MeshConfig(fsdp=1, **{axis: 2}))
    assert any(
        "train.layer_inputs_memory=host does not go with mesh.pipe" in problem for problem in find_problems(config, 2)[1]
    )


@pytest.mark.plan
def test_a_program_for_gpus_holds_them_on_the_host():
    """One copy out and one in a layer, both begun before they are waited for, and as many bytes as `plan` says."""
    model = replace(BASE.model, num_layers=32, embed_dim=256, dtype="bfloat16")
    config = replace(BASE, mesh=MeshConfig(fsdp=8), model=model, data=replace(BASE.data, sequence_length=256))
    program, other = deviceless.compile_for(config)[0], on_device(config)
    memory, on_host = program.memory_analysis(), host_bytes(config)["layers' inputs"]
    assert memory.host_temp_size_in_bytes == on_host
    saved = deviceless.compile_for(other)[0].memory_analysis().temp_size_in_bytes - memory.temp_size_in_bytes
    assert 0.5 * on_host < saved
    assert estimate_memory(other).activations - estimate_memory(config).activations == on_host
    assert "dynamic-update-slice-start" in program.as_text()
    assert "dynamic-slice-start" in program.as_text()
