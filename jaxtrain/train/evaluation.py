"""Look at the parameters being trained: the loss on held-out data, and a continuation of some text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxtrain.config import ModelConfig
from jaxtrain.config.data_fields import names_of
from jaxtrain.data.pipeline import Data
from jaxtrain.huggingface.importing import TRAVELLING_FOLDER
from jaxtrain.inference.engine import Sampling
from jaxtrain.inference.model import Model
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.objectives import SequenceObjective, objective_of
from jaxtrain.sharding import named
from jaxtrain.train.average import with_average
from jaxtrain.train.export import hf_writer
from jaxtrain.train.feed import to_global
from jaxtrain.train.gradients import make_evaluation_step
from jaxtrain.train.prepared import Prepared

PyTree = Any


class Evaluation:
    """The mean loss of a held-out token, in nats, the same on every mesh: of all sources, of each of several, of each set of
    data.validation, and of each range of positions.

    Args:
      batches: validation batches of each set to score, whose rows are spread evenly over it; 0 for all.
    """

    def __init__(self, prepared: Prepared, data: Data, batches: int = 0):
        self._prepared, self._data = prepared, data
        config, self._sets = prepared.config, {"": data, **data.sets}
        wholes = {name: own.num_validation_batches(config.train.global_batch_size) for name, own in self._sets.items()}
        self._batches = {name: min(whole, batches or whole) for name, whole in wholes.items()}
        self.batches = sum(self._batches.values())
        """Batches that are scored; 0 where nothing is held out."""
        self._sources = names_of(config.data.sources, "source")
        self._edges = position_edges(config.data.sequence_length, config.train.position_ranges)
        self._groups = len(self._sources) * len(self._edges)
        if self._groups == 1 or isinstance(objective_of(config), SequenceObjective):  # whose loss is of pairs
            self._groups = 0
        self._step = make_evaluation_step(config, prepared.mesh, prepared.backend, self._groups)

    def compile(self, state: PyTree) -> list[Any]:
        """Compile before the run what a state like this one is scored with; calls find it. Return the programs."""
        scored = [params for params in (state["params"], with_average(self._prepared.config, state)) if params is not None]
        batch = next(
            (self._placed(data, 0, self._batches[name]) for name, data in self._sets.items() if self._batches[name]), None
        )
        return [self._step.lower(params, batch).compile() for params in scored] if batch else []

    def of_state(self, state: PyTree, ends: Callable[[int], bool] = lambda batch: False) -> dict[str, float | None] | None:
        """Return the `row` of the weights, and the same of their average (`validation_ema_loss`), where there is one."""
        found, average = self.row(state["params"], ends), with_average(self._prepared.config, state)
        if found is None or average is None:
            return found
        more = self.row(average, ends)
        ours = {name.replace("validation_", "validation_ema_", 1): value for name, value in (more or {}).items()}
        return None if more is None else found | ours

    def row(self, params: PyTree, ends: Callable[[int], bool] = lambda batch: False) -> dict[str, float | None] | None:
        """Return `validation_loss`, `validation_bits_per_byte`, and a sequence objective's own metrics; the same of a source, a
        set or a range of positions behind its name, `validation_loss/NAME`. Where the sources hold out nothing, the first is
        the mean over all sets.

        Args:
          ends: asked before each batch, by its number; True leaves the rest, and None is returned. All processes say the same.
        """
        found, totals, done = {}, [], 0
        for name, data in self._sets.items():
            total = self._total(data, self._batches[name], params, lambda number, done=done: ends(done + number))
            if total is None:
                return None
            done += self._batches[name]
            if total:
                totals.append(total)
                found |= self._figures(data, total, f"/{name}" if name else "")
        if "validation_loss" not in found:
            loss, targets = (sum(float(total[name].sum()) for total in totals) for name in ("loss", "targets"))
            found = {"validation_loss": loss / targets, "validation_bits_per_byte": None} | found
        return found

    def _total(self, data: Data, batches: int, params: PyTree, ends: Callable[[int], bool]) -> dict[str, np.ndarray] | None:
        """Return the sums over some batches, float64, each [groups] where tokens have groups."""
        sums = []
        for number in range(batches):
            if ends(number):
                return None
            sums.append(jax.device_get(self._step(params, self._placed(data, number, batches))))
        return {
            name: np.asarray(np.sum([each[name] for each in sums], axis=0, dtype=np.float64))
            for name in (sums[0] if sums else ())
        }

    def _placed(self, data: Data, number: int, batches: int) -> dict[str, jax.Array]:
        """Return the arrays of a validation batch."""
        prepared, size, rows = self._prepared, self._prepared.config.train.global_batch_size, self._prepared.rows()
        batch = data.validation_batch(number, rows, size, batches)
        placed = prepared.place(batch)
        if self._groups:
            picks = data.validation_row_numbers(number, rows, size, batches)
            sources = np.array([pick[0] if pick else 0 for pick in picks])
            ranges = np.searchsorted(self._edges, batch["positions"], side="right") - 1
            groups = (sources[:, None] * len(self._edges) + ranges).astype(np.int32)
            placed |= to_global({"groups": groups}, rows, size, ("groups",), prepared.sharding)
        return placed

    def _figures(self, data: Data, total: dict[str, np.ndarray], suffix: str) -> dict[str, float | None]:
        """Return a set's part of a row."""
        targets = total["targets"].sum()
        means = {name: float(value.sum() / targets) for name, value in total.items() if name != "targets"}
        loss = means.pop("loss")
        found = _of_text(suffix, loss, data.bits_per_byte(loss), int(targets) if suffix else None)
        found |= {f"validation_{name}{suffix}": value for name, value in means.items()}
        if not self._groups:
            return found
        losses, counts = (total[name].reshape(len(self._sources), -1) for name in ("loss", "targets"))
        if not suffix and len(self._sources) > 1:
            for i in np.flatnonzero(counts.sum(1)):
                mean = float(losses[i].sum() / counts[i].sum())
                found |= _of_text(f"/{self._sources[i]}", mean, data.bits_per_byte(mean, int(i)), int(counts[i].sum()))
        if len(self._edges) > 1:
            for i in np.flatnonzero(counts.sum(0)):
                found[f"validation_loss{suffix}/from_{self._edges[i]}"] = float(losses[:, i].sum() / counts[:, i].sum())
        return found


def _of_text(suffix: str, loss: float, bits: float | None, tokens: int | None) -> dict[str, float | None]:
    """Return loss, bits per byte and tokens; of a part of the row, what is known of them."""
    found = {f"validation_loss{suffix}": loss, f"validation_bits_per_byte{suffix}": bits, f"validation_tokens{suffix}": tokens}
    return {name: value for name, value in found.items() if value is not None or name == "validation_bits_per_byte"}


def position_edges(length: int, ranges: int) -> tuple[int, ...]:
    """Return the first position of each range: 0, and then length / 2^n up to length / 2."""
    return (0, *(length >> n for n in range(max(ranges, 1) - 1, 0, -1)))


class StageEvaluation:
    """`Evaluation` of a model with the positions of the stage of a state's last step, in one batch and length throughout."""

    def __init__(self, prepared: Prepared, data: Data, batch_of: Callable[[int], int]):
        self._prepared, self._data, self._batch_of = prepared, data, batch_of
        self._of_models: dict[ModelConfig, Evaluation] = {}
        self.batches = self._at(0).batches
        """Batches that are scored; 0 where nothing is held out."""

    def of_state(self, state: PyTree, ends: Callable[[int], bool] = lambda batch: False) -> dict[str, float | None] | None:
        """Return `Evaluation.of_state`."""
        return self._at(max(int(state["step"]) - 1, 0)).of_state(state, ends)

    def compile(self, first: int, state: PyTree) -> list[Any]:
        """Return the compiled programs of all validations after step `first`, those of later stages too."""
        begun, stages = self._prepared.recipe.at(self._batch_of(first)).first, self._prepared.recipe.stages
        return [program for stage in stages if stage.first >= begun for program in self._of(stage.first).compile(state)]

    def _at(self, steps_before: int) -> Evaluation:
        return self._of(self._batch_of(steps_before))

    def _of(self, batch: int) -> Evaluation:
        at = self._prepared.for_validation(batch)
        if at.config.model not in self._of_models:
            self._of_models[at.config.model] = Evaluation(at, self._data, at.config.train.validate_batches)
        return self._of_models[at.config.model]


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
