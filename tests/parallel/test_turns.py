"""Two parts take turns: the order of their matmuls forward and backward, and the same results as alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.parallel.turns import Turn, alone, recompute_behind_next, reduce_behind_next, scoped, take_turns

BLOCKS = 2


def part(name: str, x: jax.Array, ran: list[str]) -> Turn[jax.Array]:
    """Blocks that stop at the four places, and tell what they did between them."""
    for i in range(BLOCKS):
        x = yield x
        ran.append(f"{name}{i} arrives")
        h = yield jnp.tanh(x)
        ran.append(f"{name}{i} computes")
        h = yield 2 * h
        ran.append(f"{name}{i} computes on")
        h = yield jnp.sin(h)
        ran.append(f"{name}{i} leaves")
        x = x + h
    return x


def test_one_part_runs_while_the_other_travels():
    """Once both run, a part's transfers (leaves, arrives) stand in pairs with the other's stretches of compute."""
    ran: list[str] = []
    take_turns([part("a", jnp.ones(3), ran), part("b", jnp.ones(3), ran)], jnp.zeros(()))
    begin = ran.index("a0 computes on")
    steps = list(zip(ran[begin::2], ran[begin + 1 :: 2], strict=False))
    assert steps[:4] == [
        ("a0 computes on", "b0 arrives"),
        ("a0 leaves", "b0 computes"),
        ("a1 arrives", "b0 computes on"),
        ("a1 computes", "b0 leaves"),
    ]


def test_results_and_gradients_are_those_of_each_alone():
    xs = jnp.array([[0.1, 0.2], [0.3, -0.4]])

    def together(xs):
        results, _ = take_turns([scoped("a", part("a", xs[0], [])), scoped("b", part("b", xs[1], []))], jnp.zeros(()))
        return jnp.stack(results).sum()

    def apart(xs):
        return jnp.stack([alone(part("", x, [])) for x in xs]).sum()

    np.testing.assert_allclose(jax.grad(together)(xs), jax.grad(apart)(xs), rtol=1e-6)
    backward = str(jax.make_jaxpr(jax.grad(together))(xs))
    # Seven meetings and three at the ends, each once forward and once backward.
    assert backward.count("optimization_barrier") >= 2 * 4 * BLOCKS


def test_gradients_reduced_behind_the_next_layer_are_the_same():
    """Through a scan, two layers an iteration; the scalar that carries the order has no say in any gradient."""
    weights, x = jnp.linspace(-0.5, 0.7, 16).reshape(4, 4), jnp.array([0.1, 0.2, 0.3, 0.4])

    def loss(weights, x, in_order: bool):
        def step(carry, weight):
            xs, reduced = carry
            if in_order:
                xs, reduced, weight = reduce_behind_next(xs, reduced, weight)
            return (tuple(jnp.tanh(x * weight) for x in xs), reduced), None

        (xs, _), _ = jax.lax.scan(step, ((x, 2 * x), jnp.zeros(())), weights, unroll=2)
        return sum(x.sum() for x in xs)

    got, want = (jax.grad(loss, argnums=(0, 1))(weights, x, in_order) for in_order in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)
    assert all(np.abs(gradient).min() > 0 for gradient in jax.tree.leaves(want))


def test_layers_computed_again_behind_the_next_have_the_same_gradients_and_keep_the_same():
    weights, x = jnp.linspace(-0.5, 0.7, 16).reshape(4, 4), jnp.array([0.1, 0.2, 0.3, 0.4])
    numbers = jnp.arange(4)

    def layer(xs, weights, clock, number):
        ys = tuple(jnp.tanh(jnp.sin(x) * weights[0]) + 0 * clock for x in xs)
        return ys, ys[0].sum(), {"number": number}, clock

    layer = jax.checkpoint(layer, prevent_cse=False)

    def loss(weights, x, behind: bool):
        def step(carry, slot):
            (xs, auxiliary, clock, begun), (weight, number) = carry, slot
            given = (xs, (weight, 2 * weight), clock, number)
            begun, *made = recompute_behind_next(layer)(begun, *given) if behind else (begun, *layer(*given))
            xs, more, reports, clock = made
            return (xs, auxiliary + more, clock, begun), reports["number"]

        start = ((x, 2 * x), *[jnp.zeros(())] * 3)
        (xs, auxiliary, clock, _), seen = jax.lax.scan(step, start, (weights, numbers), unroll=2)
        return sum(x.sum() for x in xs) + auxiliary + clock, seen

    losses = [functools.partial(loss, behind=behind) for behind in (True, False)]
    closures = [jax.vjp(one, weights, x, has_aux=True)[1:] for one in losses]
    (got, want) = (closure(jnp.ones(())) for closure, _ in closures)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)
    assert all(np.abs(gradient).min() > 0 for gradient in want)
    assert all(seen.tolist() == [0, 1, 2, 3] for _, seen in closures)
    kept = [sum(leaf.size for leaf in jax.tree.leaves(closure) if leaf.ndim) for closure, _ in closures]
    assert kept[0] == kept[1]
    barriers = [str(jax.make_jaxpr(closure)(jnp.ones(()))).count("optimization_barrier") for closure, _ in closures]
    assert (barriers[0], barriers[1]) == (2, 0)
