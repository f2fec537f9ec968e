"""Preferences: the chosen answer more likely than the rejected one, compared with a reference model.

A pair is two documents of one row: the odd one (1, 3, ...) is chosen, the even one after it rejected.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxtrain.config import DpoConfig
from jaxtrain.objectives.kinds import Batch, SequenceObjective, sums_of_segments

REFERENCE = "reference_log_probs"


def dpo_objective(dpo: DpoConfig) -> SequenceObjective:
    """Return the objective of preferences; it wants log p under the reference, where there is one."""
    is_compared = dpo.reference != "none" and dpo.loss != "orpo"
    return SequenceObjective(functools.partial(preference_loss, dpo), (REFERENCE,) if is_compared else ())


def preference_loss(dpo: DpoConfig, log_probs: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the mean loss of a pair, and metrics.

    With h = (log p(chosen) - log ref(chosen)) - (log p(rejected) - log ref(rejected)), sums over an answer's tokens,

    - sigmoid: -(1 - e) log sigma(beta h) - e log sigma(-beta h), e = label_smoothing (Rafailov et al. 2023, arXiv:2305.18290,
      equation 7; Mitchell 2023 for e);
    - ipo: (h - 1 / (2 beta))^2, with means over an answer's tokens in h (Azar et al. 2023, arXiv:2310.12036, equation 17; the
      means are those of its authors' erratum, as in `trl`);
    - orpo: -log p(chosen) - beta log sigma(log odds(chosen) - log odds(rejected)), means over tokens, odds = p / (1 - p), the
      first term a mean over all chosen tokens (Hong et al. 2024, arXiv:2403.07691, equation 6).
    """
    counted = (batch["targets"] >= 0).astype(jnp.float32)
    tokens = sums_of_segments(counted, batch["segments"])
    own = sums_of_segments(log_probs * counted, batch["segments"])
    reference = sums_of_segments(batch[REFERENCE] * counted, batch["segments"]) if REFERENCE in batch else jnp.zeros_like(own)
    means = dpo.loss in ("ipo", "orpo")
    (chosen, rejected), (chosen_tokens, rejected_tokens) = _pairs(own - reference), _pairs(tokens)
    is_pair = (chosen_tokens > 0) & (rejected_tokens > 0)
    if means:
        chosen, rejected = chosen / jnp.maximum(chosen_tokens, 1), rejected / jnp.maximum(rejected_tokens, 1)
    pairs = jnp.maximum(jnp.sum(is_pair), 1)

    def mean(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(is_pair, values, 0)) / pairs

    h = chosen - rejected
    likelihood = jnp.zeros(())
    if dpo.loss == "sigmoid":
        e = dpo.label_smoothing
        losses = -(1 - e) * jax.nn.log_sigmoid(dpo.beta * h) - e * jax.nn.log_sigmoid(-dpo.beta * h)
    elif dpo.loss == "ipo":
        losses = jnp.square(h - 1 / (2 * dpo.beta))
    else:
        h = _log_odds(jnp.where(is_pair, chosen, -1.0)) - _log_odds(jnp.where(is_pair, rejected, -1.0))
        losses = -dpo.beta * jax.nn.log_sigmoid(h)
        likelihood = -jnp.sum(jnp.where(is_pair, _pairs(own)[0], 0)) / jnp.maximum(jnp.sum(chosen_tokens * is_pair), 1)
    scale = 1.0 if dpo.loss == "orpo" else dpo.beta
    metrics = {
        "preference_accuracy": mean(h > 0),
        "reward_margin": mean(scale * h),
        "reward_chosen": mean(scale * chosen),
        "reward_rejected": mean(scale * rejected),
        "pairs": jnp.sum(is_pair, dtype=jnp.float32),
    }
    return mean(losses) + likelihood, metrics


def _pairs(of_segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (of the chosen, of the rejected documents), [B, pairs], of [B, 1 + documents]."""
    return of_segments[:, 1:-1:2], of_segments[:, 2::2]


def _log_odds(log_p: jax.Array) -> jax.Array:
    return log_p - jnp.log1p(-jnp.exp(jnp.minimum(log_p, -1e-6)))
