"""Look at the parameters being trained: the loss on held-out data, and a continuation of some text."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain.data.pipeline import Data
from jaxtrain.generate import sample
from jaxtrain.train.prepared import Prepared
from jaxtrain.train.step import make_evaluation_step, make_logits_step

PyTree = Any


class Evaluation:
    """The mean loss of a held-out token, in nats: the same on every mesh.

    Args:
      batches: validation batches to score; 0 for all.
    """

    def __init__(self, prepared: Prepared, data: Data, batches: int = 0):
        self._prepared, self._data = prepared, data
        whole = data.num_validation_batches(prepared.config.train.global_batch_size)
        self.batches = min(whole, batches or whole)
        """Batches that are scored; 0 where nothing is held out."""
        self._step = make_evaluation_step(prepared.config, prepared.mesh, prepared.backend)

    def __call__(self, params: PyTree) -> float:
        """Return the mean negative log likelihood of the held-out tokens, in nats a token."""
        size, rows = self._prepared.config.train.global_batch_size, self._prepared.rows()
        batches = (self._prepared.place(self._data.validation_batch(i, rows, size)) for i in range(self.batches))
        sums = [jax.device_get(self._step(params, batch)) for batch in batches]
        return float(np.sum([s["loss"] for s in sums], dtype=np.float64) / np.sum([s["targets"] for s in sums]))


def continue_text(
    prepared: Prepared, params: PyTree, prompt: np.ndarray, num_tokens: int, before_each: Callable[[], None] = lambda: None
) -> np.ndarray:
    """Return a continuation of `prompt` (`generate.sample`), int32 [num_tokens]; the same in all processes.

    Args:
      prompt: token ids, [n], n >= 1.
      before_each: called before each token; may raise to end it.
    """
    config, num_rows = prepared.config, prepared.config.mesh.batch_shards
    step, rows = make_logits_step(config, prepared.mesh, prepared.backend), prepared.rows(num_rows)
    to_host: Callable[[Any], Any] = functools.partial(multihost_utils.process_allgather, tiled=True)

    def next_logits(batch: dict[str, np.ndarray], position: int) -> np.ndarray:
        before_each()
        copies = {name: array.repeat(rows.stop - rows.start, axis=0) for name, array in batch.items()}
        return to_host(step(params, prepared.place(copies, num_rows), np.int32(position)))[0]

    return sample(next_logits, config, prompt, num_tokens)
