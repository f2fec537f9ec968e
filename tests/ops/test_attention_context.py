"""Attention over a shared-out sequence against `reference_attention` of the whole sequence on one device, float32."""

import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jaxtrain.config import MESH_AXES
from jaxtrain.ops.attention import reference_attention
from jaxtrain.ops.attention_context import context_attention
from jaxtrain.ops.attention_order import zigzag_order
from jaxtrain.sharding import vary
from tests.ops.test_attention import ragged_segments, relative

FAST_COMPILE = {"xla_llvm_disable_expensive_passes": True, "xla_backend_optimization_level": 0}


class Case(NamedTuple):
    """One thing to compute."""

    context: int = 2
    kind: str = "ring"
    backend: str = "blockwise"
    length: int = 24
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    window: int = 0
    documents: bool = True


def mesh_of(context, tensor=1):
    devices = np.array(jax.devices()[: context * tensor]).reshape(1, 1, 1, 1, 1, context, tensor)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def draw(case, seed=0, batch=2):
    rng = np.random.default_rng(seed)
    widths = ((case.heads, case.head_dim), (case.kv_heads, case.head_dim), (case.kv_heads, case.value_dim))
    shapes = [(batch, case.length, *w) for w in (*widths, (case.heads, case.value_dim))]
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    return arrays, ragged_segments(rng, batch, case.length)


def in_order(x, case, inverse=False):
    """A whole sequence (dim 1) in the order in which devices hold it, or back."""
    if case.kind == "ulysses":
        return x
    pieces = x.reshape(x.shape[0], 2 * case.context, -1, *x.shape[2:])
    order = zigzag_order(case.context)
    return pieces[:, np.argsort(order) if inverse else order].reshape(x.shape)


def region(case, remat=lambda f: f):
    """(q, k, v, do, segments) -> (o, dq, dk, dv), all whole in the devices' order, under shard_map over all axes."""
    length = P(None, "context", "tensor")

    def local(q, k, v, do, segments):
        attend = functools.partial(
            context_attention,
            kind=case.kind,
            backend=case.backend,
            window=case.window,
            segments_BL=segments if case.documents else None,
            residual_name="attention",
        )
        q, k, v, do = vary((q, k, v, do))
        o, pull = jax.vjp(remat(attend), q, k, v)
        unused = tuple(axis for axis in MESH_AXES if axis not in ("context", "tensor"))
        return jax.tree.map(lambda x: jax.lax.psum(x, unused), (o, *pull(do)))

    specs = {"in_specs": (*(length,) * 4, P()), "out_specs": (length,) * 4}
    return jax.shard_map(local, mesh=mesh_of(case.context), **specs, check_vma=True)


def expected(case, arrays, segments):
    q, k, v, do = arrays
    segments = segments if case.documents else None
    o, pull = jax.vjp(lambda q, k, v: reference_attention(q, k, v, segments, case.window), q, k, v)
    return o, *pull(do)


CASES = [
    *(Case(context=c, kind=kind) for c in (2, 4) for kind in ("ring", "gather")),
    Case(context=8, kind="ring", length=48, kv_heads=1),
    Case(context=8, kind="gather", length=32, window=5),
    Case(context=4, kind="ulysses", heads=8, kv_heads=4),
    Case(context=2, kind="ulysses", window=7, value_dim=4),
    Case(context=4, kind="ring", backend="reference", documents=False),
    Case(context=4, kind="ring", backend="reference", heads=6, kv_heads=3, head_dim=6, value_dim=4),
    Case(context=2, kind="ring", length=20, window=3, documents=False),
    Case(context=4, kind="ring", length=40, window=6, value_dim=12),  # the window reaches one piece on: two steps left out
    Case(context=8, kind="ring", length=32, window=1),  # every token sees itself only
    Case(context=8, kind="ring", length=32, window=4, heads=1, kv_heads=1),
    Case(context=2, kind="ring", length=4, backend="reference", window=100),  # pieces of one token
    Case(context=2, kind="ring", length=1200, heads=1, kv_heads=1),  # several blocks to a piece, the last not full
    Case(context=2, kind="gather", length=1200, heads=1, kv_heads=1, window=170, documents=False),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_equals_the_whole_sequence_on_one_device(case):
    for seed in (1, 2) if case.length < 100 else (1,):
        arrays, segments = draw(case, seed)
        ordered = [in_order(x, case) for x in (*arrays, segments)]
        step = step_of(case)
        truth = expected(case, arrays, segments)
        for name, actual, e in zip(("o", "dq", "dk", "dv"), step(*ordered), truth, strict=True):
            actual = in_order(np.asarray(actual), case, inverse=True)
            assert np.isfinite(actual).all()
            assert relative(actual, e) < 1e-5 or np.abs(actual - e).max() < 1e-6, (name, seed)


@functools.cache
def step_of(case):
    (arrays, segments) = draw(case)
    return jax.jit(region(case)).lower(*arrays, segments).compile(FAST_COMPILE)
