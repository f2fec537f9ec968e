"""Time steps on packed rows beside steps on one sample a row, for SFT and for the answers of GRPO, in turns on one CPU.

    python -m tests.measure.packing_speed [WIDTH LAYERS LENGTH ROWS]

The samples are those of `tests.measure.chat_of_stdlib`, questions and answers as bytes. A kind's time is the least CPU time of
its rounds, since other processes only ever add to it; tokens are those of prompts and answers, without padding.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np

from jaxtrain.config import Config, DataConfig, GrpoConfig, MeshConfig, ModelConfig, ObjectiveConfig, TrainConfig
from jaxtrain.data.best_fit import best_fit
from jaxtrain.layout import fewer_rows
from jaxtrain.train.answers import Answer
from jaxtrain.train.rewards import Scores
from jaxtrain.train.rollouts import Place, places_of, rows_of, weighed
from tests.measure.chat_of_stdlib import conversations
from tests.measure.steps import stepper

ROUNDS, GROUP = 8, 4


def samples(length: int) -> tuple[list[Any], list[Answer]]:
    """Return prompts and answers that fit into a row."""
    turns = [row["messages"][:2] for row in conversations(600)]
    texts = [(question["content"].encode(), answer["content"].encode()) for question, answer in turns]
    texts = [(question, answer) for question, answer in texts if len(question) + len(answer) <= length]
    prompts = [SimpleNamespace(ids=list(question), row={}) for question, _ in texts]
    return prompts, [Answer(list(answer), [-1.0] * len(answer), True) for _, answer in texts]


def sft(config: Config, is_packed: bool) -> tuple[dict[str, np.ndarray], Config]:
    """Return a batch of train.global_batch_size rows."""
    (prompts, answers), count = samples(config.data.sequence_length), config.train.global_batch_size
    sizes = np.array([len(p.ids) + len(a.ids) - 1 for p, a in zip(prompts, answers, strict=True)])
    rows = best_fit(sizes, config.data.sequence_length) if is_packed else [np.array([i]) for i in range(count)]
    members, places = list[int](), list[Place]()
    for row, found in enumerate(rows[:count]):
        members += found.tolist()
        places += [(row, int(end - sizes[i])) for i, end in zip(found, np.cumsum(sizes[found]), strict=True)]
    chosen = [prompts[i] for i in members], [answers[i] for i in members]
    return rows_of(*chosen, config.data.sequence_length, (count, places)), config


def grpo(config: Config, is_packed: bool) -> tuple[dict[str, np.ndarray], Config]:
    """Return a batch of train.global_batch_size answers."""
    count, settings = config.train.global_batch_size, GrpoConfig("reward.py", group_size=GROUP, packing=is_packed)
    config = Config(**vars(config) | {"objective": ObjectiveConfig("grpo", grpo=settings)})
    prompts, answers = (found[:count] for found in samples(config.data.sequence_length))
    places, scores = places_of(prompts, answers, config), Scores(np.arange(count).reshape(-1, GROUP) % 3, (), 0.0)
    rows = weighed(rows_of(prompts, answers, config.data.sequence_length, places), scores, config)
    train = TrainConfig(**vars(config.train) | {"global_batch_size": places[0]})
    assert fewer_rows(config, places[0])[0] == places[0]
    return rows, Config(**vars(config) | {"train": train})


def main() -> None:
    """Print tokens a second of CPU and ratios."""
    width, layers, length, count = tuple(map(int, sys.argv[1:5])) or (256, 4, 512, 16)
    model = ModelConfig(layers, width, width // 64, width // 64, 64, 3 * width, 256, dtype="float32")
    data, train = DataConfig(sequence_length=length), TrainConfig(global_batch_size=count, remat="none")
    config = Config(model=model, mesh=MeshConfig(fsdp=1), data=data, train=train)
    kinds: dict[tuple[str, bool], tuple[Callable[[], None], float, float]] = {}
    for make in (sft, grpo):
        for is_packed in (False, True):
            rows, own = make(config, is_packed)
            held = rows["segments"] > 0
            kinds[make.__name__, is_packed] = stepper(own, "blockwise", rows), float(held.sum()), float(held.mean())
    best = dict.fromkeys(kinds, float("inf"))
    for number in range(ROUNDS + 1):
        for kind, (take, _, _) in kinds.items():
            begin = time.process_time()
            take()
            best[kind] = min(best[kind], time.process_time() - begin) if number else best[kind]
    speeds = {kind: tokens / best[kind] for kind, (_, tokens, _) in kinds.items()}
    for (name, is_packed), (_, _, fill) in kinds.items():
        words, ratio = "packed" if is_packed else "padded", speeds[name, is_packed] / speeds[name, False]
        print(f"{name} {words}: {fill:.1%} full, {speeds[name, is_packed]:,.0f} tokens/s of CPU, {ratio:.2f}x")


if __name__ == "__main__":
    main()
