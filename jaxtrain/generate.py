"""Sample from the model being trained, on its mesh."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxtrain.config import Config


def draw(logits: np.ndarray, temperature: float, random: np.random.Generator) -> int:
    """Return one id from softmax(logits / temperature); the most likely one at temperature 0."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    return int(random.choice(len(probabilities), p=probabilities / probabilities.sum()))


def sample(
    next_logits: Callable[[dict[str, np.ndarray], int], np.ndarray],
    config: Config,
    prompt: np.ndarray,
    num_tokens: int,
    temperature: float = 0.8,
) -> np.ndarray:
    """Continue `prompt` by `num_tokens` ids, seeded by train.seed.

    Every token costs a forward pass over a whole sequence, without a cache of keys and values: meant for a look at the model,
    on any mesh, not for serving. The context is the last sequence_length tokens.

    Args:
      next_logits: (batch of one row, index of the last token) -> logits [vocab_size].
      prompt: ids, [n], n >= 1.

    Returns:
      The new ids, int32 [num_tokens].
    """
    length = config.data.sequence_length
    random = np.random.default_rng(config.train.seed)
    ids = [int(i) for i in prompt]
    row = np.arange(length, dtype=np.int32)[None]
    batch = {"positions": row, "segments": np.ones_like(row), "targets": np.full_like(row, -1)}
    for _ in range(num_tokens):
        context = ids[-length:]
        tokens = np.zeros_like(row)
        tokens[0, : len(context)] = context
        logits = next_logits(batch | {"tokens": tokens}, len(context) - 1)
        ids.append(draw(logits[: config.model.vocab_size], temperature, random))
    return np.array(ids[len(prompt) :], np.int32)
