"""The training state: what it holds, how it is sharded, how it begins, and its canonical form for checkpoints.

A state is {"params", "optimizer", "step"}. In memory the layers are stacked for the pipeline and the vocabulary is padded; in
canonical form layers are [num_layers, ...] and the vocabulary is as long as it is, so that it fits every mesh.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.config import Config
from jaxtrain.models import decoder
from jaxtrain.parallel.stacking import Stacking
from jaxtrain.sharding import RULES, Dims, is_dims, named

PyTree = Any
PATHS_OF_STACKED = "layers"


def make_stacking(config: Config) -> Stacking:
    """How a resolved config lays its layers onto stages."""
    return Stacking(config.model.num_layers, config.mesh.pipe, config.pipeline.chunks)


def initial_params(config: Config) -> PyTree:
    """The parameters at step 0, stacked. A function of train.seed and the model alone, bit for bit, on every mesh."""
    params = decoder.initialize(config.model, jax.random.key(config.train.seed))
    return params | {"layers": jax.tree.map(make_stacking(config).stack, params["layers"])}


def initial_state(config: Config, optimizer: optax.GradientTransformation) -> PyTree:
    """The state at step 0."""
    params = initial_params(config)
    return {"params": params, "optimizer": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}


def _path(key_path: tuple) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key_path)


def _optimizer_leaf_dims(path: tuple[str, ...], leaf: Any, of_params: dict[tuple[str, ...], tuple[Dims, tuple]]) -> Dims:
    """Logical dims of one leaf of the optimizer state.

    A leaf of a parameter's path and shape is sharded like it. Another leaf that belongs to a stacked parameter keeps the
    stacking dims (its other dims are small: Adafactor's rows and columns). The rest, counts, are whole everywhere.
    """
    for suffix, (dims, shape) in of_params.items():
        if path[-len(suffix) :] == suffix:
            if leaf.shape == shape:
                return dims
            if dims[:3] == decoder.STACKED and leaf.shape[:3] == shape[:3]:
                return (*decoder.STACKED, *("norm",) * (leaf.ndim - 3))
    if leaf.ndim == 3 and PATHS_OF_STACKED in path:
        return decoder.STACKED
    return ("norm",) * leaf.ndim


def state_dims(config: Config, optimizer: optax.GradientTransformation) -> PyTree:
    """Logical dims of every leaf of the state."""
    abstract = jax.eval_shape(lambda: initial_state(config, optimizer))
    params = decoder.parameter_dims(config.model)
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_dims)[0]
    shapes = jax.tree_util.tree_flatten_with_path(abstract["params"])[0]
    of_params = {_path(p): (dims, leaf.shape) for (p, dims), (_, leaf) in zip(leaves, shapes, strict=True)}
    optimizer_dims = jax.tree_util.tree_map_with_path(
        lambda p, leaf: _optimizer_leaf_dims(_path(p), leaf, of_params), abstract["optimizer"]
    )
    return {"params": params, "optimizer": optimizer_dims, "step": ()}


def state_shardings(config: Config, mesh: Mesh, optimizer: optax.GradientTransformation) -> PyTree:
    """The NamedSharding of every leaf of the state."""
    return named(mesh, state_dims(config, optimizer))


def abstract_state(config: Config, mesh: Mesh, optimizer: optax.GradientTransformation) -> PyTree:
    """Shapes, dtypes and shardings of the state; nothing is allocated."""
    shapes = jax.eval_shape(lambda: initial_state(config, optimizer))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(config, mesh, optimizer),
    )


def create_state(config: Config, mesh: Mesh, optimizer: optax.GradientTransformation) -> PyTree:
    """The state at step 0, born sharded: no device ever holds more than its share."""
    shardings = state_shardings(config, mesh, optimizer)
    return jax.jit(lambda: initial_state(config, optimizer), out_shardings=shardings)()


# ---------------------------------------------------------------------------------------------------------------------
# Canonical form


def _canonical_leaf_dims(dims: Dims) -> Dims:
    return ("layer", *dims[3:]) if dims[:3] == decoder.STACKED else dims


def _canonical_spec(dims: Dims, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Sharding of a canonical leaf: the layers over pipe where they divide (else whole), the rest as in memory where it
    divides (a vocabulary without its padding may not)."""
    axes = [("pipe" if name == "layer" else RULES[name]) for name in dims]
    fits = [a if isinstance(a, str) and n % mesh.shape[a] == 0 else None for a, n in zip(axes, shape, strict=True)]
    return PartitionSpec(*fits)


def to_canonical(config: Config, state: PyTree, dims: PyTree) -> PyTree:
    """Layers as [num_layers, ...], vocabulary without padding. Pure; run it under jit with `canonical_shardings`."""
    stacking, model = make_stacking(config), config.model

    def leaf(dims: Dims, value: jax.Array) -> jax.Array:
        if dims[:3] == decoder.STACKED:
            return stacking.unstack(value)
        return value[tuple(slice(model.vocab_size) if name == "vocab" else slice(None) for name in dims)]

    return jax.tree.map(leaf, dims, state, is_leaf=is_dims)


def from_canonical(config: Config, canonical: PyTree, dims: PyTree) -> PyTree:
    """The inverse of `to_canonical`: empty slots and the vocabulary's padding are zero."""
    stacking, model = make_stacking(config), config.model

    def leaf(dims: Dims, value: jax.Array) -> jax.Array:
        if dims[:3] == decoder.STACKED:
            return stacking.stack(value)
        padding = [(0, model.padded_vocab_size - model.vocab_size if name == "vocab" else 0) for name in dims]
        return jnp.pad(value, padding) if padding else value

    return jax.tree.map(leaf, dims, canonical, is_leaf=is_dims)


class Canonical:
    """Compiled conversions between the state in memory and its canonical form, on one mesh."""

    def __init__(self, config: Config, mesh: Mesh, optimizer: optax.GradientTransformation):
        dims = state_dims(config, optimizer)
        abstract = abstract_state(config, mesh, optimizer)
        shapes = jax.eval_shape(lambda state: to_canonical(config, state, dims), abstract)
        shardings = jax.tree.map(
            lambda d, leaf: NamedSharding(mesh, _canonical_spec(_canonical_leaf_dims(d), leaf.shape, mesh)),
            dims,
            shapes,
            is_leaf=is_dims,
        )
        self.abstract = jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, shardings)
        """What a checkpoint holds, with the shardings in which this mesh reads and writes it."""
        in_memory = state_shardings(config, mesh, optimizer)
        self.from_state = jax.jit(lambda state: to_canonical(config, state, dims), out_shardings=shardings)
        self.to_state = jax.jit(
            lambda canonical: from_canonical(config, canonical, dims), out_shardings=in_memory, donate_argnums=0
        )
