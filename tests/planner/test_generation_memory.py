"""The memory of generation is that of the arrays that are made."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jaxtrain.config import MeshConfig
from jaxtrain.config.rules import validate
from jaxtrain.inference.cache import CacheSize
from jaxtrain.inference.forward import Programs
from jaxtrain.measure.layouts import BASE
from jaxtrain.mesh import make_mesh
from jaxtrain.planner.generation_memory import generation_memory
from jaxtrain.train.state import initial_params
from tests.inference.test_generate import model


@pytest.mark.parametrize(
    ("name", "mesh"),
    [("windows", {}), ("windows", {"pipe": 2, "fsdp": 2, "tensor": 2}), ("latents", {"expert": 2, "context": 2, "tensor": 2})],
)
def test_the_bytes_of_a_device_are_those_of_its_arrays(name: str, mesh: dict[str, int]):
    """A ring for windows, latents for latent attention, on a mesh."""
    one, room = model(name, **mesh), CacheSize(rows=8, length=64, chunk=4)
    cache, _ = Programs(one.config, one.mesh, room, 1).empty()
    held = [sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree)) for tree in (one.params, cache)]
    assert generation_memory(one.config, room)[:2] == tuple(held)


def test_a_decoding_step_needs_what_is_said():
    """Beside the arrays only the rows' own state, a byte for each token of the vocabulary."""
    model = replace(BASE.model, vocab_size=20_000)
    config = validate(replace(BASE, model=model, mesh=MeshConfig(fsdp=1)), 1)
    mesh, room = make_mesh(config.mesh, jax.devices()[:1]), CacheSize(rows=64, length=128, chunk=16)
    programs = Programs(config, mesh, room, 1)
    inputs = (
        jax.eval_shape(lambda: initial_params(config)),
        *jax.eval_shape(programs.empty),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    compiled = programs.decode.lower(*inputs).compile().memory_analysis()
    memory = generation_memory(config, room)
    rest = compiled.argument_size_in_bytes - memory.weights - memory.cache
    assert 0 < rest < 1.01 * 64 * 20_000
    assert compiled.temp_size_in_bytes == pytest.approx(memory.working, rel=0.02)
