"""Distillation: the student's probabilities of the tokens that the teacher holds most likely."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxtrain.config import DistillConfig
from jaxtrain.objectives.kinds import Objective
from jaxtrain.ops.losses import Inputs

TEACHER_IDS, TEACHER_LOG_PROBS = "teacher_ids", "teacher_log_probs"
LEAST_REST = 1e-6


def distill_objective(distill: DistillConfig) -> Objective:
    """Return w KL(q || p) + (1 - w) (-log p of the target), w = weight (Hinton et al. 2015, arXiv:1503.02531).

    q is the teacher's distribution over its top_k tokens and all others as one more, p the student's over the same; so the sum
    is a lower bound of the divergence over the whole vocabulary, with a gradient that moves no mass where the teacher has none.
    """

    def divergence(log_probs: jax.Array, inputs: Inputs) -> jax.Array:
        log_q, log_p = inputs[TEACHER_LOG_PROBS], log_probs[..., 1:]
        of_top = jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)
        q_rest, p_rest = (jnp.maximum(1 - jnp.exp(log_x).sum(-1), LEAST_REST) for log_x in (log_q, log_p))
        return of_top + q_rest * (jnp.log(q_rest) - jnp.log(p_rest))

    def loss(log_probs: jax.Array, inputs: Inputs) -> jax.Array:
        return distill.weight * divergence(log_probs, inputs) - (1 - distill.weight) * log_probs[..., 0]

    def mass(log_probs: jax.Array, inputs: Inputs) -> jax.Array:
        return jnp.exp(inputs[TEACHER_LOG_PROBS]).sum(-1)

    names = (TEACHER_IDS, TEACHER_LOG_PROBS)
    return Objective(
        loss,
        names,
        measures={"teacher_divergence": divergence, "teacher_mass": mass},
        candidates=TEACHER_IDS,
        widths=dict.fromkeys(names, distill.top_k),
    )
