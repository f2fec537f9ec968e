"""Time a step with a weight for each token, and one that reports every log-probability too, beside plain pretraining, in turns.

    python tests/measure/objective_cost.py [WIDTH LAYERS LENGTH ROWS VOCAB]

A kind's time is the least CPU time of its rounds, since other processes only ever add to it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from jaxtrain.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from jaxtrain.measure.layouts import batch_of
from jaxtrain.mesh import make_mesh
from jaxtrain.objectives import Objective
from jaxtrain.train.gradients import batch_names, batch_sharding
from jaxtrain.train.optimizer import optimizer_of
from jaxtrain.train.state import create_state
from jaxtrain.train.step import compile_train_step, place_numbers

ROUNDS = 60
WEIGHTED = Objective(lambda log_p, inputs: -inputs["weights"] * log_p, ("weights",))
KINDS = {"pretrain": None, "weights": WEIGHTED, "weights and log-probabilities": replace(WEIGHTED, keeps_log_probs=True)}


def stepper(objective: Objective | None, width: int, layers: int, length: int, rows: int, vocab: int) -> Callable[[], None]:
    """Return a function that takes one train step and waits for it."""
    heads = width // 64
    model = ModelConfig(layers, width, heads, heads, 64, 3 * width, vocab, dtype="float32")
    data, train = DataConfig(sequence_length=length), TrainConfig(global_batch_size=rows, remat="none")
    config = Config(model=model, mesh=MeshConfig(fsdp=1), data=data, train=train)
    config = replace(config, parts=replace(config.parts, objective=objective))
    mesh, optimizer = make_mesh(config.mesh, jax.devices()[:1]), optimizer_of(config)
    held, numbers = [create_state(config, mesh, optimizer)], place_numbers(config, mesh)
    batch = batch_of(rows, length, vocabulary=vocab) | {"weights": np.ones((rows, length), np.float32)}
    batch = jax.device_put({name: batch[name] for name in batch_names(config)}, batch_sharding(mesh))
    step = compile_train_step(config, mesh, optimizer, "blockwise")

    def take() -> None:
        held[0], metrics = step(held[0], batch, numbers)
        jax.block_until_ready(metrics)

    return take


def main() -> None:
    """Print seconds a step and ratios."""
    sizes = tuple(map(int, sys.argv[1:6])) or (256, 4, 256, 4, 4096)
    kinds = {name: stepper(objective, *sizes) for name, objective in KINDS.items()}
    best = dict.fromkeys(kinds, float("inf"))
    for number in range(ROUNDS + 1):
        for name, take in kinds.items():
            begin = time.process_time()
            take()
            best[name] = min(best[name], time.process_time() - begin) if number else best[name]
    for name, seconds in best.items():
        print(f"{name:32} {seconds:.3f} s of CPU a step, {seconds / best['pretrain']:.3f} of pretraining")


if __name__ == "__main__":
    main()
