"""Rollouts: the feed of objective.kind=grpo. Prompts of the data, answers of the model as it is, rewards, and rows to train on.

Rollout n is a pure function of the data, train.seed, n and the parameters that it begins with: its prompts are elements
n * prompts, ... of the shuffled prompts, and each answer has a seed of its own. So a run that is killed in a rollout makes it
again, to the same bits. `objective.grpo.updates` steps train on it; only what lies between them has to be kept on disk.

Every process holds the whole rollout, so denominators are sums on the host; each places its own rows.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxtrain.checkpoint import committed_steps
from jaxtrain.config import Config
from jaxtrain.data.best_fit import best_fit
from jaxtrain.data.chat_store import ChatPrompt, Prompts
from jaxtrain.data.order import Order
from jaxtrain.data.packing import NO_TARGET, put
from jaxtrain.errors import CheckpointError, DataError
from jaxtrain.files import AppendedFile, replacing
from jaxtrain.inference.engine import Sampling
from jaxtrain.layout import fewer_rows
from jaxtrain.models.trained import trained, with_trained
from jaxtrain.objectives.grpo import ADVANTAGES, OLD, REFERENCE, SAMPLER, WEIGHTS
from jaxtrain.telemetry.clock import ROW_SHARE
from jaxtrain.telemetry.metrics import size_up_to
from jaxtrain.telemetry.progress import Progress
from jaxtrain.train.advantages import answer_weights, group_advantages, no_spread
from jaxtrain.train.answers import Answer, Answering
from jaxtrain.train.batch_feed import Feed
from jaxtrain.train.feed import on_every_host
from jaxtrain.train.gradients import make_score
from jaxtrain.train.prepared import Prepared
from jaxtrain.train.rewards import Scores

PyTree = Any
Place = tuple[int, int]
"""(row, index in it)."""
FOLDER, FILE = "rollouts", "rollouts.jsonl"
SHOWN_ANSWERS = 4
"""Answers of a rollout that run_dir/rollouts.jsonl holds."""
NORMALISERS = {"grpo": "answer", "dr_grpo": "constant", "rloo": "token"}


def answer_seed(seed: int, rollout: int, answer: int) -> int:
    """Return the seed of an answer, in [0, 2^32)."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {rollout} {answer}".encode(), digest_size=4).digest(), "big")


def usable(prompts: Prompts, config: Config) -> list[int]:
    """Return the numbers of the prompts that leave room for an answer.

    Raises:
      DataError: there is none.
    """
    most = config.data.sequence_length + 1 - config.objective.grpo.max_new_tokens
    lengths = [len(prompts[index].ids) for index in range(prompts.count)]
    found = [index for index, length in enumerate(lengths) if 0 < length <= most]
    if not found:
        if not lengths:
            raise DataError(
                "the data has no prompts: objective.kind=grpo needs data.sources of kind=chat, rows of `prompt` alone"
            )
        raise DataError(
            f"none of {prompts.count} prompts has 1 to {most} tokens, which data.sequence_length="
            f"{config.data.sequence_length} and objective.grpo.max_new_tokens={config.objective.grpo.max_new_tokens} leave it; "
            f"the shortest has {min(lengths)}"
        )
    return found


def places_of(prompts: Sequence[ChatPrompt], answers: Sequence[Answer], config: Config) -> tuple[int, list[Place]]:
    """Return the rows of a batch, and where in them each prompt and answer begins.

    They are packed by best fit where that makes a smaller step (`layout.fewer_rows`); else each has a row.
    """
    length, train = config.data.sequence_length, config.train
    sizes = [len(prompt.ids) + len(answer.ids) - 1 for prompt, answer in zip(prompts, answers, strict=True)]
    packed = best_fit(np.array(sizes), length) if config.objective.grpo.packing else []
    rows = fewer_rows(config, len(packed))[0] if packed else train.global_batch_size
    if rows == train.global_batch_size:
        return rows, [(row, 0) for row in range(len(sizes))]
    places: list[Place] = [(0, 0)] * len(sizes)
    for row, members in enumerate(packed):
        first = 0
        for member in members.tolist():
            places[member], first = (row, first), first + sizes[member]
    return rows, places


def rows_of(
    prompts: Sequence[ChatPrompt], answers: Sequence[Answer], length: int, places: tuple[int, Sequence[Place]] | None = None
) -> dict[str, np.ndarray]:
    """Return a batch of answers, each after its prompt: int32 tokens, targets, positions and segments, and float32 log p.

    Only the answers' tokens are targets; all arrays are [rows, length], aligned with the targets. `answer` says which one a
    place belongs to, -1 in the padding. Where the answers have their experts, int32 experts [rows, length, stacked layers K],
    -1 in the padding.

    Args:
      places: of `places_of`; by default each answer has a row.
    """
    count, starts = places or (len(answers), [(row, 0) for row in range(len(answers))])
    rows = {name: np.zeros((count, length), np.int32) for name in ("tokens", "positions", "segments")}
    rows |= {name: np.full((count, length), NO_TARGET, np.int32) for name in ("targets", "answer")}
    log_ps, experts = np.zeros((count, length), np.float32), {}
    for number, (prompt, answer, (row, begin)) in enumerate(zip(prompts, answers, starts, strict=True)):
        ids = [*map(int, prompt.ids), *answer.ids]
        first, end = begin + len(prompt.ids) - 1, begin + len(ids) - 1
        put(rows, row, begin, rows["segments"][row].max() + 1, ids[:-1], [*[NO_TARGET] * (first - begin), *answer.ids])
        rows["answer"][row, begin:end], log_ps[row, first:end] = number, answer.log_ps
        if answer.experts is not None:
            own = answer.experts.reshape(len(answer.experts), -1)
            whole = experts.setdefault("experts", np.full((count, length, own.shape[1]), -1, np.int32))
            whole[row, begin : begin + len(own)] = own
    return rows | {SAMPLER: log_ps} | experts


def weighed(rows: dict[str, np.ndarray], scores: Scores, config: Config) -> dict[str, np.ndarray]:
    """Return the rows with the floats that the objective wants of each token; the old log-probabilities are still unknown."""
    grpo, is_target = config.objective.grpo, rows["targets"] >= 0
    lengths = np.bincount(rows["answer"][is_target], minlength=scores.rewards.size)
    weights = answer_weights(lengths, lengths > 0, NORMALISERS[grpo.advantage], grpo.max_new_tokens)
    of_answers = {ADVANTAGES: group_advantages(scores.rewards, grpo.advantage).reshape(-1), WEIGHTS: weights}
    unknown = np.full(is_target.shape, np.nan, np.float32)
    spread = {name: np.where(is_target, values[rows["answer"]], 0) for name, values in of_answers.items()}
    return rows | {name: array.astype(np.float32) for name, array in spread.items()} | {OLD: unknown}


def measures(scores: Scores, answers: Sequence[Answer], seconds: float) -> dict[str, float]:
    """Return the metrics of a rollout.

    Args:
      seconds: time that the answers took.
    """
    log_ps = np.concatenate([np.asarray(answer.log_ps, np.float64) for answer in answers])
    return {
        "reward": float(scores.rewards.mean(dtype=np.float64)),
        "reward_std": float(scores.rewards.std(dtype=np.float64)),
        "groups_without_spread": float(no_spread(scores.rewards).mean()),
        "response_length": len(log_ps) / len(answers),
        "truncated": sum(not answer.is_whole for answer in answers) / len(answers),
        "entropy": -float(log_ps.mean()),
        "rollout_seconds": seconds,
        "rollout_tokens_per_second": len(log_ps) / seconds,
        "reward_seconds": scores.seconds,
        "reward_failures": float(len(scores.failures)),
    }


@dataclass
class Rollout:
    """A rollout under training."""

    number: int
    rows: dict[str, np.ndarray]
    metrics: dict[str, float]
    placed: PyTree


class Rollouts(Feed):
    """A feed of rollouts.

    Args:
      answering: answers and scores.
      prompts: of the data.
      first: steps done.
      batch_of: step from 0 -> number of its batch.
      ends_before: (work, part) -> whether a signal ends that work before this part (`StopOnSignal.ends_before`).
    """

    def __init__(
        self,
        prepared: Prepared,
        answering: Answering,
        prompts: Prompts,
        first: int,
        progress: Progress,
        batch_of: Callable[[int], int] = lambda step: step,
        ends_before: Callable[[str, int], bool] = lambda work, part: False,
    ):
        self._prepared, self._config, self._progress = prepared, prepared.config, progress
        self._grpo, self._prompts, self._answering = self._config.objective.grpo, prompts, answering
        self._batch_of, self._ends_before = batch_of, ends_before
        self._numbers = usable(self._prompts, self._config)
        self._order = Order([len(self._numbers)], [1.0], self._config.train.seed)
        self._update, self._reference = 0, None
        if self._grpo.kl:
            with progress.during("making the reference"):
                self._reference = trained(self._config, prepared.create_state()["params"])  # the others are the state's own
        self._scores: dict[int, Any] = {}
        """Programs of the reference's log-probabilities, by the rows of a batch."""
        self._held: Rollout | None = None
        self._folder = self._config.directory / FOLDER
        self._file = AppendedFile(self._config.directory / FILE, progress.say, lambda path: size_up_to(path, first))
        if jax.process_index() == 0:
            self._file.begin()
        if self._position(first)[1]:
            self._held = self._read(first)

    def _position(self, step: int) -> tuple[int, int]:
        """Return (number of the rollout, updates done on it) after `step` steps."""
        return divmod(self._batch_of(step), self._grpo.updates)

    # ------------------------------------------------------------------------------------------------------------------
    # What a feed does

    def next(self, state: PyTree, step: int) -> PyTree | None:
        number, self._update = self._position(step)
        if self._update == 0:
            self._held = None  # its arrays go before the cache comes
            jax.block_until_ready(state["params"])  # else XLA:CPU may run the step's collectives beside the engine's
            with self._progress.during("rolling out"):
                self._held = self._make(state["params"], number, step)
        if self._held is None:
            return None
        if self._reference is not None and REFERENCE not in self._held.placed:
            initial = with_trained(self._config, state["params"], self._reference)
            score = self._score_of(len(self._held.rows["targets"]))
            self._held.placed = self._held.placed | {REFERENCE: score(initial, self._held.placed)}
        return self._held.placed

    def _score_of(self, rows: int) -> Any:
        if rows not in self._scores:
            config = self._prepared.of_rows(rows).config
            self._scores[rows] = make_score(config, self._prepared.mesh, self._prepared.backend)
        return self._scores[rows]

    def stepped(self, metrics: dict[str, Any]) -> dict[str, Any]:
        assert self._held is not None
        log_probs = metrics.pop("log_probs")
        if self._update == 0 and self._grpo.updates > 1:
            self._held.placed = self._held.placed | {OLD: log_probs}
        return metrics | self._held.metrics

    def batch(self, step: int) -> PyTree:
        assert self._held is not None
        return self._held.placed

    def save(self, step: int) -> None:
        """Write the rollout under training, where updates are still to come; and remove the files of steps that are gone."""
        if not self._position(step)[1] or self._held is None:
            return
        old = on_every_host(self._held.placed[OLD])
        if jax.process_index() != 0:
            return
        self._folder.mkdir(exist_ok=True)
        kept = {step, *committed_steps(self._config.directory / "checkpoints")}
        for path in self._folder.glob("*.npz"):
            if path.stem.isdigit() and int(path.stem) not in kept:
                path.unlink()
        arrays: dict[str, Any] = self._held.rows | {OLD: old, "metrics": np.array(json.dumps(self._held.metrics))}
        with replacing(self._folder / f"{step}.npz", durable=True) as beside, open(beside, "wb") as file:
            np.savez(file, **arrays)

    def close(self) -> None:
        self._file.close()

    def _read(self, step: int) -> Rollout:
        path = self._folder / f"{step}.npz"
        try:
            with np.load(path, allow_pickle=False) as arrays:
                rows = {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"step {step} lies between the {self._grpo.updates} updates on a rollout, and {path} cannot be read: {error}; "
                "put it back, or remove the newer checkpoints so that the run goes on from an earlier one"
            ) from error
        metrics = json.loads(str(rows.pop("metrics")))
        return Rollout(self._position(step)[0], rows, metrics, self._place(rows))

    # ------------------------------------------------------------------------------------------------------------------
    # A rollout

    def asked(self, number: int) -> list[ChatPrompt]:
        """Return the prompts of a rollout."""
        count = self._config.train.global_batch_size // self._grpo.group_size
        return [self._prompts[self._numbers[self._order[number * count + i][1]]] for i in range(count)]

    def _make(self, params: PyTree, number: int, step: int) -> Rollout | None:
        prompts, size, seed = self.asked(number), self._grpo.group_size, self._config.train.seed
        asked = [prompt for prompt in prompts for _ in range(size)]
        samplings = [
            Sampling(
                self._grpo.max_new_tokens,
                temperature=self._grpo.temperature,
                seed=answer_seed(seed, number, i),
                policy_temperature=self._grpo.temperature,
            )
            for i in range(len(asked))
        ]
        begin = time.perf_counter()
        ends_before = lambda part: self._ends_before(f"rollout {number}", part)  # noqa: E731
        answers = self._answering.answers(params, asked, samplings, ends_before)
        if answers is None:
            return None
        seconds = time.perf_counter() - begin
        groups = [answers[i : i + size] for i in range(0, len(answers), size)]
        with self._progress.during("scoring answers"):
            scores = self._answering.scores(prompts, groups)
        for line in scores.failures[:1]:
            self._progress.say(f"warning    {len(scores.failures)} reward calls failed, their rewards are 0: {line}")
        packed = places_of(asked, answers, self._config)
        rows = weighed(rows_of(asked, answers, self._config.data.sequence_length, packed), scores, self._config)
        self._show(step, prompts, groups, scores)
        fill = {"fill": float((rows["segments"] > 0).mean()), ROW_SHARE: packed[0] / self._config.train.global_batch_size}
        return Rollout(number, rows, measures(scores, answers, seconds) | fill, self._place(rows))

    def _place(self, rows: dict[str, np.ndarray]) -> PyTree:
        prepared = self._prepared.of_rows(len(rows["targets"]))
        own = prepared.rows()
        return prepared.place({name: array[own] for name, array in rows.items()})

    def _show(self, step: int, prompts: Sequence[ChatPrompt], groups: Sequence[Sequence[Answer]], scores: Scores) -> None:
        """Append the first answers of a rollout to run_dir/rollouts.jsonl, as text."""
        if jax.process_index() != 0:
            return
        pairs = [(i, j) for i in range(len(groups)) for j in range(len(groups[i]))]
        for i, j in pairs[:SHOWN_ANSWERS]:
            row = {
                "step": step + 1,
                "prompt": self._answering.prompt_text(prompts[i]),
                "answer": self._answering.text(groups[i][j]),
                "reward": float(scores.rewards[i, j]),
                "tokens": len(groups[i][j].ids),
            }
            self._file.append((json.dumps(row) + "\n").encode())


class RewardEvaluation:
    """The mean reward of held-out prompts, each answered by the most likely tokens.

    Args:
      batches: train.global_batch_size prompts each, to be answered, spread evenly over all; 0 for all.
    """

    def __init__(self, prepared: Prepared, answering: Answering, prompts: Prompts, batches: int = 0):
        self._answering, self._grpo = answering, prepared.config.objective.grpo
        size = prepared.config.train.global_batch_size
        numbers = usable(prompts, prepared.config) if prompts.count else []
        count = min(batches * size or len(numbers), len(numbers))
        self._prompts = [prompts[numbers[i * len(numbers) // count]] for i in range(count)]
        self.batches = -(-len(self._prompts) // size)
        """Batches that are answered; 0 where nothing is held out."""

    def of_state(self, state: PyTree, ends: Callable[[int], bool] = lambda part: False) -> dict[str, float | None] | None:
        """Return the mean reward, the tokens of an answer and the share of answers that no token ended; None where `ends` ended
        it.
        """
        samplings = [Sampling(self._grpo.max_new_tokens)] * len(self._prompts)
        answers = self._answering.answers(state["params"], self._prompts, samplings, ends)
        if answers is None:
            return None
        scores = self._answering.scores(self._prompts, [[answer] for answer in answers])
        return {
            "validation_reward": float(scores.rewards.mean(dtype=np.float64)),
            "validation_response_length": sum(len(answer.ids) for answer in answers) / len(answers),
            "validation_truncated": sum(not answer.is_whole for answer in answers) / len(answers),
        }
