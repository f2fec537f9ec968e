"""Interleave two parts of a microbatch: while one part's transfers are in flight, the other part's matmuls run.

A transfer before or after a matmul (tensor parallelism's gathers and scatters, the experts' exchange) leaves a device idle if
everything that it could compute waits for that transfer. The rows of a microbatch do not depend on each other: cut into
two parts, each part's transfers overlap with the other part's matmuls (Wang et al. 2024, Domino, arXiv:2409.15241).

XLA's scheduler does not find that order by itself: it runs two equal parts in step, transfers together and then matmuls
together. So the order is imposed here. A block of a layer is a generator that yields at four places, and is sent back the
value that it yielded:

    x = yield x            the sum of the block before: its transfer is complete
    h = yield gather(x)    the input of its first matmuls: its transfer is complete
    q = yield h @ w        about half of its matmuls are done
    y = yield ...          its last matmul's result, or (where the backward pass would not need that) its input

The parts run half a block apart, with an `optimization_barrier` over both parts' values at each place. So the transfers
between two stretches of one part's matmuls lie beside the halves of one stretch of the other's. The transpose of a barrier is a
barrier: the backward pass keeps the same order, reversed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
from jax import lax

Result = TypeVar("Result")
Turn = Generator[Any, Any, Result]
"""A block or a layer on one part: yields trees of arrays (module docstring), and returns its result."""


def alone(part: Turn[Result]) -> Result:
    """Run one part without interleaving."""
    return _finish(part, None)


def scoped(name: str, part: Turn[Result]) -> Turn[Result]:
    """Run the part with every stretch under a `jax.named_scope`, which must not stay active while the other part runs."""
    value = None
    while True:
        with jax.named_scope(name):
            try:
                given = part.send(value)
            except StopIteration as end:
                return end.value
        value = yield given


def take_turns(parts: Sequence[Turn[Result]], clock: jax.Array) -> tuple[list[Result], jax.Array]:
    """Run one part, or two of the same kind half a block apart; return their results and the clock.

    The clock is a scalar that goes through the barriers at both ends, so that the first part of the next call interleaves with
    the second part of this one. (XLA drops an unused value from a barrier: an order needs a value that is used later.)
    """
    if len(parts) == 1:
        return [alone(parts[0])], clock
    first, second = parts
    a, clock = lax.optimization_barrier((first.send(next(first)), clock))
    a, b = first.send(a), next(second)
    while True:
        a, b = lax.optimization_barrier((a, b))
        try:
            a = first.send(a)
        except StopIteration as end:
            # Work that uses the first part's result starts after half of the second part's last matmuls.
            result, b = lax.optimization_barrier((end.value, second.send(b)))
            b, clock = lax.optimization_barrier((second.send(b), clock))
            return [result, _finish(second, b)], clock
        b = second.send(b)


def _finish(part: Turn[Result], value: Any) -> Result:
    """Run the rest of a part."""
    while True:
        try:
            value = part.send(value)
        except StopIteration as end:
            return end.value


def reduce_behind_next(
    xs: tuple[jax.Array, ...], reduced: jax.Array, master: Any
) -> tuple[tuple[jax.Array, ...], jax.Array, Any]:
    """Identity; in the backward pass a layer's gradients are reduced during the next layer's matmuls.

    Left to itself, XLA reduces the gradients of all layers of an iteration at its end, where no computation is left to overlap.
    The gradient of `reduced`, a scalar that every layer passes on, waits for those of the layer's weights, and with it the last
    part's gradient at the end of the layer before.

    Args:
      xs: the input of each part of a layer.
      reduced: any scalar, passed from layer to layer.
      master: the layer's weights, whose gradients are reduced.
    """
    reduced, master = gradients_together(reduced, master)
    x, reduced = lax.optimization_barrier((xs[-1], reduced))
    return (*xs[:-1], x), reduced, master


@jax.custom_vjp
def gradients_together(x: jax.Array, weights: Any) -> tuple[jax.Array, Any]:
    """Identity; the backward puts both gradients behind one optimization_barrier."""
    return x, weights


gradients_together.defvjp(lambda *both: (both, None), lambda _, gradients: lax.optimization_barrier(gradients))


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Kept:
    """A layer's vjp closure without its arrays."""

    tree: Any
    """Tree of the vjp closure."""
    input_at: tuple[int | None, ...]
    """For each leaf, its place among the layer's inputs."""
    arguments: int
    """Number of arguments that have no gradient."""


def recompute_behind_next(layer: Callable[..., Any]) -> Callable[..., Any]:
    """Return (begun, xs, (master, compute), clock, *arguments) -> (begun, *layer(xs, (master, compute), clock, *arguments)).

    In the backward pass the layer is computed again once the backward of the layer after it begins. All that it needs is there
    before: left to itself, XLA computes all layers of an iteration again before the backward of the last one, and holds what
    they made until their turn. The gradient of `begun`, any scalar that every layer passes on, waits for that of the layer's
    output. Other gradients are those of xs, master and the clock.
    """

    @jax.custom_vjp
    def run(begun: jax.Array, xs: Any, weights: Any, clock: jax.Array, *arguments: Any) -> Any:
        return begun, *layer(xs, weights, clock, *arguments)

    def forward(begun: jax.Array, xs: Any, weights: Any, clock: jax.Array, *arguments: Any) -> Any:
        def of_trained(xs: Any, master: Any, clock: jax.Array) -> Any:
            return tuple(layer(xs, (master, weights[1]), clock, *arguments))

        results, closure = jax.vjp(of_trained, xs, weights[0], clock)
        leaves, tree = jax.tree.flatten(closure)
        place = {id(x): i for i, x in enumerate(xs)}
        input_at = tuple(place.get(id(leaf)) for leaf in leaves)
        others = [leaf for leaf, i in zip(leaves, input_at, strict=True) if i is None]
        return (begun, *results), (xs, others, _Kept(tree, input_at, len(arguments)))

    def backward(residuals: Any, gradients: Any) -> Any:
        (xs, others, kept), (begun, ys, *more) = residuals, gradients
        xs, begun = lax.optimization_barrier((xs, begun))
        y, begun = lax.optimization_barrier((ys[-1], begun))
        rest = iter(others)
        leaves = [next(rest) if i is None else xs[i] for i in kept.input_at]
        d_xs, d_master, d_clock = jax.tree.unflatten(kept.tree, leaves)(((*ys[:-1], y), *more))
        return begun, d_xs, (d_master, None), d_clock, *(None,) * kept.arguments

    run.defvjp(forward, backward)
    return run
