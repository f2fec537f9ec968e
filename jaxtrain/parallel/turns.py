"""Two parts of a microbatch take turns: while one part's bytes travel, the other part's matmuls run.

A transfer before or after a matmul (tensor parallelism's gathers and scatters, the experts' exchange) leaves a device idle as
long as everything that it could compute waits for that transfer. The rows of a microbatch do not depend on each other: cut into
two parts, each part's transfers have the other part's matmuls to travel behind (Wang et al. 2024, Domino, arXiv:2409.15241).

XLA's scheduler does not find that order by itself: it runs two equal parts in step, transfers together and then matmuls
together. So the order is said here. A block of a layer is a generator that stops at four places, and gets back what it hands
out there:

    x = yield x            what the block before it has made, added up: its transfer has landed
    h = yield gather(x)    what its first matmuls read: its transfer has arrived
    q = yield h @ w        about half of its matmuls are done
    y = yield ...          what its last matmul made, or (where the backward pass would not need that) reads

The parts run half a block apart, and at each place they meet: an `optimization_barrier` over what both hold. So the transfers
between two stretches of one part's matmuls lie beside the halves of one stretch of the other's. The transpose of a barrier is a
barrier: the backward pass keeps the same turns, in reverse.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, TypeVar

import jax
from jax import lax

Result = TypeVar("Result")
Turn = Generator[Any, Any, Result]
"""A block or a layer on one part: yields trees of arrays (module docstring), and returns its result."""


def alone(part: Turn[Result]) -> Result:
    """Run one part with nobody to take turns with."""
    return _finish(part, None)


def scoped(name: str, part: Turn[Result]) -> Turn[Result]:
    """Yield the part, with every stretch of it under a `jax.named_scope`, which must not be held while the other part runs."""
    value = None
    while True:
        with jax.named_scope(name):
            try:
                given = part.send(value)
            except StopIteration as end:
                return end.value
        value = yield given


def take_turns(parts: Sequence[Turn[Result]], clock: jax.Array) -> tuple[list[Result], jax.Array]:
    """Run one part, or two of the same kind half a block apart; returns their results, and the clock.

    The clock is a scalar that goes through the barriers at both ends: so the first part of the next call comes in turn with the
    second part of this one. (XLA drops from a barrier what nobody uses behind it: an order needs a value that goes on.)
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
            # What follows the first part's result comes after half of the second's last matmuls.
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
    """(xs, reduced, master) as they are; in the backward pass a layer's gradients are reduced behind the next layer's matmuls.

    Left to itself, XLA reduces the gradients of all layers of an iteration at its end, where nothing is left to compute. The
    gradient of `reduced`, a scalar that every layer hands on, is held until those of the layer's weights are there; and with it
    the last part's gradient at the end of the layer before it.

    Args:
      xs: the input of each part of a layer.
      reduced: any scalar, handed from layer to layer.
      master: the layer's weights, whose gradients are reduced.
    """
    reduced, master = _gradients_together(reduced, master)
    x, reduced = lax.optimization_barrier((xs[-1], reduced))
    return (*xs[:-1], x), reduced, master


@jax.custom_vjp
def _gradients_together(scalar: jax.Array, weights: Any) -> tuple[jax.Array, Any]:
    """Return both as they are; none of their gradients before all are there."""
    return scalar, weights


_gradients_together.defvjp(lambda *both: (both, None), lambda _, gradients: lax.optimization_barrier(gradients))
