"""Answers of the model in training to prompts, and their rewards: the same in all processes.

The engine generates with the very arrays that are trained, on their mesh. Ids go in and come out; the text of an answer is for
the reward function alone, and is never tokenised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtrain import processes
from jaxtrain.data.chat_source import answer_ends
from jaxtrain.data.chat_store import ChatPrompt
from jaxtrain.data.tokenizers import Tokenizer
from jaxtrain.errors import ExplainedError
from jaxtrain.inference.engine import Engine, Sampling
from jaxtrain.train.gradients import replays_routing
from jaxtrain.train.prepared import Prepared
from jaxtrain.train.rewards import AnswerGroup, Scores, load_reward, score

PyTree = Any


@dataclass(frozen=True)
class Answer:
    """An answer's tokens."""

    ids: list[int]
    """With the one that ended it."""
    log_ps: list[float]
    """log p of each as the sampler computed it."""
    is_whole: bool
    """Whether a token ended it, not its limit."""
    experts: np.ndarray | None = None
    """int16 [tokens of prompt and answer but the last, stacked layers, K], where they are replayed."""


class Answering:
    """Answers prompts and scores the answers; all processes call it alike, and get the same.

    Args:
      tokenizer: of the data.

    Raises:
      ExplainedError: the reward function cannot be loaded.
    """

    def __init__(self, prepared: Prepared, tokenizer: Tokenizer):
        self._grpo, self._tokenizer = prepared.config.objective.grpo, tokenizer
        self._ends = answer_ends(prepared.config, tokenizer)
        self._slots, self._replays = prepared.config.train.global_batch_size, replays_routing(prepared.config)
        self._engine = Engine(prepared.config, prepared.mesh, self._ends)
        self._reward = load_reward(self._grpo.reward)

    def answers(
        self, params: PyTree, prompts: Sequence[ChatPrompt], samplings: Sequence[Sampling], ends_before: Callable[[int], bool]
    ) -> list[Answer] | None:
        """Return the answer to each prompt; None where `ends_before` ended it (see `Engine.run`)."""
        answers, done = [Answer([], [], False) for _ in prompts], 0
        asked, experts = [[int(i) for i in prompt.ids] for prompt in prompts], dict[int, np.ndarray]()
        options: dict[str, Any] = {"take_experts": experts.__setitem__} if self._replays else {}
        for made in self._engine.run(params, asked, samplings, slots=self._slots, ends_before=ends_before, **options):
            answer = answers[made.request]
            answer.ids.append(made.token)
            answer.log_ps.append(made.log_probability)
            done += made.is_last
        if done < len(prompts):
            return None
        return [Answer(a.ids, a.log_ps, a.ids[-1] in self._ends, experts.get(i)) for i, a in enumerate(answers)]

    def prompt_text(self, prompt: ChatPrompt) -> str:
        """Return a prompt's text."""
        return self._tokenizer.decode([int(i) for i in prompt.ids])

    def text(self, answer: Answer) -> str:
        """Return an answer's text, without the token that ended it."""
        return self._tokenizer.decode(answer.ids[:-1] if answer.is_whole else answer.ids)

    def scores(self, prompts: Sequence[ChatPrompt], answers: Sequence[Sequence[Answer]]) -> Scores:
        """Return the rewards of each prompt's answers; each process scores its share of the prompts, and all get all.

        Raises:
          ExplainedError: a call failed, and objective.grpo.on_reward_error=stop; or it returned no finite floats.
        """
        own, count = processes.own_index(), processes.count()
        mine = range(own, len(prompts), count)
        groups = [AnswerGroup(self.prompt_text(prompts[i]), tuple(map(self.text, answers[i])), prompts[i].row) for i in mine]
        found = processes.exchange_next(self._scored(groups), processes.LONG_SECONDS)
        problems = [one["problem"] for one in found if one["problem"]]
        if problems:
            raise ExplainedError(problems[0])
        rewards = np.zeros((len(prompts), len(answers[0]) if answers else 0), np.float32)
        for process, one in enumerate(found):
            rewards[process::count] = np.array(one["rewards"], np.float32).reshape(-1, rewards.shape[1])
        failures = tuple(line for one in found for line in one["failures"])
        return Scores(rewards, failures, max(one["seconds"] for one in found))

    def _scored(self, groups: Sequence[AnswerGroup]) -> dict[str, Any]:
        """Return this process's scores as plain values, or its problem: peers wait for either."""
        try:
            scores = score(self._reward, groups, self._grpo.reward_workers, self._grpo.reward_seconds)
        except ExplainedError as error:
            return {"problem": str(error), "rewards": [], "failures": [], "seconds": 0.0}
        problem = ""
        if scores.failures and self._grpo.on_reward_error == "stop":
            problem = (
                f"the reward function {self._grpo.reward} failed in {len(scores.failures)} of {len(groups)} calls, first with "
                f"{scores.failures[0]}; mend it, or --objective.grpo.on_reward_error=zero counts such answers as 0"
            )
        rewards = [[float(value) for value in row] for row in scores.rewards]
        return {"problem": problem, "rewards": rewards, "failures": list(scores.failures), "seconds": scores.seconds}
