"""The cache of keys and values, and attention to it with the layers' own code.

Shape letters: B rows, L new tokens of a row, S entries of a row, K kv heads, G query heads that share one, N and M widths of a
key and a value; C and R as in `models/latent_attention.py`.

A cache of S entries is a ring: the token at position p of its row lies in entry p mod S. So a row's length says which positions
its entries hold, and a layer with a window of W tokens needs W - 1 + (most new tokens at a time) entries, however long the row.
With latent attention an entry is [c, rope(h W_kr)], of width C + R, in place of a key and a value for every head.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtrain.config import Config, LayerKind, ModelConfig
from jaxtrain.ops.attention_blockwise import MASKED
from jaxtrain.ops.attention_mask import Mask, Rule, visible_BLS
from jaxtrain.parallel.stacking import make_stacking
from jaxtrain.sharding import BATCH_AXES

PyTree = Any
ROW_AXES = (*BATCH_AXES, "context")
"""Mesh axes over which rows are sharded: a cache is not cut along its entries, so `context` holds rows too."""
NOWHERE = 2**30  # position of an entry that holds no token: later than any query


class Entries(NamedTuple):
    """The cache of layers of one kind: keys [..., B, K, S, N], values [..., B, K, S, M]; latent attention has no values."""

    keys: Any
    values: Any
    experts: Any = None
    """int16 [..., B, 1, length, experts of a token], each token's, where they are kept."""


class CacheSize(NamedTuple):
    """The size of a cache."""

    rows: int
    """Rows of all devices."""
    length: int
    """Most tokens of a row."""
    chunk: int
    """Most new tokens of a row at a time."""
    keeps_experts: bool = False
    """Whether it keeps each token's experts, for training to replay."""

    def entries(self, window: int) -> int:
        """Return S for layers with a window, 0 for none."""
        return min(self.length, window - 1 + self.chunk) if window else self.length


def _entries(model: ModelConfig, lead: tuple[int, ...], kind: LayerKind, room: CacheSize) -> Entries:
    """Return the shapes of a kind of layers."""
    shape, latent = (*lead, room.rows), model.latent_attention
    length = room.entries(model.window_of(kind))

    def array(heads: int, width: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*shape, heads, length, width), model.dtype)

    if latent:
        return Entries(array(1, latent.kv_rank + latent.rope_dim), None)
    return Entries(array(model.num_kv_heads, model.head_dim), array(model.num_kv_heads, model.head_dim))


def _experts(model: ModelConfig, lead: tuple[int, ...], room: CacheSize) -> jax.ShapeDtypeStruct | None:
    """Return the shape of a kind of layers' experts; a layer with a window keeps all tokens' too."""
    if not room.keeps_experts or model.moe is None:
        return None
    return jax.ShapeDtypeStruct((*lead, room.rows, 1, room.length, model.moe.experts_per_token), jnp.int16)


def cache_shapes(config: Config, room: CacheSize) -> PyTree:
    """Return the shapes of a cache: of the layers before the stack, and of each place in the pattern.

    Leaves are [layers, ...] in "first", and in "stack" [chunk, stage, group, ...].
    """
    model, stacking = config.model, make_stacking(config)
    chunks, stages, slots = stacking.shape
    lead = (chunks, stages, slots // stacking.period)
    first = _entries(model, (model.first_dense_layers,), model.kinds[0], room) if model.first_dense_layers else None
    experts = _experts(model, lead, room)
    stack = tuple(_entries(model, lead, kind, room)._replace(experts=experts) for kind in model.kinds)
    return {"first": first, "stack": stack}


def cache_specs(config: Config, keeps_experts: bool = False) -> PyTree:
    """Return the sharding of a cache over the mesh."""
    heads = None if config.model.latent_attention else "tensor"

    def spec(*lead: str | None) -> Entries:
        array = PartitionSpec(*lead, ROW_AXES, heads, None, None)
        return Entries(array, None if config.model.latent_attention else array)

    first, of_stack = spec(None) if config.model.first_dense_layers else None, spec(None, "pipe", None)
    if keeps_experts:
        of_stack = of_stack._replace(experts=PartitionSpec(None, "pipe", None, ROW_AXES))
    return {"first": first, "stack": (of_stack,) * len(config.model.kinds)}


class CachedAttention:
    """A layer's attention to its cache; stands in for an `AttentionPlan`.

    `attend` writes the new keys and values, and leaves the cache with them in `entries`.
    """

    absorbs = True

    def __init__(self, entries: Entries, layer: jax.Array | int, positions_BL: jax.Array, rule: Rule):
        """Prepare a layer's attention.

        Args:
          entries: the cache of layers [layers, ...] on this device.
          layer: its index there.
          positions_BL: of the new tokens, a run from the row's length on; -1 for padding, which ends a row.
          rule: window, scale and bound of the scores.
        """
        self.entries, self._layer, self._positions_BL, self._rule = entries, layer, positions_BL, rule

    def _with(self, array: jax.Array, new_BLKN: jax.Array) -> jax.Array:
        """Return an array of the cache with the new tokens written."""
        count = array.shape[-2]
        place_BL = jnp.where(self._positions_BL >= 0, self._positions_BL % count, count)  # padding is dropped
        if array.shape[0] == new_BLKN.shape[0] == new_BLKN.shape[1] == 1:
            # A scatter of one row becomes an update in place, around which XLA:CPU copies the cache four times.
            is_new_S = place_BL[0] == jnp.arange(count)
            return jnp.where(is_new_S[:, None], new_BLKN.swapaxes(1, 2).astype(array.dtype), array)
        rows_B1 = jnp.arange(new_BLKN.shape[0])[:, None]
        return array.at[self._layer, rows_B1, :, place_BL].set(new_BLKN.astype(array.dtype), mode="drop")

    def keep_experts(self, experts_BLK: jax.Array) -> None:
        """Write the new tokens' experts; new rows may lie along L."""
        new_BL1K = experts_BLK.reshape(*self._positions_BL.shape, 1, -1)
        self.entries = self.entries._replace(experts=self._with(self.entries.experts, new_BL1K))

    def _held_BS(self) -> jax.Array:
        """Return the position of each entry's token."""
        count = self.entries.keys.shape[-2]
        last_B1 = self._positions_BL.max(1, keepdims=True)
        held_BS = last_B1 - (last_B1 - jnp.arange(count)) % count
        return jnp.where(held_BS >= 0, held_BS, NOWHERE)

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array | None,
        *,
        sinks_H: jax.Array | None = None,
        head_dim: int = 0,
        value_dim: int = 0,
        **_: Any,
    ) -> jax.Array:
        """softmax(Q K^T / sqrt(N)) V over what the cache holds, the new tokens included; new rows may lie along L.

        Args:
          q, k, v: [B, L, heads, width], or [1, B L, ...]; without `v` the first `value_dim` numbers of a key are its value.
          head_dim: N of the scale, where it is not the keys' width.
        """
        shape = q.shape
        q, k = (x.reshape(*self._positions_BL.shape, *x.shape[2:]) for x in (q, k))
        keys = self._with(self.entries.keys, k)
        values = None if v is None else self._with(self.entries.values, v.reshape(*self._positions_BL.shape, *v.shape[2:]))
        self.entries = self.entries._replace(keys=keys, values=values)
        keys_BKSN = keys[self._layer]
        values_BKSM = keys_BKSN[..., :value_dim] if values is None else values[self._layer]
        rule = self._rule._replace(scale=self._rule.factor(head_dim or q.shape[-1]))
        seen = visible_BLS(rule, Mask(self._positions_BL, self._held_BS()), q.shape[1], keys_BKSN.shape[2])
        out = _attention(q, keys_BKSN, values_BKSM, seen, sinks_H, rule)
        return out.reshape(*shape[:-1], values_BKSM.shape[-1])


def _attention(
    q_BLHN: jax.Array, k_BKSN: jax.Array, v_BKSM: jax.Array, seen_BLS: Any, sinks_H: jax.Array | None, rule: Rule
) -> jax.Array:
    """`ops.attention.reference_attention` to keys of another length, as a cache holds them: [B, L, H, M]."""
    batch, length, heads, width = q_BLHN.shape
    kv_heads = k_BKSN.shape[1]
    q_BLKGN = q_BLHN.reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("BLKGN,BKSN->BKGLS", q_BLKGN, k_BKSN, preferred_element_type=jnp.float32)
    scores = jnp.where(seen_BLS[:, None, None], rule.capped(scores * rule.factor(width)), MASKED)
    if sinks_H is not None:
        sinks = jnp.broadcast_to(sinks_H.reshape(kv_heads, -1, 1, 1), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sinks], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k_BKSN.shape[2]].astype(v_BKSM.dtype)
    # As BLKGM it would be a product of transposed operands, which XLA's CPU backend (jax 0.10.2) cannot run in bfloat16.
    out = jnp.moveaxis(jnp.einsum("BKGLS,BKSM->BKGLM", weights, v_BKSM, preferred_element_type=jnp.float32), 3, 1)
    return out.reshape(batch, length, heads, -1).astype(q_BLHN.dtype)


def cache_bytes(config: Config, room: CacheSize) -> int:
    """Return the bytes of a cache over all devices."""
    leaves = jax.tree.leaves(cache_shapes(config, room))
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)
