"""The mask and the scores of a piece of queries and a piece of keys, given by numbers and not by an [L, S] array.

A piece is any run of a sequence. A whole sequence attending to itself is the one-piece case; ring attention has many.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rule(NamedTuple):
    """The facts of scores and mask that are known at trace time; the mask may exclude whole blocks."""

    causal: bool = True
    """Queries and keys are the same positions in ascending order, and a query sees no later one. False: every key precedes
    every query."""
    window: int = 0
    """A query sees this many tokens, itself and those before it; 0 for all."""
    scale: float = 0.0
    """Factor on Q K^T; 0 for 1 / sqrt(N)."""
    softcap: float = 0.0
    """Bound c of the scores s, c tanh(s / c) (Gemma 2, arXiv:2408.00118, section 2); 0 for none."""

    def factor(self, head_dim: int) -> float:
        """Return the factor on Q K^T."""
        return self.scale or 1 / math.sqrt(head_dim)

    def capped(self, scores: jax.Array) -> jax.Array:
        """Return the scores within the bound."""
        return self.softcap * jnp.tanh(scores / self.softcap) if self.softcap else scores


CAUSAL = Rule()


class Mask(NamedTuple):
    """The part known at run time: int32 [B, L] of the queries and [B, S] of the keys. None restricts nothing."""

    q_index: jax.Array | None = None
    """Position in the sequence; None for 0, 1, 2, ... Needed for a window over pieces that lie apart."""
    k_index: jax.Array | None = None
    q_segments: jax.Array | None = None
    """Document number; a query sees only keys of its own number."""
    k_segments: jax.Array | None = None


def own_segments(segments_BL: jax.Array | None) -> Mask:
    """Return the mask of a sequence that attends to itself."""
    return Mask(q_segments=segments_BL, k_segments=segments_BL)


def visible_BLS(rule: Rule, mask: Mask, queries: int, keys: int) -> jax.Array | None:
    """Return bool [B or 1, L, S], true where the query sees the key; None if every query sees every key.

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
