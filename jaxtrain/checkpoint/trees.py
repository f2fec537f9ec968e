"""State trees by their names on disk: nested dicts of arrays under key paths, without optax's class names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from jaxtrain.errors import CheckpointError

SHOWN = 12  # differing leaves that one error lists


def leaves_by_path(tree: Any) -> tuple[dict[tuple[str, ...], Any], Any]:
    """Return ({key path as strings: leaf} in the tree's order, treedef)."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves: dict[tuple[str, ...], Any] = {}
    for path, leaf in flat:
        name = tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)
        # Orbax joins keys with "." on disk, so {"a.b": x, "a": {"b": y}} would silently hold one value for both
        if name in leaves or not all(key and "." not in key and "/" not in key for key in name):
            raise ValueError(f"leaf {jax.tree_util.keystr(path)}: keys must be distinct, not empty, without '.' and '/'")
        leaves[name] = leaf
    return leaves, treedef


def nested(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Return nested dicts: the inverse of `leaves_by_path`."""
    return unflatten_dict(leaves)


def check_same_leaves(path: os.PathLike, saved: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Compare leaves in the form of `describe`.

    Raises:
      CheckpointError: they differ; lists each with the saved and the expected value.
    """
    problems = []
    for name in [*expected, *(extra for extra in saved if extra not in expected)]:
        if name not in saved:
            problems.append(f"{name} is not in the checkpoint; this run has {expected[name]}")
        elif name not in expected:
            problems.append(f"{name} is {saved[name]} in the checkpoint; this run has no such array")
        elif saved[name] != expected[name]:
            problems.append(f"{name} is {saved[name]} in the checkpoint, {expected[name]} in this run")
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        lines = "\n".join(f"  - {line}" for line in problems[:SHOWN] + more)
        raise CheckpointError(
            f"checkpoint {path} does not fit this run:\n{lines}\n"
            "Use the model and optimizer that it was saved with, or another --run_dir."
        )


def describe(leaf: Any) -> str:
    """Return the dtype and shape: "float32[16,8]"."""
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
