"""Latent attention against its formulas in numpy, on one device and on meshes."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxtrain.config import LatentAttentionConfig, MeshConfig, ModelConfig
from jaxtrain.mesh import make_mesh
from jaxtrain.models.latent_attention import LatentAttention
from jaxtrain.models.packing import Packing
from jaxtrain.ops.attention_context import AttentionPlan
from jaxtrain.parallel.turns import alone
from jaxtrain.sharding import gather_weights, reduce_gradients, specs, vary

BATCH = ("replica", "pipe", "data", "fsdp", "expert")
ROWS, LENGTH = 4, 8
LATENT = LatentAttentionConfig(query_rank=12, kv_rank=8, rope_dim=4, value_dim=5)
MODEL = ModelConfig(
    num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=4, head_dim=6, dtype="float32", init_std=0.5, latent_attention=LATENT
)


@functools.cache
def module(rank: int):
    """(graph, parameters, dims)"""
    model = replace(MODEL, latent_attention=replace(LATENT, query_rank=rank))
    graph, state = nnx.split(LatentAttention(model, nnx.Rngs(params=0)), nnx.Param)
    is_param = lambda leaf: isinstance(leaf, nnx.Param)  # noqa: E731
    dims = nnx.to_pure_dict(jax.tree.map(lambda p: p.get_metadata()["dims"], state, is_leaf=is_param))
    return graph, nnx.to_pure_dict(state), dims


@functools.cache
def inputs():
    """(x, cotangent of the output, positions, segments): documents that begin inside the sequence."""
    rng = np.random.default_rng(0)
    x, ct = rng.normal(size=(2, ROWS, LENGTH, MODEL.embed_dim)).astype(np.float32)
    segments = np.cumsum(rng.random((ROWS, LENGTH)) < 0.3, axis=1).astype(np.int32) + 1
    positions = np.stack([[t - list(row).index(row[t]) for t in range(LENGTH)] for row in segments]).astype(np.int32)
    return x, ct, positions, segments


def formula(xp, p, x, positions, segments):
    """The docstring's formulas, head by head, in whatever `xp` computes."""
    head, eps = MODEL.head_dim, MODEL.norm_epsilon
    norm = lambda a, scale: a / xp.sqrt((a**2).mean(-1, keepdims=True) + eps) * scale  # noqa: E731
    angles = positions[..., None] * 10_000.0 ** (-2 * np.arange(LATENT.rope_dim // 2) / LATENT.rope_dim)
    cos, sin = np.cos(angles), np.sin(angles)

    def turn(a):
        one, two = a[..., : LATENT.rope_dim // 2], a[..., LATENT.rope_dim // 2 :]
        return xp.concatenate([one * cos - two * sin, two * cos + one * sin], -1)

    h = norm(x, p["norm"])
    queries_from = norm(h @ p["query_down"], p["query_norm"]) if "query_down" in p else h
    latent, shared = norm(h @ p["kv_down"], p["kv_norm"]), turn(h @ p["rope_key"])
    visible = (segments[:, :, None] == segments[:, None, :]) & np.tril(np.ones((LENGTH, LENGTH), bool))
    out = x
    for i in range(MODEL.num_heads):
        query = queries_from @ p["query_up"][:, i]
        plain, turned = query[..., :head] @ xp.swapaxes(latent @ p["key_up"][:, i], 1, 2), turn(query[..., head:])
        scores = (plain + turned @ xp.swapaxes(shared, 1, 2)) / math.sqrt(head + LATENT.rope_dim)
        weights = xp.exp(xp.where(visible, scores, -np.inf))
        weights = weights / weights.sum(-1, keepdims=True)
        out = out + weights @ (latent @ p["value_up"][:, i]) @ p["out"][i]
    return out


@pytest.mark.parametrize("mesh_axes", [{}, {"tensor": 2, "fsdp": 2}, {"tensor": 4, "data": 2}], ids=str)
@pytest.mark.parametrize("rank", [0, 12])
def test_latent_attention(rank, mesh_axes):
    mesh_config = MeshConfig(**({"fsdp": 1} | mesh_axes))
    mesh = make_mesh(mesh_config, jax.devices()[: math.prod(mesh_config.shape)])
    graph, params, dims = module(rank)
    x, ct, positions, segments = inputs()

    def region(params, x, ct, positions, segments):
        params, x, ct, positions, segments = vary((params, x, ct, positions, segments))

        def loss(params, x):
            block = nnx.merge(graph, gather_weights(params, jax.lax.stop_gradient(params), dims, "float32"))
            out = alone(block(x, Packing(positions, segments, None, None), AttentionPlan("reference")))
            return jnp.sum(out * ct), out

        (_, out), (d_params, dx) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
        return out, reduce_gradients(vary(d_params), dims, "float32"), dx

    rows, whole = P(BATCH, ("context", "tensor")), P(BATCH, "context")
    in_specs, out_specs = (specs(dims), rows, rows, whole, whole), (rows, specs(dims), rows)
    step = jax.jit(jax.shard_map(region, mesh=mesh, in_specs=in_specs, out_specs=out_specs))
    got = step.lower(params, *inputs()).compile()(params, *inputs())

    exact = formula(np, jax.tree.map(lambda a: np.asarray(a, np.float64), params), x.astype(np.float64), positions, segments)
    np.testing.assert_allclose(got[0], exact, rtol=1e-5, atol=1e-5)
    by_formula = jax.grad(lambda p, x: jnp.sum(formula(jnp, p, x, positions, segments) * ct), (0, 1))(params, x)
    for a, b in zip(jax.tree.leaves(got[1:]), jax.tree.leaves(by_formula), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
