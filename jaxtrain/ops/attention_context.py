"""Attention over a sequence that is sharded over the devices of the `context` axis.

Three kinds, the same result:

- `ring` (Liu et al. 2023, arXiv:2310.01889): keys and values go round the devices; every device folds each block into a
  running (output, logsumexp). The next block is transferred while this one is computed.
- `gather`: the same fold over blocks from one all_gather of keys and values. Holds the whole length.
- `ulysses` (Jacobs et al. 2023, arXiv:2309.14509): all_to_all exchanges heads for sequence, each device attends over whole
  sequences with its share of the heads, and all_to_all exchanges back.

Ring and gather work in zigzag order (attention_order.py): device c holds lo = piece c and hi = piece 2C - 1 - c. On its own
[lo, hi] attention is causal by local index. Of another device j it needs two whole pieces: hi always sees lo_j, and either lo
sees lo_j (j < c) or hi sees hi_j (j > c). Which of the two is a choice of operands of one shape, so every device does the same
work and no conditional is traced. Both are computed as one attention with twice the batch.

Shape letters as everywhere, L a device's share of the sequence; P = L / 2 a piece; M the width of a value head.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtrain.errors import ExplainedError, nearest
from jaxtrain.ops.attention import attention, check_shapes
from jaxtrain.ops.attention_blockwise import (
    MASKED,
    accumulator_dtype,
    merge_blocks,
    name_residuals,
    opaque,
    sinks_gradient,
    with_sinks,
)
from jaxtrain.ops.attention_cudnn import cudnn_obstacle
from jaxtrain.ops.attention_mask import Mask, Rule
from jaxtrain.ops.attention_order import places_L
from jaxtrain.ops.attention_pieces import piece_attention, piece_gradients
from jaxtrain.sharding import all_gather, all_to_all, reduce_scatter, shift, shift_in_group, vary, varying_axes

PyTree = Any
KINDS = ("ring", "gather", "ulysses")
# FLOPs of a GPU per byte received: H100, 989 TFLOP/s dense bf16, of which a fused kernel reaches about 65%, over 450 GB/s of
# NVLink in one direction (NVIDIA H100 datasheet).
RING_HIDES_FROM = 1400


class AttentionPlan(NamedTuple):
    """The chosen attention, fixed before tracing."""

    backend: str
    """Backend of a piece, or with ulysses of a whole sequence: reference, blockwise or cudnn."""
    kind: str = "ring"
    """How keys of other devices along `context` are reached: ring, gather or ulysses."""
    rule: Rule = Rule()
    """Window, scale and bound of the scores."""
    permutes: bool = True
    """Whether the ring may use ppermute where it is traced; else it uses `shift_in_group`, with the same result."""

    @property
    def absorbs(self) -> bool:
        """Return whether latent attention attends to the latents themselves."""
        return False

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
        """Run `context_attention` by this plan. (The cache of `inference/` stands in for a plan by this method.)"""
        return context_attention(q, k, v, self, **options)


def needed_steps(context: int, piece: int, window: int) -> tuple[int, ...]:
    """Return the steps s > 0 at which some device needs the block of the device s places before it.

    The pieces that meet at step s lie at least min(s, C - s) apart, so their nearest tokens (min(s, C - s) - 1) P + 1; a
    shorter window omits the step, its work and its transfer, on all devices.
    """
    reach = math.ceil((window - 1) / piece) if window else context
    return tuple(s for s in range(1, context) if min(s, context - s) <= reach)


# ---------------------------------------------------------------------------------------------------------------------
# The two pieces that this device needs of another


class _Meeting(NamedTuple):
    """This device, and another one whose keys it sees."""

    here: jax.Array
    there: jax.Array

    def queries(self, x_BL: jax.Array) -> jax.Array:
        """Return [2B, P]: hi, then lo if the other device comes before this one, else hi."""
        lo, hi = jnp.split(x_BL, 2, axis=1)
        return jnp.concatenate([hi, jnp.where(self.there < self.here, lo, hi)])

    def keys(self, x_BL: jax.Array) -> jax.Array:
        """Return [2B, P]: lo, then lo if the other device comes before this one, else hi."""
        lo, hi = jnp.split(x_BL, 2, axis=1)
        return jnp.concatenate([lo, jnp.where(self.there < self.here, lo, hi)])

    def queries_back(self, x_2BP: jax.Array) -> jax.Array:
        """Return the transpose of `queries`: [B, L]."""
        first, second = jnp.split(x_2BP, 2)
        in_lo = jnp.where(self.there < self.here, second, 0)
        return jnp.concatenate([in_lo, first + jnp.where(self.there < self.here, 0, second)], axis=1)

    def keys_back(self, x_2BP: jax.Array) -> jax.Array:
        """Return the transpose of `keys`: [B, L]."""
        first, second = jnp.split(x_2BP, 2)
        in_lo = jnp.where(self.there < self.here, second, 0)
        return jnp.concatenate([first + in_lo, jnp.where(self.there < self.here, 0, second)], axis=1)

    def merge(self, so_far: tuple[jax.Array, jax.Array], more: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Fold the attention of `queries` over `keys` into the output and logsumexp of all this device's queries."""
        (o_lo, o_hi), (l_lo, l_hi) = (jnp.split(x, 2, axis=1) for x in so_far)
        (o_1, o_2), (l_1, l_2) = (jnp.split(x, 2) for x in more)
        is_before = self.there < self.here
        lo = merge_blocks(o_lo, l_lo, o_2, jnp.where(is_before, l_2, MASKED))
        hi = merge_blocks(*merge_blocks(o_hi, l_hi, o_1, l_1), o_2, jnp.where(is_before, MASKED, l_2))
        o, logsumexp = (jnp.concatenate(halves, axis=1) for halves in zip(lo, hi, strict=True))
        return o, logsumexp


def _meet(step: Any) -> _Meeting:
    here = lax.axis_index("context")
    return _Meeting(here, (here - step) % lax.axis_size("context"))


def _of_device(x: jax.Array | None, device: jax.Array, length: int) -> jax.Array | None:
    """Return a device's share of an array whose dim 1 is whole."""
    return None if x is None else lax.dynamic_slice_in_dim(x, device * length, length, axis=1)


def _mask(meeting: _Meeting, shape: tuple[int, ...], segments_BL: jax.Array | None, window: int) -> Mask:
    """Return the mask of this device's queries and the other's keys, whole shares. Only a window needs their places."""
    context, length = lax.axis_size("context"), shape[1]
    places = [jnp.broadcast_to(places_L(d, context, length), shape[:2]) if window else None for d in meeting]
    return Mask(*places, *(_of_device(segments_BL, device, length) for device in meeting))


def _mask_of_pieces(meeting: _Meeting, mask: Mask) -> Mask:
    take = (meeting.queries, meeting.keys, meeting.queries, meeting.keys)
    return Mask(*(None if part is None else side(part) for side, part in zip(take, mask, strict=True)))


# ---------------------------------------------------------------------------------------------------------------------
# Transfers of the other devices' blocks

Move = Callable[[jax.Array, str, int], jax.Array]
Begin = Callable[[], PyTree]
Visit = Callable[[PyTree, Any, PyTree], tuple[PyTree, PyTree]]


def _to_words(x: jax.Array) -> jax.Array:
    """Return the same bits as uint32, [..., W] -> [..., W * bytes / 4]."""
    per_word = 4 // x.dtype.itemsize
    words = x.reshape(*x.shape[:-1], x.shape[-1] // per_word, per_word) if per_word > 1 else x
    return lax.bitcast_convert_type(words, jnp.uint32)


def _from_words(words: jax.Array, dtype: Any) -> jax.Array:
    """Return the inverse of `_to_words`."""
    return lax.bitcast_convert_type(words, dtype).reshape(*words.shape[:-1], -1)


def _send(move: Move, tree: PyTree, by: int) -> PyTree:
    """Send all leaves [B, L, K, W] `by` places on, as one array: XLA:GPU lets only one permute at a time overlap with compute.

    Leaves of different dtypes (keys and values, and the sums of their gradients) are sent as bits.
    """
    leaves, structure = jax.tree.flatten(tree)
    if not by or not leaves:
        return tree
    dtypes = [x.dtype for x in leaves]
    as_words = len(set(dtypes)) > 1
    if as_words and any(x.shape[-1] * x.dtype.itemsize % 4 for x in leaves):
        return jax.tree.map(lambda x: move(x, "context", by), tree)
    packed = [_to_words(x) for x in leaves] if as_words else leaves
    ends = np.cumsum([x.shape[-1] for x in packed])[:-1].tolist()
    parts = jnp.split(move(jnp.concatenate(packed, axis=-1), "context", by), ends, axis=-1)
    if as_words:
        parts = [_from_words(part, dtype) for part, dtype in zip(parts, dtypes, strict=True)]
    return jax.tree.unflatten(structure, parts)


def _go_round(
    move: Move, blocks: PyTree, sums: PyTree, steps: tuple[int, ...], begin: Begin, visit: Visit
) -> tuple[PyTree, PyTree]:
    """carry = begin(); then visit(carry, step, blocks of that step) -> (carry, addends to those blocks' sums), step by step.

    Blocks travel from device to device. Their sums follow one step behind, since a visit takes until the next transfer to add
    to them, and return to their device at the end. A transfer is always issued before the visit that it can overlap with. Runs
    of steps with the same transfers are a scan.
    """
    onward = [later - earlier for earlier, later in itertools.pairwise(steps)] + [0]
    into = [0, *onward[:-1]] if jax.tree.leaves(sums) else [0] * len(steps)
    state = _send(move, blocks, steps[0]), sums, begin()
    for (arriving, leaving), run in itertools.groupby(zip(into, onward, steps, strict=True), key=operator.itemgetter(0, 1)):

        def one(state: tuple, step: Any, arriving: int = arriving, leaving: int = leaving) -> tuple[tuple, None]:
            blocks, sums, carry = state
            if arriving == leaving:
                following, arrived = _send(move, (blocks, sums), leaving)
            else:
                following, arrived = _send(move, blocks, leaving), _send(move, sums, arriving)
            carry, added = visit(carry, step, blocks)
            return (following, jax.tree.map(jnp.add, arrived, added), carry), None

        numbers = [step for _, _, step in run]
        state = one(state, numbers[0])[0] if len(numbers) == 1 else lax.scan(one, state, jnp.asarray(numbers))[0]
    _, sums, carry = state
    return carry, _send(move, sums, lax.axis_size("context") - steps[-1])


def _take_from_all(blocks: PyTree, sums: PyTree, steps: tuple[int, ...], begin: Begin, visit: Visit) -> tuple[PyTree, PyTree]:
    """Do `_go_round` with all blocks gathered at once, and all sums reduce-scattered at once in the blocks' dtype."""
    context, here = lax.axis_size("context"), lax.axis_index("context")
    whole = jax.tree.map(lambda x: all_gather(x, "context", dim=1), blocks)
    whole_sums = jax.tree.map(lambda x: jnp.concatenate([x] * context, axis=1), sums)

    def one(state: tuple, step: Any) -> tuple[tuple, None]:
        sums, carry = state
        there = (here - step) % context
        block = jax.tree.map(lambda x, y: _of_device(x, there, y.shape[1]), whole, blocks)
        carry, added = visit(carry, step, block)

        def add(total: jax.Array, more: jax.Array) -> jax.Array:
            so_far = lax.dynamic_slice_in_dim(total, there * more.shape[1], more.shape[1], axis=1)
            return lax.dynamic_update_slice_in_dim(total, so_far + more, there * more.shape[1], axis=1)

        return (jax.tree.map(add, sums, added), carry), None

    (whole_sums, carry), _ = lax.scan(one, (whole_sums, begin()), jnp.asarray(steps))
    if not jax.tree.leaves(sums):
        return carry, sums
    # Partial sums are rounded to the compute dtype before they are added, like those that tensor parallelism scatters.
    scattered = jax.tree.map(lambda x, y: reduce_scatter(x.astype(y.dtype), "context", dim=1), whole_sums, blocks)
    return carry, jax.tree.map(lambda x, y: x.astype(y.dtype), scattered, sums)


def _others(plan: AttentionPlan, blocks: PyTree, sums: PyTree, begin: Begin, visit: Visit) -> tuple[PyTree, PyTree]:
    """Visit every other device's blocks within the window, by the plan's kind; return (carry, sums of this device's blocks)."""
    piece = jax.tree.leaves(blocks)[0].shape[1] // 2
    steps = needed_steps(lax.axis_size("context"), piece, plan.rule.window)
    go = _take_from_all
    if plan.kind == "ring":
        go = functools.partial(_go_round, shift if plan.permutes else shift_in_group)
    return go(blocks, sums, steps, begin, visit) if steps else (begin(), sums)


# ---------------------------------------------------------------------------------------------------------------------
# The fold, forward and backward


def _forward(
    q_BLHN: jax.Array,
    k_BLKN: jax.Array,
    v_BLKM: jax.Array,
    segments_BL: jax.Array | None,
    sinks_H: jax.Array | None,
    plan: AttentionPlan,
) -> tuple[jax.Array, jax.Array]:
    """Return o_BLHM in the queries' dtype and logsumexp_BLH float32, over the whole sequence."""
    shape = q_BLHN.shape

    def visit(so_far: tuple[jax.Array, jax.Array], step: Any, block: tuple[jax.Array, jax.Array]) -> tuple[PyTree, tuple]:
        meeting = _meet(step)
        mask = _mask_of_pieces(meeting, _mask(meeting, shape, segments_BL, plan.rule.window))
        k, v = map(meeting.keys, block)
        more = piece_attention(meeting.queries(q_BLHN), k, v, mask, plan.rule._replace(causal=False), plan.backend)
        return meeting.merge(so_far, more), ()

    def own() -> tuple[jax.Array, jax.Array]:
        mask = _mask(_meet(0), shape, segments_BL, plan.rule.window)
        return piece_attention(q_BLHN, k_BLKN, v_BLKM, mask, plan.rule, plan.backend)

    (o, logsumexp), _ = _others(plan, (k_BLKN, v_BLKM), (), own, visit)
    o, logsumexp = with_sinks(o, logsumexp, sinks_H)
    return o.astype(q_BLHN.dtype), logsumexp


def _backward(plan: AttentionPlan, name: str | None, residuals: tuple[Any, ...], do_BLHM: jax.Array) -> tuple[Any, ...]:
    """Return the gradients. Keys and values are transferred once more, together with the float32 sums of their gradients."""
    del name
    q, k, v, segments, sinks, o, logsumexp = residuals

    def visit(dq: jax.Array, step: Any, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        meeting = _meet(step)
        mask = _mask_of_pieces(meeting, _mask(meeting, q.shape, segments, plan.rule.window))
        (k_there, v_there), rows = map(meeting.keys, block), [meeting.queries(x) for x in (q, o, logsumexp, do_BLHM)]
        arrays = (rows[0], k_there, v_there, *rows[1:])
        more, dk, dv = piece_gradients(*arrays, mask=mask, rule=plan.rule._replace(causal=False), backend=plan.backend)
        return dq + meeting.queries_back(more), (meeting.keys_back(dk), meeting.keys_back(dv))

    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, accumulator_dtype(x.dtype)), (q, k, v))
    dq, dkv = _others(plan, (k, v), zeros[1:], lambda: zeros[0], visit)
    # Last, so that the sums' return overlaps with it; they are twice as large as the first block's keys and values, whose
    # transfer overlaps with nothing.
    own = _mask(_meet(0), q.shape, segments, plan.rule.window)
    mine = piece_gradients(q, k, v, o, logsumexp, do_BLHM, own, plan.rule, plan.backend)
    gradients = jax.tree.map(lambda x, y, z: (x + y).astype(z.dtype), mine, (dq, *dkv), (q, k, v))
    return ((*gradients, None, sinks_gradient(sinks, o, logsumexp, do_BLHM)),)


_opaque_forward = opaque(_forward, (5,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _folded(arrays: tuple[Any, ...], plan: AttentionPlan, name: str | None) -> jax.Array:
    q, k, v, segments, sinks = arrays
    return _forward(q, k, v, segments, sinks, plan)[0]


def _folded_forward(arrays: tuple[Any, ...], plan: AttentionPlan, name: str | None) -> tuple[jax.Array, tuple[Any, ...]]:
    o, logsumexp = _opaque_forward(*arrays, plan)
    o, logsumexp = name_residuals(name, o, logsumexp)
    return o, (*arrays, o, logsumexp)


_folded.defvjp(_folded_forward, _backward)


def context_attention(
    q_BLHN: jax.Array,
    k_BLKN: jax.Array,
    v_BLKM: jax.Array,
    plan: AttentionPlan,
    *,
    segments_BL: jax.Array | None = None,
    sinks_H: jax.Array | None = None,
    residual_name: str | None = None,
) -> jax.Array:
    """`attention` over the whole sequence, of which this device holds L tokens in the order of `share_out(batch, plan.kind)`.

    Inside the manual region. With `context` of size 1 it is `attention`. With ring and gather the backward pass needs the
    queries, keys, values, output and logsumexp of this device, and transfers the others' keys and values again: no remat
    policy can keep them. Collectives over `context` in a layer, with steps = C - 1 or fewer (`needed_steps`):

    - ring: as many ppermutes of keys and values together, forward and again backward, and as many of their float32 gradients;
      backward all but the first and the last carry both.
    - gather: one all_gather each of keys and values, forward and again backward, and one reduce_scatter of each one's gradient
      in the compute dtype.
    - ulysses: an all_to_all each of queries, keys, values and output, and backward the same of their gradients.

    Args:
      q_BLHN: this device's queries; k_BLKN, v_BLKM its keys and values. Positions are already in them.
      plan: from `choose_context_attention` and `choose_backend`; ulysses needs K divisible by the axis's size.
      segments_BL: int32 document numbers of the WHOLE sequence in the devices' order, as `share_out` gives them.
      sinks_H: see `attention`; of this device's heads.
      residual_name: name of the backward pass's residuals, output and logsumexp.

    Returns:
      [B, L, H, M] in the dtype of the queries.

    Raises:
      ValueError: the shapes do not fit.
    """
    check_shapes(q_BLHN, k_BLKN, v_BLKM)
    options = {"backend": plan.backend, "rule": plan.rule, "segments_BL": segments_BL, "residual_name": residual_name}
    context = lax.axis_size("context")
    if context == 1:
        return attention(q_BLHN, k_BLKN, v_BLKM, sinks_H=sinks_H, **options)
    if plan.kind == "ulysses":
        if k_BLKN.shape[2] % context:
            raise ValueError(f"ulysses exchanges heads, but context={context} does not divide {k_BLKN.shape[2]} kv heads")
        q, k, v = (all_to_all(x, "context", dim=2, to_dim=1) for x in (q_BLHN, k_BLKN, v_BLKM))
        if sinks_H is not None:
            sinks_H = lax.dynamic_slice_in_dim(sinks_H, lax.axis_index("context") * q.shape[2], q.shape[2])
        return all_to_all(attention(q, k, v, sinks_H=sinks_H, **options), "context", dim=1, to_dim=2)
    if q_BLHN.shape[1] % 2:
        raise ValueError(f"{plan.kind} attention cuts a device's {q_BLHN.shape[1]} tokens into two pieces; use an even number")
    arrays = (q_BLHN, k_BLKN, v_BLKM, segments_BL, sinks_H)
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves(arrays)), {"context"})
    with jax.named_scope(f"attention_{plan.kind}_{plan.backend}"):
        return _folded(vary(arrays, tuple(sorted(axes))), plan, residual_name)


# ---------------------------------------------------------------------------------------------------------------------
# The choice


def choose_context_attention(
    requested: str,
    *,
    context: int,
    heads: int,
    kv_heads: int,
    sequence_length: int,
    backend: str = "auto",
    **facts: Any,
) -> tuple[str, str]:
    """Return the kind of context attention and the reason, in a line for the log.

    `auto` takes the ring, whose transfers overlap with its compute: in a step a device receives 2P keys and values and
    computes 2P^2 scores per query head, in bf16 P H / K FLOPs per byte. It takes ulysses if the heads allow it and either the
    pieces are so short that transfers would be exposed, or cuDNN could be used on whole sequences but not on pieces. It never
    takes gather, which holds keys and values of the whole length.

    Args:
      requested: auto, ring, gather or ulysses (`sharding.context_attention`).
      context: size of the axis.
      heads, kv_heads: per device, after tensor parallelism.
      sequence_length: length of a whole sequence.
      backend: the requested backend (`model.attention`).
      facts: the other arguments of `cudnn_obstacle`.

    Raises:
      ExplainedError: the kind is unknown, or ulysses was requested and the heads do not allow it.
    """
    if requested not in ("auto", *KINDS):
        raise ExplainedError(f"sharding.context_attention={requested!r}: {nearest(requested, ('auto', *KINDS))}")
    uneven = f"context={context} does not divide the {kv_heads} kv heads of a device"
    if requested == "ulysses" and kv_heads % context:
        raise ExplainedError(f"sharding.context_attention=ulysses exchanges heads, but {uneven}; use ring or gather")
    if requested != "auto":
        return requested, "asked for"
    if context == 1:
        return "ring", "context=1: nothing to exchange"
    piece = sequence_length // (2 * context)
    in_pieces = cudnn_obstacle(sequence_length=sequence_length // context, in_pieces=True, **facts)
    whole = cudnn_obstacle(sequence_length=sequence_length, **facts)
    intensity = piece * heads // kv_heads
    hides = f"pieces of {piece} tokens do {intensity} FLOP a received byte, and from {RING_HIDES_FROM} on transfers hide"
    if kv_heads % context:
        return "ring", f"{uneven}, as ulysses needs; {hides}"
    if backend in ("auto", "cudnn") and bool(in_pieces) != bool(whole):
        return (
            ("ulysses", f"whole sequences can use cuDNN, but {in_pieces}")
            if in_pieces
            else ("ring", f"pieces can use cuDNN, but {whole}")
        )
    return ("ring" if intensity >= RING_HIDES_FROM else "ulysses"), hides
