"""Score answers by a reward function from a Python file, in threads, each call timed and limited.

    def reward(prompts, completions, rows):  # one call has all answers to one prompt
        return [float(completion.strip() == row["answer"]) for completion, row in zip(completions, rows)]

The function gets texts and the rows of the data (with `answer` and whatever else they hold), and returns one finite float for
each answer.
"""

from __future__ import annotations

import importlib.util
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from jaxtrain.config.loading import neighbours_importable
from jaxtrain.errors import ExplainedError
from jaxtrain.files import user_path

Reward = Callable[[list[str], list[str], list[Mapping[str, Any]]], Sequence[float]]
"""(prompts, completions, rows) -> a float for each completion."""
DEFAULT_NAME = "reward"
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class AnswerGroup:
    """The answers to one prompt."""

    prompt: str
    completions: tuple[str, ...]
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Scores:
    """The rewards of some groups."""

    rewards: np.ndarray
    """float32 [groups, group_size]; 0 in a group whose call failed."""
    failures: tuple[str, ...]
    """A line for each call that raised or ran into the time limit."""
    seconds: float
    """Longest time of a call."""


def load_reward(where: str) -> Reward:
    """Return the function that `path.py:name` names; `path.py` alone names its `reward`.

    Raises:
      ExplainedError: there is no such file or function, or the file raises.
    """
    path, _, name = where.rpartition(":") if not where.endswith(".py") else (where, "", DEFAULT_NAME)
    file = user_path(path)
    if not path.endswith(".py") or not file.is_file():
        raise ExplainedError(f"objective.grpo.reward={where}: {Path(path or where)} is no Python file; give path.py:function")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        with neighbours_importable(file.resolve().parent):
            spec.loader.exec_module(module)
    except Exception as error:
        raise ExplainedError(f"objective.grpo.reward={where}: {file} raises {_words(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ExplainedError(
            f"objective.grpo.reward={where}: {file} has no function {name}; define {name}(prompts, completions, rows)"
        )
    return cast(Reward, function)


def score(reward: Reward, groups: Sequence[AnswerGroup], workers: int, seconds: float) -> Scores:
    """Return the rewards of all groups; one call a group, at most `workers` at a time, each given up after `seconds`.

    Raises:
      ExplainedError: a call returned another number of values than answers, or what is no finite number.
    """

    def call(group: AnswerGroup) -> Callable[[], Any]:
        count = len(group.completions)
        return lambda: reward([group.prompt] * count, list(group.completions), [group.row] * count)

    outcomes = run_timed([call(group) for group in groups], workers, seconds)
    rewards = np.zeros((len(groups), max((len(g.completions) for g in groups), default=0)), np.float32)
    failures = []
    for index, (group, outcome) in enumerate(zip(groups, outcomes, strict=True)):
        if outcome.error is not None:
            failures.append(f"{_words(outcome.error)} (prompt {group.prompt[-80:]!r})")
        else:
            rewards[index] = _checked(outcome.value, group)
    return Scores(rewards, tuple(failures), max((outcome.seconds for outcome in outcomes), default=0.0))


def _checked(values: Any, group: AnswerGroup) -> np.ndarray:
    """Return one call's rewards, float32 [group_size].

    Raises:
      ExplainedError: see `score`.
    """
    try:
        floats = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ExplainedError(f"the reward function returned {str(values)[:200]!r}, not one float for each answer") from error
    if len(floats) != len(group.completions):
        raise ExplainedError(
            f"the reward function returned {len(floats)} values for {len(group.completions)} answers to the prompt "
            f"{group.prompt[-80:]!r}; return one float for each"
        )
    wrong = [index for index, value in enumerate(floats) if not math.isfinite(value) or abs(value) > LARGEST]
    if wrong:
        raise ExplainedError(
            f"the reward function returned {floats[wrong[0]]} for answer {wrong[0]} of {len(floats)} to the prompt "
            f"{group.prompt[-80:]!r}: {group.completions[wrong[0]][:80]!r}; a reward is a finite float32"
        )
    return np.array(floats, np.float32)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# ---------------------------------------------------------------------------------------------------------------------
# Calls with a time limit


@dataclass(frozen=True)
class CallEnd:
    """The end of a call: its value, or the error that it ended with."""

    value: Any
    error: BaseException | None
    seconds: float


def run_timed(calls: Sequence[Callable[[], Any]], workers: int, seconds: float) -> list[CallEnd]:
    """Call functions, at most `workers` at a time, and return the outcome of each, in order.

    A call that takes longer than `seconds` is given up with a TimeoutError. Python cannot end its thread, which goes on;
    being a daemon it does not keep the process from ending.
    """
    done: queue.Queue[tuple[int, CallEnd]] = queue.Queue()
    waiting, running, outcomes = deque(range(len(calls))), dict[int, float](), dict[int, CallEnd]()

    def work(number: int) -> None:
        value, error, begin = None, None, time.monotonic()
        try:
            value = calls[number]()
        except BaseException as raised:  # SystemExit too: it would end the thread without a word
            error = raised
        done.put((number, CallEnd(value, error, time.monotonic() - begin)))

    while waiting or running:
        while waiting and len(running) < workers:
            running[number := waiting.popleft()] = time.monotonic() + seconds
            threading.Thread(target=work, args=(number,), name=f"reward-{number}", daemon=True).start()
        try:
            number, outcome = done.get(timeout=max(0.0, min(running.values()) - time.monotonic()))
        except queue.Empty:
            late = [number for number, until in running.items() if until <= time.monotonic()]
            for number in late:
                error = TimeoutError(f"no answer within objective.grpo.reward_seconds={seconds:g}")
                outcomes[number] = CallEnd(None, error, seconds)
                del running[number]
            continue
        if running.pop(number, None) is not None:  # else it was given up before
            outcomes[number] = outcome
    return [outcomes[number] for number in range(len(calls))]
