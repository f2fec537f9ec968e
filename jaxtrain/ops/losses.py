"""Cross-entropy over a vocabulary that is sharded over `tensor`, in chunks, so that full logits never exist."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxtrain.sharding import all_gather, reduce_scatter, sum_over, vary

IGNORED = -1  # target of a position that carries no loss
MASKED_LOGIT = -1e30


def count_targets(targets: jax.Array) -> jax.Array:
    """Return the number of positions that carry a loss, float32."""
    return jnp.sum(targets != IGNORED, dtype=jnp.float32)


def mask_padded_vocabulary(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Return the logits [..., V/tensor] with the ids beyond vocab_size (the padding of the table) made impossible."""
    start = lax.axis_index("tensor") * logits.shape[-1]
    return jnp.where(start + jnp.arange(logits.shape[-1]) < vocab_size, logits, MASKED_LOGIT)


def _chunked(x: jax.Array, targets: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """x [n, B, c, D] and targets [n, B, tensor * c]: the positions that are gathered together in each of n chunks."""
    batch, length, width = x.shape
    tensor = lax.axis_size("tensor")
    count = math.ceil(length / max(1, min(chunk // tensor, length)))
    size = math.ceil(length / count)
    padding = count * size - length
    x = jnp.pad(x, ((0, 0), (0, padding), (0, 0))).reshape(batch, count, size, width)
    targets = jnp.pad(targets.reshape(batch, tensor, length), ((0, 0), (0, 0), (0, padding)), constant_values=IGNORED)
    targets = targets.reshape(batch, tensor, count, size)
    return x.transpose(1, 0, 2, 3), targets.transpose(2, 0, 1, 3).reshape(count, batch, tensor * size)


def _log_partition(logits: jax.Array) -> jax.Array:
    """log sum_v exp(logits) over the whole vocabulary, from each device's share of it; [B, L, V/tensor] -> [B, L]."""
    largest = lax.pmax(vary(lax.stop_gradient(logits.max(-1))), "tensor")
    return largest + jnp.log(sum_over(jnp.exp(logits - largest[..., None]).sum(-1), ("tensor",)))


def _chunk_terms(x: jax.Array, head: jax.Array, targets: jax.Array, vocab_size: int) -> tuple[jax.Array, ...]:
    """(x over the whole chunk, logits, log Z, one-hot targets) of one chunk; logits and one-hot are this device's share."""
    x = all_gather(x, "tensor", dim=1)
    logits = jnp.einsum("BLD,DV->BLV", x, head, preferred_element_type=jnp.float32)
    logits = mask_padded_vocabulary(logits, vocab_size)
    ids = lax.axis_index("tensor") * logits.shape[-1] + jnp.arange(logits.shape[-1])
    return x, logits, _log_partition(logits), ids == targets[..., None]


def _chunk_sums(logits: jax.Array, log_z: jax.Array, one_hot: jax.Array, counted: jax.Array, z_loss: float) -> jax.Array:
    """[sum of negative log likelihood, sum of z_loss * (log Z)^2] of one chunk, equal on all devices along tensor."""
    target_logit = sum_over(jnp.where(one_hot, logits, 0.0).sum(-1), ("tensor",))
    return jnp.stack([jnp.sum((log_z - target_logit) * counted), z_loss * jnp.sum(jnp.square(log_z) * counted)])


def _share(sums: jax.Array) -> jax.Array:
    """Counts what all devices along tensor hold alike once: whole on the first, zero on the others."""
    return jnp.where(lax.axis_index("tensor") == 0, sums, jnp.zeros_like(sums))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(
    x: jax.Array, head: jax.Array, targets: jax.Array, scale: jax.Array, vocab_size: int, chunk: int, z_loss: float
) -> tuple[jax.Array, jax.Array]:
    """scale * sum_t [-log p(target_t) + z_loss * (log Z_t)^2], with log p = logit_target - log Z, logits = x W.

    The sum runs over positions whose target is not -1; a global token-weighted mean takes scale = 1 / (targets in the global
    batch). The z term is PaLM's (Chowdhery et al. 2022, section 5). Softmax and sums are float32. The gradients are made
    together with the loss, chunk by chunk, so the head costs three matmuls and no logits are kept or recomputed:
    d logits = scale * (softmax * (1 + 2 z_loss log Z) - one_hot).

    Args:
      x: [B, L/tensor, D], hidden states, this device's slice of the length.
      head: [D, V/tensor].
      targets: int [B, L], the whole length; -1 carries no loss.
      scale: float32 scalar.
      vocab_size: ids from here on are padding of the table.
      chunk: positions whose logits exist at one time.
      z_loss: weight of (log Z)^2.

    Returns:
      (the loss, its first term alone): this device's share, to be summed over all mesh axes.
    """
    xs = _chunked(x, targets, chunk)

    def step(total: jax.Array, chunk_inputs: tuple) -> tuple[jax.Array, None]:
        x, targets = chunk_inputs
        _, logits, log_z, one_hot = _chunk_terms(x, head, targets, vocab_size)
        return total + vary(_share(_chunk_sums(logits, log_z, one_hot, targets != IGNORED, z_loss))), None

    total, _ = lax.scan(step, vary(jnp.zeros(2)), xs)
    return scale * total.sum(), scale * total[0]


def _cross_entropy_forward(
    x: jax.Array, head: jax.Array, targets: jax.Array, scale: jax.Array, vocab_size: int, chunk: int, z_loss: float
) -> tuple:
    length = x.shape[1]

    def step(carry: tuple, chunk_inputs: tuple) -> tuple[tuple, jax.Array]:
        total, d_head = carry
        x, targets = chunk_inputs
        counted = targets != IGNORED
        x, logits, log_z, one_hot = _chunk_terms(x, head, targets, vocab_size)
        softmax = jnp.exp(logits - log_z[..., None])
        d_logits = (softmax * (1 + 2 * z_loss * log_z[..., None]) - one_hot) * (counted * scale)[..., None]
        d_logits = d_logits.astype(x.dtype)
        d_head = d_head + jnp.einsum("BLD,BLV->DV", x, d_logits, preferred_element_type=jnp.float32)
        dx = reduce_scatter(jnp.einsum("BLV,DV->BLD", d_logits, head), "tensor", dim=1)
        return (total + vary(_share(_chunk_sums(logits, log_z, one_hot, counted, z_loss))), d_head), dx

    start = vary((jnp.zeros(2), jnp.zeros(head.shape, jnp.float32)))
    (total, d_head), dx = lax.scan(step, start, _chunked(x, targets, chunk))
    dx = dx.transpose(1, 0, 2, 3).reshape(x.shape[0], -1, x.shape[2])[:, :length]
    return (scale * total.sum(), scale * total[0]), (dx, d_head.astype(head.dtype), targets, scale)


def _cross_entropy_backward(vocab_size: int, chunk: int, z_loss: float, kept: tuple, cotangents: tuple) -> tuple:
    """Return the cotangent of the loss is the same on all devices along tensor, since the loss is summed over them."""
    dx, d_head, _, scale = kept
    factor = cotangents[0]
    return dx * factor.astype(dx.dtype), d_head * factor.astype(d_head.dtype), None, jnp.zeros_like(scale)


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
