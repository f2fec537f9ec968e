"""Causal grouped-query attention in memory that grows with the length, not with its square.

FlashAttention-2 (Dao 2023, arXiv:2307.08691) in plain JAX: the score matrix is cut into blocks, only those visible under the
causal mask, the window and documents are computed, each folded into a running (output, logsumexp) pair. The backward pass
keeps only that pair and recomputes the probabilities block by block. `block_attention`, `merge_blocks` and
`block_gradients` take any mask, without a scan; `blocks_forward` and `blocks_gradients` scan over the blocks of a
piece of queries and a piece of keys; ring attention uses them too.

Shape letters: B batch, L query length, S key length, H query heads, K kv heads, N width of a query or key head, M of a value
head; here also G = H // K query heads that share a kv head, n blocks in a piece, Q and S positions in a query block and a key
block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxtrain.ops.attention_mask import CAUSAL, Mask, Rule, own_segments, visible_BLS
from jaxtrain.sharding import vary, varying_axes

MASKED = -1e30  # a finite logit that acts as minus infinity: the difference of two is 0, not NaN
LARGEST_BLOCK = 512


def accumulator_dtype(dtype: Any) -> Any:
    """Return the dtype of logits, softmax and sums: float32, or float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)


# ---------------------------------------------------------------------------------------------------------------------
# One block


def _scores_BKGQS(q_BKGQN: jax.Array, k_BKSN: jax.Array, rule: Rule) -> jax.Array:
    dtype = accumulator_dtype(q_BKGQN.dtype)
    scores = jnp.einsum("BKGQN,BKSN->BKGQS", q_BKGQN, k_BKSN, preferred_element_type=dtype)
    return rule.capped(scores * rule.factor(q_BKGQN.shape[-1]))


def _masked(scores: jax.Array, visible: jax.Array | None) -> jax.Array:
    return scores if visible is None else jnp.where(visible, scores, MASKED)


def block_attention(
    q_BKGQN: jax.Array, k_BKSN: jax.Array, v_BKSM: jax.Array, visible: jax.Array | None, rule: Rule = CAUSAL
) -> tuple[jax.Array, jax.Array]:
    """Return the attention of a block of queries over a block of keys.

    o = softmax(Q K^T / sqrt(N)) V over the visible keys of this block, and the logsumexp of the logits, with which
    `merge_blocks` joins it with other blocks.

    Args:
      visible: bool, broadcastable to [B, K, G, Q, S]; None if every query sees every key.
      rule: for its scale and softcap.

    Returns:
      o_BKGQM and logsumexp_BKGQ, float32. A row that sees no key of this block has a logsumexp near -1e30, and a finite
      output that vanishes when merged with any row that sees one.
    """
    logits = _masked(_scores_BKGQS(q_BKGQN, k_BKSN, rule), visible)
    largest_BKGQ1 = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - largest_BKGQ1)
    total_BKGQ1 = weights.sum(axis=-1, keepdims=True)
    o = jnp.einsum("BKGQS,BKSM->BKGQM", weights.astype(v_BKSM.dtype), v_BKSM, preferred_element_type=logits.dtype)
    return o / total_BKGQ1, (largest_BKGQ1 + jnp.log(total_BKGQ1))[..., 0]


def merge_blocks(o_1: jax.Array, logsumexp_1: jax.Array, o_2: jax.Array, logsumexp_2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Join the attention over two disjoint sets of keys into the attention over both.

    logsumexp = log(e^l1 + e^l2), o = o1 e^(l1 - logsumexp) + o2 e^(l2 - logsumexp). Outputs are [..., M] where the logsumexps
    are [...]. Associative, so blocks may come in any order.
    """
    logsumexp = jnp.logaddexp(logsumexp_1, logsumexp_2)
    share_1, share_2 = jnp.exp(logsumexp_1 - logsumexp), jnp.exp(logsumexp_2 - logsumexp)
    return o_1 * share_1[..., None] + o_2 * share_2[..., None], logsumexp


def block_gradients(
    q_BKGQN: jax.Array,
    k_BKSN: jax.Array,
    v_BKSM: jax.Array,
    do_BKGQM: jax.Array,
    logsumexp_BKGQ: jax.Array,
    delta_BKGQ: jax.Array,
    visible: jax.Array | None,
    rule: Rule = CAUSAL,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the contribution of one block of queries and one block of keys to the gradients (arXiv:2307.08691, algorithm 2).

    P = exp(Q K^T / sqrt(N) - logsumexp), dV = P^T dO, dS = P * (dO V^T - delta), dQ = dS K / sqrt(N),
    dK = dS^T Q / sqrt(N). With a bound c on the scores s dS has the factor 1 - (s / c)^2.

    Args:
      logsumexp_BKGQ: over all keys that the query sees, in this block or not.
      delta_BKGQ: the sum over M of dO * O, with O the whole output.

    Returns:
      dq_BKGQN, dk_BKSN, dv_BKSM, float32.
    """
    scores = _scores_BKGQS(q_BKGQN, k_BKSN, rule)
    logits = _masked(scores, visible)
    sum_in = functools.partial(jnp.einsum, preferred_element_type=logits.dtype)
    weights = jnp.exp(logits - logsumexp_BKGQ[..., None])
    dv = _over_queries(weights.astype(do_BKGQM.dtype), do_BKGQM, logits.dtype)
    d_weights = sum_in("BKGQM,BKSM->BKGQS", do_BKGQM, v_BKSM)
    d_logits = weights * (d_weights - delta_BKGQ[..., None]) * rule.factor(q_BKGQN.shape[-1])
    if rule.softcap:
        d_logits = d_logits * (1 - jnp.square(scores / rule.softcap))
    d_logits = d_logits.astype(q_BKGQN.dtype)
    dq = sum_in("BKGQS,BKSN->BKGQN", d_logits, k_BKSN)
    dk = _over_queries(d_logits, q_BKGQN, logits.dtype)
    return dq, dk, dv


def _over_queries(scores_BKGQS: jax.Array, x_BKGQN: jax.Array, dtype: Any) -> jax.Array:
    """Return the sum over G and Q of scores times x, [B, K, S, N].

    A CPU transposes the first operand of such a product, so the narrow one comes first: with 4 query heads to a kv head the
    gradients take 0.66 of the time. Of bfloat16 summed in float32 XLA:CPU has no product in that order.
    """
    if scores_BKGQS.dtype != dtype:
        return jnp.einsum("BKGQS,BKGQN->BKSN", scores_BKGQS, x_BKGQN, preferred_element_type=dtype)
    return jnp.einsum("BKGQN,BKGQS->BKNS", x_BKGQN, scores_BKGQS).swapaxes(-1, -2)


# ---------------------------------------------------------------------------------------------------------------------
# All blocks of a piece of queries and a piece of keys


def block_pairs(num_blocks: int, block: int, rule: Rule) -> np.ndarray:
    """Return the (query block, key block) pairs in which the rule leaves a visible key, int32 [pairs, 2].

    Ordered by query block, so that it stays in cache while its keys pass. For a causal rule that is the lower triangle, n (n +
    1) / 2 pairs, less those that lie wholly before the window.
    """

    def within(i: int, j: int) -> bool:
        nearest = (i - j) * block - (block - 1)
        return not rule.causal or (j <= i and (rule.window == 0 or nearest < rule.window))

    return np.array([(i, j) for i in range(num_blocks) for j in range(num_blocks) if within(i, j)], np.int32)


def pick_block_size(length: int) -> int:
    """Return the block size for a sequence: at most 512, and at least four blocks if the length allows it.

    n blocks compute (n + 1) / 2n of the full square of scores, so four blocks cost 62%, and eight 56%.
    """
    if length <= 128:
        return length
    return min(LARGEST_BLOCK, max(128, 2 ** math.ceil(math.log2(length / 4))))


def _to_blocks(x: jax.Array, block: int, groups: int | None = None) -> jax.Array:
    """[B, L, heads, N] -> [n, B, K, (G,) block, N]; [B, L] -> [n, B, block]. The last block is padded with zeros."""
    batch, length = x.shape[:2]
    num_blocks = math.ceil(length / block)
    x = jnp.pad(x, [(0, 0), (0, num_blocks * block - length)] + [(0, 0)] * (x.ndim - 2))
    if x.ndim == 2:
        return x.reshape(batch, num_blocks, block).transpose(1, 0, 2)
    heads, head_dim = x.shape[2:]
    if groups is None:
        return x.reshape(batch, num_blocks, block, heads, head_dim).transpose(1, 0, 3, 2, 4)
    return x.reshape(batch, num_blocks, block, heads // groups, groups, head_dim).transpose(1, 0, 3, 4, 2, 5)


def _from_blocks(x: jax.Array, length: int) -> jax.Array:
    """Return the inverse of `_to_blocks` for queries (6 dims) and for keys and values (5 dims)."""
    if x.ndim == 6:
        n, batch, kv_heads, groups, block, head_dim = x.shape
        x = x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, n * block, kv_heads * groups, head_dim)
    else:
        n, batch, kv_heads, block, head_dim = x.shape
        x = x.transpose(1, 0, 3, 2, 4).reshape(batch, n * block, kv_heads, head_dim)
    return x[:, :length]


def _at(x: jax.Array, i: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def _filled(shape: tuple[int, ...], value: float, like: jax.Array) -> jax.Array:
    """Return an initial scan carry, of the accumulator's dtype, varying over the mesh axes that `like` varies over."""
    return vary(jnp.full(shape, value, accumulator_dtype(like.dtype)), tuple(sorted(varying_axes(like))))


class _Sight(NamedTuple):
    """`visible` of any two blocks, and whether they have a document in common."""

    rule: Rule
    mask_nBQ: Mask
    length: int
    block: int

    def visible(self, i: jax.Array, j: jax.Array) -> jax.Array | None:
        """Return which keys of block j the queries of block i see, [B or 1, 1, 1, Q, S]; None for all."""
        parts = (None if part is None else _at(part, at) for part, at in zip(self.mask_nBQ, (i, j, i, j), strict=True))
        seen_BQS = visible_BLS(self.rule, Mask(*parts), self.block, self.block)
        if self.length % self.block:  # the last block is padded
            exists = (j * self.block + jnp.arange(self.block) < self.length)[None, None]
            seen_BQS = exists if seen_BQS is None else seen_BQS & exists
        return None if seen_BQS is None else seen_BQS[:, None, None]

    def compute(self, i: jax.Array, j: jax.Array, block_pair: Callable[[jax.Array | None], Any], unchanged: Any) -> Any:
        """Return block_pair(visible); or `unchanged`, of the same shapes, if in no row a document is in both blocks.

        Compared are ranges of numbers, so that any numbers are right, and ascending ones, padding last, leave out most.
        """
        q, k = self.mask_nBQ.q_segments, self.mask_nBQ.k_segments
        if q is None or k is None:
            return block_pair(self.visible(i, j))
        (q_least, q_most), (k_least, k_most) = _range_B(_at(q, i)), _range_B(_at(k, j))
        meet = jnp.any((q_least <= k_most) & (k_least <= q_most))
        return lax.cond(meet, lambda: block_pair(self.visible(i, j)), lambda: unchanged)


def _range_B(segments_BQ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the least and the greatest document number of a block, padding (0) being the greatest of all."""
    numbers = jnp.where(segments_BQ == 0, jnp.iinfo(segments_BQ.dtype).max, segments_BQ)
    return numbers.min(axis=1), numbers.max(axis=1)


def _sight(rule: Rule, mask: Mask, length: int, block: int) -> _Sight:
    if (rule.causal or rule.window) and mask.q_index is None:
        places = jnp.arange(length, dtype=jnp.int32)[None]
        mask = mask._replace(q_index=places, k_index=places)
    return _Sight(rule, Mask(*(None if part is None else _to_blocks(part, block) for part in mask)), length, block)


def alike(*trees: Any) -> Any:
    """Return the trees typed as varying over all mesh axes that any leaf varies over."""
    return vary(trees, tuple(sorted(frozenset().union(*map(varying_axes, jax.tree.leaves(trees))))))


def blocks_forward(
    q_BLHN: jax.Array, k_BLKN: jax.Array, v_BLKM: jax.Array, mask: Mask, rule: Rule, block: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return the attention of a piece of queries over an equally long piece of keys, block by block.

    Returns:
      o_BLHM and logsumexp_BLH, float32, as `block_attention`.
    """
    q_BLHN, k_BLKN, v_BLKM, mask = alike(q_BLHN, k_BLKN, v_BLKM, mask)
    length, groups = q_BLHN.shape[1], q_BLHN.shape[2] // k_BLKN.shape[2]
    block = min(block or pick_block_size(length), length)
    q, k, v = _to_blocks(q_BLHN, block, groups), _to_blocks(k_BLKN, block), _to_blocks(v_BLKM, block)
    sight = _sight(rule, mask, length, block)

    def step(carry: tuple[jax.Array, jax.Array], pair: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        (o, logsumexp), (i, j) = carry, pair
        so_far = _at(o, i), _at(logsumexp, i)

        def merged(visible: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            return merge_blocks(*so_far, *block_attention(_at(q, i), _at(k, j), _at(v, j), visible, rule))

        o_i, logsumexp_i = sight.compute(i, j, merged, so_far)
        update = lax.dynamic_update_index_in_dim
        return (update(o, o_i, i, 0), update(logsumexp, logsumexp_i, i, 0)), None

    empty = _filled((*q.shape[:-1], v.shape[-1]), 0, q), _filled(q.shape[:-1], MASKED, q)
    (o, logsumexp), _ = lax.scan(step, empty, jnp.asarray(block_pairs(q.shape[0], block, rule)))
    return _from_blocks(o, length), _from_blocks(logsumexp[..., None], length)[..., 0]


def blocks_gradients(
    q_BLHN: jax.Array,
    k_BLKN: jax.Array,
    v_BLKM: jax.Array,
    o_BLHM: jax.Array,
    logsumexp_BLH: jax.Array,
    do_BLHM: jax.Array,
    mask: Mask,
    rule: Rule,
    block: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the contribution of a piece of queries and an equally long piece of keys to the gradients, by `block_gradients`.

    Args:
      o_BLHM, logsumexp_BLH: over all keys that the query sees, in this piece or not.

    Returns:
      dq_BLHN, dk_BLKN, dv_BLKM, float32.
    """
    arrays = alike(q_BLHN, k_BLKN, v_BLKM, o_BLHM, logsumexp_BLH, do_BLHM, mask)
    q_BLHN, k_BLKN, v_BLKM, o_BLHM, logsumexp_BLH, do_BLHM, mask = arrays
    length, groups = q_BLHN.shape[1], q_BLHN.shape[2] // k_BLKN.shape[2]
    block = min(block or pick_block_size(length), length)
    q, k, v = _to_blocks(q_BLHN, block, groups), _to_blocks(k_BLKN, block), _to_blocks(v_BLKM, block)
    do, o = _to_blocks(do_BLHM, block, groups), _to_blocks(o_BLHM, block, groups)
    logsumexp = _to_blocks(logsumexp_BLH[..., None], block, groups)[..., 0]
    delta = jnp.sum(do.astype(logsumexp.dtype) * o.astype(logsumexp.dtype), axis=-1)
    sight = _sight(rule, mask, length, block)

    def step(carry: tuple[jax.Array, ...], pair: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        (dq, dk, dv), (i, j) = carry, pair
        so_far = _at(dq, i), _at(dk, j), _at(dv, j)

        def added(visible: jax.Array | None) -> tuple[jax.Array, ...]:
            arrays = _at(q, i), _at(k, j), _at(v, j), _at(do, i), _at(logsumexp, i), _at(delta, i)
            return tuple(map(jnp.add, so_far, block_gradients(*arrays, visible, rule)))

        sums = zip((dq, dk, dv), sight.compute(i, j, added, so_far), (i, j, j), strict=True)
        return tuple(lax.dynamic_update_index_in_dim(x, x_at, at, 0) for x, x_at, at in sums), None

    empty = _filled(q.shape, 0, q), _filled(k.shape, 0, q), _filled(v.shape, 0, q)
    gradients, _ = lax.scan(step, empty, jnp.asarray(block_pairs(q.shape[0], block, rule)))
    dq, dk, dv = (_from_blocks(g, length) for g in gradients)
    return dq, dk, dv


# ---------------------------------------------------------------------------------------------------------------------
# A whole sequence, differentiable


def no_second_derivative(*_: Any) -> tuple[Any, Any]:
    """Raise NotImplementedError, in place of the derivative of a derivative rule."""
    raise NotImplementedError("blockwise and context attention have no second derivative; use the reference backend")


def opaque(function: Any, static: tuple[int, ...]) -> Any:
    """Make `function` one call to a remat policy: one that saves matmuls would otherwise save every score block, O(L^2)."""
    call = jax.custom_vjp(function, nondiff_argnums=static)
    call.defvjp(no_second_derivative, no_second_derivative)
    return call


def name_residuals(name: str | None, o: jax.Array, logsumexp: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Name the residuals of the backward pass, so that a remat policy may keep them."""
    return (o, logsumexp) if name is None else (checkpoint_name(o, name), checkpoint_name(logsumexp, name))


def with_sinks(o_BLHM: jax.Array, logsumexp_BLH: jax.Array, sinks_H: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return output and logsumexp with a further score per head in the softmax, whose value is zero.

    It is `merge_blocks` with a block of logsumexp `sinks_H` and output 0 (gpt-oss, arXiv:2508.10925, section 2.2).
    """
    if sinks_H is None:
        return o_BLHM, logsumexp_BLH
    total_BLH = jnp.logaddexp(logsumexp_BLH, sinks_H.astype(logsumexp_BLH.dtype))
    return o_BLHM * jnp.exp(logsumexp_BLH - total_BLH)[..., None], total_BLH


def sinks_gradient(
    sinks_H: jax.Array | None, o_BLHM: jax.Array, logsumexp_BLH: jax.Array, do_BLHM: jax.Array
) -> jax.Array | None:
    """d sink = -sum_{B, L} exp(sink - logsumexp) sum_M dO * O, the softmax's derivative for a key whose value is zero."""
    if sinks_H is None:
        return None
    dtype = logsumexp_BLH.dtype
    delta_BLH = jnp.sum(do_BLHM.astype(dtype) * o_BLHM.astype(dtype), axis=-1)
    return -jnp.sum(jnp.exp(sinks_H.astype(dtype) - logsumexp_BLH) * delta_BLH, axis=(0, 1)).astype(sinks_H.dtype)


Optional = jax.Array | None


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: Optional, sinks: Optional, rule: Rule, block: int | None
) -> tuple[jax.Array, jax.Array]:
    o, logsumexp = with_sinks(*blocks_forward(q, k, v, own_segments(segments), rule, block), sinks)
    return o.astype(q.dtype), logsumexp


_opaque_forward = opaque(_forward, (5, 6))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _attention(arrays: tuple[Any, ...], rule: Rule, block: int | None, name: str | None) -> jax.Array:
    q, k, v, segments, sinks = arrays
    return _forward(q, k, v, segments, sinks, rule, block)[0]


def _attention_forward(
    arrays: tuple[Any, ...], rule: Rule, block: int | None, name: str | None
) -> tuple[jax.Array, tuple[Any, ...]]:
    o, logsumexp = _opaque_forward(*arrays, rule, block)
    o, logsumexp = name_residuals(name, o, logsumexp)
    return o, (*arrays, o, logsumexp)


def _attention_backward(
    rule: Rule, block: int | None, name: str | None, residuals: tuple[Any, ...], do_BLHM: jax.Array
) -> tuple[Any, ...]:
    del name
    q, k, v, segments, sinks, o, logsumexp = residuals
    dq, dk, dv = blocks_gradients(q, k, v, o, logsumexp, do_BLHM, own_segments(segments), rule, block)
    d_sinks = sinks_gradient(sinks, o, logsumexp, do_BLHM)
    return ((dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, d_sinks),)


_attention.defvjp(_attention_forward, _attention_backward)


def blockwise_attention(
    q_BLHN: jax.Array,
    k_BLKN: jax.Array,
    v_BLKM: jax.Array,
    segments_BL: jax.Array | None = None,
    sinks_H: jax.Array | None = None,
    *,
    rule: Rule = CAUSAL,
    residual_name: str | None = None,
    block_size: int | None = None,
) -> jax.Array:
    """softmax(Q K^T / sqrt(N)) V, causal, within the window and within segments, with O(L) memory forward and backward.

    The backward pass needs the output and the logsumexp. Where a remat policy saves `residual_name` both are kept and
    nothing of the forward pass is computed again; otherwise remat runs this forward pass a second time.

    Args:
      segments_BL: int32; a token sees only tokens of its own number. None for one segment.
      sinks_H: see `with_sinks`.
      rule: window, scale and bound of the scores. Blocks before the window are not computed.
      residual_name: name (`jax.ad_checkpoint.checkpoint_name`) put on the output and on the logsumexp. Naming the output
        outside of this function instead would save it, but not the logsumexp, and so save no work.
      block_size: positions in a block; by default `pick_block_size` of the length.

    Returns:
      [B, L, H, M] in the dtype of the queries. Logits, softmax and all sums are float32.
    """
    return _attention(alike(q_BLHN, k_BLKN, v_BLKM, segments_BL, sinks_H), rule, block_size, residual_name)
