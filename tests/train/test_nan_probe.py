"""The probe names the layer, operation and microbatch where numbers were made to go wrong."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import MeshConfig
from jaxtrain.config.rules import find_problems
from jaxtrain.mesh import make_mesh
from jaxtrain.parallel.stacking import make_stacking
from jaxtrain.sharding import named
from jaxtrain.train.gradients import batch_names, batch_sharding
from jaxtrain.train.nan_probe import NanProbe, Watched
from jaxtrain.train.state import initial_params, params_dims
from tests.tiny import tiny

BASE = tiny(model={"num_layers": 5}, train={"microbatches": 2, "loss_chunk": 4})
ODD = 99  # a token of the second microbatch only


def diagnosis(config, change, rows=(6,)):
    """What the probe says of parameters after `change(canonical number of a layer -> its place)`."""
    devices = math.prod(config.mesh.shape)
    assert find_problems(config, devices)[1] == []
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    numbers = make_stacking(config).layer_numbers()
    places = {int(number): tuple(map(int, place)) for place, number in np.ndenumerate(numbers)}
    params = jax.tree.map(np.array, initial_params(config))
    change(params, places)
    params = jax.device_put(params, named(mesh, params_dims(config)))
    tokens = np.random.default_rng(0).integers(0, ODD, (8, 8)).astype(np.int32)
    tokens[list(rows), 3] = ODD
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), (8, 8))
    arrays = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "positions": positions, "segments": np.ones_like(tokens)}
    batch = jax.device_put({name: arrays[name] for name in batch_names(config)}, batch_sharding(mesh))
    return NanProbe(config, mesh, "reference")(params, batch)


PIPED = replace(BASE, mesh=MeshConfig(pipe=2, data=2, fsdp=1, tensor=2))


@pytest.mark.parametrize("config", [BASE, PIPED], ids=["one", "pipe"])
def test_the_layer_and_the_operation_are_named(config):
    def change(params, places):
        params["layers"]["mlp"]["up"][places[3]] = 3e38

    words = diagnosis(config, change)
    assert words.startswith("first in microbatch 0 of 0 to 1: layer 3, mlp_up: dot_general in ")
    assert "mlp_block" in words
    assert "BLD,DF->BLF, ops/matmul.py:" in words
    assert words.endswith("gave numbers that are not finite")


def test_the_microbatch_is_named():
    """The odd token's embedding is so large that its square overflows in the first norm."""

    def change(params, places):
        params["outer"]["table"][ODD] = 1e25

    for rows, number in (((6,), 1), ((2, 6), 0)):
        words = diagnosis(BASE, change, rows)
        assert words.startswith(f"first in microbatch {number} of 0 to 1: layer 0, ")
        assert "ops/norm.py:" in words


def test_the_loss_is_named():
    def change(params, places):
        params["outer"]["head"][:] = 3e38

    words = diagnosis(BASE, change)
    assert words.startswith("first in microbatch 0 of 0 to 1: the loss, ")
    assert "ops/losses.py:" in words


def test_gradients_are_named_where_the_forward_pass_is_finite():
    """Weights of 1e-38 on activations of 1e36: their product is ordinary, and its derivative by the weights overflows."""

    def change(params, places):
        mlp = params["layers"]["mlp"]
        mlp["norm"][places[3]] = 1e36
        mlp["gate"][places[3]] *= 1e-36
        mlp["up"][places[3]] *= 1e-36
        params["outer"]["head"] *= 1e6

    words = diagnosis(BASE, change)
    assert words.startswith("first in microbatch 0 of 0 to 1: the forward pass is finite, and going back layer 3 is the first")
    assert words.endswith("whose gradients are not: layers/mlp/gate, layers/mlp/up")


def test_parameters_that_are_not_finite_are_named():
    def change(params, places):
        params["layers"]["attention"]["out"][(*places[1], 0, 0, 0)] = np.nan
        params["outer"]["norm"][0] = np.inf

    words = diagnosis(PIPED, change)
    assert words == "parameters are not finite before the step: layers/attention/out of layer 1, outer/norm"


def test_a_healthy_batch_is_said_to_be_one():
    assert "everything is finite" in diagnosis(BASE, lambda params, places: None)


def test_what_is_put_there_on_purpose_is_no_origin():
    """Minus infinity in a mask, and what a NaN comes through, are not where numbers go wrong."""

    def function(x, y):
        masked = jax.nn.softmax(jnp.where(x > 0, x, -jnp.inf))
        return jnp.sin(jnp.log(y)) + jax.jit(jnp.exp)(x).sum() + masked

    watched = Watched(function)
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])

    def origins(x, y):
        region = jax.shard_map(
            lambda x, y: watched(x, y)[1], mesh=mesh, in_specs=jax.P(), out_specs=jax.P(None), check_vma=False
        )
        return [watched.labels[i].split(" ")[0].rstrip(",") for i in np.flatnonzero(jax.jit(region)(x, y))]

    x, y = np.float32([1, -1, 2]), np.float32([1, 2, 3])
    assert origins(x, y) == []
    assert origins(x, y - 1) == ["log", "sin"][:1]
    assert origins(x * 100, y) == ["exp"]
    assert origins(x + np.nan, y)[:1] == ["the"]
