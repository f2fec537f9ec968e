"""The order in which the devices of the `context` axis hold a sequence's tokens, and how a batch is brought into it.

The batch arrives in contiguous shares. Ulysses leaves them so. Ring and gather use the zigzag order: the sequence is cut into
2C pieces, C the size of the axis, and device c holds pieces c and 2C - 1 - c, in this order. A causal query in piece p sees p +
1/2 pieces, so a device's two pieces see 2C together, on every device: equal work. (Contiguous shares would give the last device
nearly twice the mean.) The order is that of Megatron-LM's and of "Striped Attention"'s (arXiv:2311.09431) load balance; here
whole pieces stay contiguous, so that fused kernels can work on them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtrain.sharding import all_gather

IN_PIECES = ("ring", "gather")  # kinds of context attention that go piece by piece, in zigzag order


def zigzag_pieces(device: Any, context: int) -> tuple[Any, Any]:
    """Return the two of 2 x context pieces that a device holds, in its order: (c, 2C - 1 - c)."""
    return device, 2 * context - 1 - device


def zigzag_order(context: int) -> np.ndarray:
    """Return the pieces in the devices' order, int32 [2C]."""
    return np.array([piece for device in range(context) for piece in zigzag_pieces(device, context)], np.int32)


def places_L(device: Any, context: int, length: int) -> jax.Array:
    """Return the sequence index of each of a device's `length` tokens in zigzag order, int32 [length]."""
    piece, within = length // 2, jnp.arange(length // 2, dtype=jnp.int32)
    return jnp.concatenate([piece * p + within for p in zigzag_pieces(device, context)])


def find_place(place: jax.Array, kind: str, length: int, context: int) -> tuple[jax.Array, jax.Array]:
    """Return the device that holds a sequence index, and the token's index among the `length` tokens there."""
    if kind not in IN_PIECES:
        return place // length, place % length
    piece, within = place // (length // 2), place % (length // 2)
    is_second = piece >= context
    return jnp.where(is_second, 2 * context - 1 - piece, piece), within + jnp.where(is_second, length // 2, 0)


def share_out(batch: dict[str, jax.Array], kind: str) -> dict[str, jax.Array]:
    """Return this device's tokens of a batch in the order of a kind of context attention, inside the manual region.

    For ring and gather one all_gather over `context` of all arrays together, then a slice; for ulysses the tokens stay
    in place, and only segments are gathered.

    Args:
      batch: int32 or float32 arrays [B, L / C], or [B, L / C, K], this device's contiguous share.

    Returns:
      The same names and shapes; but `segments`, if given, is [B, L], of the whole sequence in the devices' order.
    """
    context, names = lax.axis_size("context"), list(batch)
    if context == 1:
        return batch
    if kind not in IN_PIECES:
        whole = {"segments": all_gather(batch["segments"], "context", dim=1)} if "segments" in batch else {}
        return batch | whole
    with jax.named_scope("zigzag"):
        bits = {name: lax.bitcast_convert_type(array, jnp.int32) for name, array in batch.items()}
        slices = [array[None] if array.ndim == 2 else jnp.moveaxis(array, -1, 0) for array in bits.values()]
        ends = np.cumsum([len(each) for each in slices])
        stacked_TBL = jnp.concatenate(slices)
        count, rows, length = stacked_TBL.shape
        pieces = all_gather(stacked_TBL, "context", dim=2).reshape(count, rows, 2 * context, length // 2)
        ordered_TBL = pieces[:, :, zigzag_order(context)].reshape(count, rows, context * length)
        share_TBL = lax.dynamic_slice_in_dim(ordered_TBL, lax.axis_index("context") * length, length, axis=2)
        share = {}
        for name, of_name in zip(names, jnp.split(share_TBL, ends[:-1]), strict=True):
            own = of_name[0] if batch[name].ndim == 2 else jnp.moveaxis(of_name, 0, -1)
            share[name] = lax.bitcast_convert_type(own, batch[name].dtype)
        if "segments" in batch:
            share["segments"] = ordered_TBL[ends[names.index("segments")] - 1]
    return share


def in_sequence_order(array: jax.Array, kind: str, context: int) -> jax.Array:
    """Return a global array [B, L, ...] of tokens in the devices' order as one in the order of the sequence."""
    if context == 1 or kind not in IN_PIECES:
        return array
    rows, length, *rest = array.shape
    pieces = array.reshape(rows, 2 * context, length // (2 * context), *rest)
    return pieces[:, np.argsort(zigzag_order(context))].reshape(array.shape)
