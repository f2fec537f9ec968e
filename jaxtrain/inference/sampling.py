"""Choose the next token from logits, each row by its own settings, the same on every mesh and beside any other rows."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Choice(NamedTuple):
    """Settings of each row; a row's settings and its own tokens alone decide its next one."""

    temperature: jax.Array
    """float32 [B]; 0 takes the most likely token."""
    top_k: jax.Array
    """int32 [B]; only the k most likely tokens; 0: all."""
    top_p: jax.Array
    """float32 [B]; only the most likely tokens whose probabilities reach p together; 1: all (Holtzman et al. 2019,
    arXiv:1904.09751)."""
    min_p: jax.Array
    """float32 [B]; only tokens of at least this times the highest probability; 0: all (arXiv:2407.01082)."""
    penalty: jax.Array
    """float32 [B]; positive logits of tokens that the row holds are divided by this, negative ones multiplied; 1: none
    (Keskar et al. 2019, arXiv:1909.05858)."""
    seed: jax.Array
    """uint32 [B]."""
    policy_temperature: jax.Array
    """float32 [B]; divides the logits of the reported log-probabilities."""


def penalised(logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array) -> jax.Array:
    """Return the logits with the repetition penalty on the tokens that each row holds."""
    penalty_B1 = penalty_B[:, None]
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1), logits_BV)


def _drawn(logits_BV: jax.Array, choice: Choice, number_B: jax.Array) -> jax.Array:
    """Draw from softmax(logits / temperature), restricted by top_k, top_p and min_p, in this order; [B]."""
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    scaled_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1) / jnp.maximum(choice.temperature, 1e-6)[:, None]
    rank = jnp.arange(logits_BV.shape[-1])
    most_B1 = jnp.where(choice.top_k > 0, choice.top_k, logits_BV.shape[-1])[:, None]
    p_BV = jax.nn.softmax(jnp.where(rank < most_B1, scaled_BV, -jnp.inf), axis=-1)
    open_BV = (rank < most_B1) & (jnp.cumsum(p_BV, axis=-1) - p_BV < choice.top_p[:, None])
    open_BV = (open_BV & (p_BV >= choice.min_p[:, None] * p_BV[:, :1])) | (rank == 0)

    def noise(seed: jax.Array, number: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), number)
        return jax.random.gumbel(key, logits_BV.shape[-1:])

    noisy_BV = jnp.where(open_BV, scaled_BV + jax.vmap(noise)(choice.seed, number_B), -jnp.inf)
    return jnp.take_along_axis(order_BV, noisy_BV.argmax(-1)[:, None], axis=-1)[:, 0]


def choose(logits_BV: jax.Array, seen_BV: jax.Array, choice: Choice, number_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (the next token of each row, its log p under softmax(logits / policy_temperature)), int32 and float32 [B].

    Args:
      seen_BV: bool, the tokens that the row holds.
      number_B: int32, how many tokens the row has been given so far: with the seed it decides the random numbers.
    """
    adjusted_BV = penalised(logits_BV, seen_BV, choice.penalty)
    likeliest_B = adjusted_BV.argmax(-1)
    drawn_B = lax.cond((choice.temperature > 0).any(), lambda: _drawn(adjusted_BV, choice, number_B), lambda: likeliest_B)
    token_B = jnp.where(choice.temperature > 0, drawn_B, likeliest_B).astype(jnp.int32)
    log_p_BV = jax.nn.log_softmax(logits_BV / choice.policy_temperature[:, None], axis=-1)
    return token_B, jnp.take_along_axis(log_p_BV, token_B[:, None], axis=-1)[:, 0]
