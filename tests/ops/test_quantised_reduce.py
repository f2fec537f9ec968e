"""Quantised means: within their bound of the exact mean, equal on all devices, nothing lost with feedback, in few bytes."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxtrain.ops.quantised_reduce import Reduce, decode, encode
from tests.replicas import blocked, mean_exchanged, quantised

DEVICES, BLOCK = 4, 16
SHAPES = {"matrix": (7, 13), "vector": (5,), "blocks": (DEVICES * BLOCK * 2,)}  # ragged, shorter than a block, even
COMPRESSIONS = ("bfloat16", "int8", "float8")


def values(seed: int) -> dict[str, np.ndarray]:
    """A leaf of each shape for each device, blocks of very different sizes in them."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=(DEVICES, *shape)) * 10.0 ** rng.integers(-3, 3, (DEVICES, *shape))).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def jitted(reduce: Reduce, feedback: bool) -> Any:
    """(values [R, ...], residual [R, ...]) -> (every device's mean [R, ...], residual [R, ...])"""
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("replica",))

    def region(tree: Any, residual: Any) -> Any:
        own, lost = jax.tree.map(lambda a: a[0], (tree, residual))
        mean, lost = reduce.mean(own, lost if feedback else None)
        return jax.tree.map(lambda a: a[None], (mean, lost if feedback else own))

    # Results are typed as equal along the axis; a spec that names it asks for each device's own copy all the same.
    one = PartitionSpec("replica")
    return jax.jit(jax.shard_map(region, mesh=mesh, in_specs=one, out_specs=one))


def bound(x: np.ndarray, compression: str) -> np.ndarray:
    """The module's e(x), block by block."""
    largest = np.abs(x).max(-1, keepdims=True)
    return {
        "bfloat16": np.abs(x) / 256,
        "int8": np.broadcast_to(largest / 254, x.shape),
        "float8": np.maximum(np.abs(x) / 16, largest / (448 * 1024)),
    }[compression] * (1 + 1e-5)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_within_the_stated_bound_and_equal_everywhere(compression: str):
    tree = values(0)
    got, _ = jax.device_get(jitted(Reduce("replica", compression, BLOCK), feedback=False)(tree, tree))
    for name, each in tree.items():
        assert all(np.array_equal(got[name][0], other) for other in got[name][1:]), "devices disagree"
        cut = blocked(each, BLOCK)
        allowed = bound(cut, compression).mean(0) + bound(quantised(cut, compression).mean(0), compression)
        error = np.abs(blocked(got[name], BLOCK)[0] - cut.mean(0, dtype=np.float64))
        assert (error <= allowed).all(), f"{name}: {(error / allowed).max()} of the bound"
        assert error.max() > 0, "nothing was quantised"


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_error_feedback_as_simulated_and_nothing_is_lost(compression: str):
    exchange = jitted(Reduce("replica", compression, BLOCK), feedback=True)
    residual = jax.tree.map(np.zeros_like, values(0))
    exact, received = (jax.tree.map(lambda a: np.zeros(a.shape[1:], np.float64), residual) for _ in range(2))
    for seed in range(3):
        tree = values(seed)
        expected = {name: mean_exchanged(tree[name], residual[name], compression, BLOCK) for name in tree}
        got, residual = jax.device_get(exchange(tree, residual))
        for name, each in tree.items():
            np.testing.assert_allclose(got[name][0], expected[name][0], rtol=1e-6)
            np.testing.assert_allclose(residual[name], expected[name][1], rtol=1e-4, atol=1e-6 * np.abs(each).max())
            exact[name] += each.mean(0, dtype=np.float64)
            received[name] += got[name][0]
    for name in exact:
        np.testing.assert_allclose(received[name], exact[name] - residual[name].mean(0), atol=1e-5 * np.abs(exact[name]).max())


def test_without_compression_it_is_the_plain_mean():
    tree = values(0)
    got, lost = jax.device_get(jitted(Reduce("replica"), feedback=True)(tree, jax.tree.map(np.ones_like, tree)))
    for name, each in tree.items():
        np.testing.assert_allclose(got[name][0], (each + 1).mean(0), rtol=1e-6, atol=1e-6)
        assert not lost[name].any()


@pytest.mark.parametrize("compression", ["int8", "float8"])
def test_blocks_of_zeros_of_almost_nothing_and_of_nan(compression: str):
    x = np.zeros((4, BLOCK), np.float32)
    x[1, 3], x[2, 5], x[3, 7] = 1e-38, np.nan, np.inf
    y = np.asarray(jax.jit(lambda x: decode(encode(x, compression), compression))(x))
    assert (y[0] == 0).all()
    assert abs(y[1]).max() <= 2e-38
    assert np.isnan(y[2]).all()
    assert np.isnan(y[3]).any(), "a step that blew up must stay visible"


@pytest.mark.parametrize("compression", ["none", *COMPRESSIONS])
def test_bytes_on_the_wire(compression: str):
    """In the compiled program: what crosses the axis is uint8 (float32 without compression), as many as the formula says."""
    reduce = Reduce("replica", compression, BLOCK)
    x = np.zeros((DEVICES, *SHAPES["matrix"]), np.float32)
    text = jitted(reduce, feedback=False).lower({"x": x}, {"x": x}).compile().as_text()
    lines = re.findall(r"= (\([^=]*?\)|\S+) (all-reduce|all-to-all|all-gather|reduce-scatter)(?:-start)?\(", text)
    size = {"u8": 1, "f32": 4}
    sent, share = 0.0, (DEVICES - 1) / DEVICES
    for shape, kind in lines:
        pieces = re.findall(r"(\w+)\[([\d,]*)\]", shape)
        payload = sum(size[dtype] * int(np.prod([int(n) for n in dims.split(",") if n])) for dtype, dims in pieces)
        sent += payload * share * (2 if kind == "all-reduce" else 1)
    assert {kind for _, kind in lines} == ({"all-reduce"} if compression == "none" else {"all-to-all", "all-gather"})
    assert sent == reduce.wire_bytes(int(np.prod(SHAPES["matrix"])), DEVICES)


def test_float8_rounds_as_ml_dtypes():
    """XLA's conversion on this backend is the nearest number, ties to even."""
    x = np.random.default_rng(0).normal(size=(64, BLOCK)).astype(np.float32)
    got = jax.jit(lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.float32))(x)
    np.testing.assert_array_equal(got, x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
