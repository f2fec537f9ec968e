"""NVIDIA's fused attention kernels (cuDNN) through JAX, on whole sequences and on pieces of one, and their limits."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.jax_private import fused_attention
from jaxtrain.ops.attention_mask import CAUSAL, Mask, Rule, own_segments, visible_BLS

PACKED_FROM_CAPABILITY = 9.0  # Hopper
LARGEST_MASKED_LENGTH = 4096  # a dense mask is a bf16 bias of 2 L^2 bytes a sequence and its gradient: 2 x 32 MiB
# The primitive whose outputs are cuDNN's output and logsumexp. A remat policy that saves it by `primitive.name` avoids a
# second forward kernel in the backward pass; names cannot reach inside, because the kernel's vjp rule is JAX's own.
CUDNN_FORWARD_PRIMITIVE = "dot_product_attention_fwd_wrapper"


def one_width(*arrays: jax.Array) -> list[jax.Array]:
    """Pad the last dim with zeros to the widest: cuDNN needs one width, and zeros change neither scores nor sums."""
    width = max(x.shape[-1] for x in arrays)
    return [jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])]) for x in arrays]


def _dense_mask(mask: Mask, rule: Rule, queries: int, keys: int) -> jax.Array | None:
    """Return the masks that cuDNN lacks (segments, places in the sequence) as bool [B, 1, L, S]."""
    knows_window = rule.causal and mask.q_index is None
    told = Rule(causal=False, window=0 if knows_window else rule.window)
    seen = visible_BLS(told, mask, queries, keys)
    return None if seen is None else seen[:, None]


def cudnn_attention(
    q_BLHN: jax.Array, k_BLKN: jax.Array, v_BLKM: jax.Array, segments_BL: jax.Array | None = None, rule: Rule = CAUSAL
) -> jax.Array:
    """Run cuDNN's fused attention (`jax.nn.dot_product_attention`): O(length) memory without segments; [B, L, H, M].

    Segments become a dense mask [B, 1, L, L], which cuDNN takes as a bias of 2 L^2 bytes per sequence. The window is cuDNN's
    own. If values are not as wide as queries and keys, the narrower are padded with zeros.
    """
    q, k, v = one_width(q_BLHN, k_BLKN, v_BLKM)
    length = q.shape[1]
    o = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=_dense_mask(own_segments(segments_BL), rule, length, length),
        scale=rule.factor(q_BLHN.shape[-1]),
        is_causal=True,
        local_window_size=(rule.window - 1, 0) if rule.window else None,
        implementation="cudnn",
    )
    return o[..., : v_BLKM.shape[-1]]


def settings_of(head_dim: int, has_mask: bool, rule: Rule, mask: Mask) -> dict[str, Any]:
    """Return the static parameters of JAX's cuDNN primitives."""
    library = fused_attention()
    has_score_mod = "score_mod" in inspect.signature(library._dot_product_attention_fwd).parameters  # since jax 0.12
    return ({"score_mod": None} if has_score_mod else {}) | {
        "scale": rule.factor(head_dim),
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (has_mask, False),  # (has a bias, needs its gradient)
        "mask_type": library.MaskType.CAUSAL if rule.causal else library.MaskType.NO_MASK,
        "layout": library.AttentionLayout.BTNH.value,
        "sliding_window_length": rule.window if rule.window and rule.causal and mask.q_index is None else None,
    }


def _operands(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, rule: Rule) -> list[jax.Array]:
    """Return queries, keys, values and the mask as a bias, then the six unused operands of packed and paged layouts."""
    library = fused_attention()
    unused = jnp.zeros(0, q.dtype)
    dense = _dense_mask(mask, rule, q.shape[1], k.shape[1])
    bias: Any = unused if dense is None else library.combine_bias_and_mask(None, dense, q.dtype)
    return [q, k, v, bias, *[unused] * 6]


def cudnn_piece(q_BLHN: jax.Array, k_BLKN: jax.Array, v_BLKM: jax.Array, mask: Mask, rule: Rule) -> tuple[jax.Array, jax.Array]:
    """Return the attention of a piece of queries over a piece of as many keys by cuDNN's forward kernel.

    `jax.nn.dot_product_attention(return_residual=True)` would round the logsumexp to the queries' dtype, and its derivative
    ignores other pieces; so this binds the primitive below it (`jax_private.fused_attention`, the same in jax 0.10.2 and
    0.11.1, with one more setting in 0.12). cuDNN's softmax statistics are max + log(sum(exp(logit - max))) of the scaled
    logits, the natural logsumexp (arXiv:2307.08691, section 3.1.1).

    Returns:
      o_BLHM in the queries' dtype and logsumexp_BLH float32.
    """
    library = fused_attention()
    library.check_cudnn_version()  # raises if the library is missing
    q, k, v = one_width(q_BLHN, k_BLKN, v_BLKM)
    operands = _operands(q, k, v, mask, rule)
    settings = settings_of(q_BLHN.shape[-1], operands[3].size > 0, rule, mask)
    o, logsumexp_BHL = library._dot_product_attention_fwd_p_wrapper.bind(*operands, **settings, is_training=True)
    return o[..., : v_BLKM.shape[-1]], logsumexp_BHL.transpose(0, 2, 1)


def cudnn_piece_gradients(
    q_BLHN: jax.Array,
    k_BLKN: jax.Array,
    v_BLKM: jax.Array,
    o_BLHM: jax.Array,
    logsumexp_BLH: jax.Array,
    do_BLHM: jax.Array,
    mask: Mask,
    rule: Rule,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the contribution of a piece of queries and a piece of keys to the gradients, by cuDNN's backward kernel.

    The kernel computes P = exp(Q K^T / sqrt(N) - logsumexp) and dS = P * (dO V^T - sum(dO * O)) from its inputs. With
    output and logsumexp over all keys that is the share of this piece, as in `block_gradients`.

    Returns:
      dq_BLHN, dk_BLKN, dv_BLKM in the queries' dtype.
    """
    library = fused_attention()
    q, k, v, o, do = one_width(q_BLHN, k_BLKN, v_BLKM, o_BLHM.astype(q_BLHN.dtype), do_BLHM.astype(q_BLHN.dtype))
    operands = _operands(q, k, v, mask, rule)
    settings = settings_of(q_BLHN.shape[-1], operands[3].size > 0, rule, mask)
    statistics_BHL = logsumexp_BLH.transpose(0, 2, 1)
    dq, dk, dv = library._dot_product_attention_bwd_p_wrapper.bind(*operands, statistics_BHL, o, do, **settings)
    return dq[..., : q_BLHN.shape[-1]], dk[..., : k_BLKN.shape[-1]], dv[..., : v_BLKM.shape[-1]]


def needs_dense_mask(
    *, masks_documents: bool, window: int = 0, in_pieces: bool = False, compute_capability: float = 8.0, **_: Any
) -> bool:
    """Return whether cuDNN must be given the mask as an array: documents before Hopper, and windows over pieces.

    Args:
      masks_documents, window, in_pieces, compute_capability: see `cudnn_obstacle`, whose other arguments make no difference.
    """
    return (masks_documents and compute_capability < PACKED_FROM_CAPABILITY) or bool(window and in_pieces)


def cudnn_obstacle(
    *,
    platform: str,
    dtype: Any,
    head_dim: int,
    sequence_length: int,
    masks_documents: bool,
    value_dim: int | None = None,
    window: int = 0,
    softcap: bool = False,
    sinks: bool = False,
    in_pieces: bool = False,
    compute_capability: float = 8.0,
) -> str | None:
    """Return why cuDNN's fused attention cannot be used, or None where it can.

    The limits are those of `check_layout` and `check_is_flash_attention` in jax/_src/cudnn/fused_attention_stablehlo.py,
    and our own on the size of a dense mask, where one is needed.

    Args:
      platform: the devices': cpu, gpu, cuda, tpu.
      dtype: compute dtype of queries, keys and values.
      sequence_length: the longest run of tokens in one kernel: with `in_pieces`, a device's share.
      masks_documents: whether segments are given.
      value_dim: width of a value head if it is not head_dim.
      window: sliding-window attention's; 0 for none.
      softcap, sinks: whether scores are bounded, and whether heads have sinks.
      in_pieces: whether attention goes piece by piece over the devices of the context axis (ring, gather).
      compute_capability: the GPU's, e.g. 9.0 (Hopper), which takes wider heads and packed documents.
    """
    largest_head = 256 if compute_capability >= 9.0 else 128
    width = max(head_dim, value_dim or 0)
    if platform not in ("gpu", "cuda"):
        return f"cuDNN needs an NVIDIA GPU, and this platform is {platform}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN needs bfloat16 or float16, and the compute dtype is {jnp.dtype(dtype)}"
    if width % 8 or width > largest_head:
        return f"cuDNN needs a head_dim that is a multiple of 8, at most {largest_head} on this GPU, not {width}"
    if softcap or sinks:
        return f"JAX's cuDNN attention has no {'bound of the scores' if softcap else 'attention sinks'}"
    if sequence_length % 2:
        return f"cuDNN needs an even sequence length, not {sequence_length}"
    masks = ["document masks"] * masks_documents + ["sliding windows over pieces"] * bool(window and in_pieces)
    asked = {"masks_documents": masks_documents, "window": window, "in_pieces": in_pieces}
    if needs_dense_mask(**asked, compute_capability=compute_capability) and sequence_length > LARGEST_MASKED_LENGTH:
        mebibytes = 2 * sequence_length**2 / 2**20
        return (
            f"{' and '.join(masks)} are a dense {mebibytes:.0f} MiB a sequence for cuDNN at length {sequence_length}, and are "
            f"used up to length {LARGEST_MASKED_LENGTH}"
        )
    return None
