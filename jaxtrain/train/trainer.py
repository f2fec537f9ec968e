"""`Trainer`: a training run as an object, in a notebook or a script. The command `jaxtrain train` is a caller like any other.

    trainer = Trainer(load_config("quickstart"))
    trainer.train()
    plt.plot(trainer.metrics["step"], trainer.metrics["loss"])

Constructing one touches no device, no file, no signal handler and no global state; devices come with the first use of `state`,
`step`, `train` and the like. Several may live in one process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax

from jaxtrain.checkpoint import Checkpoints, check_same_run, committed_steps, read_metadata, restore
from jaxtrain.config import Config
from jaxtrain.config.rules import validate
from jaxtrain.data.pipeline import Data, open_data
from jaxtrain.errors import CheckpointError, ExplainedError
from jaxtrain.inference.model import Model
from jaxtrain.mesh import count_devices
from jaxtrain.numerics import settled
from jaxtrain.objectives import Objective, SequenceObjective, objective_of
from jaxtrain.ops.losses import TokenLoss
from jaxtrain.parallel.pipeline_schedule import Schedule
from jaxtrain.parts import ModelParts
from jaxtrain.telemetry.metrics import read_rows
from jaxtrain.telemetry.progress import Progress, is_validation, open_progress
from jaxtrain.train.answers import Answering
from jaxtrain.train.completion import Completion, completion_of
from jaxtrain.train.evaluation import Evaluation, continue_text, model_in_hand
from jaxtrain.train.given import check_parts, checked_batch
from jaxtrain.train.gradients import batch_names
from jaxtrain.train.loop import Hook
from jaxtrain.train.prepared import Prepared
from jaxtrain.train.resume import described, metadata
from jaxtrain.train.rollbacks import Rollbacks
from jaxtrain.train.rollouts import RewardEvaluation
from jaxtrain.train.run import Ended, Run
from jaxtrain.train.run_dir import make_run_dir, only_run_in
from jaxtrain.train.state_check import StateCheck
from jaxtrain.train.step import TrainSteps, read_metrics
from jaxtrain.train.stop import StopOnSignal

PyTree = Any


class Trainer:
    """Trains what a config says, on the devices at hand.

    Args:
      config: `Config`, e.g. of `load_config("quickstart")`.
      model: attention, MLP or layer of your own, in place of the decoder's.
      objective: what is minimised: `Objective`, `SequenceObjective`, or a function (log p of each target [B, L], {}) -> loss
        [B, L].
      optimizer: an optax transform, the whole update rule, in place of config section `optimizer`.
      schedule: (stages, chunks a stage, microbatches) -> a table of a pipeline's work, in place of pipeline.schedule.
      hooks: told of each step (`Hook`).
      documents: a function that gives the texts to train on, in place of data.sources: the same ones every time and on every
        host, in the same order.
    """

    def __init__(
        self,
        config: Config,
        *,
        model: ModelParts | None = None,
        objective: Objective | SequenceObjective | TokenLoss | None = None,
        optimizer: optax.GradientTransformation | None = None,
        schedule: Callable[[int, int, int], Schedule] | None = None,
        hooks: Sequence[Hook] = (),
        documents: Callable[[], Iterable[str]] | None = None,
    ):
        given = {"objective": objective, "optimizer": optimizer, "schedule": schedule, "hooks": hooks, "documents": documents}
        check_parts(config, given | {"model": model})
        given["hooks"] = tuple(hooks)
        parts = replace(config.parts, **{name: part for name, part in given.items() if part not in (None, ())})
        if model is not None:
            config = replace(config, model=replace(config.model, parts=model))
        self.config: Config = replace(config, parts=parts)
        """As given, with the parts in it; `prepared.config` is the one that the devices here resolve it to."""
        self._state: PyTree = None
        self._step = 0
        self._steps: TrainSteps | None = None
        self._model: Model | None = None
        self._rows: list[dict[str, Any]] = []
        self._saved: int | None = None  # the step of the state that the newest checkpoint holds too
        self._rollbacks = Rollbacks()

    def __repr__(self) -> str:
        return f"Trainer({self.config.name!r}, step {self._step} of {self.config.train.steps})"

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the arrays on the devices. Nothing is saved; files and locks are held only while a method runs."""
        if self._state is not None:
            jax.tree.map(lambda leaf: leaf.delete(), self._state)
        self._state, self._steps = None, None

    # ------------------------------------------------------------------------------------------------------------------
    # What it is made of, when it is first asked for

    @functools.cached_property
    def prepared(self) -> Prepared:
        """The config on the mesh of the devices at hand.

        Raises:
          ConfigError: the config cannot work here; names every field.
        """
        return Prepared(validate(self.config, count_devices()))

    @functools.cached_property
    def data(self) -> Data:
        """Training and validation batches. Text is tokenized at first use, and kept in data.cache_dir.

        Raises:
          DataError: data is missing, broken or too short.
        """
        return open_data(self.prepared.config)

    @property
    def state(self) -> PyTree:
        """The training state, {"params", "optimizer", "sync", "step"}, in sharded arrays: that of step 0 at first.

        `step` and `train` donate it, so take a copy of what you keep.
        """
        if self._state is None:
            with settled():
                self._state = self.prepared.create_state()
        return self._state

    @property
    def steps_done(self) -> int:
        """Optimizer steps that `state` has seen."""
        return self._step

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """Logged rows as columns, ready for a plot: float64, one value a row that has it.

        Columns of a training row (`loss`, `grad_norm`, `tokens_per_second` ...) go with `step`, those of a validation row
        (`validation_loss`, `validation_bits_per_byte`) with `validation_step`. Of `train`, and of calls of `step`.
        """
        path = self.config.directory / "metrics.jsonl"
        rows = {(row["step"], "loss" in row): row for row in [*self._rows, *(read_rows(path) if path.exists() else [])]}
        training = [row for _, row in sorted(rows.items()) if "loss" in row]
        validation = [row for _, row in sorted(rows.items()) if is_validation(row)]
        scored = {"validation_step": _column(validation, "step")}
        always = ("validation_loss", "validation_bits_per_byte")
        further = (name for row in validation for name in row if name.startswith("validation_"))
        scored |= {name: _column(validation, name) for name in dict.fromkeys((*always, *further))}
        names = dict.fromkeys(name for row in training for name, value in row.items() if isinstance(value, int | float))
        return {name: _column(training, name) for name in names} | scored

    # ------------------------------------------------------------------------------------------------------------------
    # What it does

    def train(self, progress: Progress | None = None, stop: StopOnSignal | None = None) -> Ended:
        """Train to train.steps, from this trainer's state or, where it has none yet, the newest checkpoint in run_dir.

        Writes run_dir: checkpoints, metrics.jsonl, log.txt, loss.png. Ctrl-C raises KeyboardInterrupt, and what was trained
        since the last checkpoint is lost; the command's handling of signals is `stop`.

        Args:
          progress: where it is shown; by default a bar on a terminal, else a line for each logged row.
          stop: entered by the caller.

        Raises:
          ExplainedError: data, folder, checkpoint or numbers are not as they must be; says what to do.
        """
        if objective_of(self.config).inputs and self.config.objective.kind not in ("grpo", "dpo", "distill"):
            names = ", ".join(objective_of(self.config).inputs)
            raise ExplainedError(f"the objective wants {names} of each token, which data.sources do not give; use step(batch)")
        held = (self._state, self._step, self._rollbacks) if self._state is not None else None
        self._state, self._steps = None, None
        with progress or open_progress(self.config.train.steps, process_index=jax.process_index()) as shown:
            run = Run(self.prepared, lambda: self.data, shown, stop)
            try:
                return run.train(held)
            finally:
                if run.state is not None:
                    self._state, self._step = run.state, int(run.state["step"])
                    self._saved = self._step if run.checkpoints else None
                    self._rollbacks = run.resume.rollbacks

    @settled()
    def step(self, batch: Mapping[str, np.ndarray] | None = None) -> dict[str, float]:
        """Take one optimizer step, and return its metrics: loss in nats a token, total_loss, grad_norm, targets.

        Args:
          batch: arrays [global_batch_size, sequence_length] of this process's rows: int32 tokens, targets (-1 for no loss),
            positions and, with data.mask_documents, segments; float32 inputs of the objective. None for the data's next one.

        Raises:
          ExplainedError: an array is missing, or cannot be such a batch's.
        """
        if batch is None and self.config.objective.kind == "grpo":
            raise ExplainedError(
                "objective.kind=grpo takes its steps on rollouts; use train(), or give step() a batch of your own"
            )
        number, is_own = self._rollbacks.batch(self._step), batch is None
        if batch is None:
            _ = self._completed  # it may add to the data's batches
            batch = self.data.train_batch(number, self.prepared.at(number).rows())
        objective, distill = objective_of(self.config), self.config.objective.distill
        has_teacher = self.config.objective.kind == "distill" and not distill.kept
        missing = [
            name for name in batch_names(self.config) if name not in {*batch, *(objective.inputs if has_teacher else ())}
        ]
        if missing:
            raise ExplainedError(f"the batch has no {', '.join(missing)}; it has {', '.join(batch)}")
        batch = batch if is_own else checked_batch(batch, self.prepared.at(number))
        state, prepared = self.state, self.prepared
        if self._steps is None:
            last = max(prepared.config.train.steps, self._step + 1)
            self._steps = TrainSteps(prepared, self._step, last, self._rollbacks.batch)
        placed = prepared.at(number).place(batch)
        self._state, metrics = self._steps(state, self._completed(placed) if has_teacher else placed)
        self._step += 1
        values = read_metrics(metrics)
        self._rows.append({"step": self._step, **values})
        return values

    @functools.cached_property
    def _completed(self) -> Completion:
        return completion_of(self.prepared, lambda: self.data, lambda: self.prepared.create_state()["params"])

    @settled()
    def evaluate(self, batches: int = 0) -> dict[str, float | None]:
        """Return `validation_loss`, in nats a held-out token, and `validation_bits_per_byte`; of preferences their loss, and
        `validation_preference_accuracy`; of rewards `validation_reward` and the figures of `RewardEvaluation`.

        Args:
          batches: validation batches to score; 0 for all.

        Raises:
          ExplainedError: nothing is held out.
        """
        if batches < 0:
            raise ExplainedError(f"batches={batches}: give 0 for all of them, or how many")
        evaluation = self._evaluation(batches)
        if not evaluation.batches:
            raise ExplainedError("no text is held out; give data.validation_fraction, or a path for validation")
        _ = self._completed
        found = evaluation.of_state(self.state)
        assert found is not None  # nothing ends it
        self._rows.append({"step": self._step, **found})
        return found

    def _evaluation(self, batches: int) -> Evaluation | RewardEvaluation:
        if self.config.objective.kind != "grpo":
            return Evaluation(self.prepared.for_validation(self._rollbacks.batch(max(self._step - 1, 0))), self.data, batches)
        return RewardEvaluation(
            self.prepared, Answering(self.prepared, self.data.tokenizer), self.data.validation_prompts, batches
        )

    @settled()
    def model(self) -> Model:
        """Return the parameters as they are now as a `Model`: logits, scores, generation, a HuggingFace folder.

        Training on frees them; the next call compiles nothing again.
        """
        at = self.prepared.for_validation(self._rollbacks.batch(max(self._step - 1, 0)))
        model = model_in_hand(at, self.state["params"], self.data)
        if self._model is None or self._model.config.model != at.config.model:
            self._model = replace(model, params=None)  # its programs; parameters must not outlive their step
        return replace(self._model, params=model.params)

    @settled()
    def generate(self, prompts: Any, max_new_tokens: int = 64, **options: Any) -> Any:
        """Continue prompts; see `Model.generate`."""
        return self.model().generate(prompts, max_new_tokens, **options)

    @settled()
    def sample(self, prompt: str, num_tokens: int = 64) -> str:
        """Return a continuation of a text at temperature 0.8, seeded by train.seed."""
        ids = np.asarray(self.data.tokenizer.encode(prompt), np.int32)
        if not ids.size:
            raise ExplainedError("the prompt is empty; give some text")
        return self.data.tokenizer.decode(continue_text(self.model(), ids, num_tokens))

    @settled()
    def save(self) -> int:
        """Save the state in run_dir/checkpoints, wait until it is committed, and return its step.

        Raises:
          ExplainedError: it cannot be saved, is not finite, or another process trains in run_dir.
        """
        prepared, config = self.prepared, self.prepared.config
        if self._saved == self._step:
            return self._step
        StateCheck(config, prepared.mesh, prepared.optimizer, self._rollbacks)(self._step, self.state)
        make_run_dir(config.directory)
        folder, metric = config.directory / "checkpoints", config.train.validation_metric
        with only_run_in(config.directory), Checkpoints(folder, config.checkpoint, metric) as checkpoints:
            about = described(metadata(config, self.data, {}), prepared.origin, self._rollbacks, self.state, {})
            checkpoints.save(self._step, prepared.canonical().from_state(self.state), about, wait=True)
        self._saved = self._step
        return self._step

    @settled()
    def restore(self, step: int | None = None) -> int:
        """Take the state of a checkpoint in run_dir, the newest where none is named, on whatever mesh; return its step.

        Raises:
          CheckpointError: there is none, or it is of another run.
        """
        folder = self.prepared.config.directory / "checkpoints"
        steps = sorted(committed_steps(folder))
        if not steps or (step is not None and step not in steps):
            held = f"steps {', '.join(map(str, steps))}" if steps else "no checkpoint"
            raise CheckpointError(f"{folder} holds {held}{'' if step is None else f', not step {step}'}")
        step = steps[-1] if step is None else step
        saved = read_metadata(folder, step)
        check_same_run(saved, metadata(self.prepared.config, self.data, {}), folder, step)
        canonical = self.prepared.canonical()
        self.close()
        self._state = canonical.to_state(restore(folder, step, canonical.abstract), saved.get("guard"))
        self.prepared.origin = saved.get("origin", {})
        self._rollbacks = Rollbacks.from_plain(saved.get("rollbacks", []))
        self._rows = [row for row in self._rows if row["step"] <= step]
        self._step = self._saved = step
        return step


def _column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    """Return the values of a name in the rows that hold a number there; NaN where a row does not."""
    numbers = (row.get(name) for row in rows)
    return np.array([value if isinstance(value, int | float) else np.nan for value in numbers], np.float64)
