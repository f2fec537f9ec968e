"""Synchronise replicas: which step exchanges what over the axis `replica`, and how the result is used. It knows no model.

    every_step   mean gradients in every step (synchronous SGD, the default).
    local        replicas train alone; every H steps they go on from the mean of their parameters (local SGD; Stich 2019,
                 arXiv:1805.09767).
    diloco       the same, with an outer optimizer (Douillard et al. 2023, arXiv:2311.08105): with anchor A (the last common
                 parameters) and replicas' parameters P_r, the outer gradient is G = mean_r (A - P_r), and a step of SGD with
                 Nesterov momentum M = m M + G, A = A - lr (G + m M) gives the anchor from which all replicas go on. Inner
                 optimizer states stay with their replicas. `local` is this with lr = 1 and m = 0.
    delayed      a step's gradients wait in a queue, and are averaged over replicas and applied `delay` steps late.

Fragments (Streaming DiLoCo; Douillard et al. 2025, arXiv:2501.18512). The layers are cut into F interleaved fragments, layer
l in fragment l mod F, and all that is no layer of the stack is with fragment 0. Fragment f is exchanged after the steps n = f
H / F (mod H), each on its own every H steps, so the links carry 1/F at a time.

Overlap. With `overlap` tau > 0 an exchange that begins after step n sets A - P_r aside; it is sent in tau equal pieces, one
during each of the steps n + 1 .. n + tau, since a piece depends on nothing that its step computes. After step n +
tau the replicas apply the new anchor: P_r = mixing P_r + (1 - mixing) A (the paper's alpha). Without overlap P_r = A.

`delayed` and the parameter server. In asynchronous SGD (Dean et al. 2012; Li et al. 2014) a worker pulls parameters, computes
a gradient and pushes it, while others do the same: the gradient that the server applies at its step n was taken at the
parameters of step n - s, the staleness s varying from push to push; stale-synchronous SGD (Ho et al. 2013) keeps s <= tau.
Here s is tau for every gradient and every replica: always the worst case of that bound, on which its convergence proofs rest.
The overlap is the same (the exchange has a whole step's compute to hide behind), without server or races: a run can be
repeated bit for bit. The price is that no replica may lag: all take a step in the time of the slowest.
The first `delay` steps apply nothing, the gradients of the last `delay` are never applied, and delay 0 *is* every_step.

Compression (`ops/quantised_reduce.py`) applies to any of them: to gradients, and for local and diloco to A - P_r.

How a late exchange overlaps. Its payload is in the state, so its transfer starts with the step; `await_with` keeps XLA from
using the result before the step's own work is done; all leaves travel as one vector (one transfer spans a loop over layers,
many cannot), on a separate stream (`ops/quantised_reduce.py`). 7b compiled for 8 replicas of 8 H100s with delay 1: 5.5 GiB
per step are in flight from before the first layer to after the last. Compressed, an exchange is two transfers, and the second
waits for the first: it overlaps only with what XLA's schedule leaves of the step then. A small model in int8, compiled for
2 replicas of 8 H100s: the first is hidden entirely, the second to 40% (delayed) or not at all (diloco). Without `overlap` local
and diloco wait, once in `every` steps.

A step with an exchange is another compiled program than one without, because a conditional would copy the state: `exchange_at`
tells which program step n is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxtrain.config import SyncConfig
from jaxtrain.ops.quantised_reduce import Reduce
from jaxtrain.sharding import Dims, is_dims, sum_over, vary

PyTree = Any
AXIS = "replica"


@dataclass(frozen=True)
class Piece:
    """A piece of a fragment."""

    fragment: int
    index: int
    """Index among the equal pieces, from 0."""


@dataclass(frozen=True)
class ReplicaExchange:
    """One step's actions between replicas; equal values share a compiled program."""

    applies: bool = True
    """Whether the optimizer takes its step: not in the first steps of `delayed`, whose gradients are still in the queue."""
    begins: int | None = None
    """The fragment whose distance from the anchor is set aside after this step."""
    travels: tuple[Piece, ...] = ()
    """The pieces sent during this step (overlap 0: after it)."""
    ends: int | None = None
    """The fragment whose new anchor replicas apply after this step."""


def exchange_at(sync: SyncConfig, step: int) -> ReplicaExchange:
    """Return the actions of step number `step` (from 1)."""
    if not sync.replicas_differ:
        return ReplicaExchange(applies=step > sync.queued)

    def begun_at(step: int) -> int | None:
        phases = [fragment * sync.every // sync.fragments for fragment in range(sync.fragments)]
        return phases.index(step % sync.every) if step > 0 and step % sync.every in phases else None

    begins, ends = begun_at(step), begun_at(step - sync.overlap)
    if sync.overlap == 0:
        return ReplicaExchange(True, begins, () if begins is None else (Piece(begins, 0),), ends)
    sent = ((begun_at(step - 1 - index), index) for index in range(sync.overlap))
    return ReplicaExchange(
        True, begins, tuple(Piece(fragment, index) for fragment, index in sent if fragment is not None), ends
    )


def couples(sync: SyncConfig, step: int) -> bool:
    """Return whether no replica can finish step number `step` (from 1) before all have begun it."""
    return not sync.replicas_differ or bool(exchange_at(sync, step).travels)


def make_reduce(sync: SyncConfig) -> Reduce:
    """Return the reduction for means over replicas."""
    return Reduce(AXIS, sync.compression, sync.compression_block)


# ---------------------------------------------------------------------------------------------------------------------
# State


def _keeps_residual(sync: SyncConfig) -> bool:
    return sync.error_feedback and sync.compression != "none"


def state_dims(sync: SyncConfig, dims: PyTree) -> PyTree:
    """Return the logical dims of the state that `initial_state` makes, from the dims of the parameters."""

    def under(*lead: str) -> PyTree:
        return jax.tree.map(lambda own: (*lead, *own), dims, is_leaf=is_dims)

    state: dict[str, PyTree] = {}
    if sync.replicas_differ:
        state["anchor"] = dims
        if sync.outer[1]:
            state["momentum"] = dims
        if sync.overlap:
            state["outgoing"] = under("replica")
    elif sync.queued:
        state["queue"], state["queued_targets"] = under("replica", "delay"), ("replica", "delay")
    if _keeps_residual(sync):
        state["residual"] = under("replica")
    return state


def initial_state(sync: SyncConfig, params: PyTree, replicas: int) -> PyTree:
    """Return the algorithm's state before the first step; all float32.

    anchor: the last common parameters. momentum: the outer optimizer's. outgoing: distances from the anchor that are set aside.
    queue, queued_targets: queued gradients, [replicas, delay, ...], and the number of targets that each is the mean over.
    residual: what compression lost, [replicas, ...].
    """

    def zeros(*lead: int) -> PyTree:
        return jax.tree.map(lambda p: jnp.zeros((*lead, *p.shape), jnp.float32), params)

    makers: dict[str, Callable[[], PyTree]] = {
        "anchor": lambda: jax.tree.map(lambda p: p.astype(jnp.float32), params),
        "momentum": zeros,
        "outgoing": lambda: zeros(replicas),
        "queue": lambda: zeros(replicas, sync.delay),
        "queued_targets": lambda: jnp.zeros((replicas, sync.delay), jnp.float32),
        "residual": lambda: zeros(replicas),
    }
    return {name: makers[name]() for name in state_dims(sync, {})}


def await_with(late: PyTree, work: PyTree) -> tuple[PyTree, PyTree]:
    """Identity behind one barrier, so that XLA cannot use `late` before `work` is done.

    Otherwise XLA would fuse the use of `late` with other readers of the parameters at the start of the step (their cast to the
    compute dtype), and wait for the exchange there.
    """
    return lax.optimization_barrier((late, work))


# ---------------------------------------------------------------------------------------------------------------------
# Gradients: every_step with compression, and delayed. Inside the manual region; leaves are this device's shards.


def mean_gradients(sync: SyncConfig, gradients: PyTree, targets: jax.Array, state: PyTree) -> tuple[PyTree, PyTree]:
    """(mean over all replicas' targets, state), from gradients that are means over this replica's own `targets`.

    mean = sum_r n_r g_r / sum_r n_r, as mean_r (w_r g_r) with w_r = R n_r / sum_r n_r.
    """
    replicas = lax.axis_size(AXIS)
    weight = replicas * targets / jnp.maximum(sum_over(targets, (AXIS,)), 1)
    weighted = jax.tree.map(lambda g: weight * g.astype(jnp.float32), gradients)
    mean, residual = make_reduce(sync).mean(weighted, state.get("residual"))
    if sync.queued:
        mean, queue = await_with(mean, state["queue"])
        state = state | {"queue": queue}
    return mean, state if residual is None else state | {"residual": residual}


def queue_gradients(
    sync: SyncConfig, step: jax.Array, gradients: PyTree, targets: jax.Array, state: PyTree
) -> tuple[PyTree, jax.Array, PyTree]:
    """(gradients of `delay` steps ago, their targets, state with the new ones in their slot); `step` counts from 0."""
    slot = step % sync.delay
    old, old_targets = jax.tree.map(
        lambda queue: lax.dynamic_index_in_dim(queue, slot, keepdims=False), (state["queue"], state["queued_targets"])
    )
    queue, queued_targets = jax.tree.map(
        lambda queue, new: lax.dynamic_update_index_in_dim(queue, new.astype(jnp.float32), slot, 0),
        (state["queue"], state["queued_targets"]),
        (gradients, targets),
    )
    return old, old_targets, state | {"queue": queue, "queued_targets": queued_targets}


# ---------------------------------------------------------------------------------------------------------------------
# Parameters: local and diloco. Inside the manual region; leaves are this device's shards.


@dataclass(frozen=True)
class _Part:
    """Selects a piece of a fragment in trees of the parameters' structure."""

    dims: PyTree
    fragment: int
    fragments: int
    index: int = 0
    pieces: int = 1

    def take(self, tree: PyTree) -> PyTree:
        """Return the piece of each leaf as a vector; None for a leaf outside the fragment."""

        def leaf(dims: Dims, value: jax.Array) -> jax.Array | None:
            if not self._has_share(dims):
                return None
            flat = self._fragment_of(dims, value).reshape(-1)
            return lax.slice_in_dim(flat, *self._bounds(flat.size))

        return jax.tree.map(leaf, self.dims, tree, is_leaf=is_dims)

    def put(self, tree: PyTree, values: PyTree) -> PyTree:
        """Return the tree with the values of `take` replaced."""

        def leaf(dims: Dims, value: jax.Array, new: jax.Array | None) -> jax.Array:
            if new is None:
                return value
            fragment = self._fragment_of(dims, value)
            flat = fragment.reshape(-1)
            start, _ = self._bounds(flat.size)
            fragment = lax.dynamic_update_slice_in_dim(flat, new, start, 0).reshape(fragment.shape)
            if "stage" not in dims:
                return fragment
            split, axis = self._split(dims, value)
            return lax.dynamic_update_index_in_dim(split, fragment, self.fragment, axis).reshape(value.shape)

        return jax.tree.map(leaf, self.dims, tree, values, is_leaf=is_dims)

    def _has_share(self, dims: Dims) -> bool:
        return "stage" in dims or self.fragment == 0

    def _bounds(self, size: int) -> tuple[int, int]:
        return size * self.index // self.pieces, size * (self.index + 1) // self.pieces

    def _split(self, dims: Dims, value: jax.Array) -> tuple[jax.Array, int]:
        """Return a stacked leaf with its layers as [layers of a fragment, fragments], and the axis of the fragments."""
        layer = dims.index("layer")
        return value.reshape(*value.shape[:layer], -1, self.fragments, *value.shape[layer + 1 :]), layer + 1

    def _fragment_of(self, dims: Dims, value: jax.Array) -> jax.Array:
        if "stage" not in dims:
            return value
        split, axis = self._split(dims, value)
        return lax.index_in_dim(split, self.fragment, axis, keepdims=False)


def exchange_parameters(
    sync: SyncConfig, exchange: ReplicaExchange, dims: PyTree, params: PyTree, state: PyTree
) -> tuple[PyTree, PyTree, list[tuple[PyTree, PyTree]]]:
    """(params, state, distances) after a step whose optimizer left `params`: one per replica; the anchor is common to all.

    Distances: for each piece sent, the sums of (P_r - mean P)^2 and of (mean P)^2 over each leaf's part in the piece, on this
    device; None for a leaf without part in it.

    Args:
      dims: logical dims of the parameters; leaves with a dim "stage" are stacked, and their dim "layer" is cut into fragments.
    """

    def part(fragment: int, index: int = 0, pieces: int = 1) -> _Part:
        return _Part(dims, fragment, sync.fragments, index, pieces)

    if exchange.begins is not None:
        state = _begin(part(exchange.begins), params, state)
    spreads = []
    for piece in exchange.travels:
        params, state, spread = _travel(sync, part(piece.fragment, piece.index, max(sync.overlap, 1)), params, state)
        spreads.append(spread)
    if exchange.ends is not None:
        mixing = sync.mixing if sync.overlap else 0.0
        params = _end(part(exchange.ends), mixing, params, state["anchor"])
    if not sync.overlap:
        state = {name: tree for name, tree in state.items() if name != "outgoing"}
    return params, state, spreads


def _begin(part: _Part, params: PyTree, state: PyTree) -> PyTree:
    """Set aside the distance from the anchor."""
    away = jax.tree.map(lambda a, p: a - p.astype(jnp.float32), part.take(state["anchor"]), part.take(params))
    outgoing = state.get(
        "outgoing", jax.tree.map(jnp.zeros_like, state["anchor"])
    )  # without overlap it lives for one step only
    return state | {"outgoing": part.put(vary(outgoing, (AXIS,)), away)}


def _travel(sync: SyncConfig, part: _Part, params: PyTree, state: PyTree) -> tuple[PyTree, PyTree, tuple[PyTree, PyTree]]:
    """Average a piece of the outgoing distances over replicas, and take the outer optimizer's step with it."""
    learning_rate, momentum = sync.outer
    residual = part.take(state["residual"]) if "residual" in state else None
    away, old = part.take(state["outgoing"]), part.take(state["anchor"])
    gradient, residual = make_reduce(sync).mean(away, residual)
    if residual is not None:
        state = state | {"residual": part.put(state["residual"], residual)}
    if sync.overlap:
        gradient, params = await_with(gradient, params)
    # away = A - P_r and gradient = A - mean P, up to compression errors.
    spread = (
        jax.tree.map(lambda d, g: jnp.sum(jnp.square(d - g)), away, gradient),
        jax.tree.map(lambda a, g: jnp.sum(jnp.square(a - g)), old, gradient),
    )
    with jax.named_scope("outer_optimizer"):
        if momentum:
            trace = jax.tree.map(lambda m, g: momentum * m + g, part.take(state["momentum"]), gradient)
            state = state | {"momentum": part.put(state["momentum"], trace)}
            gradient = jax.tree.map(lambda m, g: g + momentum * m, trace, gradient)
        anchor = jax.tree.map(lambda a, g: a - learning_rate * g, old, gradient)
    return params, state | {"anchor": part.put(state["anchor"], anchor)}, spread


def _end(part: _Part, mixing: float, params: PyTree, anchor: PyTree) -> PyTree:
    """params = mixing * params + (1 - mixing) * anchor."""

    def leaf(own: jax.Array, common: jax.Array) -> jax.Array:
        mixed = mixing * own.astype(jnp.float32) + (1 - mixing) * common if mixing else vary(common, (AXIS,))
        return mixed.astype(own.dtype)

    return part.put(params, jax.tree.map(leaf, part.take(params), part.take(anchor)))


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


def exchanged_bytes(sync: SyncConfig, exchange: ReplicaExchange, dims: PyTree, shards: PyTree, replicas: int) -> float:
    """Return the bytes of gradients or parameters that one device sends to other replicas per step, by `Reduce`'s formula.

    Args:
      shards: leaves whose sizes are a device's shares of the parameters.
    """
    reduce = make_reduce(sync)
    if not sync.replicas_differ:
        return sum(reduce.wire_bytes(leaf.size, replicas) for leaf in jax.tree.leaves(shards)) if exchange.applies else 0.0
    parts = [_Part(dims, p.fragment, sync.fragments, p.index, max(sync.overlap, 1)) for p in exchange.travels]
    taken = [leaf for part in parts for leaf in jax.tree.leaves(jax.eval_shape(part.take, shards))]
    return sum(reduce.wire_bytes(leaf.size, replicas) for leaf in taken)
