"""Which parameters a run trains: all; or with `lora` the adapters alone; and none that `train.frozen` names.

Trees of the trained parameters (gradients, optimizer state, masters) have the structure of all parameters, with None in place
of a frozen one. None is no leaf, so no buffer, no sum over devices and no moment exists for it.
"""

from __future__ import annotations

import functools
import math
from fnmatch import fnmatchcase
from typing import Any

import jax
import numpy as np

from jaxtrain.config import Config, ModelConfig
from jaxtrain.errors import ConfigError, nearest
from jaxtrain.models import lora
from jaxtrain.models.decoder import check_base, initialize, layer_kinds_dims, parameter_dims
from jaxtrain.sharding import LORA, Dims, is_dims

PyTree = Any


def trained_dims(config: Config) -> PyTree:
    """Return the logical dims of every trained parameter, and None in place of a frozen one; do not mutate it.

    Raises:
      ConfigError: train.frozen or lora.targets names no parameter, nothing is left to train, or lora.base_group divides a
        matrix or its parts on the mesh not evenly.
    """
    check_base(config.model, config.mesh)
    return _trained_dims(config.model, config.train.frozen)


@functools.lru_cache(maxsize=64)
def _trained_dims(model: ModelConfig, frozen: tuple[str, ...]) -> PyTree:
    lora.check_targets(model.adapters, layer_kinds_dims(model))
    dims = parameter_dims(model)
    flat, structure = jax.tree_util.tree_flatten_with_path(dims, is_leaf=is_dims)
    names = ["/".join(str(key.key) for key in path).removesuffix("/values") for path, _ in flat]
    unknown = [pattern for pattern in frozen if not any(fnmatchcase(name, pattern) for name in names)]
    if unknown:
        raise ConfigError([f"train.frozen has {pattern!r}: {nearest(pattern, names)}" for pattern in unknown])

    def is_trained(name: str, own: tuple[str, ...]) -> bool:
        return (not model.adapters.rank or LORA in own) and not any(fnmatchcase(name, pattern) for pattern in frozen)

    kept = [own if is_trained(name, own) else None for name, (_, own) in zip(names, flat, strict=True)]
    if not any(kept):
        raise ConfigError([f"train.frozen={','.join(frozen)} leaves no parameter to train; freeze fewer"])
    return structure.unflatten(kept)


def trained(config: Config, params: PyTree) -> PyTree:
    """Return a tree of the parameters' structure with None in place of what is frozen."""
    structure = jax.tree.structure(parameter_dims(config.model), is_leaf=is_dims)
    pairs = zip(structure.flatten_up_to(trained_dims(config)), structure.flatten_up_to(params), strict=True)
    return structure.unflatten([leaf if own else None for own, leaf in pairs])


def with_trained(config: Config, params: PyTree, new: PyTree) -> PyTree:
    """Return the parameters with the trained ones replaced: the inverse of `trained`."""
    structure = jax.tree.structure(parameter_dims(config.model), is_leaf=is_dims)
    pairs = zip(structure.flatten_up_to(params), structure.flatten_up_to(new), strict=True)
    return structure.unflatten([old if changed is None else changed for old, changed in pairs])


def describe_trained(config: Config) -> str:
    """Return ", 24,576 of them trained" with adapters or frozen parameters, else nothing.

    Raises:
      ConfigError: as `trained_dims`.
    """
    kept, model = trained_dims(config), config.model
    if not model.adapters.rank and not config.train.frozen:
        return ""
    numbers = np.arange(model.stacked_layers)[None, None]
    shapes = jax.eval_shape(lambda: trained(config, initialize(model, jax.random.key(0), numbers)))

    def size(own: Dims, leaf: Any) -> int:
        sizes = zip(own, leaf.shape, strict=True)
        return math.prod(model.vocab_size if name == "vocab" else count for name, count in sizes)

    total = sum(jax.tree.leaves(jax.tree.map(size, kept, shapes, is_leaf=is_dims)))
    return f", {total:,} {'in adapters, which alone are' if model.adapters.rank else 'of them'} trained"
