"""Reinforcement: tokens of the model's own answers, weighted by how much better their answer was than its group's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxtrain.config import GrpoConfig
from jaxtrain.objectives.kinds import Objective
from jaxtrain.ops.losses import Inputs

ADVANTAGES, WEIGHTS, OLD, SAMPLER, REFERENCE = (
    "advantages",
    "weights",
    "old_log_probs",
    "sampler_log_probs",
    "reference_log_probs",
)


def grpo_objective(grpo: GrpoConfig) -> Objective:
    """Return the clipped objective of policy gradients (Schulman et al. 2017; Shao et al. 2024, arXiv:2402.03300, equation 3).

    With r = p / p_old, advantage A, and w = 1 / the denominator,

        loss = i w (-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)) + kl w (ref / p - log(ref / p) - 1),

    where i = min(p_old / p_sampler, importance_cap) corrects for what the sampler computed otherwise (truncated importance
    sampling, Yao et al. 2025). Where `old_log_probs` is not a number, p_old is p itself: r is 1, exactly.
    """

    def old(log_p: jax.Array, inputs: Inputs) -> jax.Array:
        given = inputs[OLD]
        return jnp.where(jnp.isnan(given), lax.stop_gradient(log_p), given)

    def ratio(log_p: jax.Array, inputs: Inputs) -> jax.Array:
        return jnp.exp(log_p - old(log_p, inputs))

    def divergence(log_p: jax.Array, inputs: Inputs) -> jax.Array:
        """Return Schulman's estimate of KL(p | ref): e^d - d - 1, d = log(ref / p)."""
        difference = inputs[REFERENCE] - log_p
        return jnp.exp(difference) - difference - 1

    def loss(log_p: jax.Array, inputs: Inputs) -> jax.Array:
        r, advantage = ratio(log_p, inputs), inputs[ADVANTAGES]
        gain = jnp.minimum(r * advantage, jnp.clip(r, 1 - grpo.clip_low, 1 + grpo.clip_high) * advantage)
        importance = jnp.minimum(jnp.exp(old(log_p, inputs) - inputs[SAMPLER]), grpo.importance_cap)
        penalty = grpo.kl * divergence(log_p, inputs) if grpo.kl else 0.0
        return inputs[WEIGHTS] * (penalty - lax.stop_gradient(importance) * gain)

    def clipped(log_p: jax.Array, inputs: Inputs) -> jax.Array:
        r, advantage = ratio(log_p, inputs), inputs[ADVANTAGES]
        outside = jnp.where(advantage > 0, r > 1 + grpo.clip_high, r < 1 - grpo.clip_low)
        return (outside & (advantage != 0)).astype(jnp.float32)

    def sampler_difference(log_p: jax.Array, inputs: Inputs) -> jax.Array:
        return jnp.abs(old(log_p, inputs) - inputs[SAMPLER])

    def sampler_outside(log_p: jax.Array, inputs: Inputs) -> jax.Array:
        factor = jnp.exp(old(log_p, inputs) - inputs[SAMPLER])
        return ((factor < 0.9) | (factor > 1.1)).astype(jnp.float32)

    def sampler_kl(log_p: jax.Array, inputs: Inputs) -> jax.Array:
        """Return the same estimate of KL(sampler | p_old)."""
        difference = old(log_p, inputs) - inputs[SAMPLER]
        return jnp.exp(difference) - difference - 1

    def ratio_change(log_p: jax.Array, inputs: Inputs) -> jax.Array:
        """Return r - 1, whose mean in the first update is 0 to the bit."""
        return ratio(log_p, inputs) - 1

    measures = {"ratio_change": ratio_change, "clipped": clipped, "sampler_difference": sampler_difference}
    measures |= {"sampler_outside": sampler_outside, "sampler_kl": sampler_kl} | ({"kl": divergence} if grpo.kl else {})
    inputs = (ADVANTAGES, WEIGHTS, OLD, SAMPLER, *((REFERENCE,) if grpo.kl else ()))
    return Objective(loss, inputs, "sum", measures, grpo.temperature, keeps_log_probs=True)
