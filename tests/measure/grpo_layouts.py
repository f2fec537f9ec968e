"""Draw layouts of GRPO: score and step against one device, and rollouts whose ratio is 1 and whose sampler agrees.

    python -m tests.measure.grpo_layouts [DRAWS SEED]

Each draw is a tiny model of any kind on any mesh of eight fake devices, in float32. The step (loss, gradients, three updates)
is that of `jaxtrain layouts`. Then the engine answers prompts on that mesh, and the step's report of these answers must have a
ratio of exactly 1, and log-probabilities within 1e-5 of the sampler's on average.
"""

from __future__ import annotations

import math
import os
import random
import sys
import traceback
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from jaxtrain.verbs.layouts import QUICK

os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count=8"}

import jax
import numpy as np

from jaxtrain.config import Config, GrpoConfig, ObjectiveConfig
from jaxtrain.config.rules import find_problems
from jaxtrain.data.tokenizers import load_tokenizer
from jaxtrain.inference.engine import Sampling
from jaxtrain.measure.layouts import (
    Choose,
    axes_of,
    batch_of,
    compare,
    draw_configs,
    draw_task,
    on_one_device,
    with_second_factors,
)
from jaxtrain.mesh import make_mesh
from jaxtrain.train.answers import Answering
from jaxtrain.train.gradients import batch_sharding, make_loss_and_gradients, make_score, token_names
from jaxtrain.train.optimizer import optimizer_of
from jaxtrain.train.prepared import Prepared
from jaxtrain.train.rewards import Scores
from jaxtrain.train.rollouts import rows_of, weighed
from jaxtrain.train.state import create_state

PROMPTS, NEW = 32, 12
MOST_APART = {"score": 1e-5, "sampler": 1e-5}


def draw_grpo(choose: Choose) -> list[Config]:
    """Draw a model, settings of GRPO, and layouts of them."""
    task = draw_task(choose)
    grpo = GrpoConfig(
        "configs/grpo_quickstart.py",
        group_size=4,
        max_new_tokens=NEW,
        temperature=choose((1.0, 0.7, 1.3)),
        advantage=choose(("grpo", "dr_grpo", "rloo")),
        kl=choose((0.0, 0.1)),
        importance_cap=choose((2.0, 1.1)),
    )
    moe = task.model.moe and replace(task.model.moe, dispatch="dropless")
    model = replace(task.model, moe=moe, param_dtype="float32")
    data = replace(task.data, mask_documents=True)
    return draw_configs(choose, 8, replace(task, model=model, data=data, objective=ObjectiveConfig("grpo", grpo=grpo)))


def scored(config: Config) -> np.ndarray:
    """Return log p of each target of a packed batch, under the initial weights."""
    mesh = make_mesh(config.mesh, jax.devices()[: math.prod(config.mesh.shape)])
    batch: dict[str, Any] = dict(batch_of(PROMPTS, config.data.sequence_length))
    if config.model.moe is not None:
        width = config.model.stacked_layers * config.model.moe.experts_per_token
        batch["experts"] = np.full((*batch["tokens"].shape, width), -1, np.int32)
    placed = jax.device_put({name: batch[name] for name in token_names(config)}, batch_sharding(mesh))
    params = with_second_factors(config, create_state(config, mesh, optimizer_of(config))["params"])
    return np.asarray(make_score(config, mesh, config.model.attention)(params, placed))


def rolled_out(config: Config) -> dict[str, float]:
    """Return what a step says of a batch of sampled answers."""
    prepared = Prepared(config)
    params = with_second_factors(config, prepared.create_state()["params"])
    vocabulary = config.model.vocab_size
    rng, grpo = np.random.default_rng(0), config.objective.grpo
    asked: list[Any] = [SimpleNamespace(ids=rng.integers(0, vocabulary, 1 + i % 9).tolist(), row={}) for i in range(PROMPTS)]
    t = grpo.temperature
    samplings = [Sampling(1 + i % NEW, temperature=t, seed=i, policy_temperature=t) for i in range(PROMPTS)]
    answers = Answering(prepared, load_tokenizer("byte")).answers(params, asked, samplings, lambda part: False)
    assert answers is not None
    rewards = Scores(rng.normal(size=(PROMPTS // 4, 4)).astype(np.float32), (), 0.0)
    batch = weighed(rows_of(asked, answers, config.data.sequence_length), rewards, config)
    batch["reference_log_probs"] = batch["sampler_log_probs"]
    step = jax.jit(make_loss_and_gradients(config, prepared.mesh, prepared.backend))
    metrics = step(params, prepared.place(batch))[0]
    return {name: float(metrics[name]) for name in ("ratio_change", "sampler_difference", "clipped", "targets")}


def problem_of(config: Config) -> str:
    """Return what differs, or nothing."""
    problems = [compare(config).problem or ""]
    one = on_one_device(config)
    apart = float(np.abs(scored(config) - scored(one)).max())
    problems.append(f"score is off by {apart:.1e}" if not apart <= MOST_APART["score"] else "")
    found = rolled_out(config)
    if found["ratio_change"] != 0 or found["clipped"] != 0 or not found["sampler_difference"] <= MOST_APART["sampler"]:
        problems.append(f"rollout: {found}")
    return "; ".join(filter(None, problems))


def main() -> None:
    """Draw, compare, print."""
    draws, seed = (int(word) for word in (*sys.argv[1:], "20", "0")[:2]) if len(sys.argv) != 2 else (int(sys.argv[1]), 0)
    chance, done, failed = random.Random(seed), 0, 0
    while done < draws:
        for config in draw_grpo(chance.choice):
            try:
                assert not find_problems(config, 8)[1]
                problem = problem_of(config)
            except Exception:
                problem = traceback.format_exc(limit=-4)
            done, failed = done + 1, failed + bool(problem)
            print(f"{done}/{draws} {axes_of(config)}: {problem + chr(10) + repr(config) if problem else 'equal'}", flush=True)
        jax.clear_caches()
    print(f"{failed} of {done} differ")


if __name__ == "__main__":
    main()
