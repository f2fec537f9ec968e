"""Muon shares its matrices out among the devices of every mesh, and each matrix takes the same way as on one device."""

import functools
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from jaxtrain.config import MESH_AXES, OptimizerConfig
from jaxtrain.program.hlo import matmul_flops
from jaxtrain.sharding import is_dims, named
from jaxtrain.train import muon_shares
from jaxtrain.train.leaf_axes import STACKING
from jaxtrain.train.muon import orthogonalise, orthogonalise_on
from jaxtrain.train.optimizer import make_optimizer

SIZES = {"embed": 16, "heads": 4, "kv_heads": 2, "head_dim": 4, "mlp": 24, "experts": 4, "router": 4, "norm": 16, "latent": 8}
SIZES |= {"lora": 2, "vocab": 32, "chunk": 2, "stage": 2, "layer": 3}
LAYER = {
    "query": ("embed", "heads", "head_dim"),
    "key": ("embed", "kv_heads", "head_dim"),
    "out": ("heads", "head_dim", "embed"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "experts_up": ("experts", "embed", "mlp"),
    "experts_down": ("experts", "mlp", "embed"),
    "router": ("embed", "router"),
    "latent_up": ("latent", "heads", "head_dim"),
    "a": ("embed", "lora"),
    "b": ("lora", "heads", "head_dim"),
    "norm": ("norm",),
}
DIMS = {
    "layers": {name: (*STACKING, *dims) for name, dims in LAYER.items()},
    "outer": {"table": ("vocab", "embed"), "first": ("layer", "embed", "mlp")},
}
MESHES = {
    "fsdp": {"fsdp": 8},
    "fsdp x tensor": {"fsdp": 4, "tensor": 2},
    "pipe x fsdp x tensor": {"pipe": 2, "fsdp": 2, "tensor": 2},
    "data x pipe x tensor": {"data": 2, "pipe": 2, "tensor": 2},
    "data x fsdp": {"data": 2, "fsdp": 4},
    "expert x context x fsdp": {"expert": 2, "context": 2, "fsdp": 2},
    "replica x data x expert": {"replica": 2, "data": 2, "expert": 2},
}


def mesh_of(**sizes: int) -> Mesh:
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    return Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * 7)


def draw(seed: int):
    """Random numbers for every leaf, of very different sizes in different layers."""
    rng = np.random.default_rng(seed)

    def leaf(dims):
        shape = [SIZES[name] for name in dims]
        scale = 10.0 ** np.arange(-1, 2).reshape(-1, *[1] * (len(dims) - dims.index("layer") - 1)) if "layer" in dims else 1.0
        return (rng.normal(size=shape) * scale).astype(np.float32)

    return jax.tree.map(leaf, DIMS, is_leaf=is_dims)


def two_updates(mesh: Mesh | None):
    """The updates of two steps, on the host."""
    optimizer = make_optimizer(OptimizerConfig(name="muon", schedule="constant"), 10, DIMS)
    params, steps = draw(0), [draw(1), draw(2)]
    if mesh:
        shardings = named(mesh, DIMS)
        params, steps = jax.device_put(params, shardings), [jax.device_put(step, shardings) for step in steps]

    @jax.jit
    def run(params, steps):
        state, updates = optimizer.init(params), []
        for gradients in steps:
            update, state = optimizer.update(gradients, state, params, mesh=mesh)
            updates.append(update)
        return updates

    return jax.device_get(run(params, steps))


@functools.cache
def on_one_device():
    return two_updates(None)


@pytest.mark.parametrize("name", MESHES)
def test_an_update_is_that_of_one_device_on_every_mesh(name: str, monkeypatch):
    monkeypatch.setattr(muon_shares, "SHARED_ROWS", 1)
    expected, found = on_one_device(), two_updates(mesh_of(**MESHES[name]))
    for (path, e), f in zip(jax.tree_util.tree_flatten_with_path(expected)[0], jax.tree.leaves(found), strict=True):
        assert np.linalg.norm(f - e) <= 1e-5 * np.linalg.norm(e), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", MESHES)
def test_in_bfloat16_too_a_matrix_is_the_same_bit_for_bit(name: str, monkeypatch):
    monkeypatch.setattr(muon_shares, "SHARED_ROWS", 1)
    mesh, hidden = mesh_of(**MESHES[name]), DIMS["layers"] | {"first": DIMS["outer"]["first"]}
    del hidden["norm"]
    drawn = draw(1)
    dims, leaves = list(hidden.values()), [(drawn["layers"] | drawn["outer"])[name] for name in hidden]

    def run(leaves, mesh):
        return orthogonalise_on(mesh, leaves, dims, "bfloat16")

    expected = jax.jit(lambda *leaves: run(leaves, None))(*leaves)
    found = jax.jit(lambda *leaves: run(leaves, mesh))(*jax.device_put(leaves, named(mesh, dims)))
    for own, e, f in zip(hidden, expected, found, strict=True):
        assert np.array_equal(e, f), own


def test_a_device_computes_its_share_and_sends_shards_twice():
    """On fsdp=8, of six like matrices 8 with zeros: one each, by one all-to-all there and one back, and nothing else moves."""
    mesh, dims = mesh_of(fsdp=8), [(*STACKING, "embed", "mlp"), (*STACKING, "mlp", "embed")]
    shapes = [(1, 1, 3, 16, 24), (1, 1, 3, 24, 16)]
    leaves = [jax.ShapeDtypeStruct(s, np.float32, sharding=n) for s, n in zip(shapes, named(mesh, dims), strict=True)]
    text = jax.jit(lambda *leaves: orthogonalise_on(mesh, leaves, dims, "float32")).lower(*leaves).compile().as_text()
    moved = re.findall(r"\b(all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter)(?:-start)?\(", text)
    assert moved == ["all-to-all", "all-to-all"]
    assert matmul_flops(text) == 5 * (4 * 16 * 16 * 24 + 2 * 16**3)


def test_replicas_that_differ_each_orthogonalise_their_own():
    """As `train.step` maps the update over them."""
    mesh, dims = mesh_of(replica=2, fsdp=2, tensor=2), [(*STACKING, "embed", "mlp"), (*STACKING, "mlp", "embed")]
    leaves = [
        np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in ((2, 1, 1, 3, 8, 6), (2, 1, 1, 3, 6, 8))
    ]

    def run(*leaves):
        return orthogonalise_on(mesh, leaves, dims, "float32")

    placed = jax.device_put(leaves, named(mesh, [("replica", *own) for own in dims]))
    program = jax.jit(jax.vmap(run, spmd_axis_name="replica")).lower(*placed).compile()
    assert not re.search(r"\b(all-gather|all-reduce|collective-permute)(-start)?\(", program.as_text())
    for found, leaf in zip(program(*placed), leaves, strict=True):
        assert np.abs(found - orthogonalise(leaf)).max() < 1e-5
