"""Trees of arrays as buffers: read and write a slot of the leading dim, and add to it, inside the manual region."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxtrain.sharding import vary

PyTree = Any


def slot(tree: PyTree, i: jax.Array | int) -> PyTree:
    """Return tree[i], leaf by leaf; a leading dim of 1 needs no lookup."""
    return jax.tree.map(lambda a: a[0] if a.shape[0] == 1 else lax.dynamic_index_in_dim(a, i, keepdims=False), tree)


def write(tree: PyTree, values: PyTree, i: jax.Array) -> PyTree:
    """Return the tree with tree[i] = values."""
    return jax.tree.map(lambda a, v: lax.dynamic_update_index_in_dim(a, v, i, 0), tree, values)


def add(tree: PyTree, values: PyTree) -> PyTree:
    """Return tree + values in the dtypes of the tree."""
    return jax.tree.map(lambda a, v: a + v.astype(a.dtype), tree, values)


def add_at(tree: PyTree, values: PyTree, i: jax.Array) -> PyTree:
    """tree[i] += values, leaf by leaf."""

    def leaf(a: jax.Array, v: jax.Array) -> jax.Array:
        if a.shape[0] == 1:
            return a + v[None].astype(a.dtype)
        return lax.dynamic_update_index_in_dim(a, lax.dynamic_index_in_dim(a, i, keepdims=False) + v.astype(a.dtype), i, 0)

    return jax.tree.map(leaf, tree, values)


def add_gradients(tree: PyTree, leaves: list[jax.Array | None], i: jax.Array) -> PyTree:
    """tree[i] += leaves, where there is one."""
    own, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [a if v is None else add_at(a, v, i) for a, v in zip(own, leaves, strict=True)])


def zeros(tree: PyTree, dtype: Any = None, slots: int | None = None) -> PyTree:
    """Return zeros like the leaves, with a leading dim of `slots` if given, typed as varying over all mesh axes."""
    lead = () if slots is None else (slots,)
    return jax.tree.map(lambda a: vary(jnp.zeros(lead + a.shape, dtype or a.dtype)), tree)
