"""Choose a token's experts and their weights; compute the losses that keep the router balanced.

Everything here is float32. Shape letters: B sequences, L this device's positions of each (a share over `context`), E experts, K
experts of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxtrain.config import MoEConfig
from jaxtrain.sharding import once, sum_over


class Routing(NamedTuple):
    """The router's decision."""

    experts_BLK: jax.Array
    """int32: the experts of each token, best first; equal scores go to the lower number, on every layout."""
    weights_BLK: jax.Array
    """The weights of these experts in the token's output."""
    affinities_BLE: jax.Array
    """Scores normalised over the experts, for the balance loss."""


def _closed_experts_masked(choice_BLE: jax.Array, moe: MoEConfig) -> jax.Array:
    """-inf for experts outside the token's `groups_per_token` best groups, by `group_score`."""
    if moe.groups_per_token == moe.groups:
        return choice_BLE
    *lead, experts = choice_BLE.shape
    grouped = choice_BLE.reshape(*lead, moe.groups, experts // moe.groups)
    best = grouped.max(-1) if moe.group_score == "max" else lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(-1)
    _, open_groups = lax.top_k(best, moe.groups_per_token)
    is_open = (open_groups[..., None] == jnp.arange(moe.groups)).any(-2)
    return jnp.where(is_open[..., None], grouped, -jnp.inf).reshape(choice_BLE.shape)


def route(logits_BLE: jax.Array, bias_E: jax.Array | None, moe: MoEConfig, given_BLK: jax.Array | None = None) -> Routing:
    """Return the top k of softmax or sigmoid scores s: chosen by s + bias, weighted by s alone.

    weights = weight_scale * s_e / (sum of the chosen s, if normalize_weights). With groups only the experts of the token's
    best groups are open (DeepSeek-V3, arXiv:2412.19437, section 2.1.2). No gradient goes through the choice or to the bias.

    Args:
      logits_BLE: float32.
      bias_E: float32, or None.
      given_BLK: int32 experts to take in place of the top k; -1 where the top k stand. Weights are of the scores here as well.
    """
    if moe.router == "softmax":
        scores = affinities = jax.nn.softmax(logits_BLE, axis=-1)
    else:
        scores = jax.nn.sigmoid(logits_BLE)
        affinities = scores / scores.sum(-1, keepdims=True)
    choice = lax.stop_gradient(scores if bias_E is None else scores + bias_E)
    _, experts = lax.top_k(_closed_experts_masked(choice, moe), moe.experts_per_token)
    if given_BLK is not None:
        experts = jnp.where(given_BLK >= 0, given_BLK, experts)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if moe.normalize_weights:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return Routing(experts, weights * moe.weight_scale, affinities)


def _choices_BE(experts_BLK: jax.Array, counted_BL: jax.Array, num_experts: int) -> jax.Array:
    """Return how often each expert was chosen by the counted tokens of each sequence, float32."""
    chosen = (experts_BLK[..., None] == jnp.arange(num_experts)) & counted_BL[..., None, None]
    return chosen.sum((1, 2), dtype=jnp.float32)


def balance_loss(routing: Routing, counted_BL: jax.Array) -> jax.Array:
    """sum_s n_s (E / K) sum_e f_e P_e over sequences s: n_s when experts are in perfect balance, up to n_s E / K when not.

    Of the n_s counted tokens of a sequence, f_e is the share that chose expert e (so sum_e f_e = K), and P_e the mean of its
    normalised score; the gradient goes through P alone. This is n_s times the sequence-wise loss of DeepSeek-V3
    (arXiv:2412.19437, equations 17 to 20) without its factor alpha. A sequence's sums run over `context`, so that it is one
    sequence however it is cut, and a sum over sequences divides by nothing that a microbatch or a mesh could change: times
    1 / (counted tokens of the global batch) it is their token-weighted mean.

    Args:
      counted_BL: bool, whether the token carries a loss.

    Returns:
      float32 scalar, this device's share: to be summed over all mesh axes.
    """
    *_, num_experts = routing.affinities_BLE.shape
    counted = counted_BL.sum(1, dtype=jnp.float32)
    scores_BE = jnp.where(counted_BL[..., None], routing.affinities_BLE, 0).sum(1)
    choices_BE = lax.stop_gradient(_choices_BE(routing.experts_BLK, counted_BL, num_experts))
    n_B, p_BE, c_BE = (sum_over(x, ("context",)) for x in (counted, scores_BE, choices_BE))
    factor = num_experts / routing.experts_BLK.shape[-1]
    return once(factor * jnp.sum(c_BE * p_BE / jnp.maximum(n_B, 1)[:, None]), ("context", "tensor"))


def router_z_loss(logits_BLE: jax.Array, counted_BL: jax.Array) -> jax.Array:
    """sum_t logsumexp(logits_t)^2 over counted tokens (ST-MoE, arXiv:2202.08906, equation 5): this device's share."""
    log_z = jax.nn.logsumexp(logits_BLE, axis=-1)
    return once(jnp.sum(jnp.square(log_z), where=counted_BL), ("tensor",))


def expert_load(experts_BLK: jax.Array, counted_BL: jax.Array, num_experts: int) -> jax.Array:
    """Return how many counted tokens chose each expert, float32 [E]: this device's share."""
    return once(_choices_BE(experts_BLK, counted_BL, num_experts).sum(0), ("tensor",))
