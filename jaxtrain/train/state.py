"""The training state: content, sharding, initial value, and canonical form for checkpoints.

A state is {"params", "optimizer", "sync", "step"}, with a "guard" if the step classifies itself
(`train/step_acceptance.py`), and "ema" with train.ema_decay (`train/average.py`). If replicas differ (`sync.replicas_differ`),
every leaf of params, optimizer and ema has a leading dim "replica"; "sync" is the state of `parallel/sync.py`, usually empty.
In memory the layers are stacked for the pipeline and the vocabulary is padded; in canonical form layers are [num_layers, ...]
and the vocabulary is not padded, so that it fits every mesh. The guard's record is not part of it: it is stored beside it, as
plain numbers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.config import Config, SyncConfig
from jaxtrain.errors import CheckpointError, ConfigError
from jaxtrain.models import decoder
from jaxtrain.models.quantised_weights import holding
from jaxtrain.models.trained import trained, trained_dims
from jaxtrain.numerics import settled
from jaxtrain.parallel import sync
from jaxtrain.parallel.stacking import make_stacking
from jaxtrain.sharding import HOST_MEMORY, RULES, Dims, into_host_memory, is_dims, named, on_device, replicated
from jaxtrain.train.average import EMA, first_average
from jaxtrain.train.leaf_axes import names_of_path
from jaxtrain.train.moments import cut_block, lies_on_host
from jaxtrain.train.schedule import seed_words
from jaxtrain.train.step_acceptance import initial_record, record_dims, record_from_plain
from jaxtrain.train.xla_options import options_of_rare_programs

PyTree = Any
PATHS_OF_STACKED = "layers"


def initial_params(config: Config, seed: Any = None) -> PyTree:
    """Return the stacked parameters at step 0: a function of train.seed and the model alone, bit for bit, on every mesh.

    Scales of weights in few bits may differ by their last bit: `create_state` makes the true ones.

    Args:
      seed: `seed_words`, if an input of the program; None: those of train.seed.
    """
    return decoder.initialize(config.model, _key(config, seed), _layer_numbers(config))


def _key(config: Config, seed: Any) -> jax.Array:
    words = jnp.asarray(seed_words(config.train.seed) if seed is None else seed)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def _layer_numbers(config: Config) -> np.ndarray:
    return make_stacking(config).layer_numbers()


def _replica_state(config: Config, optimizer: optax.GradientTransformation, seed: Any = None) -> PyTree:
    """Return one replica's parameters and optimizer state at step 0."""
    params = initial_params(config, seed)
    return {"params": params, "optimizer": optimizer.init(trained(config, params))}


@functools.lru_cache(maxsize=8)
def _replica_shapes(config: Config, optimizer: optax.GradientTransformation) -> PyTree:
    return jax.eval_shape(lambda: _replica_state(config, optimizer))


def initial_state(
    config: Config, optimizer: optax.GradientTransformation, seed: Any = None, given: PyTree | None = None
) -> PyTree:
    """Return the state at step 0, equal on all replicas.

    Args:
      seed: that of `initial_params`.
      given: one replica's {"params"}, and "optimizer" if its state is given too, in place of random ones; adapters that are
        not among them are new.
    """
    replicas = config.mesh.replica
    state = _replica_state(config, optimizer, seed) if given is None else {"optimizer": None} | given
    if given is not None:
        state["params"] = decoder.add_adapters(config.model, state["params"], _key(config, seed), _layer_numbers(config))
    changing = trained(config, state["params"])
    if state["optimizer"] is None:
        state["optimizer"] = optimizer.init(changing)
    kept = sync.initial_state(config.sync, changing, replicas)
    state |= first_average(config, state["params"])
    if config.sync.replicas_differ:
        state = jax.tree.map(lambda leaf: jnp.broadcast_to(on_device(leaf), (replicas, *leaf.shape)), state)
    return state | {"sync": kept, "step": jnp.zeros((), jnp.int32)} | _if_any(initial_record(config.guard))


def _if_any(record: PyTree) -> PyTree:
    """Return the guard's addition to a state; empty if the guard remembers nothing."""
    return {"guard": record} if record else {}


def _optimizer_leaf_dims(path: tuple[str, ...], leaf: Any, of_params: dict[tuple[str, ...], tuple[Dims, tuple]]) -> Dims:
    """Return the logical dims of one leaf of the optimizer state.

    A leaf with a parameter's path and dims is sharded like it: moments, and the scales of their blocks (`train/moments.py`).
    Another leaf that belongs to a stacked parameter keeps the stacking dims (its other dims are small: Adafactor's rows and
    columns). The rest, counts, are replicated.
    """
    for suffix, (dims, shape) in of_params.items():
        if path[-len(suffix) :] == suffix:
            if leaf.ndim == len(shape):
                return dims
            if dims[:3] == decoder.STACKED and leaf.shape[:3] == shape[:3]:
                return (*decoder.STACKED, *("norm",) * (leaf.ndim - 3))
    if leaf.ndim == 3 and PATHS_OF_STACKED in path:
        return decoder.STACKED
    return ("norm",) * leaf.ndim


def params_dims(config: Config) -> PyTree:
    """Return the logical dims of the state's parameters: with a leading "replica" if replicas differ."""
    return _of_each_replica(config, decoder.parameter_dims(config.model))


def trained_of_each_replica(config: Config) -> PyTree:
    """Return the logical dims of the trained parameters: with a leading "replica" if replicas differ."""
    return _of_each_replica(config, trained_dims(config))


def _of_each_replica(config: Config, dims: PyTree) -> PyTree:
    return jax.tree.map(lambda own: ("replica", *own), dims, is_leaf=is_dims) if config.sync.replicas_differ else dims


def state_dims(config: Config, optimizer: optax.GradientTransformation) -> PyTree:
    """Return the logical dims of every leaf of the state.

    Raises:
      ConfigError: the mesh cuts through blocks of moments in 8 bits.
    """
    abstract = _replica_shapes(config, optimizer)
    params = decoder.parameter_dims(config.model)
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_dims)[0]
    shapes = jax.tree_util.tree_flatten_with_path(abstract["params"])[0]
    of_params = {names_of_path(p): (dims, leaf.shape) for (p, dims), (_, leaf) in zip(leaves, shapes, strict=True)}
    if config.optimizer.moments_dtype == "int8" and config.parts.optimizer is None:
        both = jax.tree.leaves(trained_dims(config), is_leaf=is_dims), jax.tree.leaves(trained(config, abstract["params"]))
        cut = filter(None, (cut_block(dims, leaf.shape, config.mesh) for dims, leaf in zip(*both, strict=True)))
        if problem := next(cut, None):
            raise ConfigError([problem])
    optimizer_dims = jax.tree_util.tree_map_with_path(
        lambda p, leaf: _optimizer_leaf_dims(names_of_path(p), leaf, of_params), abstract["optimizer"]
    )
    average = {EMA: trained_dims(config)} if config.train.ema_decay else {}
    changing = _of_each_replica(config, {"params": params, "optimizer": optimizer_dims} | average)
    kept = sync.state_dims(config.sync, trained_dims(config))
    return changing | {"sync": kept, "step": ()} | _if_any(record_dims(config.guard))


def state_shardings(config: Config, mesh: Mesh, optimizer: optax.GradientTransformation) -> PyTree:
    """Return the NamedSharding of every leaf of the state."""
    dims = state_dims(config, optimizer)
    shardings = named(mesh, dims)

    def placed(own: Dims, sharding: NamedSharding) -> NamedSharding:
        return into_host_memory(sharding) if lies_on_host(config.optimizer, own) else sharding

    if config.parts.optimizer is None:
        shardings["optimizer"] = jax.tree.map(placed, dims["optimizer"], shardings["optimizer"], is_leaf=is_dims)
    return shardings


def abstract_state(config: Config, mesh: Mesh, optimizer: optax.GradientTransformation) -> PyTree:
    """Return the shapes, dtypes and shardings of the state; nothing is allocated."""
    shapes = jax.eval_shape(lambda: initial_state(config, optimizer))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(config, mesh, optimizer),
    )


@settled()
def create_state(config: Config, mesh: Mesh, optimizer: optax.GradientTransformation) -> PyTree:
    """Return the state at step 0, created sharded: no device ever holds more than its share."""
    if config.lora.base:
        return state_of(config, mesh, optimizer, {"params": _params_in_few_bits(config, mesh)})
    shardings = state_shardings(config, mesh, optimizer)
    born = _rare(lambda seed: initial_state(config, optimizer, seed), mesh, shardings, in_shardings=replicated(mesh))
    return born(seed_words(config.train.seed))


def _rare(function: Callable[..., PyTree], mesh: Mesh, shardings: PyTree, **options: Any) -> Callable[..., PyTree]:
    """Return the jit of a function that runs once."""
    compiler_options = options_of_rare_programs(mesh.devices.flat[0].platform)
    return jax.jit(function, out_shardings=shardings, compiler_options=compiler_options, **options)


def _params_in_few_bits(config: Config, mesh: Mesh) -> PyTree:
    """Return the parameters at step 0 as `lora.base` holds them, of which all exist in param_dtype for a moment.

    They are made by one program and quantised by others: fused, a scale would be rounded as the program of each mesh likes.
    """
    plain = dataclasses.replace(config, lora=dataclasses.replace(config.lora, base="", base_group=0))
    dims = decoder.parameter_dims(plain.model)
    born = _rare(lambda seed: initial_params(plain, seed), mesh, named(mesh, dims), in_shardings=replicated(mesh))
    return jax.tree.map(holding(config.lora, mesh), dims, born(seed_words(config.train.seed)), is_leaf=is_dims)


@settled()
def state_of(config: Config, mesh: Mesh, optimizer: optax.GradientTransformation, given: PyTree) -> PyTree:
    """Return the state at step 0 with these parameters, and optimizer state if given, which are donated."""
    shardings = state_shardings(config, mesh, optimizer)
    return _rare(lambda given: initial_state(config, optimizer, given=given), mesh, shardings, donate_argnums=0)(given)


# ---------------------------------------------------------------------------------------------------------------------
# Canonical form


_LEADING = ("replica", "delay")


def _canonical_leaf_dims(dims: Dims) -> Dims:
    if dims[:1] and dims[0] in _LEADING:
        return (dims[0], *_canonical_leaf_dims(dims[1:]))
    return ("layer", *dims[3:]) if dims[:3] == decoder.STACKED else dims


def _canonical_spec(dims: Dims, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Return the sharding of a canonical leaf: layers over pipe if divisible (else whole), other dims as in memory if divisible
    (a vocabulary without its padding may not be).
    """
    axes = [("pipe" if name == "layer" else RULES[name]) for name in dims]
    fits = [a if isinstance(a, str) and n % mesh.shape[a] == 0 else None for a, n in zip(axes, shape, strict=True)]
    return PartitionSpec(*fits)


def _to_canonical_leaf(config: Config, dims: Dims, value: jax.Array) -> jax.Array:
    if dims[:1] and dims[0] in _LEADING:
        return jax.vmap(functools.partial(_to_canonical_leaf, config, dims[1:]))(value)
    if dims[:3] == decoder.STACKED:
        return make_stacking(config).unstack(value)
    return value[tuple(slice(config.model.vocab_size) if name == "vocab" else slice(None) for name in dims)]


def _from_canonical_leaf(config: Config, dims: Dims, value: jax.Array) -> jax.Array:
    """Return the leaf in memory's form; empty slots and the vocabulary's padding are zero."""
    if dims[:1] and dims[0] in _LEADING:
        return jax.vmap(functools.partial(_from_canonical_leaf, config, dims[1:]))(value)
    if dims[:3] == decoder.STACKED:
        return make_stacking(config).stack(value)
    missing = config.model.padded_vocab_size - config.model.vocab_size
    return jnp.pad(value, [(0, missing if name == "vocab" else 0) for name in dims]) if dims else value


def to_canonical(config: Config, tree: PyTree, dims: PyTree) -> PyTree:
    """Return the layers as [num_layers, ...] and the vocabulary without padding, whatever the leaves' shardings."""
    return jax.tree.map(lambda d, value: _to_canonical_leaf(config, d, on_device(value)), dims, tree, is_leaf=is_dims)


def check_same_replicas(saved: Mapping[str, Any], config: Config, directory: Any) -> None:
    """Check that a checkpoint's replicas are those of this run, if replicas have state of their own.

    Any other mesh will do, but parameters, moments, queued gradients and residuals of R replicas do not determine those of R'
    others. (An exchange that ends makes parameters alike, but not moments.)

    Args:
      saved: the config of the checkpoint, as `dataclasses.asdict` gives it.
    Raises:
      CheckpointError: they are not.
    """
    known = {field.name for field in dataclasses.fields(SyncConfig)}
    before = SyncConfig(**{name: value for name, value in saved.get("sync", {}).items() if name in known})
    replicas = saved.get("mesh", {}).get("replica", 1)

    def held(sync_config: SyncConfig, replicas: int) -> tuple:
        dims = sync.state_dims(sync_config, ())
        own = sync_config.replicas_differ or any(is_dims(d) and d[:1] == ("replica",) for d in dims.values())
        return sync_config.replicas_differ, sorted(dims), replicas if own else 1, sync_config.queued

    if held(before, replicas) == held(config.sync, config.mesh.replica):
        return
    names = [name for name in sorted(known) if getattr(before, name) != getattr(config.sync, name)]
    lines = [f"  - sync.{name}: {getattr(before, name)} -> {getattr(config.sync, name)}" for name in names]
    lines += [f"  - mesh.replica: {replicas} -> {config.mesh.replica}"] if replicas != config.mesh.replica else []
    raise CheckpointError(
        f"the checkpoint in {directory} holds the state of other replicas (checkpoint -> now):\n" + "\n".join(lines) + "\n"
        "With sync.mode local, diloco or delayed, and with error feedback, each replica has a state of its own. Set these back "
        "to go on with it, or start a new run with another --run_dir."
    )


class Canonical:
    """Compiled conversions between the state in memory and its canonical form, on one mesh.

    They work leaf by leaf, so that XLA needs temporary memory for moving only one leaf between stages.
    """

    def __init__(self, config: Config, mesh: Mesh, optimizer: optax.GradientTransformation):
        self._config, self._mesh, self._shardings = config, mesh, state_shardings(config, mesh, optimizer)
        self._dims = _without_record(state_dims(config, optimizer))
        abstract = _without_record(abstract_state(config, mesh, optimizer))
        shapes = jax.eval_shape(lambda state: to_canonical(config, state, self._dims), abstract)

        def abstract_leaf(dims: Dims, leaf: Any, here: NamedSharding) -> jax.ShapeDtypeStruct:
            sharding = NamedSharding(mesh, _canonical_spec(_canonical_leaf_dims(dims), leaf.shape, mesh))
            sharding = into_host_memory(sharding) if here.memory_kind == HOST_MEMORY else sharding
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        @functools.cache
        def shared(convert: Any, dims: Dims, sharding: NamedSharding) -> Any:  # one program for a parameter and its moments
            return jax.jit(lambda value: convert(config, dims, on_device(value)), out_shardings=sharding)

        def jitted(convert: Any, dims: Dims, target: Any) -> Any:
            return shared(convert, dims, target.sharding)

        self.abstract = jax.tree.map(abstract_leaf, self._dims, shapes, _without_record(self._shardings), is_leaf=is_dims)
        """The content of a checkpoint, with this mesh's shardings for reading and writing."""
        self._to = jax.tree.map(functools.partial(jitted, _to_canonical_leaf), self._dims, self.abstract, is_leaf=is_dims)
        self._from = jax.tree.map(functools.partial(jitted, _from_canonical_leaf), self._dims, abstract, is_leaf=is_dims)

    def from_state(self, state: PyTree) -> PyTree:
        """Return the canonical form of a state, which is left unchanged.

        On CPUs a leaf waits for the one before: where layers move between stages, XLA:CPU hangs with two programs under way.
        """
        waits = jax.block_until_ready if self._mesh.devices.flat[0].platform == "cpu" else lambda value: value
        return jax.tree.map(lambda convert, leaf: waits(convert(leaf)), self._to, waits(_without_record(state)))

    def part_to_state(self, canonical: PyTree) -> PyTree:
        """Return some parts of a state, {"params": ...}, of their canonical form, which is freed leaf by leaf."""
        return {name: jax.tree.map(_converted, self._from[name], tree) for name, tree in canonical.items()}

    def to_state(self, canonical: PyTree, record: Mapping[str, Any] | None = None) -> PyTree:
        """Return the state of a canonical form, which is freed leaf by leaf. An average that it lacks begins with its weights.

        Args:
          record: the guard's, as `step_acceptance.record_to_plain` gives it; None: that of step 0.
        """
        state = self.part_to_state(canonical)
        if EMA in self._shardings and EMA not in state:
            begun = jax.jit(lambda params: first_average(self._config, params)[EMA], out_shardings=self._shardings[EMA])
            state |= {EMA: begun(state["params"])}
        return state | _if_any(record_from_plain(self._config.guard, record or {}, self._mesh))


def _converted(convert: Any, value: jax.Array) -> jax.Array:
    """Return the converted array, and free the original."""
    converted = jax.block_until_ready(convert(value))
    value.delete()
    return converted


def _without_record(state: PyTree) -> PyTree:
    return {name: tree for name, tree in state.items() if name != "guard"}
