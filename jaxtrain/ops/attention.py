"""Causal grouped-query attention softmax(Q K^T / sqrt(d_k)) V behind one function, and the choice of its backend.

Everything here is a local call on a device's own heads and sequences, inside the manual region: no collective.

`reference` is the formula, and the oracle for the others. `blockwise` (attention_blockwise.py) needs O(length) memory and
runs anywhere. `cudnn` (attention_cudnn.py) is NVIDIA's fused kernel. For a sequence that is sharded over devices see
attention_context.py.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxtrain.errors import ExplainedError, nearest
from jaxtrain.ops.attention_blockwise import MASKED, accumulator_dtype, blockwise_attention
from jaxtrain.ops.attention_cudnn import cudnn_attention, cudnn_obstacle, needs_dense_mask
from jaxtrain.ops.attention_mask import CAUSAL, Rule, own_segments, visible_BLS
from jaxtrain.ops.attention_packed import packed_attention

BACKENDS = ("reference", "blockwise", "cudnn")
DENSE = "cudnn_dense"
"""cudnn where its kernel has to be given the mask as an array (`needs_dense_mask`)."""
# Forward and backward on 2 CPU cores, blockwise over reference (4 query heads, 2 kv heads, head_dim 64, 2048 tokens): float32
# 0.99 at length 128, 0.91 at 256, 0.52 at 512, 0.39 at 1024, 0.48 at 2048; bfloat16 1.26, 1.03, 0.55, 0.50, 0.37.
# Printed by `python -m tests.measure.blockwise_time`.
BLOCKWISE_FROM_LENGTH = 512


def reference_attention(
    q_BLHN: jax.Array,
    k_BLKN: jax.Array,
    v_BLKM: jax.Array,
    segments_BL: jax.Array | None = None,
    sinks_H: jax.Array | None = None,
    rule: Rule = CAUSAL,
) -> jax.Array:
    """softmax(Q K^T / sqrt(N)) V as written (Vaswani et al. 2017, arXiv:1706.03762, equation 1), causal, within segments.

    A sink is one more score of a head, whose value is zero. Query head h reads key and value head h // (H / K) (grouped-query
    attention, arXiv:2305.13245). Logits and softmax are float32. Holds the whole [B, H, L, L] of scores. Returns [B, L, H, M].
    """
    batch, length, heads, head_dim = q_BLHN.shape
    kv_heads = k_BLKN.shape[2]
    q_BLKGN = q_BLHN.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    dtype = accumulator_dtype(q_BLHN.dtype)
    logits = jnp.einsum("BLKGN,BSKN->BKGLS", q_BLKGN, k_BLKN, preferred_element_type=dtype)
    logits = rule.capped(logits * rule.factor(head_dim))
    seen_BLS: Any = visible_BLS(rule, own_segments(segments_BL), length, length)
    logits = jnp.where(seen_BLS[:, None, None], logits, MASKED)
    if sinks_H is not None:
        sinks_KG11 = sinks_H.astype(dtype).reshape(kv_heads, heads // kv_heads, 1, 1)
        logits = jnp.concatenate([logits, jnp.broadcast_to(sinks_KG11, (*logits.shape[:-1], 1))], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)[..., :length].astype(v_BLKM.dtype)
    o = jnp.einsum("BKGLS,BSKM->BLKGM", weights, v_BLKM, preferred_element_type=dtype)
    return o.reshape(batch, length, heads, v_BLKM.shape[-1]).astype(q_BLHN.dtype)


def check_shapes(q_BLHN: jax.Array, k_BLKN: jax.Array, v_BLKM: jax.Array) -> None:
    """Raise ValueError if queries, keys and values do not fit together."""
    q, k, v = q_BLHN.shape, k_BLKN.shape, v_BLKM.shape
    if q[:2] != k[:2] or q[3] != k[3] or k[:3] != v[:3] or q[2] % k[2]:
        raise ValueError(f"attention: queries {q}, keys {k} and values {v} do not fit")


def attention(
    q_BLHN: jax.Array,
    k_BLKN: jax.Array,
    v_BLKM: jax.Array,
    *,
    backend: str,
    rule: Rule = CAUSAL,
    segments_BL: jax.Array | None = None,
    sinks_H: jax.Array | None = None,
    residual_name: str | None = None,
) -> jax.Array:
    """softmax(Q K^T / sqrt(N)) V over the keys that each query sees: causal grouped-query self-attention.

    Token l sees token s when 0 <= l - s, with a window l - s < window, by index in the sequence, and both have the same segment
    number. Padding (segment 0) sees only padding: its rows are finite and meaningless. Repeated keys and values are never
    materialised. Values may have another width M than queries and keys.

    Under a remat policy that saves `residual_name`: `reference` keeps the [B, H, L, L] weights, so the scores are recomputed
    whatever is saved by name; `blockwise` keeps the output and the logsumexp, both named, and recomputes nothing of its
    forward pass, nor does `cudnn` within documents; without them names do not reach into it: save CUDNN_FORWARD_PRIMITIVE
    too, or the forward kernel runs once more.

    Args:
      q_BLHN: queries, H a multiple of K.
      k_BLKN, v_BLKM: keys and values.
      backend: the result of `choose_backend`: reference, blockwise, cudnn or cudnn_dense.
      rule: window, scale and bound of the scores.
      segments_BL: int32 document numbers, 0 for padding; None for one document. Tokens of a document lie side by side: where
        equal numbers lie apart, cudnn takes them for two documents.
      sinks_H: one more score of each query head, whose value is zero; None for none. cudnn has none.
      residual_name: name of the residuals of the backward pass; do not name the output elsewhere.

    Returns:
      [B, L, H, M] in the dtype of the queries.

    Raises:
      ValueError: the shapes do not fit, or the backend is unknown.
    """
    check_shapes(q_BLHN, k_BLKN, v_BLKM)
    with jax.named_scope(f"attention_{backend}"):
        if backend == "blockwise":
            arrays = (q_BLHN, k_BLKN, v_BLKM, segments_BL, sinks_H)
            return blockwise_attention(*arrays, rule=rule, residual_name=residual_name)
        if backend == "cudnn" and segments_BL is not None:
            return packed_attention(q_BLHN, k_BLKN, v_BLKM, segments_BL, rule, residual_name)
        if backend not in (*BACKENDS, DENSE):
            raise ValueError(f"attention backend {backend!r}: {nearest(backend, BACKENDS)}")
        if backend.startswith("cudnn"):
            o = cudnn_attention(q_BLHN, k_BLKN, v_BLKM, segments_BL, rule)
        else:
            o = reference_attention(q_BLHN, k_BLKN, v_BLKM, segments_BL, sinks_H, rule)
        return o if residual_name is None else checkpoint_name(o, residual_name)


def _fused(*, masks_documents: bool, dense: bool) -> tuple[str, str]:
    """Return the form of cuDNN's attention, and how it is given the masks, in words; empty if there are none."""
    if dense:
        return DENSE, "masks as a dense array"
    return "cudnn", "documents in its packed layout, a call for each range of lengths" if masks_documents else ""


def choose_backend(
    requested: str, *, platform: str, dtype: Any, head_dim: int, sequence_length: int, **facts: Any
) -> tuple[str, str]:
    """Return the attention backend and the reason, in a line for the log.

    `auto` takes cudnn where it can be used, else blockwise from length BLOCKWISE_FROM_LENGTH on, else reference.

    Args:
      requested: auto, reference, blockwise or cudnn (`model.attention`).
      platform, dtype, head_dim, sequence_length, facts: the arguments of `cudnn_obstacle`.

    Raises:
      ExplainedError: an explicit request cannot work; the message gives the reason and the alternatives.
    """
    obstacle = cudnn_obstacle(platform=platform, dtype=dtype, head_dim=head_dim, sequence_length=sequence_length, **facts)
    if requested == "cudnn" and obstacle:
        raise ExplainedError(f"model.attention=cudnn: {obstacle}; use auto, blockwise or reference")
    fused, how = _fused(masks_documents=facts["masks_documents"], dense=needs_dense_mask(**facts))
    if requested in BACKENDS:
        return (fused, f"asked for; {how}") if requested == "cudnn" and how else (requested, "asked for")
    if requested != "auto":
        raise ExplainedError(f"model.attention={requested!r}: {nearest(requested, ('auto', *BACKENDS))}")
    if not obstacle:
        return fused, f"fused kernel on {platform} for {jnp.dtype(dtype)}, head_dim {head_dim}" + (f"; {how}" if how else "")
    if sequence_length >= BLOCKWISE_FROM_LENGTH:
        return "blockwise", f"length {sequence_length} is at least {BLOCKWISE_FROM_LENGTH}; {obstacle}"
    return "reference", f"length {sequence_length} is below {BLOCKWISE_FROM_LENGTH}; {obstacle}"
