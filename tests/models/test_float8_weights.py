"""Matrices in float8: chosen by their dims, the same on every mesh, and a step with them."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxtrain.config import MeshConfig, ModelConfig, MoEConfig
from jaxtrain.config.rules import find_problems
from jaxtrain.measure.layouts import BASE, Outcome, compare, on_one_device, truth
from jaxtrain.mesh import make_mesh
from jaxtrain.models.decoder import initialize, parameter_dims, to_compute
from jaxtrain.models.float8_weights import in_float8
from jaxtrain.sharding import Float8, is_dims, spec, specs, vary
from tests.tiny import tiny

MIXTURE = MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=16, shared_experts=1, first_dense_layers=1)
MODELS = {"dense": BASE.model, "experts": replace(BASE.model, num_layers=5, moe=MIXTURE)}
WIDE = replace(BASE, model=replace(BASE.model, embed_dim=64, num_kv_heads=4, head_dim=8, mlp_dim=128, matmul_dtype="float8"))


def quantised(model: ModelConfig, mesh: MeshConfig) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(name, numbers, scales) of every weight in float8, as a mesh makes them."""
    dims, devices = parameter_dims(model), make_mesh(mesh, jax.devices()[: int(np.prod(mesh.shape))])
    params = initialize(model, jax.random.key(0), np.arange(model.stacked_layers).reshape(1, 1, -1))
    flat, structure = jax.tree.flatten(dims, is_leaf=is_dims)

    def region(params):
        params = vary(params)
        made = structure.flatten_up_to(in_float8(params, to_compute(params, dims, "bfloat16"), dims))
        return [(leaf.values, leaf.scale) for leaf in made if isinstance(leaf, Float8)]

    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(dims, is_leaf=is_dims)[0]]
    chosen = [i for i, name in enumerate(names) if name.startswith("['layers']") or "first_layers" in name]
    chosen = [i for i in chosen if not any(word in names[i] for word in ("norm", "router", "bias"))]
    out = [(spec(flat[i]), spec(tuple(n for n in flat[i] if n in ("chunk", "stage", "layer")))) for i in chosen]
    mapped = jax.shard_map(region, mesh=devices, in_specs=(specs(dims),), out_specs=out, check_vma=False)
    made = jax.jit(mapped)(params)
    return [(names[i], np.asarray(v, np.float32), np.asarray(s)) for i, (v, s) in zip(chosen, made, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_every_mesh_makes_the_same_numbers(name: str):
    model = MODELS[name]
    expert = {"expert": 2, "fsdp": 2} if model.moe else {"data": 2, "fsdp": 2}
    one, cut = quantised(model, MeshConfig(fsdp=1)), quantised(model, MeshConfig(**expert, tensor=2))
    assert len(one) == (17 if model.moe else 7)
    for (which, numbers, scale), (_, of_mesh, of_scale) in zip(one, cut, strict=True):
        np.testing.assert_array_equal(numbers, of_mesh, which)
        np.testing.assert_array_equal(scale, of_scale, which)
        assert 224 < np.abs(numbers).max() <= 448, which


def distance(one: Outcome, other: Outcome) -> float:
    """Norm of the difference of two gradients / norm of the first."""
    pairs = [jax.tree.leaves(outcome.gradients) for outcome in (one, other)]
    return float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(*pairs, strict=True)) / sum(np.sum(a**2) for a in pairs[0])))


LAYOUTS = [
    {"mesh": MeshConfig(data=2, fsdp=2, tensor=2), "microbatches": 2},
    pytest.param({"mesh": MeshConfig(pipe=2, context=2, fsdp=2), "microbatches": 4}, marks=pytest.mark.slow),
    pytest.param({"mesh": MeshConfig(fsdp=4), "zero": 1, "remat": "full"}, marks=pytest.mark.slow),
    pytest.param({"mesh": MeshConfig(expert=2, fsdp=2, tensor=2), "moe": MIXTURE}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_does_not_change_the_result(layout: dict):
    """A sum in another order may move a number over the border between two of float8: one step of 1/8, where float32 has 1e-7.

    Those are few. So layouts differ by a small share of what float8 itself changes.
    """
    model = replace(WIDE.model, moe=layout.get("moe"), num_layers=5 if "moe" in layout else 4)
    train = replace(WIDE.train, microbatches=layout.get("microbatches", 1), remat=layout.get("remat", "named"))
    sharding = replace(WIDE.sharding, zero=layout.get("zero", 3))
    config = replace(WIDE, model=model, mesh=layout["mesh"], train=train, sharding=sharding)
    plain = replace(config, model=replace(config.model, matmul_dtype="default"))
    of_float8 = distance(truth(on_one_device(plain), 1), truth(on_one_device(config), 1))
    errors = compare(config, 1)
    assert 0.01 < of_float8 < 0.2
    assert errors.same_start
    assert errors.loss < 1e-5
    assert errors.gradient < of_float8 / 10


def test_float8_is_refused_with_adapters():
    config = tiny(model={"matmul_dtype": "float8"}, lora={"rank": 2})
    assert any("with lora.rank use default" in problem for problem in find_problems(config, 1)[1])
