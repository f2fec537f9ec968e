"""Look at the parameters being trained: the loss on held-out data, and a continuation of some text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxtrain.data.pipeline import Data
from jaxtrain.huggingface.importing import TRAVELLING_FOLDER
from jaxtrain.inference.engine import Sampling
from jaxtrain.inference.model import Model
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.sharding import named
from jaxtrain.train.average import with_average
from jaxtrain.train.export import hf_writer
from jaxtrain.train.gradients import make_evaluation_step
from jaxtrain.train.prepared import Prepared

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

    def __call__(self, params: PyTree, ends: Callable[[int], bool] = lambda batch: False) -> float | None:
        """Return the mean negative log likelihood of the held-out tokens, in nats a token; of a sequence objective its loss.

        Args:
          ends: asked before each batch, by its number; True leaves the rest, and None is returned. All processes say the same.
        """
        means = self._means(params, ends)
        return None if means is None else means["loss"]

    def of_state(self, state: PyTree, ends: Callable[[int], bool] = lambda batch: False) -> dict[str, float | None] | None:
        """Return the `row` of the weights, and the same of their average (`validation_ema_loss`), where there is one."""
        found, average = self.row(state["params"], ends), with_average(self._prepared.config, state)
        if found is None or average is None:
            return found
        more = self.row(average, ends)
        ours = {name.replace("validation_", "validation_ema_", 1): value for name, value in (more or {}).items()}
        return None if more is None else found | ours

    def row(self, params: PyTree, ends: Callable[[int], bool] = lambda batch: False) -> dict[str, float | None] | None:
        """Return the loss as `validation_loss`, `validation_bits_per_byte`, and a sequence objective's own metrics; None where
        `ends` ended it.
        """
        means = self._means(params, ends)
        if means is None:
            return None
        loss = means.pop("loss")
        found = {"validation_loss": loss, "validation_bits_per_byte": self._data.bits_per_byte(loss)}
        return found | {f"validation_{name}": value for name, value in means.items()}

    def _means(self, params: PyTree, ends: Callable[[int], bool]) -> dict[str, float] | None:
        size, rows, sums = self._prepared.config.train.global_batch_size, self._prepared.rows(), []
        for number in range(self.batches):
            if ends(number):
                return None
            batch = self._prepared.place(self._data.validation_batch(number, rows, size))
            sums.append(jax.device_get(self._step(params, batch)))
        total = {name: np.sum([each[name] for each in sums], dtype=np.float64) for name in (sums[0] if sums else ())}
        count = total.pop("targets")
        return {name: float(value / count) for name, value in total.items()}


def model_in_hand(prepared: Prepared, params: PyTree, data: Data) -> Model:
    """Return the parameters being trained as a `Model`; of replicas that differ, the first one's."""
    config = prepared.config
    if config.sync.replicas_differ:
        first = jax.jit(
            lambda tree: jax.tree.map(lambda leaf: leaf[0], tree),
            out_shardings=named(prepared.mesh, parameter_dims(config.model)),
        )
        params = first(params)
    return Model(
        config, prepared.mesh, params, data.tokenizer, data.answer_ends, (), hf_writer(config.directory / TRAVELLING_FOLDER)
    )


def continue_text(
    model: Model, prompt: np.ndarray, num_tokens: int, before_each: Callable[[], None] = lambda: None
) -> list[int]:
    """Return a continuation of `prompt` at temperature 0.8, seeded by train.seed; the same in all processes.

    It ends before `num_tokens` where the model ends the document, or its table of positions does.

    Args:
      prompt: token ids, [n], n >= 1.
      before_each: called after every few tokens; may raise to end it.
    """
    seed, table = model.config.train.seed % 2**32, model.config.model.learned_positions or len(prompt) + num_tokens

    def goes_on(*_: Any) -> bool:
        before_each()
        return True

    sampling = Sampling(max(1, min(num_tokens, table - len(prompt))), temperature=0.8, seed=seed)
    return [made.token for made in model.engine.run(model.params, [prompt.tolist()], [sampling], wants_more=goes_on)]
