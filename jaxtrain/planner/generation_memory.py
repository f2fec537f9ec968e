"""The memory of generation on a device: weights, the cache of keys and values, and what a decoding step needs beside them."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtrain.config import MESH_AXES, Config
from jaxtrain.inference.cache import ROW_AXES, CacheSize, cache_shapes, cache_specs
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.sharding import specs
from jaxtrain.train.state import initial_params


class GenerationMemory(NamedTuple):
    """Bytes of one device."""

    weights: int
    """In `model.param_dtype`, as the state of training holds them."""
    cache: int
    """Windows have rings of entries, latent attention an entry of kv_rank + rope_dim numbers."""
    working: int
    """Of a step: logits, nine times in float32 where tokens are drawn, or a copy of one layer's cache, if that is more.
    Measured on programs compiled for CPUs."""


def generation_memory(config: Config, room: CacheSize) -> GenerationMemory:
    """Return what a device holds of a model that generates; weights and cache are sums of exact shapes.

    Args:
      config: resolved.
      room: rows of all devices, a multiple of the devices that rows are cut over.
    """
    weights = jax.eval_shape(functools.partial(initial_params, config))
    held = _bytes_of_device(config, weights, specs(parameter_dims(config.model)))
    return GenerationMemory(held, cache_bytes(config, room), working_bytes(config, room))


def working_bytes(config: Config, room: CacheSize) -> int:
    """Return the bytes of a decoding step beside weights and cache; see `GenerationMemory.working`."""
    devices = math.prod(size for axis, size in zip(MESH_AXES, config.mesh.shape, strict=True) if axis in ROW_AXES)
    logits = 4 * room.rows // devices * config.model.vocab_size
    return max(9 * logits, cache_bytes(config, room) * config.mesh.pipe // config.model.num_layers)


def cache_bytes(config: Config, room: CacheSize) -> int:
    """Return a device's bytes of the cache; see `generation_memory`."""
    return _bytes_of_device(config, cache_shapes(config, room), cache_specs(config, room.keeps_experts))


def _bytes_of_device(config: Config, shapes: Any, places: Any) -> int:
    sizes: dict[str, int] = dict(zip(MESH_AXES, config.mesh.shape, strict=True))

    def of(leaf: Any, place: Any) -> int:
        axes = [axis for part in place if part for axis in ((part,) if isinstance(part, str) else part)]
        return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize // math.prod(sizes[axis] for axis in axes)

    return sum(jax.tree.leaves(jax.tree.map(of, shapes, places)))
