"""The memory of generation is that of the arrays that are made."""

import jax
import pytest

from jaxtrain.inference.cache import CacheSize
from jaxtrain.inference.forward import Programs
from jaxtrain.planner.generation_memory import generation_memory
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
    assert generation_memory(one.config, room) == tuple(held)
