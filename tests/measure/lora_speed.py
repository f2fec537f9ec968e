"""Time a step with adapters beside full fine-tuning, ours and that of torch with peft, in turns on one CPU.

    python -m tests.measure.lora_speed [WIDTH LAYERS LENGTH ROWS]

Needs torch, transformers and peft. A kind's time is the least of its rounds, since other processes only ever add to it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np
import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jaxtrain.config import Config, DataConfig, LoraConfig, MeshConfig, ModelConfig, TrainConfig
from tests.measure.steps import stepper

RANK, VOCAB, ROUNDS = 16, 4096, 4


def ours(width: int, layers: int, length: int, rows: int, rank: int) -> Callable[[], None]:
    """Return a function that takes one train step and waits for it."""
    heads = width // 64
    model = ModelConfig(layers, width, heads, heads, 64, 3 * width, VOCAB, dtype="float32")
    train = TrainConfig(global_batch_size=rows, remat="none")
    data = DataConfig(sequence_length=length, mask_documents=False)
    config = Config(model=model, mesh=MeshConfig(fsdp=1), data=data, train=train)
    config = replace(config, lora=LoraConfig(rank=rank))
    return stepper(config, "reference")


def theirs(width: int, layers: int, length: int, rows: int, rank: int) -> Callable[[], None]:
    """Return the same for torch."""
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "vocab_size": VOCAB}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=width // 64, max_position_embeddings=length))
    if rank:
        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, (rows, length)))

    def take() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return take


def main() -> None:
    """Time the four kinds in turns, and print seconds a step and ratios."""
    sizes = tuple(map(int, sys.argv[1:5])) or (512, 6, 256, 4)
    kinds = {
        f"{who.__name__}, {what}": who(*sizes, rank) for who in (ours, theirs) for what, rank in (("full", 0), ("lora", RANK))
    }
    best = dict.fromkeys(kinds, float("inf"))
    for number in range(ROUNDS + 1):
        for kind, take in kinds.items():
            begun = time.perf_counter()
            take()
            if number:  # the first warms up
                best[kind] = min(best[kind], time.perf_counter() - begun)
    for kind, seconds in best.items():
        print(f"{kind}: {seconds:.3f} s a step")
    for one, other in (("ours, lora", "ours, full"), ("theirs, lora", "theirs, full"), ("ours, lora", "theirs, lora")):
        print(f"{one} / {other}: {best[one] / best[other]:.2f}")


if __name__ == "__main__":
    main()
