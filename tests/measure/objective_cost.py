"""Time a step with a weight for each token, and one that reports every log-probability too, beside plain pretraining, in turns.

    python -m tests.measure.objective_cost [WIDTH LAYERS LENGTH ROWS VOCAB]

A kind's time is the least CPU time of its rounds, since other processes only ever add to it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace

os.environ["JAX_PLATFORMS"] = "cpu"

from jaxtrain.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from jaxtrain.objectives import Objective
from tests.measure.steps import stepper

ROUNDS = 60
WEIGHTED = Objective(lambda log_p, inputs: -inputs["weights"] * log_p, ("weights",))
KINDS = {"pretrain": None, "weights": WEIGHTED, "weights and log-probabilities": replace(WEIGHTED, keeps_log_probs=True)}


def step_of(objective: Objective | None, width: int, layers: int, length: int, rows: int, vocab: int) -> Callable[[], None]:
    """Return a function that takes one train step and waits for it."""
    heads = width // 64
    model = ModelConfig(layers, width, heads, heads, 64, 3 * width, vocab, dtype="float32")
    data, train = DataConfig(sequence_length=length), TrainConfig(global_batch_size=rows, remat="none")
    config = Config(model=model, mesh=MeshConfig(fsdp=1), data=data, train=train)
    config = replace(config, parts=replace(config.parts, objective=objective))
    return stepper(config, "blockwise")


def main() -> None:
    """Print seconds a step and ratios."""
    sizes = tuple(map(int, sys.argv[1:6])) or (256, 4, 256, 4, 4096)
    kinds = {name: step_of(objective, *sizes) for name, objective in KINDS.items()}
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
