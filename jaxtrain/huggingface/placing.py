"""Put a folder's weights straight onto a mesh: each process reads only what its devices hold, one parameter at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtrain.checkpoint.trees import nested
from jaxtrain.config import ModelConfig
from jaxtrain.huggingface.table import FIRST, Fetch, Table
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.models.parameters import held_dtype
from jaxtrain.parallel.stacking import Stacking
from jaxtrain.sharding import Dims, is_dims, named

Index = tuple[slice, ...]


def place(
    model: ModelConfig,
    stacking: Stacking,
    mesh: Mesh,
    table: Table,
    fetch: Fetch,
    hold: Callable[[Dims, jax.Array], Any] = lambda _, array: array,
) -> Any:
    """Return the parameters of a table as `decoder.initialize` shapes them, sharded over the mesh.

    Empty slots and padding are zero. A table of adapters alone gives their branches of the tree.

    Args:
      hold: (dims, parameter) -> what stands in its place in the tree, made before the next is read.
    """
    dims_tree = parameter_dims(model)
    flat = jax.tree_util.tree_flatten_with_path(dims_tree, is_leaf=is_dims)[0]
    shardings = jax.tree.leaves(named(mesh, dims_tree))
    leaves = {}
    for (path, dims), sharding in zip(flat, shardings, strict=True):
        names = tuple(key.key for key in path)
        ours = "/".join(names)
        if ours not in table.parameters:
            continue
        read = functools.partial(_read, model, stacking, table, fetch, ours, dims)
        array = jax.make_array_from_callback(_shape(model, stacking, table, ours, dims), sharding, read)
        leaves[names] = hold(dims, array)
    return nested(leaves)


def _shape(model: ModelConfig, stacking: Stacking, table: Table, ours: str, dims: Dims) -> tuple[int, ...]:
    own = table.shape_of_ours(ours)
    if ours.startswith(FIRST):
        return (model.first_dense_layers, *own)
    if ours.startswith("layers/"):
        return (*stacking.shape, *own)
    return tuple(model.padded_vocab_size if name == "vocab" else size for name, size in zip(dims, own, strict=True))


def _read(
    model: ModelConfig, stacking: Stacking, table: Table, fetch: Fetch, ours: str, dims: Dims, index: Index | None
) -> np.ndarray:
    """Return a slice of a parameter as it lies in memory."""
    assert index is not None
    whole = _shape(model, stacking, table, ours, dims)
    bounds = [part.indices(size)[:2] for part, size in zip(index, whole, strict=True)]
    out = _zeros([stop - start for start, stop in bounds], held_dtype(dims, model.param_dtype))
    lead = 3 if ours.startswith("layers/") else 1 if ours.startswith(FIRST) else 0
    numbers = stacking.layer_numbers() if lead == 3 else np.arange(model.first_dense_layers) if lead else np.zeros((), int)
    own = table.shape_of_ours(ours)
    inner = [(min(start, size), min(stop, size)) for (start, stop), size in zip(bounds[lead:], own, strict=True)]
    within = tuple(slice(0, stop - start) for start, stop in inner)
    if "vocab" in dims and bounds[dims.index("vocab")][1] > own[dims.index("vocab")] < model.vocab_size:
        _fill_new_rows(model, table, fetch, ours, dims.index("vocab"), bounds, out)
    if 0 in [stop - start for start, stop in inner]:
        return out  # all padding
    for slot, number in np.ndenumerate(numbers[tuple(slice(*bound) for bound in bounds[:lead])]):
        if number >= 0:
            table.read(ours, int(number), tuple(slice(*bound) for bound in inner), out[slot][within], fetch)
    return out


def _zeros(shape: list[int], dtype: str) -> np.ndarray:
    """Return zeros that jax takes as they lie in memory: at a multiple of 64 bytes it makes no copy on a CPU."""
    kind = jax.dtypes.canonicalize_dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(kind).reshape(shape)


def _fill_new_rows(
    model: ModelConfig, table: Table, fetch: Fetch, ours: str, axis: int, bounds: list[tuple[int, int]], out: np.ndarray
) -> None:
    """Fill the rows of tokens that the folder does not have, up to model.vocab_size, with the mean of those that it has.

    Args:
      axis: that of the vocabulary.
      bounds: of `out` in the whole parameter.
    """
    own = table.shape_of_ours(ours)
    index = tuple(slice(0, own[axis]) if dim == axis else slice(*bound) for dim, bound in enumerate(bounds))
    held = np.empty([part.stop - part.start for part in index], out.dtype)
    table.read(ours, 0, index, held, fetch)
    start, stop = bounds[axis]
    new = [slice(None)] * out.ndim
    new[axis] = slice(max(own[axis], start) - start, max(min(model.vocab_size, stop) - start, 0))
    out[tuple(new)] = held.astype(np.float64).mean(axis, keepdims=True)
