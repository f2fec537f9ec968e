"""Matmuls in float8: their error against the formats' bounds, their scales, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.ops.float8 import BACKWARD, FORWARD, LARGEST, power_of_two, scaled
from jaxtrain.ops.grouped_matmul import grouped_matmul
from jaxtrain.ops.matmul import multiply
from jaxtrain.sharding import Float8

EQUATIONS = {
    "BLD,DHN->BLHN": ((2, 8, 48), (48, 4, 8)),
    "BLHN,HND->BLD": ((2, 8, 4, 8), (4, 8, 48)),
    "ESD,EDF->ESF": ((3, 8, 48), (3, 48, 16)),
}
RELATIVE = {FORWARD: 2.0**-4, BACKWARD: 2.0**-3}
SUBNORMAL = {FORWARD: 2.0**-10, BACKWARD: 2.0**-17}
SMALLEST_NORMAL = {FORWARD: 2.0**-6, BACKWARD: 2.0**-14}


def wide(key: int, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of many sizes, a few of them far above the rest."""
    normal, size = jax.random.normal(jax.random.key(key), (2, *shape))
    return np.asarray(normal * jnp.exp(2 * size))


def in_float8(w: np.ndarray, slot: bool = True) -> Float8:
    scale = power_of_two(jnp.abs(w).max(), FORWARD)
    return Float8(scaled(jnp.asarray(w), scale, FORWARD), scale, jnp.zeros(w.shape) if slot else None)


def bound(x: np.ndarray, dtype) -> np.ndarray:
    """The largest error of each number: half a step of its format."""
    scale = float(power_of_two(jnp.abs(x).max(), dtype))
    return np.maximum(np.abs(x) * RELATIVE[dtype], scale * SUBNORMAL[dtype])


def is_within(equation: str, made, a: np.ndarray, b: np.ndarray, of_a, of_b) -> bool:
    """Whether the product is within |a| e(b) + e(a) |b| + e(a) e(b), and is not a plain product."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    exact, size = np.einsum(equation, a, b), np.einsum(equation, np.abs(a), np.abs(b))
    whole = np.einsum(equation, np.abs(a) + bound(a, of_a), np.abs(b) + bound(b, of_b))
    error = np.abs(np.asarray(made, np.float64) - exact)
    return bool((error <= whole - size + 1e-5 * whole).all() and error.max() > 1e-3 * np.abs(exact).max())


@pytest.mark.parametrize("equation", EQUATIONS)
def test_products_stay_within_the_formats_bounds(equation: str):
    of_x, of_w = EQUATIONS[equation]
    x, w = wide(0, of_x), wide(1, of_w)
    y, back = jax.vjp(lambda x, w: multiply(equation, x, w), jnp.asarray(x), in_float8(w))
    assert is_within(equation, y, x, w, FORWARD, FORWARD)
    g = wide(2, y.shape)
    dx, dw = back(jnp.asarray(g))
    operands, result = equation.split("->")
    left, right = operands.split(",")
    assert is_within(f"{result},{right}->{left}", dx, g, w, BACKWARD, FORWARD)
    assert is_within(f"{left},{result}->{right}", dw.slot, x, g, FORWARD, BACKWARD)


def test_a_frozen_weight_has_no_gradient():
    _, back = jax.vjp(lambda w: multiply("SD,DF->SF", jnp.ones((4, 8)), w), in_float8(np.ones((8, 4)), slot=False))
    assert back(jnp.ones((4, 4)))[0].slot is None


@pytest.mark.parametrize("dtype", LARGEST)
def test_a_scale_is_the_smallest_power_of_two_that_fits(dtype):
    largest = np.abs(wide(3, (1000,))) * 1e-3
    scale = np.asarray(jax.vmap(lambda a: power_of_two(a, dtype))(jnp.asarray(largest)))
    assert (np.log2(scale) % 1 == 0).all()
    assert (largest / scale <= LARGEST[dtype]).all()
    assert (largest / scale > LARGEST[dtype] / 2).all()


@pytest.mark.parametrize("odd", [np.inf, np.nan])
def test_what_is_not_finite_makes_all_results_nan(odd: float):
    x = np.ones((4, 8), np.float32)
    x[1, 2] = odd
    assert np.isnan(multiply("SD,DF->SF", jnp.asarray(x), in_float8(np.ones((8, 4))))).all()


def test_zeros_stay_zeros():
    assert not np.asarray(multiply("SD,DF->SF", jnp.zeros((4, 8)), in_float8(np.zeros((8, 4))))).any()


@pytest.mark.parametrize("dtype", LARGEST)
def test_a_larger_scale_changes_only_what_it_makes_subnormal(dtype):
    """Why parts of a tensor may have scales of their own: the module's bound on what that changes."""
    x = jnp.asarray(wide(4, (4096,)))
    own, larger = power_of_two(jnp.abs(x).max(), dtype), 64 * power_of_two(jnp.abs(x).max(), dtype)
    one, other = (np.asarray(scaled(x, scale, dtype), np.float64) * float(scale) for scale in (own, larger))
    is_normal = np.abs(x) >= float(larger) * SMALLEST_NORMAL[dtype]
    np.testing.assert_array_equal(one[is_normal], other[is_normal])
    largest = 64 * float(jnp.abs(x).max())  # of the tensor whose scale is the larger one
    assert np.abs(one - other).max() <= 2 * SUBNORMAL[dtype] / (LARGEST[dtype] / 2) * largest
    assert not is_normal.all() or dtype == BACKWARD


def test_rows_of_experts_are_multiplied_in_float8():
    sizes = np.array([3, 0, 5, 2], np.int32)
    x, w = wide(5, (12, 16)), wide(6, (4, 16, 8))
    expert = np.repeat([0, 2, 3], [3, 5, 2])
    y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.asarray(sizes), 1), jnp.asarray(x), in_float8(w))
    assert is_within("SD,SDF->SF", y[:10], x[:10], w[expert], FORWARD, FORWARD)
    assert not np.asarray(y[10:]).any()
    g = wide(7, (12, 8))
    dx, dw = back(jnp.asarray(g))
    assert is_within("SF,SDF->SD", dx[:10], g[:10], w[expert], BACKWARD, FORWARD)
    for e in (0, 2, 3):
        own = np.flatnonzero(expert == e)
        assert is_within("SD,SF->DF", dw.slot[e], x[own], g[own], FORWARD, BACKWARD)
    assert not np.asarray(dw.slot[1]).any()
