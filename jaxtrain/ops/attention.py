"""Causal grouped-query attention softmax(Q K^T / sqrt(d_k)) V behind one function, and the choice of what computes it.

All of it are local calls on a device's own heads and sequences, inside the manual region: no collective.

`reference` is the formula, and the oracle for the others. `blockwise` (attention_blockwise.py) needs O(length) memory and
runs anywhere. `cudnn` is NVIDIA's fused kernel.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxtrain.errors import ExplainedError, nearest
from jaxtrain.ops.attention_blockwise import MASKED, accumulator_dtype, blockwise_attention

BACKENDS = ("reference", "blockwise", "cudnn")
# Forward and backward on 2 CPU cores, blockwise over reference (4 query heads, 2 kv heads, head_dim 64, 2048 tokens): float32
# 0.99 at length 128, 0.91 at 256, 0.52 at 512, 0.39 at 1024, 0.48 at 2048; bfloat16 1.26, 1.03, 0.55, 0.50, 0.37.
# Printed by `pytest tests/ops/test_attention_blockwise.py -m slow -s`.
BLOCKWISE_FROM_LENGTH = 512
CUDNN_LARGEST_MASKED_LENGTH = 4096  # a dense mask is a bf16 bias of 2 L^2 bytes a sequence and its gradient: 2 x 32 MiB
# The primitive whose outputs are cuDNN's output and logsumexp. A remat policy that saves it by `primitive.name` spares the
# backward pass a second forward kernel; names cannot reach inside, because the kernel's vjp rule is JAX's own.
CUDNN_FORWARD_PRIMITIVE = "dot_product_attention_fwd_wrapper"


def visible_BLS(length: int, segments_BL: jax.Array | None) -> jax.Array:
    """Which keys each query sees: itself and what came before it in its own segment. Bool [B or 1, L, L]."""
    causal = jnp.tril(jnp.ones((1, length, length), bool))
    return causal if segments_BL is None else causal & (segments_BL[:, :, None] == segments_BL[:, None, :])


def reference_attention(
    q_BLHN: jax.Array, k_BLKN: jax.Array, v_BLKN: jax.Array, segments_BL: jax.Array | None = None
) -> jax.Array:
    """softmax(Q K^T / sqrt(N)) V as written (Vaswani et al. 2017, arXiv:1706.03762, equation 1), causal, within segments.

    Query head h reads key and value head h // (H / K) (grouped-query attention, arXiv:2305.13245). Logits and softmax are
    float32. Holds the whole [B, H, L, L] of scores.
    """
    batch, length, heads, head_dim = q_BLHN.shape
    kv_heads = k_BLKN.shape[2]
    q_BLKGN = q_BLHN.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    dtype = accumulator_dtype(q_BLHN.dtype)
    logits = jnp.einsum("BLKGN,BSKN->BKGLS", q_BLKGN, k_BLKN, preferred_element_type=dtype) / math.sqrt(head_dim)
    logits = jnp.where(visible_BLS(length, segments_BL)[:, None, None], logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BLKN.dtype)
    o = jnp.einsum("BKGLS,BSKN->BLKGN", weights, v_BLKN, preferred_element_type=dtype)
    return o.reshape(q_BLHN.shape).astype(q_BLHN.dtype)


def cudnn_attention(q_BLHN: jax.Array, k_BLKN: jax.Array, v_BLKN: jax.Array, segments_BL: jax.Array | None = None) -> jax.Array:
    """cuDNN's fused attention (`jax.nn.dot_product_attention`): O(length) memory without segments.

    Segments go in as a dense mask [B, 1, L, L], which cuDNN takes as a bias of 2 L^2 bytes a sequence.
    """
    mask = None if segments_BL is None else (segments_BL[:, :, None] == segments_BL[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q_BLHN, k_BLKN, v_BLKN, mask=mask, is_causal=True, implementation="cudnn")


def attention(
    q_BLHN: jax.Array,
    k_BLKN: jax.Array,
    v_BLKN: jax.Array,
    *,
    backend: str,
    segments_BL: jax.Array | None = None,
    residual_name: str | None = None,
) -> jax.Array:
    """Causal grouped-query self-attention: softmax(Q K^T / sqrt(N)) V over the keys that each query sees.

    Token l sees token s when s <= l, by index in the sequence, and both have the same segment number. Padding (segment 0)
    sees padding only: its rows are finite and mean nothing. No repeated key or value is ever materialised.

    What the backward pass needs, and what a remat policy that saves `residual_name` then spares: `reference` keeps the
    [B, H, L, L] weights, so the scores are computed again whatever is saved by name; `blockwise` keeps the output and the
    logsumexp, both named, and computes nothing of its forward pass again; `cudnn` keeps the same, but out of reach of names:
    save CUDNN_FORWARD_PRIMITIVE too, or the kernel runs forward once more.

    Args:
      q_BLHN: queries, H a multiple of K.
      k_BLKN, v_BLKN: keys and values.
      backend: what `choose_backend` chose: reference, blockwise or cudnn.
      segments_BL: int32 document numbers, 0 for padding; None for one document.
      residual_name: name put on what the backward pass needs; give it here, and name the output nowhere else.

    Returns:
      [B, L, H, N] in the dtype of the queries.

    Raises:
      ValueError: the shapes do not fit, or the backend is unknown.
    """
    if q_BLHN.shape[:2] != k_BLKN.shape[:2] or k_BLKN.shape != v_BLKN.shape or q_BLHN.shape[2] % k_BLKN.shape[2]:
        raise ValueError(f"attention: queries {q_BLHN.shape}, keys {k_BLKN.shape} and values {v_BLKN.shape} do not fit")
    with jax.named_scope(f"attention_{backend}"):
        if backend == "blockwise":
            return blockwise_attention(q_BLHN, k_BLKN, v_BLKN, segments_BL, residual_name=residual_name)
        if backend not in BACKENDS:
            raise ValueError(f"attention backend {backend!r}: {nearest(backend, BACKENDS)}")
        compute = {"reference": reference_attention, "cudnn": cudnn_attention}[backend]
        o = compute(q_BLHN, k_BLKN, v_BLKN, segments_BL)
        return o if residual_name is None else checkpoint_name(o, residual_name)


def cudnn_obstacle(
    *, platform: str, dtype: Any, head_dim: int, sequence_length: int, masks_documents: bool, compute_capability: float = 8.0
) -> str | None:
    """Why cuDNN's fused attention cannot be used, or None where it can.

    The limits are those of `check_layout` and `check_is_flash_attention` in jax/_src/cudnn/fused_attention_stablehlo.py,
    and our own on the size of the dense mask.
    """
    largest_head = 256 if compute_capability >= 9.0 else 128
    if platform not in ("gpu", "cuda"):
        return f"cuDNN needs an NVIDIA GPU, and this platform is {platform}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN needs bfloat16 or float16, and the compute dtype is {jnp.dtype(dtype)}"
    if head_dim % 8 or head_dim > largest_head:
        return f"cuDNN needs a head_dim that is a multiple of 8, at most {largest_head} on this GPU, not {head_dim}"
    if sequence_length % 2:
        return f"cuDNN needs an even sequence length, not {sequence_length}"
    if masks_documents and sequence_length > CUDNN_LARGEST_MASKED_LENGTH:
        mebibytes = 2 * sequence_length**2 / 2**20
        return (
            f"document masks are a dense {mebibytes:.0f} MiB a sequence for cuDNN at length {sequence_length}, and are used "
            f"up to length {CUDNN_LARGEST_MASKED_LENGTH}"
        )
    return None


def choose_backend(
    requested: str,
    *,
    platform: str,
    dtype: Any,
    head_dim: int,
    sequence_length: int,
    masks_documents: bool,
    compute_capability: float = 8.0,
) -> tuple[str, str]:
    """The attention backend to use, and why, in a line for the log.

    `auto` takes cudnn where it can be used, else blockwise from length BLOCKWISE_FROM_LENGTH on, else reference.

    Args:
      requested: auto, reference, blockwise or cudnn (`model.attention`).
      platform: of the devices: cpu, gpu, cuda, tpu.
      dtype: compute dtype of queries, keys and values.
      masks_documents: whether segments are given.
      compute_capability: of the GPU, e.g. 9.0 (Hopper); it only widens the range of head_dim.

    Raises:
      ExplainedError: an explicit request cannot work; the message says why and what would.
    """
    obstacle = cudnn_obstacle(
        platform=platform,
        dtype=dtype,
        head_dim=head_dim,
        sequence_length=sequence_length,
        masks_documents=masks_documents,
        compute_capability=compute_capability,
    )
    if requested == "cudnn" and obstacle:
        raise ExplainedError(f"model.attention=cudnn: {obstacle}; use auto, blockwise or reference")
    if requested in BACKENDS:
        return requested, "asked for"
    if requested != "auto":
        raise ExplainedError(f"model.attention={requested!r}: {nearest(requested, ('auto', *BACKENDS))}")
    if not obstacle:
        return "cudnn", f"fused kernel on {platform} for {jnp.dtype(dtype)}, head_dim {head_dim}"
    if sequence_length >= BLOCKWISE_FROM_LENGTH:
        return "blockwise", f"length {sequence_length} is at least {BLOCKWISE_FROM_LENGTH}; {obstacle}"
    return "reference", f"length {sequence_length} is below {BLOCKWISE_FROM_LENGTH}; {obstacle}"
