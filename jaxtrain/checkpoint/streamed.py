"""Save a checkpoint array by array, so that no more than one of them is in memory: what an import of weights needs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxtrain.checkpoint.checksums import checksum_by_parts
from jaxtrain.checkpoint.folder import partial, probe, remove_leftovers
from jaxtrain.checkpoint.same_run import as_json_gives_it_back
from jaxtrain.checkpoint.stored import FORMAT, absolute, cause, commit, committed_steps
from jaxtrain.checkpoint.trees import describe, nested
from jaxtrain.errors import CheckpointError, ExplainedError


def save_streamed(
    directory: os.PathLike | str, step: int, leaves: Iterator[tuple[str, np.ndarray]], metadata: Mapping[str, Any]
) -> None:
    """Save arrays as `step`, one at a time. One process calls it, alone.

    Nothing is left of it if an array cannot be had or written.

    Args:
      leaves: (name with slashes, array).

    Raises:
      CheckpointError: the folder holds a checkpoint, or cannot be written.
      ExplainedError: as `leaves` raises.
    """
    root = absolute(directory)
    if committed_steps(root):
        raise CheckpointError(f"{root} holds checkpoints already; give another --run_dir")
    if problem := probe(root, full_is_fatal=True):
        raise CheckpointError(f"cannot write into {root}: {problem}")
    remove_leftovers(root)
    path, described, sums = partial(root, step), {}, {}
    stored = {"format": FORMAT, "step": step, "metadata": as_json_gives_it_back(metadata)}
    try:
        for name, array in leaves:
            leaf = jax.device_put(array, jax.local_devices(backend="cpu")[0])
            described[name], sums[name] = describe(leaf), checksum_by_parts(array)
            with _uncompressed():
                ocp.partial.save(path, nested({tuple(name.split("/")): leaf}), custom_metadata=stored | {"leaves": described})
            leaf.delete()
        ocp.partial.finalize(path)
        commit(path, stored | {"leaves": described}, sums)
    except BaseException as error:
        remove_leftovers(root)
        if isinstance(error, ExplainedError) or not isinstance(error, Exception):
            raise
        raise CheckpointError(f"{root / str(step)} cannot be written: {cause(error)}") from error


def _uncompressed() -> ocp.Context:
    """Return a context that writes at the disk's speed: zstd on one core is seven times slower, for half of the size."""
    context = ocp.Context()
    context.array.saving.use_compression = False
    return context
