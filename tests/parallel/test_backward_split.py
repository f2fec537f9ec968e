"""A backward pass in two parts: the same gradients, no matmul twice, and the urgent part without the weights' matmuls."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxtrain.parallel.backward_split import Split, subjaxprs

TOKENS, WIDTH, HIDDEN, LAYERS = 24, 16, 40, 3
SHAPES = {"norm": (WIDTH,), "q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}


def layer(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    h = x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["norm"]
    x = x + jax.nn.softmax((h @ p["q"]) @ (h @ p["k"]).T) @ h
    return x + jax.nn.silu(x @ p["up"]) @ p["down"]


def matmul_flops(jaxpr: Any) -> float:
    """Of all equations, those in loops as often as they run."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * depth
        total += eqn.params.get("length", 1) * sum(map(matmul_flops, subjaxprs(eqn)))
    return total


@pytest.mark.parametrize("remat", [False, True])
def test_a_scanned_stack_is_cut_at_its_weights_matmuls(remat: bool):
    key = jax.random.key(0)
    params = {n: jax.random.normal(jax.random.fold_in(key, i), (LAYERS, *s)) / 4 for i, (n, s) in enumerate(SHAPES.items())}
    x, dy = jax.random.normal(key, (2, TOKENS, WIDTH))
    one = jax.checkpoint(layer) if remat else layer
    _, pull = jax.vjp(lambda p, x: lax.scan(lambda x, p: (one(p, x), None), x, p)[0], params, x)
    leaves, tree = jax.tree.flatten(pull)

    def backward(*arguments: jax.Array) -> list[jax.Array]:
        gradients, dx = jax.tree.unflatten(tree, arguments[:-1])(arguments[-1])
        return [*(gradients[name] for name in SHAPES), dx]

    arguments = (*leaves, dy)
    split = Split(backward, arguments, [False] * len(SHAPES) + [True])
    assert split.waits == [False, True, True, True, True, False]  # not the norm's, which is no matmul, nor dx
    early, crossing = jax.jit(split.first)(*arguments)
    late = jax.jit(split.second)(crossing)
    parts = iter(early), iter(late)
    for expected, waits in zip(backward(*arguments), split.waits, strict=True):
        np.testing.assert_allclose(next(parts[waits]), expected, rtol=1e-5, atol=1e-5)

    flops = [
        matmul_flops(jax.make_jaxpr(f)(*a).jaxpr)
        for f, a in ((backward, arguments), (split.first, arguments), (split.second, (crossing,)))
    ]
    weights = 2.0 * TOKENS * LAYERS * sum(math.prod(SHAPES[name]) for name in ("q", "k", "up", "down"))
    assert flops[2] == weights
    assert flops[1] + flops[2] == flops[0]
    # The operands: the norm's output (once for q and k), x, the activation, and the gradient of each product.
    assert sum(value.size for value in crossing) == TOKENS * LAYERS * (2 * WIDTH + HIDDEN + 3 * WIDTH + HIDDEN)


def test_a_barrier_over_both_parts_is_cut():
    """An urgent result that shares an optimization_barrier with a weight's gradient does not wait for it."""

    def both(x: jax.Array, dy: jax.Array, w: jax.Array) -> list[jax.Array]:
        dw, dx = lax.optimization_barrier((x.T @ dy, dy @ w.T))
        return [2 * dw, dx]

    arguments = tuple(jax.random.normal(jax.random.key(0), (3, 8, 8)))
    split = Split(both, arguments, [False, True])
    (dx,), crossing = split.first(*arguments)
    assert split.waits == [True, False]
    assert len(crossing) == 2
    np.testing.assert_array_equal(dx, both(*arguments)[1])
    np.testing.assert_array_equal(split.second(crossing)[0], both(*arguments)[0])
    assert matmul_flops(jax.make_jaxpr(split.first)(*arguments).jaxpr) == 2.0 * 8**3


def test_a_gradient_that_a_loop_sums_up_waits_too():
    """A weight used in every round of a loop: its sum is carried by the second loop alone."""

    def back(w: jax.Array, xs: jax.Array, dy: jax.Array) -> list[jax.Array]:
        def step(carry: tuple, x: jax.Array) -> tuple:
            dw, dy = carry
            return (dw + x.T @ dy, dy @ w.T), None

        return list(lax.scan(step, (jnp.zeros_like(w), dy), xs)[0])

    w, dy, *xs = jax.random.normal(jax.random.key(0), (6, 8, 8)) / 3
    arguments = w, jnp.stack(xs), dy
    split = Split(back, arguments, [False, True])
    (dx,), crossing = split.first(*arguments)
    np.testing.assert_allclose(dx, back(*arguments)[1], rtol=1e-6)
    np.testing.assert_allclose(split.second(crossing)[0], back(*arguments)[0], rtol=1e-6)
