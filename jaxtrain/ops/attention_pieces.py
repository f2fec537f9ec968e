"""Attention of one piece of queries over one piece of keys, and its gradients, by any backend, for context attention.

Both pieces have the same length L. The output and the logsumexp of a piece are merged with those of others (`merge_blocks`);
the gradients of a piece need the output and the logsumexp over all pieces.
"""

from __future__ import annotations

import jax

from jaxtrain.ops.attention_blockwise import accumulator_dtype, blocks_forward, blocks_gradients
from jaxtrain.ops.attention_cudnn import cudnn_piece, cudnn_piece_gradients
from jaxtrain.ops.attention_mask import Mask, Rule
from jaxtrain.ops.attention_packed import packed_meeting, packed_meeting_gradients, packed_self, packed_self_gradients


def _block(backend: str, length: int) -> int | None:
    """Return the block size: one block for reference, which holds all L^2 scores; else None for the default."""
    return length if backend == "reference" else None


def _by_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, rule: Rule, backend: str) -> tuple[jax.Array, jax.Array]:
    if backend != "cudnn" or mask.q_segments is None:
        return cudnn_piece(q, k, v, mask, rule)
    return packed_self(q, k, v, mask.q_segments, rule) if rule.causal else packed_meeting(q, k, v, mask, rule)


def _gradients_by_cudnn(arrays: tuple[jax.Array, ...], mask: Mask, rule: Rule, backend: str) -> tuple[jax.Array, ...]:
    if backend != "cudnn" or mask.q_segments is None:
        return cudnn_piece_gradients(*arrays, mask=mask, rule=rule)
    if rule.causal:
        return packed_self_gradients(*arrays, segments_BL=mask.q_segments, rule=rule)
    return packed_meeting_gradients(*arrays, mask=mask, rule=rule)


def piece_attention(
    q_BLHN: jax.Array, k_BLKN: jax.Array, v_BLKM: jax.Array, mask: Mask, rule: Rule, backend: str
) -> tuple[jax.Array, jax.Array]:
    """softmax(Q K^T / sqrt(N)) V over the keys of this piece that the mask and the rule leave visible.

    Args:
      backend: reference, blockwise, cudnn or cudnn_dense.

    Returns:
      o_BLHM and logsumexp_BLH, float32. A row that sees no key has a logsumexp so low that it vanishes when merged.
    """
    if backend.startswith("cudnn"):
        o, logsumexp = _by_cudnn(q_BLHN, k_BLKN, v_BLKM, mask, rule, backend)
        return o.astype(accumulator_dtype(o.dtype)), logsumexp
    return blocks_forward(q_BLHN, k_BLKN, v_BLKM, mask, rule, _block(backend, q_BLHN.shape[1]))


def piece_gradients(
    q_BLHN: jax.Array,
    k_BLKN: jax.Array,
    v_BLKM: jax.Array,
    o_BLHM: jax.Array,
    logsumexp_BLH: jax.Array,
    do_BLHM: jax.Array,
    mask: Mask,
    rule: Rule,
    backend: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the contribution of this piece to dQ, dK and dV, float32 (arXiv:2307.08691, algorithm 2).

    Args:
      o_BLHM, logsumexp_BLH: over all keys that the query sees, in this piece or not.
      do_BLHM: gradient of o_BLHM.
    """
    arrays = (q_BLHN, k_BLKN, v_BLKM, o_BLHM, logsumexp_BLH, do_BLHM)
    if backend.startswith("cudnn"):
        gradients = _gradients_by_cudnn(arrays, mask, rule, backend)
        dq, dk, dv = (g.astype(accumulator_dtype(g.dtype)) for g in gradients)
        return dq, dk, dv
    return blocks_gradients(*arrays, mask, rule, _block(backend, q_BLHN.shape[1]))
