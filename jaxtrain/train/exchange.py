"""The exchanges between replicas in a train step: the shard_maps around `parallel/sync.py`, and their bytes.

They are separate regions beside that of loss and gradients, without `check_vma`: leaves are sent joined in one vector, and a
slice of it is typed as varying along all the axes along which any of them does. Nothing is differentiated here, and a
simulation checks the numbers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxtrain.config import Config
from jaxtrain.models.trained import trained, trained_dims
from jaxtrain.parallel import sync
from jaxtrain.parallel.sync import ReplicaExchange
from jaxtrain.sharding import RULES, Dims, is_dims, named, spec, specs, sum_over
from jaxtrain.train.state import initial_params, trained_of_each_replica

PyTree = Any
Region = Any  # a shard_map: called in a jitted step


def own(dims_tree: PyTree, tree: PyTree) -> PyTree:
    """Drop the leading dim "replica" of every leaf, inside a region where a device holds only its own replica's leaf."""
    return jax.tree.map(lambda dims, leaf: leaf[0] if dims[:1] == ("replica",) else leaf, dims_tree, tree, is_leaf=is_dims)


def for_each(dims_tree: PyTree, tree: PyTree) -> PyTree:
    """Add the leading dim "replica": the inverse of `own`."""
    return jax.tree.map(lambda dims, leaf: leaf[None] if dims[:1] == ("replica",) else leaf, dims_tree, tree, is_leaf=is_dims)


def under(lead: Dims, dims_tree: PyTree) -> PyTree:
    """Return the dims of a tree whose leaves have further leading dims."""
    return jax.tree.map(lambda dims: (*lead, *dims), dims_tree, is_leaf=is_dims)


def make_gradient_exchange(config: Config, mesh: Mesh, exchange: ReplicaExchange) -> Region:
    """(gradients [replica, ...], targets [replica], step, sync state) -> (gradients to apply, sync state), a shard_map.

    In a step that applies nothing the gradients are zeros.
    """
    dims = trained_dims(config)
    kept = sync.state_dims(config.sync, dims)
    of_each = under(("replica",), dims)

    def region(gradients: PyTree, targets: jax.Array, step: jax.Array, state: PyTree) -> tuple[PyTree, PyTree]:
        gradients, state, targets = own(of_each, gradients), own(kept, state), targets[0]
        if config.sync.queued:
            gradients, targets, state = sync.queue_gradients(config.sync, step, gradients, targets, state)
        if exchange.applies:
            gradients, state = sync.mean_gradients(config.sync, gradients, targets, state)
        return gradients if exchange.applies else None, for_each(kept, state)

    return jax.shard_map(
        region,
        mesh=mesh,
        in_specs=(specs(of_each), spec(("replica",)), PartitionSpec(), specs(kept)),
        out_specs=(specs(dims) if exchange.applies else None, specs(kept)),
        check_vma=False,
    )


def make_parameter_exchange(config: Config, mesh: Mesh, exchange: ReplicaExchange) -> Region:
    """(trained params [replica, ...], sync state) -> (params, sync state, metrics [replica]), a shard_map.

    Metrics: replica_divergence, in a step that sends parameters: |P_r - mean_r P_r| / |mean_r P_r| over the part of each
    replica's parameters P_r that is sent in this step, as of the start of its exchange. It costs no bytes between replicas.
    """
    dims, held = trained_dims(config), trained_of_each_replica(config)
    kept = sync.state_dims(config.sync, dims)

    def region(params: PyTree, state: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        params, state = own(held, params), own(kept, state)
        params, state, spreads = sync.exchange_parameters(config.sync, exchange, dims, params, state)
        metrics = {"replica_divergence": _divergence(dims, spreads)[None]} if spreads else {}
        return for_each(held, params), for_each(kept, state), metrics

    trees = (specs(held), specs(kept))
    return jax.shard_map(region, mesh=mesh, in_specs=trees, out_specs=(*trees, spec(("replica",))), check_vma=False)


def _divergence(dims_tree: PyTree, spreads: list[tuple[PyTree, PyTree]]) -> jax.Array:
    """sqrt(sum of squares of one tree / that of the other), over all leaves and this replica's devices."""

    def whole(dims: Dims, square: jax.Array | None) -> Any:
        axes = tuple(axis for axis in map(RULES.get, dims) if isinstance(axis, str))
        return 0.0 if square is None else sum_over(square, axes)

    def total(squares: PyTree) -> Any:
        return sum(jax.tree.leaves(jax.tree.map(whole, dims_tree, squares, is_leaf=is_dims)))

    return jnp.sqrt(sum(total(away) for away, _ in spreads) / sum(total(mean) for _, mean in spreads))


def exchanged_bytes(config: Config, mesh: Mesh, exchange: ReplicaExchange) -> float | None:
    """Return the bytes that a device sends to other replicas in a step with this exchange; None for a single replica."""
    replicas = config.mesh.replica
    if replicas == 1:
        return None
    dims = trained_dims(config)
    shapes = jax.eval_shape(lambda: trained(config, initial_params(config)))
    shards = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype), shapes, named(mesh, dims)
    )
    sent = sync.exchanged_bytes(config.sync, exchange, dims, shards, replicas)
    return sent if config.sync.sums_apart else sent * jnp.dtype(config.train.reduce_dtype).itemsize / 4


def describe_exchange(config: Config, mesh: Mesh) -> str:
    """Return one line for the log: the sync mode and its mean cost per step; empty for a single replica."""
    if config.mesh.replica == 1:
        return ""
    period = range(config.sync.every, 2 * config.sync.every)  # past the first steps of `delayed`
    if not config.sync.replicas_differ:
        period = range(config.sync.queued + 1, config.sync.queued + 2)
    sent = [exchanged_bytes(config, mesh, sync.exchange_at(config.sync, step)) or 0.0 for step in period]
    how = config.sync.mode if config.sync.compression == "none" else f"{config.sync.mode}, {config.sync.compression}"
    return f"{how}: a device sends {sum(sent) / len(sent) / 2**20:.3g} MiB a step to the other replicas, on average"
