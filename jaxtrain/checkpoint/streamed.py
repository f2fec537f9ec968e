"""Save a checkpoint block by block, so that no array is whole in memory: what an import of weights needs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from jaxtrain.checkpoint.blocks import Index, blocks_of, created
from jaxtrain.checkpoint.checksums import block_checksum, total
from jaxtrain.checkpoint.folder import partial, probe, remove_leftovers
from jaxtrain.checkpoint.same_run import as_json_gives_it_back
from jaxtrain.checkpoint.stored import FORMAT, absolute, commit, committed_steps
from jaxtrain.checkpoint.trees import describe, nested
from jaxtrain.errors import CheckpointError, ExplainedError, cause


class Leaf(NamedTuple):
    """An array to save."""

    name: str
    """With slashes."""
    shape: tuple[int, ...]
    dtype: np.dtype
    block: tuple[int, ...]
    """Shape of the blocks in which it is read and written."""
    read: Callable[[Index], np.ndarray]
    """Returns a block."""


def save_streamed(directory: os.PathLike | str, step: int, leaves: Iterable[Leaf], metadata: Mapping[str, Any]) -> None:
    """Save arrays as `step`, one block at a time. One process calls it, alone.

    Nothing is left of it if an array cannot be had or written.

    Raises:
      CheckpointError: the folder holds a checkpoint, or cannot be written.
      ExplainedError: as `leaves` raises.
    """
    root, leaves = absolute(directory), list(leaves)
    if committed_steps(root):
        raise CheckpointError(f"{root} holds checkpoints already; give another --run_dir")
    if problem := probe(root, full_is_fatal=True):
        raise CheckpointError(f"cannot write into {root}: {problem}")
    remove_leftovers(root)
    path, stored = partial(root, step), {"format": FORMAT, "step": step, "metadata": as_json_gives_it_back(metadata)}
    stored |= {"leaves": {leaf.name: describe(leaf) for leaf in leaves}}
    try:
        _outline(path, leaves, stored)
        commit(path, stored, {leaf.name: _write(path, leaf) for leaf in leaves})
    except BaseException as error:
        remove_leftovers(root)
        if isinstance(error, ExplainedError) or not isinstance(error, Exception):
            raise
        raise CheckpointError(f"{root / str(step)} cannot be written: {cause(error)}") from error


def _outline(path: epath.Path, leaves: list[Leaf], stored: dict[str, Any]) -> None:
    """Have Orbax save one number in place of each array, and write the arrays' own shapes into what it says of them."""
    context = ocp.Context()
    context.array.saving.array_metadata_store, context.array.saving.enable_write_sharding_file = None, False
    with context:
        numbers = {tuple(leaf.name.split("/")): jnp.zeros([1] * len(leaf.shape), leaf.dtype) for leaf in leaves}
        ocp.save(path, nested(numbers), custom_metadata=stored)
    file, shapes = path / "state" / "_METADATA", {tuple(leaf.name.split("/")): leaf.shape for leaf in leaves}
    outline = json.loads(file.read_text(encoding="utf-8"))
    for entry in outline["tree_metadata"].values():
        entry["value_metadata"]["write_shape"] = shapes[tuple(part["key"] for part in entry["key_metadata"])]
    file.write_text(json.dumps(outline), encoding="utf-8")


def _write(path: epath.Path, leaf: Leaf) -> str:
    """Write an array, each block while the next is read; return its checksum."""
    store, sums, writing = created(path, leaf.name, leaf.shape, leaf.dtype, leaf.block), [], None
    for index in blocks_of(leaf.shape, leaf.block):
        block = leaf.read(index)
        sums.append({leaf.name: block_checksum(block, [part.start for part in index], leaf.shape)})
        if writing is not None:
            writing.result()
        writing = store[index].write(block)
    if writing is not None:
        writing.result()
    return total(sums)[leaf.name]
