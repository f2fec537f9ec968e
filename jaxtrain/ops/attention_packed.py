"""cuDNN's fused attention within documents, by its packed layout: no mask of L^2, and no work between documents.

The kernel takes q [B, L, H, N], k and v as they lie, and for each of R = slots B documents the offset of its first element and
its length. Its working memory is what limits the slots: XLA's call gives the backward kernel sums of dQ in float32 and, with
grouped queries, dK and dV of every query head, of R documents of L tokens each (`working_bytes`; cudnn-frontend 1.22,
scaled_dot_product_flash_attention.h, without `max_total_seq_len`, which XLA does not set). A call takes shorter documents by
a shape [B L / l, l] of the same memory, see attention_documents.py.

What the kernel does not write, it leaves as it was: outputs outside its documents are never read here.

Letters as in attention_blockwise.py and attention_documents.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxtrain.jax_private import fused_attention
from jaxtrain.ops.attention_blockwise import MASKED, alike, name_residuals, opaque
from jaxtrain.ops.attention_cudnn import one_width, settings_of
from jaxtrain.ops.attention_documents import SLOTS, Documents, Runs, Taken, calls_of, meeting_runs
from jaxtrain.ops.attention_mask import CAUSAL, Mask, Rule

Arrays = tuple[jax.Array, ...]
LARGEST_OFFSET = 2**31 - 1


def working_bytes(rows: float, length: int, heads: float, kv_heads: float, width: int, itemsize: int = 2) -> float:
    """Return the bytes of the backward kernel's working memory, which no program compiled without a GPU shows.

    For SLOTS x rows documents of `length` tokens: dQ [H, N] and dO O [H] in float32; with grouped queries dK and dV [H, N].
    """
    whole_heads = 2 * itemsize * (heads != kv_heads)
    return SLOTS * rows * length * heads * (width * (4 + whole_heads) + 4)


# ---------------------------------------------------------------------------------------------------------------------
# The kernels


def forward_kernel(*operands: jax.Array, **settings: Any) -> Arrays:
    """Return (o, statistics [R, H, L]) by JAX's primitive of q, k, v, no bias, lengths and offsets of q and k, no pages."""
    return tuple(fused_attention()._dot_product_attention_fwd_p.bind(*operands, **settings, is_training=True))


def backward_kernel(*operands: jax.Array, **settings: Any) -> Arrays:
    """Return (dq, dk, dv) by JAX's primitive for the operands of the forward kernel, statistics, o and do."""
    return tuple(fused_attention()._dot_product_attention_bwd_p.bind(*operands, **settings))


def _settings(rule: Rule) -> dict[str, Any]:
    """Return the static parameters of the primitives below those that split over devices: in 0.12 with other names."""
    library = fused_attention()
    library.check_cudnn_version()  # raises if the library is missing
    settings = settings_of(1, False, rule, Mask())
    if settings.pop("score_mod", 0) is None:
        parameters = inspect.signature(library._dot_product_attention_fwd_cuda_lowering).parameters
        settings |= {name: None for name in parameters if name.startswith("score_mod_") and name != "score_mod_args"}
    return settings


def _packed(runs: Runs, x_BLHN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return lengths [B, R / B] and element offsets [B, R / B + 1], of which the kernel reads the first R + 1 in memory.

    JAX's wrapper would compute them from segments. Before July 2026 it counted the keys' offsets in heads of the queries, which
    with grouped queries is silently wrong (jax#39521): hence the primitives below the wrapper, and the offsets from here.
    """
    batch, length, heads, width = x_BLHN.shape
    if batch * length * heads * width > LARGEST_OFFSET:
        raise ValueError(
            f"attention within documents: {batch} x {length} tokens of {heads} heads of {width} are more elements than cuDNN's "
            "int32 offsets count; use more train.microbatches"
        )
    most = len(runs.lengths) // batch
    unread = jnp.full_like(runs.starts[: batch - 1], batch * length)
    offsets = jnp.concatenate([runs.starts, unread]) * (heads * width)
    return runs.lengths.reshape(batch, most), offsets.reshape(batch, most + 1)


def _operands(q: jax.Array, k: jax.Array, v: jax.Array, q_runs: Runs, k_runs: Runs) -> list[jax.Array]:
    unused = jnp.zeros(0, q.dtype)
    (q_lengths, q_offsets), (k_lengths, k_offsets) = _packed(q_runs, q), _packed(k_runs, k)
    return [q, k, v, unused, q_lengths, k_lengths, q_offsets, k_offsets, unused, unused]


def _forward_call(arrays: Sequence[jax.Array], q_runs: Runs, k_runs: Runs, rule: Rule) -> Arrays:
    """Return o_BLHN and the statistics [R, H, L]: of a slot's documents, the logsumexp by head and place."""
    q, k, v = arrays
    return forward_kernel(*_operands(q, k, v, q_runs, k_runs), **_settings(rule))


def _backward_call(arrays: Sequence[jax.Array], statistics: jax.Array, q_runs: Runs, k_runs: Runs, rule: Rule) -> Arrays:
    q, k, v, o, do = arrays
    operands = (*_operands(q, k, v, q_runs, k_runs), statistics, o, do)
    return backward_kernel(*operands, **_settings(rule))


# ---------------------------------------------------------------------------------------------------------------------
# A sequence, or a device's share of it, that attends to itself


def _reshaped(length: int, *arrays: jax.Array) -> Arrays:
    """[B, L, ...] -> [B L / length, length, ...]: the same memory, in rows that documents may cross."""
    return tuple(x.reshape(-1, length, *x.shape[2:]) for x in arrays)


def _by_length(segments_BL: jax.Array, compute: Callable[[Taken, int], Arrays]) -> Arrays:
    """Return the arrays [B, L, ...] that `compute` gives of the documents of each call, each where the call holds the token.

    The last call is repeated while there are more documents than it has slots for. The condition is a number from the device,
    for which the host waits. `program.hlo` finds all calls but the first by the scope's name and counts none of their FLOPs:
    the first one's are counted as if it held all tokens in one document a row, and no split of the tokens makes more.
    """
    batch, length = segments_BL.shape
    documents, (first, *rest) = Documents.of(segments_BL), calls_of(length)

    def add(so_far: Arrays, taken: Taken, at: int) -> Arrays:
        holds_BL = taken.holds.reshape(batch, length)
        pairs = zip(so_far, compute(taken, at), strict=True)
        return tuple(jnp.where(holds_BL.reshape(batch, length, *[1] * (new.ndim - 2)), new, old) for old, new in pairs)

    result = compute(documents.take(first), first.length)
    with jax.named_scope(FURTHER_CALLS):
        for call in rest:
            result = add(result, documents.take(call), call.length)
        last = (first, *rest)[-1]
        slots, count = last.slots(batch * length), documents.number(last)

        def more(carry: tuple[jax.Array, Arrays]) -> tuple[jax.Array, Arrays]:
            after, so_far = carry
            return after + slots, add(so_far, documents.take(last, after), last.length)

        begin, result, count = alike(jnp.asarray(slots, jnp.int32), result, count)
        return lax.while_loop(lambda carry: carry[0] < count, more, (begin, result))[1]


FURTHER_CALLS = "further_documents"


def packed_self(
    q_BLHN: jax.Array, k_BLKN: jax.Array, v_BLKM: jax.Array, segments_BL: jax.Array, rule: Rule
) -> tuple[jax.Array, jax.Array]:
    """Return the causal attention within the documents of a sequence, and within the window.

    Returns:
      o_BLHM in the queries' dtype and logsumexp_BLH float32.
    """
    q, k, v = one_width(q_BLHN, k_BLKN, v_BLKM)
    batch, length, heads, _ = q.shape

    def compute(taken: Taken, at: int) -> Arrays:
        told = _at_length(rule, q_BLHN.shape[-1], at)
        o, statistics_RHL = _forward_call(_reshaped(at, q, k, v), taken.runs, taken.runs, told)
        slot = jnp.clip(taken.slot, 0, len(statistics_RHL) - 1)
        logsumexp_TH = statistics_RHL[slot, :, jnp.minimum(taken.place, at - 1)]
        return o.reshape(q.shape), logsumexp_TH.reshape(batch, length, heads)

    o, logsumexp_BLH = _by_length(segments_BL, compute)
    return o[..., : v_BLKM.shape[-1]], logsumexp_BLH


def packed_self_gradients(
    q_BLHN: jax.Array,
    k_BLKN: jax.Array,
    v_BLKM: jax.Array,
    o_BLHM: jax.Array,
    logsumexp_BLH: jax.Array,
    do_BLHM: jax.Array,
    segments_BL: jax.Array,
    rule: Rule,
) -> Arrays:
    """Return dq_BLHN, dk_BLKN and dv_BLKM; `o_BLHM` and `logsumexp_BLH` are over all keys that the query sees."""
    dtype = q_BLHN.dtype
    arrays = one_width(q_BLHN, k_BLKN, v_BLKM, o_BLHM.astype(dtype), do_BLHM.astype(dtype))
    logsumexp_TH = logsumexp_BLH.reshape(-1, logsumexp_BLH.shape[-1])

    def compute(taken: Taken, at: int) -> Arrays:
        starts = taken.runs.starts[:-1, None]
        tokens_RL = jnp.minimum(starts + jnp.arange(at, dtype=jnp.int32), len(logsumexp_TH) - 1)
        statistics_RHL = logsumexp_TH[tokens_RL].transpose(0, 2, 1)
        told = _at_length(rule, q_BLHN.shape[-1], at)
        gradients = _backward_call(_reshaped(at, *arrays), statistics_RHL, taken.runs, taken.runs, told)
        return tuple(g.reshape(x.shape) for g, x in zip(gradients, arrays, strict=False))

    dq, dk, dv = _by_length(segments_BL, compute)
    return dq[..., : q_BLHN.shape[-1]], dk[..., : k_BLKN.shape[-1]], dv[..., : v_BLKM.shape[-1]]


def _at_length(rule: Rule, head_dim: int, length: int) -> Rule:
    """Return the rule for heads that may be padded, without a window that is no shorter than a call's longest document."""
    return rule._replace(scale=rule.factor(head_dim), window=rule.window if rule.window < length else 0)


# ---------------------------------------------------------------------------------------------------------------------
# A piece of queries and an earlier piece of keys


def packed_meeting(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, rule: Rule) -> tuple[jax.Array, jax.Array]:
    """Return the attention of a piece of queries over an earlier piece of keys: of the one document that is in both.

    Returns:
      o_BLHM and logsumexp_BLH; where a query sees no key 0, and a logsumexp so low that it vanishes when merged.
    """
    runs, sees_BL = _meeting(mask)
    told, width = _at_length(rule, q.shape[-1], q.shape[1]), v.shape[-1]
    o, statistics_RHL = _forward_call(one_width(q, k, v), *runs, told)
    logsumexp_BLH = statistics_RHL.reshape(len(q), 2, *statistics_RHL.shape[1:])[:, 0].transpose(0, 2, 1)
    sees = sees_BL[..., None]
    return jnp.where(sees[..., None], o[..., :width], 0), jnp.where(sees, logsumexp_BLH, MASKED)


def packed_meeting_gradients(
    q: jax.Array, k: jax.Array, v: jax.Array, o: jax.Array, logsumexp_BLH: jax.Array, do: jax.Array, mask: Mask, rule: Rule
) -> Arrays:
    """Return dq, dk and dv, the share of this piece of keys; `o` and `logsumexp_BLH` are over all keys that a query sees."""
    runs, sees_BL = _meeting(mask)
    arrays = one_width(q, k, v, o.astype(q.dtype), do.astype(q.dtype))
    statistics = jnp.stack([logsumexp_BLH.transpose(0, 2, 1)] * 2, axis=1)
    told = _at_length(rule, q.shape[-1], q.shape[1])
    dq, dk, dv = _backward_call(arrays, statistics.reshape(-1, *statistics.shape[2:]), *runs, told)
    lengths_B1 = runs[1].lengths.reshape(-1, 2)[:, :1]
    seen_BL = jnp.arange(k.shape[1]) >= k.shape[1] - lengths_B1
    given = ((dq, q, sees_BL), (dk, k, seen_BL), (dv, v, seen_BL))
    dq, dk, dv = (jnp.where(used[..., None, None], g[..., : x.shape[-1]], 0) for g, x, used in given)
    return dq, dk, dv


def _meeting(mask: Mask) -> tuple[tuple[Runs, Runs], jax.Array]:
    """Return the document of each row that is in both pieces, and which queries are in it."""
    q_segments_BL: Any = mask.q_segments
    k_segments_BL: Any = mask.k_segments
    runs = meeting_runs(q_segments_BL, k_segments_BL)
    return runs, jnp.arange(q_segments_BL.shape[1]) < runs[0].lengths.reshape(-1, 2)[:, :1]


# ---------------------------------------------------------------------------------------------------------------------
# Differentiable


_opaque_forward = opaque(packed_self, (4,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attention(arrays: Arrays, rule: Rule, name: str | None) -> jax.Array:
    return packed_self(*arrays, rule=rule)[0]


def _attention_forward(arrays: Arrays, rule: Rule, name: str | None) -> tuple[jax.Array, Arrays]:
    o, logsumexp = name_residuals(name, *_opaque_forward(*arrays, rule))
    return o, (*arrays, o, logsumexp)


def _attention_backward(rule: Rule, name: str | None, residuals: Arrays, do_BLHM: jax.Array) -> tuple[tuple[Any, ...]]:
    del name
    q, k, v, segments, o, logsumexp = residuals
    return ((*packed_self_gradients(q, k, v, o, logsumexp, do_BLHM, segments, rule), None),)


_attention.defvjp(_attention_forward, _attention_backward)


def packed_attention(
    q_BLHN: jax.Array,
    k_BLKN: jax.Array,
    v_BLKM: jax.Array,
    segments_BL: jax.Array,
    rule: Rule = CAUSAL,
    residual_name: str | None = None,
) -> jax.Array:
    """softmax(Q K^T / sqrt(N)) V, causal, within the window and within documents, by cuDNN.

    Args:
      segments_BL: int32 document numbers; a document is a run of one number, so equal numbers that lie apart are two.
      residual_name: name of output and logsumexp, the residuals; as in `blockwise_attention`.

    Returns:
      [B, L, H, M] in the dtype of the queries.

    Raises:
      ValueError: the batch has more elements than cuDNN's offsets count.
    """
    return _attention(alike(q_BLHN, k_BLKN, v_BLKM, segments_BL), rule, residual_name)
