"""Advantages of answers within the group of their prompt, and the weights of their tokens in the loss."""

from __future__ import annotations

import numpy as np

EPSILON = 1e-4
"""Added to the standard deviation of a group; `trl` has the same."""


def group_advantages(rewards_PG: np.ndarray, kind: str) -> np.ndarray:
    """Return the advantage of each answer, float32 [prompts, group_size]; exactly 0 where all rewards of a group are equal.

    grpo: (r - mean) / (std + 1e-4), std over G - 1 (Shao et al. 2024, arXiv:2402.03300). dr_grpo: r - mean (Liu et al. 2025,
    arXiv:2503.20783). rloo: r - the mean of the group's other rewards (Ahmadian et al. 2024, arXiv:2402.14740).
    """
    rewards = np.asarray(rewards_PG, np.float64)
    size = rewards.shape[1]
    centred = np.where(no_spread(rewards)[:, None], 0.0, rewards - rewards.mean(1, keepdims=True))
    if kind == "grpo":
        centred /= np.sqrt(np.sum(centred**2, axis=1, keepdims=True) / (size - 1)) + EPSILON
    if kind == "rloo":
        centred *= size / (size - 1)
    return centred.astype(np.float32)


def no_spread(rewards_PG: np.ndarray) -> np.ndarray:
    """Return which groups have equal rewards, and so teach nothing; bool [prompts]."""
    return np.ptp(rewards_PG, axis=1) == 0


def answer_weights(lengths_N: np.ndarray, counted_N: np.ndarray, normaliser: str, most: int) -> np.ndarray:
    """Return the weight of each token of each answer in the loss, a sum over the whole batch; float32 [answers].

    answer: 1 / (answers x tokens of this one), a mean over answers of means (GRPO). token: 1 / all tokens, the mean over
    tokens (DAPO, arXiv:2503.14476). constant: 1 / (answers x `most`): an answer's length does not count (Dr. GRPO).

    Args:
      lengths_N: tokens of each answer.
      counted_N: bool; the others weigh nothing, and stand in no denominator.
      most: objective.grpo.max_new_tokens.
    """
    lengths = np.maximum(lengths_N, 1).astype(np.float64)
    count = max(1, int(counted_N.sum()))
    tokens = {"answer": count * lengths, "token": max(1, int(lengths_N[counted_N].sum())), "constant": count * most}
    return np.where(counted_N, 1 / tokens[normaliser], 0.0).astype(np.float32)
