"""Which weights are multiplied in float8 (`model.matmul_dtype`), and their numbers at the start of a step."""

from __future__ import annotations

from typing import Any

import jax

from jaxtrain.models.decoder import STACKED
from jaxtrain.models.quantised_weights import is_matrix
from jaxtrain.ops.float8 import weights_in_float8
from jaxtrain.sharding import Dims, is_dims

PyTree = Any


def is_in_float8(dims: Dims) -> bool:
    """Return whether a parameter of a layer is multiplied in float8: a matrix of attention, MLP or experts, no router."""
    return is_matrix(dims)


def in_float8(params: PyTree, compute: PyTree, dims: PyTree) -> PyTree:
    """Return `compute` with the layers' matrices in float8, from the parameters themselves; not embedding and head.

    One `Float8` a weight, with a scale for each layer; of experts one scale for all of a layer.
    """
    structure = jax.tree.structure(dims, is_leaf=is_dims)
    flat, held, leaves = structure.flatten_up_to(dims), structure.flatten_up_to(params), structure.flatten_up_to(compute)
    chosen = [i for i, own in enumerate(flat) if own[0] in STACKED and is_in_float8(own)]
    lead = [sum(name in STACKED for name in flat[i]) for i in chosen]
    made = weights_in_float8([held[i] for i in chosen], lead, ("fsdp", "expert", "tensor"))
    for i, weight in zip(chosen, made, strict=True):
        leaves[i] = weight
    return structure.unflatten(leaves)
