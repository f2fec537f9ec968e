"""One flipped bit in one device's copy is found and the device named; what is not finite is not saved; repeats are compared."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import MeshConfig, OptimizerConfig
from jaxtrain.errors import NumbersError
from jaxtrain.mesh import make_mesh
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.train import recompute_check
from jaxtrain.train.bad_steps import RollBack
from jaxtrain.train.optimizer import make_optimizer
from jaxtrain.train.recompute_check import RecomputeCheck
from jaxtrain.train.rollbacks import Rollbacks
from jaxtrain.train.state import create_state
from jaxtrain.train.state_check import StateCheck, copied_over, odd_ones_out
from tests.tiny import tiny
from tests.train.runs import prepared_of

BASE = tiny(
    mesh={"data": 4, "fsdp": 2},
    optimizer=OptimizerConfig(name="sgd", beta1=0.0, peak_lr=1e-2),
    train={"steps": 20, "loss_chunk": 4},
)


@functools.cache
def setup(mesh_config):
    config = replace(BASE, mesh=mesh_config)
    mesh = make_mesh(config.mesh, jax.devices())
    optimizer = make_optimizer(config.optimizer, config.train.steps, parameter_dims(config.model))
    return config, mesh, StateCheck(config, mesh, optimizer, Rollbacks()), create_state(config, mesh, optimizer)


def changed(leaf, device, change):
    """The array whose copy on one device is another."""
    arrays = []
    for shard in leaf.addressable_shards:
        data = np.array(shard.data)
        if shard.device.id == device:
            change(data)
        arrays.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)


def flip(bit):
    def change(data):
        data.reshape(-1).view(np.uint32)[data.size // 2] ^= np.uint32(1 << bit)

    return change


def with_params(state, group, name, leaf):
    params = state["params"]
    return state | {"params": params | {group: params[group] | {name: leaf}}}


@pytest.mark.parametrize("bit", [0, 31])
def test_a_flipped_bit_in_one_copy_names_the_device(bit):
    """A row of the table lies on four devices alike, a norm on all eight."""
    config, mesh, health, state = setup(BASE.mesh)
    health(1, state)
    table = changed(state["params"]["outer"]["table"], 5, flip(bit))
    bad = with_params(state, "outer", "table", table)
    with pytest.raises(NumbersError) as caught:
        health(2, bad)
    message = str(caught.value)
    assert message.startswith("after step 2, devices hold other copies of the state than their peers:\n")
    assert "  - device 5 of process 0 (data=2, fsdp=1): params/outer/table\n" in message
    assert message.count("  - ") == 1
    assert "all of them are named" not in message
    norm = changed(state["params"]["outer"]["norm"], 0, flip(bit))
    with pytest.raises(NumbersError, match=r"device 0 of process 0 \(data=0, fsdp=0\): params/outer/norm\n"):
        health(2, with_params(state, "outer", "norm", norm))
    health(2, state)


def test_of_two_copies_both_are_named_along_any_axis():
    """Table: over data alone. Norm of the head: over pipe and tensor too, so a majority is in the right."""
    config, mesh, _, state = setup(MeshConfig(pipe=2, data=2, fsdp=1, tensor=2))
    optimizer = make_optimizer(config.optimizer, config.train.steps, parameter_dims(config.model))
    health = StateCheck(replace(config, guard=replace(config.guard, copies="rollback")), mesh, optimizer, Rollbacks())
    mlp = state["params"]["layers"]["mlp"]
    down = changed(mlp["down"], 6, flip(3))  # cut over pipe and tensor: its copies are on 4 and 6
    bad = with_params(state, "layers", "mlp", mlp | {"down": down})
    with pytest.raises(RollBack) as caught:
        health(7, bad)
    assert (caught.value.step, caught.value.batches) == (7, 0)
    assert "device 4 of process 0 (pipe=1, data=0, tensor=0): params/layers/mlp/down\n" in caught.value.reason
    assert "device 6 of process 0 (pipe=1, data=1, tensor=0): params/layers/mlp/down" in caught.value.reason
    assert "all of them are named" in caught.value.reason
    off = StateCheck(replace(config, guard=replace(config.guard, copies="off")), mesh, optimizer, Rollbacks())
    off(7, bad)


def test_the_vote_is_held_to_a_count():
    """Against groups written out by hand: which devices hold the same shard follows from the mesh alone."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    assert copied_over(("embed", "heads"), mesh) == ("data",)
    assert copied_over(("norm",), mesh) == ("data", "fsdp", "tensor")
    assert copied_over(("embed", "vocab"), make_mesh(MeshConfig(fsdp=8), jax.devices())) == ()
    shape = dict(mesh.shape)
    sums = np.zeros((8, 2), np.uint32)
    sums[6] = 1  # data 1, fsdp 1, tensor 0
    assert odd_ones_out(sums, ("data",), shape) == ([2, 6], False)
    assert odd_ones_out(sums, ("data", "fsdp"), shape) == ([6], True)
    sums[3] = 2
    assert odd_ones_out(sums, ("data", "fsdp", "tensor"), shape) == ([3, 6], True)
    assert odd_ones_out(np.zeros((8, 2)), ("data",), shape) == ([], True)


def test_a_state_that_is_not_finite_is_refused_whatever_the_policies():
    config, mesh, _, state = setup(BASE.mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps, parameter_dims(config.model))
    guard = replace(config.guard, copies="off", non_finite="off")
    health = StateCheck(replace(config, guard=guard), mesh, optimizer, Rollbacks())
    bad = with_params(state, "outer", "norm", state["params"]["outer"]["norm"].at[3].set(jnp.inf))
    with pytest.raises(NumbersError, match="state after step 4 is not finite and is not saved: params/outer/norm"):
        health(4, bad)


def test_gradients_that_do_not_repeat_are_told(monkeypatch):
    """The second time, device 3 computes a gradient that is off by a bit."""
    config, mesh, _, state = setup(BASE.mesh)
    gradients = state["params"]
    monkeypatch.setattr(recompute_check, "make_loss_and_gradients", lambda *_: lambda params, batch: ({}, {}, params))
    config = replace(config, guard=replace(config.guard, repeat_every=2))
    steps = RecomputeCheck(prepared_of(config, mesh), lambda state, batch: (state, {}), first=0)
    rows = config.train.global_batch_size
    batch = {"targets": np.zeros((rows, 1))}
    for _ in range(4):  # the even ones are compared
        steps({"params": gradients}, batch)
    once, calls = steps._sums(0, rows), []

    def errs(params, batch):
        calls.append(None)
        if len(calls) == 2:
            params = params | {"outer": params["outer"] | {"norm": changed(params["outer"]["norm"], 3, flip(7))}}
        return once(params, batch)

    steps._sums = lambda batch, rows: errs
    steps({"params": gradients}, batch)
    with pytest.raises(NumbersError) as caught:
        steps({"params": gradients}, batch)
    message = str(caught.value)
    assert "the gradients of step 6 came out otherwise" in message
    assert "(outer/norm), on device 3 of process 0 (data=1, fsdp=1)" in message
