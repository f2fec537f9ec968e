"""Cross-entropy over a vocabulary that is sharded over `tensor`, in chunks, so that full logits never exist."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxtrain.layout import loss_chunks
from jaxtrain.ops.loops import scan_of_hidden_length
from jaxtrain.sharding import all_gather, reduce_scatter, sum_over, vary

Inputs = Mapping[str, jax.Array]
"""Named per-token floats, [B, L] each."""
TokenLoss = Callable[[jax.Array, Inputs], jax.Array]
"""(log p of the target, inputs) -> the token's loss; elementwise."""
Average = Literal["targets", "sum"]
OF_TOKENS = ("log_probs", "top_ids", "top_log_probs")
"""Names of reports that have a number, or several, for each token."""
IGNORED = -1  # target of a position that carries no loss
MASKED_LOGIT = -1e30


def count_targets(targets: jax.Array) -> jax.Array:
    """Return the number of positions that carry a loss, float32."""
    return jnp.sum(targets != IGNORED, dtype=jnp.float32)


class Logits(NamedTuple):
    """Hidden states times the head: logits."""

    vocab_size: int
    """Higher ids are padding of the table."""
    softcap: float = 0.0
    """Bound c: logits l become c tanh(l / c); 0 for none."""
    temperature: float = 1.0
    """Divides the logits, after the bound."""

    def of(self, x_BLD: jax.Array, head: jax.Array, dims: str = "DV") -> jax.Array:
        """Return this device's share of the logits, float32 [B, L, V/tensor]; MASKED_LOGIT for padding of the vocabulary.

        Args:
          dims: of the head, "DV" or "VD".
        """
        logits = jnp.einsum(f"BLD,{dims}->BLV", x_BLD, head, preferred_element_type=jnp.float32)
        if self.softcap:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        if self.temperature != 1:
            logits = logits / self.temperature
        share = logits.shape[-1]
        if share * lax.axis_size("tensor") <= self.vocab_size:  # no padding; a CPU would copy all logits to mask none
            return logits
        ids = lax.axis_index("tensor") * share + jnp.arange(share)
        return jnp.where(ids < self.vocab_size, logits, MASKED_LOGIT)

    def before_softcap(self, logits: jax.Array, d_logits: jax.Array) -> jax.Array:
        """Return the gradient of x W from that of these logits: d (1 - (l / c)^2) / temperature, with l before it is divided.

        That of padding is zero anyway.
        """
        if self.temperature != 1:
            logits, d_logits = logits * self.temperature, d_logits / self.temperature
        if not self.softcap:
            return d_logits
        return d_logits * (1 - jnp.square(jnp.maximum(logits, -self.softcap) / self.softcap))


def negative_log_likelihood(log_probs: jax.Array, inputs: Inputs) -> jax.Array:
    """Return -log p, the loss of pretraining."""
    del inputs
    return -log_probs


class TokenTerms(NamedTuple):
    """A loss, and further numbers to report, of each token's log-probability."""

    loss: TokenLoss = negative_log_likelihood
    average: Average = "targets"
    """targets: the sum of the losses is divided by the number of targets in the global batch. sum: it is not, since the inputs
    hold the denominators."""
    measures: tuple[tuple[str, TokenLoss], ...] = ()
    """Named numbers of a token, reported as their mean over all targets."""
    keeps_log_probs: bool = False
    """Whether log p of every target is reported too."""
    candidates: str = ""
    """Name of an input [B, L, K] of token ids: loss and measures then get log p of the target and of these, [B, L, 1 + K]."""
    top_k: int = 0
    """Without gradients only: report the most likely next tokens, `top_ids` (float32) and `top_log_probs`, [B, L, top_k]."""


def _chunked(x: jax.Array, targets: jax.Array, inputs: Inputs, chunk: int) -> tuple[jax.Array, jax.Array, Inputs]:
    """x [n, B, c, D] and targets [n, B, tensor * c]: the positions gathered together in each of n chunks."""
    batch, length, width = x.shape
    tensor = lax.axis_size("tensor")
    count, size = loss_chunks(length, chunk, tensor)
    padding = count * size - length
    x = jnp.pad(x, ((0, 0), (0, padding), (0, 0))).reshape(batch, count, size, width)

    def per_token(values: jax.Array, beyond: int) -> jax.Array:
        if values.ndim == 3:
            return jax.vmap(lambda each: per_token(each, beyond), -1, -1)(values)
        values = jnp.pad(values.reshape(batch, tensor, length), ((0, 0), (0, 0), (0, padding)), constant_values=beyond)
        return values.reshape(batch, tensor, count, size).transpose(2, 0, 1, 3).reshape(count, batch, tensor * size)

    return x.transpose(1, 0, 2, 3), per_token(targets, IGNORED), {name: per_token(v, 0) for name, v in inputs.items()}


def _log_partition(logits: jax.Array) -> jax.Array:
    """log sum_v exp(logits) over the whole vocabulary, from each device's share of it; [B, L, V/tensor] -> [B, L]."""
    largest = lax.pmax(vary(lax.stop_gradient(logits.max(-1))), "tensor")
    return largest + jnp.log(sum_over(jnp.exp(logits - largest[..., None]).sum(-1), ("tensor",)))


def _chunk_terms(x: jax.Array, head: jax.Array, targets: jax.Array, to_logits: Logits) -> tuple[jax.Array, ...]:
    """(x over the whole chunk, logits, log Z, one-hot targets) of one chunk; logits and one-hot are this device's share."""
    x = all_gather(x, "tensor", dim=1)
    logits = to_logits.of(x, head)
    ids = lax.axis_index("tensor") * logits.shape[-1] + jnp.arange(logits.shape[-1])
    return x, logits, _log_partition(logits), ids == targets[..., None]


def _log_probs(logits: jax.Array, log_z: jax.Array, one_hot: jax.Array) -> jax.Array:
    """Return log p of the targets, equal on all devices along tensor."""
    return sum_over(jnp.where(one_hot, logits, 0.0).sum(-1), ("tensor",)) - log_z


def _own_logits(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the logits of tokens [B, L, K] that are in this device's share of the vocabulary; 0 for others."""
    places = ids.astype(jnp.int32) - lax.axis_index("tensor") * logits.shape[-1]
    taken = jnp.take_along_axis(logits, jnp.clip(places, 0, logits.shape[-1] - 1), axis=-1)
    return jnp.where((places >= 0) & (places < logits.shape[-1]), taken, 0.0)


def _with_candidates(terms: TokenTerms, log_probs: jax.Array, logits: jax.Array, log_z: jax.Array, inputs: Inputs) -> jax.Array:
    """Return log p of the targets, and of the candidates after them where there are any."""
    if not terms.candidates:
        return log_probs
    others = sum_over(_own_logits(logits, inputs[terms.candidates]), ("tensor",)) - log_z[..., None]
    return jnp.concatenate([log_probs[..., None], others], axis=-1)


def _kept(terms: TokenTerms, log_probs: jax.Array, logits: jax.Array, log_z: jax.Array, counted: jax.Array) -> dict:
    """Return what is reported of each token."""
    kept = {"log_probs": vary(log_probs * counted)} if terms.keeps_log_probs else {}
    if terms.top_k:
        values, ids = lax.top_k(logits, min(terms.top_k, logits.shape[-1]))
        ids = ids + lax.axis_index("tensor") * logits.shape[-1]
        values, ids = (all_gather(array, "tensor", dim=2) for array in (values, ids))
        values, places = lax.top_k(values, terms.top_k)
        ids = jnp.take_along_axis(ids, places, axis=-1).astype(jnp.float32)
        kept |= {"top_ids": vary(ids), "top_log_probs": vary(values - log_z[..., None])}
    return kept


def _chunk_sums(
    log_probs: jax.Array, losses: jax.Array, measured: list[jax.Array], log_z: jax.Array, counted: jax.Array, z_loss: float
) -> jax.Array:
    """[sum of losses, sum of z_loss * (log Z)^2, sum of -log p, sums of measures] of one chunk, equal on all devices along
    tensor.
    """
    z_term = z_loss * jnp.sum(jnp.square(log_z) * counted)
    more = [jnp.sum(jnp.where(counted, values, 0)) for values in measured]
    return jnp.stack([jnp.sum(jnp.where(counted, losses, 0)), z_term, -jnp.sum(log_probs * counted), *more])


def _share(sums: jax.Array) -> jax.Array:
    """Keep the replicated value on tensor index 0, zero elsewhere, so that a later psum counts it once."""
    return jnp.where(lax.axis_index("tensor") == 0, sums, jnp.zeros_like(sums))


def _of_tokens(terms: TokenTerms, scale: jax.Array, log_probs: jax.Array, inputs: Inputs) -> tuple[jax.Array, list[jax.Array]]:
    """Return each token's loss, of which scale * sum is minimised, and its measures."""
    losses = terms.loss(log_probs, inputs)
    losses = losses if terms.average == "targets" else losses / scale
    return losses, [measure(log_probs, inputs) for _, measure in terms.measures]


def _report(terms: TokenTerms, scale: jax.Array, total: jax.Array, kept: dict[str, jax.Array], length: int) -> tuple:
    """(the loss, what is reported) of the sums over all chunks; what is kept of tokens is [n, B, tensor * c, ...]."""
    means = {name: scale * value for name, value in zip(("loss", *dict(terms.measures)), total[2:], strict=True)}
    tensor = lax.axis_size("tensor")
    for name, values in kept.items():
        count, batch, width, *rest = values.shape
        in_order = jnp.moveaxis(values.reshape(count, batch, tensor, width // tensor, *rest), 0, 2)
        in_order = in_order.reshape(batch, tensor, -1, *rest)[:, :, :length]
        means[name] = _share(in_order.reshape(batch, -1, *rest))
    return scale * (total[0] + total[1]), means


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def token_losses(
    x: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    scale: jax.Array,
    to_logits: Logits,
    chunk: int,
    z_loss: float,
    terms: TokenTerms = TokenTerms(),  # noqa: B008, it is frozen
    inputs: Inputs | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """scale * sum_t [loss(log p_t, inputs_t) + z_loss * (log Z_t)^2], with log p_t = logit_target - log Z_t, logits = x W.

    The sum runs over positions whose target is not -1; a global token-weighted mean takes scale = 1 / (targets in the global
    batch). The z term is PaLM's (Chowdhery et al. 2022, section 5). Softmax and sums are float32. The gradients are made
    together with the loss, chunk by chunk, so the head costs three matmuls and no logits are kept or recomputed:
    d logits = scale * (softmax * (2 z_loss log Z - g) + g one_hot), with g = d loss / d log p, which is -1 for the loss of
    pretraining, -log p: then this is the cross-entropy. Where the loss sees candidates too, it is the sum over them all.

    Args:
      x: [B, L/tensor, D], hidden states, this device's slice of the length.
      head: [D, V/tensor].
      targets: int [B, L], the whole length; -1 carries no loss.
      scale: float32 scalar.
      to_logits: the vocabulary's size, and the bound of the logits.
      chunk: positions whose logits exist at one time.
      z_loss: weight of (log Z)^2.
      terms: loss of a token, by default -log p, and what else is reported.
      inputs: float32 [B, L], or [B, L, K], the whole length; no gradient goes into them.

    Returns:
      (the sum, {"loss": scale * sum of -log p, each measure likewise, "log_probs" [B, L] if kept, 0 where there is no target,
      and the most likely tokens if asked for}): this device's share, to be summed over all mesh axes (what is of single tokens
      over tensor and pipe).
    """
    xs = _chunked(x, targets, inputs or {}, chunk)

    def step(total: jax.Array, chunk_inputs: tuple) -> tuple[jax.Array, dict[str, jax.Array]]:
        x, targets, inputs = chunk_inputs
        _, logits, log_z, one_hot = _chunk_terms(x, head, targets, to_logits)
        counted, log_probs = targets != IGNORED, _log_probs(logits, log_z, one_hot)
        of_all = _with_candidates(terms, log_probs, logits, log_z, inputs)
        sums = _chunk_sums(log_probs, *_of_tokens(terms, scale, of_all, inputs), log_z, counted, z_loss)
        return total + vary(_share(sums)), _kept(terms, log_probs, logits, log_z, counted)

    total, kept = lax.scan(step, vary(jnp.zeros(3 + len(terms.measures))), xs)
    return _report(terms, scale, total, kept, x.shape[1])


def _token_losses_forward(
    x: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    scale: jax.Array,
    to_logits: Logits,
    chunk: int,
    z_loss: float,
    terms: TokenTerms,
    inputs: Inputs | None,
) -> tuple:
    length = x.shape[1]

    def step(carry: tuple, chunk_inputs: tuple) -> tuple[tuple, tuple]:
        total, d_head = carry
        x, targets, inputs = chunk_inputs
        counted = targets != IGNORED
        x, logits, log_z, one_hot = _chunk_terms(x, head, targets, to_logits)
        log_probs = _log_probs(logits, log_z, one_hot)
        of_all = _with_candidates(terms, log_probs, logits, log_z, inputs)
        # Typed as equal along tensor, their gradient would be summed over it where an input of the objective varies.
        losses, pull, measured = jax.vjp(lambda log_ps: _of_tokens(terms, scale, log_ps, inputs), vary(of_all), has_aux=True)
        g_all = pull(jnp.ones_like(losses))[0]
        g = jnp.where(counted, g_all[..., 0] if terms.candidates else g_all, 0)[..., None]
        g_sum, of_others = g, 0.0
        if terms.candidates:
            g_others = jnp.where(counted[..., None], g_all[..., 1:], 0)
            g_sum = g + g_others.sum(-1, keepdims=True)
            of_others = jax.vjp(lambda logits: _own_logits(logits, inputs[terms.candidates]), logits)[1](g_others)[0]
        softmax = jnp.exp(logits - log_z[..., None])
        d_logits = softmax * (2 * z_loss * log_z[..., None] - g_sum) + g * one_hot
        d_logits = (d_logits + of_others if terms.candidates else d_logits) * (counted * scale)[..., None]
        d_logits = to_logits.before_softcap(logits, d_logits).astype(x.dtype)
        d_head = d_head + jnp.einsum("BLD,BLV->DV", x, d_logits, preferred_element_type=jnp.float32)
        dx = reduce_scatter(jnp.einsum("BLV,DV->BLD", d_logits, head), "tensor", dim=1)
        sums = _chunk_sums(log_probs, losses, measured, log_z, counted, z_loss)
        return (total + vary(_share(sums)), d_head), (dx, _kept(terms, log_probs, logits, log_z, counted))

    # Zeros of its own: XLA would make them together with those of the table's gradient, and hold both until the step's end.
    zero = lax.optimization_barrier(jnp.zeros(()))
    start = vary((jnp.zeros(3 + len(terms.measures)), jnp.broadcast_to(zero, head.shape)))
    (total, d_head), (dx, kept) = scan_of_hidden_length(step, start, _chunked(x, targets, inputs or {}, chunk))
    dx = dx.transpose(1, 0, 2, 3).reshape(x.shape[0], -1, x.shape[2])[:, :length]
    return _report(terms, scale, total, kept, length), (dx, d_head.astype(head.dtype), scale, inputs)


def _token_losses_backward(
    to_logits: Logits, chunk: int, z_loss: float, terms: TokenTerms, kept: tuple, cotangents: tuple
) -> tuple[Any, ...]:
    """Return the cotangents; that of the loss is the same on all devices along tensor, since the loss is summed over them."""
    dx, d_head, scale, inputs = kept
    factor = cotangents[0]
    return (
        dx * factor.astype(dx.dtype),
        d_head * factor.astype(d_head.dtype),
        None,
        *jax.tree.map(jnp.zeros_like, (scale, inputs)),
    )


token_losses.defvjp(_token_losses_forward, _token_losses_backward)
