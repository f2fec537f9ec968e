"""Which keys a query sees: the mask of a piece of queries and a piece of keys, said by numbers and not by an [L, S] array.

A piece is any run of a sequence. A whole sequence attending to itself is the one-piece case; ring attention has many.
"""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rule(NamedTuple):
    """What is known when the program is traced, and may leave out whole blocks."""

    causal: bool = True
    """Queries and keys are the same positions in the same, ascending order, and a query sees no later one. False: every key
    stands before every query."""
    window: int = 0
    """A query sees this many tokens, itself and those before it; 0 for all."""


class Mask(NamedTuple):
    """What is known when the program runs: int32 [B, L] of the queries and [B, S] of the keys. None restricts nothing."""

    q_index: jax.Array | None = None
    """Place in the sequence; None for 0, 1, 2 and so on. Needed where a window meets pieces that lie apart."""
    k_index: jax.Array | None = None
    q_segments: jax.Array | None = None
    """Number of the document; a query sees keys of its own number only."""
    k_segments: jax.Array | None = None


def own_segments(segments_BL: jax.Array | None) -> Mask:
    """Return the mask of a sequence that attends to itself."""
    return Mask(q_segments=segments_BL, k_segments=segments_BL)


def visible_BLS(rule: Rule, mask: Mask, queries: int, keys: int) -> jax.Array | None:
    """Bool [B or 1, L, S], true where the query sees the key; None where every query sees every key.

    causal: k_index <= q_index. window: q_index - k_index < window. segments: equal.
    """
    q_index = jnp.arange(queries)[None] if mask.q_index is None else mask.q_index
    k_index = jnp.arange(keys)[None] if mask.k_index is None else mask.k_index
    distance_BLS = q_index[:, :, None] - k_index[:, None, :]
    conditions = []
    if rule.causal:
        conditions.append(distance_BLS >= 0)
    if rule.window:
        conditions.append(distance_BLS < rule.window)
    if mask.q_segments is not None and mask.k_segments is not None:
        conditions.append(mask.q_segments[:, :, None] == mask.k_segments[:, None, :])
    return functools.reduce(operator.and_, conditions) if conditions else None
