"""Muon: the momentum of each hidden matrix, orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from jaxtrain.sharding import Dims, is_dims, spec
from jaxtrain.train.leaf_axes import leaf_axes
from jaxtrain.train.muon_shares import MUON_ITERATIONS, Share, shares

PyTree = Any
MUON_RMS = 0.2  # the root mean square of an AdamW update: arXiv:2502.16982, section 2.2
MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class MuonState(NamedTuple):
    """Momentum of the hidden matrices."""

    step: jax.Array
    """Steps taken, int32 scalar."""
    momentum: PyTree
    """Shaped like the parameters."""


def orthogonalise(x: jax.Array) -> jax.Array:
    """Bring the singular values of each matrix [..., rows, columns] near 1: U S V^T -> about U V^T.

    X = X / |X|, then five times X = a X + (b A + c A^2) X with A = X X^T (Newton-Schulz). 0 stays 0. Products are of x's dtype;
    the norm is float32.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    norm = jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(-2, -1), keepdims=True))
    x = (x / (norm + 1e-8)).astype(x.dtype)
    a, b, c = MUON_COEFFICIENTS

    def iterate(_: int, x: jax.Array) -> jax.Array:
        gram = x @ x.mT
        return a * x + (b * gram + c * gram @ gram) @ x

    x = lax.fori_loop(0, MUON_ITERATIONS, iterate, x)
    return x.mT if tall else x


def _orthogonalise_all(x: jax.Array, at_once: int) -> jax.Array:
    """Orthogonalise matrices [n, rows, columns]."""
    return orthogonalise(x) if len(x) <= at_once else lax.map(orthogonalise, x, batch_size=at_once)


# ---------------------------------------------------------------------------------------------------------------------
# On a mesh: inside a manual region


def _orthogonalise_share(x: jax.Array, share: Share) -> jax.Array:
    """Orthogonalise matrices of which this device holds a part of each: bring its share here, and take the results back.

    Args:
      x: this device's part of each, [matrices, rows / row axes, columns / column axes]; copies are alike.
    """
    count, (rows, columns) = share.each, x.shape[1:]
    own = count * share.cut
    x = jnp.pad(x, ((0, own * share.copies - len(x)), (0, 0), (0, 0)))
    if share.copies > 1:
        x = lax.dynamic_slice_in_dim(x, lax.axis_index(share.copy_axes) * own, own)
    if share.cut == 1:
        x = _orthogonalise_all(x, share.at_once)
    else:
        axes = share.row_axes + share.column_axes
        down = share.rows // rows
        parts = lax.all_to_all(x.reshape(share.cut, count, rows, columns), axes, 0, 0)
        parts = parts.reshape(down, -1, count, rows, columns).transpose(2, 0, 3, 1, 4)
        whole = _orthogonalise_all(parts.reshape(count, share.rows, share.columns), share.at_once)
        parts = whole.reshape(count, down, rows, -1, columns).transpose(1, 3, 0, 2, 4)
        x = lax.all_to_all(parts.reshape(share.cut, count, rows, columns), axes, 0, 0).reshape(own, rows, columns)
    if share.copies > 1:
        x = lax.all_gather(x, share.copy_axes, tiled=True)
    return x[: share.matrices]


def _orthogonalise_leaves(leaves: Sequence[jax.Array], dims: Sequence[Dims], plan: list[Share], dtype: str) -> list[jax.Array]:
    """Orthogonalise the matrices of this device's shards of some leaves."""
    results = dict[int, jax.Array]()
    for share in plan:
        stacks = []
        for number, is_transposed in zip(share.leaves, share.transposed, strict=True):
            axes, shape = leaf_axes(dims[number]), leaves[number].shape
            rows, columns = (math.prod(shape[i] for i in side) for side in (axes.inputs, axes.outputs))
            stack = leaves[number].astype(dtype).reshape(-1, rows, columns)
            stacks.append(stack.mT if is_transposed else stack)
        if share.cut * share.copies == 1:
            stacks = [_orthogonalise_all(stack, share.at_once) for stack in stacks]
        else:
            lengths = [len(stack) for stack in stacks]
            joined = _orthogonalise_share(jnp.concatenate(stacks), share)
            stacks = jnp.split(joined, [sum(lengths[:i]) for i in range(1, len(lengths))])
        for number, is_transposed, stack in zip(share.leaves, share.transposed, stacks, strict=True):
            results[number] = (stack.mT if is_transposed else stack).reshape(leaves[number].shape)
    return [results[number] for number in range(len(leaves))]


def orthogonalise_on(mesh: Mesh | None, leaves: Sequence[jax.Array], dims: Sequence[Dims], dtype: str) -> list[jax.Array]:
    """Orthogonalise every matrix of some leaves, each whole on one device of the mesh.

    A matrix is cast to `dtype` before it is sent, and comes back in it. So each takes the same way on every mesh, whatever
    other matrices a device has: in bfloat16 too, where a sum in another order would round otherwise.

    Args:
      mesh: whose axes shard the leaves by `sharding.RULES`; None for one device.
      leaves: whole arrays, of hidden matrices.
      dims: logical dims of each.
      dtype: of the products.
    """
    sizes = dict(mesh.shape) if mesh else {}
    plan = shares([(own, leaf.shape) for own, leaf in zip(dims, leaves, strict=True)], sizes)

    def region(*leaves: jax.Array) -> list[jax.Array]:
        return _orthogonalise_leaves(leaves, dims, plan, dtype)

    if mesh is None or mesh.size == 1:
        return region(*leaves)
    specs = [spec(own) for own in dims]
    return jax.shard_map(region, mesh=mesh, in_specs=tuple(specs), out_specs=specs, check_vma=False)(*leaves)


# ---------------------------------------------------------------------------------------------------------------------
# The optax transformation


def scale_by_muon(dims: PyTree, beta: float, dtype: str) -> optax.GradientTransformationExtraArgs:
    """Return Muon's direction per layer's matrix: 0.2 sqrt(max(inputs, outputs)) * orthogonalise(Nesterov momentum).

    The same numbers as `optax.contrib.muon(consistent_rms=0.2)`: momentum M = beta M + (1 - beta) G, and
    beta M / (1 - beta^(t+1)) + (1 - beta) G / (1 - beta^t) is orthogonalised. The factor (Liu et al. 2025, arXiv:2502.16982)
    gives updates the size of AdamW's, so that one learning rate serves both.

    `update(..., mesh=mesh)` shares the matrices out among the devices of the mesh that shards them (`muon_shares`).

    Args:
      dims: logical dims of every leaf of the tree that this is applied to.
      dtype: of the matrices while they travel and are orthogonalised.
    """

    def init(params: PyTree) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(
        gradients: PyTree, state: MuonState, params: PyTree = None, *, mesh: Mesh | None = None, **_: Any
    ) -> tuple[PyTree, MuonState]:
        del params
        step = state.step + 1
        t = step.astype(jnp.float32)
        momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, state.momentum, gradients)

        def nesterov(m: jax.Array, g: jax.Array) -> jax.Array:
            return beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)

        def scaled(x: jax.Array, own: Dims) -> jax.Array:
            axes = leaf_axes(own)
            longer = max(math.prod(x.shape[i] for i in side) for side in (axes.inputs, axes.outputs))
            return MUON_RMS * math.sqrt(longer) * x.astype(jnp.float32)

        leaves, structure = jax.tree.flatten(jax.tree.map(nesterov, momentum, gradients))
        every = jax.tree.leaves(dims, is_leaf=is_dims)
        directions = map(scaled, orthogonalise_on(mesh, leaves, every, dtype), every)
        return structure.unflatten(list(directions)), MuonState(step, momentum)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]
